"""Docs and project: links, commands, code blocks and quoted messages against the program."""

import argparse
import ast
import code
import dataclasses
import functools
import hashlib
import inspect
import json
import math
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, prose

sys.path.insert(0, str(ROOT / "docs"))
import blocks
import browser
import exercises
import pictures
import quotes

import anexagpt
from anexagpt import GPTConfig, TrainConfig

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += [ROOT / "tests" / "benchmarks" / "README.md"]
TEXTS = {path: path.read_text(encoding="utf-8") for path in PAGES if path.exists()}
FENCE = re.compile(r"^( *)```(.*)\n((?:.*\n)*?)\1```$", re.MULTILINE)
SCRIPT = (ROOT / "anexagpt.py").read_text(encoding="utf-8")
TREE = ast.parse(SCRIPT)


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", text))


def test_links():
    """Catches a link to a page, picture or heading that is not there, a page or picture that no
    page links to, and a picture without its dark version or without a text for the blind."""
    linked = set()
    for page, text in TEXTS.items():
        targets = re.findall(r"\]\(([^)\s]+)\)", without_code(text).replace("[]", "[x]"))
        for target in targets + re.findall(r'src(?:set)?="([^"]+)"', text):
            if target.startswith(("http://", "https://")):
                continue
            name, _, anchor = target.partition("#")
            path = (page.parent / name).resolve() if name else page
            assert path.exists(), (page.name, target)
            linked.add(path.resolve())
            headings = re.findall(r"^#+ (.+)$", FENCE.sub("", TEXTS.get(path, "")), re.MULTILINE)
            names = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
            assert not anchor or anchor in names, (page.name, target)
        for element in re.findall("(?s)<picture>.*?</picture>", text):
            dark, alt, light = re.fullmatch(
                r'<picture>\n<source media="\(prefers-color-scheme: dark\)" srcset="(.+)">\n'
                r'<img alt="([^"]{30,})" src="(.+)">\n</picture>',
                element,
            ).groups()
            assert dark == light.replace(".svg", "-dark.svg"), (page.name, alt)
    made = [*(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "pictures").glob("*.svg")]
    assert not [path.name for path in made if path.resolve() not in linked]


def commands(text: str) -> list[list[str]]:
    """Script and arguments of each command line and code span of a page."""
    found, start = [], r"(\s{4,}|\$ |!|)\s*(pip [^&]*&& |echo [^|]*\| )?python \S+\.py"
    for span in re.findall(r"`([^`\n]*)`", FENCE.sub("", text)) + text.splitlines():
        if re.match(start, span):
            span = span[span.index("python ") + 7 :].split("|")[0].split(">")[0]
            found.append(shlex.split(span, comments=True))
    return found


def test_commands_and_options(cli):
    """Catches a command that the program refuses, and an option or script that does not exist."""
    options, n = {}, 0
    for command in (
        "run",
        "train",
        "chat",
        "generate",
        "explain",
        "eval",
        "info",
        "export",
        "push",
    ):
        options[command] = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", cli(command, "--help").out))
    known = set.union(*options.values()) | {
        "--version",
        "--index-url",
        "--ignore-eos",
        "--nproc-per-node",
        "--max-restarts",
        "--with-requirements",
    }
    for page, text in TEXTS.items():
        for script, *words in commands(text):
            folder = ROOT if "/" in script or script == "anexagpt.py" else page.parent
            assert (folder / script).exists(), (page.name, script)
            at = words.index("--") if "--" in words else len(words)  # what follows is no option
            given = {word for word in words[:at] if re.match("--?[a-z]", word)}
            if script == "docs/exercises.py":
                assert set(words) <= set(exercises.EXERCISES), words
            elif script != "anexagpt.py":
                source = (folder / script).read_text(encoding="utf-8")
                assert all(f'"{option}"' in source for option in given), (page.name, words)
            elif "COMMAND" not in words and words != ["--version"]:
                n += 1
                command = words[0] if words and words[0] in options else "run"
                assert given <= options[command] | {"--help"}, (page.name, words)
                before = [word for word in words[:at] if word not in ("...", "--help")]
                assert cli(*before, "--help", *words[at:]).status == 0, (page.name, words)
        if page.name in ("README.md", "chat.md", "troubleshooting.md", "export.md"):
            assert set(re.findall(r"`(--[a-z][\w-]*)[ `]", text)) <= known, page.name
    assert n > 20


