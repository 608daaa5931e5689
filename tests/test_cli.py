"""CLI: the whole program, in processes of its own and against a server on the loopback; and every error."""

import os
import re
import shutil
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, Answer, Server, prose, start
from safetensors.torch import load_file

import anexagpt
from anexagpt import load_model

QUICK = [*TINY, "--max-steps", "30", "--eval-interval", "10"]


# ---- from an empty folder to a talking model -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def first_run(tmp_path_factory, sherlock):
    """The main job, once: the script in an empty folder, the real book from a server, a prompt from a pipe."""
    folder = tmp_path_factory.mktemp("new-user")
    script = shutil.copy(ROOT / "anexagpt.py", folder)
    server = Server()
    url = server.page("/cache/epub/1661/pg1661.txt", Answer(sherlock))
    result = start("--data", url, *QUICK, cwd=folder, stdin="Sherlock\nquit\n", program=Path(script))
    asked = list(server.asked)
    server.close()
    return folder, url, asked, result


def test_first_run(first_run):
    """Catches any line of the product's face that changed, in text or in order, and text on the wrong stream."""
    folder, _, asked, result = first_run
    assert result.status == 0, result.err
    assert asked == ["/cache/epub/1661/pg1661.txt"]
    face = [
        "Training finished...",
        "Model saved to model.safetensors",
        "",
        "--- Interactive Generation ---",
        "Enter a prompt to continue (or 'quit' to exit)",
    ]
    lines = result.err.splitlines()
    at = lines.index("Training finished...")
    assert lines[at : at + 5] == face and lines[at + 5].startswith("Prompt: Response: ")
    assert result.out.startswith("Sherlock") and len(result.out) == len("Sherlock") + 300 + 1
    assert "562,516 characters" in result.err or re.search(r"562,\d\d\d characters", result.err)
    assert "\x1b" not in result.err + result.out and "\r" not in result.err + result.out
    names = {path.name for path in folder.iterdir() if path.suffix != ".lock"}
    assert names == {"anexagpt.py", "data", "model.safetensors"}
    assert len(list((folder / "data").iterdir())) == 1


