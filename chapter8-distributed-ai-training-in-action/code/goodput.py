"""What failures and checkpoints cost a run, against the interval and the size of the fleet.

    python chapter8-distributed-ai-training-in-action/code/goodput.py --plot chapter8-distributed-ai-training-in-action/figures/goodput.svg

It trains for a moment, kills a rank, and goes on: that gives the times of a save and of a restart.
`--times BLOCKED DONE RESTART` gives them instead, in seconds, from your own log.jsonl.

Look at the last two rows of the table: what a save and a restart may cost, and which of them is the
problem. Then at what was reported of two large runs. Section 8.9.
"""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

DAYS = 54  # of a run: as long as what was published of Llama 3
FAILURES = 10_000  # simulated for each cell; small fleets have few, and need many runs
FLEETS = (8, 64, 512, 1_024, 4_096, 16_384, 100_000)
PER_GPU_HOURS = 16_384 * DAYS * 24 / 466  # all interruptions of Llama 3
RATES = (  # accelerators, hours between two interruptions
    ("Llama 3, all 466 interruptions", 16_384, DAYS * 24 / 466),  # arXiv:2407.21783, 3.3.4
    ("Llama 3, the 419 unplanned", 16_384, DAYS * 24 / 419),
    ("Meta's research cluster, seen", 1_024, 7.9),  # arXiv:2410.21680
    ("Meta's research cluster, projected", 16_384, 1.8),
)
REPORTS = (  # accelerators, goodput; the second's failures are not given: Llama 3's rate is taken
    ("Llama 3", 16_384, 0.90),  # "higher than 90 %"
    ("ByteRobust", 9_600, 0.97),  # arXiv:2509.16293, abstract
)
TRAINER = Path(__file__).with_name("train.py")
FLAGS = "--steps 100000 --save-every 2 --log-every 1 --batch 2 --device cpu --resume"


@dataclass(frozen=True)
class Setup:
    """How a run saves and how it starts again, in seconds."""

    name: str
    blocked: float  # the training waits so long for a save
    done: float  # from a save's begin until it can be resumed; not less than `blocked`
    restart: float  # from a failure to the next step: to notice it, to start, to load


ASSUMED = (
    Setup("save blocks", 60, 60, 600),
    Setup("in background", 2, 60, 600),
    Setup("quick restart", 2, 60, 120),
)


