"""After destroy_process_group() the group is gone, with its threads, or the end of Python may crash."""

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
SCRIPTS = [
    path
    for path in sorted(warm.ROOT.glob("chapter*/code/*.py"))
    if "DistributedDataParallel(" in path.read_text()
]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux to list threads")
@pytest.mark.parametrize("when", ["before", "after"])
def test_what_ddp_imports_keeps_the_group_alive(tmp_path: Path, when: str) -> None:
    """In a new process: torch._dynamo takes the group into default arguments, if there is one."""
    (tmp_path / "late.py").write_text(LATE)
    command = warm.parse_command(f"torchrun --nproc_per_node=2 late.py {when}")
    result = warm.run_cold(command, tmp_path, 60)
    assert ("0 threads of gloo" in result.stdout) is (when == "before"), result


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_import_it_before_there_is_a_group(path: Path) -> None:
    text = path.read_text()
    imported = text.find("import torch._dynamo")
    if path.stem == "ddp_debugging":  # in the parent; the groups are its children's
        imported = text.find('import_module("torch._dynamo")')
        assert text.find("fork.Process(") > imported > 0
    else:
        assert 0 < imported < text.find("\n\n\n"), "among the imports"
