import numpy as np

from spade_t5.pretrain.hashing import distinct_keys, sample_keys


def test_keys_depend_on_seed_number_and_stream_alone() -> None:
    keys = sample_keys(7, [3, 10**12, 0], stream=0)
    assert sample_keys(7, [10**12], stream=0)[0] == keys[1]
    others = [sample_keys(8, [3], stream=0)[0], sample_keys(7, [3], stream=1)[0], sample_keys(-7, [3], stream=0)[0]]
    assert len({int(key) for key in [*keys, *others]}) == 6


def test_words_of_a_row_never_tie_and_do_not_depend_on_the_width() -> None:
    keys = sample_keys(0, np.arange(5), stream=0)
    words = distinct_keys(keys, 20_000)
    assert all(len(np.unique(row)) == 20_000 for row in words)
    np.testing.assert_array_equal(distinct_keys(keys[2:3], 100)[0], words[2, :100])


def test_words_are_spread_evenly() -> None:
    words = distinct_keys(sample_keys(1, np.arange(2000), stream=0), 64)
    # 128,000 words in 16 bins: 8,000 each, standard deviation 87.
    counts = np.bincount((words >> 28).reshape(-1), minlength=16)
    assert abs(counts - 8000).max() < 5 * 87
    # Each place is the smallest of its row equally often: 31 times, standard deviation 5.5.
    assert np.bincount(words.argmin(axis=1), minlength=64).max() < 31.25 + 5 * 5.6
