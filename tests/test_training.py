"""Training: the same text, seed and settings give the same bits, whatever interrupts; the figures are right."""

import math
import platform
import signal
from collections import Counter
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from conftest import TINY, header, prose
from hypothesis import given
from hypothesis import strategies as st

import anexagpt
from anexagpt import (
    GPT,
    DeviceConfig,
    GPTConfig,
    Story,
    Tokenizer,
    TrainConfig,
    Trainer,
    UserError,
    checkpoint_path,
    choose_device,
    evaluate,
    kept_memory,
    loss_chart,
    open_file,
    save_file,
    split,
    window_starts,
)

CPU = torch.device("cpu")
NETWORK = GPTConfig(12, 16, 2, 2, 16, dropout=0.2)
RATES = dict(muon_learning_rate=0.02, learning_rate=0.005, weight_decay=0.0)  # whatever the defaults are


def some_ids(n=1200, V=12, seed=1, low=1):
    return torch.randint(low, V, (n,), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def trainer(config=NETWORK, ids=None, dtype=torch.float32, device=CPU, **settings) -> Trainer:
    cfg = TrainConfig(**(dict(max_steps=30, batch_size=4, warmup_steps=5) | settings))
    return Trainer(config, cfg, some_ids() if ids is None else ids, device, dtype)


def story_of(it: Trainer) -> Story:
    data = dict(name="x", sha256="x", characters=1200)
    return Story(it.model.config, anexagpt.UNKNOWN + "abcdefghijk", data, {}, it.step, it.best_loss, it.history)


def same(one: dict, other: dict):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def weights(path) -> dict:
    return safetensors.torch.load_file(path)


# ---- windows of text -------------------------------------------------------------------------------------------------


@given(st.integers(2, 40), st.integers(2, 30), st.integers(1, 9), st.integers(0, 2**63 - 1), st.data())
def test_a_pass_covers_each_window_once(T, windows, batch, seed, data):
    """Catches a window read twice in a pass or never, one that overlaps another, and one that leaves the text."""
    n = T * windows + 1 + data.draw(st.integers(1, T))
    steps = 3 * windows
    starts = window_starts(0, steps, batch, n, T, seed)
    assert starts.shape == (steps, batch)
    dealt = starts.flatten().tolist()
    assert all(s >= 0 and s + T + 1 <= n for s in dealt)
    per_pass = (n - T - 1) // T
    for first in range(0, len(dealt) - per_pass + 1, per_pass):
        places = sorted(dealt[first : first + per_pass])
        assert all(b - a == T for a, b in pairwise(places))


@given(st.integers(0, 50), st.integers(1, 30), st.integers(1, 5), st.sets(st.integers(1, 29)))
def test_windows_do_not_depend_on_how_they_are_asked_for(step, n, batch, cuts):
    """Catches a continued run that reads other windows than the uninterrupted one."""
    whole = window_starts(step, n, batch, 500, 16, seed=3)
    edges = [0, *sorted(c for c in cuts if c < n), n]
    pieces = [window_starts(step + a, b - a, batch, 500, 16, 3) for a, b in pairwise(edges)]
    assert torch.equal(torch.cat(pieces), whole)


def test_every_character_is_read():
    """Catches an end or a beginning of the text that no window ever reaches: the offset must vary over all of it."""
    starts = window_starts(0, 4000, 1, 60, 10, seed=1).flatten()
    covered = Counter(int(s) + t for s in starts for t in range(11))
    assert set(covered) == set(range(60))


def test_windows_are_shuffled_and_follow_the_seed():
    """Catches a text read in order, and a seed that changes nothing."""
    one, two = (window_starts(0, 50, 2, 5000, 10, seed=s).flatten() for s in (1, 2))
    assert not torch.equal(one, two) and not torch.equal(one, one.sort().values)


def test_what_a_step_reads():
    """Catches targets that are not the next characters, by the loss of float64 on the windows dealt for that step."""
    it = trainer(GPTConfig(12, 16, 1, 2, 16, 0.0))
    exact = GPT(it.model.config).double()
    exact.load_state_dict({k: v.double() for k, v in it.model.state_dict().items()})
    starts = window_starts(0, 1, 4, len(it.ids), 16, it.cfg.seed)[0].tolist()
    losses = []
    for s in starts:
        logp = exact(it.ids[None, s : s + 16].long()).log_softmax(-1)[0]
        losses += [-logp[t, int(it.ids[s + t + 1])].item() for t in range(16)]
    it.update()
    assert float(it.losses[0]) == pytest.approx(sum(losses) / len(losses), abs=1e-5)


def test_split():
    """Catches validation characters that were trained on: the parts are 90% and 10%, in order, without overlap."""
    ids = torch.arange(1003)
    learn, examine = split(ids)
    assert len(learn) == 902 and torch.equal(torch.cat((learn, examine)), ids)


# ---- evaluation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 16, 17, 18, 33, 100])
def test_evaluate_equals_a_loop_in_float64(n):
    """Catches a remainder that is left out, a character counted twice, and a mean of means."""
    torch.manual_seed(1)
    model = GPT(NETWORK)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape) * 0.1)
    exact = GPT(NETWORK).double().eval()
    exact.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    ids = some_ids(n, low=0)  # with unknown characters, which must not count
    if n == 2:
        ids[1] = 3
    total, count = 0.0, 0
    for position in range(1, n):
        window = (position - 1) // 16 * 16
        with torch.no_grad():
            logp = exact(ids[None, window:position].long())[0, -1].log_softmax(-1)
        if ids[position] != 0:
            total, count = total - float(logp[int(ids[position])]), count + 1
    loss, counted = evaluate(model, ids)
    assert counted == count and loss == pytest.approx(total / count, abs=1e-5)
    assert model.training  # as it was


