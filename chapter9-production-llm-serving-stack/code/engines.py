"""Two engines with one face, ids in and ids out, and the way from ids to text.

`TransformersEngine` is 100 lines that run anywhere; `VllmEngine` is vLLM in a process of its own.
model_runner.py puts an API in front of either. Section 9.2.
"""

import asyncio
import contextlib
import json
import queue
import threading
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from http_service import stop
from tokenizer_service import TextCodec


@dataclass
class Sampling:
    max_tokens: int
    temperature: float
    top_p: float
    seed: int | None
    ignore_eos: bool


# --- tokens to text --------------------------------------------------------------------------------


class Detokenizer:
    """Text as tokens come, and never half of a character.

    A token of a byte-level vocabulary may end inside one. Decoded alone it is U+FFFD, so text that
    ends in U+FFFD waits for the next token. Only the tokens since the last piece are decoded again.
    """

    def __init__(self, codec: TextCodec, stops: list[str]):
        self.codec = codec
        self.stops = [stop for stop in stops if stop]
        self.ids: list[int] = []
        self.start = 0  # of the window that is decoded
        self.said = 0  # tokens whose text is out
        self.held = ""  # text that could be the beginning of a stop string
        self.stopped = False

    def add(self, token: int) -> str:
        self.ids.append(token)
        text = self.decode(len(self.ids))
        if text.endswith("\ufffd"):
            return ""
        return self.until_stop(self.advance(text))

    def rest(self) -> str:
        """What waits when there are no more tokens."""
        text = self.until_stop(self.advance(self.decode(len(self.ids))))
        held = "" if self.stopped else self.held
        self.held = ""
        return text + held

    def decode(self, end: int) -> str:
        return self.codec.decode(self.ids[self.start : end], skip_special_tokens=True)

    def advance(self, text: str) -> str:
        new = text[len(self.decode(self.said)) :]
        self.start, self.said = self.said, len(self.ids)
        return new

    def until_stop(self, new: str) -> str:
        """The text up to the first stop string; its possible beginning is held back."""
        text = self.held + new
        found = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return text[: min(found)]
        keep = max((beginning_of(text, stop) for stop in self.stops), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]


