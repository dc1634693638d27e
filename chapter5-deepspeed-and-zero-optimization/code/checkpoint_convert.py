r"""ZeRO's shards as fp32 weights, a safetensors file and a universal checkpoint: the same bits in each.

    torchrun --nproc_per_node=2 chapter5-deepspeed-and-zero-optimization/code/checkpoint_convert.py --out runs/ch05_convert
    torchrun --nproc_per_node=3 chapter5-deepspeed-and-zero-optimization/code/checkpoint_convert.py --out runs/ch05_convert --resume

On GPUs:
    torchrun --nproc_per_node=8 chapter5-deepspeed-and-zero-optimization/code/checkpoint_convert.py --out runs/ch05_convert \
        --width 2048 --layers 12 --context 256 --batch 32

The first run saves and converts, the second goes on with another number of ranks. Look at the last
column, at what DeepSpeed says to another stage, and at what that costs. Section 5.6.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import shutil
import sys
import traceback
import warnings
from pathlib import Path
from typing import NoReturn

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.checkpoint import ds_to_universal
from deepspeed.utils.zero_to_fp32 import (
    convert_zero_checkpoint_to_fp32_state_dict,
    get_fp32_state_dict_from_zero_checkpoint,
)
from safetensors.torch import load_file
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record

RECIPE = ["context", "batch", "width", "layers", "steps", "lr", "seed"]
OTHER_STAGE = {3: 1, 2: 3}  # of each stage that is saved, one with another layout
RESUMED = [(3, 3), (2, 2), (2, 1)]  # saved at, resumed at: stages 1 and 2 have one layout
WHOLE_BELOW = {"stage3_param_persistence_threshold": 0}  # else all of a small model stays whole
Weights = dict[str, torch.Tensor]


def engine_at(
    args: argparse.Namespace, stage: int, weights: Weights | None = None, universal: bool = False
) -> deepspeed.DeepSpeedEngine:
    """An engine on the seed's weights or on others; it loads DeepSpeed's shards, or universal."""
    torch.manual_seed(args.seed)
    model = ResidualModel(args.width, args.layers)
    if weights:
        model.load_state_dict(weights)
    config = {
        "train_batch_size": args.batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": args.lr, "torch_adam": True}},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 5_000_000} | WHOLE_BELOW,
        "checkpoint": {"load_universal": universal},
    }
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]


def train_on(engine: deepspeed.DeepSpeedEngine, tokens: torch.Tensor) -> list[float]:
    """The losses of a step on each of the batches: [steps, batch, context + 1]."""
    losses = []
    for batch in tokens.to(engine.device):
        loss = part_of_loss(engine, batch)
        engine.backward(loss * dist.get_world_size())  # DeepSpeed takes a mean over the ranks
        engine.step()
        dist.all_reduce(loss.detach_())
        losses.append(loss.item())
    return losses


def whole_weights(engine: deepspeed.DeepSpeedEngine) -> Weights:
    """The weights that the engine trains, gathered where they are cut: to be called by all ranks."""
    parameters = dict(engine.module.named_parameters())
    cut = list(parameters.values()) if engine.zero_optimization_stage() == 3 else []
    with deepspeed.zero.GatheredParameters(cut):
        return {name: p.detach().clone() for name, p in parameters.items()}


def digests(weights: Weights) -> dict[str, str]:
    """SHA-256 of each tensor's type, shape and bytes."""
    found = {}
    for name, tensor in weights.items():
        digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        found[name] = digest.hexdigest()
    return found


def to_universal(shards: Path, universal: Path) -> None:
    """What `python -m deepspeed.checkpoint.ds_to_universal` does, in this process."""
    flags = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False}
    flags |= {"strict": True, "inject_missing_state": True}  # without it only Megatron's are taken
    ds_to_universal.main(
        argparse.Namespace(input_folder=str(shards), output_folder=str(universal), **flags)
    )


def universal_weights(universal: Path, like: Weights) -> Weights:
    """The fp32 weights of a universal checkpoint: a folder for each tensor, flat if from stage 3."""
    found = {}
    for name, tensor in like.items():
        saved = torch.load(universal / "zero" / name / "fp32.pt", weights_only=True)
        found[name] = (saved["param"] if isinstance(saved, dict) else saved).view(tensor.shape)
    return found


