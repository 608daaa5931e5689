"""The pictures in docs/pictures: measured in real runs, stored as figures.json, drawn as SVG.

    python docs/pictures.py               draw all pictures from figures.json
    python docs/pictures.py model         what a trained model computes: attention, temperature,
                                          singular values of a gradient, a chat, the views
    python docs/pictures.py learning      train 1,000 of the default steps, and show what it writes
    python docs/pictures.py curves        train with Muon, and with AdamW at three rates (minutes)
    python docs/pictures.py baselines     losses of simple character models

A measurement replaces its entry in figures.json. --model FILE is a model, by default the one inside
demo.html; --data TEXT is a built-in text or your own file (sherlock; curves: shakespeare).
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import re
import statistics
import subprocess
import sys
import textwrap
import unicodedata
from collections import Counter
from html import escape
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import browser
import numpy as np
import quotes
import torch
from rich.ansi import AnsiDecoder
from rich.console import Console

import anexagpt
from anexagpt import Corpus, GPTConfig, TrainConfig, Trainer

FOLDER = HERE / "pictures"
FIGURES = quotes.FIGURES
HEADS = {"1.1": "the preceding character", "3.4": "often the word's start"}  # with captions
CHAT = ("Sherlock", "/probs It was a ", "/set temperature 0.5", "/regen", "/why", "quit")
VIEWS = ("/set top-k 5", "Sherlock Holmes", "/probs Sherlock", "/why", "/attn 1 1", "quit")


# ---- measurements --------------------------------------------------------------------------------


class MatrixAdamW:
    """Updates the matrices of a Trainer's network; takes the place of its Muon."""

    interval = 1

    def __init__(self, trainer: Trainer, rate: float):
        matrices = [p for p in trainer.network.h.parameters() if p.dim() == 2]
        self.rate = rate
        self.adamw = torch.optim.AdamW(
            matrices, betas=(0.9, 0.99), weight_decay=trainer.cfg.weight_decay
        )

    def step(self, scale, slow_rate, is_update) -> None:
        self.adamw.param_groups[0]["lr"] = self.rate * float(scale)
        self.adamw.step()


def validation_losses(name: str, trainer: Trainer) -> list:
    """Rows [step, validation loss] of a training run."""
    trainer.fit()
    rows = []
    for step, _, loss in trainer.history:
        rows.append([step, round(loss, 4)])
    print(f"{name:<14} {rows[-1][1]:.4f}", flush=True)
    return rows


def curves(corpus: Corpus) -> dict:
    """Validation losses with Muon for the matrices of the blocks, and with AdamW for all."""
    config = GPTConfig(block_size=64)
    cfg = TrainConfig(max_steps=1_000, batch_size=12, eval_interval=100, dropout=0.0, seed=1)
    device = anexagpt.select_device("cpu")
    dtype = anexagpt.select_dtype("auto", device)
    trainer = Trainer(corpus, config, cfg, device, dtype)
    runs = {"Muon": validation_losses("Muon", trainer)}
    for rate in (2e-3, 4e-3, 8e-3):
        name = f"AdamW at {rate:g}"
        trainer = Trainer(corpus, config, cfg, device, dtype)
        trainer.muon = MatrixAdamW(trainer, rate)
        runs[name] = validation_losses(name, trainer)
    return runs


def baselines(corpus: Corpus) -> dict:
    """Losses of count-based models on the validation part, in nats per character."""
    text = corpus.tokenizer.decode(corpus.ids)
    V = len(set(text))
    n = len(text) * 9 // 10
    train = text[:n]
    val = text[n:]
    unigrams = Counter(train)
    bigrams = Counter(pairwise(train))
    before = Counter(train[:-1])
    unigram = []
    bigram = []
    for a, b in pairwise(val):
        unigram.append(math.log((n + V) / (unigrams[b] + 1)))
        bigram.append(math.log((before[a] + V) / (bigrams[a, b] + 1)))
    losses = {
        "uniform": math.log(V),
        "unigram": statistics.fmean(unigram),
        "bigram": statistics.fmean(bigram),
    }
    for name, loss in losses.items():
        bits = loss / math.log(2)
        print(f"{name:<8} {loss:.2f} nats {bits:.2f} bits, perplexity {math.exp(loss):.0f}")
    return losses


