"""Figures that several pages quote: each is in one place, the entry "quoted" of figures.json.

    python docs/quotes.py                           write the current values into the pages
    python docs/quotes.py default_minutes="4 to 7"  the same, with a new value

An entry has its value, its source, and the phrases of the pages in which {} stands for it. Values
that follow from the default model (source: model) are computed from the model in demo.html.
"""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path

import browser

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "docs" / "pictures" / "figures.json"


def row(loss: float) -> str:
    """Nats, bits and perplexity, as three cells of a table."""
    return f"{loss:.2f} | {loss / math.log(2):.2f} | {math.exp(loss):.1f}"


def model_values() -> dict[str, str]:
    """What the metadata of the default model says, as the pages quote it."""
    model = browser.demo_model()
    header = json.loads(model[8 : 8 + int.from_bytes(model[:8], "little")])["__metadata__"]
    loss = json.loads(header["validation_loss"])
    history = {step: loss for step, _, loss in json.loads(header["history"])}
    return {
        "default_loss": f"{loss:.2f}",
        "default_share": f"{100 * math.exp(-loss):.0f}%",
        "default_row": row(loss),
        "row_250": row(history[250]),
    }


def with_value(page: str, phrase: str, value: str) -> tuple[str, int]:
    """The page with the value in the phrase, and how often the phrase occurs."""
    parts = [re.escape(part).replace(r"\ ", r"\s+") for part in phrase.split("{}")]
    pattern = r"({})([^\n]|\n(?!\n)){{1,40}}?({})".format(*parts)  # a line may break anywhere
    return re.subn(pattern, lambda found: found[1] + value + found[3], page)


def main() -> None:
    figures = json.loads(FIGURES.read_text(encoding="utf-8"))
    given = dict(word.split("=", 1) for word in sys.argv[1:])
    for name, value in (model_values() | given).items():
        figures["quoted"][name]["value"] = value
    for quote in figures["quoted"].values():
        for name, phrases in quote["pages"].items():
            page = (ROOT / name).read_text(encoding="utf-8")
            for phrase in phrases:
                page, n = with_value(page, phrase, quote["value"])
                if n != 1:
                    raise SystemExit(f"{name}: has {n} times: {phrase}")
            (ROOT / name).write_text(page, encoding="utf-8", newline="\n")
    write(figures)


def write(figures: dict) -> None:
    entries = []
    for name, value in figures.items():
        indent = 1 if name == "quoted" else None
        entries.append(f'"{name}": {json.dumps(value, ensure_ascii=False, indent=indent)}')
    content = "{\n" + ",\n".join(entries) + "\n}\n"
    FIGURES.write_text(content, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
