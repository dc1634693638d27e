"""The planner of chapter 2: facts worked out by hand, bad input, and the planner broken on purpose."""

import itertools
import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import book
import checks
import pytest
import warm

CODE = Path("chapter2-gpu-hardware-networking-and-parallelism-strategies/code")
FILES = ("planner_cost", "planner_published", "parallelism_planner")  # each imports those before
Run = Callable[..., warm.Result]
CALIBRATION: dict[str, Any] = {
    "schema": 1,
    "device": "cpu",
    "world_size": 2,
    "matmul_flops_per_s": {"float32": 5e10},
    "memory_bytes_per_s": 1e10,
    "collectives": {"all_reduce": {"alpha_s": 2e-4, "beta_bytes_per_s": 1e9}},
}


@pytest.fixture(scope="module")
def planner() -> SimpleNamespace:
    """All names of the three files."""
    modules = [warm.load(name, warm.ROOT / CODE / f"{name}.py") for name in FILES]
    return SimpleNamespace(**{key: value for m in modules for key, value in vars(m).items()})


def mutate(folder: Path, right: str, wrong: str) -> None:
    """A copy of the planner, broken in the one place that reads `right`."""
    sources = {name: (warm.ROOT / CODE / f"{name}.py").read_text() for name in FILES}
    assert sum(source.count(right) for source in sources.values()) == 1
    for name, source in sources.items():
        (folder / f"{name}.py").write_text(source.replace(right, wrong))


def small_job(p: SimpleNamespace, **changes: Any) -> Any:
    """A GPT of 12 x 2 x 64^2 weights and two tables of 100 x 64, on four GPUs of a fast cluster."""
    cluster = p.Cluster(1e12, 1e12, 1e12, 1e12, 1e9, 1e10, 1e9, node=4, alpha=(0.0, 0.0))
    fields = {"gpus": 4, "batch": 16, "context": 128} | changes
    return p.Job(p.gpt(4, 64, 2, vocab=100), fields.pop("cluster", cluster), **fields)


def close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-9)


