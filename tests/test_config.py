"""Config: the values that settings accept, and their way from options to the model file."""

import math
from dataclasses import asdict

import pytest
from conftest import prose

from anexagpt import SIZES, GPTConfig, SampleConfig, TrainConfig, UserError, load

LIMITS = [  # option, the last value that is allowed, the first that is not, the limit
    ("--block-size", 2, 1, "2"),
    ("--n-layer", 128, 129, "128"),
    ("--n-head", 1, 0, "1"),
    ("--dropout", 0.9, 0.91, "0.9"),
    ("--max-steps", 1, 0, "1"),
    ("--batch-size", 1, 0, "1"),
    ("--muon-learning-rate", 10.0, 10.1, "10"),
    ("--learning-rate", 0.0, -0.1, "0"),
    ("--warmup-steps", 0, -1, "0"),
    ("--checkpoint-interval", 0.0, -1.0, "0"),
    ("--temperature", 100.0, 100.5, "100"),
    ("--top-k", 0, -1, "0"),
    ("--top-p", 1.0, 1.01, "1"),
    ("--repetition-penalty", 0.01, 0.0, "0.01"),
    ("--max-new", 0, -1, "0"),
]


@pytest.mark.parametrize("option, good, bad, limit", LIMITS)
def test_limits(cli, option, good, bad, limit):
    """Catches limits that are off by one, and messages without option, value or rule."""
    name = option[2:].replace("-", "_")
    configs = TrainConfig, GPTConfig, SampleConfig
    config = next(c for c in configs if name in c.__dataclass_fields__)
    arguments = ["generate", "x"] if config is SampleConfig else ["train", "--data", "none.txt"]
    assert cli(*arguments, f"{option}={bad}").is_error(f"{option} {bad}", limit)
    assert getattr(config(**{name: good}), name) == good


WRONG = [
    (GPTConfig, "n_layer", True),
    (GPTConfig, "n_layer", "4"),
    (GPTConfig, "n_layer", 4.0),
    (GPTConfig, "dropout", "0.1"),
    (TrainConfig, "learning_rate", math.nan),
    (TrainConfig, "seed", 1.5),
    (SampleConfig, "temperature", math.nan),
    (SampleConfig, "stop", "text"),
]


@pytest.mark.parametrize("config, name, value", WRONG, ids=str)
def test_wrong_types(config, name, value):
    """Catches a bool, a string, a fraction or NaN that slips through, from a file or a notebook."""
    with pytest.raises(UserError, match=f"`{name}=") as error:
        config(**{name: value})
    assert "\n" not in str(error.value)
    assert SampleConfig(temperature=1).temperature == 1  # but an integer is a number


@pytest.mark.parametrize("n_embd, n_head, fix", [(130, 4, 132), (10, 3, 12), (7, 16, 16)])
def test_divisible(n_embd, n_head, fix):
    """Catches advice that is not the next larger multiple."""
    with pytest.raises(UserError, match=f"`n_embd={n_embd}`.*`n_head`.* {fix}$"):
        GPTConfig(n_embd=n_embd, n_head=n_head)
    assert GPTConfig(n_embd=fix, n_head=n_head).n_embd == fix


@pytest.mark.parametrize("size, n", [("small", 0.8e6), ("medium", 10.7e6), ("large", 86e6)])
def test_sizes(size, n):
    """Catches a changed shape, and a wrong number of parameters, counted here matrix by matrix."""
    config = GPTConfig(65, **SIZES[size])
    L, H, T, C = config.n_layer, config.n_head, config.block_size, config.n_embd
    assert dict(small=(4, 4, 256), medium=(6, 6, 256), large=(12, 12, 1024))[size] == (L, H, T)
    block = (3 * C * C + 3 * C) + (C * C + C) + (4 * C * C + 4 * C) + (4 * C * C + C) + 4 * C
    assert config.n_parameters() == 65 * C + T * C + L * block + 2 * C == pytest.approx(n, rel=0.05)


def test_every_option_reaches_the_model_file(cli, tmp_path):
    """Catches an option that is lost between the command line and the run, and wrong defaults."""
    (tmp_path / "t.txt").write_text(prose(100))
    shape = dict(block_size=8, n_layer=2, n_head=3, n_embd=6, dropout=0.25)
    training = dict(max_steps=2, batch_size=6, grad_accum=3, muon_learning_rate=0.01)
    training |= dict(learning_rate=0.002, weight_decay=0.3, warmup_steps=5, eval_interval=9)
    training |= dict(checkpoint_interval=1.5, seed=42, device="cpu", dtype="bfloat16")
    options = [f"--{k.replace('_', '-')}={v}" for k, v in (shape | training).items()]
    assert cli("train", "t.txt", *options).status == 0
    model = load("model.safetensors")
    assert asdict(model.network.config) == shape | dict(vocab_size=26)
    assert model.metadata.training == training | dict(init=None, dropout=0.25, logit_scale=1.0)
    expected = dict(weight_decay=0.1, grad_accum=1)
    expected |= dict(warmup_steps=50, eval_interval=250, checkpoint_interval=60.0, seed=1337)
    resolved = dict.fromkeys(("batch_size", "muon_learning_rate", "learning_rate"))
    resolved |= dict.fromkeys(("init", "dropout", "logit_scale"))
    assert asdict(TrainConfig()) == expected | dict(max_steps=5_000) | resolved
    assert SampleConfig() == SampleConfig(0.7, 0, 1.0, 0.0, 1.0, 0, 300, (), None)


@pytest.mark.parametrize(
    "vocab_size, words",
    [(523, "99,968 parameters"), (524, "0.1 M parameters"), (12_024, "0.8 M parameters")],
)
def test_size_in_words(vocab_size, words):
    """Catches a limit between numbers and millions that moves, and millions that are cut off."""
    config = GPTConfig(vocab_size, block_size=256, n_layer=1, n_head=4, n_embd=64)
    assert config.size() == words
