"""One request's trace through gateway, tokenizer and runner, with OpenTelemetry and no backend.

    python chapter9-production-llm-serving-stack/code/ch09_tracing.py --plot chapter9-production-llm-serving-stack/figures/trace.svg

Look at the tree: which service spent the time, and when the first token came. Section 9.6.
"""

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import httpx
from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import (
    BatchSpanProcessor,
    ConsoleSpanExporter,
    SimpleSpanProcessor,
    SpanExporter,
    SpanExportResult,
)
from opentelemetry.trace import Span, SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from waterfall import complete, leaks, off, outside_parent, plot, services_of, show

BOOK_MODEL = Path("chapter8-distributed-ai-training-in-action/checkpoint")
PROBES = ("/health", "/metrics")  # every second, from every balancer: no spans
W3C = TraceContextTextMapPropagator()  # traceparent only: baggage would carry what anybody puts in
WARM_UP = 4  # requests
tracer: trace.Tracer = trace.NoOpTracer()  # until `set_up`


class FileExporter(SpanExporter):
    """A line of JSON for each span, appended in one write: several processes share the file."""

    def __init__(self, path: str):
        self.file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        for span in spans:
            os.write(self.file, (json.dumps(record_of(span)) + "\n").encode())
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        os.close(self.file)


def record_of(span: ReadableSpan) -> dict[str, Any]:
    """A span as data: ids in hexadecimal as in a traceparent, times in nanoseconds since 1970."""
    context = span.get_span_context()
    parent = span.parent
    return {
        "trace_id": f"{context.trace_id:032x}",
        "span_id": f"{context.span_id:016x}",
        "parent_id": f"{parent.span_id:016x}" if parent else None,
        "service": span.resource.attributes["service.name"],
        "name": span.name,
        "kind": span.kind.name.lower(),
        "start_ns": span.start_time,
        "end_ns": span.end_time,
        "status": span.status.status_code.name.lower(),
        "attributes": dict(span.attributes or {}),
        "events": [
            {"name": e.name, "time_ns": e.timestamp, "attributes": dict(e.attributes or {})}
            for e in span.events
        ],
    }


def set_up(service_name: str) -> None:
    """Make this process's tracer. Where the spans go, the environment says:

    TRACE_FILE=PATH appends lines of JSON; OTEL_TRACES_EXPORTER=console prints, =otlp sends to
    OTEL_EXPORTER_OTLP_ENDPOINT. With neither there is no span, and no cost.

    The provider is not made the global one: FastAPI 0.162 makes a server span of its own for
    each request as soon as there is a global provider, and each request would have two.
    """
    global tracer
    processors = []
    if path := os.environ.get("TRACE_FILE"):
        processors.append(SimpleSpanProcessor(FileExporter(path)))  # on disk when the span ends
    wanted = os.environ.get("OTEL_TRACES_EXPORTER", "none")
    if wanted == "console":
        processors.append(SimpleSpanProcessor(ConsoleSpanExporter()))
    elif wanted == "otlp":
        processors.append(BatchSpanProcessor(otlp_exporter()))  # in a thread: it is a network
    if not processors:
        return
    provider = TracerProvider(resource=Resource.create({"service.name": service_name}))
    for processor in processors:
        provider.add_span_processor(processor)
    tracer = provider.get_tracer("book.ch09")


def otlp_exporter() -> SpanExporter:
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError:
        stop("OTEL_TRACES_EXPORTER=otlp needs: pip install opentelemetry-exporter-otlp-proto-http")
    return OTLPSpanExporter()