def same_output(told: str, found: str, roughly: bool) -> bool:
    """Equal but for the last digit of numbers; roughly: but for a quarter of them and for words."""
    number, texts = r"-?\d+\.\d+", [re.sub(r" +", " ", text).strip() for text in (told, found)]
    words = [re.sub(rf" *{number}", "N", text) for text in texts]
    a, b = (re.findall(number, text) for text in texts)
    return (
        (roughly or words[0] == words[1])
        and len(a) == len(b)
        and all(
            abs(float(x) - float(y))
            <= (abs(float(x)) / 4 + 0.3 if roughly else 1.5 * 10 ** -len(x.split(".")[1]))
            for x, y in zip(a, b, strict=True)
        )
    )


@pytest.mark.parametrize(
    "name, at_least",
    [("new_architecture", 15), ("training", 5), ("idea", 1), ("journey", 12)],
    ids=str,
)
def test_pages_as_they_are_pasted(name, at_least, tmp_path, monkeypatch):
    """Catches a block that fails in Python's prompt, as one whose loop has no empty line after it,
    or that prints something else than the page says."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    results = blocks.run(TEXTS[ROOT / "docs" / f"{name}.md"])
    torch.set_num_threads(threads)
    torch.set_printoptions(profile="default")
    wrong = [
        f"{r.block}printed\n{r.printed}{r.errors}"
        for r in results
        if r.errors or not same_output(r.expected, r.printed, r.language == "text about")
    ]
    assert len(results) >= at_least and not wrong, "\n".join(wrong)


def test_outputs_are_compared():
    """Catches a comparison of outputs that lets everything pass."""
    assert same_output("a 1.234 b", "a 1.235 b", False) and not same_output("a", "b", False)
    assert not same_output("a 1.234", "a 1.237", False) and not same_output("", "1.2", False)


def test_readme_in_a_notebook(tmp_path, monkeypatch):
    """Catches lines of the README's notebook section that do not run as they stand there, or do
    not give what their comments say. Only the size of the run is smaller, and the stored download
    that they find is a made-up text."""
    section = TEXTS[ROOT / "README.md"].partition("## In a notebook")[2].partition("\n## ")[0]
    (block,) = [block for _, language, block in FENCE.findall(section) if language == "python"]
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    stored = Path("data/anexa-sherlock.txt")
    stored.write_text(prose(4_000) + "It was a dark night", encoding="utf-8", newline="\n")
    digest = hashlib.sha256(stored.read_bytes()).hexdigest()
    stored.with_suffix(".sha256").write_text(digest)
    small = dict(n_layer=1, n_head=2, n_embd=16, block_size=32, batch_size=4, max_steps=100)
    small_train = functools.partial(anexagpt.train, device="cpu", **small)
    monkeypatch.setattr(anexagpt, "train", small_train)

    names = {"__name__": "__main__"}
    found, errors = blocks.pasted(block, code.InteractiveConsole(names))
    assert "Traceback" not in errors and "100/100" in errors, errors
    model = names["model"]
    assert len(re.findall(r"(?m)^Model: .* trained on sherlock for 100 steps", found)) == 1
    assert "▁" in found and "(1, 2, 8, 8)" in found
    assert names["p"].shape == (len(model.tokenizer),) and abs(names["p"].sum() - 1) < 1e-5
    assert f"\n{model.tokenizer.characters[names['p'].argmax()]} " in found
    load = re.search(r"`model = (anexagpt\.load\(.+?\))`", section)[1]
    again = blocks.pasted(load, code.InteractiveConsole({"anexagpt": anexagpt}))
    assert again == (f"{model}\n", "")
    for word in re.findall(r"`(\w+)`", section.partition("Options of")[2].partition(".")[0]):
        known = {f.name for cls in (GPTConfig, TrainConfig) for f in dataclasses.fields(cls)}
        assert word in known | {*inspect.signature(small_train.func).parameters, "size"}, word


def test_readme_session_is_real():
    """Catches a session in the README that the default model did not write."""
    figures = json.loads((ROOT / "docs/pictures/figures.json").read_text(encoding="utf-8"))
    screen = re.sub(r"\x1b\[[0-9;]*m", "", figures["model"]["chat"])
    lines = [line.rstrip() for line in screen.splitlines()]
    (session,) = re.findall("```text\n(.+?)```", TEXTS[ROOT / "README.md"], re.DOTALL)
    session = [line.rstrip() for line in session.splitlines()]
    start = lines.index(session[0])
    assert len(session) > 8 and lines[start : start + len(session)] == session
    assert "--seed 4" in TEXTS[ROOT / "README.md"] and "seed=4" in inspect.getsource(pictures)


@pytest.mark.parametrize("name", exercises.EXERCISES)
def test_exercises(name, capsys):
    """Catches a solution that is no longer true; each stops with an error then."""
    exercises.EXERCISES[name]()
    assert capsys.readouterr().out
    assert f"docs/exercises.py {name}" in TEXTS[ROOT / "docs" / "reading.md"]


def test_reading_follows_the_program():
    """Catches a section that the path of reading.md leaves out or has in another order."""
    sections = re.findall(r"^# ---- (.+?) -+$", SCRIPT, re.MULTILINE)
    path = TEXTS[ROOT / "docs" / "reading.md"].partition("## The papers")[0]
    places = [path.index(f"`{name}`") for name in sections]
    assert len(sections) >= 13 and places == sorted(places)
    rows = re.findall(r"(?m)^\| (.+?) \| *(\d*) *\| ", path)
    names = [name for name, _ in rows]
    assert [name.strip("`") for name in names if name.startswith("`")] == sections
    cut = names.index("*divider*")
    for part, words in (
        (rows[:cut], "first part takes about"),
        (rows[cut + 1 :], "the second about"),
    ):
        assert f"{words} {sum(int(n) for _, n in part)}" in path
    assert SCRIPT.index("\nclass GPT(") < SCRIPT.index("# " + "=" * 50) < SCRIPT.index("def cmd_")


def test_readme_start_and_examples():
    """Catches a README of more than 200 lines, a Quick start that does not name Python's version
    and a virtual environment before what one copies, examples with files that nobody has, and a
    README and chat.md that do not say that each prompt is answered afresh (number 8)."""
    readme, chat = TEXTS[ROOT / "README.md"], TEXTS[ROOT / "docs" / "chat.md"]
    assert len(readme.splitlines()) <= 200
    start = readme.partition("## Quick start")[2]
    before = start[: start.index("\npython anexagpt.py")]
    for words in ("3.10", "venv", "CPU build after activating", "Scripts\\activate"):
        assert words in before, words
    assert "download.pytorch.org/whl/cpu" in start
    for text in (readme, chat):
        assert re.search(r"(afresh|forgotten|does not remember|no memory|on its own)", text)
    for line in readme.splitlines():
        names = re.findall(r"(?<=[ `])(?!requirements)[\w-]+\.txt\b", line)
        assert not names or "your" in line or ">" in line or "tests/" in line, line


def test_quoted_messages_exist():
    """Catches a message in troubleshooting.md that the program does not say (any more)."""
    trees = TREE, ast.parse(inspect.getsource(argparse))  # which writes some of them
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    strings = [node.value for node in nodes if isinstance(node.value, str)]
    strings += [n.value.decode(errors="replace") for n in nodes if isinstance(n.value, bytes)]
    page = TEXTS[ROOT / "docs" / "troubleshooting.md"].partition("## No message")[0]
    rows = re.findall(r"^\| (`.+?`) \| ", page, re.MULTILINE)
    missing = []
    for message in {m for row in rows for m in re.findall("`([^`]+)`", row)}:
        triples = []  # three words in a row; some triple holds no value of a user's
        for words in (part.split() for part in re.split("…|python-docs", message)):
            triples += [" ".join(words[i : i + 3]) for i in range(len(words) - 2)]
        if triples and not any(t.strip(" :;,.()'") in s for t in triples for s in strings):
            missing.append(message)
    assert len(rows) > 20 and not {*missing} - {"invalid int value"}, missing


def test_pictures_are_drawn_from_their_figures(tmp_path, monkeypatch):
    """Catches a picture that was changed by hand, or not drawn again after its figures changed."""
    monkeypatch.setattr(pictures, "FOLDER", tmp_path)
    pictures.draw(json.loads((ROOT / "docs/pictures/figures.json").read_text(encoding="utf-8")))
    drawn = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.glob("*.svg")}
    assert len(drawn) > 14
    for name, svg in drawn.items():
        assert svg == (ROOT / "docs" / "pictures" / name).read_text(encoding="utf-8"), name


def test_measured_numbers():
    """Catches a figure on a page that is not the measured one in figures.json, from which the
    pictures are drawn, or not what the program computes."""
    figures = json.loads((ROOT / "docs/pictures/figures.json").read_text(encoding="utf-8"))
    pages = {path.stem: text for path, text in TEXTS.items() if path.parent.name == "docs"}
    for name, loss in figures["baselines"].items():
        cells = f" | {loss:.2f} | {loss / math.log(2):.2f} | {math.exp(loss):.0f} |"
        assert re.search(rf"(?m)^\| {name}\b.*{re.escape(cells)}$", pages["new_architecture"])
        assert f"{loss:.2f}" in pages["idea"]
    for name, rows in figures["curves"].items():
        end = f"{rows[-1][1]:.3f}"
        assert end in pages["training"], (name, end)
        assert name == "Muon" or name.removeprefix("AdamW at ") in pages["training"]
    for value, sample in figures["model"]["samples"].items():
        row = f"| {value} | {' '.join(sample.split())} |"
        assert row in pages["new_architecture"], row
    gradient, update = figures["model"]["muon"]
    n = sum(0.6 <= s <= 1.4 for s in update)
    for words in (f"from {gradient[0]:.2f} to", f"{n} of the update's {len(update)}"):
        assert words in pages["training"], words
    default = GPTConfig(vocab_size=82)
    for page in ("new_architecture", "idea", "reading"):
        assert f"{default.n_parameters():,}" in pages[page]
    C, T = default.n_embd, default.block_size
    parts = [82 * C, T * C, default.n_layer * (12 * C * C + 13 * C), 2 * C]
    assert sum(parts) == default.n_parameters()
    for part in parts:
        assert f"| {part:,} |" in pages["new_architecture"]
    for name, words in (("medium", "10.8 million"), ("large", "86 million")):
        n = GPTConfig(vocab_size=82, **anexagpt.SIZES[name]).n_parameters() / 1e6
        assert (
            words in (f"{n:.1f} million", f"{n:.0f} million") and words in TEXTS[ROOT / "README.md"]
        )
    assert f"{10 * T + 10:,} characters" in pages["faq"]


@functools.lru_cache
def demo_model() -> anexagpt.Model:
    """The default model of this version, which is inside demo.html."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        path.write_bytes(browser.demo_model())
        return anexagpt.load(path)


