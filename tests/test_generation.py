"""Generation: each setting against transformers' processor of that name, the cache against the uncached path."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_model import network
from torch.utils._python_dispatch import TorchDispatchMode

import anexagpt
from anexagpt import (
    Decoder,
    GPTConfig,
    SampleConfig,
    SoloDecoder,
    Tokenizer,
    adjust,
    choose,
    load_model,
    random_source,
    stream,
    window_start,
)
from anexagpt import write as written

V = 40


def some_logits(seed=1, rows=6):
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed)) * 4


def adjusted(logits, cfg, seen=None):
    left = adjust(logits.numpy(), cfg, None if seen is None else seen.numpy())
    assert left.dtype == np.float32
    return torch.from_numpy(left)


def chosen(logits, cfg, seed=1, seen=None):
    generator = torch.Generator().manual_seed(seed)
    return torch.from_numpy(choose(logits.numpy(), cfg, generator, None if seen is None else seen.numpy()))


def some_seen(seed=2, rows=6):
    return torch.rand(rows, V, generator=torch.Generator().manual_seed(seed)) < 0.3


def processors(cfg: SampleConfig) -> list:
    """transformers' own, in the order in which its generate() applies them."""
    t = pytest.importorskip("transformers")
    found = []
    if cfg.repetition_penalty != 1:
        found.append(t.RepetitionPenaltyLogitsProcessor(cfg.repetition_penalty))
    if cfg.temperature != 1:
        found.append(t.TemperatureLogitsWarper(cfg.temperature))
    if cfg.top_k:
        found.append(t.TopKLogitsWarper(cfg.top_k))
    if cfg.top_p < 1:
        found.append(t.TopPLogitsWarper(cfg.top_p))
    if cfg.min_p > 0:
        found.append(t.MinPLogitsWarper(cfg.min_p))
    return found


def theirs(cfg: SampleConfig, logits, seen):
    rows = []
    for row, occurred in zip(logits, seen, strict=True):
        scores, ids = row[None].clone(), occurred.nonzero().T
        for processor in processors(cfg):
            scores = processor(ids, scores)
        rows.append(scores[0])
    return torch.stack(rows)


