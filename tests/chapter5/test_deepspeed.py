"""DeepSpeed: one loss curve at each ZeRO stage, exact accounts, whole checkpoints, keys that do something."""

import copy
import functools
import json
import os
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import book
import checks
import pytest
import torch
import torch.distributed as dist
import warm
from mutants import failed_claims
from torch.utils.file_baton import FileBaton

CODE = Path("chapter5-deepspeed-and-zero-optimization/code")
SCRIPT = warm.ROOT / CODE / "train.py"
FILE = json.loads((warm.ROOT / CODE / "deepspeed_stage3_config.json").read_text())
ZERO = {k: v for k, v in FILE["zero_optimization"].items() if not k.startswith("offload_")}
CONFIG = FILE | {"zero_optimization": ZERO}  # at every stage
GOLDEN = "--compare chapter3-distributed-training-with-pytorch-ddp/code/golden.json"
ALL = f"{GOLDEN} --stages 0 1 2 3"
TWO = f"{GOLDEN} --stages 1 3"
Run = Callable[..., warm.Result]

pytest.importorskip("deepspeed", reason="needs DeepSpeed, which is for Linux")
script = warm.load("chapter5_script", SCRIPT)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """A single rank would take all cores, and wait for the ones that others use."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def torchrun(world_size: int, flags: str, name: str = "train.py") -> str:
    return f"torchrun --nproc_per_node={world_size} {CODE}/{name} {flags}"


def passes(run: Run, command: str) -> warm.Result:
    result, parsed = run(command), book.parse_command(command)
    problems = checks.evidence(parsed, result)
    assert not problems, checks.report(parsed, result, problems)
    return result


def written(folder: Path, changes: dict[str, Any], zero: dict[str, Any] | None = None) -> Path:
    """A config file that differs from the chapter's; None takes a key away."""
    config = CONFIG | changes
    config["zero_optimization"] = CONFIG["zero_optimization"] | (zero or {})
    for part in (config, config["zero_optimization"]):
        for key in [key for key, value in part.items() if value is None]:
            del part[key]
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return path


# --- the same training as one process, and accounts ---------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_every_world_size_gives_the_golden_losses(world_size: int) -> None:
    """In each stage; accumulating too. What is held and sent is predicted where parts do not divide."""
    accumulate = {1: 3, 3: 2, 4: 3}[world_size]
    cases = [(ALL, "", ""), (f"{ALL} --accumulate {accumulate} --stop-at 8", "", "")]
    assert failed_claims(SCRIPT, world_size, cases) == [set(), set()]


@pytest.mark.full
def test_plain_python_is_one_rank(run: Run) -> None:
    result = passes(run, f"python {CODE}/train.py {GOLDEN}")
    assert "batch of 12 = micro batch of 12 x accumulation 1 x 1 ranks" in result.stdout


@pytest.mark.full
def test_accounts_hold_in_16_bits_and_with_reductions_to_one_rank(tmp_path: Path) -> None:
    """2 + 2 + 12 bytes per parameter; and half as much for the gradients as by all-reduce."""
    bits = {"bf16": {"enabled": True}, "data_types": {"buffer_dtype": "bf16"}}
    small = "--width 48 --layers 1 --heads 2 --context 16 --steps 4"
    cases = []
    for name, changes, zero, flags in (
        ("bits", bits, {}, "--stages 0 1 2 3"),
        ("bits", bits, {}, "--stages 0 1 2 3 --accumulate 2"),
        ("reduce", {}, {"use_multi_rank_bucket_allreduce": False}, "--stages 1 2"),
    ):
        (tmp_path / name).mkdir(exist_ok=True)
        path = written(tmp_path / name, changes, zero)
        cases.append((f"{small} --deepspeed_config {path} {flags}", "", ""))
    *in_bits, reduced = failed_claims(SCRIPT, 3, cases)
    for failed in in_bits:  # where stages agree to 16 bits only
        assert {line for line in failed if "loss - ZeRO" not in line} == set()
    assert reduced == set()


