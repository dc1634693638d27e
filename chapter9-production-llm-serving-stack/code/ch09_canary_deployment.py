"""Roll a new version out behind the gateway, and let a bet decide: promote, hold or roll back.

    python chapter9-production-llm-serving-stack/code/ch09_canary_deployment.py
    python chapter9-production-llm-serving-stack/code/ch09_canary_deployment.py --simulate 10000 --plot chapter9-production-llm-serving-stack/figures/canary.svg

The first starts the real gateway in front of a stand-in for the model runners, whose error rates
and latencies are set by construction, and rolls three canaries out: look at how many failures the
gateway counts, and how many of them a client sees. The second simulates rollouts that are judged
after every failure. For a gateway of your own: --gateway URL, ADMIN_KEY in the environment.
Section 9.7.
"""

import argparse
import asyncio
import contextlib
import hashlib
import math
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import httpx
import numpy as np
from canary_judge import HOLD, PROMOTE, ROLL_BACK, VERDICTS, WAIT, Plan, decide, is_uneven
from canary_simulation import Rates, alarms_from_few_users, plot, rolled_back_otherwise, simulate
from prometheus_client.parser import text_string_to_metric_families

UNREAD = 20  # failed reads of the metrics in a row, after which there is no gateway


@dataclass
class Rollout:
    """How one ended: the verdict, the share it came to, and the counts of each arm."""

    verdict: int
    share: float
    arms: dict[str, np.ndarray]  # as read_counts has them


def read_counts(metrics: str, limit_s: float) -> dict[str, np.ndarray]:
    """Of each backend: requests, failed, failed or late; and the last two if the worst should come
    of the requests under way: those late already fail, all others are late.

    First attempts only: a retry goes to whoever is left, and that is no equal share.
    """
    counts: dict[str, np.ndarray] = {}
    bounds: set[float] = set()
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            if sample.labels.get("attempt") != "first":
                continue
            count = counts.setdefault(sample.labels["backend"], np.zeros(5))
            limit = float(sample.labels.get("le", "nan"))
            if sample.name == "gateway_backend_asked_total":
                count[0] += sample.value
            elif sample.name == "gateway_backend_attempts_total":  # what is not ok in time is late
                failed = sample.labels["outcome"] in ("error", "refused")
                count += sample.value * np.array([0, failed, 1, failed, 1])
            elif sample.name == "gateway_backend_seconds_bucket":
                bounds.add(limit)
                count -= sample.value * (limit == limit_s) * np.array([0, 0, 1, 0, 1])
            elif sample.name == "gateway_backend_late":
                count += sample.value * (limit == limit_s) * np.array([0, 0, 1, 0, 1])
            elif sample.name == "gateway_backend_waiting":
                count += sample.value * (limit == limit_s) * np.array([0, 0, 0, 1, -1])
                count[4] += sample.value * (limit == 0)
    if bounds and limit_s not in bounds:
        stop(f"--limit {limit_s:g}: the gateway counts answers within {sorted(bounds)} seconds")
    return counts


