"""Model file: written whole or not at all, and never trusted when read."""

import errno
import json
import os
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import header

import anexagpt
from anexagpt import UNKNOWN, UserError, load_model, open_file, save_file

CPU = torch.device("cpu")


def craft(path: Path, entries: dict, data: bytes) -> Path:
    """Write a safetensors file by hand, so that it can say anything: 8 bytes of length, JSON, raw numbers."""
    text = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def parts(path: Path) -> tuple[dict, bytes]:
    """Header and raw numbers of a safetensors file."""
    content = path.read_bytes()
    return header(path), content[8 + int.from_bytes(content[:8], "little") :]


def refused(path: Path, *words: str) -> str:
    """Reading it is one clear error, and info and load_model agree."""
    texts = []
    for function in (
        lambda: load_model(path, CPU),
        lambda: anexagpt.info(anexagpt.parse_options(["info", "--model", str(path)])),
    ):
        try:
            function()
        except UserError as error:
            texts.append(str(error))
    assert texts, "the file was accepted"
    text = texts[0]
    assert "\n" not in text and text.isprintable() and len(text) < 600 and str(path) in text, text
    assert all(word in text for word in words), text
    return text


# ---- round trip ------------------------------------------------------------------------------------------------------


def test_round_trip(tiny, tmp_path):
    """Catches anything that a file does not give back, bit for bit."""
    model, tokenizer, story = load_model(tiny, CPU)
    assert not model.training
    again = tmp_path / "again.safetensors"
    save_file(again, dict(model.named_parameters()), story)
    other, _, other_story = load_model(again, CPU)
    assert other_story == story and tokenizer.characters == story.characters
    for (name, p), (other_name, q) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert name == other_name and torch.equal(p, q)
    assert header(again) == header(tiny) and parts(again)[1] == parts(tiny)[1]


def test_the_file_tells_its_own_story(tiny):
    """Catches an entry that other programs rely on; the header is read without our code and without safetensors."""
    entries = header(tiny)
    metadata = entries.pop("__metadata__")
    assert all(isinstance(v, str) for v in metadata.values())
    assert metadata["format"] == "pt" and metadata["format_version"] == "1"
    assert metadata["torch_version"] == torch.__version__ and metadata["anexa_version"]
    told = {k: json.loads(metadata[k]) for k in ("config", "characters", "data", "training", "step", "history")}
    text = (tiny.parent / "prose.txt").read_text(encoding="utf-8")
    assert told["characters"] == UNKNOWN + "".join(sorted(set(text)))
    assert told["config"] == dict(
        vocab_size=len(set(text)) + 1, block_size=16, n_layer=1, n_head=2, n_embd=16, dropout=told["config"]["dropout"]
    )
    assert told["data"]["characters"] == len(text) and len(told["data"]["sha256"]) == 64
    assert told["training"]["max_steps"] == told["step"] == 150
    assert [row[0] for row in told["history"]] == [50, 100, 150]
    assert json.loads(metadata["validation_loss"]) == pytest.approx(min(row[2] for row in told["history"]), abs=1e-5)
    assert len(entries) == 4 + 12 and entries["wte.weight"]["dtype"] == "F32"
    assert set(safetensors.torch.load_file(tiny)) == set(entries)


def test_a_letter_beyond_16_bits(tiny, tmp_path):
    """Catches characters that JSON or the header changes."""
    story, _ = open_file(tiny)
    characters = UNKNOWN + "".join(sorted('\0\n "\\\u00e9\u4e2d\U0001f600abc'))
    V = len(characters)
    config = anexagpt.GPTConfig(V, 16, 1, 2, 16, 0.0)
    path = tmp_path / "m.safetensors"
    other = anexagpt.replace(story, config=config, characters=characters)
    save_file(path, dict(anexagpt.GPT(config).named_parameters()), other)
    assert load_model(path, CPU)[2] == other


