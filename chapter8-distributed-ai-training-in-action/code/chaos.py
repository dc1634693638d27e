"""Break train.py on purpose while it trains, and see who notices, when, and what is lost.

    python chapter8-distributed-ai-training-in-action/code/chaos.py --plot chapter8-distributed-ai-training-in-action/figures/chaos.svg

On GPUs:
    python chapter8-distributed-ai-training-in-action/code/chaos.py --faults all --ranks 8 --device cuda --dp-shard -1 --width 1024 --heads 16 --hidden 2816 --context 256 --batch 64 --timeout 30

Each fault strikes a rank and a step that --seed chooses; then the same command goes on with --resume.
The trainer has no code for any of it. Look at the seconds until a log says what is wrong, and at
the last column. --faults all adds four more. Flags that are not in --help go to train.py. Section 8.8.
"""

import argparse
import json
import os
import resource
import shutil
import signal
import sys
import textwrap
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from job import Job
from launch import check, conclude, say, stop


def killed(job: Job) -> tuple[float, str]:
    """A rank is gone: out of memory, or its node is. With --kills more than once, at random."""
    for kill in range(job.args.kills):
        job.start()
        if kill:
            first = job.reached()
            job.step = job.draw.randrange(first + 1, first + 2 * job.args.save_every)
        job.until_step(job.step)
        time.sleep(job.draw.random() * 0.02)  # anywhere in a step, or in a save
        job.strike()
        job.signal(signal.SIGKILL, job.rank)
        found = job.noticed("lost another")
        if kill + 1 < job.args.kills:
            job.wait()
    return found


def frozen(job: Job) -> tuple[float, str]:
    """A rank stands still and does not die: a driver, or a disk, that does not answer."""
    job.start("--timeout", str(job.args.timeout))
    job.until_step(job.step)
    job.strike()
    job.signal(signal.SIGSTOP, job.rank)
    return job.noticed("lost another")


def sigterm(job: Job) -> tuple[float, str]:
    """Somebody ends one process politely. The others must not wait for it."""
    job.start()
    job.until_step(job.step)
    job.strike()
    job.signal(signal.SIGTERM, job.rank)
    return job.noticed(r"stopped by SIGTERM")


def sigterm_all(job: Job) -> tuple[float, str]:
    """The job's time is up: Slurm signals every process, the loader's workers too."""
    job.start("--workers", "2")
    job.until_step(job.step)
    job.strike()
    job.signal(signal.SIGTERM, *job.reap(), groups=True)
    return job.noticed(r"stopped by SIGTERM")


def slow(job: Job) -> tuple[float, str]:
    """A rank gets a quarter of its time: a hot GPU, a neighbour on the node."""
    job.step = 5
    job.start("--log-every", "5")
    job.until_step(job.step)
    job.strike()
    begin = time.monotonic()

    def named() -> str:
        for event in job.events("step"):
            slowest_s, median_s = event["slowest_s"], event["median_s"]
            struck = event["step"] > 10 and event["slowest_rank"] == job.rank
            if struck and slowest_s > 2 * median_s:
                took = f"{slowest_s:.3f} s a step, the median is {median_s:.3f} s"
                return f"log.jsonl at step {event['step']}: slowest_rank {job.rank}, {took}"
        return ""

    while job.reap() and not named():
        job.signal(signal.SIGSTOP, job.rank)
        time.sleep(0.012)
        job.signal(signal.SIGCONT, job.rank)
        time.sleep(0.004)
    return time.monotonic() - begin, named()


def nan(job: Job) -> tuple[float, str]:
    """One gradient of one rank is not a number: an overflow, a bad sample, a sick device."""
    poisoned = job.folder / "poisoned"

    def poison(rank: int) -> None:
        usual = F.cross_entropy
        losses = []

        def cross_entropy(*args: torch.Tensor, **kwargs: str) -> torch.Tensor:
            loss = usual(*args, **kwargs)
            if loss.requires_grad and rank == job.rank:
                losses.append(loss)
                if len(losses) == job.step:
                    loss.register_hook(lambda gradient: gradient * float("nan"))
                    poisoned.touch()
            return loss

        F.cross_entropy = cross_entropy

    job.start(before=poison)
    job.until(poisoned.exists)
    job.strike()
    return job.noticed(r"not finite|is nan")


def torn(job: Job) -> tuple[float, str]:
    """The power fails, and the file system has lost the end of the newest checkpoint."""
    job.start()
    job.until_step(job.step)
    job.strike()
    job.signal(signal.SIGKILL, *job.reap())
    job.wait()
    newest = max(job.checkpoints())
    largest = max(newest.rglob("*.distcp"), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    begin = time.monotonic()
    job.start()
    job.wait()
    seconds = time.monotonic() - begin
    line = job.said(newest.name)
    shutil.rmtree(newest)  # the line says that it is in the way
    return seconds, line


def full_disk(job: Job) -> tuple[float, str]:
    """No file may grow beyond 64 KiB any more: a log can go on, a checkpoint cannot."""
    job.start()
    job.until_step(job.step)
    job.strike()
    for pid in job.pids:
        _, most = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (2**16, most))
    return job.noticed(r"not saved")


FAULTS = {
    "killed": killed,
    "frozen": frozen,
    "sigterm": sigterm,
    "torn": torn,
    "sigterm-all": sigterm_all,
    "slow": slow,
    "nan": nan,
    "full-disk": full_disk,
}


