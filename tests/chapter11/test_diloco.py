"""DiLoCo in fragments and by mailbox: formulas, other world sizes, kills, mutants, bad input."""

import hashlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import warm
from mutants import failed_claims
from torch import nn
from torch.nn.utils import parameters_to_vector
from torch.optim import SGD

CODE = warm.ROOT / "chapter11-trends-and-future-of-distributed-ai/code"
SCRIPT = CODE / "ch11_diloco.py"
SMALL = "--steps 8 --warm-up 2 --every 2 4 --batch 8 --width 16 --layers 1"
Run = Callable[..., warm.Result]

script = warm.load("ch11_diloco", SCRIPT)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


# --- fragments ---------------------------------------------------------------------------------


def test_fragments_are_a_partition_of_like_sizes() -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(6)))
    for count in (1, 2, 3, 12):
        groups = script.cut(model, count)
        members = [p for group in groups for p in group]
        assert len(groups) == count
        assert {id(p) for p in members} == {id(p) for p in model.parameters()}
        assert len(members) == 12
    assert [script.size_of(group) for group in script.cut(model, 3)] == [4 * 2 * 72] * 3


def fragments_in_rank() -> float:
    """Two fragments, H 4, against the formula: each has its own common weights, velocity and turn."""
    rank = dist.get_rank()
    n = dist.get_world_size()
    model = nn.Linear(3, 3, bias=False).double()
    model.other = nn.Linear(3, 3, bias=False).double()  # two tensors, one fragment each
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    streaming = script.StreamingDiLoCo(model, every=4, fragments=2, lr=0.7, momentum=0.9)
    turns = {0: 0, 1: 2}  # steps since the last turn, at the start
    parts = [part for group in script.cut(model, 2) for part in group]
    common = [1.0, 1.0]
    velocity = [0.0, 0.0]
    moved = [0.0, 0.0]  # by the mean rank, since the turn
    worst = 0.0
    for step in range(12):
        with torch.no_grad():
            for i, parameter in enumerate(parts):
                parameter.sub_(0.01 * (rank + 1) * (i + 1) * (step + 1))
                moved[i] += 0.01 * (i + 1) * (step + 1) * sum(range(1, n + 1)) / n
        streaming.step()
        for i in range(2):
            turns[i] += 1
            if turns[i] % 4 == 0:
                velocity[i] = 0.9 * velocity[i] + moved[i]
                common[i] -= 0.7 * (moved[i] + 0.9 * velocity[i])
                moved[i] = 0.0
                worst = max(worst, (parts[i] - common[i]).abs().max().item())
    return worst


def test_each_fragment_has_its_own_turn_and_velocity() -> None:
    assert max(warm.fork_ranks(fragments_in_rank, 2)) < 1e-12


# --- the mailbox -------------------------------------------------------------------------------


def test_whoever_is_late_is_left_out_by_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "CHUNK", 16)  # 10 floats: three values in the store
    store = dist.HashStore()
    zero, one, two = (script.Mailbox(store, i, 3, grace_s=0.05) for i in range(3))
    changes = torch.arange(30, dtype=torch.float32).view(3, 10)
    zero.post(0, changes[0])
    two.post(0, changes[2])
    assert not zero.decided(0)
    mean = zero.merge(0, changes[0])  # waits for learner 1, in vain
    assert torch.equal(mean, (changes[0] + changes[2]) / 2)
    one.post(0, changes[1])  # too late: it reads what the others have decided
    assert torch.equal(one.merge(0, changes[1]), mean)
    assert zero.members == one.members == [0, 2]
    zero.grace_s = 300
    zero.post(1, changes[0])
    two.post(1, changes[2])
    assert torch.equal(zero.merge(1, changes[0]), mean), "it waited for one that was away before"
    one.check_in(2)
    for mailbox in (zero, two, one):
        mailbox.post(2, changes[mailbox.learner])
    zero.merge(2, changes[0])
    assert zero.members == [0, 1, 2]


def learner(port: int, rank: int, kill_at: int, folder: str) -> None:
    """A process of its own, in no process group; dies in its `kill_at`-th forward pass."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(256, 4), nn.Flatten(), nn.Linear(32, 256))
    forwards = 0

    def die(*_: Any) -> None:
        nonlocal forwards
        forwards += 1
        if forwards == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    model.register_forward_hook(die)
    draw = torch.Generator().manual_seed(rank)
    batches = [torch.randint(256, (4, 9), generator=draw) for _ in range(20)]
    mailbox = script.Mailbox(store, rank, 3, grace_s=1.0)
    method = script.Method(4, 1, 0.7, 0.9)
    optimizer = SGD(model.parameters(), lr=0.1)
    members = script.train_by_mailbox(method, model, optimizer, batches, mailbox, range(0))
    weights = parameters_to_vector(model.parameters()).detach()
    digest = hashlib.sha256(weights.numpy().tobytes()).hexdigest()
    Path(folder, f"learner-{rank}").write_text(f"{digest} {members}")


def test_after_a_sigkill_the_others_go_on_and_a_new_process_catches_up(tmp_path: Path) -> None:
    """Learner 2 dies in round 1; its successor knows the seed and the store, and nothing else."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = warm._context()
    start = {rank: 6 if rank == 2 else 0 for rank in range(3)}
    processes = [
        context.Process(target=learner, args=(store.port, rank, kill_at, str(tmp_path)))
        for rank, kill_at in start.items()
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, -signal.SIGKILL]
    assert not (tmp_path / "learner-2").exists()
    successor = context.Process(target=learner, args=(store.port, 2, 0, str(tmp_path)))
    successor.start()
    successor.join(60)
    ends = {(tmp_path / f"learner-{rank}").read_text() for rank in range(3)}
    assert len(ends) == 1, "all have the same weights, and the same story"
    rounds = "[[0, 1, 2], [0, 1], [0, 1], [0, 1], [0, 1]]"
    assert ends.pop().endswith(rounds)


