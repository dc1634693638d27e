"""A checkpoint in shards (DCP): saved by all ranks, loaded by fewer, written while training goes on.

    torchrun --nproc_per_node=4 chapter4-scaling-with-fully-sharded-data-parallel-fsdp/code/fsdp2_checkpoint_dcp.py

On GPUs:
    torchrun --nproc_per_node=8 chapter4-scaling-with-fully-sharded-data-parallel-fsdp/code/fsdp2_checkpoint_dcp.py --width 2048 --layers 16 --process

Look at how long training stands still for a checkpoint; and at what is in the file when the copy
was not awaited: weights of a later step, without a word. Section 4.6.
"""

import argparse
import hashlib
import logging
import multiprocessing
import os
import shutil
import sys
import tempfile
import threading
import time
import warnings
from concurrent.futures import Future
from copy import deepcopy
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint import state_dict
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

FLAT = state_dict.StateDictOptions(flatten_optimizer_state_dict=True)
SYNC = "dcp.save"
DEFAULT = "async_save, by default"
AT_ONCE = "copied in a thread, awaited at once"
LATER = "... awaited before optimizer.step()"
PROCESS = "written by another process"
State = dict[str, dict[str, Any]]  # of the model and of the optimizer: tensors and numbers by name


class Training:
    """A model in shards and its optimizer; without a mesh, the same in one process."""

    def __init__(self, args: argparse.Namespace, mesh: DeviceMesh | None, device: torch.device):
        torch.manual_seed(args.seed)
        self.model = ResidualModel(args.width, args.layers).to(device)
        if mesh:
            for block in self.model.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(self.model, mesh=mesh)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.tokens = torch.randint(257, (4, 33)).to(device)

    def backward(self) -> None:
        logits = self.model(self.tokens[:, :-1])
        F.cross_entropy(logits, self.tokens[:, 1:].flatten()).backward()

    def update(self) -> None:
        """The only moment of a step at which weights and moments change."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self) -> State:
        """No copies: the very tensors that training changes."""
        weights, moments = state_dict.get_state_dict(self.model, self.optimizer, options=FLAT)
        return {"model": weights, "optimizer": moments}

    def load(self, path: Path, **how: Any) -> None:
        state = self.state()
        dcp.load(state, checkpoint_id=path, **how)  # each rank reads what overlaps with its shards
        parts = {"model_state_dict": state["model"], "optim_state_dict": state["optimizer"]}
        state_dict.set_state_dict(self.model, self.optimizer, **parts, options=FLAT)


def fingerprints(state: State, whole: bool = True) -> dict[str, str]:
    """SHA-256 of each tensor: of all of it, one at a time, or of this rank's shard."""
    found = {}
    for part, values in state.items():
        for name, tensor in values.items():
            if isinstance(tensor, DTensor):
                tensor = tensor.full_tensor() if whole else tensor.to_local()
            if isinstance(tensor, torch.Tensor):
                found[f"{part}.{name}"] = hashlib.sha256(tensor.cpu().numpy()).hexdigest()
    return found


def differing(found: dict[str, str], expected: dict[str, str]) -> int:
    return sum(found.get(name) != bits for name, bits in expected.items())


def load_on_fewer(
    args: argparse.Namespace, path: Path, saved: dict[str, str], device: torch.device
) -> int:
    """Load on all ranks, three, two, and in one process without a group; tensors that differ."""
    n = dist.get_world_size()
    total = 0
    say(f"{'loaded by':<22}{'rows of embed.weight on each':<30}{'tensors with other bits':>24}")
    for ranks in [n, *(m for m in (3, 2) if m < n), None]:
        group = dist.new_group(range(ranks)) if ranks else None  # all call it, members or not
        if dist.get_rank() < (ranks or 1):
            mesh = DeviceMesh.from_group(group, device.type) if group else None
            training = Training(args, mesh, device)
            with warnings.catch_warnings(action="ignore"):  # that there is no group
                training.load(path, process_group=group, no_dist=not group)
            different = differing(fingerprints(training.state()), saved)
            rows = ", ".join(str(len(chunk)) for chunk in torch.arange(257).chunk(ranks or 1))
            who = f"{ranks} rank{'s' * (ranks > 1)}" if ranks else "1 process, no group"
            say(f"{who:<22}{rows:<30}{different:>17} of {len(saved)}")
            total += different
        dist.barrier()
    return total