def problems(p: SimpleNamespace) -> list[str]:
    """What in the planner disagrees with arithmetic done by hand."""
    found = []

    def expect(what: str, holds: bool) -> None:
        if not holds:
            found.append(what)

    job = small_job(p, gpus=1)
    weights = 12 * 2 * 64**2 + 2 * 100 * 64
    one = p.memory_per_device(job, p.Layout(), 0)
    states = sum(one[kind] for kind in ("weights", "grads", "Adam"))
    expect("one GPU holds 16 bytes per parameter", close(states, 16 * weights))
    # 32 h per token and layer (Korthikanti et al.), and logits of 2 + 4 bytes
    expect("activations", close(one["kept"], 128 * (2 * 32 * 64 + 6 * 100)))
    for zero, size in enumerate((16, 4 + 12 / 4, 2 + 14 / 4)):
        held = p.memory_per_device(small_job(p), p.Layout(data=4, zero=zero), 0)
        states = sum(held[kind] for kind in ("weights", "grads", "Adam"))
        expect(f"ZeRO {zero} on four", close(states, size * weights))
    whole = p.memory_per_device(small_job(p), p.Layout(data=4, zero=3), 0)
    expect("ZeRO 3", close(whole["weights"], 2 * weights / 4 + 3 * 2 * 12 * 64**2))
    for first, second in ((0, 1), (0, 2)):
        lay = replace(p.Layout(pipeline=4), chunks=1)
        job8 = replace(small_job(p, batch=8), model=p.gpt(4, 64, 8, vocab=100))
        held = [p.memory_per_device(job8, lay, stage)["kept"] for stage in (first, second)]
        expect("1F1B: stage i of p holds p - i", close(held[0] * (4 - second), held[1] * 4))

    c = job.cluster
    expect("all-gather is (n-1)/n", close(p.collective_seconds(c, 4, 1, 4e9), 0.3))
    expect("nobody to talk to", p.collective_seconds(c, 1, 1, 4e9) == 0)
    expect("across nodes, cards are shared", close(p.collective_seconds(c, 4, 2, 4e9), 3 / 2))
    expect("three of a node of four straddle", close(p.collective_seconds(c, 3, 1, 3e9), 2 / 4))
    expect("a hop inside", close(p.hop_seconds(c, 4, 1, 1e9), 0.1))
    expect("a hop that leaves the node has one card", close(p.hop_seconds(c, 8, 1, 1e9), 1.0))
    # 4 s^2 heads head_dim / 2 FLOPs of each half-masked block, for 2 x 2 s heads head_dim bytes
    threshold = 2 * 1e12 / 1e10
    for tokens, hides in ((threshold + 1, True), (threshold - 1, False)):
        long = replace(small_job(p), context=4 * tokens)
        waits = p.layer_seconds(long, p.Layout(context=4), tokens, moe=False)["context"]
        expect("context parallelism hides from 2 F / B tokens on", (waits == 0) == hides)
    for stages, chunks, micro_batches in ((1, 1, 4), (4, 1, 8), (4, 2, 8)):
        lay = p.Layout(pipeline=stages, chunks=chunks)
        many = replace(small_job(p, gpus=stages, batch=micro_batches), model=p.gpt(4, 64, 8, 100))
        time = p.step_seconds(many, lay)
        busy = sum(time[kind] for kind in ("compute", "tensor", "context", "expert"))
        expect("bubble", close(time["bubble"], busy * (stages - 1) / chunks / micro_batches))
    gradients = p.data_parallel_seconds(small_job(p, of_2021=True), p.Layout(data=4), 0.0)
    expect("all-reduce is 2(n-1)/n", close(gradients, 2 * 3 / 4 * 2 * weights / 1e10))
    alone = p.step_seconds(job, p.Layout())
    waits = ("tensor", "context", "expert", "bubble", "sends", "data")
    expect("one GPU waits for nobody", not any(alone[kind] for kind in waits))
    # four collectives of tokens x width, forward and backward, in each of two layers
    tensor = p.step_seconds(small_job(p, batch=1), p.Layout(tensor=4))["tensor"]
    expect("tensor parallelism", close(tensor, 2 * 8 * 3 / 4 * 128 * 64 * 2 / 1e10))

    eq3 = 96 * 80 * 12288**2 * (1 + 2048 / 6 / 12288 + 51200 / 16 / 80 / 12288)
    flops = p.flops_per_token(p.gpt(96, 12288, 80), 2048, recomputed=True)
    expect("equation 3 of Narayanan et al.", close(flops, eq3))
    return found


def test_by_hand(planner: SimpleNamespace) -> None:
    assert problems(planner) == []


@pytest.mark.full
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("((p - 1) / (lay.chunks * micro_batches))", "0.0"),
        ("((p - 1) / (lay.chunks * micro_batches))", "((p - 1) / micro_batches)"),
        ("parts = lay.data * lay.context if lay.zero >= zero else 1", "parts = 1"),
        ("(alpha + (size - 1) / size * count", "(alpha + count"),
        ("return 2 * once\n", "return once\n"),
        ("p - stage + (lay.chunks", "p + (lay.chunks"),
        ('"tensor": passes * 4 *', '"tensor": passes * 2 *'),
        ("hop - core[0] / lay.context", "hop - core[0]"),
        ("return c.node % (stride * size) == 0", "return stride * size <= c.node"),
        ("return c.alpha[1] + count / c.across", "return c.alpha[1] + count / c.inside"),
    ],
)
def test_mutants_are_caught(
    planner: SimpleNamespace, tmp_path: Path, right: str, wrong: str
) -> None:
    mutate(tmp_path, right, wrong)
    mutant = warm.load(f"planner {wrong}", tmp_path / "planner_cost.py")
    assert problems(SimpleNamespace(**(vars(planner) | vars(mutant))))


