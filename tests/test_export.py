"""Export: transformers, llama.cpp, the Hub's own client and TensorBoard read what the program writes."""

import base64
import contextlib
import copy
import csv
import hashlib
import json
import logging
import math
import os
import shutil
import signal
import sys
import threading
import urllib.request
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import TINY, header, prose
from hypothesis import given
from hypothesis import strategies as st

import anexagpt
from anexagpt import HUB_FILES, SampleConfig, load_model, parse_options, random_source, write

CPU = torch.device("cpu")
PROMPTS = [
    "Holmes ",
    "It was a",
    "“You have",
    "Watson",
    "\n\n",
    "the “",
    "é",
    "😀 ",
    "I ",
    "A",
    "said the king’s",
    "漢字 ",
]
SHAPE = ["--n-layer", "2", "--n-head", "4", "--n-embd", "64", "--block-size", "64", "--batch-size", "8"]


def run(*arguments) -> None:
    options = parse_options([str(a) for a in arguments])
    getattr(anexagpt, options.command)(options)


@pytest.fixture(scope="session")
def trained(tmp_path_factory, sherlock) -> Path:
    """A model of the book with curly quotes, and with characters of two, three and four bytes thrown in."""
    folder = tmp_path_factory.mktemp("export")
    text = sherlock.decode("utf-8-sig")[50_000:150_000].replace(' "', " “").replace('"', "”").replace("'", "’")
    text = text.replace("Watson", "Watson 😀").replace("Lestrade", "漢字 Lestrade é")
    (folder / "book.txt").write_text(text, encoding="utf-8")
    options = ["--data", folder / "book.txt", "--out", folder / "model.safetensors", *SHAPE, "--dtype", "float32"]
    run("train", *options, "--device", "cpu", "--max-steps", 200, "--eval-interval", 50, "--quiet")
    run("export", folder / "hf", "--model", folder / "model.safetensors")
    return folder


@pytest.fixture(scope="session")
def ours(trained):
    return load_model(trained / "model.safetensors", CPU)


