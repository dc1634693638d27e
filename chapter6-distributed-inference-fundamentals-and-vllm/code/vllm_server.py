"""Start `vllm serve`, ask it as a client does, read its metrics under load, and stop it.

    python chapter6-distributed-inference-fundamentals-and-vllm/code/vllm_server.py

On GPUs:
    python chapter6-distributed-inference-fundamentals-and-vllm/code/vllm_server.py --max-num-seqs 256 --requests 2048 --kv-cache-memory 8G

Needs `make vllm`. Look at the chunks of a stream, which are not tokens; at what each mistake is
answered with; and at the metrics: they say whether the machine or the queue is slow. Section 6.4.
"""

import argparse
import asyncio
import contextlib
import importlib.util
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, NoReturn

import httpx
import openai
from prometheus_client.parser import text_string_to_metric_families

BOOK_MODEL = Path("chapter8-distributed-ai-training-in-action/checkpoint")
PROMPT = "When a rank waits for the others,"
Metrics = dict[str, float]


def free_port() -> int:
    """A port of 127.0.0.1 that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


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


def serve(args: argparse.Namespace, port: int, log: Path) -> subprocess.Popen:
    """`vllm serve` in a process group of its own; what it says goes to a file."""
    command = [
        *(engine_program("vllm"), "serve", str(args.model)),
        *("--served-model-name", "book"),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--dtype", "float32"),
        *("--max-model-len", str(args.max_model_len)),
        *("--kv-cache-memory-bytes", args.kv_cache_memory),
        *("--block-size", "32"),
        *("--max-num-seqs", str(args.max_num_seqs)),  # requests that run at the same time
        *("--shutdown-timeout", str(args.shutdown_timeout)),
        *("--distributed-executor-backend", "uni"),
        "--enforce-eager",
        "--disable-uvicorn-access-log",
    ]
    environment = os.environ | engine_variables() | {"VLLM_LOGGING_LEVEL": "INFO"}
    with log.open("w") as file:
        return subprocess.Popen(
            command, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )


def engine_program(name: str) -> str:
    """The engine's command, in its environment or in this one."""
    program = Path(f".venv-{name}/bin/{name}")
    if program.exists():
        return str(program)
    if importlib.util.find_spec(name) is None:
        stop(f"needs vLLM: make {name}")
    return name


def causes(log: Path) -> str:
    """What a log gives as the cause of an end, without the stacks; else its last lines."""
    lines = log.read_text(errors="replace").splitlines()
    found = []
    for line, below in zip(lines, [*lines[1:], ""], strict=True):
        named = re.search(r"\b[A-Z]\w*(?:Error|Exception): .*", line)
        if named and "WARNING" not in line:
            found.append(f"{named[0]} {below.strip() if below.startswith(' ') else ''}".rstrip())
    return "\n".join(dict.fromkeys(found)) or "\n".join(lines[-5:])


def ask(client: openai.OpenAI, args: argparse.Namespace) -> list[bool | None]:
    """One completion, whole and streamed; its tokens beside transformers'."""
    greedy: dict[str, Any] = {"model": "book", "prompt": args.prompt, "temperature": 0}
    whole = client.completions.create(
        **greedy, max_tokens=args.tokens, extra_body={"return_token_ids": True, "ignore_eos": True}
    )
    tokens = whole.choices[0].model_dump()["token_ids"]
    expected = transformers_tokens(args)
    differing = sum(a != b for a, b in zip(tokens, expected, strict=True))

    start = time.perf_counter()
    times, text, usage = [], "", None
    for chunk in client.completions.create(
        **greedy,
        max_tokens=args.tokens,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    ):
        if chunk.choices and chunk.choices[0].text:
            times.append(time.perf_counter() - start)
            text += chunk.choices[0].text
        usage = chunk.usage or usage
    assert usage is not None
    between = (times[-1] - times[0]) / (usage.completion_tokens - 1)
    say(
        f"stream        first text after {times[0] * 1e3:.0f} ms, then {between * 1e3:.1f} ms a token"
    )
    say(f"              {len(times)} chunks with text, {usage.completion_tokens} tokens in `usage`")
    for line in text.splitlines():
        say(f"~ {line}")
    return [
        check("tokens of vLLM that differ from transformers'", differing, 0),
        check("streamed text that differs from the whole", text != whole.choices[0].text, 0),
        check("tokens that `usage` of the stream lacks", args.tokens - usage.completion_tokens, 0),
    ]


def transformers_tokens(args: argparse.Namespace) -> list[int]:
    """Greedy tokens of transformers' generate() for the prompt."""
    import torch  # 4 s: only now
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    ids = AutoTokenizer.from_pretrained(args.model)(args.prompt, return_tensors="pt")
    tokens = model.generate(**ids, max_new_tokens=args.tokens, do_sample=False, pad_token_id=0)
    return tokens[0, ids["input_ids"].shape[1] :].tolist()


