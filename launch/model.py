"""Two small byte-level language models: a GPT, and an LSTM in the manner of AWD-LSTM.

Both map bytes to the logits of the byte that follows each.
In comments on shapes: B sequences, T positions, D width, H heads, V = 256 bytes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 256  # every byte is a token: no tokenizer, and any text can be read


class Attention(nn.Module):
    """Causal self-attention: each position looks at itself and at what came before."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, H, T, D/H)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, D/H)
        return self.out(y.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    """One transformer layer: attention and a perceptron, each added to a residual stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(width), Attention(width, heads))
        self.perceptron = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        x = x + self.attention(x)
        return x + self.perceptron(x)


class GPT(nn.Module):
    """A decoder-only transformer with learned positions."""

    def __init__(self, width: int, layers: int, heads: int, context: int) -> None:
        super().__init__()
        self.byte = nn.Embedding(VOCABULARY, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:  # (B, T) bytes -> (B, T, V) logits
        where = torch.arange(x.shape[1], device=x.device)  # (T,)
        return self.head(self.norm(self.blocks(self.byte(x) + self.position(where))))


class LSTM(nn.Module):
    """The AWD-LSTM of Merity, Keskar and Socher (2017), which was trained with plain SGD and averaged at the end.

    What makes it one: reading and writing share one matrix; dropout falls on the hidden-to-hidden weights, and on the
    activations with one mask for all positions of a sequence.
    """

    def __init__(self, width: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.byte = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList(nn.LSTM(width, width, batch_first=True) for _ in range(layers))
        self.head = nn.Linear(width, VOCABULARY)
        self.head.weight = self.byte.weight
        nn.init.uniform_(self.byte.weight, -0.1, 0.1)

    def forward(self, x: Tensor) -> Tensor:  # (B, T) bytes -> (B, T, V) logits
        y = self.locked_dropout(self.byte(x))  # (B, T, D)
        for lstm in self.layers:
            dropped = F.dropout(lstm.weight_hh_l0, self.dropout, self.training)  # (4D, D)
            y, _ = torch.func.functional_call(lstm, {"weight_hh_l0": dropped}, (y,))
            y = self.locked_dropout(y)
        return self.head(y)

    def locked_dropout(self, y: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        mask = F.dropout(torch.ones_like(y[:, :1]), self.dropout, self.training)  # (B, 1, D)
        return y * mask


def build_model(kind: str, *, width: int, layers: int, heads: int, context: int, dropout: float) -> nn.Module:
    """The model named on the command line, its weights drawn from torch's current random state."""
    return GPT(width, layers, heads, context) if kind == "gpt" else LSTM(width, layers, dropout)
