"""Start a group of ranks, whoever launched them, and end it: who runs where, and what starting takes.

    python chapter3-distributed-training-with-pytorch-ddp/code/train_init.py
    torchrun --nproc_per_node=2 chapter3-distributed-training-with-pytorch-ddp/code/train_init.py

On GPUs:
    torchrun --nproc_per_node=8 chapter3-distributed-training-with-pytorch-ddp/code/train_init.py --device cuda

On Slurm, `srun --nodes=2 --ntasks-per-node=8 python`, the script and `--device cuda` do without
torchrun. Look at the table: no two ranks share a place on a node. Then at the seconds: which of them
does a group cost? Section 3.1.
"""

import argparse
import json
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

SECONDS: dict[str, float] = {}  # phase of this rank's life: how long it took


@contextmanager
def timed(phase: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    SECONDS[phase] = time.perf_counter() - start


with timed("import torch"):
    import torch
    import torch.distributed as dist
    from torch.distributed.elastic.multiprocessing.errors import record


@dataclass(frozen=True)
class RankInfo:
    """A rank's place among all ranks."""

    launcher: str
    address: str = ""  # where the ranks meet; one that is alone meets nobody
    port: int = 0
    rank: int = 0
    world_size: int = 1
    node: int = 0
    local_rank: int = 0  # on its node
    ranks_here: int = 1


def find_rank_info(env: Mapping[str, str]) -> RankInfo:
    """Read what torchrun or srun has put into the environment, or a person by hand."""
    launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in env else "hand"
    if "RANK" not in env:
        if "SLURM_STEP_ID" not in env:  # a batch script runs in a job, but in no step of it
            return RankInfo("python alone")
        launcher = "srun"
        env = from_slurm(env)
    one_node = {"GROUP_RANK": "0", "LOCAL_RANK": env["RANK"]}
    one_node["LOCAL_WORLD_SIZE"] = env.get("WORLD_SIZE", "")
    names = ("MASTER_PORT", "RANK", "WORLD_SIZE", *one_node)
    for name in ("MASTER_ADDR", *names):
        if name not in env | one_node:
            stop(f"RANK is set, but {name} is missing: type  torchrun {sys.argv[0]}")
    numbers = [int((one_node | env)[name]) for name in names]
    rank_info = RankInfo(launcher, env["MASTER_ADDR"], *numbers)
    if rank_info.rank >= rank_info.world_size:
        stop(f"RANK={rank_info.rank}, but WORLD_SIZE={rank_info.world_size}: ranks count from 0")
    return rank_info


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


def find_device(wanted: str, rank_info: RankInfo) -> torch.device:
    """This rank's own GPU where each rank has one; else the CPU, unless GPUs were asked for."""
    local_rank = rank_info.local_rank
    ranks_here = rank_info.ranks_here
    if rank_info.launcher == "srun" and "SLURM_GPUS_PER_TASK" in os.environ:
        local_rank, ranks_here = 0, 1  # a task sees its own GPUs, and nobody else's
    gpu = torch.accelerator.current_accelerator(check_available=True)
    gpus = torch.accelerator.device_count() if gpu and gpu.type != "mps" else 0
    if wanted == "auto":
        if rank_info.ranks_here < rank_info.world_size:
            stop("several nodes may differ: type --device cuda, or --device cpu")
        wanted = gpu.type if gpu and gpus >= ranks_here else "cpu"
    if wanted == "cpu":
        return torch.device("cpu")
    if gpus < ranks_here:
        stop(f"{ranks_here} ranks, but {gpus} GPUs here: type --device cpu, or start fewer ranks")
    torch.accelerator.set_device_index(local_rank)
    return torch.device(wanted, local_rank)


def open_store(rank_info: RankInfo, timeout: float) -> dist.Store:
    """Keys and values that all ranks see. Rank 0 serves them, or torchrun's agent on its node."""
    if not rank_info.address:
        return dist.HashStore()  # in this process: no port that could be taken
    serves = rank_info.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    where = (rank_info.address, rank_info.port)
    place = f"{rank_info.address}:{rank_info.port}"

    def problem() -> str:
        try:
            socket.create_connection(where, timeout).close()
        except OSError as error:
            return f"no rank 0 at {place} ({error.strerror or error})"
        return ""

    if not serves:
        wait_while(problem, rank_info, timeout)
    try:
        return dist.TCPStore(
            *where, None, serves, timedelta(seconds=timeout), wait_for_workers=False
        )
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        free = rank_info.port + 1
        stop(f"{place} is taken: type MASTER_PORT={free}, or --standalone to torchrun")


def roll_call(store: dist.Store, rank_info: RankInfo, timeout: float) -> dist.Store:
    """Wait for all ranks, or name those that do not come; return a store that is new to them all.

    When torchrun restarts the ranks, its store still has what the dead ones wrote. So rank 0 calls
    under a name of its own, made up now, and each rank goes on when its own name is confirmed.
    """
    name = os.urandom(8).hex()
    world_size = f"WORLD_SIZE={rank_info.world_size}"
    others = range(1, rank_info.world_size)

    def read(key: str) -> str:
        return store.get(key).decode() if store.check([key]) else "missing"

    def problem() -> str:
        if rank_info.rank > 0:
            store.set(f"{read('call')}/{rank_info.rank}", f"{world_size} {name}")
            return "" if store.check([name]) else "rank 0 does not confirm that all are here"
        answers = [(rank, read(f"{name}/{rank}").split()[0]) for rank in others]
        wrong = [f"rank {rank}: {answer}" for rank, answer in answers if answer != world_size]
        return f"{world_size}, but {', '.join(wrong)}" if wrong else ""

    if rank_info.rank == 0:
        store.set("call", name)
    wait_while(problem, rank_info, timeout)
    if rank_info.rank == 0:
        for rank in others:
            store.set(read(f"{name}/{rank}").split()[1], "confirmed")
    return dist.PrefixStore(read("call"), store)


def wait_while(problem: Callable[[], str], rank_info: RankInfo, timeout: float) -> None:
    """Ask until there is no problem; after `timeout` seconds stop with the last one."""
    deadline = time.monotonic() + timeout
    while text := problem():
        if time.monotonic() > deadline:
            stop(f"rank {rank_info.rank}: {text}, after {timeout:g} s; --timeout allows more")
        time.sleep(0.02)


def join_by_roll_call(rank_info: RankInfo, device: torch.device, timeout: float) -> None:
    """What init_process_group() does by itself, but that it tells which ranks are missing."""
    with timed("find all ranks"):
        try:
            store = roll_call(open_store(rank_info, timeout), rank_info, timeout)
        except dist.DistError:
            stop(f"rank {rank_info.rank}: rank 0 has gone, and the store with it")
    with timed("init_process_group"):
        dist.init_process_group(
            "gloo" if device.type == "cpu" else None,  # None: PyTorch chooses
            store=store,
            rank=rank_info.rank,
            world_size=rank_info.world_size,
            timeout=timedelta(seconds=timeout),
            device_id=None if device.type == "cpu" else device,  # NCCL connects now, not later
        )


def run(args: argparse.Namespace, rank_info: RankInfo, device: torch.device) -> list[bool | None]:
    """Use the group, and print the table of who runs where."""
    for phase in ("first all_reduce", "second all_reduce"):
        with timed(phase):
            tensor = torch.tensor(rank_info.rank, device=device)
            dist.all_reduce(tensor)
            total = int(tensor)  # waits for the device
        if rank_info.rank == args.fail:
            raise RuntimeError("this rank fails, as --fail asked")
    row = {"host": socket.gethostname(), "pid": os.getpid(), "device": str(device)}
    row["cores"] = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    row |= {"backend": dist.get_backend(), "threads": torch.get_num_threads()}
    n = dist.get_world_size()
    rows: list = [None] * n
    dist.all_gather_object(rows, asdict(rank_info) | row | {"seconds": SECONDS})
    print_table(rows)
    if args.json and rank_info.rank == 0:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    places = {(row["node"], row["local_rank"]) for row in rows}
    return [
        check("ranks that are missing", n - len({row["rank"] for row in rows}), 0),
        check("ranks at a place that is taken", n - len(places), 0),
        check("ranks with another world size", sum(row["world_size"] != n for row in rows), 0),
        check("|sum of the ranks - n(n-1)/2|", abs(total - n * (n - 1) // 2), 0),
    ]


def print_table(rows: list[dict]) -> None:
    n = len(rows)
    first = rows[0]
    kind = torch.device(first["device"]).type
    place = f"met at {first['address']}:{first['port']}" if first["address"] else "met nobody"
    say(f"{n} rank{'s' * (n > 1)} on {kind}, started by {first['launcher']}, {place}")
    columns = ("rank", "node", "local_rank", "pid", "device", "backend", "cores", "threads")
    for row in [dict(zip(columns, columns, strict=True)), *rows]:
        say("".join(f"{row[name]!s:>{max(len(name), 6) + 2}}" for name in columns))
    for node, host in sorted({(row["node"], row["host"]) for row in rows}):
        say(f"node {node} is {host}")
    say(f"{'seconds':<20}{'rank 0':>8}{'slowest':>9}")
    for phase in first["seconds"]:
        seconds = [row["seconds"][phase] for row in rows]
        say(f"{phase:<20}{seconds[0]:>8.3f}{max(seconds):>9.3f}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--timeout", type=float, default=60, help="seconds to wait for the other ranks"
    )
    parser.add_argument("--fail", type=int, help="this rank raises an error; default: none does")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    return parser.parse_args()


@record  # so that torchrun's summary names the error
def main() -> None:
    args = parse_args()
    rank_info = find_rank_info(os.environ)
    os.environ["RANK"] = str(rank_info.rank)  # for say() and check(): srun does not set it
    device = find_device(args.device, rank_info)
    join_by_roll_call(rank_info, device, args.timeout)
    claims = run(args, rank_info, device)
    dist.barrier()  # nobody leaves while another is at work: rank 0 may have the store
    dist.destroy_process_group()  # not in a `finally`: on NCCL it would wait for the others
    sys.exit(conclude(claims))


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
