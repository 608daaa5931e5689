"""Shared fixtures: tiny models, servers on the loopback, and no test that needs the internet."""

import errno
import io
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import hypothesis
import pytest

# PyTorch is imported by functions here: the process that starts the workers of xdist needs none.
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ |= dict(OMP_NUM_THREADS="1", no_proxy="*")  # also for the programs that tests start
hypothesis.settings.register_profile("anexa", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("anexa")

WORDS = "the a cat dog saw ran home big red and of Holmes said Watson door night was it very"
TINY = ["--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--block-size", "16"]
TINY += ["--batch-size", "4", "--device", "cpu", "--dtype", "float32"]


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]  # so that each cuda test runs


def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: needs a CUDA device")
    # A job in the background of a shell may ignore Ctrl-C, and one under nohup ignores SIGHUP.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_modifyitems(items):
    import torch

    torch.set_num_threads(1)
    for item in items:
        if "cuda" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def prose(words: int = 2_000, seed: int = 1) -> str:
    """English-looking text, the same for the same seed, so that tests need no file."""
    draw, some = random.Random(seed), WORDS.split()
    return " ".join(draw.choice(some) + draw.choice(["", "", "", ",", ".\n"]) for _ in range(words))


@pytest.fixture(autouse=True)
def loopback_only(monkeypatch):
    """No test reaches beyond this machine; one that tries fails, whatever the program does."""
    tried, connect = [], socket.socket.connect

    def connecting(self, address):
        if self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "::1", "localhost"):
            return connect(self, address)
        tried.append(address)
        raise OSError(errno.ENETUNREACH, "tests have no network")

    monkeypatch.setattr(socket.socket, "connect", connecting)
    yield
    assert not tried, f"the network was asked for: {tried}"


@pytest.fixture(autouse=True)
def notes_of_their_own():
    """A test sees the notes that the program prints once, whatever ran before it."""
    import anexagpt

    anexagpt.note_once.cache_clear()


def shared_text(name: str):
    """Fixture with a real text as it was served, byte order mark and all."""

    @pytest.fixture(scope="session")
    def content() -> bytes:
        path = ROOT.parent / "shared" / "data" / name
        return path.read_bytes() if path.exists() else pytest.skip(f"{name} is not at hand")

    return content


sherlock, shakespeare = shared_text("sherlock.txt"), shared_text("tinyshakespeare.txt")


@dataclass
class Answer:
    """A response: `length` is the Content-Length it claims, `drip` the seconds between bytes, also
    of the header `dripped`, which comes last; `location` is that of a redirect."""

    body: bytes = b""
    status: int = 200
    type: str = "text/plain; charset=utf-8"
    length: int | str | None = None
    drip: float = 0.0
    silent: bool = False
    dripped: str = ""
    location: str = ""


class Server:
    """HTTP server on the loopback. Each page has its answers in order; the last one repeats."""

    def __init__(self):
        self.pages, self.asked, self.closing, server = {}, [], threading.Event(), self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                server.asked.append(self.path)
                answers = server.pages.get(self.path, [Answer(b"no such page", 404)])
                answer = answers.pop(0) if len(answers) > 1 else answers[0]
                if answer.silent:
                    return server.closing.wait(5)
                self.send_response(answer.status)
                self.send_header("Content-Type", answer.type)
                self.send_header(
                    "Content-Length",
                    str(len(answer.body) if answer.length is None else answer.length),
                )
                if answer.location:
                    self.send_header("Location", answer.location)
                self.flush_headers()
                last_header = f"{answer.dripped}\r\n" * bool(answer.dripped) + "\r\n"
                body = last_header.encode() + answer.body
                n = 1 if answer.drip else len(body)
                with suppress(OSError):  # the client has gone
                    for i in range(0, len(body), n):
                        self.wfile.write(body[i : i + n])
                        if server.closing.wait(answer.drip):
                            break

            def log_message(*_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def page(self, path: str, *answers: Answer) -> str:
        """The address under which these answers are given."""
        self.pages[path] = list(answers)
        return self.address + path

    def close(self):
        self.closing.set()
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def server():
    yield (it := Server())
    it.close()


@pytest.fixture(scope="session")
def dead() -> str:
    """An address where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as it:
        return f"http://127.0.0.1:{it.getsockname()[1]}"


@dataclass
class Result:
    status: int
    out: str
    err: str

    def is_error(self, *words: str) -> bool:
        """Exit status 2, one line on stderr that has these words, nothing on stdout."""
        assert self.status == 2 and self.out == "", self
        assert self.err.count("\n") == 1 and self.err.endswith("\n"), self.err
        assert self.err.startswith("anexagpt.py") and "Traceback" not in self.err, self.err
        assert len(self.err) < 600 and all(word in self.err for word in words), (words, self.err)
        return True


def start(*arguments, cwd, stdin="", env=None, program: Path = ROOT / "anexagpt.py") -> Result:
    """Run the program in a process of its own, and wait for its end."""
    command = [sys.executable, str(program), *map(str, arguments)]
    options = dict(cwd=cwd, env=os.environ | (env or {}), capture_output=True, timeout=180)
    done = subprocess.run(command, input=stdin.encode(), **options)
    text = (s.decode("utf-8", "backslashreplace") for s in (done.stdout, done.stderr))
    return Result(done.returncode, *text)


@pytest.fixture
def program(tmp_path):
    """`start` in an empty folder."""
    return lambda *arguments, **options: start(*arguments, **(dict(cwd=tmp_path) | options))


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    """`program` in this process: the same command line, without PyTorch's start-up time."""
    import anexagpt

    monkeypatch.chdir(tmp_path)

    def run(*arguments, stdin: str = "") -> Result:
        content = stdin.encode("utf-8", "surrogateescape")
        stream = io.TextIOWrapper(io.BytesIO(content), "utf-8", newline="\n")  # as Python's
        monkeypatch.setattr(sys, "stdin", stream)
        capsys.readouterr()
        try:
            status = anexagpt.main([str(argument) for argument in arguments])
        except SystemExit as leave:
            status = leave.code or 0
        return Result(status, *capsys.readouterr())

    return run


@contextmanager
def interrupt_at(n: int, number: int = signal.SIGINT):
    """Within it a signal, as of Ctrl-C, follows the n-th optimizer step of this process."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    steps = itertools.count(1)

    def count(*_):
        if next(steps) == n:
            signal.raise_signal(number)

    hook = register_optimizer_step_post_hook(count)
    try:
        yield
    finally:
        hook.remove()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A model file, trained just long enough to write words; prose.txt lies beside it."""
    import anexagpt

    folder = tmp_path_factory.mktemp("tiny")
    (folder / "prose.txt").write_text(prose() + "\n", encoding="utf-8", newline="\n")
    out = folder / "model.safetensors"
    options = ["--data", folder / "prose.txt", "--out", out, "--max-steps", 150, "--quiet", *TINY]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
        assert anexagpt.main(["train", *map(str, options), "--eval-interval", "50"]) == 0
    return out


def header(path: Path) -> dict:
    """The JSON in front of a safetensors file, read without the safetensors package."""
    return json.loads(path.read_bytes()[8:][: int.from_bytes(path.read_bytes()[:8], "little")])


def wait_for(condition, seconds: float = 60.0):
    """Wait until something has happened; how long it takes does not matter."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)
