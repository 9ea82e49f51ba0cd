"""Segment arithmetic on the example of the module's documentation."""

import torch

from spade_t5.layers.segments import chunk_segments, segment_positions, segments_from_mask, shift_right

SEGMENTS = torch.tensor([[1, 1, 1, 1, 1, 2, 2, 0, 3, 3]])


def test_positions_restart_at_every_document() -> None:
    assert segment_positions(SEGMENTS).tolist() == [[0, 1, 2, 3, 4, 0, 1, 0, 0, 1]]


def test_chunks_are_counted_from_the_first_token_of_each_document() -> None:
    assert chunk_segments(SEGMENTS, 2).tolist() == [[1, 1, 2, 2, 3, 4, 4, 0, 6, 6]]
    assert chunk_segments(SEGMENTS, 100).tolist() == [[1, 1, 1, 1, 1, 2, 2, 0, 4, 4]]


def test_chunks_never_join_documents() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 9, (40,), generator=generator)
    segments = torch.repeat_interleave(torch.arange(1, 41), lengths)[None]
    chunks = chunk_segments(segments, 3)
    starts = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)[:-1]])
    position = torch.arange(int(lengths.sum())) - torch.repeat_interleave(starts, lengths)
    expected = segments[0] * 100 + position // 3
    assert torch.equal(chunks[0][:, None] == chunks[0][None, :], expected[:, None] == expected[None, :])


def test_labels_are_shifted_inside_each_document() -> None:
    labels = torch.tensor([[11, 12, 13, 14, 15, 21, 22, -100, 31, 32]])
    shifted = shift_right(labels, start_id=9, pad_id=0, segment_ids_BT=SEGMENTS)
    assert shifted.tolist() == [[9, 11, 12, 13, 14, 9, 21, 0, 9, 31]]


def test_one_document_a_row() -> None:
    labels = torch.tensor([[11, 12, -100, -100]])
    assert shift_right(labels, start_id=9, pad_id=0).tolist() == [[9, 11, 12, 0]]


def test_masks_become_segments() -> None:
    assert segments_from_mask(None) is None
    assert segments_from_mask(torch.ones(2, 3)) is None
    assert segments_from_mask(torch.tensor([[1, 1, 0], [0, 1, 1]])).tolist() == [[1, 1, 0], [0, 1, 1]]
