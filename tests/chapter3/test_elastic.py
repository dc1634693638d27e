"""Checkpoint, resume, restart: kill it anywhere, break what it saved; nothing may be lost."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import random
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
import warm
from mutants import failed_claims

NAME = "train_elastic_checkpoint.py"
CODE = Path("chapter3-distributed-training-with-pytorch-ddp/code")
SCRIPT = warm.ROOT / CODE / NAME
TINY = "--width 16 --heads 2 --layers 1 --context 16 --batch 7 --steps 17 --every 4"
RESUMED = "--kill-at 0"
full = pytest.mark.full


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text of 8 batches: 17 steps go into its third epoch, and checkpoints lie at an
    epoch's end (8, 16) and within one (4, 12).
    """
    folder = tmp_path_factory.mktemp("elastic")
    (folder / "text").write_bytes((warm.ROOT / "resources/corpus.txt").read_bytes()[:1000])
    return folder


def command(world_size: int, folder: Path, flags: str, script: Path = SCRIPT) -> str:
    """A launch that keeps its checkpoints in `folder` and writes a record beside it."""
    text = folder.parent / "text"
    where = f"--data {text} --dir {folder} --json {folder}.json"
    launcher = f"OMP_NUM_THREADS=1 torchrun --nproc_per_node={world_size}"  # also for one rank
    return f"{launcher} {script} {where} {TINY} {flags}"


def launch(world_size: int, folder: Path, flags: str, script: Path = SCRIPT) -> warm.Result:
    return warm.run(command(world_size, folder, flags, script), folder.parent, timeout=120)


def digest(folder: Path) -> str:
    return json.loads(Path(f"{folder}.json").read_text())["digest"]


def ended_well(result: warm.Result) -> None:
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith("all 4 checks ok\n"), result.stdout


def sound(checkpoint: Path) -> bool:
    """What `sha256sum -c` says."""
    program = ["sha256sum"] if shutil.which("sha256sum") else ["shasum", "-a", "256"]
    argv = [*program, "-c", "SHA256SUMS"]
    return (checkpoint / "SHA256SUMS").exists() and not subprocess.run(
        argv, cwd=checkpoint, capture_output=True
    ).returncode


def tree(folder: Path) -> dict[str, str]:
    """Every file with the digest of its bytes."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


@pytest.fixture(scope="module")
def undisturbed(work: Path) -> Callable[[int], str]:
    """The digest that a run ends with if nothing happens to it, by number of ranks."""
    digests: dict[int, str] = {}

    def get(world_size: int) -> str:
        if world_size not in digests:
            folder = work / f"undisturbed-{world_size}"
            ended_well(launch(world_size, folder, "--kill-at 0"))
            digests[world_size] = digest(folder)
        return digests[world_size]

    return get


@pytest.fixture(scope="module")
def stopped(work: Path) -> Callable[[int], Path]:
    """A run that was killed in step 15. It has saved steps 8 and 12, the latter mid-epoch."""
    folders: dict[int, Path] = {}

    def get(world_size: int) -> Path:
        if world_size not in folders:
            folder = folders[world_size] = work / f"stopped-{world_size}"
            assert launch(world_size, folder, "--kill-at 15").returncode == 1
            names = sorted(path.name for path in folder.glob("step-*"))
            assert names == ["step-000008", "step-000012"]
        return folders[world_size]

    return get


@pytest.fixture
def copy(
    stopped: Callable[[int], Path], work: Path, request: pytest.FixtureRequest
) -> Iterator[Path]:
    """A copy of what a run of one rank has left, or of as many as the test asks for."""
    folder = work / f"copy-{time.monotonic_ns()}"
    shutil.copytree(stopped(getattr(request, "param", 1)), folder)
    yield folder
    shutil.rmtree(folder)


OF_3_RANKS = pytest.mark.parametrize("copy", [3], indirect=True)


# --- killed -------------------------------------------------------------------------------------


def ranks_in(folder: Path, count: int) -> list[psutil.Process]:
    """The processes that work in a folder, as soon as there are `count` of them."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        found = []
        for process in psutil.process_iter():
            try:
                if process.cwd() == str(folder) and process.pid != os.getpid():
                    found.append(process)
            except psutil.Error:
                continue
        if len(found) >= count:
            return found
        time.sleep(0.01)
    raise TimeoutError(f"no {count} processes in {folder}, but {found}")