def learning(corpus: Corpus, model: anexagpt.Model) -> dict:
    """The run that made `model`, seen early: validation losses, and what the network writes.

    Only the first 1,000 steps are trained again; the rest is in the metadata of the model.
    """
    training = model.metadata.training
    cfg = TrainConfig.pick(training)
    dtype = getattr(torch, training["dtype"])
    trainer = Trainer(corpus, model.network.config, cfg, training["device"], dtype)
    anexagpt.use_fast_training(trainer)
    losses = []
    texts = {}
    for step in (0, 1, 2, 4, 8, 16, 32, 250, 1_000):
        while trainer.steps_done < step:
            trainer.step()
        if step < 50:  # the first one in the metadata
            losses.append([step, round(trainer.validate(), 4)])
            print(f"step {step:5,}: {losses[-1][1]}", flush=True)
        if step in (0, 250, 1_000):
            early = anexagpt.Model(trainer.ema, corpus.tokenizer, trainer.metadata())
            texts[step] = early.generate("It was a ", max_new=100, seed=1)
            print(repr(texts[step]), flush=True)
    texts[model.metadata.step] = model.generate("It was a ", max_new=100, seed=1)
    losses += [[row.step, row.validation_loss] for row in model.metadata.history]
    return {"losses": losses, "texts": texts}


def embeddings(model: anexagpt.Model) -> dict:
    """The characters, and their embeddings along the first principal components (PCA)."""
    wte = model.network.wte.weight[1:].detach()  # (V - 1, C)
    rows = wte / wte.norm(dim=1, keepdim=True)  # rare characters have short rows
    rows = rows - rows.mean(0)
    u, s, _ = torch.linalg.svd(rows, full_matrices=False)
    shares = s**2 / (s**2).sum()
    characters = model.tokenizer.characters[1:]
    points = (u * s)[:, :4]
    points = points * points[characters.index("e")].sign()  # a direction has no sign of its own
    return {
        "characters": characters,
        "points": [[round(value, 3) for value in point] for point in points.tolist()],
        "shares": [round(share, 3) for share in shares[:4].tolist()],
    }


def temperature(model: anexagpt.Model, prompt: str) -> dict:
    """Probabilities of the 14 likeliest characters after `prompt` at four temperatures."""
    order = model.next_characters(prompt, temperature=1.0).argsort()[::-1][:14]
    probs = {}
    for value in (0.25, 0.5, 1, 2):
        p = model.next_characters(prompt, temperature=float(value))  # (V,)
        probs[f"{value:g}"] = p[order].tolist()
    characters = model.tokenizer.decode(order)
    return {"prompt": prompt, "next": characters, "probs": probs}


def samples(model: anexagpt.Model, prompt: str) -> dict:
    texts = {}
    for value in (0, 0.5, 0.8, 1, 1.5):
        text = model.generate(prompt, temperature=value, max_new=150, seed=1)
        print(f"temperature {value}: {text!r}")
        texts[f"{value:g}"] = text
    return texts


def attention(model: anexagpt.Model, text: str) -> dict:
    """Attention weights within `text` of the heads in HEADS."""
    weights = model.attention(text)  # (L, H, T, T)
    heads = {}
    for name in HEADS:
        layer, head = map(int, name.split("."))
        heads[name] = weights[layer - 1, head - 1].astype(float).round(3).tolist()
    return {"text": text, "heads": heads}


def singular_values(matrix) -> list[float]:
    return [round(s, 4) for s in torch.linalg.svdvals(matrix).tolist()]


def muon(model: anexagpt.Model) -> list:
    """Singular values of a gradient of the loss on six texts of the model, and of its update."""
    T = model.network.config.block_size
    windows = []
    for seed in range(6):
        text = "\n" + model.generate(max_new=T, seed=seed)
        windows.append(model.tokenizer.encode(text))
    batch = torch.from_numpy(np.stack(windows).astype("i8"))  # (6, T + 1)
    logits = model.network(batch[:, :-1])  # (6, T, V)
    anexagpt.cross_entropy_sum(logits, batch[:, 1:]).backward()
    grad = model.network.h[0].attn.c_proj.weight.grad  # (C, C)
    update = anexagpt.newton_schulz(grad[None])[0]  # (C, C)
    return [singular_values(grad / grad.norm()), singular_values(update)]


def measure_model(path: Path) -> dict:
    """What a trained model computes."""
    model = anexagpt.load(path)
    prompt = "It was a "
    return {
        "model": str(model.metadata),
        "temperature": temperature(model, prompt),
        "samples": samples(model, prompt),
        "attention": attention(model, "\nIt was Sherlock Holmes"),
        "embeddings": embeddings(model),
        "muon": muon(model),
        "chat": terminal(path, CHAT, seed=4, height=13),
        "views": terminal(path, VIEWS, seed=3, height=25),
    }


