"""Section 8.10: symptoms, brought about by their causes, in the words that the tools have for them."""

import math
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import warm
from book import CHAPTERS, parse_command
from safetensors.torch import save_file

CODE = warm.ROOT / CHAPTERS[7] / "code"


def first_loss(shift: int, std: float | None) -> float:
    """Of a model that has learned nothing, on tokens that tell nothing."""
    sys.path.insert(0, str(CODE))
    from model import Config, Llama

    torch.manual_seed(0)
    model = Llama(Config(2048, width=64, layers=2, heads=2, kv_heads=1, hidden=128, context=64))
    for p in model.parameters():
        if std and p.dim() == 2:
            torch.nn.init.normal_(p, std=std)
    window = torch.randint(2048, (16, 65))
    targets = window[:, shift : 64 + shift]
    return F.cross_entropy(model(window[:, :64]).flatten(0, 1), targets.flatten()).item()


def test_the_first_loss_is_that_of_guessing() -> None:
    guess = math.log(2048)
    assert abs(first_loss(shift=1, std=None) - guess) < 0.05
    assert first_loss(shift=0, std=None) < guess - 1, "it sees the token that it has to predict"
    assert first_loss(shift=1, std=1.0) > 2 * guess, "weights that are too large"


def lose_a_worker(folder: str) -> str:
    sys.path.insert(0, str(CODE))
    import psutil
    from data import Loader, Tokens

    shard = {"file": "tokens.safetensors", "tokens": 9000}
    windows = Tokens(Path(folder), [shard], context=8)
    batches = iter(Loader(windows, batch=4, rank=0, size=1, seed=0, workers=1))
    next(batches)
    for child in psutil.Process().children():
        os.kill(child.pid, signal.SIGKILL)  # as the kernel does where memory ends
    try:
        for _ in range(1000):
            next(batches)
    except RuntimeError as error:
        return str(error)
    return ""


def test_a_killed_worker_ends_the_run(tmp_path: Path) -> None:
    save_file({"tokens": torch.zeros(9000, dtype=torch.uint16)}, tmp_path / "tokens.safetensors")
    (said,) = warm.fork_ranks(lose_a_worker, 1, str(tmp_path))
    assert "DataLoader worker" in said
    assert "killed by signal: Killed" in said or "exited unexpectedly" in said


@pytest.mark.full
def test_torchrun_gives_each_rank_one_thread(tmp_path: Path) -> None:
    script = tmp_path / "threads.py"
    script.write_text("import os\nprint('threads', os.environ['OMP_NUM_THREADS'])\n")
    command = parse_command(f"torchrun --nproc_per_node=2 {script}")
    result = warm.run_cold(command, tmp_path, timeout=60)
    assert result.stdout == "threads 1\n" * 2, result.stderr
    assert "Setting OMP_NUM_THREADS environment variable for each process" in result.stderr
