"""SGLang in this process: transformers' tokens, prompts that are computed once, answers that keep a form.

    python chapter7-sglang-and-advanced-inference-architectures/code/sglang_offline.py

On GPUs:
    python chapter7-sglang-and-advanced-inference-architectures/code/sglang_offline.py --dtype bfloat16 --answers 200

Look at `cached` beside `predicted`, and at how many of the answers parse. Wants `make sglang`.
Sections 7.1 and 7.3.
"""

import argparse
import importlib.util
import json
import os
import re
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

if TYPE_CHECKING:
    from sglang import Engine

BOOK_MODEL = "chapter8-distributed-ai-training-in-action/checkpoint"
SHARED = (
    "Each rank keeps a part of every tensor, and the ranks lend each other the rest, block by block, "
    "when it is needed. A rank that waits for the others does nothing in the meantime. All ranks run "
    "equally many forwards. A checkpoint is a folder that has its final name only when it is whole. "
)
QUESTIONS = ("What does a rank wait for?", "Who writes the checkpoint?")
SCHEMA = {
    "type": "object",
    "properties": {
        "collective": {"enum": ["all_reduce", "all_gather"]},
        "ranks": {"type": "integer", "minimum": 1, "maximum": 64},
        "note": {"type": "string", "maxLength": 12},
    },
    "required": ["collective", "ranks", "note"],
    "additionalProperties": False,
}
# The same object without room for whitespace, and with letters alone in its string.
REGEX = (
    r'\{"collective":"(all_reduce|all_gather)","ranks":([1-9]|[1-5][0-9]|6[0-4]),'
    r'"note":"[a-z ]{0,12}"\}'
)


def prefill_flops(config: Any, tokens: int, cached: int) -> int:
    """Of a Llama that computes all but the first `cached` tokens of a prompt.

    Two for each weight of a layer and token; position p multiplies its query with p keys and p
    weights with values, 4 x width FLOPs a key and layer; the output layer sees the last token only.
    """
    width = config.hidden_size
    kv_width = width * config.num_key_value_heads // config.num_attention_heads
    layer = 2 * width * (width + kv_width) + 3 * width * config.intermediate_size
    pairs = (tokens * (tokens + 1) - cached * (cached + 1)) // 2
    return (
        config.num_hidden_layers * (2 * layer * (tokens - cached) + 4 * width * pairs)
        + 2 * width * config.vocab_size
    )


def common_prefix(a: list[int], b: list[int]) -> int:
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def expected_hit(prompt: list[int], kept: list[list[int]], page: int) -> int:
    """Tokens of a prompt that need no computing when these sequences are in the tree.

    Whole pages only; and never the last token, whose output is what was asked for.
    """
    longest = max((common_prefix(prompt, sequence) for sequence in kept), default=0)
    return min(longest, len(prompt) - 1) // page * page


def reuse(
    engine: "Engine", tokenizer: Any, args: argparse.Namespace, config: Any
) -> list[bool | None]:
    """Five requests; what the tree has of each, predicted and reported by the engine."""
    first, second = (tokenizer(SHARED + question).input_ids for question in QUESTIONS)
    kept: list[list[int]] = []  # prompts and answers, as far as their keys and values were computed
    answers: dict[str, list[int]] = {}
    wrong = 0
    engine.flush_cache()
    say(f"{'request':24}{'tokens':>8}{'cached':>8}{'predicted':>11}{'MFLOP':>9}{'uncached':>10}")
    for name in (
        "the first",
        "the same again",
        "another question",
        "the next turn",
        "after a flush",
    ):
        prompt = second if name == "another question" else first
        if name == "the next turn":
            prompt = first + answers["the first"] + second[-8:]
        if name == "after a flush":
            engine.flush_cache()
            kept.clear()
        answers[name], meta = ask(engine, prompt, args.tokens)
        cached, predicted = meta["cached_tokens"], expected_hit(prompt, kept, args.page_size)
        kept.append(prompt + answers[name][:-1])  # the last token was written, and never read
        wrong += cached != predicted
        mflop, uncached = (prefill_flops(config, len(prompt), c) / 1e6 for c in (cached, 0))
        say(f"{name:24}{len(prompt):8}{cached:8}{predicted:11}{mflop:9,.0f}{uncached:10,.0f}")
    again = (answers[name] for name in ("the same again", "after a flush"))
    changed = sum(differing(answers["the first"], tokens) for tokens in again)
    return [
        check("requests with other cached tokens than predicted", wrong, 0),
        exact("tokens that a cached prefix changes", changed, args),
    ]


def ask(engine: "Engine", prompt: list[int], count: int) -> tuple[list[int], dict[str, Any]]:
    """The most likely tokens after the prompt, `count` of them, and what the engine says of them."""
    answer = engine.generate(
        input_ids=prompt,
        sampling_params={"temperature": 0, "max_new_tokens": count, "ignore_eos": True},
    )
    return answer["output_ids"], answer["meta_info"]