@pytest.fixture(scope="session")
def theirs(trained):
    """The folder as transformers reads it; not a word of warning is allowed."""
    transformers = pytest.importorskip("transformers")
    said = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("transformers").addHandler(handler)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, loading = transformers.AutoModelForCausalLM.from_pretrained(trained / "hf", output_loading_info=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(trained / "hf")
        pipe = transformers.pipeline("text-generation", model=str(trained / "hf"))  # sets its tokenizer's padding side
        pipe("Holmes", do_sample=False)
    assert not said and not any(loading.values()), (said, loading)
    return model.eval(), tokenizer, pipe


def greedy(ours, prompt: str, n: int) -> str:
    cfg = SampleConfig(temperature=0.0, max_new=n)
    return "".join(piece for (piece,) in write(ours[0], ours[1], prompt, cfg, random_source(0)))


# ---- transformers ----------------------------------------------------------------------------------------------------


def test_logits_are_those_of_transformers(ours, theirs):
    """Catches a matrix that is not transposed, another epsilon, and weights left out."""
    ids = torch.randint(1, len(ours[1]), (8, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (ours[0](ids) - theirs[0](ids).logits).abs().max() < 1e-5


def test_logits_at_large_weights(ours, theirs):
    """Catches the other GELU, which hides behind small weights: the blocks' matrices times 8, in float64."""
    mine, other = copy.deepcopy(ours[0]).double(), copy.deepcopy(theirs[0]).double()
    with torch.no_grad():
        for weight in [*mine.h.parameters(), *other.transformer.h.parameters()]:
            weight.mul_(8 if weight.dim() == 2 else 1)
        ids = torch.arange(1, 65)[None] % len(ours[1])
        assert (mine(ids) - other(ids).logits).abs().max() < 1e-9


def test_tokenizer_is_ours(ours, theirs):
    """Catches characters that are lost, joined, cleaned up or changed on the way there or back."""
    _, mine, story = ours
    _, other, _ = theirs

    @given(st.text(st.sampled_from(story.characters[1:]), max_size=60))
    def known(text):
        ids = mine.encode(text).tolist()
        assert other(text)["input_ids"] == ids
        assert other.decode(ids) == other.decode(ids, skip_special_tokens=True) == text

    @given(st.text(max_size=30))
    def any_text(text):
        assert other(text)["input_ids"] == mine.encode(text).tolist()

    known()
    any_text()
    assert other.padding_side == "left" and other.model_max_length == 64


@pytest.mark.parametrize("prompt", [*PROMPTS, ""])
def test_pipeline_writes_our_text(ours, theirs, prompt):
    """Catches an end token that ends the text, id 0 being written, and a length that leaves the context."""
    (answer,) = theirs[2](prompt, do_sample=False)
    start = prompt or "\n"
    assert answer["generated_text"] == start + greedy(ours, prompt, 64 - len(start))


def test_left_padded_batch_writes_our_text(ours, theirs):
    """Catches padding on the wrong side and positions that count it."""
    model, tokenizer, _ = theirs
    batch = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    ids = model.generate(**batch, do_sample=False)
    new = 64 - batch["input_ids"].shape[1]
    for prompt, row in zip(PROMPTS, ids, strict=True):
        assert tokenizer.decode(row, skip_special_tokens=True) == prompt + greedy(ours, prompt, new)


def test_sampling_never_writes_the_unknown_character(theirs):
    """Catches a generation config without it: here id 0 is made the likeliest by far."""
    model, tokenizer = copy.deepcopy(theirs[0]), theirs[1]
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.wte.weight[0] *= 50
        model.transformer.ln_f.bias.copy_(model.transformer.wte.weight[0])
        assert not model(torch.tensor([[1, 2, 3]])).logits.argmax(-1).any()
    ids = model.generate(**tokenizer(["I"] * 8, return_tensors="pt"), max_length=40)
    assert ids.shape == (8, 40) and not (ids == 0).any()


def test_exported_file_is_still_a_model_of_anexa(trained, ours, cli):
    """Catches a card that promises what does not work: chat and the rest read the exported weights, bit for bit."""
    path = trained / "hf" / "model.safetensors"
    model, tokenizer, story = load_model(path, CPU)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), ours[0].parameters(), strict=True))
    assert tokenizer.characters == ours[1].characters and story.history == ours[2].history
    assert cli("info", "--model", path).status == 0
    assert header(path)["__metadata__"]["format"] == "pt"


# ---- the card --------------------------------------------------------------------------------------------------------


def test_card_is_read_by_the_hub_and_tells_the_truth(trained, ours):
    """Catches YAML that the Hub refuses, figures that are not those of the file, and folders of this machine."""
    card = pytest.importorskip("huggingface_hub").ModelCard.load(trained / "hf" / "README.md")
    story = ours[2]
    assert (card.data.library_name, card.data.pipeline_tag, card.data.license) == (
        "transformers",
        "text-generation",
        "unknown",
    )
    figures = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert figures["loss"] == pytest.approx(story.validation_loss, abs=1e-4)
    assert figures["bits_per_character"] == pytest.approx(story.validation_loss / 0.693147, abs=1e-4)
    for word in (story.data["sha256"], "book.txt", "seed 1337", "max_steps 200", "64 characters", "😀", "IndexError"):
        assert word in card.text, word
    assert story.data["name"] == str(trained / "book.txt")
    for file in (trained / "hf").iterdir():
        assert trained.name.encode() not in file.read_bytes(), file


@pytest.mark.parametrize(
    "name, published",
    [
        ("https://me:secret@example.org/a/b.txt?key=secret#x", "https://example.org/a/b.txt"),
        ("/home/me/letters.txt", "letters.txt"),
        ("C:\\me\\letters.txt", "letters.txt"),
        ("sherlock", "sherlock"),
        ("HTTPS://p@ss@example.org:80?secret", "HTTPS://example.org:80"),
    ],
)
def test_private_parts_of_the_data_set_name_stay_here(ours, name, published):
    """Catches paths, passwords and keys that are published with the model."""
    story = anexagpt.replace(ours[2], data=ours[2].data | dict(name=name))
    assert anexagpt.for_publishing(story).data["name"] == published