def test_evaluate_is_repeatable_and_uses_no_random_numbers():
    """Catches dropout or sampling in the measurement, and a measurement that changes the training."""
    model = GPT(NETWORK).train()
    before = torch.get_rng_state()
    assert evaluate(model, some_ids()) == evaluate(model, some_ids())
    assert torch.equal(before, torch.get_rng_state())


def test_evaluate_with_a_large_vocabulary():
    """Catches a measurement that depends on how many windows are done at once."""
    model = GPT(GPTConfig(12, 16, 1, 1, 8, 0.0))
    one, _ = evaluate(model, some_ids(16 * 40 + 5))
    parts = [evaluate(model, some_ids(16 * 40 + 5)[i : i + 17]) for i in range(0, 16 * 40 + 4, 16)]
    assert one == pytest.approx(sum(loss * n for loss, n in parts) / sum(n for _, n in parts), abs=1e-6)


# ---- learning --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_memory_is_kept_for_the_next_update():
    """Catches memory that goes back to the system after every update and is asked for again, page by page."""
    resource = pytest.importorskip("resource")

    def new_pages() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(20):
            tensors = [torch.ones(1 << 20) for _ in range(20)]  # 80 MB
            del tensors[::2]
            while tensors:
                tensors.pop()  # the last of the heap first, which the C library likes to give back
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    with kept_memory():
        new_pages()
        kept = new_pages()
    assert 100 * kept < new_pages()


@pytest.mark.parametrize("trouble", [TypeError("Windows"), OSError("linked statically"), None])
def test_memory_without_glibc(monkeypatch, trouble):
    """Catches a training that does not start where the C library is another one, or cannot be asked."""

    def library(name):
        if trouble:
            raise trouble
        return object()  # macOS, musl: no mallopt

    monkeypatch.setattr(anexagpt.ctypes, "CDLL", library)
    with pytest.raises(KeyError, match="its own"), kept_memory():
        raise KeyError("its own")


def test_one_batch_overfits():
    """Catches anything that keeps the network from learning at all: one window, by heart."""
    ids = some_ids(37)  # 33 to learn from: with T = 32, all windows are the same
    it = trainer(GPTConfig(12, 32, 2, 2, 32, 0.0), ids, max_steps=120, batch_size=2, **RATES)
    for _ in range(120):
        it.update()
    assert float(it.losses[0]) == pytest.approx(math.log(12), abs=0.2)
    assert float(it.losses[-1]) < 0.05


