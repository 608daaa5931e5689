"""docs/old_architecture.py against torch in float64, central differences, anexagpt.py, and files that lie."""

import json
import math
import os
import random
import re
import signal
import struct
import subprocess
import sys
import time
from itertools import islice

import pexpect
import pytest
import safetensors
import safetensors.torch
import torch
from conftest import ROOT, shared_text, start
from torch.nn import functional as F

import anexagpt

sys.path.insert(0, str(ROOT / "docs"))
import old_architecture as old

SCRIPT = ROOT / "docs" / "old_architecture.py"
Value = old.Value


@pytest.fixture(autouse=True)
def fresh_tape():
    """Every test starts and ends with nothing on the tape."""
    Value.tape.clear()
    yield
    Value.tape.clear()


def matrix(rng, rows, columns, low=-2.0, high=2.0):
    return [[rng.uniform(low, high) for _ in range(columns)] for _ in range(rows)]


def values(rows):
    return [[Value(x) for x in row] for row in rows]


def grads(rows):
    return [[v.grad for v in row] for row in rows]


def close(ours, theirs, tolerance=1e-9):
    torch.testing.assert_close(torch.tensor(ours, dtype=torch.float64), theirs.detach(), rtol=0, atol=tolerance)


# ---- Value -----------------------------------------------------------------------------------------------------------

SCALARS = {
    "add": lambda a, b: a + b,
    "add a number": lambda a, b: a + 3 + (2 + b),
    "mul": lambda a, b: a * b,
    "mul by a number": lambda a, b: a * 3 * (2 * b),
    "sub": lambda a, b: a - b,
    "sub a number": lambda a, b: (a - 3) * (2 - b),
    "div": lambda a, b: a / b,
    "div by a number": lambda a, b: (a / 3) * (2 / b),
    "neg": lambda a, b: -a * b,
    "square": lambda a, b: a**2 * b,
    "root": lambda a, b: a**0.5 + b**-1.5,
    "power 0": lambda a, b: a**0 * b,
    "exp": lambda a, b: (a * b).exp(),
    "log": lambda a, b: a.log() * b,
    "tanh": lambda a, b: (a - b).tanh(),
    "used twice": lambda a, b: a * a + a * b + a,
    "used by its own child": lambda a, b: (a + b) * a.exp() / (a + b).log(),
}


@pytest.mark.parametrize("name", SCALARS)
def test_operators_equal_torch_and_central_differences(name):
    """Catches a wrong value or slope of any operator, a lost reflected form, and a use that is counted once too few."""
    f, rng = SCALARS[name], random.Random(name)
    for _ in range(20):
        numbers = [rng.uniform(1.1, 3.0), rng.uniform(1.1, 3.0)]
        ours, theirs = (
            [Value(x) for x in numbers],
            [torch.tensor(x, dtype=torch.float64).requires_grad_() for x in numbers],
        )
        y, z = f(*ours), f(*theirs)
        y.backward()
        z.backward()
        assert y.data == pytest.approx(z.item(), abs=1e-9)
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert a.grad == pytest.approx(b.grad.item(), abs=1e-9, rel=1e-12)
            up, down = ([Value(x + (e if j == i else 0)) for j, x in enumerate(numbers)] for e in (1e-6, -1e-6))
            assert a.grad == pytest.approx((f(*up).data - f(*down).data) / 2e-6, rel=1e-6, abs=1e-6)
        Value.tape.clear()


def test_grads_add_up_over_calls_and_intermediates_do_not_leak():
    """Catches a backward() that counts an earlier call's intermediate grads again, and one that forgets the leaves'."""
    a, b = Value(3.0), Value(5.0)
    m = a * b
    m.backward()
    assert (a.grad, b.grad, m.grad) == (5.0, 3.0, 1.0)
    (m * 2).backward()
    assert (a.grad, b.grad, m.grad) == (15.0, 9.0, 2.0)
    unused = a * math.inf  # the chain rule of an operation that the loss does not depend on: 0 * inf is nan
    (m * 1).backward()
    assert (a.grad, b.grad, unused.grad) == (20.0, 12.0, 0.0)


