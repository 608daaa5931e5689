#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch==2.13.0", "safetensors==0.8.0", "packaging==26.3", "requests==2.34.2", "rich==15.0.0",
#     "filelock==4.2.11", "numpy==2.2.6; python_version < '3.11'",
#     "numpy==2.4.6; python_version >= '3.11'", "prompt_toolkit==3.0.53",
# ]
# ///
"""Anexa: a small GPT that you train in minutes, own, and talk to in your terminal.

usage: python anexagpt.py [COMMAND] [OPTIONS]

commands:
  run        train unless there is a finished model, then open the prompt (the default)
  train      train a model and save it
  chat       open the prompt with a saved model
  generate   continue one prompt; stdout gets the text and nothing else
  explain    show how the model reads a text: ids, next characters, surprise, attention
  eval       compute the loss of a model on a text
  info       show what a model file contains
  export     write the model for Hugging Face transformers or llama.cpp
  push       upload the model to the Hugging Face Hub

examples:
  python anexagpt.py                               train on Sherlock Holmes, then chat
  python anexagpt.py train --data shakespeare --out bard.safetensors
  python anexagpt.py train your.txt --init bard.safetensors --out me.safetensors
  python anexagpt.py generate "It was a" -n 300 > story.txt
  python anexagpt.py export bard.safetensors hf-bard --gguf bard.gguf

Ctrl-C stops a run and saves it; the same command resumes it.
'python anexagpt.py COMMAND --help' lists the options of a command.

The file reads from top to bottom: a complete GPT first; below the divider it is connected to files,
texts, other processes, the terminal and other programs.

Shapes: B batch, T time (characters in a window), C channels (n_embd), H heads, D = C / H channels
of a head, S positions that a query attends to, V vocab_size, L layers (n_layer).
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 10):  # noqa: UP036
    sys.exit("anexagpt.py: this is Python {}.{}; 3.10 is needed".format(*sys.version_info))

import argparse
import builtins
import copy
import ctypes
import glob
import hashlib
import importlib
import io
import json
import math
import os
import re
import secrets
import shutil
import signal
import tempfile
import time
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

if __name__ == "__main__":  # before PyTorch, whose import takes a second
    if sys.argv[1:2] in (["-h"], ["--help"]):
        with suppress(OSError):  # nobody reads it
            os.write(1, __doc__.partition("\nThe file reads")[0].encode() + b"\n")
        sys.exit()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # Ctrl-C during the imports
    # OpenMP's threads spin while they wait; a short time only, or a busy machine trains 3x slower.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    os.environ.setdefault("KMP_BLOCKTIME", "1")  # the same, in ms, for Intel's and LLVM's OpenMP

try:
    import filelock
    import numpy as np
    import prompt_toolkit
    import requests
    import rich.progress
    import safetensors.torch
    import torch
    from packaging.version import Version
    from prompt_toolkit import completion, history
    from prompt_toolkit.filters import Condition
    from rich.cells import cell_len, set_cell_size
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text
    from safetensors import SafetensorError
    from torch import Tensor, nn
    from torch import distributed as dist
    from torch.nn import functional as F

    if Version(torch.__version__) < Version("2.9"):
        raise ImportError(f"PyTorch {torch.__version__}, but 2.9 or later is needed")
except ImportError as error:
    if __name__ != "__main__":
        raise
    sys.exit(f"anexagpt.py: {error}; install with: pip install -r requirements.txt")

__version__ = "1.0.0"


# ---- config --------------------------------------------------------------------------------------
# A setting is one line: type, default, help, limits. Options, checks and model file read that line.


class UserError(Exception):
    """An error that the user can fix: the message gives the value, the rule and what to do."""


def require(condition, message: str) -> None:
    """raises: UserError with `message` unless `condition` is true"""
    if not condition:
        raise UserError(message)


def option(default, help, low=None, high=None):
    """Dataclass field that is also a command-line option, if it has a help text."""
    return field(default=default, metadata=dict(help=help, low=low, high=high))


def field_types(setting) -> list[type]:
    """Types that a field allows: [int, NoneType] for `int | None`."""
    return [getattr(builtins, name) or type(None) for name in setting.type.split(" | ")]


class Config:
    """Base of the config dataclasses: checks values, whether they come from options or a file."""

    def __post_init__(self):
        for setting in fields(self):
            value, rule, types = getattr(self, setting.name), setting.metadata, field_types(setting)
            is_valid = type(value) in types or (type(value) is int and float in types)
            kind = {int: "a whole number", float: "a number"}.get(types[0], types[0].__name__)
            if rule["low"] is not None:
                kind += f" from {rule['low']:,} to {rule['high']:,}"
                is_valid = is_valid and (value is None or rule["low"] <= value <= rule["high"])
            require(is_valid, f"--{setting.name.replace('_', '-')} {value!r}: must be {kind}")

    @classmethod
    def pick(cls, settings: dict) -> Config:
        """Config of those `settings` that are fields of it; the others have their defaults."""
        known = {f.name: settings[f.name] for f in fields(cls) if f.name in settings}
        return cls(**{n: tuple(v) if isinstance(v, list) else v for n, v in known.items()})


@dataclass(frozen=True)
class GPTConfig(Config):
    """Shape of the network; part of every model file."""

    vocab_size: int = option(2, None, 2, 65_536)  # not an option: the text decides
    block_size: int = option(256, "context length in characters (T)", 2, 4_096)
    n_layer: int = option(4, "transformer blocks (L)", 1, 128)
    n_head: int = option(4, "attention heads per block (H)", 1, 1_000)
    n_embd: int = option(128, "channels, a multiple of --n-head (C)", 1, 65_536)
    dropout: float | None = option(None, "dropout rate (default: by number of epochs)", 0.0, 0.9)

    def __post_init__(self):
        super().__post_init__()
        if self.n_embd % self.n_head:
            fix = f"the next is {math.ceil(self.n_embd / self.n_head) * self.n_head:,}"
            raise UserError(f"--n-embd {self.n_embd}: must be a multiple of --n-head; {fix}")

    def n_parameters(self) -> int:
        """Number of weights: two embeddings, 12 C^2 + 13 C per block, and the last LayerNorm."""
        C = self.n_embd
        return (self.vocab_size + self.block_size + 2) * C + self.n_layer * (12 * C * C + 13 * C)

    def __str__(self) -> str:
        n = self.n_parameters()
        return f"{n / 1e6:,.1f} M parameters" if n >= 100_000 else f"{n:,} parameters"


# ---- tokenizer -----------------------------------------------------------------------------------
# One token is one character; its id is its rank among the sorted characters of the text.

UNKNOWN = "\ufffd"  # id 0: any character that the vocabulary lacks; never sampled
EQUIVALENTS = str.maketrans("‘’‚“”„–—―−", "'''\"\"\"----")


def build_vocab(characters: Iterable[str]) -> str:
    """The characters of a vocabulary in the order of their ids."""
    return UNKNOWN + "".join(sorted({*characters} - {UNKNOWN}))


def code_points(text: str) -> np.ndarray:
    """Unicode code points of `text` (N,)."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<i4")


class Tokenizer:
    """Characters to ids and back: `characters[i]` has id i, `characters[0]` is U+FFFD."""

    def __init__(self, characters: str):
        self.characters, n = characters, len(characters)
        self.table = np.zeros(0x110000, np.uint8 if n <= 256 else np.uint16)  # code point -> id
        self.table[code_points(characters)] = np.arange(n)

    def __len__(self) -> int:
        return len(self.characters)

    def encode(self, text: str) -> np.ndarray:
        """Ids (N,), uint8 or uint16; 0 for unknown characters."""
        return self.table.take(code_points(text))

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.characters[i] for i in ids)

    def normalize_prompt(self, prompt: str) -> tuple[str, str]:
        """`prompt` in characters of the vocabulary, and a notice of what changed ("" if nothing).

        An unknown character is mapped to a straight quote, a dash, its form without accent or in
        the other case; else it is dropped.
        """
        known, mapped = set(self.characters[1:]), {}
        prompt = prompt.replace("\r\n", "\n").replace("\r", "\n")
        for c in dict.fromkeys(c for c in prompt if c not in known):
            decomposed = unicodedata.normalize("NFKD", c)
            base = "".join(p for p in decomposed if not unicodedata.combining(p))
            candidates = c.translate(EQUIVALENTS), base, c.swapcase(), base.swapcase()
            mapped[c] = next((x for x in candidates if x and known.issuperset(x)), "")
        changes = [f"read {c} as {x}" if x else f"dropped {c}" for c, x in mapped.items()]
        more = f" and {len(changes) - 10:,} more" if len(changes) > 10 else ""
        return "".join(mapped.get(c, c) for c in prompt), ", ".join(changes[:10]) + more


# ---- model ---------------------------------------------------------------------------------------
# GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners").


class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.n_head, self.layer = config.n_head, layer
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, cache: KVCache | None) -> Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)  # (B, T, 3, H, D)
        qkv = qkv.permute(2, 0, 3, 1, 4)  # (3, B, H, T, D)
        q, k, v = qkv.unbind()
        if cache:
            k, v = cache.update(self.layer, qkv[1:])  # (B, H, S, D)
        y = attention(q, k, v)  # (B, H, T, D)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal scaled dot-product attention of q (B, H, T, D) to k and v (B, H, S, D): (B, H, T, D).

    The T queries are the last of S positions: query t attends to keys 0 to S - T + t.
    source: Vaswani et al. 2017, "Attention Is All You Need", equation 1
    """
    (B, H, T, D), S = q.shape, k.shape[2]
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and S <= 512:  # twice as fast
        q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)  # (B * H, T or S, D)
        mask = q.new_full((T, S), -torch.inf).triu_(1 + S - T)
        scores = torch.baddbmm(mask, q, k.mT, alpha=D**-0.5)  # (B * H, T, S)
        return (torch.softmax(scores, dim=-1) @ v).view(B, H, T, D)
    mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T) if 1 < T < S else None
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=T == S)


class KVCache:
    """Keys and values of every layer for the cached positions: (L, 2, B, H, block_size, D)."""

    def __init__(self, model: GPT, batch_size: int):
        c = model.config
        shape = c.n_layer, 2, batch_size, c.n_head, c.block_size, c.n_embd // c.n_head
        self.kv, self.length = model.wte.weight.new_zeros(shape), 0

    def update(self, layer: int, kv: Tensor) -> Tensor:
        """Append kv (2, B, H, T, D) to `layer`; returns all of it so far (2, B, H, S, D)."""
        end = self.length + kv.shape[3]
        self.kv[layer, :, :, :, self.length : end] = kv
        return self.kv[layer, :, :, :, :end]


class MLP(nn.Module):
    """Position-wise feed-forward network."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        # GPT-2 has the tanh approximation of GELU (Hendrycks and Gimpel 2016, section 2). In
        # training on a CPU exact GELU takes half the time; it differs by at most 0.0005.
        approximate = "none" if self.training and x.device.type == "cpu" else "tanh"
        return self.c_proj(F.gelu(self.c_fc(x), approximate=approximate))


