#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch==2.13.0",
#     "safetensors==0.8.0",
#     "packaging==26.3",
#     "requests==2.34.2",
#     "rich==15.0.0",
#     "filelock==4.2.11",
#     "numpy==2.2.6; python_version < '3.11'",
#     "numpy==2.4.6; python_version >= '3.11'",
#     "prompt_toolkit==3.0.53",
# ]
# ///
"""Anexa: a small GPT that you train in minutes, own, and talk to in your terminal.

    python anexagpt.py

downloads The Adventures of Sherlock Holmes, learns to write it one character at a time, saves what it has learnt to
model.safetensors, and then continues whatever you type. This file is the whole program. Read it from top to bottom:
every section uses only what stands above it.

    config -> data -> tokenizer -> model -> optimizer -> model file -> training -> generation -> REPL -> export -> CLI

    text (str) -> ids (N,) -> x, y (B, T) -> logits (B, T, V), loss -> weights -> model.safetensors -> characters

Shapes are written with one letter a dimension: B batch, T time (characters in a window), C channels (n_embd), H heads,
D = C / H channels of a head, S positions that can be looked at, V vocabulary (vocab_size), L layers (n_layer).
"""

from __future__ import annotations

import argparse
import codecs
import ctypes
import difflib
import errno
import hashlib
import importlib.util
import inspect
import io
import json
import math
import os
import queue
import re
import shutil
import signal
import sys
import tempfile
import textwrap
import threading
import time
import typing
import unicodedata
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from itertools import chain
from pathlib import Path

__version__ = "1.0.0"


# ---- config ----------------------------------------------------------------------------------------------------------
# A setting is one line: its type, default, limits and help. The command line, the checks and the model file all read
# that line.


class UserError(Exception):
    """Something a person can put right. The message gives the value, the rule and the cure; `main` prints it."""


def knob(default, help, low=None, high=None, choices=None, short=None):
    """Dataclass field that is also a command-line option, with the smallest and the largest value allowed."""
    return field(default=default, metadata=dict(help=help, low=low, high=high, choices=choices, short=short))


def kinds(config: type) -> dict[str, tuple[type, ...]]:
    """Types that each field of a config may have: (float, NoneType) for `float | None`, (tuple,) for any tuple."""
    return {
        name: (tuple,) if typing.get_origin(hint) is tuple else typing.get_args(hint) or (hint,)
        for name, hint in typing.get_type_hints(config).items()
    }


class Settings:
    """Base of the config dataclasses: whoever makes one, from options or from a file, gets values within the limits."""

    def __post_init__(self):
        for name, allowed in kinds(type(self)).items():
            value, rule = getattr(self, name), type(self).__dataclass_fields__[name].metadata
            option = f"--{name.replace('_', '-')} {value!r}"
            if type(value) not in allowed and not (type(value) is int and float in allowed):
                raise UserError(f"{option}: must be {' or '.join(t.__name__ for t in allowed)}")
            if rule.get("low") is not None and value is not None and not rule["low"] <= value <= rule["high"]:
                raise UserError(f"{option}: must be from {rule['low']:,} to {rule['high']:,}")
            if rule.get("choices") and value not in rule["choices"]:
                raise UserError(f"{option}: must be one of {', '.join(rule['choices'])}")


@dataclass(frozen=True)
class GPTConfig(Settings):
    """Shape of the network; stored in every model file, so that the file can rebuild its model."""

    vocab_size: int = field(metadata=dict(low=2, high=0x110000))  # no option: the text decides
    block_size: int = knob(256, "longest context, in characters (T)", 2, 65_536)
    n_layer: int = knob(4, "transformer blocks (L)", 1, 128)
    n_head: int = knob(4, "attention heads per block (H)", 1, 1_000)
    n_embd: int = knob(128, "channels, a multiple of --n-head (C)", 1, 65_536)
    dropout: float | None = knob(None, "share of values dropped in training (default: by passes over text)", 0.0, 0.9)

    def __post_init__(self):
        super().__post_init__()
        if self.n_embd % self.n_head:
            raise UserError(
                f"--n-embd {self.n_embd} --n-head {self.n_head}: heads share the channels equally, so --n-embd must be "
                f"a multiple of --n-head; the next one is {math.ceil(self.n_embd / self.n_head) * self.n_head}"
            )

    def size(self) -> str:
        """Number of weights as a person would say it."""
        n = self.n_parameters()
        return f"{n / 1e6:,.1f} M parameters" if n >= 100_000 else f"{n:,} parameters"

    def n_parameters(self) -> int:
        """Number of weights: two embeddings, 12 C^2 + 13 C for each block, and the last LayerNorm."""
        C = self.n_embd
        return (self.vocab_size + self.block_size) * C + self.n_layer * (12 * C * C + 13 * C) + 2 * C


SIZES = {  # --size; 0.8 M, 10.7 M and 86 M parameters
    "small": dict(n_layer=4, n_head=4, n_embd=128, block_size=256),
    "medium": dict(n_layer=6, n_head=6, n_embd=384, block_size=256),
    "large": dict(n_layer=12, n_head=12, n_embd=768, block_size=1024),
}


@dataclass(frozen=True)
class TrainConfig(Settings):
    """How a model is trained; stored in the model file beside the result."""

    max_steps: int = knob(5_000, "optimizer updates", 1, 100_000_000)
    batch_size: int | None = knob(None, "windows of text per update (default: 64 on a GPU, 6 on a CPU)", 1, 1_000_000)
    grad_accum: int = knob(1, "parts that a batch is computed in: less memory, same result", 1, 1_000_000)
    muon_learning_rate: float = knob(0.02, "peak rate of Muon: the matrices of the blocks", 0.0, 10.0)
    learning_rate: float = knob(6e-3, "peak rate of AdamW: embeddings, LayerNorms, biases", 0.0, 10.0)
    weight_decay: float = knob(0.1, "decay of the blocks' matrices, as a multiple of their rate", 0.0, 10.0)
    warmup_steps: int = knob(50, "updates until the rates reach their peak; then they fall to zero", 0, 100_000_000)
    eval_interval: int = knob(250, "updates between two measurements of the validation loss", 1, 100_000_000)
    checkpoint_interval: float | None = knob(None, "seconds between saves (default: 60, more if slow)", 0.0, 1e9)
    seed: int = knob(1337, "first weights, order of the text and dropout follow from it", 0, 2**63 - 1)
    init: str | None = knob(None, "model file whose weights are the first, to learn another text from there")

    def __post_init__(self):
        super().__post_init__()
        if self.batch_size is not None and self.batch_size % self.grad_accum:
            raise UserError(
                f"--batch-size {self.batch_size} --grad-accum {self.grad_accum}: the parts of a batch must be equal; "
                f"use a --grad-accum that divides {self.batch_size}"
            )


@dataclass(frozen=True)
class SampleConfig(Settings):
    """How the next character is chosen from the probabilities. As they stand, top-k, top-p and min-p are off."""

    temperature: float = knob(0.8, "below 1 safer, above 1 wilder; 0 always takes the likeliest character", 0.0, 100.0)
    top_k: int = knob(0, "choose among the k likeliest characters only; 0 is off", 0, 0x110000)
    top_p: float = knob(1.0, "choose among the likeliest that together have this probability; 1 is off", 0.0, 1.0)
    min_p: float = knob(0.0, "leave out what is less likely than this share of the likeliest; 0 is off", 0.0, 1.0)
    repetition_penalty: float = knob(1.0, "above 1 makes characters that already occurred less likely", 0.01, 100.0)
    max_new: int = knob(300, "characters to write", 0, 10**12, short="-n")
    stop: tuple[str, ...] = knob((), "stop before this text appears; may be given several times")
    seed: int | None = knob(None, "repeat the same random choices (default: new ones each time)", 0, 2**63 - 1)

    def __post_init__(self):
        super().__post_init__()
        if "" in self.stop:
            raise UserError("--stop '': would stop before the first character; give a text of one character or more")


@dataclass(frozen=True)
class DeviceConfig(Settings):
    """Where the arithmetic happens, and how exactly."""

    device: str = knob("auto", "auto takes CUDA, else MPS, else the CPU", choices=("auto", "cuda", "mps", "cpu"))
    dtype: str = knob("auto", "auto takes bfloat16 where the processor has it", choices=("auto", "float32", "bfloat16"))


COMMANDS = {
    "run": "all of it: text, training, model.safetensors, prompt; what no command at all means",
    "train": "train a model and save it, without the prompt",
    "chat": "talk to a saved model",
    "generate": "continue one prompt and end; only the text goes to standard output",
    "explain": "show how the model sees a text: its ids, what may come next, surprise, attention",
    "eval": "measure the loss of a saved model on a text",
    "info": "tell what a model file is",
    "export": "write the model for Hugging Face transformers or llama.cpp",
    "push": "publish the model on the Hugging Face Hub",
}

VIEWS = ("tokens", "probs", "why", "attn")
TEXTS = ("sherlock", "shakespeare", "python-docs")
MODEL = "model.safetensors"

EXAMPLES = """\
examples:
  python anexagpt.py                       learn Sherlock Holmes, then talk
  python anexagpt.py train --data shakespeare --out bard.safetensors
  python anexagpt.py train --data diary.txt letters/ --out me.safetensors
  python anexagpt.py train --data diary.txt --init bard.safetensors --out we.safetensors
  python anexagpt.py chat --model me.safetensors --temperature 0.6
  python anexagpt.py generate "It was a" -n 300 > story.txt
  python anexagpt.py explain "It was a" --view probs --top-k 5
  python anexagpt.py eval --data letters.txt
  python anexagpt.py export my-model --gguf my-model.gguf

Training can be stopped with Ctrl-C at any time; the same command goes on from there.
'python anexagpt.py COMMAND --help' lists the options of a command."""


def nearest(word: str, known: Iterable[str]) -> str:
    """What was probably meant: the known word that begins so, else one that is spelt nearly so; "" if there is none."""
    begun = [name for name in known if len(word.strip("-/")) > 1 and name.startswith(word)]
    return (begun or difflib.get_close_matches(word, known, 1) or [""])[0]


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors that suggest what was probably meant, and without guessing from abbreviations."""

    def __init__(self, **options):
        width = min(100, shutil.get_terminal_size().columns - 2)

        def layout(prog):
            return argparse.RawDescriptionHelpFormatter(prog, max_help_position=34, width=width)

        super().__init__(allow_abbrev=False, formatter_class=layout, **options)

    def error(self, message):
        if wrong := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
            near = nearest(wrong[1], re.findall(r"[\w-]+", wrong[2]))
            message += f"; did you mean {near}?" if near else ""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")

    def add_settings(self, config: type, title: str, skip=()):
        """Add an option for every knob of a config dataclass."""
        group = self.add_argument_group(title)
        for knob in fields(config):
            rule = knob.metadata
            if "help" not in rule or knob.name in skip:
                continue
            names = [f"--{knob.name.replace('_', '-')}"] + ([rule["short"]] if rule["short"] else [])
            default = "" if knob.default in (None, ()) else f" (default: {knob.default})"
            kind = kinds(config)[knob.name][0]
            how = dict(action="append") if kind is tuple else dict(type=kind, choices=rule["choices"])
            metavar = None if rule["choices"] else {int: "N", float: "X", tuple: "TEXT", str: "FILE"}[kind]
            # Absent options stay absent from the namespace: the dataclass has the defaults.
            group.add_argument(*names, **how, metavar=metavar, default=argparse.SUPPRESS, help=rule["help"] + default)


# Options that are no setting: the commands that have them, their names, and what argparse is told of them.
FILE = dict(type=Path, metavar="FILE")
SAVED = dict(**FILE, default=Path(MODEL))
TEXT = dict(nargs="+", metavar="TEXT")
ARGUMENTS = (
    ("generate", "prompt", dict(help="text to continue")),
    ("generate", "-k --samples", dict(type=int, default=1, metavar="N", help="texts to write (default: 1)")),
    ("explain", "text", dict(help="text to look at")),
    ("explain", "--view", dict(action="append", choices=VIEWS, help="what to show; may be repeated (default: all)")),
    ("explain", "--layer", dict(type=int, metavar="N", help="layer for attn (default: the last)")),
    ("explain", "--head", dict(type=int, metavar="N", help="head for attn (default: the mean of all)")),
    ("export", "folder", dict(nargs="?", type=Path, metavar="DIR", help="folder for transformers")),
    ("export", "--gguf", dict(**FILE, help="file for llama.cpp")),
    ("export", "--f16", dict(action="store_true", help="half the size of FILE, nearly the same answers")),
    ("export", "--modelfile", dict(action="store_true", help="a Modelfile for Ollama beside FILE")),
    ("export", "--force", dict(action="store_true", help="replace files that export did not write")),
    ("push", "name", dict(metavar="USER/NAME", help="what the model is called on the Hub")),
    ("push", "--private", dict(action="store_true", help="only you can see it")),
    ("export push", "--license", dict(default="unknown", metavar="ID", help="of the weights, as the Hub spells it")),
    ("run train", "--out", dict(**SAVED, help=f"where the model goes (default: {MODEL})")),
    ("run train", "--restart", dict(action="store_true", help="train anew, whatever was there before")),
    ("run train", "--quiet", dict(action="store_true", help="no progress")),
    ("run train", "--log", dict(**FILE, help="keep losses, rates and speed in a CSV file")),
    ("run train", "--tensorboard", dict(type=Path, metavar="DIR", help="the same and samples for TensorBoard")),
    ("run train", "--size", dict(choices=SIZES, help="0.8, 10.7 or 86 M parameters (default: small)")),
    ("chat generate explain eval info export push", "--model", dict(**SAVED, help=f"model file (default: {MODEL})")),
    ("run train", "--data", dict(**TEXT, help=f"{', '.join(TEXTS)}, files, folders of *.txt, addresses")),
    ("eval", "--data", dict(**TEXT, help="text to measure it on, as in training (default: the model's own)")),
    ("run train eval", "--encoding", dict(default="utf-8", metavar="NAME", help="of the text (default: utf-8)")),
)
SETTINGS = (
    ("run train", "network", GPTConfig, ()),
    ("run train", "training", TrainConfig, ()),
    ("chat generate", "sampling", SampleConfig, ()),
    ("run", "sampling", SampleConfig, ("seed",)),
    ("explain", "sampling", SampleConfig, ("seed", "max_new", "stop")),
    ("run train chat generate explain eval", "device", DeviceConfig, ()),
)


def parse_options(argv: list[str]) -> argparse.Namespace:
    """The command line as a namespace; leaves the program for --help, --version and typing errors."""
    top = Parser(prog="anexagpt.py", description=__doc__.split("\n")[0], epilog=EXAMPLES)
    top.add_argument("--version", action="version", version=f"Anexa {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    known = {name: commands.add_parser(name, help=text, description=text) for name, text in COMMANDS.items()}
    for names, options, how in ARGUMENTS:
        for name in names.split():
            known[name].add_argument(*options.split(), **how)
    for names, title, config, skip in SETTINGS:
        for name in names.split():
            known[name].add_settings(config, title, skip)
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help", "--version")):
        argv = ["run", *argv]
    options, unknown = top.parse_known_args(argv)
    if unknown:
        parser = known.get(options.command, top)
        near = nearest(unknown[0], list(parser._option_string_actions))
        if not unknown[0].startswith("-"):
            parser.error(f"{unknown[0]!r} is a word too many: the command comes first, several words need quotes")
        parser.error(f"{unknown[0]} is not an option of it" + (f"; did you mean {near}?" if near else ""))
    if getattr(options, "data", None):
        options.data = " + ".join(options.data)  # one name for all, which a model file keeps
    return options


def from_options(config: type[Settings], options: argparse.Namespace, **others) -> Settings:
    """A config dataclass with the values that were given on the command line and `others`; the rest by default."""
    given = {knob.name: getattr(options, knob.name) for knob in fields(config) if hasattr(options, knob.name)}
    return config(**{name: tuple(v) if isinstance(v, list) else v for name, v in (others | given).items()})


if __name__ == "__main__":
    # Before PyTorch is imported, which takes a second or two: --help and a typing error answer at once.
    OPTIONS = parse_options(sys.argv[1:])

PACKAGES = ("filelock", "numpy", "packaging", "prompt_toolkit", "requests", "rich", "safetensors", "torch")
if absent := [package for package in PACKAGES if importlib.util.find_spec(package) is None]:
    sys.exit(f"anexagpt.py: not installed: {', '.join(absent)}; install with: pip install -r requirements.txt")

import filelock
import numpy as np
import prompt_toolkit
import prompt_toolkit.history
import requests
import rich.progress
import safetensors
import safetensors.torch
import torch
import urllib3
from packaging.version import Version
from prompt_toolkit.completion import Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition
from prompt_toolkit.shortcuts import CompleteStyle
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

if Version(torch.__version__) < Version("2.9"):
    sys.exit(
        f"anexagpt.py: PyTorch {torch.__version__} is too old, 2.9 or later is needed: pip install -r requirements.txt"
    )


def say(text: str = "") -> None:
    """Print a line for the person: to standard error, so that standard output holds generated text and nothing else.

    Of the processes of one training only the first speaks.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    try:
        print(fitted(printable(text), sys.stderr), file=sys.stderr, flush=True)
    except OSError:  # whoever read it has gone, as `head` does: no reason to lose a training
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def fitted(text: str, file: typing.TextIO, indent: int = 0) -> str:
    """`text` broken between words if `file` is a terminal, which would break it anywhere; later lines are indented."""
    if not file.isatty():
        return text
    how = dict(replace_whitespace=False, break_on_hyphens=False, subsequent_indent=" " * indent)
    width = shutil.get_terminal_size().columns
    return "\n".join("\n".join(textwrap.wrap(line, width, **how)) for line in text.split("\n"))


def printable(text: str) -> str:
    """`text` with control, bidirectional and surrogate characters spelt out, so that none can steer a terminal."""
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs") or c in "\u00ad\u200c\u200d"
        else c.encode("unicode_escape", "surrogatepass").decode()
        for c in text
    )  # fmt: skip


