"""Conversions of DeepSpeed's checkpoints: between numbers of ranks, broken on purpose, with a part missing."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
from book import CHAPTERS
from mutants import failed_claims

pytest.importorskip("deepspeed", reason="needs DeepSpeed, which is for Linux")

SCRIPT = warm.ROOT / CHAPTERS[4] / "code" / "checkpoint_convert.py"
SMALL = "--width 64 --layers 1 --context 8 --steps 2"  # 257 rows divide for no number of ranks
script = warm.load("chapter5_convert", SCRIPT)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks save and convert."""
    out = tmp_path_factory.mktemp("saved") / "out"
    assert failed_claims(SCRIPT, 2, [(f"{SMALL} --out {out}", "", "")]) == [set()]
    return out


@pytest.mark.full
@pytest.mark.parametrize("world_size", [1, 4])  # 3 is printed
def test_any_number_of_ranks_goes_on(saved: Path, world_size: int) -> None:
    assert failed_claims(SCRIPT, world_size, [(f"--out {saved} --resume", "", "")]) == [set()]


@pytest.mark.full
@pytest.mark.parametrize("world_size", [1, 3])
def test_any_number_of_ranks_saves(tmp_path: Path, world_size: int) -> None:
    flags = f"{SMALL} --seed 20260101 --out {tmp_path}"
    assert failed_claims(SCRIPT, world_size, [(flags, "", "")]) == [set()]
    assert failed_claims(SCRIPT, 2, [(f"--out {tmp_path} --resume", "", "")]) == [set()]


LOAD = '        engine.load_checkpoint(str(folder), tag="universal")\n        equal'
CONVERTING = [  # a piece of the source, what it becomes; the claim that must fail
    ("        model.load_state_dict(weights)", "        pass", "tensors that differ"),
    ("    weights = whole_weights(engine)\n    engine.save",
     "    weights = whole_weights(engine)\n    train_on(engine, after[:1])\n    engine.save",
     "tensors that differ"),
    ("12 + 12 / ranks", "12", "bytes written"),
    ("OTHER_STAGE = {3: 1, 2: 3}", "OTHER_STAGE = {3: 1, 2: 1}", "went from 3 to 1"),
    ("moved = train_on(engine, after)", "moved = train_on(engine, before)", "next loss"),
]  # fmt: skip
RESUMING = [
    (LOAD, "        equal", "tensors that differ"),
    ("        engine = engine_at(args, stage, universal=True)\n" + LOAD,
     '        engine = engine_at(args, stage, load_file(folder / "model.safetensors"))\n        equal',
     "uninterrupted"),  # the weights without the moments
    ("        losses = train_on(engine, after)", "        losses = train_on(engine, after.flip(0))",
     "uninterrupted"),
]  # fmt: skip


@pytest.mark.full
def test_mutants_are_caught(saved: Path, tmp_path: Path) -> None:
    for mutants, world_size, flags in (
        (CONVERTING, 2, f"{SMALL} --out {tmp_path}"),
        (RESUMING, 3, f"--out {saved} --resume"),
    ):
        cases = [(flags, right, wrong) for right, wrong, _ in mutants]
        found = failed_claims(SCRIPT, world_size, cases)
        for (right, _, claim), failed in zip(mutants, found, strict=True):
            assert any(claim in line for line in failed), f"{right}: {failed}"


@pytest.mark.full
@pytest.mark.parametrize("stage", [2, 3])
def test_the_commands_of_the_text_write_the_same(saved: Path, tmp_path: Path, stage: int) -> None:
    folder = saved / f"zero-{stage}"
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    command += ["--input_folder", str(folder / "shards"), "--output_folder", str(tmp_path / "new")]
    subprocess.run([*command, "--inject_missing_state"], check=True, capture_output=True)
    names = [p.relative_to(tmp_path / "new") for p in (tmp_path / "new").rglob("*.pt")]
    assert sorted(names) == sorted(
        p.relative_to(folder / "universal") for p in (folder / "universal").rglob("*.pt")
    )
    for name in (n for n in names if n.parts[0] == "zero" and n.name.startswith(("fp32", "exp"))):
        pair = [torch.load(at / name) for at in (tmp_path / "new", folder / "universal")]
        left, right = (found["param"] if isinstance(found, dict) else found for found in pair)
        assert torch.equal(left, right), name
    command = [sys.executable, "zero_to_fp32.py", ".", str(tmp_path), "--safe_serialization"]
    subprocess.run([*command, "--tag", "shards"], cwd=folder, check=True, capture_output=True)
    pair = [script.load_file(at / "model.safetensors") for at in (tmp_path, folder)]
    assert script.digests(pair[0]) == script.digests(pair[1])


@pytest.mark.full
@pytest.mark.parametrize("stage", [2, 3])
def test_a_missing_shard_is_named_before_anything_is_written(
    saved: Path, tmp_path: Path, stage: int
) -> None:
    """By the conversion to fp32, which comes first: it counts the files."""
    folder = tmp_path / "copy"
    shutil.copytree(saved / f"zero-{stage}" / "shards", folder / "shards")
    next((folder / "shards").glob("*pp_rank_1_*optim_states.pt")).unlink()
    with pytest.raises(ValueError, match=r"Expected 2 of '\*_optim_states.pt' under .* found 1"):
        script.convert(folder, {})
    assert [path.name for path in folder.iterdir()] == ["shards"]


@pytest.mark.full
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("missing", ["*pp_rank_0_*optim_states.pt", "*pp_rank_1_*"])
def test_ds_to_universal_ends_at_a_missing_shard_too(
    saved: Path, tmp_path: Path, stage: int, missing: str
) -> None:
    """In the words of whatever does not fit then; never without an error."""
    shards = shutil.copytree(saved / f"zero-{stage}" / "shards", tmp_path / "shards")
    for path in shards.glob(missing):
        path.unlink()
    with pytest.raises(RuntimeError):
        script.to_universal(shards, tmp_path / "universal")
    assert not (tmp_path / "latest_universal").exists()


# --- bad input ----------------------------------------------------------------------------------


def refusal(monkeypatch: pytest.MonkeyPatch, capsys: Any, flags: str) -> str:
    monkeypatch.setattr("sys.argv", [SCRIPT.name, *flags.split()])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as end:
        script.parse_args()
    assert end.value.code == 2
    return str(capsys.readouterr().err)


def test_bad_input_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    said = refusal(monkeypatch, capsys, f"--out {tmp_path} --resume")
    assert said == f"no whole checkpoint of ZeRO 3 in {tmp_path}: run without --resume first\n"
    (tmp_path / "zero-3" / "universal").mkdir(parents=True)  # of a conversion that was killed
    assert refusal(monkeypatch, capsys, f"--out {tmp_path} --resume") == said
    said = refusal(monkeypatch, capsys, f"--out {tmp_path} --batch 13")
    assert said == "2 ranks do not divide --batch 13: start another number of ranks\n"
    recipe = {"batch": 9, "data": "x"}
    for stage in (2, 3):
        (tmp_path / f"zero-{stage}").mkdir(exist_ok=True)
        (tmp_path / f"zero-{stage}" / "notes.json").write_text(json.dumps({"recipe": recipe}))
    said = refusal(monkeypatch, capsys, f"--out {tmp_path} --resume")
    assert said == "2 ranks do not divide --batch 9: start another number of ranks\n"
    assert "--out" in refusal(monkeypatch, capsys, "")
