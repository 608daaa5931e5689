"""Chat: the prompt loop over pipes and on pseudo-terminals; each number of the views by hand."""

import math
import os
import re
import signal
import stat
import threading
import time
import unicodedata
from pathlib import Path

import numpy as np
import pexpect
import pytest
import torch
from rich.cells import cell_len
from test_terminal import Terminal, random_model

import anexagpt

CHARACTERS = "\n !'./abcdefghijklmnopqrstuvwxyz"
OPENING = ["", "--- Interactive Generation ---", "Enter a prompt to continue (or 'quit' to exit)"]


@pytest.fixture
def model(tiny, cli):
    """A random model of two layers, in the file model.safetensors of an empty folder."""
    return random_model(tiny, "model.safetensors", CHARACTERS, scale=0.7)


def context(model, text: str) -> str:
    """The end of `text` that the model reads: when full, the first half of it is left out."""
    T, start = model.network.config.block_size, 0
    while len(text) - start > T:
        start += T // 2
    return text[start:]


def reference(model, text: str):
    """Logits (V,) after `text`, and attention weights (L, H, T, T), by the formulas in float64."""
    w = {name: weight.detach().double() for name, weight in model.network.named_parameters()}
    ids = torch.tensor([model.tokenizer.characters.index(c) for c in context(model, text)])
    T, H, C = len(ids), model.network.config.n_head, model.network.config.n_embd

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    x, weights = w["wte.weight"][ids] + w["wpe.weight"][:T], []
    for h in (f"h.{layer}" for layer in range(model.network.config.n_layer)):
        qkv = linear(norm(x, f"{h}.ln_1"), f"{h}.attn.c_attn")
        q, k, v = qkv.view(T, 3, H, C // H).permute(1, 2, 0, 3)  # (H, T, D) each
        scores = torch.einsum("htd,hsd->hts", q, k) / math.sqrt(C // H)
        scores[:, ~torch.ones(T, T).tril().bool()] = -math.inf
        weights.append(scores.softmax(-1))
        y = torch.einsum("hts,hsd->thd", weights[-1], v).reshape(T, C)
        x = x + linear(y, f"{h}.attn.c_proj")
        y = linear(norm(x, f"{h}.ln_2"), f"{h}.mlp.c_fc")
        y = y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3))) / 2
        x = x + linear(y, f"{h}.mlp.c_proj")
    return (norm(x, "ln_f") @ w["wte.weight"].T)[-1].numpy(), torch.stack(weights)


def softmax(logits):
    return np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()


def surprises(model, text: str) -> list[np.ndarray]:
    """-log2 p (V,) of every character at each place of `text`."""
    before = ("\n" + text[:i] for i in range(len(text)))
    return [-np.log2(softmax(reference(model, b)[0])) for b in before]


def top_p(x, p, _):
    probs = softmax(x)
    return np.where([probs[probs > q].sum() < p for q in probs], x, -np.inf)


STAGES = {  # what each setting makes of the logits, in the order in which they apply
    "repetition-penalty": lambda x, p, seen: np.where(seen, np.where(x > 0, x / p, x * p), x),
    "temperature": lambda x, t, _: x / t if t else np.where(x == x.max(), 0, -np.inf),
    "top-k": lambda x, k, _: np.where(x >= np.sort(x)[-int(k)], x, -np.inf),
    "top-p": top_p,
    "min-p": lambda x, p, _: np.where(softmax(x) >= p * softmax(x).max(), x, -np.inf),
}


