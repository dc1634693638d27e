"""The tokenizer service: every text comes back, nothing blocks, and bad input has one shape."""

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import httpx
import pytest
import warm
from book import CHAPTERS
from fastapi import FastAPI
from hypothesis import given, settings
from hypothesis import strategies as st

CODE = warm.ROOT / CHAPTERS[8] / "code"
MODEL = warm.ROOT / CHAPTERS[7] / "checkpoint"
JSON = {"Content-Type": "application/json"}
TEXTS = st.text() | st.text(
    alphabet="a \n\t\r<|user|>\u00e9\u6570\U0001f600\u0301\ufffd\0", max_size=40
)


@pytest.fixture(scope="module")
def service() -> Iterator[ModuleType]:
    sys.path.insert(0, str(CODE))
    yield warm.load("tokenizer_service", CODE / "tokenizer_service.py")
    sys.path.remove(str(CODE))


@pytest.fixture(scope="module")
def codec(service: ModuleType) -> Any:
    return service.TextCodec(MODEL)


@pytest.fixture
def app(service: ModuleType, codec: Any) -> FastAPI:
    app = service.tokenizer_app(codec, max_bytes=10_000, max_texts=4, threads=2)
    app.state.service.ready = True
    return app


def client_of(app: FastAPI) -> httpx.AsyncClient:
    inside = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=inside, base_url="http://tokenizer")


def ask(app: FastAPI, route: str, **request: Any) -> httpx.Response:
    async def once() -> httpx.Response:
        async with client_of(app) as client:
            return await client.post(route, **request)

    return asyncio.run(once())


def test_every_text_comes_back(codec: Any) -> None:
    @settings(max_examples=300, deadline=None)
    @given(TEXTS)
    def comes_back(text: str) -> None:
        assert codec.decode(codec.encode(text)) == text

    comes_back()


def test_a_text_a_batch_and_a_chat(app: FastAPI) -> None:
    texts = ["When a rank waits", "", "na\u00efve\n  \u6570"]
    batch = ask(app, "/v1/tokenize", json={"text": texts}).json()
    one = [ask(app, "/v1/tokenize", json={"text": text}).json() for text in texts]
    assert batch == {"ids": [o["ids"] for o in one], "count": [o["count"] for o in one]}
    assert batch["count"] == [len(ids) for ids in batch["ids"]]
    for text, ids in zip(texts, batch["ids"], strict=True):
        assert ask(app, "/v1/detokenize", json={"ids": ids}).json() == {"text": text}
    chat = {"messages": [{"role": "user", "content": "What is a rank?"}]}
    ids = ask(app, "/v1/tokenize", json=chat).json()["ids"]
    said = ask(app, "/v1/detokenize", json={"ids": ids}).json()["text"]
    assert said == "<|user|>\nWhat is a rank?\n<|assistant|>\n"
    bare = ask(app, "/v1/detokenize", json={"ids": ids, "skip_special_tokens": True}).json()["text"]
    assert bare == "\nWhat is a rank?\n\n"


def test_a_long_text_does_not_block_the_probes(service: ModuleType, codec: Any) -> None:
    """The tokenizer is held inside a text until /health has answered."""
    go = threading.Event()

    class Slow:
        def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
            assert go.wait(20), "the event loop was blocked: /health could not answer"
            return codec.encode(text, add_special_tokens)

    app = service.tokenizer_app(Slow(), max_bytes=10_000, max_texts=4, threads=1)
    app.state.service.ready = True

    async def both() -> list[int]:
        async with client_of(app) as client:
            text = asyncio.create_task(client.post("/v1/tokenize", json={"text": "a"}))
            while not app.state.service.running:
                await asyncio.sleep(0)
            health = await client.get("/health")
            go.set()
            return [health.status_code, (await text).status_code]

    assert asyncio.run(both()) == [200, 200]


