"""The views of the prompt: each number in them against transformers, or against arithmetic done here."""

import math
import re
import unicodedata

import pytest
import torch
from rich.cells import cell_len
from rich.console import Console

import anexagpt

CHARACTERS = anexagpt.UNKNOWN + "".join(sorted("\n 'abcdeHolmesSherk.\u0301\u4f60"))
CHARACTERS = CHARACTERS[0] + "".join(sorted(set(CHARACTERS[1:])))
PROMPT = "Sherlock Holmes"
FRAMES = [anexagpt.Frame(width) for width in (80, 40)]


@pytest.fixture(scope="module")
def tokenizer():
    return anexagpt.Tokenizer(CHARACTERS)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = anexagpt.GPTConfig(len(CHARACTERS), block_size=32, n_layer=2, n_head=2, n_embd=16)
    model = anexagpt.GPT(config).eval().requires_grad_(False)
    for weight in model.parameters():
        weight.copy_(torch.randn_like(weight) * 0.4)
    return model


@pytest.fixture(scope="module")
def theirs(model):
    """The same network in transformers."""
    transformers = pytest.importorskip("transformers")
    c = model.config
    shape = dict(vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head)
    config = transformers.GPT2Config(**shape, activation_function="gelu_new", attn_implementation="eager")
    network = transformers.GPT2LMHeadModel(config).eval()
    weights = {
        f"transformer.{name}": weight.T if weight.dim() == 2 and name.startswith("h.") else weight
        for name, weight in model.named_parameters()
    }
    network.load_state_dict(weights | {"lm_head.weight": model.wte.weight})
    return network


def logits_after(theirs, tokenizer, text):
    with torch.no_grad():
        return theirs(tokenizer.encode(text).long()[None]).logits[:, -1]


def table(view) -> dict[str, list[float]]:
    """Numbers of each row of /probs; "-" is 0."""
    rows = {}
    for line in view.plain.split("\n")[2:]:
        label, numbers = line[:8].strip(), line[8:]
        rows[label] = [0.0 if n == "-" else float(n) for n in re.findall(r"[\d.]+|-", numbers)]
    return rows


SETTINGS = [
    dict(temperature=1.0),
    dict(temperature=0.5),
    dict(temperature=1.7, top_k=5),
    dict(temperature=1.0, top_p=0.6),
    dict(temperature=1.0, min_p=0.3),
    dict(temperature=0.8, top_k=7, top_p=0.9, min_p=0.1),
    dict(temperature=0.8, repetition_penalty=1.5),
]


