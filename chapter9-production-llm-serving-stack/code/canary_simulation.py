"""Rollouts that are looked at all the time, thousands at once: how often is a good canary lost?

A module of ch09_canary_deployment.py. Section 9.7.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np
from canary_judge import PROMOTE, WAIT, Plan, decide, evidence_worse

STEP_REQUESTS = 3000  # of all users in a step, for the rules that have no end of their own
CHECKS = 10  # in a step, for the rule with a limit
FAILED_CHECKS = 5  # that end a rollout by that rule: as in Flagger's example


@dataclass(frozen=True)
class Rates:
    """Shares of a version's requests that fail, and that are answered late."""

    failed: float
    late: float


def simulate(
    plan: Plan, canary: Rates, baseline: Rates, rollouts: int, draw: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Rollouts that are judged after every failed or late request.

    Returns their verdicts: [rollouts], and the requests of both arms in each step: [rollouts, steps].
    """
    steps = len(plan.shares) - 1
    rates = np.array([canary.failed, baseline.failed, canary.late, baseline.late])
    verdicts = np.full(rollouts, PROMOTE)
    requests = np.zeros((rollouts, steps), int)
    for step in range(steps):
        rows = np.flatnonzero(verdicts == PROMOTE)  # all that have not ended in an earlier step
        asked = np.zeros((len(rows), 1), int)
        counts = np.zeros((4, len(rows), 1), int)
        while len(rows):
            size = (len(rows), max(16, 100_000 // len(rows)))
            asked = asked + draw.geometric(rates.sum() / 2, size).cumsum(1)  # to the next event
            kind = np.searchsorted(rates.cumsum() / rates.sum(), draw.random(size), side="right")
            counts = counts + np.stack([(kind == i).cumsum(1) for i in range(4)])
            failed = (counts[0], counts[1])
            late = (counts[0] + counts[2], counts[1] + counts[3])  # a failure is not in time either
            verdict = decide(plan, step, asked, failed, late)  # [rows, events]
            first = (verdict != WAIT).argmax(1)
            every = np.arange(len(rows))
            found = verdict[every, first]
            done = found != WAIT
            verdicts[rows[done]] = found[done]
            requests[rows[done], step] = asked[every, first][done]
            rows = rows[~done]
            asked = asked[~done, -1:]
            counts = counts[:, ~done, -1:]
    return verdicts, requests


def rolled_back_otherwise(
    plan: Plan, canary: float, baseline: float, rollouts: int, draw: np.random.Generator
) -> list[float]:
    """Shares of rollouts that three other rules end, which see errors only and have STEP_REQUESTS:
    a z-test at every failure, one at each step's end, and a limit at twice the baseline's rate.
    """
    steps = len(plan.shares) - 1
    peeked, once = np.zeros((2, rollouts), bool)
    failed_checks = np.zeros(rollouts, int)
    for share in plan.shares[:-1]:
        arm = int(share * STEP_REQUESTS)
        rate = (canary + baseline) / 2
        events = 2 * arm * rate
        size = (rollouts, int(events + 6 * math.sqrt(events) + 6))
        asked = draw.geometric(rate, size).cumsum(1)
        of_canary = (draw.random(size) < canary / (canary + baseline)).cumsum(1)
        z = z_score(asked / 2, of_canary, np.arange(1, size[1] + 1) - of_canary)
        looked_at = (asked >= 2 * plan.minimum) & (asked <= 2 * arm)
        peeked |= (looked_at & (z > NormalDist().inv_cdf(1 - plan.alpha))).any(1)
        at_end = draw.binomial(arm, [[canary], [baseline]], (2, rollouts))
        once |= z_score(arm, *at_end) > NormalDist().inv_cdf(1 - plan.alpha / steps)
        errors = draw.binomial(arm // CHECKS, canary, (rollouts, CHECKS))
        failed_checks += (errors > 2 * baseline * (arm // CHECKS)).sum(1)
    return [peeked.mean(), once.mean(), (failed_checks >= FAILED_CHECKS).mean()]


def z_score(arm: np.ndarray | int, canary: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    """Two counts of failures out of `arm` requests each, with the pooled variance."""
    both = canary + baseline
    variance = both * (1 - both / (2 * np.asarray(arm)))
    return (canary - baseline) / np.sqrt(np.maximum(variance, 1e-9))


def alarms_from_few_users(
    alpha: float, rollouts: int, draw: np.random.Generator
) -> tuple[float, float]:
    """False alarms where all failures are those of 10 users whose prompts fail in either arm, and
    who stay in theirs: counted by request, and by user.
    """
    users = 10
    failures = 400
    in_canary = draw.random((rollouts, users)) < 0.5
    who = draw.integers(users, size=(rollouts, failures))
    of_canary = np.take_along_axis(in_canary, who, 1).cumsum(1)
    by_request = evidence_worse(of_canary, np.arange(1, failures + 1) - of_canary)
    first = in_canary.cumsum(1)  # each one's first failure; they may come in any order
    by_user = evidence_worse(first, np.arange(1, users + 1) - first)
    alarm = math.log(1 / alpha)
    return (by_request >= alarm).any(1).mean(), (by_user >= alarm).any(1).mean()


def plot(path: Path, table: dict[float, list[float]]) -> None:
    """Power over effect size: shares rolled back by each rule, over the canary's error rate."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "ch09"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.5, 3.6), layout="tight")
    labels = (
        "the bet, at every failure",
        "z-test, at every failure",
        "z-test, once a step",
        "limit at twice the baseline's rate",
    )
    for i, label in enumerate(labels):
        shares = [100 * row[i] for row in table.values()]
        axes.plot([100 * rate for rate in table], shares, "o-" if i == 0 else ".--", label=label)
    axes.axhline(5, color="gray", linewidth=0.8)
    axes.set_xlabel("canary's error rate, % (the baseline's is 1 %)")
    axes.set_ylabel("rollouts rolled back, %")
    axes.legend(frameon=False, loc="center right")
    figure.savefig(path, format="svg", facecolor="white", metadata={"Date": None})