def sweep(path: Path) -> None:
    """Remove what processes that were killed have left of `path`, half-written."""
    for name in os.listdir(path.parent) if path.parent.is_dir() else ():
        if not (part := re.fullmatch(rf"\.{re.escape(path.name)}\.(\d{{1,9}})\.tmp", name)):
            continue
        with suppress(OSError):
            if os.name == "posix" and int(part[1]) != os.getpid():  # Windows removes nothing that is open
                with suppress(ProcessLookupError):
                    os.kill(int(part[1]), 0)
                    continue  # it lives, and writes
            (path.parent / name).unlink()


@contextmanager
def replacing(path: Path, mode: int = 0o666) -> Iterator[typing.BinaryIO]:
    """A file to be written that takes the place of `path` when it is whole and on the disk; until then the old stays.

    mode    the most that others may do with it; the old file's mode or the person's umask may allow less
    """
    sweep(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    if old := path.exists():
        mode &= path.stat().st_mode
        if not path.is_file():
            raise OSError(errno.EINVAL, "it is no ordinary file", str(path))  # /dev/null must stay what it is
    try:
        with open(temporary, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if old:
            temporary.chmod(mode)
        os.replace(temporary, path)
    except OSError as error:
        error.filename = str(path)  # a full disk does not tell which file it was
        raise
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":
        with suppress(OSError):  # the new name on the disk as well, or a power cut could bring back the old file
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)


# ---- data ------------------------------------------------------------------------------------------------------------
# From names, files, folders and addresses to text: as pieces of str, so that it may be longer than the memory.


@dataclass(frozen=True)
class Source:
    """A text that Anexa knows by name, where to get it, and how to know it from an error page or half a file."""

    title: str
    mirrors: tuple[str, ...]
    ending: str  # words from the last page, so that they also prove that the file is whole


SOURCES = {
    "sherlock": Source(
        "The Adventures of Sherlock Holmes",
        (
            "https://www.gutenberg.org/cache/epub/1661/pg1661.txt",
            "https://www.gutenberg.org/files/1661/1661-0.txt",
            "https://raw.githubusercontent.com/jsvine/markovify/master/test/texts/sherlock.txt",
        ),
        "I believe that she has met with considerable success",
    ),
    "shakespeare": Source(
        "TinyShakespeare",
        (
            "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
            "https://storage.googleapis.com/download.tensorflow.org/data/shakespeare.txt",
        ),
        "Whiles thou art waking.",
    ),
}
FALLBACK = "python-docs"  # the language reference that every CPython's help() carries: 465,000 characters, no network
MAX_DOWNLOAD = 2 << 30  # bytes
PIECE = 1 << 16  # bytes of a text that are read at once; more would not fit into the processor's cache
LONG = 32 << 20  # bytes from which on a text's ids are kept in a file: shorter ones are read in half a second


class DownloadError(Exception):
    """Why one address did not give a text."""


def inside(file: typing.BinaryIO) -> tuple[int, int]:
    """Where the text of a file begins and ends, in bytes; Project Gutenberg's licence, 20 kB, is not part of a book."""
    head, size = file.read(1 << 16), file.seek(0, os.SEEK_END)
    file.seek(max(0, size - (1 << 16)))
    tail = file.read()
    marker = rb"\*\*\* ?%s OF TH(?:E|IS) PROJECT GUTENBERG EBOOK[^*]*\*\*\*"
    start = re.search(marker % b"START" + rb"\s*", head)
    ends = [*re.finditer(rb"\s*(?:End of (?:the )?Project Gutenberg[^\n]*)?\s*" + marker % b"END", tail)]
    return (start.end(), size - len(tail) + ends[-1].start()) if start and ends else (0, size)


def read_text(source: Path | bytes, encoding: str = "utf-8") -> Iterator[str]:
    r"""The text of a file in pieces, with \n line ends, without byte order mark and Project Gutenberg's licence.

    raises  UserError if the bytes are not text in that encoding
    """
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
            "".encode(encoding)  # complains of codecs that are not for text
            decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder(encoding)(), translate=True)
            first, last = inside(file)
            file.seek(first)
            for at in range(first, last, PIECE):
                raw = file.read(min(PIECE, last - at))
                text = decoder.decode(raw, final=at + PIECE >= last)
                if not text.isascii():
                    text.encode()  # some encodings can spell surrogates, which are not characters
                yield text if at else text.removeprefix("\ufeff")
            yield "\n" if first else ""  # a book's end
    except LookupError:
        raise UserError(f"--encoding {encoding}: unknown to Python; try utf-8, latin-1 or cp1252") from None
    except UnicodeError as error:
        why = str(error)
        if isinstance(error, UnicodeDecodeError):
            offset = at + len(raw) - len(error.object) + error.start
            why = f"byte {error.object[error.start]:#04x} at offset {offset:,} does not fit"
        cure = "name its own with --encoding, often cp1252, latin-1 or utf-16, or save it as UTF-8 and name none"
        raise UserError(f"{source}: not {encoding} text, {why}; {cure}") from None


def receive(url: str, patience: float) -> Iterator[str | bytes]:
    """What a server answers: first how long the text is, in the server's words, then the text as it arrives.

    raises  DownloadError, or an exception of requests or urllib3
    """
    # One more try where nobody answers: without a network that must not take long.
    again = (429, 500, 502, 503, 504)
    retry = urllib3.Retry(
        3, connect=1, read=1, backoff_factor=0.5, status_forcelist=again, respect_retry_after_header=False
    )
    with requests.Session() as session:
        session.mount("http://", requests.adapters.HTTPAdapter(max_retries=retry))
        session.mount("https://", requests.adapters.HTTPAdapter(max_retries=retry))
        session.headers["Accept-Encoding"] = "identity"  # a few compressed bytes can become more than the memory holds
        with session.get(url, stream=True, timeout=(10, patience)) as answer:
            if answer.status_code != 200:
                raise DownloadError(f"the server answered {answer.status_code} {printable(answer.reason)[:50]}")
            if "html" in answer.headers.get("Content-Type", ""):
                raise DownloadError("the server sent a web page, not a text")
            if answer.headers.get("Content-Encoding", "identity") != "identity":
                raise DownloadError("the server compressed the text, which nobody asked for")
            yield answer.headers.get("Content-Length", "")
            # What has arrived, however little: to wait for a whole block would hide a server that drips.
            while piece := answer.raw.read1(1 << 16):
                yield piece


def hurried(pieces: Iterator[str | bytes], patience: float) -> Iterator[str | bytes]:
    """`pieces` as they come, from a thread that is left alone when it is too slow: the time-outs of sockets begin anew
    with each byte.

    raises  DownloadError after `patience` seconds and one more for every 5 kB
    """
    arrived, size, start = queue.Queue(8), 0, time.monotonic()

    def work():
        try:
            for piece in pieces:
                arrived.put(piece)
            arrived.put(None)
        except Exception as error:
            arrived.put(error)

    threading.Thread(target=work, daemon=True).start()
    while True:
        try:
            piece = arrived.get(timeout=max(0, start + patience + size / 5_000 - time.monotonic()))
        except queue.Empty:
            raise DownloadError("the server sends less than 5 kB/s" if size else "no answer") from None
        if piece is None:
            return
        if isinstance(piece, Exception):
            raise piece
        size += len(piece)
        yield piece


def fetch(url: str, path: Path, accept: Callable[[Path], bool], most: int = 0, patience: float = 30.0) -> None:
    """Download `url` to `path`; the file appears whole or not at all.

    accept    whether what a file holds is what was wanted
    most      bytes that it may have (0: MAX_DOWNLOAD)
    patience  seconds without an answer, or below 5 kB/s, after which the address is given up
    raises    DownloadError saying why not; UserError if `path` cannot be written
    """
    most = most or MAX_DOWNLOAD
    try:
        pieces = hurried(receive(url, patience), patience)
        length = next(pieces)
        length = int(length) if re.fullmatch("[0-9]{1,18}", length) else None
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file, progress(f"Downloading {path.name}", length) as advance:
            for piece in pieces:
                advance(file.write(piece))
                if file.tell() > most:
                    raise DownloadError(f"the answer is longer than {most >> 20:,} MiB")
            file.flush()
            if not accept(Path(file.name)):
                raise DownloadError("what the server sent is not that text, or not all of it")
    except requests.Timeout:
        raise DownloadError("no answer") from None
    except requests.exceptions.RetryError:
        raise DownloadError("the server is out of order or busy") from None
    except requests.ConnectionError:
        raise DownloadError("no connection, or it broke") from None
    except (requests.RequestException, urllib3.exceptions.HTTPError, UnicodeError) as error:
        raise DownloadError(f"{type(error).__name__} {printable(str(error))[:100]}") from None
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path}: cannot be written ({reason}); make room, or start in another folder") from None


