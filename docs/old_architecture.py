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
from dataclasses import dataclass
from itertools import chain, islice, repeat
from operator import attrgetter, mul
from pathlib import Path

# ---- autograd ------------------------------------------------------------------------------------


class Value:
    """A scalar that records how it was computed."""

    __slots__ = ("data", "grad", "grad_fn")

    def __init__(self, data, grad_fn=None):
        self.data = data  # the number
        self.grad = 0.0  # d(loss) / d(data), accumulated by loss.backward()
        self.grad_fn = grad_fn  # the Function that computed it from its children; None for a leaf

    # fmt: off
    def __add__(self, other): return scalar(lambda a, b: (a + b, 1.0, 1.0), self, other)
    def __mul__(self, other): return scalar(lambda a, b: (a * b, b, a), self, other)
    def __pow__(self, n): return scalar(lambda a: (a**n, n * a ** (n - 1)), self)
    def exp(self): return scalar(lambda a: (math.exp(a), math.exp(a)), self)
    def log(self): return scalar(lambda a: (math.log(a), 1 / a), self)
    def __neg__(self): return self * -1.0
    def __sub__(self, other): return self + -other
    def __rsub__(self, other): return -self + other
    def __truediv__(self, other): return self * other**-1
    def __rtruediv__(self, other): return self**-1 * other
    def __repr__(self): return f"Value(data={self.data:.6g}, grad={self.grad:.6g})"
    __radd__, __rmul__ = __add__, __mul__
    # fmt: on

    @property
    def children(self):
        return self.grad_fn.children if self.grad_fn else ()

    def backward(self):
        """Add d(self) / d(v) to v.grad for every Value v that self depends on; free the graph."""
        order = {}  # of Functions, each after those that computed its inputs
        stack = [self.grad_fn] if self.grad_fn else []
        while stack:  # depth-first search; recursion would fail on a long graph
            waiting = [fn for fn in stack[-1].next_functions if fn and fn not in order]
            stack += waiting
            if not waiting:
                order[stack.pop()] = None
        self.grad += 1.0
        for fn in reversed(order):  # by then the grads of its outputs are complete
            grads = fn.backward([[value.grad for value in row] for row in fn.outputs])
            for child, grad in zip(fn.children, flatten(flatten(grads))):
                child.grad += grad
            fn.outputs = None  # ends the reference cycle outputs -> Value -> grad_fn -> outputs


class Function:
    """One operation of the graph, shared by all entries of the matrix that it computed."""

    def __init__(self, rows, inputs, backward):
        self.children = list(flatten(flatten(map(attach, inputs))))
        self.next_functions = dict.fromkeys(map(attrgetter("grad_fn"), self.children))
        self.outputs = attach(rows, self)
        self.backward = backward  # d(loss) / d(outputs) -> d(loss) / d(matrix) for each input


def record(rows, inputs, backward):
    """`rows` as Values computed from `inputs`, matrices; as they are if no input has Values."""
    has_values = any(isinstance(matrix[0][0], Value) for matrix in inputs)
    return Function(rows, inputs, backward).outputs if has_values else rows


def scalar(f, *operands):
    """Value of an operation on scalars; f returns its result and the derivative by each operand."""
    operands = [v if isinstance(v, Value) else Value(v) for v in operands]
    data, *derivatives = f(*[v.data for v in operands])
    return record([[data]], [[operands]], lambda grads: [matmul(grads, [derivatives])])[0][0]


def attach(matrix, grad_fn=None):
    """A matrix of floats as Values computed by `grad_fn`; a matrix of Values as it is."""
    if isinstance(matrix[0][0], Value):
        return matrix
    return [list(map(Value, row, repeat(grad_fn))) for row in matrix]


def detach(matrix):
    """The floats of a matrix of Values, without the graph; a matrix of floats as it is."""
    return [[v.data for v in row] for row in matrix] if isinstance(matrix[0][0], Value) else matrix


# ---- matrices ------------------------------------------------------------------------------------
# Forward and backward of an operation work on floats, with inner loops in C; a dot product of K
# numbers is one Value, not 2K - 1. math.sumprod is new in Python 3.12.

dot = getattr(math, "sumprod", lambda a, b: sum(map(mul, a, b)))
flatten = chain.from_iterable


def transpose(matrix):  # (N, M) -> (M, N)
    return list(map(list, zip(*matrix)))


