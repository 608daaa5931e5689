"""Generation: Anexa against transformers, nanoGPT and llama.cpp, with the same weights, in turn.

    python tests/benchmarks/generate.py --model model.safetensors --nanogpt ../nanoGPT

Characters per second for one text and for 64 at once, over a context that is filled from one
character to its end: beyond it only Anexa and nanoGPT continue. Temperature 0.8. llama.cpp (by
xllamacpp, as a server of its own process; --llama) computes in float32, too, and writes one text.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import sys
import tempfile
import time
import urllib.request
import warnings
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch

import anexagpt

Program = Callable[[int, int], None]  # writes `batch` texts of n characters


def anexa(model: anexagpt.Model) -> Program:
    def run(batch: int, n: int) -> None:
        cfg = anexagpt.SampleConfig(temperature=0.8, max_new=n, seed=1)
        n_written = 0
        for pieces in model.stream_batch("", cfg, range(batch)):
            n_written += sum(map(len, pieces))
        assert n_written == batch * n

    return run


def shape(model: anexagpt.Model) -> dict:
    c = model.metadata.config
    return {
        "vocab_size": c.vocab_size,
        "n_layer": c.n_layer,
        "n_head": c.n_head,
        "n_embd": c.n_embd,
    }


def check_logits(theirs: torch.Tensor, model: anexagpt.Model, ids: torch.Tensor) -> None:
    with torch.no_grad():
        assert torch.allclose(theirs, model.network(ids), atol=1e-4)


def transformers(model: anexagpt.Model) -> Program:
    import transformers

    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    config = transformers.GPT2Config(
        n_positions=model.metadata.config.block_size,
        bos_token_id=None,
        eos_token_id=None,
        **shape(model),
    )
    theirs = transformers.GPT2LMHeadModel(config).eval()
    weights = {}
    for name, weight in model.network.state_dict().items():
        is_matrix = name.startswith("h.") and weight.dim() == 2
        weights[name] = weight.t() if is_matrix else weight  # theirs are (in, out)
    theirs.transformer.load_state_dict(weights)
    ids = torch.ones(1, 1, dtype=torch.long)
    check_logits(theirs(ids).logits, model, ids)

    def run(batch: int, n: int) -> None:
        prompt = ids.expand(batch, -1)
        out = theirs.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=n,
            do_sample=True,
            temperature=0.8,
            top_k=0,
            pad_token_id=0,
        )
        assert out.shape == (batch, n + 1)

    return run


def nanogpt(model: anexagpt.Model, checkout: Path) -> Program:
    sys.path.insert(0, str(checkout))
    import model as nano

    T = model.metadata.config.block_size
    config = nano.GPTConfig(block_size=T, dropout=0.0, bias=True, **shape(model))
    theirs = nano.GPT(config).eval()
    theirs.transformer.load_state_dict(model.network.state_dict())
    for block in theirs.transformer.h:
        block.mlp.gelu = torch.nn.GELU(approximate="tanh")  # as GPT-2; nanoGPT's is the exact one
    ids = torch.ones(1, 1, dtype=torch.long)
    logits, _ = theirs(ids)
    check_logits(logits, model, ids)

    @torch.no_grad()
    def run(batch: int, n: int) -> None:
        theirs.generate(ids.expand(batch, -1), n, temperature=0.8)

    return run


def llama(model: anexagpt.Model, threads: int) -> Program:
    """llama.cpp: float32 weights, keys and values; no other sampler than the temperature."""
    import xllamacpp

    path = Path(tempfile.mkdtemp()) / "model.gguf"
    model.save(path.with_name("model.safetensors"))
    anexagpt.main(
        [
            "export",
            str(path.parent / "hf"),
            str(path.with_name("model.safetensors")),
            "--gguf",
            str(path),
        ]
    )
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.verbosity = 0
    params.n_parallel = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)
    question = {
        "prompt": model.tokenizer.characters[1],
        "samplers": ["temperature"],
        "temperature": 0.8,
        "ignore_eos": True,
        "cache_prompt": False,
        "stream": False,
    }
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def run(batch: int, n: int) -> None:
        assert batch == 1
        data = json.dumps({**question, "n_predict": n}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{server.listening_address}/completion", data, headers)
        with opener.open(request) as answer:
            timings = json.load(answer)["timings"]
        assert timings["predicted_n"] == n

    return run


def measure(programs: dict[str, Program], batch: int, n: int, rounds: int, in_a_row: int) -> dict:
    """Characters per second of each program, a list over the rounds.

    A text takes a tenth of a second, so what the program before it left in the caches counts;
    several texts in a row count it less.
    """
    speeds = {name: [] for name in programs}
    for turn in range(rounds + 1):
        for name, run in programs.items():
            if name == "llama.cpp" and batch > 1:
                continue
            if name == "nanoGPT" and batch > 1 and turn > 1:
                continue  # a minute a turn: one is enough
            started = time.perf_counter()
            for _ in range(in_a_row):
                run(batch, n)
            seconds = time.perf_counter() - started
            if turn > 0:  # the first is a warm-up
                speeds[name].append(in_a_row * batch * n / seconds)
    return speeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("model.safetensors"))
    parser.add_argument("--nanogpt", type=Path, help="checkout of karpathy/nanoGPT")
    parser.add_argument("--llama", action="store_true", help="llama.cpp, too; needs xllamacpp")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 64], help="texts at once")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--in-a-row", type=int, default=1, help="texts that a program writes a turn"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if os.environ.get("OMP_NUM_THREADS") != str(args.threads):  # NumPy reads it when it starts
        os.environ["OMP_NUM_THREADS"] = str(args.threads)
        os.execv(sys.executable, [sys.executable, *sys.argv])
    model = anexagpt.load(args.model)
    programs = {"Anexa": anexa(model), "transformers": transformers(model)}
    if args.nanogpt:
        programs["nanoGPT"] = nanogpt(model, args.nanogpt)
    if args.llama:
        programs["llama.cpp"] = llama(model, args.threads)
    n = model.metadata.config.block_size - 1
    figures = []
    print(f"{n} characters a text, {args.threads} threads, {args.rounds} rounds\n")
    print("| texts | program | characters/s, median | Anexa / it |\n|---|---|---|---|")
    for batch in args.batch:
        speeds = measure(programs, batch, n, args.rounds, args.in_a_row)
        for name, values in speeds.items():
            if not values:
                continue
            median = statistics.median(values)
            pairs = zip(speeds["Anexa"], values, strict=False)
            ratio = statistics.median(ours / theirs for ours, theirs in pairs)
            print(f"| {batch} | {name} | {median:,.0f} | {ratio:.2f} |")
            figures.append(
                {"batch": batch, "program": name, "speed": median, "ratio": ratio, "all": values}
            )
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
