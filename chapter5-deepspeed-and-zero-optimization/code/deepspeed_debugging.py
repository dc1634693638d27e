"""Seven mistakes of the first week with DeepSpeed: each made, found by its symptom, and cured.

    torchrun --nproc_per_node=2 chapter5-deepspeed-and-zero-optimization/code/deepspeed_debugging.py

Look at the symptoms: most of them are no errors. Section 5.7.
"""

import argparse
import contextlib
import copy
import io
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from pydantic import ValidationError
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.utils import file_baton

CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 0.0,
    "optimizer": {"type": "SGD", "params": {"lr": 0.1}},  # its steps show a gradient's length
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {"reduce_bucket_size": 10_000, "stage3_param_persistence_threshold": 0},
}
LR = 0.1
SHAPE = (2, 8)  # of a micro batch


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))


def start(stage: int = 0, mpu: object = None, **changes: object) -> deepspeed.DeepSpeedEngine:
    """An engine with CONFIG but for some keys; None takes a key away."""
    config = copy.deepcopy(CONFIG) | changes
    config["zero_optimization"]["stage"] = stage
    config = {key: value for key, value in config.items() if value is not None}
    model = build()
    return deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=config, mpu=mpu
    )[0]


def loss_of(model: nn.Module, rank: int, number: int) -> torch.Tensor:
    """A rank's loss on its micro batch of this number."""
    draw = torch.Generator().manual_seed(100 * number + rank)
    device = next(model.parameters()).device
    return (4 * model(torch.randn(SHAPE, generator=draw).to(device))).square().mean()


def train(engine: deepspeed.DeepSpeedEngine, micro_batches: int, steps: int = 1) -> None:
    """Forward, backward and `steps` times step() on each micro batch: once is right."""
    for number in range(micro_batches):
        engine.backward(loss_of(engine, dist.get_rank(), number))
        for _ in range(steps):
            engine.step()


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().cpu().flatten() for p in model.parameters()])  # [parameters]


def reference(micro_batches: int, accumulation: int) -> torch.Tensor:
    """What one process's plain PyTorch makes of all ranks' micro batches: its weights."""
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), LR)
    for number in range(micro_batches):
        for rank in range(dist.get_world_size()):
            loss = loss_of(model, rank, number)
            (loss / (dist.get_world_size() * accumulation)).backward()
        if (number + 1) % accumulation == 0:
            optimizer.step()
            optimizer.zero_grad()
    return flat(model)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a.cpu() - b.cpu()).abs().max().item()


def said(mistake: Callable[[], object]) -> str:
    """The error that a mistake ends with, or nothing."""
    try:
        mistake()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def show(mistake: str, symptom: str, cause: str, cure: str) -> None:
    say(f"\n{mistake}")
    for name, text in (("symptom", symptom), ("cause", cause), ("cure", cure)):
        say(f"  {name:<9}{text}")


def batch() -> list[bool | None]:
    n = dist.get_world_size()
    sizes = {"train_batch_size": 12, "train_micro_batch_size_per_gpu": 1}
    symptom = said(lambda: start(**sizes, gradient_accumulation_steps=5))
    cured = start(train_micro_batch_size_per_gpu=1, gradient_accumulation_steps=5)
    show(
        "batch: three sizes that do not fit each other",
        symptom,
        f"12 is not micro batch 1 x accumulation 5 x {n} ranks: made for other ranks?",
        f"give two of the three; without train_batch_size it is {cured.train_batch_size()}",
    )
    return [
        check("the error names the product", symptom.count(f"12 != 1 * 5 * {n}"), 1, True),
        check("error of the size computed", abs(cured.train_batch_size() - 5 * n), 0),
    ]


REFUSING = ["zero_optimization", "bf16", "fp16", "tensor_parallel", "comms_logger", "compile"]
SILENT = ["flops_profiler", "checkpoint", "data_types", "aio", "activation_checkpointing"]


def key() -> list[bool | None]:
    wrong = {"gradient_cliping": 0.5, "flops_profiler": {"enabled": False, "profile_stpe": 3}}
    engine = start(gradient_clipping=None, **wrong)
    found = unread(CONFIG | wrong)
    show(
        "key: a typing error",
        f'nothing; with "gradient_cliping": 0.5 it clips at {engine.gradient_clipping()}',
        "DeepSpeed looks up the keys that it knows, and no others",
        f"ask which ones it has not looked at: {', '.join(found)}",
    )
    say(f"  refuse   {', '.join(REFUSING)}")
    say(f"  ignore   {', '.join(SILENT)}")
    surprises = [s for s in REFUSING if not refuses(s)] + [s for s in SILENT if refuses(s)]
    right = {"gradient_cliping", "flops_profiler.profile_stpe"}
    return [
        check("it clips at", engine.gradient_clipping(), 1, True),
        check("sections that do otherwise", len(surprises), 0),
        check("found wrongly, or not found", len(set(found) ^ right), 0),
    ]


