# ruff: noqa: B905 (zip without strict=: rows of a matrix have equal lengths)
"""The GPT of anexagpt.py in pure Python: scalar autograd, matrices as lists, no dependencies.

    python docs/old_architecture.py                              train on this file, then prompt
    python docs/old_architecture.py --model model.safetensors    prompt a model from anexagpt.py

A matrix is a list of rows; a vector is a matrix with one row. The entries are Values, which record
the computation graph for backpropagation, or floats, for inference. Every function accepts both.

Shapes: T tokens in this forward pass, S tokens including the KV cache, C n_embd, H n_head,
D = C / H, V vocab_size; N, M, K any size. old_architecture.md explains the file step by step.
"""

import argparse
import gc
import hashlib
import io
import json
import math
import operator
import os
import random
import secrets
import struct
import sys
import tempfile
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

# ---- autograd ------------------------------------------------------------------------------------


class Value:
    """A scalar that records how it was computed."""

    __slots__ = ("data", "grad", "grad_fn")

    def __init__(self, data, grad_fn=None):
        self.data = data  # the number
        self.grad = 0.0  # d(loss) / d(data), accumulated by loss.backward()
        self.grad_fn = grad_fn  # the Function that computed it from its children; None for a leaf

    def __add__(self, other):
        other = as_value(other)
        return scalar(self.data + other.data, [self, other], [1.0, 1.0])

    def __mul__(self, other):
        other = as_value(other)
        return scalar(self.data * other.data, [self, other], [other.data, self.data])

    def __pow__(self, n):
        return scalar(self.data**n, [self], [n * self.data ** (n - 1)])

    def exp(self):
        y = math.exp(self.data)
        return scalar(y, [self], [y])

    def log(self):
        return scalar(math.log(self.data), [self], [1 / self.data])

    def tanh(self):
        y = math.tanh(self.data)
        return scalar(y, [self], [1 - y * y])

    # fmt: off
    def __neg__(self): return self * -1.0
    def __sub__(self, other): return self + -other
    def __rsub__(self, other): return -self + other
    def __truediv__(self, other): return self * other**-1
    def __rtruediv__(self, other): return self**-1 * other
    def __repr__(self): return f"Value(data={self.data:.6g}, grad={self.grad:.6g})"
    __radd__ = __add__
    __rmul__ = __mul__
    # fmt: on

    @property
    def children(self):
        if self.grad_fn is None:
            return ()
        return self.grad_fn.children

    def backward(self):
        """Add d(self) / d(v) to v.grad for every Value v that self depends on; free the graph."""
        self.grad += 1.0
        if self.grad_fn is None:
            return
        for function in reversed(topological_order(self.grad_fn)):
            # Every operation that uses its outputs was visited before: their grads are complete.
            grads = function.backward([[value.grad for value in row] for row in function.outputs])
            for child, grad in zip(function.children, flatten(flatten(grads))):
                child.grad += grad
            function.outputs = None  # breaks the cycle outputs -> Value -> grad_fn -> outputs


class Function:
    """One operation of the graph, shared by all entries of the matrix that it computed."""

    def __init__(self, rows, inputs, backward):
        self.children = list(flatten(flatten(map(attach, inputs))))
        # A dict serves as an ordered set: a fixed order keeps the results bit-equal.
        self.next_functions = dict.fromkeys(c.grad_fn for c in self.children if c.grad_fn)
        self.outputs = attach(rows, self)
        self.backward = backward  # d(loss) / d(outputs) -> d(loss) / d(matrix) for each input


def topological_order(root):
    """The Functions that `root` depends on, each after those that computed its inputs."""
    order = {}  # an ordered set: only the keys are used
    stack = [root]
    while stack:  # depth-first search; recursion would fail on a long graph
        pending = [function for function in stack[-1].next_functions if function not in order]
        if pending:
            stack += pending
        else:
            order[stack.pop()] = None
    return order


def record(rows, inputs, backward):
    """`rows` as Values computed from the matrices `inputs`; as floats if no input has Values."""
    if any(map(has_values, inputs)):
        return Function(rows, inputs, backward).outputs
    return rows


