"""Command line: the program from an empty folder to its prompt, every option, and every error."""

import ast
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, interrupt_at, prose, start, wait_for
from safetensors.torch import save

import anexagpt

QUICK = [*TINY, "--max-steps", "30", "--eval-interval", "10"]
COMMANDS = ["run", "train", "chat", "generate", "explain", "eval", "info", "export", "push"]


@pytest.fixture
def model(tiny, cli) -> Path:
    """An empty folder with the files model.safetensors and prose.txt."""
    shutil.copy(tiny.parent / "prose.txt", "prose.txt")
    return Path(shutil.copy(tiny, "model.safetensors"))


# ---- in processes of their own ----


def test_first_and_second_run(tmp_path, cli):
    """Catches one of the four lines changed, text on the wrong stream, files left over, a prompt
    that does not mention /help, and a second run that trains."""
    (tmp_path / "diary.txt").write_text(prose(500))
    options = dict(cwd=tmp_path, program=Path(shutil.copy(ROOT / "anexagpt.py", tmp_path)))
    first = start("diary.txt", *QUICK, stdin="the\nquit\n", **options)
    assert first.status == 0 and "Warning" not in first.err, first.err
    lines = first.err.splitlines()
    at = lines.index("Training finished...")
    opening = ["", "--- Interactive Generation ---"]
    opening += ["Enter a prompt to continue (or 'quit' to exit)"]
    assert lines[at + 1 : at + 5] == ["Model saved to model.safetensors", *opening]
    assert lines[at + 5].startswith("Prompt: Response: ") and "/help" in " ".join(lines[:at])
    assert first.out.startswith("the") and len(first.out) == 3 + 300 + 1
    names = {p.name for p in tmp_path.iterdir() if not p.name.startswith((".", "__"))}
    assert names == {"anexagpt.py", "diary.txt", "model.safetensors"}
    second = cli(stdin="red\n")
    lines = second.err.splitlines()
    assert second.status == 0 and second.out.startswith("red") and lines[1:4] == opening
    assert lines[0].startswith("model.safetensors: ") and "30 steps" in lines[0]


def test_ctrl_c_before_pytorch(tmp_path):
    """Catches Ctrl-C during the imports that prints a traceback or ends with another status than
    130."""
    (tmp_path / "torch.py").write_text("open('imported', 'w')\nimport time\ntime.sleep(60)\n")
    environment = os.environ | dict(PYTHONPATH=str(tmp_path))
    command = [sys.executable, str(ROOT / "anexagpt.py"), "info"]
    options = dict(cwd=tmp_path, env=environment, stderr=subprocess.PIPE)
    with subprocess.Popen(command, **options) as process:
        wait_for((tmp_path / "imported").exists)
        process.send_signal(signal.SIGINT)
        assert process.communicate()[1] == b"" and process.returncode == 130


