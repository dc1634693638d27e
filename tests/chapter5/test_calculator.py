"""The calculator beside what DeepSpeed really holds, other people's counts, and broken formulas."""

import copy
import gc
import itertools
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
from book import CHAPTERS

CODE = warm.ROOT / CHAPTERS[4] / "code"
SCRIPT = CODE / "zero_memory_calculator.py"
CONFIG = json.loads((CODE / "configs" / "zero3.json").read_text())

pytest.importorskip("deepspeed", reason="needs DeepSpeed, which is for Linux")
script = warm.load("chapter5_calculator", SCRIPT)
trainer = warm.load("chapter5_trainer", CODE / "train.py")
by_ranks = warm.load("chapter5_by_ranks", CODE / "memory_by_ranks.py")

WIDTH, LAYERS, HEADS, CONTEXT = 64, 8, 2, 16
BITS = {"bf16": {"enabled": True}, "data_types": {"buffer_dtype": "bf16"}}
Counted = dict[tuple[bool, int, int], dict[str, float]]  # by bf16, stage, micro batches


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def parameters_of_ours() -> int:
    with torch.device("meta"):
        model = trainer.ByteLlama(WIDTH, LAYERS, HEADS, CONTEXT)
    return sum(p.numel() for p in model.parameters())


def counted_in_rank(cases: list[tuple[bool, int, int]], folder: str) -> Counted:
    """What train.py counts of DeepSpeed's tensors, as it does for the table of section 5.2."""
    trainer.deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    path = Path(folder) / f"{torch.distributed.get_rank()}.json"
    counted = {}
    for bf16, stage, accumulate in cases:
        path.write_text(json.dumps(CONFIG | (BITS if bf16 else {})))
        flags = f"--width {WIDTH} --layers {LAYERS} --heads {HEADS} --context {CONTEXT} --steps 2"
        flags += f" --data {warm.ROOT}/resources/corpus.txt --accumulate {accumulate}"
        sys.argv[:] = ["train.py", "--deepspeed_config", str(path), *flags.split()]
        args = trainer.parse_args()
        config = trainer.with_stage(args.config, stage)
        counted[bf16, stage, accumulate] = trainer.train(args, config, "", torch.device("cpu"))[2]
    return counted


def compare(cases: list[tuple[bool, int, int]], world_size: int, folder: Path) -> None:
    model = script.Transformer(parameters_of_ours(), LAYERS, WIDTH, WIDTH, 176, 256)
    for counted in warm.fork_ranks(counted_in_rank, world_size, cases, str(folder)):
        for (bf16, stage, accumulate), found in counted.items():
            plan = script.Plan(world_size, stage, bf16=bf16, accumulate=accumulate)
            parts = script.need(model, plan)
            pairs = [(parts["weights"], found["parameters"])]
            pairs.append((parts["optimizer state"], found["optimizer state"]))
            gradients = (parts["gradients"], found["gradients"])
            total = [sum(pair) for pair in zip(*pairs, gradients, strict=True)]
            for expected, right in (*pairs, total):
                assert expected == pytest.approx(right, rel=0.05), (bf16, stage, accumulate)
            cut = 2 * WIDTH * 2 * 176 * (2 if bf16 else 4)  # tensors across a border stay whole
            assert -100 <= gradients[1] - gradients[0] <= cut


def test_two_ranks_of_deepspeed_hold_what_is_calculated(tmp_path: Path) -> None:
    cases = [(bf16, stage, 1) for bf16 in (False, True) for stage in range(4)]
    compare([*cases, (False, 1, 2)], 2, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("world_size", [1, 3])
def test_other_numbers_of_ranks_too(tmp_path: Path, world_size: int) -> None:
    compare(
        [(bf16, stage, 2) for bf16 in (False, True) for stage in range(4)], world_size, tmp_path
    )


def live(dtype: torch.dtype) -> int:
    """Bytes of all storages of this type that Python knows of, gradients too."""
    found = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.is_leaf:
            for tensor in (thing, thing.grad):
                if tensor is not None and tensor.numel() and tensor.dtype == dtype:
                    found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(found.values())


def at_update_in_rank(stage: int, offload: bool) -> list[float]:
    """Bytes per parameter in fp32, and in bf16, while PyTorch's AdamW runs inside DeepSpeed."""
    trainer.deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    config = copy.deepcopy(CONFIG) | BITS
    zero = config["zero_optimization"]
    zero |= {"stage": stage, "reduce_bucket_size": 1000}
    if offload:
        config["zero_force_ds_cpu_optimizer"] = False
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    if offload and stage == 3:
        zero["offload_param"] = {"device": "cpu", "pin_memory": False}
    types = (torch.float32, torch.bfloat16)
    before = [live(dtype) for dtype in types]
    model = trainer.ByteLlama(WIDTH, LAYERS, HEADS, CONTEXT)
    engine, *_ = trainer.deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=config
    )
    base = engine.optimizer.optimizer
    step = base.step
    found: list[int] = []

    def noted(*args: Any, **kwargs: Any) -> None:
        step(*args, **kwargs)
        found[:] = [live(dtype) for dtype in types]

    base.step = noted
    window = torch.randint(256, (2, CONTEXT + 1))
    for _ in range(2):
        trainer.micro_step(engine, window, 12)
        engine.step()
    return [(a - b) / parameters_of_ours() for a, b in zip(found, before, strict=True)]


