"""One command that measures a GPU: tests, training, nanoGPT beside it, generation and memory.

    python tests/benchmarks/gpu.py --nanogpt ../nanoGPT --text sherlock.txt tinyshakespeare.txt

Prints one Markdown table with the name of the device. The same is in gpu.json after each
measurement; one that fails has its error in its row, and the others go on. A training run counts
from its first step to its saved file; start and evaluation have figures of their own. It fits into
ten minutes on a recent card. `--device cpu --steps 20` tries the script itself without one.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import torch

import anexagpt
from anexagpt import GPTConfig, SampleConfig, TrainConfig, Trainer


def in_new_process(function: Callable[..., dict], *arguments) -> dict:
    """function(*arguments) in a process of its own, so that it begins with an empty device."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def run_command(command: list[str], folder: Path) -> list[str]:
    """Lines that a command prints.  raises: RuntimeError if there are none"""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    if not lines:
        raise RuntimeError(f"exit status {done.returncode}: {done.stderr.strip()[-300:]}")
    return lines


# ---- measurements --------------------------------------------------------------------------------


def cuda_tests() -> dict:
    """Test files that cannot be imported, as where pexpect is missing, count as errors."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider"]
    lines = run_command([*command, "--continue-on-collection-errors", "tests"], ROOT)
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"result": lines[-1], "not passed": "; ".join(failed)[:1_000]}


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


class TimedTrainer(Trainer):
    """A Trainer that measures how long its evaluations take."""

    evaluation_seconds = 0.0

    def evaluate(self) -> None:
        synchronize(self.device)
        started = time.perf_counter()
        super().evaluate()
        self.evaluation_seconds += time.perf_counter() - started


def train(
    asked: float, text: Path, out: Path, device: str, shape: dict, steps: int, graph: bool
) -> dict:
    """Seconds from the first step to the saved file, losses, characters/s and peak memory.

    asked: time.time() when this process was asked for
    """
    corpus = anexagpt.load_corpus([str(text)])
    selected = anexagpt.select_device(device)
    dtype = anexagpt.select_dtype("auto", selected)
    with anexagpt.training_state(selected):
        cfg = TrainConfig(max_steps=steps)
        trainer = TimedTrainer(corpus, GPTConfig(**shape), cfg, selected, dtype)
        anexagpt.use_fast_training(trainer)  # a CUDA graph only for a plain Trainer
        if graph and device == "cuda":
            trainer.update = anexagpt.CudaGraph(trainer.update)
        synchronize(selected)
        start_up_seconds = time.time() - asked
        started = time.perf_counter()
        trainer.fit()
        model = trainer.best_model()
        model.save(out)
        seconds = time.perf_counter() - started
    training_seconds = seconds - trainer.evaluation_seconds
    n = steps * trainer.cfg.batch_size * trainer.network.config.block_size
    best = min(trainer.history, key=lambda row: row.validation_loss)
    last = trainer.history[-1]
    result = {
        "steps": steps,
        "batch size": trainer.cfg.batch_size,
        "dtype": model.metadata.training["dtype"],
        "seconds to start": start_up_seconds,
        "from the first step to the file": seconds,
        "of which evaluation": trainer.evaluation_seconds,
        "ms per step": 1e3 * training_seconds / steps,
        "characters per second": n / training_seconds,
        "best validation loss": best.validation_loss,
        "best step": best.step,
        "last training loss": last.training_loss,
        "last validation loss": last.validation_loss,
    }
    if device == "cuda":
        result["peak GB"] = torch.cuda.max_memory_allocated() / 1e9
    return result


def train_in_new_process(*arguments) -> dict:
    return in_new_process(train, time.time(), *arguments)


def nanogpt(checkout: Path, text: Path, device: str, steps: int, compiled: bool) -> dict:
    """nanoGPT's own train.py on the shape of our default run: seconds, and its last losses."""
    folder = checkout / "data" / "anexa_benchmark"
    folder.mkdir(parents=True, exist_ok=True)
    pieces = anexagpt.read_texts([anexagpt.Source(text, "utf-8")])
    (folder / "input.txt").write_text("".join(pieces), encoding="utf-8")
    prepare = (checkout / "data" / "shakespeare_char" / "prepare.py").read_text(encoding="utf-8")
    (folder / "prepare.py").write_text(prepare, encoding="utf-8")
    run_command([sys.executable, "prepare.py"], folder)
    command = f"""-u train.py config/train_shakespeare_char.py --dataset=anexa_benchmark
        --out_dir={tempfile.mkdtemp()} --n_layer=4 --n_head=4 --n_embd=128 --block_size=256
        --batch_size=16 --dropout=0.2 --max_iters={steps} --lr_decay_iters={steps}
        --eval_interval={steps} --eval_iters=20 --device={device} --compile={compiled}"""
    started = None
    losses = last = ""
    with subprocess.Popen(
        [sys.executable, *command.split()],
        cwd=checkout,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        for line in process.stdout:
            last = line.strip()
            if last.startswith("iter 0:"):  # compilation does not count
                started = time.perf_counter()
            if last.startswith("step "):
                losses = last
    if process.returncode != 0 or started is None:
        raise RuntimeError(last)
    seconds = time.perf_counter() - started
    speed = steps * 16 * 256 / seconds
    return {"seconds": seconds, "characters per second": speed, "losses": losses}


def generate(path: Path, device: str, n_texts: int, n: int) -> dict:
    """Characters per second of one text or of several at once, after a warm-up."""
    model = anexagpt.load(path, device)
    cfg = SampleConfig(max_new=n, seed=1)
    for _ in range(2):
        started = time.perf_counter()
        for _ in model.stream_batch("\n", cfg, range(n_texts)):
            pass
        seconds = time.perf_counter() - started
    return {"characters per second": n * n_texts / seconds}


# ---- report --------------------------------------------------------------------------------------


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{device} of {platform.processor() or platform.machine()}"


def show(value) -> str:
    text = f"{value:,.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.replace("|", "/").split())


class Report:
    """Results by the name of the measurement, written after each of them."""

    def __init__(self, path: Path, device: str):
        self.path = path
        self.device = device_name(device)
        self.results = {}

    def measure(self, name: str, function: Callable[..., dict], *arguments) -> dict:
        """The result of function(*arguments), or its error."""
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            result = function(*arguments)
        except Exception as error:  # whatever it is, it belongs into the table
            result = {"error": f"{type(error).__name__}: {error}"}
        self.results[name] = result
        self.save()
        return result

    def save(self) -> None:
        record = {"device": self.device, "torch": torch.__version__, "results": self.results}
        temporary = self.path.with_name(f"{self.path.name}.tmp")
        temporary.write_text(json.dumps(record, indent=1), encoding="utf-8")
        os.replace(temporary, self.path)

    def print(self) -> None:
        print(f"\n{self.device}, PyTorch {torch.__version__}, {platform.platform()}\n")
        print("| what | result |\n|---|---|")
        for name, result in self.results.items():
            cells = [f"{key} {show(value)}" for key, value in result.items() if value != ""]
            print(f"| {name} | {', '.join(cells)} |")


def measure_all(report: Report, args: argparse.Namespace, device: str, folder: Path) -> None:
    sherlock, shakespeare = args.text
    steps = args.steps
    small = anexagpt.SIZES["small"]
    medium = anexagpt.SIZES["medium"]
    out = folder / "default.safetensors"
    other = folder / "other.safetensors"
    measure = report.measure

    if device == "cuda":
        measure("tests marked cuda", cuda_tests)
    arguments = (sherlock, out, device, small, steps)
    measure("default run", train_in_new_process, *arguments, True)
    if device == "cuda":
        arguments = (sherlock, other, device, small, steps)
        measure("default run without CUDA graph", train_in_new_process, *arguments, False)
    for n_texts in (1, 64):
        arguments = (out, device, n_texts, min(1_000, 50 * steps))
        measure(f"generation, {n_texts} at once", in_new_process, generate, *arguments)
    if args.nanogpt:
        for compiled in (False, True):
            name = f"nanoGPT, 16 x 256, compile {'on' if compiled else 'off'}"
            measure(name, nanogpt, args.nanogpt, sherlock, device, steps, compiled)

    n_trial = max(2, min(100, steps // 10))
    arguments = (shakespeare, other, device, medium)
    name = "medium on TinyShakespeare"
    trial = measure(f"{name}, trial", train_in_new_process, *arguments, n_trial, True)
    if "error" not in trial:
        n = max(2, int(1e3 * args.seconds / trial["ms per step"]))
        name += f", {args.seconds:.0f} s and evaluation"
        measure(name, train_in_new_process, *arguments, n, True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", nargs=2, type=Path, required=True, help="Sherlock, Shakespeare")
    parser.add_argument("--nanogpt", type=Path, help="a checkout of karpathy/nanoGPT")
    parser.add_argument("--device", choices=("cuda", "mps", "cpu"))
    parser.add_argument("--steps", type=int, default=5_000, help="of the default run")
    parser.add_argument("--seconds", type=float, default=60.0, help="for --size medium")
    parser.add_argument("--json", type=Path, default=Path("gpu.json"))
    args = parser.parse_args()
    try:
        device = anexagpt.select_device(args.device or "auto").type
    except anexagpt.UserError as error:
        print(f"gpu.py: {error}")
        return 2
    if device == "cpu" and args.device != "cpu":
        print("gpu.py: PyTorch finds no CUDA or MPS device; to try it: --device cpu")
        return 2
    report = Report(args.json, device)
    with tempfile.TemporaryDirectory() as folder:
        measure_all(report, args, device, Path(folder))
    report.print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
