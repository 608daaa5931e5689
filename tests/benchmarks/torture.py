"""Kill a training again and again, with SIGKILL, until it has ended all the same; then compare it with one in peace.

    python tests/benchmarks/torture.py --kills 1000

A story is: download a text from a server on the loopback, train a tiny model with a checkpoint after every step, save
it. One process imports PyTorch and forks another one for each attempt, so that an attempt takes a fraction of a second.
A story is killed at a random instant, or (every second one) in front of a random file operation, and begun again, until
it ends by itself. After each kill, every file that can be seen must be whole; at the end, the model must equal, bit for
bit, that of a story which nobody disturbed, and nothing else may be left in the folder. Needs os.fork.
"""

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch

os.environ["no_proxy"] = "*"  # the loopback needs none
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import anexagpt

FILE_OPERATIONS = ("open", "os.rename", "os.remove", "os.chmod", "os.mkdir")
TEXT = ("".join(random.Random(1).choices("etaoin shrdlu\n", k=3_000))).encode()
STORY = "train --n-layer 1 --n-head 2 --n-embd 16 --block-size 16 --batch-size 4 --dropout 0.1 --device cpu"
STORY = [*STORY.split(), "--dtype", "float32", "--checkpoint-interval", "0", "--eval-interval", "3"]


def serve() -> tuple[str, int]:
    """Address of a text that arrives in ten pieces, and the process that serves it."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(TEXT)))
            self.end_headers()
            try:
                for start in range(0, len(TEXT), len(TEXT) // 10):
                    self.wfile.write(TEXT[start : start + len(TEXT) // 10])
                    time.sleep(0.003)
            except OSError:
                pass  # killed

        def log_message(self, *arguments):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if process := os.fork():
        http.server_close()
        return f"http://127.0.0.1:{http.server_port}/text.txt", process
    http.serve_forever()


def begin(folder: Path, options: list[str], operation: int = 0) -> int:
    """Id of a new process that lives the story in `folder`, and that dies before the file operation of this number."""
    if process := os.fork():
        return process
    try:
        os.chdir(folder)
        left = operation

        def count(event, arguments):
            nonlocal left
            if event in FILE_OPERATIONS and str(arguments[0]).startswith((str(folder), ".", "data", "model", "check")):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        if operation:
            sys.addaudithook(count)
        log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for number in (1, 2):
            os.dup2(log, number)
        sys.stdin, sys.stdout, sys.stderr = open(os.devnull), open(1, "w"), open(2, "w")  # noqa: SIM115
        status = anexagpt.main(anexagpt.parse_options(options))
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        status = 99
    os._exit(status)


def ended(process: int, seconds: float | None = None) -> int:
    """How the process ended: its status, or minus the signal; it is killed after these seconds."""
    end = None if seconds is None else time.monotonic() + seconds
    while end is not None and time.monotonic() < end:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.0005)
    if end is not None:
        os.kill(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def inspect(folder: Path) -> None:
    """Whatever has its final name is whole."""
    for path in folder.rglob("*.safetensors"):
        if not path.name.startswith("."):
            anexagpt.open_file(path)
            if path.name == "model.safetensors":
                anexagpt.load_model(path, torch.device("cpu"))
    for path in folder.glob("data/[!.]*"):
        assert path.read_bytes() == TEXT, f"{path} is not what the server sent"


def files(folder: Path) -> dict[str, object]:
    """Content of all files, hidden ones too. In a model the entries of the header have no order."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    if model := found.get("model.safetensors"):
        n = 8 + int.from_bytes(model[:8], "little")
        found["model.safetensors"] = json.loads(model[8:n]), model[n:]
    return found


def torture(kills: int, max_steps: int = 12, seed: int = 1, tell=lambda line: None) -> dict[str, int]:
    """Number of kills, by where they struck, and of stories that came to their end.

    raises  AssertionError or UserError if anything was lost
    """
    draw, counts = random.Random(seed), dict(stories=0, download=0, training=0, saving=0)
    here, (address, server) = os.getcwd(), serve()
    options = [*STORY, "--max-steps", str(max_steps), "--data", address]
    home = Path(tempfile.mkdtemp(prefix="torture-"))
    try:
        for name in ("warm-up", "peace"):
            (home / name).mkdir()
        with contextlib.redirect_stderr(io.StringIO()):  # PyTorch imports at first use: once here, not in each process
            os.chdir(home / "warm-up")
            anexagpt.train(anexagpt.parse_options(options))
            os.chdir(here)
        peace = home / "peace"
        start = time.monotonic()
        assert ended(begin(peace, options)) == 0, peace.with_suffix(".log").read_text()
        seconds, expected = time.monotonic() - start, files(peace)
        while sum(counts.values()) - counts["stories"] < kills:
            folder = home / f"story-{counts['stories']}"
            folder.mkdir()
            while True:
                # Killed after its last save, a training is finished: the next one must leave it alone, and say so.
                finished = files(folder).keys() & {"model.safetensors", "checkpoint.safetensors"} == {
                    "model.safetensors"
                }
                by_operation = counts["stories"] % 2
                process = begin(folder, options, draw.randrange(1, 60) if by_operation else 0)
                status = ended(process, None if by_operation else 1.1 * seconds * draw.random() ** 2)
                if status != -signal.SIGKILL:
                    break
                names = {path.name for path in folder.rglob("*")}
                inspect(folder)
                text = any(not name.startswith(".") for name in names if name.endswith("text.txt"))
                where = "saving" if any(".safetensors." in n and n.endswith(".tmp") for n in names) else "training"
                counts[where if text else "download"] += 1
            assert status == (2 if finished else 0), folder.with_suffix(".log").read_text()
            assert files(folder).keys() == expected.keys(), f"{folder} has other files: {sorted(files(folder))}"
            assert files(folder) == expected, f"the model in {folder} is another one"
            shutil.rmtree(folder)
            counts["stories"] += 1
            tell(", ".join(f"{name} {count}" for name, count in counts.items()))
    finally:
        os.kill(server, signal.SIGKILL)
        os.waitpid(server, 0)
    shutil.rmtree(home)
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=1_000, help="how many, at least (default: 1000)")
    parser.add_argument("--seed", type=int, default=1, help="of the instants (default: 1)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    begun = time.monotonic()
    counts = torture(arguments.kills, seed=arguments.seed, tell=lambda line: print(f"\r{line}", end="", flush=True))
    seconds = time.monotonic() - begun
    print(f"\nNothing lost and nothing left over in {seconds:.0f} s: all stories ended with the same bits.")