def to_safetensors_and_back(
    file: Path, training: Training, saved: dict[str, str], group: dist.ProcessGroup
) -> int:
    """All ranks write one file of the weights; tensors that DCP or safetensors alone read otherwise."""
    weights = state_dict.get_model_state_dict(training.model)
    folder = str(file.parent)
    how = {"save_distributed": True, "enable_consolidation": True}
    writer = dcp.HuggingFaceStorageWriter(folder, **how)
    dcp.save(weights, storage_writer=writer, process_group=group)
    again = {name: torch.zeros_like(shard) for name, shard in weights.items()}
    dcp.load(again, storage_reader=dcp.HuggingFaceStorageReader(folder), process_group=group)
    alone = load_file(file)
    expected = {name: bits for name, bits in saved.items() if name.startswith("model.")}
    return sum(differing(fingerprints({"model": read}), expected) for read in (again, alone))


def staging(device: torch.device) -> StagingOptions:
    """All four are True by default; of pinned memory and non-blocking copies a CPU has none."""
    gpu = device.type != "cpu"
    return StagingOptions(
        use_pinned_memory=gpu,
        use_shared_memory=False,  # for a process that writes
        use_async_staging=True,
        use_non_blocking_copy=gpu,
    )


def save_and_step(
    way: str, path: Path, training: Training, stager: DefaultStager, group: dist.ProcessGroup
) -> list[float]:
    """A checkpoint and the step after it, in s: the call, waiting for the copy, that step, on disk."""
    state = training.state()
    synchronize(training.tokens.device)
    dist.barrier(group)
    staged = written = None
    on_disk = []
    start = time.perf_counter()
    if way == SYNC:
        dcp.save(state, checkpoint_id=path, process_group=group)
        on_disk.append(time.perf_counter())
    else:
        more = {"async_stager": stager} if way in (AT_ONCE, LATER) else {}
        if way == PROCESS:
            more = {"async_checkpointer_type": AsyncCheckpointerType.PROCESS}
        response = dcp.async_save(state, checkpoint_id=path, process_group=group, **more)
        staged = getattr(response, "staging_completion", None)  # if the copy is made in a thread
        written = getattr(response, "upload_completion", response)
        written.add_done_callback(lambda _: on_disk.append(time.perf_counter()))
    call = time.perf_counter() - start
    waited = seconds_until(staged) if way == AT_ONCE else 0.0
    training.backward()  # reads the weights, and does not change them
    waited += seconds_until(staged)
    training.update()
    synchronize(training.tokens.device)
    step = time.perf_counter() - start - call - waited
    seconds_until(written)
    on_disk.append(time.perf_counter())  # if the thread has not come to it yet
    return [call, waited, step, on_disk[0] - start]


def seconds_until(done: Future | None) -> float:
    start = time.perf_counter()
    if done:
        done.result()
    return time.perf_counter() - start


def stand_still(
    args: argparse.Namespace, folder: Path, training: Training, group: dist.ProcessGroup
) -> tuple[dict[str, float], int]:
    """Print each way's times; how long training stands still, tensors that are not the call's."""
    ways = [SYNC, DEFAULT, AT_ONCE, LATER] + [PROCESS] * args.process
    stager = DefaultStager(staging(training.tokens.device))  # one for all: it keeps its memory
    times = {way: [] for way in ways}
    different = 0
    for turn in range(args.repeats + 1):  # the first, to warm up, is read back and not timed
        for way in ways:
            path = folder / f"turn-{turn}-{ways.index(way)}"
            at_call = fingerprints(training.state(), whole=False)
            measured = torch.tensor(save_and_step(way, path, training, stager, group))
            dist.all_reduce(measured, dist.ReduceOp.MAX, group=group)  # all wait for the slowest
            if turn == 0:
                different += differing(read_back(path, training, group), at_call)
            else:
                times[way].append(1e3 * measured)
            remove(path)
    stager.close()
    say(f"medians of {args.repeats}, ms{'':<21}{'stands still':^26}{'the step':>10}{'on disk':>9}")
    say(f"{'':<38}{'call':>8}{'wait':>8}{'in all':>10}{'then':>10}{'after':>9}")
    stands = {}
    for way, turns in times.items():
        call, wait, step, on_disk = torch.stack(turns).quantile(0.5, dim=0).tolist()
        stands[way] = call + wait
        say(f"{way:<38}{call:>8.1f}{wait:>8.1f}{call + wait:>10.1f}{step:>10.0f}{on_disk:>9.0f}")
    return stands, different


def read_back(path: Path, training: Training, group: dist.ProcessGroup) -> dict[str, str]:
    """Fingerprints of this rank's shards in a checkpoint; the training's own stay as they are."""
    state = deepcopy(training.state())
    dcp.load(state, checkpoint_id=path, process_group=group)
    return fingerprints(state, whole=False)


