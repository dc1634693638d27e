"""The suite catches what it is for: small broken repositories go in, a complaint comes out."""

import subprocess
import sys
import time
from pathlib import Path

import book
import changed
import checks
import copies
import listing
import pytest
import record
import warm

pytestmark = pytest.mark.full

CHAPTER = book.CHAPTERS[0]
SCRIPT = f"{CHAPTER}/code/good.py"
COMMAND = f"torchrun --nproc_per_node=2 {SCRIPT}"
GOOD = f'''"""Two ranks agree.

    {COMMAND}
"""

import argparse
import sys

import torch
import torch.distributed as dist


def total(value: int) -> int:
    """The sum over all ranks."""
    tensor = torch.tensor(value)
    dist.all_reduce(tensor)
    return int(tensor)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fail", action="store_true")
    args = parser.parse_args()
    dist.init_process_group("gloo")
    if args.fail:
        sys.exit("nothing to do")
    result = total(dist.get_rank())
    if dist.get_rank() == 0:
        print(f"{{dist.get_world_size()}} ranks on cpu: the sum is {{result}}")
        print(f"check: sum = {{result}} <= 1  ok")
        print("all 1 checks ok")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
'''
MAIN = f"""# Chapter 1

## The sum

See [the sum](#the-sum) and [its script](code/good.py).

<!-- output: {COMMAND} -->
```text
2 ranks on cpu: the sum is 7
check: sum = 1 <= 1  ok
all 1 checks ok
```

<!-- [[[cog listing("code/good.py", "total") ]]] -->
```python
def total(value: int) -> int:
    \"\"\"The sum over all ranks.\"\"\"
    tensor = torch.tensor(value)
    dist.all_reduce(tensor)
    return int(tensor)
```
<!-- [[[end]]] -->
"""
DRAW = f"python {CHAPTER}/code/draw.py --plot {CHAPTER}/figures/a.svg"
FIGURE = f"<!-- figure: {DRAW} -->\n![a]({{}})\n"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A small book without a fault."""
    for name, text in {
        SCRIPT: GOOD,
        f"{CHAPTER}/main.md": MAIN,
        f"{CHAPTER}/exercises.py": EXERCISES,
        f"{CHAPTER}/solutions.py": EXERCISES.replace("raise NotImplementedError", "return a + b"),
        f"{CHAPTER}/paper/README.md": "# Papers\n",
        f"{CHAPTER}/figures/.gitkeep": "",
        "README.md": f"| [1]({CHAPTER}/main.md) | Introduction |\n\n```bash\n{COMMAND}\n```\n",
    }.items():
        put(tmp_path, name, text)
    (tmp_path / f"{CHAPTER}/figures/.gitkeep").unlink()
    return tmp_path


EXERCISES = '''def add(a: int, b: int = 1) -> int:
    """Return the sum of two integers."""
    raise NotImplementedError
'''


def put(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def change(root: Path, name: str, old: str, new: str) -> None:
    text = (root / name).read_text()
    assert old in text
    put(root, name, text.replace(old, new))


def command(root: Path, text: str = COMMAND) -> book.Command:
    return next(c for c in book.commands(root) if c.text == text)


def text_problems(root: Path) -> str:
    checked = (
        checks.layout,
        checks.readme_table,
        checks.script_form,
        checks.committed,
        checks.links,
        checks.markdown,
        checks.pictures,
        checks.listings,
        checks.pasted_code,
        checks.uncovered_scripts,
        checks.missing_scripts,
        checks.unknown_lines,
        checks.make_targets,
        checks.pytest_lines,
    )
    stubs = [p for chapter in book.chapters(root) for p in checks.exercise_stubs(chapter)]
    return "\n".join([p for check in checked for p in check(root)] + stubs)


def test_a_book_without_a_fault_passes(repository: Path) -> None:
    assert text_problems(repository) == ""
    assert checks.run_command(command(repository), repository) == []
    assert not command(repository).gpus
    assert len(command(repository).sources) == 3  # docstring, README, output block


# --- what the text says --------------------------------------------------------------------------


def test_script_without_a_command(repository: Path) -> None:
    put(repository, f"{CHAPTER}/code/lonely.py", GOOD.replace(COMMAND, "(no command)"))
    assert "lonely.py: no command" in text_problems(repository)


def test_module_that_nothing_imports(repository: Path) -> None:
    put(repository, f"{CHAPTER}/code/part.py", '"""A part."""\n')
    assert "no script beside it imports it" in text_problems(repository)
    change(repository, SCRIPT, "import torch\n", "import part\nimport torch\n")
    assert text_problems(repository) == ""


def test_command_of_a_script_that_is_gone(repository: Path) -> None:
    change(repository, "README.md", "good.py", "gone.py")
    assert "no such script" in text_problems(repository)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("tensor = torch.tensor(value)", "tensor = torch.ones(())", "make listings"),
        ('"total")', '"sum_up")', "no function, class or region named sum_up"),
        ("(code/good.py)", "(code/gone.py)", "dead link: code/gone.py"),
        ("(#the-sum)", "(#the-product)", "dead anchor: #the-product"),
        ("(#the-sum)", "(https://example.org)", ""),
        ("[the sum](", "![the sum](https://example.org/a.svg) (", "image from elsewhere"),
        ("## The sum", "## The sum\n\n<b>bold</b>", "HTML: <b>"),
        ("## The sum", "## The sum\n\n`a<b>` and $a<b>c$", ""),
        ("## The sum", "## The sum\n\n```\nplain\n```", "fence without a language"),
        ("## The sum", "## The sum\n\n```python\nx = 1\n```", "python without `[[[cog"),
        ("## The sum", "## The sum\n\n```yaml\na: 1\n```", "yaml without `[[[cog"),
        ("## The sum", "## The sum\n\n```bash\ngit clone x\n```", "neither python, torchrun"),
        ("## The sum", "## The sum\n\n```bash\npython a.py | tail\n```", "needs a shell"),
        ("## The sum", "## The sum\n\n```bash\nmake all\n```", "make all:"),
        ("## The sum", "## The sum\n\n```bash\npytest tests/test_x.py\n```", "no such file"),
        ("## The sum", "## The sum\n\n<!-- not run: -->\n```bash\nls\n```", "wants a reason"),
        ("## The sum", "## The sum\n\n<!-- not run: wants git -->\n```bash\nls\n```", ""),
        ("## The sum", "## The sum\n\n```bash\n# a comment\n```", ""),
        ("<!-- [[[end]]] -->", "<!-- [[[end]]] -->\n\n```text\nopen", "fence never closed"),
        ("```text\n2 ranks", "\n```text\n2 ranks", "marker with nothing below it"),
    ],
)
def test_fault_in_the_text(repository: Path, old: str, new: str, complaint: str) -> None:
    change(repository, f"{CHAPTER}/main.md", old, new)
    problems = text_problems(repository)
    assert complaint in problems if complaint else problems == ""


def test_listing_of_a_script_that_changed(repository: Path) -> None:
    change(repository, SCRIPT, "return int(tensor)", "return tensor.item()")
    assert "make listings" in text_problems(repository)


def test_figures(repository: Path) -> None:
    draw = GOOD.replace(COMMAND, f"python {CHAPTER}/code/draw.py")
    put(repository, f"{CHAPTER}/code/draw.py", draw)
    put(repository, f"{CHAPTER}/main.md", MAIN + FIGURE.format("figures/a.svg"))
    assert "missing figure a.svg" in text_problems(repository)
    put(repository, f"{CHAPTER}/figures/a.svg", "<svg/>")
    assert text_problems(repository) == ""
    put(repository, f"{CHAPTER}/main.md", MAIN + FIGURE.format("code/good.py"))
    assert "is not a.svg" in text_problems(repository)
    put(repository, f"{CHAPTER}/main.md", MAIN)
    assert "a.svg: no `<!-- figure" in text_problems(repository)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("raise NotImplementedError", "return a + b", "does more than raise"),
        ("b: int = 1", "b: int", "add: (a: int, b: int) -> int !="),
        ("def add", "def plus", "solutions.py lacks plus"),
        ('    """Return the sum of two integers."""\n', "", "no docstring"),
    ],
)
def test_stub_that_is_none(repository: Path, old: str, new: str, complaint: str) -> None:
    change(repository, f"{CHAPTER}/exercises.py", old, new)
    assert complaint in text_problems(repository)


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("chapter1-other/main.md", "# x\n", "not one of the eleven"),
        (f"{book.CHAPTERS[1]}/main.md", "# x\n", "README.md: its table lacks"),
        ("notes.log", "x", "does not belong"),
        ("data.bin", "a\0b", "binary"),
        ("notes.md", "/ho" + "me/somebody/x", "has the path"),
        (f"{CHAPTER}/code/x.py", "def f() -> None: ...\n", "no docstring"),
    ],
)
def test_file_out_of_place(repository: Path, name: str, text: str, complaint: str) -> None:
    put(repository, name, text)
    assert complaint in text_problems(repository)


# --- what a command prints -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block", "output", "same"),
    [
        (["a 1.5 ms", "b"], ["a  2,048.25 ms", "b", ""], True),
        (["a 1.5 ms"], ["a 1.5 us"], False),
        (["loss 1e-05 12%"], ["loss nan -3%"], True),
        (["fp32"], ["fp16"], False),
        (["2 ranks on cpu"], ["2 ranks on cuda"], True),
        (["check: x = 1  ok"], ["check: x = 1  FAILED"], False),
        (["expect: t = 1 <= 2  ok"], ["expect: t = 3 <= 2  not here"], True),
        (["expect: t = 1 <= 2  ok"], ["expect: u = 1 <= 2  ok"], False),
        (["a ████ 4"], ["a █ 1"], True),
        (["-----"], ["---"], True),
        (["a"], ["a", "b"], False),
        (["a", "b"], ["a"], False),
        (["a", "..."], ["a"], True),
        (["CPU  Arm ...", "z"], ["CPU  Arm 2.5 GHz", "z"], True),
        (["CPU  Arm ...", "z"], ["CPU  Intel", "z"], False),
        (["a", "...", "z"], ["a", "b", "z", "c", "z"], True),
        (["a", "...", "m", "n", "...", "z"], ["a", "m", "x", "m", "n", "z"], True),
        (["a", "...", "z"], ["a", "b", "c"], False),
        (["a", "...", "m", "...", "z"], ["a", "z"], False),
        (["...", "z"], ["y", "z"], True),
    ],
)
def test_comparison(block: list[str], output: list[str], same: bool) -> None:
    assert (book.matches(block, output) is None) is same


def test_stale_output_block(repository: Path) -> None:
    change(repository, f"{CHAPTER}/main.md", "the sum is 7", "the total is 7")
    (problem,) = checks.run_command(command(repository), repository)
    assert "stale output block" in problem
    assert "make outputs" in problem
    assert f"paste: {COMMAND}" in problem
    change(repository, f"{CHAPTER}/main.md", "2 ranks on cpu: the total is 7", "...")
    assert checks.run_command(command(repository), repository) == []


def test_block_of_other_hardware_is_not_compared(repository: Path) -> None:
    change(repository, f"{CHAPTER}/main.md", "the sum is 7", "the total is 7")
    change(repository, f"{CHAPTER}/main.md", "output: ", "output on NVIDIA Z9: ")
    assert checks.run_command(command(repository), repository) == []


def test_commands_below_on_gpus(repository: Path) -> None:
    large = COMMAND.replace("=2", "=8")
    change(repository, SCRIPT, f"{COMMAND}\n", f"{COMMAND}\n\nOn GPUs:\n    {large}\n\nLook.\n")
    assert command(repository, large).gpus
    assert command(repository, large).world_size == 8


def test_recording_keeps_what_a_block_omits(repository: Path) -> None:
    old = ["a 1", "...", "z 2", "y ..."]
    new = ["a 3", "b", "c", "z 4", "y 5"]
    assert record.refreshed(old, new) == (["a 3", "...", "z 4", "y ..."], None)
    assert record.shortened("CPU   Arm 2 ...", "CPU   Arm 3 GHz, fast") == "CPU   Arm 3 ..."
    assert record.shortened("...", "anything") == "anything"
    assert record.refreshed(old, ["a 3", "b"])[0] == ["a 3", "b"]
    path = repository / CHAPTER / "main.md"
    (block,) = book.blocks(path)
    text = record.replaced(path.read_text(), block, ["new"], "*(machine)*")
    assert "```text\nnew\n```\n*(machine)*\n\n<!-- [[[cog" in text
    path.write_text(text)
    (block,) = book.blocks(path)
    assert record.replaced(text, block, ["new"], "*(machine)*") == text


# --- what a command does -------------------------------------------------------------------------

PARSER = "    parser = argparse"
CHECK = '        print(f"check'
ON_RANK_1 = "    import os\n    if os.environ['RANK'] == '1':\n        sys.exit(3)\n"
QUIT = {
    "at once": (PARSER, f"    sys.exit(0)\n{PARSER}", "no line starts with `2 ranks`"),
    "after its banner": (CHECK, f"        sys.exit(0)\n{CHECK}", "no line `check"),
    "before its verdict": ("all 1 checks ok", "done", "did not end with `all N checks ok`"),
    "with too few ranks": ("{dist.get_world_size()} ranks", "{1} ranks", "`2 ranks`"),
    "with a failed claim": ("  ok", "  FAILED", "printed FAILED"),
    "with 3 on rank 1": (PARSER, f"{ON_RANK_1}{PARSER}", "ended with 1"),
}


@pytest.mark.parametrize(("old", "new", "complaint"), QUIT.values(), ids=QUIT.keys())
def test_script_that_quits(repository: Path, old: str, new: str, complaint: str) -> None:
    change(repository, SCRIPT, old, new)
    (problem,) = checks.run_command(command(repository), repository)
    assert complaint in problem
    assert f"paste: {COMMAND}" in problem


def test_script_that_hangs_is_ended_with_all_it_started(repository: Path) -> None:
    hang = "    import subprocess\n    subprocess.run(['sleep', '77'])\n"
    change(repository, SCRIPT, "    result =", f"{hang}    result =")
    start = time.monotonic()
    (problem,) = checks.run_command(command(repository), repository, timeout=4)
    assert "did not end in" in problem
    assert time.monotonic() - start < 30
    assert warm.orphans(repository) == []


def test_figure_that_is_not_drawn(repository: Path) -> None:
    text = f"python {SCRIPT} --plot a.svg"
    put(repository, "a.svg", "<svg/>")  # an old one does not count
    put(repository, SCRIPT, '"""Draws nothing."""\nprint("check: drawn  ok")\n')
    (problem,) = checks.run_command(book.parse_command(text), repository)
    assert "did not write a.svg" in problem
    put(repository, SCRIPT, 'open("a.svg", "w").write("<svg")\nprint("check: drawn  ok")\n')
    (problem,) = checks.run_command(book.parse_command(text), repository)
    assert "a.svg is no XML" in problem


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (COMMAND, 0),
        (f"{COMMAND} --fail", 1),
        (f"python {SCRIPT} --unknown", 2),  # torchrun would make a 1 of it
    ],
    ids=["done", "message", "usage"],
)
def test_warm_and_cold_are_the_same(repository: Path, text: str, code: int) -> None:
    printed = book.parse_command(text)
    forked = warm.run_warm(printed, repository, 60)
    launched = warm.run_cold(printed, repository, 60)
    assert forked.stdout == launched.stdout
    assert (forked.returncode, launched.returncode) == (code, code), launched.stderr


@pytest.mark.parametrize(
    ("text", "plan"),
    [
        ("python a.py --x", (0, ["a.py", "--x"])),
        ("torchrun --nproc-per-node 3 a.py", (3, ["a.py"])),
        ("torchrun --standalone --nproc_per_node=2 a.py", (2, ["a.py"])),
        ("OMP_NUM_THREADS=1 torchrun --nproc_per_node=2 a.py", (2, ["a.py"])),
        ("TORCH_LOGS=x torchrun --nproc_per_node=2 a.py", None),
        ("torchrun --nproc_per_node=2 --max-restarts=1 a.py", None),
        ("torchrun --nnodes=2 --nproc_per_node=2 a.py", None),
        ("torchrun --nproc_per_node=gpu a.py", None),
        ("python -m a", None),
        ("deepspeed --num_gpus 2 a.py", None),
    ],
)
def test_what_runs_warm(text: str, plan: tuple[int, list[str]] | None) -> None:
    assert warm.warm_plan(book.parse_command(text)) == plan


# --- skips ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("reason", "code"), [("needs 2 GPUs: a GPU host", 0), ("too slow", 1)])
def test_only_what_is_absent_may_be_skipped(tmp_path: Path, reason: str, code: int) -> None:
    put(tmp_path, "pytest.ini", "[pytest]\n")
    put(tmp_path, "test_x.py", f"import pytest\n\ndef test_x():\n    pytest.skip({reason!r})\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "conftest", "-p", "no:cacheprovider"],
        cwd=tmp_path,
        env=warm.environment() | {"PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert f"1 x {reason}" in done.stdout


# --- ranks for the chapters' tests ---------------------------------------------------------------


def sum_of_ranks(offset: int) -> int:
    import torch
    import torch.distributed as dist

    tensor = torch.tensor(dist.get_rank() + offset)
    dist.all_reduce(tensor)
    return int(tensor) * 10 + dist.get_rank()


def fail_on_rank_1() -> None:
    import torch.distributed as dist

    if dist.get_rank() == 1:
        raise ValueError("not mine")
    dist.barrier()


def sleep() -> None:
    time.sleep(60)


def test_forked_ranks() -> None:
    assert warm.fork_ranks(sum_of_ranks, 3, 1) == [60, 61, 62]
    with pytest.raises(warm.RankError, match=r"(?s)rank 1: .*ValueError: not mine") as caught:
        warm.fork_ranks(fail_on_rank_1, 2)
    assert isinstance(caught.value.error, ValueError)
    with pytest.raises(warm.RankError, match="no result after 2 s"):
        warm.fork_ranks(sleep, 2, timeout=2)


# --- what scripts share --------------------------------------------------------------------------

COPY = f"""
{copies.RULE}