@contextmanager
def progress(title: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A progress bar in bytes on a terminal, one plain line elsewhere; gives the function that advances it."""
    if not sys.stderr.isatty():
        say(f"{title} ...")
        yield lambda n: None
        return
    columns = (*rich.progress.Progress.get_default_columns()[:2], rich.progress.DownloadColumn())
    with rich.progress.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total)
        yield lambda n: bar.advance(task, n)


def copy_of(name: str, folder: Path = Path("data")) -> Path:
    """Where the copy of a built-in text or of an address is kept."""
    if name in SOURCES:
        return folder / f"{name}.txt"
    stem = re.sub(r"[^\w.-]", "_", name.split("?")[0].rstrip("/").rpartition("/")[2])[-40:]
    return folder / f"{hashlib.sha256(name.encode(errors='replace')).hexdigest()[:8]}-{stem}"


def download(name: str, folder: Path = Path("data")) -> Path:
    """The copy in `folder` of a built-in text or of what is at an address, the first time fetched from the network.

    raises  DownloadError if no mirror gives it
    """
    source, path = SOURCES.get(name), copy_of(name, folder)
    mirrors, most = (source.mirrors, min(1 << 24, MAX_DOWNLOAD)) if source else ((name,), MAX_DOWNLOAD)

    def accept(path: Path) -> bool:
        with open(path, "rb") as file:
            raw = file.read(-1 if source else 200)
        if raw[:200].lstrip().lower().startswith((b"<!doctype html", b"<html")) or not raw:
            return False
        try:  # lines break elsewhere in every edition
            return not source or source.ending in " ".join(raw.decode().split())
        except UnicodeDecodeError:
            return False

    sweep(path)
    if path.exists() and accept(path):
        return path
    reasons = []
    for url in mirrors * 2:  # the second time round for connections that broke half-way
        try:
            fetch(url, path, accept, most)
            return path
        except DownloadError as error:
            reasons.append(f"{url.split('/')[2]}: {error}")
    raise DownloadError("; ".join(dict.fromkeys(reasons)))


def find_texts(name: str, encoding: str) -> list[tuple[Path | bytes, str]]:
    """Files (or bytes) and their encodings that one name stands for: a text known or at an address, a file, a folder.

    raises  DownloadError, or UserError if there is no such text
    """
    if " + " in name and not os.path.exists(name):  # what `--data A B` has become
        return [text for part in name.split(" + ") for text in find_texts(part, encoding)]
    if name == FALLBACK:
        from pydoc_data.topics import topics

        return [("\n\n".join(topics[topic] for topic in sorted(topics)).encode(), "utf-8")]
    if name in SOURCES or re.match("https?://", name, re.IGNORECASE):
        return [(download(name), "utf-8" if name in SOURCES else encoding)]
    path = Path(name)
    files = [path] if path.is_file() else sorted(file for file in path.glob("[!.]*.txt") if file.is_file())
    if not files:
        what = (
            "a folder without files *.txt" if path.is_dir() else f"neither a file nor a known text ({', '.join(TEXTS)})"
        )
        raise UserError(f"--data {name}: {what}; check the spelling")
    return [(file, encoding) for file in files]


def read_texts(sources: list[tuple[Path | bytes, str]]) -> Iterator[str]:
    """The pieces of several texts, one after another, each beginning on a new line; otherwise as `read_text`."""
    last = "\n"
    for source, encoding in sources:
        for piece in chain(["" if last.endswith("\n") else "\n"], read_text(source, encoding)):
            yield piece
            last = piece or last


# ---- tokenizer -------------------------------------------------------------------------------------------------------
# One token is one character. Its id is its place among the sorted characters of the text.

UNKNOWN = "\ufffd"  # id 0: stands for every character that the text did not have, and is never written
EQUIVALENTS = str.maketrans("\u2018\u2019\u201a\u201c\u201d\u201e\u2013\u2014\u2015\u2212", "'''\"\"\"----")


def code_points(text: str) -> np.ndarray:
    """Unicode's numbers of the characters (N,)."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<i4")


class Tokenizer:
    """Characters to ids and back. `characters[i]` is the character with id i; `characters[0]` is U+FFFD."""

    def __init__(self, characters: str):
        self.characters = characters
        # One or two bytes an id where that is enough: a long text stays small.
        n = len(characters)
        self.table = np.zeros(0x110000, np.uint8 if n <= 1 << 8 else np.uint16 if n <= 1 << 16 else np.int32)
        self.table[code_points(characters)] = np.arange(n)

    @classmethod
    def of(cls, characters: Iterable[str]) -> Tokenizer:
        return cls(UNKNOWN + "".join(sorted(set(characters) - {UNKNOWN})))

    def __len__(self) -> int:
        return len(self.characters)

    def encode(self, text: str) -> Tensor:
        """Ids (N,), uint8 if the vocabulary allows, else uint16 or int32; 0 for characters that are not in it."""
        return torch.from_numpy(self.table.take(code_points(text)))

    def decode(self, ids: Tensor) -> str:
        """Text of ids (N,)."""
        return "".join(map(self.characters.__getitem__, ids.tolist()))

    def admit(self, prompt: str) -> tuple[str, str]:
        """`prompt` in characters that the model knows, and a one-line notice of what was changed ("" if nothing).

        An unknown character becomes its plain equivalent (straight quotes, dash, no accent, other case) or goes.
        """
        known, changed, dropped = set(self.characters[1:]), {}, {}

        def replacement(c: str) -> str:
            plain = "".join(p for p in unicodedata.normalize("NFKD", c) if not unicodedata.combining(p))
            for other in (c.translate(EQUIVALENTS), plain, c.swapcase(), plain.swapcase()):
                if other and known.issuperset(other):
                    changed[c] = other
                    return other
            dropped[c] = ""
            return ""

        text = "".join(c if c in known else replacement(c) for c in prompt.replace("\r\n", "\n").replace("\r", "\n"))
        notices = []
        if changed:
            notices.append("read " + ", ".join(f"{c} as {other}" for c, other in changed.items()))
        if dropped:
            notices.append(f"left out {' '.join(dropped)} (not in the model's {len(self) - 1} characters)")
        return text, "; ".join(notices)


@dataclass(frozen=True)
class Corpus:
    """A text to learn from, or to be measured on."""

    name: str
    sha256: str  # of the text in UTF-8
    tokenizer: Tokenizer
    ids: Tensor  # (N,), in memory or, for a long text, in a file that is mapped into it


def survey(pieces: Iterable[str]) -> tuple[Tokenizer, str, int]:
    """Tokenizer for a text, its SHA-256 and its length: what must be known before the first id can be written."""
    seen, sha256, length = np.zeros(0x110000, bool), hashlib.sha256(), 0
    for piece in pieces:
        points = code_points(piece)
        seen[points[~seen.take(points)]] = True  # only the new ones: to write is slower than to look
        sha256.update(piece.encode())
        length += len(piece)
    return Tokenizer.of(map(chr, seen.nonzero()[0])), sha256.hexdigest(), length


def load_corpus(data: str | None, encoding: str = "utf-8") -> Corpus:
    """The text that `--data` names; without it Sherlock Holmes or, where that cannot be had, Python's documentation.

    A text is read twice, piece by piece: to find its characters, and to turn them into ids. A long one's ids go to a
    file in data/, which the next call finds ready and maps into memory. Several names are joined by " + ".
    raises  UserError if there is no such text
    """
    name = data or "sherlock"
    try:
        sources = find_texts(name, encoding)
    except DownloadError as error:
        if data is None:
            say(f"NOTE: {SOURCES[name].title} could not be downloaded ({error}).")
            say(f"NOTE: going on with {FALLBACK}, the language reference inside your Python, instead.")
            return load_corpus(FALLBACK)
        raise UserError(f"--data {name}: could not be downloaded ({error}); try again, or give a text file") from None
    if sum(path.stat().st_size for path, _ in sources if isinstance(path, Path)) >= LONG:
        return load_long(name, sources)
    tokenizer, sha256, _ = survey(read_texts(sources))
    return Corpus(name, sha256, tokenizer, torch.cat([tokenizer.encode(piece) for piece in read_texts(sources)]))


def load_long(name: str, sources: list[tuple[Path | bytes, str]]) -> Corpus:
    """The corpus of a long text from a file in data/, which is written first unless it is there; raises UserError.

    It is a safetensors file that tells sizes and times of change of what it was made of: to compare the text itself,
    by its SHA-256, would take a second or two for every GB at each start.
    """
    files = [(str(path), encoding, path.stat()) for path, encoding in sources if isinstance(path, Path)]
    origin = json.dumps([__version__, [(*named, it.st_size, it.st_mtime_ns) for *named, it in files]])
    path = Path(f"{copy_of(name)}.ids")
    with suppress(FileNotFoundError, safetensors.SafetensorError), safetensors.safe_open(path, "pt") as file:
        told = file.metadata() or {}
        if told.get("origin") == origin:
            return Corpus(name, told["sha256"], Tokenizer(told["characters"]), file.get_tensor("ids"))
    path.parent.mkdir(exist_ok=True)
    with progress(f"Preparing {name}", 2 * sum(it.st_size for *_, it in files)) as advance, replacing(path) as file:
        pieces = lambda: (advance(len(piece)) or piece for piece in read_texts(sources))  # noqa: E731
        tokenizer, sha256, length = survey(pieces())
        width = tokenizer.table.itemsize
        ids = dict(dtype={1: "U8", 2: "U16", 4: "I32"}[width], shape=[length], data_offsets=[0, length * width])
        told = dict(origin=origin, sha256=sha256, characters=tokenizer.characters)
        header = json.dumps(dict(__metadata__=told, ids=ids)).encode()
        header += b" " * (-len(header) % 8)
        file.write(len(header).to_bytes(8, "little") + header)
        if sum(file.write(tokenizer.encode(piece).numpy()) for piece in pieces()) != length * width:
            raise UserError(f"--data {name}: has changed while it was read; try again when it is complete")
    return load_long(name, sources)


# ---- model -----------------------------------------------------------------------------------------------------------
# GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"): from ids to the probabilities of
# the next character, at every position at once.


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Mix of the values v (B, H, T, D), for each query q (B, H, T, D) by its likeness to the keys k (B, H, T, D).

    A position may look at itself and back, for what follows it is what it has to predict.
    source  Vaswani et al. 2017, "Attention Is All You Need", equation 1
    """
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    # PyTorch's fused kernel is several times slower than these lines for short contexts in bfloat16 on a CPU.
    B, H, T, D = q.shape
    scores = (q * D**-0.5).reshape(B * H, T, D) @ k.reshape(B * H, T, D).mT  # (B * H, T, T)
    scores += torch.full((T, T), -torch.inf, dtype=q.dtype).triu_(1)  # in place: it is the largest tensor of all
    return (torch.softmax(scores, dim=-1) @ v.reshape(B * H, T, -1)).view(B, H, T, -1)


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """x with a share p of its values, chosen at random, set to zero and the others scaled up; x itself if not training.

    source  Srivastava et al. 2014, "Dropout: A Simple Way to Prevent Neural Networks from Overfitting"
    """
    if p == 0 or not training or x.device.type != "cpu":
        return F.dropout(x, p, training)
    # One random byte a value, so p is a multiple of 1/256: PyTorch's own dropout takes a tenth of a step on a CPU.
    dropped = round(256 * p)
    draws = torch.empty(-(-x.numel() // 8), dtype=torch.int64).random_(-(2**63), None).view(torch.uint8)
    return (x * (draws[: x.numel()].view_as(x) >= dropped)).mul_(256 / (256 - dropped))


class Attention(nn.Module):
    """Each position gathers from the positions before it what it needs to know."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, kept: list[Tensor] | None) -> Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)  # (B, T, 3, H, D)
        qkv = qkv.permute(2, 0, 3, 1, 4).contiguous()  # (3, B, H, T, D)
        if kept is not None:
            kept.append(qkv)
        y = attention(*qkv)  # (B, H, T, D)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    """Each position thinks for itself about what it has gathered."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        # The tanh form of GELU (Hendrycks and Gimpel 2016, section 2) is the one that GPT-2's weights expect. On a CPU
        # the exact form takes half the time and is at most 0.0005 away, so a training there makes do with that.
        exact = self.training and x.device.type == "cpu"
        return self.c_proj(F.gelu(self.c_fc(x), approximate="none" if exact else "tanh"))  # (B, T, C)


class Block(nn.Module):
    """Attention, then MLP, each added to the residual stream x."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)
        self.dropout = config.dropout or 0.0

    def forward(self, x: Tensor, kept: list[Tensor] | None) -> Tensor:
        x = x + dropout(self.attn(self.ln_1(x), kept), self.dropout, self.training)
        return x + dropout(self.mlp(self.ln_2(x)), self.dropout, self.training)


class GPT(nn.Module):
    """GPT-2's decoder with its names: wte, wpe, h, ln_f; the embedding wte is also the output layer."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        for name, weight in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.zeros_(weight)  # every block starts as the identity
            elif weight.dim() == 2:  # wider than GPT-2's 0.02 in the blocks, whose step sizes Muon makes larger
                nn.init.normal_(weight, std=(2 * config.n_embd) ** -0.5 if name.startswith("h.") else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)

    def forward(self, ids: Tensor, kept: list[Tensor] | None = None) -> Tensor:
        """Logits (B, T, V) of the character after each of `ids` (B, T).

        kept    a list that gets queries, keys and values (3, B, H, T, D) of every block
        raises  IndexError if T is more than block_size
        """
        T = ids.shape[1]
        if self.config.block_size < T:
            raise IndexError(f"a context of more than block_size = {self.config.block_size} characters")
        x = self.wte(ids) + self.wpe.weight[:T]  # (B, T, C)
        x = dropout(x, self.config.dropout or 0.0, self.training)
        for block in self.h:
            x = block(x, kept)
        return F.linear(self.ln_f(x), self.wte.weight)  # (B, T, V)


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean negative log-probability of `targets` (B, T) under `logits` (B, T, V), in nats per character."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


# ---- optimizer -------------------------------------------------------------------------------------------------------


def learning_rate(step: int, cfg: TrainConfig) -> float:
    """Multiple of the peak rates for update number `step`: linear warm-up to 1, then decay to zero.

    step    updates done so far, from 0
    raises  ValueError if step is negative or not below max_steps
    source  Defazio et al. 2023, "Optimal Linear Decay Learning Rate Schedules and Further Refinements"; the power of
            1.5, which stays longer at low rates, measured better here than their 1
    """
    if not 0 <= step < cfg.max_steps:
        raise ValueError(f"step {step} is not from 0 to {cfg.max_steps - 1}")
    if step < cfg.warmup_steps:
        return (step + 1) / cfg.warmup_steps
    return ((cfg.max_steps - step) / (cfg.max_steps - cfg.warmup_steps)) ** 1.5


def orthogonalise(X: Tensor) -> Tensor:
    """X (N, rows, columns) with every singular value moved close to 1: N matrices at once, best with rows <= columns.

    source  Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks" (quintic Newton-Schulz)
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):  # X becomes a X + b (X X') X + c (X X')^2 X
        A = X @ X.mT  # (N, rows, rows)
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X


class Muon:
    """Momentum whose direction is orthogonalised, for matrices; all of one shape go through it as one stack.

    A matrix with more rows than columns is taken as groups of rows, half as many as it has columns: little more than
    half of the arithmetic, and a slightly lower loss. The result is that of `torch.optim.Muon` for each group, to
    rounding.
    source  Jordan et al. 2024, as above; decay and momentum as in torch.optim.Muon
    """

    def __init__(
        self, weights: list[Tensor], lr: float, weight_decay: float, dtype: torch.dtype, momentum: float = 0.9
    ):
        self.lr, self.weight_decay, self.dtype, self.momentum = lr, weight_decay, dtype, momentum
        shapes: dict[tuple[int, int], list[Tensor]] = {}
        for weight in weights:
            rows, columns = weight.shape
            if rows > columns:
                rows = columns // 2 if columns % 2 == 0 else columns
            shapes.setdefault((rows, columns), []).append(weight)
        self.stacks = list(shapes.values())
        self.buffers = [w[0].new_zeros(sum(map(torch.numel, w)) // (r * c), r, c) for (r, c), w in shapes.items()]

    @torch.no_grad()
    def step(self, rate: Tensor) -> None:
        """One update at `rate` (1,) times the peak learning rate."""
        shrink, move = 1 - self.lr * self.weight_decay * rate, -self.lr * rate
        for weights, buffer in zip(self.stacks, self.buffers, strict=True):
            grad = torch.cat([w.grad.reshape(-1, *buffer.shape[1:]) for w in weights])  # (N, rows, columns)
            buffer.lerp_(grad, 1 - self.momentum)
            ahead = grad.lerp_(buffer, self.momentum)  # Nesterov
            update = orthogonalise(ahead.to(self.dtype)).float().view(-1, buffer.shape[2])
            parts = update.split([len(w) for w in weights])
            for w, part in zip(weights, parts, strict=True):
                w.mul_(shrink).addcmul_(part, move)


# ---- model file ------------------------------------------------------------------------------------------------------
# model.safetensors holds the weights and, as JSON in the header, everything else that is needed to use them.

FORMAT_VERSION = "1"
HUGE = 1e3  # no weight of a trained network comes near it; from far above it the arithmetic would overflow


@dataclass(frozen=True)
class Story:
    """What a file tells about its weights: how to rebuild the network, read its ids, and where it all came from."""

    config: GPTConfig
    characters: str
    data: dict  # name, sha256, characters
    training: dict  # TrainConfig and the device, as used
    step: int  # updates done
    validation_loss: float | None  # the lowest, that of the weights kept, in nats per character; None before the first
    history: list  # [step, training loss, validation loss], from first to last

    def metadata(self) -> dict[str, str]:
        """The header entries of a safetensors file: strings only, as the format wants."""
        told = {name: json.dumps(value) for name, value in asdict(self).items()}
        versions = dict(format_version=FORMAT_VERSION, anexa_version=__version__, torch_version=torch.__version__)
        return {"format": "pt", **versions, **told}

    def __str__(self) -> str:
        return (
            f"{self.config.size()}, trained on {self.data['name']} for {self.step:,} steps, "
            f"validation loss {self.validation_loss or math.nan:.4f} nats/char"
        )


def save_file(path: Path, tensors: dict[str, Tensor], story: Story) -> None:
    """Write tensors and story to `path`, which keeps its old content until the new one is safely on the disk."""
    content = safetensors.torch.save({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, story.metadata())
    try:
        with replacing(path) as file:
            file.write(content)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path}: cannot be written ({reason}); make room or choose another --out") from None


def parse_story(metadata: dict[str, str]) -> Story:
    """The story in a header, which may hold anything.

    raises  UserError or ValueError saying what is wrong with it
    """

    def demand(condition: bool, rule: str) -> None:
        if not condition:
            raise ValueError(rule)

    def refuse(constant: str):
        raise ValueError(f"{constant} is not a number")

    def number(value) -> bool:
        return isinstance(value, int | float) and abs(value) < 1e15

    version = printable(metadata.get("format_version", "none"))[:20]
    demand(version == FORMAT_VERSION, f"its format_version is {version}, this program reads {FORMAT_VERSION}")
    types = dict(config=dict, characters=str, data=dict, training=dict, step=int, validation_loss=int | float | None)
    told = {}
    for name, kind in (types | dict(history=list)).items():
        demand(name in metadata, f"its header has no {name}")
        told[name] = json.loads(metadata[name], parse_constant=refuse)
        demand(isinstance(told[name], kind), f"its {name} is not of the right type")
    characters, data = told["characters"], told["data"]
    names = {knob.name for knob in fields(GPTConfig)}
    demand(told["config"].keys() == names, "its config does not have the right entries")
    config = told["config"] = GPTConfig(**told["config"])
    characters.encode()  # refuses surrogates
    in_order = [UNKNOWN, *sorted({*characters} - {UNKNOWN})]
    demand([*characters] == in_order, "its characters are not U+FFFD followed by different characters in order")
    count = len(characters)
    demand(count == config.vocab_size, f"it has {count} characters, but a vocab_size of {config.vocab_size}")
    demand(isinstance(told["training"].get("init"), str | None), "its init is not the name of a file")
    named = isinstance(data.get("name"), str) and isinstance(data.get("sha256"), str)
    demand(named, "its data set has no name or no sha256")
    demand(number(data.get("characters")), "its data set has no number of characters")
    data["name"] = printable(data["name"]).replace("\n", " ")
    in_range = 0 <= told["step"] < 1e15 and number(told["validation_loss"] or 0)
    demand(in_range, "its step or validation_loss is out of range")
    last = 0
    for row in told["history"]:
        fits = isinstance(row, list) and len(row) == 3 and all(map(number, row)) and last < row[0] == int(row[0])
        demand(fits, "its history is not made of step, training loss and validation loss, in order")
        last = row[0]
    return Story(**told)


def open_file(path: Path, cure: str = "train one, or fetch it again") -> tuple[Story, dict[str, tuple]]:
    """Story of a safetensors file of ours, and (shape, dtype) of each tensor; no tensor is read.

    raises  UserError if there is no such file, or it is not whole, or not ours
    """
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is not a file")  # to open a pipe would wait for a writer
        with safetensors.safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            story = parse_story(file.metadata() or {})
            return story, {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; train it first, or to its end: python anexagpt.py train --out {path}"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (UserError, ValueError, RecursionError, safetensors.SafetensorError) as error:
        reason = printable(str(error)).replace("\n", " ")[:200]
        raise UserError(f"{path}: not a whole model of Anexa: {reason}; {cure}") from None


class Unfilled(torch.overrides.TorchFunctionMode):
    """New networks without first weights: on the meta device PyTorch would import SymPy for them, a second's work."""

    def __torch_function__(self, function, types, args=(), options=None):
        if getattr(function, "__module__", "") != "torch.nn.init":
            return function(*args, **(options or {}))


def load_model(path: Path, device: torch.device) -> tuple[GPT, Tokenizer, Story]:
    """A model file's network in evaluation mode, its tokenizer and its story; every claim of the file is checked first.

    raises  UserError if anything does not fit
    """
    story, found = open_file(path)

    def demand(condition: bool, rule: str) -> None:
        if not condition:
            raise UserError(f"{path}: not a model of Anexa: {rule}; train one, or fetch it again")

    demand(len(found) == 4 + 12 * story.config.n_layer, "its tensors are not those of its config")
    demand(story.validation_loss is not None, "its validation_loss is missing")
    with torch.device("meta"), Unfilled():  # shapes without memory
        model = GPT(story.config)
    exported = "transformer.wte.weight" in found  # by `export`: names as transformers has them, matrices transposed
    for name, weight in model.named_parameters():
        shape, dtype = found.get(f"transformer.{name}" if exported else name, ((), "missing"))
        shape = shape[::-1] if exported and name.startswith("h.") else shape
        demand(
            shape == tuple(weight.shape) and dtype == "F32", f"{name} is {shape} {dtype}, not {tuple(weight.shape)} F32"
        )
    try:
        weights = safetensors.torch.load_file(path, device=str(device))
    except (OSError, safetensors.SafetensorError):
        weights = {}
    shapes = {name: shape for name, (shape, _) in found.items()}
    demand({name: tuple(weight.shape) for name, weight in weights.items()} == shapes, "it has just changed")
    for name, weight in weights.items():
        demand(bool((weight.abs() < HUGE).all()), f"{name} has values that are not finite, or absurdly large")
    if exported:
        weights = {
            name.removeprefix("transformer."): (w.t() if ".h." in name else w).contiguous()
            for name, w in weights.items()
        }
    model.load_state_dict(weights, assign=True)
    return model.eval(), Tokenizer(story.characters), story


@torch.no_grad()
def adapt(model: GPT, tokenizer: Tokenizer, characters: str) -> dict[str, Tensor]:
    """The weights of `model` for other characters: those that it knows keep their row of wte, new ones get the mean."""
    rows, wte = tokenizer.encode(characters).long(), model.wte.weight  # (V,), 0 for new ones
    adapted = wte[rows]  # (V, C)
    adapted[1:][rows[1:] == 0] = wte[1:].mean(dim=0)
    return model.state_dict() | {"wte.weight": adapted}


# ---- training --------------------------------------------------------------------------------------------------------


def choose_device(wanted: DeviceConfig) -> tuple[torch.device, torch.dtype]:
    """Device and number format for a DeviceConfig; `auto` is decided by what the machine says it can do.

    raises  UserError if the device is not there
    """
    there = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    name = next(n for n in there if there[n]) if wanted.device == "auto" else wanted.device
    if not there[name]:
        usable = ", ".join(n for n in there if there[n])
        raise UserError(f"--device {name}: PyTorch {torch.__version__} finds no such device; it can use {usable}")
    native = dict(
        cuda=lambda: torch.cuda.is_bf16_supported(including_emulation=False),
        mps=lambda: False,
        cpu=lambda: torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported(),
    )
    bfloat16 = wanted.dtype == "bfloat16" or (wanted.dtype == "auto" and native[name]())
    return torch.device(name), torch.bfloat16 if bfloat16 else torch.float32


def split(ids: Tensor) -> tuple[Tensor, Tensor]:
    """The first 90% of a text to learn from, and the rest, a million characters at most, to be examined on."""
    n = max(len(ids) * 9 // 10, len(ids) - 1_000_000)
    return ids[:n], ids[n:]


class World(typing.NamedTuple):
    """The place of this process among those of one training that torchrun started; without it there is but one."""

    rank: int = 0
    size: int = 1

    @classmethod
    @contextmanager
    def joined(cls, device: torch.device) -> Iterator[World]:
        """Meet the other processes, and part from them at the end."""
        if "WORLD_SIZE" not in os.environ:
            yield cls()
            return
        if device.type == "cuda":
            n, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
            if n > gpus:
                raise UserError(f"--nproc-per-node {n}: this machine has GPUs for {gpus}; start one process for each")
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # When torchrun begins again after a failure, its store still has the addresses of those who died.
        store, rank, size = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        # What lies on the GPUs goes through NCCL, everything else through gloo.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
        yield cls(rank, size)
        dist.barrier()  # not after an error: the others may not be there any more
        dist.destroy_process_group()

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, in the place of `values`."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def any(self, *wishes: bool) -> list[bool]:
        """Whether some process wishes it, for each of the wishes: what one does, all must do."""
        return self.sum(torch.tensor(wishes, dtype=torch.int)).bool().tolist()

    def told(self, value):
        """What the first process says."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values)  # pickled, but among our own processes only
        return values[0]

    def in_turn(self, work: Callable[[], typing.Any]):
        """The result of `work`, done first by one process of each machine, so that the others find its files."""
        if self.size == 1:
            return work()
        first = os.environ.get("LOCAL_RANK", "0") == "0"
        result = work() if first else None
        dist.barrier()
        return result if first else work()


@torch.no_grad()
def evaluate(
    model: GPT, ids: Tensor, dtype: torch.dtype = torch.float32, world: World | None = None
) -> tuple[float, int]:
    """Mean loss over the text `ids` (N,), in nats per character, and the number of characters it is the mean of.

    The text is cut into windows of block_size that do not overlap, the last one shorter; every character but the first
    is predicted once, from what precedes it in its window. Characters unknown to the model (id 0) are not counted. No
    random numbers: the same weights give the same figure. The processes of a world share the work.
    """
    was_training, T, device, world = model.training, model.config.block_size, model.wte.weight.device, world or World()
    model.eval()
    whole = (len(ids) - 1) // T * T
    rows = max(1, min(32, (1 << 24) // (T * model.config.vocab_size)))  # at most 64 MB of logits
    batches = list(zip(ids[:whole].view(-1, T).split(rows), ids[1 : whole + 1].view(-1, T).split(rows), strict=True))
    batches.append((ids[None, whole:-1], ids[None, whole + 1 :]))
    sums = torch.zeros(2, dtype=torch.float64 if device.type != "mps" else torch.float32, device=device)
    for x, y in batches[world.rank :: world.size]:
        if not y.numel():  # no whole window, or nothing after the last
            continue
        x, y = x.long().to(device), y.long().to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = model(x)
        sums[0] += F.cross_entropy(logits.flatten(0, 1).float(), y.flatten(), reduction="sum", ignore_index=0)
        sums[1] += (y != 0).sum()
    world.sum(sums)
    model.train(was_training)
    return float(sums[0] / sums[1]), int(sums[1])


@lru_cache(maxsize=2)
def dealt(number: int, n_characters: int, block_size: int, seed: int) -> Tensor:
    """Where the windows begin, in the order of pass `number` over the text: cut at a random offset, and shuffled."""
    per_pass = max(1, (n_characters - block_size - 1) // block_size)
    spare = n_characters - block_size * per_pass  # offsets that leave room for the last target
    generator = torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63)
    offset = torch.randint(spare, (1,), generator=generator)
    return offset + block_size * torch.randperm(per_pass, generator=generator)


def window_starts(step: int, n_steps: int, batch: int, n_characters: int, block_size: int, seed: int) -> Tensor:
    """Where the windows of text of updates `step` to `step + n_steps - 1` begin: (n_steps, batch).

    The text is dealt out like a pack of cards: cut into windows at a random offset, shuffled, used up, then cut and
    shuffled anew. It is a function of the seed and the step alone, so a continued run needs no random state for it.
    """
    first, last, per_pass = step * batch, (step + n_steps) * batch, len(dealt(0, n_characters, block_size, seed))
    passes = range(first // per_pass, -(-last // per_pass))
    starts = torch.cat([dealt(number, n_characters, block_size, seed) for number in passes])
    return starts[first % per_pass :][: n_steps * batch].view(n_steps, batch)


def default_dropout(passes: float) -> float:
    """Dropout for a text seen `passes` times: what is seen often is learnt by heart, unless this prevents it."""
    return 0.0 if passes < 4 else 0.05 if passes < 40 else 0.2


@contextmanager
def kept_memory() -> Iterator[None]:
    """Within it the C library keeps what freed tensors leave, if it is glibc: the next update asks for as much again.

    To get it from the system each time, page by page, takes 5 to 20% of an update on a CPU.
    """
    mallopt = None
    with suppress(AttributeError, OSError, TypeError):  # another C library, or none that can be asked
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no tensor gets pages of its own
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: nothing goes back
    try:
        yield
    finally:
        if mallopt:  # glibc does not go back to adjusting itself, so these are the limits up to which it would
            mallopt(-4, 1 << 16)
            mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD
            mallopt(-1, 64 << 20)
            ctypes.CDLL(None).malloc_trim(0)


class Diverged(UserError):
    """The loss or a weight is no longer a number, and will never be one again."""


class Replay:
    """Some work for the device that is done again and again; on CUDA as the replay of a graph, which costs one launch.

    The work must find and leave all its numbers in tensors that stay where they are, and never wait for the device. It
    is recorded as a graph after its first three times. Should that fail, it says so, and goes on without.
    """

    def __init__(self, work: Callable[[], None], graphs: bool):
        self.work, self.graph = work, None
        self.stream = torch.cuda.Stream() if graphs else None
        self.eager_left = 3  # times before the graph is recorded

    def __call__(self) -> None:
        if self.graph:
            self.graph.replay()
        elif self.stream is None:
            self.work()
        elif self.eager_left:
            self.eager_left -= 1
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self.work()
            torch.cuda.current_stream().wait_stream(self.stream)
        else:
            self.record()
            self()

    def record(self) -> None:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                self.work()
            self.graph = graph
        except RuntimeError as error:
            say(f"NOTE: no CUDA graph on this device ({str(error).splitlines()[0]}); going on without, which is slower")
            self.stream = None


class Trainer:
    """A model in training and everything that changes with it. One `update` after another, the rest reads or saves."""

    CHUNK = 250  # updates whose text is taken to the device at once

    def __init__(
        self,
        config: GPTConfig,
        cfg: TrainConfig,
        ids: Tensor,
        device: torch.device,
        dtype: torch.dtype,
        weights: dict[str, Tensor] | None = None,  # to start from; else random ones
        world: World | None = None,
    ):
        self.cfg, self.device, self.dtype, self.step, self.world = cfg, device, dtype, 0, world or World()
        self.history: list[list] = []
        self.best: dict[str, Tensor] = {}
        self.best_loss = math.inf
        torch.manual_seed(cfg.seed)
        self.model = GPT(config).to(device)
        if weights:
            self.model.load_state_dict(weights)
        self.ids, self.validation_ids = split(ids)
        # Hidden matrices go to Muon; embeddings, LayerNorms and biases to AdamW.
        matrices = [p for p in self.model.h.parameters() if p.dim() == 2]
        others = [p for p in self.model.parameters() if not any(p is m for m in matrices)]
        self.muon = Muon(matrices, cfg.muon_learning_rate, cfg.weight_decay, dtype)
        rate = torch.tensor(0.0, device=device)
        self.adamw = torch.optim.AdamW(
            others, lr=rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True, capturable=device.type == "cuda"
        )
        # Each process takes its share of every batch, and averages its gradients with the others'.
        self.share = torch.arange(cfg.batch_size).tensor_split(self.world.size)[self.world.rank]
        self.forward = self.model
        if self.world.size > 1:
            self.forward = nn.parallel.DistributedDataParallel(self.model)
            torch.manual_seed(cfg.seed + self.world.rank)  # no two drop the same values
        # What an update reads lives on the device, so that a CUDA graph of it needs nothing from Python.
        self.at = torch.zeros(1, dtype=torch.long, device=device)  # the step, as a tensor
        self.losses = torch.zeros(cfg.max_steps, device=device)
        self.averaged = 0  # up to this step `losses` are those of all processes
        self.chunk = -1  # the chunk of updates that `rates` and `text` are filled for
        self.rates = torch.zeros(self.CHUNK, device=device)
        kind = torch.uint8 if ids.dtype == torch.uint8 else torch.int32
        self.text = torch.zeros(self.CHUNK, len(self.share), config.block_size + 1, dtype=kind, device=device)
        self.replay = Replay(self._update, device.type == "cuda" and self.world.size == 1)

    def _update(self) -> None:
        """One optimizer update: shapes that never change, and nothing that waits for the device."""
        self.model.zero_grad(set_to_none=True)  # first, since a graph that could not be recorded may leave gradients
        rate = self.rates[self.at % self.CHUNK]  # (1,)
        text = self.text[self.at % self.CHUNK][0].long()  # (B, T + 1)
        parts = text.chunk(self.cfg.grad_accum)
        for part in parts:
            # Gradients are averaged over the processes with the last part, when they are complete.
            last = self.world.size == 1 or part is parts[-1]
            with nullcontext() if last else self.forward.no_sync():
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
                    logits = self.forward(part[:, :-1])
                loss = loss_of(logits, part[:, 1:]) * (len(part) * self.world.size / self.cfg.batch_size)
                loss.backward()
            self.losses.index_add_(0, self.at, loss.detach().view(1))
        self.adamw.param_groups[0]["lr"].copy_(self.cfg.learning_rate * rate[0])
        self.adamw.step()
        self.muon.step(rate)
        self.at += 1

    def update(self) -> None:
        """Do the next update."""
        if self.chunk != self.step // self.CHUNK:
            self.chunk = self.step // self.CHUNK
            first, B, T = self.chunk * self.CHUNK, self.cfg.batch_size, self.model.config.block_size
            last = min(first + self.CHUNK, self.cfg.max_steps)
            rates = torch.tensor([learning_rate(s, self.cfg) for s in range(first, last)])
            self.rates[: last - first].copy_(rates)
            starts = window_starts(first, self.CHUNK, B, len(self.ids), T, self.cfg.seed)[:, self.share]
            self.text.copy_(self.ids.unfold(0, T + 1, 1)[starts])
        self.replay()
        self.step += 1

    def average_losses(self) -> None:
        """Make `losses` those of whole batches, where until now they were of this process's share."""
        self.world.sum(self.losses[self.averaged : self.step]).div_(self.world.size)
        self.averaged = self.step

    def diverged(self, loss: float) -> Diverged:
        return Diverged(
            f"the loss is {loss} at step {self.step:,}: the training has diverged; lower --muon-learning-rate "
            f"(now {self.cfg.muon_learning_rate}) and --learning-rate (now {self.cfg.learning_rate}), each to a third"
        )

    def evaluate(self) -> None:
        """Measure both losses, note them in the history, and keep the weights if they are the best so far.

        raises  Diverged if the loss is no longer a number
        """
        self.average_losses()
        since = self.history[-1][0] if self.history else 0
        training = float(self.losses[since : self.step].mean())
        validation, _ = evaluate(self.model, self.validation_ids, self.dtype, self.world)
        if not math.isfinite(training + validation):
            raise self.diverged(training)
        self.history.append([self.step, round(training, 6), round(validation, 6)])
        if validation < self.best_loss:
            self.best_loss = validation
            self.keep()

    def keep(self) -> None:
        """Make the weights as they are the best."""
        self.best = {name: weight.detach().clone() for name, weight in self.model.named_parameters()}

    def overfitting(self) -> bool:
        """Whether validation loss has risen for five measurements while training loss fell."""
        best = min(range(len(self.history)), key=lambda i: self.history[i][2], default=0)
        later = self.history[best + 1 :]
        return len(later) >= 5 and all(row[1] < self.history[best][1] for row in later[-5:])

    def state(self) -> dict[str, Tensor]:
        """Everything that the next update depends on, and the best weights, as named tensors."""
        self.average_losses()
        tensors = {f"model.{name}": weight for name, weight in self.model.named_parameters()}
        tensors |= {f"best.{name}": weight for name, weight in self.best.items()}
        tensors |= {f"muon.{i}": buffer for i, buffer in enumerate(self.muon.buffers)}
        for i, state in self.adamw.state_dict()["state"].items():
            tensors |= {f"adamw.{i}.{name}": value for name, value in state.items()}
        tensors |= {"losses": self.losses, "rng.cpu": torch.get_rng_state()}
        return tensors | ({"rng.cuda": torch.cuda.get_rng_state()} if self.device.type == "cuda" else {})

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], story: Story) -> None:
        """Continue from a `state` and the story saved with it, as if there had been no interruption.

        raises  KeyError, RuntimeError, TypeError or ValueError if they are not those of such a training
        """
        if not all(bool(t.isfinite().all()) for t in tensors.values()):
            raise ValueError("it has values that are not finite")
        measured = story.history[-1][0] if story.history else 0
        if not measured <= story.step <= self.cfg.max_steps or (story.step == self.cfg.max_steps and not measured):
            raise ValueError(f"it is at step {story.step:,}, measured at {measured:,}, of {self.cfg.max_steps:,}")
        self.step, self.history = story.step, story.history
        self.best_loss = math.inf if story.validation_loss is None else story.validation_loss
        self.at.fill_(self.step)
        self.losses.copy_(tensors["losses"])
        for kind in ("best", "model") if self.history else ("model",):
            # Not copy_, which would stretch what has another shape.
            self.model.load_state_dict({n: tensors[f"{kind}.{n}"] for n, _ in self.model.named_parameters()})
            if kind == "best":
                self.keep()
        for i, buffer in enumerate(self.muon.buffers):
            buffer.copy_(tensors[f"muon.{i}"])
        optimizer = self.adamw.state_dict()
        for i in optimizer["param_groups"][0]["params"]:
            names = [name for name in tensors if name.startswith(f"adamw.{i}.")]
            optimizer["state"][i] = {name.split(".")[2]: tensors[name] for name in names}
        self.adamw.load_state_dict(optimizer)
        for weight, state in self.adamw.state.items() if self.step else ():
            if not state["exp_avg"].shape == state["exp_avg_sq"].shape == weight.shape or state["step"].numel() != 1:
                raise ValueError("its optimizer is that of another network")
        self.averaged = self.step
        if self.world.rank:  # its own random numbers, which nobody has kept
            torch.manual_seed(((self.cfg.seed + self.world.rank) * 1_000_003 + self.step) % 2**63)
            return
        torch.set_rng_state(tensors["rng.cpu"])
        if self.device.type == "cuda" and "rng.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["rng.cuda"])


