"""Rows of random tokens with targets of different lengths, and a very small model to train on them."""

from collections.abc import Callable

import pytest

from spade_t5.testing.trainers import RandomRows, tiny_trainer
from spade_t5.training.engine import Trainer


@pytest.fixture
def random_rows() -> type[RandomRows]:
    return RandomRows


@pytest.fixture
def make_trainer() -> Callable[..., Trainer]:
    """Makes a trainer of a fresh model; `model` goes over the fields of the model, the rest over those of the engine."""
    return tiny_trainer
