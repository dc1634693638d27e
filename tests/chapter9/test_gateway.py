"""The gateway in front of fake runners that fail in every way that a real one does."""

import asyncio
import contextlib
import hashlib
import json
import logging
import random
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import httpx
import pytest
import uvicorn
import warm
from book import CHAPTERS
from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

CODE = warm.ROOT / CHAPTERS[8] / "code"
KEY = "sk-a-secret-of-the-reader"
ADMIN = "sk-a-secret-of-the-admin"
READER = {"Authorization": f"Bearer {KEY}"}
PROMPT = "nobody may read this prompt"
BODY = {"model": "book", "prompt": PROMPT, "stream": True}
CHAT = {"model": "book", "messages": [{"role": "user", "content": PROMPT}], "stream": True}


@pytest.fixture(scope="module")
def gateway() -> Iterator[ModuleType]:
    sys.path.insert(0, str(CODE))
    yield warm.load("ch09_api_gateway", CODE / "ch09_api_gateway.py")
    sys.path.remove(str(CODE))


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


class Fake:
    """A runner of four tokens. `mode` says how it fails; `go` holds it after its first token."""

    def __init__(self, mode: str = "answer"):
        self.mode = mode
        self.healthy = True
        self.asked = 0
        self.headers: dict[str, str] = {}
        self.cancelled = threading.Event()
        self.working = threading.Event()
        self.go = threading.Event()
        self.go.set()
        self.url = ""
        self.app = FastAPI()
        for path in ("/v1/completions", "/v1/chat/completions"):
            self.app.add_api_route(path, self.generate, methods=["POST"], response_model=None)
        self.app.add_api_route("/v1/models", self.models, methods=["GET"])
        self.app.add_api_route("/health", self.health, methods=["GET"])

    async def health(self) -> JSONResponse:
        return JSONResponse({}, 200 if self.healthy else 503)

    async def models(self) -> dict:
        return {"object": "list", "data": [{"id": "book", "object": "model"}]}

    async def generate(self, request: Request) -> Response:
        self.asked += 1
        self.headers = dict(request.headers)
        body = await request.json()
        if self.mode.isdigit():
            return JSONResponse({"detail": "as asked"}, int(self.mode))
        if not body.get("stream"):
            return JSONResponse({"choices": [{"text": "abcd"}]})
        chat = request.url.path.endswith("chat/completions")
        return StreamingResponse(self.stream(chat), media_type="text/event-stream")

    async def stream(self, chat: bool) -> AsyncIterator[bytes]:
        try:
            self.working.set()
            if chat:
                yield event({"delta": {"role": "assistant", "content": ""}})
            if self.mode == "dies before":
                raise RuntimeError
            if self.mode == "aborts":
                yield event({"text": "", "finish_reason": "abort"})
                return
            if self.mode == "hangs":
                await asyncio.sleep(3600)
            for number, letter in enumerate("abcd"):
                yield event({"delta": {"content": letter}} if chat else {"text": letter})
                if self.mode == "dies after" and number == 1:
                    raise RuntimeError
                while not self.go.is_set():
                    await asyncio.sleep(0.005)
            yield b"data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.cancelled.set()
            raise


def event(choice: dict) -> bytes:
    return f"data: {json.dumps({'choices': [choice]})}\n\n".encode()


class Threads:
    """Servers in threads of this process, so that a test sees what the gateway holds."""

    def __init__(self) -> None:
        self.running: list[tuple[uvicorn.Server, threading.Thread]] = []

    def serve(self, make: Callable[[uvicorn.Config, str], uvicorn.Server], app: Any) -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # as serve() does
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        server = make(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1), url)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        self.running.append((server, thread))
        return url

    def stop(self) -> None:
        for server, _ in self.running:
            server.should_exit = True
        for _, thread in self.running:
            thread.join()


Start = Callable[..., httpx.Client]


