"""Terminal: progress, chart, escaping and standard streams, on pseudo-terminals and off them.

The program runs in forks of this process, on real descriptors but without PyTorch's start-up time.
"""

import dataclasses
import errno
import io
import itertools
import json
import os
import re
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import TINY, Result, header, interrupt_at, prose
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter

import anexagpt

if os.name != "posix":
    pytest.skip("needs fork and pseudo-terminals", allow_module_level=True)
import fcntl
import pty
import struct
import termios

import pexpect.fdpexpect


def run_and_exit(arguments, env: dict, closed=()) -> None:
    """In a fork: the program on descriptors 0, 1 and 2, of which `closed` names the closed ones."""
    status = 1
    try:
        os.environ.update(env)
        for name in {"COLUMNS", "LINES", "NO_COLOR"} - env.keys():
            os.environ.pop(name, None)
        for fd, name in enumerate(("stdin", "stdout", "stderr")):
            if name in closed:
                os.close(fd)
                setattr(sys, name, None)
            else:
                raw = open(fd, "wb" if fd else "rb", closefd=False)  # noqa: SIM115
                stream = io.TextIOWrapper(raw, env.get("PYTHONIOENCODING", "utf-8"))
                setattr(sys, name, stream)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        status = anexagpt.main([str(a) for a in arguments])
    except SystemExit as leave:
        status = leave.code or 0
    except BaseException:
        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):
            stream.flush()
    os._exit(status)


def in_fork(*arguments, stdin: str = "", closed=(), **env) -> Result:
    """Exit status and output, both of which go to files."""
    names = "in.txt", "out.txt", "err.txt"
    Path(names[0]).write_text(stdin, encoding="utf-8")
    if (pid := os.fork()) == 0:
        for fd, name in enumerate(names):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC * bool(fd)), fd)
        run_and_exit(arguments, env, closed)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return Result(status, *(Path(name).read_bytes().decode() for name in names[1:]))


class Terminal(pexpect.fdpexpect.fdspawn):
    """The program on a pseudo-terminal."""

    def __init__(self, *arguments, rows: int = 24, columns: int = 80, **env):
        self.program, fd = pty.fork()
        if self.program == 0:
            fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
            run_and_exit(arguments, dict(TERM="xterm-256color", COLORTERM="truecolor") | env)
        super().__init__(fd, encoding="utf-8", timeout=30)

    def press(self, keys: str, words: str) -> None:
        """Send keys until words come: a Ctrl-C may be lost while the terminal changes its mode."""
        for _ in range(3):
            self.send(keys)
            if self.expect_exact([words, pexpect.TIMEOUT], 10) == 0:
                return
        raise AssertionError(f"{words} never came: {self.before}")

    def end(self) -> int:
        """Exit status; `before` is what came last."""
        self.expect(pexpect.EOF)
        return os.waitstatus_to_exitcode(os.waitpid(self.program, 0)[1])


def random_model(tiny: Path, path: Path | str, characters: str, scale: float = 0.4, **shape):
    """A model file with random weights and these characters, which writes at random, too."""
    characters = "\ufffd" + "".join(sorted(set(characters)))
    shape = dict(block_size=32, n_layer=2, n_head=2, n_embd=16, dropout=0.0) | shape
    config = anexagpt.GPTConfig(vocab_size=len(characters), **shape)
    network = anexagpt.GPT(config)
    torch.manual_seed(1)
    weights = {n: torch.randn(w.shape) * scale for n, w in network.named_parameters()}
    fields = dict(config=dataclasses.asdict(config), characters=characters)
    metadata = header(tiny)["__metadata__"] | {k: json.dumps(v) for k, v in fields.items()}
    save_file(weights, path, metadata)
    return anexagpt.load(path)


# ---- escaping ----

STEERING = "\x00\x08\x0b\r\x1b\x1f\x7f\x9b\x9f\u061c\u200e\u200f\u202a\u202e\u2066\u2069"
VISIBLE = "a\n\t\u06dd\u200b\u00ad\ufeff\u4f60\U0001f600\u0301"