def test_it_learns_what_can_be_learnt():
    """Catches optimizers that fight: a cycle of 11 characters is fully predictable, also where it was not seen."""
    ids = (torch.arange(1500) % 11 + 1).to(torch.uint8)
    it = trainer(GPTConfig(12, 16, 1, 2, 16, 0.0), ids, max_steps=120, **RATES)
    for _ in range(120):
        it.update()
    it.evaluate()
    assert it.history[0][2] < 0.5


def test_bfloat16_learns_as_float32_does():
    """Catches a part of the training that bfloat16 ruins, such as weights or a loss kept in it."""
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        it = trainer(GPTConfig(12, 16, 2, 2, 16, 0.0), (torch.arange(1500) % 11 + 1).to(torch.uint8), dtype, **RATES)
        for _ in range(30):
            it.update()
        assert all(p.dtype == torch.float32 for p in it.state().values() if p.is_floating_point())
        losses.append(it.losses)
    assert torch.allclose(*losses, atol=0.05, rtol=0.03) and losses[0][-1] < losses[0][0] - 0.5


# ---- the same bits ---------------------------------------------------------------------------------------------------


def test_same_seed_same_weights(monkeypatch):
    """Catches a random number that does not come from the seed, and one drawn by measuring."""
    runs = []
    for seed, every, chunk in ((5, 30, 1000), (5, 7, 8), (6, 30, 1000)):
        monkeypatch.setattr(Trainer, "CHUNK", chunk)
        torch.manual_seed(every)  # what was drawn before must not matter
        it = trainer(seed=seed)
        for step in range(30):
            it.update()
            if step % every == every - 1:
                it.evaluate()
        runs.append(dict(it.model.named_parameters()))
    same(runs[0], runs[1])
    assert not torch.equal(runs[0]["wte.weight"], runs[2]["wte.weight"])


@pytest.mark.parametrize("stop", [1, 8, 13, 29])
@pytest.mark.parametrize("measured", [True, False])
def test_interrupted_equals_uninterrupted(tmp_path, monkeypatch, stop, measured):
    """Catches any part of the state that is not saved: momentum, step counts, random states, losses, best weights."""
    monkeypatch.setattr(Trainer, "CHUNK", 8)

    def advance(it, end):
        while it.step < end:
            it.update()
            if (measured and it.step % 5 == 0) or it.step == 30:
                it.evaluate()
        return it

    whole = advance(trainer(), 30)
    first = advance(trainer(), stop)
    if not first.history:  # nothing is the best as yet; that is what `train` writes then
        first.best_loss = None
    path = tmp_path / "checkpoint.safetensors"
    save_file(path, first.state(), story_of(first))
    torch.manual_seed(999)
    second = trainer()
    second.restore(weights(path), open_file(path)[0])
    assert second.step == stop
    advance(second, 30)
    same(whole.state(), second.state())
    assert (whole.history, whole.best_loss) == (second.history, second.best_loss)


@pytest.fixture
def text(tmp_path):
    """A text beside the working folder's models, and the command that learns it; long enough for 16 characters."""
    path = tmp_path / "prose.txt"
    path.write_text(prose(600), encoding="utf-8", newline="\n")
    options = ["--data", "prose.txt", *TINY, "--dropout", 0.1, "--max-steps", 24, "--eval-interval", 8]
    return ["train", *options, "--checkpoint-interval", 1e9]


def interrupt(monkeypatch, *steps, number=signal.SIGINT):
    """Send a signal during these steps, as Ctrl-C would."""
    update = Trainer.update
    left = list(steps)

    def updating(self):
        update(self)
        if left and self.step == left[0]:
            left.pop(0)
            signal.raise_signal(number)

    monkeypatch.setattr(Trainer, "update", updating)


