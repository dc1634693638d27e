"""Graders of chapter 1's exercises, and the proof that they turn wrong answers down.

pytest tests/chapter1/test_exercises.py            grades solutions.py
pytest tests/chapter1/test_exercises.py --mine     grades your exercises.py
"""

import itertools
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
import warm
from torch import nn
from traffic import Address, Answer, Call, on_ranks, watched

WORLD_SIZES = (1, 2, 3, 4)


# --- 1. time_call ------------------------------------------------------------------------------


class Device:
    """An asynchronous device and its clock: work is queued, and no time passes but the work's."""

    def __init__(self, seconds: Sequence[float], backlog: float) -> None:
        self.seconds = iter(seconds)  # of each call
        self.now, self.done_at = 0.0, backlog
        self.launches = 0

    def launch(self) -> None:
        self.launches += 1
        self.done_at = max(self.now, self.done_at) + next(self.seconds, 0)

    def synchronize(self) -> None:
        self.now = max(self.now, self.done_at)


def quartiles_of(
    answer: Answer, backlog: float, warmup: Sequence[float], timed: Sequence[float]
) -> tuple[float, float, float]:
    """What the answer measures on a device whose calls take these seconds, one after another."""
    device = Device([*warmup, *timed], backlog)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("perf_counter", "monotonic", "time"):
            real = getattr(time, name)
            patch.setattr(time, name, lambda: device.now)
            patch.setattr(time, f"{name}_ns", lambda: round(device.now * 1e9))
            for alias in [k for k, v in answer.__globals__.items() if v is real]:
                patch.setitem(answer.__globals__, alias, lambda: device.now)
        quartiles = answer(device.launch, device.synchronize, len(warmup), len(timed))
    calls = device.launches
    assert calls == len(warmup) + len(timed), f"{calls} calls, not warmup + repeats"
    return quartiles


def grade_time_call(answer: Answer) -> None:
    quartiles = quartiles_of(answer, 0.3, [], [0.01] * 3)
    assert min(quartiles) > 0.0099, f"{quartiles} s: shorter than the work itself, 0.01 s"
    assert max(quartiles) < 0.0101, f"{quartiles} s: holds work that was queued before, 0.3 s"
    quartiles = quartiles_of(answer, 0, [0.3], [0.01] * 3)
    assert max(quartiles) < 0.0101, f"{quartiles} s: holds the slow first call, 0.3 s"
    #     sorted: 1, 4 x 5, 3 x 20, 4 x 60, 250 ms; every definition has its quartiles at 5, 20, 60
    milliseconds = [60, 5, 20, 1, 60, 5, 250, 20, 5, 60, 20, 5, 60]
    first, median, third = quartiles_of(answer, 0, [], [ms / 1e3 for ms in milliseconds])
    assert first == pytest.approx(0.005), f"first quartile {first:.4f} s, the work is 0.005 s"
    assert median == pytest.approx(0.02), f"median {median:.4f} s, the work is 0.02 s"
    assert third == pytest.approx(0.06), f"third quartile {third:.4f} s, the work is 0.06 s"


def stops_the_clock_early(
    function: Callable[[], object], synchronize: Callable[[], None], warmup: int, repeats: int
) -> tuple[float, ...]:
    for _ in range(warmup):
        function()
    seconds = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return tuple(statistics.quantiles(seconds, n=4))


def starts_the_clock_early(
    function: Callable[[], object], synchronize: Callable[[], None], warmup: int, repeats: int
) -> tuple[float, ...]:
    for _ in range(warmup):
        function()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        synchronize()
        seconds.append(time.perf_counter() - start)
    return tuple(statistics.quantiles(seconds, n=4))


def times_the_warm_up(
    function: Callable[[], object], synchronize: Callable[[], None], warmup: int, repeats: int
) -> tuple[float, ...]:
    seconds = []
    for _ in range(warmup + repeats):
        synchronize()
        start = time.perf_counter()
        function()
        synchronize()
        seconds.append(time.perf_counter() - start)
    return tuple(statistics.quantiles(seconds, n=4))


# --- 2. shard ----------------------------------------------------------------------------------


