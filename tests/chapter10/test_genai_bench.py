"""What fails is counted and named, whatever genai-bench says of it; and the key is written nowhere."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import warm
from book import CHAPTERS

CODE = f"{CHAPTERS[9]}/code"
SCRIPT = warm.ROOT / CODE / "ch10_genai_bench.py"
KEY = "sk-of-this-test-0123456789"
Run = Callable[..., warm.Result]

script = warm.load("ch10_genai_bench", SCRIPT)


# --- a server that fails on purpose --------------------------------------------------------------


class StandIn(BaseHTTPRequestHandler):
    """Streams a chat completion of max_tokens tokens, one each millisecond; or fails in its turn."""

    protocol_version = "HTTP/1.1"
    faults: tuple[str, ...] = ()
    warmup = 0  # this many requests go well before
    served = 0
    lock = threading.Lock()

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        kind = type(self)
        with kind.lock:
            number = kind.served - kind.warmup
            kind.served += 1
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        fault = kind.faults[number % len(kind.faults)] if kind.faults and number >= 0 else ""
        try:
            self.answer(body["max_tokens"], fault)
        except OSError:  # genai-bench leaves when its time is up
            self.close_connection = True

    def answer(self, tokens: int, fault: str) -> None:
        if fault == "never":
            time.sleep(60)
        if fault in ("500", "401"):
            said = f"no such key: {self.headers['Authorization']}".encode()
            self.send_response(int(fault))
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if fault == "empty":
            self.wfile.write(b"0\r\n\r\n")
            return
        for number in range(tokens):
            if number == 5 and fault == "drops":  # no end of the body: a broken connection
                self.close_connection = True
                return
            if number == 5 and fault == "stops":  # an end of the body, and no word of why
                break
            time.sleep(0.001)
            self.event({"choices": [{"delta": {"content": "x "}, "finish_reason": None}]})
        else:
            self.event({"choices": [{"delta": {"content": ""}, "finish_reason": "length"}]})
            if fault != "no usage":
                self.event(
                    {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": tokens}}
                )
            self.event("[DONE]")
        self.wfile.write(b"0\r\n\r\n")

    def event(self, data: Any) -> None:
        line = b"data: " + (data if isinstance(data, str) else json.dumps(data)).encode() + b"\n\n"
        self.wfile.write(f"{len(line):x}\r\n".encode() + line + b"\r\n")


@contextmanager
def serving(*faults: str, warmup: int = 0) -> Iterator[str]:
    kind = type("Faulty", (StandIn,), {"faults": faults, "warmup": warmup, "served": 0})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def bench(run: Run, url: str, flags: str = "") -> warm.Result:
    command = f"OPENAI_API_KEY={KEY} python {CODE}/{SCRIPT.name} --api-base {url} {flags}"
    result = run(command, timeout=120)
    assert KEY not in result.stdout + result.stderr
    assert "Traceback" not in result.stderr, result.stderr
    return result


# --- reading its results -------------------------------------------------------------------------


def request(tokens: int = 32, ttft: float = 0.05, **more: Any) -> dict[str, Any]:
    """A row of individual_request_metrics, as genai-bench 0.0.5 writes it."""
    good = {"ttft": ttft, "tpot": 0.01, "e2e_latency": ttft + 0.3, "num_output_tokens": tokens}
    return good | {"error_code": None, "error_message": None} | more


def failed(code: int, message: str) -> dict[str, Any]:
    nothing = dict.fromkeys(("ttft", "tpot", "e2e_latency", "num_output_tokens"))
    return nothing | {"error_code": code, "error_message": message}


def write(folder: Path, name: str, requests: list[dict[str, Any]]) -> None:
    whole = {"run_duration": 2.0, "error_rate": 0.0}  # 0.0: whatever failed
    content = {"aggregated_metrics": whole, "individual_request_metrics": requests}
    (folder / name).write_text(json.dumps(content))


LOG = """
INFO     2026 - genai_bench.benchmark:benchmark - Starting benchmark with concurrency=1, spawn_rate=1
ERROR    2026 - locust.user.task:run - response.time_at_first_token is None
INFO     2026 - genai_bench.benchmark:benchmark - Starting benchmark with concurrency=14, spawn_rate=4
ERROR    2026 - locust.user.task:run - response.time_at_first_token is None
ERROR    2026 - locust.user.task:run - response.time_at_first_token is None
"""


def test_every_kind_of_failure_is_counted(tmp_path: Path) -> None:
    requests = [
        *[request() for _ in range(5)],
        request(tokens=6),
        failed(500, "Response ended prematurely"),
        failed(500, '{"error": {"message": "boom"}}'),
        failed(500, '{"error": {"message": "boom"}}'),
        failed(503, "Connection error: [Errno 111] Connection refused"),
        failed(503, "Connection error: Remote end closed connection without response"),
    ]
    write(tmp_path, "D64_32_text-to-text_num_concurrency_14_time_3s.json", requests)
    load = script.read_load(tmp_path, LOG, 14, 32)
    assert len(load.done) == 5
    assert load.failures == {
        "ended early": 1,
        "streams dropped": 1,
        "answered 500": 2,
        "connections refused": 1,
        "connections closed": 1,
        "empty streams": 2,
    }
    assert not script.read_load(tmp_path, LOG, 14, None).failures["ended early"]
    assert script.read_load(tmp_path, LOG, 1, 32) is None


def test_a_run_that_failed_altogether_is_read_too(tmp_path: Path) -> None:
    """genai-bench ends with "No values found for metric 'ttft'. This should never happen!" """
    write(tmp_path, "debug_for_run_D64_32_4.json", [failed(500, "boom")] * 3)
    load = script.read_load(tmp_path, "", 4, 32)
    assert (load.done, load.failures) == ([], {"answered 500": 3})


def test_what_failed_is_in_the_percentiles() -> None:
    values = [float(i) for i in range(1, 100)]
    assert script.percentile(values, 99) == 99
    assert script.percentile(values, 50) == 50
    assert script.percentile(values, 99, failed=1) == 99
    assert script.percentile(values, 99, failed=3) == float("inf")
    assert script.percentile([3.0], 50) == script.percentile([3.0], 99) == 3.0
    assert script.percentile([], 50, failed=2) == float("inf")
    assert script.percentile([], 50) != script.percentile([], 50)  # NaN: nobody asked anything


def test_goodput_wants_all_of_the_objective(capsys: pytest.CaptureFixture[str]) -> None:
    """A reply of one token has no TPOT: nobody can say that it kept the objective."""
    args = SimpleNamespace(slo_ttft_ms=500, slo_tpot_ms=50)
    done = [request(), request(ttft=0.6), request(tpot=0.06), request(tpot=None, tokens=1)]
    assert [script.within(one, args) for one in done] == [True, False, False, False]
    load = script.Load(2, 4.0, done, Counter({"answered 500": 4}))
    figures = script.report(load, args)
    assert (figures["requests"], figures["failed"]) == (8, 4)
    assert (figures["requests_per_s"], figures["goodput_per_s"]) == (1.0, 0.25)
    assert figures["e2e_latency_p99_ms"] == float("inf")
    assert " inf" in capsys.readouterr().out


def test_no_file_keeps_the_key(tmp_path: Path) -> None:
    """Also where the server repeats it, and where a workbook has packed it."""
    (tmp_path / "results").mkdir()
    text = tmp_path / "results" / "metadata.json"
    text.write_text(json.dumps({"cmd": f"--api-key {KEY} --x"}))
    other = tmp_path / "genai_bench.log"
    other.write_text("nothing")
    with zipfile.ZipFile(tmp_path / "a.xlsx", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("sheet.xml", f"<c>{KEY}</c>" * 100)
    assert KEY.encode() not in (tmp_path / "a.xlsx").read_bytes()
    assert script.scrub(tmp_path, KEY) == 2
    assert script.scrub(tmp_path, KEY) == 0
    assert json.loads(text.read_text()) == {"cmd": "--api-key *** --x"}
    assert other.read_text() == "nothing"
    assert not (tmp_path / "a.xlsx").exists()


# --- the real genai-bench ------------------------------------------------------------------------


needs_genai_bench = pytest.mark.skipif(
    sys.version_info >= (3, 13), reason="needs Python below 3.13: genai-bench does"
)


@pytest.mark.full
@needs_genai_bench
def test_a_server_that_fails_in_all_ways(run: Run, tmp_path: Path) -> None:
    """genai-bench itself ends with 0 after this, and says that the error rate was 0."""
    faults = ("", "500", "drops", "stops", "empty", "no usage")
    with serving(*faults, warmup=1) as url:
        flags = f"--concurrency 1 --requests 24 --warmup 1 --out {tmp_path}/kept"
        result = bench(run, url, flags)
    assert result.returncode == 1
    line = next(line for line in result.stdout.splitlines() if " failed: " in line)
    for kind in ("answered 500", "streams dropped", "ended early", "empty streams"):
        assert kind in line, line
    assert "check: servers that send no usage = 1 <= 0  FAILED" in result.stdout
    assert "check: files and logs that hold the key = 0 <= 0  ok" in result.stdout
    assert " inf " in result.stdout
    kept = list((tmp_path / "kept").rglob("*.json"))
    content = [json.loads(path.read_text()) for path in kept if "concurrency_1" in path.name]
    whole = content[0]["aggregated_metrics"]
    assert whole["num_error_requests"] > 0
    assert whole["error_rate"] == 0, "genai-bench counts now: change section 10.4"
    assert not any(KEY.encode() in p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())


@pytest.mark.full
@needs_genai_bench
def test_a_server_that_answers_500_and_repeats_the_key(run: Run, tmp_path: Path) -> None:
    with serving("500", warmup=1) as url:
        result = bench(run, url, f"--concurrency 1 4 --warmup 1 --out {tmp_path}/kept")
    assert result.returncode == 1
    assert " answered 500" in result.stdout
    assert "concurrency 4: no results" in result.stdout
    assert "check: files and logs that hold the key = 0 <= 0  ok" in result.stdout
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(b"no such key: Bearer ***" in path.read_bytes() for path in files)
    assert not any(KEY.encode() in path.read_bytes() for path in files)


@pytest.mark.full
@needs_genai_bench
def test_a_server_that_never_answers(run: Run, checkout: Path) -> None:
    with serving("never", warmup=1) as url:
        result = bench(run, url, "--concurrency 1 --warmup 1 --limit-s 15")
    assert result.returncode == 1
    assert "concurrency 1: no results after 15 s" in result.stdout
    assert "check: concurrencies without results = 1 <= 0  FAILED" in result.stdout


@pytest.mark.full
@needs_genai_bench
def test_a_killed_run_leaves_nothing_running(tmp_path: Path) -> None:
    with serving("never", warmup=1) as url:
        command = [sys.executable, str(SCRIPT), "--api-base", url, "--warmup", "1"]
        command += ["--concurrency", "1", "--tokenizer", str(warm.ROOT / script.TOKENIZER)]
        variables = os.environ | {"OPENAI_API_KEY": KEY, "TMPDIR": str(tmp_path)}
        process = subprocess.Popen(command, cwd=tmp_path, env=variables)
        parent = psutil.Process(process.pid)
        end = time.monotonic() + 30
        while not (children := parent.children(recursive=True)) and time.monotonic() < end:
            time.sleep(0.05)
        assert children
        assert not any(KEY in " ".join(child.cmdline()) for child in children), "ps shows the key"
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 143
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    assert not list(tmp_path.iterdir())


@pytest.mark.full
@needs_genai_bench
@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--api-base http://127.0.0.1:9", "no server answers at http://127.0.0.1:9"),
        ("--api-base 127.0.0.1:9", "type a URL such as http://"),
        ("--stack none.py", "none.py is not here: type --api-base URL"),
        ("--api-base http://127.0.0.1:9 --concurrency x", "invalid int value: 'x'"),
    ],
)
def test_bad_input_gets_one_line(run: Run, flags: str, says: str) -> None:
    result = run(f"python {CODE}/{SCRIPT.name} {flags}", timeout=60)
    assert result.returncode == 2
    assert says in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.full
@needs_genai_bench
def test_a_wrong_key_is_one_line(run: Run) -> None:
    with serving("401") as url:
        result = bench(run, url)
    assert result.returncode == 2
    assert "answers 401: is the key in OPENAI_API_KEY" in result.stderr
