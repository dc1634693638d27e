"""The trainer around its steps: data, signals, faults, what it refuses and what it says of itself."""

import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import warm
from book import CHAPTERS
from torch import nn

CODE = f"{CHAPTERS[7]}/code"
TINY = (
    "--width 48 --layers 2 --heads 4 --kv-heads 2 --hidden 72 --context 32 --batch 6 --held-out 2"
)
TRAIN = f"{CODE}/train.py {TINY}"
Run = Callable[..., warm.Result]

# A trainer that something happens to, in its n-th step on one rank.
EVENT = """
import os, signal, sys
import torch
import torch.nn.functional as F
import train

plain_update = train.update
plain_loss = F.cross_entropy
calls = []

def update(*args):
    calls.append(0)
    if len(calls) == {step} and int(os.environ["RANK"]) == {rank}:
        {event}
    return plain_update(*args)

def poisoned(logits, *args, **options):
    F.cross_entropy = plain_loss
    return plain_loss(logits, *args, **options) * {factor}

class Poison(torch.autograd.Function):
    forward = staticmethod(lambda context, x: x.clone())
    backward = staticmethod(lambda context, gradient: gradient * float("nan"))

def poisoned_gradient(logits, *args, **options):
    F.cross_entropy = plain_loss
    return plain_loss(Poison.apply(logits), *args, **options)

if __name__ == "__main__":
    train.update = update
    train.main()
"""


def module(name: str) -> ModuleType:
    """One of the trainer's files, which import each other."""
    sys.path.insert(0, str(warm.ROOT / CODE))
    try:
        return warm.load(name, warm.ROOT / f"{CODE}/{name}.py")
    finally:
        sys.path.pop(0)


@pytest.fixture
def train_with(run: Run, checkout: Path) -> Callable[..., warm.Result]:
    def start(event: str, flags: str, rank: int = 1, factor: str = "1") -> warm.Result:
        script = checkout / CODE / "train_with_event.py"
        script.write_text(EVENT.format(step=3, rank=rank, event=event, factor=factor))
        try:
            return run(f"torchrun --nproc_per_node=2 {CODE}/train_with_event.py {TINY} {flags}")
        finally:
            script.unlink()

    return start


