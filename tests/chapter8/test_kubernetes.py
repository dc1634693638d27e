"""The manifests: what their schemas refuse, what they must say alike, and what their pods do."""

import argparse
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import slurm
import warm
import yaml

FOLDER = warm.ROOT / "chapter8-distributed-ai-training-in-action/code/kubernetes"
TRAINER = FOLDER.parent / "train.py"
full = pytest.mark.full
validate: ModuleType = warm.load("kubernetes_manifests", FOLDER / "validate.py")


def complaints(capsys: pytest.CaptureFixture[str], *files: Path) -> list[str]:
    """What validate.py says about manifests, without its table and its checks."""
    held = validate.run(argparse.Namespace(files=files))
    lines = [line for line in capsys.readouterr().out.splitlines() if re.match(r"\w+\.yaml", line)]
    assert all(held) == (not lines)
    return lines


WRONG = [  # file, what it says, what it would say, the complaint
    ("job.yaml", "parallelism: 2", "parallelsm: 2", "('parallelsm' was unexpected)"),
    ("job.yaml", "backoffLimit: 20", "backoffLimit: many", "'many' is not of type 'integer'"),
    ("job.yaml", "completions: 2", "completions: 3", "are not one number"),
    ("job.yaml", "value: book-0.book}", "value: book-0}", "pod 0 is book-0.book"),
    ("job.yaml", "nvidia.com/gpu: 8,", "nvidia.com/gpu: 4,", "NPROC_PER_NODE 8, but 4 GPUs"),
    ("job.yaml", "SHUTDOWN_TIMEOUT, value: \"100\"", "SHUTDOWN_TIMEOUT, value: \"120\"", "SIGKILL comes first"),
    ("job.yaml", "      terminationGracePeriodSeconds: 120", "      priority: 0", "SIGKILL comes first"),
    ("job.yaml", "mountPath: /dev/shm", "mountPath: /shm", "/dev/shm is none of them"),
    ("job.yaml", "--out, /shared/book", "--out, /book/runs", "--out is not on a volume"),
    ("job.yaml", "--data, /shared/data, ", "", "--data is not on a volume"),
    ("job.yaml", ", --resume]", "]", "without --resume"),
    ("job.yaml", "--dp-replicate, \"2\"", "--dp-replicate, \"4\"", "the layout [4, 8, 1] is not for 16 ranks"),
    ("job.yaml", "clusterIP: None", "type: ClusterIP", "no headless Service book"),
    ("job.yaml", "job-name: book", "job-name: books", "no headless Service book"),
    ("job.yaml", "completionMode: Indexed", "completionMode: NonIndexed", "takes itself for node 0"),
    ("job.yaml", "name: NODE_RANK", "name: RANK", "takes itself for node 0"),
    ("job.yaml", "restartPolicy: Never", "restartPolicy: Always", "restartPolicy is not Never"),
    ("job.yaml", '"8", --steps', "--steps", "no launch can be read from it"),
    ("jobset.yaml", "jobset.x-k8s.io/v1alpha2", "jobset.x-k8s.io/v1", "JobSet: "),
    ("jobset.yaml", "maxRestarts: 20", "maxRestart: 20", ".spec.failurePolicy.maxRestart: no such key"),
    ("jobset.yaml", "maxRestarts: 20", "maxRestarts: '20'", "JobSet: "),
    ("jobset.yaml", "restartPolicy: Never", "restartPolcy: Never", "restartPolcy: no such key"),
    ("jobset.yaml", "book-node-0-0.book}", "book-node-0.book}", "pod 0 is book-node-0-0.book"),
    ("trainjob.yaml", "numProcPerNode: 8", "numProcPerNode: 4", "NPROC_PER_NODE 4, but 8 GPUs"),
    ("trainjob.yaml", "numNodes: 2", "nodes: 2", ".spec.trainer.nodes: no such key"),
    ("trainjob.yaml", "queue-name: training", "queue-name: teaching", "there is no LocalQueue teaching"),
    ("kueue.yaml", "name: pretraining", "name: pre-training", "there is no WorkloadPriorityClass pretraining"),
    ("trainjob.yaml", "    numProcPerNode: 8\n", "", "no launch can be read from it"),
    ("kueue.yaml", "clusterQueue: training", "clusterQueue: all", "there is no ClusterQueue all"),
    ("kueue.yaml", "coveredResources:", "resources:", "'resources' was unexpected"),
    ("kueue.yaml", "withinClusterQueue: LowerPriority", "withinClusterQueue: Lower", "'Lower' is not one of"),
    ("kueue.yaml", "nominalQuota: 32", "nominalQuota: 8", "the queue training has fewer GPUs"),
    ("kueue.yaml", "{name: memory, nominalQuota: 2Ti}", "{name: pods, nominalQuota: 9}", "does not cover memory"),
    ("kueue.yaml", "v1beta2\nkind: LocalQueue", "v1alpha1\nkind: LocalQueue", "'kueue.x-k8s.io/v1beta2' was expected"),
]  # fmt: skip