def test_children_are_what_a_value_was_made_from():
    """Catches a graph that cannot be followed back, which docs/old_architecture.md draws."""
    a, b = Value(2.0), Value(3.0)
    assert (a * b).children == (a, b)
    assert (a + 1).children == (a,)
    assert a.children == ()
    with pytest.raises(TypeError):
        assert a < b  # comparison-free


def test_a_chain_of_100_000_nodes_needs_no_recursion():
    """Catches a recursive backward(), and a graph whose destruction overflows the stack."""
    a = x = Value(1.0)
    for _ in range(100_000):
        x = x + a
    x.backward()
    assert (x.data, a.grad) == (100_001.0, 100_001.0)
    Value.tape.clear()
    del x
    assert a.data == 1.0


def test_a_dot_product_is_one_node():
    """Catches a matmul that spells out its products: K - 1 sums and K products an entry instead of one Value."""
    rng = random.Random(1)
    old.matmul(values(matrix(rng, 3, 50)), values(matrix(rng, 50, 4)))
    assert sum(len(row) for rows, _ in Value.tape for row in rows) == 3 * 4


# ---- matrices --------------------------------------------------------------------------------------------------------


def mask(scores):
    T, S = scores.shape
    return scores.masked_fill(torch.ones(T, S, dtype=torch.bool).triu(S - T + 1), -torch.inf)


def layer_norm(x, weight, bias):
    return F.layer_norm(x, (x.shape[1],), weight[0], bias[0], eps=1e-5)


MATRICES = {  # name: ours, torch's, shapes of the arguments
    "transpose": (old.transpose, torch.t, [(2, 5)]),
    "matmul": (old.matmul, torch.matmul, [(4, 7), (7, 3)]),
    "linear": (old.linear, lambda x, w, b: F.linear(x, w, b[0]), [(4, 7), (3, 7), (1, 3)]),
    "linear without bias": (old.linear, F.linear, [(4, 7), (3, 7)]),
    "add": (old.add, torch.add, [(3, 4), (3, 4)]),
    "softmax": (old.softmax, lambda x: x.softmax(1), [(3, 6)]),
    "softmax at a temperature": (lambda x: old.softmax(x, 2.5), lambda x: (x / 2.5).softmax(1), [(3, 6)]),
    "causal mask": (lambda x: old.softmax(old.causal_mask(x)), lambda x: mask(x).softmax(1), [(5, 5)]),
    "causal mask after a cache": (lambda x: old.softmax(old.causal_mask(x)), lambda x: mask(x).softmax(1), [(3, 7)]),
    "layer_norm": (old.layer_norm, layer_norm, [(4, 9), (1, 9), (1, 9)]),
    "gelu": (old.gelu, lambda x: F.gelu(x, approximate="tanh"), [(4, 9)]),
}


@pytest.mark.parametrize("name", MATRICES)
def test_matrix_functions_equal_torch(name):
    """Catches a wrong value or gradient of any function, and a float path that differs from the Value path."""
    ours, theirs, shapes = MATRICES[name]
    rng = random.Random(name)
    numbers = [matrix(rng, *shape) for shape in shapes]
    args = [values(rows) for rows in numbers]
    tensors = [torch.tensor(rows, dtype=torch.float64).requires_grad_() for rows in numbers]
    y, z = ours(*args), theirs(*tensors)
    close(old.floats(y), z)
    close(ours(*numbers), z)
    weights = matrix(rng, len(y), len(y[0]))
    sum(v * w for row, weight in zip(y, weights, strict=True) for v, w in zip(row, weight, strict=True)).backward()
    (z * torch.tensor(weights, dtype=torch.float64)).sum().backward()
    for rows, tensor in zip(args, tensors, strict=True):
        close(grads(rows), tensor.grad)


def test_floats_and_values_mix():
    """Catches a function that forgets the one Value argument among numbers, or writes grads into the numbers."""
    x, w = values([[1.0, 2.0]]), [[3.0, 4.0], [5.0, 6.0]]
    y = old.linear(x, w)
    (y[0][0] + y[0][1]).backward()
    assert grads(x) == [[8.0, 10.0]] and w == [[3.0, 4.0], [5.0, 6.0]]
    assert old.linear([[1.0, 2.0]], w) == [[11.0, 17.0]]
    assert not any(isinstance(v, Value) for v in old.linear([[1.0, 2.0]], w)[0])


