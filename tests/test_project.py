"""Project: what the house promises about its files."""

import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT

SCRIPT = (ROOT / "anexagpt.py").read_text(encoding="utf-8")
TREE = ast.parse(SCRIPT)


def pins(name: str) -> list[str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith(("#", "-r"))]


def test_requirements_of_the_script():
    """Catches `uv run` and `pip install` that install different versions: the PEP 723 block equals requirements.txt."""
    block = re.search(r"(?m)^# /// script\n((?:#.*\n)+?)# ///$", SCRIPT)[1]
    toml = "\n".join(line[2:] for line in block.splitlines())
    assert re.search(r'requires-python = ">=3\.10"', toml)
    assert re.findall(r'^ +"(.+)",$', toml, re.MULTILINE) == pins("requirements.txt")


def test_pins():
    """Catches a dependency without an exact version, and another PyTorch than the one that was measured."""
    assert "torch==2.13.0" in pins("requirements.txt")
    assert (ROOT / "tests/requirements.txt").read_text(encoding="utf-8").startswith("-r ../requirements.txt\n")
    for pin in pins("requirements.txt") + pins("tests/requirements.txt"):
        assert re.fullmatch(r"[\w.-]+==[\d.]+(; python_version .*)?", pin), pin


def imported(tree) -> set[str]:
    """Top-level modules that a file imports, except Python's own."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names)


def test_what_is_imported_is_required():
    """Catches an import that only works where somebody else installed the package."""
    brought = {"urllib3"}  # by requests, whose retries are set with it
    optional = {"huggingface_hub", "gguf", "tensorboard"}  # imported where used, with a hint
    assert imported(TREE) - brought - optional <= {pin.split("==")[0] for pin in pins("requirements.txt")}
    wanted = {pin.split("==")[0] for pin in pins("requirements.txt") + pins("tests/requirements.txt")}
    own = {"anexagpt"} | {path.stem for folder in ("docs", "tests") for path in (ROOT / folder).rglob("*.py")}
    for path in (ROOT / "tests").glob("test_*.py"):
        found = imported(ast.parse(path.read_text(encoding="utf-8")))
        assert found - own - brought <= wanted, path.name


def test_top_level_entries():
    """Catches files that gather at the top level, and ones that are missing."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError:
        pytest.skip("no git here")
    if listed.returncode:
        pytest.skip("not a git checkout")
    entries = {line.strip('"').split("/")[0] for line in listed.stdout.splitlines()}
    expected = {"anexagpt.py", "requirements.txt", "README.md", "LICENSE", "docs", "tests"}
    assert entries == expected | {".gitignore", ".ci", ".ruff.toml"}


def test_nothing_that_runs_foreign_code():
    """Catches pickle, eval and exec: a model file is data, and reading it may never run anything."""
    forbidden = {"pickle", "marshal", "shelve", "dill", "joblib"}
    assert not imported(TREE) & forbidden
    for node in ast.walk(TREE):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            assert not {alias.name for alias in node.names} & forbidden
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec", "compile", "__import__")
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            assert node.attr not in ("load", "save")
        assert not isinstance(node, ast.Global)


def test_sections_in_order():
    """Catches a section at another place than the documents say: the file is read once, from top to bottom."""
    sections = re.findall(r"^# ---- (.+?) -+$", SCRIPT, re.MULTILINE)
    order = ["config", "data", "tokenizer", "model", "optimizer", "model file", "training", "generation", "REPL"]
    assert [name for name in sections if name != "export"] == [*order, "CLI"]
    for name in order:
        assert (ROOT / "tests" / f"test_{name.lower().replace(' ', '_')}.py").exists()


def test_files_are_as_they_should_be():
    """Catches tabs and Windows line ends."""
    for path in [ROOT / "anexagpt.py", *(ROOT / "tests").rglob("*.py")]:
        raw = path.read_bytes()
        assert b"\r" not in raw and b"\t" not in raw and raw.endswith(b"\n"), path


def test_licence():
    """Catches a missing or another licence."""
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert text.startswith("MIT License") and "Anexa contributors" in text
