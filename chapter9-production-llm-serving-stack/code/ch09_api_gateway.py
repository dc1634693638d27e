"""One door for all clients: an OpenAI-compatible gateway in front of several model runners.

    python chapter9-production-llm-serving-stack/code/ch09_api_gateway.py --port 8100 --backend book=http://127.0.0.1:8101 --key me=271249251438351b7655a86f440837fdda54cc197ba21f0825762d1da550f971 &
    python chapter9-production-llm-serving-stack/code/model_runner.py --engine transformers --port 8101 &
    curl --silent --fail --retry 60 --retry-connrefused --retry-delay 1 http://127.0.0.1:8100/health
    curl --silent http://127.0.0.1:8100/v1/completions -H "Authorization: Bearer sk-book" --json '{"model": "book", "prompt": "When a rank waits for the others,", "max_tokens": 16, "temperature": 0}'
    curl --silent http://127.0.0.1:8100/v1/completions -H "Authorization: Bearer sk-wrong" --json '{}'
    kill %1 %2

The gateway is ready when a backend is. Look at the second answer: an error has the shape that
OpenAI's clients understand.
A key is given as its SHA-256: `printf %s sk-book | sha256sum`. Sections 9.3 and 9.4.
"""

import argparse
import asyncio
import contextlib
import json
import logging
import math
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from http.cookiejar import DefaultCookiePolicy
from typing import Any

import httpx
from accounting import Accounting, Metrics, Record
from backends import (
    Backends,
    Failed,
    Replica,
    data_of,
    events,
    is_aborted,
    is_done,
    point_of,
    until_first_token,
)
from ch09_tracing import Call, headers_of_current_span, instrument
from fastapi import FastAPI, Request
from http_service import (
    ApiError,
    Service,
    TimedStream,
    error_body,
    is_local,
    serve,
    service_app,
    stop,
)
from limits import TokenBucket, hashed, key_of_tenant, limit_of_tenant, pair, tenant_of
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

OPERATIONS = {  # of each route, as OpenTelemetry's GenAI conventions name it
    "/v1/chat/completions": "chat",
    "/v1/completions": "text_completion",
    "/v1/models": "list_models",
}
log = logging.getLogger("gateway")


def refusal(status: int, message: str, code: str, retry_after_s: float | None = None) -> ApiError:
    headers = {"Retry-After": str(max(math.ceil(retry_after_s), 1))} if retry_after_s else None
    return ApiError(status, message, code=code, headers=headers)


