"""The book's own job scripts, on the real two-node Slurm that local_slurm.sh starts: nodes die in it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import slurm
import torch
import warm
from book import CHAPTERS
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

CODE = f"{CHAPTERS[7]}/code"
LOCAL = f"{CODE}/slurm/local_slurm.sh"
TRAIN, SWEEP, DEEPSPEED = (f"{CODE}/slurm/{n}.sbatch" for n in ("train", "sweep", "deepspeed"))
TINY = "--device cpu --width 96 --layers 2 --heads 4 --kv-heads 2 --hidden 64 --batch 6"
LONG = f"{TINY} --steps 120 --save-every 10 --log-every 1"
FIRST, SECOND = slurm.NODES
full = pytest.mark.full


@pytest.fixture(scope="module")
def cluster(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[slurm.Cluster]:
    """What a reader types: local_slurm.sh COMMAND; here the command waits for the tests."""
    said = tmp_path_factory.mktemp("slurm") / "environment.json"
    write = (
        f"import json, os, pathlib; pathlib.Path('{said}.draft').write_text(json.dumps(dict(os.environ)));"
        f"os.rename('{said}.draft', '{said}'); import signal; signal.pause()"
    )
    process = subprocess.Popen(
        ["bash", LOCAL, "python", "-c", write],
        cwd=checkout,
        env=warm.environment() | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
    )
    try:
        while not said.exists():
            try:
                _, problem = process.communicate(timeout=0.1)
            except subprocess.TimeoutExpired:
                continue
            if problem.startswith(b"needs Slurm"):
                pytest.skip(problem.decode().strip())
            raise AssertionError(problem.decode())
        variables = json.loads(said.read_text())
        running = slurm.Cluster(Path(variables["LOCAL_SLURM"]), variables)
        yield running
        (waiting,) = [p for p in running.mine() if write in p.cmdline()]
        waiting.send_signal(signal.SIGKILL)  # as if the command ended
        process.wait(30)
        assert running.mine() == []
        assert not running.folder.exists()
    finally:
        warm._kill_tree(process)


def submit(cluster: slurm.Cluster, checkout: Path, *words: str) -> str:
    """sbatch; the last of the words may be several flags."""
    last = words[-1].split()
    job = cluster.run("sbatch", "--parsable", *words[:-1], *last, cwd=checkout, timeout=200)
    assert job.returncode == 0, job.stderr
    return job.stdout.strip()


def log_of(checkout: Path, number: str) -> list[dict]:
    path = checkout / f"runs/book-model-{number}/log.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def wait_for_step(cluster: slurm.Cluster, checkout: Path, number: str, step: int) -> None:
    def reached() -> bool:
        return any(e["event"] == "save" and e["step"] >= step for e in log_of(checkout, number))

    slurm.wait_until(reached, cluster, timeout=90)


def start_again_soon(cluster: slurm.Cluster, number: str, seconds: int = 5) -> None:
    """Slurm leaves two minutes between two lives of a job, so that its nodes are done with the first.

    What is meant for the first life kills the second, since both have one number. A node that was
    down is told to end the first up to a minute after it has come back.
    """
    cluster.wait(number, {"PENDING"})
    idle = ["sinfo", "--noheader", "--partition=all", "--states=idle", "--format=%D"]

    def over() -> bool:
        left = {process.name() for process in cluster.mine()} & {"slurmstepd", "srun"}
        return not left and cluster.run(*idle, cwd=cluster.folder).stdout.strip() == "2"

    slurm.wait_until(over, cluster, timeout=90)
    start = f"StartTime=now+{seconds}seconds"
    cluster.run("scontrol", "update", f"job={number}", start, cwd=cluster.folder)


def kill_a_rank(cluster: slurm.Cluster) -> None:
    """The one on the second node."""
    ranks = [
        p for p in cluster.mine() if p.cmdline()[1:2] == ["-u"] and "/train.py" in p.cmdline()[2]
    ]
    (rank,) = [p for p in ranks if p.environ()["SLURMD_NODENAME"] == SECOND]
    rank.kill()


def finish(cluster: slurm.Cluster, checkout: Path, number: str, restarts: int) -> str:
    ended = cluster.wait(number, slurm.ENDED, timeout=120)
    said = (checkout / f"book-model-{number}.log").read_text()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", str(restarts)), said
    assert re.search(r"^all \d+ checks ok$", said, re.M), said
    return said


def state(folder: Path, scratch: Path) -> dict[str, torch.Tensor]:
    """All tensors of a distributed checkpoint: weights, moments, step counts."""
    dcp_to_torch_save(folder, scratch)
    found: dict[str, torch.Tensor] = {}

    def collect(value: object, name: str) -> None:
        if isinstance(value, torch.Tensor):
            found[name] = value
        elif isinstance(value, dict):
            for key, part in value.items():
                collect(part, f"{name}/{key}")

    collect(torch.load(scratch, weights_only=True), "")
    return found


@pytest.fixture(scope="module")
def undisturbed(
    checkout: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, torch.Tensor]:
    """What one torchrun of two ranks makes of LONG, without Slurm."""
    folder = tmp_path_factory.mktemp("undisturbed")
    command = f"torchrun --nproc_per_node=2 {CODE}/train.py {LONG} --out {folder}/out"
    result = warm.run(command, checkout)
    assert result.returncode == 0, result.stderr
    return state(folder / "out/step-000120", folder / "whole.pt")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return (
        len(one) > 20
        and one.keys() == other.keys()
        and all(torch.equal(one[name], other[name]) for name in one)
    )


# --- train.sbatch ------------------------------------------------------------------------------


def test_job_of_two_nodes(cluster: slurm.Cluster, checkout: Path) -> None:
    number = submit(cluster, checkout, TRAIN, f"{TINY} --steps 4 --dp-shard 2")
    said = finish(cluster, checkout, number, restarts=0)
    assert "2 ranks on cpu" in said
    (whole,) = (checkout / f"runs/book-model-{number}").glob("step-*")
    assert {path.name for path in whole.glob("*.distcp")} == {"__0_0.distcp", "__1_0.distcp"}


@full
def test_a_rank_dies_and_a_node(
    cluster: slurm.Cluster, checkout: Path, undisturbed: dict, tmp_path: Path
) -> None:
    """A rank dies, and the job puts itself back; then the batch script's node, and Slurm does."""
    number = submit(cluster, checkout, TRAIN, LONG)
    wait_for_step(cluster, checkout, number, 10)
    kill_a_rank(cluster)
    start_again_soon(cluster, number)
    wait_for_step(cluster, checkout, number, 40)
    cluster.run("bash", LOCAL, "--kill", FIRST, cwd=checkout)
    cluster.wait(number, {"PENDING"}, timeout=90)
    cluster.run("bash", LOCAL, "--revive", FIRST, cwd=checkout)
    start_again_soon(cluster, number, seconds=60)
    finish(cluster, checkout, number, restarts=2)
    starts = [event["step"] for event in log_of(checkout, number) if event["event"] == "start"]
    assert starts[0] == 0
    assert 10 <= starts[1] < 40 <= starts[2] < 120
    out = checkout / f"runs/book-model-{number}"
    assert same(state(out / "step-000120", tmp_path / "job.pt"), undisturbed)


