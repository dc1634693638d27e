"""The trainer on shards: one process's losses, however cut; whole checkpoints; SIGTERM; Slurm."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import book
import checks
import pytest
import slurm
import torch
import warm
from mutants import failed_claims
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.utils._python_dispatch import TorchDispatchMode

CODE = Path("chapter4-scaling-with-fully-sharded-data-parallel-fsdp/code")
NAME = "train_fsdp2.py"
SCRIPT = warm.ROOT / CODE / NAME
GOLDEN = "--compare chapter3-distributed-training-with-pytorch-ddp/code/golden.json"
Run = Callable[..., warm.Result]

script = warm.load("chapter4_trainer", SCRIPT)


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

CHOICES = [  # four micro-batches: on four ranks, which have three windows each, one of them is empty
    "",
    "--checkpoint-activations every --accumulate 4",
    "--checkpoint-activations second --accumulate 4 --reduce last",
    "--checkpoint-activations selective --offload --accumulate 2 --reduce last",
    "--dtype bf16 --accumulate 2 --reduce last",
]


@pytest.mark.full
@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_every_world_size_gives_the_golden_losses(world_size: int) -> None:
    cases = [(f"{GOLDEN} {choice}", "", "") for choice in CHOICES]
    assert failed_claims(SCRIPT, world_size, cases) == [set()] * len(cases)


class Reads(TorchDispatchMode):
    """Counts values that the host asks a tensor for: on a GPU it would wait for them."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.count += function == torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def reads_in_rank() -> list[int]:
    shape: dict[str, Any] = {"width": 24, "layers": 2, "heads": 2, "context": 16, "batch": 8}
    shape |= {"dropout": 0.1, "seed": 0, "dtype": "fp32", "offload": False, "compile": False}
    shape |= {"checkpoint_activations": "selective", "accumulate": 2, "reduce": "last", "clip": 1.0}
    args: Any = SimpleNamespace(**shape)
    model = script.shard_model(args, torch.device("cpu"))
    optimizer = torch.optim.SGD(model.parameters())  # AdamW reads its steps, which lie on the host
    window = torch.zeros(4, args.context + 1, dtype=torch.long)
    with Reads() as in_step:
        loss, _ = script.update(model, optimizer, window, args)
    with Reads() as after:
        loss.item()
    return [in_step.count, after.count]


@pytest.mark.full
def test_the_host_never_waits_in_a_step() -> None:
    assert warm.fork_ranks(reads_in_rank, 2) == [[0, 1]] * 2


@pytest.mark.full
def test_compiled_blocks_give_the_golden_losses(run: Run) -> None:
    passes(run, 1, f"{GOLDEN} --compile --checkpoint-activations every")


@pytest.mark.full
def test_more_ranks_than_windows_still_train_as_one(run: Run) -> None:
    ends = []
    for world_size in (1, 3):
        flags = "--data LICENSE --context 16 --batch 2 --width 24 --layers 1 --heads 2"
        out = passes(run, world_size, flags).stdout
        ends.append([line for line in out.splitlines() if line.startswith("held out")])
    assert ends[0] == ends[1]


MUTANTS = [  # flags; a piece of the source, what it becomes; the claim that must fail
    ("", "(loss * dist.get_world_size()).backward()", "loss.backward()", "norm / the file's"),
    ("", "learning_rate(step, args.warmup", "learning_rate(0, args.warmup", "the file's"),
    ("", "dist.all_reduce(pooled)\n        *latest", "*latest", "loss - the file's"),
    # evaluation counts each window once per rank
    ("", "window = whole[dist.get_rank() :: dist.get_world_size()]", "window = whole", "seen twice"),
    # a mean of micro-batches' means, and steps that see only the first or the last of them
    ("--accumulate 2", "part) / (args.batch * args.context)", "part) / part[:, 1:].numel()",
     "norm / the file's"),
    ("--accumulate 2 --reduce last", "sync(number == len(parts))", "sync(number == 1)",
     "loss - the file's"),
    ("--accumulate 2", "window.tensor_split(args.accumulate)", "window.tensor_split(2)[:1] * 2",
     "loss - the file's"),
    # nothing is put off
    ("--accumulate 2 --reduce last", "sync(number == len(parts))", "sync(True)", "whole gradients"),
]  # fmt: skip


