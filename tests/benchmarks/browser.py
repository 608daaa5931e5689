"""The model in a web page: characters a second in Chromium and in the script, delay of clicks.

    python tests/benchmarks/browser.py --model model.safetensors --against old.html

The page, the script and perhaps an older page take turns. Each round continues an empty prompt. The
delay is that from a click to the next frame that is drawn, while text is written: clicks go in turn
to the views, which change what is drawn, and to a place in the text. Of that delay the computing
time is what the page's main thread needs itself; the rest is waiting for other threads or programs.
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
from playwright.sync_api import sync_playwright

import anexagpt

WATCH_CLICKS = """() => {
    window.delays = [];
    addEventListener("click", ({timeStamp, target}) => {
        if (target.closest("button")) return;
        requestAnimationFrame(() => setTimeout(() => delays.push(performance.now() - timeStamp)));
    }, true);
}"""


def write_in_page(page, n: int) -> float:
    """Characters a second, as the page itself has measured."""
    page.bring_to_front()
    page.fill("#set-max_new", str(n))
    page.click("#clear")
    page.click("#go")
    page.wait_for_selector("#go:text-is('Stop')")
    page.wait_for_selector("#go:text-is('Continue')", timeout=600_000)
    words = page.inner_text("#status").replace(",", "").split()
    assert int(words[0]) == n
    return n / float(words[3])


def click_delays(page, clicks: int) -> list[float]:
    """Milliseconds from each of some clicks, while text is written, to the frame after it."""
    page.evaluate(WATCH_CLICKS)
    page.fill("#set-max_new", "20000")
    targets = [*page.locator(".tabs label").all(), page.locator("#text")]
    for i in range(clicks):
        if page.inner_text("#go") != "Stop":  # the page is full: from the beginning
            page.click("#clear")
            page.click("#go")
        targets[i % len(targets)].click(no_wait_after=True)
        page.wait_for_timeout(97)
    page.click("#go")
    return page.evaluate("delays")


def computing_times(trace: bytes) -> list[float]:
    """Milliseconds of CPU time of the main thread from each click to the end of its frame."""
    events = [event for event in json.loads(trace)["traceEvents"] if "dur" in event]
    first = next(event for event in events if event["name"] == "EventDispatch")
    main = [e for e in events if (e["pid"], e["tid"]) == (first["pid"], first["tid"])]
    tasks = [event for event in main if event["name"] == "RunTask"]
    frames = sorted(event["ts"] for event in main if event["name"] == "Commit")
    times = []
    for event in main:
        if event["name"] != "EventDispatch" or event["args"]["data"]["type"] != "mouseup":
            continue
        end = next((frame for frame in frames if frame > event["ts"]), 0)
        between = [t for t in tasks if event["ts"] < t["ts"] + t["dur"] and t["ts"] < end]
        if between:
            times.append(sum(task["tdur"] for task in between) / 1_000)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=Path("model.safetensors"))
    parser.add_argument(
        "--chromium", default=shutil.which("chromium") or shutil.which("google-chrome")
    )
    parser.add_argument("--characters", type=int, default=2_000, help="in each round")
    parser.add_argument("--against", type=Path, help="an older page, which takes turns, too")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clicks", type=int, default=60)
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    options = parser.parse_args()
    model, n = anexagpt.load(options.model), options.characters
    pages = {"page": ROOT / "docs" / "browser.html"}
    if options.against:
        pages["older page"] = options.against.resolve()
    speeds: dict[str, list[float]] = {name: [] for name in (*pages, "script")}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=options.chromium, args=["--no-sandbox"]
        )
        tabs = {name: browser.new_page() for name in pages}
        for name, tab in tabs.items():
            tab.goto(pages[name].as_uri())
            tab.set_input_files("#file", options.model)
            tab.wait_for_selector("#workspace:visible")
        for turn in range(options.rounds + 1):
            round_ = {name: write_in_page(tab, n) for name, tab in tabs.items()}
            start = time.perf_counter()
            assert len(model.generate("", max_new=n)) >= n
            round_["script"] = n / (time.perf_counter() - start)
            for name, speed in round_.items():
                if turn:  # the first is for warming up
                    speeds[name].append(speed)
        tabs["page"].bring_to_front()
        categories = ["devtools.timeline", "disabled-by-default-devtools.timeline"]
        browser.start_tracing(page=tabs["page"], categories=categories)
        delays = click_delays(tabs["page"], options.clicks)
        computing = computing_times(browser.stop_tracing())
        browser.close()
    print(f"{n} characters, {options.rounds} rounds, one text; characters a second\n")
    print("| writes | median | lowest to highest |\n|---|---|---|")
    for name, values in speeds.items():
        low, middle, high = min(values), statistics.median(values), max(values)
        print(f"| {name} | {middle:,.0f} | {low:,.0f} to {high:,.0f} |")
    for name in list(speeds)[1:]:
        pairs = zip(speeds["page"], speeds[name], strict=True)
        ratios = sorted(page / other for page, other in pairs)
        low, middle, high = ratios[0], statistics.median(ratios), ratios[-1]
        print(f"\npage / {name}: {middle:.2f} ({low:.2f} to {high:.2f})")
    median, worst = statistics.median(delays), max(delays)
    print(f"{len(delays)} clicks while it writes: median {median:.0f} ms, worst {worst:.0f} ms")
    median, worst = statistics.median(computing), max(computing)
    print(f"computing time of the main thread: median {median:.0f} ms, worst {worst:.0f} ms")
    if options.json:
        figures = dict(speeds=speeds, delays=delays, computing=computing)
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