@pytest.mark.parametrize("steps", [(3,), (8,), (23,), (2, 9, 20)], ids=str)
def test_ctrl_c_and_the_same_command_again(cli, text, tmp_path, monkeypatch, steps):
    """Catches an interruption that costs the training, also before the first measurement, or that changes its end."""
    assert cli(*text, "--out", "whole.safetensors").status == 0
    assert not (tmp_path / "whole-checkpoint.safetensors").exists()
    interrupt(monkeypatch, *steps)
    before = signal.getsignal(signal.SIGINT)
    for step in steps:
        result = cli(*text)
        assert result.status == 130 and "Traceback" not in result.err
        assert f"Stopped at step {step}, kept in checkpoint.safetensors" in result.err
        assert (tmp_path / "checkpoint.safetensors").exists() and not (tmp_path / "model.safetensors").exists()
        assert signal.getsignal(signal.SIGINT) is before
    result = cli(*text)
    assert result.status == 0 and f"at step {steps[-1]}" in result.err
    assert not (tmp_path / "checkpoint.safetensors").exists()
    same(weights("whole.safetensors"), weights("model.safetensors"))
    assert header(Path("whole.safetensors")) == header(Path("model.safetensors"))


def test_ctrl_c_in_the_last_step(cli, text, monkeypatch):
    """Catches a finished training that is thrown away because Ctrl-C came with its last step."""
    interrupt(monkeypatch, 24)
    result = cli(*text)
    assert result.status == 0 and Path("model.safetensors").exists() and not Path("checkpoint.safetensors").exists()


def test_termination_keeps_the_training(cli, text, monkeypatch):
    """Catches a computer that is shut down, or a batch system, and hours that are lost."""
    interrupt(monkeypatch, 9, number=signal.SIGTERM)
    assert cli(*text).status == 143 and Path("checkpoint.safetensors").exists()


def test_second_ctrl_c_leaves_at_once(cli, text, monkeypatch):
    """Catches a program that cannot be stopped."""
    update = Trainer.update

    def updating(self):
        update(self)
        if self.step == 5:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Trainer, "update", updating)
    result = cli(*text)
    assert result.status == 130 and not Path("checkpoint.safetensors").exists()


def test_killed_run_goes_on_from_the_last_checkpoint(cli, text, monkeypatch):
    """Catches checkpoints that are written at the end only; here the power fails in step 20."""
    text[text.index("--checkpoint-interval") + 1] = 0
    assert cli(*text, "--out", "whole.safetensors").status == 0
    update = Trainer.update

    def updating(self):
        if self.step == 19:
            raise SystemExit(9)
        update(self)

    monkeypatch.setattr(Trainer, "update", updating)
    assert cli(*text).status == 9
    monkeypatch.setattr(Trainer, "update", update)
    assert "at step 19" in cli(*text).err
    same(weights("whole.safetensors"), weights("model.safetensors"))


@pytest.mark.parametrize(
    "change", [["--n-layer", 2], ["--max-steps", 25], ["--seed", 5], ["--batch-size", 8], ["--dropout", 0.5]], ids=str
)
def test_continued_with_other_settings(cli, text, monkeypatch, change):
    """Catches a training that goes on half with the old, half with new settings."""
    interrupt(monkeypatch, 9)
    cli(*text)
    assert cli(*text, *change).is_error("checkpoint.safetensors", change[0], "--restart")
    assert cli(*text, *change, "--restart", "--quiet").status == 0


def test_continued_with_another_text(cli, text, tmp_path, monkeypatch):
    """Catches a training that goes on with another text under the same name."""
    interrupt(monkeypatch, 9)
    cli(*text)
    (tmp_path / "prose.txt").write_text(prose(600, seed=2))
    assert cli(*text).is_error("checkpoint.safetensors", "--data", "--restart")


def test_continued_without_options(cli, text, monkeypatch):
    """Catches a continued run that starts Sherlock Holmes instead of the text it was on."""
    interrupt(monkeypatch, 9)
    cli(*text)
    result = cli("train", "--device", "cpu", "--dtype", "float32")
    assert result.status == 0 and "at step 9" in result.err and "prose.txt" in result.err


