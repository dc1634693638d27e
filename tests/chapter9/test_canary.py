"""Chapter 9's canary: the bets are fair, the verdicts hold their promises, the gateway is obeyed."""

import argparse
import asyncio
import itertools
import json
import math
import os
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import warm
from book import CHAPTERS
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CODE = warm.ROOT / CHAPTERS[8] / "code"
SCRIPT = CODE / "ch09_canary_deployment.py"


@pytest.fixture(scope="module")
def canary() -> Iterator[Any]:
    sys.path.insert(0, str(CODE))
    yield warm.load("ch09_canary_deployment", SCRIPT)
    sys.path.remove(str(CODE))


@pytest.fixture(scope="module")
def judge(canary: Any) -> Any:
    return sys.modules["canary_judge"]


# --- the bets ------------------------------------------------------------------------------------


def expected_wealth_of_worse(judge: Any, failures: int, share: float) -> float:
    """Mean wealth after so many failures, each the canary's with this probability."""
    k = np.arange(failures + 1)
    ways = np.array([math.comb(failures, i) for i in k])
    chance = ways * share**k * (1 - share) ** (failures - k)
    return float((chance * np.exp(judge.evidence_worse(k, failures - k))).sum())


def expected_wealth_of_harmless(
    judge: Any, requests: int, canary: float, baseline: float, margin: float
) -> float:
    """Mean wealth after so many requests of either arm, whose failure rates are these."""
    total = 0.0
    for c, b in itertools.product(range(requests + 1), repeat=2):
        neither = requests - c - b
        if neither < 0:
            continue
        ways = math.comb(requests, c) * math.comb(requests - c, b)
        chance = (canary / 2) ** c * (baseline / 2) ** b * (1 - (canary + baseline) / 2) ** neither
        counts = (np.array(requests), np.array(c), np.array(b))
        total += ways * chance * math.exp(judge.evidence_harmless(*counts, margin))
    return total


def fair(judge: Any) -> None:
    """Nobody gains on average where there is nothing to find, and somebody does where there is."""
    for failures in (1, 7, 60):
        assert math.isclose(expected_wealth_of_worse(judge, failures, 0.5), 1, rel_tol=1e-9)
        assert expected_wealth_of_worse(judge, failures, 0.4) < 1
        assert expected_wealth_of_worse(judge, failures, 0.6) > 1
    for baseline, margin in ((0.1, 0.2), (0.0, 0.05), (0.3, 0.5)):
        for requests in (1, 12):
            gain = expected_wealth_of_harmless(judge, requests, baseline + margin, baseline, margin)
            assert math.isclose(gain, 1, rel_tol=1e-9)
            more = expected_wealth_of_harmless(judge, requests, baseline, baseline, margin)
            assert more > 1
            worse = min(1, baseline + 1.3 * margin)
            assert expected_wealth_of_harmless(judge, requests, worse, baseline, margin) < 1


def test_the_bets_are_fair(judge: Any) -> None:
    """So that Ville's inequality holds for them: in expectation, to nine digits, at any time."""
    fair(judge)


MUTANTS = [
    ("(baseline, 1 - BETS))", "(baseline, 1 - BETS / 2))"),  # wins more than it loses
    ("np.exp(logs - top).mean(0)", "np.exp(logs - top).sum(0)"),  # each has the whole stake
    ("np.exp(logs - top).mean(0)", "np.exp(logs - top).max(0)"),  # the luckiest one, afterwards
    ("mean = margin / 2", "mean = margin"),  # the difference, where the mean is half of it
    ("(canary, 1 + BETS * (mean - 1)),", "(canary, 1 + BETS * (mean + 1)),"),
]


@pytest.mark.full
@pytest.mark.parametrize(("right", "wrong"), MUTANTS, ids=range(len(MUTANTS)))
def test_unfair_bets_are_found(right: str, wrong: str) -> None:
    source = (CODE / "canary_judge.py").read_text(encoding="utf-8")
    assert source.count(right) == 1
    mutant = types.ModuleType("canary_judge_mutant")
    sys.modules[mutant.__name__] = mutant  # dataclasses look there
    exec(compile(source.replace(right, wrong), "mutant", "exec"), mutant.__dict__)  # noqa: S102
    with pytest.raises(AssertionError):
        fair(mutant)


def false_rollbacks(judge: Any, fails: Callable[[np.random.Generator], np.ndarray]) -> float:
    """Share of 1,000 rollouts, equal arms, where the bet is ever won: [rollouts, requests] fail."""
    draw = np.random.default_rng(5)
    failed = fails(draw)
    ours = draw.random(failed.shape) < 0.5
    of_canary = (failed & ours).cumsum(1)
    of_baseline = (failed & ~ours).cumsum(1)
    evidence = judge.evidence_worse(of_canary, of_baseline)
    return float((evidence >= math.log(1 / 0.05)).any(1).mean())


