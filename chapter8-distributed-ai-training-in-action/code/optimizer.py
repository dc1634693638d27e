"""What turns gradients into steps: AdamW, or Muon for the matrices; and the learning rate's course.

A module of train.py. Section 8.2; what Muon costs on sharded weights is section 4.8.
"""

import math

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor


def make_optimizers(
    model: nn.Module, name: str, lr: float, weight_decay: float = 0.1
) -> list[torch.optim.Optimizer]:
    """One for all tensors, or two. Matrices decay, norms do not; the embedding is never Muon's."""
    named = list(model.named_parameters())
    matrices = [p for _, p in named if p.dim() == 2]
    vectors = [p for _, p in named if p.dim() < 2]
    found: list[torch.optim.Optimizer] = []
    if name == "muon":
        hidden = [p for n, p in named if p.dim() == 2 and "embed" not in n]
        found.append(Muon(hidden, lr, weight_decay))
        matrices = [p for n, p in named if p.dim() == 2 and "embed" in n]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [*found, torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)]


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal (Jordan et al. 2024); its steps are as large as AdamW's.

    torch.optim.Muon computes in bfloat16, which most CPUs have to imitate; this one in the weights'
    type. A matrix that is cut is gathered whole on every rank, which then keeps its part.
    """

    def __init__(
        self,
        parameters: list[nn.Parameter],
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
    ):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            lr = float(group["lr"])
            for p in group["params"]:
                if p.grad is None:
                    continue
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                momentum = self.state[p]["momentum"]
                momentum.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(momentum, group["momentum"])
                p.mul_(1 - lr * group["weight_decay"])
                scale = 0.2 * max(p.shape) ** 0.5  # as large as AdamW's updates (arXiv:2502.16982)
                p.add_(orthogonal(update), alpha=-lr * scale)


def orthogonal(update: torch.Tensor) -> torch.Tensor:
    """newton_schulz of a matrix, of which each rank may have a part."""
    if not isinstance(update, DTensor):
        return newton_schulz(update)
    whole = newton_schulz(update.full_tensor()).contiguous()
    return distribute_tensor(whole, update.device_mesh, update.placements, src_data_rank=None)


def share_of_peak(schedule: str, step: int, warmup: int, steps: int) -> float:
    """The learning rate of a step, as a share of its peak."""
    if schedule == "cosine":
        return learning_rate(step, warmup, steps)
    return warmup_stable_decay(step, warmup, steps)


def warmup_stable_decay(step: int, warmup: int, steps: int, decay: float = 0.2) -> float:
    """A line up, flat, then a line down over the last fifth (WSD, arXiv:2404.06395).

    Before the decay nothing depends on `steps`: a run may be made longer.
    """
    if step < warmup:
        return (step + 1) / warmup
    left = (steps - step) / max(decay * steps, 1)
    return min(1.0, left)


# --- copied from other scripts; `make copies` keeps it equal to them ------------------------------


# Copied from train_ddp_torchrun.learning_rate
def learning_rate(step: int, warmup: int, steps: int) -> float:
    """Share of the peak: a line up, then half a cosine down to a tenth (arXiv:1608.03983)."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(steps - warmup, 1))


# Copied from muon_fsdp2.newton_schulz
def newton_schulz(update: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The nearest matrix whose singular values are about 1: [rows, columns] to the same.

    Jordan et al. 2024, kellerjordan.github.io/posts/muon. torch.optim.Muon does it in bfloat16; here
    it is in the update's own type, so that a comparison means something.
    """
    x = update if update.shape[0] <= update.shape[1] else update.T
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    return x if update.shape[0] <= update.shape[1] else x.T