class Gateway:
    """What all requests share."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.service = Service("gateway", prepare=self.until_a_backend_is_up)
        self.client = httpx.AsyncClient(
            limits=httpx.Limits(max_connections=None, keepalive_expiry=2.0),  # uvicorn's are 5 s
            timeout=httpx.Timeout(args.idle, connect=2.0),
            trust_env=False,  # a proxy for the Internet is none for our own machines
        )
        self.client.cookies.jar.set_policy(DefaultCookiePolicy(allowed_domains=[]))  # keep nobody's
        self.backends = Backends(args.backend, self.client, args.check_every)
        limits = dict.fromkeys(args.key, (args.burst, args.per_second)) | args.limit
        self.buckets = {tenant: TokenBucket(*limits[tenant]) for tenant in args.key}
        self.service.may_read = lambda request: is_local(request) or self.is_admin(request)
        self.metrics = Metrics(self.service.registry, self.backends.replicas)

    def admit(self, request: Request, record: Record) -> None:
        """Say who asks and whether they may now; raises the error that is the answer if not."""
        tenant = tenant_of(request.headers.get("authorization", ""), self.args.key)
        if tenant is None:
            raise refusal(401, "no valid API key was given", "invalid_api_key")
        record.tenant = tenant
        if self.service.running > self.args.max_running:  # first: it takes no token
            raise refusal(503, "the gateway is full", "overloaded", retry_after_s=1)
        wait_s = self.buckets[tenant].take()
        if wait_s:
            message = f"{tenant} has asked too often"
            raise refusal(429, message, "rate_limit_exceeded", retry_after_s=wait_s)

    def is_admin(self, request: Request) -> bool:
        admin = {"admin": self.args.admin_key} if self.args.admin_key else {}
        return tenant_of(request.headers.get("authorization", ""), admin) is not None

    async def until_a_backend_is_up(self) -> None:
        """Begin the health checks; the gateway is ready when there is somebody to ask."""
        self.backends.watch()
        while not any(replica.up for replica in self.backends.replicas):
            await asyncio.sleep(0.05)

    async def check_length(self, route: str, payload: dict) -> None:
        """Refuse a prompt that no runner could take. Without an answer the runner may judge."""
        chat = route.endswith("chat/completions")
        key, content = (
            ("messages", payload.get("messages")) if chat else ("text", payload.get("prompt"))
        )
        if not self.args.tokenizer or not isinstance(content, list if chat else str):
            return
        with contextlib.suppress(httpx.RequestError, ValueError, KeyError, TypeError):
            answer = await self.client.post(
                self.args.tokenizer + "/v1/tokenize",
                json={key: content},
                headers=headers_of_current_span(),
                timeout=2.0,
            )
            count = answer.json()["count"]
            if count >= self.args.context:
                raise refusal(
                    400,
                    f"the prompt has {count} tokens, the model's context {self.args.context}",
                    "context_length_exceeded",
                )


# --- the way of one request -----------------------------------------------------------------------


async def relay(request: Request) -> Response:
    """Admit a request and answer it from a backend, for as long as its client and deadline wait."""
    gateway: Gateway = request.app.state.gateway
    record: Record = request.scope["record"]
    gateway.admit(request, record)
    deadline = record.started + gateway.args.deadline
    try:
        body = await asyncio.wait_for(request.body(), deadline - time.monotonic())
    except asyncio.TimeoutError:
        raise refusal(408, "the request did not arrive in time", "timeout") from None
    work = asyncio.create_task(ask_backends(gateway, record, request, body))
    gone = asyncio.create_task(client_left(request))
    left_s = deadline - time.monotonic()
    try:
        await asyncio.wait({work, gone}, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            with contextlib.suppress(TimeoutError):  # this very deadline
                return work.result()
        if gone.done():
            raise ClientDisconnect
        gateway.metrics.end(record.attempt, "error")
        raise refusal(504, "no backend has answered in time", "timeout")
    finally:
        work.cancel()  # closes its connection: the backend stops generating
        gone.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)


async def ask_backends(gateway: Gateway, record: Record, request: Request, body: bytes) -> Response:
    """The answer of the first backend that sends a token; each replica is asked once at most."""
    payload = parse(body) if request.method == "POST" else {}
    await gateway.check_length(record.route, payload)
    point = point_of(payload.get("user"), next(iter(gateway.backends.weights)))
    tried: dict[str, Failed] = {}
    while replica := gateway.backends.choose(point, tried):
        try:
            return await attempt(gateway, record, replica, request.method, body, payload)
        except Failed as error:
            tried[replica.name] = error
    if not tried:
        raise refusal(503, "no backend is up", "no_backend", retry_after_s=1)
    if all(error.busy for error in tried.values()):
        raise refusal(503, "every backend is full", "overloaded", retry_after_s=1)
    raise refusal(502, f"{len(tried)} asked, none answered", "backend_failed", retry_after_s=1)


async def attempt(
    gateway: Gateway, record: Record, replica: Replica, method: str, body: bytes, payload: dict
) -> Response:
    """Ask one replica, and count how it went. Failed: another one may be asked."""
    record.attempts += 1
    record.replica = replica.name
    call = Call(
        f"{OPERATIONS[record.route]} book",
        **{
            "gen_ai.operation.name": OPERATIONS[record.route],
            "gen_ai.request.model": "book",
            "book.replica": replica.name,
            "book.attempt": record.attempts,
        },
    )
    record.resources.callback(call.end)  # at the latest
    gateway.metrics.begin(record)
    try:
        left_s = record.started + gateway.args.deadline - time.monotonic()
        patience: Any = httpx.USE_CLIENT_DEFAULT
        if method == "POST" and not payload.get("stream"):  # silent until all of it is there
            patience = httpx.Timeout(max(left_s, 0.0) + 1, connect=2.0)  # the deadline comes first
        return await ask(gateway, record, replica, method, body, call, patience)
    except (httpx.RequestError, Failed) as error:
        call.end(type(error).__name__)
        failed = error if isinstance(error, Failed) else Failed(type(error).__name__)
        gateway.metrics.end(record.attempt, "busy" if failed.busy else "error")
        if isinstance(error, httpx.ConnectError):
            replica.up = False  # until the next good health check
        log.info(json.dumps({"id": record.id, "failed": replica.name, "why": str(failed)}))
        raise failed from None


async def ask(
    gateway: Gateway,
    record: Record,
    replica: Replica,
    method: str,
    body: bytes,
    call: Call,
    patience: Any,
) -> Response:
    """The replica's answer, once its first token is here, or all of it if it comes in one piece."""
    headers = {"content-type": "application/json", "accept-encoding": "identity"}
    headers |= call.headers | {"x-request-id": record.id}
    url = replica.url + record.route
    async with AsyncExitStack() as resources:
        resources.enter_context(replica.at_work())
        response = await resources.enter_async_context(
            gateway.client.stream(method, url, content=body, headers=headers, timeout=patience)
        )
        if response.status_code >= 500 or response.status_code == 429:
            raise Failed(f"status {response.status_code}", busy=response.status_code == 429)
        kind = response.headers.get("content-type", "")
        streams = kind.startswith("text/event-stream")
        if streams:
            deadline = record.started + gateway.args.deadline
            stream = events(response, deadline)
            head = await until_first_token(stream)
            call.event("first_token")
        else:
            whole = await response.aread()
            if is_aborted(whole):
                raise Failed("aborted")
            call.end()
        gateway.metrics.first_token(record)
        headers = {"x-backend": replica.backend, "x-replica": replica.name}
        headers["x-attempts"] = str(record.attempts)
        if streams:  # from here on no other backend can be asked
            record.resources.push_async_callback(resources.pop_all().aclose)
            headers |= {"cache-control": "no-cache", "x-accel-buffering": "no"}
            passed = pass_on(gateway, record, head, stream, call)
            return TimedStream(passed, headers, deadline)
    gateway.metrics.end(record.attempt, "ok" if response.status_code < 400 else "refused")
    if response.status_code >= 400 and not is_api_error(whole):
        raise refusal(response.status_code, "the backend refused this", "refused")
    return Response(whole, response.status_code, headers, kind)


