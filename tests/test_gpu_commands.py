"""The commands under "On GPUs:" are part of the book: each parses, and its model fits a GPU of 80 GB.

No GPU is needed for that. The script's own parse_args reads the command, and the model is built on
the meta device, where tensors have shapes and no memory; one forward pass counts what it keeps.
"""

import contextlib
import io
import re
import shlex
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import book
import pytest
import torch
import torch.distributed as dist
import warm
from test_commands import COMMANDS, title
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

LIMIT = 80e9  # bytes of an A100 or H100
GPU_COMMANDS = [pytest.param(c, id=title(c)) for c in COMMANDS if c.gpus]
META = torch.device("meta")


def language_model(m: ModuleType, a: Namespace, rows: int) -> int:
    """Training a byte-level model on `rows` windows at a time."""
    kind = getattr(m, "ByteLM", None) or m.ByteLlama
    with META:
        model = kind(a.width, a.layers, a.heads, a.context)
        tokens = torch.zeros(rows, a.context, dtype=torch.long)
    return training(model, tokens)


def layers(m: ModuleType, a: Namespace, rows: int) -> int:
    """Training a stack of PyTorch's transformer layers on [rows, context, width]."""
    with META:
        one = (nn.TransformerEncoderLayer(a.width, 4, 4 * a.width, 0.0) for _ in range(a.layers))
        return training(nn.Sequential(*one), torch.zeros(rows, getattr(a, "context", 32), a.width))


def byte_mlp(m: ModuleType, a: Namespace, rows: int) -> int:
    with META:
        return training(m.byte_mlp(a, 0), torch.zeros(rows, a.context, dtype=torch.long))


def built(m: ModuleType, a: Namespace, shape: tuple[int, ...], *more: Any) -> int:
    """Training the model that the script's own build() makes, on tokens of this shape."""
    with META:
        return training(m.build(a, *more), torch.zeros(shape, dtype=torch.long))


def residual(m: ModuleType, a: Namespace, dtype: torch.dtype) -> int:
    """Training chapter 4's smallest model on the whole batch, as its reference in one process does."""
    with META:
        model = m.ResidualModel(a.width, a.layers).to(dtype)
        return training(model, torch.zeros(a.batch, a.context, dtype=torch.long))


def experts(m: ModuleType, a: Namespace, n: int) -> int:
    """All experts, which each rank builds to compare with, and their hidden layers for all tokens."""
    with META:
        router, parts, _ = m.build(a, META)
    hidden = n * a.tokens * a.top_k * a.hidden * getattr(torch, a.dtype).itemsize
    return 4 * sum(p.nbytes for part in [router, *parts] for p in part.parameters()) + 3 * hidden


def with_caches(m: ModuleType, a: Namespace) -> int:
    with META:
        model = m.CachedLM(a.width, a.layers, a.heads, a.context).to(torch.bfloat16)
        return training(model, torch.zeros(a.batch, a.context, dtype=torch.long))


def chapter_8(m: ModuleType, a: Namespace, rows: int) -> int:
    """Training the book model's shape at the sizes that the flags give."""
    module = sys.modules["model"]
    fields = module.Config.__dataclass_fields__
    with META:
        config = module.Config(**{name: value for name, value in vars(a).items() if name in fields})
        return training(module.Llama(config), torch.zeros(rows, config.context, dtype=torch.long))


