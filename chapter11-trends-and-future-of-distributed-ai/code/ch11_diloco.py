r"""DiLoCo beside synchronous data parallel: bytes, bursts, loss; and a learner that vanishes.

    torchrun --nproc_per_node=2 chapter11-trends-and-future-of-distributed-ai/code/ch11_diloco.py \
        --plot chapter11-trends-and-future-of-distributed-ai/figures/diloco.svg

On GPUs:
    torchrun --nproc_per_node=8 chapter11-trends-and-future-of-distributed-ai/code/ch11_diloco.py \
        --width 1024 --layers 4 --context 64 --lr 3e-4 --steps 2048 --every 32 128 --fragments 4

Read "MB sent" and "largest burst" beside the loss: the bytes fall as 1/H, the burst as 1/fragments.
All methods take the same steps on the same windows, from the same weights. Then read the last lines:
a learner is away for some rounds, the others go on, and it comes back. Sections 11.1 and 11.2.
"""

import argparse
import copy
import json
import os
import socket
import struct
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim import SGD, AdamW
from tqdm import tqdm

CHUNK = 4 << 20  # bytes of one value in a TCPStore, which takes 8 MiB at most


class StreamingDiLoCo:
    """Chapter 3's DiLoCo for each fragment of the model, at steps of its own: H / fragments apart.

    Douillard et al. 2025, arXiv:2501.18512, the first of three changes; there fragments are layers.
    """

    def __init__(self, model: nn.Module, every: int, fragments: int, lr: float, momentum: float):
        self.parts = []
        for i, parameters in enumerate(cut(model, fragments)):
            part = DiLoCo(nn.ParameterList(parameters), every, lr, momentum)
            part.steps = i * every // fragments
            self.parts.append(part)

    def step(self) -> None:
        """After each inner step; a fragment whose turn it is synchronizes."""
        for part in self.parts:
            part.step()

    def finish(self) -> None:
        """Synchronize the fragments that have moved since their turn: a run ends with one model."""
        for part in self.parts:
            if part.steps % part.every:
                part.steps = -1
                part.step()


def cut(model: nn.Module, fragments: int) -> list[list[nn.Parameter]]:
    """The model's tensors in so many groups of about the same size: largest first, to the smallest."""
    groups: list[list[nn.Parameter]] = [[] for _ in range(fragments)]
    for parameter in sorted(model.parameters(), key=torch.Tensor.numel, reverse=True):
        min(groups, key=size_of).append(parameter)
    return groups


def size_of(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.nbytes for p in parameters)


@dataclass(frozen=True)
class Method:
    every: int = 1  # H, the steps from one synchronization to the next
    fragments: int = 0  # 0: synchronous data parallel
    outer_lr: float = 1.0
    outer_momentum: float = 0.0

    def __str__(self) -> str:
        if not self.fragments:
            return "data parallel"
        name = "DiLoCo" if self.fragments == 1 else f"streaming {self.fragments}"
        return f"{name} {self.outer_momentum:g}"


def train(
    method: Method,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[torch.Tensor],
) -> list[int]:
    """Train; return the bytes that this rank sent after each step, by Linux's count, and at the end."""
    fragments = max(1, method.fragments)
    diloco = StreamingDiLoCo(model, method.every, fragments, method.outer_lr, method.outer_momentum)
    sent = []
    for windows in batches:
        optimizer.zero_grad()
        next_byte_loss(model, windows).backward()
        before = bytes_sent()
        if not method.fragments:
            average_gradients(model)
        optimizer.step()
        if method.fragments:
            diloco.step()
        sent.append(bytes_sent() - before)
    before = bytes_sent()
    if method.fragments:
        diloco.finish()
    return [*sent, bytes_sent() - before]


