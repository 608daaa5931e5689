"""Tokenizer: characters to ids and back, and prompts that the model can read."""

import random
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anexagpt import UNKNOWN, Tokenizer

ANY = st.text(st.characters())  # any Unicode but surrogates, which no UTF-8 text can hold
HARD = ["", "\n", "\ufffd", "a\ufffdb", "\U0010ffff\0", "e\u0301\u00e9", "\U0001f468\u200d\U0001f469", "\u2028\r\n\x85"]


def round_trip(text):
    tokenizer = Tokenizer.of(text)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    # By hand: id 0 is U+FFFD, the others are the places among the sorted characters, from 1.
    order = sorted(set(text) - {"\ufffd"})
    assert ids.tolist() == [0 if c == "\ufffd" else 1 + order.index(c) for c in text]
    assert tokenizer.characters == "\ufffd" + "".join(order) and len(tokenizer) == 1 + len(order)


@given(ANY)
def test_round_trip(text):
    """Catches any character that does not come back, and ids that are not places in the sorted vocabulary."""
    round_trip(text)


@pytest.mark.parametrize("text", HARD)
def test_round_trip_of_hard_texts(text):
    """Catches normalisation, lost zero bytes, and characters beyond 16 bits."""
    round_trip(text)


@given(ANY, ANY)
def test_unknown_characters_are_zero(known, text):
    """Catches an unknown character that takes the id of another one."""
    tokenizer = Tokenizer.of(known)
    expected = "".join(c if c in known else UNKNOWN for c in text)
    assert tokenizer.decode(tokenizer.encode(text)) == expected


@pytest.mark.parametrize("size", [255, 256, 257, 3000, 65_535, 65_536])
def test_many_characters(size):
    """Catches ids that overflow one byte or two: with U+FFFD, 255 and 65,535 characters are the most that fit."""
    text = "".join(map(chr, range(0x20000, 0x20000 + size)))
    ids = Tokenizer.of(text).encode(text)
    assert ids.tolist() == list(range(1, size + 1))
    assert ids.dtype == (torch.uint8 if size < 256 else torch.uint16 if size < 65_536 else torch.int32)


def test_long_text():
    """Catches a seam between the parts that a long text is encoded in."""
    text = "".join(random.Random(1).choices("abc\u00e9\U0001f600\n", k=1000)) * 4500  # 4.5 M, more than one part
    tokenizer = Tokenizer.of(text)
    order = sorted(set(text))
    block = [1 + order.index(c) for c in text[:1000]]
    ids = tokenizer.encode(text)
    assert ids.shape == (4_500_000,) and torch.equal(ids.view(-1, 1000).unique(dim=0)[0].long(), torch.tensor(block))


@pytest.mark.skipif(sys.gettrace() is not None, reason="a debugger is watching")
def test_no_python_loop_over_the_characters():
    """Catches an encoder that takes minutes for 100 MB: the Python instructions may not grow with the text."""
    tokenizer = Tokenizer.of("abc")

    def instructions(text) -> int:
        count = 0

        def trace(frame, event, argument):
            nonlocal count
            frame.f_trace_opcodes = True
            count += event == "opcode"
            return trace

        sys.settrace(trace)
        try:
            tokenizer.encode(text)
        finally:
            sys.settrace(None)
        return count

    assert 0 < instructions("abc" * 100_000) == instructions("abc") < 1000


# ---- prompts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "known, prompt, text, words",
    [
        ("Holmes \n", "Holmes", "Holmes", []),
        ("It's a \"-", "\u2018\u2019\u201c\u201d\u2014\u2013", "''\"\"--", ['\u201c as "']),
        ("cafe", "caf\u00e9", "cafe", ["\u00e9 as e"]),
        ("abc", "ABC", "abc", ["A as a"]),
        ("HOLMES", "Holmes", "HOLMES", ["o as O"]),
        ("e", "\u00c9", "e", ["\u00c9 as e"]),
        ("fi", "\ufb01", "fi", ["\ufb01 as fi"]),
        ("\u2019'", "\u2019", "\u2019", []),
        ("ab", "a\U0001f600b", "ab", ["left out \U0001f600", "2 characters"]),
        ("ab", "\ufffda\ufffd", "a", ["left out \ufffd"]),
        ("a\n", "a\r\na\ra", "a\na\na", []),
        ("ab", "", "", []),
        ("ab", "\udc80", "", ["left out"]),
    ],
)
def test_prompt(known, prompt, text, words):
    """Catches a KeyError at a character that the text did not have, and one changed without a word."""
    got, notice = Tokenizer.of(known).admit(prompt)
    assert got == text and "\n" not in notice and bool(notice) == bool(words)
    assert all(word in notice for word in words), notice


@given(ANY, ANY)
def test_any_prompt(known, prompt):
    """Catches a prompt that still holds a character the model does not know, or loses one that it does."""
    tokenizer = Tokenizer.of(known)
    text, notice = tokenizer.admit(prompt)
    assert 0 not in tokenizer.encode(text).tolist()
    kept = [c for c in prompt.replace("\r\n", "\n").replace("\r", "\n") if c in known and c != UNKNOWN]
    rest = iter(text)
    assert all(c in rest for c in kept)
    assert notice or text == prompt.replace("\r\n", "\n").replace("\r", "\n")
