"""Hold the manifests of this folder, or yours, to the published schemas, and to themselves.

    python chapter8-distributed-ai-training-in-action/code/kubernetes/validate.py

No cluster is asked, and nothing is sent. Look at "ranks" and "they meet at": three ways to say the same.
Then write `parallelsm: 2` in job.yaml and run it again. Section 8.7.
"""

import argparse
import copy
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

try:
    import jsonschema
    import kubeflow_trainer_api.models as kubeflow
    import kubernetes_validate
    import yaml
except ModuleNotFoundError as error:  # what `make test` installs
    sys.stderr.write(f"no {error.name}: pip install kubernetes-validate kubeflow-trainer-api\n")
    sys.exit(2)

KUBERNETES = "1.37"
MODELS = {  # which do not look at apiVersion
    ("jobset.x-k8s.io/v1alpha2", "JobSet"): kubeflow.JobsetV1alpha2JobSet,
    ("trainer.kubeflow.org/v1alpha1", "TrainingRuntime"): kubeflow.TrainerV1alpha1TrainingRuntime,
    ("trainer.kubeflow.org/v1alpha1", "TrainJob"): kubeflow.TrainerV1alpha1TrainJob,
}
KUEUE = json.loads(Path(__file__).with_name("kueue_schema.json").read_text())
DAMAGED = (AttributeError, IndexError, KeyError, TypeError, ValueError)  # of what is not there
INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"


def refused(document: dict) -> list[str]:
    """What the schema of its kind has against an object."""
    kind = document["kind"]
    model = MODELS.get((document["apiVersion"], kind))
    try:
        if model:  # it drops keys that it does not know, without a word
            return unknown_keys(document, model.from_dict(document).to_dict())
        if kind in KUEUE:
            jsonschema.validate(document, KUEUE[kind])
        else:
            kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except jsonschema.ValidationError as error:
        return [f"{'.'.join(map(str, error.path))}: {error.message}"]
    except (*DAMAGED, kubernetes_validate.SchemaNotFoundError) as error:  # ValueError: pydantic's
        return [f"{kind}: {' '.join(str(error).split())}"]
    return []


def unknown_keys(given: Any, understood: Any, path: str = "") -> list[str]:
    """Where a key was given that the model has not kept."""
    if isinstance(given, list):
        given = dict(enumerate(given))
        understood = dict(enumerate(understood))
    if not isinstance(given, dict):
        return []
    found = [f"{path}.{key}: no such key" for key in given if key not in understood]
    for key in given.keys() & understood.keys():
        found += unknown_keys(given[key], understood[key], f"{path}.{key}")
    return found


def jobs(documents: list[dict]) -> Iterator[tuple[dict, str, dict]]:
    """Each training as the plain Job that the controllers make of it: (as written, domain, Job)."""
    runtimes = {
        d["metadata"]["name"]: d["spec"] for d in documents if d["kind"] == "TrainingRuntime"
    }
    for document in documents:
        name = document["metadata"]["name"]
        if document["kind"] == "Job":
            yield document, document["spec"]["template"]["spec"].get("subdomain", ""), document
        elif document["kind"] == "JobSet":
            for replicated in document["spec"]["replicatedJobs"]:
                yield document, name, as_job(f"{name}-{replicated['name']}-0", replicated)
        elif document["kind"] == "TrainJob":
            runtime = runtimes.get(document["spec"]["runtimeRef"]["name"])
            if runtime is None:
                stop(f"TrainJob {name}: give the file with its TrainingRuntime, too")
            (replicated,) = copy.deepcopy(runtime["template"]["spec"]["replicatedJobs"])
            job = as_job(f"{name}-{replicated['name']}-0", replicated)
            yield document, name, filled_in(job, document["spec"]["trainer"], name)


def as_job(name: str, replicated: dict) -> dict:
    spec = {"completionMode": "Indexed"} | replicated["template"]["spec"]
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, "spec": spec}


def filled_in(job: dict, trainer: dict, name: str) -> dict:
    """As Kubeflow Trainer 2.3 does it for a runtime with `torch: {}` (pkg/runtime/framework/plugins)."""
    job["spec"] |= {"completions": trainer["numNodes"], "parallelism": trainer["numNodes"]}
    (container,) = job["spec"]["template"]["spec"]["containers"]
    container |= {key: trainer[key] for key in ("command", "args")}
    container["resources"] = trainer["resourcesPerNode"]
    container["env"] = [
        *container.get("env", []),
        {"name": "PET_NNODES", "value": str(trainer["numNodes"])},
        {"name": "PET_NPROC_PER_NODE", "value": str(trainer["numProcPerNode"])},
        {"name": "PET_NODE_RANK", "valueFrom": {"fieldRef": {"fieldPath": INDEX}}},
        {"name": "PET_MASTER_ADDR", "value": f"{name}-node-0-0.{name}"},
        {"name": "PET_MASTER_PORT", "value": "29500"},
    ]
    return job


