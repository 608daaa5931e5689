"""Training: Anexa against nanoGPT and a plain transformers loop: same shape, batch and text.

    python tests/benchmarks/train.py --text tinyshakespeare.txt --nanogpt ../nanoGPT

Two questions. How many characters per second, optimizer included, evaluation aside? How long from
the first step to the validation loss that nanoGPT's own CPU command ends with? Its loss and ours
are over the whole validation part, the same characters in the same windows. Every program has its
default settings; nanoGPT runs its own train.py, unchanged, and computes in float32, as does the
loop with transformers. Without --nanogpt only the others run. A processor without bfloat16 is
simulated on a newer one by --dtype float32 and

    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2
"""

from __future__ import annotations

import argparse
import json
import math
import pickle
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import numpy as np
import torch

import anexagpt
from anexagpt import Corpus, GPTConfig, TrainConfig, Trainer

SHAPE = {"n_layer": 4, "n_head": 4, "n_embd": 128}


class Run(NamedTuple):
    ms: float  # per step, median, without evaluation
    seconds: float = 0.0  # from the first step to the end, with evaluation
    loss: float = 0.0  # lowest validation loss


def median_ms(times: list[float]) -> float:
    """Median milliseconds between the `times`, in seconds, of steps; the first fifth is warm-up.

    Two steps are taken together: without bfloat16 only every second updates the matrices.
    """
    two_steps = np.diff(times[len(times) // 5 :: 2])
    return 1e3 * statistics.median(two_steps) / 2


# ---- Anexa ---------------------------------------------------------------------------------------


def anexa(corpus: Corpus, block: int, batch: int, steps: int, dtype: str) -> Run:
    config = GPTConfig(block_size=block, **SHAPE)
    cfg = TrainConfig(batch_size=batch, max_steps=steps, eval_interval=steps)
    device = anexagpt.select_device("cpu")
    dtype = anexagpt.select_dtype(dtype, device)
    times = []

    def note_time(trainer: Trainer) -> bool:
        times.append(time.perf_counter())
        return False

    with anexagpt.training_state(device):
        trainer = Trainer(corpus, config, cfg, device, dtype)
        anexagpt.use_fast_training(trainer)
        started = time.perf_counter()
        trainer.fit(should_stop=note_time)
        seconds = time.perf_counter() - started
        loss, _ = anexagpt.evaluate(trainer.ema, anexagpt.split_ids(corpus.ids)[1])
    return Run(median_ms([started, *times]), seconds, loss)


# ---- nanoGPT -------------------------------------------------------------------------------------


def prepare_nanogpt(checkout: Path, text: str) -> None:
    """The files that nanoGPT's data/shakespeare_char/prepare.py would write."""
    folder = checkout / "data" / "benchmark"
    folder.mkdir(parents=True, exist_ok=True)
    characters = sorted(set(text))
    stoi = {c: i for i, c in enumerate(characters)}
    ids = np.array([stoi[c] for c in text], np.uint16)
    n = len(ids) * 9 // 10
    ids[:n].tofile(folder / "train.bin")
    ids[n:].tofile(folder / "val.bin")
    meta = {"vocab_size": len(characters), "itos": dict(enumerate(characters)), "stoi": stoi}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))