def terminal(path: Path, lines: tuple, seed: int, height: int) -> str:
    """What a terminal shows of a chat, with its color codes."""
    program = HERE.parent / "anexagpt.py"
    color = {"FORCE_COLOR": "1", "COLORTERM": "truecolor", "TERM": "xterm-256color"}
    size = {"COLUMNS": "80", "LINES": str(height)}
    run = subprocess.run(
        [sys.executable, program, "chat", path.name, "--max-new", "150", "--seed", str(seed)],
        input="\n".join(lines),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=path.resolve().parent,
        env=os.environ | color | size,
        encoding="utf-8",
    )
    screen, *answers = run.stdout.split("Prompt: ")
    for line, answer in zip(lines, answers, strict=True):
        screen += f"Prompt: {line}\n{answer}"  # a pipe has no echo
    return screen


# ---- drawing -------------------------------------------------------------------------------------
# Each picture in two versions, for light and for dark pages.

INK = "#102030"
GREY = "#555555"
FAINT = "#d8dee4"
BLUE = "#205080"
RED = "#b03020"
TONES = ("#9dbad6", "#5d8fbd", BLUE, RED)
GREEN = "#2d7d46"
WHITE = "#ffffff"
PALE = "#f5f8fb"
TINT = "#eaf2fa"
DARK = {
    WHITE: "#0d1117",
    INK: "#e6edf3",
    GREY: "#9da7b3",
    FAINT: "#30363d",
    BLUE: "#79c0ff",
    RED: "#ff7b72",
    GREEN: "#56d364",
    TONES[0]: "#2f4f70",
    TONES[1]: "#4a80b5",
    PALE: "#161b22",
    TINT: "#12263a",
}
BOLD = 'font-weight="bold"'
MONO = 'font-family="Menlo, Consolas, monospace"'
DASHED = 'stroke-dasharray="4 4"'


def write_svg(name: str, svg: str) -> None:
    (FOLDER / f"{name}.svg").write_text(svg + "\n", encoding="utf-8", newline="\n")


def write_both(name: str, svg: str) -> None:
    write_svg(name, svg)
    write_svg(f"{name}-dark", re.sub("#[0-9a-f]{6}", lambda found: DARK[found[0]], svg))


class Picture:
    """An SVG file, 760 wide."""

    def __init__(self, height: int, title: str):
        font = 'font-family="Helvetica, Arial, sans-serif" font-size="14"'
        size = f'xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 {height}"'
        self.lines = [f"<svg {size} {font}>", f"<title>{escape(title)}</title>"]
        self.box(0, 0, 760, height, WHITE)

    def text(self, x, y, text, fill=INK, anchor="start", extra="") -> None:
        place = f'x="{x:.1f}" y="{y:.1f}" fill="{fill}" text-anchor="{anchor}" {extra}'
        self.lines.append(f"<text {place}>{escape(str(text))}</text>")

    def box(self, x, y, width, height, fill, opacity=1.0) -> None:
        place = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
        self.lines.append(f'<rect {place} fill="{fill}" fill-opacity="{opacity:.2f}"/>')

    def line(self, points, stroke=FAINT, width=1.0, extra="") -> None:
        path = " L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        style = f'stroke="{stroke}" stroke-width="{width}" fill="none" {extra}'
        self.lines.append(f'<path d="M{path}" {style}/>')

    def frame(self, x, y, width, height, fill=TINT, stroke=BLUE, radius=6) -> None:
        self.box(x, y, width, height, fill)
        extra = f'rx="{radius}" stroke="{stroke}"/>'
        self.lines[-1] = self.lines[-1].removesuffix("/>") + f" {extra}"

    def arrow(self, start, end, color=GREY) -> None:
        """A line with a tip at its end."""
        (x0, y0), (x, y) = start, end
        angle = math.atan2(y - y0, x - x0)
        tip = [(x, y)]
        for turn in (2.7, -2.7):
            tip.append((x + 9 * math.cos(angle + turn), y + 9 * math.sin(angle + turn)))
        self.line([start, end], color, 1.5)
        self.line([tip[1], tip[0], tip[2]], color, 1.5)

    def plus(self, x, y) -> None:
        self.dot(x, y, WHITE, 10, f'stroke="{BLUE}" stroke-width="2"')
        self.text(x, y + 5, "+", BLUE, "middle", BOLD)

    def dot(self, x, y, fill, radius, extra="") -> None:
        self.lines.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{fill}" {extra}/>')

    def grid(self, left, right, ticks: dict) -> None:
        """Horizontal lines with a label at the left: {label: y}."""
        for label, y in ticks.items():
            self.line([(left, y), (right, y)])
            self.text(left - 8, y + 5, label, GREY, "end")

    def save(self, name: str) -> None:
        write_both(name, "\n".join([*self.lines, "</svg>"]))