def test_continued_with_a_long_name(cli, text, tmp_path, monkeypatch):
    """Catches a text whose long path, shortened for display, no longer equals itself."""
    folder = Path(*["a-folder-with-quite-a-long-name"] * 8)
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "prose.txt").rename(tmp_path / folder / "prose.txt")
    text[text.index("prose.txt")] = folder / "prose.txt"
    interrupt(monkeypatch, 9)
    assert cli(*text).status == 130
    assert cli(*text).status == 0


def test_damaged_checkpoint(cli, text, tmp_path, monkeypatch):
    """Catches a traceback, and an error that does not say how to get rid of it."""
    interrupt(monkeypatch, 9)
    cli(*text)
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    assert cli(*text).is_error("checkpoint.safetensors", "--restart")
    assert cli(*text, "--restart", "--quiet").status == 0


def test_best_weights_of_another_network():
    """Catches best weights of another shape, which nothing reads before they are saved as the model."""
    it = trainer(max_steps=2)
    it.update()
    it.evaluate()
    state = {name: tensor.clone() for name, tensor in it.state().items()}
    with pytest.raises(RuntimeError):
        trainer(max_steps=2).restore(state | {"best.ln_f.weight": torch.ones(1)}, story_of(it))


def test_random_numbers_of_other_processes_continue():
    """Catches a seed that is a number for one process and too large for the next, when they continue."""
    it = trainer(seed=2**63 - 1)
    it.update()
    state, story = {name: tensor.clone() for name, tensor in it.state().items()}, story_of(it)
    drawn = []
    for rank in (1, 2):
        it.world = anexagpt.World(rank, 3)
        it.restore(state, story)
        drawn.append(torch.rand(9))
    assert not torch.equal(*drawn)


def test_checkpoint_of_another_network(cli, text, tmp_path, monkeypatch):
    """Catches a checkpoint whose tensors do not fit its story."""
    interrupt(monkeypatch, 9)
    cli(*text)
    path = tmp_path / "checkpoint.safetensors"
    metadata = header(path)["__metadata__"]
    tensors = weights(path)
    for change in (
        {"muon.0": torch.zeros(7, 7, 7)},
        {"losses": tensors["losses"][:3]},
        {"model.wte.weight": torch.zeros(3, 3)},
        {"rng.cpu": torch.zeros(3)},
        {"rng.cpu": torch.zeros(3, dtype=torch.uint8)},
        {"adamw.0.exp_avg": torch.zeros(7)},
        {"model.ln_f.weight": torch.ones(1)},  # fits, if it is stretched
    ):
        safetensors.torch.save_file(tensors | change, path, metadata=metadata)
        result = cli(*text)
        assert result.status == 2 and "Traceback" not in result.err and "--restart" in result.err
    del tensors["adamw.0.exp_avg"]
    safetensors.torch.save_file(tensors, path, metadata=metadata)
    result = cli(*text)
    assert result.status == 2 and "--restart" in result.err


@pytest.mark.parametrize("every", [5, 8, 24])
def test_how_often_it_is_measured_changes_nothing(cli, text, every):
    """Catches a sample or a measurement that draws from the training's random numbers: same end, bit for bit."""
    text[text.index("--eval-interval") + 1] = every
    assert cli(*text, "--out", f"{every}.safetensors").status == 0
    last = open_file(Path(f"{every}.safetensors"))[0].history[-1]
    text[text.index("--eval-interval") + 1] = 3
    assert cli(*text, "--quiet").status == 0
    story = open_file(Path("model.safetensors"))[0]
    assert story.history[-1][0] == last[0] == 24 and story.history[-1][2] == last[2]
    assert story.history[-1][2] == min(row[2] for row in story.history)  # so both kept the last weights
    same(weights(f"{every}.safetensors"), weights("model.safetensors"))


# ---- what is kept and told -------------------------------------------------------------------------------------------


