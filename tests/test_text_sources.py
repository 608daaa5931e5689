"""Text sources: files, folders, standard input, built-in texts and URLs, against texts written by
hand. What was read is known by its SHA-256 in the model file; servers are on the loopback."""

import dataclasses
import errno
import gzip
import hashlib
import io
import os
import re
import shutil
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import requests
from conftest import TINY, Answer, interrupt_at, prose
from test_faults import Fork, failed, names, weights
from test_model_file import craft, entry

import anexagpt

SMALL = ["--n-layer", 1, "--n-head", 1, "--n-embd", 4, "--block-size", 2, "--batch-size", 2]
SMALL += ["--device", "cpu", "--dtype", "float32", "--max-steps", 1, "--quiet", "--restart"]
SHERLOCK_END = "I believe that she has met with\r\nconsiderable success."
BOOK = "\n".join(["A book.", prose(300), SHERLOCK_END, ""]).encode()


@pytest.fixture
def read(cli):
    """Data set entry of the model that a run of one step with these options writes."""

    def run(*options, stdin: str = "") -> dict:
        result = cli("train", *SMALL, *options, stdin=stdin)
        assert result.status == 0, result
        return anexagpt.load("model.safetensors").metadata.data._asdict()

    return run


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def mirrors(monkeypatch, name: str, *urls: str) -> None:
    record = anexagpt.BUILT_IN[name]._replace(mirrors=urls)
    monkeypatch.setitem(anexagpt.BUILT_IN, name, record)


# ---- bytes to text -------------------------------------------------------------------------------

MARKED = "*** START OF THE PROJECT GUTENBERG EBOOK is a marker.\n  \u201cIndented\u201d\u2003\n\n"
CHINESE = "".join(map(chr, range(0x4E00, 0x4E00 + 3000)))
ODD = "a\u2028b\x0bc\x0cd\x85e\ufdd0\uffff\U0010ffff\U0001f468\u200d\U0001f467\ufe0f\ufffd" * 9
TEXTS = {  # bytes, encoding, the text that they are
    "CRLF and CR": (b"one\r\ntwo\rthree\n\r\n" * 9, "utf-8", "one\ntwo\nthree\n\n" * 9),
    "BOM": (b"\xef\xbb\xbf" + b"one two\n" * 9, "utf-8", "one two\n" * 9),
    "UTF-16": (("one two\r\n" * 9).encode("utf-16"), "utf-16", "one two\n" * 9),
    "UTF-16 without BOM": (("one two\n" * 9).encode("utf-16-le"), "utf-16-le", "one two\n" * 9),
    "cp1252": (b"caf\xe9 \x93noir\x94\r\n" * 9, "cp1252", "caf\xe9 \u201cnoir\u201d\n" * 9),
    "spaces and a marker": (MARKED.encode(), "utf-8", MARKED),
    "odd characters": (ODD.encode(), "utf-8", ODD),
    "3,000 characters": (CHINESE.encode(), "utf-8", CHINESE),
}  # fmt: skip


@pytest.mark.parametrize("name", TEXTS)
def test_texts(cli, read, name):
    """Catches characters that Windows adds, and any that is lost, stripped or wrongly decoded."""
    raw, encoding, text = TEXTS[name]
    Path("x.txt").write_bytes(raw)
    data = read("--data", "x.txt", "--encoding", encoding)
    assert data == dict(names=["x.txt"], sha256=digest(text), characters=len(text))
    assert anexagpt.Corpus.from_text(text).info[1:] == (digest(text), len(text))
    characters = anexagpt.load("model.safetensors").tokenizer.characters
    assert set(characters) == set(text) | {"\ufffd"} and list(characters[1:]) == sorted(
        characters[1:]
    )
    assert cli("generate", text[0], "--temperature", 50, "--seed", 1).status == 0


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "gb18030"])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_pieces(read, monkeypatch, encoding, size):
    """Catches a character or a line end that is lost or doubled where pieces of a file meet."""
    text = "a\ufeff\r\n\rb\u00e9\r\U0001f600\n" * 6
    Path("x.txt").write_bytes(text.encode(encoding))
    monkeypatch.setattr(anexagpt, "PIECE", size)
    expected = text.replace("\r\n", "\n").replace("\r", "\n")
    assert read("--data", "x.txt", "--encoding", encoding)["sha256"] == digest(expected)


@pytest.mark.parametrize("the", ["THE", "THIS"])
@pytest.mark.parametrize("space", ["", " "])
def test_gutenberg_license(read, the, space):
    """Catches markers in the spelling of another decade, and a license that is learnt by heart."""
    marker = f"***{space}%s OF {the} PROJECT GUTENBERG EBOOK A\nB ***\n"
    book = f"It was a dark and stormy night; {marker % 'END'}\n\nThe end."  # quotes one
    article = "the " * len(space)
    last = f"\r\n\r\nEnd of {article}Project Gutenberg's A B\r\n" * (the == "THIS")
    text = "License\n" + marker % "START" + f"\n\n{book}\n\n{last}\n" + marker % "END" + "More\n"
    Path("x.txt").write_text(text, newline="")
    assert read("--data", "x.txt")["sha256"] == digest(book + "\n")


def test_blanks_take_linear_time(cli):
    """Catches a search for the license that takes minutes for a text with long white space."""
    start, end = (f"*** {w} OF THE PROJECT GUTENBERG EBOOK" for w in ("START", "END"))
    for text in (" \n" * 2_000_000, f"{start} X ***{' ' * 2_000_000}{end}{' ' * 2_000_000}",
                 f"{start} X ***\n{end} " * 30_000):  # fmt: skip
        Path("x.txt").write_text(text)
        started = time.process_time()
        assert cli("train", *SMALL, "--data", "x.txt", "--size", "small").status == 0
        assert time.process_time() - started < 10


