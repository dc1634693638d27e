"""The book's model behind an OpenAI-compatible API: vLLM where it is installed, or transformers.

    python chapter9-production-llm-serving-stack/code/model_runner.py --engine transformers --port 8102 &
    curl --silent --fail --retry 60 --retry-connrefused --retry-delay 1 http://127.0.0.1:8102/health
    curl --silent http://127.0.0.1:8102/v1/completions --json '{"model": "book", "prompt": "When a rank waits for the others,", "max_tokens": 16, "temperature": 0}'
    curl --silent http://127.0.0.1:8102/v1/chat/completions --json '{"model": "book", "messages": [{"role": "user", "content": "Rank?"}], "max_tokens": 2, "temperature": 0, "stream": true}'
    curl --silent http://127.0.0.1:8102/v1/completions --json '{"model": "gpt-5", "prompt": "Hello"}'
    kill %1

On GPUs:
    python chapter9-production-llm-serving-stack/code/model_runner.py --engine vllm --max-requests 256 --port 8102

With --engine vllm, after `make vllm`, the same prompt gets the same text. /health says 503 until
the model has made a token, and again from SIGTERM on, while running streams go to their end. The
checkpoint has a chat template; a model without one gets its messages' contents, a line each.
Section 9.2.
"""

import argparse
import asyncio
import contextlib
import importlib.util
import os
import sys
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import ch09_tracing
from engines import Detokenizer, Engine, Sampling, TransformersEngine, VllmEngine
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from http_service import ApiError, Service, serve, service_app, stop
from openai_api import (
    NAME,
    Answer,
    Body,
    ChatBody,
    CompletionBody,
    EventStream,
    Piece,
    refuse_unknown,
    unless_gone,
)
from opentelemetry.trace import Span
from prometheus_client import Counter, Gauge, Histogram
from tokenizer_service import BOOK_MODEL, TextCodec

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class Runner:
    """Requests in, pieces of text out, with the books kept: slots, tokens, times, spans."""

    def __init__(self, engine: Engine, codec: TextCodec, max_requests: int, service: Service):
        self.engine = engine
        self.codec = codec
        self.max_requests = max_requests
        self.active = 0
        one = {"registry": service.registry}  # the names are vLLM's, where the meaning is
        Gauge("vllm:num_requests_running", "requests with a slot", **one).set_function(
            lambda: self.active
        )
        self.prompt_tokens = Counter("vllm:prompt_tokens", "tokens of prompts", **one)
        self.new_tokens = Counter("vllm:generation_tokens", "tokens made", **one)
        self.ended = Counter(
            "vllm:request_success", "answered to the end", ["finished_reason"], **one
        )
        self.unfinished = Counter(
            "book_requests_unfinished", "refused, left by the client, or failed", ["why"], **one
        )
        self.ttft = Histogram(
            "vllm:time_to_first_token_seconds", "from the slot to a token", buckets=SECONDS, **one
        )
        self.itl = Histogram(
            "vllm:inter_token_latency_seconds", "between tokens", buckets=SECONDS, **one
        )

    async def become_ready(self) -> None:
        """Ready means ready: the weights are there, and a token has been made with them."""
        await asyncio.to_thread(self.engine.load)
        async for _ in self.engine.tokens([1], Sampling(1, 0, 1, 0, True)):
            pass

    def take_slot(self) -> None:
        if self.active >= self.max_requests:
            self.unfinished.labels("refused").inc()
            message = f"all {self.max_requests} slots are taken"
            raise ApiError(429, message, code="overloaded", headers={"Retry-After": "1"})
        self.active += 1

    def release(self, why: str | None) -> None:
        self.active -= 1
        if why is not None:
            self.unfinished.labels(why).inc()

    def sampling(self, body: Body, wanted: int | None, prompt: list[int]) -> Sampling:
        room = self.engine.context - len(prompt)
        if not prompt:
            raise ApiError(400, "the prompt is empty", "prompt")
        if room < (wanted or 1):
            message = (
                f"the context is {self.engine.context} tokens: "
                f"{len(prompt)} of the prompt and {wanted or 1} to make are too many"
            )
            raise ApiError(
                400, message, "max_tokens" if room > 0 else None, "context_length_exceeded"
            )
        temperature = 1.0 if body.temperature is None else body.temperature
        return Sampling(
            max_tokens=wanted or room,
            temperature=temperature if temperature >= 0.01 else 0.0,  # logits / 1e-40 are infinite
            top_p=1.0 if body.top_p is None else body.top_p,
            seed=body.seed,
            ignore_eos=body.ignore_eos,
        )

    async def pieces(
        self, prompt: list[int], sampling: Sampling, stops: list[str], span: Span
    ) -> AsyncGenerator[Piece, None]:
        """Generate; hold ids back with the text that they belong to."""
        text = Detokenizer(self.codec, stops)
        waiting: list[int] = []
        last = time.perf_counter()
        span.add_event("queued")
        self.prompt_tokens.inc(len(prompt))
        async with contextlib.aclosing(self.engine.tokens(prompt, sampling)) as steps:
            async for ids, reason in steps:
                now = time.perf_counter()
                if len(text.ids) == 0:
                    span.add_event("first_token")
                    span.set_attribute("gen_ai.response.time_to_first_chunk", now - last)
                    self.ttft.observe(now - last)
                else:
                    self.itl.observe((now - last) / max(1, len(ids)))
                last = now
                self.new_tokens.inc(len(ids))
                new = ""
                for token in ids:
                    if not text.stopped:
                        waiting.append(token)
                        new += text.add(token)
                if text.stopped:
                    reason = "stop"
                elif reason:
                    new += text.rest()
                if new or reason:
                    yield Piece(new, waiting, reason or None)
                    waiting = []
                if reason:
                    self.ended.labels(reason).inc()
                    return