def test_best_weights_are_kept_and_overfitting_is_told(cli, tmp_path):
    """Catches the last weights saved instead of the best, a wrong loss in the file, and a missing notice."""
    noise = Tokenizer.of("abcdefgh").decode(some_ids(700, 9))  # can only be learnt by heart
    (tmp_path / "noise.txt").write_text(noise)
    options = ["--n-embd", 32, "--n-head", 2, "--n-layer", 2, "--block-size", 16, "--dropout", 0, "--max-steps", 240]
    options += ["--muon-learning-rate", 0.02, "--learning-rate", 0.005, "--warmup-steps", 10, "--weight-decay", 0]
    options += ["--batch-size", 16, "--eval-interval", 16, "--device", "cpu", "--dtype", "float32"]
    result = cli("train", "--data", "noise.txt", *options)
    model, tokenizer, story = anexagpt.load_model(tmp_path / "model.safetensors", CPU)
    validation = [row[2] for row in story.history]
    assert len(validation) == 15 and validation[-1] > min(validation) + 0.1 and story.history[-1][1] < 1.5
    ids = split(tokenizer.encode((tmp_path / "noise.txt").read_text()))[1]
    loss, _ = evaluate(model, ids)
    assert loss == pytest.approx(min(validation), abs=1e-5) and story.validation_loss == pytest.approx(loss, abs=1e-6)
    assert result.err.count("NOTE: validation loss rises") == 1


@pytest.mark.parametrize(
    "training, validation, expected",
    [
        ([3, 2, 1, 0.9, 0.8, 0.7, 0.6], [3, 2, 2.1, 2.2, 2.3, 2.4, 2.5], True),
        ([3, 2, 1, 0.9, 0.8, 0.7, 0.6], [3, 2, 2.1, 2.2, 2.3, 2.4, 1.9], False),
        ([3, 2, 2.5, 2.5, 2.5, 2.5, 2.5], [3, 2, 2.1, 2.2, 2.3, 2.4, 2.5], False),
        ([3, 2, 1], [3, 2, 2.5], False),
        ([], [], False),
    ],
)
def test_overfitting(training, validation, expected):
    """Catches a false alarm: while validation still falls, or where training loss rises as well."""
    it = trainer()
    it.history = [[i, t, v] for i, (t, v) in enumerate(zip(training, validation, strict=True))]
    assert it.overfitting() is expected


def test_training_loss_is_the_mean_since_the_last_measurement():
    """Catches a training loss of one batch, or of other steps."""
    it = trainer()
    for step in range(30):
        it.update()
        if step in (9, 29):
            it.evaluate()
    losses = it.losses.double()
    assert [row[0] for row in it.history] == [10, 30]
    expected = [float(losses[:10].mean()), float(losses[10:].mean())]
    assert [row[1] for row in it.history] == pytest.approx(expected, abs=1e-5)


def test_loss_that_is_not_a_number(cli, text, tmp_path, monkeypatch):
    """Catches a diverged training that goes on for hours, or is saved as a model."""
    update = Trainer.update

    def updating(self):
        update(self)
        if self.step == 6:
            self.model.wte.weight.data[3, 2] = torch.nan

    monkeypatch.setattr(Trainer, "update", updating)
    result = cli(*text, "--muon-learning-rate", 0.125, "--learning-rate", 0.25)
    assert result.status == 2 and "Traceback" not in result.err
    last = result.err.splitlines()[-1]
    assert all(word in last for word in ("nan", "step 8", "--muon-learning-rate", "--learning-rate", "0.125", "0.25"))
    assert not (tmp_path / "model.safetensors").exists()


def test_out_of_memory(cli, text, monkeypatch):
    """Catches a traceback where the batch is too large for the device, and a cure that is itself an error."""

    def updating(self):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Trainer, "update", updating)
    for batch, parts, cure in ((4, 1, 2), (12, 2, 4), (15, 1, 3), (9, 3, 9)):
        result = cli(*text, "--batch-size", batch, "--grad-accum", parts)
        assert result.status == 2 and "Traceback" not in result.err
        assert f"--batch-size {batch}" in result.err and f"--grad-accum {cure}" in result.err