def scalar(data, children, local_grads):
    """A Value computed from scalars; local_grads[i] is d(data) / d(children[i])."""

    def backward(grads):  # (1, 1)
        ((grad,),) = grads
        return [[[grad * local_grad for local_grad in local_grads]]]

    return record([[data]], [[children]], backward)[0][0]


def as_value(x):
    if isinstance(x, Value):
        return x
    return Value(x)


def has_values(matrix):
    return isinstance(matrix[0][0], Value)


def attach(matrix, grad_fn=None):
    """A matrix of floats as Values computed by `grad_fn`; a matrix of Values as it is."""
    if has_values(matrix):
        return matrix
    return [[Value(x, grad_fn) for x in row] for row in matrix]


def detach(matrix):
    """The floats of a matrix of Values, without the graph; a matrix of floats as it is."""
    if has_values(matrix):
        return [[value.data for value in row] for row in matrix]
    return matrix


# ---- matrices ------------------------------------------------------------------------------------
# The forward and backward passes of an operation compute on floats, with inner loops in C. A dot
# product of K numbers creates one Value, not 2K - 1.

flatten = chain.from_iterable


def dot(a, b):
    return sum(map(operator.mul, a, b))


if sys.version_info >= (3, 12):
    dot = math.sumprod  # written in C, and more accurate


def elementwise(function, *matrices):  # one or more (N, M) -> (N, M)
    return [list(map(function, *rows)) for rows in zip(*matrices)]


def transpose(matrix):  # (N, M) -> (M, N)
    return [list(column) for column in zip(*matrix)]


def column_sums(matrix):  # (N, M) -> (1, M)
    return [[sum(column) for column in zip(*matrix)]]


def linear(x, weight, bias=None):  # (N, K), (M, K), (1, M) -> (N, M)
    """x @ weight.T + bias."""
    a = detach(x)
    w = detach(weight)
    y = [[dot(row, w_row) for w_row in w] for row in a]
    inputs = [x, weight]
    if bias:
        (b,) = detach(bias)
        y = [list(map(operator.add, row, b)) for row in y]
        inputs.append(bias)

    def backward(grads):  # (N, M)
        input_grads = [matmul(grads, w), matmul(transpose(grads), a)]
        if bias:
            input_grads.append(column_sums(grads))
        return input_grads

    return record(y, inputs, backward)


def matmul(a, b):  # (N, K), (K, M) -> (N, M)
    return linear(a, transpose(b))


def add(a, b):  # (N, M), (N, M) -> (N, M)
    def backward(grads):
        return [grads, grads]

    return record(elementwise(operator.add, detach(a), detach(b)), [a, b], backward)


def causal_mask(scores):  # (T, S) -> (T, S)
    """Attention scores with -inf where the key's position is after the query's."""
    T = len(scores)
    S = len(scores[0])
    masked = -math.inf
    if has_values(scores):
        masked = Value(masked)
    rows = []
    for t, row in enumerate(scores):
        visible = S - T + t + 1  # query t is the token at position S - T + t
        rows.append(row[:visible] + [masked] * (S - visible))
    return rows


def softmax(x, scale=1.0):  # (N, M) -> (N, M)
    """exp(scale * x) / its row sum. Subtracting the row's maximum keeps exp from overflowing."""
    y = []
    for row in detach(x):
        top = max(row)
        exps = [math.exp(scale * (v - top)) for v in row]
        total = sum(exps)
        y.append([e / total for e in exps])

    def backward(grads):
        x_grads = []
        for p, g in zip(y, grads):
            mean = dot(p, g)  # of the gradient, weighted by the probabilities
            x_grads.append([scale * pi * (gi - mean) for pi, gi in zip(p, g)])
        return [x_grads]

    return record(y, [x], backward)


