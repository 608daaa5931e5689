"""The prompt: commands in this process, exact output over pipes, and editing on a real pseudo-terminal."""

import inspect
import io
import json
import os
import re
import signal
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

import anexagpt

PROGRAM = Path(anexagpt.__file__)
CHARACTERS = anexagpt.UNKNOWN + "\n !'./" + "abcdefghijklmnopqrstuvwxyz"
OPENING = ["", "--- Interactive Generation ---", "Enter a prompt to continue (or 'quit' to exit)"]


def tiny(seed: int):
    """A model with random weights, which writes at random too."""
    torch.manual_seed(seed)
    config = anexagpt.GPTConfig(len(CHARACTERS), block_size=32, n_layer=1, n_head=2, n_embd=8)
    model = anexagpt.GPT(config).eval().requires_grad_(False)
    for weight in model.parameters():
        weight.copy_(torch.randn_like(weight) * 0.5)
    data = dict(name="nothing", sha256="0" * 64, characters=1)
    return model, anexagpt.Story(config, CHARACTERS, data, {}, 1, 1.0, [])


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    model, story = tiny(1)
    anexagpt.save_file(path, dict(model.named_parameters()), story)
    return path


def continuation(file, prompt, n, **settings) -> str:
    """What `generate` would write."""
    model, tokenizer, _ = anexagpt.load_model(file, torch.device("cpu"))
    cfg = anexagpt.SampleConfig(max_new=n, **settings)
    return "".join(p for (p,) in anexagpt.write(model, tokenizer, prompt, cfg, anexagpt.random_source(cfg.seed)))


# ---- commands, in this process ----


@pytest.fixture
def session(file):
    return anexagpt.Session(*anexagpt.load_model(file, torch.device("cpu")), anexagpt.SampleConfig(max_new=20))


def talk(session, capsys, *lines) -> tuple[str, str]:
    """Standard output and standard error after these lines, errors told as `chat` tells them."""
    for line in lines:
        try:
            session.respond(line)
        except anexagpt.UserError as error:
            anexagpt.say(f"({error})")
        except OSError as error:
            anexagpt.say(f"({error.filename}: {error.strerror})")
    return capsys.readouterr()


def test_regen_of_what_another_model_does_not_know(session, capsys):
    """Catches an answer that is lost when it cannot be given anew."""
    session.turns = [anexagpt.Turn("\u4f60\u597d", "abc", 1)]
    talk(session, capsys, "/regen")
    assert [turn.answer for turn in session.turns] == ["abc"]


def test_every_answer_is_new_and_can_be_repeated(session, capsys):
    """Fails if a session repeats its random numbers, or if the seed that /show tells is not that of the last answer."""
    first, second, _ = talk(session, capsys, "the", "the", "the")[0].split("the")[1:]
    assert first != second
    shown = talk(session, capsys, "/show")[1]
    seed = re.search(r"/set seed (\d+), then /regen repeats it", " ".join(shown.split()))[1]
    wanted = session.turns[-1].answer
    assert talk(session, capsys, "/regen", f"/set seed {seed}", "/regen")[0].endswith(f"the{wanted}\n")
    assert session.turns[-1].answer == wanted and len(session.turns) == 3
    talk(session, capsys, "/set seed", "/regen")
    assert session.turns[-1].answer != wanted


def test_a_seed_gives_what_generate_gives(session, file, capsys):
    """Fails if the prompt draws its numbers in another way than the one-shot command."""
    out, _ = talk(session, capsys, "/set seed 7", "the", "the")
    assert out == f"the{continuation(file, 'the', 20, seed=7)}\n" * 2


