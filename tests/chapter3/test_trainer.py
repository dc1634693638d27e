"""The trainer: the same curve at every world size, across a resume, and beside a golden file."""

import itertools
import json
import socket
from collections.abc import Callable
from pathlib import Path

import book
import checks
import pytest
import torch
import warm

CODE = Path("chapter3-distributed-training-with-pytorch-ddp/code")
ROOT = Path(__file__).resolve().parents[2]
Run = Callable[..., warm.Result]
TRAIN = "train_ddp_torchrun.py"
GOLDEN = f"{TRAIN} --compare {CODE}/golden.json"
SMALL = f"{TRAIN} --data LICENSE --context 24 --width 24 --layers 1 --heads 2 --steps 12 --warmup 3"

trainer = warm.load("chapter3_trainer", ROOT / CODE / TRAIN)


def torchrun(world_size: int, line: str) -> str:
    return f"torchrun --nproc_per_node={world_size} {CODE}/{line}"


def passes(run: Run, world_size: int, line: str) -> warm.Result:
    command = torchrun(world_size, line)
    result, parsed = run(command), book.parse_command(command)
    problems = checks.evidence(parsed, result)
    assert not problems, checks.report(parsed, result, problems)
    return result


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
def test_every_world_size_gives_the_golden_losses(run: Run, world_size: int) -> None:
    """Five does not divide the batch of 12: two ranks have three windows, three have two."""
    passes(run, world_size, GOLDEN)


@pytest.mark.parametrize("seed", [1, 2])
def test_losses_do_not_depend_on_the_world_size(run: Run, tmp_path: Path, seed: int) -> None:
    curves = []
    for world_size in (1, 2, 4):
        record = tmp_path / f"{world_size}.json"
        passes(run, world_size, f"{SMALL} --seed {seed} --batch 9 --json {record}")
        curves.append(torch.tensor(json.loads(record.read_text())["losses"]))
    assert len(curves[0]) == 12
    for curve in curves[1:]:
        torch.testing.assert_close(curve, curves[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("ranks", [(2, 3), (1, 4), (4, 1)])
def test_a_resume_on_other_ranks_keeps_the_curve(
    run: Run, tmp_path: Path, ranks: tuple[int, int]
) -> None:
    """Stopped in the middle of an epoch, whose second batch must come next."""
    before, after = ranks
    passes(run, before, f"{GOLDEN} --out {tmp_path} --stop-at 7")
    result = passes(run, after, f"{GOLDEN} --out {tmp_path} --resume")
    assert "resuming      at step 7" in result.stdout
    again = passes(run, after, f"{GOLDEN} --out {tmp_path} --resume")
    assert "resuming      at step 20" in again.stdout, "nothing is left to do, and that is no error"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (SMALL, "torchrun --nproc_per_node=2"),
        (f"{SMALL} --steps 0", "--steps"),
        (f"{SMALL} --heads 5", "--width 24 is no multiple of 2 x --heads 5"),
        (f"{SMALL} --resume", "type --out DIR"),
        (f"{SMALL} --json no-such-folder/x.json", "no-such-folder"),
        (f"{SMALL} --compare no-such-file", "no-such-file"),
        (f"{SMALL} --compare LICENSE", "no losses of an earlier run"),
        (f"{SMALL} --out LICENSE", "--out LICENSE: File exists"),
        (f"{SMALL} --dropout 1", "--dropout 1: give 0 or more, and less than 1"),
        (f"{SMALL} --lr -1", "-1 is not a number above 0"),
        ("ddp_vs_accelerate.py", "torchrun --nproc_per_node=2"),
        ("ddp_vs_accelerate.py --steps -1", "--steps"),
        ("ddp_vs_accelerate.py --steps 6", "type --steps 7 or more"),
        ("ddp_vs_accelerate.py --heads 3", "--width 128 is no multiple of 2 x --heads 3"),
    ],
)
def test_bad_input_gets_one_line(run: Run, line: str, says: str) -> None:
    result = run(f"python {CODE}/{line}")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1, result.stderr
    assert says in result.stderr


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (f"{SMALL} --data no-such-file", "give a text file with --data FILE"),
        (f"{SMALL} --batch 99", "one batch needs"),
        (f"{SMALL} --batch 1", "type --batch 2 or more"),
        (f"{SMALL} --device abacus", "2 ranks, but 0 abacus devices: type --device cpu"),
        (f"{GOLDEN} --out OUT --resume", "has width 24, this run 64: type another --out"),
        (f"{SMALL} --out OUT", "type --resume to go on"),
        (f"{SMALL} --data README.md --out OUT --resume", "this run "),
        (f"{SMALL} --out TORN --resume", "cannot load"),
        ("ddp_vs_accelerate.py --batch 7", "type --batch 12"),
    ],
)
def test_bad_input_to_several_ranks(run: Run, tmp_path: Path, line: str, says: str) -> None:
    """Each rank says the one line; none hangs, none prints a traceback, the checkpoint stays."""
    out, torn = tmp_path / "out", tmp_path / "torn"
    if "OUT" in line or "TORN" in line:
        passes(run, 1, f"{SMALL} --out {out} --stop-at 1")
        whole = (out / "checkpoint.pt").read_bytes()
        torn.mkdir()
        (torn / "checkpoint.pt").write_bytes(whole[: len(whole) // 2])
    result = run(torchrun(2, line.replace("OUT", str(out)).replace("TORN", str(torn))), timeout=30)
    assert result.returncode not in (0, warm.TIMED_OUT)
    assert {says in line for line in result.stderr.splitlines()} == {True}, result.stderr
    if out.exists():
        assert (out / "checkpoint.pt").read_bytes() == whole


def test_a_port_in_use_is_named_by_torchrun_and_another_one_helps(
    checkout: Path, tmp_path: Path
) -> None:
    """The port is torchrun's business, before the script starts; the README says what to type."""
    line = f"{CODE}/{SMALL} --steps 2"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = f"torchrun --nproc_per_node=1 --master_port={port} {line}"
        result = warm.run_cold(book.parse_command(command), checkout, 60)
        assert result.returncode != 0
        assert "EADDRINUSE" in result.stderr
        assert str(port) in result.stderr
        command = f"torchrun --standalone --nproc_per_node=1 {line}"
        result = warm.run_cold(book.parse_command(command), checkout, 60)
        assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        # no gradient is averaged
        ("ranked = DistributedDataParallel(model, gradient_as_bucket_view=True)", "ranked = model"),
        # a sum for a mean: clipping and AdamW hide it from the losses, the norms show it
        ("(loss * dist.get_world_size()).backward()", "(loss * 4).backward()"),
        # the mean of the ranks' means, where shares differ
        ("(batch * logits.shape[1])", "(len(window) * logits.shape[1] * dist.get_world_size())"),
        # each epoch deals the same batches
        ("set_epoch(step // per_epoch, ", "set_epoch(0, "),
        # all ranks take the same share
        ("whole[self.rank :: self.world_size]", "whole[: len(whole) // self.world_size]"),
        # evaluation counts each window once per rank
        ("windows[dist.get_rank() :: dist.get_world_size()]", "windows"),
        # the reported loss is rank 0's part of it
        ("dist.all_reduce(pooled)\n            losses", "losses"),
        ("schedule.step()\n", "pass\n"),
        # the norm that is reported is not the one that is clipped to
        ("norm = nn.utils.clip_grad_norm_(model.parameters(), clip)", "norm = torch.ones(())"),
    ],
)
def test_mutants_are_caught(run: Run, checkout: Path, right: str, wrong: str) -> None:
    """Break the trainer: the golden file must show it. Five ranks have shares of two sizes."""
    source = (checkout / CODE / TRAIN).read_text()
    assert source.count(right) == 1
    mutant = checkout / CODE / f"mutant_{TRAIN}"
    mutant.write_text(source.replace(right, wrong))
    result = run(torchrun(5, f"mutant_{GOLDEN}"), timeout=60)
    mutant.unlink()
    assert result.returncode not in (0, warm.TIMED_OUT)
    assert "FAILED" in result.stdout


