"""Generation: sampling against transformers, the cache against no cache, and the Model object."""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import DEVICES, ROOT, TINY, start
from hypothesis import example, given
from hypothesis import strategies as st
from test_model import gpt2, network

import anexagpt
from anexagpt import GPTConfig, SampleConfig, UserError, generate_ids, load, process_logits, sample

V = 40
LOGITS = np.random.default_rng(1).normal(size=(6, V)).astype("f4") * 3
TEXTS = np.random.default_rng(2).integers(0, 4, (6, 60))  # few ids, so that n-grams repeat


def drawn(logits, seed=0, texts=None, **settings):
    texts = np.zeros((len(logits), 1), int) if texts is None else texts
    rngs = [np.random.default_rng(seed)] * len(logits)
    return sample(logits, SampleConfig(**settings), rngs, texts)


SETTINGS = [dict(temperature=0.5), dict(temperature=3.0), dict(top_k=7), dict(top_k=V + 1)]
SETTINGS += [dict(top_p=0.0), dict(top_p=0.6), dict(top_p=0.97), dict(min_p=0.05), dict(min_p=1.0)]
SETTINGS += [dict(repetition_penalty=1.7), dict(repetition_penalty=0.5)]
SETTINGS += [dict(temperature=0.7, top_k=12, top_p=0.9, min_p=0.02, repetition_penalty=1.3)]
SETTINGS += [dict(no_repeat_ngram_size=n) for n in (1, 2, 3, 60, 61)]
SETTINGS += [dict(temperature=0.7, repetition_penalty=1.2, no_repeat_ngram_size=2, top_k=9)]
SETTINGS += [dict(temperature=2.0, top_k=30, top_p=0.8, min_p=0.1)]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_settings_equal_transformers(settings):
    """Catches a wrong filter, an off-by-one, another order of the settings, and id 0 drawn."""
    t = pytest.importorskip("transformers")
    cfg, rows = SampleConfig(**(dict(temperature=1.0) | settings)), []
    processors = [t.RepetitionPenaltyLogitsProcessor(cfg.repetition_penalty)]
    if cfg.no_repeat_ngram_size:
        processors += [t.NoRepeatNGramLogitsProcessor(cfg.no_repeat_ngram_size)]
    processors += [t.TemperatureLogitsWarper(cfg.temperature), t.TopKLogitsWarper(cfg.top_k or V)]
    processors += [t.TopPLogitsWarper(cfg.top_p), t.MinPLogitsWarper(cfg.min_p)]
    for logits, text in zip(LOGITS, TEXTS, strict=True):
        rows.append(torch.from_numpy(logits.copy())[None])
        for processor in processors:
            rows[-1] = processor(torch.from_numpy(text)[None], rows[-1])
    before = LOGITS.copy()
    np.testing.assert_allclose(process_logits(LOGITS, cfg, TEXTS), torch.cat(rows), rtol=1e-5)
    logits = LOGITS.copy()
    logits[:, 0] = 100.0  # U+FFFD is by far the likeliest, and must not decide about the others
    ids = np.stack([drawn(logits, seed, TEXTS, **settings) for seed in range(20)])
    assert ids.shape == (20, 6) and ids.min() > 0 and (before == LOGITS).all()


GREEDY = [dict(temperature=0.0), dict(top_k=1), dict(top_p=0.0), dict(min_p=1.0)]
GREEDY += [dict(temperature=t) for t in (1e-6, 1e-40, 1e-300)]


@pytest.mark.parametrize("settings", GREEDY, ids=str)
def test_greedy(settings):
    """Catches a greedy choice that is not the likeliest, and temperatures that overflow."""
    expected = LOGITS[:, 1:].argmax(-1) + 1
    assert (drawn(LOGITS, **settings) == expected).all()
    texts = expected[:, None]
    assert (drawn(LOGITS, texts=texts, repetition_penalty=100.0, **settings) != expected).all()
    assert (drawn(LOGITS, texts=texts, no_repeat_ngram_size=1, **settings) != expected).all()


