"""Start a group of ranks, whoever launched them, and end it: who runs where, and what starting takes.

    python chapter3-distributed-training-with-pytorch-ddp/code/train_init.py
    torchrun --nproc_per_node=2 chapter3-distributed-training-with-pytorch-ddp/code/train_init.py
    torchrun --nproc_per_node=3 chapter3-distributed-training-with-pytorch-ddp/code/train_init.py --timeout 20

On GPUs:
    torchrun --nproc_per_node=8 chapter3-distributed-training-with-pytorch-ddp/code/train_init.py --device cuda

On Slurm, `srun --nodes=2 --ntasks-per-node=8 python` and the script do without torchrun. Look at the
table: no two ranks share a seat. Then at the seconds: which of them does a group cost? Section 3.1.
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


@dataclass(frozen=True)
class Seat:
    """A rank's place among all ranks."""

    launcher: str
    address: str = ""  # where the ranks meet; one that is alone meets nobody
    port: int = 0
    rank: int = 0
    world_size: int = 1
    node: int = 0
    local_rank: int = 0  # on its node
    ranks_here: int = 1


def find_seat(env: Mapping[str, str]) -> Seat:
    """Read what torchrun or srun has put into the environment, or a person by hand."""
    launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in env else "hand"
    if "RANK" not in env:
        if "SLURM_STEP_ID" not in env:  # a batch script runs in a job, but in no step of it
            return Seat("python alone")
        launcher, env = "srun", from_slurm(env)
    one_node = {"GROUP_RANK": "0", "LOCAL_RANK": env["RANK"]}
    one_node["LOCAL_WORLD_SIZE"] = env.get("WORLD_SIZE", "")
    names = ("MASTER_PORT", "RANK", "WORLD_SIZE", *one_node)
    texts = {name: env.get(name, one_node.get(name, "")) for name in names}
    wrong = [] if env.get("MASTER_ADDR") else ["MASTER_ADDR"]
    wrong += [name for name, text in texts.items() if not text.isdecimal()]
    if wrong:
        text = texts.get(wrong[0]) or "missing"
        stop(f"RANK is set, but {wrong[0]} is {text}: type  torchrun {sys.argv[0]}")
    seat = Seat(launcher, env["MASTER_ADDR"], *map(int, texts.values()))
    if seat.rank >= seat.world_size:
        stop(f"RANK={seat.rank}, but WORLD_SIZE={seat.world_size}: ranks count from 0")
    return seat


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


def pick_device(wanted: str, seat: Seat) -> torch.device:
    """This rank's own GPU where each rank has one; else the CPU, unless GPUs were asked for."""
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    devices = 0 if device.type in ("cpu", "mps") else torch.accelerator.device_count()
    local_rank, ranks_here = seat.local_rank, seat.ranks_here
    if seat.launcher == "srun" and "SLURM_GPUS_PER_TASK" in os.environ:
        local_rank, ranks_here = 0, 1  # a task sees its own GPUs, and nobody else's
    if wanted not in ("auto", "cpu") and (wanted != device.type or devices < ranks_here):
        stop(f"{ranks_here} ranks, but {devices} {wanted} devices: type --device cpu")
    if wanted == "cpu" or devices < ranks_here:
        if devices and wanted == "auto" and seat.local_rank == 0:
            print(f"{ranks_here} ranks, but {devices} GPUs: running on the CPU", file=sys.stderr)
        return torch.device("cpu")
    torch.accelerator.set_device_index(local_rank)
    return torch.device(device.type, local_rank)


def open_store(seat: Seat, limit: float) -> dist.Store:
    """Keys and values that all ranks see. Rank 0 serves them, or torchrun's agent on its node."""
    if not seat.address:
        return dist.HashStore()  # in this process: no port that could be taken
    serves = seat.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    where = f"{seat.address}:{seat.port}"

    def refusal() -> str:
        try:
            socket.create_connection((seat.address, seat.port), timeout=limit).close()
        except OSError as error:
            return f"no rank 0 at {where} ({error.strerror or error})"
        return ""

    if not serves:
        settle(refusal, seat, limit)
    try:
        return dist.TCPStore(
            seat.address, seat.port, None, serves, timedelta(seconds=limit), wait_for_workers=False
        )
    except dist.DistNetworkError as error:
        if "EADDRINUSE" in str(error):
            free = seat.port + 1
            stop(f"{where} is taken: type MASTER_PORT={free}, or --standalone to torchrun")
        stop(f"rank {seat.rank} cannot use {where}: {str(error).splitlines()[0]}")


def roll_call(store: dist.Store, seat: Seat, limit: float) -> dist.Store:
    """Wait for all ranks, or name those that do not come; return a store that is new to them all.

    When torchrun restarts the ranks, its store still has what the dead ones wrote. So rank 0 calls
    under a name of its own, made up now, and each rank goes on when its own name is confirmed.
    """
    me, mine = os.urandom(8).hex(), f"WORLD_SIZE={seat.world_size}"
    others = range(1, seat.world_size)

    def read(key: str) -> str:
        return store.get(key).decode() if store.check([key]) else "missing"

    def complaint() -> str:
        if seat.rank > 0:
            store.set(f"{read('call')}/{seat.rank}", f"{mine} {me}")
            return "" if store.check([me]) else "rank 0 does not confirm that all are here"
        answers = {rank: read(f"{me}/{rank}").split()[0] for rank in others}
        wrong = [f"rank {rank}: {answer}" for rank, answer in answers.items() if answer != mine]
        return f"{mine}, but {', '.join(wrong)}" if wrong else ""

    if seat.rank == 0:
        store.set("call", me)
    settle(complaint, seat, limit)
    for rank in others if seat.rank == 0 else ():
        store.set(read(f"{me}/{rank}").split()[1], "confirmed")
    return dist.PrefixStore(read("call"), store)