def grade_shard(answer: Answer) -> None:
    def whole(length: int, world_size: int, epoch: int, seed: int) -> list[list[int]]:
        return [answer(length, r, world_size, epoch, seed).tolist() for r in range(world_size)]

    for length, world_size in itertools.product((0, 1, 2, 3, 5, 8, 13, 100), (1, 2, 3, 4, 7)):
        shards = whole(length, world_size, epoch=1, seed=2)
        indices, sizes = list(itertools.chain(*shards)), [len(s) for s in shards]
        at = f"length {length}, world size {world_size}"
        assert len(indices) == len(set(indices)), f"{at}: some samples twice"
        assert sorted(indices) == list(range(length)), f"{at}: samples missing or out of range"
        assert max(sizes) - min(sizes) <= 1, f"{at}: uneven sizes {sizes}"
    assert answer(5, 0, 7, 0, 0).dtype == answer(0, 0, 1, 0, 0).dtype == torch.int64, "not int64"

    pairs = list(itertools.product(range(4), range(4)))  # (epoch, seed)
    orders = {pair: whole(1000, 4, *pair) for pair in pairs}
    assert all(orders[pair] == whole(1000, 4, *pair) for pair in pairs[:3]), "not reproducible"
    for one, other in itertools.combinations(pairs, 2):
        assert orders[one] != orders[other], f"(epoch, seed) {one} and {other}: the same shuffle"
    seen = set(orders[0, 0][0]) & set(orders[1, 0][0])  # 62.5 of 250 expected, give or take 6
    assert len(seen) < 125, f"rank 0 sees {len(seen)} of its 250 samples again in the next epoch"
    steps = Counter(b - a for a, b in itertools.pairwise(orders[0, 0][0]))
    assert max(steps.values()) < 25, "not shuffled: the same distance again and again"

    state = torch.random.get_rng_state()
    answer(10, 0, 2, 0, 0)
    assert torch.equal(state, torch.random.get_rng_state()), "changed the global random state"


def drawn(length: int, seed: int) -> torch.Tensor:
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed))


def forgets_the_epoch(length: int, rank: int, world_size: int, epoch: int, seed: int) -> Any:
    return drawn(length, seed)[rank::world_size]


def adds_seed_and_epoch(length: int, rank: int, world_size: int, epoch: int, seed: int) -> Any:
    return drawn(length, seed + epoch)[rank::world_size]


def pads(length: int, rank: int, world_size: int, epoch: int, seed: int) -> Any:
    order = drawn(length, 997 * seed + epoch)
    return torch.cat([order, order[: -length % world_size]])[rank::world_size]


def drops_the_tail(length: int, rank: int, world_size: int, epoch: int, seed: int) -> Any:
    even = length - length % world_size
    return drawn(length, 997 * seed + epoch)[:even][rank::world_size]


def shuffles_its_own_part(length: int, rank: int, world_size: int, epoch: int, seed: int) -> Any:
    part = torch.arange(length)[rank::world_size]
    return part[drawn(len(part), 997 * seed + epoch)]


def seeds_the_world(length: int, rank: int, world_size: int, epoch: int, seed: int) -> Any:
    torch.manual_seed(997 * seed + epoch)
    return torch.randperm(length)[rank::world_size]


# --- 3. global_mean ----------------------------------------------------------------------------


def mean_in_rank(at: Address, shares: list[list[float]]) -> tuple[Any, list[Call], str]:
    """The mean of the shares, the calls, and what happens where no rank has a value."""
    mean, calls = watched(at, torch.tensor(shares[dist.get_rank()], dtype=torch.float32))
    try:
        return mean, calls, f"{watched(at, torch.empty(0))[0]} was returned"
    except ValueError:
        return mean, calls, "ValueError"


def grade_global_mean(answer: Answer) -> None:
    #     a float32 holds no odd number above 2**24, so adding up in float32 loses the ones
    shares = [[1.0, 2.0, 9.0], [], [2.0**24, 1.0, 1.0, 1.0], [4.0]]
    without_values = []
    for world_size in WORLD_SIZES:
        values = list(itertools.chain(*shares[:world_size]))
        right = math.fsum(values) / len(values)
        for mean, calls, empty in on_ranks(mean_in_rank, world_size, answer, shares):
            at = f"{world_size} ranks"
            assert isinstance(mean, float), f"{at}: {mean!r} is not a float"
            assert math.isclose(mean, right, rel_tol=1e-9), f"{at}: {mean}, the mean is {right}"
            assert len(calls) == 1, (
                f"{at}: {len(calls)} collectives: {[name for name, _, _ in calls]}"
            )
            assert calls[0][1] <= 64, f"{at}: a message of {calls[0][1]} bytes"
            without_values.append(f"{at} without a value: {empty}")
    for outcome in without_values:
        assert outcome.endswith("ValueError"), f"{outcome}, not a ValueError"


def mean_of_means(values: torch.Tensor) -> float:
    mean = values.double().sum() / max(len(values), 1)
    dist.all_reduce(mean)
    return mean.item() / dist.get_world_size()


