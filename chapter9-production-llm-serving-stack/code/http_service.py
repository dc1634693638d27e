"""What each HTTP service of the stack does in the same way, for the others to import.

Errors in OpenAI's shape, a limit on the body, /health and /metrics, ready only when it can answer,
and draining on SIGTERM. Section 9.1.
"""

import asyncio
import os
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

import anyio
import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LAST_WORDS_S = 1.0  # from the deadline, to tell a client whose stream it has ended
PROBES = ("/health", "/metrics")  # answered always: also while loading and draining


class ApiError(HTTPException):
    """A refusal, in the shape that OpenAI's clients can read."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(status, message, headers)
        self.param = param
        self.code = code


def error_body(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    kind = {429: "rate_limit_error", 401: "authentication_error"}.get(status, kind)
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(error: HTTPException) -> JSONResponse:
    param = getattr(error, "param", None)
    code = getattr(error, "code", None)
    body = error_body(error.status_code, str(error.detail), param, code)
    return JSONResponse(body, error.status_code, headers=error.headers)


@dataclass
class Service:
    """What a load balancer asks a process, and what the process owes to those whom it serves."""

    name: str
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)
    prepare: Callable[[], Awaitable[None]] | None = None  # ends when it can answer
    alive: Callable[[], bool] = lambda: True  # asked once it is ready; False ends the process
    finish: Callable[[], None] | None = None
    may_read: Callable[[Request], bool] = lambda _: True  # the metrics
    ready: bool = False
    draining: bool = False
    running: int = 0  # requests that are not answered to the end

    def state(self) -> str:
        return "draining" if self.draining else "ready" if self.ready else "loading"


class Door:
    """ASGI middleware: nobody in who cannot be served, no body over the limit, all counted.

    Pure ASGI. A BaseHTTPMiddleware would hide from the application that its client has gone away.
    """

    def __init__(self, app: ASGIApp, service: Service, max_bytes: int):
        self.app = app
        self.service = service
        self.max_bytes = max_bytes
        labels = ("service", "path", "status")
        self.answers = Counter(
            "book_http_requests", "requests answered", labels, registry=service.registry
        )
        self.open = Gauge(
            "book_http_requests_running", "requests being answered", registry=service.registry
        )
        self.open.set_function(lambda: service.running)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in PROBES:
            await self.app(scope, receive, send)
            return
        status = 499  # the client left before an answer

        async def send_and_note(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        self.service.running += 1
        try:
            refusal = self.refusal(scope)
            inner = self.app if refusal is None else error_response(refusal)
            await inner(scope, self.limited(receive), send_and_note)
        except ClientDisconnect:
            raise
        except Exception:
            status = 500
            raise
        finally:
            self.service.running -= 1
            path = getattr(scope.get("route"), "path", "none")  # no label for each guess of a robot
            self.answers.labels(self.service.name, path, str(status)).inc()

    def refusal(self, scope: Scope) -> ApiError | None:
        if self.service.state() != "ready":
            state = self.service.state()
            message = f"this {self.service.name} is {state}: try another one"
            return ApiError(503, message, code=state, headers={"Retry-After": "1"})
        length = dict(scope["headers"]).get(b"content-length", b"0")
        return self.too_large() if int(length) > self.max_bytes else None

    def too_large(self) -> ApiError:
        return ApiError(413, f"the body is over {self.max_bytes:,} bytes", code="body_too_large")

    def limited(self, receive: Receive) -> Receive:
        """A body that comes in chunks has no length in its header: count."""
        received = 0

        async def receive_and_count() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_bytes:
                raise self.too_large()
            return message

        return receive_and_count


class TimedStream(StreamingResponse):
    """A stream with a deadline (of time.monotonic()), also for a client that has stopped reading."""

    def __init__(self, content: AsyncIterator[bytes], headers: dict[str, str], deadline: float):
        super().__init__(content, 200, headers, "text/event-stream")
        self.deadline = deadline

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with anyio.move_on_after(self.deadline + LAST_WORDS_S - time.monotonic()):
            await super().__call__(scope, receive, send)


def is_local(request: Request) -> bool:
    return request.client is not None and request.client.host in ("127.0.0.1", "::1")


def service_app(service: Service, max_bytes: int) -> FastAPI:
    """An application with health, metrics, limits and errors; routes are the caller's."""
    app = FastAPI(title=service.name, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.service = service
    app.add_middleware(Door, service=service, max_bytes=max_bytes)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        """FastAPI's own answer is a 422 that sends the input back: a prompt, into somebody's log."""
        if "json" not in request.headers.get("content-type", ""):  # a browser's form, or curl -d
            return error_response(ApiError(415, "send JSON, with Content-Type: application/json"))
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return error_response(ApiError(400, f"not JSON: {first['ctx']['error']}"))
        where = ".".join(str(part) for part in first["loc"][1:]) or None
        return error_response(ApiError(400, f"{where or 'body'}: {first['msg']}", where))

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse(error_body(500, "internal error"), 500)

    @app.get("/health")
    async def health() -> JSONResponse:
        state = service.state()
        return JSONResponse({"status": state}, 200 if state == "ready" else 503)

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        if not service.may_read(request):
            raise ApiError(
                401, "the admin's key is wanted, or this machine", code="invalid_api_key"
            )
        return Response(generate_latest(service.registry), media_type="text/plain; version=0.0.4")

    return app


class DrainingServer(uvicorn.Server):
    """uvicorn that goes on answering after SIGTERM: 503 to what is new, the rest to its end."""

    def __init__(
        self,
        config: uvicorn.Config,
        service: Service,
        url: str,
        drain_s: float,
        linger_s: float = 0.0,
    ):
        super().__init__(config)
        self.service = service
        self.url = url
        self.drain_s = drain_s
        self.linger_s = linger_s  # idle too: a balancer must see a 503 before the door is shut
        self.deadline = float("inf")
        self.failed = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.loading = asyncio.create_task(self.become_ready())

    async def become_ready(self) -> None:
        try:
            if self.service.prepare is not None:
                await self.service.prepare()
        except Exception as error:
            sys.stderr.write(f"{self.service.name} cannot start: {error!r}\n")
            self.failed = self.should_exit = True
            return
        self.service.ready = True
        say(f"ready: {self.url}")

    def handle_exit(self, sig: int, frame: Any) -> None:
        """The first signal drains, the second ends. uvicorn's own would close the door at once."""
        now = time.monotonic()
        self.deadline = 0.0 if self.service.draining else now + self.drain_s
        self.lingers_until = now + self.linger_s
        self.service.draining = True

    async def on_tick(self, counter: int) -> bool:
        now = time.monotonic()
        idle = self.service.running == 0
        if self.service.draining and (now > self.deadline or (idle and now >= self.lingers_until)):
            left = self.deadline - now
            self.config.timeout_graceful_shutdown = max(1, int(left))
            return True
        if self.service.ready and not self.service.alive():
            sys.stderr.write(f"{self.service.name}: its engine has died\n")
            self.failed = True  # whoever started us starts us again
            return True
        return await super().on_tick(counter)


def serve(app: FastAPI, host: str, port: int, drain_s: float = 10.0, linger_s: float = 0.0) -> None:
    """Answer until SIGTERM or SIGINT, then drain. Nothing of a request goes to the log.

    Exit code 0 after a drain, 1 if the service could not start, 2 if the port is taken.
    """
    service = getattr(app.state, "service", None) or Service(app.title)
    try:
        listener = socket.create_server((host, port), family=family_of(host))
    except OSError as error:
        stop(f"cannot listen on {host}:{port} ({error.strerror}): type another --port")
    # asyncio does it only for sockets whose `proto` says TCP. Without it headers and body go out as
    # two packets, and the second waits for the client's delayed acknowledgement: 40 ms an answer.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    shown = f"[{host}]" if ":" in host else host
    url = f"http://{shown}:{listener.getsockname()[1]}"
    config = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False)
    config.timeout_graceful_shutdown = max(1, int(drain_s))
    server = DrainingServer(config, service, url, drain_s, linger_s)
    server.run(sockets=[listener])
    if service.finish is not None:
        service.finish()
    sys.stdout.flush()
    if server.failed:
        sys.exit(1)


def family_of(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


# --- copied from other scripts; `make copies` keeps it equal to them ------------------------------


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
