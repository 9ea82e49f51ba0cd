"""The constants of the loss, which travel together through every backend."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LossTerms:
    """See `linear_cross_entropy` for what each does to the loss."""

    z_loss: float
    """Coefficient of the squared logarithm of the softmax's denominator."""
    label_smoothing: float
    """Probability mass spread evenly over the vocabulary."""
    ignore_index: int
    """Label of the rows that do not count."""