def test_cross_entropy_equals_torch_and_survives_large_logits():
    """Catches a wrong mean or sign, and a logarithm of a probability that has rounded to zero."""
    numbers, targets = [[900.0, -900.0, 3.0], [1.0, 2.0, 3.0]], [1, 2]
    logits, tensor = values(numbers), torch.tensor(numbers, dtype=torch.float64).requires_grad_()
    loss, expected = old.cross_entropy(logits, targets), F.cross_entropy(tensor, torch.tensor(targets))
    (loss * 3).backward()
    (expected * 3).backward()
    assert loss.data == old.cross_entropy(numbers, targets) == pytest.approx(expected.item(), abs=1e-9)
    close(grads(logits), tensor.grad)


# ---- the whole network -----------------------------------------------------------------------------------------------


def torch_gpt(ids, weights, config):
    """Logits (T, V) of GPT-2, written with torch's own operations."""
    w, C, T = weights, config.n_embd, len(ids)

    def p(name):
        return w[f"{name}.weight"], w[f"{name}.bias"]

    x = w["wte.weight"][torch.tensor(ids)] + w["wpe.weight"][:T]
    for n in range(config.n_layer):
        qkv = F.linear(F.layer_norm(x, (C,), *p(f"h.{n}.ln_1")), *p(f"h.{n}.attn.c_attn"))
        q, k, v = (t.view(T, config.n_head, -1).transpose(0, 1) for t in qkv.split(C, 1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1).reshape(T, C)
        x = x + F.linear(y, *p(f"h.{n}.attn.c_proj"))
        hidden = F.gelu(F.linear(F.layer_norm(x, (C,), *p(f"h.{n}.ln_2")), *p(f"h.{n}.mlp.c_fc")), approximate="tanh")
        x = x + F.linear(hidden, *p(f"h.{n}.mlp.c_proj"))
    return F.linear(F.layer_norm(x, (C,), *p("ln_f")), w["wte.weight"])


def both(config, seed=0):
    """The same random weights, none of them zero, as Values and as torch parameters in float64."""
    rng, ours, theirs = random.Random(seed), {}, {}
    for name, shape in old.shapes(config).items():
        rows = matrix(rng, math.prod(shape[:-1]), shape[-1], -0.5, 0.5)
        ours[name] = values(rows)
        theirs[name] = torch.tensor(rows, dtype=torch.float64).view(shape).requires_grad_()
    return ours, theirs


CONFIG = old.GPTConfig(vocab_size=11, block_size=8, n_layer=2, n_head=2, n_embd=12)
IDS = [3, 1, 4, 1, 5, 9, 2, 6]


def test_loss_and_every_gradient_equal_torch():
    """Catches any fault of the network: a head cut wrong, q, k, v in another order, a missing bias, an untied head."""
    ours, theirs = both(CONFIG)
    loss = old.cross_entropy(old.gpt(IDS[:-1], ours, CONFIG), IDS[1:])
    expected = F.cross_entropy(torch_gpt(IDS[:-1], theirs, CONFIG), torch.tensor(IDS[1:]))
    loss.backward()
    expected.backward()
    assert loss.data == pytest.approx(expected.item(), abs=1e-9)
    for name, rows in ours.items():
        close(grads(rows), theirs[name].grad.view(len(rows), -1))


def test_loss_gradients_equal_central_differences():
    """Catches a loss and a gradient that are wrong together, in torch's reading of the network as well as in ours."""
    ours, _ = both(CONFIG, seed=1)
    old.cross_entropy(old.gpt(IDS[:-1], ours, CONFIG), IDS[1:]).backward()
    numbers = {name: old.floats(rows) for name, rows in ours.items()}
    rng, losses = random.Random(2), []
    for name, rows in numbers.items():
        i, j = rng.randrange(len(rows)), rng.randrange(len(rows[0]))
        if name == "wte.weight":
            i = IDS[0]
        if name == "wpe.weight":
            i = 0
        kept, losses = rows[i][j], []
        for step in (1e-5, -1e-5):
            rows[i][j] = kept + step
            losses.append(old.cross_entropy(old.gpt(IDS[:-1], numbers, CONFIG), IDS[1:]))
        rows[i][j] = kept
        assert ours[name][i][j].grad == pytest.approx((losses[0] - losses[1]) / 2e-5, abs=1e-8), name


def test_one_token_at_a_time_equals_all_at_once():
    """Catches a cache that is out of step: a wrong position, a key missing, a mask that hides the past."""
    weights = {name: old.floats(rows) for name, rows in both(CONFIG)[0].items()}
    whole = old.gpt(IDS, weights, CONFIG)
    for pieces in ([1] * 8, [3, 1, 4], [7, 1]):
        cache, start, rows = old.new_cache(CONFIG), 0, []
        for n in pieces:
            rows += old.gpt(IDS[start : start + n], weights, CONFIG, cache)
            start += n
        close(rows, torch.tensor(whole, dtype=torch.float64), 1e-12)
    assert not Value.tape, "numbers must leave nothing on the tape"


def test_ten_adam_steps_equal_torch():
    """Catches a moment or bias correction that is off, a gradient that is not cleared, a tape that is walked twice."""
    ours, theirs = both(CONFIG)
    adam = old.Adam([v for rows in ours.values() for row in rows for v in row], beta1=0.8, beta2=0.95)
    reference = torch.optim.Adam(theirs.values(), lr=1.0, betas=(0.8, 0.95))
    for step in range(10):
        ids, rate = [(7 * i + step * step) % 11 for i in range(8)], 0.02 * (1 - step / 10)
        loss = old.cross_entropy(old.gpt(ids[:-1], ours, CONFIG), ids[1:])
        loss.backward()
        adam.step(rate)
        Value.tape.clear()
        expected = F.cross_entropy(torch_gpt(ids[:-1], theirs, CONFIG), torch.tensor(ids[1:]))
        expected.backward()
        reference.param_groups[0]["lr"] = rate
        reference.step()
        reference.zero_grad()
        assert loss.data == pytest.approx(expected.item(), abs=1e-8)
    for name, rows in ours.items():
        close(old.floats(rows), theirs[name].view(len(rows), -1), 1e-8)


# ---- tokenizer and text ----------------------------------------------------------------------------------------------


def test_prompts_are_admitted_like_in_the_main_program():
    """Catches a mapping that differs from anexagpt.py's, an unknown character that is kept, and a silent change."""
    text = "Hello, 'world' - \"e\" nao\n"
    ours, theirs = old.Tokenizer.of(text), anexagpt.Tokenizer.of(text)
    assert ours.characters == theirs.characters
    prompts = [
        "Hello",
        "\u2018Hello\u2019 \u201ce\u201d \u2014",
        "h\u00c9LLO",
        "n\u00e3o\u4e2d",
        "\ufffd",
        "\ud800x",
        "",
    ]
    for prompt in prompts:
        assert ours.admit(prompt)[0] == theirs.admit(prompt)[0], prompt
    assert ours.admit("Hello") == ("Hello", "")
    assert "read \u00e9 as e" in ours.admit("\u00e9\u4e2d")[1] and "left out \u4e2d" in ours.admit("\u00e9\u4e2d")[1]
    assert ours.encode("He\u4e2d")[-1] == 0


def test_entropy_is_that_of_the_letters():
    """Catches bits instead of nats, and a sum that is not weighted."""
    assert old.entropy("aabb") == pytest.approx(math.log(2))
    assert old.entropy("aaab") == pytest.approx(0.75 * math.log(4 / 3) + 0.25 * math.log(4))


# ---- model file ------------------------------------------------------------------------------------------------------


def small_model(text="Hello world, this is a small text. "):
    tokenizer = old.Tokenizer.of(text)
    config = old.GPTConfig(len(tokenizer.characters), block_size=8, n_layer=2, n_head=2, n_embd=8)
    rng = random.Random(3)
    weights = {
        name: matrix(rng, math.prod(shape[:-1]), shape[-1], -0.3, 0.3) for name, shape in old.shapes(config).items()
    }
    data = dict(name="a\u00e9 text", sha256="0" * 64, characters=35)
    story = dict(data=data, training={}, step=7, validation_loss=1.5, history=[[7, 1.4, 1.5]])
    return old.Model(config, tokenizer, weights, story)


def test_safetensors_reads_what_is_written_and_the_other_way_round(tmp_path):
    """Catches a header that the official library refuses, a wrong offset, byte order, transposition or metadata."""
    path, model = tmp_path / "m.safetensors", small_model()
    old.save_file(path, model)
    tensors = safetensors.torch.load_file(path)
    for name, rows in model.weights.items():
        close(tensors[name].view(len(rows), -1).tolist(), torch.tensor(rows, dtype=torch.float64), 1e-7)
        assert list(tensors[name].shape) == list(old.shapes(model.config)[name])
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt" and json.loads(metadata["characters"]) == model.tokenizer.characters
    safetensors.torch.save_file(tensors, tmp_path / "b.safetensors", metadata)
    again = old.load_model(tmp_path / "b.safetensors")
    assert (again.config, again.tokenizer.characters, again.story) == (
        model.config, model.tokenizer.characters, model.story)  # fmt: skip
    for name, rows in model.weights.items():
        assert again.weights[name] == torch.tensor(rows, dtype=torch.float32).tolist()


def test_an_interrupted_save_keeps_the_old_file(tmp_path, monkeypatch):
    """Catches a save that writes in place, and one that leaves its temporary file behind."""
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        old.save_file(path, small_model())
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def hostile(change):
    """Bytes of a good model file after change(header, content), which may return other bytes."""

    def build(folder):
        path = folder / "good.safetensors"
        old.save_file(path, small_model())
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header, content = json.loads(raw[8 : 8 + length]), bytearray(raw[8 + length :])
        made = change(header, content)
        if isinstance(made, bytes):
            return made
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + content

    return build


def meta(**entries):
    def change(header, content):
        for name, value in entries.items():
            header["__metadata__"][name] = value if isinstance(value, str) or value is None else json.dumps(value)
        header["__metadata__"] = {k: v for k, v in header["__metadata__"].items() if v is not None}

    return change


def config(**entries):
    def change(header, content):
        settings = json.loads(header["__metadata__"]["config"]) | entries
        header["__metadata__"]["config"] = json.dumps(settings)

    return change


def characters(change):
    return lambda header, content: meta(
        characters=json.dumps(change(json.loads(header["__metadata__"]["characters"])))
    )(header, content)


def tensor(name="wte.weight", **entries):
    return lambda header, content: header[name].update(entries)


def swap(header, content):
    a, b = header["h.0.ln_1.weight"], header["wte.weight"]
    a["data_offsets"] = [b["data_offsets"][0], b["data_offsets"][0] + 32]


HOSTILE = {
    "empty": lambda h, c: b"",
    "short": lambda h, c: b"\x01\x00",
    "header of 2^63 bytes": lambda h, c: struct.pack("<Q", 2**63) + b"{}",
    "header beyond the end": lambda h, c: struct.pack("<Q", 1000) + b"{}",
    "not JSON": lambda h, c: struct.pack("<Q", 4) + b"\xff\xfe{}",
    "deep JSON": lambda h, c: struct.pack("<Q", 200_000) + b"[" * 200_000,
    "a list": lambda h, c: struct.pack("<Q", 2) + b"[]",
    "no metadata": lambda h, c: h.pop("__metadata__") and None,
    "metadata of numbers": lambda h, c: h["__metadata__"].update(step=1),
    "another version": meta(format_version="2"),
    "no version": meta(format_version=None),
    "no config": meta(config=None),
    "deep config": meta(config="[" * 200_000),
    "config is a list": meta(config=[]),
    "config lacks dropout": meta(config=dict(vocab_size=20, block_size=8, n_layer=2, n_head=2, n_embd=8)),
    "config has more": config(extra=1),
    "n_layer 0": config(n_layer=0),
    "n_layer true": config(n_layer=True),
    "n_layer 1e400": config(n_layer=10**400),
    "n_layer text": config(n_layer="2"),
    "n_layer nan": config(n_layer=math.nan),
    "n_layer 3": config(n_layer=3),
    "n_embd huge": config(n_embd=65536),
    "n_head not a divisor": config(n_head=3),
    "n_head 0": config(n_head=0),
    "vocab_size text": config(vocab_size="many"),
    "vocab_size float": config(vocab_size=20.0),
    "vocab_size wrong": config(vocab_size=21),
    "no characters": meta(characters=None),
    "characters a list": meta(characters=["\ufffd", "a"]),
    "characters twice": characters(lambda c: c[:-1] + c[1]),
    "characters with a surrogate": characters(lambda c: c[:-1] + "\ud800"),
    "unknown is not first": characters(lambda c: c[::-1]),
    "tensor missing": lambda h, c: h.pop("ln_f.bias") and None,
    "tensor too many": lambda h, c: h.update(more=dict(dtype="F32", shape=[0], data_offsets=[0, 0])),
    "tensor is a number": lambda h, c: h.update({"ln_f.bias": 3}),
    "dtype": tensor(dtype="F64"),
    "shape": tensor(shape=[8, 18]),
    "shape flat": tensor(shape=[144]),
    "shape negative": tensor(shape=[-18, -8]),
    "offsets missing": tensor(data_offsets=None),
    "offsets text": tensor(data_offsets="ab"),
    "offsets a number": tensor(data_offsets=5),
    "offsets empty": tensor(data_offsets=[]),
    "offsets backwards": tensor(data_offsets=[576, 0]),
    "offsets negative": tensor(data_offsets=[-576, 0]),
    "offsets beyond": tensor(data_offsets=[10**12, 10**12 + 576]),
    "offsets float": tensor(data_offsets=[0.0, 576.0]),
    "offsets three": tensor(data_offsets=[0, 576, 1]),
    "offsets end late": tensor(data_offsets=[0, 577]),
    "offsets overlap": swap,
    "cut": lambda h, c: c.__delitem__(slice(-4, None)),
    "longer": lambda h, c: c.extend(b"1234"),
    "not finite": lambda h, c: c.__setitem__(slice(0, 4), struct.pack("<f", math.nan)),
    "infinite": lambda h, c: c.__setitem__(slice(-4, None), struct.pack("<f", -math.inf)),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_lies_is_refused_in_one_line(name, tmp_path):
    """Catches every claim of a file that is believed unchecked: a crash, a hang, or a wrong model."""
    path = tmp_path / "bad.safetensors"
    path.write_bytes(hostile(HOSTILE[name])(tmp_path))
    with pytest.raises(old.UserError) as error:
        old.load_model(path)
    message = str(error.value)
    assert message.startswith(f"{path}: not a whole model of Anexa: ") and "\n" not in message and len(message) < 500


def test_a_file_with_less_to_tell_still_opens(tmp_path):
    """Catches a reader that needs the optional entries, and a story that trusts their types."""
    path = tmp_path / "m.safetensors"
    for changes in (dict(data=None, step=None, validation_loss=None, history=None, training=None),
                    dict(data=[1], step="x", validation_loss={}, history=3)):  # fmt: skip
        path.write_bytes(
            hostile(meta(**{k: None if v is None else json.dumps(v) for k, v in changes.items()}))(tmp_path)
        )
        assert "parameters" in str(old.load_model(path))


# ---- generation ------------------------------------------------------------------------------------------------------


def test_greedy_text_equals_the_uncached_argmax_across_full_windows():
    """Catches a cache that is not emptied when the context is full, and a window that restarts at the wrong place."""
    model, T = small_model(), 8
    for prompt in ("Hel", "Hello world, this"):
        ids = model.tokenizer.encode(prompt)
        got = list(islice(old.stream(model, ids, 0, None), 40))
        for i in got:
            row = old.gpt(ids[old.window_start(len(ids), T) :], model.weights, model.config)[-1]
            assert i == max(range(1, len(row)), key=row.__getitem__)
            ids = [*ids, i]


def test_sampling_follows_the_probabilities_and_never_the_unknown():
    """Catches logits that are used as weights, a temperature that multiplies, and id 0 in the text."""
    rng, logits = random.Random(5), [9.0, 1.0, 2.0, 0.0]
    drawn = [old.choose(logits, 0.5, rng) for _ in range(20_000)]
    p = torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64).div(0.5).softmax(0)
    for i in (1, 2, 3):
        assert drawn.count(i) / 20_000 == pytest.approx(p[i - 1].item(), abs=0.015)
    assert 0 not in drawn and old.choose(logits, 0, rng) == 2 and old.choose(logits, 1e-300, rng) == 2


def test_control_characters_are_spelt_out():
    """Catches an escape sequence or a bidirectional override in a model's text that reaches the terminal."""
    assert old.printable("a\x1b[2J\x07\u202eb\x9b\n\t") == "a\\x1b[2J\\x07\\u202eb\\x9b\n\t"


# ---- together with anexagpt.py ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model file of the default size, 0.8 M, that anexagpt.py has trained, and its text."""
    folder = tmp_path_factory.mktemp("trained")
    text = shared_text("sherlock.txt").read_text(encoding="utf-8-sig")[20_000:60_000]
    (folder / "text.txt").write_text(text, encoding="utf-8")
    options = ["--max-steps", 12, "--batch-size", 2, "--device", "cpu", "--dtype", "float32", "--quiet"]
    assert start("train", "--data", "text.txt", *options, cwd=folder).status == 0
    return folder / "model.safetensors", text


def test_logits_and_greedy_text_equal_the_main_program(trained, tmp_path):
    """Catches any difference of network or reader between the two halves: orientation, order of q, k, v, eps, GELU."""
    path, text = trained
    model, rng = old.load_model(path), random.Random(1)
    for name in model.weights:  # so few steps leave the blocks close to the identity, which would hide their faults
        if name.endswith("c_proj.weight"):
            model.weights[name] = [[rng.gauss(0, 0.2) for _ in row] for row in model.weights[name]]
    path = tmp_path / "model.safetensors"
    old.save_file(path, model)

    model = old.load_model(path)
    network, tokenizer, _ = anexagpt.load_model(path, torch.device("cpu"))
    with torch.no_grad():
        expected = network(tokenizer.encode(text[:256]).long()[None])[0].double()
    assert len(expected) == model.config.block_size == 256
    close(old.gpt(model.tokenizer.encode(text[:256]), model.weights, model.config), expected, 1e-4)

    options = ["--temperature", 0, "--max-new", 30, "--device", "cpu", "--dtype", "float32"]
    theirs = start("generate", text[:20], "--model", path, *options, cwd=tmp_path).out
    ids = islice(old.stream(model, model.tokenizer.encode(text[:20]), 0, None), 30)
    assert text[:20] + "".join(model.tokenizer.characters[i] for i in ids) + "\n" == theirs


def script(*args, **options):
    return start(*args, program=SCRIPT, **options)


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    """Folder and output of a short training of old_architecture.py, and of one prompt after it."""
    folder = tmp_path_factory.mktemp("learnt")
    text = "the cat sat on the mat, the dog sat on the log. " * 40
    (folder / "text.txt").write_text(text, encoding="utf-8")
    options = ["--max-steps", 150, "--block-size", 16, "--n-embd", 16, "--n-head", 2, "--max-new", 40]
    return folder, script("--data", "text.txt", *options, cwd=folder, stdin="the c\u00e2t\nquit\n")


def test_training_learns_saves_and_prompts(learnt):
    """Catches a training that does not learn, a missing figure, a changed fixed line, and text on the wrong stream."""
    folder, done = learnt
    assert done.status == 0, done.err
    losses = re.findall(r"loss (\d\.\d+) nats/char, unigrams (\d\.\d+),.*validation (\d\.\d+)", done.err)
    assert len(losses) == 10 and float(losses[-1][2]) < 0.6 * float(losses[-1][1])
    assert float(losses[0][1]) == pytest.approx(old.entropy((folder / "text.txt").read_text()), abs=1e-3)
    lines = "Training finished...\nModel saved to old_model.safetensors\n"
    assert lines in done.err
    assert "--- Interactive Generation ---\nEnter a prompt to continue (or 'quit' to exit)\nPrompt: " in done.err
    assert "(read \u00e2 as a)\nResponse: " in done.err
    assert re.fullmatch(r"the cat[a-z ,.]{40}\n", done.out)
    assert sorted(p.name for p in folder.iterdir()) == ["old_model.safetensors", "text.txt"]


def test_a_model_trained_here_opens_in_the_main_program(learnt, tmp_path):
    """Catches a file that anexagpt.py refuses, and one in which it finds another model."""
    options = ["--model", learnt[0] / "old_model.safetensors", "--temperature", 0, "--max-new", 30]
    theirs = start("chat", *options, "--device", "cpu", "--dtype", "float32", cwd=tmp_path, stdin="the c\nquit\n")
    ours = script(*options, cwd=tmp_path, stdin="the c\nquit\n")
    assert theirs.status == ours.status == 0, theirs.err + ours.err
    assert ours.out == theirs.out != "the c\n"


def test_the_shortest_text_that_is_allowed_trains(tmp_path):
    """Catches validation windows that do not fit, or of which there are none."""
    (tmp_path / "text.txt").write_text("ab" * 20)
    options = ["--data", "text.txt", "--block-size", 2, "--max-steps", 1, "--max-new", 0]
    done = script(*options, cwd=tmp_path, stdin="a\n")
    assert done.status == 0 and done.out == "a\n", done.err


@pytest.mark.parametrize(
    "args, words",
    [
        (["--model", "nowhere.safetensors"], ["nowhere.safetensors", "No such file"]),
        (["--model", "."], [".", "not a file"]),
        (["--data", "nowhere.txt"], ["nowhere.txt", "No such file"]),
        (["--data", "latin.txt"], ["latin.txt", "UTF-8"]),
        (["--data", "short.txt"], ["short.txt", "5 characters", "--block-size 32", "640"]),
        (["--data", "empty.txt"], ["empty.txt", "0 characters"]),
        (["--out", "no/where.safetensors"], ["no", "No such file"]),
        (["--n-head", "5"], ["n_embd 24", "multiple of n_head 5"]),
        (["--n-layer", "0"], ["n_layer 0", "from 1 to 128"]),
        (["--n-layer", "two"], ["--n-layer", "two"]),
        (["--temperature", "nan"], ["temperature nan", "from 0.0 to 100.0"]),
        (["--learn", "1"], ["--learn", "--help"]),
    ],
)
def test_what_a_person_gets_wrong_is_one_line_and_status_2(args, words, tmp_path):
    """Catches a traceback, a wrong status, and a message without the value, the rule or the cure."""
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "empty.txt").write_text("")
    done = script(*args, cwd=tmp_path)
    assert done.status == 2 and done.out == ""
    assert done.err.count("\n") == 1 and "Traceback" not in done.err
    assert all(word in done.err for word in words), done.err


