"""What is written, and what may never be replaced: other people's files, whatever their place."""

import errno
import os
import re
import shutil
import stat
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import header, interrupt_at
from test_faults import CHECKPOINT, MODEL, OPTIONS, at_step, folder, names, stop, weights  # noqa: F401

import anexagpt

RUN = ["train", *OPTIONS]


def put(path: Path, content: bytes = b"mine"):
    """Something that another program does while a run is going on."""
    return lambda: path.write_bytes(content)


def test_model_that_appears_during_the_run(cli):
    """Catches a file at --out that came after the run began, and is replaced at its end."""
    with at_step(5, put(MODEL)):
        result = cli(*RUN)
    assert result.status == 0 and MODEL.read_bytes() == b"mine"
    assert "Model saved to model.new.safetensors" in result.err and "NOTE" in result.err
    assert anexagpt.load("model.new.safetensors").metadata.step == 24
    assert not CHECKPOINT.exists()


def test_the_prompt_is_that_of_the_model_just_trained(cli):
    """Catches a chat with a foreign model that came to --out, instead of the one just trained."""
    with at_step(5, put(MODEL)):
        result = cli("run", *OPTIONS, stdin="/show\n")
    assert result.status == 0 and "24 steps" in result.err.partition("Prompt")[2], result


@pytest.mark.parametrize("what", ["checkpoint", "model"])
def test_file_that_comes_while_ours_is_written(cli, monkeypatch, tmp_path_factory, what):
    """Catches a foreign file that takes the place of ours during a write, and is then replaced."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path_factory.mktemp("rescue")))
    write = anexagpt.write_tensors
    path, written = dict(checkpoint=CHECKPOINT, model=MODEL)[what], []

    def write_slowly(temporary, tensors, header):
        write(temporary, tensors, header)
        written.append(path.name)
        if what == "model" or len(written) == 2:
            Path("theirs").write_bytes(b"mine")
            Path("theirs").replace(path)

    monkeypatch.setattr(anexagpt, "write_tensors", write_slowly)
    save = anexagpt.RunFiles.save_checkpoint

    def save_each_step(self, *arguments, **options):
        save(self, *arguments, **options)
        self.next_save = 0.0

    monkeypatch.setattr(anexagpt.RunFiles, "save_checkpoint", save_each_step)
    cli(*RUN, "--checkpoint-interval", 0 if what == "checkpoint" else 60)
    assert path.read_bytes() == b"mine"


def test_foreign_checkpoint_at_the_longest_name(cli, monkeypatch, tmp_path_factory):
    """Catches a run that is lost since its file under the next free name has too long a name."""
    rescue = tmp_path_factory.mktemp("rescue")
    monkeypatch.setattr("tempfile.tempdir", str(rescue))
    out = Path("a" * 232 + ".safetensors")  # 244 bytes, with .checkpoint 255
    with at_step(2, put(anexagpt.checkpoint_path(out))), interrupt_at(10):
        result = cli(*RUN, "--out", out)
    (saved,) = rescue.glob("*/*")
    assert "saved to" in result.err and anexagpt.load(saved).metadata.step == 10


@pytest.mark.parametrize("when", [0, 12])
def test_checkpoint_that_is_somebody_elses(cli, when):
    """Catches a foreign file at the checkpoint's name that is replaced or deleted: one that comes
    before the first checkpoint, and one that takes the place of ours."""
    with at_step(when or 2, put(CHECKPOINT)):
        result = cli(*RUN, "--checkpoint-interval", 0 if when else 60)
    assert result.status == 0 and CHECKPOINT.read_bytes() == b"mine"
    assert anexagpt.load(MODEL).metadata.step == 24
    with interrupt_at(10):
        result = cli(*RUN, "--out", "b.safetensors")
    assert result.status == 130 and "b.safetensors.checkpoint" in result.err


def test_checkpoint_that_cannot_be_removed(cli, monkeypatch):
    """Catches a run that seems to fail, since its checkpoint stays beside the finished model."""
    stop(cli, 10)

    def refuse(self, *_, **__):
        raise PermissionError(errno.EPERM, "Operation not permitted", str(self))

    monkeypatch.setattr(Path, "unlink", refuse)
    result = cli(*RUN)
    assert result.status == 0 and "Model saved to" in result.err
    assert f"NOTE: {CHECKPOINT}: cannot be removed" in result.err and CHECKPOINT.exists()


@pytest.mark.parametrize("out", ["s3://bucket/a.safetensors", "~/a.safetensors", "a\0.safetensors"])
def test_outputs_that_are_no_file_here(cli, monkeypatch, out):
    """Catches a folder named s3: or ~, in a container without a home, and a traceback."""
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    before = set(os.listdir())
    assert cli(*RUN, "--out", out).is_error(out[:1], "name" if out[0] != "~" else "full path")
    assert set(os.listdir()) == before


def test_text_on_a_broken_disk(cli, monkeypatch):
    """Catches "system: Input/output error", which does not say of which file."""

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(anexagpt, "decoded_pieces", fail)
    assert cli(*RUN).is_error("prose.txt: Input/output error")


def test_restart_that_cannot_begin(cli):
    """Catches --restart that drops an unfinished run, or renames a model, and trains nothing."""
    stop(cli, 10)
    before = CHECKPOINT.read_bytes()
    Path("file").touch()
    assert "--tensorboard file" in cli(*RUN, "--restart", "--tensorboard", "file").err
    assert CHECKPOINT.read_bytes() == before


def test_checkpoint_under_another_name(cli):
    """Catches "the same command resumes it" where it does not; what the message says does."""
    with at_step(2, put(CHECKPOINT)), interrupt_at(10):
        result = cli(*RUN)
    saved = Path("model.safetensors.new.checkpoint")
    assert result.status == 130 and f"saved in {saved}" in result.err
    assert f"renamed to {CHECKPOINT}, the same command resumes it" in result.err
    saved.replace(CHECKPOINT)
    result = stop(cli, 2)
    assert "at step 10" in result.err and "\nThe same command resumes it" in result.err


def test_backup_that_is_another_runs_output(cli):
    """Catches a model that --restart promised to keep, replaced by the run whose --out it is."""
    assert cli(*RUN, "--quiet").status == 0
    before = MODEL.read_bytes()
    old = MODEL.with_stem("model.old")
    with at_step(5, lambda: shutil.copy(MODEL, old)):
        assert cli(*RUN, "--out", old).status == 0
    assert old.read_bytes() == before == MODEL.read_bytes()
    assert MODEL.with_stem("model.old.new").exists()


def test_two_names_of_one_file(cli):
    """Catches a link and its target that hold two locks, and lose one model."""
    Path("real").mkdir()
    Path("link.safetensors").symlink_to("real/a.safetensors")
    results = []
    with at_step(3, lambda: results.append(cli(*RUN, "--out", "real/a.safetensors"))):
        assert cli(*RUN, "--out", "link.safetensors").status == 0
    assert results[0].is_error("another process trains it")
    assert Path("link.safetensors").is_symlink()
    assert anexagpt.load("real/a.safetensors").metadata.step == 24


def test_links_that_lead_nowhere(cli):
    """Catches a run to its end whose model has no place: a loop of links, a folder, a long name."""
    Path("loop.safetensors").symlink_to("loop.safetensors")
    places = ["loop.safetensors", "n" * 240 + ".safetensors", "prose.txt/a.safetensors"]
    if Path("/proc").is_dir():  # no file can be created there; filelock reports a lock that is held
        places.append("/proc/a.safetensors")
    for out in places:
        result = cli(*RUN, "--out", out)
        assert result.is_error("--out", "choose another"), out
        assert "another process" not in result.err


def test_longest_names(cli):
    """Catches a name that the model can have, but not what is written beside it."""
    out = "\u6587" * 76 + "ab.safetensors"  # 242 bytes; with .checkpoint 253
    stop(cli, 10, "--out", out)
    assert cli(*RUN, "--out", out).status == 0 and Path(out).exists()


def test_home_folder(cli, tmp_path, monkeypatch):
    """Catches --out=~/x, which no shell expands, that makes a folder named ~."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cli(*RUN, "--out=~/x.safetensors").status == 0
    assert (tmp_path / "home" / "x.safetensors").exists() and not Path("~").exists()
    assert "already" not in cli("--out=~/x.safetensors").err  # it opens the prompt
    anexagpt.load("~/x.safetensors").save("~/y.safetensors")
    assert "no such file" in cli("chat", "~/y.safetensors", stdin="/read ~nobody\n").err
    results = [
        cli("run", *OPTIONS, "--out=~/y.safetensors"),
        cli("info", "--model=~/x.safetensors"),
    ]
    results.append(cli("export", "~/x.safetensors", "~/hf", "--gguf=~/x.gguf"))
    results.append(cli("train", "--data=~/b.txt", *OPTIONS, "--init=~/x.safetensors"))
    assert not Path("~").exists()
    assert [result.status for result in results[:3]] == [0, 0, 0], results
    assert results[3].is_error("~/b.txt: no such file")


