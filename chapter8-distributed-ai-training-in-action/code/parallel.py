"""One model on a grid of ranks: replicas x shards x tensor parallel. A module of train.py.

Each rank has three coordinates. Ranks that differ in "tp" share every product and read the same
windows; ranks that differ in "dp_shard" keep different parts of the weights; ranks that differ in
"dp_replicate" keep the same. Section 8.3 compares every layout with one process.
"""

import logging
import warnings
import zlib
from functools import partial

import torch
import torch._dynamo  # before the group, or gloo's threads outlive it: section 3.8
import torch.distributed as dist
from launch import stop
from model import Llama, initial_std, rotations
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import (
    DTensor,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

DIMENSIONS = ("dp_replicate", "dp_shard", "tp")

# On a grid DTensor advises to sum over two dimensions at once, and FSDP2 not to change logits in
# place. The sums are of a few numbers, and nobody does.
logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")


def make_mesh(device_type: str, dp_replicate: int, dp_shard: int, tp: int) -> DeviceMesh:
    """All ranks in a grid; neighbours share a tensor-parallel group. One size may be -1: the rest.

    Where a second is, there is one replica.
    """
    n = dist.get_world_size()
    sizes = [dp_replicate, dp_shard, tp]
    if sizes.count(-1) == 2 and dp_replicate == -1:
        sizes[0] = 1
    given = 1
    for size in sizes:
        given *= size if size > 0 else 1
    if sizes.count(-1) == 1:
        sizes[sizes.index(-1)] = n // given
    if min(sizes) < 1 or sizes[0] * sizes[1] * sizes[2] != n:
        layout = f"--dp-replicate {dp_replicate} x --dp-shard {dp_shard} x --tp {tp}"
        stop(f"{layout} does not make {n} ranks; one of them may be -1, for what is left")
    return init_device_mesh(device_type, tuple(sizes), mesh_dim_names=DIMENSIONS)


def data_parallel(mesh: DeviceMesh) -> tuple[int, int]:
    """This rank's place among those that read different windows, and their number."""
    replica, shard, _ = mesh.get_coordinate()
    return replica * mesh.size(1) + shard, mesh.size(0) * mesh.size(1)


def parallelize(
    model: Llama,
    mesh: DeviceMesh,
    sequence_parallel: bool = True,
    checkpoint_activations: bool = False,
    compile: bool = False,
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> nn.Module:
    """Cut a model that is on the meta device, then make its weights: the same in every layout.

    DDP where every rank has it whole. Where anything is cut, FSDP2 does the rest too, over one
    shard if need be: it takes tensors that tensor parallelism has cut, and DDP does not.
    """
    replicas, shards, tp = mesh.shape
    if tp > 1:
        tensor_parallel(model, mesh["tp"], sequence_parallel)
    for number, layer in enumerate(model.layers):
        if checkpoint_activations:
            model.layers[number] = checkpoint_wrapper(layer)
        if compile:
            model.layers[number].compile()
    if shards > 1 or tp > 1:
        options = {"mesh": mesh["dp_replicate", "dp_shard"] if replicas > 1 else mesh["dp_shard"]}
        if dtype is not None:  # shards, and so the optimizer, stay in float32
            options["mp_policy"] = MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32)
        for layer in model.layers:
            fully_shard(layer, **options)
        fully_shard(model, **options)  # a group of what is left: embedding and last norm
    model.to_empty(device=device_of(mesh))
    init_weights(model, seed)
    if isinstance(model, FSDPModule):
        return model
    if dtype is not None:
        model.forward = torch.autocast(mesh.device_type, dtype)(model.forward)
    ddp_model = DistributedDataParallel(
        model,
        process_group=mesh.get_group("dp_replicate"),
        forward_sync_buffers=False,
        gradient_as_bucket_view=True,
    )
    if replicas > 2:
        # DDP orders its buckets anew after its first backward pass, and with them the sums of three
        # ranks or more. Behind the first step, a resumed run would add up in another order.
        ddp_model(torch.zeros(1, 2, dtype=torch.long, device=device_of(mesh))).sum().backward()
        ddp_model.zero_grad()
    return ddp_model


def tensor_parallel(model: Llama, mesh: DeviceMesh, sequence_parallel: bool) -> None:
    """Heads, hidden units and vocabulary over the ranks; between products the sequence, if wanted."""
    config = model.config
    for what, size in (("--kv-heads", config.kv_heads), ("--hidden", config.hidden)):
        if size % mesh.size():
            stop(f"{what} {size} does not divide by --tp {mesh.size()}")
    if sequence_parallel and config.context % mesh.size():
        stop(f"--context {config.context} does not divide by --tp {mesh.size()}")
    between = Shard(1) if sequence_parallel else Replicate()
    norm = SequenceParallel(use_local_output=True) if sequence_parallel else Replicated()
    whole = partial(PrepareModuleInput, desired_input_layouts=(Replicate(),))
    plan: dict[str, ParallelStyle] = {
        "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=between),
        "norm": norm,
        "output": Logits(between),
    }
    for number in range(config.layers):
        plan |= {
            f"layers.{number}.{name}": style
            for name, style in {
                "norm1": norm,
                "attention": PrepareModuleInput(
                    input_layouts=(between, None), desired_input_layouts=(Replicate(), None)
                ),
                "attention.q": ColwiseParallel(),
                "attention.k": ColwiseParallel(),
                "attention.v": ColwiseParallel(),
                "attention.out": RowwiseParallel(output_layouts=between),
                "norm2": norm,
                "feed_forward": whole(input_layouts=(between,)),
                "feed_forward.gate": ColwiseParallel(),
                "feed_forward.up": ColwiseParallel(),
                "feed_forward.down": RowwiseParallel(output_layouts=between),
            }.items()
        }
    parallelize_module(model, mesh, plan)


class Replicated(ParallelStyle):
    """A module that every rank computes in full; its weights are DTensors as all others are."""

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        return distribute_module(
            module,
            mesh,
            None,
            lambda _, inputs, mesh: DTensor.from_local(inputs[0], mesh, [Replicate()]),
            lambda _, output, mesh: output.to_local(),
        )


class Logits(ParallelStyle):
    """Each rank multiplies with its part of the vocabulary, then all logits go to all ranks."""

    def __init__(self, between: Shard | Replicate):
        self.between = between

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        def gather_sequence(_, inputs, mesh):
            x = DTensor.from_local(inputs[0], mesh, [self.between])
            return x.redistribute(placements=[Replicate()]), inputs[1]

        def gather_vocabulary(_, output, mesh):
            return output.redistribute(placements=[Replicate()]).to_local()

        return distribute_module(module, mesh, None, gather_sequence, gather_vocabulary)


@torch.no_grad()
def init_weights(model: Llama, seed: int) -> None:
    """Draw each tensor whole, by seed and name alone, and keep this rank's part of it."""
    model.rotation.copy_(rotations(model.config))
    for wrapped_name, p in model.named_parameters():
        name = wrapped_name.replace("_checkpoint_wrapped_module.", "")
        whole = torch.ones(p.shape)
        if p.dim() == 2:
            draw = torch.Generator().manual_seed(
                (seed * 1_000_003 + zlib.crc32(name.encode())) % 2**63
            )
            whole.normal_(std=initial_std(name, model.config), generator=draw)
        put_whole(p, whole.to(p.device))


def put_whole(p: torch.Tensor, whole: torch.Tensor) -> None:
    """Copy this rank's part of a tensor that every rank has whole."""
    if isinstance(p, DTensor):
        whole = distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None)
    p.copy_(whole)


def device_of(mesh: DeviceMesh) -> torch.device:
    if mesh.device_type == "cpu":
        return torch.device("cpu")
    return torch.device(mesh.device_type, torch.accelerator.current_device_index())