def test_ctrl_c_while_training_leaves_nothing_and_returns_130(tmp_path):
    """Catches a traceback after Ctrl-C, a wrong status, and a file that is half a model."""
    with subprocess.Popen([sys.executable, SCRIPT], cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        assert "different" in process.stderr.readline()
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=30)[1]
    assert process.returncode == 130 and "Traceback" not in errors and list(tmp_path.iterdir()) == []


def test_ctrl_c_stops_the_answer_and_ctrl_d_leaves(learnt):
    """Catches a session that an interrupted answer ends, and one that Ctrl-D does not end."""
    args = [str(SCRIPT), "--model", str(learnt[0] / "old_model.safetensors"), "--max-new", "1000000"]
    child = pexpect.spawn(sys.executable, args, timeout=30, encoding="utf-8")
    child.expect_exact("Enter a prompt to continue (or 'quit' to exit)")
    child.expect_exact("Prompt: ")
    child.sendline("the")
    child.expect_exact("Response: the")
    child.expect("[a-z ,.]{20}")
    child.sendintr()
    child.expect_exact("Prompt: ")
    child.sendintr()
    child.expect_exact("(quit or Ctrl-D leaves)")
    child.expect_exact("Prompt: ")
    child.sendeof()
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_only_the_standard_library_is_imported():
    """Catches an import that a bare Python does not have."""
    names = re.findall(r"^\s*(?:import|from) (\w+)", SCRIPT.read_text(encoding="utf-8"), re.MULTILINE)
    assert names and set(names) <= sys.stdlib_module_names


# ---- the story -------------------------------------------------------------------------------------------------------


def test_code_of_the_story_runs():
    """Catches a block of old_architecture.md that no longer runs, or whose asserted figures are no longer true."""
    story = (ROOT / "docs" / "old_architecture.md").read_text(encoding="utf-8")
    blocks, names = re.findall(r"^```python\n(.*?)^```", story, re.MULTILINE | re.DOTALL), {}
    assert len(blocks) >= 5
    for block in blocks:
        exec(compile(block, "old_architecture.md", "exec"), names)
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", story):
        assert (ROOT / "docs" / picture).exists(), picture