@pytest.mark.parametrize("version", ["2.8.1", None])
def test_wrong_installation(program, tmp_path, version):
    """Catches a traceback where PyTorch or another package is missing or too old."""
    text = f"__version__ = {version!r}\n" if version else "raise ImportError('No module torch')\n"
    for name in ("torch", "torch/nn", "torch/nn/functional", "torch/distributed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(text + "class Tensor: pass\n")
    fake = "import sys, types\nsys.modules['safetensors.torch'] = types.ModuleType('torch')\n"
    (tmp_path / "sitecustomize.py").write_text(fake)
    result = program("info", env=dict(PYTHONPATH=str(tmp_path)))
    assert result.status in (1, 2) and result.err.count("\n") == 1, result.err
    assert (version or "torch") in result.err and "requirements.txt" in result.err


def test_old_python():
    """Catches a SyntaxError or a traceback on Python 3.8 and 3.9."""
    source = (ROOT / "anexagpt.py").read_text(encoding="utf-8")
    ast.parse(source, feature_version=(3, 8))
    code = f"import sys; sys.version_info = (3, 9, 1); exec(compile({source!r}, 'a', 'exec'))"
    done = subprocess.run([sys.executable, "-"], input=code, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "3.9" in done.stderr and "3.10" in done.stderr


def test_a_reader_that_stops(model):
    """Catches a traceback or an error after `anexagpt.py generate ... | head -c 5`."""
    command = f'"{sys.executable}" "{ROOT / "anexagpt.py"}" generate the -n 5000 | head -c 5'
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=180)
    assert done.stdout[:3] == "the" and len(done.stdout) == 5 and done.stderr == ""


# ---- help and options ----


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(cli, monkeypatch, command):
    """Catches lines wider than the terminal, and options or arguments without a help."""
    monkeypatch.setenv("COLUMNS", "100")
    result = cli(command, "--help")
    assert result.status == 0 and result.err == ""
    assert max(map(len, result.out.splitlines())) <= 100
    usage, _, rows = result.out.partition("\n\n")
    assert usage.startswith(f"usage: anexagpt.py {command} ")
    names = {re.escape(o) for o in re.findall(r"\[(--?[\w-]+)", usage)} - {"-h"}
    for name in names | set(re.findall(r"\n +\[?([a-zA-Z/]+)(?: |\Z)", usage)):
        row = rf"^  (-[\w-]+ \S+, )?{name}[ ,].*?( {{2,}}|\n {{20,}})[\w'].{{4}}"
        assert re.search(row, rows, re.MULTILINE), name


def test_help(cli):
    """Catches a command that is not listed."""
    result = cli("--help")
    assert result.status == 0 and all(f"\n  {name} " in result.out for name in COMMANDS)
    assert max(map(len, result.out.splitlines())) <= 100 and result.err == ""


def test_help_without_docstrings(monkeypatch, capsys):
    """Catches help that needs docstrings, which `python -OO` strips."""
    module = types.ModuleType("stripped")
    monkeypatch.setitem(sys.modules, "stripped", module)
    source = (ROOT / "anexagpt.py").read_text(encoding="utf-8")
    exec(compile(source, "anexagpt.py", "exec", optimize=2), vars(module))
    assert module.__doc__ is None
    with pytest.raises(SystemExit) as end:
        module.main(["train", "--help"])
    assert not end.value.code and "--max-steps N" in capsys.readouterr().out


def test_examples_of_the_help_page(model, cli):
    """Catches examples that the program does not accept: all but the trainings run here."""
    lines = re.findall(r"^  python anexagpt\.py(.*)$", anexagpt.EXAMPLES, re.MULTILINE)
    shutil.copy("model.safetensors", "bard.safetensors")
    for line in lines:
        words = re.sub(r"  .*| > .*", "", line).replace('"It was a"', "It_was").split()
        if words[:1] not in ([], ["train"]):
            assert cli(*words).status == 0, line
    assert len(lines) >= 5 and Path("bard.gguf").exists() and Path("hf-bard/config.json").exists()
    assert cli("--version").out == f"Anexa {anexagpt.__version__}\n"


def test_every_training_option(cli):
    """Catches an option that is ignored, goes to another setting, or is not in the model file."""
    Path("prose.txt").write_text(prose(500))
    values = dict(
        block_size=8, n_layer=2, n_head=3, n_embd=12, dropout=0.25, max_steps=6, batch_size=4,
        grad_accum=2, muon_learning_rate=0.01, learning_rate=0.005, weight_decay=0.2, seed=5,
        warmup_steps=3, eval_interval=2, checkpoint_interval=7.5, device="cpu", dtype="float32",
    )  # fmt: skip
    options = [word for name, v in values.items() for word in (f"--{name.replace('_', '-')}", v)]
    assert cli("train", "--data", "prose.txt", "--out", "new.safetensors", *options).status == 0
    info = json.loads(cli("info", "new.safetensors", "--json").out)
    saved = info["config"] | info["training"]
    assert {name: saved[name] for name in values} == values
    assert info["data"]["names"] == ["prose.txt"] and [r[0] for r in info["history"]] == [2, 4, 6]
    assert info["data"]["sha256"] == hashlib.sha256(Path("prose.txt").read_bytes()).hexdigest()
    out = cli("info", "new.safetensors").out
    parameters = 2 * (12 * 12 * 12 + 13 * 12) + (len(info["characters"]) + 8 + 2) * 12
    for words in ("n_head 3", "dropout 0.25", "prose.txt", f"{parameters:,} parameters", "o train"):
        assert words in out
    size = ["--size", "medium", "--n-layer", 1, "--block-size", 8, "--max-steps", 1]
    assert cli("train", "prose.txt", *size, "--out", "medium.safetensors").status == 0
    config = anexagpt.load("medium.safetensors").network.config
    assert (config.n_layer, config.n_head, config.n_embd, config.block_size) == (1, 6, 384, 8)


def test_every_sampling_option(model, cli):
    """Catches an option that is ignored or goes to another setting: all against the library."""
    base = dict(temperature=0.7, top_k=9, top_p=0.95, min_p=0.02, repetition_penalty=1.3, seed=4)
    base |= dict(no_repeat_ngram_size=30)
    base |= dict(max_new=60, stop=("W",))
    changed = dict(temperature=1.9, top_k=2, top_p=0.3, min_p=0.9, repetition_penalty=9.0, seed=5)
    changed |= dict(no_repeat_ngram_size=2)
    changed |= dict(max_new=9, stop=("e",))
    network, texts = anexagpt.load(model), set()
    for name in [None, *changed]:
        settings, options = base | ({name: changed[name]} if name else {}), []
        for key, value in settings.items():
            options += [f"--{key.replace('_', '-')}", *(value if key == "stop" else [value])]
        result = cli("generate", "the ", *options)
        assert result.status == 0 and result.err == ""
        assert result.out == "the " + network.generate("the ", **settings) + "\n"
        texts.add(result.out)
    assert len(texts) == 1 + len(changed)


def test_size_of_a_finished_model(model, cli):
    """Catches --size that is ignored where a model is there, so that a small one is opened."""
    assert cli("--size", "medium").is_error("--n-layer 1, not 6", "--restart")


def test_run_answers_afresh(model, cli):
    """Catches a seed of the training that is also that of each answer."""
    out = cli("--seed", 1337, "--max-new", 40, stdin="the\nthe\n").out
    assert len(out) == 88 and out[:44] != out[44:]


def test_samples(model, cli):
    """Catches texts that are equal or run into one another, a batch that changes them, and a first
    text that is not the one of the same seed without -k."""
    options, line = ["--seed", 1, "--temperature", 1, "-n", 25], "\n" + "-" * 40 + "\n"
    texts = cli("generate", "the ", "-k", 66, *options).out.split(line)
    assert len(texts) == 67 == len(set(texts)) and {len(t) for t in texts} == {29, 0}
    assert cli("generate", "the ", *options).out == texts[0] + "\n"
    assert cli("generate", "the ", "-k", 2, *options).out.split(line) == [*texts[:2], ""]


def test_eval(model, cli):
    """Catches a loss that is not the model's, the training part counted, and unknown characters."""
    text, options = Path("prose.txt").read_text(encoding="utf-8"), ["--dtype", "float32"]
    result = cli("eval", "prose.txt", "--device", "cpu", *options)
    loss, bits, perplexity = map(float, re.findall(r"\d+\.\d+", result.out))
    assert loss == pytest.approx(anexagpt.load(model).metadata.validation_loss, abs=1e-4)
    assert bits == pytest.approx(loss / math.log(2), abs=2e-4)
    assert perplexity == pytest.approx(math.exp(loss), rel=1e-3) and "validation part" in result.out
    assert f"over {len(text) - len(text) * 9 // 10 - 1:,} characters" in result.out
    Path("other.txt").write_text("\u4e2d" + text[:500] + "\u4e2d\u6587", encoding="utf-8")
    result = cli("eval", "--data", "other.txt", *options)
    assert "whole text" in result.out and "over 500 characters" in result.out
    assert result.err.endswith("(left out, as the model does not know them: 3)\n")
    Path("other.txt").write_text("\u4e2d\u6587" * 50, encoding="utf-8")
    result = cli("eval", "other.txt")
    assert result.status == 2 and "other.txt" in result.err and result.out == ""


def test_plain_names(model, cli):
    """Catches a file name without an option that is refused or goes to the wrong place, in any
    order with options, and a list of names that is joined."""
    os.rename("prose.txt", "diary.txt")
    os.rename("model.safetensors", "bard.safetensors")
    Path("letters").mkdir()
    Path("letters/a.md").write_text("the cat\n" * 100)
    sampling, short = ["-n", "5", "--seed", "1"], [*TINY, "--max-steps", 2]
    text = "the" + anexagpt.load("bard.safetensors").generate("the", max_new=5, seed=1) + "\n"
    assert cli("chat", "bard.safetensors", *sampling, stdin="the\n").out == text
    assert cli("chat", *sampling, "bard.safetensors", stdin="the\n").out == text
    assert "bard.safetensors" in cli("info", "bard.safetensors").out
    for order in (["bard.safetensors", "the"], ["the", "bard.safetensors"]):
        assert cli("generate", *order, *sampling).out == text
        assert "attention" in cli("explain", *order).out
    bard = "bard.safetensors"
    for words in (["letters", "--model", bard], [bard, "letters"], ["--data", "letters", bard]):
        assert "letters, whole text" in cli("eval", *words, "--device", "cpu").out
    assert cli("export", "bard.safetensors", "hf", "--license", "mit").status == 0
    assert cli("export", "--force", "hf", "bard.safetensors").status == 0
    assert cli("train", "diary.txt", *short, "letters", "--out", "a.safetensors").status == 0
    assert cli("run", *short, "diary.txt", stdin="the\n").out.startswith("the")
    for name in ("diary.txt", "./diary.txt", Path.cwd() / "diary.txt"):
        assert cli(name, stdin="red\n").out.startswith("red")
    Path("other.txt").write_text(prose(200))
    assert cli("other.txt").is_error("model.safetensors: already holds a model", "--out FILE")
    plus = ["a + b.txt", "c.txt"]
    for name in plus:
        Path(name).write_text(prose(100))
    assert cli("train", "--data", *plus, *short, "--out", "c.safetensors").status == 0
    assert cli("train", "-", *short, "--out", "d.safetensors", stdin=prose(200)).status == 0
    for name, names in {"a": ["diary.txt", "letters"], "model": ["diary.txt"], "c": plus}.items():
        saved = json.loads(cli("info", f"{name}.safetensors", "--json").out)
        assert saved["data"]["names"] == names


def test_commands_open_a_checkpoint(cli):
    """Catches an unfinished run that cannot be used, or is not said to be one (number 6)."""
    Path("prose.txt").write_text(prose(500))
    with interrupt_at(21):
        result = cli("train", "prose.txt", *TINY, "--max-steps", 1_000, "--eval-interval", 10)
    assert result.status == 130 and not Path("model.safetensors").exists()
    file, step = "model.safetensors.checkpoint", re.search(r"at step (\d+)", result.err)[1]
    for command in (f"chat {file}", f"generate the --model {file}", f"explain a --model {file}"):
        result = cli(*command.split())
        assert result.status == 0 and re.search(rf"step {step}\b", result.err), command
    assert f"{step} steps" in cli("info", file).out
    assert cli("generate", "the").is_error("model.safetensors: no such file", "--out model")
    assert cli("train", "prose.txt", "--out", file).is_error("--out", file, "choose another")


@pytest.mark.parametrize("prompt", ["-the", "--", "--model", "-n 5"])
def test_prompts_that_look_like_options(model, cli, prompt):
    """Catches a prompt with a hyphen that is an option, also where -- is the prompt."""
    result = cli("generate", "-n", 5, "--temperature", 0, "--", "the" + prompt)
    assert result.status == 0 and len(result.out) > 8
    known = prompt.replace("-", "")
    for words in (["--", prompt], ["--", prompt, model]):
        result = cli("generate", "-n", 5, "--temperature", 0, *words)
        if known.strip():
            assert result.status == 0 and result.out.startswith(known.strip()[:1]), result
        else:
            assert result.is_error("the model knows none of these characters")
    assert cli("generate").is_error("prompt") and "MODEL" not in cli("generate").err


@pytest.mark.parametrize("prompt", ["-the", "-nothing", "-kind", "-hello", "--the", "-n the"])
def test_prompts_that_are_taken_for_options(model, cli, prompt):
    """Catches -nothing that is -n othing, and an error without the prompt or the way to give it."""
    assert cli("generate", prompt).is_error(prompt, "after --")
    assert cli("explain", prompt).is_error("after --")
    assert cli("generate", "the", "--stop", prompt).is_error("after --stop=")
    assert cli("train", "--out", prompt).is_error("--out=")
    assert cli("train", "--data", prompt).is_error("after --")
    assert cli("generate", "the", f"--stop={prompt}", "-n5").status == 0
    assert cli("generate", "the", "-n5").status == cli("generate", "the", "-n=5").status == 0


@pytest.mark.parametrize("command", [
    "info a.b {}", "generate a b {}", "explain a b {}", "push a b {}", "chat a {}", "export a b {}",
    "train --bogus={}", "train -{}", "generate -n{}", "train --size {}", "train --out {}",
    "train --max-steps {}", "train x.txt --data x --out x.safetensors --tensorboard {} --init {}",
    "generate x --model {}", "explain x --view {}", "{}@ {}", "push {}", "eval a.checkpoint {}",
    "export {}", "export --gguf {}", "train prose.txt --out n.safetensors --tensorboard {}",
])  # fmt: skip
def test_secrets_of_an_address_in_the_wrong_place(model, cli, command):
    """Catches a user, password or query on the screen, whatever complains about the argument."""
    url = "http://me:secret@example/a.safetensors?token=hidden"
    result = cli(*(word.format(url) for word in command.split()))
    assert result.status == 2 and result.err.count("\n") == 1 and "Traceback" not in result.err
    assert not re.search("me:|secret|hidden", result.out + result.err), result.err
    assert not os.path.exists("http:")


MISTYPED = "//me:secret@h", "http//me:secret@h", "http;//secret@h", "h", "https:me:secret@h"


@pytest.mark.parametrize("begin", MISTYPED)
@pytest.mark.parametrize("end", ["?id=1&token=hidden", "?hidden", "#token=hidden"])
def test_secrets_of_a_mistyped_address(cli, begin, end):
    """Catches a password or query on the screen where an address does not begin like one."""
    for command in ("train --data", "", "chat", "generate x", "train --out"):
        result = cli(*command.split(), f"{begin}/get.txt{end}")
        assert result.status == 2 and not re.search("secret|hidden", result.err), result.err


def test_names_of_files_like_addresses(model, cli):
    """Catches a message that names another file than the one that is there."""
    Path("run?v=1").mkdir()
    shutil.move(model, "run?v=1/m@x.safetensors")
    command = ["train", "prose.txt", *QUICK, "--out", "run?v=1/m@x.safetensors"]
    assert cli(*command).is_error("--init run?v=1/m@x.safetensors --out FILE")
    for name in ("me@example.com/m.safetensors", "C#/m.safetensors"):
        assert cli("info", name).is_error(f"{name}: no such file", f"train --out {name}")


def test_errors_of_several_processes(model, cli, monkeypatch):
    """Catches an error of a process with a higher rank that nobody sees, or sees twice."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    for local_rank, n in (("0", 1), ("1", 0)):  # the first on its machine, and not
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        result = cli("info", "nowhere.safetensors")
        assert result.status == 2 and result.err.count("no such file") == n
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert cli(model).is_error("torchrun", "use the command train")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(anexagpt, "read_file", lambda path: open("/nowhere"))  # noqa: SIM115
    assert cli("info", "x.safetensors").is_error("/nowhere: No such file")


def test_line_end_in_a_name(cli):
    """Catches an error of several lines for a file name that has a line end."""
    for command in ("info", "chat", "train --out"):
        assert cli(*command.split(), "a\nb.st").is_error(r"a\nb.st")


def test_prompt_from_standard_input(model, cli):
    """Catches a prompt of two lines that cmd.exe cannot pass."""
    out = cli("generate", "-", "-n", 0, stdin="the\ncat\n").out
    assert out == "the\ncat\n"
    assert cli("generate", "-", "-n", 0, stdin="the\r\n").out == "the\n"
    assert cli("explain", "-", stdin="the\ncat\n").out == cli("explain", "the\ncat").out
    result = cli("chat", "-n", 0, stdin="/show\r\nthe\r\nquit\r\n")
    assert result.out == "the\n" and "unknown" not in result.err
    result = cli("generate", "-", "-n", 0, stdin="the\udce9 cat\n")  # a byte that is not UTF-8
    assert result.status == 0 and result.out.endswith(" cat\n") and "dropped" in result.err


@pytest.mark.parametrize("columns", ["0", "00"])
def test_terminal_without_a_width(model, cli, monkeypatch, columns):
    """Catches messages and views that are cut to nothing by COLUMNS=0."""
    monkeypatch.setenv("COLUMNS", columns)
    result = cli("explain", "the")
    assert result.status == 0 and "attention" in result.out


def test_command_after_the_options(model, cli):
    """Catches a command that is taken for a text."""
    assert cli("--quiet", "train").is_error("'train'", "first")
    assert cli("--data", "prose.txt", "train").is_error("'train'", "first")


def test_model_as_the_command(model, cli):
    """Catches a model that is not opened, or options of chat that are not those of the answer."""
    result = cli(model, "--temperature", 0, "-n", 5, stdin="the\n")
    answer = cli("chat", model, "--temperature", 0, "-n", 5, stdin="the\n")
    assert result.status == 0 and "/help" in result.err and result.out == answer.out != ""


# ---- errors ----


@pytest.mark.parametrize("line, words", [
    ("train --n-embd 130 --n-head 4", ["--n-embd 130", "132"]),
    ("train --max-steps 0", ["--max-steps 0", "from 1 to"]),
    ("train --max-steps 1.5", ["--max-steps", "1.5"]),
    ("train --max-step 5", ["--max-step (see anexagpt.py train --help)"]),
    ("train --block-size 50000", ["--block-size 50", "4,096"]),
    ("train --dropout 0.95", ["--dropout 0.95", "0.9"]),
    ("train --learning-rate inf", ["--learning-rate inf"]),
    ("train --seed -1", ["--seed -1"]),
    ("train --data nowhere.txt", ["--data nowhere.txt", "sherlock"]),
    ("train --data my`restart`.txt", ["--data my`restart`.txt: no such file"]),
    ("train --data prose.txt --encoding utf-99", ["--encoding utf-99"]),
    ("train --data prose.txt --block-size 4000", ["prose.txt", "40,010", "--block-size"]),
    ("train --data prose.txt --out .", ["--out ."]),
    ("train --data prose.txt --out prose.txt/m.safetensors", ["prose.txt/m.safetensors"]),
    ("train --data prose.txt --device cuda", ["--device cuda", "cpu"]),
    ("train --init nowhere.safetensors", ["nowhere.safetensors", "no such file"]),
    ("train --init prose.txt", ["prose.txt", "not a complete model"]),
    ("train prose.txt --init model.safetensors", ["no --init, not model.safetensors"]),
    ("run model.safetensors", ["is a model, not a text", "chat opens it"]),
    ("train --data model.safetensors", ["is a model", "--init model.safetensors"]),
    ("train --init model.safetensors --n-layer 2", ["--n-layer 1", "2"]),
    ("train prose.txt", ["model.safetensors", "already holds a model", "--out FILE", "--restart"]),
    ("run --n-layer 2", ["model.safetensors", "--n-layer 1, not 2", "--out FILE", "--restart"]),
    ("run --top-p 1.5", ["--top-p 1.5"]),
    ("nonsense", ["nonsense", "generate"]),
    ("chat --temperature nan", ["--temperature nan"]),
    ("chat --model nowhere.safetensors", ["nowhere.safetensors: no such file", "train --out"]),
    ("chat --model .", ["."]),
    ("generate x --samples 0", ["--samples 0", "10,000"]),
    ("generate x --seed 99999999999999999999", ["--seed 99999999999999999999"]),
    ("generate x --stop", ["--stop"]),
    ("generate", ["prompt"]),
    ("generate model.safetensors", ["prompt"]),
    ("explain model.safetensors --view probs", ["text to show"]),
    ("info .", ["it is a folder, not a .safetensors file", "name another"]),
    ("explain a --view attn --layer 3", ["layer 3", "1 to 1"]),
    ("explain a --view attn --layer 0", ["layer 0", "1 to 1"]),
    ("explain a --view attn --head -1", ["head -1", "1 to 2"]),
    ("explain a --layer 9", ["layer 9", "1 to 1"]),
    ("explain a --head 0", ["head 0", "1 to 2"]),
    ("explain a --view sums", ["sums"]),
    ("info prose.txt", ["prose.txt", "not a complete model"]),
    ("export", ["--gguf"]),
    ("export --f16 hf", ["--gguf"]),
    ("push me/x --token hf_secret", ["arguments: --token (see"]),
    ("push me/x --token=hf_secret", ["arguments: --token (see"]),
    ("chat --model prose.txt", ["prose.txt", "not a complete model"]),
    ("generate It was a", ["unexpected argument 'was'", "quote"]),
    ("explain It was", ["unexpected argument 'was'", "quote"]),
    ("generate x no.safetensors", ["no.safetensors: no such file"]),
    ("generate x model.safetensors --model b.safetensors", ["--model b.safetensors", "drop one"]),
    ("chat hello world", ["unexpected argument 'world'", "one model"]),
    ("chat model", ["model: no such file", ".safetensors"]),
    ("info a.safetensors.checkpoint", ["a.safetensors.checkpoint: no such file; check the name\n"]),
    ("model.safetensors --data prose.txt", ["anexagpt.py chat: unrecognized arguments: --data"]),
    ("model.safetensors --restart", ["anexagpt.py chat: unrecognized arguments: --restart"]),
    ("--quiet model.safetensors", ["a command or a model comes first"]),
    ("train -n-layer 1", ["-n-layer", "options begin with --"]),
    ("train --encoding locale prose.txt", ["--encoding locale", "unknown"]),
    ("train --encoding undefined prose.txt", ["--encoding undefined", "unknown"]),
    ("export a.gguf --gguf b.gguf", ["unexpected argument 'a.gguf'", "one"]),
    ("export a.gguf b.GGUF", ["unexpected argument 'b.GGUF'", "one"]),
    ("export a b", ["unexpected argument 'b'", "one"]),
    ("export a --gguf a", ["a: must end in .gguf"]),
    ("export loop", ["loop: is not a folder"]),
    ("export --gguf loop", ["loop: must end in .gguf"]),
    ("export --gguf loop/x.gguf", ["loop"]),
    ("push model.safetensors", ["USER/NAME"]),
    ("train prose.txt --out foreign.safetensors", ["foreign.safetensors", "another --out"]),
    ("run prose.txt --out foreign.safetensors", ["foreign.safetensors", "another --out"]),
    ("train prose.txt --out broken.safetensors", ["broken link", "another --out"]),
])  # fmt: skip
def test_errors(model, cli, line, words):
    """Catches a value that is accepted, a message without value or rule, and files left behind."""
    Path("foreign.safetensors").write_bytes(save({"wte.weight": torch.zeros(2, 2)}))
    for name, place in {"loop": "loop", "broken.safetensors.checkpoint": "nowhere"}.items():
        Path(name).symlink_to(place)
    arguments, before = line.split(), set(os.listdir())
    if line.startswith("train -"):
        arguments += [] if "--out" in line else ["--out", "new.safetensors"]
        arguments += [] if "--max-steps" in line else ["--max-steps", "1"]
    assert cli(*arguments).is_error(*words)
    assert {name for name in os.listdir() if not name.startswith(".")} == before


def test_broken_files_environments_and_packages(model, cli, monkeypatch):
    """Catches a traceback for a file that is cut off, for torchrun's variables and a package."""
    command = ["train", "prose.txt", "--out", "new.safetensors", *QUICK]
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.event_pb2", None)
    assert cli(*command, "--tensorboard", "b").is_error("pip install tensorboard")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli(*command).is_error("WORLD_SIZE", "torchrun")
    assert cli("run", *command[1:]).is_error("torchrun", "train")
    monkeypatch.delenv("WORLD_SIZE")
    model.write_bytes(model.read_bytes()[:-100])
    for command in (["chat"], [], ["generate", "x"], ["info"], ["export", "hf"]):
        assert cli(*command).is_error("model.safetensors", "not a complete model")


def test_what_was_read_of_a_prompt(model, cli):
    """Catches a prompt of which a part is left out without a word."""
    long = cli("generate", "the cat " * 9, "-n", 1, "--model", model)
    assert "the last 16 are read" in long.err
    for view in ("probs", "why", "attn"):
        assert "dropped \u4f60" in cli("explain", "the\u4f60", "--view", view, "--model", model).err


def test_surprise_of_a_long_text(model, cli, monkeypatch):
    """Catches a part of a text whose characters do not know the part before it."""
    monkeypatch.setattr(anexagpt, "MAX_VIEW", 20)
    text = "the cat ran home and the dog saw it"
    bits = anexagpt.load(model).surprise(text)[-20:].sum()
    out = cli("explain", text, "--view", "why", "--model", model).out
    assert f"{bits:,.1f} bits, " in out


def test_dtype_of_an_evaluation(model, cli, monkeypatch):
    """Catches a --dtype that changes nothing."""
    dtypes = []
    evaluate = anexagpt.evaluate

    def noted(network, ids, dtype, *rest):
        dtypes.append(dtype)
        return evaluate(network, ids, dtype, *rest)

    monkeypatch.setattr(anexagpt, "evaluate", noted)
    Path("prose.txt").write_text(prose(100))
    command = ["eval", "prose.txt", "--model", model, "--device", "cpu", "--dtype", "bfloat16"]
    assert cli(*command).status == 0 and dtypes == [torch.bfloat16]


def test_too_little_memory():
    """Catches an empty message: Python's own MemoryError says nothing."""
    assert "out of memory" in anexagpt.explain_runtime_error(MemoryError())
