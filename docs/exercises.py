"""Solutions to the code exercises of reading.md. Each one except `heads` trains a tiny network,
prints what it finds, and fails with an AssertionError if that is not what reading.md says.

    python docs/exercises.py             all of them, less than a minute
    python docs/exercises.py mask cache  some of them

The text is the language reference that comes with your Python: figures differ between versions.
"""

from __future__ import annotations

import copy
import math
import random
import sys
import time
from collections import Counter
from dataclasses import replace
from functools import lru_cache
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
import torch
from torch import nn

import anexagpt
from anexagpt import GPT, Block, Corpus, GPTConfig, SampleConfig, TrainConfig, Trainer

reference = anexagpt.load_corpus(["python-docs"])
TEXT = reference.tokenizer.decode(reference.ids[:100_000])
CONFIG = GPTConfig(block_size=32, n_layer=1, n_head=2, n_embd=32)


def make_trainer(
    text: str = TEXT, steps: int = 300, config: GPTConfig = CONFIG, eval_interval: int = 150
) -> Trainer:
    cfg = TrainConfig(
        max_steps=steps, eval_interval=eval_interval, batch_size=8, dropout=0.0, seed=1
    )
    return Trainer(Corpus.from_text(text), config, cfg)


@lru_cache
def baseline() -> Trainer:
    """The trained network, without any change."""
    trainer = make_trainer()
    trainer.fit()
    return trainer


def entropy(text: str) -> float:
    """Loss in nats per character of a model that knows only the character frequencies."""
    total = 0.0
    for count in Counter(text).values():
        p = count / len(text)
        total -= p * math.log(p)
    return total


# ---- heads ---------------------------------------------------------------------------------------


def heads() -> None:
    """The number of heads does not change the number of weights: heads share the channels."""
    counts = {}
    for H in (1, 2, 4, 8):
        network = GPT(GPTConfig(vocab_size=82, n_head=H))
        counts[H] = sum(p.numel() for p in network.parameters())
        print(f"{H} heads: {counts[H]:,}")
    assert len(set(counts.values())) == 1


# ---- mask ----------------------------------------------------------------------------------------


def attention_without_mask(q, k, v):
    scores = q @ k.mT / math.sqrt(q.shape[-1])  # (B, H, T, S)
    return torch.softmax(scores, dim=-1) @ v  # (B, H, T, D)


def set_attention(network: GPT, attend) -> None:
    for block in network.h:
        block.attn.attend = attend


def mask() -> None:
    """Without the causal mask the target is visible: a tiny loss, and a model that cannot write."""
    leaky = make_trainer()
    set_attention(leaky.network, attention_without_mask)
    set_attention(leaky.ema, attention_without_mask)
    leaky.fit()
    set_attention(leaky.ema, anexagpt.attention)
    masked_loss, _ = anexagpt.evaluate(leaky.ema, leaky.val_ids)
    uniform = math.log(leaky.network.config.vocab_size)

    _, fair_training, fair_validation = baseline().history[-1]
    _, training, validation = leaky.history[-1]
    print(f"with the mask:    training {fair_training:.2f}, validation {fair_validation:.2f}")
    print(f"without:          training {training:.2f}, validation {validation:.2f}")
    print(f"mask added later: validation {masked_loss:.2f}; uniform guess {uniform:.2f}")
    assert training < 0.5 * fair_training
    assert validation < 0.5 * fair_validation
    assert masked_loss > uniform


# ---- temperature ---------------------------------------------------------------------------------


def distinct_share(text: str, n: int = 12) -> float:
    """Share of distinct n-grams among all n-grams of a text."""
    ngrams = [text[i : i + n] for i in range(len(text) - n + 1)]
    return len(set(ngrams)) / len(ngrams)


def temperature() -> None:
    """At temperature 0 the text repeats itself."""
    model = baseline().best_model()
    shares = {}
    for value in (0.0, 1.0):
        text = model.generate("The ", temperature=value, max_new=600, seed=1)
        share = shares[value] = distinct_share(text[300:])
        print(f"temperature {value}: {share:4.0%} of its 12-grams are distinct: {text[-50:]!r}")
    assert shares[0.0] < 0.5 < shares[1.0]


# ---- shuffle -------------------------------------------------------------------------------------