@full
def test_told_to_stop_and_preempted(
    cluster: slurm.Cluster, checkout: Path, undisturbed: dict, tmp_path: Path
) -> None:
    """SIGUSR1 as --signal sends it, then a job of higher priority; loaders have processes of their own."""
    number = submit(cluster, checkout, TRAIN, f"{LONG} --workers 1")
    wait_for_step(cluster, checkout, number, 10)
    cluster.run("scancel", "--signal=USR1", number, cwd=checkout)
    start_again_soon(cluster, number)
    wait_for_step(cluster, checkout, number, 40)
    urgent = submit(
        cluster, checkout, "--partition=urgent", "--nodes=2", "--exclusive", "--wrap=true"
    )
    assert cluster.wait(urgent, slurm.ENDED)["JobState"] == "COMPLETED"
    start_again_soon(cluster, number)
    said = finish(cluster, checkout, number, restarts=2)
    assert re.search(r"^stopped by SIGUSR1 at step \d+$", said, re.M), said
    assert re.search(r"^stopped by SIGTERM at step \d+$", said, re.M), said
    stopped = [e["step"] for e in log_of(checkout, number) if e["event"] == "stopped"]
    starts = [e["step"] for e in log_of(checkout, number) if e["event"] == "start"]
    assert starts[1:] == stopped  # no step was lost
    out = checkout / f"runs/book-model-{number}"
    assert same(state(out / "step-000120", tmp_path / "job.pt"), undisturbed)