@pytest.mark.parametrize("columns", [80, 40])
@pytest.mark.parametrize("settings", [
    {"temperature": 1.0},
    {"temperature": 0.0},
    {"temperature": 1.7, "top-k": 5},
    {"temperature": 0.5, "top-p": 0.6},
    {"temperature": 1.0, "min-p": 0.3},
    {"repetition-penalty": 1.5, "temperature": 0.8, "top-k": 7, "top-p": 0.9, "min-p": 0.1},
], ids=str)  # fmt: skip
def test_probs(model, cli, monkeypatch, settings, columns):
    """Catches a stage that is left out, in another order, or fed by the wrong one; a wrong row."""
    monkeypatch.setenv("COLUMNS", str(columns))
    prompt = "the cat sat on a wall. so long " * 2
    logits = reference(model, prompt)[0]
    expected, seen = [softmax(logits)], np.isin(list(model.tokenizer.characters), list(prompt))
    logits[0] = -np.inf  # U+FFFD is never sampled
    for name, value in settings.items():
        logits = STAGES[name](logits, value, seen)
        expected += [softmax(logits)] if (name, value) != ("temperature", 1.0) else []
    options = [word for name, value in settings.items() for word in (f"--{name}", value)]
    title, *lines = cli("explain", prompt, "--view", "probs", *options).out.splitlines()
    rows, header = lines[-13:], " ".join(" ".join(lines[:-13]).split())
    assert title.startswith("After '") and ("model" in header or columns == 40)
    assert max(map(cell_len, lines)) <= columns and rows[-1].startswith("21 more")
    order, room = expected[0].argsort()[::-1], (columns - 8) // len(expected) - 7
    for row, which in zip(rows, [*([i] for i in order[:12]), order[12:]], strict=True):
        assert len(which) > 1 or repr(model.tokenizer.characters[which[0]]).strip('"') in row[:8]
        numbers, bars = zip(*re.findall(r"([\d.]+|-) ?(█*)", row[8:]), strict=True)
        shares = [p[which].sum() for p in expected]
        numbers = [0.0 if n == "-" else float(n) / 100 for n in numbers]
        assert numbers == pytest.approx(shares, abs=0.00051)
        lengths = [s / np.max(expected) * max(0, room) * (len(which) == 1) for s in shares]
        assert list(map(len, bars)) == pytest.approx(lengths, abs=0.51)  # all have one scale


@pytest.mark.parametrize("columns", [80, 60])
def test_why(model, cli, monkeypatch, columns):
    """Catches digits below the wrong character, nats for bits, a wrong mean or context."""
    monkeypatch.setenv("COLUMNS", str(columns))
    text = "sherlock holmes took his bottle\nfrom the corner of the mantel"
    bits, index = surprises(model, text), model.tokenizer.characters.index
    own = [b[index(c)] for b, c in zip(bits, text, strict=True)]
    lines = cli("explain", text, "--view", "why").out.splitlines()
    assert max(map(cell_len, lines)) <= columns and lines[0].startswith("Digit = surprise in bits")
    begin = next(i for i, line in enumerate(lines) if line.startswith("sherlock"))
    end = next(i for i, line in enumerate(lines) if line.endswith("least expected:"))
    above, below = lines[begin:end:2], lines[begin + 1 : end : 2]
    below = "".join(b.ljust(len(a)) for a, b in zip(above, below, strict=True)).rstrip()
    digits = [str(min(9, round(b))) if round(b) else " " for b in own]
    digits.insert(text.index("\n") + 1, " ")  # \n takes two cells
    assert "".join(above) == text.replace("\n", "\\n") and below == "".join(digits).rstrip()
    assert f"{sum(own):,.1f} bits, {sum(own) / len(own):.3f} bits/char" in lines[end]
    empty = cli("explain", "", "--view", "why")  # stands for a line end, as in the other views
    assert empty.status == 0 and "characters: 1, " in empty.out
    for line, i in zip(lines[end + 1 :], np.argsort(own)[:-4:-1], strict=True):
        best = bits[i].argmin()
        likeliest = f"('{model.tokenizer.characters[best]}' {bits[i][best]:.1f})"
        assert line.startswith(f"{text[i]!r} {own[i]:.1f} bits") and likeliest in line


