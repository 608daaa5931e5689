"""Distributed training: several processes under torchrun against one alone, and what becomes of them in trouble."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_model import network

from anexagpt import UserError, World, evaluate, open_file

PROGRAM = Path(__file__).resolve().parents[1] / "anexagpt.py"
SHAPE = dict(n_layer=1, n_head=2, n_embd=16, block_size=16, dropout=0, device="cpu", dtype="float32", seed=3)
TINY = [part for name, value in SHAPE.items() for part in (f"--{name.replace('_', '-')}", str(value))]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    words = ("the", "cat", "sat", "on", "a", "mat", "and", "saw", "that", "rat", "had", "hat")
    picks = torch.randint(len(words), (2_000,), generator=torch.Generator().manual_seed(1)).tolist()
    path.write_text(" ".join(words[i] for i in picks))
    return path


def start(folder: Path, text: Path, ranks: int, *options, launch=()) -> subprocess.Popen:
    """A training in `folder`, by one process or by several under torchrun, in a process group of its own."""
    together = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *launch]
    command = [sys.executable, *(together if ranks > 1 else []), str(PROGRAM), "train", "--data", str(text), *TINY]
    environment = os.environ | dict(OMP_NUM_THREADS="1")
    return subprocess.Popen(
        [*command, *map(str, options)], cwd=folder, env=environment, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


def finish(process: subprocess.Popen) -> tuple[int, str]:
    _, err = process.communicate(timeout=120)
    return process.returncode, err


def wait_for(path: Path) -> None:
    for _ in range(1_200):
        if path.exists():
            return
        time.sleep(0.05)
    raise AssertionError(f"{path.name} did not appear")


def workers(process: subprocess.Popen) -> list[int]:
    """The processes that torchrun has started."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True, check=True)
    return [int(pid) for pid in found.stdout.split()]


def same(one: Path, other: Path) -> None:
    """The losses of the first 100 steps; later on, rounding that differs has grown to more than rounding."""
    a, b = (open_file(path)[0].history for path in (one, other))
    assert len(a) == len(b) == 8 and a[1][0] == 100
    for row, expected in zip(b[:2], a[:2], strict=True):
        assert row == pytest.approx(expected, abs=1e-5)


LONG = ["--batch-size", "5", "--max-steps", "400", "--eval-interval", "50"]


@pytest.fixture(scope="module")
def alone(text, tmp_path_factory) -> Path:
    """The model of one process."""
    folder = tmp_path_factory.mktemp("alone")
    status, err = finish(start(folder, text, 1, *LONG))
    assert status == 0, err
    return folder / "model.safetensors"


def test_two_equal_one(text, alone, tmp_path):
    """Catches shares that overlap or are weighed wrongly where they differ (5 windows for 2), gradients that are not
    averaged, parts of a batch that are averaged too early, and two who print."""
    status, err = finish(start(tmp_path, text, 2, *LONG, "--grad-accum", 5))
    assert status == 0 and err.count("Model saved to") == 1 and err.count("step 200/400") == 1, err
    same(alone, tmp_path / "model.safetensors")
    assert os.listdir(tmp_path) == ["model.safetensors"]


@pytest.mark.parametrize("size", [2, 3, 5])
def test_evaluation_is_shared(monkeypatch, size):
    """Catches processes that all do the whole evaluation, or leave some of the text to nobody."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda values: None)  # to see the parts
    model = network()
    ids = torch.randint(1, 31, (2_000,), generator=torch.Generator().manual_seed(1))
    loss, count = evaluate(model, ids)
    parts = [evaluate(model, ids, world=World(rank, size)) for rank in range(size)]
    shares = [n for _, n in parts]
    assert sum(shares) == count == 1_999 and max(shares) < count
    assert sum(part * n for part, n in parts if n) / count == pytest.approx(loss)


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL and ps")
def test_a_process_that_dies(text, alone, tmp_path):
    """Catches others that wait for ever, a checkpoint that is lost, and a new beginning from nothing."""
    options = (*LONG, "--checkpoint-interval", 0, "--restart")
    process = start(tmp_path, text, 2, *options, launch=["--max-restarts=1"])
    wait_for(tmp_path / "checkpoint.safetensors")
    os.kill(workers(process)[-1], signal.SIGKILL)
    status, err = finish(process)
    assert status == 0 and (found := re.search(r"Continuing the training in \S+ at step ([\d,]+)", err)), err
    assert int(found[1]) > 0
    same(alone, tmp_path / "model.safetensors")


@pytest.mark.skipif(os.name != "posix", reason="needs a process group")
def test_stopped_and_continued_by_another_number(text, alone, tmp_path):
    """Catches a Ctrl-C that leaves processes behind or saves nothing, and a checkpoint bound to a number of ranks."""
    process = start(tmp_path, text, 2, *LONG, "--checkpoint-interval", 0)
    wait_for(tmp_path / "checkpoint.safetensors")
    children = workers(process)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does
    status, err = finish(process)
    assert status != 0 and err.count("the same command goes on from there") == 1 and "Error" not in err, err
    for child in children:
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)
    step = open_file(tmp_path / "checkpoint.safetensors")[0].step
    assert f"Stopped at step {step:,}" in err and not (tmp_path / "model.safetensors").exists()
    status, err = finish(start(tmp_path, text, 1, *LONG))
    assert status == 0 and f"at step {step:,}" in err, err
    same(alone, tmp_path / "model.safetensors")


def test_more_processes_than_gpus(monkeypatch):
    """Catches a traceback of CUDA where torchrun was asked for a process too many."""
    for name, value in dict(WORLD_SIZE=2, LOCAL_WORLD_SIZE=2, LOCAL_RANK=0).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match=r"--nproc-per-node 2: .* 1;"), World.joined(torch.device("cuda")):
        pass


@pytest.mark.parametrize("options, said", [(["--batch-size", "1"], "--batch-size 1: must be at least 2")])
def test_errors(text, tmp_path, options, said):
    """Catches a process without work, and an error that is told by each of them."""
    status, err = finish(start(tmp_path, text, 2, "--max-steps", 5, *options))
    assert status != 0 and f"anexagpt.py: {said}" in err and f"process 1: {said}" in err, err
