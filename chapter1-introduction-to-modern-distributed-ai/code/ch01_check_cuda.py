"""Show what this machine offers to distributed training, and which chapters are ready to run.

    python chapter1-introduction-to-modern-distributed-ai/code/ch01_check_cuda.py

It never fails for want of a GPU. It fails if Python or PyTorch is too old, if two processes cannot
sum over gloo, or if a GPU computes wrongly. Read its warnings before a later chapter. Section 1.2.
"""

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import platform
import resource
import shutil
import sys
import tempfile
import textwrap
from importlib import metadata
from pathlib import Path

BOOK = Path(__file__).resolve().parents[2]
CORE = ["torch", "numpy", "transformers", "safetensors", "matplotlib", "psutil", "tqdm"]
SERVE = ["fastapi", "uvicorn", "httpx", "opentelemetry-sdk", "prometheus-client"]
TESTS = ["pytest", "cogapp", "ruff", "mypy", "codespell"]
# chapter: (environment, packages that it has to hold, command that puts them there)
NEEDS = {str(chapter): (".venv", CORE, "make quickstart") for chapter in range(1, 12)}
NEEDS |= {
    "5": (".venv", [*CORE, "deepspeed"], "make quickstart"),  # deepspeed is for Linux
    "8": (".venv", [*CORE, "deepspeed"], "make quickstart"),
    "6": (".venv-vllm", ["torch", "vllm"], "make vllm"),
    "7": (".venv-sglang", ["torch", "sglang"], "make sglang"),
    "9": (".venv", CORE + SERVE, "pip install -e '.[serve]'"),
    "10": (".venv", [*CORE, "genai-bench"], "pip install -e '.[bench]'"),
    "tests": (".venv", CORE + TESTS, "make test"),
}


def describe_machine() -> dict:
    """System, processor, memory and limits, as far as the system tells them."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = {"logical": os.cpu_count(), "usable": usable, "quota": cgroup_limit("cpu.max")}
    sizes = {"disk free": shutil.disk_usage(".").free}
    if Path("/dev/shm").exists():
        sizes["/dev/shm free"] = shutil.disk_usage("/dev/shm").free
    with contextlib.suppress(ImportError):
        import psutil

        limit = cgroup_limit("memory.max") or float("inf")
        sizes["RAM"] = min(psutil.virtual_memory().total, limit)
        sizes["available"] = min(psutil.virtual_memory().available, limit)
    return {
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "Python": f"{platform.python_version()}, {sys.executable}",
        "CPU": processor(),
        "cores": cores,
        "GiB": {name: size / 2**30 for name, size in sizes.items()},
        "open files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "driver": ask_nvml(),
    }


def processor() -> str:
    with contextlib.suppress(OSError, StopIteration):  # Linux on Arm does not name the model
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def cgroup_limit(name: str) -> float | None:
    """The limit on this container (cgroup v2): bytes of memory.max, cores of cpu.max."""
    with contextlib.suppress(OSError, ValueError):  # no limit reads "max", no float
        amount, *period = map(float, Path("/sys/fs/cgroup", name).read_text().split())
        return amount / period[0] if period else amount
    return None


def describe_torch() -> dict:
    import torch
    import torch.distributed as dist

    known = ("gloo", "nccl", "mpi") if dist.is_available() else ()
    backends = [name for name in known if dist.is_backend_available(name)]
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if "nccl" in backends else None
    versions = {"version": torch.__version__, "CUDA": torch.version.cuda, "NCCL": nccl}
    return {"torch": versions, "backends": ", ".join(backends)}


def describe_gpus() -> list[dict]:
    """What PyTorch and the driver's library (NVML) say of each GPU that PyTorch sees."""
    import torch

    gpus = []
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(count):
        properties = torch.cuda.get_device_properties(index)
        gpu = {"name": properties.name, "GiB": properties.total_memory / 2**30}
        gpu["compute capability"] = f"{properties.major}.{properties.minor}"
        peers = [i for i in range(count) if i != index]
        gpu["peers"] = sum(torch.cuda.can_device_access_peer(index, i) for i in peers)
        gpu |= ask_nvml(getattr(properties, "uuid", None))
        a, b = torch.randint(-8, 9, (2, 256, 256)).float()  # small integers leave no rounding
        product = a.to(f"cuda:{index}") @ b.to(f"cuda:{index}")
        gpu["error"] = (product.cpu() - a @ b).abs().max().item()
        gpus.append(gpu)
    return gpus


def ask_nvml(uuid: object = None) -> dict:
    """Number of GPUs and driver or, given a GPU, its links; what NVML does not tell is left out."""
    answers = {}
    with contextlib.suppress(Exception):  # no library, no driver, or a GPU without such links
        import pynvml as nvml

        nvml.nvmlInit()
        if uuid is None:
            return {"NVIDIA": nvml.nvmlSystemGetDriverVersion(), "GPUs": nvml.nvmlDeviceGetCount()}
        gpu = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        most = nvml.nvmlDeviceGetMaxPcieLinkGeneration(gpu)  # the link slows down when idle
        answers["PCIe generation"] = most
        for link in range(nvml.NVML_NVLINK_MAX_LINKS):  # the link after the last one raises
            up = nvml.nvmlDeviceGetNvLinkState(gpu, link)
            answers["NVLinks"] = answers.get("NVLinks", 0) + up
    return answers