def beginning_of(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


# --- engines ---------------------------------------------------------------------------------------


class Engine(Protocol):
    context: int  # tokens of prompt and answer together

    def load(self) -> None:
        """Blocks, in a thread of its own, until weights are in memory."""

    def tokens(self, prompt: list[int], sampling: Sampling) -> AsyncIterator[tuple[list[int], str]]:
        """New ids and "", or at the end "stop" or "length". Closing it ends the work."""

    def alive(self) -> bool: ...

    def shut_down(self) -> None: ...


@dataclass
class Turn:
    """A request inside the transformers engine."""

    prompt: list[int]
    sampling: Sampling
    loop: asyncio.AbstractEventLoop
    out: asyncio.Queue[tuple[list[int], str] | Exception] = field(default_factory=asyncio.Queue)
    cancelled: bool = False
    cache: Any = None
    random: Any = None
    made: int = 0
    last: int = 0

    def put(self, item: tuple[list[int], str] | Exception) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended: nobody listens
            self.loop.call_soon_threadsafe(self.out.put_nowait, item)


class TransformersEngine:
    """One thread that gives each running request a token in turn, with a KV cache for each.

    Requests advance together but do not share a matrix product: chapter 6 has the batch.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.context = settings_of(folder)["max_position_embeddings"]
        self.ends = ends_of(folder)
        self.inbox: queue.SimpleQueue[Turn | None] = queue.SimpleQueue()
        self.worker = threading.Thread(target=self.work, name="decode", daemon=True)

    def load(self) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
        if device == "cpu":
            torch.set_num_threads(1)  # small matrices: threads would wait for each other
        model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
        self.model = model.to(device).eval()
        self.worker.start()

    async def tokens(
        self, prompt: list[int], sampling: Sampling
    ) -> AsyncIterator[tuple[list[int], str]]:
        turn = Turn(prompt, sampling, asyncio.get_running_loop())
        self.inbox.put(turn)
        try:
            while True:
                item = await turn.out.get()
                if isinstance(item, Exception):
                    raise item
                yield item
                if item[1]:
                    return
        finally:
            turn.cancelled = True  # the worker drops it before its next token

    def work(self) -> None:
        running: list[Turn] = []
        while True:
            while not running or not self.inbox.empty():
                new = self.inbox.get()
                if new is None:
                    return
                running.append(new)
            for turn in list(running):
                try:
                    ended = turn.cancelled or self.step(turn)
                except Exception as error:  # this request's end, not the others'
                    turn.put(error)
                    ended = True
                if ended:
                    running.remove(turn)

    def step(self, turn: Turn) -> bool:
        """One more token; True if it is the last. The first step runs the whole prompt."""
        import torch
        from transformers import DynamicCache

        with torch.inference_mode():
            if turn.cache is None:
                turn.cache = DynamicCache(config=self.model.config)
                turn.random = torch.Generator("cpu")
                if turn.sampling.seed is not None:
                    turn.random.manual_seed(turn.sampling.seed % 2**63)
                else:
                    turn.random.seed()
            new = turn.prompt if turn.made == 0 else [turn.last]
            ids = torch.tensor([new], device=self.model.device)
            output = self.model(ids, past_key_values=turn.cache, use_cache=True, logits_to_keep=1)
            turn.last = pick(output.logits[0, -1].float().cpu(), turn.sampling, turn.random)
        turn.made += 1
        reason = "length" if turn.made == turn.sampling.max_tokens else ""
        if turn.last in self.ends and not turn.sampling.ignore_eos:
            reason = "stop"
        turn.put(([turn.last], reason))
        return bool(reason)

    def alive(self) -> bool:
        return self.worker.is_alive()

    def shut_down(self) -> None:
        self.inbox.put(None)
        if self.worker.is_alive():  # a thread inside torch when Python ends aborts the process
            self.worker.join(5)


def pick(logits: Any, sampling: Sampling, random: Any) -> int:
    """The most likely token, or one drawn from the smallest set that has a share of top_p."""
    import torch

    if sampling.temperature == 0:
        return int(logits.argmax())
    shares, order = (logits / sampling.temperature).softmax(-1).sort(descending=True)
    before = shares.cumsum(-1) - shares  # of all that are likelier
    shares[before >= sampling.top_p] = 0  # the first one stays: nothing is before it
    return int(order[torch.multinomial(shares, 1, generator=random)])


class VllmEngine:
    """vLLM's AsyncLLM, which batches, pages and schedules in a process of its own (chapter 6)."""

    def __init__(
        self, folder: Path, max_requests: int, drain_s: float, gpu_share: float | None = None
    ):
        self.folder = folder
        self.gpu_share = gpu_share
        self.max_requests = max_requests
        self.drain_s = drain_s
        self.context = settings_of(folder)["max_position_embeddings"]
        self.ends = ends_of(folder)

    def load(self) -> None:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        settings: dict[str, Any] = {}
        if not Path("/dev/nvidiactl").exists():
            settings = {"dtype": "float32", "enforce_eager": True}
            settings |= {"kv_cache_memory_bytes": 64 << 20, "distributed_executor_backend": "uni"}
        elif self.gpu_share is not None:
            settings = {"gpu_memory_utilization": self.gpu_share}
        args = AsyncEngineArgs(
            model=str(self.folder),
            max_num_seqs=self.max_requests,
            skip_tokenizer_init=True,  # ids in, ids out; it then knows of no end token
            shutdown_timeout=int(self.drain_s),  # `kill %1` and Ctrl+C reach its process too
            disable_log_stats=True,
            **settings,
        )
        self.engine = AsyncLLM.from_engine_args(args)

    async def tokens(
        self, prompt: list[int], sampling: Sampling
    ) -> AsyncIterator[tuple[list[int], str]]:
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=None if sampling.seed is None else sampling.seed % 2**63,
            stop_token_ids=[] if sampling.ignore_eos else sorted(self.ends),
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        number = uuid.uuid4().hex
        outputs = self.engine.generate(tokens_input(prompt), params, number)
        async with contextlib.aclosing(outputs):  # closing it aborts the request in the engine
            async for output in outputs:
                part = output.outputs[0]
                if part.finish_reason == "abort":
                    raise RuntimeError("vLLM has aborted the request")
                yield list(part.token_ids), part.finish_reason or ""

    def alive(self) -> bool:
        return not self.engine.errored

    def shut_down(self) -> None:
        if hasattr(self, "engine"):
            self.engine.shutdown()
            del self.engine  # its __del__ wants modules that are gone at the very end


def settings_of(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        stop(f"no model in {folder} ({error}): type --model FOLDER")


def ends_of(folder: Path) -> set[int]:
    """The ids after which a text is over; generation_config.json may name more than config.json."""
    settings = settings_of(folder)
    more = folder / "generation_config.json"
    if more.exists():
        settings |= json.loads(more.read_text())
    end = settings.get("eos_token_id")
    return set(end if isinstance(end, list) else [end]) - {None}