MUTANTS = [  # flags; a piece of the source, what it becomes; the claim that must fail
    (TWO, "(loss * dist.get_world_size() * ", "(loss * ", "norm / the file's"),
    (f"{TWO} --accumulate 2", " * engine.gradient_accumulation_steps())", ")", "norm / the file's"),
    (TWO, 'group["lr"] = rate', 'group["lr"] = args.lr', "loss - the file's"),
    (TWO, "        dist.all_reduce(loss)\n", "", "loss - the file's"),
    # each of these is a mistake in the model that predicts
    (ALL, "stage == 0 else 4 * part", "stage in (0, 3) else 4 * part", "rank holds"),
    (ALL, "start < first + part and start + count > first", "first <= start < first + part", "holds"),
    (f"{ALL} --accumulate 2", "kept = total if", "kept = in_part if", "rank holds"),
    (ALL, "size * max(sizes)", "size * min(sizes)", "rank holds"),
    (ALL, 'reduced = 2 if', 'reduced = 1 if', "rank sends"),
    (f"{ALL} --accumulate 2", "2: args.accumulate * reduced", "2: reduced", "rank sends"),
    (ALL, "3: args.accumulate * 3 * ring", "3: args.accumulate * 2 * ring", "rank sends"),
]  # fmt: skip


@pytest.mark.full
def test_mutants_are_caught() -> None:
    """Three ranks, so that parts do not divide."""
    cases = [(f"{flags} --stop-at 6", right, wrong) for flags, right, wrong, _ in MUTANTS]
    found = failed_claims(SCRIPT, 3, cases)
    for (_, right, _, claim), failed in zip(MUTANTS, found, strict=True):
        assert any(claim in line for line in failed), f"{right}: {failed}"


# --- checkpoints -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks leave that stop at step 12 of 20: steps 8 and 12."""
    out = tmp_path_factory.mktemp("saved") / "out"
    flags = f"{GOLDEN} --out {out} --save-every 4 --stop-at 12"
    result = warm.run(torchrun(2, flags), checkout, 60)
    assert result.returncode == 0, result.stderr
    return out


@pytest.fixture
def out(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "out"))


def resumes(run: Run, out: Path, step: int, more: str = "") -> None:
    """The curve goes on as if nothing had happened."""
    result = passes(run, torchrun(2, f"{GOLDEN} --out {out} --resume {more}"))
    assert f"resuming at step {step}, ZeRO 3 of 2 ranks" in result.stdout


@pytest.mark.full
def test_nothing_left_to_do_is_no_error(run: Run, out: Path) -> None:
    resumes(run, out, 12)
    resumes(run, out, 20)
    assert sorted(path.name for path in out.iterdir()) == ["step-000012", "step-000020"]


@pytest.mark.full
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_other_stages_resume_too(run: Run, tmp_path: Path, stage: int) -> None:
    flags = f"{GOLDEN} --stages {stage} --accumulate 2 --out {tmp_path}/out"
    passes(run, torchrun(2, f"{flags} --stop-at 7"))
    result = passes(run, torchrun(2, f"{flags} --resume"))
    assert f"resuming at step 7, ZeRO {stage} of 2 ranks" in result.stdout


KILL = "os.kill(os.getpid(), 9)"
HALF = (
    "lambda state, path: (Path(path).parent.mkdir(parents=True, exist_ok=True), "
    f"Path(path).write_bytes(b'half'), {KILL})"
)
DEATHS = {  # in the save of step 8: what becomes what
    "rank 1, in the middle of its file": (
        "    with Failures(engine) as failures:",
        "    if notes['step'] == 8 and dist.get_rank() == 1:\n"
        f"        engine.checkpoint_engine.save = {HALF}\n    with Failures(engine) as failures:",
    ),
    "rank 0, before the name": (
        "            (draft / name).rename(",
        f"            if notes['step'] == 8:\n                {KILL}\n"
        "            (draft / name).rename(",
    ),
}


