"""Whatever is sent to the scheduler, in whatever order, its rules hold; and a broken one is seen."""

import queue
import random
import sys
import threading
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import warm
from book import CHAPTERS
from mutants import failed_claims

CODE = f"{CHAPTERS[5]}/code"
SCRIPT = warm.ROOT / CODE / "continuous_batch_scheduler.py"
Run = Callable[..., warm.Result]
SLOTS, BUDGET, CONTEXT = 5, 40, 64


@pytest.fixture(scope="module")
def code() -> ModuleType:
    return warm.load("continuous_batch_scheduler", SCRIPT)


class Model:
    """A `run_inference` that holds the scheduler to its contract; a text may end by itself."""

    def __init__(self, seed: int):
        self.rng = random.Random(seed)
        self.texts: dict[int, list[int]] = {}  # by slot, as a KV cache has them
        self.order: list[Any] = []  # requests as they start

    def __call__(self, batch: list[Any]) -> list[int | None]:
        slots = [request.slot for request in batch]
        assert len(set(slots)) == len(slots), "two requests in one slot"
        assert set(slots) <= set(range(SLOTS)), "there is no such slot"
        tokens = sum(1 if request.output else len(request.prompt) for request in batch)
        assert tokens <= BUDGET, f"{tokens} tokens in a step"
        answers: list[int | None] = []
        for request in batch:
            assert not request.finish_reason, "it runs after its end"
            if request.output:
                assert self.texts[request.slot] == request.prompt + request.output[:-1]
                self.texts[request.slot].append(request.output[-1])
            else:
                self.texts[request.slot] = list(request.prompt)
                self.order.append(request)
            answers.append(None if self.rng.random() < 0.02 else self.rng.randrange(100))
        return answers


@pytest.mark.parametrize("continuous", [True, False])
def test_rules_hold_over_ten_thousand_random_steps(code: ModuleType, continuous: bool) -> None:
    """Slots, budget and queue are kept, each user's requests start in order, nobody is forgotten."""
    rng = random.Random(0)
    model = Model(1)
    scheduler = code.Scheduler(model, SLOTS, BUDGET, CONTEXT, 12, continuous)
    sent: list[Any] = []
    refused = 0
    for number in range(10_000 if continuous else 3_000):
        for _ in range(rng.choice((0, 0, 1, 2) if number % 500 < 250 else (0, 0, 0, 0, 0, 1))):
            prompt = [number] * rng.choice((1, 3, 10, BUDGET))
            request = code.Request(prompt, rng.randint(1, 20), f"user {rng.randrange(3)}")
            try:
                scheduler.add_request(request)
                sent.append(request)
            except queue.Full:
                refused += 1
        if sent and rng.random() < 0.1:
            scheduler.abort_request(rng.choice(sent[-20:]))
        scheduler.step()
        assert sum(map(len, scheduler.waiting.values())) <= 12
    scheduler.stop()
    while scheduler.busy:
        scheduler.step()
    assert refused > 50
    reasons = {request.finish_reason for request in sent}
    assert reasons == {"stop", "length", "abort"}
    assert all(request.ended.is_set() for request in sent)
    scheduler.step()
    assert sorted(scheduler.free) == list(range(SLOTS))
    assert not scheduler.running
    assert not scheduler.waiting
    for request in sent:
        assert len(request.output) <= request.max_tokens
        assert (len(request.output) == request.max_tokens) == (request.finish_reason == "length")
    position = {request: i for i, request in enumerate(sent)}
    for user in {request.user for request in sent}:
        started = [position[request] for request in model.order if request.user == user]
        assert started == sorted(started), f"{user} was overtaken by a later request of their own"


def test_a_static_batch_takes_nobody_in_while_it_runs(code: ModuleType) -> None:
    """Not even where a slot is free: that is what it is slower for."""
    for continuous, started in ((True, 1), (False, 0)):
        scheduler = code.Scheduler(lambda batch: [7] * len(batch), 5, 40, 64, 9, continuous)
        scheduler.add_request(code.Request([1], 3))
        scheduler.step()
        late = code.Request([1], 3)
        scheduler.add_request(late)
        scheduler.step()
        assert len(late.output) == started


@pytest.mark.parametrize(("gap", "differ"), [(1e-5, False), (1e-3, True)])
def test_texts_may_part_only_at_a_tie(code: ModuleType, gap: float, differ: bool) -> None:
    class Model(torch.nn.Module):
        def get_input_embeddings(self) -> torch.nn.Embedding:
            return torch.nn.Embedding(9, 1)

        def forward(self, tokens: torch.Tensor) -> Any:
            assert tokens.tolist() == [[1, 2, 3]], "the text up to where they part"
            logits = torch.zeros(1, 3, 9)
            logits[0, -1, 4] = 1.0
            logits[0, -1, 5] = 1.0 - gap
            return SimpleNamespace(logits=logits)

    assert code.texts_differ(Model(), [1, 2], [3, 5, 6], [3, 4, 8]) is differ
    assert code.texts_differ(Model(), [1, 2], [3, 4], [3, 4]) is False


def test_a_long_prompt_is_not_starved_by_short_ones(code: ModuleType) -> None:
    """Short prompts fit beside what runs, for ever; the long one needs the whole step."""
    scheduler = code.Scheduler(Model(0), SLOTS, BUDGET, CONTEXT, 1_000)
    for _ in range(20):
        scheduler.add_request(code.Request([1], 9, "many"))
    scheduler.step()
    long = code.Request([1] * BUDGET, 1, "one")
    scheduler.add_request(long)
    steps = 0
    while not long.finish_reason and steps < 40:
        scheduler.add_request(code.Request([1], 9, "many"))
        scheduler.step()
        steps += 1
    assert steps < 20


