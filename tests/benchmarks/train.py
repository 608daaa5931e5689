"""Training: Anexa against nanoGPT and a plain transformers loop: same shape, batch and text.

    python tests/benchmarks/train.py --text tinyshakespeare.txt --nanogpt ../nanoGPT

Two questions. How many characters per second, optimizer included, evaluation aside? How long from
the first step to the validation loss that nanoGPT's own CPU command ends with? nanoGPT runs its own
train.py, unchanged. Without --nanogpt only the others run.
"""

import argparse
import json
import pickle
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import numpy as np
import torch

import anexagpt

SHAPE = dict(n_layer=4, n_head=4, n_embd=128)


def prepare_nanogpt(checkout: Path, text: str) -> None:
    """The files that nanoGPT's data/shakespeare_char/prepare.py would write."""
    folder, characters = checkout / "data" / "benchmark", sorted(set(text))
    folder.mkdir(parents=True, exist_ok=True)
    ids = np.array([characters.index(c) for c in text], np.uint16)
    ids[: len(ids) * 9 // 10].tofile(folder / "train.bin")
    ids[len(ids) * 9 // 10 :].tofile(folder / "val.bin")
    stoi = {c: i for i, c in enumerate(characters)}
    meta = dict(vocab_size=len(characters), itos=dict(enumerate(characters)), stoi=stoi)
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))


def nanogpt(checkout: Path, block: int, batch: int, steps: int) -> tuple[float, float]:
    """Median milliseconds per step, by its own log, and seconds from the first step to the end."""
    command = f"""train.py config/train_shakespeare_char.py --device=cpu --compile=False
        --dataset=benchmark --out_dir={tempfile.mkdtemp()} --eval_iters=20 --log_interval=1
        --block_size={block} --batch_size={batch} --n_layer=4 --n_head=4 --n_embd=128
        --max_iters={steps} --lr_decay_iters={steps} --dropout=0.0"""
    command, times, start = [sys.executable, "-u", *command.split()], [], 0.0
    with subprocess.Popen(command, cwd=checkout, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            start = start or (time.perf_counter() if line.startswith("step 0") else 0.0)
            if found := re.match(r"iter \d+: .* time ([\d.]+)ms", line):
                times.append(float(found[1]))
    return statistics.median(times[len(times) // 5 :]), time.perf_counter() - start


class Clock(list):
    """A progress display that notes the time of each step."""

    def update(self) -> None:
        self.append(time.perf_counter())

    def evaluation(self) -> None:
        pass


def anexa(corpus, block: int, batch: int, steps: int, **settings):
    """Median milliseconds per step without evaluation, seconds with it, best validation loss."""
    bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    config = anexagpt.GPTConfig(block_size=block, dropout=0.0, **SHAPE)
    cfg = anexagpt.TrainConfig(batch_size=batch, max_steps=steps, eval_interval=steps, **settings)
    dtype = torch.bfloat16 if bf16 else torch.float32
    trainer = anexagpt.Trainer(config, cfg, corpus, torch.device("cpu"), dtype)
    clock = Clock([time.perf_counter()])
    anexagpt.training_loop(trainer, clock, lambda stop: None, lambda: False)
    seconds = time.perf_counter() - clock[0]
    return 1e3 * statistics.median(np.diff(clock)[steps // 5 :]), seconds, trainer.best_loss


def transformers(corpus, block: int, batch: int, steps: int) -> float:
    """Median milliseconds per step of the loop that one writes with transformers and AdamW."""
    from transformers import GPT2Config, GPT2LMHeadModel

    rates = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    ids, n = corpus.ids, len(corpus.tokenizer)
    config = GPT2Config(vocab_size=n, n_positions=block, **SHAPE, **rates)
    model, times = GPT2LMHeadModel(config), [time.perf_counter()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        starts = np.random.randint(len(ids) - block, size=batch)
        x = torch.from_numpy(np.stack([ids[i : i + block] for i in starts]).astype("i8"))
        model(x, labels=x).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter())
    return 1e3 * statistics.median(np.diff(times)[steps // 5 :])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="TinyShakespeare")
    parser.add_argument("--nanogpt", type=Path, help="a checkout of karpathy/nanoGPT")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60, help="timed steps of a round")
    parser.add_argument("--our-steps", type=int, default=425, help="steps to the same loss")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    corpus = anexagpt.load_corpus([str(args.text)])
    figures: dict = dict(torch=torch.__version__, threads=torch.get_num_threads())
    if args.nanogpt:
        prepare_nanogpt(args.nanogpt, args.text.read_text("utf-8"))
    for block, batch in ((64, 12), (256, 12)):
        shape, rounds = (block, batch, args.steps), []
        for _ in range(args.rounds):
            peer = nanogpt(args.nanogpt, *shape)[0] if args.nanogpt else float("nan")
            rounds.append((anexa(corpus, *shape)[0], peer, transformers(corpus, *shape)))
        print(f"\n{batch} x {block} characters a step, {args.rounds} rounds, medians")
        for i, name in enumerate(("Anexa", "nanoGPT", "transformers")):
            ms = statistics.median(row[i] for row in rounds)
            ratio = statistics.median(row[i] / row[0] for row in rounds)
            print(
                f"  {name:<13}{ms:8.1f} ms {block * batch / ms * 1e3:9,.0f} char/s {ratio:6.2f} x"
            )
            figures[f"{name} {batch}x{block}"] = dict(ms=ms, ratio=ratio)
    # A short run bears higher rates than the 5,000 steps that the defaults are for.
    rates = dict(muon_learning_rate=0.06, learning_rate=0.06, warmup_steps=60)
    _, seconds, loss = anexa(corpus, 64, 12, args.our_steps, **rates)
    print(f"\n{args.our_steps} steps of 12 x 64: loss {loss:.4f} after {seconds:.1f} s")
    figures["to target"] = dict(anexa=seconds, loss=loss)
    if args.nanogpt:
        figures["to target"]["nanogpt"] = peer = nanogpt(args.nanogpt, 64, 12, 2_000)[1]
        print(f"nanoGPT's own 2,000 steps, to 1.874: {peer:.1f} s, {peer / seconds:.1f} times")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
