"""docs/old_architecture.py against torch and transformers in float64, the script, and bad files."""

import gc
import json
import math
import random
import re
import signal
import struct
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from itertools import islice

import pexpect
import pytest
import safetensors.torch
import torch
from conftest import ROOT, header, start
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

sys.path.insert(0, str(ROOT / "docs"))
import old_architecture as old
from old_architecture import Value

PROGRAM = ROOT / "docs" / "old_architecture.py"
CONFIG = old.GPTConfig(vocab_size=11, block_size=8, n_layer=2, n_head=2, n_embd=12)
IDS = [3, 1, 4, 1, 5, 9, 2, 6]


def values(matrix):
    return [[Value(x) for x in row] for row in matrix]


def flat(named):
    """Entries of the matrices of a dict, in one list."""
    return [entry for matrix in named.values() for row in matrix for entry in row]


# ---- autograd ------------------------------------------------------------------------------------


def test_scalar_operators_equal_torch():
    """Catches a wrong value or derivative of an operator, and a use that is not added to grad."""
    for f in (
        lambda a, b: 3 + a * 2 + b * a,
        lambda a, b: (a - b) * (2 - a) - 3,
        lambda a, b: a / b + 2 / a + b / 4,
        lambda a, b: -(a**3) + b**-0.5,
        lambda a, b: (a + b) * (a + b) * a.exp() / (a + b).log(),
        lambda a, b: (a - b).tanh() * b,
    ):
        ours = [Value(1.3), Value(2.7)]
        theirs = [torch.tensor(v.data, dtype=torch.float64, requires_grad=True) for v in ours]
        y, z = f(*ours), f(*theirs)
        y.backward()
        z.backward()
        assert y.data == pytest.approx(z.item(), rel=1e-12)
        assert [a.grad for a in ours] == pytest.approx([b.grad.item() for b in theirs], rel=1e-12)


def test_backward_on_long_and_repeated_graphs():
    """Catches recursion, grads that a second graph overwrites, cycles that stay, mixed inputs."""
    a, b = Value(3.0), Value(5.0)
    (a * b).backward()
    (a * b * 2).backward()
    assert (a.grad, b.grad) == (5.0 + 10.0, 3.0 + 6.0)
    assert list((a * b).children) == [a, b] and not a.children
    x = a
    for _ in range(20_000):
        x = x + a
    x.backward()
    assert (x.data, a.grad) == (3.0 * 20_001, 15.0 + 20_001)
    gc.collect()
    gc.disable()
    y = old.softmax(old.matmul(values([[1.0, 2.0]]), [[3.0], [4.0]]))[0][0]
    y.backward()
    del x, y
    found = gc.collect()
    gc.enable()
    assert found == 0


def test_cross_entropy_of_large_logits():
    """Catches log(0) and exp overflow; by hand: -log(p) is 1800 and log(1 + e^-1 + e^-2)."""
    numbers = [[900.0, -900.0, 3.0], [1.0, 2.0, 3.0]]
    logits = values(numbers)
    loss = old.cross_entropy(logits, [1, 2])
    expected = (1800 + math.log(1 + math.exp(-1) + math.exp(-2))) / 2
    assert loss.data == old.cross_entropy(numbers, [1, 2]) == pytest.approx(expected, rel=1e-12)
    (loss * 3).backward()
    assert [v.grad for v in logits[0]] == pytest.approx([1.5, -1.5, 0.0])


# ---- model and optimizer -------------------------------------------------------------------------


