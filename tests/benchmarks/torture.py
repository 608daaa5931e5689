"""Kill a training run again and again, until it ends all the same; then compare it with another.

    python tests/benchmarks/torture.py --kills 1000

A run downloads a text from the loopback, trains, writes as many checkpoints as fit into 1% of its
time, and saves. It is killed with SIGKILL at a random instant or, every second one, before a random
file operation, and started again until it ends. After each kill every file under its final name
must be complete; at the end the model must equal, bit for bit, that of an undisturbed run, and
nothing else may be left but temporary files, which later runs remove. Each attempt is a fork of a
process that has imported PyTorch. Needs os.fork.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

os.environ["no_proxy"] = "*"  # the loopback needs none
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import anexagpt

FILE_OPERATIONS = ("open", "os.rename", "os.remove", "os.chmod", "os.mkdir")  # audit events
N_OPERATIONS = 24  # of an undisturbed run in its folder
TEXT = "".join(random.Random(1).choices("etaoin shrdlu\n", k=3_000)).encode()
SETTINGS = {
    "n_layer": 1,
    "n_head": 2,
    "n_embd": 16,
    "block_size": 16,
    "batch_size": 4,
    "dropout": 0.1,
    "checkpoint_interval": 0.0,
    "eval_interval": 3,
    "max_steps": 12,
}
MODEL = "model.safetensors"
CHECKPOINT = "model.safetensors.checkpoint"
TEMPORARY = f".anexa-{'?' * 12}.tmp"


def command_line(url: str) -> list[str]:
    words = ["train", url, "--device", "cpu", "--dtype", "float32", "--out", MODEL]
    for name, value in SETTINGS.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    return words


# ---- processes -----------------------------------------------------------------------------------


def serve(listener: socket.socket) -> None:
    """Answer requests for ever with TEXT, in ten pieces."""
    n = len(TEXT) // 10
    while True:
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError):  # the client may be killed
            connection.recv(4096)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(TEXT))
            for start in range(0, len(TEXT), n):
                connection.sendall(TEXT[start : start + n])
                time.sleep(0.003)


@contextlib.contextmanager
def text_server():
    """URL of a text."""
    listener = socket.create_server(("127.0.0.1", 0))
    pid = os.fork()
    if pid == 0:
        serve(listener)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/text.txt"
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        listener.close()


def die_before_operation(folder: Path, number: int) -> None:
    """Kill this process before its file operation of that number in `folder`, its current one."""
    n_done = 0

    def count(event: str, arguments: tuple) -> None:
        nonlocal n_done
        if event not in FILE_OPERATIONS or not isinstance(arguments[0], str | Path):
            return
        if os.path.abspath(arguments[0]).startswith(f"{folder}{os.sep}"):
            n_done += 1
            if n_done == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def start(folder: Path, url: str, operation: int | None = None) -> int:
    """Id of a process that trains in `folder`, and dies before the file operation of this number.

    What it prints is in a file beside the folder.
    """
    pid = os.fork()
    if pid:
        return pid
    status = 99
    try:
        os.chdir(folder)
        log = open(folder.with_suffix(".log"), "a")  # noqa: SIM115
        os.dup2(log.fileno(), 2)
        sys.stdin = open(os.devnull)  # noqa: SIM115
        sys.stdout = sys.stderr = log
        if operation is not None:
            die_before_operation(folder, operation)
        status = anexagpt.main(command_line(url))
    except BaseException as error:
        os.write(2, f"Traceback {error!r}\n".encode())
    finally:
        os._exit(status)


def wait(pid: int, seconds: float = 60.0) -> int:
    """Exit status, or minus the signal; the process is killed after these seconds."""
    end = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.0005)


# ---- checks --------------------------------------------------------------------------------------


def check_files(folder: Path) -> None:
    """Whatever has its final name is complete."""
    for path in folder.glob("model.safetensors*"):
        anexagpt.load(path)
    for path in folder.glob("data/anexa-*.txt"):
        assert path.read_bytes() == TEXT, f"{path} is not what the server sent"
        assert anexagpt.is_intact(path), f"{path} has no SHA-256 beside it, or another"


def files(folder: Path) -> dict[str, object]:
    """Content of all files but lock and temporary ones, of a model with its header as a dict."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix != ".lock" and not path.match(TEMPORARY):
            found[str(path.relative_to(folder))] = path.read_bytes()
    if MODEL in found:
        content = found[MODEL]
        n = 8 + int.from_bytes(content[:8], "little")
        found[MODEL] = (json.loads(content[8:n]), content[n:])  # a header has no order
    return found


