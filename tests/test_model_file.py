"""Model file and checkpoint: written whole or not at all, never trusted when read, never taken for
one another, and never replaced or deleted without being asked."""

import dataclasses
import json
import os
import resource
import struct
import sys
import tracemalloc
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import ROOT, header, interrupt_at
from test_faults import CHECKPOINT, MODEL, OPTIONS, Fork, folder, stop, weights  # noqa: F401

import anexagpt

sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
import fuzz


def craft(source: Path, changes: dict, tensors: dict | None = None, path="m.safetensors") -> Path:
    """Copy of a file with other entries (as they stand, or as JSON) in its metadata; None: less."""
    document, numbers = header(source), weights(source)
    metadata = document["__metadata__"]
    for name, value in changes.items():
        metadata[name] = value if isinstance(value, str) else json.dumps(value)
        if value is None:
            del metadata[name]
    if tensors is not None:
        safetensors.torch.save_file(tensors, path, metadata)
    else:
        text = json.dumps(document).encode()
        Path(path).write_bytes(struct.pack("<Q", len(text)) + text + numbers)
    return Path(path)


def entry(path: Path, name: str):
    return json.loads(header(path)["__metadata__"][name])


def refused(cli, path, *words: str) -> None:
    """Whoever opens the file gets one line, and the library the same words."""
    path = Path(path)
    with pytest.raises(anexagpt.UserError) as error:
        anexagpt.load(path)
    assert str(path) in str(error.value) and str(error.value).isprintable()
    result = cli("generate", "a", "--model", path)
    assert (
        result.is_error(str(path), *words) and anexagpt.as_options(str(error.value)) in result.err
    )
    result = cli("info", "--model", path)
    assert result.status == 0 or result.is_error(str(path))


# ---- what is in a file ---------------------------------------------------------------------------


def test_round_trip(tiny):
    """Catches what a file does not give back, bit for bit, mode bits that widen, and a file
    that stays mapped: overwritten or truncated by another program it would spoil a chat."""
    model, again = anexagpt.load(tiny), Path("again.safetensors")
    model.save(again)
    again.chmod(0o600)
    model.save(again)
    assert header(again) == header(tiny) and weights(again) == weights(tiny)
    other = anexagpt.load(str(again))
    assert other.metadata == model.metadata and not other.network.training
    assert other.generate("the", seed=1) == model.generate("the", seed=1)
    assert again.stat().st_mode & 0o777 == 0o600
    again.write_bytes(bytes(again.stat().st_size))
    os.truncate(again, 0)
    assert other.generate("the", seed=1) == model.generate("the", seed=1)


def test_self_contained(tiny):
    """Catches an entry that other programs rely on, read without this one and safetensors."""
    entries = header(tiny)
    metadata = entries.pop("__metadata__")
    assert metadata["format"] == "pt" and metadata["format_version"] == "1"
    assert metadata["torch_version"] == torch.__version__ and metadata["anexa_version"]
    text = (tiny.parent / "prose.txt").read_text()
    assert entry(tiny, "characters") == "\ufffd" + "".join(sorted(set(text)))
    shape = dict(vocab_size=len(set(text)) + 1, block_size=16, n_layer=1, n_head=2, n_embd=16)
    assert shape.items() <= entry(tiny, "config").items()
    assert entry(tiny, "data")["characters"] == len(text)
    assert entry(tiny, "training")["max_steps"] == entry(tiny, "step") == 150
    history = entry(tiny, "history")
    assert [row[0] for row in history] == [50, 100, 150]
    assert entry(tiny, "validation_loss") == pytest.approx(min(r[2] for r in history), abs=1e-5)
    assert set(safetensors.torch.load_file(tiny)) == set(entries) and len(entries) == 16


def test_file_of_an_earlier_version(tiny, cli):
    """Catches a model of before version 1.0, with one name and other settings, that cannot be read
    any more."""
    data = entry(tiny, "data")
    data["name"] = data.pop("names")[0] + " + x.txt"
    training = entry(tiny, "training") | dict(checkpoint_interval=None, learning_rate=99)
    path = craft(tiny, dict(data=data, training=training))
    assert anexagpt.load(path).metadata.data.names == [data["name"]]
    assert cli("info", "--model", path).out.count(" + x.txt")


# ---- files that are not ours ---------------------------------------------------------------------


