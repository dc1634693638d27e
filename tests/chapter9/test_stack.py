"""The stack: one command starts it, and SIGTERM or Ctrl-C leaves nothing behind."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import warm
from book import CHAPTERS

pytestmark = pytest.mark.full  # what the reader's tier needs is in the printed commands
SCRIPT = f"{CHAPTERS[8]}/code/ch09_stack.py"
KEY = "sk-of-the-test"
Serve = Callable[..., tuple[subprocess.Popen[str], str]]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Start `--serve` and return the process and its base URL when it says that it is ready."""
    started: list[subprocess.Popen[str]] = []

    def start(*flags: str) -> tuple[subprocess.Popen[str], str]:
        process = subprocess.Popen(
            [sys.executable, SCRIPT, "--serve", "--api-key", KEY, *flags],
            cwd=warm.ROOT,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"NO_PROXY": "127.0.0.1"},
        )
        started.append(process)
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.fullmatch(r"ready: (http://127\.0\.0\.1:\d+)/v1  key: (\S+)\n", line)
        assert found, line
        assert found[2] == KEY
        return process, found[1]

    yield start
    for process in [process for process in started if process.poll() is None]:
        children = psutil.Process(process.pid).children(recursive=True)
        for child in [*children, process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        process.wait()


def test_it_serves_until_told_and_leaves_nothing(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TRACE_FILE", str(tmp_path / "traces"))  # its own would grow without end
    process, url = serve("--admin-key", "sk-admin")
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) == 4
    listening = {c.laddr.ip for child in children for c in child.net_connections() if not c.raddr}
    assert listening == {"127.0.0.1"}
    words = [word for child in children for word in child.cmdline()]
    assert KEY not in words, "a key on a command line is in everybody's `ps`"
    headers = {"Authorization": f"Bearer {KEY}"}
    chat: dict[str, Any] = {
        "model": "book",
        "messages": [{"role": "user", "content": "What is a rank?"}],
    }
    chat |= {"max_tokens": 4, "temperature": 0}
    with httpx.Client(base_url=url, headers=headers, timeout=60, trust_env=False) as client:
        answers = [client.post("/v1/chat/completions", json=chat) for _ in range(4)]
        assert {answer.status_code for answer in answers} == {200}
        assert {answer.headers["x-replica"] for answer in answers} == {"runner/1", "runner/2"}
        assert len({answer.json()["choices"][0]["message"]["content"] for answer in answers}) == 1
        long = client.post("/v1/completions", json={"model": "book", "prompt": "rank " * 500})
        assert long.status_code == 400
        assert long.json()["error"]["code"] == "context_length_exceeded"
        admin = {"Authorization": "Bearer sk-admin"}
        assert client.get("/admin/weights", headers=admin).json() == {"runner": 1}
    assert "/v1/chat/completions" in (tmp_path / "traces").read_text()
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    assert not [child for child in children if child.is_running()]


def test_a_stream_that_is_cut_is_told(serve: Serve) -> None:
    process, url = serve()
    children = psutil.Process(process.pid).children(recursive=True)
    runners = [child for child in children if "model_runner.py" in str(child.cmdline())]
    body: dict[str, Any] = {
        "model": "book",
        "prompt": "A",
        "max_tokens": 200,
        "temperature": 0,
        "stream": True,
    }
    body |= {"ignore_eos": True}
    headers = {"Authorization": f"Bearer {KEY}"}
    with (
        httpx.Client(headers=headers, timeout=60, trust_env=False) as client,
        client.stream("POST", f"{url}/v1/completions", json=body) as answer,
    ):
        number = int(answer.headers["x-replica"].rpartition("/")[2])
        lines = answer.iter_lines()
        assert "text" in next(lines)
        port = psutil_port(process, number)
        next(p for p in runners if str(port) in p.cmdline()).kill()
        rest = [line for line in lines if line]
    assert "stream_cut" in rest[-1]
    assert "data: [DONE]" not in rest
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
    assert not [child for child in children if child.is_running()]


def psutil_port(process: subprocess.Popen[str], number: int) -> int:
    """The port of a runner, from the gateway's flags: its replicas are in their order."""
    flags = [p.cmdline() for p in psutil.Process(process.pid).children()]
    gateway = next(words for words in flags if "ch09_api_gateway.py" in str(words))
    urls = [word for word in gateway if word.startswith("runner=")]
    return int(urls[number - 1].rpartition(":")[2])


def test_two_runners_do_not_take_the_whole_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(warm.ROOT / CHAPTERS[8] / "code"))
    stack = warm.load("ch09_stack", warm.ROOT / SCRIPT)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    variables = [stack.place_of(number)[1]["CUDA_VISIBLE_DEVICES"] for number in (0, 1)]
    assert variables == ["2", "5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    flags, variables = stack.place_of(1)
    assert variables == {}
    assert float(flags[flags.index("--gpu-share") + 1]) < 0.5


def test_what_cannot_start_is_named() -> None:
    for flags, said in ((["--model", "no/such/folder"], "no/such/folder"),):
        done = subprocess.run(
            [sys.executable, SCRIPT, *flags], cwd=warm.ROOT, capture_output=True, text=True
        )
        assert done.returncode == 2
        assert said in done.stderr
        assert "Traceback" not in done.stderr
