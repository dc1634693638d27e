r"""Federated learning: FedAvg and FedProx on clients that differ, and three clients that fail.

    python chapter11-trends-and-future-of-distributed-ai/code/ch11_fedavg.py \
        --plot chapter11-trends-and-future-of-distributed-ai/figures/fedavg.svg

On GPUs:
    python chapter11-trends-and-future-of-distributed-ai/code/ch11_fedavg.py --device cuda \
        --width 1024 --layers 4 --context 32 --batch 512 --rounds 200 --clients 100 --per-round 20

Look at "length" and "cosine" of the clients' updates, and how FedProx changes the one and not the
other. Then at the losses when all clients take part, and when three of ten do. Then at the round in
which one client vanishes, one sends NaN and one the wrong shape. Sections 11.3 and 11.4.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

CLASSES = ("aeiouy", "bcdfghjklmnpqrstvwxz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "0123456789", " \n")


@dataclass(frozen=True)
class Update:
    """What a client sends after a round: how far its weights have come, and on how many examples."""

    change: torch.Tensor  # [parameters]
    examples: int


@dataclass(frozen=True)
class Plan:
    """How a client trains in a round."""

    steps: int
    lr: float
    batch: int
    mu: float = 0.0  # FedProx's pull to the server's weights; 0 is FedAvg


def train_locally(
    model: nn.Module, weights: torch.Tensor, windows: torch.Tensor, plan: Plan, seed: int
) -> Update:
    """Some steps of SGD from the server's weights, on the client's windows alone.

    Li et al. 2018, arXiv:1812.06127, algorithm 2: the loss plus mu / 2 |w - the server's w|^2.
    """
    vector_to_parameters(weights.clone(), model.parameters())
    draw = torch.Generator().manual_seed(seed)
    for _ in range(plan.steps):
        batch = windows
        if plan.batch < len(windows):
            batch = windows[torch.randint(len(windows), (plan.batch,), generator=draw)]
        loss = next_byte_loss(model, batch)
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, model.parameters())])
        with torch.no_grad():
            now = parameters_to_vector(model.parameters())
            now -= plan.lr * (gradient + plan.mu * (now - weights))
            vector_to_parameters(now, model.parameters())
    return Update(parameters_to_vector(model.parameters()).detach() - weights, len(windows))


def why_refused(update: Update, weights: torch.Tensor) -> str | None:
    """What is wrong with an update, in one line; None if nothing that shows is wrong."""
    if update.change.shape != weights.shape:
        return f"sent a tensor {list(update.change.shape)}, the model is {list(weights.shape)}"
    bad = int((~update.change.isfinite()).sum())
    if bad:
        return f"{bad:,} of {len(weights):,} numbers are not finite"
    if update.examples < 1:
        return f"says that it has {update.examples} examples"
    return None


def average(updates: list[Update]) -> torch.Tensor:
    """The mean, weighted by examples and summed in float64."""
    total = sum(update.examples for update in updates)
    parts = (update.change.double() * (update.examples / total) for update in updates)
    return sum(parts, torch.zeros(())).to(updates[0].change.dtype)


Ask = Callable[[int, torch.Tensor], Update]  # a client's number, the server's weights


def one_round(
    weights: torch.Tensor, clients: list[int], ask: Ask, note: Callable[[str], None]
) -> tuple[torch.Tensor, list[Update]]:
    """The server's part: ask each client, leave out who fails, and average the others."""
    accepted = []
    for client in clients:
        try:
            update = ask(client, weights)
        except ConnectionError as error:
            note(f"client {client}: {error}: left out of this round")
            continue
        if reason := why_refused(update, weights):
            note(f"client {client}: {reason}: left out of this round")
        else:
            accepted.append(update)
    if not accepted:
        note("no client is left: the weights stay as they are")
        return weights, []
    return weights + average(accepted), accepted


