"""The trainer: one loss curve on any number of ranks and by either strategy, through any resume."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import slurm
import warm
from book import CHAPTERS

CODE = f"{CHAPTERS[7]}/code"
TRAIN = (
    f"{CODE}/train.py --steps 8 --width 96 --layers 2 --heads 4 --kv-heads 2 --hidden 64 --batch 5"
)
Run = Callable[..., warm.Result]


@pytest.fixture
def train(run: Run, checkout: Path, tmp_path: Path) -> Callable[..., list[float]]:
    """Run the trainer on some ranks and return its losses."""

    def losses(ranks: int, *flags: str) -> list[float]:
        path = tmp_path / "losses.json"
        path.unlink(missing_ok=True)
        words = " ".join([*flags, f"--json {path}"])
        result = run(f"torchrun --nproc_per_node={ranks} {TRAIN} {words}")
        assert result.returncode == 0, result.stdout + result.stderr
        return json.loads(path.read_text())["losses"]

    return losses


def close(one: list[float], other: list[float], bound: float = 1e-5) -> bool:
    return (
        len(one) == len(other) and max(abs(a - b) for a, b in zip(one, other, strict=True)) <= bound
    )


def test_one_curve_for_one_process_ddp_and_fsdp(train: Callable[..., list[float]]) -> None:
    alone = train(1)
    assert len(set(alone)) == 8
    assert close(alone, train(2, "--strategy fsdp"))
    assert close(alone, train(3, "--strategy ddp"))  # shares of 2, 2 and 1 windows


@pytest.mark.full
@pytest.mark.parametrize(("ranks", "strategy"), [(1, "fsdp"), (2, "ddp"), (3, "fsdp"), (4, "fsdp")])
def test_one_curve_everywhere(train: Callable[..., list[float]], ranks: int, strategy: str) -> None:
    assert close(
        train(1, "--seed 20260101"), train(ranks, f"--strategy {strategy} --seed 20260101")
    )


@pytest.mark.full
@pytest.mark.parametrize(
    ("first", "then"),
    [((2, "fsdp"), (3, "ddp")), ((1, "ddp"), (2, "fsdp")), ((3, "fsdp"), (2, "fsdp"))],
)
def test_resume_on_other_ranks_by_another_strategy(
    train: Callable[..., list[float]], tmp_path: Path, first: tuple[int, str], then: tuple[int, str]
) -> None:
    whole = train(1)
    out = tmp_path / "out"
    train(first[0], f"--strategy {first[1]} --out {out} --save-every 3")
    shutil.rmtree(out / "step-000008")  # as if it had been killed after step 6
    (out / "step-000007.draft").mkdir()  # in the middle of a save
    assert {p.name for p in out.iterdir()} == {"step-000003", "step-000006", "step-000007.draft"}
    assert close(whole, train(then[0], f"--strategy {then[1]} --out {out} --resume"))


@pytest.mark.full
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--batch 1", "2 ranks, but --batch 1"),
        ("--batch 5000", "windows: type a smaller one"),
        ("--heads 5", "--width must divide"),
        ("--resume", "type --out DIR"),
        ("--data runs/none --corpus none.txt", "nor --corpus none.txt is there"),
        ("--context 100000", "type a smaller --context"),
    ],
)
def test_bad_input(run: Run, flags: str, said: str) -> None:
    result = run(f"torchrun --nproc_per_node=2 {CODE}/train.py {flags}")
    assert result.returncode != 0
    assert said in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.full
def test_checkpoints_of_another_run(run: Run, tmp_path: Path) -> None:
    save = f"torchrun --nproc_per_node=2 {TRAIN} --out {tmp_path}"
    assert run(save).returncode == 0
    again = run(save)
    assert "type --resume to go on, or another --out" in again.stderr
    other = run(f"{save} --resume --lr 1e-3")
    assert re.search(r"step-000008 has lr 0.003, this run 0.001", other.stderr), other.stderr
    assert (tmp_path / "step-000008" / ".metadata").is_file()


MUTANTS = {
    "a mean of means": ("(args.batch * args.context)", "(len(window) * args.context)"),
    "a sum for the mean": ("(loss * dist.get_world_size())", "(loss * dist.get_world_size() ** 2)"),
    "every rank on rank 0's share": ("args.batch, rank, world_size", "args.batch, 0, world_size"),
}


@pytest.mark.full
@pytest.mark.parametrize("name", MUTANTS)
def test_mutants(
    train: Callable[..., list[float]], run: Run, checkout: Path, tmp_path: Path, name: str
) -> None:
    script = checkout / CODE / "train.py"
    text = script.read_text()
    old, new = MUTANTS[name]
    assert text.count(old) == 1
    right = train(1)
    script.write_text(text.replace(old, new))
    try:  # its own checks may find it too
        run(f"torchrun --nproc_per_node=3 {TRAIN} --json {tmp_path}/wrong.json")
    finally:
        script.write_text(text)
    assert not close(right, json.loads((tmp_path / "wrong.json").read_text())["losses"])


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[slurm.Cluster]:
    with slurm.cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.mark.full
def test_slurm_job_of_two_nodes(cluster: slurm.Cluster, checkout: Path) -> None:
    flags = TRAIN.split()[1:]
    job = cluster.run(
        "sbatch", "--parsable", "--time=5", "--cpus-per-task=1", f"{CODE}/slurm/train.sbatch",
        *flags, "--device", "cpu", "--strategy", "fsdp", cwd=checkout,
    )  # fmt: skip
    assert job.returncode == 0, job.stderr
    number = job.stdout.strip()
    ended = cluster.wait(number, slurm.ENDED, timeout=180)
    log = (checkout / f"book-model-{number}.log").read_text()
    assert ended["JobState"] == "COMPLETED", log
    assert "2 ranks on cpu, fsdp" in log
    assert (checkout / f"runs/book-model-{number}/step-000008/.metadata").is_file()