BAD: list[tuple[int, str, dict[str, Any]]] = [
    (400, "/v1/tokenize", {"json": {}}),
    (400, "/v1/tokenize", {"json": {"text": "a", "messages": []}}),
    (400, "/v1/tokenize", {"json": {"text": 7}}),
    (400, "/v1/tokenize", {"json": {"txt": "a"}}),
    (400, "/v1/tokenize", {"json": {"messages": [{"role": "robot", "content": "a"}]}}),
    (400, "/v1/tokenize", {"content": b'{"text": ', "headers": JSON}),
    (400, "/v1/tokenize", {"content": b'{"text": "\\ud83d"}', "headers": JSON}),
    (400, "/v1/tokenize", {"content": b'{"text": "\xff"}', "headers": JSON}),
    (400, "/v1/tokenize", {"content": b"[" * 9_000, "headers": JSON}),
    (415, "/v1/tokenize", {"content": b'{"text": "a"}'}),
    (400, "/v1/detokenize", {"json": {"ids": [2048]}}),
    (400, "/v1/detokenize", {"json": {"ids": [-1]}}),
    (400, "/v1/detokenize", {"json": {"ids": [2**70]}}),
    (400, "/v1/detokenize", {"json": {"ids": "2"}}),
    (413, "/v1/tokenize", {"json": {"text": ["a"] * 5}}),
    (413, "/v1/tokenize", {"json": {"text": "a" * 10_000}}),
    (404, "/v1/nothing", {"json": {}}),
    (405, "/health", {"json": {}}),
]


@pytest.mark.parametrize(("status", "route", "request_"), BAD)
def test_bad_input(app: FastAPI, status: int, route: str, request_: dict[str, Any]) -> None:
    answer = ask(app, route, **request_)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert "aaaa" not in answer.text, "the input is sent back"


def test_a_body_in_chunks_is_limited_too(app: FastAPI) -> None:
    async def chunks() -> Any:
        yield b'{"text": "'
        for _ in range(1000):
            yield b"a" * 1000
        raise AssertionError("it read on")

    assert ask(app, "/v1/tokenize", content=chunks(), headers=JSON).status_code == 413


def test_loading_and_draining_refuse_and_say_so(app: FastAPI) -> None:
    for name, value in (("ready", False), ("draining", True)):
        setattr(app.state.service, name, value)
        answer = ask(app, "/v1/tokenize", json={"text": "a"})
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert answer.json()["error"]["type"] == "server_error"


@pytest.mark.full
def test_ids_are_those_of_transformers(codec: Any) -> None:
    from transformers import AutoTokenizer

    theirs: Any = AutoTokenizer.from_pretrained(MODEL)
    chat = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "What is <|assistant|> a rank?\n\n"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "\u6570"},
    ]
    wanted = theirs.apply_chat_template(chat, add_generation_prompt=True, tokenize=True)
    assert codec.encode_chat(chat) == wanted["input_ids"]
    text = (warm.ROOT / "resources/corpus.txt").read_text()[:20_000]
    assert codec.encode(text, True) == theirs(text).input_ids


@pytest.mark.full
def test_a_model_without_a_template_gets_lines(service: ModuleType, tmp_path: Any) -> None:
    (tmp_path / "tokenizer.json").write_bytes((MODEL / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text("{}")
    codec = service.TextCodec(tmp_path)
    chat = [{"role": "user", "content": "One"}, {"role": "user", "content": "two"}]
    assert codec.decode(codec.encode_chat(chat)) == "One\ntwo\n"


@pytest.mark.full
def test_a_template_cannot_reach_python(service: ModuleType, tmp_path: Any) -> None:
    (tmp_path / "tokenizer.json").write_bytes((MODEL / "tokenizer.json").read_bytes())
    attack = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    config = json.dumps({"chat_template": attack})
    (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(service.ApiError):
        service.TextCodec(tmp_path).encode_chat([{"role": "user", "content": "a"}])


@pytest.mark.full
def test_a_service_ends_well_and_a_taken_port_is_said() -> None:
    script = [sys.executable, str(CODE / "tokenizer_service.py")]
    with subprocess.Popen([*script, "--port", "0"], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        ready = first.stdout.readline()
        assert ready.startswith("ready: http://127.0.0.1:")
        port = ready.strip().rpartition(":")[2]
        assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
        second = subprocess.run([*script, "--port", port], capture_output=True, text=True)
        first.terminate()
        assert first.wait(20) == 0
    assert (second.returncode, second.stderr.count("\n")) == (2, 1)
    assert "type another --port" in second.stderr
    lost = subprocess.run([*script, "--model", "/nowhere"], capture_output=True, text=True)
    assert (lost.returncode, "type --model FOLDER" in lost.stderr) == (2, True)
