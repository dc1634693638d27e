"""SGLang as a server: start it, ask it, read its metrics, make mistakes on purpose, and stop it.

    python chapter7-sglang-and-advanced-inference-architectures/code/sglang_server.py

On GPUs:
    python chapter7-sglang-and-advanced-inference-architectures/code/sglang_server.py --dtype bfloat16 --kv-tokens 65536

Look at the cached tokens in usage, at the statuses of the mistakes, and at the stream that SIGTERM
meets. The server is a process of .venv-sglang (`make sglang`), this one is not. Sections 7.3, 7.4.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

import openai
import torch

BOOK_MODEL = "chapter8-distributed-ai-training-in-action/checkpoint"
PROGRAM = Path(".venv-sglang/bin/sglang")
NOTES = {  # what a string may hold
    "maxLength": {"type": "string", "maxLength": 12},
    "pattern": {"type": "string", "pattern": "^[a-z ]{0,12}$"},
}
MISTAKES: dict[str, dict[str, Any]] = {
    "max_tokens -1": {"max_tokens": -1},
    "beyond the context": {"max_tokens": 100_000},
    "regex not closed": {"extra_body": {"regex": "(yes|no"}},
    "schema with a wrong type": {"extra_body": {"json_schema": '{"type": "text"}'}},
    "unknown model": {"model": "nobody"},
    "vLLM's key for a regex": {"extra_body": {"structured_outputs": {"regex": "yes|no"}}},
}


def start_server(args: argparse.Namespace, port: int, log: Path) -> subprocess.Popen:
    """Leads a process group of its own, so that all it starts can be ended with it."""
    command = [str(PROGRAM), "serve", "--model-path", args.model, "--served-model-name", "book"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", args.dtype]
    command += ["--max-total-tokens", str(args.kv_tokens), "--random-seed", "0"]
    command += ["--enable-metrics", "--enable-cache-report"]  # /metrics; cached tokens in usage
    command += ["--constrained-json-disable-any-whitespace"]  # section 7.3
    command += ["--sleep-on-idle"]  # or the scheduler takes a whole core while nobody asks
    if not Path("/dev/nvidiactl").exists():
        command += ["--device", "cpu"]
    with log.open("w") as output:
        return subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | engine_variables(),
            start_new_session=True,
        )


def complete(client: openai.OpenAI, args: argparse.Namespace, **other: Any) -> Any:
    """A completion; greedy unless told otherwise, since engines have defaults of their own."""
    wanted = {"model": "book", "prompt": args.prompt, "max_tokens": args.tokens, "temperature": 0}
    return client.completions.create(**(wanted | other))


def ask_twice(client: openai.OpenAI, args: argparse.Namespace) -> list[bool | None]:
    expected, prompt_tokens = reference(args)
    answers = [complete(client, args) for _ in range(2)]
    usages = [answer.usage for answer in answers]
    cached = [usage.prompt_tokens_details.cached_tokens for usage in usages]
    say(
        f"prompt        {usages[0].prompt_tokens} tokens, of which {cached[0]} cached, then {cached[1]}"
    )
    say(f"~ {answers[0].choices[0].text!r}")
    differ = sum(answer.choices[0].text != expected for answer in answers)
    return [
        exact("answers that differ from transformers'", differ, args),
        check("cached tokens the first time", cached[0], 0),
        check("prompt tokens computed the second time", prompt_tokens - cached[1], 1),
    ]


def reference(args: argparse.Namespace) -> tuple[str, int]:
    """transformers' greedy text, in float32, and the number of the prompt's tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    prompt = tokenizer(args.prompt, return_tensors="pt")
    tokens = model.generate(
        **prompt, do_sample=False, max_new_tokens=args.tokens, pad_token_id=tokenizer.pad_token_id
    )
    count = prompt.input_ids.shape[1]
    return tokenizer.decode(tokens[0, count:], skip_special_tokens=True), count


