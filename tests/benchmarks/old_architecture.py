"""Speed of docs/old_architecture.py: training against microgpt, generation.

    python tests/benchmarks/old_architecture.py --microgpt PATH/microgpt.py --names names.txt

microgpt is Andrej Karpathy's GPT in 200 lines of Python; its file is run unchanged, on its own task
(1 layer, C = 16, one name per step). Each measurement is a new process, both sides in every round.
"""

import argparse
import gc
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from itertools import islice, product
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "docs"))
import old_architecture as old
from old_architecture import Value, add, attention, cross_entropy, detach, linear

STEPS = 40
SMALL = old.GPTConfig(vocab_size=90, block_size=256, n_layer=4, n_head=4, n_embd=128)  # 0.8 M


def rms_norm(x):
    rows = detach(x)
    scales = [(old.dot(row, row) / len(row) + 1e-5) ** -0.5 for row in rows]
    y = [[v * s for v in row] for row, s in zip(rows, scales, strict=True)]

    def backward(grads):
        x_grads = []
        for g, n, s in zip(grads, y, scales, strict=True):
            mean = old.dot(g, n) / len(g)
            x_grads.append([s * (a - b * mean) for a, b in zip(g, n, strict=True)])
        return [x_grads]

    return old.record(y, [x], backward)


def relu(x):
    y = [[max(v, 0.0) for v in row] for row in detach(x)]

    def backward(grads):
        rows = zip(grads, y, strict=True)
        return [[[g * (v > 0) for g, v in zip(*row, strict=True)] for row in rows]]

    return old.record(y, [x], backward)


def train_ours(args):
    """Steps per second and losses, with the network, initial weights and data of microgpt."""
    rng, docs, C, times, losses = random.Random(42), args.names.read_text().split(), 16, [], []
    rng.shuffle(docs)
    characters = sorted({*"".join(docs)})
    bos = len(characters)

    def matrix(rows, columns):
        return [[Value(rng.gauss(0, 0.08)) for _ in range(columns)] for _ in range(rows)]

    wte, wpe, head = matrix(bos + 1, C), matrix(16, C), matrix(bos + 1, C)
    qkv, proj, fc1, fc2 = matrix(3 * C, C), matrix(C, C), matrix(4 * C, C), matrix(C, 4 * C)
    rows = [*wte, *wpe, *head, *qkv, *proj, *fc1, *fc2]
    optimizer = old.Adam([value for row in rows for value in row])
    for step in range(STEPS):
        tokens = [bos, *map(characters.index, docs[step]), bos]
        T = min(16, len(tokens) - 1)
        x = rms_norm(add([wte[i] for i in tokens[:T]], wpe[:T]))  # (T, C)
        x = add(x, linear(attention(linear(rms_norm(x), qkv), 4, [], []), proj))
        x = add(x, linear(relu(linear(rms_norm(x), fc1)), fc2))
        loss = cross_entropy(linear(x, head), tokens[1 : T + 1])
        loss.backward()
        optimizer.step(0.01 * (1 - step / 1000))
        times.append(time.process_time())
        losses.append(loss.data)
    return [(STEPS - 1) / (times[-1] - times[0]), *losses]


def train_microgpt(args):
    """The same of microgpt.py, noted when it prints its line after each step."""
    times, losses, scope = [], [], {}

    def on_print(text):
        if text.startswith("step"):
            times.append(time.process_time())
            losses.append(scope["loss"].data)
            if len(losses) == STEPS:
                raise StopIteration

    scope["print"], folder = on_print, tempfile.mkdtemp()
    Path(folder, "input.txt").write_bytes(args.names.read_bytes())
    code = compile(args.microgpt.read_text(encoding="utf-8"), "microgpt.py", "exec")
    os.chdir(folder)
    gc.enable()  # it makes reference cycles
    with suppress(StopIteration):
        exec(code, scope)
    return [(STEPS - 1) / (times[-1] - times[0]), *losses]


def generate(args):
    """Characters per second with 0.8 M random weights: from the start, and after 180 characters."""
    state_dict = {k: detach(m) for k, m in old.init_weights(SMALL, random.Random(1)).items()}
    rates = []
    for length in (8, 180):
        stream = old.generate_ids([1] * length, state_dict, SMALL, 0.8, random)
        next(stream)  # the prompt
        start = time.process_time()
        rates.append(len(list(islice(stream, 60))) / (time.process_time() - start))
    return rates


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--microgpt", type=Path, required=True, help="microgpt.py")
    parser.add_argument("--names", type=Path, required=True, help="names.txt, one name a line")
    parser.add_argument("--rounds", type=int, default=5, help="all figures are medians of rounds")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    args = parser.parse_args()
    gc.disable()  # as the program does
    if args.task:
        return print(json.dumps(globals()[args.task](args)))
    results = {"train_ours": [], "train_microgpt": [], "generate": []}
    for _, task in product(range(args.rounds), results):
        command = [sys.executable, *sys.argv, "--task", task]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
        results[task].append(json.loads(output))
    ours, theirs, generated = (list(zip(*runs, strict=True)) for runs in results.values())
    ratios = [a / b for a, b in zip(ours[0], theirs[0], strict=True)]
    error = max(abs(a[0] - b[0]) for a, b in zip(ours[1:], theirs[1:], strict=True))
    print(f"Python {platform.python_version()}, medians of {args.rounds} rounds of {STEPS} steps")
    print(f"ours {median(ours[0]):.1f}, microgpt {median(theirs[0]):.2f} steps/s")
    print(f"ratio {median(ratios):.1f}, from {min(ratios):.1f} to {max(ratios):.1f}")
    print(f"largest difference of a loss {error:.1e}")
    early, late = map(median, generated)
    print(f"0.8 M parameters: {early:.1f} characters/s from the start, {late:.1f} after 180")


if __name__ == "__main__":
    main()
