"""The whole stack with one command: tokenizer, two model runners and the gateway before them.

    python chapter9-production-llm-serving-stack/code/ch09_stack.py

    python chapter9-production-llm-serving-stack/code/ch09_stack.py --serve --port 8100 --api-key sk-book &
    curl --silent --fail --retry 60 --retry-connrefused --retry-delay 1 http://127.0.0.1:8100/health
    curl --silent http://127.0.0.1:8100/v1/completions -H "Authorization: Bearer sk-book" --json '{"model": "book", "prompt": "When a rank waits for the others,", "max_tokens": 16, "temperature": 0}'
    kill %1

On GPUs:
    python chapter9-production-llm-serving-stack/code/ch09_stack.py --engine vllm

Without --serve it asks, kills a runner that holds requests, checks what came of them, and stops
everything. With --serve it stays until SIGTERM. Section 9.5.
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import openai

CODE = Path(__file__).resolve().parent
BOOK_MODEL = Path("chapter8-distributed-ai-training-in-action/checkpoint")
PROMPT = "When a rank waits for the others,"
GUEST_BURST = 3  # requests that the tenant `guest` may send


@dataclass
class Stack:
    """What runs, and how to reach it."""

    url: str
    key: str
    guest_key: str
    traces: Path
    processes: dict[str, subprocess.Popen]

    def client(self, key: str | None = None) -> openai.OpenAI:
        """Without retries of its own: we want to see what the gateway does."""
        key = self.key if key is None else key
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def gauge(self, name: str, replica: str) -> float:
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=5) as answer:
            text = answer.read().decode()
        found = re.search(rf'^gateway_backend_{name}{{replica="{replica}"}} (\S+)$', text, re.M)
        return float(found[1]) if found else 0.0


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def place_of(runner: int) -> tuple[list[str], dict[str, str]]:
    """Flags and variables of a runner: a GPU of its own, or its part of the only one."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    there = sorted(Path("/dev").glob("nvidia[0-9]*"))
    gpus = [str(i) for i in range(len(there))] if named is None else named.split(",")
    if len(gpus) < 2:
        return ["--gpu-share", "0.4"], {}
    return [], {"CUDA_VISIBLE_DEVICES": gpus[runner]}


@contextlib.contextmanager
def running(args: argparse.Namespace) -> Iterator[Stack]:
    """Start the four processes together, and give them to the caller when all answer.

    They end in the order in which a request meets them, so that each can finish what it has.
    """
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as ending:
        logs = Path(folder)
        ports = {name: free_port() for name in ("tokenizer", "runner-1", "runner-2")}
        urls = {name: f"http://127.0.0.1:{port}" for name, port in ports.items()}
        urls["gateway"] = f"http://127.0.0.1:{args.port or free_port()}"
        key = args.api_key or f"sk-{secrets.token_urlsafe(24)}"
        stack = Stack(urls["gateway"], key, f"sk-{secrets.token_urlsafe(24)}", logs / "traces", {})
        model = ["--model", str(args.model)]
        gateway = ["--tokenizer", urls["tokenizer"], "--context", str(args.context)]
        gateway += ["--key", f"reader={digest(key)}", "--key", f"guest={digest(stack.guest_key)}"]
        gateway += ["--limit", f"guest={GUEST_BURST},0.001", "--limit", "reader=1000,1000"]
        gateway += ["--check-every", "0.25"]
        gateway += ["--port", urls["gateway"].rpartition(":")[2]]
        if args.admin_key:
            gateway += ["--admin-key", digest(args.admin_key)]
        for name in ("runner-1", "runner-2"):
            gateway += ["--backend", f"runner={urls[name]}"]
        start = {"tokenizer": ("tokenizer_service.py", [*model, "--port", str(ports["tokenizer"])])}
        places: dict[str, dict[str, str]] = {}
        for number, name in enumerate(("runner-1", "runner-2")):
            share, places[name] = place_of(number)
            flags = [*model, "--engine", args.engine, "--port", str(ports[name]), *share]
            start[name] = ("model_runner.py", flags)
        start["gateway"] = ("ch09_api_gateway.py", gateway)
        extra = {"OMP_NUM_THREADS": "1"}
        if not getattr(args, "serve", False):  # what stays up would fill the disk
            extra["TRACE_FILE"] = str(stack.traces)
        for name, (script, flags) in start.items():
            process = subprocess.Popen(
                [sys.executable, str(CODE / script), *flags],
                stdout=(logs / f"{name}.log").open("w"),
                stderr=subprocess.STDOUT,
                env=os.environ | extra | places.get(name, {}),
                start_new_session=True,  # Ctrl-C is for us; we end them one by one
            )
            ending.callback(end, process)
            stack.processes[name] = process
        for name, process in stack.processes.items():
            try:
                wait_until_ready(process, f"{urls[name]}/health", args.patience)
            except RuntimeError as error:
                said = (logs / f"{name}.log").read_text().strip().splitlines()[-5:]
                stop("\n".join([f"{name}: {error}", *said]))
        wait_for(lambda: stack.gauge("up", "runner/1") + stack.gauge("up", "runner/2") == 2)
        yield stack


