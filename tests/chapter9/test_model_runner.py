"""The runner: OpenAI's answers from either engine, no slot lost, no character broken, drained."""

import asyncio
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import types
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import openai
import pytest
import warm
from book import CHAPTERS
from fastapi import FastAPI
from hypothesis import example, given, settings
from hypothesis import strategies as st

CODE = warm.ROOT / CHAPTERS[8] / "code"
MODEL = warm.ROOT / CHAPTERS[7] / "checkpoint"
SCRIPT = str(CODE / "model_runner.py")
PROMPT = "When a rank waits for the others,"
ASK = {"model": "book", "prompt": PROMPT, "max_tokens": 4, "temperature": 0}
CHAT = {"model": "book", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 4}


@pytest.fixture(scope="module")
def runner() -> Iterator[ModuleType]:
    sys.path.insert(0, str(CODE))
    yield warm.load("model_runner", CODE / "model_runner.py")
    sys.path.remove(str(CODE))


@pytest.fixture(scope="module")
def codec(runner: ModuleType) -> Any:
    return runner.TextCodec(MODEL)


# --- text ------------------------------------------------------------------------------------------


def pieces_of(runner: ModuleType, codec: Any, ids: list[int], stops: list[str]) -> list[str]:
    text = runner.Detokenizer(codec, stops)
    pieces = []
    for token in ids:
        if not text.stopped:
            pieces.append(text.add(token))
    return pieces if text.stopped else [*pieces, text.rest()]


def test_pieces_are_the_text_and_no_character_is_broken(runner: ModuleType, codec: Any) -> None:
    @settings(max_examples=200, deadline=None)
    @given(st.text(alphabet="a\u00e9\u6570\U0001f600 the rank\u0301\n"))
    def whole(text: str) -> None:
        pieces = pieces_of(runner, codec, codec.encode(text), [])
        assert "".join(pieces) == text
        assert not any("\ufffd" in piece for piece in pieces)

    @settings(max_examples=200, deadline=None)
    @given(st.lists(st.integers(0, 2047), max_size=30))
    def any_ids(ids: list[int]) -> None:  # a model may write bytes that are no text
        pieces = pieces_of(runner, codec, ids, [])
        assert "".join(pieces) == codec.decode(ids, skip_special_tokens=True)

    whole()
    any_ids()


def test_a_stop_string_and_what_begins_like_it_are_never_sent(
    runner: ModuleType, codec: Any
) -> None:
    @settings(max_examples=300, deadline=None)
    @given(st.text("ab\u6570 "), st.lists(st.text("ab\u6570 ", min_size=1, max_size=4), max_size=3))
    @example("a ba", ["ba", "a b", "ba "])
    @example("ba", ["a", "ba"])
    def stops(text: str, stops: list[str]) -> None:
        ids = [i for character in text for i in codec.encode(character)]
        said = "".join(pieces_of(runner, codec, ids, stops))
        end = min(
            (text.find(stop) + len(stop) for stop in stops if stop in text), default=len(text)
        )
        seen = text[:end]  # when the first stop string is complete
        assert said == text[: min([seen.find(stop) for stop in stops if stop in seen] or [end])]

    stops()


def test_a_tokenizer_that_drops_the_first_space(runner: ModuleType) -> None:
    """SentencePiece's: a word alone has no space before it, after another word it has."""

    class Words:
        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            return "".join(["\u2581the", "\u2581rank", "s"][i] for i in ids).replace("\u2581", " ")[
                1:
            ]

    assert pieces_of(runner, Words(), [0, 1, 2, 0], []) == ["the", " rank", "s", " the", ""]


MUTANTS = [
    ('if text.endswith("\\ufffd"):', "if False:"),
    ("self.start, self.said = self.said, len(self.ids)", "self.start = self.said = len(self.ids)"),
    ("return text[: len(text) - keep]", "return text"),
    ("return text[: min(found)]", "return text[: max(found)]"),
    ("text = self.held + new", "text = new"),
]