def convert(folder: Path, weights: Weights) -> list[tuple[str, Weights, Path]]:
    """On one rank: each form of the checkpoint, the fp32 weights in it, and where it lies."""
    shards, universal, file = (folder / n for n in ("shards", "universal", "model.safetensors"))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        fp32 = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag="shards")
        convert_zero_checkpoint_to_fp32_state_dict(
            str(folder), str(folder), safe_serialization=True, tag="shards"
        )
        to_universal(shards, universal)
    saved = universal_weights(universal, weights)
    return [
        ("shards", fp32, shards),
        (file.name, load_file(file), file),
        ("universal", saved, universal),
    ]


def predict(stage: int, ranks: int) -> list[float]:
    """Bytes per parameter of each form in fp32: the optimizer's weights and two moments are 12."""
    if stage == 3:  # universal: one rank's optimizer file is kept beside the pieces of all
        return [12, 4, 12 + 12 / ranks]
    return [12 + 4, 4, 12 + 4]  # the model's weights are in a file of their own


def bytes_in(path: Path) -> int:
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())


def refusal(engine: deepspeed.DeepSpeedEngine, folder: Path) -> str:
    """What DeepSpeed says to a universal checkpoint that it does not load; nothing if it does."""
    try:
        engine.load_checkpoint(str(folder), tag="universal")
    except AssertionError as error:
        line = traceback.extract_tb(error.__traceback__)[-1].line
        return f"{type(error).__name__}: {str(error) or '(no text)'} at `{line}`"
    return ""


def save(
    args: argparse.Namespace, stage: int, before: torch.Tensor, after: torch.Tensor
) -> tuple[Weights, list[float]]:
    """The weights at the checkpoint, and the losses of the run that goes on."""
    folder = args.out / f"zero-{stage}"
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
    dist.barrier()
    engine = engine_at(args, stage)
    train_on(engine, before)
    weights = whole_weights(engine)
    engine.save_checkpoint(str(folder), tag="shards", save_latest=False)
    losses = train_on(engine, after)
    engine.destroy()
    return weights, losses


def convert_all(
    args: argparse.Namespace, before: torch.Tensor, after: torch.Tensor
) -> list[bool | None]:
    """Save at each stage, convert, and go on at another stage."""
    say(f"{'':<27}{'bytes per parameter':>22}{'tensors':>12}")
    say(f"{'':<27}{'predicted':>11}{'written':>11}{'equal':>12}")
    differ, loaded, errors, first, last = 0, 0, [0.0], [], []
    for stage, other in OTHER_STAGE.items():
        folder = args.out / f"zero-{stage}"
        weights, losses = save(args, stage, before, after)
        expected = digests(weights)
        parameters = sum(tensor.numel() for tensor in weights.values())
        forms = convert(folder, weights) if dist.get_rank() == 0 else []
        for (name, found, path), guess in zip(
            forms, predict(stage, dist.get_world_size()), strict=False
        ):
            written = bytes_in(path) / parameters
            equal = len(digests(found).items() & expected.items())
            row = f"ZeRO {stage}, {name}"
            say(f"{row:<27}{guess:>11.1f}{written:>11.1f}{equal:>6} of {len(expected)}")
            differ += len(expected) - equal
            errors.append(abs(written / guess - 1))
        if dist.get_rank() == 0:
            notes = {"ranks": dist.get_world_size(), "losses": losses, "digests": expected}
            notes["recipe"] = {name: getattr(args, name) for name in RECIPE}
            notes["recipe"]["data"] = str(args.data)
            (folder / "draft").write_text(json.dumps(notes, indent=1))
            (folder / "draft").rename(folder / "notes.json")  # last: where it is, all is
        dist.barrier()
        said = refusal(engine_at(args, other, universal=True), folder)
        loaded += not said
        say(f"  to ZeRO {other}, universal: {said or 'loaded'}")
        engine = engine_at(args, other, load_file(folder / "model.safetensors"))
        equal = len(digests(whole_weights(engine)).items() & expected.items())
        say(f"{f'  to ZeRO {other}, safetensors':<49}{equal:>6} of {len(expected)}")
        differ += len(expected) - equal
        moved = train_on(engine, after)
        engine.destroy()
        first.append(abs(moved[0] - losses[0]))
        last.append(abs(moved[-1] - losses[-1]))
    return [
        check("tensors that differ in any form", differ, 0),
        check("max |bytes written / predicted - 1|", max(errors), 0.05),
        check("universal checkpoints that went from 3 to 1, or 2 to 3", loaded, 0),
        check("at another stage, max |next loss - the uninterrupted|", max(first), 1e-5),
        check("at another stage, min |last loss - the uninterrupted|", min(last), 1e-3, True),
    ]