def test_ours_are_accepted_and_each_mistake_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = sorted(FOLDER.glob("*.yaml"))
    assert [path.name for path in ours] == [
        "job.yaml",
        "jobset.yaml",
        "kueue.yaml",
        "trainjob.yaml",
    ]
    assert complaints(capsys, *ours) == []
    for name, right, wrong, complaint in WRONG:
        source = (FOLDER / name).read_text()
        assert right in source, right
        (tmp_path / name).write_text(source.replace(right, wrong, 1))
        other = FOLDER / ("jobset.yaml" if name == "kueue.yaml" else "kueue.yaml")
        found = complaints(capsys, tmp_path / name, other)
        assert any(complaint in line for line in found), (name, wrong, found)


def launches() -> dict[str, Any]:
    """By file: what the pods of each training do."""
    found = {}
    for name in ("job.yaml", "jobset.yaml", "trainjob.yaml"):
        ((_, _, job),) = validate.jobs(list(yaml.safe_load_all((FOLDER / name).read_text())))
        found[name] = validate.Launch(job)
    return found


def test_all_three_start_the_same_training() -> None:
    of_file = launches()
    assert len({tuple(launch.args) for launch in of_file.values()}) == 1
    trainer = TRAINER.read_text()
    for flag in re.findall(r"--[a-z-]+", " ".join(of_file["job.yaml"].args)):
        assert f'"{flag}"' in trainer, f"train.py has no {flag}"
    shown, made = (of_file[name].variables for name in ("jobset.yaml", "trainjob.yaml"))
    assert shown == made, "jobset.yaml says what Kubeflow Trainer sets"
    relative = TRAINER.relative_to(warm.ROOT)
    for name in ("jobset.yaml", "trainjob.yaml"):
        assert of_file[name].container["command"] == ["torchrun", str(relative)]
    assert of_file["job.yaml"].variables["SCRIPT"] == str(relative)


def test_service_finds_the_jobs_pods() -> None:
    service, job = yaml.safe_load_all((FOLDER / "job.yaml").read_text())
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
    assert job["spec"]["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None"


def test_an_unreadable_file_has_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "torn.yaml").write_text("kind: [Job\n")
    with pytest.raises(SystemExit) as end:
        complaints(capsys, tmp_path / "torn.yaml")
    said = capsys.readouterr().err
    assert (end.value.code, said.count("\n")) == (2, 1)
    assert said.startswith(f"cannot read {tmp_path}/torn.yaml: ")


# --- what the pods do: two torchruns on this machine, with the manifests' commands and variables ---

TINY = (
    "--device cpu --dp-replicate -1 --dp-shard 1 --width 32 --layers 1 --heads 2 --kv-heads 1 "
    "--hidden 64 --context 32 --batch 4 --steps 400 --save-every 40 --log-every 2 --vocabulary 300"
)


