"""The book model: a decoder-only transformer of Llama's shape (arXiv:2302.13971).

RMSNorm before each part, rotary positions, grouped-query attention (arXiv:2305.13245), SwiGLU, and
one matrix for both ends: the embedding is the output layer's weight too. A module of train.py.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class Config:
    """Sizes; the defaults are the book model's."""

    vocabulary: int = 2048
    width: int = 192
    layers: int = 6
    heads: int = 6
    kv_heads: int = 3
    hidden: int = 512
    context: int = 256
    theta: float = 10_000.0
    eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


class Attention(nn.Module):
    """Causal; each key and value head serves heads / kv_heads query heads."""

    def __init__(self, config: Config):
        super().__init__()
        self.head_dim = config.head_dim
        kv_width = config.kv_heads * config.head_dim
        self.q = nn.Linear(config.width, config.width, bias=False)
        self.k = nn.Linear(config.width, kv_width, bias=False)
        self.v = nn.Linear(config.width, kv_width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
        split = (-1, self.head_dim)
        q = self.q(x).unflatten(-1, split).transpose(1, 2)  # [batch, heads, seq, head_dim]
        k = self.k(x).unflatten(-1, split).transpose(1, 2)  # [batch, kv_heads, seq, head_dim]
        v = self.v(x).unflatten(-1, split).transpose(1, 2)
        q = rotate(q, rotation)
        k = rotate(k, rotation)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU (arXiv:2002.05202)."""

    def __init__(self, config: Config):
        super().__init__()
        self.gate = nn.Linear(config.width, config.hidden, bias=False)
        self.up = nn.Linear(config.width, config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class DecoderLayer(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.norm1 = nn.RMSNorm(config.width, config.eps)
        self.attention = Attention(config)
        self.norm2 = nn.RMSNorm(config.width, config.eps)
        self.feed_forward = FeedForward(config)

    def forward(self, x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x), rotation)
        return x + self.feed_forward(self.norm2(x))


class Output(nn.Module):
    """The last product. It owns no weight; as a module it can be told how its inputs are split."""

    def forward(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.linear(x, weight)


class Llama(nn.Module):
    """Tokens [batch, seq] to logits [batch, seq, vocabulary]; seq may not exceed config.context."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocabulary, config.width)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, config.eps)
        self.output = Output()
        self.register_buffer("rotation", rotations(config), persistent=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=initial_std(name, config))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        rotation = self.rotation[:, : tokens.shape[1]]
        for layer in self.layers:
            x = layer(x, rotation)
        return self.output(self.norm(x), self.embed.weight)


def rotations(config: Config) -> torch.Tensor:
    """Cosine and sine of each position's angles: [2, context, head_dim / 2]."""
    pairs = torch.arange(0, config.head_dim, 2) / config.head_dim
    frequency = 1 / config.theta**pairs  # rounded as Hugging Face does: it is multiplied by 255
    angle = torch.outer(torch.arange(config.context), frequency)
    return torch.stack([angle.cos(), angle.sin()])


def initial_std(name: str, config: Config) -> float:
    """The layers' outputs add up: smaller ones keep the sum's size (GPT-2, section 2.3)."""
    adds = name.endswith(("out.weight", "down.weight"))
    return 0.02 / (2 * config.layers) ** 0.5 if adds else 0.02


def flops_of_a_token(config: Config) -> int:
    """FLOPs to train on one token: 6 a weight in a product, 12 a pair of positions and width."""
    kv_width = config.kv_heads * config.head_dim
    attention = 2 * config.width * (config.width + kv_width)
    weights = config.layers * (attention + 3 * config.width * config.hidden)
    weights += config.vocabulary * config.width  # the output layer
    return 6 * weights + 12 * config.layers * config.context * config.width


# --- copied from other scripts; `make copies` keeps it equal to them ------------------------------


# Copied from train_ddp_torchrun.rotate
def rotate(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Turn each pair (x[i], x[i + d/2]) by its position's angle: RoPE (arXiv:2104.09864)."""
    cos, sin = rotation
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
