"""An exponential moving average of the trained weights, sharded as the optimizer's state is."""

from collections.abc import Iterable

import torch
from torch import Tensor

from spade_t5.training.optimizers import Fragment


class WeightAverage:
    """Averages of the fp32 tensors that the optimizer steps.

    average <- decay * average + (1 - decay) * weights, after each step that was applied
    """

    def __init__(self, fragments: Iterable[Fragment], decay: float) -> None:
        """Starts from the weights as they are."""
        self._decay = decay
        self._pairs: dict[int, tuple[Tensor, Tensor]] = {}
        for fragment in fragments:
            if id(fragment.flat) not in self._pairs:
                self._pairs[id(fragment.flat)] = (fragment.flat, fragment.flat.detach().clone())

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the weights of one more step."""
        averages = [average for _, average in self._pairs.values()]
        torch._foreach_lerp_(averages, [flat.detach() for flat, _ in self._pairs.values()], 1 - self._decay)

    def flat(self, fragment: Fragment) -> Tensor:
        """The average of `fragment.flat`, of the same shape."""
        return self._pairs[id(fragment.flat)][1]