def resume_all(args: argparse.Namespace, after: torch.Tensor) -> list[bool | None]:
    """Go on from the universal checkpoints with as many ranks as there are now."""
    differ, away = 0, []
    say(f"{'':<27}{'tensors equal':>15}{'last loss':>12}{'uninterrupted':>16}")
    for saved_at, stage in RESUMED:
        folder = args.out / f"zero-{saved_at}"
        notes = json.loads((folder / "notes.json").read_text())
        engine = engine_at(args, stage, universal=True)
        engine.load_checkpoint(str(folder), tag="universal")
        equal = len(digests(whole_weights(engine)).items() & notes["digests"].items())
        losses = train_on(engine, after)
        engine.destroy()
        row = f"ZeRO {saved_at} of {notes['ranks']} ranks, to {stage}"
        count = f"{equal} of {len(notes['digests'])}"
        say(f"{row:<27}{count:>15}{losses[-1]:>12.5f}{notes['losses'][-1]:>16.5f}")
        differ += len(notes["digests"]) - equal
        away += [abs(a - b) for a, b in zip(losses, notes["losses"], strict=True)]
    return [
        check("tensors that differ from the saved ones", differ, 0),
        check("max |loss - the uninterrupted run's|", max(away), 1e-5),
    ]


def run(args: argparse.Namespace, device: torch.device) -> list[bool | None]:
    # Else DeepSpeed compiles C++ of its own on a CPU, and a build that is killed blocks the next.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel("ERROR")  # each rank would say that there is no Megatron
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)  # of DeepSpeed's calls
    data = read_bytes(args.data, at_least=args.context * args.batch * (2 * args.steps + 1))
    tokens = data.unfold(0, args.context + 1, args.context)[: 2 * args.steps * args.batch]
    before, after = tokens.unflatten(0, (2, args.steps, args.batch))  # [steps, batch, context + 1]
    n = dist.get_world_size()
    say(f"{n} rank{'s' * (n > 1)} on {device.type}: a checkpoint after {args.steps} steps")
    return resume_all(args, after) if args.resume else convert_all(args, before, after)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder; zero-2 and zero-3 in it are replaced")
    add("--resume", action="store_true", help="go on from --out, with the flags that made it")
    add("--data", type=Path, default="resources/corpus.txt", help="text to learn, as bytes")
    add("--context", type=int, default=64, help="bytes per window")
    add("--batch", type=int, default=12, help="windows per step, of all ranks")
    add("--width", type=int, default=128, help="size of a token's vector")
    add("--layers", type=int, default=2, help="blocks")
    add("--steps", type=int, default=4, help="steps before the checkpoint, and as many after it")
    add("--lr", type=float, default=1e-3, help="AdamW's learning rate")
    add("--seed", type=int, default=0, help="for weights")
    add("--device", default="auto", help="auto, cpu or cuda")
    args = parser.parse_args()
    for stage in OTHER_STAGE if args.resume else ():
        notes = args.out / f"zero-{stage}" / "notes.json"
        if not notes.is_file():
            stop(f"no whole checkpoint of ZeRO {stage} in {args.out}: run without --resume first")
        vars(args).update(json.loads(notes.read_text())["recipe"])
    args.data = Path(args.data)
    n = int(os.environ.get("WORLD_SIZE", 1))
    if args.batch % n:
        stop(f"{n} ranks do not divide --batch {args.batch}: start another number of ranks")
    return args


# --- copied from other scripts; `make copies` keeps it equal to them ------------------------------


# Copied from fsdp_strategies.part_of_loss
def part_of_loss(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """This rank's part of the batch's mean loss: [batch, context + 1], of which every n-th is its own."""
    window = tokens[dist.get_rank() :: dist.get_world_size()]
    logits = model(window[:, :-1])
    loss = F.cross_entropy(logits, window[:, 1:].flatten(), reduction="sum")
    return loss / tokens[:, 1:].numel()


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


# Copied from fsdp_checkpointing.main
@record  # so that torchrun's summary names the error
def main() -> None:
    args = parse_args()
    device = join_group(args.device)
    claims_of = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(claims_of, run(args, device))  # nobody leaves while another is at work
    dist.destroy_process_group()  # not in a `finally`: section 3.1
    # DTensor's caches keep the mesh, and that the group: gloo's threads would abort Python's own end.
    os._exit(conclude(max(claims_of, key=lambda claims: claims.count(False))))


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
