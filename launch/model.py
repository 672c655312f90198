"""Two small byte-level language models: a GPT, and an LSTM in the manner of AWD-LSTM.

Both map bytes to the logits of the byte that follows each, one row for each: F.cross_entropy takes rows, and FSDP2
warns of a model that returns a view, which nn.Linear does where there are more than two dims.
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
        self.head_width = width // heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)  # head by head, so that ranks can have whole heads
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        # Under tensor parallelism, H is the number of heads that this rank has.
        q, k, v = self.qkv(x).unflatten(-1, (-1, 3, self.head_width)).permute(3, 0, 2, 1, 4)  # each (B, H, T, D/H)
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

    def forward(self, x: Tensor) -> Tensor:  # (B, T) bytes -> (B·T, V) logits
        where = torch.arange(x.shape[1], device=x.device)  # (T,)
        y = self.norm(self.blocks(self.byte(x) + self.position(where)))  # (B, T, D)
        return self.head(y.flatten(0, 1))


class LockedDropout(nn.Module):
    """Dropout with one mask for all positions of a sequence."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout

    def forward(self, y: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        return y * F.dropout(torch.ones_like(y[:, :1]), self.dropout, self.training)  # (B, 1, D)


class DroppedLSTM(nn.Module):
    """One layer of an LSTM, with dropout on its hidden-to-hidden weights."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.lstm = nn.LSTM(width, width, batch_first=True)

    def forward(self, y: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        weight = F.dropout(self.lstm.get_parameter("weight_hh_l0"), self.dropout, self.training)  # (4D, D)
        return torch.func.functional_call(self.lstm, {"weight_hh_l0": weight}, (y,))[0]


class LSTM(nn.Module):
    """The AWD-LSTM of Merity, Keskar and Socher (2017), which was trained with plain SGD and averaged at the end.

    What makes it one: reading and writing share one matrix; dropout falls on the hidden-to-hidden weights, and on the
    activations with one mask for all positions of a sequence.
    """

    def __init__(self, width: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.byte = nn.Embedding(VOCABULARY, width)
        self.dropout = LockedDropout(dropout)
        self.blocks = nn.Sequential(
            *(nn.Sequential(DroppedLSTM(width, dropout), LockedDropout(dropout)) for _ in range(layers))
        )
        self.head = nn.Linear(width, VOCABULARY)
        self.head.weight = self.byte.weight
        nn.init.uniform_(self.byte.weight, -0.1, 0.1)

    def forward(self, x: Tensor) -> Tensor:  # (B, T) bytes -> (B·T, V) logits
        y = self.blocks(self.dropout(self.byte(x)))  # (B, T, D)
        return self.head(y.flatten(0, 1))


def build_model(kind: str, *, width: int, layers: int, heads: int, context: int, dropout: float) -> nn.Module:
    """The model named on the command line, its weights drawn from torch's current random state."""
    return GPT(width, layers, heads, context) if kind == "gpt" else LSTM(width, layers, dropout)