def checkpoint_path(model: Path) -> Path:
    """Where the state of the training of `model` is kept while it runs.

    raises  UserError if `model` cannot be the name of a file
    """
    if not model.name or model.name == ".." or model.is_dir():
        raise UserError(f"--out {model}: is a folder; name a file in it, as {model / MODEL}")
    return model.with_stem("checkpoint" if model.stem == "model" else f"{model.stem}-checkpoint")


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """Collect Ctrl-C and SIGTERM in a list instead of dying of them; the second one takes effect at once."""
    caught: list[int] = []

    def note(number, frame):
        caught.append(number)
        if "WORLD_SIZE" in os.environ:  # torchrun passes on a Ctrl-C that the terminal has already sent to all
            return
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, before[name])
        say("Stopping after this step ... (once more: at once, losing what came after the last checkpoint)")

    before = {name: signal.signal(name, note) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def out_of_memory(error: Exception) -> bool:
    """Whether PyTorch or Python had no memory left; on a CPU PyTorch tells it only in words, other ones on Windows."""
    said = re.search("out of memory|can't allocate memory|not enough memory|bad_alloc", str(error))
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(said))


class Report:
    """What a person sees of a training: a live line on a terminal, plain lines elsewhere, nothing if quiet."""

    def __init__(self, trainer: Trainer, sample: Callable[[], str], quiet: bool):
        self.trainer, self.sample, self.quiet, self.warned = trainer, sample, quiet, False
        self.recent: deque[tuple[float, int]] = deque([(time.monotonic(), trainer.step)], maxlen=50)
        self.live = None
        if sys.stderr.isatty() and not quiet:
            columns = rich.progress.BarColumn(bar_width=10), rich.progress.TextColumn("{task.description}")
            self.live = rich.progress.Progress(*columns, console=Console(stderr=True, highlight=False), transient=True)
            self.task = self.live.add_task("", total=trainer.cfg.max_steps, completed=trainer.step)
            self.live.start()

    def figures(self) -> tuple[str, str]:
        """Step and losses, then speed and time left, in a fixed width."""
        trainer, cfg = self.trainer, self.trainer.cfg
        (before, first), (now, last) = self.recent[0], (time.monotonic(), trainer.step)
        speed = (last - first) / max(now - before, 1e-9)  # updates a second
        left = divmod(int((cfg.max_steps - last) / speed), 60) if speed else (0, 0)
        measured, training, validation = trainer.history[-1] if trainer.history else (0, math.nan, math.nan)
        if last > measured and trainer.device.type == "cpu":  # elsewhere a look at a loss would wait for the device
            training = float(trainer.losses[max(measured, last - 50) : last].mean())
        characters = speed * cfg.batch_size * trainer.model.config.block_size
        step = f"step {last:>{len(str(cfg.max_steps))}}/{cfg.max_steps} train {training:.4f} val {validation:.4f}"
        return step.replace("nan", "  -   "), f"{characters:9,.0f} char/s {left[0]:3}:{left[1]:02} left"

    def update(self) -> None:
        """Tell of a step, a few times a second at most."""
        if time.monotonic() - self.recent[-1][0] > 0.2:
            self.recent.append((time.monotonic(), self.trainer.step))
            if self.live:
                self.live.update(self.task, completed=self.trainer.step, description=" ".join(self.figures()))

    def evaluation(self) -> None:
        """Tell of new figures in the history, with a line of what the model writes now."""
        if not self.quiet:
            losses, speed = self.figures()
            sample = printable(self.sample().replace("\n", " "))
            if self.live:
                line = f"{losses} | {sample}"
                self.live.console.print(line, markup=False, emoji=False, no_wrap=True, overflow="ellipsis")
            else:
                say(f"{losses} {speed} | {sample}")
        self.recent.append((time.monotonic(), self.trainer.step))
        if self.trainer.overfitting() and not self.warned:
            self.warned = True
            say(
                "NOTE: validation loss rises while training loss falls: the text is being learnt by heart. The best "
                "weights are kept; more --dropout, fewer --max-steps or more text would help."
            )

    def close(self) -> None:
        if self.live:
            self.live.stop()


def fit(trainer: Trainer, report: Report, checkpoint: Path, story: Callable[[], Story]) -> None:
    """Train to the end. Ctrl-C and SIGTERM finish the step, save the state and leave.

    raises  KeyboardInterrupt, SystemExit or UserError, Diverged among them
    """
    cfg, saved = trainer.cfg, time.monotonic()
    interval = 60.0 if cfg.checkpoint_interval is None else cfg.checkpoint_interval
    with interruptible() as caught:
        try:
            while trainer.step < cfg.max_steps:
                trainer.update()
                if trainer.step % cfg.eval_interval == 0 or trainer.step == cfg.max_steps:
                    trainer.evaluate()
                    report.evaluation()
                report.update()
                stop, due = trainer.world.any(bool(caught), time.monotonic() - saved > interval)
                if stop or due:
                    began = time.monotonic()
                    state = trainer.state()
                    broken = not all(bool(tensor.isfinite().all()) for tensor in state.values())
                    if trainer.world.any(broken)[0]:
                        raise trainer.diverged(math.nan)  # what cannot be continued must not replace what can
                    try:
                        if trainer.world.rank == 0:
                            save_file(checkpoint, state, story())
                    except UserError as error:
                        if stop:
                            raise
                        say(f"NOTE: {error}; the training goes on without")
                    saved = time.monotonic()
                    if cfg.checkpoint_interval is None:
                        interval = max(60.0, 100 * (saved - began))
                if stop and trainer.step < cfg.max_steps:
                    report.close()
                    say(f"Stopped at step {trainer.step:,}, kept in {checkpoint}; the same command goes on from there.")
                    raise SystemExit(143) if signal.SIGTERM in caught[:1] else KeyboardInterrupt
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            B, cure = cfg.batch_size, "a smaller --n-embd or --block-size"
            if parts := [n for n in range(2 * cfg.grad_accum, B + 1) if B % n == 0]:
                cure = f"--grad-accum {parts[0]}, which gives the same result"
            raise UserError(f"--batch-size {B}: out of memory; try {cure}") from None
        finally:
            report.close()


