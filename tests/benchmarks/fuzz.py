"""Give the readers of Anexa's files what nobody should: each case is refused in one line, or read as what it is.

    python tests/benchmarks/fuzz.py --cases 10000

Readers: model files (`load_model` and `open_file`), checkpoints, docs/old_architecture.py's own reader, and the talks
that /load reads. A case starts from a good file and is spoilt: cut, bits and bytes turned, parts doubled or dropped, a
header of a huge or a wrong length, entries of the header replaced by absurd ones, tensors of other shapes, places and
number formats, weights that are no numbers. A case fails if there is any exception but UserError, an error of more than
one line or with control characters, more than a second, more memory than a small multiple of the file, or a model that
is accepted and does not then write.
"""

import argparse
import contextlib
import copy
import importlib.util
import io
import itertools
import json
import random
import struct
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
import anexagpt  # noqa: E402

spec = importlib.util.spec_from_file_location("old_architecture", ROOT / "docs" / "old_architecture.py")
old = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(old)

CPU = torch.device("cpu")
TEXT = "the cat saw a dog.\n" * 40
SETTINGS = "--n-layer 2 --n-head 2 --n-embd 4 --block-size 8 --batch-size 2 --max-steps 6 --eval-interval 2"
SETTINGS += " --device cpu --dtype float32"
DEEP = ["[" * 20_000 + "]" * 20_000, '{"a":' * 20_000 + "1" + "}" * 20_000]
NUMBERS = [0, 1, -1, 2, 3, 7, 1000, 1001, 10**6, 2**31, 2**53, 2**63, 2**64, -(2**63), 10**400, 0.5, 1e308, -0.0]
NUMBERS += [float("nan"), float("inf"), -float("inf"), True, None]
TEXTS = [
    "",
    "\0",
    "\x1b]0;x\x07",
    "\x1b[2J",
    "\u202e",
    "\ud800",
    "\ufffd",
    "\U000e0041",
    "x" * 5000,
    "/dev/zero",
    "a\nb",
]
TEXTS += ["http://127.0.0.1:9/", "1e999", "NaN", "h.0.ln_1.weight", "__metadata__", "F32"]
DTYPES = ["F64", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "C64", "F4", "f32", "", "F32 "]


class Fault(Exception):
    """What a case has found."""


def good_files(folder: Path) -> dict[str, bytes]:
    """A model, an exported one, a checkpoint and a talk, as the program writes them."""
    text, out = folder / "text.txt", folder / "model.safetensors"
    text.write_text(TEXT)
    options = ["train", "--data", str(text), "--out", str(out), *SETTINGS.split(), "--quiet"]
    with contextlib.redirect_stderr(io.StringIO()):
        anexagpt.train(anexagpt.parse_options(options))
        parsed = anexagpt.parse_options([*options, "--seed", "2"])
        trainer, _, _ = anexagpt.prepare_training(parsed, None, CPU, torch.float32, anexagpt.World())
        for step in range(4):
            trainer.update()
            if step % 2:
                trainer.evaluate()
        session = anexagpt.Session(*anexagpt.load_model(out, CPU), anexagpt.SampleConfig(max_new=5))
        with contextlib.redirect_stdout(io.StringIO()):
            session.respond("the cat")
            session.respond("/set stop dog")
            session.respond(f"/save {folder / 'talk.json'}")
    story = anexagpt.open_file(out)[0]
    told = dict(training=story.training | dict(seed=2), step=trainer.step, history=trainer.history)
    told = anexagpt.replace(story, validation_loss=trainer.best_loss, **told)
    anexagpt.save_file(folder / "checkpoint.safetensors", trainer.state(), told)
    exported = anexagpt.hub_files(*anexagpt.load_model(out, CPU), "x", "mit")["model.safetensors"]
    good = dict(model=out.read_bytes(), exported=exported, talk=(folder / "talk.json").read_bytes())
    return good | dict(checkpoint=(folder / "checkpoint.safetensors").read_bytes())


# ---- what spoils a file ----------------------------------------------------------------------------------------------


