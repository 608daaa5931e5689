"""Export: transformers, llama.cpp and the Hub's own client read what the program writes."""

import base64
import contextlib
import copy
import dataclasses
import hashlib
import json
import logging
import os
import re
import sys
import threading
import urllib.request
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import TINY, header, interrupt_at, prose, start
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import anexagpt

gguf = pytest.importorskip("gguf")
huggingface_hub = pytest.importorskip("huggingface_hub")
transformers = pytest.importorskip("transformers")
xllamacpp = pytest.importorskip("xllamacpp")

ODD = "\u201c\u201d\u2019\t\u00a0\u2028\u00ede\u0301\u6f22\U0001f600\U0001f468\u200d\U0001f469 .,!?"
PROMPTS = ["the cat", "\u201cHolmes", "\n\n", "e\u0301", "\U0001f600 ", "a"]
NAMES = {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json"}
NAMES |= {"tokenizer_config.json", "README.md"}
TEXTS = (
    "https://me:secret@example.org/dir/b.txt?key=hidden#x",
    "/home/me#2/a: #'b'@ [\U0001f600.txt",
)


def run(*arguments) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", open(os.devnull))  # noqa: SIM115
        assert anexagpt.main([str(argument) for argument in arguments]) == 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with a model that knows odd characters, its hf folder and two GGUF files."""
    folder = tmp_path_factory.mktemp("export")
    text = prose(1_500).replace("dog", ODD).replace(" said", " \u201csaid\u201d")
    (folder / "book.txt").write_text(text, encoding="utf-8", newline="")
    model = folder / "model.safetensors"
    shape = ["--n-layer", 2, "--n-head", 4, "--n-embd", 64, "--block-size", 64, "--batch-size", 8]
    options = ["--device", "cpu", "--dtype", "float32", "--max-steps", 100, "--quiet"]
    run("train", folder / "book.txt", "--out", model, *shape, *options)
    tensors, entries = load_file(model), header(model)["__metadata__"]
    data = json.loads(entries["data"]) | dict(names=["sherlock", *TEXTS])
    training = json.loads(entries["training"]) | dict(init="/home/me/first.safetensors")
    save_file(tensors, model, entries | dict(data=json.dumps(data), training=json.dumps(training)))
    run("export", model, folder / "hf", "--gguf", folder / "f32.gguf")
    run("export", model, "--gguf", folder / "f16.gguf", "--f16")
    return folder


@pytest.fixture(scope="module")
def ours(trained):
    return anexagpt.load(trained / "model.safetensors")


@pytest.fixture(scope="module")
def theirs(trained):
    """Model, tokenizer and pipeline as transformers reads the folder, without any warning."""
    messages, handler = [], logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("transformers").addHandler(handler)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load = transformers.AutoModelForCausalLM.from_pretrained
        model, loading = load(trained / "hf", output_loading_info=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(trained / "hf")
        pipe = transformers.pipeline("text-generation", model=str(trained / "hf"))
        pipe("the", do_sample=False)
    assert not messages and not any(loading.values()), (messages, loading)
    return model.eval(), tokenizer, pipe


# ---- transformers ----


@torch.no_grad()
def test_logits(ours, theirs):
    """Catches a matrix not transposed, another epsilon, q, k, v in another order; and the other
    GELU, which hides behind small weights: the same with weights times 8, in float64."""
    ids = torch.randint(1, len(ours.tokenizer), (4, 64), generator=torch.Generator().manual_seed(0))
    assert (ours.network(ids) - theirs[0](ids).logits).abs().max() < 1e-5
    mine, other = copy.deepcopy(ours.network).double(), copy.deepcopy(theirs[0]).double()
    for weight in [*mine.h.parameters(), *other.transformer.h.parameters()]:
        weight.mul_(8 if weight.dim() == 2 else 1)
    assert (mine(ids) - other(ids).logits).abs().max() < 1e-9


def test_tokenizer(ours, theirs):
    """Catches characters that are lost, joined, cleaned up or changed on the way there or back."""
    mine, other = ours.tokenizer, theirs[1]

    @given(st.text(st.sampled_from(mine.characters[1:]), max_size=60))
    def known(text):
        ids = mine.encode(text).tolist()
        assert other(text)["input_ids"] == ids
        assert other.decode(ids) == other.decode(ids, skip_special_tokens=True) == text

    @given(st.text(max_size=30))
    def any_text(text):
        assert other(text)["input_ids"] == mine.encode(text).tolist()

    known()
    any_text()
    assert set(ODD) < set(mine.characters)
    assert other.padding_side == "left" and other.model_max_length == 64


def test_greedy_text(ours, theirs):
    """Catches an end token, id 0 that is written, a wrong length, and padding on the right."""
    greedy = dict(temperature=0.0)
    for prompt in [*PROMPTS, ""]:
        (answer,) = theirs[2](prompt, do_sample=False)
        start = prompt or "\n"
        new = ours.generate(start, max_new=64 - len(start), **greedy)
        assert answer["generated_text"] == start + new
    batch = theirs[1](PROMPTS, padding=True, return_tensors="pt")
    new = 64 - batch["input_ids"].shape[1]
    rows = theirs[0].generate(**batch, do_sample=False)
    for prompt, row in zip(PROMPTS, rows, strict=True):
        text = theirs[1].decode(row, skip_special_tokens=True)
        assert text == prompt + ours.generate(prompt, max_new=new, **greedy)
    wild = theirs[0].generate(**batch, do_sample=True, temperature=99.0, num_return_sequences=9)
    assert wild[:, -new:].all()  # id 0 is never drawn


# ---- the folder ----


def test_folder(trained, ours, cli):
    """Catches an exported file that is no model of ours any more, a card that the Hub refuses or
    that has other figures, and folders, passwords or keys that are published."""
    folder = trained / "hf"
    assert {path.name for path in folder.iterdir()} == NAMES
    again = anexagpt.load(folder / "model.safetensors")
    pairs = zip(again.network.parameters(), ours.network.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert again.metadata.history == ours.metadata.history
    assert cli("generate", "the", "--seed", 1, "--model", folder / "model.safetensors").status == 0
    assert header(folder / "model.safetensors")["__metadata__"]["format"] == "pt"
    card, loss = huggingface_hub.ModelCard.load(folder / "README.md"), ours.metadata.validation_loss
    assert card.data.library_name == "transformers" and card.data.license == "unknown"
    assert card.data.pipeline_tag == "text-generation" and card.data.model_name == "hf"
    assert card.data.eval_results[0].dataset_name.endswith("b.txt, a: #'b'@ [\U0001f600.txt")
    figures = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert figures["loss"] == pytest.approx(loss, abs=1e-4)
    assert figures["bits_per_character"] == pytest.approx(loss / 0.693147, abs=1e-4)
    words = [ours.metadata.data.sha256, "sherlock", "b.txt", "a: #'b'@ [\U0001f600.txt"]
    words += ["python anexagpt.py chat", "llama-completion -m model.gguf"]
    for word in [*words, "max_steps 100", "64 characters", "raises an error", "first.safetensors"]:
        assert word in " ".join(card.text.split()), word
    for file in folder.iterdir():
        content = file.read_bytes()
        for secret in (b"secret", b"hidden", b"/home", b"/tmp", trained.name.encode()):
            assert secret not in content, (file, secret)


def test_same_export_twice(trained, cli):
    """Catches a folder whose files differ each time, so that a second push stores them anew."""
    for name in ("one", "two"):
        assert cli("export", f"{name}/hf", "--model", trained / "model.safetensors").status == 0
    for path in Path("one/hf").iterdir():
        assert path.read_bytes() == Path("two/hf", path.name).read_bytes(), path.name


def test_private_text_with_the_name_of_a_built_in_one(ours):
    """Catches a card that calls it public domain, and an export that stands for the other text."""
    cards = {}
    for name in ("sherlock", "./sherlock", "texts/sherlock", "http://a.net/sherlock"):
        data = ours.metadata.data._replace(names=[name])
        public = anexagpt.without_paths(dataclasses.replace(ours.metadata, data=data))
        if public.data.names[0] not in cards:
            model = anexagpt.Model(ours.network, ours.tokenizer, public)
            cards[public.data.names[0]] = anexagpt.model_card(model, "title", "unknown")
    assert cards.keys() == {"sherlock", "./sherlock"}
    assert "public domain" in cards["sherlock"] and "public domain" not in cards["./sherlock"]


def test_only_a_sha256_is_a_sha256(trained, cli, tmp_path):
    """Catches escape codes or HTML in a header that reach the exported card (number 31)."""
    model, text = trained / "model.safetensors", "<script>\x1b[31m"
    entries = header(model)["__metadata__"]
    for sha256 in (text, text.ljust(64, "0"), "A" * 64, "0" * 64 + "\n", 0):
        data = json.loads(entries["data"]) | dict(sha256=sha256)
        save_file(load_file(model), "m.safetensors", entries | dict(data=json.dumps(data)))
        assert cli("export", "m.safetensors", "hf").is_error(
            "m.safetensors", "not a complete model"
        )


def test_nothing_is_replaced_without_force(trained, cli, tmp_path):
    """Catches files that are lost, a folder that is refused although it is empty, and --force that
    deletes other people's files."""
    model = ["--model", trained / "model.safetensors"]
    (tmp_path / "hf").mkdir()
    assert cli("export", "hf", *model).status == 0
    Path("hf/README.md").write_text("mine")
    Path("hf/notes.txt").write_text("mine")
    Path("a.gguf").write_text("mine")
    assert cli("export", "hf", *model).is_error("hf", "--force")
    assert cli("export", "new", "--gguf", "a.gguf", *model).is_error("a.gguf", "--force")
    assert not Path("new").exists() and Path("hf/README.md").read_text() == "mine"
    assert cli("export", "hf", "--gguf", "a.gguf", "--force", *model).status == 0
    assert {path.name for path in Path("hf").iterdir()} == NAMES | {"notes.txt"}
    assert Path("hf/README.md").read_text() != "mine" and Path("a.gguf").read_bytes()[:4] == b"GGUF"
    assert cli("export", "x/y/hf", "--gguf", "x/z/a.gguf", *model).status == 0
    assert sorted(os.listdir()) == ["a.gguf", "hf", "x"] and os.listdir("x/z") == ["a.gguf"]
    own = Path("own.gguf")  # --model takes any name
    own.write_bytes((trained / "model.safetensors").read_bytes())
    for target in (".", "--gguf=own.gguf"):
        assert cli("export", target, "--force", "--model", own).is_error("the model itself")
    assert own.read_bytes() == (trained / "model.safetensors").read_bytes()


@pytest.mark.parametrize("what", ["activation", "attention"])
def test_network_that_was_changed(cli, tiny, tmp_path, monkeypatch, hub, what):
    """Catches a network of a learner that is exported as if it were GPT-2."""

    def relu(self, x):
        return self.c_proj(torch.relu(self.c_fc(x)))

    def sees_the_future(q, k, v):
        return torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v

    assert cli("export", "before", "--model", tiny).status == 0
    if what == "activation":
        monkeypatch.setattr(anexagpt.MLP, "forward", relu)
    else:
        monkeypatch.setattr(anexagpt, "attention", sees_the_future)
        monkeypatch.setattr(anexagpt.CausalSelfAttention, "attend", staticmethod(sees_the_future))
    for command in ("export after", "export --gguf after.gguf", "push me/after"):
        result = cli(*command.split(), "--model", tiny)
        assert result.status == 2 and "not GPT-2," in result.err.splitlines()[-1]
    assert {path.name for path in tmp_path.iterdir()} == {"before"}


@pytest.mark.parametrize("name", ["f32", "f16"])
def test_number_formats(trained, name):
    """Catches --f16 that changes nothing, or takes vectors or positions, which llama.cpp's own
    conversion keeps in float32."""
    tensors = {
        t.name: t.tensor_type.name for t in gguf.GGUFReader(trained / f"{name}.gguf").tensors
    }
    parts = ("attn_qkv", "attn_output", "ffn_up", "ffn_down")
    layers = anexagpt.load(trained / "model.safetensors").network.config.n_layer
    matrices = {f"blk.{i}.{part}.weight" for i in range(layers) for part in parts}
    halves = {n for n, kind in tensors.items() if kind == "F16"}
    assert halves == (matrices | {"token_embd.weight"} if name == "f16" else set())
    assert {kind for n, kind in tensors.items() if n not in halves} == {"F32"}


# ---- llama.cpp ----


class Llama:
    """llama.cpp's server on a GGUF file."""

    def __init__(self, path: Path):
        params = xllamacpp.CommonParams()
        params.model.path, params.warmup, params.verbosity = str(path), False, 0
        # Its fused attention and float16 keys and values alone cost 1e-3 and more.
        kinds = xllamacpp.llama_flash_attn_type
        params.flash_attn_type = kinds.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        self.half, self.server = path.stem == "f16", xllamacpp.Server(params)

    def post(self, page: str, **question) -> dict:
        data, kind = json.dumps(question).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.server.listening_address}/{page}", data, kind)
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as answer:
            return json.load(answer)