def linear(x, weight, bias=None):  # (N, K), (M, K), (1, M) -> (N, M)
    """x @ weight.T + bias."""
    a, w = detach(x), detach(weight)
    y = [list(map(dot, repeat(row), w)) for row in a]
    if bias:
        y = [[v + b for v, b in zip(row, *detach(bias))] for row in y]

    def backward(grads):  # the last is for the bias, if any
        return matmul(grads, w), matmul(transpose(grads), a), [map(sum, zip(*grads))]

    return record(y, [x, weight, bias] if bias else [x, weight], backward)


def matmul(a, b):  # (N, K), (K, M) -> (N, M)
    return linear(a, transpose(b))


def add(a, b):  # (N, M), (N, M) -> (N, M)
    y = [[u + v for u, v in zip(*rows)] for rows in zip(detach(a), detach(b))]
    return record(y, [a, b], lambda grads: (grads, grads))


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
        rows = zip(y, grads, map(dot, y, grads))
        return [[[scale * pi * (gi - d) for pi, gi in zip(p, g)] for p, g, d in rows]]

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
        x_grads, weight_grads = [], []  # (N, C), (N, C)
        for n, rstd, g in zip(normed, rstds, grads):
            gw = list(map(mul, g, w))
            mean, slope = sum(gw) / len(gw), dot(gw, n) / len(gw)
            x_grads.append([rstd * (gi - mean - ni * slope) for gi, ni in zip(gw, n)])
            weight_grads.append(map(mul, g, n))
        return x_grads, weight_grads, [map(sum, zip(*grads))]

    y = [[ni * wi + bi for ni, wi, bi in zip(n, w, b)] for n in normed]
    return record(y, [x, weight * len(x), bias], backward)  # the weight is used once a row


def gelu(x):  # (N, M) -> (N, M)
    """GELU in the tanh approximation of GPT-2 (Hendrycks and Gimpel 2016, section 2)."""
    a, k, c = detach(x), math.sqrt(2 / math.pi), 0.044715
    tanhs = [[math.tanh(k * (v + c * v * v * v)) for v in row] for row in a]
    y = [[0.5 * v * (1 + t) for v, t in zip(*rows)] for rows in zip(a, tanhs)]

    def derivative(v, t):
        return 0.5 * (1 + t) + 0.5 * v * (1 - t * t) * k * (1 + 3 * c * v * v)

    def backward(grads):
        return [[map(mul, g, map(derivative, *rows)) for g, *rows in zip(grads, a, tanhs)]]

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
        return [[[v * grads[0][0] / T for v in row] for row in rows]]

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
    dropout: float = 0.0  # for training with anexagpt.py; unused here

    def __post_init__(self):
        sizes = [self.vocab_size, self.block_size, self.n_layer, self.n_head, self.n_embd]
        valid = all(type(n) is int and 0 < n <= 65_536 for n in sizes)
        require(valid, f"sizes must be integers from 1 to 65,536: {self}")
        require(self.n_embd % self.n_head == 0, f"n_embd must be a multiple of n_head: {self}")


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
    """State dict, name -> matrix of Values; a vector is a matrix of one row."""
    state_dict = {}  # normal; biases and c_proj are 0, so that every block starts as the identity
    for name, shape in parameter_shapes(config).items():
        std = config.n_embd**-0.5 if len(shape) == 2 and "c_proj" not in name else 0.0
        mean = 1.0 if "ln_" in name and "weight" in name else 0.0
        rows = range(math.prod(shape[:-1]))
        state_dict[name] = [[Value(rng.gauss(mean, std)) for _ in range(shape[-1])] for _ in rows]
    return state_dict