class Controller:
    """Moves the weights of a gateway's backends, and judges by what the gateway counts."""

    def __init__(self, client: httpx.AsyncClient, admin_key: str, limit_s: float):
        self.client = client
        self.headers = {"authorization": f"Bearer {admin_key}"}
        self.limit_s = limit_s

    async def weights(self) -> dict[str, float]:
        answer = await self.client.get("/admin/weights", headers=self.headers)
        return answer.raise_for_status().json()

    async def set_weights(self, shares: dict[str, float]) -> None:
        """Who is not named gets nothing. The gateway gives users to backends in this order."""
        others = {name: 0.0 for name in await self.weights() if name not in shares}
        body = shares | others
        answer = await self.client.put("/admin/weights", json=body, headers=self.headers)
        answer.raise_for_status()

    async def counts(self, *names: str) -> np.ndarray:
        """[names, 5]"""
        answer = await self.client.get("/metrics")
        found = read_counts(answer.raise_for_status().text, self.limit_s)
        return np.stack([found.get(name, np.zeros(5)) for name in names])

    async def roll_out(self, plan: Plan, canary: str, baseline: str, stable: str) -> Rollout:
        """Step by step, until a verdict; `baseline` is the old version, started with the canary."""
        names = (canary, baseline, stable)
        began = await self.counts(*names)
        for step, share in enumerate(plan.shares[:-1]):
            # Canary first, baseline last: as both grow, no user is taken from either of them.
            await self.set_weights({canary: share, stable: 1 - 2 * share, baseline: share})
            start = await self.counts(*names)
            start[:, 3:] = start[:, 1:3]  # of what is under way the worst may still come
            verdict = WAIT
            unread = 0
            while verdict == WAIT:
                await asyncio.sleep(0.1)
                try:
                    counts = await self.counts(*names) - start
                except httpx.TransportError:  # a busy gateway; ours to end is the canary's share
                    unread += 1
                    if unread > UNREAD:
                        raise
                    continue
                unread = 0
                verdict, words = judge(plan, step, counts[0], counts[1])
            say(f"{canary:<10}{share:>5.0%}{shown(counts[0])}   {shown(counts[1])}   {words}")
            if verdict != PROMOTE:
                break
        arms = dict(zip(names, await self.counts(*names) - began, strict=True))
        if verdict == PROMOTE:
            share = 1.0
            await self.set_weights({canary: share})
        elif verdict == ROLL_BACK:
            await self.set_weights({stable: 1.0})
        return Rollout(verdict, share, arms)


def judge(plan: Plan, step: int, canary: np.ndarray, baseline: np.ndarray) -> tuple[int, str]:
    """The verdict on a step so far, and words for it."""
    if min(canary[0], baseline[0]) < 0:
        return HOLD, "held: the gateway counts anew"
    # What began before the step may end in it, so there can be more late ones than requests.
    requests, failed, late, may_fail, may_be_late = zip(
        *(np.append(max(count), count[1:]) for count in (canary, baseline)), strict=True
    )
    total = sum(requests)
    verdict = int(decide(plan, step, total, failed, late))
    if verdict == PROMOTE:  # only if it also holds when the canary answers nothing any more
        failed, late = (may_fail[0], failed[1]), (may_be_late[0], late[1])
        verdict = int(decide(plan, step, total, failed, late))
        if verdict == ROLL_BACK:  # not yet, as it has not come
            verdict = HOLD if total > plan.patience * 2 * plan.shares[step] else WAIT
    if verdict != ROLL_BACK and is_uneven(canary[0], baseline[0]):
        return HOLD, "held: the arms get unequal shares"
    words = ("", f"to {plan.shares[step + 1]:.0%}", "rolled back", "held: undecided for too long")
    return verdict, words[verdict]


def shown(count: np.ndarray) -> str:
    return "".join(f"{int(x):>7,}" for x in count[:3])


# --- a demonstration: a stand-in, clients, and the real gateway -----------------------------------

QUIET = Rates(failed=0.01, late=0.02)
CANARIES = {"good": QUIET, "failing": Rates(0.4, 0.02), "late": Rates(0.01, 0.5)}
DEMONSTRATED = Plan((0.1, 0.25, 0.5, 1.0), 0.01, failed_budget=0.1, late_budget=0.1, minimum=5)
COLD = 12  # requests that a version answers late after its start, as one with an empty cache does
LATE_S = 0.6
KEY = secrets.token_urlsafe()
ADMIN_KEY = secrets.token_urlsafe()