@pytest.fixture(scope="module", params=["f32", "f16"])
def llama(request, trained) -> Llama:
    return Llama(trained / f"{request.param}.gguf")


def test_llama_tokenizes_as_we_do(ours, llama):
    """Catches characters of several bytes that vanish from prompts, and a token put in front."""
    everything = ours.tokenizer.characters[1:]
    for text in (everything, everything[::-1], ODD, "e\u0301\n\n the \u201c", ""):
        ids = ours.tokenizer.encode(text).tolist()
        assert llama.post("tokenize", content=text)["tokens"] == ids
        assert llama.post("detokenize", tokens=ids)["content"] == text


@torch.no_grad()
def test_llama_writes_our_text(ours, llama, monkeypatch):
    """Catches swapped or missing tensors, another context, a letter that ends the text: the same
    log-probabilities, and the greedy text where no two characters are as likely as each other."""
    gelu = torch.nn.functional.gelu  # llama.cpp looks it up in a table, in float16
    half = lambda x, approximate: gelu(x.half().float(), approximate=approximate).half().float()  # noqa: E731
    monkeypatch.setattr(torch.nn.functional, "gelu", half)
    for prompt in PROMPTS[:4]:
        n = 60 - len(prompt)
        question = dict(prompt=prompt, n_predict=n, temperature=0, cache_prompt=False)
        answer = llama.post("completion", **question, n_probs=len(ours.tokenizer))
        assert answer["stop_type"] == "limit" and answer["tokens_predicted"] == n, answer
        ids = torch.tensor(ours.tokenizer.encode(prompt + answer["content"]).astype("i8"))
        expected = ours.network(ids[None, :-1])[0, len(prompt) - 1 :].log_softmax(-1)  # (n, V)
        found = torch.full_like(expected, -torch.inf)
        for row, step in zip(found, answer["completion_probabilities"], strict=True):
            for other in step["top_logprobs"]:
                row[other["id"]] = other["logprob"]
        limit = 1e-2 if llama.half else 1e-3
        assert (found - expected).abs().max() < limit
        best = expected[:, 1:].topk(2).values
        if (best[:, 0] - best[:, 1]).min() > 2 * limit:
            assert answer["content"] == ours.generate(prompt, max_new=n, temperature=0.0)
        chosen = expected.gather(1, ids[len(prompt) :, None])[:, 0]
        assert (best[:, 0] - chosen).max() < limit


