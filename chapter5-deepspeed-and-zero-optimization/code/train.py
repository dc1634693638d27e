r"""Chapter 3's training under DeepSpeed: ZeRO 0 to 3 give one loss curve, and hold and send what is predicted.

    deepspeed --num_accelerators=2 chapter5-deepspeed-and-zero-optimization/code/train.py \
        --deepspeed_config chapter5-deepspeed-and-zero-optimization/code/deepspeed_stage3_config.json \
        --compare chapter3-distributed-training-with-pytorch-ddp/code/golden.json \
        --stages 0 1 2 3 --accumulate 2 --show-clipping \
        --plot chapter5-deepspeed-and-zero-optimization/figures/zero_stages.svg
    torchrun --nproc_per_node=2 chapter5-deepspeed-and-zero-optimization/code/train.py \
        --deepspeed_config chapter5-deepspeed-and-zero-optimization/code/deepspeed_stage3_config.json \
        --compare chapter3-distributed-training-with-pytorch-ddp/code/golden.json \
        --out runs/ch05_zero --save-every 4 --stop-at 12 --resume
    torchrun --nproc_per_node=2 chapter5-deepspeed-and-zero-optimization/code/train.py \
        --deepspeed_config chapter5-deepspeed-and-zero-optimization/code/deepspeed_stage3_config.json \
        --compare chapter3-distributed-training-with-pytorch-ddp/code/golden.json \
        --out runs/ch05_zero --resume --export runs/ch05_zero.safetensors

On GPUs:
    deepspeed --num_gpus=4 chapter5-deepspeed-and-zero-optimization/code/train.py \
        --deepspeed_config chapter5-deepspeed-and-zero-optimization/code/deepspeed_stage3_config.json
    deepspeed --num_gpus=8 chapter5-deepspeed-and-zero-optimization/code/train.py \
        --deepspeed_config chapter5-deepspeed-and-zero-optimization/code/deepspeed_stage3_config.json \
        --width 2048 --layers 24 --heads 16 --context 2048 --batch 16 --stages 1 2 3

Look at the table of the first run: what a rank holds and sends at each stage. The other two are one
training that was stopped, goes on, and hands its weights to others. Sections 5.1, 5.2, 5.5 and 5.6.
"""

import argparse
import contextlib
import copy
import difflib
import hashlib
import inspect
import json
import math
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NoReturn

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.config_utils import DeepSpeedConfigModel
from deepspeed.runtime.constants import GRADIENT_CLIPPING_DEFAULT
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Sampler

# What must not differ between a run and the one that it goes on from, or is compared with.
RECIPE = ["width", "layers", "heads", "context", "batch", "dropout", "seed"]
RECIPE += ["steps", "warmup", "lr", "clip"]
BATCH = "train_batch_size"
MICRO = "train_micro_batch_size_per_gpu"
ACCUMULATION = "gradient_accumulation_steps"
MIB = 2**20
Counts = dict[str, float]  # of one rank, by the names that the table has


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


def refuses(section: str) -> bool:
    """Whether DeepSpeed refuses a key in this section that it does not know: pydantic checks it."""
    try:
        DeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, section: {"no_such_key": 1}})
    except ValidationError:
        return True
    return False


def refuse_unknown_keys(config: dict, path: Path) -> None:
    """A key that nobody looks up does nothing, and DeepSpeed says nothing: stop, and name the nearest."""
    zero = config.get("zero_optimization", {})
    for where, keys in (("", config), ("zero_optimization.", zero)):
        for key in keys:
            if keys[key] == "auto":
                stop(
                    f'{path}: {where}{key} is "auto", which only Hugging Face fills in: give a number'
                )
    try:
        found = unread(config)
    except ValidationError as error:  # of sections that pydantic checks, at each depth
        wrong = error.errors()[0]
        key, *deeper = (str(name) for name in wrong["loc"])
        sections = [name for name, keys in config.items() if isinstance(keys, dict) and key in keys]
        name = ".".join([*sections[:1], key, *deeper])
        if wrong["type"] != "extra_forbidden":
            stop(f"{path}: {name}: {wrong['msg']}")
        found = [name]
    except Exception as error:  # what contradicts itself, such as fp16 and bf16, or is no more
        stop(f"{path}: {str(error).partition(chr(10))[0]}")
    optimizer = config.get("optimizer", {}).get("params", {})
    if optimizer.get("torch_adam"):
        takes = {*inspect.signature(torch.optim.AdamW).parameters, "torch_adam", "adam_w_mode"}
        found += [f"optimizer.params.{key}" for key in optimizer if key not in takes]
    if found:
        near = difflib.get_close_matches(found[0].rpartition(".")[2], known_keys(), n=1)
        hint = f", the nearest is {near[0]}" if near else ""
        stop(f"{path}: DeepSpeed knows no {found[0]}{hint}")


