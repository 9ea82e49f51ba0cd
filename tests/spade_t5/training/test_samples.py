import random

import torch

from spade_t5.training.samples import digest, digest_parts, sample_numbers


def test_numbers_leave_out_absent_documents_and_batches_without_numbers() -> None:
    batches = [{"sample_numbers": torch.tensor([[7, -1], [3, 2]])}, {"input_ids": torch.zeros(2, 2)}]
    assert sample_numbers(batches) == [2, 3, 7]
    assert sample_numbers(batches[1:]) == []


def test_the_digest_does_not_depend_on_how_ranks_share_the_samples() -> None:
    draw = random.Random(1)
    numbers = [draw.randrange(10**12) for _ in range(1000)]
    shares = [digest_parts(numbers[rank::7]) for rank in range(7)]
    assert digest(map(sum, zip(*shares, strict=True))) == digest(digest_parts(numbers))


def test_one_other_sample_changes_the_digest() -> None:
    numbers = list(range(100))
    digests = {digest(digest_parts([*numbers[:i], 1000 + i, *numbers[i + 1 :]])) for i in range(100)}
    digests |= {digest(digest_parts(numbers)), digest(digest_parts(numbers[1:])), digest(digest_parts([]))}
    assert len(digests) == 103
    assert digest(digest_parts([])) == "0" * 32