def test_more_is_as_if_it_had_not_stopped(session, file, capsys):
    """Fails if /more forgets the prompt or the answer: at temperature 0, 20 and 20 and 20 are 60, past the context."""
    out, err = talk(session, capsys, "/set temperature 0", "the", "/more", "/more")
    assert out.replace("\n", "") == ("the" + continuation(file, "the", 60, temperature=0.0)).replace("\n", "")
    assert err.count("Response: ...") == 2
    first, second, third = session.turns
    assert second.prompt == "the" + first.answer and third.prompt == second.prompt + second.answer
    assert talk(session, capsys, "/undo", "/more")[0] == session.turns[-1].answer + "\n"


SETTABLE = [
    ("temperature 0.5", "temperature", 0.5),
    ("temperature 1", "temperature", 1.0),
    ("top-k 5", "top_k", 5),
    ("top_p 0.9", None, "top_p: unknown, did you mean top-p?"),
    ("min-p .1", "min_p", 0.1),
    ("max-new 7", "max_new", 7),
    ("seed 3", "seed", 3),
    ("stop the end", "stop", ("the end",)),
    ("stop \\n\\n", "stop", ("\n\n",)),
    ("verbose on", "verbose", "on"),
    ("temperature", "temperature", 0.8),
    ("temperature 101", None, "temperature 101.0: must be from 0.0 to 100.0"),
    ("temperature nan", None, "temperature nan: must be from 0.0 to 100.0"),
    ("temperature hot", None, "temperature hot: must be a number from 0.0 to 100.0"),
    ("top-k 2.5", None, "top-k 2.5: must be a whole number from 0 to 1,114,112"),
    ("top-p -1", None, "top-p -1.0: must be from 0.0 to 1.0"),
    ("min-p 2", None, "min-p 2.0: must be from 0.0 to 1.0"),
    ("repetition-penalty 0", None, "repetition-penalty 0.0: must be from 0.01 to 100.0"),
    ("max-new -1", None, "max-new -1: must be from 0 to 1,000,000,000,000"),
    ("seed x", None, "seed x: must be a whole number from 0 to 9,223,372,036,854,775,807"),
    ("verbose loud", None, "verbose 'loud': must be one of on, off"),
    ("temprature 1", None, "temprature: unknown, did you mean temperature?"),
]


@pytest.mark.parametrize("line, name, expected", SETTABLE, ids=[row[0] for row in SETTABLE])
def test_set(session, capsys, line, name, expected):
    """Fails if a setting is taken wrongly or unchecked, or if the error does not tell its range."""
    before = session.cfg
    err = talk(session, capsys, f"/set {line}")[1]
    if name:
        assert getattr(session.cfg, name) == expected and type(getattr(session.cfg, name)) is type(expected)
    else:
        assert expected in err and session.cfg == before


def test_set_without_value_is_the_default(session, capsys):
    """Fails if a setting cannot be taken back, the growing list of stop texts above all."""
    talk(session, capsys, "/set stop a", "/set stop b")
    assert session.cfg.stop == ("a", "b")
    talk(session, capsys, "/set stop", "/set max-new")
    assert session.cfg == anexagpt.ChatConfig()


@pytest.mark.parametrize("line, answer", [
    ("/hlep", "/hlep: unknown, did you mean /help?"),
    ("/temperature 0.3", "/temperature: is a setting; change it with /set temperature"),
    ("/probes the", "/probes: unknown, did you mean /probs?"),
    ("/xyzzy", "/xyzzy: unknown; /help lists"),
    ("/", "/: unknown; /help lists"),
    ("/quit now", "usage: /quit"),
    ("/save", "usage: /save FILE"),
    ("/attn 1 2 3", "usage: /attn [layer] [head]"),
    ("/load ~nobody-of-that-name/x", "No such file"),
    ("/load a\0b", "No such file"),
    ("/load /", "is not a file"),
    ("/save ", "usage: /save FILE"),
    ("/attn one", "there is no answer yet|usage: /attn"),
    ("/respond x", "/respond: unknown"),
    ("/__init__ x", "/__init__: unknown"),
    ("/regen", "there is no answer yet; type a prompt first"),
    ("/more", "there is no answer yet"),
    ("/undo", "there is no answer yet"),
    ("/why", "there is no answer yet"),
    ("/probs", "there is no answer yet"),
    ("/tokens", "there is no answer yet"),
])  # fmt: skip
def test_what_is_no_command_never_goes_to_the_model(session, capsys, line, answer):
    """Fails if a mistyped command is continued as a text, or an error becomes a traceback."""
    out, err = talk(session, capsys, line)
    assert out == "" and any(part in err for part in answer.split("|")) and not session.turns and not session.over