def test_home_folder_of_nobody(cli, tiny):
    """Catches a traceback for a ~ that leads to no home, in a command and in a chat."""
    assert cli(*RUN, "--out=~nobody-here/x.txt").is_error("~nobody-here/x.txt")
    chat = cli("chat", tiny, stdin="/read ~nobody-here/x\n/model ~nobody-here/x\n/show\n")
    assert chat.status == 0 and chat.err.count("no such file") == 2, chat


MOUNTS = {  # calls that a cloud mount or a container refuses, and the error
    "chmod": (os, "chmod", errno.EPERM),
    "fsync": (os, "fsync", errno.EINVAL),
    "flock": ("fcntl", "flock", errno.ENOLCK),
    "no locks": ("fcntl", "flock", errno.ENOTSUP),
    "no flock": ("fcntl", "flock", errno.ENOSYS),
}


@pytest.mark.parametrize("name", MOUNTS)
def test_mounts_that_refuse(cli, monkeypatch, name):
    """Catches a run that is refused, or whose later checkpoints are not saved, on a file system
    that lacks what is not essential."""
    owner, function, number = MOUNTS[name]
    owner = __import__(owner) if isinstance(owner, str) else owner
    notes = []

    def refuse(*arguments, **options):
        notes.append(arguments)
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(owner, function, refuse)
        stopped = stop(cli, 10, "--checkpoint-interval", 0)
        finished = cli(*RUN)
    assert stopped.status == 130 and finished.status == 0, (stopped, finished)
    assert notes and "not saved" not in stopped.err + finished.err
    assert (stopped.err + finished.err).count("NOTE: ") == 3  # two for a short text
    assert anexagpt.load(MODEL).metadata.step == 24


