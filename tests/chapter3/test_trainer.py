"""The trainer: the same curve at every world size, across a resume, and beside a golden file."""

import itertools
import json
import math
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import book
import pytest
import torch
import torch.distributed as dist
import warm
from mutants import failed_claims

CODE = Path("chapter3-distributed-training-with-pytorch-ddp/code")
TRAIN = warm.ROOT / CODE / "train_ddp_torchrun.py"
ACCELERATE = warm.ROOT / CODE / "ddp_vs_accelerate.py"
GOLDEN = f"--compare {CODE}/golden.json"
SHAPE = "--context 24 --width 24 --layers 1 --heads 2 --steps 12 --warmup 3"
Run = Callable[..., warm.Result]

trainer = warm.load("chapter3_trainer", TRAIN)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """44 windows of 24 bytes to train on: an epoch has three batches of 12."""
    path = tmp_path_factory.mktemp("trainer") / "text"
    path.write_bytes((warm.ROOT / "resources/corpus.txt").read_bytes()[:1200])
    return path


@pytest.fixture(scope="module")
def reference(text: Path) -> Path:
    """A golden file of one rank, over four epochs, with a date as its seed."""
    path = text.with_name("reference.json")
    flags = f"--data {text} {SHAPE} --seed 20260101 --json {path}"
    assert failed_claims(TRAIN, 1, [(flags, "", "")]) == [set()]
    return path


# --- what the chapter says of it ---------------------------------------------------------------


def test_a_resume_on_other_ranks_keeps_the_curve(reference: Path, tmp_path: Path) -> None:
    """Stopped in the middle of an epoch, whose second batch must come next."""
    flags = f"--compare {reference} --out {tmp_path}"
    assert failed_claims(TRAIN, 2, [(f"{flags} --stop-at 7", "", "")]) == [set()]
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 7
    # the second time nothing is left to do, and that is no error
    again = [(f"{flags} --resume", "", "")] * 2
    assert failed_claims(TRAIN, 3, again) == [set()] * 2


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


def test_neighbouring_seeds_do_not_share_their_shuffles() -> None:
    """With `seed + epoch` the second epoch of seed 0 would be the first one of seed 1."""
    orders = []
    for seed, epoch in itertools.product(range(3), range(3)):
        sampler = trainer.ShareOfBatch(1000, 100, 0, 1, seed)
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert all(a != b for a, b in itertools.combinations(orders, 2))


def test_the_learning_rate_rises_to_its_peak_and_falls_to_a_tenth() -> None:
    rates = [trainer.learning_rate(step, warmup=4, steps=20) for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert all(a > b for a, b in itertools.pairwise(rates[4:]))
    assert trainer.learning_rate(20, 4, 20) == pytest.approx(0.1)


def test_the_model_cannot_see_what_it_predicts_and_knows_where_tokens_stand() -> None:
    torch.manual_seed(0)
    model = trainer.ByteLlama(width=16, layers=2, heads=2, context=8)
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


def test_losses_that_are_no_numbers_are_not_those_of_the_file(tmp_path: Path) -> None:
    golden = tmp_path / "golden.json"
    golden.write_text(json.dumps({"recipe": {}, "losses": [3.0, 2.0], "norms": [1.0, 1.0]}))
    assert trainer.compare(golden, {}, [3.0, 2.0], [1.0, 1.0]) == [True, True]
    assert trainer.compare(golden, {}, [3.0, math.nan], [1.0, 1.0]) == [False, True]


# --- other numbers of ranks, other seeds -------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize("world_size", [1, 2, 4, 5])
def test_every_world_size_gives_the_golden_losses(run: Run, world_size: int) -> None:
    """Five does not divide the batch of 12: two ranks have three windows, three have two."""
    script = TRAIN.relative_to(warm.ROOT)
    result = run(f"torchrun --nproc_per_node={world_size} {script} {GOLDEN}")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(f"{world_size} rank")
    assert result.stdout.endswith("all 5 checks ok\n")


@pytest.mark.full
def test_losses_do_not_depend_on_the_world_size(text: Path) -> None:
    """Nor on ranks that have no window at all: 3 of 4 in the last case."""
    kinds = ("--seed 1 --batch 9", "--seed 2 --batch 9", "--seed 3 --batch 1")
    files = [text.with_name(f"{number}.json") for number in range(len(kinds))]
    runs = list(zip(kinds, files, strict=True))
    one = [(f"--data {text} {SHAPE} {kind} --json {file}", "", "") for kind, file in runs]
    assert failed_claims(TRAIN, 1, one) == [set()] * len(kinds)
    for world_size in (2, 4):
        cases = [(f"--compare {file}", "", "") for file in files]
        assert failed_claims(TRAIN, world_size, cases) == [set()] * len(kinds)


# --- broken on purpose -------------------------------------------------------------------------

MUTANTS = [
    # no gradient is averaged
    ("train_step(ddp_model, ", "train_step(model, "),
    # a sum for a mean: clipping and AdamW hide it from the losses, the norms show it
    ("(loss * dist.get_world_size()).backward()", "(loss * dist.get_world_size() ** 2).backward()"),
    # the mean of the ranks' means, where shares differ
    ("(batch * logits.shape[1])", "(len(window) * logits.shape[1] * dist.get_world_size())"),
    # each epoch deals the same batches
    ("set_epoch(step // per_epoch, ", "set_epoch(0, "),
    # all ranks take the same share
    ("whole[self.rank :: self.world_size]", "whole[: len(whole) // self.world_size]"),
    # evaluation counts each window once per rank
    ("windows[dist.get_rank() :: dist.get_world_size()]", "windows"),
    # the reported loss is rank 0's part of it
    ("dist.all_reduce(pooled)\n        losses", "losses"),
    ("        schedule.step()\n", ""),
]


@pytest.mark.full
def test_mutants_are_caught(reference: Path) -> None:
    """The golden file must show it. Five ranks have shares of two sizes."""
    cases = [(f"--compare {reference}", *mutant) for mutant in MUTANTS]
    failed = failed_claims(TRAIN, 5, [(cases[0][0], "", ""), *cases])
    assert failed[0] == set()
    assert [right for (right, _), lines in zip(MUTANTS, failed[1:], strict=True) if not lines] == []
    assert any("norm" in line for line in failed[2]), "a sum for a mean shows in the norms"


@pytest.mark.full
def test_a_resume_that_forgets_is_caught(reference: Path, tmp_path: Path) -> None:
    restored = [
        ('model.load_state_dict(state["model"])', "pass"),
        ('optimizer.load_state_dict(state["optimizer"])', "pass"),
        ('schedule.load_state_dict(state["schedule"])', "pass"),
        ("done=step % per_epoch", "done=0"),
    ]
    first = tmp_path / "first"
    flags = f"--compare {reference} --out"
    assert failed_claims(TRAIN, 2, [(f"{flags} {first} --stop-at 7", "", "")]) == [set()]
    cases = []
    for number, mutant in enumerate(restored):
        folder = shutil.copytree(first, tmp_path / f"{number}")
        cases.append((f"{flags} {folder} --resume", *mutant))
    failed = failed_claims(TRAIN, 2, cases)
    assert all(failed), failed


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--heads 5", "--width 128 is no multiple of 2 x --heads 5"),
        ("--resume", "type --out DIR"),
        ("--out OUT", "type --resume to go on"),
    ],
)
def test_flags_that_would_mislead(
    flags: str,
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "checkpoint.pt").touch()
    monkeypatch.setattr(sys, "argv", ["x", *flags.replace("OUT", str(tmp_path)).split()])
    with pytest.raises(SystemExit) as end:
        trainer.parse_args()
    assert end.value.code == 2
    assert says in capsys.readouterr().err


