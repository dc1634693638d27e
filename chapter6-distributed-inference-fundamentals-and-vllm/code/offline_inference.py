"""Run the real vLLM without a server, and hold it to transformers: the same tokens, more of them.

    python chapter6-distributed-inference-fundamentals-and-vllm/code/offline_inference.py

On GPUs:
    python chapter6-distributed-inference-fundamentals-and-vllm/code/offline_inference.py --requests 1024 --slots 256 --kv-cache-mib 4096 --dtype bfloat16

Needs `make vllm`. Look at the blocks, which you can predict; at the sampling defaults, which come
from the checkpoint; and at uneven lengths beside equal ones. Section 6.3.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

BOOK_MODEL = Path("chapter8-distributed-ai-training-in-action/checkpoint")
PROMPT = "When a rank waits for the others,"


def enter_environment(package: str, name: str) -> None:
    """Go on as the same program in the environment of an engine, where this Python lacks its package.

    vLLM and SGLang pin other versions of the same packages, so each has an environment of its own,
    `.venv-PACKAGE`, made by `make PACKAGE`. With a Python that has the package only variables change.
    """
    for variable, value in engine_variables().items():
        os.environ.setdefault(variable, value)  # what you have set stays
    if importlib.util.find_spec(package) is not None:
        return
    python = Path(f".venv-{package}/bin/python")
    if not python.exists():
        stop(f"needs {name}: make {package}")
    os.execv(python, [str(python), *sys.argv])


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


@contextlib.contextmanager
def with_sampling_defaults(model: Path, defaults: dict[str, Any]) -> Iterator[Path]:
    """The same checkpoint, with a generation_config.json as those from a hub often have."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file in model.iterdir():
            if file.name != "generation_config.json":
                (folder / file.name).symlink_to(file.resolve())
        (folder / "generation_config.json").write_text(json.dumps(defaults))
        yield folder


def start(folder: Path, args: argparse.Namespace) -> Any:
    """The engine; its KV cache has a size that we say, not the rest of the memory."""
    from vllm import LLM

    try:
        return LLM(
            str(folder),
            dtype=args.dtype,
            max_model_len=args.max_model_len,
            kv_cache_memory_bytes=args.kv_cache_mib << 20,
            block_size=args.block_size,
            max_num_seqs=args.slots,
            enforce_eager=True,  # no compilation: a small model, a short run
        )
    except (ValueError, RuntimeError) as error:
        stop(f"vLLM does not start: {' '.join(str(error).split())}")


def greedy(count: int) -> Any:
    """Exactly `count` tokens, each the likeliest; nothing is left to the checkpoint's defaults."""
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)


def generate(llm: Any, prompts: list[list[int]], counts: list[int]) -> list[Any]:
    """One call with all requests: the engine's scheduler batches them."""
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    return llm.generate(inputs, [greedy(count) for count in counts], use_tqdm=False)


def static_batch(model: Any, prompts: list[list[int]], counts: list[int]) -> list[list[int]]:
    """transformers' generate(): one batch, padded on the left, that runs until its last request."""
    import torch

    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    tokens = model.generate(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=max(counts),
        do_sample=False,
        pad_token_id=0,
    )
    rows = tokens[:, longest:].tolist()
    return [row[:count] for row, count in zip(rows, counts, strict=True)]


def capacity(llm: Any, args: argparse.Namespace) -> list[bool | None]:
    """The blocks that a budget of memory gives, predicted from the model's shape."""
    config = llm.llm_engine.vllm_config
    hf = config.model_config.hf_config
    heads = hf.num_key_value_heads
    per_token = 2 * hf.num_hidden_layers * heads * hf.head_dim * config.model_config.dtype.itemsize
    predicted = (args.kv_cache_mib << 20) // (per_token * args.block_size)
    blocks = config.cache_config.num_gpu_blocks
    tokens = blocks * args.block_size
    say(f"KV cache      {per_token:,} bytes a token, {blocks:,} blocks of {args.block_size} tokens")
    say(f"              {tokens:,} tokens: {tokens // args.max_model_len} requests of full length")
    return [check("blocks, off the prediction", abs(blocks - predicted), 0)]


def sampling(llm: Any, reference: Any, args: argparse.Namespace) -> list[bool | None]:
    """Without parameters the checkpoint decides; with temperature=0 transformers' tokens come out."""
    ids = llm.get_tokenizer()(args.prompt).input_ids
    expected = static_batch(reference, [ids], [args.tokens])[0]
    found = generate(llm, [ids], [args.tokens])[0].outputs[0]
    defaults = llm.get_default_sampling_params()
    differing = sum(a != b for a, b in zip(found.token_ids, expected, strict=True))
    say(
        f"no parameters temperature {defaults.temperature}, top_k {defaults.top_k}: the checkpoint's"
    )
    for line in found.text.splitlines():
        say(f"~ {line}")
    return [
        check("temperature of a request that names none", defaults.temperature, 0.1, at_least=True),
        judge_tokens("tokens of vLLM that differ from transformers'", differing, args),
    ]