PDF, DOC = b"%PDF-1.7\n%\xe2\xe3\n" + b"text " * 99, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + b"x" * 99
BINARY = (PDF, DOC, b"PK\3\4\0" * 99, gzip.compress(b"text"), b"\x89PNG\r\n", b"\xff\xd8\xff\xe0")
NOT_TEXT = [
    *((x, "utf-8", "as plain text") for x in BINARY),
    (PDF, "latin-1", "PDF"),  # in which all bytes are characters
    (b"one\0two" * 99, "latin-1", "plain text"),
    (("one two\n" * 99).encode("utf-16-le"), "utf-8", "utf-16"),
    (("one two\n" * 99).encode("utf-16"), "utf-8", "--encoding"),
    (b"caf\xe9 noir" * 9, "utf-8", "--encoding"),
    (b"a" * 99 + b"\xe4\xb8", "utf-8", "--encoding"),  # ends within a character
    (b"\\ud800 " * 99, "unicode_escape", "--encoding"),
    (b"a\\x zz" * 99, "unicode_escape", "byte 0x5c in line 1"),
    (b"abc" * 99, "utf-99", "--encoding utf-99"),
    ("\ufffd".encode() * 999, "utf-8", "mostly U+FFFD"),
    (b"a" * 900 + "\ufffd".encode() * 100, "utf-8", "U+FFFD"),  # the last tenth
    (b"", "utf-8", "0 characters"),
]


@pytest.mark.parametrize("raw, encoding, word", NOT_TEXT, ids=lambda x: ascii(x)[:16])
def test_not_text(cli, raw, encoding, word):
    """Catches a traceback, a run on something else than text, and advice that does not exist."""
    Path("x.txt").write_bytes(raw)
    result = cli("train", *SMALL, "--data", "x.txt", "--encoding", encoding)
    assert result.is_error(word) and ("x.txt" in result.err or "unknown" in result.err)
    options = cli("train", "--help").out
    assert all(option in options for option in re.findall("--[a-z-]+", result.err))
    if raw in BINARY:
        assert cli("train", *SMALL, "--data", "x.txt", "--replace-errors").is_error(word)
    assert names() == {"x.txt"}


def test_eval_reads_as_train_does(cli):
    """Catches --encoding and --replace-errors that eval, or the second run, ignores."""
    Path("x.txt").write_bytes(("caf\u00e9 noir\n" * 40).encode("cp1252"))
    assert cli("train", *SMALL, "--data", "x.txt", "--encoding", "cp1252").status == 0
    assert cli("eval").is_error("x.txt", "--encoding")
    assert "validation part" in cli("eval", "--encoding", "cp1252").out
    result = cli("eval", "--replace-errors")
    assert "whole text" in result.out and "does not know them: 40)" in result.err
    result = cli("run", "./x.txt", "--encoding", "cp1252", "-n", 5, stdin="noir\n")
    assert result.status == 0 and len(result.out) > 5, result


# ---- files, folders, standard input --------------------------------------------------------------


def test_several_texts(cli, read):
    """Catches texts that run into one another, names that are taken apart, and a list of names
    that does not find its texts again."""
    Path("sub.txt/folder.md").mkdir(parents=True)
    for name, text in {"a + b.txt": "one", "e + f.txt": "", "c d.txt": "two" * 20}.items():
        Path(name).write_text(text)
    Path("sub.txt", ".hidden.txt").write_text("no")
    for name, text in {"b.md": "B" * 20, "a.txt": "a\r\n", "C.txt": "C", "d.csv": "no"}.items():
        Path("sub.txt", name).write_text(text, newline="")
    listed = ["a + b.txt", "e + f.txt", "c d.txt", "sub.txt", "-"]
    text = f"one\n{'two' * 20}\nC\na\n{'B' * 20}\nstdin"
    data = read("--data", *listed, stdin="stdin")
    listed[4] = "standard input"
    assert data == dict(names=listed, sha256=digest(text), characters=len(text))
    with interrupt_at(1):
        assert cli("train", "--data", *listed[:4], *SMALL, "--max-steps", 4).status == 130
    assert cli("train").status == 0 and "over" in cli("eval").out
    assert cli("train", *SMALL, "--data", "c d.txt", "no + c d.txt").is_error("no + c d.txt")
    os.mkfifo("pipe")
    writer = threading.Thread(target=Path("pipe").write_text, args=("piped" * 20,))
    writer.start()
    assert read("--data", "pipe")["sha256"] == digest("piped" * 20)
    writer.join()
    result = cli("train", *SMALL, "sub.txt", "sub.txt/../sub.txt/b.md")
    assert result.err.count("b.md is given more than once") == 1
    assert read("--data", "c*.txt")["sha256"] == digest("two" * 20)  # as cmd.exe passes it
    Path("empty").mkdir()
    for name, word in {"/dev/zero": "zero", "empty": "*.txt"}.items():
        assert cli("train", "--data", name, *SMALL).is_error(word)
    assert cli("train", *SMALL, "--data", "sherlok").is_error("sherlok", *anexagpt.BUILT_IN)


