# ruff: noqa: B905 (rows that are zipped have equal lengths, or the shorter one is meant)
"""The old architecture: the GPT of anexagpt.py with nothing but Python, one number at a time.

    python docs/old_architecture.py                              train a tiny model on a small text, then prompt
    python docs/old_architecture.py --model model.safetensors    prompt a model that this file or anexagpt.py has saved

A matrix is a list of rows; a vector is a matrix of one row. Their entries are floats, or Values, which remember how
they were made: with Values the network learns, with floats the same functions only compute. The story is told in
old_architecture.md.

Shapes: T tokens read now, S tokens read so far (the cached ones + T), C n_embd, H heads, D = C / H, V vocab_size.
"""

import argparse
import gc
import hashlib
import json
import math
import os
import random
import struct
import sys
import tempfile
import time
import unicodedata
from collections import Counter, deque
from dataclasses import asdict, dataclass, fields
from itertools import islice, repeat
from operator import add as plus
from operator import mul
from pathlib import Path

# ---- config ----------------------------------------------------------------------------------------------------------


class UserError(Exception):
    """Something a person can put right. The message gives the value, the rule and the cure; `main` prints it."""


# A setting is one line: its default, the smallest and the largest value allowed, and its help.
KNOBS = {
    "block_size": (32, 2, 65_536, "longest context, in characters (T)"),
    "n_layer": (1, 1, 128, "transformer blocks"),
    "n_head": (4, 1, 1_000, "attention heads per block (H)"),
    "n_embd": (24, 1, 65_536, "channels, a multiple of --n-head (C)"),
    "max_steps": (4_000, 1, 100_000_000, "optimizer updates, each on one window of text"),
    "learning_rate": (0.008, 0.0, 10.0, "rate of the first update; it falls linearly to zero"),
    "seed": (1337, 0, 2**63 - 1, "first weights and order of the text follow from it"),
    "temperature": (0.8, 0.0, 100.0, "below 1 safer, above 1 wilder; 0 always takes the likeliest character"),
    "max_new": (300, 0, 10**12, "characters to write"),
}


def check(name, value):
    default, low, high, _ = KNOBS[name]
    if type(value) not in (int, type(default)) or not low <= value <= high:
        raise UserError(f"{name} {value!r:.40}: must be {type(default).__name__} from {low:,} to {high:,}")


@dataclass(frozen=True)
class GPTConfig:
    """Shape of the network; stored in every model file, so that the file can rebuild its model."""

    vocab_size: int
    block_size: int
    n_layer: int
    n_head: int
    n_embd: int

    def __post_init__(self):
        for f in fields(self)[1:]:
            check(f.name, getattr(self, f.name))
        if self.n_embd % self.n_head:
            raise UserError(f"n_embd {self.n_embd}: must be a multiple of n_head {self.n_head}")


