"""What a CUDA graph requires of a training step, checked on a CPU."""

import argparse
import contextlib
import importlib.util
import json
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, prose
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import anexagpt
from anexagpt import Corpus, CudaGraph, GPTConfig, TrainConfig, Trainer, use_fast_attention


def make_trainer(kind: type = Trainer, device: str = "cpu", **settings) -> Trainer:
    cfg = TrainConfig(max_steps=40, batch_size=4, seed=3, **dict(dropout=0.0) | settings)
    config = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=16)
    trainer = kind(Corpus.from_text(prose(300)), config, cfg, device)
    use_fast_attention(trainer.network, torch.float32)
    return trainer


class Recorder(TorchDispatchMode):
    """Records the operations of PyTorch, as the capture of a CUDA graph does."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        """The same operations on the same tensors, whose results stay where they were."""
        for func, args, kwargs, result in self.operations:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def replayed(kind: type, n: int, **settings) -> Trainer:
    """A trainer whose steps after the fifth are replays of the fourth, without an update of the
    matrices, or of the fifth, with one."""
    trainer = make_trainer(kind, **settings)
    for _ in range(3):
        trainer.step()
    recorders = {}
    for _ in range(2):
        trainer.set_inputs()
        recorder = recorders[trainer.is_muon_update] = Recorder()
        with recorder:
            trainer.update()
        trainer.steps_done += 1
    trainer.update = lambda: recorders[trainer.is_muon_update].replay()
    for _ in range(n - 5):
        trainer.step()
    return trainer


def differences(kind: type, **settings) -> list[str]:
    """Names of the tensors in which replayed steps differ from those that were run."""
    eager = make_trainer(kind, **settings)
    for _ in range(9):
        eager.step()
    other = replayed(kind, 9, **settings).state_dict()
    return [name for name, x in eager.state_dict().items() if not torch.equal(x, other[name])]


@pytest.mark.parametrize("settings", [{}, dict(grad_accum=2), dict(logit_scale=1.15)], ids=str)
def test_a_step_can_be_captured(settings):
    """Catches a value that is read by Python, a tensor that moves, and a rate that is a number:
    a graph would repeat them. All weights and optimizer states are equal, bit for bit."""
    assert differences(Trainer, **settings) == []


class ReadsTheLoss(Trainer):
    def backward(self):
        super().backward()
        self.step_loss.mul_(1 + 0.01 * self.step_loss.item())


class MovesTheBatch(Trainer):
    def set_inputs(self):
        super().set_inputs()
        self.batch = self.batch.clone()


class RateOfPython(Trainer):
    def update(self):
        self.lr_scale.fill_(anexagpt.lr_scale(self.steps_done, self.cfg))
        super().update()


class ForgetsTheAverage(Trainer):
    def set_inputs(self):
        super().set_inputs()
        self.ema_rate = torch.tensor(anexagpt.ema_rate(self.steps_done + 1))


@pytest.mark.parametrize("kind", [ReadsTheLoss, MovesTheBatch, RateOfPython, ForgetsTheAverage])
def test_what_cannot_be_captured_is_noticed(kind):
    """Catches a check above that cannot fail."""
    assert differences(kind)


def test_a_step_on_another_device():
    """Catches a tensor that is on the CPU where the network is not: on the meta device, which
    computes nothing, devices do not mix either."""
    trainer = make_trainer(device="cpu")
    trainer.network.to("meta")
    trainer.ema.to("meta")
    matrices = {n: p for n, p in trainer.network.h.named_parameters() if p.dim() == 2}
    trainer.muon = anexagpt.Muon(matrices, trainer.cfg, torch.float32)
    rates = ("lr_scale", "ema_rate", "slow_rate")
    for name in ("batch", "n_targets", *rates, "step_loss", "loss_sum"):
        setattr(trainer, name, getattr(trainer, name).to("meta"))
    trainer.cfg = anexagpt.replace(trainer.cfg, grad_accum=2)
    trainer.backward()
    trainer.muon.step(trainer.lr_scale, trainer.slow_rate)
    assert all(p.grad.device.type == "meta" for p in trainer.network.parameters())


class FakeCuda:
    """Counts what a CudaGraph does; a capture runs nothing, as on a GPU."""

    def __init__(self, monkeypatch, error: Exception | None = None):
        self.events = []
        fake = self

        class Graph:
            def replay(self):
                fake.events.append("replay")

        @contextlib.contextmanager
        def graph(*_, **__):
            before = len(fake.events)
            yield
            del fake.events[before:]
            fake.events.append("capture")
            if error:
                raise error

        class Stream:
            def wait_stream(self, other):
                pass

        class Generator:
            def clone_state(self):
                return self

            def graphsafe_set_state(self, state):
                fake.events.append("generator")

        names = dict(CUDAGraph=Graph, graph=graph, Stream=Stream, current_stream=Stream)
        names |= dict(stream=lambda stream: contextlib.nullcontext(), current_device=lambda: 0)
        for name, value in (names | dict(default_generators=[Generator()])).items():
            monkeypatch.setattr(torch.cuda, name, value, raising=False)


def test_warm_up_capture_and_replays(monkeypatch):
    """Catches a step that is lost at the capture, or computed twice, and a graph that is replayed
    for another length of context, whose shapes are others, or with an update that is not due."""
    cuda = FakeCuda(monkeypatch)
    trainer = SimpleNamespace(
        network=make_trainer().network,
        ema=make_trainer().ema,
        dtype=torch.float32,
        device=torch.device("cuda"),
        update=lambda: cuda.events.append(
            f"eager {trainer.context_length} {trainer.is_muon_update}"
        ),
    )
    anexagpt.use_fast_training(trainer)
    a, b, c = (16, True), (16, False), (32, True)
    for kind in (a, a, b, c, a, a, a, a, b, b, b, c):
        trainer.context_length, trainer.is_muon_update = kind
        trainer.update()
    first = ["eager 16 True"] * 2 + ["eager 16 False", "eager 32 True", "eager 16 True", "capture"]
    then = ["eager 16 False"] * 2 + ["capture", "replay", "eager 32 True"]
    assert cuda.events == first + ["replay"] * 3 + then


def test_capture_that_fails(monkeypatch, capfd):
    """Catches a step that is lost where no graph can be made, a note without the cause, and a
    random generator that stays in capture mode."""
    error = RuntimeError("capture ended")
    error.__context__ = RuntimeError("operation not permitted when stream is capturing")
    cuda = FakeCuda(monkeypatch, error)
    update = CudaGraph(lambda: cuda.events.append("eager"))
    for _ in range(6):
        update()
    assert [e for e in cuda.events if e != "generator"] == ["eager"] * 3 + ["capture"] + [
        "eager"
    ] * 3
    assert cuda.events.count("generator") == 1
    assert "operation not permitted" in capfd.readouterr().err


def test_gpu_that_is_too_old(monkeypatch, capfd):
    """Catches a GPU that PyTorch finds but has no kernels for, taken by default."""

    def no_kernel(*_, **__):
        raise RuntimeError("CUDA error: no kernel image is available for execution")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch, "ones", no_kernel)
    assert anexagpt.select_device("auto").type != "cuda"
    assert "no kernel image" in capfd.readouterr().err
    assert anexagpt.select_device("cuda").type == "cuda"  # the user's wish


def test_cpu_leaves_the_gpu_alone(monkeypatch):
    """Catches a run on the CPU that starts CUDA, which takes seconds and memory of the GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(anexagpt, "has_working_cuda", lambda: pytest.fail("CUDA is started"))
    assert anexagpt.select_device("cpu").type == "cpu"


