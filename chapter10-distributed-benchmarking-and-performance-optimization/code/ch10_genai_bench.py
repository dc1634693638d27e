"""Benchmark an OpenAI-compatible server with genai-bench, and read its results without being fooled.

    python chapter10-distributed-benchmarking-and-performance-optimization/code/ch10_genai_bench.py \
        --plot chapter10-distributed-benchmarking-and-performance-optimization/figures/genai_bench.svg

Without --api-base it starts chapter 9's stack and ends it afterwards. For another server type its URL,
--model-name, --tokenizer, and a load to match: section 10.4 has a line for a GPU. Its key is read from
the variable OPENAI_API_KEY, since everybody on the machine can see a command line. Look at what genai-bench
does not say: failures, goodput, and how long its users were made to wait.
"""

import argparse
import contextlib
import importlib.util
import json
import math
import os
import re
import secrets
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

STACK = Path("chapter9-production-llm-serving-stack/code/ch09_stack.py")
TOKENIZER = Path("chapter8-distributed-ai-training-in-action/checkpoint")

# genai-bench writes its own command line, with the key, into its log and its metadata. So it is told
# another key, and learns the real one from a variable, in the one method that makes the header.
LAUNCHER = """
import os, sys
from genai_bench.auth.openai.model_auth_adapter import OpenAIModelAuthAdapter
from genai_bench.cli import cli
key = os.environ.pop("REAL_KEY")
OpenAIModelAuthAdapter.get_headers = lambda self: {"Authorization": "Bearer " + key}
if os.environ.pop("NO_PICTURES"):  # nobody would see them
    cli.create_workbook = cli.plot_experiment_data_flexible = lambda *_, **__: None
sys.exit(cli.cli())
"""


@dataclass
class Load:
    """What genai-bench has seen at one concurrency. Times are in seconds."""

    concurrency: int
    seconds: float  # whole ones: genai-bench looks at its clock once a second
    done: list[dict]  # individual_request_metrics of requests without an error
    failures: Counter[str]  # by kind; with those of which genai-bench keeps no record

    def values(self, metric: str) -> list[float]:
        return [request[metric] for request in self.done if request[metric] is not None]