class ServerSpans:
    """ASGI middleware: a server span for each request, the child of the caller's span.

    It ends when the last byte of the answer is sent, so a stream is inside. Only the route, the
    method and the status are written down: no URL, no header, no body, no exception's message.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in PROBES:
            await self.app(scope, receive, send)
            return
        headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
        method = scope["method"]
        with tracer.start_as_current_span(
            method,
            W3C.extract(headers),
            SpanKind.SERVER,
            {"http.request.method": method},
            record_exception=False,
            set_status_on_exception=False,
            end_on_exit=False,
        ) as span:
            last_ns = None

            async def send_and_note(message: Message) -> None:
                nonlocal last_ns
                if message["type"] == "http.response.start":
                    span.set_attribute("http.response.status_code", message["status"])
                    if message["status"] >= 500:
                        span.set_status(StatusCode.ERROR)
                elif not message.get("more_body"):
                    last_ns = time.time_ns()  # before the caller can have it: its span is longer
                await send(message)

            try:
                await self.app(scope, receive, send_and_note)
            except BaseException as error:
                span.set_attribute("error.type", type(error).__name__)
                span.set_status(StatusCode.ERROR)
                raise
            finally:
                if path := getattr(scope.get("route"), "path", None):
                    span.set_attribute("http.route", path)
                    span.update_name(f"{method} {path}")
                span.end(last_ns)


def instrument(app: Any, service_name: str) -> None:
    """Give a FastAPI or Starlette application its server spans; add it last, to be outermost."""
    set_up(service_name)
    app.add_middleware(ServerSpans)


def headers_of_current_span() -> dict[str, str]:
    """The `traceparent` to send with a call, so that the callee's span becomes this one's child."""
    headers: dict[str, str] = {}
    W3C.inject(headers)
    return headers


class Call:
    """The span of a call to another service: send `headers` with it, and `end` it, once or oftener.

    It is not made the current span. A stream's generator may be closed in another context than the
    one in which it began, and OpenTelemetry cannot then detach what was attached.
    """

    def __init__(self, name: str, **attributes: Any):
        self.span = tracer.start_span(name, kind=SpanKind.CLIENT, attributes=attributes)
        self.headers: dict[str, str] = {}
        W3C.inject(self.headers, trace.set_span_in_context(self.span))

    def event(self, name: str) -> None:
        self.span.add_event(name)

    def end(self, error: str | None = None) -> None:
        if self.span.is_recording():
            if error is not None:
                self.span.set_attribute("error.type", error)
                self.span.set_status(StatusCode.ERROR)
            self.span.end()


@contextlib.contextmanager
def client_span(name: str, **attributes: Any) -> Iterator[Call]:
    """A call that is over when the block is: not for a stream that somebody else reads."""
    call = Call(name, **attributes)
    try:
        yield call
    except BaseException as error:
        call.end(type(error).__name__)
        raise
    call.end()


def inference_span(operation: str, model: str, request: dict[str, Any]) -> Span:
    """The span of a generation in this process, by the GenAI conventions (v0.1.0). Caller ends it."""
    attributes = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "book",
        "gen_ai.request.model": model,
    }
    attributes |= {f"gen_ai.request.{k}": v for k, v in request.items() if v is not None}
    return tracer.start_span(f"{operation} {model}", kind=SpanKind.INTERNAL, attributes=attributes)


# --- one request, seen from all sides --------------------------------------------------------------


def stream_an_answer(
    client: httpx.Client, stack: Any, prompt: str, tokens: int
) -> tuple[Call, str, dict[str, int]]:
    """Ask the gateway as a client that traces too: its span is the root."""
    attributes = {"gen_ai.operation.name": "chat", "gen_ai.provider.name": "book"}
    call = Call("chat book", **attributes | {"gen_ai.request.model": "book"})
    text = ""
    usage: dict[str, int] = {}
    body = {
        "model": "book",
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    headers = call.headers | {"Authorization": f"Bearer {stack.key}"}
    url = f"{stack.url}/v1/chat/completions"
    with client.stream("POST", url, json=body, headers=headers) as answer:
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            new = "".join(choice["delta"].get("content", "") for choice in chunk["choices"])
            if new and not text:
                call.event("first_token")
            text += new
            usage = chunk.get("usage") or usage
    call.end()
    return call, text, usage


def cost_of_a_span(spans: int = 500) -> float:
    """Microseconds to begin, end and write a span, on top of a request's own work."""
    start = time.perf_counter()
    for _ in range(spans):
        Call("cost").end()
    return (time.perf_counter() - start) / spans * 1e6