def loss_chart(history: list, width: int = 72, height: int = 12) -> str:
    """Training (o) and validation (x) loss over the steps, as lines of text."""
    rows = [row for row in history if all(map(math.isfinite, row))]
    if len(rows) < 2:
        return ""
    low, high = min(min(r[1:]) for r in rows), max(max(r[1:]) for r in rows)
    last, columns = rows[-1][0], width - 9
    grid = [[" "] * columns for _ in range(height)]
    for step, training, validation in rows:
        column = round(step / last * (columns - 1))
        for loss, mark in ((training, "o"), (validation, "x")):
            grid[round((high - loss) / max(high - low, 1e-9) * (height - 1))][column] = mark
    lines = [f"{high - (high - low) * i / (height - 1):7.3f} |{''.join(line).rstrip()}" for i, line in enumerate(grid)]
    lines.append(" " * 8 + "+" + "-" * columns)
    lines.append(f"{'':9}0{f'step {last:,}':>{columns - 1}}")
    lines.append(f"{'':9}loss in nats/char: o training, x validation")
    return "\n".join(lines)


# ---- generation ------------------------------------------------------------------------------------------------------


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities (..., V) from logits (..., V)."""
    rates = np.exp(logits - logits.max(-1, keepdims=True))
    return rates / rates.sum(-1, keepdims=True)


def adjust(logits: np.ndarray, cfg: SampleConfig, seen: np.ndarray | None = None) -> np.ndarray:
    """Logits (B, V) after penalty, temperature, top-k, top-p and min-p, in that order; -inf for what is ruled out.

    seen    (B, V), True for characters that already occurred; needed for the repetition penalty
    source  Keskar et al. 2019, "CTRL", section 4.1 (penalty); Fan et al. 2018, "Hierarchical Neural Story Generation"
            (top-k); Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration" (top-p); Nguyen et al. 2024,
            "Turning Up the Heat: Min-p Sampling" (min-p)
    """
    if cfg.repetition_penalty != 1 and seen is not None:
        penalised = np.where(logits < 0, logits * cfg.repetition_penalty, logits / cfg.repetition_penalty)
        logits = np.where(seen, penalised, logits)
    if cfg.temperature not in (0, 1):
        logits = logits / max(cfg.temperature, 1e-6)  # below that only the likeliest is left anyway, or an overflow
    if 0 < cfg.top_k < logits.shape[-1]:
        kth = np.partition(logits, -cfg.top_k)[:, -cfg.top_k, None]  # (B, 1)
        logits = np.where(logits < kth, -np.inf, logits)
    if cfg.top_p < 1:
        order = logits.argsort(kind="stable")  # (B, V), the likeliest last
        unlikely = softmax(np.take_along_axis(logits, order, -1)).cumsum(-1) <= 1 - cfg.top_p
        unlikely[:, -1] = False  # the likeliest stays, whatever top_p
        logits = np.where(np.take_along_axis(unlikely, order.argsort(), -1), -np.inf, logits)
    if cfg.min_p > 0:
        probabilities = softmax(logits)
        logits = np.where(probabilities < cfg.min_p * probabilities.max(-1, keepdims=True), -np.inf, logits)
    return logits


def choose(
    logits: np.ndarray, cfg: SampleConfig, generator: torch.Generator, seen: np.ndarray | None = None
) -> np.ndarray:
    """Ids (B,) drawn from logits (B, V) under the settings; never 0, the unknown character."""
    logits = logits.copy()
    logits[:, 0] = -np.inf
    logits = adjust(logits, cfg, seen)
    if cfg.temperature > 0:
        # The first to ring of alarms whose rates are exp(logits): torch.multinomial's own way, without its checks.
        logits = logits - np.log(torch.empty(logits.shape).exponential_(generator=generator).numpy())
    return logits.argmax(-1)


def window_start(n: int, block_size: int) -> int:
    """Where the context begins after `n` characters of text.

    Positions are absolute, so a full context cannot slide by one. When it is full, its last half is read again and the
    text goes on from there.
    """
    half = block_size // 2
    return 0 if n <= block_size else -(-(n - block_size) // half) * half


class Decoder:
    """Reads `batch` texts character by character; what it has read stays, as keys and values, in a cache.

    It is GPT's forward pass written for one position: so small a network is done sooner than its modules are called. On
    a CPU a position looks at what has been read, on CUDA at the whole cache through a mask, since a graph wants shapes
    that never change.
    """

    def __init__(self, model: GPT, batch: int):
        config, self.model = model.config, model
        L, H, S, D = config.n_layer, config.n_head, config.block_size, config.n_embd // config.n_head
        self.wte, self.wpe, self.ln_f = model.wte.weight, model.wpe.weight, list(model.ln_f.parameters())
        self.blocks = [list(block.parameters()) for block in model.h]
        self.cache = self.wte.new_zeros(L, 2, batch * H, S, D)  # keys, values
        self.everywhere = torch.arange(S, device=self.wte.device)
        # Where a step finds its input and leaves its result.
        self.length, self.position = 0, self.everywhere[:1].clone()
        self.ids = self.everywhere.new_zeros(batch)
        self.logits = self.wte.new_zeros(batch, config.vocab_size)
        self.replay = Replay(self._step, self.wte.device.type == "cuda")

    @torch.inference_mode()
    def read(self, ids: Tensor) -> Tensor:
        """Logits (B, V) of what follows the texts `ids` (B, T), or (1, T) for all texts alike; a new beginning."""
        B, self.length, kept = len(self.ids), ids.shape[1], []
        self.logits.copy_(self.model(ids, kept)[:, -1])
        for cache, qkv in zip(self.cache, kept, strict=True):
            cache[:, :, : self.length] = qkv[1:].expand(-1, B, -1, -1, -1).flatten(1, 2)
        return self.logits

    @torch.inference_mode()
    def step(self, ids: Tensor) -> Tensor:
        """Logits (B, V) of what follows when each text goes on with one of `ids` (B,).

        raises  IndexError if the cache is full
        """
        self.position.copy_(self.everywhere[self.length])
        self.ids.copy_(ids)
        self.length += 1
        self.replay()
        return self.logits

    def _step(self) -> None:
        (B, C), D = (len(self.ids), self.wte.shape[1]), self.cache.shape[-1]
        if self.wte.device.type == "cpu":
            S, unseen = self.length, self.wte.new_zeros(1)
        else:
            S = len(self.everywhere)
            unseen = self.wte.new_zeros(S).masked_fill_(self.everywhere > self.position, -torch.inf)
        seen = self.cache[..., :S, :]  # (L, 2, B * H, S, D)
        keys, values = seen.unbind(1)
        x = F.embedding(self.ids, self.wte) + F.embedding(self.position, self.wpe)  # (B, C)
        for block, both, k, v in zip(self.blocks, seen, keys.mT, values, strict=True):
            ln_1, ln_1_bias, c_attn, c_attn_bias, c_proj, c_proj_bias = block[:6]
            qkv = F.linear(torch.layer_norm(x, (C,), ln_1, ln_1_bias), c_attn, c_attn_bias)  # (B, 3 * C)
            qkv = qkv.view(B, 3, -1, D).transpose(0, 1).reshape(3, -1, 1, D)  # (3, B * H, 1, D)
            both.index_copy_(2, self.position, qkv[1:])
            scores = torch.baddbmm(unseen, qkv[0], k, alpha=D**-0.5)  # (B * H, 1, S)
            y = torch.bmm(torch.softmax(scores, dim=-1), v).view(B, C)
            x = x + F.linear(y, c_proj, c_proj_bias)
            ln_2, ln_2_bias, c_fc, c_fc_bias, c_proj, c_proj_bias = block[6:]
            y = F.linear(torch.layer_norm(x, (C,), ln_2, ln_2_bias), c_fc, c_fc_bias)  # (B, 4 * C)
            x = x + F.linear(F.gelu(y, approximate="tanh"), c_proj, c_proj_bias)
        self.logits.copy_(F.linear(torch.layer_norm(x, (C,), *self.ln_f), self.wte))


def normalise(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """LayerNorm of one vector x (C,)."""
    x = x - x.sum() / x.size
    return x * weight / (x @ x / x.size + 1e-5) ** 0.5 + bias


class SoloDecoder(Decoder):
    """A Decoder for one text on a CPU. Its step is in NumPy, whose calls cost less than PyTorch's.

    Weights, cache and logits are the parent's, seen as arrays; nothing is copied.
    """

    def __init__(self, model: GPT):
        super().__init__(model, 1)
        self.wte, self.wpe, *self.ln_f = (w.detach().numpy() for w in (self.wte, self.wpe, *self.ln_f))
        self.blocks = [[weight.detach().numpy() for weight in block] for block in self.blocks]
        self.kept, self.row = self.cache.numpy(), self.logits[0].numpy()  # (L, 2, H, S, D), (V,)

    def step(self, ids: Tensor) -> Tensor:
        at, (_, _, H, _, D) = self.length, self.kept.shape
        x = self.wte[int(ids)] + self.wpe[at]  # (C,)
        self.length += 1
        here, keys, values = self.kept[..., at, :], self.kept[:, 0, :, : at + 1].mT, self.kept[:, 1, :, : at + 1]
        for block, new, k, v in zip(self.blocks, here, keys, values, strict=True):
            ln_1, ln_1_bias, c_attn, c_attn_bias, c_proj, c_proj_bias = block[:6]
            qkv = (c_attn @ normalise(x, ln_1, ln_1_bias) + c_attn_bias).reshape(3, H, D)
            new[:] = qkv[1:]
            scores = (qkv[0][:, None] * D**-0.5) @ k  # (H, 1, at + 1)
            x = x + (c_proj @ (softmax(scores) @ v).reshape(-1) + c_proj_bias)
            ln_2, ln_2_bias, c_fc, c_fc_bias, c_proj, c_proj_bias = block[6:]
            y = c_fc @ normalise(x, ln_2, ln_2_bias) + c_fc_bias  # (4 * C,)
            y *= 0.5 + 0.5 * np.tanh((2 / np.pi) ** 0.5 * (y + 0.044715 * y * y * y))  # GELU
            x = x + (c_proj @ y + c_proj_bias)
        self.row[:] = self.wte @ normalise(x, *self.ln_f)
        return self.logits


def spare_threads(model: GPT) -> None:
    """Let one thread read texts for a small network: several are no quicker, and on a busy machine they wait long."""
    if model.config.n_parameters() < 4_000_000:
        torch.set_num_threads(1)


def stream(
    model: GPT, prompt: Tensor, cfg: SampleConfig, generator: torch.Generator, batch: int = 1
) -> Iterator[Tensor]:
    """Endless continuation of `prompt` (N,), N > 0: ids (batch,) of the next character of `batch` texts, one at a time.

    Memory does not grow with the length of the text.
    """
    device, T = model.wte.weight.device, model.config.block_size
    seen = np.zeros((batch, model.config.vocab_size), bool)
    seen[:, prompt.numpy()] = True
    context = prompt[window_start(len(prompt), T) :].long()  # (S,)
    window = list(context.expand(batch, -1).unbind(1))
    decoder = SoloDecoder(model) if batch == 1 and device.type == "cpu" else Decoder(model, batch)
    logits = decoder.read(context[None].to(device))
    while True:
        chosen = choose(logits.float().cpu().numpy(), cfg, generator, seen)  # (B,); one random stream for all devices
        if cfg.repetition_penalty != 1:
            seen[np.arange(batch), chosen] = True
        ids = torch.from_numpy(chosen)
        yield ids
        window.append(ids)
        if len(window) > T:
            window = window[window_start(T + 1, T) :]
            logits = decoder.read(torch.stack(window, dim=1).to(device))
        else:
            logits = decoder.step(ids)


def write(
    model: GPT, tokenizer: Tokenizer, prompt: str, cfg: SampleConfig, generator: torch.Generator, batch: int = 1
) -> Iterator[list[str]]:
    """Continuations of `prompt`, as they come: lists of `batch` pieces, to be joined; none holds a stop text.

    An empty prompt continues from a line end. A piece is held back while it may be the beginning of a stop text.
    """
    ids = tokenizer.encode(prompt or "\n")
    ids = ids if ids.any() else torch.ones_like(ids)
    held, done = [""] * batch, [False] * batch
    texts = stream(model, ids, cfg, generator, batch)
    for _ in range(cfg.max_new):
        pieces = [""] * batch
        for i, c in enumerate(tokenizer.decode(next(texts))):
            if done[i]:
                continue
            held[i] += c
            for stop in sorted(cfg.stop, key=len, reverse=True):  # of several that end here, that which began first
                if held[i].endswith(stop):
                    held[i], done[i] = held[i][: -len(stop)], True
                    break
            begun = (k for stop in cfg.stop for k in range(1, len(stop)) if held[i].endswith(stop[:k]))
            cut = len(held[i]) - (0 if done[i] else max(begun, default=0))
            pieces[i], held[i] = held[i][:cut], held[i][cut:]
        yield pieces
        if all(done):
            return
    yield held  # what waited for the rest of a stop text that did not come


# ---- REPL ------------------------------------------------------------------------------------------------------------
# Talk to a model, and look at how it thinks. A view is a function that gives rich text; `look` fits it to the terminal.

HEAT = ("", "#4a90c2", "#2f9e77", "#d9822b", "#d03a3a")  # of middling lightness, for dark and light terminals
ALARM = ("", "#000000 on #fee391", "#000000 on #fe9929", "#ffffff on #b30000")


class Frame(typing.NamedTuple):
    """What a view has to fit into."""

    width: int = 80  # cells
    height: int = 25  # lines
    shades: str = " ░▒▓█"  # from nothing to all


def look(console: Console, view: Callable[..., Text], *subject) -> None:
    """Print a view of a subject in the size and the characters that the console has."""
    frame = Frame(console.width, console.height)
    try:
        frame.shades.encode(console.encoding)
    except UnicodeError:
        frame = frame._replace(shades=" .:*#")
    console.print(view(*subject, frame), highlight=False)


def glyph(c: str) -> str:
    r"""A character as a view shows it: spelt out, as \n or \u0301, if it would move the cursor or take no cell."""
    return c if c.isprintable() and cell_len(c) else c.encode("unicode_escape").decode()


def ending(text: str, room: int) -> str:
    """The last characters of `text` in quotes, in at most `room` cells."""
    shown = [glyph(c) for c in text[-room:]]
    while shown and sum(map(cell_len, shown)) > room - 2:
        shown.pop(0)
    return f"'{''.join(shown)}'"


def underlined(cells: list[tuple[str, str, str]], width: int) -> Text:
    r"""Lines of characters with something below each; a cell is character, style, below. A new line after each \n."""
    lines, above, below = Text(), Text(), ""
    for c, style, under in [*cells, ("", "", "")]:
        room = max(cell_len(glyph(c)), len(under))
        if not c or above.cell_len + room > width or above.plain.endswith("\\n"):
            lines.append_text(above).append(f"\n{below}\n", "dim")
            above, below = Text(), ""
        above.append(f"{glyph(c)}{'':{room - cell_len(glyph(c))}}", style)
        below += f"{under:<{room}}"
    return lines


@torch.no_grad()
def predictions(model: GPT, ids: Tensor, first: int) -> Tensor:
    """Logits (N + 1 - first, V) of the characters number `first` > 0 to N of a text `ids` (N,); N is the one to come.

    Each is predicted from the context that it has when `stream` writes the text.
    """
    ids, T, parts = ids.long().to(model.wte.weight.device), model.config.block_size, []
    while first <= len(ids):
        start = window_start(first, T)
        last = min(start + T, len(ids))  # of those with this context
        parts.append(model(ids[None, start:last])[0, first - start - 1 :].float().cpu())
        first = last + 1
    return torch.cat(parts)


def probs_view(model: GPT, tokenizer: Tokenizer, text: str, cfg: SampleConfig, frame: Frame) -> Text:
    """The likeliest characters after `text`, in percent: what the model says, then what each setting that is on leaves.

    A setting works on what the one at its left has left; "-" is ruled out. All bars have one scale.
    """
    ids = tokenizer.encode(text or "\n")
    logits = predictions(model, ids, len(ids)).numpy()  # (1, V)
    stages, on = {"model": softmax(logits[0])}, SampleConfig(temperature=1.0)  # every setting off
    logits[:, 0] = -np.inf  # U+FFFD is never written
    seen = np.isin(np.arange(logits.size), ids.numpy())[None]
    for name in ("repetition_penalty", "temperature", "top_k", "top_p", "min_p"):
        if (value := getattr(cfg, name)) != getattr(on, name):
            on = replace(on, **{name: value})
            left = adjust(logits, on, seen)[0]
            label = name.removeprefix("repetition_").replace("temperature", "temp").replace("_", "-")
            likeliest = np.arange(left.size) == left.argmax()
            stages[f"{label} {value:g}"] = likeliest if on.temperature == 0 else softmax(left)
    order = stages["model"].argsort(kind="stable")[::-1].tolist()  # of equals U+FFFD, id 0, is the last
    n = max(4, min(12, frame.height - 6))
    room = max(2, (frame.width - 8) // len(stages))  # cells for a stage
    highest = max(float(p.max()) for p in stages.values())
    lines = Text(f"After {ending(text, frame.width - 20)}, in percent:\n    next")
    lines.append("".join(f" {name[: room - 1]:<{room - 1}}" for name in stages), "bold")
    for row in [[i] for i in order[:n]] + [order[n:]]:
        label = f"'{glyph(tokenizer.characters[row[0]])}'" if len(row) == 1 else f"{len(row)} more"
        lines.append("\n" + " " * (8 - cell_len(label)) + label)
        for p in stages.values():
            share = float(p[row].sum())
            number = f"{100 * share:.{int(room > 5)}f}" if share else "-"
            bar = frame.shades[-1] * round(share / highest * (room - 7)) if len(row) == 1 else ""
            lines.append(f" {number:>{min(5, room - 1)}}")
            lines.append(f" {bar:<{room - 7}}" if room > 7 else " " * (room - 6), HEAT[1])
    return lines


def why_view(model: GPT, tokenizer: Tokenizer, prompt: str, answer: str, frame: Frame) -> Text:
    """`answer` coloured by how little the model expected each character after `prompt`, with its loss in bits below."""
    before, ids = tokenizer.encode(prompt or "\n"), tokenizer.encode(answer).long()
    logits = predictions(model, torch.cat((before.long(), ids)), len(before))[:-1]  # (N, V)
    bits = logits.log_softmax(-1) / -math.log(2)
    losses = bits.gather(1, ids[:, None])[:, 0]  # (N,)
    lines = Text("Below each character its loss; n bits: it had one chance in 2^n\n")
    digits = [str(min(9, round(loss)) or "") for loss in losses.tolist()]
    styles = [ALARM[min(3, int(loss / 2))] for loss in losses.tolist()]
    lines.append_text(underlined(list(zip(answer, styles, digits, strict=True)), frame.width))
    lines.append(f"{len(ids):,} characters, {losses.sum():,.1f} bits, {losses.mean():.3f} bits/char; least expected:")
    for i in losses.topk(min(3, len(ids))).indices.tolist():
        least, likeliest = bits[i].min(-1)
        instead = f" ({ending(tokenizer.characters[likeliest], 9)} {least:.1f})" if likeliest != ids[i] else ""
        line = f"{ending(answer[i], 9)} {losses[i]:.1f} bits{instead} after "
        lines.append(f"\n{line}{ending(prompt + answer[:i], max(3, frame.width - cell_len(line)))}")
    return lines


@torch.no_grad()
def attn_view(model: GPT, tokenizer: Tokenizer, text: str, layer: int | None, head: int | None, frame: Frame) -> Text:
    """Heat map of the attention in a layer (None: the last) and a head (None: the mean of all) at the end of `text`.

    A row for each character, a column for each that it may look at; at the right, the one that it looked at most.
    raises  UserError if there is no such layer or head
    """
    config, device = model.config, model.wte.weight.device
    for name, number, last in (("layer", layer, config.n_layer), ("head", head, config.n_head)):
        if number is not None and not 1 <= number <= last:
            raise UserError(f"--{name} {number}: must be from 1 to {last}")
    layer, ids = layer or config.n_layer, tokenizer.encode(text or "\n")
    ids = ids[window_start(len(ids), config.block_size) :].long().to(device)
    kept: list[Tensor] = []
    model(ids[None], kept)
    T, H, (q, k, _) = len(ids), config.n_head, kept[layer - 1]  # (1, H, T, D) each
    # Attention mixes values by weights: mixing the rows of the unit matrix gives the weights themselves.
    weights = attention(q, k, torch.eye(T, device=device).expand(1, H, T, T))[0].cpu()  # (H, T, T)
    weights = weights.mean(0) if head is None else weights[head - 1]  # (T, T)

    n = min(T, (frame.width - 16) // 2, max(8, frame.height - 4))
    names = [glyph(tokenizer.characters[i]) for i in ids.tolist()]
    levels = (0.05, 0.15, 0.30, 0.60)
    key = "  ".join(f"{shade} {low:.0%}" for shade, low in zip(frame.shades[1:], levels, strict=True))
    which = f"mean of {H} heads" if head is None else f"head {head} of {H}"
    lines = Text(f"Layer {layer} of {config.n_layer}, {which}\nattention from: {key}\n    ")
    lines.append("".join(set_cell_size(c, 2) for c in names[-n:]), "bold")
    for t in range(T - n, T):
        lines.append(f"\n {set_cell_size(names[t], 2)} ", "bold")
        for w in weights[t, T - n :].tolist():
            level = sum(w >= low for low in levels)
            lines.append(frame.shades[level] * 2, HEAT[level])
        most = int(weights[t].argmax())
        lines.append(f" '{names[most]}' {weights[t, most]:.0%}")
    return lines


def tokens_view(tokenizer: Tokenizer, text: str, frame: Frame) -> Text:
    """`text` with the id of each character below it; several if it is read as several, "-" if it is left out."""
    read = {c: tokenizer.admit(c)[0] for c in set(text)}
    ids = {c: "+".join(map(str, tokenizer.encode(read[c]).tolist())) or "-" for c in read}
    known, notice = tokenizer.admit(text)
    lines = underlined([(c, ALARM[read[c] != c], f"{ids[c]} ") for c in text], frame.width)
    lines.append(f"{len(text):,} characters, {len(known):,} ids of 1 to {len(tokenizer) - 1:,}")
    return lines.append(f"\n{''.join(map(glyph, notice))}" if notice else "")


def admitted(tokenizer: Tokenizer, text: str) -> str:
    """`text` in characters that the model knows; tells the person what was changed."""
    text, notice = tokenizer.admit(text)
    if notice:
        say(f"({notice})")
    return text


def random_source(seed: int | None) -> torch.Generator:
    """Random numbers for sampling: the same for the same seed, new ones without."""
    return torch.Generator().manual_seed(int.from_bytes(os.urandom(7), "big") if seed is None else seed)


@dataclass(frozen=True)
class ChatConfig(SampleConfig):
    """What /set can change."""

    verbose: str = knob("off", "tell the speed after each answer", choices=("on", "off"))


@dataclass(frozen=True)
class Turn(Settings):
    """A prompt as it was typed, what the model wrote, and the seed that makes it write that again."""

    prompt: str
    answer: str
    seed: int
    echo: int | None = None  # how many of the prompt's last characters were shown; None: all


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read; it appears whole or not at all."""
    with replacing(path, 0o600) as file:
        file.write(text.encode(errors="replace"))


