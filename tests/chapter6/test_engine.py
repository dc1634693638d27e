"""vLLM's scripts where vLLM is absent, where it refuses, and where a server dies or is stopped."""

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import psutil
import pytest
import warm
from book import CHAPTERS

CODE = f"{CHAPTERS[5]}/code"
MODEL = warm.ROOT / CHAPTERS[7] / "checkpoint"
DATA = warm.ROOT / "resources/corpus.txt"
Run = Callable[..., warm.Result]


@pytest.fixture(scope="module")
def code() -> ModuleType:
    return warm.load("vllm_server", warm.ROOT / CODE / "vllm_server.py")


@pytest.fixture
def web() -> Iterator[tuple[subprocess.Popen, int]]:
    """A server of the standard library that has a child, on a port of its own choice."""
    program = (
        "import http.server, subprocess, sys\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "server = http.server.HTTPServer(('127.0.0.1', 0), http.server.SimpleHTTPRequestHandler)\n"
        "print(server.server_port, flush=True)\n"
        "server.serve_forever()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert process.stdout is not None
    yield process, int(process.stdout.readline())
    process.kill()


@pytest.mark.parametrize("script", ["offline_inference.py", "vllm_server.py"])
def test_without_vllm_it_says_what_to_type(tmp_path: Path, script: str) -> None:
    """In a folder that has no .venv-vllm."""
    flags = f"--model {MODEL}" + (f" --data {DATA}" if script.startswith("off") else "")
    result = warm.run(f"python {warm.ROOT / CODE / script} {flags}", tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "needs vLLM: make vllm\n"


def test_a_server_is_waited_for_and_ended_with_its_children(
    code: ModuleType, web: tuple[subprocess.Popen, int]
) -> None:
    process, port = web
    assert code.wait_until_ready(process, f"http://127.0.0.1:{port}/", 30) < 30
    children = psutil.Process(process.pid).children()
    assert len(children) == 1
    assert code.end(process, 10) == -signal.SIGTERM
    _, alive = psutil.wait_procs(children, 10)
    assert not alive
    with pytest.raises(RuntimeError, match="ended with -15 before it was ready"):
        code.wait_until_ready(process, f"http://127.0.0.1:{port}/", 30)


def test_an_answer_that_is_no_200_is_not_ready(
    code: ModuleType, web: tuple[subprocess.Popen, int]
) -> None:
    process, port = web
    with pytest.raises(RuntimeError, match=r"did not answer 200 within 0\.3 s"):
        code.wait_until_ready(process, f"http://127.0.0.1:{port}/nowhere", 0.3)


def test_the_cause_is_found_in_a_log(code: ModuleType, tmp_path: Path) -> None:
    log = tmp_path / "vllm.log"
    log.write_text(
        "(APIServer pid=1) WARNING 11-29 [system_utils.py:255] can cause `OSError: [Errno 24] Too many`\n"
        "(EngineCore pid=2) ERROR 11-29 [core.py:9] Traceback (most recent call last):\n"
        "(EngineCore pid=2) ERROR 11-29 [core.py:9] ValueError: To serve at least one request\n"
        "(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above.\n"
        "pydantic_core.ValidationError: 1 validation error for ModelConfig\n"
        "  Value error, User-specified max_model_len (512)\n"
    )
    assert [line.split(":")[0] for line in code.causes(log).splitlines()] == [
        "ValueError",
        "RuntimeError",
        "ValidationError",
    ]
    assert code.causes(log).endswith("User-specified max_model_len (512)")
    log.write_text("Killed\n")
    assert code.causes(log) == "Killed"


def test_greedy_tokens_do_not_depend_on_a_name(tmp_path: Path) -> None:
    """The checkpoint with defaults is the checkpoint, and leaves nothing behind."""
    offline = warm.load("offline_inference", warm.ROOT / CODE / "offline_inference.py")
    shutil.copytree(MODEL, tmp_path / "model")
    (tmp_path / "model/generation_config.json").write_text("{}")
    with offline.with_sampling_defaults(tmp_path / "model", {"temperature": 0.8}) as folder:
        assert (folder / "generation_config.json").read_text() == '{"temperature": 0.8}'
        assert (folder / "config.json").read_bytes() == (MODEL / "config.json").read_bytes()
    assert not folder.exists()
    assert (tmp_path / "model/generation_config.json").read_text() == "{}"


@pytest.mark.full
@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--max-model-len 512", "(512) is greater than the derived max_model_len"),
        ("--kv-cache-mib 1", "larger than the available KV cache memory"),
    ],
)
def test_what_vllm_refuses_is_one_line(run: Run, flags: str, said: str) -> None:
    result = run(f"python {CODE}/offline_inference.py {flags}", timeout=120)
    assert result.returncode == 2, result.stdout + result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("vLLM does not start: ")
    assert said in last


@pytest.mark.full
@pytest.mark.usefixtures("vllm")
def test_without_a_time_to_drain_answers_are_cut(run: Run) -> None:
    result = run(f"python {CODE}/vllm_server.py --shutdown-timeout 0 --requests 8", timeout=200)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "check: answers cut short = 1 >= 1  ok" in result.stdout
