"""The first part of the program, a GPT on its own, and the fast paths that replace parts of it."""

import ast
import builtins
import copy
import re
import symtable
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, interrupt_at, prose
from safetensors.torch import load_file
from torch.nn import functional as F

import anexagpt
from anexagpt import MLP, Corpus, GPTConfig, KVCache, SampleConfig, TrainConfig, Trainer, generate

SOURCE = (ROOT / "anexagpt.py").read_text(encoding="utf-8")
LESSON = SOURCE[: SOURCE.index("# The complete GPT ends here")]
SHAPE = dict(n_layer=2, n_head=2, n_embd=64, block_size=32)
ONE_BLOCK = SHAPE | dict(n_layer=1)
RUN = dict(max_steps=200, batch_size=8, eval_interval=200, seed=3)


def test_the_lesson_stands_alone(tmp_path, sherlock, monkeypatch):
    """Catches a first part that needs the second, or that trains another model than the program
    does without its fast paths."""
    imported = set(re.findall(r"(?m)^ *(?:import|from) (\w+)", LESSON))
    assert "torch" in imported
    assert not imported & {"rich", "requests", "prompt_toolkit", "filelock"}
    lesson = types.ModuleType("lesson")
    monkeypatch.setitem(sys.modules, "lesson", lesson)
    exec(compile(LESSON, "lesson", "exec"), vars(lesson))
    text = sherlock.decode("utf-8-sig").replace("\r\n", "\n")
    config = lesson.GPTConfig(**ONE_BLOCK)
    trainer = lesson.Trainer(lesson.Corpus.from_text(text), config, lesson.TrainConfig(**RUN))
    trainer.fit()
    assert trainer.history[-1].validation_loss < 2.44  # a bigram model's loss on this text
    model = trainer.best_model()
    path = tmp_path / "lesson.safetensors"
    model.save(path)
    written = model.generate("It was a", max_new=80, seed=1)
    assert model.generate("It \u2603was a", max_new=80, seed=1) == written
    assert model.tokenizer.normalize_prompt("\u2603a") == ("a", {"\u2603": ""})
    assert lesson.Model.load(path).generate("It was a", max_new=80, seed=1) == written
    settings = dict(device="cpu", dtype="float32", plain=True, progress=False)
    model = anexagpt.train(text=text, **settings, **ONE_BLOCK, **RUN)
    expected = load_file(path)
    for name, weight in model.network.named_parameters():
        assert torch.equal(weight, expected[name]), name


def global_names(table: symtable.SymbolTable) -> set[str]:
    """Names that functions and classes look up in the module."""
    names = {s.get_name() for s in table.get_symbols() if s.is_global() and s.is_referenced()}
    return names.union(*map(global_names, table.get_children()))


