"""DDP, FSDP2 and ZeRO in one run: one training at any number of ranks, and accounts that can be wrong."""

from typing import Any

import pytest
import warm
from book import CHAPTERS
from mutants import failed_claims

pytest.importorskip("deepspeed", reason="needs DeepSpeed, which is for Linux")

SCRIPT = warm.ROOT / CHAPTERS[4] / "code" / "benchmark_zero_vs_fsdp.py"
SMALL = "--width 50 --context 16 --steps 8 --lr 1e-2"  # long gradients; rows that do not divide
MUTANTS = [  # a piece of the source, what it becomes; the claim that must fail
    ("trainer.backward(loss * n)", "trainer.backward(loss)", "gradient norm"),
    ("norm = nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)",
     "norm = nn.utils.get_total_norm([p.grad for p in self.model.parameters()])", "loss"),
    ('"gradient_clipping": CLIP', '"gradient_clipping": 0.0', "loss"),
    ("    dist.all_reduce(losses)\n", "", "loss"),
    ("fully_shard(fsdp_model, mesh=mesh)",
     "fully_shard(fsdp_model, mesh=mesh, reshard_after_forward=True)", "sends"),
    # each of these is a mistake in the model that predicts
    ("chunk = -(-len(p) // n)", "chunk = len(p) // n", "holds"),
    ('3 if key.startswith("blocks.") else 2', "3", "sends"),
    ("20 * part + 4", "16 * part + 4", "holds"),
    ("start < first + part and start + size > first", "first <= start < first + part", "holds"),
    ("whole * (2 * total + part * n)", "whole * (total + part * n)", "sends"),
]  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("world_size", [1, 3, 4])  # 2 is printed
def test_five_trainers_are_one_training_at_any_world_size(world_size: int) -> None:
    flags = f"{SMALL} --seed 20260101"
    assert failed_claims(SCRIPT, world_size, [(flags, "", "")]) == [set()]


@pytest.mark.full
def test_mutants_are_caught() -> None:
    """Three ranks, so that parts do not divide."""
    cases = [(SMALL, right, wrong) for right, wrong, _ in MUTANTS]
    for (right, _, claim), failed in zip(MUTANTS, failed_claims(SCRIPT, 3, cases), strict=True):
        assert any(claim in line for line in failed), f"{right}: {failed}"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--batch 13", "2 ranks do not divide --batch 13: start another number of ranks"),
        ("--steps 3", "the first 3 steps are not timed: type --steps 4 or more"),
    ],
)
def test_bad_input_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, flags: str, says: str
) -> None:
    monkeypatch.setattr("sys.argv", [SCRIPT.name, *flags.split()])
    monkeypatch.setenv("WORLD_SIZE", "2")
    script = warm.load("chapter5_benchmark", SCRIPT)
    with pytest.raises(SystemExit) as end:
        script.parse_args()
    assert (end.value.code, capsys.readouterr().err) == (2, f"{says}\n")
