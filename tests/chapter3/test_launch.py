"""Starting: by torchrun, by hand, by srun, on two nodes, in a Slurm job, as a Kubernetes manifest says."""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import book
import kubernetes_validate
import pytest
import slurm
import warm
import yaml

CODE = Path("chapter3-distributed-training-with-pytorch-ddp/code")
INIT, LAUNCH = CODE / "train_init.py", CODE / "launch"
Run = Callable[..., warm.Result]
LAST = "all 4 checks ok\n"  # of what train_init prints
full = pytest.mark.full


@dataclass(frozen=True)
class Ended:
    code: int | None  # None: it had to be killed
    stdout: str
    stderr: str
    seconds: float


class Ranks:
    """Processes that run a script, each with variables of its own: a launcher that is none."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.running: list[tuple[Any, float]] = []

    def start(self, argv: Sequence[object], variables: dict[str, str]) -> None:
        out, err = (self.folder / f"{len(self.running)}.{name}" for name in ("out", "err"))
        for path in (out, err):
            path.write_text("")
        args = ([str(a) for a in argv], warm.environment() | variables, str(warm.ROOT))
        process = warm._context().Process(target=warm._script, args=(*args, str(out), str(err)))
        process.start()
        self.running.append((process, time.monotonic()))

    def end(self, number: int, timeout: float = 30) -> Ended:
        process, start = self.running[number]
        process.join(timeout)
        code, seconds = process.exitcode, time.monotonic() - start
        warm._kill_tree(process)
        process.join()
        out, err = ((self.folder / f"{number}.{name}").read_text() for name in ("out", "err"))
        return Ended(code, out, err, seconds)


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Ranks]:
    started = Ranks(tmp_path)
    yield started
    for process, _ in started.running:
        warm._kill_tree(process)
        process.join()


def by_hand(rank: int, world_size: int, port: int, **more: str) -> dict[str, str]:
    numbers = {"RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    return {k: str(v) for k, v in numbers.items()} | {"MASTER_ADDR": "127.0.0.1", **more}


def table(stdout: str) -> list[tuple[int, int, int]]:
    """Rank, node and local rank of each row that train_init printed."""
    rows = re.findall(r"^ +(\d+) +(\d+) +(\d+) +\d+ +\S+ +\w+ +\d+ +\d+$", stdout, re.M)
    return [(int(a), int(b), int(c)) for a, b, c in rows]


def agree(stdout: str, places: list[tuple[int, int, int]]) -> None:
    assert table(stdout) == places, stdout
    assert stdout.endswith(LAST), stdout


# --- train_init.py -----------------------------------------------------------------------------


@full
@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_every_world_size(run: Run, world_size: int, tmp_path: Path) -> None:
    record = tmp_path / "places.json"
    command = f"torchrun --nproc_per_node={world_size} {INIT} --json {record}"
    result = run(command)
    assert (result.returncode, result.stderr) == (0, "")
    assert "started by torchrun" in result.stdout
    agree(result.stdout, [(rank, 0, rank) for rank in range(world_size)])
    rows = json.loads(record.read_text())
    assert [row["rank"] for row in rows] == list(range(world_size))
    assert {row["threads"] for row in rows} == {1 if world_size > 1 else rows[0]["threads"]}


@full
def test_alone_without_a_launcher(run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)):
        result = run(f"python {INIT}")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("1 rank on cpu, started by python alone")
    agree(result.stdout, [(0, 0, 0)])


HALF = [
    ({"RANK": "0"}, "MASTER_ADDR is missing: type  torchrun"),
    ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "here"}, "MASTER_PORT is missing"),
    ({"RANK": "0", "MASTER_PORT": "1", "MASTER_ADDR": "here"}, "WORLD_SIZE is missing"),
    (by_hand(2, 2, 1), "RANK=2, but WORLD_SIZE=2: ranks count from 0"),
    (by_hand(0, 2, 1, LOCAL_WORLD_SIZE="1"), "type --device cuda, or --device cpu"),
]


@full
def test_half_an_environment(ranks: Ranks) -> None:
    for variables, _ in HALF:
        ranks.start([INIT], variables)
    for number, (_, says) in enumerate(HALF):
        ended = ranks.end(number)
        assert (ended.code, ended.stdout) == (2, "")
        assert ended.stderr.count("\n") == 1, ended.stderr
        assert says in ended.stderr


@pytest.mark.parametrize(
    ("told", "says"),
    [
        # WORLD_SIZE by rank, for those that come; what the last one, rank 0 if it comes, has to say
        ({2: 3, 0: 3}, "rank 0: WORLD_SIZE=3, but rank 1: missing, after 1 s"),
        pytest.param(
            {1: 2, 0: 3}, "WORLD_SIZE=3, but rank 1: WORLD_SIZE=2, rank 2: missing", marks=full
        ),
        pytest.param({1: 2}, "rank 1: no rank 0 at 127.0.0.1", marks=full),
    ],
)
def test_who_is_missing(ranks: Ranks, told: dict[int, int], says: str) -> None:
    (port,) = slurm.free_ports(1)
    for rank, world_size in told.items():
        patience = 1 if rank == min(told) else 20
        ranks.start([INIT, "--timeout", patience], by_hand(rank, world_size, port))
    ended = [ranks.end(number, timeout=15) for number in range(len(told))]
    assert [(e.code, e.stdout) for e in ended] == [(2, "")] * len(told)
    assert ended[-1].stderr.count("\n") == 1, ended[-1].stderr
    assert says in ended[-1].stderr
    for other in ended[:-1]:  # above its line stands what the store's client in C++ has to say
        assert "rank 0 has gone, and the store with it" in other.stderr.splitlines()[-1]
        assert "Traceback" not in other.stderr


@full
def test_port_that_is_taken(ranks: Ranks) -> None:
    with socket.create_server(("0.0.0.0", 0)) as other:
        port = other.getsockname()[1]
        ranks.start([INIT], by_hand(0, 2, port))
        ended = ranks.end(0)
    assert (ended.code, ended.stdout) == (2, "")
    assert ended.stderr.count("\n") == 1, ended.stderr
    assert (
        f"127.0.0.1:{port} is taken: type MASTER_PORT={port + 1}, or --standalone" in ended.stderr
    )


@full
def test_rank_0_comes_last(ranks: Ranks) -> None:
    """The others knock before there is a store, and wait without a word."""
    (port,) = slurm.free_ports(1)
    for rank in (2, 1, 0):
        ranks.start([INIT], by_hand(rank, 3, port))
    ended = [ranks.end(number) for number in range(3)]
    assert [(e.code, e.stderr) for e in ended] == [(0, "")] * 3
    agree(ended[2].stdout, [(rank, 0, rank) for rank in range(3)])


def test_a_rank_that_raises_ends_the_run_and_is_named(tmp_path: Path) -> None:
    """By torchrun itself: on gloo the others notice at once, and @record gives it the error.

    Which rank's failure it sees first, and calls the root cause, is a matter of chance.
    """
    command = book.parse_command(f"torchrun --nproc_per_node=3 {warm.ROOT / INIT} --fail 1")
    result = warm.run_cold(command, tmp_path, 60)
    assert result.returncode == 1
    summary = result.stderr.partition("ChildFailedError")[2]
    of_rank_1 = re.search(r"rank +: 1 \(local_rank: 1\)(.*?)(?=time +:|\Z)", summary, re.S)
    assert of_rank_1, result.stderr
    assert "RuntimeError: this rank fails, as --fail asked" in of_rank_1[1]


@full
def test_a_rank_that_raises_takes_the_others_with_it(ranks: Ranks) -> None:
    """Without a launcher that would end them."""
    (port,) = slurm.free_ports(1)
    for rank in range(3):
        ranks.start([INIT, "--timeout", 600, "--fail", 1], by_hand(rank, 3, port))
    for number in range(3):
        ended = ranks.end(number, timeout=60)
        assert ended.code == 1
        assert "RuntimeError" in ended.stderr


def mutate(folder: Path, right: str, wrong: str) -> Path:
    source = (warm.ROOT / INIT).read_text()
    assert source.count(right) == 1
    mutant = folder / "mutant.py"
    mutant.write_text(source.replace(right, wrong))
    return mutant


@full
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("dist.all_reduce(tensor)", "pass"),
        ("asdict(rank_info) | row", 'asdict(rank_info) | {"local_rank": 0} | row'),
        ("asdict(rank_info) | row", 'asdict(rank_info) | {"rank": 0} | row'),
    ],
)
def test_mutants_are_caught(ranks: Ranks, tmp_path: Path, right: str, wrong: str) -> None:
    mutant = mutate(tmp_path, right, wrong)
    (port,) = slurm.free_ports(1)
    for rank in range(2):
        ranks.start([mutant], by_hand(rank, 2, port))
    ended = ranks.end(0)
    assert (ended.code, ended.stderr) == (1, "")
    assert "FAILED" in ended.stdout


# --- ranks that start again on the store of their torchrun ---------------------------------------

AGENT = """
import sys, time
from pathlib import Path
import torch.distributed as dist
store = dist.TCPStore("127.0.0.1", int(sys.argv[1]), is_master=True, wait_for_workers=False)
Path(__file__).with_suffix(".ready").touch()
while not Path(__file__).with_suffix(".stop").exists():
    time.sleep(0.05)
