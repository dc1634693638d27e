"""Goodput: the vectorised simulation against a loop, published intervals, the trainer's log, mutants."""

import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import warm

SCRIPT = warm.ROOT / "chapter8-distributed-ai-training-in-action/code/goodput.py"
script = warm.load("goodput", SCRIPT)
Setup = script.Setup
HOUR = 3600.0


def loop(lengths: list[float], setup: Setup, interval: float) -> float:  # type: ignore[valid-type]
    """One run as it goes, event by event; the failures come at the ends of all attempts but the last."""
    kept = 0.0
    for number, length in enumerate(lengths):
        now = setup.restart  # type: ignore[attr-defined]
        in_reach = 0.0  # trained since the restart, and safe
        trained = 0.0
        while now < length:
            step = min(interval, length - now)
            trained += step
            now += step
            begun = now
            if step == interval and begun + setup.done <= length:  # type: ignore[attr-defined]
                in_reach = trained
            now += setup.blocked  # type: ignore[attr-defined]
        kept += trained if number == len(lengths) - 1 else in_reach
    return kept


CASES = [
    Setup("a", 60, 60, 600),
    Setup("b", 2, 60, 120),
    Setup("c", 7, 31, 0),
    Setup("d", 3, 3, 900),
]


def differs_from_the_loop(module: types.ModuleType, setup: Setup) -> float:  # type: ignore[valid-type]
    """The largest difference, in seconds, of 20 runs of ten hours with a failure each half hour."""
    random = np.random.default_rng(1)
    worst = 0.0
    for _ in range(20):
        lengths = random.exponential(0.5 * HOUR, 20)
        failed = np.arange(20) < 19
        fast = module.kept_seconds(lengths, failed, 240.0, setup).sum()
        worst = max(worst, abs(fast - loop(lengths.tolist(), setup, 240.0)))
    return worst


@pytest.mark.parametrize("setup", CASES)
def test_simulation_is_that_of_a_loop(setup: Setup) -> None:  # type: ignore[valid-type]
    assert differs_from_the_loop(script, setup) < 1e-6


def test_attempts_fill_the_run_and_fail_as_often_as_they_should() -> None:
    lengths, failed = script.draw_attempts(10 * HOUR, seed=0)
    assert np.allclose(lengths.sum(axis=1), script.DAYS * 24 * HOUR)
    expected = script.DAYS * 24 / 10
    assert abs(failed.sum(axis=1).mean() - expected) < 4 * (expected / len(failed)) ** 0.5
    never, none = script.draw_attempts(1e12, seed=0)
    assert not none.any()
    assert (never.max(axis=1) == script.DAYS * 24 * HOUR).all()


@pytest.mark.parametrize(
    ("mtbf_min", "published_min", "digits"), [(1440, 117, 0), (360, 57, 0), (15, 9.1, 1)]
)
def test_intervals_of_dalys_figures(mtbf_min: float, published_min: float, digits: int) -> None:
    """Daly 2006, figures 3 to 5: a dump of 5 minutes, a restart of 10."""
    setup = Setup("Daly's", 300, 300, 600)
    _, daly = script.best_intervals(mtbf_min * 60, setup)
    assert round(daly / 60, digits) == published_min
    found = script.row_of(1, setup, mtbf_min / 60, seed=0)
    assert found["interval_s"] / 60 == pytest.approx(published_min, rel=0.25)  # it is flat there
    assert found["goodput"] - found["at_daly"] < 0.003


def test_a_save_does_not_begin_before_the_last_one_is_done() -> None:
    assert script.best_intervals(100.0, Setup("slow disk", 0.1, 60, 1)) == (59.9, 59.9)


def test_published_rates() -> None:
    """466 and 419 interruptions in 54 days on 16,384 GPUs; 7.9 h at 1,024, 1.8 h at 16,384."""
    hours = {name: (gpus, between) for name, gpus, between in script.RATES}
    assert round(script.PER_GPU_HOURS) == 45566
    per_gpu = [round(gpus * between) for gpus, between in hours.values()]
    assert per_gpu == [45566, 50677, 8090, 29491]


@pytest.mark.parametrize(
    "flags",
    [
        "--times 2 1 5",
        "--times 0 1 5",
        "--times 1 2 -5",
        "--times nan 2 5",
        "--times 2 inf 5",
        "--gpu-hours 9",
    ],
)
def test_refusals(
    flags: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["goodput.py", *flags.split()])
    with pytest.raises(SystemExit) as end:
        script.parse_args()
    printed = capsys.readouterr().err
    assert end.value.code == 2
    assert printed.startswith(flags if "gpu" in flags else "--times: 0 < BLOCKED")
    assert printed.count("\n") == 1


