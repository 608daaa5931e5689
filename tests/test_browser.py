"""Browser: docs/browser.html in a real Chromium, against transformers, PyTorch and the script."""

import json
import os
import re
import shutil
import struct
import subprocess
import sys

import pytest
import torch
from axe_playwright_python.sync_playwright import Axe
from conftest import ROOT
from playwright.sync_api import Error, sync_playwright

PAGE = ROOT / "docs" / "browser.html"
NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
ARGUMENTS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
ARGUMENTS += " --disable-background-networking --disable-component-update"
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=f"none of {', '.join(NAMES)} is here")
MARKUP = "<img src=x onerror='window.ran=1'><script>window.ran=1</script>"


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        options = dict(executable_path=CHROMIUM, args=ARGUMENTS.split())
        with playwright.chromium.launch(**options) as browser:
            yield browser


@pytest.fixture(scope="module")
def tab(browser):
    with browser.new_page(offline=True) as tab:
        tab.set_default_timeout(20_000)
        tab.errors, tab.requests = [], []
        tab.on("pageerror", lambda error: tab.errors.append(error))
        tab.on("request", lambda request: tab.requests.append(request.url))
        yield tab


@pytest.fixture
def page(tab):
    """The page, just opened. It may have no error and request only itself and its workers."""
    tab.errors.clear()
    tab.requests.clear()
    tab.goto(PAGE.as_uri())
    yield tab
    assert not tab.errors
    assert all(url == PAGE.as_uri() or url.startswith("blob:") for url in tab.requests)


def load(page, model, name: str = "model.safetensors") -> None:
    """Open a model, a path or bytes, as the file dialogue does."""
    content = model if isinstance(model, bytes) else model.read_bytes()
    page.set_input_files("#file", dict(name=name, mimeType="", buffer=content))
    page.wait_for_selector("#workspace:visible, #error:visible")


def write(page, prompt: str, **settings) -> str:
    """Text of the page after it has continued a prompt."""
    for name, value in settings.items():
        page.fill(f"#set-{name}", str(value))
    page.fill("#text", prompt)
    page.click("#go")
    page.wait_for_selector("#go:text-is('Continue')")
    return page.input_value("#text")


def settled(page) -> str:
    """Text of the view when the page has computed and drawn all that it wants to show."""
    page.evaluate(
        """async () => {
            for (let calm = 0; calm < 3; calm = analysing || mode !== "idle" ? 0 : calm + 1)
                await new Promise(requestAnimationFrame);
        }"""
    )
    return page.inner_text("#view")


def split_file(content: bytes) -> tuple[dict, bytes]:
    n = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:n]), content[n:]


