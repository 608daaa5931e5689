"""Give the program spoilt model files and checkpoints: each is refused in one line, or used.

    python tests/benchmarks/fuzz.py --cases 2000

Readers: `generate` and `info` with a model, an exported model or a checkpoint; `train`, which
resumes a checkpoint; docs/old_architecture.py. A case is a good file that was cut, or had bits and
bytes changed, parts doubled or dropped, entries of its header replaced by absurd ones, tensors of
other shapes and number formats, weights that are not finite. It fails if there is a traceback, an
error of more than one line or with control characters, if memory ends, or after two seconds of
work. Needs Linux.
"""

import argparse
import contextlib
import copy
import io
import itertools
import json
import random
import resource
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
import anexagpt

sys.path.insert(0, str(ROOT / "docs"))  # not the benchmark of that name
import old_architecture as old

TEXT = "the cat saw a dog.\n" * 40
SHAPE = "--n-layer 2 --n-head 2 --n-embd 4 --block-size 8 --device cpu --dtype float32"
RUN = "--batch-size 2 --grad-accum 1 --max-steps 6 --eval-interval 2 --quiet"
BROKEN = ["[" * 20_000 + "]" * 20_000, '{"a":' * 20_000 + "1" + "}" * 20_000, "9" * 5000, "1e400"]
BROKEN += ["[1,", "nul", '""', "[]", "{}", "false"]
NUMBERS = [0, 1, -1, 2, 3, 7, 1001, 10**6, 2**31, 2**53, 2**63, 2**64, -(2**63), 10**63, 10**400]
NUMBERS += [0.5, 1e308, -0.0, float("nan"), float("inf"), -float("inf"), True, False, None]
STRINGS = ["x", "F32", "NaN", "h.0.ln_1.weight", "", "\0", "\x1b]0;x\x07", "\u202e", "\ud800"]
STRINGS += ["\ufffd", "x" * 5000, "a\nb", "/dev/zero", "http://127.0.0.1:9/", "1e999", "[/red]"]
DTYPES = ["F64", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "C64", "f32", "", "F32 "]


class Fault(Exception):
    """What a case has found."""


