"""What Slurm tells each task that srun starts, and what ranks need: read, checked, and handed on to a script.

    python chapter8-distributed-ai-training-in-action/code/slurm_env.py

So it explains three nodes' variables, recorded from a real Slurm. In a job, behind srun,

    srun --nodes=2 --ntasks-per-node=2 python .../slurm_env.py
    srun --nodes=2 --ntasks-per-node=8 --cpus-per-task=8 python .../slurm_env.py .../train.py --device cuda

the first lets the tasks meet and prints who they are, and the second starts a script that knows only
torchrun's variables: one process for each task, and no torchrun. Compare the two columns. Section 8.7.
"""

import argparse
import os
import re
import sys
from collections.abc import Mapping
from typing import NoReturn

STEP = {  # the variables that all tasks of one step had: Slurm 22.05.8, 2026-11-29
    "SLURM_JOB_ID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "5",
    "SLURM_STEP_NODELIST": "gpu[07-08,12]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_GPUS_ON_NODE": "2",
    "SLURM_CPUS_PER_TASK": "8",
}
TASKS = [  # and those that each had of its own: SLURM_PROCID, NODEID, LOCALID, SLURMD_NODENAME
    ("0", "0", "0", "gpu07"),
    ("1", "0", "1", "gpu07"),
    ("2", "1", "0", "gpu08"),
    ("3", "1", "1", "gpu08"),
    ("4", "2", "0", "gpu12"),
]
OWN = ("SLURM_PROCID", "SLURM_NODEID", "SLURM_LOCALID", "SLURMD_NODENAME")
FROM = {  # a rank's variable: the task's that it comes from
    "RANK": "SLURM_PROCID",
    "WORLD_SIZE": "SLURM_NTASKS",
    "GROUP_RANK": "SLURM_NODEID",
    "LOCAL_RANK": "SLURM_LOCALID",
    "LOCAL_WORLD_SIZE": "SLURM_STEP_TASKS_PER_NODE",
    "MASTER_ADDR": "SLURM_STEP_NODELIST",
    "MASTER_PORT": "SLURM_JOB_ID",
}


def recorded() -> list[dict[str, str]]:
    return [STEP | dict(zip(OWN, task, strict=True)) for task in TASKS]


def for_ranks(env: Mapping[str, str]) -> dict[str, str]:
    """What a script reads that expects torchrun; with --gpus-per-task a task sees one GPU, number 0."""
    found = from_slurm(env)
    if "SLURM_GPUS_PER_TASK" in env:
        found |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    return found


def refuse_what_is_no_task(env: Mapping[str, str]) -> None:
    if "TORCHELASTIC_RUN_ID" in env:
        stop("torchrun has started this: leave slurm_env.py out, or torchrun")
    if "SLURM_JOB_ID" in env and "SLURM_STEP_ID" not in env:
        stop(f"in job {env['SLURM_JOB_ID']}, but in no step of it: type srun before python")
    lacking = [name for name in FROM.values() if "SLURM_STEP_ID" in env and not env.get(name)]
    if lacking:
        stop(f"{lacking[0]} is not set: a container has to be given all SLURM_ variables")


def idle_gpus(env: Mapping[str, str]) -> str:
    """The costliest slip under srun, as a line: a node's GPUs that no task will use. Nothing fails."""
    gpus = int(env.get("SLURM_GPUS_ON_NODE", 0))
    tasks = int(from_slurm(env)["LOCAL_WORLD_SIZE"])  # of this node
    name = env.get("SLURMD_NODENAME", "this node")
    return f"{name} has {gpus} GPUs for {tasks} task{'s' * (tasks > 1)}" if gpus > tasks else ""


def meet() -> list[dict]:
    """Every task's variables: the tasks form a process group by them, and exchange them."""
    import torch.distributed as dist

    dist.init_process_group("gloo")  # by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT
    row = {name: os.environ.get(name, "") for name in (*STEP, *OWN)}
    row |= {"cores": len(os.sched_getaffinity(0))}
    rows: list = [None] * dist.get_world_size()
    dist.all_gather_object(rows, row)
    dist.barrier()
    dist.destroy_process_group()
    return rows


def explain(env: Mapping[str, str]) -> None:
    say(f"task {env['SLURM_PROCID']} was told                               as a rank it needs")
    found = for_ranks(env)
    for name, source in FROM.items():
        say(f"{source:<28}{env[source]:<18}{name:<18}{found[name]}")