@pytest.mark.parametrize(
    "restored",
    [
        'model.load_state_dict(state["model"])',
        'optimizer.load_state_dict(state["optimizer"])',
        'schedule.load_state_dict(state["schedule"])',
        "done=step % per_epoch",
    ],
)
def test_a_resume_that_forgets_is_caught(
    run: Run, checkout: Path, tmp_path: Path, restored: str
) -> None:
    passes(run, 2, f"{GOLDEN} --out {tmp_path} --stop-at 7")
    source = (checkout / CODE / TRAIN).read_text()
    assert source.count(restored) == 1
    mutant = checkout / CODE / f"mutant_{TRAIN}"
    mutant.write_text(source.replace(restored, "done=0" if "done" in restored else "pass"))
    result = run(torchrun(2, f"mutant_{GOLDEN} --out {tmp_path} --resume"))
    mutant.unlink()
    assert "FAILED" in result.stdout


# --- the parts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize(("samples", "batch"), [(30, 7), (12, 12), (11, 5)])
def test_shares_make_up_the_same_batches(samples: int, batch: int, world_size: int) -> None:
    def shares(epoch: int, done: int, n: int) -> list[list[int]]:
        samplers = [trainer.ShareOfBatch(samples, batch, r, n, seed=3) for r in range(n)]
        for sampler in samplers:
            sampler.set_epoch(epoch, done)
        dealt = list(zip(*samplers, strict=True))
        assert len(dealt) == len(samplers[0]) == samples // batch - done
        assert all(max(map(len, d)) - min(map(len, d)) <= 1 for d in dealt)
        return [sorted(index for share in d for index in share) for d in dealt]

    whole = shares(0, 0, 1)
    flat = [index for share in whole for index in share]
    assert len(set(flat)) == len(flat) == samples // batch * batch
    assert shares(0, 0, world_size) == whole
    assert shares(0, 1, world_size) == whole[1:]
    assert shares(1, 0, world_size) != whole or samples == batch


def test_the_learning_rate_rises_to_its_peak_and_falls_to_a_tenth() -> None:
    rates = [trainer.learning_rate(step, warmup=4, steps=20) for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert all(a > b for a, b in itertools.pairwise(rates[4:]))
    assert trainer.learning_rate(20, 4, 20) == pytest.approx(0.1)


def test_the_model_cannot_see_what_it_predicts_and_knows_where_tokens_stand() -> None:
    torch.manual_seed(0)
    model = trainer.ByteLM(width=16, layers=2, heads=2, context=8)
    tokens = torch.randint(256, (1, 8))
    changed = tokens.clone()
    changed[0, 5] += 1
    a, b = model(tokens), model(changed)
    torch.testing.assert_close(a[:, :5], b[:, :5])
    assert not torch.allclose(a[:, 5:], b[:, 5:])
    # a rotation keeps lengths, and dot products depend on the distance alone (RoFormer, section 3)
    q, k = torch.randn(2, 1, 1, 1, 8)
    turned_q, turned_k = (trainer.rotate(x.expand(1, 1, 8, 8), model.rotation) for x in (q, k))
    scores = turned_q @ turned_k.mT
    torch.testing.assert_close(scores[..., 1, 3], scores[..., 4, 6])
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm(dim=-1).expand(1, 1, 8))
    assert not torch.allclose(scores[..., 1, 3], scores[..., 3, 1])