SETTINGS = [
    *[dict(temperature=t) for t in (0.1, 0.7, 1, 1.5, 50.0)],
    *[dict(top_k=k) for k in (1, 2, 7, V - 1, V, V + 1, 1000)],
    *[dict(top_p=p) for p in (0.0, 0.01, 0.3, 0.9, 0.999)],
    *[dict(min_p=p) for p in (0.001, 0.05, 0.5, 1.0)],
    *[dict(repetition_penalty=r) for r in (0.5, 1.1, 3.0)],
    dict(temperature=0.8, top_k=10, top_p=0.9, min_p=0.05, repetition_penalty=1.3),
    dict(temperature=2.0, top_k=5, top_p=0.5),
    dict(temperature=0.5, top_p=0.8, min_p=0.3),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_settings_equal_transformers(settings):
    """Catches a filter that keeps one character too many or too few, and filters in another order."""
    cfg = SampleConfig(**(dict(temperature=1.0) | settings))
    for seed in range(5):
        logits, seen = some_logits(seed), some_seen(seed)
        before = logits.clone()
        ours, expected = adjusted(logits, cfg, seen), theirs(cfg, logits, seen)
        assert torch.equal(ours.isinf(), expected.isinf())
        assert torch.allclose(ours, expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(logits, before)  # they belong to the caller


@pytest.mark.parametrize("settings", [dict(top_k=3), dict(top_p=0.51), dict(min_p=1.0)], ids=str)
def test_settings_equal_transformers_at_ties(settings):
    """Catches a filter that leaves nothing, or everything, where characters are equally likely."""
    cfg = SampleConfig(**(dict(temperature=1.0) | settings))
    logits = torch.zeros(2, V)
    logits[1, :5] = 3.0
    ours, expected = adjusted(logits, cfg), theirs(cfg, logits, torch.zeros(2, V, dtype=torch.bool))
    # Which of equals top-p keeps is nobody's rule; how many, is.
    left, expected = ours.isfinite().sum(-1), expected.isfinite().sum(-1)
    assert torch.equal(left, expected) and left.all() and (ours[1, :5].isfinite().sum() == left[1]).all()


@pytest.mark.parametrize("settings", [dict(top_k=0), dict(top_p=1.0), dict(min_p=0.0), dict(repetition_penalty=1.0)])
def test_off_is_off(settings):
    """Catches a setting at its neutral value that still changes something."""
    assert torch.equal(adjusted(some_logits(), SampleConfig(temperature=1.0, **settings), some_seen()), some_logits())


@pytest.mark.parametrize("settings", [*SETTINGS, dict(temperature=0.0)], ids=str)
def test_unknown_character_is_never_chosen(settings):
    """Catches U+FFFD in the text, even where it is by far the likeliest, or all the others are ruled out."""
    logits = some_logits()
    logits[:, 0] = 100.0
    seen = torch.zeros(6, V, dtype=torch.bool)
    for seed in range(30):
        ids = chosen(logits, SampleConfig(**settings), seed, seen)
        assert ids.shape == (6,) and (ids > 0).all() and (ids < V).all()


@pytest.mark.parametrize("settings", [dict(temperature=0.0), dict(top_k=1), dict(top_p=0.0), dict(min_p=1.0)], ids=str)
def test_greedy(settings):
    """Catches a greedy choice that is not the likeliest character."""
    expected = some_logits()[:, 1:].argmax(-1) + 1
    assert torch.equal(chosen(some_logits(), SampleConfig(**settings)), expected)


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-40, 1e-300])
def test_tiny_temperatures(temperature):
    """Catches a division that overflows into a traceback: the colder, the greedier."""
    expected = some_logits()[:, 1:].argmax(-1) + 1
    assert torch.equal(chosen(some_logits(), SampleConfig(temperature=temperature)), expected)


def test_greedy_obeys_the_penalty():
    """Catches a penalty that temperature 0 forgets."""
    logits, seen = torch.tensor([[0.0, 2.0, 1.5, -1.0]]), torch.tensor([[False, True, False, False]])
    assert chosen(logits, SampleConfig(temperature=0.0, repetition_penalty=2.0), seen=seen).item() == 2


def test_frequencies():
    """Catches a choice that does not follow the probabilities: 20,000 draws against softmax by hand, 5 sigma."""
    logits = torch.tensor([[9.0, 0.0, 1.0, 2.0]])
    drawn = chosen(logits.repeat(20_000, 1), SampleConfig(temperature=0.5))
    weights = torch.tensor([0.0, 1.0, 7.389056, 54.59815])  # exp of 2 x (0, 1, 2); nothing for id 0
    share = weights / weights.sum()
    counted = torch.bincount(drawn, minlength=4) / 20_000
    assert counted[0] == 0 and torch.allclose(counted, share, atol=5 * (0.25 / 20_000) ** 0.5)


# ---- cache -----------------------------------------------------------------------------------------------------------

SMALL = GPTConfig(31, 24, 3, 4, 32, 0.0)
IN_FLOAT64 = network(SMALL, dtype=torch.float64)


