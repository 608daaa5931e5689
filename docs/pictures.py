"""The pictures of these pages: measured by real runs, kept as figures, drawn as SVG.

    python docs/pictures.py                                    draws all pictures from pictures/figures.json
    python docs/pictures.py curves --text tinyshakespeare.txt  trains with Muon, then with AdamW at five rates (minutes)
    python docs/pictures.py step --text tinyshakespeare.txt    times the parts of a training step
    python docs/pictures.py guessers --text sherlock.txt       how well simple rules guess the next character
    python docs/pictures.py model --model model.safetensors    looks into a trained model: attention, temperature, a
                                                               gradient before and after Muon, a talk, the views

Every measurement replaces its entry in pictures/figures.json and draws again. Without --text it takes the text that
anexagpt.py knows as shakespeare or, for the guessers, as sherlock.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from html import escape
from itertools import pairwise
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import torch
from rich.ansi import AnsiDecoder
from rich.console import Console

import anexagpt as anexa

FOLDER = HERE / "pictures"
FIGURES = FOLDER / "figures.json"
SHAPE = dict(n_layer=4, n_head=4, n_embd=128)  # the default network
HEADS = {"1.1": "the character before", "2.4": "where words and lines begin"}  # shown, with what one sees
TALK = ("Sherlock", "/probs It was a ", "/set temperature 0.5", "/regen", "/why", "quit")


# ---- runs ------------------------------------------------------------------------------------------------------------


class Recipe:
    """The default optimizer: embeddings, LayerNorms, biases to AdamW, matrices to Muon or, at a rate, to AdamW, too."""

    def __init__(self, model: anexa.GPT, cfg: anexa.TrainConfig, dtype: torch.dtype, adamw: float | None):
        matrices = [p for p in model.h.parameters() if p.dim() == 2]
        others = [p for p in model.parameters() if not any(p is m for m in matrices)]
        groups = [dict(params=others, peak=cfg.learning_rate, weight_decay=0.0)]
        if adamw is not None:
            groups.append(dict(params=matrices, peak=adamw, weight_decay=cfg.weight_decay))
        self.adamw = torch.optim.AdamW(groups, betas=(0.9, 0.99), fused=True)
        self.muon = anexa.Muon([] if adamw else matrices, cfg.muon_learning_rate, cfg.weight_decay, dtype)

    def step(self, rate: float) -> None:
        for group in self.adamw.param_groups:
            group["lr"] = group["peak"] * rate
        self.adamw.step()
        self.muon.step(torch.tensor([rate]))


def training(text: str, adamw: float | None, cfg: anexa.TrainConfig, block_size: int) -> list:
    """History of a training on the CPU, [step, validation loss] every 100 steps; adamw as in Recipe."""
    tokenizer, (_, dtype) = anexa.Tokenizer.of(text), anexa.choose_device(anexa.DeviceConfig(device="cpu"))
    ids, examined = anexa.split(tokenizer.encode(text))
    torch.manual_seed(cfg.seed)
    model = anexa.GPT(anexa.GPTConfig(vocab_size=len(tokenizer), block_size=block_size, **SHAPE))
    optimizer = Recipe(model, cfg, dtype, adamw)
    starts = anexa.window_starts(0, cfg.max_steps, cfg.batch_size, len(ids), block_size, cfg.seed)
    window, history = torch.arange(block_size + 1), []
    for step in range(cfg.max_steps):
        batch = ids[starts[step][:, None] + window].long()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = model(batch[:, :-1])
        anexa.loss_of(logits, batch[:, 1:]).backward()
        optimizer.step(anexa.learning_rate(step, cfg))
        model.zero_grad()
        if (step + 1) % 100 == 0:
            history.append([step + 1, round(anexa.evaluate(model, examined, dtype)[0], 4)])
    return history


def curves(text: str) -> dict:
    """Validation losses with the matrices moved by Muon, and by AdamW at five rates."""
    cfg = anexa.TrainConfig(max_steps=2000, batch_size=12, seed=1)
    runs = {}
    for rate in (None, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3):
        name = "Muon" if rate is None else f"AdamW {rate:g}"
        runs[name] = training(text, rate, cfg, 64)
        print(f"{name:<12} {runs[name][-1][1]:.4f}", flush=True)
    return runs


def guessers(text: str) -> dict:
    """Losses in nats per character, on the last tenth of a text, of three rules that learnt from the rest."""
    n = len(text) * 9 // 10
    learnt, examined, V = text[:n], text[n:], len(set(text))
    ones, pairs, before = Counter(learnt), Counter(pairwise(learnt)), Counter(learnt[:-1])
    uniform = math.log(V)
    single = -statistics.fmean(math.log((ones[c] + 1) / (n + V)) for c in examined[1:])
    double = -statistics.fmean(math.log((pairs[a, b] + 1) / (before[a] + V)) for a, b in pairwise(examined))
    found = {"all characters alike": uniform, "how often each occurs": single, "after the one before": double}
    for name, loss in found.items():
        print(f"{name:<22} {loss:.2f} nats {loss / math.log(2):.2f} bits, as between {math.exp(loss):.0f}")
    return found


def timed(spent: Counter, name: str, function: Callable) -> Callable:
    """`function`, whose seconds of processor time, which other programs do not disturb, are added to spent[name]."""

    def wrapper(*arguments, **options):
        start = time.process_time()
        result = function(*arguments, **options)
        spent[name] += time.process_time() - start
        return result

    return wrapper


def step(text: str) -> dict:
    """Milliseconds of the parts of a step of 12 x 64 characters on one core, median of the quickest quarter of 200."""
    torch.set_num_threads(1)
    tokenizer, (device, dtype) = anexa.Tokenizer.of(text), anexa.choose_device(anexa.DeviceConfig(device="cpu"))
    config = anexa.GPTConfig(vocab_size=len(tokenizer), block_size=64, dropout=0.0, **SHAPE)
    trainer = anexa.Trainer(config, anexa.TrainConfig(batch_size=12), tokenizer.encode(text), device, dtype)
    model, spent = trainer.model, Counter()
    for name, modules in {
        "LayerNorms": [m for m in model.modules() if isinstance(m, torch.nn.LayerNorm)],
        "attention": [block.attn for block in model.h],
        "MLP": [block.mlp for block in model.h],
        "forward": [model],
    }.items():
        for module in modules:
            module.forward = timed(spent, name, module.forward)
    trainer.adamw.step = timed(spent, "AdamW", trainer.adamw.step)
    trainer.muon.step = timed(spent, "Muon", trainer.muon.step)
    backward, torch.Tensor.backward = torch.Tensor.backward, timed(spent, "backward", torch.Tensor.backward)
    rows = []
    for _ in range(200):
        spent.clear()
        timed(spent, "step", trainer.update)()
        rows.append(dict(spent))
    torch.Tensor.backward = backward
    quick = sorted(rows, key=lambda row: row["step"])[: len(rows) // 4]
    median = {name: statistics.median(row[name] for row in quick) * 1e3 for name in rows[0]}
    whole, forward = median.pop("step"), median.pop("forward")
    parts = {f"forward: {name}": median.pop(name) for name in ("attention", "MLP", "LayerNorms")}
    parts["forward: embeddings, output"] = forward - sum(parts.values())
    parts |= {"backward": median["backward"], "Muon": median["Muon"], "AdamW": median["AdamW"]}
    parts["windows, loss, rest"] = whole - sum(parts.values())
    for name, ms in (parts | {"step": whole}).items():
        print(f"{name:<28} {ms:6.2f} ms {ms / whole:6.1%}")
    return dict(machine=machine(dtype), parts={name: round(ms, 2) for name, ms in parts.items()})


def machine(dtype: torch.dtype) -> str:
    return f"PyTorch {torch.__version__.split('+')[0]}, {str(dtype)[6:]}, threads: {torch.get_num_threads()}"


def model(path: Path) -> dict:
    """What a trained model does: chances, attention, and one gradient of the loss on the start of its own writing."""
    gpt, tokenizer, story = anexa.load_model(path, torch.device("cpu"))
    prompt = "It was a "
    ids = tokenizer.encode(prompt)
    logits = anexa.predictions(gpt, ids, len(ids)).numpy()
    logits[:, 0] = -torch.inf
    chances = {}
    for temperature in (0.25, 0.5, 1.0, 2.0):
        cfg = anexa.SampleConfig(temperature=temperature)
        chances[f"{temperature:g}"] = [round(p, 4) for p in anexa.softmax(anexa.adjust(logits, cfg)[0]).tolist()]
    order = sorted(range(len(tokenizer)), key=lambda i: -chances["1"][i])[:14]
    temperatures = dict(prompt=prompt, next=[tokenizer.characters[i] for i in order])
    temperatures["chances"] = {name: [p[i] for i in order] for name, p in chances.items()}
    samples = {}
    for temperature in (0.0, 0.5, 0.8, 1.0, 1.5):
        cfg = anexa.SampleConfig(temperature=temperature, max_new=150)
        pieces = anexa.write(gpt, tokenizer, prompt, cfg, anexa.random_source(1))
        samples[f"{temperature:g}"] = prompt + "".join(piece for (piece,) in pieces)
        print(f"temperature {temperature}: {samples[f'{temperature:g}']!r}")

    text = "said Sherlock Holmes"
    kept: list = []
    with torch.no_grad():
        gpt(tokenizer.encode("\n" + text)[None].long(), kept)
    T, H, heads = len(text) + 1, gpt.config.n_head, {}
    for layer, (q, k, _) in enumerate(kept, start=1):
        weights = anexa.attention(q, k, torch.eye(T).expand(1, H, T, T))[0]  # (H, T, T)
        heads |= {f"{layer}.{head + 1}": weights[head] for head in range(H)}
    maps = {name: [[round(w, 3) for w in row] for row in head.tolist()] for name, head in heads.items()}
    attention = dict(text="\n" + text, heads=maps)

    own = anexa.write(gpt, tokenizer, "\n", anexa.SampleConfig(max_new=257), anexa.random_source(1), batch=6)
    written = torch.stack([tokenizer.encode("".join(pieces))[:257].long() for pieces in zip(*own, strict=True)])
    anexa.loss_of(gpt(written[:, :-1]), written[:, 1:]).backward()
    weight = gpt.h[0].attn.c_proj.weight
    both = weight.grad / weight.grad.norm(), anexa.orthogonalise(weight.grad[None])[0]
    values = [[round(value, 5) for value in torch.linalg.svdvals(m).tolist()] for m in both]
    corner = [[[round(x, 3) for x in row] for row in (m / m.abs().max())[:18, :18].tolist()] for m in both]
    muon = dict(matrix="h.0.attn.c_proj", shape=list(weight.shape), values=values, corner=corner)
    found = dict(about=str(story), temperatures=temperatures, samples=samples, attention=attention, muon=muon)
    return found | dict(talk=talk(gpt, tokenizer, story), views=views(gpt, tokenizer))


def talk(gpt: anexa.GPT, tokenizer: anexa.Tokenizer, story: anexa.Story) -> str:
    """A session as the terminal shows it, with its colour codes; the seed makes it repeatable."""
    screen = io.StringIO()
    with redirect_stdout(screen), redirect_stderr(screen):
        print(f"model.safetensors: {story}\n\n--- Interactive Generation ---")
        print("Enter a prompt to continue (or 'quit' to exit)")
        session = anexa.Session(gpt, tokenizer, story, anexa.SampleConfig(max_new=150, seed=5))
        session.console = Console(file=screen, width=80, height=13, force_terminal=True, color_system="truecolor")
        for line in TALK:
            print(f"Prompt: {line}")
            session.respond(line)
    return screen.getvalue()


def views(gpt: anexa.GPT, tokenizer: anexa.Tokenizer) -> str:
    """The views of a prompt and its answer, one after another."""
    screen = io.StringIO()
    console = Console(file=screen, width=80, force_terminal=True, color_system="truecolor")
    cfg, prompt = anexa.SampleConfig(top_k=5, max_new=150), "Sherlock Holmes"
    answer = "".join(piece for (piece,) in anexa.write(gpt, tokenizer, prompt, cfg, anexa.random_source(3)))
    for command, view, *subject in (
        ("/probs Sherlock", anexa.probs_view, gpt, tokenizer, "Sherlock", cfg),
        ("/why", anexa.why_view, gpt, tokenizer, prompt, answer),
        ("/attn 2 1", anexa.attn_view, gpt, tokenizer, prompt, 2, 1),
    ):
        print(f"Prompt: {command}", file=screen)
        anexa.look(console, view, *subject)
    return screen.getvalue()


# ---- drawing ---------------------------------------------------------------------------------------------------------
# SVG is text: a picture is a list of lines. A white card, so that it looks the same on light and dark pages.

INK, GREY, FAINT, BLUE, RED, PALE = "#102030", "#555555", "#d8dee4", "#205080", "#b03020", "#eaf2fa"
TONES = ("#9dbad6", "#5d8fbd", "#205080", "#b03020")


def number(x: float) -> str:
    return f"{x:.1f}".removesuffix(".0")


class Picture:
    """A picture of a width and a height, with the marks that are drawn on it."""

    def __init__(self, width: int, height: int, title: str):
        self.lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
            ' font-family="Helvetica, Arial, sans-serif" font-size="15">',
            f"  <title>{escape(title)}</title>",
            f'  <rect width="{width}" height="{height}" rx="8" fill="#ffffff"/>',
        ]

    def text(self, x, y, text, colour=INK, size=15, anchor="start", bold=False, mono=False, turn=0) -> None:
        extra = ' font-weight="bold"' * bold + ' font-family="Menlo, Consolas, monospace"' * mono
        extra += f' transform="rotate({turn} {number(x)} {number(y)})"' if turn else ""
        self.lines.append(
            f'  <text x="{number(x)}" y="{number(y)}" fill="{colour}" font-size="{size}" text-anchor="{anchor}"{extra}>'
            f"{escape(text)}</text>"
        )

    def box(self, x, y, width, height, colour, opacity=1.0) -> None:
        faded = f' fill-opacity="{opacity:.2f}"' if opacity < 1 else ""
        size = f'width="{number(width)}" height="{number(height)}"'
        self.lines.append(f'  <rect x="{number(x)}" y="{number(y)}" {size} fill="{colour}"{faded}/>')

    def line(self, points: list, colour=GREY, width=1.5, dash="") -> None:
        path = "M" + " L".join(f"{number(x)} {number(y)}" for x, y in points)
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        self.lines.append(f'  <path d="{path}" stroke="{colour}" stroke-width="{width}" fill="none"{dashes}/>')

    def save(self, name: str) -> None:
        (FOLDER / f"{name}.svg").write_text("\n".join([*self.lines, "</svg>\n"]), encoding="utf-8", newline="\n")


def glyph(c: str) -> str:
    return {" ": "␣", "\n": "↵"}.get(c, c)


def draw_curves(runs: dict) -> None:
    """Validation loss over the steps: Muon, and AdamW at its best rate; the other rates faint."""
    picture = Picture(760, 400, "Validation loss of Muon and of AdamW over 2,000 steps")
    left, right, top, bottom, low, high = 70, 560, 30, 340, 1.5, 2.5
    last = runs["Muon"][-1][0]
    place = lambda step, loss: (  # noqa: E731
        left + (right - left) * step / last,
        bottom - (bottom - top) * (min(loss, high) - low) / (high - low),
    )
    for tenth in range(15, 26, 2):
        y = place(0, tenth / 10)[1]
        picture.line([(left, y), (right, y)], FAINT, 1)
        picture.text(left - 10, y + 5, f"{tenth / 10:.1f}", GREY, 13, "end")
    for step in range(0, last + 1, 500):
        picture.text(place(step, 0)[0], bottom + 22, f"{step:,}", GREY, 13, "middle")
    picture.text((left + right) / 2, bottom + 46, "steps of 12 × 64 characters", GREY, 13, "middle")
    picture.text(20, (top + bottom) / 2, "validation loss, nats/char", GREY, 13, "middle", turn=-90)
    best = min((name for name in runs if name != "Muon"), key=lambda name: runs[name][-1][1])
    for name, history in runs.items():
        points = [place(*row) for row in history if row[1] < high]
        if name not in ("Muon", best):
            picture.line(points, "#9dbad6", 1)
    for name, colour in ((best, BLUE), ("Muon", RED)):
        history = runs[name]
        picture.line([place(*row) for row in history if row[1] < high], colour, 2.5)
        label = f"AdamW at {name[6:]}" if name == best else "Muon"
        picture.text(right + 10, place(*history[-1])[1] + 5, f"{history[-1][1]:.3f}  {label}", colour, 14)
    reached = next(step for step, loss in runs["Muon"] if loss <= runs[best][-1][1])
    y = place(0, runs[best][-1][1])[1]
    x = place(reached, 0)[0]
    picture.line([(right, y), (x, y), (x, bottom)], GREY, 1, "4 4")
    picture.text(x - 8, bottom - 10, f"Muon is there at step {reached:,}", GREY, 13, "end")
    picture.text(right + 10, top + 12, "thin: AdamW at", "#5d8fbd", 13)
    others = [name[6:] for name in runs if name not in ("Muon", best)]
    picture.text(right + 10, top + 30, ", ".join(others), "#5d8fbd", 13)
    picture.save("curves")


def draw_step(measured: dict) -> None:
    """One bar for each part of a training step."""
    parts = measured["parts"]
    whole = sum(parts.values())
    picture = Picture(760, 60 + 32 * len(parts), "Where the time of a training step goes")
    picture.text(20, 30, f"One training step of 12 × 64 characters on one core: {whole:.0f} ms", INK, 15, bold=True)
    for i, (name, ms) in enumerate(parts.items()):
        y = 48 + 32 * i
        picture.text(225, y + 17, name, INK, 14, "end")
        width = 400 * ms / max(parts.values())
        picture.box(235, y, width, 24, RED if name == "Muon" else "#5d8fbd" if name == "AdamW" else BLUE)
        picture.text(243 + width, y + 17, f"{ms:.1f} ms, {ms / whole:.0%}", GREY, 13)
    picture.save("step")


def draw_temperature(measured: dict) -> None:
    """The chances of the likeliest characters at four temperatures, as groups of bars."""
    chances, count = measured["chances"], len(measured["next"])
    picture = Picture(760, 330, "What the temperature does to the chances of the next character")
    left, bottom, height = 60, 270, 210
    wide = (740 - left) / count
    for percent in range(0, 61, 20):
        y = bottom - height * percent / 60
        picture.line([(left, y), (740, y)], FAINT, 1)
        picture.text(left - 8, y + 5, f"{percent}%", GREY, 13, "end")
    for i, c in enumerate(measured["next"]):
        for j, shares in enumerate(chances.values()):
            bar = height * shares[i] / 0.6
            picture.box(left + wide * i + 6 + j * (wide - 12) / 4, bottom - bar, (wide - 12) / 4, bar, TONES[j])
        picture.text(left + wide * (i + 0.5), bottom + 22, glyph(c), INK, 16, "middle", mono=True)
    picture.text(left, 320, f"the next character after “{measured['prompt']}”, likeliest first", GREY, 13)
    x = 330
    picture.text(x, 30, "temperature", INK, 14, "end")
    for colour, name in zip(TONES, chances, strict=True):
        picture.box(x + 14, 19, 14, 14, colour)
        picture.text(x + 33, 31, name, INK, 14)
        x += 75
    picture.save("temperature")


def draw_attention(measured: dict) -> None:
    """Two heads of a trained model as maps: a row looks at the columns."""
    text, heads, cell, T = measured["text"], measured["heads"], 15, len(measured["text"])
    picture = Picture(760, 90 + cell * T, "Attention maps of two heads of a trained model")
    for side, (name, caption) in enumerate(HEADS.items()):
        layer, head = name.split(".")
        x0, y0 = 50 + 375 * side, 64
        picture.text(x0, 26, f"layer {layer}, head {head}: {caption}", INK, 14, bold=True)
        picture.box(x0, y0, cell * T, cell * T, "#f5f8fb")
        for t, row in enumerate(heads[name]):
            picture.text(x0 - 8, y0 + cell * t + 12, glyph(text[t]), INK, 13, "middle", mono=True)
            picture.text(x0 + cell * (t + 0.5), y0 - 6, glyph(text[t]), INK, 13, "middle", mono=True)
            for s, weight in enumerate(row[: t + 1]):
                if weight >= 0.02:
                    picture.box(x0 + cell * s, y0 + cell * t, cell, cell, BLUE, weight)
    picture.text(
        50, 82 + cell * T, "Each row is a character, its columns those that it looks at; dark blue is 100%.", GREY, 13
    )
    picture.save("attention")


def draw_muon(measured: dict) -> None:
    """A gradient and what Muon makes of it: a corner of the matrix, and all of its singular values."""
    picture = Picture(760, 400, "A gradient before and after orthogonalisation")
    for side, (values, corner) in enumerate(zip(measured["values"], measured["corner"], strict=True)):
        x0, y0, cell = 60 + 380 * side, 50, 8
        picture.text(x0, 30, ("the gradient", "the update, orthogonalised")[side], INK, 15, bold=True)
        for i, row in enumerate(corner):
            for j, x in enumerate(row):
                if abs(x) >= 0.03:
                    picture.box(x0 + cell * j, y0 + cell * i, cell, cell, RED if x > 0 else BLUE, min(1, 1.6 * abs(x)))
        picture.line([(x0, y0), (x0 + 144, y0), (x0 + 144, y0 + 144), (x0, y0 + 144), (x0, y0)], FAINT, 1)
        picture.text(x0 + 156, y0 + 60, "18 × 18 of its", GREY, 13)
        picture.text(x0 + 156, y0 + 78, "{} × {} numbers".format(*measured["shape"]), GREY, 13)
        bottom, height, wide = 350, 110, 300
        for tick in (0, 0.5, 1):
            y = bottom - height * tick / 1.25
            picture.line([(x0, y), (x0 + wide, y)], FAINT, 1)
            picture.text(x0 - 8, y + 5, f"{tick:g}", GREY, 13, "end")
        for i, value in enumerate(values):
            bar = height * value / 1.25
            picture.box(x0 + wide * i / len(values), bottom - bar, wide / len(values), bar, (BLUE, RED)[side])
        picture.text(x0, bottom + 24, f"its {len(values)} singular values", GREY, 13)
    picture.save("muon")


def draw_screen(name: str, title: str, screen: str) -> None:
    """What a terminal showed."""
    console = Console(record=True, width=80, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    for line in AnsiDecoder().decode(screen):
        console.print(line)
    svg = console.export_svg(title=title, unique_id=name)
    (FOLDER / f"{name}.svg").write_text(svg + "\n", encoding="utf-8", newline="\n")


def draw(figures: dict) -> None:
    """Write every picture whose figures are there."""
    drawers = dict(curves=draw_curves, step=draw_step)
    for name, drawer in drawers.items():
        if name in figures:
            drawer(figures[name])
    if "model" in figures:
        draw_temperature(figures["model"]["temperatures"])
        draw_attention(figures["model"]["attention"])
        draw_muon(figures["model"]["muon"])
        draw_screen("chat", "python anexagpt.py chat", figures["model"]["talk"])
        draw_screen("views", "python anexagpt.py chat", figures["model"]["views"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measure", nargs="?", choices=("curves", "step", "guessers", "model"))
    parser.add_argument("--text", help="a text (default: shakespeare; guessers: sherlock)")
    parser.add_argument("--model", type=Path, default=Path("model.safetensors"), help="a trained model")
    options = parser.parse_args()
    figures = {}
    if options.measure == "model":
        figures["model"] = model(options.model)
    elif options.measure:
        corpus = anexa.load_corpus(options.text or ("sherlock" if options.measure == "guessers" else "shakespeare"))
        text = corpus.tokenizer.decode(corpus.ids)
        figures[options.measure] = dict(curves=curves, step=step, guessers=guessers)[options.measure](text)
    if FIGURES.exists():
        figures = json.loads(FIGURES.read_text(encoding="utf-8")) | figures
    if options.measure:
        lines = ",\n".join(f'"{name}": {json.dumps(figures[name], ensure_ascii=False)}' for name in sorted(figures))
        FIGURES.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8", newline="\n")
    draw(figures)


if __name__ == "__main__":
    main()