def visible(c: str) -> str:
    return {" ": "␣", "\n": "↵"}.get(c, c)


def best_adamw(runs: dict) -> str:
    """Name of the run with AdamW that has the lowest loss at its end."""
    names = [name for name in runs if name != "Muon"]
    return min(names, key=lambda name: runs[name][-1][1])


def step_that_reaches(history: list, goal: float) -> float:
    """The step at which a loss falls to `goal`, between two evaluations by linear interpolation."""
    for (step, loss), (next_step, next_loss) in pairwise(history):
        if next_loss <= goal:
            share = (loss - goal) / (loss - next_loss)
            return step + share * (next_step - step)
    raise ValueError(f"the loss does not fall to {goal}")


def draw_curves(runs: dict) -> None:
    """Validation loss over the steps; where Muon reaches what AdamW at its best rate ends at."""
    last_step = runs["Muon"][-1][0]

    def x(step: float) -> float:
        return 70 + 490 * step / last_step

    def y(loss: float) -> float:
        return 340 - 310 * (loss - 1.5)

    picture = Picture(400, "Validation loss of Muon and of AdamW")
    picture.grid(70, 560, {loss: y(loss) for loss in (1.5, 1.7, 1.9, 2.1, 2.3, 2.5)})
    for step in range(0, last_step + 1, 250):
        picture.text(x(step), 362, f"{step:,}", GREY, "middle")
    picture.text(315, 386, "steps of 12 × 64 characters", GREY, "middle")
    picture.text(570, 20, "validation loss, nats/char", GREY)

    best = best_adamw(runs)
    colors = {"Muon": RED, best: BLUE}
    label_y = 0.0
    for name in sorted(runs, key=lambda name: -runs[name][-1][1]):
        history = runs[name]
        color = colors.get(name, TONES[1])
        points = [(x(step), y(loss)) for step, loss in history if loss < 2.5]
        width = 2.5 if name in colors else 1.0
        picture.line(points, color, width)
        label_y = max(points[-1][1] + 5, label_y + 16)  # labels do not overlap
        picture.text(570, label_y, f"{history[-1][1]:.3f}  {name}", color)

    goal = runs[best][-1][1]
    reached = step_that_reaches(runs["Muon"], goal)
    path = [(560, y(goal)), (x(reached), y(goal)), (x(reached), 340)]
    picture.line(path, GREY, 1, DASHED)
    picture.text(x(reached) - 8, 330, f"Muon is there at step {reached:,.0f}", GREY, "end")
    picture.save("curves")


def draw_temperature(figures: dict) -> None:
    """Groups of bars: the likeliest characters at four temperatures."""
    characters = figures["next"]
    group_width = 680 / len(characters)
    bar_width = (group_width - 12) / 4
    picture = Picture(330, "Probabilities of the next character at four temperatures")
    picture.grid(60, 740, {f"{percent}%": 270 - 5.5 * percent for percent in (0, 10, 20, 30, 40)})
    for i, c in enumerate(characters):
        picture.text(60 + group_width * (i + 0.5), 292, visible(c), INK, "middle", MONO)
        for j, probs in enumerate(figures["probs"].values()):
            height = 550 * probs[i]
            x = 66 + group_width * i + j * bar_width
            picture.box(x, 270 - height, bar_width, height, TONES[j])
    picture.text(60, 320, f"next character after “{figures['prompt']}”, likeliest first", GREY)
    picture.text(20, 30, "probability", GREY)
    picture.text(330, 30, "temperature", anchor="end")
    for i, name in enumerate(figures["probs"]):
        picture.box(344 + 75 * i, 19, 14, 14, TONES[i])
        picture.text(363 + 75 * i, 31, name)
    picture.save("temperature")