def differing(a: list[int], b: list[int]) -> int:
    return sum(x != y for x, y in zip(a, b, strict=True))


def verdict(text: str, finish_reason: str) -> str:
    """What an answer that should be JSON is: parsed, or why it is not."""
    try:
        json.loads(text)
    except json.JSONDecodeError:
        if finish_reason == "length":
            return "cut off"
        return "with a control character" if re.search(r"[\x00-\x1f]", text) else "other"
    return "parsed"


def sort_answers(name: str, answers: list[tuple[str, str]]) -> Counter[str]:
    """Sort answers, each with its finish reason, by verdict; print the counts and the first one."""
    found = Counter(verdict(text, reason) for text, reason in answers)
    counts = [f"{found[v]} {v}" for v in ("cut off", "with a control character")]
    say(f"{name:14}{found['parsed']} of {len(answers)} parse; {', '.join(counts)}")
    say(f"~ {answers[0][0][:90]!r}")
    return found


def structured(engine: "Engine", args: argparse.Namespace) -> list[bool | None]:
    """The same object asked for by schema and by regex, many times, sampled."""
    found = {}
    for name, grammar in (
        ("schema", {"json_schema": json.dumps(SCHEMA)}),
        ("regex", {"regex": REGEX}),
    ):
        sampling = {"temperature": 1.0, "max_new_tokens": 96} | grammar
        answers = engine.generate([args.prompt] * args.answers, sampling)
        texts = [(a["text"], a["meta_info"]["finish_reason"]["type"]) for a in answers]
        found[name] = sort_answers(name, texts)
    return [
        check("answers by regex that parse", found["regex"]["parsed"], args.answers, at_least=True),
        check("answers that fail for another reason", found["schema"]["other"], 0),
    ]


def reference(model: str, prompt: list[int], count: int) -> tuple[list[int], Any]:
    """transformers' greedy tokens in float32, and the model's configuration."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokens = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(count):
            best = model(tokens).logits[:, -1:].argmax(-1)
            tokens = torch.cat([tokens, best], dim=1)
    return tokens[0, len(prompt) :].tolist(), model.config


def exact(claim: str, value: int, args: argparse.Namespace) -> bool | None:
    """Nothing may differ in float32. In 16 bits the two most likely tokens can change places."""
    if args.dtype == "float32":
        return check(claim, value, 0)
    return expect(claim, value, 0, args.strict)


def run(args: argparse.Namespace) -> list[bool | None]:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    except (OSError, ValueError) as error:
        stop(f"--model {args.model}: {str(error).splitlines()[0]}")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    prompt = tokenizer(args.prompt).input_ids
    longest = max(len(prompt), len(tokenizer(SHARED).input_ids) + args.tokens + 16) + args.tokens
    if longest > tokenizer.model_max_length:
        stop(
            f"--tokens {args.tokens}: {longest} tokens, the context has {tokenizer.model_max_length}"
        )
    expected, config = reference(args.model, prompt, args.tokens)
    import sglang  # takes seconds: after what may be wrong with the command

    engine = sglang.Engine(
        model_path=args.model,
        dtype=args.dtype,
        device=device,
        max_total_tokens=args.kv_tokens,
        page_size=args.page_size,
        random_seed=args.seed,
        log_level="error",
    )
    tokens, _ = ask(engine, prompt, args.tokens)
    different = differing(tokens, expected)
    say(f"SGLang {sglang.__version__} on {device}, {args.dtype}")
    say(f"~ {tokenizer.decode(tokens)!r}")
    results = [exact("tokens of SGLang that differ from transformers'", different, args)]
    results += reuse(engine, tokenizer, args, config)
    results += structured(engine, args)
    engine.shutdown()
    return results


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default=BOOK_MODEL, help="a folder, or a name of the hub that is cached")
    add("--prompt", default="When a rank waits for the others,", help="text to continue")
    add("--tokens", type=int, default=32, help="tokens to write")
    add("--answers", type=int, default=20, help="structured answers to sample of each kind")
    add("--dtype", default="float32", help="of weights and cache; below float32 tokens may differ")
    add("--device", default=None, help="cpu or cuda; the GPU if there is one")
    add("--kv-tokens", type=int, default=4096, help="tokens that the cache has room for")
    add("--page-size", type=int, default=1, help="tokens that are cached and matched as one")
    add("--seed", type=int, default=0, help="of what is sampled")
    add("--strict", action="store_true", help="exit 1 if an `expect:` line does not hold")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    enter_environment("sglang", "SGLang")
    sys.exit(conclude(run(args)))


# --- copied from other scripts; `make copies` keeps it equal to them ------------------------------


# Copied from offline_inference.enter_environment
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
