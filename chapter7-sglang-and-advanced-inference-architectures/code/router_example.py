"""Choose a worker for each request: four policies on one trace of chats, and workers that fail.

    python chapter7-sglang-and-advanced-inference-architectures/code/router_example.py --plot chapter7-sglang-and-advanced-inference-architectures/figures/routing.svg
    python chapter7-sglang-and-advanced-inference-architectures/code/router_example.py --workers 8 --rate 160 --seconds 5

Look at the hit rate, and at what it makes of the worst first tokens; then at the column in which a
policy fails. The policies are real (routing_policies.py). The workers are simulated in virtual time
(router_simulator.py), so every number is exact, and none is of this machine. Section 7.2.
"""

import argparse
import math
import os
import random
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from router_simulator import (
    DECODE_US,
    PREFILL_US,
    PROBE_US,
    SECOND,
    Request,
    Result,
    predicted_hits,
    simulate,
    trace,
)
from routing_policies import PAGE, LeastLoaded, Policy, PowerOfTwo, PrefixAffinity, RoundRobin


def policies(args: argparse.Namespace) -> dict[str, Callable[[], Policy]]:
    """How to make each of them anew, for one run."""
    pages = args.kv_tokens // PAGE
    draw = partial(random.Random, args.seed)
    return {
        "round robin": RoundRobin,
        "least loaded": lambda: LeastLoaded(draw()),
        "power of two choices": lambda: PowerOfTwo(draw()),
        "prefix affinity": lambda: PrefixAffinity(draw(), args.bound, pages),
        "affinity, no bound": lambda: PrefixAffinity(draw(), math.inf, pages),
    }


def token_work(requests: list[Request], hit_rate: float, args: argparse.Namespace) -> float:
    """Share of each worker's time that tokens alone take. Near 1 queues grow: steps cost too."""
    computed = (1 - hit_rate) * sum(len(r.prompt) for r in requests)
    written = sum(len(r.answer) for r in requests)
    us = PREFILL_US * computed + DECODE_US * written
    return us / (args.workers * args.seconds * SECOND)


def run(args: argparse.Namespace) -> list[bool | None]:
    usual = trace(args)
    hot = trace(args, hot=0.6)
    if not (usual and hot):
        stop(f"there is no request in {args.seconds:g} s: type a larger --rate or --seconds")
    quarter = args.seconds / 4
    scenarios: dict[str, tuple[list[Request], dict[str, Any]]] = {
        "all well": (usual, {}),
        "a hot text": (hot, {}),
        "loads 1 s old": (usual, {"report_us": SECOND}),
        "one is silent": (usual, {"changes": [(quarter, 0, math.inf), (2 * quarter, 0, 1.0)]}),
        "one is slow": (usual, {"changes": [(quarter, 0, 4.0)]}),
    }
    pages = args.kv_tokens // PAGE
    results = {
        (policy, scenario): simulate(requests, make(), args.workers, pages, **what)
        for policy, make in policies(args).items()
        for scenario, (requests, what) in scenarios.items()
    }
    unlimited = simulate(usual, RoundRobin(), args.workers, 10**9).hit_rate
    at_random, one_cache = (predicted_hits(usual, n) for n in (args.workers, 1))

    mean = sum(len(r.prompt) for r in usual) / len(usual)
    say(
        f"requests      {len(usual):,} for {args.workers} workers, {mean:,.0f} tokens each on average"
    )
    say(
        f"shared texts  {args.prefixes} of {args.prefix_tokens:,} tokens; a cache holds {args.kv_tokens:,}"
    )
    say(f"hit rate      {at_random:.3f} predicted for workers at random and caches without limit")
    say(f"              {unlimited:.3f} by round robin then; {one_cache:.3f} if all were one cache")
    say(
        f"{'all is well':22}{'hit rate':>9}{'token work':>12}{'tokens/s':>10}{'first token: p50':>18}{'p99, ms':>9}"
    )
    for policy in policies(args):
        r = results[policy, "all well"]
        work = token_work(usual, r.hit_rate, args)
        say(
            f"{policy:22}{r.hit_rate:9.3f}{work:12.2f}{r.tokens_per_s:10,.0f}"
            f"{r.percentile(0.5):18,.0f}{r.percentile(0.99):9,.0f}"
        )
    say(f"{'first token: p99, ms':22}" + "".join(f"{scenario:>15}" for scenario in scenarios))
    for policy in policies(args):
        row = (results[policy, scenario].percentile(0.99) for scenario in scenarios)
        say(f"{policy:22}" + "".join(f"{p99:15,.0f}" for p99 in row))
    retried, late = (sum(getattr(r, n) for r in results.values()) for n in ("retried", "late"))
    say(f"retries       {retried}; the silent worker's own answers, thrown away: {late}")
    if args.plot:
        draw(results, args.plot)
    affinity, in_turn = (results[p, "all well"] for p in ("prefix affinity", "round robin"))
    return [
        check("requests without an answer", sum(r.lost for r in results.values()), 0),
        check("requests answered twice", sum(r.twice for r in results.values()), 0),
        check("answers thrown away, and retries", late, retried),
        check("error of the predicted hit rate", abs(unlimited - at_random), 0.03),
        check(
            "hit rate of affinity, and of round robin", affinity.hit_rate, in_turn.hit_rate, True
        ),
    ]


def draw(results: dict[tuple[str, str], Result], path: Path) -> None:
    """Left, how many first tokens came by when; right, the longest queue with a hot text."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "ch07"
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for policy in dict.fromkeys(policy for policy, _ in results):
        times = results[policy, "all well"].first_token_ms
        shares = [(i + 1) / len(times) for i in range(len(times))]
        left.plot(times, shares, label=policy)
        open_requests = results[policy, "a hot text"].busiest
        right.plot([i * PROBE_US / SECOND for i in range(len(open_requests))], open_requests)
    left.set_xscale("log")
    left.set_xlabel("first token within, ms (all is well)")
    left.set_ylabel("share of the requests")
    left.legend(fontsize="small")
    right.set_xlabel("virtual seconds (a hot text)")
    right.set_ylabel("open requests of the busiest worker")
    figure.savefig(path, format="svg", metadata={"Date": None})


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--workers", type=int, default=4, help="simulated engines")
    add("--rate", type=float, default=80, help="requests per second, for all workers together")
    add("--seconds", type=float, default=20, help="of virtual time in which requests come")
    add("--prefixes", type=int, default=64, help="shared texts that chats begin with")
    add("--prefix-tokens", type=int, default=2048, help="length of each of them")
    add("--kv-tokens", type=int, default=65536, help="tokens that a worker's cache has room for")
    add("--bound", type=float, default=1.25, help="of prefix affinity: times the mean load")
    add("--seed", type=int, default=0, help="of the trace, and of every random choice")
    add("--plot", type=Path, help="draw first tokens and the longest queue into this SVG file")
    args = parser.parse_args()
    if args.workers < 1:
        stop(f"--workers {args.workers}: type --workers 1, or more")
    largest = args.prefix_tokens + 6 * (192 + 96)
    if args.kv_tokens < largest + PAGE:
        stop(f"--kv-tokens {args.kv_tokens}: the longest chat needs {largest + PAGE}")
    if args.bound < 1:
        stop(f"--bound {args.bound:g}: below 1 there may be no worker left; type 1.25")
    return args


def main() -> None:
    args = parse_args()
    sys.exit(conclude(run(args)))


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


if __name__ == "__main__":
    main()
