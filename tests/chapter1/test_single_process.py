"""What the commands of chapter 1's single-process scripts cannot show."""

import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
import warm

CODE = Path("chapter1-introduction-to-modern-distributed-ai/code")


def script(name: str) -> ModuleType:
    return warm.load(name, warm.ROOT / CODE / f"{name}.py")


@pytest.mark.parametrize(
    ("line", "cure"),
    [
        ("ch01_check_cuda.py --json /dev/null/no.json", "--json"),
        ("ch01_measure_components.py --data no-such-file", "--data"),
        ("ch01_measure_components.py --repeats 1", "--repeats 3"),
        ("ch01_measure_components.py --json /dev/null/no.json", "--json"),
        ("ch01_profiling.py --trace /dev/null/trace.json", "--trace"),
        ("ch01_profiling.py --width 130", "--heads"),
    ],
)
def test_bad_input_gets_one_line(run: Callable[..., warm.Result], line: str, cure: str) -> None:
    result = run(f"python {CODE}/{line}")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert cure in result.stderr


def small_step() -> tuple[ModuleType, object]:
    module = script("ch01_measure_components")
    args = Namespace(width=32, layers=1, heads=2, context=16, batch=2)
    torch.manual_seed(0)
    return module, module.Step(args, torch.device("cpu"), torch.arange(256).repeat(8))


def test_a_careless_clock_gets_the_same_work_done() -> None:
    """The two clocks differ in what they read, not in what the step does."""
    weights = []
    for synchronize in (True, False):
        _, step = small_step()
        torch.manual_seed(1)
        for _ in range(3):
            step.timed(synchronize)  # type: ignore[attr-defined]
        weights.append([p.detach().clone() for p in step.model.parameters()])  # type: ignore[attr-defined]
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_stream_raises_what_its_work_raised() -> None:
    module = script("ch01_measure_components")
    stream = module.Stream(torch.device("cpu"))
    stream.launch(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        stream.synchronize()


def test_environment_without_torch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = script("ch01_check_cuda")
    monkeypatch.setitem(sys.modules, "torch", None)  # as if it were not installed
    report = module.run()
    assert report["checks"][1:] == [False, False]
    assert "torch missing >= 2.11: type  make quickstart  FAILED" in capsys.readouterr().out


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
