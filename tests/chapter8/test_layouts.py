"""One loss curve in every layout, and through every resume: bit for bit in the same, to 1e-5 in another."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import warm
from book import CHAPTERS
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

CODE = f"{CHAPTERS[7]}/code"
TRAIN = (
    f"{CODE}/train.py --steps 6 --width 48 --layers 2 --heads 4 --kv-heads 2 --hidden 72 --context 32"
    " --batch 9 --warmup 2 --log-every 3 --save-every 3 --held-out 2"
)
LAYOUTS = {
    "one process": (1, ""),
    "DDP": (2, "--workers 1"),
    "DDP, uneven": (4, ""),
    "FSDP2": (2, "--dp-shard -1"),
    "FSDP2, uneven": (4, "--dp-shard 4 --accumulate 2"),
    "hybrid": (4, "--dp-shard 2 --workers 2"),
    "TP": (2, "--tp 2 --no-sequence-parallel"),
    "TP with SP": (2, "--tp 2"),
    "DDP x TP": (4, "--tp 2"),
    "FSDP2 x TP": (4, "--dp-shard 2 --tp 2"),
    "all three": (8, "--dp-replicate 2 --dp-shard 2 --tp 2"),
    "activations run again": (2, "--dp-shard 2 --tp 1 --checkpoint-activations --sync-save"),
    "wsd": (2, "--schedule wsd"),
    "Muon": (2, "--optimizer muon"),
    "Muon, FSDP2 x TP": (4, "--optimizer muon --dp-shard 2 --tp 2"),
}
SAME_CURVE = [name for name in LAYOUTS if name != "wsd" and "Muon" not in name]
Run = Callable[..., warm.Result]
Train = Callable[..., list[float]]


@pytest.fixture(scope="module")
def train(checkout: Path) -> Train:
    """Train in a layout, saving in a folder; the losses."""

    def losses(name: str, out: Path, flags: str = "") -> list[float]:
        ranks, layout = LAYOUTS[name]
        found = out.with_suffix(".json")
        command = f"torchrun --nproc_per_node={ranks} {TRAIN} {layout} {flags}"
        result = warm.run(f"{command} --out {out} --json {found}", checkout)
        assert result.returncode == 0, result.stdout + result.stderr
        return json.loads(found.read_text())["losses"]

    return losses


@pytest.fixture(scope="module")
def finished(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple]:
    """The folder and the losses of an undisturbed run in a layout; each is run once."""
    runs: dict[str, tuple[Path, list[float]]] = {}

    def of(name: str) -> tuple[Path, list[float]]:
        if name not in runs:
            out = tmp_path_factory.mktemp("runs") / "out"
            runs[name] = (out, train(name, out))
        return runs[name]

    return of


def as_if_killed(out: Path, folder: Path) -> Path:
    """A copy of a finished run as it was after step 3, in the middle of a later save."""
    copy = folder / "killed"
    shutil.copytree(out, copy)
    (copy / "step-000006").rename(copy / "step-000005.draft")
    return copy


def bits(checkpoint: Path) -> dict[str, bytes]:
    """Every tensor of a checkpoint, whole: weights and the optimizer's state."""
    reader = dcp.FileSystemReader(checkpoint)
    state = {
        name: torch.empty(kept.size, dtype=kept.properties.dtype)
        for name, kept in reader.read_metadata().state_dict_metadata.items()
        if isinstance(kept, TensorStorageMetadata)
    }
    dcp.load(state, storage_reader=reader, no_dist=True)
    return {name: value.numpy().tobytes() for name, value in state.items()}


def close(one: list[float], other: list[float], bound: float = 1e-5) -> bool:
    pairs = zip(one, other, strict=True)
    return max(abs(a - b) for a, b in pairs) <= bound


def resume_exactly(name: str, finished: Callable, train: Train, folder: Path) -> None:
    out, losses = finished(name)
    assert len(set(losses)) == 6
    killed = as_if_killed(out, folder)
    assert train(name, killed, "--resume") == losses
    assert bits(killed / "step-000006") == bits(out / "step-000006")
    assert not list(killed.glob("*.draft"))


def test_exact_resume_on_a_grid(finished: Callable, train: Train, tmp_path: Path) -> None:
    resume_exactly("FSDP2 x TP", finished, train, tmp_path)


def test_resume_of_a_grid_by_one_process(finished: Callable, train: Train, tmp_path: Path) -> None:
    out, losses = finished("FSDP2 x TP")
    assert close(train("one process", as_if_killed(out, tmp_path), "--resume"), losses)


@pytest.mark.full
@pytest.mark.parametrize("name", SAME_CURVE[1:])
def test_one_curve(finished: Callable, name: str) -> None:
    assert close(finished("one process")[1], finished(name)[1])


@pytest.mark.full
def test_one_curve_of_muon(finished: Callable) -> None:
    assert close(finished("Muon")[1], finished("Muon, FSDP2 x TP")[1])
    assert not close(finished("Muon")[1], finished("one process")[1], 0.01)


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "FSDP2 x TP"])
def test_exact_resume(name: str, finished: Callable, train: Train, tmp_path: Path) -> None:
    resume_exactly(name, finished, train, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("number", range(len(SAME_CURVE)))
def test_resume_in_the_next_layout(
    number: int, finished: Callable, train: Train, tmp_path: Path
) -> None:
    out, losses = finished(SAME_CURVE[number])
    killed = as_if_killed(out, tmp_path)
    assert close(train(SAME_CURVE[number - 1], killed, "--resume"), losses)


@pytest.mark.full
def test_bfloat16_is_near(finished: Callable, train: Train, tmp_path: Path) -> None:
    _, losses = finished("one process")
    for name in ("DDP", "FSDP2 x TP"):
        found = train(name, tmp_path / name.replace(" ", ""), "--dtype bfloat16")
        assert found != losses
        assert close(found, losses, 0.02)


@pytest.mark.full
@pytest.mark.parametrize(
    ("file", "right", "wrong"),
    [
        ("trainer.py", "(args.batch * args.context)", "(len(window) * args.context)"),
        ("trainer.py", "[] if notes", "[] if True or notes"),
        ("data.py", "whole[self.rank :: self.size]", "whole[0 :: self.size]"),
        ("data.py", 'self.batches = state["batch"]', "self.batches = 0"),
    ],
)
def test_mutants(
    finished: Callable, checkout: Path, tmp_path: Path, file: str, right: str, wrong: str
) -> None:
    """Each is an error that trains on happily: resumed on four ranks its losses are others.

    A gradient that is too large by a factor is not among them: clipping and AdamW hide it. The
    matrix of section 8.3 compares gradients.
    """
    out, losses = finished("one process")
    script = checkout / CODE / file
    text = script.read_text()
    assert text.count(right) == 1
    script.write_text(text.replace(right, wrong))
    found = tmp_path / "losses.json"
    killed = as_if_killed(out, tmp_path)
    try:  # its own checks may find it too
        command = f"torchrun --nproc_per_node=4 {TRAIN} --out {killed} --resume --json {found}"
        result = warm.run(command, checkout)
    finally:
        script.write_text(text)
    assert found.exists(), result.stderr
    assert not close(json.loads(found.read_text())["losses"], losses)