def test_functions_of_the_lesson_are_short():
    """Catches a function that no longer fits on a screen."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(LESSON)):
        if isinstance(node, functions):
            assert node.end_lineno - node.lineno < 45, node.name


def test_the_lesson_knows_nothing_below(monkeypatch):
    """Catches a name of the second part in a line of the first that no test runs."""
    module = types.ModuleType("lesson")
    monkeypatch.setitem(sys.modules, "lesson", module)
    exec(compile(LESSON, "lesson", "exec"), vars(module))
    tables = symtable.symtable(LESSON, "lesson", "exec").get_children()
    used = set().union(*map(global_names, tables))
    assert used - set(vars(module)) - set(dir(builtins)) == set()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_cached_text_equals_the_reference(tiny, temperature):
    """Catches a cache, a prefill or a fast path that changes the text, beyond the context, too."""
    for plain in (True, False):
        model = anexagpt.load(tiny, plain=plain)
        ids = model.prompt_ids("the big ")
        cfg = SampleConfig(temperature=temperature, repetition_penalty=1.1)
        expected = generate(model.network, ids, 60, cfg, np.random.default_rng((7, 0)))
        text = model.generate("the big ", max_new=60, seed=7, temperature=temperature,
                              repetition_penalty=1.1)  # fmt: skip
        assert text == model.tokenizer.decode(expected[len(ids) :])


# ---- fast paths ----------------------------------------------------------------------------------


class SquaredMLP(MLP):
    """The exercise: ReLU squared instead of GELU."""

    def forward(self, x):
        return self.c_proj(F.relu(self.c_fc(x)).square())


@pytest.mark.parametrize("how", ["subclass", "file"])
def test_a_changed_network_is_what_writes(tiny, tmp_path, capfd, monkeypatch, how):
    """Catches a model that reads its prompt with one activation and writes with another."""
    usual = anexagpt.load(tiny).generate("the ", max_new=40, temperature=0.0)
    capfd.readouterr()
    if how == "file":
        monkeypatch.setattr(MLP, "forward", SquaredMLP.forward)
    model = anexagpt.load(tiny)
    for block in model.network.h:
        if how == "subclass":
            block.mlp.__class__ = SquaredMLP
    ids = model.prompt_ids("the ")
    expected = generate(model.network, ids, 40, SampleConfig(temperature=0.0), None)
    for _ in range(2):
        text = model.generate("the ", max_new=40, temperature=0.0)
        assert text == model.tokenizer.decode(expected[len(ids) :]) != usual
    assert capfd.readouterr().err.count("NOTE") == 1


@pytest.mark.parametrize(
    "change",
    ["local attention", "window", "RMSNorm", "no bias", "new name", "new weights", "output"],
)
def test_other_changes_are_what_writes(capfd, monkeypatch, change):
    """Catches a fast path that ignores what shows in long contexts only, or in the weights after
    the first text, and one that fails for a network with other weights or names."""
    shape = dict(n_layer=2, n_head=2, n_embd=16, block_size=64)
    trainer = Trainer(Corpus.from_text(prose(250)), GPTConfig(**shape), TrainConfig(max_steps=40))
    trainer.fit()
    model = trainer.best_model()
    network = model.network.eval()
    causal = anexagpt.attention_weights

    def local(q, k):
        weights = causal(q, k).triu(k.shape[2] - q.shape[2] - 20)
        return weights / weights.sum(-1, keepdim=True)

    def forward(self, x, cache=None):
        q, k, v = self.project(x)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        return self.c_proj((local(q, k) @ v).transpose(1, 2).flatten(2))

    if change == "local attention":
        monkeypatch.setattr(anexagpt, "attention_weights", local)
    elif change == "window":
        monkeypatch.setattr(anexagpt.CausalSelfAttention, "forward", forward)
    elif change == "RMSNorm":
        network.h[1].ln_2 = torch.nn.RMSNorm(16)
    elif change == "no bias":
        network.h[1].mlp.c_fc.bias = None
        n = network.config.n_parameters() - 64
        monkeypatch.setattr(GPTConfig, "n_parameters", lambda config: n)
    elif change == "output":
        whole = anexagpt.GPT.forward
        minus = lambda self, *args, **options: -whole(self, *args, **options)  # noqa: E731
        monkeypatch.setattr(anexagpt.GPT, "forward", minus)
    elif change == "new name":
        mlp = network.h[1].mlp
        mlp.fc = mlp._modules.pop("c_fc")
        mlp.forward = lambda x: mlp.c_proj(torch.nn.functional.gelu(mlp.fc(x), approximate="tanh"))
    anexagpt.use_fast_paths(model)
    if change == "new weights":
        model.generate("the ", max_new=4)
        network.h[1].mlp.c_fc.weight.data.zero_()
    ids = model.prompt_ids("the ")
    expected = generate(network, ids, 56, SampleConfig(temperature=0.0), None)
    text = model.generate("the ", max_new=56, temperature=0.0)
    assert text == model.tokenizer.decode(expected[len(ids) :])
    assert capfd.readouterr().err.count("was changed") == 1


def test_a_network_with_fewer_weights_is_opened(tmp_path, monkeypatch):
    """Catches a learner's model, trained and saved, that is called incomplete."""

    def init(self, config, old=anexagpt.GPT.__init__):
        old(self, config)
        self.wpe = torch.nn.Embedding(1, config.n_embd)  # as with rotary embeddings

    monkeypatch.setattr(anexagpt.GPT, "__init__", init)
    monkeypatch.setattr(anexagpt.GPT, "embed", lambda self, ids, start=0: self.wte(ids))
    settings = dict(device="cpu", progress=False, max_steps=5, n_layer=1, n_head=2, n_embd=16)
    model = anexagpt.train(text=prose(700), out=tmp_path / "m.safetensors", **settings)
    assert len(anexagpt.load(tmp_path / "m.safetensors").generate("the", max_new=5)) == 5
    assert model.network.wpe.weight.shape == (1, 16)