def layer_norm(x, weight, bias):  # (N, C), (1, C), (1, C) -> (N, C)
    """Each row normalized to mean 0, variance 1, times weight, plus bias (Ba et al. 2016)."""
    (w,) = detach(weight)
    (b,) = detach(bias)
    normed = []  # (N, C)
    rstds = []  # (N,), 1 / standard deviation
    for row in detach(x):
        mean = sum(row) / len(row)
        centered = [v - mean for v in row]
        variance = dot(centered, centered) / len(row)
        rstd = (variance + 1e-5) ** -0.5
        rstds.append(rstd)
        normed.append([v * rstd for v in centered])
    y = [[ni * wi + bi for ni, wi, bi in zip(n, w, b)] for n in normed]

    def backward(grads):
        x_grads = []
        weight_grad = [0.0] * len(w)
        for n, rstd, g in zip(normed, rstds, grads):
            # Normalization removes the mean and the scale, so the gradient has neither component.
            n_grad = list(map(operator.mul, g, w))
            mean = sum(n_grad) / len(n)
            slope = dot(n_grad, n) / len(n)
            x_grads.append([rstd * (gi - mean - ni * slope) for gi, ni in zip(n_grad, n)])
            weight_grad = [total + gi * ni for total, gi, ni in zip(weight_grad, g, n)]
        return [x_grads, [weight_grad], column_sums(grads)]

    return record(y, [x, weight, bias], backward)


def gelu(x):  # (N, M) -> (N, M)
    """GELU in the tanh approximation of GPT-2 (Hendrycks and Gimpel 2016, section 2)."""
    a = detach(x)
    k = math.sqrt(2 / math.pi)
    c = 0.044715

    def tanh(v):
        return math.tanh(k * (v + c * v * v * v))

    def forward(v, t):
        return 0.5 * v * (1 + t)

    def derivative(v, t):
        return 0.5 * (1 + t) + 0.5 * v * (1 - t * t) * k * (1 + 3 * c * v * v)

    def backward(grads):
        return [elementwise(operator.mul, grads, elementwise(derivative, a, tanhs))]

    tanhs = elementwise(tanh, a)
    return record(elementwise(forward, a, tanhs), [x], backward)


def cross_entropy(logits, targets):  # (T, V), (T,) -> scalar
    """Mean of -log(softmax(logits)[target]), in nats, computed as log-sum-exp minus logit."""
    a = detach(logits)
    T = len(targets)
    loss = 0.0
    for row, target in zip(a, targets):
        top = max(row)
        log_sum_exp = math.log(sum(math.exp(v - top) for v in row)) + top
        loss += (log_sum_exp - row[target]) / T

    def backward(grads):  # (1, 1) -> (T, V): (softmax(logits) - one_hot(targets)) / T
        ((grad,),) = grads
        rows = softmax(a)
        for row, target in zip(rows, targets):
            row[target] -= 1.0
        return [[[v * grad / T for v in row] for row in rows]]

    return record([[loss]], [logits], backward)[0][0]


# ---- model ---------------------------------------------------------------------------------------


def require(condition, message):
    """Raise ValueError unless `condition`; the message is one line: value, rule, what to do."""
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True)
class GPTConfig:
    vocab_size: int
    block_size: int  # maximum context length
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float = 0.0  # used by anexagpt.py in training, not here

    def __post_init__(self):
        sizes = [self.vocab_size, self.block_size, self.n_layer, self.n_head, self.n_embd]
        valid = all(type(n) is int and 0 < n <= 65_536 for n in sizes)
        require(valid, f"sizes must be integers from 1 to 65,536: {self}")
        require(self.n_embd % self.n_head == 0, f"n_embd must be a multiple of n_head: {self}")


def parameter_shapes(config):
    """Name -> shape of each parameter: GPT-2's names, (out_features, in_features) as in PyTorch."""
    C = config.n_embd
    block = {
        "ln_1": (C,),
        "attn.c_attn": (3 * C, C),
        "attn.c_proj": (C, C),
        "ln_2": (C,),
        "mlp.c_fc": (4 * C, C),
        "mlp.c_proj": (C, 4 * C),
    }
    shapes = {"wte.weight": (config.vocab_size, C), "wpe.weight": (config.block_size, C)}
    shapes |= {"ln_f.weight": (C,), "ln_f.bias": (C,)}
    for layer in range(config.n_layer):
        for name, shape in block.items():
            shapes[f"h.{layer}.{name}.weight"] = shape
        for name, shape in block.items():
            shapes[f"h.{layer}.{name}.bias"] = shape[:1]
    return shapes


