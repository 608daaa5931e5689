"""The code blocks of a page: run as if pasted into Python, and what they print written below them.

    python docs/blocks.py journey.md          run the page, and write its outputs anew

For a page whose numbers come from the model in demo.html, after that model has changed. Read the
page then: its sentences may quote numbers that are no longer true (tests/test_docs.py finds them).
"""

from __future__ import annotations

import argparse
import code
import io
import os
import re
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

DOCS = Path(__file__).resolve().parent
FENCE = re.compile(r"^( *)```(.*)\n((?:.*\n)*?)\1```$", re.MULTILINE)


class Result(NamedTuple):
    """A block of Python, the language and content of the block after it, and what was printed."""

    block: str
    language: str
    expected: str
    printed: str
    errors: str


def pasted(block: str, console: code.InteractiveConsole) -> tuple[str, str]:
    """What a block prints, and its errors, when its lines are pasted into Python's prompt."""
    printed = io.StringIO()
    errors = io.StringIO()
    needs_more = False
    with redirect_stdout(printed), redirect_stderr(errors):
        for line in block.splitlines():
            needs_more = console.push(line)
        if needs_more:
            console.push("")
    return printed.getvalue(), errors.getvalue()


def run(page: str) -> list[Result]:
    """All blocks of Python of a page, in order, in one session."""
    blocks = [*FENCE.findall(page), ("", "", "")]
    console = code.InteractiveConsole({"__name__": "__main__"})
    results = []
    for i, (_, language, block) in enumerate(blocks):
        if language == "python":
            _, after, text = blocks[i + 1]
            expected = text if after.startswith("text") else ""
            results.append(Result(block, after, expected, *pasted(block, console)))
    return results


def with_outputs(page: str, results: list[Result]) -> str:
    """The page with what its blocks printed."""
    for result in results:
        if result.errors:
            raise SystemExit(f"{result.block}\n{result.errors}")
        if result.language.startswith("text"):
            start = f"```python\n{result.block}```\n\n```{result.language}\n"
            assert page.count(start) == 1
            page = page.replace(f"{start}{result.expected}```", f"{start}{result.printed}```")
    return page


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("page")
    path = DOCS / parser.parse_args().page
    page = path.read_text(encoding="utf-8")
    sys.path[:0] = [str(DOCS), str(DOCS.parent)]
    with TemporaryDirectory() as folder:
        os.chdir(folder)  # a page may write files
        results = run(page)
        os.chdir(DOCS)
    path.write_text(with_outputs(page, results), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
