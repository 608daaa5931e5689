"""Faults: whatever goes wrong around the program, it ends in one clear line, and what was there before is still there.

What a fault does to a whole process (limits, other users, signals, closed pipes) is tried in forks of this one, which
have PyTorch at hand.
"""

import errno
import io
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, Result, header, prose

import anexagpt
from anexagpt import Trainer, UserError, load_model, open_file, replacing

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
CPU = torch.device("cpu")
OPTIONS = ["--data", "prose.txt", *TINY, "--dropout", "0.1", "--max-steps", "24", "--eval-interval", "8"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty folder with a text to learn."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prose.txt").write_text(prose(700), encoding="utf-8", newline="\n")
    return tmp_path


def names(folder: Path = Path(".")) -> set[str]:
    """All files below a folder, hidden ones too."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def apart(*arguments, prepare: Callable = lambda: None, stderr: int | None = None) -> Result:
    """Run the program in a fork of this process, after `prepare` has been called there."""
    reading, writing = os.pipe()
    if not (process := os.fork()):
        status = 99
        try:
            os.close(reading)
            os.dup2(os.open(os.devnull, os.O_RDWR), 0)
            os.dup2(os.open(os.devnull, os.O_RDWR), 1)
            os.dup2(writing if stderr is None else stderr, 2)
            sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115 (pytest has its own)
            prepare()
            status = anexagpt.main(anexagpt.parse_options(list(map(str, arguments))))
        except BaseException as error:
            os.write(2, f"Traceback {error!r}\n".encode())
        os._exit(status)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read().decode()
    return Result(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), "", said)


def last_line(result: Result, *words: str) -> str:
    """The last line of a training that failed; it has these words, and no traceback is above it."""
    assert result.status == 2 and "Traceback" not in result.err, result
    line = result.err.splitlines()[-1]
    assert line.startswith("anexagpt.py: ") and all(word in line for word in words), line
    return line


def during(monkeypatch, step: int, what: Callable[[Trainer], None]) -> None:
    """Let something happen right after an update."""
    update = Trainer.update

    def updating(self):
        update(self)
        if self.step == step:
            what(self)

    monkeypatch.setattr(Trainer, "update", updating)


def test_ctrl_c_while_the_model_is_saved(cli, monkeypatch):
    """Catches a finished training that Ctrl-C throws away in its last moment."""
    fsync = os.fsync

    def interrupted(number):
        if list(Path(".").glob(".model.safetensors.*.tmp")):
            monkeypatch.setattr(os, "fsync", fsync)
            signal.raise_signal(signal.SIGINT)
        fsync(number)

    monkeypatch.setattr(os, "fsync", interrupted)
    assert cli("train", *OPTIONS, "--quiet").status == 0
    assert load_model(Path("model.safetensors"), CPU)[2].step == 24


# ---- kills -----------------------------------------------------------------------------------------------------------


@needs_fork
def test_torture():
    """Catches anything that SIGKILL can break: a file that loads wrong, other bits at the end, leftovers. The long form
    of this test is tests/benchmarks/torture.py."""
    sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
    import torture

    counts = torture.torture(kills=12)
    assert counts["stories"] and counts["training"] and sum(counts.values()) >= 12


def dead_process() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_what_killed_processes_left_goes_and_nothing_else():
    """Catches leftovers that stay for ever, and a sweep that takes the file of a living process or of somebody else."""
    mine, dead, living = os.getpid(), dead_process(), os.getppid()
    kept = {f".m.{living}.tmp", ".m.tmp", ".m.x.tmp", f"m.{dead}.tmp", f".m.y.{dead}.tmp", f".mm.{dead}.tmp", "m"}
    if os.name == "nt":
        kept.remove(f".m.{living}.tmp")  # nobody has it open
    for name in [f".m.{mine}.tmp", f".m.{dead}.tmp", *kept]:
        Path(name).write_text("old")
    with replacing(Path("m")) as file:
        file.write(b"new")
    assert names() - {"prose.txt"} == kept and Path("m").read_text() == "new"


def test_a_training_clears_up_after_killed_ones(cli):
    """Catches a half-written model or checkpoint that lies there for ever, since the next run writes other files."""
    pid = dead_process()
    for name in (f".model.safetensors.{pid}.tmp", f".checkpoint.safetensors.{pid}.tmp", ".model.safetensors.lock"):
        Path(name).write_text("x")
    assert cli("train", *OPTIONS, "--quiet").status == 0
    assert names() == {"prose.txt", "model.safetensors"}


def test_export_that_is_killed_half_way(cli, tiny, monkeypatch):
    """Catches a folder with the files of two models that transformers would load without a word."""
    assert cli("export", "out", "--model", tiny).status == 0
    replace, moved = os.replace, []

    def replacing_some(source, target):
        if Path(target).parent.name == "out":
            moved.append(Path(target).name)
            if len(moved) == 4:
                raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", replacing_some)
    assert cli("export", "out", "--model", tiny).status == 130
    assert len(moved) == 4 and "config.json" not in {path.name for path in Path("out").iterdir()}
    monkeypatch.setattr(os, "replace", replace)
    assert cli("export", "out", "--model", tiny).is_error("out", "--force")
    assert cli("export", "out", "--model", tiny, "--force").status == 0
    assert len(names(Path("out"))) == 6 and not list(Path(".").glob(".out*"))


# ---- disks -----------------------------------------------------------------------------------------------------------


def small_files(size: int) -> Callable:
    """No file may become larger than this: the nearest to a full disk that needs no rights."""
    resource = pytest.importorskip("resource")
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@needs_fork
def test_no_room_for_the_model(cli):
    """Catches a finished model that is lost, and an old one that goes with it, since there was no room."""
    assert cli("train", *OPTIONS, "--quiet").status == 0
    before = Path("model.safetensors").read_bytes()
    result = apart("train", *OPTIONS, "--restart", "--checkpoint-interval", 0, prepare=small_files(10_000))
    last_line(result, "cannot be written (File too large)", "make room")
    assert "NOTE: checkpoint.safetensors: cannot be written (File too large)" in result.err
    assert Path("model.safetensors").read_bytes() == before and names() == {"prose.txt", "model.safetensors"}


def test_no_room_for_the_model_but_elsewhere(cli, monkeypatch, tmp_path_factory):
    """Catches a training of hours that ends in nothing since its own disk is full, while there is room on another."""
    room = tmp_path_factory.mktemp("room")
    monkeypatch.setattr(anexagpt.tempfile, "tempdir", str(room))
    fsync = os.fsync

    def full(number):
        if list(Path(".").glob(".model.safetensors.*.tmp")):
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(number)

    monkeypatch.setattr(os, "fsync", full)
    result = cli("train", *OPTIONS, "--quiet")
    line = last_line(result, "model.safetensors: cannot be written (No space left on device)", str(room))
    other = Path(line.rpartition("model is in ")[2].partition(":")[0])
    assert load_model(other, CPU)[2].step == 24 and names() == {"prose.txt"}


@needs_fork
def test_no_room_for_the_checkpoint_at_ctrl_c(cli, monkeypatch):
    """Catches a checkpoint that is destroyed by the attempt to write the next one, and a traceback after Ctrl-C."""
    during(monkeypatch, 9, lambda it: signal.raise_signal(signal.SIGINT))
    assert cli("train", *OPTIONS).status == 130
    before = Path("checkpoint.safetensors").read_bytes()
    during(monkeypatch, 15, lambda it: signal.raise_signal(signal.SIGINT))
    last_line(apart("train", *OPTIONS, prepare=small_files(10_000)), "checkpoint.safetensors", "File too large")
    assert Path("checkpoint.safetensors").read_bytes() == before
    assert names() == {"prose.txt", "checkpoint.safetensors"}


@needs_fork
def test_no_room_for_the_log(cli):
    """Catches a training that ends because its figures cannot be kept, and old figures that are cut off."""
    assert cli("train", *OPTIONS, "--quiet", "--log", "log.csv").status == 0
    whole = Path("log.csv").read_text()
    result = apart("train", *OPTIONS, "--restart", "--log", "log.csv", prepare=small_files(100))
    assert result.status == 2 and Path("log.csv").read_text().startswith(whole.splitlines()[0])
    Path("log.csv").write_text(whole.splitlines()[0] + "\n")

    class Full:
        name = "log.csv"

        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

    real, opened = open, []

    def opening(file, mode="r", **others):
        opened.append(mode)
        return Full() if mode == "a" and str(file) == "log.csv" else real(file, mode, **others)

    anexagpt.open = opening
    try:
        result = cli("train", *OPTIONS, "--restart", "--log", "log.csv")
    finally:
        del anexagpt.open
    assert result.status == 0 and "a" in opened and result.err.count("NOTE: log.csv: cannot be written (No space") == 1
    assert Path("model.safetensors").exists()


@needs_fork
def test_no_room_for_a_download(server):
    """Catches a traceback, half a file in data/, and a fallback to another text for want of room."""
    from conftest import Answer

    page = server.page("/text.txt", Answer(b"text\n" * 10_000))
    line = last_line(apart("train", "--data", page, prepare=small_files(10_000)), "text.txt", "File too large", "room")
    assert "\n" not in line and names() == {"prose.txt"}


@needs_fork
def test_no_room_for_an_export(cli, tiny):
    """Catches half a folder, and a traceback; the export before stays whole."""
    assert cli("export", "out", "--gguf", "m.gguf", "--model", tiny).status == 0
    before = {name: Path(name).read_bytes() for name in names()}
    result = apart("export", "out", "--model", tiny, prepare=small_files(10_000))
    last_line(result, "model.safetensors: File too large")
    result = apart("export", "--gguf", "m.gguf", "--model", tiny, prepare=small_files(10_000))
    last_line(result, "m.gguf: cannot be written (")
    assert {name: Path(name).read_bytes() for name in names()} == before


def test_no_room_for_a_talk(tiny, monkeypatch, capsys):
    """Catches a full disk that ends the talk which was to be saved."""
    model, tokenizer, story = load_model(tiny, CPU)
    session = anexagpt.Session(model, tokenizer, story, anexagpt.SampleConfig(max_new=3))
    session.respond("the")
    lines = iter(["/save talk.json", "quit"])

    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(anexagpt, "line_editor", lambda session: lambda: next(lines))
    anexagpt.chat(model, tokenizer, story, anexagpt.SampleConfig())
    assert "(talk.json: No space left on device)" in capsys.readouterr().err and names() == {"prose.txt"}


def test_a_real_disk_that_is_full(cli, folder):
    """Catches what the tests above only imitate, on a file system of 100 kB; root may make one."""
    disk = folder / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(disk)]
    if os.name == "nt" or os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        out = disk / "m.safetensors"
        assert cli("train", *OPTIONS, "--quiet", "--out", out).status == 0
        before = out.read_bytes()
        (disk / "rest").write_bytes(b"x" * (100 * 1024 - len(before) - 16_384))
        result = cli("train", *OPTIONS, "--restart", "--checkpoint-interval", 0, "--out", out)
        last_line(result, "m.safetensors: cannot be written (No space left on device)", "the model is in")
        assert "NOTE: " in result.err and out.read_bytes() == before
        assert names(disk) == {"m.safetensors", "rest"}
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def nobody() -> None:
    """Be a person without rights from now on."""
    if os.geteuid() == 0:
        os.setgid(65_534)
        os.setuid(65_534)


@needs_fork
def test_read_only_folder(folder, cli):
    """Catches a traceback, and a text in data/ that cannot be read where nothing can be written."""
    if sys.platform != "linux":
        pytest.skip("nobody has another number here")
    for path in (*folder.parents, folder):
        if not path.stat().st_mode & 1:
            path.chmod(path.stat().st_mode | 0o11)  # so that nobody finds the way
    assert cli("train", *OPTIONS, "--quiet").status == 0
    Path("data").mkdir()
    Path("data/sherlock.txt").write_bytes((prose(600) + anexagpt.SOURCES["sherlock"].ending + "\n").encode())
    Path("other").mkdir(mode=0o777)
    Path("other").chmod(0o777)
    Path("data").chmod(0o555)
    folder.chmod(0o555)
    try:
        before = {name: Path(name).read_bytes() for name in names()}
        last_line(apart("train", *OPTIONS, "--restart", prepare=nobody), "--out model.safetensors", "written to")
        here = apart("eval", "--data", "sherlock", prepare=nobody)
        assert here.status == 0, here
        there = ["--out", "other/m.safetensors", *OPTIONS[2:]]
        assert apart("train", "--data", "sherlock", *there, prepare=nobody).status == 0
        assert before == {name: Path(name).read_bytes() for name in before}
    finally:
        folder.chmod(0o755)
        Path("data").chmod(0o755)


def test_devices_stay_devices(cli, tiny):
    """Catches --out or /save that replaces /dev/null by a file, which root may do."""
    if not Path("/dev/null").exists():
        pytest.skip("no /dev/null")
    Path("null").symlink_to("/dev/null")
    last_line(cli("train", *OPTIONS, "--quiet", "--restart", "--out", "null"), "null", "no ordinary file")
    assert Path("null").is_symlink() and not Path("/dev/null").is_file()


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
@pytest.mark.parametrize("old, allowed", [(0o600, 0o600), (0o640, 0o640), (0o664, 0o664), (None, 0o644)])
def test_modes_do_not_widen(monkeypatch, old, allowed):
    """Catches a private file that others can read: afterwards, or while it is written."""
    umask = os.umask(0o022)
    try:
        if old is not None:
            Path("m").write_text("old")
            Path("m").chmod(old)
        with replacing(Path("m")) as file:
            file.write(b"new")
            assert Path(file.name).stat().st_mode & 0o777 & ~allowed == 0
        assert Path("m").stat().st_mode & 0o777 == allowed
        anexagpt.write_private(Path("m"), "private")
        assert Path("m").stat().st_mode & 0o777 == 0o600
    finally:
        os.umask(umask)


# ---- files that vanish or change -------------------------------------------------------------------------------------


def test_text_that_vanishes(cli, monkeypatch):
    """Catches a traceback when the text has gone before a training is continued."""
    during(monkeypatch, 9, lambda it: signal.raise_signal(signal.SIGINT))
    assert cli("train", *OPTIONS).status == 130
    Path("prose.txt").rename("elsewhere.txt")
    assert cli("train", *OPTIONS).is_error("--data prose.txt", "neither a file")
    Path("elsewhere.txt").rename("prose.txt")
    assert cli("train", *OPTIONS).status == 0


@pytest.mark.parametrize("change", ["vanishes", "other shapes", "half"])
def test_model_that_changes_while_it_is_opened(cli, tiny, monkeypatch, change):
    """Catches a traceback, or a network of two models, where a training saves just when a talk begins."""
    path = Path("m.safetensors")
    path.write_bytes(tiny.read_bytes())
    assert cli("train", *OPTIONS, "--quiet", "--n-embd", 8).status == 0
    real = open_file

    def opening(path):
        found = real(path)
        path.unlink()
        if change != "vanishes":
            content = Path("model.safetensors").read_bytes()
            path.write_bytes(content if change == "other shapes" else content[:5000])
        return found

    monkeypatch.setattr(anexagpt, "open_file", opening)
    assert cli("generate", "the", "--model", path).is_error("m.safetensors", "changed")


def test_checkpoint_that_vanishes(cli, monkeypatch):
    """Catches a traceback when somebody tidies up between two looks at the checkpoint."""
    during(monkeypatch, 9, lambda it: signal.raise_signal(signal.SIGINT))
    assert cli("train", *OPTIONS).status == 130
    real = open_file

    def opening(path, *more):
        found = real(path, *more)
        path.unlink()
        return found

    monkeypatch.setattr(anexagpt, "open_file", opening)
    result = cli("train", *OPTIONS)
    assert result.status == 2 and result.err.count("\n") == 1 and "Traceback" not in result.err


def test_folder_that_vanishes(cli, monkeypatch, tmp_path_factory):
    """Catches a training that is lost with the folder that it was to be saved in."""
    monkeypatch.setattr(anexagpt.tempfile, "tempdir", str(tmp_path_factory.mktemp("room")))
    Path("sub").mkdir()
    during(monkeypatch, 20, lambda it: Path("sub").rename("gone"))
    line = last_line(
        cli("train", *OPTIONS, "--out", "sub/m.safetensors"), "sub", "cannot be written", "the model is in"
    )
    assert load_model(Path(line.rpartition("model is in ")[2].partition(":")[0]), CPU)[2].step == 24


# ---- pipes, processes, clocks ----------------------------------------------------------------------------------------


@needs_fork
@pytest.mark.parametrize("full", [False, True], ids=["reader gone", "disk full"])
def test_nobody_reads_the_progress(full):
    """Catches `anexagpt.py train 2>&1 | head -1`, or a full disk under a log of the messages, that ends a training."""
    if full and not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    reading, writing = os.pipe()
    os.close(reading)
    where = os.open("/dev/full", os.O_WRONLY) if full else writing
    assert apart("train", *OPTIONS, stderr=where).status == 0
    assert load_model(Path("model.safetensors"), CPU)[2].step == 24
    os.close(writing)


@needs_fork
def test_two_trainings_in_one_folder(cli, monkeypatch):
    """Catches two processes that write one checkpoint, an error that names nobody, and a lock that outlives a kill."""
    results = []

    def second(it):
        results.append(apart("train", *OPTIONS))
        results.append(apart("train", *OPTIONS, "--out", "other.safetensors"))

    during(monkeypatch, 9, second)
    assert cli("train", *OPTIONS, "--quiet").status == 0
    assert last_line(results[0], f"process {os.getpid()} is training it") and results[1].status == 0
    assert names() == {"prose.txt", "model.safetensors", "other.safetensors"}


def test_restart_that_dies_early(cli, monkeypatch):
    """Catches a training begun anew that dies before its first save, and then goes on as the old one."""
    during(monkeypatch, 9, lambda it: signal.raise_signal(signal.SIGINT))
    assert cli("train", *OPTIONS).status == 130 and Path("checkpoint.safetensors").exists()
    during(monkeypatch, 3, lambda it: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli("train", *OPTIONS, "--restart")
    assert not Path("checkpoint.safetensors").exists()


def test_a_lock_that_cannot_be_removed(cli, monkeypatch):
    """Catches a finished training that ends with an error on Windows, where nobody removes a file that is open."""
    unlink = Path.unlink

    def unlinking(self, missing_ok=False):
        if self.suffix == ".lock":
            raise PermissionError(errno.EACCES, "in use", str(self))
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlinking)
    for _ in range(2):
        assert cli("train", *OPTIONS, "--restart").status == 0


def test_clock_that_goes_backwards(cli, monkeypatch):
    """Catches a negative time that becomes an error, a saving without end, or other weights."""
    assert cli("train", *OPTIONS, "--quiet", "--out", "whole.safetensors").status == 0
    now = [1e9]

    def backwards():
        now[0] -= 37.0
        return now[0]

    monkeypatch.setattr(time, "time", backwards)
    monkeypatch.setattr(time, "monotonic", backwards)
    assert cli("train", *OPTIONS, "--log", "log.csv").status == 0
    assert header(Path("whole.safetensors")) == header(Path("model.safetensors"))
    assert cli("generate", "the", "-n", 5).status == 0


@pytest.mark.parametrize("seconds, saves", [(0.1, 14), (2.0, 5)])
def test_saving_takes_less_than_one_percent(cli, monkeypatch, seconds, saves):
    """Catches a large network that is saved so often that a good part of the training goes into it."""
    now, saved, save = [0.0], [], anexagpt.save_file

    def saving(path, tensors, story):
        save(path, tensors, story)
        if path.stem == "checkpoint":
            now[0] += seconds
            saved.append(now[0])

    update = Trainer.update

    def updating(self):
        update(self)
        now[0] += 9.0

    monkeypatch.setattr(Trainer, "update", updating)
    monkeypatch.setattr(anexagpt, "save_file", saving)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    assert cli("train", *OPTIONS, "--max-steps", 100, "--quiet").status == 0
    assert len(saved) == saves and all(b - a > 100 * seconds for a, b in pairwise(saved))


@pytest.mark.parametrize("answer", ["y", "YES ", "", "n", None])
def test_question_on_a_terminal(cli, monkeypatch, answer):
    """Catches a training that is thrown away without a question, or with any other answer than yes."""

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    during(monkeypatch, 9, lambda it: signal.raise_signal(signal.SIGINT))
    assert cli("train", *OPTIONS).status == 130
    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr(sys, "stderr", Terminal())

    def ask(question: str) -> str:
        if answer is None:
            raise EOFError  # Ctrl-D
        return answer

    monkeypatch.setattr(anexagpt, "input", ask, raising=False)
    options = anexagpt.parse_options(["train", *OPTIONS, "--seed", "5"])
    if answer and answer.strip().lower().startswith("y"):
        assert anexagpt.unfinished(options, Path("checkpoint.safetensors")) is None
    else:
        with pytest.raises(UserError, match="nothing was done"):
            anexagpt.unfinished(options, Path("checkpoint.safetensors"))
    assert "--seed 1337, not 5" in " ".join(sys.stderr.getvalue().split()) and Path("checkpoint.safetensors").exists()


# ---- numbers and memory ----------------------------------------------------------------------------------------------


def poison(it: Trainer) -> None:
    it.model.wte.weight.data[3, 2] = torch.nan


def test_diverged_training_leaves_its_best_weights(cli, monkeypatch):
    """Catches hours that are lost with a loss that is no number, an older model that goes with them, and a checkpoint
    that leads there again."""
    assert cli("train", *OPTIONS, "--quiet", "--max-steps", 16, "--learning-rate", 0).status == 0
    before = Path("model.safetensors").read_bytes()
    update = Trainer.update
    during(monkeypatch, 20, poison)
    result = cli("train", *OPTIONS, "--restart", "--checkpoint-interval", 0)
    last_line(result, "diverged", "--learning-rate (now 0.006)", "--muon-learning-rate", "model-best.safetensors")
    assert names() == {"prose.txt", "model.safetensors", "model-best.safetensors"}
    assert Path("model.safetensors").read_bytes() == before
    model, tokenizer, story = load_model(Path("model-best.safetensors"), CPU)
    loss, _ = anexagpt.evaluate(model, anexagpt.split(tokenizer.encode(Path("prose.txt").read_text()))[1])
    assert story.validation_loss == pytest.approx(loss, abs=1e-5) and [row[0] for row in story.history] == [8, 16]
    monkeypatch.setattr(Trainer, "update", update)
    assert cli("train", *OPTIONS, "--restart", "--quiet", "--learning-rate", 0.002).status == 0


@pytest.mark.parametrize("how", ["interval", "ctrl-c"])
def test_diverged_state_never_replaces_a_good_checkpoint(cli, monkeypatch, how):
    """Catches a checkpoint with a weight that is no number, in the place of one that could go on."""

    def both(it):
        poison(it)
        if how == "ctrl-c":
            signal.raise_signal(signal.SIGINT)

    during(monkeypatch, 11, both)
    saved = []
    save = anexagpt.save_file

    def saving(path, tensors, story):
        assert all(bool(t.isfinite().all()) for t in tensors.values())
        saved.append(path.name)
        save(path, tensors, story)

    monkeypatch.setattr(anexagpt, "save_file", saving)
    interval = 0 if how == "interval" else 1e9
    last_line(cli("train", *OPTIONS, "--checkpoint-interval", interval), "diverged", "step 11", "best")
    assert saved[-1] == "model-best.safetensors" and not Path("checkpoint.safetensors").exists()


def test_divergence_before_the_first_measurement(cli, monkeypatch):
    """Catches a file of no weights at all where nothing was the best as yet."""
    during(monkeypatch, 3, poison)
    last_line(cli("train", *OPTIONS), "diverged", "nothing was measured before")
    assert names() == {"prose.txt"}


MEMORY = {
    "gpu": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried"),
    "windows": RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes."),
    "mps": RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
    "python": MemoryError(),
    "c++": RuntimeError("std::bad_alloc"),
}


@pytest.mark.parametrize("error", MEMORY.values(), ids=MEMORY)
def test_out_of_memory(cli, monkeypatch, error):
    """Catches a traceback where memory ends, and a cure without a figure; the checkpoint before stays and goes on."""

    def fail(*arguments, **options):
        raise error

    update = Trainer.update
    during(monkeypatch, 9, fail)
    last_line(cli("train", *OPTIONS, "--checkpoint-interval", 0), "--batch-size 4: out of memory", "--grad-accum 2")
    assert open_file(Path("checkpoint.safetensors"))[0].step == 8
    monkeypatch.setattr(Trainer, "update", update)
    assert "at step 8" in cli("train", *OPTIONS, "--grad-accum", 2).err
    for place in ("GPT", "Trainer"):
        with monkeypatch.context() as patch:
            patch.setattr(anexagpt, place, fail)
            last_line(cli("train", *OPTIONS, "--restart"), "--n-embd 16: out of memory", "GiB", "half")
    with monkeypatch.context() as patch:
        patch.setattr(anexagpt, "load_model", fail)
        assert cli("generate", "the").is_error("out of memory")


def test_other_errors_are_not_hidden(cli, monkeypatch):
    """Catches our own mistakes that are told as a want of memory."""

    def fail(it):
        raise RuntimeError("a mistake")

    during(monkeypatch, 3, fail)
    with pytest.raises(RuntimeError, match="a mistake"):
        cli("train", *OPTIONS)


@needs_fork
def test_memory_that_really_ends(cli):
    """Catches an error of PyTorch that the tests above do not know; the model of before stays."""
    resource = pytest.importorskip("resource")
    if sys.platform != "linux":
        pytest.skip("the limit is that of Linux")
    assert cli("train", *OPTIONS, "--quiet").status == 0
    before = Path("model.safetensors").read_bytes()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()

    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (used + (300 << 20),) * 2)

    Path("prose.txt").write_text(prose(20_000))
    large = [*OPTIONS, "--block-size", 256, "--n-embd", 256, "--batch-size", 600, "--restart"]
    last_line(apart("train", *large, prepare=limit), "--batch-size 600: out of memory", "--grad-accum 2")
    assert Path("model.safetensors").read_bytes() == before and names() == {"prose.txt", "model.safetensors"}


# ---- the network -----------------------------------------------------------------------------------------------------


def no_sockets() -> None:
    """No socket can be made from now on."""

    def refuse(*arguments, **options):
        raise RuntimeError("a socket was asked for")

    socket.socket = socket.create_connection = socket.getaddrinfo = refuse


@needs_fork
def test_no_network_but_what_was_asked_for(cli, tiny):
    """Catches a look for updates, a telemetry, a package that calls home: with a text at hand, no socket is made."""
    assert apart("train", *OPTIONS, "--log", "log.csv", prepare=no_sockets).status == 0
    for command in (
        ["info"],
        ["generate", "the", "-n", "20"],
        ["explain", "the dog"],
        ["eval"],
        ["run", *OPTIONS],
        ["export", "out", "--gguf", "m.gguf"],
        ["train", "--data", "python-docs", *OPTIONS[2:], "--out", "docs.safetensors"],
    ):
        result = apart(*command, prepare=no_sockets)
        assert result.status == 0, (command, result.err)


@pytest.mark.parametrize(
    "name", ["http://127.0.0.1:9/x", "HTTPS://127.0.0.1:9/x", "/dev/zero", "prose.txt + http://127.0.0.1:9/x", "//pc/x"]
)
def test_a_file_cannot_send_the_program_somewhere(cli, tiny, monkeypatch, name):
    """Catches a stranger's model or checkpoint that makes the program ask an address, or read without end."""
    model, _, story = load_model(tiny, CPU)
    told = anexagpt.replace(story, data=story.data | dict(name=name))
    anexagpt.save_file(Path("model.safetensors"), dict(model.named_parameters()), told)

    def refuse(*arguments):
        raise AssertionError("it was asked for")

    monkeypatch.setattr(anexagpt, "fetch", refuse)
    name = name.removeprefix("prose.txt + ")
    assert cli("eval").is_error("--data", name)
    Path("model.safetensors").rename("checkpoint.safetensors")
    assert cli("train").is_error("--data", name)


def test_pipes_as_files(cli, tiny):
    """Catches a wait without end for somebody who writes into a pipe."""
    if not hasattr(os, "mkfifo"):
        pytest.skip("no pipes with names")
    os.mkfifo("pipe")
    assert cli("info", "--model", "pipe").is_error("pipe", "not a file")
    session = anexagpt.Session(*load_model(tiny, CPU), anexagpt.SampleConfig(max_new=3))
    for command in ("load", "read", "model", "save"):
        with pytest.raises(UserError, match="pipe: is not a file"):
            session.respond(f"/{command} pipe")
