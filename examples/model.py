"""A small decoder-only language model: enough transformer to train, small enough that the logits dominate."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NORM_EPS = torch.finfo(torch.float32).eps  # what it is by default; in float64 that would be less, and another model


@dataclass(frozen=True)
class ModelConfig:
    vocab_size: int = 32_000
    context: int = 128
    width: int = 64
    heads: int = 4
    layers: int = 2


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.attention_norm = nn.RMSNorm(width, NORM_EPS)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width, NORM_EPS)
        self.mlp_in = nn.Linear(width, 4 * width, bias=False)
        self.mlp_out = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_out(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))


class Decoder(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, NORM_EPS)
        self.head_bias = nn.Parameter(torch.zeros(config.vocab_size))
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    @property
    def device(self) -> torch.device:
        return self.head_bias.device

    @torch.no_grad()
    def start_from_frequencies(self, tokens: Tensor) -> None:
        """Begin with how often each token occurs, instead of spending the first steps on learning it."""
        counts = torch.bincount(tokens, minlength=self.config.vocab_size).float() + 0.5
        self.head_bias.copy_((counts / counts.sum()).log())

    def hidden(self, tokens: Tensor, logits_to_keep: int | None = None) -> Tensor:
        """What the head makes logits of: [batch, logits_to_keep, width]."""
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        if logits_to_keep is not None:
            x = x[:, -logits_to_keep:]
        return self.norm(x)

    def forward(self, tokens: Tensor, logits_to_keep: int | None = None) -> Tensor:
        """Logits [batch, logits_to_keep, vocab_size] of the last positions; of all without the argument."""
        hidden = self.hidden(tokens, logits_to_keep)
        return F.linear(hidden, self.tokens.weight, self.head_bias)  # the head shares the embedding's weight
