"""Learning-rate schedules against their formulas, at the warm-up's edge and at the end."""

import math

import pytest

from spade_t5.training.schedules import ConstantSchedule, CosineSchedule, InverseSqrtSchedule, LinearSchedule, Schedule


@pytest.mark.parametrize(
    "schedule", [ConstantSchedule(warmup_steps=4), LinearSchedule(warmup_steps=4), CosineSchedule(warmup_steps=4)]
)
def test_warm_up_is_linear_and_ends_at_one(schedule: Schedule) -> None:
    assert [schedule.factor(step, 20) for step in (1, 2, 3, 4)] == [0.25, 0.5, 0.75, 1.0]


def test_constant() -> None:
    assert ConstantSchedule().factor(1, 10) == ConstantSchedule().factor(10, 10) == 1.0


def test_linear_reaches_its_final_factor() -> None:
    schedule = LinearSchedule(warmup_steps=10, final_factor=0.1)
    assert schedule.factor(60, 110) == pytest.approx(0.55)
    assert schedule.factor(110, 110) == pytest.approx(0.1)


def test_cosine_is_half_way_in_the_middle() -> None:
    schedule = CosineSchedule(warmup_steps=10, final_factor=0.2)
    assert schedule.factor(60, 110) == pytest.approx(0.6)
    assert schedule.factor(110, 110) == pytest.approx(0.2)


def test_inverse_sqrt_is_t5s_with_a_peak_of_one_hundredth() -> None:
    schedule = InverseSqrtSchedule(warmup_steps=10_000)
    assert 0.01 * schedule.factor(40_000, 10**6) == pytest.approx(1 / math.sqrt(40_000))
    assert schedule.factor(5_000, 10**6) == 0.5
    with pytest.raises(ValueError, match="warmup_steps: 0"):
        InverseSqrtSchedule(warmup_steps=0)