def in_float32(values: torch.Tensor) -> float:
    total = torch.tensor([values.sum(), len(values)])
    dist.all_reduce(total)
    return (total[0] / total[1]).item()


def reduces_twice(values: torch.Tensor) -> float:
    total, count = values.double().sum(), torch.tensor(len(values))
    dist.all_reduce(total)
    dist.all_reduce(count)
    return (total / count).item()


def divides_by_nothing(values: torch.Tensor) -> float:
    total = torch.tensor([values.double().sum(), len(values)], dtype=torch.float64)
    dist.all_reduce(total)
    return (total[0] / total[1]).item()


# --- 4. average_gradients ----------------------------------------------------------------------


class Net(nn.Module):
    """Biases, a weight that is not contiguous, and a layer that nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.second.weight = nn.Parameter(self.second.weight.detach().t())
        self.unused = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [batch, 6] -> [batch, 3]
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))


def averaged_in_rank(at: Address, limits: list[int]) -> list[tuple[Any, ...]]:
    """For each limit: what was returned, the calls, bytes per gradient, max difference, strays."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model, alone = Net().double(), Net().double()
    alone.load_state_dict(model.state_dict())
    inputs, targets = torch.randn(5 * world_size, 6).double(), torch.randn(5 * world_size, 3)
    nn.functional.mse_loss(alone(inputs), targets.double()).backward()
    couples = zip(model.parameters(), alone.parameters(), strict=True)
    pairs: list[Any] = [(ours, right) for ours, right in couples if right.grad is not None]
    done = []
    for limit in limits:
        model.zero_grad()
        mine = slice(5 * rank, 5 * (rank + 1))
        nn.functional.mse_loss(model(inputs[mine]), targets[mine].double()).backward()
        returned, calls = watched(at, model, limit)
        difference = max((p.grad - q.grad).abs().max().item() for p, q in pairs)
        strays = sum(p.grad is not None for p in model.unused.parameters())
        done.append((returned, calls, [q.grad.nbytes for _, q in pairs], difference, strays))
    return done


def greedy(sizes: Sequence[int], limit: int) -> int:
    """Buckets that greedy packing needs."""
    buckets, free = 0, 0
    for size in sizes:
        if buckets == 0 or size > free:
            buckets, free = buckets + 1, limit
        free -= size
    return buckets


def grade_average_gradients(answer: Answer) -> None:
    limits = [1, 64, 256, 448, 10**9]  # bytes: each alone, one bias, ..., an exact fit, all in one
    for world_size in WORLD_SIZES:
        ranks = on_ranks(averaged_in_rank, world_size, answer, limits)
        for limit, (returned, calls, sizes, difference, strays) in (
            pair for runs in ranks for pair in zip(limits, runs, strict=True)
        ):
            at = f"{world_size} ranks, buckets of {limit} bytes"
            assert difference <= 1e-12, f"{at}: {difference:.2g} off one process's gradient"
            assert strays == 0, f"{at}: {strays} unused parameters were given a gradient"
            names = {name for name, _, _ in calls}
            assert names == {"allreduce_"}, f"{at}: {sorted(names)}, not all_reduce alone"
            assert returned == len(calls), f"{at}: returned {returned}, made {len(calls)} calls"
            sent = [nbytes for _, nbytes, _ in calls]
            assert sum(sent) == sum(sizes), f"{at}: sent {sum(sent)} bytes of {sum(sizes)}"
            assert all(n <= limit or n in sizes for n in sent), f"{at}: {sent} bytes in a bucket"
            most = max(greedy(sizes, limit), greedy(sizes[::-1], limit))
            assert len(sent) <= most, f"{at}: {len(sent)} all-reduces, greedy packing needs {most}"


def reduce_in_buckets(
    buckets: Sequence[Sequence[torch.Tensor]], scale: Callable[[], int] = dist.get_world_size
) -> int:
    for bucket in buckets:
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        dist.all_reduce(flat)
        means = (flat / scale()).split([gradient.numel() for gradient in bucket])
        for gradient, mean in zip(bucket, means, strict=True):
            gradient.copy_(mean.view(gradient.shape))
    return len(buckets)


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def packed(model: nn.Module, bucket_bytes: int) -> list[list[torch.Tensor]]:
    buckets: list[list[torch.Tensor]] = [[]]
    for gradient in gradients(model):
        if buckets[-1] and sum(g.nbytes for g in [*buckets[-1], gradient]) > bucket_bytes:
            buckets.append([])
        buckets[-1].append(gradient)
    return buckets


def sums(model: nn.Module, bucket_bytes: int) -> int:
    return reduce_in_buckets(packed(model, bucket_bytes), scale=lambda: 1)


