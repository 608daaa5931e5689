"""Data: from a name, a file or an address to a text; the downloads run against a server on the loopback."""

import hashlib
import os
import pydoc_data.topics
import re
from dataclasses import replace
from pathlib import Path

import pytest
import urllib3
from conftest import Answer, prose

import anexagpt
from anexagpt import SOURCES, DownloadError, UserError, download, fetch, load_corpus, prepare


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Work in an empty folder, and do not wait between two attempts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(urllib3.Retry, "get_backoff_time", lambda self: 0)


@pytest.fixture
def mirrors(monkeypatch):
    """Point a built-in text to other addresses."""

    def point(name, *addresses):
        monkeypatch.setitem(SOURCES, name, replace(SOURCES[name], mirrors=addresses))

    return point


def files() -> list[str]:
    """All files below the working folder, hidden ones too: nothing half-written may be among them."""
    return sorted(str(path) for path in Path(".").rglob("*") if path.is_file())


def complaint(function, *arguments) -> str:
    with pytest.raises(UserError) as error:
        function(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- bytes to text ---------------------------------------------------------------------------------------------------


def test_line_ends_and_byte_order_mark():
    """Catches characters that Windows adds to a text ending up in the vocabulary."""
    assert prepare(b"\xef\xbb\xbfone\r\ntwo\rthree\n\r\n", "x") == "one\ntwo\nthree\n\n"
    assert prepare("\ufeffone\r\n".encode("utf-16"), "x", "utf-16").lstrip("\ufeff") == "one\n"


@pytest.mark.parametrize("the", ["THE", "THIS"])
@pytest.mark.parametrize("space", ["", " "])
def test_gutenberg_licence_goes(the, space):
    """Catches a marker in the spelling of another decade, and a licence that the model would learn by heart."""
    book = f"Licence\n***{space}START OF {the} PROJECT GUTENBERG EBOOK A\nB ***\n\n\nCall me.\n\nThe end.\n\n\n"
    book += f"***{space}END OF {the} PROJECT GUTENBERG EBOOK A B ***\nMore licence\n"
    assert prepare(book.encode(), "x") == "Call me.\n\nThe end.\n"


def test_other_texts_stay_as_they_are():
    """Catches stripping of spaces, or a search for the licence that cuts a text which only mentions Gutenberg."""
    text = "  *** START OF THE PROJECT GUTENBERG EBOOK is a marker.\n  \u201cIndented\u201d\u2003\n\n"
    assert prepare(text.encode(), "x") == text


def test_the_real_book(sherlock):
    """Catches a licence, a BOM or a carriage return left in the real text, or a piece of the story lost."""
    text = prepare(sherlock, "sherlock")
    raw = sherlock.decode("utf-8").replace("\r\n", "\n")
    first, last = raw.index("EBOOK THE ADVENTURES"), raw.index("*** END OF THIS")
    assert text in raw and text.strip() == raw[raw.index("***", first) + 3 : last].strip()
    assert not re.search(r"\r|\ufeff|\*\*\*|License|restrictions", text)
    assert SOURCES["sherlock"].ending in " ".join(text.split())
    assert 550_000 < len(text) < 570_000


@pytest.mark.parametrize(
    "raw, encoding, words",
    [
        (b"caf\xe9 noir", "utf-8", ["0xe9", "offset 3", "--encoding"]),
        (b"\xef\xbb\xbf" + b"x" * 1500 + b"\xff\xfe", "utf-8", ["0xff", "offset 1,503"]),
        (b"\x81", "cp1252", ["0x81", "offset 0", "cp1252"]),
        (b"abc", "utf-16", ["utf-16"]),
        (b"abc", "utf-99", ["--encoding utf-99", "unknown"]),
        (b"abc", "base64", ["--encoding base64"]),
        (b"\\ud800", "unicode_escape", ["--encoding"]),
    ],
)
def test_not_text_in_this_encoding(raw, encoding, words):
    """Catches a traceback, silent replacement characters, or an offset that does not count a byte order mark."""
    text = complaint(prepare, raw, "notes.txt", encoding)
    assert all(word in text for word in words), text


def test_other_encodings(cli):
    """Catches an --encoding that is not used."""
    Path("old.txt").write_bytes("caf\xe9 \u201cnoir\u201d\r\n".encode("cp1252"))
    assert load_corpus("old.txt", "cp1252").text == "caf\xe9 \u201cnoir\u201d\n"
    assert cli("train", "--data", "old.txt").is_error("old.txt", "0xe9", "offset 3", "--encoding")


# ---- downloads -------------------------------------------------------------------------------------------------------


def test_download_of_the_real_book(server, mirrors, sherlock):
    """Catches a copy in data/ that is not what was served, and a second run that asks the network again."""
    mirrors("sherlock", server.page("/pg1661.txt", Answer(sherlock)))
    corpus = load_corpus("sherlock")
    assert corpus.text == prepare(sherlock, "x") and corpus.name == "sherlock"
    assert corpus.sha256 == hashlib.sha256(corpus.text.encode()).hexdigest()
    assert files() == [os.path.join("data", "sherlock.txt")] and Path("data/sherlock.txt").read_bytes() == sherlock
    server.close()
    assert load_corpus(None) == corpus == load_corpus("sherlock")
    assert server.asked == ["/pg1661.txt"]


def test_the_real_shakespeare(server, mirrors, shakespeare):
    """Catches a marker phrase that the real file does not have, and a text changed on the way."""
    assert hashlib.sha256(shakespeare).hexdigest().startswith("86c4e6aa9db7c042")
    mirrors("shakespeare", server.page("/input.txt", Answer(shakespeare)))
    assert load_corpus("shakespeare").text.encode() == shakespeare


def test_mirrors():
    """Catches a built-in text without a second address, and one that is not fetched safely."""
    assert set(SOURCES) == {"sherlock", "shakespeare"}
    for source in SOURCES.values():
        assert len(set(source.mirrors)) >= 2 and all(url.startswith("https://") for url in source.mirrors)
    first = [source.mirrors[0] for source in SOURCES.values()]
    assert first[0].endswith("/cache/epub/1661/pg1661.txt") and first[1].endswith("/tinyshakespeare/input.txt")


BOOK = "\n".join(["A book.", prose(300), "I believe that she has met with\r\nconsiderable success.", ""]).encode()
REFUSED = {
    "404": Answer(BOOK, 404),
    "500 for ever": Answer(BOOK, 500),
    "web page": Answer(b"<!DOCTYPE html><p>" + BOOK, type="text/html; charset=utf-8"),
    "web page by its type": Answer(b"<p>" + BOOK, type="text/html"),
    "web page in disguise": Answer(b"\n <!doctype HTML><p>" + BOOK),
    "ending missing": Answer(BOOK[: len(BOOK) // 2]),
    "nothing": Answer(b""),
    "cut off": Answer(BOOK[:-10], length=len(BOOK)),
    "cut off, but after the ending": Answer(BOOK, length=len(BOOK) + 1000),
    "too long": Answer(BOOK + b"x" * 400_000),
}


@pytest.mark.parametrize("answer", REFUSED.values(), ids=REFUSED)
def test_what_is_refused_goes_to_the_next_mirror(server, mirrors, monkeypatch, answer):
    """Catches an error page or half a book that becomes the training text, and mirrors asked in the wrong order."""
    monkeypatch.setattr(anexagpt, "MAX_DOWNLOAD", 300_000)
    mirrors("sherlock", server.page("/first", answer), server.page("/second", Answer(BOOK)))
    assert download("sherlock") == BOOK
    assert server.asked[0] == "/first" and server.asked[-1] == "/second" and server.asked.count("/second") == 1
    assert files() == [os.path.join("data", "sherlock.txt")]


@pytest.mark.parametrize("answer", REFUSED.values(), ids=REFUSED)
def test_no_mirror_left(server, mirrors, monkeypatch, answer):
    """Catches something half-written that stays in data/, and a named text that is silently replaced by another."""
    monkeypatch.setattr(anexagpt, "MAX_DOWNLOAD", 300_000)
    mirrors("sherlock", server.page("/first", answer), server.page("/second", answer))
    text = complaint(load_corpus, "sherlock")
    assert text.startswith("--data sherlock: could not be downloaded (127.0.0.1")
    assert files() == []


def test_dead_mirror_first(server, mirrors, dead):
    """Catches a connection error that ends the search."""
    mirrors("sherlock", dead + "/x", server.page("/second", Answer(BOOK)))
    assert download("sherlock") == BOOK


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_busy_server_is_asked_again(server, status):
    """Catches a retry that does not happen where a server says that it is busy."""
    url = server.page("/x", Answer(b"", status), Answer(b"", status), Answer(b"text"))
    fetch(url, Path("data/x.txt"), lambda raw: True)
    assert Path("data/x.txt").read_bytes() == b"text" and len(server.asked) == 3


def test_connection_that_breaks_once(server):
    """Catches a download that gives up although the same address would answer now."""
    url = server.page("/x.txt", Answer(b"half", length=8), Answer(b"the text"))
    assert download(url) == b"the text"


def test_silent_server_is_given_up(server):
    """Catches a server that holds the program for long: three patient retries at six addresses are twelve minutes."""
    with pytest.raises(DownloadError, match=r"no answer|no connection"):
        fetch(server.page("/x", Answer(silent=True)), Path("data/x.txt"), lambda raw: True, patience=0.3)
    assert len(server.asked) <= 2 and files() == []


def test_dripping_server_is_given_up(server):
    """Catches a server that sends a byte now and then, for hours, while every single wait is short."""
    with pytest.raises(DownloadError, match="5 kB/s"):
        page = server.page("/x", Answer(b"x" * 200, drip=0.01, length=1_000_000))
        fetch(page, Path("data/x.txt"), lambda raw: True, patience=0.3)
    assert files() == []


def test_only_whole_files_appear(server):
    """Catches a write straight to the final name: whoever looks during the download must not see the file."""
    seen = []

    def accept(path):
        seen.extend(files())
        return True

    fetch(server.page("/x", Answer(b"text")), Path("data/x.txt"), accept)
    assert len(seen) == 1 and seen[0] != files()[0] and files() == [os.path.join("data", "x.txt")]


def test_damaged_copy_is_fetched_again(server, mirrors):
    """Catches a truncated file in data/, from an older program or an editor, that is trusted for ever."""
    mirrors("sherlock", server.page("/x", Answer(BOOK)))
    Path("data").mkdir()
    Path("data/sherlock.txt").write_bytes(BOOK[:1000])
    assert download("sherlock") == BOOK == Path("data/sherlock.txt").read_bytes()


def test_addresses(server):
    """Catches two addresses that share a copy, and a copy whose name leaves the folder or is not a file name."""
    pages = ["/a/text.txt", "/b/text.txt", "/c/text.txt?x=../../y&z=1", "/d/" + "n" * 300 + ".txt"]
    for i, page in enumerate(pages):
        url = server.page(page, Answer(b"text %d" % i))
        assert load_corpus(url).text == load_corpus(url.replace("http", "HTTP")).text == f"text {i}"
    assert len(files()) >= len(pages) and all(re.fullmatch(r"data.[\w.-]+", name) for name in files())


@pytest.mark.parametrize("address", ["http://", "http://[", "https://:99999/x", "http://\udcff/", "http://a b/"])
def test_addresses_that_are_none(address):
    """Catches a traceback from the depths of the network library."""
    assert "--data" in complaint(load_corpus, address)


# ---- other texts -----------------------------------------------------------------------------------------------------


def test_without_network_the_default_is_pythons_documentation(mirrors, dead, capsys):
    """Catches a first run without network that fails, or that goes on without a word."""
    mirrors("sherlock", dead + "/a", dead + "/b")
    corpus = load_corpus(None)
    notes = capsys.readouterr().err.splitlines()
    assert any("NOTE" in line and "python-docs" in line for line in notes)
    assert any("NOTE" in line and "could not be downloaded" in line and "no connection" in line for line in notes)
    assert corpus.name == "python-docs" and corpus == load_corpus("python-docs")
    assert len(corpus.text) > 300_000
    assert all(topic in corpus.text for topic in pydoc_data.topics.topics.values())


def test_named_text_never_falls_back(mirrors, dead):
    """Catches a person who asked for Sherlock and gets something else."""
    mirrors("sherlock", dead + "/a")
    assert "no connection" in complaint(load_corpus, "sherlock")


def test_no_such_file(cli):
    """Catches a file error without the names that are known."""
    assert cli("train", "--data", "sherlok").is_error("--data sherlok", "sherlock", "shakespeare", "python-docs")


def test_folder_instead_of_a_file(cli, tmp_path):
    """Catches a traceback for a folder."""
    assert cli("train", "--data", tmp_path).is_error(str(tmp_path))


def test_text_too_short(cli):
    """Catches a division by zero or an endless wait where a text is shorter than it must be; 10 x (T + 1) is enough."""
    options = ["--block-size", 16, "--n-layer", 1, "--n-embd", 8, "--n-head", 1, "--max-steps", 2, "--device", "cpu"]
    Path("short.txt").write_text("ab" * 84 + "c")  # 169
    assert cli("train", "--data", "short.txt", *options).is_error("short.txt", "169", "170", "--block-size")
    Path("short.txt").write_text("ab" * 85)
    assert cli("train", "--data", "short.txt", "--quiet", *options).status == 0
    Path("empty.txt").write_text("")
    assert cli("train", "--data", "empty.txt", "--restart").is_error("empty.txt")