@pytest.mark.parametrize("columns", [80, 40])
@pytest.mark.parametrize("layer, head", [(None, None), (1, None), (1, 1), (2, 2)])
def test_attn(model, cli, monkeypatch, layer, head, columns):
    """Catches heads or layers that are mixed up, q and k swapped, no scale, no mask, a shift."""
    monkeypatch.setenv("COLUMNS", str(columns))
    text = "sherlock holmes " * 4  # longer than the context, and than what is shown
    options = ["--layer", layer] * bool(layer) + ["--head", head] * bool(head)
    title, *lines = cli("explain", text, "--view", "attn", *options).out.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("    "))
    key, rows = " ".join(lines[:begin]), lines[begin + 1 :]
    weights, text = reference(model, text)[1][(layer or 2) - 1], context(model, text)
    weights = weights.mean(0) if head is None else weights[head - 1]
    assert f"ayer {layer or 2} of 2" in title and (f"head {head} of 2" in title or not head)
    assert re.findall(r"(\S) +(\d+)%", key) == [("░", "5"), ("▒", "15"), ("▓", "30"), ("█", "60")]
    n = len(rows)
    assert n >= 12 and max(map(cell_len, rows)) <= columns
    for t, row in zip(range(len(text) - n, len(text)), rows, strict=True):
        best = int(weights[t].argmax())
        assert row[:2] == f" {text[t]}"
        for i, w in enumerate(weights[t, len(text) - n :].tolist()):
            assert row[4 + 2 * i] == " ░▒▓█"[sum(w >= low for low in (0.05, 0.15, 0.3, 0.6))]
        assert row[4 + 2 * n :] == f" {text[best]!r} {weights[t, best]:.0%}"


def test_tokens(model, cli):
    """Catches an id that is not the character's place, and mapped or dropped ones not marked."""
    lines = cli("explain", "Sh\u2019\u00e9\u4f60\nx", "--view", "tokens").out.splitlines()
    index = model.tokenizer.characters.index
    ids = [str(i) for i in [*map(index, "sh'e"), "-", index("\n"), index("x")]]
    assert lines[1].split() + lines[3].split() == ids and f"of 1 to {len(CHARACTERS)}" in lines[4]
    for c, i in zip("Sh\u2019\u00e9", ids, strict=False):
        assert lines[1][lines[0].index(c) :].startswith(i)
    for words in ("S as s", "\u2019 as '", "\u00e9 as e", "dropped \u4f60"):
        assert words in " ".join(lines[5:])


def test_views_of_hostile_text(tiny, cli, monkeypatch):
    """Catches wide, zero-width or control characters that break a width or reach a terminal."""
    text = "a\u4f60" * 30 + "\u0301\x1b[31m\x07\x00\u202e\t\u200b\n\U0001f600" * 9 + "e\u0301" * 30
    random_model(tiny, "model.safetensors", text.replace("[", ""))
    for columns in (80, 40, 12):
        monkeypatch.setenv("COLUMNS", str(columns))
        result = cli("explain", text, "--top-k", 3, "--top-p", 0.5, "--min-p", 0.1)
        assert result.status == 0 and "\x1b" not in result.out
        for line in result.out.splitlines():
            assert not any(unicodedata.category(c) in ("Cc", "Cf", "Mn") for c in line), line
            assert columns == 12 or cell_len(line) <= columns, line


def chat(cli, *lines, options=()):
    """Standard output and messages of a session; each message is in parentheses on its line."""
    result = cli("chat", "-n", 20, *options, stdin="".join(f"{line}\n" for line in lines))
    assert result.status == 0, result.err
    return result.out, result.err


