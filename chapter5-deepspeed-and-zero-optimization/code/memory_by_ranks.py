"""DDP, FSDP2 and ZeRO on 1, 2 and 4 ranks: what each needs, what its own library says, what is there.

    python chapter5-deepspeed-and-zero-optimization/code/memory_by_ranks.py

The ranks are forked by the script. Look at the two estimators of DeepSpeed: of stage 2 it says a
little more than there is, of stage 3 less in what is cut, and more by the largest layer. Section 5.4.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
import warnings
from collections.abc import Iterable
from typing import NoReturn

import deepspeed
import torch
import torch._dynamo  # before the group, or gloo's threads outlive it: section 3.8
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
from torch import nn
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

RANKS = (1, 2, 4)
WAYS = ("DDP", "FSDP2", "ZeRO 1", "ZeRO 2", "ZeRO 3")
Found = dict[str, tuple[float, float]]  # by way: bytes by the library's estimate, and measured


def predict(way: str, n: int) -> float:
    """Bytes per parameter of this rank while AdamW runs: weights, gradients, moments, no activations.

    DDP and FSDP2 in float32: 4 + 4 + 8. ZeRO in bfloat16: weights 2; for the optimizer's part weights,
    gradients and moments in float32, 16. ZeRO 3 keeps its part of the 16-bit gradients too; ZeRO 1 and
    2 have given them back by then.
    """
    stages = {"DDP": 16, "FSDP2": 16 / n, "ZeRO 3": (2 + 2 + 16) / n}
    return stages.get(way, 2 + 16 / n)


def estimate(way: str, n: int, parameters: int, largest: int) -> float:
    """What DeepSpeed's own estimators say, in bytes; of ZeRO 1 they know nothing."""
    if way == "ZeRO 2":
        return estimate_zero2_model_states_mem_needs(parameters, n, 1, cpu_offload=False)[1]
    if way == "ZeRO 3":
        return estimate_zero3_model_states_mem_needs(parameters, largest, n, 1, False, False)[1]
    return float("nan")


def train_by_torch(way: str, model: nn.Module, window: torch.Tensor) -> tuple[float, float]:
    """PyTorch's tracker's bytes, and those of the tensors, after the second backward."""
    if way == "DDP":
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    else:
        mesh = init_device_mesh(window.device.type, (dist.get_world_size(),))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    if way == "DDP":
        tracker = MemTracker()
        tracker.track_external(model, optimizer)
    else:
        tracker = FSDPMemTracker(model, optimizer)
        tracker.track_inputs((window,))
    with tracker:
        for step in range(2):
            loss_of(model, window).backward()
            if step == 1:
                break
            optimizer.step()
            optimizer.zero_grad()
            tracker.reset_mod_stats()
        parts = next(iter(tracker.get_tracker_snapshot("current").values()))
    moments = [t for state in optimizer.state.values() for t in state.values()]
    tensors = [*model.parameters(), *moments, *(p.grad for p in model.parameters())]
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    return parts["Total"], sum(storages(local).values())


def train_by_deepspeed(stage: int, model: nn.Module, window: torch.Tensor) -> float:
    """Bytes of the engine's tensors while PyTorch's AdamW runs inside of it, in the second step."""
    config = {
        "train_micro_batch_size_per_gpu": len(window),
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 100_000},
    }
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    parameters = list(model.parameters())
    engine = deepspeed.initialize(model=model, model_parameters=parameters, config=config)[0]
    base = engine.optimizer.optimizer
    step = base.step
    found = []

    def noted(*args: object, **kwargs: object) -> None:
        step(*args, **kwargs)
        gradients = [p.grad for group in base.param_groups for p in group["params"]]
        found.append(sum(state_held(engine)) + sum(storages(gradients).values()))
        found[-1] += gradients_held(engine)

    base.step = noted
    for _ in range(2):
        engine.backward(loss_of(engine, window))
        engine.step()
    engine.destroy()
    return found[-1]


def loss_of(model: nn.Module, window: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(window[:, :-1]).float(), window[:, 1:].flatten())


