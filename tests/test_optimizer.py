"""Optimizer: the schedule by hand, Muon against PyTorch's own and against exact arithmetic."""

from itertools import chain
from types import SimpleNamespace

import pytest
import torch

from anexagpt import GPT, GPTConfig, Muon, TrainConfig, Trainer, learning_rate, orthogonalise


def test_schedule_by_hand():
    """Catches a warm-up or a decay that is off by one step."""
    cfg = TrainConfig(max_steps=10, warmup_steps=4)
    rates = [learning_rate(step, cfg) for step in range(10)]
    assert rates == pytest.approx([1 / 4, 2 / 4, 3 / 4, 1, *((n / 6) ** 1.5 for n in (6, 5, 4, 3, 2, 1))])


@pytest.mark.parametrize(
    "max_steps, warmup, expected",
    [
        (1, 0, [1]),
        (3, 0, [1, (2 / 3) ** 1.5, (1 / 3) ** 1.5]),
        (2, 2, [1 / 2, 1]),
        (2, 8, [1 / 8, 2 / 8]),
        (3, 1, [1, 1, (1 / 2) ** 1.5]),
        (1, 100, [1 / 100]),
    ],
)
def test_schedule_corners(max_steps, warmup, expected):
    """Catches a division by zero, or a rate above 1, where warm-up is absent or as long as the training."""
    cfg = TrainConfig(max_steps=max_steps, warmup_steps=warmup)
    assert [learning_rate(step, cfg) for step in range(max_steps)] == pytest.approx(expected)


@pytest.mark.parametrize("step", [-1, 10, 11])
def test_schedule_outside(step):
    """Catches a negative rate after the end, which would undo the training."""
    with pytest.raises(ValueError, match=str(step)):
        learning_rate(step, TrainConfig(max_steps=10))


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 4, 20), (2, 20, 4), (7, 8, 16), (1, 1, 5)])
def test_orthogonalise_exactly(shape):
    """Catches a wrong coefficient or product: the iteration is a polynomial of the singular values, done in float64."""
    X = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    U, S, Vh = torch.linalg.svd(X.double(), full_matrices=False)
    S = S / S.square().sum(-1, keepdim=True).sqrt()
    for _ in range(5):
        S = 3.4445 * S - 4.7750 * S**3 + 2.0315 * S**5
    assert torch.allclose(orthogonalise(X).double(), U @ S.diag_embed() @ Vh, atol=1e-4)
    assert float(S.min()) > 0.3 and float(S.max()) < 1.3


def test_orthogonalise_of_nothing():
    """Catches a division by zero: the first gradients of half of the matrices are zero."""
    assert torch.equal(orthogonalise(torch.zeros(2, 4, 8)), torch.zeros(2, 4, 8))


SHAPES = [(16, 16), (48, 16), (16, 64), (64, 16), (16, 16), (64, 16), (16, 48), (1, 16), (45, 15), (15, 60)]


def test_muon_equals_pytorchs_own():
    """Catches wrong momentum, decay, rate or grouping in the stacked Muon; 20 steps of a changing rate.

    A tall matrix is to move as its groups of rows do, each of half as many as there are columns, or of as many if that
    is an odd number.
    """
    generator = torch.Generator().manual_seed(3)
    ours = [torch.nn.Parameter(torch.randn(s, generator=generator) * 0.1) for s in SHAPES]
    groups = [len(p) if len(p) <= p.shape[1] else {16: 8, 15: 15}[p.shape[1]] for p in ours]
    theirs = [[torch.nn.Parameter(g.clone()) for g in p.detach().split(n)] for p, n in zip(ours, groups, strict=True)]
    first = [p.detach().clone() for p in ours]
    peak, decay = 0.02, 0.5
    muon = Muon(ours, peak, decay, torch.bfloat16, momentum=0.95)
    other = torch.optim.Muon(chain(*theirs), lr=peak, weight_decay=decay, momentum=0.95, nesterov=True)
    for step in range(20):
        rate = 1 - step / 20
        for p, n, parts in zip(ours, groups, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=generator) + 0.3
            for part, grad in zip(parts, p.grad.split(n), strict=True):
                part.grad = grad.clone()
        muon.step(torch.tensor([rate]))
        other.param_groups[0]["lr"] = peak * rate
        other.step()
    for p, parts, start in zip(ours, theirs, first, strict=True):
        p, q = p.detach(), torch.cat(parts).detach()
        moved = float((q - start).norm())
        assert float((p - q).norm()) < 0.02 * moved, p.shape  # bfloat16's rounding, in another order