@pytest.mark.parametrize("frame", FRAMES, ids=["80 columns", "40 columns"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_probs_are_those_of_transformers(model, tokenizer, theirs, settings, frame):
    """Fails if a stage is left out, applied in another order, or takes its input from the wrong stage."""
    from transformers.generation import logits_process as lp

    scores, ids = logits_after(theirs, tokenizer, PROMPT), tokenizer.encode(PROMPT).long()[None]
    expected = [scores.softmax(-1)[0]]
    scores[:, 0] = -torch.inf
    warpers = {
        "repetition_penalty": lambda v: lp.RepetitionPenaltyLogitsProcessor(v),
        "temperature": lambda v: lp.TemperatureLogitsWarper(v),
        "top_k": lambda v: lp.TopKLogitsWarper(v),
        "top_p": lambda v: lp.TopPLogitsWarper(v),
        "min_p": lambda v: lp.MinPLogitsWarper(v),
    }
    for name, warper in warpers.items():
        if settings.get(name, 1.0) != 1.0:
            scores = warper(settings[name])(ids, scores)
            expected.append(scores.softmax(-1)[0])

    rows = table(anexagpt.probs_view(model, tokenizer, PROMPT, anexagpt.SampleConfig(**settings), frame))
    rest = rows.pop(next(label for label in rows if label.endswith("more")))
    order = expected[0].argsort(descending=True).tolist()
    assert list(rows) == [f"'{anexagpt.glyph(CHARACTERS[i])}'" for i in order[:12]]
    tolerance = 0.051 if (frame.width - 8) // len(expected) > 5 else 0.51  # decimals, where there is room for them
    for label, i in zip(rows, order, strict=False):
        assert rows[label] == pytest.approx([100 * float(p[i]) for p in expected], abs=tolerance)
    assert rest == pytest.approx([100 * float(p[order[12:]].sum()) for p in expected], abs=tolerance)


def test_probs_at_temperature_0_leave_one(model, tokenizer):
    """Fails if temperature 0 is shown as if it did nothing: what is written then is the likeliest character, always."""
    view = anexagpt.probs_view(model, tokenizer, PROMPT, anexagpt.SampleConfig(temperature=0.0), anexagpt.Frame())
    shares = [row[1] for row in table(view).values()]
    assert shares == [100.0] + [0.0] * (len(shares) - 1)


def test_bars_have_one_scale(model, tokenizer):
    """Fails if each column is scaled by itself: equal shares would then have bars of different lengths."""
    cfg = anexagpt.SampleConfig(temperature=0.5, top_k=3)
    lines = anexagpt.probs_view(model, tokenizer, PROMPT, cfg, anexagpt.Frame()).plain.split("\n")[2:-1]
    cells = [line[8 + i * 24 : 8 + (i + 1) * 24] for line in lines for i in range(3)]
    bars = {float(n): cell.count("█") for cell in cells if (n := cell.split()[0]) != "-"}
    longest = max(bars)
    assert bars[longest] == 17
    for share, length in bars.items():
        assert length == pytest.approx(17 * share / longest, abs=0.6)


@pytest.mark.parametrize("length", [1, 31, 32, 33, 48, 49, 100])
def test_predictions_are_those_that_the_text_is_written_with(model, length, monkeypatch):
    """Fails if a view scores a character in another context than it was written in, above all past block_size."""
    used = []
    choose = anexagpt.choose

    def noted(logits, *rest):
        used.append(torch.tensor(logits))
        return choose(logits, *rest)

    monkeypatch.setattr(anexagpt, "choose", noted)
    prompt = torch.randint(1, len(CHARACTERS), (length,), generator=torch.Generator().manual_seed(length))
    texts = anexagpt.stream(model, prompt, anexagpt.SampleConfig(), anexagpt.random_source(0))
    ids = torch.cat([prompt, *(next(texts) for _ in range(60))])
    found = anexagpt.predictions(model, ids, length)
    assert found.shape == (61, len(CHARACTERS))
    torch.testing.assert_close(found[:-1], torch.cat(used), atol=1e-4, rtol=1e-4)


def why_rows(view, width) -> tuple[str, str]:
    """Characters and digits of /why, lines joined."""
    lines = view.plain.split("\n")
    end = next(i for i, line in enumerate(lines) if re.match(r"[\d,]+ characters, ", line))
    above, below = lines[1:end:2], lines[2:end:2]
    return "".join(above), "".join(b.ljust(cell_len(a)) for a, b in zip(above, below, strict=True))


@pytest.mark.parametrize("frame", FRAMES, ids=["80 columns", "40 columns"])
def test_why_against_transformers(model, tokenizer, theirs, frame):
    """Fails if a digit stands below the wrong character, if bits are nats, or if the mean is over something else."""
    answer = " Holmes she.\nred"
    ids = tokenizer.encode(PROMPT + answer).long()
    with torch.no_grad():
        chances = theirs(ids[None]).logits[0].double().log_softmax(-1)
    bits = [-float(chances[len(PROMPT) + i - 1, ids[len(PROMPT) + i]]) / math.log(2) for i in range(len(answer))]
    view = anexagpt.why_view(model, tokenizer, PROMPT, answer, frame)

    above, below = why_rows(view, frame.width)
    assert above == answer.replace("\n", "\\n")
    digits = [str(min(9, round(b))) if round(b) else " " for b in bits]
    digits.insert(answer.index("\n") + 1, " ")  # \n takes two cells
    assert below == "".join(digits)
    total = f"{len(answer)} characters, {sum(bits):,.1f} bits, {sum(bits) / len(bits):.3f} bits/char"
    assert total in view.plain
    worst = sorted(range(len(answer)), key=lambda i: -bits[i])[:3]
    for line, i in zip(view.plain.split("\n")[-3:], worst, strict=True):
        likeliest = int(chances[len(PROMPT) + i - 1].argmax())
        least = -float(chances[len(PROMPT) + i - 1, likeliest]) / math.log(2)
        assert line.startswith(f"'{anexagpt.glyph(answer[i])}' {bits[i]:.1f} bits ")
        assert f"('{anexagpt.glyph(CHARACTERS[likeliest])}' {least:.1f}) after '" in line


def test_why_colours_by_loss(model, tokenizer):
    """Fails if the colour of a character is not that of its own loss: from 2, 4 and 6 bits."""
    answer = " Holmes she.red"
    view = anexagpt.why_view(model, tokenizer, PROMPT, answer, anexagpt.Frame())
    ids = tokenizer.encode(PROMPT + answer)
    losses = torch.nn.functional.cross_entropy(
        anexagpt.predictions(model, ids, len(PROMPT))[:-1], ids[len(PROMPT) :].long(), reduction="none"
    )
    start = view.plain.index("\n") + 1
    for i, loss in enumerate((losses / math.log(2)).tolist()):
        style = next((s.style for s in view.spans if s.start <= start + i < s.end), "")
        assert style == anexagpt.ALARM[(loss >= 2) + (loss >= 4) + (loss >= 6)], (answer[i], loss)


def test_why_of_an_empty_prompt_begins_at_a_line_end(model, tokenizer):
    """Fails if the first character is scored after something else than what an empty prompt is continued from."""
    view = anexagpt.why_view(model, tokenizer, "", "S", anexagpt.Frame())
    with torch.no_grad():
        chances = model(tokenizer.encode("\n").long()[None])[0, -1].double().softmax(-1)
    assert f"1 characters, {-math.log2(chances[CHARACTERS.index('S')]):.1f} bits" in view.plain


@pytest.mark.parametrize("layer, head", [(None, None), (1, None), (1, 1), (2, 2)])
@pytest.mark.parametrize("frame", FRAMES, ids=["80 columns", "40 columns"])
def test_attention_is_that_of_transformers(model, tokenizer, theirs, layer, head, frame):
    """Fails if heads or layers are mixed up, q and k swapped, the scale or the mask left out, a row shifted."""
    text = PROMPT * 4  # longer than the context, and than what is shown
    shown = text[anexagpt.window_start(len(text), model.config.block_size) :]
    with torch.no_grad():
        attentions = theirs(tokenizer.encode(shown).long()[None], output_attentions=True).attentions
    weights = attentions[(layer or 2) - 1][0]
    weights = weights.mean(0) if head is None else weights[head - 1]
    view = anexagpt.attn_view(model, tokenizer, text, layer, head, frame)
    title, _, _, *rows = view.plain.split("\n")
    assert title == f"Layer {layer or 2} of 2, " + ("mean of 2 heads" if head is None else f"head {head} of 2")
    n = len(rows)
    assert n == min(len(shown), (frame.width - 16) // 2, 21)
    for t, row in zip(range(len(shown) - n, len(shown)), rows, strict=True):
        assert row.startswith(f" {shown[t]:<2} ")
        shades, most = row[4 : 4 + 2 * n], row[4 + 2 * n :]
        expected = ["" if w < 0.05 else w for w in weights[t, len(shown) - n :].tolist()]
        for i, weight in enumerate(expected):
            level = sum((weight or 0) >= low for low in (0.05, 0.15, 0.30, 0.60))
            assert shades[2 * i : 2 * i + 2] == " ░▒▓█"[level] * 2, (t, i, weight)
        best = int(weights[t].argmax())
        assert most == f" '{shown[best]}' {float(weights[t, best]):.0%}"


def test_attention_leaves_the_model_as_it_was(model, tokenizer):
    """Fails if the hook stays: every later step would be slower and keep its tensors."""
    anexagpt.attn_view(model, tokenizer, PROMPT, 1, None, anexagpt.Frame())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("layer, head, message", [
    (3, None, "--layer 3: must be from 1 to 2"),
    (0, None, "--layer 0: must be from 1 to 2"),
    (1, -1, "--head -1: must be from 1 to 2"),
])  # fmt: skip
def test_attention_refuses_what_is_not_there(model, tokenizer, layer, head, message):
    """Fails if layer 0 or -1 shows some other layer, as Python's indices would."""
    with pytest.raises(anexagpt.UserError, match=re.escape(message)):
        anexagpt.attn_view(model, tokenizer, PROMPT, layer, head, anexagpt.Frame())


def test_tokens(tokenizer):
    """Fails if an id is not the character's place, or if what is mapped or dropped is not told."""
    text = "Sh\u2019\u00e9x\n\u4f60"
    view = anexagpt.tokens_view(tokenizer, text, anexagpt.Frame())
    above, below, above2, below2, total, notice = view.plain.split("\n")
    ids = [CHARACTERS.index(c) for c in "Sh'e"]
    assert below.split() == [*map(str, ids), "-", str(CHARACTERS.index("\n"))]
    assert (above2.strip(), below2.strip()) == ("\u4f60", str(CHARACTERS.index("\u4f60")))
    for shown, i in zip("Sh\u2019\u00e9", ids, strict=True):
        assert below[above.index(shown) :].startswith(f"{i} ")
    assert total == f"7 characters, 6 ids of 1 to {len(CHARACTERS) - 1}"
    assert notice == f"read \u2019 as ', \u00e9 as e; left out x (not in the model's {len(CHARACTERS) - 1} characters)"


HARD = "a\u4f60" * 40 + "\u0301\x1b[31m\x07\x00\u202e\t\u200b\ud800\n\U0001f600" * 9 + "e\u0301" * 30


def test_a_terminal_of_few_cells(model, tokenizer):
    """Catches a traceback where a window is drawn very small."""
    cfg = anexagpt.SampleConfig(top_k=3, top_p=0.5, min_p=0.1, repetition_penalty=2.0)
    for width in range(1, 20):
        anexagpt.probs_view(model, tokenizer, "Hello", cfg, anexagpt.Frame(width, 5))


@pytest.mark.parametrize("width", [80, 40])
def test_no_view_is_wider_than_the_terminal_or_steers_it(model, tokenizer, width):
    """Fails if a wide, combining or control character breaks a line's width, or reaches the terminal as it is."""
    frame, cfg = anexagpt.Frame(width), anexagpt.SampleConfig(top_k=5)
    text, _ = tokenizer.admit(HARD)
    views = [
        anexagpt.tokens_view(tokenizer, HARD, frame),
        anexagpt.probs_view(model, tokenizer, text, cfg, frame),
        anexagpt.why_view(model, tokenizer, "", text, frame),
        anexagpt.attn_view(model, tokenizer, text, None, None, frame),
    ]
    for view in views:
        for line in view.plain.split("\n"):
            assert not any(unicodedata.category(c) in ("Cc", "Cf", "Cs") for c in line)
            assert not any(map(unicodedata.combining, line))
        file = Console(width=width, force_terminal=True, color_system="truecolor")
        with file.capture() as capture:
            file.print(view, highlight=False)
        for line in capture.get().split("\n"):
            assert cell_len(re.sub(r"\x1b\[[\d;]*m", "", line)) <= width
    sentences = ("Below each", "attention from", "characters", "left out", "read", "Layer", "After")
    for view in views:
        for line in view.plain.split("\n"):
            assert cell_len(line.rstrip()) <= width or any(word in line for word in sentences), line


class Ascii:
    """A terminal that can spell ASCII only."""

    encoding = "ascii"

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text.encode("ascii", "backslashreplace").decode()

    def flush(self):
        pass

    def isatty(self):
        return False


def test_without_colour_and_in_ascii(model, tokenizer):
    """Fails if a plain terminal or a pipe gets escape sequences, or characters that its encoding does not have."""
    file = Ascii()
    console = Console(file=file, width=80)
    anexagpt.look(console, anexagpt.attn_view, model, tokenizer, PROMPT, None, None)
    anexagpt.look(console, anexagpt.probs_view, model, tokenizer, PROMPT, anexagpt.SampleConfig())
    anexagpt.look(console, anexagpt.why_view, model, tokenizer, PROMPT, "[bold].:")
    assert "####" in file.text and ". 5%" in file.text and "bold" in file.text and "\\u2591" not in file.text
    assert "\x1b" not in file.text