# ---- the Hub ----

TOKEN = "hf_" + "secretsecretsecretsecretsecret"


class Hub:
    """As much of the Hub as create_repo, upload_folder and from_pretrained use, on the loopback."""

    def __init__(self):
        self.files, self.lfs, self.cards, self.lfs_names = {}, {}, [], set()
        self.private, self.status, self.tokens, self.in_process_list = None, 200, set(), False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                hub.tokens.add(self.headers.get("Authorization"))
                for process in Path("/proc").glob("[0-9]*/cmdline"):
                    with contextlib.suppress(OSError):  # it has ended
                        hub.in_process_list |= TOKEN.encode() in process.read_bytes()
                answer, status, fields = hub.respond(self.command, self.path.split("?")[0], body)
                answer = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                for name, value in (dict(Content_Length=len(answer)) | fields).items():
                    self.send_header(name.replace("_", "-"), str(value))
                self.end_headers()
                self.wfile.write(answer if self.command != "HEAD" else b"")

            do_GET = do_HEAD = do_POST = do_PUT = handle_any

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def respond(self, command: str, path: str, body: bytes):
        """Content, status and header fields of an answer."""
        api, name = "/api/models/me/tiny", path.split("/", 5)[-1]
        if self.status != 200:
            return dict(error="no"), self.status, {}
        if path == "/api/repos/create":
            wanted, new = json.loads(body), self.private is None
            if new:
                self.private = bool(wanted.get("private") or wanted.get("visibility") == "private")
            return dict(url=f"{self.address}/me/tiny", id="me/tiny"), 200 if new else 409, {}
        if path == "/api/validate-yaml":
            self.cards.append(json.loads(body)["content"])
            return dict(errors=[], warnings=[]), 200, {}
        if path.startswith(f"{api}/preupload/"):
            names = [file["path"] for file in json.loads(body)["files"]]
            self.lfs_names |= {name for name in names if name.endswith(".safetensors")}
            modes = {True: "lfs", False: "regular"}
            rows = [dict(path=n, uploadMode=modes[n in self.lfs_names]) for n in names]
            return dict(files=[row | dict(shouldIgnore=False) for row in rows]), 200, {}
        if path == "/me/tiny.git/info/lfs/objects/batch":
            objects = json.loads(body)["objects"]
            for one in objects:
                one["actions"] = dict(upload=dict(href=f"{self.address}/store/{one['oid']}"))
            return dict(transfer="basic", objects=objects), 200, {}
        if command == "PUT" and path.startswith("/store/"):
            self.lfs[hashlib.sha256(body).hexdigest()] = body
            return b"", 200, {}
        if path.startswith(f"{api}/commit/"):
            for entry in map(json.loads, body.splitlines()):
                value = entry["value"]
                if entry["key"] == "file":
                    self.files[value["path"]] = base64.b64decode(value["content"])
                if entry["key"] == "lfsFile":
                    self.files[value["path"]] = self.lfs[value["oid"]]
            url = f"{self.address}/me/tiny/commit/{'1' * 40}"
            return dict(success=True, commitOid="1" * 40, commitUrl=url), 200, {}
        if path.startswith(f"{api}/tree"):
            rows = [dict(path=n, size=len(c)) for n, c in self.files.items()]
            return [row | dict(type="file", oid="2" * 40) for row in rows], 200, {}
        if path.startswith(api):
            names = [dict(rfilename=name) for name in self.files]
            entries = dict(id="me/tiny", sha="1" * 40, private=bool(self.private))
            return entries | dict(siblings=names), 200, {}
        if path.startswith("/me/tiny/resolve/") and name in self.files:
            tag = f'"{hashlib.sha256(self.files[name]).hexdigest()}"'
            return self.files[name], 200, dict(ETag=tag, X_Repo_Commit="1" * 40)
        return dict(error="not found"), 404, dict(X_Error_Code="EntryNotFound")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub that knows nobody yet, at which the client in this process is pointed."""
    it, constants = Hub(), huggingface_hub.constants
    for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    url = it.address + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in dict(
        ENDPOINT=it.address, HUGGINGFACE_CO_URL_TEMPLATE=url, HF_HUB_DISABLE_XET=True,
        HF_TOKEN_PATH=str(tmp_path / "no-token"),
    ).items():  # fmt: skip
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client repeats after a 500
    yield it
    it.http.shutdown()
    it.http.server_close()


def test_push(trained, ours, hub, cli, tmp_path):
    """Catches files that do not arrive whole, a wrong address, and a token that shows anywhere."""
    model = trained / "model.safetensors"
    result = cli("push", "me/tiny", "--private", "--license", "mit", "--model", model)
    assert result.status == 0 and result.out == f"{hub.address}/me/tiny\n", result.err
    assert set(hub.files) == NAMES and hub.private and hub.lfs_names == {"model.safetensors"}
    assert "me/tiny" in hub.cards[0] and re.search("license: ['\"]?mit", hub.cards[0])
    assert hub.tokens - {None} == {f"Bearer {TOKEN}"}
    for content in [*hub.files.values(), (result.out + result.err).encode()]:
        assert not any(word in content for word in (TOKEN.encode(), b"/home", b"secret", b"hidden"))
    where = dict(cache_dir=tmp_path / "cache")
    other = transformers.AutoModelForCausalLM.from_pretrained("me/tiny", **where)
    tokenizer = transformers.AutoTokenizer.from_pretrained("me/tiny", **where)
    ids = other.generate(**tokenizer("the ", return_tensors="pt"), do_sample=False)[0]
    assert tokenizer.decode(ids) == "the " + ours.generate("the ", max_new=60, temperature=0.0)
    assert cli("push", "me/tiny", "--model", model).status == 0  # once more


def test_model_card_leaves_the_model(trained, monkeypatch):
    """Catches a push that changes the model, or writes its card without the fast decoder."""
    model = anexagpt.load(trained / "model.safetensors")
    before = model.metadata
    monkeypatch.setattr(anexagpt, "without_paths", lambda m: dataclasses.replace(m, step=1))
    monkeypatch.setattr(anexagpt.Model, "decode", None)  # that of the class
    anexagpt.hub_files(model, "me/tiny", "mit")
    assert model.metadata is before


def test_push_in_a_process_of_its_own(trained, hub):
    """Catches a part of the client that nobody has imported yet: a traceback for every user."""
    env = dict(HF_ENDPOINT=hub.address, HF_HUB_DISABLE_XET="1")
    result = start("push", "me/tiny", cwd=trained, env=env)
    assert result.status == 0 and result.out == f"{hub.address}/me/tiny\n", result
    assert not hub.in_process_list  # of the token


def test_push_to_an_address_with_a_password(trained, hub, cli, monkeypatch):
    """Catches a password in HF_ENDPOINT that the program prints."""
    secret = hub.address.replace("//", "//me:secret@")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", secret)
    result = cli("push", "me/tiny", "--model", trained / "model.safetensors")
    assert result.status == 0 and result.out == f"{hub.address}/me/tiny\n", result
    assert "secret" not in result.err


def test_example_of_a_short_context(cli, tmp_path):
    """Catches a card whose own code fails, as its prompt fills the context."""
    Path("dna.txt").write_text("ACGT" * 500)
    shape = ["--n-layer", 1, "--n-head", 1, "--n-embd", 4, "--block-size", 8, "--max-steps", 50]
    assert cli("train", "dna.txt", *shape, "--batch-size", 2, "--device", "cpu").status == 0
    assert cli("export", "hf").status == 0
    (prompt,) = re.findall('write\\("(.*?)"', Path("hf/README.md").read_text())
    assert 1 <= len(prompt) <= 4


def test_push_errors(trained, hub, cli, dead, monkeypatch):
    """Catches tracebacks, errors without a fix, a public repository for --private, and a wrong
    name that is only found after the upload."""
    model = ["--model", trained / "model.safetensors"]
    fixes = "check name", "connection", "hf auth login", "may write"
    for hub.status in (401, 403, 404, 500):
        result = cli("push", "me/tiny", *model)
        assert result.is_error("me/tiny: not uploaded", str(hub.status), *fixes), result
        assert TOKEN not in result.err
    hub.status = 200
    for character in "\x0b\x0c":  # which no header may have
        monkeypatch.setenv("HF_TOKEN", f"{TOKEN}{character}x")
        result = cli("push", "me/tiny", *model)
        assert result.is_error("me/tiny: not uploaded", "header"), result
        assert TOKEN not in result.err
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for name in ("a/b/c", "me/-tiny-", "me/ti ny", ""):
        assert cli("push", name, *model).is_error(f"{name}: must be USER/NAME")
    result = cli("push", "user:secret@huggingface.co/me/x", *model)
    assert result.is_error("must be USER/NAME") and "secret" not in result.err
    assert cli("push", "me/tiny", "--license", "m\nit", *model).is_error("--license", "mit")
    assert cli("push", "me/tiny", "--model", "nowhere").is_error("nowhere: no such file")
    hub.private = False
    assert cli("push", "me/tiny", "--private", *model).is_error("public")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", dead)
    assert cli("push", "me/tiny", *model).is_error("me/tiny: not uploaded", *fixes)
    assert "unexpected answer" not in cli("push", "me/tiny", *model).err
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert cli("push", "me/tiny", *model).is_error("me/tiny", "offline", "HF_HUB_OFFLINE")
    monkeypatch.delenv("HF_TOKEN")
    assert cli("push", "me/tiny", *model).is_error("hf auth login", "HF_TOKEN")
    Path("no-token").write_bytes(b"\xff")
    assert cli("push", "me/tiny", *model).is_error("me/tiny: not uploaded")
    assert not hub.files


def test_nothing_is_created_for_a_model_that_cannot_be_pushed(hub, cli, tmp_path):
    """Catches an empty public repository, left behind by a checkpoint that was never evaluated."""
    Path("t.txt").write_text(prose(300))
    with interrupt_at(3):
        assert cli("train", "t.txt", *TINY, "--max-steps", 99).status == 130
    result = cli("push", "me/tiny", "--model", "model.safetensors.checkpoint")
    assert result.is_error("not been evaluated", "50 steps") and "connection" not in result.err
    assert hub.private is None and not hub.tokens  # nothing was asked for


ANSWERS = {  # malformed answers of a server, by what they answer
    "/api/repos/create": [{}, [], None, "x", 5, dict(url=5)],
    "/api/models/me/tiny/preupload/": [{}, [], None, dict(files=5)],
    "/api/models/me/tiny/commit/": [[], None, {}, dict(commitUrl="http://[")],
}


@pytest.mark.parametrize("path", ANSWERS)
def test_malformed_answers(trained, hub, cli, monkeypatch, path):
    """Catches a traceback for what no server should say, escapes of it on a terminal, and an
    answer without a commit that counts as success."""
    model, respond = ["--model", trained / "model.safetensors"], hub.respond
    monkeypatch.setattr(anexagpt, "hub_files", lambda *_: {"README.md": b"a card"})
    for answer in ANSWERS[path]:

        def malformed(command, asked, body, answer=answer):
            if asked.startswith(path):
                return answer, 200, dict(X_Warning="\x1b[31mred")
            return respond(command, asked, body)

        hub.respond = malformed
        result = cli("push", "me/tiny", *model)
        last = result.err.splitlines()[-1]
        is_refused = result.status == 2 and last.startswith("anexagpt.py: me/tiny: not uploaded")
        assert is_refused or (result.status == 0 and "commit" not in path), result
        assert "\x1b" not in result.err and "Traceback" not in result.err


def test_malformed_endpoint(trained, cli, monkeypatch):
    """Catches a traceback for an HF_ENDPOINT that is no address."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for endpoint in ("http://[", "nonsense", ""):
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
        assert cli("push", "me/tiny", "--model", trained / "model.safetensors").is_error("me/tiny")


