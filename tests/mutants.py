"""What a script of several ranks finds wrong with itself: with other flags, and broken on purpose."""

import contextlib
import io
import re
import sys
import types
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import warm

Case = tuple[str, str, str]  # flags; a piece of the source; what it becomes ("", "": nothing)


def failed_claims(script: Path, world_size: int, cases: Sequence[Case]) -> list[set[str]]:
    """For each case the `check:` lines that failed on any rank.

    All cases share the ranks and their process group: a case must raise nothing and leave no message.
    """
    source = script.read_text(encoding="utf-8")
    prepared = []
    for flags, right, wrong in cases:
        assert not right or source.count(right) == 1, f"not once in {script.name}: {right}"
        prepared.append((flags, source.replace(right, wrong) if right else source))
    ranks = warm.fork_ranks(failed_in_rank, world_size, str(script), prepared)
    return [set().union(*of_case) for of_case in zip(*ranks, strict=True)]


def failed_in_rank(path: str, prepared: list[tuple[str, str]]) -> list[list[str]]:
    failed = []
    for flags, source in prepared:
        module = types.ModuleType(Path(path).stem)
        module.__file__ = path
        sys.modules[module.__name__] = module  # dataclasses look there
        sys.argv[:] = [path, *flags.split()]
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(source, path, "exec"), module.__dict__)  # noqa: S102 - the book's own
            claims = module.run(module.parse_args(), torch.device("cpu"))
        dist.barrier()
        lines = re.findall(r"^check: .* FAILED on rank \d+$", printed.getvalue(), re.M)
        assert claims
        assert claims.count(False) == len(lines)
        failed.append(lines)
    return failed
