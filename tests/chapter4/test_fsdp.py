"""FSDP2 with activation checkpointing: one process's training, exact accounts, whole checkpoints."""

import datetime
import hashlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import book
import checks
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import warm
from mutants import failed_claims
from torch import nn
from torch.distributed import DeviceMesh
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

CODE = Path("chapter4-scaling-with-fully-sharded-data-parallel-fsdp/code")
NAME = "fsdp_checkpointing.py"
SCRIPT = warm.ROOT / CODE / NAME
GOLDEN = "--compare chapter3-distributed-training-with-pytorch-ddp/code/golden.json"
Run = Callable[..., warm.Result]

script = warm.load("chapter4_script", SCRIPT)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """A single rank would take all cores, and wait for the ones that others use."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def torchrun(world_size: int, flags: str, name: str = NAME) -> str:
    return f"torchrun --nproc_per_node={world_size} {CODE}/{name} {flags}"


def passes(run: Run, world_size: int, flags: str) -> warm.Result:
    command = torchrun(world_size, flags)
    result, parsed = run(command), book.parse_command(command)
    problems = checks.evidence(parsed, result)
    assert not problems, checks.report(parsed, result, problems)
    return result


# --- the same training as one process ----------------------------------------------------------

SHAPE: dict[str, float] = {"width": 24, "layers": 3, "heads": 2, "context": 16}
SHAPE |= {"batch": 7, "dropout": 0.0, "seed": 3}


def gradients_in_rank(mode: str) -> float:
    """Largest difference of a gradient from one process's on the whole batch, relative to it."""
    args: Any = SimpleNamespace(**SHAPE)
    draw = torch.Generator().manual_seed(0)
    window = torch.randint(256, (args.batch, args.context + 1), generator=draw)

    def backward(model: nn.Module, window: torch.Tensor, scale: int) -> None:
        logits = model(window[:, :-1]).flatten(0, 1)
        loss = F.cross_entropy(logits, window[:, 1:].flatten(), reduction="sum")
        (loss * scale / (args.batch * args.context)).backward()

    model = script.build_sharded(args, mode, torch.device("cpu"))
    backward(model, window[dist.get_rank() :: dist.get_world_size()], dist.get_world_size())
    torch.manual_seed(args.seed)
    reference = script.ByteLlama(args.width, args.layers, args.heads, args.context)
    backward(reference, window, 1)
    pairs = zip(model.parameters(), reference.parameters(), strict=True)
    found = [(p.grad.full_tensor(), q.grad) for p, q in pairs]
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in found)


@pytest.mark.parametrize(
    "world_size", [2, *(pytest.param(n, marks=pytest.mark.full) for n in (1, 3, 4))]
)
def test_gradients_are_one_processs_mean(world_size: int) -> None:
    """Seven windows: on two, three and four ranks the shares differ. A sum would be n times off."""
    for mode in script.MODES:
        assert max(warm.fork_ranks(gradients_in_rank, world_size, mode)) < 1e-5


@pytest.mark.full
@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_every_world_size_gives_the_golden_losses(world_size: int) -> None:
    cases = [(f"{GOLDEN} --checkpoint-activations {mode}", "", "") for mode in script.MODES]
    assert failed_claims(SCRIPT, world_size, cases) == [set()] * len(cases)


@pytest.mark.full
@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_accounts_hold_for_other_shapes(world_size: int) -> None:
    """Rows that do not divide, a rank with one window, dropout, one block, a head of odd size."""
    shapes = (
        "--width 60 --layers 3 --heads 6 --context 40 --batch 7 --dropout 0.5 --seed 20260101",
        "--width 24 --layers 1 --heads 2 --context 24 --batch 4",
    )
    cases = [(f"--measure --data LICENSE --steps 12 {shape}", "", "") for shape in shapes]
    assert failed_claims(SCRIPT, world_size, cases) == [set()] * len(cases)


@pytest.mark.full
def test_more_ranks_than_windows_still_train_as_one(run: Run) -> None:
    ends = []
    for world_size in (1, 3):
        flags = "--data LICENSE --context 16 --batch 2 --width 24 --layers 1 --heads 2"
        out = passes(run, world_size, flags).stdout
        ends.append([line for line in out.splitlines() if line.startswith("held out")])
    assert ends[0] == ends[1]