@pytest.mark.full
@pytest.mark.parametrize(("right", "wrong"), MUTANTS)
def test_mutants_of_the_detokenizer(codec: Any, right: str, wrong: str) -> None:
    source = (CODE / "engines.py").read_text()
    assert source.count(right) == 1
    mutant = types.ModuleType("mutant")
    sys.modules["mutant"] = mutant  # dataclasses look there
    exec(compile(source.replace(right, wrong), "mutant", "exec"), mutant.__dict__)  # noqa: S102 - the book's own

    def judge() -> None:
        test_pieces_are_the_text_and_no_character_is_broken(mutant, codec)
        test_a_stop_string_and_what_begins_like_it_are_never_sent(mutant, codec)
        test_a_tokenizer_that_drops_the_first_space(mutant)

    with pytest.raises(Exception, match=r"assert|distinct failures"):
        judge()


# --- the API, on an engine that the test holds in its hand -----------------------------------------


class Hand:
    """An engine that gives token after token, or as many as it is let."""

    def __init__(self, context: int = 32, free: bool = True):
        self.context = context
        self.free = free
        self.working = 0
        self.error: Exception | None = None
        self.let: asyncio.Queue[int] = asyncio.Queue()

    def load(self) -> None: ...

    def alive(self) -> bool:
        return True

    def shut_down(self) -> None: ...

    async def tokens(self, prompt: list[int], sampling: Any) -> AsyncIterator[Any]:
        self.working += 1
        try:
            for n in range(sampling.max_tokens):
                if not self.free:
                    await self.let.get()
                if self.error:
                    raise self.error
                yield [40 + n % 26], "length" if n + 1 == sampling.max_tokens else ""
        finally:
            self.working -= 1


def app_of(runner: ModuleType, codec: Any, engine: Any, max_requests: int = 2) -> FastAPI:
    app = runner.runner_app(engine, codec, max_requests)
    app.state.service.ready = True
    return app


class Request:
    """An ASGI request by hand: the test sees each message, and may go away."""

    def __init__(self, app: FastAPI, route: str, body: dict[str, Any]):
        self.inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.outbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        content = json.dumps(body).encode()
        self.inbox.put_nowait({"type": "http.request", "body": content, "more_body": False})
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "path": route,
            "raw_path": route.encode(),
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "headers": [(b"content-type", b"application/json")],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
        }
        self.task = asyncio.ensure_future(app(scope, self.inbox.get, self.outbox.put))  # type: ignore[arg-type]

    async def status(self) -> int:
        message = await asyncio.wait_for(self.outbox.get(), 10)
        assert message["type"] == "http.response.start"
        return message["status"]

    async def text(self) -> str:
        """What is sent until the end."""
        found = b""
        while True:
            message = await asyncio.wait_for(self.outbox.get(), 10)
            found += message.get("body", b"")
            if not message.get("more_body"):
                await asyncio.wait_for(self.task, 10)
                return found.decode()

    async def leave(self) -> None:
        self.inbox.put_nowait({"type": "http.disconnect"})
        with contextlib.suppress(Exception):
            await asyncio.wait_for(self.task, 10)


def unfinished(app: FastAPI) -> dict[str, float]:
    samples = [s for m in app.state.runner.unfinished.collect() for s in m.samples]
    return {s.labels["why"]: s.value for s in samples if s.name.endswith("_total")}


