# ruff: noqa: B905 (zip without strict=: rows of a matrix have equal lengths)
"""The GPT of anexagpt.py in pure Python: scalar autograd, matrices as lists, no dependencies.

    python docs/old_architecture.py                              train on this file, then prompt
    python docs/old_architecture.py --model model.safetensors    prompt a model of anexagpt.py

A matrix is a list of rows, a vector a matrix of one row. Its entries are Values, which record the
graph for backpropagation, or floats, for inference. Every function accepts both.

Shapes: T tokens in this forward pass, S tokens including the KV cache, C n_embd, H n_head,
D = C / H, V vocab_size; N, M, K any size. old_architecture.md explains the file step by step.
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
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import chain, islice, repeat
from operator import mul
from pathlib import Path

# ---- autograd ------------------------------------------------------------------------------------


class Value:
    """A scalar that records how it was computed.

    data      the number
    grad      d(loss) / d(data), accumulated by loss.backward()
    grad_fn   the Function that computed it from its children; None for a leaf
    """

    __slots__ = ("data", "grad", "grad_fn")

    def __init__(self, data, grad_fn=None):
        self.data, self.grad, self.grad_fn = data, 0.0, grad_fn

    # fmt: off
    def __add__(self, other):
        other = other if isinstance(other, Value) else Value(other)
        return scalar(self.data + other.data, (self, 1.0), (other, 1.0))
    def __mul__(self, other):
        other = other if isinstance(other, Value) else Value(other)
        return scalar(self.data * other.data, (self, other.data), (other, self.data))
    def __pow__(self, n): return scalar(self.data**n, (self, n * self.data ** (n - 1)))
    def exp(self): return scalar(math.exp(self.data), (self, math.exp(self.data)))
    def log(self): return scalar(math.log(self.data), (self, 1 / self.data))
    def __neg__(self): return self * -1.0
    def __sub__(self, other): return self + -other
    def __rsub__(self, other): return -self + other
    def __truediv__(self, other): return self * other**-1
    def __rtruediv__(self, other): return self**-1 * other
    def __repr__(self): return f"Value(data={self.data:.6g}, grad={self.grad:.6g})"
    # fmt: on
    __radd__, __rmul__ = __add__, __mul__

    @property
    def children(self):
        return self.grad_fn.children if self.grad_fn else ()

    def backward(self):
        """Add d(self) / d(v) to v.grad for every Value v that self depends on; free the graph.

        Reverse-mode automatic differentiation. In reverse topological order the grad of a Value is
        complete before the Function that computed it passes it on to its inputs.
        """
        order, visited, stack = [], set(), [(self.grad_fn, False)]
        while stack:  # depth-first search; recursion would fail on a long graph
            fn, inputs_done = stack.pop()
            if inputs_done:
                order.append(fn)
            elif fn and fn not in visited:
                visited.add(fn)
                stack.append((fn, True))
                stack += [(f, False) for f in dict.fromkeys(v.grad_fn for v in fn.children)]
        self.grad += 1.0
        for fn in reversed(order):
            fn.backward([[value.grad for value in row] for row in fn.outputs])
            fn.outputs = None  # ends the reference cycle outputs -> Value -> grad_fn -> outputs


class Function:
    """One operation of the graph, shared by all entries of the matrix that it computed."""

    def __init__(self, inputs, rows, backward):
        self.children = [value for matrix in inputs for row in matrix for value in row]
        self.outputs = [list(map(Value, row, repeat(self))) for row in rows]
        self.backward = backward  # given d(loss) / d(outputs), adds to the grads of the children


def record(rows, inputs, backward):
    """`rows` as Values computed from `inputs`, matrices; as they are if no input has Values."""
    inputs = [matrix for matrix in inputs if isinstance(matrix[0][0], Value)]
    return Function(inputs, rows, backward).outputs if inputs else rows


def scalar(data, *partials):
    """Value of a scalar operation; `partials` are pairs (operand, d(data) / d(operand))."""

    def backward(grads):
        for operand, d in partials:
            operand.grad += d * grads[0][0]

    return Function([[[operand for operand, _ in partials]]], [[data]], backward).outputs[0][0]


def detach(matrix):
    """The floats of a matrix of Values, without the graph; a matrix of floats as it is."""
    return [[v.data for v in row] for row in matrix] if isinstance(matrix[0][0], Value) else matrix


def accumulate(matrix, grads):
    """Add `grads` to the grads of a matrix of Values; no effect on a matrix of floats."""
    if isinstance(matrix[0][0], Value):
        for row, grad_row in zip(matrix, grads):
            for value, grad in zip(row, grad_row):
                value.grad += grad


# ---- matrices ------------------------------------------------------------------------------------
# Forward and backward of an operation work on floats, with inner loops in C; a dot product of K
# numbers is one Value, not 2K - 1. math.sumprod is new in Python 3.12.

dot = getattr(math, "sumprod", lambda a, b: sum(map(mul, a, b)))


def transpose(matrix):  # (N, M) -> (M, N)
    return list(map(list, zip(*matrix)))


def linear(x, weight, bias=None):  # (N, K), (M, K), (1, M) -> (N, M)
    """x @ weight.T + bias."""
    a, w = detach(x), detach(weight)
    y = [list(map(dot, repeat(row), w)) for row in a]
    if bias:
        y = [[v + b for v, b in zip(row, *detach(bias))] for row in y]

    def backward(grads):
        accumulate(x, matmul(grads, w))
        accumulate(weight, matmul(transpose(grads), a))
        if bias:
            accumulate(bias, [map(sum, zip(*grads))])

    return record(y, [x, weight, bias] if bias else [x, weight], backward)


def matmul(a, b):  # (N, K), (K, M) -> (N, M)
    return linear(a, transpose(b))


def add(a, b):  # (N, M), (N, M) -> (N, M)
    def backward(grads):
        accumulate(a, grads)
        accumulate(b, grads)

    y = [[u + v for u, v in zip(*rows)] for rows in zip(detach(a), detach(b))]
    return record(y, [a, b], backward)


def causal_mask(scores):  # (T, S) -> (T, S)
    """Attention scores, -inf for keys after the query: row t is the token at S - T + t."""
    T, S = len(scores), len(scores[0])
    hidden = Value(-math.inf) if isinstance(scores[0][0], Value) else -math.inf
    return [row[: S - T + t + 1] + [hidden] * (T - t - 1) for t, row in enumerate(scores)]


def softmax(x, scale=1.0):  # (N, M) -> (N, M)
    """exp(scale * x), divided by the sum of its row; x less its maximum, so that exp is finite."""
    y = []
    for row in detach(x):
        top = max(row)
        exps = [math.exp(scale * (v - top)) for v in row]
        total = sum(exps)
        y.append([e / total for e in exps])

    def backward(grads):
        dots = [dot(p, g) for p, g in zip(y, grads)]
        rows = zip(y, grads, dots)
        accumulate(x, [[scale * pi * (gi - d) for pi, gi in zip(p, g)] for p, g, d in rows])

    return record(y, [x], backward)


def layer_norm(x, weight, bias):  # (N, C), (1, C), (1, C) -> (N, C)
    """Each row with mean 0 and variance 1, times weight, plus bias (Ba et al. 2016)."""
    (w,), (b,), normed, rstds = detach(weight), detach(bias), [], []
    for row in detach(x):
        mean = sum(row) / len(row)
        centred = [v - mean for v in row]
        rstds.append((dot(centred, centred) / len(row) + 1e-5) ** -0.5)
        normed.append([v * rstds[-1] for v in centred])

    def backward(grads):
        for i, (n, rstd, g) in enumerate(zip(normed, rstds, grads)):
            gw = [gi * wi for gi, wi in zip(g, w)]
            mean, slope = sum(gw) / len(gw), dot(gw, n) / len(gw)
            accumulate(x[i : i + 1], [[rstd * (gi - mean - ni * slope) for gi, ni in zip(gw, n)]])
            accumulate(weight, [map(mul, g, n)])
        accumulate(bias, [map(sum, zip(*grads))])

    y = [[ni * wi + bi for ni, wi, bi in zip(n, w, b)] for n in normed]
    return record(y, [x, weight, bias], backward)


def gelu(x):  # (N, M) -> (N, M)
    """GELU in the tanh approximation of GPT-2 (Hendrycks and Gimpel 2016, section 2)."""
    a, k, c = detach(x), math.sqrt(2 / math.pi), 0.044715
    tanhs = [[math.tanh(k * (v + c * v * v * v)) for v in row] for row in a]

    def derivative(v, t):
        return 0.5 * (1 + t) + 0.5 * v * (1 - t * t) * k * (1 + 3 * c * v * v)

    def backward(grads):
        accumulate(x, [map(mul, g, map(derivative, *rows)) for g, *rows in zip(grads, a, tanhs)])

    y = [[0.5 * v * (1 + t) for v, t in zip(*rows)] for rows in zip(a, tanhs)]
    return record(y, [x], backward)


def cross_entropy(logits, targets):  # (T, V), (T,) -> scalar
    """Mean of -log(softmax(logits)[target]), in nats, as log-sum-exp minus logit."""
    a, T, loss = detach(logits), len(targets), 0.0
    for row, target in zip(a, targets):
        top = max(row)
        loss += (math.log(sum(math.exp(v - top) for v in row)) + top - row[target]) / T

    def backward(grads):  # (softmax(logits) - one_hot(targets)) / T
        rows = softmax(a)
        for row, target in zip(rows, targets):
            row[target] -= 1.0
        accumulate(logits, [[v * grads[0][0] / T for v in row] for row in rows])

    return record([[loss]], [logits], backward)[0][0]


# ---- model ---------------------------------------------------------------------------------------


def require(condition, message):
    """Raise ValueError with a message of one line: the value, the rule, what to do."""
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True)
class GPTConfig:
    vocab_size: int
    block_size: int  # the longest context, T
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float = field(default=0.0, repr=False)  # for training with anexagpt.py; unused here

    def __post_init__(self):
        sizes = [self.vocab_size, self.block_size, self.n_layer, self.n_head, self.n_embd]
        valid = all(type(n) is int and 0 < n < 2**21 for n in sizes)
        fits = valid and self.n_embd % self.n_head == 0
        require(fits, f"not positive integers with n_embd a multiple of n_head: {self}")


def parameter_shapes(config):
    """Name -> shape of each parameter: GPT-2's names, (out_features, in_features) as in PyTorch."""
    V, T, C = config.vocab_size, config.block_size, config.n_embd
    block = {"ln_1": (C,), "attn.c_attn": (3 * C, C), "attn.c_proj": (C, C)}
    block |= {"ln_2": (C,), "mlp.c_fc": (4 * C, C), "mlp.c_proj": (C, 4 * C)}
    shapes = {"wte.weight": (V, C), "wpe.weight": (T, C), "ln_f.weight": (C,), "ln_f.bias": (C,)}
    for layer in range(config.n_layer):
        shapes |= {f"h.{layer}.{name}.weight": shape for name, shape in block.items()}
        shapes |= {f"h.{layer}.{name}.bias": shape[:1] for name, shape in block.items()}
    return shapes