def test_mode_bits(cli):
    """Catches a model that others cannot read although the umask lets them, or the reverse."""
    before = os.umask(0o022)
    try:
        assert cli(*RUN, "--quiet").status == 0
        assert stat.S_IMODE(MODEL.stat().st_mode) == 0o644
    finally:
        os.umask(before)


def test_no_memory_to_save(cli, monkeypatch):
    """Catches a checkpoint without memory that ends the run, and a rescue that hides a reason."""
    write = anexagpt.write_tensors

    def fail(path, *arguments):
        if "checkpoint" in arguments[-1]["format"]:
            raise MemoryError("no memory")
        write(path, *arguments)

    monkeypatch.setattr(anexagpt, "write_tensors", fail)
    result = cli(*RUN, "--checkpoint-interval", 0)
    assert result.status == 0 and "not saved (no memory); continuing" in result.err
    monkeypatch.setattr(
        anexagpt, "write_tensors", lambda *_: (_ for _ in ()).throw(MemoryError("x"))
    )
    monkeypatch.setattr(tempfile, "mkdtemp", lambda prefix: os.mkdir("rescue") or "rescue")
    result = cli(*RUN, "--out", "b.safetensors")
    assert result.status == 2 and "nor in a temporary folder (x)" in result.err
    assert not Path("rescue").exists()  # with half a file in it


def test_equal_runs_give_equal_files(cli):
    """Catches an order of entries that changes from run to run."""
    for out in ("a.safetensors", "b.safetensors"):
        assert cli(*RUN, "--quiet", "--out", out).status == 0
    assert Path("a.safetensors").read_bytes() == Path("b.safetensors").read_bytes()
    parameters = anexagpt.load("a.safetensors").network.named_parameters()
    assert [*header(Path("a.safetensors"))] == ["__metadata__", *(name for name, _ in parameters)]


def test_long_history(cli, monkeypatch):
    """Catches a history that makes a header which our own reader refuses, and one that is thinned
    out without its newest row."""
    trainer = anexagpt.Trainer(
        anexagpt.Corpus.from_text(Path("prose.txt").read_text()),
        anexagpt.GPTConfig(n_layer=1, n_embd=8, n_head=1, block_size=8),
        anexagpt.TrainConfig(max_steps=10**6),
    )
    monkeypatch.setattr(trainer, "validate", lambda: 2.0)
    trainer.history = [anexagpt.Evaluation(step, 2.0, 2.0) for step in range(1, 10_000)]
    for step in range(10_000, 15_101):  # it becomes too long twice
        trainer.steps_done = step
        trainer.evaluate()
        assert trainer.history[-1].step == step
    steps = [row.step for row in trainer.history]
    assert len(steps) < 5_200 and steps == sorted(set(steps)) and steps[-1] == 15_100
    assert max(b - a for a, b in pairwise(steps)) <= 4 and steps[0] < 5