"""


def restarts(ranks: Ranks, script: Path) -> bool:
    """Whether two ranks can start, and start again, now the one first and now the other."""
    (port,) = slurm.free_ports(1)
    agent = ranks.folder / "agent.py"
    agent.write_text(AGENT)
    ranks.start([agent, port], {})
    while not agent.with_suffix(".ready").exists():
        time.sleep(0.02)
    of_torchrun = {"TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for order in ((0, 1), (1, 0), (0, 1)):
        first = len(ranks.running)
        for rank in order:
            ranks.start([script, "--timeout", 5], by_hand(rank, 2, port, **of_torchrun))
            time.sleep(0.2)  # the second comes late, as processes do
        if any(ranks.end(first + n, timeout=10).code != 0 for n in range(2)):
            return False
    return True


@full
def test_ranks_start_again_on_the_same_store(ranks: Ranks) -> None:
    assert restarts(ranks, INIT)


@full
def test_ranks_that_trust_the_store_meet_the_dead(ranks: Ranks, tmp_path: Path) -> None:
    """What init_process_group does by itself in torch 2.13: old addresses stay in the store."""
    store = "open_store(rank_info, timeout)"
    mutant = mutate(tmp_path, f"roll_call({store}, rank_info, timeout)", store)
    assert not restarts(ranks, mutant)


# --- srun, without torchrun ----------------------------------------------------------------------

TASKS = [(0, 0, 0), (1, 0, 1), (2, 1, 0)]  # rank, node, local rank
PARSE = """
import json, runpy, sys
from_slurm = runpy.run_path(sys.argv[1])["from_slurm"]
for nodes, tasks, node in json.loads(sys.argv[2]):
    one = dict.fromkeys(("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"), "0")
    one |= {"SLURM_JOB_ID": "29999", "SLURM_STEP_ID": "2", "SLURM_NODEID": str(node)}
    one |= {"SLURM_STEP_NODELIST": nodes, "SLURM_STEP_TASKS_PER_NODE": tasks}
    found = from_slurm(one)
    print(found["MASTER_ADDR"], found["LOCAL_WORLD_SIZE"], found["MASTER_PORT"])
