"""Ten faults of data-parallel training, made on purpose, and which tools name the guilty rank.

    torchrun --nproc_per_node=2 chapter3-distributed-training-with-pytorch-ddp/code/ddp_debugging.py
    torchrun --nproc_per_node=3 chapter3-distributed-training-with-pytorch-ddp/code/ddp_debugging.py --culprit 0 --only mismatch

Compare "named" with "guilty": where a tool compares ranks, two of them are a tie. Each fault happens
in child processes, for a broken group is never good again and some faults kill. All of it runs on
gloo and the CPU, on a GPU host too: NCCL's watchdog would end the processes at the timeout. Section 3.8.
"""

import argparse
import faulthandler
import importlib
import linecache
import multiprocessing
import os
import pickle
import re
import signal
import statistics
import sys
import tempfile
import time
import zlib
from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import IO, NoReturn

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel


@dataclass
class Rank:
    """One rank of an experiment, and the evidence that it leaves behind."""

    guilty: bool = False
    timeout: float = 0.0  # seconds
    came: int = 0  # to how many collectives
    waits: list[float] = field(default_factory=list)  # how long it waited in each, seconds
    message: str = ""  # its exception's, or the last line of a process that died
    died: str = ""  # of which signal
    seconds: float = 0.0  # from the start to the exception, or to the end without one
    calls: dict[int, str] = field(default_factory=dict)  # the flight recorder, by number
    stack: tuple[bool, str] = (False, "")  # at half the timeout: in a collective? on which line?
    dumped: float = 0.0  # when that was, seconds from the start
    sums: dict[str, int] = field(default_factory=dict)  # a checksum of each parameter


def watched_all_reduce(rank: Rank, x: torch.Tensor) -> None:
    """Count that this rank has come, and time how long it waits there for the others."""
    rank.came += 1
    start = time.monotonic()
    dist.all_reduce(x)
    rank.waits.append(time.monotonic() - start)


def collective(rank: Rank, fault: str, x: torch.Tensor) -> None:
    """All ranks sum their [40, 25] in an all-reduce; the guilty one does something else."""
    match fault if rank.guilty else "":
        case "mismatch":  # another collective
            dist.all_gather([torch.empty_like(x) for _ in range(dist.get_world_size())], x)
        case "shapes":  # a longer tensor
            dist.all_reduce(torch.cat([x, x]))
        case "layout":  # a transposed tensor: as many bytes, other numbers
            dist.all_reduce(x.T.contiguous())
        case "absent" | "guarded":  # it evaluates, say, or waits for a disk
            time.sleep(1.5 * rank.timeout)
        case "dead":  # the kernel kills it for want of memory
            os.kill(os.getpid(), signal.SIGKILL)
        case "slow":  # it comes late, but in time
            time.sleep(rank.timeout / 4)
            watched_all_reduce(rank, x)
        case _ if fault == "guarded":  # the others: a barrier that knows who is missing
            dist.monitored_barrier(timeout=timedelta(seconds=rank.timeout), wait_all_ranks=True)
        case _:
            watched_all_reduce(rank, x)


