"""A scheduler for continuous batching, and the static batch beside it on the same requests.

    python chapter6-distributed-inference-fundamentals-and-vllm/code/continuous_batch_scheduler.py --plot chapter6-distributed-inference-fundamentals-and-vllm/figures/timeline.svg

On GPUs:
    python chapter6-distributed-inference-fundamentals-and-vllm/code/continuous_batch_scheduler.py --device cuda --slots 32 --requests 192 --mean-tokens 48 --token-budget 1024

Look at the speed-up over the spread of the output lengths: predicted, counted in steps, and measured
with the book's model. Then at the last claims: whatever runs beside a request, its tokens stay.
`Scheduler` is complete: give it your own `run_inference`. Section 6.2.
"""

import argparse
import math
import os
import queue
import random
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, PreTrainedModel

BOOK_MODEL = Path("chapter8-distributed-ai-training-in-action/checkpoint")


@dataclass(eq=False)
class Request:
    """A prompt, and what has become of it. The scheduler alone writes below the line."""

    prompt: list[int]
    max_tokens: int
    user: str = ""  # users take turns
    arrival: int = 0  # step in which a trace sends it
    # -----
    output: list[int] = field(default_factory=list)
    slot: int = -1  # where run_inference keeps its KV cache, while it runs
    finish_reason: str = ""  # "stop", "length", "abort" or "error"; empty until it has ended
    ended: threading.Event = field(default_factory=threading.Event)


RunInference = Callable[[list[Request]], list[int | None]]


class Scheduler:
    """Decides which requests run in each step (Orca, OSDI 2022, section 3.1: iteration-level).

    `run_inference(batch)` is yours. It gets the requests that run, each with a `slot` of its own
    from 0 to slots - 1, and returns for each the next token, or None where the model has ended the
    text. A request whose `output` is empty is new in its slot: run its prompt. The others need one
    decode step on the last token of their output. It is never called twice at the same time.

    Requests are admitted in turns over users, within a user in order. No one is overtaken: the one
    whose turn it is waits until a slot is free and its prompt fits in the step's token budget, and
    nobody starts before it. So every accepted request starts, however long its prompt.

    `continuous=False` is the static batch, to compare with: it admits only when all have ended.
    """

    def __init__(
        self,
        run_inference: RunInference,
        slots: int,  # requests that run at the same time
        token_budget: int,  # of one step: prompt tokens, and one for each request in decode
        max_model_len: int,  # prompt and output of one request
        max_queue: int,  # requests that wait
        continuous: bool = True,
    ):
        self.run_inference = run_inference
        self.free = list(range(slots))[::-1]  # the lowest is taken first: the batch stays compact
        self.token_budget = token_budget
        self.max_model_len = max_model_len
        self.max_queue = max_queue
        self.continuous = continuous
        self.waiting: dict[str, deque[Request]] = {}  # by user; the first one's turn is next
        self.running: list[Request] = []
        self.steps = 0
        self.stopping = False
        self.changed = threading.Condition()  # guards all of the above

    def add_request(self, request: Request) -> None:
        """Queue it, or raise ValueError (it can never run), queue.Full, or RuntimeError (stopping)."""
        need = len(request.prompt) + request.max_tokens
        if not request.prompt or request.max_tokens < 1:
            raise ValueError("a request needs a prompt, and max_tokens of 1 or more")
        if need > self.max_model_len:
            raise ValueError(f"prompt and max_tokens are {need}, above {self.max_model_len}")
        if len(request.prompt) > self.token_budget:
            raise ValueError(f"a prompt of {len(request.prompt)}, above {self.token_budget} a step")
        with self.changed:
            if self.stopping:
                raise RuntimeError("the scheduler is stopping")
            if sum(map(len, self.waiting.values())) >= self.max_queue:
                raise queue.Full
            self.waiting.setdefault(request.user, deque()).append(request)
            self.changed.notify()

    def abort_request(self, request: Request) -> None:
        """End it where it is. A running one frees its slot before the next step."""
        with self.changed:
            if request in (line := self.waiting.get(request.user, deque())):
                line.remove(request)
                if not line:
                    del self.waiting[request.user]
            self._end(request, "abort")

    def step(self) -> list[Request]:
        """Admit, run the model once, note the tokens; the requests that ran."""
        with self.changed:
            self._release()
            self._admit()
            batch = [request for request in self.running if not request.finish_reason]
        if not batch:
            return []
        tokens = self.run_inference(batch)  # unlocked: others may add and abort meanwhile
        with self.changed:
            for request, token in zip(batch, tokens, strict=True):
                self._note(request, token)
            self.steps += 1
            self._release()
        return batch

    def serve(self) -> None:
        """Run steps until stop() is called; a thread's work. An error ends every request with it."""
        try:
            while True:
                with self.changed:
                    while not (self.busy or self.stopping):
                        self.changed.wait()
                    if self.stopping and not self.busy:
                        return
                self.step()
        except BaseException:
            self.stop(drain=False, reason="error")
            raise

    def stop(self, drain: bool = True, reason: str = "abort") -> None:
        """Refuse new requests; with `drain` those accepted go on to their end, else they end here."""
        with self.changed:
            self.stopping = True
            if not drain:
                for request in [
                    *self.running,
                    *(r for line in self.waiting.values() for r in line),
                ]:
                    self._end(request, reason)
                self.waiting.clear()
            self.changed.notify()

    @property
    def busy(self) -> bool:
        return bool(self.waiting) or any(not request.finish_reason for request in self.running)

    def _release(self) -> None:
        """Take the slots of those that have ended; a static batch keeps them until all have."""
        going_on = [request for request in self.running if not request.finish_reason]
        if self.continuous or not going_on:
            self.free += (request.slot for request in self.running if request.finish_reason)
            self.free.sort(reverse=True)
            self.running = going_on

    def _admit(self) -> None:
        if self.running and not self.continuous:
            return
        budget = self.token_budget - len(self.running)  # a token for each that is in decode
        while self.free and self.waiting:
            user, line = next(iter(self.waiting.items()))
            if len(line[0].prompt) > budget:
                return  # it is its turn: none that needs less may go first
            request = line.popleft()
            request.slot = self.free.pop()
            self.running.append(request)
            budget -= len(request.prompt)
            del self.waiting[user]
            if line:
                self.waiting[user] = line  # behind the other users

    def _note(self, request: Request, token: int | None) -> None:
        if request.finish_reason:  # aborted while the step ran
            return
        if token is None:
            return self._end(request, "stop")
        request.output.append(token)
        if len(request.output) == request.max_tokens:
            self._end(request, "length")

    def _end(self, request: Request, reason: str) -> None:
        if not request.finish_reason:
            request.finish_reason = reason
            request.ended.set()