@pytest.mark.full
def test_outages_that_hit_both_arms_are_no_evidence(judge: Any) -> None:
    """A database that is down for a minute, an hour of errors: rates may move as they like."""

    def bursts(draw: np.random.Generator) -> np.ndarray:
        rate = np.where(np.sin(np.arange(3000) / 200) > 0.9, 0.9, 0.01)
        return draw.random((1000, 3000)) < rate

    assert false_rollbacks(judge, bursts) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 1000)


# --- verdicts ------------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize("seed", [1, 20260101])
def test_promises_hold_for_other_rates(canary: Any, judge: Any, seed: int) -> None:
    draw = np.random.default_rng(seed)
    plan = judge.Plan()
    margin = 3 * math.sqrt(0.05 * 0.95 / 500)
    for failed, late in ((0.001, 0.01), (0.03, 0.1)):
        old = canary.Rates(failed, late)
        verdicts, _ = canary.simulate(plan, old, old, 500, draw)
        assert (verdicts == judge.ROLL_BACK).mean() <= 0.05 + margin
        worse = canary.Rates(failed + plan.failed_budget, late)
        verdicts, _ = canary.simulate(plan, worse, old, 500, draw)
        assert (verdicts == judge.PROMOTE).mean() <= 0.05 + margin


def test_a_verdict_needs_its_samples(judge: Any) -> None:
    """One failure is none; nothing at all is not harmless; a bad one is stopped at any time."""

    def verdict(requests: int, canary: int, baseline: int, step: int = 0) -> int:
        failed = (np.array(canary), np.array(baseline))
        return int(judge.decide(judge.Plan(), step, np.array(requests), failed, failed))

    assert verdict(1, 1, 0) == judge.WAIT
    assert verdict(39, 0, 0) == judge.WAIT  # 20 requests of each arm
    assert verdict(60, 0, 0) == judge.PROMOTE
    assert verdict(60, 0, 0, step=3) == judge.WAIT  # to all of the traffic: within 1 %
    assert verdict(20, 12, 0) == judge.ROLL_BACK
    assert verdict(10**6, 10_000, 10_000, step=0) in (judge.PROMOTE, judge.HOLD)
    assert judge.Plan().margins(0) == pytest.approx((0.2, 1))
    assert judge.Plan().margins(3) == pytest.approx((0.01, 0.05))


# --- a gateway of ten lines ----------------------------------------------------------------------


class FakeGateway:
    """Counts as the real one does: between two looks each arm gets `each` requests more."""

    def __init__(self, failing: float = 0.0, each: int = 40, unequal: int = 0):
        self.failing, self.each, self.unequal = failing, each, unequal
        self.weights = {"canary": 0.0, "baseline": 0.0, "stable": 1.0, "other": 0.5}
        self.puts: list[list[tuple[str, float]]] = []
        self.reads = 0
        self.silent_at: tuple[int, ...] = ()  # reads of the metrics that are not answered
        self.restart()

    def restart(self) -> None:
        self.registry = CollectorRegistry()
        labels = ["backend", "attempt"]
        self.attempts = Counter(
            "gateway_backend_attempts", "", [*labels, "outcome"], registry=self.registry
        )
        self.asked = Counter("gateway_backend_asked", "", labels, registry=self.registry)
        under_way = [*labels, "le"]
        self.late = Gauge("gateway_backend_late", "", under_way, registry=self.registry)
        self.waiting = Gauge("gateway_backend_waiting", "", under_way, registry=self.registry)
        self.seconds = Histogram(
            "gateway_backend_seconds", "", labels, buckets=(0.1, 0.5, 1), registry=self.registry
        )

    def add(self, backend: str, ok: int, failed: int, attempt: str = "first") -> None:
        self.asked.labels(backend, attempt).inc(ok + failed)
        self.attempts.labels(backend, attempt, "ok").inc(ok)
        self.attempts.labels(backend, attempt, "error").inc(failed)
        for _ in range(ok):
            self.seconds.labels(backend, attempt).observe(0.2)

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/metrics":
            self.reads += 1
            if self.reads in self.silent_at:
                raise httpx.ReadTimeout("busy")
            failed = round(self.failing * self.each)
            self.add("canary", self.each - failed, failed)
            self.add("stable", failed, 0, attempt="retry")  # so no client has seen an error
            self.add("baseline", self.each + self.unequal, 0)
            return httpx.Response(200, content=generate_latest(self.registry))
        if request.headers.get("authorization") != "Bearer admin":
            return httpx.Response(401, json={"error": {"message": "no"}})
        if request.method == "PUT":
            wanted = json.loads(request.content)
            self.puts.append(list(wanted.items()))
            self.weights |= wanted
        return httpx.Response(200, json=self.weights)

    def roll_out(self, module: Any, plan: Any) -> Any:
        async def work() -> Any:
            transport = httpx.MockTransport(self)
            async with httpx.AsyncClient(transport=transport, base_url="http://g") as client:
                controller = module.Controller(client, "admin", 0.5)
                return await controller.roll_out(plan, "canary", "baseline", "stable")

        return asyncio.run(work())