def known_keys() -> set[str]:
    """Names that DeepSpeed looks up, fields of its sections, and AdamW's parameters."""
    asked = Asked({"train_micro_batch_size_per_gpu": 1, "optimizer": {}, "flops_profiler": {}})
    DeepSpeedConfig(asked)
    names = asked.names.union(*(value.names for value in asked.values() if value != 1))
    models = [DeepSpeedConfigModel]
    while models:
        model = models.pop()
        models += model.__subclasses__()
        for field, about in model.model_fields.items():
            names |= {field, about.alias} - {None}
    return names | set(inspect.signature(torch.optim.AdamW).parameters)


def refuse_offload_paths(zero: dict, path: Path) -> None:
    """Write a page where weights or state are to be swapped to, and not only after the model is made."""
    for part in ("offload_optimizer", "offload_param"):
        if zero.get(part, {}).get("device") == "nvme":
            folder = zero[part].get("nvme_path")
            if not folder:
                stop(f"{path}: {part} to nvme wants an nvme_path")
            try:
                Path(folder).mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=folder) as file:
                    file.write(bytes(4096))
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                stop(f"{path}: cannot write to {part}'s nvme_path {folder}: {error.strerror}")


def batch_triangle(config: dict, ranks: int) -> dict[str, int]:
    """Three numbers of which two give the third: batch = micro batch x accumulation x ranks."""
    whole, micro, steps = (config.get(name) for name in (BATCH, MICRO, ACCUMULATION))
    if not (whole or micro):
        stop(f"the config has neither {BATCH} nor {MICRO}")
    if not steps:
        steps = whole // (micro * ranks) if whole and micro else 1
    whole = whole or micro * steps * ranks
    micro = micro or whole // (steps * ranks)
    if not whole or whole != micro * steps * ranks:
        right = max(whole // (steps * ranks), 1) * steps * ranks if steps else ranks
        stop(
            f"{BATCH} {whole} is not {MICRO} {micro} x {ACCUMULATION} {steps} x {ranks} ranks: "
            f"type --batch {right}"
        )
    return {BATCH: whole, MICRO: micro, ACCUMULATION: steps}


def predict(args: argparse.Namespace, config: dict, stage: int) -> Counts:
    """What this rank holds and sends in a step, from the sizes of the parameters alone."""
    with torch.device("meta"):
        model = ByteLlama(args.width, args.layers, args.heads, args.context)
    sizes = [p.numel() for p in model.parameters()]
    zero = config.get("zero_optimization", {})
    size = 2 if config.get("bf16", {}).get("enabled") else 4  # bytes of a weight
    rank = dist.get_rank()
    world_size = dist.get_world_size()
    total = sum(sizes)
    part = total
    padded = total
    in_part = total  # of all parameters that touch this rank's part: what is cut is kept whole
    if stage in (1, 2):  # one flat parameter, cut into equal parts
        part = 2 * -(-total // (2 * world_size))
        padded = part * world_size
        first = rank * part
        in_part = max(0, min(padded, first + part) - max(total, first))  # of this part, padding
        start = 0
        for count in sizes:
            in_part += count if start < first + part and start + count > first else 0
            start += count
    elif stage == 3:  # each parameter is cut
        part = sum(-(-count // world_size) for count in sizes)
        padded = part * world_size
        in_part = part
    kept = total if stage == 1 and args.accumulate > 1 else in_part
    master = 0 if size == 4 and stage == 0 else 4 * part  # a copy in fp32, even of fp32
    steps = len(sizes) if stage == 0 else 1  # AdamW counts its steps, 4 bytes per tensor
    # Bytes that leave a rank on a ring: an all-reduce is a reduce-scatter and an all-gather.
    ring = (world_size - 1) / world_size
    reduced = 2 if zero.get("use_multi_rank_bucket_allreduce", True) else 1
    passes = {  # times that all the weights, or gradients, go around
        0: 2 * ring * total,
        1: reduced * ring * total + ring * padded,
        2: args.accumulate * reduced * ring * total + ring * padded,
        3: args.accumulate * 3 * ring * padded,
    }
    return {
        "parameters": size * (part if stage == 3 else padded),
        "gradients": size * kept,
        "optimizer state": 8 * part + master + 4 * steps,
        "gathered weights": size * max(sizes) if stage == 3 else 0,
        "sent per step": size * passes[stage],
    }


class Sent(TorchDispatchMode):
    """Adds up what leaves this rank in a step, if the collectives run on a ring."""

    def __init__(self):
        super().__init__()
        self.nbytes = 0.0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            tensors = args[0] if isinstance(args[0], list) else [args[0]]
            nbytes = sum(tensor.nbytes for tensor in tensors)
            others = dist.get_world_size() - 1
            times = {  # of what is counted: the result; of a reduce-scatter that is a part
                "allreduce_": 2 * others / (others + 1),
                "_allgather_base_": others / (others + 1),
                "_reduce_scatter_base_": others,
                "reduce_": others / (others + 1),
            }.get(function.name().partition("::")[2], 0)
            self.nbytes += times * nbytes if nbytes > 64 else 0  # norms and flags are not counted
        return function(*args, **(kwargs or {}))


def storages(tensors: Iterable[torch.Tensor | None]) -> dict[int, int]:
    """Bytes by address of what the tensors keep alive, each storage once."""
    found = {}
    for tensor in tensors:
        if tensor is not None and tensor.numel():
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


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


def watch_gathered(model: nn.Module) -> list[int]:
    """Note at each module's forward how many bytes of stage 3's weights are there whole."""
    found = []

    def note(module: nn.Module, inputs: tuple) -> None:
        found.append(sum(p.nbytes for p in model.parameters() if hasattr(p, "ds_tensor")))

    for module in model.modules():
        module.register_forward_pre_hook(note)
    return found


def train(
    args: argparse.Namespace, config: dict, name: str, device: torch.device
) -> tuple[list[float], list[float], Counts]:
    """Train from the first weights, or from --out; losses and norms by step, and what was counted."""
    rank = dist.get_rank()
    world_size = dist.get_world_size()
    stage = config["zero_optimization"]["stage"]
    torch.manual_seed(args.seed)
    model = ByteLlama(args.width, args.layers, args.heads, args.context, args.dropout)
    engine, optimizer, _, _ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=copy.deepcopy(config)
    )
    windows, _ = read_windows(args)
    sampler = ShareOfBatch(len(windows), args.batch, rank, world_size, args.seed)
    loader = DataLoader(windows, batch_size=None, sampler=sampler, pin_memory=device.type != "cpu")
    recipe = {key: getattr(args, key) for key in RECIPE}
    recipe["data"] = hashlib.sha256(args.data.read_bytes()).hexdigest()
    step, losses, norms = 0, [], []
    if args.resume:
        notes = load_whole(engine, args.out, {"stage": stage, "ranks": world_size} | recipe)
        step, losses, norms = (notes[key] for key in ("step", "losses", "norms"))
    torch.manual_seed(((args.seed * 1_000_003 + step) * 1_000_003 + rank) % 2**63)  # dropout's

    last = min(args.steps, args.stop_at or args.steps)
    counted: Counts = dict.fromkeys(("gradients", "gathered weights", "sent per step"), 0)
    for window in batches(loader, sampler, step, last):
        rate = args.lr * learning_rate(step, args.warmup, args.steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = torch.zeros((), device=device)
        sent = Sent()
        measured = step == last - 1  # stage 3 has learned by then which weights come next
        gathered = watch_gathered(engine.module) if measured else []
        for part in window.to(device).chunk(args.accumulate):
            with sent if measured else contextlib.nullcontext():
                loss += micro_step(engine, part, args.batch)
                held = gradients_held(engine)
                counted["gradients"] = max(counted["gradients"], held)
                engine.step()  # updates the weights after the last part of a batch only
        if measured:
            counted["gathered weights"] = max(gathered)
            counted["sent per step"] = sent.nbytes
        dist.all_reduce(loss)
        losses.append(loss.item())
        norms.append(float(engine.get_global_grad_norm() or math.nan))  # ZeRO 0 in fp32 has none
        step += 1
        saving = args.out and (step == last or (args.save_every and step % args.save_every == 0))
        if step == last or step % args.log_every == 0:
            norm = f"{norms[-1]:.3f}".replace("nan", "-")
            say(f"{name:<18}{step:>6}{rate:>15.6f}{norm:>15}{losses[-1]:>8.3f}")
        if saving:
            notes = recipe | {"stage": stage, "ranks": world_size}
            save_whole(engine, args.out, notes | {"step": step, "losses": losses, "norms": norms})
    counted["parameters"], counted["optimizer state"] = state_held(engine)
    if args.export:
        counted["exported with other bits"] = export(engine, args.export)
    engine.destroy()
    return losses, norms, counted


def micro_step(engine: deepspeed.DeepSpeedEngine, part: torch.Tensor, batch: int) -> torch.Tensor:
    """Forward and backward on a micro batch; this rank's part of the batch's mean loss."""
    logits = engine(part[:, :-1]).float()  # [micro batch, context, 256]
    total = F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum")
    loss = total / (batch * logits.shape[1])  # over the tokens of the whole batch
    # DeepSpeed divides by the number of ranks, and by that of micro batches.
    engine.backward(loss * dist.get_world_size() * engine.gradient_accumulation_steps())
    return loss.detach()


def save_whole(engine: deepspeed.DeepSpeedEngine, folder: Path, notes: dict) -> None:
    """Each rank writes its shards. A name step-... appears when all of them are on the disk."""
    draft = folder / "draft"
    name = f"step-{notes['step']:06}"
    if dist.get_rank() == 0:
        shutil.rmtree(draft, ignore_errors=True)  # what a killed save has left
    dist.barrier()
    with Failures(engine) as failures:  # else the others wait for a rank whose disk is full
        engine.save_checkpoint(str(draft), tag=name, save_latest=False)  # ends with a barrier
    stop_together(failures.said, folder)
    if dist.get_rank() == 0:
        try:
            notes["files"] = {path.name: path.stat().st_size for path in (draft / name).iterdir()}
            (draft / name / "notes.json").write_text(json.dumps(notes, indent=1))
            for path in (*(draft / name).iterdir(), draft / name):
                sync(path)
            shutil.rmtree(folder / name, ignore_errors=True)
            (draft / name).rename(folder / name)
            sync(folder)
            for old in sorted(folder.glob("step-*"))[:-2]:
                old.rename(draft / old.name)
            shutil.rmtree(draft)
        except OSError as error:
            failures.said = str(error)
    stop_together(failures.said, folder)  # nobody goes on to die beside half a checkpoint


class Failures:
    """While it is entered, an engine notes that a file could not be written, and goes on."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine):
        self.files = engine.checkpoint_engine
        self.said = ""

    def __enter__(self) -> "Failures":
        save = self.files.save

        def noting(state_dict: dict, path: str) -> None:
            try:
                save(state_dict, path)
            except (OSError, RuntimeError) as error:  # PyTorch's writer raises the latter
                self.said = str(error).partition("\n")[0]

        self.files.save = noting
        return self

    def __exit__(self, *_: object) -> None:
        del self.files.save  # the class's own is there again


def stop_together(said: str, folder: Path) -> None:
    """End all ranks if one of them could not write; else wait for all."""
    found = [""] * dist.get_world_size()
    dist.all_gather_object(found, said)
    failed = [rank for rank, words in enumerate(found) if words]
    if failed:
        whole = sorted(path.name for path in folder.glob("step-*"))
        kept = f"{whole[-1]} is whole: --resume goes on there" if whole else "there is none yet"
        stop(f"cannot save to {folder} (rank {failed[0]}: {found[failed[0]]}); {kept}")


def export(engine: deepspeed.DeepSpeedEngine, path: Path) -> int:
    """Whole weights in one file that wants no DeepSpeed; how many tensors in it have other bits."""
    weights = {}
    for name, p in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([p] if hasattr(p, "ds_id") else []):
            if dist.get_rank() == 0:  # one at a time, to the host: the model may fit on no device
                weights[name] = p.detach().cpu().clone()
    off = 0
    if dist.get_rank() == 0:
        draft = path.with_name(f"{path.name}.draft")
        save_file(weights, draft)
        sync(draft)
        draft.rename(path)
        found = load_file(path)
        off = sum(not torch.equal(found[name], weight) for name, weight in weights.items())
        say(f"exported to {path}: {len(found)} tensors, {path.stat().st_size:,} bytes")
    dist.barrier()
    return off


def load_whole(engine: deepspeed.DeepSpeedEngine, folder: Path, wanted: dict) -> dict:
    """Go on from the newest checkpoint of this very run; returns the notes beside it."""
    found = sorted(folder.glob("step-*"))
    newest = [""] * dist.get_world_size()
    dist.all_gather_object(newest, found[-1].name if found else "none")
    if len(set(newest)) > 1:
        stop(f"ranks would go on from {sorted(set(newest))}: type an --out that all nodes share")
    if not found:
        say("resuming at step 0: there is no checkpoint yet")
        return {"step": 0, "losses": [], "norms": []}
    notes = json.loads((found[-1] / "notes.json").read_text())
    for key, value in wanted.items():
        if notes.get(key) != value:
            stop(f"{found[-1]} has {key} {notes.get(key)}, this run {value}: type another --out")
    for name, size in notes["files"].items():
        file = found[-1] / name
        if not file.is_file() or file.stat().st_size != size:
            stop(f"{file} is missing or cut off: move {found[-1]} away, the one before it is next")
    engine.load_checkpoint(str(folder), tag=found[-1].name)
    say(f"resuming at step {notes['step']}, ZeRO {notes['stage']} of {notes['ranks']} ranks")
    return notes


def run(args: argparse.Namespace, device: torch.device) -> list[bool | None]:
    world_size = dist.get_world_size()
    if not (args.compare or device.type == "cpu"):
        torch.set_float32_matmul_precision("high")  # TF32: too coarse to compare with a file
    # Else DeepSpeed compiles C++ of its own on a CPU, and a build that is killed blocks the next.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)  # of DeepSpeed's calls
    with torch.device("meta"):
        model = ByteLlama(args.width, args.layers, args.heads, args.context)
    parameters = sum(p.numel() for p in model.parameters())
    say(f"{world_size} rank{'s' * (world_size > 1)} on {device.type}: {parameters:,} parameters")
    if args.out:
        refuse_small_disk(
            args.out, 16 * parameters
        )  # 12 at stage 3; the model's once more below it
    parts = [args.config[key] for key in (BATCH, MICRO, ACCUMULATION)]
    say(
        "batch of {} = micro batch of {} x accumulation {} x".format(*parts)
        + f" {world_size} ranks"
    )
    say(f"{'':<18}{'step':>6}{'learning rate':>15}{'gradient norm':>15}{'loss':>8}")
    losses, norms, counted, predicted = {}, {}, {}, {}
    for stage in args.stages:
        config = with_stage(args.config, stage)
        losses[stage], norms[stage], counted[stage] = train(args, config, f"ZeRO {stage}", device)
        predicted[stage] = predict(args, config, stage)
    trained = all(counts["sent per step"] or world_size == 1 for counts in counted.values())
    claims = account(args, predicted, counted) if trained else []
    first = losses[args.stages[0]]
    claims.append(check("last loss, and first", first[-1], first[0]))
    if len(args.stages) > 1:
        away = max(difference(first, losses[stage]) for stage in args.stages)
        claims.append(check(f"max |loss - ZeRO {args.stages[0]}'s|", away, 1e-5))
    if args.compare:
        claims += compare_with(args.compare, losses, norms)
    if args.export:
        off = counted[args.stages[0]]["exported with other bits"]
        claims.append(check("tensors in the file with other bits than were trained", off, 0))
    if args.show_clipping:
        claims += show_clipping(args, device)
    return claims


def with_stage(config: dict, stage: int) -> dict:
    """The configuration at a stage; what it offloads, it offloads at its own stage only."""
    zero = config.get("zero_optimization", {})
    if stage != zero.get("stage", 0):
        zero = {key: value for key, value in zero.items() if not key.startswith("offload_")}
    return config | {"zero_optimization": zero | {"stage": stage}}


def account(
    args: argparse.Namespace, predicted: dict[int, Counts], counted: dict[int, Counts]
) -> list[bool | None]:
    """Print what rank 0 holds and sends at each stage, predicted and counted, and judge every rank's."""
    say(f"{'MiB, rank 0':<18}" + "".join(f"{f'ZeRO {stage}':>20}" for stage in args.stages))
    say(f"{'':<18}" + f"{'predicted':>11}{'counted':>9}" * len(args.stages))
    for part in predicted[args.stages[0]]:
        pairs = [
            (predicted[stage][part] / MIB, counted[stage][part] / MIB) for stage in args.stages
        ]
        say(f"{part:<18}" + "".join(f"{guess:>11.3f}{found:>9.3f}" for guess, found in pairs))
    if args.plot and dist.get_rank() == 0:
        draw(predicted, counted, args.plot)

    def error(*parts: str) -> float:
        pairs = [(counted[s][part], predicted[s][part]) for s in args.stages for part in parts]
        return max(abs(found - guess) for found, guess in pairs)

    held = ("parameters", "gradients", "optimizer state", "gathered weights")
    return [
        check("error of what a rank holds, bytes", error(*held), 0),
        check("error of what a rank sends, bytes", error("sent per step"), 0.5),
    ]


def difference(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def compare_with(
    path: Path, losses: dict[int, list[float]], norms: dict[int, list[float]]
) -> list[bool | None]:
    """Hold all stages against the losses and gradient norms of chapter 3's golden file."""
    golden = json.loads(path.read_text())
    away = max(difference(found, golden["losses"][: len(found)]) for found in losses.values())
    claims = [check("max |loss - the file's|", away, 1e-5)]
    ratios = [
        abs(norm / right - 1)
        for found in norms.values()
        for norm, right in zip(found, golden["norms"], strict=False)
        if not math.isnan(norm)
    ]
    if ratios:
        claims.append(check("max |norm / the file's - 1|", max(ratios), 1e-4))
    return claims


def show_clipping(args: argparse.Namespace, device: torch.device) -> list[bool | None]:
    """Train without the key gradient_clipping, and with 1.0 and 0.0."""
    config = with_stage(args.config, 0)
    config.pop("gradient_clipping", None)
    args = argparse.Namespace(**{**vars(args), "out": None, "resume": False, "export": None})
    left_out, _, _ = train(args, config, "no clipping key", device)
    at_one, _, _ = train(args, config | {"gradient_clipping": 1.0}, "clipping 1.0", device)
    at_zero, _, _ = train(args, config | {"gradient_clipping": 0.0}, "clipping 0.0", device)
    return [
        check("max |loss without the key - loss at 1.0|", difference(left_out, at_one), 0),
        check(
            "max |loss without the key - loss at 0.0|", difference(left_out, at_zero), 1e-4, True
        ),
    ]


def draw(predicted: dict[int, Counts], counted: dict[int, Counts], path: Path) -> None:
    """What a rank holds and sends at each stage: bars are counted, lines predicted."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "ch05"
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    places = range(len(counted))
    labels = [f"ZeRO {stage}" for stage in counted]
    below = [0.0] * len(counted)
    for part in ("parameters", "gradients", "optimizer state"):
        heights = [counts[part] / MIB for counts in counted.values()]
        left.bar(places, heights, 0.6, below, label=part)
        below = [low + high for low, high in zip(below, heights, strict=True)]
        guesses = [counts[part] / MIB for counts in predicted.values()]
        tops = [
            top - high + guess for top, high, guess in zip(below, heights, guesses, strict=True)
        ]
        left.hlines(tops, [p - 0.36 for p in places], [p + 0.36 for p in places], "black", lw=1)
    right.bar(
        places, [counts["sent per step"] / MIB for counts in counted.values()], 0.6, color="C4"
    )
    guesses = [counts["sent per step"] / MIB for counts in predicted.values()]
    right.hlines(guesses, [p - 0.36 for p in places], [p + 0.36 for p in places], "black", lw=1)
    for axes, title in ((left, "held by rank 0, MiB"), (right, "sent per step by rank 0, MiB")):
        axes.set_xticks(list(places), labels)
        axes.set_title(title, fontsize=10)
    left.legend(fontsize=8)
    figure.savefig(path, format="svg", metadata={"Date": None})


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    beside = Path(__file__).with_name("deepspeed_stage3_config.json")
    add = parser.add_argument
    add("--deepspeed_config", type=Path, default=beside, help="JSON file; default: the one beside")
    add("--local_rank", type=int, help="the launcher types it; LOCAL_RANK says the same")
    add(
        "--stages", type=int, nargs="+", choices=range(4), help="ZeRO stages; default: the config's"
    )
    add("--accumulate", type=int, help="micro batches per step; default: the config's")
    add("--batch", type=int, help="windows per step, of all ranks; default: the config's")
    add("--show-clipping", action="store_true", help="train with and without gradient_clipping too")
    add("--plot", type=Path, help="draw what each stage holds and sends into this SVG file")
    add("--data", type=Path, default="resources/corpus.txt", help="text to learn, as bytes")
    add("--context", type=int, default=128, help="bytes per window")
    add("--width", type=int, default=128, help="size of a token's vector")
    add("--layers", type=int, default=4, help="transformer blocks")
    add("--heads", type=int, default=4, help="attention heads; 2 x heads divides --width")
    add("--dropout", type=float, default=0.0, help="share of units dropped")
    add("--steps", type=int, default=20, help="optimizer steps")
    add("--warmup", type=int, default=10, help="steps to the peak rate, which is the config's")
    add("--seed", type=int, default=0, help="for weights, shuffling and dropout")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--log-every", type=int, default=10, help="steps between two lines")
    add("--out", type=Path, help="folder for checkpoints; default: save nothing")
    add("--save-every", type=int, default=0, help="steps; 0: only at the end")
    add("--resume", action="store_true", help="go on from the newest in --out, if there is one")
    add("--stop-at", type=int, help="leave after this step; --steps stays")
    add("--export", type=Path, help="at the end, write whole weights into this safetensors file")
    add("--compare", type=Path, help="a --json file of chapter 3's trainer: its flags and losses")
    args = parser.parse_args()
    try:
        args.config = json.loads(args.deepspeed_config.read_text())
    except (OSError, json.JSONDecodeError) as error:
        stop(f"cannot read --deepspeed_config {args.deepspeed_config}: {error}")
    refuse_unknown_keys(args.config, args.deepspeed_config)
    refuse_offload_paths(args.config.get("zero_optimization", {}), args.deepspeed_config)
    for name, value in ((BATCH, args.batch), (ACCUMULATION, args.accumulate)):
        if value:
            args.config[name] = value
            args.config.pop(MICRO, None)
    args.config |= batch_triangle(args.config, int(os.environ.get("WORLD_SIZE", 1)))
    args.batch = args.config[BATCH]
    args.accumulate = args.config[ACCUMULATION]
    args.lr = args.config["optimizer"]["params"]["lr"]
    args.clip = args.config.get("gradient_clipping", GRADIENT_CLIPPING_DEFAULT)
    args.stages = args.stages or [args.config.get("zero_optimization", {}).get("stage", 0)]
    if args.compare:
        golden = json.loads(args.compare.read_text())
        for name in ("batch", "lr", "clip"):
            if golden["recipe"][name] != getattr(args, name):
                stop(
                    f"{args.compare} has {name} {golden['recipe'][name]}, "
                    f"{args.deepspeed_config} {getattr(args, name)}"
                )
        vars(args).update((name, golden["recipe"][name]) for name in RECIPE)
        args.data = Path(golden["file"])
    if args.width % (2 * args.heads):
        stop(f"--width {args.width} is no multiple of 2 x --heads {args.heads}")
    if args.out is None and (args.resume or args.save_every):
        stop("--resume and --save-every want a folder: type --out DIR")
    if (args.out or args.export) and len(args.stages) > 1:
        stop("--out and --export keep what one stage has trained: type --stages 3")
    if args.export and not args.export.parent.is_dir():
        stop(f"--export {args.export}: there is no folder {args.export.parent}")
    if args.out and list(args.out.glob("step-*")) and not args.resume:
        stop(f"{args.out} has checkpoints: type --resume to go on, or another --out")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
    return args


def join_launcher(wanted: str) -> torch.device:
    """Join the group that deepspeed, torchrun or nobody describes; nobody means a group of one."""
    ranks_here = os.environ.get(
        "LOCAL_SIZE", "1"
    )  # DeepSpeed's name for torchrun's LOCAL_WORLD_SIZE
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": ranks_here}
    for name, value in (alone | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}).items():
        os.environ.setdefault(name, value)
    device = join_group(wanted)
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:  # torchrun sets it to 1
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["LOCAL_WORLD_SIZE"])))
    return device


@record  # so that torchrun's summary names the error
def main() -> None:
    args = parse_args()
    device = join_launcher(args.device)
    claims = run(args, device)
    dist.barrier()  # nobody leaves while another is at work
    dist.destroy_process_group()  # not in a `finally`: section 3.1
    os._exit(conclude(claims))  # DeepSpeed keeps the group: gloo's threads would abort Python's end


# --- copied from other scripts; `make copies` keeps it equal to them ------------------------------


# Copied from train_fsdp2.refuse_small_disk
def refuse_small_disk(folder: Path, nbytes: int) -> None:
    """Stop before training where a checkpoint of so many bytes, and two that are kept, have no room."""
    wanted = (3 - len(list(folder.glob("step-*")))) * nbytes
    free = shutil.disk_usage(folder).free
    if free < wanted:
        stop(f"--out {folder} has {free / MIB:,.0f} MiB free, checkpoints want {wanted / MIB:,.0f}")


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


# Copied from train_ddp_torchrun.learning_rate
def learning_rate(step: int, warmup: int, steps: int) -> float:
    """Share of the peak: a line up, then half a cosine down to a tenth (arXiv:1608.03983)."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(steps - warmup, 1))


# Copied from train_ddp_torchrun.ShareOfBatch
class ShareOfBatch(Sampler[list[int]]):
    """This rank's share of each global batch; the batches are the same at any world size."""

    def __init__(self, samples: int, batch: int, rank: int, world_size: int, seed: int):
        self.samples = samples
        self.batch = batch
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int, done: int = 0) -> None:
        """Choose the epoch's shuffle; `done` batches of it are skipped, for a resumed run."""
        self.epoch = epoch
        self.done = done

    def __len__(self) -> int:
        return self.samples // self.batch - self.done

    def __iter__(self) -> Iterator[list[int]]:
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.samples, generator=draw)  # equal on all ranks
        for step in range(self.done, self.samples // self.batch):
            whole = order[step * self.batch : (step + 1) * self.batch]
            yield whole[self.rank :: self.world_size].tolist()  # sizes may differ by one


# Copied from train_ddp_torchrun.batches
def batches(
    loader: DataLoader, sampler: ShareOfBatch, step: int, steps: int
) -> Iterator[torch.Tensor]:
    """This rank's windows of each step, [share, context + 1], from `step` on, over the epochs."""
    per_epoch = sampler.samples // sampler.batch
    while step < steps:
        sampler.set_epoch(step // per_epoch, done=step % per_epoch)
        for window in loader:
            yield window
            step += 1
            if step == steps:
                return


# Copied from train_ddp_torchrun.read_windows
def read_windows(args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows to train on and, from the last tenth, to hold out: two [windows, context + 1].

    A window's last byte is the next one's first.
    """
    data = read_bytes(args.data, at_least=2 * (args.batch + 5) * args.context)
    split = len(data) * 9 // 10
    size = args.context + 1
    return data[:split].unfold(0, size, args.context), data[split:].unfold(0, size, args.context)


# Copied from train_ddp_torchrun.ByteLlama
class ByteLlama(nn.Module):
    """A small decoder-only transformer of Llama's shape (arXiv:2302.13971) whose tokens are bytes."""

    def __init__(self, width: int, layers: int, heads: int, context: int, dropout: float = 0.0):
        super().__init__()
        self.embed = nn.Embedding(256, width)
        self.blocks = nn.ModuleList(LlamaBlock(width, heads, dropout) for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, 256, bias=False)
        pairs = width // heads // 2  # of a head's dimensions; each turns at its own speed
        angle = torch.outer(torch.arange(context), 10_000.0 ** -(torch.arange(pairs) / pairs))
        self.register_buffer("rotation", torch.stack([angle.cos(), angle.sin()]), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:  # [batch, seq] -> [batch, seq, 256]
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, self.rotation[:, : tokens.shape[1]])
        return self.head(self.norm(x))


# Copied from train_ddp_torchrun.LlamaBlock
class LlamaBlock(nn.Module):
    """Llama's: rotary attention, then SwiGLU, each behind an RMSNorm and added to what comes in."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        hidden = (8 * width // 3 + 7) // 8 * 8  # 16-bit matrix units want multiples of 8
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))  # x: [batch, seq, width]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [batch, heads, seq, head_dim]
        q, k = rotate(q, rotation), rotate(k, rotation)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.out(mixed.transpose(1, 2).flatten(2)))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)
        return x + self.dropout(self.down(F.silu(gate) * up))


# Copied from train_ddp_torchrun.rotate
def rotate(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Turn each pair (x[i], x[i + d/2]) by its position's angle: RoPE (arXiv:2104.09864)."""
    cos, sin = rotation
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


# Copied from train_elastic_checkpoint.sync
def sync(path: Path) -> None:
    """Wait until a file's bytes, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