def test_session_to_the_letter(model, cli):
    """Catches anything but generated text on stdout, a message that goes to the model, a context
    that is carried from one prompt to the next, and other lines than ours."""
    lines = 'the|/hlep|/set temperature 101|"""a|b"""|/more|x|"""open|end'.split("|")  # noqa: SIM905
    out, err = chat(cli, *lines, options=["--seed", 3])
    prompts = ["the", "a\nb", "x", "open\nend"]
    answers = [prompt + model.generate(prompt, max_new=20, seed=3) for prompt in prompts]
    answers.insert(2, model.generate(answers[1], max_new=20, seed=3))
    assert out == "".join(f"{answer}\n" for answer in answers)
    first, *rest = err.splitlines()
    assert first.startswith("model.safetensors: ") and "/help" in first and rest[:3] == OPENING
    first, second, third = rest[3:]
    assert first.startswith("Prompt: Response: Prompt: (/hlep: ") and "/help" in first
    assert second.startswith("Prompt: (temperature 101.0: ") and "100" in second
    assert third == "Prompt: Response: " * 2 + "..." + "Prompt: Response: " * 2 + "Prompt: "


def test_set(model, cli):
    """Catches a setting that is taken wrongly or unchecked, or cannot be taken back."""
    cases = {
        "temperature 0.5": "temperature 0.5", "top-k 5": "top-k 5", "top_k 7": "7",
        "top-p .9": "top-p 0.9", "min-p 1": "min-p 1", "max-new 7000": "max-new 7,000",
        "seed 3": "seed 3", "stop the end": "'the end'", "stop \\n\\n": r"'the end' '\n\n'",
        "stop": "stop none", "seed": "seed random", "temperature": "temperature 0.7",
        "top-k 2.5": "whole number from 0 to 1,114,112", "temperature nan": "from 0 to 100",
        "temperature hot": "number from 0 to 100", "top-p -1": "from 0 to 1", "min-p 2": "0 to 1",
        "repetition-penalty 0": "from 0.01 to 100", "max-new -1": "from 0 to 1,000,000,000,000",
        "seed x": "whole number from 0", "temprature 1": "temperature, top-k",
    }  # fmt: skip
    out, err = chat(cli, *(f"/set {case}" for case in cases), "/show")
    messages = err.split("Prompt: ")[1:]
    for (case, expected), message in zip(cases.items(), messages, strict=False):
        assert expected in message, (case, message)
    shown = " ".join(messages[len(cases)].split())
    for words in ("temperature 0.7", "top-k 7", "top-p 0.9", "max-new 7,000", "stop none"):
        assert words in shown
    assert out == "" and "last answer" not in shown


def test_stop_means_the_same_everywhere(model, cli):
    r"""Catches --stop "\n" that waits for a backslash, where /set stop \n waits for a line end."""
    hot = dict(max_new=200, seed=1, temperature=5.0)
    expected = model.generate("the", **hot, stop=("\n", "zz"))
    assert "\n" in model.generate("the", **hot) and "\n" not in expected
    settings = [
        "/set seed 1",
        "/set max-new 200",
        "/set temperature 5",
        "/set stop \\n",
        "/set stop zz",
    ]
    assert chat(cli, *settings, "the")[0] == f"the{expected}\n"
    options = ["-n", 200, "--seed", 1, "--temperature", 5, "--stop", "\\n", "--stop", "zz"]
    assert chat(cli, "the", options=options)[0] == f"the{expected}\n"
    assert cli("generate", "the", *options).out == f"the{expected}\n"


def test_an_answer_can_be_repeated_and_continued(model, cli):
    """Catches answers that repeat unasked, a seed in /show that is not the answer's, and /more that
    forgets the prompt: at temperature 0, 20 + 20 + 20 characters are 60, past the context."""
    out, err = chat(cli, "the", "the", "/show")
    first, second, _ = [*out.split("the")[1:], ""]
    assert first != second
    seed = re.search(r"/set seed (\d+), then /regen", " ".join(err.split()))[1]
    assert chat(cli, "the", f"/set seed {seed}", "/regen")[0].endswith(f"the{second}")
    assert cli("generate", "the", "-n", 20, "--seed", seed).out == f"the{second}"
    out = chat(cli, "/set temperature 0", "the", "/more", "/more")[0].splitlines()
    expected = "the" + model.generate("the", max_new=60, temperature=0.0)
    assert "".join(out) == expected.replace("\n", "")