def test_journey_is_true():
    """Catches sentences of journey.md that are not true of the model inside demo.html, and numbers
    in them that no block prints. (test_pages_as_they_are_pasted checks what the blocks print.)"""
    page = TEXTS[ROOT / "docs" / "journey.md"]
    printed = " ".join(block for _, language, block in FENCE.findall(page) if language == "text")
    for number in re.findall(r"\d+\.\d+(?=%| )|\d+(?=%)", without_code(page)):
        heads = ("1.2", "1.3", "1.4", "2.1", "2.2", "4.2")
        assert number in printed or number in ("6.18", *heads), number
    model = demo_model()
    text = "It was a "
    assert text in page
    rows = model.attention(text)[:, :, 8]  # (L, H, T), from the last position
    assert rows[0, 0, 7] > 0.9 and rows[0, 1, 6] > 0.9  # heads 1.1 and 1.2
    assert rows[0, 2:][:, [2, 6, 8]].sum(-1).min() > 0.9  # heads 1.3 and 1.4, the spaces
    assert np.argwhere(rows.argmax(-1) == 0).tolist() == [[1, 0], [1, 1], [3, 1]]
    assert rows[[1, 1, 3], [0, 1, 1], 0].max() < 0.355
    assert (rows[1:3].argmax(-1) == 8).sum() == 5
    longer = model.attention("We saw the door. It was a ")[[1, 1, 3], [0, 1, 1], -1]
    assert 17 not in longer.argmax(-1)  # the second I
    second, first = np.sort(np.log(rows[0, 0]))[-2:]
    assert abs(first - second - 6.18) < 0.005 and abs(math.exp(first - second) - 480) < 5
    elsewhere = model.attention("said Sherlock Holmes")[0]  # (H, T, T)
    assert elsewhere[0].diagonal(-1).min() > 0.9 and elsewhere[1].diagonal(-2).min() > 0.9

    names = model.tokenizer.characters
    x = model.network.embed(torch.tensor(model.tokenizer.encode(text)[None].astype("i8")))
    best, lengths, spaces = [], [], []
    for block in model.network.h:
        for part in (
            lambda x, block=block: block.attn(block.ln_1(x)),
            lambda x, block=block: block.mlp(block.ln_2(x)),
        ):
            logits = model.network.logits(x[0, 8])
            best.append([names[i] for i in logits.argsort().flip(0)[:5]])
            spaces.append(logits.softmax(0)[names.index(" ")].item())
            added = part(x)
            lengths.append(added[0, 8].norm().item())
            x = x + added
    best.append([names[i] for i in model.network.logits(x[0, 8]).argsort().flip(0)[:5]])
    assert best[0][0] == best[1][0] == " "
    assert not set("aeiou\n") & {name for names in best[2:] for name in names}
    assert spaces[2] < spaces[1] / 2
    assert "".join(names[0] for names in best[2:]) == "sssssc" + "s"
    assert max(lengths) == lengths[7]