def test_a_good_canary_gets_all(canary: Any, judge: Any) -> None:
    gateway = FakeGateway(each=400)
    rollout = gateway.roll_out(canary, judge.Plan())
    assert rollout.verdict == judge.PROMOTE
    assert [put[0] for put in gateway.puts] == [("canary", share) for share in judge.Plan().shares]
    for put in gateway.puts[:-1]:  # the order in which the gateway deals users out
        assert [name for name, _ in put] == ["canary", "stable", "baseline", "other"]
        assert sum(weight for _, weight in put) == pytest.approx(1)
        assert dict(put)["canary"] == dict(put)["baseline"]
    assert gateway.weights == {"canary": 1, "baseline": 0, "stable": 0, "other": 0}


def test_a_failing_canary_is_rolled_back_though_no_client_sees_it(canary: Any, judge: Any) -> None:
    gateway = FakeGateway(failing=0.5)
    rollout = gateway.roll_out(canary, judge.Plan())
    assert rollout.verdict == judge.ROLL_BACK
    assert rollout.share == 0.01
    assert gateway.weights == {"canary": 0, "baseline": 0, "stable": 1, "other": 0}


def test_a_read_that_fails_does_not_end_the_rollout(canary: Any, judge: Any) -> None:
    gateway = FakeGateway(failing=0.5)
    gateway.silent_at = (3,)
    assert gateway.roll_out(canary, judge.Plan()).verdict == judge.ROLL_BACK
    assert gateway.weights["canary"] == 0


def test_unequal_shares_are_held(canary: Any, judge: Any) -> None:
    """A canary that is down gets fewer requests than asked for: its counts prove nothing."""
    gateway = FakeGateway(unequal=60)
    assert gateway.roll_out(canary, judge.Plan()).verdict == judge.HOLD
    assert gateway.weights["canary"] == 0.01  # as it was: a person is asked


def test_a_gateway_that_counts_anew_is_held(canary: Any, judge: Any) -> None:
    verdict, words = canary.judge(
        judge.Plan(), 0, np.array([-3, 0, 0, 0, 0]), np.array([5, 0, 0, 0, 0])
    )
    assert verdict == judge.HOLD
    assert "anew" in words


def test_counts(canary: Any) -> None:
    """Retries are left out, who is busy is not in time, and an unknown limit is refused."""
    gateway = FakeGateway()
    gateway.add("canary", ok=3, failed=2)
    gateway.add("canary", ok=7, failed=7, attempt="retry")
    gateway.seconds.labels("canary", "first").observe(0.9)
    gateway.attempts.labels("canary", "first", "ok").inc()
    for outcome in ("busy", "left", "refused"):
        gateway.attempts.labels("canary", "first", outcome).inc()
    for limit, late, waiting in (("0.0", 9, 7), ("0.5", 3, 2)):  # 4 of 9 have their token in time
        gateway.late.labels("canary", "first", limit).set(late)
        gateway.waiting.labels("canary", "first", limit).set(waiting)
    gateway.asked.labels("canary", "first").inc(4 + 9)
    text = generate_latest(gateway.registry).decode()
    late = 2 + 1 + 3 + 3  # failed, answered late, not answered, late under way
    assert canary.read_counts(text, 0.5)["canary"].tolist() == [18, 3, late, 3 + 2, late + 5]
    with pytest.raises(SystemExit) as ended:
        canary.read_counts(text, 0.3)
    assert ended.value.code == 2