@dataclass
class Launch:
    """What the pods of a Job will do."""

    job: dict

    def __post_init__(self) -> None:
        self.spec = self.job["spec"]
        self.pod = self.spec["template"]["spec"]
        self.container = self.pod["containers"][0]
        self.args = [str(arg) for arg in self.container.get("args", [])]
        resources = self.container.get("resources", {})
        self.asked = resources.get("requests", {}) | resources.get("limits", {})
        self.gpus = int(self.asked.get("nvidia.com/gpu", 0))
        self.nodes = self.spec.get("completions", 1)
        self.grace = self.pod.get("terminationGracePeriodSeconds", 30)
        variables = {
            v["name"]: v.get("value")
            or v.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath", "")
            for v in self.container.get("env", [])
        }
        # torchrun reads PET_NNODES, chapter 3's script NNODES
        self.variables = {name.removeprefix("PET_"): value for name, value in variables.items()}

    def flag(self, name: str, default: str) -> str:
        return self.args[self.args.index(name) + 1] if name in self.args else default

    def row(self, kind: str, file: str) -> str:
        address = ":".join(self.variables.get(f"MASTER_{part}", "?") for part in ("ADDR", "PORT"))
        pods = f"{self.nodes} x {self.gpus}"
        ranks = self.nodes * self.gpus
        return f"{kind:9}{file:17}{pods:>12}{ranks:>7}{self.grace:>13} s  {address}"

    def disagreements(self, domain: str) -> Iterator[str]:
        """What no schema can see."""
        said = self.variables.get
        first = f"{self.job['metadata']['name']}-0.{domain}"
        if {str(self.nodes), str(self.spec.get("parallelism", 1))} != {said("NNODES")}:
            yield "completions, parallelism and NNODES are not one number: ranks wait for each other"
        if self.spec.get("completionMode") != "Indexed" or said("NODE_RANK") != INDEX:
            yield "not Indexed, or NODE_RANK is not the index: each pod takes itself for node 0"
        if self.pod.get("restartPolicy") != "Never":
            yield "restartPolicy is not Never"
        if str(self.gpus) != said("NPROC_PER_NODE"):
            yield f"NPROC_PER_NODE {said('NPROC_PER_NODE')}, but {self.gpus} GPUs"
        if said("MASTER_ADDR") != first:
            yield f"MASTER_ADDR {said('MASTER_ADDR')}, but pod 0 is {first}"
        if int(said("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", 30)) >= self.grace:
            yield "torchrun may wait longer than Kubernetes does: SIGKILL comes first"
        mounts = {m["mountPath"]: m["name"] for m in self.container.get("volumeMounts", [])}
        volumes = {v["name"]: v for v in self.pod.get("volumes", [])}
        if set(mounts.values()) != set(volumes) or "/dev/shm" not in mounts:
            yield "volumes and mounts differ, or /dev/shm is none of them"
        shared = [p for p, v in mounts.items() if "persistentVolumeClaim" in volumes.get(v, {})]
        for flag in ("--out", "--data"):
            if not self.flag(flag, "").startswith(tuple(shared)):
                yield f"{flag} is not on a volume that all pods share"
        if "--resume" not in self.args:
            yield "without --resume every start is from step 0"
        defaults = (("--dp-replicate", "-1"), ("--dp-shard", "1"), ("--tp", "1"))  # of train.py
        sizes = [int(self.flag(name, default)) for name, default in defaults]
        ranks = self.nodes * self.gpus
        if -1 not in sizes and sizes[0] * sizes[1] * sizes[2] != ranks:
            yield f"the layout {sizes} is not for {ranks} ranks"


def no_service(domain: str, job: dict, documents: list[dict]) -> Iterator[str]:
    """A name like book-0.book is known only if a headless Service of that name selects the pods."""
    selectors = [
        d["spec"].get("selector")
        for d in documents
        if (d["kind"], d["metadata"]["name"], d["spec"].get("clusterIP"))
        == ("Service", domain, "None")
    ]
    if selectors != [{"batch.kubernetes.io/job-name": job["metadata"]["name"]}]:
        yield f"no headless Service {domain} selects the Job's pods: nobody finds pod 0"