def clipping() -> list[bool | None]:
    first = flat(build())
    lengths = []
    for value in (None, 0.0):
        engine = start(gradient_clipping=value)
        train(engine, 1)
        lengths.append((flat(engine.module) - first).norm().item() / LR)
    true = (reference(1, 1) - first).norm().item() / LR
    show(
        "clipping: no key, and yet",
        f"nothing; the first gradient has a length of {true:.2f}, the step one of {lengths[0]:.2f}",
        "without the key DeepSpeed clips at 1.0 (since June 2026)",
        f'"gradient_clipping": 0.0 if you mean none: {lengths[1]:.2f}',
    )
    return [
        check("|step without the key - 1|", abs(lengths[0] - 1), 1e-4),
        check("gradient's length", true, 1.5, True),
        check("|step at 0.0 - gradient|", abs(lengths[1] - true), 1e-4),
    ]


def step() -> list[bool | None]:
    never = start(gradient_accumulation_steps=2)
    train(never, 4, steps=0)
    seldom = start(gradient_accumulation_steps=2)  # as one is used to from plain PyTorch
    for number in range(4):
        seldom.backward(loss_of(seldom, dist.get_rank(), number))
        if number % 2 == 1:
            seldom.step()
    often = start(gradient_accumulation_steps=2)
    train(often, 4, steps=2)
    symptom = said(lambda: train(start(1), 1, steps=2))
    accumulating = said(lambda: train(start(1, gradient_accumulation_steps=2), 1, steps=2))
    cured = start(1, gradient_accumulation_steps=2)
    train(cured, 4)
    show(
        "step: engine.step() forgotten, or called too often",
        f"accumulation 2, 4 micro batches: {never.global_steps} updates without it, "
        f"{seldom.global_steps} if called after every second, {often.global_steps} if twice after each"
        f"\n           ZeRO 0: no error; twice at ZeRO 1: {symptom}; accumulating: {accumulating}",
        "each call counts as a micro batch; the update comes with every accumulation-th call",
        f"one call after each backward: {cured.global_steps} updates, those of one process",
    )
    counts = [never.global_steps, seldom.global_steps, often.global_steps]
    away = distance(flat(cured.module), reference(4, 2))
    return [
        check("updates that are not 0, 1, 4", counts != [0, 1, 4], 0),
        check("errors at ZeRO 1", bool(symptom) + bool(accumulating), 2, True),
        check("cured: max |weights - one process's|", away, 1e-5),
    ]


def empty() -> list[bool | None]:
    engine = start(3)
    weight = engine.module[0].weight
    norm = weight.norm().item()
    symptom = said(lambda: weight * torch.ones(8, 8, device=weight.device))
    with deepspeed.zero.GatheredParameters(weight, modifier_rank=0):
        gathered = weight.detach().clone()
        if dist.get_rank() == 0:
            weight.data.fill_(3)
    with deepspeed.zero.GatheredParameters(weight):
        written = weight.detach().clone()
    show(
        "empty: a weight at stage 3",
        f"its norm is {norm:.1f}, without an error; {symptom}",
        f"outside of forward it has {weight.numel()} of {weight.ds_numel} numbers; "
        f"this rank's {weight.ds_tensor.numel()} are in ds_tensor",
        "with deepspeed.zero.GatheredParameters(weight): on all ranks; modifier_rank=0 to write",
    )
    right = build()[0].weight.detach()
    return [
        check("numbers there, and their norm", weight.numel() + norm, 0),
        check("max |gathered - the model's|", distance(gathered, right), 0),
        check("max |written by rank 0 - read|", (written - 3).abs().max().item(), 0),
    ]


BUILDER = """
import runpy, sys, time
baton = runpy.run_path(sys.argv[1])["FileBaton"](sys.argv[2])
print(baton.try_acquire(), flush=True)
time.sleep(600)  # it compiles
"""


def holders(path: Path) -> list[int]:
    """The processes that have this file open: whoever builds has."""
    found = []
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if descriptor.resolve() == path.resolve():
                found.append(int(descriptor.parts[2]))
        except OSError:  # another user's process, or one that has just ended
            continue
    return found


def lock() -> list[bool | None]:
    with tempfile.TemporaryDirectory() as folder:  # instead of ~/.cache/torch_extensions
        path = Path(folder, "cpu_adam", "lock")
        path.parent.mkdir()
        argv = [sys.executable, "-c", BUILDER, file_baton.__file__, str(path)]
        builder = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
        acquired = builder.stdout.readline().strip() == "True"
        building = len(holders(path))
        builder.kill()
        builder.wait()
        left = len(holders(path))
        found = list(Path(folder).rglob("lock"))  # find ~/.cache/torch_extensions -name lock
        next_run = threading.Thread(target=file_baton.FileBaton(path).wait, daemon=True)
        next_run.start()
        next_run.join(0.5)
        waits = next_run.is_alive()
        for stale in found:
            if not holders(stale):
                stale.unlink()
        next_run.join(20)
        goes_on = not next_run.is_alive()
    show(
        "lock: a build was killed",
        "it stands still without a word; py-spy dump shows wait, in file_baton.py",
        f"a file: {building} process had it open, after the kill {left}; and while it exists, all wait",
        "find ~/.cache/torch_extensions -name lock; if nobody has it open (fuser -v), remove it",
    )
    return [
        check("processes that hold it during a build", acquired * building, 1, True),
        check("processes that hold it after the kill", left, 0),
        check("the next run waits", waits, 1, True),
        check("and goes on when the file is gone", len(found) * goes_on, 1, True),
    ]


