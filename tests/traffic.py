"""What a rank sends: the graders of the exercises count it, whoever does the sending."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import warm
from torch.utils._python_dispatch import TorchDispatchMode

Answer = Callable[..., Any]
Address = tuple[str, str, str]  # module, file, name
Call = tuple[str, int, int]  # c10d operator, bytes, the other rank of a send or recv (else -1)


class Traffic(TorchDispatchMode):
    """Records every call to the process group, whichever Python function it came through."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if "c10d" in operator.namespace and "wait" not in operator.name():
            tensors = args[0] if isinstance(args[0], list | tuple) else [args[0]]
            name = operator.name().split("::")[1].split(".")[0]
            peer = args[2] if name in ("send", "recv_") else -1
            nbytes = sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))
            self.calls.append((name, nbytes, peer))
        return operator(*args, **(kwargs or {}))


def address(answer: Answer) -> Address:
    """Where a rank finds a function: the answers are not on its path."""
    return answer.__module__, str(inspect.getsourcefile(answer)), answer.__name__


def on_ranks(work: Answer, world_size: int, answer: Answer, *args: object) -> list[Any]:
    """Results by rank of a function that is called in each rank with the answer's address."""
    return warm.fork_ranks(work, world_size, address(answer), *args)


def watched(at: Address, *args: object) -> tuple[Any, list[Call]]:
    """In a rank: what the answer returns, and its traffic."""
    module, path, name = at
    answer = getattr(warm.load(module, path), name)
    with Traffic() as traffic:
        result = answer(*args)
    return result, traffic.calls