# ---- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file(tiny, tmp_path, monkeypatch, call):
    """Catches a full disk that costs the finished model, or leaves half a file beside it."""
    model, _, story = load_model(tiny, CPU)
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"the old one")

    def fail(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(UserError, match=r"model.safetensors: cannot be written \(No space left") as error:
        save_file(path, dict(model.named_parameters()), story)
    assert "\n" not in str(error.value)
    assert path.read_bytes() == b"the old one" and os.listdir(tmp_path) == ["model.safetensors"]


def test_a_write_that_is_cut_short(tiny, tmp_path, monkeypatch):
    """Catches a write into the final file: whoever dies in the middle must leave the old one."""
    model, _, story = load_model(tiny, CPU)
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"the old one")

    def die(number):
        assert path.read_bytes() == b"the old one"
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", die)
    with pytest.raises(KeyboardInterrupt):
        save_file(path, dict(model.named_parameters()), story)
    assert path.read_bytes() == b"the old one" and os.listdir(tmp_path) == ["model.safetensors"]


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_permissions_stay(tiny, tmp_path):
    """Catches a private model that becomes readable for everybody when it is trained again."""
    model, _, story = load_model(tiny, CPU)
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    path.chmod(0o600)
    save_file(path, dict(model.named_parameters()), story)
    assert path.stat().st_mode & 0o777 == 0o600


# ---- reading what is not ours ----------------------------------------------------------------------------------------


def test_missing(tmp_path):
    """Catches a traceback, and an error without the command that helps."""
    refused(tmp_path / "no.safetensors", "no such file", "train")


@pytest.mark.parametrize("content", [b"", b"\0", b"\xff" * 8, b"\xff" * 100, b"hello " * 50, b"PK\x03\x04" * 50])
def test_not_a_safetensors_file(tmp_path, content):
    """Catches a traceback from the library that reads the format."""
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    refused(path)


def test_folder(tmp_path):
    """Catches a traceback for a folder."""
    refused(tmp_path)


@pytest.mark.parametrize("keep", [4, 8, 100, 0.5, -4, -1])
def test_truncated(tiny, tmp_path, keep):
    """Catches half a file that is taken for a model, wherever it ends."""
    content = tiny.read_bytes()
    path = tmp_path / "m.safetensors"
    path.write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])
    refused(path)


def test_foreign(tmp_path):
    """Catches a traceback, or a random model, from a file of another program."""
    path = tmp_path / "m.safetensors"
    safetensors.torch.save_file({"transformer.wte.weight": torch.zeros(3, 4)}, path)
    refused(path, "format_version")
    safetensors.torch.save_file({"wte.weight": torch.zeros(3, 4)}, path, metadata=dict(format="pt"))
    refused(path, "format_version")


def test_a_model_that_was_never_measured(tiny, tmp_path):
    """Catches a null that passes as a loss, and ends the export with a traceback."""
    model, _, story = load_model(tiny, CPU)
    told = anexagpt.replace(story, validation_loss=None)
    save_file(tmp_path / "m.safetensors", dict(model.named_parameters()), told)
    refused(tmp_path / "m.safetensors", "validation_loss")


def test_checkpoint_is_not_a_model(tiny, tmp_path):
    """Catches a checkpoint given to chat, which holds more tensors under other names."""
    model, _, story = load_model(tiny, CPU)
    path = tmp_path / "checkpoint.safetensors"
    save_file(path, {f"model.{name}": p for name, p in model.named_parameters()}, story)
    refused(path)