def decoded(decoder, ids, T: int) -> torch.Tensor:
    """Logits of what follows the first T and more of ids (B, 24), the first T read at once, the others one by one."""
    rows = [decoder.read(ids[:, :T]).clone()] + [decoder.step(column).clone() for column in ids[:, T:].unbind(1)]
    return torch.stack(rows, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("T", [1, 2, 17, 24])
@pytest.mark.parametrize("decoder", [Decoder(IN_FLOAT64, 1), Decoder(IN_FLOAT64, 3), SoloDecoder(IN_FLOAT64)])
def test_decoder_equals_the_model(T, decoder):
    """Catches a position, mask or key that is off by one, and any difference between ways to write the network."""
    ids = torch.randint(31, (len(decoder.ids), 24), generator=torch.Generator().manual_seed(3))
    assert torch.allclose(decoded(decoder, ids, T), IN_FLOAT64(ids)[:, T - 1 :], atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("decoder", [Decoder(IN_FLOAT64, 2), SoloDecoder(IN_FLOAT64)])
def test_decoder_used_again(decoder):
    """Catches an old text that shines through a new beginning, and a cache that overflows without a word."""
    ids = torch.randint(31, (len(decoder.ids), 24), generator=torch.Generator().manual_seed(4))
    decoder.read(ids)
    with pytest.raises(IndexError):
        decoder.step(ids[:, 0])
    decoder.read(ids[:1, 5:9])  # one text for all
    got = decoder.step(ids[:, 9])
    for row, last in zip(got, ids[:, 9], strict=True):
        assert torch.allclose(row, IN_FLOAT64(torch.cat((ids[0, 5:9], last[None]))[None])[0, -1], atol=1e-10)


@pytest.mark.parametrize("batch", [1, 3])
def test_decoder_never_waits_for_the_device(batch):
    """Catches a step that asks the device for a number or mixes devices, and shapes that change from step to step.

    The device "meta", which has shapes but no numbers, takes the way of a GPU.
    """
    decoder = Decoder(network(SMALL).to("meta"), batch)
    decoder.read(torch.zeros(1, 5, dtype=torch.long, device="meta"))
    shapes = []

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            result = function(*arguments, **(options or {}))
            shapes[-1].append((str(function), getattr(result, "shape", None)))
            return result

    for _ in range(3):
        shapes.append([])
        with Shapes():
            decoder.step(torch.zeros(batch, dtype=torch.long))
    assert len(shapes[0]) > 50 and shapes[0] == shapes[1] == shapes[2]
    assert decoder.logits.device.type == "meta"


@pytest.mark.cuda
@torch.no_grad()
def test_decoder_on_cuda():
    """Catches a graph that forgets to move on, or a mask that hides or shows one position too many."""
    model = network(SMALL)
    ids = torch.randint(31, (3, 24), generator=torch.Generator().manual_seed(3))
    expected = model(ids)
    for row in (1, 5):
        got = decoded(Decoder(model.cuda(), 3), ids.cuda(), row).cpu()
        assert torch.allclose(got, expected[:, row - 1 :], atol=1e-3)


# ---- context ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [2, 3, 4, 5, 8, 255, 256])
def test_window_start_by_the_rule(T):
    """Catches a context that is too long, or that is not read again from its last half when it is full."""
    start = 0
    for n in range(1, 6 * T):
        if n - start > T:  # full: half of the context goes
            start += T // 2
        assert window_start(n, T) == start and 0 < n - start <= T


@pytest.mark.parametrize("T", [2, 3, 8, 9])
@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 10, 13, 30])
@pytest.mark.parametrize("batch", [1, 3])
def test_stream_equals_the_uncached_path(monkeypatch, T, length, batch):
    """Catches a cache that drifts from the truth, above all past the end of the context: each row of logits is compared
    with that of a network without a cache in float64, while a fixed text is forced upon it."""
    model, exact = (network(GPTConfig(20, T, 2, 2, 16, 0.0)) for _ in range(2))
    exact = exact.double()
    generator = torch.Generator().manual_seed(7)
    text = torch.randint(1, 20, (batch, length + 40), generator=generator)
    text[:, :length] = text[:1, :length]
    seen = []

    def forced(logits, cfg, generator, occurred):
        n = length + len(seen)
        for row, known in zip(text, torch.from_numpy(occurred), strict=True):
            assert known.nonzero().flatten().tolist() == sorted(set(row[:n].tolist()))
        seen.append(torch.tensor(logits))
        return text[:, n].numpy()

    monkeypatch.setattr(anexagpt, "choose", forced)
    cfg = SampleConfig(repetition_penalty=1.5)  # which wants to know what has been seen
    made = list(itertools.islice(stream(model, text[0, :length], cfg, torch.Generator(), batch), 40))
    assert torch.equal(torch.stack(made, dim=1), text[:, length:])
    with torch.no_grad():
        for i, logits in enumerate(seen):
            n = length + i
            expected = exact(text[:, window_start(n, T) : n])[:, -1]
            assert torch.allclose(logits.double(), expected, atol=2e-4), n


