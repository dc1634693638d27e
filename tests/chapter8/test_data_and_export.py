"""The data are the same everywhere, and what is exported is the model that was trained."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import warm
from book import CHAPTERS

CHAPTER = warm.ROOT / CHAPTERS[7]
CODE = f"{CHAPTERS[7]}/code"
Run = Callable[..., warm.Result]


@pytest.fixture(scope="module")
def code() -> ModuleType:
    sys.path.insert(0, str(CHAPTER / "code"))
    try:
        return warm.load("export_hf", CHAPTER / "code/export_hf.py")
    finally:
        sys.path.pop(0)


def test_chat_template_and_tokenizer() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(CHAPTER / "checkpoint")
    chat = [{"role": "user", "content": "What is a rank?"}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text == "<|user|>\nWhat is a rank?\n<|assistant|>\n"
    assert tokenizer("<|user|>").input_ids == [2]
    assert tokenizer.decode(tokenizer("naïve\n  数").input_ids) == "naïve\n  数"


def test_the_checkpoint_has_no_sampling_defaults() -> None:
    names = {path.name for path in (CHAPTER / "checkpoint").iterdir()}
    assert "generation_config.json" not in names
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= names


@pytest.mark.full
def test_the_tokenizer_is_what_prepare_data_makes(run: Run, checkout: Path) -> None:
    result = run(f"python {CODE}/prepare_data.py --out runs/fresh")
    assert result.returncode == 0, result.stdout + result.stderr
    made = json.loads((checkout / "runs/fresh/tokenizer.json").read_text())
    assert made == json.loads((CHAPTER / "checkpoint/tokenizer.json").read_text())


@pytest.mark.full
def test_export_of_a_run(run: Run, tmp_path: Path) -> None:
    sizes = "--width 64 --layers 1 --heads 2 --kv-heads 1 --hidden 32 --batch 4 --steps 3"
    trained = run(
        f"torchrun --nproc_per_node=2 {CODE}/train.py {sizes} --strategy fsdp --out {tmp_path}/run"
    )
    assert trained.returncode == 0, trained.stderr
    exported = run(f"python {CODE}/export_hf.py --run {tmp_path}/run --to {tmp_path}/hf")
    assert exported.returncode == 0, exported.stdout + exported.stderr
    assert "all 4 checks ok" in exported.stdout


@pytest.mark.full
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--run runs/none --to runs/x", "has no checkpoint"),
        ("--run runs/none", "--run and --to go together"),
        ("--from runs/none", "make book-model"),
    ],
)
def test_bad_input(run: Run, flags: str, said: str) -> None:
    result = run(f"python {CODE}/export_hf.py {flags}")
    assert (result.returncode, "Traceback" in result.stderr) == (2, False)
    assert said in result.stderr


@pytest.mark.full
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--corpus none.txt", "cannot read none.txt"),
        ("--vocabulary 100", "give 260 to 65536"),
        ("--vocabulary 60000", "type a smaller --vocabulary"),
    ],
)
def test_bad_data(run: Run, flags: str, said: str) -> None:
    result = run(f"python {CODE}/prepare_data.py --out runs/bad {flags}")
    assert (result.returncode, "Traceback" in result.stderr) == (2, False)
    assert said in result.stderr


def test_export_gives_the_same_names_back(code: ModuleType) -> None:
    model = code.load_hf(CHAPTER / "checkpoint")
    assert set(code.names(model.config.layers)) == set(model.state_dict())


def test_two_conventions_that_fail_in_silence(code: ModuleType) -> None:
    """What section 8.3 says of an export: everything loads, and the model is another one."""
    import torch

    model = code.load_hf(CHAPTER / "checkpoint")
    window = torch.arange(40)[None] + 300
    with torch.no_grad():
        right = model(window)
        for layer in model.layers:  # pairs of neighbours, in place of i and i + d/2
            for linear in (layer.attention.q, layer.attention.k):
                heads = linear.weight.unflatten(0, (-1, 2, model.config.head_dim // 2))
                linear.weight.copy_(heads.transpose(1, 2).flatten(0, 2))
        wrong = model(window)
    torch.testing.assert_close(wrong[:, 0], right[:, 0])  # position 0 is not rotated
    assert (wrong[:, 1:] - right[:, 1:]).abs().max() > 0.1


def test_a_token_beyond_the_vocabulary(code: ModuleType) -> None:
    import torch

    model = code.load_hf(CHAPTER / "checkpoint")
    with pytest.raises(IndexError, match="index out of range in self"):
        model(torch.tensor([[model.config.vocabulary]]))