DEEP = "[" * 100_000 + "]" * 100_000
HOSTILE = {  # entry of the header: what it says instead
    "format_version": ["2", "0", "", "1.0", "x" * 10_000, "\x1b[2J\n1"],
    "config": ["null", "[]", "4", "{}", "{", "", DEEP, '{"a":' * 50_000, "\ud83d", "9" * 10_000],
    "characters": ["null", "5", '""', '"abc"', '"\\ufffd"', '"\\ud800"', DEEP],
    "data": [
        "null",
        "[]",
        "{}",
        '{"name": 5, "sha256": "x", "characters": 1}',
        '{"name": "x", "sha256": "x"}',
        "9" * 5000,
    ]
    + [f'{{"name": "x", "sha256": "x", "characters": {n}}}' for n in ("1e999", '"5"', "null", "9" * 5000, "[]")],
    "training": ["null", "[]", '"x"', '{"seed": NaN}', DEEP],
    "step": ["null", '"5"', "1.5", "1e999", "NaN", "9" * 400, "9" * 5000, "-" + "9" * 400, DEEP, "-5"],
    "validation_loss": ['"5"', "NaN", "Infinity", "-Infinity", "1e999", "9" * 400, "[]"],
    "history": ["null", "{}", "[1]", "[[1, 2]]", '[["a", 2, 3]]', "[[1, null, 3]]", "[[1, NaN, 3]]", DEEP]
    + [f"[[1, 2, {n}]]" for n in ("1e999", "9" * 400, "[]", '"4"')],
}


@pytest.mark.parametrize(
    "entry, value",
    [(entry, value) for entry, values in HOSTILE.items() for value in values],
    ids=lambda x: ascii(x)[:20].encode("unicode_escape").decode(),
)
def test_hostile_header(tiny, tmp_path, entry, value):
    """Catches any entry that is believed: each is one error, without traceback, hang or great memory."""
    entries, data = parts(tiny)
    entries["__metadata__"][entry] = value
    text = json.dumps(entries, ensure_ascii=True)
    path = tmp_path / "m.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text.encode() + data)
    refused(path)


@pytest.mark.parametrize("entry", HOSTILE)
def test_entry_missing(tiny, tmp_path, entry):
    """Catches a KeyError."""
    entries, data = parts(tiny)
    del entries["__metadata__"][entry]
    refused(craft(tmp_path / "m.safetensors", entries, data), entry)


ABSURD = [0, -1, 10**9, 2**63, 10**400, 1.5, "4", True, None, [], {}, float("nan"), float("inf")]


@pytest.mark.parametrize("value", ABSURD, ids=lambda v: repr(v)[:12])
@pytest.mark.parametrize("name", ["vocab_size", "block_size", "n_layer", "n_head", "n_embd"])
def test_absurd_config(tiny, tmp_path, name, value):
    """Catches a size that asks for all the memory, or a truth value taken for 1."""
    entries, data = parts(tiny)
    config = json.loads(entries["__metadata__"]["config"]) | {name: value}
    entries["__metadata__"]["config"] = json.dumps(config)
    refused(craft(tmp_path / "m.safetensors", entries, data))


@pytest.mark.parametrize(
    "change",
    [
        dict(dropout=2.0),
        dict(dropout="0"),
        dict(more=1),
        dict(n_head=3),
        dict(n_layer=2),
        dict(block_size=32),
        dict(n_embd=65_536, n_head=1),
        dict(n_layer=1000),
        dict(vocab_size=5),
    ],
    ids=str,
)
def test_config_that_does_not_fit(tiny, tmp_path, change):
    """Catches a config that is possible, but not that of these tensors."""
    entries, data = parts(tiny)
    config = json.loads(entries["__metadata__"]["config"]) | change
    entries["__metadata__"]["config"] = json.dumps(config)
    refused(craft(tmp_path / "m.safetensors", entries, data))


@pytest.mark.parametrize("change", ["twice", "order", "unknown again", "no unknown", "short", "long", "surrogate"])
def test_characters_that_do_not_fit(tiny, tmp_path, change):
    """Catches ids that would mean other characters than in training."""
    entries, data = parts(tiny)
    c = json.loads(entries["__metadata__"]["characters"])
    new = {
        "twice": c[0] + c[1] + c[1] + c[3:],
        "order": c[0] + c[2] + c[1] + c[3:],
        "unknown again": c[:-1] + UNKNOWN,
        "no unknown": c[1:] + "\uffff",
        "short": c[:-1],
        "long": c + "\U0001f600",
        "surrogate": c[:-1] + "\ud800",
    }[change]
    entries["__metadata__"]["characters"] = json.dumps(new)
    refused(craft(tmp_path / "m.safetensors", entries, data))


