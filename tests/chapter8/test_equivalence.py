"""The matrix turns red for each mistake that it is there to see, in the row and column that it names."""

import re
import shutil
from pathlib import Path

import pytest
import warm
from book import CHAPTERS

pytest.importorskip("deepspeed", reason="needs DeepSpeed, which is for Linux")

CODE = warm.ROOT / CHAPTERS[7] / "code"
COLUMNS = ("loss", "gradients", "weights")
MUTANTS = [  # a file, a piece of it, what it becomes; a layout, and the column that must show it
    # Every rank reads windows of its own, those of one TP group too (of unequal shares gloo dies).
    ("parallel", "return replica * mesh.size(1) + shard, mesh.size(0) * mesh.size(1)",
     "return dist.get_rank(), dist.get_world_size()", "TP --batch 4", "loss"),
    # Replicas read the same windows.
    ("parallel", "return replica * mesh.size(1) + shard, mesh.size(0) * mesh.size(1)",
     "return shard, mesh.size(1)", "hybrid", "loss"),
    # Replicas are not averaged.
    ("parallel", 'mesh["dp_replicate", "dp_shard"] if replicas > 1 else mesh["dp_shard"]',
     'mesh["dp_shard"]', "hybrid", "gradients"),
    # A norm's gradient is that of a rank's own part of the sequence.
    ("parallel", "SequenceParallel(use_local_output=True) if sequence_parallel else Replicated()",
     "Replicated()", "FSDP2 x TP", "gradients"),
    # Each rank draws weights of its own.
    ("parallel", "zlib.crc32(name.encode())", "zlib.crc32(name.encode()) + dist.get_rank()",
     "FSDP2", "loss"),
    # A sum where a mean belongs, and a mean of means over shares of two windows and one.
    ("equivalence_matrix", "trainer.backward(factor * loss)", "trainer.backward(n * factor * loss)",
     "FSDP2", "gradients"),
    ("equivalence_matrix", "total / batch[:, 1:].numel()", "total / window[:, 1:].numel() / n",
     "DDP", "loss"),
    # The norm of a rank's own shards, and no clipping: AdamW hides much of both.
    ("equivalence_matrix", "norm = nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)",
     'own = [getattr(p.grad, "_local_tensor", p.grad) for p in self.model.parameters()]\n'
     "        norm = torch.stack([g.norm() for g in own]).norm()\n"
     "        [g.mul_(CLIP / norm) for g in own]",
     "FSDP2", "gradients"),
    ("equivalence_matrix", '"gradient_clipping": CLIP', '"gradient_clipping": 0.0',
     "ZeRO 1", "weights"),
]  # fmt: skip


def run_matrix(folder: Path, flags: str) -> warm.Result:
    return warm.run(f"python {folder / 'equivalence_matrix.py'} {flags}")


@pytest.mark.full
@pytest.mark.parametrize(("name", "right", "wrong", "layout", "column"), MUTANTS)
def test_mutants_are_caught(
    tmp_path: Path, name: str, right: str, wrong: str, layout: str, column: str
) -> None:
    for script in CODE.glob("*.py"):
        shutil.copy(script, tmp_path)
    path = tmp_path / f"{name}.py"
    source = path.read_text(encoding="utf-8")
    assert source.count(right) == 1, f"not once in {name}.py: {right}"
    path.write_text(source.replace(right, wrong), encoding="utf-8")
    layout, *flags = layout.split(" --")
    result = run_matrix(tmp_path, " --".join([f'--layouts "{layout}"', *flags]))
    assert result.returncode == 1, result.stdout + result.stderr
    cells = re.search(rf"^{layout} +\d+ +(\S+) +(\S+) +(\S+) *$", result.stdout, re.M)
    assert cells, result.stdout
    assert cells[COLUMNS.index(column) + 1].endswith("!"), result.stdout
    assert re.search(rf"^check: {column}, .* FAILED", result.stdout, re.M), result.stdout


@pytest.mark.full
def test_a_rank_without_a_window_and_another_seed() -> None:
    """Three windows for four ranks: one has none, and takes part in every collective."""
    result = run_matrix(CODE, '--batch 3 --seed 20260101 --layouts hybrid "hybrid x TP" "ZeRO 3"')
    assert (result.returncode, "!" in result.stdout) == (0, False), result.stdout + result.stderr


@pytest.mark.full
@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--hidden 55", "--width has to divide by 8, --hidden and --context by 2"),
        ("--batch 0", "--batch 0: type 1 or more"),
        ("--data nowhere.txt", "cannot read nowhere.txt (No such file or directory)"),
        ("--device cuda", "3 ranks, but 0 GPUs here: type --device cpu, or fewer --layouts"),
    ],
)
def test_bad_input_is_one_line(flags: str, says: str) -> None:
    result = run_matrix(CODE, f"--layouts FSDP2 {flags}")
    assert result.returncode == 2, result.stdout + result.stderr
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert says in result.stderr
