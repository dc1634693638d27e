"""After destroy_process_group() the group is gone, with its threads, or the end of Python may crash."""

import ast
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
OURS = [(path, path.read_text()) for path in sorted(warm.ROOT.glob("chapter*/code/*.py"))]
linux = pytest.mark.skipif(
    not Path("/proc/self/task").exists(), reason="needs Linux to list threads"
)


@pytest.mark.full
@linux
@pytest.mark.parametrize("when", ["before", "after"])
def test_what_ddp_imports_keeps_the_group_alive(tmp_path: Path, when: str) -> None:
    """In a new process: torch._dynamo takes the group into default arguments, if there is one."""
    (tmp_path / "late.py").write_text(LATE)
    command = warm.parse_command(f"torchrun --nproc_per_node=2 late.py {when}")
    result = warm.run_cold(command, tmp_path, 120)
    assert ("0 threads of gloo" in result.stdout) is (when == "before"), result


LOOK = """
import os, runpy, sys
from pathlib import Path
sys.argv.pop(0)
sys.path.insert(0, str(Path(sys.argv[0]).parent))
code = 0  # @record swallows SystemExit(0)
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    code = end.code
names = [(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()]
left = sum("gloo" in name for name in names)
print(f"ends with {code}, {left} threads of gloo\\n", end="", flush=True)  # in one piece
"""
KINDS = {  # of what may keep a group alive, each with a script that has it
    "a model": "ch01_multi_gpu_ddp.py --steps 2",
    "a trainer that holds the model": "train_elastic_checkpoint.py --dir runs/x --kill-at 0 --steps 4",
    "the state of a hook": "ddp_comm_hooks.py --steps 5 --warm-up 2",
    "a library": "ddp_vs_accelerate.py --steps 2 --width 32",
}


@pytest.mark.full
@linux
@pytest.mark.parametrize("kind", KINDS)
def test_no_script_leaves_a_group_behind(run: Run, tmp_path: Path, kind: str) -> None:
    name, _, flags = KINDS[kind].partition(" ")
    (script,) = (path.relative_to(warm.ROOT) for path, _ in OURS if path.name == name)
    look = tmp_path / "look.py"
    look.write_text(LOOK)
    result = run(f"torchrun --nproc_per_node=2 {look} {script} {flags}")
    assert result.stdout.count("threads of gloo\n") == 2, result.stdout + result.stderr
    assert result.stdout.count(", 0 threads of gloo\n") == 2, result.stdout


def test_scripts_import_dynamo_before_there_is_a_group() -> None:
    late = []
    for path, text in OURS:
        imported = text.find("import torch._dynamo")
        if path.stem == "ddp_debugging":  # in the parent; the groups are its children's
            imported = text.find('import_module("torch._dynamo")')
            assert text.find("fork.Process(") > imported > 0
        elif "import DistributedDataParallel" in text and not 0 < imported < text.find("\n\n\n"):
            late.append(path.name)
    assert late == []


def test_no_script_destroys_its_group_in_a_finally() -> None:
    """A rank that fails would wait there for others that wait for it, on NCCL: section 3.1."""
    found = [
        path.name
        for path, text in OURS
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Try)
        and any("destroy_process_group" in ast.unparse(line) for line in node.finalbody)
    ]
    assert found == []