def draw_map(picture: Picture, left: float, cell: float, text: str, weights: list) -> None:
    """An attention map: a row for each query, a column for each key."""
    size = cell * len(text)
    picture.box(left, 64, size, size, PALE)
    for t, row in enumerate(weights):
        c = visible(text[t])
        picture.text(left - 8, 76 + cell * t, c, INK, "middle", MONO)
        picture.text(left + cell * (t + 0.5), 58, c, INK, "middle", MONO)
        for s, weight in enumerate(row):
            if weight >= 0.02:
                picture.box(left + cell * s, 64 + cell * t, cell, cell, BLUE, weight)


def draw_attention(figures: dict) -> None:
    text = figures["text"]
    cell = 15
    height = 90 + cell * len(text)
    picture = Picture(height, "Attention maps of two heads of a trained model")
    for left, name in zip((45, 420), HEADS, strict=True):
        layer, head = name.split(".")
        picture.text(left, 26, f"layer {layer}, head {head}: {HEADS[name]}", extra=BOLD)
        draw_map(picture, left, cell, text, figures["heads"][name])
    caption = "A row for each query, a column for each key; the fullest blue is a weight of 100%."
    picture.text(50, height - 8, caption, GREY)
    picture.save("attention")


def draw_spectrum(picture: Picture, left: float, title: str, values: list, color: str) -> None:
    """Bars of singular values."""
    width = 300 / len(values)
    picture.text(left, 30, title, extra=BOLD)
    picture.text(left - 30, 52, "singular value", GREY)
    picture.grid(left, left + 300, {tick: 190 - 85 * tick for tick in (0, 0.5, 1)})
    for i, s in enumerate(values):
        picture.box(left + width * i, 190 - 85 * s, width, 85 * s, color)
    picture.text(left, 214, f"all {len(values)} singular values, largest first", GREY)


def draw_muon(figures: list) -> None:
    """Singular values of a gradient and of the update that Muon makes of it."""
    gradient, update = figures
    picture = Picture(230, "Singular values before and after orthogonalization")
    draw_spectrum(picture, 60, "gradient, divided by its norm", gradient, BLUE)
    draw_spectrum(picture, 430, "update: the gradient, orthogonalized", update, RED)
    picture.save("muon")


def draw_value_graph() -> None:
    """The graph of a loss with the derivative of each step (old_architecture.md)."""
    picture = Picture(250, "The graph of loss = (a * b + c) ** 2")
    boxes = {  # left, top, computation, gradient
        "a": (20, 22, "a = 2", -24),
        "b": (20, 102, "b = -3", 16),
        "c": (20, 182, "c = 10", 8),
        "d": (230, 62, "d = a * b = -6", 8),
        "e": (420, 102, "e = d + c = 4", 8),
        "loss": (610, 102, "loss = e² = 16", 1),
    }
    arrows = (  # with the local derivative
        ((140, 50), (224, 80), "b = -3", (190, 56)),
        ((140, 130), (224, 100), "a = 2", (190, 132)),
        ((350, 90), (414, 120), "1", (394, 96)),
        ((140, 210), (414, 140), "1", (300, 194)),
        ((540, 130), (604, 130), "2 e = 8", (574, 120)),
    )
    for start, end, derivative, place in arrows:
        picture.arrow(start, end)
        picture.text(*place, derivative, RED, "middle", 'font-size="13"')
    for left, top, computation, grad in boxes.values():
        picture.frame(left, top, 130 if left == 610 else 120, 56)
        middle = left + (65 if left == 610 else 60)
        picture.text(middle, top + 23, computation, INK, "middle")
        picture.text(middle, top + 45, f"grad {grad}", RED, "middle")
    picture.save("value_graph")


def n_parameters(network: anexagpt.GPT, name: str) -> int:
    return sum(p.numel() for p in network.get_submodule(name).parameters())


def draw_stream(picture: Picture) -> None:
    """The residual stream at the left of the network: a line that parts read and add to."""
    x = 70
    picture.line([(x, 135), (x, 600)], BLUE, 3)
    upward = f'transform="rotate(-90 {x - 16} 330)"'
    picture.text(x - 16, 330, "residual stream x (B, T, C)", BLUE, "middle", upward)
    for y in (112, 158, 374, 522):  # what is added to it
        picture.arrow((140, y), (x + 11, 135 if y < 200 else y), BLUE)
    for y in (236, 430, 600):  # what reads it
        picture.arrow((x, y), (138, y), BLUE)
    for y in (135, 374, 522):
        picture.plus(x, y)


