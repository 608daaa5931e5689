"""Training: a run from the command line equals a run by hand, and no interruption changes it."""

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DEVICES, TINY, header, interrupt_at, prose
from safetensors.torch import load_file
from test_model import by_the_formula

import anexagpt
from anexagpt import (
    GPT,
    Corpus,
    GPTConfig,
    TrainConfig,
    Trainer,
    context_length,
    cross_entropy_sum,
    evaluate,
    load,
    lr_scale,
    newton_schulz,
    resolve,
    split_ids,
    train,
)

OPTIONS = [*TINY, "--dropout", 0]


@pytest.fixture
def text(tmp_path) -> str:
    """A text of two pages in the working folder, with U+FFFD here and there."""
    words = prose(250)
    content = "".join("\ufffd" if i % 41 == 7 else c for i, c in enumerate(words))
    (tmp_path / "t.txt").write_text(content, encoding="utf-8", newline="\n")
    return content


def metadata(path: str) -> dict:
    names = ("config", "training", "step", "history", "validation_loss")
    return {k: json.loads(header(Path(path))["__metadata__"][k]) for k in names}


# ---- a run by hand -------------------------------------------------------------------------------


def mean_loss(w: dict, ids, H: int) -> float:
    """Mean of -log p of all known characters but the first, window by window."""
    T, losses = w["wpe.weight"].shape[0], []
    for start in range(0, len(ids) - 1, T):
        part = torch.tensor(ids[start : start + T + 1])
        logp = by_the_formula(w, part[None, :-1], H, exact=False)[0].log_softmax(-1)
        losses += [-logp[t, c].item() for t, c in enumerate(part[1:].tolist()) if c != 0]
    return sum(losses) / len(losses)


def orthogonalized(X):
    """Newton-Schulz as a function of the singular values."""
    U, S, Vh = torch.linalg.svd(X, full_matrices=False)
    S = S / S.square().sum(-1, keepdim=True).sqrt().clamp(min=1e-7)
    for a, b, c in anexagpt.POLYNOMIALS:
        S = a * S + b * S**3 + c * S**5
    return U @ S.diag_embed() @ Vh


