"""Config: the values that settings accept, and how options become settings."""

import math
from dataclasses import fields

import pytest

from anexagpt import (
    COMMANDS,
    SIZES,
    DeviceConfig,
    GPTConfig,
    SampleConfig,
    TrainConfig,
    UserError,
    from_options,
    parse_options,
)

CONFIGS = (GPTConfig, TrainConfig, SampleConfig, DeviceConfig)
KNOBS = [(config, knob) for config in CONFIGS for knob in fields(config) if knob.metadata.get("low") is not None]
OWN = dict(GPTConfig=dict(vocab_size=65))


def make(config, **values):
    return config(**(OWN.get(config.__name__, {}) | values))


def complaint(config, **values) -> str:
    with pytest.raises(UserError) as error:
        make(config, **values)
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("config, knob", KNOBS, ids=lambda x: getattr(x, "name", getattr(x, "__name__", "")))
def test_limits(config, knob):
    """Catches limits that are off by one, and messages without option, value or rule."""
    low, high = knob.metadata["low"], knob.metadata["high"]
    whole = isinstance(low, int)
    option = f"--{knob.name.replace('_', '-')}"
    for value in (low - 1 if whole else math.nextafter(low, -math.inf), high * 2 + 1):
        text = complaint(config, **{knob.name: value})
        assert option in text and repr(value) in text and f"{high:,}" in text
    edge = dict(n_head=1) if knob.name == "n_embd" else dict(n_embd=low) if knob.name == "n_head" else {}
    edge |= dict(batch_size=low) if knob.name == "grad_accum" else {}
    assert getattr(make(config, **(edge | {knob.name: low})), knob.name) == low


@pytest.mark.parametrize(
    "config, name, value",
    [
        (GPTConfig, "n_layer", True),
        (GPTConfig, "n_layer", "4"),
        (GPTConfig, "n_layer", 4.0),
        (GPTConfig, "n_layer", None),
        (GPTConfig, "n_layer", [4]),
        (GPTConfig, "dropout", "0.1"),
        (TrainConfig, "learning_rate", math.nan),
        (TrainConfig, "learning_rate", math.inf),
        (TrainConfig, "seed", 1.5),
        (SampleConfig, "temperature", math.nan),
        (SampleConfig, "stop", "text"),
        (DeviceConfig, "device", "tpu"),
        (DeviceConfig, "dtype", 16),
    ],
)
def test_wrong_types_and_not_numbers(config, name, value):
    """Catches a setting that slips through as a truth value, a text, a fraction or not-a-number."""
    assert f"--{name.replace('_', '-')}" in complaint(config, **{name: value})


def test_whole_number_where_a_fraction_is_allowed():
    """Catches a check so strict that `--temperature 1` or `"dropout": 0` in a file is refused."""
    assert SampleConfig(temperature=1).temperature == 1
    assert GPTConfig(65, dropout=0).dropout == 0


@pytest.mark.parametrize("n_embd, n_head, cure", [(130, 4, 132), (10, 3, 12), (7, 16, 16)])
def test_heads_share_the_channels(n_embd, n_head, cure):
    """Catches a wrong cure: it must be the next larger multiple."""
    text = complaint(GPTConfig, n_embd=n_embd, n_head=n_head)
    assert f"--n-embd {n_embd}" in text and f"--n-head {n_head}" in text and text.endswith(f" {cure}")
    GPTConfig(65, n_embd=cure, n_head=n_head)


def test_parts_of_a_batch_are_equal():
    """Catches gradient accumulation over unequal parts, whose mean is not that of the batch."""
    text = complaint(TrainConfig, batch_size=12, grad_accum=5)
    assert "--batch-size 12" in text and "--grad-accum 5" in text
    assert TrainConfig(batch_size=12, grad_accum=4).grad_accum == 4


@pytest.mark.parametrize("size, millions", [("small", 0.8), ("medium", 10.7), ("large", 86)])
def test_sizes(size, millions):
    """Catches a change of the shapes that the documents promise; parameters counted by GPT-2's table by hand."""
    V = 65
    shape = SIZES[size]
    C, T, L = shape["n_embd"], shape["block_size"], shape["n_layer"]
    block = (3 * C * C + 3 * C) + (C * C + C) + (4 * C * C + 4 * C) + (4 * C * C + C) + 4 * C
    assert GPTConfig(V, **shape).n_parameters() == V * C + T * C + L * block + 2 * C
    assert (V * C + T * C + L * block) / 1e6 == pytest.approx(millions, rel=0.05)
    assert (shape["n_head"], shape["n_layer"]) == dict(small=(4, 4), medium=(6, 6), large=(12, 12))[size]


def test_settings_cannot_change():
    """Catches settings that somebody alters half-way: they are frozen."""
    with pytest.raises(AttributeError):
        TrainConfig().seed = 1


