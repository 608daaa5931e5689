"""Browser: docs/browser.html in a real Chromium, against transformers, PyTorch and the script."""

import base64
import json
import math
import re
import shutil
import struct
import sys
import unicodedata
from contextlib import contextmanager

import pytest
import torch
from axe_playwright_python.sync_playwright import Axe
from conftest import ROOT
from playwright.sync_api import Error, sync_playwright
from test_terminal import random_model

import anexagpt

sys.path.insert(0, str(ROOT / "docs"))
import browser as builder

PAGE = ROOT / "docs" / "browser.html"
NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
ARGUMENTS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
ARGUMENTS += " --disable-background-networking --disable-component-update"
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=f"none of {', '.join(NAMES)} is here")
MARKUP = "<img src=x onerror='window.ran=1'><script>window.ran=1</script>"


@pytest.fixture(scope="module")
def chromium():
    with sync_playwright() as playwright:
        options = dict(executable_path=CHROMIUM, args=ARGUMENTS.split())
        with playwright.chromium.launch(**options) as chromium:
            yield chromium


@contextmanager
def new_tab(chromium, **options):
    """A tab with a context of its own; it may have no error."""
    with chromium.new_page(offline=True, **options) as tab:
        tab.set_default_timeout(20_000)
        tab.errors, tab.requests = [], []
        tab.on("pageerror", lambda error: tab.errors.append(error))
        tab.on("request", lambda request: tab.requests.append(request.url))
        yield tab
        assert not tab.errors


@pytest.fixture(scope="module")
def tab(chromium):
    with new_tab(chromium) as tab:
        yield tab


@pytest.fixture
def page(tab):
    """The page, just opened. It may have no error and request only itself and its workers."""
    tab.errors.clear()
    tab.requests.clear()
    tab.emulate_media(media="screen", color_scheme="light", forced_colors="none")
    tab.set_viewport_size(dict(width=1280, height=800))
    tab.goto("about:blank")
    tab.goto(PAGE.as_uri())
    yield tab
    assert not tab.errors
    assert all(url.startswith(("about:", "blob:", PAGE.as_uri())) for url in tab.requests)


def load(page, model, name: str = "model.safetensors") -> None:
    """Open a model, a path or bytes, as the file dialogue does."""
    if isinstance(model, bytes) or model.name != name:
        content = model if isinstance(model, bytes) else model.read_bytes()
        model = dict(name=name, mimeType="", buffer=content)
    page.set_input_files("#file", model)
    page.wait_for_function("() => mode === 'idle' && !($('workspace').hidden && $('error').hidden)")


def write(page, prompt: str, **settings) -> str:
    """Text of the page after it has continued a prompt."""
    for name, value in settings.items():
        page.fill(f"#set-{name}", str(value))
    page.fill("#text", prompt)
    page.click("#go")
    page.wait_for_function("() => mode === 'idle'")
    return page.input_value("#text")


def start_writing(page, **settings) -> None:
    """Start a text that is long enough for a test to do something meanwhile."""
    page.fill("#set-max_new", "20000")
    for name, value in settings.items():
        page.fill(f"#set-{name}", str(value))
    page.click("#go")
    page.wait_for_function("() => text.ids.length > 5")


def see(page, view: str) -> str:
    """Text of a view, when the page has computed and drawn all that it wants to show."""
    page.check(f"[value={view}]", force=True)
    return settled(page)