def context_of(model: Path) -> int:
    try:
        return json.loads((model / "config.json").read_text())["max_position_embeddings"]
    except OSError as error:
        stop(f"cannot read {error.filename}: type --model DIR, from the repository's root")


def wait_for(true: Callable[[], bool], patience_s: float = 30) -> None:
    end_s = time.monotonic() + patience_s
    while not true():
        if time.monotonic() > end_s:
            raise RuntimeError(f"not true after {patience_s:g} s")
        time.sleep(0.02)


# --- what a client sees ---------------------------------------------------------------------------


@dataclass
class Answer:
    ids: list[int]
    text: str
    first_token_s: float
    seconds: float
    headers: Any


def ask(client: openai.OpenAI, tokens: int, trace_id: str = "") -> Answer:
    """Stream a greedy completion; the ids come with it, as vLLM sends them when asked."""
    start = time.monotonic()
    first = 0.0
    ids: list[int] = []
    text = ""
    headers = {"traceparent": f"00-{trace_id}-{secrets.token_hex(8)}-01"} if trace_id else {}
    stream = client.completions.create(
        model="book",
        prompt=PROMPT,
        max_tokens=tokens,
        temperature=0,
        stream=True,
        extra_body={"return_token_ids": True, "ignore_eos": True},
        extra_headers=headers,
    )
    for chunk in stream:
        for choice in chunk.choices:
            first = first or time.monotonic() - start
            ids += getattr(choice, "token_ids", None) or []
            text += choice.text
    return Answer(ids, text, first, time.monotonic() - start, stream.response.headers)


