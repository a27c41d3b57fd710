"""A small language model: a decoder over bytes, of the size that fits two cores."""

from __future__ import annotations

import torch
from torch import Tensor, nn

NAME = "transformer"
BYTES = 256
WIDTH, HEADS, BLOCKS = 384, 6, 6  # nanoGPT's for a book's characters
TOKENS = 64  # of a sequence


class Decoder(nn.Module):
    """10.8M parameters: 6 blocks of attention and MLP, each behind a LayerNorm; no dropout.

    Takes (N, T) int64 bytes, T at most TOKENS, and returns (N, T, 256) logits of the next ones.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = nn.Embedding(BYTES, WIDTH)
        self.places = nn.Embedding(TOKENS, WIDTH)
        block = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True
        )
        norm = nn.LayerNorm(WIDTH)
        self.blocks = nn.TransformerEncoder(block, BLOCKS, norm, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, BYTES, bias=False)
        self.register_buffer("hidden", torch.ones(TOKENS, TOKENS).triu(1).bool(), persistent=False)

    def forward(self, text: Tensor) -> Tensor:
        length = text.shape[1]
        x = self.bytes(text) + self.places.weight[:length]
        hidden = self.get_buffer("hidden")[:length, :length]
        logits: Tensor = self.head(self.blocks(x, mask=hidden, is_causal=True))
        return logits


def decoder(dtype: torch.dtype) -> nn.Module:
    """A randomly initialised one."""
    torch.manual_seed(0)
    return Decoder().to(dtype)