@pytest.mark.full
@pytest.mark.parametrize("seed", [1, 20260101])
def test_other_failures_say_the_same(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = []
    for number in (0, seed):
        found = tmp_path / f"{number}.json"
        flags = f"--times 2 60 600 --seed {number} --json {found}"
        monkeypatch.setattr(sys, "argv", ["goodput.py", *flags.split()])
        assert all(script.run(script.parse_args()))
        rows.append(json.loads(found.read_text())["rows"])
    for ours, others in zip(*rows, strict=True):
        assert abs(ours["goodput"] - others["goodput"]) < 0.005


MUTANTS = {  # the idea: what breaks it
    "a restart takes time": ("trained = lengths - setup.restart", "trained = lengths"),
    "a save counts when it is done": ("+ setup.blocked - setup.done)", "+ setup.blocked)"),
    "a save makes the cycle longer": ("cycle = interval + setup.blocked\n    trained", "cycle = interval\n    trained"),
    "only whole intervals are kept": ("np.floor((trained", "((trained"),
    "a failure in the restart loses no work": ("np.maximum(saved, 0)", "saved"),
    "a run that ends keeps all": ("np.where(failed, np.maximum(saved, 0), at_the_end)", "np.maximum(saved, 0)"),
}  # fmt: skip


def mutate(right: str, wrong: str) -> types.ModuleType:
    source = SCRIPT.read_text()
    assert source.count(right) == 1, right
    module = types.ModuleType("goodput_mutant")
    module.__file__ = str(SCRIPT)
    sys.modules[module.__name__] = module
    exec(compile(source.replace(right, wrong), SCRIPT, "exec"), module.__dict__)  # noqa: S102
    return module


@pytest.mark.full
@pytest.mark.parametrize("idea", MUTANTS)
def test_mutants_differ_from_the_loop(idea: str) -> None:
    mutant = mutate(*MUTANTS[idea])
    assert max(differs_from_the_loop(mutant, setup) for setup in CASES) > 1


@pytest.mark.full
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("math.sqrt(2 * setup.blocked * mtbf)", "math.sqrt(setup.blocked * mtbf) / 2"),
        ("math.sqrt(2 * setup.blocked * mtbf)", "math.sqrt(2 * setup.restart * mtbf)"),
        ("- setup.blocked\n    least", "- setup.blocked + setup.restart\n    least"),
    ],
)
def test_a_wrong_interval_fails_the_check(right: str, wrong: str) -> None:
    mutant = mutate(right, wrong)
    right_rows = [script.row_of(100_000, s, script.PER_GPU_HOURS, 0) for s in script.ASSUMED]
    rows = [mutant.row_of(100_000, s, script.PER_GPU_HOURS, 0) for s in mutant.ASSUMED]
    regret = max(
        good["goodput"] - row["at_daly"] for good, row in zip(right_rows, rows, strict=True)
    )
    assert regret > 0.003


def trainer(folder: Path, body: str) -> Path:
    """A train.py that only writes a log. RANK 0 writes, and it is started again by torchrun."""
    path = folder / "train.py"
    path.write_text(
        "import json, os, sys, time\n"
        "from pathlib import Path\n"
        "log = Path(sys.argv[-1]) / 'log.jsonl'\n"
        "log.parent.mkdir(exist_ok=True)\n"
        "def say(**event):\n"
        "    if os.environ['RANK'] == '1':\n"
        "        with log.open('a') as file:\n"
        "            file.write(json.dumps(event | {'time': time.time()}) + '\\n')\n" + body
    )
    return path


@pytest.mark.full
def test_times_come_from_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Medians of the saves; the restart ends with the first step after the kill, not with a start."""
    body = (
        "say(event='start', step=0, pids=[os.getppid(), os.getpid()])\n"
        "again = os.environ['TORCHELASTIC_RESTART_COUNT'] != '0'\n"
        "time.sleep(0.5 * again)\n"
        "for step in range(1, 4):\n"
        "    say(event='step', step=step)\n"
        "    say(event='save', step=step, blocked_s=[9, 0.25, 0.5][step - 1], done_s=[9, 1, 2][step - 1])\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setattr(script, "TRAINER", trainer(tmp_path, body))
    found = script.measure()
    assert (found.blocked, found.done) == (0.5, 2)
    assert 0.5 < found.restart < 50


@pytest.mark.full
def test_a_trainer_that_ends_is_quoted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script, "TRAINER", tmp_path / "absent.py")
    with pytest.raises(SystemExit) as end:
        script.measure()
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("train.py has ended: ")