def stream(client: openai.OpenAI, args: argparse.Namespace) -> list[bool | None]:
    """Chunks as they come. Their number is not the number of tokens; usage has that."""
    whole = complete(client, args).choices[0].text
    pieces = []
    for chunk in complete(client, args, stream=True, stream_options={"include_usage": True}):
        pieces += [choice.text for choice in chunk.choices]
        usage = chunk.usage
    say(f"stream        {len(pieces)} chunks, {usage.completion_tokens} tokens")
    return [check("streams that are not the whole answer", "".join(pieces) != whole, 0)]


def read_metrics(url: str) -> dict[str, float]:
    """The counters and sums of /metrics by name, added up over their labels."""
    totals: Counter[str] = Counter()
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        for line in answer.read().decode().splitlines():
            if match := re.match(r"(sglang:\w+)(?:\{.*\})? (\S+)$", line):
                totals[match[1].removeprefix("sglang:")] += float(match[2])
    return totals


def metrics(client: openai.OpenAI, args: argparse.Namespace, url: str) -> list[bool | None]:
    """What the server has counted of three more requests, beside what their usage says."""
    before = read_metrics(url)
    usages = [complete(client, args, prompt=args.prompt + " and" * n).usage for n in range(3)]
    added = {name: value - before[name] for name, value in read_metrics(url).items()}
    said = {
        "prompt_tokens_total": sum(u.prompt_tokens for u in usages),
        "generation_tokens_total": sum(u.completion_tokens for u in usages),
        "cached_tokens_total": sum(u.prompt_tokens_details.cached_tokens for u in usages),
    }
    for name, value in said.items():
        say(f"metrics       sglang:{name} +{added[name]:.0f}, usage {value}")
    wrong = sum(added[name] != value for name, value in said.items())
    return [check("counters that are not what usage says", wrong, 0)]


def structured(client: openai.OpenAI, args: argparse.Namespace) -> list[bool | None]:
    """Many sampled objects: with a string that may hold anything, and with one that may not."""
    found = {}
    for name, note in NOTES.items():
        properties = {"ranks": {"type": "integer", "minimum": 1, "maximum": 64}, "note": note}
        schema = {"type": "object", "properties": properties, "required": list(properties)}
        grammar = {"json_schema": json.dumps(schema | {"additionalProperties": False})}
        many = {"n": args.answers, "max_tokens": 64, "temperature": 2.0}
        answer = complete(client, args, **many, extra_body=grammar)
        found[name] = sort_answers(name, [(c.text, c.finish_reason) for c in answer.choices])
    return [
        check("answers by pattern that parse", found["pattern"]["parsed"], args.answers, True),
        check("answers that fail for another reason", found["maxLength"]["other"], 0),
    ]


def mistakes(client: openai.OpenAI, args: argparse.Namespace) -> list[bool | None]:
    """What a client sees of a wrong request; two kinds are answered as if nothing were wrong."""
    usual = complete(client, args).choices[0].text
    refused = ignored = 0
    for name, what in MISTAKES.items():
        try:
            ignored += complete(client, args, **what).choices[0].text == usual
            said = "200, as if it were not there"
        except openai.APIStatusError as error:
            refused += error.status_code == 400
            message = error.body["message"] if isinstance(error.body, dict) else str(error)
            message = re.sub(r"\[[\d:]+\] \S+\.cc:\d+: ", "", " ".join(message.split()))
            said = f"{error.status_code} {type(error).__name__}: {message[:70]}"
        say(f"{name:26}{said}")
    return [
        check("mistakes that get 400", refused, 4, at_least=True),
        check("mistakes that change nothing", ignored, 2, at_least=True),
    ]