def test_prompt_longer_than_the_context(model, cli):
    """Catches a long prompt that is echoed whole, or silently cut."""
    prompt = "".join(CHARACTERS[6 + i * i % 26] for i in range(100))
    out, err = chat(cli, prompt, options=["--seed", 1])
    read = context(model, prompt)
    assert 16 < len(read) <= 32 and f"{len(read)} are read" in err and "32 characters" in err
    assert out == read + model.generate(prompt, max_new=20, seed=1) + "\n"
    assert model.generate(prompt, max_new=20, seed=1) == model.generate(read, max_new=20, seed=1)
    text = "\ufeff" + "q" * 47_999 + f"\r\n{prompt}\r\n"
    Path("long.txt").write_text(text, encoding="utf-8", newline="")
    Path(" 'dropped' ").write_text(prompt)
    for name in ("long.txt", " long.txt ", "'long.txt'", '"long.txt"', "\" 'dropped' \""):
        assert chat(cli, f"/read {name}", options=["--seed", 1])[0] == out, name


def test_what_is_read(model, cli):
    """Catches a prompt that loses spaces, slashes or lines, an empty one that is answered, and
    70,000 unknown characters that make a notice of 379 kB."""
    cases = {
        '"""/etc"""': "/etc", " the ": " the ", '"""/help"""': "/help", "quit.": "quit.",
        '"""a""" b': "a b",
        '"""quit"""': "quit", '"""\na\n\nb\n"""': "a\n\nb", '"""a\n"""  ': "a", '""""""': "",
        "": "", "\U0001f600": "", "caf\u00e9\u2019s": "cafe's", "The": "the",
    }  # fmt: skip
    for line, prompt in cases.items():
        out, err = chat(cli, line, options=["-n", 0])
        assert out == (prompt and f"{prompt}\n"), line
    assert "(read T as t" in err
    unknown = "".join(map(chr, range(0x20000, 0x20000 + 40_000)))
    out, err = chat(cli, unknown + "a", options=["-n", 0])
    assert out == "a\n" and len(err) < 1_000 and "more" in err
    assert len(cli("generate", unknown + "a", "-n", 0).err) < 600


def test_open_quotes_take_linear_time(model, cli):
    """Catches an unclosed prompt of 40,000 lines that takes minutes."""
    started = time.process_time()
    result = cli("chat", "-n", 0, stdin='"""' + "\n" * 40_000)
    assert result.status == 0 and time.process_time() - started < 4


def test_views_of_long_texts(model, cli):
    """Catches a view of 100,000 characters that takes a minute without a word."""
    text = "the cat " * 12_500
    started = time.process_time()
    for view in ("why", "tokens", "attn", "probs"):
        result = cli("explain", text, "--view", view)
        assert result.status == 0 and len(result.out) < 20_000
        assert ("2,000" in result.err) == (view in ("why", "tokens"))
    assert time.process_time() - started < 20


def test_explain_counts_line_ends_as_chat_does(model, cli):
    """Catches one id too many for a line end of Windows."""
    assert "characters: 3, ids: 3" in cli("explain", "a\r\nb", "--view", "tokens").out


@pytest.mark.parametrize("place", ["folder", "fifo", "full", "unreadable"])
def test_history_that_cannot_be_kept(model, tmp_path, place):
    """Catches 20 lines of "Unhandled exception in event loop" at each prompt, or a hang."""
    path = tmp_path / "anexa" / "history"
    path.parent.mkdir()
    if place == "folder":
        path.mkdir()
    elif place == "fifo":
        os.mkfifo(path)
    elif place == "full":
        path.symlink_to("/dev/full")
    else:
        path.write_bytes(b"# \xff\xfe\n+\xff\n\0")
    child = Terminal("chat", "-n", 0, XDG_STATE_HOME=str(tmp_path))
    seen = ""
    cases = {"the\r": "Response: the", "\x1b[31m\r": "nothing to continue", "\x1b[A\r": "the"}
    for keys, words in cases.items():
        child.expect("Prompt:")
        child.send(keys)
        child.expect_exact(words)
        seen += child.before
    child.expect("Prompt:")
    child.send("\x04")
    assert child.end() == 0
    seen += child.before
    assert "nhandled" not in seen and "Traceback" not in seen