@pytest.mark.full
@pytest.mark.parametrize("death", DEATHS)
def test_sigkill_in_mid_save_leaves_the_one_before(
    run: Run, checkout: Path, tmp_path: Path, death: str
) -> None:
    right, wrong = DEATHS[death]
    source = SCRIPT.read_text()
    assert source.count(right) == 1
    mutant = checkout / CODE / "killed_train.py"
    mutant.write_text(source.replace(right, wrong))
    config = f"--deepspeed_config {CODE}/deepspeed_stage3_config.json"
    flags = f"{GOLDEN} --out {tmp_path} --save-every 4"
    result = run(torchrun(2, f"{config} {flags}", mutant.name), timeout=60)
    mutant.unlink()
    assert result.returncode not in (0, warm.TIMED_OUT)
    assert (tmp_path / "draft" / "step-000008").is_dir(), "it died somewhere else"
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-000004"]
    resumes(run, tmp_path, 4, "--save-every 4")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000016", "step-000020"]


LIMIT = "resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, 5_000))"  # bytes of a file
FULL = {  # the disk of a rank that has no room for step 8
    "rank 1, for its shard": (
        "    with Failures(engine) as failures:",
        f"    if notes['step'] == 8 and dist.get_rank() == 1:\n        {LIMIT}\n"
        "    with Failures(engine) as failures:",
    ),
    "rank 0, for the notes": (
        '            notes["files"] = ',
        f"            if notes['step'] == 8:\n                {LIMIT}\n"
        "                notes['long'] = 'x' * 5_000\n"
        '            notes["files"] = ',
    ),
}


@pytest.mark.full
@pytest.mark.parametrize("disk", FULL)
def test_a_full_disk_is_one_line_and_leaves_the_checkpoint_before(
    run: Run, checkout: Path, tmp_path: Path, disk: str
) -> None:
    right, wrong = FULL[disk]
    source = SCRIPT.read_text()
    assert source.count(right) == 1
    mutant = checkout / CODE / "full_train.py"
    mutant.write_text(
        source.replace(right, wrong).replace("import os\n", "import os, resource\n", 1)
    )
    config = f"--deepspeed_config {CODE}/deepspeed_stage3_config.json"
    flags = f"{GOLDEN} --out {tmp_path} --save-every 4"
    result = run(torchrun(2, f"{config} {flags}", mutant.name), timeout=60)
    mutant.unlink()
    assert result.returncode not in (0, warm.TIMED_OUT)
    said = [line for line in result.stderr.splitlines() if "cannot save to" in line]
    assert len(said) == 2, result.stderr
    assert f"(rank {disk[5]}: " in said[0]
    assert said[0].endswith("step-000004 is whole: --resume goes on there")
    assert "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-000004"]
    resumes(run, tmp_path, 4)


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.full
@pytest.mark.parametrize("damage", [Path.unlink, cut_off])
def test_a_missing_shard_is_one_line_before_training_starts(
    run: Run, out: Path, damage: Callable[[Path], None]
) -> None:
    damage(next((out / "step-000012").glob("*rank_1*optim_states.pt")))
    result = run(torchrun(2, f"{GOLDEN} --out {out} --resume"), timeout=60)
    assert result.returncode not in (0, warm.TIMED_OUT)
    said = [line for line in result.stderr.splitlines() if "is missing or cut off: move" in line]
    assert len(said) == 2, result.stderr
    assert "Traceback" not in result.stderr
    (out / "step-000012").rename(out / "away")  # as the line says
    resumes(run, out, 8)


@pytest.mark.full
def test_another_architecture_is_one_line_before_training_starts(run: Run, out: Path) -> None:
    result = run(torchrun(2, f"--out {out} --resume"), timeout=60)  # wider than what was saved
    assert result.returncode not in (0, warm.TIMED_OUT)
    says = "step-000012 has width 64, this run 128: type another --out"
    assert [says in line for line in result.stderr.splitlines()].count(True) == 2, result.stderr


