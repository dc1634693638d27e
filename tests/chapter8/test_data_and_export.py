"""The data are the same everywhere, what is exported is the model that was trained, and bits are bits."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import warm
from book import CHAPTERS

CHAPTER = warm.ROOT / CHAPTERS[7]
CODE = f"{CHAPTERS[7]}/code"
MODELS = ("checkpoint", "draft")
TINY = "--width 64 --layers 1 --heads 2 --kv-heads 1 --hidden 32 --batch 4 --context 128"
Run = Callable[..., warm.Result]


def module(name: str) -> ModuleType:
    """A module of the trainer, which imports its siblings."""
    sys.path.insert(0, str(CHAPTER / "code"))
    try:
        return warm.load(name, CHAPTER / f"code/{name}.py")
    finally:
        sys.path.pop(0)


@pytest.fixture(scope="module")
def code() -> ModuleType:
    return module("export_hf")


@pytest.mark.parametrize("name", MODELS)
def test_chat_template_and_tokenizer(name: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(CHAPTER / name)
    chat = [{"role": "user", "content": "What is a rank?"}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text == "<|user|>\nWhat is a rank?\n<|assistant|>\n"
    assert tokenizer("<|user|>").input_ids == [2]
    assert tokenizer.decode(tokenizer("naïve\n  数").input_ids) == "naïve\n  数"


@pytest.mark.parametrize("name", MODELS)
def test_the_checkpoint_has_no_sampling_defaults(name: str) -> None:
    names = {path.name for path in (CHAPTER / name).iterdir()}
    assert "generation_config.json" not in names
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= names


def test_the_draft_can_draft_for_the_book_model(code: ModuleType) -> None:
    """Speculative decoding compares token numbers: they have to mean the same."""
    tokenizers = [(CHAPTER / name / "tokenizer.json").read_bytes() for name in MODELS]
    assert tokenizers[0] == tokenizers[1]
    model, draft = (code.load_hf(CHAPTER / name) for name in MODELS)
    assert draft.config.vocabulary == model.config.vocabulary
    assert draft.config.context == model.config.context
    sizes = [sum(p.numel() for p in m.parameters()) for m in (model, draft)]
    assert sizes[0] / 11 < sizes[1] < sizes[0] / 9


def test_documents() -> None:
    data = module("prepare_data")
    program = '# File: a.py\n\n"""A."""\n# a comment, no heading\n'
    assert data.split_documents(program + program) == [program, program]
    text = "before\n# One\ntext\n## Two\n#### no section\n"
    assert data.split_documents(text) == ["before\n", "# One\ntext\n", "## Two\n#### no section\n"]
    train, held_out = data.split_held_out([str(i) for i in range(25)])
    assert held_out == ["9", "19"]
    assert sorted(train + held_out, key=int) == [str(i) for i in range(25)]


def test_shards_join_to_the_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from safetensors.torch import load_file

    data = module("prepare_data")
    monkeypatch.setattr(data, "SHARD", 100)
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(
        "".join(f"# Section {i}\n\nThe ranks wait for rank {i}.\n" for i in range(40))
    )
    one, two = (data.prepare([corpus], tmp_path / name, 300) for name in "ab")
    assert one == two
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert {
        path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
        for path in (tmp_path / "a").iterdir()
    } == {True}
    shards = one["train"]["shards"]
    assert len(shards) > 3
    assert names >= {shard["file"] for shard in shards}
    parts = [load_file(tmp_path / "a" / shard["file"])["tokens"] for shard in shards]
    assert [len(part) for part in parts] == [shard["tokens"] for shard in shards]
    assert {len(part) for part in parts[:-1]} == {100}
    assert data.digest(torch.cat(parts)) == one["train"]["digest"]
    assert [shard["digest"] for shard in shards] == [data.digest(part) for part in parts]
    tokenizer = data.read_tokenizer(tmp_path / "a/tokenizer.json")
    train, _ = data.read_documents([corpus])
    assert torch.equal(torch.cat(parts), data.pack(tokenizer, train))


def test_the_five_gram_is_a_distribution() -> None:
    """Whatever the context: what the discount takes from the seen it gives to the unseen."""
    held_out = module("held_out")
    tokens = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2, 6, 4, 3, 3, 8, 3, 2]
    for order in (1, 2, 5):
        probability = held_out.ngram_model(tokens, 11, order)
        for context in [(), (3,), (3, 8), (9, 7, 9, 3), (0, 0, 9, 3), (10,), (4, 6, 2, 6)]:
            context = context[-(order - 1) :] if order > 1 else ()
            total = sum(probability((*context, token)) for token in range(11))
            assert math.isclose(total, 1, abs_tol=1e-9)
    assert probability((9, 7, 9, 3)) > probability((9, 7, 9, 10)) > 0
    # By hand: two tokens after one context, once each; under them each follows one kind of token.
    probability = held_out.ngram_model([0, 1, 0, 2], 4, 2)
    lower = (1 - 0.75) / 3 + 0.75 * 3 / 3 / 4
    assert math.isclose(probability((0, 1)), (1 - 0.75) / 2 + 0.75 * 2 / 2 * lower)


def test_bits_of_a_model_that_knows_nothing(code: ModuleType) -> None:
    """log2 of the vocabulary a token, over window borders and a short last window too."""
    import torch

    held_out = module("held_out")
    model = code.load_hf(CHAPTER / "draft")
    torch.nn.init.zeros_(model.embed.weight)
    bits, choices = held_out.model_bits(model, torch.arange(600).to(torch.uint16))
    assert math.isclose(bits, 599 * 11, rel_tol=1e-6)
    assert len(choices) == 599


def test_export_gives_the_same_names_back(code: ModuleType) -> None:
    model = code.load_hf(CHAPTER / "checkpoint")
    assert set(code.names(model.config.layers)) == set(model.state_dict())


def test_two_conventions_that_fail_in_silence(code: ModuleType) -> None:
    """What section 8.6 says of an export: everything loads, and the model is another one."""
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


@pytest.mark.full
def test_the_tokenizer_is_what_prepare_data_makes(run: Run, checkout: Path) -> None:
    result = run(f"python {CODE}/prepare_data.py --out runs/fresh")
    assert result.returncode == 0, result.stdout + result.stderr
    made = json.loads((checkout / "runs/fresh/tokenizer.json").read_text())
    assert made == json.loads((CHAPTER / "checkpoint/tokenizer.json").read_text())
    meta = json.loads((checkout / "runs/fresh/meta.json").read_text())
    assert meta["train"]["digest"] == "4c2b56ac7cf87e73"  # on every machine
    assert meta["held_out"]["digest"] == "3b6ffa29bbdb6785"


@pytest.mark.full
def test_export_of_a_run(run: Run, tmp_path: Path) -> None:
    trained = run(
        f"torchrun --nproc_per_node=4 {CODE}/train.py {TINY} --steps 3 --dp-shard 2 --tp 2 "
        f"--kv-heads 2 --out {tmp_path}/run"
    )
    assert trained.returncode == 0, trained.stdout + trained.stderr
    exported = run(f"python {CODE}/export_hf.py --run {tmp_path}/run --model {tmp_path}/hf")
    assert exported.returncode == 0, exported.stdout + exported.stderr
    assert "all 4 checks ok" in exported.stdout
    # Another run's tokenizer would load as well, and the model talk nonsense.
    made = run(f"python {CODE}/prepare_data.py --corpus resources/corpus.txt --out {tmp_path}/data")
    assert made.returncode == 0, made.stdout + made.stderr
    flags = f"--run {tmp_path}/run --data {tmp_path}/data --model {tmp_path}/other"
    refused = run(f"python {CODE}/export_hf.py {flags}")
    assert (refused.returncode, "Traceback" in refused.stderr) == (2, False)
    assert "type --data with that run's" in refused.stderr
    assert not (tmp_path / "other").exists()


@pytest.mark.full
def test_an_import_is_trained_further(run: Run, tmp_path: Path) -> None:
    """The draft model, imported, goes on at step 0 with its loss, on two ranks that share it."""
    draft = f"{CHAPTERS[7]}/draft"
    made = run(f"python {CODE}/export_hf.py --model {draft} --import {tmp_path}/run")
    assert "all 5 checks ok" in made.stdout, made.stdout + made.stderr
    prepared = run(
        f"python {CODE}/prepare_data.py --tokenizer {draft}/tokenizer.json --out {tmp_path}/data"
    )
    assert "all 4 checks ok" in prepared.stdout, prepared.stdout + prepared.stderr
    sizes = "--width 64 --layers 3 --heads 2 --kv-heads 2 --hidden 176"
    flags = f"--data {tmp_path}/data --out {tmp_path}/run --resume --lr 1e-4 --steps 4"
    train = f"torchrun --nproc_per_node=2 {CODE}/train.py --dp-shard 2 {flags} --json {tmp_path}/l"
    refused = run(f"{train} {sizes} --layers 2")
    assert refused.returncode != 0
    assert "has layers 3, this run 2" in refused.stderr
    tuned = run(f"{train} {sizes}")
    assert tuned.returncode == 0, tuned.stdout + tuned.stderr
    losses = json.loads((tmp_path / "l").read_text())["losses"]
    assert len(losses) == 4
    assert losses[0] < 4.5  # ln 2048 is 7.6
    again = run(f"python {CODE}/export_hf.py --model {draft} --import {tmp_path}/run")
    assert (again.returncode, "has been trained" in again.stderr) == (2, True)


@pytest.mark.full
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "llama3"}}, "rope_scaling"),
        ({"head_dim": 64}, "head_dim"),
        ({"model_type": "gpt2", "rms_norm_eps": None}, "model_type"),
        ({"num_hidden_layers": 2}, "see its model.layers.2."),
        ({"num_hidden_layers": 4}, "does not fit its config.json: 'model.layers.3."),
    ],
)
def test_a_model_that_ours_cannot_be(
    code: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, object],
    said: str,
) -> None:
    config = json.loads((CHAPTER / "draft/config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = (CHAPTER / "draft/model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights)
    with pytest.raises(SystemExit, match="2"):
        code.load_hf(tmp_path)
    assert said in capsys.readouterr().err


@pytest.mark.full
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--run runs/none --model runs/x", "has no checkpoint"),
        ("--run runs/none", "type --model DIR"),
        ("--model runs/none", "make book-model"),
        ("--tokens 300", "--tokens be 1 to 253"),
    ],
)
def test_bad_input(run: Run, flags: str, said: str) -> None:
    result = run(f"python {CODE}/export_hf.py {flags}")
    assert (result.returncode, "Traceback" in result.stderr) == (2, False)
    assert said in result.stderr


@pytest.mark.full
@pytest.mark.parametrize(
    ("flags", "said"),
    [("--model runs/none", "make book-model"), ("--corpus LICENSE", "none to hold out")],
)
def test_bad_input_of_held_out(run: Run, flags: str, said: str) -> None:
    result = run(f"python {CODE}/held_out.py {flags}")
    assert (result.returncode, "Traceback" in result.stderr) == (2, False)
    assert said in result.stderr


def test_a_folder_of_yours_is_not_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").write_text("two years")
    with pytest.raises(SystemExit, match="2"):
        module("prepare_data").prepare(Path("resources/corpus.txt"), tmp_path, 512)
    assert (tmp_path / "thesis.txt").read_text() == "two years"
    assert "name another folder" in capsys.readouterr().err


@pytest.mark.full
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--corpus none.txt", "cannot read none.txt"),
        ("--vocabulary 100", "give 260 to 65536"),
        ("--vocabulary 60000", "type a smaller --vocabulary"),
        ("--corpus LICENSE", "none to hold out"),
        ("--tokenizer none.json", "cannot read none.json"),
    ],
)
def test_bad_data(run: Run, flags: str, said: str) -> None:
    result = run(f"python {CODE}/prepare_data.py --out runs/bad {flags}")
    assert (result.returncode, "Traceback" in result.stderr) == (2, False)
    assert said in result.stderr


def test_the_book_model_is_small_enough_for_the_repository() -> None:
    """At most 12 MB; the command's own bound is for any model."""
    sizes = {name: sum(p.stat().st_size for p in (CHAPTER / name).iterdir()) for name in MODELS}
    assert sizes["checkpoint"] <= 12e6, sizes
    assert sizes["draft"] <= sizes["checkpoint"] / 5, sizes
