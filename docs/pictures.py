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
from types import SimpleNamespace

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import torch
from rich.ansi import AnsiDecoder
from rich.console import Console

import anexagpt

FOLDER = HERE / "pictures"
FIGURES = FOLDER / "figures.json"
HEADS = {"1.2": "the preceding character", "1.4": "the character before it"}  # with captions
CHAT = ("Sherlock", "/probs It was a ", "/set temperature 0.5", "/regen", "/why", "quit")
VIEWS = ("/set top-k 5", "Sherlock Holmes", "/probs Sherlock", "/why", "/attn 1 2", "quit")


# ---- measurements --------------------------------------------------------------------------------


class AdamWForMatrices:
    """Takes the place of a Trainer's Muon."""

    def __init__(self, trainer, rate: float):
        matrices = [p for p in trainer.model.h.parameters() if p.dim() == 2]
        self.rate, options = rate, dict(betas=(0.9, 0.99), weight_decay=trainer.cfg.weight_decay)
        self.adamw = torch.optim.AdamW(matrices, **options)

    def step(self, scale) -> None:
        self.adamw.param_groups[0]["lr"] = self.rate * float(scale)
        self.adamw.step()


def curves(corpus) -> dict:
    """Validation losses with Muon for the matrices of the blocks, and with AdamW for all."""
    config = anexagpt.GPTConfig(block_size=64, dropout=0.0)
    settings = dict(max_steps=1_000, batch_size=12, eval_interval=100, checkpoint_interval=1e9)
    cfg, runs = anexagpt.TrainConfig(**settings, seed=1), {}
    device, dtype = anexagpt.select_device("cpu")
    display = SimpleNamespace(update=lambda: None, evaluation=lambda: None)
    for rate in (None, 2e-3, 4e-3, 8e-3):
        trainer, name = anexagpt.Trainer(config, cfg, corpus, device, dtype), "Muon"
        if rate:
            trainer.muon, name = AdamWForMatrices(trainer, rate), f"AdamW at {rate:g}"
        anexagpt.training_loop(trainer, display, None, lambda: False)
        runs[name] = [[step, round(loss, 4)] for step, _, loss in trainer.history]
        print(f"{name:<14} {runs[name][-1][1]:.4f}", flush=True)
    return runs


def baselines(corpus) -> dict:
    """Losses of count-based models on the validation part, in nats per character."""
    text = corpus.tokenizer.decode(corpus.ids)
    n, V = len(text) * 9 // 10, len(set(text))
    train, val = text[:n], text[n:]
    unigrams, bigrams, before = Counter(train), Counter(pairwise(train)), Counter(train[:-1])
    unigram = (math.log((n + V) / (unigrams[c] + 1)) for c in val[1:])
    bigram = (math.log((before[a] + V) / (bigrams[a, b] + 1)) for a, b in pairwise(val))
    losses = dict(uniform=math.log(V))
    losses |= dict(unigram=statistics.fmean(unigram), bigram=statistics.fmean(bigram))
    for name, loss in losses.items():
        bits, perplexity = loss / math.log(2), math.exp(loss)
        print(f"{name:<8} {loss:.2f} nats {bits:.2f} bits, perplexity {perplexity:.0f}")
    return losses


def model(path: Path) -> dict:
    """What a trained model computes; the gradient is that of the loss on six texts of its own."""
    gpt, prompt, text = anexagpt.load(path), "It was a ", "\nsaid Sherlock Holmes"
    network, tokenizer = gpt.network, gpt.tokenizer
    encode = lambda text: torch.from_numpy(tokenizer.encode(text).astype("i8"))  # noqa: E731
    logits = network(encode(prompt)[None])[0, -1].detach()  # (V,)
    logits[0] = -torch.inf  # U+FFFD is never sampled
    order = logits.argsort(descending=True)[:14]
    probs = {f"{t:g}": (logits / t).softmax(-1)[order].tolist() for t in (0.25, 0.5, 1, 2)}
    samples = {}
    for t in (0, 0.5, 0.8, 1, 1.5):
        samples[f"{t:g}"] = gpt.generate(prompt, temperature=t, max_new=150, seed=1)
        print(f"temperature {t}: {samples[f'{t:g}']!r}")
    heads = {}
    for head in HEADS:
        layer, number = map(int, head.split("."))
        weights = anexagpt.attention_weights(network, encode(text), layer - 1)[number - 1]
        heads[head] = [[round(w, 3) for w in row] for row in weights.tolist()]
    texts = ["\n" + gpt.generate(max_new=256, seed=seed) for seed in range(6)]
    batch = torch.stack([encode(text) for text in texts])  # (6, 257)
    anexagpt.cross_entropy(network(batch[:, :-1]), batch[:, 1:]).backward()
    grad = network.h[0].attn.c_proj.weight.grad
    matrices = grad / grad.norm(), anexagpt.newton_schulz(grad[None])[0]
    return dict(
        model=str(gpt.metadata),
        temperature=dict(prompt=prompt, next=tokenizer.decode(order), probs=probs),
        samples=samples,
        attention=dict(text=text, heads=heads),
        muon=[[round(s, 4) for s in torch.linalg.svdvals(m).tolist()] for m in matrices],
        chat=terminal(path, CHAT, seed=4, height=13),
        views=terminal(path, VIEWS, seed=3, height=25),
    )