def spoil_bytes(content: bytes, draw: random.Random) -> bytes:
    """Cut, turned, doubled, dropped or filled somewhere; the header more often than the rest."""
    spoilt, n = bytearray(content), len(content)
    for _ in range(draw.choice((1, 1, 1, 2, 5, 30))):
        at = draw.randrange(draw.choice((9, 200, 2000, n))) % max(1, len(spoilt))
        size = draw.choice((1, 1, 2, 8, 100, 1000))
        how = draw.randrange(8)
        if how == 0:
            del spoilt[at:]
        elif how == 1:
            spoilt[at] ^= 1 << draw.randrange(8)
        elif how == 2:
            spoilt[at : at + size] = draw.randbytes(size)
        elif how == 3:
            del spoilt[at : at + size]
        elif how == 4:
            spoilt[at:at] = spoilt[at : at + size]
        elif how == 5:
            spoilt[at : at + size] = bytes([draw.randrange(256)]) * size
        elif how == 6:
            spoilt[:8] = struct.pack("<Q", draw.choice((0, 1, 2, n, n - 8, 10**8, 2**32, 2**63, 2**64 - 1, at)))
        else:
            spoilt += draw.randbytes(size)
        if not spoilt:
            break
    return bytes(spoilt)


def absurd(value, draw: random.Random):
    """Another value in place of one of a JSON document: sometimes like it, mostly absurd."""
    how = draw.randrange(10)
    if how < 3:
        return draw.choice(NUMBERS)
    if how < 5:
        return draw.choice(TEXTS)
    if how == 5 and isinstance(value, int | float) and value == value:
        return value + draw.choice((-1, 1, 0.5, 1000))
    if how == 6 and isinstance(value, str) and value:
        at = draw.randrange(len(value))
        return value[:at] + draw.choice([*TEXTS, value[at], value[-1]]) + value[at + draw.randrange(2) :]
    if how == 7 and isinstance(value, list):
        return draw.choice((value + value, value[:-1], value[::-1], [value], value * 100))
    return draw.choice(([], {}, [[]], {"a": 1}, [1, 2, 3], "", None))


def spoil_json(document, draw: random.Random):
    """A document with one value, somewhere, replaced, dropped or added."""
    document = copy.deepcopy(document)
    place, key = None, None
    inner = document
    while isinstance(inner, dict | list) and inner and (place is None or draw.random() < 0.8):
        place, key = inner, draw.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
        inner = place[key]
    if place is None:
        return absurd(document, draw)
    how = draw.randrange(8)
    if how == 0:
        del place[key]
    elif how == 1 and isinstance(place, dict):
        place[draw.choice(TEXTS)] = place.pop(key)
    elif how == 2 and isinstance(place, dict):
        place[draw.choice([*TEXTS, "more"])] = absurd(inner, draw)
    else:
        place[key] = absurd(inner, draw)
    return document