def settle(complaint: Callable[[], str], seat: Seat, limit: float) -> None:
    """Ask until there is no complaint; after `limit` seconds stop with the last one."""
    deadline = time.monotonic() + limit
    while text := complaint():
        if time.monotonic() > deadline:
            stop(f"rank {seat.rank}: {text}, after {limit:g} s; --timeout allows more")
        time.sleep(0.02)


def join_group(seat: Seat, device: torch.device, limit: float) -> None:
    """What init_process_group() does by itself, but that it tells which ranks are missing."""
    with timed("find all ranks"):
        try:
            store = roll_call(open_store(seat, limit), seat, limit)
        except dist.DistError:
            stop(f"rank {seat.rank}: rank 0 has gone, and the store with it")
    with timed("init_process_group"):
        dist.init_process_group(
            "gloo" if device.type == "cpu" else None,  # None: PyTorch chooses
            store=store,
            rank=seat.rank,
            world_size=seat.world_size,
            timeout=timedelta(seconds=limit),
            device_id=None if device.type == "cpu" else device,  # NCCL connects now, not later
        )


def run(seat: Seat, device: torch.device, fail: int | None) -> tuple[list[dict], int]:
    """Use the group; return the table of who runs where, and the sum of all ranks."""
    for phase in ("first all_reduce", "second all_reduce"):
        with timed(phase):
            tensor = torch.tensor(seat.rank, device=device)
            dist.all_reduce(tensor)
            total = int(tensor)  # waits for the device
        if seat.rank == fail:
            raise RuntimeError("this rank fails, as --fail asked")
    here = {"host": socket.gethostname(), "pid": os.getpid(), "device": str(device)}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    here |= {"backend": dist.get_backend(), "cores": cores, "threads": torch.get_num_threads()}
    rows: list = [None] * dist.get_world_size()
    dist.all_gather_object(rows, asdict(seat) | here | {"seconds": SECONDS})
    return rows, total


def print_table(rows: list[dict]) -> None:
    first, n = rows[0], len(rows)
    kind = torch.device(first["device"]).type
    place = f"met at {first['address']}:{first['port']}" if first["address"] else "met nobody"
    print(f"{n} rank{'s' * (n > 1)} on {kind}, started by {first['launcher']}, {place}")
    columns = ("rank", "node", "local_rank", "pid", "device", "backend", "cores", "threads")
    for row in [dict(zip(columns, columns, strict=True)), *rows]:
        print("".join(f"{row[name]!s:>{max(len(name), 6) + 2}}" for name in columns))
    for node, host in sorted({(row["node"], row["host"]) for row in rows}):
        print(f"node {node} is {host}")
    print(f"{'seconds':<20}{'rank 0':>8}{'slowest':>9}")
    for phase in first["seconds"]:
        seconds = [row["seconds"][phase] for row in rows]
        print(f"{phase:<20}{seconds[0]:>8.3f}{max(seconds):>9.3f}")
    print(f"{'tear-down':<20}{SECONDS['tear-down']:>8.3f}")


def check(claim: str, value: int, rank: int) -> bool:
    if rank == 0 or value:  # a rank for which it does not hold speaks too
        print(f"check: {claim} = {value} <= 0  {'FAILED' if value else 'ok'}", flush=True)
    return value == 0


def stop(message: str) -> NoReturn:
    sys.stderr.write(message + "\n")  # in one piece: other ranks write too
    sys.exit(2)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = lambda message: stop(f"{message}: --help lists the flags")
    parser.add_argument(
        "--timeout", type=float, default=60, help="seconds to wait for the other ranks"
    )
    parser.add_argument("--fail", type=int, help="this rank raises an error; default: none does")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    if not 0 < args.timeout < 1e6:
        stop(f"--timeout {args.timeout:g} is no number of seconds above 0")
    if args.json and not args.json.parent.is_dir():
        stop(f"--json {args.json}: there is no folder {args.json.parent}")
    return args


def main() -> None:
    args = parse_args()
    seat = find_seat(os.environ)
    if args.fail is not None and not 0 <= args.fail < seat.world_size:
        stop(f"--fail {args.fail}, but the ranks are 0 to {seat.world_size - 1}")
    device = pick_device(args.device, seat)
    join_group(seat, device, args.timeout)
    try:
        rows, total = run(seat, device, args.fail)
        dist.barrier()  # nobody leaves while another is at work: rank 0 may have the store
    finally:
        with timed("tear-down"):
            dist.destroy_process_group()  # so that the others of a rank that fails need not wait
    if seat.rank == 0:
        print_table(rows)
        if args.json:
            args.json.write_text(json.dumps(rows, indent=1) + "\n")
    n, seats = seat.world_size, {(row["node"], row["local_rank"]) for row in rows}
    held = [
        check("ranks without a row", n - len({row["rank"] for row in rows}), seat.rank),
        check("rows in a seat that is taken", len(rows) - len(seats), seat.rank),
        check(
            "rows with another world size", sum(row["world_size"] != n for row in rows), seat.rank
        ),
        check("|sum of the ranks - n(n-1)/2|", abs(total - n * (n - 1) // 2), seat.rank),
        check("groups left after the tear-down", int(dist.is_initialized()), seat.rank),
    ]
    sys.exit(not all(held))


if __name__ == "__main__":
    main()
