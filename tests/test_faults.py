"""Faults: kills, signals, closed terminals, full disks, missing rights, a second process. Whatever
goes wrong ends in one clear line, and no work is lost.

What happens to a whole process is tried in forks of this one, which have PyTorch imported.
"""

import errno
import fcntl
import hashlib
import io
import itertools
import os
import pty
import resource
import signal
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import pytest
from conftest import ROOT, TINY, Result, interrupt_at, prose
from torch.optim.optimizer import register_optimizer_step_post_hook

import anexagpt

OPTIONS = ["--data", "prose.txt", *TINY, "--dropout", "0.1", "--max-steps", "24"]
OPTIONS += ["--eval-interval", "8"]
CHECKPOINT = Path("model.safetensors.checkpoint")
MODEL = Path("model.safetensors")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("prose.txt").write_text(prose(700), encoding="utf-8", newline="\n")
    return tmp_path


class Fork:
    """The program in a fork of this process, after `prepare` was called there."""

    def __init__(self, *arguments, prepare: Callable = lambda: None, stderr=None, **environ):
        self.log = tempfile.TemporaryFile()  # noqa: SIM115
        if pid := os.fork():
            self.pid = pid
            return
        status = 99
        try:
            os.environ.update(environ)
            for fd in (0, 1):
                os.dup2(os.open(os.devnull, os.O_RDWR), fd)
            os.dup2(self.log.fileno() if stderr is None else stderr, 2)
            sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", 1)  # noqa: SIM115
            prepare()
            status = anexagpt.main(list(map(str, arguments)))
        except SystemExit as leave:
            status = leave.code or 0
        except BaseException as error:
            with suppress(OSError):  # 2 may be closed
                os.write(2, f"Traceback {error!r}\n".encode())
        finally:
            os._exit(status)

    def result(self, seconds: float = 60) -> Result:
        end = time.monotonic() + seconds
        while not (done := os.waitpid(self.pid, os.WNOHANG))[0]:
            if time.monotonic() > end:
                os.kill(self.pid, signal.SIGKILL)
            time.sleep(0.005)
        self.log.seek(0)
        return Result(os.waitstatus_to_exitcode(done[1]), "", self.log.read().decode())


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def names(folder: Path = Path(".")) -> set[str]:
    """All files below a folder, hidden ones too; but not locks, which are empty and stay."""
    files = (p for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock")
    return {str(path.relative_to(folder)) for path in files}


def weights(path: Path = MODEL) -> bytes:
    content = path.read_bytes()
    return content[8 + int.from_bytes(content[:8], "little") :]


def failed(result: Result, *words: str) -> str:
    """The last line of a run that failed; it has these words, and no traceback is above it."""
    assert result.status == 2 and "Traceback" not in result.err, result
    line = result.err.splitlines()[-1]
    assert line.startswith("anexagpt.py: ") and all(word in line for word in words), line
    return line


@contextmanager
def at_step(n: int, action: Callable):
    """Within it something happens at the n-th optimizer step of this process or of its forks."""
    steps = itertools.count(1)
    hook = register_optimizer_step_post_hook(lambda *_: action() if next(steps) == n else None)
    try:
        yield
    finally:
        hook.remove()


def stop(cli, step: int, *options, number=signal.SIGINT) -> Result:
    """A run that a signal stops after a step."""
    with interrupt_at(step, number):
        return cli("train", *OPTIONS, *options)


# ---- signals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_stopped_and_resumed(cli, number):
    """Catches a signal that loses steps (SIGHUP, of a closed terminal, too), and other weights."""
    assert cli("train", *OPTIONS, "--quiet", "--out", "whole.safetensors").status == 0
    with at_step(10, lambda: signal.raise_signal(number)):
        result = Fork("train", *OPTIONS).result()
    assert result.status == 128 + number and "step 10" in result.err, result
    assert names() == {"prose.txt", "whole.safetensors", str(CHECKPOINT)}
    Path("other.txt").write_text("a cat\n" * 200)
    found = "is an unfinished run on prose.txt at step 10, and --data other.txt is another text"
    assert cli("train", "other.txt").is_error(f"{CHECKPOINT}: {found}")
    os.remove("other.txt")
    result = cli("train")  # text, settings and number format are those of the run
    assert result.status == 0 and "at step 10" in result.err
    assert names() == {"prose.txt", "whole.safetensors", str(MODEL)}
    assert weights() == weights(Path("whole.safetensors"))


def test_restart_is_stopped_and_resumed(cli):
    """Catches the advice to repeat a command with --restart, which discards what was saved; and a
    finished model that --restart loses."""
    assert cli("train", *OPTIONS, "--quiet").status == 0
    before, old = MODEL.read_bytes(), MODEL.with_stem("model.old")
    result = stop(cli, 10, "--restart", "--seed", 5)
    assert result.status == 130 and "without --restart" in result.err, result
    assert old.read_bytes() == before and CHECKPOINT.exists() and not MODEL.exists()
    result = cli("train", *OPTIONS, "--seed", 5)
    assert result.status == 0 and "at step 10" in result.err and MODEL.read_bytes() != before
    assert old.read_bytes() == before


def test_second_ctrl_c(cli, monkeypatch):
    """Catches a run that cannot be left at once, without the time that saving takes."""
    clock = time.monotonic

    def twice():
        signal.raise_signal(signal.SIGINT)
        monkeypatch.setattr(time, "monotonic", lambda: clock() + 2)
        signal.raise_signal(signal.SIGINT)

    with at_step(10, twice):
        assert cli("train", *OPTIONS).status == 130
    assert names() == {"prose.txt"}


@pytest.mark.parametrize("count", [1, 2])
def test_stop_at_any_line(cli, monkeypatch, count):
    """Catches an instant between the last step and the saved model at which Ctrl-C (once, or twice
    at once) loses everything. It comes at every 17th line that the program runs there, the
    network's own lines and those of generation aside."""
    # Interrupted in its last lines, it goes on watching, also in the tests after this one.
    monkeypatch.setattr(anexagpt, "share_cores", nullcontext)
    source = (ROOT / "anexagpt.py").read_text().splitlines()
    divider = next(i for i, line in enumerate(source) if line.startswith("# ====="))
    done = False
    for n in range(count, 1_000, 17):
        out, left = Path(f"{n}.safetensors"), n

        def trace(frame, event, argument):
            nonlocal left
            code = frame.f_code
            if code.co_filename != anexagpt.__file__:
                return None
            if event == "line" and (frame.f_lineno > divider or code.co_name == "fit"):
                left -= 1
                for _ in range(count * (left == 0)):
                    signal.raise_signal(signal.SIGINT)
            return trace

        def begin():
            sys.settrace(trace)
            frame = sys._getframe()
            while frame := frame.f_back:  # those that run already
                frame.f_trace = trace

        try:
            with at_step(3, begin):
                result = cli("train", *OPTIONS, "--max-steps", 3, "--quiet", "--out", out)
        except KeyboardInterrupt:  # at the very end of the program
            result = Result(130, "", "")
        finally:
            sys.settrace(None)
        assert result.status in (0, 130) and "Traceback" not in result.err, (n, result)
        anexagpt.load(out if out.exists() else f"{out}.checkpoint")
        assert not [name for name in names() if name.endswith(".tmp")]
        if done := left > 0:  # the program ended before that line
            break
    assert done and n > 60


@pytest.mark.parametrize("nohup", [False, True])
def test_terminal_that_is_closed(nohup):
    """Catches a hang-up that loses up to a minute, and a display that ends a run which may go on
    without it (EIO)."""
    master, slave = pty.openpty()

    def attach():
        os.close(master)
        os.setsid()
        fcntl.ioctl(2, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)
        register_optimizer_step_post_hook(lambda *_: time.sleep(0.02))

    steps = 12 if nohup else 60
    options = [*OPTIONS, "--max-steps", steps]
    run = Fork("train", *options, prepare=attach, stderr=slave, TERM="xterm")
    os.close(slave)
    while f"/{steps}".encode() not in os.read(master, 1000):
        pass
    os.close(master)
    status = run.result().status
    step = anexagpt.load(MODEL if nohup else CHECKPOINT).metadata.step
    assert (status, step) == (0, steps) if nohup else status == 129 and 0 < step < 60


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_before_the_first_step(cli, monkeypatch, number, status):
    """Catches Ctrl-C during a download that waits until the text is there."""

    def read(*_):
        signal.raise_signal(number)
        raise AssertionError("it went on")

    monkeypatch.setattr(anexagpt, "load_corpus", read)
    assert cli("train", *OPTIONS).status == status and names() == {"prose.txt"}


@pytest.mark.parametrize("where", ["reader gone", "/dev/full"])
def test_nobody_reads_the_progress(where):
    """Catches `anexagpt.py train 2>&1 | head -1`, or a full disk under a log, that ends a run, or
    a prompt loop without its answers."""

    def connect():
        sys.stdin = io.StringIO("the\n")
        sys.stdout = open("answers.txt", "w")  # noqa: SIM115

    reading, writing = os.pipe()
    os.close(reading)
    stderr = os.open(where, os.O_WRONLY) if where.startswith("/") else writing
    result = Fork("train", *OPTIONS, stderr=stderr).result()
    assert result.status == 0 and anexagpt.load(MODEL).metadata.step == 24
    assert Fork("chat", "-n", 5, prepare=connect, stderr=stderr).result().status == 0
    assert len(Path("answers.txt").read_text()) == len("the") + 5 + len("\n")


def test_full_disk_under_the_output(tmp_path):
    """Catches the complaints of Python that end a process whose output cannot be written."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    command = [sys.executable, ROOT / "anexagpt.py", "--help"]
    streams = dict(stderr=subprocess.PIPE, cwd=tmp_path, env=environment)
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, stdout=full, **streams)
    assert done.returncode == 2
    assert done.stderr == b"anexagpt.py: system: No space left on device\n"


# ---- kills ---------------------------------------------------------------------------------------


def test_torture(monkeypatch):
    """Catches anything that SIGKILL can break: half a file, other bits at the end, leftovers. Its
    long form is tests/benchmarks/torture.py."""
    sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
    import torture

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    counts = torture.torture(kills=10)
    assert counts["runs"] and sum(counts.values()) >= 10


def test_restart_that_dies_early(cli):
    """Catches a --restart run that is killed before its first checkpoint, and then goes on as the
    old one; and a second --restart that loses the finished model."""
    assert cli("train", *OPTIONS, "--quiet").status == 0
    before = MODEL.read_bytes()
    stop(cli, 10, "--restart")
    with at_step(3, die):
        assert Fork("train", *OPTIONS, "--restart", "--seed", 5).result().status == -signal.SIGKILL
    assert not CHECKPOINT.exists() and MODEL.with_stem("model.old").read_bytes() == before


def test_restart_from_its_own_checkpoint(cli):
    """Catches a --restart that removes the checkpoint it was told to begin with."""
    stop(cli, 10)
    before = CHECKPOINT.read_bytes()
    command = ["train", *OPTIONS, "--init", CHECKPOINT, "--restart"]
    assert cli(*command).is_error("--init", "discard", "another --out")
    assert CHECKPOINT.read_bytes() == before


def test_two_processes(cli):
    """Catches two processes that write one checkpoint, and a lock that outlives a kill."""
    results = []

    def second():
        for out in MODEL, "other.safetensors":
            results.append(Fork("train", *OPTIONS, "--out", out).result())

    with at_step(2, die):
        assert Fork("train", *OPTIONS).result().status == -signal.SIGKILL
    with at_step(9, second):
        assert cli("train", *OPTIONS, "--quiet").status == 0
    failed(results[0], "--out model.safetensors", "another process", "another name")
    assert results[1].status == 0
    assert names() == {"prose.txt", "model.safetensors", "other.safetensors"}


# ---- disks ---------------------------------------------------------------------------------------


def full_disk(monkeypatch, room: Path) -> None:
    """The working folder's disk is full, that of the temporary folder is not."""
    monkeypatch.setattr(tempfile, "tempdir", str(room))
    fsync = os.fsync

    def full(fd):
        if list(Path(".").glob(".*.tmp")):
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(fd)

    monkeypatch.setattr(os, "fsync", full)


@pytest.mark.parametrize("when", ["ctrl-c", "end"])
def test_full_disk_is_rescued(cli, monkeypatch, tmp_path_factory, when):
    """Catches a run of hours that is lost since its own disk is full, at its end or at Ctrl-C."""
    with monkeypatch.context() as patch:
        full_disk(patch, tmp_path_factory.mktemp("room"))
        options = ["--checkpoint-interval", 0]
        result = stop(cli, 10 if when == "ctrl-c" else 99, *options)
    line = failed(result, str(MODEL), "No space left on device", "move it")
    notes = result.err.count("not saved")  # of regular checkpoints; seldom, since each takes long
    assert when == "ctrl-c" or 0 < notes < 12
    rescued = next(Path(word) for word in line.split() if "anexa-" in word)
    assert names() == {"prose.txt"}
    assert anexagpt.load(rescued).metadata.step == (10 if when == "ctrl-c" else 24)
    rescued.rename(rescued.name)
    assert when == "end" or cli("train", *OPTIONS).status == 0


def test_no_room_at_all(cli, monkeypatch, tmp_path_factory):
    """Catches an old model or checkpoint that is destroyed by the attempt to replace it, with no
    room anywhere: no file may grow beyond 10 kB."""
    assert cli("train", *OPTIONS, "--quiet").status == 0
    stop(cli, 10, "--restart", "--seed", 5)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("room")))
    before = {name: Path(name).read_bytes() for name in names()}
    small = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))  # noqa: E731
    failed(Fork("train", *OPTIONS, "--seed", 5, prepare=small).result(), "File too large")
    assert {name: Path(name).read_bytes() for name in names()} == before