def not_queued(written: dict, launch: Launch, everything: list[dict]) -> Iterator[str]:
    """What would wait in Kueue for ever: no such queue or class, a resource or GPUs that it has not."""
    named = {(d["kind"], d["metadata"]["name"]): d for d in everything}
    labels = written["metadata"].get("labels", {})
    for label, kind in (("queue-name", "LocalQueue"), ("priority-class", "WorkloadPriorityClass")):
        name = labels.get(f"kueue.x-k8s.io/{label}")
        if name and (kind, name) not in named:
            yield f"there is no {kind} {name} in these files"
        elif name and kind == "LocalQueue":
            cluster_queue = named[kind, name]["spec"]["clusterQueue"]
            if ("ClusterQueue", cluster_queue) not in named:
                yield f"there is no ClusterQueue {cluster_queue} in these files"
                continue
            cluster = named["ClusterQueue", cluster_queue]["spec"]
            flavors = [f for group in cluster["resourceGroups"] for f in group["flavors"]]
            quota = {r["name"]: r["nominalQuota"] for f in flavors for r in f["resources"]}
            for missing in launch.asked.keys() - quota.keys():
                yield f"the queue {name} does not cover {missing}"
            if launch.nodes * launch.gpus > int(quota.get("nvidia.com/gpu", 0)):
                yield f"the queue {name} has fewer GPUs"


def run(args: argparse.Namespace) -> list[bool | None]:
    files = {path: read(path) for path in args.files}
    everything = [document for documents in files.values() for document in documents]
    refusals: list[str] = []
    problems: list[str] = []
    for path, documents in files.items():
        refusals += [f"{path.name}: {line}" for document in documents for line in refused(document)]
    lines = [f"{'training':26}{'pods x GPUs':>12}{'ranks':>7}{'SIGKILL after':>15}  they meet at"]
    for path, documents in files.items() if not refusals else ():
        try:
            for written, domain, job in jobs(documents):
                launch = Launch(job)
                refusals += [f"{path.name}, the Job: {line}" for line in refused(job)]
                found = [*launch.disagreements(domain), *not_queued(written, launch, everything)]
                if written["kind"] == "Job":  # the controllers of the others make theirs
                    found += no_service(domain, job, documents)
                problems += [f"{path.name}: {line}" for line in found]
                lines.append(launch.row(written["kind"], path.name))
        except DAMAGED as error:  # a schema asks for little: a Job may be without a spec
            problems.append(f"{path.name}: no launch can be read from it: {error!r}")
    for line in [*lines, *refusals, *problems]:
        say(line)
    return [
        check(f"complaints of the schemas about {len(everything)} objects", len(refusals), 0),
        check("lines of a manifest that disagree with another", len(problems), 0),
    ]


def read(path: Path) -> list[dict]:
    try:
        documents = [document for document in yaml.safe_load_all(path.read_text()) if document]
        for d in documents:
            if not all(
                isinstance(x, str) for x in (d["apiVersion"], d["kind"], d["metadata"]["name"])
            ):
                raise TypeError("apiVersion, kind and metadata.name are words")
        return documents
    except KeyError as error:
        stop(f"{path} is no manifest: an object has no {error.args[0]}")
    except (OSError, TypeError, ValueError, yaml.YAMLError) as error:
        stop(f"cannot read {path}: {' '.join(str(error).split())}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ours = sorted(Path(__file__).parent.glob("*.yaml"))
    parser.add_argument(
        "files", type=Path, nargs="*", default=ours, help="manifests; default: ours"
    )
    return parser.parse_args()


def main() -> None:
    sys.exit(conclude(run(parse_args())))


# --- copied from other scripts; `make copies` keeps it equal to them ------------------------------


# Copied from ch01_single_gpu_baseline.check
def check(claim: str, value: float, bound: float, at_least: bool = False) -> bool:
    """Print whether a value keeps its bound, as it must anywhere; a rank where it does not speaks."""
    held = bool(value >= bound if at_least else value <= bound)  # False for NaN
    line = f"check: {claim} = {value:.3g} {'>=' if at_least else '<='} {bound:.3g}"
    if held:
        say(f"{line}  ok")
    else:
        print(f"{line}  FAILED on rank {os.environ.get('RANK', '0')}", flush=True)
    return held


# Copied from ch01_single_gpu_baseline.conclude
def conclude(claims: list[bool | None]) -> int:
    """Print the last line of a run, and return its exit code; an `expect` that is None is no check."""
    judged = [held for held in claims if held is not None]
    failed = judged.count(False)
    say(f"{failed} of {len(judged)} checks FAILED" if failed else f"all {len(judged)} checks ok")
    return int(failed > 0)


# Copied from ch01_single_gpu_baseline.say
def say(line: str) -> None:
    """Print on rank 0. A reader who has seen enough (`| head`) does not end the run."""
    if os.environ.get("RANK", "0") == "0":
        try:
            print(line, flush=True)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# Copied from ch01_single_gpu_baseline.stop
def stop(message: str) -> NoReturn:
    """End with one line and exit code 2: the command was wrong, not the program."""
    sys.stderr.write(message + "\n")  # in one piece: other ranks write too
    sys.exit(2)


if __name__ == "__main__":
    main()