def test_progress_lines(first_run):
    """Catches plain progress lines that lack a figure, or whose columns dance."""
    lines = [line for line in first_run[3].err.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["10/30", "20/30", "30/30"]
    pattern = r"step \d+/30 train \d\.\d{4} val \d\.\d{4} +[\d,]+ char/s +\d+:\d\d left \| .+"
    assert all(re.fullmatch(pattern, line) for line in lines)
    assert len({line.index("|") for line in lines}) == 1
    losses = [float(line.split()[5]) for line in lines]
    assert losses == sorted(losses, reverse=True) and losses[0] < 4.5
    assert "loss in nats/char: o training, x validation" in first_run[3].err


def test_second_run_goes_straight_to_the_prompt(first_run):
    """Catches a second run that trains or asks the network again (the server is gone)."""
    folder, *_ = first_run
    before = (folder / "model.safetensors").read_bytes()
    result = start(cwd=folder, stdin="Holmes\n", program=folder / "anexagpt.py")
    assert result.status == 0 and result.out.startswith("Holmes")
    lines = result.err.splitlines()
    assert lines[0].startswith("model.safetensors: ") and "30 steps" in lines[0] and "validation loss" in lines[0]
    assert lines[1:4] == ["", "--- Interactive Generation ---", "Enter a prompt to continue (or 'quit' to exit)"]
    assert "Training" not in result.err and (folder / "model.safetensors").read_bytes() == before


def test_generate_prints_only_the_text(first_run):
    """Catches anything but the text on standard output, which would end up in somebody's file."""
    folder, *_ = first_run
    result = start("generate", "Sherlock", "-n", 40, "--seed", 1, cwd=folder)
    assert result.status == 0 and result.err == ""
    assert result.out.startswith("Sherlock") and len(result.out) == 8 + 40 + 1


def test_chat_with_a_pipe(first_run):
    """Catches `echo Sherlock | python anexagpt.py chat` that fails, or that waits for a terminal."""
    result = start("chat", "--max-new", 20, cwd=first_run[0], stdin="Sherlock\n")
    assert result.status == 0 and result.out.startswith("Sherlock") and len(result.out) == 8 + 20 + 1
    assert result.err.splitlines()[0].startswith("model.safetensors: 4,880 parameters, trained on http")


def test_eval_and_info_of_the_first_run(first_run, cli, monkeypatch):
    """Catches an eval whose figure is not that of the training, and an info that leaves something out."""
    folder, url, _, first = first_run
    monkeypatch.chdir(folder)
    result = cli("eval", "--device", "cpu", "--dtype", "float32")
    told = float(re.search(r"([\d.]+) nats/char", result.out)[1])
    assert result.status == 0 and "validation part" in result.out
    assert told == pytest.approx(min(map(float, re.findall(r"val (\d\.\d+)", first.err))), abs=2e-4)
    result = cli("info")
    assert result.status == 0 and result.err == ""
    for word in ("n_layer 1", "block_size 16", url, "max_steps 30", "batch_size 4", "seed 1337", "o training"):
        assert word in result.out
    size = f"{(folder / 'model.safetensors').stat().st_size:,} bytes"
    assert size in result.out and "validation loss" in result.out


def test_no_network_at_all(program, tmp_path, dead):
    """Catches a first run without network that does not end in a talking model: loudly, with Python's documentation."""
    proxies = dict.fromkeys(["http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"], dead)
    result = program(*QUICK, stdin="the\n", env=proxies | dict(no_proxy="", NO_PROXY=""))
    assert result.status == 0, result.err
    notes = [line for line in result.err.splitlines() if line.startswith("NOTE")]
    assert any("Sherlock Holmes could not be downloaded" in note for note in notes)
    assert any("python-docs" in note for note in notes)
    assert result.out.startswith("the") and "Model saved to model.safetensors" in result.err
    assert not (tmp_path / "data").exists() or not list((tmp_path / "data").iterdir())


def test_only_what_requirements_txt_installs(tmp_path):
    """Catches a package that the program needs, or that a package of it needs, and that nobody installs: everything
    that requirements.txt does not bring is hidden from the program, which is then taken through its whole story."""
    wanted, names = [], set()
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        wanted.append(re.split(r"[=<>\[; ]", line)[0])
    while wanted:
        name = re.sub(r"[-_.]+", "-", wanted.pop()).lower()
        if name and name not in names:
            try:
                needs = metadata.requires(name) or []
            except metadata.PackageNotFoundError:
                continue
            names.add(name)
            wanted += [re.split(r"[=<>!~\[;( ]", need)[0] for need in needs if "extra ==" not in need]
    hidden = {
        module
        for module, owners in metadata.packages_distributions().items()
        if not {re.sub(r"[-_.]+", "-", owner).lower() for owner in owners} & names
    }
    assert "pytest" in hidden and "torch" not in hidden
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({sorted(hidden)!r}))\n")
    (tmp_path / "prose.txt").write_text(prose(500))
    result = start("--data", "prose.txt", *QUICK, cwd=tmp_path, stdin="the\n", env=dict(PYTHONPATH=str(tmp_path)))
    assert result.status == 0, result.err
    assert "Warning" not in result.err and result.out.startswith("the")


@pytest.mark.skipif(os.name == "nt", reason="a POSIX shell")
def test_reader_that_has_heard_enough(tiny):
    """Catches a traceback after `anexagpt.py generate ... | head -c 5`."""
    command = f'"{sys.executable}" "{ROOT / "anexagpt.py"}" generate the -n 5000 --model "{tiny}" | head -c 5'
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=180)
    assert done.stdout[:3] == "the" and len(done.stdout) == 5 and done.stderr == ""


