"""One command that measures a GPU: tests, training, nanoGPT beside it, generation and memory.

    python tests/benchmarks/gpu.py --nanogpt ../nanoGPT --text sherlock.txt tinyshakespeare.txt

Prints one Markdown table with the name of the device, and writes the same as JSON. It fits into ten
minutes on a recent card. `--device cpu --steps 20` tries the script itself without one.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import torch

import anexagpt

# Runs in a process of its own, so that every measurement begins with an empty device.
CHILD = """
import json, sys, time
sys.path.insert(0, {root!r})
import torch, anexagpt
if not {graph}:
    anexagpt.CudaGraph = lambda fn: fn
loop, times = anexagpt.training_loop, []
def timed(*args):
    times.append(time.perf_counter())
    loop(*args)
anexagpt.training_loop = timed
status = anexagpt.main({argv!r})
seconds = time.perf_counter() - times[0]
memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
print(json.dumps(dict(status=status, seconds=seconds, gigabytes=memory / 1e9)))
"""


def train(text: Path, out: Path, *options: str, graph: bool = True) -> dict:
    """Seconds from the first step to the saved file, losses, characters/s and peak memory."""
    argv = ["train", "--data", str(text), "--out", str(out), "--quiet", "--restart", *options]
    code = CHILD.format(root=str(ROOT), graph=graph, argv=argv)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode or not done.stdout.strip():
        return dict(error=done.stderr.strip().splitlines()[-1:])
    found = json.loads(done.stdout.splitlines()[-1])
    m = anexagpt.load(out).metadata
    best = min(m.history, key=lambda row: row[2])
    n = m.training["max_steps"] * m.training["batch_size"] * m.config["block_size"]
    return found | dict(
        characters_per_second=n / found["seconds"],
        steps=m.step,
        best_validation_loss=best[2],
        best_step=best[0],
        final_training_loss=m.history[-1][1],
        final_validation_loss=m.history[-1][2],
    )


def nanogpt(checkout: Path, text: Path, device: str, steps: int, compiled: bool) -> dict:
    """nanoGPT's own train.py on the shape of our default run: seconds, and its last losses."""
    folder = checkout / "data" / "anexa_benchmark"
    folder.mkdir(parents=True, exist_ok=True)
    content = "".join(anexagpt.read_texts([(text, "utf-8")]))
    (folder / "input.txt").write_text(content, encoding="utf-8")
    prepare = (checkout / "data" / "shakespeare_char" / "prepare.py").read_text(encoding="utf-8")
    (folder / "prepare.py").write_text(prepare, encoding="utf-8")
    subprocess.run([sys.executable, "prepare.py"], cwd=folder, check=True, capture_output=True)
    command = [
        *(sys.executable, "-u", "train.py", "config/train_shakespeare_char.py"),
        *("--dataset=anexa_benchmark", f"--out_dir={tempfile.mkdtemp()}", "--n_layer=4"),
        *("--n_head=4", "--n_embd=128", "--block_size=256", "--batch_size=16", "--dropout=0.2"),
        *(f"--max_iters={steps}", f"--lr_decay_iters={steps}", f"--eval_interval={steps}"),
        *(f"--device={device}", f"--compile={compiled}", "--eval_iters=20"),
    ]
    started, losses = None, ""
    with subprocess.Popen(
        command, cwd=checkout, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        for line in process.stdout:
            if line.startswith("iter 0:"):  # compilation does not count
                started = time.perf_counter()
            losses = line.strip() if line.startswith("step ") else losses
            last = line.strip()
    if process.returncode or not started:
        return dict(error=last)
    seconds = time.perf_counter() - started
    return dict(seconds=seconds, characters_per_second=steps * 16 * 256 / seconds, losses=losses)


def generate(path: Path, device: str, streams: int, n: int) -> dict:
    """Characters per second of one text or of several at once, after a warm-up."""
    model = anexagpt.load(path, device)
    cfg = anexagpt.SampleConfig(max_new=n, seed=1)
    for _ in range(2):
        started = time.perf_counter()
        for _ in model.stream_batch("\n", cfg, range(streams)):
            pass
        seconds = time.perf_counter() - started
    return dict(characters_per_second=n * streams / seconds)


def cuda_tests() -> dict:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "tests"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return dict(result=done.stdout.strip().splitlines()[-1])


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{device} of {platform.processor() or platform.machine()}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", nargs=2, type=Path, required=True, help="Sherlock, Shakespeare")
    parser.add_argument("--nanogpt", type=Path, help="a checkout of karpathy/nanoGPT")
    parser.add_argument("--device", choices=("cuda", "mps", "cpu"))
    parser.add_argument("--steps", type=int, default=5_000, help="of the default run")
    parser.add_argument("--seconds", type=float, default=60.0, help="for --size medium")
    parser.add_argument("--json", type=Path, default=Path("gpu.json"))
    args = parser.parse_args()
    available = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available())
    device = args.device or next((name for name, found in available.items() if found), "")
    if not device or not available.get(device, True):
        print("gpu.py: PyTorch finds no CUDA or MPS device; to try it: --device cpu")
        return 2
    sherlock, shakespeare = args.text
    options = ["--device", device, "--max-steps", str(args.steps)]
    results = {}

    def measure(name: str, work) -> dict:
        print(f"{name} ...", file=sys.stderr, flush=True)
        results[name] = work()
        return results[name]

    with tempfile.TemporaryDirectory() as folder:
        out, medium = Path(folder) / "default.safetensors", Path(folder) / "medium.safetensors"
        if device == "cuda":
            measure("tests marked cuda", cuda_tests)
        measure("default run", lambda: train(sherlock, out, *options))
        if device == "cuda":
            off = lambda: train(sherlock, Path(folder) / "eager.safetensors", *options, graph=False)
            measure("default run without CUDA graph", off)
        for compiled in (False, True) if args.nanogpt else ():
            peer = lambda c=compiled: nanogpt(args.nanogpt, sherlock, device, args.steps, c)
            measure(f"nanoGPT, 16 x 256, compile {'on' if compiled else 'off'}", peer)
        size = ["--device", device, "--size", "medium"]
        trial_steps = max(2, min(100, args.steps // 10))
        trial = measure(
            f"medium on TinyShakespeare, {trial_steps} steps",
            lambda: train(shakespeare, medium, *size, "--max-steps", str(trial_steps)),
        )
        steps = max(2, int(trial_steps * args.seconds / trial["seconds"]))
        clock = lambda: train(shakespeare, medium, *size, "--max-steps", str(steps))
        measure(f"medium on TinyShakespeare in {args.seconds:.0f} s", clock)
        for streams in (1, 64):
            work = lambda k=streams: generate(out, device, k, min(1_000, 50 * args.steps))
            measure(f"generation, {streams} at once", work)

    print(f"\n{device_name(device)}, PyTorch {torch.__version__}, {platform.platform()}\n")
    print("| what | result |\n|---|---|")
    for name, result in results.items():
        shown = {k: f"{v:,.4g}" if isinstance(v, float) else v for k, v in result.items()}
        cells = (f"{k.replace('_', ' ')} {v}" for k, v in shown.items())
        print(f"| {name} | {re.sub('[|]', '/', ', '.join(cells))} |")
    record = dict(device=device_name(device), torch=torch.__version__, results=results)
    args.json.write_text(json.dumps(record, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
