"""The policies keep their promises, the stand-in for an engine its books, and no request is lost."""

import argparse
import math
import random
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import warm
from book import CHAPTERS

FOLDER = f"{CHAPTERS[6]}/code"
CODE = warm.ROOT / FOLDER
SCRIPT = f"{FOLDER}/router_example.py"
Run = Callable[..., warm.Result]


@pytest.fixture(scope="module")
def code() -> SimpleNamespace:
    names = ("routing_policies", "router_simulator", "router_example")
    sys.path.insert(0, str(CODE))
    try:
        return SimpleNamespace(**{name: warm.load(name, CODE / f"{name}.py") for name in names})
    finally:
        sys.path.pop(0)


def flags(code: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, *more: str) -> Any:
    monkeypatch.setattr("sys.argv", ["router_example.py", *more])
    return code.router_example.parse_args()


def simulate(
    code: SimpleNamespace, args: argparse.Namespace, policy: str, hot: float = 0, **what: Any
) -> Any:
    requests = code.router_simulator.trace(args, hot)
    make = code.router_example.policies(args)[policy]
    pages = args.kv_tokens // code.routing_policies.PAGE
    return code.router_simulator.simulate(requests, make(), args.workers, pages, **what)


def p99(result: Any) -> float:
    return result.percentile(0.99)


