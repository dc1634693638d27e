"""A tokenizer behind HTTP: text to token ids and back, counts, chat templates, batches.

    python chapter9-production-llm-serving-stack/code/tokenizer_service.py --port 8101 &
    curl --silent --fail --retry 60 --retry-connrefused --retry-delay 1 http://127.0.0.1:8101/health
    curl --silent http://127.0.0.1:8101/v1/tokenize --json '{"text": "When a rank waits for the others,"}'
    curl --silent http://127.0.0.1:8101/v1/tokenize --json '{"messages": [{"role": "user", "content": "What is a rank?"}]}'
    curl --silent http://127.0.0.1:8101/v1/detokenize --json '{"ids": [2, 202, 320]}'
    curl --silent http://127.0.0.1:8101/v1/detokenize --json '{"ids": [99999]}'
    kill %1

Look at the last two lines: an id that does not exist gets an error in OpenAI's shape, where the
library would drop it in silence. Section 9.1.
"""

import argparse
import asyncio
import functools
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NoReturn

import ch09_tracing
from fastapi import FastAPI
from http_service import ApiError, Service, error_body, serve, service_app, stop
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from prometheus_client import Counter, Histogram
from pydantic import BaseModel, ConfigDict, Field
from tokenizers import Tokenizer

__all__ = ["ApiError", "Service", "TextCodec", "error_body", "serve", "service_app"]

BOOK_MODEL = Path("chapter8-distributed-ai-training-in-action/checkpoint")


class TextCodec:
    """A model's tokenizer and its chat template, without transformers: 20 MB in place of 340."""

    def __init__(self, folder: Path):
        try:
            self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        except Exception as error:  # the library has no exception of its own
            stop(f"no tokenizer in {folder} ({error}): type --model FOLDER")
        self.size = self.tokenizer.get_vocab_size()
        file = folder / "chat_template.jinja"  # where newer models have it
        source = file.read_text(encoding="utf-8") if file.exists() else config.get("chat_template")
        self.template = chat_environment().from_string(source) if source else None
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        self.special = {n: token_text(config[n]) for n in names if config.get(n)}

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        try:
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError:  # JSON's "\ud83d" is a str in Python, and no text
            raise ApiError(400, "not Unicode: it has half of a surrogate pair", "text") from None

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """The ids of a conversation, up to where the assistant is to answer."""
        if self.template is None:  # a base model: the contents, a line each
            return self.encode("\n".join(message["content"] for message in messages) + "\n")
        values = {"messages": messages, "add_generation_prompt": True} | self.special
        try:
            return self.encode(self.template.render(**values))
        except TemplateError as error:  # raise_exception("roles must alternate"), for one
            raise ApiError(400, f"the chat template refuses this: {error}", "messages") from None

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        unknown = [i for i in ids if not 0 <= i < self.size]
        if unknown:  # Tokenizer.decode leaves them out without a word
            raise ApiError(
                400, f"the vocabulary ends at {self.size - 1}: no id {unknown[0]}", "ids"
            )
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)


def chat_environment() -> ImmutableSandboxedEnvironment:
    """What templates of Hugging Face models expect. A template is code that came with the weights."""

    def refuse(message: str) -> NoReturn:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def token_text(token: str | dict[str, str]) -> str:
    return token if isinstance(token, str) else token["content"]


class ChatMessage(BaseModel):
    role: Literal["system", "user", "assistant"]
    content: str


class TokenizeRequest(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    text: str | list[str] | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1)
    add_special_tokens: bool = False


class DetokenizeRequest(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    ids: list[int]
    skip_special_tokens: bool = False


def tokenizer_app(codec: TextCodec, max_bytes: int, max_texts: int, threads: int) -> FastAPI:
    service = Service("tokenizer")
    app = service_app(service, max_bytes)
    tokens = Counter("book_tokenizer_tokens", "ids made or read", registry=service.registry)
    seconds = Histogram(
        "book_tokenizer_seconds",
        "time in the tokenizer, and waiting for a thread",
        buckets=(0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1),
        registry=service.registry,
    )
    workers = ThreadPoolExecutor(threads, "tokenizer")
    service.finish = functools.partial(workers.shutdown, cancel_futures=True)

    async def off_the_loop(work: Callable[..., Any], *args: Any) -> Any:
        """In a thread: the library works without Python's lock, and /health goes on answering."""
        with seconds.time():
            return await asyncio.get_running_loop().run_in_executor(workers, work, *args)

    def encode_all(texts: list[str], special: bool) -> list[list[int]]:
        return [codec.encode(text, special) for text in texts]

    @app.post("/v1/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        """`text` a string: ids and their count. A list: a list of each, in order."""
        if (body.text is None) == (body.messages is None):
            raise ApiError(400, "give either text or messages", "text")
        if body.messages is not None:
            messages = [message.model_dump() for message in body.messages]
            batch = [await off_the_loop(codec.encode_chat, messages)]
        else:
            texts = [body.text] if isinstance(body.text, str) else body.text
            if len(texts) > max_texts:
                raise ApiError(413, f"{len(texts)} texts, at most {max_texts}", "text")
            batch = await off_the_loop(encode_all, texts, body.add_special_tokens)
        counts = [len(ids) for ids in batch]
        tokens.inc(sum(counts))
        if isinstance(body.text, list):
            return {"ids": batch, "count": counts}
        return {"ids": batch[0], "count": counts[0]}

    @app.post("/v1/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, str]:
        tokens.inc(len(body.ids))
        return {"text": await off_the_loop(codec.decode, body.ids, body.skip_special_tokens)}

    ch09_tracing.instrument(app, "tokenizer")
    return app


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=BOOK_MODEL, help="folder with tokenizer.json")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8101, help="0: a free one")
    parser.add_argument("--max-bytes", type=int, default=1 << 20, help="largest body, in bytes")
    parser.add_argument("--max-texts", type=int, default=256, help="texts in a batch")
    parser.add_argument("--threads", type=int, default=2, help="texts encoded at the same time")
    parser.add_argument("--drain", type=float, default=10, help="seconds to finish after SIGTERM")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    codec = TextCodec(args.model)
    app = tokenizer_app(codec, args.max_bytes, args.max_texts, args.threads)
    serve(app, args.host, args.port, args.drain)


if __name__ == "__main__":
    main()