@pytest.fixture
def gpt2():
    """GPT-2 of transformers in float64, with large random weights so that no part is negligible."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {name: getattr(CONFIG, name) for name in ("vocab_size", "n_layer", "n_head", "n_embd")}
    sizes |= dict(n_positions=CONFIG.block_size, bos_token_id=None, eos_token_id=None)
    torch.manual_seed(1)
    model = GPT2LMHeadModel(GPT2Config(**sizes, attn_implementation="eager")).double().eval()
    for weight in model.parameters():
        torch.nn.init.uniform_(weight, -0.5, 0.5)
    return model


def matrices(model, pick=lambda weight: weight):
    """Name -> matrix of its weights, or their gradients; it stores linear weights as (in, out)."""
    named = {name: pick(weight).detach() for name, weight in model.transformer.named_parameters()}
    named = {
        name: w.t() if name.startswith("h.") and w.ndim == 2 else w for name, w in named.items()
    }
    return {name: w.reshape(-1, w.shape[-1]).tolist() for name, w in named.items()}


def losses(model, state_dict, ids):
    logits = model(torch.tensor([ids[:-1]])).logits[0]
    ours = old.cross_entropy(old.gpt(ids[:-1], state_dict, CONFIG), ids[1:])
    return ours, F.cross_entropy(logits, torch.tensor(ids[1:]))


def test_loss_and_all_gradients_equal_transformers(gpt2):
    """Catches any fault of an operation or of the network, in the forward or backward pass."""
    state_dict = {name: values(matrix) for name, matrix in matrices(gpt2).items()}
    ours, expected = losses(gpt2, state_dict, IDS)
    ours.backward()
    expected.backward()
    assert ours.data == pytest.approx(expected.item(), abs=1e-12)
    assert state_dict.keys() == old.parameter_shapes(CONFIG).keys()
    for name, grad in matrices(gpt2, lambda weight: weight.grad).items():
        grads = [[value.grad for value in row] for row in state_dict[name]]
        assert flat({name: grads}) == pytest.approx(flat({name: grad}), abs=1e-12), name


def test_adam_equals_torch(gpt2):
    """Catches a wrong moment, bias correction or eps, and grads that are not zeroed."""
    state_dict = {name: values(matrix) for name, matrix in matrices(gpt2).items()}
    ours = old.Adam(flat(state_dict), beta1=0.8, beta2=0.95, eps=1e-3)
    theirs = torch.optim.Adam(gpt2.parameters(), betas=(0.8, 0.95), eps=1e-3)
    for step in range(6):
        theirs.param_groups[0]["lr"] = 0.02 / (step + 1)
        theirs.zero_grad()
        for loss in losses(gpt2, state_dict, [(7 * i + step * step) % 11 for i in range(8)]):
            loss.backward()
        ours.step(0.02 / (step + 1))
        theirs.step()
    ours = flat({name: old.detach(matrix) for name, matrix in state_dict.items()})
    assert ours == pytest.approx(flat(matrices(gpt2)), abs=1e-10)


def test_kv_cache_equals_one_pass(gpt2):
    """Catches a cached key that is lost or doubled, a wrong position, and a mask off by one."""
    state_dict = matrices(gpt2)
    expected = flat({"logits": old.gpt(IDS, state_dict, CONFIG)})
    for lengths in ([1] * 8, [3, 1, 4], [7, 1]):
        kv_cache, logits, ids = old.new_kv_cache(CONFIG), [], iter(IDS)
        for n in lengths:
            logits += old.gpt(list(islice(ids, n)), state_dict, CONFIG, kv_cache)
        assert flat({"logits": logits}) == pytest.approx(expected, abs=1e-12)


def test_initial_weights():
    """Catches initial weights of a wrong mean or spread, and blocks that are not the identity."""
    config = old.GPTConfig(vocab_size=60, block_size=8, n_layer=2, n_head=2, n_embd=64)
    weights = old.init_weights(config, random.Random(1))
    weights = {name: torch.tensor(old.detach(matrix)) for name, matrix in weights.items()}
    x = F.layer_norm(weights["wte.weight"][:8] + weights["wpe.weight"], (64,))
    logits = old.gpt(range(8), {name: w.tolist() for name, w in weights.items()}, config)
    torch.testing.assert_close(torch.tensor(logits), x @ weights["wte.weight"].t())
    for name in ("wte.weight", "wpe.weight", "h.1.attn.c_attn.weight", "h.0.mlp.c_fc.weight"):
        assert weights[name].std().item() == pytest.approx(1 / 8, rel=0.1)


# ---- generation ----------------------------------------------------------------------------------


def test_generation_beyond_the_context(tiny):
    """Catches a KV cache that outlives its context, and a full context cut at the wrong place."""
    config, characters, state_dict = old.load_model(tiny)
    for context in (old.encode("the c", characters), old.encode("saw a dog run " * 3, characters)):
        rng = random.Random(1)
        stream = old.generate_ids(context, state_dict, config, 1.0, random.Random(1))
        for i in islice(stream, 30):
            while len(context) > config.block_size:
                context = context[config.block_size // 2 :]
            assert i == old.sample(old.gpt(context, state_dict, config)[-1], 1.0, rng)
            context = [*context, i]


def test_sampling_follows_the_softmax():
    """Catches a temperature that multiplies, unnormalized weights, and a sampled unknown (id 0)."""
    rng, n = random.Random(5), 20_000
    drawn = [old.sample([9.0, 1.0, 2.0, 0.0], 0.5, rng) for _ in range(n)]
    expected = torch.tensor([-math.inf, 2.0, 4.0, 0.0]).softmax(0).tolist()
    assert [drawn.count(i) / n for i in range(4)] == pytest.approx(expected, abs=0.015)
    assert old.sample([9.0, 1.0, 2.0, 2.0], 0, rng) == 2
    assert old.sample([9.0, 1.0, 2.0, 0.0], 1e-308, rng) == 2


# ---- model file ----------------------------------------------------------------------------------


def test_model_file_equals_safetensors(tiny, tmp_path, monkeypatch):
    """Catches numbers, shapes or metadata that change, and a failed save that leaves its traces."""
    path = tmp_path / "m.safetensors"
    config, characters, state_dict = old.load_model(tiny)
    old.save_model(path, config, state_dict, dict(config=vars(config), characters=characters))
    expected, tensors = map(safetensors.torch.load_file, (tiny, path))
    torch.testing.assert_close(tensors, expected, rtol=0, atol=0)
    with safetensors.safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["characters"]) == characters
    assert old.load_model(path) == (config, characters, state_dict)
    before = path.read_bytes()
    other = old.save_model(path, config, state_dict, {})  # another program has made the first
    assert other.name == "new-m.safetensors" and path.read_bytes() == before
    other.unlink()
    monkeypatch.setattr(old.os, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        old.save_model(path, config, state_dict, {})
    assert path.read_bytes() == before and [*tmp_path.iterdir()] == [path]


def changed(path, change):
    """The model file after change(header, content, metadata), which may return other bytes."""
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header, content = json.loads(raw[8:end]), bytearray(raw[end:])
    other = change(header, content, header["__metadata__"])
    head = json.dumps(header).encode()
    return struct.pack("<Q", len(head)) + head + content if not isinstance(other, bytes) else other


def sizes(**new):
    return lambda h, c, m: m.update(config=json.dumps(json.loads(m["config"]) | new))


def vocab(edit):
    return lambda h, c, m: m.update(characters=json.dumps(edit(json.loads(m["characters"]))))


HOSTILE = {  # name: change of header, content or metadata
    "empty": lambda h, c, m: b"",
    "header of 2^63 bytes": lambda h, c, m: struct.pack("<Q", 2**63) + b"{}",
    "not JSON": lambda h, c, m: struct.pack("<Q", 4) + b"\xff\xfe{}",
    "deep JSON": lambda h, c, m: struct.pack("<Q", 200_000) + b"[" * 200_000,
    "of another program": lambda h, c, m: h.pop("__metadata__") and None,
    "version 2": lambda h, c, m: m.update(format_version="2"),
    "no config": lambda h, c, m: m.pop("config") and None,
    "config has more": sizes(**{"x\n\x1b[2J": 1}),
    "n_layer 0": sizes(n_layer=0),
    "n_layer a million": sizes(n_layer=10**6),
    "n_head": sizes(n_head=3),
    "n_embd huge": sizes(n_embd=2**20),
    "vocab_size": sizes(vocab_size=9),
    "characters are numbers": vocab(lambda v: list(range(len(v)))),
    "a character twice": vocab(lambda v: v[:-1] + v[1]),
    "unknown is not first": vocab(lambda v: v[::-1]),
    "tensor missing": lambda h, c, m: h.pop("ln_f.bias") and None,
    "offsets overlap": lambda h, c, m: h["ln_f.bias"].update(data_offsets=[0, 64]),
    "cut": lambda h, c, m: c.__delitem__(slice(-4, None)),
    "NaN": lambda h, c, m: c.__setitem__(slice(0, 4), struct.pack("<f", math.nan)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_bad_file_is_refused_in_one_line(name, tiny, tmp_path):
    """Catches a claim of a file that is believed unchecked: a crash, a hang, or a wrong model."""
    path = tmp_path / "m.safetensors"
    path.write_bytes(changed(tiny, HOSTILE[name]))
    start = time.process_time()
    with pytest.raises(ValueError) as error:
        old.load_model(path)
    assert time.process_time() - start < 1.0
    assert re.fullmatch(r"/\S+: not a whole model of Anexa .{1,240}", str(error.value))


def test_an_exported_model(tiny, tmp_path):
    """Catches the advice to fetch a file again that is as it should be."""
    tensors = {f"transformer.{name}": w for name, w in load_file(tiny).items()}
    save_file(tensors, tmp_path / "m.safetensors", header(tiny)["__metadata__"])
    with pytest.raises(ValueError, match="exported for transformers"):
        old.load_model(tmp_path / "m.safetensors")


# ---- command line --------------------------------------------------------------------------------


run = partial(start, program=PROGRAM)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder and result of a short training run with two prompts."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text("the cat sat on the mat, the dog sat on the log. " * 40)
    options = ["--max-steps", 80, "--block-size", 8, "--n-embd", 16, "--max-new", 40]
    return folder, run("--data", "text.txt", *options, cwd=folder, stdin="the c\xe2t\n\nquit\nno\n")


def test_training_learns_saves_and_prompts(trained):
    """Catches a run that does not learn, a changed line of the prompt, text on the wrong stream."""
    folder, done = trained
    assert done.status == 0, done.err
    found = re.findall(r"step \d+/80: loss \d\.\d+, validation loss (\d\.\d+)\n", done.err)
    assert len(found) == 10 and float(found[-1]) < 1.6 < 2.1 < float(found[0])
    counts = Counter((folder / "text.txt").read_text())
    shares = torch.tensor(list(counts.values()), dtype=torch.float64) / counts.total()
    entropy = torch.distributions.Categorical(shares).entropy().item()
    assert f"unigram entropy {entropy:.4f}, " in done.err and float(found[-1]) < entropy
    assert "Training finished...\nModel saved to old_model.safetensors\n" in done.err
    lines = (
        "--- Interactive Generation ---\nEnter a prompt to continue (or 'quit' to exit)\nPrompt: "
    )
    assert lines + "(left out the characters that the model does not know)\nResponse: " in done.err
    assert re.fullmatch(r"the ct[a-z ,.]{40}\n", done.out)
    assert sorted(path.name for path in folder.iterdir()) == ["old_model.safetensors", "text.txt"]


@pytest.mark.parametrize("which", ["tiny", "trained"])
def test_greedy_text_equals_the_script(which, tiny, trained, tmp_path, cli):
    """Catches a file, a network or a context rule that differs between the two programs."""
    path = tiny if which == "tiny" else trained[0] / "old_model.safetensors"
    args = ["--model", path, "--temperature", 0, "--max-new", 40]
    script = cli("generate", "the ", *args, "--device", "cpu")
    ours = run(*args, cwd=tmp_path, stdin="the \n")
    assert script.status == ours.status == 0, script.err + ours.err
    assert ours.out == script.out and len(ours.out) == 45


@pytest.mark.parametrize(
    "args, words",
    [
        ("--model nowhere.safetensors", "py: nowhere.safetensors: No such file or directory"),
        ("--model bad.txt", "bad.txt: not a whole model of Anexa"),
        ("--data bad.txt", "bad.txt: byte 6 is not utf-8 text"),
        ("--data short.txt", "short.txt: 5 characters"),
        ("--out no/where.safetensors", "No such file"),
        ("--n-head 5", "n_embd must be a multiple of n_head"),
        ("--max-steps 0", "--max-steps"),
        ("--temperature nan", "--temperature"),
        ("--temperature 1e-320", "--temperature"),
        ("--max-new 99999999999999999999", "--max-new"),
        ("--learning-rate nan --n-embd 4", "--learning-rate"),
        ("--data some.txt --max-steps 1 --learning-rate 1e39", "lower --learning-rate"),
        ("--data some.txt --max-steps 1 --out some.txt", "some.txt: exists"),
        ("--data some.txt --max-steps 1 --out .", ".: exists"),
        ("--data some.txt --max-steps 1 --out dangling", "dangling: exists"),
        ("\x1b[31mred", "\\x1b[31mred"),
    ],
)
def test_what_a_user_gets_wrong_is_one_line_and_status_2(args, words, tmp_path):
    """Catches a traceback, a wrong status, and a message that does not name the cause."""
    (tmp_path / "bad.txt").write_bytes(b"\xef\xbb\xbfcaf\xe9" * 9)
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "some.txt").write_text("the cat sat on the mat. " * 20)
    (tmp_path / "dangling").symlink_to("nowhere")
    done = run(*args.split(), cwd=tmp_path)
    assert done.status == 2 and done.out == "" and "Traceback" not in done.err
    assert words in done.err.splitlines()[-1] and done.err.count("\n") <= 4
    assert "\x1b" not in done.err and (tmp_path / "some.txt").stat().st_size == 480


def test_huge_files(tiny, tmp_path):
    """Catches a MemoryError of a file that is larger than the memory: a traceback."""
    (tmp_path / "m.safetensors").write_bytes(tiny.read_bytes())
    for name in ("m.safetensors", "t.txt"):
        with open(tmp_path / name, "ab") as file:
            file.truncate(1 << 43)  # takes no room on the disk
    done = run("--model", "m.safetensors", cwd=tmp_path)
    assert done.status == 2 and "not a whole model" in done.err, done.err
    done = run("--data", "t.txt", cwd=tmp_path)
    assert done.status == 2 and "py: out of memory; use a smaller" in done.err, done.err


def test_run_whose_messages_nobody_reads(tmp_path):
    """Catches a run that dies with the reader of its messages, as in 2>&1 | head -2."""
    (tmp_path / "some.txt").write_text("the cat sat on the mat. " * 20)
    program = f"'{sys.executable}' '{PROGRAM}' --data some.txt --max-steps 30 --block-size 8"
    command = f"{program} --n-embd 4 --out m.safetensors 2>/dev/full </dev/null"
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, timeout=60)
    assert done.returncode == 0 and old.load_model(tmp_path / "m.safetensors")


def test_terminal(tiny, tmp_path):
    """Catches escape sequences that reach a terminal, escapes in a pipe, and a lost Ctrl-C."""
    path = tmp_path / "m.safetensors"
    path.write_bytes(changed(tiny, vocab(lambda v: v.replace("\n", "\x1b"))))
    args = [str(PROGRAM), "--model", str(path), "--temperature", "50", "--max-new"]
    assert "\x1b" in run(*args[1:], 500, cwd=tmp_path, stdin="the\n").out
    terminal = pexpect.spawn(sys.executable, [*args, "1000000"], encoding="utf-8", timeout=20)
    terminal.expect_exact("Prompt: ")
    terminal.sendline("the")
    terminal.expect(r"Response: the[^\x1b]+\\x1b[^\x1b]+\\x1b")
    terminal.sendintr()
    terminal.expect_exact("Prompt: ")
    terminal.sendintr()
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 130 and "Traceback" not in terminal.before


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams(tiny, tmp_path, closed):
    """Catches a traceback where a stream of the shell is closed."""
    command = f"'{sys.executable}' '{PROGRAM}' --model '{tiny}' --max-new 5 {closed}"
    words = ["sh", "-c", f"echo the | {command}"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert (done.stdout[:3] == "the") == (closed == "2>&-")


def test_ctrl_c_while_training(tmp_path):
    """Catches a traceback, a wrong status, a half-written file; an import of any package."""
    command = [sys.executable, "-IS", PROGRAM, "--max-steps", "100000"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        assert "GPTConfig" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        assert "Traceback" not in process.communicate(timeout=20)[1]
    assert process.returncode == 130 and not [*tmp_path.iterdir()]


# ---- the page ------------------------------------------------------------------------------------


def page_blocks():
    page = (ROOT / "docs" / "old_architecture.md").read_text("utf-8")
    return re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


def test_code_of_the_page_runs():
    """Catches a block of old_architecture.md that fails, or whose asserted figures are wrong."""
    scope = {}
    blocks = page_blocks()
    assert len(blocks) >= 5
    for block in blocks:
        exec(compile(block, "old_architecture.md", "exec"), scope)


def test_the_listing_of_value_equals_the_fast_one():
    """Catches a local gradient or chain rule of the page's short Value that is wrong."""
    scope = {}
    exec(compile(page_blocks()[0], "old_architecture.md", "exec"), scope)
    assert scope["Value"] is not Value

    def f(a, b, c):
        d = a * b + c
        return (d * d + a) ** 3 * b + (d + c) ** -2

    def gradients(cls):
        leaves = [cls(x) for x in numbers]
        y = f(*leaves)
        y.backward()
        return [y.data, *(leaf.grad for leaf in leaves)]

    numbers = [0.7, -1.2, 1.9]
    simple = gradients(scope["Value"])
    assert simple == pytest.approx(gradients(Value), rel=1e-12)
    assert simple[0] == pytest.approx(f(*numbers), rel=1e-12)
    for i, grad in enumerate(simple[1:]):  # central differences
        ends = [[x + h * (i == j) for j, x in enumerate(numbers)] for h in (1e-6, -1e-6)]
        assert grad == pytest.approx((f(*ends[0]) - f(*ends[1])) / 2e-6, rel=1e-6)
