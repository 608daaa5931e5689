"""Distributed training: several ranks against one process, and what becomes of them in trouble.

Ranks are forks of this process, joined over gloo; started by torchrun where that matters.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, Result, prose, wait_for
from test_faults import CHECKPOINT, MODEL, Fork, at_step, names, weights
from torch.distributed import run as torchrun
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import anexagpt

LONG = ["train", "prose.txt", *TINY, "--batch-size", 5, "--dropout", 0, "--max-steps", 50]
LONG += ["--eval-interval", 25]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("prose.txt").write_text(prose(700))


def ranks(*arguments, differing=((), ()), seconds: float = 60) -> list[Result]:
    """Results of ranks that get these arguments, and each its own of `differing`."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    size = len(differing)
    same = dict(WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size), MASTER_PORT=str(port))
    same |= dict(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    forks = [
        Fork(*arguments, *own, RANK=str(i), LOCAL_RANK=str(i), **same)
        for i, own in enumerate(differing)
    ]
    return [fork.result(seconds) for fork in forks]


def history(path: Path = MODEL) -> list:
    return anexagpt.load(path).metadata.history


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> list:
    """Losses of one process."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "prose.txt").write_text(prose(700))
    out = folder / "model.safetensors"
    assert Fork("train", folder / "prose.txt", *LONG[2:], "--out", out).result().status == 0
    return history(out)


def same(rows: list, expected: list) -> None:
    """Equal losses of 50 steps, but for differences of rounding, which grow."""
    assert [row[0] for row in rows] == [row[0] for row in expected] == [25, 50]
    for row, other, error in zip(rows, expected, (5e-4, 5e-3), strict=True):
        assert tuple(row) == pytest.approx(tuple(other), abs=error)


def test_two_ranks_equal_one_process(alone):
    """Catches shares that overlap or have a wrong weight where they differ (5 windows for 2 ranks,
    micro-batches), gradients that are not summed, validation that counts twice, and two who
    print."""
    results = ranks(*LONG, "--grad-accum", 5)
    assert [r.status for r in results] == [0, 0], results
    assert results[0].err.count("Model saved") == 1 and results[1].err == ""
    same(history(), alone)
    assert names() == {"prose.txt", str(MODEL)}


def test_stopped_and_resumed_by_another_number_of_ranks(alone):
    """Catches a signal to one rank that leaves the others waiting, and a checkpoint that is bound
    to a number of ranks."""

    def stop():
        if os.environ["RANK"] == "1":
            signal.raise_signal(signal.SIGTERM)

    with at_step(20, stop):
        results = ranks(*LONG, differing=[(), (), ()])
    assert all(result.status >= 128 for result in results), results
    step = anexagpt.load(CHECKPOINT).metadata.step
    assert 20 <= step <= 21 and names() == {"prose.txt", str(CHECKPOINT)}
    assert [result.status for result in ranks(*LONG, differing=[(), ()])] == [0, 0]
    same(history(), alone)


@pytest.mark.parametrize(
    "option", ["--learning-rate 0", "--n-embd 8", "--dtype bfloat16", "other.txt"]
)
def test_ranks_that_differ(option):
    """Catches options that differ between machines: a wrong result, a traceback or a hang."""
    Path("other.txt").write_text(prose(701))
    own = ["other.txt"] if option == "other.txt" else ["prose.txt", *option.split()]
    results = ranks("train", *LONG[2:], differing=[["prose.txt"], own])
    assert [result.status for result in results] == [2, 2], results
    assert results[0].is_error("ranks") and results[1].err == "" and not MODEL.exists()


ERRORS = {"--batch-size 1": "at least 2", "--encoding utf-99": "utf-99", "--out .": "--out ."}
ERRORS["--muon-learning-rate 10 --learning-rate 10"] = "diverged"


@pytest.mark.parametrize("option, word", ERRORS.items())
def test_errors(option, word):
    """Catches an error that each rank prints, others that wait for the one that has it, and advice
    to use a checkpoint that is not there."""
    results = ranks(*LONG, *option.split(), seconds=30)
    assert [result.status for result in results] == [2, 2], results
    lines = results[0].err.splitlines()
    assert word in lines[-1] and "Traceback" not in results[0].err
    assert results[1].err == "" and ("checkpoint" not in lines[-1] or CHECKPOINT.exists())


@pytest.mark.parametrize("missing", ["LOCAL_WORLD_SIZE", "RANK", "MASTER_ADDR", "all"])
def test_incomplete_environment(cli, monkeypatch, missing):
    """Catches a traceback where WORLD_SIZE is set, but not by torchrun."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        if missing not in (name, "all"):
            monkeypatch.setenv(name, "0")
    assert cli(*LONG).is_error("WORLD_SIZE", "torchrun")


@pytest.mark.parametrize(
    "name, value",
    [
        ("WORLD_SIZE", "abc"),
        ("WORLD_SIZE", "0"),
        ("RANK", "-1"),
        ("RANK", ""),
        ("RANK", "2"),
        ("MASTER_PORT", "99999"),
    ],
)
def test_malformed_environment(cli, monkeypatch, name, value):
    """Catches a traceback for a variable that is no number, or no port, and a rank that waits
    forever, since the number of ranks leaves it out."""
    variables = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    variables |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    for key, good in (variables | {name: value}).items():
        monkeypatch.setenv(key, good)
    assert cli(*LONG).is_error(f"{name}={value}", "torchrun")


def test_port_in_use(cli):
    """Catches a traceback where another program has the port."""
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = str(busy.getsockname()[1])
        same = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
        same |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        result = Fork(*LONG, **same).result(30)
    assert result.status == 2 and "Traceback" not in result.err
    assert "the ranks cannot connect" in result.err.splitlines()[-1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_while_waiting_for_a_rank(number):
    """Catches a rank that ignores Ctrl-C, or the kill of a cluster or of `timeout`, while it waits
    for one that never comes."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    same = dict(RANK="1", LOCAL_RANK="1", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    reading, writing = os.pipe()

    def prepare():
        rendezvous = anexagpt.dist.rendezvous
        anexagpt.dist.rendezvous = lambda url: (os.write(writing, b"x"), rendezvous(url))[1]

    fork = Fork(*LONG, prepare=prepare, **same, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    os.close(writing)
    assert os.read(reading, 1) == b"x"  # b"" if it has ended
    os.close(reading)
    time.sleep(0.2)  # until it waits in C++
    started = time.monotonic()
    os.kill(fork.pid, number)
    result = fork.result(20)
    assert result.status in (128 + number, -number) and time.monotonic() - started < 5
    assert "Traceback" not in result.err


def in_fork(launch: Callable, *arguments) -> Fork:
    """A launcher of ranks in a fork of this process."""

    def prepare():
        status = 1  # a rank has failed
        try:
            launch(*arguments)
            status = 0
        finally:
            os._exit(status)

    return Fork(prepare=prepare)


def one_rank(*arguments) -> None:
    sys.exit(anexagpt.main([*arguments]))


def test_torchrun_onto_an_existing_model():
    """Catches "terminate called without an active exception" after an error of the user."""
    MODEL.write_bytes(b"mine")
    options = ["--standalone", "--nproc-per-node=2", "--max-restarts=0"]
    command = [*options, ROOT / "anexagpt.py", *LONG]
    result = in_fork(torchrun.main, [*map(str, command)]).result(120)
    assert result.status == 1 and result.err.count("anexagpt.py: model.safetensors") == 1, result
    assert "terminate called" not in result.err and MODEL.read_bytes() == b"mine"


def test_rank_that_is_killed():
    """Catches a --restart run that torchrun restarts from its beginning. Its ranks are forks."""
    assert Fork(*LONG, "--max-steps", 3).result().status == 0
    before = weights()
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        run_id="test",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=1,
        monitor_interval=0.1,
        start_method="fork",
    )
    options = [*LONG, "--restart", "--max-steps", 200, "--checkpoint-interval", 0.1]
    process = in_fork(elastic_launch(config, one_rank), *map(str, options))
    wait_for(CHECKPOINT.exists)
    command = ["ps", "-o", "pid=", "--ppid", str(process.pid)]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    os.kill(int(found.stdout.split()[-1]), signal.SIGKILL)
    result = process.result(120)
    assert result.status == 0 and "Resuming" in result.err and weights() != before, result
    assert history()[-1][0] == 200


def test_rank_that_is_killed_before_the_first_checkpoint():
    """Catches a --restart run that torchrun cannot restart, since the model of before exists."""
    assert Fork(*LONG, "--max-steps", 3).result().status == 0
    command = [*LONG, "--max-steps", 4, "--restart"]
    assert Fork(*command, TORCHELASTIC_RESTART_COUNT="1").result().status == 0
    assert history()[-1][0] == 4


def test_ranks_have_their_own_dropout():
    """Catches the same masks on all ranks, as of one window that is trained on several times."""
    masks = []
    for rank in (0, 1, 0):
        trainer = anexagpt.DistributedTrainer(
            anexagpt.DistributedContext(rank, 2),
            anexagpt.Corpus.from_text(prose(100)),
            anexagpt.GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=8),
            anexagpt.TrainConfig(max_steps=2, dropout=0.5),
        )
        trainer.set_inputs()
        masks.append(torch.nn.functional.dropout(torch.ones(64)).tolist())
    assert masks[0] == masks[2] != masks[1]


def test_another_rank_that_failed(cli, monkeypatch):
    """Catches a traceback from the depths of gloo where another rank has died."""

    def fail(*_, **__):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer")

    monkeypatch.setattr(anexagpt, "train", fail)
    assert cli("train").is_error("another rank failed; the same command resumes")


def test_gpu_of_a_rank(monkeypatch):
    """Catches the rank among all machines as the number of a GPU of this one, and a CUDA graph,
    which would leave out the sums over the ranks."""
    places = dict(RANK="3", LOCAL_RANK="1", WORLD_SIZE="4", LOCAL_WORLD_SIZE="2")
    for name, value in (places | dict(MASTER_ADDR="127.0.0.1", MASTER_PORT="1")).items():
        monkeypatch.setenv(name, value)
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)

    def rendezvous(url):
        raise ValueError("no")

    monkeypatch.setattr(torch.distributed, "rendezvous", rendezvous)
    with pytest.raises(anexagpt.UserError), anexagpt.init_distributed(torch.device("cuda")):
        pass
    assert chosen == [1]
    trainer = anexagpt.DistributedTrainer(
        anexagpt.DistributedContext(0, 2),
        anexagpt.Corpus.from_text(prose(100)),
        anexagpt.GPTConfig(block_size=8),
        anexagpt.TrainConfig(max_steps=2),
    )
    update = trainer.update
    trainer.device = torch.device("cuda")
    anexagpt.use_fast_training(trainer)
    assert trainer.update == update