def table(rows: list[dict]) -> list[bool | None]:
    """Print each rank's place, and judge that they are one group."""
    ranks = [for_ranks(row) for row in rows]
    say(f"{'rank':>4}{'node':>6}  {'name':<12}{'local_rank':>10}{'of':>4}{'GPUs':>6}  meets at")
    for row, rank in zip(rows, ranks, strict=True):
        say(
            f"{rank['RANK']:>4}{rank['GROUP_RANK']:>6}  {row['SLURMD_NODENAME']:<12}"
            f"{row['SLURM_LOCALID']:>10}{from_slurm(row)['LOCAL_WORLD_SIZE']:>4}"
            f"{row.get('SLURM_GPUS_ON_NODE') or '0':>6}  {rank['MASTER_ADDR']}:{rank['MASTER_PORT']}"
        )
    for line in dict.fromkeys(idle_gpus({k: v for k, v in row.items() if v}) for row in rows):
        if line:
            say(f"idle: {line}")
    places = {(row["SLURM_NODEID"], row["SLURM_LOCALID"]) for row in rows}
    here = {row["SLURM_NODEID"]: int(from_slurm(row)["LOCAL_WORLD_SIZE"]) for row in rows}
    port = int(ranks[0]["MASTER_PORT"])
    return [
        check("ranks that are missing", len(rows) - len({int(r["RANK"]) for r in ranks}), 0),
        check(
            "tasks in Slurm's list of nodes, and not here", abs(sum(here.values()) - len(rows)), 0
        ),
        check("ranks at a place that is taken", len(rows) - len(places), 0),
        check("places to meet, beside the first", len({r["MASTER_ADDR"] for r in ranks}) - 1, 0),
        check("ports outside of 1,024 to 32,767", int(not 1024 <= port <= 32767), 0),
    ]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", type=int, default=3, help="which of the five recorded to explain")
    parser.add_argument("script", nargs=argparse.REMAINDER, help="a script to start, and its flags")
    args = parser.parse_args()
    if not 0 <= args.task < len(TASKS):
        stop(f"--task {args.task}: there are tasks 0 to {len(TASKS) - 1}")
    return args


def main() -> None:
    args = parse_args()
    refuse_what_is_no_task(os.environ)
    if "SLURM_STEP_ID" in os.environ:
        os.environ.update(for_ranks(os.environ))
        warning = idle_gpus(os.environ)
        if args.script:
            if warning and os.environ["SLURM_LOCALID"] == "0":
                sys.stderr.write(f"idle: {warning}: --ntasks-per-node\n")
            os.execv(sys.executable, [sys.executable, *args.script])
        rows = meet()
        env = rows[0]
    elif args.script:
        stop(f"no Slurm here: type  torchrun --nproc_per_node=2 {' '.join(args.script)}")
    else:
        rows = recorded()
        env = rows[args.task]
        say("no Slurm here: 5 tasks on 3 nodes, as Slurm 22.05 described them\n")
    explain(env)
    say("")
    sys.exit(conclude(table(rows)))


# --- copied from other scripts; `make copies` keeps it equal to them ------------------------------


# Copied from train_init.from_slurm
def from_slurm(env: Mapping[str, str]) -> dict[str, str]:
    """What torchrun would set, from what srun sets for each of its tasks."""
    nodes = re.sub(r"\[(\w+)[^]]*\]", r"\1", env["SLURM_STEP_NODELIST"])  # n[07-09,12],x -> n07,x
    counts = re.findall(r"(\d+)(?:\(x(\d+)\))?", env["SLURM_STEP_TASKS_PER_NODE"])  # 8(x2),4
    tasks = [count for count, times in counts for _ in range(int(times or 1))]
    port = 15_000 + (int(env["SLURM_JOB_ID"]) + int(env["SLURM_STEP_ID"])) % 15_000
    return {
        "RANK": env["SLURM_PROCID"],
        "WORLD_SIZE": env["SLURM_NTASKS"],
        "GROUP_RANK": env["SLURM_NODEID"],
        "LOCAL_RANK": env["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": tasks[int(env["SLURM_NODEID"])],
        "MASTER_ADDR": env.get("MASTER_ADDR", nodes.split(",")[0]),  # rank 0's node
        "MASTER_PORT": env.get("MASTER_PORT", str(port)),  # every rank finds the same one
    }


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