def drive(base: str, key: str, folder: Path, args: argparse.Namespace) -> tuple[str, bool]:
    """Run genai-bench in a folder; returns its log, without the key, and whether time was up."""
    command = [sys.executable, "-c", LAUNCHER, "benchmark", "--api-backend", args.backend]
    command += ["--api-base", base, "--api-key", "not-written-down", "--task", "text-to-text"]
    command += ["--api-model-name", args.model_name, "--model-tokenizer", absolute(args.tokenizer)]
    command += ["--traffic-scenario", args.scenario, "--metrics-time-unit", "s"]
    for concurrency in args.concurrency:
        command += ["--num-concurrency", str(concurrency)]
    minutes = math.ceil(args.limit_s / 60)
    command += ["--max-time-per-run", str(minutes), "--max-requests-per-run", str(args.requests)]
    # Its list of GPUs is closed, and has no CPU: what stands here is only copied to its metadata.
    command += ["--server-engine", "vLLM", "--server-version", "0", "--server-gpu-type", "H100"]
    command += ["--server-gpu-count", "1", "--log-dir", str(folder)]
    command += ["--experiment-base-dir", str(folder), "--experiment-folder-name", "results"]
    variables = {name: value for name, value in os.environ.items() if name != "OPENAI_API_KEY"}
    variables |= {"REAL_KEY": key, "NO_PICTURES": "" if args.out else "1"}
    variables |= {"ENABLE_UI": "false", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=variables,
        stdin=subprocess.DEVNULL,  # or it waits for a terminal
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    late = False
    try:
        log, _ = process.communicate(timeout=args.limit_s)
    except subprocess.TimeoutExpired:
        late = True
        end(process, 1)
        log, _ = process.communicate()
    finally:
        end(process, 1)
    return log.replace(key, "***"), late


def absolute(tokenizer: str) -> str:
    """A folder in full, since genai-bench runs in another; a name on the hub as it is."""
    return str(Path(tokenizer).resolve()) if Path(tokenizer).is_dir() else tokenizer


def scrub(folder: Path, key: str) -> int:
    """Take the key out of all files of a folder; returns how many held it.

    None does, unless the server repeats the key in an error message, which genai-bench keeps.
    """
    found = 0
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        parts = [path.read_bytes()]
        if zipfile.is_zipfile(path):  # a workbook
            with zipfile.ZipFile(path) as archive:
                parts += [archive.read(name) for name in archive.namelist()]
        if any(key.encode() in part for part in parts):
            found += 1
            if len(parts) > 1:
                path.unlink()
            else:
                path.write_bytes(parts[0].replace(key.encode(), b"***"))
    return found


def kind_of(code: int, message: str) -> str:
    """A name for an error. genai-bench gives a dropped stream the code 500, and a dead server 503."""
    if "refused" in message:
        return "connections refused"
    if re.search("ended prematurely|Connection broken|IncompleteRead|reset by peer", message):
        return "streams dropped"
    if message.startswith("Connection error"):
        return "connections closed"
    return f"answered {code}"


def read_load(results: Path, log: str, concurrency: int, asked: int | None) -> Load | None:
    """Read what genai-bench has left about one concurrency; None if it left nothing.

    Two kinds of failure are in none of its files. A stream that ends before its first token ends
    the request in an exception, which only the log has. And one that just stops (no [DONE], no
    finish_reason) counts as completed, with as many tokens as came.
    """
    names = (f"*_num_concurrency_{concurrency}_time_*s.json", f"debug_for_run_*_{concurrency}.json")
    files = [path for name in names for path in results.glob(name)]
    if not files:
        return None
    content = json.loads(files[0].read_text())
    failures: Counter[str] = Counter()
    done = []
    for request in content["individual_request_metrics"]:
        if request["error_code"]:
            failures[kind_of(request["error_code"], request["error_message"] or "")] += 1
        elif asked and request["num_output_tokens"] < asked:
            failures["ended early"] += 1
        else:
            done.append(request)
    part = log.partition(f"Starting benchmark with concurrency={concurrency},")[2]
    part = part.partition("Starting benchmark with concurrency=")[0]
    lost = len(re.findall(r"^ERROR .*locust\.user\.task", part, re.M))
    failures += Counter({"empty streams": lost})
    return Load(concurrency, content["aggregated_metrics"]["run_duration"], done, failures)


def percentile(values: list[float], percent: float, failed: int = 0) -> float:
    """The smallest value that `percent` % of all do not exceed; what failed took for ever."""
    ordered = sorted(values) + [math.inf] * failed
    return ordered[math.ceil(percent / 100 * len(ordered)) - 1] if ordered else math.nan


def within(request: dict, args: argparse.Namespace) -> bool:
    """Whether a request keeps the objective; one without a TPOT cannot be said to."""
    ttft, tpot = request["ttft"], request["tpot"]
    return tpot is not None and 1e3 * ttft <= args.slo_ttft_ms and 1e3 * tpot <= args.slo_tpot_ms


def report(load: Load, args: argparse.Namespace) -> dict[str, float]:
    """Print the row of a concurrency; returns its figures."""
    failed = load.failures.total()
    figures: dict[str, float] = {"concurrency": load.concurrency, "failed": failed}
    figures["requests"] = len(load.done) + failed
    for metric in ("ttft", "tpot", "e2e_latency"):
        for percent in (50, 99):
            value = percentile(load.values(metric), percent, failed)
            figures[f"{metric}_p{percent}_ms"] = 1e3 * value
    rate = 1 / load.seconds if load.seconds else math.nan
    good = sum(within(request, args) for request in load.done)
    figures["requests_per_s"] = len(load.done) * rate
    figures["tokens_per_s"] = sum(load.values("num_output_tokens")) * rate
    figures["goodput_per_s"] = good * rate
    cells = [f"{load.concurrency:>11} {figures['requests']:>8} {failed:>6}"]
    cells += [f"{figures[f'ttft_p{p}_ms']:>8.0f}" for p in (50, 99)]
    cells += [f"{figures[f'tpot_p{p}_ms']:>8.1f}" for p in (50, 99)]
    cells += [f"{figures[f'e2e_latency_p{p}_ms']:>8.0f}" for p in (50, 99)]
    cells += [f"{figures['requests_per_s']:>10.1f} {figures['tokens_per_s']:>8.0f}"]
    say("".join(cells) + f" {figures['goodput_per_s']:>8.1f}")
    return figures


def first_request(base: str, key: str, args: argparse.Namespace) -> float:
    """Seconds to the first token of one request. A server that cannot be talked to ends the run."""
    payload = {"model": args.model_name, "max_tokens": 8, "temperature": 0, "stream": True}
    payload["messages"] = [{"role": "user", "content": "When a rank waits for the others,"}]
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    body = json.dumps(payload).encode()
    request = urllib.request.Request(f"{base}/v1/chat/completions", body, headers)
    start = time.perf_counter()
    seconds = math.nan
    try:
        with urllib.request.urlopen(request, timeout=args.limit_s) as answer:
            for line in answer:
                if seconds != seconds and re.search(rb'"content": ?"[^"]', line):
                    seconds = time.perf_counter() - start
    except urllib.error.HTTPError as error:
        if error.code in (401, 403, 404):
            stop(
                f"{base} answers {error.code}: is the key in OPENAI_API_KEY, and --model-name right?"
            )
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ConnectionRefusedError | socket.gaierror | ValueError):
            stop(f"no server answers at {base}: {reason}")
    return seconds