# Copied from good.total
def total(value: int) -> int:
    return value


"""


def test_copies(repository: Path) -> None:
    other = GOOD.replace(COMMAND, f"python {CHAPTER}/code/other.py")
    own = other[other.index("def total") : other.index("def main")]
    put(repository, f"{CHAPTER}/code/other.py", other.replace(own, ""))
    assert copies.problems(repository) == []
    copy = other.replace(own, "").replace('\nif __name__ == "', f'{COPY}if __name__ == "')
    put(repository, f"{CHAPTER}/code/other.py", copy)
    assert "to mend it: make copies" in "".join(copies.problems(repository))
    mended = copies.refreshed(repository / CHAPTER / "code/other.py", book.scripts(repository))
    assert own.strip() in mended
    assert mended.endswith("    main()\n")
    put(repository, f"{CHAPTER}/code/other.py", mended)
    assert copies.problems(repository) == []
    change(repository, SCRIPT, "return int(tensor)", "return tensor.item()")
    assert "other.py: a copy differs" in "".join(copies.problems(repository))


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("good.total", "good.sum_up", "the mark is of sum_up, not total"),
        ("good.total", "gone.total", "0 scripts are named gone.py"),
        ("# Copied from good.total\n", "# Copied from good.total\n\n", "below the mark"),
        (copies.RULE, "", "no rule line above its copies"),
    ],
)
def test_marks_that_lead_nowhere(repository: Path, old: str, new: str, complaint: str) -> None:
    put(repository, f"{CHAPTER}/code/other.py", f'"""Other."""\n{COPY}'.replace(old, new))
    assert complaint in "".join(copies.problems(repository))


def test_second_version_of_what_is_copied(repository: Path) -> None:
    put(repository, f"{CHAPTER}/code/other.py", f'"""Other."""\n{COPY}')
    put(repository, f"{CHAPTER}/code/third.py", '"""Third."""\n\n\ndef total() -> int: ...\n')
    problems = copies.problems(repository)
    assert any("third.py: its own total, which is copied elsewhere" in p for p in problems)


@pytest.mark.parametrize(
    ("files", "tests"),
    [
        (None, "full"),
        (["pyproject.toml", "README.md"], "full"),
        ([f"{CHAPTER}/solutions.py", "tests/chapter10/x.py"], "full and (chapter1 or chapter10)"),
        ([f"{CHAPTER}/main.md", f"{CHAPTER}/figures/x.svg"], "full and (machinery)"),
        (["tests/book.py", f"{CHAPTER}/code/x.py"], "full and (chapter1 or machinery)"),
    ],
)
def test_what_a_change_needs(files: list[str] | None, tests: str) -> None:
    assert changed.expression(files) == tests


# --- listings ------------------------------------------------------------------------------------


PARTS = """import functools


