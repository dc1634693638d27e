"""What the commands of chapter 1's single-process scripts cannot show."""

import math
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import checks
import pytest
import torch
import warm

CODE = Path("chapter1-introduction-to-modern-distributed-ai/code")
Run = Callable[..., warm.Result]


def script(name: str) -> ModuleType:
    return warm.load(name, warm.ROOT / CODE / f"{name}.py")


# --- the originals of what most scripts copy ---------------------------------------------------


def test_check_expect_and_conclude(capsys: pytest.CaptureFixture[str]) -> None:
    home = script("ch01_single_gpu_baseline")
    assert home.check("x", 1.0, 1.0) is home.check("x", 1.0, 1.0, at_least=True) is True
    assert home.check("x", math.nan, 1.0) is home.check("x", 0.9, 1.0, at_least=True) is False
    assert home.expect("x", 2.0, 1.0, strict=False) is home.expect("x", 0.5, 1.0, False) is None
    assert home.expect("x", 2.0, 1.0, strict=True) is False
    assert home.expect("x", 2.0, 1.0, strict=True, at_least=True) is True
    assert home.conclude([True, None, True]) == 0
    assert home.conclude([True, False, None]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "check: x = 1 <= 1  ok",
        "check: x = 1 >= 1  ok",
        "check: x = nan <= 1  FAILED on rank 0",
        "check: x = 0.9 >= 1  FAILED on rank 0",
        "expect: x = 2 <= 1  not here",
        "expect: x = 0.5 <= 1  ok",
        "expect: x = 2 <= 1  not here",
        "expect: x = 2 >= 1  ok",
        "all 2 checks ok",
        "1 of 2 checks FAILED",
    ]


def test_only_rank_0_speaks_but_each_rank_reports_its_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home = script("ch01_single_gpu_baseline")
    monkeypatch.setenv("RANK", "1")
    assert home.check("x", 0, 1)
    assert not home.check("x", 2, 1)
    assert home.conclude([False]) == 1
    assert capsys.readouterr().out == "check: x = 2 <= 1  FAILED on rank 1\n"


@pytest.mark.full
def test_a_reader_who_has_seen_enough_does_not_end_the_run(tmp_path: Path) -> None:
    """`| head -1` closes the pipe; the JSON, which is written after all has been said, is there."""
    small = "--steps 2 --batch 2 --context 16 --width 16 --layers 1 --heads 2"
    file = tmp_path / "result.json"
    line = f"{sys.executable} {CODE}/ch01_single_gpu_baseline.py {small} --json {file} | head -1"
    command = warm.parse_command(f"sh -c '{line}'")
    result = warm.run_cold(command, warm.ROOT, 120)
    assert result.stdout.startswith("1 process on ")
    assert file.is_file(), result.stderr


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "flags", "says"),
    [
        ("ch01_single_gpu_baseline", "--data no-such-file", "--data FILE"),
        ("ch01_single_gpu_baseline", "--data LICENSE --context 4096", "longer --data FILE"),
        ("ch01_single_gpu_baseline", "--device abacus", "type --device"),
        ("ch01_single_gpu_baseline", "--width 130", "--heads 4 does not divide --width 130"),
        ("ch01_compute_budget", "--params 13e9", "type  --params 13e9 --tokens 2e12"),
        ("ch01_compute_budget", "--mfu 40", "such as 0.4"),
    ],
)
def test_bad_input_gets_one_line(
    name: str,
    flags: str,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(warm.ROOT)
    monkeypatch.setattr(sys, "argv", [name, *flags.split()])
    with pytest.raises(SystemExit, match="2"):
        script(name).main()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert says in captured.err


# --- the scripts -------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize(
    "line",
    [
        "ch01_single_gpu_baseline.py --width 64 --layers 2 --batch 8 --seed 20260101",
        "ch01_single_gpu_baseline.py --data LICENSE --context 32 --steps 20 --batch 4",
        "ch01_measure_components.py --width 64 --batch 4 --repeats 1 --seed 20260101",
        "ch01_profiling.py --width 64 --batch 4 --top 5 --cycles 1 --seed 20260101",
        "ch01_memory_anatomy.py --width 96 --heads 3 --layers 2 --batch 4 --dtype bf16",
        "ch01_memory_anatomy.py --width 96 --heads 6 --layers 1 --context 100 --seed 20260101",
        "ch01_train_vs_serve.py --width 128 --layers 2 --decode-batches 1 3 --seed 20260101",
    ],
)
def test_other_sizes_and_seeds(run: Run, line: str) -> None:
    """A script's own checks are the test."""
    command = warm.parse_command(f"python {CODE}/{line}")
    result = run(command.text)
    problems = checks.evidence(command, result)
    assert not problems, checks.report(command, result, problems)


def small_step(module: ModuleType) -> Any:
    args = Namespace(width=32, layers=1, heads=2, context=16, batch=2, dtype="fp32")
    torch.manual_seed(0)
    return module.Step(args, torch.device("cpu"), torch.arange(256).repeat(8))


def test_a_careless_clock_gets_the_same_work_done() -> None:
    """The two clocks differ in what they read, not in what the step does."""
    weights = []
    for synchronize in (True, False):
        step = small_step(script("ch01_measure_components"))
        torch.manual_seed(1)
        for _ in range(3):
            step.timed(synchronize)
        weights.append([p.detach().clone() for p in step.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


@pytest.mark.full
def test_stream_raises_what_its_work_raised() -> None:
    stream = script("ch01_measure_components").Stream(torch.device("cpu"))
    stream.launch(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        stream.synchronize()


@pytest.mark.full
def test_environment_without_torch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = script("ch01_check_cuda")
    monkeypatch.setitem(sys.modules, "torch", None)  # as if it were not installed
    assert module.run(Namespace(json=None)) == [True, False, False]
    assert ": make quickstart" in capsys.readouterr().out


@pytest.mark.full
def test_environment_warns_of_what_bites() -> None:
    module = script("ch01_check_cuda")
    machine = {
        "cores": {"usable": 8, "quota": 1.5},
        "GiB": {"available": 2.0, "/dev/shm free": 0.05},
        "open files": 256,
        "driver": {"GPUs": 1},
        "torch": {"CUDA": None},
    }
    warnings = "\n".join(module.warnings_about(machine))
    for word in ("RAM", "--shm-size", "OMP_NUM_THREADS=1", "ulimit", "a CPU build"):
        assert word in warnings


def test_versions_count_up() -> None:
    minor = script("ch01_check_cuda").minor_version
    assert [minor(v) for v in ("2.9.1", "2.13.0+cpu", "3.0.0")] == [9, 13, 100]