def test_lines_that_are_not_for_the_model(model, cli):
    """Catches a mistyped command that is continued as a text, and a traceback."""
    lines = {
        "/xyzzy": "/help", "/": "/help", "/respond x": "unknown", "/__init__ x": "unknown",
        "/attn x": "layer x: must be from 1 to 2", "/attn 1 3": "head 3: must be from 1 to 2",
        "/regen": "nothing to continue", "/more": "nothing to continue", "/why": "no answer",
        "/read": "usage: /read FILE", "/read /": "is a folder", "/model": "usage",
        "/model no.safetensors": "no such file", "/read model.safetensors": "save it as such)",
        "/model model.safetensors/x": "no such file", "/model /proc/self/mem": "Input/output error",
        f"/read {'n' * 300}": "too long",
    }  # fmt: skip
    out, err = chat(cli, *lines)
    messages = err.split("Prompt: ")[1:]
    assert out == "" and len(messages) == len(lines) + 1  # the last is the end of the input
    for (line, expected), message in zip(lines.items(), messages, strict=False):
        assert expected in message and message.startswith("("), (line, message)
        assert message.count("\n") == 1


def test_ways_to_leave(model, cli):
    """Catches one that is taken for a prompt, or after which the session goes on."""
    for end in ("quit\nx\n", "exit\nx\n", "  quit  \nx\n", "/quit\nx\n", "", "quit"):
        result = cli("chat", "-n", 0, stdin=f"the\n{end}")
        assert result.status == 0 and result.out == "the\n", end


def test_help(model, cli):
    """Catches a command without help, and a setting that /show does not explain."""
    err = chat(cli, "/help", "/show")[1]
    listing, settings = (" ".join(m.split()) for m in err.split("Prompt: ")[1:3])
    for name in "help set show regen more read model probs why attn tokens quit".split():  # noqa: SIM905
        assert re.search(rf"/{name}( [A-Z\[]+\]?)* [a-z]", listing, re.IGNORECASE), name
    assert '"""' in listing and "Ctrl-C" in listing
    for name in "temperature top-k top-p min-p repetition-penalty max-new stop seed".split():  # noqa: SIM905
        assert re.search(rf"{name} [\w.]+ \w+ \w+", settings), name


def test_views_and_answers_follow_the_session(model, tiny, cli):
    """Catches a view of another prompt, answer or setting, and answers of the model before."""
    lines = "first|second|/set top-k 3|/tokens|/probs|/attn|/why|/probs third|/why it".split("|")  # noqa: SIM905
    tokens, probs, attn, why, other, given = chat(cli, *lines)[1].split("Prompt: ")[4:10]
    assert "s e c o n d" in re.sub(" +", " ", tokens) and "after 'second" in why
    assert "After 'second'" in probs and "top-k 3" in probs and "After 'third'" in other
    assert "characters: 2," in given and "second" not in given
    assert [row[1] for row in attn.splitlines()[3:]] == list("second")
    other = random_model(tiny, "other model.safetensors", CHARACTERS, scale=0.3)
    out, _ = chat(cli, "the", "/model other model.safetensors", "/regen", options=["--seed", 1])
    assert out.endswith(f"\nthe{other.generate('the', max_new=20, seed=1)}\n")