def mistakes(url: str, args: argparse.Namespace) -> list[bool | None]:
    """What a client does wrong, and what it is told. The last one is told nothing."""
    good = {"model": "book", "prompt": args.prompt, "temperature": 0}
    unexpected = 0
    say("mistake                     status  answer")
    for name, body, status in (
        ("unknown model", good | {"model": "llama"}, 404),
        ("max_tokens -1", good | {"max_tokens": -1}, 400),
        ("above the context", good | {"max_tokens": args.max_model_len + 1}, 400),
        ("temperature -1", good | {"temperature": -1}, 400),
        ("no JSON", "{'model': 'book'}", 400),
        ("max_token, misspelt", good | {"max_token": 4}, 200),
    ):
        content = body if isinstance(body, str) else json.dumps(body)
        headers = {"Content-Type": "application/json"}
        answer = httpx.post(f"{url}/v1/completions", content=content, headers=headers, timeout=60)
        found = answer.json()
        told = "ignored, and the default holds"
        if "error" in found:
            told = " ".join(found["error"]["message"].split())
        say(f"{name:27} {answer.status_code:6}  {told[:80].rstrip()}")
        unexpected += answer.status_code != status
    return [check("answers with another status than foreseen", unexpected, 0)]


def read_metrics(url: str) -> Metrics:
    """Every sample of /metrics by its name; those that differ in a label alone are added up."""
    found: Metrics = {}
    for family in text_string_to_metric_families(httpx.get(f"{url}/metrics", timeout=60).text):
        for sample in family.samples:
            if sample.name.startswith("vllm:") and "le" not in sample.labels:
                found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found


async def send_all(url: str, args: argparse.Namespace) -> tuple[int, Metrics]:
    """All requests at once, half of them behind one long prefix; tokens, and the gauges' peaks."""
    rng = random.Random(args.seed)
    peaks: Metrics = {}

    async def watch(client: httpx.AsyncClient) -> None:
        while True:
            for line in (await client.get("/metrics")).text.splitlines():
                if match := re.match(
                    r"vllm:(num_requests_\w+ing|kv_cache_usage_perc)\{.* (\S+)$", line
                ):
                    peaks[match[1]] = max(peaks.get(match[1], 0.0), float(match[2]))
            await asyncio.sleep(0.05)

    async def send(client: openai.AsyncOpenAI, number: int) -> int:
        beginning = args.prompt * 8 if number % 2 else ""
        answer = await client.completions.create(
            model="book",
            prompt=f"{beginning}{number} ranks",
            temperature=0,
            max_tokens=rng.randint(8, 88),
            extra_body={"ignore_eos": True},
        )
        assert answer.usage is not None
        return answer.usage.completion_tokens

    async with (
        httpx.AsyncClient(base_url=url, timeout=60) as watching,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        watcher = asyncio.create_task(watch(watching))
        tokens = await asyncio.gather(*(send(client, i) for i in range(args.requests)))
        watcher.cancel()
    return sum(tokens), peaks


def load(url: str, args: argparse.Namespace) -> list[bool | None]:
    """What /metrics says before, during and after a burst of requests."""
    before = read_metrics(url)
    start = time.perf_counter()
    tokens, peaks = asyncio.run(send_all(url, args))
    seconds = time.perf_counter() - start
    after = read_metrics(url)
    grown = {name: after[name] - before.get(name, 0.0) for name in after}

    def mean_ms(name: str) -> float:
        return grown[f"vllm:{name}_seconds_sum"] / grown[f"vllm:{name}_seconds_count"] * 1e3

    hits = grown["vllm:prefix_cache_hits_total"] / grown["vllm:prefix_cache_queries_total"]
    running, waiting = peaks["num_requests_running"], peaks["num_requests_waiting"]
    say(f"metric (vllm:...)                  {args.requests} requests at once")
    for name, value in (
        ("num_requests_running, peak", f"{running:.0f}"),
        ("num_requests_waiting, peak", f"{waiting:.0f}"),
        ("kv_cache_usage_perc, peak", f"{peaks['kv_cache_usage_perc']:.1%}"),
        ("num_preemptions_total", f"{grown['vllm:num_preemptions_total']:.0f}"),
        ("prefix_cache_hits / _queries", f"{hits:.0%} of prompt tokens"),
        ("generation_tokens_total", f"{tokens:,}, {tokens / seconds:,.0f} a second"),
        ("request_queue_time, mean", f"{mean_ms('request_queue_time'):,.0f} ms"),
        ("time_to_first_token, mean", f"{mean_ms('time_to_first_token'):,.0f} ms"),
        ("inter_token_latency, mean", f"{mean_ms('inter_token_latency'):,.1f} ms"),
        ("e2e_request_latency, mean", f"{mean_ms('e2e_request_latency'):,.0f} ms"),
    ):
        say(f"{name:34} {value}")
    lost = tokens - grown["vllm:generation_tokens_total"]
    share = mean_ms("request_queue_time") / mean_ms("time_to_first_token")
    return [
        check("tokens that the clients got, less those counted", abs(lost), 0),
        check("requests running at the same time", running, args.max_num_seqs),
        expect(
            "share of the time to the first token spent in the queue", share, 0.5, args.strict, True
        ),
    ]


def drain(
    client: openai.OpenAI, process: subprocess.Popen, args: argparse.Namespace
) -> list[bool | None]:
    """SIGTERM in the middle of a stream: does it go on to its end, and what do others get?"""
    reason = "no finish_reason: it stopped without an end"
    others: dict[str, int] = {}
    try:
        for chunk in client.with_options(timeout=10).completions.create(
            model="book",
            prompt=args.prompt,
            max_tokens=args.max_model_len // 2,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        ):
            if not others:
                process.send_signal(signal.SIGTERM)
            if len(others) < 2:  # new requests, until one of them is refused
                answer = try_another(client, args)
                others[answer] = others.get(answer, 0) + 1
            reason = chunk.choices[0].finish_reason or reason
    except openai.APIConnectionError:  # its timeout, too
        pass
    code = end(process, args.shutdown_timeout + 10)
    say(f"SIGTERM       the stream ends with {reason}; exit code {code}")
    say(f"              new requests meanwhile: {', '.join(others)}")
    cut = reason != "length"
    expected = args.shutdown_timeout == 0
    return [
        check("answers cut short", cut, expected, at_least=expected),
        check("exit code of the server", code, 0),
    ]


def try_another(client: openai.OpenAI, args: argparse.Namespace) -> str:
    try:
        client.completions.create(model="book", prompt=args.prompt, max_tokens=1, temperature=0)
    except openai.APIStatusError as error:
        return f"HTTP {error.status_code}"
    except openai.APIConnectionError:
        return "no connection"
    return "accepted"


def run(args: argparse.Namespace) -> list[bool | None]:
    url = f"http://127.0.0.1:{free_port()}"
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "vllm.log")
        process = serve(args, int(url.rsplit(":", 1)[1]), log)
        try:
            seconds = wait_until_ready(process, f"{url}/health", args.startup_timeout)
            say(f"ready         after {seconds:.0f} s; its log says:")
            for line in re.findall(
                r"\] (.*(?:max model len|KV cache size|init engine).*)", log.read_text()
            ):
                say(f"~ {line}")
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
            claims = ask(client, args)
            claims += mistakes(url, args)
            claims += load(url, args)
            claims += drain(client, process, args)
        except RuntimeError as error:
            stop(f"{error}:\n{causes(log)}")
        finally:
            end(process, 5)
    return claims


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, default=BOOK_MODEL, help="folder of a decoder")
    add("--prompt", default=PROMPT, help="text to go on from")
    add("--tokens", type=int, default=32, help="tokens to write")
    add("--requests", type=int, default=48, help="sent at once, to see the metrics move")
    add("--max-num-seqs", type=int, default=8, help="requests that run at the same time")
    add("--max-model-len", type=int, default=256, help="tokens of prompt and output together")
    add("--kv-cache-memory", default="64M", help="for keys and values, bytes; or 64M, 8G")
    add(
        "--shutdown-timeout",
        type=int,
        default=20,
        help="seconds to drain; 0 aborts, vLLM's default",
    )
    add("--startup-timeout", type=int, default=300, help="seconds")
    add("--seed", type=int, default=0, help="of the lengths")
    add("--strict", action="store_true", help="exit 1 if an `expect:` line does not hold")
    args = parser.parse_args()
    if not (args.model / "config.json").is_file():
        stop(f"no model in {args.model}: give the folder of one with --model DIR")
    return args