def test_text_is_escaped_on_a_terminal_only(tiny, tmp_path, monkeypatch):
    """Catches `generate > file` that changes characters (issue 28), and a model that steers a
    terminal, or whose visible characters, as U+06DD, are spelt out there."""
    monkeypatch.chdir(tmp_path)
    model = random_model(tiny, "model.safetensors", STEERING + VISIBLE, scale=0.01)
    text = "a" + model.generate("a", max_new=400, seed=1)
    assert set(STEERING + VISIBLE) <= set(text)
    command = "generate", "a", "-n", 400, "--seed", 1
    assert in_fork(*command).out == text + "\n"
    shown = "".join(c.encode("unicode_escape").decode() if c in STEERING else c for c in text)
    child = Terminal(*command)
    assert child.end() == 0 and child.before == shown.replace("\n", "\r\n") + "\r\n"
    assert in_fork("chat", "-n", 400, "--seed", 1, stdin="a\n").out == text + "\n"
    child = Terminal("generate", "a", "-k", 2, "-n", 400, "--seed", 1)
    assert child.end() == 0 and not set(STEERING) - {"\r"} & set(child.before)


@pytest.mark.parametrize("name", ["x[/y].txt", "[red]b[/red].txt", "a\x1b[31m\u202e\x9b2J.txt"])
def test_names_are_shown_as_they_are_and_steer_nothing(tiny, tmp_path, monkeypatch, name):
    """Catches names that are parsed as rich markup, or that reach the terminal raw (issue 31)."""
    monkeypatch.chdir(tmp_path)
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_text(prose(200))
    shown = "".join(c.encode("unicode_escape").decode() if c in STEERING else c for c in name)
    child = Terminal("train", name, *TINY, "--max-steps", 2, columns=200)
    assert child.end() == 0 and shown in child.before, child.before
    assert not set(STEERING) - set("\r\x1b") & set(child.before) and "\x1b[31m" not in child.before
    for command in (["info"], ["eval", name, "--device", "cpu"], ["eval", "--data", name + "\x1b"]):
        result = in_fork(*command)
        assert shown in result.out + result.err
        assert not set(STEERING) & set(result.out + result.err)


# ---- standard streams ----