def test_attention_maps_show_what_is_said():
    """Catches a picture of two heads that does not show what its captions and texts say."""
    figures = json.loads((ROOT / "docs/pictures/figures.json").read_text(encoding="utf-8"))
    text = figures["model"]["attention"]["text"]
    heads = figures["model"]["attention"]["heads"]
    assert list(heads) == ["1.1", "3.4"] == list(pictures.HEADS)
    preceding, start = (np.array(weights) for weights in heads.values())  # (T, T) each
    assert text == "\nIt was Sherlock Holmes" and preceding.diagonal(-1).min() > 0.9
    looks_at = [text[key] for key in start.argmax(1)]
    assert looks_at[9:17].count("S") >= 6 and set(looks_at[17:]) == set("SH")
    for name in ("idea", "new_architecture"):
        page = TEXTS[ROOT / "docs" / f"{name}.md"]
        alt = re.search('Attention maps of two heads[^"]+', page)[0]
        for words in ("before it", "most letters of Sherlock", "its own H, or"):
            assert words in alt, (name, words)


def test_architecture_names_what_exists():
    """Catches a place in the table under the picture of the network that the program lacks."""
    page = TEXTS[ROOT / "docs" / "new_architecture.md"]
    table = page.partition("| part of the picture |")[2].partition("\n\n")[0]
    places = re.findall(r"`([\w.]+)`", table)
    for place in places:
        assert functools.reduce(getattr, place.split("."), anexagpt), place
    assert len(places) > 8
    drawn = (ROOT / "docs" / "pictures" / "architecture.svg").read_text(encoding="utf-8")
    headings = {h.lower() for h in re.findall("(?m)^##+ (.+)$", page)}
    links = re.findall(r"new_architecture\.md#(\w+)", drawn)
    assert len(links) > 10 and set(links) <= headings