class A:
    @functools.cache
    def f(self):
        return 1

    # region: tail
    x = 1

    # endregion
"""


def test_parts_of_a_script(tmp_path: Path) -> None:
    put(tmp_path, "a.py", PARTS)
    method = listing.source_of(tmp_path / "a.py", "A.f")
    assert method == "@functools.cache\ndef f(self):\n    return 1"
    assert listing.source_of(tmp_path / "a.py", "tail") == "x = 1"
    with pytest.raises(ValueError, match="no function, class or region named B"):
        listing.source_of(tmp_path / "a.py", "B")


JOB = "#!/bin/sh\n# region: launch\nsrun hostname | sort\n# endregion\n"


def test_parts_of_a_file_that_is_not_python(tmp_path: Path) -> None:
    put(tmp_path, "a.sbatch", JOB)
    assert listing.source_of(tmp_path / "a.sbatch") == JOB.strip()
    assert listing.source_of(tmp_path / "a.sbatch", "launch") == "srun hostname | sort"
    with pytest.raises(ValueError, match="no region named f"):
        listing.source_of(tmp_path / "a.sbatch", "f")


def test_listing_of_a_file_that_is_not_python(repository: Path) -> None:
    """Nobody types it, so none of its lines is a command; and it may not drift either."""
    put(repository, f"{CHAPTER}/code/launch/a.sbatch", JOB)
    whole = f'<!-- [[[cog listing("code/launch/a.sbatch") ]]] -->\n```shell-script\n{JOB}```\n'
    put(repository, f"{CHAPTER}/main.md", f"{MAIN}\n{whole}<!-- [[[end]]] -->\n")
    assert text_problems(repository) == ""
    put(repository, f"{CHAPTER}/code/launch/a.sbatch", JOB.replace("sort", "uniq"))
    assert "make listings" in text_problems(repository)


# --- servers and engines -----------------------------------------------------------------------

SERVER = '''"""Answers.

    python SERVER --port 8123 &
    curl --silent --fail --retry 30 --retry-connrefused --retry-delay 1 http://127.0.0.1:8123/README.md
    kill %1
