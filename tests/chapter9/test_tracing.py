"""Spans: one trace over services, strictly nested, and nothing in them that is nobody's business."""

import asyncio
import json
import re
import sys
import types
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
import warm
from book import CHAPTERS
from fastapi import FastAPI
from starlette.responses import StreamingResponse

CODE = warm.ROOT / CHAPTERS[8] / "code"
SECRET = "zebra-1729"
CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture(scope="module")
def tracing() -> Iterator[ModuleType]:
    sys.path.insert(0, str(CODE))
    yield warm.load("ch09_tracing", CODE / "ch09_tracing.py")
    sys.path.remove(str(CODE))


@pytest.fixture(scope="module")
def waterfall(tracing: ModuleType) -> ModuleType:
    return sys.modules["waterfall"]


@pytest.fixture
def file(tracing: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "spans.jsonl"
    monkeypatch.setenv("TRACE_FILE", str(path))
    monkeypatch.setattr(tracing, "tracer", tracing.tracer)  # put back afterwards
    return path


def spans_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def app_of(tracing: ModuleType, name: str = "service") -> FastAPI:
    app = FastAPI()

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {}

    @app.post("/v1/{what}")
    async def answer(what: str) -> StreamingResponse:
        if what == "break":
            raise ValueError(SECRET)

        async def words() -> AsyncIterator[str]:
            with tracing.client_span("inside") as call:
                yield f"{SECRET} {call.headers.get('traceparent', '')}"
            await asyncio.sleep(0.01)

        return StreamingResponse(words())

    tracing.instrument(app, name)
    return app


def post(app: FastAPI, path: str, **more: Any) -> httpx.Response:
    async def once() -> httpx.Response:
        inside = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=inside, base_url="http://x") as client:
            await client.get("/health")
            return await client.post(path, **more)

    return asyncio.run(once())


def test_a_span_continues_the_callers_trace(
    tracing: ModuleType, waterfall: ModuleType, file: Path
) -> None:
    post(app_of(tracing), "/v1/chat", headers={"traceparent": CALLER})
    inside, server = spans_of(file)
    _, trace_id, caller, _ = CALLER.split("-")
    assert inside["trace_id"] == server["trace_id"] == trace_id
    assert (server["parent_id"], inside["parent_id"]) == (caller, server["span_id"])
    assert (server["name"], server["kind"]) == ("POST /v1/{what}", "server")
    assert server["attributes"]["http.response.status_code"] == 200
    assert waterfall.outside_parent([inside, server]) == 0
    assert server["end_ns"] - server["start_ns"] >= 10_000_000, "it ends before the stream does"


def test_what_a_call_sends_makes_the_callee_its_child(
    tracing: ModuleType, waterfall: ModuleType, file: Path
) -> None:
    app = app_of(tracing)
    with tracing.client_span("outer") as call:
        answer = post(app, "/v1/chat", headers=call.headers)
    spans = spans_of(file)
    assert [(depth, s["name"]) for depth, s in waterfall.in_order(spans)] == [
        (0, "outer"),
        (1, "POST /v1/{what}"),
        (2, "inside"),
    ]
    inner = next(span for span in spans if span["name"] == "inside")
    assert f"00-{inner['trace_id']}-{inner['span_id']}-0" in answer.text


@pytest.mark.parametrize("path", ["/v1/chat", "/v1/break", f"/nothing/{SECRET}"])
def test_nothing_private_is_written(tracing: ModuleType, file: Path, path: str) -> None:
    """No URL, header, body or message of an exception; the kind of an exception, yes."""
    more = {"authorization": SECRET, "tracestate": f"a={SECRET}", "baggage": f"user={SECRET}"}
    answer = post(
        app_of(tracing),
        f"{path}?key={SECRET}",
        headers=more | {"traceparent": CALLER},
        json={"prompt": SECRET},
    )
    assert SECRET not in file.read_text()
    assert "baggage" not in tracing.headers_of_current_span()
    *_, server = spans_of(file)
    broke = path == "/v1/break"
    assert (server["status"], answer.status_code) == (
        ("error", 500) if broke else ("unset", 404 if "nothing" in path else 200)
    )
    assert server["attributes"].get("error.type") == ("ValueError" if broke else None)