def why_it_stops(lines: list[str]) -> list[str]:
    """In a rank: what each command's run says as it ends; RANK in it is this rank's number."""
    module = warm.load("chapter3_trainer", TRAIN)
    said: list[str] = []

    def stop(message: str) -> None:
        said.append(message)
        sys.exit(2)

    vars(module)["stop"] = stop
    for line in lines:
        sys.argv[:] = ["x", *line.replace("RANK", str(dist.get_rank())).split()]
        with pytest.raises(SystemExit):
            module.run(module.parse_args(), torch.device("cpu"))
    return said


@pytest.mark.full
def test_checkpoints_that_do_not_fit(text: Path, tmp_path: Path) -> None:
    """Of another recipe, or of another step than the others': every rank says it, none hangs."""
    flags = f"--data {text} {SHAPE}"
    cases = [(f"{flags} --out {tmp_path}/{n} --stop-at {n + 1}", "", "") for n in range(2)]
    failed_claims(TRAIN, 1, cases)
    before = [(tmp_path / f"{n}" / "checkpoint.pt").read_bytes() for n in range(2)]
    lines = [
        f"{flags} --out {tmp_path}/0 --resume --width 32",
        f"{flags} --out {tmp_path}/0 --resume --data {warm.ROOT}/LICENSE",
        f"{flags} --out {tmp_path}/RANK --resume",
        f"{flags} --data {tmp_path}/nothing",
    ]
    for said in warm.fork_ranks(why_it_stops, 2, lines):
        assert "has width 24, this run 32: type another --out" in said[0]
        assert "has data " in said[1]
        assert said[2] == "ranks go on from steps [1, 2]: type an --out that all nodes share"
        assert "give a text file with --data FILE" in said[3]
    assert [(tmp_path / f"{n}" / "checkpoint.pt").read_bytes() for n in range(2)] == before


@pytest.mark.full
def test_a_port_in_use_is_named_by_torchrun_and_another_one_helps(
    checkout: Path, text: Path
) -> None:
    """The port is torchrun's business, before the script starts; the README says what to type."""
    line = f"{TRAIN} --data {text} {SHAPE} --steps 2"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = f"torchrun --nproc_per_node=1 --master_port={port} {line}"
        result = warm.run_cold(book.parse_command(command), checkout, 120)
        assert result.returncode != 0
        assert "EADDRINUSE" in result.stderr
        assert str(port) in result.stderr
        command = f"torchrun --standalone --nproc_per_node=1 {line}"
        result = warm.run_cold(book.parse_command(command), checkout, 120)
        assert result.returncode == 0, result.stderr


# --- beside Accelerate -------------------------------------------------------------------------


@pytest.mark.full
def test_accelerate_trains_the_same_weights_on_three_ranks(text: Path) -> None:
    """And would not if it stepped the schedule more than once for an update."""
    flags = f"--data {text} --width 32 --context 24 --steps 8"
    once = "schedule.step()\n        optimizer.zero_grad()"
    mutant = (once, f"schedule.step()\n        {once}")
    right, wrong = failed_claims(ACCELERATE, 3, [(flags, "", ""), (flags, *mutant)])
    assert right == set()
    assert any("Accelerate's" in line for line in wrong)
