"""Time and memory until a run on a text can begin, by the size of the text.

    python tests/benchmarks/corpus.py --text tinyshakespeare.txt sherlock.txt --sizes 1 10 100 1000

Texts of each size (in MB) are mixed from the lines of real ones. Needs Linux.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent

MEASURE = """
import time
import anexagpt
def memory(entry):  # MB
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(entry)) / 1024
before, start = memory("VmRSS"), time.perf_counter()
corpus = anexagpt.load_corpus(["text.txt"])
print(time.perf_counter() - start, memory("VmHWM") - before)
"""


def mix(path: Path, texts: list[list[str]], megabytes: float) -> None:
    """Write blocks of 50 lines, drawn at random."""
    rng, size = random.Random(1), 0
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        while size < megabytes * 1e6:
            lines = rng.choice(texts)
            at = rng.randrange(len(lines))
            size += file.write("".join(lines[at : at + 50]))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", nargs="+", type=Path, required=True, help="real texts to mix")
    parser.add_argument("--sizes", nargs="+", type=float, default=[1, 10, 100, 1000], help="in MB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    texts = [p.read_text(encoding="utf-8-sig").splitlines(keepends=True) for p in args.text]
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{MEASURE}"]
    rows = []
    print("    MB   seconds    MB/s   memory MB")
    for megabytes in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            mix(Path(folder) / "text.txt", texts, megabytes)
            options = dict(cwd=folder, capture_output=True, text=True, check=True)
            runs = [subprocess.run(command, **options).stdout.split() for _ in range(args.rounds)]
        seconds, memory = (
            statistics.median(map(float, column)) for column in zip(*runs, strict=True)
        )
        rows.append(dict(megabytes=megabytes, seconds=seconds, memory_mb=memory))
        print(
            f"{megabytes:6.0f} {seconds:9.2f} {megabytes / seconds:7.0f} {memory:11.0f}", flush=True
        )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
