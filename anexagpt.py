#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch==2.13.0", "safetensors==0.8.0", "packaging==26.3", "requests==2.34.2",
#     "urllib3==2.8.0", "charset-normalizer==3.5.3", "rich==15.0.0", "filelock==4.2.11",
#     "numpy==2.2.6; python_version < '3.11'", "numpy==2.4.6; python_version >= '3.11'",
#     "prompt_toolkit==3.0.53",
# ]
# ///
"""Anexa: a small GPT that you train in minutes, own, and talk to in your terminal.

    python anexagpt.py            train on Sherlock Holmes, then chat
    python anexagpt.py --help     all commands

In Python:

    import anexagpt

    model = anexagpt.train("diary.txt", out="me.safetensors")
    print(model.generate("It was a", max_new=200))

The file reads from top to bottom. The first part is a complete GPT on its own:

    config        one line per setting: type, default, help, limits
    tokenizer     characters to ids and back
    network       GPT-2's decoder, with an optional KV cache
    optimizer     learning rate, Muon, the average of the weights
    training      batches, loss, evaluation, Trainer.step() and Trainer.fit()
    generation    sampling settings, generate() without a cache, prefill() and decode() with one
    Model         network, tokenizer and metadata: what a user holds

The second part connects it to the world:

    prompts       replacing characters that a vocabulary lacks with the nearest it has
    fast paths    faster versions of three plain functions above; --plain switches them off
    distributed   several processes, each computing a part of every batch: torchrun
    files         writing a file safely; load(), for files that may be foreign or damaged
    text sources  built-in texts, files, folders, URLs
    terminal      messages, live progress, loss chart
    library       train(): starting or resuming a run, with its files
    chat          the prompt loop and its views
    export        Hugging Face transformers, llama.cpp, the Hub
    command line  options and commands

Shapes: B batch, T time (characters in a window), C channels (n_embd), H heads, D = C / H channels
per head, S positions that a query may attend to, V vocab_size, L layers (n_layer), N any other
number, such as the characters of a text or the matrices in a stack.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import secrets
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, get_args, get_type_hints

if sys.version_info < (3, 10):  # noqa: UP036
    sys.exit("anexagpt.py: this is Python {}.{}; 3.10 is needed".format(*sys.version_info))

if __name__ == "__main__":  # before PyTorch, whose import takes a second
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # Ctrl-C during the imports

INSTALL = "install with: pip install -r requirements.txt"
try:
    import numpy as np
    import safetensors.torch
    import torch
    from numpy import ndarray
    from packaging.version import Version
    from torch import Tensor, nn
    from torch.nn import functional as F

    if Version(torch.__version__) < Version("2.9"):
        raise ImportError(f"PyTorch {torch.__version__}, but 2.9 or later is needed")
except ImportError as error:
    if __name__ != "__main__":
        raise
    sys.exit(f"anexagpt.py: {error}; {INSTALL}")

__version__ = "1.0.0"


# ---- config --------------------------------------------------------------------------------------
# Each setting is one line: type, default, help, limits. Options, checks and model files use it.


class UserError(Exception):
    """An error that the user can fix: the message gives the value, the rule and what to do.

    A message spells a setting as in Python and puts it in backquotes: `max_steps` or `max_steps=0`.
    The command line prints these as --max-steps and --max-steps 0.
    """


def require(condition, message: str) -> None:
    """raises: UserError with `message` unless `condition` is true"""
    if not condition:
        raise UserError(message)


def spell_out(c: str) -> str:
    r"""A character as an escape sequence: \n or \u200b."""
    return c.encode("unicode_escape", "surrogatepass").decode()


def printable(text: str) -> str:
    """`text` with line ends and other invisible characters spelled out."""
    return "".join(c if c.isprintable() else spell_out(c) for c in text)


def option(default, help=None, low=None, high=None):
    """Dataclass field with limits; a field with a help text is also a command-line option."""
    return field(default=default, metadata={"help": help, "low": low, "high": high})


def field_types(config: type, name: str) -> tuple[type, ...]:
    """Types that a field allows: (int, NoneType) for `int | None`."""
    hint = get_type_hints(config)[name]
    return get_args(hint) or (hint,)


TYPE_NAMES = {int: "a whole number", float: "a number", str: "a string", tuple: "several strings"}


class Config:
    """Base class of the config dataclasses: checks each value, wherever it comes from."""

    def __post_init__(self):
        for setting in fields(self):
            value = self.check(setting.name, getattr(self, setting.name))
            object.__setattr__(self, setting.name, value)  # the dataclass is frozen

    @classmethod
    def check(cls, name: str, value):
        """`value`, if it has the type of the field and is within its limits.  raises: UserError"""
        if isinstance(value, np.generic):  # for example from np.arange
            value = value.item()
        limits = cls.__dataclass_fields__[name].metadata
        low, high = limits["low"], limits["high"]
        types = field_types(cls, name)
        rule = TYPE_NAMES[types[0]]
        if float in types:
            types += (int,)
        is_valid = isinstance(value, types) and not isinstance(value, bool)
        if low is not None:
            rule += f" from {low:,} to {high:,}"
            is_valid = is_valid and (value is None or low <= value <= high)
        shown = printable(repr(value))[:60]  # it may come from a file
        require(is_valid, f"`{name}={shown}`: must be {rule}")
        return value

    @classmethod
    def pick(cls, settings: dict) -> Config:
        """Config from the `settings` that are its fields; its other fields keep their defaults."""
        names = {setting.name for setting in fields(cls)}
        return cls(**{name: value for name, value in settings.items() if name in names})


@dataclass(frozen=True)
class GPTConfig(Config):
    """Shape of the network; part of every model file."""

    vocab_size: int = option(2, None, 2, 65_536)  # determined by the text
    block_size: int = option(256, "context length in characters (T)", 2, 4_096)
    n_layer: int = option(4, "transformer blocks (L)", 1, 128)
    n_head: int = option(4, "attention heads per block (H)", 1, 1_000)
    n_embd: int = option(128, "channels, a multiple of the heads (C)", 1, 65_536)
    dropout: float = option(0.0, None, 0.0, 0.9)  # see TrainConfig

    def __post_init__(self):
        super().__post_init__()
        if self.n_embd % self.n_head:
            fix = f"the next is {math.ceil(self.n_embd / self.n_head) * self.n_head:,}"
            raise UserError(f"`n_embd={self.n_embd}`: must be a multiple of `n_head`; {fix}")

    def n_parameters(self) -> int:
        """Number of weights: two embeddings, 12 C^2 + 13 C per block, and the last LayerNorm."""
        C = self.n_embd
        per_block = 12 * C * C + 13 * C
        return (self.vocab_size + self.block_size + 2) * C + self.n_layer * per_block

    def size(self) -> str:
        n = self.n_parameters()
        return f"{n / 1e6:,.1f} M parameters" if n >= 100_000 else f"{n:,} parameters"


@dataclass(frozen=True)
class TrainConfig(Config):
    """How a model is trained; part of every model file. `resolve` gives each None a value."""

    max_steps: int = option(5_000, "optimizer steps", 1, 100_000_000)
    batch_size: int | None = option(None, "windows per step (depends on the device)", 1, 100_000)
    grad_accum: int = option(1, "micro-batches per step: less memory, same batch", 1, 100_000)
    muon_learning_rate: float | None = option(
        None, "peak rate of Muon: matrices of the blocks (default: depends on the batch)", 0.0, 10.0
    )
    learning_rate: float | None = option(
        None, "peak rate of AdamW: all other weights (default: depends on the channels)", 0.0, 10.0
    )
    weight_decay: float = option(0.1, "decoupled weight decay of Muon's matrices", 0.0, 10.0)
    warmup_steps: int = option(50, "linear warm-up, at most a tenth of the run", 0, 100_000_000)
    dropout: float | None = option(None, "dropout rate (default: depends on the epochs)", 0.0, 0.9)
    logit_scale: float | None = option(None, None, 0.1, 10.0)
    eval_interval: int = option(250, "steps between evaluations", 1, 100_000_000)
    checkpoint_interval: float = option(60.0, "minimum seconds between checkpoints", 0.0, 1e9)
    seed: int = option(1337, "seed of initial weights, data order, dropout", 0, 2**63 - 1)
    init: str | None = option(None, "model file to fine-tune")


def default_dropout(epochs: float) -> float:
    """Dropout rate, higher for more epochs: a text that is repeated often is memorized sooner."""
    if epochs < 25:
        return 0.0
    return 0.1 if epochs < 80 else 0.2


def resolve(
    cfg: TrainConfig, config: GPTConfig, n_chars: int, device: str, dtype: torch.dtype
) -> TrainConfig:
    """`cfg` with a value for each None.

    These values depend on the network, the length of the run, the number of characters to train
    on, the device ("cpu", "cuda", "mps") and the dtype of the matrix products. They are
    chosen once, when the run begins, and saved with it.
    """
    batch_size = cfg.batch_size
    if batch_size is None:
        if device != "cpu":
            batch_size = 16
        elif dtype == torch.bfloat16:
            batch_size = 6
        else:  # as on most laptops, where a step with more windows takes longer
            batch_size = 4
    muon_learning_rate = cfg.muon_learning_rate
    if muon_learning_rate is None:
        # Fewer windows make the gradient noisier. The square root rule is from Malladi et al.
        # 2022, "On the SDEs and Scaling Rules for Adaptive Gradient Algorithms", for Adam.
        muon_learning_rate = round(0.02 * min(1.0, batch_size / 6) ** 0.5, 4)
    learning_rate = cfg.learning_rate
    if learning_rate is None:
        # A dot product adds up one change per channel, so it changes at most in proportion to the
        # number of channels. With 384 channels, half the rate worked better than the full rate;
        # the square root comes close to that.
        learning_rate = round(6e-3 * min(1.0, 128 / config.n_embd) ** 0.5, 4)
    epochs = cfg.max_steps * batch_size * config.block_size / n_chars
    dropout = default_dropout(epochs) if cfg.dropout is None else cfg.dropout
    logit_scale = cfg.logit_scale
    if logit_scale is None:
        # Multiplies the logits, in training only, to prevent overconfidence on a repeated text:
        # without it, the validation loss would be lowest at a temperature of 1.15.
        logit_scale = 1.0 if epochs < 4 else 1.15
    return replace(
        cfg,
        batch_size=batch_size,
        muon_learning_rate=muon_learning_rate,
        learning_rate=learning_rate,
        dropout=dropout,
        logit_scale=logit_scale,
    )


# ---- tokenizer -----------------------------------------------------------------------------------
# One token is one character; its id is its rank among the sorted characters of the text.

UNKNOWN = "\ufffd"  # id 0: any character that the vocabulary lacks; never sampled


def build_vocab(characters: Iterable[str]) -> str:
    """The characters of a vocabulary in the order of their ids."""
    return UNKNOWN + "".join(sorted({*characters} - {UNKNOWN}))


def require_text(name: str, value) -> None:
    """raises: UserError unless it is a string"""
    if not isinstance(value, str):
        shown = printable(str(value)[:40])
        raise UserError(f"`{name}={shown}`: must be a string, such as 'It was'")


def unify_newlines(text: str) -> str:
    r"""`text` with \n in place of \r\n and \r, as when reading a file.

    U+0085, U+2028 and U+2029 are ordinary characters, in texts and in prompts.
    raises: UserError if it is not a string
    """
    require_text("text", text)
    return text.replace("\r\n", "\n").replace("\r", "\n")


def code_points(text: str) -> ndarray:
    """Unicode code points of `text` (N,)."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<i4")


class Tokenizer:
    """Characters to ids and back: `characters[i]` has id i, `characters[0]` is U+FFFD."""

    def __init__(self, characters: str):
        self.characters = characters
        self.known = set(characters[1:])
        dtype = np.uint8 if len(characters) <= 256 else np.uint16
        self.table = np.zeros(0x110000, dtype)  # code point -> id
        self.table[code_points(characters)] = np.arange(len(characters))

    def __len__(self) -> int:
        return len(self.characters)

    def encode(self, text: str) -> ndarray:
        """Ids (N,), uint8 or uint16; 0 for unknown characters."""
        return self.table.take(code_points(text))

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.characters[i] for i in ids)

    def normalize_prompt(self, prompt: str) -> tuple[str, dict[str, str]]:
        """`prompt` in known characters, and the replacement of each unknown one ("" if dropped).

        This version drops unknown characters; the second part of the file looks for similar ones.
        """
        prompt = unify_newlines(prompt)
        changes = {c: "" for c in prompt if c not in self.known}
        return "".join(c for c in prompt if c in self.known), changes


# ---- network -------------------------------------------------------------------------------------
# GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners").


def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    """Attention weights (B, H, T, S) of queries q (B, H, T, D) over keys k (B, H, S, D).

    Weight [t, s] is the share of the value at position s in the output for query t.
    The T queries are at the last T of the S positions, so query t is at position S - T + t. It may
    attend to keys up to its own position: the mask is True where a key is later than the query.
    source: Vaswani et al. 2017, "Attention Is All You Need", equation 1
    """
    T, D = q.shape[2:]
    S = k.shape[2]
    position = torch.arange(S, device=q.device)  # (S,)
    is_later = position > position[S - T :, None]  # (T, S)
    scores = q @ k.mT / math.sqrt(D)  # (B, H, T, S)
    scores = scores.masked_fill(is_later, -torch.inf)
    return torch.softmax(scores, dim=-1)  # (B, H, T, S)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal scaled dot-product attention: (B, H, T, D)."""
    return attention_weights(q, k) @ v


class KVCache:
    """Keys and values of every layer for the positions read so far."""

    def __init__(self, network: GPT, batch_size: int):
        c = network.config
        shape = (c.n_layer, 2, batch_size, c.n_head, c.block_size, c.n_embd // c.n_head)
        self.kv = network.wte.weight.new_zeros(shape)  # (L, 2, B, H, block_size, D)
        self.length = 0

    def reset(self) -> None:
        self.length = 0

    def repeat(self, batch_size: int) -> None:
        """Turn the cache of one text into that of `batch_size` equal texts."""
        self.kv = self.kv.repeat(1, 1, batch_size, 1, 1, 1)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k and v (B, H, T, D) of the next T positions; returns all so far (B, H, S, D)."""
        end = self.length + k.shape[2]
        keys, values = self.kv[layer]
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        return keys[:, :, :end], values[:, :, :end]

    def advance(self, n: int) -> None:
        """Count `n` more positions, after every layer has appended them."""
        self.length += n


class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention."""

    attend = staticmethod(attention)  # a fast path may replace it in a network

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.n_head = config.n_head
        self.layer = layer
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, H, T, D) of x (B, T, C)."""
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)  # (B, T, 3, H, D)
        return qkv.permute(2, 0, 3, 1, 4).unbind()  # 3 times (B, H, T, D)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        q, k, v = self.project(x)  # (B, H, T, D)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, H, S, D)
        y = self.attend(q, k, v)  # (B, H, T, D)
        y = y.transpose(1, 2).flatten(2)  # (B, T, C)
        return self.c_proj(y)


class MLP(nn.Module):
    """Position-wise feed-forward network."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        # GPT-2 uses the tanh approximation of GELU (Hendrycks and Gimpel 2016, section 2). In
        # training on a CPU, exact GELU takes half the time; it differs by at most 0.0005.
        use_exact = self.training and x.device.type == "cpu"
        x = self.c_fc(x)  # (B, T, 4 C)
        x = F.gelu(x, approximate="none" if use_exact else "tanh")
        return self.c_proj(x)  # (B, T, C)