def printable(text):
    """`text` with control, bidirectional and surrogate characters spelt out, so that none can steer a terminal."""
    risky = {c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs")} - set("\n\t\u00ad\u200c\u200d")
    return text.translate({ord(c): c.encode("unicode_escape", "surrogatepass").decode() for c in risky})


def say(text="", end="\n"):
    """Print for the person: to standard error, so that standard output holds generated text and nothing else."""
    print(printable(text), end=end, file=sys.stderr, flush=True)


# ---- data ------------------------------------------------------------------------------------------------------------


def load_text(path):
    """(name, text) of a UTF-8 file, or with no path of the language reference that Python's own help() carries."""
    try:
        if path:
            return path.name, path.read_text(encoding="utf-8-sig")
        from pydoc_data.topics import topics

        return "python-docs", "\n\n".join(topics[name] for name in sorted(topics))[:100_000]
    except UnicodeDecodeError as error:
        raise UserError(f"--data {path}: not UTF-8 at byte {error.start:,}; save the text as UTF-8") from None
    except ImportError:
        raise UserError("this Python comes without its reference (pydoc_data); name a text with --data") from None


# ---- tokenizer -------------------------------------------------------------------------------------------------------

UNKNOWN = "\ufffd"  # id 0: stands for every character that the text did not have, and is never written
EQUIVALENTS = str.maketrans("‘’‚“”„–—―−", "'''\"\"\"----")


class Tokenizer:
    """Characters to ids. `characters[i]` is the character with id i; `characters[0]` is U+FFFD."""

    def __init__(self, characters):
        self.characters = characters
        self.ids = {c: i for i, c in enumerate(characters)}

    @classmethod
    def of(cls, text):
        return cls(UNKNOWN + "".join(sorted(set(text) - {UNKNOWN})))

    def encode(self, text):
        return [self.ids.get(c, 0) for c in text]

    def admit(self, prompt):
        """`prompt` in characters that the model knows, and a one-line notice of what was changed ("" if nothing).

        An unknown character becomes its plain equivalent (straight quotes, dash, no accent, other case) or goes.
        """
        changed = {}
        for c in sorted(set(prompt) - set(self.characters[1:])):
            plain = "".join(p for p in unicodedata.normalize("NFKD", c) if not unicodedata.combining(p))
            forms = (c.translate(EQUIVALENTS), plain, c.swapcase(), plain.swapcase())
            changed[c] = next((form for form in forms if form and all(map(self.ids.get, form))), "")
        notice = "; ".join(f"read {c} as {form}" if form else f"left out {c}" for c, form in changed.items())
        return "".join(changed.get(c, c) for c in prompt), notice


# ---- autograd --------------------------------------------------------------------------------------------------------


class Value:
    """A number, and after backward() how the loss depends on it.

    data      the number
    grad      d(loss) / d(data)
    children  what it was made from: Values, or matrices of them; nothing if it was given
    """

    __slots__ = ("children", "data", "grad")

    # Every operation, oldest first: the rows of Values it made, and the chain rule that goes back through it. All
    # Values share it, since `a * b` has no room to pass it in. It grows until tape.clear(), once a training step.
    tape = []  # noqa: RUF012

    def __init__(self, data, children=()):
        self.data = data
        self.grad = 0.0
        self.children = children

    # fmt: off
    def __add__(self, other): return node(self.data + number(other), (self, 1.0), (other, 1.0))
    def __mul__(self, other): return node(self.data * number(other), (self, number(other)), (other, self.data))
    def __pow__(self, n): return node(math.pow(self.data, n), (self, n * math.pow(self.data, n - 1) if n else 0.0))
    def exp(self): return node(math.exp(self.data), (self, math.exp(self.data)))
    def log(self): return node(math.log(self.data), (self, 1 / self.data))
    def tanh(self): return node(math.tanh(self.data), (self, 1 - math.tanh(self.data) ** 2))
    def __neg__(self): return self * -1.0
    def __sub__(self, other): return self + -other
    def __rsub__(self, other): return -self + other
    def __truediv__(self, other): return self * other**-1
    def __rtruediv__(self, other): return self**-1 * other
    def __repr__(self): return f"Value(data={self.data:.6g}, grad={self.grad:.6g})"
    # fmt: on
    __radd__, __rmul__ = __add__, __mul__

    def backward(self):
        """Set the grad of every Value that was made, and add to the grad of every Value that was given.

        No recursion and no sorting: the tape is in order of creation, so on the way back every use of a Value comes
        before its making, and its grad is complete when its own chain rule needs it.
        """
        for rows, _ in Value.tape:
            for row in rows:
                for value in row:
                    value.grad = 0.0
        self.grad += 1.0
        for rows, chain_rule in reversed(Value.tape):
            grads = [[value.grad for value in row] for row in rows]
            if any(map(any, grads)):
                chain_rule(grads)


def number(x):
    return x.data if isinstance(x, Value) else x


def node(data, *slopes):
    """The Value of one scalar operation; slopes are pairs of a child and d(data) / d(child)."""
    slopes = [(child, slope) for child, slope in slopes if isinstance(child, Value)]
    value = Value(data, tuple(child for child, _ in slopes))

    def chain_rule(grads):
        for child, slope in slopes:
            child.grad += slope * grads[0][0]

    Value.tape.append(([[value]], chain_rule))
    return value


# ---- matrices --------------------------------------------------------------------------------------------------------
# Each entry of a result is one Value, a dot product as well as a sum of two numbers; but a matrix is one operation on
# the tape, for its chain rule is made of matrices again.


def floats(matrix):
    """The numbers of a matrix; `matrix` itself if it holds no Values."""
    return [[v.data for v in row] for row in matrix] if isinstance(matrix[0][0], Value) else matrix


def accumulate(matrix, grads):
    """Add a matrix of numbers to the grads of a matrix, if that holds Values."""
    if isinstance(matrix[0][0], Value):
        for row, grad_row in zip(matrix, grads):
            for value, grad in zip(row, grad_row):
                value.grad += grad


def record(rows, children, chain_rule):
    """`rows` of numbers as Values made from `children`, some matrices; the numbers themselves if no child holds Values.

    chain_rule   gets d(loss) / d(rows) and accumulates d(loss) / d(child) in each child
    """
    if not any(isinstance(child[0][0], Value) for child in children):
        return rows
    values = [list(map(Value, row, repeat(children))) for row in rows]
    Value.tape.append((values, chain_rule))
    return values


if hasattr(math, "sumprod"):  # Python 3.12

    def dots(row, matrix):
        return list(map(math.sumprod, repeat(row), matrix))

else:

    def dots(row, matrix):
        return [sum(map(mul, row, other)) for other in matrix]


def transpose(matrix):  # (N, M) -> (M, N)
    return list(map(list, zip(*matrix)))


def linear(x, weight, *bias):  # (T, K), (M, K), (1, M) -> (T, M)
    """x @ weight.T + bias: each entry is the dot product of a row of x and a row of weight."""
    a, w = floats(x), floats(weight)
    y = [dots(row, w) for row in a]
    for b in bias:
        y = [list(map(plus, row, floats(b)[0])) for row in y]

    def chain_rule(grads):
        accumulate(x, matmul(grads, w))
        accumulate(weight, matmul(transpose(grads), a))
        for b in bias:
            accumulate(b, [map(sum, zip(*grads))])

    return record(y, (x, weight, *bias), chain_rule)


def matmul(a, b):  # (N, K), (K, M) -> (N, M)
    return linear(a, transpose(b))


def add(a, b):  # (T, C), (T, C) -> (T, C)
    def chain_rule(grads):
        accumulate(a, grads)
        accumulate(b, grads)

    return record([list(map(plus, *rows)) for rows in zip(floats(a), floats(b))], (a, b), chain_rule)


def causal_mask(scores):  # (T, S) -> (T, S)
    """Scores, minus infinity for the future: row t is the token at S - T + t, which may look back, not ahead."""
    T, S = len(scores), len(scores[0])
    hidden = Value(-math.inf) if isinstance(scores[0][0], Value) else -math.inf
    return [row[: S - T + t + 1] + [hidden] * (T - t - 1) for t, row in enumerate(scores)]


def softmax(x, temperature=1.0):  # (T, S) -> (T, S)
    """Each row as probabilities: exp(x / temperature) over their sum, less the largest x so that exp stays finite."""
    y = []
    for row in floats(x):
        top = max(row)
        exps = [math.exp((v - top) / temperature) for v in row]
        total = sum(exps)
        y.append([e / total for e in exps])

    def chain_rule(grads):
        means = [sum(map(mul, p, g)) for p, g in zip(y, grads)]
        accumulate(x, [[p * (g - m) / temperature for p, g in zip(*rows)] for *rows, m in zip(y, grads, means)])

    return record(y, (x,), chain_rule)


def layer_norm(x, weight, bias):  # (T, C), (1, C), (1, C) -> (T, C)
    """Each row moved to mean 0 and stretched to variance 1, then weighted and shifted."""
    (w,), (b,), unit, scale = floats(weight), floats(bias), [], []
    for row in floats(x):
        mean = sum(row) / len(row)
        centred = [v - mean for v in row]
        scale.append((sum(map(mul, centred, centred)) / len(row) + 1e-5) ** -0.5)
        unit.append([v * scale[-1] for v in centred])

    def chain_rule(grads):
        for i, (u, s, g) in enumerate(zip(unit, scale, grads)):
            gw = list(map(mul, g, w))
            mean, slope = sum(gw) / len(gw), sum(map(mul, gw, u)) / len(gw)
            accumulate(x[i : i + 1], [[s * (gi - mean - ui * slope) for gi, ui in zip(gw, u)]])
            accumulate(weight, [map(mul, g, u)])
        accumulate(bias, [map(sum, zip(*grads))])

    return record([list(map(plus, map(mul, row, w), b)) for row in unit], (x, weight, bias), chain_rule)


def gelu(x):  # (T, C) -> (T, C)
    """x, multiplied by how likely a normally distributed number is below x, in the tanh form of GPT-2."""
    a, k = floats(x), math.sqrt(2 / math.pi)
    tanhs = [[math.tanh(k * (v + 0.044715 * v * v * v)) for v in row] for row in a]

    def slope(v, t):
        return 0.5 * (1 + t) + 0.5 * v * (1 - t * t) * k * (1 + 3 * 0.044715 * v * v)

    def chain_rule(grads):
        accumulate(x, [map(mul, g, map(slope, row, ts)) for g, row, ts in zip(grads, a, tanhs)])

    return record([[0.5 * v * (1 + t) for v, t in zip(*rows)] for rows in zip(a, tanhs)], (x,), chain_rule)


def cross_entropy(logits, targets):  # (T, V), (T) -> one number
    """Mean surprise at the targets, in nats: minus the logarithm of the probability that each one was given."""
    a, T, loss = floats(logits), len(targets), 0.0
    for row, t in zip(a, targets):
        top = max(row)
        loss += (math.log(sum(math.exp(v - top) for v in row)) + top - row[t]) / T

    def chain_rule(grads):
        share = grads[0][0] / T
        slopes = [[p * share for p in row] for row in softmax(a)]
        for row, t in zip(slopes, targets):
            row[t] -= share
        accumulate(logits, slopes)

    return record([[loss]], (logits,), chain_rule)[0][0]


# ---- model -----------------------------------------------------------------------------------------------------------


def shapes(config):
    """Name -> shape of every tensor, as the model file holds them: GPT-2's names, PyTorch's (out, in)."""
    V, T, C = config.vocab_size, config.block_size, config.n_embd
    block = {"ln_1": (C,), "attn.c_attn": (3 * C, C), "attn.c_proj": (C, C)}
    block |= {"ln_2": (C,), "mlp.c_fc": (4 * C, C), "mlp.c_proj": (C, 4 * C)}
    tensors = {"wte.weight": (V, C), "wpe.weight": (T, C), "ln_f.weight": (C,), "ln_f.bias": (C,)}
    for n in range(config.n_layer):
        tensors |= {f"h.{n}.{name}.weight": shape for name, shape in block.items()}
        tensors |= {f"h.{n}.{name}.bias": shape[:1] for name, shape in block.items()}
    return tensors


def new_weights(config, rng):
    """Name -> matrix of Values. Every block starts as the identity, since its c_proj are zero."""

    def first(name, shape):
        if len(shape) == 1 or "c_proj" in name:
            return float("ln" in name and "weight" in name)
        return rng.gauss(0.0, config.n_embd**-0.5)

    return {
        name: [[Value(first(name, shape)) for _ in range(shape[-1])] for _ in range(math.prod(shape[:-1]))]
        for name, shape in shapes(config).items()
    }


def attention(qkv, n_head, keys, values):  # (T, 3C) -> (T, C)
    """Each token mixes the values of the tokens up to itself by how well its query fits their keys, in every head anew.

    keys, values   (S - T, C) of the tokens before these; they grow by these, to (S, C)
    """
    C = len(qkv[0]) // 3
    D = C // n_head
    keys += [row[C : 2 * C] for row in qkv]
    values += [row[2 * C :] for row in qkv]
    heads = []
    for d in range(0, C, D):
        q, k, v = ([row[d : d + D] for row in rows] for rows in (qkv, keys, values))  # (T, D), (S, D), (S, D)
        scores = causal_mask(linear(q, k))  # (T, S), as matmul(q, transpose(k))
        heads.append(matmul(softmax(scores, temperature=math.sqrt(D)), v))  # (T, D)
    return [[v for row in rows for v in row] for rows in zip(*heads)]


def new_cache(config):
    """Keys and values of the tokens read so far, none, in each block."""
    return [([], []) for _ in range(config.n_layer)]


def gpt(ids, weights, config, cache=None):  # (T) -> (T, V)
    """Logits of the character after each of `ids`: a whole text at once, or one by one with a cache of the rest."""

    def w(name):
        return weights[f"{name}.weight"], weights[f"{name}.bias"]

    cache = cache or new_cache(config)
    past = len(cache[0][0])
    x = add([weights["wte.weight"][i] for i in ids], weights["wpe.weight"][past : past + len(ids)])  # (T, C)
    for n, (keys, values) in enumerate(cache):
        qkv = linear(layer_norm(x, *w(f"h.{n}.ln_1")), *w(f"h.{n}.attn.c_attn"))  # (T, 3C)
        x = add(x, linear(attention(qkv, config.n_head, keys, values), *w(f"h.{n}.attn.c_proj")))
        hidden = gelu(linear(layer_norm(x, *w(f"h.{n}.ln_2")), *w(f"h.{n}.mlp.c_fc")))  # (T, 4C)
        x = add(x, linear(hidden, *w(f"h.{n}.mlp.c_proj")))
    return linear(layer_norm(x, *w("ln_f")), weights["wte.weight"])  # the head is the embedding


# ---- optimizer -------------------------------------------------------------------------------------------------------


class Adam:
    """Moves every weight against its gradient, by about the learning rate however large the gradient is.

    source  Kingma and Ba 2015, "Adam: A Method for Stochastic Optimization", algorithm 1
    """

    def __init__(self, parameters, beta1=0.85, beta2=0.99, eps=1e-8):
        self.parameters, self.beta1, self.beta2, self.eps, self.steps = parameters, beta1, beta2, eps, 0
        self.m = [0.0] * len(parameters)  # running sum of the gradients
        self.v = [0.0] * len(parameters)  # and of their squares

    def step(self, learning_rate):
        b1, b2, sqrt = self.beta1, self.beta2, math.sqrt
        self.steps += 1
        grads = [p.grad for p in self.parameters]
        self.m = [b1 * m + g for m, g in zip(self.m, grads)]
        self.v = [b2 * v + g * g for v, g in zip(self.v, grads)]
        # What makes means of the two sums is the same for all weights, so it goes into the rate and eps.
        n1, n2 = (1 - b1**self.steps) / (1 - b1), math.sqrt((1 - b2**self.steps) / (1 - b2))
        rate, eps = learning_rate * n2 / n1, self.eps * n2
        for p, m, v in zip(self.parameters, self.m, self.v):
            p.data -= rate * m / (sqrt(v) + eps)
            p.grad = 0.0


# ---- model file ------------------------------------------------------------------------------------------------------
# A safetensors file: 8 bytes with the length of a JSON header, the header, then all the numbers, raw and little-endian.

FORMAT_VERSION = "1"
HUGE = 1e3  # no weight of a trained network comes near it; from far above it the arithmetic would overflow


@dataclass
class Model:
    """A network, what it reads and writes, and where it came from."""

    config: GPTConfig
    tokenizer: Tokenizer
    weights: dict  # name -> matrix, of floats or of Values
    story: dict  # data, training, step, validation_loss, history

    def __str__(self):
        size = sum(map(math.prod, shapes(self.config).values())) / 1e6
        data, step, loss = (self.story.get(name) for name in ("data", "step", "validation_loss"))
        name = data.get("name") if isinstance(data, dict) else None
        return f"{size:.2f} M parameters, trained on {name!r:.60} for {step!r:.12} steps, validation loss {loss!r:.6}"


def save_file(path, model):
    """Write a model to `path`, which keeps its old content until the new one is safely on the disk."""
    told = model.story | dict(config=asdict(model.config) | dict(dropout=0.0), characters=model.tokenizer.characters)
    metadata = {"format": "pt", "format_version": FORMAT_VERSION} | {key: json.dumps(told[key]) for key in told}
    header, content = {"__metadata__": metadata}, bytearray()
    for name, shape in shapes(model.config).items():
        start = len(content)
        for row in floats(model.weights[name]):
            content += struct.pack(f"<{len(row)}f", *row)
        header[name] = dict(dtype="F32", shape=shape, data_offsets=(start, len(content)))
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text + content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def demand(condition, rule):
    if not condition:
        raise ValueError(rule)


def read_model(file, size):
    """The Model, of floats, in a file of `size` bytes, which may hold anything: no claim is used before it is checked.

    raises  ValueError, UserError or RecursionError saying what is wrong
    """
    length = int.from_bytes(file.read(8), "little")
    demand(2 <= length <= min(size - 8, 100_000_000), "its header has an impossible length")
    header = json.loads(file.read(length))
    metadata = header.pop("__metadata__", None) if isinstance(header, dict) else None
    demand(isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values()), "it has no metadata")
    demand(metadata.get("format_version") == FORMAT_VERSION, f"its format_version is not {FORMAT_VERSION}")
    told = ("config", "characters", "data", "training", "step", "validation_loss", "history")
    story = {name: json.loads(metadata[name]) for name in told if name in metadata}
    settings, characters = story.pop("config", None), story.pop("characters", None)
    names = [f.name for f in fields(GPTConfig)]  # dropout, the other entry, matters only where anexagpt.py trains
    demand(
        isinstance(settings, dict) and settings.keys() == {*names, "dropout"}, "its config has not the right entries"
    )
    config = GPTConfig(*(settings[name] for name in names))
    demand(
        isinstance(characters, str) and len(characters) == config.vocab_size, "its characters are not vocab_size many"
    )
    characters.encode()  # refuses surrogates
    demand(len(set(characters)) == len(characters) > 1, "its characters are not different ones")
    demand(characters[0] == UNKNOWN, "its first character is not U+FFFD")

    tensors = shapes(config)
    demand(header.keys() == tensors.keys(), "its tensors are not those of its config")
    demand(4 * sum(map(math.prod, tensors.values())) == size - 8 - length, "its size is not that of its tensors")
    for name, shape in tensors.items():
        entry = header[name] if isinstance(header[name], dict) else {}
        demand(entry.get("dtype") == "F32" and entry.get("shape") == list(shape), f"{name} is not F32 {list(shape)}")
        span, n = entry.get("data_offsets"), 4 * math.prod(shape)
        demand(isinstance(span, list) and list(map(type, span)) == [int, int], f"{name} has no data_offsets")
        demand(span[1] - span[0] == n, f"{name} does not have {n:,} bytes")
    weights, end = {}, 0
    for name in sorted(tensors, key=lambda name: header[name]["data_offsets"]):
        columns, n = tensors[name][-1], math.prod(tensors[name])
        demand(header[name]["data_offsets"][0] == end, f"{name} is not in its place")
        numbers, end = struct.unpack(f"<{n}f", file.read(4 * n)), end + 4 * n
        demand(all(map(HUGE.__gt__, map(abs, numbers))), f"{name} has values that are no weights")
        weights[name] = [list(numbers[i : i + columns]) for i in range(0, n, columns)]
    return Model(config, Tokenizer(characters), weights, story)


