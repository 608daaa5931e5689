"""Give the program corrupted model files and checkpoints: each is refused in one line, or used.

    python tests/benchmarks/fuzz.py --cases 2000

Readers: `generate` and `info` with a model, an exported model or a checkpoint; `train`, which
resumes a checkpoint; docs/old_architecture.py. A case is a good file that was cut, or had bits and
bytes changed, parts doubled or dropped, entries of its header replaced by absurd ones, tensors of
other shapes and number formats, weights that are not finite. It fails if there is a traceback, an
error of more than one line or with control characters, if memory ends, or after two seconds of
work. Needs Linux.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import itertools
import json
import random
import resource
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import anexagpt

sys.path.insert(0, str(ROOT / "docs"))  # not the benchmark of that name
import old_architecture as old

TEXT = "the cat saw a dog.\n" * 40
SETTINGS = {
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 4,
    "block_size": 8,
    "batch_size": 2,
    "max_steps": 6,
    "eval_interval": 2,
    "device": "cpu",
    "dtype": "float32",
}
# Options of a resumed run, so that no absurd setting of a checkpoint makes it long.
BOUNDS = ["--max-steps", "6", "--eval-interval", "2", "--batch-size", "2", "--grad-accum", "1"]
BROKEN = ["[" * 20_000 + "]" * 20_000, '{"a":' * 20_000 + "1" + "}" * 20_000, "9" * 5000, "1e400"]
BROKEN += ["[1,", "nul", '""', "[]", "{}", "false"]
NUMBERS = [0, 1, -1, 2, 3, 7, 1001, 10**6, 2**31, 2**53, 2**63, 2**64, -(2**63), 10**63, 10**400]
NUMBERS += [0.5, 1e308, -0.0, float("nan"), float("inf"), -float("inf"), True, False, None]
STRINGS = ["x", "F32", "NaN", "h.0.ln_1.weight", "", "\0", "\x1b]0;x\x07", "\u202e", "\ud800"]
STRINGS += ["\ufffd", "x" * 5000, "a\nb", "/dev/zero", "http://127.0.0.1:9/", "1e999", "[/red]"]
CONTAINERS = [[], {}, [1, 2, 3], [[]]]
DTYPES = ["F64", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "C64", "f32", "", "F32 "]
OFFSETS = [0, 4, 64, 256, -8, 2**64 - 4, 2**64, 10**12]
WEIGHTS = [float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 1e20]


class Fault(Exception):
    """What a case has found."""


class Result(NamedTuple):
    status: int
    out: str
    err: str


@contextlib.contextmanager
def stdin_from(text: str) -> Iterator[None]:
    before = sys.stdin
    sys.stdin = io.TextIOWrapper(io.BytesIO(text.encode()))
    try:
        yield
    finally:
        sys.stdin = before


def run(main: Callable[[list[str]], int], arguments: list[str], stdin: str = "") -> Result:
    """What a command line does, in this process."""
    out = io.TextIOWrapper(io.BytesIO(), "utf-8")
    err = io.TextIOWrapper(io.BytesIO(), "utf-8")
    with stdin_from(stdin), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(arguments)
        except SystemExit as leave:
            status = leave.code
    printed = []
    for stream in (out, err):
        stream.flush()
        printed.append(stream.buffer.getvalue().decode(errors="backslashreplace"))
    return Result(status or 0, *printed)


def good_files(folder: Path) -> dict[str, bytes]:
    """A model, an exported one and a checkpoint, as the program writes them."""
    text = folder / "text.txt"
    text.write_text(TEXT)
    out = folder / "model.safetensors"
    anexagpt.train(str(text), out=out, progress=False, **SETTINGS)
    exported = folder / "exported"
    assert run(anexagpt.main, ["export", str(exported), "--model", str(out)]).status == 0
    steps = itertools.count(1)
    stopped = anexagpt.train(
        str(text),
        out=folder / "other.safetensors",
        progress=False,
        should_stop=lambda: next(steps) == 4,
        **SETTINGS,
    )
    return {
        "model": out.read_bytes(),
        "exported": (exported / "model.safetensors").read_bytes(),
        "checkpoint": stopped.path.read_bytes(),
    }


# ---- corrupting ----------------------------------------------------------------------------------


def corrupt_part(content: bytearray, n: int, rng: random.Random) -> None:
    """Cut, change, double, drop or fill a part; the header more often than the rest."""
    at = rng.randrange(rng.choice((9, 200, 2000, n))) % max(1, len(content))
    end = at + rng.choice((1, 1, 2, 8, 100, 1000))
    part = content[at:end]
    how = rng.choice(("cut", "length", "append", "drop", "double", "fill", "flip"))
    if how == "cut":
        del content[at:]
    elif how == "length":
        lengths = (0, 1, n, n - 8, 10**8, 2**63, 2**64 - 1, at)
        content[:8] = struct.pack("<Q", rng.choice(lengths))
    elif how == "append":
        content += rng.randbytes(end - at)
    elif how == "drop":
        del content[at:end]
    elif how == "double":
        content[at:end] = part + part
    elif how == "fill":
        content[at:end] = rng.randbytes(len(part))
    else:
        content[at:end] = bytes(byte ^ 1 << rng.randrange(8) for byte in part)


def corrupt_bytes(content: bytes, rng: random.Random) -> bytes:
    corrupted = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 5, 30))):
        corrupt_part(corrupted, len(content), rng)
    return bytes(corrupted)


def similar(value, rng: random.Random):
    """A value like that of a JSON document: of the same kind, but another one."""
    if isinstance(value, str | list) and value:
        at = rng.randrange(len(value))
        without_one = value[:at] + value[at + 1 :]
        return rng.choice((value[:at], value + value, value[::-1], without_one))
    if type(value) in (int, float) and abs(value) < 1e300:
        return rng.choice((value + 1, value - 1, -value, value * 2, float(value), str(value)))
    return value


def absurd(value, rng: random.Random):
    """Another value in place of one of a JSON document: sometimes like it, mostly absurd."""
    like = similar(value, rng)
    others = [rng.choice(NUMBERS), rng.choice(STRINGS), copy.copy(rng.choice(CONTAINERS))]
    return rng.choice((like, like, *others))


def corrupt_json(document, rng: random.Random):
    """A document with one value, somewhere, replaced, dropped, renamed or added."""
    if not isinstance(document, dict | list) or not document:
        return absurd(document, rng)
    document = copy.deepcopy(document)
    place = None
    inner = document
    while isinstance(inner, dict | list) and inner and (place is None or rng.random() < 0.8):
        place = inner
        keys = list(inner) if isinstance(inner, dict) else range(len(inner))
        key = rng.choice(keys)
        inner = place[key]
    how = rng.randrange(8)
    if how == 0:
        del place[key]
    elif how == 1 and isinstance(place, dict):
        place[rng.choice(STRINGS)] = place.pop(key)
    else:
        place[key] = absurd(inner, rng)
    return document


def corrupt_entry(metadata: dict[str, str], rng: random.Random) -> None:
    """Change one entry of the metadata, or the JSON in it."""
    name = rng.choice(list(metadata))
    if rng.random() < 0.1:
        metadata[name] = rng.choice(BROKEN)
        return
    try:
        value = corrupt_json(json.loads(metadata[name]), rng)
        is_text = rng.random() < 0.9
        metadata[name] = json.dumps(value) if is_text else value
    except (TypeError, ValueError, RecursionError):
        metadata[name] = rng.choice(NUMBERS + STRINGS)


def corrupt_tensor(tensors: dict[str, dict], rng: random.Random) -> None:
    """Change what the header says of one tensor."""
    name = rng.choice(list(tensors))
    shape = tensors[name]["shape"]
    shapes = (shape[::-1], [*shape, 1], [], [0], [2**63, 2**63])
    changes = [
        {"dtype": rng.choice(DTYPES)},
        {"shape": rng.choice(shapes)},
        {"data_offsets": [rng.choice(OFFSETS), rng.choice(OFFSETS)]},
        tensors[rng.choice(list(tensors))],  # two in one place
    ]
    new_name = rng.choice((name, name, *STRINGS[:4]))
    tensors[new_name] = tensors.pop(name) | rng.choice(changes)


def corrupt_header(content: bytes, rng: random.Random) -> bytes:
    """A file with other entries in its header, or with other weights."""
    n = 8 + int.from_bytes(content[:8], "little")
    tensors = json.loads(content[8:n])
    metadata = tensors.pop("__metadata__")
    weights = bytearray(content[n:])
    for _ in range(rng.choice((1, 1, 2, 4))):
        how = rng.randrange(10)
        if how < 5:
            corrupt_entry(metadata, rng)
        elif how < 6 and len(metadata) > 1:
            del metadata[rng.choice(list(metadata))]
        elif how < 8:
            corrupt_tensor(tensors, rng)
        else:
            at = 4 * rng.randrange(len(weights) // 4)
            weights[at : at + 4] = struct.pack("<f", rng.choice(WEIGHTS))
    header = json.dumps(tensors | {"__metadata__": metadata}).encode()
    if rng.random() < 0.05:
        header = b"{" + header[1:-1] + b"," + header[1:]  # every key twice
    return struct.pack("<Q", len(header)) + header + bytes(weights)


# ---- reading -------------------------------------------------------------------------------------

READERS = {  # and what they read
    "model": ("model", "exported", "checkpoint"),
    "checkpoint": ("checkpoint",),
    "old architecture": ("model",),
}


def read_model(path: Path) -> Iterator[Result]:
    words = ["a", "-n", "3", "--seed", "1", "--model", str(path)]
    yield run(anexagpt.main, ["generate", *words])
    info = run(anexagpt.main, ["info", "--model", str(path)])
    yield info._replace(err=info.err + info.out)  # what it prints comes from the file, too


def read_checkpoint(path: Path) -> Iterator[Result]:
    out = path.with_name("case.safetensors")
    out.unlink(missing_ok=True)
    path.replace(path.with_name("case.safetensors.checkpoint"))
    text = str(path.with_name("text.txt"))
    words = ["train", text, "--out", str(out), *BOUNDS, "--device", "cpu", "--quiet"]
    yield run(anexagpt.main, words)


def read_old(path: Path) -> Iterator[Result]:
    yield run(old.main, ["--model", str(path)], stdin="quit\n")


def read(reader: str, path: Path) -> Iterator[Result]:
    functions = {"model": read_model, "checkpoint": read_checkpoint, "old architecture": read_old}
    return functions[reader](path)


def check(result: Result, reader: str) -> None:
    """raises: Fault unless a file was used, or refused in one line"""
    if not result.err.replace("\n", "").isprintable() or "out of memory" in result.err:
        raise Fault(f"prints {result.err!r}")
    if result.status == 0:
        return
    lines = result.err.splitlines()
    is_one_line = len(lines) == 1 or reader == "checkpoint"  # training may have begun
    if result.status != 2 or not is_one_line or len(result.err) > 600:
        raise Fault(f"status {result.status}, {result.err!r}")


def case(reader: str, path: Path) -> str:
    """How a reader takes a file: "used" or "refused".  raises: Fault if in any other way"""
    outcome = "used"
    started = time.process_time()
    try:
        for result in read(reader, path):
            check(result, reader)
            if result.status:
                outcome = "refused"
    except Fault:
        raise
    except Exception as error:
        raise Fault(f"{type(error).__name__}: {error}") from error
    seconds = time.process_time() - started
    if seconds > 2:
        raise Fault(f"{seconds:.1f} s of work")
    return outcome


def fuzz(cases: int, seed: int = 1, log: Callable[[str], None] = lambda line: None) -> Counter:
    """Number of cases by reader and outcome.  raises: Fault at the first"""
    counts = Counter()
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "case"
        good = good_files(Path(folder))
        for reader, i in itertools.product(READERS, range(cases)):
            source = rng.choice(READERS[reader])
            corrupt = rng.choice((corrupt_bytes, corrupt_header))
            path.write_bytes(corrupt(good[source], rng))
            try:
                outcome = case(reader, path)
            except Fault as fault:
                raise Fault(f"{reader}, case {i} of seed {seed}: {fault}") from fault
            counts[f"{reader} {outcome}"] += 1
            log(f"{reader}: {i + 1:,} of {cases:,}")
    return counts


def limit_memory(extra: int) -> None:
    """What takes `extra` bytes more than PyTorch is a fault."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + extra
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=2_000, help="for each reader")
    parser.add_argument("--seed", type=int, default=1, help="another one, other cases")
    args = parser.parse_args()
    torch.set_num_threads(1)
    limit_memory(1 << 30)
    counts = fuzz(args.cases, args.seed, lambda line: print(f"\r{line:50}", end="", flush=True))
    print(f"\r{counts.total():,} files, each used or refused in one line:{'':9}")
    for outcome, count in sorted(counts.items()):
        print(f"{count:>9,}  {outcome}")


if __name__ == "__main__":
    main()
