"""Options, fixtures and the closing summary of the suite."""

import os
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import book
import checks
import pytest
import warm

ROOT = Path(__file__).resolve().parent.parent
skips: Counter[str] = Counter()
illegal: list[str] = []
seconds: defaultdict[int, float] = defaultdict(float)  # by chapter
pasted: list[str] = []  # commands that failed


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="the full tier too: `make test-all`")
    parser.addoption("--sample", action="store_true", help="only each launcher and what measures")
    parser.addoption("--mine", action="store_true", help="grade exercises.py, not solutions.py")
    parser.addoption("--cold", action="store_true", help="run every command with its own launcher")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--cold"):
        os.environ["COLD"] = "1"
    # OpenMP's threads wait for each other by spinning. Where other programs want the cores too, a
    # run of ten seconds then takes minutes; asleep they cost a few microseconds each time.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    config.addinivalue_line("markers", "full: only in `make test-all`, not in the reader's tier")
    config.addinivalue_line("markers", "sample: each launcher and each script that measures, once")
    config.addinivalue_line("markers", "machinery: tests of no single chapter")
    for number in range(1, len(book.CHAPTERS) + 1):
        config.addinivalue_line("markers", f"chapter{number}: tests of chapter {number}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """`-m chapter1` selects one chapter (`-k chapter1` would take 10 and 11 too). Without --all the
    full tier is left out; with --sample all is that is not of the sample.
    """
    for item in items:
        numbers = {int(n) for n in re.findall(r"chapter(\d+)", item.nodeid)}
        for number in numbers:
            if number <= len(book.CHAPTERS):
                item.add_marker(f"chapter{number}")
        if not numbers:
            item.add_marker("machinery")
    kept = [item for item in items if config.getoption("--all") or not has(item, "full")]
    if config.getoption("--sample"):
        kept = [item for item in kept if has(item, "sample")]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def has(item: pytest.Item, marker: str) -> bool:
    return item.get_closest_marker(marker) is not None


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what git would commit: commands run in it, and the reader's tree stays clean."""
    folder = tmp_path_factory.mktemp("checkout")
    copy_tree(ROOT, folder)
    return folder


@pytest.fixture(scope="session")
def vllm() -> Path:
    """The Python of the environment that `make vllm` makes."""
    if not checks.engine("vllm").exists():
        pytest.skip("needs vLLM: make vllm")
    return checks.engine("vllm")


@pytest.fixture(scope="session")
def sglang() -> Path:
    """The Python of the environment that `make sglang` makes."""
    if not checks.engine("sglang").exists():
        pytest.skip("needs SGLang: make sglang")
    return checks.engine("sglang")


def copy_tree(root: Path, folder: Path) -> None:
    """Copy what git would commit; the engines' environments are linked."""
    for path in book.files(root):
        copy = folder / path.relative_to(root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, copy)
    for name in (".venv-vllm", ".venv-sglang"):
        if (root / name).exists():
            (folder / name).symlink_to(root / name)


@pytest.fixture
def run(checkout: Path) -> Callable[..., warm.Result]:
    """Run a command in the checkout: `run("torchrun --nproc_per_node=2 ...", timeout=60)`."""

    def run_there(command: str, timeout: float = 300) -> warm.Result:
        return warm.run(command, checkout, timeout)

    return run_there


@pytest.fixture(scope="session")
def exercises(request: pytest.FixtureRequest) -> Callable[[int], ModuleType]:
    """`exercises(3)`: chapter 3's solutions.py, or with --mine its exercises.py, as a module."""
    name = "exercises" if request.config.getoption("--mine") else "solutions"

    def load(chapter: int) -> ModuleType:
        return warm.load(
            f"chapter{chapter}_{name}", ROOT / book.CHAPTERS[chapter - 1] / f"{name}.py"
        )

    return load


# --- closing summary ---------------------------------------------------------------------------


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    match = re.search(r"chapter(\d+)", report.nodeid)
    if match:
        seconds[int(match[1])] += report.duration
    _note_skip(report)
    if report.failed:
        found = re.findall(r"^E?\s*paste: (.+)$", report.longreprtext, re.M)
        pasted.extend(c for c in dict.fromkeys(found) if c not in pasted)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    _note_skip(report)


def _note_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Only what a reader may be unable to install is a reason: "needs 2 GPUs: how to get them"."""
    if report.skipped and not hasattr(report, "wasxfail"):
        where = report.longrepr
        reason = where[2] if isinstance(where, tuple) else str(where)
        reason = reason.removeprefix("Skipped: ")
        skips[reason] += 1
        if not reason.startswith("needs "):
            illegal.append(f"{report.nodeid}: {reason}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if illegal and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    write = terminalreporter.write_line
    if pasted:
        terminalreporter.section("commands that failed: paste to see them")
        for command in pasted:
            write(command)
    if skips:
        terminalreporter.section(f"{sum(skips.values())} skipped")
        for reason, count in sorted(skips.items()):
            write(f"{count:4} x {reason}")
    for line in illegal:
        write(f"not a reason to skip (it must start with 'needs '): {line}", red=True)
    if seconds:
        write("; ".join(f"chapter {n}: {s:.0f} s" for n, s in sorted(seconds.items())))