def init_weights(config, rng):
    """State dict, name -> matrix of Values, with normally distributed initial weights.

    Biases and the projections c_proj are 0, so that every block starts as the identity.
    """
    state_dict = {}
    for name, shape in parameter_shapes(config).items():
        mean = 0.0
        std = 0.0
        if "ln_" in name and name.endswith("weight"):
            mean = 1.0
        elif len(shape) == 2 and "c_proj" not in name:
            std = config.n_embd**-0.5
        n_rows = math.prod(shape[:-1])  # 1 for a vector
        state_dict[name] = [
            [Value(rng.gauss(mean, std)) for _ in range(shape[-1])] for _ in range(n_rows)
        ]
    return state_dict


def attention(qkv, n_head, keys, values):  # (T, 3C) -> (T, C)
    """Causal multi-head attention, softmax(q @ k.T / sqrt(D)) @ v (Vaswani et al. 2017, eq. 1).

    `keys` and `values` are the KV cache of this layer; those of the new tokens are appended.
    """
    C = len(qkv[0]) // 3
    D = C // n_head
    keys.extend(row[C : 2 * C] for row in qkv)  # (S, C)
    values.extend(row[2 * C :] for row in qkv)  # (S, C)
    heads = []
    for d in range(0, C, D):
        q = [row[d : d + D] for row in qkv]  # (T, D)
        k = [row[d : d + D] for row in keys]  # (S, D)
        v = [row[d : d + D] for row in values]  # (S, D)
        scores = causal_mask(linear(q, k))  # (T, S), linear(q, k) is q @ k.T
        heads.append(matmul(softmax(scores, scale=D**-0.5), v))  # (T, D)
    return [list(flatten(rows)) for rows in zip(*heads)]  # (T, C)


def new_kv_cache(config):
    """For each layer two lists of rows (S, C), the keys and values of the tokens so far."""
    return [([], []) for _ in range(config.n_layer)]


def gpt(ids, state_dict, config, kv_cache=None):  # (T,) -> (T, V)
    """Logits of the next token at every position: GPT-2's decoder.

    Each operation handles all T positions of the sequence at once. With a `kv_cache` the
    ids continue those of earlier calls, and their keys and values are appended to it.
    """

    def parameters(name):
        return state_dict[f"{name}.weight"], state_dict[f"{name}.bias"]

    if kv_cache is None:
        kv_cache = new_kv_cache(config)
    start = len(kv_cache[0][0])  # tokens in the cache
    wte = state_dict["wte.weight"]
    wpe = state_dict["wpe.weight"]
    x = add([wte[i] for i in ids], wpe[start : start + len(ids)])  # (T, C)
    for layer, (keys, values) in enumerate(kv_cache):
        h = f"h.{layer}"
        normed = layer_norm(x, *parameters(f"{h}.ln_1"))  # (T, C)
        qkv = linear(normed, *parameters(f"{h}.attn.c_attn"))  # (T, 3C)
        y = attention(qkv, config.n_head, keys, values)  # (T, C)
        x = add(x, linear(y, *parameters(f"{h}.attn.c_proj")))  # (T, C)
        normed = layer_norm(x, *parameters(f"{h}.ln_2"))  # (T, C)
        hidden = gelu(linear(normed, *parameters(f"{h}.mlp.c_fc")))  # (T, 4C)
        x = add(x, linear(hidden, *parameters(f"{h}.mlp.c_proj")))  # (T, C)
    x = layer_norm(x, *parameters("ln_f"))  # (T, C)
    return linear(x, wte)  # (T, V), the head is tied to the token embedding


# ---- training ------------------------------------------------------------------------------------