async def pass_on(
    gateway: Gateway, record: Record, head: list[bytes], stream: AsyncIterator[bytes], call: Call
) -> AsyncIterator[bytes]:
    """The events of a stream as they come. If it breaks the client is told: it has part of it."""
    event = b""
    why = "the backend's stream ended early"
    try:
        for event in head:
            yield event
        async for event in stream:
            if is_aborted(data_of(event)):
                break
            yield event
    except TimeoutError:
        why = "the deadline has passed"
    except httpx.RequestError as error:
        why = f"the backend's stream broke: {type(error).__name__}"
    done = is_done(event)
    call.end(None if done else "stream_cut")
    gateway.metrics.end(record.attempt, "ok" if done else "error")
    if not done:
        record.outcome = "cut"
        error = error_body(502, why, code="stream_cut")
        yield b"data: " + json.dumps(error).encode() + b"\n\n"


async def client_left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def parse(body: bytes) -> dict:
    try:
        payload = json.loads(body)
    except (ValueError, RecursionError):
        raise refusal(400, "the body is no JSON", "invalid_json") from None
    if not isinstance(payload, dict):
        raise refusal(400, "the body is no JSON object", "invalid_json")
    return payload


def is_api_error(body: bytes) -> bool:
    with contextlib.suppress(ValueError):
        content = json.loads(body)
        return isinstance(content, dict) and isinstance(content.get("error"), dict)
    return False


