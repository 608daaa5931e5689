"""Scale: characters a second and memory of a training as the network grows, and as processes share the work.

    python tests/benchmarks/scale.py --text tinyshakespeare.txt

Each figure is of a program of its own, evaluation and start-up aside. POSIX only.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROGRAM = Path(__file__).resolve().parents[2] / "anexagpt.py"
sys.path.insert(0, str(PROGRAM.parent))


def megabytes(used: resource.struct_rusage) -> float:
    return used.ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def together(text: Path, processes: int, threads: int) -> tuple[float, float]:
    """Characters a second of all processes of a training, and the most memory of one of them, in MB."""
    with tempfile.TemporaryDirectory() as folder:
        # A short text: the speed that --log tells is from one evaluation to the next, and includes it.
        (Path(folder) / "text.txt").write_text(text.read_text("utf-8")[:60_000])
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "--"]
        command = [sys.executable, *(torchrun if processes > 1 else []), str(PROGRAM), "train", "--data", "text.txt"]
        command += "--dropout 0 --batch-size 12 --max-steps 90 --eval-interval 30 --log log.csv".split()  # noqa: SIM905
        environment = os.environ | dict(OMP_NUM_THREADS=str(threads))
        process = subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)  # of torchrun's processes, the largest
        assert status == 0, command
        with open(Path(folder) / "log.csv") as file:
            speeds = [float(row["characters_per_second"]) for row in csv.DictReader(file)]
        return statistics.median(speeds[1:]), megabytes(used)


def alone(text: Path, size: str, batch: int, parts: int, steps: int) -> None:
    """Print characters a second and memory of the training of a network in this very process."""
    import torch

    import anexagpt

    ids = anexagpt.load_corpus(str(text)).ids
    config = anexagpt.GPTConfig(vocab_size=int(ids.max()) + 1, dropout=0.0, **anexagpt.SIZES[size])
    cfg = anexagpt.TrainConfig(batch_size=batch, grad_accum=parts)
    device, dtype = anexagpt.choose_device(anexagpt.DeviceConfig(device="cpu"))
    trainer, times = anexagpt.Trainer(config, cfg, ids, device, dtype), []
    with anexagpt.kept_memory():
        for _ in range(steps + 1):
            start = time.perf_counter()
            trainer.update()
            times.append(time.perf_counter() - start)
    speed = batch * config.block_size / statistics.median(times[1:])
    print(json.dumps([speed, megabytes(resource.getrusage(resource.RUSAGE_SELF)), torch.get_num_threads()]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--cores", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    parser.add_argument("--alone", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        size, *numbers = options.alone
        return alone(options.text, size, *map(int, numbers))
    n, figures = options.cores, {}
    for _ in range(options.rounds):
        for processes, threads in ((1, 1), (1, n), (n, 1)):
            name = f"small, batch 12, processes: {processes}, threads each: {threads}"
            figures.setdefault(name, []).append(together(options.text, processes, threads))
    for size, batch, parts, steps in (("small", 4, 1, 40), ("medium", 4, 1, 8), ("large", 4, 1, 2), ("large", 4, 4, 2)):
        how = [size, str(batch), str(parts), str(steps)]
        command = [sys.executable, __file__, "--text", str(options.text.resolve()), "--alone", *how]
        environment = os.environ | dict(OMP_NUM_THREADS=str(n))
        for _ in range(options.rounds if size == "small" else 1):
            out = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=environment).stdout
            name = f"{size}, batch {batch}" + (f" in {parts} parts" if parts > 1 else "")
            figures.setdefault(name, []).append(json.loads(out)[:2])
    print("| training | characters/s | most memory of a process, MB |\n|---|---|---|")
    for name, rounds in figures.items():
        speed, memory = (statistics.median(column) for column in zip(*rounds, strict=True))
        print(f"| {name} | {speed:,.0f} | {memory:,.0f} |")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