def events(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def losses(path: Path) -> list[float]:
    return json.loads(path.read_text())["losses"]


def test_one_rank_is_told_to_stop(train_with: Callable, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = f"--steps 8 --log-every 2 --save-every 6 --out {out}"
    stopped = train_with("os.kill(os.getpid(), signal.SIGTERM)", flags)
    assert stopped.returncode != 0  # with 0 a scheduler would take the job for finished
    assert "stopped by SIGTERM at step 4" in stopped.stdout, stopped.stdout + stopped.stderr
    assert "Traceback" not in stopped.stderr
    log = events(out)
    assert [event["event"] for event in log][-2:] == ["save", "stopped"]
    assert log[0]["event"] == "start"
    assert len(set(log[0]["pids"])) == 2
    assert log[-1]["reason"] == "SIGTERM"
    with (out / "log.jsonl").open("a") as file:
        file.write('{"event": "st')  # of a run that was killed
    resumed = run(
        f"torchrun --nproc_per_node=2 {TRAIN} {flags} --resume --json {tmp_path}/resumed.json"
    )
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "resuming      at step 4" in resumed.stdout
    undisturbed = f"{TRAIN} --steps 8 --json {tmp_path}/undisturbed.json"
    assert run(f"torchrun --nproc_per_node=2 {undisturbed}").returncode == 0
    assert losses(tmp_path / "resumed.json") == losses(tmp_path / "undisturbed.json")
    assert json.loads((out / "log.jsonl").read_text().splitlines()[-1])["event"] == "end"


@pytest.mark.full
def test_another_signal_and_loader_processes(train_with: Callable, tmp_path: Path) -> None:
    event = "os.kill(os.getpid(), signal.SIGUSR1)"
    stopped = train_with(event, f"--workers 1 --steps 8 --out {tmp_path}", rank=0)
    assert "stopped by SIGUSR1 at step 4" in stopped.stdout
    assert (tmp_path / "step-000004" / ".metadata").is_file()


@pytest.mark.full
@pytest.mark.parametrize(
    ("event", "factor", "said"),
    [
        ("F.cross_entropy = poisoned", "float('nan')", "step 3: the loss of rank 1 is not finite"),
        ("F.cross_entropy = poisoned", "float('inf')", "step 3: the loss of rank 1 is not finite"),
        ("F.cross_entropy = poisoned_gradient", "1", "step 3: the gradient's norm is nan"),
    ],
)
def test_not_a_number(
    train_with: Callable, run: Run, tmp_path: Path, event: str, factor: str, said: str
) -> None:
    flags = f"--steps 6 --log-every 4 --save-every 2 --out {tmp_path}"
    broken = train_with(event, flags, factor=factor)
    assert broken.returncode == 1
    assert said in broken.stderr, broken.stderr
    assert "Traceback" not in broken.stderr
    assert said in events(tmp_path)[-1]["reason"]
    assert [p.name for p in tmp_path.glob("step-*")] == ["step-000002"]
    resumed = run(f"torchrun --nproc_per_node=2 {TRAIN} {flags} --resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming      at step 2" in resumed.stdout


@pytest.mark.full
def test_a_rank_is_killed(train_with: Callable, tmp_path: Path) -> None:
    killed = train_with(
        "os.kill(os.getpid(), signal.SIGKILL)", f"--steps 6 --save-every 2 --out {tmp_path}"
    )
    assert killed.returncode != 0
    assert "rank 0: lost another at step" in killed.stderr
    assert "by peer" in events(tmp_path)[-1]["reason"]


# --- data ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hundred windows of four tokens in three shards of uneven length."""
    from safetensors.torch import save_file

    data = module("data")
    path = tmp_path_factory.mktemp("tokens")
    shards = []
    for number, part in enumerate(torch.arange(401).to(torch.uint16).split([150, 2, 249])):
        name = f"train-{number:05}.safetensors"
        save_file({"tokens": part.clone()}, path / name)
        shards.append({"file": name, "tokens": len(part), "digest": data.digest(part)})
    (path / "meta.json").write_text(json.dumps({"train": {"shards": shards}}))
    return path


def windows_of(folder: Path, context: int = 4) -> Any:
    data = module("data")
    return data.Tokens(folder, data.shards_of(data.read_meta(folder), "train"), context)


def test_windows_run_over_shards(folder: Path) -> None:
    windows = windows_of(folder)
    assert len(windows) == 100
    every = windows[list(range(100))]
    assert every.tolist() == [list(range(4 * w, 4 * w + 5)) for w in range(100)]


def test_global_batches_do_not_depend_on_ranks_and_workers(folder: Path) -> None:
    data = module("data")
    windows = windows_of(folder)

    def batches(size: int, workers: int, start: dict | None = None) -> list[list[int]]:
        """The first tokens of each global batch of 7, over more than two epochs of 14."""
        parts = []
        for rank in range(size):
            loader = data.Loader(windows, 7, rank, size, seed=20260101, workers=workers)
            if start:
                loader.load_state_dict(start)
            parts.append([part[:, 0].tolist() for part in itertools.islice(loader, 30)])
        return [sorted(itertools.chain(*of_step)) for of_step in zip(*parts, strict=True)]

    expected = batches(1, 0)
    assert len({tuple(batch) for batch in expected}) == 30
    for first in (0, 14):  # in an epoch nothing comes twice
        assert len(set(itertools.chain(*expected[first : first + 14]))) == 14 * 7
    assert batches(3, 0) == expected
    assert batches(2, 2) == expected
    loader = data.Loader(windows, 7, 0, 1, seed=20260101, workers=1)
    for _ in itertools.islice(loader, 19):
        pass
    assert loader.state_dict() == {"epoch": 1, "batch": 5}
    assert batches(4, 0, loader.state_dict())[:11] == expected[19:]


def test_loader_processes_outlive_signals(folder: Path) -> None:
    """A scheduler signals every process; these have to serve until their rank has saved."""
    loader = module("data").Loader(windows_of(folder), 7, 0, 1, seed=0, workers=2)
    batches = iter(loader)
    first = [next(batches) for _ in range(4)]  # by now both have begun
    children = multiprocessing.active_children()
    for child, number in itertools.product(children, (signal.SIGTERM, signal.SIGUSR1)):
        assert child.pid
        os.kill(child.pid, number)
    rest = [next(batches) for _ in range(20)]
    batches.close()
    assert len(children) == 2
    assert len(first + rest) == 24


def damaged(folder: Path, tmp_path: Path, damage: Callable[[Path], object]) -> Path:
    copy = tmp_path / "tokens"
    shutil.copytree(folder, copy)
    damage(copy / "train-00002.safetensors")
    return copy


@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_a_damaged_shard_is_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    data = module("data")

    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(content)

    how = {
        "flip": flip,
        "cut": lambda path: path.write_bytes(path.read_bytes()[:-9]),
        "delete": Path.unlink,
    }
    copy = damaged(folder, tmp_path, how[damage])
    with pytest.raises(SystemExit) as stopped:
        data.refuse_damage(copy, data.shards_of(data.read_meta(copy), "train"))
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"{copy}/train-00002.safetensors is damaged")
    assert said.count("\n") == 1


# --- optimizer and figures -----------------------------------------------------------------------


def test_schedules() -> None:
    share = module("optimizer").share_of_peak
    assert [share("wsd", step, 4, 100) for step in range(4)] == [0.25, 0.5, 0.75, 1]
    assert all(share("wsd", step, 4, 100) == 1 for step in range(4, 81))
    assert share("wsd", 90, 4, 100) == pytest.approx(0.5)
    assert share("wsd", 99, 4, 100) == pytest.approx(0.05)
    assert [share("wsd", s, 4, 100) for s in range(80)] == [share("wsd", s, 4, 999) for s in range(80)]  # fmt: skip
    assert share("cosine", 99, 4, 100) == pytest.approx(0.1, abs=1e-3)


def test_muon_is_torchs_but_in_float32() -> None:
    torch.manual_seed(0)
    mine = nn.Parameter(torch.randn(24, 40))
    theirs = nn.Parameter(mine.detach().clone())
    optimizers = [
        module("optimizer").Muon([mine], lr=0.02, weight_decay=0.1),
        torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    ]
    before = mine.detach().clone()
    for _ in range(3):
        gradient = torch.randn(24, 40)
        for p, optimizer in zip((mine, theirs), optimizers, strict=True):
            p.grad = gradient.clone()
            optimizer.step()
    moved = (mine - before).norm()
    assert (mine - theirs).norm() < 0.02 * moved  # bfloat16's error
    values = torch.linalg.svdvals(module("optimizer").orthogonal(gradient))
    assert 0.6 < values.min() <= values.max() < 1.3


@pytest.mark.full
def test_flops_of_a_token_are_those_that_run() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = module("model")
    config = model.Config(vocabulary=64, width=32, layers=2, heads=4, kv_heads=2, hidden=48, context=16)  # fmt: skip
    llama = model.Llama(config)
    counted = torch.nn.attention.SDPBackend.MATH  # as products
    with torch.nn.attention.sdpa_kernel(counted), FlopCounterMode(display=False) as counter:
        llama(torch.zeros(3, 16, dtype=torch.long)).sum().backward()
    assert counter.get_total_flops() == model.flops_of_a_token(config) * 3 * 16


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--dp-shard 4", "does not make 2 ranks"),
        ("--dp-replicate 3", "does not make 2 ranks"),
        ("--tp 2 --kv-heads 1", "--kv-heads 1 does not divide by --tp 2"),
        ("--tp 2 --context 33", "--context 33 does not divide by --tp 2"),
        ("--tp 2 --hidden 73", "--hidden 73 does not divide by --tp 2"),
        ("--batch 1", "type --batch 2 or more"),
        ("--batch 5 --accumulate 3", "type --batch 6 or more"),
        ("--batch 50000", "windows: type a smaller one"),
        ("--heads 5", "--width must divide"),
        ("--save-every 0", "--save-every 0: type 1 or more"),
        ("--data LICENSE", "LICENSE is there, and prepare_data.py did not make it"),
        ("--data tests", "cannot read tests/meta.json, there is none: type --data"),
        ("--tp 2 --compile", "leave one out"),
        ("--resume", "type --out DIR"),
        ("--data runs/none --corpus none.txt", "nor --corpus none.txt is there"),
        ("--context 100000", "type a smaller"),
        ("--data runs/old", "runs/old was made by an older prepare_data.py"),
        ("--data runs/damaged", "train-00000.safetensors is damaged"),
        ("--out README.md/below", "cannot write in README.md/below"),
    ],
)
def test_bad_input(run: Run, checkout: Path, flags: str, said: str) -> None:
    (checkout / "runs/old").mkdir(parents=True, exist_ok=True)
    (checkout / "runs/old/meta.json").write_text('{"train": {"tokens": 9}}')
    if "damaged" in flags:
        if not (checkout / "runs/ch08_data").exists():
            run(f"torchrun --nproc_per_node=1 {TRAIN} --steps 1")
        shutil.copytree(checkout / "runs/ch08_data", checkout / "runs/damaged")
        (checkout / "runs/damaged/train-00000.safetensors").write_bytes(b"no")
    result = run(f"torchrun --nproc_per_node=2 {TRAIN} {flags}")
    assert result.returncode != 0
    assert said in result.stderr, result.stderr
    assert "Traceback" not in result.stderr
    assert "gradient norm" not in result.stdout