COMMANDS = {
    command.split()[0]: command.split()
    for command in (
        "train prose.txt --max-steps 2 --out new.safetensors " + " ".join(TINY), "run -n 5",
        "chat -n 5", "generate the -n 5", "explain the", "eval prose.txt --device cpu", "info",
        "export hf --force", "push me/tiny",
    )
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_closed_streams(tiny, tmp_path, monkeypatch, command):
    """Catches tracebacks where a shell has closed a stream (`<&-`), and files of ours
    that take its descriptor and are written over (issue 30)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    Path("model.safetensors").write_bytes(tiny.read_bytes())
    Path("prose.txt").write_text(prose(), encoding="utf-8", newline="\n")
    for closed in ("stdin", "stdout", "stderr"):
        Path("new.safetensors").unlink(missing_ok=True)
        result = in_fork(*COMMANDS[command], closed=[closed])
        assert "Traceback" not in result.out + result.err, result.err
        assert result.status == (2 if command == "push" else 0), result
        if command == "push" and closed == "stdin":
            assert "HF_TOKEN" in result.err
        assert Path("model.safetensors").read_bytes() == tiny.read_bytes()


def test_a_stream_without_the_characters(tiny, tmp_path, monkeypatch):
    """Catches a UnicodeEncodeError on a terminal that has ASCII only, and a pipe of other bytes
    than UTF-8."""
    monkeypatch.chdir(tmp_path)
    random_model(tiny, "model.safetensors", "abc\n \u03b1\u4f60")
    child = Terminal("generate", "\u03b1", "-n", 50, PYTHONIOENCODING="ascii")
    assert child.end() == 0 and child.before.startswith("\\u03b1") and child.before.isascii()
    assert in_fork("generate", "\u03b1", PYTHONIOENCODING="ascii").out.startswith("\u03b1")


# ---- progress ----


def test_progress_on_a_terminal_of_60_columns(tmp_path, monkeypatch):
    """Catches a live line that is cut, wrapped or not all overwritten, Ctrl-C that loses the run,
    another exit status than 130, and a run that does not resume."""
    monkeypatch.chdir(tmp_path)
    Path("prose.txt").write_text(prose(), encoding="utf-8")
    command, reached = ["train", "prose.txt", *TINY, "--max-steps", 5_000], 0
    for turn in range(2):
        child = Terminal(*command, columns=60)
        if turn:
            child.expect(r"Resuming model\.safetensors\.checkpoint at step ([\d,]+)")
            assert int(child.match[1].replace(",", "")) == reached
        line = r"[\d,]+/5,000 train \d\.\d{3} val (?:\d\.\d{3}|  -  ) [\d,]+ char/s [\d:]+ left *\r"
        for _ in range(2):
            child.expect(line)
            assert len(child.after) == 60 and child.before[-1:] in "\r\n\x1bmKlh2", child.before
        child.send("\x03")
        child.expect("Stopping after this step")
        child.expect(r"Stopped at step ([\d,]+), saved in model\.safetensors\.checkpoint")
        reached = int(child.match[1].replace(",", ""))
        assert child.end() == 130 and "The same command resumes it." in child.before
    assert reached > 0 and not Path("model.safetensors").exists()


def test_chart_over_the_live_line(tmp_path, monkeypatch):
    """Catches remains of the progress in the first row of the chart, which is shorter."""
    monkeypatch.chdir(tmp_path)
    Path("prose.txt").write_text(prose(), encoding="utf-8")
    steps = ["--max-steps", 20, "--eval-interval", 5]
    child = Terminal("train", "prose.txt", *TINY, *steps, columns=60)
    assert child.end() == 0
    assert re.search(r"[\r\n] {59}\r +\d\.\d{3} \|", child.before), child.before


def test_progress_of_an_evaluation(tiny, tmp_path, monkeypatch):
    """Catches minutes of silence over a large text, and a bar that stays."""
    monkeypatch.chdir(tmp_path)
    Path("large.txt").write_text(prose() * 5)
    child = Terminal("eval", tiny, "large.txt")
    child.expect("Evaluating on large.txt")
    child.expect(" 0%.*100%")
    child.expect("\x1b\\[2Klarge.txt, whole text")
    assert child.end() == 0


def test_progress_off_a_terminal(cli, tmp_path):
    """Catches a first sample that comes late (after 50 steps), lines that lack a figure, 4 digits
    without a comma, escape sequences in a log, and a chart that is too wide or not of the run."""
    Path("prose.txt").write_text(prose(3_000), encoding="utf-8")
    text = Path("prose.txt").read_text(encoding="utf-8")
    limits = ["--max-steps", 300, "--eval-interval", 100]
    result = cli("train", "prose.txt", *TINY, *limits)
    assert result.status == 0 and result.out == "" and not {"\x1b", "\r"} & set(result.err)
    assert f"{len(text):,} characters" in result.err
    assert not re.search(r"(?<![\d.,])\d{4}", result.err), "a comma is missing"
    line = r"([\d,]+)/300 train \d\.\d{3} val \d\.\d{3} [\d,]+ char/s \d+:\d\d left \| .+"
    steps = [m[1] for m in map(re.compile(line).fullmatch, result.err.splitlines()) if m]
    assert steps == ["50", "100", "200", "300"]
    metadata = anexagpt.load("model.safetensors").metadata
    lines = [row for row in result.err.splitlines() if re.match(r" +(\d\.\d{3} \||\+-| 0 )", row)]
    assert len(lines) >= 10 and max(map(len, lines)) <= 60 and "step 300" in lines[-1]
    rows = {float(row[:7]): row[9:] for row in lines if "|" in row}
    values, width = sorted(rows, reverse=True), len(lines[-2]) - 9
    half = (values[0] - values[1]) / 2 + 0.0011
    for step, *losses in metadata.history:
        column = round(step / 300 * (width - 1))
        for loss, marks in zip(losses, ("ox", "x"), strict=True):  # an x may cover an o
            at = [v for v, row in rows.items() if row[column : column + 1] in (*marks,)]
            assert min(abs(v - loss) for v in at) < half, (step, loss)
    command = ["train", "prose.txt", *TINY, *limits, "--out", "b.safetensors"]
    with interrupt_at(290):
        assert cli(*command).status == 130
    speeds = re.findall(r"([\d,]+) char/s", result.err + cli(*command).err)
    *before, resumed = (int(speed.replace(",", "")) for speed in speeds)
    assert resumed < 5 * max(before)  # of 10 steps, not of 300 in the same time
    quiet = cli("train", "prose.txt", *TINY, "--max-steps", 2, "--restart", "--quiet").err
    assert "/2 " not in quiet and "epochs" not in quiet
    assert quiet.endswith("Training finished...\nModel saved to model.safetensors\n")


@pytest.mark.parametrize("seconds, speed, words", [
    (4.0, "16", ["NOTE: this run takes about 10 hours", "max-steps", "can use its checkpoint"]),
    (0.5, "128", ["NOTE: this run takes about 75 minutes", "max-steps"]),
    (0.05, "1,280", []),
])  # fmt: skip
def test_long_run_says_how_to_shorten_it(cli, monkeypatch, seconds, speed, words):
    """Catches a user who waits a quarter of an hour without knowing what can be done, advice for a
    run of 8 minutes, hours that are minutes, and a speed in windows."""
    Path("prose.txt").write_text(prose(700))
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    step = anexagpt.Trainer.step

    def timed_step(trainer):
        nonlocal now
        step(trainer)
        now += seconds

    monkeypatch.setattr(anexagpt.Trainer, "step", timed_step)
    command = ["train", "prose.txt", *TINY, "--batch-size", 4, "--max-steps", 9_050]
    with interrupt_at(60):
        result = cli(*command, "--checkpoint-interval", 1e9)
    assert result.status == 130
    assert re.findall(r"([\d,]+) char/s", result.err) == [speed]
    assert all(word in result.err for word in words)
    for word in ("takes about", "max-steps"):
        assert result.err.count(word) == bool(words)


def test_time_left(cli, monkeypatch):
    """Catches an estimate from a slow first step, an evaluation or the fast short contexts."""
    Path("prose.txt").write_text(prose(700))
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)

    step, validate = anexagpt.Trainer.step, anexagpt.Trainer.validate

    def slow_step(trainer):
        nonlocal now
        step(trainer)
        now += 0.5 if trainer.context_length == 64 else 0.25
        now += 60 if trainer.steps_done == 1 else 0

    def slow_validate(trainer):
        nonlocal now
        now += 40
        return validate(trainer)

    monkeypatch.setattr(anexagpt.Trainer, "step", slow_step)
    monkeypatch.setattr(anexagpt.Trainer, "validate", slow_validate)
    command = ["train", "prose.txt", *TINY, "--block-size", 64, "--max-steps", 1_000]
    command += ["--checkpoint-interval", 1e9]
    with interrupt_at(260):
        result = cli(*command)
    assert "50/1,000" in result.err and "250/1,000" in result.err
    left = re.findall(r"(\d+:\d+) left", result.err)
    assert left == ["10:35", "08:15"]  # 950 steps and 4 evaluations, 750 and 3
    assert "takes about 11 minutes" in result.err


def test_tensorboard(cli):
    """Catches figures that are not those of the run, and points that a resumed run loses."""
    Path("prose.txt").write_text(prose(700))
    command = ["train", "prose.txt", *TINY, "--max-steps", 60, "--eval-interval", 20]
    command += ["--tensorboard", "runs"]
    with interrupt_at(40):
        assert cli(*command).status == 130
    assert cli(*command).status == 0
    events, history = EventAccumulator("runs"), anexagpt.load("model.safetensors").metadata.history
    events.Reload()
    for i, name in enumerate(("training_loss", "validation_loss"), 1):
        points = [(point.step, pytest.approx(point.value)) for point in events.Scalars(name)]
        assert points == [(row[0], row[i]) for row in history] and len(points) == 4
    cfg = anexagpt.TrainConfig.pick(anexagpt.load("model.safetensors").metadata.training)
    expected = [pytest.approx(anexagpt.lr_scale(row.step - 1, cfg)) for row in history]
    assert [point.value for point in events.Scalars("lr_scale")] == expected
    assert all(point.value > 100 for point in events.Scalars("characters_per_second"))


@pytest.mark.parametrize("n", [0, 3, 9])
def test_tensorboard_on_a_full_disk(cli, monkeypatch, n):
    """Catches a thread's traceback, a note for each evaluation, and a run that ends."""
    Path("prose.txt").write_text(prose(300))
    writes, write = itertools.count(), RecordWriter.write

    def fill(self, data):
        if next(writes) >= n:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, data)

    monkeypatch.setattr(RecordWriter, "write", fill)
    printed = []
    hook = lambda args: printed.append(args)  # noqa: E731
    monkeypatch.setattr(threading, "excepthook", hook)
    command = ["train", "prose.txt", *TINY, "--max-steps", 9, "--eval-interval", 1]
    result = cli(*command, "--tensorboard", "runs")
    assert threading.excepthook is hook and not printed
    assert result.err.count("No space left on device") == 1
    if n:
        assert result.status == 0 and "NOTE: runs: " in result.err
    else:
        assert result.is_error("--tensorboard runs")


