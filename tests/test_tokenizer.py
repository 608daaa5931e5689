"""Tokenizer: characters to ids and back, and prompts in characters that the model knows."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anexagpt import UNKNOWN, Tokenizer, change_notice, split_clusters

ANY = st.text(st.characters())  # any Unicode but surrogates, which no UTF-8 text can have


def tokenizer_of(text: str) -> Tokenizer:
    return Tokenizer(UNKNOWN + "".join(sorted(set(text) - {UNKNOWN})))


@given(ANY, ANY)
def test_round_trip(known, text):
    """Catches ids that are not ranks in the vocabulary, and unknown characters that are not 0."""
    tokenizer = tokenizer_of(known)
    order = sorted(set(known) - {UNKNOWN})
    ids = tokenizer.encode(known + text)
    assert ids.tolist() == [1 + order.index(c) if c in order else 0 for c in known + text]
    assert tokenizer.decode(ids) == "".join(c if c in order else UNKNOWN for c in known + text)
    assert len(tokenizer) == len(order) + 1


@pytest.mark.parametrize("size", [255, 256, 65_535])
def test_many_characters(size):
    """Catches ids that overflow: with U+FFFD, 255 characters fit one byte, 65,535 fit two."""
    text = "".join(map(chr, range(0x20000, 0x20000 + size)))
    ids = tokenizer_of(text).encode(text)
    assert ids.tolist() == list(range(1, size + 1))
    assert ids.dtype == (np.uint8 if size < 256 else np.uint16)


PROMPTS = [
    ("Vit\u00ea\u0323", "Vi\u1ec7t", "Vi\u00ea\u0323t", []),  # as Windows-1258 writes it
    ("Vit\u00ea\u0323", "Vie\u0323\u0302t", "Vi\u00ea\u0323t", []),
    ("\u30ab\u30ac", "\uff76\uff9e", "\u30ac", ["\uff76\uff9e as \u30ac"]),  # halfwidth
    ("Holmes \n", "Holmes", "Holmes", []),
    ("It's a \"-", "\u2018\u2019\u201c\u201d\u2014\u2013", "''\"\"--", ['\u201c as "']),
    ("abc", "ABC", "abc", ["A as a"]),
    ("HOLMES", "Holmes", "HOLMES", ["o as O"]),
    ("e", "\u00c9", "e", ["\u00c9 as e"]),
    ("e\u00e9", "\u00c9", "\u00e9", ["\u00c9 as \u00e9"]),
    ("fi", "\ufb01", "fi", ["\ufb01 as fi"]),
    ("ab", "a\U0001f600b", "ab", ["dropped \U0001f600"]),
    ("ab", "\ufffda\ufffd", "a", ["dropped \ufffd"]),
    ("a\n", "a\r\na\ra", "a\na\na", []),
    ("ab", "\udc80", "", ["dropped"]),
    # Composed and decomposed forms of whole letters, in both directions.
    ("Vi\u1ec7t", "Vie\u0323\u0302t", "Vi\u1ec7t", []),
    ("Vi\u1ec7t", "Vie\u0302\u0323t", "Vi\u1ec7t", []),
    ("Vie\u0323\u0302t", "Vi\u1ec7t", "Vie\u0323\u0302t", []),
    ("e\u0301", "E\u0301\u00e9\u00c9", "e\u0301" * 3, ["\u00c9 as"]),
    ("\u1100\u1161\u11a8", "\uac01", "\u1100\u1161\u11a8", []),
    ("\uac01", "\u1100\u1161\u11a8", "\uac01", []),
    ("\u30ac", "\u30ab\u3099", "\u30ac", []),
    ("e", "e\u0323", "e", ["as e"]),
    ("A", "\uff21\u00e5\u212b", "AAA", ["\uff21 as A"]),
    ("' Its", "It\u00b4s It`s", "It's It's", ["\u00b4 as '", "` as '"]),  # accents as apostrophes
    ("ss", "\u00df", "", ["dropped \u00df"]),
    ("ab", "a\tb\n", "ab", [r"dropped \t", r"dropped \n"]),
    ("a\n\x85\u2028\u2029", "a\r\n\x85\u2028\u2029", "a\n\x85\u2028\u2029", []),
    ("a\n", "a\x85\u2028\u2029a", "aa", [r"dropped \x85", r"dropped \u2028"]),
]


@pytest.mark.parametrize("known, prompt, text, words", PROMPTS, ids=ascii)
def test_prompt(known, prompt, text, words):
    """Catches a KeyError at a character that the text lacks, and a change without a notice."""
    got, changes = tokenizer_of(known).normalize_prompt(prompt)
    notice = change_notice(changes)
    assert got == text and "\n" not in notice and bool(notice) == bool(words)
    assert all(word in notice for word in words), notice


def unmarked(text: str) -> str:
    """Characters that are letters of their own: neither marks nor followed by one."""
    letters = list(split_clusters(text))
    return "".join(letter for letter in letters if len(letter) == 1)


@given(ANY, ANY)
def test_any_prompt(known, prompt):
    """Catches a prompt that keeps an unknown character, or loses a known one."""
    tokenizer = tokenizer_of(known)
    text, changes = tokenizer.normalize_prompt(prompt)
    assert 0 not in tokenizer.encode(text)
    lines = prompt.replace("\r\n", "\n").replace("\r", "\n")
    rest = iter(text)
    assert all(c in rest for c in unmarked(lines) if c in known and c != UNKNOWN)
    assert changes or text == lines


def test_notice_of_many_unknown_characters():
    """Catches a notice as long as the prompt: 70,000 unknown characters once made 379 kB."""
    text, changes = tokenizer_of("ab").normalize_prompt("".join(map(chr, range(0x4E00, 0x8E00))))
    notice = change_notice(changes)
    assert text == "" and len(notice) < 300 and "more" in notice


def test_a_letter_of_thousands_of_marks():
    """Catches a normal form that takes quadratic time, and a notice that fills the screen."""
    started = time.process_time()
    text, changes = tokenizer_of("e").normalize_prompt("e" + "\u0301\u0323" * 10_000)
    assert text == "e" and time.process_time() - started < 2
    assert len(change_notice(changes)) < 2_500


def test_long_prompt_of_known_characters():
    """Catches seconds for each million characters of a paste, of which 256 are read."""
    text = "It was\r\n" * 100_000
    started = time.process_time()
    known, changes = Tokenizer(UNKNOWN + "\n Iastw").normalize_prompt(text)
    assert known == "It was\n" * 100_000 and not changes
    assert time.process_time() - started < 0.3
