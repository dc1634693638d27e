"""The two pitfalls of section 2.9 that no script of the chapter contains."""

import pytest
import torch
import torch.distributed as dist
import warm
from torch.distributed.device_mesh import init_device_mesh


def swap_by_send(count: int) -> float:
    """Exchange tensors with the other of two ranks; both send first."""
    other = 1 - dist.get_rank()
    received = torch.empty(count)
    dist.send(torch.full((count,), float(dist.get_rank())), other)
    dist.recv(received, other)
    return received[0].item()


def swap_at_once(count: int) -> float:
    other = 1 - dist.get_rank()
    received = torch.empty(count)
    outgoing = torch.full((count,), float(dist.get_rank()))
    send = dist.P2POp(dist.isend, outgoing, other)
    for work in dist.batch_isend_irecv([send, dist.P2POp(dist.irecv, received, other)]):
        work.wait()
    return received[0].item()


def groups_by_name(names: tuple[str, str]) -> list[int]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=names)
    return dist.get_process_group_ranks(mesh["tensor"].get_group())


@pytest.mark.parametrize("count", [1, pytest.param(2**20, marks=pytest.mark.full)])
def test_both_send_first(count: int) -> None:
    """On gloo `send` waits for a receiver, however small the tensor; posted together, both pass."""
    assert warm.fork_ranks(swap_at_once, 2, count, timeout=20) == [1.0, 0.0]
    with pytest.raises(warm.RankError, match="no result after 3 s"):
        warm.fork_ranks(swap_by_send, 2, count, timeout=3)


def test_the_last_dimension_of_a_mesh_is_the_nearest() -> None:
    right = warm.fork_ranks(groups_by_name, 4, ("data", "tensor"))
    wrong = warm.fork_ranks(groups_by_name, 4, ("tensor", "data"))
    assert right == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert wrong == [[0, 2], [1, 3], [0, 2], [1, 3]]