def measure(base: str, key: str, args: argparse.Namespace) -> list[bool | None]:
    """Warm the server up, let genai-bench work on it, and say what came of it."""
    warmup = [first_request(base, key, args) for _ in range(args.warmup)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        log, late = drive(base, key, folder, args)
        scrub(folder, key)
        holding = scrub(folder, key) + (key in log)  # a second look
        asked = re.fullmatch(r"D\(\d+,(\d+)\)", args.scenario)
        tokens = int(asked[1]) if asked and args.backend != "openai" else None
        read = [read_load(folder / "results", log, n, tokens) for n in args.concurrency]
        if args.out:
            keep(folder, args.out)
    loads = [load for load in read if load]
    if not loads and not late:
        last = [line for line in log.splitlines() if line.strip()] or ["nothing"]
        stop(f"genai-bench ended without results; it said: {last[-1]}")

    say(f"genai-bench {args.scenario}, {args.requests} requests or some more at each concurrency")
    say(f"{'concurrency':>11} requests failed {'TTFT, ms':>13} {'TPOT, ms':>15} "
        f"{'e2e, ms':>15} requests/s tokens/s  goodput")  # fmt: skip
    say(" " * 27 + "     p50     p99" * 3)
    rows = [report(load, args) for load in loads]
    for load in loads:
        if load.failures:
            kinds = ", ".join(f"{count} {kind}" for kind, count in load.failures.most_common())
            say(f"concurrency {load.concurrency}: {load.failures.total()} failed: {kinds}")
    for concurrency in [n for n, load in zip(args.concurrency, read, strict=True) if not load]:
        say(f"concurrency {concurrency}: no results" + f" after {args.limit_s:g} s" * late)
    slowest = ", ".join(str(len(load.done)) for load in loads)
    say(f"p99           of {slowest} requests: below 100 of them it is the slowest one")
    say(f"goodput       requests/s within {args.slo_ttft_ms:g} ms to the first token, "
        f"{args.slo_tpot_ms:g} ms for each of the others")  # fmt: skip
    say("ITL           none: genai-bench keeps no times of the tokens between first and last")
    if warmup:
        say(f"cold          {1e3 * warmup[0]:.0f} ms to the first token of the first request, "
            "which is not counted")  # fmt: skip
    claims = [
        check("requests that failed", sum(load.failures.total() for load in loads), 0),
        check("concurrencies without results", len(read) - len(loads), 0),
        check("servers that send no usage", "There is no usage info" in log, 0),
        check("files and logs that hold the key", holding, 0),
    ]
    for load in loads:
        if load.done:
            predicted = load.concurrency / statistics.mean(load.values("e2e_latency"))
            counted = len(load.done) / load.seconds
            say(
                f"Little's law  {load.concurrency} at a time, each for its mean latency: "
                f"{predicted:.1f} requests/s; counted {counted:.1f}"
            )
            claim = (
                f"requests by Little's law that were not counted, at concurrency {load.concurrency}"
            )
            missing = abs(predicted - counted) * load.seconds
            claims.append(expect(claim, missing, load.concurrency + 1, args.strict))
    if args.json:
        args.json.write_text(
            json.dumps({"cold_ttft_s": warmup[:1], "loads": rows}, indent=1) + "\n"
        )
    if args.plot:
        plot(loads, rows, args)
    return claims


def keep(folder: Path, out: Path) -> None:
    """Give a finished folder its name, so that what has the name is whole."""
    draft = out.with_name(f"{out.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    shutil.copytree(folder, draft)
    shutil.rmtree(out, ignore_errors=True)
    draft.rename(out)


def plot(loads: list[Load], rows: list[dict[str, float]], args: argparse.Namespace) -> None:
    """Latencies of all requests by rank, with their mean and p99; and rates over the concurrency."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "ch10"
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6))
    for number, load in enumerate(loads):
        values = [1e3 * value for value in sorted(load.values("e2e_latency"))]
        shares = [(i + 1) / len(values) for i in range(len(values))]
        color = f"C{number}"
        left.step(
            values, shares, color=color, where="post", label=f"concurrency {load.concurrency}"
        )
        if values:
            left.axvline(statistics.mean(values), color=color, linestyle=":", linewidth=1)
            left.plot([percentile(values, 99)], [1], "o", color=color)
    left.set(xlabel="end-to-end latency (ms)", ylabel="share of requests", xlim=(0, None))
    left.set_title("each request; dotted: the mean, dot: p99", fontsize=10)
    left.legend(fontsize=8, frameon=False)
    places = range(len(rows))
    width = 0.4
    done = [row["requests_per_s"] for row in rows]
    good = [row["goodput_per_s"] for row in rows]
    right.bar([p - width / 2 for p in places], done, width, label="requests/s")
    right.bar([p + width / 2 for p in places], good, width, label="of them within the objective")
    right.set_xticks(list(places), [f"{row['concurrency']:g}" for row in rows])
    right.set(xlabel="concurrency", ylabel="1/s")
    right.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(args.plot, format="svg", facecolor="white", metadata={"Date": None})


def run(args: argparse.Namespace) -> list[bool | None]:
    """Measure the server at --api-base, or chapter 9's stack, started for this."""
    key = os.environ.get("OPENAI_API_KEY") or secrets.token_hex(16)
    if args.api_base:
        return measure(args.api_base.rstrip("/").removesuffix("/v1"), key, args)
    key = secrets.token_hex(16)
    port = free_port()
    base = f"http://127.0.0.1:{port}"
    command = [sys.executable, str(args.stack), "--serve", "--port", str(port), "--api-key", key]
    with tempfile.TemporaryFile("w+") as said:
        stack = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True
        )
        try:
            seconds = wait_until_ready(stack, f"{base}/health", args.limit_s)
            say(f"stack         {args.stack.name}, ready after {seconds:.0f} s")
            return measure(base, key, args)
        except RuntimeError as error:
            said.seek(0)
            last = said.read().replace(key, "***").strip().splitlines()[-1:]
            stop(f"{args.stack}: {error}: {''.join(last)}")
        finally:
            end(stack)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--api-base", help="URL of a server that is running; default: start chapter 9's stack")
    add("--stack", type=Path, default=STACK, help="the script of that stack")
    add("--model-name", default="book", help="the model's name at the server")
    add("--tokenizer", default=str(TOKENIZER), help="folder, or a name in the hub's local cache")
    backends = ("openai", "vllm", "sglang")
    add("--backend", choices=backends, default="vllm", help="openai: without ignore_eos")
    add("--scenario", default="D(64,32)", help="genai-bench's: D(input tokens,output tokens), ...")
    add("--concurrency", type=int, nargs="+", default=[1, 4], help="requests in flight, in turn")
    add("--requests", type=int, default=16, help="at each concurrency, and some more: a soft limit")
    add("--warmup", type=int, default=4, help="requests before, which are not counted")
    add("--slo-ttft-ms", type=float, default=100, help="objective: ms to the first token")
    add("--slo-tpot-ms", type=float, default=10, help="objective: ms for each token after it")
    add("--limit-s", type=float, default=120, help="seconds after which genai-bench is ended")
    add("--out", type=Path, help="also keep genai-bench's files in this folder, without the key")
    add("--json", type=Path, help="also write the table to this file")
    add("--plot", type=Path, help="also draw latencies and rates to this SVG file")
    add("--strict", action="store_true", help="exit 1 if an `expect:` line does not hold")
    args = parser.parse_args()
    if args.api_base and not re.match(r"https?://", args.api_base):
        stop(f"--api-base {args.api_base}: type a URL such as http://127.0.0.1:8000/v1")
    if not args.api_base and not args.stack.is_file():
        stop(f"{args.stack} is not here: type --api-base URL, or go to the repository's root")
    if args.tokenizer == str(TOKENIZER) and not TOKENIZER.is_dir():
        stop(f"{TOKENIZER} is not here: type --tokenizer DIR, or go to the repository's root")
    return args


def main() -> None:
    args = parse_args()
    if not importlib.util.find_spec("genai_bench"):
        stop("needs genai-bench: make setup")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what we started ends too
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
