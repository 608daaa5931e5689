"""Generation, Anexa against transformers' generate (with its cache) and nanoGPT's, with the same weights, in turn.

    python tests/benchmarks/generate.py --model model.safetensors --nanogpt ../nanoGPT

Characters a second for one text and for 64 at once, over a context that is filled from one character to its end: beyond
it only Anexa and nanoGPT go on. Each program samples at temperature 0.8 from all characters.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import statistics
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch

import anexagpt


def anexa(model, tokenizer):
    def run(batch: int, n: int) -> None:
        pieces = anexagpt.write(
            model, tokenizer, "", anexagpt.SampleConfig(max_new=n), anexagpt.random_source(1), batch
        )
        assert sum(len(piece) for row in pieces for piece in row) == batch * n

    return run


def transformers(model, tokenizer):
    import transformers

    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    config = model.config
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=config.vocab_size, n_positions=config.block_size, n_embd=config.n_embd, n_layer=config.n_layer,
            n_head=config.n_head, activation_function="gelu_new", bos_token_id=None, eos_token_id=None,
        )
    ).eval()  # fmt: skip
    weights = {f"transformer.{k}": w.t() if k[0] == "h" and w.dim() == 2 else w for k, w in model.state_dict().items()}
    theirs.load_state_dict(weights, strict=False)
    theirs.tie_weights()
    sampling = dict(do_sample=True, temperature=0.8, top_k=0, pad_token_id=0, eos_token_id=None)
    ids = tokenizer.encode("\n").long()[None]
    with torch.no_grad():
        assert torch.allclose(theirs(ids).logits, model(ids), atol=1e-4)

    def run(batch: int, n: int) -> None:
        prompt = ids.expand(batch, -1)
        made = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=n, **sampling)
        assert made.shape == (batch, n + 1)

    return run


def nanogpt(model, tokenizer, checkout: Path):
    sys.path.insert(0, str(checkout))
    import model as nano

    config = model.config
    shape = dict(block_size=config.block_size, n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd)
    theirs = nano.GPT(nano.GPTConfig(vocab_size=config.vocab_size, dropout=0.0, bias=True, **shape)).eval()
    renamed = {f"transformer.{k}": w for k, w in model.state_dict().items()}
    theirs.load_state_dict(renamed | {"lm_head.weight": model.wte.weight})
    for block in theirs.transformer.h:
        block.mlp.gelu = torch.nn.GELU(approximate="tanh")  # as GPT-2 has it; nanoGPT's own is the exact one
    ids = tokenizer.encode("\n").long()[None]
    with torch.no_grad():
        assert torch.allclose(theirs(ids)[0], model(ids), atol=1e-4)

    def run(batch: int, n: int) -> None:
        with torch.no_grad():
            assert theirs.generate(ids.expand(batch, -1), n, temperature=0.8).shape == (batch, n + 1)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=Path("model.safetensors"))
    parser.add_argument("--nanogpt", type=Path, help="checkout of karpathy/nanoGPT")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 64], help="texts at once")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    options = parser.parse_args()
    if os.environ.get("OMP_NUM_THREADS") != str(options.threads):  # which NumPy obeys only if it is set from the start
        os.environ["OMP_NUM_THREADS"] = str(options.threads)
        os.execv(sys.executable, [sys.executable, *sys.argv])
    model, tokenizer, _ = anexagpt.load_model(options.model, torch.device("cpu"))
    programs = {"Anexa": anexa(model, tokenizer), "transformers": transformers(model, tokenizer)}
    if options.nanogpt:
        programs["nanoGPT"] = nanogpt(model, tokenizer, options.nanogpt)
    n, figures = model.config.block_size - 1, []
    print(f"{n} characters a text, {options.threads} threads, {options.rounds} rounds; characters a second\n")
    print("| texts | program | median | Anexa / it: median (lowest to highest) |\n|---|---|---|---|")
    for batch in options.batch:
        speeds: dict[str, list[float]] = {name: [] for name in programs}
        for turn, name in itertools.product(range(options.rounds + 1), programs):
            if name == "nanoGPT" and batch > 1 and turn > 1:
                continue  # a minute a turn: once is enough
            start = time.perf_counter()
            programs[name](batch, n)
            if turn:  # the first is for warming up
                speeds[name].append(batch * n / (time.perf_counter() - start))
        for name, values in speeds.items():
            ratios = sorted(ours / its for ours, its in zip(speeds["Anexa"], values, strict=False))
            median, ratio = statistics.median(values), statistics.median(ratios)
            print(f"| {batch} | {name} | {median:,.0f} | {ratio:.1f} ({ratios[0]:.1f} to {ratios[-1]:.1f}) |")
            figures.append(dict(batch=batch, program=name, characters_per_second=median, ratio=ratio, all=values))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