def prefixes(llm: Any, text: list[int], args: argparse.Namespace) -> list[bool | None]:
    """Two questions after one long beginning: whole blocks of it are found in the cache."""
    shared = text[: args.max_model_len // 2 + 5]
    hits = []
    for question in (text[-8:-4], text[-4:]):
        output = generate(llm, [shared + question], [4])[0]
        hits.append(output.num_cached_tokens)
    whole = len(shared) // args.block_size * args.block_size
    say(f"prefix        {len(shared)} tokens shared: {hits[0]} cached at first, then {hits[1]}")
    return [check("cached tokens, off the whole blocks of the prefix", abs(hits[1] - whole), 0)]


def throughput(
    llm: Any, reference: Any, text: list[int], args: argparse.Namespace
) -> list[bool | None]:
    """The same requests through both, in turns; uneven lengths, then equal ones."""
    rng = random.Random(args.seed)
    prompts = []
    for _ in range(args.requests):
        begin = rng.randrange(len(text) - 24)
        prompts.append(text[begin : begin + rng.randint(8, 24)])
    generate(llm, prompts, [2] * len(prompts))  # warm up
    ratios = []
    wrong = 0
    say("output lengths   tokens/s: vLLM   transformers, static   ratio")
    for low, high in ((4, 28), (16, 16)):
        counts = [rng.randint(low, high) for _ in prompts]
        seconds: dict[str, list[float]] = {"vllm": [], "static": []}
        for _ in range(args.repeats):
            begin = time.perf_counter()
            ours = [output.outputs[0].token_ids for output in generate(llm, prompts, counts)]
            middle = time.perf_counter()
            theirs = []
            for i in range(0, len(prompts), args.slots):
                some = slice(i, i + args.slots)
                theirs += static_batch(reference, prompts[some], counts[some])
            seconds["vllm"].append(middle - begin)
            seconds["static"].append(time.perf_counter() - middle)
        wrong += sum(
            texts_differ(reference, prompt, found, expected)
            for prompt, found, expected in zip(prompts, ours, theirs, strict=True)
        )
        vllm_s, static_s = (statistics.median(times) for times in seconds.values())
        ratios.append(static_s / vllm_s)
        total = sum(counts)
        say(
            f"{low:4} to {high:3} {total / vllm_s:19,.0f} {total / static_s:22,.0f} {ratios[-1]:7.2f}"
        )
    return [
        judge_tokens("requests whose tokens differ from transformers'", wrong, args),
        expect("vLLM's tokens/s over static batches', uneven", ratios[0], 1.3, args.strict, True),
        expect(
            "the same, over that at equal lengths", ratios[0] / ratios[1], 1.1, args.strict, True
        ),
    ]


def judge_tokens(claim: str, differing: int, args: argparse.Namespace) -> bool | None:
    """In 16 bits two likely tokens may be nearer to each other than rounding: only expected there."""
    if args.dtype == "float32":
        return check(claim, differing, 0)
    return expect(claim, differing, 0, args.strict)


def run(args: argparse.Namespace) -> list[bool | None]:
    importing = time.perf_counter()
    import torch
    import vllm
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    reference = reference.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    reference.generation_config.eos_token_id = None
    starting = time.perf_counter()
    defaults = {"do_sample": True, "temperature": 0.8, "top_k": 40}
    with with_sampling_defaults(args.model, defaults) as folder:
        llm = start(folder, args)
        ready = time.perf_counter()
        say(f"vLLM {vllm.__version__}, {args.dtype}")
        say(
            f"start-up      {starting - importing:.1f} s of imports, {ready - starting:.1f} s of engine"
        )
        text = llm.get_tokenizer()(args.data.read_text(encoding="utf-8"), verbose=False).input_ids
        claims = capacity(llm, args)
        claims += sampling(llm, reference, args)
        claims += prefixes(llm, text, args)
        claims += throughput(llm, reference, text, args)
    return claims


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, default=BOOK_MODEL, help="folder of a decoder")
    add("--data", type=Path, default="resources/corpus.txt", help="text to take prompts from")
    add("--prompt", default=PROMPT, help="text to go on from")
    add("--tokens", type=int, default=32, help="tokens to write")
    add("--requests", type=int, default=96, help="of the measured traces")
    add("--slots", type=int, default=32, help="requests that run at the same time")
    add("--repeats", type=int, default=3, help="of each measurement")
    add("--max-model-len", type=int, default=256, help="tokens of prompt and output together")
    add("--kv-cache-mib", type=int, default=64, help="memory for keys and values, MiB")
    add("--block-size", type=int, default=32, help="tokens of a block of the KV cache")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of both models")
    add("--seed", type=int, default=0, help="of prompts and lengths")
    add("--strict", action="store_true", help="exit 1 if an `expect:` line does not hold")
    args = parser.parse_args()
    if not (args.model / "config.json").is_file():
        stop(f"no model in {args.model}: give the folder of one with --model DIR")
    if not args.data.is_file():
        stop(f"cannot read {args.data}: give a text file with --data FILE")
    return args


def main() -> None:
    args = parse_args()
    enter_environment("vllm", "vLLM")
    sys.exit(conclude(run(args)))


# --- copied from other scripts; `make copies` keeps it equal to them ------------------------------


# Copied from continuous_batch_scheduler.texts_differ
def texts_differ(model: Any, prompt: list[int], found: list[int], expected: list[int]) -> bool:
    """Whether two greedy texts part, other than where two tokens are equally likely to 1e-4.

    There the last bit of a logit decides, and it depends on the order of additions.
    """
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        if a != b:
            text = [*prompt, *expected[:i]]
            logits = model(model.get_input_embeddings().weight.new_tensor([text]).long()).logits
            return bool((logits[0, -1, a] - logits[0, -1, b]).abs() > 1e-4)
    return False


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