TENSORS = {
    "transposed": lambda t: t | {"h.0.mlp.c_fc.weight": t["h.0.mlp.c_fc.weight"].T.contiguous()},
    "flat": lambda t: t | {"wte.weight": t["wte.weight"].flatten()},
    "empty": lambda t: t | {"wte.weight": torch.zeros(0, 16)},
    "half": lambda t: {k: v.half() for k, v in t.items()},
    "bfloat16": lambda t: t | {"ln_f.bias": t["ln_f.bias"].bfloat16()},
    "double": lambda t: t | {"ln_f.bias": t["ln_f.bias"].double()},
    "whole numbers": lambda t: t | {"ln_f.bias": t["ln_f.bias"].int()},
    "missing": lambda t: {k: v for k, v in t.items() if k != "ln_f.bias"},
    "one more": lambda t: t | {"lm_head.weight": torch.zeros(3)},
    "other name": lambda t: {k.replace("ln_f", "norm"): v for k, v in t.items()},
    "nan": lambda t: t | {"wpe.weight": t["wpe.weight"].index_fill(0, torch.tensor(3), torch.nan)},
    "infinite": lambda t: t | {"ln_f.bias": t["ln_f.bias"] - torch.inf},
    "none": lambda t: {},
}


@pytest.mark.parametrize("change", TENSORS)
def test_tensors_that_do_not_fit(tiny, tmp_path, change):
    """Catches weights of another shape, number format or name, and weights that are not numbers."""
    path = tmp_path / "m.safetensors"
    tensors = TENSORS[change](safetensors.torch.load_file(tiny))
    safetensors.torch.save_file(tensors, path, metadata=header(tiny)["__metadata__"])
    with pytest.raises(UserError) as error:
        load_model(path, CPU)
    text = str(error.value)
    assert str(path) in text and "\n" not in text


@pytest.mark.parametrize(
    "history",
    [
        "[]",
        "[[5, 2, 3]]",
        "[[0, 2, 3], [0, 2, 3]]",
        "[[5, 2, 3], [2, 2, 3]]",
        "[[-5, 2, 3], [-9, 2, 3]]",
        "[[1, 2, 3], [2, 2, 3]]",
        "[[0.5, 1e14, -1e14], [1e-300, 2, 3]]",
        "[[true, 1, 2], [5, 1, 1]]",
    ],
)
def test_info_of_any_history(tiny, tmp_path, cli, history):
    """Catches a chart that divides by zero or draws outside; such a file may be refused or shown, but not crash."""
    entries, data = parts(tiny)
    entries["__metadata__"]["history"] = history
    result = cli("info", "--model", craft(tmp_path / "m.safetensors", entries, data))
    assert result.status == 0 or result.is_error()


def test_texts_in_a_file_cannot_steer_the_terminal(tiny, tmp_path, cli):
    """Catches an escape sequence in a name, in the settings or in the characters that reaches the terminal raw."""
    entries, data = parts(tiny)
    nasty = "\x1b]0;x\x07\x9b2J\u202e\r\n"
    metadata = entries["__metadata__"]
    metadata["data"] = json.dumps(dict(name=nasty, sha256=nasty, characters=5))
    metadata["training"] = json.dumps({nasty: nasty})
    path = craft(tmp_path / "m.safetensors", entries, data)
    for command in (["info"], ["chat"], ["generate", "a", "-n", 1], ["eval"]):
        result = cli(*command, "--model", path)
        assert not set("\x1b\x07\x9b\u202e\r") & set(result.out + result.err)
    metadata["format_version"] = nasty
    refused(craft(path, entries, data))