def terminal(path: Path, lines: tuple, seed: int, height: int) -> str:
    """What a terminal shows of a chat, with its colour codes."""
    options = "--max-new", "150", "--seed", str(seed)
    command = sys.executable, HERE.parent / "anexagpt.py", "chat", path.name, *options
    colour = dict(FORCE_COLOR="1", COLORTERM="truecolor", TERM="xterm-256color")
    env = os.environ | colour | dict(COLUMNS="80", LINES=str(height))
    pipes = dict(input="\n".join(lines), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    run = subprocess.run(command, cwd=path.resolve().parent, env=env, encoding="utf-8", **pipes)
    parts = zip(run.stdout.split("Prompt: ")[1:], lines, strict=True)  # a pipe has no echo
    return run.stdout.split("Prompt: ")[0] + "".join(f"Prompt: {b}\n{a}" for a, b in parts)


# ---- drawing -------------------------------------------------------------------------------------
# A white background, so that a picture looks the same on light and on dark pages.

INK, GREY, FAINT, BLUE, RED = "#102030", "#555555", "#d8dee4", "#205080", "#b03020"
TONES = ("#9dbad6", "#5d8fbd", BLUE, RED)
BOLD, MONO = 'font-weight="bold"', 'font-family="Menlo, Consolas, monospace"'


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
        text = "\n".join([*self.lines, "</svg>\n"])
        (FOLDER / f"{name}.svg").write_text(text, encoding="utf-8", newline="\n")


def shown(c: str) -> str:
    return {" ": "␣", "\n": "↵"}.get(c, c)


def draw_curves(runs: dict) -> None:
    """Validation loss over the steps; where Muon reaches what AdamW at its best rate ends at."""
    picture, last = Picture(400, "Validation loss of Muon and of AdamW"), runs["Muon"][-1][0]
    x, y = lambda step: 70 + 490 * step / last, lambda loss: 340 - 310 * (loss - 1.5)
    picture.grid(70, 560, {loss: y(loss) for loss in (1.5, 1.7, 1.9, 2.1, 2.3, 2.5)})
    for step in range(0, last + 1, 250):
        picture.text(x(step), 362, f"{step:,}", GREY, "middle")
    picture.text(315, 386, "steps of 12 × 64 characters", GREY, "middle")
    picture.text(570, 20, "validation loss, nats/char", GREY)
    best = min(runs, key=lambda name: (name == "Muon", runs[name][-1][1]))
    goal = runs[best][-1][1]
    below = 0.0
    for name, history in sorted(runs.items(), key=lambda run: -run[1][-1][1]):
        colour = {"Muon": RED, best: BLUE}.get(name, TONES[1])
        points = [(x(step), y(loss)) for step, loss in history if loss < 2.5]
        picture.line(points, colour, 1 + 1.5 * (name in ("Muon", best)))
        below = max(points[-1][1] + 5, below + 16)  # labels do not overlap
        picture.text(570, below, f"{history[-1][1]:.3f}  {name}", colour)
    (a, high), (b, low) = next(p for p in pairwise(runs["Muon"]) if p[1][1] <= goal)
    reached = a + (b - a) * (high - goal) / (high - low)
    dashed = [(560, y(goal)), (x(reached), y(goal)), (x(reached), 340)]
    picture.line(dashed, GREY, 1, 'stroke-dasharray="4 4"')
    picture.text(x(reached) - 8, 330, f"Muon is there at step {reached:,.0f}", GREY, "end")
    picture.save("curves")


def draw_temperature(figures: dict) -> None:
    """Groups of bars: the likeliest characters at four temperatures."""
    picture = Picture(330, "Probabilities of the next character at four temperatures")
    picture.grid(60, 740, {f"{percent}%": 270 - 7 * percent for percent in (0, 10, 20, 30)})
    group = 680 / len(figures["next"])
    for i, c in enumerate(figures["next"]):
        picture.text(60 + group * (i + 0.5), 292, shown(c), INK, "middle", MONO)
        for j, row in enumerate(figures["probs"].values()):
            x, width, height = 66 + group * i + j * (group - 12) / 4, (group - 12) / 4, 700 * row[i]
            picture.box(x, 270 - height, width, height, TONES[j])
    picture.text(60, 320, f"next character after “{figures['prompt']}”, likeliest first", GREY)
    picture.text(330, 30, "temperature", anchor="end")
    for i, name in enumerate(figures["probs"]):
        picture.box(344 + 75 * i, 19, 14, 14, TONES[i])
        picture.text(363 + 75 * i, 31, name)
    picture.save("temperature")


def draw_attention(figures: dict) -> None:
    """Attention weights of two heads: a row for each query, a column for each key."""
    text, cell = figures["text"], 15
    size = cell * len(text)
    picture = Picture(90 + size, "Attention maps of two heads of a trained model")
    for x0, (name, caption) in zip((50, 425), HEADS.items(), strict=True):
        picture.text(x0, 26, "layer {}, head {}: ".format(*name.split(".")) + caption, extra=BOLD)
        picture.box(x0, 64, size, size, "#f5f8fb")
        for t, row in enumerate(figures["heads"][name]):
            picture.text(x0 - 8, 76 + cell * t, shown(text[t]), INK, "middle", MONO)
            picture.text(x0 + cell * (t + 0.5), 58, shown(text[t]), INK, "middle", MONO)
            for s, weight in enumerate(row):
                if weight >= 0.02:
                    picture.box(x0 + cell * s, 64 + cell * t, cell, cell, BLUE, weight)
    caption = "A row for each query, a column for each key; dark blue is a weight of 100%."
    picture.text(50, 82 + size, caption, GREY)
    picture.save("attention")


def draw_muon(figures: list) -> None:
    """Singular values of a gradient and of the update that Muon makes of it."""
    picture = Picture(230, "Singular values before and after orthogonalisation")
    titles = "gradient, divided by its norm", "update: the gradient, orthogonalised"
    for x0, title, values, colour in zip((60, 430), titles, figures, (BLUE, RED), strict=True):
        picture.text(x0, 30, title, extra=BOLD)
        picture.grid(x0, x0 + 300, {tick: 190 - 120 * tick for tick in (0, 0.5, 1)})
        for i, s in enumerate(values):
            bar = 300 / len(values)
            picture.box(x0 + bar * i, 190 - 120 * s, bar, 120 * s, colour)
        picture.text(x0, 214, f"all {len(values)} singular values, largest first", GREY)
    picture.save("muon")


def draw_screen(name: str, screen: str) -> None:
    options = dict(file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console = Console(record=True, width=80, **options)
    for line in AnsiDecoder().decode(screen):
        console.print(line)
    svg = console.export_svg(title="python anexagpt.py chat", unique_id=name)
    (FOLDER / f"{name}.svg").write_text(svg + "\n", encoding="utf-8", newline="\n")


def draw(figures: dict) -> None:
    draw_curves(figures["curves"])
    draw_temperature(figures["model"]["temperature"])
    draw_attention(figures["model"]["attention"])
    draw_muon(figures["model"]["muon"])
    draw_screen("chat", figures["model"]["chat"])
    draw_screen("views", figures["model"]["views"])


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("what", nargs="?", choices=("model", "curves", "baselines"))
    parser.add_argument("--model", type=Path, default=Path(anexagpt.MODEL))
    parser.add_argument("--data")
    args = parser.parse_args()
    figures = json.loads(FIGURES.read_text(encoding="utf-8"))
    if args.what == "model":
        figures["model"] = model(args.model)
    elif args.what:
        data = args.data or ("sherlock" if args.what == "baselines" else "shakespeare")
        measure = dict(curves=curves, baselines=baselines)[args.what]
        figures[args.what] = measure(anexagpt.load_corpus([data]))
    lines = [f'"{name}": {json.dumps(v, ensure_ascii=False)}' for name, v in figures.items()]
    FIGURES.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8", newline="\n")
    draw(figures)


if __name__ == "__main__":
    main()
