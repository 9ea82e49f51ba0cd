"""The output head: decoder states to logits, or straight to the loss without ever holding the logits of a whole batch."""

from dataclasses import dataclass
from typing import overload

from torch import Tensor

from spade_t5.layers.projection import Projection
from spade_t5.ops import linear_cross_entropy_with_token_losses


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLossConfig:
    """Additions to the cross-entropy of the target tokens; training has them, evaluation leaves them out."""

    z_loss: float = 0.0
    """Coefficient of log(sum of exp(logits))^2, which keeps logits from drifting; T5X uses 1e-4."""
    label_smoothing: float = 0.0
    """Probability spread evenly over the vocabulary."""

    def __post_init__(self) -> None:
        """Checks the ranges."""
        if self.z_loss < 0.0:
            raise ValueError(f"z_loss: {self.z_loss} must not be negative; 0 switches it off")
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(f"label_smoothing: {self.label_smoothing} must be at least 0 and below 1")


class LanguageModelHead(Projection):
    """Map from decoder states to the vocabulary."""

    @overload
    def forward(self, input: Tensor) -> Tensor: ...

    @overload
    def forward(self, input: Tensor, labels_BT: Tensor, loss: TokenLossConfig) -> tuple[Tensor, Tensor]: ...

    def forward(
        self, input: Tensor, labels_BT: Tensor | None = None, loss: TokenLossConfig | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits, or the loss of labels.

        Args:
            input: decoder states (B, T, D).
            labels_BT: target ids, -100 = ignored; only with `loss`.
            loss: compute the loss instead of logits.

        Returns:
            logits (B, T, V); with `loss` the sum over the labels that are not ignored, a float32 scalar, and what it sums,
            (B, T) float32 without a gradient, 0 where a label is ignored.
        """
        if loss is None or labels_BT is None:
            return super().forward(input)
        return linear_cross_entropy_with_token_losses(
            input,
            self.weight,
            labels_BT,
            z_loss=loss.z_loss,
            label_smoothing=loss.label_smoothing,
        )