"""


@full
def test_lists_of_nodes_and_tasks(ranks: Ranks) -> None:
    """As `scontrol show hostnames` reads them, and as srun's manual writes them."""
    cases = [
        ("n1", "4", 0, "n1 4"),
        ("n[07-09,12],x", "8(x3),4", 3, "n07 4"),
        ("gpu[3,5-6]-ib", "2(x2),1", 1, "gpu3-ib 2"),
        ("rack[1-2]n[10-12]", "1(x6)", 5, "rack1n10 1"),
        ("a,b[1-2]", "2,1(x2)", 2, "a 1"),
        ("127.0.0.[1-2]", "2,1", 0, "127.0.0.1 2"),
    ]
    (script := ranks.folder / "parse.py").write_text(PARSE)
    ranks.start([script, warm.ROOT / INIT, json.dumps([case[:3] for case in cases])], {})
    ended = ranks.end(0)
    assert ended.stdout.splitlines() == [f"{case[3]} 15001" for case in cases], ended.stderr


def imitate_srun(ranks: Ranks, script: Path, timeout: float = 30) -> list[dict[str, Any]]:
    """Start three tasks with the variables that srun gave such tasks; the table that they wrote."""
    (port,) = slurm.free_ports(1)
    step = {"SLURM_JOB_ID": str(port - 15_000), "SLURM_STEP_ID": "0", "SLURM_NTASKS": "3"}
    step |= {"SLURM_STEP_NODELIST": "127.0.0.[1-2]", "SLURM_STEP_TASKS_PER_NODE": "2,1"}
    step |= {"SLURM_STEP_NUM_NODES": "2"}
    record = ranks.folder / "places.json"
    for rank, node, local_rank in reversed(TASKS):
        task = {"SLURM_PROCID": rank, "SLURM_NODEID": node, "SLURM_LOCALID": local_rank}
        ranks.start(
            [script, "--device", "cpu", "--timeout", timeout, "--json", record],
            step | {name: str(number) for name, number in task.items()},
        )
    codes = [ranks.end(number).code for number in range(len(TASKS))]
    return json.loads(record.read_text()) if codes == [0] * len(TASKS) else []