def events_of(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def test_the_shapes_of_an_answer(runner: ModuleType, codec: Any) -> None:
    """Streamed or not the text, the ids and the bill are the same."""

    async def check() -> None:
        app = app_of(runner, codec, Hand())
        for route, body in (("/v1/completions", ASK), ("/v1/chat/completions", CHAT)):
            chat = "chat" in route
            body = body | {"return_token_ids": True}
            whole = Request(app, route, body)
            assert await whole.status() == 200
            answer = json.loads(await whole.text())
            streamed = Request(
                app, route, body | {"stream": True, "stream_options": {"include_usage": True}}
            )
            assert await streamed.status() == 200
            *chunks, bill, done = events_of(await streamed.text())
            assert done == "[DONE]"
            assert (bill["choices"], bill["usage"]) == ([], answer["usage"])
            prompt = codec.encode_chat(CHAT["messages"]) if chat else codec.encode(PROMPT)
            usage = {"prompt_tokens": len(prompt), "completion_tokens": 4}
            assert answer["usage"] == usage | {"total_tokens": len(prompt) + 4}
            choices = [chunk["choices"][0] for chunk in chunks]
            if chat:
                assert choices[0]["delta"] == {"role": "assistant", "content": ""}
                text = "".join(choice["delta"]["content"] for choice in choices)
                assert text == answer["choices"][0]["message"]["content"]
            else:
                text = "".join(choice["text"] for choice in choices)
                assert text == answer["choices"][0]["text"]
            ids = [token for choice in choices for token in choice["token_ids"]]
            assert ids == answer["choices"][0]["token_ids"] == [40, 41, 42, 43]
            assert text == codec.decode(ids)
            assert [c["finish_reason"] for c in choices[-2:]] == [None, "length"]
            assert len({chunk["id"] for chunk in chunks}) == 1

    asyncio.run(check())


def test_a_client_that_leaves_frees_its_slot(runner: ModuleType, codec: Any) -> None:
    """Streamed or not; before the first token or in the middle."""

    async def check() -> None:
        engine = Hand(free=False)
        app = app_of(runner, codec, engine, max_requests=1)
        for stream in (True, False):
            for tokens in (0, 2):
                request = Request(app, "/v1/completions", ASK | {"stream": stream})
                while not engine.working:
                    await asyncio.sleep(0)
                refused = Request(app, "/v1/completions", ASK)
                assert await refused.status() == 429
                assert json.loads(await refused.text())["error"]["code"] == "overloaded"
                for _ in range(tokens):
                    engine.let.put_nowait(1)
                while not engine.let.empty():
                    await asyncio.sleep(0)
                await request.leave()
                assert (engine.working, app.state.runner.active) == (0, 0)
        assert app.state.service.running == 0
        assert unfinished(app) == {"refused": 4, "left": 4}

    asyncio.run(check())


def test_a_client_that_does_not_read_has_left(
    runner: ModuleType, codec: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["openai_api"], "UNREAD_S", 0.05)

    async def check() -> None:
        app = app_of(runner, codec, Hand())
        request = Request(app, "/v1/completions", ASK | {"stream": True})
        request.outbox._maxsize = 1  # type: ignore[attr-defined] # one message, and nobody takes it
        await asyncio.wait_for(request.task, 10)
        assert app.state.runner.active == 0
        assert unfinished(app) == {"left": 1}

    asyncio.run(check())


def test_an_engine_that_fails(runner: ModuleType, codec: Any) -> None:
    """A status before 200 is out; in a stream an event with the error and no [DONE]."""

    async def check() -> None:
        engine = Hand(free=False)
        app = app_of(runner, codec, engine)
        streamed = Request(app, "/v1/completions", ASK | {"stream": True})
        engine.let.put_nowait(1)
        while not engine.let.empty():
            await asyncio.sleep(0)
        whole = Request(app, "/v1/completions", ASK)
        while engine.working < 2:
            await asyncio.sleep(0)
        engine.error = RuntimeError("secret details")
        for _ in range(2):
            engine.let.put_nowait(1)
        assert await streamed.status() == 200
        *_, last = events_of(await streamed.text())
        assert (last["error"]["type"], last["error"]["code"]) == ("server_error", None)
        assert await whole.status() == 500
        found = b""
        while (message := await whole.outbox.get()).get("more_body"):
            found += message["body"]
        assert b"secret" not in found + message["body"]
        with pytest.raises(RuntimeError):  # for the log
            await whole.task
        assert app.state.runner.active == 0
        assert unfinished(app) == {"failed": 2}

    asyncio.run(check())


BAD: list[tuple[int, str | None, dict[str, Any]]] = [
    (404, "model", {"model": "gpt-5"}),
    (400, "max_tokens", {"max_tokens": -1}),
    (400, "max_tokens", {"max_tokens": 0}),
    (400, "max_tokens", {"max_tokens": "4"}),
    (400, "max_tokens", {"max_tokens": 30}),
    (400, None, {"prompt": [5] * 32}),
    (400, "prompt", {"prompt": ""}),
    (400, "prompt", {"prompt": []}),
    (400, "prompt", {"prompt": [2048]}),
    (400, "prompt", {"prompt": [-1]}),
    (400, "prompt.str", {"prompt": ["two", "prompts"]}),
    (400, "prompt.str", {"prompt": None}),
    (400, "temperature", {"temperature": -0.1}),
    (400, "top_p", {"top_p": 0}),
    (400, "seed", {"seed": 2**63}),
    (400, "stop.str", {"stop": ["a"] * 17}),
    (400, "n", {"n": 2}),
    (400, "logprobs", {"logprobs": 1}),
    (400, "logprobs", {"logprobs": 0}),
    (404, "model", {"model": "\ud83d"}),
    (400, "tools", {"tools": [{}]}),
    (400, "stream", {"stream": "yes"}),
    (400, "user", {"user": 5}),
]


@pytest.mark.parametrize(("status", "param", "change"), BAD)
def test_bad_requests(
    runner: ModuleType, codec: Any, status: int, param: str | None, change: dict[str, Any]
) -> None:
    async def check() -> None:
        app = app_of(runner, codec, Hand())
        request = Request(app, "/v1/completions", ASK | change)
        found = await request.status()
        error = json.loads(await request.text())["error"]
        assert (found, error["param"]) == (status, param), error
        assert error["type"] == "invalid_request_error"
        assert app.state.runner.active == 0

    asyncio.run(check())


def test_neutral_parameters_are_no_reason_to_refuse(runner: ModuleType, codec: Any) -> None:
    async def check() -> None:
        extra = {"n": 1, "user": "me", "logprobs": False, "presence_penalty": 0.0, "seed": -1}
        request = Request(app_of(runner, codec, Hand()), "/v1/completions", ASK | extra)
        assert await request.status() == 200
        await request.text()

    asyncio.run(check())


def test_requests_take_turns(runner: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Token by token: a long answer does not keep a short one waiting."""
    engine = runner.TransformersEngine(MODEL)
    order: list[int] = []
    go = threading.Event()

    def step(turn: Any) -> bool:
        go.wait(20)
        order.append(turn.prompt[0])
        turn.made += 1
        turn.put(([1], "length" if turn.made == turn.sampling.max_tokens else ""))
        return turn.made == turn.sampling.max_tokens

    monkeypatch.setattr(engine, "step", step)

    async def read(name: int, count: int) -> int:
        sampling = runner.Sampling(count, 0, 1, None, True)
        return len([item async for item in engine.tokens([name], sampling)])

    async def both() -> None:
        engine.worker.start()
        tasks = [asyncio.create_task(read(1, 5)), asyncio.create_task(read(2, 3))]
        while engine.inbox.qsize() < 1:  # the first is taken, the second waits
            await asyncio.sleep(0)
        go.set()
        assert [await task for task in tasks] == [5, 3]

    asyncio.run(both())
    engine.shut_down()
    assert not engine.alive()
    assert order in ([1, 2, 1, 2, 1, 2, 1, 1], [1, 1, 2, 1, 2, 1, 2, 1])


# --- real engines ----------------------------------------------------------------------------------


class Server:
    """The script as a process."""

    def __init__(self, *flags: str):
        self.process = subprocess.Popen(
            [sys.executable, SCRIPT, "--port", "0", "--model", str(MODEL), *flags],
            cwd=warm.ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.said: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.errors: list[str] = []
        self.readers = [
            threading.Thread(target=self.read, args=(self.process.stdout, self.said.put)),
            threading.Thread(target=self.read, args=(self.process.stderr, self.errors.append)),
        ]
        for reader in self.readers:
            reader.start()
        while True:
            line = self.said.get(timeout=200)
            if line.startswith("ready: "):
                self.url = line.removeprefix("ready: ").strip()
                return
            assert line, "".join(self.errors)

    @staticmethod
    def read(stream: Any, put: Callable[[str], None]) -> None:
        for line in stream:
            put(line)
        put("")

    def post(self, **change: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/completions", json=ASK | change, timeout=60)

    def running(self) -> float:
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        name = "vllm:num_requests_running "
        return float(next(line for line in lines if line.startswith(name)).split()[-1])

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for reader in self.readers:
            reader.join()


@pytest.fixture(scope="module")
def transformers_server() -> Iterator[Server]:
    server = Server("--engine", "transformers", "--max-requests", "3")
    yield server
    server.close()


@pytest.fixture(scope="module")
def vllm_server(vllm: Path) -> Iterator[Server]:
    server = Server("--engine", "vllm", "--max-requests", "3")
    yield server
    server.close()


@pytest.fixture(scope="module", params=["transformers", "vllm"])
def server(request: pytest.FixtureRequest) -> Server:
    return request.getfixturevalue(f"{request.param}_server")


@pytest.fixture(scope="module")
def expected() -> dict[str, list[int]]:
    """What transformers' own generate makes of some prompts; some of them end with the end token."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    found = {}
    for prompt in (PROMPT, "##", "The gradients", "All checks ok", "Summary"):
        ids = torch.tensor([tokenizer(prompt).input_ids])
        out = model.generate(ids, max_new_tokens=200, do_sample=False)
        found[prompt] = out[0, ids.shape[1] :].tolist()
    assert {ids[-1] == 0 for ids in found.values()} == {True, False}
    return found


@pytest.mark.full
def test_greedy_tokens_are_those_of_generate(
    server: Server, expected: dict[str, list[int]]
) -> None:
    for prompt, ids in expected.items():
        answer = server.post(prompt=prompt, max_tokens=200, return_token_ids=True).json()
        choice = answer["choices"][0]
        assert choice["token_ids"] == ids
        assert choice["finish_reason"] == ("stop" if ids[-1] == 0 else "length")
        assert answer["usage"]["completion_tokens"] == len(ids)


@pytest.mark.full
def test_a_seed_is_a_seed_while_others_run(server: Server) -> None:
    want = {"temperature": 1.0, "top_p": 0.9, "max_tokens": 40, "ignore_eos": True}
    alone = server.post(seed=7, **want).json()["choices"][0]["text"]
    with httpx.stream("POST", f"{server.url}/v1/completions", json=ASK | want | {"stream": True}):
        again = server.post(seed=7, **want).json()["choices"][0]["text"]
    other = server.post(seed=8, **want).json()["choices"][0]["text"]
    cold = server.post(**want | {"temperature": 1e-40}).json()["choices"][0]["text"]
    assert cold == server.post(**want | {"temperature": 0}).json()["choices"][0]["text"]
    assert alone == again != other


@pytest.mark.full
def test_the_openai_client(server: Server) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["book"]
    messages: Any = CHAT["messages"]
    stream = client.chat.completions.create(
        model="book",
        messages=messages,
        max_tokens=12,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 12
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="gpt-5", prompt="a")
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="book", prompt="a", max_tokens=300)
    assert refused.value.code == "context_length_exceeded"


@pytest.mark.full
def test_clients_that_come_together_and_leave(server: Server) -> None:
    """More than there are slots: each has a place or a 429. They leave, and all slots are free."""
    long = ASK | {"prompt": "a", "max_tokens": 250, "ignore_eos": True, "stream": True}

    def look_in(_: int) -> int:
        with httpx.stream("POST", f"{server.url}/v1/completions", json=long) as stream:
            if stream.status_code == 429:
                assert stream.headers["retry-after"] == "1"
            else:
                assert next(stream.iter_lines()).startswith("data: ")
            return stream.status_code

    with ThreadPoolExecutor(8) as clients:
        statuses = set(clients.map(look_in, range(16)))
    assert 200 in statuses <= {200, 429}
    while server.running():
        pass
    assert server.post().status_code == 200


@pytest.mark.full
@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_draining(engine: str, request: pytest.FixtureRequest) -> None:
    """SIGTERM to the whole group, as a shell's `kill %1`: running streams end, new ones do not start."""
    server: Server = request.getfixturevalue(f"{engine}_server")
    long = ASK | {"prompt": "a", "max_tokens": 250, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=long) as stream:
        lines = stream.iter_lines()
        next(lines)
        os.killpg(server.process.pid, signal.SIGTERM)
        while httpx.get(f"{server.url}/health").status_code == 200:
            pass
        assert httpx.get(f"{server.url}/health").json() == {"status": "draining"}
        assert server.post().status_code == 503
        *rest, done = [line for line in lines if line]
    assert done == "data: [DONE]"
    assert json.loads(rest[-1][6:])["choices"][0]["finish_reason"] == "length"
    assert server.process.wait(30) == 0
    assert not [line for line in server.errors if "Traceback" in line]


def test_a_dead_engine_ends_the_process(runner: ModuleType) -> None:
    """Whoever started it sees exit code 1 and starts another. A health of 200 would be a lie."""
    http = sys.modules["http_service"]
    alive = True
    service = runner.Service("runner", alive=lambda: alive, ready=True)
    server = http.DrainingServer(http.uvicorn.Config(lambda: None), service, "", 1)
    assert not asyncio.run(server.on_tick(1))
    alive = False
    assert asyncio.run(server.on_tick(1))
    assert server.failed


def test_who_lingers_says_503_before_it_ends(runner: ModuleType) -> None:
    http = sys.modules["http_service"]
    service = runner.Service("runner", ready=True)
    config = http.uvicorn.Config(lambda: None)
    for linger_s, ends in ((0.0, True), (5.0, False)):
        server = http.DrainingServer(config, service, "", 10, linger_s)
        server.handle_exit(signal.SIGTERM, None)
        assert asyncio.run(server.on_tick(1)) == ends
        service.draining = False
    server.handle_exit(signal.SIGTERM, None)
    server.handle_exit(signal.SIGTERM, None)  # the second signal does not wait
    assert asyncio.run(server.on_tick(1))


@pytest.mark.full
def test_a_wrong_folder_is_said_in_a_line() -> None:
    command = [sys.executable, SCRIPT, "--engine", "transformers", "--model", "/nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=warm.ROOT)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "type --model FOLDER" in done.stderr


@pytest.mark.full
def test_sampling(runner: ModuleType) -> None:
    """The smallest set that has a share of top_p, and within it in proportion."""
    import torch

    engines = sys.modules["engines"]
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    random = torch.Generator().manual_seed(0)

    def draws(temperature: float, top_p: float) -> list[float]:
        sampling = engines.Sampling(1, temperature, top_p, None, False)
        found = [engines.pick(logits.clone(), sampling, random) for _ in range(4000)]
        return [found.count(token) / 4000 for token in range(4)]

    assert draws(0, 1) == [1, 0, 0, 0]
    assert draws(1, 0.5) == [1, 0, 0, 0]
    assert draws(1, 0.51)[2:] == [0, 0]
    for got, wanted in zip(draws(1, 1), [0.5, 0.3, 0.15, 0.05], strict=True):
        assert abs(got - wanted) < 0.04
    assert draws(0.5, 1)[0] == pytest.approx(0.25 / 0.365, abs=0.04)