def in_rank(rank: int, n: int, folder: str, args: argparse.Namespace, pipe: object) -> None:
    """One of n ranks: all ways, one after the other; rank 0 sends what it has found."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(n), "LOCAL_RANK": str(rank)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # nothing is built
    deepspeed.utils.logger.setLevel("ERROR")
    warnings.filterwarnings("ignore")  # DeepSpeed's calls of what is deprecated
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/{n}", rank=rank, world_size=n)
    draw = torch.Generator().manual_seed(args.seed)
    window = torch.randint(256, (2, 9), generator=draw)
    found = {}
    for way in WAYS:
        torch.manual_seed(args.seed)
        model = ResidualModel(args.width, args.layers)
        parameters = sum(p.numel() for p in model.parameters())
        layers = [sum(p.numel() for p in m.parameters(recurse=False)) for m in model.modules()]
        if way.startswith("ZeRO"):
            said = estimate(way, n, parameters, max(layers))
            measured = train_by_deepspeed(int(way[-1]), model, window)
        else:
            said, measured = train_by_torch(way, model, window)
        found[way] = (said / parameters, measured / parameters)
    if rank == 0:
        pipe.send((parameters, found))
    dist.barrier()
    os._exit(0)  # DeepSpeed keeps the group: gloo's threads would abort Python's end


def measure(n: int, args: argparse.Namespace) -> tuple[int, Found]:
    """Fork n ranks; the number of parameters, and what rank 0 has found."""
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        here, there = fork.Pipe(duplex=False)
        ranks = [fork.Process(target=in_rank, args=(r, n, folder, args, there)) for r in range(n)]
        for process in ranks:
            process.start()
        there.close()
        try:
            found = here.recv()
        except EOFError:
            stop(f"a rank of {n} has failed, see above")
        finally:
            for process in ranks:
                process.join()
    return found


def main() -> None:
    args = parse_args()
    found = {n: measure(n, args) for n in RANKS}
    parameters = found[1][0]
    say(f"{parameters:,} parameters; bytes per parameter on rank 0 while AdamW runs")
    say(f"{'':<7}" + "".join(f"{f'{n} rank' + 's' * (n > 1):>30}" for n in RANKS))
    say(f"{'':<7}" + f"{'predicted':>11}{'library':>9}{'measured':>10}" * len(RANKS))
    off = []
    for way in WAYS:
        row = ""
        for n in RANKS:
            guess = predict(way, n)
            said, measured = found[n][1][way]
            row += f"{guess:>11.2f}{said:>9.2f}{measured:>10.2f}".replace("nan", "  -")
            off.append(abs(measured / guess - 1))
        say(f"{way:<7}{row}")
    sys.exit(conclude([check("error of what is predicted", max(off), 0.05)]))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=96, help="size of a token's vector")
    parser.add_argument("--layers", type=int, default=6, help="blocks")
    parser.add_argument("--seed", type=int, default=0, help="for weights and tokens")
    return parser.parse_args()


# --- copied from other scripts; `make copies` keeps it equal to them ------------------------------


# Copied from train.storages
def storages(tensors: Iterable[torch.Tensor | None]) -> dict[int, int]:
    """Bytes by address of what the tensors keep alive, each storage once."""
    found = {}
    for tensor in tensors:
        if tensor is not None and tensor.numel():
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


# Copied from train.gradients_held
def gradients_held(engine: deepspeed.DeepSpeedEngine) -> int:
    """Bytes of gradients on this rank, in whichever form this stage has them."""
    optimizer = engine.optimizer
    tensors = [p.grad for p in engine.module.parameters()]
    if engine.zero_optimization_stage() == 3:
        tensors.append(optimizer.grad_partitions_flat_buffer)
    elif engine.zero_optimization_stage() > 0:
        for groups in (optimizer.averaged_gradients, optimizer.all_grad_tensors):
            tensors += [t for group in groups.values() for t in group or ()]
    return sum(storages(tensors).values())


# Copied from train.state_held
def state_held(engine: deepspeed.DeepSpeedEngine) -> tuple[int, int]:
    """Bytes of weights, and of optimizer state with the weights' fp32 copy, between two steps."""
    parameters = list(engine.module.parameters())
    weights = storages([getattr(p, "ds_tensor", p) for p in parameters])
    optimizer = engine.optimizer
    base = getattr(optimizer, "optimizer", optimizer)  # PyTorch's, inside DeepSpeed's
    states = [t for state in base.state.values() for t in state.values() if torch.is_tensor(t)]
    states += [p for group in base.param_groups for p in group["params"]]
    states += getattr(optimizer, "fp32_partitioned_groups_flat", [])
    both = storages(states) | weights
    return sum(weights.values()), sum(both.values()) - sum(weights.values())


# Copied from fsdp_from_scratch.ResidualModel
class ResidualModel(nn.Module):
    """A vocabulary of 257, which no number of ranks above one divides, and biases that are not zero."""

    def __init__(self, width: int, layers: int):
        super().__init__()
        self.embed = nn.Embedding(257, width)
        self.blocks = nn.ModuleList(ResidualBlock(width) for _ in range(layers))
        self.head = nn.Linear(width, 257)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:  # [batch, seq] -> [batch x seq, 257]
        x = self.embed(tokens.flatten())
        for block in self.blocks:
            x = block(x)
        return self.head(x)


# Copied from fsdp_from_scratch.ResidualBlock
class ResidualBlock(nn.Module):
    """x + down(relu(up(x))): [tokens, width] to the same."""

    def __init__(self, width: int):
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(x).relu())


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