def one_each(model: nn.Module, bucket_bytes: int) -> int:
    return reduce_in_buckets([[g] for g in gradients(model)])


def all_in_one(model: nn.Module, bucket_bytes: int) -> int:
    return reduce_in_buckets([gradients(model)])


def leaves_the_last_bucket(model: nn.Module, bucket_bytes: int) -> int:
    return reduce_in_buckets(packed(model, bucket_bytes)[:-1])


def fills_the_gaps(model: nn.Module, bucket_bytes: int) -> int:
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return reduce_in_buckets(packed(model, bucket_bytes))


# --- 5. broadcast ------------------------------------------------------------------------------


def broadcast_in_rank(at: Address) -> list[tuple[int, list[float], list[Call]]]:
    """For each source: what was returned, the tensor afterwards, the calls."""
    done = []
    for source in range(dist.get_world_size()):
        tensor = torch.full((3, 2), float(dist.get_rank()), dtype=torch.float64)
        rounds, calls = watched(at, tensor, source)
        done.append((rounds, tensor.flatten().tolist(), calls))
    return done


def sends_in_a_row(calls: Sequence[Sequence[Call]]) -> int:
    """Length of the longest chain of sends that wait for each other; `calls` by rank.

    Replays what the ranks did, on a clock by which a send takes one tick and waits for nobody.
    """
    queues = [list(own) for own in calls]
    clocks = [0] * len(queues)
    arrivals: dict[tuple[int, int], list[int]] = {}
    while any(queues):
        left = sum(map(len, queues))
        for rank, queue in enumerate(queues):
            if not queue:
                continue
            name, _, peer = queue[0]
            if name == "send":
                clocks[rank] += 1
                arrivals.setdefault((rank, peer), []).append(clocks[rank])
                queue.pop(0)
            elif arrivals.get((peer, rank)):
                clocks[rank] = max(clocks[rank], arrivals[peer, rank].pop(0))
                queue.pop(0)
        assert sum(map(len, queues)) < left, "a recv without a send"
    return max(clocks)


def grade_broadcast(answer: Answer) -> None:
    for world_size in (*WORLD_SIZES, 6):
        ranks = on_ranks(broadcast_in_rank, world_size, answer)
        for source, runs in enumerate(zip(*ranks, strict=True)):
            at = f"{world_size} ranks, source {source}"
            for rank, (_, values, calls) in enumerate(runs):
                assert values == [float(source)] * 6, f"{at}: rank {rank} has {values}"
                names = [name for name, _, _ in calls]
                assert {*names} <= {"send", "recv_"}, f"{at}: {names}, not send and recv alone"
                received = names.count("recv_")
                assert received == (rank != source), f"{at}: rank {rank} received {received} times"
            best = math.ceil(math.log2(world_size))
            in_a_row = sends_in_a_row([calls for _, _, calls in runs])
            assert in_a_row <= best, f"{at}: {in_a_row} sends in a row, a tree needs {best}"
            returned = [rounds for rounds, _, _ in runs]
            assert returned == [best] * world_size, f"{at}: returned {returned}, not {best}"


def rounds_of_a_tree() -> int:
    return (dist.get_world_size() - 1).bit_length()


def star(tensor: torch.Tensor, source: int) -> int:
    if dist.get_rank() != source:
        dist.recv(tensor, source)
    else:
        for rank in set(range(dist.get_world_size())) - {source}:
            dist.send(tensor, rank)
    return rounds_of_a_tree()


def chain(tensor: torch.Tensor, source: int) -> int:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    place = (rank - source) % world_size
    if place > 0:
        dist.recv(tensor, (rank - 1) % world_size)
    if place < world_size - 1:
        dist.send(tensor, (rank + 1) % world_size)
    return rounds_of_a_tree()


def always_from_rank_0(tensor: torch.Tensor, source: int) -> int:
    rank, world_size, reach = dist.get_rank(), dist.get_world_size(), 1
    while reach < world_size:
        if rank < reach and rank + reach < world_size:
            dist.send(tensor, rank + reach)
        elif reach <= rank < 2 * reach:
            dist.recv(tensor, rank - reach)
        reach *= 2
    return rounds_of_a_tree()


def the_library_does_it(tensor: torch.Tensor, source: int) -> int:
    dist.broadcast(tensor, source)
    return rounds_of_a_tree()


# --- 6. longest_first --------------------------------------------------------------------------


def best_makespan(lengths: Sequence[int], ranks: int) -> int:
    """By trying every assignment; ranks with the same load are tried once."""
    best = sum(lengths)

    def place(request: int, loads: list[int]) -> None:
        nonlocal best
        if request == len(lengths):
            best = min(best, max(loads))
            return
        for load in set(loads):
            if load + lengths[request] < best:
                rank = loads.index(load)
                place(request + 1, [*loads[:rank], load + lengths[request], *loads[rank + 1 :]])

    place(0, [0] * ranks)
    return best


