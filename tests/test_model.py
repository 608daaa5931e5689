"""Model: the network against transformers, plain loops in float64, and itself without a cache."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import DEVICES, prose
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from anexagpt import GPT, GPTConfig, KVCache, attention, fast_attention, load, use_fast_attention

SMALL = GPTConfig(vocab_size=31, block_size=24, n_layer=3, n_head=4, n_embd=32, dropout=0.0)


def network(config=SMALL, scale=6.0, dtype=torch.float32) -> GPT:
    """A network without a zero, with weights so large that an error shows in the logits."""
    torch.manual_seed(1)
    model = GPT(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(std=0.1 if weight.dim() == 1 else 0.03 * scale)
            if ".ln_" in f".{name}" and name.endswith("weight"):
                weight.add_(1)
    return model.to(dtype)


def some_ids(*shape, seed=2):
    return torch.randint(31, shape, generator=torch.Generator().manual_seed(seed))


def gpt2(model: GPT):
    """transformers' GPT-2 with the same weights; it stores linear weights transposed."""
    transformers = pytest.importorskip("transformers")
    c = model.config
    shape = dict(n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head)
    config = transformers.GPT2Config(vocab_size=c.vocab_size, **shape, attn_implementation="eager")
    other = transformers.GPT2LMHeadModel(config).eval()
    named = {n: w.T if n[0] == "h" and w.dim() == 2 else w for n, w in model.state_dict().items()}
    missing, other_names = other.transformer.load_state_dict(named, strict=False)
    assert not missing and not other_names
    return other


@pytest.mark.parametrize("T", [1, 7, 24])
def test_logits_equal_transformers(T):
    """Catches a wrong GELU, LayerNorm, order of heads, scale, mask, position or tied head."""
    model, ids = network(), some_ids(3, T)
    with torch.no_grad():
        ours, theirs = model(ids), gpt2(model)(ids).logits
    assert ours.std() > 0.5
    torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=1e-4)


def test_gradients_equal_transformers():
    """Catches a gradient that one path does not get, as with a head that is tied half."""
    model, text = network(scale=3.0), some_ids(4, 18)
    other = gpt2(model)
    for logits in (model(text[:, :-1]), other(text[:, :-1]).logits):
        F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten(), reduction="sum").backward()
    named = dict(other.transformer.named_parameters())
    for name, weight in model.named_parameters():
        grad = named[name].grad
        grad = grad.T if name[0] == "h" and grad.dim() == 2 else grad
        torch.testing.assert_close(weight.grad, grad, atol=2e-3, rtol=1e-3, msg=name)


