"""Turn the book's words into what a trainer reads: a tokenizer, and documents packed into tokens.

    python chapter8-distributed-ai-training-in-action/code/prepare_data.py --plot chapter8-distributed-ai-training-in-action/figures/vocabulary.svg
    python chapter8-distributed-ai-training-in-action/code/prepare_data.py --vocabulary 512 --out runs/ch08_small

Look at the bytes per token: they are what a tokenizer buys. Then at the digest: the same text gives
the same files on every machine, or ranks would train on different numbers. Section 8.1.
"""

import argparse
import gzip
import hashlib
import json
import lzma
import os
import re
import shutil
import sys
from pathlib import Path
from typing import NoReturn

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END = "<|endoftext|>"
SPECIAL = [END, "<|system|>", "<|user|>", "<|assistant|>"]
HOLD_OUT = 10  # every tenth document is for measuring, not for training


def split_documents(text: str) -> list[str]:
    """One document for each heading and what stands below it; joined they are the text again."""
    return [part for part in re.split(r"^(?=#{1,3} )", text, flags=re.M) if part]


def split_held_out(documents: list[str]) -> tuple[list[str], list[str]]:
    """What is trained on, and every tenth document, which is not."""
    train = [d for i, d in enumerate(documents) if i % HOLD_OUT != HOLD_OUT - 1]
    return train, documents[HOLD_OUT - 1 :: HOLD_OUT]


def compressed_bits(train: bytes, held_out: bytes) -> list[tuple[str, float]]:
    """Bits per byte of the held-out text by general compressors: what a model has to beat."""
    primed = len(lzma.compress(train + held_out)) - len(lzma.compress(train))
    sizes = {"gzip": len(gzip.compress(held_out)), "xz": len(lzma.compress(held_out))}
    sizes["xz that has seen the rest"] = primed
    return [(name, 8 * size / len(held_out)) for name, size in sizes.items()]