def phase(folder: Path, temporaries_before: set[Path]) -> str:
    """What a run was doing when it was killed."""
    if not any(folder.glob("data/anexa-*.txt")):
        return "download"
    if set(folder.glob(TEMPORARY)) - temporaries_before:
        return "saving"
    return "training"


class Torture:
    def __init__(self, seed: int, seconds: float, expected: dict):
        self.rng = random.Random(seed)
        self.seconds = seconds  # that an undisturbed run takes
        self.expected = expected  # its files
        self.counts = {"runs": 0, "download": 0, "training": 0, "saving": 0}

    def n_kills(self) -> int:
        return sum(self.counts.values()) - self.counts["runs"]

    def attempt(self, folder: Path, url: str) -> int:
        """Exit status of a run that is, or is not, killed before it ends."""
        if self.counts["runs"] % 2 == 1:
            operation = self.rng.randint(1, N_OPERATIONS)
            return wait(start(folder, url, operation))
        seconds = 1.1 * self.seconds * self.rng.random() ** 2
        return wait(start(folder, url), seconds)

    def run(self, folder: Path, url: str) -> None:
        """Kill a run until it ends.  raises: AssertionError, UserError"""
        folder.mkdir()
        while True:
            # A run killed after its last save is finished: the next must say so, and keep it.
            is_finished = (folder / MODEL).exists()
            temporaries = set(folder.glob(TEMPORARY))
            status = self.attempt(folder, url)
            if status != -signal.SIGKILL:
                break
            check_files(folder)
            self.counts[phase(folder, temporaries)] += 1
        printed = folder.with_suffix(".log").read_text()
        assert status == (2 if is_finished else 0), printed
        assert "Traceback" not in printed, printed
        found = files(folder)
        if is_finished:  # the kill came before its checkpoint was removed
            found.pop(CHECKPOINT, None)
        assert found == self.expected, f"{folder} has other files: {sorted(found)}"
        self.counts["runs"] += 1


def torture(
    kills: int, seed: int = 1, log: Callable[[str], None] = lambda line: None
) -> dict[str, int]:
    """Number of kills by where they struck, and of runs.  raises: AssertionError, UserError"""
    home = Path(tempfile.mkdtemp(prefix="torture-")).resolve()
    # PyTorch imports more at its first steps; the forks shall not.
    anexagpt.train(text=TEXT.decode(), device="cpu", dtype="float32", progress=False, **SETTINGS)
    with text_server() as url:
        undisturbed = home / "undisturbed"
        undisturbed.mkdir()
        started = time.monotonic()
        status = wait(start(undisturbed, url))
        assert status == 0, undisturbed.with_suffix(".log").read_text()
        torment = Torture(seed, time.monotonic() - started, files(undisturbed))
        while torment.n_kills() < kills:
            folder = home / f"run-{torment.counts['runs']}"
            torment.run(folder, url)
            shutil.rmtree(folder)
            log(", ".join(f"{name} {count}" for name, count in torment.counts.items()))
    shutil.rmtree(home)
    return torment.counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=1_000, help="at least (default: 1000)")
    parser.add_argument("--seed", type=int, default=1, help="of the instants (default: 1)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    started = time.monotonic()
    torture(args.kills, args.seed, lambda line: print(f"\r{line}", end="", flush=True))
    seconds = time.monotonic() - started
    print(f"\nNothing lost in {seconds:.0f} s: all runs ended with the same bits.")


if __name__ == "__main__":
    main()