TOO_LARGE = """
import torch.distributed as dist
store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
store.set("fits", b"x" * (8 << 20))
print(len(store.get("fits")))
store.set("does not", b"x" * ((8 << 20) + 1))
"""


@pytest.mark.full
def test_a_store_refuses_more_than_8_mib(run: Run, tmp_path: Path) -> None:
    """As section 11.5 says of torch 2.13, and why `post` cuts."""
    path = tmp_path / "large.py"
    path.write_text(TOO_LARGE)
    result = run(f"python {path}", timeout=60)
    assert result.returncode == 1
    assert result.stdout == "8388608\n"
    assert "Invalid payload size. size: 8388609, max: 8388608" in result.stderr
    assert "Connection reset by peer" in result.stderr or "Broken pipe" in result.stderr


# --- the script --------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_every_world_size(world_size: int) -> None:
    lines = [f"{SMALL} --seed 20260101", f"{SMALL} --fragments 5 --away 1 --outer-momentum 0.3"]
    lines.append("--steps 4 --warm-up 1 --every 4 --batch 2 --width 8 --layers 1 --fragments 9")
    assert failed_claims(SCRIPT, world_size, [(line, "", "") for line in lines]) == [set()] * 3


MUTANTS = [  # a piece of the source, what it becomes; the claim that must fail
    ("    flat = mean_over_ranks(torch.cat([gradient.flatten() for gradient in gradients]))",
     "    flat = torch.cat([gradient.flatten() for gradient in gradients])", "spread of weights"),
    # all fragments at once: the burst is the whole model
    ("part.steps = i * every // fragments", "part.steps = 0", "bytes of a step"),
    ("            if part.steps % part.every:", "            if False:", "spread of weights over ranks"),
    ("    left = sum(size for size, phase in pairs if phase)", "    left = 0", "bytes of a step"),
    ("2 * (n - 1) / n * size for", "size for", "bytes of a step"),
    # by mailbox: one learner's way for all, another outer optimizer, a sum
    ("        for i in self.members:\n", "        for i in self.members[:1]:\n", "by mailbox"),
    ("        outer.step()\n", "        common.sub_(common.grad)\n", "by mailbox"),
    ("return mean / len(self.members)", "return mean", "by mailbox"),
    ("common - parameters_to_vector(model.parameters()).detach()",
     "parameters_to_vector(model.parameters()).detach() - common", "by mailbox"),
    # who comes back goes on from where it was
    ("        common.grad = mailbox.merge(at, common)\n",
     "        common.grad = mailbox.merge(at, common)\n        if at in away:\n            continue\n",
     "spread of weights over learners"),
]  # fmt: skip


@pytest.mark.full
def test_mutants_are_caught() -> None:
    found = failed_claims(SCRIPT, 3, [(SMALL, right, wrong) for right, wrong, _ in MUTANTS])
    for (right, _, claim), failed in zip(MUTANTS, found, strict=True):
        assert any(claim in line for line in failed), f"{right}: {failed}"


@pytest.mark.full
@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--steps 4 --every 3", "--steps 4 is no multiple of H = 3"),
        ("--every 0", "is no multiple of H = 0"),
        ("--fragments 0", "--fragments 0: the model has 21 tensors to cut it at"),
        ("--fragments 30", "--fragments 30: the model has 21 tensors to cut it at"),
    ],
)
def test_bad_input_gets_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: str, says: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["x", *flags.split()])
    with pytest.raises(SystemExit) as end:
        script.parse_args()
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1


@pytest.mark.full
@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--data no-such-file", "give a text file with --data FILE"),
        ("--device abacus", "0 GPUs here"),
    ],
)
def test_bad_input_to_two_ranks(run: Run, flags: str, says: str) -> None:
    command = f"torchrun --nproc_per_node=2 {SCRIPT.relative_to(warm.ROOT)} {flags}"
    result = run(command, timeout=30)
    assert result.returncode not in (0, warm.TIMED_OUT)
    assert {says in line for line in result.stderr.splitlines()} == {True}, result.stderr