def test_one_is_singular(tiny, cli):
    """Catches "1 heads", "1 characters"."""
    random_model(tiny, "model.safetensors", "abc\n", n_head=1, n_layer=1)
    Path("t.txt").write_text("abc\n" * 100 + "z")
    Path("prose.txt").write_text(prose(100))
    commands = ["explain a", "info", "eval t.txt", "info o.safetensors"]
    commands.insert(0, " ".join(["train prose.txt --max-steps 1 --out o.safetensors", *TINY]))
    results = [cli(*command.split()) for command in commands]
    text = "\n".join(r.out + r.err for r in results)
    assert not any(r.status for r in results), text
    assert not re.search(r"(?<![\d.,/])1 (heads|characters|ids|processes)\b", text), text


def test_chart_of_a_start_far_above():
    """Catches losses of the first steps, above the chart's scale, that are drawn at its bottom.

    The scale is of the steps from a tenth of the run on: here from 3 down to 1.
    """
    early = [(step, 9.0 + step, 9.0 + step) for step in (10, 20, 30)]
    late = [(step, 3 - step / 500, 3 - step / 500) for step in range(100, 1001, 100)]
    history = [anexagpt.Evaluation(*row) for row in early + late]
    rows = [line[9:] for line in anexagpt.loss_chart(history).splitlines() if " |" in line]
    assert len(rows) == 12
    for row, *_ in (early[0], early[1], early[2]):
        column = round(row / 1000 * 50)
        assert [line[column : column + 1].strip() for line in rows] == ["x", *[""] * 11]


