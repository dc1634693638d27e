"""Export a checkpoint of train.py as a Hugging Face Llama, show that it is the same model; and back.

    python chapter8-distributed-ai-training-in-action/code/export_hf.py
    python chapter8-distributed-ai-training-in-action/code/export_hf.py --model chapter8-distributed-ai-training-in-action/draft --prompt "An all-reduce" --import runs/ch08_tuned

Without --run it reads chapter8-.../checkpoint/, the book model, back: transformers' logits and ours
must agree. --run and --model write such a folder from a run of train.py. --import makes a folder from
which train.py --resume goes on training, on any number of ranks. Section 8.6.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed.checkpoint as dcp
from checkpoints import newest_checkpoint
from model import Config, Llama
from prepare_data import END, read_tokenizer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

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
SIZES = {  # of train.py, and of Hugging Face's config.json
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "hidden": "intermediate_size",
    "context": "max_position_embeddings",
}
MUST_AGREE = ("head_dim", "hidden_act", "attention_bias", "tie_word_embeddings")
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
        **{theirs: getattr(config, ours) for ours, theirs in SIZES.items()},
        "head_dim": config.head_dim,
        "rope_theta": config.theta,
        "rms_norm_eps": config.eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 0,
        "torch_dtype": "float32",
    }


def read_dcp(checkpoint: Path) -> Llama:
    """The whole model, from the shards of any number of ranks in any layout."""
    try:
        model = Llama(Config(**json.loads((checkpoint / "notes.json").read_text())["config"]))
        state = {"model": model.state_dict()}
        dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
    except (OSError, ValueError, dcp.CheckpointException) as error:
        reason = str(error).partition("\n")[0]
        stop(f"cannot read {checkpoint} ({reason}): move it away, and the one before is exported")
    return model.eval()  # its tensors were filled in place


def export(run_folder: Path, data: Path, to: Path) -> None:
    """Write config, weights and tokenizer; the folder's README.md, if there is one, stays."""
    checkpoint = newest_checkpoint(run_folder)
    if checkpoint is None:
        stop(f"{run_folder} has no checkpoint: train with --out {run_folder} first")
    model = read_dcp(checkpoint)
    wanted = json.loads((checkpoint / "notes.json").read_text())["recipe"].get("tokenizer")
    found = tokenizer_digest(data)
    if found != wanted:  # the weights would load, and the model talk nonsense
        stop(f"{data} has tokenizer {found}, {checkpoint} {wanted}: type --data with that run's")
    config = model.config
    state = model.state_dict()
    weights = {hf: state[ours] for ours, hf in names(config.layers).items()}
    to.mkdir(parents=True, exist_ok=True)
    save_file(weights, to / "model.safetensors.draft", metadata={"format": "pt"})
    (to / "model.safetensors.draft").rename(to / "model.safetensors")
    write_json(to / "config.json", hf_config(config))
    shutil.copyfile(data / "tokenizer.json", to / "tokenizer.json")
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": END}
    tokenizer |= {"model_max_length": config.context, "chat_template": CHAT}
    write_json(to / "tokenizer_config.json", tokenizer)


def tokenizer_digest(folder: Path) -> str | None:
    """As train.py notes it in a checkpoint."""
    path = folder / "tokenizer.json"
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else None