@pytest.mark.full
def test_checkpoints_that_are_refused(run: Run, checkout: Path, tmp_path: Path) -> None:
    """Of another run; torn; and none of them is touched."""
    out = tmp_path / "out"
    save = f"torchrun --nproc_per_node=2 {TRAIN} --steps 6 --save-every 2 --keep 2 --out {out}"
    assert run(save).returncode == 0
    assert {p.name for p in out.glob("step-*")} == {"step-000004", "step-000006"}
    assert "type --resume to go on, or another --out" in run(save).stderr
    for flags, said in (
        ("--lr 1e-3", "step-000006 has lr 0.003, this run 0.001"),
        ("--hidden 80", "step-000006 has hidden 72, this run 80"),
        ("--batch 8", "step-000006 has batch 6, this run 8"),
        ("--seed 1", "step-000006 has seed 0, this run 1"),
        ("--data runs/other --corpus resources/corpus.txt", "step-000006 has data"),
    ):
        refused = run(f"{save} --resume {flags}")
        assert said in refused.stderr, refused.stderr
        assert "Traceback" not in refused.stderr
    tokenizer = checkout / "runs/other/tokenizer.json"
    shutil.rmtree(tokenizer.parent)
    shutil.copytree(checkout / "runs/ch08_data", tokenizer.parent)
    tokenizer.write_text(tokenizer.read_text().replace("<|user|>", "<|reader|>"))
    assert "step-000006 has tokenizer" in run(f"{save} --resume --data runs/other").stderr
    part = out / "step-000006" / "__1_0.distcp"
    content = part.read_bytes()
    for torn in (content[:-100], None):
        part.unlink()
        if torn:
            part.write_bytes(torn)
        refused = run(f"{save} --resume")
        assert re.search(r"step-000006 is torn .*move it away, and step-000004", refused.stderr)
    (out / "step-000006").rename(tmp_path / "away")
    resumed = run(f"{save} --resume")
    assert resumed.returncode == 0
    assert "resuming      at step 4" in resumed.stdout
    wsd = f"torchrun --nproc_per_node=1 {TRAIN} --schedule wsd --steps 2 --out {tmp_path}/wsd"
    assert run(wsd).returncode == 0
    shorter = run(f"{wsd} --resume --steps 1")
    assert "step-000002 is beyond --steps 1: type 2 or more" in shorter.stderr