def main() -> None:
    args = parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `finally` ends the server
    sys.exit(conclude(run(args)))


# --- copied from other scripts; `make copies` keeps it equal to them ------------------------------


# Copied from offline_inference.engine_variables
def engine_variables() -> dict[str, str]:
    """Environment variables of one engine: no network, its log on stderr, and on a CPU one thread.

    Without OMP_NUM_THREADS=1 small matrices on a CPU spend their time waiting for threads.
    """
    variables = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    }
    if not Path("/dev/nvidiactl").exists():
        variables |= {
            "OMP_NUM_THREADS": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process, no second one
            "SGLANG_USE_CPU_ENGINE": "1",
            "SGLANG_CPU_OMP_THREADS_BIND": "0",
        }
    return variables


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


# Copied from ch01_single_gpu_baseline.expect
def expect(
    claim: str, value: float, bound: float, strict: bool, at_least: bool = False
) -> bool | None:
    """Print whether a value that depends on the machine keeps its bound; judge it if `strict`."""
    held = bool(value >= bound if at_least else value <= bound)
    verdict = "ok" if held else "not here"
    say(f"expect: {claim} = {value:.3g} {'>=' if at_least else '<='} {bound:.3g}  {verdict}")
    return held if strict else None


# Copied from ch01_single_gpu_baseline.conclude
def conclude(claims: list[bool | None]) -> int:
    """Print the last line of a run, and return its exit code; an `expect` that is None is no check."""
    judged = [held for held in claims if held is not None]
    failed = judged.count(False)
    say(f"{failed} of {len(judged)} checks FAILED" if failed else f"all {len(judged)} checks ok")
    return int(failed > 0)


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


if __name__ == "__main__":
    main()