@pytest.mark.parametrize("name", ['a: "b" #', "---", "- [x", "{}", "😀 漢", "null", 'it\'s "x" \\n'])
def test_any_name_makes_a_card(ours, name):
    """Catches names that end the YAML or change its meaning."""
    hub = pytest.importorskip("huggingface_hub")
    story = anexagpt.replace(ours[2], data=ours[2].data | dict(name=name))
    card = hub.ModelCard(anexagpt.model_card(ours[0], ours[1], story, name, "mit"))
    assert card.data.model_name == name and card.data.license == "mit"
    assert card.data.eval_results[0].dataset_name == name


# ---- the folder ------------------------------------------------------------------------------------------------------


def content(folder: Path) -> dict:
    """Files of a folder; of the weights, without their header, whose entries come in any order."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    if (folder / "README.md").exists():
        files["README.md"] = files["README.md"].partition(b"<!-- Written")[0]
        files["model.safetensors"] = files["model.safetensors"].partition(b"}}")[2].lstrip(b"}")
    return files


def test_export_replaces_only_what_it_wrote(trained, tmp_path, cli):
    """Catches an edited card that is lost, and --force that deletes other people's files."""
    model, folder = trained / "model.safetensors", tmp_path / "new"
    assert cli("export", folder, "--model", model).status == 0
    before = content(folder)
    assert set(before) == set(HUB_FILES)
    assert cli("export", folder, "--model", model).status == 0
    assert content(folder) == before
    for name in ("README.md", "generation_config.json", "notes.txt"):
        mine = b"\n# mine\n" + ((folder / name).read_bytes() if name in before else b"")
        (folder / name).write_bytes(mine)
        assert cli("export", folder, "--model", model).is_error(str(folder), "--force")
        assert (folder / name).read_bytes() == mine
        assert cli("export", folder, "--model", model, "--force").status == 0
        assert content(folder) == before | ({name: b"\n# mine\n"} if name == "notes.txt" else {})
    assert cli("export", model, "--model", model).status == 2  # a file, not a folder
    assert cli("export", "--model", model).is_error("--gguf")


@pytest.mark.parametrize("there", [False, True])
def test_full_disk_leaves_the_folder_as_it_was(trained, tmp_path, cli, monkeypatch, there):
    """Catches half-written folders and temporary ones left behind."""
    folder = tmp_path / "new"
    if there:
        shutil.copytree(trained / "hf", folder)
    before, fsync = [content(folder)] if there else [], os.fsync

    def full(number):
        if list(tmp_path.glob(".new.tmp/.tokenizer.json.*")):
            raise OSError(28, "No space left on device")
        fsync(number)

    monkeypatch.setattr(os, "fsync", full)
    assert cli("export", folder, "--model", trained / "model.safetensors").is_error("No space")
    assert [content(path) for path in tmp_path.iterdir()] == before


# ---- llama.cpp -------------------------------------------------------------------------------------------------------


class Llama:
    """llama.cpp's server on a GGUF file."""

    def __init__(self, path: Path):
        xllamacpp = pytest.importorskip("xllamacpp")
        params = xllamacpp.CommonParams()
        params.model.path, params.warmup, params.verbosity = str(path), False, 0
        # The fused attention and float16 keys and values, which are the default, alone cost 1e-3 and more.
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        self.server = xllamacpp.Server(params)

    def post(self, page: str, **question) -> dict:
        data, kind = json.dumps(question).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.server.listening_address}/{page}", data, kind)
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as answer:
            return json.load(answer)


@pytest.fixture(scope="session", params=["f32", "f16"])
def llama(request, trained) -> Llama:
    pytest.importorskip("gguf")
    path = trained / f"{request.param}.gguf"
    half = ["--f16"] if request.param == "f16" else []
    run("export", "--gguf", path, "--model", trained / "model.safetensors", *half)
    llama = Llama(path)
    llama.half = bool(half)
    return llama


