"""What the book model has learned: bits per byte of documents that it has not seen.

    python chapter8-distributed-ai-training-in-action/code/held_out.py

Beside it stand general compressors, a 5-gram model of the same tokens, and the draft model. A model
that does not beat the 5-gram knows no more than which words follow each other. Look also at how much
of the held-out documents the training text has word for word. Section 8.6.
"""

import argparse
import gzip
import lzma
import math
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch
import torch.nn.functional as F
from export_hf import BOOK_MODEL, load_hf
from model import Llama
from prepare_data import TEXTS, pack, read_documents, read_tokenizer

DISCOUNT = 0.75  # taken off each count, for what was never seen; not tuned on these texts


def compressed(train: bytes, held_out: bytes) -> dict[str, float]:
    """Bits per byte by programs that know nothing of language, one of them shown the training text."""
    primed = len(lzma.compress(train + held_out)) - len(lzma.compress(train))
    sizes = {"gzip": len(gzip.compress(held_out)), "xz": len(lzma.compress(held_out))}
    sizes["xz that has seen the rest"] = primed
    return {name: 8 * size / len(held_out) for name, size in sizes.items()}


def ngram_model(
    tokens: list[int], vocabulary: int, order: int = 5
) -> Callable[[tuple[int, ...]], float]:
    """Probability of a tuple's last token after those before it: interpolated Kneser-Ney.

    Each order takes DISCOUNT off its counts and gives it to the next lower order, which counts in
    how many contexts a token stands, not how often (Chen and Goodman 1999, equation 4.37).
    """
    shifted = [tokens[i:] for i in range(order)]
    counts = [Counter(zip(*shifted[:n], strict=False)) for n in range(1, order + 1)]
    for n in range(order - 1):
        counts[n] = Counter(gram[1:] for gram in counts[n + 1])
    total: Counter[tuple[int, ...]] = Counter()  # of a context, all that follows it
    kinds: Counter[tuple[int, ...]] = Counter()  # and how many different tokens do
    for level in counts:
        for gram, count in level.items():
            total[gram[:-1]] += count
            kinds[gram[:-1]] += 1

    def probability(gram: tuple[int, ...]) -> float:
        p = 1 / vocabulary
        for n in range(1, len(gram) + 1):
            context = gram[-n:-1]
            if context not in total:
                break  # nor is a longer one
            count = max(counts[n - 1][gram[-n:]] - DISCOUNT, 0)
            p = (count + DISCOUNT * kinds[context] * p) / total[context]
        return p

    return probability


def ngram_bits(tokens: list[int], probability: Callable[[tuple[int, ...]], float]) -> float:
    """Bits that the tokens take, the first one left out, as the models leave it out."""
    grams = (tuple(tokens[max(0, i - 4) : i + 1]) for i in range(1, len(tokens)))
    return -sum(math.log2(probability(gram)) for gram in grams)


@torch.no_grad()
def model_bits(model: Llama, tokens: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Bits that the tokens [n] take, and the model's first choice for each of them but the first.

    Windows of the context's length do not overlap, as in training: each begins without a past.
    """
    context = model.config.context
    total = 0.0
    choices = []
    for start in range(0, len(tokens) - 1, context):
        window = tokens[start : start + context + 1].long()
        logits = model(window[None, :-1])[0]  # [seq, vocabulary]
        total += F.cross_entropy(logits, window[1:], reduction="sum").item()
        choices.append(logits.argmax(-1))
    return total / math.log(2), torch.cat(choices)


def seen_share(train: str, held_out: str) -> float:
    """Share of the held-out bytes in lines of 20 characters or more that the training text has too."""
    seen = set(train.splitlines())
    again = [line for line in held_out.splitlines() if len(line) >= 20 and line in seen]
    return len("".join(again).encode()) / len(held_out.encode())


def run(args: argparse.Namespace) -> list[bool | None]:
    train, held_out = read_documents(args.corpus)
    model = load_hf(args.model)
    draft = load_hf(args.draft)
    tokenizer = read_tokenizer(args.model / "tokenizer.json")
    vocabulary = tokenizer.get_vocab_size()
    if {model.config.vocabulary, draft.config.vocabulary} != {vocabulary}:
        stop(f"{args.model} and {args.draft} have to share one tokenizer, of {vocabulary} tokens")
    probability = ngram_model(pack(tokenizer, train).tolist(), vocabulary)
    say(f"{'bits per byte':<28}" + "".join(f"{kind:>12}" for kind in held_out))
    rows: dict[str, list[float]] = {}
    agreement = []
    for documents in held_out.values():
        text = "".join(documents)
        size = len(text.encode())
        tokens = pack(tokenizer, documents)
        bits, choices = model_bits(model, tokens)
        draft_bits, draft_choices = model_bits(draft, tokens)
        agreement.append((choices == draft_choices).double().mean().item())
        column = compressed("".join(train).encode(), text.encode())
        column["5-gram, Kneser-Ney"] = ngram_bits(tokens.tolist(), probability) / size
        column[f"draft model, {millions(draft)}"] = draft_bits / size
        column[f"book model, {millions(model)}"] = bits / size
        for name, value in column.items():
            rows.setdefault(name, []).append(value)
    for name, values in rows.items():
        say(f"{name:<28}" + "".join(f"{value:>12.2f}" for value in values))
    known = [seen_share("\n".join(train), "".join(part)) for part in held_out.values()]
    say(f"{'lines seen in training, %':<28}" + "".join(f"{100 * share:>12.1f}" for share in known))
    say(f"{'draft agrees with it, %':<28}" + "".join(f"{100 * a:>12.1f}" for a in agreement))

    *_, primed, ngram, small, large = rows.values()
    return [
        claim
        for i, kind in enumerate(held_out)
        for claim in (
            check(f"book model's bits per byte of {kind}, and the 5-gram's", large[i], ngram[i]),
            check(f"draft model's of {kind}, and the best compressor's", small[i], primed[i]),
        )
    ]


def millions(model: Llama) -> str:
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--corpus", type=Path, nargs="+", default=TEXTS, help="texts, UTF-8; default: the book's"
    )
    parser.add_argument(
        "--model", type=Path, default=BOOK_MODEL, help="Hugging Face folder; default: book model"
    )
    parser.add_argument(
        "--draft", type=Path, default=BOOK_MODEL.with_name("draft"), help="of the small model"
    )
    return parser.parse_args()


def main() -> None:
    sys.exit(conclude(run(parse_args())))


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
