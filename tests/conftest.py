"""What several test files share. Models are tiny, servers are on the loopback, and no test needs the internet."""

import errno
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import hypothesis
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import anexagpt  # noqa: E402

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # for the programs that tests start
os.environ["no_proxy"] = "*"  # the loopback needs no proxy
hypothesis.settings.register_profile("anexa", deadline=None, derandomize=True, database=None, max_examples=60)
hypothesis.settings.load_profile("anexa")

WORDS = "the a cat dog saw ran home big red and of Holmes said Watson door night was it very"
TINY = ["--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--block-size", "16", "--batch-size", "4"]
TINY += ["--device", "cpu", "--dtype", "float32"]


def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: needs a CUDA device")
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as for a shell's background jobs
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def prose(words: int = 2_000, seed: int = 1) -> str:
    """English-looking text, the same for the same seed, so that tests need no file."""
    draw, some = random.Random(seed), WORDS.split()
    return " ".join(draw.choice(some) + draw.choice(["", "", "", ",", ".\n"]) for _ in range(words)) + "\n"


# ---- no network ------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def loopback_only(monkeypatch):
    """No test reaches beyond this machine; where it is tried, the test fails, whatever the program makes of it."""
    tried, connect = [], socket.socket.connect

    def connecting(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            tried.append(address)
            raise OSError(errno.ENETUNREACH, "tests have no network")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connecting)
    yield
    assert not tried, f"the network was asked for: {tried}"


# ---- real texts ------------------------------------------------------------------------------------------------------


def shared_text(name: str) -> Path:
    path = ROOT.parent / "shared" / "data" / name
    if not path.exists():
        pytest.skip(f"{name} is not in {os.path.join('..', 'shared', 'data')} beside the project")
    return path


@pytest.fixture(scope="session")
def sherlock() -> bytes:
    """The book as Project Gutenberg serves it: byte order mark, licence header and footer included."""
    return shared_text("sherlock.txt").read_bytes()


@pytest.fixture(scope="session")
def shakespeare() -> bytes:
    return shared_text("tinyshakespeare.txt").read_bytes()


# ---- a server --------------------------------------------------------------------------------------------------------


@dataclass
class Answer:
    """What the server sends: `length` is the Content-Length it claims, `drip` the seconds between single bytes."""

    body: bytes = b""
    status: int = 200
    type: str = "text/plain; charset=utf-8"
    length: int | None = None
    drip: float = 0.0
    silent: bool = False


class Server:
    """HTTP server on the loopback. Each page has its answers in order; the last one is given again and again."""

    def __init__(self):
        self.pages: dict[str, list[Answer]] = {}
        self.asked: list[str] = []
        self.closing = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                server.asked.append(self.path)
                answers = server.pages.get(self.path, [Answer(b"no such page", 404)])
                answer = answers.pop(0) if len(answers) > 1 else answers[0]
                if answer.silent:
                    server.closing.wait(5)
                    return
                self.send_response(answer.status)
                self.send_header("Content-Type", answer.type)
                self.send_header("Content-Length", str(len(answer.body) if answer.length is None else answer.length))
                self.send_header("Connection", "close")
                self.end_headers()
                try:
                    if not answer.drip:
                        self.wfile.write(answer.body)
                    for i in range(len(answer.body) if answer.drip else 0):
                        self.wfile.write(answer.body[i : i + 1])
                        self.wfile.flush()
                        if server.closing.wait(answer.drip):
                            break
                except OSError:
                    pass  # the client has heard enough

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, kwargs=dict(poll_interval=0.02), daemon=True).start()

    def page(self, path: str, *answers: Answer) -> str:
        """Give these answers under `path`; returns the address."""
        self.pages[path] = list(answers)
        return self.address + path

    def close(self):
        self.closing.set()
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def server():
    it = Server()
    yield it
    it.close()


@pytest.fixture(scope="session")
def dead() -> str:
    """An address where nobody listens."""
    it = Server()
    it.close()
    return it.address


# ---- the program -----------------------------------------------------------------------------------------------------


@dataclass
class Result:
    status: int
    out: str
    err: str

    def is_error(self, *words: str) -> bool:
        """Exit status 2, one line on standard error that has these words, nothing on standard output."""
        assert self.status == 2, self
        assert self.err.count("\n") == 1 and self.err.endswith("\n") and "Traceback" not in self.err, self.err
        assert self.err.startswith("anexagpt.py"), self.err
        assert len(self.err) < 600, self.err
        assert self.out == "", self.out
        for word in words:
            assert word in self.err, (word, self.err)
        return True


def start(*arguments, cwd, stdin: str = "", env: dict | None = None, program: Path = ROOT / "anexagpt.py") -> Result:
    """Run the program as a person does, in a process of its own, and wait for its end."""
    command = [sys.executable, str(program), *map(str, arguments)]
    environment = os.environ | dict(PYTHONIOENCODING="utf-8") | (env or {})
    done = subprocess.run(command, cwd=cwd, input=stdin.encode(), env=environment, capture_output=True, timeout=180)
    text = [stream.decode("utf-8", "backslashreplace").replace("\r\n", "\n") for stream in (done.stdout, done.stderr)]
    return Result(done.returncode, *text)


@pytest.fixture
def program(tmp_path):
    """`start` in an empty folder."""

    def run(*arguments, **options):
        return start(*arguments, **(dict(cwd=tmp_path) | options))

    return run


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    """The command line in this process, in an empty folder: what `program` does, without PyTorch's start-up time."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, stdin: str = "") -> Result:
        stream = io.TextIOWrapper(io.BytesIO(stdin.encode()), encoding="utf-8")
        monkeypatch.setattr(sys, "stdin", stream)
        capsys.readouterr()
        try:
            status = anexagpt.main(anexagpt.parse_options([str(a) for a in arguments]))
        except SystemExit as leave:
            status = leave.code or 0
        return Result(status, *capsys.readouterr())

    return run


# ---- a model ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A model file, trained just long enough to write words; its text lies beside it as prose.txt."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "prose.txt").write_text(prose(), encoding="utf-8", newline="\n")
    out = folder / "model.safetensors"
    options = ["train", "--data", folder / "prose.txt", "--out", out, "--quiet", *TINY, "--max-steps", 150]
    anexagpt.train(anexagpt.parse_options([str(option) for option in [*options, "--eval-interval", 50]]))
    return out


def header(path: Path) -> dict:
    """The JSON in front of a safetensors file, read without the safetensors package."""
    content = path.read_bytes()
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


def wait_for(condition, seconds: float = 60.0):
    """Wait until something has happened; how long it takes does not matter."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)
