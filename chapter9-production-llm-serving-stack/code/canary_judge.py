"""What to do with a canary, given the counts so far: wait, promote, roll back, or ask a person.

A module of ch09_canary_deployment.py; it may be asked after every request. Section 9.7.
"""

import math
from dataclasses import dataclass

import numpy as np

WAIT, PROMOTE, ROLL_BACK, HOLD = range(4)
VERDICTS = ("undecided", "promoted", "rolled back", "held")
BETS = np.arange(0.1, 1, 0.2)  # shares of the capital that are staked, one gambler each


@dataclass(frozen=True)
class Plan:
    """The steps, and what is promised on the way."""

    shares: tuple[float, ...] = (0.01, 0.05, 0.25, 0.5, 1.0)  # of the traffic; at 1 it is over
    alpha: float = 0.05  # how often a canary that is no worse may be rolled back
    failed_budget: float = 0.01  # of all requests: what a canary may fail more than the old version
    late_budget: float = 0.05  # the same for answers that are late, or fail
    minimum: int = 20  # requests of each arm in a step before a promotion
    patience: int = 50_000  # requests of all users in a step before a person is asked

    def margins(self, step: int) -> tuple[float, float]:
        """By how much the canary's rates may be worse: times its next share that is the budget."""
        budgets = (self.failed_budget, self.late_budget)
        failed, late = (min(budget / self.shares[step + 1], 1.0) for budget in budgets)
        return failed, late


def wealth(*paid: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Logarithm of the gamblers' mean wealth: pairs of a count, and each one's factor so often."""
    logs = sum(np.multiply.outer(np.log(factors), count) for count, factors in paid)
    top = logs.max(0)  # [gamblers, ...] -> [...]
    return top + np.log(np.exp(logs - top).mean(0))


def evidence_worse(canary: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    """Logarithm of what gamblers have who bet, at each failure, that it is the canary's.

    Both arms get equal shares of the traffic, at random. If the canary is no worse, a failure is
    the canary's with probability 1/2 at most, and nobody's wealth grows on average: it ever reaches
    w times the stake with probability 1 / w at most (Ville 1939; Waudby-Smith and Ramdas 2024).
    """
    return wealth((canary, 1 + BETS), (baseline, 1 - BETS))


def evidence_harmless(
    requests: np.ndarray, canary: np.ndarray, baseline: np.ndarray, margin: float
) -> np.ndarray:
    """The same for gamblers who bet that the canary's rate is less than `margin` above the
    baseline's: a request of either arm counts 1 for a failure of the canary, -1 for one of the
    baseline, else 0, and its mean is half the difference of the rates.
    """
    mean = margin / 2
    return wealth(
        (requests - canary - baseline, 1 + BETS * mean),
        (canary, 1 + BETS * (mean - 1)),
        (baseline, 1 + BETS * (mean + 1)),
    )


def decide(
    plan: Plan,
    step: int,
    requests: np.ndarray,
    failed: tuple[np.ndarray, np.ndarray],
    late: tuple[np.ndarray, np.ndarray],
) -> np.ndarray:
    """The verdict on a step's counts: requests of both arms, and pairs (canary's, baseline's).

    The mean of two gamblers' wealth is wealth as well, so the second measure costs a factor of 2;
    each step is a new game, and the steps share alpha.
    """
    worse = np.logaddexp(evidence_worse(*failed), evidence_worse(*late)) - math.log(2)
    margins = plan.margins(step)
    proof = math.log(1 / plan.alpha)
    harmless = (
        (requests >= 2 * plan.minimum)
        & (evidence_harmless(requests, *failed, margins[0]) >= proof)
        & (evidence_harmless(requests, *late, margins[1]) >= proof)
    )
    held = requests > plan.patience * 2 * plan.shares[step]
    verdict = np.where(harmless, PROMOTE, np.where(held, HOLD, WAIT))
    games = len(plan.shares) - 1
    return np.where(worse >= math.log(games / plan.alpha), ROLL_BACK, verdict)


def is_uneven(canary: float, baseline: float) -> bool:
    """Whether the arms do not get equal shares, by the same bets; by chance once in 10,000."""
    either = np.logaddexp(evidence_worse(canary, baseline), evidence_worse(baseline, canary))
    return bool(either - math.log(2) >= math.log(10_000))