def test_export_through_a_link(cli):
    """Catches export --force that writes through a link onto another file, and a GGUF file that is
    a file of the folder written with it."""
    assert cli(*RUN, "--quiet", "--eval-interval", 8).status == 0
    Path("mine.safetensors").write_bytes(b"mine")
    Path("hf").mkdir()
    Path("hf/model.safetensors").symlink_to("../mine.safetensors")
    Path("x.gguf").symlink_to("mine.safetensors")
    for words in (["hf"], ["new", "--gguf", "x.gguf"]):
        assert cli("export", *words, "--force").is_error("link")
    result = cli("export", "other", "--gguf", "other/config.json", "--force")
    assert result.is_error("must end in .gguf")
    assert Path("mine.safetensors").read_bytes() == b"mine" and "other" not in str(names())


def test_export_spares_models(cli):
    """Catches export --force that replaces a finished model, a checkpoint or a foreign model."""
    assert cli(*RUN, "--quiet", "--eval-interval", 8).status == 0
    for place in ("done", "foreign"):
        Path(place).mkdir()
    trained = shutil.copy(MODEL, "done")
    foreign = Path("foreign/model.safetensors")
    foreign.write_bytes(b"foreign")
    assert cli("export", "done", "--force").is_error("is a trained model", "another folder")
    assert cli("export", "foreign", "--force").is_error("not a complete model", "another folder")
    for name in ("new.safetensors", "model.safetensors.checkpoint"):
        assert cli("export", "--gguf", name, "--force").is_error(name, ".gguf")
    assert Path(trained).read_bytes() == MODEL.read_bytes() and foreign.read_bytes() == b"foreign"
    for _ in range(2):
        assert cli("export", "mine", "--force").status == 0


def test_full_disk_without_a_number(cli, monkeypatch):
    """Catches "[Errno None] None" where NumPy reports a full disk in words of its own."""

    def fail(*_):
        raise OSError("4544 requested and 512 written")

    assert cli(*RUN, "--quiet", "--eval-interval", 8).status == 0
    monkeypatch.setattr("gguf.GGUFWriter.write_tensors_to_file", fail)
    result = cli("export", "--gguf", "x.gguf")
    assert result.is_error("x.gguf: 4544 requested and 512 written: is the disk full?")
    assert not Path("x.gguf").exists()


def test_empty_names(cli):
    """Catches an unset variable of the shell that means the current folder, or nothing at all."""
    Path("README.md").write_text("mine")
    for options in ("--init=", "--out=", "--tensorboard=", "--init= --restart"):
        result = cli(*RUN, *options.split(), "--max-steps", 2)
        assert result.is_error("empty name"), options
    for command in ("chat", "info", "export"):
        assert cli(command, "").is_error("empty name"), command
    assert cli("generate", "x", "").is_error("unexpected argument ''")
    assert Path("README.md").read_text() == "mine" and names() == {"README.md", "prose.txt"}


def test_file_that_appears_while_a_model_is_written(cli, monkeypatch):
    """Catches a foreign file at --out that came while the model was written, and is replaced."""
    write = anexagpt.write_tensors

    def slowly(path, *arguments):
        write(path, *arguments)
        if path.parent == Path.cwd():
            MODEL.write_bytes(b"mine")

    monkeypatch.setattr(anexagpt, "write_tensors", slowly)
    result = cli(*RUN, "--quiet")
    assert result.status == 2 and MODEL.read_bytes() == b"mine"
    saved = re.search(r"saved to (\S+\.safetensors) instead", result.err)[1]
    assert anexagpt.load(saved).metadata.step == 24
    shutil.rmtree(Path(saved).parent)


def test_leftovers_of_other_programs(cli):
    """Catches half a file of a process that is still at work, removed as if of a killed one, and
    one of a killed process that stays for ever: a day decides."""
    young, old = (Path(f".anexa-{c * 12}.tmp") for c in "ab")
    for path, hours in ((young, 23), (old, 25)):
        path.write_bytes(b"half a file")
        os.utime(path, (time.time() - 3600 * hours,) * 2)
    assert cli(*RUN, "--quiet").status == 0
    assert young.exists() and not old.exists()