@pytest.mark.full
def test_mutants_are_caught() -> None:
    found = failed_claims(
        SCRIPT, 3, [(f"{GOLDEN} --stop-at 8 {m[0]}", m[1], m[2]) for m in MUTANTS]
    )
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
        "        dcp.save(state",
        "        if notes['step'] == 8 and dist.get_rank() == 1:\n"
        f"            os.fsync = lambda _: {KILL}\n"
        "        dcp.save(state",
    ),
    "rank 0, with .metadata half written": (
        "        dcp.save(state",
        "        if notes['step'] == 8 and dist.get_rank() == 0:\n            import pickle\n"
        f"            pickle.dump = lambda _, file: (file.write(b'half'), file.flush(), {KILL})\n"
        "        dcp.save(state",
    ),
    "rank 0, before the name": (
        "            draft.rename(target)",
        f"            if notes['step'] == 8:\n                {KILL}\n            draft.rename(target)",
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


def test_one_rank_is_told_to_stop_and_all_save(run: Run, checkout: Path, tmp_path: Path) -> None:
    """SIGTERM in step 5, looked at after step 8: saved, exit code 0, and the curve goes on."""
    right = "        step += 1\n        saving"
    source = SCRIPT.read_text()
    assert source.count(right) == 1
    told = "os.kill(os.getpid(), signal.SIGTERM)"
    mutant = checkout / CODE / f"told_{NAME}"
    mutant.write_text(
        source.replace(right, f"        if step == 4 and rank == 1:\n            {told}\n{right}")
    )
    flags = f"{GOLDEN} --out {tmp_path} --log-every 4"
    result = run(torchrun(2, flags, mutant.name), timeout=60)
    mutant.unlink()
    assert result.returncode == 0, result.stderr
    assert "told to stop  after step 8, saved" in result.stdout
    assert [path.name for path in script.complete(tmp_path)] == ["step-000008"]
    resumes(run, 3, tmp_path, 8)


LIMIT = "resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, 5_000))"  # bytes of a file
FULL = {  # the disk of a rank that has no room for step 8
    "rank 1, for its shard": (
        '    said = [""]\n    try:',
        f"    if notes['step'] == 8 and dist.get_rank() == 1:\n        {LIMIT}\n"
        '    said = [""]\n    try:',
    ),
    "rank 0, for the notes": (
        '            (draft / "notes.json").write_text(',
        f"            if notes['step'] == 8:\n                {LIMIT}\n"
        "                notes['long'] = 'x' * 5_000\n"
        '            (draft / "notes.json").write_text(',
    ),
}


@pytest.mark.full
@pytest.mark.parametrize("disk", FULL)
def test_a_full_disk_is_one_line_and_leaves_the_checkpoint_before(
    run: Run, checkout: Path, tmp_path: Path, disk: str
) -> None:
    right, wrong = FULL[disk]
    source = SCRIPT.read_text()
    assert source.count(right) == 1
    mutant = checkout / CODE / f"full_{NAME}"
    mutant.write_text(source.replace(right, wrong))
    result = run(torchrun(2, f"{GOLDEN} --out {tmp_path} --save-every 4", mutant.name), timeout=60)
    mutant.unlink()
    assert result.returncode not in (0, warm.TIMED_OUT)
    said = [line for line in result.stderr.splitlines() if "cannot save to" in line]
    assert len(said) == 2, result.stderr
    assert f"(rank {disk[5]}: " in said[0]
    assert said[0].endswith("step-000004 is whole")
    assert [path.name for path in script.complete(tmp_path)] == ["step-000004"]
    resumes(run, 3, tmp_path, 4)


def test_a_disk_that_is_too_small_is_one_line_before_training(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    """Three checkpoints, less what is there already."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=35 * 10**6))
    with pytest.raises(SystemExit) as end:
        script.refuse_small_disk(tmp_path, 12 * 10**6)
    assert end.value.code == 2
    assert capsys.readouterr().err == f"--out {tmp_path} has 33 MiB free, checkpoints want 34\n"
    (tmp_path / "step-000004").mkdir()
    script.refuse_small_disk(tmp_path, 12 * 10**6)


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
        ("--device abacus", "2 ranks, but 0 GPUs here: type --device cpu"),
        ("--out OUT --resume", "has width 64, this run 128: type another --out"),
        ("--data LICENSE", "bytes, this run needs"),
    ],
)
def test_bad_input_to_two_ranks(run: Run, out: Path, flags: str, says: str) -> None:
    result = run(torchrun(2, flags.replace("OUT", str(out))), timeout=30)
    assert result.returncode not in (0, warm.TIMED_OUT)
    assert {says in line for line in result.stderr.splitlines()} == {True}, result.stderr


# --- two nodes ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[slurm.Cluster]:
    with slurm.cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.mark.full
def test_slurm_job_of_two_nodes(cluster: slurm.Cluster, checkout: Path) -> None:
    job = cluster.run(
        "sbatch", "--parsable", "--time=5", "--gpus-per-node=1", "--cpus-per-task=1",
        f"{CODE}/launch/fsdp.sbatch", "--device", "cpu", *GOLDEN.split(), cwd=checkout,
    )  # fmt: skip
    assert job.returncode == 0, job.stderr
    number = job.stdout.strip()
    ended = cluster.wait(number, slurm.ENDED, timeout=180)
    log = (checkout / f"fsdp-{number}.log").read_text()
    assert ended["JobState"] == "COMPLETED", log
    assert "2 ranks on cpu: 133,440 parameters" in log
    assert "all 4 checks ok" in log
    (step,) = script.complete(checkout / f"runs/fsdp-{number}")
    assert {path.name for path in step.glob("*.distcp")} == {"__0_0.distcp", "__1_0.distcp"}