def train_tokenizer(documents: list[str], vocabulary: int) -> Tokenizer:
    """Byte-level BPE (arXiv:1508.07909; bytes as in GPT-2): every text can be encoded, none is lost."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()  # all 256 bytes, seen or not
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def pack(tokenizer: Tokenizer, documents: list[str]) -> torch.Tensor:
    """All documents one after the other, each ended by END: [tokens], 16 bits each."""
    end = tokenizer.token_to_id(END)
    packed = [token for d in documents for token in [*tokenizer.encode(d).ids, end]]
    return torch.tensor(packed).to(torch.uint16)


def prepare(corpus: Path, folder: Path, vocabulary: int) -> dict:
    """Write tokenizer.json, train.safetensors, held_out.safetensors and meta.json; return the last.

    The folder appears under its name when it is whole.
    """
    text = read_text(corpus)
    documents = split_documents(text)
    train, held_out = split_held_out(documents)
    tokenizer = train_tokenizer(train, vocabulary)
    if tokenizer.get_vocab_size() != vocabulary:
        stop(f"{corpus} gives {tokenizer.get_vocab_size()} tokens: type a smaller --vocabulary")
    meta = {"vocabulary": vocabulary, "corpus": hashlib.sha256(text.encode()).hexdigest()}
    draft = folder.with_name(f"{folder.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    tokenizer.save(str(draft / "tokenizer.json"))
    for name, part in (("train", train), ("held_out", held_out)):
        tokens = pack(tokenizer, part)
        save_file({"tokens": tokens}, draft / f"{name}.safetensors")
        sizes = {"documents": len(part), "bytes": len("".join(part).encode())}
        meta[name] = sizes | {"tokens": len(tokens), "digest": digest(tokens)}
    (draft / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)
    return meta


def compression(train: str, held_out: str, vocabulary: int) -> tuple[float, float]:
    """Bytes per token on the text that the tokenizer was trained on, and on another."""
    tokenizer = train_tokenizer([train], vocabulary)
    return tuple(len(t.encode()) / len(tokenizer.encode(t).ids) for t in (train, held_out))


def plot(path: Path, rows: dict[int, tuple[float, float]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "ch08"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.5, 3.4), layout="tight")
    for i, label in enumerate(("the text it was trained on", "held-out text")):
        axes.plot(list(rows), [row[i] for row in rows.values()], "o-", label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(rows), [f"{v:,}" for v in rows])
    axes.set_xlabel("vocabulary, tokens")
    axes.set_ylabel("bytes per token")
    axes.legend(frameon=False)
    figure.savefig(path, format="svg", facecolor="white", metadata={"Date": None})


def digest(tokens: torch.Tensor) -> str:
    return hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:16]


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        stop(f"cannot read {path} ({error}): give a text file with --corpus FILE")


def run(args: argparse.Namespace) -> list[bool | None]:
    text = read_text(args.corpus)
    documents = split_documents(text)
    meta = prepare(args.corpus, args.out, args.vocabulary)
    tokenizer = Tokenizer.from_file(str(args.out / "tokenizer.json"))
    say(
        f"vocabulary    {args.vocabulary:,} tokens, {len(SPECIAL)} of them special, 256 single bytes"
    )
    say(f"{'':<14}{'documents':>10}{'bytes':>10}{'tokens':>10}{'bytes/token':>13}   digest")
    for name in ("train", "held_out"):
        part = meta[name]
        row = f"{name:<14}{part['documents']:>10}{part['bytes']:>10,}{part['tokens']:>10,}"
        say(f"{row}{part['bytes'] / part['tokens']:>13.2f}   {part['digest']}")
    sentence = "All-reduce moves 2(n-1)/n bytes."
    train, unseen = ("".join(part) for part in split_held_out(documents))
    sizes = compressed_bits(train.encode(), unseen.encode())
    say(
        "held out      "
        + ", ".join(f"{name} {bits:.2f}" for name, bits in sizes)
        + " bits per byte"
    )
    sweep = {}
    if args.plot:
        say(f"{'vocabulary':<14}{'bytes per token, train':>24}{'held out':>12}")
        for vocabulary in (512, 1024, 2048, 4096, 8192):
            sweep[vocabulary] = compression(train, unseen, vocabulary)
            say(f"{vocabulary:<14,}{sweep[vocabulary][0]:>24.2f}{sweep[vocabulary][1]:>12.2f}")
        plot(args.plot, sweep)
    say("~ " + " | ".join(tokenizer.decode([i]) for i in tokenizer.encode(sentence).ids))

    back = "".join(tokenizer.decode(tokenizer.encode(d).ids) for d in documents)
    strange = "naïve 数据 \x00 🙂"
    tokens = load_file(args.out / "train.safetensors")["tokens"]
    again = train_tokenizer(split_held_out(documents)[0], args.vocabulary)
    return [
        check("documents that do not join to the text again", "".join(documents) != text, 0),
        check("texts that encoding and decoding change", (back != text), 0),
        check(
            "so for a text unlike any",
            tokenizer.decode(tokenizer.encode(strange).ids) != strange,
            0,
        ),
        check("the largest token of the file", tokens.int().max().item(), args.vocabulary - 1),
        check("tokenizers that differ when made twice", again.to_str() != tokenizer.to_str(), 0),
    ]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, default="resources/corpus.txt", help="text, UTF-8")
    parser.add_argument("--out", type=Path, default="runs/ch08_data", help="folder to write")
    parser.add_argument(
        "--vocabulary", type=int, default=2048, help="tokens, special ones included"
    )
    parser.add_argument("--plot", type=Path, help="draw bytes per token over the vocabulary: SVG")
    args = parser.parse_args()
    if not 256 + len(SPECIAL) <= args.vocabulary <= 2**16:
        stop(f"--vocabulary {args.vocabulary}: give {256 + len(SPECIAL)} to 65536")
    return args


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