def draw_architecture() -> None:
    """The default network: what it computes, the shapes, the number of parameters."""
    config = GPTConfig(vocab_size=82)
    network = anexagpt.GPT(config)
    rows = (  # height of the middle, part, its name, the shape after it, weights, place on the page
        (66, "ids of the characters", "", "(B, T)", None, "tokenizer"),
        (112, "token embedding", "wte", "(B, T, C)", "wte", "embeddings"),
        (158, "position embedding", "wpe", "(T, C)", "wpe", "embeddings"),
        (236, "LayerNorm", "ln_1", "(B, T, C)", "h.0.ln_1", "layernorm"),
        (
            282,
            "queries, keys, values",
            "c_attn",
            "3 × (B, H, T, D)",
            "h.0.attn.c_attn",
            "attention",
        ),
        (328, "softmax(Q Kᵀ / √D, masked) V", "", "(B, H, T, D)", None, "attention"),
        (374, "mix the heads", "c_proj", "(B, T, C)", "h.0.attn.c_proj", "attention"),
        (430, "LayerNorm", "ln_2", "(B, T, C)", "h.0.ln_2", "layernorm"),
        (476, "widen, GELU", "c_fc", "(B, T, 4 C)", "h.0.mlp.c_fc", "mlp"),
        (522, "narrow", "c_proj", "(B, T, C)", "h.0.mlp.c_proj", "mlp"),
        (600, "LayerNorm", "ln_f", "(B, T, C)", "ln_f", "layernorm"),
        (646, "output head", "wteᵀ", "(B, T, V)", None, "embeddings"),
        (692, "softmax: probabilities", "", "(B, T, V)", None, "generation"),
    )
    picture = Picture(790, "The network of the default model: parts, shapes, parameters")
    picture.text(140, 30, "part", GREY)
    picture.text(450, 30, "shape after it", GREY)
    picture.text(735, 30, "parameters", GREY, "end")
    picture.frame(24, 188, 716, 368, PALE, FAINT)
    per_block = n_parameters(network, "h.0")
    picture.text(140, 208, f"block, {config.n_layer} times", GREY)
    picture.text(735, 208, f"{config.n_layer} × {per_block:,}", GREY, "end")

    draw_stream(picture)
    starts = (66, 236, 282, 328, 430, 476, 600, 646)  # of the arrows from one part to the next
    for y in starts:
        picture.arrow((285, y + 17), (285, y + 27))
    for y, part, name, shape, weights, place in rows:
        picture.lines.append(f'<a href="../new_architecture.md#{place}">')
        picture.frame(140, y - 17, 290, 34)
        picture.text(152, y + 5, part)
        picture.text(420, y + 5, name, BLUE, "end", MONO)
        picture.lines.append("</a>")
        picture.text(450, y + 5, shape, extra=MONO)
        count = f"{n_parameters(network, weights):,}" if weights else "0"
        picture.text(735, y + 5, count, INK if weights else GREY, "end")
    picture.text(735, 738, f"all together {config.n_parameters():,}", extra=BOLD, anchor="end")
    letters = "B texts, T = 256 characters, C = 128 channels, H = 4 heads of D = 32, V = 82 ids"
    picture.text(24, 772, letters, GREY)
    picture.save("architecture")


def draw_matrix(picture, left, top, name, values, rows="", columns="", percent=False) -> float:
    """A matrix with its name; returns where its right side is."""
    width, height = 44, 32
    picture.text(left + width * len(values[0]) / 2, top - 26, name, INK, "middle", BOLD)
    for j, c in enumerate(columns):
        picture.text(left + width * (j + 0.5), top - 7, c, BLUE, "middle", MONO)
    for i, row in enumerate(values):
        if rows:
            picture.text(left - 12, top + height * (i + 0.5) + 5, rows[i], BLUE, "middle", MONO)
        for j, value in enumerate(row):
            x, y = left + width * j, top + height * i
            picture.frame(x, y, width, height, WHITE, FAINT, 0)
            shown = f"{value:.2f}".removesuffix(".00")
            if value == -math.inf:
                picture.box(x, y, width, height, FAINT)
                shown = "−∞"
            if percent:
                picture.box(x, y, width, height, BLUE, 0.45 * value)
                shown = f"{100 * value:.0f}%"
            picture.text(x + width / 2, y + height / 2 + 5, shown, INK, "middle")
    return left + width * len(values[0])


