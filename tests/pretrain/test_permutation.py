import numpy as np
import pytest

from spade_t5.pretrain.permutation import permute


@pytest.mark.parametrize("size", [1, 2, 3, 10, 97, 1000, 4096])
def test_every_number_occurs_once(size: int) -> None:
    assert sorted(permute(np.arange(size), size, seed=3).tolist()) == list(range(size))


def test_order_depends_on_seed_and_epoch_and_not_on_the_batch() -> None:
    whole = permute(np.arange(1000), 1000, seed=3)
    assert permute([17], 1000, seed=3)[0] == whole[17]
    for other in (
        permute(np.arange(1000), 1000, seed=4),
        permute(np.arange(1000), 1000, seed=3, epoch=1),
        np.arange(1000),
    ):
        assert (other == whole).mean() < 0.02


def test_places_are_spread_evenly() -> None:
    # Where the first ten of 100 go over 2,000 seeds: 200 in each tenth, standard deviation 13.
    counts = np.zeros((10, 10))
    for seed in range(2000):
        places = permute(np.arange(10), 100, seed=seed)
        counts[np.arange(10), places // 10] += 1
    assert abs(counts - 200).max() < 5 * 13.5


def test_a_billion_things_need_no_array() -> None:
    images = permute(np.arange(10**9 - 1000, 10**9), 10**9, seed=0)
    assert len(np.unique(images)) == 1000
    assert images.min() >= 0
    assert images.max() < 10**9


def test_index_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="indices"):
        permute([10], 10, seed=0)