def test_embeddings_are_grouped():
    """Catches a map of the embeddings that no longer shows what the page says of it."""
    figures = json.loads((ROOT / "docs/pictures/figures.json").read_text(encoding="utf-8"))
    found = figures["model"]["embeddings"]
    points = dict(zip(found["characters"], np.array(found["points"]), strict=True))
    lowercase = sorted("abcdefghijklmnopqrstuvwxyz", key=lambda c: -points[c][3])
    assert set(lowercase[:6]) == set("aeiouy")
    groups = ["aeinrstlm", "ABCDEFGHJLMNOPRSTUVW", "123456789", ".,;!?"]
    for group in groups:  # nearer to its own center than to those of the others
        for c in group:
            distances = [np.linalg.norm((points[c] - mean(points, g))[:2]) for g in groups]
            assert np.argmin(distances) == groups.index(group), c


def mean(points: dict, characters: str) -> np.ndarray:
    return np.mean([points[c] for c in characters], axis=0)


@pytest.mark.parametrize(
    "title, words",
    [
        ("/probs: the next character", ["Sherlock", "--view", "probs", "--top-k", "5"]),
        ("/attn: attention", ["Sherlock Holmes", "--view", "attn", "--layer", "3", "--head", "4"]),
        ("/tokens: ids", ["Who’s at the café?", "--view", "tokens"]),
    ],
    ids=str,
)
def test_views_are_real(title, words, cli, tmp_path):
    """Catches examples of views in chat.md that the default model does not give (any more)."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(browser.demo_model())
    section = TEXTS[ROOT / "docs" / "chat.md"].partition(f"### {title}\n")[2].partition("\n### ")[0]
    told = re.match(r"\n((?:    .*\n)+)", section)[1]
    found = cli("explain", *words, "--model", path).out
    for pattern, tolerance in ((r"'.+?'(?= )", 0), (r"(?<![\w-])\d+(?:\.\d)?(?!\w)", 1.01)):
        a, b = (re.findall(pattern, text) for text in (told, found))
        assert len(a) == len(b), (a, b)
        if tolerance:
            assert all(abs(float(x) - float(y)) < tolerance for x, y in zip(a, b, strict=True))
        else:
            assert a == b


def test_views_of_a_session_are_real():
    """Catches views in chat.md and idea.md that are not those of the recorded session."""
    figures = json.loads((ROOT / "docs/pictures/figures.json").read_text(encoding="utf-8"))
    screen = re.sub(r"\x1b\[[0-9;]*m", "", figures["model"]["views"])
    session = [line.rstrip() for line in screen.splitlines()]
    section = TEXTS[ROOT / "docs" / "chat.md"].partition("### /why: surprise\n")[2]
    told = re.match(r"\n((?:(?:    .*)?\n)+)", section)[1].rstrip().splitlines()
    start = session.index(told[0].strip())
    assert [line[4:] for line in told] == session[start : start + len(told)] and len(told) > 8
    told = re.findall(r"(?m)^    ('.+' +\d+\.\d)$", TEXTS[ROOT / "docs" / "idea.md"])
    start = next(i for i, line in enumerate(session) if line.startswith(told[0]))
    assert len(told) == 5
    assert all(line.startswith(row) for row, line in zip(told, session[start:], strict=False))
    space, line_end = (row.split()[-1] for row in told[:2])
    assert f"math.log({space} / {line_end})" in TEXTS[ROOT / "docs" / "idea.md"]


def test_quoted_figures():
    """Catches a figure that stands on several pages and was changed on one of them, and one that
    benchmarks.md, or the model inside demo.html, no longer says."""
    figures = json.loads((ROOT / "docs/pictures/figures.json").read_text(encoding="utf-8"))
    benchmarks = TEXTS[ROOT / "docs" / "benchmarks.md"]
    computed = quotes.model_values()
    for name, quote in figures["quoted"].items():
        for page, phrases in quote["pages"].items():
            for phrase in phrases:
                text = TEXTS[ROOT / page]
                assert quotes.with_value(text, phrase, quote["value"]) == (text, 1), (name, phrase)
        if quote["source"] == "model":
            assert quote["value"] == computed.pop(name), name
        if quote["source"].startswith("docs/benchmarks.md"):
            measured = quote["source"].partition(": ")[2] or quote["value"]
            assert measured in benchmarks, name
            if measured != quote["value"]:
                assert abs(float(measured) - float(quote["value"])) < 0.006, name
    assert not computed


# Figures that neither the code nor figures.json knows, by page, with their source.
SOURCES = {
    "README": {
        "10.7 1.470 1.88 3.10 2.13 600 3.4": "nanoGPT's README; versions; sizes of the files",
        "2,570": "anexagpt.check_corpus",
        "1.5 40 671 37 14.8 2.788 32 15.5": "the reports that the table links",
    },
    "chat": {
        "100 5 6 20,000": "a sum; colors and limit of views: anexagpt.py and browser.html",
        "18.2": "Safari's first with Uint8Array.fromBase64",
    },
    "export": {"16 0.8 0.9 1.1": "Ollama's defaults; half precision"},
    "faq": {"0.5 13 100 2,570 100,000": "a suggestion; ratios of the sizes; limits"},
    "idea": {
        "2.4": "a logarithm of what the block computes",
        "1.25 1.26": "benchmarks.md, runs in float32",
    },
    "journey": {"6.18": "test_journey_is_true"},
    "new_architecture": {
        "88 1.41 4.24 2.12 6.4": "the worked example, which a block computes; 50,257 * 128",
        "0.0005 0.02 27 1.443 1.3 3.7 1.9 1.5": "GELU; GPT-2; the example of 1.3 nats",
        "20,000": "Trainer",
    },
    "old_architecture": {
        "1.3 3.11 3.13 40 29 28.9 29.5 6.4 43 180": "tests/benchmarks/old_architecture.py",
        "0.85 0.99": "Adam",
    },
    "reading": {
        "1 8 60 300 1.26 1.82 1.86 1.90 2.12 2.29 2.41 2.51 3.08 2,000 0.01 600": "runs in float32"
    },
    "training": {
        "0.0001 25,600 1.33 1.25 25 1.5 16": "muon, below; Trainer; benchmarks.md; resolve",
        "0.9 0.58": "Trainer.init_optimizers; the root of 128 / 384",
    },
    "troubleshooting": {
        "3.10 2.9 2.13 2.14": "versions of Python and PyTorch",
        "560,000 0.3 50 20 20,000 32": "the book; Trainer.fit; the page; LONG_TEXT",
    },
}
UNITS = "%|min|sec|ms|[MGk]B|char|nats|bits|steps|times|[mbtr]+illion|hours|parameters|epochs"


def test_every_figure_is_known():
    """Catches a figure in a sentence or table that is none of: printed by a block of that page,
    quoted from figures.json, computed from the code, listed in SOURCES."""
    figures = json.loads((ROOT / "docs/pictures/figures.json").read_text(encoding="utf-8"))
    config, cfg = GPTConfig(vocab_size=82), TrainConfig()
    known = {f"{value:,}" for value in (81, config.block_size, cfg.max_steps, 1_000)}
    cfg = anexagpt.resolve(cfg, config, 500_000, "cpu", torch.bfloat16)
    known |= {f"{anexagpt.SampleConfig().temperature}", "0.8", "0.02", f"{cfg.learning_rate}"}
    for size, digits in (("medium", 1), ("large", 0)):
        n = GPTConfig(vocab_size=82, **anexagpt.SIZES[size]).n_parameters()
        known.add(f"{n / 1e6:.{digits}f}")
    for loss in figures["baselines"].values():
        known |= {f"{loss:.2f}", f"{loss / math.log(2):.2f}", f"{math.exp(loss):.0f}"}
    for name, rows in figures["curves"].items():
        known |= {name.rpartition(" ")[2], f"{rows[-1][1]:.3f}"}
    gradient, _ = figures["model"]["muon"]
    known |= {f"{gradient[0]:.2f}", "0.6", "1.4", f"{figures['learning']['losses'][0][1]:.2f}"}
    figure = rf"(?<![\w.,#-])(?:\d[\d,]*\.\d+|\d[\d,]*\d(?= ?(?:{UNITS}))|\d(?= ?(?:{UNITS})))"
    unknown, unused = [], []
    for path, text in TEXTS.items():
        if path.stem == "benchmarks" or path.parent.name == "benchmarks":
            continue  # the source of the others
        prose = re.sub(r"\]\(\S*\)", "]", without_code(text))
        prose = re.sub("(?m)^    .*$", "", prose)
        printed = " ".join(block for _, _, block in FENCE.findall(text))
        for quote in figures["quoted"].values():
            if any(page.endswith(path.name) for page in quote["pages"]):
                printed += " " + quote["value"]
        printed = set(re.findall(r"\d+(?:,\d{3})*(?:\.\d+)?", printed))
        sourced = {n for group in SOURCES.get(path.stem, {}) for n in group.split()}
        found = set(re.findall(figure, prose))
        unknown += [(path.name, n) for n in found - known - printed - sourced]
        unused += [(path.name, n) for n in sourced - found]
    assert not unknown, "\n".join(map(str, sorted(unknown)))
    assert not unused, unused


def pins(name: str) -> list[str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith(("#", "-r"))]


def imported(tree) -> set[str]:
    """Top-level modules that a file imports, except Python's own."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module for n in nodes if isinstance(n, ast.ImportFrom)}
    return {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)


