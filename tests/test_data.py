"""Data: from a name, a file or an address to a text; the downloads run against a server on the loopback."""

import hashlib
import os
import pydoc_data.topics
import re
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import urllib3
from conftest import TINY, Answer, prose
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file

import anexagpt
from anexagpt import SOURCES, Corpus, DownloadError, UserError, download, fetch, load_corpus, read_text


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


def prepare(raw: bytes, encoding: str = "utf-8") -> str:
    return "".join(read_text(raw, encoding))


def spelt(corpus: Corpus) -> str:
    return corpus.tokenizer.decode(corpus.ids)


# ---- bytes to text ---------------------------------------------------------------------------------------------------


def test_line_ends_and_byte_order_mark():
    """Catches characters that Windows adds to a text ending up in the vocabulary."""
    assert prepare(b"\xef\xbb\xbfone\r\ntwo\rthree\n\r\n") == "one\ntwo\nthree\n\n"
    assert prepare("\ufeffone\r\n".encode("utf-16"), "utf-16").lstrip("\ufeff") == "one\n"


@pytest.mark.parametrize("the", ["THE", "THIS"])
@pytest.mark.parametrize("space", ["", " "])
def test_gutenberg_licence_goes(the, space):
    """Catches a marker in the spelling of another decade, and a licence that the model would learn by heart."""
    book = f"Licence\n***{space}START OF {the} PROJECT GUTENBERG EBOOK A\nB ***\n\n\nCall me.\n\nThe end.\n\n\n"
    book += f"***{space}END OF {the} PROJECT GUTENBERG EBOOK A B ***\nMore licence\n"
    assert prepare(book.encode()) == "Call me.\n\nThe end.\n"


def test_other_texts_stay_as_they_are():
    """Catches stripping of spaces, or a search for the licence that cuts a text which only mentions Gutenberg."""
    text = "  *** START OF THE PROJECT GUTENBERG EBOOK is a marker.\n  \u201cIndented\u201d\u2003\n\n"
    assert prepare(text.encode()) == text


def test_the_real_book(sherlock):
    """Catches a licence, a BOM or a carriage return left in the real text, or a piece of the story lost."""
    text = prepare(sherlock)
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
    Path("notes.txt").write_bytes(raw)
    text = complaint(load_corpus, "notes.txt", encoding)
    assert all(word in text for word in words), text
    assert "notes.txt" in text or "unknown" in text


def test_other_encodings(cli):
    """Catches an --encoding that is not used."""
    Path("old.txt").write_bytes("caf\xe9 \u201cnoir\u201d\r\n".encode("cp1252"))
    assert spelt(load_corpus("old.txt", "cp1252")) == "caf\xe9 \u201cnoir\u201d\n"
    assert cli("train", "--data", "old.txt").is_error("old.txt", "0xe9", "offset 3", "--encoding")