class Pods:
    """The pods of a training: each is a process that may be signalled, killed and replaced."""

    def __init__(self, launch: Any, folder: Path):
        self.launch = launch
        self.folder = folder
        self.log = folder / "book" / "log.jsonl"
        (self.port,) = slurm.free_ports(1)
        self.running: dict[int, subprocess.Popen[bytes]] = {}
        corpus = folder / "corpus.txt"
        corpus.write_text((warm.ROOT / "resources/corpus.txt").read_text()[:60_000])
        self.flags = [*TINY.split(), "--corpus", str(corpus)]

    def start(self, *indices: int) -> None:
        shared = [arg.replace("/shared", str(self.folder)) for arg in self.launch.args]
        here = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.port), "NPROC_PER_NODE": "1"}
        for index in indices:
            variables = {v["name"]: v.get("value", "") for v in self.launch.container["env"]}
            prefix = "PET_" if "PET_NNODES" in variables else ""
            variables |= {prefix + key: value for key, value in here.items()}
            variables |= {prefix + "NODE_RANK": str(index), "LOCAL_ADDR": "127.0.0.1"}
            self.running[index] = subprocess.Popen(
                [*self.launch.container["command"], *shared, *self.flags],
                cwd=warm.ROOT,
                env=warm.environment() | variables,
                stdout=(self.folder / f"pod-{index}").open("ab"),
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def events(self, kind: str) -> list[dict]:
        lines = self.log.read_text().split("\n")[:-1] if self.log.exists() else []
        return [event for line in lines if (event := json.loads(line))["event"] == kind]

    def wait_for(self, condition: Callable[[], object], timeout: float = 90) -> None:
        end = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < end, self.said()
            assert any(pod.poll() is None for pod in self.running.values()), self.said()
            time.sleep(0.05)

    def codes(self) -> list[int]:
        """Exit codes by index, when all have ended."""
        return [self.running[index].wait(90) for index in sorted(self.running)]

    def said(self) -> str:
        return "\n".join(path.read_text()[-2000:] for path in sorted(self.folder.glob("pod-*")))


@pytest.fixture
def pods(tmp_path: Path) -> Iterator[Callable[[str], Pods]]:
    started: list[Pods] = []

    def of(name: str) -> Pods:
        started.append(Pods(launches()[name], tmp_path))
        return started[-1]

    yield of
    for pod in [pod for training in started for pod in training.running.values()]:
        warm._kill_tree(pod)


@full
def test_an_evicted_pod_takes_the_others_along_and_all_go_on(pods: Callable[[str], Pods]) -> None:
    """JobSet and TrainJob: SIGTERM to one pod; all save and end; started again, they finish."""
    training = pods("jobset.yaml")
    training.start(1, 0)  # pod 1 comes first, and waits
    training.wait_for(lambda: len(training.events("step")) > 10)
    os.kill(training.running[1].pid, signal.SIGTERM)
    assert 0 not in training.codes(), "an exit code of 0 would tell Kubernetes that it is complete"
    (stopped,) = training.events("stopped")
    assert stopped["reason"] == "SIGTERM"
    assert (training.folder / "book" / f"step-{stopped['step']:06}").is_dir()
    training.start(0, 1)
    assert training.codes() == [0, 0], training.said()
    assert [event["step"] for event in training.events("start")] == [0, stopped["step"]]
    assert training.events("end")


@full
def test_a_lost_pod_is_replaced_alone(pods: Callable[[str], Pods]) -> None:
    """Job: SIGKILL to all of pod 1; a new pod 1 comes, and pod 0's torchrun has gone on waiting."""
    training = pods("job.yaml")
    training.start(1, 0)
    training.wait_for(lambda: training.events("save"))
    warm._kill_tree(training.running[1])
    training.start(1)
    assert training.codes() == [0, 0], training.said()
    first, second = training.events("start")
    assert (first["step"], second["world_size"]) == (0, 2)
    assert second["step"] >= 40
    assert training.events("end")