def test_a_canary_that_hangs_is_not_promoted(canary: Any, judge: Any) -> None:
    """Nothing of it has ended: its requests are late after the limit, and before it may be."""
    plan = judge.Plan()
    good = np.array([5000, 0, 0, 0, 0])
    assert canary.judge(plan, 3, good, good)[0] == judge.PROMOTE
    assert canary.judge(plan, 3, np.array([5000, 0, 0, 0, 2000]), good)[0] == judge.WAIT
    assert canary.judge(plan, 3, np.array([5000, 0, 0, 2000, 0]), good)[0] == judge.WAIT
    assert canary.judge(plan, 3, np.array([5000, 0, 500, 0, 500]), good)[0] == judge.ROLL_BACK
    waits = np.array([30_000, 0, 0, 0, 20_000])  # for too long
    assert canary.judge(plan, 3, waits, good * 6)[0] == judge.HOLD


@pytest.mark.full
@pytest.mark.parametrize("hanging", [0.03, 0.1])
def test_rollouts_of_a_canary_that_hangs(canary: Any, judge: Any, hanging: float) -> None:
    """Requests that hang end as failures after 20 s; a rollout takes less. None gets all users."""
    draw = np.random.default_rng(0)
    verdicts = [hanging_rollout(canary, judge, hanging, draw) for _ in range(20)]
    assert judge.PROMOTE not in verdicts
    assert judge.PROMOTE in [hanging_rollout(canary, judge, 0, draw) for _ in range(20)]


def hanging_rollout(canary: Any, judge: Any, share: float, draw: np.random.Generator) -> int:
    """1,000 requests a second, looked at every 0.1 s; late after 0.5 s."""
    plan = judge.Plan()
    for step, of_all in enumerate(plan.shares[:-1]):
        hung: list[int] = []  # of the canary's, in each tenth of a second
        arms = np.zeros((2, 5))
        verdict = judge.WAIT
        while verdict == judge.WAIT:
            for arm in (0, 1):
                asked = draw.poisson(100 * of_all)
                hangs = draw.binomial(asked, 0 if arm else share)
                failed = draw.binomial(asked - hangs, 0.01)
                late = failed + draw.binomial(asked - hangs - failed, 0.03)
                arms[arm] += (asked, failed, late, failed, late)
                hung += [] if arm else [hangs]
            ended, stuck, young = sum(hung[:-200]), sum(hung[-200:-5]), sum(hung[-5:])
            seen = [0, ended, ended + stuck, ended + stuck, ended + stuck + young]
            verdict, _ = canary.judge(plan, step, arms[0] + seen, arms[1])
        if verdict != judge.PROMOTE:
            break
    return verdict


def test_users_who_were_taken_away(canary: Any) -> None:
    def answer(sent: float, user: str, backend: str, attempts: int = 1) -> Any:
        return canary.Answer(sent, user, 200, backend, attempts)

    kept = [answer(1, "a", "stable"), answer(2, "a", "new"), answer(3, "a", "stable", 2)]
    assert canary.taken_away(kept, "new") == 0
    assert canary.taken_away([answer(2, "a", "stable"), answer(1, "a", "new")], "new") == 1


# --- the command ---------------------------------------------------------------------------------


def ended(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *flags],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | {"ADMIN_KEY": "x"},
    )


@pytest.mark.full
def test_no_gateway_is_said_in_one_line(canary: Any) -> None:
    nowhere = f"http://127.0.0.1:{canary.free_port()}"
    result = ended("--gateway", nowhere)
    assert result.returncode == 2
    assert result.stderr.startswith(f"no gateway at {nowhere}")
    assert result.stderr.count("\n") == 1


@pytest.mark.full
def test_a_real_gateway_refuses_a_wrong_key_and_a_wrong_name(canary: Any) -> None:
    ports = [canary.free_port(), canary.free_port()]
    runner, url = (f"http://127.0.0.1:{port}" for port in ports)
    players = [str(SCRIPT), "--port", str(ports[0]), "--stand-in", "stable=0,0"]
    gateway = [str(CODE / "ch09_api_gateway.py"), "--port", str(ports[1])]
    gateway += [f"--backend=stable={runner}/stable", f"--key=demo={canary.sha256('k')}"]
    for admin, wrong in (("y", "401"), ("x", "400")):  # another key; there is no canary
        with (
            canary.started(players, runner + "/stable/health"),
            canary.started([*gateway, f"--admin-key={canary.sha256(admin)}"], url + "/health"),
        ):
            result = ended("--gateway", url)
        assert result.returncode == 2
        assert f"{url} said {wrong}" in result.stderr
        assert result.stderr.count("\n") == 1


@pytest.mark.full
def test_another_seed(canary: Any, capsys: pytest.CaptureFixture[str]) -> None:
    args = argparse.Namespace(simulate=2000, alpha=0.05, seed=20260101, plot=None)
    assert all(canary.run_simulation(args))
    assert "FAILED" not in capsys.readouterr().out
