"""The pages: their links, commands, code blocks, quoted messages and pictures, against the program as it is."""

import ast
import io
import json
import re
import shlex
import sys
from contextlib import redirect_stdout

import pytest
from conftest import ROOT

import anexagpt

sys.path.insert(0, str(ROOT / "docs"))
import exercises
import pictures

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "tests" / "benchmarks" / "README.md"]
TEXTS = {path: path.read_text(encoding="utf-8") for path in PAGES}
FENCE = re.compile(r"^( *)```(.*)\n((?:.*\n)*?)\1```$", re.MULTILINE)
SOURCE = ast.parse((ROOT / "anexagpt.py").read_text(encoding="utf-8"))


def prose(text: str) -> str:
    """A page without its code, blocks and spans."""
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", text))


def anchors(text: str) -> set[str]:
    """The names that headings can be linked by, as GitHub makes them: lower case, dashes, no punctuation."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links(page):
    """Catches a link to a page, a picture or a heading that is not there."""
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(TEXTS[page]).replace("[]", "[x]")):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(TEXTS[path]), target


def test_every_page_and_picture_is_reached():
    """Catches a page that no other links to, and a picture that none shows."""
    linked = {
        (page.parent / target.partition("#")[0]).resolve()
        for page, text in TEXTS.items()
        for target in re.findall(r"\]\(([^)\s]+)\)", prose(text))
    }
    made = [*(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "pictures").glob("*.svg")]
    assert not [path.name for path in made if path.resolve() not in linked]


def commands(text: str) -> list[str]:
    """What follows `python` and a script's name, wherever a page has it: up to the end of the line or of the code."""
    found = []
    for span in re.findall(r"`([^`\n]*)`", FENCE.sub("", text)) + text.splitlines():
        if re.match(r"(\s{4,}|\$ |!|)\s*(pip [^&]*&& |echo [^|]*\| )?python \S+\.py", span):
            found += [span[span.index("python ") + 7 :]]
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_commands(page, capsys):
    """Catches a command in a page that the program would refuse, and a script that is not there."""
    for command in commands(TEXTS[page]):
        script, *words = shlex.split(command.split("|")[0].split(">")[0], comments=True)
        options = [word for word in words if word.startswith("-")]
        folder = ROOT if "/" in script or script == "anexagpt.py" else page.parent
        assert (folder / script).exists(), command
        if script == "docs/exercises.py":
            assert set(words) <= set(exercises.EXERCISES), command
        elif script != "anexagpt.py":
            source = (folder / script).read_text(encoding="utf-8")
            assert all(f'"{option}"' in source for option in options), command
        elif "COMMAND" not in words:
            try:
                anexagpt.parse_options([word for word in words if word != "..."])
            except SystemExit as leave:
                assert not leave.code, (command, capsys.readouterr().err)


def test_commands_are_found():
    """Catches a pattern that finds no commands, so that the test above would see nothing."""
    assert commands("    python anexagpt.py x\nand `python a.py y` so\n$ python b.py\n") == [
        "a.py y",
        "anexagpt.py x",
        "b.py",
    ]
    assert sum(len(commands(text)) for text in TEXTS.values()) > 50


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_python_blocks_are_python(page):
    """Catches a block that does not even compile; what the blocks do is tested page by page."""
    for _, language, block in FENCE.findall(TEXTS[page]):
        if language == "python":
            compile(block, page.name, "exec")


NUMBER = re.compile(r"-?\d+\.\d+")


def alike(told: str, found: str, roughly: bool) -> bool:
    """Whether two outputs are the same but for the last digit of numbers; roughly: but for a quarter, and for words."""
    told, found = (re.sub(r" +", " ", text) for text in (told, found))
    close = len(NUMBER.findall(told)) == len(NUMBER.findall(found)) and all(
        abs(float(a) - float(b)) <= (0.25 * abs(float(a)) + 0.3 if roughly else 1.5 * 10 ** -len(a.split(".")[1]))
        for a, b in zip(NUMBER.findall(told), NUMBER.findall(found), strict=True)
    )
    return close and (roughly or NUMBER.sub("N", told).replace(" N", "N") == NUMBER.sub("N", found).replace(" N", "N"))