@pytest.mark.full
def test_what_is_exported_is_one_processs_model_at_any_stage(run: Run, tmp_path: Path) -> None:
    """Plain PyTorch loads it, strictly, and has the loss with which the run has ended, or nearly."""
    golden = json.loads((warm.ROOT / GOLDEN.split()[1]).read_text())
    sizes = [golden["recipe"][name] for name in ("width", "layers", "heads", "context")]
    whole = []
    for stage in (1, 3):
        file = tmp_path / f"{stage}.safetensors"
        passes(run, torchrun(2, f"{GOLDEN} --stages {stage} --export {file}"))
        model = script.ByteLlama(*sizes)
        model.load_state_dict(script.load_file(file))
        whole.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["1.safetensors", "3.safetensors"]
    assert (whole[0] - whole[1]).abs().max() < 1e-4
    text = (warm.ROOT / golden["file"]).read_bytes()[: sizes[3] + 1]
    tokens = torch.tensor(list(text))
    logits = model(tokens[None, :-1])[0]
    assert torch.nn.functional.cross_entropy(logits, tokens[1:]) < 4.5  # untrained it is 5.8


@pytest.mark.full
@pytest.mark.parametrize(
    ("world_size", "flags", "says"),
    [
        (3, "", "step-000012 has ranks 2, this run 3: type another --out"),
        (2, "--stages 1", "step-000012 has stage 3, this run 1: type another --out"),
        (2, "--accumulate 5", "train_batch_size 12 is not"),
        (5, "", "train_batch_size 12 is not"),
    ],
)
def test_another_run_is_one_line_before_training_starts(
    run: Run, out: Path, world_size: int, flags: str, says: str
) -> None:
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    result = run(torchrun(world_size, f"{GOLDEN} --out {out} --resume {flags}"), timeout=60)
    assert result.returncode not in (0, warm.TIMED_OUT)
    said = [line for line in result.stderr.splitlines() if says in line]
    assert len(said) == world_size, result.stderr
    assert "Traceback" not in result.stderr
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


# --- the configuration -------------------------------------------------------------------------


def refusal(monkeypatch: pytest.MonkeyPatch, capsys: Any, flags: str) -> str:
    monkeypatch.setattr(sys, "argv", ["train.py", *flags.split()])
    monkeypatch.chdir(warm.ROOT)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as end:
        script.parse_args()
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    return said


Part = dict[str, Any]
BAD_CONFIGS: list[tuple[Part, Part, str]] = [
    ({"gradient_cliping": 0.5}, {}, "knows no gradient_cliping, the nearest is gradient_clipping"),
    ({"zero_optimisation": {}}, {}, "the nearest is zero_optimization"),
    ({"xyz": 1}, {}, "knows no xyz\n"),
    ({}, {"stage3_param_persistance_threshold": 0}, "nearest is stage3_param_persistence_threshold"),
    ({"train_batch_size": "auto"}, {}, 'train_batch_size is "auto", which only Hugging Face fills in'),
    ({}, {"reduce_bucket_size": "auto"}, 'zero_optimization.reduce_bucket_size is "auto"'),
    ({"train_batch_size": 13}, {}, "6 x gradient_accumulation_steps 1 x 2 ranks: type --batch 12"),
    ({"train_batch_size": 1}, {}, "type --batch 2"),
    ({"train_batch_size": None}, {}, "neither train_batch_size nor train_micro_batch_size_per_gpu"),
    ({"train_micro_batch_size_per_gpu": 5}, {}, "train_micro_batch_size_per_gpu 5 x"),
    # deeper down; what pydantic refuses and what it would not; what contradicts itself, or is no more
    ({}, {"offload_optimizer": {"devise": "cpu"}}, "offload_optimizer.devise, the nearest is device"),
    ({}, {"offload_param": {"device": "gpu"}}, "zero_optimization.offload_param.device: Input should"),
    ({"flops_profiler": {"profile_stpe": 3}}, {}, "profile_stpe, the nearest is profile_step"),
    ({"checkpoint": {"parallel_write": {"pipeline_stages": True}}}, {},
     "knows no checkpoint.parallel_write.pipeline_stages, the nearest is pipeline_"),
    ({"optimizer": {"type": "AdamW", "params": {"lr": 0.1, "torch_adam": True, "weight_dekay": 0}}},
     {}, "knows no optimizer.params.weight_dekay, the nearest is weight_decay"),
    ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, {}, "cannot be simultaneously enabled"),
    ({"elasticity": {"enabled": True}}, {}, "Elastic training has been removed"),
    # swap to a disk
    ({}, {"offload_optimizer": {"device": "nvme"}}, "offload_optimizer to nvme wants an nvme_path"),
    ({}, {"offload_param": {"device": "nvme", "nvme_path": f"{warm.ROOT}/LICENSE/swap"}},
     "LICENSE/swap: Not a directory"),
]  # fmt: skip