def draw_attempts(mtbf: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of each attempt of each run, and whether a failure ended it: two [runs, attempts].

    Failures of many machines, together, are a Poisson process. A run's last attempt ends with it.
    """
    run_s = DAYS * 86_400.0
    expected = run_s / mtbf
    shape = np.clip(FAILURES / expected, 40, 2000), expected + 6 * math.sqrt(expected) + 10
    gaps = np.random.default_rng(seed).exponential(mtbf, [int(size) for size in shape])
    begin = np.cumsum(gaps, axis=1) - gaps
    lengths = np.clip(run_s - begin, 0, gaps)
    return lengths, lengths == gaps


def kept_seconds(
    lengths: np.ndarray, failed: np.ndarray, interval: float, setup: Setup
) -> np.ndarray:
    """Of each attempt, the training that is kept: up to the last save that was done in time."""
    cycle = interval + setup.blocked
    trained = lengths - setup.restart
    saved = np.floor((trained + setup.blocked - setup.done) / cycle) * interval
    whole, rest = np.divmod(np.maximum(trained, 0), cycle)
    at_the_end = whole * interval + np.minimum(rest, interval)  # a run that ends saves
    return np.where(failed, np.maximum(saved, 0), at_the_end)


def simulate(mtbf: float, setup: Setup, intervals: Sequence[float], seed: int) -> np.ndarray:
    """Goodput of each run; the failures are the same for all intervals. [intervals, runs]"""
    attempts = draw_attempts(mtbf, seed)
    kept = [kept_seconds(*attempts, interval, setup).sum(axis=1) for interval in intervals]
    return np.stack(kept) / (DAYS * 86_400)


def predict(mtbf: float, setup: Setup, interval: float) -> float:
    """Goodput in the long run: Daly 2006, doi:10.1016/j.future.2004.11.016, the complete model.

    There a save blocks until it is done. One in the background is lost, with its interval, if a
    failure comes before it is done: that costs as much as a restart that is so much longer.
    """
    late = setup.restart + setup.done - setup.blocked
    cycle = interval + setup.blocked
    return interval / mtbf * math.exp(-late / mtbf) / math.expm1(cycle / mtbf)


def best_intervals(mtbf: float, setup: Setup) -> tuple[float, float]:
    """Young's and Daly's, for saves shorter than twice the mtbf; one save ends before the next.

    Young 1974, doi:10.1145/361147.361115: where saving and doing again cost the same. Daly 2006:
    more terms of the series. Neither depends on the time that a restart takes.
    """
    young = math.sqrt(2 * setup.blocked * mtbf)
    x = math.sqrt(setup.blocked / (2 * mtbf))
    daly = young * (1 + x / 3 + x * x / 9) - setup.blocked
    least = setup.done - setup.blocked
    return max(young, least), max(daly, least)


def row_of(fleet: int, setup: Setup, gpu_hours: float, seed: int) -> dict:
    """The best of 41 intervals for a fleet, what it gives, and what was predicted."""
    mtbf = gpu_hours * 3600 / fleet
    young, daly = best_intervals(mtbf, setup)
    tried = np.append(
        np.maximum(young * np.geomspace(0.2, 5, 41), setup.done - setup.blocked), daly
    )
    goodputs = simulate(mtbf, setup, tried, seed)
    best = int(goodputs[:-1].mean(axis=1).argmax())
    row = {"accelerators": fleet, "setup": setup.name, "mtbf_s": mtbf}
    row |= {"interval_s": float(tried[best]), "daly_s": daly}
    row |= {"goodput": float(goodputs[best].mean()), "at_daly": float(goodputs[-1].mean())}
    row |= {"predicted": predict(mtbf, setup, tried[best])}
    return row | {"low_high": np.quantile(goodputs[best], [0.05, 0.95]).tolist()}


def run(args: argparse.Namespace) -> list[bool | None]:
    ours = Setup("given by --times", *args.times) if args.times else measure()
    show_rates()
    say(f"\n{'seconds':34}{'blocked':>12}{'done after':>12}{'restart':>9}")
    for setup in (*ASSUMED, ours):
        name = f"{setup.name}, assumed" if setup in ASSUMED else setup.name
        say(f"{name:34}{setup.blocked:>12.3f}{setup.done:>12.2f}{setup.restart:>9.1f}")

    say(f"\ngoodput of runs of {DAYS} days; minutes between saves, the best found and Daly's")
    say(" " * 22 + "".join(f"{setup.name:>24}" for setup in ASSUMED))
    say(
        f"{'accelerators':>12}{'fails in':>10}" + f"{'%':>10}{'found':>7}{'Daly':>7}" * len(ASSUMED)
    )
    rows = []
    for fleet in FLEETS:
        line = f"{fleet:>12,}{args.gpu_hours / fleet:>8,.1f} h"
        for setup in ASSUMED:
            rows.append(row_of(fleet, setup, args.gpu_hours, args.seed))
            minutes = f"{rows[-1]['interval_s'] / 60:>7,.1f}{rows[-1]['daly_s'] / 60:>7,.1f}"
            line += f"{rows[-1]['goodput']:>10.1%}{minutes}"
        say(line)
    rows.append(row_of(FLEETS[-1], ours, args.gpu_hours, args.seed))
    seconds = f"{rows[-1]['interval_s']:.1f} s found, {rows[-1]['daly_s']:.1f} s by Daly"
    say(f"{ours.name}, on {FLEETS[-1]:,} of them: {rows[-1]['goodput']:.1%}, {seconds}")
    difference = max(abs(row["goodput"] - row["predicted"]) for row in rows)
    regret = max(row["goodput"] - row["at_daly"] for row in rows)
    claims: list[bool | None] = [
        check("goodput simulated, and by Daly's formula: largest difference", difference, 0.01),
        check("goodput lost by the interval that Daly predicts", regret, 0.003),
    ]
    claims += compare_with_reports(args.seed)
    if args.plot:
        plot(rows, args)
    if args.json:
        args.json.write_text(json.dumps({"ours": vars(ours), "rows": rows}, indent=1) + "\n")
    return claims


def show_rates() -> None:
    """Hours between interruptions, and what one accelerator would last: not one rate for all."""
    say(f"{'published':34}{'GPUs':>7}{'hours between':>15}{'GPU-hours for one':>19}")
    for name, gpus, hours in RATES:
        say(f"{name:34}{gpus:>7,}{hours:>15.2f}{gpus * hours:>19,.0f}")
    (_, small, seen), (_, large, projected) = RATES[-2:]
    on_the_line = seen * small / large
    say(f"{seen} h at {small:,} would be {on_the_line:.2f} h at {large:,} by 1/N, not {projected}")


def compare_with_reports(seed: int) -> list[bool | None]:
    """What one interruption may have cost where a goodput was reported, and which set-up does."""
    names = "".join(f"{setup.name:>15}" for setup in ASSUMED)
    say(f"\n{'reported':12}{'GPUs':>7}{'goodput':>9}{'minutes each':>14}{names}")
    claims: list[bool | None] = []
    for name, gpus, reported in REPORTS:
        found = [row_of(gpus, setup, PER_GPU_HOURS, seed)["goodput"] for setup in ASSUMED]
        simulated = "".join(f"{goodput:>15.1%}" for goodput in found)
        lost = (1 - reported) * PER_GPU_HOURS * 60 / gpus
        say(f"{name:12}{gpus:>7,}{reported:>9.0%}{lost:>14.1f}{simulated}")
        claims.append(check(f"goodput if saves block, and {name}'s", found[0], reported))
        claims.append(check(f"goodput of quick restarts, and {name}'s", found[2], reported, True))
    return claims


def measure() -> Setup:
    """Train on two ranks, kill one, let torchrun start both again; from the run's log.jsonl."""
    say("measuring: train.py on 2 ranks saves, loses one, and starts again\n")
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "run" / "log.jsonl"
        launcher = "-m torch.distributed.run --standalone --nproc_per_node=2 --max-restarts=1"
        with (Path(folder) / "output").open("w") as output:
            torchrun = subprocess.Popen(
                [sys.executable, *launcher.split(), TRAINER, *FLAGS.split(), "--out", log.parent],
                env=os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},  # section 3.7
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            saves = wait_for("save", 3, log, torchrun)
            killed = time.time()
            os.kill(wait_for("start", 1, log, torchrun)[0]["pids"][-1], signal.SIGKILL)
            step = wait_for("step", 1, log, torchrun, after=killed)[0]
        finally:
            torchrun.terminate()
            torchrun.wait()
    blocked, done = (float(np.median([save[k] for save in saves])) for k in ("blocked_s", "done_s"))
    return Setup("this trainer, 2 ranks here", blocked, max(blocked, done), step["time"] - killed)


def wait_for(
    kind: str, count: int, log: Path, trainer: subprocess.Popen, after: float = 0
) -> list[dict]:
    """So many events of a kind in the log; the trainer's last line where it ends before."""
    while trainer.poll() is None:
        lines = log.read_text().split("\n")[:-1] if log.exists() else []  # whole ones
        found = [e for e in map(json.loads, lines) if e["event"] == kind and e["time"] > after]
        if len(found) >= count:
            return found
        time.sleep(0.02)
    output = (log.parent.parent / "output").read_text().strip().splitlines()
    stop(f"train.py has ended: {output[-1] if output else 'without a word'}")


def plot(rows: list[dict], args: argparse.Namespace) -> None:
    """Goodput over the size of the fleet, and over the interval for two of the sizes."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "ch08"
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for setup in ASSUMED:
        own = [row for row in rows if row["setup"] == setup.name]
        label = f"{setup.name}: {setup.blocked:g} s blocked, restart {setup.restart / 60:g} min"
        left.plot(FLEETS, [100 * row["goodput"] for row in own], ".-", label=label)
        left.fill_between(FLEETS, *(100 * np.array([row["low_high"] for row in own]).T), alpha=0.2)
    for marker, (name, gpus, reported) in zip("*P", REPORTS, strict=True):
        left.plot(gpus, 100 * reported, f"k{marker}", markersize=9, label=f"{name}, as reported")
    left.set(xscale="log", xlabel="accelerators", ylabel="goodput, %", ylim=(40, 102))
    left.legend(loc="lower left", fontsize=8)
    for color, fleet in (("C0", 16_384), ("C3", 100_000)):
        mtbf = args.gpu_hours * 3600 / fleet
        best, _ = best_intervals(mtbf, ASSUMED[0])
        intervals = best * np.geomspace(0.1, 10, 25)
        found = 100 * simulate(mtbf, ASSUMED[0], intervals, args.seed).mean(axis=1)
        formula = [100 * predict(mtbf, ASSUMED[0], interval) for interval in intervals]
        right.plot(intervals / 60, formula, color, label=f"{fleet:,}: Daly's formula")
        right.plot(intervals / 60, found, ".", color=color, label=f"{fleet:,}: simulated")
        right.axvline(best / 60, color=color, linestyle=":", label="Young's interval")
    right.set(xscale="log", xlabel="minutes between saves that block", ylim=(0, 119))
    right.legend(loc="upper center", ncols=2, fontsize=8)
    figure.savefig(args.plot, metadata={"Date": None})


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--times", type=float, nargs=3, metavar="SECONDS", help="BLOCKED DONE RESTART; not measured"
    )
    parser.add_argument(
        "--gpu-hours", type=float, default=PER_GPU_HOURS, help="of one GPU between interruptions"
    )
    parser.add_argument("--seed", type=int, default=0, help="for the failures")
    parser.add_argument("--plot", type=Path, help="draw the figure to this file (.svg)")
    parser.add_argument("--json", type=Path, help="write the table to this file")
    args = parser.parse_args()
    blocked, done, restart = args.times or (1, 1, 0)
    if not 1000 <= args.gpu_hours < math.inf:
        stop(
            f"--gpu-hours {args.gpu_hours:g}: type 1000 or more, for with less a large fleet only restarts"
        )
    if not (0 < blocked <= done < math.inf and 0 <= restart < math.inf):
        stop("--times: 0 < BLOCKED <= DONE, and 0 <= RESTART: type --times 2 60 600")
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