def test_new_architecture_runs():
    """Catches a block of new_architecture.md that no longer runs, or prints something else than the page says."""
    blocks = FENCE.findall(TEXTS[ROOT / "docs" / "new_architecture.md"])
    names: dict = {"__name__": "new_architecture"}
    ran = 0
    for (_, language, block), (_, after, told) in zip(blocks, [*blocks[1:], ("", "", "")], strict=True):
        if language != "python":
            continue
        printed, ran = io.StringIO(), ran + 1
        with redirect_stdout(printed):
            exec(compile(block, f"block {ran} of new_architecture.md", "exec"), names)
        found = re.sub(r" +$", "", printed.getvalue(), flags=re.MULTILINE)
        told = told if after.startswith("text") else ""
        assert alike(told, found, after == "text about"), f"block {ran} printed\n{found}\nthe page says\n{told}"
    assert ran > 25


def test_alike():
    """Catches a comparison that lets anything pass."""
    assert alike("a 1.234 b\n", "a  1.235 b\n", False) and not alike("a 1.234\n", "a 1.237\n", False)
    assert not alike("a 1.2\n", "b 1.2\n", False) and not alike("", "1.2\n", False)
    assert alike("so 2.0\n", "or 2.3\n", True) and not alike("so 2.0\n", "so 3.0\n", True)


@pytest.mark.parametrize("name", exercises.EXERCISES)
def test_exercises(name, capsys):
    """Catches a solution that is no longer true; each of them stops with an error then."""
    exercises.EXERCISES[name]()
    assert capsys.readouterr().out
    assert f"python docs/exercises.py {name}" in TEXTS[ROOT / "docs" / "reading.md"]


def test_path_of_the_reader():
    """Catches a section of the program that the path of reading.md leaves out, or has in another order."""
    sections = re.findall(r"^# ---- (.+?) -+$", (ROOT / "anexagpt.py").read_text(encoding="utf-8"), re.MULTILINE)
    path = TEXTS[ROOT / "docs" / "reading.md"].partition("## The papers")[0]
    places = [path.index(f"`{name}`") for name in sections]
    assert places == sorted(places)


# ---- messages --------------------------------------------------------------------------------------------------------


def template(node) -> str:
    """A string of the program with … for what is filled in."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else "…"
    if isinstance(node, ast.JoinedStr):
        return re.sub("…+", "…", "".join(map(template, node.values)))
    return "…"


def matches(told: str, said: str) -> bool:
    """Whether all pieces of the told message stand in the said one, in order."""
    pieces = [piece for piece in told.split("…") if piece.strip()]
    return re.search(".*".join(map(re.escape, pieces)), said, re.DOTALL) is not None


def told_messages() -> list[str]:
    """The code in the first column of the tables of troubleshooting.md, but for what is Python's."""
    page = TEXTS[ROOT / "docs" / "troubleshooting.md"].partition("## No message at all")[0]
    rows = re.findall(r"^\| (.+?) \| ", page, re.MULTILINE)
    return [code for row in rows for code in re.findall(r"`([^`]+)`", row) if not code.startswith("ModuleNotFound")]


def test_messages_in_troubleshooting_exist():
    """Catches a message in troubleshooting.md that the program does not say any more."""
    said = [template(node) for node in ast.walk(SOURCE) if isinstance(node, (ast.Constant, ast.JoinedStr))]
    for told in told_messages():
        assert any(matches(told, text) for text in said), told


def test_messages_of_the_program_are_in_troubleshooting():
    """Catches an error or a note that a person can get and troubleshooting.md does not explain."""
    told, missing = told_messages(), []
    for node in ast.walk(SOURCE):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        name, said = getattr(node.func, "id", ""), template(node.args[0])
        if name in ("UserError", "DownloadError") or (name == "say" and said.startswith("NOTE")):
            words = max(said.split("…"), key=len).strip(" :;()")
            if len(words) > 3 and not any(matches(text, said) and len(text) > 3 for text in told):
                missing.append(said)
    assert not missing, "explain these in docs/troubleshooting.md:\n" + "\n".join(missing)


# ---- pictures --------------------------------------------------------------------------------------------------------


def test_pictures_are_drawn_from_their_figures(tmp_path, monkeypatch):
    """Catches a picture that was changed by hand, or not drawn again after its figures or the script changed."""
    monkeypatch.setattr(pictures, "FOLDER", tmp_path)
    pictures.draw(json.loads((ROOT / "docs" / "pictures" / "figures.json").read_text(encoding="utf-8")))
    drawn = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.glob("*.svg")}
    assert len(drawn) == 7
    for name, svg in drawn.items():
        assert svg == (ROOT / "docs" / "pictures" / name).read_text(encoding="utf-8"), name