def test_help_and_typing_errors_answer_before_pytorch(program, tmp_path):
    """Catches a help page that takes seconds: with a PyTorch that cannot be imported, it must still come."""
    (tmp_path / "torch.py").write_text("raise SystemExit('PyTorch was imported')")
    environment = dict(PYTHONPATH=str(tmp_path))
    result = program("--help", env=environment)
    assert result.status == 0 and "generate" in result.out and result.err == ""
    assert program("train", "--max-step", 5, env=environment).is_error("--max-step", "did you mean --max-steps?")
    assert program("chta", env=environment).is_error("chta", "chat")


def test_old_pytorch(program, tmp_path):
    """Catches a traceback from the middle of the program where PyTorch is too old."""
    package = tmp_path / "old" / "torch"
    (package / "nn" / "functional").mkdir(parents=True)
    (package / "__init__.py").write_text("__version__ = '2.8.1'\nclass Tensor: pass\n")
    (package / "nn" / "__init__.py").write_text("")
    (package / "nn" / "functional" / "__init__.py").write_text("")
    (package / "distributed.py").write_text("")
    fake = "import sys, types\nsys.modules['safetensors.torch'] = types.ModuleType('safetensors.torch')\n"
    (tmp_path / "old" / "sitecustomize.py").write_text(fake)
    result = program("info", env=dict(PYTHONPATH=str(tmp_path / "old")))
    assert result.status in (1, 2) and result.err.count("\n") == 1 and "2.8.1" in result.err and "2.9" in result.err


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [["chat"], ["generate", "x"], ["eval"], ["info"]], ids=lambda c: c[0])
def test_no_model(program, command):
    """Catches a traceback where there is no model yet; in a process of its own, as a person runs it."""
    if command == ["chat"]:
        assert program(*command).is_error("model.safetensors: no such file", "train")
    assert program(*command, "--model", "mine.safetensors").is_error("mine.safetensors: no such file", "train")


@pytest.mark.parametrize(
    "line, words",
    [
        ("train --n-embd 130 --n-head 4", ["--n-embd 130", "--n-head 4", "132"]),
        ("train --batch-size 12 --grad-accum 5", ["--batch-size 12", "--grad-accum 5"]),
        ("train --max-steps 0", ["--max-steps 0", "from 1 to"]),
        ("train --block-size 1", ["--block-size 1", "from 2 to"]),
        ("train --dropout 0.95", ["--dropout 0.95", "0.9"]),
        ("train --dropout nan", ["--dropout nan"]),
        ("train --learning-rate -1", ["--learning-rate"]),
        ("train --learning-rate inf", ["--learning-rate inf"]),
        ("train --seed -1", ["--seed"]),
        ("train --eval-interval 0", ["--eval-interval 0"]),
        ("chat --temperature -1 --model {tiny}", ["--temperature"]),
        ("chat --top-p 1.5 --model {tiny}", ["--top-p 1.5"]),
        ("chat --min-p 2 --model {tiny}", ["--min-p 2.0"]),
        ("chat --top-k -1 --model {tiny}", ["--top-k"]),
        ("chat --repetition-penalty 0 --model {tiny}", ["--repetition-penalty 0.0"]),
        ("generate x --max-new -1 --model {tiny}", ["--max-new"]),
        ("generate x --samples 0 --model {tiny}", ["--samples 0"]),
        ("generate x --seed 99999999999999999999 --model {tiny}", ["--seed"]),
        ("generate x --temperature nan --model {tiny}", ["--temperature nan"]),
        ("eval --data nowhere.txt --model {tiny}", ["--data nowhere.txt"]),
        ("train --data prose.txt --encoding utf-99", ["--encoding utf-99"]),
        ("train --data prose.txt --block-size 60000", ["prose.txt", "600,010", "--block-size"]),
    ],
)
def test_values_that_cannot_be(cli, tiny, tmp_path, line, words):
    """Catches a value that is accepted, an error after a long download, and one without the value or the rule."""
    (tmp_path / "prose.txt").write_text(prose(100))
    before = set(os.listdir(tmp_path))
    tight = ["--max-steps", "1"] if line.startswith("train") and "--max-steps" not in line else []
    assert cli(*line.format(tiny=tiny).split(), *tight).is_error(*words)
    assert {name for name in os.listdir(tmp_path) if name != "data"} == before  # nothing half-written stays