def join_file(header, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.fixture(scope="module")
def large_logits(tiny):
    """Network of transformers whose logits reach 15, its characters, and its file by layout."""
    import transformers

    metadata = split_file(tiny.read_bytes())[0]["__metadata__"]
    characters = json.loads(metadata["characters"])
    shape = dict(vocab_size=len(characters), n_layer=3, n_head=2, n_embd=24)
    options = dict(activation_function="gelu_new", attn_implementation="eager", bos_token_id=None)
    config = transformers.GPT2Config(n_positions=40, eos_token_id=None, **shape, **options)
    network = transformers.GPT2LMHeadModel(config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in network.parameters():
            weight.copy_(torch.randn_like(weight) * (0.35 if weight.dim() == 2 else 0.5))
        network.transformer.wte.weight.mul_(5)
    metadata["config"] = json.dumps(shape | dict(block_size=40, dropout=None))
    files = {}
    for layout in ("plain", "exported"):
        header, data = dict(__metadata__=metadata), b""
        for name, weight in network.transformer.named_parameters():
            if layout == "plain" and name.startswith("h."):
                weight = weight.t()  # transformers keeps (in, out)
            raw = weight.detach().contiguous().numpy().tobytes()
            offsets = [len(data), len(data) + len(raw)]
            name = name if layout == "plain" else f"transformer.{name}"
            header[name] = dict(dtype="F32", shape=list(weight.shape), data_offsets=offsets)
            data += raw
        files[layout] = join_file(header, data)
    return network, characters, files


@pytest.mark.parametrize("layout", ["plain", "exported"])
def test_logits_surprise_and_attention(page, large_logits, layout):
    """Catches a wrong network, a transposed matrix, and views of something else."""
    network, characters, files = large_logits
    load(page, files[layout])
    text = "the dog saw Watson at home, and the"
    page.fill("#text", text)
    page.check("[value=attention]", force=True)
    page.select_option("#Layer-choice", index=1)
    page.select_option("#Head-choice", index=1)
    settled(page)
    ids = torch.tensor([[characters.index(c) for c in text]])
    with torch.no_grad():
        theirs = network(ids, output_attentions=True)
    rows = page.evaluate("text.ids.map((_, p) => Array.from(text.rows.get(p + 1)))")
    assert theirs.logits.abs().max() > 15
    assert (torch.tensor(rows) - theirs.logits[0]).abs().max() < 1e-4
    weights = torch.tensor(page.evaluate("Array.from(text.attention.weights)")).view(len(text), -1)
    assert (weights - theirs.attentions[1][0, 0]).abs().max() < 1e-5
    losses = theirs.logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0] / -0.693147181
    assert (torch.tensor(page.evaluate("text.bits.slice(1)")) - losses).abs().max() < 1e-4


def test_greedy_text_equals_the_script(page, tiny):
    """Catches another rule for full contexts, or for the unknown characters of a prompt."""
    prompt = "“the dóg” SAW☃ the"
    command = [sys.executable, ROOT / "anexagpt.py", "generate", prompt, "--model", tiny]
    command += ["-n", "600", "--temperature", "0"]
    environment = os.environ | dict(PYTHONIOENCODING="utf-8")
    result = subprocess.run(command, capture_output=True, timeout=120, env=environment)
    load(page, tiny)
    written = write(page, prompt, temperature=0, max_new=600)
    assert written + "\n" == result.stdout.decode().replace("\r\n", "\n") and len(written) > 600
    page.fill("#text", prompt)
    notice = page.inner_text("#status")
    assert notice.strip("()") in result.stderr.decode() and "ó as o" in notice and "☃" in notice


OFF = dict(repetition_penalty=1.0, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
ALL = dict(repetition_penalty=0.8, temperature=1.3, top_k=9, top_p=0.9, min_p=0.05)


@pytest.mark.parametrize("on", [["repetition_penalty"], ["top_k"], ["top_p"], list(ALL)])
def test_settings(page, on):
    """Catches another meaning or order of settings than in transformers, and a drawn U+FFFD."""
    from transformers.generation import logits_process as theirs

    cfg = OFF | {name: ALL[name] for name in on}
    logits = torch.randn(1, 30, generator=torch.Generator().manual_seed(2)) * 3
    ids, expected = torch.tensor([[3, 5, 5, 17, 29]]), logits.clone()
    expected[0, 0] = -torch.inf
    processors = "RepetitionPenaltyLogitsProcessor TemperatureLogitsWarper TopKLogitsWarper "
    processors = (processors + "TopPLogitsWarper MinPLogitsWarper").split()
    for name, processor in zip(ALL, processors, strict=True):
        if name in on:
            expected = getattr(theirs, processor)(ALL[name])(ids, expected)
    arguments = json.dumps([logits[0].tolist(), cfg, [int(i in ids) for i in range(30)]])
    ours = page.evaluate(f"Array.from(distribution(...{arguments}))")
    assert (torch.tensor(ours) - expected[0].softmax(-1)).abs().max() < 1e-5


def test_draws(page, tiny):
    """Catches a seed that does not repeat a text, and characters drawn too often or seldom."""
    load(page, tiny)
    first, again = (write(page, "the dog", seed=7) for _ in range(2))
    assert first == again != write(page, "the dog", seed=8) and len(first) == 307
    draw = (
        "const random = randomSource(3); return ids.map(() => sample([0, 0.5, 0.3, 0.2], random()))"
    )
    drawn = torch.tensor(page.evaluate(f"(ids) => {{ {draw} }}", [0] * 100_000))
    assert [round(n / 1e5, 2) for n in drawn.bincount().tolist()] == [0, 0.5, 0.3, 0.2]


def changed(content: bytes, entry: str = "__metadata__", **fields) -> bytes:
    """A model file with other fields in an entry of its header."""
    header, data = split_file(content)
    header[entry] |= fields
    return join_file(header, data)


SPOILT = {  # name: what makes it of a good file, and a part of the reason
    "empty": (lambda f: b"", "too short"),
    "text": (lambda f: b"this is no model at all, but a letter", "impossible length"),
    "random": (lambda f: bytes(torch.randint(256, (5000,)).tolist()), "impossible length"),
    "huge": (lambda f: struct.pack("<Q", 2**63) + f[8:], "impossible length"),
    "cut off": (lambda f: f[:-100], "cut off"),
    "one byte more": (lambda f: f + b"\0", "too many"),
    "not UTF-8": (lambda f: f[:9] + b"\xff" + f[10:], "header is not JSON"),
    "a list": (lambda f: join_file([1, 2]), "no metadata"),
    "deep": (lambda f: join_file(b"[" * 200_000 + b"]" * 200_000), "metadata"),
    "checkpoint": (lambda f: changed(f, format="checkpoint"), "checkpoint"),
    "version": (lambda f: changed(f, format_version=MARKUP), "format_version is <img src=x"),
    "history": (lambda f: changed(f, history="[[2, 1, 1], [1, 1, 1]]"), "history is malformed"),
    "NaN": (lambda f: changed(f, validation_loss="NaN"), "validation_loss is not JSON"),
    "no loss": (lambda f: changed(f, validation_loss="null"), "validation_loss is not of"),
    "sha256": (lambda f: changed(f, data='{"name": "x", "sha256": "0"}'), "no sha256"),
    "config": (lambda f: changed(f, config='{"__proto__": 1}'), "other entries"),
    "order": (lambda f: changed(f, characters='"\\ufffdba"'), "in order"),
    "surrogate": (lambda f: changed(f, characters='"\\ufffdab\\ud800"'), "in order"),
    "vocabulary": (lambda f: changed(f, characters='"\\ufffdab"'), "3 characters"),
    "shape": (lambda f: changed(f, "wte.weight", shape=[16, 99]), "wte.weight is missing"),
    "overlap": (lambda f: changed(f, "ln_f.bias", data_offsets=[0, 64]), "overlap"),
    "offsets": (lambda f: changed(f, "ln_f.bias", data_offsets=MARKUP), "impossible data_offsets"),
    "not finite": (lambda f: f[:-4] + struct.pack("<f", float("nan")), "not finite"),
    "overflow": (lambda f: f[:-4] + struct.pack("<f", 1e30), "not finite"),
}  # fmt: skip


@pytest.mark.parametrize("case", SPOILT)
def test_spoilt_files(page, tiny, case):
    """Catches a bad file that is opened, breaks the page or its model, or whose markup runs."""
    (spoil, reason), good = SPOILT[case], tiny.read_bytes()
    occupied = case in ("cut off", "a list")
    if occupied:
        load(page, good)
    load(page, spoil(good), f"{MARKUP}\u202e\n.safetensors")
    page.wait_for_selector("#error:visible")
    message = page.inner_text("#error")
    assert reason in message and message.startswith("<img src=x"), message
    assert not re.search("[\n\u202e]", message) and len(message) < 400
    assert page.evaluate("window.ran === undefined && !document.querySelector('#error *, img')")
    assert page.is_visible("#drop") != occupied and page.is_visible("#workspace") == occupied
    assert not occupied or len(write(page, "the dog")) == 307


def test_markup_in_a_good_file(page, tiny):
    """Catches names whose markup, bidirectional or control characters act."""
    data = dict(names=[MARKUP, "a\u202e\x00b"], sha256="0" * 64, characters=9)
    training = {MARKUP: MARKUP, "__proto__": [MARKUP]}
    load(page, changed(tiny.read_bytes(), data=json.dumps(data), training=json.dumps(training)))
    about = page.text_content("#about")
    assert MARKUP in about and "a\\u202e\\x00b" in about and "\u202e" not in about
    assert page.evaluate("window.ran === undefined && !document.querySelector('#about img')")


def test_no_connection(page, tiny):
    """Catches a page that could send what it reads; the fixture catches one that does."""
    load(page, tiny)
    write(page, "the dog")
    blocked, requested = [], page.requests.copy()
    page.on("requestfailed", lambda request: blocked.append(request.failure))
    new = "new Promise((a, b) => Object.assign(new %s, {onload: a, onopen: a, onerror: b, %s}))"
    for attempt in (
        "fetch('https://example.com/')",
        "import('https://example.com/x.js')",
        new % ("Image()", "src: 'https://example.com/x.png'"),
        new % ("WebSocket('wss://example.com')", ""),
        "new Promise((a, b) => setTimeout(() => { try { a(eval('1')) } catch (e) { b(e) } }))",
    ):
        with pytest.raises(Error):
            page.evaluate(attempt)
    page.wait_for_timeout(100)
    assert blocked and set(blocked) == {"csp"}
    page.requests[:] = requested
    source = PAGE.read_text(encoding="utf-8")
    assert not re.search(r"innerHTML|insertAdjacent|document\.write|outerHTML *=", source)


def test_saved_page(browser, page, tiny, tmp_path):
    """Catches a saved page that needs the network or another file, or writes another text."""

    def save(opened, name):
        with opened.expect_download() as download:
            opened.click("#save")
        assert download.value.suggested_filename == "model.html"
        download.value.save_as(tmp_path / name)
        return tmp_path / name

    load(page, tiny)
    expected, saved = write(page, "the dog", temperature=0), save(page, "friend.html")
    with browser.new_page(offline=True) as friend:  # in a context of its own
        friend.goto(saved.as_uri())
        friend.wait_for_selector("#workspace:visible")
        assert write(friend, "the dog", temperature=0) == expected
        assert friend.locator("a:visible").count() == 0  # the pages behind them are not there
        assert save(friend, "again.html").read_bytes() == saved.read_bytes()


def test_keyboard_alone(page, tiny):
    """Catches a control that needs a mouse: from a prompt to each view and one step, with keys."""
    load(page, tiny)
    page.keyboard.type("the dog")  # the text has the focus
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#go:text-is('Continue')")
    for _ in range(4):
        page.keyboard.press("ArrowLeft")
    assert "in percent" in settled(page) and page.evaluate("caretPlace()") == 303
    while page.evaluate("document.activeElement.type") != "radio":
        page.keyboard.press("Tab")
    for word in ("bits/char", "attends most to", "random number"):
        page.keyboard.press("ArrowRight")
        assert word in settled(page)
    page.keyboard.press("Tab")  # the link
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert "points at" in settled(page) and page.evaluate("text.ids.length") == 308


def test_controls_and_stop(page, tiny):
    """Catches bars that do not follow a control, a value out of range that is used, a late Stop."""
    load(page, tiny)
    page.fill("#text", "the dog ")
    settled(page)
    columns = page.locator("#view thead th")
    assert columns.all_inner_texts() == ["next", "model", "temperature 0.7"]
    page.fill("#set-top_k", "2")
    page.fill("#set-temperature", "1")
    settled(page)
    assert columns.all_inner_texts() == ["next", "model", "top-k 2"]
    left = [t for t in page.locator("#view td:last-child").all_inner_texts() if t != "–"]
    assert len(left) == 2 and sum(map(float, left)) == pytest.approx(100, abs=0.2)
    page.fill("#set-top_p", "1.5")
    assert "top-p 1.5: must be from 0 to 1" in page.inner_text("#status")
    assert page.evaluate("cfg.top_p") == 1
    page.fill("#set-max_new", "20000")
    page.evaluate(
        """() => {
        document.querySelector("#go").click()
        const escape = new KeyboardEvent("keydown", {key: "Escape", bubbles: true})
        setTimeout(() => document.querySelector("#text").dispatchEvent(escape), 50)
        }"""
    )
    page.wait_for_selector("#go:text-is('Continue')")
    assert len(page.input_value("#text")) < 20_000


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_accessibility(page, tiny, scheme):
    """Catches missing labels, too little contrast (axe-core), and content wider than a phone."""
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size(dict(width=360, height=740))

    def check():
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        violations = Axe().run(page).response["violations"]
        assert not [(v["id"], v["nodes"][0]["html"]) for v in violations]

    load(page, b"this is no model")
    check()
    load(page, tiny)
    page.wait_for_selector("#workspace:visible")
    write(page, "the dog")
    for view in ("next", "surprise", "attention", "step"):
        page.check(f"[value={view}]", force=True)
        settled(page)
        check()


def test_links():
    """Catches a link to a page or a heading that is not there."""
    links = re.findall(r'"([\w.]+\.md)#([\w-]+)"', PAGE.read_text(encoding="utf-8"))
    for name, anchor in links:
        text = (PAGE.parent / name).read_text(encoding="utf-8")
        headings = re.findall(r"(?m)^#+ (.+)$", text)
        assert anchor in {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
    assert len(links) == 4
