"""Checkpoints in shards: other numbers of ranks, a copy that is not awaited, deaths in mid-save."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import warm
from book import CHAPTERS
from mutants import failed_claims
from torch.distributed.checkpoint.staging import DefaultStager
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

NAME = "fsdp2_checkpoint_dcp.py"
CODE = Path(CHAPTERS[3]) / "code"
SCRIPT = warm.ROOT / CODE / NAME
SMALL = "--width 128 --layers 1 --repeats 1"
CPU = torch.device("cpu")
Run = Callable[..., warm.Result]

script = warm.load("dcp_script", SCRIPT)


def training_alone() -> Any:
    """The script's model and optimizer in this process, which has no process group."""
    return script.Training(SimpleNamespace(width=128, layers=1, seed=0), None, CPU)


@pytest.fixture(scope="module")
def saved(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What three ranks leave."""
    out = tmp_path_factory.mktemp("dcp") / "out"
    command = f"torchrun --nproc_per_node=3 {CODE}/{NAME} {SMALL} --out {out}"
    result = warm.run(command, checkout, 60)
    assert result.returncode == 0, result.stdout + result.stderr
    return out


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_process_without_a_group_reads_what_three_ranks_saved(saved: Path) -> None:
    """Weights as in the safetensors file, byte by byte; moments that are no longer zero."""
    training = training_alone()
    training.load(saved / "step-1")
    whole = script.load_file(saved / "hf" / "model-00001-of-00001.safetensors")
    weights = training.model.state_dict()
    assert whole.keys() == weights.keys()
    assert all(torch.equal(whole[name], weights[name]) for name in whole)
    moments = training.optimizer.state.values()
    assert all(state["step"] == 1 and state["exp_avg_sq"].any() for state in moments)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_folder_without_metadata_is_refused(
    saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)  # two tracebacks
    folder = Path(shutil.copytree(saved / "step-1", tmp_path / "step-1"))
    (folder / ".metadata").unlink()
    with pytest.raises(dcp.CheckpointException, match="metadata is None"):
        training_alone().load(folder)


def test_the_wait_before_the_step_is_what_keeps_the_file_right() -> None:
    """The same held-back copy, awaited: no tensor of a later step, so the script's check fails."""
    right = "    training.update()  # without response.staging_completion.result()"
    wait = "    held.set()\n    response.staging_completion.result()\n    training.update()"
    (failed,) = failed_claims(SCRIPT, 2, [(SMALL, right, wait)])
    assert {line.rpartition("  FAILED")[0] for line in failed} == {
        "check: copy held back and not awaited: such tensors = 0 >= 1"
    }


@pytest.mark.filterwarnings("ignore:Ignoring pin_memory flag")
def test_a_stager_with_its_defaults_wants_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(AssertionError, match="Non-blocking copy requires that the current acc"):
        DefaultStager()


def test_a_stager_writes_over_its_last_copy() -> None:
    """So the upload before must be over when the next checkpoint begins."""
    stager: Any = DefaultStager(script.staging(CPU))
    state = {"weight": torch.zeros(3)}
    first = stager.stage(state).result()["weight"]
    state["weight"] += 1
    stager.stage(state).result()
    stager.close()
    assert first.tolist() == [1, 1, 1]


def save_over_a_checkpoint(folder: str) -> list[float]:
    """Zeros are saved, then ones into the same folder, but rank 1's disk is full."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    weight = distribute_tensor(torch.zeros(4), mesh, [Shard(0)])
    dcp.save({"weight": weight}, checkpoint_id=folder)
    try:  # not the default
        dcp.save({"weight": weight}, storage_writer=dcp.FileSystemWriter(folder, overwrite=False))
        raise AssertionError("it was written over")
    except dcp.CheckpointException:
        pass

    class FullDisk(dcp.FileSystemWriter):
        def write_data(self, *_: Any) -> Any:
            raise OSError("No space left on device")

    kind = FullDisk if dist.get_rank() == 1 else dcp.FileSystemWriter
    try:
        dcp.save({"weight": weight + 1}, storage_writer=kind(folder))
        raise AssertionError("it was saved")
    except dcp.CheckpointException:
        pass
    found = distribute_tensor(torch.full((4,), 9.0), mesh, [Shard(0)])
    dcp.load({"weight": found}, checkpoint_id=folder)
    return found.full_tensor().tolist()


def test_a_failed_save_over_a_checkpoint_leaves_a_mixture_that_loads(tmp_path: Path) -> None:
    """No error: `.metadata` is the old one, and fits. Each checkpoint wants a folder of its own."""
    assert warm.fork_ranks(save_over_a_checkpoint, 2, str(tmp_path / "step")) == [[1, 1, 0, 0]] * 2


@pytest.mark.full
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_claims_hold_at_any_world_size(world_size: int) -> None:
    cases = [
        (f"--width {w} --layers 2 --repeats 1 --seed {s}", "", "")
        for w, s in ((2, 3), (130, 20260101))  # two rows on four ranks: some have none
    ]
    assert failed_claims(SCRIPT, world_size, cases) == [set(), set()]


MUTANTS = {  # a piece of the source; what it becomes; the claim that must fail
    "not loaded": ("        dcp.load(state, checkpoint_id=path, **how)", "        pass",
                   "other numbers of ranks"),
    "one's own shard for the whole": ("tensor.full_tensor() if whole else tensor.to_local()",
                                      "tensor.to_local()", "other numbers of ranks"),
    "moments forgotten": ("(size - 12 * parameters)", "(size - 4 * parameters)", "beyond 12"),
    "the file's weights are another step's": (
        "    expected = {name", "    training.backward()\n    training.update()\n"
        "    saved = fingerprints(training.state())\n    expected = {name", "from one file"),
    "the step comes before the call": (
        "    staged = written = None", "    training.backward()\n    training.update()\n"
        "    staged = written = None", "not the call's"),
}  # fmt: skip


@pytest.mark.full
def test_mutants_are_caught() -> None:
    cases = [(SMALL, right, wrong) for right, wrong, _ in MUTANTS.values()]
    for failed, (name, (_, _, claim)) in zip(
        failed_claims(SCRIPT, 3, cases), MUTANTS.items(), strict=True
    ):
        assert any(claim in line for line in failed), f"{name}: {failed}"


KILLED = """
    import json
    if dist.get_rank() == 0:
        (folder / "saved.json").write_text(json.dumps(saved))
    training.backward()
    training.update()
    if dist.get_rank() == 1:
        os.fsync = lambda _: os.kill(os.getpid(), 9)
    SAVE
    raise AssertionError("it was saved")
"""
SAVES = {
    "dcp.save": "dcp.save(training.state(), checkpoint_id=folder / 'step-2')",
    "async_save": "dcp.async_save(training.state(), checkpoint_id=folder / 'step-2', "
    "process_group=group).result()",
}


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("save", SAVES)
def test_sigkill_in_mid_save_leaves_the_checkpoint_before(
    run: Run, checkout: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, save: str
) -> None:
    caplog.set_level(logging.CRITICAL)
    right = "    different = load_on_fewer(args, saved_at, saved, device)\n"
    source = SCRIPT.read_text()
    assert source.count(right) == 1
    mutant = checkout / CODE / f"killed_{NAME}"
    mutant.write_text(source.replace(right, KILLED.replace("SAVE", SAVES[save])))
    out = tmp_path / "out"
    result = run(
        f"torchrun --nproc_per_node=3 {CODE}/{mutant.name} {SMALL} --out {out}", timeout=60
    )
    mutant.unlink()
    assert result.returncode not in (0, warm.TIMED_OUT)
    assert "it was saved" not in result.stderr
    assert (out / "step-2" / "__1_0.distcp").is_file(), "under its final name, before it is whole"
    assert not (out / "step-2" / ".metadata").exists()
    with pytest.raises(dcp.CheckpointException):
        training_alone().load(out / "step-2")
    training = training_alone()
    training.load(out / "step-1")
    assert script.fingerprints(training.state()) == json.loads((out / "saved.json").read_text())


@pytest.mark.full
@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("", "no launcher: type  torchrun --nproc_per_node=2"),
        ("--out OUT", "and DCP would write over it: type another --out"),
    ],
)
def test_bad_input_gets_one_line(run: Run, tmp_path: Path, flags: str, says: str) -> None:
    result = run(f"python {CODE}/{NAME} {flags.replace('OUT', str(tmp_path))}")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1, result.stderr
    assert says in result.stderr