def test_not_a_model(tiny, cli, monkeypatch):
    """Catches a traceback for other files, a wait for a pipe, and half a file that is a model."""
    content, path = tiny.read_bytes(), Path("m.safetensors")
    cut = [content[:n] for n in (0, 4, 8, 100, len(content) // 2, -4, -1)]
    others = [b"\0", b"\xff" * 100, b"hello " * 50, b"PK\x03\x04" * 50, content + b"\0" * 4]
    for other in cut + others:
        path.write_bytes(other)
        refused(cli, path)
    safetensors.torch.save_file({"wte.weight": torch.zeros(3, 4)}, path, dict(format="pt"))
    refused(cli, path, "format_version")
    path.write_bytes(content)
    os.truncate(path, 1 << 43)  # takes no room on the disk
    refused(cli, path, "not those of its config")
    os.mkfifo("pipe")
    for name in ("pipe", ".", "/dev/zero"):
        refused(cli, name)
    refused(cli, "none.safetensors", "no such file", "train")


DEEP = "[" * 100_000 + "]" * 100_000
SHA = "0" * 64
DATA = dict(names=["x"], sha256=SHA, characters=1)
ABSURD = [0, -1, 10**9, 2**63, 10**400, 1.5, "4", True, [], {}, float("nan"), float("inf")]
HOSTILE = {  # entry of the header: what it says instead
    "format_version": ["2", "0", "", "1.0", "x" * 10_000, "\x1b[2J\n1", None],
    "config": ["null", "[]", "4", "{}", "{", "", DEEP, '{"a":' * 50_000, "9" * 10_000, None],
    "characters": ["null", "5", '""', '"abc"', '"\\ufffd"', '"\\ud800"', DEEP, None],
    "data": ["null", [], {}, "9" * 5000, DATA | dict(names="x"), DATA | dict(names=[]), None]
    + [DATA | dict(names=[5]), DATA | dict(sha256="x"), DATA | dict(sha256=SHA + "\n")]
    + [DATA | dict(sha256=int("1" * 64)), DATA | dict(sha256="<b>" + SHA[3:])]
    + [DATA | dict(characters=n) for n in ("5", None, [], float("inf"), 10**400)],
    "training": ["null", [], '"x"', dict(init=5), '{"seed": NaN}', DEEP, None],
    "step": ["null", '"5"', "1.5", "1e999", "NaN", "9" * 400, "9" * 5000, "-5", DEEP, None],
    "validation_loss": ['"5"', "NaN", "1e999", "9" * 400, "[]", "{}", '""', "false", None],
    "history": ["null", {}, [1], [[1, 2]], '[["a", 2, 3]]', "[[1, null, 3]]", "[[1, NaN, 3]]", DEEP,
                [[5, 2, 3], [5, 2, 3]], [[5, 2, 3], [2, 2, 3]], [[-5, 2, 3]], [[0.5, 2, 3]], None,
                [[9**9, 2, 3]]],  # beyond the step of the run
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_header(tiny, cli, name):
    """Catches any entry that is believed, or missing: a traceback, a hang, a size that asks for all
    the memory or is not that of the tensors, ids that mean other characters."""
    c, config = entry(tiny, "characters"), entry(tiny, "config")
    sizes = [config | {k: v} for k in config for v in ABSURD if k != "dropout"]
    sizes += [config | {k: v} for k in config for v in (None, 1000) if k != "dropout"]
    sizes += [config | change for change in (dict(dropout=2.0), dict(dropout="0"), dict(more=1))]
    texts = c[:2] + c[1] + c[3:], c[0] + c[2] + c[1] + c[3:], c[:-1] + "\ufffd", c[1:] + "\uffff"
    texts = map(json.dumps, (*texts, c[:-1], c + "\U0001f600", c[:-1] + "\ud800"))
    if name == "config":  # its memory is not taken
        refused(cli, craft(tiny, {name: config | dict(n_embd=2000)}), "not those of its config")
    for value in [*HOSTILE[name], *dict(config=sizes, characters=texts).get(name, [])]:
        refused(cli, craft(tiny, {name: value}))


TENSORS = [
    lambda t: t | {"wte.weight": t["wte.weight"].t().contiguous()},
    lambda t: {k: v.bfloat16() for k, v in t.items()},
    lambda t: {k: v for k, v in t.items() if k != "ln_f.bias"},
    lambda t: t | {"lm_head.weight": torch.zeros(3)},
    lambda t: t | {"wpe.weight": t["wpe.weight"].index_fill(0, torch.tensor(3), torch.nan)},
    lambda t: {k: v * 0 + 3e38 for k, v in t.items()},
    lambda t: {},
]


def test_hostile_tensors(tiny, cli):
    """Catches weights of another shape, format or name, and such that are not finite."""
    tensors = safetensors.torch.load_file(tiny)
    for change in TENSORS:
        refused(cli, craft(tiny, {}, change(tensors)))


def test_huge_headers(tiny, cli):
    """Catches a header or a history that takes many times its size of memory: 1.3 GB, once."""
    path = Path("m.safetensors")
    text = b'{"__metadata__":{"format_version":"1","x":"' + b"x" * 60_000_000 + b'"}}'
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    tracemalloc.start()
    refused(cli, path)
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()
    craft(tiny, dict(step=200_000, history=[[i, 1, 1] for i in range(1, 200_000)]))  # 3 MB
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = lambda: resource.setrlimit(resource.RLIMIT_AS, (used + (200 << 20),) * 2)  # noqa: E731
    for command in (["info"], ["generate", "a", "-k", 8, "-n", 2]):
        result = Fork(*command, "--model", path, prepare=limit).result()
        assert result.status == 0 and result.err == "", result


def test_hostile_strings(tiny, cli):
    """Catches an escape sequence in a name or a setting that reaches the terminal raw."""
    nasty = "\x1b]0;x\x07\x9b2J\u202e\r\n"
    path = craft(tiny, dict(data=DATA | dict(names=[nasty]), training={nasty: nasty}))
    for command in (["info"], ["chat"], ["generate", "a", "-n", 1], ["eval"]):
        result = cli(*command, "--model", path)
        assert result.status == 2 * (command == ["eval"]), result  # its text is not here
        assert not set("\x1b\x07\x9b\u202e\r") & set(result.out + result.err)


def test_fuzz():
    """Catches spoilt files that end in a traceback, a hang, or a message that is not one line. Its
    long form is tests/benchmarks/fuzz.py."""
    counts = fuzz.fuzz(80)
    for reader in fuzz.READERS:
        assert counts[f"{reader} refused"] > 5 and counts[f"{reader} used"]


# ---- checkpoints ---------------------------------------------------------------------------------


def test_which_weights_of_a_checkpoint(cli):
    """Catches "best" weights of a run that was never evaluated."""
    for step, kind in ((3, "averaged"), (10, "best")):
        stop(cli, step, "--restart")
        assert f"its {kind} weights" in cli("generate", "the", "-n", 1, "--model", CHECKPOINT).err


@pytest.mark.parametrize("name", ["checkpoint.safetensors", "x-checkpoint.safetensors"])
def test_model_that_is_named_like_a_checkpoint(cli, name):
    """Catches a finished model that is taken for a checkpoint, and deleted by --restart."""
    assert cli("train", *OPTIONS, "--quiet", "--out", name).status == 0
    before = Path(name).read_bytes()
    out = name.replace("x-checkpoint", "x").replace("checkpoint", "model")
    for options in ([], ["--restart"], ["--restart", "--seed", 5]):
        assert cli("run", *OPTIONS, "--quiet", "--out", out, *options).status == 0
        assert Path(name).read_bytes() == before
    stop(cli, 10, "--out", out, "--restart")
    assert cli("train", *OPTIONS, "--out", out).status == 0
    assert Path(name).read_bytes() == before


def test_foreign_file_at_the_checkpoints_name(cli, tiny):
    """Catches a file that is deleted or replaced as a checkpoint, although it is none; and an
    --out that can be another run's checkpoint."""
    for content in (b"", b"my notes", tiny.read_bytes()):
        CHECKPOINT.write_bytes(content)
        for options in ([], ["--restart"]):
            assert cli("train", *OPTIONS, *options).is_error(str(CHECKPOINT), "another --out")
            assert CHECKPOINT.read_bytes() == content
    CHECKPOINT.unlink()
    os.mkfifo(CHECKPOINT)
    assert Fork("train", *OPTIONS).result(10).status == 2
    CHECKPOINT.unlink()
    CHECKPOINT.symlink_to("nowhere")
    assert cli("train", *OPTIONS, "--restart").is_error(str(CHECKPOINT)) and CHECKPOINT.is_symlink()
    assert cli("train", *OPTIONS, "--out", "x.checkpoint").is_error(".checkpoint", "another name")


def test_model_that_was_copied_in(cli, tiny):
    """Catches a finished model, put beside a stopped run, that the resumed run replaces, and a text
    that --restart replaces by a model."""
    Path("notes.md").write_text("my notes")
    result = cli("train", *OPTIONS, "--out", "notes.md", "--restart")
    assert result.is_error("notes.md", "choose another")
    assert Path("notes.md").read_text() == "my notes"
    assert stop(cli, 10).status == 130
    checkpoint = CHECKPOINT.read_bytes()
    MODEL.write_bytes(tiny.read_bytes())
    for command in ("train", "run"):
        assert cli(command, *OPTIONS).is_error(str(MODEL), str(CHECKPOINT), "move")
        assert MODEL.read_bytes() == tiny.read_bytes() and CHECKPOINT.read_bytes() == checkpoint
    assert cli("train", *OPTIONS, "--out", MODEL.with_stem("other")).status == 0
    assert cli("train", *OPTIONS, "--restart").status == 0
    assert MODEL.read_bytes() != tiny.read_bytes() and not CHECKPOINT.exists()
    assert cli("train", *OPTIONS, "--restart").status == 0  # keeps both
    assert MODEL.with_stem("model.old").read_bytes() == tiny.read_bytes()


def test_use_of_a_checkpoint(cli):
    """Catches a run that must end before one can try it: every command opens its checkpoint, with
    the weights that were the best."""
    options = ["--eval-interval", 4, "--checkpoint-interval", 0]
    stop(cli, 10, *options)
    for command in (["generate", "the", "-n", 9], ["explain", "the"], ["eval"]):
        result = cli(*command, "--model", CHECKPOINT)
        assert result.status == 0 and "step 10" in result.err, result
    assert cli("chat", CHECKPOINT, stdin="the\n").out.startswith("the")
    info = cli("info", CHECKPOINT).out
    assert "checkpoint" in info and "10 steps" in info
    best, loss = anexagpt.load(CHECKPOINT), min(r[2] for r in entry(CHECKPOINT, "history"))
    text = Path("prose.txt").read_text()
    ids = best.tokenizer.encode(text)[len(text) * 9 // 10 :]
    assert anexagpt.evaluate(best.network, ids)[0] == pytest.approx(loss, abs=1e-5)


def test_options_of_a_stopped_run(cli):
    """Catches a run that goes on with other settings than those it is asked for, and one whose
    number of steps cannot be changed."""
    stop(cli, 10)
    for option, value in {"--seed": 5, "--n-layer": 2, "--batch-size": 3, "--dropout": 0.2}.items():
        result = cli("train", *OPTIONS, option, value)
        assert result.is_error(f"{option} ", f"not {value}", "drop", "--restart"), result
    assert cli("train", *OPTIONS, "--max-steps", 10).is_error("--max-steps 10", "step 10")
    free = ["--max-steps", 16, "--grad-accum", 2, "--checkpoint-interval", 9, "--dtype", "bfloat16"]
    assert cli("train", *OPTIONS, *free).status == 0
    assert entry(MODEL, "step") == entry(MODEL, "training")["max_steps"] == 16
    assert cli("train", *OPTIONS, "--max-steps", 16).is_error(
        "already holds a model", "--out", "--init"
    )


def test_tensors_are_aligned(tiny):
    """Catches tensors at an odd address, which a reader that maps the file cannot take as float32.

    The header, with its eight bytes of length in front, ends at a multiple of eight.
    """
    model = anexagpt.load(tiny)
    for n in range(1, 9):  # every length of a header
        data = model.metadata.data._replace(names=["x" * n])
        model.metadata = dataclasses.replace(model.metadata, data=data)
        model.save("aligned.safetensors")
        length = int.from_bytes(Path("aligned.safetensors").read_bytes()[:8], "little")
        assert length % 8 == 0, n
        assert anexagpt.load("aligned.safetensors").metadata.data.names == ["x" * n]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_number_format_of_a_stopped_run(cli, dtype):
    """Catches a run that goes on in the format that the machine prefers, instead of its own."""
    options = OPTIONS[: OPTIONS.index("--dtype")] + OPTIONS[OPTIONS.index("--dtype") + 2 :]
    with interrupt_at(10):
        assert cli("train", *options, "--dtype", dtype).status == 130
    assert cli("train", *options).status == 0
    assert entry(MODEL, "training")["dtype"] == dtype
