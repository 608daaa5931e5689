"""Solutions to the code exercises of reading.md. Each one trains a tiny network, prints what it
finds, and ends with an AssertionError if that is not what reading.md says.

    python docs/exercises.py             all of them, less than a minute
    python docs/exercises.py mask cache  some of them

The text is the language reference inside your Python: figures differ between its versions.
"""

from __future__ import annotations

import math
import random
import sys
import time
from collections import Counter
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
import torch

import anexagpt
from anexagpt import GPT, GPTConfig, Model, SampleConfig, Tokenizer, TrainConfig, Trainer

corpus = anexagpt.load_corpus(["python-docs"])
TEXT = corpus.tokenizer.decode(corpus.ids[:100_000])
TOKENIZER = Tokenizer(anexagpt.UNKNOWN + "".join(sorted(set(TEXT))))
V = len(TOKENIZER)
CONFIG = GPTConfig(vocab_size=V, block_size=32, n_layer=2, n_head=2, n_embd=32, dropout=0.0)


def train(text: str = TEXT, steps: int = 300) -> Trainer:
    """A trained network; `history` has rows [step, training loss, validation loss]."""
    settings = dict(batch_size=8, seed=1, eval_interval=steps // 10, checkpoint_interval=1e9)
    cfg = TrainConfig(max_steps=steps, **settings)
    data = corpus._replace(tokenizer=TOKENIZER, ids=TOKENIZER.encode(text))
    display = SimpleNamespace(update=lambda: None, evaluation=lambda: None)
    with patch.object(anexagpt, "validation_size", lambda *_: 4_000):
        trainer = Trainer(CONFIG, cfg, data, torch.device("cpu"), torch.float32)
    anexagpt.training_loop(trainer, display, None, lambda: False)
    return trainer


@lru_cache
def baseline() -> Trainer:
    """The network without any change."""
    return train()


def entropy(text: str) -> float:
    """Loss in nats per character of a model that knows the frequencies and nothing else."""
    return -sum(n / len(text) * math.log(n / len(text)) for n in Counter(text).values())


def heads() -> None:
    """The number of heads does not change the number of weights: heads share the channels."""
    counts = {}
    for H in (1, 2, 4, 8):
        network = GPT(GPTConfig(vocab_size=82, n_head=H))
        counts[H] = sum(p.numel() for p in network.parameters())
    print("  ".join(f"{H} heads: {count:,}" for H, count in counts.items()))
    assert len(set(counts.values())) == 1


def mask() -> None:
    """Without the causal mask the target is visible: a tiny loss, and a model that cannot write."""

    def without_mask(q, k, v):
        return torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1) @ v

    with patch.object(anexagpt, "attention", without_mask):
        leaky = train()
    (_, fair_loss, fair_val), (_, loss, val) = baseline().history[-1], leaky.history[-1]
    masked, _ = anexagpt.evaluate(leaky.ema, TOKENIZER.encode(TEXT[-4_000:]))
    print(f"with the mask:    training loss {fair_loss:.2f}, validation loss {fair_val:.2f}")
    print(f"without:          training loss {loss:.2f}, validation loss {val:.2f}")
    print(f"mask added later: validation loss {masked:.2f}; uniform guess {math.log(V):.2f}")
    assert loss < 0.5 * fair_loss and val < 0.5 * fair_val and masked > fair_val + 1


def temperature() -> None:
    """At temperature 0 the text repeats itself."""
    model = Model(baseline().ema, TOKENIZER, None)
    for value in (0.0, 1.0):
        text = model.generate("The ", temperature=value, max_new=600, seed=1)
        pieces = [text[i : i + 12] for i in range(300, len(text) - 12)]
        share = len(set(pieces)) / len(pieces)
        print(f"temperature {value}: {share:4.0%} of its 12-grams are new: {text[-50:]!r}")
        assert (share < 0.5) == (value == 0)


def shuffle() -> None:
    """In shuffled text only the frequencies can be learned: the loss ends at their entropy."""
    loss, limit = (
        train("".join(random.Random(1).sample(TEXT, len(TEXT)))).history[-1][2],
        entropy(TEXT),
    )
    ordered = baseline().history[-1][2]
    print(f"validation loss {ordered:.2f} in order, {loss:.2f} shuffled; entropy {limit:.2f}")
    assert abs(loss - limit) < 0.1


def residual() -> None:
    """Without the residual stream the zeros of c_proj stop activations and gradients alike."""

    def forward(self, x, cache):
        return self.mlp(self.ln_2(self.attn(self.ln_1(x), cache)))

    with patch.object(anexagpt.Block, "forward", forward):
        loss = train().history[-1][2]
    kept, limit = baseline().history[-1][2], entropy(TEXT)
    print(f"validation loss {kept:.2f} with it, {loss:.2f} without; entropy {limit:.2f}")
    assert loss > limit - 0.1


def overfit() -> None:
    """A short text is memorised: validation loss rises while training loss goes on falling."""
    history = train(TEXT[:2_000], 450).history
    for step, training, validation in history:
        print(f"step {step:3}: training loss {training:.2f}, validation loss {validation:.2f}")
    lowest = min(validation for _, _, validation in history)
    assert history[-1][1] < history[0][1] and history[-1][2] > lowest + 0.02


def cache() -> None:
    """The KV cache changes the time, not the text."""
    network, ids, T = baseline().ema, TOKENIZER.encode("The "), CONFIG.block_size
    started = time.perf_counter()
    tokens = anexagpt.generate_ids(network, ids, SampleConfig(temperature=0.0), [None])
    cached = [int(next(tokens)[0]) for _ in range(200)]
    middle, text = time.perf_counter(), list(ids)
    for _ in range(200):
        context = np.array(text[anexagpt.context_start(len(text), T) :], dtype="i8")
        with torch.no_grad():
            logits = network(torch.from_numpy(context[None]))[0, -1]  # (V,)
        text.append(1 + int(logits[1:].argmax()))
    rates = 200 / (middle - started), 200 / (time.perf_counter() - middle)
    print("{:,.0f} char/s with the cache, {:,.0f} without; ".format(*rates), end="")
    print("the same text" if cached == text[len(ids) :] else "ANOTHER text")
    assert cached == text[len(ids) :]


EXERCISES = {f.__name__: f for f in (heads, mask, temperature, shuffle, residual, overfit, cache)}


if __name__ == "__main__":
    if unknown := set(sys.argv[1:]) - set(EXERCISES):
        sys.exit(f"{unknown.pop()}: no such exercise; choose from {', '.join(EXERCISES)}")
    for name in sys.argv[1:] or EXERCISES:
        print(f"--- {name}: {EXERCISES[name].__doc__}")
        EXERCISES[name]()