def test_run_checks_sampling_before_training(cli, tmp_path):
    """Catches a typing error that is told after four minutes of training."""
    (tmp_path / "prose.txt").write_text(prose(500))
    assert cli("run", "--data", "prose.txt", *QUICK, "--top-p", 1.5).is_error("--top-p 1.5")
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("out", [".", "/", "..", "folder", "prose.txt/model.safetensors"])
def test_model_that_cannot_be_written(cli, tmp_path, out):
    """Catches a place that cannot hold the model, noticed only after the training."""
    (tmp_path / "prose.txt").write_text(prose(500))
    (tmp_path / "folder").mkdir()
    for command in ("train", "run"):
        assert cli(command, "--data", "prose.txt", *QUICK, "--out", out).is_error(out)


def test_missing_folder(cli, tmp_path):
    """Catches a training whose result has nowhere to go: the folder is made, or the error comes first."""
    (tmp_path / "prose.txt").write_text(prose(500))
    result = cli("train", "--data", "prose.txt", *QUICK, "--quiet", "--out", "no/where/model.safetensors")
    made = (tmp_path / "no" / "where" / "model.safetensors").exists()
    assert (result.status == 0 and made) or result.is_error("no")


@pytest.mark.skipif(os.name == "nt", reason="folders have no such mode on Windows")
def test_folder_without_permission(cli, tmp_path):
    """Catches a traceback, or an error after the training, in a folder that cannot be written to."""
    (tmp_path / "prose.txt").write_text(prose(500))
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    if os.access(locked, os.W_OK):  # as root; but nobody makes files in /proc
        locked = Path("/proc")
    result = cli("train", "--data", "prose.txt", *QUICK, "--out", locked / "m.safetensors")
    assert result.is_error("--out", str(locked))


def test_broken_model_in_a_process_of_its_own(program, tiny, tmp_path):
    """Catches a traceback where a download of the model broke off."""
    (tmp_path / "model.safetensors").write_bytes(tiny.read_bytes()[:-100])
    assert program("chat").is_error("model.safetensors", "not a whole model")
    assert program().is_error("model.safetensors", "not a whole model")


def test_any_folder_as_a_model(cli, tmp_path):
    """Catches a traceback for --model with a folder."""
    assert cli("info", "--model", tmp_path).is_error(str(tmp_path))


# ---- commands --------------------------------------------------------------------------------------------------------


def test_train_says_what_it_does(cli, tmp_path):
    """Catches a training without the facts, and a model or a prompt from the wrong command."""
    (tmp_path / "prose.txt").write_text(prose(500))
    result = cli("train", "--data", "prose.txt", *QUICK, "--out", "me.safetensors")
    assert result.status == 0 and result.out == "" and "Interactive" not in result.err
    assert "4 x 16 characters" in result.err and "on cpu in float32" in result.err and "30 steps" in result.err
    assert result.err.endswith("Training finished...\nModel saved to me.safetensors\n")
    assert sorted(n for n in os.listdir(tmp_path) if not n.endswith(".lock")) == ["me.safetensors", "prose.txt"]


def test_quiet(cli, tmp_path):
    """Catches progress that --quiet does not silence."""
    (tmp_path / "prose.txt").write_text(prose(500))
    result = cli("train", "--data", "prose.txt", *QUICK, "--quiet")
    assert result.status == 0 and "step " not in result.err and "o training" not in result.err


