"""Turn the book's words into what a trainer reads: a tokenizer, and documents packed into tokens.

    python chapter8-distributed-ai-training-in-action/code/prepare_data.py --plot chapter8-distributed-ai-training-in-action/figures/vocabulary.svg
    python chapter8-distributed-ai-training-in-action/code/prepare_data.py --corpus resources/corpus.txt --vocabulary 512 --out runs/ch08_small

Look at the bytes per token: they are what a tokenizer buys. Then at the digests: the same text gives
the same files on every machine, or ranks would train on different numbers. A document is a section
of a text, or a program of a file that begins with `# File: `. Section 8.1.
"""

import argparse
import filecmp
import hashlib
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import NoReturn

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TEXTS = [Path("resources") / name for name in ("corpus.txt", "chapters.txt", "programs.txt")]
END = "<|endoftext|>"
SPECIAL = [END, "<|system|>", "<|user|>", "<|assistant|>"]
HOLD_OUT = 10  # every tenth document is for measuring, not for training
SHARD = 65_536  # tokens in a file


def split_documents(text: str) -> list[str]:
    """A program, or a heading and what stands below it; joined they are the text again."""
    start = "# File: " if text.startswith("# File: ") else "#{1,3} "
    return [part for part in re.split(rf"^(?={start})", text, flags=re.M) if part]


def split_held_out(documents: list[str]) -> tuple[list[str], list[str]]:
    """What is trained on, and every tenth document, which is not."""
    train = [d for i, d in enumerate(documents) if i % HOLD_OUT != HOLD_OUT - 1]
    return train, documents[HOLD_OUT - 1 :: HOLD_OUT]


def read_documents(corpus: list[Path]) -> tuple[list[str], dict[str, list[str]]]:
    """All that is trained on; and what is held out, text and programs apart."""
    train: list[str] = []
    held_out: dict[str, list[str]] = {}
    for path in corpus:
        text = read_text(path)
        kind = "programs" if text.startswith("# File: ") else "text"
        seen, unseen = split_held_out(split_documents(text))
        train += seen
        held_out.setdefault(kind, []).extend(unseen)
    if not all(held_out.values()):
        stop(
            f"{corpus[0]} has under {HOLD_OUT} sections (lines that begin with #): none to hold out"
        )
    return train, held_out


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
    packed = [token for d in documents for token in (*tokenizer.encode(d).ids, end)]
    return torch.tensor(packed).to(torch.uint16)


def prepare(
    corpus: list[Path] | Path, folder: Path, vocabulary: int, like: Path | None = None
) -> dict:
    """Write tokenizer.json, the shards of tokens and meta.json, which names them; return the last.

    The folder appears under its name when it is whole, in place of an older one. `like` is a tokenizer.json to use as it is.
    """
    if folder.is_file() or (any(folder.glob("*")) and not (folder / "meta.json").is_file()):
        stop(f"{folder} is there, and prepare_data.py did not make it: name another folder")
    corpus = [corpus] if isinstance(corpus, Path) else corpus
    train, held_out = read_documents(corpus)
    if like:
        tokenizer = read_tokenizer(like)
        vocabulary = tokenizer.get_vocab_size()
    else:
        tokenizer = train_tokenizer(train, vocabulary)
    if tokenizer.get_vocab_size() != vocabulary:
        stop(f"{corpus[0]} gives {tokenizer.get_vocab_size()} tokens: type a smaller --vocabulary")
    draft = folder.with_name(f"{folder.name}.{os.getpid()}.draft")  # two jobs may be at it
    draft.mkdir(parents=True)
    tokenizer.save(str(draft / "tokenizer.json"))
    tokens = pack(tokenizer, train)
    packed = {kind: pack(tokenizer, part) for kind, part in held_out.items()}
    shards = [
        save_shard(draft / f"train-{number:05}.safetensors", part)
        for number, part in enumerate(tokens.split(SHARD))
    ]
    unseen = [
        save_shard(draft / f"held_out-{kind}.safetensors", part)
        | {"kind": kind}
        | sizes(held_out[kind], part)
        for kind, part in packed.items()
    ]
    every = [document for part in held_out.values() for document in part]
    meta = {
        "vocabulary": vocabulary,
        "corpus": [hashlib.sha256(path.read_bytes()).hexdigest() for path in corpus],
        "train": sizes(train, tokens) | {"shards": shards},
        "held_out": sizes(every, torch.cat(list(packed.values()))) | {"shards": unseen},
    }
    (draft / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    files = [path.name for path in draft.iterdir()]
    if len(filecmp.cmpfiles(folder, draft, files, shallow=False)[0]) == len(files):
        shutil.rmtree(draft)  # the same files: somebody may be reading them
        return meta
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)
    return meta


