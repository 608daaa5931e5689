"""What is put into browser.html: the assembled kernels, and for the demonstration a model.

    python docs/browser.py kernels                   browser.wat, assembled, into browser.html
    python docs/browser.py demo model.safetensors    demo.html: browser.html with a model inside
    python docs/browser.py demo                      the same, with the model that is in demo.html

The first needs `pip install wasmtime`, the others only Python. demo.html is made anew when the page
changes, and with another model when the default model changes: the one that `python anexagpt.py`
trains.
"""

from __future__ import annotations

import argparse
import base64
import json
import re
from pathlib import Path

DOCS = Path(__file__).resolve().parent
PAGE, DEMO = DOCS / "browser.html", DOCS / "demo.html"
DEMO_BEGIN = "#prompt=Sherlock+Holmes&seed=8&view=surprise&pace=20&max_new=400"
MAX_DEMO = 5_000_000  # bytes


def assemble(wat: str) -> bytes:
    """The WebAssembly module of a text, without its custom section (names, for debuggers)."""
    import wasmtime

    wasm = bytes(wasmtime.wat2wasm(wat))
    module, i = wasm[:8], 8
    while i < len(wasm):  # a section: a byte for its kind, its length in LEB128, its content
        length, end = 0, i + 1
        for shift in range(0, 35, 7):
            length |= (wasm[end] & 0x7F) << shift
            end += 1
            if wasm[end - 1] < 0x80:
                break
        end += length
        if wasm[i] != 0:
            module += wasm[i:end]
        i = end
    return module


def fill(page: str, id: str, content: str, attributes: str = "") -> str:
    """A page whose element <script id=...> has this content."""
    element = re.compile(rf'(<script id="{id}" type="text/plain")[^>]*>[^<]*(</script>)')
    assert len(element.findall(page)) == 1
    return element.sub(lambda found: f"{found[1]}{attributes}>{content}{found[2]}", page)


def kernels_page() -> str:
    """browser.html with the kernels of browser.wat."""
    wasm = assemble((DOCS / "browser.wat").read_text(encoding="utf-8"))
    page = PAGE.read_text(encoding="utf-8")
    return fill(page, "kernels", base64.b64encode(wasm).decode())


def demo_page(model: bytes) -> str:
    """browser.html with a model inside, which begins to write when it is opened."""
    metadata = json.loads(model[8 : 8 + int.from_bytes(model[:8], "little")])["__metadata__"]
    names, init = (
        json.loads(metadata["data"])["names"],
        json.loads(metadata["training"]).get("init"),
    )
    if any(set(name) & set("/\\@") for name in names) or init:
        raise SystemExit(f"the model was trained on {names}, init {init}: not for publication")
    begin = DEMO_BEGIN.replace("&", "&amp;")
    attributes = f' data-name="model.safetensors" data-begin="{begin}"'
    page = PAGE.read_text(encoding="utf-8")
    return fill(page, "model", base64.b64encode(model).decode(), attributes)


def demo_model() -> bytes:
    """The model that is in demo.html."""
    page = DEMO.read_text(encoding="utf-8")
    return base64.b64decode(re.search('<script id="model"[^>]*>([^<]*)<', page)[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["kernels", "demo"])
    parser.add_argument("model", type=Path, nargs="?", help="for demo: a model file")
    options = parser.parse_args()
    if options.what == "kernels":
        PAGE.write_text(kernels_page(), encoding="utf-8", newline="\n")
        return
    page = demo_page(options.model.read_bytes() if options.model else demo_model())
    if len(page.encode()) > MAX_DEMO:
        raise SystemExit(f"{options.model}: makes a page of more than {MAX_DEMO:,} bytes")
    DEMO.write_text(page, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