@pytest.mark.parametrize("line, prompt", [
    ("//etc", "/etc"),
    ("///", "//"),
    (" the ", " the "),
    ('"""/help"""', "/help"),
    ('"""quit"""', "quit"),
    ('"""\na\nb\n"""', "a\nb"),
    ('"""a\n"""  ', "a"),
    ('"""', None),
    ('""""""', None),
    ("", None),
    ("\U0001f600", None),
    ("quit.", "quit."),
])  # fmt: skip
def test_what_goes_to_the_model(session, capsys, line, prompt):
    """Fails if a prompt loses its spaces, its slash or its lines, or if an empty one is answered."""
    out, _ = talk(session, capsys, line)
    assert not session.over
    if prompt is None:
        assert not session.turns and out == ""
    else:
        assert session.turns[0].prompt == prompt and out.startswith(prompt)


@pytest.mark.parametrize("end", ["quit\n", "exit\n", "  quit  \n", "/quit\n", "", "quit"])
def test_ways_to_leave(file, monkeypatch, capsys, end):
    """Fails if one of them is taken for a prompt, or if the session goes on after it."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("the\n" + end))
    anexagpt.chat(*anexagpt.load_model(file, torch.device("cpu")), anexagpt.SampleConfig(max_new=3))
    assert capsys.readouterr().out.count("the") == 1 and sys.stdin.read() == ""


def test_save_and_load(session, file, tmp_path, capsys):
    """Fails if answers or settings change on their way through the file, or if it is no plain JSON, or public."""
    path = tmp_path / "my talk.json"
    talk(
        session,
        capsys,
        "/set stop zzz",
        "/set top-k 9",
        "the \u2019 caf\u00e9",
        "/more",
        f"/save {path}",
        f"/save {path}",
    )
    kept = json.loads(path.read_text("utf-8"))
    assert kept["settings"]["top_k"] == 9 and kept["turns"][0]["prompt"] == "the \u2019 caf\u00e9"
    if os.name == "posix":
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    other = anexagpt.Session(*anexagpt.load_model(file, torch.device("cpu")), anexagpt.SampleConfig())
    talk(other, capsys, f"/load {path} ")
    assert other.turns == session.turns and other.cfg == session.cfg
    talk(session, capsys, "/clear")
    assert not session.turns and session.cfg.top_k == 9
    assert [p.name for p in tmp_path.iterdir()] == ["my talk.json"]


def test_save_overwrites_only_its_like(session, file, tmp_path, capsys):
    """Fails if a slip of the fingers, /save model.safetensors, costs a model."""
    content = file.read_bytes()
    err = talk(session, capsys, f"/save {file}")[1]
    assert "not a conversation that /save wrote; choose another file" in err and file.read_bytes() == content


TALK = '{"settings": %s, "turns": %s}'
GOOD = json.dumps(anexagpt.asdict(anexagpt.ChatConfig()))


@pytest.mark.parametrize("text", [
    "", "[]", "{}", "3", "[" * 100_000, "\x00",
    TALK % ("{}", "[]"),
    TALK % (GOOD, "[3]"),
    TALK % (GOOD, '[{"prompt": 1, "answer": "", "seed": 1}]'),
    TALK % (GOOD, '[{"prompt": "", "answer": "", "seed": 1, "more": 1}]'),
    TALK % (GOOD.replace("0.8", "1e9"), "[]"),
    TALK % (GOOD.replace("0.8", '"warm"'), "[]"),
])  # fmt: skip
def test_load_refuses_anything_else(session, tmp_path, capsys, text):
    """Fails if a file is trusted: a wrong type would come up later as a traceback."""
    path = tmp_path / "x.json"
    path.write_text(text)
    assert "not a conversation that /save wrote" in talk(session, capsys, f"/load {path}")[1]
    path.write_bytes(b"\xff\xfe\xff")
    assert "not a conversation that /save wrote" in talk(session, capsys, f"/load {path}")[1]


def test_read(session, tmp_path, capsys):
    """Fails if a file's line ends or mark reach the model, or if a long file floods the terminal."""
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert talk(session, capsys, f"/read {path}")[0].startswith("one\ntwo") and session.turns[0].prompt == "one\ntwo"
    path.write_text("a" * 5_000 + "b" * 200)
    out, err = talk(session, capsys, f"/read {path}")
    assert out.startswith("b" * 200) and "a" * 30 not in out and err == "Response: ..."
    path.write_bytes(b"\x80")
    assert "not utf-8 text" in talk(session, capsys, f"/read {path}")[1]