def save_shard(path: Path, tokens: torch.Tensor) -> dict:
    """Write one file of tokens; what meta.json says of it."""
    save_file({"tokens": tokens.clone()}, path)  # a view would bring the whole along
    return {"file": path.name, "tokens": len(tokens), "digest": digest(tokens)}


def sizes(documents: list[str], tokens: torch.Tensor) -> dict:
    size = len("".join(documents).encode())
    return {
        "documents": len(documents),
        "bytes": size,
        "tokens": len(tokens),
        "digest": digest(tokens),
    }


def compression(vocabulary: int, train: list[str], texts: dict[str, str]) -> dict[str, float]:
    """Bytes per token of each text, by a tokenizer that was trained on `train`."""
    tokenizer = train_tokenizer(train, vocabulary)
    return {
        name: len(text.encode()) / len(tokenizer.encode(text).ids) for name, text in texts.items()
    }


def plot(path: Path, rows: dict[int, dict[str, float]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "ch08"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.5, 3.4), layout="tight")
    for name in rows[min(rows)]:
        axes.plot(list(rows), [row[name] for row in rows.values()], "o-", label=name)
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


def read_tokenizer(path: Path) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # its one kind
        stop(f"cannot read {path} ({error}): give a tokenizer.json")
    if tokenizer.token_to_id(END) is None or tokenizer.get_vocab_size() > 2**16:
        stop(f"{path}: its tokens must number 65536 at most, and {END} be one of them")
    return tokenizer


def run(args: argparse.Namespace) -> list[bool | None]:
    meta = prepare(args.corpus, args.out, args.vocabulary, args.tokenizer)
    vocabulary = meta["vocabulary"]
    train, held_out = read_documents(args.corpus)
    tokenizer = read_tokenizer(args.out / "tokenizer.json")
    say(f"vocabulary    {vocabulary:,} tokens, {len(SPECIAL)} special, 256 single bytes")
    say(f"{'':<20}{'documents':>10}{'bytes':>10}{'tokens':>10}{'bytes/token':>13}   digest")
    parts = {"train": meta["train"]}
    parts |= {Path(shard["file"]).stem: shard for shard in meta["held_out"]["shards"]}
    for name, part in parts.items():
        row = f"{name:<20}{part['documents']:>10}{part['bytes']:>10,}{part['tokens']:>10,}"
        say(f"{row}{part['bytes'] / part['tokens']:>13.2f}   {part['digest']}")
    shards = meta["train"]["shards"]
    say(f"train is in {len(shards)} shards of up to {SHARD:,} tokens")
    if args.plot:
        texts = {"trained on": "".join(train)}
        texts |= {f"held-out {kind}": "".join(part) for kind, part in held_out.items()}
        sweep = {v: compression(v, train, texts) for v in (512, 1024, 2048, 4096, 8192)}
        say(f"{'bytes per token':<20}" + "".join(f"{name:>20}" for name in texts))
        for tokens, row in sweep.items():
            say(f"{tokens:<20,}" + "".join(f"{value:>20.2f}" for value in row.values()))
        plot(args.plot, sweep)
    sentence = "All-reduce moves 2(n-1)/n bytes."
    say("~ " + " | ".join(tokenizer.decode([i]) for i in tokenizer.encode(sentence).ids))

    unseen = [document for part in held_out.values() for document in part]
    documents = [*train, *unseen, "naïve 数据 \x00 🙂"]  # the last is unlike any
    changed = sum(tokenizer.decode(tokenizer.encode(d).ids) != d for d in documents)
    read = torch.cat([load_file(args.out / shard["file"])["tokens"] for shard in shards])
    again = tokenizer if args.tokenizer else train_tokenizer(train, vocabulary)
    return [
        check("documents that encoding and decoding change", changed, 0),
        check("shards that do not join to the stream", digest(read) != meta["train"]["digest"], 0),
        check("tokens beyond the vocabulary", (read.int() >= vocabulary).sum().item(), 0),
        check("tokenizers that differ when made twice", again.to_str() != tokenizer.to_str(), 0),
    ]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--corpus", type=Path, nargs="+", default=TEXTS, help="texts, UTF-8; default: the book's"
    )
    parser.add_argument("--out", type=Path, default="runs/ch08_data", help="folder to write")
    parser.add_argument(
        "--vocabulary", type=int, default=2048, help="tokens, special ones included"
    )
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json to use; default: train one")
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
