"""OpenAI's API as data: what a request may say, and the two shapes of an answer.

Completions and chat, in one piece or as server-sent events. Whatever becomes of a request (an end,
an error, a client that goes away), its `Answer` is closed exactly once. Section 9.2.
"""

import asyncio
import contextlib
import json
import sys
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import anyio
from fastapi import Request
from fastapi.responses import StreamingResponse
from http_service import ApiError, error_body
from opentelemetry.trace import Span, StatusCode
from pydantic import BaseModel, ConfigDict, Field
from starlette.types import Receive, Scope, Send

NAME = "book"
UNREAD_S = 20.0
UNSUPPORTED = {  # what would change the answer, and its values that change nothing
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),  # 0 is a number of them, and asks for the token's own
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "tools": ([],),
    "response_format": ({"type": "text"},),
}


class StreamOptions(BaseModel):
    include_usage: bool | None = False


class Body(BaseModel):
    """What both routes have in common. Unknown fields are let through, `UNSUPPORTED` ones are not."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    stream: bool | None = False
    user: str | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False  # this and the next as vLLM has them
    return_token_ids: bool = False


class CompletionBody(Body):
    prompt: str | list[int]


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class Message(BaseModel):
    role: Literal["system", "user", "assistant"]
    content: str | list[TextPart]

    def plain(self) -> dict[str, str]:
        parts = self.content
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        return {"role": self.role, "content": text}


class ChatBody(Body):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)


def refuse_unknown(body: Body) -> None:
    """Refuse what would be answered wrongly."""
    if body.model != NAME:
        message = f"there is no such model, only `{NAME}`"  # the name might not be UTF-8
        raise ApiError(404, message, "model", "model_not_found")
    for name, neutral in UNSUPPORTED.items():
        value = (body.model_extra or {}).get(name)
        same = [value == n and isinstance(value, bool) == isinstance(n, bool) for n in neutral]
        if value is not None and not any(same):
            raise ApiError(400, f"this server has no {name}", name, "unsupported_parameter")


@dataclass
class Piece:
    """What one step of a generation adds to the answer."""

    text: str
    ids: list[int]
    reason: str | None = None


class Answer:
    """One request, from its slot to its end, in one of OpenAI's two shapes."""

    def __init__(
        self,
        body: Body,
        prompt: list[int],
        pieces: AsyncGenerator[Piece, None],
        span: Span,
        release: Callable[[str | None], None],
    ):
        self.body = body
        self.prompt = prompt
        self.pieces = pieces
        self.span = span
        self.release = release  # told why the answer did not come to its end
        self.chat = isinstance(body, ChatBody)
        self.id = f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.made = 0
        self.reason: str | None = None
        self.error = "left"
        self.ended_ns: int | None = None  # None: now

    async def close(self) -> None:
        """Whatever happened: the engine stops working, the slot is free, the span ends."""
        self.release(None if self.reason else self.error)
        if self.reason is None:
            self.span.set_attribute("error.type", self.error)
            self.span.set_status(StatusCode.ERROR)
        else:
            self.span.set_attribute("gen_ai.response.finish_reasons", [self.reason])
        self.span.set_attribute("gen_ai.response.id", self.id)
        self.span.set_attribute("gen_ai.usage.input_tokens", len(self.prompt))
        self.span.set_attribute("gen_ai.usage.output_tokens", self.made)
        self.span.add_event("end", timestamp=self.ended_ns)
        self.span.end(self.ended_ns)
        await self.pieces.aclose()

    async def each(self) -> AsyncIterator[Piece]:
        try:
            async for piece in self.pieces:
                self.made += len(piece.ids)
                self.reason = piece.reason
                if self.reason:
                    self.ended_ns = time.time_ns()
                yield piece
        except Exception:  # the engine's; of a client that leaves it is a CancelledError
            self.error = "failed"
            raise

    def usage(self) -> dict[str, int]:
        prompt, made = len(self.prompt), self.made
        return {
            "prompt_tokens": prompt,
            "completion_tokens": made,
            "total_tokens": prompt + made,
        }

    def shell(self, choices: list[dict[str, Any]], part: bool) -> dict[str, Any]:
        kind = "text_completion" if not self.chat else "chat.completion" + ".chunk" * part
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": NAME,
            "choices": choices,
        }

    def choice(self, content: dict[str, Any], piece: Piece) -> dict[str, Any]:
        choice = {"index": 0} | content | {"logprobs": None, "finish_reason": piece.reason}
        return choice | ({"token_ids": piece.ids} if self.body.return_token_ids else {})

    async def whole(self) -> dict[str, Any]:
        whole = Piece("", [])
        async for piece in self.each():
            whole = Piece(whole.text + piece.text, whole.ids + piece.ids, piece.reason)
        message = {"message": {"role": "assistant", "content": whole.text}}
        choice = self.choice(message if self.chat else {"text": whole.text}, whole)
        return self.shell([choice], part=False) | {"usage": self.usage()}

    async def events(self) -> AsyncIterator[str]:
        """Server-sent events; the role comes alone, before the first token."""
        options = self.body.stream_options
        if self.chat:
            role = {"delta": {"role": "assistant", "content": ""}}
            yield sse(self.shell([self.choice(role, Piece("", []))], part=True))
        try:
            async for piece in self.each():
                delta = {"delta": {"content": piece.text}} if self.chat else {"text": piece.text}
                yield sse(self.shell([self.choice(delta, piece)], part=True))
        except Exception as error:  # 200 is out already: say it in the stream, and without [DONE]
            sys.stderr.write(f"{self.id}: {error!r}\n")
            yield sse(error_body(500, "the engine failed"))
            return
        if options and options.include_usage:
            yield sse(self.shell([], part=True) | {"usage": self.usage()})
        yield "data: [DONE]\n\n"


def sse(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


class EventStream(StreamingResponse):
    """Closes its answer also when not one event was sent: a generator's `finally` would not.

    A client that takes nothing for UNREAD_S has left, though its connection is there.
    """

    def __init__(self, answer: Answer):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(answer.events(), headers=headers, media_type="text/event-stream")
        self.answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_in_time(message: Any) -> None:
            with anyio.fail_after(UNREAD_S):
                await send(message)

        try:
            with contextlib.suppress(TimeoutError):
                await super().__call__(scope, receive, send_in_time)
        finally:
            await self.answer.close()


async def unless_gone(request: Request, work: Awaitable[Any]) -> Any | None:
    """The result of `work`; None, and the work cancelled, if the client goes away before."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(gone(request))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        return await task if task.done() else None
    finally:
        for each in (task, watch):
            each.cancel()
        await asyncio.wait({task, watch})


async def gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