def run_by_hand(w: dict, ids: list[int], H: int, steps: int, exact: bool, **rates):
    """The mean weights after each step of 4 windows, and its loss, from the rules in the docs."""
    T, n, moments, mean = w["wpe.weight"].shape[0], len(ids) * 9 // 10, {}, w
    windows, epoch, factor = [], 0, 1.0 if steps * 4 * T / n < 4 else 1.15
    while len(windows) < steps * 4:  # each epoch: a random phase, then a permutation
        rng, count = np.random.default_rng((7, epoch)), (n - T - 1) // T
        phase = int(rng.integers(0, n - T * count))
        windows += [phase + T * int(i) for i in rng.permutation(count)]
        epoch += 1
    warmup, losses, trajectory = min(rates["warmup"], steps // 10), [], []
    for step in range(steps):
        starts = windows[step * 4 : (step + 1) * 4]
        part = torch.tensor([ids[s : s + T + 1] for s in starts])
        w = {name: p.detach().requires_grad_() for name, p in w.items()}
        logp = (factor * by_the_formula(w, part[:, :-1], H, exact)).log_softmax(-1)
        chosen = logp.gather(2, part[:, 1:, None])[:, :, 0][part[:, 1:] != 0]
        (-chosen.mean()).backward()
        losses.append(-chosen.mean().item())
        decay = 0.2 + 0.8 * ((steps - step) / (steps - warmup)) ** 1.5
        scale, new = (step + 1) / warmup if step < warmup else decay, {}
        for name, p in w.items():
            g, (m, v) = p.grad, moments.get(name, (torch.zeros_like(p), torch.zeros_like(p)))
            # v: of Muon the slow momentum, of Adam the mean square
            if name.startswith("h.") and p.dim() == 2:  # Muon, in groups of rows
                m, rate = 0.9 * m + 0.1 * g, min(0.1, 25 / (step + 1))
                v = (1 - rate) * v + rate * g
                rows, C = p.shape
                rows = rows if rows <= C else C // 2 if C % 2 == 0 else C
                update = [orthogonalized(x) for x in (0.9 * m + 0.1 * g + 2 * v).split(rows)]
                lr = 2 * rates["muon"] * scale if step % 2 == 0 else 0
                new[name] = p * (1 - lr * rates["decay"]) - lr * torch.cat(update)
            else:  # Adam
                m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
                unbiased = (v / (1 - 0.99 ** (step + 1))).sqrt() + 1e-8
                new[name] = p - rates["adam"] * scale * m / (1 - 0.9 ** (step + 1)) / unbiased
            moments[name] = m.detach(), v.detach()
        w = {name: p.detach() for name, p in new.items()}
        share = min(1, 8 / (step + 1))
        mean = {name: (1 - share) * mean[name] + share * p for name, p in w.items()}
        trajectory.append(mean)
    return trajectory, losses


@pytest.mark.parametrize(
    "C, H, steps, accum, warmup, length",
    [(16, 2, 23, 4, 6, None), (15, 3, 12, 1, 0, None), (16, 2, 30, 1, 3, 400)],
)
@pytest.mark.parametrize("device", DEVICES)
def test_a_run_equals_one_by_hand(cli, text, C, H, steps, accum, warmup, length, device):
    """Catches a wrong sign, rate, momentum, schedule, order, mask, decay, loss or grouping.

    The second shape has an odd number of channels, the third run more than four epochs. On CUDA
    all steps but three are one graph.
    """
    text = text[:length]
    Path("t.txt").write_text(text, encoding="utf-8", newline="\n")
    options = [*OPTIONS, "--n-embd", C, "--n-head", H, "--n-layer", 2, "--device", device]
    assert cli("train", "t.txt", *options, "--max-steps", 1).status == 0
    model = load("model.safetensors")
    torch.manual_seed(3)
    with torch.no_grad():  # no weight is zero, and none is as it was
        for p in model.network.parameters():
            p.add_(torch.randn(p.shape) * 0.1)
    model.save("init.safetensors")
    rates = dict(muon=0.03, adam=0.004, decay=0.7, warmup=warmup)
    training = ["--max-steps", steps, "--grad-accum", accum, "--seed", 7, "--eval-interval", 6]
    training += ["--muon-learning-rate", 0.03, "--learning-rate", 0.004]
    training += ["--weight-decay", 0.7, "--warmup-steps", warmup, "--init", "init.safetensors"]
    result = cli("train", "t.txt", *options, *training, "--out", "out.safetensors")
    assert result.status == 0, result
    ids, first = model.tokenizer.encode(text).tolist(), load_file("init.safetensors")
    first = {name: p.double() for name, p in first.items()}
    trajectory, losses = run_by_hand(first, ids, H, steps, device == "cpu", **rates)
    at = [*range(6, steps, 6), steps]
    validation = [mean_loss(trajectory[n - 1], ids[len(ids) * 9 // 10 :], H) for n in at]
    training = [np.mean(losses[a:b]) for a, b in zip([0, *at[:-1]], at, strict=True)]
    history, error = metadata("out.safetensors")["history"], 3e-5 if device == "cpu" else 1e-4
    assert [row[0] for row in history] == at
    expected = np.transpose([training, validation])
    np.testing.assert_allclose([row[1:] for row in history], expected, error)
    best = at[int(np.argmin(validation))] - 1
    assert metadata("out.safetensors")["validation_loss"] == pytest.approx(
        min(validation), abs=error
    )
    for name, p in load_file("out.safetensors").items():
        p, q = p.double(), trajectory[best][name]
        if name.endswith("c_attn.bias"):  # that of the keys has no effect, and no gradient
            p, q = torch.cat((p[:C], p[2 * C :])), torch.cat((q[:C], q[2 * C :]))
        assert (first[name] - trajectory[best][name]).abs().max() > 1e-3, name
        torch.testing.assert_close(p, q, atol=1e-4, rtol=0, msg=name)


# ---- optimizer and evaluation --------------------------------------------------------------------


def test_schedule_by_hand():
    """Catches a warm-up or a decay that is off by one, and a warm-up of more than a tenth."""
    cfg = TrainConfig(max_steps=40, warmup_steps=4)
    rates = [lr_scale(step, cfg) for step in range(40)]
    decay = [0.2 + 0.8 * (n / 36) ** 1.5 for n in range(36, 0, -1)]
    assert rates == pytest.approx([1 / 4, 2 / 4, 3 / 4, 1, *decay])
    for steps in (1, 2, 9, 20, 50, 300):  # with the default warm-up of 50
        rates = [lr_scale(step, TrainConfig(max_steps=steps)) for step in range(steps)]
        peak = rates.index(max(rates))
        assert max(rates) == 1 and peak <= steps // 10 and min(rates) > 0
        assert rates[peak:] == sorted(rates[peak:], reverse=True)


def test_short_contexts_by_hand():
    """Catches short contexts after the first fifth, in a fine-tuning, without whole ones between
    them, and where windows cannot be cut."""
    cfg = TrainConfig(max_steps=70)
    lengths = [context_length(step, cfg, 64) for step in range(70)]
    assert lengths == [64, 32, 32, 32] * 3 + [64, 32] + [64] * 56
    tuned = TrainConfig(max_steps=70, init="model.safetensors")
    for other, T in ((cfg, 40), (cfg, 16), (tuned, 64)):
        assert {context_length(step, other, T) for step in range(70)} == {T}


def test_pieces_see_neither_each_other_nor_other_positions():
    """Catches pieces in a wrong order or with the positions of the first one, and a Trainer that
    cuts no windows. Each piece is computed alone, by a network whose positions begin there."""
    config = GPTConfig(50, 64, 2, 2, 16)
    network = GPT(config)
    with torch.no_grad():
        for p in network.parameters():
            p.normal_(std=0.1)
    ids = torch.randint(1, 50, (3, 64))
    seen = network(ids, context_length=32)
    last = copy.deepcopy(network)
    last.wpe.weight.data = network.wpe.weight.data.roll(-32, 0)
    alone = torch.stack([network(ids[:, :32]), last(ids[:, 32:])], dim=1).flatten(0, 1)
    torch.testing.assert_close(seen, alone)

    trainer = Trainer(Corpus.from_text(prose(600)), config, TrainConfig())
    shapes = []
    trainer.network.ln_f.register_forward_hook(lambda *a: shapes.append(tuple(a[2].shape)))
    for _ in range(3):
        trainer.step()
    assert shapes == [(4, 64, 16), (8, 32, 16), (8, 32, 16)]


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 4, 20), (2, 20, 4), (7, 8, 16), (1, 1, 5)])
def test_newton_schulz_equals_svd(shape):
    """Catches a wrong coefficient or product, singular values far from 1, and 0 / 0."""
    X = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    Y = newton_schulz(X)
    torch.testing.assert_close(Y.double(), orthogonalized(X.double()), atol=1e-4, rtol=0)
    S = torch.linalg.svdvals(Y)
    assert S.min() > 0.62 and S.max() < 1.38
    assert torch.equal(newton_schulz(0 * X), 0 * X)


def test_polynomials_alternate():
    """Catches a wrong digit: the best polynomial of its degree is farthest from 1 four times, above
    and below in turn (Chebyshev), and the last values are those of the comment."""
    low, high = 0.002, 1.0
    for a, b, c in anexagpt.POLYNOMIALS:
        s = np.geomspace(low / 1.02, high * 1.02, 100_001)
        error = a * s + b * s**3 + c * s**5 - 1
        turns = 1 + np.flatnonzero(np.diff(np.sign(np.diff(error))))
        extremes = error[[0, *turns, -1]]
        farthest = abs(error).max()
        np.testing.assert_allclose(extremes, farthest * np.array([-1, 1, -1, 1]), rtol=0.02)
        low, high = 1 + error.min(), 1 + error.max()
    assert (round(low, 2), round(high, 2)) == (0.63, 1.37)


@pytest.mark.parametrize("rank", [1, 2, 8])
def test_newton_schulz_in_bfloat16(rank):
    """Catches rounding that moves a singular value beyond what the polynomials allow."""
    generator = torch.Generator().manual_seed(1)
    tall = torch.randn(20, 64, rank, generator=generator)
    X = tall @ torch.randn(20, rank, 128, generator=generator)
    Y = newton_schulz(X.bfloat16()).float()
    assert torch.linalg.matrix_norm(Y, 2).max() < 1.4


@pytest.mark.parametrize("n", [2, 16, 17, 18, 33, 600])
def test_evaluate_by_hand(n):
    """Catches a lost remainder, a character counted twice, a mean of means, dropout, U+FFFD."""
    torch.manual_seed(1)
    model = GPT(GPTConfig(12, 16, 2, 2, 16, dropout=0.5))
    ids = torch.randint(12, (n,)).numpy().astype(np.uint8)
    ids[1] = 3
    state = torch.get_rng_state()
    loss, count = evaluate(model, ids)
    exact = {name: p.detach().double() for name, p in model.named_parameters()}
    assert count == (ids[1:] != 0).sum()
    assert loss == pytest.approx(mean_loss(exact, ids.astype(int), 2), rel=1e-6)
    assert torch.equal(state, torch.get_rng_state())


def test_validation_is_capped(cli, tmp_path):
    """Catches an evaluation of all of a long text, another part of it, and a silent cap."""
    content = prose(50_000)
    n = len(content) * 9 // 10
    (tmp_path / "t.txt").write_text(content)
    result = cli("train", "t.txt", *OPTIONS, "--max-steps", 1, "--eval-interval", 1_000)
    words = f"validation on 21,333 of {len(content) - n:,} characters"  # 1000 x 4 x 16 / 3
    assert result.status == 0 and words in result.err
    short = cli("train", "t.txt", *OPTIONS, "--max-steps", 1, "--out", "short.safetensors")
    assert "validation on 20,000 of" in short.err  # at least
    model = load("model.safetensors")
    expected, _ = evaluate(model.network, model.tokenizer.encode(content[n:])[:21_333])
    assert model.metadata.validation_loss == pytest.approx(expected, abs=1e-6)
    result = cli("eval")  # the command is for the exact figure
    assert f"over {len(content) - n - 1:,} characters" in result.out
    parts = split_ids(np.zeros(20_000_000, np.uint8))
    assert [len(part) for part in parts] == [19_000_000, 1_000_000]


@pytest.mark.parametrize(
    "dtype, expected",
    [(torch.float32, [True, False, True, False]), (torch.bfloat16, [True, True, True, True])],
)
def test_steps_that_move_matrices(dtype, expected):
    """Catches an update that is left out where it costs little, and a momentum without gradients
    of the steps between updates."""
    corpus = Corpus.from_text(prose(300))
    trainer = Trainer(corpus, GPTConfig(block_size=16), TrainConfig(), "cpu", dtype)
    name = "h.0.mlp.c_proj.weight"  # the other matrices have no gradient at first
    weight = trainer.network.get_parameter(name)
    momenta = [trainer.muon.momentum[f"{kind}.{name}"] for kind in ("fast", "slow")]
    for is_moved in expected:
        before = weight.clone(), [momentum.clone() for momentum in momenta]
        trainer.step()
        assert (not torch.equal(weight, before[0])) == is_moved
        assert not any(map(torch.equal, momenta, before[1]))


def test_slow_momentum_spans_a_part_of_the_run():
    """Catches a slow momentum that is as fast as the other, or as slow early as late."""
    trainer = Trainer(Corpus.from_text(prose(300)), GPTConfig(block_size=16), TrainConfig())
    trainer.steps_done = 2_499
    trainer.step()
    name = "h.0.mlp.c_proj.weight"
    grad = trainer.network.get_parameter(name).grad
    for kind, share in (("fast", 0.1), ("slow", 0.01)):
        torch.testing.assert_close(trainer.muon.momentum[f"{kind}.{name}"], share * grad)
    assert anexagpt.slow_momentum_rate(1) == anexagpt.slow_momentum_rate(250) == 0.1


# ---- what a run does -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_learns(cli, tmp_path, dtype):
    """Catches a number format or optimizers that fail: a cycle is predictable, also unseen."""
    (tmp_path / "t.txt").write_text("abcdefghijk" * 150)
    options = [*OPTIONS, "--dtype", dtype, "--max-steps", 120, "--eval-interval", 100]
    assert cli("train", "t.txt", *options).status == 0
    assert metadata("model.safetensors")["validation_loss"] < 0.3
    assert [row[0] for row in metadata("model.safetensors")["history"]] == [50, 100, 120]
    assert load("model.safetensors").generate("cde", temperature=0, max_new=8) == "fghijkab"


@pytest.mark.parametrize("steps, rate", [(1, 0.0), (442, 0.0), (443, 0.1), (1_415, 0.2)])
def test_default_dropout(cli, text, steps, rate):
    """Catches a text repeated many times without dropout, and a run of one step that fails."""
    with interrupt_at(2):
        status = cli("train", "t.txt", *TINY, "--max-steps", steps).status
    assert status == (0 if steps == 1 else 130)
    saved = metadata("model.safetensors" + ".checkpoint" * (steps > 1))
    assert saved["config"]["dropout"] == rate and saved["step"] == min(steps, 2)
    assert steps > 1 or [row[0] for row in saved["history"]] == [1]


@pytest.mark.parametrize(
    "device, dtype, batch_size",
    [("cpu", torch.bfloat16, 6), ("cpu", torch.float32, 4), ("cuda", torch.float32, 16)],
)
def test_default_batch_size_and_rate(device, dtype, batch_size):
    """Catches a default that an ordinary processor takes too long for, and a rate of Muon that
    does not fall with the square root of fewer windows than six, or that replaces one given."""
    for asked, expected in ((None, batch_size), (9, 9), (3, 3)):
        cfg = resolve(TrainConfig(batch_size=asked), GPTConfig(), 500_000, device, dtype)
        assert cfg.batch_size == expected
        rate = {3: 0.0141, 4: 0.0163}.get(expected, 0.02)
        assert cfg.muon_learning_rate == rate
    given = TrainConfig(batch_size=3, muon_learning_rate=0.5)
    assert resolve(given, GPTConfig(), 500_000, device, dtype).muon_learning_rate == 0.5


def test_default_rate_of_adamw():
    """Catches a rate that does not fall with the square root of the channels above 128, or that
    replaces one given."""
    for asked, channels, rate in (
        (None, 16, 0.006),
        (None, 128, 0.006),
        (None, 384, 0.0035),
        (None, 768, 0.0024),
        (0.5, 768, 0.5),
    ):
        config = GPTConfig(n_head=1, n_embd=channels)
        cfg = resolve(TrainConfig(learning_rate=asked), config, 500_000, "cpu", torch.float32)
        assert cfg.learning_rate == rate


def test_every_step_has_its_own_dropout(cli, text):
    """Catches one mask for all steps, which would train a part of the network only."""
    masks = []

    def note(module, args, output):
        mask = output.flatten()[:100] == 0
        if isinstance(module, torch.nn.Dropout) and module.training and not mask.all():
            masks.append(mask)  # blocks begin with an output of zeros

    hook = torch.nn.modules.module.register_module_forward_hook(note)
    assert cli("train", "t.txt", *TINY, "--dropout", 0.5, "--max-steps", 6).status == 0
    hook.remove()
    assert len({tuple(mask.tolist()) for mask in masks}) == len(masks) >= 6


def test_only_the_seed_decides(cli, text):
    """Catches randomness beside the seed, and evaluations or checkpoints that change a run."""
    options = [*TINY, "--dropout", 0.2, "--max-steps", 40]
    runs = {"a": (5, 40, 60), "b": (5, 8, 0), "c": (6, 40, 60)}
    runs = {f"{name}.safetensors": run for name, run in runs.items()}
    for name, (seed, interval, seconds) in runs.items():
        torch.manual_seed(interval)
        given = ["--seed", seed, "--eval-interval", interval, "--checkpoint-interval", seconds]
        assert cli("train", "t.txt", *options, *given, "--out", name).status == 0
        last = metadata(name)["history"][-1]  # which is the best
        assert last == [40, last[1], round(metadata(name)["validation_loss"], 6)]
    a, b, c = map(load_file, runs)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not any(torch.equal(a[name], c[name]) for name in a)


@pytest.mark.parametrize("stops", [(1,), (8,), (13,), (23,), (2, 7, 11)], ids=str)
def test_resuming_changes_nothing(cli, text, stops):
    """Catches any part of the state that is lost: momentum, steps, random state, losses, best."""
    options = ["train", "t.txt", *TINY, "--dropout", 0.2, "--max-steps", 24, "--eval-interval", 8]
    options += ["--checkpoint-interval", 0]
    whole, parts = Path("whole.safetensors"), Path("parts.safetensors")
    checkpoint = Path("parts.safetensors.checkpoint")
    assert cli(*options, "--out", whole).status == 0
    for n in stops:
        torch.manual_seed(n)
        with interrupt_at(n):  # n steps after the last stop
            result = cli(*options, "--out", parts)
        assert result.status == 130 and "resumes" in result.err, result
        assert not parts.exists() and load(checkpoint).metadata.step <= sum(stops)
    result = cli(*options, "--out", parts)
    assert result.status == 0 and f"step {sum(stops)}" in result.err
    a, b = load_file(whole), load_file(parts)
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert metadata(whole) == metadata(parts) and not checkpoint.exists()


def test_init_never_ends_worse(cli, tiny):
    """Catches a model worse than the one it began with, and a best one that resuming forgets."""
    rates = ["--muon-learning-rate", 0.1, "--learning-rate", 0.1, "--eval-interval", 5]
    options = [*OPTIONS, "--init", tiny, *rates, "--max-steps", 10]
    with interrupt_at(3):
        assert cli("train", tiny.parent / "prose.txt", *options).status == 130
    result = cli("train", tiny.parent / "prose.txt", *options)
    assert result.status == 0 and "NOTE: training did not improve" in result.err
    saved, best = metadata("model.safetensors"), metadata(tiny)["validation_loss"]
    assert min(row[2] for row in saved["history"]) > best + 0.01
    assert saved["validation_loss"] == pytest.approx(best, abs=1e-6)
    first, last = load_file(tiny), load_file("model.safetensors")
    assert all(torch.equal(first[name], last[name]) for name in first)


def test_init_on_another_vocabulary(cli, tiny, tmp_path):
    """Catches embeddings that move to another character, and new ones that are random."""
    (tmp_path / "t.txt").write_text(prose(100).replace("e", "Q"))
    still = ["--learning-rate", 0, "--muon-learning-rate", 0, "--max-steps", 1, "--dropout", 0.5]
    assert cli("train", "t.txt", *OPTIONS, "--init", tiny, *still).status == 0
    old, new = load(tiny), load("model.safetensors")
    for c, row in zip(new.tokenizer.characters, new.network.wte.weight, strict=True):
        i, rows = old.tokenizer.characters.find(c), old.network.wte.weight
        torch.testing.assert_close(row, rows[i] if i >= 0 else rows[1:].mean(0))


def test_init_on_a_short_text(cli, tiny, tmp_path):
    """Catches the advice of a smaller block_size, which a model to fine-tune cannot have."""
    (tmp_path / "t.txt").write_text("the cat " * 10)
    assert "block-size" in cli("train", "t.txt", *OPTIONS, "--max-steps", 1).err
    error = cli("train", "t.txt", "--init", tiny, "--max-steps", 1).err
    assert "use a longer text" in error and "block-size" not in error


@pytest.mark.parametrize("rate, early", [(10, False), (10, True), (0, False)])
def test_diverged(cli, tiny, rate, early):
    """Catches a run that ends above the loss of knowing nothing, or at rate 0 with weights that no
    other command would load, and is called finished.

    What was good before is saved as the model.
    """
    options = [*OPTIONS, "--muon-learning-rate", 10, "--learning-rate", rate]
    options += ["--weight-decay", 10, "--max-steps", 30 if rate else 8]
    if early:  # evaluated at rates that still rise, then until the weights overflow
        options[-1:] = [2_000, "--warmup-steps", 200, "--eval-interval", 1]
        options += ["--checkpoint-interval", 0]
    result = cli("train", tiny.parent / "prose.txt", *options, "--quiet")
    last = result.err.splitlines()[-1]
    assert result.status == 2 and "Training finished" not in result.err
    assert "diverged" in last and "--muon-learning-rate 3.3" in last
    assert Path("model.safetensors").exists() == early
    assert not Path("model.safetensors.checkpoint").exists()
    if early:
        assert "best weights are saved in model.safetensors" in last
        saved = load("model.safetensors")
        assert saved.metadata.validation_loss < math.log(26) and saved.generate("the", max_new=5)
        step = saved.metadata.step
        rows = saved.metadata.history[5:]
        assert all(min(row[1:]) < 1.1 * math.log(26) for row in rows)
        assert step < 1_000  # long before the end


def test_diverged_from_the_start():
    """Catches a run that was never good, and goes on to its last step."""
    cfg = TrainConfig(max_steps=100_000)
    trainer = Trainer(Corpus.from_text(prose(300)), GPTConfig(block_size=16), cfg)
    trainer.steps_done = 999
    trainer.check_divergence(9.0, 9.0)
    trainer.steps_done = 1_000
    with pytest.raises(anexagpt.UserError, match="diverged at step 1,000"):
        trainer.check_divergence(9.0, 9.0)


@pytest.mark.parametrize("found", [{}, dict(avx512_bf16=True), dict(amx_bf16=True)], ids=str)
def test_default_dtype(monkeypatch, found):
    """Catches a fast number format that is not used, or is used where it is slow."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    expected = torch.bfloat16 if found else torch.float32
    assert anexagpt.select_dtype("auto", torch.device("cpu")) == expected
    assert anexagpt.select_dtype("float32", torch.device("cpu")) == torch.float32


def test_overfitting_is_noticed(cli, tmp_path):
    """Catches silence while a text is learnt by heart, and a model that is not the best one."""
    (tmp_path / "t.txt").write_text(prose(80))
    options = [*OPTIONS, "--n-embd", 32, "--max-steps", 300, "--eval-interval", 10]
    result = cli("train", "t.txt", *options)
    saved = metadata("model.safetensors")
    assert result.status == 0 and result.err.count("overfit") == 1
    assert "--init" not in result.err
    losses = [row[2] for row in saved["history"]]
    assert round(saved["validation_loss"], 6) == min(losses) < losses[-1] - 0.1
    n = result.err.partition("NOTE: overfit")[0].count(" left | ")
    assert losses.index(min(losses)) <= n - 6  # five later evaluations were worse


def test_loss_of_bfloat16_logits():
    """Catches a loss that is summed in bfloat16, which has three digits: against float64."""
    generator = torch.Generator().manual_seed(1)
    logits = (4 * torch.randn(3, 200, 30, generator=generator)).bfloat16()
    targets = torch.randint(30, (3, 200), generator=generator)  # some are U+FFFD, id 0
    logp = logits.double().log_softmax(-1).gather(2, targets[:, :, None])[:, :, 0]
    expected = -logp[targets != 0].sum().item()
    assert cross_entropy_sum(logits, targets).item() == pytest.approx(expected, rel=1e-5)


def test_other_language_at_the_end_is_not_divergence():
    """Catches "diverged" where training goes well, but the validation part is another language."""
    characters = "".join(map(chr, range(0x4E00, 0x4F00)))
    text = prose(1_000) + characters * 2
    options = dict(n_layer=1, n_head=2, n_embd=16, block_size=16, batch_size=4, device="cpu")
    rates = dict(learning_rate=0.1, max_steps=200, eval_interval=25)
    model = train(text=text, progress=False, **options, **rates)
    row = model.metadata.history[-1]
    uniform = math.log(model.metadata.config.vocab_size)
    assert row.training_loss < uniform < 1.1 * uniform < row.validation_loss


def test_seed_of_the_dropout():
    """Catches runs with different seeds and the same masks."""
    masks = set()
    for seed in (1, 2):
        cfg = TrainConfig(max_steps=2, dropout=0.5, seed=seed)
        trainer = Trainer(Corpus.from_text(prose(100)), GPTConfig(block_size=8), cfg)
        trainer.set_inputs()
        masks.add(tuple(torch.nn.functional.dropout(torch.ones(64)).tolist()))
    assert len(masks) == 2


def test_memory_of_an_evaluation():
    """Catches logits of 32 windows, gigabytes with a large vocabulary: 64 MB are four here."""
    network = GPT(GPTConfig(65_536, 64, 1, 1, 1))
    rows = []
    network.ln_f.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    anexagpt.evaluate(network, np.ones(64 * 8 + 1, np.uint16))
    assert max(rows) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_of_matrix_products(dtype):
    """Catches a run in bfloat16 whose products are in float32, and the reverse."""
    x = torch.ones(4, 4)
    with anexagpt.autocast(x.device, dtype):
        assert (x @ x).dtype == dtype