def test_no_piece_occurs_twice(tiny):
    """Catches a loop at temperature 0, in a batch and beyond the context, and a text that ends
    where every character would repeat something."""
    model = load(tiny)
    looping = model.generate("the", temperature=0.0, max_new=400)
    n = 8
    for text in (
        looping,
        model.generate("the", temperature=0.0, max_new=400, no_repeat_ngram_size=n),
    ):
        pieces = [text[i : i + n] for i in range(len(text) - n + 1)]
        assert (len(set(pieces)) == len(pieces)) == (text != looping)
    assert len(model.generate("the", max_new=2_000, no_repeat_ngram_size=1)) == 2_000
    assert "\ufffd" not in model.generate("the", max_new=500, no_repeat_ngram_size=1)


def test_frequencies():
    """Catches draws that do not follow the probabilities: 40,000 against softmax, 5 sigma."""
    logits = np.array([[9.0, 0.0, 1.0, 2.0]]).repeat(40_000, axis=0)
    counts = np.bincount(drawn(logits, temperature=0.5), minlength=4) / 40_000
    share = np.array([0, 1, np.e**2, np.e**4]) / (1 + np.e**2 + np.e**4)
    assert counts[0] == 0 and np.abs(counts - share).max() < 5 * (0.25 / 40_000) ** 0.5


# ---- cache ---------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("T", [2, 3, 8, 9])
@pytest.mark.parametrize("length", [1, 8, 10, 30])
@pytest.mark.parametrize("batch", [1, 3])
def test_every_step_equals_the_uncached_path(monkeypatch, T, length, batch):
    """Catches a cache that drifts, above all beyond the end of the context, in both paths.

    A fixed text is drawn, whatever the logits are. One text is decoded with NumPy.
    """
    model, steps = network(GPTConfig(20, T, 2, 2, 16, 0.0), dtype=torch.float64), []
    text = np.random.default_rng(7).integers(1, 20, (batch, length + 30))
    text[:, :length] = text[0, :length]

    def forced(logits, cfg, rngs, texts):
        steps.append((logits.copy(), texts.copy()))
        return text[:, length + len(steps) - 1]

    monkeypatch.setattr(anexagpt, "sample", forced)
    cfg = SampleConfig(repetition_penalty=2.0 if batch == 1 else 0.5)
    decode = anexagpt.NumpyDecoder(model) if batch == 1 else anexagpt.decode
    ids = generate_ids(model, text[0, :length], cfg, [None] * batch, decode)
    assert (np.stack([*itertools.islice(ids, 30)], axis=1) == text[:, length:]).all()
    start = 0
    for n in range(1, length + 30):
        if n - start > T:  # the context is full: its first half goes
            start += T // 2
        if n >= length:
            logits, texts = steps[n - length]
            expected = model(torch.from_numpy(text[:, start:n]))[:, -1]
            np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)
            assert (texts == text[:, :n]).all()


@pytest.fixture(scope="module")
def model(tiny):
    return load(tiny)


@torch.no_grad()
@pytest.mark.parametrize("prompt", ["t", "Holmes said it was night"])
def test_greedy_text_equals_transformers(model, prompt):
    """Catches a wrong character, position or context on the way from logits to a text."""
    other, text, start = gpt2(model.network), prompt, 0
    while len(text) < len(prompt) + 60:
        start += 8 * math.ceil(max(0, len(text) - start - 16) / 8)  # half of the context goes
        ids = torch.from_numpy(model.tokenizer.encode(text[start:]).astype("i8"))[None]
        text += model.tokenizer.characters[int(other(ids).logits[0, -1, 1:].argmax()) + 1]
    assert prompt + model.generate(prompt, temperature=0, max_new=60) == text


def test_prompts(model):
    """Catches a failure without a context, and a prompt that is not read by its end."""
    generate = lambda x: [model.generate(x, seed=s, max_new=30) for s in range(9)]  # noqa: E731
    assert generate("") == generate("\n") != generate("t")
    with pytest.raises(UserError, match="knows none"):
        model.generate("\u4e00")
    assert generate("Caf\u00e9") == generate("cafe")
    long = "Watson ran. " * 9 + "the cat "  # 116 characters: 16 - 12 are left of a context of 16
    assert generate(long) == generate("x" * 100 + long[-12:]) != generate("x" * 100 + long[-11:])