def test_muon_decay_by_hand():
    """Catches decay that is coupled to the gradient, or that does not follow the rate."""
    weight = torch.nn.Parameter(torch.full((2, 2), 4.0))
    weight.grad = torch.zeros(2, 2)
    Muon([weight], lr=0.5, weight_decay=0.1, dtype=torch.float32).step(torch.tensor([0.25]))
    assert torch.allclose(weight, torch.full((2, 2), 4.0 * (1 - 0.5 * 0.1 * 0.25)))


def trainer(**settings) -> Trainer:
    config = GPTConfig(9, 8, 2, 2, 16, 0.0)
    cfg = TrainConfig(**(dict(max_steps=4, batch_size=2) | settings))
    ids = torch.randint(1, 9, (300,), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    return Trainer(config, cfg, ids, torch.device("cpu"), torch.float32)


def test_who_gets_which_optimizer():
    """Catches a weight that no optimizer moves, one that two move, and embeddings that Muon would orthogonalise."""
    it = trainer()
    names = {id(p): name for name, p in it.model.named_parameters()}
    muon = sorted(names[id(p)] for stack in it.muon.stacks for p in stack)
    adamw = sorted(names[id(p)] for group in it.adamw.param_groups for p in group["params"])
    matrices = [f"h.{i}.{m}.weight" for i in (0, 1) for m in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]
    assert muon == sorted(matrices)
    assert sorted(muon + adamw) == sorted(names.values())
    assert "wte.weight" in adamw and "wpe.weight" in adamw and "h.0.ln_1.weight" in adamw


def test_adamw_does_not_decay():
    """Catches decay of embeddings, LayerNorms and biases, which the help of --weight-decay excludes."""
    it = trainer(weight_decay=10.0)
    others = [p for group in it.adamw.param_groups for p in group["params"]]
    before = [p.detach().clone() for p in others]
    for p in it.model.parameters():
        p.grad = torch.zeros_like(p)
    it.adamw.param_groups[0]["lr"].fill_(0.1)
    it.adamw.step()
    assert all(torch.equal(p, q) for p, q in zip(others, before, strict=True))


@pytest.mark.parametrize("parts", [2, 3, 6])
def test_gradient_accumulation_equals_the_whole_batch(parts):
    """Catches parts that are summed instead of averaged, or cut at the wrong place; the judge is float64."""
    it = trainer(batch_size=6, grad_accum=parts)
    with torch.no_grad():
        for p in it.model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    exact = GPT(it.model.config).double()
    exact.load_state_dict({k: v.double() for k, v in it.model.state_dict().items()})
    seen = {}

    def note(rate):
        seen.update({name: p.grad.clone() for name, p in it.model.named_parameters()})

    it.adamw.step, it.muon = lambda: None, SimpleNamespace(step=note)
    it.update()
    text = it.text[0].long()  # (B, T + 1); tests of the training say that it is the right one
    logits = exact(text[:, :-1])
    loss = torch.stack([-logits.log_softmax(-1)[b, t, text[b, t + 1]] for b in range(6) for t in range(8)]).mean()
    loss.backward()
    assert float(it.losses[0]) == pytest.approx(loss.item(), abs=1e-5)
    for name, p in exact.named_parameters():
        assert torch.allclose(seen[name].double(), p.grad, atol=2e-6, rtol=1e-3), name


def test_rates_reach_the_optimizers():
    """Catches a schedule that only one of the optimizers follows, or that lags a step behind."""
    it, seen = trainer(max_steps=4, warmup_steps=2, learning_rate=0.008), []
    it.muon = SimpleNamespace(step=lambda rate: seen.append((float(rate), float(it.adamw.param_groups[0]["lr"]))))
    for _ in range(4):
        it.update()
    assert [rate for rate, _ in seen] == pytest.approx([0.5, 1, 1, 0.5**1.5])
    assert [lr for _, lr in seen] == pytest.approx([0.004, 0.008, 0.008, 0.008 * 0.5**1.5])
