"""Run a printed command: cold as a reader does, or warm, forked from a parent that has torch.

A launch spends 2 s per process on `import torch`, which is most of what the suite would do. The
warm parent (the standard library's forkserver) imports torch once and forks each rank in 20 ms.
It has run no tensor operation, so it has no thread pool and no CUDA context that a fork could
break. What forking cannot imitate (another launcher, other flags of torchrun, variables set on the
command line) runs cold, and `pytest --cold` runs everything so.
"""

import atexit
import contextlib
import importlib.util
import inspect
import multiprocessing
import os
import pickle
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
from book import Command, parse_command

ROOT = Path(__file__).resolve().parent.parent
TIMED_OUT = 124  # what timeout(1) returns
GRACE_S = 1.0  # between the first rank's failure and SIGTERM to the others
KILL_S = 4.0  # between SIGTERM and SIGKILL
PRELOAD = [
    "pytest",  # a child imports the program that started the suite
    "torch",
    "torch.distributed",
    "torch.nn.parallel",
    "torch.profiler",
    "torch._dynamo",
    "torch.utils.flop_counter",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.distributed.checkpoint",
    "numpy",
    "matplotlib.pyplot",
    "tqdm",
]


@dataclass(frozen=True)
class Result:
    stdout: str
    stderr: str
    returncode: int  # negative: killed by that signal; 124: ran past its time limit
    seconds: float


class RankError(RuntimeError):
    """A rank of `fork_ranks` raised; `error` is its exception, the message has its traceback."""

    def __init__(self, rank: int, error: BaseException | None, details: str):
        super().__init__(f"rank {rank}: {details}")
        self.rank, self.error = rank, error


def run(command: str | Command, cwd: Path = ROOT, timeout: float = 300) -> Result:
    """Run a command warm where that is faithful; cold otherwise, or when COLD=1."""
    if isinstance(command, str):
        command = parse_command(command)
    cold = os.environ.get("COLD", "0") not in ("", "0") or warm_plan(command, cwd) is None
    return (run_cold if cold else run_warm)(command, cwd, timeout)


def run_cold(command: Command, cwd: Path, timeout: float) -> Result:
    """Run a command as a shell would, with nothing on stdin; on a timeout kill all it started."""
    start = time.monotonic()
    with _outputs() as (out, err):
        # Popen looks the program up in our PATH, not in the one that it hands over
        folder = Path(sys.executable).parent
        program = command.argv[0] if not (folder / command.argv[0]).exists() else None
        argv = [program or str(folder / command.argv[0]), *command.argv[1:]]
        if command.session:
            argv = ["bash", "-ec", on_free_ports(command.text) + "\nwait $!"]
        with out.open("w") as stdout, err.open("w") as stderr:
            process = subprocess.Popen(
                argv,
                cwd=cwd,
                env=environment() | dict(command.env),
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )
            try:
                code = process.wait(timeout)
            except subprocess.TimeoutExpired:
                code = TIMED_OUT
            finally:
                _kill_tree(process)
        return Result(_text(out), _text(err), code, time.monotonic() - start)


def on_free_ports(text: str) -> str:
    """The lines of a session with a free port for each 8xxx, which may be taken on this machine."""
    ports: dict[str, str] = {}
    free = lambda match: ports.setdefault(match[0], str(_free_port()))  # noqa: E731
    return re.sub(r"(?<=[: =])8\d{3}\b", free, text)


def run_warm(command: Command, cwd: Path, timeout: float) -> Result:
    """Run `python SCRIPT` or `torchrun --nproc_per_node=N SCRIPT` in forked processes."""
    plan = warm_plan(command, cwd)
    if plan is None:
        raise ValueError(f"cannot run warm: {command.text}")
    world_size, argv = plan
    start = time.monotonic()
    with _outputs() as (out, err):
        variables = _rank_environments(world_size) if world_size else [environment()]
        ranks = [
            _context().Process(
                target=_script, args=(argv, v | dict(command.env), str(cwd), str(out), str(err))
            )
            for v in variables
        ]
        codes = _supervise(ranks, timeout)
        code = int(any(codes)) if world_size else codes[0]  # torchrun makes a 1 of all failures
        if TIMED_OUT in codes:
            code = TIMED_OUT
        return Result(_text(out), _text(err), code, time.monotonic() - start)