def reference_ids(model: Path, tokens: int) -> list[int]:
    """The same greedy tokens from transformers, in this process."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(1)
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    reference.generation_config.eos_token_id = None  # as with ignore_eos
    prompt = AutoTokenizer.from_pretrained(model)(PROMPT, return_tensors="pt").input_ids
    ids = reference.generate(prompt, max_new_tokens=tokens, do_sample=False)[0].tolist()
    return ids[prompt.shape[1] :]


def status_of(call: Callable[[], Any]) -> int:
    """The status with which a call ends, as the client has it."""
    try:
        call()
    except openai.APIStatusError as error:
        return error.status_code
    return 200


def kill_a_runner(stack: Stack, requests: int, tokens: int) -> list[Answer | Exception]:
    """Freeze a runner, let requests pile up in it, and kill it: none of them has a token yet."""
    client = stack.client()
    victim = stack.processes["runner-1"]
    victim.send_signal(signal.SIGSTOP)  # its health check will notice in two seconds

    def one(_: int) -> Answer | Exception:
        try:
            return ask(client, tokens)
        except openai.APIError as error:
            return error

    with ThreadPoolExecutor(requests) as clients:
        answers = [clients.submit(one, i) for i in range(requests)]
        try:
            wait_for(lambda: stack.gauge("load", "runner/1") >= 1)
        finally:
            os.killpg(victim.pid, signal.SIGKILL)
        return [answer.result() for answer in answers]


def run(args: argparse.Namespace) -> list[bool | None]:
    start = time.monotonic()
    with ThreadPoolExecutor(1) as beside:
        reference = beside.submit(reference_ids, args.model, args.tokens)
        with running(args) as stack:
            seconds = time.monotonic() - start
            say(f"ready         {len(stack.processes)} processes after {seconds:.1f} s")
            expected = reference.result()
            claims = show_an_answer(stack, expected)
            claims += show_refusals(stack)
            claims += show_a_kill(stack, args.requests, expected)
    codes = {name: process.poll() for name, process in stack.processes.items()}
    say(f"stopped       {', '.join(f'{name} {code}' for name, code in codes.items())}")
    codes.pop("runner-1")  # the killed one
    claims.append(check("processes that did not end well", sum(c != 0 for c in codes.values()), 0))
    return claims


def show_an_answer(stack: Stack, expected: list[int]) -> list[bool]:
    client = stack.client()
    say(f"models        {', '.join(model.id for model in client.models.list())}")
    ask(client, 1)  # the first call of a client loads what it needs
    trace_id = secrets.token_hex(16)
    answer = ask(client, len(expected), trace_id)
    say(f"~ {' '.join((PROMPT + answer.text).split())}")
    first_ms = answer.first_token_s * 1e3
    all_ms = answer.seconds * 1e3
    say(f"answered by   {answer.headers['x-replica']}")
    say(f"first token   {first_ms:.0f} ms, all {len(answer.ids)} after {all_ms:.0f} ms")
    spans = spans_of(stack.traces, trace_id)
    services = sorted({span["service"] for span in spans})
    say(f"trace         {len(spans)} spans of {', '.join(services)}")
    wrong = differing(answer.ids, expected)
    return [
        check(f"of {len(expected)} tokens, those that differ from transformers'", wrong, 0),
        check("services in this request's trace", len(services), 3, at_least=True),
    ]


def show_refusals(stack: Stack) -> list[bool]:
    wrong_key = status_of(lambda: ask(stack.client("sk-wrong"), 1))
    guest = stack.client(stack.guest_key)
    with ThreadPoolExecutor(20) as clients:
        calls = [clients.submit(status_of, lambda: ask(guest, 1)) for _ in range(20)]
        statuses = [call.result() for call in calls]
    let_in = statuses.count(200)
    say(f"wrong key     {wrong_key}")
    say(f"guest         20 at once: {let_in} times 200, {statuses.count(429)} times 429")
    return [
        check("wrong keys that got anything but 401", int(wrong_key != 401), 0),
        check("requests over or under the guest's limit", abs(let_in - GUEST_BURST), 0),
    ]


def show_a_kill(stack: Stack, requests: int, expected: list[int]) -> list[bool]:
    results = kill_a_runner(stack, requests, len(expected))
    answers = [result for result in results if isinstance(result, Answer)]
    lost = len(results) - len(answers)
    moved = sum(answer.headers["x-attempts"] != "1" for answer in answers)
    wrong = sum(differing(answer.ids, expected) > 0 for answer in answers)
    say(f"killed        runner/1, with {moved + lost} of {requests} requests waiting in it")
    return [
        check("requests that the killed runner held", moved + lost, 1, at_least=True),
        check("of these, lost", lost, 0),
        check("answers that are not transformers'", wrong, 0),
    ]


def differing(ids: list[int], expected: list[int]) -> int:
    same = sum(a == b for a, b in zip(ids, expected, strict=False))
    return max(len(ids), len(expected)) - same


def spans_of(traces: Path, trace_id: str) -> list[dict]:
    """The trace's spans; a server's span ends a moment after its last byte was read."""

    def found() -> list[dict]:
        lines = traces.read_text().splitlines() if traces.exists() else []
        spans = [json.loads(line) for line in lines]
        return [span for span in spans if span["trace_id"] == trace_id]

    with contextlib.suppress(RuntimeError):
        wait_for(lambda: len({span["service"] for span in found()}) == 3, patience_s=5)
    return found()


def serve_until_told(args: argparse.Namespace) -> None:
    """Keep the stack up until SIGTERM or Ctrl-C; if a process dies the others go on."""
    with running(args) as stack:
        say(f"ready: {stack.url}/v1  key: {stack.key}")
        threading.Event().wait()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--serve", action="store_true", help="stay up until SIGTERM or Ctrl-C")
    add("--port", type=int, default=0, help="the gateway's port; 0: any free one")
    add("--api-key", help="the reader's key, to be seen in `ps`; default: a random one")
    add("--admin-key", help="key for the gateway's /admin; default: nobody may")
    add("--model", type=Path, default=BOOK_MODEL, help="a Hugging Face folder")
    add(
        "--engine",
        choices=["auto", "vllm", "transformers"],
        default="transformers",
        help="of the runners; auto: vLLM where it is installed",
    )
    add("--tokens", type=int, default=32, help="tokens of an answer")
    add("--requests", type=int, default=6, help="requests under way when a runner is killed")
    add("--patience", type=float, default=180, help="seconds for a process to become ready")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    args.context = context_of(args.model)
    os.environ.setdefault("NO_PROXY", "127.0.0.1")
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143 * (not args.serve))
    )  # ends what it started
    if args.serve:
        with contextlib.suppress(KeyboardInterrupt):
            serve_until_told(args)
        return
    sys.exit(conclude(run(args)))


# --- copied from other scripts; `make copies` keeps it equal to them ------------------------------


# Copied from ch01_single_gpu_baseline.check
def check(claim: str, value: float, bound: float, at_least: bool = False) -> bool:
    """Print whether a value keeps its bound, as it must anywhere; a rank where it does not speaks."""
    held = bool(value >= bound if at_least else value <= bound)  # False for NaN
    line = f"check: {claim} = {value:.3g} {'>=' if at_least else '<='} {bound:.3g}"
    if held:
        say(f"{line}  ok")
    else:
        print(f"{line}  FAILED on rank {os.environ.get('RANK', '0')}", flush=True)
    return held


# Copied from ch01_single_gpu_baseline.conclude
def conclude(claims: list[bool | None]) -> int:
    """Print the last line of a run, and return its exit code; an `expect` that is None is no check."""
    judged = [held for held in claims if held is not None]
    failed = judged.count(False)
    say(f"{failed} of {len(judged)} checks FAILED" if failed else f"all {len(judged)} checks ok")
    return int(failed > 0)


# Copied from vllm_server.end
def end(process: subprocess.Popen, patience_s: float = 30) -> int:
    """End a server and whatever it started: SIGTERM, time to drain, then SIGKILL. Its exit code.

    It must lead a process group: Popen(..., start_new_session=True).
    """
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience_s)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


# Copied from vllm_server.free_port
def free_port() -> int:
    """A port of 127.0.0.1 that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# Copied from ch01_single_gpu_baseline.say
def say(line: str) -> None:
    """Print on rank 0. A reader who has seen enough (`| head`) does not end the run."""
    if os.environ.get("RANK", "0") == "0":
        try:
            print(line, flush=True)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# Copied from ch01_single_gpu_baseline.stop
def stop(message: str) -> NoReturn:
    """End with one line and exit code 2: the command was wrong, not the program."""
    sys.stderr.write(message + "\n")  # in one piece: other ranks write too
    sys.exit(2)


# Copied from vllm_server.wait_until_ready
def wait_until_ready(process: subprocess.Popen, url: str, timeout_s: float) -> float:
    """Seconds until a GET of `url` answers 200; RuntimeError if the process ends or time is up."""
    start = time.monotonic()
    while time.monotonic() < start + timeout_s:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode} before it was ready")
        with contextlib.suppress(OSError, urllib.error.URLError):
            urllib.request.urlopen(url, timeout=5).close()  # raises HTTPError unless it is 2xx
            return time.monotonic() - start
        time.sleep(0.1)
    raise RuntimeError(f"{url} did not answer 200 within {timeout_s:g} s")


if __name__ == "__main__":
    main()
