"""Model: the network against transformers, float64 and arithmetic by hand."""

import math

import pytest
import torch
from torch.nn import functional as F

from anexagpt import GPT, SIZES, GPTConfig, attention, dropout, loss_of

SMALL = GPTConfig(vocab_size=31, block_size=24, n_layer=3, n_head=4, n_embd=32, dropout=0.0)


def network(config=SMALL, scale=8.0, dtype=torch.float32, seed=1) -> GPT:
    """A network whose weights are all random, so that no part hides behind zeros, and large, so that errors show."""
    torch.manual_seed(seed)
    model = GPT(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape) * 0.02 * (weight.dim() == 2 and weight.abs().max() == 0))
            weight.mul_(scale) if weight.dim() == 2 else weight.add_(torch.randn(weight.shape) * 0.1)
    return model.to(dtype)


def some_ids(*shape, seed=2, config=SMALL):
    return torch.randint(1, config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def test_gelu():
    """Catches another GELU than GPT-2's where a text is read, and one that is far from it where a network learns."""
    mlp, x = network(scale=30.0).h[0].mlp, torch.randn(2, 7, 32) * 3
    expected = mlp.c_proj(F.gelu(mlp.c_fc(x), approximate="tanh"))
    assert torch.equal(mlp.eval()(x), expected)
    # A CPU learns with the exact form: close in value and in slope.
    weight = float(mlp.c_proj.weight.detach().abs().sum(1).max())
    assert (mlp.train()(x) - expected).abs().max() < 0.0005 * weight
    (exact,), (tanh,) = (torch.autograd.grad(y.sum(), mlp.c_fc.bias, retain_graph=True) for y in (mlp(x), expected))
    assert torch.allclose(exact, tanh, atol=0.001 * (2 * 7) * weight)  # summed over 2 x 7 positions


# ---- transformers ----------------------------------------------------------------------------------------------------


def gpt2_of(model: GPT):
    """transformers' GPT-2 with the same weights; its linear weights are stored transposed."""
    transformers = pytest.importorskip("transformers")
    cfg = model.config
    config = transformers.GPT2Config(
        vocab_size=cfg.vocab_size,
        n_positions=cfg.block_size,
        n_embd=cfg.n_embd,
        n_layer=cfg.n_layer,
        n_head=cfg.n_head,
        activation_function="gelu_new",
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="eager",
    )
    other = transformers.GPT2LMHeadModel(config).eval()
    linear = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    weights = {f"transformer.{n}": w.T if n.endswith(linear) else w for n, w in model.state_dict().items()}
    missing, unexpected = other.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    other.tie_weights()
    return other


@pytest.mark.parametrize("T", [1, 7, 24])
def test_logits_equal_transformers(T):
    """Catches a wrong GELU, LayerNorm, head order, scale or tie; at weights x 8, since at first weights errors hide."""
    model = network()
    ids = some_ids(3, T)
    with torch.no_grad():
        ours, theirs = model(ids), gpt2_of(model)(ids).logits
    assert ours.abs().max() > 2
    assert torch.allclose(ours, theirs, atol=2e-5, rtol=1e-5)


def test_loss_and_gradient_equal_transformers():
    """Catches a loss shifted by one, or a gradient that one path does not get, as with a half-tied embedding."""
    model = network(scale=3.0)
    other = gpt2_of(model)
    text = some_ids(4, 17)
    loss_of(model(text[:, :-1]), text[:, 1:]).backward()
    other(text[:, :-1], labels=None)
    theirs = F.cross_entropy(other(text[:, :-1]).logits.flatten(0, 1), text[:, 1:].flatten())
    theirs.backward()
    named = dict(other.named_parameters())
    for name, weight in model.named_parameters():
        grad = named[f"transformer.{name}"].grad
        grad = grad.T if weight.dim() == 2 and name[0] == "h" else grad
        assert torch.allclose(weight.grad, grad, atol=1e-5, rtol=1e-3), name


# ---- properties ------------------------------------------------------------------------------------------------------


def test_names_and_shapes():
    """Catches names that are not GPT-2's, a second copy of the tied weights, and buffers that would be saved."""
    V, T, C = 31, 24, 32
    block = {
        "ln_1.weight": (C,),
        "ln_1.bias": (C,),
        "attn.c_attn.weight": (3 * C, C),
        "attn.c_attn.bias": (3 * C,),
        "attn.c_proj.weight": (C, C),
        "attn.c_proj.bias": (C,),
        "ln_2.weight": (C,),
        "ln_2.bias": (C,),
        "mlp.c_fc.weight": (4 * C, C),
        "mlp.c_fc.bias": (4 * C,),
        "mlp.c_proj.weight": (C, 4 * C),
        "mlp.c_proj.bias": (C,),
    }
    expected = {"wte.weight": (V, C), "wpe.weight": (T, C), "ln_f.weight": (C,), "ln_f.bias": (C,)}
    expected |= {f"h.{i}.{name}": shape for i in range(3) for name, shape in block.items()}
    assert {name: tuple(w.shape) for name, w in GPT(SMALL).state_dict().items()} == expected


@pytest.mark.parametrize("shape", [dict(), *SIZES.values()], ids=["tiny", *SIZES])
def test_number_of_parameters(shape):
    """Catches a printed number of parameters that is not the network's."""
    config = GPTConfig(65, **shape)
    with torch.device("meta"):
        assert config.n_parameters() == sum(p.numel() for p in GPT(config).parameters())


def test_causality_bit_by_bit():
    """Catches the smallest look ahead: after a change at t, all logits before t must be the same bits."""
    model = network()
    ids = some_ids(2, 24)
    with torch.no_grad():
        before = model(ids)
        for t in range(24):
            other = ids.clone()
            other[:, t] = (ids[:, t] + 1) % 31
            after = model(other)
            assert torch.equal(before[:, :t], after[:, :t])
            assert (before[:, t:] != after[:, t:]).flatten(2).any(-1).all()  # and every later position does see it


def test_rows_of_a_batch_do_not_mix():
    """Catches a wrong view that lets one text of a batch see another."""
    model = network()
    ids = some_ids(3, 24)
    with torch.no_grad():
        together = model(ids)
        for i in range(3):
            assert torch.allclose(together[i], model(ids[i : i + 1])[0], atol=1e-5)


@pytest.mark.parametrize("V", [20, 65, 1000])
def test_loss_at_start(V):
    """Catches a wrong initialisation: before training, every character is about equally likely, so the loss is ln V."""
    torch.manual_seed(1)
    config = GPTConfig(V, 64, 4, 4, 128, 0.0)
    ids = torch.randint(0, V, (8, 65))
    with torch.no_grad():
        loss = loss_of(GPT(config)(ids[:, :-1]), ids[:, 1:])
    assert float(loss) == pytest.approx(math.log(V), abs=0.16)


def test_loss_by_hand():
    """Catches a loss in bits, summed instead of averaged, or in half precision."""
    logits = torch.tensor([[[0.0, math.log(3.0)], [0.0, 0.0]]])
    assert float(loss_of(logits, torch.tensor([[1, 0]]))) == pytest.approx((math.log(4 / 3) + math.log(2)) / 2)
    assert loss_of(logits.bfloat16(), torch.tensor([[1, 0]])).dtype == torch.float32


@pytest.mark.parametrize("T", [1, 2, 9])
def test_attention_equals_pytorchs_own(T):
    """Catches a wrong scale or mask in the attention written out for the CPU."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = torch.randn(3, 2, 3, T, 8, generator=generator, dtype=torch.float64) * 3
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.allclose(attention(q, k, v), expected, atol=1e-12)


def test_attention_of_huge_scores():
    """Catches a softmax that overflows."""
    q = torch.full((1, 1, 2, 4), 1e4)
    assert torch.equal(attention(q, q, torch.ones(1, 1, 2, 4)), torch.ones(1, 1, 2, 4))


def test_dropout():
    """Catches dropout at inference, and a dropout that does nothing in training."""
    config = GPTConfig(31, 24, 1, 1, 32, dropout=0.5)
    model = network(config)
    ids = some_ids(2, 24)
    plain = network(GPTConfig(31, 24, 1, 1, 32, dropout=0.0))
    with torch.no_grad():
        assert torch.equal(model(ids), plain(ids))
        assert torch.equal(model(ids), model(ids))
        model.train()
        assert not torch.equal(model(ids), model(ids))


@pytest.mark.parametrize("p", [0.1, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(1001, 37), (3, 5, 2501)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_share_of_dropped_values(p, shape, dtype):
    """Catches a dropout of another share, one that changes the mean, one by rows, and a gradient of other values."""
    torch.manual_seed(1)
    x = torch.ones(shape, dtype=dtype, requires_grad=True)
    y = dropout(x, p, True)
    y.sum().backward()
    y = y.detach()
    kept = (y != 0).double()
    n, sigma = y.numel(), (p * (1 - p) / y.numel()) ** 0.5
    assert y.dtype == dtype and torch.equal(x.grad, y) and len(y.unique()) == 2
    assert float(kept.mean()) == pytest.approx(1 - p, abs=5 * sigma + 1 / 500)  # a share in steps of 1/256 is fine
    assert float(y.double().mean()) == pytest.approx(1, abs=6 * sigma / (1 - p) + (dtype == torch.bfloat16) / 200)
    row = kept.flatten(0, -2)
    assert float(row.mean(0).std()) < 2 * (p * (1 - p) / row.shape[0]) ** 0.5  # no column is dropped more often
    assert float((kept.flatten()[1:] * kept.flatten()[:-1]).mean()) == pytest.approx((1 - p) ** 2, abs=20 / n**0.5 / 4)
    assert not torch.equal(dropout(x, p, True), y)
    assert torch.equal(dropout(x, 0.0, True), x) and torch.equal(dropout(x, p, False), x)


def test_context_too_long():
    """Catches positions that silently wrap round or read beyond the table."""
    model = network()
    assert model(some_ids(1, 24)).shape == (1, 24, 31)
    with pytest.raises(IndexError, match="24"):
        model(some_ids(1, 25))


@pytest.mark.cuda
def test_cuda_equals_the_cpu():
    """Catches an attention kernel or mask that is right on one device only."""
    model, ids = network(), some_ids(2, 24)
    with torch.no_grad():
        expected = model(ids)
        assert torch.allclose(model.cuda()(ids.cuda()).cpu(), expected, atol=1e-3)
