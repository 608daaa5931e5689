"""Training, Anexa against nanoGPT and a plain transformers loop: same shape, batch and text, in turn on this machine.

    python tests/benchmarks/train.py --text tinyshakespeare.txt --nanogpt ../nanoGPT

Two questions. How many characters a second, optimizer included, evaluation aside? How long from the first update to the
validation loss that nanoGPT's own CPU command ends with? nanoGPT runs its own train.py, unchanged, on its own files.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
import statistics
import subprocess
import sys
import tempfile
import time
from array import array
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch

import anexagpt

SHAPE = dict(n_layer=4, n_head=4, n_embd=128)


def prepare_nanogpt(checkout: Path, text: str, name: str) -> None:
    """The files that nanoGPT's data/shakespeare_char/prepare.py would write, from a text that is already here."""
    folder = checkout / "data" / name
    folder.mkdir(parents=True, exist_ok=True)
    characters = sorted(set(text))
    ids = {c: i for i, c in enumerate(characters)}
    n = int(len(text) * 0.9)
    for part, name in ((text[:n], "train.bin"), (text[n:], "val.bin")):
        (folder / name).write_bytes(array("H", [ids[c] for c in part]).tobytes())
    meta = dict(vocab_size=len(characters), itos=dict(enumerate(characters)), stoi=ids)
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))


def nanogpt(checkout: Path, block: int, batch: int, steps: int) -> tuple[float, float]:
    """Milliseconds per iteration (median, its own log) and seconds from the first iteration to the end."""
    command = [
        *(sys.executable, "-u", "train.py", "config/train_shakespeare_char.py", "--device=cpu", "--compile=False"),
        *("--dataset=benchmark", f"--out_dir={tempfile.mkdtemp()}", "--eval_iters=20", "--log_interval=1"),
        *(f"--block_size={block}", f"--batch_size={batch}", "--n_layer=4", "--n_head=4", "--n_embd=128"),
        *(f"--max_iters={steps}", f"--lr_decay_iters={steps}", "--dropout=0.0"),
    ]
    times, start = [], None
    with subprocess.Popen(command, cwd=checkout, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if start is None and line.startswith("step 0"):
                start = time.perf_counter()
            if found := re.match(r"iter (\d+): .* time ([\d.]+)ms", line):
                times.append(float(found[2]))
    return statistics.median(times[10:]), time.perf_counter() - start


def trainer(text: str, block: int, batch: int, steps: int, **rates) -> anexagpt.Trainer:
    tokenizer = anexagpt.Tokenizer.of(text)
    device, dtype = anexagpt.choose_device(anexagpt.DeviceConfig(device="cpu"))
    config = anexagpt.GPTConfig(vocab_size=len(tokenizer), block_size=block, dropout=0.0, **SHAPE)
    cfg = anexagpt.TrainConfig(batch_size=batch, max_steps=steps, **rates)
    return anexagpt.Trainer(config, cfg, tokenizer.encode(text), device, dtype)


def median_ms(step, n: int) -> float:
    """Median time of a step, after ten that do not count."""
    times = []
    for _ in range(n + 10):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return statistics.median(times[10:]) * 1e3


def plain_transformers(text: str, block: int, batch: int):
    """A step of the loop that one writes with transformers and AdamW."""
    from transformers import GPT2Config, GPT2LMHeadModel

    ids = anexagpt.Tokenizer.of(text).encode(text).long()
    config = GPT2Config(
        vocab_size=int(ids.max()) + 1, n_positions=block, **SHAPE, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step():
        starts = torch.randint(len(ids) - block, (batch,))
        x = torch.stack([ids[i : i + block] for i in starts])
        model(x, labels=x).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds_to(text: str, target: float, steps: int) -> tuple[float, float]:
    """Seconds that a training of `steps` updates takes, its evaluation included, and the loss it ends with."""
    # A short training bears higher rates and less momentum than the 5,000 steps that the defaults are for.
    ours = trainer(text, 64, 12, steps, muon_learning_rate=0.06, learning_rate=0.06, warmup_steps=60)
    ours.muon.momentum = 0.75
    start = time.perf_counter()
    with anexagpt.kept_memory():
        for _ in range(steps):
            ours.update()
        ours.evaluate()
    return time.perf_counter() - start, ours.best_loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="TinyShakespeare")
    parser.add_argument("--nanogpt", type=Path, required=True, help="a checkout of karpathy/nanoGPT")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60, help="steps that are timed in each round")
    parser.add_argument("--target", type=float, default=1.874, help="validation loss to reach")
    parser.add_argument("--our-steps", type=int, default=425, help="steps that we need for it")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    options = parser.parse_args()
    text = "".join(anexagpt.read_text(options.text))
    prepare_nanogpt(options.nanogpt, text, "benchmark")
    figures: dict = dict(torch=torch.__version__, threads=torch.get_num_threads())
    for block, batch in ((64, 12), (256, 12)):
        rounds = []
        for _ in range(options.rounds):
            ours, theirs = trainer(text, block, batch, 10_000), plain_transformers(text, block, batch)
            peer, _ = nanogpt(options.nanogpt, block, batch, options.steps + 10)
            with anexagpt.kept_memory():
                own = median_ms(ours.update, options.steps)
            rounds.append((own, peer, median_ms(theirs, options.steps)))
        print(f"\n{batch} x {block} characters a step, {options.rounds} rounds: median ms, characters/s, times our ms")
        for i, name in enumerate(("Anexa", "nanoGPT", "transformers")):
            ms = statistics.median(r[i] for r in rounds)
            ratio = statistics.median(r[i] / r[0] for r in rounds)
            print(f"  {name:<14}{ms:8.1f} ms {block * batch / ms * 1e3:10,.0f} char/s {ratio:6.2f} x")
            figures[f"{name} {batch}x{block}"] = dict(ms=ms, ratio=ratio)
    ours, loss = seconds_to(text, options.target, options.our_steps)
    _, peer = nanogpt(options.nanogpt, 64, 12, 2000)
    print(f"\nto a loss of {options.target}: Anexa {ours:.1f} s ({loss:.4f} in {options.our_steps} steps),", end=" ")
    print(f"nanoGPT's command {peer:.1f} s: {peer / ours:.1f} x")
    figures["to target"] = dict(anexa=ours, loss=loss, nanogpt=peer)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