def run(main, *arguments: str, stdin: str = "") -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a command line, in this process."""
    streams = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.TextIOWrapper(io.BytesIO(), "utf-8")
    before, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO(stdin.encode()))
    try:
        with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
            status = main(list(arguments)) or 0
    except SystemExit as leave:
        status = leave.code or 0
    finally:
        sys.stdin = before
    texts = [(s.flush(), s.buffer.getvalue().decode(errors="backslashreplace"))[1] for s in streams]
    return status, *texts


def good_files(folder: Path) -> dict[str, bytes]:
    """A model, an exported one and a checkpoint, as the program writes them."""
    (folder / "text.txt").write_text(TEXT)
    out = folder / "model.safetensors"
    options = ["--data", str(folder / "text.txt"), *SHAPE.split(), *RUN.split()]
    assert run(anexagpt.main, "train", *options, "--out", str(out))[0] == 0
    exported = folder / "exported"
    assert run(anexagpt.main, "export", str(exported), "--model", str(out))[0] == 0
    steps = itertools.count(1)
    stop = lambda *_: next(steps) == 4 and signal.raise_signal(signal.SIGINT)
    hook = register_optimizer_step_post_hook(stop)
    run(anexagpt.main, "train", *options, "--out", str(folder / "other.safetensors"))
    hook.remove()
    paths = out, exported / "model.safetensors", folder / "other.safetensors.checkpoint"
    return dict(zip(("model", "exported", "checkpoint"), map(Path.read_bytes, paths), strict=True))


def spoil_bytes(content: bytes, rng: random.Random) -> bytes:
    """Cut, changed, doubled, dropped or filled somewhere; the header more often than the rest."""
    spoilt, n = bytearray(content), len(content)
    for _ in range(rng.choice((1, 1, 1, 2, 5, 30))):
        at = rng.randrange(rng.choice((9, 200, 2000, n))) % max(1, len(spoilt))
        end, how = at + rng.choice((1, 1, 2, 8, 100, 1000)), rng.randrange(7)
        if how == 0:
            del spoilt[at:]
        elif how == 1:
            lengths = 0, 1, n, n - 8, 10**8, 2**63, 2**64 - 1, at
            spoilt[:8] = struct.pack("<Q", rng.choice(lengths))
        elif how == 2:
            spoilt += rng.randbytes(end - at)
        else:
            part = spoilt[at:end]
            turned = bytes(byte ^ 1 << rng.randrange(8) for byte in part)
            spoilt[at:end] = (b"", part + part, rng.randbytes(len(part)), turned)[how - 3]
    return bytes(spoilt)


def absurd(value, rng: random.Random):
    """Another value in place of one of a JSON document: sometimes like it, mostly absurd."""
    like = value
    if isinstance(value, str | list) and value:
        at = rng.randrange(len(value))
        like = rng.choice((value[:at], value + value, value[::-1], value[:at] + value[at + 1 :]))
    elif type(value) in (int, float) and abs(value) < 1e300:
        like = rng.choice((value + 1, value - 1, -value, value * 2, float(value), str(value)))
    others = rng.choice(NUMBERS), rng.choice(STRINGS), rng.choice(([], {}, [1, 2, 3], [[]]))
    return rng.choice((like, like, *others))


def spoil_json(document, rng: random.Random):
    """A document with one value, somewhere, replaced, dropped, renamed or added."""
    place, key, inner = None, None, (document := copy.deepcopy(document))
    while isinstance(inner, dict | list) and inner and (place is None or rng.random() < 0.8):
        place = inner
        key = rng.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
        inner = place[key]
    if place is None:
        return absurd(document, rng)
    if (how := rng.randrange(8)) == 0:
        del place[key]
    elif how == 1 and isinstance(place, dict):
        place[rng.choice(STRINGS)] = place.pop(key)
    else:
        place[key] = absurd(inner, rng)
    return document


def spoil_tensor(tensors: dict[str, dict], rng: random.Random) -> None:
    """Change what the header says of one tensor."""
    name, places = rng.choice(list(tensors)), (0, 4, 64, 256, -8, 2**64 - 4, 2**64, 10**12)
    shape = tensors[name]["shape"]
    shapes = shape[::-1], [*shape, 1], [], [0], [2**63, 2**63]
    changes = [dict(dtype=rng.choice(DTYPES)), dict(shape=rng.choice(shapes))]
    changes += [dict(data_offsets=[rng.choice(places), rng.choice(places)])]
    changes += [tensors[rng.choice(list(tensors))]]  # two in one place
    tensors[rng.choice((name, name, *STRINGS[:4]))] = tensors.pop(name) | rng.choice(changes)


def spoil_header(content: bytes, rng: random.Random) -> bytes:
    """A file with other entries in its header, the JSON in its JSON included, or other numbers."""
    n = 8 + int.from_bytes(content[:8], "little")
    tensors, numbers = json.loads(content[8:n]), bytearray(content[n:])
    metadata = tensors.pop("__metadata__")
    for _ in range(rng.choice((1, 1, 2, 4))):
        how, entry = rng.randrange(10), rng.choice(list(metadata))
        if how < 5:
            try:
                value = spoil_json(json.loads(metadata[entry]), rng)
                value = value if rng.random() < 0.1 else json.dumps(value)
            except (TypeError, ValueError, RecursionError):
                value = rng.choice(NUMBERS + STRINGS)
            metadata[entry] = rng.choice(BROKEN) if rng.random() < 0.1 else value
        elif how < 6 and len(metadata) > 1:
            del metadata[entry]
        elif how < 8:
            spoil_tensor(tensors, rng)
        else:
            at = rng.randrange(len(numbers) // 4) * 4
            value = rng.choice((float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 1e20))
            numbers[at : at + 4] = struct.pack("<f", value)
    text = json.dumps(tensors | {"__metadata__": metadata}).encode()
    if rng.random() < 0.05:
        text = b"{" + text[1:-1] + b"," + text[1:]  # every key twice
    return struct.pack("<Q", len(text)) + text + bytes(numbers)


def commands(reader: str, path: Path) -> list[tuple]:
    """Command lines that read the file."""
    if reader == "model":
        generate = "generate", "a", "-n", "3", "--seed", "1", "--model", str(path)
        return [(anexagpt.main, *generate), (anexagpt.main, "info", "--model", str(path))]
    if reader == "old architecture":
        return [(old.main, "--model", str(path))]
    out = path.with_name("case.safetensors")
    out.unlink(missing_ok=True)
    path.replace(path.with_name("case.safetensors.checkpoint"))
    options = "--data", str(path.with_name("text.txt")), "--out", str(out)
    return [(anexagpt.main, "train", *options, *RUN.split())]


READERS = {"model": ("model", "exported", "checkpoint"), "checkpoint": ("checkpoint",)}
READERS["old architecture"] = ("model",)


def case(reader: str, path: Path) -> str:
    """How a reader takes a file: "used" or "refused".  raises: Fault if in any other way"""
    outcome = "used"
    for main, *arguments in commands(reader, path):
        begun = time.process_time()
        try:
            status, out, err = run(main, *arguments, stdin="quit\n")
        except Exception as error:
            raise Fault(f"{arguments[0]}: {type(error).__name__}: {error}") from error
        if (seconds := time.process_time() - begun) > 2:
            raise Fault(f"{arguments[0]}: {seconds:.1f} s of work")
        shown = err + (out if arguments[0] == "info" else "")
        if not shown.replace("\n", "").isprintable() or "out of memory" in err:
            raise Fault(f"{arguments[0]}: {shown!r}")
        if status:
            outcome, lines = "refused", err.splitlines()
            if status != 2 or (len(lines) != 1 and arguments[0] != "train") or len(err) > 600:
                raise Fault(f"{arguments[0]}: status {status}, {err!r}")
    return outcome


def fuzz(cases: int, seed=1, log=lambda line: None) -> Counter:
    """Number of cases by reader and outcome.  raises: Fault at the first"""
    counts, rng = Counter(), random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        path, good = Path(folder) / "case", good_files(Path(folder))
        for reader, i in itertools.product(READERS, range(cases)):
            source, spoil = rng.choice(READERS[reader]), rng.choice((spoil_bytes, spoil_header))
            path.write_bytes(spoil(good[source], rng))
            try:
                counts[f"{reader} {case(reader, path)}"] += 1
            except Fault as fault:
                raise Fault(f"{reader}, case {i} of seed {seed}: {fault}") from fault
            log(f"{reader}: {i + 1:,} of {cases:,}")
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=2_000, help="for each reader")
    parser.add_argument("--seed", type=int, default=1, help="another one, other cases")
    args = parser.parse_args()
    torch.set_num_threads(1)
    # What takes a GB more than PyTorch is a fault.
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30),) * 2)
    line = lambda text: print(f"\r{text:50}", end="", flush=True)
    found = fuzz(args.cases, args.seed, line)
    print(f"\r{sum(found.values()):,} files, each used or refused in one line:{'':9}")
    for outcome, count in sorted(found.items()):
        print(f"{count:>9,}  {outcome}")