@pytest.mark.parametrize("device", ["cpu", "cuda"], ids=["host", "gpu"])
def test_only_a_gpu_gets_pinned_memory(monkeypatch, device):
    """Catches a batch that makes the CPU wait for the GPU, and pinned memory without one."""
    trainer = make_trainer()
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self)
    trainer.device = torch.device(device)
    trainer.set_inputs()
    expected = anexagpt.get_batch(trainer.train_ids, 0, trainer.cfg, trainer.batch.shape[1] - 1)
    assert torch.equal(trainer.batch, expected) and len(pinned) == (device == "cuda")


# ---- what measures a GPU -------------------------------------------------------------------------


def import_file(path: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(f"again_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_measurement_that_fails(tmp_path, monkeypatch, capsys):
    """Catches a table or a JSON that is lost with the first measurement that fails."""
    gpu = import_file(ROOT / "tests" / "benchmarks" / "gpu.py")

    def in_new_process(function, *arguments):
        if function is gpu.train:
            raise RuntimeError("CUDA error: out of | memory")
        return {"characters per second": 1234.5}

    monkeypatch.setattr(gpu, "in_new_process", in_new_process)
    report = gpu.Report(tmp_path / "gpu.json", "cpu")
    nowhere = tmp_path / "nowhere"
    args = argparse.Namespace(text=["a", "b"], steps=9, seconds=1.0, nanogpt=nowhere)
    gpu.measure_all(report, args, "cpu", tmp_path)
    report.print()
    results = json.loads((tmp_path / "gpu.json").read_text())["results"]
    errors = [name for name, result in results.items() if "error" in result]
    assert "out of | memory" in results["default run"]["error"] and len(results) == 6
    assert len(errors) == 4  # both runs, and nanoGPT, which is nowhere
    rows = capsys.readouterr().out.splitlines()
    assert sum(row.startswith("| ") and row.count("|") == 3 for row in rows) == 1 + len(results)


def test_cuda_tests_need_neither_pexpect_nor_playwright(monkeypatch):
    """Catches tests that cannot be collected on a machine with a GPU but without these packages."""
    files = [p for p in ROOT.glob("tests/test_*.py") if "DEVICES" in p.read_text(encoding="utf-8")]
    for name in list(sys.modules):
        if name.startswith("test_"):
            monkeypatch.delitem(sys.modules, name)
        if name.partition(".")[0] in ("pexpect", "playwright", "axe_playwright_python"):
            monkeypatch.setitem(sys.modules, name, None)
    for name in ("pexpect", "playwright", "axe_playwright_python"):
        monkeypatch.setitem(sys.modules, name, None)
    for path in files:
        import_file(path)
    assert len(files) >= 3