def nobody() -> None:
    """Be a user without rights from now on."""
    if os.geteuid() == 0:
        os.setgid(65_534)
        os.setuid(65_534)


def test_read_only_folder(cli, folder):
    """Catches a traceback, and a cached text that is of no use where nothing can be written."""
    for path in (*folder.parents, folder):
        if not path.stat().st_mode & 1:
            path.chmod(path.stat().st_mode | 0o11)  # so that nobody finds the way
    assert cli("train", *OPTIONS, "--quiet").status == 0
    Path("data").mkdir()
    book = (prose(600) + anexagpt.BUILT_IN["sherlock"].ending).encode()
    Path("data/anexa-sherlock.txt").write_bytes(book)
    digest = hashlib.sha256(book).hexdigest()
    Path("data/anexa-sherlock.sha256").write_text(f"{digest}  anexa-sherlock.txt\n")
    before = {name: Path(name).read_bytes() for name in names()}
    paths = [*Path(".").glob("*.lock"), Path("data"), folder]
    for path in paths:
        path.chmod(0o555)
    try:
        for options in (["--restart"], ["--out", "new.safetensors"]):
            result = Fork("train", *OPTIONS, *options, prepare=nobody).result()
            assert failed(result, "--out", "another folder")
        assert Fork("eval", "--data", "sherlock", prepare=nobody).result().status == 0
        assert {name: Path(name).read_bytes() for name in names()} == before
    finally:
        for path in paths:
            path.chmod(0o755)