class Block(nn.Module):
    """Pre-LayerNorm transformer block: attention and MLP, each added to the residual stream."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(config.n_embd), CausalSelfAttention(config, layer)
        self.ln_2, self.mlp = nn.LayerNorm(config.n_embd), MLP(config)
        self.drop = nn.Dropout(config.dropout or 0.0)

    def forward(self, x: Tensor, cache: KVCache | None) -> Tensor:
        x = x + self.drop(self.attn(self.ln_1(x), cache))
        return x + self.drop(self.mlp(self.ln_2(x)))


class GPT(nn.Module):
    """GPT-2 with GPT-2's parameter names; wte is tied to the output head."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout or 0.0)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        wide = (2 * config.n_embd) ** -0.5  # GPT-2 has 0.02; a step of Muon is larger than AdamW's
        std = dict(wte=0.02, wpe=0.02, c_attn=wide, c_fc=wide, c_proj=0.0)  # blocks begin as x -> x
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=std[name.split(".")[-2]])
            elif name.endswith("bias"):
                nn.init.zeros_(weight)

    def forward(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """Logits (B, T, V) of what follows each of `ids` (B, T), which follow the `cache`."""
        start = cache.length if cache else 0
        end = start + ids.shape[1]
        if end > self.config.block_size:
            raise IndexError(f"{end} positions exceed block_size {self.config.block_size}")
        x = self.drop(self.wte(ids) + self.wpe.weight[start:end])  # (B, T, C)
        for block in self.h:
            x = block(x, cache)
        if cache:
            cache.length = end
        return F.linear(self.ln_f(x), self.wte.weight)  # (B, T, V)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of -log p(target) in nats over `targets` (B, T); the unknown character does not count."""
    logits = logits.flatten(0, 1).float()  # (B * T, V)
    return F.cross_entropy(logits, targets.flatten(), ignore_index=0, reduction="sum")


# ---- optimizer -----------------------------------------------------------------------------------
# Matrices of the blocks: Muon. Embeddings, LayerNorms and biases: AdamW.


@dataclass(frozen=True)
class TrainConfig(Config):
    """How a model is trained; part of every model file."""

    max_steps: int = option(5_000, "optimizer steps", 1, 100_000_000)
    batch_size: int | None = option(None, "windows per step (default: CPU 6, GPU 16)", 1, 100_000)
    grad_accum: int = option(1, "micro-batches per step: less memory, same result", 1, 100_000)
    muon_learning_rate: float = option(0.02, "peak rate of Muon: matrices of the blocks", 0.0, 10.0)
    learning_rate: float = option(6e-3, "peak rate of AdamW: all other weights", 0.0, 10.0)
    weight_decay: float = option(0.1, "of Muon's matrices, as a multiple of their rate", 0.0, 10.0)
    warmup_steps: int = option(50, "linear warm-up, at most a tenth of the run", 0, 100_000_000)
    eval_interval: int = option(250, "steps between evaluations", 1, 100_000_000)
    checkpoint_interval: float = option(60.0, "seconds between checkpoints, or more", 0.0, 1e9)
    seed: int = option(1337, "of first weights, data order and dropout", 0, 2**63 - 1)
    init: str | None = option(None, "model file with the first weights, to train on from")


def lr_scale(step: int, cfg: TrainConfig) -> float:
    """Multiplier of the peak learning rates at `step`: linear warm-up, then decay to a fifth.

    Most schedules decay to zero; here the moving average (ema_weight) replaces the last part.
    """
    warmup = min(cfg.warmup_steps, cfg.max_steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return 0.2 + 0.8 * ((cfg.max_steps - step) / (cfg.max_steps - warmup)) ** 1.5


def ema_weight(step: int) -> float:
    """1 - decay of the moving average (EMA) of the weights after `step` steps.

    The average, over about the last eighth of the run so far, is what is evaluated and saved: the
    weights of a single step memorise and fluctuate more.
    source: power function EMA, to first order, of Karras et al. 2024, "Analyzing and Improving the
    Training Dynamics of Diffusion Models", section 3.1
    """
    return min(1.0, 8 / step)


def newton_schulz(X: Tensor) -> Tensor:
    """Approximately U V' for each X = U S V' of a stack (N, rows, columns): singular values near 1.

    source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"
    """
    a, b, c = 3.4445, -4.7750, 2.0315  # the slope at zero is as large as convergence allows
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):  # X <- a X + b (X X') X + c (X X')^2 X
        A = X @ X.mT  # (N, rows, rows)
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X


class Muon:
    """Momentum, orthogonalised by Newton-Schulz (Jordan et al. 2024), for matrices.

    The gradient of a weight matrix is dominated by a few directions, whose singular values exceed
    the others by orders of magnitude: an update in proportion hardly learns the rare directions.
    Muon sets all singular values to 1, so that every direction advances at the same rate.

    Matrices of one shape form one stack. Those with more rows than columns are taken as groups of
    columns / 2 rows: half of the arithmetic, and a slightly lower loss.
    """

    def __init__(self, weights: list[Tensor], cfg: TrainConfig, dtype: torch.dtype, momentum=0.9):
        self.cfg, self.dtype, self.momentum = cfg, dtype, momentum
        self.stacks: dict[tuple[int, int], list[Tensor]] = {}
        for weight in weights:
            rows, columns = weight.shape
            if rows > columns:
                rows = columns // 2 if columns % 2 == 0 else columns
            self.stacks.setdefault((rows, columns), []).append(weight)
        self.buffers = [  # momentum of each stack: (N, rows, columns)
            torch.cat([torch.zeros_like(w).view(-1, *shape) for w in stack])
            for shape, stack in self.stacks.items()
        ]

    @torch.no_grad()
    def step(self, scale: Tensor) -> None:
        """One update at `scale`, a scalar on the device, times the peak rate."""
        minus_lr = -self.cfg.muon_learning_rate * scale
        decay = 1 + minus_lr * self.cfg.weight_decay
        for weights, buffer in zip(self.stacks.values(), self.buffers, strict=True):
            grad = torch.cat([w.grad.reshape(-1, *buffer.shape[1:]) for w in weights])
            buffer.lerp_(grad, 1 - self.momentum)
            nesterov_grad = grad.lerp_(buffer, self.momentum)  # (N, rows, columns)
            update = newton_schulz(nesterov_grad.to(self.dtype)).float().flatten(0, 1)
            rows = [len(weight) for weight in weights]
            for weight, part in zip(weights, update.split(rows), strict=True):
                weight.mul_(decay).addcmul_(part, minus_lr)


# ---- training ------------------------------------------------------------------------------------


def split_ids(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Training part, the first 90%, and validation part, at most a million characters."""
    n = max(len(ids) * 9 // 10, len(ids) - 1_000_000)
    return ids[:n], ids[n:]


@lru_cache(maxsize=2)
def epoch_offsets(epoch: int, n_ids: int, block_size: int, seed: int) -> np.ndarray:
    """Where the windows of an epoch begin: non-overlapping, with a random phase, permuted."""
    n_windows = (n_ids - block_size - 1) // block_size
    rng = np.random.default_rng((seed, epoch))
    phase = rng.integers(n_ids - block_size * n_windows)  # leaves room for the last target
    return phase + block_size * rng.permutation(n_windows)


def get_batch(ids: np.ndarray, step: int, cfg: TrainConfig, block_size: int) -> Tensor:
    """Windows (B, T + 1) of `step`: a function of seed and step, so resuming needs no state."""
    offsets = lambda epoch: epoch_offsets(epoch, len(ids), block_size, cfg.seed)
    first, n = step * cfg.batch_size, len(offsets(0))  # windows so far, and in an epoch
    starts = [offsets(i // n)[i % n] for i in range(first, first + cfg.batch_size)]
    windows = np.stack([ids[start : start + block_size + 1] for start in starts])  # (B, T + 1)
    return torch.from_numpy(windows.astype("i8"))


def logit_scale(epochs: float) -> float:
    """Multiplier of the logits in training only, against overconfidence on a repeated text.

    Without it validation loss would be lowest at a temperature of 1.15.
    """
    return 1.0 if epochs < 4 else 1.15


def validation_size(cfg: TrainConfig, block_size: int) -> int:
    """Characters of an evaluation during training, so that it takes below 10% of the time.

    A character takes a third of the time that it takes in training (measured on a CPU).
    """
    return max(20_000, cfg.eval_interval * cfg.batch_size * block_size // 3)


@torch.no_grad()
def evaluate(model: GPT, ids: np.ndarray, dtype=torch.float32, ctx=None) -> tuple[float, int]:
    """Mean loss in nats per character over the text `ids` (N,), and the number of characters.

    Windows of block_size do not overlap, and the last one is shorter: every known character but
    the first is predicted once. The ranks share the work.  raises: UserError if there is none
    """
    ctx, T, device = ctx or DistributedContext(), model.config.block_size, model.wte.weight.device
    count = int(np.count_nonzero(ids[1:]))
    require(count, "no character of the text to evaluate on is known; take another text")
    rows = max(1, min(32, (1 << 24) // (T * model.config.vocab_size)))  # at most 64 MB of logits
    ids = np.pad(ids, (0, (1 - len(ids)) % T))  # id 0 as a target does not count
    windows = ids[:-1].reshape(-1, T), ids[1:].reshape(-1, T)  # (N, T) inputs and targets
    total = torch.zeros((), dtype=torch.float64)
    model.eval()
    for i in range(ctx.rank * rows, len(windows[0]), ctx.world_size * rows):
        x, y = (torch.from_numpy(w[i : i + rows].astype("i8")).to(device) for w in windows)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = model(x)  # (rows, T, V)
        total += cross_entropy(logits, y).cpu()
    return ctx.all_reduce(total).item() / count, count


def weights_are_sane(network: GPT) -> bool:
    return bool(nn.utils.get_total_norm(network.parameters()) < 1e6)  # neither huge nor NaN


class Trainer:
    """A training run: text, network, optimizers and progress. A checkpoint has all but the text."""

    def __init__(self, config: GPTConfig, cfg: TrainConfig, corpus, device, dtype, ctx=None):
        self.cfg, self.corpus, self.device, self.dtype = cfg, corpus, device, dtype
        self.ctx = ctx or DistributedContext()
        self.train_ids, val_ids = split_ids(corpus.ids)
        self.val_ids = val_ids[: validation_size(cfg, config.block_size)]
        self.epochs = cfg.max_steps * cfg.batch_size * config.block_size / len(self.train_ids)
        if config.dropout is None:  # the more often a text is repeated, the sooner it is memorised
            rate = 0.0 if self.epochs < 25 else 0.1 if self.epochs < 80 else 0.2
            config = replace(config, dropout=rate)
        config = replace(config, vocab_size=len(corpus.tokenizer))
        torch.manual_seed(cfg.seed)
        self.model = GPT(config).to(device)
        self.ema = copy.deepcopy(self.model).requires_grad_(False).eval()  # see ema_weight
        self.step, self.history = 0, []  # history: [step, training loss, validation loss]
        self.best, self.best_loss = {}, math.inf  # weights with the lowest validation loss
        self.loss_sum = torch.zeros((), device=device)  # of the steps since the last evaluation
        matrices = [p for p in self.model.h.parameters() if p.dim() == 2]
        others = [p for p in self.model.parameters() if all(p is not m for m in matrices)]
        self.muon = Muon(matrices, cfg, dtype)
        how = dict(weight_decay=0, fused=True, capturable=device.type == "cuda")
        self.adamw = torch.optim.AdamW(others, torch.zeros((), device=device), (0.9, 0.99), **how)
        for p in others:  # AdamW creates its state lazily; a checkpoint needs it earlier
            shapes = dict(step=(), exp_avg=p.shape, exp_avg_sq=p.shape)
            self.adamw.state[p] = {name: p.new_zeros(shape) for name, shape in shapes.items()}

    def evaluate(self) -> None:
        """Append both losses to the history, and keep the best weights.

        raises: UserError if the run has diverged: a loss or a weight is not finite, or the loss
        ends above that of a uniform guess
        """
        cfg, n_steps = self.cfg, self.step - (self.history[-1][0] if self.history else 0)
        training = float(self.loss_sum) / max(1, n_steps)
        validation, _ = evaluate(self.ema, self.val_ids, self.dtype, self.ctx)
        uniform, is_last = math.log(self.model.config.vocab_size), self.step == cfg.max_steps
        is_finite = math.isfinite(training + validation) and weights_are_sane(self.ema)
        if not is_finite or (is_last and validation > 1.1 * uniform):
            fix = f"--muon-learning-rate {cfg.muon_learning_rate / 3:.2g}"
            fix += f" --learning-rate {cfg.learning_rate / 3:.2g} --restart"
            raise UserError(f"diverged at step {self.step:,}, loss {validation:,.4g}; try {fix}")
        self.loss_sum.zero_()
        if self.step:  # the first weights of --init have no training loss
            self.history.append([self.step, round(training, 6), round(validation, 6)])
        if validation < self.best_loss:
            self.best_loss = validation
            self.best = {n: p.clone() for n, p in self.ema.named_parameters()}

    def overfits(self) -> bool:
        """Whether validation loss was above its best five times while training loss fell."""
        best = min(range(len(self.history)), key=lambda i: self.history[i][2], default=0)
        later = self.history[best + 1 :]
        return len(later) >= 5 and all(row[1] < self.history[best][1] for row in later[-5:])

    def metadata(self) -> Metadata:
        """Header of a checkpoint, or of the model file."""
        config, vocab = asdict(self.model.config), self.corpus.tokenizer.characters
        dtype = str(self.dtype).removeprefix("torch.")
        training = asdict(self.cfg) | dict(device=self.device.type, dtype=dtype)
        loss = self.best_loss if self.best else None
        return Metadata(config, vocab, self.corpus.data, training, self.step, loss, self.history)

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint by name, not copies."""
        tensors = {f"model.{name}": p for name, p in self.model.named_parameters()}
        tensors |= {f"ema.{name}": p for name, p in self.ema.named_parameters()}
        tensors |= {f"best.{name}": p for name, p in self.best.items()}
        tensors |= {f"muon.{i}": buffer for i, buffer in enumerate(self.muon.buffers)}
        for i, state in enumerate(self.adamw.state.values()):
            tensors |= {f"adamw.{i}.{name}": value for name, value in state.items()}
        return tensors | dict(loss_sum=self.loss_sum)

    @torch.no_grad()
    def load_state_dict(self, tensors: dict[str, Tensor], metadata: Metadata) -> None:
        """Continue from a `state_dict`.  raises: LookupError, RuntimeError or TypeError"""
        self.step, self.history = metadata.step, metadata.history
        if metadata.validation_loss is not None:
            self.best_loss = metadata.validation_loss
            self.best = {n: p.clone() for n, p in self.ema.named_parameters()}
        for name, tensor in self.state_dict().items():
            tensor.copy_(tensors[name].view_as(tensor))


class CudaGraph:
    """Replays `fn` as one CUDA graph: a small network is bound by the launches of its kernels.

    Not yet run on a GPU. `fn` must leave its tensors where they are and never wait for the device.
    """

    def __init__(self, fn: Callable[[], None]):
        self.fn, self.stream, self.calls = fn, torch.cuda.Stream(), 0

    def __call__(self) -> None:
        self.calls += 1
        if self.calls == 4:  # after a warm-up on the stream of the capture
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, stream=self.stream):
                    self.fn()
                self.fn = graph.replay
            except RuntimeError as error:
                log(f"NOTE: no CUDA graph ({first_line(error)}); slower without")
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.fn()
        torch.cuda.current_stream().wait_stream(self.stream)


def training_loop(t: Trainer, display, save_checkpoint, stop_requested) -> None:
    """The training loop: until cfg.max_steps, or until `stop_requested()` on some rank.

    display: has update(), for each step, and evaluation(); save_checkpoint: gets whether the loop
    stops; stop_requested: true after Ctrl-C (see stop_signals).  raises: UserError if it diverges
    """
    cfg, model, ctx, T = t.cfg, t.model, t.ctx, t.model.config.block_size
    local_rows = lambda windows: windows.tensor_split(ctx.world_size)[ctx.rank]  # (B / ranks, ...)
    # A step reads its inputs from tensors that stay where they are, as a CUDA graph requires.
    batch = local_rows(torch.zeros(cfg.batch_size, T + 1, dtype=torch.long)).to(t.device)
    n_targets, scale, weight = torch.ones(3, device=t.device)
    is_cpu = t.device.type == "cpu"  # torch.manual_seed takes 0.3 ms: it seeds every device
    rng = torch.default_generator if is_cpu else torch.get_device_module(t.device)

    def train_step() -> None:
        model.zero_grad()
        step_loss = torch.zeros_like(t.loss_sum)
        for part in batch.chunk(cfg.grad_accum):
            x, y = part[:, :-1], part[:, 1:]  # (B / grad_accum, T) inputs, targets
            with torch.autocast(t.device.type, torch.bfloat16, enabled=t.dtype == torch.bfloat16):
                logits = model(x)  # (B / grad_accum, T, V)
            loss = cross_entropy(logit_scale(t.epochs) * logits, y) / n_targets
            loss.backward()
            step_loss += loss.detach()
        ctx.all_reduce_gradients(model)
        t.loss_sum += ctx.all_reduce(step_loss)
        # No gradient clipping: Muon's update has a fixed size, and AdamW normalises its own.
        t.adamw.param_groups[0]["lr"].copy_(cfg.learning_rate * scale)
        t.adamw.step()
        t.muon.step(scale)
        with torch.no_grad():
            for ema_p, p in zip(t.ema.parameters(), model.parameters(), strict=True):
                ema_p.lerp_(p, weight)

    use_graph = t.device.type == "cuda" and ctx.world_size == 1
    run_step = CudaGraph(train_step) if use_graph else train_step
    next_save = time.monotonic() + cfg.checkpoint_interval
    if t.step == 0 and cfg.init:
        t.evaluate()  # so that a run never ends worse than it began
    model.train()
    while t.step < cfg.max_steps:
        windows = get_batch(t.train_ids, t.step, cfg, T)  # (B, T + 1)
        batch.copy_(local_rows(windows))
        n_targets.fill_((windows[:, 1:] != 0).sum().clamp(min=1))
        scale.fill_(lr_scale(t.step, cfg))
        weight.fill_(ema_weight(t.step + 1))
        rng.manual_seed(hash((cfg.seed, t.step, ctx.rank)))  # of dropout: resuming needs no state
        run_step()
        t.step += 1
        if t.step % cfg.eval_interval == 0 or t.step in (50, cfg.max_steps):  # 50: an early sign
            t.evaluate()
            display.evaluation()
        display.update()
        started = time.monotonic()
        stop, due = ctx.any_rank(stop_requested(), started > next_save)
        if (stop or due) and t.step < cfg.max_steps:
            save_checkpoint(stop)
            now = time.monotonic()  # saving takes at most 1% of the time
            next_save = now + max(cfg.checkpoint_interval, 100 * (now - started))
        if stop:
            return


# ---- generation ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class SampleConfig(Config):
    """How the next character is drawn. By default top-k, top-p and min-p are off.

    A new setting is a field here, its code in process_logits, and a name in Chat.do_probs.
    """

    temperature: float = option(0.7, "below 1 safer, above 1 wilder, 0 the likeliest", 0, 100)
    top_k: int = option(0, "draw from the k likeliest characters; 0 is off", 0, 0x110000)
    top_p: float = option(1.0, "draw from the likeliest that add up to this; 1 is off", 0, 1)
    min_p: float = option(0.0, "exclude what is below this share of the likeliest; 0 is off", 0, 1)
    repetition_penalty: float = option(1.0, "above 1: less of what already occurred", 0.01, 100)
    max_new: int = option(300, "characters to write", 0, 10**12)
    stop: tuple = option((), r"stop before this text; may be repeated; \n is a line end")
    seed: int | None = option(None, "same seed, same text (default: random)", 0, 2**63 - 1)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities (..., V) of logits (..., V)."""
    exp = np.exp(logits - logits.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


def process_logits(logits: np.ndarray, cfg: SampleConfig, seen: np.ndarray) -> np.ndarray:
    """Logits (B, V) after penalty, temperature, top-k, top-p and min-p; -inf where excluded.

    seen (B, V): True for characters that already occurred, which the penalty makes less likely
    sources: Keskar et al. 2019, "CTRL", section 4.1 (penalty); Fan et al. 2018, "Hierarchical
    Neural Story Generation" (top-k); Holtzman et al. 2020, "The Curious Case of Neural Text
    Degeneration" (top-p); Nguyen et al. 2024, "Turning Up the Heat: Min-p Sampling" (min-p)
    """
    penalty = cfg.repetition_penalty
    if penalty != 1:
        logits = np.where(seen, np.where(logits < 0, logits * penalty, logits / penalty), logits)
    if cfg.temperature not in (0, 1):
        logits = logits / max(cfg.temperature, 1e-6)  # less would overflow, and change nothing
    if 0 < cfg.top_k < logits.shape[-1]:
        kth = np.partition(logits, -cfg.top_k)[:, -cfg.top_k, None]  # (B, 1)
        logits = np.where(logits < kth, -np.inf, logits)
    if cfg.top_p < 1:
        order = logits.argsort(kind="stable")  # (B, V), ascending
        tail = softmax(np.take_along_axis(logits, order, -1)).cumsum(-1) <= 1 - cfg.top_p
        tail[:, -1] = False  # the likeliest stays, whatever top_p
        logits = np.where(np.take_along_axis(tail, order.argsort(), -1), -np.inf, logits)
    if cfg.min_p > 0:
        probs = softmax(logits)
        logits = np.where(probs < cfg.min_p * probs.max(-1, keepdims=True), -np.inf, logits)
    return logits


def sample(logits: np.ndarray, cfg: SampleConfig, rngs: list, seen: np.ndarray) -> np.ndarray:
    """Ids (B,) drawn from logits (B, V), each row with its own generator; never U+FFFD (id 0).

    source: Gumbel-max trick, Maddison et al. 2014, "A* Sampling": argmax(logits + Gumbel noise)
    is a sample of softmax(logits)
    """
    logits = logits.copy()
    logits[:, 0] = -np.inf
    logits = process_logits(logits, cfg, seen)
    if cfg.temperature > 0:
        logits = logits + np.stack([rng.gumbel(size=logits.shape[-1]) for rng in rngs])
    return logits.argmax(-1)


def context_start(n: int, block_size: int) -> int:
    """Where the context of a text of `n` characters begins.

    Positions are absolute: a full context cannot slide by one, but moves by half of its length.
    """
    half = block_size // 2
    return max(0, math.ceil((n - block_size) / half)) * half


class NumpyGPT:
    """The GPT for one token of one text, on views of its weights, with NumPy's cheaper calls."""

    def __init__(self, model: GPT, cache: KVCache):
        arrays = lambda module: [p.detach().numpy() for p in module.parameters()]
        (self.wte,), (self.wpe,), self.ln_f = map(arrays, (model.wte, model.wpe, model.ln_f))
        self.h = [list(map(arrays, (b.ln_1, b.attn, b.ln_2, b.mlp))) for b in model.h]
        self.cache, self.kv = cache, cache.kv[:, :, 0].numpy()  # (L, 2, H, block_size, D)

    @staticmethod
    def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
        x = x - x.sum() / x.size
        return x * weight / (x @ x / x.size + 1e-5) ** 0.5 + bias

    def decode(self, token: int) -> np.ndarray:
        """Logits (1, V) after `token`."""
        t, (_, _, H, _, D) = self.cache.length, self.kv.shape
        x = self.wte[token] + self.wpe[t]  # (C,)
        for (ln_1, attn, ln_2, mlp), kv in zip(self.h, self.kv, strict=True):
            c_attn, c_attn_bias, c_proj, c_proj_bias = attn
            qkv = (c_attn @ self.layer_norm(x, *ln_1) + c_attn_bias).reshape(3, H, D)
            kv[:, :, t] = qkv[1:]
            q, k, v = qkv[0][:, None], kv[0, :, : t + 1], kv[1, :, : t + 1]  # (H, t + 1, D)
            y = softmax((q * D**-0.5) @ k.mT) @ v  # (H, 1, D)
            x = x + (c_proj @ y.reshape(-1) + c_proj_bias)
            c_fc, c_fc_bias, c_proj, c_proj_bias = mlp
            y = c_fc @ self.layer_norm(x, *ln_2) + c_fc_bias  # (4 C,)
            y *= 0.5 + 0.5 * np.tanh((2 / np.pi) ** 0.5 * (y + 0.044715 * y * y * y))  # GELU
            x = x + (c_proj @ y + c_proj_bias)
        self.cache.length = t + 1
        return (self.wte @ self.layer_norm(x, *self.ln_f))[None]


def generate_ids(model: GPT, prompt: np.ndarray, cfg: SampleConfig, rngs) -> Iterator[np.ndarray]:
    """Endless continuation of `prompt` (N,), N > 0, as B texts, one per generator: ids (B,)."""
    T, B = model.config.block_size, len(rngs)
    cache = KVCache(model, B)
    device = cache.kv.device
    seen = np.zeros((B, model.config.vocab_size), bool)
    seen[:, prompt] = True
    context = [np.full(B, i, "i8") for i in prompt[context_start(len(prompt), T) :]]  # S times (B,)
    numpy_gpt = NumpyGPT(model, cache) if B == 1 and device.type == "cpu" else None
    while True:
        new = np.stack(context[cache.length :], axis=1)  # (B, S) to prefill, (B, 1) to decode
        if numpy_gpt and new.size == 1:
            logits = numpy_gpt.decode(new.item())  # (1, V)
        else:
            with torch.inference_mode():
                logits = model(torch.from_numpy(new).to(device), cache)[:, -1]  # (B, V)
            logits = logits.float().cpu().numpy()
        ids = sample(logits, cfg, rngs, seen)
        if cfg.repetition_penalty != 1:
            seen[np.arange(B), ids] = True
        yield ids
        context.append(ids)
        if len(context) > T:  # the context is full: its second half is prefilled anew
            context, cache.length = context[context_start(T + 1, T) :], 0


@dataclass
class Model:
    """Network, tokenizer and metadata of a model file: what `load` returns."""

    network: GPT
    tokenizer: Tokenizer
    metadata: Metadata

    def prompt_ids(self, prompt: str) -> np.ndarray:
        """Ids (N,) of `prompt`, N > 0: an empty text stands for a line end, or else for id 1."""
        known, _ = self.tokenizer.normalize_prompt(prompt)
        return np.maximum(self.tokenizer.encode(known or "\n"), 1)

    def stream_batch(self, prompt: str, cfg: SampleConfig, texts=range(1)) -> Iterator[list[str]]:
        """`prompt` continued as several texts: lists of pieces, one per text, until all are done.

        Text i depends only on (seed, i), not on the batch. A piece is held back while it may be the
        beginning of a stop text.
        """
        ids = self.prompt_ids(prompt)
        seed = secrets.randbits(62) if cfg.seed is None else cfg.seed
        rngs = [np.random.default_rng((seed, i)) for i in texts]
        tokens = generate_ids(self.network, ids, cfg, rngs)
        held, done, stops = [""] * len(rngs), [False] * len(rngs), [s for s in cfg.stop if s]
        delay = max(map(len, stops), default=1) - 1  # so many characters may begin a stop text
        for _ in range(cfg.max_new):
            pieces = [""] * len(rngs)
            for i, c in enumerate(self.tokenizer.decode(next(tokens))):
                if done[i]:
                    continue
                held[i] += c
                found = max((len(stop) for stop in stops if held[i].endswith(stop)), default=0)
                cut = max(0, len(held[i]) - (found or delay))
                pieces[i], held[i] = held[i][:cut], held[i][cut:]
                if found:
                    held[i], done[i] = "", True
            yield pieces
            if all(done):
                return
        yield held

    def stream(self, prompt: str = "", **sampling) -> Iterator[str]:
        """Pieces of a continuation as they are written; `sampling`: fields of SampleConfig."""
        stop = sampling.pop("stop", ())
        stop = (stop,) if isinstance(stop, str) else tuple(map(str, stop))
        for (piece,) in self.stream_batch(prompt, SampleConfig(stop=stop, **sampling)):
            yield piece

    def generate(self, prompt: str = "", **sampling) -> str:
        """A continuation of `prompt`; `sampling`: fields of SampleConfig.  raises: UserError"""
        return "".join(self.stream(prompt, **sampling))

    def save(self, path: str | Path) -> None:
        """Write the model file, which replaces an old one once it is safely on the disk."""
        save_tensors(Path(path), dict(self.network.named_parameters()), self.metadata.to_header())


# ==================================================================================================
# The complete GPT ends here: it trains, and it writes. Below it is connected to files, texts, other
# processes, the terminal and other programs.
# ==================================================================================================


# ---- model file ----------------------------------------------------------------------------------
# A model file and a checkpoint are safetensors files: weights, and JSON strings in the header.

MODEL = "model.safetensors"
CHECKPOINT_SUFFIX = ".checkpoint"
MAX_HEADER = 8 << 20  # bytes
LIMIT = 10**15  # no number in a header is larger


def is_number(value) -> bool:
    return type(value) in (int, float) and abs(value) < LIMIT  # NaN is not


@dataclass(frozen=True)
class Metadata(Config):
    """What a file says about its weights."""

    config: dict = option(None, None)  # GPTConfig
    characters: str = option("", None)
    data: dict = option(None, None)  # names, sha256 of the text in UTF-8, characters: their number
    training: dict = option(None, None)  # TrainConfig, device and dtype
    step: int = option(0, None, 0, LIMIT)
    validation_loss: float | None = option(None, None, -LIMIT, LIMIT)  # lowest, nats per character
    history: list = option(None, None)  # [step, training loss, validation loss]

    def to_header(self, format: str = "pt") -> dict[str, str]:
        """Header entries of a safetensors file; `format: pt` is what transformers expects."""
        header = dict(format=format, format_version="1", anexa_version=__version__)
        entries = {name: json.dumps(value) for name, value in asdict(self).items()}
        return header | dict(torch_version=torch.__version__) | entries

    @classmethod
    def from_header(cls, header: dict[str, str]) -> Metadata:
        """Validated metadata.  raises: LookupError, TypeError, UserError or ValueError"""
        require(header["format_version"] == "1", "its format_version is not 1")
        m = cls(**{setting.name: json.loads(header[setting.name]) for setting in fields(cls)})
        require(m.config.keys() == {f.name for f in fields(GPTConfig)}, "its config is another")
        vocab, size = m.characters, GPTConfig(**m.config).vocab_size
        in_order = vocab == build_vocab(vocab) and len(vocab) == size
        require(in_order, "its characters are not U+FFFD and others in order")
        vocab.encode()  # UnicodeEncodeError is a ValueError: surrogates are no characters
        used = {n: v for n, v in m.training.items() if n in ("init", "max_steps")}
        TrainConfig.pick(used)  # a run that resumes checks the others
        data = m.data
        if "name" in data:  # one string before version 1.0
            data["names"] = [data.pop("name")]
        names = data["names"]  # TypeError where one is no string
        require(type(names) is list and "".join(names), "its data set has no names")
        require(re.fullmatch("[0-9a-f]{64}", data["sha256"]), "its sha256 is not 64 hex digits")
        require(is_number(data["characters"]), "its data set has no number of characters")
        steps = [0] + [step for step, _, _ in m.history]
        are_numbers = all(is_number(value) for row in m.history for value in row)
        in_order = {*map(type, steps)} == {int} and steps == sorted(set(steps))
        require(are_numbers and in_order and steps[-1] <= m.step, "its history is malformed")
        return m

    def __str__(self) -> str:
        loss = self.validation_loss
        loss = "unknown" if loss is None else f"{loss:.4f} nats/char"
        run = f"trained on {text_names(self.data['names'])} for {self.step:,} steps"
        return f"{GPTConfig(**self.config)}, {run}, validation loss {loss}"


def text_names(names: list[str]) -> str:
    return ", ".join(escape_control(name).replace("\n", "\\n") for name in names)


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """File that replaces `path` once it is complete and on the disk.  raises: OSError"""
    path = path.resolve()  # a link stays a link
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            raise OSError(22, "is not a regular file")  # /dev/null must stay what it is
        pattern = f".{glob.escape(path.name)}.{'?' * 16}.tmp"
        for old in path.parent.glob(pattern):  # of killed processes
            with suppress(OSError):  # another process may remove it, too
                if time.time() - old.stat().st_mtime > 86_400:
                    old.unlink()
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    except OSError as error:
        error.filename = str(path)  # a full disk does not name the file
        raise
    finally:
        with suppress(OSError):
            temporary.unlink()


def save_tensors(path: Path, tensors: dict[str, Tensor], header: dict, rescue=False) -> None:
    """Write a file.  raises: OSError; to `rescue`, UserError after saving to a temporary folder"""
    try:
        with atomic_write(path) as file:
            file.write(safetensors.torch.save(tensors, header))
    except OSError as error:
        if not rescue:
            raise
        other = Path(tempfile.mkdtemp(prefix="anexa-")) / path.name
        save_tensors(other, tensors, header)
        reason = f"{error.strerror or error}; saved to {other} instead: move it here"
        raise UserError(f"{path}: {reason}") from None


@contextmanager
def reading_model(path: Path, fix: str = "fetch it again") -> Iterator[None]:
    """Within it what is missing or wrong in a file becomes a UserError."""
    try:
        yield
    except FileNotFoundError:
        out = str(path).removesuffix(CHECKPOINT_SUFFIX)
        fix = f"check the name, or train it with: python anexagpt.py train --out {out}"
        unfinished = path.with_name(path.name + CHECKPOINT_SUFFIX)
        fix += f", or use its checkpoint, {unfinished}" if unfinished.is_file() else ""
        raise UserError(f"{path}: no such file; {fix}") from None
    except (LookupError, RuntimeError, TypeError, UserError, ValueError, SafetensorError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        reason = " ".join(escape_control(reason).split())[:200]
        raise UserError(f"{path}: not a complete model of Anexa: {reason}; {fix}") from None


def read_file(path: Path, fix: str = "fetch it again") -> tuple[Metadata, dict[str, Tensor]]:
    """Content of a model file or a checkpoint.  raises: UserError unless it is complete and ours"""
    with reading_model(path, fix):
        require(path.is_file() or not path.exists(), "it is not a regular file")
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            require(0 < size <= MAX_HEADER, "it is not a safetensors file, or has a huge header")
            metadata = Metadata.from_header(json.loads(file.read(size))["__metadata__"])
            n_bytes = 4 * GPTConfig(**metadata.config).n_parameters()
            require(path.stat().st_size > n_bytes, "its tensors are not those of its config")
            file.seek(0)  # read, not mapped: the file may be replaced while it is in use
            return metadata, safetensors.torch.load(file.read())


def load(path: str | Path = MODEL, device: str | torch.device = "cpu") -> Model:
    """The model in a model file, in an exported one, or in a checkpoint.  raises: UserError

    Of a checkpoint the best weights are taken, before its first evaluation the averaged ones.
    """
    metadata, tensors = read_file(Path(path))
    prefixes = "", "transformer.", "best.", "ema."
    prefix = next((p for p in prefixes if f"{p}wte.weight" in tensors), "")
    weights = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    if prefix == "transformer.":  # GPT-2's layout of linear weights is (in, out)
        weights = {n: t.T if n.startswith("h.") and t.dim() == 2 else t for n, t in weights.items()}
    network = GPT(GPTConfig(**metadata.config))
    with reading_model(Path(path)):
        network.load_state_dict(weights)  # RuntimeError unless names and shapes are the same
        require(weights_are_sane(network), "its weights are huge or not finite")
    return Model(network.to(device).eval(), Tokenizer(metadata.characters), metadata)


# ---- text sources --------------------------------------------------------------------------------
# Names, files, folders and URLs become one text, in pieces: it may be larger than the memory.

SOURCES = {  # built-in texts and their mirrors
    "sherlock": [
        "https://www.gutenberg.org/cache/epub/1661/pg1661.txt",
        "https://www.gutenberg.org/files/1661/1661-0.txt",
        "https://raw.githubusercontent.com/jsvine/markovify/master/test/texts/sherlock.txt",
    ],
    "shakespeare": [
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "https://storage.googleapis.com/download.tensorflow.org/data/shakespeare.txt",
    ],
}
ENDINGS = {  # words near the end of a built-in text: neither an error page nor half a file has them
    "sherlock": "I believe that she has met with considerable success",
    "shakespeare": "Whiles thou art waking.",
}
FALLBACK = "python-docs"  # the language reference in every Python: 465,000 characters, no network
BUILT_IN = (*SOURCES, FALLBACK)
CACHE = Path("data")  # for downloads
PIECE = 1 << 23  # characters that are read at once: a book
MAX_DOWNLOAD = 2 << 30  # bytes
LONG_TEXT = 32 << 20  # characters from which on ids are in a file instead of the memory
TIMEOUT = 10, 15  # seconds to connect, and until the next byte


def download(name: str) -> Path:
    """The stored copy of a built-in text or URL, downloaded if there is none.  raises: UserError"""

    def is_complete(file: Path) -> bool:  # however its lines are broken
        words = file.read_text("utf-8", "replace").split() if name in ENDINGS else []
        return ENDINGS.get(name, "") in " ".join(words)

    digest, reasons = hashlib.sha256(name.encode(errors="replace")).hexdigest(), []
    path = CACHE / f"{name if name in SOURCES else digest[:16]}.txt"
    if path.is_file() and is_complete(path):
        return path
    for url in SOURCES.get(name, [name]):
        host = url.split("/")[2].rpartition("@")[2]
        log(f"Downloading {path} from {host} ...")
        try:
            headers = {"Accept-Encoding": "identity"}  # so that Content-Length is that of the text
            response = requests.get(url, stream=True, timeout=TIMEOUT, headers=headers)
            require(response.status_code == 200, f"HTTP status {response.status_code}")
            n_pieces = int(response.headers.get("Content-Length") or 0) / (1 << 16) or None
            bar = dict(console=PlainConsole(), transient=True, disable=not sys.stderr.isatty())
            with atomic_write(path) as file:
                pieces = response.iter_content(1 << 16)
                for piece in rich.progress.track(pieces, "", n_pieces, **bar):
                    file.write(piece)
                    require(file.tell() <= MAX_DOWNLOAD, f"more than {MAX_DOWNLOAD:,} bytes")
                file.flush()
                require(is_complete(Path(file.name)), "another text, or not all of it")
            return path
        except requests.RequestException as error:  # its text has the URL, which may be secret
            reasons.append(f"{host}: the connection failed ({type(error).__name__})")
        except (UserError, ValueError) as error:
            reasons.append(f"{host}: {error}")
    name, fix = re.sub(r"(?<=//)[^/]*@|[?#].*", "", name), "try again, or give a text file"
    raise UserError(f"--data {name}: no download ({'; '.join(reasons)}); {fix}")


def find_texts(name: str) -> list[Path | bytes]:
    """The files, or the bytes of one, that a name of --data stands for.  raises: UserError"""
    if name == FALLBACK:
        from pydoc_data.topics import topics

        return ["\n\n".join(topics[topic] for topic in sorted(topics)).encode()]
    if name == "-":
        return [sys.stdin.buffer.read()]
    if name in SOURCES or re.match("(?i)https?://[^/]", name):
        return [download(name)]
    path = Path(name or "?")  # Path("") is the current folder
    if path.is_file():
        return [path]
    files = [file for file in path.glob("[!.]*") if file.is_file()]
    texts = sorted(file for file in files if file.suffix.lower() in (".txt", ".md"))
    if not texts:
        known = f"no such file, folder of *.txt and *.md, or built-in text ({', '.join(BUILT_IN)})"
        raise UserError(f"--data {text_names([name])}: {known}; check the spelling")
    return texts


def strip_license(text: str) -> str:
    """A book without Project Gutenberg's header and footer; other text as it is."""
    marker = r"\*\*\* ?%s OF TH(?:E|IS) PROJECT GUTENBERG EBOOK[^*]{0,300}\*\*\*"
    start, ends = re.search(marker % "START", text), [*re.finditer(marker % "END", text)]
    if not start or not ends:
        return text
    body = text[start.end() : ends[-1].start()].strip()
    # Older editions have a last line of their own.
    return re.sub("\nEnd of (the )?Project Gutenberg.*$", "", body).rstrip() + "\n"


def read_texts(sources: list[tuple[Path | bytes, str]]) -> Iterator[str]:
    r"""Pieces of texts (source and encoding), each text on a new line.  raises: UserError

    They have \n line ends, and neither a byte order mark nor a license.
    """
    last = "\n"
    for source, encoding in sources:
        try:
            with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as raw:
                file = io.TextIOWrapper(raw, encoding)
                for i, piece in enumerate(iter(partial(file.read, PIECE), "")):
                    piece.encode()  # some encodings have surrogates, which are not characters
                    if "\0" in piece:
                        raise UnicodeError
                    if i == 0:
                        piece = strip_license(piece.removeprefix("\ufeff"))
                        piece = piece if last.endswith("\n") else "\n" + piece
                    yield piece
                    last = piece
        except LookupError:
            fix = "unknown to Python; try utf-8, latin-1 or cp1252"
            raise UserError(f"--encoding {encoding}: {fix}") from None
        except UnicodeError:
            name = "standard input" if isinstance(source, bytes) else text_names([str(source)])
            fix = "save it as plain text, not PDF or Word, or add --encoding, e.g. cp1252, utf-16"
            raise UserError(f"{name}: not plain {encoding.upper()} text; {fix}") from None


class Corpus(NamedTuple):
    """A text to train or evaluate on."""

    data: dict  # see Metadata.data
    tokenizer: Tokenizer
    ids: np.ndarray  # (N,)


def load_corpus(names: list[str] | None, encoding: str = "utf-8") -> Corpus:
    """The texts of --data; without names Sherlock Holmes or, if no mirror answers, FALLBACK.

    They are read twice: for their vocabulary, then for their ids.  raises: UserError
    """
    wanted, seen = names or ["sherlock"], np.zeros(0x110000, bool)
    own = lambda name: "utf-8" if name in BUILT_IN else encoding
    try:
        sources = [(source, own(name)) for name in wanted for source in find_texts(name)]
    except UserError as error:
        if names:
            raise
        log(f"NOTE: {error}.")
        log(f"NOTE: using {FALLBACK}, the language reference inside your Python, instead.")
        return load_corpus([FALLBACK])
    names = ["standard input" if name == "-" else name for name in wanted]
    sha256, n = hashlib.sha256(), 0
    for piece in read_texts(sources):
        seen[code_points(piece)] = True
        sha256.update(piece.encode())
        n += len(piece)
    if seen.sum() > 65_535:
        raise UserError(f"--data {text_names(names)}: over 65,535 kinds of characters; is it text?")
    tokenizer = Tokenizer(build_vocab(map(chr, seen.nonzero()[0])))
    is_long, dtype = n >= LONG_TEXT, tokenizer.table.dtype
    with tempfile.TemporaryFile(dir=".") if is_long else io.BytesIO() as file:
        file.writelines(map(tokenizer.encode, read_texts(sources)))
        ids = np.memmap(file, dtype, "r") if is_long else np.frombuffer(file.getvalue(), dtype)
    return Corpus(dict(names=names, sha256=sha256.hexdigest(), characters=n), tokenizer, ids)


# ---- distributed ---------------------------------------------------------------------------------
# torchrun starts one process for each GPU (or share of a CPU); each computes a part of every batch.


class DistributedContext(NamedTuple):
    """Rank and world size of this process; (0, 1) without torchrun."""

    rank: int = 0
    world_size: int = 1

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_reduce_gradients(self, model: nn.Module) -> None:
        """Sum the gradients over all ranks, as one vector: many small messages would be slower."""
        if self.world_size > 1:
            grads = [p.grad for p in model.parameters()]
            vector = self.all_reduce(nn.utils.parameters_to_vector(grads))
            nn.utils.vector_to_parameters(vector, grads)

    def any_rank(self, *flags: bool) -> list[bool]:
        """Logical OR of each flag over all ranks."""
        return self.all_reduce(torch.tensor(flags, dtype=torch.int)).bool().tolist()

    def together(self, fn: Callable):
        """fn() on every rank; a UserError of one is raised on all, so that none waits for it."""
        result, errors = None, [None] * self.world_size
        try:
            result = fn()
        except UserError as error:
            errors[self.rank] = error
        if self.world_size > 1:  # pickled, but among our own processes only
            dist.all_gather_object(errors, errors[self.rank])
        for error in filter(None, errors):
            raise error
        return result


@contextmanager
def init_distributed(device: torch.device) -> Iterator[DistributedContext]:
    """Join the process group that torchrun describes in the environment, if there is one."""
    if "WORLD_SIZE" not in os.environ:
        yield DistributedContext()
        return
    for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise UserError(f"WORLD_SIZE is set but not {name}; start with torchrun, or unset it")
    backend = "gloo"
    if device.type == "cuda":
        backend, n_gpus = "cpu:gloo,cuda:nccl", torch.cuda.device_count()
        n = int(os.environ["LOCAL_WORLD_SIZE"])
        require(n <= n_gpus, f"--nproc-per-node {n}: must be at most {n_gpus}, one for each GPU")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # After a failure torchrun restarts with a store that still has the addresses of dead ranks.
    store, rank, world_size = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    try:
        yield DistributedContext(rank, world_size)
    finally:
        dist.destroy_process_group()


# ---- terminal ------------------------------------------------------------------------------------
# Generated text goes to stdout, everything else to stderr.

PlainConsole = partial(Console, stderr=True, highlight=False, markup=False, emoji=False)
STEERING = "[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"


def escape_control(text: str) -> str:
    """`text` with control and bidirectional characters escaped, which could steer a terminal."""
    spelled = lambda match: match[0].encode("unicode_escape", "surrogatepass").decode()
    return re.sub(STEERING, spelled, text)


def first_line(error: Exception) -> str:
    return escape_control(str(error) or type(error).__name__).partition("\n")[0]


def write_stdout(text: str) -> None:
    """Print generated text: as it is, but without control characters to a terminal."""
    print(escape_control(text) if sys.stdout.isatty() else text, end="", flush=True)


def log(text: str = "") -> None:
    """Print a message to stderr, wrapped to a terminal; of several ranks only rank 0 prints."""
    if "WORLD_SIZE" not in os.environ or os.environ.get("RANK", "0") == "0":
        with suppress(OSError):  # the reader or the terminal has gone
            if sys.stderr.isatty():
                PlainConsole().print(escape_control(text))
            else:
                print(escape_control(text), file=sys.stderr, flush=True)


class ProgressDisplay:
    """Progress of a training run: a live line on a terminal, plain lines elsewhere, or nothing."""

    def __init__(self, trainer: Trainer, quiet: bool, board=None):
        self.t, self.quiet, self.board = trainer, quiet, board
        self.warned, self.started, self.shown = False, (time.monotonic(), trainer.step), 0.0
        self.is_live = sys.stderr.isatty() and not quiet

    def metrics(self) -> tuple[str, float, str]:
        """Step and losses, characters per second, speed and time left: within 60 columns."""
        t, (started, first) = self.t, self.started
        speed = (t.step - first) / max(time.monotonic() - started, 1e-9)  # steps per second
        left = str(timedelta(seconds=int((t.cfg.max_steps - t.step) / speed))).removeprefix("0:")
        last, training, validation = t.history[-1] if t.history else (0, math.nan, math.nan)
        if t.step > last:
            training = float(t.loss_sum) / (t.step - last)
        losses = f"{t.step:,}/{t.cfg.max_steps:,} train {training:.3f} val {validation:.3f}"
        speed *= t.cfg.batch_size * t.model.config.block_size
        return losses.replace("nan", "  -  "), speed, f"{speed:,.0f} char/s {left} left"

    def show(self, line: str = "", end: str = "\r") -> None:
        """Print a line over the live line, which ends in a carriage return."""
        line = set_cell_size(line, PlainConsole().width - 1)
        with suppress(OSError):
            print(line, end=end, file=sys.stderr, flush=True)

    def update(self) -> None:
        """Refresh the live line, five times per second at most."""
        if self.is_live and time.monotonic() - self.shown > 0.2:
            self.shown, (losses, _, left) = time.monotonic(), self.metrics()
            self.show(f"{losses} {left}")

    def evaluation(self) -> None:
        """Report an evaluation with a sample of what the model writes."""
        t, (losses, speed, left) = self.t, self.metrics()
        if not self.quiet:
            model = Model(t.ema, t.corpus.tokenizer, t.metadata())
            sample = escape_control(model.generate("\n", max_new=60, seed=0).replace("\n", " "))
            if self.is_live:
                self.show(f"{losses} | {sample}", "\n")
            else:
                log(f"{losses} {left} | {sample}")
        if self.board:
            step, training, validation = t.history[-1]
            scalars = dict(training_loss=training, validation_loss=validation)
            scalars |= dict(lr_scale=lr_scale(step - 1, t.cfg), characters_per_second=speed)
            with suppress(OSError):  # a full disk must not end the run
                for name, value in scalars.items():
                    self.board.add_scalar(name, value, step)
        if t.overfits() and not self.warned:
            self.warned = True
            log("NOTE: overfitting: validation loss rises while training loss falls. The best")
            log("weights are saved; try more --dropout, fewer --max-steps or more text.")

    def close(self) -> None:
        if self.is_live:
            self.show()
        if self.board:
            with suppress(OSError):
                self.board.close()


def loss_chart(history: list, width: int = 60, height: int = 12) -> str:
    """Training (o) and validation (x) loss over the steps as lines of text."""
    if len(history) < 2:
        return ""
    steps, *losses = np.array(history).T  # (N,) each
    columns = np.rint(steps / steps[-1] * (width - 10)).astype(int)
    ticks = np.linspace(np.max(losses), np.min(losses), height)
    grid = np.full((height, width - 9), " ")
    for loss, mark in zip(losses, "ox", strict=True):
        rows = (ticks[0] - loss) / max(ticks[0] - ticks[-1], 1e-9) * (height - 1)
        grid[np.rint(rows).astype(int), columns] = mark
    lines = [f"{y:7.3f} |{''.join(row).rstrip()}" for y, row in zip(ticks, grid, strict=True)]
    lines += [f"{'':8}+{'-' * (width - 9)}", f"{'':9}0{f'step {history[-1][0]:,}':>{width - 10}}"]
    return "\n".join([*lines, f"{'':9}loss in nats/char: o training, x validation"])


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Within it Ctrl-C, SIGTERM and SIGHUP go into the list instead of ending the process.

    Ctrl-C again raises KeyboardInterrupt, but not within a second: for one key press a terminal,
    a wrapper and torchrun may each send a signal.
    """
    caught, times = [], []

    def handle(number, frame) -> None:
        caught.append(number)
        times.append(time.monotonic())
        if number == signal.SIGINT and times[-1] - times[0] > 1:
            raise KeyboardInterrupt
        if len(caught) == 1 and os.environ.get("RANK", "0") == "0":
            with suppress(OSError):  # not log, in the midst of which the signal may have come
                os.write(2, b"\nStopping after this step ... (Ctrl-C again: quit without saving)\n")

    numbers = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}
    ignored = {n for n in numbers if signal.getsignal(n) == signal.SIG_IGN}  # as under nohup
    before = {n: signal.signal(n, handle) for n in numbers - ignored}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- chat ----------------------------------------------------------------------------------------
# The prompt loop, its commands, and among them views of what the model computes.

VIEWS = ("tokens", "probs", "why", "attn")
COOL = ("", "#4a90c2", "#2f9e77", "#d9822b", "#d03a3a")  # for dark and for light terminals
WARM = ("", "#000000 on #fee391", "#000000 on #fe9929", "#ffffff on #b30000")
is_open = re.compile('(?s)"""(?!.*""")').match  # of a prompt: three more quotes must end it


def visible(text: str) -> str:
    r"""`text` with what moves the cursor or has no width spelt out, as \n or \u0301."""
    spell = lambda c: c.encode("unicode_escape").decode()
    return "".join(c if c.isprintable() and cell_len(c) else spell(c) for c in text)


def annotated(text: str, styles: list[str], notes: list[str], width: int) -> Text:
    r"""Each character of `text` in its style, with its note below; \n ends a line."""
    lines, cells_left = [], 0
    for c, style, note in zip(text, styles, notes, strict=True):
        room = max(cell_len(visible(c)), len(note))
        if room > cells_left:
            lines += [Text(), Text(style="dim")]  # characters, notes
            cells_left = width
        lines[-2].append(set_cell_size(visible(c), room), style)
        lines[-1].append(f"{note:<{room}}")
        cells_left = 0 if c == "\n" else cells_left - room
    return Text("\n").join(lines)


@torch.no_grad()
def predictions(model: Model, ids: np.ndarray, first: int) -> Tensor:
    """Logits (N + 1 - first, V) of the characters `first` > 0 to N of a text ids (N,).

    Each is predicted from the context that it has when `generate_ids` writes the text.
    """
    T, device, parts = model.network.config.block_size, model.network.wte.weight.device, []
    ids = torch.from_numpy(ids.astype("i8")).to(device)
    while first <= len(ids):
        start = context_start(first, T)
        logits = model.network(ids[None, start : start + T])[0]  # (T or fewer, V)
        parts.append(logits[first - start - 1 :].float().cpu())
        first = start + T + 1
    return torch.cat(parts)


@torch.no_grad()
def attention_weights(network: GPT, ids: Tensor, layer: int) -> Tensor:
    """Attention weights (H, T, T) of `layer` for ids (T,): row t is what position t attends to."""
    T, H, outputs, c_attn = len(ids), network.config.n_head, [], network.h[layer].attn.c_attn
    with c_attn.register_forward_hook(lambda module, args, output: outputs.append(output)):
        network(ids[None].to(network.wte.weight.device))
    q, k, _ = outputs[0].view(1, T, 3, H, -1).permute(2, 0, 3, 1, 4)  # (1, H, T, D) each
    # Attention mixes values by its weights; values that form the unit matrix give the weights.
    return attention(q, k, torch.eye(T, device=q.device).expand(1, H, T, T))[0].cpu()


def normalized(model: Model, prompt: str) -> str:
    """`prompt` in known characters; says what was changed, and how much of it is read."""
    text, notice = model.tokenizer.normalize_prompt(prompt)
    n, T = len(text), model.network.config.block_size
    if notice:
        log(f"({notice})")
    if n > T:
        log(f"(the context has {T:,} characters: the last {n - context_start(n, T):,} are read)")
    return text


class Chat:
    """A session with a model. `do_NAME(argument)` is the command /NAME, its docstring the help."""

    def __init__(self, model: Model, cfg: SampleConfig):
        self.model, self.cfg, self.console = model, cfg, PlainConsole()
        self.prompt, self.written, self.seed = "", "", None  # of the last answer
        self.commands = {n[3:]: getattr(self, n) for n in vars(Chat) if n.startswith("do_")}
        self.settings = {f.name.replace("_", "-"): f for f in fields(SampleConfig)}

    def respond(self, line: str) -> None:
        """Answer a prompt or run a command.  raises: UserError; EOFError to leave"""
        if line.startswith('"""'):
            return self.answer(line.split('"""')[1].removeprefix("\n").removesuffix("\n"))
        if line.strip() in ("quit", "exit"):
            raise EOFError
        if not line.startswith("/"):
            return self.answer(line)
        name, _, argument = line[1:].partition(" ")
        require(name in self.commands, f"/{name}: unknown; /help lists the commands")
        needs_file = self.commands[name].__doc__.startswith("FILE")
        require(argument.strip() or not needs_file, f"usage: /{name} FILE")
        self.commands[name](argument)

    def answer(self, prompt: str, echo: bool = True) -> None:
        """Continue `prompt` until done or Ctrl-C; `echo`: show it before its continuation."""
        text = normalized(self.model, prompt)
        require(text, "there is nothing to continue; type a prompt")
        start = context_start(len(text), self.model.network.config.block_size)
        self.seed = secrets.randbelow(10**9) if self.cfg.seed is None else self.cfg.seed
        self.prompt, self.written = prompt, ""
        print(f"Response: {'...' * (start > 0 or not echo)}", end="", file=sys.stderr, flush=True)
        with suppress(KeyboardInterrupt):  # ends the answer; what has come stays
            write_stdout(text[start:] if echo else "")
            for (piece,) in self.model.stream_batch(text, replace(self.cfg, seed=self.seed)):
                self.written += piece
                write_stdout(piece)
        print(flush=True)

    def table(self, rows: Iterable[tuple[str, ...]]) -> None:
        grid = Table.grid(padding=(0, 1, 0, 0))
        for row in rows:
            grid.add_row(*row)
        self.console.print(grid)

    def do_help(self, _: str) -> None:
        """: list the commands."""
        usages = {f"/{name} ": do.__doc__.split(": ", 1) for name, do in self.commands.items()}
        self.table((name + usage, text.rstrip(".")) for name, (usage, text) in usages.items())
        log('"""TEXT""" may have several lines, or begin with /. Ctrl-C stops an answer.')

    def do_set(self, argument: str) -> None:
        """NAME [VALUE]: change a setting, as /set top-k 5; without a value back to its default."""
        name, _, value = argument.strip().partition(" ")
        setting = self.settings.get(name.replace("_", "-"))
        require(setting, f"/set {name or 'NAME'}: choose from {', '.join(self.settings)}")
        kind, new = field_types(setting)[0], value or setting.default
        with suppress(ValueError):  # the config says what it must be
            if value:
                new = (*self.cfg.stop, unescape(value)) if kind is tuple else kind(value)
        self.cfg = replace(self.cfg, **{setting.name: new})
        log(f"({name} {self.shown(setting)})")

    def shown(self, setting) -> str:
        value = getattr(self.cfg, setting.name)
        if isinstance(value, tuple):
            return " ".join(f"'{visible(text)}'" for text in value) or "none"
        return "random" if value is None else f"{value:,}"

    def do_show(self, _: str) -> None:
        """: show the settings, the model, and the seed of the last answer."""
        self.table((n, self.shown(f), f.metadata["help"]) for n, f in self.settings.items())
        log(f"model: {self.model.metadata}")
        if self.seed is not None:
            log(f"to repeat the last answer: /set seed {self.seed}, then /regen")

    def do_regen(self, _: str) -> None:
        """: answer the last prompt again."""
        self.answer(self.prompt)

    def do_more(self, _: str) -> None:
        """: continue the last answer."""
        self.answer(self.prompt + self.written, echo=False)

    def do_read(self, file: str) -> None:
        """FILE: continue the text in a file."""
        path = Path(os.path.expanduser(file.strip()))
        if not path.is_file():  # a pipe would block
            raise UserError(f"/read {file}: no such file; check the spelling")
        self.answer("".join(read_texts([(path, "utf-8")])).removesuffix("\n"))

    def do_model(self, file: str) -> None:
        """FILE: switch to another model; /regen gives it the last prompt."""
        self.model = load(os.path.expanduser(file.strip()), self.model.network.wte.weight.device)
        log(f"{file}: {self.model.metadata}")

    def do_tokens(self, text: str) -> None:
        """[TEXT]: show the ids of a text, or of the last prompt."""
        text, tokenizer = text or self.prompt, self.model.tokenizer
        mapped = [tokenizer.normalize_prompt(c)[0] for c in text]  # "" where it is dropped
        styles = [WARM[c != known] for c, known in zip(text, mapped, strict=True)]
        ids = ["+".join(map(str, tokenizer.encode(known))) or "-" for known in mapped]
        self.console.print(annotated(text, styles, [f"{i} " for i in ids], self.console.width))
        known, notice = tokenizer.normalize_prompt(text)
        counts = f"characters: {len(text):,}, ids: {len(known):,}, of 1 to {len(tokenizer) - 1:,}"
        self.console.print(f"{counts}\n{visible(notice)}".rstrip())

    def do_probs(self, text: str) -> None:
        """[TEXT]: chart the probabilities of the next character, after each active setting."""
        tokenizer, ids = self.model.tokenizer, self.model.prompt_ids(text or self.prompt)
        logits = predictions(self.model, ids, len(ids)).numpy()  # (1, V)
        columns, active = {"model": softmax(logits)[0]}, SampleConfig(temperature=1.0)  # all off
        logits[:, 0] = -np.inf  # U+FFFD is never sampled
        seen = np.isin(np.arange(logits.size), ids)[None]
        for name in ("repetition_penalty", "temperature", "top_k", "top_p", "min_p"):
            value = getattr(self.cfg, name)
            if value == getattr(active, name):
                continue
            active = replace(active, **{name: value or 1e-6})  # temperature 0 is a limit
            label = name.replace("repetition_", "").replace("temperature", "temp").replace("_", "-")
            columns[f"{label} {value:g}"] = softmax(process_logits(logits, active, seen))[0]
        bar_width = (self.console.width - 8) // len(columns) - 7  # without the numbers
        unit = bar_width / np.max([*columns.values()])  # cells for a probability of 1
        cell = lambda p, bar="": f"{100 * p:4.1f} {bar}".rstrip() if p else "   -"
        headers = [Column(name, style=COOL[1]) for name in columns]
        table = Table(Column("next", no_wrap=True), *headers, box=None, padding=(0, 1, 0, 0))
        n = max(4, min(12, self.console.height - 6))
        likeliest, others = np.split(columns["model"].argsort(kind="stable")[::-1], [n])
        for i in likeliest:
            cells = (cell(p[i], "█" * round(unit * p[i])) for p in columns.values())
            table.add_row(f"'{visible(tokenizer.characters[i])}'", *cells)
        table.add_row(f"{len(others)} more", *(cell(p[others].sum()) for p in columns.values()))
        context = visible(tokenizer.decode(ids[-20:]))
        self.console.print(f"After '{context}', in percent:", table)

    def do_why(self, text: str) -> None:
        """[TEXT]: show the surprise of each character of a text, or of the last answer."""
        prompt, answer = ("", text) if text else (self.prompt, self.written)
        answer, _ = self.model.tokenizer.normalize_prompt(answer)
        require(answer, "there is no answer yet; type a prompt")
        tokenizer, before = self.model.tokenizer, self.model.prompt_ids(prompt)
        ids, n = np.concatenate((before, tokenizer.encode(answer))).astype("i8"), len(before)
        logits = predictions(self.model, ids, n)[:-1]  # (N, V), one row per character of the answer
        bits = logits.log_softmax(-1) / -math.log(2)  # surprise is -log2 p
        surprise = bits[range(len(answer)), ids[n:]]  # (N,)
        digits = [str(min(9, round(s)) or "") for s in surprise.tolist()]
        styles = [WARM[min(3, int(s / 2))] for s in surprise.tolist()]
        mean = f"{surprise.sum():,.1f} bits, {surprise.mean():.3f} bits/char"
        self.console.print("Digit = surprise in bits: n means a 1-in-2^n chance")
        self.console.print(annotated(answer, styles, digits, self.console.width))
        self.console.print(f"characters: {len(answer):,}, {mean}; least expected:")
        for i in surprise.topk(min(3, len(answer))).indices.tolist():
            least, best = bits[i].min(-1)
            likeliest = f"('{visible(tokenizer.characters[best])}' {least:.1f})"
            line = f"'{visible(answer[i])}' {surprise[i]:.1f} bits {likeliest} after "
            context = tokenizer.decode(ids[: n + i][-max(8, self.console.width - 34) :])
            self.console.print(f"{line}'{visible(context)}'")

    def do_attn(self, numbers: str) -> None:
        """[LAYER] [HEAD]: map the attention within the last prompt (last layer, mean of heads)."""
        config, (layer, head) = self.model.network.config, [*numbers.split(), "", ""][:2]
        for name, word, last in (("layer", layer, config.n_layer), ("head", head, config.n_head)):
            if word and word not in map(str, range(1, last + 1)):
                raise UserError(f"--{name} {word}: must be from 1 to {last}")
        layer, head = int(layer or config.n_layer), int(head or 0)
        ids = self.model.prompt_ids(self.prompt)
        ids = torch.from_numpy(ids[context_start(len(ids), config.block_size) :].astype("i8"))
        weights = attention_weights(self.model.network, ids, layer - 1)  # (H, T, T)
        weights = weights[head - 1] if head else weights.mean(0)  # (T, T)
        n = min(len(ids), max(1, self.console.width // 2 - 8), max(8, self.console.height - 4))
        names = [visible(self.model.tokenizer.characters[i]) for i in ids]
        which = f"head {head} of" if head else "mean of heads:"
        lines = Text(f"Layer {layer} of {config.n_layer}, {which} {config.n_head}\n")
        lines.append("attention from: ░ 5%  ▒ 15%  ▓ 30%  █ 60%\n    ")
        lines.append("".join(set_cell_size(c, 2) for c in names[-n:]), "bold")
        for name, row in zip(names[-n:], weights[-n:], strict=True):
            lines.append(f"\n {set_cell_size(name, 2)} ", "bold")
            for level in np.digitize(row[-n:], [0.05, 0.15, 0.3, 0.6]):
                lines.append(" ░▒▓█"[level] * 2, COOL[level])
            lines.append(f" '{names[row.argmax()]}' {row.max():.0%}")
        self.console.print(lines)

    def do_quit(self, _: str) -> None:
        """: leave; so do quit, exit and Ctrl-D."""
        raise EOFError


def read_prompt() -> str:
    """A prompt from a pipe, or from a terminal that cannot move its cursor."""
    print("Prompt: ", end="", file=sys.stderr, flush=True)
    text = sys.stdin.readline()
    while is_open(text) and (line := sys.stdin.readline()):
        text += line
    if not text:
        log()
        raise EOFError
    return text.removesuffix("\n")


def prompt_reader(chat: Chat) -> Callable[[], str]:
    """Function that reads a prompt; it raises EOFError at the end, KeyboardInterrupt at Ctrl-C."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()) or os.environ.get("TERM") == "dumb":
        return read_prompt
    os.environ.setdefault("PROMPT_TOOLKIT_NO_CPR", "1")  # some terminals answer too late
    earlier, folder = None, os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    with suppress(OSError, RuntimeError):  # no home folder, or one that is read-only
        path = Path(folder, "anexa", "history").expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(0o600)  # only for the user
        earlier = history.FileHistory(path)
    words = [*(f"/set {name}" for name in chat.settings), *(f"/{name}" for name in chat.commands)]
    files = dict.fromkeys(("/read", "/model"), completion.PathCompleter(expanduser=True))
    completers = completion.WordCompleter(words, sentence=True), completion.NestedCompleter(files)
    session = prompt_toolkit.PromptSession(
        "Prompt: ",
        history=earlier,
        completer=completion.merge_completers(completers),
        complete_while_typing=False,
        complete_style=prompt_toolkit.shortcuts.CompleteStyle.READLINE_LIKE,
        multiline=Condition(lambda: bool(is_open(session.default_buffer.text))),
        enable_suspend=True,
    )
    return lambda: session.prompt().encode(errors="replace").decode()


def chat_loop(model: Model, cfg: SampleConfig) -> None:
    """The prompt loop, until `quit`, `exit` or the end of the input."""
    log("\n--- Interactive Generation ---\nEnter a prompt to continue (or 'quit' to exit)")
    chat = Chat(model, cfg)
    read = prompt_reader(chat)
    while True:
        try:
            chat.respond(read())
        except EOFError:
            return
        except KeyboardInterrupt:
            log("(quit or Ctrl-D leaves)")
        except UserError as error:
            log(f"({str(error).removeprefix('--')})")
        except OSError as error:
            if not error.filename:
                raise  # the terminal, or the reader of a pipe, has gone
            log(f"({error.filename}: {error.strerror})")


# ---- export --------------------------------------------------------------------------------------
# The same model for Hugging Face transformers, llama.cpp and the Hub.

RIGHTS = {"sherlock": "public domain", "shakespeare": "public domain", FALLBACK: "Python's"}


def optional(module: str):
    """An optional package, imported.  raises: UserError with the line that installs it"""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.split(".")[-1]
        raise UserError(f"this needs {package}: pip install {package}") from None


def without_paths(metadata: Metadata) -> Metadata:
    """Metadata to publish: names of texts without folders, passwords and queries."""
    url = r"(?s)^\w+://([^/]*@)?([^?#]*).*"
    public = lambda name: re.split(r"[/\\]", re.sub(url, r"\2", name).rstrip("/\\"))[-1]
    training, names = dict(metadata.training), map(public, metadata.data["names"])
    training["init"] = training.get("init") and public(training["init"])
    return replace(metadata, data=metadata.data | dict(names=[*names]), training=training)


def model_card(model: Model, title: str, license: str) -> str:
    """README.md for the Hub: front matter, then what a user of the model has to know."""
    hub, m, config = optional("huggingface_hub"), model.metadata, model.network.config
    text, data, loss = text_names(m.data["names"]), m.data, m.validation_loss
    bits, rights = loss / math.log(2), RIGHTS.get(text, "its own")
    sample = escape_control(model.generate("\n", max_new=400, seed=0)).strip()
    prompt = (re.findall(r"\w+", sample) or [""])[0]
    listed = lambda d: escape_control(", ".join(f"{k} {v}" for k, v in d.items()))
    indented = lambda text: "    " + text.replace("\n", "\n    ")
    result = lambda *metric: hub.EvalResult("text-generation", "text", text, *metric)
    front = hub.ModelCardData(
        model_name=title, license=license, language="en" if text in RIGHTS else None,
        library_name="transformers", pipeline_tag="text-generation", widget=[dict(text=prompt)],
        tags=["anexa", "gpt2", "character-level"],
        eval_results=[result("loss", round(loss, 4)), result("bits_per_character", round(bits, 4))],
    )  # fmt: skip
    return f"""\
---
{front.to_yaml()}
---
# {title}

A character-level GPT-2 with {config}, trained from scratch with Anexa on {text}
({data["characters"]:,} characters, SHA-256 `{data["sha256"]}`). It continues a prompt in the manner
of that text:

{indented(sample)}

It imitates one text: it knows no facts, answers no questions, and repeats the views and prejudices
of that text, sometimes its very sentences. Prompt and answer together have at most
{config.block_size:,} characters; beyond them transformers raises IndexError, and llama.cpp stops.
One token is one of {config.vocab_size:,} characters; any other is read as U+FFFD.

```python
from transformers import pipeline

write = pipeline("text-generation", model="{title}")
print(write("{prompt}", max_length={config.block_size})[0]["generated_text"])
```

With Anexa, at any length: `python anexagpt.py chat model.safetensors`

Validation loss: {loss:.4f} nats/char, {bits:.4f} bits/char, on the end of the text, which was not
trained on (these are the weights with the lowest). Training: {listed(m.training)}.

{indented(loss_chart(m.history))}

License of the weights: {license}. License of the text: {rights}.
"""


def hub_files(model: Model, title: str, license: str) -> dict[str, bytes]:
    """Content of the files that transformers loads a model from, by name."""
    if model.metadata.validation_loss is None:
        raise UserError("this run has not been evaluated yet; train it for 50 steps or more")
    model = replace(model, metadata=without_paths(model.metadata))
    config, vocab = model.network.config, {c: i for i, c in enumerate(model.tokenizer.characters)}
    # transformers stores the matrices of the blocks as (in, out), nn.Linear as (out, in).
    weights = {
        f"transformer.{name}": (w.t() if name.startswith("h.") else w).detach().contiguous()
        for name, w in model.network.named_parameters()
    }
    # Only length ends a text. An empty prompt stands for a line end, as here.
    ids = dict(bos_token_id=vocab.get("\n", 1), eos_token_id=None, pad_token_id=0)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokens = dict.fromkeys(("unk_token", "pad_token", "bos_token", "eos_token"), UNKNOWN)
    rates = dict.fromkeys(("embd_pdrop", "resid_pdrop"), config.dropout or 0.0)
    documents = {
        "generation_config.json": dict(
            do_sample=True, temperature=SampleConfig().temperature, top_k=0,
            max_length=config.block_size, suppress_tokens=[0], **ids,
        ),
        "tokenizer.json": dict(
            version="1.0", added_tokens=[dict(id=0, content=UNKNOWN, special=True, **flags)],
            model=dict(type="BPE", vocab=vocab, merges=[], unk_token=UNKNOWN),  # characters
            decoder=dict(type="Fuse"),
        ),
        "tokenizer_config.json": dict(
            tokenizer_class="PreTrainedTokenizerFast", model_max_length=config.block_size,
            padding_side="left", model_input_names=["input_ids", "attention_mask"],
            clean_up_tokenization_spaces=False, **tokens,
        ),
        "config.json": dict(
            architectures=["GPT2LMHeadModel"], model_type="gpt2", dtype="float32",
            vocab_size=config.vocab_size, n_positions=config.block_size, n_ctx=config.block_size,
            n_embd=config.n_embd, n_layer=config.n_layer, n_head=config.n_head,
            activation_function="gelu_new", layer_norm_epsilon=1e-5, tie_word_embeddings=True,
            attn_pdrop=0.0, **rates, **ids | dict(bos_token_id=None),
        ),
    }  # fmt: skip
    files = {
        MODEL: safetensors.torch.save(weights, model.metadata.to_header()),
        "README.md": model_card(model, title, license).encode(),
    }
    for name, document in documents.items():
        files[name] = json.dumps(document, indent=2, ensure_ascii=False).encode()
    return files


def write_gguf(path: Path, model: Model, half: bool) -> None:
    """Write the model for llama.cpp; `half`: matrices in float16."""
    gguf, config = optional("gguf"), model.network.config
    # GPT-2 spells each byte as one visible character; those without one count up from U+0100.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    spelling = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    tokens = ["".join(spelling[byte] for byte in c.encode()) for c in model.tokenizer.characters]
    kind = gguf.TokenType
    entries = dict(
        name=path.stem, description=f"Anexa {__version__}", context_length=config.block_size,
        embedding_length=config.n_embd, feed_forward_length=4 * config.n_embd,
        block_count=config.n_layer, head_count=config.n_head, layer_norm_eps=1e-5,
        file_type=gguf.LlamaFileType.MOSTLY_F16 if half else gguf.LlamaFileType.ALL_F32,
        tokenizer_model="gpt2", tokenizer_pre="gpt-2", token_list=tokens,
        token_types=[kind.CONTROL] + [kind.NORMAL] * (len(tokens) - 1),
        # A character of several bytes is merged from them, one byte at a time.
        token_merges=[*{f"{t[:i]} {t[i]}": 0 for t in tokens for i in range(1, len(t))}],
        # Without an end token llama.cpp would take id 11, an ordinary letter.
        bos_token_id=0, eos_token_id=0, unk_token_id=0, add_bos_token=False,
    )  # fmt: skip
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, config.n_layer)
    with atomic_write(path) as file:
        writer = gguf.GGUFWriter(file.name, "gpt2")
        for name, value in entries.items():
            getattr(writer, f"add_{name}")(value)
        for name, weight in model.network.named_parameters():
            full = not half or weight.dim() == 1 or name.startswith("wpe")
            weight = weight.detach().to(torch.float if full else torch.half)
            writer.add_tensor(names.get_name(name, (".weight", ".bias")), weight.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


# ---- runs ----------------------------------------------------------------------------------------
# A run is known by its --out. Where that file exists, the run is finished: nothing trains over it.
# Else the checkpoint beside it is resumed, with the settings and the text it has; else the run is
# new. With --restart it is new in any case: the model gets another name, the checkpoint goes.

NEW_RUN = Metadata(config={}, data=dict(names=[]), training={}, history=[])  # step 0


def config_diff(args: argparse.Namespace, saved: dict, *may_change: str) -> str:
    """Options that ask for something else than the settings `saved`; "" if none."""
    wanted, free = vars(args), ("device", "dtype", "grad_accum", "checkpoint_interval", *may_change)
    names = [n for n, v in wanted.items() if n in saved and n not in free and v != saved[n]]
    return ", ".join(f"--{n.replace('_', '-')} {saved[n]}, not {wanted[n]}" for n in names)


def find_checkpoint(args) -> tuple[Metadata, dict[str, Tensor]]:
    """The unfinished run to resume, or NEW_RUN.  raises: UserError if it must not begin"""
    out, checkpoint, m, tensors = args.out, args.checkpoint, NEW_RUN, {}
    if os.path.lexists(checkpoint):  # even with --restart, which removes it
        fix = "move it away, or choose another --out"
        m, tensors = read_file(checkpoint, fix)
        require("loss_sum" in tensors, f"{checkpoint}: is a model, not a checkpoint; {fix}")
    if args.restart:
        return NEW_RUN, {}
    if out.exists():
        done, _ = read_file(out)
        diff = config_diff(args, done.config | done.training)
        run = f"{text_names(done.data['names'])}, {done.step:,} steps{diff and f' ({diff})'}"
        fix = f"Keep it: add --out FILE. Start anew: --restart. Train on: --init {out} --out FILE"
        fix += f". Resume {checkpoint}: move the model away" if m.step else ""
        raise UserError(f"{out}: is already trained on {run}. {fix}")
    if diff := config_diff(args, m.config | m.training, "max_steps"):
        fix = "to resume, drop these options; to discard it, add --restart"
        raise UserError(f"{checkpoint}: is at step {m.step:,} with {diff}; {fix}")
    return m, tensors


def saved_names(metadata: Metadata) -> list[str]:
    """Names of the texts in the metadata of an untrusted file.  raises: UserError"""
    for name in metadata.data["names"]:
        is_remote = re.match(r"(?i)https?://|[\\/]{2}", name)  # \\PC\FILE is a network path
        if is_remote or not (name in BUILT_IN or os.path.exists(name)):
            raise UserError(f"its text {text_names([name])} is not here; name it with --data")
    return metadata.data["names"]


def initial_weights(model: Model, characters: str) -> dict[str, Tensor]:
    """Weights of `model` for another vocabulary: new characters get the mean embedding."""
    rows = torch.from_numpy(model.tokenizer.encode(characters).astype("i8"))  # (V,), 0 if new
    wte = model.network.wte.weight.detach()
    embeddings = wte[rows]  # (V, C)
    embeddings[1:][rows[1:] == 0] = wte[1:].mean(dim=0)
    return model.network.state_dict() | {"wte.weight": embeddings}


def prepare_run(args, device, dtype, ctx) -> Trainer:
    """Trainer of a new run, or of the unfinished one.  raises: UserError

    A setting comes from the options, else from the unfinished run, else from the model of --init.
    """
    m, tensors = find_checkpoint(args)
    if args.dtype == "auto" and m.step:  # the number format of the run
        _, dtype = select_device(device.type, str(m.training.get("dtype")))
    cfg = TrainConfig.pick(m.training | vars(args))
    if m.step >= cfg.max_steps:
        raise UserError(f"--max-steps {cfg.max_steps:,}: step {m.step:,} is done; choose more")
    init = load(cfg.init) if cfg.init and not m.step else None
    shape = init.metadata.config if init else m.config
    if init and (diff := config_diff(args, shape, "dropout")):
        raise UserError(f"--init {cfg.init}: is a model with {diff}; drop these options")
    config = GPTConfig.pick(shape | vars(args))
    cfg = replace(cfg, batch_size=cfg.batch_size or (6 if device.type == "cpu" else 16))
    if cfg.batch_size < ctx.world_size:
        raise UserError(f"--batch-size {cfg.batch_size}: must be at least {ctx.world_size} (ranks)")
    corpus = load_corpus(args.data or saved_names(m), args.encoding)
    data, needed = text_names(corpus.data["names"]), 10 * config.block_size + 10
    n = np.count_nonzero(corpus.ids)  # without U+FFFD
    fix = f"training needs {needed:,}, 10 windows; take a longer text or a smaller --block-size"
    require(n >= needed, f"--data {data}: {n:,} characters, but {fix}")
    if m.step and corpus.data["sha256"] != m.data["sha256"]:
        raise UserError(f"--data {data}: not the text of the run; give that, or add --restart")
    trainer = Trainer(config, cfg, corpus, device, dtype, ctx)
    fix = "save it again, or give its real --encoding"
    is_text = trainer.train_ids[1:].any() and trainer.val_ids[1:].any()
    require(is_text, f"--data {data}: U+FFFD, the mark of broken characters, all over; {fix}")
    if init:
        for network in (trainer.model, trainer.ema):
            network.load_state_dict(initial_weights(init, corpus.tokenizer.characters))
    if m.step:
        with reading_model(args.checkpoint, "use --restart"):
            trainer.load_state_dict(tensors, m)
    return trainer


def log_run(t: Trainer) -> None:
    """Log text, network, device and schedule."""
    cfg, config, m, n = t.cfg, t.model.config, t.metadata(), len(t.corpus.ids)
    if n < 100_000:
        log(f"NOTE: {n:,} characters are few: expect scraps of words, not sentences.")
    log(
        f"{text_names(m.data['names'])}: {n:,} characters, {len(m.characters) - 1} different; "
        f"{config}{f' of {cfg.init}' if cfg.init else ''} on {t.device.type} in "
        f"{m.training['dtype']}, processes: {t.ctx.world_size}; {cfg.max_steps:,} steps of "
        f"{cfg.batch_size:,} x {config.block_size:,} characters, {t.epochs:,.1f} epochs, dropout "
        f"{config.dropout}; validation on {len(t.val_ids):,} of {n - len(t.train_ids):,} characters"
    )


def cmd_train(args: argparse.Namespace) -> None:
    out, (device, dtype) = args.out, select_device(args.device, args.dtype)
    if out.suffix != ".safetensors" or out.is_dir():
        raise UserError(f"--out {out}: must be a file ending in .safetensors; choose another name")
    args.checkpoint = out.with_name(out.name + CHECKPOINT_SUFFIX)  # a name that no model can have
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and args.checkpoint.exists():
        args.restart = False  # asked for once, not at each restart after a failure
    with init_distributed(device) as ctx, ExitStack() as stack:
        try:
            if ctx.rank == 0:
                lock = out.with_name(f".{out.name}.lock")
                # The file stays: if it went, a second process could lock another one of its name.
                stack.enter_context(filelock.FileLock(lock, timeout=0, mode=0o666))
        except OSError as error:  # a Timeout is one; also where the folder is read-only
            reason = error.strerror or "another process trains it, or no file can be made there"
            fix = "wait, or choose another folder"
            raise UserError(f"--out {out}: cannot be written ({reason}); {fix}") from None
        t = ctx.together(lambda: prepare_run(args, device, dtype, ctx))
        digest = torch.tensor(zlib.crc32(repr(t.metadata()).encode()))
        are_equal = ctx.all_reduce(digest.clone()) == ctx.world_size * digest
        require(are_equal, "torchrun: the ranks differ in options, text or checkpoint")
        run_training(args, t)


def run_training(args, t: Trainer) -> None:
    """Train, and save the model; or save a checkpoint, if a signal asks for it."""
    out, checkpoint, is_first = args.out, args.checkpoint, t.ctx.rank == 0
    quiet = args.quiet or not is_first

    def save_checkpoint(stop: bool) -> None:
        if is_first:
            try:
                header = t.metadata().to_header("checkpoint")
                save_tensors(checkpoint, t.state_dict(), header, rescue=stop)
            except OSError as error:
                if stop:
                    raise
                log(f"NOTE: {checkpoint}: not saved ({error.strerror or error}); going on")

    board = None
    if args.tensorboard and is_first:
        writer = optional("torch.utils.tensorboard").SummaryWriter
        board = writer(args.tensorboard, purge_step=t.step + 1 if t.step else None)
    if t.step:
        log(f"Resuming {checkpoint} at step {t.step:,}.")
    elif is_first:
        if out.exists():  # --restart
            names = (out.with_stem(f"{out.stem}.old{i or ''}") for i in range(10**6))
            old = out.rename(next(name for name in names if not name.exists()))
            log(f"{out}: renamed to {old}")
        checkpoint.unlink(missing_ok=True)  # else a crash before the first save would revive it
    if not quiet:
        log_run(t)
    with suppress(AttributeError, OSError, TypeError):  # glibc: 5 to 20% of a step on a CPU
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: a freed tensor's pages are reused, not returned
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the same for the end of the heap
    with stop_signals() as caught:
        with closing(ProgressDisplay(t, quiet, board)) as display:
            training_loop(t, display, save_checkpoint, lambda: bool(caught))
        finished = t.step == t.cfg.max_steps
        if finished and is_first:
            if t.best_loss < min(row[2] for row in t.history) - 1e-6:  # which is rounded
                log("NOTE: training did not improve on --init, whose weights are saved.")
            if not quiet:
                hint = " At the prompt, /help lists commands." * (args.command == "run")
                log(f"{loss_chart(t.history)}\n{t.metadata()}.{hint}")
            log("Training finished...")
            save_tensors(out, t.best, t.metadata().to_header(), rescue=True)
            checkpoint.unlink(missing_ok=True)
            log(f"Model saved to {out}")
    if not finished:
        log(f"Stopped at step {t.step:,}, saved in {checkpoint}.")
        log(f"The same command{' without --restart' * args.restart} resumes it.")
    if caught or not finished:
        raise SystemExit(128 + (caught or [signal.SIGINT])[0])


# ---- command line --------------------------------------------------------------------------------

unescape = lambda text: text.replace("\\n", "\n")
SIZES = {  # --size: 0.8 M, 10.8 M and 86 M parameters
    "small": dict(n_layer=4, n_head=4, n_embd=128, block_size=256),
    "medium": dict(n_layer=6, n_head=6, n_embd=384, block_size=256),
    "large": dict(n_layer=12, n_head=12, n_embd=768, block_size=1024),
}
FILE = dict(type=Path, metavar="FILE")
TEXTS = f"{', '.join(BUILT_IN)}, files, folders of *.txt and *.md, URLs, - for stdin"
ARGUMENTS = (  # commands, option, keywords of add_argument; add_config adds the config fields
    ("generate explain", "prompt", dict(help="text to continue, or to show")),
    ("push", "name", dict(metavar="USER/NAME", help="name of the model on the Hub")),
    ("run train", "files", dict(nargs="*", metavar="TEXT", help="as --data")),
    ("chat generate explain info push", "files",
     dict(nargs="*", metavar="MODEL", help="as --model")),
    ("eval", "files", dict(nargs="*", metavar="FILE", help="as --data or --model")),
    ("export", "files", dict(nargs="*", metavar="FILE", help="model, folder for transformers")),
    ("run train eval", "--data", dict(nargs="+", default=[], metavar="TEXT", help=TEXTS)),
    ("run train eval", "--encoding", dict(default="utf-8", metavar="NAME", help="of text files")),
    ("run train", "--out", dict(default=Path(MODEL), **FILE, help="model file to write")),
    ("run train", "--size", dict(choices=SIZES, help="0.8, 10.8 or 86 M parameters")),
    ("run train", "--restart", dict(action="store_true", help="start anew; a model is renamed")),
    ("run train", "--quiet", dict(action="store_true", help="no progress")),
    ("run train", "--tensorboard", dict(type=Path, metavar="DIR", help="write losses and speed")),
    ("chat generate explain eval info export push", "--model",
     dict(default=Path(MODEL), **FILE, help="model file or checkpoint")),
    ("run train chat generate explain eval", "--device",
     dict(default="auto", choices=("auto", "cuda", "mps", "cpu"), help="default: GPU, else CPU")),
    ("run train eval", "--dtype",
     dict(default="auto", choices=("auto", "float32", "bfloat16"), help="default: by the device")),
    ("generate", "-k --samples", dict(type=int, default=1, metavar="N", help="texts to write")),
    ("explain", "--view", dict(action="append", choices=VIEWS, help="may be repeated")),
    ("explain", "--layer", dict(default="", metavar="N", help="of attn (default: the last)")),
    ("explain", "--head", dict(default="", metavar="N", help="of attn (default: mean of all)")),
    ("info", "--json", dict(action="store_true", help="everything, with the loss history")),
    ("export", "--gguf", dict(**FILE, help="file for llama.cpp")),
    ("export", "--f16", dict(action="store_true", help="float16 matrices in the GGUF file")),
    ("export", "--force", dict(action="store_true", help="replace existing files")),
    ("export push", "--license", dict(default="unknown", metavar="ID", help="of the weights")),
    ("push", "--private", dict(action="store_true", help="visible only to you")),
)  # fmt: skip


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {escape_control(message)} (see {self.prog} --help)\n")

    def add_config(self, config: type, skip: Iterable[str] = ()) -> None:
        """Add an option for each field of a config; an option that is not given stays absent."""
        group = self.add_argument_group(config.__doc__.split("\n")[0].rstrip("."))
        for setting in fields(config):
            name, help, kind = setting.name, setting.metadata["help"], field_types(setting)[0]
            if not help or name in skip:
                continue
            if setting.default not in (None, ()):
                help += f" (default: {setting.default})"
            kwargs = dict(type=unescape, action="append") if kind is tuple else dict(type=kind)
            kwargs["metavar"] = {int: "N", float: "X", tuple: "TEXT", str: "FILE"}[kind]
            flags = [f"--{name.replace('_', '-')}"] + ["-n"] * (name == "max_new")
            group.add_argument(*flags, default=argparse.SUPPRESS, help=help, **kwargs)


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The command line as a namespace; exits after --help, --version and errors."""
    commands = dict(re.findall(r"^  ([a-z]+)  +(.*)", __doc__, re.MULTILINE))
    named, models = bool(argv) and argv[0] in commands, (".safetensors", CHECKPOINT_SUFFIX)
    command, *argv = argv if named else ["run", *argv]
    if command == "run" and argv and argv[0].endswith(models):
        command = "chat"
    parser = Parser(f"anexagpt.py {command}", description=commands[command], allow_abbrev=False)
    parser.formatter_class = lambda prog: argparse.HelpFormatter(prog, max_help_position=34)
    parser.set_defaults(command=command, size=None, folder=None)
    parser.add_argument("--version", action="version", version=f"Anexa {__version__}")
    for names, options, kwargs in ARGUMENTS:
        if command in names.split():
            parser.add_argument(*options.split(), **kwargs)
    if command in ("run", "train"):
        parser.add_config(GPTConfig)
        parser.add_config(TrainConfig)
    if command in ("run", "chat", "generate", "explain"):
        skip = dict(run=["seed"], explain=["seed", "max_new", "stop"])
        parser.add_config(SampleConfig, skip.get(command, ()))
    args = parser.parse_intermixed_args(argv)
    vars(args).update(SIZES.get(args.size, {}) | vars(args))  # --size stands for four options
    for file in args.files:
        if "model" in args and (file.endswith(models) or command in ("chat", "info")):
            args.model = Path(file)
        elif not (named or file in (*BUILT_IN, "-") or "." in file or os.path.exists(file)):
            parser.error(f"{file!r} is neither a command ({', '.join(commands)}) nor a text file")
        elif "data" in args:
            args.data = [*args.data, file]
        elif command == "export" and file.endswith(".gguf"):
            args.gguf = Path(file)
        elif command == "export" and not args.folder:
            args.folder = Path(file)
        else:
            fix = "A text file: --data X. A model: --model X. Quote a prompt that has spaces."
            parser.error(f"unexpected argument {file!r}. {fix}")
    return args


def select_device(device: str, dtype: str = "auto") -> tuple[torch.device, torch.dtype]:
    """Device and number format of --device and --dtype.  raises: UserError if it is missing"""
    cuda, mps, cpu = torch.cuda, torch.backends.mps, torch.cpu
    usable = ["cuda"] * cuda.is_available() + ["mps"] * mps.is_available() + ["cpu"]
    device = usable[0] if device == "auto" else device
    if device not in usable:
        raise UserError(f"--device {device}: not found by PyTorch; choose {' or '.join(usable)}")
    bf16 = dtype == "bfloat16"
    if dtype == "auto" and device == "cuda":
        bf16 = cuda.is_bf16_supported(including_emulation=False)
    elif dtype == "auto" and device == "cpu":
        bf16 = cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported()
    return torch.device(device), torch.bfloat16 if bf16 else torch.float32


def load_from_args(args: argparse.Namespace, one_text: bool = True) -> Model:
    """The model of --model on the device of --device."""
    model, (device, _) = load(args.model), select_device(args.device)
    m, small = model.metadata, model.network.config.n_parameters() < 4_000_000
    if one_text and small and args.device in ("auto", "cpu"):
        torch.set_num_threads(1)  # a second thread is no faster for one token, and slow under load
    else:
        model.network.to(device)
    if m.step < m.training.get("max_steps", 0):
        log(f"{args.model}: an unfinished run, at step {m.step:,}; its best weights")
    return model


def cmd_run(args: argparse.Namespace) -> None:
    sampling = replace(SampleConfig.pick(vars(args)), seed=None)  # --seed is that of the training
    if "WORLD_SIZE" in os.environ:
        raise UserError("torchrun: several processes can train but not chat; use the command train")
    args.model = args.out
    m = read_file(args.out)[0] if args.out.exists() and not args.restart else NEW_RUN
    differs = config_diff(args, m.config | m.training) or args.data not in ([], m.data["names"])
    if differs or m is NEW_RUN:
        cmd_train(args)  # which refuses to train over a finished model
    else:
        log(f"{args.out}: {m}. /help lists the commands.")
    chat_loop(load_from_args(args), sampling)


def cmd_chat(args: argparse.Namespace) -> None:
    sampling, model = SampleConfig.pick(vars(args)), load_from_args(args)
    log(f"{args.model}: {model.metadata}. /help lists the commands.")
    chat_loop(model, sampling)


def cmd_generate(args: argparse.Namespace) -> None:
    cfg, n = SampleConfig.pick(vars(args)), args.samples
    require(1 <= n <= 10_000, f"--samples {n:,}: must be from 1 to 10,000")
    model = load_from_args(args, one_text=n == 1)
    prompt = normalized(model, args.prompt)
    if n == 1:
        write_stdout(prompt)
        for (piece,) in model.stream_batch(prompt, cfg):
            write_stdout(piece)
        return write_stdout("\n")
    for first in range(0, n, 64):  # more at once would fill the memory with keys and values
        pieces = model.stream_batch(prompt, cfg, range(first, min(n, first + 64)))
        for text in map("".join, zip(*pieces, strict=True)):
            write_stdout(f"{prompt}{text}\n{'-' * 40}\n")


def cmd_explain(args: argparse.Namespace) -> None:
    chat = Chat(load_from_args(args), SampleConfig.pick(vars(args)))
    chat.prompt, chat.console = args.prompt, PlainConsole(stderr=False)
    known, _ = chat.model.tokenizer.normalize_prompt(args.prompt)
    require(known, f"{args.prompt!r}: no character that the model knows; give another text")
    layer = args.layer or chat.model.network.config.n_layer
    arguments = dict(why=args.prompt, attn=f"{layer} {args.head}")
    with chat.console.capture() as views:  # so that an error comes before all of them
        for i, view in enumerate(args.view or VIEWS):
            if i:
                chat.console.print()
            chat.commands[view](arguments.get(view, ""))
    print(end=views.get(), flush=True)


def cmd_eval(args: argparse.Namespace) -> None:
    model, (_, dtype) = load_from_args(args, one_text=False), select_device(args.device, args.dtype)
    corpus = load_corpus(args.data or saved_names(model.metadata), args.encoding)
    name, part, ids = text_names(corpus.data["names"]), "whole text", corpus.ids
    if corpus.data["sha256"] == model.metadata.data["sha256"]:
        part, ids = "validation part", split_ids(ids)[1]
    ids = model.tokenizer.encode(corpus.tokenizer.characters)[ids]  # the model's ids
    log(f"Evaluating on {name}, {part}: {len(ids):,} characters ...")
    loss, n = evaluate(model.network, ids, dtype)
    losses = f"{loss:.4f} nats/char, {loss / math.log(2):.4f} bits/char"
    perplexity = math.exp(min(loss, 700))
    print(f"{name}, {part}: {losses}, perplexity {perplexity:.3f}, over {n:,} characters")
    if n_unknown := np.count_nonzero(ids == 0):
        log(f"(left out, since the model does not know them: {n_unknown:,})")


def cmd_info(args: argparse.Namespace) -> None:
    m, tensors = read_file(args.model)
    if args.json:
        return print(json.dumps(asdict(m)))
    listed = lambda d: ", ".join(f"{k} {v}" for k, v in d.items() if v is not None)
    data, names = m.data, text_names(m.data["names"])
    rows = {
        "checkpoint" if "loss_sum" in tensors else "model": f"{args.model}, {m}",
        "network": f"{GPTConfig(**m.config).n_parameters():,} parameters: {listed(m.config)}",
        "characters": f"{len(m.characters) - 1:,}: {visible(m.characters[1:201])}",
        "data": f"{names}, {data['characters']:,} characters, SHA-256 {data['sha256']}",
        "training": listed(m.training),
    }
    for name, text in rows.items():
        print(f"{name:<12}{text_names([text])}")
    print(loss_chart(m.history))


def cmd_export(args: argparse.Namespace) -> None:
    folder, path = args.folder, args.gguf
    require(folder or path, "give a folder for transformers, --gguf FILE, or both")
    require(path or not args.f16, "--f16: is for the GGUF file; add --gguf FILE")
    for p in filter(None, (folder, path)):
        if not args.force and (any(p.iterdir()) if p.is_dir() else p.exists()):
            raise UserError(f"{p}: exists; choose another name, or add --force")
        if p.resolve() in (args.model.resolve(), args.model.resolve().parent):
            raise UserError(f"{p}: is or has the model itself; choose another name")
    model = load(args.model)
    if folder:
        files = hub_files(model, folder.resolve().name, args.license)
        for name, content in files.items():
            with atomic_write(folder / name) as file:
                file.write(content)
        log(f"Written to {folder}: {', '.join(files)}")
    if path:
        write_gguf(path, model, args.f16)
        log(f"Written to {path}, {path.stat().st_size:,} bytes")


def cmd_push(args: argparse.Namespace) -> None:
    hub, name = optional("huggingface_hub"), args.name
    try:
        if not hub.get_token():  # never an option: other users see the command line
            raise UserError(f"{name}: not logged in to the Hub; 'hf auth login', or set HF_TOKEN")
        model, api = load(args.model), hub.HfApi()
        name = api.create_repo(name, private=args.private, exist_ok=True).repo_id
        if args.private and not api.model_info(name).private:
            fix = "make it private, or push to another name"
            raise UserError(f"{name}: exists and is public; {fix}")
        files = hub_files(model, name, args.license)
        log(f"Uploading {len(files)} files, {sum(map(len, files.values())):,} bytes, to {name} ...")
        commit = [hub.CommitOperationAdd(path, content) for path, content in files.items()]
        api.create_commit(name, commit, commit_message=f"Upload with Anexa {__version__}")
        print(f"{hub.constants.ENDPOINT}/{name}")
    except (hub.errors.HTTPError, OSError, ValueError) as error:
        fix = "check name and connection, or 'hf auth login' with a token that may write there"
        raise UserError(f"{name}: not uploaded: {first_line(error)}; {fix}") from None


def prepare_streams() -> None:
    """Replace closed standard streams, and never fail on a character that a stream lacks."""
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        mode, errors = ("w", "backslashreplace") if fd else ("r", "replace")
        stream = getattr(sys, name) or os.fdopen(os.open(os.devnull, os.O_RDWR), mode)
        encoding = stream.encoding if stream.isatty() or not fd else "utf-8"
        stream.reconfigure(encoding=encoding, errors=errors)
        setattr(sys, name, stream)


def main(argv: list[str]) -> int:
    """Run a command: 0, 2 after an error that the user can fix, 130 after Ctrl-C."""
    try:
        prepare_streams()
        args = parse_args(argv)
        globals()[f"cmd_{args.command}"](args)
        return 0
    except BrokenPipeError:  # stdout was closed, for example by head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except UserError as error:
        message = error
    except OSError as error:
        message = f"{error.filename or 'system'}: {error.strerror or error}"
    except (MemoryError, RuntimeError) as error:
        # PyTorch's CPU allocator raises RuntimeError, with other words on Windows.
        words = "MemoryError|out of memory|can't allocate memory|not enough memory|bad_alloc"
        if re.search(words, repr(error)):
            fix = "a smaller --batch-size, --block-size or model; --grad-accum 2 keeps the result"
            message = f"out of memory; take {fix}"
        elif re.search("(?i)gloo|nccl|c10d", str(error)):
            message = "a rank has ended; the same command resumes from the last checkpoint"
        else:
            raise
    log(f"anexagpt.py: {message}")
    return 2


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main(sys.argv[1:]))