def read_talk(path: Path) -> tuple[list[Turn], ChatConfig]:
    """What /save wrote; UserError if the file is anything else."""
    try:
        talk = json.loads(path.read_text("utf-8"))
        talk["settings"]["stop"] = tuple(map(str, talk["settings"]["stop"]))
        return [Turn(**turn) for turn in talk["turns"]], ChatConfig(**talk["settings"])
    except (LookupError, TypeError, ValueError, RecursionError, UserError):
        raise UserError(f"{path}: not a conversation that /save wrote; choose another file") from None


def as_written(value) -> str:
    """The value of a setting as a person would write it."""
    if isinstance(value, tuple):
        return " ".join(f"'{''.join(map(glyph, text))}'" for text in value) or "none"
    return "new each time" if value is None else str(value)


class Session:
    """A talk with a model. `do_NAME` is the command /NAME: its docstring is the help, its signature the usage."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, story: Story, cfg: SampleConfig):
        self.model, self.tokenizer, self.story, self.cfg = model, tokenizer, story, ChatConfig(**asdict(cfg))
        self.turns: list[Turn] = []
        self.over, self.console = False, Console(stderr=True)
        self.commands = {n.removeprefix("do_"): getattr(self, n) for n in vars(Session) if n.startswith("do_")}
        self.settings = [knob.name.replace("_", "-") for knob in fields(ChatConfig)]

    def respond(self, line: str) -> None:
        """Do what a line asks for; UserError if it cannot be done."""
        if line.startswith('"""'):
            return self.answer(line.rstrip()[3:].removesuffix('"""').removeprefix("\n").removesuffix("\n"))
        if line.strip() in ("quit", "exit"):
            return self.do_quit()
        if not line.startswith("/") or line.startswith("//"):
            return self.answer(line[line.startswith("//") :])
        name, _, rest = line[1:].partition(" ")
        if name in self.settings:
            raise UserError(f"/{name}: is a setting; change it with /set {name}")
        self.demand(name, self.commands, "/help lists them, // is a slash", "/")
        names = self.parameters(name)
        arguments = [rest] * bool(rest) if len(names) == 1 else rest.split(maxsplit=max(0, len(names) - 1))
        try:
            inspect.signature(self.commands[name]).bind(*arguments)
        except TypeError:
            raise UserError(f"usage: {self.usage(name)}") from None
        if names == ["file"]:
            arguments = [path := Path(os.path.expanduser(rest.strip().replace("\0", "")))]
            if path.exists() and not path.is_file():  # a pipe would keep us waiting, /dev/zero would never end
                raise UserError(f"{path}: is not a file; choose another")
        self.commands[name](*arguments)

    @staticmethod
    def demand(word: str, known: Iterable[str], cure: str, sign: str = "") -> None:
        """Raise UserError with the nearest of the `known` words if `word` is none of them."""
        if word not in known:
            near = nearest(word, list(known))
            raise UserError(f"{sign}{word}: unknown{f', did you mean {sign}{near}?' if near else ';'} {cure}")

    def parameters(self, command: str) -> list[str]:
        return list(inspect.signature(self.commands[command]).parameters)

    def usage(self, command: str) -> str:
        parameters = inspect.signature(self.commands[command]).parameters.items()
        return " ".join([f"/{command}", *(n.upper() if p.default is p.empty else f"[{n}]" for n, p in parameters)])

    def tell(self, *rows: tuple[str, str]) -> None:
        """Print rows of two columns, wrapped to the width of the terminal."""
        table = Table.grid(padding=(0, 1, 0, 0))
        for row in rows:
            table.add_row(*map(Text, map(printable, row)))
        self.console.print(table)

    def last(self) -> Turn:
        if not self.turns:
            raise UserError("there is no answer yet; type a prompt first")
        return self.turns[-1]

    def answer(self, prompt: str, echo: int | None = None) -> None:
        """Continue `prompt`, of which the last `echo` characters are shown (None: all), until done or Ctrl-C."""
        if not (text := admitted(self.tokenizer, prompt)):
            return
        seed = random_source(None).initial_seed() % 10**9 if self.cfg.seed is None else self.cfg.seed
        written, start = "", time.monotonic()
        shown = text[0 if echo is None else max(0, len(text) - echo) :]
        print("Response: " + "..." * (shown != text), end="", file=sys.stderr, flush=True)
        try:
            print(printable(shown), end="", flush=True)
            for (piece,) in write(self.model, self.tokenizer, text, self.cfg, random_source(seed)):
                written += piece
                print(printable(piece), end="", flush=True)
        except KeyboardInterrupt:
            pass  # only the answer stops; what has come stays
        self.turns.append(Turn(prompt, written, seed, echo))
        print(flush=True)
        if self.cfg.verbose == "on":
            seconds = max(time.monotonic() - start, 1e-9)
            say(f"({len(written):,} characters in {seconds:.1f} s, {len(written) / seconds:,.0f} char/s, seed {seed})")

    def do_help(self, command="") -> None:
        """List the commands, or tell all about one."""
        if command := command.strip().removeprefix("/"):
            self.demand(command, self.commands, "/help lists them")
            return self.tell((self.usage(command), ""), (inspect.getdoc(self.commands[command]), ""))
        self.tell(*((self.usage(name), self.commands[name].__doc__.split("\n")[0]) for name in self.commands))
        self.tell(('""" begins and ends a prompt of several lines; // is a slash; Ctrl-C stops an answer.', ""))

    def do_set(self, name="", value="") -> None:
        r"""Change a setting, as /set temperature 0.5

        Without a value: back to its default. `stop` can be given several times, \n in it is a line end.
        """
        if not name:
            return self.do_show()
        self.demand(name, self.settings, "settings: " + ", ".join(self.settings))
        knob = ChatConfig.__dataclass_fields__[name.replace("-", "_")]
        kind, new = kinds(ChatConfig)[knob.name][0], knob.default
        try:
            if value:
                new = (*self.cfg.stop, value.replace("\\n", "\n")) if kind is tuple else kind(value.strip())
        except ValueError:
            what, rule = "whole number" if kind is int else "number", knob.metadata
            raise UserError(f"{name} {value}: must be a {what} from {rule['low']:,} to {rule['high']:,}") from None
        self.cfg = replace(self.cfg, **{knob.name: new})
        say(f"({name} {as_written(new)})")

    def do_show(self) -> None:
        """Tell the settings, the model, and the seed of the last answer."""
        rows = {name.replace("_", "-"): as_written(value) for name, value in asdict(self.cfg).items()}
        rows["model"] = str(self.story)
        if self.turns:
            rows["last answer"] = f"/set seed {self.turns[-1].seed}, then /regen repeats it"
        self.tell(*rows.items())

    def do_regen(self) -> None:
        """Answer the last prompt anew."""
        turn = self.last()
        self.answer(turn.prompt, turn.echo)
        if self.last() is not turn:  # another model may know none of its characters
            del self.turns[-2]

    def do_more(self) -> None:
        """Go on with the last answer from where it stopped."""
        self.answer(self.last().prompt + self.last().answer, echo=0)

    def do_undo(self) -> None:
        """Forget the last answer."""
        say(f"(forgot what followed {ending(self.last().prompt, 30)})")
        self.turns.pop()

    def do_clear(self) -> None:
        """Forget all answers; the settings stay."""
        self.turns.clear()

    def do_save(self, file) -> None:
        """Keep answers and settings in a file, as JSON."""
        if file.exists():
            read_talk(file)  # overwrites nothing but its like
        talk = dict(anexa_version=__version__, settings=asdict(self.cfg), turns=[asdict(turn) for turn in self.turns])
        write_private(file, json.dumps(talk, indent=1, ensure_ascii=False))
        say(f"({file}: answers: {len(self.turns)})")

    def do_load(self, file) -> None:
        """Go on with what /save kept."""
        self.turns, self.cfg = read_talk(file)
        say(f"({file}: answers: {len(self.turns)}; /show tells the settings)")

    def do_read(self, file) -> None:
        """Continue the text in a file."""
        self.answer("".join(read_text(file)).removesuffix("\n"), echo=200)

    def do_model(self, file) -> None:
        """Talk to another model; /regen asks it the last prompt."""
        self.model, self.tokenizer, self.story = load_model(file, self.model.wte.weight.device)
        say(f"{file}: {self.story}")

    def do_probs(self, text="") -> None:
        """Chart what may come after the text, or the last prompt.

        From left to right: percentages of the model, then what each setting that is on leaves of them.
        """
        text = admitted(self.tokenizer, text or self.last().prompt)
        look(self.console, probs_view, self.model, self.tokenizer, text, self.cfg)

    def do_why(self) -> None:
        """Show how much each character of the last answer surprised.

        n bits: the model gave it one chance in 2^n, before any setting. No digit is less than half a bit, 9 is 9 or
        more; colours begin at 2, 4 and 6 bits. Then the least expected, with what was likeliest instead.
        """
        prompt, answer = (self.tokenizer.admit(text)[0] for text in (self.last().prompt, self.last().answer))
        if not answer:
            raise UserError("the last answer is empty; /more goes on with it")
        look(self.console, why_view, self.model, self.tokenizer, prompt, answer)

    def do_attn(self, layer="", head="") -> None:
        """Map which characters of the last prompt looked at which.

        A row for each character, a column for each that it may look at, the one it looked at most at the right.
        Without numbers: the last layer, the mean of its heads.
        """
        try:
            numbers = [int(n) if n else None for n in (layer, head)]
        except ValueError:
            raise UserError(f"usage: {self.usage('attn')}, numbers from 1") from None
        prompt, _ = self.tokenizer.admit(self.last().prompt)
        look(self.console, attn_view, self.model, self.tokenizer, prompt, *numbers)

    def do_tokens(self, text="") -> None:
        """Show the ids of the text, or the last prompt, and what is left out."""
        look(self.console, tokens_view, self.tokenizer, text or self.last().prompt)

    def do_quit(self) -> None:
        """Leave."""
        self.over = True


class Commands(Completer):
    """What the Tab key offers: commands, then what the parameter's name promises."""

    def __init__(self, session: Session):
        self.session = session

    def get_completions(self, document, event):
        line, session = document.text_before_cursor, self.session
        command, *rest = line[1:].split(" ", 1)
        if not line.startswith("/") or (rest and command not in session.commands):
            return
        names = session.parameters(command) if rest else ["command"]
        *before, word = (rest or [command])[0].split(" ", max(0, len(names) - 1))
        rule = ChatConfig.__dataclass_fields__.get(before[0], None) if before else None
        values = (rule and rule.metadata["choices"]) or ()
        wanted = names[len(before)] if names else ""
        if wanted == "file":
            yield from PathCompleter(expanduser=True).get_completions(Document(word), event)
        for offer in dict(command=session.commands, name=session.settings, value=values).get(wanted, ()):
            if offer.startswith(word):
                yield Completion(offer, start_position=-len(word))


class History(prompt_toolkit.history.FileHistory):
    """Earlier lines, in a private file in the person's state folder; only the last of them survive a new session."""

    LIMIT = 1_000

    def __init__(self):
        state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
        windows = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
        folder = dict(win32=windows, darwin="~/Library/Application Support").get(sys.platform, state)
        path = Path(folder).expanduser() / "anexa" / "history"
        path.parent.mkdir(parents=True, exist_ok=True)
        entries = path.read_text("utf-8", "replace").split("\n# ")[1:] if path.exists() else []
        write_private(path, "".join(f"\n# {entry}" for entry in entries[-self.LIMIT :]))
        super().__init__(path)

    def store_string(self, string: str) -> None:
        with suppress(OSError):  # a full disk is no reason to end a talk
            super().store_string(string)


def closed(text: str) -> bool:
    """Whether a prompt is whole: one that begins with three quotes is when it ends with three more."""
    return not text.startswith('"""') or (len(text.rstrip()) > 5 and text.rstrip().endswith('"""'))


def ask_plainly() -> str:
    """A prompt from a pipe, or from a terminal that cannot move its cursor."""
    print("Prompt: ", end="", file=sys.stderr, flush=True)
    text = ""
    try:
        while (line := sys.stdin.readline()) and not closed(text := text + line):
            pass
    except KeyboardInterrupt:
        say()
        raise
    if not text:
        say()
        raise EOFError
    return text.removesuffix("\n")