@pytest.fixture
def start(gateway: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Serve fakes and a gateway before them; the client's `app` is the gateway's application."""
    threads = Threads()
    with contextlib.ExitStack() as stack:
        stack.callback(threads.stop)

        def serve(*fakes: Fake, names: str = "runner runner", **flags: Any) -> httpx.Client:
            argv = ["gateway", "--key", f"reader={digest(KEY)}"]
            argv += ["--admin-key", digest(ADMIN), "--check-every", "0.1"]
            for fake, name in zip(fakes, names.split(), strict=False):
                fake.url = threads.serve(lambda config, _: uvicorn.Server(config), fake.app)
                argv += ["--backend", f"{name}={fake.url}"]
            for flag, value in flags.items():
                argv += ["--" + flag.replace("_", "-"), str(value)]
            monkeypatch.setattr(sys, "argv", argv)
            app = gateway.make_app(gateway.parse_args())
            service = app.state.service

            def draining(config: uvicorn.Config, url: str) -> uvicorn.Server:
                module = sys.modules["http_service"]
                return module.DrainingServer(config, service, url, 2.0)

            url = threads.serve(draining, app)
            until(lambda: service.ready)
            gate = app.state.gateway
            until(lambda: all(r.up for r in gate.backends.replicas if fakes_up(r, fakes)))
            client = httpx.Client(base_url=url, headers=READER, timeout=20)
            client.app = app  # type: ignore[attr-defined]
            return stack.enter_context(client)

        def fakes_up(replica: Any, fakes: tuple[Fake, ...]) -> bool:
            return any(fake.url == replica.url and fake.healthy for fake in fakes)

        yield serve


def until(true: Callable[[], bool], patience_s: float = 20) -> None:
    end = time.monotonic() + patience_s
    while not true():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.005)


def text_of(lines: Iterator[str]) -> tuple[str, list[dict], bool]:
    """The text of a stream, its errors, and whether it was finished."""
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    chunks = [json.loads(d) for d in data if d != "[DONE]"]
    choices = [c for chunk in chunks for c in chunk.get("choices", [])]
    text = "".join(c.get("text") or c.get("delta", {}).get("content") or "" for c in choices)
    return text, [c["error"] for c in chunks if "error" in c], "[DONE]" in data


def ask(client: httpx.Client, body: dict = BODY) -> tuple[httpx.Response, str, list[dict], bool]:
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    with client.stream("POST", path, json=body) as answer:
        if answer.status_code != 200:
            answer.read()
            return answer, "", [answer.json()["error"]], False
        return answer, *text_of(answer.iter_lines())


def test_a_stream_passes_unbuffered(start: Start) -> None:
    fake = Fake()
    client = start(fake)
    for body in (BODY, CHAT):
        fake.go.clear()
        path = "/v1/chat/completions" if body is CHAT else "/v1/completions"
        with client.stream("POST", path, json=body) as answer:
            lines = answer.iter_lines()
            while '"a"' not in next(lines):  # the fake sends no more until it is told to
                pass
            fake.go.set()
            assert text_of(lines) == ("bcd", [], True)
    assert answer.headers["x-backend"] == "runner"
    assert client.get("/v1/models").json()["data"][0]["id"] == "book"
    assert client.post("/v1/completions", json=BODY | {"stream": False}).json()["choices"]


@pytest.mark.parametrize(
    ("mode", "body"),
    [
        ("dies before", CHAT),  # after the delta that has a role and nothing else
        ("500", BODY),
        *(pytest.param(m, BODY, marks=pytest.mark.full) for m in ("429", "dies before", "aborts")),
        *(pytest.param(m, CHAT, marks=pytest.mark.full) for m in ("500", "503", "aborts")),
    ],
)
def test_a_failure_before_the_first_token_is_made_good(start: Start, mode: str, body: dict) -> None:
    bad = Fake(mode)
    good = Fake()
    client = start(bad, good)
    answers = [ask(client, body) for _ in range(4)]
    assert [(text, errors, done) for _, text, errors, done in answers] == [("abcd", [], True)] * 4
    assert good.asked == 4, "an answer was made twice, or not by the good one"
    assert bad.asked >= 1
    assert {a.headers["x-replica"] for a, *_ in answers} == {"runner/2"}
    assert "2" in {a.headers["x-attempts"] for a, *_ in answers}


def test_after_the_first_token_a_failure_is_told_and_not_made_good(start: Start) -> None:
    bad = Fake("dies after")
    good = Fake()
    client = start(bad, good, names="canary stable")
    client.put("/admin/weights", json={"stable": 0}, headers={"Authorization": f"Bearer {ADMIN}"})
    _, text, errors, done = ask(client)
    assert text == "ab"
    assert not done
    assert [error["code"] for error in errors] == ["stream_cut"]
    assert good.asked == 0
    metrics = client.get("/metrics").text
    assert sample(metrics, 'attempts_total{attempt="first",backend="canary",outcome="error"}') == 1


def sample(metrics: str, name: str) -> float:
    found = [line for line in metrics.splitlines() if line.startswith(f"gateway_backend_{name} ")]
    return float(found[0].split()[-1]) if found else 0.0


class Scripted(Fake):
    """It sends these events, and sleeps for the numbers between them; `whole` is its other answer."""

    def __init__(self, *script: bytes | float, whole: Any = None):
        super().__init__()
        self.script = script
        self.whole = whole

    async def generate(self, request: Request) -> Response:
        if self.whole is None:
            return await super().generate(request)
        self.asked += 1
        self.headers = dict(request.headers)
        await asyncio.sleep(sum(step for step in self.script if isinstance(step, float)))
        return JSONResponse(self.whole, headers={"set-cookie": "who=the-first"})

    async def stream(self, chat: bool) -> AsyncIterator[bytes]:
        for step in self.script:
            if isinstance(step, float):
                await asyncio.sleep(step)
            else:
                yield step


WHOLE = BODY | {"stream": False}
ABCD = {"choices": [{"text": "abcd"}]}
A, DONE = event({"text": "a"}), b"data: [DONE]\n\n"


def test_an_answer_in_one_piece_may_take_longer_than_idle(start: Start) -> None:
    client = start(Scripted(0.1, whole=ABCD), idle=0.03)
    assert client.post("/v1/completions", json=WHOLE).json() == ABCD


def test_an_aborted_answer_is_no_answer(start: Start) -> None:
    bad = Scripted(whole={"choices": [{"text": "", "finish_reason": "abort"}]})
    client = start(bad, Scripted(whole=ABCD))
    assert [client.post("/v1/completions", json=WHOLE).json() for _ in range(2)] == [ABCD] * 2
    assert bad.asked >= 1
    client = start(Scripted(A, event({"text": "", "finish_reason": "abort"}), DONE))
    _, text, errors, done = ask(client)
    assert (text, errors[0]["code"], done) == ("a", "stream_cut", False)


def test_the_deadline_ends_a_quiet_stream(start: Start) -> None:
    client = start(Scripted(A, 3.0, DONE), deadline=0.1)
    _, text, errors, _ = ask(client)
    assert (text, errors[0]["message"]) == ("a", "the deadline has passed")


def test_the_deadline_ends_a_stream_that_nobody_reads(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["http_service"], "LAST_WORDS_S", 0.05)
    client = start(Scripted(*[event({"text": "a" * 100_000})] * 500), deadline=0.1, idle=60)
    gate = client.app.state.gateway  # type: ignore[attr-defined]
    with connected(client, BODY) as raw:
        raw.recv(9)
        until(lambda: gate.service.running == 0 and gate.backends.replicas[0].load == 0, 5)


@contextlib.contextmanager
def connected(client: httpx.Client, body: dict) -> Iterator[socket.socket]:
    """A client that has asked, and reads when the test does."""
    with socket.create_connection((client.base_url.host, client.base_url.port)) as raw:
        content = json.dumps(body)
        path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        raw.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n{content}".encode())
        yield raw


ODD = [b'{"choices": [1]}', b'{"choices": [{"delta": [1]}]}', b'{"choices": 5}', b"[" * 100_000]


def test_an_event_of_another_shape_is_a_failure(start: Start) -> None:
    backends = sys.modules["backends"]
    for data in [*ODD, b"[1]", b"{"]:
        with pytest.raises(backends.Failed):
            backends.carries_token(b"data: " + data + b"\n\n")
    client = start(Scripted(b"data: " + ODD[0] + b"\n\n"), Fake())
    assert [ask(client)[1] for _ in range(2)] == ["abcd"] * 2


def test_a_bug_of_ours_is_counted_as_one(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    client = start(Fake())
    gate = client.app.state.gateway  # type: ignore[attr-defined]
    monkeypatch.setattr(gate.backends, "choose", lambda point, tried: 1 / 0)
    assert client.post("/v1/completions", json=BODY).status_code == 500
    metrics = httpx.get(f"{client.base_url}/metrics").text
    assert 'outcome="error",route="/v1/completions",status="500"' in metrics
    assert 'path="/v1/completions",service="gateway",status="500"' in metrics


def test_a_backends_cookie_is_sent_to_nobody(start: Start) -> None:
    fake = Scripted(whole=ABCD)
    client = start(fake)
    for _ in range(2):
        httpx.post(f"{client.base_url}/v1/completions", json=WHOLE, headers=READER)
    assert fake.asked == 2
    assert "cookie" not in fake.headers


def test_a_stream_is_over_when_it_says_so(start: Start) -> None:
    """[DONE] with or without a space before it; what follows is no part of the answer."""
    for end in (DONE, b"data:[DONE]\n\n"):
        client = start(Scripted(A, end, b": ping\n\n"))
        with client.stream("POST", "/v1/completions", json=BODY) as answer:
            assert b"".join(answer.iter_raw()) == A + end


def test_metrics_are_for_this_machine_or_the_admin(start: Start) -> None:
    client = start(Fake())
    app = client.app  # type: ignore[attr-defined]

    async def statuses() -> list[int]:
        away = httpx.ASGITransport(app, client=("10.0.0.1", 1))
        async with httpx.AsyncClient(transport=away, base_url="http://gateway") as stranger:
            admin = {"Authorization": f"Bearer {ADMIN}"}
            asked = [
                ("/metrics", READER),
                ("/metrics", admin),
                ("/docs", {}),
                ("/openapi.json", {}),
            ]
            return [(await stranger.get(path, headers=key)).status_code for path, key in asked]

    assert asyncio.run(statuses()) == [401, 200, 404, 404]
    assert client.get("/metrics").status_code == 200


def counted(client: httpx.Client) -> dict[str, float]:
    """How first attempts at `canary` ended, and those that began or are late under way."""
    found = {}
    for line in client.get("/metrics").text.splitlines():
        name, _, value = line.rpartition(" ")
        if 'attempt="first"' in name and "attempts_total" in name:
            found[name.split('outcome="')[1].split('"')[0]] = float(value)
        elif 'attempt="first"' in name and "asked_total" in name:
            found["asked"] = float(value)
        elif 'le="0.1"' in name and name.startswith("gateway_backend_") and float(value):
            found[name.removeprefix("gateway_backend_").split("{")[0]] = float(value)
    return found


@pytest.mark.full
def test_an_attempt_is_counted_once(start: Start) -> None:
    """Asked when it begins, late while it hangs, and one outcome, also if its client leaves."""
    client = start(Scripted(A, 3600.0), names="canary", deadline=60)
    with connected(client, BODY) as raw:
        raw.recv(9)
        assert counted(client) == {"asked": 1}
    until(lambda: counted(client) == {"asked": 1, "left": 1})
    hanging = Fake("hangs")
    client = start(hanging, names="canary", deadline=0.3)
    with connected(client, BODY):
        until(lambda: counted(client) == {"asked": 1, "late": 1, "waiting": 1})
        until(lambda: counted(client) == {"asked": 1, "error": 1})  # 504
    late = Scripted(0.15, A)
    client = start(late, names="canary")
    ask(client)  # its first token is late, and it is cut
    assert counted(client) == {"asked": 1, "error": 1}


def test_what_a_backend_refuses_is_counted_and_its_list_of_models_is_not(start: Start) -> None:
    client = start(Fake("422"), names="canary")
    assert client.get("/v1/models").status_code == 200
    assert client.post("/v1/completions", json=BODY).status_code == 422
    assert counted(client) == {"asked": 1, "refused": 1}


def test_a_full_gateway_takes_no_token(start: Start) -> None:
    client = start(Fake(), limit="reader=1,0", max_running=0)
    assert client.post("/v1/completions", json=BODY).status_code == 503
    client.app.state.gateway.args.max_running = 1  # type: ignore[attr-defined]
    assert [client.post("/v1/completions", json=BODY).status_code for _ in "ab"] == [200, 429]


def test_a_dead_backend_costs_nobody_an_answer(start: Start) -> None:
    fakes = Fake(), Fake()
    client = start(*fakes, check_every=3600)
    gate = client.app.state.gateway  # type: ignore[attr-defined]
    gate.backends.replicas[0].url = "http://127.0.0.1:9"  # nobody listens there
    for _ in range(3):
        assert ask(client)[1] == "abcd"
    assert not gate.backends.replicas[0].up
    gate.backends.replicas[1].up = False
    answer, _, errors, _ = ask(client)
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"
    assert errors[0]["code"] == "no_backend"


def test_the_limit_is_exact_under_200_clients(start: Start) -> None:
    client = start(Fake(), Fake(), limit="reader=50,0.001")
    url = str(client.base_url)

    async def all_at_once() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(headers=READER, timeout=60, limits=limits) as clients:
            post = clients.post(f"{url}/v1/completions", json=BODY)
            posts = [post, *(clients.post(f"{url}/v1/completions", json=BODY) for _ in range(199))]
            return await asyncio.gather(*posts)

    answers = asyncio.run(all_at_once())
    refused = [a for a in answers if a.status_code == 429]
    assert sum(a.status_code == 200 for a in answers) == 50
    assert len(refused) == 150
    assert all(900 <= int(a.headers["retry-after"]) <= 1001 for a in refused)
    assert refused[0].json()["error"]["code"] == "rate_limit_exceeded"


@pytest.mark.parametrize(
    ("mode", "body"),
    [
        ("hangs", BODY),
        ("answer", CHAT),
        pytest.param("hangs", CHAT, marks=pytest.mark.full),
        pytest.param("answer", BODY, marks=pytest.mark.full),
    ],
)
def test_when_the_client_leaves_the_backend_stops(start: Start, mode: str, body: dict) -> None:
    fake = Fake(mode)
    fake.go.clear()  # it never goes on after the first token
    client = start(fake)
    gate = client.app.state.gateway  # type: ignore[attr-defined]
    with socket.create_connection((client.base_url.host, client.base_url.port)) as raw:
        content = json.dumps(body)
        path = "/v1/chat/completions" if body is CHAT else "/v1/completions"
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        raw.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n{content}".encode())
        assert fake.working.wait(10)
        if mode == "answer":
            assert raw.recv(9) == b"HTTP/1.1 "
    assert fake.cancelled.wait(10), "the backend goes on for nobody"
    until(lambda: gate.service.running == 0 and gate.backends.replicas[0].load == 0)
    until(lambda: 'outcome="left"' in client.get("/metrics").text)


def test_every_error_has_one_shape(start: Start) -> None:
    fake = Fake()
    client = start(fake, max_body=1000)
    gate = client.app.state.gateway  # type: ignore[attr-defined]
    send = client.post
    path = "/v1/completions"

    def chunked() -> Iterator[bytes]:
        yield b'{"prompt": "' + b"a" * 2000 + b'"}'

    answers = [
        (401, send(path, json=BODY, headers={"Authorization": "Bearer sk-wrong"})),
        (401, send(path, json=BODY, headers={"Authorization": KEY})),
        (401, send(path, json=BODY, headers={"Authorization": f"Basic {KEY}"})),
        (401, client.get("/admin/weights")),
        (400, send(path, content=b"{")),
        (400, send(path, content=b"[" * 900)),
        (400, send(path, content=b"[1]")),
        (413, send(path, content=b"a" * 2000)),
        (413, send(path, content=chunked())),
        (404, send("/v1/nothing", json=BODY)),
        (405, client.get(path)),
    ]
    for mode, status in (("500", 502), ("429", 503), ("422", 422)):
        fake.mode = mode
        answers.append((status, send(path, json=BODY)))
    fake.mode = "hangs"
    gate.client.timeout = httpx.Timeout(0.3)
    answers.append((502, send(path, json=BODY)))  # it was silent for too long
    gate.client.timeout = httpx.Timeout(60)
    gate.args.deadline = 0.3
    answers.append((504, send(path, json=BODY)))
    for status, answer in answers:
        assert answer.status_code == status, answer.text
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]
        assert answer.headers["x-request-id"]


def test_neither_prompts_nor_keys_are_written_down(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    bad = Fake("dies before")
    client = start(bad, Fake())
    for body in (BODY, CHAT):
        assert ask(client, body)[1] == "abcd"
    client.post("/v1/completions", content=PROMPT)
    client.post(f"/v1/completions?key={KEY}", json=BODY)
    client.post("/v1/completions", json=BODY, headers={"x-request-id": f"{KEY} {PROMPT}"})

    def ours() -> str:  # httpx logs too: it is the client
        return "\n".join(r.getMessage() for r in caplog.records if r.name == "gateway")

    until(lambda: ours().count('"outcome": "ok"') == 4)  # written after the last byte is sent
    everything = ours() + client.get("/metrics").text
    assert KEY not in everything
    assert PROMPT not in everything
    assert digest(KEY) not in everything


def test_weights_are_shares_and_a_user_stays(start: Start) -> None:
    client = start(Fake(), Fake(), names="stable canary", burst=10000)
    admin = {"Authorization": f"Bearer {ADMIN}"}
    assert client.get("/admin/weights", headers=admin).json() == {"stable": 1, "canary": 1}

    def who(user: str) -> str:
        body = BODY | {"user": user, "stream": False}
        return client.post("/v1/completions", json=body).headers["x-backend"]

    users = [f"user-{i}" for i in range(100)]
    before: set[str] = set()
    for share in (0, 5, 25, 100):
        wanted = {"canary": share, "stable": 100 - share}
        assert client.put("/admin/weights", json=wanted, headers=admin).json() == wanted
        chosen = {user for user in users if who(user) == "canary"}
        assert before <= chosen, "a user went back while the canary grew"
        assert abs(len(chosen) - share) <= 12  # the same users in every run
        before = chosen
    wrongs: list[Any] = [{"nobody": 1}, {"canary": -1}, {"canary": True}, {"canary": "1"}, [], {}]
    for wrong in wrongs:
        answer = client.put("/admin/weights", json=wrong, headers=admin)
        assert answer.status_code == 400
    assert (
        client.put("/admin/weights", content=b'{"canary": NaN}', headers=admin).status_code == 400
    )
    assert client.put("/admin/weights", json={"canary": 0}, headers=admin).status_code == 400
    assert client.get("/admin/weights", headers=admin).json() == {"canary": 100, "stable": 0}
    assert client.put("/admin/weights", json={"canary": 0}).status_code == 401


def test_each_rollout_begins_with_other_users(gateway: ModuleType) -> None:
    users = [f"user-{i}" for i in range(1000)]
    first, second = (
        {user for user in users if gateway.point_of(user, name) < 0.1} for name in ("v2", "v3")
    )
    assert 50 < len(first) < 150
    assert len(first & second) < 40, "the same users meet each new version first"


def test_when_a_backend_is_down_only_its_own_users_move(gateway: ModuleType) -> None:
    urls = [(name, f"http://{name}") for name in ("canary", "stable", "baseline")]
    backends = gateway.Backends(urls, None, 1.0)
    backends.set_weights({"canary": 0.1, "stable": 0.8, "baseline": 0.1})
    points = [i / 1000 for i in range(1000)]

    def dealt() -> list[str]:
        return [backends.choose(point).backend for point in points]

    for replica in backends.replicas:
        replica.up = True
    before = dealt()
    assert [before.count(name) for name, _ in urls] == [100, 800, 100]
    backends.replicas[0].up = False
    after = dealt()
    moved = [name for name, now in zip(before, after, strict=True) if name != now]
    assert set(moved) == {"canary"}
    assert after.count("baseline") in range(110, 114)  # its part of those who moved


def test_the_least_loaded_replica_is_chosen_and_a_full_gateway_says_so(start: Start) -> None:
    fakes = Fake(), Fake()
    client = start(*fakes, max_running=6)
    replicas = client.app.state.gateway.backends.replicas  # type: ignore[attr-defined]
    for fake in fakes:
        fake.go.clear()
    with ThreadPoolExecutor(6) as clients:
        answers = [clients.submit(ask, client) for _ in range(6)]
        until(lambda: sum(replica.load for replica in replicas) == 6)
        assert [replica.load for replica in replicas] == [3, 3]
        refused, _, errors, _ = ask(client)
        assert (refused.status_code, errors[0]["code"]) == (503, "overloaded")
        assert refused.headers["retry-after"] == "1"
        fakes[0].go.set()
        until(lambda: replicas[0].load == 0)
        for _ in range(3):
            assert ask(client)[0].headers["x-replica"] == "runner/1"
        fakes[1].go.set()
        assert [answer.result()[1] for answer in answers] == ["abcd"] * 6


def test_a_trace_is_passed_on(start: Start) -> None:
    fake = Fake()
    client = start(fake)
    sent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    client.post("/v1/completions", json=BODY, headers={"traceparent": sent})
    assert fake.headers["traceparent"].split("-")[1] == sent.split("-")[1]
    assert "authorization" not in fake.headers, "a backend has no use for a client's key"


def test_a_bucket_lets_through_its_burst_and_its_rate(gateway: ModuleType) -> None:
    for seed in range(20):
        dice = random.Random(seed)
        now = 0.0
        burst = dice.randint(1, 9)
        rate = dice.choice([0.1, 1, 7])
        bucket = gateway.TokenBucket(burst, rate, clock=lambda: now)  # noqa: B023
        let_in = 0
        for _ in range(300):
            now += dice.expovariate(2 * rate)
            wait = bucket.take()
            let_in += wait == 0
            assert let_in <= burst + rate * now + 1e-6, "more than it may"
            if wait and dice.random() < 0.2:
                now += wait
                assert bucket.take() == 0, "who waits as long as told is refused"
                let_in += 1
        assert let_in >= rate * now / 2
    never = gateway.TokenBucket(1, 0)
    assert never.take() == 0
    assert never.take() > 0


def test_starting_wrongly_is_one_line(
    gateway: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    whole = f"--backend a=http://127.0.0.1:1 --key reader={digest(KEY)}"
    for words in (
        "",
        "--backend a=http://127.0.0.1:1",
        f"{whole} --key other=short",
        f"{whole} --backend nothing",
        f"{whole} --limit somebody=3,1",
        f"{whole} --limit reader=many",
        *(
            f"{whole} --limit reader={limit}"
            for limit in ("0.5,1", "-1,1", "5,-1", "nan,1", "1,inf")
        ),
    ):
        monkeypatch.setattr(sys, "argv", ["gateway", *words.split()])
        with pytest.raises(SystemExit) as error:
            gateway.parse_args()
        assert error.value.code == 2
        assert capsys.readouterr().err.strip()


@pytest.mark.full
def test_clients_that_leave_at_any_moment_leave_nothing(start: Start) -> None:
    fakes = Fake(), Fake()
    client = start(*fakes, burst=10000)
    gate = client.app.state.gateway  # type: ignore[attr-defined]
    url = str(client.base_url)
    dice = random.Random(0)

    async def one(clients: httpx.AsyncClient) -> bool:
        body = dice.choice([BODY, BODY | {"stream": False}])
        try:
            post = clients.post(f"{url}/v1/completions", json=body)
            return (await asyncio.wait_for(post, dice.uniform(0, 0.5))).status_code == 200
        except (TimeoutError, asyncio.TimeoutError):
            return False

    async def all_of_them() -> list[bool]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(headers=READER, timeout=60, limits=limits) as clients:
            return [
                answered
                for _ in range(10)
                for answered in await asyncio.gather(*(one(clients) for _ in range(40)))
            ]

    answered = asyncio.run(all_of_them())
    assert 0 < sum(answered) < len(answered)
    replicas = gate.backends.replicas
    until(lambda: gate.service.running == 0 and not any(replica.load for replica in replicas))
    assert ask(client)[1] == "abcd"


# --- what the tests above would see ---------------------------------------------------------------


@pytest.mark.full
def test_mutants_are_seen(
    start: Start, gateway: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    backends = sys.modules["backends"]
    with monkeypatch.context() as patch:  # a role counts as a token
        patch.setattr(backends, "carries_token", lambda event: True)
        answers = [ask(start(Fake("dies before"), Fake()), CHAT) for _ in range(2)]
        assert "stream_cut" in str([errors for _, _, errors, _ in answers])
    with monkeypatch.context() as patch:  # the weights are one more factor of the load
        patch.setattr(backends.Backends, "choose", by_weighted_load)
        client = start(Fake(), Fake(), names="stable canary", burst=1000)
        admin = {"Authorization": f"Bearer {ADMIN}"}
        client.put("/admin/weights", json={"canary": 5, "stable": 95}, headers=admin)
        who = [ask(client)[0].headers["x-backend"] for _ in range(40)]
        assert who.count("canary") not in range(1, 12), "an idle service has no shares"
    with monkeypatch.context() as patch:  # nobody looks whether the client has left
        patch.setattr(gateway, "client_left", forever)
        fake = Fake("hangs")
        client = start(fake)
        with contextlib.suppress(httpx.ReadTimeout):
            client.post("/v1/completions", json=BODY, timeout=0.5)
        assert not fake.cancelled.wait(1)


async def forever(request: Request) -> None:
    await asyncio.Event().wait()


def by_weighted_load(self: Any, point: float, tried: Any = ()) -> Any:
    able = [r for r in self.replicas if r.up and r.name not in tried and self.weights[r.backend]]
    return min(able, key=lambda r: (r.load + 1) / self.weights[r.backend], default=None)