def shuffle() -> None:
    """In shuffled text only the frequencies can be learned: the loss ends at their entropy."""
    characters = list(TEXT)
    random.Random(1).shuffle(characters)
    shuffled = make_trainer("".join(characters))
    shuffled.fit()

    ordered_loss = baseline().history[-1].validation_loss
    loss = shuffled.history[-1].validation_loss
    limit = entropy(TEXT)
    print(f"validation loss {ordered_loss:.2f} in order, {loss:.2f} shuffled; entropy {limit:.2f}")
    assert abs(loss - limit) < 0.1


# ---- residual ------------------------------------------------------------------------------------


class BlockWithoutResidual(Block):
    def forward(self, x, cache=None):
        x = self.attn(self.ln_1(x), cache)  # (B, T, C)
        return self.mlp(self.ln_2(x))


def set_network(trainer: Trainer, network: GPT) -> None:
    """Make a Trainer that has not started yet train another network."""
    trainer.network = network
    trainer.ema = copy.deepcopy(network).requires_grad_(False).eval()
    trainer.init_optimizers()


def residual() -> None:
    """Without the residual stream the zeros of c_proj stop activations and gradients alike."""
    trainer = make_trainer()
    config = trainer.network.config
    network = GPT(config)
    network.h = nn.ModuleList(BlockWithoutResidual(config, i) for i in range(config.n_layer))
    network.init_weights()
    set_network(trainer, network)
    trainer.fit()

    usual_loss = baseline().history[-1].validation_loss
    loss = trainer.history[-1].validation_loss
    limit = entropy(TEXT)
    print(f"validation loss {usual_loss:.2f} with it, {loss:.2f} without; entropy {limit:.2f}")
    assert loss > limit - 0.1


# ---- overfit -------------------------------------------------------------------------------------


def overfit() -> None:
    """A short text is memorized: validation loss rises while training loss goes on falling."""
    trainer = make_trainer(TEXT[:2_000], steps=270, eval_interval=45)
    trainer.fit()
    for step, training, validation in trainer.history:
        print(f"step {step:3}: training loss {training:.2f}, validation loss {validation:.2f}")
    first = trainer.history[0]
    last = trainer.history[-1]
    assert last.training_loss < first.training_loss
    assert last.validation_loss > trainer.best_loss + 0.02


# ---- cache ---------------------------------------------------------------------------------------


def cache() -> None:
    """The KV cache changes the time, not the text."""
    n = 250
    trainer = make_trainer(steps=50, config=replace(CONFIG, block_size=256))
    for _ in range(10):  # enough for each block to add something
        trainer.step()
    network = trainer.ema
    tokenizer = trainer.corpus.tokenizer
    prompt = tokenizer.encode("The ")

    started = time.perf_counter()
    rng = np.random.default_rng(1)
    uncached = anexagpt.generate(network, prompt, n, SampleConfig(), rng)[len(prompt) :]  # (n,)
    uncached_rate = n / (time.perf_counter() - started)

    started = time.perf_counter()
    rng = np.random.default_rng(1)
    steps = anexagpt.generate_ids(network, prompt, SampleConfig(), [rng])
    cached = np.concatenate(list(islice(steps, n)))  # (n,)
    cached_rate = n / (time.perf_counter() - started)

    is_same = np.array_equal(cached, uncached)
    text = "the same text" if is_same else "ANOTHER text"
    print(f"{cached_rate:,.0f} char/s with the cache, {uncached_rate:,.0f} without; {text}")
    assert is_same


EXERCISES = {
    "heads": heads,
    "mask": mask,
    "temperature": temperature,
    "shuffle": shuffle,
    "residual": residual,
    "overfit": overfit,
    "cache": cache,
}


def main(names: list[str]) -> None:
    for name in names:
        if name not in EXERCISES:
            print(f"{name}: no such exercise; choose from {', '.join(EXERCISES)}", file=sys.stderr)
            sys.exit(2)
    torch.set_num_threads(1)  # in a network this small, threads would wait for each other
    for name in names or EXERCISES:
        exercise = EXERCISES[name]
        print(f"--- {name}: {exercise.__doc__}")
        exercise()


if __name__ == "__main__":
    main(sys.argv[1:])
