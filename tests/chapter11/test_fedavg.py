"""FedAvg and FedProx: sums by hand, shares, samples, clients that fail, mutants, bad input."""

import sys
from pathlib import Path

import pytest
import torch
import warm
from mutants import failed_claims
from torch import nn
from torch.nn.utils import parameters_to_vector
from torch.optim import SGD

SCRIPT = warm.ROOT / "chapter11-trends-and-future-of-distributed-ai/code/ch11_fedavg.py"
SMALL = "--windows 600 --rounds 2 --steps 2 --batch 8 --width 8"

script = warm.load("ch11_fedavg", SCRIPT)
Update = script.Update


@pytest.fixture
def windows() -> torch.Tensor:
    text = torch.frombuffer(bytearray(Path(SCRIPT).read_bytes()), dtype=torch.uint8).long()
    return text.unfold(0, 9, 1)


def test_average_is_weighted_by_examples() -> None:
    """3, 1 and 6 examples: (3 * 1 + 1 * 5 + 6 * -2) / 10, and 0.7 in the second place."""
    pairs = [([1.0, 0.5], 3), ([5.0, -0.2], 1), ([-2.0, 0.95], 6)]
    updates = [Update(torch.tensor(c, dtype=torch.float64), e) for c, e in pairs]
    right = torch.tensor([-0.4, 0.7], dtype=torch.float64)
    assert (script.average(updates) - right).abs().max() < 1e-15
    small = [Update(update.change.float(), update.examples) for update in updates]
    assert script.average(small).dtype == torch.float32
    assert torch.equal(script.average(small), right.float()), "summed in float64, rounded once"


def test_each_failure_has_its_line_and_an_empty_round_changes_nothing() -> None:
    weights = torch.zeros(4)
    bad = {
        "says that it has 0 examples": Update(torch.ones(4), 0),
        "says that it has -3 examples": Update(torch.ones(4), -3),
        "sent a tensor [4, 1], the model is [4]": Update(torch.ones(4, 1), 9),
        "2 of 4 numbers are not finite": Update(torch.tensor([torch.inf, 0, torch.nan, 1]), 9),
    }

    def ask(client: int, weights: torch.Tensor) -> script.Update:  # type: ignore[name-defined]
        if client == len(bad):
            raise ConnectionError("no answer")
        return list(bad.values())[client]

    notes: list[str] = []
    after, accepted = script.one_round(weights, list(range(len(bad) + 1)), ask, notes.append)
    assert accepted == []
    assert torch.equal(after, weights)
    assert notes == [
        *(f"client {i}: {line}: left out of this round" for i, line in enumerate(bad)),
        f"client {len(bad)}: no answer: left out of this round",
        "no client is left: the weights stay as they are",
    ]