def load_model(path):
    """A model file's Model; UserError if it is not whole, or not ours."""
    try:
        demand(path.is_file() or not path.exists(), "it is not a file")
        with open(path, "rb") as file:
            return read_model(file, os.fstat(file.fileno()).st_size)
    except (UserError, ValueError, RecursionError, struct.error) as error:
        reason = printable(str(error)).replace("\n", " ")[:200]
        raise UserError(f"{path}: not a whole model of Anexa: {reason}; train one, or fetch it again") from None


# ---- training --------------------------------------------------------------------------------------------------------


def entropy(text):
    """Loss in nats of knowing how often each character occurs and nothing else."""
    return -sum(n / len(text) * math.log(n / len(text)) for n in Counter(text).values())


def loss_at(i, ids, weights, config):
    """Loss of the network on the window of `ids` that begins at `i`."""
    T = config.block_size
    return cross_entropy(gpt(ids[i : i + T], weights, config), ids[i + 1 : i + T + 1])


def evaluate(ids, weights, config, windows=40):
    """Mean loss in floats on windows spread evenly over `ids`: the same ones at every call."""
    weights = {name: floats(matrix) for name, matrix in weights.items()}
    starts = range(0, len(ids) - config.block_size, max(1, len(ids) // windows))
    return sum(loss_at(i, ids, weights, config) for i in starts) / len(starts)


def train(name, text, config, tokenizer, max_steps, learning_rate, seed):
    """A Model of Values that has learnt the first nine tenths of `text`, the rest being for validation."""
    ids, rng, unigrams = tokenizer.encode(text), random.Random(seed), entropy(text)
    n = len(ids) * 9 // 10
    weights = new_weights(config, rng)
    adam = Adam([value for matrix in weights.values() for row in matrix for value in row])
    say(f"{name}: {len(text):,} characters, {len(tokenizer.ids) - 1} different; {len(adam.parameters):,} parameters")
    history, recent, start = [], deque(maxlen=200), time.perf_counter()
    back = "\r" if sys.stderr.isatty() else ""
    for step in range(1, max_steps + 1):
        loss = loss_at(rng.randrange(n - config.block_size), ids, weights, config)
        loss.backward()
        adam.step(learning_rate * (1 - (step - 1) / max_steps))
        Value.tape.clear()
        recent.append(loss.data)
        mean, rate = sum(recent) / len(recent), step / (time.perf_counter() - start)
        line = f"step {step:>7,}/{max_steps:,}  loss {mean:.3f} nats/char, unigrams {unigrams:.3f}, {rate:5.1f} steps/s"
        if not math.isfinite(mean):
            raise UserError(f"--learning-rate {learning_rate}: too large, the loss is {mean} at step {step:,}")
        if step % -(-max_steps // 10) == 0 or step == max_steps:
            history.append([step, mean, evaluate(ids[n:], weights, config)])
            print(f"{back}{line}, validation {history[-1][2]:.3f}", file=sys.stderr)
        elif back:
            print(f"{back}{line}", end="", file=sys.stderr, flush=True)
    data = dict(name=name, sha256=hashlib.sha256(text.encode()).hexdigest(), characters=len(text))
    training = dict(max_steps=max_steps, learning_rate=learning_rate, seed=seed)
    story = dict(data=data, training=training, step=max_steps, validation_loss=history[-1][2], history=history)
    return Model(config, tokenizer, weights, story)


# ---- generation ------------------------------------------------------------------------------------------------------


def window_start(n, block_size):
    """Where the context begins after `n` characters of text: when it is full, its last half is read again."""
    half = block_size // 2
    return 0 if n <= block_size else -(-(n - block_size) // half) * half


def choose(logits, temperature, rng):
    """An id drawn from logits (V); never 0, the unknown character."""
    if temperature == 0:
        return max(range(1, len(logits)), key=logits.__getitem__)
    return rng.choices(range(1, len(logits)), *softmax([logits[1:]], temperature))[0]


def stream(model, ids, temperature, rng):
    """Endless continuation of `ids`, of which there is at least one: the id of the next character, one at a time."""
    T = model.config.block_size
    unread = window = ids[window_start(len(ids), T) :]
    cache = new_cache(model.config)
    while True:
        unread = [choose(gpt(unread, model.weights, model.config, cache)[-1], temperature, rng)]
        yield unread[0]
        window = window + unread
        if len(window) > T:
            unread = window = window[window_start(T + 1, T) :]
            cache = new_cache(model.config)


# ---- REPL ------------------------------------------------------------------------------------------------------------


def ask():
    """A line from the person, or from a pipe; EOFError at its end."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        return input("Prompt: ")
    say("Prompt: ", end="")
    if line := sys.stdin.readline():
        return line.rstrip("\n")
    raise EOFError


def chat(model, temperature, max_new):
    """Continue one prompt after another until `quit`, `exit` or the end of the input."""
    rng = random.Random()
    say("\n--- Interactive Generation ---")
    say("Enter a prompt to continue (or 'quit' to exit)")
    while True:
        try:
            prompt = ask()
        except EOFError:
            return say()
        except KeyboardInterrupt:
            say("\n(quit or Ctrl-D leaves)")
            continue
        if prompt.strip() in ("quit", "exit"):
            return
        prompt, notice = model.tokenizer.admit(prompt)
        if notice:
            say(f"({notice})")
        if not prompt:
            continue
        try:
            say("Response: ", end="")
            print(printable(prompt), end="", flush=True)
            for i in islice(stream(model, model.tokenizer.encode(prompt), temperature, rng), max_new):
                print(printable(model.tokenizer.characters[i]), end="", flush=True)
        except KeyboardInterrupt:
            pass  # only the answer stops; what has come stays
        print(flush=True)


# ---- CLI -------------------------------------------------------------------------------------------------------------


def parse_options(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}; see {parser.prog} --help\n")
    parser.add_argument("--model", type=Path, metavar="FILE", help="model file to prompt (default: train one first)")
    parser.add_argument("--data", type=Path, metavar="FILE", help="text to train on (default: Python's own reference)")
    out = Path("old_model.safetensors")
    parser.add_argument("--out", type=Path, default=out, metavar="FILE", help=f"where the model goes (default: {out})")
    for name, (default, _, _, help) in KNOBS.items():
        option, help = f"--{name.replace('_', '-')}", f"{help} (default: {default})"
        parser.add_argument(option, type=type(default), default=default, metavar="N", help=help)
    return parser.parse_args(argv)


def run(options):
    """Train unless there is a model, then talk."""
    for name in KNOBS:
        check(name, getattr(options, name))
    if options.model is None:
        name, text = load_text(options.data)
        tokenizer = Tokenizer.of(text)
        shape = (options.block_size, options.n_layer, options.n_head, options.n_embd)
        config, need = GPTConfig(len(tokenizer.characters), *shape), 20 * options.block_size
        if len(text) < need:
            rule = f"{len(text):,} characters, but --block-size {options.block_size} needs at least {need:,}"
            raise UserError(f"--data {name}: {rule}; take a longer text or a smaller --block-size")
        tempfile.TemporaryFile(dir=options.out.parent).close()  # better to fail now than after the training
        model = train(name, text, config, tokenizer, options.max_steps, options.learning_rate, options.seed)
        say("Training finished...")
        save_file(options.out, model)
        say(f"Model saved to {options.out}")
    path = options.model or options.out
    model = load_model(path)
    say(f"{path}: {model}")
    chat(model, options.temperature, options.max_new)


def main(argv):
    """Run the program; the exit status: 0, 2 after an error that a person can mend, 130 after Ctrl-C."""
    options = parse_options(argv)
    sys.stdout.reconfigure(errors="backslashreplace")
    sys.stderr.reconfigure(errors="backslashreplace")
    sys.stdin.reconfigure(errors="replace")
    gc.disable()  # nothing here refers back to itself: counting references frees it all, to look for rings is idle
    try:
        run(options)
        return 0
    except UserError as error:
        say(f"old_architecture.py: {error}")
        return 2
    except BrokenPipeError:  # whoever read our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        say(f"old_architecture.py: {error.filename}: {error.strerror}; give another path")
        return 2
    except KeyboardInterrupt:
        say()
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