@full
def test_a_typing_error_is_not_tried_again(cluster: slurm.Cluster, checkout: Path) -> None:
    number = submit(cluster, checkout, TRAIN, f"{TINY} --stepz 4")
    ended = cluster.wait(number, slurm.ENDED)
    said = (checkout / f"book-model-{number}.log").read_text()
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "0")
    assert "unrecognized arguments: --stepz" in said
    assert said.endswith(f"job {number} is not put back into the queue\n")


# --- the others --------------------------------------------------------------------------------


@full
def test_sweep_covers_its_grid(cluster: slurm.Cluster, checkout: Path) -> None:
    if not (checkout / "runs/ch08_data").is_dir():
        submit(cluster, checkout, "--wait", TRAIN, f"{TINY} --steps 3")
    flags = f"{TINY} --steps 6 --warmup 1"
    number = submit(cluster, checkout, "--wait", SWEEP, flags)
    out = checkout / f"runs/sweep-{number}"
    rates = ("1e-3", "3e-3", "6e-3")
    cells = {f"lr-{rate}-seed-{seed}" for rate in rates for seed in (0, 1)}
    assert {path.stem for path in out.glob("*.json")} == cells
    assert len({json.loads(p.read_text())["held_out"] for p in out.glob("*.json")}) == 6
    missing = out / "lr-3e-3-seed-1.json"
    held_out = missing.read_text()
    missing.unlink()
    shutil.rmtree(out / "lr-3e-3-seed-1")
    again = submit(cluster, checkout, "--wait", f"--export=ALL,OUT={out}", SWEEP, flags)
    assert missing.read_text() == held_out
    said = [(checkout / f"sweep-{again}-{task}.log").read_text() for task in range(6)]
    assert [text.startswith("done: ") for text in said] == [True] * 3 + [False] + [True] * 2


@full
def test_deepspeed_goes_on(cluster: slurm.Cluster, checkout: Path) -> None:
    flags = "--steps 60 --save-every 10 --log-every 10"
    number = submit(cluster, checkout, "--export=ALL,DEVICE=cpu", DEEPSPEED, flags)
    out = checkout / f"runs/zero-{number}"
    slurm.wait_until((out / "step-000010").exists, cluster, timeout=120)
    kill_a_rank(cluster)
    start_again_soon(cluster, number)
    ended = cluster.wait(number, slurm.ENDED, timeout=120)
    said = (checkout / f"zero-{number}.log").read_text()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), said
    assert re.search(r"^resuming at step [1-5]0, ZeRO 3 of 2 ranks$", said, re.M), said
    assert (out / "step-000060").is_dir()


@full
def test_tasks_without_torchrun(cluster: slurm.Cluster, checkout: Path) -> None:
    """Three tasks meet by Slurm's variables alone, and train; a batch script is no task."""
    srun = ("srun", "--nodes=2", "--ntasks=3", "--overcommit")
    script = f"{CODE}/slurm_env.py"
    done = cluster.run(*srun, "python", script, cwd=checkout, timeout=120)
    assert done.stdout.endswith("all 5 checks ok\n"), done.stdout + done.stderr
    rows = re.findall(r"^ +(\d) +(\d)  (\S+) +(\d) +(\d) +0  127.0.0.1:\d+$", done.stdout, re.M)
    assert rows == [
        ("0", "0", FIRST, "0", "2"),
        ("1", "0", FIRST, "1", "2"),
        ("2", "1", SECOND, "0", "1"),
    ]
    train = ("python", script, f"{CODE}/train.py", *TINY.split(), "--steps", "3")
    trained = cluster.run(*srun, *train, cwd=checkout, timeout=120)
    assert trained.returncode == 0, trained.stderr
    assert "3 ranks on cpu" in trained.stdout
    wrap = f"--wrap=python {script}"
    number = submit(cluster, checkout, "--output=%x-%j.log", wrap, "--comment=x")
    assert cluster.wait(number, slurm.ENDED)["ExitCode"] == "2:0"
    said = (checkout / f"wrap-{number}.log").read_text()
    assert said == f"in job {number}, but in no step of it: type srun before python\n"


