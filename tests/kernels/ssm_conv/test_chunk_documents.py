"""Masks of packed rows: the worked example of the module, and edges that fall on edges of chunks."""

import torch
from torch import Tensor

from spade_t5.kernels.ssm_conv.chunk_documents import chunk_documents


def masks(*rows: list[int]) -> list[Tensor]:
    return list(chunk_documents(torch.tensor(rows), 4))


def assert_masks(actual: list[Tensor], piece: list, num_pieces: list, is_linked: list) -> None:
    for a, e in zip(actual, (piece, num_pieces, is_linked), strict=True):
        assert a.tolist() == e


def test_the_example() -> None:
    assert_masks(masks([1, 1, 2, 0, 2, 2, 3, 0]), [[[0, 0, 1, -1], [0, 0, 1, -1]]], [[2, 2]], [[0, 1]])


def test_edges_of_documents_at_edges_of_chunks() -> None:
    assert_masks(masks([1, 1, 1, 1, 2, 2, 2, 2]), [[[0] * 4, [0] * 4]], [[1, 1]], [[0, 0]])


def test_row_that_fills_no_chunk_and_padding_in_front() -> None:
    # Padding in front belongs to no document, so that the first one begins with a piece of its own.
    assert_masks(
        masks([0, 1, 1, 1, 1], [0, 0, 0, 0, 0]),
        [[[-1, 1, 1, 1], [0, -1, -1, -1]], [[-1] * 4, [-1] * 4]],
        [[2, 1], [1, 1]],
        [[0, 1], [0, 1]],
    )


def test_nothing_is_read_back() -> None:
    """Fake tensors hold no values: an answer that depends on one would fail."""
    with torch._subclasses.FakeTensorMode():
        documents = chunk_documents(torch.zeros(2, 9, dtype=torch.int64), 4)
    assert [tuple(x.shape) for x in documents] == [(2, 3, 4), (2, 3), (2, 3)]