@pytest.mark.full
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        # a check of the script itself sees these
        ("parts = lay.data * lay.context if lay.zero >= zero else 1", "parts = 1"),
        ("if sum(memory.values()) > job.cluster.memory:", "if False:"),
    ],
)
def test_checks_of_the_script_fail(run: Run, tmp_path: Path, right: str, wrong: str) -> None:
    mutate(tmp_path, right, wrong)
    script = tmp_path / "parallelism_planner.py"
    result = run(f"python {script} --model llama3-8b --gpus 8 --batch 64")
    assert result.returncode == 1, result.stderr
    assert "FAILED" in result.stdout


def test_a_case_enumerated_by_hand(planner: SimpleNamespace) -> None:
    """Two GPUs, one sequence: TP 2, PP 2, or CP 2 by any ZeRO stage, each recomputing in 3 ways."""
    job = small_job(planner, gpus=2, batch=1)
    plans, thrown_out = planner.search(job, {"micro_batch": 1})
    kept = {(x.layout.tensor, x.layout.pipeline, x.layout.chunks) for x in plans}
    assert kept == {(2, 1, 1), (1, 2, 1), (1, 1, 1)}
    assert len(plans) == (2 + 4) * 3
    assert thrown_out == {
        "batch does not divide by DP x micro-batch": 4 * 3,  # DP 2, ZeRO 0 to 3
        "fewer micro-batches than stages": 3,  # v 2
        "fewer layers than pipeline chunks": 2 * 3,  # v 4 and 8
    }
    assert plans[0].seconds == min(plan.seconds for plan in plans)
    _, thrown_out = planner.search(replace(job, context=130), {"context": 2})
    assert thrown_out == {"sequence does not divide by 2 x CP": 4 * 4 * 3}


def test_groups_that_straddle_nodes(planner: SimpleNamespace) -> None:
    """Of 6 GPUs in nodes of 4: no TP 3 or 6; TP 2 x CP 3 would have parts on both nodes."""
    job = small_job(planner, gpus=6, batch=6, context=120)
    job = replace(job, model=replace(job.model, heads=6, kv_heads=6))
    plans, thrown_out = planner.search(job, {})
    assert {plan.layout.tensor for plan in plans} == {1, 2}
    assert all((plan.layout.tensor, plan.layout.context) != (2, 3) for plan in plans)
    assert thrown_out["TP does not divide a node"] > 0
    assert thrown_out["TP x CP (x EP) straddles nodes"] > 0


@pytest.mark.full
@pytest.mark.parametrize(("gpus", "experts"), [(8, 0), (6, 0), (8, 4)])
def test_properties(planner: SimpleNamespace, gpus: int, experts: int) -> None:
    job = small_job(planner, gpus=gpus, batch=24)
    moe = {"experts": experts, "active": min(2, experts), "expert_ffn": 96, "kv_heads": 2}
    job = replace(job, model=replace(job.model, layers=5, **moe))
    plans, _ = planner.search(job, {})
    assert plans
    for plan, slower in itertools.pairwise(plans):
        assert plan.seconds <= slower.seconds * (1 + 1e-8)
    for plan in plans:
        lay = plan.layout
        assert lay.tensor * lay.context * lay.pipeline * lay.data == gpus
        assert lay.data % lay.expert == 0
        assert 0 < plan.mfu < 1
        assert min(plan.time.values()) >= 0
    tight = replace(job, cluster=replace(job.cluster, memory=sum(plans[0].memory.values())))
    fitting, thrown_out = planner.search(tight, {})
    assert {plan.layout for plan in fitting} <= {plan.layout for plan in plans}
    assert thrown_out["memory"] == len(plans) - len(fitting)
    faster = replace(job.cluster, inside=job.cluster.inside * 10, across=job.cluster.across * 10)
    quick = {
        plan.layout: plan.seconds for plan in planner.search(replace(job, cluster=faster), {})[0]
    }
    assert all(quick[plan.layout] <= plan.seconds for plan in plans)
    assert any(quick[plan.layout] < plan.seconds for plan in plans)