def run(args: argparse.Namespace) -> list[bool | None]:
    from ch09_stack import running, wait_for

    kept = args.trace_file.read_bytes() if args.trace_file and args.trace_file.exists() else b""
    with running(args) as stack:
        os.environ["TRACE_FILE"] = str(stack.traces)
        set_up("client")
        with httpx.Client(trust_env=False, timeout=60) as client:
            for _ in range(WARM_UP):  # the first request of each process pays for imports
                stream_an_answer(client, stack, "warm up", 4)
            call, text, usage = stream_an_answer(client, stack, args.prompt, args.tokens)
        trace_id = f"{call.span.get_span_context().trace_id:032x}"

        def found() -> list[dict[str, Any]]:
            lines = [json.loads(line) for line in stack.traces.read_text().splitlines()]
            return [span for span in lines if span["trace_id"] == trace_id]

        wait_for(lambda: complete(found()))  # a server writes its span just after its last byte
        spans = found()
        everything = stack.traces.read_text()
        microseconds = cost_of_a_span()
    if args.trace_file:
        args.trace_file.write_bytes(kept + everything.encode())
    if args.plot:
        plot(spans, args.plot)

    roots = [span for span in spans if span["parent_id"] is None]
    told = [s["attributes"].get("gen_ai.usage.output_tokens") for s in spans]
    secrets = (stack.key, args.prompt, text)
    say(f"trace         {len(spans)} spans of {len(services_of(spans))} services")
    show(spans)
    say(f"a span        {microseconds:.0f} µs to make and to write")
    traces = {json.loads(line)["trace_id"] for line in everything.splitlines()}
    return [
        check("traces, for each request one", abs(len(traces) - WARM_UP - 1), 0),
        check("services in the trace", len(services_of(spans)), 4, at_least=True),
        check("spans without a parent, besides the client's", len(roots) - 1, 0),
        check("spans that begin before their parent or end after it", outside_parent(spans), 0),
        check("spans with the key, the prompt or the answer", leaks(everything, secrets), 0),
        check("tokens in the trace, off the client's bill", off(told, usage), 0),
    ]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=BOOK_MODEL, help="a Hugging Face folder")
    parser.add_argument(
        "--engine",
        choices=("auto", "vllm", "transformers"),
        default="transformers",
        help="of the runners",
    )
    parser.add_argument("--prompt", default="When a rank waits for the others,", help="to ask")
    parser.add_argument("--tokens", type=int, default=16, help="tokens of the answer")
    parser.add_argument("--trace-file", type=Path, help="also append all spans, a line each")
    parser.add_argument("--plot", type=Path, help="draw the waterfall as an SVG")
    parser.add_argument("--patience", type=float, default=180, help="seconds to become ready")
    args = parser.parse_args()
    vars(args).update(port=0, api_key=None, admin_key=None)  # what ch09_stack.running asks for
    return args


def main() -> None:
    from ch09_stack import context_of

    args = parse_args()
    args.context = context_of(args.model)
    sys.exit(conclude(run(args)))


# --- copied from other scripts; `make copies` keeps it equal to them ------------------------------


# Copied from ch01_single_gpu_baseline.check
def check(claim: str, value: float, bound: float, at_least: bool = False) -> bool:
    """Print whether a value keeps its bound, as it must anywhere; a rank where it does not speaks."""
    held = bool(value >= bound if at_least else value <= bound)  # False for NaN
    line = f"check: {claim} = {value:.3g} {'>=' if at_least else '<='} {bound:.3g}"
    if held:
        say(f"{line}  ok")
    else:
        print(f"{line}  FAILED on rank {os.environ.get('RANK', '0')}", flush=True)
    return held


# Copied from ch01_single_gpu_baseline.conclude
def conclude(claims: list[bool | None]) -> int:
    """Print the last line of a run, and return its exit code; an `expect` that is None is no check."""
    judged = [held for held in claims if held is not None]
    failed = judged.count(False)
    say(f"{failed} of {len(judged)} checks FAILED" if failed else f"all {len(judged)} checks ok")
    return int(failed > 0)


# Copied from ch01_single_gpu_baseline.say
def say(line: str) -> None:
    """Print on rank 0. A reader who has seen enough (`| head`) does not end the run."""
    if os.environ.get("RANK", "0") == "0":
        try:
            print(line, flush=True)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# Copied from ch01_single_gpu_baseline.stop
def stop(message: str) -> NoReturn:
    """End with one line and exit code 2: the command was wrong, not the program."""
    sys.stderr.write(message + "\n")  # in one piece: other ranks write too
    sys.exit(2)


if __name__ == "__main__":
    main()