class Block(nn.Module):
    """Pre-LayerNorm transformer block: attention and MLP, each added to the residual stream."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        x = x + self.drop(self.attn(self.ln_1(x), cache))
        x = x + self.drop(self.mlp(self.ln_2(x)))
        return x


class GPT(nn.Module):
    """GPT-2 with GPT-2's parameter names; wte is tied to the output head."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.init_weights()

    def init_weights(self) -> None:
        """Initial weights, larger than GPT-2's in linear layers, since Muon's steps are larger."""
        std = (2 * self.config.n_embd) ** -0.5
        nn.init.normal_(self.wte.weight, std=0.02)
        nn.init.normal_(self.wpe.weight, std=0.02)
        for block in self.h:
            nn.init.normal_(block.attn.c_attn.weight, std=std)
            nn.init.zeros_(block.attn.c_proj.weight)  # a block starts as the identity
            nn.init.normal_(block.mlp.c_fc.weight, std=std)
            nn.init.zeros_(block.mlp.c_proj.weight)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)

    @property
    def device(self) -> torch.device:
        return self.wte.weight.device

    def embed(self, ids: Tensor, start: int = 0) -> Tensor:
        """Token plus position embedding (B, T, C) of ids (B, T) from position `start` on."""
        end = start + ids.shape[1]
        if end > self.config.block_size:
            raise IndexError(f"{end} positions exceed block_size {self.config.block_size}")
        return self.wte(ids) + self.wpe.weight[start:end]

    def logits(self, x: Tensor) -> Tensor:
        """Logits (..., V) of the next character, computed from the residual stream x (..., C)."""
        return F.linear(self.ln_f(x), self.wte.weight)

    def forward(
        self,
        ids: Tensor,
        cache: KVCache | None = None,
        context_length: int | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Logits (B, T, V) of the character after each of `ids` (B, T), which follow the `cache`.

        context_length: cut the texts into pieces of that many characters, which cannot attend to
            each other; returns (B * T / context_length, context_length, V)
        last_only: return only the logits after the last of the ids (B, 1, V)
        """
        start = 0 if cache is None else cache.length
        x = self.drop(self.embed(ids, start))  # (B, T, C)
        if context_length is not None:  # (B * T / context_length, context_length, C)
            x = x.reshape(-1, context_length, x.shape[-1])
        for block in self.h:
            x = block(x, cache)
        if cache is not None:
            cache.advance(ids.shape[1])
        if last_only:  # with a large vocabulary, the logits of all positions take gigabytes
            x = x[:, -1:]  # (B, 1, C)
        return self.logits(x)


def cross_entropy_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of -log p(target) in nats over `targets` (B, T); the unknown character does not count.

    logits: (B, T, V), or cut into pieces in the same order; see GPT.forward
    """
    logits = logits.flatten(0, 1).float()  # (B * T, V)
    return F.cross_entropy(logits, targets.flatten(), ignore_index=0, reduction="sum")


# ---- optimizer -----------------------------------------------------------------------------------
# Matrices of the blocks: Muon. Embeddings, LayerNorms and biases: AdamW without weight decay.


def lr_scale(step: int, cfg: TrainConfig) -> float:
    """Multiplier of the peak learning rates at `step`: linear warm-up, then decay to a fifth.

    Most schedules decay to zero; here the moving average (ema_rate) replaces that last part.
    """
    warmup = min(cfg.warmup_steps, cfg.max_steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    remaining = (cfg.max_steps - step) / (cfg.max_steps - warmup)  # from 1 to 0
    return 0.2 + 0.8 * remaining**1.5


def context_length(step: int, cfg: TrainConfig, block_size: int) -> int:
    """Context length in characters at `step`: short in most of the first fifth of a run.

    The next character depends mostly on the few before it. Attention learns to find these sooner
    among 32 characters than in the full context; until it does, the loss stays near that of a
    bigram model. Every fourth step has the full context, so the model learns to use all of it.
    Fine-tuning starts from a model that has learned both: all of its steps have the full context.
    source: Press et al. 2021, "Shortformer: Better Language Modeling using Shorter Inputs",
    section 4, where all early windows are short
    """
    is_early = step < cfg.max_steps // 5 and cfg.init is None
    is_short = is_early and step % 4 != 0 and block_size % 32 == 0
    return 32 if is_short else block_size


def ema_rate(step: int) -> float:
    """Share of the newest weights in the exponential moving average (EMA) after `step` steps.

    The average, over about the last eighth of the run so far, is what is evaluated and saved,
    because the weights of a single step memorize and fluctuate more.
    source: the power function EMA of Karras et al. 2024, "Analyzing and Improving the Training
    Dynamics of Diffusion Models", section 3.1, to first order
    """
    return min(1.0, 8 / step)


def slow_momentum_rate(step: int) -> float:
    """Share of the newest gradient in Muon's slow momentum after `step` steps.

    It averages over about the last 25th of the run so far, but never over fewer steps than the fast
    momentum. The span grows with the run because early in a run the network changes quickly, so
    gradients soon become outdated.
    source: Pagliardini et al. 2024, "The AdEMAMix Optimizer: Better, Faster, Older", section 3,
    for Adam and with another schedule
    """
    return min(0.1, 25 / step)


def newton_schulz(X: Tensor) -> Tensor:
    """Approximately U V' for each X = U S V' of a stack (N, rows, columns): singular values near 1.

    source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"
    """
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for a, b, c in POLYNOMIALS:
        A = X @ X.mT  # (N, rows, rows)
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)  # b A + c A^2
        X = torch.baddbmm(X, B, X, beta=a)  # a X + B X
    return X


# These polynomials a s + b s^3 + c s^5, applied one after the other, bring every singular value s
# from 0.002 to 1 into the range from 0.63 to 1.37. Each minimizes the largest distance from 1 over
# the interval that the previous ones leave, widened by 2% at both ends because a value that
# rounding moved outside would grow without limit.
# source: Amsel et al. 2025, "The Polar Express", section 3
POLYNOMIALS = (
    (8.2649, -23.5104, 16.7588),
    (4.0427, -2.8922, 0.5223),
    (3.6958, -2.6594, 0.4976),
    (2.8578, -2.0708, 0.4383),
)


class Muon:
    """Momentum, orthogonalized by Newton-Schulz (Jordan et al. 2024), for matrices.

    The momentum is the sum of an average of the gradients over a few steps, with Nesterov's rule,
    and twice an average over many. What most windows have in common is only a small part of each
    gradient; the slow average brings it out.

    The gradient of a weight matrix is dominated by a few directions, whose singular values exceed
    the others by orders of magnitude: an update proportional to it hardly learns the rare
    directions. Muon sets all singular values to 1, so every direction advances at the same rate.

    Matrices of the same shape form one stack. Those with more rows than columns are split into
    groups of columns / 2 rows, which halves the arithmetic and gives a slightly lower loss.
    """

    def __init__(self, weights: dict[str, Tensor], cfg: TrainConfig, dtype: torch.dtype):
        self.cfg = cfg
        self.dtype = dtype  # of Newton-Schulz
        # In float32, where Newton-Schulz is slow, only every second step updates the weights, by
        # twice as much, which is slightly worse per step but better per second.
        self.interval = 1 if dtype == torch.bfloat16 else 2  # steps between updates
        self.beta = 0.9  # decay of the fast momentum
        self.stacks: list[tuple[list[Tensor], Tensor]] = []  # weights, and their two momenta
        self.momentum: dict[str, Tensor] = {}  # the same momenta by kind and name of the weight
        names_by_shape = {}
        for name, weight in weights.items():
            names_by_shape.setdefault(self.group_shape(weight), []).append(name)
        for (rows, columns), names in names_by_shape.items():
            members = [weights[name] for name in names]
            n_groups = sum(map(len, members)) // rows
            momenta = members[0].new_zeros(2, n_groups, rows, columns)
            self.stacks.append((members, momenta))
            for kind, momentum in zip(("fast", "slow"), momenta, strict=True):
                for name, part in zip(names, self.unstack(momentum, members), strict=True):
                    self.momentum[f"{kind}.{name}"] = part

    @staticmethod
    def group_shape(weight: Tensor) -> tuple[int, int]:
        rows, columns = weight.shape
        if rows > columns:
            rows = columns // 2 if columns % 2 == 0 else columns
        return rows, columns

    @staticmethod
    def unstack(stack: Tensor, weights: list[Tensor]) -> tuple[Tensor, ...]:
        """Views of a stack (N, rows, columns), one per weight and with its shape."""
        return stack.flatten(0, 1).split([len(weight) for weight in weights])

    @torch.no_grad()
    def step(self, scale: Tensor, slow_rate: Tensor, is_update: bool = True) -> None:
        """Add the gradients to the momenta; if `is_update`, update the weights.

        scale: multiplier of the peak rate, a scalar on the device
        slow_rate: see slow_momentum_rate, also a scalar on the device
        """
        minus_lr = -self.interval * self.cfg.muon_learning_rate * scale
        decay = 1 + minus_lr * self.cfg.weight_decay
        for weights, (fast, slow) in self.stacks:
            grads = [weight.grad for weight in weights]
            grad = torch.cat(grads).view_as(fast)  # (N, rows, columns)
            fast.lerp_(grad, 1 - self.beta)
            slow.lerp_(grad, slow_rate)
            if not is_update:
                continue
            nesterov_grad = grad.lerp_(fast, self.beta)  # (N, rows, columns)
            update = newton_schulz((nesterov_grad + 2 * slow).to(self.dtype)).float()
            for weight, part in zip(weights, self.unstack(update, weights), strict=True):
                weight.mul_(decay).addcmul_(part, minus_lr)


# ---- training ------------------------------------------------------------------------------------


class TextInfo(NamedTuple):
    """Provenance of a text: names, SHA-256 of its UTF-8 bytes, number of characters."""

    names: list[str]
    sha256: str
    characters: int

    def __str__(self) -> str:
        return printable(", ".join(self.names))


class Corpus(NamedTuple):
    """A text to train or to evaluate on."""

    info: TextInfo
    tokenizer: Tokenizer
    ids: ndarray  # (N,)

    @classmethod
    def from_text(cls, text: str) -> Corpus:
        """raises: UserError for a lone surrogate, such as those that surrogateescape leaves"""
        text = unify_newlines(text)
        try:
            sha256 = hashlib.sha256(text.encode()).hexdigest()
        except UnicodeEncodeError as error:
            found = f"{spell_out(text[error.start])} at {error.start:,} is a lone surrogate"
            fix = "decode the text with its real encoding, or errors='replace'"
            raise UserError(f"`text`: {found}; {fix}") from None
        characters = build_vocab(text)
        is_text = len(characters) <= 65_536
        require(is_text, "`text`: more than 65,535 different characters; is it text?")
        tokenizer = Tokenizer(characters)
        return cls(TextInfo(["text"], sha256, len(text)), tokenizer, tokenizer.encode(text))


def split_ids(ids: ndarray) -> tuple[ndarray, ndarray]:
    """Training part and validation part: the last tenth, at most a million characters."""
    n = max(len(ids) * 9 // 10, len(ids) - 1_000_000)
    return ids[:n], ids[n:]


@lru_cache(maxsize=2)
def epoch_offsets(epoch: int, n_ids: int, block_size: int, seed: int) -> ndarray:
    """Start offsets of an epoch's windows: non-overlapping, with a random phase, permuted."""
    n_windows = (n_ids - block_size - 1) // block_size
    rng = np.random.default_rng((seed, epoch))
    phase = rng.integers(n_ids - block_size * n_windows)  # leaves room for the last target
    return phase + block_size * rng.permutation(n_windows)


def get_batch(ids: ndarray, step: int, cfg: TrainConfig, block_size: int) -> Tensor:
    """Windows (B, T + 1) of `step`: a function of seed and step, so resuming needs no state."""
    n_windows = len(epoch_offsets(0, len(ids), block_size, cfg.seed))
    first = step * cfg.batch_size
    windows = []
    for i in range(first, first + cfg.batch_size):
        epoch, position = divmod(i, n_windows)
        offsets = epoch_offsets(epoch, len(ids), block_size, cfg.seed)
        start = offsets[position]
        windows.append(ids[start : start + block_size + 1])
    return torch.from_numpy(np.stack(windows).astype("i8"))


def to_tensor(ids: ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(ids.astype("i8")).to(device)


def to_array(tensor: Tensor) -> ndarray:
    """A tensor of any dtype and device for NumPy, which has no bfloat16."""
    return tensor.float().cpu().numpy()


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Context in which matrix products are computed in bfloat16, if `dtype` is bfloat16."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


@torch.no_grad()
def evaluate(
    network: GPT, ids: ndarray, dtype: torch.dtype = torch.float32, track: Callable = iter
) -> tuple[float, int]:
    """Mean loss in nats per character over the text `ids` (N,), and the number of characters.

    The windows of block_size do not overlap, and the last one may be shorter: every known character
    but the first is predicted exactly once.  raises: UserError if there is none
    track: wraps the loop to show progress, as tqdm does
    """
    T = network.config.block_size
    count = int(np.count_nonzero(ids[1:]))
    require(count, "the text to evaluate on has no known character to predict; use another")
    padding = (1 - len(ids)) % T  # fills the last window; id 0 does not count as a target
    ids = np.pad(ids, (0, padding))
    inputs = ids[:-1].reshape(-1, T)  # (N, T)
    targets = ids[1:].reshape(-1, T)  # (N, T)
    rows = (1 << 24) // (T * network.config.vocab_size)  # at most 64 MB of logits
    rows = max(1, min(32, rows))
    was_training = network.training
    network.eval()
    total = 0.0
    for i in track(range(0, len(inputs), rows)):
        x = to_tensor(inputs[i : i + rows], network.device)  # (rows, T)
        y = to_tensor(targets[i : i + rows], network.device)  # (rows, T)
        with autocast(network.device, dtype):
            logits = network(x)  # (rows, T, V)
        total += cross_entropy_sum(logits, y).item()
    network.train(was_training)
    return total / count, count


class Evaluation(NamedTuple):
    """A row of the loss history; losses in nats per character."""

    step: int
    # Mean over the steps since the last evaluation, of the current weights, with dropout,
    # logit_scale and short contexts: its trend matters, not its distance from validation_loss.
    training_loss: float
    validation_loss: float  # of the averaged weights


class Diverged(UserError):
    """The loss or a weight is not finite, or the model is worse than a uniform guess."""


class Trainer:
    """A training run: text, network, optimizers and progress.

    trainer = Trainer(Corpus.from_text(text), GPTConfig(), TrainConfig(max_steps=400))
    trainer.fit()
    print(trainer.best_model().generate("It was"))
    """

    rank = 0  # of this process, if several train together

    def __init__(
        self,
        corpus: Corpus,
        config: GPTConfig,
        cfg: TrainConfig,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        self.corpus = corpus
        self.device = torch.device(device)
        self.dtype = dtype  # of the matrix products: float32 or bfloat16
        self.train_ids, val_ids = split_ids(corpus.ids)
        T = config.block_size
        is_enough = len(self.train_ids) > 2 * T and len(val_ids) > 1
        found = f"{corpus.info}: {len(corpus.ids):,} characters"
        require(is_enough, f"{found} are too few for `block_size={T}`; use a longer text")
        self.cfg = cfg = resolve(cfg, config, len(self.train_ids), self.device.type, dtype)
        # Evaluation takes about a tenth of the time: a character costs a third of one in training.
        n_val = max(20_000, cfg.eval_interval * cfg.batch_size * T // 3)
        self.val_ids = val_ids[:n_val]

        torch.default_generator.manual_seed(cfg.seed)  # of the CPU, where the weights are drawn
        config = replace(config, vocab_size=len(corpus.tokenizer), dropout=cfg.dropout)
        with torch.device("cpu"):  # regardless of the default device
            self.network = GPT(config)
        self.network.to(self.device)
        self.ema = copy.deepcopy(self.network).requires_grad_(False).eval()  # see ema_rate
        self.init_optimizers()

        self.steps_done = 0
        self.history: list[Evaluation] = []
        self.best_weights: dict[str, Tensor] = {}  # those with the lowest validation loss
        self.best_loss = math.inf

        # A step reads its inputs from tensors at fixed addresses, as a CUDA graph requires.
        self.context_length = T
        self.is_muon_update = True  # see Muon
        self.batch = torch.zeros(cfg.batch_size, T + 1, dtype=torch.long, device=self.device)
        self.n_targets = torch.ones((), device=self.device)
        self.lr_scale = torch.zeros((), device=self.device)
        self.ema_rate = torch.zeros((), device=self.device)
        self.slow_rate = torch.zeros((), device=self.device)  # see slow_momentum_rate
        self.step_loss = torch.zeros((), device=self.device)
        self.loss_sum = torch.zeros((), device=self.device)  # since the last evaluation

    def init_optimizers(self) -> None:
        matrices = {}
        others = []
        for name, parameter in self.network.named_parameters():
            if name.startswith("h.") and parameter.dim() == 2:
                matrices[name] = parameter
            else:
                others.append(parameter)
        self.muon = Muon(matrices, self.cfg, self.dtype)
        self.adamw = torch.optim.AdamW(
            others,
            lr=torch.zeros((), device=self.device),
            betas=(0.9, 0.99),
            weight_decay=0,
            fused=True,
            capturable=self.device.type == "cuda",
        )
        for p in others:  # AdamW creates its state lazily; a checkpoint needs it earlier
            state = self.adamw.state[p]
            state["step"] = torch.zeros((), device=self.device)
            state["exp_avg"] = torch.zeros_like(p)
            state["exp_avg_sq"] = torch.zeros_like(p)

    def step(self) -> None:
        """One optimizer step: set its inputs, then run the part that a CUDA graph can replay."""
        self.set_inputs()
        self.update()
        self.steps_done += 1

    def set_inputs(self) -> None:
        """Set the windows and the rates of this step."""
        T = self.network.config.block_size
        windows = get_batch(self.train_ids, self.steps_done, self.cfg, T)  # (B, T + 1)
        rows = self.local_rows(windows)
        is_cuda = self.device.type == "cuda"  # then the CPU does not wait for the copy
        self.batch.copy_(rows.pin_memory() if is_cuda else rows, non_blocking=is_cuda)
        n_known = torch.count_nonzero(windows[:, 1:])
        self.n_targets.fill_(n_known.clamp(min=1))
        self.context_length = context_length(self.steps_done, self.cfg, T)
        self.is_muon_update = self.steps_done % self.muon.interval == 0
        self.lr_scale.fill_(lr_scale(self.steps_done, self.cfg))
        self.ema_rate.fill_(ema_rate(self.steps_done + 1))
        self.slow_rate.fill_(slow_momentum_rate(self.steps_done + 1))
        if self.cfg.dropout:  # its masks are a function of seed and step: resuming needs no state
            self.seed_dropout()

    def update(self) -> None:
        """Compute the gradients, step both optimizers, and update the averaged weights."""
        self.backward()
        self.loss_sum += self.step_loss
        # No gradient clipping: Muon's update has a fixed size, and AdamW normalizes its own.
        lr = self.adamw.param_groups[0]["lr"]
        lr.copy_(self.cfg.learning_rate * self.lr_scale)
        self.adamw.step()
        self.muon.step(self.lr_scale, self.slow_rate, self.is_muon_update)
        with torch.no_grad():
            for mean, p in zip(self.ema.parameters(), self.network.parameters(), strict=True):
                mean.lerp_(p, self.ema_rate)

    def backward(self) -> None:
        """Compute the gradients of `batch` and `step_loss`, its mean loss in nats."""
        self.network.train()
        self.network.zero_grad()
        self.step_loss.zero_()
        for part in self.batch.chunk(self.cfg.grad_accum):
            x = part[:, :-1]  # (B / grad_accum, T)
            y = part[:, 1:]  # (B / grad_accum, T), the characters that follow
            with autocast(self.device, self.dtype):
                logits = self.network(x, context_length=self.context_length)  # (..., V)
            loss = cross_entropy_sum(self.cfg.logit_scale * logits, y) / self.n_targets
            loss.backward()
            self.step_loss += loss.detach()

    def local_rows(self, windows: Tensor) -> Tensor:
        """The windows (B, T + 1) that this process computes: here, all of them."""
        return windows

    def seed_dropout(self) -> None:
        sequence = np.random.SeedSequence([self.cfg.seed, self.steps_done, self.rank])
        seed = int(sequence.generate_state(1, np.uint64)[0] >> 1)
        if self.device.type == "cpu":
            torch.default_generator.manual_seed(seed)
        else:
            torch.get_device_module(self.device).manual_seed(seed)

    def mean_loss(self) -> float:
        """Mean training loss in nats over the steps since the last evaluation."""
        last_step = self.history[-1].step if self.history else 0
        return float(self.loss_sum) / max(1, self.steps_done - last_step)

    def validate(self) -> float:
        """Validation loss of the averaged weights in nats per character."""
        loss, _ = evaluate(self.ema, self.val_ids, self.dtype)
        return loss

    def evaluate(self) -> None:
        """Append both losses to the history, and keep the best weights.  raises: Diverged"""
        training_loss = self.mean_loss()
        validation_loss = self.validate()
        self.check_divergence(training_loss, validation_loss)
        self.loss_sum.zero_()
        if self.steps_done:  # the initial weights of a fine-tuning run have no training loss
            row = Evaluation(self.steps_done, round(training_loss, 6), round(validation_loss, 6))
            self.history.append(row)
        if len(self.history) > 10_000:  # the header of a file has a size limit
            del self.history[0:-1:2]
        if validation_loss < self.best_loss:
            self.best_loss = validation_loss
            self.best_weights = {n: p.clone() for n, p in self.ema.named_parameters()}

    def check_divergence(self, training_loss: float, validation_loss: float) -> None:
        cfg = self.cfg
        uniform = math.log(self.network.config.vocab_size)
        is_finite = math.isfinite(training_loss + validation_loss) and weights_are_sane(self.ema)
        # A loss worse than that of a uniform guess is normal only in the first steps.
        is_late = self.best_loss < uniform or self.steps_done >= min(1_000, cfg.max_steps)
        # If the validation part is in another language, only its loss is high.
        is_worse = min(training_loss, validation_loss) > 1.1 * uniform
        if is_finite and not (is_late and is_worse):
            return
        fix = f"`muon_learning_rate={cfg.muon_learning_rate / 3:.2g}`"
        fix += f" `learning_rate={cfg.learning_rate / 3:.2g}` `restart`"
        at = f"step {self.steps_done:,}, loss {validation_loss:,.4g}"
        raise Diverged(f"diverged at {at}; try {fix}")

    def fit(
        self,
        on_evaluation: Callable[[Trainer], None] = lambda trainer: None,
        should_stop: Callable[[Trainer], bool] = lambda trainer: False,
    ) -> None:
        """The training loop: until max_steps, or until `should_stop` is true after a step.

        raises: Diverged
        """
        # A fine-tuning run starts with its initial weights as the best, so it never ends up worse.
        if self.steps_done == 0 and self.cfg.init:
            self.evaluate()
        while self.steps_done < self.cfg.max_steps:
            # Forward pass, backward pass, optimizers, average.
            self.step()
            # Both losses, at regular intervals and once early on.
            is_due = self.steps_done % self.cfg.eval_interval == 0
            if is_due or self.steps_done in (50, self.cfg.max_steps):
                self.evaluate()
                on_evaluation(self)
            # Progress, checkpoints and Ctrl-C are up to the caller.
            if should_stop(self):
                break

    def metadata(self) -> Metadata:
        training = asdict(self.cfg)
        training["device"] = self.device.type
        training["dtype"] = str(self.dtype).removeprefix("torch.")
        return Metadata(
            config=self.network.config,
            characters=self.corpus.tokenizer.characters,
            data=self.corpus.info,
            training=training,
            step=self.steps_done,
            validation_loss=self.best_loss if self.best_weights else None,
            history=list(self.history),
        )

    def best_model(self) -> Model:
        """Model with the lowest validation loss; before any evaluation, the averaged weights."""
        network = copy.deepcopy(self.ema).requires_grad_()
        if self.best_weights:
            network.load_state_dict(self.best_weights)
        return Model(network, self.corpus.tokenizer, self.metadata())

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors of a checkpoint by name: what a step changes, and the best weights."""
        tensors = {"loss_sum": self.loss_sum}
        for name, momentum in self.muon.momentum.items():
            tensors[f"muon.{name}"] = momentum
        for name, weight in self.network.named_parameters():
            tensors[f"model.{name}"] = weight
            tensors[f"ema.{name}"] = self.ema.get_parameter(name)
            if self.best_weights:
                tensors[f"best.{name}"] = self.best_weights[name]
            for key, value in self.adamw.state.get(weight, {}).items():
                tensors[f"adamw.{name}.{key}"] = value
        return tensors

    @torch.no_grad()
    def load_state_dict(self, tensors: dict[str, Tensor], metadata: Metadata) -> None:
        """Continue from a checkpoint.  raises: UserError for a missing or wrongly shaped tensor"""
        self.steps_done = metadata.step
        self.history = list(metadata.history)
        if metadata.validation_loss is not None:
            self.best_loss = metadata.validation_loss
            self.best_weights = {n: p.clone() for n, p in self.ema.named_parameters()}
        for name, tensor in self.state_dict().items():
            saved = tensors.get(name)
            is_same = saved is not None and saved.shape == tensor.shape
            require(is_same, f"its tensor {name} does not belong to this run")
            tensor.copy_(saved)


def weights_are_sane(network: GPT) -> bool:
    """Whether the weights are neither huge nor NaN."""
    return bool(nn.utils.get_total_norm(network.parameters()) < 1e6)


# ---- generation ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class SampleConfig(Config):
    """How the next character is sampled. By default, only the temperature is on.

    To add a setting, add a field here and its code in process_logits.
    """

    temperature: float = option(
        0.7, "below 1 safer, above 1 wilder, 0 always the likeliest", 0, 100
    )
    top_k: int = option(0, "draw from the k likeliest characters; 0 is off", 0, 0x110000)
    top_p: float = option(1.0, "draw from the fewest that reach this probability; 1 is off", 0, 1)
    min_p: float = option(0.0, "exclude what is below this times the likeliest; 0 is off", 0, 1)
    repetition_penalty: float = option(1.0, "above 1: repeats become less likely", 0.01, 100)
    no_repeat_ngram_size: int = option(0, "never repeat a text of n characters; 0 is off", 0, 1000)
    max_new: int = option(300, "characters to write", 0, 10**12)
    stop: tuple = option((), r"stop before this text; may be repeated; \n is a line end")
    seed: int | None = option(None, "same seed, same text (default: random)", 0, 2**63 - 1)


def sample_config(stop: str | Iterable[str] = (), **sampling) -> SampleConfig:
    """SampleConfig from keyword arguments; `stop` may be one string.  raises: UserError"""
    is_one = isinstance(stop, str) or not isinstance(stop, Iterable)
    stops = (stop,) if is_one else tuple(stop)
    is_valid = all(isinstance(text, str) for text in stops)
    require(is_valid, f"`stop={stop}`: must be a string or several; leave it out for none")
    names = [setting.name for setting in fields(SampleConfig)]
    for name in sampling:
        require(name in names, f"`{name}`: unknown; choose from {', '.join(names)}")
    return SampleConfig(stop=stops, **sampling)


MAX_TEXT = 10_000  # characters of a text that generation remembers; more than any context holds


def softmax(logits: ndarray) -> ndarray:
    """Probabilities (..., V) of logits (..., V)."""
    exp = np.exp(logits - logits.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


def completes_ngram(texts: ndarray, n: int, vocab_size: int) -> ndarray:
    """Whether each id would complete an n-gram that the text already contains: bool (B, V)."""
    B, N = texts.shape
    completes = np.zeros((B, vocab_size), bool)
    if n <= N:
        ngrams = np.lib.stride_tricks.sliding_window_view(texts, n, axis=1)  # (B, N - n + 1, n)
        last = texts[:, None, N - n + 1 :]  # (B, 1, n - 1)
        rows, places = (ngrams[:, :, :-1] == last).all(-1).nonzero()
        completes[rows, ngrams[rows, places, -1]] = True
    completes[completes[:, 1:].all(1)] = False  # at least one character must remain
    return completes


def process_logits(logits: ndarray, cfg: SampleConfig, texts: ndarray) -> ndarray:
    """Logits (B, V) after penalty, n-grams, temperature, top-k, top-p, min-p; -inf if excluded.

    texts (B, N): ids so far, for the two settings against repetition; only the last MAX_TEXT count
    sources: Keskar et al. 2019, "CTRL", section 4.1 (penalty); Paulus et al. 2017, "A Deep
    Reinforced Model for Abstractive Summarization", section 2.5 (n-grams); Fan et al. 2018,
    "Hierarchical Neural Story Generation" (top-k); Holtzman et al. 2020, "The Curious Case of
    Neural Text Degeneration" (top-p); Nguyen et al. 2024, "Turning Up the Heat: Min-p Sampling"
    """
    V = logits.shape[-1]
    texts = texts[:, -MAX_TEXT:]
    if cfg.repetition_penalty != 1:
        has_occurred = np.zeros(logits.shape, bool)
        np.put_along_axis(has_occurred, texts, True, axis=1)
        penalty = cfg.repetition_penalty
        penalized = np.where(logits < 0, logits * penalty, logits / penalty)
        logits = np.where(has_occurred, penalized, logits)
    if cfg.no_repeat_ngram_size > 0:
        completes = completes_ngram(texts, cfg.no_repeat_ngram_size, V)
        logits = np.where(completes, -np.inf, logits)
    if cfg.temperature not in (0, 1):
        logits = logits / max(cfg.temperature, 1e-6)  # lower would overflow; same result
    if 0 < cfg.top_k < V:
        kth = np.partition(logits, -cfg.top_k)[:, -cfg.top_k, None]  # (B, 1)
        logits = np.where(logits < kth, -np.inf, logits)
    if cfg.top_p < 1:
        # With top_p 0.8, probabilities of  0.1  0.2  0.3  0.4
        # add up to                         0.1  0.3  0.6  1.0
        # and those up to 0.2 are excluded:  x
        order = logits.argsort(kind="stable")  # (B, V), ascending
        probs = softmax(np.take_along_axis(logits, order, -1))
        excluded = probs.cumsum(-1) <= 1 - cfg.top_p
        excluded[:, -1] = False  # the likeliest stays, whatever top_p is
        excluded = np.take_along_axis(excluded, order.argsort(), -1)  # back in id order
        logits = np.where(excluded, -np.inf, logits)
    if cfg.min_p > 0:
        probs = softmax(logits)
        threshold = cfg.min_p * probs.max(-1, keepdims=True)  # (B, 1)
        logits = np.where(probs < threshold, -np.inf, logits)
    return logits


def sample(logits: ndarray, cfg: SampleConfig, rngs: list, texts: ndarray) -> ndarray:
    """Ids (B,) drawn from logits (B, V), each row with its own generator; never U+FFFD (id 0).

    source: Gumbel-max trick, Maddison et al. 2014, "A* Sampling": argmax(logits + Gumbel noise)
    is a sample of softmax(logits)
    """
    logits = logits.copy()
    logits[:, 0] = -np.inf
    logits = process_logits(logits, cfg, texts)
    if cfg.temperature > 0:
        V = logits.shape[-1]
        noise = [rng.gumbel(size=V) for rng in rngs]  # B times (V,)
        logits = logits + np.array(noise)
    return logits.argmax(-1)


def context_start(n: int, block_size: int) -> int:
    """Where the context of a text of `n` characters begins.

    Position embeddings are absolute: if a full context slid by one, every key and value in the
    KV cache would be wrong. So it moves by half its length at a time.
    """
    half = block_size // 2
    n_moves = math.ceil((n - block_size) / half)
    return max(0, n_moves) * half


@torch.inference_mode()
def generate(network: GPT, ids: ndarray, n: int, cfg: SampleConfig, rng) -> ndarray:
    """`ids` (N,) and `n` more: the reference, which recomputes the whole context for each id."""
    for _ in range(n):
        start = context_start(len(ids), network.config.block_size)
        context = to_tensor(ids[None, start:], network.device)  # (1, T)
        logits = to_array(network(context)[:, -1])  # (1, V)
        new_id = sample(logits, cfg, [rng], ids[None])  # (1,)
        ids = np.append(ids, new_id)
    return ids


@torch.inference_mode()
def prefill(network: GPT, ids: ndarray, cache: KVCache) -> ndarray:
    """Read `ids` (B, T) into the `cache`; returns logits (B, V) after the last id of each text."""
    logits = network(to_tensor(ids, network.device), cache, last_only=True)  # (B, 1, V)
    return to_array(logits[:, -1])  # (B, V)


def decode(network: GPT, ids: ndarray, cache: KVCache) -> ndarray:
    """Read one more character of each text, `ids` (B,), into the `cache`; returns logits (B, V)."""
    return prefill(network, ids[:, None], cache)


def generate_ids(
    network: GPT, prompt: ndarray, cfg: SampleConfig, rngs: list, decode=decode
) -> Iterator[ndarray]:
    """Endless continuations of `prompt` (N,), N > 0, one per generator: yields ids (B,)."""
    B = len(rngs)
    T = network.config.block_size
    texts = prompt[None].repeat(B, axis=0).astype("i8")  # (B, N)
    context = prompt[None, context_start(len(prompt), T) :]  # (1, S): the B prompts are equal
    cache = KVCache(network, 1)
    logits = prefill(network, context, cache).repeat(B, axis=0)  # (B, V)
    cache.repeat(B)
    while True:
        ids = sample(logits, cfg, rngs, texts)
        texts = np.concatenate((texts, ids[:, None]), axis=1)[:, -MAX_TEXT:]  # (B, N)
        yield ids
        if cache.length < T:
            logits = decode(network, ids, cache)
        else:  # the context is full: read its second half again
            cache.reset()
            n_kept = T + 1 - context_start(T + 1, T)
            logits = prefill(network, texts[:, -n_kept:], cache)


class StopFilter:
    """Ends a text before the first of the `stops`. Holds back what may be the beginning of one."""

    def __init__(self, stops: tuple[str, ...]):
        self.stops = [stop for stop in stops if stop]
        self.delay = max(map(len, self.stops), default=1) - 1
        self.held = ""
        self.is_done = False

    def push(self, c: str) -> str:
        """Take the next character; returns the text that is now safe to write."""
        if self.is_done:
            return ""
        self.held += c
        found = [stop for stop in self.stops if self.held.endswith(stop)]
        if found:
            self.is_done = True
            longest = max(map(len, found))
            return self.held[:-longest]
        n_safe = max(0, len(self.held) - self.delay)
        safe, self.held = self.held[:n_safe], self.held[n_safe:]
        return safe

    def flush(self) -> str:
        """The text still held back; call this at the end."""
        return "" if self.is_done else self.held


# ---- Model ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Metadata:
    """What the header of a model file says about the weights, as JSON strings."""

    config: GPTConfig
    characters: str
    data: TextInfo
    training: dict  # a record: TrainConfig, device and dtype; other versions had other settings
    step: int
    validation_loss: float | None  # the lowest, in nats per character
    history: list[Evaluation]

    def to_header(self, format: str = "pt") -> dict[str, str]:
        """Header entries; `format: pt` is what transformers expects."""
        header = {"format": format, "format_version": "1"}
        header |= {"anexa_version": __version__, "torch_version": torch.__version__}
        return header | {name: json.dumps(value) for name, value in self.entries().items()}

    def entries(self) -> dict:
        """All fields, as types that JSON can express."""
        return asdict(self) | {"data": self.data._asdict()}

    @classmethod
    def from_header(cls, header: dict[str, str]) -> Metadata:
        """raises: LookupError, TypeError, UserError or ValueError if the header is malformed"""
        require(header["format_version"] == "1", "its format_version is not 1")
        entries = {setting.name: json.loads(header[setting.name]) for setting in fields(cls)}
        require(type(entries["history"]) is list, "its history is malformed")
        if "name" in entries["data"]:  # a single string before version 1.0
            entries["data"]["names"] = [entries["data"].pop("name")]
        entries["config"] = GPTConfig(**entries["config"])
        entries["data"] = TextInfo(**entries["data"])
        entries["history"] = [Evaluation(*row) for row in entries["history"]]
        return cls(**entries)

    def settings(self) -> dict:
        """Shape and training settings by name."""
        return asdict(self.config) | self.training

    def __str__(self) -> str:
        loss = "unknown"
        if self.validation_loss is not None:
            loss = f"{self.validation_loss:.4f} nats/char"
        run = f"trained on {self.data} for {self.step:,} steps"
        return f"{self.config.size()}, {run}, validation loss {loss}"


@dataclass
class Model:
    """Network, tokenizer and metadata: what a user holds."""

    network: GPT
    tokenizer: Tokenizer
    metadata: Metadata
    path: Path | None = None  # of its file
    # The second part of the file has a faster `decode`, and a safer `write_file`.
    decode = staticmethod(decode)
    write_file = staticmethod(safetensors.torch.save_file)  # (tensors, path, header)

    def __repr__(self) -> str:
        losses = [row.validation_loss for row in self.metadata.history]
        if len(losses) < 2:
            return f"Model: {self.metadata}"
        span = max(losses) - min(losses) + 1e-9
        shown = losses[:: 1 + len(losses) // 60]
        levels = [int(8 * (loss - min(losses)) / span) for loss in shown]
        curve = "".join("▁▂▃▄▅▆▇█"[level] for level in levels)
        return f"Model: {self.metadata}\nvalidation loss {losses[0]:.2f} {curve} {losses[-1]:.2f}"

    # ---- writing

    def prompt_ids(self, prompt: str) -> ndarray:
        """Ids (N,) of `prompt`, N > 0; if it is empty, the id of a line end, or 1 if unknown.

        raises: UserError if no character of the prompt is known
        """
        require_text("prompt", prompt)
        known, _ = self.tokenizer.normalize_prompt(prompt or "\n")
        if prompt:
            require(known, f"'{printable(prompt[:40])}': the model knows none of these characters")
        return self.tokenizer.encode(known) if known else np.array([1])

    def stream_batch(self, prompt: str, cfg: SampleConfig, indices=range(1)) -> Iterator[list[str]]:
        """Several continuations of `prompt`: lists of pieces, one per text, until all are done.

        Text i depends only on (seed, i), not on the rest of the batch.
        """
        seed = secrets.randbits(62) if cfg.seed is None else cfg.seed
        rngs = [np.random.default_rng((seed, i)) for i in indices]
        ids = generate_ids(self.network, self.prompt_ids(prompt), cfg, rngs, self.decode)
        filters = [StopFilter(cfg.stop) for _ in indices]
        for _ in range(cfg.max_new):
            characters = self.tokenizer.decode(next(ids))
            yield [f.push(c) for f, c in zip(filters, characters, strict=True)]
            if all(f.is_done for f in filters):
                return
        yield [f.flush() for f in filters]

    def stream(self, prompt: str = "", **sampling) -> Iterator[str]:
        """Pieces of a continuation as they are written; `sampling`: fields of SampleConfig."""
        cfg = sample_config(**sampling)
        for pieces in self.stream_batch(prompt, cfg):
            yield pieces[0]

    def generate(self, prompt: str = "", **sampling) -> str:
        """A continuation of `prompt`; `sampling`: fields of SampleConfig.  raises: UserError"""
        return "".join(self.stream(prompt, **sampling))

    # ---- looking inside

    @torch.no_grad()
    def next_logits(self, ids: ndarray) -> ndarray:
        """Logits (N, V) of the character after each of `ids` (N,), at most one context."""
        ids = to_tensor(ids[None], self.network.device)
        return to_array(self.network(ids)[0])

    def next_characters(self, prompt: str, **sampling) -> ndarray:
        """Probabilities (V,) of the next character, by id, after any `sampling` settings."""
        cfg = sample_config(**{"temperature": 1.0} | sampling)
        ids = self.prompt_ids(prompt)
        start = context_start(len(ids), self.network.config.block_size)
        logits = self.next_logits(ids[start:])[-1:]  # (1, V)
        if sampling:
            logits[:, 0] = -np.inf  # U+FFFD is never sampled
            cfg = replace(cfg, temperature=max(cfg.temperature, 1e-6))  # 0 as the limit
            logits = process_logits(logits, cfg, ids[None].astype("i8"))
        return softmax(logits)[0]

    def surprise(self, text: str, prompt: str = "") -> ndarray:
        """Surprisal, -log2 p in bits, of each character of `text` (N,), which follows `prompt`.

        An empty prompt stands for a line end. Each character is predicted from the context that it
        would have if the model wrote it. A character that the vocabulary lacks counts as U+FFFD.
        """
        before = self.prompt_ids(prompt)
        ids = np.concatenate((before, self.tokenizer.encode(unify_newlines(text))))
        T = self.network.config.block_size
        parts = []
        position = len(before)  # of the next character to predict
        while position < len(ids):
            start = context_start(position, T)
            end = min(start + T + 1, len(ids))
            logits = self.next_logits(ids[start : end - 1])  # (end - 1 - start, V)
            logits = torch.from_numpy(logits[position - start - 1 :])  # (n, V), from `position` on
            targets = to_tensor(ids[position:end], logits.device)
            nats = F.cross_entropy(logits, targets, reduction="none")
            parts.append(nats.numpy() / math.log(2))
            position = end
        return np.concatenate([np.zeros(0, "f4"), *parts])

    @torch.no_grad()
    def attention(self, text: str) -> ndarray:
        """Attention weights (L, H, T, T) within the last context of `text`, which has T characters.

        [layer, head, t, s] is the share of character s in the attention output for character t.
        """
        ids = self.prompt_ids(text)
        start = context_start(len(ids), self.network.config.block_size)
        ids = to_tensor(ids[None, start:], self.network.device)  # (1, T)
        x = self.network.embed(ids)  # (1, T, C)
        weights = []
        for block in self.network.h:
            q, k, _ = block.attn.project(block.ln_1(x))  # (1, H, T, D)
            weights.append(attention_weights(q, k)[0])  # (H, T, T)
            x = block(x)  # (1, T, C)
        return to_array(torch.stack(weights))

    # ---- files

    def save(self, path: str | Path) -> None:
        """Write a model file."""
        weights = dict(self.network.named_parameters())
        self.write_file(weights, path, self.metadata.to_header())

    @classmethod
    def load(cls, path: str | Path) -> Model:
        """The model in a file that save() wrote; anexagpt.load() accepts and checks others."""
        with safetensors.safe_open(path, "pt") as file:
            metadata = Metadata.from_header(file.metadata())
        network = GPT(metadata.config)
        network.load_state_dict(safetensors.torch.load_file(path))
        return cls(network.eval(), Tokenizer(metadata.characters), metadata)


# ==================================================================================================
# The complete GPT ends here: it trains, generates, saves and loads. The rest is for practical use.
# ==================================================================================================


import argparse
import codecs
import ctypes
import errno
import glob
import http.client
import importlib
import io
import re
import shutil
import tempfile
import textwrap
import threading
import time
import unicodedata
import weakref
from collections import Counter, defaultdict
from contextlib import ContextDecorator, ExitStack, closing, contextmanager, suppress
from datetime import timedelta
from functools import partial
from itertools import chain, pairwise
from urllib.parse import urlsplit

try:
    import charset_normalizer
    import filelock
    import prompt_toolkit
    import requests
    import rich.progress
    import urllib3
    from prompt_toolkit import completion, history
    from prompt_toolkit.filters import Condition
    from prompt_toolkit.key_binding import KeyBindings
    from prompt_toolkit.keys import Keys
    from rich.cells import cell_len, set_cell_size
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text
    from safetensors import SafetensorError
    from torch import distributed as dist
except ImportError as error:
    if __name__ != "__main__":
        raise
    sys.exit(f"anexagpt.py: {error}; {INSTALL}")

# A forked process, as from multiprocessing, would wait forever for its parent's OpenMP threads.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=partial(torch.set_num_threads, 1))


# ---- prompts -------------------------------------------------------------------------------------
# A character that the vocabulary lacks is replaced with the nearest one that it has.

EQUIVALENTS = str.maketrans("‘’‚´`“”„–—―−", "'''''\"\"\"----")


def split_clusters(text: str) -> Iterator[str]:
    """Letters of `text`: each is a character and the combining marks after it, at most 31."""
    start = 0
    for end in range(1, len(text) + 1):
        c = text[end : end + 1]  # "" at the end
        is_mark = c in ("\uff9e", "\uff9f") or unicodedata.category(c or " ").startswith("M")
        is_syllable_part = "\u1160" <= c <= "\u11ff"  # of Hangul
        if end - start == 32 or not (is_mark or is_syllable_part):
            yield text[start:end]
            start = end


def equivalent(cluster: str, known: set[str]) -> str:
    """The nearest form of a letter that consists of `known` characters, or "".

    Forms are tried in this order: composed or decomposed (Unicode's NFC and NFD), composed with
    one of its marks, with straight quotes and hyphens, in compatibility forms (NFKC and NFKD),
    without marks; then all of these in the other case.
    """
    composed, decomposed = (unicodedata.normalize(form, cluster) for form in ("NFC", "NFD"))
    letter, marks = decomposed[:1], decomposed[1:]
    partly = [unicodedata.normalize("NFC", letter + m) + marks.replace(m, "") for m in marks]
    partly = [form for form in partly if unicodedata.normalize("NFC", form) == composed]
    straight = composed.translate(EQUIVALENTS)
    forms = [composed, decomposed, *partly, straight]
    forms += [unicodedata.normalize(form, straight) for form in ("NFKC", "NFKD")]
    forms.append("".join(c for c in forms[-1] if unicodedata.category(c) != "Mn"))
    forms += [form.swapcase() for form in forms]
    known_forms = (form for form in forms if form and known.issuperset(form))
    return next(known_forms, "")


def normalize_prompt(tokenizer: Tokenizer, prompt: str) -> tuple[str, dict[str, str]]:
    """`prompt` in known characters, and the replacement of each unknown letter ("" if dropped)."""
    prompt = unify_newlines(prompt)
    if tokenizer.known.issuperset(prompt):  # the loop takes seconds for a long prompt
        return prompt, {}
    changes = {}
    parts = []
    for cluster in split_clusters(prompt):
        known = cluster
        if not tokenizer.known.issuperset(cluster):
            known = equivalent(cluster, tokenizer.known)
        if unicodedata.normalize("NFC", known) != unicodedata.normalize("NFC", cluster):
            changes[cluster] = known
        parts.append(known)
    return "".join(parts), changes


Tokenizer.normalize_prompt = normalize_prompt


# ---- fast paths ----------------------------------------------------------------------------------
# Each replaces one plain function of the same signature. Those that repeat mathematics are compared
# with it first, on the network at hand: if you change the network, the changed network is used.


def fast_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`attention`, faster: a fused kernel or fewer operations."""
    B, H, T, D = q.shape
    S = k.shape[2]
    if S == 1:  # one key only; on CUDA a product with an inner dimension of 1 would need Triton
        return v
    if q.device.type == "mps":  # PyTorch's issues 169222, 176767, 181133 and 195910
        return attention(q, k, v)
    is_short = S <= 64 or (S <= 512 and q.dtype == torch.bfloat16)
    if q.device.type == "cpu" and is_short:
        # Faster than PyTorch's fused kernel: the mask is added by the first matrix product.
        mask = q.new_full((T, S), -torch.inf).triu_(1 + S - T)
        scores = torch.baddbmm(mask, q.flatten(0, 1), k.flatten(0, 1).mT, alpha=D**-0.5)
        weights = torch.softmax(scores, dim=-1)  # (B * H, T, S)
        return (weights @ v.flatten(0, 1)).view(B, H, T, D)
    mask = None
    if 1 < T < S:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=T == S)


def use_fast_attention(network: GPT, dtype: torch.dtype) -> bool:
    """Replace `attention` in `network`, unless it computes something else; False if it does."""
    config = network.config
    H = min(4, config.n_head)
    D = config.n_embd // config.n_head
    random = torch.Generator().manual_seed(0)
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-4
    for T in (8, min(1_024, config.block_size)):  # local attention differs only in long contexts
        values = torch.randn(3, 1, H, T, D, generator=random, dtype=torch.float32, device="cpu")
        q, k, v = values.to(network.device)
        expected = attention(q, k, v)
        result = fast_attention(q.to(dtype), k.to(dtype), v.to(dtype)).float()
        if not torch.allclose(result, expected, atol=tolerance, rtol=tolerance):
            note_once("attention() was changed, so its fast version is not used.")
            return False
    for block in network.h:
        if block.attn.attend is attention:
            block.attn.attend = fast_attention
    return True


CHANGED = "the network was changed; using the plain version."


class NumpyDecoder:
    """`decode` of one text on a CPU: NumPy's calls cost a fraction of PyTorch's.

    All weights are prepared so that a token needs few calls; `dot` costs less than `@`. Every
    vector of the residual stream is given mean zero, which does not change the result, since each
    LayerNorm subtracts the mean. LayerNorm then only divides by the root mean square, and its
    weight and bias are folded into the next matrix.
    source: Jiang et al. 2023, "Pre-RMSNorm and Pre-CRMSNorm Transformers", section 3
    """

    def __init__(self, network: GPT):
        self.network = network
        self.is_equal = True  # to the plain function
        self.caches = weakref.WeakSet()  # caches of the texts for which it was compared
        with torch.no_grad():
            self.wte = to_array(network.wte.weight - network.wte.weight.mean(1, keepdim=True))
            self.wpe = to_array(network.wpe.weight - network.wpe.weight.mean(1, keepdim=True))
            self.blocks = [self.prepare(block) for block in network.h]
            self.head = self.fold(network.ln_f, network.wte.weight, 0.0)

    def __reduce__(self):
        """A copy, even one made by pickle, is prepared again from the network."""
        return NumpyDecoder, (self.network,)

    @staticmethod
    def fold(norm: nn.LayerNorm, weight: Tensor, bias: Tensor | float) -> tuple[ndarray, ndarray]:
        """Matrix and bias of a linear layer, with those of the LayerNorm before it folded in."""
        return to_array(weight * norm.weight), to_array(weight @ norm.bias + bias)

    @staticmethod
    def center(linear: nn.Linear) -> tuple[ndarray, ndarray]:
        """Matrix and bias of a linear layer, changed so that its output has mean zero."""
        weight = linear.weight - linear.weight.mean(0)
        return to_array(weight), to_array(linear.bias - linear.bias.mean())

    def prepare(self, block: Block) -> tuple[ndarray, ...]:
        attn, mlp = block.attn, block.mlp
        c_attn, c_attn_bias = self.fold(block.ln_1, attn.c_attn.weight, attn.c_attn.bias)
        C = c_attn.shape[1]
        scale = (C // attn.n_head) ** -0.5  # of the scores, folded into the queries
        c_attn[:C] *= scale
        c_attn_bias[:C] *= scale
        c_fc = self.fold(block.ln_2, mlp.c_fc.weight, mlp.c_fc.bias)
        return c_attn, c_attn_bias, *self.center(attn.c_proj), *c_fc, *self.center(mlp.c_proj)

    def __call__(self, network: GPT, ids: ndarray, cache: KVCache) -> ndarray:
        is_float32_on_cpu = cache.kv.device.type == "cpu" and cache.kv.dtype == torch.float32
        if len(ids) > 1 or network is not self.network or not is_float32_on_cpu:
            return decode(network, ids, cache)
        if cache not in self.caches:  # a new text; the weights may have changed
            self.caches.add(cache)
            logits = self.decode(ids[0], cache)
            cache.advance(-1)
            expected = decode(network, ids, cache)  # last: its key and value stay in the cache
            self.is_equal = np.allclose(logits, expected, atol=1e-3, rtol=1e-3)
            if not self.is_equal:
                note_once(CHANGED)
            return expected
        if not self.is_equal:
            return decode(network, ids, cache)
        return self.decode(ids[0], cache)

    def decode(self, token: int, cache: KVCache) -> ndarray:
        """Logits (1, V) after `token`."""
        t = cache.length
        x = self.wte[token] + self.wpe[t]  # (C,)
        for weights, kv in zip(self.blocks, cache.kv.numpy()[:, :, 0], strict=True):
            c_attn, c_attn_b, c_proj, c_proj_b, c_fc, c_fc_b, mlp_proj, mlp_proj_b = weights
            _, H, _, D = kv.shape  # (2, H, block_size, D)
            qkv = (c_attn.dot(x) * inverse_rms(x) + c_attn_b).reshape(3, H, 1, D)
            kv[:, :, t] = qkv[1:, :, 0]
            keys, values = kv[:, :, : t + 1]  # (H, S, D)
            scores = qkv[0] @ keys.mT  # (H, 1, S)
            y = softmax(scores) @ values  # (H, 1, D)
            x = x + (c_proj.dot(y.reshape(-1)) + c_proj_b)
            y = c_fc.dot(x) * inverse_rms(x) + c_fc_b  # (4 C,)
            y *= 0.5 + 0.5 * np.tanh(y * (0.7978846 + 0.0356774 * y * y))  # tanh GELU
            x = x + (mlp_proj.dot(y) + mlp_proj_b)
        cache.advance(1)
        head, head_b = self.head
        return (head.dot(x) * inverse_rms(x) + head_b)[None]


def inverse_rms(x: ndarray) -> float:
    return (x.dot(x) / x.size + 1e-5) ** -0.5


@torch.inference_mode()
def gpt2_decoder(network: GPT) -> NumpyDecoder | None:
    """A NumpyDecoder of `network`.

    None if the network was changed and computes something else, or its modules have other names.
    """
    c = network.config
    # Not n_parameters(): someone who changes the network changes that, too.
    n_weights = (c.vocab_size + c.block_size + 2) * c.n_embd
    n_weights += c.n_layer * (12 * c.n_embd**2 + 13 * c.n_embd)
    if sum(p.numel() for p in network.parameters()) != n_weights:
        return None
    ids = np.arange(min(256, c.block_size)) % c.vocab_size  # (T,)
    n = max(1, len(ids) - 8)  # local attention differs only in a long context
    expected = network(to_tensor(ids[None], network.device))[0, n:].numpy()  # (T - n, V)
    try:
        decoder = NumpyDecoder(network)
    except AttributeError:  # a module has another name
        return None
    cache = KVCache(network, 1)
    prefill(network, ids[None, :n], cache)
    logits = np.concatenate([decoder.decode(token, cache) for token in ids[n:]])  # (T - n, V)
    return decoder if np.allclose(logits, expected, atol=1e-3, rtol=1e-3) else None


def use_fast_paths(model: Model) -> None:
    """Let `model` generate with the fast versions of `decode` and `attention`."""
    network = model.network
    with autocast(network.device, torch.float32):  # overrides the caller's autocast
        is_usual = use_fast_attention(network, torch.float32)
        if not is_usual or network.device.type != "cpu":
            return
        decoder = gpt2_decoder(network)
    if decoder is None:
        note_once(CHANGED)
    else:
        model.decode = decoder


class CudaGraph:
    """Replays `update` as one CUDA graph: a small network is limited by its kernel launches.

    Not yet run on a GPU. `update` must keep its tensors at fixed addresses and never wait for the
    device.
    """

    def __init__(self, update: Callable[[], None]):
        self.update = update
        self.stream = torch.cuda.Stream()
        self.calls = 0

    def __call__(self) -> None:
        self.calls += 1
        if self.calls == 4:  # after a warm-up on the stream that captures
            self.capture()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.update()
        torch.cuda.current_stream().wait_stream(self.stream)

    def capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                self.update()
            self.update = graph.replay
        except RuntimeError as error:
            note_once(f"no CUDA graph ({first_line(error.__context__ or error)}); slower without")
            del graph  # its memory is needed
            # Before PyTorch 2.12 the random generator stays in capture mode after a failure.
            generator = torch.cuda.default_generators[torch.cuda.current_device()]
            generator.graphsafe_set_state(generator.clone_state())


# ---- distributed ---------------------------------------------------------------------------------


class DistributedContext(NamedTuple):
    """Rank and world size of this process; (0, 1) without torchrun."""

    rank: int = 0
    world_size: int = 1

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any_rank(self, flag: bool) -> bool:
        """Logical OR of a flag over all ranks."""
        return bool(self.all_reduce(torch.tensor(bool(flag), dtype=torch.int, device="cpu")))

    def gather(self, value) -> list:
        """The value of each rank."""
        values = [value]
        if self.world_size > 1:  # pickled, but among our own processes only
            values = [None] * self.world_size
            dist.all_gather_object(values, value)
        return values

    def check_equal(self, text: str) -> None:
        """raises: UserError unless all ranks have the same text"""
        is_equal = len(set(self.gather(text))) == 1
        require(is_equal, "torchrun: the ranks differ in options, text or checkpoint")

    def on_all_ranks(self, fn: Callable):
        """Call fn() on every rank. A UserError on one is raised on all, so none waits for it."""
        result = None
        own_error = None
        try:
            result = fn()
        except UserError as error:
            own_error = error
        for error in filter(None, self.gather(own_error)):
            raise error
        return result


class DistributedTrainer(Trainer):
    """A Trainer for several processes, each of which computes a part of every batch."""

    def __init__(self, ctx: DistributedContext, *arguments):
        super().__init__(*arguments)
        self.ctx = ctx
        self.rank = ctx.rank
        n = self.cfg.batch_size
        is_enough = n >= ctx.world_size
        require(is_enough, f"`batch_size={n}`: must be at least {ctx.world_size}, one per rank")
        self.batch = self.local_rows(self.batch)

    def local_rows(self, windows: Tensor) -> Tensor:
        return windows.tensor_split(self.ctx.world_size)[self.ctx.rank]  # (B / ranks, T + 1)

    def backward(self) -> None:
        super().backward()
        # All gradients as one vector: many small messages would be slower.
        grads = [p.grad for p in self.network.parameters()]
        vector = nn.utils.parameters_to_vector([*grads, self.step_loss])
        self.ctx.all_reduce(vector)
        nn.utils.vector_to_parameters(vector, [*grads, self.step_loss])

    def validate(self) -> float:
        T = self.network.config.block_size
        n_windows = math.ceil((len(self.val_ids) - 1) / T)
        rank, world_size = self.ctx
        first = rank * n_windows // world_size
        last = (rank + 1) * n_windows // world_size
        part = self.val_ids[first * T : last * T + 1]
        total = torch.zeros(2, dtype=torch.float64, device="cpu")
        if part[1:].any():
            loss, count = evaluate(self.ema, part, self.dtype)
            total += torch.tensor([loss * count, count], dtype=torch.float64, device="cpu")
        loss_sum, count = self.ctx.all_reduce(total).tolist()
        return loss_sum / count


@contextmanager
def init_distributed(device: torch.device) -> Iterator[DistributedContext]:
    """Join the process group that torchrun describes in environment variables, if there is one."""
    if "WORLD_SIZE" not in os.environ:
        yield DistributedContext()
        return
    fix = "start with torchrun, or unset WORLD_SIZE"
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        value = os.environ.get(name, "")
        is_valid = value.isdecimal() and int(value) < 65_536
        require(is_valid, f"WORLD_SIZE is set, but {name}={printable(value)}: {fix}")
    require("MASTER_ADDR" in os.environ, f"WORLD_SIZE is set but not MASTER_ADDR; {fix}")
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    require(rank < world_size, f"RANK={rank}: must be below WORLD_SIZE={world_size}; {fix}")
    require(device.type != "mps", "torchrun: processes cannot share MPS; add `device=cpu`")
    backend = "gloo"
    if device.type == "cuda":
        backend = "cpu:gloo,cuda:nccl"
        n, n_gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        require(n <= n_gpus, f"--nproc-per-node {n}: must be at most {n_gpus}, one for each GPU")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # Rendezvous waits in C++, where Python's handlers do not run, so signals end the process here.
    with handle_signals(signal.SIG_DFL):
        try:
            store, _, _ = next(dist.rendezvous("env://"))
            # After a failure, torchrun's store still has the addresses of dead ranks.
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"torchrun: the ranks cannot connect: {first_line(error)}") from None
    try:
        yield DistributedContext(rank, world_size)
    finally:
        dist.destroy_process_group()


# ---- files ---------------------------------------------------------------------------------------
# Model files and checkpoints are safetensors files: weights, and JSON strings in the header.

MODEL = "model.safetensors"
CHECKPOINT_SUFFIX = ".checkpoint"
SUFFIXES = (".safetensors", CHECKPOINT_SUFFIX)  # of models
MAX_HEADER = 8 << 20  # bytes
MAX_NUMBER = 10**15  # of steps, losses and characters in a header


def flush_to_disk(path: Path) -> None:
    """fsync, or log a note if a network mount has none.  raises: OSError for a full disk"""
    with open(path, "rb+") as file:
        try:
            os.fsync(file.fileno())
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                raise
            note_once(
                f"this file system cannot flush ({error.strerror}); a power failure may lose files"
            )


@contextmanager
def atomic_write(path: Path, may_replace: Callable[[], bool] = lambda: True) -> Iterator[Path]:
    """Temporary file beside `path` that becomes `path` once it is complete and on the disk.

    `may_replace` is called last of all, whether or not `path` exists.  raises: OSError
    """
    path = real_path(path)  # a link stays a link
    temporary = path.with_name(f".anexa-{secrets.token_hex(6)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            raise OSError(errno.EINVAL, "is not a regular file")  # such as /dev/null
        for old in path.parent.glob(f".anexa-{'?' * 12}.tmp"):  # left by killed processes
            with suppress(OSError):  # another process may remove it, too
                if time.time() - old.stat().st_mtime > 86_400:
                    old.unlink()
        yield temporary
        flush_to_disk(temporary)
        if path.exists():
            try:
                shutil.copymode(path, temporary)
            except OSError as error:
                note_once(f"{path.parent}: file permissions cannot be copied ({error.strerror})")
        if not may_replace():
            raise FileExistsError(errno.EEXIST, "was created by another program")
        os.replace(temporary, path)
    except OSError as error:
        error.strerror = error.strerror or f"{error}: is the disk full?"  # NumPy sets none
        error.filename = str(path)  # a full disk does not name the file
        raise
    finally:
        with suppress(OSError):
            temporary.unlink()


def tensor_bytes(tensors: dict[str, Tensor], header: dict[str, str]) -> Iterator[bytes]:
    """Parts of a safetensors file. The library's writer has a random order and its own errors."""
    entries = {"__metadata__": header}
    end = 0
    for name, tensor in tensors.items():
        start = end
        end += 4 * tensor.numel()  # all are written in float32
        shape = list(tensor.shape)
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)  # aligns the tensors
    yield len(text).to_bytes(8, "little")
    yield text
    for tensor in tensors.values():
        tensor = tensor.detach().to("cpu", torch.float32)
        yield tensor.contiguous().numpy().data


def write_tensors(path: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    """Write a safetensors file, which must not exist yet."""
    with open(path, "xb") as file:
        file.writelines(tensor_bytes(tensors, header))


def save_tensors(tensors: dict[str, Tensor], path: str | Path, header: dict[str, str]) -> None:
    """Write a model file.  raises: OSError; UserError if `path` is a file that is not a model"""
    path = user_path(path)
    if path.exists():
        fix = "save the model under another name"
        require(not read_file(path, fix).is_checkpoint, f"{path}: is a checkpoint; {fix}")
    with atomic_write(path) as temporary:
        write_tensors(temporary, tensors, header)


Model.write_file = staticmethod(save_tensors)


def user_path(name: str | Path) -> Path:
    """A path with ~ expanded: no shell expands it in --out=~/x, or in a name in Python.

    raises: UserError if there is no home folder, or for a URL
    """
    require(isinstance(name, (str, os.PathLike)), f"`{name}`: must be the name of a file")
    name = os.fsdecode(name)
    is_local = not re.match(URL, name)
    fix = "only texts are downloaded, from http:// and https://; name a file on this computer"
    require(is_local, f"{printable(public_name(name))}: {fix}")
    require(name, "'': is an empty name, perhaps from an unset variable; give a name")
    require("\0" not in name, f"{printable(name)}: is not a valid file name; remove the \\0")
    path = Path(os.path.expanduser(name))
    require(path.parts[:1] != ("~",), f"{name}: there is no home folder; give the full path")
    return path


def real_path(path: Path) -> Path:
    """Where a path leads; Path.resolve() fails on a link to itself."""
    return Path(os.path.realpath(path))


def checkpoint_path(out: Path) -> Path:
    return out.with_name(out.name + CHECKPOINT_SUFFIX)  # no model can have this name


def file_id(path: Path) -> tuple | None:
    """Device, inode, time and size, to detect that the file was replaced; None if there is none."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size


def free_name(path: Path, word: str) -> Path:
    """`path` with `word` before its last suffix, numbered if such a file exists."""
    name = path.with_name(f"{path.stem}.{word}{path.suffix}")
    number = 1
    while os.path.lexists(name):
        number += 1
        name = path.with_name(f"{path.stem}.{word}{number}{path.suffix}")
    return name


def save_error(error: Exception) -> str:
    """Only the reason: str() of an OSError also has its number and the name of the file."""
    return getattr(error, "strerror", None) or first_line(error)


class RunFile:
    """A file that a run writes and rewrites. It never replaces or removes anyone else's file."""

    def __init__(self, path: Path):
        self.path = path
        self.written = None  # file_id() of what this run wrote or resumed

    def write(self, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
        """Write the file, under another name if a foreign file is there.  raises: OSError"""
        path = self.path
        if file_id(path) not in (None, self.written):
            path = free_name(path, "new")
            log(f"NOTE: {self.path} was created by another program; saving to {path}")
            self.written = None
        # Another file may appear in the meantime.
        with atomic_write(path, lambda: file_id(path) in (None, self.written)) as temporary:
            write_tensors(temporary, tensors, header)
        self.path = path
        self.written = file_id(path)

    def rescue(self, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
        """`write`, or if that fails, save to a temporary folder.  raises: UserError"""
        try:
            return self.write(tensors, header)
        except (OSError, MemoryError, RuntimeError) as error:
            reason = save_error(error)
        folder = None
        try:
            folder = tempfile.mkdtemp(prefix="anexa-")
            other = Path(folder, self.path.name)
            write_tensors(other, tensors, header)
        except (OSError, MemoryError, RuntimeError) as error:
            if folder:  # half a file would only waste space
                shutil.rmtree(folder, ignore_errors=True)
            failed = f"cannot be saved ({reason}), nor in a temporary folder ({save_error(error)})"
            raise UserError(f"{self.path}: {failed}; free up space, and resume") from None
        raise UserError(f"{self.path}: {reason}; saved to {other} instead: move it here")

    def remove(self) -> None:
        if self.written is not None and file_id(self.path) == self.written:
            self.path.unlink()
        self.written = None


def is_number(value) -> bool:
    return type(value) in (int, float) and abs(value) < MAX_NUMBER  # false for NaN


def check_metadata(m: Metadata) -> None:
    """raises: UserError, TypeError or ValueError unless everything in the header is plausible"""
    characters = m.characters
    is_vocab = characters == build_vocab(characters) and len(characters) == m.config.vocab_size
    require(is_vocab, "its characters are not U+FFFD and others in order")
    characters.encode()  # ValueError (UnicodeEncodeError) for surrogates
    has_names = type(m.data.names) is list and "".join(m.data.names)
    require(has_names, "its data set has no names")
    require(re.fullmatch("[0-9a-f]{64}", m.data.sha256), "its sha256 is not 64 hex digits")
    require(is_number(m.data.characters), "its data set has no number of characters")
    require(type(m.training) is dict, "its training settings are malformed")
    json.dumps(m.training, allow_nan=False)  # ValueError for NaN, which JSON lacks
    TrainConfig.check("init", m.training.get("init"))  # others may be from another version
    TrainConfig.check("max_steps", m.training.get("max_steps", 1))
    require(type(m.step) is int and 0 <= m.step < MAX_NUMBER, "its step is not a number")
    is_loss = m.validation_loss is None or is_number(m.validation_loss)
    require(is_loss, "its validation loss is not a number")
    steps = [row.step for row in m.history]
    is_history = all(is_number(x) for row in m.history for x in row)
    is_history = is_history and all(type(step) is int for step in steps)
    is_history = is_history and all(a < b for a, b in pairwise([-1, *steps, m.step + 1]))
    require(is_history, "its history is malformed")


class SavedFile(NamedTuple):
    """Content of a model file or a checkpoint."""

    path: Path
    metadata: Metadata
    tensors: dict[str, Tensor]

    @property
    def is_checkpoint(self) -> bool:
        return "loss_sum" in self.tensors


def read_file(path: Path, fix: str = "name another, or download it again") -> SavedFile:
    """Content of a model file or a checkpoint.  raises: UserError unless it is complete and ours"""
    if not path.exists():
        shown = missing_name(path)
        fix = "check the name"
        if not path.name.endswith(SUFFIXES):
            fix += "; a model file ends in .safetensors"
        elif path.suffix == ".safetensors" and shown == str(path):
            fix += f", or train it with: python anexagpt.py train --out {path}"
        unfinished = checkpoint_path(path)
        if unfinished.is_file():
            fix += f", or use its checkpoint, {unfinished}"
        raise UserError(f"{shown}: no such file; {fix}")
    try:
        require(not path.is_dir(), "it is a folder, not a .safetensors file")
        require(path.is_file(), "it is not a regular file")
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            require(0 < size <= MAX_HEADER, "it is not a safetensors file, or has a huge header")
            metadata = Metadata.from_header(json.loads(file.read(size))["__metadata__"])
            check_metadata(metadata)
            # Limits the memory used. A changed network may have fewer weights, or more.
            expected = 4 * metadata.config.n_parameters()
            actual = path.stat().st_size - size
            is_possible = max(expected, actual) < 10 * min(expected, actual) + (1 << 24)
            require(is_possible, "its tensors are not those of its config")
            file.seek(0)  # read, not mapped: the file may be replaced while it is in use
            return SavedFile(path, metadata, safetensors.torch.load(file.read()))
    except OSError as error:
        error.filename = str(path)  # read() does not name the file
        raise
    except KeyError as error:
        reason = f"it has no {error}"
    except (AttributeError, LookupError, RecursionError, TypeError) as error:
        reason = f"its header is malformed ({first_line(error)})"
    except (UserError, ValueError, SafetensorError) as error:
        reason = first_line(error)
    reason = printable(reason)[:200]
    raise UserError(f"{path}: not a complete model of Anexa: {reason}; {fix}")


def load(
    path: str | Path = MODEL, device: str | torch.device = "cpu", plain: bool = False
) -> Model:
    """The model in a model file, an exported model file, or a checkpoint.

    From a checkpoint it takes the best weights, or before the first evaluation the averaged ones.
    plain: without fast paths
    raises: UserError; OSError for a file that cannot be read
    """
    path = user_path(path)
    _, metadata, tensors = read_file(path)
    prefixes = ("", "transformer.", "best.", "ema.")
    prefix = next((p for p in prefixes if f"{p}wte.weight" in tensors), "")
    weights = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    if prefix == "transformer.":  # GPT-2's layout of linear weights is (in, out)
        for name, weight in weights.items():
            if name.startswith("h.") and weight.dim() == 2:
                weights[name] = weight.T
    # Initial weights are drawn here, whatever the default device and dtype, and replaced below.
    with torch.random.fork_rng([]), torch.device("cpu"):
        network = GPT(metadata.config).float()
    shapes = {name: (p.shape, p.dtype) for name, p in network.named_parameters()}
    found = {name: (weight.shape, weight.dtype) for name, weight in weights.items()}
    wrong = sorted(name for name in shapes | found if shapes.get(name) != found.get(name))
    not_complete = f"{path}: not a complete model of Anexa:"
    if wrong:
        names = printable(", ".join(wrong[:3]))[:200]
        raise UserError(f"{not_complete} its tensors {names} are unexpected; download it again")
    network.load_state_dict(weights)
    require(weights_are_sane(network), f"{not_complete} weights not finite; download it again")
    network = network.to(select_device(device)).eval()
    model = Model(network, Tokenizer(metadata.characters), metadata, path)
    if not plain:
        use_fast_paths(model)
    return model


# ---- text sources --------------------------------------------------------------------------------
# Names, files, folders and URLs become one text, read in pieces: it may not fit into memory.


class BuiltInText(NamedTuple):
    rights: str
    mirrors: tuple[str, ...] = ()
    ending: str = ""  # words near its end, absent from an error page or half a file


BUILT_IN = {
    "sherlock": BuiltInText(
        rights="public domain",
        mirrors=(
            "https://www.gutenberg.org/cache/epub/1661/pg1661.txt",
            "https://www.gutenberg.org/files/1661/1661-0.txt",
            "https://raw.githubusercontent.com/jsvine/markovify/master/test/texts/sherlock.txt",
        ),
        ending="I believe that she has met with considerable success",
    ),
    "shakespeare": BuiltInText(
        rights="public domain",
        mirrors=(
            "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
            "https://storage.googleapis.com/download.tensorflow.org/data/shakespeare.txt",
        ),
        ending="Whiles thou art waking.",
    ),
    # The language reference that comes with every Python: 465,000 characters, no network needed.
    "python-docs": BuiltInText(rights="Python's"),
}
FALLBACK = "python-docs"
CACHE = Path("data")  # for downloads
PIECE = 1 << 23  # characters to read at once: a book
MAX_DOWNLOAD = 2 << 30  # bytes
LONG_TEXT = 32 << 20  # from this many characters on, the ids are in a file, not in memory
MAX_NAMES = 1_000_000  # bytes that the names of all texts may take in the header of a model
COMMON_ENCODINGS = ["utf_8", "utf_16", "utf_16_le", "utf_16_be", "koi8_r"]
COMMON_ENCODINGS += ["cp1252", "cp1250", "cp1251", "cp1253", "cp1254", "cp1255", "cp1256"]
COMMON_ENCODINGS += ["gb18030", "big5", "shift_jis", "euc_jp", "euc_kr"]
TIMEOUT = (10, 15)  # seconds to connect, and until the next byte
MIN_SPEED = 500  # bytes per second, on average after TIMEOUT


# Beginning of a URL; a Path keeps only one slash. Without a limit, long words would take seconds.
URL = "(?i)[a-z][a-z0-9+.-]{1,40}:/"


def is_url(name: str) -> bool:
    return re.match("(?i)https?://", name) is not None


def public_name(name: str) -> str:
    """A URL without user, password, query and fragment, which may be secret; other names as is."""
    if not re.match(URL, name):
        return name
    scheme, _, rest = name.partition(":")
    try:
        parts = urlsplit(f"//{rest.lstrip('/')}")
        host = parts.hostname or ""
        if ":" in host:
            host = f"[{host}]"
        port = "" if parts.port is None else f":{parts.port}"
        return f"{scheme}://{host}{port}{parts.path}"
    except ValueError:  # a password with a slash, for example, is taken for a port
        return f"{scheme}://..."


def hide_secrets(text: str) -> str:
    """A message in which each URL is replaced with its public name."""
    url = rf"{URL}\S*?(?=[':;,.)]*(?:\s|$))"  # without punctuation at its end
    return re.sub(url, lambda match: public_name(match[0]), text)


def missing_name(name: str | Path) -> str:
    """How to show a name that no file has: it may be a mistyped URL, with secrets."""
    name = public_name(str(name)[:4_096])  # a text given as a name would take minutes
    if re.match(r"(?i)//|\W*https?\b|[^/]*:[^/]*@", name):
        name = re.sub(r"[^/\\]*@|#.*", "", name)  # user, password, fragment
    return printable(re.sub(r"(?s)(\?).*|(#).*=.*", r"\1\2...", name))


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def cache_folder() -> Path:
    """The folder for downloads: data/, or one in the home folder if data/ is not writable."""
    place = CACHE if os.path.lexists(CACHE) else Path(".")
    if place.is_dir() and os.access(place, os.W_OK):
        return CACHE
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "anexa"
    except RuntimeError:  # no home folder
        return CACHE


def is_download(path: Path) -> bool:
    return path.name.startswith("anexa-") and path.with_suffix(".sha256").is_file()


def is_intact(path: Path) -> bool:
    """Whether a stored download matches the SHA-256 in the file beside it."""
    try:
        recorded = path.with_suffix(".sha256").read_text().split()[0]
        return path.is_file() and sha256_of(path) == recorded
    except (OSError, ValueError, IndexError):
        return False


def check_download(path: Path, url: str, type: str, ending: str) -> None:
    """raises: UserError for half a text, or for a web page instead of a text"""
    with open(path, "rb") as file:
        first = file.read(10_000)
        file.seek(max(0, path.stat().st_size - 100_000))
        last = file.read().decode("utf-8", "replace")
    start = first.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    has_tag = start.startswith(b"<") and re.search(rb"<(!doctype html|html|head)\b", start)
    is_page = has_tag or "html" in type.lower()
    wants_page = urlsplit(url).path.lower().endswith((".html", ".htm"))
    fix = "a login or a viewer; give the address of the plain text"
    require(wants_page or not is_page, f"a web page, perhaps {fix}")
    require(first, "an empty answer")
    words = " ".join(last.split())  # regardless of line breaks
    require(ending in words, "not the expected text, or incomplete")


class MeteredAdapter(requests.adapters.HTTPAdapter):
    """Connections that fail if the server is too slow or sends too much.

    Everything that is read counts: headers, the page of a redirect, and the text.
    """

    def __init__(self):
        super().__init__()
        self.started = time.monotonic()
        self.n_bytes = 0

    def get_connection_with_tls_context(self, *args, **kwargs):
        pool = super().get_connection_with_tls_context(*args, **kwargs)
        pool.ConnectionCls = partial(self.connect, type(pool).ConnectionCls)
        return pool

    def connect(self, cls: type, **kwargs) -> http.client.HTTPConnection:
        connection = cls(**kwargs)
        connection.response_class = self.metered_response
        return connection

    def metered_response(self, *args, **kwargs) -> http.client.HTTPResponse:
        response = http.client.HTTPResponse(*args, **kwargs)
        raw = response.fp.raw
        read = raw.readinto

        def readinto(buffer) -> int:
            n = read(buffer)
            self.count(n)
            return n

        raw.readinto = readinto
        return response

    def count(self, n: int) -> None:
        """raises: UserError"""
        self.n_bytes += n
        require(self.n_bytes <= MAX_DOWNLOAD, f"more than {MAX_DOWNLOAD:,} bytes")
        slowest = MIN_SPEED * (time.monotonic() - self.started - sum(TIMEOUT))
        require(self.n_bytes > slowest, f"below {MIN_SPEED} bytes per second")


def fetch(url: str, path: Path, ending: str) -> None:
    """Download one address.  raises: OSError, UserError, or an error of requests or urllib3"""
    headers = {"Accept-Encoding": "identity"}  # so Content-Length is the text's
    session = requests.Session()
    adapter = MeteredAdapter()
    session.mount("http://", adapter)
    session.mount("https://", adapter)
    try:
        response = session.get(url, stream=True, timeout=TIMEOUT, headers=headers)
    except requests.RequestException:
        raise
    except OSError as error:  # not wrapped by requests: a missing certificate file
        fix = "correct REQUESTS_CA_BUNDLE and CURL_CA_BUNDLE, or unset them"
        raise UserError(f"{first_line(error)}; {fix}") from None
    require(response.status_code == 200, f"HTTP status {response.status_code}")
    coding = response.headers.get("Content-Encoding", "").lower()
    is_compressed = re.search(r"\b(gzip|deflate|compress|br|zstd)\b", coding)
    fix = "download it by hand, and unpack it"
    require(not is_compressed, f"the server sent it compressed ({coding[:20]}); {fix}")
    length = response.headers.get("Content-Length", "")
    total = int(length) if re.fullmatch("[0-9]{1,15}", length) else None
    with closing(response), atomic_write(path) as temporary:
        with open(temporary, "xb") as file, transient_bar() as bar:
            task = bar.add_task("", total=total)
            while piece := response.raw.read1(1 << 16):
                file.write(piece)
                bar.update(task, completed=file.tell())
        check_download(temporary, url, response.headers.get("Content-Type", ""), ending)
        # Written first, since a copy without it would not count as ours.
        with atomic_write(path.with_suffix(".sha256")) as record:
            record.write_text(f"{sha256_of(temporary)}  {path.name}\n")


def download_error(error: Exception) -> str:
    """Message for a failed download; that of the error has the URL, which may be secret."""
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        fix = "set REQUESTS_CA_BUNDLE to the certificate file of your network"
        return f"its certificate is not trusted; behind a proxy that inspects traffic, {fix}"
    if isinstance(error, requests.exceptions.SSLError):
        fix = "try http://; a file in REQUESTS_CA_BUNDLE or CURL_CA_BUNDLE must have PEM format"
        return f"the encrypted connection failed; {fix}"
    variables = "HTTP_PROXY, HTTPS_PROXY and ALL_PROXY"
    if isinstance(error, requests.exceptions.ProxyError):
        return f"the proxy failed; correct {variables}, or unset them"
    malformed = requests.exceptions.InvalidSchema, requests.exceptions.InvalidURL
    if isinstance(error, (*malformed, urllib3.exceptions.LocationParseError)):
        return f"the address, or that of a proxy in {variables}, is malformed or not supported"
    return f"the connection failed ({type(error).__name__})"


def download(name: str) -> Path:
    """The stored copy of a built-in text or URL, downloaded if there is none.  raises: UserError"""
    built_in = BUILT_IN.get(name, BuiltInText("", mirrors=(name,)))
    digest = hashlib.sha256(name.encode(errors="replace")).hexdigest()
    stem = name if name in BUILT_IN else digest[:16]
    file_name = f"anexa-{stem}.txt"  # no file of the user has this name
    path = cache_folder() / file_name
    for stored in (CACHE / file_name, path):
        if is_intact(stored):
            log(f"Reading {stored} (delete it to download the text again)")
            return stored
    if os.path.lexists(path):
        log(f"NOTE: {path} was changed; renamed to {path.rename(free_name(path, 'old'))}")
    reasons = []
    for url in built_in.mirrors:
        host = public_name(url).split("/")[2]
        log(f"Downloading {path} from {host} ...")
        try:
            fetch(url, path, built_in.ending)
            return path
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            reasons.append(f"{host}: {download_error(error)}")
        except (UserError, ValueError) as error:
            reasons.append(f"{host}: {first_line(error)}")  # it may quote the server
        except OSError as error:  # a UserError would lead to FALLBACK
            fix = "free up space, or start in another folder"
            error.strerror = f"cannot be stored ({save_error(error)}); {fix}"
            raise
    fix = "try again, or give a text file"
    raise UserError(
        f"`data={public_name(name)}`: cannot be downloaded ({'; '.join(reasons)}); {fix}"
    )


class Source(NamedTuple):
    """A file, or bytes, and how to read it."""

    content: Path | bytes
    encoding: str

    def open(self) -> io.BufferedIOBase:
        if isinstance(self.content, bytes):
            return io.BytesIO(self.content)
        return open(self.content, "rb")

    def __str__(self) -> str:
        return "the text" if isinstance(self.content, bytes) else printable(str(self.content))


def find_texts(name: str, encoding: str) -> list[Source]:
    """What a name of --data stands for.  raises: UserError"""
    if name in BUILT_IN and os.path.isfile(name):
        log(f"NOTE: {name} is the built-in text; for the file of that name give ./{name}")
    if name == FALLBACK:
        from pydoc_data.topics import topics

        text = "\n\n".join(topics[topic] for topic in sorted(topics))
        return [Source(text.encode(), "utf-8")]
    if name == "-":
        return [Source(sys.stdin.buffer.read(), encoding)]
    if name in BUILT_IN or is_url(name):
        return [Source(download(name), "utf-8" if name in BUILT_IN else encoding)]
    path = user_path(name)
    try:
        is_fifo = path.is_fifo()
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        fix = "is not the name of a file; in Python a text itself is given as train(text=...)"
        raise UserError(f"`data={printable(name[:40])}...`: {fix}") from None
    if is_fifo:
        return [Source(path.read_bytes(), encoding)]  # a pipe can be read only once
    if path.is_file():
        return [Source(path, encoding)]
    names = sorted(os.listdir(path)) if path.is_dir() else []
    found = [path / name for name in names if not name.startswith(".")]
    texts = [p for p in found if p.is_file() and p.suffix.lower() in (".txt", ".md")]
    texts = [p for p in texts if not is_download(p)] or texts  # the folder may be our data/
    if not texts and glob.has_magic(name):  # the shell did not expand *.txt
        texts = [Path(match) for match in sorted(glob.glob(str(path))) if os.path.isfile(match)]
    if not texts:
        known = f"no such file, folder of *.txt and *.md, or built-in text ({', '.join(BUILT_IN)})"
        raise UserError(f"`data={missing_name(name)}`: {known}; check the spelling")
    return [Source(text, encoding) for text in texts]


# Project Gutenberg's markers, today's and those of the 1990s; their lines may be wrapped.
MARKER = r"\*\*\*\s?%s\sOF\sTH(?:E|IS)\sPROJECT\sGUTENBERG\sE(?:BOOK|TEXT)[^*]{0,300}\*\*\*"
SMALL_PRINT = r"\*END\*?\s?THE\sSMALL\sPRINT![^*]{0,300}\*[^*\n]{0,40}\*END\*"
START = f"{MARKER % 'START'}|{SMALL_PRINT}"
LAST_LINE = r"(?i)(?:End of|Ende d\w+|Fin d\w+)\s(?:the |this )?Proje[ck]?t Gutenberg"


def split_books(text: str) -> list[str]:
    """Parts of `text` with one start marker each; what precedes the first goes with the first."""
    starts = [match.start() for match in re.finditer(START, text)]
    limits = [0, *starts[1:], len(text)]
    return [text[start:end] for start, end in pairwise(limits)]


def strip_license(text: str) -> str:
    """The book between a start marker and the last end marker; other text as it is."""
    start = re.search(START, text)
    if not start:
        return text
    ends = [match.start() for match in re.finditer(MARKER % "END", text)]
    ends = [end for end in ends if end >= start.end()]
    has_end = ends or start[0].startswith("*END")
    if not has_end:
        return text
    book = text[start.end() : max(ends, default=len(text))].strip()
    body, _, last_lines = book.rpartition("\n\n")
    if re.match(LAST_LINE, last_lines):
        book = body.strip()
    n_outside = len(text) - len(book)
    if n_outside > 30_000:  # header and license have about 20,000
        note_once(f"left out {n_outside:,} characters outside Project Gutenberg's markers")
    return book + "\n"


def strip_licenses(pieces: Iterator[str]) -> Iterator[str]:
    """Pieces of a text without the headers and footers of Project Gutenberg.

    A text that begins with a book may contain more books, each of several pieces.
    """
    text = next(pieces, "")
    separator = ""
    while re.search(START, text) and len(text) < LONG_TEXT:
        piece = next(pieces, "")
        *books, text = split_books(text + piece)
        for book in books:
            yield separator + strip_license(book)
            separator = "\n"
        if not piece:
            break
    yield separator + strip_license(text)
    yield from pieces


def guess_encodings(sample: bytes) -> list[str]:
    """Likely encodings of a text, given its beginning, in which a few bytes may be corrupt."""
    text = sample.decode("utf-8", "replace")
    n_corrupt = text.count(UNKNOWN)
    n_other = len(text) - len(text.encode("ascii", "ignore"))  # several bytes each in UTF-8
    if n_other > 2 * n_corrupt:  # other encodings are hardly ever valid UTF-8
        return ["utf-8"]
    guesses = charset_normalizer.from_bytes(sample, cp_isolation=COMMON_ENCODINGS)
    # Likeliest first; each guess stands for all encodings that decode the sample to the same text.
    names = [name.replace("_", "-") for guess in guesses for name in guess.could_be_from_charset]
    if {"cp1250", "cp1252"} <= {*names[:2]}:  # Central and Western Europe: few letters differ
        return ["cp1252", "cp1250"]
    return [name for name in names[:1] if name != "utf-8"]


# PDF; ZIP, as in Word; old Word; gzip; PNG; JPEG. Some encodings decode any bytes without error.
NOT_TEXT = (b"%PDF-", b"PK\3\4", b"\xd0\xcf\x11\xe0", b"\x1f\x8b", b"\x89PNG", b"\xff\xd8\xff")


def text_error(source: Source, replace_errors: bool) -> UserError:
    """Which byte of a file is not text, and what to do."""
    where = "undecodable bytes"
    decoder = codecs.getincrementaldecoder(source.encoding)()
    number = 1
    with source.open() as file:
        sample = file.read(100_000)
        file.seek(0)
        for line in chain(iter(partial(file.readline, PIECE), b""), [b""]):
            try:
                text = decoder.decode(line, final=not line)
                at = text.find("\0")
                byte = 0
                around = text[max(0, at - 20) : at + 20]
            except UnicodeDecodeError as error:
                at = error.start
                byte = error.object[at]
                around = error.object[max(0, at - 20) : at + 20].decode("ascii", "backslashreplace")
                text = error.object[:at].decode("latin-1")  # to count its line ends
            except UnicodeError:  # its position is unknown
                break
            if at >= 0:
                number += text.count("\n", 0, at)
                where = f"byte 0x{byte:02x} in line {number:,}, near '{printable(around)}'"
                break
            number += text.count("\n")
    fix = "save it as plain text, or give its `encoding`"
    given = codecs.lookup(source.encoding).name
    guesses = [name for name in guess_encodings(sample) if codecs.lookup(name).name != given]
    if guesses:
        fix = f"try {' or '.join(f'`encoding={name}`' for name in guesses)}"
    if not replace_errors:
        fix += ", or add `replace_errors` to read such bytes as U+FFFD"
    return UserError(f"{source}: not plain {source.encoding.upper()} text: {where}; {fix}")


def decoded_pieces(file: io.TextIOBase, replace_errors: bool) -> Iterator[str]:
    """Pieces of a file.  raises: UnicodeError"""
    for i, piece in enumerate(iter(partial(file.read, PIECE), "")):
        if i == 0:
            piece = piece.removeprefix("\ufeff")  # the byte order mark
        if replace_errors:
            piece = piece.replace("\0", UNKNOWN)
        piece.encode()  # fails for surrogates, which some encodings have
        if "\0" in piece:
            raise UnicodeError
        yield piece


def read_texts(sources: list[Source], replace_errors: bool = False) -> Iterator[str]:
    r"""Pieces of the texts, each text on a new line.  raises: UserError

    They have \n line ends, no byte order mark, and no license.
    """
    errors = "replace" if replace_errors else "strict"
    last = "\n"
    for source in sources:
        try:
            with io.TextIOWrapper(source.open(), source.encoding, errors) as file:
                is_text = not file.buffer.read(8).startswith(NOT_TEXT)
                fix = "save or unpack it as plain text"
                require(is_text, f"{source}: a PDF, Word, picture or compressed file; {fix}")
                file.seek(0)
                pieces = strip_licenses(decoded_pieces(file, replace_errors))
                for i, piece in enumerate(filter(None, pieces)):
                    if i == 0 and not last.endswith("\n"):
                        yield "\n"
                    yield piece
                    last = piece
        except UnicodeError:
            raise text_error(source, replace_errors) from None
        except OSError as error:
            error.filename = str(source)  # a broken disk does not name the file
            raise


def check_encoding(name: str) -> None:
    """raises: UserError unless Python knows it"""
    try:
        "".encode(name)
    except (LookupError, TypeError, ValueError):
        fix = "unknown to Python; try utf-8, latin-1 or cp1252"
        raise UserError(f"`encoding={name}`: {fix}") from None


def public_names(names: list[str]) -> list[str]:
    """Names of texts as a model file stores them.  raises: UserError if too long for its header"""
    shown = ["standard input" if name == "-" else public_name(name) for name in names]
    n = len(json.dumps(json.dumps(shown)))  # as in the header
    fix = f"but a model file has room for {MAX_NAMES:,}; join some of the texts"
    require(n <= MAX_NAMES, f"`data`: names of {n:,} bytes, {fix}")
    return shown


def store_ids(pieces: Iterable[ndarray], dtype: np.dtype, folder: str | None) -> ndarray:
    """Ids (N,) of a long text, in a nameless file.  raises: UserError if there is no room"""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            for piece in pieces:
                file.write(piece)
            return np.memmap(file, dtype, "r")
    except OSError as error:
        if error.filename:  # a text that cannot be read
            raise
        reason = f"the ids of the text cannot be stored ({save_error(error)})"
        place = folder or tempfile.gettempdir()
        raise UserError(f"{place}: {reason}; free up space, or choose another folder") from None


def load_corpus(
    names: list[str] | None,
    encoding: str = "utf-8",
    replace_errors: bool = False,
    folder: str | None = None,
) -> Corpus:
    """The texts of --data; without names, Sherlock Holmes or, if no mirror answers, FALLBACK.

    They are read twice: for their vocabulary, then for their ids. The ids of a long text are in a
    file in `folder`, by default the folder for temporary files.  raises: UserError
    """
    check_encoding(encoding)
    wanted = names or ["sherlock"]
    try:
        sources = [source for name in wanted for source in find_texts(name, encoding)]
    except UserError as error:
        if names:
            raise
        log(f"NOTE: {as_options(str(error))}.")
        log(f"NOTE: using {FALLBACK}, the language reference that comes with Python, instead.")
        return load_corpus([FALLBACK])
    files = [source.content for source in sources if isinstance(source.content, Path)]
    for path in [path for path, n in Counter(map(real_path, files)).items() if n > 1]:
        log(f"NOTE: {printable(str(path))} is given more than once")
    n_bytes = sum(map(os.path.getsize, files))  # the real path of /dev/stdin may be gone
    if n_bytes > 1 << 26:  # several seconds
        log(f"Reading {n_bytes:,} bytes ...")
    is_present = np.zeros(0x110000, bool)
    sha256 = hashlib.sha256()
    n = n_unknown = 0
    for piece in read_texts(sources, replace_errors):
        is_present[code_points(piece)] = True
        sha256.update(piece.encode())
        n += len(piece)
        n_unknown += piece.count(UNKNOWN)
    if replace_errors and n_unknown:
        log(f"NOTE: read as U+FFFD, the unknown character: {n_unknown:,} characters.")
    info = TextInfo(public_names(wanted), sha256.hexdigest(), n)
    is_text = is_present.sum() <= 65_535
    require(is_text, f"`data={info}`: more than 65,535 different characters; is it text?")
    tokenizer = Tokenizer(build_vocab(map(chr, is_present.nonzero()[0])))
    dtype = tokenizer.table.dtype
    pieces = map(tokenizer.encode, read_texts(sources, replace_errors))
    if n < LONG_TEXT:
        ids = np.frombuffer(b"".join(pieces), dtype)
    else:
        ids = store_ids(pieces, dtype, folder)
    return Corpus(info, tokenizer, ids)


# ---- terminal ------------------------------------------------------------------------------------
# Generated text goes to stdout, everything else to stderr.

STEERING = "[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"


def plain_console(stderr: bool = True) -> Console:
    """Console that prints text as it is."""
    console = Console(stderr=stderr, highlight=False, markup=False, emoji=False)
    if console.width < 1:  # from COLUMNS=0; it would print nothing
        console.width = 80
    return console


def escape_control(text: str) -> str:
    """`text` with control and bidirectional characters escaped: they could control a terminal."""
    return re.sub(STEERING, lambda match: spell_out(match[0]), text)


def first_line(error: Exception) -> str:
    """First line of another program's message, without control characters and backquotes.

    In our own messages, backquotes mark the names of settings.
    """
    text = escape_control(str(error) or type(error).__name__).partition("\n")[0]
    return text.replace("`", "'")


def write_stdout(text: str) -> None:
    """Print generated text: on a terminal without control characters, elsewhere as it is."""
    print(escape_control(text) if on_terminal(sys.stdout) else text, end="", flush=True)


def on_terminal(stream) -> bool:
    """Whether `stream` is a terminal; without a console it may be None or only have write()."""
    try:
        return stream.isatty()
    except (AttributeError, ValueError):
        return False


def transient_bar() -> rich.progress.Progress:
    """A progress bar that disappears at the end; none if stderr is not a terminal."""
    is_hidden = not on_terminal(sys.stderr)
    return rich.progress.Progress(console=plain_console(), transient=True, disable=is_hidden)


def log(text: str = "", rank_variable: str = "RANK") -> None:
    """Print a message to stderr, wrapped to a terminal.

    rank_variable: under torchrun, only processes in which this variable is 0 print. RANK is 0 in
        one process, LOCAL_RANK in one per machine; "" stands for every process.
    """
    rank = os.environ.get(rank_variable, "0") if "WORLD_SIZE" in os.environ else "0"
    if sys.stderr is None or (rank.isdecimal() and int(rank) > 0):
        return
    with suppress(OSError, ValueError):  # no reader or terminal any more, or closed
        if on_terminal(sys.stderr):
            plain_console().print(escape_control(text))
        else:
            print(escape_control(text), file=sys.stderr, flush=True)


@lru_cache
def note_once(text: str) -> None:
    log(f"NOTE: {text}")


def overfits(history: list[Evaluation]) -> bool:
    """Whether validation loss was above its best five times in a row while training loss fell."""
    best = min(history, key=lambda row: row.validation_loss)
    later = [row for row in history if row.step > best.step]
    return len(later) >= 5 and all(r.training_loss < best.training_loss for r in later[-5:])


class TensorBoard:
    """Writes scalars for TensorBoard immediately: PyTorch's SummaryWriter has a thread, in which a
    full disk ends in a traceback."""

    def __init__(self, folder: str | Path, first_step: int):
        """raises: UserError"""
        self.event = optional("tensorboard.compat.proto.event_pb2").Event
        records = optional("tensorboard.summary.writer.record_writer")
        self.folder = user_path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = open(self.folder / f"events.out.tfevents.{time.time_ns()}", "xb")  # noqa: SIM115
            self.writer = records.RecordWriter(file)
            self.write(file_version="brain.Event:2")
            # An interrupted run may have written points that the resumed run writes again.
            self.write(step=first_step, session_log={"status": "START"})
        except OSError as error:
            reason = f"cannot be written ({save_error(error)}); choose another folder"
            raise UserError(f"`tensorboard={folder}`: {reason}") from None

    def write(self, **content) -> None:
        """raises: OSError"""
        event = self.event(wall_time=time.time(), **content)
        self.writer.write(event.SerializeToString())
        self.writer.flush()

    def close(self) -> None:
        with suppress(OSError):
            self.writer.close()


def is_unlike(ids: ndarray, other_ids: ndarray, vocab_size: int) -> bool:
    """Whether the character frequencies of one text are a poor fit for another text."""
    pieces = np.array_split(ids, 1 + len(ids) // PIECE)  # bincount copies its input as int64
    counts = sum(np.bincount(piece, minlength=vocab_size) for piece in pieces)  # (V,)
    other_counts = np.bincount(other_ids, minlength=vocab_size)  # (V,)
    share = (counts + 0.5) / (len(ids) + 0.5 * vocab_size)
    losses = -np.log(share)  # (V,) nats per character
    loss = np.average(losses, weights=counts)
    return np.average(losses, weights=other_counts) > 1.25 * loss + 0.1


def log_run(t: Trainer) -> None:
    """Log the text, network, device and schedule of a run."""
    n = len(t.corpus.ids)
    m = t.metadata()
    if n < 100_000:
        log(f"NOTE: only {n:,} characters: expect scraps of words, not sentences.")
    epochs = t.cfg.max_steps * t.cfg.batch_size * m.config.block_size / len(t.train_ids)
    if is_unlike(t.train_ids, t.val_ids, len(m.characters)):
        log("NOTE: the end of the text, which is for validation, is unlike the rest, as in another")
        log("language: its loss says little, and the weights that are saved may not be the best.")
    init = f" of {t.cfg.init}" if t.cfg.init else ""
    log(
        f"{m.data}: {n:,} characters, {len(m.characters) - 1} different; "
        f"{m.config.size()}{init} on {t.device.type} in {m.training['dtype']}; "
        f"{t.cfg.max_steps:,} steps of {t.cfg.batch_size:,} x {m.config.block_size:,} characters, "
        f"{epochs:,.1f} epochs, dropout {t.cfg.dropout}; "
        f"validation on {len(t.val_ids):,} of {n - len(t.train_ids):,} characters"
    )


class ProgressDisplay:
    """Progress of a training run: a live line on a terminal or in a notebook, else plain lines."""

    def __init__(
        self,
        trainer: Trainer,
        is_shown: bool,
        has_checkpoint: bool = False,
        board: TensorBoard | None = None,
    ):
        self.trainer = trainer
        self.is_shown = is_shown
        self.has_checkpoint = has_checkpoint
        self.is_live = is_shown and (on_terminal(sys.stderr) or plain_console().is_jupyter)
        self.started = time.monotonic()
        self.first_step = trainer.steps_done
        self.step_end = self.started  # of the last step and its evaluation
        self.timed_seconds = 0.0  # of the steps that were timed
        self.timed_steps = 0
        self.evaluation_seconds = 0.0  # of the last evaluation
        trainer.validate = self.time_evaluation(trainer.validate)
        self.last_update = 0.0
        self.has_warned = False
        self.board = board
        if is_shown:
            log_run(trainer)

    def time_evaluation(self, validate: Callable[[], float]) -> Callable[[], float]:
        """Wrap `validate` to measure its time."""

        def timed() -> float:
            self.time_step()  # it is over, even on a GPU: its loss has been read
            started = time.monotonic()
            loss = validate()
            self.evaluation_seconds = time.monotonic() - started
            return loss

        return timed

    def time_step(self) -> None:
        """Count the time of the step that is over, if it is like most of those to come."""
        t = self.trainer
        is_first = t.steps_done <= self.first_step + 1  # slower
        is_short = t.context_length < t.network.config.block_size  # faster
        # A GPU may still be computing, so there the time of a single step means nothing.
        if not is_first and not (is_short and t.device.type == "cpu"):
            self.timed_seconds += time.monotonic() - self.step_end
            self.timed_steps += 1

    def seconds_per_step(self) -> float:
        """Mean over the steps that were timed, or over all if none was."""
        if self.timed_steps:
            return max(self.timed_seconds / self.timed_steps, 1e-9)
        seconds = max(time.monotonic() - self.started, 1e-9)
        return seconds / max(1, self.trainer.steps_done - self.first_step)

    def seconds_left(self) -> float:
        t = self.trainer
        steps = t.cfg.max_steps - t.steps_done
        interval = t.cfg.eval_interval
        evaluations = t.cfg.max_steps // interval - t.steps_done // interval
        return steps * self.seconds_per_step() + evaluations * self.evaluation_seconds

    def characters_per_second(self) -> float:
        t = self.trainer
        return t.cfg.batch_size * t.network.config.block_size / self.seconds_per_step()

    def losses(self) -> str:
        """Steps and both losses."""
        t = self.trainer
        last = t.history[-1] if t.history else Evaluation(0, math.nan, math.nan)
        training_loss = last.training_loss
        if t.steps_done > last.step:
            training_loss = t.mean_loss()
        losses = f"train {training_loss:.3f} val {last.validation_loss:.3f}".replace("nan", "  -  ")
        return f"{t.steps_done:,}/{t.cfg.max_steps:,} {losses}"

    def speed(self) -> str:
        """Characters per second and the time left."""
        left = str(timedelta(seconds=int(self.seconds_left()))).removeprefix("0:")
        return f"{self.characters_per_second():,.0f} char/s {left} left"

    def show(self, line: str = "", end: str = "\r") -> None:
        """Print a line over the live line, which ends with a carriage return."""
        line = set_cell_size(printable(line), plain_console().width - 1)
        with suppress(OSError):
            print(line, end=end, file=sys.stderr, flush=True)

    def on_step(self) -> None:
        """Time the step, and refresh the live line, five times per second at most."""
        t = self.trainer
        was_evaluated = bool(t.history) and t.history[-1].step == t.steps_done
        if not was_evaluated:  # else it was timed before the evaluation
            self.time_step()
        self.step_end = time.monotonic()
        if self.is_live and time.monotonic() - self.last_update > 0.2:
            self.last_update = time.monotonic()
            self.show(f"{self.losses()} {self.speed()}")

    def on_evaluation(self, t: Trainer) -> None:
        """Report an evaluation with a sample of what the model writes."""
        if self.board:
            self.write_scalars()
        minutes = self.seconds_left() / 60
        if self.is_shown and t.steps_done == 50 and minutes > 10:
            time_left = f"{minutes:.0f} minutes" if minutes < 180 else f"{minutes / 60:,.0f} hours"
            log(f"NOTE: this run takes about {time_left}; a lower max-steps makes it shorter.")
            if self.has_checkpoint:
                log("After Ctrl-C, chat and generate can use its checkpoint.")
        if self.is_shown:
            model = Model(t.ema, t.corpus.tokenizer, t.metadata())
            sample = " ".join(model.generate(max_new=80, seed=0).split())
            if self.is_live:
                self.show(f"{self.losses()} | {sample}", "\n")
            else:
                log(f"{self.losses()} {self.speed()} | {printable(sample)}")
        if overfits(t.history) and not self.has_warned:
            self.has_warned = True
            log("NOTE: overfitting: validation loss rises while training loss falls. The best")
            log("weights are saved; try a higher dropout, fewer steps or more text.")

    def summary(self, model: Model) -> None:
        """Report a finished run."""
        if self.is_live:
            self.show()  # the next line may be shorter than the live line
        t = self.trainer
        lowest = min(row.validation_loss for row in t.history)
        if t.cfg.init and t.best_loss < lowest - 1e-6:  # which is rounded
            log("NOTE: training did not improve on the initial weights, which are saved.")
        if self.is_shown:
            log(f"{loss_chart(t.history)}\n{model.metadata}.")

    def write_scalars(self) -> None:
        scalars = self.trainer.history[-1]._asdict()
        step = scalars.pop("step")
        scalars["lr_scale"] = lr_scale(step - 1, self.trainer.cfg)
        scalars["characters_per_second"] = self.characters_per_second()
        values = [{"tag": name, "simple_value": value} for name, value in scalars.items()]
        try:
            self.board.write(step=step, summary={"value": values})
        except OSError as error:
            reason = save_error(error)
            log(f"NOTE: {self.board.folder}: writing stopped ({reason}); training continues")
            self.board.close()
            self.board = None

    def close(self) -> None:
        del self.trainer.validate  # restores the method of the class
        if self.is_live:
            self.show()
        if self.board:
            self.board.close()


def loss_chart(history: list[Evaluation]) -> str:
    """Training (o) and validation (x) loss over the steps as lines of text."""
    width, height = 51, 12
    if len(history) < 2:
        return ""
    steps, *losses = np.array(history).T  # (N,) each
    columns = np.rint(steps / steps[-1] * (width - 1)).astype(int)
    later = [loss[steps >= steps[-1] / 10] for loss in losses]  # the first steps are far higher
    ticks = np.linspace(np.max(later), np.min(losses), height)
    grid = np.full((height, width), " ")
    for loss, mark in zip(losses, "ox", strict=True):
        rows = (ticks[0] - loss) / max(ticks[0] - ticks[-1], 1e-9) * (height - 1)
        grid[np.rint(rows.clip(min=0)).astype(int), columns] = mark
    lines = []
    for tick, row in zip(ticks, grid, strict=True):
        lines.append(f"{tick:7.3f} |{''.join(row).rstrip()}")
    lines.append(f"{'':8}+{'-' * width}")
    lines.append(f"{'':9}0{f'step {history[-1].step:,}':>{width - 1}}")
    lines.append(f"{'':9}loss in nats/char: o training, x validation")
    return "\n".join(lines)


@contextmanager
def handle_signals(handler, names=("SIGINT", "SIGTERM", "SIGHUP")) -> Iterator[None]:
    """Inside `with`, these signals (SIGINT is Ctrl-C) have this handler, except ignored ones."""
    before = {}
    try:
        if threading.current_thread() is threading.main_thread():
            for name in names:
                number = getattr(signal, name, None)  # Windows has no SIGHUP
                if number and signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                    before[number] = signal.signal(number, handler)
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)


class SignalCatcher:
    """Tells train() to stop after Ctrl-C, SIGTERM or SIGHUP, instead of ending the process.

    Until train() asks for the first time, just before the first step, a signal ends it at once. So
    does another Ctrl-C, but not within a second of the first signal: for one key press a terminal,
    a wrapper and torchrun may each send one.
    """

    def __init__(self):
        self.caught = []  # numbers of the signals
        self.first_time = 0.0
        self.is_asked = False

    def __call__(self) -> bool:
        self.is_asked = True
        return bool(self.caught)

    def handle(self, number, frame) -> None:
        if number == signal.SIGINT and not self.is_asked:
            raise KeyboardInterrupt
        if not self.is_asked:
            raise SystemExit(128 + number)
        now = time.monotonic()
        self.caught.append(number)
        if len(self.caught) == 1:
            self.first_time = now
            if os.environ.get("RANK", "0") == "0":
                words = b"\nStopping after this step ... (Ctrl-C again to quit without saving)\n"
                with suppress(OSError):  # not log(), which the signal may have interrupted
                    os.write(2, words)
        elif number == signal.SIGINT and now - self.first_time > 1:
            raise KeyboardInterrupt


class OneInterrupt(ContextDecorator):
    """Inside `with`, the first Ctrl-C raises KeyboardInterrupt; any other Ctrl-C does nothing.

    Otherwise the second of two quick presses would interrupt the handling of the first.
    """

    def __init__(self):
        self.is_armed = False

    def __enter__(self) -> None:
        self.is_armed = True

    def __exit__(self, *_) -> None:
        self.is_armed = False

    def handle(self, number, frame) -> None:
        if self.is_armed:
            self.is_armed = False
            raise KeyboardInterrupt


# ---- library -------------------------------------------------------------------------------------
# A run is identified by its output file. If that exists, the run is finished and never overwritten.
# Otherwise, a checkpoint beside it is resumed, with its settings and its text; if there is none,
# the run is new. With `restart` it is always new: the model is renamed, the checkpoint is deleted.

SIZES = {  # 0.8 M, 10.8 M and 86 M parameters
    "small": {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 256},
    "medium": {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256},
    "large": {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024},
}
FREE_SETTINGS = ("grad_accum", "checkpoint_interval")  # may differ from those of a saved run


def optional(module: str):
    """Import an optional package.  raises: UserError with the command that installs it"""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.split(".")[0]
        raise UserError(f"this needs {package}: pip install {package}") from None


def has_working_cuda() -> bool:
    """Whether a kernel runs: a GPU may be too old for this PyTorch."""
    try:
        return torch.ones(1, device="cuda").add(1).item() == 2
    except RuntimeError as error:
        note_once(f"the GPU is not used: {first_line(error)}")
        return False


def select_device(device: str | torch.device) -> torch.device:
    """The device with this name; the fastest for "auto".  raises: UserError if it is missing"""
    device = str(device).removesuffix(":0")  # a tensor's device has an index
    usable = ["cpu"]
    if torch.backends.mps.is_available():
        usable.insert(0, "mps")
    if torch.cuda.is_available() and (device != "auto" or has_working_cuda()):
        usable.insert(0, "cuda")
    if device == "auto":
        device = usable[0]
    require(device in usable, f"`device={device}`: not found; choose {' or '.join(usable)}")
    return torch.device(device)


def select_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype with this name; for "auto", the fastest on the device.  raises: UserError"""
    dtype = str(dtype).removeprefix("torch.")
    require(dtype in ("auto", "float32", "bfloat16"), f"`dtype={dtype}`: float32 or bfloat16")
    has_bf16 = False
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):  # not in PyTorch 2.9
        found = torch.cpu.get_capabilities()
        has_bf16 = found.get("avx512_bf16", False) or found.get("amx_bf16", False)
    use_bf16 = dtype == "bfloat16" or (dtype == "auto" and has_bf16)
    return torch.bfloat16 if use_bf16 else torch.float32


def check_settings(settings: dict) -> dict:
    """The requested settings; a size stands for four of them.  raises: UserError"""
    settings = dict(settings)
    if isinstance(settings.get("init"), (str, os.PathLike)):
        user_path(settings["init"])  # an empty name, for example, is an error
        settings["init"] = os.fsdecode(settings["init"])
    size = settings.pop("size", None)
    known = [f.name for cls in (GPTConfig, TrainConfig) for f in fields(cls) if f.metadata["help"]]
    for name, value in settings.items():
        require(name in known, f"`{name}`: unknown; choose from {', '.join(['size', *known])}")
        cls = TrainConfig if name in TrainConfig.__dataclass_fields__ else GPTConfig
        settings[name] = cls.check(name, value)
    if size is not None:
        size = str(size)
        require(size in SIZES, f"`size={size}`: must be one of {', '.join(SIZES)}")
        settings = SIZES[size] | settings
    return {name: value for name, value in settings.items() if value is not None}


def config_diff(asked: dict, saved: dict, *free: str) -> str:
    """The settings in `asked` that differ from those in `saved`; "" if none."""
    differing = []
    for name, value in asked.items():
        is_free = name in FREE_SETTINGS or name in free
        if name in saved and not is_free and value != saved[name]:
            was = f"no `{name}`" if saved[name] is None else f"`{name}={saved[name]}`"
            differing.append(f"{was}, not {value}")
    return ", ".join(differing)


def output_path(out: str | Path) -> Path:
    """The file that `out` leads to.

    raises: UserError unless a model, and all that its run writes beside it, can be saved there
    """
    out = user_path(out)
    if out.is_symlink():  # two names of one file are one run
        out = real_path(out)
    is_file = out.suffix == ".safetensors" and not out.is_dir()
    fix = "must be a file ending in .safetensors; choose another name"
    require(is_file, f"`out={missing_name(out)}`: {fix}")
    for path in (out, checkpoint_path(out)):
        try:
            file_id(path)
        except (OSError, ValueError) as error:
            raise UserError(f"`out={out}`: {save_error(error)}; choose another name") from None
    return out


class RunFiles:
    """The model file of a run and its checkpoint."""

    def __init__(self, out: str | Path):
        self.model = RunFile(output_path(out))
        self.checkpoint = RunFile(checkpoint_path(self.model.path))
        self.next_save = math.inf  # when a checkpoint is due

    def find_checkpoint(self, asked: dict, restart: bool) -> SavedFile | None:
        """The run to resume, or None for a new one.  raises: UserError if it must not begin"""
        out = self.model.path
        path = self.checkpoint.path
        unfinished = None
        if os.path.lexists(path):  # even with `restart`, which removes it
            fix = "move it away, or choose another `out`"
            require(path.exists(), f"{path}: is a broken link; remove it, or choose another `out`")
            self.checkpoint.written = file_id(path)
            unfinished = read_file(path, fix)
            require(unfinished.is_checkpoint, f"{path}: is a model, not a checkpoint; {fix}")
        if restart:
            is_init = False
            if "init" in asked and path.exists():
                init = user_path(asked["init"])
                is_init = init.exists() and path.samefile(init)
            fix = "`restart` would discard it; choose another `out`"
            require(not is_init, f"`init={path}`: {fix}")
            return None
        if out.exists():
            done = read_file(out, "choose another `out`").metadata
            run = f"{done.data}, {done.step:,} steps"
            if diff := config_diff(asked, done.settings()):
                run += f" ({diff})"
            fix = "To keep it: `out=FILE`. To start over: `restart`."
            fix += f" To fine-tune it: `init={out}` `out=FILE`"
            if unfinished:
                fix += f". To resume {path}: move the model away"
            raise UserError(f"{out}: already holds a model trained on {run}. {fix}")
        if unfinished:
            m = unfinished.metadata
            if diff := config_diff(asked, m.settings(), "max_steps"):
                fix = "to resume, drop these options; to discard it, add `restart`"
                raise UserError(
                    f"{path}: is an unfinished run at step {m.step:,} with {diff}; {fix}"
                )
        return unfinished

    def begin(self, trainer: Trainer) -> None:
        """Log a resumed run; for a new one, rename an old model and delete an old checkpoint."""
        self.next_save = time.monotonic() + trainer.cfg.checkpoint_interval
        out = self.model.path
        if trainer.steps_done:
            return log(f"Resuming {self.checkpoint.path} at step {trainer.steps_done:,}.")
        if out.exists():  # `restart`
            old = out.rename(free_name(out, "old"))
            log(f"{out}: renamed to {old}")
        self.checkpoint.remove()  # else it would be resumed after an early crash

    def save_checkpoint(self, trainer: Trainer, is_last: bool) -> None:
        """Takes at most 1% of the time.  raises: UserError if the last one cannot be saved"""
        started = time.monotonic()
        header = trainer.metadata().to_header("checkpoint")
        if is_last:
            return self.checkpoint.rescue(trainer.state_dict(), header)
        try:
            self.checkpoint.write(trainer.state_dict(), header)
        except (OSError, MemoryError, RuntimeError) as error:
            log(f"NOTE: {self.checkpoint.path}: not saved ({save_error(error)}); continuing")
        now = time.monotonic()
        self.next_save = now + max(trainer.cfg.checkpoint_interval, 100 * (now - started))

    def save_model(self, model: Model) -> None:
        """raises: UserError"""
        weights = dict(model.network.named_parameters())
        self.model.rescue(weights, model.metadata.to_header())
        try:
            self.checkpoint.remove()
        except OSError as error:
            log(f"NOTE: {self.checkpoint.path}: cannot be removed ({error.strerror})")


def saved_names(metadata: Metadata) -> list[str]:
    """Names of the texts in the metadata of an untrusted file.  raises: UserError"""
    for name in metadata.data.names:
        is_remote = is_url(name) or re.match(r"[\\/]{2}", name)  # \\PC\FILE is a network path
        missing = f"the text of the model, {printable(name)}, is not here; name it with `data`"
        require(not is_remote, missing)
        path = Path(os.path.expanduser(name))
        is_here = name in BUILT_IN or os.path.exists(path)
        with suppress(ValueError, OSError):  # no file can have this name
            is_here = is_here or any(path.parent.glob(path.name))  # a pattern such as *.txt
        require(is_here, missing)
    return metadata.data.names


def initial_weights(model: Model, characters: str) -> dict[str, Tensor]:
    """Weights of `model` for another vocabulary: new characters get the mean embedding."""
    wte = model.network.wte.weight.detach()
    rows = to_tensor(model.tokenizer.encode(characters), wte.device)  # (V,), 0 if new
    embeddings = wte[rows]  # (V, C)
    embeddings[1:][rows[1:] == 0] = wte[1:].mean(dim=0)
    return model.network.state_dict() | {"wte.weight": embeddings}


def check_corpus(corpus: Corpus, block_size: int, can_shrink: bool) -> None:
    """raises: UserError if the text is too short, or broken"""
    needed = 10 * block_size + 10
    train_ids, val_ids = split_ids(corpus.ids)
    is_text = train_ids[1:].any() and val_ids[1:].any()
    mostly = "mostly U+FFFD, the mark of undecodable characters"
    fix = "save it again, or give its real `encoding`"
    require(is_text or len(corpus.ids) < needed, f"`data={corpus.info}`: {mostly}; {fix}")
    n = np.count_nonzero(corpus.ids)  # without U+FFFD
    fix = f"training needs {needed:,}, 10 windows; use a longer text"
    if can_shrink:
        fix += " or a smaller `block_size`"
    require(n >= needed, f"`data={corpus.info}`: {n:,} characters, but {fix}")


class Plan(NamedTuple):
    """Settings of a run, decided before its text is read."""

    config: GPTConfig
    cfg: TrainConfig
    init: Model | None
    unfinished: SavedFile | None


def make_plan(asked: dict, unfinished: SavedFile | None) -> Plan:
    """Each setting as requested, or else as in the unfinished run or in `init`.

    raises: UserError if `init` has another shape, or no steps are left
    """
    init = None
    shape = {}
    training = {}
    if unfinished:
        shape = asdict(unfinished.metadata.config)
        training = unfinished.metadata.training
    elif "init" in asked:
        init = load(asked["init"], plain=True)
        shape = asdict(init.metadata.config)
        if diff := config_diff(asked, shape, "dropout"):
            raise UserError(f"`init={asked['init']}`: is a model with {diff}; drop these options")
    config = GPTConfig.pick(shape | asked)
    cfg = TrainConfig.pick(training | asked)
    step = unfinished.metadata.step if unfinished else 0
    fix = f"step {step:,} is done; choose more"
    require(step < cfg.max_steps, f"`max_steps={cfg.max_steps}`: {fix}")
    return Plan(config, cfg, init, unfinished)


def make_trainer(
    plan: Plan, corpus: Corpus, device: torch.device, dtype: torch.dtype, ctx: DistributedContext
) -> Trainer:
    """Trainer of a new run, or of the unfinished one.  raises: UserError"""
    check_corpus(corpus, plan.config.block_size, can_shrink=plan.init is None)
    if plan.unfinished:
        path, metadata, tensors = plan.unfinished
        is_same = corpus.info.sha256 == metadata.data.sha256
        run = f"{path}: is an unfinished run on {metadata.data} at step {metadata.step:,}"
        fix = "to resume, give its text; to discard it, add `restart`"
        require(is_same, f"{run}, and `data={corpus.info}` is another text; {fix}")
    arguments = (corpus, plan.config, plan.cfg, device, dtype)
    trainer = Trainer(*arguments) if ctx.world_size == 1 else DistributedTrainer(ctx, *arguments)
    if plan.init:
        weights = initial_weights(plan.init, corpus.tokenizer.characters)
        trainer.network.load_state_dict(weights)
        trainer.ema.load_state_dict(weights)
    if plan.unfinished:
        try:
            trainer.load_state_dict(tensors, metadata)
        except UserError as error:
            fix = "move it away, or discard it with `restart`"
            raise UserError(f"{path}: cannot be resumed, {error}; {fix}") from None
    return trainer


@contextmanager
def training_lock(out: Path) -> Iterator[None]:
    """One training run per output file; the lock ends with the process.  raises: UserError"""
    # The file is not deleted: otherwise a second process could lock a new one of the same name.
    path = out.with_name(f".{out.name}.lock")
    lock = filelock.FileLock(path, timeout=0, mode=0o666, fallback_to_soft=False)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout:
        message = "another process trains it; wait, or choose another name"
        if not path.exists():  # it could not be created
            message = "cannot be written; choose another folder"
        raise UserError(f"`out={out}`: {message}") from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            reason = f"cannot be written ({save_error(error)})"
            raise UserError(f"`out={out}`: {reason}; choose another folder") from None
        note_once(f"no file locks in {out.parent}: do not train {out.name} in two processes")
    try:
        yield
    finally:
        lock.release()


def run_delay() -> float:
    """Seconds for which threads of this process were ready to run but waited for a core (Linux)."""
    seconds = 0.0
    for file in glob.iglob("/proc/self/task/*/schedstat"):
        with suppress(OSError):  # a thread that has just ended
            seconds += int(Path(file).read_text().split()[1]) / 1e9
    return seconds


def hold_team(is_calm: threading.Event) -> None:
    """Keep an idle team of OpenMP threads until `is_calm` is set."""
    torch.zeros(1 << 17).add_(1)  # large enough for a team of all threads
    is_calm.wait()


def is_oversubscribed(is_over: threading.Event) -> bool:
    """Whether more threads are ready to run than there are cores, in the next half second.

    False once `is_over` is set.
    """
    before = run_delay()
    if is_over.wait(0.5):
        return False
    # On two cores, idle: under 0.01; beside one busy process: over 0.2.
    return run_delay() - before > 0.05


ONE_WATCH = threading.Lock()  # held by the watching thread, which Ctrl-C does not interrupt


def watch_cores(is_over: threading.Event) -> None:
    """Add idle teams of OpenMP threads while the cores are oversubscribed; see share_cores."""
    if not ONE_WATCH.acquire(blocking=False):
        return  # another thread is watching already
    try:
        n_workers = torch.get_num_threads() - 1  # of a team
        n_cores = len(os.sched_getaffinity(0))
        n_teams = n_cores // n_workers if n_workers else 0
        while not is_over.is_set():
            if not is_oversubscribed(is_over):
                continue
            is_calm = threading.Event()
            thread = partial(threading.Thread, target=hold_team, args=[is_calm], daemon=True)
            teams = [thread() for _ in range(n_teams)]
            with suppress(RuntimeError):  # no more threads can start: only slower
                for team in teams:
                    team.start()
            while is_oversubscribed(is_over):
                pass
            is_calm.set()
            for team in teams:
                if team.is_alive():  # a team still computing would abort an exiting process
                    team.join()
    finally:
        ONE_WATCH.release()


@contextmanager
def share_cores() -> Iterator[None]:
    """Let PyTorch's threads sleep instead of spin while the cores are oversubscribed.

    A thread that waits for another spins for milliseconds. That is best on an idle machine, since
    waking up takes time. On a busy one, it occupies the core that the other thread needs, and
    training takes several times as long. GNU's OpenMP, which PyTorch uses on Linux, spins only
    briefly if it has more threads than the process has cores. So while the machine is busy, idle
    teams of OpenMP threads are added. On other systems this does nothing.
    source: do_spin() in libgomp/config/linux/wait.h of GCC
    """
    if sys.platform != "linux":  # nothing to measure
        yield
        return
    is_over = threading.Event()
    watch = threading.Thread(target=watch_cores, args=[is_over], daemon=True)
    try:
        with suppress(RuntimeError):  # no more threads can start
            watch.start()
        yield
    finally:
        is_over.set()
        if watch.is_alive():
            watch.join()


ONE_RUN = threading.RLock()


@contextmanager
def training_state(device: torch.device) -> Iterator[None]:
    """Enable gradients, float32 and a faster malloc for a run; restores the process afterwards.

    Runs in several threads take turns, since a process has only one random generator.
    """
    devices = [torch.cuda.current_device()] if device.type == "cuda" else []
    with ONE_RUN, torch.random.fork_rng(devices), ExitStack() as stack:
        for name in {"TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"} - os.environ.keys():
            stack.callback(os.environ.pop, name, None)  # PyTorch sets it
        stack.enter_context(share_cores())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        # Without a cache: otherwise all later steps would use the weights of the first one.
        stack.enter_context(torch.autocast(device.type, enabled=False, cache_enabled=False))
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        with suppress(AttributeError, OSError, TypeError):  # glibc: 5 to 20% of a step on a CPU
            libc = ctypes.CDLL(None)
            libc.mallopt(-4, 0)  # M_MMAP_MAX: pages of freed tensors are reused, not returned
            libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the same for the end of the heap
            stack.callback(libc.malloc_trim, 0)
            stack.callback(libc.mallopt, -1, 128 << 10)  # their defaults
            stack.callback(libc.mallopt, -4, 65_536)
        yield


def text_names(data: str | Path | Iterable[str | Path] | None) -> list[str]:
    """Names of texts as a list.  raises: UserError"""
    if data is None:
        return []
    if isinstance(data, (str, os.PathLike)):
        data = [data]
    is_several = isinstance(data, Iterable) and not isinstance(data, bytes)
    require(is_several, f"`data={printable(str(data))}`: must be the name of a text, or several")
    names = []
    for name in data:
        is_path = isinstance(name, os.PathLike)  # a Path always means a file
        name = os.fsdecode(name) if is_path else str(name)
        shown = missing_name(name)
        fix = f"chat opens it; to fine-tune it, give a text and `init={shown}`"
        is_model = name.endswith(SUFFIXES)
        require(not is_model, f"`data={shown}`: is a model, not a text; {fix}")
        is_ambiguous = is_path and name in ("-", *BUILT_IN)
        names.append(f"./{name}" if is_ambiguous else name)
    require(names, "`data`: is empty; name a text, or leave it out for Sherlock Holmes")
    return names


def use_fast_training(trainer: Trainer) -> None:
    """Make a step use the fast `attention` and, on a single GPU, a CUDA graph."""
    use_fast_attention(trainer.network, trainer.dtype)
    use_fast_attention(trainer.ema, trainer.dtype)
    if trainer.device.type == "cuda" and not isinstance(trainer, DistributedTrainer):
        # One graph for each context length, with and without an update of the matrices.
        graphs = defaultdict(partial(CudaGraph, trainer.update))
        trainer.update = lambda: graphs[trainer.context_length, trainer.is_muon_update]()


def train(
    data: str | Path | Iterable[str | Path] | None = None,
    *,
    text: str | None = None,
    out: str | Path | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    encoding: str = "utf-8",
    replace_errors: bool = False,
    restart: bool = False,
    progress: bool = True,
    plain: bool = False,
    tensorboard: str | Path | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    **settings,
) -> Model:
    """Train a model; returns it with the weights of its lowest validation loss.

    data: names of texts, files, folders or URLs, as for --data; or instead
    text: the text itself
    out: model file to write; with it, the run is locked, saved every minute, and resumed by the
        same call
    should_stop: called after each step; if true, the run ends and the best model so far is returned
    settings: size, init, and the fields of GPTConfig and TrainConfig, for example max_steps=1000
    raises: UserError; OSError for a text that cannot be read; KeyboardInterrupt, after which the
        same call resumes the last checkpoint
    """
    asked = check_settings(settings)
    names = text_names(data)
    require(text is None or not names, "`data` and `text`: give only one of them")
    device = select_device(device)
    selected_dtype = select_dtype(dtype, device)
    files = RunFiles(out) if out is not None else None
    with ExitStack() as stack:
        ctx = stack.enter_context(init_distributed(device))
        stack.enter_context(training_state(device))
        is_first = ctx.rank == 0

        def prepare() -> Trainer:
            unfinished = None
            if files and is_first:
                stack.enter_context(training_lock(files.model.path))
            if files:
                unfinished = files.find_checkpoint(asked, restart)
            plan = make_plan(asked, unfinished)
            if text is not None:
                corpus = Corpus.from_text(text)
            else:
                found = saved_names(unfinished.metadata) if unfinished and not names else names
                folder = files.model.path.parent if files else None
                corpus = load_corpus(found, encoding, replace_errors, folder)
            run_dtype = selected_dtype
            if unfinished and dtype == "auto":
                run_dtype = select_dtype(unfinished.metadata.training.get("dtype", "auto"), device)
            return make_trainer(plan, corpus, device, run_dtype, ctx)

        trainer = ctx.on_all_ranks(prepare)
        ctx.check_equal(repr(trainer.metadata()))
        if not plain:
            use_fast_training(trainer)
        board = None
        if tensorboard and is_first:
            board = TensorBoard(tensorboard, trainer.steps_done + 1)
        if files and is_first:  # nothing can fail any more: delete an old checkpoint
            files.begin(trainer)
        is_shown = progress and is_first
        display = ProgressDisplay(trainer, is_shown, has_checkpoint=files is not None, board=board)
        stack.enter_context(closing(display))
        model = run_training(trainer, files, ctx, display, should_stop)
    if not plain:
        use_fast_paths(model)
    return model


def run_training(
    trainer: Trainer,
    files: RunFiles | None,
    ctx: DistributedContext,
    display: ProgressDisplay,
    should_stop: Callable[[], bool],
) -> Model:
    """Train to the end, or until `should_stop()`; returns the best model, saved if `files`."""
    is_writer = files is not None and ctx.rank == 0

    def after_step(trainer: Trainer) -> bool:
        display.on_step()
        is_due = is_writer and time.monotonic() > files.next_save
        stop = ctx.any_rank(should_stop())
        is_unfinished = trainer.steps_done < trainer.cfg.max_steps
        if is_writer and is_unfinished and (stop or is_due):
            files.save_checkpoint(trainer, is_last=stop)
        return stop

    should_stop()  # from here on, a signal is a request to stop after the current step
    try:
        trainer.fit(display.on_evaluation, after_step)
    except Diverged as error:
        if is_writer and trainer.best_weights:
            files.save_model(trainer.best_model())
            error.args = (f"{error}; its best weights are saved in {files.model.path}",)
        raise
    model = trainer.best_model()
    is_done = trainer.steps_done == trainer.cfg.max_steps
    if is_done:
        display.summary(model)
        if is_writer:
            files.save_model(model)
    if files:
        model.path = files.model.path if is_done else files.checkpoint.path
    return model


# ---- chat ----------------------------------------------------------------------------------------
# The prompt loop and its commands, which include views of what the model computes.

VIEWS = ("tokens", "probs", "why", "attn")
COOL = ("", "#4a90c2", "#2f9e77", "#d9822b", "#d03a3a")  # for dark and for light terminals
WARM = ("", "#000000 on #fee391", "#000000 on #fe9929", "#ffffff on #b30000")
LABELS = {  # of the settings that change probabilities, in the order of process_logits
    "repetition_penalty": "penalty",
    "no_repeat_ngram_size": "ngram",
    "temperature": "temp",
    "top_k": "top-k",
    "top_p": "top-p",
    "min_p": "min-p",
}
MAX_VIEW = 2_000  # characters that a view shows


def spell_invisible(text: str) -> str:
    """`text` with each character that moves the cursor or has no width escaped."""
    return "".join(c if cell_len(c) > 0 else spell_out(c) for c in printable(text))


def annotate(parts: Iterable[str], styles: list[str], notes: list[str], width: int) -> Text:
    r"""Each of `parts` in its style, with its note below; \n ends a line."""
    lines = []
    cells_left = 0
    for part, style, note in zip(parts, styles, notes, strict=True):
        shown = spell_invisible(part)
        n_cells = max(cell_len(shown), len(note))
        if n_cells > cells_left:
            lines += [Text(), Text(style="dim")]  # characters, notes
            cells_left = width
        lines[-2].append(set_cell_size(shown, n_cells), style)
        lines[-1].append(f"{note:<{n_cells}}")
        cells_left = 0 if part == "\n" else cells_left - n_cells
    return Text("\n").join(lines)


def change_notice(changes: dict[str, str]) -> str:
    """A description of what normalize_prompt() changed; "" if nothing."""
    words = []
    for old, new in list(changes.items())[:10]:
        old = spell_invisible(old)
        words.append(f"read {old} as {spell_invisible(new)}" if new else f"dropped {old}")
    if len(changes) > 10:
        words.append(f"and {len(changes) - 10:,} more")
    return ", ".join(words)


def normalize_and_log(model: Model, text: str) -> str:
    """`text` in known characters; logs what was changed.  raises: UserError if none is known"""
    model.prompt_ids(text)  # an error if none is known
    text, changes = model.tokenizer.normalize_prompt(text)
    if changes:
        log(f"({change_notice(changes)})")
    return text


def log_context(model: Model, prompt: str) -> None:
    """Log how much of a long prompt is read."""
    n = len(prompt)
    T = model.network.config.block_size
    if n > T:
        log(f"(the context has {T:,} characters: the last {n - context_start(n, T):,} are read)")


def shown_part(text: str) -> str:
    """`text`, or only its end if it is too long for a view, which is then logged."""
    if len(text) > MAX_VIEW:
        log(f"(of {len(text):,} characters the last {MAX_VIEW:,} are shown)")
    return text[-MAX_VIEW:]


def view_tokens(model: Model, text: str, console: Console) -> None:
    """Ids of a text, and the replacements of unknown characters."""
    text = shown_part(text)
    tokenizer = model.tokenizer
    styles = []
    notes = []
    clusters = list(split_clusters(unify_newlines(text)))
    for cluster in clusters:
        known, _ = tokenizer.normalize_prompt(cluster)
        ids = "+".join(map(str, tokenizer.encode(known))) or "-"
        styles.append(WARM[1] if cluster != known else "")
        notes.append(f"{ids} ")
    known, changes = tokenizer.normalize_prompt(text)
    n = sum(map(len, clusters))
    console.print(annotate(clusters, styles, notes, console.width))
    console.print(f"characters: {n:,}, ids: {len(known):,}, of 1 to {len(tokenizer) - 1:,}")
    if changes:
        console.print(change_notice(changes))


def setting_columns(model: Model, text: str, cfg: SampleConfig) -> dict[str, ndarray]:
    """Probabilities (V,) of the next character: the model's, then after each active setting."""
    columns = {"model": model.next_characters(text)}
    neutral = SampleConfig(temperature=1.0)  # changes no probability
    active = {}
    for name, label in LABELS.items():
        value = getattr(cfg, name)
        if value != getattr(neutral, name):
            active[name] = value
            columns[f"{label} {value:g}"] = model.next_characters(text, **active)
    return columns


def view_probs(model: Model, text: str, cfg: SampleConfig, console: Console) -> None:
    """Chart of the probabilities of the next character, after each active setting."""
    columns = setting_columns(model, text, cfg)
    bar_width = (console.width - 8) // len(columns) - 7  # without the numbers
    unit = bar_width / max(p.max() for p in columns.values())  # cells for a probability of 1
    headers = [Column(name, style=COOL[1]) for name in columns]
    table = Table(Column("next", no_wrap=True), *headers, box=None, padding=(0, 1, 0, 0))
    n = max(4, min(12, console.height - 6))
    order = columns["model"].argsort(kind="stable")[::-1]  # likeliest first
    for i in order[:n]:
        cells = []
        for p in columns.values():
            bar = "█" * round(unit * p[i])
            cells.append(f"{100 * p[i]:4.1f} {bar}".rstrip() if p[i] else "   -")
        table.add_row(f"'{spell_invisible(model.tokenizer.characters[i])}'", *cells)
    sums = [p[order[n:]].sum() for p in columns.values()]
    table.add_row(f"{len(order[n:])} more", *(f"{100 * p:4.1f}" if p else "   -" for p in sums))
    context = model.tokenizer.decode(model.prompt_ids(text)[-20:])
    console.print(f"After '{spell_invisible(context)}', in percent:", table)


def view_why(model: Model, text: str, prompt: str, console: Console) -> None:
    """Surprise of each character of a text that follows a prompt."""
    text, _ = model.tokenizer.normalize_prompt(text)
    require(text, "there is no answer to look at; type a prompt")
    n_hidden = len(text) - len(shown_part(text))
    prompt = model.tokenizer.decode(model.prompt_ids(prompt)) + text[:n_hidden]
    text = text[n_hidden:]
    surprise = model.surprise(text, prompt)  # (N,)
    digits = [str(min(9, round(bits)) or "") for bits in surprise]
    styles = [WARM[min(3, int(bits / 2))] for bits in surprise]
    total = f"{surprise.sum():,.1f} bits, {surprise.mean():.3f} bits/char"
    console.print("Digit = surprise in bits: n means a 1-in-2^n chance")
    console.print(annotate(text, styles, digits, console.width))
    console.print(f"characters: {len(text):,}, {total}; least expected:")
    width = max(8, console.width - 34)
    for i in surprise.argsort(kind="stable")[:-4:-1]:
        before = prompt + text[:i]
        probs = model.next_characters(before)
        best = spell_invisible(model.tokenizer.characters[probs.argmax()])
        likeliest = f"('{best}' {-np.log2(probs.max()):.1f})"
        found = f"'{spell_invisible(text[i])}' {surprise[i]:.1f} bits"
        console.print(f"{found} {likeliest} after '{spell_invisible(before[-width:])}'")


def view_attn(model: Model, text: str, layer: str, head: str, console: Console) -> None:
    """Map of the attention within a text; by default of the last layer, averaged over its heads."""
    config = model.network.config
    for name, word, last in (("layer", layer, config.n_layer), ("head", head, config.n_head)):
        is_valid = not word or word in map(str, range(1, last + 1))
        require(is_valid, f"`{name}={word}`: must be from 1 to {last}")
    layer = int(layer or config.n_layer)
    weights = model.attention(text)[layer - 1]  # (H, T, T)
    which = f"head {head} of" if head else "mean of heads:"
    weights = weights[int(head) - 1] if head else weights.mean(0)  # (T, T)
    ids = model.prompt_ids(text)[-len(weights) :]
    names = [spell_invisible(model.tokenizer.characters[i]) for i in ids]
    n = min(len(ids), max(1, console.width // 2 - 8), max(8, console.height - 4))
    lines = Text(f"Layer {layer} of {config.n_layer}, {which} {config.n_head}\n")
    lines.append("attention from: ░ 5%  ▒ 15%  ▓ 30%  █ 60%\n    ")
    lines.append("".join(set_cell_size(c, 2) for c in names[-n:]), "bold")
    for name, row in zip(names[-n:], weights[-n:], strict=True):
        lines.append(f"\n {set_cell_size(name, 2)} ", "bold")
        for level in np.digitize(row[-n:], [0.05, 0.15, 0.3, 0.6]):
            lines.append(" ░▒▓█"[level] * 2, COOL[level])
        lines.append(f" '{names[row.argmax()]}' {row.max():.0%}")
    console.print(lines)


def log_label(text: str) -> None:
    """Print the beginning of a line to stderr."""
    with suppress(OSError, ValueError):  # as in log()
        print(text, end="", file=sys.stderr, flush=True)


class ChatCommand(NamedTuple):
    run: Callable[[Chat, str], None]
    usage: str
    help: str


class Chat:
    """A session with a model."""

    def __init__(self, model: Model, cfg: SampleConfig, load: Callable[[Path], Model]):
        self.model = model
        self.cfg = cfg
        self.load = load  # another model
        self.console = plain_console()
        self.prompt = ""  # of the last answer
        self.written = ""
        self.seed = None

    def respond(self, line: str) -> None:
        """Answer a prompt or run a command.  raises: UserError; EOFError to leave"""
        if line.startswith('"""'):
            text, _, rest = line[3:].partition('"""')
            return self.answer(text.removeprefix("\n").removesuffix("\n") + rest.rstrip())
        if line.strip() in ("quit", "exit"):
            raise EOFError
        if not line.startswith("/"):
            return self.answer(line)
        name, _, argument = line[1:].partition(" ")
        require(name in CHAT_COMMANDS, f"/{name}: unknown; /help lists the commands")
        command = CHAT_COMMANDS[name]
        if command.usage == "FILE":  # a terminal quotes the name of a file that is dropped on it
            argument = re.sub(r"""^(['"])(.*)\1$""", r"\2", argument.strip())
            require(argument, f"usage: /{name} FILE")
        command.run(self, argument)

    def answer(self, prompt: str, echo: bool = True) -> None:
        """Continue `prompt` until it is done or Ctrl-C; `echo`: print the prompt first."""
        text = normalize_and_log(self.model, prompt)
        log_context(self.model, text)
        require(text, "there is nothing to continue; type a prompt")
        start = context_start(len(text), self.model.network.config.block_size)
        self.seed = self.cfg.seed
        if self.seed is None:
            self.seed = secrets.randbelow(10**9)
        self.prompt = prompt
        self.written = ""
        is_cut = start > 0 or not echo
        log_label("Response: ..." if is_cut else "Response: ")
        with suppress(KeyboardInterrupt):  # ends the answer; keeps what is written
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

    def help(self, _: str) -> None:
        self.table((f"/{name} {c.usage}".rstrip(), c.help) for name, c in CHAT_COMMANDS.items())
        log('"""TEXT""" may have several lines, or begin with /. Ctrl-C stops an answer.')

    def set(self, argument: str) -> None:
        name, _, value = argument.strip().partition(" ")
        field_name = name.replace("-", "_")
        choices = ", ".join(option_name(setting.name) for setting in fields(SampleConfig))
        is_known = field_name in SampleConfig.__dataclass_fields__
        require(is_known, f"/set {name or 'NAME'}: choose from {choices}")
        kind = field_types(SampleConfig, field_name)[0]
        new = SampleConfig.__dataclass_fields__[field_name].default
        if value and kind is tuple:
            new = (*self.cfg.stop, unescape(value))
        elif value:
            new = value
            with suppress(ValueError):  # then the config reports the error
                new = kind(value)
        self.cfg = replace(self.cfg, **{field_name: new})
        log(f"({name} {self.setting(field_name)})")

    def setting(self, name: str) -> str:
        """The value of a sampling setting as text."""
        value = getattr(self.cfg, name)
        if isinstance(value, tuple):
            return " ".join(f"'{spell_invisible(text)}'" for text in value) or "none"
        return "random" if value is None else f"{value:,}"

    def show(self, _: str) -> None:
        rows = []
        for setting in fields(SampleConfig):
            name = setting.name
            rows.append((option_name(name), self.setting(name), setting.metadata["help"]))
        self.table(rows)
        log(f"model: {self.model.metadata}")
        if self.seed is not None:
            log(f"to repeat the last answer: /set seed {self.seed}, then /regen")

    def regen(self, _: str) -> None:
        self.answer(self.prompt)

    def more(self, _: str) -> None:
        self.answer(self.prompt + self.written, echo=False)

    def read(self, file: str) -> None:
        path = user_path(file)
        shown = missing_name(file)
        require(not path.is_dir(), f"/read {shown}: is a folder; name a text file in it")
        require(path.is_file(), f"/read {shown}: no such file; check the spelling")  # no pipe
        try:
            text = "".join(read_texts([Source(path, "utf-8")]))
        except UserError:  # its advice names command-line options
            raise UserError(f"/read {file}: not plain UTF-8 text; save it as such") from None
        self.answer(text.removesuffix("\n"))

    def switch_model(self, file: str) -> None:
        self.model = self.load(user_path(file))
        log(f"{file}: {self.model.metadata}")

    def tokens(self, text: str) -> None:
        view_tokens(self.model, text or self.prompt, self.console)

    def probs(self, text: str) -> None:
        text = normalize_and_log(self.model, text or self.prompt)
        view_probs(self.model, text, self.cfg, self.console)

    def why(self, text: str) -> None:
        if text:
            view_why(self.model, normalize_and_log(self.model, text), "", self.console)
        else:
            view_why(self.model, self.written, self.prompt, self.console)

    def attn(self, numbers: str) -> None:
        layer, head = [*numbers.split(), "", ""][:2]
        view_attn(self.model, self.prompt, layer, head, self.console)

    def quit(self, _: str) -> None:
        raise EOFError


CHAT_COMMANDS = {
    "help": ChatCommand(Chat.help, "", "list the commands"),
    "set": ChatCommand(Chat.set, "NAME [VALUE]", "change a setting, e.g. /set top-k 5"),
    "show": ChatCommand(Chat.show, "", "show the settings, the model, and the last seed"),
    "regen": ChatCommand(Chat.regen, "", "answer the last prompt again"),
    "more": ChatCommand(Chat.more, "", "continue the last answer"),
    "read": ChatCommand(Chat.read, "FILE", "continue the text in a file"),
    "model": ChatCommand(Chat.switch_model, "FILE", "switch to another model"),
    "tokens": ChatCommand(Chat.tokens, "[TEXT]", "show the ids of a text or the last prompt"),
    "probs": ChatCommand(Chat.probs, "[TEXT]", "chart what may come next, after each setting"),
    "why": ChatCommand(Chat.why, "[TEXT]", "show the surprise of a text or the last answer"),
    "attn": ChatCommand(Chat.attn, "[LAYER] [HEAD]", "map the attention in the last prompt"),
    "quit": ChatCommand(Chat.quit, "", "leave; so do quit, exit and Ctrl-D"),
}


def is_unclosed(text: str) -> bool:
    '''Whether a prompt begins with """ and waits for three more quotes.'''
    return text.startswith('"""') and '"""' not in text[3:]


def without_line_end(text: str) -> str:
    return text.removesuffix("\n").removesuffix("\r")


def read_line() -> str:
    """raises: EOFError"""
    if plain_console().is_jupyter:
        return input()
    line = sys.stdin.readline()  # input() may move the cursor; some terminals cannot
    if not line:
        raise EOFError
    return without_line_end(line)


def read_prompt() -> str:
    """A prompt from a pipe, a notebook, or a terminal that cannot move its cursor."""
    log_label("Prompt: ")
    try:
        lines = [read_line()]
    except EOFError:
        log()
        raise
    with suppress(EOFError):
        is_open = is_unclosed(lines[0])
        while is_open:
            lines.append(read_line())
            is_open = '"""' not in lines[-1]
    return "\n".join(lines)


class SafeHistory(history.FileHistory):
    """Prompts of earlier sessions; a full disk or an odd file does not stop a chat."""

    def load_history_strings(self) -> Iterable[str]:
        try:
            return list(super().load_history_strings())
        except OSError:
            return []

    def store_string(self, string: str) -> None:
        with suppress(OSError):
            super().store_string(string)


def open_history() -> history.History:
    folder = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    try:
        path = Path(folder, "anexa", "history").expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():  # a pipe would block
            return history.InMemoryHistory()
        path.touch(0o600)  # readable only by the user
        return SafeHistory(path)
    except (OSError, RuntimeError):  # no home folder, or a read-only one
        return history.InMemoryHistory()


class FileCompleter(completion.PathCompleter):
    """Completes names of files that can be typed: no undecodable bytes; a folder ends with /."""

    def get_completions(
        self, document: prompt_toolkit.document.Document, event: completion.CompleteEvent
    ) -> Iterator[completion.Completion]:
        for choice in super().get_completions(document, event):
            end = "/" if choice.display_text.endswith("/") else ""
            if not re.search("[\ud800-\udfff]", choice.text):
                yield completion.Completion(choice.text + end, display=choice.display)


def prompt_reader(interrupt: OneInterrupt) -> Callable[[], str]:
    """Function that reads a prompt; it raises EOFError at the end, KeyboardInterrupt at Ctrl-C."""
    is_terminal = on_terminal(sys.stdin) and on_terminal(sys.stdout)
    if not is_terminal or os.environ.get("TERM") == "dumb":
        return interrupt(read_prompt)  # in which Ctrl-C is a signal
    os.environ.setdefault("PROMPT_TOOLKIT_NO_CPR", "1")  # some terminals answer too late
    words = [f"/set {option_name(setting.name)}" for setting in fields(SampleConfig)]
    words += [f"/{name}" for name in CHAT_COMMANDS]
    files = dict.fromkeys(("/read", "/model"), FileCompleter(expanduser=True))
    # Without this, NestedCompleter offers /read in the middle of a word such as and/or.
    has_argument = Condition(lambda: " " in session.default_buffer.text)
    file_completer = completion.NestedCompleter(files)
    completers = [completion.WordCompleter(words, sentence=True)]
    completers.append(completion.ConditionalCompleter(file_completer, has_argument))
    keys = KeyBindings()
    # A pasted ESC[31m is taken for a mouse click, which prompt_toolkit then fails to parse.
    keys.add(Keys.Vt100MouseEvent)(lambda event: None)
    session = prompt_toolkit.PromptSession(
        "Prompt: ",
        history=open_history(),
        key_bindings=keys,
        completer=completion.merge_completers(completers),
        complete_while_typing=False,
        multiline=Condition(lambda: is_unclosed(session.default_buffer.text)),
        enable_suspend=True,
    )

    def read() -> str:
        line = session.prompt(handle_sigint=False)  # here Ctrl-C is a key
        return re.sub("[\ud800-\udfff]", UNKNOWN, line)  # undecodable bytes

    return read


def chat_loop(model: Model, cfg: SampleConfig, load: Callable[[Path], Model]) -> None:
    """The prompt loop, until `quit`, `exit` or the end of the input; `load` opens another model."""
    log("\n--- Interactive Generation ---\nEnter a prompt to continue (or 'quit' to exit)")
    chat = Chat(model, cfg, load)
    interrupt = OneInterrupt()
    read = prompt_reader(interrupt)
    with handle_signals(interrupt.handle, ["SIGINT"]):
        while True:
            try:
                line = read()
                with interrupt:
                    chat.respond(line)
            except EOFError:
                return
            except KeyboardInterrupt:
                log("(to leave: quit or Ctrl-D)")
            except UserError as error:
                log(f"({as_options(str(error)).removeprefix('--')})")
            except OSError as error:
                if not error.filename:
                    raise  # the terminal, or the reader of a pipe, is gone
                log(f"({error.filename}: {error.strerror})")


# ---- export --------------------------------------------------------------------------------------
# The same model for Hugging Face transformers, llama.cpp and the Hub.


def without_paths(metadata: Metadata) -> Metadata:
    """Metadata to publish: names of texts without folders."""

    def public(name: str) -> str:
        last = re.split(r"[/\\]", public_name(name).rstrip("/\\"))[-1]
        if last in BUILT_IN and last != name:  # not the built-in text
            return f"./{last}"
        return last or "text"

    training = dict(metadata.training)
    if training.get("init"):
        training["init"] = public(training["init"])
    names = [public(name) for name in metadata.data.names]
    return replace(metadata, data=metadata.data._replace(names=names), training=training)


def model_card(model: Model, title: str, license: str) -> str:
    """README.md for the Hub: front matter, then what a user of the model needs to know."""
    hub = optional("huggingface_hub")
    m = model.metadata
    text = str(m.data)
    is_built_in = text in BUILT_IN
    rights = BUILT_IN[text].rights if is_built_in else "its own"
    bits = m.validation_loss / math.log(2)
    sample = escape_control(model.generate(max_new=400, seed=0)).strip()
    words = re.findall(r"\w+", sample) or [""]
    prompt = words[0][: min(20, m.config.block_size // 2)]
    training = escape_control(", ".join(f"{k} {v}" for k, v in m.training.items()))
    results = []
    for name, value in (("loss", m.validation_loss), ("bits_per_character", bits)):
        results.append(hub.EvalResult("text-generation", "text", text, name, round(value, 4)))
    front = hub.ModelCardData(
        model_name=title, license=license, language="en" if is_built_in else None,
        library_name="transformers", pipeline_tag="text-generation", widget=[{"text": prompt}],
        tags=["anexa", "gpt2", "character-level"], eval_results=results,
    )  # fmt: skip
    return f"""\
---
{front.to_yaml()}
---
# {title}

A character-level GPT-2 with {m.config.size()}, trained from scratch with Anexa on {text}
({m.data.characters:,} characters, SHA-256 `{m.data.sha256}`). It continues a prompt in the manner
of that text:

{textwrap.indent(sample, "    ")}

It imitates one text: it knows no facts, answers no questions, and repeats the views and prejudices
of that text, sometimes its very sentences. Prompt and answer together have at most
{m.config.block_size:,} characters; beyond them transformers raises an error, and llama.cpp stops.
One token is one of {m.config.vocab_size:,} characters; any other is read as U+FFFD.

```python
from transformers import pipeline

write = pipeline("text-generation", model="{title}")
print(write("{prompt}", max_length={m.config.block_size})[0]["generated_text"])
```

With Anexa, at any length: `python anexagpt.py chat model.safetensors`. For llama.cpp:
`python anexagpt.py export model.safetensors --gguf model.gguf`, then
`llama-completion -m model.gguf -no-cnv --ignore-eos -n {m.config.block_size // 2} -p "{prompt}"`

Validation loss: {m.validation_loss:.4f} nats/char, {bits:.4f} bits/char, on the end of the text,
which was not trained on (these are the weights with the lowest). Training: {training}.

{textwrap.indent(loss_chart(m.history), "    ")}

License of the weights: {license}. License of the text: {rights}.
"""


def hub_documents(model: Model) -> dict[str, dict]:
    """The JSON files from which transformers loads a model, by name."""
    config = model.network.config
    vocab = {c: i for i, c in enumerate(model.tokenizer.characters)}
    # Only its length ends a text. An empty prompt stands for a line end, as in this program.
    ids = dict(bos_token_id=vocab.get("\n", 1), eos_token_id=None, pad_token_id=0)
    tokens = dict.fromkeys(("unk_token", "pad_token", "bos_token", "eos_token"), UNKNOWN)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
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
            attn_pdrop=0.0, embd_pdrop=config.dropout, resid_pdrop=config.dropout,
            **ids | dict(bos_token_id=None),
        ),
    }  # fmt: skip


def hub_files(model: Model, title: str, license: str) -> dict[str, bytes]:
    """Content of the files from which transformers loads a model, by name.  raises: UserError"""
    is_evaluated = model.metadata.validation_loss is not None
    require(is_evaluated, "this run has not been evaluated yet; train it for 50 steps or more")
    is_id = license.isascii() and license.isprintable()
    fix = "must be an identifier of the Hub, for example mit"
    require(is_id, f"`license={printable(license)}`: {fix}")
    model = copy.copy(model)
    model.metadata = without_paths(model.metadata)
    weights = {}
    for name, weight in model.network.named_parameters():
        if name.startswith("h."):  # transformers stores matrices as (in, out), ours are (out, in)
            weight = weight.t()
        weights[f"transformer.{name}"] = weight
    files = {
        MODEL: b"".join(tensor_bytes(weights, model.metadata.to_header())),
        "README.md": model_card(model, title, license).encode(),
    }
    for name, document in hub_documents(model).items():
        files[name] = json.dumps(document, indent=2, ensure_ascii=False).encode()
    return files


def gguf_entries(model: Model, name: str, half: bool) -> dict:
    """Key-value entries of a GGUF file, by the name of the writer's method for each."""
    gguf = optional("gguf")
    config = model.network.config
    spelling = gguf.bytes_to_unicode()  # GPT-2's visible character for each byte
    tokens = ["".join(spelling[byte] for byte in c.encode()) for c in model.tokenizer.characters]
    merges = {}  # a character of several bytes is merged from them, one byte at a time
    for token in tokens:
        merges |= {f"{token[:i]} {token[i]}": None for i in range(1, len(token))}
    types = [gguf.TokenType.NORMAL for _ in tokens]
    types[0] = gguf.TokenType.CONTROL
    return dict(
        name=name, description=f"Anexa {__version__}", context_length=config.block_size,
        embedding_length=config.n_embd, feed_forward_length=4 * config.n_embd,
        block_count=config.n_layer, head_count=config.n_head, layer_norm_eps=1e-5,
        file_type=gguf.LlamaFileType.MOSTLY_F16 if half else gguf.LlamaFileType.ALL_F32,
        tokenizer_model="gpt2", tokenizer_pre="gpt-2", token_list=tokens, token_types=types,
        token_merges=list(merges),
        # Without an end token llama.cpp would take id 11, an ordinary letter.
        bos_token_id=0, eos_token_id=0, unk_token_id=0, add_bos_token=False,
    )  # fmt: skip


def write_gguf(path: Path, model: Model, half: bool) -> None:
    """Write the model for llama.cpp; `half`: matrices in float16."""
    gguf = optional("gguf")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, model.network.config.n_layer)
    with atomic_write(path) as temporary:
        writer = gguf.GGUFWriter(temporary, "gpt2")
        for name, value in gguf_entries(model, printable(path.stem), half).items():
            getattr(writer, f"add_{name}")(value)
        for name, weight in model.network.named_parameters():
            is_half = half and weight.dim() == 2 and not name.startswith("wpe")
            weight = weight.detach().to(torch.half if is_half else torch.float)
            writer.add_tensor(names.get_name(name, (".weight", ".bias")), weight.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def require_gpt2(network: GPT) -> None:
    """raises: UserError if the network was changed: other programs would compute something else"""
    fix = "export it with the original program, or use it from Python"
    message = f"this network is not GPT-2, which other programs expect; {fix}"
    require(gpt2_decoder(copy.deepcopy(network).cpu().float().eval()), message)


def export(
    model: Model, folder: Path | None, gguf: Path | None, license: str, half: bool, force: bool
) -> None:
    """Write a folder for transformers, a GGUF file, or both.  raises: UserError"""
    require_gpt2(model.network)
    require(gguf or not half, "`f16`: applies only to the GGUF file; add `gguf=FILE`")
    is_gguf = not gguf or gguf.suffix.lower() == ".gguf"  # so that it cannot replace README.md
    require(is_gguf, f"{gguf}: must end in .gguf; choose another name")
    is_folder = not folder or folder.is_dir() or not os.path.lexists(folder)
    require(is_folder, f"{folder}: is not a folder; choose another name")
    reserved = []
    if model.path:
        source = real_path(model.path)
        reserved = [source, source.parent]
    for path in filter(None, (folder, gguf)):
        exists = any(path.iterdir()) if path.is_dir() else path.exists()
        require(force or not exists, f"{path}: exists; choose another name, or add `force`")
        is_apart = real_path(path) not in reserved
        require(is_apart, f"{path}: is the model itself, or its folder; choose another name")
    contents = {}
    if folder:
        files = hub_files(model, printable(real_path(folder).name), license)
        contents = {folder / name: content for name, content in files.items()}
    for path in filter(None, [*contents, gguf]):
        require(not path.is_symlink(), f"{path}: is a link; remove it, or choose another name")
    if folder and (folder / MODEL).exists():
        is_trained = "wte.weight" in read_file(folder / MODEL, "choose another folder").tensors
        fix = "is a trained model, which `force` does not replace; choose another folder"
        require(not is_trained, f"{folder / MODEL}: {fix}")
    for path, content in contents.items():
        with atomic_write(path) as temporary:
            temporary.write_bytes(content)
    if folder:
        log(f"Written to {folder}: {', '.join(files)}")
    if gguf:
        write_gguf(gguf, model, half)
        log(f"Written to {gguf}, {gguf.stat().st_size:,} bytes")


def push(model: Model, name: str, license: str, private: bool) -> str:
    """Upload a model to the Hub; returns its address.  raises: UserError"""
    hub = optional("huggingface_hub")
    errors = optional("huggingface_hub.errors")
    utils = optional("huggingface_hub.utils")
    utils.logging.set_verbosity_error()  # no server warnings with control characters
    try:
        utils.validate_repo_id(name)
    except errors.HFValidationError:
        fix = "must be USER/NAME, of letters, digits, '-', '_' and '.'"
        raise UserError(f"{missing_name(name)}: {fix}") from None
    try:
        # The token is never an option: other users see the command line.
        has_token = bool(hub.get_token())
    except (OSError, ValueError) as error:  # a file that is not text
        raise UserError(f"{name}: not uploaded: {first_line(error)}") from None
    require(has_token, f"{name}: not logged in to the Hub; 'hf auth login', or set HF_TOKEN")
    require_gpt2(model.network)
    files = hub_files(model, name, license)  # before anything is created on the Hub
    commit = [hub.CommitOperationAdd(path, content) for path, content in files.items()]
    try:
        api = hub.HfApi()
        name = api.create_repo(name, private=private, exist_ok=True).repo_id
        if private and not api.model_info(name).private:
            fix = "make it private, or push to another name"
            raise UserError(f"{name}: exists and is public; {fix}")
        log(f"Uploading {len(files)} files, {sum(map(len, files.values())):,} bytes, to {name} ...")
        api.create_commit(name, commit, commit_message=f"Upload with Anexa {__version__}")
    except UserError:
        raise
    except Exception as error:  # the client does not check answers: bad ones may raise anything
        fix = "check name and connection, or 'hf auth login' with a token that may write there"
        token = repr(hub.get_token())[1:-1]  # as errors show control characters
        reason = first_line(error).replace(token, "...")
        if isinstance(error, (AttributeError, LookupError, TypeError)):
            reason = f"unexpected answer of the server ({reason})"
        raise UserError(f"{name}: not uploaded: {reason}; {fix}") from None
    return public_name(f"{hub.constants.ENDPOINT}/{name}")


# ---- command line --------------------------------------------------------------------------------
# Parses the arguments, calls the library, and prints.

DASHES = "what begins with - goes last, after --, for example: -- -text, or after --stop= or --out="


def unescape(text: str) -> str:
    return text.replace("\\n", "\n")


def option_name(name: str) -> str:
    return name.replace("_", "-")


def as_options(message: str) -> str:
    """A message in which settings, named as in Python, become command-line options."""

    def spell(match: re.Match) -> str:
        option = f"--{option_name(match[1])}"
        return option if match[2] is None else f"{option} {match[2]}"

    end = r"`(?=[:;,)]|\.?(?:\s|$))"  # a value may have backquotes of its own
    return re.sub(rf"`(\w+)(?:=(.*?))?{end}", spell, message)


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, and with options for the fields of a config."""

    def error(self, message):
        hint = f"see {self.prog} --help"
        is_unknown = message.startswith("unrecognized")
        takes_text = self.prog.endswith(("generate", "explain"))
        takes_name = message.startswith(("argument --stop", "argument --data", "argument --out"))
        if (is_unknown and takes_text) or takes_name:
            hint += f"; {DASHES}"
        if is_unknown:  # up to the first option: a value may be a token
            message = re.sub(r"(?s)( -[^\s=]+).*", r"\1", message)
        self.exit(2, f"{self.prog}: {printable(hide_secrets(message))} ({hint})\n")

    def add_config(self, title: str, config: type, skip: Iterable[str] = ()) -> None:
        """Add an option for each field; options that are not given are absent from the result."""
        group = self.add_argument_group(title)
        for setting in fields(config):
            help = setting.metadata["help"]
            if not help or setting.name in skip:
                continue
            if setting.default not in (None, ()):
                help += f" (default: {setting.default})"
            kind = field_types(config, setting.name)[0]
            kwargs = dict(type=unescape, action="append") if kind is tuple else dict(type=kind)
            kwargs["metavar"] = {int: "N", float: "X", tuple: "TEXT", str: "FILE"}[kind]
            flags = [f"--{option_name(setting.name)}"]
            if setting.name == "max_new":
                flags.append("-n")
            group.add_argument(*flags, default=argparse.SUPPRESS, help=help, **kwargs)


TEXTS = f"{', '.join(BUILT_IN)}, files, folders of *.txt and *.md, URLs, - for stdin"
FILE = dict(type=user_path, metavar="FILE")
FLAG = dict(action="store_true")
ARGUMENTS = (  # commands, option, keywords of add_argument; "words" are the arguments without --
    ("run train", "words", dict(metavar="TEXT", help="same as --data")),
    ("chat info", "words", dict(metavar="MODEL", help="same as --model")),
    ("generate", "words", dict(metavar="PROMPT", help="text, or - for stdin; and a model file")),
    ("explain", "words", dict(metavar="PROMPT", help="text, or - for stdin; and a model file")),
    ("eval", "words", dict(metavar="FILE", help="text file, or model file (*.safetensors)")),
    ("export", "words", dict(metavar="FILE", help="folder for transformers; model or GGUF file")),
    ("push", "words", dict(metavar="NAME", help="USER/NAME on the Hub; and a model file")),
    ("run train eval", "--data", dict(nargs="+", metavar="TEXT", help=TEXTS)),
    ("run train eval", "--encoding",
     dict(default="utf-8", metavar="NAME", help="encoding of text files (default: utf-8)")),
    ("run train eval", "--replace-errors", dict(**FLAG, help="read undecodable bytes as U+FFFD")),
    ("run train", "--out",
     dict(default=Path(MODEL), **FILE, help=f"model file to write (default: {MODEL})")),
    ("run train", "--size",
     dict(default=argparse.SUPPRESS, choices=SIZES, help="0.8 (default), 10.8 or 86 M parameters")),
    ("run train", "--restart", dict(**FLAG, help="start over; a finished model is renamed")),
    ("run train", "--quiet", dict(**FLAG, help="show no progress")),
    ("run train", "--tensorboard", dict(type=user_path, metavar="DIR", help="folder for its logs")),
    ("chat generate explain eval info export push", "--model",
     dict(default=Path(MODEL), **FILE, help=f"model or checkpoint (default: {MODEL})")),
    ("run train eval", "--device",
     dict(default="auto", choices=("auto", "cuda", "mps", "cpu"), help="default: GPU, else CPU")),
    ("chat generate explain", "--device",
     dict(default="auto", choices=("auto", "cuda", "mps", "cpu"),
          help="default: GPU, else CPU; CPU for one text of a small model")),
    ("run train eval", "--dtype",
     dict(default="auto", choices=("auto", "float32", "bfloat16"),
          help="default: depends on the device")),
    ("run train chat generate explain eval", "--plain",
     dict(**FLAG, help="turn off the fast paths (for learning or bug reports)")),
    ("generate", "-k --samples", dict(type=int, default=1, metavar="N", help="texts (default: 1)")),
    ("explain", "--view", dict(action="append", choices=VIEWS, help="may be repeated")),
    ("explain", "--layer", dict(default="", metavar="N", help="for attn (default: the last)")),
    ("explain", "--head", dict(default="", metavar="N", help="for attn (default: mean of all)")),
    ("info", "--json", dict(**FLAG, help="everything, with the loss history")),
    ("export", "--gguf", dict(**FILE, help="file for llama.cpp")),
    ("export", "--f16", dict(**FLAG, help="float16 matrices in the GGUF file")),
    ("export", "--force", dict(**FLAG, help="replace existing files")),
    ("export push", "--license", dict(default="unknown", metavar="ID", help="of the weights")),
    ("push", "--private", dict(**FLAG, help="visible only to you")),
)  # fmt: skip


def build_parser(name: str) -> Parser:
    """The parser of one command."""
    parser = Parser(f"anexagpt.py {name}", description=COMMANDS[name].help, allow_abbrev=False)
    parser.formatter_class = partial(argparse.HelpFormatter, max_help_position=34)
    parser.add_argument("--version", action="version", version=f"Anexa {__version__}")
    for commands, flags, kwargs in ARGUMENTS:
        if name not in commands.split():
            continue
        if flags == "words" or kwargs.get("nargs"):
            kwargs = dict(nargs="*", action="extend", default=[]) | kwargs
        parser.add_argument(*flags.split(), **kwargs)
    if name in ("run", "train"):
        parser.add_config("network", GPTConfig)
        parser.add_config("training", TrainConfig)
    if name in ("run", "chat", "generate", "explain"):
        skip = dict(run=["seed"], explain=["seed", "max_new", "stop"])
        parser.add_config("sampling", SampleConfig, skip.get(name, ()))
    return parser


def training_settings(args: argparse.Namespace) -> dict:
    """The size, shape and training settings that were given as options."""
    names = {"size", *GPTConfig.__dataclass_fields__, *TrainConfig.__dataclass_fields__}
    return {name: value for name, value in vars(args).items() if name in names}


def sampling_settings(args: argparse.Namespace) -> SampleConfig:
    return SampleConfig.pick(vars(args) | {"stop": tuple(getattr(args, "stop", ()))})


def take_model(args: argparse.Namespace, words: list[str]) -> Path:
    """The model file of a command: its only argument, or --model.  raises: UserError"""
    if len(words) > 1:
        raise UserError(f"unexpected argument '{missing_name(words[1])}'; give one model file")
    if not words:
        return args.model
    fix = f"{missing_name(words[0])} is given, too; drop one of them"
    require(args.model == Path(MODEL), f"`model={args.model}`: {fix}")
    return user_path(words[0])


def split_words(words: list[str]) -> tuple[list[str], list[str]]:
    """Those of a command's words that name a model, and the others."""
    models = [word for word in words if word.endswith(SUFFIXES)]
    others = [word for word in words if word not in models]
    return models, others


def take_prompt(args: argparse.Namespace, name: str) -> tuple[str, Path]:
    """Prompt and model file of a command.  raises: UserError"""
    models, prompts = split_words(args.words)
    require(prompts, f"give a {name}")
    if len(prompts) > 1:
        fix = "quote a prompt that has spaces; a model file ends in .safetensors"
        raise UserError(f"unexpected argument '{missing_name(prompts[1])}'; {fix}")
    path = take_model(args, models)
    prompt = prompts[0]
    if prompt == "-":  # a way to put line ends into a prompt on Windows
        prompt = without_line_end(sys.stdin.read())
    return prompt, path


def load_model(path: Path, args: argparse.Namespace, one_text: bool = True) -> Model:
    """A model on the --device; a small network writes one text faster on a CPU."""
    model = load(path, plain=True)
    device = select_device(args.device)
    is_small = model.network.config.n_parameters() < 4_000_000
    if not (one_text and is_small and args.device == "auto"):
        model.network.to(device)
    if not args.plain:
        use_fast_paths(model)
    if path.suffix == CHECKPOINT_SUFFIX:
        kind = "averaged" if model.metadata.validation_loss is None else "best"
        log(f"{path}: an unfinished run, at step {model.metadata.step:,}; its {kind} weights")
    return model


def cmd_train(args: argparse.Namespace, hint: str = "") -> Path:
    """Returns the path of the model file."""
    # torchrun repeats the command line after a failure, but --restart was meant for the first time.
    is_repeated = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    signals = SignalCatcher()
    with handle_signals(signals.handle):
        model = train(
            args.data + args.words or None,
            out=args.out,
            device=args.device,
            dtype=args.dtype,
            encoding=args.encoding,
            replace_errors=args.replace_errors,
            restart=args.restart and not (is_repeated and checkpoint_path(args.out).exists()),
            progress=not args.quiet,
            plain=args.plain,
            tensorboard=args.tensorboard,
            should_stop=signals,
            **training_settings(args),
        )
        is_unfinished = model.path.suffix == CHECKPOINT_SUFFIX
        if is_unfinished:
            log(f"Stopped at step {model.metadata.step:,}, saved in {model.path}.")
            place = checkpoint_path(output_path(args.out))
            command = "The same command"
            if model.path != place:
                command = f"Once it is renamed to {place}, the same command"
            log(f"{command}{' without --restart' if args.restart else ''} resumes it.")
        else:
            if hint and not args.quiet:
                log(hint)
            log("Training finished...")
            log(f"Model saved to {model.path}")
    if signals.caught or is_unfinished:  # another rank may have stopped it
        raise SystemExit(128 + (signals.caught[0] if signals.caught else signal.SIGINT))
    return model.path


def is_text_of(names: list[str], args: argparse.Namespace, m: Metadata) -> bool:
    """Whether these are the texts of a model: by their names, or else by their content.

    URLs are saved without their queries, and a file may have several names.
    """
    has_names = [public_name(name) for name in names] == m.data.names
    has_address = any(map(is_url, names))
    are_files = all(os.path.isfile(name) and name not in BUILT_IN for name in names)
    must_read = has_address if has_names else are_files
    if not must_read:
        return has_names
    try:
        corpus = load_corpus(names, args.encoding, args.replace_errors)
    except UserError as error:
        if has_names:  # without a network, the model can still be opened
            log(f"NOTE: {as_options(str(error))}")
        return has_names
    return corpus.info.sha256 == m.data.sha256


def refuse_torchrun() -> None:
    """raises: UserError under torchrun"""
    if "WORLD_SIZE" in os.environ:
        raise UserError("torchrun: several processes can train but not chat; use the command train")


def cmd_run(args: argparse.Namespace) -> None:
    refuse_torchrun()
    asked = check_settings(training_settings(args))
    out = args.out
    names = text_names(args.data + args.words or None)
    is_done = False
    if out.exists() and not args.restart:
        m = read_file(out, "choose another `out`").metadata
        is_same = not config_diff(asked, m.settings())
        is_done = is_same and (not names or is_text_of(names, args, m))
    sampling = replace(sampling_settings(args), seed=None)  # --seed is for the training run
    if is_done:
        log(f"{out}: {m}. /help lists the commands.")
    else:  # cmd_train refuses to overwrite a finished model
        out = cmd_train(args, hint="At the prompt, /help lists the commands.")
    chat_loop(load_model(out, args), sampling, partial(load_model, args=args))


def cmd_chat(args: argparse.Namespace) -> None:
    refuse_torchrun()
    sampling = sampling_settings(args)
    path = take_model(args, args.words)
    model = load_model(path, args)
    log(f"{path}: {model.metadata}. /help lists the commands.")
    chat_loop(model, sampling, partial(load_model, args=args))


def cmd_generate(args: argparse.Namespace) -> None:
    text, path = take_prompt(args, "prompt, the text to continue")
    cfg = sampling_settings(args)
    n = args.samples
    require(1 <= n <= 10_000, f"`samples={n}`: must be from 1 to 10,000")
    model = load_model(path, args, one_text=n == 1)
    prompt = normalize_and_log(model, text)
    log_context(model, prompt)
    if n == 1:
        write_stdout(prompt)
        for pieces in model.stream_batch(prompt, cfg):
            write_stdout(pieces[0])
        return write_stdout("\n")
    for first in range(0, n, 64):  # keys and values of more would fill the memory
        pieces = model.stream_batch(prompt, cfg, range(first, min(n, first + 64)))
        for text in map("".join, zip(*pieces, strict=True)):
            write_stdout(f"{prompt}{text}\n{'-' * 40}\n")


def cmd_explain(args: argparse.Namespace) -> None:
    text, path = take_prompt(args, "text to show")
    model = load_model(path, args)
    if "tokens" not in (args.view or VIEWS):  # view_tokens reports the changes
        text = normalize_and_log(model, text)
    cfg = sampling_settings(args)
    console = plain_console(stderr=False)
    shown = text or model.tokenizer.decode(model.prompt_ids(""))
    views = {
        "tokens": lambda: view_tokens(model, text, console),
        "probs": lambda: view_probs(model, text, cfg, console),
        "why": lambda: view_why(model, shown, "", console),
        "attn": lambda: view_attn(model, text, args.layer, args.head, console),
    }
    with console.capture() as output:  # so that an error precedes all of them
        for i, name in enumerate(args.view or VIEWS):
            if i > 0:
                console.print()
            views[name]()
    print(output.get(), end="", flush=True)


def cmd_eval(args: argparse.Namespace) -> None:
    models, texts = split_words(args.data + args.words)
    model = load_model(take_model(args, models), args, one_text=False)
    dtype = select_dtype(args.dtype, select_device(args.device))
    names = text_names(texts or saved_names(model.metadata))
    corpus = load_corpus(names, args.encoding, args.replace_errors)
    part = "whole text"
    ids = corpus.ids
    if corpus.info.sha256 == model.metadata.data.sha256:
        part = "validation part"
        _, ids = split_ids(ids)
    to_model_ids = model.tokenizer.encode(corpus.tokenizer.characters)  # (V,)
    ids = to_model_ids[ids]
    log(f"Evaluating on {corpus.info}, {part}: {len(ids):,} characters ...")
    with transient_bar() as bar:
        loss, n = evaluate(model.network, ids, dtype, partial(bar.track, description=""))
    losses = f"{loss:.4f} nats/char, {loss / math.log(2):.4f} bits/char"
    perplexity = math.exp(min(loss, 700))
    print(f"{corpus.info}, {part}: {losses}, perplexity {perplexity:.3f}, over {n:,} characters")
    if n_unknown := np.count_nonzero(ids == 0):
        log(f"(left out, as the model does not know them: {n_unknown:,})")


def cmd_info(args: argparse.Namespace) -> None:
    path = take_model(args, args.words)
    saved = read_file(path)
    m = saved.metadata
    if args.json:
        return print(json.dumps(m.entries()))

    def listed(settings: dict) -> str:
        return ", ".join(f"{k} {v}" for k, v in settings.items() if v is not None)

    rows = {
        "checkpoint" if saved.is_checkpoint else "model": f"{path}, {m}",
        "network": f"{m.config.n_parameters():,} parameters: {listed(asdict(m.config))}",
        "characters": f"{len(m.characters) - 1:,}: {m.characters[1:201]}",
        "data": f"{m.data}, {m.data.characters:,} characters, SHA-256 {m.data.sha256}",
        "training": listed(m.training),
    }
    for name, text in rows.items():
        print(f"{name:<12}{printable(text)}")
    print(loss_chart(m.history))


def cmd_export(args: argparse.Namespace) -> None:
    models, others = split_words(args.words)
    ggufs = [args.gguf] if args.gguf else []
    ggufs += [user_path(word) for word in others if word.lower().endswith(".gguf")]
    folders = [user_path(word) for word in others if not word.lower().endswith(".gguf")]
    if extra := [*ggufs[1:], *folders[1:]]:
        raise UserError(f"unexpected argument '{missing_name(extra[0])}'; give only one")
    require(folders or ggufs, "give a folder for transformers, `gguf=FILE`, or both")
    folder = folders[0] if folders else None
    gguf = ggufs[0] if ggufs else None
    model = load(take_model(args, models))
    export(model, folder, gguf, args.license, args.f16, args.force)


def cmd_push(args: argparse.Namespace) -> None:
    models, names = split_words(args.words)
    fix = "USER/NAME; a model file ends in .safetensors"
    require(len(names) == 1, f"give one name for the model on the Hub: {fix}")
    model = load(take_model(args, models))
    print(push(model, names[0], args.license, args.private))


class Command(NamedTuple):
    run: Callable[[argparse.Namespace], None]
    help: str


COMMANDS = {
    "run": Command(cmd_run, "train unless there is a model, then open the prompt (the default)"),
    "train": Command(cmd_train, "train a model and save it"),
    "chat": Command(cmd_chat, "open the prompt with a saved model"),
    "generate": Command(cmd_generate, "continue a prompt; stdout gets the text and nothing else"),
    "explain": Command(cmd_explain, "show ids, next characters, surprise, attention of a text"),
    "eval": Command(cmd_eval, "compute the loss of a model on a text"),
    "info": Command(cmd_info, "show what a model file contains"),
    "export": Command(cmd_export, "write the model for Hugging Face transformers or llama.cpp"),
    "push": Command(cmd_push, "upload the model to the Hugging Face Hub"),
}
EXAMPLES = """\
examples:
  python anexagpt.py                               train on Sherlock Holmes, then chat
  python anexagpt.py train --data shakespeare --out bard.safetensors
  python anexagpt.py train your.txt --init bard.safetensors --out me.safetensors
  python anexagpt.py generate "It was a" -n 300 > story.txt
  python anexagpt.py export bard.safetensors hf-bard --gguf bard.gguf

Ctrl-C stops a run and saves it; the same command resumes it.
'python anexagpt.py COMMAND --help' lists the options of a command."""


def overview() -> str:
    """The page of --help."""
    lines = ["usage: python anexagpt.py [COMMAND] [OPTIONS]", "", "commands:"]
    for name, command in COMMANDS.items():
        lines.append(f"  {name:<10} {command.help}")
    return "\n".join([*lines, "", EXAMPLES])


def check_words(words: list[str]) -> None:
    """Arguments given without a command must be texts.  raises: UserError"""
    for word in words:
        shown = missing_name(word)
        is_command = word in COMMANDS and not os.path.exists(word)
        is_late = is_command or word.endswith(SUFFIXES)
        require(not is_late, f"'{shown}': a command or a model comes first, then the options")
        is_text = word in BUILT_IN or word == "-" or "." in word or os.path.exists(word)
        names = ", ".join(COMMANDS)
        require(is_text, f"'{shown}' is neither a command ({names}) nor a text file")


def parse_args(argv: list[str]) -> tuple[Command, argparse.Namespace]:
    """Exits after --help, --version and errors of syntax.  raises: UserError"""
    if argv[:1] in (["-h"], ["--help"]):
        print(overview())
        raise SystemExit
    name = None
    if argv and argv[0] in COMMANDS:
        name, *argv = argv
    elif argv and argv[0].endswith(SUFFIXES):  # opens a model
        name = "chat"
    literal = []
    if "--" in argv:  # what follows is not an option
        at = argv.index("--")
        literal = argv[at + 1 :]
        argv = argv[:at]
    for word in argv:
        is_text = re.match(r"-[hnk](?!=?-?\d*$)", word)  # argparse would read -nothing as -n othing
        require(not is_text, f"'{missing_name(word)}': options begin with --; {DASHES}")
    args = build_parser(name or "run").parse_intermixed_args(argv)
    args.words += literal
    if not name:  # --data also consumes a command that follows it
        check_words([word for word in args.data if word in COMMANDS] + args.words)
    return COMMANDS[name or "run"], args


def prepare_streams() -> None:
    """Replace closed standard streams, and never fail on characters that a stream cannot encode."""
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        errors = "backslashreplace" if fd else "replace"
        if stream is None:
            stream = os.fdopen(os.open(os.devnull, os.O_RDWR), "w" if fd else "r")
            setattr(sys, name, stream)
        if isinstance(stream, io.TextIOWrapper):  # in a notebook it is another class
            encoding = stream.encoding if stream.isatty() or not fd else "utf-8"
            stream.reconfigure(encoding=encoding, errors=errors)


def explain_runtime_error(error: Exception) -> str | None:
    """One line for an internal error of PyTorch that a user can fix, else None."""
    # PyTorch's CPU allocator raises RuntimeError, with different words on Windows.
    words = "MemoryError|out of memory|can't allocate memory|not enough memory|bad_alloc"
    if re.search(words, repr(error)):
        fix = "a smaller --batch-size, --block-size or model; --grad-accum 2 keeps the batch"
        return f"out of memory; use {fix}"
    if re.search("(?i)gloo|nccl|c10d", str(error)):
        return "another rank failed; the same command resumes from the last checkpoint"
    return None


def main(argv: list[str]) -> int:
    """Run a command: 0, 2 after an error that the user can fix, 130 after Ctrl-C."""
    rank_variable = ""  # every process reports its own error
    try:
        prepare_streams()
        try:
            command, args = parse_args(argv)
            with share_cores():
                command.run(args)
        finally:
            sys.stdout.flush()  # else a full disk would be reported only when Python exits
        return 0
    except BrokenPipeError:  # stdout was closed, for example by head
        return 0
    except KeyboardInterrupt:
        return 130
    except UserError as error:
        message = as_options(str(error))
        rank_variable = "LOCAL_RANK"  # all ranks raise the same: once per machine is enough
    except OSError as error:
        message = f"{printable(str(error.filename or 'system'))}: {error.strerror or error}"
    except (MemoryError, RuntimeError) as error:
        message = explain_runtime_error(error)
        if message is None:
            raise
    log(f"anexagpt.py: {printable(hide_secrets(message))}", rank_variable)
    return 2


def drop_unwritten() -> None:
    """Discard what a stream cannot write; otherwise Python would report an error when it exits."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        status = main(sys.argv[1:])
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # no traceback during shutdown
        drop_unwritten()
    sys.exit(status)