def test_a_full_disk_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = module("checkpoints")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 11_000_000))  # fmt: skip
    checkpoints.make_folder(tmp_path, 900_000)
    with pytest.raises(SystemExit) as stopped:
        checkpoints.make_folder(tmp_path, 1_000_000)
    assert stopped.value.code == 2
    assert "has 11 MB free, a checkpoint takes 12" in capsys.readouterr().err


@pytest.mark.full
def test_a_save_that_fails_costs_a_checkpoint_not_the_run(
    train_with: Callable, tmp_path: Path
) -> None:
    """From step 3 on no file may grow beyond 20 KB, as if the disk were full."""
    event = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))"
    result = train_with(event, f"--steps 6 --save-every 2 --sync-save --out {tmp_path}")
    assert result.returncode == 1
    assert "not saved (" in result.stdout
    assert "the newest is step-000002" in result.stdout
    assert "check: steps that the newest checkpoint lacks = 4 <= 0  FAILED" in result.stdout
    assert [p.name for p in tmp_path.glob("step-*")] == ["step-000002"]
    assert [e["event"] for e in events(tmp_path)].count("save failed") == 2


@pytest.mark.full
def test_tensorboard_has_what_the_log_has(run: Run, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = (
        f"--steps 4 --warmup 1 --log-every 2 --out {tmp_path}/out --tensorboard {tmp_path}/board"
    )
    result = run(f"torchrun --nproc_per_node=2 {TRAIN} {flags}")
    assert result.returncode == 0, result.stderr
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    logged = [event for event in events(tmp_path / "out") if event["event"] == "step"]
    for name in ("loss", "norm", "mfu", "slowest_rank"):
        drawn = [(point.step, point.value) for point in board.Scalars(name)]
        assert drawn == [(e["step"], pytest.approx(e[name], rel=1e-6)) for e in logged], name