@pytest.mark.parametrize(
    "name", ["\u200eChat.txt", "a\nb.txt", os.fsdecode(b"caf\xe9.txt"), "x[/y].txt"]
)
def test_names_that_are_odd(cli, name):
    """Catches a name that is changed where it is stored, so that its run cannot be resumed, and
    one that steers the terminal where it is shown."""
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_text(prose(300))
    options = [*TINY, "--max-steps", 4]
    with interrupt_at(2):
        stopped = cli("train", "--data", name, *options)
    results = stopped, cli("train", *options), cli("eval"), cli("info")
    assert [result.status for result in results] == [130, 0, 0, 0], results
    assert anexagpt.load("model.safetensors").metadata.data.names == [name]
    assert not re.search("[\u200e\udce9]|a\nb", "".join(r.out + r.err for r in results))


def test_what_decides_is_the_text(cli):
    """Catches a run that is refused for another spelling of a name, and one that goes on with
    another text under the same name."""
    Path("t.txt").write_text(prose(300))
    Path("copy.txt").write_text(prose(300))
    for n, name in enumerate(["t.txt", "./t.txt", str(Path("t.txt").resolve()), "copy.txt"], 1):
        with interrupt_at(1):
            result = cli("train", "--data", name, *TINY, "--max-steps", 9)
        assert result.status == 130 and f"step {n}" in result.err, result
    Path("t.txt").write_text(prose(301))
    assert cli("train", "--data", "t.txt", *TINY, "--max-steps", 9).is_error("t.txt", "--restart")
    assert cli("train", *TINY, "--max-steps", 9).status == 0  # copy.txt is the run's


@pytest.mark.parametrize("name", ["http://127.0.0.1:9/x", "//pc/x", "\\\\pc\\x", "/dev/zero", "-"])
def test_a_file_cannot_send_the_program_somewhere(cli, tiny, name):
    """Catches a stranger's model that makes the program ask an address, or read without end."""
    path = craft(tiny, dict(data=entry(tiny, "data") | dict(names=[name])))
    assert cli("eval", "--model", path).is_error(name)


# ---- long texts ----------------------------------------------------------------------------------


def test_long_text(cli, monkeypatch):
    """Catches a run from a file of ids that differs from one from the memory, a file that stays in
    data/, and of two processes one that fails."""
    Path("x.txt").write_text(prose(400) + "".join(map(chr, range(0x4E00, 0x4F00))))  # 16-bit ids
    options = ["--data", "x.txt", "--quiet", *TINY, "--max-steps", 4]
    assert cli("train", *options).status == 0
    expected = weights()
    monkeypatch.setattr(anexagpt, "LONG_TEXT", 1)
    monkeypatch.setattr(anexagpt, "PIECE", 1 << 10)
    runs = [Fork("train", *options, "--out", f"{i}.safetensors") for i in range(2)]
    assert [run.result().status for run in runs] == [0, 0]
    assert weights(Path("0.safetensors")) == weights(Path("1.safetensors")) == expected
    assert not any(name.startswith("data") for name in names())


# ---- downloads -----------------------------------------------------------------------------------


