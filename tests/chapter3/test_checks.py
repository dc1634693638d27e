"""A claim that is not a number is not held, whichever rank found it; and no group is half joined."""

import math
import os
from types import ModuleType

import pytest
import torch
import torch.distributed as dist
import warm
from torch import nn

CODE = "chapter3-distributed-training-with-pytorch-ddp/code"
BOTH_WAYS = (
    "amp_ddp_example",
    "ddp_from_scratch",
    "ddp_uneven_inputs_join",
    "gradient_accumulation_no_sync",
)
ONE_WAY = (
    "ddp_bucketing_overlap",
    "ddp_comm_hooks",
    "local_sgd",
    "profile_ddp",
    "train_ddp_torchrun",
    "train_elastic_checkpoint",
)


def script(name: str) -> ModuleType:
    return warm.load(f"checks_{name}", warm.ROOT / CODE / f"{name}.py")


def verdicts(name: str, guilty: int) -> list[bool]:
    """In a rank: does a check hold if all ranks are within the bound, and if one has NaN?"""
    check, value = script(name).check, math.nan if dist.get_rank() == guilty else 0.5
    found = [check("a number", 0.5, 1), check("not a number", value, 1)]
    if name in BOTH_WAYS:
        found += [check("a number", 1.5, 1, at_least=True)]
        found += [check("not a number", 3 * value, 1, at_least=True)]
    return found


@pytest.mark.parametrize("guilty", [0, 1])
@pytest.mark.parametrize("name", [*BOTH_WAYS, *ONE_WAY])
def test_nan_on_any_rank_fails_on_all(name: str, guilty: int) -> None:
    expected = [True, False] * (2 if name in BOTH_WAYS else 1)
    assert warm.fork_ranks(verdicts, 2, name, guilty) == [expected] * 2


def spread(name: str, values: tuple[float, float]) -> float:
    model = nn.Linear(2, 2)
    nn.init.constant_(model.weight, values[dist.get_rank()])
    nn.init.zeros_(model.bias)
    return script(name).max_spread(model)


@pytest.mark.parametrize("name", ["ddp_comm_hooks", "local_sgd", "train_ddp_torchrun"])
def test_spread_of_weights_sees_nan(name: str) -> None:
    assert max(warm.fork_ranks(spread, 2, name, (1.0, 1.0))) == 0
    assert max(warm.fork_ranks(spread, 2, name, (1.0, 1.25))) == 0.25
    for values in ((math.nan, 1.0), (1.0, math.nan)):
        assert any(math.isnan(found) for found in warm.fork_ranks(spread, 2, name, values))


def after_nan() -> bool:
    """In a rank: does a golden file take a run whose losses stop being numbers?"""
    trainer = script("train_ddp_torchrun")
    golden = {"recipe": {}, "losses": [3.0, 2.0], "norms": [1.0, 1.0]}
    path = warm.ROOT / "runs" / f"nan-{os.getpid()}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(trainer.json.dumps(golden))
    try:
        good = trainer.compare(path, {}, [3.0, 2.0], [1.0, 1.0])
        bad = trainer.compare(path, {}, [3.0, math.nan], [1.0, 1.0])
    finally:
        path.unlink()
    return good and not bad


def test_golden_losses_are_numbers() -> None:
    assert all(warm.fork_ranks(after_nan, 2))


@pytest.mark.parametrize("name", [*BOTH_WAYS, *ONE_WAY])
def test_half_a_launcher_gets_one_line(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """RANK alone, as by hand or by mpirun, is not enough to know which GPU is this rank's."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    with pytest.raises(SystemExit) as left:
        script(name).join_group("auto")
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith("no launcher: type  torchrun --nproc_per_node=2")


def test_a_worst_value_may_be_nan() -> None:
    worst = script("ddp_comm_hooks").worst
    assert worst(x for x in (0.5, 2.0, 1.0)) == 2
    assert math.isnan(worst([0.5, math.nan]))
    assert torch.tensor([1.0, math.nan]).max().isnan(), "what the scripts rely on"