def test_finished_model_is_not_lost(cli, tmp_path, monkeypatch):
    """Catches a new training that destroys the finished model before it has a better one to put there."""
    (tmp_path / "prose.txt").write_text(prose(500))
    cli("train", "--data", "prose.txt", *QUICK, "--quiet")
    before = (tmp_path / "model.safetensors").read_bytes()
    update = anexagpt.Trainer.update

    def updating(self):
        update(self)
        if self.step == 20:
            raise KeyboardInterrupt

    monkeypatch.setattr(anexagpt.Trainer, "update", updating)
    other = ("train", "--data", "prose.txt", *QUICK, "--quiet", "--seed", 2)
    assert cli(*other).is_error("model.safetensors: exists", "--restart", "--out FILE")
    assert cli(*other, "--restart").status == 130
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_run_with_other_options_than_the_model(cli, tmp_path):
    """Catches options that a second run silently ignores, and ones that it should accept."""
    (tmp_path / "prose.txt").write_text(prose(500))
    assert cli("run", "--data", "prose.txt", *QUICK, stdin="the\n").status == 0
    assert cli("run", "--data", "prose.txt", *QUICK, stdin="the\n").status == 0
    assert cli("run", "--temperature", 0, "--max-new", 5, stdin="the\n").out.startswith("the")
    for option, value in (("--n-layer", "2"), ("--max-steps", "31"), ("--data", "sherlock")):
        assert cli("run", option, value).is_error("model.safetensors", option, value, "--restart")
    assert cli("run", "--size", "large").is_error("model.safetensors", "--n-layer 1, not 12", "--restart")
    assert cli("run", "--data", "prose.txt", *QUICK, "--n-layer", 2, "--restart", stdin="the\n").status == 0
    assert load_model(tmp_path / "model.safetensors", torch.device("cpu"))[2].config.n_layer == 2