def test_losses_to_plot():
    """Catches marks at the wrong place: the chart is read back and compared with the losses."""
    history = [[0, 4.0, 4.0], [50, 3.0, 3.5], [100, 2.0, 3.0]]
    lines = loss_chart(history, width=60, height=11).splitlines()
    plot = [line[line.index("|") + 1 :].ljust(51) for line in lines[:11]]
    marks = {mark: [(r, c) for r in range(11) for c in range(51) if plot[r][c] == mark] for mark in "ox"}
    assert set(marks["o"]) | {(0, 0)} == {(0, 0), (5, 25), (10, 50)}
    assert marks["x"] == [(0, 0), (2, 25), (5, 50)] or marks["x"] == [(0, 0), (3, 25), (5, 50)]
    assert [float(line.split("|")[0]) for line in lines[:11]] == pytest.approx([4 - 0.2 * i for i in range(11)])
    assert max(map(len, lines)) <= 60 and "step 100" in lines[-2]
    assert loss_chart([]) == loss_chart([[5, 1.0, 1.0]]) == ""


@pytest.mark.parametrize(
    "history", [[[1, 2.0, 2.0], [2, 2.0, 2.0]], [[1, math.nan, 1.0], [2, 1.0, 1.0], [3, 1.0, 1.0]]]
)
def test_losses_hard_to_plot(history):
    """Catches a division by zero where all losses are equal, or a loss that is not a number."""
    assert "o training" in loss_chart(history)


@pytest.mark.parametrize(
    "model, checkpoint",
    [
        ("model.safetensors", "checkpoint.safetensors"),
        ("me.safetensors", "me-checkpoint.safetensors"),
        ("a/b/model.safetensors", "a/b/checkpoint.safetensors"),
        ("x", "x-checkpoint"),
    ],
)
def test_checkpoint_path(model, checkpoint):
    """Catches two models in one folder that share a checkpoint."""
    assert checkpoint_path(Path(model)) == Path(checkpoint)


# ---- devices ---------------------------------------------------------------------------------------------------------


def test_device_that_is_not_there(cli, text):
    """Catches a silent fallback to the CPU, and a download before the error."""
    for device in ("cuda", "mps"):
        if not getattr(torch.backends, device).is_available() if device == "mps" else not torch.cuda.is_available():
            assert cli("train", "--device", device).is_error(f"--device {device}", "cpu")
            assert cli("run", "--device", device).is_error(f"--device {device}", "cpu")


@pytest.mark.parametrize("native", [True, False])
def test_number_format_of_the_cpu(monkeypatch, native):
    """Catches bfloat16 where the processor only emulates it, slowly, and an explicit wish that is ignored."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    auto = torch.bfloat16 if native else torch.float32
    assert choose_device(DeviceConfig("cpu", "auto")) == (CPU, auto)
    assert choose_device(DeviceConfig("cpu", "float32")) == (CPU, torch.float32)
    assert choose_device(DeviceConfig("cpu", "bfloat16")) == (CPU, torch.bfloat16)


def test_automatic_device(monkeypatch):
    """Catches a GPU that is there and not taken."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device(DeviceConfig("auto", "float32"))[0] == CPU
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device(DeviceConfig("auto", "float32"))[0].type == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device(DeviceConfig("auto", "float32"))[0].type == "cuda"


@pytest.mark.cuda
def test_graph_equals_eager_updates(monkeypatch):
    """Catches a CUDA graph that replays old windows, rates or losses; dropout 0, so that both do the same."""
    runs = []
    monkeypatch.setattr(Trainer, "CHUNK", 8)
    for eager in (False, True):
        it = trainer(GPTConfig(12, 16, 2, 2, 16, 0.0), device=torch.device("cuda"))
        if eager:
            it.replay.eager_left = 10**9
        for _ in range(30):
            it.update()
        assert (it.replay.graph is None) is eager
        runs.append(it.losses.cpu())
    assert torch.allclose(*runs, atol=1e-3) and runs[0][-1] < runs[0][0]