def stand_in(versions: dict[str, Rates], port: int) -> None:
    """Play several versions of a model runner, which differ in nothing but these rates."""
    from fastapi import FastAPI
    from fastapi.responses import JSONResponse
    from http_service import serve

    app = FastAPI(title="stand-in")
    draw = random.Random(0)
    served = Counter({"stable": COLD})  # it has been up for days

    @app.get("/{version}/health")
    async def health(version: str) -> dict:
        return {"status": "ok"}

    @app.post("/{version}/v1/chat/completions", response_model=None)
    async def chat(version: str) -> JSONResponse:
        rates = versions[version]
        served[version] += 1
        late = served[version] <= COLD or draw.random() < rates.late
        await asyncio.sleep(LATE_S if late else 0.002)
        if draw.random() < rates.failed:
            error = {"message": "a stand-in's error", "type": "server_error"}
            return JSONResponse({"error": error | {"param": None, "code": None}}, 500)
        message = {"role": "assistant", "content": "This is a stand-in, not a model."}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return JSONResponse({"object": "chat.completion", "choices": [choice]})

    serve(app, "127.0.0.1", port)


@dataclass
class Answer:
    """What a client saw."""

    sent: float
    user: str
    status: int
    backend: str | None
    attempts: int


async def ask(client: httpx.AsyncClient, seed: int, seen: list[Answer]) -> None:
    """A client without end: one of 5,000 users sends a request, then another one the next."""
    headers = {"authorization": f"Bearer {KEY}"}
    message = {"role": "user", "content": "Is all well?"}
    draw = random.Random(seed)
    while True:
        user = f"user {draw.randrange(5000)}"
        body = {"model": "book", "messages": [message], "user": user}
        sent = time.monotonic()
        answer = await client.post("/v1/chat/completions", json=body, headers=headers)
        backend = answer.headers.get("x-backend")
        attempts = int(answer.headers.get("x-attempts", 0))
        seen.append(Answer(sent, user, answer.status_code, backend, attempts))


@contextlib.asynccontextmanager
async def traffic(client: httpx.AsyncClient, clients: int) -> AsyncIterator[list[Answer]]:
    """Clients that ask for as long as the block runs; what they have seen."""
    seen: list[Answer] = []
    tasks = [asyncio.create_task(ask(client, seed, seen)) for seed in range(clients)]
    try:
        yield seen
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def taken_away(seen: list[Answer], canary: str) -> int:
    """Users who got the canary, and something else later; what a retry gave does not count."""
    given: set[str] = set()
    lost: set[str] = set()
    for answer in sorted(seen, key=lambda answer: answer.sent):
        if answer.attempts == 1 and answer.backend == canary:
            given.add(answer.user)
        elif answer.attempts == 1 and answer.user in given:
            lost.add(answer.user)
    return len(lost)


async def demonstrate(url: str, args: argparse.Namespace) -> list[bool | None]:
    """Roll three canaries out while clients send requests."""
    ended: dict[str, Rollout] = {}
    answers: dict[str, list[Answer]] = {}
    say("canary    share    its requests, failed, late   its baseline's")
    async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as client:
        controller = Controller(client, ADMIN_KEY, args.limit)
        await controller.set_weights({"stable": 1.0})
        for name in CANARIES:
            async with traffic(client, args.clients) as answers[name]:
                ended[name] = await controller.roll_out(
                    DEMONSTRATED, name, f"{name}-baseline", "stable"
                )
        weights = await controller.weights()
    errors = {name: sum(a.status != 200 for a in seen) for name, seen in answers.items()}
    say("canary    verdict      requests of all   failed at the canary   seen by clients")
    for name, rollout in ended.items():
        failed = f"{rollout.arms[name][1]:.0f} of {rollout.arms[name][0]:.0f}"
        total = len(answers[name])
        say(f"{name:<10}{VERDICTS[rollout.verdict]:<13}{total:>15,}{failed:>23}{errors[name]:>18}")
    late = ", ".join(f"{name} {n[2] / max(n[0], 1):.0%}" for name, n in ended["good"].arms.items())
    say(f"late          {late}")
    failed_there = ended["failing"].arms["failing"][1]
    bad_share = weights["failing"] + weights["late"]
    return [
        check("share of the good canary at the end", ended["good"].share, 1, at_least=True),
        check("share of the failing and the late one at the end", bad_share, 0),
        check(
            "failures of the failing canary that clients saw", errors["failing"], failed_there / 4
        ),
        check("users taken from the canary that grew", taken_away(answers["good"], "good"), 0),
    ]