def line_editor(session: Session) -> Callable[[], str]:
    """Function that gets a prompt from the person; it raises EOFError at the end, KeyboardInterrupt after Ctrl-C."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()) or os.environ.get("TERM") in ("dumb", "unknown"):
        return ask_plainly
    os.environ.setdefault("PROMPT_TOOLKIT_NO_CPR", "1")  # where the cursor is, a terminal may tell too late
    try:
        history = History()
    except (OSError, RuntimeError):  # no home, or no right to write there
        history = prompt_toolkit.history.InMemoryHistory()
    editor = prompt_toolkit.PromptSession(
        "Prompt: ",
        history=history,
        completer=Commands(session),
        complete_while_typing=False,
        complete_style=CompleteStyle.READLINE_LIKE,
        multiline=Condition(lambda: not closed(editor.default_buffer.text)),
        enable_suspend=True,
    )
    return lambda: editor.prompt().encode(errors="replace").decode()


def chat(model: GPT, tokenizer: Tokenizer, story: Story, cfg: SampleConfig) -> None:
    """Continue one prompt after another, and obey commands, until `quit`, `exit` or the end of the input."""
    session = Session(model, tokenizer, story, cfg)
    spare_threads(model)
    say("\n--- Interactive Generation ---")
    say("Enter a prompt to continue (or 'quit' to exit)")
    ask = line_editor(session)
    while not session.over:
        try:
            session.respond(ask())
        except EOFError:
            return
        except KeyboardInterrupt:
            say("(quit or Ctrl-D leaves)")
        except UserError as error:
            say(f"({str(error).removeprefix('--')})")
        except OSError as error:
            if error.filename is None:  # not a command's file: whoever read our output has gone
                raise
            say(f"({error.filename}: {error.strerror})")


# ---- export ----------------------------------------------------------------------------------------------------------
# The same model and figures for other programs: Hugging Face transformers and Hub, llama.cpp, TensorBoard.

HUB_FILES = (
    "model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "README.md"
)  # fmt: skip
OWN_MARK = "Written by anexagpt.py"
RIGHTS = dict.fromkeys(SOURCES, "is in the public domain") | {FALLBACK: "has the licence of Python"}


def optional(module: str):
    """An optional package, imported.  raises  UserError with the line that installs it"""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.split(".")[-1]
        raise UserError(f"this needs {package}, which is not installed: pip install {package}") from None


def for_publishing(story: Story) -> Story:
    """The story with no more of the names of its files than others may see: no folders, no password of an address."""

    def shown(name: str) -> str:
        if re.match("https?://", name, re.IGNORECASE):
            return re.sub(r"(?<=//)[^/]*@|[?#].*", "", name)
        return re.split(r"[/\\]", name.rstrip("/\\"))[-1]

    name, init = " + ".join(map(shown, story.data["name"].split(" + "))), story.training.get("init")
    training = story.training | (dict(init=shown(init)) if init else {})
    return replace(story, data=story.data | dict(name=name), training=training)


def model_card(model: GPT, tokenizer: Tokenizer, story: Story, title: str, licence: str) -> str:
    """README.md of a published model: YAML for the Hub, then what a person needs to know before using it."""
    loss, data, config = story.validation_loss, story.data, story.config
    pieces = write(model, tokenizer, "\n", SampleConfig(max_new=400), random_source(0))
    sample = printable("".join(piece for (piece,) in pieces)).strip()
    prompt = (re.findall(r"\w+", sample) or [""])[0]
    text = data["name"] if data["name"] not in SOURCES else f"{data['name']} ({SOURCES[data['name']].title})"
    measured = [
        dict(type=kind, name=f"validation loss, {unit}", value=round(value, 4))
        for kind, unit, value in (("loss", "nats/char", loss), ("bits_per_character", "bits/char", loss / math.log(2)))
    ]
    task, dataset = dict(type="text-generation"), dict(type="text", name=text)
    front = dict(
        **(dict(language="en") if data["name"] in RIGHTS else {}),
        license=licence,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["anexa", "gpt2", "character-level"],
        widget=[dict(text=prompt)],
    )
    front["model-index"] = [dict(name=title, results=[dict(task=task, dataset=dataset, metrics=measured)])]
    yaml = "\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in front.items())  # JSON is YAML
    listing = lambda d: printable(", ".join(f"{k} {v}" for k, v in d.items())).replace("\n", " ")  # noqa: E731
    block = lambda lines: "    " + lines.replace("\n", "\n    ")  # noqa: E731
    characters = printable(tokenizer.characters[1:]).replace("\n", "\\n").replace("\t", "\\t")
    best = min(story.history, key=lambda row: row[2], default=[story.step])[0]
    return f"""\
---
{yaml}
---
# {title}

A GPT-2 of {config.n_parameters():,} parameters that has read one text, {text}, character by character, and continues
what you give it in that manner. It was trained from nothing with Anexa. It writes, for example:

{block(sample)}

## How it was made

- Text: {text}, {data["characters"]:,} characters, SHA-256 `{data["sha256"]}`. It learnt from the first 90%.
- Network: {listing(asdict(config))}.
- Training: step {best:,} of {story.step:,}; {listing(story.training)}.
- Validation loss: {loss:.4f} nats/char, {loss / math.log(2):.4f} bits/char, on the last 10% of the text. The step with
  the lowest was kept, so on other text of this kind expect a little more.

{block(loss_chart(story.history))}

## How to use it

With transformers; prompt and answer together may have {config.block_size} characters:

```python
from transformers import pipeline

write = pipeline("text-generation", model="{title}")
print(write("{prompt}", max_length={config.block_size})[0]["generated_text"])
```

With Anexa, in texts of any length, and through it with llama.cpp:

```
python anexagpt.py chat --model model.safetensors
python anexagpt.py export --model model.safetensors --gguf model.gguf
llama-completion -m model.gguf -no-cnv --ignore-eos -n {config.block_size // 2} -p "{prompt}"
```

## Limits

It imitates one text: it knows no facts, answers no questions, and repeats the views and prejudices of that text,
sometimes its very sentences. Beyond {config.block_size} characters transformers raises IndexError; llama.cpp ends, too.
One token is one character, and these {len(tokenizer) - 1:,} are all it knows (transformers reads any other as U+FFFD):

{block(characters[:2_000])}

Licence of the weights: {licence}. The text {RIGHTS.get(data["name"], "belongs to whoever wrote it")}.

"""


def seal(files: dict[str, bytes]) -> bytes:
    """Last line of the card. It tells a later export that the folder is as it was left, so that nothing is lost."""
    digest = hashlib.sha256(b"".join(hashlib.sha256(files[name]).digest() for name in HUB_FILES))
    return f"<!-- {OWN_MARK}; these files together: {digest.hexdigest()} -->\n".encode()


def hub_files(model: GPT, tokenizer: Tokenizer, story: Story, title: str, licence: str) -> dict[str, bytes]:
    """Content of the files that Hugging Face transformers needs to load the model, by name."""
    config, story = story.config, for_publishing(story)
    # transformers keeps the matrices of the blocks as (in, out), nn.Linear as (out, in).
    weights = {
        f"transformer.{name}": (weight.t() if name.startswith("h.") else weight).detach().contiguous()
        for name, weight in model.named_parameters()
    }
    vocabulary = {c: i for i, c in enumerate(tokenizer.characters)}
    # Nothing ends a text but its length. An empty prompt begins after a line end, as here.
    ends = dict(bos_token_id=vocabulary.get("\n", 1), eos_token_id=None, pad_token_id=0)
    sampling = dict(do_sample=True, temperature=SampleConfig().temperature, top_k=0, max_length=config.block_size)
    special = dict(id=0, content=UNKNOWN, special=True, single_word=False, lstrip=False, rstrip=False, normalized=False)
    bpe = dict(type="BPE", vocab=vocabulary, merges=[], unk_token=UNKNOWN)  # without merges: character by character
    documents = {
        "config.json": dict(
            architectures=["GPT2LMHeadModel"], model_type="gpt2", dtype="float32", tie_word_embeddings=True,
            vocab_size=config.vocab_size, n_positions=config.block_size, n_ctx=config.block_size, n_embd=config.n_embd,
            n_layer=config.n_layer, n_head=config.n_head, activation_function="gelu_new", layer_norm_epsilon=1e-5,
            embd_pdrop=config.dropout or 0.0, resid_pdrop=config.dropout or 0.0, attn_pdrop=0.0,
            **(ends | dict(bos_token_id=None)), task_specific_params={"text-generation": sampling},
        ),
        "generation_config.json": ends | sampling | dict(suppress_tokens=[0]),
        "tokenizer.json": dict(
            version="1.0", truncation=None, padding=None, added_tokens=[special], normalizer=None, pre_tokenizer=None,
            post_processor=None, decoder=dict(type="Fuse"), model=bpe,
        ),
        "tokenizer_config.json": dict(
            tokenizer_class="PreTrainedTokenizerFast", model_max_length=config.block_size, padding_side="left",
            model_input_names=["input_ids", "attention_mask"], clean_up_tokenization_spaces=False,
            **dict.fromkeys(("unk_token", "pad_token", "bos_token", "eos_token"), UNKNOWN),
        ),
    }  # fmt: skip
    files = {name: json.dumps(document, indent=2, ensure_ascii=False).encode() for name, document in documents.items()}
    files["model.safetensors"] = safetensors.torch.save(weights, story.metadata())
    files["README.md"] = model_card(model, tokenizer, story, title, licence).encode()
    files["README.md"] += seal(files)
    return files


def write_folder(folder: Path, files: dict[str, bytes], force: bool = False) -> None:
    """Put `files` into `folder`, all of them or none.

    raises  UserError if it holds anything that export did not write, unless forced; other files stay in any case
    """
    folder = folder.resolve()
    names = {entry.name for entry in folder.iterdir()} if folder.exists() else set()
    if names and not force:
        old = {name: (folder / name).read_bytes() for name in HUB_FILES} if names == set(HUB_FILES) else {}
        body, mark, last = old.get("README.md", b"").rpartition(b"<!-- ")
        if not mark or seal(old | {"README.md": body}) != mark + last:
            raise UserError(f"{folder}: holds files that are not as export wrote them; take another folder, or --force")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.tmp")
    temporary.mkdir(exist_ok=True)  # by one that was killed, it is used again
    try:
        for name, content in files.items():
            with replacing(temporary / name) as file:
                file.write(content)
        folder.mkdir(exist_ok=True)
        # Without config.json nobody loads a folder: should we be killed on the way, not the files of two models.
        (folder / "config.json").unlink(missing_ok=True)
        for name in sorted(files, key="config.json".__eq__):
            os.replace(temporary / name, folder / name)
    finally:
        for name in files:
            (temporary / name).unlink(missing_ok=True)
        temporary.rmdir()


def write_gguf(path: Path, model: GPT, characters: str, half: bool) -> None:
    """Write the model for llama.cpp to `path`, its matrices in float16 if `half`."""
    gguf, config, temporary = optional("gguf"), model.config, path.with_name(f".{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    # GPT-2 writes each byte of a token as one visible character; those that have none count up from U+0100.
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spelling = {byte: chr(byte) for byte in visible}
    spelling |= {byte: chr(256 + i) for i, byte in enumerate(b for b in range(256) if b not in spelling)}
    tokens = ["".join(spelling[byte] for byte in c.encode()) for c in characters]
    try:
        file, kind = gguf.GGUFWriter(temporary, "gpt2"), gguf.TokenType
        facts = dict(
            name=path.stem, description=OWN_MARK, context_length=config.block_size, embedding_length=config.n_embd,
            feed_forward_length=4 * config.n_embd, block_count=config.n_layer, head_count=config.n_head,
            layer_norm_eps=1e-5, tokenizer_model="gpt2", tokenizer_pre="gpt-2", token_list=tokens,
            file_type=gguf.LlamaFileType.MOSTLY_F16 if half else gguf.LlamaFileType.ALL_F32,
            token_types=[kind.CONTROL] + [kind.NORMAL] * (len(tokens) - 1),
            # A character of several bytes is put together from them, one more at a time.
            token_merges=list(dict.fromkeys(f"{t[:i]} {t[i]}" for t in tokens for i in range(1, len(t)))),
            # Were there no end token, llama.cpp would take id 11, an ordinary letter. Id 0 is all but never written.
            bos_token_id=0, eos_token_id=0, unk_token_id=0, add_bos_token=False,
        )  # fmt: skip
        for name, fact in facts.items():
            getattr(file, f"add_{name}")(fact)
        names = {
            "wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm", "h": "blk", "ln_1": "attn_norm",
            "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "ln_2": "ffn_norm", "mlp.c_fc": "ffn_up",
            "mlp.c_proj": "ffn_down",
        }  # fmt: skip
        for name, weight in model.named_parameters():
            name = re.sub(rf"\b({'|'.join(names)})\b", lambda match: names[match[0]], name)
            keep = not half or weight.dim() == 1 or name.startswith("position_embd")
            file.add_tensor(name, weight.detach().to(torch.float32 if keep else torch.float16).numpy())
        file.write_header_to_file()
        file.write_kv_data_to_file()
        file.write_tensors_to_file()
        file.close()
        os.replace(temporary, path)
    except OSError as error:  # NumPy's has neither number nor name
        raise OSError(errno.ENOSPC, f"cannot be written ({error.strerror or error})", str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def export(options: argparse.Namespace) -> None:
    """Write the model for other programs: a folder for transformers, a GGUF file for llama.cpp, or both."""
    if not options.gguf and (options.f16 or options.modelfile or not options.folder):
        raise UserError("export: give a folder, or --gguf FILE, which --f16 and --modelfile belong to, or both")
    model, tokenizer, story = load_model(options.model, torch.device("cpu"))
    if options.folder:
        files = hub_files(model, tokenizer, story, options.folder.resolve().name, options.license)
        write_folder(options.folder, files, options.force)
        say(f"Written to {options.folder}: {', '.join(HUB_FILES)}")
    if path := options.gguf:
        recipe, cfg = path.with_name("Modelfile"), SampleConfig()
        sampling = dict(
            temperature=cfg.temperature, top_k=cfg.top_k, top_p=cfg.top_p, min_p=cfg.min_p,
            repeat_penalty=cfg.repetition_penalty, num_ctx=story.config.block_size,
            num_predict=story.config.block_size // 2,  # positions are absolute: a full context cannot slide
        )  # fmt: skip
        lines = [f"FROM ./{path.name}", 'TEMPLATE "{{ .Prompt }}"']  # no chat: it continues what it gets
        text = "\n".join([*lines, *(f"PARAMETER {name} {value}" for name, value in sampling.items())]) + "\n"
        ours = not path.exists()
        if not ours:
            with open(path, "rb") as file:
                ours = OWN_MARK.encode() in file.read(1_000)
        if options.modelfile and recipe.exists():
            ours = ours and recipe.read_bytes() == text.encode()
        if not ours and not options.force:
            raise UserError(f"{path}: it or {recipe} is not what export writes; choose another name, or --force")
        write_gguf(path, model, tokenizer.characters, options.f16)
        say(f"Written to {path}, {path.stat().st_size:,} bytes")
        if story.config.block_size % 256:
            most = story.config.block_size
            say(f"NOTE: llama.cpp fails beyond {most} characters of prompt and answer together; choose -n accordingly")
        if options.modelfile:
            recipe.write_bytes(text.encode())
            say(f"Written to {recipe}; ollama create NAME -f {recipe}")


def push(options: argparse.Namespace) -> None:
    """Upload what `export` writes to the Hugging Face Hub, and print its address.

    The token is that of `hf auth login` or of the environment; it is never an option, which other users could see.
    raises  UserError saying what the Hub has against it
    """
    hub, name = optional("huggingface_hub"), options.name
    reasons = {
        401: "the Hub does not accept the token; log in again with 'hf auth login'",
        403: "the token may not write there; make one with write access to it, then 'hf auth login'",
        404: "no such user or organisation, or the token may not see it; check the name",
    }
    try:
        if not hub.get_token():
            raise UserError(f"{name}: nobody is logged in to the Hub; 'hf auth login', or set HF_TOKEN")
        hub.utils.validate_repo_id(name)
        model, api = load_model(options.model, torch.device("cpu")), hub.HfApi()
        name = api.create_repo(name, private=options.private, exist_ok=True).repo_id
        if options.private and not api.model_info(name).private:
            raise UserError(f"{name}: exists and is public; make it private in its settings, or push to another name")
        files = hub_files(*model, name, options.license)
        say(f"Uploading {len(files)} files, {sum(map(len, files.values())):,} bytes, to {name} ...")
        with tempfile.TemporaryDirectory() as folder:
            write_folder(Path(folder), files)
            api.upload_folder(repo_id=name, folder_path=folder, allow_patterns=list(files))
        print(f"{hub.constants.ENDPOINT}/{name}")
    except (hub.errors.HTTPError, OSError, ValueError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        told = printable(getattr(error, "server_message", None) or str(error) or type(error).__name__).splitlines()[0]
        if status:
            told = reasons.get(status, f"the Hub answered {status}: {told}; try again later")
        elif isinstance(error, hub.errors.HTTPError):
            told = f"no connection to the Hub ({told}); try again later"
        raise UserError(f"{name}: not uploaded: {told}") from None


class Recorder(Report):
    """A Report that also keeps its figures: in a CSV file, for TensorBoard, or both."""

    COLUMNS = "step,training_loss,validation_loss,learning_rate,muon_learning_rate,characters_per_second"

    def __init__(
        self, trainer: Trainer, sample: Callable[[], str], quiet: bool, log: Path | None, tensorboard: Path | None
    ):
        self.log = self.board = None
        if tensorboard:
            # What a training that is continued now wrote after its last save is dropped, there and in the CSV file.
            writer = optional("torch.utils.tensorboard").SummaryWriter
            self.board = writer(tensorboard, purge_step=trainer.step + 1 if trainer.step else None)
        if log:
            header, *rows = (log.read_text(errors="replace") if log.exists() else "").splitlines() or [self.COLUMNS]
            if header != self.COLUMNS:
                raise UserError(f"--log {log}: exists and is not such a log; choose another name")
            kept = [row for row in rows if row.split(",")[0].isdecimal() and int(row.split(",")[0]) <= trainer.step]
            with replacing(log) as file:
                file.write("".join(f"{row}\n" for row in [header, *kept]).encode())
            self.log = open(log, "a", newline="\n")  # noqa: SIM115 (close() closes it)
        self.since = time.monotonic(), trainer.step
        super().__init__(trainer, sample, quiet)

    def evaluation(self) -> None:
        super().evaluation()
        (before, first), (now, last), cfg = self.since, (time.monotonic(), self.trainer.step), self.trainer.cfg
        self.since = now, last
        rate, (_, training, validation) = learning_rate(last - 1, cfg), self.trainer.history[-1]
        speed = (last - first) * cfg.batch_size * self.trainer.model.config.block_size / max(now - before, 1e-9)
        figures = training, validation, cfg.learning_rate * rate, cfg.muon_learning_rate * rate, round(speed)
        if self.log:
            try:
                print(last, *(f"{figure:.6g}" for figure in figures), sep=",", file=self.log, flush=True)
            except OSError as error:
                say(f"NOTE: {self.log.name}: cannot be written ({error.strerror}); the training goes on without")
                self.log = None
        if self.board:
            for name, figure in zip(self.COLUMNS.split(",")[1:], figures, strict=True):
                self.board.add_scalar(name, figure, last)
            self.board.add_text("sample", "    " + printable(self.sample()).replace("\n", "\n    "), last)
            self.board.flush()

    def close(self) -> None:
        super().close()
        for file in (self.log, self.board):
            if file:
                file.close()


# ---- CLI -------------------------------------------------------------------------------------------------------------


def conflict(options: argparse.Namespace, story: Story) -> str:
    """What the command line asks for that a file's story tells otherwise; "" if nothing."""
    told = asdict(story.config) | story.training | dict(data=story.data["name"])
    free = ("device", "dtype", "grad_accum", "checkpoint_interval")  # may change on the way: the result does not
    given = {k: v for k, v in vars(options).items() if k in told and v is not None and k not in free}
    wanted = (SIZES[options.size] if options.size else {}) | given
    return ", ".join(
        f"--{name.replace('_', '-')} {told[name]}, not {value}" for name, value in wanted.items() if told[name] != value
    )


