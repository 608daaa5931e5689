"""The model in a web page: characters a second in Chromium and in the script, delay of clicks.

    python tests/benchmarks/browser.py --model model.safetensors

The page and the script take turns. Each round continues an empty prompt. The delay is that from a
click to the next frame that is drawn, while text is written: clicks go in turn to the views and to
a place in the text.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from playwright.sync_api import Page, sync_playwright

import anexagpt

WATCH_CLICKS = """() => {
    window.delays = [];
    addEventListener("pointerdown", ({timeStamp}) => {
        requestAnimationFrame(() => setTimeout(() => delays.push(performance.now() - timeStamp)));
    }, true);
}"""


def open_page(browser, model: Path) -> Page:
    page = browser.new_page()
    page.goto((ROOT / "docs" / "browser.html").as_uri())
    page.set_input_files("#file", model)
    page.wait_for_selector("#workspace:visible")
    return page


def start_writing(page: Page, n: int) -> None:
    page.fill("#set-max_new", str(n))
    page.click("#clear")
    page.click("#go")


def page_speed(page: Page, n: int) -> float:
    """Characters a second, as the page itself has measured."""
    start_writing(page, n)
    page.wait_for_selector("#go:text-is('Continue')", timeout=600_000)
    words = page.inner_text("#status").replace(",", "").split()
    assert int(words[0]) == n
    return n / float(words[3])


def script_speed(model: anexagpt.Model, n: int) -> float:
    started = time.perf_counter()
    text = model.generate("", max_new=n)
    seconds = time.perf_counter() - started
    assert len(text) == n
    return n / seconds


def click_delays(page: Page, clicks: int) -> list[float]:
    """Milliseconds from each of some clicks, while text is written, to the frame after it."""
    page.evaluate(WATCH_CLICKS)
    start_writing(page, 20_000)
    targets = [*page.locator(".tabs label").all(), page.locator("#text")]
    for i in range(clicks):
        target = targets[i % len(targets)]
        target.click(no_wait_after=True)
        page.wait_for_timeout(97)
    assert page.inner_text("#go") == "Stop"
    page.click("#go")
    return page.evaluate("delays")


def report(speeds: dict[str, list[float]], delays: list[float]) -> None:
    print("| writes | median | lowest to highest |\n|---|---|---|")
    for name, values in speeds.items():
        median = statistics.median(values)
        print(f"| {name} | {median:,.0f} | {min(values):,.0f} to {max(values):,.0f} |")
    pairs = zip(speeds["page"], speeds["script"], strict=True)
    ratios = sorted(page / script for page, script in pairs)
    print(f"\npage / script: {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    median = statistics.median(delays)
    print(
        f"{len(delays)} clicks while it writes: median {median:.0f} ms, worst {max(delays):.0f} ms"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=Path("model.safetensors"))
    parser.add_argument(
        "--chromium", default=shutil.which("chromium") or shutil.which("google-chrome")
    )
    parser.add_argument("--characters", type=int, default=2_000, help="in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clicks", type=int, default=60)
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    args = parser.parse_args()
    model = anexagpt.load(args.model)
    n = args.characters
    speeds = {"page": [], "script": []}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=args.chromium, args=["--no-sandbox"])
        page = open_page(browser, args.model)
        page_speed(page, n)  # warm-up
        script_speed(model, n)
        for _ in range(args.rounds):
            speeds["page"].append(page_speed(page, n))
            speeds["script"].append(script_speed(model, n))
        delays = click_delays(page, args.clicks)
        browser.close()
    print(f"{n} characters, {args.rounds} rounds, one text; characters a second\n")
    report(speeds, delays)
    if args.json:
        args.json.write_text(json.dumps({"speeds": speeds, "delays": delays}, indent=1))


if __name__ == "__main__":
    main()