"""

import argparse
import http.server
import signal
import sys

signal.signal(signal.SIGTERM, lambda *_: sys.exit(CODE))
parser = argparse.ArgumentParser()
parser.add_argument("--port", type=int)
address = ("127.0.0.1", parser.parse_args().port)
http.server.HTTPServer(address, http.server.SimpleHTTPRequestHandler).serve_forever()
'''


@pytest.mark.parametrize(("code", "complaints"), [("0", []), ("3", ["ended with 3"])])
def test_session_with_a_server(repository: Path, code: str, complaints: list[str]) -> None:
    """Its lines run in one shell, on a port that is free; the server's own exit code counts."""
    name = f"{CHAPTER}/code/server.py"
    put(repository, name, SERVER.replace("SERVER", name).replace("CODE", code))
    session = next(c for c in book.commands(repository) if c.script == name)
    assert session.session
    assert session.script == name
    assert session.text.count("\n") == 2
    found = checks.run_command(session, repository)
    assert [line for problem in found for line in problem.splitlines()[:1]] == complaints
    assert warm.orphans(repository) == []


def test_session_of_a_text_is_compared(repository: Path) -> None:
    name = f"{CHAPTER}/code/server.py"
    put(repository, name, SERVER.replace("SERVER", name).replace("CODE", "0"))
    lines = SERVER.replace("SERVER", name).replace("README.md", "said.txt").splitlines()[2:5]
    fence = "\n".join(["```bash", *(line.strip() for line in lines), "```"])
    marked = "\n\n<!-- output: session -->\n```text\nfive words\n```\n"
    put(repository, "said.txt", "six words\n")
    put(repository, "README.md", (repository / "README.md").read_text() + fence + marked)
    session = next(c for c in book.commands(repository) if c.session and "said.txt" in c.text)
    (problem,) = checks.run_command(session, repository)
    assert "stale output block" in problem
    put(repository, "said.txt", "five words\n")
    assert checks.run_command(session, repository) == []


def test_engine_that_is_not_installed(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(repository, SCRIPT, 'import sys\n\nsys.exit("needs vLLM: make vllm")\n')
    wanted = book.parse_command(f"python {SCRIPT}")
    (problem,) = checks.run_command(wanted, repository)
    assert "ended with 1" in problem  # it is a skip only with exit code 2 ...
    put(
        repository,
        SCRIPT,
        'import sys\n\nsys.stderr.write("needs vLLM: make vllm\\n")\nsys.exit(2)\n',
    )
    monkeypatch.setattr(checks, "engine", lambda name: repository / name)
    with pytest.raises(pytest.skip.Exception, match=r"needs vLLM: make vllm"):
        checks.run_command(wanted, repository)
    monkeypatch.setattr(checks, "engine", lambda name: repository)  # ... and where it is not there
    assert checks.run_command(wanted, repository)