def init_weights(config, rng):
    """State dict (name -> matrix of Values): normal with standard deviation C**-0.5.

    Biases are 0, LayerNorm weights 1. c_proj is 0, so that every block starts as the identity.
    """
    state_dict = {}
    for name, shape in parameter_shapes(config).items():
        std = config.n_embd**-0.5 if len(shape) == 2 and "c_proj" not in name else 0.0
        mean = 1.0 if "ln_" in name and "weight" in name else 0.0
        row_count = math.prod(shape[:-1])  # 1 for a vector
        rows = ([rng.gauss(mean, std) for _ in range(shape[-1])] for _ in range(row_count))
        state_dict[name] = [list(map(Value, row)) for row in rows]
    return state_dict


def attention(qkv, n_head, keys, values):  # (T, 3C) -> (T, C)
    """Causal multi-head attention, softmax(q @ k.T / sqrt(D)) @ v (Vaswani et al. 2017, eq. 1).

    keys, values   KV cache of this layer, (S - T, C); extended in place to (S, C)
    """
    C = len(qkv[0]) // 3
    D = C // n_head
    keys += [row[C : 2 * C] for row in qkv]  # (S, C)
    values += [row[2 * C :] for row in qkv]  # (S, C)
    heads = []
    for d in range(0, C, D):
        q, k, v = ([row[d : d + D] for row in rows] for rows in (qkv, keys, values))  # (T or S, D)
        scores = causal_mask(linear(q, k))  # (T, S), linear(q, k) is q @ k.T
        heads.append(matmul(softmax(scores, scale=D**-0.5), v))  # (T, D)
    return [list(chain(*rows)) for rows in zip(*heads)]  # (T, C)


