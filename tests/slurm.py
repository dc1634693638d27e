"""A real Slurm cluster of two nodes on this machine, for a test: no root, no systemd, no port of Slurm's.

Each node is a slurmd of its own. The nodes are called 127.0.0.1 and 127.0.0.2, so that their names
lead somewhere without a name server, and each has two GPUs that are none.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import warm

NODES = ("127.0.0.1", "127.0.0.2")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "DEADLINE"}
CONF = """\
ClusterName=book
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1
ReturnToService=2
GresTypes=gpu
NodeName=127.0.0.1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cpus} Gres=gpu:2
NodeName=127.0.0.2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs={cpus} Gres=gpu:2
PartitionName=all Nodes=ALL Default=YES MaxTime=10 State=UP
"""
GRES = "Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n"
CGROUP = "CgroupPlugin=cgroup/v1\n"  # the one that does nothing until it is asked to


@dataclass(frozen=True)
class Cluster:
    folder: Path
    environment: dict[str, str]

    def run(self, *argv: str, cwd: Path, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """Run one of Slurm's commands; PATH finds the book's Python first."""
        return subprocess.run(
            argv,
            cwd=cwd,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def job(self, number: str) -> dict[str, str]:
        """What Slurm knows of a job: JobState, Restarts, ExitCode and many more."""
        said = self.run("scontrol", "--oneliner", "show", "job", number, cwd=self.folder)
        return dict(part.partition("=")[::2] for part in said.stdout.split() if "=" in part)

    def wait(self, number: str, states: set[str], timeout: float = 60) -> dict[str, str]:
        """Wait until a job is in one of these states, and return what is known of it."""
        deadline = time.monotonic() + timeout
        while (job := self.job(number)).get("JobState") not in states:
            assert time.monotonic() < deadline, f"after {timeout:g} s: {job}\n{self.logs()}"
            time.sleep(0.1)
        return job

    def logs(self) -> str:
        """The ends of the daemons' logs, for the message of a test that fails."""
        return "\n".join(
            f"--- {log.name}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            for log in sorted(self.folder.glob("*.log"))
        )

    def mine(self) -> list[psutil.Process]:
        """The processes of this cluster: its daemons, its jobs, and those of its commands.

        Those of a job have its environment; a slurmstepd hides its own, but not where it runs.
        """
        found = []
        conf = self.environment["SLURM_CONF"]
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                here = process.cwd() == str(self.folder)
                if here or process.environ().get("SLURM_CONF") == conf:
                    found.append(process)
        return found


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """Start the daemons in a folder; at the end kill them, and every job that still runs."""
    variables = {k: v for k, v in warm.environment().items() if not k.startswith(("SLURM", "SRUN"))}
    variables["PATH"] += os.pathsep + os.pathsep.join(["/usr/sbin", "/sbin"])
    variables["SLURM_CONF"] = f"{folder}/slurm.conf"
    programs = [shutil.which(program, path=variables["PATH"]) for program in PROGRAMS]
    if None in programs:
        pytest.skip("needs Slurm: apt-get install slurm-wlm munge")
    for name in ("state", *NODES):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(128))
    user, host, ports = psutil.Process().username(), socket.gethostname(), free_ports(3)
    conf = CONF.format(folder=folder, user=user, host=host, ports=ports, cpus=os.cpu_count())
    for name, text in (("slurm.conf", conf), ("gres.conf", GRES), ("cgroup.conf", CGROUP)):
        (folder / name).write_text(text)
    # --force: pytest's folder is closed to other users, who have no business with this socket
    munged = ["munged", "--foreground", "--force", "--num-threads=2", f"--key-file={key}"]
    munged += [f"--{kind}-file={folder}/munge.{kind}" for kind in ("log", "pid", "seed")]
    munged += [f"--socket={folder}/munge.socket"]
    running = Cluster(folder, variables)
    started: list[subprocess.Popen[bytes]] = []

    def start(name: str, *argv: str) -> None:
        with (folder / f"{name}.log").open("wb") as log:
            started.append(
                subprocess.Popen(
                    argv,
                    cwd=folder,
                    env=variables,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )

    try:
        start("munged", *munged)
        wait_until((folder / "munge.socket").exists, running)
        start("slurmctld", "slurmctld", "-D")
        for node in NODES:
            start(node, "slurmd", "-D", "-N", node)
        idle = ["sinfo", "--noheader", "--states=idle", "--format=%D"]
        wait_until(lambda: running.run(*idle, cwd=folder).stdout.strip() == "2", running)
        yield running
    finally:
        while processes := running.mine():  # until no daemon is left that could start one more
            for process in processes:
                with contextlib.suppress(psutil.Error):
                    process.send_signal(signal.SIGKILL)
            psutil.wait_procs(processes, timeout=5)
            for daemon in started:
                daemon.poll()


def wait_until(ready: Callable[[], bool], running: Cluster, timeout: float = 30) -> None:
    deadline = time.monotonic() + timeout
    while not ready():
        assert time.monotonic() < deadline, f"no cluster after {timeout:g} s\n{running.logs()}"
        time.sleep(0.05)


def free_ports(count: int) -> list[int]:
    ports: set[int] = set()
    while len(ports) < count:
        ports.add(warm._free_port())
    return list(ports)