def test_what_the_text_says_of_each_policy(
    code: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = flags(code, monkeypatch, "--seconds", "10")
    policies = list(code.router_example.policies(args))
    well = {name: simulate(code, args, name) for name in policies}
    assert well["prefix affinity"].hit_rate > 0.75 > 0.6 > well["round robin"].hit_rate
    assert p99(well["prefix affinity"]) < p99(well["round robin"]) / 5
    assert well["prefix affinity"].tokens_per_s > 1.15 * well["round robin"].tokens_per_s
    hot = {name: simulate(code, args, name, hot=0.6) for name in policies[3:]}
    assert p99(hot["affinity, no bound"]) > 5 * p99(hot["prefix affinity"])
    old = {name: simulate(code, args, name, report_us=10**6) for name in policies[:4]}
    assert p99(old["least loaded"]) > 1.2 * p99(old["power of two choices"])
    assert old["prefix affinity"].hit_rate < well["prefix affinity"].hit_rate - 0.05
    slow = [(args.seconds / 4, 0, 4.0)]
    assert p99(simulate(code, args, "round robin", changes=slow)) > 20 * p99(
        simulate(code, args, "prefix affinity", changes=slow)
    )


def test_a_worker_that_never_comes_back(
    code: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = flags(code, monkeypatch, "--seconds", "8", "--rate", "40")
    for policy in code.router_example.policies(args):
        result = simulate(code, args, policy, changes=[(2, 0, math.inf)])
        assert (result.lost, result.twice, result.late) == (0, 0, 0)
        assert result.retried > 0


def test_while_no_worker_is_there_requests_wait(
    code: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = flags(code, monkeypatch, "--seconds", "8", "--rate", "10", "--workers", "2")
    changes = [(1, 0, math.inf), (1, 1, math.inf), (5, 0, 1.0)]
    result = simulate(code, args, "prefix affinity", changes=changes)
    assert (result.lost, result.twice) == (0, 0)
    assert max(result.first_token_ms) > 2000


def test_no_worker_gets_more_than_its_bound(code: SimpleNamespace) -> None:
    draw = random.Random(1)
    policy = code.routing_policies.PrefixAffinity(draw, 1.25, 100)
    loads = dict.fromkeys("abcde", 0)
    for _ in range(3000):
        keys = [draw.randrange(3), *(draw.randrange(2) for _ in range(4))]  # few texts, much reuse
        worker = policy.choose(keys, loads)
        assert loads[worker] < 1.25 * (sum(loads.values()) + 1) / len(loads)
        loads[worker] += 1
        done = draw.choice(sorted(loads))
        loads[done] = max(0, loads[done] - draw.randrange(3))
        assert all(len(sent) <= 100 for sent in policy.sent.values())


def test_keys_stand_for_a_page_and_all_before_it(code: SimpleNamespace) -> None:
    keys, page = code.routing_policies.prefix_keys, code.routing_policies.PAGE
    text = list(range(3 * page))
    assert keys([*text, 1]) == keys(text)
    assert keys(text)[:2] == keys(text[: 2 * page] + [0] * page)[:2]
    other = keys([9, *text[1:]])
    assert not set(other) & set(keys(text)), "the same page after another beginning"


def test_equal_loads_are_not_always_the_first_worker(code: SimpleNamespace) -> None:
    policy = code.routing_policies.LeastLoaded(random.Random(0))
    assert {policy.choose([], {"a": 1, "b": 1, "c": 1}) for _ in range(50)} == {"a", "b", "c"}


def test_the_books_of_a_worker(code: SimpleNamespace) -> None:
    """Pages never exceed the cache, and a worker without work holds none for anybody."""
    simulator = code.router_simulator
    page = code.routing_policies.PAGE
    draw = random.Random(3)
    worker = simulator.Worker(pages=60)
    texts = [tuple(range(n, n + 20 * page)) for n in range(4)]
    for _ in range(300):
        if draw.random() < 0.5 and len(worker.waiting) < 8:
            text = draw.choice(texts)[: draw.randint(1, 20 * page)]
            request = simulator.Request(0, text, tuple(draw.sample(range(99), 5)))
            worker.waiting.append(simulator.Attempt(request, "w"))
        worker.start_step()
        worker.end_step(1)
        held = len(worker.users) + worker.private
        assert held + len(worker.idle) <= worker.pages
        assert not set(worker.users) & set(worker.idle)
        expected = sum(a.private for a in worker.running)
        assert worker.private == expected, "pages of answers that have no owner"
    while worker.waiting or worker.running:
        worker.start_step()
        worker.end_step(1)
    assert (worker.private, worker.users) == (0, {})


# --- the full tier -------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("seed", [1, 20260101])
def test_any_number_of_workers(run: Run, workers: int, seed: int) -> None:
    rate = 18 * workers
    result = run(f"python {SCRIPT} --workers {workers} --rate {rate} --seconds 6 --seed {seed}")
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.full
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--kv-tokens 1000", "the longest chat needs"),
        ("--bound 0.9", "type 1.25"),
        ("--workers 0", "type --workers 1"),
        ("--seconds 0", "there is no request"),
    ],
)
def test_bad_input(run: Run, arguments: str, said: str) -> None:
    result = run(f"python {SCRIPT} {arguments}")
    assert (result.returncode, "Traceback" in result.stderr) == (2, False)
    assert said in result.stderr


MUTANTS = {
    "no retry": ("for request in lost:", "for request in []:", "lost", math.inf),
    "an answer counts whoever gives it": (
        "if self.current.get(attempt.request) is not attempt:",
        "if False:",
        "twice",
        1.0,
    ),
}


@pytest.mark.full
@pytest.mark.parametrize("name", MUTANTS)
def test_what_the_faults_show(
    code: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    old, new, counter, afterwards = MUTANTS[name]
    source = (CODE / "router_simulator.py").read_text()
    assert source.count(old) == 1
    source = source.replace(old, new).replace(
        "del self.current[attempt.request]", "self.current.pop(attempt.request, 0)"
    )
    mutant = ModuleType("mutant")
    monkeypatch.setitem(sys.modules, "mutant", mutant)  # dataclasses look it up
    exec(compile(source, "mutant", "exec"), mutant.__dict__)  # noqa: S102
    args = flags(code, monkeypatch, "--seconds", "8", "--rate", "40")
    changed = SimpleNamespace(**(vars(code) | {"router_simulator": mutant}))
    changes = [(2, 0, math.inf), (4, 0, afterwards)]
    assert getattr(simulate(changed, args, "least loaded", changes=changes), counter) > 0
    assert getattr(simulate(code, args, "least loaded", changes=changes), counter) == 0