def test_model(session, tmp_path, capsys):
    """Fails if the next answer or a view comes from the model before."""
    path = tmp_path / "other.safetensors"
    model, story = tiny(2)
    anexagpt.save_file(path, dict(model.named_parameters()), story)
    talk(session, capsys, "/set temperature 0", "the")
    out, err = talk(session, capsys, f"/model {path}", "/regen")
    assert out == f"the{continuation(path, 'the', 20, temperature=0.0)}\n"
    assert str(path) in err and "trained on nothing" in err
    assert "no such file" in talk(session, capsys, "/model nowhere.safetensors")[1]
    assert "not a whole model" in talk(session, capsys, f"/model {PROGRAM}")[1]


def test_undo(session, capsys):
    """Fails if another answer than the last is forgotten."""
    talk(session, capsys, "one", "two", "/undo")
    assert [turn.prompt for turn in session.turns] == ["one"]


def test_verbose(session, capsys):
    """Fails if the count of characters is not the answer's, or the seed not its seed."""
    err = talk(session, capsys, "/set verbose on", "/set seed 5", "the")[1]
    assert re.search(r"\n?\(20 characters in [\d.]+ s, [\d,]+ char/s, seed 5\)\n$", err)


def test_views_are_of_the_last_answer(session, capsys):
    """Fails if a view takes another prompt or answer than the last."""
    err = talk(session, capsys, "first", "second", "/tokens", "/probs", "/attn", "/why")[1]
    views = err[err.rindex("Response: ") + 10 :]
    assert re.match(r"s +e +c +o +n +d +\n", views) and "After 'second', in percent:" in views
    assert "Layer 1 of 1, mean of 2 heads" in views and "20 characters, " in views
    assert "After 'third '" in talk(session, capsys, "/probs third ")[1]
    assert "(read T as t)\nAfter 't'" in talk(session, capsys, "/probs T")[1]
    assert "layer 2: must be from 1 to 1" in talk(session, capsys, "/attn 2")[1]
    assert "usage: /attn" in talk(session, capsys, "/attn x")[1]
    assert "the last answer is empty" in talk(session, capsys, "/set max-new 0", "a", "/why")[1]


def test_help(session, capsys):
    """Fails if a command has no help, or its usage is not its signature."""
    err = talk(session, capsys, "/help")[1]
    names = "help set show regen more undo clear save load read model probs why attn tokens quit"
    for name in names.split():
        assert re.search(rf"^/{name}\b", err, re.MULTILINE), name
        text = " ".join(talk(session, capsys, f"/help {name}")[1].split())
        assert " ".join(inspect.getdoc(session.commands[name]).split()) in text
    assert "did you mean set?" in talk(session, capsys, "/help sett")[1]
    assert "/attn [layer] [head]" in talk(session, capsys, "/help /attn")[1]


