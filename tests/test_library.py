"""The library: train() and Model from Python, in a thread, twice, and in a notebook."""

import contextlib
import copy
import dataclasses
import io
import math
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import ROOT, prose
from test_chat import CHARACTERS, reference, softmax
from test_terminal import random_model

import anexagpt
from anexagpt import UserError, load, train

TEXT = prose(500)
SMALL = dict(n_layer=1, n_head=2, n_embd=16, block_size=16, batch_size=4, max_steps=24)
SMALL |= dict(eval_interval=8, device="cpu", dtype="float32", progress=False)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def process_state() -> tuple:
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    return torch.get_rng_state().tolist(), torch.get_num_threads(), handlers, dict(os.environ)


def test_ways_to_name_a_text_and_a_device():
    """Catches paths that are no strings, such as entries of a folder, a string that is not read as
    a file with the same text is, and devices that train() takes and load() does not."""
    Path("a.txt").write_bytes(TEXT.encode().replace(b"\n", b"\r\n"))
    by_path = train([Path("a.txt")], **SMALL)
    entries = train([*os.scandir(b".")], **SMALL)
    assert entries.metadata.data.sha256 == by_path.metadata.data.sha256
    by_text = train(text=TEXT.replace("\n", "\r\n"), **SMALL)
    assert by_path.metadata.data.sha256 == by_text.metadata.data.sha256
    Path("sherlock").write_text(TEXT)  # not the built-in text
    assert train(Path("sherlock"), **SMALL).metadata.data == by_text.metadata.data._replace(
        names=["./sherlock"]
    )
    by_path.save("m.safetensors")
    tuned = train(text=TEXT, init=Path("m.safetensors"), **SMALL)
    assert tuned.metadata.training["init"] == "m.safetensors"
    entry = next(entry for entry in os.scandir(b".") if entry.name == b"m.safetensors")
    assert load(entry).metadata == load("m.safetensors").metadata
    assert train(text=TEXT, init=entry, **SMALL).metadata.history == tuned.metadata.history
    assert tuned.generate("the ", temperature=np.linspace(0, 1, 3)[1], max_new=9)
    before = torch.get_rng_state()
    for device in ("auto", torch.device("cpu")):
        assert load("m.safetensors", device=device).metadata == by_path.metadata
    assert torch.equal(torch.get_rng_state(), before)
    again = train(text=TEXT, **SMALL | dict(device=torch.device("cpu"), dtype=torch.float32))
    assert again.metadata.history == by_text.metadata.history
    with pytest.raises(UserError, match="device=tpu"):
        load("m.safetensors", device="tpu")


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_train_and_generate(capfd, dropout):
    """Catches files that nobody asked for, state of the process that is changed, output without
    progress, and a model that is not the best of the run."""
    before = process_state()
    model = train(text=TEXT, dropout=dropout, **SMALL)
    text = model.generate("the ", max_new=50, temperature=0.7, seed=1)
    assert process_state() == before and os.listdir() == []
    assert len(text) == 50 and capfd.readouterr() == ("", "")
    m = model.metadata
    assert m.step == 24 and m.data.names == ["text"] and m.config.dropout == dropout
    assert m.validation_loss == pytest.approx(min(r.validation_loss for r in m.history), abs=1e-6)
    loss, _ = anexagpt.evaluate(model.network, model.tokenizer.encode(TEXT)[len(TEXT) * 9 // 10 :])
    assert loss == pytest.approx(m.validation_loss, abs=1e-5) and not model.network.training
    again = train(text=TEXT, dropout=dropout, **SMALL)
    assert all(map(torch.equal, model.network.parameters(), again.network.parameters()))


def test_the_command_line_trains_the_same(cli):
    """Catches settings that a keyword and its option do not share."""
    Path("t.txt").write_text(TEXT)
    options = [f"--{k.replace('_', '-')}={v}" for k, v in SMALL.items() if k != "progress"]
    assert cli("train", "t.txt", *options, "--seed", 7).status == 0
    model = train("t.txt", out="library.safetensors", seed=7, **SMALL)
    assert model.path == Path("library.safetensors") and model.metadata == load().metadata
    for other in (load(), load("library.safetensors")):
        assert all(map(torch.equal, model.network.parameters(), other.network.parameters()))


def test_stopped_and_resumed():
    """Catches a run that should_stop does not stop, and a second call that begins anew."""
    whole, calls = train(text=TEXT, **SMALL), []

    def should_stop() -> bool:
        calls.append(1)
        return len(calls) > 10

    model = train(text=TEXT, out="m.safetensors", should_stop=should_stop, **SMALL)
    assert model.metadata.step < 24 and model.path.name == "m.safetensors.checkpoint"
    assert model.generate("the", max_new=5)
    model = train(text=TEXT, out="m.safetensors", **SMALL)
    assert model.metadata.history == whole.metadata.history
    assert all(map(torch.equal, model.network.parameters(), whole.network.parameters()))
    with pytest.raises(UserError, match=r"already holds a model.*`restart`.*`init=m\.safetensors`"):
        train(text=TEXT, out="m.safetensors", **SMALL)
    tuned = train(
        text=prose(300), init="m.safetensors", **{k: v for k, v in SMALL.items() if k[:2] != "n_"}
    )
    assert tuned.metadata.training["init"] == "m.safetensors"


WRONG = [
    (dict(max_steps=0), "`max_steps=0`: must be a whole number from 1"),
    (dict(max_steps=True), "`max_steps=True`"),
    (dict(max_steps="3"), "`max_steps='3'`: must be a whole number"),
    (dict(max_step=5), "`max_step`: unknown; choose from size, .*max_steps"),
    (dict(vocab_size=5), "`vocab_size`: unknown"),
    (dict(size="tiny"), "`size=tiny`: must be one of small, medium, large"),
    (dict(dtype="float16"), "`dtype=float16`"),
    (dict(device="tpu"), "`device=tpu`: not found; choose .*cpu"),
    (dict(data="nowhere.txt", text=None), "`data=nowhere.txt`: no such file"),
    (dict(data="nowhere.txt"), "`data` and `text`"),
    (dict(text=None, data=5), "`data=5`: must be the name of a text"),
    (dict(text=None, data=[]), "`data`: is empty"),
    (dict(text=None, data="m.safetensors"), "is a model, not a text; .*`init=m.safetensors`"),
    (dict(text=None, data=b"a.txt"), "`data=b'a.txt'`: must be the name of a text"),
    (dict(out=5), "`5`: must be the name of a file"),
    (dict(text=b"bytes"), "`text=b'bytes'`: must be a string"),
    (dict(text=Path("a.txt")), "`text=a.txt`: must be a string"),
    (dict(size=["small"]), "`size=.*must be one of"),
    (dict(text=None, data="nowhere.txt", encoding=5), "`encoding=5`: unknown"),
    (dict(text="short"), "`data=text`: 5 characters, but training needs 170"),
    (dict(text="".join(map(chr, range(2**16, 2**17)))), "`text`: more than 65,535 different char"),
    (dict(text=None, data="a\0b/*.txt"), r"a\\x00b.*: is not a valid file name"),
    (dict(out="a\0.safetensors"), r"a\\x00.*: is not a valid file name"),
    (dict(out="model.bin"), r"`out=model\.bin`: must be a file ending in \.safetensors"),
    (dict(learning_rate=10.0, muon_learning_rate=10.0), "diverged.*`learning_rate=3.3`"),
]


@pytest.mark.parametrize("wrong, message", WRONG, ids=str)
def test_errors_in_the_words_of_python(wrong, message):
    """Catches messages with options of the command line, or a TypeError from the depths."""
    with pytest.raises(UserError, match=message) as error:
        train(**dict(text=TEXT) | SMALL | wrong)
    assert "--" not in str(error.value) and "\n" not in str(error.value)


def test_sampling_errors():
    """The same for what a Model is asked for."""
    model = train(text=TEXT, **SMALL)
    for settings in (dict(temprature=1.0), dict(temperature=-1), dict(top_k=1.5)):
        with pytest.raises(UserError, match=f"`{next(iter(settings))}"):
            model.generate("the", **settings)


@pytest.mark.parametrize("settings, name", [
    (dict(stop=None), "`stop=None`"), (dict(stop=3), "`stop=3`"), (dict(stop=["a", 3]), "`stop="),
    (dict(stop=b"a"), "`stop="), (dict(prompt=None), "`prompt=None`"), (dict(prompt=3), "`prompt="),
])  # fmt: skip
def test_what_is_no_text(tiny, settings, name):
    """Catches a TypeError from the depths, and a text that is taken apart."""
    model = load(tiny)
    with pytest.raises(UserError, match=name) as error:
        model.generate(**settings)
    assert "must be a string" in str(error.value) and "\n" not in str(error.value)


def test_resumed_with_a_default(monkeypatch):
    """Catches a resumed call that is refused since it names the default, None."""
    first = SMALL | dict(batch_size=3, dropout=0.3)
    train(text=TEXT, out="m.safetensors", should_stop=lambda: True, **first)
    defaults = dict(batch_size=None, dropout=None, muon_learning_rate=None, init=None)
    m = train(text=TEXT, out="m.safetensors", **SMALL | defaults).metadata
    assert (m.step, m.training["batch_size"], m.training["dropout"]) == (24, 3, 0.3)
    train(text=TEXT, out="m.safetensors", restart=True, **SMALL | defaults)


def test_surprise_of_a_wild_model(tiny):
    """Catches an infinite surprise for a character that is not impossible."""
    model = random_model(tiny, "wild.safetensors", CHARACTERS, scale=5.0)
    assert np.isfinite(model.surprise("sherlock holmes")).all()


def test_surprise_of_what_is_no_text(tiny):
    """Catches an AttributeError, and a line end of Windows that counts as an unknown character."""
    model = load(tiny)
    with pytest.raises(UserError, match="`text=5`: must be a string"):
        model.surprise(5)
    assert model.surprise("the\r\ncat").tolist() == model.surprise("the\ncat").tolist()


def test_numbers_of_numpy(tiny):
    """Catches "must be a whole number" for one, and a file that cannot be written with it."""
    model = load(tiny)
    for n in np.arange(3, 5):
        assert len(model.generate("the", max_new=n, top_k=n, temperature=np.float32(0.5))) == n
    settings = SMALL | dict(max_steps=np.int64(4), learning_rate=np.float32(0.01))
    train(text=TEXT, out="m.safetensors", **settings)
    assert load("m.safetensors").metadata.training["max_steps"] == 4


def test_model_without_a_file():
    """Catches a network of a run that cannot be trained on, and an export that needs a file."""
    model = train(text=TEXT, **SMALL)
    ids = torch.tensor(model.prompt_ids("the"), dtype=torch.long)[None]  # (1, 3)
    model.network(ids).sum().backward()
    assert all(p.grad is not None for p in model.network.parameters())
    anexagpt.export(model, Path("hf"), Path("m.gguf"), "mit", half=False, force=False)
    copied = load("hf/model.safetensors").next_characters("the")
    assert np.allclose(copied, model.next_characters("the"), atol=1e-6)
    with pytest.raises(UserError, match="exists"):
        anexagpt.export(model, None, Path("m.gguf"), "mit", half=False, force=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_network_in_another_dtype(tiny, dtype):
    """Catches a network that cannot write text after Module.to(), and a file that is spoilt."""
    model = load(tiny)
    expected = model.next_characters("the")
    model.network.to(dtype)
    assert np.allclose(model.next_characters("the"), expected, atol=0.02)
    assert len(model.generate("the", max_new=5)) == 5
    assert len(copy.deepcopy(model).generate("the", max_new=5)) == 5
    assert model.attention("the").dtype == np.float32
    model.save("m.safetensors")
    anexagpt.export(model, Path("hf"), None, "mit", half=False, force=False)
    for path in ("m.safetensors", "hf/model.safetensors"):
        assert np.allclose(load(path).next_characters("the"), expected, atol=0.02)


@pytest.mark.parametrize("state", ["no_grad", "inference_mode", "float64", "autocast", "device"])
def test_state_of_the_caller(tiny, state):
    """Catches a run without gradients, weights of the first step that serve all others, other
    weights from the same seed, and a good file that is called broken, where the caller has set
    PyTorch to something else."""
    settings = SMALL | (dict(dtype="bfloat16") if state == "autocast" else {})
    expected = train(text=TEXT, **settings)
    with contextlib.ExitStack() as stack:
        if state == "float64":
            stack.callback(torch.set_default_dtype, torch.float32)
            torch.set_default_dtype(torch.float64)
        elif state == "device":  # any other than the CPU: nothing may be made on it
            stack.callback(torch.set_default_device, None)
            torch.set_default_device("meta")
        elif state == "autocast":
            stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        else:
            stack.enter_context(getattr(torch, state)())
        model = train(text=TEXT, **settings)
        assert load(tiny).generate("the", max_new=9, seed=1)
        assert torch.get_default_dtype() == (torch.float64 if state == "float64" else torch.float32)
        assert torch.is_grad_enabled() == (state not in ("no_grad", "inference_mode"))
    assert model.metadata == expected.metadata
    assert all(map(torch.equal, model.network.parameters(), expected.network.parameters()))


def test_environment_of_the_caller(monkeypatch):
    """Catches a run that deletes variables which others have set meanwhile."""
    monkeypatch.delenv("MINE", raising=False)
    train(text=TEXT, should_stop=lambda: os.environ.update(MINE="1"), **SMALL)
    assert os.environ["MINE"] == "1"


@pytest.mark.parametrize("stream", ["none", "write-only", "closed"])
def test_without_a_console(monkeypatch, stream):
    """Catches an AttributeError or ValueError for progress that nobody can see."""
    closed = io.StringIO()
    closed.close()
    write_only = types.SimpleNamespace(write=lambda text: None, flush=lambda: None)
    streams = {"none": None, "write-only": write_only, "closed": closed}
    monkeypatch.setattr("sys.stderr", streams[stream])
    assert train(text=TEXT, **SMALL | dict(progress=True)).metadata.step == 24


def test_copies_of_a_model(tiny):
    """Catches a model that cannot be given to another process, or saved by PyTorch."""
    model = load(tiny)
    expected = model.generate("the", max_new=20, seed=1)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.generate("the", max_new=20, seed=1) == expected


def test_should_stop_without_an_answer():
    """Catches a TypeError after the first step for a callback that returns None."""
    assert train(text=TEXT, should_stop=lambda: None, **SMALL).metadata.step == 24


def test_a_trainer_without_enough_text():
    """Catches a division by zero for a text that train() would refuse."""
    for text in ("", "short", "a" * 40):
        with pytest.raises(UserError, match="too few"):
            anexagpt.Trainer(
                anexagpt.Corpus.from_text(text),
                anexagpt.GPTConfig(block_size=32),
                anexagpt.TrainConfig(),
            )


def test_half_a_character():
    """Catches a UnicodeEncodeError for a text that was decoded with surrogateescape."""
    with pytest.raises(UserError, match=r"`text`: \\udcff at 1,000 .*errors='replace'"):
        train(text="a" * 1_000 + "\udcff", **SMALL)


def test_graphics_cards_that_are_not_used(monkeypatch):
    """Catches a run on the CPU that reads or changes the random state of each GPU."""
    asked = []
    for name in ("get_rng_state", "set_rng_state", "manual_seed_all", "current_device"):
        monkeypatch.setattr(torch.cuda, name, lambda *args, name=name, **_: asked.append(name))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    train(text=TEXT, dropout=0.1, **SMALL)
    assert not asked


def test_in_threads():
    """Catches what works in the main thread only, as signal handlers do, and the random numbers
    of a run that another run uses up."""
    settings = SMALL | dict(dropout=0.1)
    models, expected = [], train(text=TEXT, **settings)

    def run():
        models.append(train(text=TEXT, **settings))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [model.metadata for model in models] == [expected.metadata] * 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_in_a_forked_process():
    """Catches a child, as of multiprocessing, that waits for OpenMP's threads of its parent."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.rand(1_000_000).exp()  # a thread starts
    if (pid := os.fork()) == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(20)
        torch.rand(1_000_000).exp()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    torch.set_num_threads(n_threads)


def n_openmp_threads() -> int:
    """Threads of this process that Python did not start."""
    return len(os.listdir("/proc/self/task")) - threading.active_count()


needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux and GNU's OpenMP")


@needs_linux
def test_cores_are_shared(monkeypatch):
    """Catches threads that go on spinning beside other programs, or that sleep on an idle machine:
    GNU's OpenMP decides by the number of its threads."""
    waited = 0.0
    monkeypatch.setattr(anexagpt, "run_delay", lambda: waited)
    n_cores = len(os.sched_getaffinity(0))
    n_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.zeros(1 << 17).add_(1)
    alone = n_openmp_threads()

    def wait_for(low: int, high: float, waiting: float = 0.0) -> None:
        nonlocal waited
        deadline = time.monotonic() + 20
        while not low <= n_openmp_threads() <= high and time.monotonic() < deadline:
            waited += waiting
            time.sleep(0.05)
        assert low <= n_openmp_threads() <= high

    with anexagpt.share_cores(), anexagpt.share_cores():
        for _ in range(2):
            wait_for(alone + n_cores, math.inf, waiting=0.1)
            wait_for(0, alone)
        wait_for(alone + 1, math.inf, waiting=0.1)
    wait_for(0, alone)
    torch.set_num_threads(n_threads)


@needs_linux
def test_teams_have_ended(monkeypatch):
    """Catches a team that still computes while Python ends, which would abort the process."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(anexagpt, "is_oversubscribed", lambda is_over: not is_over.wait(0.01))
    ended = []

    def slow_team(is_calm: threading.Event) -> None:
        is_calm.wait()
        time.sleep(0.3)
        ended.append(True)

    monkeypatch.setattr(anexagpt, "hold_team", slow_team)
    n_threads = threading.active_count()
    with anexagpt.share_cores():
        deadline = time.monotonic() + 20
        while threading.active_count() < n_threads + 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert ended and threading.active_count() <= n_threads


def test_no_more_threads_can_start(monkeypatch):
    """Catches a run that fails where a limit of the system leaves no room for another thread, and
    a watch that never comes again."""
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", Mock(side_effect=RuntimeError("no thread")))
        with anexagpt.share_cores():
            pass
    assert not anexagpt.ONE_WATCH.locked()


@needs_linux
def test_waiting_for_cores_is_measured():
    """Catches a measure of something else: a thread that never sleeps waits for a core whenever it
    does not run, here two thirds of the time."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})  # of this thread, and of the processes that it starts
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        time.sleep(0.5)  # they start
        waited, begun, ran = anexagpt.run_delay(), time.monotonic(), time.thread_time()
        while time.monotonic() < begun + 1.5:
            pass
        waited = anexagpt.run_delay() - waited
        idle = time.monotonic() - begun - (time.thread_time() - ran)
        assert waited == pytest.approx(idle, abs=0.2) and idle > 0.8
    finally:
        for process in busy:
            process.kill()
            process.wait()
        os.sched_setaffinity(0, cores)


@needs_linux
def test_runs_share_the_cores(monkeypatch):
    """Catches a run, from Python or on the command line, that never looks for other programs."""
    watched = []
    monkeypatch.setattr(anexagpt, "watch_cores", watched.append)
    model = train(text=TEXT, **SMALL)
    assert len(watched) == 1
    model.save("m.safetensors")
    assert anexagpt.main(["info", "m.safetensors"]) == 0
    assert len(watched) == 2


# ---- views ---------------------------------------------------------------------------------------


def test_views_are_arrays(tiny):
    """Catches a wrong shape, unit or order, against the formulas in float64."""
    model = random_model(tiny, "model.safetensors", CHARACTERS, scale=0.7)
    text = "sherlock holmes took his bottle from the corner"  # longer than the context
    logits, weights = reference(model, text)
    probs = model.next_characters(text)
    assert probs.shape == (len(model.tokenizer),) and probs.sum() == pytest.approx(1)
    np.testing.assert_allclose(probs, softmax(logits), atol=1e-5)
    top = model.next_characters(text, top_k=3)
    assert np.count_nonzero(top) == 3 and top[0] == 0
    greedy = model.next_characters(text, temperature=0)
    assert greedy[probs[1:].argmax() + 1] == 1 and greedy.sum() == pytest.approx(1)
    attention = model.attention(text)
    assert attention.shape == tuple(weights.shape)  # (L, H, T, T)
    np.testing.assert_allclose(attention, weights, atol=1e-5)
    surprise = model.surprise(text)
    index = model.tokenizer.characters.index
    expected = []
    for i, c in enumerate(text):
        expected.append(-math.log2(softmax(reference(model, "\n" + text[:i])[0])[index(c)]))
    np.testing.assert_allclose(surprise, expected, atol=1e-4)
    after = model.surprise(text[10:], prompt="\n" + text[:10])
    np.testing.assert_allclose(after, surprise[10:], atol=1e-4)
    assert model.surprise("").shape == (0,)


def test_repr(tiny):
    """Catches a Model that shows object addresses, in a notebook."""
    shown = repr(load(tiny)).splitlines()
    assert "parameters" in shown[0] and "150 steps" in shown[0] and "prose.txt" in shown[0]
    assert set(shown[1]) & set("▁▂▃▄▅▆▇█") and "\n" not in repr(
        train(text=TEXT, **SMALL | dict(max_steps=1))
    )


# ---- notebooks -----------------------------------------------------------------------------------

SETTINGS = {name: value for name, value in SMALL.items() if name != "progress"}
CELLS = [
    "import anexagpt",
    f"model = anexagpt.train('t.txt', out='me.safetensors', **{SETTINGS})",
    "print(model.generate('the ', max_new=20, seed=1))",
    "model",
    "anexagpt.main(['info', 'me.safetensors'])",
    f"%run {ROOT / 'anexagpt.py'} generate the --model me.safetensors -n 5",
]


def test_in_a_notebook():
    """Catches streams of a notebook that lack what a terminal's have, progress that fills the
    screen instead of one line, and a traceback in any cell."""
    manager = pytest.importorskip("jupyter_client.manager")
    Path("t.txt").write_text(TEXT)
    environment = os.environ | dict(PYTHONPATH=str(ROOT), JUPYTER_PLATFORM_DIRS="1")
    kernel, client = manager.start_new_kernel(env=environment, cwd=os.getcwd())
    outputs = []
    try:
        for cell in CELLS:
            parts = []
            reply = client.execute_interactive(cell, timeout=120, output_hook=parts.append)
            assert reply["content"]["status"] == "ok", (cell, reply["content"])
            text = ""
            for message in parts:
                content = message["content"]
                text += content.get("text", "") + content.get("data", {}).get("text/plain", "")
            outputs.append(text)
    finally:
        client.stop_channels()
        kernel.shutdown_kernel(now=True)
    _, training, written, shown, info, run = outputs
    assert "24/24" in training and "\r" in training and "\x1b" not in training
    assert len(written.strip("\n")) >= 15 and shown.startswith("Model: ")
    assert "24 steps" in info and "Traceback" not in info and run.startswith("the")


def test_curve_in_repr(tiny):
    """Catches a curve that lacks its highest or lowest level, or that is upside down."""
    model = load(tiny)
    rows = [anexagpt.Evaluation(n, 1.0, loss) for n, loss in enumerate([8, 7, 6, 5, 4, 3, 2, 1])]
    model.metadata = dataclasses.replace(model.metadata, history=rows)
    assert repr(model).endswith("\nvalidation loss 8.00 █▇▆▅▄▃▂▁ 1.00")


def test_save_replaces_only_models(tiny):
    """Catches a diary that a model replaces, since its name was given for that of the model."""
    model = load(tiny)
    for _ in range(2):
        model.save("m.safetensors")
    Path("diary.txt").write_text("mine")
    Path("empty").touch()
    Path("folder").mkdir()
    for name in ("diary.txt", "empty", "folder"):
        with pytest.raises(anexagpt.UserError, match=f"{name}: .*another name"):
            model.save(name)
    assert Path("diary.txt").read_text() == "mine"
    train(text=TEXT, out="run.safetensors", should_stop=lambda: True, **SMALL)
    checkpoint = Path("run.safetensors.checkpoint").read_bytes()
    with pytest.raises(anexagpt.UserError, match="checkpoint; save"):
        model.save("run.safetensors.checkpoint")
    assert Path("run.safetensors.checkpoint").read_bytes() == checkpoint


@pytest.mark.parametrize(
    "text", [TEXT, TEXT[:400].replace("\n", " "), "\u0915" * 90, "# a " * 9_000]
)
def test_text_in_place_of_a_name(text):
    """Catches a traceback of the system where a text was given as the name of one."""
    with pytest.raises(anexagpt.UserError, match="as train"):
        train(text, **SMALL)
