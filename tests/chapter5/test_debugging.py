"""The mistakes of deepspeed_debugging.py: at other world sizes, and that a cure which is none is noticed."""

import pytest
import warm
from mutants import failed_claims

pytest.importorskip("deepspeed", reason="needs DeepSpeed, which is for Linux")
CODE = warm.ROOT / "chapter5-deepspeed-and-zero-optimization" / "code"
SCRIPT = CODE / "deepspeed_debugging.py"

MUTANTS = [  # flags; a piece of the source, what it becomes; the claim that must fail
    ("clipping", "for value in (None, 0.0):", "for value in (None, 1.0):", "step at 0.0"),
    ("clipping", "for value in (None, 0.0):", "for value in (0.0, 0.0):", "step without the key"),
    ("key", '"tensor_parallel", "comms_logger"', '"aio", "comms_logger"', "sections that do other"),
    ("key", "if key not in section.names:", "if key in section.names:", "found wrongly, or not found"),
    ("step", "        if number % 2 == 1:\n            seldom", "        if True:\n            seldom",
     "updates that are not"),
    ("step", "(loss / (dist.get_world_size() * accumulation))", "(loss / dist.get_world_size())",
     "one process's"),
    ("empty", "weight, modifier_rank=0)", "weight)", "written by rank 0"),
    ("lock", "        builder.kill()\n        builder.wait()\n", "", "after the kill"),
    ("ranks", "    cured.load_state_dict(state)\n", "", "weights loaded - saved"),
    ("ranks", "mpu=Alone()", "mpu=None", "names both numbers"),
]  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("world_size", [1, 3])
def test_other_world_sizes(world_size: int) -> None:
    assert failed_claims(SCRIPT, world_size, [("", "", "")]) == [set()]


@pytest.mark.full
def test_a_mistake_that_is_none_and_a_cure_that_is_none_are_noticed() -> None:
    cases = [(f"--only {only}", right, wrong) for only, right, wrong, _ in MUTANTS]
    found = failed_claims(SCRIPT, 2, cases)
    for (_, right, _, claim), failed in zip(MUTANTS, found, strict=True):
        assert any(claim in line for line in failed), f"{right}: {failed}"