def disturbed(
    world_size: int, folder: Path, flags: str, disturb: Callable[[], None]
) -> warm.Result:
    """Launch, and do something to the run while it goes on."""
    results: list[warm.Result] = []
    run = threading.Thread(target=lambda: results.append(launch(world_size, folder, flags)))
    run.start()
    try:
        disturb()
    finally:
        run.join()
    return results[0]


@full
@pytest.mark.parametrize("case", range(5))
def test_kills_lose_nothing(
    work: Path, undisturbed: Callable[[int], str], case: int, tmp_path: Path
) -> None:
    """By itself at a random step or while saving, or from outside at a random moment."""
    draw = random.Random(case)
    world_size = 1 + (case + 2) % 3
    folder = tmp_path / "run"
    shutil.copy(work / "text", tmp_path)
    step, rank = draw.randint(1, 17), draw.randrange(world_size)

    def kill() -> None:
        victim = draw.choice(ranks_in(tmp_path, world_size))
        time.sleep(draw.uniform(0, 0.3))
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()

    if case % 5 == 4:
        result = disturbed(world_size, folder, RESUMED, kill)
        last = None
        if result.returncode == 0:  # a fast machine was done before
            assert digest(folder) == undisturbed(world_size)
            return
    elif case % 5 == 3:
        step = draw.choice([4, 8, 12, 16])
        result = launch(world_size, folder, f"--kill-at 0 --kill-during-save {step}")
        last = step - 4
    else:
        result = launch(world_size, folder, f"--kill-at {step} --kill-rank {rank}")
        last = (step - 1) // 4 * 4
    assert result.returncode == 1, result.stdout
    assert all(sound(path) for path in folder.glob("step-*"))
    result = launch(world_size, folder, RESUMED)
    ended_well(result)
    if last is not None:
        assert f"from step {last} (" in result.stdout
    assert "not sound" not in result.stdout
    assert digest(folder) == undisturbed(world_size)
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("killed"))
    assert names == ["finished", "lock", "step-000016", "step-000017"]


@full
def test_several_kills_in_one_run(work: Path, undisturbed: Callable[[int], str]) -> None:
    """Rank 0, another rank, the same step for two ranks, and rank 0 while it saves."""
    folder = work / "several"
    flags = "--kill-at 10 15 15 --kill-rank 0 1 2 --kill-during-save 12"
    for start in (0, 8, 8):
        result = launch(3, folder, flags)
        assert result.returncode == 1
        assert f"3 ranks on cpu, from step {start} (" in result.stdout
    for _ in range(2):  # whether ranks 1 and 2 both die at once is for the scheduler to say
        result = launch(3, folder, flags)
        if result.returncode == 0:
            break
    ended_well(result)
    assert "per kill: " in result.stdout
    assert digest(folder) == undisturbed(3)


@full
def test_torchrun_restarts_it(work: Path, tmp_path: Path) -> None:
    """The launcher itself: a rank is killed from outside, and the same launch goes on. Rank 1
    comes late to the restart, when the store still has the address of the one that was killed.
    """
    shutil.copy(work / "text", tmp_path)
    folder = tmp_path / "run"
    join = "    device = join_new_group(args.device)\n"
    late = "int(os.environ['RANK']) * (os.environ['TORCHELASTIC_RESTART_COUNT'] != '0')"
    script = mutant(join, f"    time.sleep(0.5 * {late})\n{join}", tmp_path / "late.py")
    line = command(2, folder, "--kill-at 0 --steps 150", script)
    line = line.replace("torchrun", "torchrun --max-restarts=2", 1)
    results: list[warm.Result] = []
    run = threading.Thread(
        target=lambda: results.append(warm.run_cold(warm.parse_command(line), tmp_path, 120))
    )
    run.start()
    while run.is_alive() and not list(folder.glob("step-*")):
        time.sleep(0.01)
    here = ranks_in(tmp_path, 3)  # and the launcher
    next(process for process in here if process.environ().get("RANK") == "1").kill()
    run.join()
    ended_well(results[0])
    starts = [line for line in results[0].stdout.splitlines() if line.startswith("2 ranks on cpu")]
    assert len(starts) == 2
    assert "nothing saved yet" not in starts[1]