def nanogpt(checkout: Path, block: int, batch: int, steps: int) -> Run:
    """nanoGPT's train.py, with the milliseconds of its own log."""
    out = tempfile.mkdtemp()
    command = f"""train.py config/train_shakespeare_char.py --device=cpu --compile=False
        --dataset=benchmark --out_dir={out} --eval_iters=20 --log_interval=1
        --block_size={block} --batch_size={batch} --n_layer=4 --n_head=4 --n_embd=128
        --max_iters={steps} --lr_decay_iters={steps} --dropout=0.0"""
    started = None
    times = []
    with subprocess.Popen(
        [sys.executable, "-u", *command.split()], cwd=checkout, stdout=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout:
            if started is None and line.startswith("step 0"):
                started = time.perf_counter()
            if found := re.match(r"iter \d+: .* time ([\d.]+)ms", line):
                times.append(float(found[1]))
    seconds = time.perf_counter() - started
    loss = nanogpt_loss(checkout, Path(out, "ckpt.pt"))
    return Run(statistics.median(times[len(times) // 5 :]), seconds, loss)


@torch.no_grad()
def nanogpt_loss(checkout: Path, path: Path) -> float:
    """Loss of a checkpoint over the whole validation part, in windows that do not overlap."""
    if not path.exists():  # a run of a few steps
        return math.nan
    sys.path.insert(0, str(checkout))
    import model as nano

    checkpoint = torch.load(path, weights_only=False)
    network = nano.GPT(nano.GPTConfig(**checkpoint["model_args"])).eval()
    network.load_state_dict(checkpoint["model"])
    ids = np.fromfile(checkout / "data" / "benchmark" / "val.bin", np.uint16).astype("i8")
    total = 0.0
    T = network.config.block_size
    for start in range(0, len(ids) - 1, T):
        window = torch.from_numpy(ids[start : start + T + 1])[None]
        _, loss = network(window[:, :-1], window[:, 1:])
        total += loss.item() * (window.shape[1] - 1)
    return total / (len(ids) - 1)


# ---- transformers --------------------------------------------------------------------------------


def transformers(corpus: Corpus, block: int, batch: int, steps: int) -> Run:
    """The loop that one writes with transformers and AdamW."""
    from transformers import GPT2Config, GPT2LMHeadModel

    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(vocab_size=len(corpus.tokenizer), n_positions=block, **SHAPE, **no_dropout)
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rng = np.random.default_rng(1)
    times = [time.perf_counter()]
    for _ in range(steps):
        starts = rng.integers(len(corpus.ids) - block, size=batch)
        windows = [corpus.ids[i : i + block] for i in starts]
        x = torch.from_numpy(np.stack(windows).astype("i8"))
        model(x, labels=x).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter())
    return Run(median_ms(times))


# ---- comparison ----------------------------------------------------------------------------------


def compare_speed(corpus: Corpus, args: argparse.Namespace, block: int, batch: int) -> dict:
    """Milliseconds a step of all programs, and their ratios to ours."""
    shape = (block, batch, args.steps)
    ms = {"Anexa": [], "transformers": []}
    if args.nanogpt:
        ms["nanoGPT"] = []
    for _ in range(args.rounds):
        ms["Anexa"].append(anexa(corpus, *shape, args.dtype).ms)
        if args.nanogpt:
            ms["nanoGPT"].append(nanogpt(args.nanogpt, *shape).ms)
        ms["transformers"].append(transformers(corpus, *shape).ms)
    print(f"\n{batch} x {block} characters a step, {args.rounds} rounds, medians")
    figures = {}
    for name, values in ms.items():
        median = statistics.median(values)
        ratio = statistics.median(np.divide(values, ms["Anexa"]).tolist())
        speed = block * batch / median * 1e3
        print(f"  {name:<13}{median:8.1f} ms {speed:9,.0f} char/s {ratio:6.2f} x")
        figures[f"{name} {batch}x{block}"] = {"ms": median, "ratio": ratio}
    return figures


def compare_time_to_loss(corpus: Corpus, args: argparse.Namespace) -> dict:
    """Seconds to the loss at which nanoGPT's own CPU command ends."""
    ours = anexa(corpus, 64, 12, args.our_steps, args.dtype)
    print(f"\nAnexa, {args.our_steps} steps of 12 x 64: {ours.loss:.4f} after {ours.seconds:.1f} s")
    figures = {"anexa": ours.seconds, "loss": ours.loss}
    if args.nanogpt:
        peer = nanogpt(args.nanogpt, 64, 12, 2_000)
        ratio = peer.seconds / ours.seconds
        print(f"nanoGPT, 2,000 steps: {peer.loss:.4f} after {peer.seconds:.1f} s, {ratio:.1f} x")
        figures |= {"nanogpt": peer.seconds, "nanogpt loss": peer.loss}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="TinyShakespeare")
    parser.add_argument("--nanogpt", type=Path, help="a checkout of karpathy/nanoGPT")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60, help="timed steps of a round")
    parser.add_argument("--our-steps", type=int, default=425, help="steps to the same loss")
    parser.add_argument("--dtype", default="auto", help="of Anexa: auto, float32 or bfloat16")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    corpus = anexagpt.load_corpus([str(args.text)])
    if args.nanogpt:
        prepare_nanogpt(args.nanogpt, args.text.read_text("utf-8"))
    figures = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    for block in (64, 256):
        figures |= compare_speed(corpus, args, block, batch=12)
    figures["to target"] = compare_time_to_loss(corpus, args)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