def grade_longest_first(answer: Answer) -> None:
    draw = torch.Generator().manual_seed(0)
    cases = [
        torch.randint(0, high, (count,), generator=draw).tolist()
        for high, count in itertools.product((3, 10, 1000), range(9))
        for _ in range(3)
    ]
    cases += [[5, 5, 4, 4, 3, 3, 3], [3, 3, 2, 2, 2], [1] * 6 + [6], [1, 1, 2]]  # worst cases
    for lengths, ranks in itertools.product(cases, (1, 2, 3, 4)):
        given = list(lengths)
        shares = answer(lengths, ranks)
        at = f"{given} on {ranks} ranks"
        assert lengths == given, f"{at}: the argument was changed"
        assert len(shares) == ranks, f"{at}: {len(shares)} lists"
        requests = sorted(itertools.chain(*shares))
        assert requests == list(range(len(given))), f"{at}: not every request once: {shares}"
        makespan = max(sum(given[i] for i in share) for share in shares)
        best = best_makespan(given, ranks)  # in integers: makespan <= (4/3 - 1/(3 ranks)) * best
        assert 3 * ranks * makespan <= (4 * ranks - 1) * best, f"{at}: {makespan}, best is {best}"


def round_robin(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    return [list(range(rank, len(lengths), ranks)) for rank in range(ranks)]


def sorted_round_robin(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [order[rank::ranks] for rank in range(ranks)]


def first_come(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for request in range(len(lengths)):
        min(shares, key=lambda share: sum(lengths[i] for i in share)).append(request)
    return shares


# --- the tests ---------------------------------------------------------------------------------

GRADERS = {
    "time_call": grade_time_call,
    "shard": grade_shard,
    "global_mean": grade_global_mean,
    "average_gradients": grade_average_gradients,
    "broadcast": grade_broadcast,
    "longest_first": grade_longest_first,
}

MUTANTS = [  # an exercise, a wrong answer, and what its grader must hold against it
    ("time_call", stops_the_clock_early, "shorter than the work"),
    ("time_call", starts_the_clock_early, "queued before"),
    ("time_call", times_the_warm_up, "slow first call"),
    ("shard", forgets_the_epoch, "the same shuffle"),
    ("shard", adds_seed_and_epoch, "the same shuffle"),
    ("shard", pads, "twice"),
    ("shard", drops_the_tail, "missing"),
    ("shard", shuffles_its_own_part, "again in the next epoch"),
    ("shard", seeds_the_world, "global random state"),
    ("global_mean", mean_of_means, "the mean is"),
    ("global_mean", in_float32, "the mean is"),
    ("global_mean", reduces_twice, "2 collectives"),
    ("global_mean", divides_by_nothing, "not a ValueError"),
    ("average_gradients", sums, "off one process's gradient"),
    ("average_gradients", leaves_the_last_bucket, "sent .* bytes of"),
    ("average_gradients", one_each, "greedy packing needs"),
    ("average_gradients", all_in_one, "bytes in a bucket"),
    ("average_gradients", fills_the_gaps, "unused parameters"),
    ("broadcast", star, "sends in a row"),
    ("broadcast", chain, "sends in a row"),
    ("broadcast", always_from_rank_0, "rank . has"),
    ("broadcast", the_library_does_it, "not send and recv alone"),
    ("longest_first", round_robin, "best is"),
    ("longest_first", sorted_round_robin, "best is"),
    ("longest_first", first_come, "best is"),
]


def stub(*args: object) -> None:
    raise NotImplementedError


@pytest.mark.parametrize("name", GRADERS)
def test_answer(name: str, exercises: Callable[[int], ModuleType]) -> None:
    GRADERS[name](getattr(exercises(1), name))


@pytest.mark.full
@pytest.mark.parametrize("name", GRADERS)
def test_stub_is_turned_down(name: str) -> None:
    with pytest.raises((NotImplementedError, warm.RankError)) as caught:
        GRADERS[name](stub)
    error = getattr(caught.value, "error", caught.value)  # a rank's exception comes wrapped
    assert isinstance(error, NotImplementedError)


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "wrong", "because"), MUTANTS, ids=[f"{name}-{m.__name__}" for name, m, _ in MUTANTS]
)
def test_wrong_answer_is_turned_down(name: str, wrong: Answer, because: str) -> None:
    with pytest.raises(AssertionError, match=because):
        GRADERS[name](wrong)