# Bytes of a rank, from the script as a module, its arguments and the number of ranks.
MEMORY: dict[str, Callable[[ModuleType, Namespace, int], int]] = {
    "ch01_distributed_inference": lambda m, a, n: language_model(m, a, 1),
    "ch01_measure_components": lambda m, a, n: language_model(m, a, a.batch),
    "ch01_memory_anatomy": lambda m, a, n: language_model(m, a, a.batch),
    "ch01_multi_gpu_ddp": lambda m, a, n: language_model(m, a, a.batch),
    "ch01_profiling": lambda m, a, n: language_model(m, a, a.batch),
    "ch01_single_gpu_baseline": lambda m, a, n: language_model(m, a, a.batch),
    "ch01_train_vs_serve": lambda m, a, n: with_caches(m, a),
    # Its four schemes are built one after the other, beside the reference in float64.
    "data_parallel_from_scratch": lambda m, a, n: (
        built(m, a, (a.batch // n, m.CONTEXT), torch.float32, META)
        + built(m, a, (a.batch, m.CONTEXT), torch.float64, META)
    ),
    "expert_parallel_from_scratch": experts,
    # The reference sees one sequence at a time; the model is the whole one, in float64.
    "pipeline_parallel_from_scratch": lambda m, a, n: built(m, a, (1, a.seq), META),
    "amp_ddp_example": lambda m, a, n: byte_mlp(m, a, a.batch // n),
    "ddp_comm_hooks": lambda m, a, n: byte_mlp(m, a, a.batch),
    "local_sgd": lambda m, a, n: byte_mlp(m, a, a.batch),
    "ddp_bucketing_overlap": lambda m, a, n: training(
        m.build(a, 0.0, torch.zeros((), device=META)), torch.zeros(a.rows, a.width, device=META)
    ),
    # Ours, torch's, and two in float64, each as large as two.
    "ddp_from_scratch": lambda m, a, n: 6 * layers(m, a, -(-a.batch // n)),
    "ddp_vs_accelerate": lambda m, a, n: 2 * language_model(m, a, -(-a.batch // n)),
    "gradient_accumulation_no_sync": lambda m, a, n: built(m, a, (400, m.CONTEXT), META),
    "profile_ddp": lambda m, a, n: layers(m, a, a.batch),
    "train_ddp_torchrun": lambda m, a, n: language_model(m, a, -(-a.batch // n)),
    "train_elastic_checkpoint": lambda m, a, n: language_model(m, a, -(-a.batch // n)),
    "fsdp_checkpointing": lambda m, a, n: language_model(m, a, -(-a.batch // n)),  # unsharded
    "train_fsdp2": lambda m, a, n: language_model(
        m, a, -(-a.batch // n // a.accumulate)
    ),  # unsharded
    "checkpoint_convert": lambda m, a, n: residual(m, a, torch.float32),
    "benchmark_zero_vs_fsdp": lambda m, a, n: 6 * residual(m, a, torch.float32),
    "zero_from_scratch": lambda m, a, n: 2 * residual(m, a, torch.float64),
    "fsdp_from_scratch": lambda m, a, n: 2 * residual(m, a, torch.float64),
    "fsdp2_basic": lambda m, a, n: 2 * residual(m, a, torch.float64),
    "muon_fsdp2": lambda m, a, n: 2 * residual(m, a, torch.float32),
    "fsdp2_checkpoint_dcp": lambda m, a, n: (
        2 * residual(m, Namespace(**vars(a), batch=4, context=33), torch.float32)
    ),
    "master_weights": lambda m, a, n: 2 * residual(m, a, torch.float32),
    "fsdp_strategies": lambda m, a, n: 4 * residual(m, a, torch.float32),
    "ch10_scaling_efficiency": lambda m, a, n: (
        language_model(m, a, a.batch) + language_model(m, a, 0)
    ),
    "ch11_diloco": lambda m, a, n: byte_mlp(m, a, a.batch),
    "ch11_fedavg": lambda m, a, n: byte_mlp(m, a, 4 * a.batch),
    "compare_trainers": lambda m, a, n: 3 * chapter_8(m, a, -(-a.batch // n)),
    # Chapters 5 and 8 have a train.py each.
    "train": lambda m, a, n: (
        chapter_8(m, a, -(-a.batch // n))
        if hasattr(m, "SIZES")
        else language_model(m, a, a.config[m.MICRO])
    ),
}
# Scripts whose modules are a few small layers, whatever the flags; or that count for themselves.
SMALL = {
    "ch01_ddp_pitfalls",
    "ddp_uneven_inputs_join",
    "context_parallel_from_scratch",
    "ddp_debugging",
    "equivalence_matrix",
}


def training(model: nn.Module, inputs: torch.Tensor) -> int:
    """Weights, gradients and AdamW's two moments, and what forward keeps for backward.

    In the weights' own dtype: autocast to 16 bits keeps less.
    """
    kept: dict[int, int] = {}
    alive = []  # so that no storage's number is given twice
    own = {p.untyped_storage()._cdata for p in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        alive.append(storage)
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = model(inputs)
        (output.log_softmax(-1) if not inputs.is_floating_point() else output).sum()
    return 4 * sum(p.nbytes for p in model.parameters()) + sum(kept.values())


@contextlib.contextmanager
def as_on(command: book.Command) -> Iterator[tuple[ModuleType, Namespace]]:
    """The command's script as a module, and what its parse_args makes of the command."""
    script = warm.ROOT / str(command.script)
    words = shlex.split(command.text)
    argv = words[words.index(str(command.script)) :]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv)
        patch.syspath_prepend(str(script.parent))
        patch.chdir(warm.ROOT)
        for name, value in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", command.world_size)):
            patch.setenv(name, str(value))
        patch.setenv("LOCAL_WORLD_SIZE", str(command.world_size))
        before = set(sys.modules)
        try:
            module = warm.load(f"gpu_{script.stem}", script)
            yield module, module.parse_args()
        finally:
            for name in set(sys.modules) - before:  # siblings of the same name in other chapters
                if str(getattr(sys.modules[name], "__file__", "")).startswith(str(script.parent)):
                    del sys.modules[name]


@pytest.fixture
def group(request: pytest.FixtureRequest) -> Iterator[None]:
    """A process group of as many ranks as the command has, in which nothing is sent."""
    size = request.node.callspec.params["command"].world_size
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("command", GPU_COMMANDS)
@pytest.mark.usefixtures("group")
def test_it_parses_and_fits(command: book.Command) -> None:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), as_on(command) as (module, args):
            stem = Path(str(command.script)).stem
            if stem in MEMORY:
                needed = MEMORY[stem](module, args, command.world_size)
                assert 0 < needed < LIMIT, f"{needed / 1e9:.0f} GB a rank: {command.text}"
    except SystemExit as end:
        pytest.fail(f"ended with {end.code}: {command.text}\n{said.getvalue()}", pytrace=False)


def test_every_model_is_counted() -> None:
    """A script that has a command for GPUs and builds modules has a line in MEMORY."""
    named = {Path(str(c.script)) for c in COMMANDS if c.gpus}
    builds = re.compile(r"\bnn\.(?:Linear|Embedding|TransformerEncoderLayer)\(|\bLlama\(")
    left_out = [
        str(script)
        for script in sorted(named)
        if builds.search((warm.ROOT / script).read_text()) and script.stem not in {*MEMORY, *SMALL}
    ]
    assert not left_out, f"tests/test_gpu_commands.py does not count their memory: {left_out}"