def is_srun(rows: list[dict[str, Any]]) -> bool:
    places = [(row["rank"], row["node"], row["local_rank"]) for row in rows]
    origins = {(row["launcher"], row["address"]) for row in rows}
    return (
        places == TASKS
        and origins == {("srun", "127.0.0.1")}
        and [row["ranks_here"] for row in rows] == [2, 2, 1]
    )


def test_variables_of_srun(ranks: Ranks) -> None:
    assert is_srun(imitate_srun(ranks, INIT))


@full
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ('"RANK": env["SLURM_PROCID"]', '"RANK": env["SLURM_LOCALID"]'),
        ('"WORLD_SIZE": env["SLURM_NTASKS"]', '"WORLD_SIZE": env["SLURM_STEP_NUM_NODES"]'),
        ('"GROUP_RANK": env["SLURM_NODEID"]', '"GROUP_RANK": env["SLURM_LOCALID"]'),
        ('"LOCAL_RANK": env["SLURM_LOCALID"]', '"LOCAL_RANK": env["SLURM_PROCID"]'),
        ('tasks[int(env["SLURM_NODEID"])]', "tasks[0]"),
        (r"\[(\w+)[^]]*\]", r"\[\w+-(\w+)\]"),
    ],
)
def test_wrong_variables_of_srun(ranks: Ranks, tmp_path: Path, right: str, wrong: str) -> None:
    assert not is_srun(imitate_srun(ranks, mutate(tmp_path, right, wrong), timeout=0.7))


# --- two nodes: the launch script, as the Kubernetes manifest calls it ---------------------------


def manifest() -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The Service, the Job's spec and the container."""
    service, job = yaml.safe_load_all((warm.ROOT / LAUNCH / "k8s_job.yaml").read_text())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    return service, job, container