def test_interrupted_answer_is_kept(session, capsys, monkeypatch):
    """Fails if Ctrl-C throws away what has come, or ends more than the answer."""

    def pieces(*_):
        yield ["ab"]
        raise KeyboardInterrupt

    monkeypatch.setattr(anexagpt, "write", pieces)
    assert talk(session, capsys, "the")[0] == "theab\n" and session.turns[0].answer == "ab"


@pytest.mark.parametrize("text, offers", [
    ("/s", ["set", "show", "save"]),
    ("/", None),
    ("s", []),
    ("//s", []),
    ("/help s", ["set", "show", "save"]),
    ("/set t", ["temperature", "top-k", "top-p"]),
    ("/set verbose ", ["on", "off"]),
    ("/set seed ", []),
    ("/nothing s", []),
    ("/quit s", []),
    ("/set verbose on x", []),
])  # fmt: skip
def test_completion(session, text, offers):
    """Fails if Tab offers what does not fit there, or breaks on what is not a command."""
    from prompt_toolkit.document import Document

    found = [c.text for c in anexagpt.Commands(session).get_completions(Document(text), None)]
    assert found == (list(session.commands) if offers is None else offers)


def test_completion_of_files(session, tmp_path):
    """Fails if a name with a space is cut at it."""
    from prompt_toolkit.document import Document

    (tmp_path / "my talk.json").touch()
    found = list(anexagpt.Commands(session).get_completions(Document(f"/load {tmp_path}/my t"), None))
    assert [c.text for c in found] == ["alk.json"]


def test_history_is_private_and_capped(tmp_path, monkeypatch):
    """Fails if others can read it, if it grows for ever, or if a strange character in a line ends the program."""
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    history, path = anexagpt.History(), tmp_path / "state" / "anexa" / "history"
    for i in range(1_100):
        history.append_string(f"line {i}\n# {i}")
    history.append_string("\udcff")
    lines = list(anexagpt.History().load_history_strings())
    assert lines[:2] == ["?", "line 1099\n# 1099"] and len(lines) == 1_000
    if os.name == "posix":
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        path.unlink()
        path.parent.rmdir()
        history.append_string("nowhere to go")


# ---- scripted, over pipes ----


