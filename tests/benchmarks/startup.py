"""Start-up: how long until the program answers, against `import torch` alone, and the most memory of each phase.

    python tests/benchmarks/startup.py --model model.safetensors --text tinyshakespeare.txt

`chat` is timed to its first prompt, by an input that ends at once. POSIX only: memory is what the system tells of a
process that has ended.
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

PROGRAM = Path(__file__).resolve().parents[2] / "anexagpt.py"


def measured(command: list[str], folder: str) -> tuple[float, float, float]:
    """Seconds by the clock, seconds of the processor, and the most memory in MB of a command that gets no input."""
    start = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, _, used = os.wait4(process.pid, 0)
    scale = 1 << 20 if sys.platform == "darwin" else 1 << 10
    return time.perf_counter() - start, used.ru_utime + used.ru_stime, used.ru_maxrss / scale


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True, help="for the training whose memory is measured")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    options = parser.parse_args()
    ours, model = [sys.executable, str(PROGRAM)], ["--model", str(options.model.resolve())]
    training = [*ours, "train", "--data", str(options.text.resolve()), "--max-steps", "20", "--restart"]
    commands = {
        "import torch": [sys.executable, "-c", "import torch"],
        "--help": [*ours, "--help"],
        "a mistyped option": [*ours, "train", "--max-stpes", "5"],
        "info": [*ours, "info", *model],
        "chat, first prompt": [*ours, "chat", *model],
        "generate, 300 characters": [*ours, "generate", "It was", *model],
        "generate, 64 texts": [*ours, "generate", "It was", "-k", "64", *model],
        "train, 20 steps of 6 x 256": training,
        "train --size medium, 20 steps of 6 x 256": [*training, "--size", "medium"],
    }
    once = [name for name in commands if name.startswith("train")]
    figures: dict[str, list[tuple[float, float, float]]] = {name: [] for name in commands}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(options.rounds + 1):
            for name, command in commands.items():
                if turn and (turn == 1 or name not in once):  # the first turn fills the system's caches
                    figures[name].append(measured(command, folder))
                elif not turn and name not in once:
                    measured(command, folder)
    print("| what | seconds | of the processor | times `import torch` | most memory, MB |\n|---|---|---|---|---|")
    for name, rounds in figures.items():
        wall, cpu, memory = (statistics.median(column) for column in zip(*rounds, strict=True))
        ratio = statistics.median(a[0] / b[0] for a, b in zip(rounds, figures["import torch"], strict=False))
        print(f"| {name} | {wall:.2f} | {cpu:.2f} | {ratio:.2f} | {memory:,.0f} |")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