def gpt(ids, state_dict, config, kv_cache=None):  # (T,) -> (T, V)
    """Logits of the next token at every position: GPT-2's decoder.

    Each operation handles all T positions at once (sequence parallelism). With `kv_cache`, a dict
    that is empty at first, the ids continue those of earlier calls, whose keys and values it holds.
    """

    def p(name):
        return state_dict[f"{name}.weight"], state_dict[f"{name}.bias"]

    kv_cache = {} if kv_cache is None else kv_cache
    start = len(kv_cache[0][0]) if kv_cache else 0
    wte, wpe = state_dict["wte.weight"], state_dict["wpe.weight"]
    x = add([wte[i] for i in ids], wpe[start : start + len(ids)])  # (T, C)
    for n in range(config.n_layer):
        keys, values = kv_cache.setdefault(n, ([], []))
        qkv = linear(layer_norm(x, *p(f"h.{n}.ln_1")), *p(f"h.{n}.attn.c_attn"))  # (T, 3C)
        y = attention(qkv, config.n_head, keys, values)  # (T, C)
        x = add(x, linear(y, *p(f"h.{n}.attn.c_proj")))
        hidden = gelu(linear(layer_norm(x, *p(f"h.{n}.ln_2")), *p(f"h.{n}.mlp.c_fc")))  # (T, 4C)
        x = add(x, linear(hidden, *p(f"h.{n}.mlp.c_proj")))  # (T, C)
    return linear(layer_norm(x, *p("ln_f")), wte)  # (T, V), the head is tied to the embedding