def test_a_comparison_leaves_no_trace(tiny):
    """Catches keys and values of the plain network in the cache of a changed one."""
    model = anexagpt.load(tiny)
    for block in model.network.h:
        block.mlp.__class__ = SquaredMLP
    caches = []
    for decode in (model.decode, anexagpt.decode):
        caches.append(KVCache(model.network, 1))
        for token in (1, 2, 3):
            decode(model.network, np.array([token]), caches[-1])
    assert torch.equal(caches[0].kv, caches[1].kv)


def test_each_text_is_compared_once(tiny, monkeypatch):
    """Catches texts written in turn that are compared at every character, and a decoder that stays
    aside when the weights are as they were."""
    model = anexagpt.load(tiny)
    calls = []
    plain = anexagpt.decode
    monkeypatch.setattr(anexagpt, "decode", lambda *args: calls.append(args) or plain(*args))
    for _ in zip(model.stream("a", max_new=10), model.stream("b", max_new=10), strict=True):
        pass
    assert len(calls) == 2
    weight = model.network.h[0].mlp.c_fc.weight.data
    before = weight.clone()
    weight.zero_()
    model.generate("a", max_new=10)
    assert len(calls) == 2 + 9
    weight.copy_(before)
    model.generate("a", max_new=10)
    assert len(calls) == 2 + 9 + 1


def test_a_changed_attention_is_what_trains(capfd, monkeypatch):
    """Catches a fast attention that replaces the one that a learner has changed."""

    def without_scale(q, k):
        later = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
        return torch.softmax((q @ k.mT).masked_fill(later, -torch.inf), dim=-1)

    text, losses = prose(400), []
    settings = dict(device="cpu", dtype="float32", progress=False, max_steps=5, **SHAPE)
    usual = anexagpt.train(text=text, **settings).metadata.history
    monkeypatch.setattr(anexagpt, "attention_weights", without_scale)
    for plain in (True, False):
        model = anexagpt.train(text=text, plain=plain, **settings)
        losses.append(model.metadata.history)
        notes = capfd.readouterr().err.count("NOTE: attention()")
        assert (notes > 0) != plain
    assert losses[0] == losses[1] != usual


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-3), ("bfloat16", 0.02)])
def test_fast_training_equals_plain_training(dtype, tolerance):
    """Catches a fast path that trains another model."""
    settings = dict(device="cpu", dtype=dtype, progress=False, max_steps=12, seed=2, **SHAPE)
    fast, plain = (anexagpt.train(text=prose(400), plain=p, **settings) for p in (False, True))
    assert fast.metadata.validation_loss == pytest.approx(
        plain.metadata.validation_loss, abs=tolerance
    )
    attends = [m.network.h[0].attn.attend for m in (fast, plain)]
    assert attends == [anexagpt.fast_attention, anexagpt.attention]