@pytest.mark.cuda
def test_dropout_inside_a_graph():
    """Catches a graph that drops the same values at every replay: with rates of zero, only dropout changes the loss."""
    ids = some_ids(37)
    rates = dict(muon_learning_rate=0.0, learning_rate=0.0, weight_decay=0.0)
    it = trainer(GPTConfig(12, 32, 1, 2, 32, 0.5), ids, device=torch.device("cuda"), **rates)
    with torch.no_grad():
        it.model.wte.weight.mul_(20)
    for _ in range(30):
        it.update()
    assert it.replay.graph is not None and len(it.losses[-10:].unique()) == 10


@pytest.mark.cuda
def test_training_on_cuda_continues(tmp_path):
    """Catches a checkpoint of a GPU training that cannot be read again, or changes the losses (dropout 0)."""
    network = GPTConfig(12, 16, 1, 2, 16, 0.0)
    whole = trainer(network, device=torch.device("cuda"))
    first, second = (trainer(network, device=torch.device("cuda")) for _ in range(2))
    for it, steps in ((whole, 30), (first, 12)):
        for _ in range(steps):
            it.update()
    first.evaluate()
    save_file(tmp_path / "c.safetensors", first.state(), story_of(first))
    second.restore(weights(tmp_path / "c.safetensors"), open_file(tmp_path / "c.safetensors")[0])
    while second.step < 30:
        second.update()
    assert torch.allclose(whole.losses, second.losses, atol=1e-3)


def test_update_never_waits_for_the_device(monkeypatch):
    """Catches a number that Python asks the device for, and a tensor on the wrong device, without a GPU.

    The device "meta" computes shapes alone: it has no numbers to give, and takes no tensor of another device.
    """
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # there is none for this device
    meta, adamw = torch.device("meta"), torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda p, **options: adamw(p, **options | dict(lr=0.1, fused=False)))
    it = trainer(NETWORK, dtype=torch.bfloat16, device=meta, grad_accum=2)
    it.adamw = SimpleNamespace(param_groups=[dict(lr=torch.zeros((), device=meta))], step=lambda: None)
    stepped = []
    it.muon.step, step = lambda rate: stepped.append(rate.device) or step(rate), it.muon.step
    for _ in range(3):
        it.update()
    assert stepped == [meta] * 3 and all(p.grad.device == meta for p in it.model.parameters())
    with pytest.raises(RuntimeError, match="meta"):
        float(it.losses[0])


def test_graph_that_cannot_be_recorded(monkeypatch, capsys):
    """Catches an old GPU or driver that ends the training: one line, and it goes on without the graph."""
    it = trainer()
    it.replay.stream, it.replay.eager_left = object(), 0

    class Graph:
        def __enter__(self):
            raise RuntimeError("operation not permitted\nmore")

        def __exit__(self, *arguments):
            pass

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", SimpleNamespace)
    monkeypatch.setattr(torch.cuda, "graph", lambda *arguments, **options: Graph())
    for _ in range(3):
        it.update()
    assert it.step == 3 and float(it.losses[:3].min()) > 0 and it.replay.graph is None
    notes = capsys.readouterr().err
    assert notes.count("\n") == 1 and "operation not permitted" in notes


def test_gradients_left_behind():
    """Catches an update that adds to what a failed recording left in the gradients."""
    ends = []
    for left in (None, 1e3):
        it = trainer()
        for weight in it.model.parameters() if left else ():
            weight.grad = torch.full_like(weight, left)
        it.update()
        ends.append(dict(it.model.state_dict()))
    same(*ends)


def test_error_in_evaluate_is_a_user_error():
    """Catches a diverged training that is only noticed by a missing best model."""
    it = trainer()
    it.update()
    it.model.wte.weight.data.fill_(torch.nan)
    with pytest.raises(UserError, match="diverged"):
        it.evaluate()
