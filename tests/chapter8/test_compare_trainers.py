"""Three trainers, one course of losses; and each way to compare two trainers wrongly shows in it."""

import argparse
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import warm
from book import CHAPTERS
from safetensors.torch import save_file

CODE = warm.ROOT / CHAPTERS[7] / "code"
COMMAND = f"torchrun --nproc_per_node=2 {CHAPTERS[7]}/code/compare_trainers.py"
MUTANTS = [  # a piece of baselines.py, what it becomes, whose losses must go astray
    ("windows[:, dist.get_rank()]", "windows[:, 0]", "plain loop"),  # all on one rank's share
    ("init_weights(model, seed)", "init_weights(model, seed + 1)", "plain loop"),
    ("window[:, 1:].flatten()", "window[:, :-1].flatten()", "plain loop"),  # targets not shifted
    ('strategy="sequential"', 'strategy="random"', "HF Trainer"),  # the Trainer's default order
    ("remove_unused_columns=False", "remove_unused_columns=True", "HF Trainer"),  # its default
    ("lr=args.lr, betas", "lr=2 * args.lr, betas", "plain loop"),
    ('lr_scheduler_type="constant"', 'lr_scheduler_type="linear"', "HF Trainer"),  # its default
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random tokens in the form that prepare_data.py gives them."""
    folder = tmp_path_factory.mktemp("data")
    tokens = torch.randint(100, (5000,), generator=torch.Generator().manual_seed(0))
    save_file({"tokens": tokens.to(torch.uint16)}, folder / "train-00000.safetensors")
    shard = {"file": "train-00000.safetensors", "tokens": 5000, "digest": ""}
    (folder / "meta.json").write_text(json.dumps({"vocabulary": 100, "train": {"shards": [shard]}}))
    return folder


def astray_in_rank(folder: Path, mutants: list[tuple[str, str]]) -> list[dict[str, float]]:
    """For each mutant: how far each trainer's losses are from train.py's, at most."""
    sys.path.insert(0, str(CODE))
    import compare_trainers
    from model import Config

    args = argparse.Namespace(data=folder, dtype="float32", lr=3e-3, seed=7)
    found = []
    for right, wrong in mutants:
        source = (CODE / "baselines.py").read_text(encoding="utf-8")
        assert not right or source.count(right) == 1, f"not once in baselines.py: {right}"
        baselines = types.ModuleType("baselines")
        sys.modules["baselines"] = baselines  # dataclasses look there
        code = compile(source.replace(right, wrong) if right else source, "baselines.py", "exec")
        exec(code, baselines.__dict__)  # noqa: S102 - the book's own
        for name in ("hf_trainer", "plain_loop", "windows_of", "train_py"):
            setattr(compare_trainers, name, getattr(baselines, name))
        config = Config(100, width=32, layers=2, heads=2, kv_heads=1, hidden=48, context=16)
        race = baselines.Race("", config, batch=6, rounds=1, burst=3)
        seconds, losses = compare_trainers.run_race(race, args, torch.device("cpu"))
        assert seconds.shape == (3, 1)
        assert losses.shape == (3, 6)
        away = (losses - losses[-1]).abs().amax(1).tolist()
        found.append(dict(zip(compare_trainers.TRAINERS, away, strict=True)))
    return found


@pytest.mark.full
def test_one_process(data: Path) -> None:
    ((away,),) = warm.fork_ranks(astray_in_rank, 1, data, [("", "")])
    assert max(away.values()) <= 1e-5, away


@pytest.mark.full
def test_three_ranks(data: Path) -> None:
    for (away,) in warm.fork_ranks(astray_in_rank, 3, data, [("", "")]):
        assert max(away.values()) <= 1e-5, away


@pytest.mark.full
def test_mutants(data: Path) -> None:
    changes = [(right, wrong) for right, wrong, _ in MUTANTS]
    found = warm.fork_ranks(astray_in_rank, 2, data, changes)[0]
    for (right, wrong, whose), away in zip(MUTANTS, found, strict=True):
        assert away[whose] > 1e-5, f"{right} -> {wrong}: {away}"


def compare(name: str) -> Callable:
    sys.path.insert(0, str(CODE))
    return getattr(warm.load("compare_trainers", CODE / "compare_trainers.py"), name)


def test_arithmetic() -> None:
    """Four milliseconds more make 10 into 14, and 100 into 104; one slow round changes nothing."""
    ours = torch.tensor([10.0, 12.0, 30.0, 10.0, 11.0]) / 1e3
    trainer = ours + 4e-3
    loop = 1.5 * ours
    loop[2] = 9.0
    short = torch.stack([trainer, loop, ours])
    added, predicted = compare("predict")(short, 10 * short)
    assert added == pytest.approx([4e-3, 5.5e-3, 0])
    assert predicted == pytest.approx([1 + 4 / 110, 1.05, 1])
    assert compare("ratios")(short) == pytest.approx([1 + 4 / 11, 1.5, 1])


@pytest.mark.full
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--batch 3", "--batch 3 does not divide by 2 ranks"),
        ("--batch 500", "windows: type a smaller one"),
        ("--heads 5", "--width must divide"),
        ("--data {data}/..", "cannot read"),
    ],
)
def test_bad_input(run: Callable[..., warm.Result], data: Path, flags: str, said: str) -> None:
    result = run(f"{COMMAND} --data {data} {flags.format(data=data)}")
    assert result.returncode != 0
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert "short steps" not in result.stdout, "it said so after the first training"


@pytest.mark.full
def test_what_ddp_says_of_the_trainers_default(run: Callable[..., warm.Result], data: Path) -> None:
    """Section 8.10. The run itself is right."""
    sizes = "--width 32 --layers 1 --heads 2 --kv-heads 1 --hidden 32 --context 16 --rounds 1"
    result = run(f"{COMMAND} --data {data} {sizes}")
    assert "all 2 checks ok" in result.stdout, result.stdout + result.stderr
    said = "find_unused_parameters=True was specified in DDP constructor, but did not find any"
    assert said in result.stderr
