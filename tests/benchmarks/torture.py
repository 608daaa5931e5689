"""Kill a training run again and again, until it ends all the same; then compare it with another.

    python tests/benchmarks/torture.py --kills 1000

A run downloads a text from the loopback, trains with a checkpoint after every step, and saves. It
is killed with SIGKILL at a random instant or, every second one, before a random file operation,
and started again until it ends. After each kill every file under its final name must be complete;
at the end the model must equal, bit for bit, that of an undisturbed run, and nothing else may be
left. Each attempt is a fork of a process that has imported PyTorch. Needs os.fork.
"""

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

import torch

os.environ["no_proxy"] = "*"  # the loopback needs none
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import anexagpt

FILE_OPERATIONS = ("open", "os.rename", "os.remove", "os.chmod", "os.mkdir")
TEXT = "".join(random.Random(1).choices("etaoin shrdlu\n", k=3_000)).encode()
OPTIONS = "train --n-layer 1 --n-head 2 --n-embd 16 --block-size 16 --batch-size 4 --dropout 0.1"
OPTIONS += " --device cpu --dtype float32 --checkpoint-interval 0 --eval-interval 3 --max-steps 12"


def serve() -> tuple[str, int]:
    """URL of a text that arrives in ten pieces, and the process that serves it."""
    listener = socket.create_server(("127.0.0.1", 0))
    if pid := os.fork():
        return f"http://127.0.0.1:{listener.getsockname()[1]}/text.txt", pid
    while True:
        with listener.accept()[0] as connection, contextlib.suppress(OSError):  # it may be killed
            connection.recv(4096)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(TEXT))
            for start in range(0, len(TEXT), len(TEXT) // 10):
                connection.sendall(TEXT[start : start + len(TEXT) // 10])
                time.sleep(0.003)


def start(folder: Path, url: str, operation: int = 0) -> int:
    """Id of a process that runs in `folder`, and dies before the file operation of this number."""
    if pid := os.fork():
        return pid
    try:
        os.chdir(folder)
        left = operation

        def count(event, arguments):
            nonlocal left
            if event in FILE_OPERATIONS and str(arguments[0]).startswith((".", "data", "mod")):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        if operation:
            sys.addaudithook(count)
        log = open(folder.with_suffix(".log"), "a")  # noqa: SIM115
        os.dup2(log.fileno(), 2)
        sys.stdin, sys.stdout, sys.stderr = open(os.devnull), log, log  # noqa: SIM115
        status = anexagpt.main([*OPTIONS.split(), "--data", url])
    except BaseException as error:
        os.write(2, f"Traceback {error!r}\n".encode())
        status = 99
    os._exit(status)


def wait(pid: int, seconds: float = 60.0) -> int:
    """Exit status, or minus the signal; the process is killed after these seconds."""
    end = time.monotonic() + seconds
    while not (done := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.0005)
    return os.waitstatus_to_exitcode(done[1])


def check(folder: Path) -> None:
    """Whatever has its final name is complete."""
    for path in folder.glob("model.safetensors*"):
        anexagpt.load(path)
    for path in folder.glob("data/[!.]*"):
        assert path.read_bytes() == TEXT, f"{path} is not what the server sent"


def files(folder: Path) -> dict[str, object]:
    """Content of all files but the lock; entries of a model's header have no order."""
    paths = (p for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock")
    found: dict = {str(path.relative_to(folder)): path.read_bytes() for path in paths}
    if model := found.get("model.safetensors"):
        n = 8 + int.from_bytes(model[:8], "little")
        found["model.safetensors"] = json.loads(model[8:n]), model[n:]
    return found


def torture(kills: int, seed: int = 1, log=lambda line: None) -> dict[str, int]:
    """Number of kills by where they struck, and of runs.  raises: AssertionError, UserError"""
    rng, counts = random.Random(seed), dict(runs=0, download=0, training=0, saving=0)
    home, (url, server) = Path(tempfile.mkdtemp(prefix="torture-")), serve()
    try:
        with contextlib.redirect_stderr(
            io.TextIOWrapper(io.BytesIO())
        ):  # PyTorch imports more at first use
            anexagpt.main([*OPTIONS.split(), "python-docs", "--out", str(home / "warm-up")])
        (home / "undisturbed").mkdir()
        begun = time.monotonic()
        assert wait(start(home / "undisturbed", url)) == 0, (home / "undisturbed.log").read_text()
        seconds, expected = time.monotonic() - begun, files(home / "undisturbed")
        while sum(counts.values()) - counts["runs"] < kills:
            folder = home / f"run-{counts['runs']}"
            folder.mkdir()
            while True:
                # A run killed after its last save is finished: the next must say so, and keep it.
                finished = (folder / "model.safetensors").exists()
                by_operation, limit = counts["runs"] % 2, 1.1 * seconds * rng.random() ** 2
                pid = start(folder, url, rng.randrange(1, 60) if by_operation else 0)
                if (status := wait(pid, 60.0 if by_operation else limit)) != -signal.SIGKILL:
                    break
                check(folder)
                saving = any(p.name.endswith(".tmp") for p in folder.glob(".model*"))
                text = any(folder.glob("data/[!.]*"))
                counts[("saving" if saving else "training") if text else "download"] += 1
            said = folder.with_suffix(".log").read_text()
            assert status == 2 * finished, said
            assert "Traceback" not in said, said
            found = {n: c for n, c in files(folder).items() if not n.endswith(".tmp")}
            if finished:  # the kill came before its checkpoint was removed
                found.pop("model.safetensors.checkpoint", None)
            assert found == expected, f"{folder} has other files: {sorted(found)}"
            shutil.rmtree(folder)
            counts["runs"] += 1
            log(", ".join(f"{name} {count}" for name, count in counts.items()))
    finally:
        os.kill(server, signal.SIGKILL)
        os.waitpid(server, 0)
    shutil.rmtree(home)
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=1_000, help="at least (default: 1000)")
    parser.add_argument("--seed", type=int, default=1, help="of the instants (default: 1)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    begun = time.monotonic()
    torture(args.kills, args.seed, lambda line: print(f"\r{line}", end="", flush=True))
    print(f"\nNothing lost in {time.monotonic() - begun:.0f} s: all runs ended with the same bits.")