def run_demonstration(args: argparse.Namespace) -> list[bool | None]:
    versions = {"stable": QUIET}
    for name, rates in CANARIES.items():
        versions |= {name: rates, f"{name}-baseline": QUIET}
    here = Path(__file__).resolve()
    port = free_port()
    runner = f"http://127.0.0.1:{port}"
    runners = [str(here), "--port", str(port), "--stand-in"]
    runners += [f"{name}={rates.failed},{rates.late}" for name, rates in versions.items()]
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    gateway = [str(here.with_name("ch09_api_gateway.py")), "--port", str(port)]
    gateway += [f"--backend={name}={runner}/{name}" for name in versions]
    gateway += [f"--key=demo={sha256(KEY)}", f"--admin-key={sha256(ADMIN_KEY)}"]
    gateway += ["--limit=demo=1e6,1e6"]  # requests at once, and a second
    with started(runners, runner + "/stable/health"), started(gateway, url + "/health"):
        return asyncio.run(demonstrate(url, args))


@contextlib.contextmanager
def started(command: list[str], ready: str) -> Iterator[None]:
    """A server for as long as the block runs."""
    process = subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_until_ready(process, ready, 60)
        yield
    finally:
        end(process)


def sha256(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


# --- the other two ways to run it -----------------------------------------------------------------


async def drive(args: argparse.Namespace) -> list[bool | None]:
    """Roll out on a gateway that is there already, with the traffic that it has."""
    say("canary    share    its requests, failed, late   its baseline's")
    try:
        async with httpx.AsyncClient(base_url=args.gateway, timeout=10, trust_env=False) as client:
            controller = Controller(client, os.environ.get("ADMIN_KEY", ""), args.limit)
            names = (args.canary, args.baseline, args.stable)
            rollout = await controller.roll_out(Plan(alpha=args.alpha), *names)
    except httpx.HTTPStatusError as error:
        stop(f"{args.gateway} said {error.response.status_code}: {error.response.text}")
    except httpx.RequestError as error:
        stop(f"no gateway at {args.gateway} ({type(error).__name__}): type another --gateway")
    return [check("share of the canary at the end", rollout.share, 1, at_least=True)]


def run_simulation(args: argparse.Namespace) -> list[bool | None]:
    plan = Plan(alpha=args.alpha)
    draw = np.random.default_rng(args.seed)
    old = Rates(failed=0.01, late=0.05)
    say(f"the baseline fails {old.failed:.0%} and is late for {old.late:.0%} of its requests")
    say("canary's    rolled back, %                                  requests of all users")
    say("errors, %   the bet   z, peeked at   z, once   a limit      to the bet's verdict")
    table = {}
    promoted = {}
    for rate in (0.01, 0.0125, 0.015, 0.0175, 0.02, 0.025, 0.03):
        exact = rate in (old.failed, old.failed + plan.failed_budget)
        rollouts = args.simulate if exact else max(args.simulate // 10, 1)
        verdicts, requests = simulate(plan, Rates(rate, old.late), old, rollouts, draw)
        others = rolled_back_otherwise(plan, rate, old.failed, rollouts, draw)
        table[rate] = [float((verdicts == ROLL_BACK).mean()), *others]
        promoted[rate] = (verdicts == PROMOTE).mean()
        of_all = np.median((requests / (2 * np.array(plan.shares[:-1]))).sum(1))
        bet, peeked, once, limit = (100 * share for share in table[rate])
        row = f"{100 * rate:9.2f}{bet:10.1f}{peeked:15.1f}{once:10.1f}{limit:10.1f}"
        say(f"{row}{of_all:26,.0f}")
    late = Rates(old.failed, old.late + plan.late_budget)
    late_promoted = (simulate(plan, late, old, args.simulate, draw)[0] == PROMOTE).mean()
    by_request, by_user = alarms_from_few_users(plan.alpha, args.simulate, draw)
    say(f"ten users fail always: {by_request:.0%} false alarms if each request counts,")
    say(f"              {by_user:.1%} if each user counts once")
    if args.plot:
        plot(args.plot, table)
    margin = 3 * math.sqrt(plan.alpha * (1 - plan.alpha) / args.simulate)
    bound = plan.alpha + margin
    say(f"bound         {plan.alpha:g} and three standard errors of a binomial, {margin:.4f}")
    worst = old.failed + plan.failed_budget
    return [
        check("false rollbacks by the bet", table[old.failed][0], bound),
        check(
            "false rollbacks by the z-test peeked at", table[old.failed][1], bound, at_least=True
        ),
        check("canaries promoted that fail the budget more", promoted[worst], bound),
        check("canaries promoted that are late the budget more", late_promoted, bound),
        check("false alarms if each user counts once", by_user, bound),
    ]


def rates_of(text: str) -> tuple[str, Rates]:
    name, _, rates = text.partition("=")
    failed, late = map(float, rates.split(","))
    return name, Rates(failed, late)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--clients", type=int, default=12, help="clients of the demonstration, at the same time")
    add("--limit", type=float, default=0.5, help="seconds after which an answer is late")
    add("--simulate", type=int, metavar="N", help="simulate N rollouts")
    add("--alpha", type=float, default=0.05, help="share of good canaries rolled back, at most")
    add("--seed", type=int, default=0, help="for the simulation")
    add("--plot", type=Path, help="draw the simulation's table: SVG")
    add("--gateway", metavar="URL", help="roll out there, with the traffic that it has")
    add("--canary", default="canary", help="the gateway's name of the new version")
    add("--baseline", default="baseline", help="and of the old one, started with the canary")
    add("--stable", default="stable", help="and of the old one that has most of the traffic")
    add("--port", type=int, default=8109, help="of the stand-in")
    add("--stand-in", type=rates_of, nargs="+", metavar="NAME=FAILED,LATE", help="play runners")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.stand_in:
        stand_in(dict(args.stand_in), args.port)
    elif args.gateway:
        sys.exit(conclude(asyncio.run(drive(args))))
    elif args.simulate:
        sys.exit(conclude(run_simulation(args)))
    else:
        sys.exit(conclude(run_demonstration(args)))


# --- copied from other scripts; `make copies` keeps it equal to them ------------------------------


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


# Copied from vllm_server.free_port
def free_port() -> int:
    """A port of 127.0.0.1 that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# Copied from vllm_server.wait_until_ready
def wait_until_ready(process: subprocess.Popen, url: str, timeout_s: float) -> float:
    """Seconds until a GET of `url` answers 200; RuntimeError if the process ends or time is up."""
    start = time.monotonic()
    while time.monotonic() < start + timeout_s:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode} before it was ready")
        with contextlib.suppress(OSError, urllib.error.URLError):
            urllib.request.urlopen(url, timeout=5).close()  # raises HTTPError unless it is 2xx
            return time.monotonic() - start
        time.sleep(0.1)
    raise RuntimeError(f"{url} did not answer 200 within {timeout_s:g} s")


# Copied from vllm_server.end
def end(process: subprocess.Popen, patience_s: float = 30) -> int:
    """End a server and whatever it started: SIGTERM, time to drain, then SIGKILL. Its exit code.

    It must lead a process group: Popen(..., start_new_session=True).
    """
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience_s)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


if __name__ == "__main__":
    main()