@full
def test_sigterm_saves_and_resumes(work: Path, tmp_path: Path) -> None:
    """One rank is told to stop; all of them stop after the same step, and it is on the disk."""
    shutil.copy(work / "text", tmp_path)
    folder = tmp_path / "run"

    def terminate() -> None:
        ranks = ranks_in(tmp_path, 3)
        while not list(folder.glob("step-*")):
            time.sleep(0.005)
        ranks[-1].terminate()

    result = disturbed(3, folder, "--kill-at 0 --steps 300", terminate)
    assert result.returncode == 1
    assert result.stderr == ""
    *_, last = result.stdout.splitlines()
    assert last.startswith("told to stop: ends after step ")
    step = int(last.split()[6].rstrip(","))
    assert 4 < step < 300
    assert sound(folder / f"step-{step:06}")
    result = launch(3, folder, "--kill-at 0 --steps 300")
    assert f"from step {step} (" in result.stdout
    ended_well(result)


@full
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 3)])
def test_other_number_of_ranks(work: Path, before: int, after: int) -> None:
    """The same global batches; without dropout the same losses too (the script's own checks)."""
    folder = work / f"from-{before}-to-{after}"
    assert launch(before, folder, "--dropout 0 --kill-at 14").returncode == 1
    result = launch(after, folder, f"--dropout 0 {RESUMED}")
    ended_well(result)
    assert result.stdout.count(f"saved by {before} rank") == 1
    assert "check: max |loss - loss undisturbed| = " in result.stdout


@full
@OF_3_RANKS
def test_other_number_of_ranks_with_dropout(copy: Path) -> None:
    """Dropout must differ: what is left to check is the batches and that ranks agree."""
    result = launch(2, copy, RESUMED)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "saved by 3 ranks on cpu: dropout goes on from seed, step and rank\n" in result.stdout
    assert result.stdout.endswith("all 3 checks ok\n")


# --- what was saved is broken -------------------------------------------------------------------