@pytest.mark.parametrize("layers", [5, 7, 61, 70, 126])
@pytest.mark.parametrize("stages", [1, 2, 5])
def test_stages_share_the_layers(planner: SimpleNamespace, layers: int, stages: int) -> None:
    held = planner.stage_layers(layers, stages)
    assert [layer for stage in held for layer in stage] == list(range(layers))
    assert max(map(len, held)) - min(map(len, held)) <= 1
    assert [len(x) for x in planner.stage_layers(126, 16)] == [7] + [8] * 14 + [7]


@pytest.mark.full
@pytest.mark.parametrize(
    "flags",
    [
        "--model deepseek-v3 --cluster h800 --gpus 256 --batch 1024 --context 4096 --top 2",
        "--layers 3 --width 96 --heads 6 --kv-heads 3 --ffn 37 --vocab 257 --gpus 6 --batch 12",
        "--model llama3-8b --experts 8 --gpus 24 --batch 96 --cluster a100",
        "--gpus 63 --batch 504",
    ],
)
def test_plans(run: Run, flags: str) -> None:
    command = f"python {CODE}/parallelism_planner.py {flags}"
    result, parsed = run(command), book.parse_command(command)
    found = checks.evidence(parsed, result)
    assert not found, checks.report(parsed, result, found)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_calibrated_machine(planner: SimpleNamespace, tmp_path: Path, device: str) -> None:
    """On a CPU the host's memory is shared; a GPU has its own, and products in bfloat16."""
    path = tmp_path / "calibration.json"
    gpu = {"device": "cuda", "memory_bytes": 8e10, "bf16_flops": 8e14}
    path.write_text(json.dumps(CALIBRATION | (gpu if device == "cuda" else {})))
    cluster = planner.calibrated(path)
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert cluster.memory == pytest.approx(7.2e10 if device == "cuda" else 0.45 * host)
    assert cluster.matmul == (8e14 if device == "cuda" else 5e10)
    assert cluster.item == (2 if device == "cuda" else 4)
    assert (cluster.node, cluster.alpha) == (2, (1e-4, 1e-4))


@pytest.mark.full
def test_plans_for_a_calibrated_machine(run: Run, tmp_path: Path) -> None:
    path, plans = tmp_path / "calibration.json", tmp_path / "plans.json"
    path.write_text(json.dumps(CALIBRATION))
    result = run(f"python {CODE}/parallelism_planner.py --calibration {path} --json {plans}")
    assert result.returncode == 0, result.stderr
    assert "on 2 devices" in result.stdout
    best = json.loads(plans.read_text())[0]
    assert best["time"]["compute"] > 0
    assert math.isclose(sum(best["time"].values()), best["seconds"])


@pytest.mark.full
@pytest.mark.parametrize("torn", ["", "{}", json.dumps(CALIBRATION | {"device": "cuda"}), None])
def test_bad_calibration(planner: SimpleNamespace, tmp_path: Path, torn: str | None) -> None:
    path = tmp_path / "calibration.json"
    if torn is not None:
        path.write_text(torn)
    with pytest.raises(SystemExit) as ended:
        planner.calibrated(path)
    assert ended.value.code == 2


@pytest.mark.full
@pytest.mark.parametrize("flags", ["--heads 7", "--kv-heads 5", "--active 2"])
def test_models_that_cannot_be(
    planner: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, flags: str
) -> None:
    monkeypatch.setattr("sys.argv", ["parallelism_planner.py", *flags.split()])
    with pytest.raises(SystemExit) as ended:
        planner.make_job(planner.parse_args())
    assert ended.value.code == 2


@pytest.mark.full
def test_nothing_fits(run: Run) -> None:
    """It still says why before it gives up, and asks for what would help."""
    result = run(f"python {CODE}/parallelism_planner.py --model llama3-405b --gpus 2")
    assert result.returncode == 2
    assert "memory" in result.stdout
    assert result.stderr == "no layout fits: type more --gpus, or a smaller --batch or --context\n"