MUTANTS = [  # flags; a piece of the source, what it becomes; the claim that must fail
    (GOLDEN, "(loss * dist.get_world_size()).backward()", "loss.backward()", "norm / the file's"),
    (GOLDEN, "learning_rate(step, args.warmup", "learning_rate(0, args.warmup", "the file's"),
    (GOLDEN, "dist.all_reduce(pooled)\n        losses +=", "losses +=", "loss - the file's"),
    # evaluation counts each window once per rank
    (GOLDEN, "window = whole[dist.get_rank() :: dist.get_world_size()]", "window = whole", "seen twice"),
    # other masks when a block runs again: no error, another gradient
    ("--measure --dropout 0.1", "checkpoint_wrapper(block)",
     "checkpoint_wrapper(block, preserve_rng_state=False)", "max |gradient"),
    # blocks that keep their weights, or are no groups of their own
    ("--measure", "fully_shard(model.blocks[i], mesh=mesh)",
     "fully_shard(model.blocks[i], mesh=mesh, reshard_after_forward=False)", "error of weights"),
    ("--measure", "        fully_shard(model.blocks[i], mesh=mesh)", "        pass",
     "error of weights"),
    # each of these is a mistake in the model that predicts
    ("--measure", "-(-len(p) // world_size)", "len(p) // world_size", "error of weights"),
    ("--measure", "(0 if args.dropout else 2 * width * hidden)", "0", "error of the FLOPs"),
    ("--measure", "10 * args.context * width", "8 * args.context * width", "error of the FLOPs"),
    ("--measure", "floats = 2 * (3 * width + 1)", "floats = 2 * (2 * width + 1)",
     "error of the activations"),
]  # fmt: skip


@pytest.mark.full
def test_mutants_are_caught() -> None:
    """Three ranks, so that rows do not divide."""
    small = "--data LICENSE --width 64 --layers 2 --heads 2 --context 16 --batch 6 --steps 2"
    cases = [
        (flags if "compare" in flags else f"{flags} {small}", right, wrong)
        for flags, right, wrong, _ in MUTANTS
    ]
    found = failed_claims(SCRIPT, 3, cases)
    for (_, right, _, claim), failed in zip(MUTANTS, found, strict=True):
        assert any(claim in line for line in failed), f"{right}: {failed}"


# --- checkpoints -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks leave that stop at step 12 of 20: steps 8 and 12."""
    out = tmp_path_factory.mktemp("saved") / "out"
    flags = f"{GOLDEN} --checkpoint-activations every --out {out} --save-every 4 --stop-at 12"
    result = warm.run(torchrun(2, flags), checkout, 60)
    assert result.returncode == 0, result.stderr
    return out


@pytest.fixture
def out(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "out"))


def resumes(run: Run, world_size: int, out: Path, step: int, more: str = "") -> None:
    """The curve goes on as if nothing had happened."""
    result = passes(run, world_size, f"{GOLDEN} --out {out} --resume {more}")
    assert f"resuming      at step {step}, saved by 2 ranks" in result.stdout
    assert "tensors with other bits than were saved = 0 <= 0  ok" in result.stdout


def test_two_ranks_save_and_three_go_on(run: Run, out: Path) -> None:
    """Bit for bit, by DCP's own converter too: weights that one process reads have these digests."""
    assert [path.name for path in script.complete(out)] == ["step-000008", "step-000012"]
    dcp_to_torch_save(out / "step-000012", out / "whole.pt")
    whole = torch.load(out / "whole.pt", weights_only=True)
    notes = json.loads((out / "step-000012" / "notes.json").read_text())
    for name, tensor in whole["model"].items():
        digest = hashlib.sha256(tensor.numpy()).hexdigest()
        assert notes["digests"].pop(f"model.{name}") == digest, name
    assert all(name.startswith("optimizer.state.") for name in notes["digests"])
    resumes(run, 3, out, 12, "--checkpoint-activations second")


def test_a_folder_without_metadata_is_never_resumed(run: Run, out: Path) -> None:
    """And it does not hinder the run when that comes to the same step."""
    (out / "step-000012" / ".metadata").unlink()
    resumes(run, 1, out, 8, "--save-every 4")
    assert [path.name for path in script.complete(out)] == ["step-000016", "step-000020"]


@pytest.mark.full
@pytest.mark.parametrize("world_size", [1, 4])
def test_any_number_of_ranks_goes_on(run: Run, out: Path, world_size: int) -> None:
    resumes(run, world_size, out, 12)
    result = passes(run, world_size, f"{GOLDEN} --out {out} --resume")
    assert "resuming      at step 20" in result.stdout, "nothing is left to do: no error"


