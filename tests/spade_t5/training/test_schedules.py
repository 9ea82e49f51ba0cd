"""Learning-rate schedules against their formulas, at the warm-up's edge and at the end."""

import math

import pytest

from spade_t5.testing import documented
from spade_t5.training.config import TrainingConfig
from spade_t5.training.schedules import (
    ConstantSchedule,
    CosineSchedule,
    InverseSqrtSchedule,
    LinearSchedule,
    Schedule,
    WSDSchedule,
)


@pytest.mark.parametrize(
    "schedule",
    [
        ConstantSchedule(warmup_steps=4),
        LinearSchedule(warmup_steps=4),
        CosineSchedule(warmup_steps=4),
        WSDSchedule(warmup_steps=4, decay_share=0.5),
    ],
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


@pytest.mark.parametrize(
    ("shape", "quarter", "half"),
    [
        ("linear", 0.8, 0.6),
        ("cosine", 0.2 + 0.4 * (1 + math.sqrt(0.5)), 0.6),
        ("1-sqrt", 0.6, 1 - 0.8 * math.sqrt(0.5)),
    ],
)
def test_wsd_is_flat_and_then_falls_in_its_shape(shape: str, quarter: float, half: float) -> None:
    schedule = WSDSchedule(warmup_steps=2, decay_steps=4, shape=shape, final_factor=0.2)  # type: ignore[arg-type]
    factors = [schedule.factor(step, 10) for step in range(1, 11)]
    assert factors[:6] == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert factors[6:8] == pytest.approx([quarter, half])
    assert factors[9] == pytest.approx(0.2)
    assert factors[6:] == sorted(factors[6:], reverse=True)


@pytest.mark.parametrize(
    ("steps", "values", "field"),
    [
        (100, {"warmup_steps": 10, "decay_steps": 1000}, "decay_steps: 1000 is a decay of 1000 steps"),
        (100, {"warmup_steps": 10, "decay_steps": 91}, "decay_steps: 91 is a decay of 91 steps"),
        (100, {"warmup_steps": 30, "decay_share": 0.8}, "decay_share: 0.8 is a decay of 80 steps"),
        (5, {"decay_steps": 6}, "decay_steps: 6 is a decay of 6 steps"),
    ],
)
def test_a_decay_that_does_not_fit_behind_the_warm_up_is_refused(
    steps: int, values: dict[str, float], field: str
) -> None:
    sizes = {"global_batch_rows": 1, "micro_batch_rows": 1}
    with pytest.raises(ValueError, match=f"schedule.{field}") as caught:
        TrainingConfig(steps=steps, schedule=WSDSchedule(**values), **sizes)  # type: ignore[arg-type]
    documented(str(caught.value))
    enough = int(str(caught.value).rpartition(" ")[2])
    if "decay_steps" in values:
        TrainingConfig(steps=enough, schedule=WSDSchedule(**values), **sizes)  # type: ignore[arg-type]


def test_a_decay_may_begin_where_the_warm_up_ends() -> None:
    for schedule in (
        WSDSchedule(warmup_steps=10, decay_steps=90),
        WSDSchedule(decay_share=1),
        WSDSchedule(warmup_steps=200),
    ):
        TrainingConfig(steps=100, global_batch_rows=1, micro_batch_rows=1, schedule=schedule)


def test_wsd_decays_over_a_share_or_not_at_all() -> None:
    share = WSDSchedule(decay_share=0.2)
    assert [share.factor(step, 100) < 1 for step in (80, 81, 100)] == [False, True, True]
    assert {WSDSchedule().factor(step, 10) for step in (1, 10)} == {1.0}
    # a warm-up that reaches into the decay takes part in it
    assert WSDSchedule(warmup_steps=8, decay_steps=4, shape="linear").factor(8, 8) == 0.0
    for values, message in (
        ({"decay_steps": 3, "decay_share": 0.1}, "decay_steps: has no effect beside decay_share"),
        ({"decay_steps": 0}, "decay_steps: 0 must be at least 1"),
        ({"decay_share": 1.5}, "decay_share: 1.5 must be above 0 and at most 1"),
    ):
        with pytest.raises(ValueError, match=message):
            WSDSchedule(**values)