def drain(
    client: openai.OpenAI, args: argparse.Namespace, process: subprocess.Popen, url: str
) -> list[bool | None]:
    """SIGTERM while a stream is under way: it is written to its end, and /health says 503."""
    count = 160
    long = complete(
        client,
        args,
        max_tokens=count,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    next(iter(long))
    process.send_signal(signal.SIGTERM)
    start = time.monotonic()
    status = written = 0
    for number, chunk in enumerate(long):
        if number == 40:  # in the middle: some five seconds after the last stream it is gone
            try:
                urllib.request.urlopen(f"{url}/health", timeout=30)
            except urllib.error.HTTPError as error:
                status = error.code
        written = chunk.usage.completion_tokens if chunk.usage else written
    code, seconds = end(process, 60), time.monotonic() - start
    say(f"SIGTERM       {written} of {count} tokens, /health {status}, ended {seconds:.0f} s later")
    return [
        check("tokens lost of the stream that SIGTERM met", count - written, 0),
        check("status of /health while it drains", status, 503, at_least=True),
        check("exit code", abs(code), 0),
    ]


def run(args: argparse.Namespace) -> list[bool | None]:
    url = f"http://127.0.0.1:{free_port()}"
    with tempfile.TemporaryDirectory(prefix="sglang-") as folder:
        log = Path(folder, "log")
        process = start_server(args, int(url.rpartition(":")[2]), log)
        try:
            seconds = wait_until_ready(process, f"{url}/health", 300)
            say(f"ready         after {seconds:.0f} s")
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
            results = ask_twice(client, args)
            results += stream(client, args)
            results += metrics(client, args, url)
            results += structured(client, args)
            results += mistakes(client, args)
            results += drain(client, args, process, url)
        except RuntimeError as error:
            stop(f"{error}; its log ends with\n{log.read_text(errors='replace')[-1000:]}")
        finally:
            end(process, 0)
    return results


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default=BOOK_MODEL, help="a folder, or a name of the hub that is cached")
    add("--prompt", default="When a rank waits for the others,", help="text to continue")
    add("--tokens", type=int, default=32, help="tokens to write")
    add("--answers", type=int, default=40, help="structured answers to sample of each kind")
    add("--dtype", default="float32", help="of weights and cache; below float32 tokens may differ")
    add("--kv-tokens", type=int, default=4096, help="tokens that the cache has room for")
    add("--strict", action="store_true", help="exit 1 if an `expect:` line does not hold")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `finally` ends the server
    if not PROGRAM.exists():
        stop("needs SGLang: make sglang")
    if not Path(args.model, "config.json").exists():
        stop(f"--model {args.model}: no config.json there")
    sys.exit(conclude(run(args)))


# --- copied from other scripts; `make copies` keeps it equal to them ------------------------------


# Copied from vllm_server.free_port
def free_port() -> int:
    """A port of 127.0.0.1 that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


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


# Copied from sglang_offline.verdict
def verdict(text: str, finish_reason: str) -> str:
    """What an answer that should be JSON is: parsed, or why it is not."""
    try:
        json.loads(text)
    except json.JSONDecodeError:
        if finish_reason == "length":
            return "cut off"
        return "with a control character" if re.search(r"[\x00-\x1f]", text) else "other"
    return "parsed"


# Copied from sglang_offline.exact
def exact(claim: str, value: int, args: argparse.Namespace) -> bool | None:
    """Nothing may differ in float32. In 16 bits the two most likely tokens can change places."""
    if args.dtype == "float32":
        return check(claim, value, 0)
    return expect(claim, value, 0, args.strict)


# Copied from sglang_offline.sort_answers
def sort_answers(name: str, answers: list[tuple[str, str]]) -> Counter[str]:
    """Sort answers, each with its finish reason, by verdict; print the counts and the first one."""
    found = Counter(verdict(text, reason) for text, reason in answers)
    counts = [f"{found[v]} {v}" for v in ("cut off", "with a control character")]
    say(f"{name:14}{found['parsed']} of {len(answers)} parse; {', '.join(counts)}")
    say(f"~ {answers[0][0][:90]!r}")
    return found


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
