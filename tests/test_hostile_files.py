"""Files and texts that nobody should give to the program: a bounded form of tests/benchmarks/fuzz.py, and odd texts."""

import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY
from hypothesis import given, settings
from hypothesis import strategies as st

import anexagpt

sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
import fuzz

CPU = torch.device("cpu")


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Good files by kind, a place for bad ones, and a training that may be continued."""
    folder = tmp_path_factory.mktemp("good")
    files = fuzz.good_files(folder)
    options = ["train", *fuzz.SETTINGS.split(), "--seed", "2", "--data", str(folder / "text.txt")]
    trainer, _, _ = anexagpt.prepare_training(
        anexagpt.parse_options(options), None, CPU, torch.float32, anexagpt.World()
    )
    return files, folder / "case", trainer


@pytest.mark.parametrize("reader", fuzz.READERS)
@settings(max_examples=100)
@given(draw=st.randoms(use_true_random=False), data=st.data())
def test_spoilt_files(good, reader, draw, data):
    """Catches any file that ends in a traceback, a long or broken message, a hang, a great memory or a wrong model."""
    files, path, trainer = good
    _, sources, ways = fuzz.READERS[reader]
    spoil, source = data.draw(st.sampled_from(ways)), data.draw(st.sampled_from(sources))
    path.unlink(missing_ok=True)
    path.write_bytes(spoil(files[source], draw))
    fuzz.case(reader, path, trainer)


@pytest.mark.parametrize("reader", fuzz.READERS)
def test_good_files(good, reader):
    """Catches a fuzzer that is content with a reader that refuses everything."""
    files, path, trainer = good
    for source in fuzz.READERS[reader][1]:
        path.unlink(missing_ok=True)
        path.write_bytes(files[source])
        assert fuzz.case(reader, path, trainer) == "accepted"


@pytest.mark.parametrize("n, expected", [(128, "accepted"), (129, "refused"), (10**6, "refused")])
@pytest.mark.parametrize("reader", ["model", "old architecture"])
def test_many_layers(tmp_path, reader, n, expected):
    """Catches a network of a million blocks that is built before it is looked at, or slowly built."""
    path = tmp_path / "m.safetensors"
    path.write_bytes(fuzz.layers(n))
    assert fuzz.case(reader, path) == expected


@pytest.mark.parametrize("command", ["explain dog", "eval --data text.txt", "generate dog --top-p 0.9"])
def test_weights_as_large_as_allowed(cli, tiny, command):
    """Catches overflow and not-a-number where the largest weights that are let in are reckoned with."""
    model, _, story = anexagpt.load_model(tiny, CPU)
    draw = torch.Generator().manual_seed(1)
    largest = {n: torch.randn(w.shape, generator=draw).sign() * 999 for n, w in model.named_parameters()}
    anexagpt.save_file(Path("model.safetensors"), largest, story)
    Path("text.txt").write_text("the dog saw the cat and ran home " * 9)
    result = cli(*command.split())
    assert result.status == 0 and "\ufffd" not in result.out and "nan" not in result.out, result


@pytest.mark.parametrize("reader", ["model", "old architecture"])
def test_weights_that_overflow(good, reader):
    """Catches a model whose weights are numbers, but too large to reckon with, and a traceback when it is to write."""
    files, path, _ = good
    n = 8 + int.from_bytes(files["model"][:8], "little")
    for value in (3e38, -3e38, 1e20, 1e6, 1e3):
        path.unlink(missing_ok=True)
        number = torch.tensor([value]).numpy().tobytes()
        path.write_bytes(files["model"][:n] + number * ((len(files["model"]) - n) // 4))
        assert fuzz.case(reader, path) == "refused"


def test_a_huge_header(tmp_path):
    """Catches a header of 90 MB that takes minutes, or many times its size."""
    text = b'{"__metadata__":{"format_version":"1","x":"' + b"x" * 90_000_000 + b'"}}'
    path = tmp_path / "m.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    for reader in ("model", "old architecture"):
        assert fuzz.case(reader, path) == "refused"


# ---- texts -----------------------------------------------------------------------------------------------------------

CHINESE = "".join(map(chr, range(0x4E00, 0x4E00 + 4000)))
TEXTS = {  # name: bytes, encoding, and what of it the model must know
    "CRLF": (b"one two\r\nthree\r\n" * 30, "utf-8", "one\n"),
    "CR": (b"one two\rthree\r" * 30, "utf-8", "one\n"),
    "all line ends": (b"a\r\nb\nc\r\r\n\n\rd" * 30, "utf-8", "a\nb"),
    "BOM": (b"\xef\xbb\xbf" + b"one two\n" * 40, "utf-8", "one"),
    "BOM in the middle": (("one\ufefftwo\n" * 40).encode(), "utf-8", "one"),
    "UTF-16": (("one two\n" * 40).encode("utf-16"), "utf-16", "one"),
    "UTF-32, big end first": (("one two\n" * 40).encode("utf-32-be"), "utf-32-be", "one"),
    "NUL": (b"one\0two\0\0\n" * 40, "utf-8", "one\0"),
    "all of latin-1": (bytes(range(256)) * 4, "latin-1", "\x85\xe9"),
    "escape sequences": (b"\x1b[31mred\x1b]0;x\x07\x9b".replace(b"\x9b", b"\xc2\x9b") * 20, "utf-8", "\x1b[31m"),
    "right to left": (("\u05d0\u202e\u202dabc\u2067\u0627\u2069\u200f\n" * 30).encode(), "utf-8", "\u05d0\u202e"),
    "emoji": (("\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467\ufe0f\U0001f1e9\U0001f1ea" * 40).encode(), "utf-8",
              "\U0001f468\u200d"),
    "combining": (("e\u0301a\u0308o\u0323\u0302 " * 60).encode(), "utf-8", "e\u0301"),
    "line separators": (("a\u2028b\u2029c\x0bd\x0ce\x1cf\x85g" * 40).encode(), "utf-8", "a\u2028"),
    "Chinese": (CHINESE.encode(), "utf-8", CHINESE[:5]),
    "private and unassigned": (("a\ue000\U000f0000\ufdd0\uffff\U0010ffff\U000e0041" * 40).encode(), "utf-8", "a\ue000"),
    "replacement characters": (("a\ufffdb\ufffd\ufffd" * 60).encode(), "utf-8", "ab"),
    "one character again and again": (b"a" * 300, "utf-8", "a"),
    "one line end again and again": (b"\n" * 300, "utf-8", "\n"),
    "a line of 10 MB": (b"the cat saw a dog. " * 530_000, "utf-8", "the cat"),
}  # fmt: skip


@pytest.mark.parametrize("name", TEXTS)
def test_odd_texts_train_and_talk(cli, name):
    """Catches a text that ends in a traceback, a character that is lost, and one that reaches the terminal raw."""
    raw, encoding, prompt = TEXTS[name]
    Path("odd.txt").write_bytes(raw)
    options = ["--data", "odd.txt", "--encoding", encoding, *TINY, "--max-steps", 3, "--warmup-steps", 1]
    options += ["--block-size", 64, "--eval-interval", 3] if len(raw) > 1_000_000 else ["--eval-interval", 2]
    trained = cli("train", *options)
    assert trained.status == 0, trained.err
    _, tokenizer, story = anexagpt.load_model(Path("model.safetensors"), CPU)
    text = raw.decode(encoding).removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    assert set(tokenizer.characters) == set(text) | {"\ufffd"} and story.data["characters"] == len(text)
    assert tokenizer.admit(prompt) == (prompt, "")
    said = cli("chat", "--temperature", 50, "--max-new", 200, "--seed", 1, stdin=f"{prompt}\n/why\n/probs\n/tokens\n")
    assert said.status == 0 and "Traceback" not in said.err
    everything = trained.err + said.out + said.err + cli("info").out
    everything += cli("generate", "a", "--temperature", 50, "--seed", 2).out
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]", everything)
    assert not re.search("[\ud800-\udfff\U000e0000-\U000e007f]", everything)


@pytest.mark.parametrize(
    "raw, encoding, words",
    [
        (b"", "utf-8", ["0 characters"]),
        (b"\xef\xbb\xbf", "utf-8", ["0 characters"]),
        (b"\r\n" * 5, "utf-8", ["5 characters"]),
        (b"ab\xed\xa0\x80" * 100, "utf-8", ["0xed", "offset 2"]),  # half of a surrogate pair
        (b"a\0\x00\xd8" * 100, "utf-16-le", ["utf-16-le"]),
        (b"\\ud800 " * 100, "raw_unicode_escape", ["--encoding"]),
        (b"\xc3" * 300, "utf-8", ["0xc3", "offset 0"]),
        (b"a" * 400 + b"\xe4\xb8", "utf-8", ["0xe4", "offset 400"]),  # cut in the middle of a character
    ],
)
def test_texts_that_are_none(cli, raw, encoding, words):
    """Catches a traceback, or a training on half a text."""
    Path("odd.txt").write_bytes(raw)
    result = cli("train", "--data", "odd.txt", "--encoding", encoding, *TINY, "--max-steps", 3)
    assert result.is_error("odd.txt", *words)


@pytest.mark.parametrize(
    "prompt", [b"\xff\xfe", b"\xed\xa0\x80", b"\0", b"\x1b[2J", b"\r", "\u202e\ufeff".encode()], ids=repr
)
def test_odd_prompts(tiny, monkeypatch, capsys, prompt):
    """Catches a prompt that ends the talk, or that comes back to the terminal as it went in."""
    text = prompt.decode(errors="replace")
    session = anexagpt.Session(*anexagpt.load_model(tiny, CPU), anexagpt.SampleConfig(max_new=5))
    for line in (text, "the" + text, f"/probs the{text}", f"/tokens the{text}", f"/set stop {text}", f"/help {text}"):
        try:
            session.respond(line)
        except anexagpt.UserError as error:
            assert anexagpt.printable(str(error)).isprintable()
    said = capsys.readouterr()
    assert not re.search("[\x00-\x08\x0b-\x1a\x1c-\x1f\x7f-\x9f\u202e\ufeff]", said.out + said.err)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-99"])
def test_built_in_texts_have_their_own_encoding(cli, encoding):
    """Catches --encoding that turns Sherlock's quotation marks into something else."""
    Path("data").mkdir()
    text = "\u201cCaf\u00e9\u201d " * 300 + anexagpt.SOURCES["sherlock"].ending + "\n"
    Path("data/sherlock.txt").write_text(text, encoding="utf-8")
    cli("train", "--encoding", encoding, *TINY, "--max-steps", 2, "--quiet")
    story = anexagpt.open_file(Path("model.safetensors"))[0]
    assert set(story.characters) == set(text) | {"\ufffd"} and story.data["name"] == "sherlock"
