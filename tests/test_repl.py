"""REPL: the conversation in the terminal, through pipes and through a real (pseudo) terminal."""

import io
import os
import sys

import pytest
import torch
from conftest import ROOT, TINY, prose

from anexagpt import SampleConfig, chat, load_model

FACE = "\n--- Interactive Generation ---\nEnter a prompt to continue (or 'quit' to exit)\n"


@pytest.fixture
def talk(tiny, monkeypatch, capsys):
    """Conversation with the tiny model, over pipes: what goes to standard output and to standard error."""

    def conversation(text: str, **settings):
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        model, tokenizer, _ = load_model(tiny, torch.device("cpu"))
        capsys.readouterr()
        chat(model, tokenizer, SampleConfig(**(dict(max_new=30, seed=1) | settings)))
        return capsys.readouterr()

    return conversation


def test_transcript(talk):
    """Catches any change to the lines that people see, and answers mixed with what is not text."""
    out, err = talk("the cat\nHolmes\nquit\n")
    assert err == FACE + "Prompt: Response: " * 2 + "Prompt: "
    lines = out.split("\n")
    assert out.startswith("the cat") and any(line.startswith("Holmes") for line in lines) and out.endswith("\n")
    assert len(out) == len("the cat") + len("Holmes") + 2 * (30 + 1)


@pytest.mark.parametrize("end", ["quit\n", "exit\n", "  quit  \n", "", "quit"])
def test_ways_to_leave(talk, end):
    """Catches a conversation that cannot be left, or an answer to 'quit'."""
    out, err = talk("the\n" + end + "\nnever read" * (end != ""))
    assert out.startswith("the") and len(out) == 3 + 30 + 1 and err.count("Prompt: ") == 2


def test_last_line_without_line_end(talk):
    """Catches a prompt from `printf`, without a line end, that is lost."""
    assert talk("the").out.startswith("the")


def test_empty_prompts(talk):
    """Catches an answer to nothing."""
    assert talk("\n\nquit\n").out == ""


def test_unknown_characters(talk):
    """Catches a KeyError, a silent change, and an answer to a prompt of which nothing is left."""
    out, err = talk("the \u201ccaf\u00e9\u201d\n\U0001f600\u4e2d\nthe\nquit\n")
    assert out.startswith("the cafe") or out.startswith("the cae") or out.startswith("the ca")
    assert "(read " in err or "left out" in err
    assert "\U0001f600" in err and err.count("Response: ") == 2


def test_seed(talk):
    """Catches answers that a seed does not repeat, and a seed that makes every answer of a session the same."""
    first, again = talk("the\nthe\n", temperature=1.0).out, talk("the\nthe\n", temperature=1.0).out
    assert first == again and first[:34] != first[34:]
    assert talk("the\n", temperature=1.0, seed=None).out != talk("the\n", temperature=1.0, seed=None).out


def test_settings_are_used(talk):
    """Catches settings that stop at the command line."""
    assert talk("the\n", stop=("e",), max_new=200).out.count("e") == 1
    assert len(talk("the\n", max_new=5).out) == 3 + 5 + 1
    assert talk("the\n", temperature=0.0, seed=1).out == talk("the\n", temperature=0.0, seed=2).out


# ---- a terminal ------------------------------------------------------------------------------------------------------


@pytest.fixture
def terminal(tmp_path):
    """Run the program in a terminal, in an empty folder."""
    if os.name == "nt":
        pytest.skip("pexpect needs a POSIX terminal")
    pexpect = pytest.importorskip("pexpect")
    started = []

    def run(*arguments):
        command = [str(ROOT / "anexagpt.py"), *map(str, arguments)]
        environment = os.environ | dict(TERM="xterm", COLUMNS="100", LINES="30")
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


def test_conversation_in_a_terminal(terminal, tiny):
    """Catches an answer that Ctrl-C cannot stop, a session that Ctrl-C ends, and text that appears only at its end."""
    child = terminal("chat", "--model", tiny, "--max-new", 10**9, "--device", "cpu")
    child.expect_exact("M parameters, trained on")
    child.expect_exact("--- Interactive Generation ---")
    child.expect_exact("Enter a prompt to continue (or 'quit' to exit)")
    child.expect_exact("Prompt: ")
    child.sendline("the cat")
    child.expect_exact("Response: the cat")
    child.expect(r"(?s).{100}")  # an answer without an end, and yet there is text
    child.sendintr()
    child.expect_exact("Prompt: ")
    child.sendintr()  # at the prompt: a hint, and it stays
    child.expect_exact("leaves")
    child.expect_exact("Prompt: ")
    child.sendline("Holmes")
    child.expect_exact("Response: Holmes")
    child.sendintr()
    child.expect_exact("Prompt: ")
    child.sendeof()
    assert ended(child) == 0 and "Traceback" not in child.before


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
    child.expect_exact("Prompt: ")
    shown = child.before
    child.sendline("exit")
    assert ended(child) == 0
    assert "Traceback" not in shown + child.before
