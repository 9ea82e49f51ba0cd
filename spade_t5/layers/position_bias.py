"""Positions: T5's relative bias as a vector over offsets, and learned absolute positions.

The attention op takes one bias per head and offset, (H, 2R+1) with offset o at column R + o, so no (L, L) tensor exists
and the bucket arithmetic stays here. Buckets follow T5 (arXiv:1910.10683): half of a side's buckets are exact
distances, the other half grow logarithmically up to `max_distance`.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import Parameter


def relative_position_buckets(offsets: Tensor, *, bidirectional: bool, num_buckets: int, max_distance: int) -> Tensor:
    """Bucket number of each offset (key position minus query position).

    With 32 buckets and distance 128, bidirectional: offset 0 -> 0, -1 -> 1, -7 -> 7, -8 -> 8, -200 -> 15, +1 -> 17.

    Args:
        offsets: int64 tensor of any shape, in tokens.
        bidirectional: keys to the right have their own buckets (encoder); else they all fall into bucket 0 (decoder).
        num_buckets: buckets in all.
        max_distance: distance from which on the last bucket is used, in tokens.

    Returns:
        int64 tensor of the same shape, values in [0, num_buckets).
    """
    if bidirectional:
        num_buckets //= 2
        side = (offsets > 0).long() * num_buckets
        distances = offsets.abs()
    else:
        side = torch.zeros_like(offsets)
        distances = (-offsets).clamp(min=0)
    num_exact = num_buckets // 2
    # float32 on purpose: the edges of the logarithmic buckets are where T5's float32 arithmetic puts them
    log_ratio = torch.log(distances.clamp(min=num_exact).float() / num_exact) / math.log(max_distance / num_exact)
    far = (num_exact + (log_ratio * (num_buckets - num_exact)).long()).clamp(max=num_buckets - 1)
    return side + torch.where(distances < num_exact, distances, far)


class RelativeAttentionBias(nn.Module):
    """Learned bias of attention scores by bucketed offset: one row per bucket, one column per head."""

    def __init__(self, num_heads: int, *, num_buckets: int, max_distance: int, bidirectional: bool, std: float) -> None:
        super().__init__()
        self.num_buckets = num_buckets
        self.max_distance = max_distance
        self.bidirectional = bidirectional
        self.std = std
        self.weight = Parameter(torch.empty(num_buckets, num_heads))
        # built at first use and keyed by device: a buffer would be garbage after loading on the meta device
        self._bucket_tables: dict[tuple[torch.device, int], Tensor] = {}
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the initial table."""
        nn.init.normal_(self.weight, mean=0.0, std=self.std)

    def forward(self, reach_tokens: int) -> Tensor:
        """Bias of every offset from -reach to +reach, as the attention op takes it.

        Args:
            reach_tokens: R; farther offsets take the value at the ends.

        Returns:
            (H, 2R+1), fp32 (fp64 in a double model).
        """
        table = F.embedding(self._buckets(reach_tokens, self.weight.device), self.weight)
        return table.t().to(torch.promote_types(self.weight.dtype, torch.float32))

    def _buckets(self, reach_tokens: int, device: torch.device) -> Tensor:
        key = (device, reach_tokens)
        if key not in self._bucket_tables:
            offsets = torch.arange(-reach_tokens, reach_tokens + 1, device="cpu")
            buckets = relative_position_buckets(
                offsets,
                bidirectional=self.bidirectional,
                num_buckets=self.num_buckets,
                max_distance=self.max_distance,
            )
            self._bucket_tables[key] = buckets.to(device)
        return self._bucket_tables[key]


class PositionEmbedding(nn.Module):
    """Learned absolute positions, counted from the first token of each document."""

    def __init__(self, num_positions: int, d_model: int) -> None:
        super().__init__()
        self.num_positions = num_positions
        self.weight = Parameter(torch.empty(num_positions, d_model))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the initial table."""
        nn.init.normal_(self.weight, mean=0.0, std=self.weight.shape[1] ** -0.5)

    def forward(self, positions_BT: Tensor) -> Tensor:
        """Embeddings (B, T, D) of int64 positions below `num_positions`."""
        return F.embedding(positions_BT, self.weight)