def test_built_in_texts(read, server, monkeypatch, sherlock, shakespeare):
    """Catches a copy that is not what was served, a license or line ends of Windows left in it, a
    second run that asks again, a damaged copy that is trusted, and an --encoding that is not
    meant for these texts."""
    page = server.page("/1", Answer(sherlock)), server.page("/2", Answer(shakespeare))
    mirrors(monkeypatch, "sherlock", page[0])
    mirrors(monkeypatch, "shakespeare", page[1])
    raw = sherlock.decode("utf-8").replace("\r\n", "\n")
    start, end = raw.index("***", raw.index("*** START OF") + 3) + 3, raw.index("*** END OF")
    text = raw[start : raw.rindex("End of the Project Gutenberg", 0, end)].strip() + "\n"
    Path("data").mkdir()
    mine, half = Path("data/sherlock.txt"), sherlock[: len(sherlock) // 2]
    mine.write_bytes(b"mine")
    Path("data/anexa-sherlock.txt").write_bytes(half)
    for options in ([], ["--data", "sherlock", "--encoding", "utf-16"]):
        data = read(*options)
        assert data["names"] == ["sherlock"] and data["sha256"] == digest(text)
    assert Path("data/anexa-sherlock.txt").read_bytes() == sherlock and mine.read_bytes() == b"mine"
    assert read("--data", "shakespeare")["sha256"] == hashlib.sha256(shakespeare).hexdigest()
    assert server.asked == ["/1", "/2"]
    Path("data/anexa-sherlock.txt").write_bytes(half)  # cut off later
    assert read("--data", "sherlock") == data and server.asked == ["/1", "/2", "/1"]


BROKEN = {
    "error page": Answer(BOOK, 500),
    "half of it": Answer(BOOK[: len(BOOK) // 2]),
    "nothing": Answer(b""),
    "cut off": Answer(BOOK, length=len(BOOK) + 1000),
    "too long": Answer(BOOK + b"x" * 400_000),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_downloads(cli, read, server, monkeypatch, name):
    """Catches an error page or half a book that becomes the text, a file of it that stays in
    data/, and a search that ends at the first mirror."""
    monkeypatch.setattr(anexagpt, "MAX_DOWNLOAD", 300_000)
    bad = server.page("/x", BROKEN[name])
    mirrors(monkeypatch, "sherlock", bad, bad)
    line = failed(cli("train", "--data", "sherlock", *SMALL), "--data sherlock", "127.0.0.1")
    assert line.isprintable() and len(line) < 600 and names() == set()
    mirrors(monkeypatch, "sherlock", bad, server.page("/good", Answer(BOOK)))
    sha256 = digest(BOOK.decode().replace("\r\n", "\n"))
    assert read("--data", "sherlock")["sha256"] == sha256
    assert Path("data/anexa-sherlock.txt").read_bytes() == BOOK
    # A folder of the user's own texts, which happens to be the one for downloads.
    assert read("--data", "data")["sha256"] == sha256  # there is nothing else yet
    Path("data/diary.txt").write_text("mine" * 20)
    Path("data/anexa-notes.txt").write_text("too" * 20)
    assert read("--data", "data")["sha256"] == digest("too" * 20 + "\n" + "mine" * 20)


def test_no_answer(cli, server, monkeypatch):
    """Catches minutes of silence where a server never answers: the first line comes before, and
    after the mirrors the loud fallback."""
    mirrors(monkeypatch, "sherlock", *[server.page("/x", Answer(silent=True))] * 2)
    monkeypatch.setattr(anexagpt, "TIMEOUT", (0.5, 0.5))
    started = time.monotonic()
    result = cli("train", *SMALL)
    assert time.monotonic() - started < 15 and result.status == 0
    lines = result.err.splitlines()
    assert "Downloading" in lines[0] and "127.0.0.1" in lines[0]
    assert sum("NOTE" in line for line in lines) == 2 and "python-docs" in result.err
    assert anexagpt.load("model.safetensors").metadata.data.names == ["python-docs"]


def test_urls(read, cli, server, dead):
    """Catches two addresses that share a copy, a copy whose name leaves its folder, and passwords
    on the screen."""
    pages = ["/a/t.txt", "/b/t.txt", "/t.txt?x=../../y", "/..%2F..%2Fetc", "/" + "n" * 300]
    for i, page in enumerate(pages):
        url = server.page(page, Answer(b"text %d\r\n" % i * 9))
        for _ in range(2):
            assert read("--data", url)["sha256"] == digest(f"text {i}\n" * 9)
    copies = {name for name in names() if not name.startswith("model.")}
    assert len(copies) == 2 * len(server.asked) == 10  # each with its SHA-256
    assert all(re.fullmatch(r"data.[\w.-]+", name) for name in copies)
    private = dead.replace("//", "//me:secret@") + "/x?secret"
    for url in (private, "http://[", "http://\udcff/", "http://a b/"):
        result = cli("train", *SMALL, "--data", url)
        assert "--data" in failed(result) and "secret" not in result.err


def test_a_long_download_is_checked_in_little_memory(tmp_path):
    """Catches a check that reads all of a text, which may be larger than memory."""
    path = tmp_path / "x.txt"
    path.write_bytes(b"the dog saw\n" * 500_000 + b"END OF THE BOOK\n")
    tracemalloc.start()
    anexagpt.check_download(path, "http://localhost/x.txt", "text/plain", "END OF THE BOOK")
    assert tracemalloc.get_traced_memory()[1] < 3_000_000
    tracemalloc.stop()


def test_two_writers(cli, server, monkeypatch):
    """Catches a download that publishes, or removes, the half file of another process with the
    same process id: in another container, on a shared folder."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    body = BOOK[:300]
    url = server.page("/x.txt", Answer(body, drip=0.002))
    runs = []
    for i in range(3):
        runs.append(Fork("train", "--data", url, *SMALL, "--out", f"{i}.safetensors"))
        time.sleep(0.1)
    assert [run.result().status for run in runs] == [0, 0, 0]
    assert len(server.asked) == 3  # none has waited for the copy of another
    found = {anexagpt.load(f"{i}.safetensors").metadata.data.sha256 for i in range(3)}
    assert found == {digest(body.decode().replace("\r\n", "\n"))}
    assert len([name for name in names() if name.startswith("data")]) == 2


# ---- downloads and texts that are not what they seem ---------------------------------------------

PAGES = {  # status 200, and not a text
    "login": Answer(
        b"\xef\xbb\xbf \n<!DOCTYPE html><title>Free WLAN</title>" + BOOK, type="text/plain"
    ),
    "viewer": Answer(BOOK, type="text/html; charset=utf-8"),
    "old": Answer(b"<HTML><body>" + BOOK),
    "comment": Answer(b"<!-- hotel -->\n<html><body>" + BOOK),
    "XHTML": Answer(b"<?xml version='1.0'?>\n<!DOCTYPE html PUBLIC ''>" + BOOK),
    "capitals": Answer(BOOK, type="Text/HTML"),
}


@pytest.mark.parametrize("name", PAGES)
def test_web_page_in_place_of_a_text(cli, read, server, monkeypatch, name):
    """Catches a hotel's login page, or a viewer's page, that is trained on and stored."""
    page = server.page("/a.txt", PAGES[name])
    mirrors(monkeypatch, "sherlock", page)
    for wanted in ("sherlock", page):
        assert "web page" in failed(cli("train", "--data", wanted, *SMALL)) and names() == set()
    named = server.page("/a.html", PAGES[name])  # the user wants it
    assert read("--data", named)["characters"] > 200


def test_stored_copies(read, cli, server):
    """Catches a stored copy that is used although it was changed, and one that no message names."""
    url = server.page("/a.txt", Answer(b"first text\n" * 20), Answer(b"second\n" * 40))
    assert read("--data", url)["sha256"] == digest("first text\n" * 20)
    (copy,) = Path("data").glob("*.txt")
    assert str(copy) in cli("train", *SMALL, "--data", url).err and len(server.asked) == 1
    copy.unlink()  # as the message says
    assert read("--data", url)["sha256"] == digest("second\n" * 40)
    copy.write_bytes(copy.read_bytes()[:99])
    assert read("--data", url)["sha256"] == digest("second\n" * 40) and len(server.asked) == 3


@pytest.mark.parametrize("is_link", [False, True])
def test_stored_copy_that_somebody_changed(read, server, is_link):
    """Catches a user's edits, or the file that a link leads to, replaced by a new download."""
    url = server.page("/a.txt", Answer(b"a text\n" * 40))
    read("--data", url)
    (copy,) = Path("data").glob("*.txt")
    mine = copy
    if is_link:
        mine = Path("mine.txt")
        copy.unlink()
        copy.symlink_to(mine.absolute())
    mine.write_text("my edits")
    assert read("--data", url)["sha256"] == digest("a text\n" * 40)
    kept = mine if is_link else copy.with_stem(f"{copy.stem}.old")
    assert kept.read_text() == "my edits" and not copy.is_symlink()


def test_file_called_data(read, server, monkeypatch, tmp_path):
    """Catches "File exists" where the folder for downloads cannot be, since a file is there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Path("data").write_text("mine")
    assert read("--data", server.page("/a.txt", Answer(b"a text\n" * 40)))["characters"] == 280
    assert Path("data").read_text() == "mine"


SLOW = {
    "text": Answer(b"text " * 200, drip=0.05),
    "header": Answer(b"text " * 200, drip=0.05, dripped="X-Long: " + "x" * 300),
    "redirect": Answer(b"moved " * 200, status=302, location="/a.txt", drip=0.05),
}


@pytest.mark.parametrize("name", SLOW)
def test_slow_server(cli, server, monkeypatch, name):
    """Catches a server that sends a byte now and then, and holds the program for ever."""
    monkeypatch.setattr(anexagpt, "TIMEOUT", (0.2, 0.2))
    url = server.page("/a.txt", SLOW[name])
    started = time.monotonic()
    assert "bytes per second" in failed(cli("train", "--data", url, *SMALL))
    assert time.monotonic() - started < 10 and names() == set()


def test_redirect(read, server):
    """Catches a redirect that is not followed, in one piece and within the metered connection."""
    server.page("/new.txt", Answer(b"moved here\n" * 20))
    url = server.page("/a.txt", Answer(b"moved", status=302, location="/new.txt"))
    assert read("--data", url)["characters"] == 220


@pytest.mark.parametrize("length", ["9" * 400, "4000 bytes", "-5", "0x10", ""])
def test_odd_content_length(cli, server, monkeypatch, length):
    """Catches a traceback or a riddle for a header that is no number."""
    url = server.page("/a.txt", Answer(BOOK, length=length))
    result = cli("train", "--data", url, *SMALL)
    assert result.status == (2 if length.startswith("9") else 0), result
    assert result.status == 0 or failed(result, "127.0.0.1")


def test_a_model_is_opened_without_its_text(cli, server):
    """Catches a finished model that needs a network, since its text is an address."""
    url = server.page("/a.txt", Answer(prose(100).encode()), Answer(b"gone", 404))
    options = ["--data", url, *SMALL[:-1]]
    assert cli("run", *options).status == 0
    shutil.rmtree("data")
    result = cli("run", *options, "-n", 5, stdin="a cat\n")
    assert result.status == 0 and len(result.out) > 5 and "NOTE: --data" in result.err, result


def test_certificates_and_proxies(cli, server, monkeypatch):
    """Catches "no network" for what REQUESTS_CA_BUNDLE or HTTPS_PROXY would mend."""
    port = server.address.rpartition(":")[2]
    for error, words in (
        (
            anexagpt.requests.exceptions.SSLError(
                "[SSL: CERTIFICATE_VERIFY_FAILED] https://me:secret@x"
            ),
            "REQUESTS_CA_BUNDLE",
        ),
        (anexagpt.requests.exceptions.SSLError("[SSL: WRONG_VERSION_NUMBER]"), "try http://"),
        (anexagpt.requests.exceptions.ProxyError("https://me:secret@x"), "HTTPS_PROXY"),
        (anexagpt.requests.exceptions.InvalidSchema("socks5://me:secret@x"), "ALL_PROXY"),
        (anexagpt.requests.exceptions.InvalidURL("http://me:secret@x:y"), "ALL_PROXY"),
        (OSError("no bundle at /x.pem"), "/x.pem; correct REQUESTS_CA_BUNDLE"),
    ):

        def refuse(*_, error=error, **options):
            raise error

        monkeypatch.setattr(anexagpt.requests.Session, "get", refuse)
        result = cli("train", "--data", f"http://127.0.0.1:{port}/x", *SMALL)
        assert words in failed(result) and "secret" not in result.err


@pytest.mark.parametrize("answer, words", [
    (Answer(gzip.compress(BOOK), dripped="Content-Encoding: gzip"), "compressed (gzip)"),
    (Answer(b"", dripped="Content-Encoding: none"), "empty"),
])  # fmt: skip
def test_answers_without_a_text(cli, server, answer, words):
    """Catches what is no text, and is stored as a good copy that every later run takes."""
    url = server.page("/a.txt", answer, Answer(BOOK))
    assert failed(cli("train", "--data", url, *SMALL), words)
    assert cli("train", "--data", url, *SMALL).status == 0


def test_control_characters_of_a_server(server):
    """Catches an error of the library that acts on the terminal where Python prints it."""
    answer = Answer(BOOK, dripped="Content-Encoding: \x1b]0;x\x07gzip")
    with pytest.raises(anexagpt.UserError, match=r"\\x1b\]0;x\\x07gzip"):
        anexagpt.train(server.page("/a.txt", answer))


def test_same_address_with_another_query(cli, server):
    """Catches a second text that is not noticed, since its name without the query is the same."""
    urls = [server.page(f"/get?id={i}", Answer(prose(100 + i).encode())) for i in (1, 2)]
    options = SMALL[:-1]
    assert cli("run", "--data", urls[0], *options).status == 0
    assert cli("run", "--data", urls[0], *options).status == 0
    urls.append(server.page("/get", Answer(prose(200).encode())))
    for url in urls[1:]:
        assert failed(cli("run", "--data", url, *options), "already holds a model")


def test_names_that_the_shell_did_not_expand(cli, tmp_path, monkeypatch):
    """Catches a text named with ~ or * that eval, or a resumed run, does not find again."""
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("a.tex").write_text(prose(100))
    for name in ("~/a.tex", "*.tex", "~/*.tex"):
        assert cli("train", f"--data={name}", *SMALL).status == 0
        assert cli("eval").status == 0
    Path("a.tex").unlink()
    assert cli("eval").is_error("text of the model, ~/*.tex, is not here")
    model = anexagpt.load("model.safetensors")
    data = model.metadata.data._replace(names=["x\0/*"])
    model.metadata = dataclasses.replace(model.metadata, data=data)
    model.save("model.safetensors")
    assert cli("eval").is_error("text of the model", "is not here")


def test_names_of_very_many_files(cli, monkeypatch):
    """Catches a model that cannot be opened, since the names of its texts fill its header."""
    monkeypatch.setattr(anexagpt, "MAX_NAMES", 100)
    for i in range(9):
        Path(f"text{i}.txt").write_text(prose(100))
    names = [f"text{i}.txt" for i in range(9)]
    assert cli("train", "--data", *names, *SMALL).is_error("room for 100")
    assert cli("train", "--data", *names[:5], *SMALL).status == 0


def test_no_room_for_a_long_text(cli, monkeypatch):
    """Catches a full disk that is not named, where a long text needs a temporary file."""
    full = open("/dev/full", "wb")  # noqa: SIM115
    monkeypatch.setattr(anexagpt.tempfile, "TemporaryFile", lambda dir: full)
    monkeypatch.setattr(anexagpt, "LONG_TEXT", 1)
    Path("a.txt").write_text(prose(9_000))
    assert cli("train", "a.txt", *SMALL).is_error(
        "ids of the text cannot be stored", "free up space"
    )


def test_no_room_for_a_download(cli, monkeypatch):
    """Catches a full disk after which another text is used."""

    def fetch(url, path, ending):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(anexagpt, "fetch", fetch)
    result = cli("train", *SMALL)
    assert result.status == 2 and "python-docs" not in result.err
    assert "cannot be stored (No space left on device); free up space" in result.err


def test_secrets_of_an_address(cli, server):
    """Catches a password or a query in the model file, in a message, in info or in a chat."""
    address = server.page("/a.txt?token=hidden", Answer(prose(100).encode()))
    url = address.replace("//", "//me:secret@")
    results = [cli("train", "--data", url, *SMALL[:-1])]
    results += [cli("info"), cli("chat"), cli("info", "--json"), cli("train"), cli("eval")]
    results.append(cli("run", "--data", url, *SMALL[:-1]))
    shown = "".join(result.out + result.err for result in results)
    for secret in ("secret", "hidden", "token", "me:"):
        assert secret not in shown, shown
        assert secret.encode() not in Path("model.safetensors").read_bytes()
    assert "127.0.0.1" in cli("info").out and "/a.txt" in cli("info").out


@pytest.mark.parametrize(
    "url", ["ftp://me:secret@x/a.txt", "https:/me:secret@x/a.txt?token=hidden",
            "http://me:sec/ret@x/a.txt", "http://me:sec#ret@x/a.txt", "s3://me:secret@x/a.txt"],
)  # fmt: skip
def test_secrets_of_an_address_that_is_none(cli, url):
    """Catches a password in the message about an address that cannot be read, or is mistyped."""
    model = url.replace(".txt", ".safetensors")
    commands = [["train", *SMALL, "--data", url], ["info", model], ["chat", model]]
    for command in [*commands, ["train", *SMALL, "--init", model]]:
        result = cli(*command)
        assert "Traceback" not in result.err and result.status == 2
        assert not re.search("secret|ret@|:sec|hidden", result.err), result


@pytest.mark.parametrize("address", ["https://127.0.0.1:1", "http://[::1]:9/x"])
def test_name_of_an_address(cli, address):
    """Catches an address that is hidden without cause, and a colon that goes with it."""
    url = address.replace("//", "//me:secret@")
    assert f"--data {address}: cannot be downloaded" in failed(cli("train", "--data", url, *SMALL))
    assert anexagpt.hide_secrets(f"'{url}?x': a, ({url}), {url}.") == (
        f"'{address}': a, ({address}), {address}."
    )


THREE_KINGDOMS = """\
话说天下大势，分久必合，合久必分。周末七国分争，并入于秦。及秦灭之后，楚、汉分争，又并入于汉。
汉朝自高祖斩白蛇而起义，一统天下，后来光武中兴，传至献帝，遂分为三国。
"""
PUSHKIN = """\
У лукоморья дуб зелёный; златая цепь на дубе том:
и днём и ночью кот учёный всё ходит по цепи кругом.
"""
ITALIAN = "Perch\u00e9 \u00e8 cos\u00ec? Pi\u00f9 tardi andr\u00f2 in citt\u00e0. " * 9
GERMAN = "Zw\u00f6lf Boxk\u00e4mpfer jagen Viktor \u00fcber den gro\u00dfen Deich. " * 9
QUOTED = "\u201cMy dear fellow,\u201d he said, \u201cthe caf\u00e9 is closed.\u201d\n" * 9
HUNGARIAN = "\u00c1rv\u00edzt\u0171r\u0151 t\u00fck\u00f6rf\u00far\u00f3g\u00e9p. " * 9
SPOILT = {  # bytes, encoding, what the message says
    b"one\ntwo\nth\xffree\n" * 9: ("utf-8", ["byte 0xff in line 3", r"near 'th\xffree\n'"]),
    b"one\ntwo\0\n" * 9: ("utf-8", ["byte 0x00 in line 2"]),
    THREE_KINGDOMS.encode("gb18030"): ("utf-8", ["--encoding gb"]),
    PUSHKIN.encode("cp1251"): ("utf-8", ["--encoding cp1251"]),
    **{
        text.encode("cp1252"): ("utf-8", ["--encoding cp1252 or --encoding cp1250"])
        for text in (ITALIAN, GERMAN, QUOTED)
    },
    HUNGARIAN.encode("cp1250"): ("utf-8", ["--encoding cp1250"]),
}


@pytest.mark.parametrize("raw", SPOILT, ids=lambda raw: ascii(raw[:12]))
def test_which_byte_is_not_text(cli, read, raw):
    """Catches a message without the place, advice for another encoding, and no way to go on."""
    encoding, words = SPOILT[raw]
    Path("x.txt").write_bytes(raw)
    command = ["train", *SMALL, "--data", "x.txt", "--encoding", encoding]
    assert cli(*command).is_error("x.txt", *words, "--replace-errors")
    result = cli(*command, "--replace-errors")
    text = raw.decode(encoding, "replace").replace("\0", "\ufffd")
    if text.count("\ufffd") < 20:
        assert result.status == 0 and f"{text.count(chr(0xFFFD))} characters" in result.err
        assert anexagpt.load("model.safetensors").metadata.data.sha256 == digest(text)


ADVICE = [  # bytes, encoding, what the message says
    (PUSHKIN.encode() + b"th\xffree", "utf-8", ["byte 0xff in line 3", "save it as plain text"]),
    (
        "v\u00e0 \u201cngo\u1eb7c k\u00e9p\u201d n\u1eefa\n".encode(),
        "gb18030",
        ["--encoding utf-8"],
    ),
    (b"one", "undefined", ["unknown"]),
    (b"one", "utf-16", ["undecodable"]),
    ("one\ntwo \0 three".encode("utf-16"), "utf-16", ["line 2", r"two \x00 three", "save it"]),
    ("one\ntwo".encode("utf-16") + b"\0\xd8\n\0", "utf-16", ["line 2", "save it"]),
]


@pytest.mark.parametrize("raw, encoding, words", ADVICE, ids=lambda x: ascii(x)[:16])
def test_advice_for_what_is_not_text(cli, raw, encoding, words):
    """Catches a wrong place in UTF-16, and advice to take the encoding that was given, or another
    one for a text with one spoilt byte."""
    Path("x.txt").write_bytes(raw)
    assert cli("train", *SMALL, "--data", "x.txt", "--encoding", encoding).is_error(*words)


def test_two_data_options(read):
    """Catches the first of two --data options that is dropped without a word."""
    for name in ("a.txt", "b.txt"):
        Path(name).write_text(name * 20)
    assert read("--data", "a.txt", "--data", "b.txt")["names"] == ["a.txt", "b.txt"]


def test_file_with_the_name_of_a_built_in_text(cli, server, monkeypatch):
    """Catches a user's file that loses silently."""
    mirrors(
        monkeypatch,
        "shakespeare",
        server.page("/x", Answer(b"x" * 300 + b"Whiles thou art waking.")),
    )
    Path("shakespeare").write_text("mine " * 99)
    result = cli("train", "--data", "shakespeare", *SMALL)
    assert result.status == 0 and "./shakespeare" in result.err


START, END = (f"*** {word} OF THE PROJECT GUTENBERG EBOOK A ***\n" for word in ("START", "END"))
SMALL_PRINT = "*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*\n"
WRAPPED = [marker.replace("PROJECT GUTENBERG", "PROJECT\nGUTENBERG") for marker in (START, END)]
SECOND = (
    "\nA license\n" + START.replace("THE", "THIS") + "B\n\nEnd of Project Gutenberg's B\nby C\n\n"
)
BOOKS = {  # a file of Project Gutenberg, and the books in it
    "small print": (f"H\n{SMALL_PRINT}\nA\n\nEnd of The Project Gutenberg Etext of A\n", "A\n"),
    "wrapped": (f"H\n{WRAPPED[0]}A\n{WRAPPED[1]}L", "A\n"),
    "two": (f"H\n{START}A\n{END}{SECOND}{END}L", "A\n\nB\n"),
    "German": (f"H\n{START}A\n\nEnde dieses Projekt Gutenberg Etextes A\n\n{END}", "A\n"),
    "French": (f"H\n{START}A\n\nFin du Projet Gutenberg A\n\n{END}", "A\n"),
    "half French": (f"H\n{START}A\n\nFin de Project Gutenberg A\n\n{END}", "A\n"),
    "no end": ("*** START OF THE PROJECT GUTENBERG EBOOK A *** is a marker\n",) * 2,
}


@pytest.mark.parametrize("name", BOOKS)
def test_markers_of_other_decades(read, name):
    """Catches a license in the text, or a text that loses its beginning."""
    raw, expected = BOOKS[name]
    body = "It was night. " * 20
    raw = re.sub(r"^(A|B)$", rf"\1{body}", raw, flags=re.MULTILINE)
    expected = re.sub(r"^(A|B)$", rf"\1{body.strip()}", expected, flags=re.MULTILINE)
    if name == "no end":
        raw += body
        expected += body
    Path("x.txt").write_text(raw)
    assert read("--data", "x.txt")["sha256"] == digest(expected)


@pytest.mark.parametrize("piece", [333, 5_000])
def test_books_of_many_pieces(read, monkeypatch, piece):
    """Catches a license between two books, or a book's end, where a file is read in pieces; and a
    text after the books, or as long as the memory, that is lost."""
    bodies = [prose(n, seed=n).strip() for n in (30, 200, 3, 90)]
    parts = []
    for body in bodies:
        parts += [
            "Title\n" * 9,
            START,
            body,
            "\n\nEnd of Project Gutenberg's A\n\n",
            END,
            "Fee\n" * 70,
        ]
    text = "".join(parts)
    Path("x.txt").write_text(text)
    monkeypatch.setattr(anexagpt, "PIECE", piece)
    assert read("--data", "x.txt")["sha256"] == digest("\n\n".join(bodies) + "\n")
    Path("x.txt").write_text("mine " * 200 + text)  # no book at the beginning
    if piece < 1_000:
        assert read("--data", "x.txt")["characters"] == 1_000 + len(text)
    monkeypatch.setattr(anexagpt, "LONG_TEXT", 100)
    Path("x.txt").write_text(f"{START}A\n" + "mine " * 2_000)
    assert read("--data", "x.txt")["characters"] == len(START) + 10_002


def test_text_after_a_book(cli):
    """Catches a user's text that is taken for the license of the book before it, silently."""
    for n, words in ((1, 0), (1_800, 0), (3_000, 1)):
        Path("x.txt").write_text(f"{START}{prose(100)}\n{END}" + "mine, mine\n" * n)
        anexagpt.note_once.cache_clear()
        assert cli("train", *SMALL, "--data", "x.txt").err.count("left out") == words


def test_read_only_folder_for_downloads(server, monkeypatch, tmp_path):
    """Catches a download that needs data/ where nothing can be written."""
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    url = server.page("/a.txt", Answer(BOOK))
    path = anexagpt.download(url)
    assert path.read_bytes() == BOOK and path.parent == tmp_path / "cache" / "anexa"
    assert not Path("data").exists()


def test_parts_of_unlike_languages(cli):
    """Catches "overfitting" for a validation part in another language, and a note without cause."""
    Path("two").mkdir()
    Path("two/a.txt").write_text(prose(2_000))
    Path("two/b.txt").write_text("\u4f60\u597d\u4e16\u754c\u5929\u5730\u4eba" * 300)
    Path("one.txt").write_text(prose(2_000))
    for name, words in {"two": 1, "one.txt": 0}.items():
        result = cli(
            "train", "--data", name, *TINY, "--max-steps", 1, "--out", f"{name[:3]}.safetensors"
        )
        assert result.status == 0 and result.err.count("is unlike the rest") == words


def test_memory_for_a_text_larger_than_it():
    """Catches a look at the whole text that needs several bytes for each of its characters."""
    ids = np.zeros(40_000_000, np.uint8)
    ids[::3] = 1
    tracemalloc.start()
    assert not anexagpt.is_unlike(ids, ids[:1_000], 3)
    assert anexagpt.is_unlike(ids, ids[:1_000] + 1, 3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * len(ids)


@pytest.mark.parametrize("at", [0, 3, 20, 21])
def test_surroundings_of_a_byte_near_the_start(cli, at):
    """Catches a message that shows nothing, or another place, for a byte near the start of a line:
    up to 20 bytes before it and 19 after it are shown."""
    line = b"abcdefghijklmnopqrstuvwxyz"[:at] + b"\xff" + b"0123456789" * 3
    Path("x.txt").write_bytes(b"one line\n" + line + b"\n")
    around = line.decode("ascii", "backslashreplace")[max(0, at - 20) :][: min(at, 20) + 4 + 19]
    assert cli("train", *SMALL, "--data", "x.txt").is_error(f"line 2, near '{around}'")


def test_what_a_server_is_asked(server, monkeypatch, tmp_path):
    """Catches a request that may take for ever, a compressed answer, which would be refused, and
    the addresses of the mirrors, https, without a limit of size and time."""
    asked = {}
    get = requests.Session.get

    def noted(session, url, **options):
        asked.update(options, adapter=session.get_adapter("https://example.org/"))
        return get(session, url, **options)

    monkeypatch.setattr(requests.Session, "get", noted)
    anexagpt.fetch(server.page("/a.txt", Answer(b"a text\n")), tmp_path / "a.txt", "")
    assert asked["timeout"] == anexagpt.TIMEOUT
    assert asked["headers"]["Accept-Encoding"] == "identity"
    assert isinstance(asked["adapter"], anexagpt.MeteredAdapter)
    assert all(text.ending for text in anexagpt.BUILT_IN.values() if text.mirrors)


@pytest.mark.parametrize("kind", ["stdin", "pipe", "url"])
def test_encoding_of_what_is_no_file(server, monkeypatch, tmp_path, kind):
    """Catches --encoding that only files obey."""
    monkeypatch.chdir(tmp_path)
    content = "caf\xe9 ".encode("cp1252") * 99
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), "utf-8"))
    name = "-"
    if kind == "url":
        name = server.page("/a.txt", Answer(content))
    elif kind == "pipe":
        name = "pipe"
        os.mkfifo(name)
        threading.Thread(target=Path(name).write_bytes, args=(content,)).start()
    assert anexagpt.load_corpus([name], "cp1252").tokenizer.characters == "\ufffd acf\xe9"


def test_capital_ending(tmp_path):
    """Catches a book from Windows that a folder seems not to have."""
    (tmp_path / "PG1661.TXT").write_text("one")
    (source,) = anexagpt.find_texts(str(tmp_path), "utf-8")
    assert source.content == tmp_path / "PG1661.TXT"