def test_without_a_destination_there_is_no_span(
    tracing: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing, "tracer", tracing.tracer)
    for name in ("TRACE_FILE", "OTEL_TRACES_EXPORTER"):
        monkeypatch.delenv(name, raising=False)
    answer = post(app_of(tracing), "/v1/chat")
    assert re.fullmatch(f"{SECRET} ", answer.text)  # and no header made of zeros


def test_the_judges_see_what_is_wrong(waterfall: ModuleType) -> None:
    def span(number: int, parent: int | None, start: int, end: int) -> dict[str, Any]:
        ids = {"span_id": str(number), "parent_id": None if parent is None else str(parent)}
        return ids | {"start_ns": start, "end_ns": end}

    good = [span(1, None, 0, 9), span(2, 1, 1, 9), span(3, 2, 1, 2)]
    assert waterfall.outside_parent(good) == 0
    assert waterfall.outside_parent([*good, span(4, 1, 8, 10), span(5, 3, 0, 1)]) == 2
    assert [depth for depth, _ in waterfall.in_order(good)] == [0, 1, 2]
    assert waterfall.leaks(json.dumps({"a": 'it says "no"'}), ['says "no"']) == 1
    assert waterfall.leaks("one\ntwo", ["three", ""]) == 0
    assert waterfall.off([None, 4, None], {"completion_tokens": 4}) == 0
    assert waterfall.off([4], {"completion_tokens": 5}) == 1
    assert waterfall.off([], {}) == 1


@pytest.mark.full
def test_ends_that_come_twice_or_with_an_error(tracing: ModuleType, file: Path) -> None:
    tracing.instrument(FastAPI(), "client")
    call = tracing.Call("chat book", attempt=1)
    call.end("ReadTimeout")
    call.end()
    with pytest.raises(KeyError), tracing.client_span("ask"):
        raise KeyError(SECRET)
    first, second = spans_of(file)
    assert (first["status"], first["attributes"]["error.type"]) == ("error", "ReadTimeout")
    assert (second["status"], second["attributes"]["error.type"]) == ("error", "KeyError")
    assert SECRET not in file.read_text()


@pytest.mark.full
def test_a_request_that_is_cancelled_is_an_error(tracing: ModuleType, file: Path) -> None:
    async def forever(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await asyncio.Event().wait()

    async def cancelled() -> None:
        app = tracing.ServerSpans(forever)
        scope = {"type": "http", "path": "/v1/chat", "method": "POST", "headers": []}
        sent: asyncio.Queue[Any] = asyncio.Queue()
        task = asyncio.create_task(app(scope, sent.get, sent.put))
        await sent.get()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    tracing.instrument(FastAPI(), "service")
    asyncio.run(cancelled())
    (span,) = spans_of(file)
    assert (span["status"], span["attributes"]["error.type"]) == ("error", "CancelledError")


MUTANTS = [
    ("W3C.extract(headers),", "None,", "continues"),
    ('elif not message.get("more_body"):', "elif last_ns is None:", "continues"),
    ('f"{method} {path}"', "f\"{method} {scope['path']}\"", "continues"),
    ("trace.set_span_in_context(self.span)", "None", "child"),
    (
        'span.set_attribute("error.type", type(error)',
        "span.add_event(str(error)); str((error)",
        "private",
    ),
    ('{"http.request.method": method},', '{"url": str(scope["query_string"])},', "private"),
]


@pytest.mark.full
@pytest.mark.parametrize(("right", "wrong", "found_by"), MUTANTS)
def test_mutants_of_ideas(
    waterfall: ModuleType, file: Path, right: str, wrong: str, found_by: str
) -> None:
    source = (CODE / "ch09_tracing.py").read_text()
    assert source.count(right) == 1
    mutant = types.ModuleType("mutant")
    exec(compile(source.replace(right, wrong), "mutant", "exec"), mutant.__dict__)  # noqa: S102 - the book's own
    with pytest.raises((AssertionError, ValueError)):  # noqa: PT012 - each is a test of its own
        if found_by == "continues":
            test_a_span_continues_the_callers_trace(mutant, waterfall, file)
        elif found_by == "child":
            test_what_a_call_sends_makes_the_callee_its_child(mutant, waterfall, file)
        else:
            test_nothing_private_is_written(mutant, file, "/v1/break")


@pytest.mark.full
def test_otlp_without_the_package_is_said_in_a_line(
    tracing: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "otlp")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(SystemExit) as stopped:
        tracing.set_up("service")
    assert stopped.value.code == 2
    assert "pip install opentelemetry-exporter-otlp-proto-http" in capsys.readouterr().err