def test_llama_tokenizes_as_we_do(ours, llama):
    """Catches characters of several bytes that vanish from prompts, and a token put in front."""
    _, tokenizer, story = ours

    @given(st.text(st.sampled_from(story.characters), max_size=60))
    def same(text):
        ids = tokenizer.encode(text).tolist()
        assert llama.post("tokenize", content=text)["tokens"] == ids
        if 0 not in ids:
            assert llama.post("detokenize", tokens=ids)["content"] == text

    same()
    everything = story.characters[1:]
    assert llama.post("tokenize", content=everything)["tokens"] == list(range(1, len(everything) + 1))
    assert llama.post("tokenize", content="")["tokens"] == []


@pytest.mark.parametrize("prompt", PROMPTS)
def test_llama_writes_our_text(ours, llama, prompt, monkeypatch):
    """Catches swapped or missing tensors, another context length, and an ordinary letter that ends the text."""
    model, tokenizer, _ = ours
    n = 64 - len(prompt)
    question = dict(prompt=prompt, n_predict=n, temperature=0, n_probs=len(tokenizer), cache_prompt=False)
    answer = llama.post("completion", **question)
    assert answer["stop_type"] == "limit" and answer["tokens_predicted"] == n, answer
    ids = tokenizer.encode(prompt + answer["content"]).long()

    @torch.no_grad()
    def expected() -> torch.Tensor:
        return model(ids[None, :-1])[0, len(prompt) - 1 :].log_softmax(-1)  # (n, V)

    found = torch.full_like(expected(), -torch.inf)
    for row, step in zip(found, answer["completion_probabilities"], strict=True):
        for other in step["top_logprobs"]:
            row[other["id"]] = other["logprob"]
    limit = 1e-2 if llama.half else 2e-3
    assert (found - expected()).abs().max() < limit
    # It may part from our greedy text only where two characters are as likely as each other, to that accuracy.
    chosen = expected().gather(1, ids[len(prompt) :, None])[:, 0]
    assert (expected()[:, 1:].amax(1) - chosen).max() < limit
    # What is left of the difference is llama.cpp's table of the GELU, which is in float16.
    gelu = torch.nn.functional.gelu
    monkeypatch.setattr(
        torch.nn.functional,
        "gelu",
        lambda x, approximate: gelu(x.half().float(), approximate=approximate).half().float(),
    )
    assert llama.half or (found - expected()).abs().max() < 5e-4


def test_gguf_and_modelfile_replace_only_what_export_wrote(trained, tmp_path, cli):
    """Catches files of others that are lost, and a Modelfile that samples otherwise than `generate`."""
    pytest.importorskip("gguf")
    model = ["--model", trained / "model.safetensors"]
    first = cli("export", "--gguf", "a.gguf", "--modelfile", *model)
    assert first.status == 0 and "NOTE" in first.err and "64 characters" in first.err  # llama.cpp would go on to 256
    assert cli("export", "--gguf", "a.gguf", "--modelfile", "--f16", *model).status == 0
    recipe = Path("Modelfile").read_text().splitlines()
    assert recipe[0] == "FROM ./a.gguf" and "PARAMETER num_ctx 64" in recipe and "PARAMETER temperature 0.8" in recipe
    Path("Modelfile").write_text("FROM ./other.gguf\n")
    assert cli("export", "--gguf", "a.gguf", "--modelfile", *model).is_error("Modelfile", "--force")
    Path("b.gguf").write_bytes(b"GGUF of somebody else")
    assert cli("export", "--gguf", "b.gguf", *model).is_error("b.gguf", "--force")
    assert cli("export", "--gguf", "b.gguf", *model, "--force").status == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["Modelfile", "a.gguf", "b.gguf"]
    assert cli("export", "new/folder", "--gguf", "new/file.gguf", *model).status == 0
    assert sorted(p.name for p in Path("new").iterdir()) == ["file.gguf", "folder"]