# ---- options ---------------------------------------------------------------------------------------------------------

OPTIONS = {  # from the documents, not from the code
    GPTConfig: "--block-size 32 --n-layer 2 --n-head 3 --n-embd 12 --dropout 0.25",
    TrainConfig: "--max-steps 7 --batch-size 6 --grad-accum 3 --muon-learning-rate 0.01 --learning-rate 0.002 "
    "--weight-decay 0.3 --warmup-steps 5 --eval-interval 9 --checkpoint-interval 1.5 --seed 42 --init m.safetensors",
    SampleConfig: "--temperature 0.5 --top-k 3 --top-p 0.9 --min-p 0.05 --repetition-penalty 1.2 --max-new 11",
    DeviceConfig: "--device cpu --dtype float32",
}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.__name__)
def test_every_setting_is_an_option(config):
    """Catches an option that is lost on the way from the command line to its dataclass."""
    words = OPTIONS[config].split()
    settings = from_options(config, parse_options(["run", *words]), **OWN.get(config.__name__, {}))
    for option, value in zip(words[::2], words[1::2], strict=True):
        assert str(getattr(settings, option[2:].replace("-", "_"))) == value
    left = {knob.name for knob in fields(config)} - {o[2:].replace("-", "_") for o in words[::2]}
    assert left <= {"vocab_size", "stop"} | ({"seed"} if config is SampleConfig else set())


def test_defaults():
    """Catches a default that comes from argparse instead of the dataclass, or a changed promise (5,000 steps)."""
    options = parse_options([])
    assert options.command == "run" and str(options.out) == "model.safetensors"
    assert from_options(TrainConfig, options) == TrainConfig()
    assert from_options(SampleConfig, parse_options(["chat"])) == SampleConfig()
    assert from_options(DeviceConfig, options) == DeviceConfig("auto", "auto")
    assert TrainConfig().max_steps == 5_000
    assert {name: getattr(GPTConfig(65), name) for name in SIZES["small"]} == SIZES["small"]


def test_given_options_win():
    """Catches an option that a continued training or a --size overrules."""
    settings = from_options(TrainConfig, parse_options(["train", "--seed", "5"]), seed=1, max_steps=3)
    assert (settings.seed, settings.max_steps) == (5, 3)


def test_stop_is_repeatable_and_short_option():
    """Catches a second --stop that replaces the first, and the loss of -n."""
    settings = from_options(SampleConfig, parse_options(["generate", "x", "--stop", "a", "--stop", "b", "-n", "5"]))
    assert settings.stop == ("a", "b") and settings.max_new == 5


@pytest.mark.parametrize(
    "line, words",
    [
        ("train --max-step 5", ["--max-step", "did you mean --max-steps?"]),
        ("train --n_layer 5", ["--n_layer", "did you mean --n-layer?"]),
        ("chta", ["chta", "chat"]),
        ("--bogus", ["--bogus"]),
        ("chat --batch-size 4", ["--batch-size"]),
        ("train --max-steps many", ["--max-steps", "many"]),
        ("train --max-steps 1.5", ["--max-steps", "1.5"]),
        ("train --max-steps", ["--max-steps"]),
        ("train --device tpu", ["--device", "tpu", "cuda"]),
        ("train --size huge", ["--size", "huge", "medium"]),
        ("train --max", ["--max"]),
        ("generate", ["prompt"]),
        ("train extra", ["extra"]),
    ],
)
def test_typing_errors(cli, line, words):
    """Catches errors of more than one line, guesses from abbreviations, and suggestions that are not made."""
    result = cli(*line.split())
    assert result.is_error(*words, "--help")


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help(cli, command):
    """Catches a help page that lacks a command or an option, or ends with an error."""
    result = cli(*([command] if command else []), "--help")
    assert result.status == 0 and result.err == ""
    assert all(len(line) <= 120 for line in result.out.splitlines())
    if command is None:
        assert all(name in result.out for name in COMMANDS) and "examples:" in result.out
    expected = {
        "run": (GPTConfig, TrainConfig, SampleConfig, DeviceConfig),
        "train": (GPTConfig, TrainConfig, DeviceConfig),
        "chat": (SampleConfig, DeviceConfig),
        "generate": (SampleConfig, DeviceConfig),
        "eval": (DeviceConfig,),
    }
    for config in expected.get(command, ()):
        for option in OPTIONS[config].split()[::2]:
            assert option in result.out
    if command == "train":
        text = " ".join(result.out.split())
        assert (
            "(default: 5000)" in text and f"(default: {TrainConfig().learning_rate})" in text and "SUPPRESS" not in text
        )


def test_version(cli):
    """Catches a --version that starts a training instead."""
    result = cli("--version")
    assert result.status == 0 and result.out.startswith("Anexa ")