class Adam:
    """Adam (Kingma and Ba 2014, algorithm 1)."""

    def __init__(self, parameters, beta1=0.85, beta2=0.99, eps=1e-8):
        self.parameters = parameters
        self.beta1 = beta1
        self.beta2 = beta2
        self.eps = eps
        self.t = 0  # updates so far
        self.m = [0.0] * len(parameters)  # moving average of the gradient
        self.v = [0.0] * len(parameters)  # moving average of its square

    def step(self, lr):
        """Update the parameters with learning rate `lr`, then zero their grads."""
        self.t += 1
        b1 = self.beta1
        b2 = self.beta2
        grads = [p.grad for p in self.parameters]
        self.m = [b1 * m + (1 - b1) * g for m, g in zip(self.m, grads)]
        self.v = [b2 * v + (1 - b2) * g * g for v, g in zip(self.v, grads)]
        # The bias correction is the same for all parameters: move it into lr and eps (section 2).
        correction = math.sqrt(1 - b2**self.t)
        lr = lr * correction / (1 - b1**self.t)
        eps = self.eps * correction
        for p, m, v in zip(self.parameters, self.m, self.v):
            p.data -= lr * m / (math.sqrt(v) + eps)
            p.grad = 0.0


def build_vocab(text):
    """U+FFFD, for unknown characters, and the sorted characters of `text`; an index is an id."""
    return "\ufffd" + "".join(sorted({*text} - {"\ufffd"}))


def encode(text, characters):
    return [max(0, characters.find(c)) for c in text]  # find() returns -1 for an unknown character


def window_loss(start, ids, state_dict, config):
    """Cross-entropy of the window of `ids` at `start`; the targets are one position ahead."""
    end = start + config.block_size
    logits = gpt(ids[start:end], state_dict, config)  # (T, V)
    return cross_entropy(logits, ids[start + 1 : end + 1])