@pytest.mark.parametrize("again", [False, True])
def test_init(cli, tiny, tmp_path, monkeypatch, again):
    """Catches a fine-tuning that begins with other weights than the model's or with its steps and rates, a character
    whose row went to another one, and an interrupted one that needs the model again, or does not take it again, or
    does not end in the same bits."""
    text = prose(500, seed=9).replace("h", "\u00fc").replace("o", "\u4e2d")
    (tmp_path / "new.txt").write_text(text, encoding="utf-8")
    begun = []
    init = anexagpt.Trainer.__init__

    def beginning(self, *arguments, **named):
        init(self, *arguments, **named)
        begun.append({name: weight.clone() for name, weight in self.model.state_dict().items()})

    monkeypatch.setattr(anexagpt.Trainer, "__init__", beginning)
    model = shutil.copy(tiny, tmp_path / "old.safetensors")
    command = ["train", "--data", "new.txt", "--quiet", "--batch-size", 4, "--max-steps", 20, "--eval-interval", 10]
    command += ["--device", "cpu", "--dtype", "float32"]
    assert cli(*command, "--init", model, "--out", "whole.safetensors").status == 0
    old, before, told = load_model(tiny, torch.device("cpu"))
    _, after, story = load_model(tmp_path / "whole.safetensors", torch.device("cpu"))
    weights = old.state_dict()
    rows, kept = begun[0].pop("wte.weight"), weights.pop("wte.weight")
    assert begun[0].keys() == weights.keys() and all(torch.equal(begun[0][name], weights[name]) for name in weights)
    assert "h" not in after.characters and "\u00fc" not in before.characters
    for c, row in zip(after.characters, rows, strict=True):
        mean = kept[1:].double().mean(0)
        expected = kept[before.characters.index(c)] if c in before.characters else mean.float()
        assert torch.allclose(row, expected, atol=1e-7), c
    assert story.training["init"] == str(model) and story.step == 20 and [row[0] for row in story.history] == [10, 20]
    assert story.data["name"] == "new.txt" and story.config.block_size == told.config.block_size
    assert anexagpt.for_publishing(story).training["init"] == "old.safetensors"
    update = anexagpt.Trainer.update

    def updating(self):
        update(self)
        if self.step == 12:
            signal.raise_signal(signal.SIGINT)

    command += ["--out", "parts.safetensors"]
    monkeypatch.setattr(anexagpt.Trainer, "update", updating)
    assert cli(*command, "--init", model).status == 130
    monkeypatch.setattr(anexagpt.Trainer, "update", update)
    assert cli(*command, "--init", "other.safetensors").is_error("parts-checkpoint", f"--init {model}", "--restart")
    os.unlink(model)
    assert cli(*command, *(["--init", model] if again else [])).status == 0
    one, two = (load_file(tmp_path / f"{name}.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    "options, words",
    [
        ("--init nowhere.safetensors", ["nowhere.safetensors", "no such file"]),
        ("--init new.txt", ["new.txt", "not a whole model"]),
        ("--init {tiny} --n-layer 2", ["--init {tiny}", "--n-layer 1"]),
        ("--init {tiny} --size small --block-size 16", ["--n-layer 1", "--n-head 2", "--n-embd 16"]),
        ("--init {tiny} --block-size 8", ["--block-size 16"]),
    ],
)
def test_init_that_cannot_be(cli, tiny, tmp_path, options, words):
    """Catches a model that is missing or broken, or of another shape, told after the download or by a traceback."""
    (tmp_path / "new.txt").write_text(prose(200))
    result = cli("train", "--data", "nowhere.txt", *options.format(tiny=tiny).split())
    assert result.is_error(*(word.format(tiny=tiny) for word in words)) and "nowhere.txt" not in result.err


def test_generate_samples(cli, tiny):
    """Catches samples that are equal, or run into one another."""
    result = cli("generate", "the ", "--samples", 3, "-n", 25, "--seed", 1, "--temperature", 1, "--model", tiny)
    texts = result.out.split("\n" + "-" * 40 + "\n")
    assert result.status == 0 and len(texts) == 4 and texts[3] == "" and len(set(texts)) == 4
    assert all(text.startswith("the ") and len(text) == 29 for text in texts[:3])


@pytest.mark.parametrize("command", [["chat"], ["generate", "the"], ["generate", "the", "-k", "2"]], ids=" ".join)
def test_threads_of_a_small_network(cli, tiny, command):
    """Catches a text read by several threads that wait for one another: ten times slower while others use the cores."""
    torch.set_num_threads(2)
    try:
        assert cli(*command, "--model", tiny, "-n", 20, stdin="the \n").status == 0
        assert torch.get_num_threads() == (2 if "-k" in command else 1)
    finally:
        torch.set_num_threads(1)


def test_generate_many_samples(cli, tiny):
    """Catches the last texts missing where there are more than are written side by side, and texts that repeat."""
    result = cli("generate", "the ", "-k", 129, "-n", 25, "--seed", 1, "--temperature", 1, "--model", tiny)
    texts = result.out.split("\n" + "-" * 40 + "\n")
    assert result.status == 0 and len(texts) == 130 and len(set(texts)) == 130
    fewer = cli("generate", "the ", "-k", 64, "-n", 25, "--seed", 1, "--temperature", 1, "--model", tiny)
    assert result.out.startswith(fewer.out)


def test_generate_seed_and_notice(cli, tiny):
    """Catches a seed that does not repeat, and a notice that gets into the text."""
    command = ["generate", "the \u201cdog\u201d", "-n", 20, "--seed", 3, "--model", tiny]
    result = cli(*command)
    assert result.out == cli(*command).out and result.out != cli(*command, "--seed", 4).out
    assert "\u201c" not in result.out and "\u201c" in result.err and result.err.count("\n") == 1


def test_generated_control_characters(cli, tmp_path):
    """Catches escape sequences that a model has learnt and then sends to the terminal."""
    text = "\x1b[31mred\x07 \u202eback\x9b1m\x00 \x7f\n" * 60
    (tmp_path / "nasty.txt").write_text(text, encoding="utf-8", newline="\n")
    train = cli("train", "--data", "nasty.txt", *QUICK)
    said = cli("chat", "--temperature", 5, "--seed", 1, stdin="red\x1b\n")
    made = cli("generate", "\x1b[31m", "--temperature", 5, "-n", 500)
    assert cli("generate", "red", "--samples", 2).status == cli("info").status == 0
    everything = train.err + said.out + said.err + made.out + made.err + cli("info").out
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", everything) and "\\x1b" in made.out


def test_output_that_cannot_spell_it(tiny, tmp_path):
    """Catches a UnicodeEncodeError on a terminal or in a pipe with another encoding."""
    (tmp_path / "greek.txt").write_text("\u03b1\u03b2\u03b3 \u03b4\u03b5\n" * 100, encoding="utf-8")
    options = ["--data", "greek.txt", *QUICK]
    result = start("run", *options, cwd=tmp_path, stdin="\u03b1\n", env=dict(PYTHONIOENCODING="ascii", PYTHONUTF8="0"))
    assert result.status == 0 and "Traceback" not in result.err and "\\u03b" in result.out + result.err


def test_eval_of_another_text(cli, tiny, tmp_path):
    """Catches unknown characters that are counted, and a whole text of which only a part is measured."""
    text = prose(300, seed=9)
    (tmp_path / "other.txt").write_text(text, encoding="utf-8", newline="\n")
    result = cli("eval", "--data", "other.txt", "--model", tiny, "--device", "cpu", "--dtype", "float32")
    loss, bits, perplexity = map(float, re.findall(r"(\d+\.\d+)", result.out))
    assert "other.txt, whole text" in result.out and f"over {len(text) - 1:,} characters" in result.out
    assert bits == pytest.approx(loss / 0.6931472, abs=2e-4) and perplexity == pytest.approx(2.7182818**loss, rel=1e-3)
    model, tokenizer, _ = load_model(tiny, torch.device("cpu"))
    assert loss == pytest.approx(anexagpt.evaluate(model, tokenizer.encode(text))[0], abs=1e-4)
    (tmp_path / "other.txt").write_text("\u4e2d\u6587" + text + "\u4e2d", encoding="utf-8", newline="\n")
    result = cli("eval", "--data", "other.txt", "--model", tiny, "--device", "cpu")
    assert f"over {len(text):,} characters" in result.out and "(3 left out" in result.err
    (tmp_path / "other.txt").write_text("\u4e2d\u6587" * 50, encoding="utf-8")
    assert cli("eval", "--data", "other.txt", "--model", tiny).is_error("other.txt")


def test_eval_says_which_part(cli, tiny):
    """Catches the training part counted in: the text of the training is measured in its last 10% only."""
    path = tiny.parent / "prose.txt"
    n = len(path.read_text(encoding="utf-8"))
    result = cli("eval", "--data", path, "--model", tiny, "--device", "cpu", "--dtype", "float32")
    assert "validation part" in result.out and f"over {n - n * 9 // 10 - 1:,} characters" in result.out
    loss = float(re.search(r"([\d.]+) nats/char", result.out)[1])
    assert loss == pytest.approx(load_model(tiny, torch.device("cpu"))[2].validation_loss, abs=1e-4)


def test_examples_of_the_help_page(cli):
    """Catches examples in the help page that the program does not accept."""
    lines = re.findall(r"^  python anexagpt\.py(.*)$", cli("--help").out, re.MULTILINE)
    assert len(lines) >= 5
    for line in lines:
        words = re.sub(r"  .*|> .*", "", line).replace('"It was a"', "It").split()
        assert anexagpt.parse_options(words).command in anexagpt.COMMANDS
