"""Start-up: time to --help, to the first prompt and others, against `import torch`, and memory.

    python tests/benchmarks/startup.py --model model.safetensors --text tinyshakespeare.txt

Each command gets an input that ends at once. POSIX only.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

PROGRAM = Path(__file__).resolve().parents[2] / "anexagpt.py"


class Usage(NamedTuple):
    seconds: float
    cpu_seconds: float
    megabytes: float  # the most memory at any time


def measure(command: list[str], folder: str) -> Usage:
    """raises: RuntimeError if the command fails"""
    started = time.perf_counter()
    process = subprocess.Popen(
        command,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise RuntimeError(f"exit status {process.returncode} of {' '.join(command)}")
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
    return Usage(seconds, used.ru_utime + used.ru_stime, used.ru_maxrss / unit)


def commands(model: Path, text: Path) -> dict[str, list[str]]:
    ours = [sys.executable, str(PROGRAM)]
    generate = [*ours, "generate", "It was", "--model", str(model.resolve())]
    train = [*ours, "train", "--data", str(text.resolve()), "--max-steps", "20", "--restart"]
    return {
        "import torch": [sys.executable, "-c", "import torch"],
        "--help": [*ours, "--help"],
        "chat, first prompt": [*ours, "chat", "--model", str(model.resolve())],
        "generate, 300 characters": generate,
        "generate, 64 texts": [*generate, "-k", "64"],
        "train, 20 steps of 6 x 256": train,
        "train --size medium, 20 steps of 6 x 256": [*train, "--size", "medium"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True, help="to train on for 20 steps")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(args.rounds + 1):
            for name, command in commands(args.model, args.text).items():
                if name.startswith("train") and turn != 1:
                    continue  # too slow for more than one turn
                usage = measure(command, folder)
                if turn > 0:  # the first fills the system's caches
                    figures.setdefault(name, []).append(usage)
    baseline = statistics.median(usage.seconds for usage in figures["import torch"])
    print("| what | seconds | of the processor | x `import torch` | MB |\n|---|---|---|---|---|")
    for name, rounds in figures.items():
        seconds, cpu_seconds, megabytes = map(statistics.median, zip(*rounds, strict=True))
        ratio = seconds / baseline
        print(f"| {name} | {seconds:.2f} | {cpu_seconds:.2f} | {ratio:.2f} | {megabytes:,.0f} |")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