def test_what_can_never_run_is_refused(code: ModuleType) -> None:
    scheduler = code.Scheduler(Model(0), SLOTS, BUDGET, CONTEXT, 1)
    for prompt, count in (([], 1), ([1], 0), ([1], CONTEXT), ([1] * (BUDGET + 1), 1)):
        with pytest.raises(ValueError, match=r"above|needs"):
            scheduler.add_request(code.Request(prompt, count))
    scheduler.add_request(code.Request([1], CONTEXT - 1))
    with pytest.raises(queue.Full):
        scheduler.add_request(code.Request([1], 1))
    scheduler.stop()
    with pytest.raises(RuntimeError, match="stopping"):
        scheduler.add_request(code.Request([1], 1))


def in_a_thread(scheduler: Any) -> tuple[threading.Thread, list[BaseException]]:
    died: list[BaseException] = []

    def serve() -> None:
        try:
            scheduler.serve()
        except BaseException as error:
            died.append(error)

    thread = threading.Thread(target=serve)
    thread.start()
    return thread, died


@pytest.mark.parametrize("drain", [True, False])
def test_a_stop_loses_nobody(code: ModuleType, drain: bool) -> None:
    """With requests in the slots and in the queue; a waiting client is told in either case."""
    inside = threading.Event()
    go_on = threading.Event()

    def model(batch: list[Any]) -> list[int | None]:
        inside.set()
        assert go_on.wait(30)
        return [7] * len(batch)

    scheduler = code.Scheduler(model, SLOTS, BUDGET, CONTEXT, 20)
    requests = [code.Request([1], 3) for _ in range(2 * SLOTS)]
    for request in requests:
        scheduler.add_request(request)
    thread, died = in_a_thread(scheduler)
    assert inside.wait(30)
    scheduler.stop(drain=drain)
    go_on.set()
    thread.join(30)
    assert not thread.is_alive()
    assert not died
    assert all(request.ended.is_set() for request in requests)
    assert {r.finish_reason for r in requests} == ({"length"} if drain else {"abort"})
    assert len(scheduler.free) == SLOTS


def test_an_error_of_the_model_reaches_everybody(code: ModuleType) -> None:
    """A client that waits for `ended` must not wait for a thread that has died."""

    def model(batch: list[Any]) -> list[int | None]:
        raise OSError("out of memory")

    scheduler = code.Scheduler(model, SLOTS, BUDGET, CONTEXT, 20)
    requests = [code.Request([1], 3) for _ in range(2 * SLOTS)]
    for request in requests:
        scheduler.add_request(request)
    thread, died = in_a_thread(scheduler)
    thread.join(30)
    assert [str(error) for error in died] == ["out of memory"]
    assert {request.finish_reason for request in requests} == {"error"}
    with pytest.raises(RuntimeError, match="stopping"):
        scheduler.add_request(code.Request([1], 1))


@pytest.mark.full
def test_broken_ideas_are_seen() -> None:
    flags = "--requests 12 --mean-tokens 6 --slots 4"
    decode = "        if decoding := [request for request in batch if request.output]:\n"
    decode += "            tokens |= self.decode(decoding)\n"
    prefill = "        if prompts := [request for request in batch if not request.output]:\n"
    prefill += (
        "            tokens |= self.prefill(prompts)  # after decode, which writes to all rows\n"
    )
    place = "len(request.prompt) + len(request.output) - 1"
    cases = (
        ("", "", ""),
        # continuous in name: slots are given back when all have ended
        (flags, "if self.continuous or not going_on:", "if not going_on:"),
        # one line for all users
        (flags, "self.waiting.setdefault(request.user,", 'self.waiting.setdefault("",'),
        # a token's place is off by one
        (flags, place, "len(request.prompt) + len(request.output)"),
        # a row sees what is left of the slot's last owner
        (
            flags,
            "<= positions[:, None]\n        logits",
            "<= positions.max()[None, None]\n        logits",
        ),
        # the last place of the padding, not of the prompt
        (flags, "[len(request.prompt) - 1 for", "[longest - 1 for"),
        # prompts first: decode then writes into their rows
        (flags, decode + prefill, prefill + decode),
    )
    healthy, *broken = failed_claims(SCRIPT, 1, cases)
    assert not healthy
    unseen = [case for case, lines in zip(cases[1:], broken, strict=True) if not lines]
    assert not unseen


@pytest.mark.full
@pytest.mark.parametrize(
    "flags", ["--slots 1 --requests 6", "--slots 3 --seed 20260101 --requests 10"]
)
def test_other_sizes(run: Run, flags: str) -> None:
    result = run(f"python {CODE}/continuous_batch_scheduler.py --mean-tokens 8 {flags}")
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.full
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--model nowhere", "no model in nowhere: give the folder of one with --model DIR"),
        ("--data nowhere", "cannot read nowhere: give a text file with --data FILE"),
        ("--token-budget 31", "--token-budget 31: a prompt of 24 and 8 slots need more"),
        ("--mean-tokens 117", "--mean-tokens 117: up to twice that"),
    ],
)
def test_bad_input_gets_one_line(
    code: ModuleType, flags: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(warm.ROOT)
    monkeypatch.setattr(sys, "argv", ["x", *flags.split()])
    with pytest.raises(SystemExit) as end:
        code.parse_args()
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith(said)
