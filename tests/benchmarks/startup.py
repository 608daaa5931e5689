"""Start-up: time to --help, to the first prompt and others, against `import torch`, and memory.

    python tests/benchmarks/startup.py --model model.safetensors --text tinyshakespeare.txt

Each command gets an input that ends at once. POSIX only.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROGRAM = Path(__file__).resolve().parents[2] / "anexagpt.py"


def measure(command: list[str], folder: str) -> tuple[float, float, float]:
    """Seconds, seconds of the processor, and the largest memory in MB of a command."""
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=folder, **streams)
    _, _, used = os.wait4(process.pid, 0)
    megabytes = used.ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)
    return time.perf_counter() - start, used.ru_utime + used.ru_stime, megabytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True, help="to train on for 20 steps")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    ours, model = [sys.executable, str(PROGRAM)], ["--model", str(args.model.resolve())]
    train = [*ours, "train", "--data", str(args.text.resolve()), "--max-steps", "20", "--restart"]
    commands = {
        "import torch": [sys.executable, "-c", "import torch"],
        "--help": [*ours, "--help"],
        "chat, first prompt": [*ours, "chat", *model],
        "generate, 300 characters": [*ours, "generate", "It was", *model],
        "generate, 64 texts": [*ours, "generate", "It was", "-k", "64", *model],
        "train, 20 steps of 6 x 256": train,
        "train --size medium, 20 steps of 6 x 256": [*train, "--size", "medium"],
    }
    figures = {name: [] for name in commands}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(args.rounds + 1):  # the first fills the system's caches
            for name, command in commands.items():
                if turn == 1 or not name.startswith("train"):
                    figures[name] += [measure(command, folder)]
    print("| what | seconds | of the processor | x `import torch` | MB |\n|---|---|---|---|---|")
    for name, rounds in figures.items():
        seconds, cpu, memory = map(statistics.median, zip(*rounds[1:] or rounds, strict=True))
        ratio = seconds / statistics.median(row[0] for row in figures["import torch"][1:])
        print(f"| {name} | {seconds:.2f} | {cpu:.2f} | {ratio:.2f} | {memory:,.0f} |")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