def training(rank: Rank, fault: str, x: torch.Tensor) -> None:
    """Three steps of DDP with one of four mistakes, then a checksum of each parameter."""
    torch.manual_seed(0)
    layers = OrderedDict(body=nn.Linear(25, 25), head=nn.Linear(25, 25))
    patient = fault == "cured"
    call = model = DistributedDataParallel(nn.Sequential(layers), find_unused_parameters=patient)
    if fault in ("unused", "cured") and rank.guilty:
        model.module.head = nn.Identity()  # DDP waits for the gradients of the layer that was here
    if fault == "reset" and rank.guilty:
        model.module.head.reset_parameters()  # after DDP has made the ranks' weights equal
    if fault == "late":
        model.module.add_module("adapter", nn.Linear(25, 25))  # DDP does not know of it
    if fault == "bypass":
        call = model.module  # the model, not DDP, which would average
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        call(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    rank.sums = checksums(model.module)


# The tools. Each reads what the ranks left behind, names ranks, and says why.
Answer = tuple[list[int], str]


def odd_ones(values: list) -> list[int]:
    """The ranks whose value is not the majority's; all of them if there is no majority."""
    value, votes = Counter(values).most_common(1)[0]
    return [r for r, v in enumerate(values) if v != value or 2 * votes <= len(values)]


def checksums(model: nn.Module) -> dict[str, int]:
    """A checksum of each parameter's bits, by name."""
    bits = ((name, p.detach().cpu().contiguous()) for name, p in model.named_parameters())
    return {name: zlib.crc32(p.view(torch.uint8).numpy().tobytes()) for name, p in bits}


def checksum(ranks: list[Rank]) -> Answer:
    """The first parameter that is not the same on all ranks, and where."""
    for name in (name for name in ranks[0].sums if all(name in rank.sums for rank in ranks)):
        if odd := odd_ones([rank.sums[name] for rank in ranks]):
            return odd, f"the first parameter that differs is {name}"
    return [], "all parameters are equal"


def recorder(ranks: list[Rank]) -> Answer:
    """The first collective that the ranks do not share: who has not come, or came to another?"""
    for number in sorted(set().union(*(rank.calls for rank in ranks))):
        calls = [rank.calls.get(number, "nothing") for rank in ranks]
        missing = [r for r, call in enumerate(calls) if call == "nothing"]
        if odd := missing or odd_ones(calls):
            return odd, ", ".join(f"rank {r}: {call}" for r, call in enumerate(calls))
    return [], "all ranks made the same calls"


def stacks(ranks: list[Rank]) -> Answer:
    """Where does each rank stand? One that is in no collective is the one that is waited for."""
    outside = [r for r, rank in enumerate(ranks) if not rank.stack[0]]
    odd = outside or odd_ones([rank.stack for rank in ranks])
    return odd, ", ".join(f"rank {r}: {rank.stack[1]}" for r, rank in enumerate(ranks))


def heartbeat(ranks: list[Rank]) -> Answer:
    """Dead, stuck or slow? The dead have no process, the stuck come no more, the slow come last."""
    if gone := [r for r, rank in enumerate(ranks) if rank.died]:
        return gone, f"dead: {ranks[gone[0]].died} {ranks[gone[0]].message}".strip()
    came = [rank.came for rank in ranks]
    if min(came) < max(came):
        behind = [r for r, count in enumerate(came) if count == min(came)]
        return behind, f"stuck: came to {min(came)} collectives, others to {max(came)}"
    waits = [statistics.median(rank.waits) for rank in ranks]
    last = min(range(len(ranks)), key=waits.__getitem__)
    return [last], f"slow: waits {waits[last]:.3f} s per step, others up to {max(waits):.3f} s"


def wrapper(ranks: list[Rank]) -> Answer:
    """DETAIL's message names, on each rank, one that does otherwise: who is named most often?"""
    text = " ".join(rank.message for rank in ranks)
    named = Counter(int(r) for r in re.findall(r"but Rank (\d+) is", text))
    runs = re.findall(r"Rank (\d+) is .*?OpType=(\w+), TensorShape=(\[[\d, ]*\])", ranks[0].message)
    most_named = [r for r in sorted(named) if named[r] == max(named.values())]
    return most_named, ", ".join(f"rank {' '.join(run)}" for run in runs)


def error(ranks: list[Rank]) -> Answer:
    """The exceptions alone: does one of them name a rank? Rank 0 speaks for a barrier."""
    for rank in ranks:
        if match := re.search(r"(?:\w+ \w+ for rank|Ranks|recv from rank) (\d+).*", rank.message):
            return [int(match[1])], match[0]
    messages = [rank.message for rank in ranks if rank.message]
    messages.sort(key=lambda message: "Timed out" not in message)  # then it hangs up on the others
    return [], messages[0] if messages else "nothing: training goes on"


# The prediction: whom a tool names, after how many timeouts, with which words. "vote": the guilty
# one, or on two ranks both. "another": the innocent. "all": every rank does it. "none": rightly.
OFF, INFO, DETAIL = dist.DebugLevel.OFF, dist.DebugLevel.INFO, dist.DebugLevel.DETAIL
CASES = [
    ("mismatch", OFF, [(error, "nobody", 1, "Timed out"), (recorder, "vote", 1, "all_gather"),
                       (stacks, "vote", 0.5, "dist.all_gather")]),
    ("mismatch", DETAIL, [(wrapper, "vote", 0, "ALLGATHER")]),
    ("shapes", OFF, [(heartbeat, "another", 0, "dead: SIGABRT")]),
    ("shapes", DETAIL, [(wrapper, "vote", 0, r"\[80, 25\]")]),
    ("layout", OFF, [(error, "nobody", 0, "nothing"), (recorder, "vote", 0, "25, 40")]),
    ("layout", DETAIL, [(wrapper, "vote", 0, r"\[25, 40\]")]),
    ("absent", OFF, [(error, "nobody", 1, "Timed out"), (recorder, "guilty", 1, "nothing"),
                     (stacks, "guilty", 0.5, "time.sleep"), (heartbeat, "guilty", 1, "stuck")]),
    ("guarded", OFF, [(error, "guilty", 1, "rank|Rank")]),
    ("dead", OFF, [(heartbeat, "guilty", 0, "dead: SIGKILL")]),
    ("slow", OFF, [(heartbeat, "guilty", 1, "slow")]),
    ("unused", INFO, [(error, "guilty", 0, "head.weight"), (recorder, "guilty", 1, "nothing")]),
    ("cured", OFF, [(checksum, "none", 0, "equal")]),
    ("reset", OFF, [(checksum, "vote", 0, "head.weight")]),
    ("late", OFF, [(checksum, "all", 0, "adapter.weight")]),
    ("bypass", OFF, [(checksum, "all", 0, "body.weight")]),
]  # fmt: skip
TRAINING = ("unused", "cured", "reset", "late", "bypass")


def group_timeout(args: argparse.Namespace) -> float:
    return 3 + args.timeout  # seconds: longer than the barrier's own


def take_part(number: int, args: argparse.Namespace, pipe: Connection, log: IO) -> None:
    """Be this rank in one experiment, in a process of its own; then wait to be killed."""
    fault, level, asks = args.cases[number]
    os.dup2(log.fileno(), sys.stderr.fileno())
    signal.alarm(120)  # whatever becomes of the parent
    torch.set_num_threads(1)
    dist.set_debug_level(level)  # before the group is made: DETAIL makes another kind
    store = dist.FileStore(f"{args.folder}/{number}", args.world_size)
    limit = timedelta(seconds=group_timeout(args)) if fault == "guarded" else None
    ready(pipe)
    join(store, args, limit)
    x = torch.randn(40, 25, generator=torch.Generator().manual_seed(args.seed + args.rank))
    dist.all_reduce(x.clone())
    ready(pipe)
    if level != DETAIL:
        _set_pg_timeout(timedelta(seconds=args.timeout))
    rank = Rank(args.rank == args.culprit, args.timeout)
    dump_stack = stacks in (tool for tool, *_ in asks)
    stack = tempfile.TemporaryFile("w+")  # noqa: SIM115
    if dump_stack:  # only here: a stack that changes while it is read can kill its process
        faulthandler.dump_traceback_later(args.timeout / 2, file=stack)
    start = time.time()
    try:
        for _ in range(4 if fault == "slow" else 1):
            if fault in TRAINING:
                training(rank, fault, x)
            else:
                collective(rank, fault, x)
    except RuntimeError as exception:
        rank.message = str(exception)
    rank.seconds = time.time() - start
    if dump_stack:
        time.sleep(max(0, 0.6 * args.timeout - rank.seconds))  # until the stack is written
        rank.dumped = os.fstat(stack.fileno()).st_mtime - start
        stack.seek(0)
        frames = re.findall(r'File "(.+)", line (\d+) in', stack.read())  # the innermost first
        ours = [linecache.getline(file, int(line)) for file, line in frames if file == __file__]
        rank.stack = ("distributed_c10d" in frames[0][0], ours[0].strip())
    trace = pickle.loads(torch._C._distributed_c10d._dump_fr_trace())  # noqa: S301 - our own
    for call in trace["entries"]:
        name = call["profiling_name"].removeprefix("gloo:")
        rank.calls[call["collective_seq_id"]] = f"{name} {call['input_sizes']}"
    pipe.send(rank)
    signal.pause()


def join(store: dist.Store, args: argparse.Namespace, timeout: timedelta | None = None) -> None:
    dist.init_process_group(
        "gloo", store=store, rank=args.rank, world_size=args.world_size, timeout=timeout
    )


def collect(process: BaseProcess, pipe: Connection, log: IO, deadline: float) -> Rank:
    """What one rank of an experiment left behind, at its end or its death."""
    try:
        return pipe.recv() if pipe.poll(max(0, deadline - time.time())) else Rank(message="hangs")
    except EOFError:
        process.join()
        log.seek(0)
        lines = log.read().decode(errors="replace").strip().split("\n")
        died = signal.Signals(-process.exitcode).name if process.exitcode < 0 else "exit"
        return Rank(died=died, message=lines[-1])


def ready(pipe: Connection) -> None:
    """Wait until the processes of all ranks and cases are here, so that nobody is late by chance."""
    pipe.send("ready")
    pipe.recv()


def experiments(args: argparse.Namespace) -> list[tuple[Rank, ...]]:
    """Make all faults at once, in children; return for each what its ranks left behind."""
    if any(fault in TRAINING for fault, *_ in args.cases):
        importlib.import_module("torch._dynamo")  # DDP wants it; here once, not in each child
    fork = multiprocessing.get_context("fork")
    children = []
    for number in range(len(args.cases)):
        log = tempfile.TemporaryFile()  # noqa: SIM115 - the child's standard error
        ours, theirs = fork.Pipe()
        work = (number, args, theirs, log)
        children.append((fork.Process(target=take_part, args=work, daemon=True), ours, log))
        children[-1][0].start()
        theirs.close()  # or its death would not end the pipe
    for stage in range(2):
        for _, pipe, _ in children:
            pipe.recv()
        args.store.add(f"stage {stage}", 1)
        while args.store.add(f"stage {stage}", 0) < args.world_size:
            time.sleep(0.01)
        for _, pipe, _ in children:
            pipe.send("go")
    deadline = time.time() + 60 + 5 * args.timeout
    own = [collect(*child, deadline) for child in children]
    join(args.store, args)
    everyone = [own] * args.world_size
    dist.all_gather_object(everyone, own)  # when all have seen all, the children may go
    for process, *_ in children:
        process.kill()
    return list(zip(*everyone, strict=True))


def run(args: argparse.Namespace, found: list[tuple[Rank, ...]]) -> list[bool | None]:
    """Ask the tools, print what they answer, and hold it against the prediction."""
    n = args.world_size
    everyone = list(range(n))
    culprit = [args.culprit]
    vote = culprit if n > 2 else everyone
    expected = {"vote": vote, "all": everyone, "nobody": [], "none": []}
    say(f"{n} ranks on cpu: rank {args.culprit} is guilty, the timeout is {args.timeout:g} s")
    columns = "{:<10}{:<7}{:<18}{:<10}{:<10}{:<8}{:>11}{:>11}"
    titles = ("fault", "level", "symptom", "tool", "named", "guilty", "predicted", "measured")
    say(columns.format(*titles))
    wrong = 0
    latest = 0.0
    for (fault, level, asks), ranks in zip(args.cases, found, strict=True):
        died = sum(bool(r.died) for r in ranks)
        raised = sum(bool(r.message) and not r.died for r in ranks)
        symptom = f"{died} die, {raised} raise" if died + raised else "none"
        seconds = [r.seconds for r in ranks if r.message and not r.died] or [ranks[0].seconds]
        dumped = max(r.dumped for r in ranks)
        for tool, names, timeouts, says in asks:
            named, answer = tool(ranks)
            innocent = names == "another" and named and args.culprit not in named
            right = (innocent or named == expected.get(names, culprit)) and re.search(says, answer)
            wrong += not right
            measured = {recorder: max(seconds), stacks: dumped}.get(tool, min(seconds))
            predicted = timeouts * args.timeout
            if fault == "guarded" and args.culprit == 0:  # it leads the barrier: nobody watches it
                predicted = group_timeout(args)
            latest = max(latest, measured - predicted)
            guilty = {"all": "all", "none": "-"}.get(names, args.culprit)
            whom = "all" if names == "all" else ", ".join(map(str, named)) or "-"
            shown_level = "" if level == OFF else level.name
            times = f"{predicted:.2f} s", f"{measured:.2f} s"
            say(columns.format(fault, shown_level, symptom, tool.__name__, whom, guilty, *times))
            answer = (
                re.sub(r" *(what\(\): *)?\[[^]]*gloo/[^]]*\]", "", answer).split("\n")[0].strip()
            )
            say(f"    {answer[:94]}{'' if right else '   NOT AS PREDICTED'}")
    return [
        check("answers that are not as predicted", wrong, 0),
        expect("slowest answer after its prediction, seconds", latest, 0.5, args.strict),
    ]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    faults = dict.fromkeys(fault for fault, *_ in CASES)
    parser.add_argument("--only", choices=faults, help="this fault only; default: all")
    parser.add_argument("--culprit", type=int, default=1, help="the rank that does it")
    parser.add_argument("--timeout", type=float, default=1.0, help="of the collectives, seconds")
    parser.add_argument("--seed", type=int, default=0, help="for the tensors' numbers")
    parser.add_argument(
        "--strict", action="store_true", help="exit 1 if an `expect:` line does not hold"
    )
    args = parser.parse_args()
    args.cases = [case for case in CASES if args.only in (None, case[0])]
    args.rank = int(os.environ.get("RANK", 0))
    args.world_size = int(os.environ.get("WORLD_SIZE", 0))
    if args.world_size < 2:
        stop(f"needs two ranks: type  torchrun --nproc_per_node=2 {sys.argv[0]}")
    if not 0 <= args.culprit < args.world_size:
        stop(f"--culprit {args.culprit}: the ranks are 0 to {args.world_size - 1}")
    return args


@record  # so that torchrun's summary names the error
def main() -> None:
    args = parse_args()
    args.store, *_ = next(dist.rendezvous("env://"))
    with tempfile.TemporaryDirectory() as folder:
        if args.rank == 0:
            args.store.set("folder", folder)
        args.folder = args.store.get("folder").decode()
        if not os.path.isdir(args.folder):
            stop(f"rank {args.rank} does not see rank 0's {args.folder}: start all on one machine")
        claims = run(args, experiments(args))
        dist.barrier()  # nobody leaves while another is at work
        dist.destroy_process_group()  # not in a `finally`: section 3.1
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


# Copied from ch01_single_gpu_baseline.expect
def expect(
    claim: str, value: float, bound: float, strict: bool, at_least: bool = False
) -> bool | None:
    """Print whether a value that depends on the machine keeps its bound; judge it if `strict`."""
    held = bool(value >= bound if at_least else value <= bound)
    verdict = "ok" if held else "not here"
    say(f"expect: {claim} = {value:.3g} {'>=' if at_least else '<='} {bound:.3g}  {verdict}")
    return held if strict else None


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
