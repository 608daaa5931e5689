"""Solutions to the exercises of reading.md: each runs, prints what it finds, and stops with an error if it is not so.

    python docs/exercises.py             all of them, a minute or two
    python docs/exercises.py mask cache  some of them

The text is the language reference inside your Python, so figures differ a little from one version to the next.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections import Counter
from contextlib import contextmanager
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

import anexagpt as anexa

STEPS = 300
CORPUS = anexa.load_corpus("python-docs")
TEXT = CORPUS.tokenizer.decode(CORPUS.ids[:100_000])
TOKENIZER = anexa.Tokenizer.of(TEXT)
CONFIG = anexa.GPTConfig(vocab_size=len(TOKENIZER), block_size=32, n_layer=2, n_head=2, n_embd=32)


def train(model: anexa.GPT, text: str = TEXT, steps: int = STEPS) -> list[tuple[int, float, float]]:
    """The loop of new_architecture.md; step, training loss and validation loss, ten times on the way."""
    cfg = anexa.TrainConfig(max_steps=steps, batch_size=8, seed=1)
    ids, examined = anexa.split(TOKENIZER.encode(text))
    matrices = [p for p in model.h.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if not any(p is m for m in matrices) and p.requires_grad]
    muon = anexa.Muon(matrices, cfg.muon_learning_rate, cfg.weight_decay, torch.float32)
    adamw = torch.optim.AdamW(others, betas=(0.9, 0.99), weight_decay=0.0)
    starts = anexa.window_starts(0, steps, cfg.batch_size, len(ids), CONFIG.block_size, cfg.seed)
    window, losses, history = torch.arange(CONFIG.block_size + 1), [], []
    for step in range(steps):
        batch = ids[starts[step][:, None] + window].long()
        loss = anexa.loss_of(model(batch[:, :-1]), batch[:, 1:])
        loss.backward()
        rate = anexa.learning_rate(step, cfg)
        adamw.param_groups[0]["lr"] = cfg.learning_rate * rate
        adamw.step()
        muon.step(torch.tensor([rate]))
        model.zero_grad()
        losses.append(loss.item())
        if (step + 1) % (steps // 10) == 0:
            recent = losses[-(steps // 10) :]
            history.append((step + 1, sum(recent) / len(recent), anexa.evaluate(model, examined[:4_000])[0]))
    return history


def new(kind: type = anexa.GPT) -> anexa.GPT:
    torch.manual_seed(1)
    return kind(CONFIG)


@cache
def honest() -> tuple[anexa.GPT, float, float]:
    """The network as it is, after training, with both losses."""
    model = new()
    _, training, validation = train(model)[-1]
    return model.eval(), training, validation


@contextmanager
def replaced(owner, name: str, value):
    """owner.name is `value` for a while."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def alone(text: str) -> float:
    """Loss in nats per character of one who knows only how often each character occurs: its entropy."""
    counts = Counter(text)
    return -sum(n / len(text) * math.log(n / len(text)) for n in counts.values())


def heads() -> None:
    """The number of weights is the same with 1, 2, 4 or 8 heads: they share the channels."""
    counts = {H: sum(p.numel() for p in anexa.GPT(anexa.GPTConfig(82, n_head=H)).parameters()) for H in (1, 2, 4, 8)}
    print("  ".join(f"{H} heads: {count:,}" for H, count in counts.items()))
    assert len(set(counts.values())) == 1


def mask() -> None:
    """Without the mask the next character can be looked up: a tiny training loss, and a model that cannot write."""

    def sees_all(q, k, v):
        return torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1) @ v

    model, (_, fair, _) = new(), honest()
    with replaced(anexa, "attention", sees_all):
        _, cheating, examined = train(model)[-1]
    exposed = anexa.evaluate(model, anexa.split(TOKENIZER.encode(TEXT))[1][:4_000])[0]
    print(
        f"training loss {fair:.2f} with the mask, {cheating:.2f} without, and validation is fooled, too: {examined:.2f}"
    )
    print(f"the cheat, examined with the mask: {exposed:.2f}; knowing nothing: {math.log(len(TOKENIZER)):.2f}")
    assert cheating < 0.5 * fair and exposed > honest()[2] + 1