def test_plain_has_no_fast_path(tiny, cli, monkeypatch):
    """Catches --plain that leaves one of them on."""

    def forbidden(*arguments):
        raise AssertionError("a fast path")

    for name in ("fast_attention", "NumpyDecoder", "CudaGraph", "use_fast_attention"):
        monkeypatch.setattr(anexagpt, name, forbidden)
    Path("t.txt").write_text(prose(300))
    train = ["train", "t.txt", "--plain", "--out", "a.safetensors", "--max-steps", 2, *TINY]
    assert cli(*train).status == 0
    for command in ("generate the", "explain the", "chat", "eval t.txt --device cpu"):
        lines = f"the\n/model {tiny}\nthe\n"
        result = cli(*command.split(), "--plain", "--model", tiny, stdin=lines)
        assert result.status == 0, result


# ---- faults that a first reading found -----------------------------------------------------------


def test_evaluate_leaves_the_mode(tiny):
    """Catches a network that is in eval mode after an evaluation in the midst of a training."""
    model = anexagpt.load(tiny)
    ids = model.tokenizer.encode("the cat ran home")
    for mode in (True, False):
        model.network.train(mode)
        anexagpt.evaluate(model.network, ids)
        assert model.network.training == mode


def test_prefill_computes_the_last_position_of_one_prompt(tiny, monkeypatch):
    """Catches logits of every position, and of each of 64 equal prompts: gigabytes for a large
    vocabulary."""
    model, shapes = anexagpt.load(tiny), []
    logits, embed = anexagpt.GPT.logits, anexagpt.GPT.embed
    monkeypatch.setattr(
        anexagpt.GPT, "logits", lambda self, x: shapes.append(x.shape[:-1]) or logits(self, x)
    )
    monkeypatch.setattr(
        anexagpt.GPT, "embed", lambda self, x, i: shapes.append(x.shape) or embed(self, x, i)
    )
    pieces = model.stream_batch("the cat", SampleConfig(max_new=2), range(64))
    next(pieces)
    assert shapes == [(1, 7), (1, 1)]


def test_what_a_run_decides_is_kept(cli, tmp_path):
    """Catches a factor of the logits that changes when a run is resumed with fewer steps, and an
    --init whose resolved dropout becomes that of the next run."""
    Path("t.txt").write_text(prose(250))
    stopped = Trainer(Corpus.from_text(prose(250)), GPTConfig(block_size=16), TrainConfig())
    assert stopped.cfg.logit_scale == 1.15
    options = ["train", "t.txt", *TINY, "--max-steps", 200]
    with interrupt_at(3):
        assert cli(*options).status == 130
    saved = anexagpt.load("model.safetensors.checkpoint").metadata.training
    assert saved["logit_scale"] == 1.15
    assert cli(*options[:-1], 10).status == 0  # a run of 10 steps would have 1.0
    assert anexagpt.load("model.safetensors").metadata.training["logit_scale"] == 1.15
    assert anexagpt.load("model.safetensors").network.config.dropout == 0.0
    init = ["train", "t.txt", *TINY, "--init", "model.safetensors", "--out", "b.safetensors"]
    with interrupt_at(3):
        assert cli(*init, "--max-steps", 5_000).status == 130
    assert anexagpt.load("b.safetensors.checkpoint").network.config.dropout == 0.2


