"""The laws are fitted exactly, the ranks train as one, and what cannot be measured is refused."""

import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import mutants
import pytest
import warm
from book import CHAPTERS

CODE = f"{CHAPTERS[9]}/code"
SCRIPT = warm.ROOT / CODE / "ch10_scaling_efficiency.py"
SMALL = "--rounds 2 --width 32 --layers 1 --context 32"
Run = Callable[..., warm.Result]

script = warm.load("ch10_scaling_efficiency", SCRIPT)


@pytest.mark.parametrize("ranks", [(2,), (2, 4), (2, 3, 8, 64)])
@pytest.mark.parametrize("s", [0.0, 1e-5, 0.1, 1.0])
def test_laws_of_one_parameter_are_found_in_exact_data(ranks: tuple[int, ...], s: float) -> None:
    assert script.fit_amdahl({n: s + (1 - s) / n for n in (1, *ranks)}) == pytest.approx(
        s, abs=1e-12
    )
    assert script.fit_gustafson({n: n - s * (n - 1) for n in (1, *ranks)}) == pytest.approx(
        s, abs=1e-12
    )
    assert script.amdahl(4, s) == pytest.approx(1 / (s + (1 - s) / 4))


@pytest.mark.parametrize("ranks", [(2, 4), (2, 3, 4), (2, 4, 8, 16, 32)])
@pytest.mark.parametrize(("a", "b"), [(0.05, 0.001), (0.3, 0.0), (0.0, 0.02), (0.0, 0.0)])
def test_usl_is_found_in_exact_data(ranks: tuple[int, ...], a: float, b: float) -> None:
    speedup = {n: script.usl(n, a, b) for n in (1, *ranks)}
    assert script.fit_usl(speedup) == pytest.approx((a, b), abs=1e-12)


def test_usl_below_zero_is_the_best_on_the_edge() -> None:
    """Faster than perfect: no contention below 0; and the sum of squares is the least there is."""
    assert script.fit_usl({1: 1.0, 2: 2.2, 4: 4.4}) == (0.0, 0.0)
    speedup = {1: 1.0, 2: 1.5, 4: 3.9}
    a, b = script.fit_usl(speedup)
    assert min(a, b) == 0

    def squares(x: float, y: float) -> float:
        return sum((n / s - 1 - x * (n - 1) - y * n * (n - 1)) ** 2 for n, s in speedup.items())

    grid = [i / 500 for i in range(300)]
    assert squares(a, b) <= min(squares(x, y) for x in grid for y in grid) + 1e-9


def test_the_peak_is_where_the_law_turns() -> None:
    peak = script.usl_peak(0.05, 0.002)
    assert script.usl(peak, 0.05, 0.002) > script.usl(0.95 * peak, 0.05, 0.002)
    assert script.usl(peak, 0.05, 0.002) > script.usl(1.05 * peak, 0.05, 0.002)
    assert script.usl_peak(0.1, 0.0) == float("inf")


def test_two_points_of_a_cluster_give_the_share() -> None:
    """What section 10.2 says of Megatron's two numbers."""
    s = script.share_between(*script.MEGATRON.items())
    efficiency = {n: 1 / (1 + s * (n - 1)) for n in script.MEGATRON}
    assert efficiency[4608] / efficiency[96] == pytest.approx(42 / 47)
    assert 1e6 * s == pytest.approx(26, abs=1)
    assert 1 + 1 / s == pytest.approx(37_800, rel=0.01)


def test_one_rank_alone_has_a_speedup_of_one() -> None:
    assert script.amdahl(1, 0.3) == pytest.approx(1)
    assert script.usl(1, 0.3, 0.1) == 1


@pytest.mark.full
def test_intervals_hold_the_truth() -> None:
    """Of 300 pairs of 15 noisy times, the true ratio of medians is inside for at least 88 %."""
    draw = random.Random(10)
    held = 0
    for seed in range(300):
        one = [2.0 * draw.lognormvariate(0, 0.1) for _ in range(15)]
        many = [1.0 * draw.lognormvariate(0, 0.1) for _ in range(15)]
        middle, low, high = script.interval(one, many, 0.5, seed, draws=400)
        assert low <= middle <= high
        held += low <= 1.0 <= high
    assert held >= 0.88 * 300


def test_any_numbers_of_ranks_train_as_one(run: Run, tmp_path: Path) -> None:
    result = run(f"python {CODE}/{SCRIPT.name} --ranks 2 3 {SMALL} --json {tmp_path}/a.json")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "all 2 checks ok" in result.stdout
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["ranks"] == [1, 2, 3]
    assert {n: len(v) for n, v in content["strong_s"].items()} == {"1": 2, "2": 2, "3": 2}
    assert re.search(r"largest difference of a weight from one rank's = \S+e-1\d <=", result.stdout)


@pytest.mark.full
@pytest.mark.parametrize("ranks", [1, 3])
def test_under_a_launcher(run: Run, ranks: int) -> None:
    result = run(f"torchrun --nproc_per_node={ranks} {CODE}/{SCRIPT.name} {SMALL} --seed 20260101")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "all 2 checks ok" in result.stdout
    assert result.stdout.count("checks ok") == 1


MUTANTS = {
    "a mean that forgets its factor": ("(loss * self.size)", "loss"),
    "a mean of means": ("windows[:, 1:].numel()", "(share[:, 1:].numel() * self.size)"),
    "every rank on the same share": (
        "windows[dist.get_rank() :: self.size]",
        "windows[:: self.size]",
    ),
    "a loss of this rank alone": ("        dist.all_reduce(loss, group=self.group)\n", ""),
}


@pytest.mark.full
def test_mutants() -> None:
    flags = f"--ranks 1 2 {SMALL}"
    cases = [(flags, right, wrong) for right, wrong in MUTANTS.values()]
    failed = mutants.failed_claims(SCRIPT, 2, [(flags, "", ""), *cases])
    assert failed[0] == set()
    for name, lines in zip(MUTANTS, failed[1:], strict=True):
        assert lines, name


@pytest.mark.full
@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--ranks 0 2", "give 1 or more"),
        ("--ranks 16", "a window in --batch for each"),
        ("--width 100 --heads 3", "is no multiple of 2 x --heads 3"),
        ("--rounds 1", "give --rounds 2 or more"),
        ("--data none.txt --ranks 1", "give a text file with --data FILE"),
        ("--device cuda --ranks 2", "2 ranks, but 0 GPUs here"),
    ],
)
def test_bad_input_gets_one_line(run: Run, flags: str, says: str) -> None:
    result = run(f"python {CODE}/{SCRIPT.name} {flags}", timeout=60)
    if "cuda" in flags and "0 GPUs" not in result.stderr:
        pytest.skip("needs a machine without a GPU")
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert says in result.stderr


@pytest.mark.full
def test_more_ranks_than_there_are(run: Run) -> None:
    result = run(f"torchrun --nproc_per_node=2 {CODE}/{SCRIPT.name} --ranks 4", timeout=60)
    assert result.returncode not in (0, warm.TIMED_OUT)
    assert "--ranks 4, but there are 2" in result.stderr