def test_second_signal(monkeypatch):
    """Catches a second SIGTERM that costs the checkpoint, and a message of each rank."""
    written = []
    monkeypatch.setattr(os, "write", lambda fd, words: written.append(words))
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        stop = anexagpt.SignalCatcher()
        assert not stop()
        stop.handle(signal.SIGTERM, None)
        stop.first_time -= 5
        try:
            stop.handle(signal.SIGTERM, None)
        except KeyboardInterrupt:
            pytest.fail("the run is left without its checkpoint")
        assert stop()
        assert len(written) == int(rank == "0")
    with pytest.raises(KeyboardInterrupt):
        stop.handle(signal.SIGINT, None)


def test_figures_of_the_progress(cli):
    """Catches losses in the wrong order, and a wrong size of text or run in the first line."""
    Path("prose.txt").write_text(prose(700))
    command = ["train", "prose.txt", *TINY, "--batch-size", 4, "--max-steps", 24]
    err = cli(*command, "--eval-interval", 8).err
    history = anexagpt.load("model.safetensors").metadata.history
    assert re.findall(r"(\d+)/24 train (\S+) val (\S+) ", err) == [
        (str(row.step), f"{row.training_loss:.3f}", f"{row.validation_loss:.3f}") for row in history
    ]
    text = Path("prose.txt").read_text()
    epochs = 24 * 4 * 16 / (len(text) * 9 // 10)
    assert f"{len(set(text))} different" in err and f" {epochs:,.1f} epochs" in err


def test_overfitting_means_a_lower_training_loss():
    """Catches a validation loss that rises with the training loss, as in a run that diverges."""
    rows = [anexagpt.Evaluation(i, 2.0, 2 + 0.1 * i) for i in range(1, 9)]
    assert not anexagpt.overfits(rows)
    assert anexagpt.overfits([row._replace(training_loss=2 - 0.1 * row.step) for row in rows])