def import_hf(folder: Path, run_folder: Path) -> None:
    """Write the weights as step 0 of a run; train.py --resume begins there, its optimizer new."""
    model = load_hf(folder)
    sizes = dataclasses.asdict(model.config)
    draft = run_folder / "step-000000.draft"
    for old in (draft, draft.with_suffix("")):
        shutil.rmtree(old, ignore_errors=True)
    dcp.save({"model": model.state_dict()}, checkpoint_id=draft, no_dist=True)
    recipe = {name: sizes[name] for name in SIZES} | {"tokenizer": tokenizer_digest(folder)}
    notes = {"step": 0, "losses": [], "loader": {"epoch": 0, "batch": 0}, "imported": True}
    notes["files"] = {path.name: path.stat().st_size for path in draft.iterdir()}
    write_json(draft / "notes.json", notes | {"config": sizes, "recipe": recipe})
    draft.rename(draft.with_suffix(""))


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def load_hf(folder: Path) -> Llama:
    """Our model from a Hugging Face folder, if it is one that our model can be."""
    try:
        c = json.loads((folder / "config.json").read_text())
        weights = load_file(folder / "model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        path = getattr(error, "filename", None) or folder
        stop(f"cannot read {path}: type --model DIR, or make book-model")
    if c.get("model_type") != "llama":
        stop(f"{folder} is no model that model.py can be: see its model_type")
    rope = c.get("rope_parameters") or {}
    sizes = {ours: c[theirs] for ours, theirs in SIZES.items() if theirs in c}
    theta = rope.get("rope_theta", c.get("rope_theta", 10_000.0))
    config = Config(vocabulary=c["vocab_size"], theta=theta, eps=c["rms_norm_eps"], **sizes)
    wanted = hf_config(config)
    differing = [name for name in MUST_AGREE if c.get(name, wanted[name]) != wanted[name]]
    if c.get("rope_scaling") or rope.get("rope_type", "default") != "default":
        differing.append("rope_scaling")
    beyond = weights.keys() - names(config.layers).values() - {"lm_head.weight"}
    differing += sorted(beyond)[:1]  # such as an MLP's bias
    if differing:
        stop(f"{folder} is no model that model.py can be: see its {', '.join(differing)}")
    model = Llama(config)
    try:
        model.load_state_dict({ours: weights[hf] for ours, hf in names(config.layers).items()})
    except (KeyError, RuntimeError) as error:  # a weight that is not there, or of another shape
        why = " ".join(str(error).split())
        stop(f"{folder}/model.safetensors does not fit its config.json: {why}")
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
    folder = args.model
    if args.run:
        export(args.run, args.data, folder)
    model = load_hf(folder)
    tokenizer = read_tokenizer(folder / "tokenizer.json")
    tokens = tokenizer.encode(args.prompt).ids
    most = model.config.context - len(tokens)
    if not tokens or not 1 <= args.tokens <= most:
        stop(f"--prompt has {len(tokens)} tokens: it has to have one, and --tokens be 1 to {most}")
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
    parameters = sum(p.numel() for p in model.parameters())
    say(f"{folder.name}: {parameters:,} parameters, {size / 1e6:.1f} MB")
    for line in (line for part in tokenizer.decode(ours).split("\n") for line in wrapped(part)):
        say(f"~ {line}")
    differing = sum(a != b for a, b in zip(ours, generated, strict=False))
    claims = [
        check("largest difference of a logit from transformers'", difference, 1e-5),
        check("prompt tokens that differ", int(tokens != their_tokens), 0),
        check(f"of {args.tokens} greedy tokens, those that differ", differing, 0),
        check("megabytes beyond 4 bytes a parameter", (size - 4 * parameters) / 1e6, 10),
    ]
    if args.imported and all(claims):
        import_hf(folder, args.imported)
        back = read_dcp(args.imported / "step-000000").state_dict()
        changed = sum(not torch.equal(back[name], p) for name, p in model.state_dict().items())
        claims.append(check("tensors that differ in the imported checkpoint", changed, 0))
    return claims


def wrapped(text: str, width: int = 96) -> list[str]:
    return [text[i : i + width] for i in range(0, len(text), width)] or [""]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, help="train.py's --out; default: export nothing")
    parser.add_argument("--data", type=Path, default="runs/ch08_data", help="its --data")
    parser.add_argument(
        "--model", type=Path, help="Hugging Face folder to read, or with --run to write"
    )
    parser.add_argument(
        "--import", type=Path, dest="imported", metavar="DIR", help="write step 0 of a run here"
    )
    parser.add_argument("--prompt", default="A checkpoint is", help="text to go on from")
    parser.add_argument("--tokens", type=int, default=32, help="tokens to write")
    args = parser.parse_args()
    if args.run and not args.model:
        stop(f"--run {args.run} is to be written where? type --model DIR")
    args.model = args.model or BOOK_MODEL
    if args.imported and {p.name for p in args.imported.glob("step-*")} - {"step-000000"}:
        stop(f"{args.imported} has been trained: type another --import")
    return args


def main() -> None:
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process: no_dist
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
