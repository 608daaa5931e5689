"""How long a text takes until a training can begin, and how much memory: by its size, first run and later ones.

    python tests/benchmarks/corpus.py --text tinyshakespeare.txt sherlock.txt --sizes 1 10 100 1000

Texts of each size are mixed from the lines of real ones, in an empty folder that goes at the end.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent

MEASURE = """
import sys, time
import anexagpt
def memory(entry):  # MB, as Linux counts it
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(entry)) / 1024
anexagpt.torch.zeros(1).add(1)
before, start = memory("VmRSS"), time.perf_counter()
corpus = anexagpt.load_corpus("text.txt")
print(time.perf_counter() - start, memory("VmHWM") - before, len(corpus.ids), corpus.ids.element_size())
starts = anexagpt.window_starts(0, 1000, 6, len(corpus.ids), 256, 1)
for ids in corpus.ids, corpus.ids.clone():
    start = time.perf_counter()
    for step in starts:
        ids.unfold(0, 257, 1)[step]
    print(time.perf_counter() - start)
"""


def mix(path: Path, texts: list[str], megabytes: float) -> int:
    """Write lines of the texts, in blocks of 50 that are drawn at random; returns the bytes written."""
    draw, size = random.Random(1), 0
    lines = [text.splitlines(keepends=True) for text in texts]
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        while size < megabytes * 1e6:
            some = draw.choice(lines)
            at = draw.randrange(len(some))
            piece = "".join(some[at : at + 50])
            file.write(piece)
            size += len(piece.encode())
    return size


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", nargs="+", type=Path, required=True, help="real texts to mix")
    parser.add_argument("--sizes", nargs="+", type=float, default=[1, 10, 100, 1000], help="in MB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--curly", action="store_true", help="curly quotes, so that the text is not ASCII")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    texts = [path.read_text(encoding="utf-8-sig") for path in options.text]
    if options.curly:
        texts = [text.replace("'", "\u2019") for text in texts]
    rows = []
    print("    MB  first run s    MB/s  memory MB  later run s  memory MB  ms a step's windows from file  from memory")
    for megabytes in options.sizes:
        with tempfile.TemporaryDirectory() as folder:
            size = mix(Path(folder) / "text.txt", texts, megabytes)
            first, later = [], []
            for _ in range(options.rounds):
                for left in Path(folder).glob("data/*"):
                    left.unlink()
                for runs in first, later:
                    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{MEASURE}"]
                    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
                    runs.append([float(word) for word in done.stdout.split()])
        seconds, memory, characters, width, *_ = sorted(first)[len(first) // 2]
        again = sorted(later)[len(later) // 2]
        row = dict(bytes=size, characters=int(characters), bytes_per_id=int(width), seconds=seconds, memory_mb=memory)
        rows.append(row | dict(later_seconds=again[0], later_memory_mb=again[1], windows_ms=again[4:]))
        figures = f"{seconds:12.3f} {size / 1e6 / seconds:7.0f} {memory:10.0f} {again[0]:12.4f} {again[1]:10.0f}"
        figures += f"{again[4]:31.3f}{again[5]:13.3f}"
        print(f"{size / 1e6:6.0f} {figures}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