def do_not_wait(path: Path, training: Training, group: dist.ProcessGroup) -> int:
    """Step before the copy is made; the tensors in the file that are not those of the call."""
    stager = DefaultStager(staging(training.tokens.device))
    held = threading.Event()
    stager._staging_executor.submit(held.wait)  # its one thread has other work: a busy machine
    at_call = fingerprints(training.state(), whole=False)
    saving = {"checkpoint_id": path, "process_group": group, "async_stager": stager}
    response = dcp.async_save(training.state(), **saving)
    training.backward()
    training.update()  # without response.staging_completion.result()
    synchronize(training.tokens.device)
    held.set()
    response.upload_completion.result()
    stager.close()
    return differing(read_back(path, training, group), at_call)


def refused(path: Path, training: Training, group: dist.ProcessGroup) -> int:
    """Whether DCP loads a folder without `.metadata`."""
    logging.disable()  # two tracebacks from each rank
    try:
        dcp.load(training.state(), checkpoint_id=path, process_group=group)
    except dcp.CheckpointException:
        return 1
    finally:
        logging.disable(logging.NOTSET)
    return 0


def remove(path: Path) -> None:
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    dist.barrier()


def run(args: argparse.Namespace, device: torch.device) -> list[bool | None]:
    n = dist.get_world_size()
    # async_save's threads talk to each other while training does: not through the same group.
    group = dist.new_group(backend="gloo")
    chosen = [args.out or (tempfile.mkdtemp() if dist.get_rank() == 0 else None)]
    dist.broadcast_object_list(chosen, group=group)
    folder = Path(chosen[0])
    saved_at = folder / "step-1"
    late = folder / "not-awaited"
    one_file = folder / "hf" / "model-00001-of-00001.safetensors"

    training = Training(args, DeviceMesh.from_group(dist.group.WORLD, device.type), device)
    training.backward()
    training.update()  # makes AdamW's moments
    saved = fingerprints(training.state())
    dcp.save(training.state(), checkpoint_id=saved_at, process_group=group)
    parameters = sum(p.numel() for p in training.model.parameters())
    say(f"{n} rank{'s' * (n > 1)} on {device.type}: {parameters:,} parameters")
    different = load_on_fewer(args, saved_at, saved, device)
    read_otherwise = to_safetensors_and_back(one_file, training, saved, group)
    size = sum(file.stat().st_size for file in saved_at.iterdir())
    pieces = len(dcp.FileSystemReader(saved_at).read_metadata().storage_data)
    more = (size - 12 * parameters) / pieces
    header = one_file.stat().st_size - 4 * parameters
    predicted = 12e-6 * parameters
    say(f"on disk: {predicted:.3f} MB predicted, {size / 1e6:.3f} found, in {pieces} pieces")
    say(f"{'':<9}one safetensors file, beyond 4 bytes a parameter: {header:,} bytes")
    stands, not_of_call = stand_still(args, folder, training, group)
    of_sync = {way: stands[way] / stands[SYNC] for way in stands}
    spoilt = do_not_wait(late, training, group)
    remove(late / ".metadata")
    refusals = refused(late, training, group)
    if not args.out:
        remove(folder)
    for process in multiprocessing.active_children():
        process.kill()  # async_save's, which waits for the next checkpoint
    return [
        check("tensors with other bits on other numbers of ranks", different, 0),
        check("tensors that DCP or safetensors read otherwise from one file", read_otherwise, 0),
        check("bytes on disk beyond 12 a parameter, per piece", more, 4096),
        check("each way, tensors in the file that are not the call's", not_of_call, 0),
        check("copy held back and not awaited: such tensors", spoilt, 1, at_least=True),
        check("loads refused without .metadata", refusals, 1, at_least=True),
        expect("async_save stands still, of dcp.save's time", of_sync[DEFAULT], 0.5, args.strict),
        expect("... copied in a thread, awaited later", of_sync[LATER], 0.5, args.strict),
    ]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--width", type=int, default=384, help="of a token's vector")
    add("--layers", type=int, default=2, help="blocks, of 8 x width^2 parameters")
    add("--repeats", type=int, default=3, help="timed checkpoints of each way")
    add("--process", action="store_true", help="a writing process too; it takes 10 s to start")
    add("--out", type=Path, help="keep a checkpoint here; several nodes must share it")
    add("--seed", type=int, default=0, help="for weights and tokens")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--strict", action="store_true", help="exit 1 if an `expect:` line does not hold")
    args = parser.parse_args()
    if args.out and args.out.exists():
        stop(f"{args.out} exists, and DCP would write over it: type another --out")
    return args


# --- copied from other scripts; `make copies` keeps it equal to them ------------------------------


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


# Copied from ch01_single_gpu_baseline.synchronize
def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


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