# --- without Slurm -----------------------------------------------------------------------------


def sweep(
    checkout: Path, folder: Path, script: str, task: int, tasks: int
) -> subprocess.CompletedProcess:
    """Run one task of a job script's array; srun is a program that says what it is asked for."""
    (folder / "srun").write_text(
        '#!/bin/sh\necho "$@" >>asked\ntouch "$(echo "$@" | grep -o "[^ ]*draft")"\n'
    )
    (folder / "srun").chmod(0o755)
    (folder / "runs/ch08_data").mkdir(parents=True, exist_ok=True)
    variables: dict[str, object] = {
        "SLURM_ARRAY_TASK_ID": task,
        "SLURM_ARRAY_TASK_COUNT": tasks,
        "SLURM_JOB_ID": 7,
    }
    variables |= {"SLURM_ARRAY_TASK_MIN": 0, "SLURM_CPUS_PER_TASK": 1, "SLURM_ARRAY_JOB_ID": 7}
    variables |= {"SLURM_JOB_NAME": "sweep", "PATH": f"{folder}:{os.environ['PATH']}"}
    return subprocess.run(
        ["bash", "-c", script],
        cwd=folder,
        env=warm.environment() | {name: str(value) for name, value in variables.items()},
        capture_output=True,
        text=True,
    )


def cells(checkout: Path, folder: Path, script: str) -> set[tuple[str, str]]:
    for task in range(6):
        done = sweep(checkout, folder, script, task, 6)
        assert done.returncode == 0, done.stderr
    asked = (folder / "asked").read_text()
    return set(re.findall(r"--lr (\S+) --seed (\S+)", asked))


def test_every_cell_of_the_grid_has_a_task(checkout: Path, tmp_path: Path) -> None:
    script = (checkout / SWEEP).read_text()
    assert len(cells(checkout, tmp_path, script)) == 6
    too_few = sweep(checkout, tmp_path, script, 0, 5)
    assert (too_few.returncode, too_few.stderr) == (
        2,
        "the grid has 6 cells: type sbatch --array=0-5\n",
    )


@full
def test_a_wrong_stride_misses_cells(checkout: Path, tmp_path: Path) -> None:
    right, wrong = "SLURM_ARRAY_TASK_ID / ${#seeds[@]}", "SLURM_ARRAY_TASK_ID / ${#rates[@]}"
    script = (checkout / SWEEP).read_text()
    assert script.count(right) == 1
    assert len(cells(checkout, tmp_path, script.replace(right, wrong))) < 6


def test_idle_gpus() -> None:
    script = warm.load("chapter8_slurm_env", warm.ROOT / CODE / "slurm_env.py")
    told = script.recorded()
    assert script.idle_gpus(told[0]) == ""
    assert script.idle_gpus(told[4]) == "gpu12 has 2 GPUs for 1 task"


def test_a_task_without_slurms_variables(capsys: pytest.CaptureFixture[str]) -> None:
    script = warm.load("chapter8_slurm_env", warm.ROOT / CODE / "slurm_env.py")
    (told, *_) = script.recorded()
    script.refuse_what_is_no_task(told)
    with pytest.raises(SystemExit) as end:
        script.refuse_what_is_no_task(told | {"SLURM_NTASKS": ""})
    said = capsys.readouterr().err
    assert (end.value.code, said.count("\n")) == (2, 1)
    assert said.startswith("SLURM_NTASKS is not set: ")


@pytest.mark.parametrize(
    "name", ["train.sbatch", "sweep.sbatch", "deepspeed.sbatch", "local_slurm.sh"]
)
def test_shell_scripts(name: str) -> None:
    shellcheck = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run(
        [shellcheck, "--shell=bash", f"{CODE}/slurm/{name}"],
        cwd=warm.ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
