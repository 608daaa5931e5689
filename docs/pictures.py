"""The pictures in docs/pictures: measured in real runs, stored as figures.json, drawn as SVG.

    python docs/pictures.py               draw all pictures from figures.json
    python docs/pictures.py model         what a trained model computes: attention, temperature,
                                          singular values of a gradient, a chat, the views
    python docs/pictures.py curves        train with Muon, and with AdamW at three rates (minutes)
    python docs/pictures.py baselines     losses of simple character models

A measurement replaces its entry in figures.json. --model FILE is the model (model.safetensors);
--data TEXT is a built-in text or your own file (shakespeare; baselines: sherlock).
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import statistics
import subprocess
import sys
from collections import Counter
from html import escape
from itertools import pairwise
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import numpy as np
import torch
from rich.ansi import AnsiDecoder
from rich.console import Console

import anexagpt
from anexagpt import Corpus, GPTConfig, TrainConfig, Trainer

FOLDER = HERE / "pictures"
FIGURES = FOLDER / "figures.json"
HEADS = {"1.2": "the preceding character", "3.2": "often the character before it"}  # with captions
CHAT = ("Sherlock", "/probs It was a ", "/set temperature 0.5", "/regen", "/why", "quit")
VIEWS = ("/set top-k 5", "Sherlock Holmes", "/probs Sherlock", "/why", "/attn 1 2", "quit")


# ---- measurements --------------------------------------------------------------------------------


class MatrixAdamW:
    """Updates the matrices of a Trainer's network; takes the place of its Muon."""

    def __init__(self, trainer: Trainer, rate: float):
        matrices = [p for p in trainer.network.h.parameters() if p.dim() == 2]
        self.rate = rate
        self.adamw = torch.optim.AdamW(
            matrices, betas=(0.9, 0.99), weight_decay=trainer.cfg.weight_decay
        )

    def step(self, scale) -> None:
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
    device, dtype = anexagpt.select_device("cpu")
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
        "attention": attention(model, "\nsaid Sherlock Holmes"),
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
# A white background, so that a picture looks the same on light and on dark pages.

INK = "#102030"
GREY = "#555555"
FAINT = "#d8dee4"
BLUE = "#205080"
RED = "#b03020"
TONES = ("#9dbad6", "#5d8fbd", BLUE, RED)
BOLD = 'font-weight="bold"'
MONO = 'font-family="Menlo, Consolas, monospace"'
DASHED = 'stroke-dasharray="4 4"'


def write_svg(name: str, svg: str) -> None:
    (FOLDER / f"{name}.svg").write_text(svg + "\n", encoding="utf-8", newline="\n")


class Picture:
    """An SVG file, 760 wide."""

    def __init__(self, height: int, title: str):
        font = 'font-family="Helvetica, Arial, sans-serif" font-size="14"'
        size = f'xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 {height}"'
        self.lines = [f"<svg {size} {font}>", f"<title>{escape(title)}</title>"]
        self.box(0, 0, 760, height, "#ffffff")

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

    def grid(self, left, right, ticks: dict) -> None:
        """Horizontal lines with a label at the left: {label: y}."""
        for label, y in ticks.items():
            self.line([(left, y), (right, y)])
            self.text(left - 8, y + 5, label, GREY, "end")

    def save(self, name: str) -> None:
        write_svg(name, "\n".join([*self.lines, "</svg>"]))


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
    picture.text(330, 30, "temperature", anchor="end")
    for i, name in enumerate(figures["probs"]):
        picture.box(344 + 75 * i, 19, 14, 14, TONES[i])
        picture.text(363 + 75 * i, 31, name)
    picture.save("temperature")


def draw_map(picture: Picture, left: float, cell: float, text: str, weights: list) -> None:
    """An attention map: a row for each query, a column for each key."""
    size = cell * len(text)
    picture.box(left, 64, size, size, "#f5f8fb")
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
    for left, name in zip((50, 425), HEADS, strict=True):
        layer, head = name.split(".")
        picture.text(left, 26, f"layer {layer}, head {head}: {HEADS[name]}", extra=BOLD)
        draw_map(picture, left, cell, text, figures["heads"][name])
    caption = "A row for each query, a column for each key; dark blue is a weight of 100%."
    picture.text(50, height - 8, caption, GREY)
    picture.save("attention")


def draw_spectrum(picture: Picture, left: float, title: str, values: list, color: str) -> None:
    """Bars of singular values."""
    width = 300 / len(values)
    picture.text(left, 30, title, extra=BOLD)
    picture.grid(left, left + 300, {tick: 190 - 120 * tick for tick in (0, 0.5, 1)})
    for i, s in enumerate(values):
        picture.box(left + width * i, 190 - 120 * s, width, 120 * s, color)
    picture.text(left, 214, f"all {len(values)} singular values, largest first", GREY)


def draw_muon(figures: list) -> None:
    """Singular values of a gradient and of the update that Muon makes of it."""
    gradient, update = figures
    picture = Picture(230, "Singular values before and after orthogonalisation")
    draw_spectrum(picture, 60, "gradient, divided by its norm", gradient, BLUE)
    draw_spectrum(picture, 430, "update: the gradient, orthogonalised", update, RED)
    picture.save("muon")


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
    draw_attention(figures["model"]["attention"])
    draw_muon(figures["model"]["muon"])
    draw_screen("chat", figures["model"]["chat"])
    draw_screen("views", figures["model"]["views"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=("model", "curves", "baselines"))
    parser.add_argument("--model", type=Path, default=Path(anexagpt.MODEL))
    parser.add_argument("--data")
    args = parser.parse_args()
    figures = json.loads(FIGURES.read_text(encoding="utf-8"))
    if args.what == "model":
        figures["model"] = measure_model(args.model)
    elif args.what == "curves":
        figures["curves"] = curves(anexagpt.load_corpus([args.data or "shakespeare"]))
    elif args.what == "baselines":
        figures["baselines"] = baselines(anexagpt.load_corpus([args.data or "sherlock"]))
    entries = []
    for name, value in figures.items():
        entries.append(f'"{name}": {json.dumps(value, ensure_ascii=False)}')
    content = "{\n" + ",\n".join(entries) + "\n}\n"
    FIGURES.write_text(content, encoding="utf-8", newline="\n")
    draw(figures)


if __name__ == "__main__":
    main()