def evaluate(ids, state_dict, config):
    """Mean loss over about 40 windows of `ids`, computed on floats, which record no graph."""
    weights = {name: detach(matrix) for name, matrix in state_dict.items()}
    starts = range(0, len(ids) - config.block_size, max(1, len(ids) // 40))
    losses = [window_loss(start, ids, weights, config) for start in starts]
    return sum(losses) / len(losses)


def fit(state_dict, config, train_ids, val_ids, args, rng):
    """Train the parameters in place. Returns rows of [step, mean loss, validation loss]."""
    lr = args.learning_rate
    max_steps = args.max_steps
    eval_interval = math.ceil(max_steps / 10)
    optimizer = Adam([value for matrix in state_dict.values() for value in flatten(matrix)])
    history = []
    losses = []
    for step in range(1, max_steps + 1):
        start = rng.randrange(len(train_ids) - config.block_size)
        loss = window_loss(start, train_ids, state_dict, config)
        loss.backward()
        optimizer.step(lr * (1 - (step - 1) / max_steps))  # linear decay to zero
        losses.append(loss.data)
        require(math.isfinite(loss.data), f"--learning-rate {lr}: loss {loss.data}, lower it")
        if step % eval_interval == 0 or step == max_steps:
            mean = sum(losses) / len(losses)
            val_loss = evaluate(val_ids, state_dict, config)
            log(f"step {step:,}/{max_steps:,}: loss {mean:.4f}, validation loss {val_loss:.4f}")
            history.append([step, mean, val_loss])
            losses.clear()
    return history


def unigram_entropy(ids):
    """Loss in nats of the best prediction that knows only the frequencies of the `ids`."""
    counts = Counter(ids).values()
    return sum(n / len(ids) * math.log(len(ids) / n) for n in counts)


def train(args):
    """Train on the text --data and write the model to --out."""
    name = args.data.name
    try:
        text = args.data.read_text(encoding="utf-8").removeprefix("\ufeff")  # byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{args.data}: byte {error.start:,} is not utf-8 text") from None
    T = args.block_size
    characters = build_vocab(text)
    config = GPTConfig(len(characters), T, args.n_layer, args.n_head, args.n_embd)
    ids = encode(text, characters)
    n_train = len(ids) * 9 // 10
    train_ids = ids[:n_train]
    val_ids = ids[n_train:]
    enough = len(val_ids) > T
    require(enough, f"{name}: {len(text)} characters; --block-size {T} needs over {10 * T}")
    fix = f"choose another --out; if it is a model, prompt it with --model {args.out}"
    require(not os.path.lexists(args.out), f"{args.out}: exists; {fix}")
    tempfile.TemporaryFile(dir=args.out.parent).close()  # fail before training if saving would fail
    entropy = unigram_entropy(ids)
    log(f"{name}: {len(text):,} characters, unigram entropy {entropy:.4f}, {config}")
    rng = random.Random(args.seed)
    state_dict = init_weights(config, rng)
    history = fit(state_dict, config, train_ids, val_ids, args, rng)
    log("Training finished...")
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    training = dict(max_steps=args.max_steps, learning_rate=args.learning_rate, seed=args.seed)
    metadata = {
        "config": vars(config),
        "characters": characters,
        "data": dict(name=name, sha256=sha256, characters=len(text)),
        "training": training,
        "step": args.max_steps,
        "validation_loss": history[-1][-1],
        "history": history,
    }
    args.out = save_model(args.out, config, state_dict, metadata)
    log(f"Model saved to {args.out}")


# ---- generation ----------------------------------------------------------------------------------


def sample(logits, temperature, rng):
    """A token id from softmax(logits / temperature), at 0 the argmax; id 0 is never sampled."""
    if temperature == 0:
        return logits.index(max(logits[1:]), 1)
    (probs,) = softmax([logits[1:]], scale=1 / temperature)
    return rng.choices(range(1, len(logits)), probs)[0]


def generate_ids(ids, state_dict, config, temperature, rng):
    """Endless continuation of `ids` (at least one), token by token, with a KV cache."""
    T = config.block_size
    context = list(ids)
    uncached = context  # tokens whose keys and values are not in the cache yet
    kv_cache = new_kv_cache(config)
    while True:
        while len(context) > T:  # drop half: sliding by one token would change every position
            context = context[max(1, T // 2) :]
            uncached = context
            kv_cache = new_kv_cache(config)
        logits = gpt(uncached, state_dict, config, kv_cache)[-1]  # (V,)
        token = sample(logits, temperature, rng)
        yield token
        context.append(token)
        uncached = [token]


# ---- model file ----------------------------------------------------------------------------------
# safetensors: 8 bytes with the length of a JSON header, the header, the tensors in little-endian.

LARGEST = 1e3  # no weight of a successful run is larger


def tensor_entries(config, names):
    """Header entries of the parameters, in a file that holds them in the order of `names`."""
    shapes = parameter_shapes(config)
    entries = {}
    start = 0
    for name in names:
        shape = list(shapes[name])
        end = start + 4 * math.prod(shape)  # bytes
        entries[name] = dict(dtype="F32", shape=shape, data_offsets=[start, end])
        start = end
    return entries


def save_model(path, config, state_dict, metadata):
    """Write a model file atomically. Returns its path, which is another one if `path` exists."""
    fields = {name: json.dumps(value) for name, value in metadata.items()}
    header = {"__metadata__": {"format": "pt", "format_version": "1"} | fields}
    text = json.dumps(header | tensor_entries(config, state_dict)).encode()
    while len(text) % 8:  # aligns the tensors
        text += b" "
    rows = list(flatten(map(detach, state_dict.values())))
    is_sane = all(abs(x) < LARGEST for row in rows for x in row)
    require(is_sane, f"{path}: not saved: the run diverged; lower --learning-rate")
    tensors = [struct.pack(f"<{len(row)}f", *row) for row in rows]
    temporary = path.with_name(f".anexa-{secrets.token_hex(6)}.tmp")
    try:
        temporary.write_bytes(b"".join([len(text).to_bytes(8, "little"), text, *tensors]))
        while os.path.lexists(path):  # another program created it during this run
            path = path.with_name(f"new-{path.name}")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def read_header(file):
    """(config, characters, tensor entries) of an open model file, all validated."""
    n = int.from_bytes(file.read(8), "little")
    require(n < 10**8, "not a safetensors file")
    header = json.loads(file.read(n))
    metadata = header.pop("__metadata__")
    require(metadata["format_version"] == "1", "format_version is not 1")
    config = GPTConfig(**json.loads(metadata["config"]))
    characters = json.loads(metadata["characters"])
    valid = characters == build_vocab(characters) and len(characters) == config.vocab_size
    require(valid, "its characters are not U+FFFD followed by vocab_size - 1 sorted characters")
    exported = "transformer.wte.weight" in header
    require(not exported, "it was exported for transformers; take the file before the export")
    names = sorted(parameter_shapes(config), key=lambda name: header[name]["data_offsets"])
    entries = tensor_entries(config, names)
    require(header == entries, "its tensors do not match its config")
    return config, characters, entries


def read_tensors(file, entries):
    """State dict of floats from the part of a model file that follows its header."""
    n = sum(math.prod(entry["shape"]) for entry in entries.values())
    numbers = struct.unpack(f"<{n}f", file.read(4 * n + 1))  # fails if there are more
    require(all(abs(x) < LARGEST for x in numbers), "weights not finite, or absurdly large")
    numbers = iter(numbers)
    state_dict = {}
    for name, entry in entries.items():
        n_columns = entry["shape"][-1]
        n_rows = math.prod(entry["shape"][:-1])
        state_dict[name] = [list(islice(numbers, n_columns)) for _ in range(n_rows)]
    return state_dict


def load_model(path):
    """(config, characters, state_dict) of a model file.  raises: ValueError if it is damaged"""
    try:
        with open(path, "rb") as file:
            config, characters, entries = read_header(file)
            return config, characters, read_tensors(file, entries)
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError, struct.error) as e:
        reason = " ".join(f"{type(e).__name__}: {e}".split())[:200]
        raise ValueError(f"{path}: not a whole model of Anexa ({reason}); get it again") from None


# ---- command line --------------------------------------------------------------------------------


def escape_control(text):
    """`text` with control and other invisible characters as escapes such as \\x1b."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def log(text="", end="\n"):
    """Print to standard error: standard output is for generated text."""
    try:
        print(escape_control(text), end=end, file=sys.stderr, flush=True)
    except OSError:  # nobody reads it any more; the run continues
        sys.stderr = io.StringIO()


def write(text):
    """Print generated text: unchanged to a pipe, without control characters to a terminal."""
    if sys.stdout.isatty():
        text = escape_control(text)
    print(text, end="", flush=True)


def chat(config, characters, state_dict, temperature, max_new):
    """Continue prompts from standard input until `quit`, `exit` or the end of input."""
    log("\n--- Interactive Generation ---\nEnter a prompt to continue (or 'quit' to exit)")
    while True:
        log("Prompt: ", end="")
        line = sys.stdin.readline()
        if not line:  # end of input
            log()
            return
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
        with suppress(KeyboardInterrupt):  # Ctrl-C stops this response, not the program
            write(prompt)
            for i in islice(ids, max_new):
                write(characters[i])
        write("\n")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {escape_control(message)}; see --help\n")


def parse_args(argv):
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
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


def run(args):
    """Train unless a model is given, then prompt the model."""
    require(args.max_steps >= 1, f"--max-steps {args.max_steps}: must be 1 or more")
    require(0 <= args.max_new <= 10**9, f"--max-new {args.max_new}: must be from 0 to 10^9")
    is_valid = args.temperature == 0 or 0.001 <= args.temperature <= 1_000
    require(is_valid, f"--temperature {args.temperature}: must be 0, or from 0.001 to 1,000")
    path = args.model
    if path is None:
        train(args)
        path = args.out
    config, characters, state_dict = load_model(path)
    log(f"{path}: {config}")
    chat(config, characters, state_dict, args.temperature, args.max_new)


def main(argv):
    """Exit status: 0, 2 after an error that the user can fix, 130 after Ctrl-C."""
    args = parse_args(argv)
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # it was closed, for example by <&-
            setattr(sys, name, io.StringIO())
        else:
            stream.reconfigure(errors="backslashreplace")
    gc.disable()  # backward() leaves no reference cycles
    try:
        run(args)
        return 0
    except BrokenPipeError:
        os._exit(0)  # the reader of standard output is gone, as after `| head`: nothing to flush
    except OSError as error:
        log(f"{Path(__file__).name}: {error.filename or 'output'}: {error.strerror or error}")
        return 2
    except ValueError as error:
        log(f"{Path(__file__).name}: {error}")
        return 2
    except MemoryError:
        log(f"{Path(__file__).name}: out of memory; use a smaller text, model or --block-size")
        return 2
    except OverflowError:
        log(f"{Path(__file__).name}: the run diverged; lower --learning-rate")
        return 2
    except KeyboardInterrupt:
        log()
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