def test_without_the_packages(trained, cli, monkeypatch):
    """Catches tracebacks where an optional package is not there, and an export for transformers
    that needs transformers."""
    for name in ("transformers", "tokenizers", "gguf", "huggingface_hub"):
        for loaded in [n for n in sys.modules if n.split(".")[0] == name]:
            monkeypatch.delitem(sys.modules, loaded)
        monkeypatch.setitem(sys.modules, name, None)
    model = ["--model", trained / "model.safetensors"]
    assert cli("push", "me/tiny", *model).is_error("pip install huggingface_hub")
    assert cli("export", "--gguf", "a.gguf", *model).is_error("pip install gguf")
    monkeypatch.delitem(sys.modules, "huggingface_hub")
    assert cli("export", "hf", *model).status == 0


def test_names_that_are_not_utf8(tiny, cli, tmp_path):
    """Catches a traceback where a folder's or a file's name has bytes that are no character."""
    result = cli("export", tiny, "hf-\udcff", "--gguf", "g\udcff.gguf")
    assert result.status == 0
    assert "# hf-\\udcff\n" in (tmp_path / "hf-\udcff" / "README.md").read_text(encoding="utf-8")
    assert (tmp_path / "g\udcff.gguf").exists()


def test_what_others_are_told(tiny, tmp_path):
    """Catches another default temperature or dropout in transformers, a language that nobody
    knows, and matrices in another format than the GGUF file says."""
    model = anexagpt.load(tiny)
    model.network.config = dataclasses.replace(model.network.config, dropout=0.3)
    documents = anexagpt.hub_documents(model)
    sampling = documents["generation_config.json"]
    assert sampling["temperature"] == anexagpt.SampleConfig().temperature
    assert sampling["top_k"] == 0 and sampling["do_sample"] is True
    config = documents["config.json"]
    assert [config[f"{name}_pdrop"] for name in ("attn", "embd", "resid")] == [0.0, 0.3, 0.3]
    assert "language: en" not in anexagpt.model_card(model, "t", "mit")
    gguf = pytest.importorskip("gguf")
    for half, kind in ((False, gguf.LlamaFileType.ALL_F32), (True, gguf.LlamaFileType.MOSTLY_F16)):
        anexagpt.write_gguf(tmp_path / "x.gguf", model, half)
        fields = gguf.GGUFReader(tmp_path / "x.gguf").fields
        assert fields["general.file_type"].contents() == kind
