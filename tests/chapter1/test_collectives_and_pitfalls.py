"""The arithmetic behind ch01_collectives, ch01_ddp_pitfalls and ch01_distributed_inference."""

from argparse import Namespace

import pytest
import torch
import warm
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

CODE = warm.ROOT / "chapter1-introduction-to-modern-distributed-ai" / "code"
collectives, pitfalls, inference = (
    warm.load(name, CODE / f"{name}.py")
    for name in ("ch01_collectives", "ch01_ddp_pitfalls", "ch01_distributed_inference")
)


# --- collectives -------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize("ranks", range(1, 10))
def test_a_mark_names_one_rank_and_one_chunk_and_no_sum_looks_like_one(ranks: int) -> None:
    marks = [collectives.mark(r, c, ranks) for r in range(ranks) for c in range(ranks)]
    assert len(set(marks)) == ranks**2
    sums = collectives.expected("all_reduce", collectives.before("all_reduce", ranks))[0]
    assert ranks == 1 or not set(sums) & set(marks)


def test_collectives_compose() -> None:
    """Identities between the eight, none of which the script's own definitions use."""
    expected = collectives.expected
    for ranks in range(1, 10):
        start = collectives.before("all_reduce", ranks)
        scattered = expected("reduce_scatter", start)
        assert expected("all_gather", scattered) == expected("all_reduce", start)
        assert expected("reduce", start)[0] == expected("all_reduce", start)[0]
        assert expected("all_to_all", expected("all_to_all", start)) == start

        one = collectives.before("scatter", ranks)
        assert expected("all_gather", expected("scatter", one)) == expected("broadcast", one)
        assert expected("gather", expected("scatter", one)) == one

        own = collectives.before("all_gather", ranks)
        assert expected("broadcast", expected("gather", own)) == expected("all_gather", own)


@pytest.mark.full
@pytest.mark.parametrize("ranks", range(1, 10))
def test_factors_add_up(ranks: int) -> None:
    part = {name: row[0](ranks) for name, row in collectives.COLLECTIVES.items()}
    assert part["all_reduce"] == pytest.approx(part["reduce_scatter"] + part["all_gather"])
    if ranks == 1:
        assert not any(part.values()), "one rank has nobody to send to"
    values = {"1": float(ranks > 1), "(n-1)/n": 1 - 1 / ranks, "2(n-1)/n": 2 - 2 / ranks}
    for name, (_, formula, _) in collectives.COLLECTIVES.items():
        assert part[name] == pytest.approx(values[formula])


# --- schedules ---------------------------------------------------------------------------------


class Counter:
    """A TCPStore's `add`, without the network."""

    def __init__(self) -> None:
        self.values: dict[str, int] = {}

    def add(self, key: str, amount: int) -> int:
        self.values[key] = self.values.get(key, 0) + amount
        return self.values[key]


@pytest.mark.full
@given(st.permutations(range(7)), st.lists(st.integers(0, 2), min_size=30, max_size=30))
def test_tickets_hand_out_each_request_once_and_in_order(
    order: list[int], turns: list[int]
) -> None:
    store = Counter()
    ranks = [inference.tickets(store, "run", order) for _ in range(3)]
    taken = [request for rank in turns if (request := next(ranks[rank], None)) is not None]
    taken += [request for rank in ranks for request in rank]
    assert taken == order


def test_busy_and_idle_time_of_given_answers() -> None:
    answers = [
        inference.Answer(0, 0, 10.0, 13.0, b"abc"),
        inference.Answer(1, 1, 10.0, 11.0, b"d"),
        inference.Answer(2, 1, 11.0, 12.0, b"e"),
    ]
    run = inference.times_of_run(answers, [13.0, 12.0], 2)
    assert (run["makespan"], run["busy"]) == (3.0, [3.0, 2.0])
    assert run["idle"] == pytest.approx(1 / 6)
    assert (run["bound"], run["longest"], run["wait"]) == (3.0, 3.0, 1.0)


@pytest.mark.full
def test_lengths_are_seeded_clipped_and_heavy_tailed() -> None:
    args = Namespace(requests=2000, seed=3, median=15, longest=150)
    lengths = inference.draw_lengths(args)
    assert lengths == inference.draw_lengths(args)
    assert min(lengths) >= 1
    assert max(lengths) == 150
    middle = sorted(lengths)[1000]
    assert 13 <= middle <= 17
    assert sum(lengths) / 2000 > 1.3 * middle


@pytest.mark.full
def test_greedy_decoding_is_a_prefix_of_more_of_it() -> None:
    torch.manual_seed(0)
    model = inference.ByteLM(width=16, layers=1, heads=2, context=8)
    prompt = torch.arange(8)
    longer = inference.generate(model, prompt, 6)
    assert len(longer) == 6
    assert inference.generate(model, prompt, 3) == longer[:3]
    assert longer[0] == model(prompt[None])[0, -1].argmax()


# --- pitfalls ----------------------------------------------------------------------------------


@pytest.mark.full
def test_global_batch_norm_on_one_rank_is_batch_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """With an all-reduce over nobody else: outputs, gradients and statistics agree."""
    monkeypatch.setattr(pitfalls.dist, "all_reduce", lambda tensor: None)
    torch.manual_seed(0)
    x = torch.randn(12, 5, dtype=torch.double)
    ours, reference = pitfalls.GlobalBatchNorm(5).double(), nn.BatchNorm1d(5).double()
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for norm, tensor in zip((ours, reference), inputs, strict=True):
        norm(tensor).pow(3).sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    torch.testing.assert_close(ours.running_mean, reference.running_mean)
    torch.testing.assert_close(ours.running_var, reference.running_var)
    torch.testing.assert_close(ours.eval()(x), reference.eval()(x))