def test_bad_configurations_get_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    for changes, zero, says in BAD_CONFIGS:
        path = written(tmp_path, changes, zero)
        assert says in refusal(monkeypatch, capsys, f"--deepspeed_config {path}")
    for flags, says in (
        (f"--deepspeed_config {tmp_path}/none.json", "No such file"),
        (f"--deepspeed_config {warm.ROOT}/LICENSE", "cannot read --deepspeed_config"),
        ("--heads 3", "is no multiple of 2 x --heads 3"),
        ("--resume", "type --out DIR"),
        (f"--out {tmp_path} --stages 1 2", "type --stages 3"),
        ("--export a.safetensors --stages 1 2", "type --stages 3"),
        (f"--export {tmp_path}/none/a.safetensors", "there is no folder"),
        (f"{GOLDEN} --batch 24", "golden.json has batch 12, "),
    ):
        assert says in refusal(monkeypatch, capsys, flags)


def test_a_disk_that_is_too_small_is_one_line_before_training(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    """Three checkpoints of 16 bytes a parameter, less what is there already."""
    usage = types.SimpleNamespace(free=47 * 10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(SystemExit) as end:
        script.refuse_small_disk(tmp_path, 16 * 10**6)
    assert end.value.code == 2
    assert capsys.readouterr().err == f"--out {tmp_path} has 45 MiB free, checkpoints want 46\n"
    (tmp_path / "step-000004").mkdir()
    script.refuse_small_disk(tmp_path, 16 * 10**6)


def test_known_keys_come_from_deepspeed_and_pass(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Keys that the chapter's file has not, at both levels, by field and by alias."""
    many: Part = {"bf16": {"enabled": False}, "wall_clock_breakdown": False, "steps_per_print": 100}
    many |= {"sequence_parallel_size": 1, "data_types": {}, "tensorboard": {"enabled": False}}
    zero: Part = {"overlap_comm": False, "stage3_gather_16bit_weights_on_model_save": True}
    zero |= {"param_persistence_threshold": 0, "stage3_param_persistence_threshold": None}
    monkeypatch.chdir(warm.ROOT)
    monkeypatch.setattr(
        sys, "argv", ["train.py", "--deepspeed_config", str(written(tmp_path, many, zero))]
    )
    args = script.parse_args()
    assert (args.batch, args.lr, args.clip, args.stages) == (12, 0.003, 1.0, [3])


def test_two_numbers_give_the_third(monkeypatch: pytest.MonkeyPatch) -> None:
    """As DeepSpeed fills them in."""
    batch, micro, steps = script.BATCH, script.MICRO, script.ACCUMULATION
    for config in ({batch: 12}, {batch: 12, steps: 3}, {batch: 12, micro: 2}, {micro: 2, steps: 3}):
        found = script.batch_triangle(config, 2)
        assert found[batch] == 12 == found[micro] * found[steps] * 2, config
        assert config.items() <= found.items()
    monkeypatch.setattr(sys, "argv", ["train.py", "--batch", "24", "--accumulate", "2"])
    config = vars(script.parse_args())["config"]
    assert (config[batch], config[micro], config[steps]) == (24, 12, 2)  # flags before the file


def test_the_text_prints_the_configuration_of_the_script() -> None:
    path = warm.ROOT / CODE.parent / "main.md"
    fences = [fence for fence in book.fences(path) if fence.language == "json"]
    shown = [json.loads("\n".join(fence.lines)) for fence in fences if fence.lines[0] == "{"]
    assert FILE in shown


# --- what comes wrong first (section 5.7) -------------------------------------------------------


def engine_of(changes: dict[str, Any], zero: dict[str, Any]) -> Any:
    """An engine on the golden file's model; None takes a key away."""
    deepspeed = script.deepspeed
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    config = copy.deepcopy(CONFIG) | changes
    config["zero_optimization"] |= zero
    for key in [key for key, value in config["zero_optimization"].items() if value is None]:
        del config["zero_optimization"][key]
    model = script.ByteLlama(64, 2, 2, 32)
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]


def said(mistake: Callable[[], object]) -> str:
    try:
        mistake()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def window_of() -> torch.Tensor:
    return torch.randint(256, (2, 33), generator=torch.Generator().manual_seed(0))


def mistakes_in_rank(folder: str) -> dict[str, Any]:
    """What the mistakes of section 5.7 print, or do without a word."""
    found: dict[str, Any] = {}
    engine = engine_of({"gradient_cliping": 0.5}, {"stage": 1})
    found["typing error"] = engine.gradient_clipping()
    found["nested"] = said(lambda: engine_of({}, {"reduce_bucket": 5}))
    found["batch"] = said(lambda: engine_of({"gradient_accumulation_steps": 5}, {}))
    found["auto"] = said(lambda: engine_of({"train_batch_size": "auto"}, {}))
    inside = engine_of({}, {"reduce_bucket_size": "auto"})
    found["auto inside"] = inside.zero_reduce_bucket_size()
    found["no folder"] = engine.load_checkpoint(f"{folder}/none")

    engine = engine_of({}, {})
    found["numbers"] = sum(p.numel() for p in engine.module.parameters())
    found["outside forward"] = said(lambda: engine.module.norm.weight * torch.ones(64))
    with script.deepspeed.zero.GatheredParameters(engine.module.norm.weight):
        found["gathered"] = engine.module.norm.weight.numel()

    far = {"stage3_max_live_parameters": None, "stage3_max_reuse_distance": None}
    engine = engine_of({}, far)
    for _ in range(3):  # by the third step it knows what comes next
        sent = script.Sent()
        with sent:
            script.micro_step(engine, window_of(), 12)
            engine.step()
    found["sent, by default"] = sent.nbytes

    nothing = {key: None for key in CONFIG["zero_optimization"] if key != "stage"}
    engine = engine_of({}, nothing)
    parameters = list(engine.module.parameters())
    for _ in range(2):
        script.micro_step(engine, window_of(), 12)
        engine.step()
    found["whole, by default"] = sum(p.nbytes for p in parameters)
    found["shards, by default"] = sum(p.ds_tensor.nbytes for p in parameters)
    buckets = [b for bucket in engine.optimizer.ipg_buckets.values() for b in [bucket.buffer]]
    flat = [b for item in buckets for b in (item if isinstance(item, list) else [item])]
    found["bucket, by default"] = max(b.nbytes for b in flat if b is not None)
    return found


def test_the_mistakes_of_the_text_do_what_it_says(tmp_path: Path) -> None:
    for found in warm.fork_ranks(mistakes_in_rank, 2, str(tmp_path)):
        assert found["typing error"] == 1.0, "not DeepSpeed's default"
        assert found["nested"].startswith("ValidationError: 1 validation error for DeepSpeedZero")
        assert "Extra inputs are not permitted" in found["nested"]
        assert found["batch"] == (
            "AssertionError: Check batch related parameters. train_batch_size is not equal to "
            "micro_batch_per_gpu * gradient_acc_step * world_size 12 != 1 * 5 * 2"
        )
        assert found["auto"] == "TypeError: unsupported operand type(s) for //: 'str' and 'int'"
        assert found["auto inside"] == 500_000_000, "a word about it"
        assert found["no folder"] == (None, None), "a word about it"
        assert found["numbers"] == 0
        assert found["outside forward"] == (
            "RuntimeError: The size of tensor a (0) must match the size of tensor b (64) at "
            "non-singleton dimension 0"
        )
        assert found["gathered"] == 64
        assert found["sent, by default"] == 2 * 0.5 * 4 * 133_440, "weights are gathered twice"
        assert found["whole, by default"] == 4 * 133_440, "ZeRO-3 has sharded something"
        assert found["shards, by default"] == 2 * 133_440
        assert found["bucket, by default"] == 4 * 500_000_000


def resaved_in_rank(folder: str) -> str:
    """On two ranks save at each stage, on one rank load."""
    engines = {stage: engine_of({}, {"stage": stage}) for stage in (1, 2, 3)}
    found = []
    for stage, engine in engines.items():
        if dist.get_world_size() == 2:
            engine.save_checkpoint(folder, tag=f"stage{stage}")
        else:
            found.append(said(functools.partial(engine.load_checkpoint, folder, f"stage{stage}")))
    return "\n".join(found)


@pytest.mark.full
def test_shards_want_as_many_ranks(tmp_path: Path) -> None:
    warm.fork_ranks(resaved_in_rank, 2, str(tmp_path))
    (found,) = warm.fork_ranks(resaved_in_rank, 1, str(tmp_path))
    assert found.splitlines() == 3 * [
        "ZeRORuntimeException: The checkpoint being loaded used a DP world size of 2 but the current "
        "world size is 1. Automatic adjustment of ZeRO's optimizer state partitioning with a new "
        "world size is not currently supported."
    ]


def latest_in_rank(folder: str) -> None:
    """Rank 1 is late with its file, and dies while it writes; rank 0 does not wait for it."""
    engine = engine_of({}, {})
    engine.save_checkpoint(folder, tag="first")
    if dist.get_rank() == 1:
        save = engine.checkpoint_engine.save

        def dies(state: Any, path: str) -> None:
            if "optim_states" not in path:
                return save(state, path)
            while Path(folder, "latest").read_text() != "second":
                pass  # as long as rank 0 takes
            os._exit(1)

        engine.checkpoint_engine.save = dies
    engine.save_checkpoint(folder, tag="second")


@pytest.mark.full
def test_deepspeeds_own_latest_can_name_half_a_checkpoint(tmp_path: Path) -> None:
    """So the script gives a name of its own, last. When this fails, it may stop doing so."""
    with pytest.raises(warm.RankError):
        warm.fork_ranks(latest_in_rank, 2, str(tmp_path), timeout=60)
    assert (tmp_path / "latest").read_text() == "second"
    assert len(list((tmp_path / "first").glob("*optim_states.pt"))) == 2
    assert len(list((tmp_path / "second").glob("*optim_states.pt"))) == 1


@pytest.mark.full
def test_the_lock_of_a_killed_build_is_nobodys_and_holds(tmp_path: Path) -> None:
    """PyTorch's builds wait while the file exists, whoever made it."""
    (tmp_path / "lock").touch()
    assert not FileBaton(str(tmp_path / "lock")).try_acquire()
    (tmp_path / "lock").unlink()
    assert FileBaton(str(tmp_path / "lock")).try_acquire()


@pytest.mark.full
def test_no_command_of_the_chapter_builds_anything(run: Run, tmp_path: Path) -> None:
    """Where an extension would be built, nothing appears."""
    os.environ["TORCH_EXTENSIONS_DIR"] = str(tmp_path / "built")
    try:
        passes(run, torchrun(2, f"{ALL} --stop-at 4"))
    finally:
        del os.environ["TORCH_EXTENSIONS_DIR"]
    assert not list(tmp_path.rglob("*.so"))
    assert not (tmp_path / "built").exists()