def warm_plan(command: Command, cwd: Path = ROOT) -> tuple[int, list[str]] | None:
    """World size (0 without a launcher) and the script with its arguments; None: must run cold."""
    program, *rest = command.argv
    variables = {name for name, _ in command.env} - {"OMP_NUM_THREADS"}  # torch read them on import
    if variables or program not in ("python", "torchrun"):
        return None
    ranks = 0
    if program == "torchrun":
        ranks = 1
        while rest and rest[0].startswith("-"):
            flag, _, value = rest.pop(0).replace("_", "-").partition("=")
            if flag == "--nproc-per-node":
                value = value or (rest.pop(0) if rest else "")
                if not value.isdigit() or int(value) == 0:
                    return None
                ranks = int(value)
            elif flag != "--standalone" or value:
                return None
    if not rest or not rest[0].endswith(".py"):
        return None
    script = Path(cwd, rest[0])  # one that goes on as another Python is not to be forked
    other = script.is_file() and "    enter_environment(" in script.read_text(encoding="utf-8")
    return None if other else (ranks, rest)


def fork_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 180
) -> list[Any]:
    """Call a module's `function(*args)` in `world_size` ranks of a gloo group; results by rank.

    The function and its arguments are pickled. An exception in a rank, or a rank that dies or is
    late, raises RankError here and ends the others.
    """
    module = (function.__module__, str(inspect.getsourcefile(function)))
    work = (module, function.__qualname__, pickle.dumps(args))
    pipes = [_context().Pipe(duplex=False) for _ in range(world_size)]
    ranks = [
        _context().Process(target=_function, args=(writer, variables, *work))
        for (_, writer), variables in zip(pipes, _rank_environments(world_size), strict=True)
    ]
    answers: dict[int, Any] = {}
    failures: list[tuple[float, RankError]] = []
    readers = {reader: rank for rank, (reader, _) in enumerate(pipes)}

    def collect(seconds: float) -> None:
        for reader in connection.wait(list(readers), seconds):
            assert isinstance(reader, connection.Connection)
            rank = readers.pop(reader)
            with contextlib.suppress(EOFError):  # it died without a word
                sent = pickle.loads(reader.recv_bytes())  # noqa: S301 - from our own fork
                when, answer, error, details = sent
                answers[rank] = answer
                if details:
                    failures.append((when, RankError(rank, error, details)))

    try:
        codes = _supervise(ranks, timeout, started=[w.close for _, w in pipes], poll=collect)
    finally:
        for reader, _ in pipes:
            reader.close()
    if failures:
        _, cause = min(failures, key=lambda failure: failure[0])  # the rest are its consequences
        raise cause from cause.error
    for rank, code in enumerate(codes):
        if code or rank not in answers:
            late = f"no result after {timeout:g} s"
            raise RankError(rank, None, late if code == TIMED_OUT else f"ended with {code}")
    return [answers[rank] for rank in range(world_size)]