def attention(qkv, n_head, keys, values):  # (T, 3C) -> (T, C)
    """Causal multi-head attention, softmax(q @ k.T / sqrt(D)) @ v (Vaswani et al. 2017, eq. 1)."""
    C = len(qkv[0]) // 3
    D = C // n_head
    keys += [row[C : 2 * C] for row in qkv]  # (S, C), the KV cache of this layer, kept in place
    values += [row[2 * C :] for row in qkv]  # (S, C)
    heads = []
    for d in range(0, C, D):
        q, k, v = ([row[d : d + D] for row in rows] for rows in (qkv, keys, values))  # (T or S, D)
        scores = causal_mask(linear(q, k))  # (T, S), linear(q, k) is q @ k.T
        heads.append(matmul(softmax(scores, scale=D**-0.5), v))  # (T, D)
    return [list(flatten(rows)) for rows in zip(*heads)]  # (T, C)


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
        qkv = linear(layer_norm(x, *p(f"h.{n}.ln_1")), *p(f"h.{n}.attn.c_attn"))  # (T, 3C)
        y = attention(qkv, config.n_head, *kv_cache.setdefault(n, ([], [])))  # (T, C)
        x = add(x, linear(y, *p(f"h.{n}.attn.c_proj")))
        hidden = gelu(linear(layer_norm(x, *p(f"h.{n}.ln_2")), *p(f"h.{n}.mlp.c_fc")))  # (T, 4C)
        x = add(x, linear(hidden, *p(f"h.{n}.mlp.c_proj")))  # (T, C)
    return linear(layer_norm(x, *p("ln_f")), wte)  # (T, V), the head is tied to the embedding


# ---- training and generation ---------------------------------------------------------------------


class Adam:
    """Adam (Kingma and Ba 2015, algorithm 1)."""

    def __init__(self, parameters, beta1=0.85, beta2=0.99, eps=1e-8):
        self.parameters, self.beta1, self.beta2, self.eps = parameters, beta1, beta2, eps
        self.t = 0  # updates so far
        self.m = self.v = [0.0] * len(parameters)  # moving averages of the gradient and its square

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


def build_vocab(text):
    """U+FFFD, for unknown characters, and the sorted characters of `text`; an index is an id."""
    return "\ufffd" + "".join(sorted({*text} - {"\ufffd"}))


def encode(text, characters):
    return [max(0, characters.find(c)) for c in text]


def mean_loss(starts, ids, state_dict, config):
    """Mean cross-entropy over the windows of `ids` that start at `starts`."""
    T, losses = config.block_size, []
    for i in starts:
        logits = gpt(ids[i : i + T], state_dict, config)  # (T, V)
        losses.append(cross_entropy(logits, ids[i + 1 : i + T + 1]))
    return sum(losses) / len(losses)


