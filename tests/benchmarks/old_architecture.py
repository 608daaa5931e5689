"""Speed of docs/old_architecture.py: training beside microgpt on microgpt's own job, and generation.

    python tests/benchmarks/old_architecture.py --microgpt ../microgpt/microgpt.py --names ../shared/data/names.txt

microgpt is Andrej Karpathy's GPT in 200 lines of Python. Its file is run as it is, from wherever it lies. The two sides
run in turn, each time in a process of its own; the figures are medians over the rounds, and the median of the rounds'
ratios. Seconds are those of the processor, so that other programs on the machine do not count.
"""

import argparse
import gc
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from itertools import islice
from operator import mul
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "docs"))
import old_architecture as old
from old_architecture import Value, accumulate, add, attention, cross_entropy, floats, linear, record

# ---- microgpt's network, made of our parts ---------------------------------------------------------------------------
# 1 layer, 16 wide, 4 heads, context 16; RMSNorm, ReLU, no biases, a head of its own; one name a step.

C, H, T = 16, 4, 16


def rms_norm(x):
    unit, scale = [], []
    for row in floats(x):
        scale.append((sum(map(mul, row, row)) / len(row) + 1e-5) ** -0.5)
        unit.append([v * scale[-1] for v in row])

    def chain_rule(grads):
        means = [sum(map(mul, g, u)) / len(g) for g, u in zip(grads, unit, strict=True)]
        rows = zip(grads, unit, scale, means, strict=True)
        accumulate(x, [[s * (gi - ui * m) for gi, ui in zip(g, u, strict=True)] for g, u, s, m in rows])

    return record(unit, (x,), chain_rule)


def relu(x):
    y = [[v if v > 0 else 0.0 for v in row] for row in floats(x)]

    def chain_rule(grads):
        rows = zip(grads, y, strict=True)
        accumulate(x, [[g if v > 0 else 0.0 for g, v in zip(*row, strict=True)] for row in rows])

    return record(y, (x,), chain_rule)


def train_ours(names, steps):
    """(seconds, loss) at the end of every step, on the weights and in the order of names that microgpt's seed gives."""
    rng = random.Random(42)
    docs = [line.strip() for line in names.read_text().strip().split("\n") if line.strip()]
    rng.shuffle(docs)
    characters = sorted(set("".join(docs)))
    ids = {c: i for i, c in enumerate(characters)}
    end, V = len(characters), len(characters) + 1

    def matrix(rows, columns):
        return [[Value(rng.gauss(0, 0.08)) for _ in range(columns)] for _ in range(rows)]

    wte, wpe, head = matrix(V, C), matrix(T, C), matrix(V, C)
    qkv = matrix(C, C) + matrix(C, C) + matrix(C, C)
    wo, fc1, fc2 = matrix(C, C), matrix(4 * C, C), matrix(C, 4 * C)
    parameters = [v for weight in (wte, wpe, head, qkv, wo, fc1, fc2) for row in weight for v in row]
    adam, progress = old.Adam(parameters, beta1=0.85, beta2=0.99), []
    gc.disable()  # as the program does
    for step in range(steps):
        doc = docs[step % len(docs)]
        tokens = [end, *(ids[c] for c in doc), end]
        n = min(T, len(tokens) - 1)
        x = rms_norm(add([wte[i] for i in tokens[:n]], wpe[:n]))
        x = add(x, linear(attention(linear(rms_norm(x), qkv), H, [], []), wo))
        x = add(x, linear(relu(linear(rms_norm(x), fc1)), fc2))
        loss = cross_entropy(linear(x, head), tokens[1 : n + 1])
        loss.backward()
        adam.step(0.01 * (1 - step / 1000))
        Value.tape.clear()
        progress.append((time.process_time(), loss.data))
    return progress


def train_microgpt(path, names, steps):
    """The same of microgpt's own file, whose line of text after every step we listen to."""
    progress = []

    class Enough(Exception):
        pass

    def listen(text):
        if text.startswith("step"):
            progress.append((time.process_time(), scope["loss"].data))
            if len(progress) == steps:
                raise Enough

    scope = {"__name__": "__main__", "print": listen}
    code = compile(path.read_text(encoding="utf-8"), str(path), "exec")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "input.txt").write_bytes(names.read_bytes())
        os.chdir(folder)
        with suppress(Enough):
            exec(code, scope)
        os.chdir("/")
    return progress


# ---- anexagpt.py's default network -----------------------------------------------------------------------------------

DEFAULT = old.GPTConfig(vocab_size=90, block_size=256, n_layer=4, n_head=4, n_embd=128)  # 0.8 M parameters


def step_in_python(ids):
    """Seconds that one training step on `ids` takes here."""
    weights = old.new_weights(DEFAULT, random.Random(1))
    adam = old.Adam([v for weight in weights.values() for row in weight for v in row])
    gc.disable()
    start = time.process_time()
    cross_entropy(old.gpt(ids[:-1], weights, DEFAULT), ids[1:]).backward()
    adam.step(1e-3)
    Value.tape.clear()
    return time.process_time() - start