class Untied(anexa.GPT):
    """A GPT whose output layer is a table of its own."""

    def __init__(self, config: anexa.GPTConfig):
        super().__init__(config)
        self.head = torch.nn.Linear(config.n_embd, config.vocab_size, bias=False)
        torch.nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, ids, kept=None):
        x = self.wte(ids) + self.wpe.weight[: ids.shape[1]]
        for block in self.h:
            x = block(x, kept)
        return self.head(self.ln_f(x))


def untie() -> None:
    """V C more weights, and hardly another loss."""
    model = new(Untied)
    more = sum(p.numel() for p in model.parameters()) - CONFIG.n_parameters()
    _, _, loss = train(model)[-1]
    print(f"{more:,} more weights; validation loss {honest()[2]:.3f} tied, {loss:.3f} untied")
    assert more == CONFIG.vocab_size * CONFIG.n_embd and abs(loss - honest()[2]) < 0.3


def temperature() -> None:
    """At temperature 0 the text goes round in circles."""
    for value in (0.0, 1.0):
        cfg = anexa.SampleConfig(temperature=value, max_new=600)
        pieces = anexa.write(honest()[0], TOKENIZER, "The ", cfg, anexa.random_source(1))
        text = "".join(piece for (piece,) in pieces)
        parts = [text[i : i + 12] for i in range(300, len(text) - 12)]
        print(f"temperature {value}: {len(set(parts)) / len(parts):4.0%} of its pieces of 12 are new: {text[-60:]!r}")
        assert (len(set(parts)) / len(parts) < 0.5) == (value == 0)


def shuffle() -> None:
    """Of shuffled characters nothing can be learnt but how often each occurs: the loss stops at their entropy."""
    characters = list(TEXT)
    random.Random(1).shuffle(characters)
    _, _, loss = train(new(), "".join(characters))[-1]
    print(
        f"validation loss {honest()[2]:.2f} in order, {loss:.2f} shuffled; entropy of the characters {alone(TEXT):.2f}"
    )
    assert abs(loss - alone(TEXT)) < 0.1


def residual() -> None:
    """Without `x +` the zeros of c_proj let nothing through, forwards or backwards: only frequencies are learnt."""

    def forward(self, x, kept):
        return self.mlp(self.ln_2(self.attn(self.ln_1(x), kept)))

    with replaced(anexa.Block, "forward", forward):
        _, _, loss = train(new())[-1]
    print(f"validation loss {honest()[2]:.2f} with the residual stream, {loss:.2f} without; entropy {alone(TEXT):.2f}")
    assert loss > alone(TEXT) - 0.1


def overfit() -> None:
    """A short text is learnt by heart: the validation loss turns while the training loss goes on falling."""
    history = train(new(), TEXT[:2_000], 450)
    for step, training, validation in history:
        print(f"step {step:4}: training {training:.2f}, validation {validation:.2f}")
    assert history[-1][1] < history[0][1] and history[-1][2] > min(v for _, _, v in history) + 0.02


def cache_() -> None:
    """The cache changes the time, not the text."""
    model, ids = honest()[0], TOKENIZER.encode("The ").long()
    cfg = anexa.SampleConfig(temperature=0.0)
    start = time.perf_counter()
    characters = anexa.stream(model, ids, cfg, anexa.random_source(1))
    quick = [int(next(characters)) for _ in range(200)]
    middle = time.perf_counter()
    text, slow = ids.tolist(), []
    with torch.no_grad():
        for _ in range(200):
            context = text[anexa.window_start(len(text), CONFIG.block_size) :]
            logits = model(torch.tensor([context]))[0, -1]
            slow.append(int(logits[1:].argmax()) + 1)
            text.append(slow[-1])
    end = time.perf_counter()
    same = sum(a == b for a, b in zip(quick, slow, strict=True))
    print(f"{200 / (middle - start):,.0f} char/s with the cache, {200 / (end - middle):,.0f} without; alike: {same}")
    assert same == 200


EXERCISES = dict(
    heads=heads, mask=mask, untie=untie, temperature=temperature, shuffle=shuffle, residual=residual, overfit=overfit,
    cache=cache_,
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(EXERCISES))
    names = parser.parse_args().names
    if unknown := set(names) - set(EXERCISES):
        parser.error(f"{unknown.pop()}: no such exercise; choose from {', '.join(EXERCISES)}")
    for name in names or EXERCISES:
        print(f"--- {name}: {EXERCISES[name].__doc__}")
        EXERCISES[name]()


if __name__ == "__main__":
    main()