def undisturbed(job: Job) -> dict[str, torch.Tensor]:
    """What every other run must end with, bit for bit."""
    args = job.args
    begin = time.monotonic()
    job.start()
    job.wait()
    if not (wanted := job.final()):
        last = job.text(job.logs[0]).strip().rpartition("\n")[2]
        stop(f"train.py does not get through without a fault: {last or job.logs[0]}")
    seconds = time.monotonic() - begin
    say(f"undisturbed: {args.steps} steps, saved every {args.save_every}, in {seconds:.1f} s")
    return wanted


def run(args: argparse.Namespace) -> list[bool | None]:
    jobs = {name: Job(name, args) for name in ("undisturbed", *args.faults)}
    rows = []
    try:
        wanted = undisturbed(jobs["undisturbed"])
        say(
            f"{'fault':<12}{'rank':>5}{'step':>6}{'noticed':>10}{'exits':>9}{'lost':>6}  at the end"
        )
        for name in args.faults:
            job = jobs[name]
            noticed_s, line = FAULTS[name](job)
            exits = job.wait()
            if not (got := job.final()):
                job.start()
                job.wait()
                got = job.final()
            other = [k for k in wanted if k not in got or not torch.equal(wanted[k], got[k])]
            row = {"fault": name, "rank": job.rank, "step": job.step, "noticed_s": noticed_s}
            row |= {"line": line, "exits": exits, "lost": job.lost, "other": other}
            rows.append(row | {"left": job.left})
            result = f"{len(other)} of {len(wanted)} tensors differ" if other else "identical"
            say(
                f"{name:<12}{job.rank:>5}{job.step:>6}{noticed_s:>8.2f} s{exits:>9}"
                f"{sum(job.lost):>6}  {result}"
            )
            say(f"    {textwrap.shorten(line, 96, placeholder=' ...') or 'no log says anything'}")
    finally:
        for job in jobs.values():
            job.kill()
    if args.plot:
        plot(jobs, args.plot)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    seconds_of = {row["fault"]: row["noticed_s"] for row in rows}
    late = [seconds_of.get("killed", 0), seconds_of.get("frozen", args.timeout) - args.timeout]
    stopped = [row for row in rows if row["fault"].startswith("sigterm")]
    return [
        check("faults that no log names", sum(not row["line"] for row in rows), 0),
        check("runs that end with other bits", sum(bool(row["other"]) for row in rows), 0),
        check("resumes not from the newest checkpoint", sum(j.astray for j in jobs.values()), 0),
        check("steps lost to SIGTERM", sum(sum(row["lost"]) for row in stopped), 0),
        check("processes that outlive their rank", sum(job.left for job in jobs.values()), 0),
        expect(
            "seconds beyond the timeout until a dead rank is noticed", max(late), 1, args.strict
        ),
    ]


def plot(jobs: dict[str, Job], path: Path) -> None:
    """Steps over time: a cross where the fault struck, and a fall where steps were lost."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "ch08"
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7.5, 3.8), layout="tight")
    for name, job in jobs.items():
        events = [json.loads(line) for line in job.log.read_text().splitlines() if line]
        places = [(e["time"], e["step"]) for e in events if e["event"] in ("start", "step")]
        first, _ = places[0]
        times, steps = zip(*((t - first, step) for t, step in places), strict=True)
        color = "#777" if name == "undisturbed" else None
        (line,) = axis.step(times, steps, color=color, label=name, where="post")
        for when, step in job.strikes:
            axis.plot(when - first, step, "x", color=line.get_color(), ms=9, mew=2)
    axis.set(xlabel="seconds since the first start", ylabel="optimizer steps done")
    axis.legend(frameon=False)
    figure.savefig(path, format="svg", facecolor="white", metadata={"Date": None})


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--faults", nargs="+", choices=[*FAULTS, "all"], default=[*FAULTS][:4], help="one by one")
    add("--kills", type=int, default=1, help="how often `killed` strikes its run")
    add("--ranks", type=int, default=2, help="processes, all on this machine")
    add("--steps", type=int, default=40, help="optimizer steps of each run")
    add("--save-every", type=int, default=8, help="steps between checkpoints")
    add(
        "--timeout", type=float, default=3, help="seconds until a collective gives up, for `frozen`"
    )
    add("--seed", type=int, default=0, help="for which rank is struck, and at which step")
    add("--data", type=Path, default="runs/ch08_data", help="prepare_data.py's folder")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--out", type=Path, default="runs/ch08_chaos", help="its folders of faults are made anew")
    add("--plot", type=Path, help="draw steps over time to this SVG file")
    add("--json", type=Path, help="write the table to this file")
    add("--strict", action="store_true", help="exit 1 if an `expect:` line does not hold")
    args, args.more = parser.parse_known_args()
    if "all" in args.faults:
        args.faults = [*FAULTS]
    if args.ranks < 2 or args.steps < 2 * args.save_every + 5:
        stop("it takes --ranks 2 or more, and --steps of more than twice --save-every, plus 4")
    if args.kills < 1:
        stop(f"--kills {args.kills}: type 1 or more")
    return args


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)  # a fork inherits no pool of threads
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the ranks too, in `finally`
    sys.exit(conclude(run(args)))


# --- copied from other scripts; `make copies` keeps it equal to them ------------------------------


# Copied from ch01_single_gpu_baseline.expect
def expect(
    claim: str, value: float, bound: float, strict: bool, at_least: bool = False
) -> bool | None:
    """Print whether a value that depends on the machine keeps its bound; judge it if `strict`."""
    held = bool(value >= bound if at_least else value <= bound)
    verdict = "ok" if held else "not here"
    say(f"expect: {claim} = {value:.3g} {'>=' if at_least else '<='} {bound:.3g}  {verdict}")
    return held if strict else None


if __name__ == "__main__":
    main()