def truncate(checkpoint: Path) -> None:
    os.truncate(checkpoint / "state.pt", (checkpoint / "state.pt").stat().st_size // 2)


def flip_a_bit(checkpoint: Path) -> None:
    content = bytearray((checkpoint / "state.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (checkpoint / "state.pt").write_bytes(content)


def lose_the_state(checkpoint: Path) -> None:
    (checkpoint / "state.pt").unlink()


def lose_the_sums(checkpoint: Path) -> None:
    (checkpoint / "SHA256SUMS").unlink()


def empty_the_sums(checkpoint: Path) -> None:
    (checkpoint / "SHA256SUMS").write_bytes(b"")


def garble_the_sums(checkpoint: Path) -> None:
    (checkpoint / "SHA256SUMS").write_bytes(b"\xff\x00 state.pt\n")


def empty_the_folder(checkpoint: Path) -> None:
    lose_the_state(checkpoint)
    lose_the_sums(checkpoint)


def put_a_file_there(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.write_bytes(b"")


def save_something_else(checkpoint: Path) -> None:
    """Its sum is right; that it cannot be loaded safely must not end the run either."""
    content = b"cos\nsystem\n(S'true'\ntR."
    (checkpoint / "state.pt").write_bytes(content)
    sums = f"{hashlib.sha256(content).hexdigest()}  state.pt\n"
    (checkpoint / "SHA256SUMS").write_text(sums)


DAMAGES: dict[Callable[[Path], None], str] = {
    truncate: "state.pt is not what SHA256SUMS says",
    flip_a_bit: "state.pt is not what SHA256SUMS says",
    lose_the_state: "No such file",
    lose_the_sums: "No such file",
    empty_the_sums: "state.pt is not what SHA256SUMS says",
    garble_the_sums: "state.pt is not what SHA256SUMS says",
    empty_the_folder: "No such file",
    put_a_file_there: "Not a directory",
    save_something_else: "Weights only load failed",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_checkpoint_that_is_damaged_is_not_taken(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    script = module()
    for step in (8, 12):
        script.save_checkpoint(tmp_path, {"step": step, "numbers": list(range(100))}, keep=2)
    damage(tmp_path / "step-000012")
    state, unsound = script.newest_sound(tmp_path)
    assert state["step"] == 8
    assert list(unsound) == [tmp_path / "step-000012"]
    assert DAMAGES[damage] in unsound[tmp_path / "step-000012"]


@full
def test_falls_back_to_the_one_before(copy: Path, undisturbed: Callable[[int], str]) -> None:
    flip_a_bit(copy / "step-000012")
    result = launch(1, copy, RESUMED)
    ended_well(result)
    (said,) = [line for line in result.stdout.splitlines() if "not sound" in line]
    assert said.startswith("step-000012 is not sound (")
    assert said.endswith("): back to step 8")
    assert "1 rank on cpu, from step 8 (" in result.stdout
    assert (copy / "aside-1" / "step-000012").exists()  # kept, for whoever wants to know why
    assert digest(copy) == undisturbed(1)


@full
@OF_3_RANKS
def test_none_is_sound(copy: Path, undisturbed: Callable[[int], str]) -> None:
    """It stops rather than begin again, and touches nothing; --fresh begins again."""
    truncate(copy / "step-000012")
    empty_the_folder(copy / "step-000008")
    before = tree(copy)
    result = launch(3, copy, RESUMED)
    assert result.returncode == 1  # torchrun's; the ranks' is 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert "step-000012 is not sound" in result.stderr
    assert "--fresh starts again from step 0" in result.stderr
    assert tree(copy) == before
    result = launch(3, copy, f"{RESUMED} --fresh")
    ended_well(result)
    assert "the run that was there is now in aside-1" in result.stdout
    assert digest(copy) == undisturbed(3)
    kept = {f"aside-1/{name}": was for name, was in before.items() if name != "lock"}
    assert kept.items() <= tree(copy).items()


@full
@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--width 24", "width 16, not 24"),
        ("--batch 5 --seed 1", "batch 7, not 5; seed 0, not 1"),
        (f"--data {warm.ROOT}/LICENSE", "data "),
    ],
)
def test_other_flags_are_refused(copy: Path, flags: str, says: str) -> None:
    before = tree(copy)
    result = launch(2, copy, f"{RESUMED} {flags}")
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert f" has a run with {says}" in result.stderr
    assert tree(copy) == before


@full
def test_two_runs_in_one_folder(copy: Path) -> None:
    before = tree(copy)
    with (copy / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = launch(2, copy, RESUMED)
    assert result.returncode == 1
    assert result.stderr == f"another run is at work in {copy}: give another --dir\n"
    assert tree(copy) == before


@full
def test_a_finished_run_is_set_aside(work: Path, undisturbed: Callable[[int], str]) -> None:
    expected, folder = undisturbed(2), work / "undisturbed-2"
    before = tree(folder)
    result = launch(2, folder, "--kill-at 0")
    ended_well(result)
    assert "the run that was there is now in aside-1" in result.stdout
    assert "from step 0 (nothing saved yet)" in result.stdout
    assert digest(folder) == expected
    kept = {f"aside-1/{name}": was for name, was in before.items() if name != "lock"}
    assert kept.items() <= tree(folder).items()


@full
def test_a_full_disk_costs_a_checkpoint_and_not_the_run(
    copy: Path, undisturbed: Callable[[int], str], work: Path
) -> None:
    """No file may grow beyond 20 kB from here on: each save fails halfway, in the kernel."""
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
    script = work / "full_disk.py"
    script.write_text(SCRIPT.read_text().replace("import argparse\n", f"{limit}import argparse\n"))
    result = launch(1, copy, RESUMED, script)
    assert result.returncode == 1
    for step in (16, 17):
        failed = f"step {step}: saving failed (File too large), the newest is step-000012\n"
        assert failed in result.stdout
    assert "steps that the newest checkpoint lacks = 5 <= 0  FAILED on rank 0" in result.stdout
    assert result.stdout.endswith("1 of 4 checks FAILED\n")  # it did train to the end
    assert all(sound(path) for path in copy.glob("step-*"))
    assert not (copy / "partial").exists()
    result = launch(1, copy, RESUMED)
    assert "from step 12 (" in result.stdout
    ended_well(result)
    assert digest(copy) == undisturbed(1)


@full
def test_more_ranks_than_windows(work: Path) -> None:
    """A rank with nothing to do in any step takes part all the same."""
    folder = work / "few"
    assert launch(3, folder, "--batch 2 --kill-at 11 --kill-rank 2").returncode == 1
    ended_well(launch(3, folder, f"--batch 2 {RESUMED}"))


# --- saving, without ranks ----------------------------------------------------------------------


class PowerOff(BaseException):
    """What SIGKILL looks like from within."""


def module(source: str = "") -> ModuleType:
    """The script, or a changed one, as a module."""
    made = ModuleType("elastic")
    exec(compile(source or SCRIPT.read_text(), str(SCRIPT), "exec"), made.__dict__)  # noqa: S102 - ours
    return made


def saving_at_every_point(script: ModuleType, folder: Path, error: BaseException) -> None:
    """Let the n-th thing that `save` does to the disk fail, half done, for every n."""
    state: dict[str, Any] = {"step": 0, "numbers": list(range(100))}
    done: list[str] = []
    fail_at = 0

    def failing(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def replacement(*args: Any, **options: Any) -> Any:
            done.append(name)
            if len(done) == fail_at:
                if name == "write_bytes":
                    original(args[0], args[1][: len(args[1]) // 2])
                if name == "unlink":
                    original(*args, **options)
                raise error
            return original(*args, **options)

        return replacement

    while fail_at == 0 or len(done) >= fail_at:
        fail_at += 1
        here = folder / f"{fail_at}"
        here.mkdir()
        for step in (10, 20):
            script.save_checkpoint(here, state | {"step": step}, keep=2)
        done.clear()
        with pytest.MonkeyPatch.context() as patch:
            for owner, name in (
                (Path, "write_bytes"), (Path, "mkdir"), (Path, "rename"),
                (os, "fsync"), (os, "unlink"), (os, "rmdir"),
            ):  # fmt: skip
                patch.setattr(owner, name, failing(name, getattr(owner, name)))
            with contextlib.suppress(PowerOff, OSError):
                script.save_checkpoint(here, state | {"step": 30}, keep=2)
        assert all(sound(path) for path in here.glob("step-*"))
        found, unsound = script.newest_sound(here)
        renamed = "rename" in done[:-1]
        assert found == state | {"step": 30 if renamed else 20}, done
        assert not unsound
        assert len(list(here.glob("step-*"))) >= 2
        script.save_checkpoint(here, state | {"step": 40}, keep=2)
        assert [path.name[-2:] for path in script.checkpoints(here)][-1] == "40"
        assert len(script.checkpoints(here)) == 2
        assert not (here / "partial").exists()
    assert done.count("rename") == 2


@pytest.mark.parametrize(
    "error", [PowerOff(), OSError(errno.ENOSPC, "No space left on device")], ids=["kill", "full"]
)
def test_saving_may_end_at_every_point(tmp_path: Path, error: BaseException) -> None:
    saving_at_every_point(module(), tmp_path, error)


def test_a_device_that_is_full(tmp_path: Path) -> None:
    """The kernel's own ENOSPC."""
    if Path("/dev/full").exists():
        with pytest.MonkeyPatch.context() as patch:
            write = Path.write_bytes
            patch.setattr(Path, "write_bytes", lambda _, content: write(Path("/dev/full"), content))
            with pytest.raises(OSError, match="No space left"):
                module().save_checkpoint(tmp_path, {"step": 1}, keep=1)
    assert not list(tmp_path.glob("step-*"))


def order_of_syncs(script: ModuleType, folder: Path) -> None:
    """Bytes, then the names of the files, then the folder's new name are on the disk; then the
    oldest may go.
    """
    events: list[str] = []

    def fsync(descriptor: int) -> None:
        inode = os.fstat(descriptor).st_ino
        known = [folder, *folder.rglob("*")]
        path = next(path for path in known if path.stat().st_ino == inode)
        events.append(f"sync {path.relative_to(folder)}")

    def rename(path: Path, target: Path) -> Path:
        events.append(f"rename {path.name} {target.name}")
        os.rename(path, target)
        return target

    script.save_checkpoint(folder, {"step": 10}, keep=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        patch.setattr(Path, "rename", rename)
        script.save_checkpoint(folder, {"step": 20}, keep=1)
    assert set(events[:2]) == {"sync partial/state.pt", "sync partial/SHA256SUMS"}
    assert events[2:] == [
        "sync partial", "rename partial step-000020", "sync .", "rename step-000010 partial",
    ]  # fmt: skip


def test_order_of_syncs(tmp_path: Path) -> None:
    order_of_syncs(module(), tmp_path)


def test_checkpoints_are_sorted_by_step(tmp_path: Path) -> None:
    script = module()
    for step in (999_999, 1_000_000, 30):
        script.save_checkpoint(tmp_path, {"step": step}, keep=3)
    assert script.newest_sound(tmp_path)[0] == {"step": 1_000_000}


# --- mutants ------------------------------------------------------------------------------------


def mutant(right: str, wrong: str, path: Path) -> Path:
    source = SCRIPT.read_text()
    assert source.count(right) == 1, right
    path.write_text(source.replace(right, wrong))
    return path


MUTANTS = [  # ranks, a piece of the source, what it becomes
    (1, "source.set_rng_state(saved)", "pass"),
    (1, "self.sampler, self.step, self.args.steps", "self.sampler, 0, self.args.steps - self.step"),
    (1, '        self.scheduler.load_state_dict(state["scheduler"])\n', ""),
    (1, ", generator=generator", ""),  # the loader's seed comes from where dropout draws
    (2, 'state["rng"][self.rank]', 'state["rng"][0]'),  # every rank draws as rank 0 does
    (2, '        self.optimizer.load_state_dict(state["optimizer"])\n', ""),
    (3, "        self.model(windows[:1, :-1].to(device)).sum().backward()\n", ""),
]


@full
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_mutants_that_resume_wrongly_are_caught(
    work: Path, stopped: Callable[[int], Path], world_size: int, tmp_path: Path
) -> None:
    """The script's own check against the undisturbed run must see it."""
    mutants = [("", ""), *((right, wrong) for n, right, wrong in MUTANTS if n == world_size)]
    cases = []
    for number, mutation in enumerate(mutants):
        folder = shutil.copytree(stopped(world_size), tmp_path / f"{number}")
        cases.append((f"--data {work}/text --dir {folder} {TINY} {RESUMED}", *mutation))
    right, *wrong = failed_claims(SCRIPT, world_size, cases)
    assert right == set()
    for failed in wrong:
        assert any("undisturbed run's = 1 <= 0" in line for line in failed), failed
    finished = [
        number for number in range(len(cases)) if (tmp_path / f"{number}/finished").exists()
    ]
    assert finished == [0]


@full
def test_mutant_that_does_not_look_at_the_sums_is_caught(copy: Path, work: Path) -> None:
    script = mutant("!= sums(content)", '== b"no"', work / "mutant.py")
    flip_a_bit(copy / "step-000012")
    result = launch(1, copy, RESUMED, script)
    assert "state.pt is not what SHA256SUMS says" not in result.stdout
    assert "from step 12 (" in result.stdout or "Error" in result.stderr, result.stderr


@full
def test_mutant_that_writes_in_place_is_caught(work: Path) -> None:
    """Killed while saving it leaves half a checkpoint where a whole one is looked for."""
    right = 'folder / "partial"\n    shutil'
    script = mutant(
        right, right.replace('"partial"', "f\"step-{state['step']:06}\""), work / "m.py"
    )
    folder = work / "in-place"
    launch(2, folder, "--kill-at 0 --kill-during-save 8", script)
    assert (folder / "step-000008" / "state.pt").exists()
    assert not sound(folder / "step-000008")


@full
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("        sync(path)\n", "        pass\n"),
        ('SHA256SUMS", partial):', 'SHA256SUMS"):'),
        ("    sync(folder)  #", "    #"),
        ("        os.fsync(descriptor)\n", "        pass\n"),
    ],
)
def test_mutants_that_do_not_sync_are_caught(tmp_path: Path, right: str, wrong: str) -> None:
    script = module(mutant(right, wrong, tmp_path / "mutant.py").read_text())
    (tmp_path / "run").mkdir()
    with pytest.raises(AssertionError):
        order_of_syncs(script, tmp_path / "run")


@full
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        # the old ones go before the new one is there
        ("    partial.rename(folder / f\"step-{state['step']:06}\")\n",
         "    for old in checkpoints(folder)[:1]:\n        shutil.rmtree(old)\n"
         "    partial.rename(folder / f\"step-{state['step']:06}\")\n"),
        ("shutil.rmtree(old.rename(partial))", "shutil.rmtree(old)"),  # a kill leaves half of it
        ("    shutil.rmtree(partial, ignore_errors=True)  #", "    #"),  # no save after a killed one
    ],
)  # fmt: skip
def test_mutants_that_delete_wrongly_are_caught(tmp_path: Path, right: str, wrong: str) -> None:
    script = module(mutant(right, wrong, tmp_path / "mutant.py").read_text())
    (tmp_path / "run").mkdir()
    with pytest.raises((AssertionError, FileExistsError)):
        saving_at_every_point(script, tmp_path / "run", PowerOff())