class SlotCache(Cache):
    """Keys and values of every slot: [slots, kv_heads, context, head_dim] for each layer."""

    def __init__(self, model: PreTrainedModel, slots: int, context: int):
        c = model.config
        heads = getattr(c, "num_key_value_heads", c.num_attention_heads)
        head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        shape = (2, c.num_hidden_layers, slots, heads, context, head_dim)
        self.stored = torch.zeros(shape, dtype=model.dtype, device=model.device)
        self.layers = []
        self.rows = self.positions = torch.tensor([0])

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args, **kwargs):
        """Store [rows, kv_heads, new, head_dim]; return what attention is to see."""
        new = keys.shape[2]
        for stored, fresh in zip(self.stored[:, layer_idx], (keys, values), strict=True):
            if new > 1:  # a prompt: from the start of its slot
                stored[self.rows, :, :new] = fresh
            else:
                stored[self.rows, :, self.positions] = fresh[:, :, 0]
        if new > 1:
            return keys, values  # a prompt sees itself alone
        longest = int(self.positions.max()) + 1
        return tuple(self.stored[:, layer_idx, : len(self.rows), :, :longest])

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


class TransformersRunner:
    """`run_inference` for a decoder of transformers, greedy: decode all slots, then new prompts."""

    def __init__(self, model: PreTrainedModel, slots: int, context: int, ends: int | None = None):
        self.model = model
        self.cache = SlotCache(model, slots, context)
        self.ends = ends  # token at which a text ends; None: never
        self.forwards = 0

    @torch.inference_mode()
    def __call__(self, batch: list[Request]) -> list[int | None]:
        tokens: dict[int, int] = {}
        if decoding := [request for request in batch if request.output]:
            tokens |= self.decode(decoding)
        if prompts := [request for request in batch if not request.output]:
            tokens |= self.prefill(prompts)  # after decode, which writes to all rows
        return [None if (t := tokens[r.slot]) == self.ends else t for r in batch]

    def decode(self, batch: list[Request]) -> dict[int, int]:
        """One token each. Rows up to the highest slot run; those without a request are ignored."""
        rows = max(request.slot for request in batch) + 1
        last, position = [0] * rows, [0] * rows
        for request in batch:
            last[request.slot] = request.output[-1]
            position[request.slot] = len(request.prompt) + len(request.output) - 1
        positions = self.tensor(position)
        self.cache.rows = torch.arange(rows, device=positions.device)
        self.cache.positions = positions
        seen = torch.arange(max(position) + 1, device=positions.device) <= positions[:, None]
        logits = self.forward(self.tensor(last)[:, None], positions[:, None], seen[:, None, None])
        best = logits[:, 0].argmax(-1).tolist()
        return {request.slot: best[request.slot] for request in batch}

    def prefill(self, batch: list[Request]) -> dict[int, int]:
        """All new prompts in one forward, padded on the right to the longest."""
        longest = max(2, *(len(request.prompt) for request in batch))
        padded = self.tensor([r.prompt + [0] * (longest - len(r.prompt)) for r in batch])
        positions = torch.arange(longest, device=padded.device)
        self.cache.rows = self.tensor([request.slot for request in batch])
        seen = (positions <= positions[:, None]).expand(len(batch), 1, -1, -1)
        last = self.tensor([len(request.prompt) - 1 for request in batch])
        logits = self.forward(padded, positions[None].expand_as(padded), seen, last)
        best = logits.argmax(-1).tolist()
        return {request.slot: token for request, token in zip(batch, best, strict=True)}

    def forward(self, tokens, positions, seen, last=None) -> torch.Tensor:
        """Logits: [rows, new, vocabulary], or with `last` of one position in each row."""
        self.forwards += 1
        hidden = self.model.base_model(
            tokens,
            position_ids=positions,
            attention_mask=seen,  # [rows, 1, new, seen]: True where attention may look
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state
        if last is not None:
            hidden = hidden[torch.arange(len(last), device=hidden.device), last]
        return self.model.get_output_embeddings()(hidden)

    def tensor(self, values: list) -> torch.Tensor:
        return torch.tensor(values, device=self.model.device)


class Replay:
    """A trace under one policy, step by step. The clock counts steps, idle ones too."""

    def __init__(
        self,
        trace: list[Request],
        run_inference: RunInference,
        args: argparse.Namespace,
        context: int,
        continuous: bool,
    ):
        self.requests = [Request(r.prompt, r.max_tokens, r.user, r.arrival) for r in trace]
        self.scheduler = Scheduler(
            run_inference, args.slots, args.token_budget, context, len(trace), continuous
        )
        self.ahead = deque(self.requests)
        self.begin: dict[Request, int] = {}  # clock of each request's first token, and of its last
        self.end: dict[Request, int] = {}
        self.clock = 0
        self.seconds = 0.0
        self.largest_step = 0  # tokens

    def advance(self) -> bool:
        """One step; False when there is nothing left to do."""
        if not (self.ahead or self.scheduler.busy):
            return False
        while self.ahead and self.ahead[0].arrival <= self.clock:
            self.scheduler.add_request(self.ahead.popleft())
        start = time.perf_counter()
        batch = self.scheduler.step()
        self.seconds += time.perf_counter() - start
        tokens = sum(1 if request in self.begin else len(request.prompt) for request in batch)
        self.largest_step = max(self.largest_step, tokens)
        for request in batch:
            self.begin.setdefault(request, self.clock)
            self.end[request] = self.clock
        self.clock += 1
        return True

    def finish(self) -> "Replay":
        while self.advance():
            pass
        return self

    @property
    def steps(self) -> int:
        """Calls of the model."""
        return self.scheduler.steps

    def latencies(self) -> list[int]:
        """Steps from each request's arrival to its last token, in order of size."""
        return sorted(end + 1 - request.arrival for request, end in self.end.items())


def no_model(batch: list[Request]) -> list[int | None]:
    """`run_inference` of a model that takes no time, to count steps."""
    return [0] * len(batch)


def lengths(count: int, mean: int, spread: int, rng: random.Random) -> list[int]:
    return [rng.randint(mean - spread, mean + spread) for _ in range(count)]


def predicted_speed_up(variation: float, slots: int) -> float:
    """Steps of static batches over those of continuous ones, while requests always wait.

    A static batch runs as long as its longest request. Of n uniform lengths that is on average
    sqrt(3) (n - 1) / (n + 1) deviations above the mean; `variation` is the deviation over the mean.
    """
    return 1 + variation * math.sqrt(3) * (slots - 1) / (slots + 1)


def sweep(args: argparse.Namespace) -> tuple[list[tuple[float, float, float]], list[bool | None]]:
    """Spread of the lengths, speed-up predicted and counted, without a model."""
    rng = random.Random(args.seed)
    mean = 32
    points = []
    off_longest = above_graham = -math.inf
    say("output lengths   variation   static steps   continuous   counted   predicted")
    for spread in (0, 8, 16, 24, 31):
        wanted = lengths(125 * args.slots, mean, spread, rng)
        trace = [Request([0], length) for length in wanted]
        static, continuous = (Replay(trace, no_model, args, 64, c).finish() for c in (False, True))
        batches = [wanted[i : i + args.slots] for i in range(0, len(wanted), args.slots)]
        off_longest = max(off_longest, abs(static.steps - sum(map(max, batches))))
        graham = sum(wanted) / args.slots + (1 - 1 / args.slots) * max(wanted)
        above_graham = max(above_graham, continuous.steps - graham)
        variation = statistics.pstdev(wanted) / mean
        predicted = predicted_speed_up(variation, args.slots)
        counted = static.steps / continuous.steps
        points.append((variation, predicted, counted))
        say(
            f"{mean - spread:4} to {mean + spread:3} {variation:14.2f} {static.steps:14,}"
            f" {continuous.steps:12,} {counted:9.2f} {predicted:11.2f}"
        )
    off = max(abs(predicted / counted - 1) for _, predicted, counted in points)
    return points, [
        check("static steps, off the sum of each batch's longest", off_longest, 0),
        check("continuous steps above Graham's bound", above_graham, 0),
        check("speed-up at equal lengths, off 1", abs(points[0][2] - 1), 0),
        check("speed-up predicted from the variance, off what is counted", off, 0.05),
    ]


def arrivals(args: argparse.Namespace) -> list[bool | None]:
    """Latency in steps when requests come at random, by share of what the slots can take."""
    rng = random.Random(args.seed)
    worst = 0.0
    say("load    steps to the last token, static p50   p95   continuous p50   p95")
    for load in (0.3, 0.5, 0.8):
        trace = []
        now = 0.0
        for length in lengths(125 * args.slots, 32, 31, rng):
            now += rng.expovariate(load * args.slots / 32)
            trace.append(Request([0], length, arrival=int(now)))
        both = [Replay(trace, no_model, args, 64, c).finish().latencies() for c in (False, True)]
        (s50, s95), (c50, c95) = ([t[len(t) // 2], t[len(t) * 95 // 100]] for t in both)
        say(f"{load:4.0%} {s50:38,} {s95:5,} {c50:16,} {c95:5,}")
        worst = max(worst, c95 / s95)
    return [check("p95 of continuous batching, over that of static", worst, 1)]


def turns(args: argparse.Namespace) -> list[bool | None]:
    """One user sends a hundred requests; another, a little later, sends one."""
    waited = []
    for other in ("first", "second"):
        flood = [Request([0], 32, "first") for _ in range(100)]
        late = Request([0], 32, other, arrival=40)
        replay = Replay([*flood, late], no_model, args, 64, True).finish()
        waited.append(replay.begin[replay.requests[-1]] - late.arrival)
    say(f"behind 100 requests of another user: {waited[0]} steps in one line, {waited[1]} in turns")
    return [check("steps that a lone request waits when users take turns", waited[1], 2 * 32)]


def measure(
    model: PreTrainedModel, text: list[int], args: argparse.Namespace
) -> tuple[list[Replay], list[bool | None]]:
    """Both policies with the model, a step of each in turn; their tokens against generate()'s."""
    rng = random.Random(args.seed)
    replays: list[Replay] = []
    forwards: list[int] = []
    wrong = 0
    say("output lengths   policy        steps   forwards   seconds   tokens/s")
    for spread in (args.mean_tokens - 1, 0):
        wanted = lengths(args.requests, args.mean_tokens, spread, rng)
        trace = [Request(excerpt(text, rng), length) for length in wanted]
        name = f"{args.mean_tokens - spread:4} to {args.mean_tokens + spread:3}     "
        if spread:
            start = time.perf_counter()
            reference = [one_by_one(model, request) for request in trace]
            seconds = time.perf_counter() - start
            report(name + "one by one", sum(wanted), sum(wanted), seconds, sum(wanted))
        runners = [TransformersRunner(model, args.slots, args.max_model_len) for _ in range(2)]
        both = [
            Replay(trace, runner, args, args.max_model_len, continuous)
            for runner, continuous in zip(runners, (False, True), strict=True)
        ]
        while sum(replay.advance() for replay in both):
            pass
        for replay, runner in zip(both, runners, strict=True):
            policy = "continuous" if replay.scheduler.continuous else "static    "
            report(name + policy, replay.steps, runner.forwards, replay.seconds, sum(wanted))
            outputs = [request.output for request in replay.requests]
            reference = reference if spread else outputs
            wrong += sum(
                texts_differ(model, request.prompt, ours, theirs)
                for request, ours, theirs in zip(trace, outputs, reference, strict=True)
            )
        replays += both
        forwards += [runner.forwards for runner in runners]
    static, continuous, equal_static, equal_continuous = replays
    counted = static.steps / continuous.steps
    in_forwards = forwards[0] / forwards[1]
    measured = static.seconds / continuous.seconds
    equal = equal_static.seconds / equal_continuous.seconds
    largest = max(replay.largest_step for replay in replays)
    say(
        f"speed-up      {counted:.2f} in steps, {in_forwards:.2f} in forwards, {measured:.2f} in seconds"
    )
    return replays, [
        check("requests whose tokens depend on what ran beside them", wrong, 0),
        check("tokens in the largest step", largest, args.token_budget),
        check(
            "steps of static batches at equal lengths", equal_static.steps, equal_continuous.steps
        ),
        expect(
            "speed-up in seconds, over that in forwards",
            measured / in_forwards,
            0.85,
            args.strict,
            True,
        ),
        expect("speed-up in seconds at equal lengths", equal, 1.1, args.strict),
    ]


def report(name: str, steps: int, forwards: int, seconds: float, tokens: int) -> None:
    say(f"{name} {steps:8,} {forwards:10,} {seconds:9.2f} {tokens / seconds:10,.0f}")


def one_by_one(model: PreTrainedModel, request: Request) -> list[int]:
    """The greedy tokens of transformers' own generate(), with nothing beside the request."""
    prompt = torch.tensor([request.prompt], device=model.device)
    tokens = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=request.max_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    return tokens[0, prompt.shape[1] :].tolist()


def texts_differ(model: Any, prompt: list[int], found: list[int], expected: list[int]) -> bool:
    """Whether two greedy texts part, other than where two tokens are equally likely to 1e-4.

    There the last bit of a logit decides, and it depends on the order of additions.
    """
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        if a != b:
            text = [*prompt, *expected[:i]]
            logits = model(model.get_input_embeddings().weight.new_tensor([text]).long()).logits
            return bool((logits[0, -1, a] - logits[0, -1, b]).abs() > 1e-4)
    return False


def excerpt(text: list[int], rng: random.Random) -> list[int]:
    """8 to 24 tokens from somewhere in the text, for a prompt."""
    start = rng.randrange(len(text) - 24)
    return text[start : start + rng.randint(8, 24)]


def live(model: PreTrainedModel, text: list[int], args: argparse.Namespace) -> list[bool | None]:
    """A thread serves; this one sends more than the queue holds, aborts some, and stops it."""
    rng = random.Random(args.seed)
    runner = TransformersRunner(model, args.slots, args.max_model_len)
    scheduler = Scheduler(
        runner, args.slots, args.token_budget, args.max_model_len, max_queue=args.slots
    )
    server = threading.Thread(target=scheduler.serve)
    server.start()
    accepted: list[Request] = []
    refused = 0
    for number in range(4 * args.slots):
        request = Request(excerpt(text, rng), args.mean_tokens, user=f"user {number % 3}")
        try:
            scheduler.add_request(request)
            accepted.append(request)
        except queue.Full:
            refused += 1
    for request in accepted[::4]:
        scheduler.abort_request(request)
    scheduler.stop()
    server.join()
    whole = [r for r in accepted if r.finish_reason == "length" and len(r.output) == r.max_tokens]
    aborted = [r for r in accepted if r.finish_reason == "abort"]
    say(f"live          {len(whole)} to the end, {len(aborted)} aborted, {refused} refused")
    lost = len(accepted) - len(whole) - len(aborted)
    return [
        check("accepted requests neither whole nor aborted after the stop", lost, 0),
        check("slots still taken", args.slots - len(scheduler.free), 0),
    ]


def run(args: argparse.Namespace, device: torch.device) -> list[bool | None]:
    if device.type == "cpu":
        torch.set_num_threads(1)  # the matrices are small: two threads would wait for each other
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    model = model.eval().to(device)
    model.generation_config.eos_token_id = None  # here the trace says how long a text is
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    text = tokenizer(args.data.read_text(encoding="utf-8"), verbose=False).input_ids

    points, claims = sweep(args)
    claims += arrivals(args)
    claims += turns(args)
    replays, measured = measure(model, text, args)
    claims += measured
    claims += live(model, text, args)
    if args.plot:
        draw(points, replays[:2], args)
    return claims


def draw(
    points: list[tuple[float, float, float]], uneven: list[Replay], args: argparse.Namespace
) -> None:
    """Who had which slot in which step, under both policies; and the speed-up over the variation."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "ch06"
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panes = figure.subplot_mosaic(
        [["static", "speed"], ["continuous", "speed"]], width_ratios=[2, 1]
    )
    for name, found in zip(("static", "continuous"), uneven, strict=True):
        axes = panes[name]
        for number, request in enumerate(found.requests):
            begin = found.begin[request]
            axes.barh(
                request.slot, found.end[request] + 1 - begin, 0.9, begin, color=f"C{number % 10}"
            )
        axes.set(xlim=(0, uneven[0].steps), ylabel="slot", title=f"{name}: {found.steps} steps")
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.invert_yaxis()
    panes["continuous"].set_xlabel("step; white is a slot without work")
    axes = panes["speed"]
    axes.plot([p[0] for p in points], [p[1] for p in points], label="predicted")
    axes.plot([p[0] for p in points], [p[2] for p in points], "o", label="counted")
    axes.set(xlabel="deviation of lengths / mean", ylabel="static steps / continuous steps")
    axes.legend()
    figure.savefig(args.plot, format="svg", metadata={"Date": None})


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, default=BOOK_MODEL, help="folder of a decoder for transformers")
    add("--data", type=Path, default="resources/corpus.txt", help="text to take prompts from")
    add("--requests", type=int, default=40, help="of the measured traces")
    add("--mean-tokens", type=int, default=24, help="mean length of their outputs")
    add("--slots", type=int, default=8, help="requests that run at the same time")
    add("--token-budget", type=int, default=256, help="tokens of one step, prompts and decode")
    add("--max-model-len", type=int, default=256, help="tokens of one slot's KV cache")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--seed", type=int, default=0, help="of lengths, prompts and arrivals")
    add("--strict", action="store_true", help="exit 1 if an `expect:` line does not hold")
    add("--plot", type=Path, help="draw the timelines and the speed-up to this SVG")
    args = parser.parse_args()
    if not (args.model / "config.json").is_file():
        stop(f"no model in {args.model}: give the folder of one with --model DIR")
    if not args.data.is_file():
        stop(f"cannot read {args.data}: give a text file with --data FILE")
    if args.token_budget < args.slots + 24:
        stop(f"--token-budget {args.token_budget}: a prompt of 24 and {args.slots} slots need more")
    if 24 + 2 * args.mean_tokens > args.max_model_len:
        stop(
            f"--mean-tokens {args.mean_tokens}: up to twice that and a prompt of 24 are above --max-model-len {args.max_model_len}"
        )
    return args


def main() -> None:
    args = parse_args()
    sys.exit(conclude(run(args, pick_device(args.device))))


# --- copied from other scripts; `make copies` keeps it equal to them ------------------------------


# Copied from ch01_single_gpu_baseline.pick_device
def pick_device(wanted: str) -> torch.device:
    """The accelerator if there is one, unless told otherwise."""
    found = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if wanted not in ("auto", "cpu", found.type):
        stop(f"--device {wanted}: this machine has {found.type}; type --device {found.type}")
    return torch.device("cpu") if wanted == "cpu" else found


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


# Copied from ch01_single_gpu_baseline.expect
def expect(
    claim: str, value: float, bound: float, strict: bool, at_least: bool = False
) -> bool | None:
    """Print whether a value that depends on the machine keeps its bound; judge it if `strict`."""
    held = bool(value >= bound if at_least else value <= bound)
    verdict = "ok" if held else "not here"
    say(f"expect: {claim} = {value:.3g} {'>=' if at_least else '<='} {bound:.3g}  {verdict}")
    return held if strict else None


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