def script(*arguments, text="", env=(), merge=False, **options):
    command = [sys.executable, PROGRAM, *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"} | dict(env)
    error = subprocess.STDOUT if merge else subprocess.PIPE
    out = subprocess.PIPE
    return subprocess.run(
        command, input=text, stdout=out, stderr=error, env=environment, encoding="utf-8", timeout=120, **options
    )


def test_scripted_session_to_the_letter(file):
    """Fails if anything but generated text goes to standard output, or a pipe gets colours or other extras."""
    lines = 'the\n/hlep\n/set temperature 101\n"""a\nb"""\n/more\n//x\n"""open\nat the end'
    done = script("chat", "--model", file, "--seed", 3, "-n", 12, text=lines)
    answers = [prompt + continuation(file, prompt, 12, seed=3) for prompt in ("the", "a\nb", "/x", "open\nat the end")]
    more = continuation(file, answers[1], 12, seed=3)
    assert done.stdout == "\n".join([*answers[:2], more, *answers[2:]]) + "\n"
    assert done.returncode == 0
    assert done.stderr.split("\n") == [
        f"{file}: {anexagpt.open_file(file)[0]}",
        *OPENING,
        "Prompt: Response: Prompt: (/hlep: unknown, did you mean /help? /help lists them, // is a slash)",
        "Prompt: (temperature 101.0: must be from 0.0 to 100.0)",
        "Prompt: Response: Prompt: Response: ...Prompt: Response: Prompt: Response: Prompt: ",
        "",
    ]


def test_one_shot_views(file, session, capsys):
    """Fails if the command shows something else than the prompt does, or not on standard output, or no plain text."""
    done = script(
        "explain", "the caf\u00e9", "--model", file, "--top-k", 3, env={"COLUMNS": "40", "TERM": "xterm-256color"}
    )
    assert done.returncode == 0 and done.stderr == "(read \u00e9 as e)\n" and "\x1b" not in done.stdout
    tokens, probs, why, attn = done.stdout.split("\n\n")
    assert tokens.startswith("t  h  e ") and probs.startswith("After 'the cafe', in percent:\n") and "top-k 3" in probs
    assert "\nthe cafe\n" in why and attn.startswith("Layer 1 of 1, mean of 2 heads\n")
    assert all(len(line) <= 40 for line in done.stdout.split("\n"))
    # In this process, where a start costs nothing:
    frame, (text, _) = anexagpt.Frame(40), session.tokenizer.admit("the caf\u00e9")
    view = anexagpt.probs_view(session.model, session.tokenizer, text, anexagpt.SampleConfig(top_k=3), frame)
    assert [line.rstrip() for line in view.plain.split("\n")] == [line.rstrip() for line in probs.split("\n")]


@pytest.mark.parametrize("arguments, message", [
    (["x", "--view", "sums"], "invalid choice: 'sums'"),
    (["the", "--view", "attn", "--layer", "9"], "--layer 9: must be from 1 to 1"),
    (["\U0001f600"], "has no characters that the model knows"),
])  # fmt: skip
def test_one_shot_errors(file, arguments, message, capsys):
    """Fails if a mistake of the person becomes a traceback or status 0."""
    try:
        options = anexagpt.parse_options(["explain", "--model", str(file), *arguments])
    except SystemExit as leaving:
        status = leaving.code
    else:
        status = anexagpt_main(options)
    assert status == 2 and message in capsys.readouterr().err


def anexagpt_main(options) -> int:
    """`main` where the standard streams are those of pytest, which cannot be reconfigured."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if not hasattr(stream, "reconfigure"):
            stream.reconfigure = lambda **how: None
    return anexagpt.main(options)


@pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell")
def test_closed_pipe(file):
    """Fails if whoever reads our answers cannot stop reading without a traceback: status 0, nothing on stderr of it."""
    command = f'echo the | "{sys.executable}" "{PROGRAM}" chat --model "{file}" -n 100000000 | head -c 100 | wc -c'
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "100" and "Traceback" not in done.stderr and "Error" not in done.stderr


# ---- on a pseudo-terminal ----

pexpect = pytest.importorskip("pexpect") if os.name == "posix" else None
on_terminal = pytest.mark.skipif(os.name != "posix", reason="pseudo-terminals are a POSIX thing")


def spawn(*arguments, state, cwd=None, **env):
    environment = os.environ | dict(OMP_NUM_THREADS="1", TERM="xterm-256color", XDG_STATE_HOME=str(state)) | env
    environment.pop("NO_COLOR", None) if "NO_COLOR" not in env else None
    return pexpect.spawn(
        sys.executable, [str(PROGRAM), *map(str, arguments)],
        env=environment, cwd=cwd, dimensions=(24, 80), encoding="utf-8", timeout=60,
    )  # fmt: skip


def screen(text: str) -> list[str]:
    """Lines that a terminal shows after `text`; of the escape sequences those that an editor of lines needs."""
    rows, row, column = [""], 0, 0
    for found in re.finditer(r"\x1b\[([\d;?]*)([a-zA-Z])|\x1b[=>]|([^\x1b])", text, re.DOTALL):
        n, move, c = int(found[1]) if (found[1] or "").isdigit() else 1, found[2], found[3]
        if move in ("A", "B"):
            row += n if move == "B" else -n
        elif move in ("C", "D"):
            column += n if move == "C" else -min(n, column)
        elif move in ("J", "K"):
            rows[row:] = [rows[row][:column], *(rows[row + 1 :] if move == "K" else [])]
        elif c == "\r":
            column = 0
        elif c == "\b":
            column -= 1
        elif c == "\n":
            row += 1
        elif c:
            rows[row] = rows[row][:column].ljust(column) + c + rows[row][column + 1 :]
            column += 1
        rows += [""] * (row + 1 - len(rows))
    return [line.rstrip() for line in rows]


@on_terminal
def test_transcript_to_the_letter(file, tmp_path):
    """Fails if a person who types a prompt and `quit` sees anything else than the design's lines."""
    child = spawn("--temperature", 0, "-n", 30, state=tmp_path, cwd=file.parent)
    child.expect("Prompt:")
    seen = child.before + child.after
    child.send("the\r")
    child.expect("Response: ")
    seen += child.before + child.after
    child.expect("Prompt:")
    seen += child.before + child.after
    child.send("quit\r")
    child.expect(pexpect.EOF)
    seen += child.before
    child.close()
    assert child.exitstatus == 0
    answer = "the" + continuation(file, "the", 30, temperature=0.0)
    story = f"model.safetensors: {anexagpt.open_file(file)[0]}"
    story = textwrap.wrap(story, 80, break_on_hyphens=False)  # at words: a terminal would break it anywhere
    expected = [*story, *OPENING, "Prompt: the", *f"Response: {answer}".split("\n"), "Prompt: quit", ""]
    assert screen(seen) == [line.rstrip() for line in expected]


@pytest.fixture(scope="module")
def terminal(file, tmp_path_factory):
    """One session on a terminal, for all tests that do not end it."""
    child = spawn("chat", "--model", file, "-n", 3, state=tmp_path_factory.mktemp("state"))
    child.expect("Prompt:")
    yield child
    child.sendeof()
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


KEYS = {
    "plain": ("abc", "abc"),
    "backspace": ("abx\x7fc", "abc"),
    "left and insert": ("ac\x1b[Db", "abc"),
    "home and end": ("bc\x01a\x05d", "abcd"),
    "kill to the end": ("abc\x1b[D\x1b[D\x0b", "a"),
    "kill to the beginning and yank": ("abc\x15\x19\x19", "abcabc"),
    "delete a word": ("one two\x17x", "one x"),
    "Ctrl-D deletes": ("abc\x01\x04", "bc"),
    "Ctrl-L redraws": ("ab\x0cc", "abc"),
    "bracketed paste": ("\x1b[200~one\ntwo\x1b[201~x", "one\ntwox"),
    "paste with line ends of Windows": ("\x1b[200~one\r\ntwo\x1b[201~", "one\ntwo"),
    "three quotes": ('"""one\rtwo\r"""', "one\ntwo"),
    "three quotes on one line": ('"""/quit"""', "/quit"),
    "abandoned line": ("abc\x03xyz", "xyz"),
    "slash": ("//tmp", "/tmp"),
}


@on_terminal
@pytest.mark.parametrize("keys, prompt", KEYS.values(), ids=list(KEYS))
def test_keys(terminal, tmp_path, keys, prompt):
    """Fails if an editing key, a paste or a several-line prompt does not give the text that the person meant."""
    terminal.send(keys + "\r")
    terminal.expect("Response: ")
    terminal.expect("Prompt:")
    terminal.send(f"/save {tmp_path}/talk.json\r")
    terminal.expect(r"answers:\s+\d+\)")
    terminal.expect("Prompt:")
    assert json.loads((tmp_path / "talk.json").read_text())["turns"][-1]["prompt"] == prompt


@on_terminal
def test_history_search_and_completion(terminal, tmp_path):
    """Fails if Up, Ctrl-R or Tab does not find an earlier line or a command."""
    for keys in ("a needle here\r", "hay\r", "\x1b[A\x1b[A\r", "\x12needle\r\r"):
        terminal.send(keys)
        terminal.expect("Response: ")
        terminal.expect("Prompt:")
    terminal.send("/sav\t" + f" {tmp_path}/t.json\r")
    terminal.expect(r"answers:\s+\d+\)")
    terminal.expect("Prompt:")
    turns = json.loads((tmp_path / "t.json").read_text())["turns"]
    assert [turn["prompt"] for turn in turns[-4:]] == ["a needle here", "hay", "a needle here", "a needle here"]


@on_terminal
def test_ctrl_c_at_every_moment(terminal):
    """Fails if Ctrl-C leaves, or does not stop an answer, or loses what came."""
    terminal.send("\x03")
    terminal.expect_exact("(quit or Ctrl-D leaves)")
    terminal.expect("Prompt:")
    terminal.send('"""half\r\x03')
    terminal.expect_exact("(quit or Ctrl-D leaves)")
    terminal.expect("Prompt:")
    terminal.send("/set max-new 100000000\r")
    terminal.expect("Prompt:")
    for _ in range(2):
        terminal.send("the\r")
        terminal.expect("Response: the")
        time.sleep(0.2)
        terminal.send("\x03")
        terminal.expect("Prompt:")
    terminal.send("/why\r")
    terminal.expect(r"([\d,]+) characters, ")
    assert int(terminal.match[1].replace(",", "")) > 1
    terminal.expect("Prompt:")
    terminal.send("/set max-new 3\r")
    terminal.expect("Prompt:")


@on_terminal
def test_resize(terminal):
    """Fails if a view keeps the width that the terminal had before."""
    for width in (40, 80):
        terminal.setwinsize(12, width)
        terminal.send("/probs the\r")
        terminal.expect_exact("in percent:")
        terminal.expect("Prompt:")
        rows = [line for line in screen(terminal.before) if "█" in line]
        assert rows and max(map(len, rows)) in range(width - 5, width + 1)


@on_terminal
def test_next_session_knows_the_lines_and_ctrl_d_leaves(file, tmp_path):
    """Fails if history ends with the session, if Ctrl-D does not leave, if we outlive a terminal that was closed."""
    first = spawn("chat", "--model", file, "-n", 3, state=tmp_path, NO_COLOR="1")
    first.expect("Prompt:")
    first.send("a line to keep\r")
    first.expect("Response: ")
    first.expect("Prompt:")
    first.send("/why\r")
    first.expect("least expected")
    assert not re.search(r"\x1b\[[\d;]*[34][0-8]", first.before)  # no colour
    first.expect("Prompt:")
    first.send("\x04")
    first.expect(pexpect.EOF)
    first.close()
    assert first.exitstatus == 0
    second = spawn("chat", "--model", file, "-n", 3, state=tmp_path)
    second.expect("Prompt:")
    second.send("\x1b[A\x1b[A\r")
    second.expect("Response: a line to keep")
    second.expect("Prompt:")
    second.send("half a line")
    second.close(force=False)  # the window is closed: SIGHUP
    assert not second.isalive() and second.signalstatus in (signal.SIGHUP, None)


@on_terminal
def test_dumb_terminal(file, tmp_path):
    """Fails if a terminal that cannot move its cursor gets escape sequences, or Ctrl-C and Ctrl-D do not work there."""
    child = spawn("chat", "--model", file, "-n", 3, state=tmp_path, TERM="dumb")
    child.expect("Prompt:")
    child.send("thx\x7fe\r")
    child.expect("Response: the")
    child.expect("Prompt:")
    child.send("half\x03")
    child.expect_exact("(quit or Ctrl-D leaves)")
    child.expect("Prompt:")
    child.send("/why\r")
    child.expect("least expected")
    assert "\x1b" not in child.before
    child.expect("Prompt:")
    child.send("\x04")
    child.expect(pexpect.EOF)
    assert "\x1b" not in child.before
    child.close()
    assert child.exitstatus == 0 and not (tmp_path / "anexa").exists()