def uncached(model, tokenizer, prompt, cfg, generator) -> str:
    """Generation in its simplest form: read the whole context for every character."""
    ids = tokenizer.encode(prompt).tolist()
    first = len(ids)
    for _ in range(cfg.max_new):
        context = ids[window_start(len(ids), model.config.block_size) :]
        seen = torch.zeros(1, model.config.vocab_size, dtype=torch.bool)
        seen[0, ids] = True
        with torch.no_grad():
            logits = model(torch.tensor([context]))[:, -1]
        ids.append(int(choose(logits.numpy(), cfg, generator, seen.numpy())[0]))
    return tokenizer.decode(torch.tensor(ids[first:], dtype=torch.long))


@pytest.fixture(scope="module")
def talker(tiny):
    return load_model(tiny, torch.device("cpu"))[:2]


def text_of(talker, prompt, cfg, batch=1, seed=None) -> list[str]:
    generator = random_source(cfg.seed if seed is None else seed)
    return ["".join(t) for t in zip(*written(*talker, prompt, cfg, generator, batch), strict=True)]


@pytest.mark.parametrize(
    "settings",
    [dict(temperature=0.0), dict(), dict(top_k=5), dict(top_p=0.8, repetition_penalty=1.3), dict(min_p=0.1)],
    ids=str,
)
@pytest.mark.parametrize("prompt", ["t", "the cat ", "Holmes said it was a very big red door at night, "])
def test_text_equals_the_uncached_text(talker, settings, prompt):
    """Catches any difference between generation and its simplest form, over 60 characters with a context of 16."""
    cfg = SampleConfig(max_new=60, seed=11, **settings)
    assert text_of(talker, prompt, cfg) == [uncached(*talker, prompt, cfg, torch.Generator().manual_seed(11))]


def test_seeds_repeat(talker):
    """Catches randomness beside the seed, a seed that changes nothing, and one fixed seed where none is given."""
    cfg = SampleConfig(max_new=50, temperature=1.0)
    one, same, other = (text_of(talker, "the ", cfg, seed=s) for s in (1, 1, 2))
    assert one == same != other
    assert text_of(talker, "the ", cfg) != text_of(talker, "the ", cfg)


def test_many_at_once(talker):
    """Catches texts of one batch that are copies of one another or of different length."""
    texts = text_of(talker, "the ", SampleConfig(max_new=40, temperature=1.0, seed=1), batch=5)
    assert len(set(texts)) == 5 and all(len(t) == 40 for t in texts)
    greedy = SampleConfig(max_new=40, temperature=0.0)
    assert text_of(talker, "the ", greedy, batch=3) == text_of(talker, "the ", greedy) * 3


@pytest.mark.parametrize("n", [0, 1, 2, 100])
def test_length(talker, n):
    """Catches one character too many or too few."""
    assert len(text_of(talker, "the", SampleConfig(max_new=n, seed=1))[0]) == n


def test_empty_prompt(talker):
    """Catches a failure without any context: an empty prompt continues from a line end."""
    cfg = SampleConfig(max_new=30, seed=4)
    assert text_of(talker, "", cfg) == text_of(talker, "\n", cfg)
    without = Tokenizer.of("ab")
    model = network(GPTConfig(3, 8, 1, 1, 8, 0.0))
    assert set(text_of((model, without), "", cfg)[0]) <= {"a", "b"}