# ---- optimizer -----------------------------------------------------------------------------------


class Adam:
    """Adam (Kingma and Ba 2015, algorithm 1)."""

    def __init__(self, parameters, beta1=0.85, beta2=0.99, eps=1e-8):
        self.parameters, self.beta1, self.beta2, self.eps = parameters, beta1, beta2, eps
        self.t = 0  # updates so far
        self.m = [0.0] * len(parameters)  # first moment: moving average of the gradient
        self.v = [0.0] * len(parameters)  # second moment: moving average of its square

    def step(self, lr):
        """Update the parameters with learning rate `lr`, then zero their grads."""
        self.t += 1
        b1, b2, sqrt = self.beta1, self.beta2, math.sqrt
        grads = [p.grad for p in self.parameters]
        self.m = [b1 * m + (1 - b1) * g for m, g in zip(self.m, grads)]
        self.v = [b2 * v + (1 - b2) * g * g for v, g in zip(self.v, grads)]
        # The bias correction is the same for all parameters: move it into lr and eps (section 2).
        correction = sqrt(1 - b2**self.t)
        lr, eps = lr * correction / (1 - b1**self.t), self.eps * correction
        for p, m, v in zip(self.parameters, self.m, self.v):
            p.data -= lr * m / (sqrt(v) + eps)
            p.grad = 0.0


# ---- tokenizer -----------------------------------------------------------------------------------

UNKNOWN = "\ufffd"  # id 0 stands for characters that the training text lacks; never sampled


def build_vocab(text):
    """The sorted characters of `text` after UNKNOWN; characters[i] has id i."""
    return UNKNOWN + "".join(sorted({*text} - {UNKNOWN}))


def encode(text, characters):
    ids = {c: i for i, c in enumerate(characters)}
    return [ids.get(c, 0) for c in text]


# ---- model file ----------------------------------------------------------------------------------
# safetensors: 8 bytes with the length of a JSON header, the header, the tensors in little-endian.