def draw_qkv() -> None:
    """The worked example of new_architecture.md: one head, three characters, D = 2."""
    text = "the"
    q = torch.tensor([(1.0, 0), (2, 1), (0, 3)])  # (T, D)
    k = torch.tensor([(2.0, 0), (0, 2), (1, 1)])
    v = torch.tensor([(1.0, 0), (0, 1), (1, 1)])
    scores = q @ k.T / math.sqrt(2)  # (T, T)
    masked = scores.masked_fill(torch.ones(3, 3).triu(1).bool(), -math.inf)
    weights = anexagpt.attention_weights(q[None, None], k[None, None])[0, 0]
    y = anexagpt.attention(q[None, None], k[None, None], v[None, None])[0, 0]
    picture = Picture(400, "Attention of three characters, with numbers")
    top = 70
    right = draw_matrix(picture, 30, top, "Q", q.tolist(), text)
    picture.text(right + 20, top + 54, "·", extra='font-size="22"', anchor="middle")
    right = draw_matrix(picture, right + 40, top + 16, "Kᵀ", k.T.tolist(), "", text)
    picture.text(right + 28, top + 44, "/ √2", GREY, "middle")
    picture.arrow((right + 8, top + 52), (right + 50, top + 52))
    right = draw_matrix(picture, right + 78, top, "scores", scores.tolist(), text, text)
    picture.text(right + 28, top + 44, "mask", GREY, "middle")
    picture.arrow((right + 8, top + 52), (right + 50, top + 52))
    right = draw_matrix(picture, right + 78, top, "later ones hidden", masked.tolist(), text, text)
    middle = right - 66
    picture.line([(middle, top + 104), (middle, 192), (96, 192)], GREY, 1.5)
    picture.arrow((96, 192), (96, 224))
    picture.text(400, 186, "softmax of each row", GREY, "middle")
    top = 278
    right = draw_matrix(picture, 30, top, "weights", weights.tolist(), text, text, percent=True)
    picture.text(right + 20, top + 54, "·", extra='font-size="22"', anchor="middle")
    right = draw_matrix(picture, right + 60, top, "V", v.tolist(), text)
    picture.arrow((right + 8, top + 52), (right + 50, top + 52))
    right = draw_matrix(picture, right + 78, top, "output", y.tolist(), text)
    for i, line in enumerate(
        ("e: 1% of the value of t,", "88% of that of h,", "11% of its own.", "t sees only itself.")
    ):
        picture.text(right + 30, top + 22 + 22 * i, line, GREY)
    picture.save("qkv")


def draw_learning(figures: dict, baselines: dict) -> None:
    """The validation loss of the default run, and what the network writes on the way."""

    def x(step: float) -> float:
        return 56 + 330 * math.log2(1 + step) / math.log2(1 + figures["losses"][-1][0])

    def y(loss: float) -> float:
        return 410 - 360 * (loss - 1) / 3.6

    losses = dict(map(tuple, figures["losses"]))
    picture = Picture(470, "What the default run has learned on the way")
    picture.grid(56, 386, {loss: y(loss) for loss in (1, 2, 3, 4)})
    picture.text(16, 24, "validation loss, nats/char", GREY)
    for step in (0, 1, 10, 100, 1_000, 5_000):
        picture.line([(x(step), 410), (x(step), 415)], GREY)
        picture.text(x(step), 432, f"{step:,}", GREY, "middle")
    picture.text(221, 456, "steps, on a logarithmic scale", GREY, "middle")
    names = {"uniform": "blind guess", "unigram": "counting characters", "bigram": "counting pairs"}
    for name, loss in baselines.items():
        picture.line([(56, y(loss)), (386, y(loss))], GREY, 1, DASHED)
        picture.text(384, y(loss) - 6, f"{names[name]}: {loss:.2f}", GREY, "end")
    picture.line([(x(step), y(loss)) for step, loss in losses.items()], BLUE, 2.5)
    for i, (step, text) in enumerate(figures["texts"].items()):
        loss = losses[int(step)]
        picture.dot(x(int(step)), y(loss), RED, 5)
        top = 40 + 106 * i
        picture.text(412, top, f"step {int(step):,}, loss {loss:.2f}", RED, extra=BOLD)
        shown = " ".join(("It was a " + text).split())
        for j, line in enumerate(textwrap.wrap(shown, 44)[:3]):
            picture.text(412, top + 22 + 19 * j, line, extra=f'{MONO} font-size="12.5"')
    picture.save("learning")


KINDS = {
    "lowercase vowels": RED,
    "lowercase consonants": BLUE,
    "capitals": GREEN,
    "digits, punctuation and the rest": GREY,
}


