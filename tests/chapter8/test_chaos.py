"""chaos.py: every fault on the real trainer, and trainers that lose something are found out."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed.checkpoint as dcp
import warm
from book import CHAPTERS
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

CODE = f"{CHAPTERS[7]}/code"
CHAOS = f"python {CODE}/chaos.py"
TINY = "--width 64 --layers 2 --heads 4 --kv-heads 2 --hidden 128 --context 64 --batch 8"
Run = Callable[..., warm.Result]


def rows(run: Run, folder: Path, flags: str) -> dict[str, dict]:
    """The table of a run that must hold all its checks, by fault."""
    table = folder / "table.json"
    result = run(f"{CHAOS} {flags} --out {folder}/chaos --json {table}")
    told = table.read_text() if table.exists() else ""
    assert result.returncode == 0, result.stdout + result.stderr + told
    return {row["fault"]: row for row in json.loads(table.read_text())}


@pytest.mark.full
def test_the_other_faults(run: Run, tmp_path: Path) -> None:
    found = rows(run, tmp_path, "--faults sigterm-all slow nan full-disk")
    assert found["sigterm-all"]["exits"] == "143 143"  # 128 + SIGTERM
    assert found["slow"]["exits"] == "0 0"
    assert not found["slow"]["lost"]
    assert found["nan"]["exits"] == "1 1"
    assert str(found["nan"]["step"]) in found["nan"]["line"]


@pytest.mark.full
def test_twenty_kills_at_random_steps(run: Run, tmp_path: Path) -> None:
    flags = "--faults killed --kills 20 --steps 240 --save-every 5 --seed 20260101"
    row = rows(run, tmp_path, flags)["killed"]
    assert len(row["lost"]) == 20
    assert max(row["lost"]) < 2 * 5 + 1  # since the last one, and the one that was being written
    assert row["other"] == []


@pytest.mark.full
def test_a_grid_of_four_ranks(run: Run, tmp_path: Path) -> None:
    found = rows(run, tmp_path, "--ranks 4 --dp-shard 2 --tp 2 --faults killed sigterm --timeout 5")
    assert found["sigterm"]["exits"] == "143 143 143 143"
    assert found["killed"]["exits"].split().count("1") == 3


def bits(path: Path) -> dict[str, torch.Tensor]:
    entries = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(state, checkpoint_id=path, no_dist=True)
    return state


@pytest.mark.full
def test_by_torchrun_itself(checkout: Path, tmp_path: Path) -> None:
    """SIGKILL strikes one rank, SIGTERM the launcher, which hands it on: as on Kubernetes."""
    command = [
        str(Path(sys.executable).with_name("torchrun")), "--nproc_per_node=2", "--standalone",
        f"{CODE}/train.py", *TINY.split(), "--steps", "80", "--save-every", "10",
        "--log-every", "1", "--resume", "--out",
    ]  # fmt: skip
    whole = tmp_path / "whole"
    subprocess.run([*command, str(whole)], cwd=checkout, check=True, capture_output=True)
    wanted = bits(whole / "step-000080")
    for number in (signal.SIGKILL, signal.SIGTERM):
        out = tmp_path / number.name
        with (tmp_path / "log").open("w") as log:
            launcher = subprocess.Popen([*command, str(out)], cwd=checkout, stdout=log, stderr=log)
            pids = until_step(out, 30)
            os.kill(pids[1] if number == signal.SIGKILL else launcher.pid, number)
            code = launcher.wait(120)
        said = (tmp_path / "log").read_text()
        assert code != 0
        if number == signal.SIGKILL:
            assert re.search(r"exitcode +: -9 ", said), said
            assert "Signal 9 (SIGKILL) received by PID" in said
        else:
            assert "stopped by SIGTERM at step" in said, said
        assert not [pid for pid in pids if psutil.pid_exists(pid)]
        subprocess.run([*command, str(out)], cwd=checkout, check=True, capture_output=True)
        got = bits(out / "step-000080")
        assert wanted.keys() == got.keys()
        assert all(torch.equal(wanted[name], got[name]) for name in wanted)


def until_step(out: Path, step: int) -> list[int]:
    """Wait until the log has that step; the ranks' process ids."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        log = out / "log.jsonl"
        events = [json.loads(x) for x in log.read_text().splitlines()] if log.exists() else []
        if events and events[-1].get("step", 0) >= step:
            return events[0]["pids"]
        time.sleep(0.02)
    raise AssertionError(f"no step {step} in {out}")


MUTANTS = {  # file, what stands there, what a hurried colleague writes; the fault that shows it
    "a resumed run reads the first batches again": (
        "trainer.py", 'self.loader.load_state_dict(notes["loader"])', "pass", "killed"
    ),
    "a resumed run forgets the moments": (
        "checkpoints.py", "state = state_of(model, optimizers)\n    try:",
        'state = {"model": state_of(model, optimizers)["model"], "optimizer": {}}\n    try:', "killed",
    ),
    "nobody looks whether the norm is a number": (
        "train.py", "if not wrong:", "if True:", "nan"
    ),
}  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_of_the_trainer(run: Run, checkout: Path, tmp_path: Path, name: str) -> None:
    file, right, wrong, fault = MUTANTS[name]
    script = checkout / CODE / file
    source = script.read_text()
    assert source.count(right) == 1, f"not once in {file}: {right}"
    script.write_text(source.replace(right, wrong))
    try:
        result = run(f"{CHAOS} --faults {fault} --out {tmp_path}")
    finally:
        script.write_text(source)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "FAILED" in result.stdout


@pytest.mark.full
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--steps 12", "--steps of more than twice --save-every"),
        ("--kills 0", "--kills 0: type 1 or more"),
        ("--widht 64", "unrecognized arguments: --widht 64"),
        ("--heads 5", "--width must divide"),
        ("--faults fire", "invalid choice: 'fire'"),
    ],
)
def test_bad_input(run: Run, tmp_path: Path, flags: str, said: str) -> None:
    result = run(f"{CHAOS} {flags} --out {tmp_path}")
    assert result.returncode == 2
    assert said in result.stderr
    assert "Traceback" not in result.stderr
