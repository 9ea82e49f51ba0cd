"""Compares the weights that ranks hold copies of.

Data-parallel ranks hold the same parameters, and apply the same updates to them. A bit that flips in the memory of one of them goes
unnoticed: its gradients are then those of another model. Each rank adds up the bits of every tensor that it holds whole; equal tensors
have equal sums, and one flipped bit changes a sum by a power of two.
"""

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from spade_t5.training import distributed
from spade_t5.training.backend import Backend, unique_state

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def differing_ranks(backend: Backend) -> dict[str, list[int]]:
    """Ranks whose copy of a tensor is wrong, by the tensor's name; a collective call with the same result on all ranks.

    Where the optimizer's state is sharded, a copy is wrong that differs from the fp32 weights it was made from, which one rank owns.
    Otherwise the majority is right; without one all ranks are named.
    """
    tensors = dict(unique_state(backend.module))
    sums = torch.stack([_bit_sum(tensor) for tensor in tensors.values()])
    if not distributed.differs(sums):
        return {}
    sums_by_rank: list[list[int]] = distributed.gather_objects(sums.tolist())
    result = {}
    for name, copies in zip(tensors, zip(*sums_by_rank, strict=True), strict=True):
        if len(set(copies)) > 1:
            common, votes = Counter(copies).most_common(1)[0]
            has_majority = 2 * votes > len(copies)
            result[name] = [rank for rank, copy in enumerate(copies) if copy != common or not has_majority]
    if backend.is_sharded:
        result |= _wrong_copies(backend, [name for name in result if tensors[name].requires_grad])
    return dict(sorted(result.items()))


def _wrong_copies(backend: Backend, names: list[str]) -> dict[str, list[int]]:
    """Ranks whose copies of these parameters differ from the weights that the owners of their pieces step."""
    parameters = dict(backend.module.named_parameters())
    own: list[Any] = [
        (f.name, f.offset, f.numel, _bit_sum(_piece(f.flat, f.start, f.numel).to(parameters[f.name].dtype)).item())
        for f in backend.fragments()
        if f.name in names
    ]
    pieces = [piece for part in distributed.gather_objects(own) for piece in part]
    wrong = {
        name
        for name, offset, numel, bit_sum in pieces
        if _bit_sum(_piece(parameters[name], offset, numel)).item() != bit_sum
    }
    wrong_by_rank: list[Any] = distributed.gather_objects(wrong)
    ranks = {name: [rank for rank, found in enumerate(wrong_by_rank) if name in found] for name in names}
    return {name: found for name, found in ranks.items() if found}


def _piece(tensor: Tensor, start: int, numel: int) -> Tensor:
    return tensor.detach().reshape(-1)[start : start + numel]


def _bit_sum(tensor: Tensor) -> Tensor:
    """Sum of a tensor's words as integers, modulo 2^64; 0 where the tensor is not held whole (ZeRO 3)."""
    words = tensor.detach().contiguous().view(_WORDS[tensor.element_size()])
    return words.sum(dtype=torch.int64)