def screen(text: str) -> list[str]:
    """Lines that a terminal shows, of the escape sequences those that a line editor needs."""
    rows, row, column = [""], 0, 0
    pattern = r"\x1b\[([\d;?]*)([a-zA-Z])|\x1b[=>]|([^\x1b])"
    for found in re.finditer(pattern, text, re.DOTALL):
        n, move, c = int(found[1]) if (found[1] or "").isdigit() else 1, found[2], found[3]
        row += {"A": -n, "B": n}.get(move, 0) + (c == "\n")
        column = max(0, column + {"C": n, "D": -n}.get(move, 0) - (c == "\b")) * (c != "\r")
        if move in ("J", "K"):
            rows[row:] = [rows[row][:column], *(rows[row + 1 :] if move == "K" else [])]
        rows += [""] * (row + 1 - len(rows))
        if c and c not in "\r\n\b":
            rows[row] = rows[row][:column].ljust(column) + c + rows[row][column + 1 :]
            column += 1
    return [line.rstrip() for line in rows]


def test_transcript_to_the_letter(model, tmp_path):
    """Catches anything else on the screen of a user who types a prompt and `quit`."""
    child = Terminal("-n", 30, "--temperature", 0, XDG_STATE_HOME=str(tmp_path))
    seen = ""
    for wait, keys in (("Prompt:", "the\r"), ("Response: the[^P]*Prompt:", "quit\r")):
        child.expect(wait)
        seen += child.before + child.after
        child.send(keys)
    assert child.end() == 0
    answer = "the" + model.generate("the", max_new=30, temperature=0.0)
    lines = screen(seen + child.before)
    at = lines.index(OPENING[1]) - 1
    expected = [*OPENING, "Prompt: the", *f"Response: {answer}".split("\n"), "Prompt: quit", ""]
    assert lines[at:] == [line.rstrip() for line in expected]
    assert lines[0].startswith("model.safetensors: ") and "/help" in " ".join(lines[:at])


def test_keys(model, tmp_path):
    """Catches an editing key, a paste, Tab, Up, Ctrl-R or Ctrl-C that does not do its work, and a
    history that others can read or that the next session does not have."""
    Path("letter.txt").write_text("dear watson\n")
    child = Terminal("chat", "-n", 0, XDG_STATE_HOME=str(tmp_path))
    child.expect("Prompt:")
    cases = {
        "ac\x1b[Db\r": "abc", "bc\x01a\x05d\r": "abcd", "one two\x17x\r": "one x",
        "\x1b[200~one\ntwo\x1b[201~x\r": "one\ntwox", '"""one\rtwo\r"""\r': "one\ntwo",
        "half\x03the\r": "the", "\x1b[A\r": "the", "\x12one x\r\r": "one x",
        '"""half\r\x03tmp\r': "tmp",
    }  # fmt: skip
    for keys, prompt in cases.items():
        child.send(keys)
        child.expect("Response: ")
        child.expect("Prompt:")
        shown = screen(child.before)
        assert shown[: prompt.count("\n") + 1] == prompt.split("\n"), (keys, shown)
    cases = (
        ("/sho", "w", "\r", "repetition-penalty"),
        ("/set temp", "erature", " 0.5\r", "temperature 0.5"),
        ("/rea", "d", "\r", "usage: /read FILE"),
        ("/mod", "el", "\r", "usage: /model FILE"),
        ("/read let", "ter.txt", "\r", "Response: dear watson"),
    )
    for keys, completed, more, words in cases:
        child.press(keys + "\t", completed)
        child.press(more, words)
        child.expect("Prompt:")
    child.press("\x03", "quit or Ctrl-D")
    child.expect("Prompt:")
    child.send("/set max-new 1000000\r")
    child.expect("Prompt:")
    for _ in range(2):
        child.send("run\r")
        child.expect("Response: run....")
        child.press("\x03", "Prompt:")
    child.send("/why\r")
    child.expect("bits/char")
    child.expect("Prompt:")
    child.send("\x04")
    assert child.end() == 0
    path = tmp_path / "anexa" / "history"
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    child = Terminal("chat", "-n", 0, XDG_STATE_HOME=str(tmp_path))
    child.expect("Prompt:")
    child.send("\x1b[A\x1b[A\r")
    child.expect("Response: run")
    os.kill(child.program, 1)  # the window is closed
    with pytest.raises(pexpect.EOF):
        child.expect("nothing more")
    assert "Traceback" not in child.before