def spoil_header(content: bytes, draw: random.Random) -> bytes:
    """The same with the header of a safetensors file, the JSON inside its JSON included, or with the numbers."""
    n = 8 + int.from_bytes(content[:8], "little")
    header, numbers = json.loads(content[8:n]), bytearray(content[n:])
    for _ in range(draw.choice((1, 1, 2, 4))):
        how, metadata = draw.randrange(10), header.get("__metadata__")
        names = [name for name in header if name != "__metadata__" and isinstance(header[name], dict)]
        if how < 5 and isinstance(metadata, dict) and metadata:
            entry = draw.choice(list(metadata))
            try:
                told = spoil_json(json.loads(metadata[entry]), draw)
            except (TypeError, ValueError, RecursionError):
                told = draw.choice(NUMBERS)
            metadata[entry] = told if draw.random() < 0.2 else json.dumps(told, ensure_ascii=draw.random() < 0.7)
            if draw.random() < 0.05:
                metadata[entry] = draw.choice((*DEEP, "9" * 5000, "1e400", "[1,", "nul"))
        elif how < 8 and names:
            entry = header[draw.choice(names)]
            kind = draw.randrange(5)
            if kind == 0:
                entry["dtype"] = draw.choice(DTYPES)
            elif kind == 1:
                shapes = [], [0], [-1], [2**63, 2**63], [2**32, 2**32]
                entry["shape"] = draw.choice((*shapes, *itertools.permutations(entry.get("shape") or [])))
            elif kind == 2:
                entry["data_offsets"] = [draw.choice((0, 4, 64, 256, -8, 2**64 - 4, 2**64, 10**12)) for _ in range(2)]
            elif kind == 3:
                other = header[draw.choice(names)]
                header[draw.choice(names)] = copy.deepcopy(other)  # two in one place
            else:
                header[draw.choice(TEXTS)] = header.pop(draw.choice(names))
        elif how == 8:
            for _ in range(draw.choice((1, 1, 3))):
                at = draw.randrange(max(1, len(numbers) // 4)) * 4
                value = draw.choice((float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 1e-45, 1e20))
                numbers[at : at + 4] = struct.pack("<f", value)
        else:
            header = spoil_json(header, draw)
        if not isinstance(header, dict):
            break
    text = json.dumps(header, ensure_ascii=draw.random() < 0.8).encode(errors="surrogatepass")
    if draw.random() < 0.03:
        text = text[:-1] + b" " * draw.choice((1, 100_000)) + b"}"
    if draw.random() < 0.05:
        text = b"{" + text[1:-1] + b"," + text[1:]  # every key twice
    return struct.pack("<Q", len(text)) + text + bytes(numbers)


def spoil_talk(content: bytes, draw: random.Random) -> bytes:
    talk = json.loads(content)
    for _ in range(draw.choice((1, 1, 3))):
        talk = spoil_json(talk, draw)
    text = json.dumps(talk, ensure_ascii=draw.random() < 0.5).encode(errors="surrogatepass")
    return draw.choice(DEEP).encode() if draw.random() < 0.02 else text


def layers(n: int) -> bytes:
    """A model of n layers of one channel: 12 n + 4 tensors, nearly all of the file being its header."""
    config = dict(vocab_size=2, block_size=2, n_layer=n, n_head=1, n_embd=1, dropout=0.0)
    facts = dict(data=dict(name="x", sha256="x", characters=1), training={}, step=1, validation_loss=1.0, history=[])
    told = {k: json.dumps(v) for k, v in (facts | dict(config=config, characters="\ufffda")).items()}
    header, at = {"__metadata__": {"format": "pt", "format_version": "1"} | told}, 0
    for name, shape in old.shapes(old.GPTConfig(2, 2, min(n, 128), 1, 1)).items():
        size = 4 * (shape[0] * shape[1] if len(shape) == 2 else shape[0])
        header[name] = dict(dtype="F32", shape=shape, data_offsets=(at, at + size))
        at += size
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"\0" * at


# ---- what must not happen --------------------------------------------------------------------------------------------


def use_model(path: Path, trainer) -> None:
    with contextlib.suppress(anexagpt.UserError):
        str(anexagpt.open_file(path)[0])
    model, tokenizer, story = anexagpt.load_model(path, CPU)
    if any(not bool(weight.isfinite().all()) for weight in model.parameters()):
        raise Fault("a weight is not a number")
    cfg = anexagpt.SampleConfig(max_new=3)
    text = "".join(piece for (piece,) in anexagpt.write(model, tokenizer, "\n", cfg, anexagpt.random_source(1)))
    shown = anexagpt.printable(f"{story} {text} {story.training}")
    if any((ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160 for c in shown):
        raise Fault(f"{shown!r} would steer a terminal")
    anexagpt.loss_chart(story.history)


def use_checkpoint(path: Path, trainer) -> None:
    """As `train` continues it."""
    story, _ = anexagpt.open_file(path)
    try:
        trainer.restore(anexagpt.safetensors.torch.load_file(path), story)
    except (KeyError, RuntimeError, TypeError, ValueError, anexagpt.safetensors.SafetensorError) as error:
        raise anexagpt.UserError(anexagpt.printable(str(error)).splitlines()[0]) from None
    if trainer.step < trainer.cfg.max_steps:
        trainer.update()
        trainer.evaluate()


def use_old(path: Path, trainer) -> None:
    model = old.load_model(path)
    if len(model.tokenizer.characters) > 1:
        str(model), next(old.stream(model, [1], 1.0, random.Random(1)))


def use_talk(path: Path, trainer) -> None:
    turns, cfg = anexagpt.read_talk(path)
    shown = anexagpt.printable(str(turns) + str(cfg))
    anexagpt.random_source(cfg.seed)
    if any(ord(c) < 32 and c not in "\n\t" for c in shown):
        raise Fault("a talk would steer a terminal")


READERS = {
    "model": (use_model, ("model", "exported"), (spoil_bytes, spoil_header, spoil_header)),
    "checkpoint": (use_checkpoint, ("checkpoint",), (spoil_bytes, spoil_header, spoil_header)),
    "old architecture": (use_old, ("model",), (spoil_bytes, spoil_header, spoil_header)),
    "talk": (use_talk, ("talk",), (spoil_bytes, spoil_talk, spoil_talk)),
}


def case(reader: str, path: Path, trainer=None) -> str:
    """How a reader takes a file: "accepted", or "refused".  raises  Fault if in any other way"""
    use, size = READERS[reader][0], path.stat().st_size
    start, before = (time.process_time(), time.monotonic()), tracemalloc.get_traced_memory()[0]
    if tracemalloc.is_tracing():
        tracemalloc.reset_peak()
    try:
        use(path, trainer)
        outcome = "accepted"
    except (anexagpt.UserError, old.UserError) as error:
        outcome, line = "refused", str(error)
        if "\n" in line or len(line) > 600 or not line.isprintable():
            raise Fault(f"the error is {line!r}") from None
    except Exception as error:
        raise Fault(f"{type(error).__name__}: {error}") from error
    computing, waiting = time.process_time() - start[0], time.monotonic() - start[1]
    if computing > 1 or waiting > 10:  # other programs may keep this one waiting
        raise Fault(f"it took {computing:.1f} s of work, {waiting:.1f} s in all")
    memory = tracemalloc.get_traced_memory()[1] - before
    if memory > 30 * size + 20_000_000:  # a table of all characters has 4 MB
        raise Fault(f"it took {memory:,} bytes of memory for a file of {size:,}")
    return outcome


def fuzz(readers: dict[str, int], seed: int = 1, keep: Path | None = None, tell=lambda line: None) -> Counter:
    """Number of cases by reader and outcome.  raises  Fault at the first that is not as it should be"""
    counts, draw = Counter(), random.Random(seed)
    tracemalloc.start()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        good = good_files(folder)
        options = anexagpt.parse_options(
            ["train", *SETTINGS.split(), "--seed", "2", "--data", str(folder / "text.txt")]
        )
        trainer, _, _ = anexagpt.prepare_training(options, None, CPU, torch.float32, anexagpt.World())
        for reader, n in readers.items():
            _, sources, ways = READERS[reader]
            for i in range(n):
                path = folder / "case.safetensors"
                path.unlink(missing_ok=True)
                path.write_bytes(draw.choice(ways)(good[draw.choice(sources)], draw))
                try:
                    counts[f"{reader} {case(reader, path, trainer)}"] += 1
                except Fault as fault:
                    if keep:
                        keep.write_bytes(path.read_bytes())
                    raise Fault(f"{reader}, case {i} of seed {seed}: {fault}") from fault
                if i % 100 == 99:
                    tell(f"{reader}: {i + 1:,} of {n:,}")
        tracemalloc.stop()  # it makes all three times slower
        for n in (128, 129, 10**6):
            (folder / "layers").write_bytes(layers(n))
            for reader in ("model", "old architecture"):
                counts[f"{n:,} layers, {reader} {case(reader, folder / 'layers')}"] += 1
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=10_000, help="for each reader (default: 10000)")
    parser.add_argument("--reader", choices=READERS, help="only this one (default: all)")
    parser.add_argument("--seed", type=int, default=1, help="another one, other cases (default: 1)")
    parser.add_argument("--keep", type=Path, help="where to put a file that is not taken as it should be")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    wanted = {reader: arguments.cases for reader in READERS if arguments.reader in (None, reader)}
    begun = time.monotonic()
    found = fuzz(wanted, arguments.seed, arguments.keep, lambda line: print(f"\r{line:60}", end="", flush=True))
    print(f"\r{sum(found.values()):,} cases in {time.monotonic() - begun:.0f} s, each read or refused in one line:")
    for outcome, count in sorted(found.items()):
        print(f"{count:>9,}  {outcome}")