def settled(page) -> str:
    """Text of the view when the page has computed and drawn all that it wants to show."""
    page.evaluate(
        """async () => {
            for (let calm = 0; calm < 3; calm = pending || mode !== "idle" ? 0 : calm + 1)
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
    """Network of transformers whose logits reach 15, its characters, and its file by layout.

    11 channels in a head and an odd vocabulary leave a rest for every kernel.
    """
    import transformers

    metadata = split_file(tiny.read_bytes())[0]["__metadata__"]
    characters = json.loads(metadata["characters"])
    characters += "" if len(characters) % 2 else "€"
    shape = dict(vocab_size=len(characters), n_layer=3, n_head=2, n_embd=22)
    options = dict(activation_function="gelu_new", attn_implementation="eager", bos_token_id=None)
    config = transformers.GPT2Config(n_positions=40, eos_token_id=None, **shape, **options)
    network = transformers.GPT2LMHeadModel(config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in network.parameters():
            weight.copy_(torch.randn_like(weight) * (0.35 if weight.dim() == 2 else 0.5))
        network.transformer.wte.weight.mul_(8)
    metadata["config"] = json.dumps(shape | dict(block_size=40, dropout=0.0))
    metadata["characters"] = json.dumps(characters)
    weights = dict(network.transformer.named_parameters())
    plain = {n: w.t() if n.startswith("h.") and w.dim() == 2 else w for n, w in weights.items()}
    wrong = {name: torch.zeros_like(weight) for name, weight in plain.items()}
    tensors = dict(
        plain=plain,
        exported={f"transformer.{name}": weight for name, weight in weights.items()},
        checkpoint={f"best.{n}": w for n, w in plain.items()}
        | {f"ema.{n}": w for n, w in wrong.items()}
        | {f"model.{n}": w for n, w in wrong.items()},
        young={f"ema.{n}": w for n, w in plain.items()} | dict(loss_sum=torch.zeros(1)),
    )
    return network, characters, {name: model_file(metadata, t) for name, t in tensors.items()}


def model_file(metadata: dict, tensors: dict) -> bytes:
    header, data = dict(__metadata__=metadata), b""
    for name, weight in tensors.items():
        raw = weight.detach().contiguous().numpy().tobytes()
        offsets = [len(data), len(data) + len(raw)]
        header[name] = dict(dtype="F32", shape=list(weight.shape), data_offsets=offsets)
        data += raw
    return join_file(header, data)


@pytest.fixture(scope="module")
def without_simd(chromium, tmp_path_factory):
    """The page in a tab whose policy forbids WebAssembly."""
    path = tmp_path_factory.mktemp("policy") / "browser.html"
    path.write_text(PAGE.read_text(encoding="utf-8").replace(" 'wasm-unsafe-eval'", ""), "utf-8")
    with new_tab(chromium) as tab:
        tab.goto(path.as_uri())
        yield tab


LOOK = "(p) => new Promise((done) => request('look', reading(p), ({ look }) => done(look)))"


@pytest.mark.parametrize("layout", ["plain", "exported", "checkpoint", "young", "without SIMD"])
def test_network(request, page, large_logits, layout):
    """Catches a wrong network or kernel, other weights of a file, and a wrong look inside it."""
    network, characters, files = large_logits
    if layout == "without SIMD":
        page = request.getfixturevalue("without_simd")
    load(page, files.get(layout, files["plain"]))
    kind = "plain JavaScript" if layout == "without SIMD" else "WebAssembly with SIMD"
    assert kind in page.inner_text("#about")
    text = "the dog saw Watson at home, and the"
    page.fill("#text", text)
    settled(page)
    ids = torch.tensor([[characters.index(c) for c in text]])
    with torch.no_grad():
        theirs = network(ids, output_attentions=True, output_hidden_states=True)
        states = theirs.hidden_states[:-1]  # of the last one transformers has taken ln_f already
        lens = [network.lm_head(network.transformer.ln_f(state))[0] for state in states]
        lens.append(theirs.logits[0])
    assert theirs.logits.abs().max() > 15
    shape = dict(L=3, H=2)
    for p in (1, 2, 17, len(text)):
        look = page.evaluate(LOOK, p)
        assert (torch.tensor(look["logits"]) - theirs.logits[0, p - 1]).abs().max() < 1e-4
        for ours, expected in zip(look["lens"], lens, strict=True):
            assert (torch.tensor(ours) - expected[p - 1]).abs().max() < 1e-4
        heads = torch.tensor(look["heads"]).view(shape["L"], shape["H"], p)
        expected = torch.stack(theirs.attentions)[:, 0, :, p - 1, :p]
        assert (heads - expected).abs().max() < 1e-5
        width = min(p, 32)
        maps = torch.tensor(look["maps"]).view(shape["L"], shape["H"], width, width)
        expected = torch.stack(theirs.attentions)[:, 0, :, p - width : p, p - width : p]
        assert (maps - expected).abs().max() < 1e-5


def test_kernels():
    """Catches kernels in the page that are not those of the readable file."""
    assert builder.kernels_page() == PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("text", ["a", "the dog", "a cat said no. " * 6])
def test_surprise(page, tiny, text):
    """Catches another definition: a text is read after one line end, in generation's contexts."""
    model = anexagpt.load(tiny)
    characters, T = json.loads(split_file(tiny.read_bytes())[0]["__metadata__"]["characters"]), 16
    text = "".join(c for c in text if c in characters)
    ids, expected = torch.tensor([characters.index(c) for c in "\n" + text]), []
    for n in range(1, len(ids)):
        half = T // 2
        start = 0 if n <= T else math.ceil((n - T) / half) * half
        with torch.no_grad():
            logits = model.network(ids[None, start:n])[0, -1]
        expected.append(-logits.double().log_softmax(-1)[ids[n]].item() / math.log(2))
    load(page, tiny)
    page.fill("#text", text)
    shown = see(page, "surprise")
    assert page.evaluate("text.bits") == pytest.approx(expected, abs=1e-4)
    assert f"{len(text)} character" in shown and f"{sum(expected):.1f} bits" in shown
    page.focus("#text")
    page.keyboard.press("Control+Home")
    page.keyboard.press("ArrowLeft")  # beyond the first character: it stays there
    settled(page)
    assert f"{expected[0]:.1f} bits" in page.inner_text("#detail")


def test_greedy_text_equals_the_script(page, tiny, cli):
    """Catches another rule for full contexts, or for the unknown characters of a prompt."""
    prompt = "“the dóg” SAW☃ the"
    result = cli("generate", prompt, "--model", tiny, "-n", 600, "--temperature", 0)
    load(page, tiny)
    written = write(page, prompt, temperature=0, max_new=600)
    assert written + "\n" == result.out and len(written) > 600
    page.fill("#text", prompt)
    notice = page.inner_text("#status")
    assert notice.strip("()") in result.err and "ó as o" in notice and "☃" in notice


OFF = dict(repetition_penalty=1.0, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
ALL = dict(repetition_penalty=0.8, temperature=1.3, top_k=9, top_p=0.9, min_p=0.05)


def test_settings(page):
    """Catches another meaning or order of settings than in transformers, and a drawn U+FFFD."""
    for on in (["repetition_penalty"], ["top_k"], ["top_p"], [*ALL]):
        assert difference(page, on) < 1e-5, on


def difference(page, on: list[str]) -> float:
    """The largest between probabilities by the page and by transformers, with these settings."""
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
    return (torch.tensor(ours) - expected[0].softmax(-1)).abs().max().item()


def test_draws(page, tiny):
    """Catches a seed that does not repeat a text, and characters drawn too often or seldom."""
    load(page, tiny)
    first, again = (write(page, "the dog", seed=7) for _ in range(2))
    assert first == again != write(page, "the dog", seed=8) and len(first) == 307
    script = """(n) => {
        const random = randomSource(3), counts = [0, 0, 0, 0];
        for (let i = 0; i < n; i++) counts[sample([0, 0.5, 0.3, 0.2], random())]++;
        return counts;
    }"""
    drawn = page.evaluate(script, 100_000)
    assert [round(n / 1e5, 2) for n in drawn] == [0, 0.5, 0.3, 0.2]


def changed(content: bytes, entry: str = "__metadata__", **fields) -> bytes:
    """A model file with other fields in an entry of its header."""
    header, data = split_file(content)
    header[entry] |= fields
    return join_file(header, data)


SPOILT = {  # name: what makes it of a good file, and a part of the page's reason
    "empty": (lambda f: b"", "too short"),
    "text": (lambda f: b"this is no model at all, but a letter", "impossible length"),
    "random": (lambda f: bytes(torch.randint(256, (5000,)).tolist()), "impossible length"),
    "huge": (lambda f: struct.pack("<Q", 2**63) + f[8:], "impossible length"),
    "cut off": (lambda f: f[:-100], "cut off"),
    "one byte more": (lambda f: f + b"\0", "too many"),
    "not UTF-8": (lambda f: f[:9] + b"\xff" + f[10:], "header is not JSON"),
    "a list": (lambda f: join_file([1, 2]), "no metadata"),
    "deep": (lambda f: join_file(b"[" * 200_000 + b"]" * 200_000), "header is not JSON"),
    "version": (lambda f: changed(f, format_version=MARKUP), "format_version is <img src=x"),
    "history": (lambda f: changed(f, history="[[2, 1, 1], [1, 1, 1]]"), "history is malformed"),
    "step": (lambda f: changed(f, step="1000000000000000"), "step is not of the right type"),
    "infinite": (lambda f: changed(f, training='{"a": [-1e999]}'), "training is not JSON"),
    "no number": (lambda f: field(f, "training", max_steps=None), "max_steps is out of range"),
    "more data": (lambda f: field(f, "data", more=0), "or more than these"),
    "large header": (lambda f: padded(f, 8_388_609), "impossible length"),
    "dtype": (lambda f: tensor(renamed(f, "ema."), "loss_sum", dtype="F4"), "impossible dtype"),
    "sizes": (lambda f: tensor(renamed(f, "ema."), "loss_sum", shape=[-1, 0]), "impossible"),
    "places": (lambda f: changed(f, "ln_f.bias", data_offsets=[0, 64, 64]), "impossible dtype"),
    "null": (lambda f: tensor(renamed(f, "ema."), "loss_sum", shape=None), "impossible"),
    "future": (lambda f: changed(f, history="[[151, 1, 1]]"), "history is malformed"),
    "max_steps": (lambda f: field(f, "training", max_steps=10**8 + 1), "max_steps is out of range"),
    "init": (lambda f: field(f, "training", init=5), "init is not"),
    "block_size": (lambda f: field(f, "config", block_size=4097), "block_size is out of range"),
    "dropout": (lambda f: field(f, "config", dropout=0.95), "dropout is out of range"),
    "no dropout": (lambda f: field(f, "config", dropout=None), "dropout is out of range"),
    "no names": (lambda f: field(f, "data", names=[]), "no name"),
    "one more tensor": (lambda f: tensor(f, "h.9.ln_1.bias"), "not those of its config"),
    "NaN": (lambda f: changed(f, validation_loss="NaN"), "validation_loss is not JSON"),
    "setting": (lambda f: changed(f, training='{"seed": NaN}'), "training is not JSON"),
    "loss": (lambda f: changed(f, validation_loss='"1"'), "validation_loss is not of"),
    "sha256": (lambda f: changed(f, data='{"name": "x", "sha256": "0"}'), "no sha256"),
    "config": (lambda f: changed(f, config='{"__proto__": 1}'), "other entries"),
    "order": (lambda f: changed(f, characters='"\\ufffdba"'), "in order"),
    "surrogate": (lambda f: changed(f, characters='"\\ufffdab\\ud800"'), "in order"),
    "vocabulary": (lambda f: changed(f, characters='"\\ufffdab"'), "3 characters"),
    "shape": (lambda f: changed(f, "wte.weight", shape=[16, 99]), "wte.weight has an impossible"),
    "transposed": (lambda f: transposed(f, "wte.weight"), "wte.weight is missing"),
    "overlap": (lambda f: changed(f, "ln_f.bias", data_offsets=[0, 64]), "overlap"),
    "offsets": (lambda f: changed(f, "ln_f.bias", data_offsets=MARKUP), "ln_f.bias has an"),
    "not finite": (lambda f: f[:-4] + struct.pack("<f", float("nan")), "not finite"),
    "overflow": (lambda f: f[:-4] + struct.pack("<f", 1e30), "not finite"),
}  # fmt: skip
UNUSUAL = {  # what both open
    "no loss": lambda f: changed(f, validation_loss="null"),
    "no history": lambda f: changed(f, history="[]"),
    "history from step 0": lambda f: changed(f, history="[[0, 1, 1]]"),
    "max_steps": lambda f: field(f, "training", max_steps=10**8),
    "no max_steps": lambda f: changed(f, training="{}"),
    "one name": lambda f: field(f, "data", name="text.txt"),
    "dropout": lambda f: field(f, "config", dropout=0.9),
    "old": lambda f: changed(f, config=json.dumps(shape_without_dropout(f))),
    "checkpoint": lambda f: changed(renamed(f, "best."), format="checkpoint"),
    "young checkpoint": lambda f: tensor(renamed(f, "ema."), "loss_sum"),
    "another dtype": lambda f: tensor(renamed(f, "ema."), "loss_sum", dtype="F64"),
    "large header": lambda f: padded(f, 8_388_608),
}  # fmt: skip


def field(content: bytes, of: str, **values) -> bytes:
    """A model file with other values in one field of its metadata."""
    old = json.loads(split_file(content)[0]["__metadata__"][of])
    return changed(content, **{of: json.dumps(old | values)})


def shape_without_dropout(content: bytes) -> dict:
    config = json.loads(split_file(content)[0]["__metadata__"]["config"])
    return {name: value for name, value in config.items() if name != "dropout"}


def tensor(content: bytes, name: str, dtype="F32", shape=(0,)) -> bytes:
    """A model file with one more tensor, an empty one at its end."""
    header, data = split_file(content)
    header[name] = dict(dtype=dtype, shape=shape, data_offsets=[len(data), len(data)])
    return join_file(header, data)


def transposed(content: bytes, name: str) -> bytes:
    header, data = split_file(content)
    header[name]["shape"].reverse()
    return join_file(header, data)


def padded(content: bytes, n: int) -> bytes:
    """A model file whose header has n bytes."""
    end = 8 + int.from_bytes(content[:8], "little")
    return struct.pack("<Q", n) + content[8:end].ljust(n) + content[end:]


def renamed(content: bytes, prefix: str) -> bytes:
    header, data = split_file(content)
    metadata = header.pop("__metadata__")
    tensors = {prefix + name: tensor for name, tensor in header.items()}
    return join_file(dict(__metadata__=metadata) | tensors, data)


def test_unusual_files(page, tiny, tmp_path):
    """Catches a file that the script opens and the page refuses."""
    path = random_model(tiny, tmp_path / "m.safetensors", "abc", block_size=256).path
    shape = json.loads(split_file(path.read_bytes())[0]["__metadata__"]["config"])
    del shape["block_size"]  # has a default
    defaults = changed(path.read_bytes(), config=json.dumps(shape))
    for name, value in page.evaluate("DEFAULT_CONFIG").items():
        assert anexagpt.GPTConfig.__dataclass_fields__[name].default == value
    for case, change in [*UNUSUAL.items(), ("defaults", lambda f: defaults)]:
        content = change(tiny.read_bytes())
        (tmp_path / "model.safetensors").write_bytes(content)
        anexagpt.load(tmp_path / "model.safetensors")
        page.evaluate("$('workspace').hidden = true")  # that of the file before
        load(page, tmp_path / "model.safetensors")
        assert page.is_visible("#workspace") and not page.is_visible("#error"), case


def refuse(page, case: str, good: bytes, tmp_path) -> None:
    """Open a spoilt file with page and script: both say why not, and it does nothing."""
    spoil, reason = SPOILT[case]
    content = spoil(good)
    path = tmp_path / f"{MARKUP.replace('/', '')}\u202e\n.safetensors"
    path.write_bytes(content)
    with pytest.raises(anexagpt.UserError):
        anexagpt.load(path)
    page.evaluate("showError('')")  # that of the file before
    load(page, path, path.name)
    message = page.evaluate("$('error').hidden ? '' : $('error').innerText")
    assert reason in message and message.startswith("<img src=x"), (case, message)
    assert not re.search("[\n\u202e]", message) and len(message) < 400, case
    script = "window.ran === undefined && !document.querySelector('#error *, img')"
    assert page.evaluate(script), case


def test_spoilt_files(page, tiny, tmp_path):
    """Catches a bad file that page or script opens, that breaks the page, or whose markup runs."""
    for case in SPOILT:
        refuse(page, case, tiny.read_bytes(), tmp_path)
        assert page.is_visible("#drop") and not page.is_visible("#workspace"), case


@pytest.mark.parametrize("case", ["cut off", "a list"])
def test_spoilt_file_beside_a_model(page, tiny, tmp_path, case):
    """Catches a bad file that takes the place of a model, or an error that stays."""
    load(page, tiny)
    page.fill("#text", "the")
    refuse(page, case, tiny.read_bytes(), tmp_path)
    assert page.is_visible("#workspace") and not page.is_visible("#drop")
    page.click("#go")
    page.wait_for_function("() => mode === 'idle' && text.ids.length === 303")
    assert not page.is_visible("#error")
    script = "$('text').value = 'the dog'; onInput(); openModel(new File(['x'], 'y'))"
    page.evaluate(script)  # before the views are ready
    assert "in percent" in settled(page) and page.is_visible("#error")
    page.click("#undo")
    assert not page.is_visible("#error")


def test_two_files_at_once(page, tiny, tmp_path):
    """Catches a model that the worker uses and the page does not: read while a bad file came."""
    other = random_model(tiny, tmp_path / "other.safetensors", "abcdefg").path
    load(page, tiny)
    page.evaluate(
        """async ([bytes]) => {
            openModel(new File([Uint8Array.from(bytes)], "other.safetensors"));
            const end = performance.now() + 300; // the answer waits
            while (performance.now() < end);
            await openModel(new File(["x"], "bad"));
        }""",
        [[*other.read_bytes()]],
    )
    assert page.is_visible("#error")
    page.fill("#text", "the dog")
    settled(page)
    n = page.evaluate("[look.logits.length, model.config.vocab_size]")
    assert n[0] == n[1]


def test_markup_in_a_good_file(page, tiny):
    """Catches names whose markup, bidirectional or control characters act."""
    data = dict(names=[MARKUP, "a\u202e\x00b"], sha256="0" * 64, characters=9)
    training = {MARKUP: MARKUP, "__proto__": [MARKUP]}
    load(page, changed(tiny.read_bytes(), data=json.dumps(data), training=json.dumps(training)))
    about = page.text_content("#about")
    assert MARKUP in about and "a\\u202e\\x00b" in about and "\u202e" not in about
    assert page.evaluate("window.ran === undefined && !document.querySelector('#about img')")


@pytest.mark.parametrize("n", [0, 1, 2, 10_000])
def test_loss_curve(page, tiny, n):
    """Catches a chart of other losses, of too many points, of none, and of one without a range."""
    history = [[step, 4 - 3 * (step - 1) / max(n - 1, 1), 2.5] for step in range(1, n + 1)]
    load(page, changed(tiny.read_bytes(), history=json.dumps(history), step=str(max(n, 1))))
    assert page.locator("svg").count() == (n > 0)
    curves = page.locator("polyline").evaluate_all(
        "c => c.map(c => Array.from(c.points, p => [p.x, p.y]))"
    )
    for points in curves:
        assert points[0] == points[1] and min(n, 400) < len(points) < 600
    if n > 1:
        (x, low), (_, high) = curves[0][0], curves[0][-1]  # from the last step to the first
        middle = (low + high) / 2
        assert x == 230 and high == 10 and low == 110
        assert all(y == pytest.approx(middle, abs=0.1) for _, y in curves[1])
        assert "training 1.00, validation 2.50" in page.get_attribute("svg", "aria-label")


def test_no_connection(page, tiny):
    """Catches a page that could send what it reads; the fixture catches one that does."""
    load(page, tiny)
    write(page, "the dog")
    requested = page.requests.copy()
    page.evaluate("""() => {
        window.blocked = [];
        document.addEventListener("securitypolicyviolation", (e) => blocked.push(e.blockedURI));
    }""")
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
    page.wait_for_function("() => blocked.length >= 5")
    site = "https://example.com/"
    expected = [site, f"{site}x.js", f"{site}x.png", "wss://example.com/", "eval"]
    assert page.evaluate("blocked") == expected
    page.requests[:] = requested
    source = PAGE.read_text(encoding="utf-8")
    assert not re.search(r"innerHTML|insertAdjacent|document\.write|outerHTML *=", source)


def save(page, path):
    with page.expect_download() as download:
        page.click("#save")
    assert download.value.suggested_filename == "model.html"
    download.value.save_as(path)
    return path


def test_saved_page(chromium, page, tiny, tmp_path):
    """Catches a saved page that needs the network or another file, or writes another text."""
    load(page, tiny)
    expected, saved = write(page, "the dog", temperature=0), save(page, tmp_path / "friend.html")
    with new_tab(chromium) as friend:
        friend.goto(saved.as_uri())
        friend.wait_for_selector("#workspace:visible")
        assert write(friend, "the dog", temperature=0) == expected
        assert friend.locator("a:visible").count() == 0  # the pages behind them are not there
        assert save(friend, tmp_path / "again.html").read_bytes() == saved.read_bytes()


def test_saved_page_has_no_secrets(page, tiny, tmp_path):
    """Catches user, password, query and folders in a file that is meant to be mailed."""
    names = ["https://ann:secret@example.com/books/a.txt?token=secret#secret", r"C:\secret\b.txt"]
    content = field(tiny.read_bytes(), "data", names=[*names, "/home/secret/c/"])
    for name in ("https:/ann:secret@example.com/e.txt", "git+https://secret@example.com/f?secret"):
        public = page.evaluate("publicName", name)
        assert public == name.rpartition("/")[2].removesuffix("?secret")
    load(page, field(content, "training", init="/home/secret/d.safetensors"))
    saved = save(page, tmp_path / "model.html").read_text(encoding="utf-8")
    inside = base64.b64decode(re.search('<script id="model"[^>]*>([^<]*)<', saved)[1])
    assert b"secret" not in inside and "secret" not in saved
    (tmp_path / "model.safetensors").write_bytes(inside)
    model = anexagpt.load(tmp_path / "model.safetensors")
    assert model.metadata.data.names == ["a.txt", "b.txt", "c"]
    assert model.metadata.training["init"] == "d.safetensors"


def test_large_saved_page(page):
    """Catches the slow way from base64 to bytes, whose stack a file of 128 MiB breaks."""
    script = """(n) => {
        const text = "AAEC".repeat(n / 3), start = performance.now(), bytes = fromBase64(text);
        const middle = performance.now(), code = (c) => c.charCodeAt(0);
        const slow = Uint8Array.from(atob(text), code);
        const ratio = (performance.now() - middle) / (middle - start);
        return [bytes.length, bytes[1], bytes[n - 1], slow.length, ratio];
    }"""
    length, second, last, same, ratio = page.evaluate(script, 6_000_000)
    assert (length, second, last, same) == (6_000_000, 1, 2, length) and ratio > 3


def test_views_while_it_writes(page, tiny):
    """Catches views that stand still while the page writes, and tabs that wait for its end."""
    load(page, tiny)
    page.select_option("#pace", "20")
    start_writing(page)
    for view, words in (("surprise", "bits/char"), ("inside", "MLP adds"), ("next", "percent")):
        page.check(f"[value={view}]", force=True)
        page.wait_for_function("(words) => $('view').innerText.includes(words)", arg=words)
        before = page.inner_text("#view")
        page.wait_for_function("(old) => $('view').innerText !== old", arg=before)
        assert page.inner_text("#go") == "Stop"
    page.wait_for_function(
        "() => $('view').innerText.includes('points at') && $('view').querySelector('.actual th')"
        ".innerText === quoted(text.ids.at(-1))"
    )
    page.click("#go")
    page.wait_for_function("() => mode === 'idle'")


def test_colors_while_it_writes(page, tiny):
    """Catches colors of a whole long text in each frame, and colors that stay away at the end."""
    load(page, tiny)
    page.fill("#text", "the dog saw a cat. " * 100)
    page.evaluate("text.ids.forEach((_, p) => (text.bits[p] = p % 9))")
    page.select_option("#pace", "20")
    start_writing(page)
    page.wait_for_function("() => text.ids.length > 1_905")
    lowest = """Math.min(...Array.from(CSS.highlights, ([name, ranges]) =>
        name.startsWith("level") ? Array.from(ranges, (range) => range.startOffset) : []).flat())"""
    assert 1_300 < page.evaluate(lowest) < 1_600
    page.click("#go")
    settled(page)
    assert page.evaluate(lowest) < 1_300
    page.evaluate("$('paper').scrollTop = 0")
    settled(page)
    assert page.evaluate(lowest) == 1


def test_colors_of_what_is_on_the_screen(page, tiny):
    """Catches colors of a whole long text, through which the browser goes at each change of the
    page, and lines without colors on the screen, also after scrolling and where lines are empty."""
    load(page, tiny)
    page.fill("#text", "the dog saw a cat and sat.\n\n\nthe cat\n" * 80)
    page.evaluate("text.ids.forEach((_, p) => (text.bits[p] = 9))")
    colored = """Array.from(CSS.highlights.get("level-4"), (range) =>
        [range.startOffset, range.endOffset]).flat()"""
    on_screen = """(() => {
        const { top, bottom } = $("paper").getBoundingClientRect();
        const seen = text.ids.map((_, p) => p).filter((p) =>
            rectangleOf(p).bottom > top && rectangleOf(p).top < bottom);
        return [seen.at(0), seen.at(-1) + 1];
    })()"""
    for share in (1, 0.4, 0):
        page.evaluate("(share) => ($('paper').scrollTop = share * $('paper').scrollHeight)", share)
        settled(page)
        first, end = page.evaluate(colored)
        seen_first, seen_end = page.evaluate(on_screen)
        assert first <= seen_first < seen_end <= end
        assert end - first < 2.5 * (seen_end - seen_first) < 3_000
    page.set_viewport_size({"width": 1_280, "height": 1_400})
    settled(page)
    assert page.evaluate(colored)[1] >= page.evaluate(on_screen)[1] > seen_end
    page.pdf()  # it prints the whole text
    assert page.evaluate(colored) == [0, page.evaluate("text.ids.length")]
    page.emulate_media(media="print")  # a text area is not broken between pages as its copy is
    printed = "[$('text').offsetHeight, getComputedStyle($('mirror')).color]"
    ink = page.evaluate("getComputedStyle(document.body).color")
    assert page.evaluate(printed) == [0, ink]


def test_copy_of_the_text(page, tiny):
    """Catches a copy that keeps what the page itself has taken from the text area: the paper would
    stay as high as the old text, and places would be looked up in that."""
    load(page, tiny)
    page.fill("#text", "the dog saw a cat. " * 100)
    page.click("#clear")
    settled(page)
    assert page.evaluate("mirror.data") == "\n"
    page.evaluate("$('text').value = 'the cat'; onInput()")
    settled(page)
    assert page.evaluate("mirror.data") == "the cat\n"


def test_slow_writing(page, tiny):
    """Catches a speed that is not kept, and a Stop that waits for the next character."""
    load(page, tiny)
    page.select_option("#pace", "20")
    page.fill("#set-max_new", "10")
    page.click("#go")
    page.wait_for_function("() => mode === 'idle'")
    assert 0.45 < float(page.inner_text("#status").split()[3]) < 2
    page.select_option("#pace", "2")
    page.click("#go")
    page.wait_for_function("() => text.ids.length > 11")
    stop = "new Promise((done) => { const start = performance.now(); interrupt(); pending.resolve ="
    stop += " ((old) => () => { old(); done(performance.now() - start); })(pending.resolve); })"
    assert page.evaluate(stop) < 300


def test_undo(page, tiny):
    """Catches a change by the program that cannot be undone, an undo that loses the text, and a
    seed that is not that of the text which came back."""
    load(page, tiny)
    box, states = page.locator("#text"), [""]
    box.press_sequentially("the dog")
    states.append(box.input_value())
    script = "new KeyboardEvent('keydown', { key: 'Enter', ctrlKey: true, bubbles: true })"
    page.evaluate(f"$('text').dispatchEvent({script}); $('text').dispatchEvent({script})")
    page.wait_for_function("() => mode === 'idle'")
    states.append(box.input_value())
    seed = page.evaluate("run.seed")
    page.click("#again")
    page.wait_for_function("() => mode === 'idle'")
    states.append(box.input_value())
    assert states[-1] != states[-2] and states[-1].startswith("the dog") and len(states[-1]) == 307
    page.click("#clear")
    states.append("")
    page.fill("#set-max_new", "1")
    page.click("#go")
    page.wait_for_function("() => mode === 'idle' && text.ids.length === 1")
    page.focus("#text")
    for state in reversed(states):
        box.press("Control+z")
        assert box.input_value() == state
        if state == states[2]:
            assert page.evaluate("run.seed") == seed
    page.wait_for_function("() => $('keep').ariaDisabled === 'true'")
    assert page.evaluate("[run, $('status').innerText]") == [None, ""]
    for state in states[1:]:
        box.press("Control+y")
        assert box.input_value() == state
    page.click("#undo")
    assert box.input_value() == states[-2]
    assert page.evaluate("text.bits.filter(Number.isFinite).length") == 300


def test_undo_of_the_browser(page, tiny):
    """Catches an Undo of the browser's menu that is one more change, and typing without a pause
    that is one change however long it takes."""
    load(page, tiny)
    page.focus("#text")
    for now in (1_000, 1_500, 11_200):
        page.evaluate(f"performance.now = () => {now}; typing.last &&= {now} - 500")
        page.keyboard.type("t")
    assert page.input_value("#text") == "ttt"
    menu = page.context.new_cdp_session(page)
    for expected in ("tt", ""):
        menu.send("Input.dispatchKeyEvent", dict(type="rawKeyDown", commands=["undo"]))
        assert page.input_value("#text") == expected
    assert page.evaluate("past.length === 0 && future.length === 2")
    redo = "new InputEvent('beforeinput', {inputType: 'historyRedo', cancelable: true})"
    page.evaluate(f"$('text').dispatchEvent({redo})")
    assert page.input_value("#text") == "tt"
    page.locator("#text").press("Control+Shift+z")
    assert page.input_value("#text") == "ttt"


def test_undo_of_quick_changes(page, tiny):
    """Catches a text that is lost, since it was deleted right after it was typed; and Undo that
    works only in the text, or only with Latin letters."""
    load(page, tiny)
    box = page.locator("#text")
    box.press_sequentially("the dog")
    box.press("Control+a")
    box.press("Delete")
    for _ in range(2):
        assert box.input_value() == ""
        page.locator("#go").press("Control+z")
        assert box.input_value() == "the dog"
        box.press("Control+y")
    event = "new KeyboardEvent('keydown', { key: 'я', code: 'KeyZ', ctrlKey: true, bubbles: true })"
    page.evaluate(f"$('text').dispatchEvent({event})")
    assert box.input_value() == "the dog"
    box.press_sequentially("\u2603")  # is dropped: no change
    page.click("#undo")
    assert box.input_value() == ""
    box.press_sequentially("the cat")
    box.press("Control+a")
    box.press_sequentially("a")
    box.press("Control+z")
    assert box.input_value() == "the cat"


def test_undo_of_what_is_no_change_or_one(page, tiny):
    """Catches two changes where a selection is dragged, and one where nothing is written."""
    load(page, tiny)
    page.fill("#text", "the dog saw")
    script = """(steps) => steps.forEach(([value, inputType]) => {
        $("text").value = value;
        $("text").dispatchEvent(new InputEvent("input", { inputType, bubbles: true }));
    })"""
    page.evaluate(script, [["dog saw", "deleteByDrag"], ["dog sawthe ", "insertFromDrop"]])
    page.click("#undo")
    assert page.input_value("#text") == "the dog saw"
    page.fill("#set-max_new", "0")
    page.click("#go")
    page.wait_for_function("() => mode === 'idle'")
    page.press("#text", "Control+y")
    assert page.input_value("#text") == "dog sawthe "


def test_text_when_another_model_is_opened(page, tiny, tmp_path):
    """Catches a text that is lost: to a link that is followed again, to a smaller vocabulary."""
    small = random_model(tiny, tmp_path / "small.safetensors", "abcdefg").path
    page.goto(f"{PAGE.as_uri()}#prompt=the+dog&max_new=3&temperature=1")
    load(page, tiny)
    page.wait_for_function("() => mode === 'idle' && text.ids.length === 10")
    assert page.text_content("#status").startswith("3 characters in ")  # no empty notice before it
    page.fill("#text", "the cat saw")
    page.fill("#set-temperature", "1.5")
    for model, shown in ((tiny, "the cat saw"), (small, "ecaa"), (tiny, "the cat saw")):
        load(page, model)
        assert page.input_value("#text") == shown
        assert page.input_value("#set-temperature") == "1.5"
    load(page, small)
    page.click("#go")  # then the text is another, which the draft must not replace
    page.wait_for_function("() => mode === 'idle' && text.ids.length === 7")
    written = page.input_value("#text")
    load(page, tiny)
    assert page.input_value("#text") == written


def test_caret_stays_in_sight(page, tiny):
    """Catches lines that are pasted below what can be seen, since the text grows after the browser
    has scrolled to the caret."""
    load(page, tiny)
    page.fill("#text", "the dog saw a cat.\n" * 150)
    page.focus("#text")
    for key in ("a", "c", "End", "v"):
        page.keyboard.press(f"Control+{key}")
    settled(page)
    assert page.evaluate("text.ids.length") == 300 * 19
    hidden = "$('paper').scrollHeight - $('paper').scrollTop - $('paper').clientHeight"
    assert page.evaluate(hidden) < 60 and page.evaluate("$('text').scrollTop") == 0


def test_begin_and_end_are_in_sight(page, tiny):
    """Catches a caret out of sight where the browser moves it, but does not scroll: Firefox."""
    load(page, tiny)
    page.fill("#text", "the dog saw the cat. " * 300)
    settled(page)
    press = """async (key) => {
        $("paper").scrollTop = 300;
        $("text").dispatchEvent(new KeyboardEvent("keydown", { key, ctrlKey: true }));
        for (let i = 0; i < 2; i++) await new Promise(requestAnimationFrame);
        return $("paper").scrollTop;
    }"""
    assert page.evaluate(press, "Home") == 0
    end = page.evaluate("$('paper').scrollHeight - $('paper').clientHeight")
    assert end > 300 and page.evaluate(press, "End") == pytest.approx(end, abs=1)
    script = """(key) => {
        const event = new KeyboardEvent("keydown", { key, cancelable: true });
        return [$("text").dispatchEvent(event), $("paper").scrollTop];
    }"""
    height = page.evaluate("$('paper').clientHeight")
    assert page.evaluate(script, "PageDown") == [True, end]  # nothing to scroll: the browser may
    is_left, top = page.evaluate(script, "PageUp")
    assert not is_left and end - height < top < end - height / 2
    assert page.evaluate(script, "PageDown") == [False, end]


def test_what_is_written_and_chosen_is_in_sight(page, tiny):
    """Catches a text that is continued below what can be seen, and a surprising character that a
    click on it leaves there."""
    load(page, tiny)
    page.fill("#text", "the dog saw a cat.\n" * 60)
    page.fill("#set-max_new", "30")
    page.evaluate("$('paper').scrollTop = 0")
    page.click("#go")
    page.wait_for_function("() => mode === 'idle' && text.ids.length === 1170")
    hidden = "$('paper').scrollHeight - $('paper').scrollTop - $('paper').clientHeight"
    assert page.evaluate(hidden) < 80
    see(page, "surprise")
    page.evaluate("$('paper').scrollTop = 0")
    for button in page.locator("#view button").all()[:3]:
        button.click()
        assert page.evaluate("""() => {
            const range = document.createRange(), p = caretPlace();
            range.setStart(mirror, text.offsets[p]);
            range.setEnd(mirror, text.offsets[p + 1]);
            const place = range.getBoundingClientRect(), paper = $("paper").getBoundingClientRect();
            return paper.top <= place.top && place.bottom <= paper.bottom;
        }""")


def test_spaces_are_seen(page, tiny):
    """Catches a surprising space that looks like nothing, and two spaces that look like one."""
    load(page, tiny)
    page.fill("#text", "the  d og")
    see(page, "surprise")
    shown = page.locator("#view button").all_inner_texts()
    assert "the ␣" in shown and "the  d o" in shown
    assert "After 'the  d og'" in see(page, "next").replace("\u200e", "")


def test_input_method(page, tiny):
    """Catches views that stand still while an input method composes a word, and half of a character
    that is dropped since the model does not know it."""
    load(page, tiny)
    page.fill("#text", "the ")
    page.focus("#text")
    typing = page.context.new_cdp_session(page)
    for part in ("d", "do"):
        selection = dict(selectionStart=len(part), selectionEnd=len(part))
        typing.send("Input.imeSetComposition", dict(text=part, **selection))
        assert page.evaluate("decode(text.ids)") == "the " + part
    typing.send("Input.imeSetComposition", dict(text="do\u00e9", selectionStart=3, selectionEnd=3))
    assert page.input_value("#text") == "the do\u00e9" and page.evaluate("text.ids.length") == 6
    typing.send("Input.insertText", dict(text="dog"))
    assert page.evaluate("decode(text.ids)") == page.input_value("#text") == "the dog"


def test_input_method_over_a_selection(page, tiny):
    """Catches an exception where what is composed, and not known, is shorter than the selection."""
    load(page, tiny)
    page.fill("#text", "the dog saw")
    page.focus("#text")
    page.keyboard.press("Shift+Home")
    typing = page.context.new_cdp_session(page)
    typing.send("Input.imeSetComposition", dict(text="か", selectionStart=1, selectionEnd=1))
    page.evaluate("draw()")
    typing.send("Input.imeSetComposition", dict(text="", selectionStart=0, selectionEnd=0))
    assert settled(page) and page.input_value("#text") == ""


def test_text_of_astral_characters(page, tiny, tmp_path):
    """Catches half of a text that is cut off, since each of its characters has two units."""
    path = random_model(tiny, tmp_path / "m.safetensors", "\U0001f600\U0001f601a").path
    load(page, path)
    page.fill("#text", "\U0001f600" * 15_000)
    assert page.evaluate("text.ids.length") == 15_000


def test_unusual_characters_stay(page, tiny, tmp_path):
    """Catches characters that the model has written and the next key drops: those that turn the
    direction of a text, as in a Hebrew book."""
    load(page, random_model(tiny, tmp_path / "m.safetensors", "\u202e\u202cab").path)
    written = write(page, "a", max_new=200, temperature=2)
    assert {*written} == {*"\u202e\u202cab"}
    page.focus("#text")
    page.keyboard.press("Control+End")
    page.keyboard.type("b")
    assert page.input_value("#text") == written + "b"


def test_focus_and_selection_while_it_writes(page, tiny):
    """Catches a button that loses the focus, and a selection that cannot be copied."""
    load(page, tiny)
    write(page, "the", max_new=20)
    page.focus("#again")
    page.keyboard.press("Enter")
    page.wait_for_function("() => mode === 'idle'")
    assert page.evaluate("document.activeElement.id") == "again"
    page.select_option("#pace", "20")
    start_writing(page)
    page.evaluate("$('text').setSelectionRange(0, 3)")
    page.focus("#set-top_k")
    page.keyboard.press("Tab")  # moves no setting
    n = page.evaluate("text.ids.length")
    page.wait_for_function(f"() => text.ids.length > {n + 3}")
    assert page.evaluate("[$('text').selectionStart, $('text').selectionEnd]") == [0, 3]
    assert not page.evaluate("run.moved")
    page.keyboard.press("Escape")


def test_focus_in_the_views(page, tiny):
    """Catches a head or a button of a view that loses the focus while the view is made anew."""
    load(page, tiny)
    page.fill("#text", "the dog saw the cat")
    page.evaluate("typing = {}")  # what follows is another change
    page.fill("#text", "the dog saw the cat and the dog")
    see(page, "inside")
    page.focus("#head-1")
    page.keyboard.press("Control+z")
    page.wait_for_function("() => document.activeElement.id === 'head-1'")
    see(page, "surprise")
    page.focus("#worst-5")
    page.evaluate("setText([...text.ids, ...text.ids, ...text.ids]), update()")
    settled(page)
    assert page.evaluate("document.activeElement.id") == "worst-5"


def test_long_text_while_it_writes(page, tiny):
    """Catches a text of which one sees nothing, or twice, while its text area waits for the end:
    to change a long one at each frame would delay clicks."""
    load(page, tiny)
    ink = page.evaluate("getComputedStyle($('paper')).color")
    color = "(id) => getComputedStyle($(id)).color"
    prompt = "the cat " * 1_000
    page.fill("#text", prompt)
    page.select_option("#pace", "20")
    start_writing(page)
    page.wait_for_function("() => text.ids.length > 8010")
    shown = page.evaluate("[mirror.data, decode(text.ids)]")
    assert shown[0] == shown[1] + "\n" and page.input_value("#text") == prompt
    colors = [page.evaluate(color, name) for name in ("mirror", "text")]
    assert colors == [ink, "rgba(0, 0, 0, 0)"]
    page.keyboard.press("Escape")
    page.wait_for_function("() => mode === 'idle'")
    written = page.input_value("#text")
    assert written == page.evaluate("decode(text.ids)") and len(written) > 8_010
    colors = [page.evaluate(color, name) for name in ("text", "mirror")]
    assert colors == [ink, "rgba(0, 0, 0, 0)"]
    page.click("#undo")
    assert page.input_value("#text") == prompt == page.evaluate("mirror.data")[:-1]


def test_odd_links(page, tiny):
    """Catches a line that writes another text where the model had begun by itself, a speed that is
    not the one shown, and mistakes that nobody hears of."""
    load(page, tiny)
    page.evaluate("navigator.clipboard.writeText = async (text) => { window.line = text }; 0")
    write(page, "", max_new=9, temperature=1.5, seed=3)
    page.click("#go")
    page.wait_for_function("() => mode === 'idle' && text.ids.length === 18")
    written = page.input_value("#text")
    page.click("#link")
    page.select_option("#pace", "2")
    page.evaluate("follow(line)")
    page.wait_for_function("() => mode === 'idle'", timeout=2_000)
    assert page.input_value("#text") == written and page.input_value("#pace") == "0"
    page.evaluate("follow('#prompt=the+\u2603+dog&temperature=abc&pace=7&max_new=1&toString=1')")
    page.wait_for_function("() => mode === 'idle'")
    status = page.inner_text("#status")
    start_writing(page)
    page.evaluate("location.hash = '#prompt=the+cat&max_new=3'")
    page.wait_for_function("() => mode === 'idle' && text.ids.length === 10")
    assert page.input_value("#text").startswith("the cat")
    assert "temperature abc: must be" in status and "dropped \u2603" in status
    assert page.input_value("#pace") == "0" and "1 character in" in status
    assert page.get_attribute("#set-temperature", "aria-invalid") == "false"


@pytest.mark.parametrize("is_good", [True, False])
def test_link_while_a_model_is_opened(page, tiny, is_good):
    """Catches a link that is lost, or becomes a part of the text."""
    load(page, tiny)
    page.fill("#text", "the cat")
    page.evaluate(
        """([bytes]) => {
            openModel(new File([Uint8Array.from(bytes)], "other.safetensors"));
            const clipboardData = new DataTransfer();
            clipboardData.setData("text/plain", "x.html#prompt=the+dog&max_new=3");
            const paste = { clipboardData, bubbles: true, cancelable: true };
            window.isTaken = !$("text").dispatchEvent(new ClipboardEvent("paste", paste));
        }""",
        [[*tiny.read_bytes()] if is_good else []],
    )
    page.wait_for_function("() => mode === 'idle' && text.ids.length === 10")
    assert page.input_value("#text").startswith("the dog") and page.evaluate("isTaken")


def test_paste_and_drop(page, tiny):
    """Catches a picture that is opened as a model, and a text that is swallowed."""
    load(page, tiny)
    script = """([type, text, name]) => {
        const data = new DataTransfer();
        if (text) data.setData("text/plain", text);
        if (name) data.items.add(new File(["x"], name));
        const options = { cancelable: true, dataTransfer: data, clipboardData: data };
        options.bubbles = true;
        const Event = type === "paste" ? ClipboardEvent : DragEvent;
        return $("text").dispatchEvent(new Event(type, options)); // false: the page has taken it
    }"""
    assert page.evaluate(script, ["paste", "some words", "picture.png"])
    assert page.evaluate(script, ["dragover", "some words", None])
    assert page.evaluate(script, ["drop", "some words", None])
    assert not page.is_visible("#error")
    assert not page.evaluate(script, ["drop", None, "model.safetensors"])
    page.wait_for_selector("#error:visible")


def test_no_highlights(chromium, tiny):
    """Catches views that are empty where only the colors are lacking."""
    with new_tab(chromium) as tab:
        tab.add_init_script("delete CSS.highlights; delete globalThis.Highlight")
        tab.goto(PAGE.as_uri())
        load(tab, tiny)
        tab.fill("#text", "the dog")
        for view, words in (("next", "percent"), ("surprise", "bits/char"), ("inside", ", head ")):
            assert words in see(tab, view)


@pytest.mark.parametrize(
    "worker",
    [
        "class { constructor() { throw Error() } }",
        "class extends Worker { constructor() { super('data:,') } }",
    ],
)
def test_no_worker(chromium, worker):
    """Catches a page that says nothing where no thread can be started."""
    with new_tab(chromium) as tab:
        tab.add_init_script(f"Worker = {worker}")
        tab.goto(PAGE.as_uri())
        tab.wait_for_selector("#error:visible")
        assert "Worker" in tab.inner_text("#error")


def test_refusal_of_a_value_ends(page, tiny):
    """Catches a message about a value that stays beside a good one."""
    load(page, tiny)
    for key in ("Defaults", "ArrowUp", "fill"):
        page.fill("#set-top_p", "5")
        assert "must be a number from 0 to 1" in page.inner_text("#status")
        page.focus("#text")  # the box has a good value again; the message says why
        assert page.input_value("#set-top_p") == "1" and page.inner_text("#status")
        if key == "Defaults":
            page.click("#defaults")
        elif key == "fill":
            page.fill("#set-top_p", "0.5")
        else:
            page.press("#set-temperature", key)
        assert page.inner_text("#status") == ""


def test_number_boxes(page, tiny):
    """Catches arrow keys that leave the usual range, and nonsense that is taken as the default."""
    load(page, tiny)
    page.focus("#set-temperature")
    page.keyboard.press("ArrowUp")
    page.focus("#set-min_p")
    page.keyboard.press("ArrowUp")
    page.focus("#set-repetition_penalty")
    for key in ("ArrowUp", "ArrowDown"):
        page.keyboard.press(key)
    assert page.evaluate("[cfg.temperature, cfg.min_p, cfg.repetition_penalty]") == [0.75, 0.01, 1]
    page.fill("#set-temperature", "")
    page.keyboard.type("1.2.3e-")
    assert "must be a number from 0 to 100" in page.inner_text("#status")
    assert page.get_attribute("#set-temperature", "aria-invalid") == "true"


def test_slider(page, tiny):
    """Catches bars that wait until a slider is let go."""
    load(page, tiny)
    page.fill("#text", "the dog ")
    settled(page)
    box = page.locator("[aria-label='temperature slider']").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 3, box["y"] + box["height"] / 2)
    page.mouse.down()
    for part in (0.6, 0.8):
        page.mouse.move(box["x"] + part * box["width"], box["y"] + box["height"] / 2)
        title = f"temp {page.input_value('#set-temperature')}"
        page.wait_for_function("(title) => $('view').innerText.includes(title)", arg=title)
    assert page.evaluate("cfg.temperature") > 1.4
    page.mouse.up()


def test_five_settings(page, tiny):
    """Catches bars that are too short to compare."""
    load(page, tiny)
    for name, value in ALL.items():
        page.fill(f"#set-{name}", str(value))
    page.fill("#text", "the dog ")
    settled(page)
    script = "Array.from(document.querySelectorAll('.bar'), (bar) => bar.offsetWidth)"
    widths = page.evaluate(script)
    assert len(widths) > 10 and max(widths) > 40


def test_phone(page, tiny):
    """Catches a slider whose effect is on another screen, and an invitation to drop a file."""
    page.set_viewport_size(dict(width=360, height=740))
    load(page, tiny)
    page.fill("#text", "the dog ")
    settled(page)
    top = page.evaluate("document.querySelector('[type=range]').getBoundingClientRect().top")
    bottom = page.evaluate("document.querySelector('#view table').getBoundingClientRect().bottom")
    assert bottom - top < 740
    page.fill("#set-seed", "4085873565")
    page.fill("#set-max_new", "20000")
    script = "['set-seed', 'set-max_new'].map((id) => $(id).scrollWidth - $(id).clientWidth)"
    for width in (360, 500, 683, 1280):
        page.set_viewport_size(dict(width=width, height=740))
        assert page.locator("#settings [type=range]").first.bounding_box()["width"] > 100
        assert page.evaluate(script) == [0, 0], width  # no number is cut
    page.set_viewport_size(dict(width=360, height=740))
    page.focus("#set-temperature")
    assert page.locator("#settings small:visible").all_inner_texts() == [
        "below 1 safer, above 1 wilder, 0 the likeliest"
    ]


def test_settings_after_going_back(page, tiny):
    """Catches a box that the browser fills again, although its setting is not used."""
    load(page, tiny)
    page.fill("#set-temperature", "1.5")
    page.goto("about:blank")
    page.go_back()
    load(page, tiny)
    assert page.evaluate("[$('set-temperature').value, cfg.temperature]") == ["0.7", 0.7]


def test_touch(chromium):
    """Catches an invitation to drop a file where there is no mouse."""
    with new_tab(chromium, has_touch=True, is_mobile=True) as tab:
        tab.goto(PAGE.as_uri())
        assert "drop" not in tab.inner_text("body").lower() and tab.is_visible("#choose")


def test_tabs_do_not_jump(page, tiny):
    """Catches tabs that move when another one is chosen."""
    load(page, tiny)
    for width in (1280, 322):
        page.set_viewport_size(dict(width=width, height=740))
        places = []
        for view in ("next", "surprise", "inside"):
            see(page, view)
            script = "[$('see-title'), ...document.querySelectorAll('.tabs label')]"
            script += ".map((node) => [node.getBoundingClientRect().x + scrollX,"
            script += "node.getBoundingClientRect().y + scrollY].join())"
            places.append(page.evaluate(script))
        assert places[0] == places[1] == places[2]


def test_colors(page, tiny):
    """Catches tints that are hard to see, or make the text hard to read (WCAG: 4.5)."""
    load(page, tiny)
    page.fill("#text", "the dog")
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        for view in ("surprise", "inside"):
            see(page, view)
            names = ["card", *(f"tint-{n}" for n in (1, 2, 3, 4)), "ink"]
            card, weak, *_, strong, ink = (luminance(page, name) for name in names)
            assert contrast(strong, ink) > 4.5 and contrast(weak, card) > 1.22, (scheme, view)


def color(page, name: str) -> list[int]:
    """Red, green and blue of one of the page's colors."""
    script = """(name) => {
        const probe = $("paper").appendChild(document.createElement("i"));
        probe.style.color = `var(--${name})`;
        const color = getComputedStyle(probe).color;
        probe.remove();
        return color;
    }"""
    return [int(n) for n in re.findall(r"\d+", page.evaluate(script, name))[:3]]


def luminance(page, name: str) -> float:
    parts = [n / 255 for n in color(page, name)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: float, b: float) -> float:
    return (max(a, b) + 0.05) / (min(a, b) + 0.05)


def test_forced_colors(page, tiny):
    """Catches bars that are not there, and tabs that all look selected, in high contrast."""
    load(page, tiny)
    page.fill("#text", "the dog")
    page.emulate_media(forced_colors="active")
    settled(page)
    script = "(node, name) => getComputedStyle(node)[name].match(/\\d+/g).slice(0, 3).map(Number)"
    canvas = page.locator("body").evaluate(script, "backgroundColor")
    assert page.locator(".bar").first.evaluate(script, "backgroundColor") != canvas
    tabs = page.locator(".tabs label").all()
    colors = [tab.evaluate(script, "borderBottomColor") for tab in tabs]
    assert colors[0] != canvas and colors[1:] == [canvas, canvas]
    for name, color in {"--quiet": "CanvasText", "--accent": "LinkText"}.items():
        script = f"getComputedStyle($('paper')).getPropertyValue('{name}')"
        assert page.evaluate(script) == color  # which can be read on Canvas
    for part in ("#go", "#text", "#mirror"):  # else the browser paints over its text or its marks
        adjust = page.locator(part).evaluate("(node) => getComputedStyle(node).forcedColorAdjust")
        assert adjust == "none"


@pytest.mark.parametrize(
    "text", ["the dog saw", "\u05d0\u05d1 \u05d2\u05d3\u05d0 \u05d1\u05d2 \u05d3\u05d4"]
)
def test_hover(page, tiny, tmp_path, text):
    """Catches a character under the pointer about which the page says nothing, or another one."""
    is_hebrew = text[0] == "\u05d0"
    model = random_model(tiny, tmp_path / "m.safetensors", text).path if is_hebrew else tiny
    load(page, model)
    page.fill("#text", text)
    settled(page)
    for p in (1, 5, 8):
        box = page.evaluate(f"""() => {{
            const range = document.createRange();
            range.setStart(mirror, {p});
            range.setEnd(mirror, {p} + 1);
            return range.getBoundingClientRect().toJSON();
        }}""")
        for part in (0.2, 0.8):
            page.mouse.move(box["x"] + part * box["width"], box["y"] + box["height"] / 2)
            page.wait_for_function(f"() => look?.p === {p}")
            settled(page)
            detail = page.inner_text("#detail").replace("\u200e", "")
            bits = page.evaluate(f"-Math.log2(softmax(look.logits)[text.ids[{p}]])")
            assert f"After '{text[:p]}'" in detail and f"{bits:.1f} bits" in detail
            assert f"'{text[p]}' had" in detail and "look at" in detail
            assert detail.count("%") >= (9 if p == 8 else 7)
            page.mouse.move(5, 5)
            page.wait_for_function(f"() => look?.p === {len(text)}")


def test_most_telling_head(page, large_logits):
    """Catches a click that enlarges another head, and letters that are not those of the text."""
    _, _, files = large_logits
    load(page, files["plain"])
    page.fill("#text", "the dog saw Watson at home, and the")
    assert "Block" in see(page, "inside")
    first = page.evaluate("head")
    scores = page.evaluate("""() => {
        const { maps, width } = look, scores = [];
        for (let i = 0; i < maps.length; i += width * width) {
            let score = 0;
            for (let row = 0; row < width; row++)
                for (let column = 1; column < row - 3; column++)
                    score += maps[i + row * width + column] ** 2;
            scores.push(score);
        }
        return scores;
    }""")
    assert len(scores) == 6 and first == scores.index(max(scores))
    script = """() => { // the one before always, and the second of all always
        const width = 9, maps = new Float32Array(2 * width * width);
        for (let row = 1; row < width; row++) maps[row * width + row - 1] = 1;
        for (let row = 1; row < width; row++) maps[(width + row) * width + 1] = 0.9;
        return tellingHead({ maps, width });
    }"""
    assert page.evaluate(script) == 1
    other = (first + 1) % 6
    page.locator(".maps label").nth(other).click()
    assert f"block {other // 2 + 1}, head {other % 2 + 1} looks" in see(page, "inside")
    assert page.evaluate("document.activeElement.id") == f"head-{other}"
    script = """() => { // of three heads, two in a row, each looks back more strongly
        look = { width: 2, maps: Float32Array.of(1, 0, 0, 1, 1, 0, 0.3, 0.7, 1, 0, 1, 0) };
        const { data, width } = headMaps([0, 1, 2], 2).getContext("2d").getImageData(0, 0, 4, 4);
        return [[0, 1], [2, 1], [0, 3], [2, 3]].map(([x, y]) => data[4 * (y * width + x) + 3]);
    }"""
    first, second, third, none = page.evaluate(script)
    assert 0 < first < second < third == 255 and none == 0


def test_share(chromium, page, tiny, tmp_path):
    """Catches a line that does not write the same text, a lost seed, and an empty picture."""
    load(page, tiny)
    page.evaluate("navigator.clipboard.writeText = async (text) => { window.line = text }; 0")
    written = write(page, "the dog & a cat#", temperature=1.1, top_k=9, max_new=50)
    prompt = page.evaluate("run.prompt")
    page.click("#link")
    line = page.evaluate("line")
    assert line.startswith("browser.html#prompt=the+dog") and "seed=" in line
    assert prompt != written
    page.click("#keep")
    assert page.input_value("#set-seed") == str(page.evaluate("run.seed"))
    page.click("#again")
    page.wait_for_function("() => mode === 'idle'")
    assert page.input_value("#text") == written
    page.evaluate("navigator.clipboard.write = () => Promise.reject(); 0")
    see(page, "surprise")
    page.evaluate("""() => {
        const { fillText } = CanvasRenderingContext2D.prototype;
        CanvasRenderingContext2D.prototype.fillText = function (...options) {
            window.font = this.font;
            (window.drawn ??= []).push(options[0]);
            fillText.apply(this, options);
        };
    }""")
    with page.expect_download() as download:
        page.click("#picture")
    assert "mono" in page.evaluate("font")
    drawn = page.evaluate("drawn")  # whole words: in some scripts letters are joined
    assert [word for word in drawn if word.strip()][:-1] == written.split()
    assert drawn[-1].endswith("the stronger, the less expected")
    picture = download.value.path().read_bytes()
    assert download.value.suggested_filename == "anexa.png" and picture[:4] == b"\x89PNG"
    colors = page.evaluate(
        """async (base64) => {
            const bitmap = await createImageBitmap(new Blob([fromBase64(base64)]));
            const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
            const context = canvas.getContext("2d");
            context.drawImage(bitmap, 0, 0);
            const { data } = context.getImageData(0, 0, bitmap.width, bitmap.height);
            const name = (pixel) => new Uint8Array(Uint32Array.of(pixel).buffer).slice(0, 3).join();
            const counts = new Map();
            for (const pixel of new Uint32Array(data.buffer))
                counts.set(pixel, (counts.get(pixel) ?? 0) + 1);
            return Object.fromEntries(Array.from(counts, ([pixel, n]) => [name(pixel), n]));
        }""",
        base64.b64encode(picture).decode(),
    )
    script = "[1, 2, 3, 4].filter((n) => text.ids.some((_, p) => levels()(p) === n))"
    tints = [color(page, f"tint-{n}") for n in page.evaluate(script)]
    assert len(tints) > 1 and all(colors.get(",".join(map(str, tint)), 0) > 200 for tint in tints)
    with new_tab(chromium) as friend:
        friend.goto(PAGE.as_uri() + line.removeprefix("browser.html"))
        load(friend, tiny)
        friend.wait_for_function("() => mode === 'idle' && text?.ids.length > 5")
        assert friend.input_value("#text") == written
        friend.click("#clear")
        friend.evaluate(
            """(line) => {
                const clipboardData = new DataTransfer();
                clipboardData.setData("text/plain", line);
                const options = { bubbles: true, cancelable: true, clipboardData };
                $("text").dispatchEvent(new ClipboardEvent("paste", options));
            }""",
            line,
        )
        friend.wait_for_function("() => mode === 'idle' && text?.ids.length > 5")
        assert friend.input_value("#text") == written


def test_paste_of_a_long_text(page, tiny):
    """Catches work for views that nobody looks at."""
    load(page, tiny)
    page.evaluate("""() => {
        const { normalizePrompt } = Tokenizer.prototype;
        Tokenizer.prototype.normalizePrompt = function (prompt) {
            window.longest = Math.max(window.longest ?? 0, prompt.length);
            return normalizePrompt.call(this, prompt);
        };
    }""")
    page.fill("#text", "the dog saw a c\u00e4t. " * 2_000)
    settled(page)
    assert page.evaluate("longest") == 20_000
    assert page.evaluate("text.top.filter(Boolean).length") == 0
    page.check("[value=surprise]", force=True)
    page.wait_for_function("() => text.top.filter(Boolean).length > 0")


def test_demonstration(chromium, tiny):
    """Catches a demonstration that does not write by itself."""
    with new_tab(chromium) as tab:
        path = tiny.with_name("demo.html")
        public = field(tiny.read_bytes(), "data", names=["sherlock"])
        path.write_text(builder.demo_page(public), encoding="utf-8")
        tab.goto(path.as_uri() + "#top")
        tab.wait_for_function("() => mode === 'writing' && text.ids.length > 20")
        assert tab.is_checked("[value=surprise]")


def test_demonstration_is_current():
    """Catches a demonstration that was made of an older page; `docs/browser.py demo` renews it."""
    demo = builder.DEMO.read_text(encoding="utf-8")
    assert builder.fill(demo, "model", "") == PAGE.read_text(encoding="utf-8")
    assert len(demo.encode()) < builder.MAX_DEMO


PROMPTS = [  # characters of the model, prompt, what becomes of it, and the notice
    ("Vitệ", "Vie\u0323\u0302t", "Việt", ""),  # decomposed: composed
    ("Vite\u0302\u0323", "Vi\u1ec7t", "Vie\u0323\u0302t", ""),  # composed: decomposed
    ("각", "\u1100\u1161\u11a8", "각", ""),
    ("Vitê\u0323", "Vi\u1ec7t", "Viê\u0323t", ""),  # composed with one mark, as in Windows-1258
    ("ガ", "ｶﾞ", "ガ", "read ｶﾞ as ガ"),
    ("fi1", "ﬁ①", "fi1", "read ﬁ as fi, read ① as 1"),
    ("a'\"-", "“a”’–", '"a"\'-', 'read “ as ", read ” as ", read ’ as \', read – as -'),
    ("ae", "áe\u0301", "ae", "read á as a, read e\u0301 as e"),
    ("ab", "AB", "ab", "read A as a, read B as b"),
    ("áA", "Áa", "AA", "read Á as A, read a as A"),
    ("á", "Á", "á", "read Á as á"),
    ("ab", "a\tb☃\u0301\r\n", "ab", r"dropped \t, dropped ☃\u0301, dropped \n"),
]


def test_prompts(page):
    """Catches letters that are lost though the model knows them, and losses that are not named."""
    for characters, prompt, expected, notice in PROMPTS:
        known = "\ufffd" + "".join(sorted(set(characters)))
        script = "([known, prompt]) => new Tokenizer(known).normalizePrompt(prompt)"
        result = page.evaluate(script, [known, prompt])
        assert result == dict(text=expected, notice=notice)
        if not notice:
            assert unicodedata.normalize("NFC", prompt) == unicodedata.normalize("NFC", expected)


def test_keyboard_alone(page, tiny):
    """Catches a control that needs a mouse: from a prompt to each view and each head, with keys."""
    load(page, tiny)
    page.keyboard.type("the dog")  # the text has the focus
    page.keyboard.press("Control+Enter")
    page.wait_for_function("() => mode === 'idle'")
    for _ in range(4):
        page.keyboard.press("ArrowLeft")
    assert "in percent" in settled(page) and page.evaluate("caretPlace()") == 303
    while page.evaluate("document.activeElement.type") != "radio":
        page.keyboard.press("Tab")
    for word in ("bits/char", "MLP adds"):
        page.keyboard.press("ArrowRight")
        assert word in settled(page)
    head = page.evaluate("head")
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("head") == (head + 1) % 2
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("ArrowRight")  # from the last view to the first
    assert "percent" in settled(page)


def test_controls_and_stop(page, tiny):
    """Catches bars that do not follow a control, a value out of range that is used, a late Stop."""
    load(page, tiny)
    page.fill("#text", "the dog ")
    settled(page)
    columns = page.locator("#view thead th")
    assert columns.all_inner_texts() == ["next", "model", "temp 0.7"]
    page.fill("#set-top_k", "2")
    page.fill("#set-temperature", "1")
    settled(page)
    assert columns.all_inner_texts() == ["next", "model", "top-k 2"]
    left = [t for t in page.locator("#view td:last-child").all_inner_texts() if t != "–"]
    assert len(left) == 2 and sum(map(float, left)) == pytest.approx(100, abs=0.2)
    page.fill("#set-top_p", "1.5")
    assert "top-p 1.5: must be a number from 0 to 1" in page.inner_text("#status")
    assert page.evaluate("cfg.top_p") == 1
    page.fill("#set-max_new", "20000")
    page.evaluate(
        """() => {
        document.querySelector("#go").click()
        const escape = new KeyboardEvent("keydown", {key: "Escape", bubbles: true})
        setTimeout(() => document.querySelector("#text").dispatchEvent(escape), 50)
        }"""
    )
    page.wait_for_function("() => mode === 'idle'")
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
    for view in ("next", "surprise", "inside"):
        see(page, view)
        check()


def test_links():
    """Catches a link to a page or a heading that is not there."""
    links = re.findall(r'"([\w.]+\.md)#([\w-]+)"', PAGE.read_text(encoding="utf-8"))
    for name, anchor in links:
        text = (PAGE.parent / name).read_text(encoding="utf-8")
        headings = re.findall(r"(?m)^#+ (.+)$", text)
        assert anchor in {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
    assert len(links) == 3