@contextmanager
def sole_training(out: Path) -> Iterator[None]:
    """Hold the lock that lets only one process train `out`.

    raises  UserError if another has it, or the folder cannot be written to
    """
    path = out.with_name(f".{out.name}.lock")
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except OSError as error:  # filelock's Timeout is one; it also says so where no file can be made
        if isinstance(error, filelock.Timeout) and path.exists():
            other = "another process"
            with suppress(OSError, ValueError):  # Windows lets nobody read a locked file
                other = f"process {int(path.read_text())}"
            raise UserError(f"--out {out}: {other} is training it; wait or choose another") from None
        raise UserError(f"--out {out}: {out.parent} cannot be written to; choose another folder") from None
    with suppress(OSError):
        path.write_text(str(os.getpid()))
    sweep(out)
    sweep(checkpoint_path(out))
    try:
        yield
    finally:
        with suppress(OSError):  # Windows removes nothing that is open
            path.unlink()
        lock.release()


def unfinished(options: argparse.Namespace, checkpoint: Path) -> Story | None:
    """Story of the interrupted training to continue, if there is one; a person may choose to begin anew instead.

    raises  UserError if it cannot be continued with these options, and nobody is there to ask; or if there is none, but
            a file in the place of the model, and nobody has said that it may go
    """
    if options.restart:
        return None
    if not checkpoint.exists():
        if options.out.exists():
            raise UserError(f"{options.out}: exists; replace it with --restart, or train beside it with --out FILE")
        return None
    story, _ = open_file(checkpoint, "begin anew with --restart")
    difference = conflict(options, story)
    if not difference:
        return story
    what = f"{checkpoint}: holds a training, stopped at step {story.step:,}, with {difference}"
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise UserError(f"{what}; leave out what differs to go on with it, or begin anew with --restart")
    say(what)
    answer = ""
    with suppress(EOFError):  # Ctrl-D
        answer = input("Begin anew and lose it? [y/N] ").strip().lower()
    if answer not in ("y", "yes"):
        raise UserError("nothing was done; leave out what differs to go on with that training")
    return None


def text_of(story: Story) -> str:
    """Name of the text that a file says it learnt from, to read that again.

    raises  UserError if it would be a device, or a download: a stranger's file must not make the program ask a network
    """
    for name in story.data["name"].split(" + "):
        if re.match(r"https?://|[\\/]{2}", name, re.IGNORECASE):  # Windows looks for \\PC\FILE in the network
            if not copy_of(name).exists():
                raise UserError(f"--data: the text is at {name}; to fetch it from there, give that address with --data")
        elif name not in TEXTS and os.path.exists(name) and not os.path.isfile(name) and not os.path.isdir(name):
            raise UserError(f"--data: the text is {name}, which is not a file; give another with --data")
    return story.data["name"]


def prepare_training(
    options: argparse.Namespace, before: Story | None, device: torch.device, dtype: torch.dtype, world: World
) -> tuple[Trainer, Tokenizer, dict]:
    """Trainer, tokenizer and facts about the text, by the options and else by the training to be continued."""
    known, old, others = TrainConfig.__dataclass_fields__, None, before.training if before else {}
    cfg = from_options(TrainConfig, options, **{k: v for k, v in others.items() if k in known})
    others = asdict(before.config) if before else SIZES["small"]
    if cfg.init and not before:
        old, spelling, told = load_model(Path(cfg.init), device)
        others = {name: getattr(told.config, name) for name in others}
    shape = others | (SIZES[options.size] if options.size else {})
    config = from_options(GPTConfig, options, **(shape | dict(vocab_size=2)))  # complains now, not after the download
    if old and (other := {k: v for k, v in others.items() if v != getattr(config, k)}):
        has = ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in other.items())
        raise UserError(f"--init {cfg.init}: is a model with {has}; leave out what differs, or begin without --init")
    name = options.data or (text_of(before) if before else None)
    corpus = world.in_turn(lambda: load_corpus(name, options.encoding))
    tokenizer, ids = corpus.tokenizer, corpus.ids
    if world.told(corpus.sha256) != corpus.sha256:
        raise UserError(f"--data {corpus.name}: is another text on this machine than on the first; copy it from there")
    need = 10 * (config.block_size + 1)
    if len(ids) < need:
        raise UserError(
            f"--data {corpus.name}: {len(ids):,} characters, but training needs at least {need:,} (10 windows of "
            f"--block-size {config.block_size}); take a longer text or a smaller --block-size"
        )
    cfg = replace(cfg, batch_size=cfg.batch_size or (6 if device.type == "cpu" else 64))
    if cfg.batch_size < world.size:
        raise UserError(f"--batch-size {cfg.batch_size}: must be at least {world.size}, one window for each process")
    passes = cfg.max_steps * cfg.batch_size * config.block_size / len(split(ids)[0])
    dropout = default_dropout(passes) if config.dropout is None else config.dropout
    config = replace(config, vocab_size=len(tokenizer), dropout=dropout)
    data = dict(name=corpus.name, sha256=corpus.sha256, characters=len(ids))
    try:
        weights = adapt(old, spelling, tokenizer.characters) if old else None
        return Trainer(config, cfg, ids, device, dtype, weights, world), tokenizer, data
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        n = config.n_parameters()
        raise UserError(
            f"--n-layer {config.n_layer} --n-embd {config.n_embd}: out of memory; in training {n / 1e6:,.1f} M "
            f"parameters need {16 * n / 2**30:,.1f} GiB and more; take half of --n-embd, which needs a quarter"
        ) from None


def train(options: argparse.Namespace) -> None:
    """Train a model, from the start or from where the last run stopped, and save it to `--out`.

    Under torchrun several processes do so together, and the first of them does all that a person sees.
    """
    checkpoint_path(options.out)  # complains now, not after the download
    if options.tensorboard:
        optional("torch.utils.tensorboard")
    device, dtype = choose_device(from_options(DeviceConfig, options))
    with World.joined(device) as world:
        if world.rank:
            options.quiet, options.log, options.tensorboard = True, None, None
        if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):
            options.restart = False  # asked for once, not each time that torchrun begins again after a failure
        with sole_training(options.out) if world.rank == 0 else nullcontext():
            learn(options, device, dtype, world)


def save_result(out: Path, weights: dict[str, Tensor], story: Story) -> None:
    """Save what was learnt. Neither Ctrl-C nor a full disk must cost hours of work: it goes elsewhere, if need be.

    raises  UserError that tells where
    """
    try:
        with interruptible():
            save_file(out, weights, story)
    except UserError as error:
        kept = ""
        with suppress(OSError, UserError):
            other = Path(tempfile.mkdtemp(prefix="anexa-")) / out.name
            save_file(other, weights, story)
            kept = f"; this time the model is in {other}: move it from there"
        raise UserError(f"{error}{kept}") from None


def learn(options: argparse.Namespace, device: torch.device, dtype: torch.dtype, world: World) -> None:
    """The training itself, once the processes have met and the folder is ours."""
    out, checkpoint = options.out, checkpoint_path(options.out)
    if not options.restart and world.any(checkpoint.exists())[0] and not checkpoint.exists():
        raise UserError(f"{checkpoint}: another process has it; several machines need one folder that they share")
    before = world.told(unfinished(options, checkpoint) if world.rank == 0 else None)
    trainer, tokenizer, data = prepare_training(options, before, device, dtype, world)
    config, cfg = trainer.model.config, trainer.cfg
    training = asdict(cfg) | dict(device=device.type, dtype=str(dtype).removeprefix("torch."))
    if before:
        if before.data != data:
            raise UserError(f"--data {data['name']}: has changed since {checkpoint} was written; use --restart")
        try:
            trainer.restore(safetensors.torch.load_file(checkpoint), before)
        except (KeyError, RuntimeError, TypeError, ValueError, safetensors.SafetensorError) as error:
            reason = printable(str(error)).splitlines()[0]
            raise UserError(f"{checkpoint}: cannot be continued ({reason}); use --restart") from None
        say(f"Continuing the training in {checkpoint} at step {trainer.step:,}.")

    def story() -> Story:
        loss = trainer.best_loss if trainer.history else None
        return Story(config, tokenizer.characters, data, training, trainer.step, loss, trainer.history)

    def sample() -> str:
        texts = write(trainer.model.eval(), tokenizer, "\n", SampleConfig(max_new=60), random_source(0))
        text = "".join(piece for (piece,) in texts)
        trainer.model.train()
        return text

    if not options.quiet:
        passes = cfg.max_steps * cfg.batch_size * config.block_size / len(trainer.ids)
        first = f" of {cfg.init}" if cfg.init else ""
        together = f", {world.size} processes" if world.size > 1 else ""
        say(
            f"{data['name']}: {data['characters']:,} characters, {len(tokenizer) - 1:,} different; "
            f"{config.size()}{first} on {device.type} in {training['dtype']}{together}; "
            f"{cfg.max_steps:,} steps of {cfg.batch_size} x {config.block_size} characters, "
            f"{passes:,.1f} passes over the text, dropout {config.dropout}"
        )
    report = Recorder(trainer, sample, options.quiet, options.log, options.tensorboard)
    if options.restart and not world.rank:
        checkpoint.unlink(missing_ok=True)  # should we die before the first save, the old training must not go on
    try:
        with kept_memory():
            fit(trainer, report, checkpoint, story)
    except Diverged as error:
        if world.rank:
            return
        kept, best = "nothing was measured before", out.with_stem(f"{out.stem}-best")
        if trainer.best:
            save_result(best, trainer.best, story())
            kept = f"the best weights so far, with a loss of {trainer.best_loss:.4f}, are in {best}"
        checkpoint.unlink(missing_ok=True)  # from there it would diverge again
        raise UserError(f"{error}; {kept}") from None
    if world.rank:
        return
    if not options.quiet:
        say(loss_chart(trainer.history))
    say("Training finished...")
    save_result(out, trainer.best, story())
    checkpoint.unlink(missing_ok=True)
    say(f"Model saved to {out}")


def run(options: argparse.Namespace) -> None:
    """The whole story: train unless there is a finished model, then talk."""
    sampling = replace(from_options(SampleConfig, options), seed=None)
    if "WORLD_SIZE" in os.environ:
        raise UserError("torchrun: several processes can train, but not talk; give the command train")
    if options.restart or checkpoint_path(options.out).exists() or not options.out.exists():
        train(options)
    else:
        story, _ = open_file(options.out)
        if difference := conflict(options, story):
            cure = "train anew with --restart, or beside it with --out FILE"
            raise UserError(f"{options.out}: is a finished model with {difference}; {cure}")
        say(f"{options.out}: {story}")
    model, tokenizer, story = load_model(options.out, choose_device(from_options(DeviceConfig, options))[0])
    chat(model, tokenizer, story, sampling)


def opened(options: argparse.Namespace) -> tuple[tuple[GPT, Tokenizer, Story], torch.dtype]:
    """The model of `--model` on the device of the options, and the number format that the device is quick with."""
    device, dtype = choose_device(from_options(DeviceConfig, options))
    return load_model(options.model, device), dtype


def talk(options: argparse.Namespace) -> None:
    """Talk to a saved model."""
    sampling, (loaded, _) = from_options(SampleConfig, options), opened(options)
    say(f"{options.model}: {loaded[2]}")
    chat(*loaded, sampling)


def generate(options: argparse.Namespace) -> None:
    """Write continuations of one prompt to standard output."""
    (model, tokenizer, _), _ = opened(options)
    cfg = from_options(SampleConfig, options)
    if not 1 <= options.samples <= 10_000:
        raise UserError(f"--samples {options.samples}: must be from 1 to 10,000")
    prompt = admitted(tokenizer, options.prompt)
    source = random_source(cfg.seed)
    if options.samples == 1:
        spare_threads(model)
        print(printable(prompt), end="", flush=True)
        for (piece,) in write(model, tokenizer, prompt, cfg, source):
            print(printable(piece), end="", flush=True)
        return print()
    for left in range(options.samples, 0, -64):  # 64 side by side: keys and values of more would fill the memory
        pieces = write(model, tokenizer, prompt, cfg, source, min(64, left))
        for text in map("".join, zip(*pieces, strict=True)):
            print(printable(prompt + text) + "\n" + "-" * 40, flush=True)


def explain(options: argparse.Namespace) -> None:
    """Print views of a text to standard output: here they are the result."""
    (model, tokenizer, _), _ = opened(options)
    cfg, text = from_options(SampleConfig, options), admitted(tokenizer, options.text)
    if not text:
        raise UserError(f"{options.text!r}: has no characters that the model knows; give another text")
    subjects = dict(
        tokens=(tokens_view, tokenizer, options.text),
        probs=(probs_view, model, tokenizer, text, cfg),
        why=(why_view, model, tokenizer, "", text),
        attn=(attn_view, model, tokenizer, text, options.layer, options.head),
    )
    for i, view in enumerate(options.view or VIEWS):
        print(end="\n" * bool(i), flush=True)
        look(Console(), *subjects[view])


def measure(options: argparse.Namespace) -> None:
    """Print the loss of a model on a text: the text it was trained on is examined in the part that it did not see."""
    (model, tokenizer, story), dtype = opened(options)
    corpus = load_corpus(options.data or text_of(story), options.encoding)
    if corpus.sha256 == story.data["sha256"]:
        ids, part = split(corpus.ids)[1], "validation part"
    else:  # the model may have other ids for the characters than the text has
        spelt, part = tokenizer.encode(corpus.tokenizer.characters), "whole text"
        ids = torch.cat([spelt[piece.int()] for piece in corpus.ids.split(1 << 20)])
    unknown = int((ids == 0).sum())
    if len(ids) - unknown < 2:
        raise UserError(f"--data {corpus.name}: has no characters that the model knows; take a longer or another text")
    say(f"Measuring {len(ids):,} characters ...")
    loss, count = evaluate(model, ids, dtype)
    figures = f"{loss:.4f} nats/char, {loss / math.log(2):.4f} bits/char, perplexity {math.exp(min(loss, 700)):.3f}"
    print(f"{printable(corpus.name)}, {part}: {figures}, over {count:,} characters")
    if unknown:
        say(f"({unknown:,} left out: characters that the model does not know)")


def info(options: argparse.Namespace) -> None:
    """Print what a model file is."""
    path, (story, _) = options.model, open_file(options.model)
    listing = lambda d: ", ".join(f"{name} {value}" for name, value in d.items() if value is not None)  # noqa: E731
    characters, data = story.characters[1:], story.data
    rows = {
        "model": f"{path}, {path.stat().st_size:,} bytes, {story}",
        "network": f"{story.config.n_parameters():,} parameters: {listing(asdict(story.config))}",
        "characters": f"{len(characters):,}: {''.join(map(glyph, characters[:200]))}",
        "data": f"{data['name']}, {data['characters']:,} characters, SHA-256 {data['sha256'][:16]}",
        "training": listing(story.training),
    }
    for name, text in rows.items():
        print(fitted(f"{name:<12}{printable(text)}", sys.stdout, indent=12))
    if chart := loss_chart(story.history):
        print(chart)


def main(options: argparse.Namespace) -> int:
    """Run a command; the exit status: 0, 2 after an error that a person can mend, 130 after Ctrl-C."""
    sys.stdout.reconfigure(errors="backslashreplace")
    sys.stderr.reconfigure(errors="backslashreplace")
    sys.stdin.reconfigure(errors="replace")
    commands = dict(run=run, train=train, chat=talk, generate=generate, explain=explain, eval=measure, info=info)
    try:
        (commands | dict(export=export, push=push))[options.command](options)
        return 0
    except UserError as error:
        who = f"process {rank}: " if (rank := os.environ.pop("RANK", "0")) != "0" else ""  # now it may speak
        say(f"anexagpt.py: {who}{error}")
        return 2
    except BrokenPipeError:  # whoever read our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        say(f"anexagpt.py: {error.filename or 'system'}: {error.strerror or error}")
        return 2
    except KeyboardInterrupt:
        return 130
    except (MemoryError, RuntimeError) as error:
        if "WORLD_SIZE" in os.environ and re.search("gloo|nccl|c10d", str(error), re.IGNORECASE):
            say("anexagpt.py: another process of this training has ended; the same command goes on from the checkpoint")
            return 1
        if not out_of_memory(error):
            raise
        say("anexagpt.py: out of memory; close other programs, or take a smaller model, text or --block-size")
        return 2


if __name__ == "__main__":
    sys.exit(main(OPTIONS))