def test_pieces_come_one_by_one(talker):
    """Catches text that is held back to the end: each character must be there as soon as it is chosen."""
    pieces = written(*talker, "the", SampleConfig(max_new=10**9, seed=1), random_source(1))
    assert all(len(piece) == 1 for (piece,) in itertools.islice(pieces, 50))


# ---- stop texts ------------------------------------------------------------------------------------------------------


def spoken(monkeypatch, texts: list[str], stops, max_new=None) -> list[str]:
    """What `write` gives where the model would say these texts."""
    tokenizer = Tokenizer.of("abcd")
    ids = torch.stack([tokenizer.encode(t) for t in texts]).long()
    monkeypatch.setattr(anexagpt, "stream", lambda *arguments: iter(ids.unbind(dim=1)))
    cfg = SampleConfig(stop=tuple(stops), max_new=ids.shape[1] if max_new is None else max_new)
    pieces = list(written(None, tokenizer, "a", cfg, torch.Generator(), len(texts)))
    for stop in stops:
        for row in zip(*pieces, strict=True):
            assert stop not in "".join(row)
    return ["".join(row) for row in zip(*pieces, strict=True)]


@pytest.mark.parametrize(
    "text, stops, expected",
    [
        ("abcd", ["c"], "ab"),
        ("abcd", ["bc"], "a"),
        ("abcd", ["abcd"], ""),
        ("abcd", ["a"], ""),
        ("abab", ["abc"], "abab"),
        ("aabaac", ["aac"], "aab"),
        ("ababac", ["abac"], "ab"),
        ("abcabd", ["abd", "d"], "abc"),
        ("aaab", ["aab"], "a"),
        ("abcd", ["d", "bc"], "a"),
        ("dddd", ["abc", "bca"], "dddd"),
    ],
)
def test_stop(monkeypatch, text, stops, expected):
    """Catches a stop text, or its beginning, that is printed, and text that merely looks like one and is lost."""
    assert spoken(monkeypatch, [text], stops) == [expected]


@given(st.text("ab", min_size=1, max_size=14), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_any_stop(text, stops):
    """Catches what the examples forgot: the text ends where the first stop text is complete, without that stop text."""
    with pytest.MonkeyPatch.context() as patch:
        (got,) = spoken(patch, [text], stops)
    ends = [i for i in range(1, len(text) + 1) if any(text[:i].endswith(s) for s in stops)]
    if not ends:
        assert got == text
    else:
        assert got in [text[: ends[0]].removesuffix(s) for s in stops if text[: ends[0]].endswith(s)]


def test_stop_in_a_batch(monkeypatch):
    """Catches one text of a batch that ends the others, or goes on after its end."""
    assert spoken(monkeypatch, ["abcd", "ddcb", "aaaa"], ["c"]) == ["ab", "dd", "aaaa"]


def test_generation_ends_when_all_have_stopped(monkeypatch):
    """Catches characters that are computed for nobody."""
    asked = []
    real = torch.tensor([[1], [2], [3], [1]])

    def counting(*arguments):
        for row in real:
            asked.append(1)
            yield row

    monkeypatch.setattr(anexagpt, "stream", counting)
    cfg = SampleConfig(stop=("b",), max_new=4)
    list(written(None, Tokenizer.of("abc"), "a", cfg, torch.Generator()))
    assert len(asked) == 2


def test_stop_with_the_real_model(talker):
    """Catches a stop text that changes what is generated before it."""
    cfg = SampleConfig(max_new=200, seed=3)
    (full,) = text_of(talker, "the ", cfg)
    for stop in (full[50:53], full[120:126], " "):
        (got,) = text_of(talker, "the ", anexagpt.replace(cfg, stop=(stop,)))
        assert got == full[: full.index(stop)]