def train(args):
    """Train on the text --data and write the model to --out."""
    name, text, T = args.data.name, args.data.read_text(encoding="utf-8-sig"), args.block_size
    characters = build_vocab(text)
    config = GPTConfig(len(characters), T, args.n_layer, args.n_head, args.n_embd)
    n = len(text) * 9 // 10  # tokens for training; the rest is for validation, in 40 windows
    val_starts = range(n, len(text) - T, max(1, (len(text) - n) // 40))
    require(val_starts, f"{name}: {len(text)} characters; --block-size {T} needs over {10 * T}")
    tempfile.TemporaryFile(dir=args.out.parent).close()  # if this fails, so would saving
    log(f"{name}: {len(text):,} characters, {config}")
    ids, rng = encode(text, characters), random.Random(args.seed)
    lr, max_steps = args.learning_rate, args.max_steps
    state_dict, history, losses = init_weights(config, rng), [], []
    optimizer = Adam([value for matrix in state_dict.values() for value in flatten(matrix)])
    for step in range(1, max_steps + 1):
        loss = mean_loss([rng.randrange(n - T)], ids, state_dict, config)
        loss.backward()
        optimizer.step(lr * (1 - (step - 1) / max_steps))  # linear decay to zero
        losses.append(loss.data)
        require(math.isfinite(loss.data), f"--learning-rate {lr}: loss {loss.data}, lower it")
        if step % -(-max_steps // 10) == 0 or step == max_steps:  # ten times
            floats = {key: detach(matrix) for key, matrix in state_dict.items()}
            mean, val_loss = sum(losses) / len(losses), mean_loss(val_starts, ids, floats, config)
            log(f"step {step:,}/{max_steps:,}: loss {mean:.4f}, validation loss {val_loss:.4f}")
            history.append([step, mean, val_loss])
            losses.clear()
    log("Training finished...")
    data = dict(name=name, sha256=hashlib.sha256(text.encode()).hexdigest(), characters=len(text))
    training = dict(max_steps=max_steps, learning_rate=lr, seed=args.seed)
    metadata = dict(config=vars(config), characters=characters, data=data, training=training)
    metadata |= dict(step=max_steps, validation_loss=val_loss, history=history)
    save_model(args.out, config, state_dict, metadata)
    log(f"Model saved to {args.out}")


def sample(logits, temperature, rng):
    """A token id from softmax(logits / temperature), at 0 the argmax; id 0 is never sampled."""
    if temperature == 0:
        return logits.index(max(logits[1:]), 1)
    (probs,) = softmax([logits[1:]], scale=1 / temperature)
    return rng.choices(range(1, len(logits)), probs)[0]


def generate_ids(ids, state_dict, config, temperature, rng):
    """Endless continuation of `ids` (at least one), token by token, with a KV cache."""
    T, context, kv_cache = config.block_size, [], {}
    while True:
        context += ids
        while len(context) > T:  # drop half: sliding by one token would change every position
            context = ids = context[max(1, T // 2) :]
            kv_cache = {}
        logits = gpt(ids, state_dict, config, kv_cache)[-1]  # (V,)
        ids = [sample(logits, temperature, rng)]
        yield ids[0]


# ---- model file ----------------------------------------------------------------------------------
# safetensors: 8 bytes with the length of a JSON header, the header, the tensors in little-endian.


def tensor_entries(config, names):
    """Header entries of the parameters, in a file that holds them in the order of `names`."""
    shapes, entries, end = parameter_shapes(config), {}, 0
    for name in names:
        start, end = end, end + 4 * math.prod(shapes[name])
        entries[name] = dict(dtype="F32", shape=[*shapes[name]], data_offsets=[start, end])
    return entries


def save_model(path, config, state_dict, metadata):
    """Write a model file; an existing one is replaced only when the new one is complete."""
    fields = {name: json.dumps(value) for name, value in metadata.items()}
    header = {"__metadata__": {"format": "pt", "format_version": "1"} | fields}
    text = json.dumps(header | tensor_entries(config, state_dict)).encode()
    text += b" " * (-len(text) % 8)  # aligns the tensors
    rows = flatten(map(detach, state_dict.values()))
    tensors = [struct.pack(f"<{len(row)}f", *row) for row in rows]
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(b"".join([len(text).to_bytes(8, "little"), text, *tensors]))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_model(path):
    """(config, characters, state_dict) of a model file.  raises: ValueError if it is damaged"""
    try:
        with open(path, "rb") as file:
            n, state_dict = int.from_bytes(file.read(8), "little"), {}
            require(n < 10**8, "not a safetensors file")
            header = json.loads(file.read(n))
            metadata = header.pop("__metadata__")
            require(metadata["format_version"] == "1", "format_version is not 1")
            config = GPTConfig(**json.loads(metadata["config"]))
            characters = json.loads(metadata["characters"])
            valid = characters == build_vocab(characters) and len(characters) == config.vocab_size
            require(valid, "its characters are not U+FFFD and others in order")
            names = sorted(parameter_shapes(config), key=lambda name: header[name]["data_offsets"])
            require(header == tensor_entries(config, names), "not the tensors of its config")
            end = header[names[-1]]["data_offsets"][1]
            numbers = struct.unpack(f"<{end // 4}f", file.read())
            require(all(abs(x) < 1e3 for x in numbers), "weights not finite, or absurdly large")
            for name in names:
                (start, end), width = header[name]["data_offsets"], header[name]["shape"][-1]
                rows = range(start // 4, end // 4, width)
                state_dict[name] = [[*numbers[i : i + width]] for i in rows]
            return config, characters, state_dict
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError, struct.error) as e:
        reason = " ".join(f"{type(e).__name__}: {e}".split())[:200]
        raise ValueError(f"{path}: not a whole model of Anexa ({reason}); get it again") from None


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
        ids = generate_ids(encode(prompt, characters), state_dict, config, temperature, random)
        log("Response: ", end="")
        with suppress(KeyboardInterrupt):  # stops this response, not the program
            for c in chain(prompt, (characters[i] for i in islice(ids, max_new))):
                print(show(c), end="", flush=True)
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
    return parser.parse_args(argv)


def main(argv):
    """Exit status: 0, 2 after an error that the user can fix, 130 after Ctrl-C."""
    args = parse_args(argv)
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")
    gc.disable()  # backward() leaves no reference cycles
    try:
        valid = args.max_steps >= 1 and args.max_new >= 0 and args.temperature >= 0
        require(valid, "--max-steps must be 1 or more, --max-new and --temperature 0 or more")
        if args.model is None:
            train(args)
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