def by_the_formula(w: dict, ids, H: int, exact: bool):
    """Logits (B, T, V) of GPT-2 with weights `w`; exact: the GELU of training on a CPU."""
    (B, T), C = ids.shape, w["wte.weight"].shape[1]
    norm = lambda x, name: F.layer_norm(x, (C,), w[f"{name}.weight"], w[f"{name}.bias"])  # noqa: E731
    linear = lambda x, name: x @ w[f"{name}.weight"].T + w[f"{name}.bias"]  # noqa: E731
    x = w["wte.weight"][ids] + w["wpe.weight"][:T]
    for i in range(sum(name.endswith("c_fc.weight") for name in w)):
        q, k, v = (
            part.view(B, T, H, C // H).transpose(1, 2)
            for part in linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").split(C, dim=2)
        )
        future = torch.ones(T, T, dtype=torch.bool).triu(1)
        scores = (q @ k.transpose(2, 3) / math.sqrt(C // H)).masked_fill(future, -math.inf)
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, C)
        x = x + linear(y, f"h.{i}.attn.c_proj")
        y = linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
        y = F.gelu(y, approximate="none" if exact else "tanh")
        x = x + linear(y, f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f") @ w["wte.weight"].T


@torch.no_grad()
@pytest.mark.parametrize("training", [False, True])
def test_logits_equal_the_formula(training):
    """Catches what transformers might share with us, and another function in training."""
    model, ids = network(dtype=torch.float64).train(training), some_ids(2, 24)
    expected = by_the_formula(model.state_dict(), ids, 4, exact=training)
    torch.testing.assert_close(model(ids), expected, atol=1e-11, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "T, S", [(1, 24), (5, 24), (24, 24), (1, 600), (5, 600), (600, 600), (1, 1)]
)
@pytest.mark.parametrize("function", [attention, fast_attention])
def test_attention(function, dtype, T, S):
    """Catches a kernel or a mask that is wrong for some shape or number format."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(2, 3, n, 8).to(dtype) for n in (T, S, S))
    scores = q.double() @ k.double().mT / 8**0.5
    future = torch.arange(S) > torch.arange(S - T, S)[:, None]
    expected = scores.masked_fill(future, -math.inf).softmax(-1) @ v.double()
    atol = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(function(q, k, v).double(), expected, atol=atol, rtol=0)


@torch.no_grad()
def test_causality_and_independent_rows():
    """Catches a look ahead, a position that is not seen at all, and rows that mix."""
    model, ids = network(dtype=torch.float64), some_ids(2, 24)
    before = model(ids)
    for t in range(24):
        other = ids.clone()
        other[0, t] = (ids[0, t] + 1) % 31
        changed = (model(other) - before).abs().amax(-1) > 1e-12  # (2, T)
        assert changed.tolist() == [[s >= t for s in range(24)], [False] * 24]


# ---- cache ---------------------------------------------------------------------------------------

EXACT = network(dtype=torch.float64)


@torch.no_grad()
@settings(max_examples=40)
@given(st.integers(1, 3), st.lists(st.integers(1, 24), min_size=1, max_size=24), st.integers(0, 9))
def test_cache_equals_the_uncached_path(batch, sizes, seed):
    """Catches a position, mask or key that is off by one, for any split of a text into parts."""
    ids, cache, start = some_ids(batch, 24, seed=seed), KVCache(EXACT, batch), 0
    expected = EXACT(ids)
    for size in [*sizes, 24]:
        part = ids[:, start : start + size]
        if n := part.shape[1]:
            got, start = EXACT(part, cache), start + n
            torch.testing.assert_close(got, expected[:, start - n : start], atol=1e-10, rtol=0)
    with pytest.raises(IndexError, match="24"):
        EXACT(ids[:, :1], cache)
    cache.length = 0  # used again, for another text: what it had must not shine through
    other = some_ids(batch, 24, seed=seed + 1)
    torch.testing.assert_close(EXACT(other, cache), EXACT(other), atol=1e-10, rtol=0)


# ---- initial weights and dropout -----------------------------------------------------------------


def test_initial_weights(cli, tmp_path):
    """Catches a wrong initialization: a start far from ln V, and blocks that are not identities."""
    (tmp_path / "t.txt").write_text(prose(300))
    rates = ["--muon-learning-rate", 0, "--learning-rate", 0, "--max-steps", 1]
    shape = ["--n-embd", 128, "--block-size", 64, "--n-layer", 1, "--device", "cpu"]
    assert cli("train", "t.txt", *shape, *rates, "--dtype", "float32").status == 0
    model = load("model.safetensors")
    std = {"wte": 0.02, "wpe": 0.02, "c_attn": 1 / 16, "c_fc": 1 / 16, "c_proj": 0.0}
    for name, weight in model.network.state_dict().items():
        if weight.dim() == 2:
            assert float(weight.std()) == pytest.approx(std[name.split(".")[-2]], rel=0.05), name
            assert weight.mean().abs() < 0.002
        else:
            assert (weight == float(name.endswith("weight"))).all(), name
    assert model.metadata.validation_loss == pytest.approx(math.log(26), abs=0.3)


@torch.no_grad()
@pytest.mark.parametrize("p", [0.05, 0.2, 0.9])
def test_dropout(p):
    """Catches a missing dropout, a wrong rate, a missing scale, and one mask for all rows."""
    model, outputs = network(replace(SMALL, n_layer=1, dropout=p)), {}
    for name in ("h.0", "h.0.ln_2", "h.0.attn", "h.0.mlp"):
        hook = lambda *args, name=name: outputs.update({name: args[1:]})  # noqa: E731
        model.get_submodule(name).register_forward_hook(hook)
    ids = some_ids(64, 24)
    model.train()(ids)
    embedded, between = outputs["h.0"][0][0], outputs["h.0.ln_2"][0][0]  # inputs
    places = [(model.wte(ids) + model.wpe.weight, embedded)]
    places += [(outputs["h.0.attn"][1], between - embedded)]
    places += [(outputs["h.0.mlp"][1], outputs["h.0"][1] - between)]
    for before, after in places:
        kept = after.abs() > 1e-5
        torch.testing.assert_close(after[kept], before[kept] / (1 - p), rtol=1e-4, atol=1e-4)
        assert float(kept.float().mean()) == pytest.approx(1 - p, abs=0.01)
        for axes in ((0, 1), (0, 2), (1, 2)):
            assert (kept.float().mean(axes) - 1 + p).abs().max() < 0.12
    assert torch.equal(model.eval()(ids), model(ids))


@torch.no_grad()
@pytest.mark.parametrize("split", [1, 7, 24])
@pytest.mark.parametrize("device", DEVICES)
def test_logits_on_a_device(split, device):
    """Catches a mask of the fused kernel that is wrong, above all for a part after a cache."""
    ids, model = some_ids(3, 24).to(device), network().to(device)
    use_fast_attention(model, torch.float32)
    cache = KVCache(model, 3)
    got = torch.cat([model(part, cache) for part in ids.split(split, dim=1)], dim=1)
    got, ids = got.cpu(), ids.cpu()
    torch.testing.assert_close(got, network()(ids), atol=1e-3, rtol=1e-3)