def sum_between_two() -> float:
    """How far two new processes are off when they sum over gloo, by torchrun's network interface."""
    # forked children need not import torch again; on a Mac, a fork is not safe
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with tempfile.TemporaryDirectory() as folder, context.Pool(2) as pool:
        store = f"file://{folder}/store"
        ranks = [pool.apply_async(one_of_two, (rank, store)) for rank in range(2)]
        return ranks[0].get(timeout=60)


def one_of_two(rank: int, store: str) -> float:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    tensor = torch.full((2**18,), rank + 1.0)  # 1 MiB
    dist.all_reduce(tensor)
    dist.barrier()
    dist.destroy_process_group()
    return (tensor - 3).abs().max().item()


def readiness() -> list[dict]:
    """What each chapter lacks; all chapters where this file was copied out of the book."""
    here = {f.name.split("-")[0].removeprefix("chapter") for f in BOOK.glob("chapter*-*")}
    rows = []
    for chapter, (environment, packages, command) in NEEDS.items():
        if here and chapter.isdigit() and chapter not in here:
            continue
        sites = (BOOK / environment).glob("lib/python*/site-packages")
        where = {} if environment == ".venv" else {"path": [str(site) for site in sites]}
        missing = [p for p in packages if not any(metadata.distributions(name=p, **where))]
        rows.append({"chapter": chapter, "missing": missing, "command": command if missing else ""})
    return rows


def warnings_about(machine: dict) -> list[str]:
    """Things that make a later chapter fail without naming the cause."""
    found = []
    cores, sizes = machine["cores"], machine["GiB"]
    if sizes.get("available", 4) < 4:
        found.append("under 4 GiB of RAM available: use fewer ranks, a smaller --width and --batch")
    if sizes.get("/dev/shm free", 1) < 1 / 16:
        found.append("under 64 MiB in /dev/shm: in Docker, add --shm-size=1g or --ipc=host")
    if cores["quota"] and cores["quota"] < cores["usable"]:
        threads = max(1, int(cores["quota"]))
        found.append(f"more cores than the quota pays for: export OMP_NUM_THREADS={threads}")
    if (BOOK / ".venv").exists() and Path(sys.prefix).resolve() != (BOOK / ".venv").resolve():
        found.append("this Python is not the book's: . .venv/bin/activate")
    if 0 <= machine["open files"] < 1024:
        found.append("under 1,024 open files allowed: ulimit -n 4096")
    if machine["driver"].get("GPUs") and "torch" in machine and "GPU 0" not in machine:
        cause = "CUDA_VISIBLE_DEVICES or the driver" if machine["torch"]["CUDA"] else "a CPU build"
        found.append(f"PyTorch does not see the NVIDIA GPU that the driver sees: {cause}")
    return found


def show(value: object) -> str:
    if isinstance(value, dict):
        facts = [f"{name} {show(item)}" for name, item in value.items()]
        line = ", ".join(facts)
        return (line or "none") if len(line) < 70 else f"\n{'':<13}".join(facts)
    if value in (None, ""):
        return "none"
    return f"{value:,.1f}" if isinstance(value, float) else str(value)


def print_report(machine: dict, warnings: list[str], chapters: list[dict]) -> None:
    for label, value in [*machine.items(), *(("warning", text) for text in warnings)]:
        say(f"{label:<12} {show(value)}")
    say(f"\n{'chapter':<12} {'ready':<6} {'to make it so':<26} missing")
    for row in chapters:
        ready = "no" if row["missing"] else "yes"
        missing = textwrap.shorten(" ".join(row["missing"]), 50, placeholder=" ...")
        say(f"{row['chapter']:<12} {ready:<6} {row['command']:<26} {missing}".rstrip())


def minor_version(version: str) -> int:
    """The 13 of PyTorch 2.13.0; far more from PyTorch 3 on."""
    major, minor = version.split(".")[:2]
    return 100 * (int(major) - 2) + int(minor)


def run(args: argparse.Namespace) -> list[bool | None]:
    machine = describe_machine()
    gpus, trouble = [], []
    minor = error = math.nan
    try:
        machine |= describe_torch()
        minor = minor_version(machine["torch"]["version"])
        if minor < 11:
            trouble.append("this PyTorch is too old: make quickstart")
        error = sum_between_two()  # before CUDA starts, which does not survive a fork
    except (ImportError, OSError) as failure:  # OSError: a library that torch needs is not there
        trouble.append(f"{failure}: make quickstart")
    except (RuntimeError, multiprocessing.TimeoutError) as failure:
        trouble.append(f"{failure or 'no sum in 60 s'}: export GLOO_SOCKET_IFNAME=lo")
    if "torch" in machine:
        gpus = describe_gpus()
    machine |= {f"GPU {index}": gpu for index, gpu in enumerate(gpus)}
    warnings = warnings_about(machine) + trouble
    chapters = readiness()
    say(f"1 process on {'cuda' if gpus else 'cpu'}: {len(gpus)} NVIDIA GPUs that PyTorch can use")
    print_report(machine, warnings, chapters)
    if args.json:
        report = {"machine": machine, "warnings": warnings, "chapters": chapters}
        args.json.write_text(json.dumps(report, indent=1) + "\n")

    claims = [
        check("minor version of Python 3", sys.version_info.minor, 10, at_least=True),
        check("minor version of PyTorch 2", minor, 11, at_least=True),
        check("error of 2 processes that sum 1 MiB over gloo", error, 0),
    ]
    for index, gpu in enumerate(gpus):
        claims.append(check(f"error of GPU {index}'s matrix product", gpu["error"], 0))
    return claims


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="also write all this to this file")
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


if __name__ == "__main__":
    main()