KILL = "os.kill(os.getpid(), 9)"
DEATHS = {  # in the save of step 8: what becomes what
    "rank 1, at the end of its file": (
        "    dcp.save(state",
        f"    if notes['step'] == 8 and dist.get_rank() == 1:\n        os.fsync = lambda _: {KILL}\n"
        "    dcp.save(state",
    ),
    "rank 0, with .metadata half written": (
        "    dcp.save(state",
        "    if notes['step'] == 8 and dist.get_rank() == 0:\n        import pickle\n"
        f"        pickle.dump = lambda _, file: (file.write(b'half'), file.flush(), {KILL})\n"
        "    dcp.save(state",
    ),
    "rank 0, before the name": (
        "        draft.rename(target)",
        f"        if notes['step'] == 8:\n            {KILL}\n        draft.rename(target)",
    ),
}


@pytest.mark.full
@pytest.mark.parametrize("death", DEATHS)
def test_sigkill_in_mid_save_leaves_the_one_before(
    run: Run, checkout: Path, tmp_path: Path, death: str
) -> None:
    right, wrong = DEATHS[death]
    source = SCRIPT.read_text()
    assert source.count(right) == 1
    mutant = checkout / CODE / f"killed_{NAME}"
    mutant.write_text(source.replace(right, wrong))
    flags = f"{GOLDEN} --out {tmp_path} --save-every 4"
    result = run(torchrun(2, flags, mutant.name), timeout=60)
    mutant.unlink()
    assert result.returncode not in (0, warm.TIMED_OUT)
    assert (tmp_path / "draft").is_dir(), "it died somewhere else"
    assert [path.name for path in script.complete(tmp_path)] == ["step-000004"]
    resumes(run, 3, tmp_path, 4, "--save-every 4")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000016", "step-000020"]


@pytest.mark.full
def test_sigkill_while_the_oldest_is_deleted_loses_nothing_else(
    run: Run, checkout: Path, tmp_path: Path
) -> None:
    right = "shutil.rmtree(old.rename(draft))"
    source = SCRIPT.read_text()
    assert source.count(right) == 1
    mutant = checkout / CODE / f"killed_{NAME}"
    mutant.write_text(source.replace(right, f"old.rename(draft), {KILL}"))
    result = run(torchrun(2, f"{GOLDEN} --out {tmp_path} --save-every 4", mutant.name), timeout=60)
    mutant.unlink()
    assert result.returncode not in (0, warm.TIMED_OUT)
    assert [path.name for path in script.complete(tmp_path)] == ["step-000008", "step-000012"]
    resumes(run, 2, tmp_path, 12)


def flip_a_bit(folder: Path) -> None:
    file = folder / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def spoil_metadata(folder: Path) -> None:
    (folder / ".metadata").write_bytes(b"x")


def cut_off(folder: Path) -> None:
    file = folder / "__1_0.distcp"
    file.write_bytes(file.read_bytes()[:500_000])


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a shard is missing": (lambda f: (f / "__1_0.distcp").unlink(), "cannot load"),
    "a shard is cut off": (cut_off, "cannot load"),
    "a bit is flipped": (flip_a_bit, "is damaged, in "),
    ".metadata is no metadata": (spoil_metadata, "cannot load"),
}


@pytest.mark.full
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_one_line_before_training_starts(run: Run, out: Path, damage: str) -> None:
    do, says = DAMAGES[damage]
    do(out / "step-000012")
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    result = run(torchrun(2, f"{GOLDEN} --out {out} --resume --save-every 4"), timeout=60)
    assert result.returncode not in (0, warm.TIMED_OUT)
    assert [says in line for line in result.stderr.splitlines()].count(True) == 2, result.stderr
    assert "learning rate" not in result.stdout
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    (out / "step-000012").rename(out / "away")  # as the line says
    resumes(run, 2, out, 8)


# --- bad input ---------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("", "no launcher: type  torchrun --nproc_per_node=2"),
        ("--heads 3", "--width 128 is no multiple of 2 x --heads 3"),
        ("--resume", "type --out DIR"),
        ("--save-every 3", "type --out DIR"),
        ("--plot x.svg", "type --measure too"),
        ("--out OUT", "step-000012 is there: type --resume to go on"),
    ],
)
def test_bad_input_gets_one_line(run: Run, out: Path, flags: str, says: str) -> None:
    result = run(f"python {CODE}/{NAME} {flags.replace('OUT', str(out))}")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1, result.stderr
    assert says in result.stderr