@given(
    st.text(st.characters(), max_size=60), st.integers(1, 9), st.sampled_from(["utf-8", "utf-16", "utf-32", "gb18030"])
)
@example("a\ufeff\r\n\rb\u00e9\r", 1, "utf-8")
def test_pieces(text, size, encoding):
    """Catches a character or a line end that is lost or doubled where one piece of a file ends and the next begins."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(anexagpt, "PIECE", size)
        pieces = list(read_text(text.encode(encoding), encoding))
    whole = text if encoding in ("utf-16", "utf-32") else text.removeprefix("\ufeff")
    assert "".join(pieces).removeprefix("\ufeff") == re.sub("\r\n|\r", "\n", whole).removeprefix("\ufeff")
    assert all(len(piece) <= size + 1 for piece in pieces)


@pytest.mark.parametrize("size", [1, 2, 3, 1000])
def test_offset_of_what_is_no_text_in_any_piece(monkeypatch, size):
    """Catches an offset that counts from the beginning of a piece, or that a character cut in two moves."""
    monkeypatch.setattr(anexagpt, "PIECE", size)
    Path("x.txt").write_bytes("caf\u00e9 \U0001f600 ".encode() + b"\xe2\x82")
    text = complaint(load_corpus, "x.txt")
    assert "0xe2 at offset 11 " in text, text


def test_licence_is_searched_at_both_ends_only():
    """Catches the loss of a book where a file holds several, and of a text that only quotes a marker in its middle."""
    book = "*** START OF THE PROJECT GUTENBERG EBOOK %s ***\n%s\n*** END OF THE PROJECT GUTENBERG EBOOK %s ***\n\n"
    text = prepare("".join(book % (n, f"Book {n}.", n) for n in "ABC").encode())
    assert text.startswith("Book A.\n***") and text.endswith("***\nBook C.\n") and "Book B." in text
    quoted = "x" * 70_000 + book % ("A", "Book.", "A") + "x" * 70_000
    assert prepare(quoted.encode()) == quoted
    end = book.replace("\n%s\n", "\r\nText.\r\n\r\n  End of the Project Gutenberg EBook of X\r\n\r\n") % ("A", "A")
    assert prepare(("Licence\r\n" + end + "Licence " * 5000).encode()) == "Text.\n"


# ---- downloads -------------------------------------------------------------------------------------------------------


def test_download_of_the_real_book(server, mirrors, sherlock):
    """Catches a copy in data/ that is not what was served, and a second run that asks the network again."""
    mirrors("sherlock", server.page("/pg1661.txt", Answer(sherlock)))
    corpus = load_corpus("sherlock")
    assert spelt(corpus) == prepare(sherlock) and corpus.name == "sherlock"
    assert corpus.sha256 == hashlib.sha256(prepare(sherlock).encode()).hexdigest()
    assert files() == [os.path.join("data", "sherlock.txt")] and Path("data/sherlock.txt").read_bytes() == sherlock
    server.close()
    assert load_corpus(None).sha256 == corpus.sha256 == load_corpus("sherlock").sha256
    assert server.asked == ["/pg1661.txt"]


def test_the_real_shakespeare(server, mirrors, shakespeare):
    """Catches a marker phrase that the real file does not have, and a text changed on the way."""
    assert hashlib.sha256(shakespeare).hexdigest().startswith("86c4e6aa9db7c042")
    mirrors("shakespeare", server.page("/input.txt", Answer(shakespeare)))
    assert spelt(load_corpus("shakespeare")).encode() == shakespeare
    assert spelt(load_corpus("shakespeare", "utf-16")).encode() == shakespeare  # --encoding is for a person's own text


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
    assert download("sherlock").read_bytes() == BOOK
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
    assert download("sherlock").read_bytes() == BOOK


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_busy_server_is_asked_again(server, status):
    """Catches a retry that does not happen where a server says that it is busy."""
    url = server.page("/x", Answer(b"", status), Answer(b"", status), Answer(b"text"))
    fetch(url, Path("data/x.txt"), lambda raw: True)
    assert Path("data/x.txt").read_bytes() == b"text" and len(server.asked) == 3


def test_connection_that_breaks_once(server):
    """Catches a download that gives up although the same address would answer now."""
    url = server.page("/x.txt", Answer(b"half", length=8), Answer(b"the text"))
    assert download(url).read_bytes() == b"the text"


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
    assert download("sherlock").read_bytes() == BOOK == Path("data/sherlock.txt").read_bytes()


def test_addresses(server):
    """Catches two addresses that share a copy, and a copy whose name leaves the folder or is not a file name."""
    pages = ["/a/text.txt", "/b/text.txt", "/c/text.txt?x=../../y&z=1", "/d/" + "n" * 300 + ".txt"]
    for i, page in enumerate(pages):
        url = server.page(page, Answer(b"text %d" % i))
        assert spelt(load_corpus(url)) == spelt(load_corpus(url.replace("http", "HTTP"))) == f"text {i}"
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
    assert corpus.name == "python-docs" and corpus.sha256 == load_corpus("python-docs").sha256
    assert len(corpus.ids) > 300_000
    assert all(topic in spelt(corpus) for topic in pydoc_data.topics.topics.values())


def test_named_text_never_falls_back(mirrors, dead):
    """Catches a person who asked for Sherlock and gets something else."""
    mirrors("sherlock", dead + "/a")
    assert "no connection" in complaint(load_corpus, "sherlock")


def test_no_such_file(cli):
    """Catches a file error without the names that are known."""
    assert cli("train", "--data", "sherlok").is_error("--data sherlok", "sherlock", "shakespeare", "python-docs")


def test_folder(cli, tmp_path):
    """Catches files read in the order of the disk, others than *.txt among them, and a folder without any."""
    assert cli("train", "--data", tmp_path).is_error(str(tmp_path), "*.txt")
    for name, text in {"b.txt": "two", "a.txt": "one\r\n", "C.txt": "zero\n", "d.md": "no", ".e.txt": "\xff"}.items():
        Path(name).write_bytes(text.encode("latin-1"))
    Path("sub.txt").mkdir()
    assert spelt(load_corpus(".")) == spelt(load_corpus(str(tmp_path))) == "zero\none\ntwo"
    Path("b.txt").write_bytes(b"\xff")
    assert cli("train", "--data", ".").is_error("b.txt", "0xff", "offset 0")


def test_several_names(cli):
    """Catches texts that run into one another, a missing one, and a name that does not name them again."""
    for name, text in {"a.txt": "one", "b.txt": "", "c d.txt": "two\n", "e + f.txt": "three"}.items():
        Path(name).write_text(text)
    corpus = load_corpus("a.txt + b.txt + c d.txt + a.txt")
    assert corpus.name == "a.txt + b.txt + c d.txt + a.txt" and spelt(corpus) == "one\ntwo\none"
    assert corpus.sha256 == hashlib.sha256(b"one\ntwo\none").hexdigest() and len(corpus.ids) == 11
    assert spelt(load_corpus("e + f.txt")) == "three"
    assert spelt(load_corpus("python-docs + a.txt")).endswith("\none")
    assert cli("train", "--data", "a.txt", "nowhere.txt").is_error("--data nowhere.txt", "sherlock")


def test_what_cannot_be_read_twice():
    """Catches an endless wait for a device or a pipe."""
    if not os.path.exists("/dev/zero"):
        pytest.skip("no devices here")
    assert "/dev/zero" in complaint(load_corpus, "/dev/zero")


# ---- texts beyond memory ---------------------------------------------------------------------------------------------


@pytest.fixture
def long(monkeypatch):
    """Treat every text as a long one, in many pieces; the ids are then in a file."""
    monkeypatch.setattr(anexagpt, "LONG", 1)
    monkeypatch.setattr(anexagpt, "PIECE", 1 << 10)


def ids_files() -> list[str]:
    return [name for name in files() if name.startswith("data")]


@pytest.mark.parametrize("size", [30, 255, 256, 65_535, 65_536])
def test_long_text(monkeypatch, size):
    """Catches a file of ids that is not what the text gives in memory, for ids of one, two and four bytes."""
    text = prose(500) + "".join(map(chr, range(0x20000, 0x20000 + size - len(set(prose(500))))))
    Path("x.txt").write_text(text, encoding="utf-8", newline="\r\n")
    short = load_corpus("x.txt")
    monkeypatch.setattr(anexagpt, "LONG", 1)
    corpus = load_corpus("x.txt")
    assert spelt(corpus) == spelt(short) == text and corpus.ids.dtype == short.ids.dtype
    assert corpus.ids.element_size() == (1 if size < 256 else 2 if size < 65_536 else 4)
    assert (corpus.name, corpus.sha256, len(corpus.ids)) == (short.name, short.sha256, len(short.ids))
    assert corpus.tokenizer.characters == short.tokenizer.characters
    (path,) = ids_files()
    assert load_file(path)["ids"].tolist() == short.ids.tolist()  # as anybody else reads it


def test_file_of_ids_is_used_again(long, monkeypatch):
    """Catches a long text that is prepared at every start, and one that is not although it or its encoding changed."""
    prepared = []
    survey = anexagpt.survey
    monkeypatch.setattr(anexagpt, "survey", lambda pieces: prepared.append(1) or survey(pieces))
    Path("x.txt").write_text("one \u00e9", encoding="utf-8")
    Path("y.txt").write_text("two")
    for change, text, count in [
        (lambda: None, "one \u00e9\ntwo", 1),
        (lambda: None, "one \u00e9\ntwo", 1),
        (lambda: Path("y.txt").write_text("owt"), "one \u00e9\nowt", 2),
        (lambda: os.utime("y.txt", (1, 1)), "one \u00e9\nowt", 3),
        (lambda: Path("y.txt").write_text("three"), "one \u00e9\nthree", 4),
        (lambda: Path(ids_files()[0]).write_bytes(Path(ids_files()[0]).read_bytes()[:-1]), "one \u00e9\nthree", 5),
        (lambda: Path(ids_files()[0]).write_bytes(b""), "one \u00e9\nthree", 6),
    ]:
        change()
        assert spelt(load_corpus("x.txt + y.txt")) == text and len(prepared) == count and len(ids_files()) == 1
    assert spelt(load_corpus("x.txt + y.txt", "latin-1")) == "one \u00c3\u00a9\nthree"
    assert spelt(load_corpus("y.txt + x.txt")) == "three\none \u00e9" and len(ids_files()) == 2


def test_nothing_half_written(long, monkeypatch):
    """Catches a file of ids that a broken-off run leaves behind, or that the next one takes for a whole one."""
    Path("x.txt").write_text(prose(500))
    encode, broken = anexagpt.Tokenizer.encode, [OSError(28, "No space left on device"), KeyboardInterrupt()]
    for error in broken:

        def breaking(self, text, error=error, pieces=[]):  # noqa: B006
            pieces.append(text)
            if len(pieces) == 3:
                raise error
            return encode(self, text)

        monkeypatch.setattr(anexagpt.Tokenizer, "encode", breaking)
        with pytest.raises(type(error)):
            load_corpus("x.txt")
        assert ids_files() == []
    monkeypatch.setattr(anexagpt.Tokenizer, "encode", encode)
    assert spelt(load_corpus("x.txt")) == prose(500)
    dead = Path(f"data/.{Path(ids_files()[0]).name}.999999999.tmp")
    dead.write_bytes(b"half")
    os.utime("x.txt", (1, 1))
    load_corpus("x.txt")
    assert not dead.exists() and len(ids_files()) == 1


def test_text_that_grows_while_it_is_read(long, monkeypatch):
    """Catches ids of another text than the one whose characters and SHA-256 stand beside them."""
    Path("x.txt").write_text("one")
    survey = anexagpt.survey

    def surveying(pieces):
        result = survey(pieces)
        Path("x.txt").write_text("one more")
        return result

    monkeypatch.setattr(anexagpt, "survey", surveying)
    assert "x.txt: has changed" in complaint(load_corpus, "x.txt") and ids_files() == []
    monkeypatch.setattr(anexagpt, "survey", survey)
    assert spelt(load_corpus("x.txt")) == "one more"


def test_memory_does_not_grow_with_the_text(monkeypatch):
    """Catches a long text that is somewhere held as a whole: 8 MB may not take more than 2 MB above the tables."""
    monkeypatch.setattr(anexagpt, "LONG", 1 << 20)
    Path("x.txt").write_bytes(prose(1000).encode() * 1700)
    assert os.path.getsize("x.txt") > 8_000_000
    tracemalloc.start()
    try:
        corpus = load_corpus("x.txt")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(corpus.ids) == os.path.getsize("x.txt") and peak < 0x110000 * 4 + 2_000_000


def test_training_and_eval_with_a_long_text(cli, long):
    """Catches a training from a file of ids that differs from one from memory, and an eval that does not find it."""
    Path("x.txt").write_text(prose(400))
    Path("y.txt").write_text(prose(400, seed=2) + "".join(map(chr, range(0x4E00, 0x4F00))), encoding="utf-8")  # 16 bits
    options = ["--data", "x.txt", "y.txt", "--quiet", *TINY, "--max-steps", 4, "--eval-interval", 2]
    assert cli("train", *options).status == 0 and len(ids_files()) == 1
    from_file = load_file("model.safetensors")
    told = cli("eval", "--device", "cpu")
    assert told.status == 0 and "x.txt + y.txt, validation part" in told.out
    assert "x.txt + y.txt" in cli("info").out
    other = cli("eval", "--data", "y.txt", "--device", "cpu").out
    Path(ids_files()[0]).unlink()
    anexagpt.LONG = 1 << 30
    assert cli("train", *options, "--restart").status == 0
    from_memory = load_file("model.safetensors")
    assert all(torch.equal(from_file[name], from_memory[name]) for name in from_memory)
    assert cli("eval", "--data", "y.txt", "--device", "cpu").out == other
    Path("y.txt").unlink()
    assert cli("eval").is_error("--data y.txt")


def test_text_too_short(cli):
    """Catches a division by zero or an endless wait where a text is shorter than it must be; 10 x (T + 1) is enough."""
    options = ["--block-size", 16, "--n-layer", 1, "--n-embd", 8, "--n-head", 1, "--max-steps", 2, "--device", "cpu"]
    Path("short.txt").write_text("ab" * 84 + "c")  # 169
    assert cli("train", "--data", "short.txt", *options).is_error("short.txt", "169", "170", "--block-size")
    Path("short.txt").write_text("ab" * 85)
    assert cli("train", "--data", "short.txt", "--quiet", *options).status == 0
    Path("empty.txt").write_text("")
    assert cli("train", "--data", "empty.txt", "--restart").is_error("empty.txt")
