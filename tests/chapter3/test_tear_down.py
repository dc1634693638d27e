"""After destroy_process_group() the group is gone, with its threads, or the end of Python may crash."""

from collections.abc import Callable
from pathlib import Path

import pytest
import warm

LATE = """
import sys, torch
import torch.distributed as dist
from pathlib import Path
from torch import nn
from torch.nn.parallel import DistributedDataParallel

if sys.argv[1] == "before":
    import torch._dynamo

def train():
    model = DistributedDataParallel(nn.Linear(2, 2))
    model(torch.ones(1, 2)).sum().backward()

dist.init_process_group("gloo")
train()
dist.barrier()
rank = dist.get_rank()
dist.destroy_process_group()
names = [(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()]
if rank == 0:
    print(sum("gloo" in name for name in names), "threads of gloo")
"""
Run = Callable[..., warm.Result]
SCRIPTS = [
    path
    for path in sorted(warm.ROOT.glob("chapter*/code/*.py"))
    if "import DistributedDataParallel" in path.read_text()
]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux to list threads")
@pytest.mark.parametrize("when", ["before", "after"])
def test_what_ddp_imports_keeps_the_group_alive(tmp_path: Path, when: str) -> None:
    """In a new process: torch._dynamo takes the group into default arguments, if there is one."""
    (tmp_path / "late.py").write_text(LATE)
    command = warm.parse_command(f"torchrun --nproc_per_node=2 late.py {when}")
    result = warm.run_cold(command, tmp_path, 60)
    assert ("0 threads of gloo" in result.stdout) is (when == "before"), result


LOOK = """
import os, runpy, sys
from pathlib import Path
sys.argv.pop(0)
sys.path.insert(0, str(Path(sys.argv[0]).parent))
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    names = [(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()]
    left = sum("gloo" in name for name in names)
    print(f"ends with {end.code}, {left} threads of gloo\\n", end="", flush=True)  # in one piece
"""
SMALL = {
    "amp_ddp_example": "--steps 5 --overflow-step 2 --width 32 --layers 1",
    "ch01_ddp_pitfalls": "",
    "ch01_multi_gpu_ddp": "--steps 2",
    "ddp_bucketing_overlap": "--slow-link 0 --rounds 3 --bucket-kib 64",
    "ddp_comm_hooks": "--steps 5 --warm-up 2 --repeats 1 --gbit 1",
    "ddp_from_scratch": "--turns 0 --width 32 --layers 2",
    "ddp_uneven_inputs_join": "--timeout 0.2",
    "ddp_vs_accelerate": "--steps 7 --width 32",
    "gradient_accumulation_no_sync": "--turns 0 --width 64",
    "local_sgd": "--steps 4 --seeds 1 --every 1 2 --diloco 2",
    "profile_ddp": "--steps 2 --cycles 1 --width 24 --heads 3 --layers 1",
    "train_ddp_torchrun": "--steps 3 --width 32",
    "train_elastic_checkpoint": "--dir runs/tear_down --fresh --kill-at 0 --steps 4",
}


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux to list threads")
@pytest.mark.parametrize(
    "path",
    [path for path in SCRIPTS if path.stem != "ddp_debugging"],  # its groups are in killed children
    ids=lambda path: path.stem,
)
def test_no_script_leaves_a_group_behind(run: Run, tmp_path: Path, path: Path) -> None:
    """A trainer in a reference cycle keeps its DDP, and the DDP the group; so does a hook's state."""
    look = tmp_path / "look.py"
    look.write_text(LOOK)
    script = path.relative_to(warm.ROOT)
    result = run(f"torchrun --nproc_per_node=2 {look} {script} {SMALL[path.stem]}")
    assert result.stdout.count("threads of gloo\n") == 2, result.stdout + result.stderr
    assert result.stdout.count(", 0 threads of gloo\n") == 2, result.stdout


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_import_it_before_there_is_a_group(path: Path) -> None:
    text = path.read_text()
    imported = text.find("import torch._dynamo")
    if path.stem == "ddp_debugging":  # in the parent; the groups are its children's
        imported = text.find('import_module("torch._dynamo")')
        assert text.find("fork.Process(") > imported > 0
    else:
        assert 0 < imported < text.find("\n\n\n"), "among the imports"
