"""The graders of chapter 8's exercises, and the proof that they turn wrong answers down.

pytest tests/chapter8/test_exercises.py            grades solutions.py
pytest tests/chapter8/test_exercises.py --mine     grades your exercises.py
"""

import json
import math
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import warm
from book import CHAPTERS

Share = Callable[[int, int, int, int, int, int], list[int]]
ROOT = warm.ROOT


def whole(share: Share, samples: int, batch: int, seed: int, step: int, n: int) -> list[int]:
    """The global batch, put together from the ranks' shares."""
    shares = [share(samples, batch, seed, step, rank, n) for rank in range(n)]
    return [shares[i % n][i // n] for i in range(sum(map(len, shares)))]


def epoch_of(share: Share, samples: int, batch: int, seed: int, epoch: int) -> list[int]:
    steps = samples // batch
    found = [whole(share, samples, batch, seed, epoch * steps + s, 1) for s in range(steps)]
    return [sample for step in found for sample in step]


def grade_share_of_step(share: Share) -> None:
    for samples, batch in ((40, 8), (43, 7), (5, 5)):
        for step in (0, 3, 11):
            alone = whole(share, samples, batch, 1, step, 1)
            assert len(alone) == batch, f"{len(alone)} samples in a batch of {batch}"
            for n in range(2, min(5, batch) + 1):
                together = whole(share, samples, batch, 1, step, n)
                assert together == alone, f"step {step} on {n} ranks: {together}, alone {alone}"
        first = epoch_of(share, samples, batch, 1, 0)
        assert len(set(first)) == samples // batch * batch, "an epoch visits a sample twice"
        assert set(first) <= set(range(samples)), "there is no such sample"
    orders = {
        (seed, epoch): tuple(epoch_of(share, 40, 8, seed, epoch))
        for seed in range(3)
        for epoch in range(3)
    }
    for one, order in orders.items():
        same = [other for other in orders if other != one and orders[other] == order]
        assert not same, f"the order of (seed, epoch) {one} is that of {same}"
    left_over = {
        s for epoch in range(9) for s in set(range(43)) - set(epoch_of(share, 43, 7, 0, epoch))
    }
    assert len(left_over) > 1, "the same sample is dropped in every epoch"
    assert share(40, 8, 0, 7, 0, 2) == share(40, 8, 0, 7, 0, 2), "another answer the second time"
    start = time.process_time()
    assert len(share(40, 8, 20260101, 10**9, 1, 2)) == 4
    assert time.process_time() - start < 1, "it counts up to the step"
    for wrong in ((4, 8, 0, 0, 0, 1), (40, 2, 0, 0, 0, 3)):
        with pytest.raises(ValueError, match=r"."):
            share(*wrong)


def test_share_of_step(exercises: Callable[[int], ModuleType]) -> None:
    grade_share_of_step(exercises(8).share_of_step)


# --- wrong answers -------------------------------------------------------------------------------


def order_of(samples: int, seed: int) -> list[int]:
    return random.Random(seed).sample(range(samples), samples)


def adds_seed_and_epoch(
    samples: int, batch: int, seed: int, step: int, rank: int, n: int
) -> list[int]:
    epoch, number = divmod(step, samples // batch)
    order = order_of(samples, seed + epoch)
    return order[number * batch : (number + 1) * batch][rank::n]


def never_shuffles_again(
    samples: int, batch: int, seed: int, step: int, rank: int, n: int
) -> list[int]:
    number = step % (samples // batch)
    return order_of(samples, seed)[number * batch : (number + 1) * batch][rank::n]


def deals_first_and_batches_then(
    samples: int, batch: int, seed: int, step: int, rank: int, n: int
) -> list[int]:
    epoch, number = divmod(step, samples // batch)
    own = order_of(samples, seed * 1_000_003 + epoch)[rank::n]
    return own[number * batch // n : (number + 1) * batch // n]


def counts_up(samples: int, batch: int, seed: int, step: int, rank: int, n: int) -> list[int]:
    if not n <= batch <= samples:
        raise ValueError("sizes")
    epoch = number = 0
    end = time.process_time() + 2
    for _ in range(step):
        number += 1
        if number == samples // batch:
            epoch, number = epoch + 1, 0
        if time.process_time() > end:
            break
    order = order_of(samples, seed * 1_000_003 + epoch)
    return order[number * batch : (number + 1) * batch][rank::n]


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (adds_seed_and_epoch, "is that of"),
        (never_shuffles_again, "is that of"),
        (deals_first_and_batches_then, "ranks: "),
        (counts_up, "counts up"),
    ],
)
def test_wrong_answers_are_turned_down(answer: Any, complaint: str) -> None:
    with pytest.raises(AssertionError, match=complaint):
        grade_share_of_step(answer)


def test_the_stub_is_turned_down() -> None:
    stubs = warm.load("chapter8_stubs", ROOT / CHAPTERS[7] / "exercises.py")
    with pytest.raises(NotImplementedError):
        grade_share_of_step(stubs.share_of_step)


# --- newest_whole --------------------------------------------------------------------------------

Newest = Callable[[Path], tuple[Path | None, list[str]]]
OPENED: list[str] = []
sys.addaudithook(lambda event, found: OPENED.append(str(found[0])) if event == "open" else None)


def save(folder: Path, step: int, bytes_of_a_shard: int = 100) -> Path:
    """A whole checkpoint, as the trainer writes it."""
    path = folder / f"step-{step:06}"
    path.mkdir()
    sizes = {".metadata": 30, "__0_0.distcp": bytes_of_a_shard, "__1_0.distcp": bytes_of_a_shard}
    for name, size in sizes.items():
        (path / name).touch()
        os.truncate(path / name, size)
    (path / "notes.json").write_text(json.dumps({"step": step, "files": sizes}))
    return path


def tear(path: Path, how: str) -> None:
    notes = path / "notes.json"
    if how == "a shard is missing":
        (path / "__1_0.distcp").unlink()
    elif how == "a shard is short":
        os.truncate(path / "__0_0.distcp", 99)
    elif how == "there are no notes":
        notes.unlink()
    elif how == "half of the notes":
        notes.write_text(notes.read_text()[:20])
    elif how == "notes of nothing":
        notes.write_text("null")
    elif how == "nobody noted .metadata":
        notes.write_text(json.dumps({"files": {"__0_0.distcp": 100}}))


def grade_newest_whole(newest: Newest, root: Path) -> None:
    def fresh() -> Path:
        return Path(tempfile.mkdtemp(dir=root))

    folder = fresh()
    assert newest(folder) == (None, []), "in an empty folder there is none"
    for step in (999_999, 12, 1_000_000, 40):  # the newest is neither the last written nor by name
        save(folder, step)
    assert newest(folder) == (folder / "step-1000000", []), "not the largest step"
    save(folder, 2_000_000).rename(folder / "step-2000000.draft")
    save(folder, 3_000_000).rename(folder / "step-3")
    (folder / "step-4000000").touch()
    assert newest(folder) == (folder / "step-1000000", []), "it takes a draft or a stray name"

    for how in (
        "a shard is missing", "a shard is short", "there are no notes", "half of the notes",
        "notes of nothing", "nobody noted .metadata",
    ):  # fmt: skip
        folder = fresh()
        for step in (4, 8, 12, 16):
            save(folder, step)
        tear(folder / "step-000012", how)
        tear(folder / "step-000016", "a shard is short")
        before = sorted(folder.rglob("*"))
        found = newest(folder)
        right = (folder / "step-000008", ["step-000016", "step-000012"])
        assert found == right, f"{how}: it returns {found}"
        assert sorted(folder.rglob("*")) == before, "it changes what is on the disk"

    folder = fresh()
    for step in (4, 8):
        save(folder, step, bytes_of_a_shard=2**30)  # of holes: they take no place on the disk
    OPENED.clear()
    newest(folder)
    opened = {Path(name) for name in OPENED if name.startswith(str(folder))}
    assert not [p for p in opened if p.suffix == ".distcp"], "it reads shards"
    assert not [p for p in opened if p.parent.name == "step-000004"], "it opens older ones"


def test_newest_whole(exercises: Callable[[int], ModuleType], tmp_path: Path) -> None:
    grade_newest_whole(exercises(8).newest_whole, tmp_path)


def is_whole(path: Path) -> bool:
    try:
        files = json.loads((path / "notes.json").read_text())["files"]
        return ".metadata" in files and all(
            (path / name).stat().st_size == size for name, size in files.items()
        )
    except (OSError, ValueError, TypeError, KeyError):
        return False


def by_key(folder: Path, key: Any) -> tuple[Path | None, list[str]]:
    found = [p for p in folder.iterdir() if p.is_dir() and re.fullmatch(r"step-\d{6,}", p.name)]
    torn: list[str] = []
    for path in sorted(found, key=key, reverse=True):
        if is_whole(path):
            return path, torn
        torn.append(path.name)
    return None, torn


def by_step(path: Path) -> int:
    return int(path.name[5:])


def takes_the_last_name(folder: Path) -> tuple[Path | None, list[str]]:
    return by_key(folder, lambda path: path.name)


def takes_the_last_date(folder: Path) -> tuple[Path | None, list[str]]:
    return by_key(folder, lambda path: path.stat().st_mtime_ns)


def trusts_the_name(folder: Path) -> tuple[Path | None, list[str]]:
    found = [p for p in folder.iterdir() if p.is_dir() and re.fullmatch(r"step-\d{6,}", p.name)]
    return max(found, key=by_step, default=None), []


def deletes_what_is_torn(folder: Path) -> tuple[Path | None, list[str]]:
    path, torn = by_key(folder, by_step)
    for name in torn:
        shutil.rmtree(folder / name)
    return path, torn


def reads_the_shards(folder: Path) -> tuple[Path | None, list[str]]:
    path, torn = by_key(folder, by_step)
    for shard in path.glob("*.distcp") if path else ():
        with shard.open("rb") as file:
            file.read(8)
    return path, torn


def judges_all_of_them(folder: Path) -> tuple[Path | None, list[str]]:
    for path in folder.glob("step-*"):
        is_whole(path)
    return by_key(folder, by_step)


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (takes_the_last_name, "not the largest step"),
        (takes_the_last_date, "not the largest step"),
        (trusts_the_name, "it returns"),
        (deletes_what_is_torn, "it changes"),
        (reads_the_shards, "it reads shards"),
        (judges_all_of_them, "it opens older ones"),
    ],
)
def test_wrong_newest_whole(answer: Newest, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=complaint):
        grade_newest_whole(answer, tmp_path)


def test_the_stub_of_newest_whole(tmp_path: Path) -> None:
    stubs = warm.load("chapter8_stubs", ROOT / CHAPTERS[7] / "exercises.py")
    with pytest.raises(NotImplementedError):
        grade_newest_whole(stubs.newest_whole, tmp_path)


# --- place_in_mesh -------------------------------------------------------------------------------

Place = Callable[[int, int, int, int, int], dict[str, list[int]]]


def grade_place_in_mesh(place: Place) -> None:
    for sizes in ((1, 1, 1), (1, 4, 1), (2, 1, 3), (2, 3, 2), (3, 2, 4)):
        grid = torch.arange(math.prod(sizes)).view(sizes)
        for batch in (2, 7, 24):
            found = [place(rank, *sizes, batch) for rank in range(grid.numel())]
            for rank, answer in enumerate(found):
                here = f"rank {rank} of {sizes[0]} x {sizes[1]} x {sizes[2]}"
                i, j, k = (grid == rank).nonzero()[0].tolist()
                groups = (grid[i, j], grid[i, :, k], grid[:, j, k])
                for name, group in zip(("tp", "dp_shard", "dp_replicate"), groups, strict=True):
                    assert answer[name] == group.tolist(), f"{here}, {name}: {answer[name]}"
                same = answer["windows"] == found[rank - k]["windows"]
                assert same, f"{here} does not read what the others of its TP group read"
            places = [found[rank]["windows"] for rank in grid[:, :, 0].flatten().tolist()]
            read = sorted(window for windows in places for window in windows)
            assert read == list(range(batch)), f"of {batch} windows these are read: {read}"
            n = len(places)
            for number, windows in enumerate(places):
                assert windows == list(range(number, batch, n)), f"place {number} of {n}: {windows}"
    for wrong in ((8, 2, 2, 2, 8), (-1, 2, 2, 2, 8), (0, 2, 0, 2, 8)):
        with pytest.raises(ValueError, match=r"."):
            place(*wrong)


def test_place_in_mesh(exercises: Callable[[int], ModuleType]) -> None:
    grade_place_in_mesh(exercises(8).place_in_mesh)


def solved(rank: int, *rest: int) -> dict[str, list[int]]:
    solutions = warm.load("chapter8_solutions", ROOT / CHAPTERS[7] / "solutions.py")
    return solutions.place_in_mesh(rank, *rest)


def tp_is_farthest_apart(rank: int, r: int, s: int, t: int, batch: int) -> dict[str, list[int]]:
    turned = solved(rank, t, s, r, batch)
    return turned | {"tp": turned["dp_replicate"], "dp_replicate": turned["tp"]}


def every_rank_reads_its_own(rank: int, r: int, s: int, t: int, batch: int) -> dict[str, list[int]]:
    return solved(rank, r, s, t, batch) | {"windows": list(range(rank, batch, r * s * t))}


def replicas_read_the_same(rank: int, r: int, s: int, t: int, batch: int) -> dict[str, list[int]]:
    return solved(rank, r, s, t, batch) | {"windows": list(range(rank // t % s, batch, s))}


def drops_the_rest(rank: int, r: int, s: int, t: int, batch: int) -> dict[str, list[int]]:
    share = batch // (r * s)
    return solved(rank, r, s, t, batch) | {
        "windows": list(range(rank // t * share, (rank // t + 1) * share))
    }


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (tp_is_farthest_apart, "tp: "),
        (every_rank_reads_its_own, "TP group"),
        (replicas_read_the_same, "are read"),
        (drops_the_rest, "are read"),
    ],
)
def test_wrong_places_are_turned_down(answer: Any, complaint: str) -> None:
    with pytest.raises(AssertionError, match=complaint):
        grade_place_in_mesh(answer)


def test_the_stub_of_place_in_mesh_is_turned_down() -> None:
    stubs = warm.load("chapter8_stubs", ROOT / CHAPTERS[7] / "exercises.py")
    with pytest.raises(NotImplementedError):
        grade_place_in_mesh(stubs.place_in_mesh)
