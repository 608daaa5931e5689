"""Training in a terminal: what a person sees, and what Ctrl-C does. The prompt itself is in test_chat.py."""

import io
import os
import sys

import pytest
from conftest import ROOT, TINY, prose

import anexagpt


@pytest.fixture
def terminal(tmp_path):
    """Run the program in a terminal, in an empty folder."""
    if os.name == "nt":
        pytest.skip("pexpect needs a POSIX terminal")
    pexpect = pytest.importorskip("pexpect")
    started = []

    def run(*arguments):
        command = [str(ROOT / "anexagpt.py"), *map(str, arguments)]
        environment = os.environ | dict(
            TERM="xterm", COLUMNS="100", LINES="30", XDG_STATE_HOME=str(tmp_path.with_name("state"))
        )
        options = dict(cwd=str(tmp_path), env=environment, timeout=120, encoding="utf-8", dimensions=(30, 100))
        started.append(pexpect.spawn(sys.executable, command, **options))
        return started[-1]

    yield run
    for child in started:
        child.close(force=True)


def ended(child) -> int:
    import pexpect

    child.expect(pexpect.EOF)
    child.close()
    return child.exitstatus


def test_ctrl_c_in_training(terminal, tmp_path):
    """Catches Ctrl-C that loses the training, leaves a broken terminal or a wrong status, and a restart from step 0."""
    (tmp_path / "prose.txt").write_text(prose(3000))
    options = ["--data", "prose.txt", *TINY, "--max-steps", 1_000_000, "--eval-interval", 200]
    reached = 0
    for turn in range(2):
        child = terminal(*options)
        if turn:
            child.expect(r"Continuing the training in checkpoint\.safetensors at step ([\d,]+)")
            assert int(child.match[1].replace(",", "")) == reached
        child.expect(r"val \d\.\d{4}")
        child.sendintr()
        child.expect(r"Stopped at step ([\d,]+)")
        step = int(child.match[1].replace(",", ""))
        assert ended(child) == 130 and "Traceback" not in child.before
        assert step > reached
        reached = step
        names = {p.name for p in tmp_path.iterdir()}
        assert names == {"prose.txt", "checkpoint.safetensors"}


def test_training_in_a_terminal(terminal, tmp_path):
    """Catches a live line that hides the lines below it, or a cursor that stays hidden at the end."""
    (tmp_path / "prose.txt").write_text(prose(1000))
    child = terminal("--data", "prose.txt", *TINY, "--max-steps", 60, "--eval-interval", 20)
    child.expect(r"step 20/60 train \d\.\d{4} val \d\.\d{4}")
    child.expect(r"step 60/60")
    child.expect_exact("loss in nats/char: o training, x validation")
    child.expect_exact("Training finished...")
    child.expect_exact("Model saved to model.safetensors")
    child.expect_exact("--- Interactive Generation ---")
    child.expect_exact("Prompt:")
    shown = child.before
    child.sendline("exit")
    assert ended(child) == 0
    assert "Traceback" not in shown + child.before


def test_long_lines_break_between_words(monkeypatch):
    """Catches messages that the edge of the terminal cuts through a word, and ones changed where there is no edge."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", "24")
    text = "one two-three four five: six seven\n\n  2.543 |   o"
    lines = anexagpt.fitted(text, Terminal(), indent=2).split("\n")
    assert lines == ["one two-three four five:", "  six seven", "", "  2.543 |   o"]
    assert anexagpt.fitted(text, io.StringIO()) == text