def step_in_torch(ids, steps=50):
    """The same of PyTorch, on one core in float32: the mean of `steps` steps, after a first one."""
    sys.path.insert(0, str(Path(old.__file__).parents[1]))
    import torch

    import anexagpt

    torch.set_num_threads(1)
    model = anexagpt.GPT(anexagpt.GPTConfig(**vars(DEFAULT), dropout=0.0))
    adam = torch.optim.Adam(model.parameters())
    x, y = torch.tensor([ids[:-1]]), torch.tensor(ids[1:])
    for step in range(steps + 1):
        if step == 1:
            start = time.process_time()
        torch.nn.functional.cross_entropy(model(x)[0], y).backward()
        adam.step()
        adam.zero_grad()
    return (time.process_time() - start) / steps


# ---- generation ------------------------------------------------------------------------------------------------------


def generate(path, characters, read):
    """Characters a second with the model in `path`, or random weights of the default size, after `read` characters."""
    if path:
        model = old.load_model(path)
    else:
        weights = {name: floats(weight) for name, weight in old.new_weights(DEFAULT, random.Random(1)).items()}
        model = old.Model(DEFAULT, None, weights, {})
    gc.disable()
    ids = old.stream(model, [1 + i % 50 for i in range(read)], 0.8, random.Random(1))
    next(ids)
    start = time.process_time()
    for _ in islice(ids, characters):
        pass
    return characters / (time.process_time() - start)


# ---- in turn ---------------------------------------------------------------------------------------------------------


def child(task, options):
    """What this script, run in a new process with --task, prints as JSON."""
    command = [sys.executable, __file__, "--task", task, "--steps", str(options.steps)]
    for name in ("microgpt", "names", "model"):
        if getattr(options, name):
            command += [f"--{name}", str(getattr(options, name).resolve())]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--microgpt", type=Path, metavar="PATH", help="microgpt.py of a checkout")
    parser.add_argument("--names", type=Path, metavar="PATH", help="names.txt, one name a line")
    parser.add_argument("--model", type=Path, metavar="FILE", help="model to generate with (default: random weights)")
    parser.add_argument("--torch", action="store_true", help="compare a training step with PyTorch's as well")
    parser.add_argument("--steps", type=int, default=100, help="training steps a round (default: 100)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds (default: 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")
    parser.add_argument("--task", choices=("ours", "microgpt", "generate", "torch"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task == "ours":
        return print(json.dumps(train_ours(options.names, options.steps)))
    if options.task == "microgpt":
        return print(json.dumps(train_microgpt(options.microgpt, options.names, options.steps)))
    if options.task == "generate":
        return print(json.dumps([generate(options.model, 60, read) for read in (8, 180)]))

    if options.task == "torch":
        ids = [1 + i * i % 89 for i in range(65)]
        return print(json.dumps([step_in_python(ids), step_in_torch(ids)]))

    figures = dict(python=platform.python_version(), steps=options.steps, ours=[], microgpt=[], difference=0.0)
    if options.microgpt and options.names:
        for _ in range(options.rounds):
            runs = {name: child(name, options) for name in ("microgpt", "ours")}
            for name, run in runs.items():
                figures[name].append((len(run) - 1) / (run[-1][0] - run[0][0]))
            pairs = zip(runs["ours"], runs["microgpt"], strict=True)
            figures["difference"] = max(figures["difference"], *(abs(a[1] - b[1]) for a, b in pairs))
            print(f"microgpt {figures['microgpt'][-1]:7.2f} steps/s   ours {figures['ours'][-1]:7.2f} steps/s")
        ratio = statistics.median(a / b for a, b in zip(figures["ours"], figures["microgpt"], strict=True))
        ours, theirs = statistics.median(figures["ours"]), statistics.median(figures["microgpt"])
        figures["ratio"] = ratio
        print(f"Python {figures['python']}, medians of {options.rounds} rounds of {options.steps} steps:")
        print(f"microgpt {theirs:.2f} steps/s, ours {ours:.2f} steps/s: {ratio:.1f} times as fast")
        print(f"largest difference of a loss: {figures['difference']:.1e}")
    rates = [child("generate", options) for _ in range(options.rounds)]
    figures["characters"] = [statistics.median(column) for column in zip(*rates, strict=True)]
    early, late = figures["characters"]
    print(f"generation, 0.8 M parameters: {early:.1f} characters/s from the start, {late:.1f} after 180 characters")
    if options.torch:
        steps = [child("torch", options) for _ in range(options.rounds)]
        figures["step"] = [statistics.median(column) for column in zip(*steps, strict=True)]
        ours, theirs = figures["step"]
        print(
            f"one step on 64 characters: {ours:.2f} s, PyTorch {theirs * 1e3:.1f} ms: {ours / theirs:.0f} times as long"
        )
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