@pytest.mark.parametrize("number", [errno.EIO, errno.EDQUOT])
def test_disk_that_did_not_take_it(monkeypatch, number):
    """Catches a file put in place although its bytes may not be on the disk."""

    def fail(fd):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError):
        anexagpt.flush_to_disk(Path("prose.txt"))


def test_time_between_checkpoints(monkeypatch):
    """Catches a first checkpoint that comes late, and later ones at each step or never."""
    corpus = anexagpt.Corpus.from_text(Path("prose.txt").read_text())
    cfg = anexagpt.TrainConfig(checkpoint_interval=60)
    trainer = anexagpt.Trainer(corpus, anexagpt.GPTConfig(block_size=8), cfg)
    files = anexagpt.RunFiles(MODEL)
    monkeypatch.setattr(time, "monotonic", lambda: 1_000.0)
    files.begin(trainer)
    assert files.next_save == 1_060
    files.save_checkpoint(trainer, is_last=False)
    assert files.next_save == 1_060


def test_what_other_users_and_links_keep(tiny):
    """Catches a lock that the next user of the folder cannot take, and a link that is replaced
    instead of the file behind it."""
    umask = os.umask(0o022)
    try:
        with anexagpt.training_lock(Path("m.safetensors")):
            assert os.stat(".m.safetensors.lock").st_mode & 0o777 == 0o666
    finally:
        os.umask(umask)
    Path("real").mkdir()
    Path("m.safetensors").symlink_to("real/m.safetensors")
    anexagpt.load(tiny).save("m.safetensors")
    assert Path("m.safetensors").is_symlink() and anexagpt.load("real/m.safetensors")


def test_model_that_is_not_finished(cli):
    """Catches a message that does not tell of the checkpoint that is there."""
    stop(cli, 10)
    assert cli("generate", "the").is_error(f"or use its checkpoint, {CHECKPOINT}")