def span_of(body: Body, sampling: Sampling) -> Span:
    operation = "chat" if isinstance(body, ChatBody) else "text_completion"
    asked = {"max_tokens": sampling.max_tokens, "temperature": sampling.temperature}
    asked |= {"top_p": sampling.top_p, "seed": body.seed, "stream": bool(body.stream)}
    return ch09_tracing.inference_span(operation, NAME, asked)


def runner_app(engine: Engine, codec: TextCodec, max_requests: int) -> FastAPI:
    service = Service("model_runner", alive=engine.alive, finish=engine.shut_down)
    runner = Runner(engine, codec, max_requests, service)
    service.prepare = runner.become_ready
    app = service_app(service, max_bytes=1 << 20)
    app.state.runner = runner

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        model = {"id": NAME, "object": "model", "created": 0, "owned_by": "book"}
        return {"object": "list", "data": [model | {"max_model_len": engine.context}]}

    @app.post("/v1/completions", response_model=None)
    async def completions(body: CompletionBody, request: Request) -> Response:
        refuse_unknown(body)
        prompt = body.prompt
        if isinstance(prompt, str):
            prompt = await asyncio.to_thread(codec.encode, prompt, True)
        elif any(not 0 <= token < codec.size for token in prompt):
            raise ApiError(400, f"token ids are from 0 to {codec.size - 1}", "prompt")
        wanted = 16 if body.max_tokens is None else body.max_tokens  # OpenAI's default
        return await answer(body, prompt, wanted, request)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatBody, request: Request) -> Response:
        refuse_unknown(body)
        messages = [message.plain() for message in body.messages]
        prompt = await asyncio.to_thread(codec.encode_chat, messages)
        return await answer(body, prompt, body.max_completion_tokens or body.max_tokens, request)

    async def answer(
        body: Body, prompt: list[int], wanted: int | None, request: Request
    ) -> Response:
        sampling = runner.sampling(body, wanted, prompt)
        stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
        runner.take_slot()
        span = span_of(body, sampling)
        pieces = runner.pieces(prompt, sampling, stops, span)
        found = Answer(body, prompt, pieces, span, runner.release)
        if body.stream:
            return EventStream(found)
        try:
            whole = await unless_gone(request, found.whole())
        finally:
            await found.close()
        return JSONResponse(whole) if whole else Response(status_code=499)  # nobody reads it

    ch09_tracing.instrument(app, "model_runner")
    return app


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=BOOK_MODEL, help="a Hugging Face folder")
    parser.add_argument(
        "--engine",
        choices=("auto", "vllm", "transformers"),
        default="auto",
        help="auto: vLLM where `make vllm` was run",
    )
    parser.add_argument("--max-requests", type=int, default=8, help="above it: 429")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8102, help="0: a free one")
    parser.add_argument("--drain", type=float, default=20, help="seconds to finish after SIGTERM")
    parser.add_argument("--linger", type=float, default=0, help="of these, at least, saying 503")
    parser.add_argument("--gpu-share", type=float, help="of a GPU's memory, for vLLM")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    there = importlib.util.find_spec("vllm") or Path(".venv-vllm/bin/python").exists()
    engine: Engine
    if args.engine == "vllm" or (args.engine == "auto" and there):
        enter_environment("vllm", "vLLM")
        engine = VllmEngine(args.model, args.max_requests, args.drain, args.gpu_share)
    else:
        engine = TransformersEngine(args.model)
    app = runner_app(engine, TextCodec(args.model), args.max_requests)
    serve(app, args.host, args.port, args.drain, args.linger)


# --- copied from other scripts; `make copies` keeps it equal to them ------------------------------


# Copied from offline_inference.enter_environment
def enter_environment(package: str, name: str) -> None:
    """Go on as the same program in the environment of an engine, where this Python lacks its package.

    vLLM and SGLang pin other versions of the same packages, so each has an environment of its own,
    `.venv-PACKAGE`, made by `make PACKAGE`. With a Python that has the package only variables change.
    """
    for variable, value in engine_variables().items():
        os.environ.setdefault(variable, value)  # what you have set stays
    if importlib.util.find_spec(package) is not None:
        return
    python = Path(f".venv-{package}/bin/python")
    if not python.exists():
        stop(f"needs {name}: make {package}")
    os.execv(python, [str(python), *sys.argv])


# Copied from offline_inference.engine_variables
def engine_variables() -> dict[str, str]:
    """Environment variables of one engine: no network, its log on stderr, and on a CPU one thread.

    Without OMP_NUM_THREADS=1 small matrices on a CPU spend their time waiting for threads.
    """
    variables = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    }
    if not Path("/dev/nvidiactl").exists():
        variables |= {
            "OMP_NUM_THREADS": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process, no second one
            "SGLANG_USE_CPU_ENGINE": "1",
            "SGLANG_CPU_OMP_THREADS_BIND": "0",
        }
    return variables


if __name__ == "__main__":
    main()