def test_no_memory_to_resume(cli, tmp_path, monkeypatch):
    """Catches the advice to discard a good checkpoint, where only memory is lacking."""
    Path("t.txt").write_text(prose(250))
    options = ["train", "t.txt", *TINY, "--max-steps", 200]
    with interrupt_at(3):
        assert cli(*options).status == 130

    def full(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ...")

    for owner, name in ((anexagpt.safetensors.torch, "load"), (Trainer, "load_state_dict")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full)
            result = cli(*options)
            assert result.status == 2 and "out of memory" in result.err.splitlines()[-1]
            assert "--restart" not in result.err and "complete" not in result.err
    assert cli(*options).status == 0


def test_checkpoint_of_another_shape(cli):
    """Catches tensors of a checkpoint that are reshaped into those of another run, or matched by
    their number instead of their name."""
    Path("t.txt").write_text(prose(250))
    trainer = Trainer(Corpus.from_text(prose(250)), GPTConfig(**SHAPE), TrainConfig(max_steps=3))
    trainer.fit()
    tensors = {name: tensor.clone() for name, tensor in trainer.state_dict().items()}
    assert {"muon.slow.h.1.mlp.c_fc.weight", "adamw.wte.weight.exp_avg", "ema.wpe.weight"} <= set(
        tensors
    )
    metadata = trainer.metadata()
    trainer.load_state_dict(tensors, metadata)
    name = "muon.fast.h.0.attn.c_proj.weight"
    stopped = anexagpt.SavedFile(Path("x.checkpoint"), metadata, {})
    plan = anexagpt.Plan(GPTConfig(**SHAPE), TrainConfig(max_steps=9), None, stopped)
    with pytest.raises(anexagpt.UserError, match=r"x\.checkpoint: cannot be resumed.*`restart`"):
        ctx = anexagpt.DistributedContext()
        anexagpt.make_trainer(plan, Corpus.from_text(prose(250)), "cpu", torch.float32, ctx)
    for wrong in (tensors[name].reshape(32, 128), None):
        changed = dict(tensors)
        changed.pop(name)
        if wrong is not None:
            changed[name] = wrong
        with pytest.raises(anexagpt.UserError, match=name):
            trainer.load_state_dict(changed, metadata)


def test_an_attend_of_ones_own_is_what_writes(tiny, monkeypatch):
    """Catches a fast attention in the place of an `attend` that a learner has given to the blocks:
    attention() itself is as it was, so the comparison with it does not notice."""

    def equal_shares(q, k, v):
        T, S = q.shape[2], k.shape[2]
        seen = torch.ones(T, S).tril(S - T)
        return seen / seen.sum(1, keepdim=True) @ v

    usual = anexagpt.load(tiny).generate("the big ", max_new=40, temperature=0.0)
    monkeypatch.setattr(anexagpt.CausalSelfAttention, "attend", staticmethod(equal_shares))
    model = anexagpt.load(tiny)
    assert all(block.attn.attend is equal_shares for block in model.network.h)
    ids = model.prompt_ids("the big ")
    expected = generate(model.network, ids, 40, SampleConfig(temperature=0.0), None)
    text = model.generate("the big ", max_new=40, temperature=0.0)
    assert text == model.tokenizer.decode(expected[len(ids) :]) != usual


def test_another_network_in_a_model(tiny):
    """Catches a fast decoder that goes on with the weights of the network that a model had."""
    model = anexagpt.load(tiny)
    usual = model.generate("the ", max_new=40, temperature=0.0)  # the decoder is in use
    model.network = copy.deepcopy(model.network)
    with torch.no_grad():
        model.network.wte.weight.mul_(-1)
    ids = model.prompt_ids("the ")
    expected = generate(model.network, ids, 40, SampleConfig(temperature=0.0), None)
    text = model.generate("the ", max_new=40, temperature=0.0)
    assert text == model.tokenizer.decode(expected[len(ids) :]) != usual


def test_a_loaded_model_has_no_dropout(tmp_path):
    """Catches Model.load() that leaves a network in training mode, whose masks change a text."""
    trainer = Trainer(
        Corpus.from_text(prose(250)), GPTConfig(**SHAPE), TrainConfig(max_steps=3, dropout=0.5)
    )
    trainer.fit()
    model = trainer.best_model()
    model.save(tmp_path / "dropout.safetensors")
    again = anexagpt.Model.load(tmp_path / "dropout.safetensors")
    assert again.network.config.dropout == 0.5 and not again.network.training
    np.testing.assert_array_equal(again.surprise("the cat ran"), model.surprise("the cat ran"))