def save_model(path, config, state_dict, metadata):
    """Write a model file; an existing one is replaced only when the new one is complete."""
    fields = {name: json.dumps(value) for name, value in metadata.items()}
    header, content = {"__metadata__": {"format": "pt", "format_version": "1"} | fields}, b""
    for name, shape in parameter_shapes(config).items():
        floats, start = list(chain(*detach(state_dict[name]))), len(content)
        content += struct.pack(f"<{len(floats)}f", *floats)
        header[name] = dict(dtype="F32", shape=shape, data_offsets=(start, len(content)))
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # aligns the tensors
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(struct.pack("<Q", len(text)) + text + content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_model(file, size):
    """(config, characters, state_dict) in a file of `size` bytes, which may hold anything."""
    n = int.from_bytes(file.read(8), "little")
    require(n <= min(size - 8, 10**8), "header longer than the file")
    header = json.loads(file.read(n))
    metadata = header.pop("__metadata__", {})
    require(metadata.get("format_version") == "1", "format_version is not 1")
    config, characters = (json.loads(metadata[name]) for name in ("config", "characters"))
    config = GPTConfig(**config)
    require(isinstance(characters, str) and characters[0] == UNKNOWN, "characters[0] is not U+FFFD")
    require(len({*characters}) == len(characters) == config.vocab_size, "not vocab_size characters")
    require(len(header) == 4 + 12 * config.n_layer, "not the tensors of its config")
    shapes, state_dict, end = parameter_shapes(config), {}, 0
    require(size == 8 + n + 4 * sum(map(math.prod, shapes.values())), "not of the right size")
    for name in sorted(shapes, key=lambda name: header[name]["data_offsets"]):
        shape, start, end = shapes[name], end, end + 4 * math.prod(shapes[name])
        entry = dict(dtype="F32", shape=[*shape], data_offsets=[start, end])
        require(header[name] == entry, f"{name} is not {entry}")
        floats = struct.unpack(f"<{(end - start) // 4}f", file.read(end - start))
        require(all(abs(x) < 1e3 for x in floats), f"{name} is not finite, or absurdly large")
        rows = range(0, len(floats), shape[-1])
        state_dict[name] = [[*floats[i : i + shape[-1]]] for i in rows]
    return config, characters, state_dict


def load_model(path):
    """(config, characters, state_dict) of a model file.  raises: ValueError if it is damaged"""
    try:
        with open(path, "rb") as file:
            return read_model(file, os.fstat(file.fileno()).st_size)
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(f"{path}: not a whole model of Anexa ({reason}); get it again") from None


# ---- training ------------------------------------------------------------------------------------


def loss_at(i, ids, state_dict, config):
    """Cross-entropy on the window of block_size tokens that starts at `i`."""
    x, y = ids[i : i + config.block_size], ids[i + 1 : i + config.block_size + 1]  # (T,), (T,)
    return cross_entropy(gpt(x, state_dict, config), y)


def estimate_loss(ids, state_dict, config, windows=40):
    """Mean cross-entropy over evenly spaced windows of `ids`, without a graph."""
    floats = {name: detach(matrix) for name, matrix in state_dict.items()}
    starts = range(0, len(ids) - config.block_size, max(1, len(ids) // windows))
    return sum(loss_at(i, ids, floats, config) for i in starts) / len(starts)


def train(ids, config, max_steps, learning_rate, seed):
    """State dict and loss history (rows of step, training loss, validation loss).

    Each step is one window out of the first 90% of `ids`; the rest is for validation.
    """
    rng, n, history, losses = random.Random(seed), len(ids) * 9 // 10, [], []
    state_dict = init_weights(config, rng)
    optimizer = Adam([v for matrix in state_dict.values() for row in matrix for v in row])
    for step in range(1, max_steps + 1):
        loss = loss_at(rng.randrange(n - config.block_size), ids, state_dict, config)
        loss.backward()
        optimizer.step(learning_rate * (1 - (step - 1) / max_steps))  # linear decay to zero
        losses.append(loss.data)
        too_high = f"--learning-rate {learning_rate}: loss {loss.data}, lower it"
        require(math.isfinite(loss.data), too_high)
        if step % -(-max_steps // 10) == 0 or step == max_steps:
            mean, val_loss = sum(losses) / len(losses), estimate_loss(ids[n:], state_dict, config)
            log(f"step {step:,}/{max_steps:,}: loss {mean:.4f}, validation loss {val_loss:.4f}")
            history.append([step, mean, val_loss])
            losses.clear()
    return state_dict, history


# ---- generation ----------------------------------------------------------------------------------


def sample(logits, temperature, rng):
    """A token id from softmax(logits / temperature), at 0 the argmax; id 0 is never sampled."""
    ids, top = range(1, len(logits)), max(logits[1:])
    if temperature == 0:
        return logits.index(top, 1)
    probs = softmax([[(logits[i] - top) / temperature for i in ids]])
    return rng.choices(ids, *probs)[0]


def generate_ids(ids, state_dict, config, temperature, rng):
    """Endless continuation of `ids` (at least one), token by token, with a KV cache.

    Positions are absolute, so a full context cannot slide by one token: half of it is dropped and
    the rest goes through the network again.
    """
    T, context, kv_cache = config.block_size, [], {}
    while True:
        context = context + ids
        if len(context) > T:
            half = max(1, T // 2)
            context = context[-((T - len(context)) // half) * half :]  # without its first halves
            ids, kv_cache = context, {}
        logits = gpt(ids, state_dict, config, kv_cache)[-1]  # (V,)
        ids = [sample(logits, temperature, rng)]
        yield ids[0]


# ---- command line --------------------------------------------------------------------------------


def escape_control(text):
    """`text` with control and other invisible characters as escapes such as \\x1b."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def log(text="", end="\n"):
    """Print to standard error: standard output is for generated text."""
    print(escape_control(text), end=end, file=sys.stderr, flush=True)


def chat(config, characters, state_dict, temperature, max_new):
    """Continue prompts from standard input until `quit`, `exit` or its end."""
    show = escape_control if sys.stdout.isatty() else str  # the text could control a terminal
    log("\n--- Interactive Generation ---\nEnter a prompt to continue (or 'quit' to exit)")
    while line := log("Prompt: ", end="") or sys.stdin.readline():
        line = line.rstrip("\r\n")
        if line.strip() in ("quit", "exit"):
            return
        prompt = "".join(c for c in line if c in characters[1:])
        if prompt != line:
            log("(left out the characters that the model does not know)")
        if not prompt:
            continue
        log("Response: ", end="")
        print(show(prompt), end="", flush=True)
        ids = generate_ids(encode(prompt, characters), state_dict, config, temperature, random)
        with suppress(KeyboardInterrupt):  # stops this response, not the program
            for i in islice(ids, max_new):
                print(show(characters[i]), end="", flush=True)
        print(flush=True)
    log()


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}; see --help\n")
    option = parser.add_argument
    option("--model", type=Path, help="model file to prompt, instead of training")
    option("--data", type=Path, default=Path(__file__), help="UTF-8 text to train on")
    option("--out", type=Path, default=Path("old_model.safetensors"), help="file for the new model")
    option("--block-size", type=int, default=32, help="context length in characters (T)")
    option("--n-layer", type=int, default=1, help="transformer blocks")
    option("--n-head", type=int, default=4, help="attention heads (H)")
    option("--n-embd", type=int, default=24, help="channels (C), a multiple of --n-head")
    option("--max-steps", type=int, default=4_000, help="optimizer steps")
    option("--learning-rate", type=float, default=0.008, help="at the first step")
    option("--seed", type=int, default=1337, help="of the initial weights and the batches")
    option("--temperature", type=float, default=0.7, help="of sampling; 0 takes the argmax")
    option("--max-new", type=int, default=300, help="characters per response")
    args = parser.parse_args(argv)
    if args.max_steps < 1 or args.max_new < 0 or not args.temperature >= 0:
        parser.error("--max-steps must be 1 or more, --max-new and --temperature 0 or more")
    return args


def train_and_save(args):
    """Train on --data and write the model to --out."""
    name, text = args.data.name, args.data.read_text(encoding="utf-8-sig")
    characters = build_vocab(text)
    config = GPTConfig(len(characters), args.block_size, args.n_layer, args.n_head, args.n_embd)
    enough = len(text) >= 20 * config.block_size  # a window has to fit into the last tenth
    require(enough, f"--data {name}: {len(text)} characters, fewer than 20 * --block-size")
    tempfile.TemporaryFile(dir=args.out.parent).close()  # if this fails, so would saving
    log(f"{name}: {len(text):,} characters, {config}")
    training = dict(max_steps=args.max_steps, learning_rate=args.learning_rate, seed=args.seed)
    state_dict, history = train(encode(text, characters), config, **training)
    log("Training finished...")
    data = dict(name=name, sha256=hashlib.sha256(text.encode()).hexdigest(), characters=len(text))
    metadata = dict(config=asdict(config), characters=characters, data=data, training=training)
    metadata |= dict(step=args.max_steps, validation_loss=history[-1][2], history=history)
    save_model(args.out, config, state_dict, metadata)
    log(f"Model saved to {args.out}")


def main(argv):
    """Exit status: 0, 2 after an error that the user can fix, 130 after Ctrl-C."""
    args = parse_args(argv)
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")
    gc.disable()  # backward() leaves no reference cycles
    try:
        if args.model is None:
            train_and_save(args)
        config, characters, state_dict = load_model(args.model or args.out)
        log(f"{args.model or args.out}: {config}")
        chat(config, characters, state_dict, args.temperature, args.max_new)
        return 0
    except BrokenPipeError:
        os._exit(0)  # the reader of standard output is gone, as after `| head`: nothing to flush
    except (OSError, ValueError) as error:
        log(f"{Path(__file__).name}: {error}")
        return 2
    except KeyboardInterrupt:
        log()
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
