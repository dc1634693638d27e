"""Export a checkpoint of train.py as a Hugging Face Llama, and show that it is the same model.

    python chapter8-distributed-ai-training-in-action/code/export_hf.py
    python chapter8-distributed-ai-training-in-action/code/export_hf.py --prompt "An all-reduce" --tokens 64

Without --run it reads chapter8-.../checkpoint/, the book model, back: transformers' logits and ours
must agree. With --run and --to it writes such a folder from a run of train.py. Section 8.3.
"""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed.checkpoint as dcp
from model import Config, Llama
from prepare_data import END
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from train import newest_checkpoint

BOOK_MODEL = Path(__file__).resolve().parents[1] / "checkpoint"
NAMES = {  # ours: Hugging Face's
    "embed": "model.embed_tokens",
    "norm": "model.norm",
    "layers.{}.norm1": "model.layers.{}.input_layernorm",
    "layers.{}.attention.q": "model.layers.{}.self_attn.q_proj",
    "layers.{}.attention.k": "model.layers.{}.self_attn.k_proj",
    "layers.{}.attention.v": "model.layers.{}.self_attn.v_proj",
    "layers.{}.attention.out": "model.layers.{}.self_attn.o_proj",
    "layers.{}.norm2": "model.layers.{}.post_attention_layernorm",
    "layers.{}.feed_forward.gate": "model.layers.{}.mlp.gate_proj",
    "layers.{}.feed_forward.up": "model.layers.{}.mlp.up_proj",
    "layers.{}.feed_forward.down": "model.layers.{}.mlp.down_proj",
}
CHAT = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def names(layers: int) -> dict[str, str]:
    """Every parameter's name in our model, and in Hugging Face's."""
    pairs = ((a, b, i) for a, b in NAMES.items() for i in range(layers if "{}" in a else 1))
    return {f"{a.format(i)}.weight": f"{b.format(i)}.weight" for a, b, i in pairs}


def hf_config(config: Config) -> dict:
    """config.json; the output layer is the embedding, so it has no weight of its own."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocabulary,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.hidden,
        "max_position_embeddings": config.context,
        "rope_theta": config.theta,
        "rms_norm_eps": config.eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 0,
        "torch_dtype": "float32",
    }


def export(run_folder: Path, data: Path, to: Path) -> None:
    """Write config, weights and tokenizer; the folder's README.md, if there is one, stays."""
    checkpoint = newest_checkpoint(run_folder)
    if checkpoint is None:
        stop(f"{run_folder} has no checkpoint: train with --out {run_folder} first")
    config = Config(**json.loads((checkpoint / "notes.json").read_text())["config"])
    model = Llama(config)
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=checkpoint, no_dist=True)  # shards of any number of ranks
    weights = {hf: state["model"][ours] for ours, hf in names(config.layers).items()}
    to.mkdir(parents=True, exist_ok=True)
    save_file(weights, to / "model.safetensors.draft", metadata={"format": "pt"})
    (to / "model.safetensors.draft").rename(to / "model.safetensors")
    write_json(to / "config.json", hf_config(config))
    shutil.copyfile(data / "tokenizer.json", to / "tokenizer.json")
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": END}
    tokenizer |= {"model_max_length": config.context, "chat_template": CHAT}
    write_json(to / "tokenizer_config.json", tokenizer)


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def load_hf(folder: Path) -> Llama:
    """Our model from a Hugging Face folder."""
    try:
        c = json.loads((folder / "config.json").read_text())
        weights = load_file(folder / "model.safetensors")
    except OSError as error:
        stop(f"cannot read {error.filename or folder}: type --from DIR, or make book-model")
    config = Config(
        vocabulary=c["vocab_size"],
        width=c["hidden_size"],
        layers=c["num_hidden_layers"],
        heads=c["num_attention_heads"],
        kv_heads=c["num_key_value_heads"],
        hidden=c["intermediate_size"],
        context=c["max_position_embeddings"],
    )
    model = Llama(config)
    model.load_state_dict({ours: weights[hf] for ours, hf in names(config.layers).items()})
    return model.eval()


@torch.no_grad()
def continue_greedily(model: Llama, tokens: list[int], count: int) -> list[int]:
    """`count` more tokens, each the most likely one; every step runs the whole text again."""
    for _ in range(count):
        window = torch.tensor([tokens[-model.config.context :]])
        tokens = [*tokens, int(model(window)[0, -1].argmax())]
    return tokens


@torch.no_grad()
def run(args: argparse.Namespace) -> list[bool | None]:
    if args.run:
        export(args.run, args.data, args.to)
    folder = args.to if args.run else args.folder
    model = load_hf(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokens = tokenizer.encode(args.prompt).ids
    ours = continue_greedily(model, tokens, args.tokens)

    from transformers import AutoModelForCausalLM, AutoTokenizer  # 3 s: only now

    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    their_tokens = AutoTokenizer.from_pretrained(folder)(args.prompt).input_ids
    window = torch.tensor([ours])[:, : model.config.context]
    difference = (model(window) - theirs(window).logits).abs().max().item()
    theirs.generation_config.eos_token_id = None  # as ours, it goes on to the last token
    prompt = torch.tensor([tokens])
    generated = theirs.generate(prompt, max_new_tokens=args.tokens, do_sample=False)[0].tolist()

    size = sum(f.stat().st_size for f in folder.iterdir() if f.is_file())
    say(
        f"{folder.name}: {sum(p.numel() for p in model.parameters()):,} parameters, {size / 1e6:.1f} MB"
    )
    text = tokenizer.decode(ours)
    for line in (line for part in text.split("\n") for line in wrapped(part)):
        say(f"~ {line}")
    differing = sum(a != b for a, b in zip(ours, generated, strict=False))
    return [
        check("largest difference of a logit from transformers'", difference, 1e-5),
        check("prompt tokens that differ", int(tokens != their_tokens), 0),
        check(f"of {args.tokens} greedy tokens, those that differ", differing, 0),
        check("megabytes of the folder", size / 1e6, 12),
    ]


def wrapped(text: str, width: int = 96) -> list[str]:
    return [text[i : i + width] for i in range(0, len(text), width)] or [""]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, help="train.py's --out; default: export nothing")
    parser.add_argument("--data", type=Path, default="runs/ch08_data", help="its --data")
    parser.add_argument("--to", type=Path, help="folder to write")
    parser.add_argument(
        "--from", dest="folder", type=Path, default=BOOK_MODEL, help="model to read; default: ours"
    )
    parser.add_argument("--prompt", default="The gradients", help="text to go on from")
    parser.add_argument("--tokens", type=int, default=32, help="tokens to write")
    args = parser.parse_args()
    if bool(args.run) != bool(args.to):
        stop("--run and --to go together: which run, and where to?")
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