def test_seeds(cli, tiny, model):
    """Catches randomness beside the seed, and texts that depend on how many there are."""
    texts = [model.generate("the ", seed=s, max_new=40) for s in (1, 1, 2, None, None)]
    assert texts[0] == texts[1] and len(set(texts)) == 4 and {len(t) for t in texts} == {40}
    command = "generate", "the ", "--model", tiny, "--seed", 1, "-n", 40
    one = cli(*command)
    assert one.status == 0 and one.out == f"the {texts[0]}\n" and one.err == ""
    two, three = (cli(*command, "-k", k).out.split("\n" + "-" * 40 + "\n") for k in (2, 3))
    assert [f"the {texts[0]}", two[1], ""] == two and two[:2] == three[:2] and len(set(three)) == 4
    assert cli(*command, "-n", 0).out == "the \n"


@given(st.text("ab", max_size=14), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
@example("aab", ["b", "ab"])
def test_stop(model, text, stops):
    """Catches a stop text that is written, even in part, and text that only looks like one.

    The text ends before the stop text that is complete first, of several the longest.
    """
    with pytest.MonkeyPatch.context() as patch:
        ids = ([i] for i in model.tokenizer.encode(text + "c" * 9))
        patch.setattr(anexagpt, "generate_ids", lambda *arguments: ids)
        pieces = list(model.stream("a", max_new=len(text), stop=tuple(stops)))
    expected = text
    for end in range(len(text), 0, -1):
        ending = [s for s in stops if text[:end].endswith(s)]
        expected = text[: end - max(map(len, ending))] if ending else expected
    assert "".join(pieces) == expected
    held = max(map(len, stops), default=1) - 1
    for n in range(len(pieces)):  # not held back for longer than a stop text may need
        assert len("".join(pieces[: n + 1])) >= min(n + 1 - held, len(expected))


def test_stop_in_a_batch(cli, tiny):
    """Catches a text that ends the others, goes on after its end, or changes before it."""
    command = "generate", "the ", "--model", tiny, "--seed", 3, "-n", 90, "-k", 4
    full = cli(*command).out.split("\n" + "-" * 40 + "\n")
    stops = ["--stop", "at", "--stop", r".\n"]
    cut = cli(*command, *stops).out.split("\n" + "-" * 40 + "\n")
    for one, other in zip(full, cut, strict=True):
        ends = [one.find(stop) for stop in ("at", ".\n") if stop in one]
        assert other == one[: min(ends, default=None)]
    assert len({len(text) for text in cut[:-1]}) > 1


# ---- library -------------------------------------------------------------------------------------

SCRIPT = """
import signal, sys
numbers = signal.valid_signals()
before = [signal.getsignal(n) for n in numbers]
import anexagpt
model = anexagpt.load("model.safetensors")
print("".join(model.stream("the ", max_new=50, seed=1)), end="")
model.save("copy.safetensors")
assert [signal.getsignal(n) for n in numbers] == before, "signal handlers"
assert "torch._dynamo" not in sys.modules, "its import takes a second or more"
"""


def test_library(tmp_path, tiny, model):
    """Catches an import that prints or installs signal handlers, and a save that changes a bit."""
    (tmp_path / "model.safetensors").write_bytes(tiny.read_bytes())
    (tmp_path / "script.py").write_text(SCRIPT)
    env = dict(PYTHONPATH=str(ROOT))
    result = start(cwd=tmp_path, program=tmp_path / "script.py", env=env)
    expected = model.generate("the ", max_new=50, seed=1)
    assert (result.status, result.out, result.err) == (0, expected, "")
    copy, old = load(tmp_path / "copy.safetensors"), model.network.state_dict()
    assert copy.metadata == model.metadata
    assert all(torch.equal(old[name], p) for name, p in copy.network.state_dict().items())


def test_library_errors(model, tmp_path):
    """Catches a traceback from the depths where the command line has a message with a fix."""
    with pytest.raises(UserError, match=r"nothing\.safetensors"):
        load(tmp_path / "nothing.safetensors")
    with pytest.raises(UserError, match=r"`temperature=-1`"):
        model.generate("the", temperature=-1)


@pytest.mark.parametrize("device", DEVICES[1:])  # on a CPU it would be compared with itself
def test_generation_on_a_device(cli, tiny, device):
    """Catches a cache or sampling that differs on CUDA, alone and in a batch."""
    greedy = "generate", "the ", "--model", tiny, "--temperature", 0, "-n", 60
    for batch in ([], ["-k", 3]):
        on_cpu = cli(*greedy, *batch, "--device", "cpu")
        assert cli(*greedy, *batch, "--device", device) == on_cpu and on_cpu.status == 0


@pytest.mark.parametrize("device", DEVICES[1:])  # a CPU has no graphs
def test_cuda_graph_equals_eager(cli, tiny, monkeypatch, device):
    """Catches a graph that replays an old batch or rate, or misses an update."""
    data, losses = tiny.parent / "prose.txt", []
    options = [*TINY, "--device", device, "--max-steps", 30, "--eval-interval", 5, "--dropout", 0]
    for out in ("graph.safetensors", "eager.safetensors"):
        if out == "eager.safetensors":
            monkeypatch.setattr(anexagpt, "CudaGraph", lambda update: update)
        assert cli("train", data, *options, "--out", out).status == 0
        losses.append(load(out).metadata.history)
    np.testing.assert_allclose(*losses, rtol=1e-4)


def test_empty_prompt_without_a_line_end(model):
    """Catches a text of one line whose model begins with U+FFFD, which no training has seen."""
    tokenizer = anexagpt.Tokenizer("\ufffd abcdefgh")
    other = anexagpt.Model(network(GPTConfig(10, 16, 1, 2, 16)), tokenizer, model.metadata)
    for seed in range(5):
        text = other.generate("", seed=seed, max_new=20, temperature=1.0)
        assert text == other.generate(" ", seed=seed, max_new=20, temperature=1.0)


def test_settings_against_repetition_look_back_10_000_characters():
    """Catches 900 MB and minutes for n-grams of a pasted book."""
    cfg = SampleConfig(temperature=1.0, no_repeat_ngram_size=2)
    logits = np.zeros((1, 4))
    for n, expected in ((9_998, 2), (20_000, 3)):
        text = np.array([[3, 1, *(2 for _ in range(n - 3)), 3]])  # "3 1" was n characters ago
        allowed = np.isfinite(process_logits(logits, cfg, text))
        assert allowed[0, 1:].sum() == expected


def test_top_p_of_equal_ones():
    """Catches one more than reach the probability together."""
    cfg = SampleConfig(temperature=1.0, top_p=0.5)
    kept = np.isfinite(process_logits(np.zeros((1, 4)), cfg, np.zeros((1, 1), int)))
    assert kept.sum() == 2


def test_nothing_is_drawn_after_a_stop_text(model, monkeypatch):
    """Catches an answer that ends for its reader, and goes on for the computer."""
    drawn = []
    ids = model.tokenizer.encode("a cat ran home " * 99)
    endless = ((drawn.append(i), ids[i : i + 1])[1] for i in range(len(ids)))
    monkeypatch.setattr(anexagpt, "generate_ids", lambda *_: endless)
    assert model.generate("a", max_new=1_000, stop="cat") == "a "
    assert len(drawn) == 5


def test_how_far_settings_look_back(model, monkeypatch):
    """Catches a text that grows without limit while it is written."""
    monkeypatch.setattr(anexagpt, "MAX_TEXT", 20)
    lengths = []

    def noted(logits, cfg, rngs, texts):
        lengths.append(texts.shape[1])
        return sample(logits, cfg, rngs, texts)

    monkeypatch.setattr(anexagpt, "sample", noted)
    model.generate("the", max_new=60)
    assert max(lengths) == 20