def average_gradients(model: nn.Module) -> None:
    """What DDP does, in one message: with no bucket there is nothing to overlap."""
    gradients = [p.grad for p in model.parameters()]
    flat = mean_over_ranks(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def predict(method: Method, model: nn.Module, steps: int) -> list[float]:
    """The same from the schedule: a ring sends 2 (n - 1) / n of what is summed."""
    n = dist.get_world_size()
    sizes = [size_of(part) for part in cut(model, max(1, method.fragments))]
    phases = [i * method.every // len(sizes) for i in range(len(sizes))]
    pairs = list(zip(sizes, phases, strict=True))
    sent = [
        sum(size for size, phase in pairs if (step + phase) % method.every == 0)
        for step in range(1, steps + 1)
    ]
    left = sum(size for size, phase in pairs if phase)  # moved since their turn
    return [2 * (n - 1) / n * size for size in (*sent, left)]


class Mailbox:
    """DiLoCo without a collective: learners post how far they came, and nobody waits long for one.

    Who counts in a round is decided by the first learner that has waited enough, for all of them. The
    rounds are a log: a learner that was away reads what it missed and is where the others are.
    """

    def __init__(self, store: dist.Store, learner: int, learners: int, grace_s: float):
        self.store = store
        self.learner = learner
        self.learners = range(learners)
        self.grace_s = grace_s
        self.members = list(self.learners)  # of the last round

    def check_in(self, at: int) -> None:
        self.store.set(f"{at}/in/{self.learner}", "")

    def post(self, at: int, moved: torch.Tensor) -> None:
        content = moved.cpu().numpy().tobytes()
        for i in range(0, len(content), CHUNK):
            self.store.set(f"{at}/{self.learner}/{i}", content[i : i + CHUNK])
        self.store.set(f"{at}/{self.learner}", "")  # last: it is all there

    def decided(self, at: int) -> bool:
        return self.store.check([f"{at}/members"])

    def merge(self, at: int, like: torch.Tensor) -> torch.Tensor:
        """The mean of what the round's members have posted, added up in the same order by all."""
        deadline = time.monotonic() + self.grace_s
        while not self.decided(at):
            posted = [i for i in self.learners if self.store.check([f"{at}/{i}"])]
            awaited = [
                i for i in self.learners if i in self.members or self.store.check([f"{at}/in/{i}"])
            ]
            if set(awaited) <= set(posted) or (posted and time.monotonic() > deadline):
                self.store.compare_set(f"{at}/members", "", " ".join(map(str, posted)))
            else:
                time.sleep(0.001)
        self.members = [int(i) for i in self.store.get(f"{at}/members").split()]
        mean = torch.zeros_like(like)
        for i in self.members:
            chunks = range(0, like.nbytes, CHUNK)
            content = b"".join(self.store.get(f"{at}/{i}/{start}") for start in chunks)
            mean += torch.frombuffer(bytearray(content), dtype=like.dtype).to(like.device)
        return mean / len(self.members)


def train_by_mailbox(
    method: Method,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: list[torch.Tensor],
    mailbox: Mailbox,
    away: range,
) -> list[list[int]]:
    """Train; vanish in the middle of the first round of `away`. Returns each round's members."""
    common = parameters_to_vector(model.parameters()).detach().clone()
    outer = SGD(
        [common], method.outer_lr, method.outer_momentum, nesterov=method.outer_momentum > 0
    )
    members = []
    for at in range(len(batches) // method.every):
        if not mailbox.decided(at):
            mailbox.check_in(at)
            windows = batches[at * method.every : (at + 1) * method.every]
            for step, batch in enumerate(windows):
                if at in away and step == method.every // 2:  # dead to the others, until ...
                    mailbox.store.wait([f"{away[-1]}/members"])
                    break
                optimizer.zero_grad()
                next_byte_loss(model, batch).backward()
                optimizer.step()
            else:
                mailbox.post(at, common - parameters_to_vector(model.parameters()).detach())
        common.grad = mailbox.merge(at, common)
        outer.step()
        vector_to_parameters(common.clone(), model.parameters())
        members.append(mailbox.members)
    return members


def open_store(device: torch.device) -> dist.TCPStore:
    """A store in rank 0's process, which must not vanish."""
    host = os.environ["MASTER_ADDR"]
    store = None
    port = torch.zeros(1, dtype=torch.long, device=device)
    if dist.get_rank() == 0:
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        port += store.port
    dist.all_reduce(port)
    store = store or dist.TCPStore(host, int(port), is_master=False)
    dist.barrier()  # no connection comes or goes while bytes are counted
    return store


def start(args: argparse.Namespace, data: torch.Tensor) -> nn.Module:
    """What all methods go on from: some steps of synchronous data parallel on other windows."""
    model = byte_mlp(args, args.seed).to(data.device)
    batches = batches_of_rank(data, args.seed + 1_000_000, args.warm_up, args)
    train(Method(), model, AdamW(model.parameters(), lr=args.lr, fused=True), batches)
    return model


def sweep(
    methods: list[Method],
    first: nn.Module,
    data: torch.Tensor,
    held_out: torch.Tensor,
    args: argparse.Namespace,
) -> list[dict]:
    """Train by each method from the same weights on the same windows."""
    rows: list[dict] = []
    for method in tqdm(methods, disable=None if dist.get_rank() == 0 else True):
        model = copy.deepcopy(first)
        optimizer = AdamW(model.parameters(), lr=args.lr, fused=True)
        sent = train(method, model, optimizer, batches_of_rank(data, args.seed, args.steps, args))
        with torch.no_grad():
            loss = next_byte_loss(model, held_out).item()
        row: dict = {"method": str(method), "H": method.every, "sent": sent, "loss": loss}
        row["predicted"] = predict(method, model, args.steps)
        row["above"] = loss - rows[0]["loss"] if rows else 0.0
        row["spread"] = max_spread(model)
        rows.append(row)
    return rows


def after_4_steps(
    data: torch.Tensor, args: argparse.Namespace, method: Method, mailbox: Mailbox | None = None
) -> torch.Tensor:
    """The weights that a method reaches by SGD, in float64, so that a wrong sum shows."""
    model = byte_mlp(args, args.seed).to(data.device).double()
    optimizer = SGD(model.parameters(), lr=args.lr)
    batches = list(batches_of_rank(data, args.seed, 4, args))
    if mailbox:
        train_by_mailbox(method, model, optimizer, batches, mailbox, range(0))
    else:
        train(method, model, optimizer, batches)
    return parameters_to_vector(model.parameters()).detach()


def lose_a_learner(
    first: nn.Module, data: torch.Tensor, held_out: torch.Tensor, args: argparse.Namespace
) -> list[bool | None]:
    """Train by mailbox, the last rank being away for some rounds; report what that costs."""
    rank, n = dist.get_rank(), dist.get_world_size()
    store = open_store(data.device)
    mailbox = Mailbox(dist.PrefixStore("equal", store), rank, n, grace_s=300)
    whole = Method(2, 1, 0.7, 0.9)
    distance = after_4_steps(data, args, whole) - after_4_steps(data, args, whole, mailbox)
    claims = [
        check("SGD: max |DiLoCo by mailbox - by all-reduce|", distance.abs().max().item(), 1e-12)
    ]
    every = args.every[len(args.every) // 2]
    method = Method(every, 1, args.outer_lr, args.outer_momentum[0])
    rounds = args.steps // every
    gone = range(rounds // 3, min(rounds - 1, rounds // 3 + args.away))
    if n == 1 or not gone:  # nobody to lose, or no round to lose it in
        dist.barrier()  # the store goes with rank 0
        return claims
    losses = []
    for away in (range(0), gone):
        model = copy.deepcopy(first)
        optimizer = AdamW(model.parameters(), lr=args.lr, fused=True)
        mailbox = Mailbox(dist.PrefixStore(f"{len(away)}", store), rank, n, args.grace)
        batches = list(batches_of_rank(data, args.seed, args.steps, args))
        hours = away if rank == n - 1 else range(0)
        members = train_by_mailbox(method, model, optimizer, batches, mailbox, hours)
        with torch.no_grad():
            losses.append(next_byte_loss(model, held_out).item())
    done = sum(map(len, members))
    missed = sum(n - 1 not in ids for ids in members)
    back = sum(n - 1 in ids for ids in members[gone.stop :])
    say(f"by mailbox, H {every}: learner {n - 1} vanishes in round {gone[0] + 1} of {rounds}")
    say(f"learners per round  {' '.join(str(len(ids)) for ids in members)}")
    say(f"work that counts    {done} of {n * rounds} learner-rounds, {done / n / rounds:.0%}")
    say(f"had all waited      {1 - len(gone) / rounds:.0%}")
    say(f"held-out loss       {losses[1]:.3f}, and {losses[0]:.3f} had it stayed")
    return [
        *claims,
        check("rounds that the others did without it", missed, len(gone), at_least=True),
        check("spread of weights over learners at the end", max_spread(model), 0),
        expect("rounds that it counted in when it was back", back, 1, args.strict, at_least=True),
        expect("loss that its absence costs", losses[1] - losses[0], 0.1, args.strict),
    ]


def plot(rows: list[dict], path: Path) -> None:
    """Left: loss over H for each outer momentum. Right: what each step sends."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "ch11"
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    left.axhline(0, color="grey", linewidth=0.8)
    for name in dict.fromkeys(row["method"] for row in rows[1:]):
        points = [row for row in rows if row["method"] == name]
        style = "--s" if name.startswith("streaming") else "-o"
        left.plot([row["H"] for row in points], [row["above"] for row in points], style, label=name)
    every = sorted({row["H"] for row in rows[1:]})
    left.set(xlabel="H", ylabel="held-out loss above data parallel's (nats)", xscale="log")
    left.set_xticks(every, map(str, every))
    left.minorticks_off()
    of_middle = [row for row in rows[1:] if row["H"] == every[len(every) // 2]]
    for row in (rows[0], of_middle[0], of_middle[-1]):
        sent = [nbytes / 1e3 for nbytes in row["predicted"]]
        name = row["method"].rpartition(" ")[0] if row["H"] > 1 else row["method"]
        right.plot(range(1, len(sent) + 1), sent, label=name)
    right.set(xlabel="step", ylabel="kB sent", xlim=(0, 3 * every[len(every) // 2] + 1))
    right.set_ylim(0, 1.35 * max(rows[0]["predicted"]) / 1e3 + 1)  # room for the legend
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    figure.savefig(path, format="svg", facecolor="white", metadata={"Date": None})


def run(args: argparse.Namespace, device: torch.device) -> list[bool | None]:
    n = dist.get_world_size()
    text = read_bytes(args.data, at_least=20 * args.context).to(device)
    split = len(text) * 9 // 10
    data = text[:split]
    held_out = text[split:].unfold(0, args.context + 1, 1)[:8192]
    outer = [(1.0, 0.0), *((args.outer_lr, momentum) for momentum in args.outer_momentum)]
    methods = [Method(every, 1, *pair) for pair in outer for every in args.every]
    methods += [Method(every, args.fragments, *outer[0]) for every in args.every]
    first = start(args, data)
    rows = sweep([Method(), *methods], first, data, held_out, args)

    link = args.link * 1e6 / 8
    ranks = f"{n} rank{'s' * (n > 1)} on {device.type}"
    say(f"{ranks}: {args.steps} steps of AdamW, after {args.warm_up} together")
    say("                    MB sent per rank  largest burst, kB  a link of   held-out")
    say(f"method           H  counted predicted counted predicted  {args.link:g} Mbit/s  loss")
    for row in rows:
        say(f"{row['method']:<15}{row['H']:>3}{sum(row['sent']) / 1e6:>9.3f}"
            f"{sum(row['predicted']) / 1e6:>10.3f}{max(row['sent'][:-1]) / 1e3:>8.1f}"
            f"{max(row['predicted'][:-1]) / 1e3:>10.1f}{sum(row['predicted']) / link:>9.2f} s"
            f"{row['loss']:>8.3f} {row['above']:+.3f}")  # fmt: skip
    if dist.get_rank() == 0 and args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    if dist.get_rank() == 0 and args.plot:
        plot(rows, args.plot)

    together = after_4_steps(data, args, Method())
    averaged = after_4_steps(data, args, Method(1, 1))
    whole = after_4_steps(data, args, Method(1, 1, 0.7, 0.9))
    in_turn = after_4_steps(data, args, Method(1, args.fragments, 0.7, 0.9))
    claims = [
        check(
            "SGD, H 1, outer lr 1: max |DiLoCo - data parallel|",
            (averaged - together).abs().max().item(),
            1e-12,
        ),
        check("SGD, H 1: max |streaming - DiLoCo|", (in_turn - whole).abs().max().item(), 1e-12),
        check("spread of weights over ranks at the end", max(row["spread"] for row in rows), 0),
    ]
    if sum(rows[0]["sent"]):
        pairs = [pair for row in rows for pair in zip(row["sent"], row["predicted"], strict=True)]
        headers = max(abs(counted - predicted) for counted, predicted in pairs)
        claims.append(
            check("bytes of a step beyond the prediction", headers, 1500 * n * args.fragments)
        )
    return claims + lose_a_learner(first, data, held_out, args)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, default="resources/corpus.txt", help="text to learn, as bytes")
    add("--warm-up", type=int, default=48, help="synchronous steps before the methods part")
    add("--steps", type=int, default=96, help="inner optimizer steps of every method")
    add("--every", type=int, nargs="+", default=[4, 16, 48], help="H, local steps per round")
    add("--outer-lr", type=float, default=0.7, help="where there is outer momentum")
    add("--outer-momentum", type=float, nargs="+", default=[0.6, 0.9], help="Nesterov's, below 1")
    add("--fragments", type=int, default=3, help="of streaming: parts that take turns")
    add("--away", type=int, default=2, help="rounds that the last learner misses")
    add("--grace", type=float, default=1.0, help="seconds that a learner waits for another one")
    add("--link", type=float, default=10.0, help="Mbit/s, for which seconds are predicted")
    add("--batch", type=int, default=64, help="windows of text per step and rank")
    add("--context", type=int, default=8, help="bytes that predict the next")
    add("--width", type=int, default=64, help="of the hidden layers")
    add("--layers", type=int, default=4, help="hidden layers after the first")
    add("--lr", type=float, default=0.01, help="learning rate of AdamW, the inner optimizer")
    add("--seed", type=int, default=0, help="for weights and batches")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--json", type=Path, help="also write the rows to this file")
    add("--plot", type=Path, help="also draw loss over H and bytes over steps into this SVG file")
    add("--strict", action="store_true", help="exit 1 if an `expect:` line does not hold")
    args = parser.parse_args()
    for every in args.every:
        if every < 1 or args.steps % every:
            stop(f"--steps {args.steps} is no multiple of H = {every}: a run must end in a round")
    tensors = 5 + 4 * args.layers
    if not 1 <= args.fragments <= tensors:
        stop(f"--fragments {args.fragments}: the model has {tensors} tensors to cut it at")
    return args


# --- copied from other scripts; `make copies` keeps it equal to them ------------------------------


# Copied from ch01_multi_gpu_ddp.main
@record  # so that torchrun's summary names the error
def main() -> None:
    args = parse_args()
    device = join_group(args.device)
    claims_of = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(claims_of, run(args, device))  # nobody leaves while another is at work
    dist.destroy_process_group()  # not in a `finally`: section 3.1
    sys.exit(conclude(max(claims_of, key=lambda claims: claims.count(False))))  # the worst rank's


# Copied from ch01_multi_gpu_ddp.join_group
def join_group(wanted: str) -> torch.device:
    """Join the process group that the launcher describes; return this rank's device."""
    if "LOCAL_WORLD_SIZE" not in os.environ:
        stop(f"no launcher: type  torchrun --nproc_per_node=2 {sys.argv[0]}")
    local_rank, ranks_here = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    gpu = torch.accelerator.current_accelerator(check_available=True)
    gpus = torch.accelerator.device_count() if gpu and gpu.type != "mps" else 0
    if wanted == "auto":
        if ranks_here < int(os.environ["WORLD_SIZE"]):
            stop("several nodes may differ: type --device cuda, or --device cpu")
        wanted = gpu.type if gpu and gpus >= ranks_here else "cpu"
        if wanted == "cpu" and gpus and local_rank == 0:
            print(f"{ranks_here} ranks, but {gpus} GPUs: running on the CPU", file=sys.stderr)
    if wanted != "cpu" and gpus < ranks_here:
        stop(f"{ranks_here} ranks, but {gpus} GPUs here: type --device cpu, or start fewer ranks")
    if wanted == "cpu":
        device = torch.device("cpu")
        dist.init_process_group("gloo")
    else:
        device = torch.device(wanted, local_rank)
        torch.accelerator.set_device_index(local_rank)
        dist.init_process_group(device_id=device)  # PyTorch chooses the backend: NCCL for cuda
    dist.barrier()  # all are here before one may leave
    return device


# Copied from ch01_multi_gpu_ddp.max_spread
def max_spread(model: nn.Module) -> float:
    """Largest difference between any two ranks' copies of any weight."""
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    low, high = flat.clone(), flat.clone()
    dist.all_reduce(low, op=dist.ReduceOp.MIN)
    dist.all_reduce(high, op=dist.ReduceOp.MAX)
    return (high - low + 0 * flat).max().item()  # 0 * flat: MIN and MAX on gloo drop a NaN


# Copied from local_sgd.DiLoCo
class DiLoCo:
    """An optimizer of optimizers: SGD with Nesterov momentum on how far the ranks came on average.

    Douillard et al. 2023, arXiv:2311.08105, algorithm 1; there lr is 0.7, momentum 0.9, H 500.
    """

    def __init__(self, model: nn.Module, every: int, lr: float, momentum: float):
        self.model = model
        self.every = every
        self.steps = 0
        self.common = parameters_to_vector(model.parameters()).detach().clone()  # at the last sync
        self.outer = SGD([self.common], lr, momentum, nesterov=momentum > 0)

    @torch.no_grad()
    def step(self) -> None:
        """After each inner step; every H-th one synchronizes."""
        self.steps += 1
        if self.steps % self.every == 0:
            moved = self.common - parameters_to_vector(self.model.parameters())
            dist.all_reduce(moved)
            self.common.grad = (
                moved / dist.get_world_size()
            )  # downhill is minus this, as for a loss
            self.outer.step()
            vector_to_parameters(self.common.clone(), self.model.parameters())  # they become views


# Copied from local_sgd.batches_of_rank
def batches_of_rank(
    data: torch.Tensor, seed: int, steps: int, args: argparse.Namespace
) -> Iterator[torch.Tensor]:
    """This rank's windows of each step, the same for all methods: [batch, context + 1]."""
    n = dist.get_world_size()
    for step in range(steps):
        yield draw_windows(data, n * args.batch, args.context, step, seed)[dist.get_rank() :: n]


# Copied from gradient_accumulation_no_sync.bytes_on_wire
def bytes_on_wire() -> int:
    """Bytes that this process has given to its TCP connections: sent once, or about to be."""
    total = 0
    for link in Path("/proc/self/fd").iterdir():
        if link.is_socket():
            with socket.socket(fileno=os.dup(int(link.name))) as connection:
                if connection.family in (socket.AF_INET, socket.AF_INET6):
                    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 216)
                    sent, again = struct.unpack_from("2Q", info, 200)  # as in linux/tcp.h
                    (waiting,) = struct.unpack_from("I", info, 144)  # tcpi_notsent_bytes
                    total += sent - again + waiting
    return total


# Copied from ddp_comm_hooks.bytes_sent
def bytes_sent() -> int:
    """By this process so far, as Linux counts; 0 where it cannot, as with NCCL."""
    over_tcp = dist.get_backend() == "gloo" and sys.platform == "linux"
    return bytes_on_wire() if over_tcp else 0


# Copied from ddp_comm_hooks.byte_mlp
def byte_mlp(args: argparse.Namespace, seed: int) -> nn.Sequential:
    """Scores the byte that comes after `context` bytes: [batch, context] -> [batch, 256]."""
    torch.manual_seed(seed)
    layers = [nn.Embedding(256, 16), nn.Flatten(), nn.Linear(16 * args.context, args.width)]
    for _ in range(args.layers):
        layers += [nn.LayerNorm(args.width), nn.GELU(), nn.Linear(args.width, args.width)]
    return nn.Sequential(*layers, nn.GELU(), nn.Linear(args.width, 256))


# Copied from ddp_comm_hooks.next_byte_loss
def next_byte_loss(model: nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """Mean over windows [batch, context + 1] of the last byte's, in nats."""
    return F.cross_entropy(model(windows[:, :-1]), windows[:, -1])


# Copied from ddp_comm_hooks.draw_windows
def draw_windows(
    data: torch.Tensor, batch: int, context: int, step: int, seed: int
) -> torch.Tensor:
    """A step's windows of text, the same on all ranks: [batch, context + 1]."""
    draw = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
    starts = torch.randint(len(data) - context, (batch, 1), generator=draw)
    return data[starts + torch.arange(context + 1)]


# Copied from ddp_comm_hooks.mean_over_ranks
def mean_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    dist.all_reduce(tensor)
    return tensor / dist.get_world_size()


# Copied from ch01_single_gpu_baseline.read_bytes
def read_bytes(path: Path, at_least: int) -> torch.Tensor:
    """The file's bytes as integers from 0 to 255: [bytes]."""
    try:
        text = path.read_bytes()
    except OSError as error:
        stop(f"cannot read {path} ({error.strerror}): give a text file with --data FILE")
    if len(text) < at_least:
        stop(f"{path} has {len(text)} bytes, this run needs {at_least}: give a longer --data FILE")
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


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