@pytest.mark.parametrize("mu", [0.0, 0.7])
def test_local_steps_are_sgd_on_the_loss_and_the_pull(windows: torch.Tensor, mu: float) -> None:
    """Against autograd on the sum of both, by PyTorch's own SGD."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(256, 4), nn.Flatten(), nn.Linear(32, 256)).double()
    weights = parameters_to_vector(model.parameters()).detach().clone()
    plan = script.Plan(steps=5, lr=0.3, batch=10**6, mu=mu)
    update = script.train_locally(model, weights, windows[:40], plan, seed=0)
    assert update.examples == 40

    script.vector_to_parameters(weights.clone(), model.parameters())
    optimizer = SGD(model.parameters(), lr=0.3)
    for _ in range(5):
        optimizer.zero_grad()
        pull = mu / 2 * (parameters_to_vector(model.parameters()) - weights).square().sum()
        (script.next_byte_loss(model, windows[:40]) + pull).backward()
        optimizer.step()
    expected = parameters_to_vector(model.parameters()).detach() - weights
    assert (update.change - expected).abs().max() < 1e-12


def test_a_clients_round_depends_on_nothing_but_its_seed(windows: torch.Tensor) -> None:
    model = nn.Sequential(nn.Embedding(256, 4), nn.Flatten(), nn.Linear(32, 256))
    weights = parameters_to_vector(model.parameters()).detach().clone()
    plan = script.Plan(3, 0.3, 8)
    first = script.train_locally(model, weights, windows, plan, seed=1).change
    other = script.train_locally(model, weights, windows, plan, seed=2).change
    torch.manual_seed(99)
    assert torch.equal(script.train_locally(model, weights, windows, plan, seed=1).change, first)
    assert not torch.equal(other, first)


@pytest.mark.parametrize("alpha", [100.0, 0.1, 1e-3])
def test_every_window_goes_to_one_client(windows: torch.Tensor, alpha: float) -> None:
    shares = script.dirichlet_split(windows, 7, alpha, seed=3)
    dealt = sorted(tuple(row) for share in shares for row in share.tolist())
    assert dealt == sorted(tuple(row) for row in windows.tolist())
    assert min(len(share) for share in shares) >= 1
    largest = max(len(share) for share in shares) / len(windows)
    assert largest < 0.25 if alpha == 100 else largest > 0.25


def test_samples_are_by_seed_and_round() -> None:
    rounds = [script.sample(10, 3, at, seed=5) for at in range(40)]
    assert rounds == [script.sample(10, 3, at, seed=5) for at in range(40)]
    assert all(len(set(clients)) == 3 for clients in rounds)
    assert {client for clients in rounds for client in clients} == set(range(10))
    assert rounds != [script.sample(10, 3, at, seed=6) for at in range(40)]
    assert script.sample(10, 10, 0, 5) == list(range(10))


def test_without_the_refusal_one_number_moves_every_weight() -> None:
    """As section 11.5 says: another shape ends the round with PyTorch's words, or goes unnoticed."""
    healthy = Update(torch.ones(17792), 1)
    with pytest.raises(RuntimeError, match=r"size of tensor a \(17792\) must match .* b \(17791\)"):
        script.average([healthy, Update(torch.ones(17791), 1)])
    assert script.average([healthy, Update(torch.tensor([3.0]), 1)]).eq(2).all()


# --- the script --------------------------------------------------------------------------------


@pytest.mark.full
def test_other_clients_seeds_and_shares() -> None:
    lines = [
        f"{SMALL} --seed 20260101 --clients 4 --per-round 4",
        f"{SMALL} --clients 30 --per-round 1 --alpha 0.001",
        f"{SMALL} --clients 4 --windows 4 --per-round 2 --rounds 1 --mu 3",
    ]
    assert failed_claims(SCRIPT, 1, [(line, "", "") for line in lines]) == [set()] * len(lines)


MUTANTS = [  # a piece of the source, what it becomes; the claim that must fail
    ("update.examples / total", "1 / len(updates)", "one step by all clients"),
    ("(update.examples / total)", "update.examples", "one step by all clients"),
    ("weights + average(accepted)", "average(accepted)", "one step by all clients"),
    ("vector_to_parameters(weights.clone(), model.parameters())\n    draw",
     "draw", "one step by all clients"),  # a client goes on from the one before
    ("~update.change.isfinite()", "update.change.isinf()", "without them"),
    # the vanished client's last update counts
    ("left out of this round\")\n            continue", "left out of this round\")", "without them"),
]  # fmt: skip


@pytest.mark.full
def test_mutants_are_caught() -> None:
    found = failed_claims(SCRIPT, 1, [(SMALL, right, wrong) for right, wrong, _ in MUTANTS])
    for (right, _, claim), failed in zip(MUTANTS, found, strict=True):
        assert any(claim in line for line in failed), f"{right}: {failed}"


@pytest.mark.full
@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--clients 3", "--clients 3: three of them fail, so there must be 4 or more"),
        ("--per-round 11", "--per-round 11: there are 10 clients"),
        ("--per-round 0", "--per-round 0: there are 10 clients"),
        ("--windows 9", "--windows 9: each of 10 clients needs one"),
        ("--alpha 0", "--alpha 0"),
        ("--data no-such-file", "give a text file with --data FILE"),
        ("--device abacus", "--device abacus: this machine has cpu"),
    ],
)
def test_bad_input_gets_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: str, says: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["x", *flags.split()])
    threads = torch.get_num_threads()
    with pytest.raises(SystemExit) as end:
        script.main()
    torch.set_num_threads(threads)
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1