def dirichlet_split(
    windows: torch.Tensor, clients: int, alpha: float, seed: int
) -> list[torch.Tensor]:
    """Deal the windows out by the class of the byte to predict: a small alpha gives a class to few.

    Hsu et al. 2019, arXiv:1909.06335, deal each client its classes; here each class is dealt out, so
    that the clients' sizes differ too. Each gets at least one window.
    """
    torch.manual_seed(seed)
    class_of = torch.full((256,), len(CLASSES))  # all other bytes are one class more
    for i, letters in enumerate(CLASSES):
        class_of[list(letters.encode())] = i
    classes = class_of[windows[:, -1].cpu()]
    owner = torch.empty_like(classes)
    for i in range(len(CLASSES) + 1):
        shares = torch.distributions.Dirichlet(torch.full((clients,), float(alpha))).sample()
        count = int((classes == i).sum())
        if count:
            owner[classes == i] = torch.multinomial(shares, count, replacement=True)
    owner[torch.randperm(len(owner))[:clients]] = torch.arange(clients)
    return [windows[(owner == client).to(windows.device)] for client in range(clients)]


def sample(clients: int, count: int, at: int, seed: int) -> list[int]:
    """The clients of a round, from the seed and the round alone."""
    draw = torch.Generator().manual_seed((seed * 1_000_003 + at) % 2**63)
    return sorted(torch.randperm(clients, generator=draw)[:count].tolist())


def agreement(updates: list[Update]) -> float:
    """Mean cosine between two clients' updates: 1 if all go the same way."""
    unit = torch.stack([F.normalize(update.change, dim=0) for update in updates])
    cosines = unit @ unit.T
    n = len(updates)
    return ((cosines.sum() - n) / (n * (n - 1))).item() if n > 1 else 1.0


def lengths_and_cosines(
    model: nn.Module,
    weights: torch.Tensor,
    shards: dict[str, list[torch.Tensor]],
    args: argparse.Namespace,
) -> list[dict]:
    """What all clients do in one round from the same weights, for numbers of local steps and mu."""
    rows: list[dict] = []
    say("all clients, one round   steps   length of an update   mu shortens it to   cosine")
    for name, windows_of in shards.items():
        for steps in (1, 8, 32):
            lengths = {}
            for mu in (0.0, args.mu):
                plan = Plan(steps, args.lr, 2 * args.batch, mu)
                updates = [
                    train_locally(model, weights, windows, plan, seed=client)
                    for client, windows in enumerate(windows_of)
                ]
                lengths[mu] = fmean(update.change.norm().item() for update in updates)
                row = {"data": name, "steps": steps, "mu": mu, "length": lengths[mu]}
                row["cosine"] = agreement(updates)
                # As if the gradient stayed what it is: u <- u - lr (g + mu u), from u = 0.
                pull = args.lr * mu
                row["predicted"] = (1 - (1 - pull) ** steps) / (steps * pull) if pull else 1.0
                row["shorter"] = lengths[mu] / lengths[0.0]
                rows.append(row)
                end = f"{row['shorter']:>10.2f} ({row['predicted']:.2f})" if mu else " " * 17
                start = f"{name}, mu {mu:g}"
                say(f"{start:<25}{steps:>5}{lengths[mu]:>22.2f}   {end}{row['cosine']:>9.3f}")
    return rows


def train_federated(
    shards: list[torch.Tensor],
    per_round: int,
    plan: Plan,
    held_out: torch.Tensor,
    args: argparse.Namespace,
) -> list[float]:
    """Rounds with a few clients each; the held-out loss after each round."""
    model = byte_mlp(args, args.seed).to(held_out.device)
    weights = parameters_to_vector(model.parameters()).detach().clone()
    losses = []
    for at in range(args.rounds):

        def ask(client: int, weights: torch.Tensor, at: int = at) -> Update:
            seed = (args.seed * 1_000_003 + at * len(shards) + client) % 2**63
            return train_locally(model, weights, shards[client], plan, seed)

        weights, _ = one_round(weights, sample(len(shards), per_round, at, args.seed), ask, say)
        vector_to_parameters(weights.clone(), model.parameters())
        with torch.no_grad():
            losses.append(next_byte_loss(model, held_out).item())
    return losses


