import math
import random

import pytest

from spade_t5.training.spikes import SpikeDetector, SpikesConfig


def test_nothing_is_a_spike_before_the_window_is_full() -> None:
    detector = SpikeDetector(SpikesConfig(window_steps=3))
    for loss in (1.0, 2.0):
        detector.add(loss)
        assert detector.limit == math.inf
    detector.add(3.0)
    assert detector.limit == pytest.approx(2 + 6 * 1.0)


def test_only_the_window_counts_and_it_goes_on_from_a_checkpoint() -> None:
    config = SpikesConfig(window_steps=4)
    detector = SpikeDetector(config)
    for loss in (100.0, 3.0, 4.0, 5.0, 4.0):
        detector.add(loss)
    assert detector.losses == [3.0, 4.0, 5.0, 4.0]
    assert SpikeDetector(config, detector.losses).limit == detector.limit


def test_no_false_alarm_in_a_clean_run_and_the_first_bad_step_is_seen() -> None:
    draw = random.Random(0)
    detector = SpikeDetector(SpikesConfig())
    for step in range(2000):
        loss = 3 + 7 * math.exp(-step / 300) + draw.gauss(0, 0.1)
        assert loss <= detector.limit, step
        detector.add(loss)
    assert detector.limit < 4.5