def test_requirements():
    """Catches `uv run` and `pip install` that install different versions, a dependency without an
    exact one, and an import that nobody installs."""
    toml = re.search(r"(?m)^# /// script\n((?:#.*\n)+?)# ///$", SCRIPT)[1].replace("# ", "")
    assert 'requires-python = ">=3.10"' in toml
    assert re.findall('"([^"]+)",', toml) == pins("requirements.txt")
    ours, tests = pins("requirements.txt"), pins("tests/requirements.txt")
    assert "torch==2.13.0" in ours
    for pin in ours + tests:
        assert re.fullmatch(r"[\w.-]+==[\d.]+(; python_version .*)?", pin), pin
    assert imported(TREE) <= {pin.split("==")[0].replace("-", "_") for pin in ours}
    own = {path.stem for path in [*(ROOT / "docs").glob("*.py"), *(ROOT / "tests").rglob("*.py")]}
    installed = {pin.split("==")[0].replace("-", "_") for pin in ours + tests}
    for path in (ROOT / "tests").glob("test_*.py"):
        found = imported(ast.parse(path.read_text(encoding="utf-8")))
        assert found - own - {"anexagpt"} <= installed, (path.name, found - own - installed)


def test_nothing_runs_foreign_code():
    """Catches pickle, eval and exec: a model file is data."""
    forbidden = {"pickle", "marshal", "shelve", "dill", "joblib"}
    for node in ast.walk(TREE):
        assert not isinstance(node, ast.Global)
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            assert not {alias.name for alias in node.names} & forbidden
        if isinstance(node, ast.Name):
            assert node.id not in ("eval", "exec", "compile", "__import__")
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "torch":
            assert node.attr not in ("load", "save")


def test_files():
    """Catches tabs, Windows line ends, other top-level entries, another license."""
    for path in [ROOT / "anexagpt.py", *Path(__file__).parent.glob("*.py")]:
        raw = path.read_bytes()
        assert b"\r" not in raw and b"\t" not in raw and raw.endswith(b"\n"), path
    assert (ROOT / "LICENSE").read_text(encoding="utf-8").startswith("MIT License")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    entries = {line.strip('"').split("/")[0] for line in listed.stdout.splitlines()}
    expected = {"anexagpt.py", "requirements.txt", "README.md", "LICENSE", "docs", "tests"}
    assert listed.returncode or entries == expected | {".gitignore", ".ci", ".ruff.toml"}