@pytest.mark.full
@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--data no-such-file", "give a text file with --data FILE"),
        ("--batch 1 --measure", "type --batch 2"),
        ("--device abacus", "2 ranks, but 0 GPUs here: type --device cpu"),
        ("--out OUT --resume", "has width 64, this run 128: type another --out"),
        ("--data LICENSE", "bytes, this run needs"),
    ],
)
def test_bad_input_to_two_ranks(run: Run, out: Path, flags: str, says: str) -> None:
    result = run(torchrun(2, flags.replace("OUT", str(out))), timeout=30)
    assert result.returncode not in (0, warm.TIMED_OUT)
    assert {says in line for line in result.stderr.splitlines()} == {True}, result.stderr


# --- what comes wrong first (section 4.5) ------------------------------------------------------


def mistakes_in_rank() -> dict[str, Any]:
    """What the mistakes of section 4.5 print, or do without a word."""
    args: Any = SimpleNamespace(**SHAPE)
    device = torch.device("cpu")
    tokens = torch.randint(256, (2, args.context), generator=torch.Generator().manual_seed(0))

    def said(mistake: Callable[[], object]) -> str:
        try:
            mistake()
        except (RuntimeError, TypeError) as error:
            return f"{type(error).__name__}: {error}"
        return ""

    found: dict[str, Any] = {}
    torch.manual_seed(0)
    model = script.ByteLlama(args.width, args.layers, args.heads, args.context)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)  # too early
    fully_shard(model)
    losses = []
    for _ in range(2):
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    found["optimizer first"] = losses

    model = script.build_sharded(args, "none", device)
    F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    found["a norm"] = said(lambda: f"{norm:.3f}")
    found["outside forward"] = said(lambda: model.embed(tokens))
    stream = io.BytesIO()
    torch.save(model.state_dict(), stream)
    found["saved"] = len(stream.getvalue()) / sum(4 * p.numel() for p in model.parameters())
    with torch.no_grad():
        model(tokens)
    found["plain after forward"] = [
        name for name, p in model.named_parameters() if not isinstance(p, DTensor)
    ]
    return found


def uneven_in_rank() -> str:
    """Rank 1 evaluates one batch less than rank 0, then adds its losses up."""
    group = dist.new_group(timeout=datetime.timedelta(seconds=3))
    mesh = DeviceMesh.from_group(group, "cpu")
    model: Any = nn.Linear(64, 64)
    fully_shard(model, mesh=mesh)
    try:
        with torch.no_grad():
            for _ in range(3 - dist.get_rank()):
                model(torch.ones(4, 64))
                model.reshard()
        dist.all_reduce(torch.zeros(2), group=group)
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.full
def test_an_uneven_evaluation_hangs_until_the_timeout() -> None:
    for said in warm.fork_ranks(uneven_in_rank, 2):
        assert "Timed out waiting 3000ms for" in said or "Connection closed by peer" in said


def test_the_mistakes_of_the_text_do_what_it_says() -> None:
    for found in warm.fork_ranks(mistakes_in_rank, 2):
        first, second = found["optimizer first"]
        assert first == second, "it trains"
        assert found["a norm"] == (
            "TypeError: unsupported format string passed to DTensor.__format__"
        )
        assert found["outside forward"] == (
            "RuntimeError: aten.embedding.default got mixed torch.Tensor and DTensor, need to "
            "convert all torch.Tensor to DTensor before calling distributed operators!"
        )
        assert 0.5 <= found["saved"] < 0.7, "not half of it"
        assert found["plain after forward"] == ["embed.weight", "norm.weight", "head.weight"]


LEFT = """
import sys, torch
import torch.distributed as dist
from pathlib import Path
from torch import nn
from torch.distributed.fsdp import fully_shard

def train():
    model = nn.Linear(4, 4)
    if sys.argv[1] == "sharded":
        fully_shard(model)
    model(torch.ones(1, 4)).sum().backward()

dist.init_process_group("gloo")
train()
dist.barrier()
rank = dist.get_rank()
dist.destroy_process_group()
names = [(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()]
if rank == 0:
    print(sum("gloo" in name for name in names), "threads of gloo")
"""


@pytest.mark.full
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux to list threads")
@pytest.mark.parametrize("how", ["plain", "sharded"])
def test_after_fsdp_threads_of_gloo_outlive_the_group(tmp_path: Path, how: str) -> None:
    """So `main` leaves by os._exit. When this fails for "sharded", chapter 1's main will do again."""
    (tmp_path / "left.py").write_text(LEFT)
    command = book.parse_command(f"torchrun --standalone --nproc_per_node=2 left.py {how}")
    result = warm.run_cold(command, tmp_path, 120)
    assert ("0 threads of gloo" in result.stdout) is (how == "plain"), result