# --- the application ------------------------------------------------------------------------------


def make_app(args: argparse.Namespace) -> FastAPI:
    gateway = Gateway(args)
    app = service_app(gateway.service, args.max_body)
    app.state.gateway = gateway
    paths = [*OPERATIONS, "/admin/weights"]
    app.add_middleware(Accounting, metrics=gateway.metrics, paths=paths)
    instrument(app, "gateway")
    for route in OPERATIONS:
        method = "GET" if route == "/v1/models" else "POST"
        app.add_api_route(route, relay, methods=[method], response_model=None)
    app.add_api_route("/admin/weights", weights, methods=["GET", "PUT"], response_model=None)
    return app


async def weights(request: Request) -> JSONResponse:
    """Read or change the shares of the traffic; only from this machine and with the admin's key."""
    gateway: Gateway = request.app.state.gateway
    if not is_local(request) or not gateway.is_admin(request):
        raise refusal(401, "the admin's key is wanted, on this machine", "invalid_api_key")
    if request.method == "PUT":
        wanted = parse(await request.body())
        try:
            gateway.backends.set_weights(wanted)
        except ValueError as error:
            raise refusal(400, str(error), "invalid_weights") from None
    return JSONResponse(gateway.backends.weights)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on")
    add("--port", type=int, default=8100, help="port to listen on; 0: any free one")
    add(
        "--backend",
        type=pair,
        action="append",
        default=[],
        metavar="NAME=URL",
        help="a runner; a name given twice has two replicas",
    )
    add(
        "--key",
        type=key_of_tenant,
        action="append",
        default=[],
        metavar="TENANT=SHA256",
        help="a tenant's API key, hashed",
    )
    add("--admin-key", type=hashed, metavar="SHA256", help="key for /admin; without it nobody may")
    add(
        "--limit",
        type=limit_of_tenant,
        action="append",
        default=[],
        metavar="TENANT=BURST,RATE",
        help="a tenant's own limit: requests at once, requests/s",
    )
    add("--burst", type=float, default=100, help="requests at once of a tenant without --limit")
    add("--per-second", type=float, default=50, help="requests/s of a tenant without --limit")
    add(
        "--tokenizer",
        metavar="URL",
        help="service that counts a prompt's tokens before a runner sees it",
    )
    add("--context", type=int, default=256, help="tokens of the model's context, with --tokenizer")
    add("--max-running", type=int, default=256, help="requests at work at once")
    add("--max-body", type=int, default=1 << 20, help="bytes of a request's body")
    add(
        "--deadline",
        type=float,
        default=120,
        help="seconds for a request, retries and stream included",
    )
    add("--idle", type=float, default=20, help="seconds that a backend may be silent")
    add("--linger", type=float, default=0, help="seconds to say 503 after SIGTERM, at least")
    add("--check-every", type=float, default=1, help="seconds between two health checks")
    args = parser.parse_args()
    args.key = dict(args.key)
    args.limit = dict(args.limit)
    if not args.backend or not args.key:
        stop("nobody to ask, or nobody who may: type --backend NAME=URL and --key TENANT=SHA256")
    if unknown := args.limit.keys() - args.key.keys():
        stop(f"--limit of {', '.join(sorted(unknown))}, who has no --key")
    return args


def main() -> None:
    args = parse_args()
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    log.setLevel(logging.INFO)
    serve(make_app(args), args.host, args.port, linger_s=args.linger)


if __name__ == "__main__":
    main()