def orphans(folder: Path) -> list[str]:
    """Command lines of running processes that work in a folder, besides this one."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.cwd() == str(folder.resolve()) and process.pid != os.getpid():
                found.append(shlex.join(process.cmdline()))
    return found


# --- in this process ---------------------------------------------------------------------------


def _context() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def _supervise(
    ranks: Sequence[BaseProcess],
    timeout: float,
    started: Sequence[Callable[[], None]] = (),
    poll: Callable[[float], None] | None = None,
) -> list[int]:
    """Start the ranks and wait; when one fails end the others, as torchrun does. Exit codes."""
    deadline = time.monotonic() + timeout
    failed_at: float | None = None
    late: set[BaseProcess] = set()
    terminated = False
    try:
        for rank in ranks:
            rank.start()
        for close in started:
            close()
        while True:
            if poll:
                poll(0)
            running = [rank for rank in ranks if rank.exitcode is None]
            now = time.monotonic()
            if not running:
                break
            if now > deadline:
                late = set(running)
                break
            if failed_at is None and any(rank.exitcode for rank in ranks):
                failed_at = now
            if failed_at is not None and now > failed_at + GRACE_S and not terminated:
                for rank in running:
                    rank.terminate()
                terminated = True
            if failed_at is not None and now > failed_at + GRACE_S + KILL_S:
                break
            connection.wait([rank.sentinel for rank in running], 0.05 if failed_at or poll else 0.5)
        if poll:
            poll(0)
    finally:
        for rank in ranks:
            if rank.pid is not None:
                _kill_tree(rank)
                rank.join()
    return [TIMED_OUT if rank in late else rank.exitcode or 0 for rank in ranks]


def _kill_tree(process: BaseProcess | subprocess.Popen[bytes]) -> None:
    """Kill a process, the group that it leads and its descendants (torchrun's lead their own)."""
    assert process.pid is not None
    family: list[psutil.Process] = []
    alive = process.poll() is None if isinstance(process, subprocess.Popen) else process.is_alive()
    if alive:
        with contextlib.suppress(psutil.Error):
            family = psutil.Process(process.pid).children(recursive=True)
        process.kill()
    for victim in family:
        with contextlib.suppress(psutil.Error):
            victim.kill()
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    if isinstance(process, subprocess.Popen):
        process.wait()


def environment() -> dict[str, str]:
    """Ours, without what pytest or an outer launcher adds; this Python's programs first."""
    ours = ("PYTEST_", "TORCHELASTIC_", "GROUP_", "ROLE_", "LOCAL_", "MASTER_")
    single = {"COLD", "RANK", "WORLD_SIZE"}
    kept = {k: v for k, v in os.environ.items() if not k.startswith(ours) and k not in single}
    programs = str(Path(sys.executable).parent)
    return kept | {"PATH": os.pathsep.join([programs, kept.get("PATH", os.defpath)])}


def _rank_environments(world_size: int) -> list[dict[str, str]]:
    """What torchrun sets for the ranks of one node."""
    size, port = str(world_size), str(_free_port())
    common = {
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": size,
        "ROLE_WORLD_SIZE": size,
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "ROLE_NAME": "default",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_RUN_ID": "none",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0",
    }
    if world_size > 1 and "OMP_NUM_THREADS" not in os.environ:
        common["OMP_NUM_THREADS"] = "1"
    return [
        environment() | common | {"RANK": str(r), "LOCAL_RANK": str(r), "ROLE_RANK": str(r)}
        for r in range(world_size)
    ]


def _free_port() -> int:
    """A free port outside the range that the kernel hands out, so that it stays free."""
    while True:
        port = random.SystemRandom().randint(15000, 30000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@contextlib.contextmanager
def _outputs() -> Iterator[tuple[Path, Path]]:
    with tempfile.TemporaryDirectory(prefix="book-") as folder:
        out, err = Path(folder, "stdout"), Path(folder, "stderr")
        out.touch()
        err.touch()
        yield out, err


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


# --- in a forked rank --------------------------------------------------------------------------


def _settle(variables: dict[str, str]) -> None:
    """Make a fork of the warm parent what a fresh process would be."""
    os.setsid()  # a group of its own, so that all it starts can be ended with it
    os.environ.clear()
    os.environ.update(variables)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()  # or all ranks share the parent's random state
    if "OMP_NUM_THREADS" in variables:
        import torch

        torch.set_num_threads(int(variables["OMP_NUM_THREADS"]))


def _script(argv: list[str], variables: dict[str, str], cwd: str, out: str, err: str) -> None:
    """Run a script as `python SCRIPT ARGS`; multiprocessing turns its end into the exit code."""
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    _settle(variables)
    os.chdir(cwd)
    multiprocessing.current_process().name = "MainProcess"
    script = Path(argv[0]).absolute()
    tests = Path(__file__).resolve().parent
    for name, module in list(sys.modules.items()):  # a script must not find the suite's modules
        source = getattr(module, "__file__", None)
        if source and Path(source).is_relative_to(tests):
            del sys.modules[name]
    kept = [p for p in sys.path if p and not Path(p).is_relative_to(tests) and Path(p) != ROOT]
    sys.path[:] = [str(script.parent), *kept]
    sys.argv[:] = argv
    if "RANK" in variables:  # torchrun starts `python -u`
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(write_through=True)  # type: ignore[union-attr]
    main = types.ModuleType("__main__")
    main.__file__ = str(script)
    sys.modules["__main__"] = main
    try:
        exec(compile(script.read_bytes(), str(script), "exec"), main.__dict__)  # noqa: S102 - what runpy does
    finally:
        _finish()


def _function(
    writer: connection.Connection,
    variables: dict[str, str],
    module: tuple[str, str],
    name: str,
    args: bytes,
) -> None:
    """Call the function inside a process group and send back what it returns."""
    _settle(variables)
    import torch.distributed as dist

    try:
        function = getattr(load(*module), name)
        dist.init_process_group("gloo")
        answer = function(*pickle.loads(args))  # noqa: S301 - from our own parent
        message = pickle.dumps((time.monotonic(), answer, None, ""))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException as error:
        now, details = time.monotonic(), traceback.format_exc()
        try:
            message = pickle.dumps((now, None, error, details))
            pickle.loads(message)  # noqa: S301 - our own
        except Exception:  # an exception that takes more than a message cannot be unpickled
            message = pickle.dumps((now, None, None, details))
    # Not multiprocessing's own pickling: torch would send handles of memory that dies with the rank
    writer.send_bytes(message)
    writer.close()
    _finish()


def load(name: str, path: str | Path) -> types.ModuleType:
    """Import a module by its file: pytest gives test modules names that only it can import."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def _finish() -> None:
    """What the interpreter does at its end, and a forked child leaves out."""
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