@full
def test_manifest_is_of_the_published_schema() -> None:
    for document in manifest()[:2]:
        assert kubernetes_validate.validate(document, "1.37", strict=True)
    job = manifest()[1]
    job["spec"]["completionsMode"] = "Indexed"
    with pytest.raises(kubernetes_validate.ValidationError, match="completionsMode"):
        kubernetes_validate.validate(job, "1.37", strict=True)


def test_manifest_agrees_with_itself() -> None:
    """What no schema can see."""
    service, job, container = manifest()
    name, spec = job["metadata"]["name"], job["spec"]
    pod = spec["template"]["spec"]
    variables = {v["name"]: v.get("value") for v in container["env"]}
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    assert pod["subdomain"] == service["metadata"]["name"]
    assert variables["MASTER_ADDR"] == f"{name}-0.{pod['subdomain']}"
    assert str(spec["completions"]) == str(spec["parallelism"]) == variables["NNODES"]
    assert spec["completionMode"] == "Indexed"
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert str(gpus) == variables["NPROC_PER_NODE"]
    assert int(variables["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]
    assert (pod["restartPolicy"], spec["podReplacementPolicy"]) == ("Never", "Failed")
    mounts = {m["name"]: m["mountPath"] for m in container["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in pod["volumes"]}
    assert mounts["shm"] == "/dev/shm"
    script = (warm.ROOT / container["command"][-1]).read_text()
    for variable in variables.keys() - {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT"}:
        assert re.search(rf'^: "\$\{{{variable}:', script, re.M), f"nobody reads {variable}"
    trainer = (warm.ROOT / CODE / "train_ddp_torchrun.py").read_text()
    for flag in re.findall(r"--[a-z-]+", " ".join(container["args"])):
        assert f'"{flag}"' in trainer


@full
def test_two_nodes(tmp_path: Path) -> None:
    """Two torchruns on this machine, as two pods would start them: 2 x 2 ranks that agree."""
    container = manifest()[2]
    (port,) = slurm.free_ports(1)
    variables = {v["name"]: v.get("value", "") for v in container["env"]}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_ADDR": "127.0.0.1"}
    variables |= {"NPROC_PER_NODE": "2", "SCRIPT": str(INIT)}
    with contextlib.ExitStack() as stack:
        agents = []
        for index in (1, 0):  # node 1 comes first, and waits
            agent = subprocess.Popen(
                [*container["command"], "--device", "cpu"],
                cwd=warm.ROOT,
                env=warm.environment() | variables | {"NODE_RANK": str(index)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
            stack.callback(warm._kill_tree, agent)
            agents.append(agent)
        said = [agent.communicate(timeout=60) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    stdout = b"".join(out for out, _ in said).decode()
    assert stdout.startswith("4 ranks on cpu, started by torchrun")
    agree(stdout, [(0, 0, 0), (1, 0, 1), (2, 1, 0), (3, 1, 1)])


@full
def test_launch_script_without_variables() -> None:
    done = subprocess.run(
        ["bash", LAUNCH / "torchrun_two_nodes.sh"],
        cwd=warm.ROOT,
        env=warm.environment() | {"NODE_RANK": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert done.stderr.count("\n") == 1
    assert "MASTER_ADDR: is the name or address of node 0" in done.stderr


@pytest.mark.parametrize("name", ["torchrun_two_nodes.sh", "ddp.sbatch"])
def test_shell_scripts(name: str) -> None:
    shellcheck = Path(sys.executable).parent / "shellcheck"
    for command in (["bash", "-n"], [shellcheck, "--shell=bash"]):
        done = subprocess.run(
            [*command, LAUNCH / name], cwd=warm.ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


# --- Slurm ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[slurm.Cluster]:
    with slurm.cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running
        left = subprocess.Popen(
            ["srun", "--nodes=2", "sleep", "300"],
            cwd=running.folder,
            env=running.environment,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        slurm.wait_until(lambda: "sleep" in {p.name() for p in running.mine()}, running)
    left.wait(10)
    assert warm.orphans(running.folder) == []  # neither daemon nor job


@pytest.fixture
def submit_folder(tmp_path: Path) -> Path:
    """Where jobs are submitted and write their logs: a root of the repository that is nearly empty."""
    (tmp_path / CODE.parts[0]).symlink_to(warm.ROOT / CODE.parts[0])
    return tmp_path


@full
def test_srun_without_torchrun(cluster: slurm.Cluster, submit_folder: Path) -> None:
    command = f"srun --nodes=2 --ntasks=3 --overcommit python {INIT} --device cpu".split()
    command += ["--json", "places.json"]
    done = cluster.run(*command, cwd=submit_folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("3 ranks on cpu, started by srun, met at 127.0.0.1:")
    agree(done.stdout, TASKS)
    assert is_srun(json.loads((submit_folder / "places.json").read_text()))


TORCHRUN = """#!/usr/bin/env bash
# In the job's first life a training that only a signal ends, in its second the real torchrun.
if [[ -z ${{SLURM_RESTART_COUNT:-}} ]]; then
    echo "waiting: $*"
    exec sleep 300
fi
exec {torchrun} "$@"
"""


@full
def test_job_that_is_signalled_and_comes_back(cluster: slurm.Cluster, submit_folder: Path) -> None:
    programs = submit_folder / "bin"
    programs.mkdir()
    torchrun = programs / "torchrun"
    torchrun.write_text(TORCHRUN.format(torchrun=Path(sys.executable).parent / "torchrun"))
    torchrun.chmod(0o755)
    path = os.pathsep.join([str(programs), cluster.environment["PATH"]])
    export = f"--export=ALL,PATH={path},SCRIPT={INIT}"
    small = ("--gpus-per-node=1", "--cpus-per-task=1", "--time=5", export)  # than the script asks
    submitted = cluster.run(
        "sbatch", "--parsable", *small, str(LAUNCH / "ddp.sbatch"), "--device", "cpu",
        cwd=submit_folder,
    )  # fmt: skip
    number = submitted.stdout.strip()
    assert number.isdecimal(), submitted.stderr
    logs = [submit_folder / f"ddp-{number}-node{node}.log" for node in range(2)]

    def waiting() -> bool:
        return all(log.exists() and "waiting" in log.read_text() for log in logs)

    slurm.wait_until(waiting, cluster)
    cluster.run("scancel", "--signal=TERM", number, cwd=submit_folder)  # as --signal does in time
    job = cluster.wait(number, {"PENDING", *slurm.ENDED})
    assert (job["JobState"], job["Restarts"]) == ("PENDING", "1"), job
    # Slurm leaves two minutes between two lives; what counts is that the first one is over.
    slurm.wait_until(lambda: "slurmstepd" not in {p.name() for p in cluster.mine()}, cluster)
    cluster.run("scontrol", "update", f"job={number}", "StartTime=now", cwd=submit_folder)
    job = cluster.wait(number, slurm.ENDED)
    assert (job["JobState"], job["ExitCode"], job["NumNodes"]) == ("COMPLETED", "0:0", "2"), (
        f"{job}\n{logs[0].read_text()}\n{cluster.logs()}"
    )
    texts = [log.read_text() for log in logs]
    for text in texts:
        assert text.startswith("waiting: --nnodes=2 --nproc_per_node=1 --rdzv_backend=c10d")
        assert "--rdzv_endpoint=127.0.0.1:" in text
    (printed,) = [text for text in texts if "check" in text]  # the node that is c10d's first
    assert "\n2 ranks on cpu, started by torchrun" in printed  # below what the first life has left
    assert table(printed) == [(0, 0, 0), (1, 1, 0)], printed
    assert LAST in printed, printed  # torchrun may say something below it when it takes leave