class Alone:
    """Tells DeepSpeed that each rank is a training of its own: what another number of ranks sees."""

    def __init__(self) -> None:
        groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
        group = groups[dist.get_rank()]
        for what in ("data", "model", "tensor_model"):
            setattr(self, f"get_{what}_parallel_group", lambda: group)
            setattr(self, f"get_{what}_parallel_world_size", lambda: 1)
            setattr(self, f"get_{what}_parallel_rank", lambda: 0)


def ranks() -> list[bool | None]:
    n = dist.get_world_size()
    if n == 1:
        say("\nranks: a checkpoint of another number of ranks: not made, wants 2 ranks or more")
        return []
    names = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(names)
    (folder,) = names
    engine = start(1)
    train(engine, 2)
    engine.save_checkpoint(folder, tag="saved")
    missing = engine.load_checkpoint(f"{folder}/none")
    alone = start(1, mpu=Alone())
    symptom = said(lambda: alone.load_checkpoint(folder, tag="saved"))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        state = get_fp32_state_dict_from_zero_checkpoint(folder, tag="saved")
    cured = build()
    cured.load_state_dict(state)
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder)
    show(
        "ranks: a checkpoint of another number of ranks",
        symptom,
        f"each of the {n} files has the optimizer's state of one part",
        "the weights alone: zero_to_fp32; with the moments: a universal checkpoint (section 5.6)",
    )
    words = f"used a DP world size of {n} but the current world size is 1"
    return [
        check("the error names both numbers", symptom.count(words), 1, True),
        check("max |weights loaded - saved|", distance(flat(cured), flat(engine.module)), 0),
        check("what a wrong folder gives, None and None", missing.count(None), 2, True),
    ]


MISTAKES = {
    function.__name__: function for function in (batch, key, clipping, step, empty, lock, ranks)
}


def run(args: argparse.Namespace, device: torch.device) -> list[bool | None]:
    # Else DeepSpeed compiles C++ of its own on a CPU, and a build that is killed blocks the next.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)  # of DeepSpeed's calls
    deepspeed.utils.logger.setLevel("ERROR")  # it warns of SGD at each start
    n = dist.get_world_size()
    say(f"{n} rank{'s' * (n > 1)} on {device.type}")
    claims = []
    for name, mistake in MISTAKES.items():
        if args.only in (None, name):
            claims += mistake()
    say("")
    return claims


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=MISTAKES, help="one mistake; default: all")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    return parser.parse_args()


@record  # so that torchrun's summary names the error
def main() -> None:
    args = parse_args()
    device = join_group(args.device)
    claims = run(args, device)
    dist.barrier()  # nobody leaves while another is at work
    dist.destroy_process_group()  # not in a `finally`: section 3.1
    os._exit(conclude(claims))  # DeepSpeed keeps the group: gloo's threads would abort Python's end


# --- copied from other scripts; `make copies` keeps it equal to them ------------------------------


# Copied from train.unread
def unread(config: dict) -> list[str]:
    """The keys, at any depth, that DeepSpeed's parser does not look at and does not refuse itself."""
    batch = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    asked = Asked({key: value for key, value in config.items() if key not in batch})
    asked["train_micro_batch_size_per_gpu"] = 1  # the three are judged when the ranks are known
    DeepSpeedConfig(asked)
    elsewhere = {"sequence_parallel_size", "data_parallel_size"}  # asked for by others
    found = [key for key in asked if key not in asked.names | elsewhere]
    sections = {key: value for key, value in asked.items() if isinstance(value, Asked)}
    inside = [(name, section) for name, section in sections.items() if not refuses(name)]
    while inside:
        at, section = inside.pop()
        if not section.names or at.endswith(".params"):  # handed on whole, as to the optimizer
            continue
        for key, value in section.items():
            if key not in section.names:
                found.append(f"{at}.{key}")
            elif isinstance(value, Asked):
                inside.append((f"{at}.{key}", value))
    return found


# Copied from train.refuses
def refuses(section: str) -> bool:
    """Whether DeepSpeed refuses a key in this section that it does not know: pydantic checks it."""
    try:
        DeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, section: {"no_such_key": 1}})
    except ValidationError:
        return True
    return False


# Copied from train.Asked
class Asked(dict):
    """A configuration, at each depth, that notes which of its keys DeepSpeed looks for."""

    def __init__(self, values: dict):
        super().__init__({k: Asked(v) if isinstance(v, dict) else v for k, v in values.items()})
        self.names = set()

    def __contains__(self, name):
        self.names.add(name)
        return super().__contains__(name)

    def __getitem__(self, name):
        self.names.add(name)
        return super().__getitem__(name)

    def get(self, name, default=None):
        self.names.add(name)
        return super().get(name, default)

    def keys(self):
        return self  # for `name in config.keys()`


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