def failing_round(
    model: nn.Module, weights: torch.Tensor, shards: list[torch.Tensor], plan: Plan
) -> list[bool | None]:
    """A round in which three clients fail is the round in which they were not asked."""
    everyone = list(range(len(shards)))
    vanishes, not_a_number, wrong_shape = everyone[-3:]

    def ask(client: int, weights: torch.Tensor) -> Update:
        update = train_locally(model, weights, shards[client], plan, seed=client)
        if client == vanishes:
            raise ConnectionError("no answer")
        if client == not_a_number:
            update.change[len(weights) // 2] = torch.nan
        if client == wrong_shape:
            return Update(update.change[:-1], update.examples)
        return update

    notes: list[str] = []
    after, _ = one_round(weights, everyone, ask, notes.append)
    without, _ = one_round(weights, everyone[:-3], ask, notes.append)
    for line in notes:
        say(line)
    return [
        check("clients left out, each with one line", len(notes), 3, at_least=True),
        check("max |round - round without them|", (after - without).abs().max().item(), 0),
    ]


def distance_from_one_step(
    shards: list[torch.Tensor], windows: torch.Tensor, args: argparse.Namespace
) -> float:
    """One step of each client on all it has, averaged, against one step on all that there is."""
    model = byte_mlp(args, args.seed).to(windows.device).double()
    weights = parameters_to_vector(model.parameters()).detach().clone()
    plan = Plan(1, args.lr, len(windows))
    clients = list(range(len(shards)))
    averaged, _ = one_round(
        weights, clients, lambda i, w: train_locally(model, w, shards[i], plan, 0), say
    )
    together = weights + train_locally(model, weights, windows, plan, 0).change
    return (averaged - together).abs().max().item()


def bytes_read_off(
    model: nn.Module, weights: torch.Tensor, windows: torch.Tensor, lr: float
) -> tuple[set[int], set[int]]:
    """Which bytes a client's text has, as its update tells the server, and as they are.

    The update's first part is the embedding's, and of that only the rows of bytes that occur move.
    """
    change = train_locally(model, weights, windows, Plan(1, lr, len(windows)), seed=0).change
    embedding = change[: model[0].weight.numel()].view(256, -1)
    told = embedding.abs().sum(1).nonzero().flatten().tolist()
    return set(told), set(windows[:, :-1].flatten().tolist())


def plot(curves: dict[str, list[float]], rows: list[dict], path: Path) -> None:
    """Left: held-out loss after each round. Right: how much the clients' updates agree."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "ch11"
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    for name, losses in curves.items():
        left.plot(range(1, len(losses) + 1), losses, label=name)
    left.set(xlabel="round", ylabel="held-out loss (nats)")
    for name in dict.fromkeys((row["data"], row["mu"]) for row in rows):
        points = [row for row in rows if (row["data"], row["mu"]) == name]
        right.plot(
            [row["length"] for row in points],
            [row["cosine"] for row in points],
            "-o" if name[1] == 0 else "--s",
            label=f"{name[0]}, mu {name[1]:g}",
        )
    right.set(xlabel="mean length of an update", ylabel="mean cosine between two updates")
    right.axhline(0, color="grey", linewidth=0.8)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    figure.savefig(path, format="svg", facecolor="white", metadata={"Date": None})


def run(args: argparse.Namespace, device: torch.device) -> list[bool | None]:
    text = read_bytes(args.data, at_least=20 * args.context).to(device)
    split = len(text) * 9 // 10
    held_out = text[split:].unfold(0, args.context + 1, 1)[:4096]
    windows = draw_windows(text[:split], args.windows, args.context, 0, args.seed)
    shards = {
        "same data": dirichlet_split(windows, args.clients, 100.0, args.seed),
        "different": dirichlet_split(windows, args.clients, args.alpha, args.seed),
    }
    for name, parts in shards.items():
        say(f"{name}: examples of each client  {' '.join(str(len(part)) for part in parts)}")

    model = byte_mlp(args, args.seed).to(device)
    weights = parameters_to_vector(model.parameters()).detach().clone()
    weights += train_locally(model, weights, windows, Plan(100, args.lr, 4 * args.batch), 0).change
    rows = lengths_and_cosines(model, weights, shards, args)

    plan = Plan(args.steps, args.lr, args.batch)
    prox = Plan(args.steps, args.lr, args.batch, args.mu)
    pooled = Plan(args.steps, args.lr, args.batch * args.clients)
    few = args.per_round
    different = shards["different"]
    of_few = f"different, {few} of {args.clients}"
    runs = {
        "centralized": ([windows], 1, pooled),
        "FedAvg, same data": (shards["same data"], args.clients, plan),
        "FedAvg, different": (different, args.clients, plan),
        f"FedProx {args.mu:g}, different": (different, args.clients, prox),
        f"FedAvg, {of_few}": (different, few, plan),
        f"FedProx {args.mu:g}, {of_few}": (different, few, prox),
    }
    title = f"{args.rounds} rounds of {args.steps} steps"
    say(f"{title:<35}MB moved   loss   worst of last quarter")
    curves: dict[str, list[float]] = {}
    for name, (parts, per_round, how) in runs.items():
        curves[name] = train_federated(parts, per_round, how, held_out, args)
        last = curves[name][-max(1, args.rounds // 4) :]
        moved = 2 * args.rounds * per_round * weights.nbytes / 1e6 if len(parts) > 1 else 0.0
        say(f"{name:<35}{moved:>8.1f}{fmean(last):>9.3f}{max(last):>10.3f}")
    if args.json:
        args.json.write_text(json.dumps({"rows": rows, "curves": curves}, indent=1) + "\n")
    if args.plot:
        plot(curves, rows, args.plot)

    smallest = min(different, key=len)
    told, there = bytes_read_off(model, weights, smallest, args.lr)
    failing = failing_round(model, weights, different, plan)
    say(
        f"the update of the client with {len(smallest)} examples tells which {len(told)} bytes it has"
    )
    quarter = max(1, args.rounds // 4)
    ends = [fmean(losses[-quarter:]) for losses in curves.values()]
    by = {(row["data"], row["steps"], row["mu"]): row for row in rows}
    same, other = (by[name, 1, 0.0]["cosine"] for name in shards)
    shorter = by["different", 8, args.mu]
    strict = args.strict
    return [
        *failing,
        check("bytes told wrongly by that update", len(told ^ there), 0),
        check("float64: max |one step by all clients - one step on all data|",
              distance_from_one_step(different, windows, args), 1e-12),
        expect("1 step: cosine that different data cost", same - other, 0.1, strict, True),
        expect("8 steps: error of the predicted length",
               abs(shorter["shorter"] / shorter["predicted"] - 1), 0.15, strict),
        expect("loss that different data cost", ends[2] - ends[1], 0.1, strict, True),
        expect("loss that few clients a round cost", ends[4] - ends[2], 0.1, strict, True),
    ]  # fmt: skip


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, default="resources/corpus.txt", help="text to learn, as bytes")
    add("--windows", type=int, default=20_000, help="examples of all clients together")
    add("--clients", type=int, default=10, help="among whom the examples are dealt out")
    add("--per-round", type=int, default=3, help="clients in a round of the last two runs")
    add("--alpha", type=float, default=0.1, help="Dirichlet's, above 0: the smaller the less alike")
    add("--mu", type=float, default=0.1, help="FedProx's pull, above 0")
    add("--rounds", type=int, default=16, help="of each run")
    add("--steps", type=int, default=8, help="of SGD by a client in a round")
    add("--lr", type=float, default=0.5, help="of SGD")
    add("--batch", type=int, default=64, help="examples per step of a client, if it has as many")
    add("--context", type=int, default=8, help="bytes that predict the next")
    add("--width", type=int, default=32, help="of the hidden layers")
    add("--layers", type=int, default=1, help="hidden layers after the first")
    add("--seed", type=int, default=0, help="for weights, shares, samples of clients and batches")
    add("--device", default="auto", help="auto, cpu, cuda, ...")
    add("--json", type=Path, help="also write the rows and curves to this file")
    add("--plot", type=Path, help="also draw losses, lengths and cosines into this SVG file")
    add("--strict", action="store_true", help="exit 1 if an `expect:` line does not hold")
    args = parser.parse_args()
    if args.clients < 4:
        stop(f"--clients {args.clients}: three of them fail, so there must be 4 or more")
    if not 1 <= args.per_round <= args.clients:
        stop(f"--per-round {args.per_round}: there are {args.clients} clients")
    if args.alpha <= 0:
        stop(f"--alpha {args.alpha:g}: Dirichlet's parameter is above 0")
    if args.windows < args.clients:
        stop(f"--windows {args.windows}: each of {args.clients} clients needs one")
    return args


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)  # the products are small
    sys.exit(conclude(run(args, pick_device(args.device))))


# --- copied from other scripts; `make copies` keeps it equal to them ------------------------------


# Copied from ch01_single_gpu_baseline.pick_device
def pick_device(wanted: str) -> torch.device:
    """The accelerator if there is one, unless told otherwise."""
    found = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if wanted not in ("auto", "cpu", found.type):
        stop(f"--device {wanted}: this machine has {found.type}; type --device {found.type}")
    return torch.device("cpu") if wanted == "cpu" else found


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