@pytest.mark.full
@pytest.mark.parametrize(
    ("stage", "offload"), [(1, False), (2, False), (3, False), (2, True), (3, True)]
)
def test_gradients_are_there_in_fp32_at_the_update(stage: int, offload: bool) -> None:
    """12 bytes of state and 4 of gradients for each number of the part, offloaded or not."""
    model = script.Transformer(parameters_of_ours(), LAYERS, WIDTH, WIDTH, 176, 256)
    both = offload and stage == 3
    plan = script.Plan(2, stage, offload_optimizer=offload, offload_weights=both)
    parts = script.need(model, plan)
    in_all = script.at_update(model, plan, parts) + parts["host"]
    for in_fp32, in_bf16 in warm.fork_ranks(at_update_in_rank, 2, stage, offload):
        assert in_fp32 == pytest.approx(16 / 2, rel=0.05)
        if stage == 3 or offload:  # else those in bf16 are gone when AdamW begins
            assert (in_fp32 + in_bf16) * model.parameters == pytest.approx(in_all, rel=0.05)
        else:
            assert in_fp32 + in_bf16 < in_all / model.parameters


def test_the_table_by_ranks_predicts_what_is_calculated() -> None:
    """At the update; but ZeRO 1 and 2 have given their 16-bit gradients back when AdamW runs."""
    model = script.Transformer(10**6, 1, 1, 1, 1, 1)
    for n, stage in itertools.product((1, 2, 3, 4), range(4)):
        plan = script.Plan(n, stage, bf16=stage > 0)
        parts = script.need(model, plan)
        held = script.at_update(model, plan, parts)
        held -= parts["gradients"] if stage in (1, 2) else 0
        way = f"ZeRO {stage}" if stage else "DDP"
        assert by_ranks.predict(way, n) * model.parameters == pytest.approx(held)
    assert by_ranks.predict("FSDP2", 4) == 4


def test_chapter_4s_llama_has_as_many_parameters() -> None:
    rehearsal = warm.load("chapter4_rehearsal", next(warm.ROOT.glob("chapter4*/code/rehearse*.py")))
    for name, model in script.MODELS.items():
        real = rehearsal.on_meta(rehearsal.MODELS[name])
        assert sum(p.numel() for p in real.parameters()) == model.parameters
        assert max(p.numel() for p in real.parameters()) == model.largest


def test_answers_take_no_more_than_is_needed() -> None:
    """The last plan fits or nothing is left; none before it fits; each has one remedy more."""
    choices = itertools.product(
        script.MODELS.values(), (1, 2, 8, 512), (24e9, 72e9, 160e9), (True, False), (512, 32_768)
    )
    for model, devices, capacity, bf16, tokens in choices:
        plans = script.what_first(model, script.Plan(devices, bf16=bf16, tokens=tokens), capacity)
        fits = [script.peak(model, plan) <= capacity for plan in plans]
        assert not any(fits[:-1])
        assert fits[-1] or not script.remedies(plans[-1])
        assert len({plan.name for plan in plans}) == len(plans)
        assert devices > 1 or all(plan.stage == 0 or plan.offload_optimizer for plan in plans)


MUTANTS = [  # a piece of the source, what it becomes; all fail a `check:` of the script
    ("(part if plan.stage == 3 else total)", "(part if plan.stage >= 2 else total)"),
    ("plan.stage == 0 or (plan.stage == 1 and plan.accumulate > 1)", "plan.stage <= 2"),
    ("state = (12 if plan.bf16 or", "state = (8 if plan.bf16 or"),
    ("(part if plan.stage else total)", "(part if plan.stage > 1 else total)"),
    ("copy = 4 * updated", "copy = 2 * updated"),
    ("+ 4 * model.hidden", "+ 3 * model.hidden"),
    ("3 * width * hidden + 2 * width", "2 * width * hidden + 2 * width"),
]


@pytest.mark.full
def test_mutants_are_caught(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [SCRIPT.name])
    source = SCRIPT.read_text()
    for right, wrong in MUTANTS:
        assert source.count(right) == 1, right
        module = types.ModuleType("mutant")
        monkeypatch.setitem(sys.modules, "mutant", module)  # dataclasses look there
        exec(compile(source.replace(right, wrong), SCRIPT, "exec"), module.__dict__)  # noqa: S102
        with pytest.raises(SystemExit) as end:
            module.__dict__["main"]()
        assert end.value.code == 1, right
    assert capsys.readouterr().out.count("FAILED on rank 0") >= len(MUTANTS)


def test_bad_input_is_one_line(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for flags, says in (
        ("--devices 0", "--devices 0: type a number above 0"),
        ("--micro-batch -1", "--micro-batch -1: type a number above 0"),
        ("--headroom 1", "--headroom 1.0: type a share"),
        ("--parameters 7e9", "type --layers and --width"),
        ("--parameters 1e6 --layers 32 --width 4096", "before any feed-forward"),
    ):
        monkeypatch.setattr(sys, "argv", [SCRIPT.name, *flags.split()])
        with pytest.raises(SystemExit) as end:
            script.main()
        assert end.value.code == 2, flags
        said = capsys.readouterr().err
        assert says in said
        assert said.count("\n") == 1, said