def test_hasty_ctrl_c(model, tmp_path):
    """Catches a Ctrl-C that interrupts prompt_toolkit while it starts or ends, or what handles the
    Ctrl-C before it: a traceback, or the end of the session."""
    child = Terminal("chat", "-n", 1_000_000, XDG_STATE_HOME=str(tmp_path))
    for _ in range(5):
        child.expect("Prompt:")
        child.send("run\r")
        child.expect("Response: run....")
        for _ in range(20):
            child.send("\x03")
            time.sleep(0.002)
    child.expect("Prompt:")
    child.press("/show\r", "repetition-penalty")
    child.expect("Prompt:")
    child.send("\x04")
    assert child.end() == 0


def test_ctrl_c_while_another_is_handled(model, cli, monkeypatch):
    """The same without a terminal, at the worst moment."""
    lines = iter(["", "the"])
    log = anexagpt.log

    def read_line():
        line = next(lines, "quit")
        if not line:
            signal.raise_signal(signal.SIGINT)
        return line

    def log_and_press(text="", *rest):
        log(text, *rest)
        if "to leave" in text:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(anexagpt, "read_line", read_line)
    monkeypatch.setattr(anexagpt, "log", log_and_press)
    result = cli("chat", "-n", 0)
    assert result.status == 0 and result.out == "the\n" and "to leave" in result.err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_menu_of_completions(model, tmp_path):
    """Catches Ctrl-C in a menu that is a traceback, a control character in it, a name that cannot
    be chosen or typed, a folder that is not entered, and a menu within a prompt."""
    for i in range(300):
        Path(f"text_{i}.txt").touch()
    Path("text_\x1b[2J").touch()
    Path("folder").mkdir()
    Path("folder/only.txt").write_text("dear watson")
    Path("folder/only\udce9.txt").touch()
    child = Terminal("chat", "-n", 0, rows=10, XDG_STATE_HOME=str(tmp_path))
    child.expect("Prompt:")
    child.press("/read te\t", "text_1.txt")
    shown = child.before
    child.press("\x03", "quit or Ctrl-D")
    child.expect("Prompt:")
    child.press("/read fol\t", "der/")
    child.press("\t", "only.txt")
    child.press("\r", "Response: dear watson")
    child.expect("Prompt:")
    child.press("the/\tx\r", "Response: the/x")
    child.expect("Prompt:")
    child.send("\x04")
    assert child.end() == 0
    assert "Traceback" not in child.before and "^[" in shown and "\x1b[2J" not in shown


def test_terminals_without_colours_or_cursor(model, tmp_path):
    """Catches escape sequences on a dumb terminal, colours under NO_COLOR, and a wrong width."""
    child = Terminal("chat", "-n", 3, TERM="dumb", XDG_STATE_HOME=str(tmp_path))
    for keys, words in {"thx\x7fe\r": "Response: the", "half\x03": "quit or Ctrl-D"}.items():
        child.expect("Prompt:")
        child.press(keys, words)
        assert "\x1b" not in child.before
    child.send("\x04")
    assert child.end() == 0 and "\x1b" not in child.before
    child = Terminal("explain", "the", NO_COLOR="1", columns=50)
    assert child.end() == 0 and not re.search(r"\x1b\[[\d;]*[34]\d", child.before)
    rows = screen(child.before)
    assert any("█" in row for row in rows) and max(map(cell_len, rows)) <= 50
    assert "\x1b[" in Terminal("explain", "the").read()


def test_read_of_a_pipe(model, cli):
    """Catches a chat that waits for whoever may write into a pipe."""
    os.mkfifo("pipe")
    opener = threading.Timer(5, lambda: os.close(os.open("pipe", os.O_RDWR)))
    opener.daemon = True
    opener.start()
    started = time.monotonic()
    assert "/read pipe: no such file" in cli("chat", stdin="/read pipe\n").err
    assert time.monotonic() - started < 5
    opener.cancel()