# ---- the Hub ---------------------------------------------------------------------------------------------------------

TOKEN = "hf_" + "secretsecretsecretsecretsecret"


class Hub:
    """As much of the Hugging Face Hub as create_repo, upload_folder and from_pretrained use, on the loopback."""

    def __init__(self):
        self.files, self.lfs, self.cards, self.modes = {}, {}, [], {}
        self.private, self.status, self.tokens, self.seen_in_process_list = None, 200, set(), False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self, body=b"", status=200, **headers):
                body = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                for name, value in ({"Content_Length": len(body)} | headers).items():
                    self.send_header(name.replace("_", "-"), str(value))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def handle_any(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                path, post = self.path.split("?")[0], self.command == "POST"
                hub.tokens.add(self.headers.get("Authorization"))
                for process in Path("/proc").glob("[0-9]*/cmdline"):
                    with contextlib.suppress(OSError):  # it has ended
                        hub.seen_in_process_list |= TOKEN.encode() in process.read_bytes()
                if hub.status != 200:
                    return self.answer(dict(error="no"), hub.status)
                if post and path == "/api/repos/create":
                    wanted = json.loads(body)
                    if hub.private is None:
                        hub.private = wanted.get("private") or wanted.get("visibility") == "private"
                        return self.answer(dict(url=f"{hub.address}/me/tiny", id="me/tiny", name="me/tiny"))
                    return self.answer(dict(error="exists", url=f"{hub.address}/me/tiny"), 409)
                if post and path == "/api/validate-yaml":
                    hub.cards.append(json.loads(body)["content"])
                    return self.answer(dict(errors=[], warnings=[]))
                if post and path.startswith("/api/models/me/tiny/preupload/"):
                    names = [file["path"] for file in json.loads(body)["files"]]
                    hub.modes |= {n: "lfs" if n.endswith(".safetensors") else "regular" for n in names}
                    rows = [dict(path=n, uploadMode=hub.modes[n], shouldIgnore=False, oid=None) for n in names]
                    return self.answer(dict(files=rows))
                if post and path == "/me/tiny.git/info/lfs/objects/batch":
                    objects = json.loads(body)["objects"]
                    for one in objects:
                        one["actions"] = dict(upload=dict(href=f"{hub.address}/store/{one['oid']}"))
                    return self.answer(dict(transfer="basic", objects=objects))
                if self.command == "PUT" and path.startswith("/store/"):
                    assert hashlib.sha256(body).hexdigest() == path[7:]
                    hub.lfs[path[7:]] = body
                    return self.answer()
                if post and path.startswith("/api/models/me/tiny/commit/"):
                    for line in body.splitlines():
                        entry = json.loads(line)
                        if entry["key"] == "file":
                            hub.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                        if entry["key"] == "lfsFile":
                            hub.files[entry["value"]["path"]] = hub.lfs[entry["value"]["oid"]]
                    url = f"{hub.address}/me/tiny/commit/{'1' * 40}"
                    return self.answer(dict(success=True, commitOid="1" * 40, commitUrl=url))
                if path.startswith("/api/models/me/tiny/tree"):
                    rows = [dict(type="file", path=n, size=len(c), oid="2" * 40) for n, c in hub.files.items()]
                    return self.answer(rows)
                if path.startswith("/api/models/me/tiny"):
                    names = [dict(rfilename=name) for name in hub.files]
                    return self.answer(dict(id="me/tiny", sha="1" * 40, private=bool(hub.private), siblings=names))
                name = path.split("/", 5)[-1] if path.startswith("/me/tiny/resolve/") else ""
                if name in hub.files:
                    file = hub.files[name]
                    tag = f'"{hashlib.sha256(file).hexdigest()}"'
                    return self.answer(file, ETag=tag, X_Repo_Commit="1" * 40)
                self.answer(dict(error="not found"), 404, X_Error_Code="EntryNotFound")

            do_GET = do_HEAD = do_POST = do_PUT = handle_any

            def log_message(self, *arguments):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, kwargs=dict(poll_interval=0.02), daemon=True).start()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub that knows nobody yet; the client in this process and in those it starts is pointed at it."""
    pytest.importorskip("huggingface_hub")
    from huggingface_hub import constants

    it = Hub()
    for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING"))]:
        monkeypatch.delenv(name)
    variables = dict(HF_ENDPOINT=it.address, HF_HOME=str(tmp_path / "home"), HF_TOKEN=TOKEN, HF_HUB_DISABLE_XET="1")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "ENDPOINT", it.address)
    url = it.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    yield it
    it.http.shutdown()
    it.http.server_close()


def test_push_arrives_and_is_read_back_by_from_pretrained(trained, ours, hub, program, tmp_path):
    """Catches files that do not arrive whole, a wrong address, and a token that shows anywhere."""
    transformers = pytest.importorskip("transformers")
    result = program("push", "me/tiny", "--private", "--license", "mit", "--model", trained / "model.safetensors")
    assert result.status == 0, result.err
    assert result.out == f"{hub.address}/me/tiny\n"
    assert set(hub.files) == set(HUB_FILES) and hub.private
    assert hub.modes["model.safetensors"] == "lfs" and hub.modes["README.md"] == "regular"
    assert hub.cards and 'license: "mit"' in hub.cards[0] and "me/tiny" in hub.cards[0]
    assert hub.tokens - {None} == {f"Bearer {TOKEN}"} and not hub.seen_in_process_list
    assert TOKEN not in result.out + result.err
    for file in [*hub.files.values(), *(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())]:
        assert TOKEN.encode() not in file
    where = dict(cache_dir=tmp_path / "cache")
    model = transformers.AutoModelForCausalLM.from_pretrained("me/tiny", **where)
    tokenizer = transformers.AutoTokenizer.from_pretrained("me/tiny", **where)
    ids = model.generate(**tokenizer("Holmes ", return_tensors="pt"), do_sample=False)[0]
    assert tokenizer.decode(ids) == "Holmes " + greedy(ours, "Holmes ", 57)


@pytest.mark.parametrize(
    "status, word", [(401, "hf auth login"), (403, "write access"), (404, "no such"), (500, "500")]
)
def test_what_the_hub_refuses_is_one_line(trained, hub, cli, status, word, monkeypatch):
    """Catches tracebacks, and errors without a cure."""
    hub.status = status
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client tries 500 again
    result = cli("push", "me/tiny", "--model", trained / "model.safetensors")
    assert result.is_error("me/tiny", word) and TOKEN not in result.err


def test_push_without_network_login_or_a_right_name(trained, hub, cli, dead, monkeypatch):
    """Catches errors of the client that are no OSError, and a name that is only found wrong after the upload."""
    from huggingface_hub import constants

    model = ["--model", trained / "model.safetensors"]
    for name in ("a/b/c", "me/-tiny-", "me/ti ny", ""):
        assert cli("push", name, *model).is_error(f"{name}: not uploaded")
    monkeypatch.setattr(constants, "ENDPOINT", dead)
    assert cli("push", "me/tiny", *model).is_error("me/tiny", "no connection")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert cli("push", "me/tiny", *model).is_error("me/tiny", "offline")
    monkeypatch.delenv("HF_TOKEN")
    assert cli("push", "me/tiny", *model).is_error("hf auth login", "HF_TOKEN")
    assert cli("push", "me/tiny", "--token", TOKEN, *model).status == 2
    assert not hub.files


def test_private_is_private(trained, hub, cli):
    """Catches --private being ignored where a public repository has that name already."""
    hub.private = False
    assert cli("push", "me/tiny", "--private", "--model", trained / "model.safetensors").is_error("public")
    assert not hub.files


# ---- figures ---------------------------------------------------------------------------------------------------------

TRAIN = [*TINY, "--max-steps", "40", "--eval-interval", "10", "--warmup-steps", "4", "--quiet"]
TRAIN += ["--learning-rate", "0.004", "--muon-learning-rate", "0.02"]


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "prose.txt"
    path.write_text(prose(), encoding="utf-8", newline="\n")
    return path


def test_log_and_tensorboard_hold_the_figures_of_the_model(text, cli):
    """Catches figures of another step, a rate that is not the one used, and samples that are missing."""
    pytest.importorskip("tensorboard")
    result = cli("train", "--data", text, *TRAIN, "--log", "log.csv", "--tensorboard", "board")
    assert result.status == 0, result.err
    history = json.loads(header(Path("model.safetensors"))["__metadata__"]["history"])
    rows = list(csv.DictReader(Path("log.csv").read_text().splitlines()))
    assert [int(row["step"]) for row in rows] == [10, 20, 30, 40]
    for row, (_, training, validation) in zip(rows, history, strict=True):
        assert float(row["training_loss"]) == pytest.approx(training, rel=1e-5)
        assert float(row["validation_loss"]) == pytest.approx(validation, rel=1e-5)
        assert float(row["characters_per_second"]) > 0
    # Update number 20 comes after 4 of warm-up: ((40 - 19) / (40 - 4)) ** 1.5 of the peak.
    assert float(rows[1]["learning_rate"]) == pytest.approx(0.004 * (21 / 36) ** 1.5, rel=1e-5)
    assert float(rows[1]["muon_learning_rate"]) == pytest.approx(0.02 * (21 / 36) ** 1.5, rel=1e-5)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator("board").Reload()
    for name in list(rows[0])[1:]:
        events = board.Scalars(name)
        assert [event.step for event in events] == [10, 20, 30, 40]
        assert [event.value for event in events] == pytest.approx([float(row[name]) for row in rows], rel=1e-5)
    assert len(board.Tensors("sample/text_summary")) == 4


def test_log_of_a_continued_training_has_each_step_once(text, cli, monkeypatch, tmp_path):
    """Catches rows that are lost or doubled where a training was stopped, and a log that is not ours overwritten."""
    log = ["--log", "log.csv"]
    update = anexagpt.Trainer.update

    def stopped(trainer):
        update(trainer)
        if trainer.step == 25:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(anexagpt.Trainer, "update", stopped)
        assert cli("train", "--data", text, *TRAIN, *log).status == 130
    with open("log.csv", "a") as file:
        file.write("30,1,1,1,1,1\n")  # written after the last save of a training that was killed
    assert cli("train", "--data", text, *TRAIN, *log).status == 0
    rows = list(csv.reader(Path("log.csv").read_text().splitlines()))
    assert [row[0] for row in rows] == ["step", "10", "20", "30", "40"] and rows[3][1] != "1"
    Path("other.csv").write_text("name,age\n")
    assert cli("train", "--data", text, *TRAIN, "--restart", "--log", "other.csv").status == 2
    assert Path("other.csv").read_text() == "name,age\n"


# ---- without the packages --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "package, arguments",
    [
        ("huggingface_hub", ["push", "me/tiny"]),
        ("gguf", ["export", "--gguf", "a.gguf"]),
        ("tensorboard", ["train", "--tensorboard", "board"]),
    ],
)
def test_missing_package_is_one_line_that_installs_it(package, arguments, trained, text, cli, monkeypatch):
    """Catches tracebacks where an optional package is not there."""
    for name in [name for name in sys.modules if name.split(".")[0] == package or name == "torch.utils.tensorboard"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    extra = ["--data", text, *TRAIN] if "train" in arguments else ["--model", trained / "model.safetensors"]
    assert cli(*arguments, *extra).is_error(f"this needs {package}", f"pip install {package}")


def test_export_needs_no_package(trained, cli, monkeypatch):
    """Catches an export that only works where transformers or the Hub's client is installed."""
    for name in ("huggingface_hub", "transformers", "tokenizers", "gguf"):
        monkeypatch.setitem(sys.modules, name, None)
    assert cli("export", "out", "--model", trained / "model.safetensors").status == 0
    assert math.isclose(sum(p.stat().st_size for p in Path("out").iterdir()), 500_000, rel_tol=0.5)