def kind(c: str) -> str:
    if c.isupper():
        return "capitals"
    if not c.isalpha():
        return "digits, punctuation and the rest"
    return (
        "lowercase vowels"
        if unicodedata.normalize("NFD", c)[0] in "aeiou"
        else "lowercase consonants"
    )


def move_apart(places: list, distance=13.0) -> None:
    """Shift labels that would cover each other, a little at a time."""
    for _ in range(100):
        for i, a in enumerate(places):
            for b in places[:i]:
                dx, dy = a[0] - b[0], a[1] - b[1]
                gap = math.hypot(dx, dy) + 1e-6
                if gap < distance:
                    push = 0.25 * (distance - gap) / gap
                    a[0] += push * dx
                    a[1] += push * dy
                    b[0] -= push * dx
                    b[1] -= push * dy


def draw_plane(picture: Picture, top, height, points: dict, axes: tuple, shares: list) -> None:
    """Characters in the plane of two principal components."""
    picture.frame(50, top, 690, height, PALE, FAINT, 0)
    lows, highs = ([f(axis) for axis in zip(*points.values(), strict=True)] for f in (min, max))
    places = []
    for point in points.values():
        x, y = ((point[i] - lows[i]) / (highs[i] - lows[i]) for i in axes)
        places.append([70 + 650 * x, top + height - 17 - (height - 35) * y])
    move_apart(places)
    for c, (x, y) in zip(points, places, strict=True):
        picture.text(x, y, visible(c), KINDS[kind(c)], "middle", f'{MONO} font-size="17"')
    names = [f"principal component {i + 1}: {100 * shares[i]:.0f}% of the variance" for i in axes]
    picture.text(395, top + height + 22, names[0], GREY, "middle")
    y = top + height / 2
    picture.text(34, y, names[1], GREY, "middle", f'transform="rotate(-90 34 {y})"')


def draw_embeddings(figures: dict) -> None:
    """All characters in the plane of two principal components, the lowercase letters in another."""
    points = dict(zip(figures["characters"], figures["points"], strict=True))
    lowercase = {c: point for c, point in points.items() if "a" <= c <= "z"}
    picture = Picture(880, "The embeddings of the 81 characters")
    draw_plane(picture, 40, 440, points, (0, 1), figures["shares"])
    picture.text(50, 540, "The lowercase letters along another direction:", extra=BOLD)
    draw_plane(picture, 555, 285, lowercase, (0, 3), figures["shares"])
    left = 50
    for name, color in KINDS.items():
        picture.box(left, 14, 14, 14, color)
        picture.text(left + 20, 26, name)
        left += 48 + 7 * len(name)
    picture.save("embeddings")


def draw_screen(name: str, screen: str) -> None:
    console = Console(
        record=True, width=80, file=io.StringIO(), force_terminal=True, color_system="truecolor"
    )
    for line in AnsiDecoder().decode(screen):
        console.print(line)
    write_svg(name, console.export_svg(title="python anexagpt.py chat", unique_id=name))


def draw(figures: dict) -> None:
    draw_curves(figures["curves"])
    draw_temperature(figures["model"]["temperature"])
    draw_architecture()
    draw_qkv()
    draw_attention(figures["model"]["attention"])
    draw_embeddings(figures["model"]["embeddings"])
    draw_muon(figures["model"]["muon"])
    draw_value_graph()
    if "learning" in figures:
        draw_learning(figures["learning"], figures["baselines"])
    draw_screen("chat", figures["model"]["chat"])
    draw_screen("views", figures["model"]["views"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=("model", "learning", "curves", "baselines"))
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data")
    args = parser.parse_args()
    measured = {}
    with TemporaryDirectory() as folder:
        if args.model is None:
            args.model = Path(folder, anexagpt.MODEL)
            args.model.write_bytes(browser.demo_model())
        if args.what == "model":
            measured["model"] = measure_model(args.model)
        elif args.what == "learning":
            corpus = anexagpt.load_corpus([args.data or "sherlock"])
            measured["learning"] = learning(corpus, anexagpt.load(args.model))
        elif args.what == "curves":
            measured["curves"] = curves(anexagpt.load_corpus([args.data or "shakespeare"]))
        elif args.what == "baselines":
            measured["baselines"] = baselines(anexagpt.load_corpus([args.data or "sherlock"]))
    figures = json.loads(FIGURES.read_text(encoding="utf-8")) | measured
    quotes.write(figures)
    draw(figures)


if __name__ == "__main__":
    main()
