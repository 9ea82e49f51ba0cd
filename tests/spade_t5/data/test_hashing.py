import numpy as np

from spade_t5.data.hashing import mix64


def test_mix64_is_splitmix64() -> None:
    # First outputs of the published generator from seed 1234567.
    golden = 0x9E3779B97F4A7C15
    states = [(1234567 + golden * step) % 2**64 for step in (1, 2, 3)]
    assert mix64(np.array(states, dtype=np.uint64)).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]
