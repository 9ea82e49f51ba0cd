"""The counter that a run holds: made once for a model and a machine, asked for every batch."""

from typing import NamedTuple

import torch

from spade_t5.configuration import SpadeT5Config
from spade_t5.flops.executed import Machine, executed_flops
from spade_t5.flops.layout import BatchLayout
from spade_t5.flops.model import model_flops
from spade_t5.training.data import Batch
from spade_t5.training.recomputation import Recomputation


class Flops(NamedTuple):
    """Of one batch, forward and backward pass."""

    model: float
    """What the mathematics needs for the tokens that are there."""
    executed: float
    """What the backend multiplies."""


class FlopsCounter:
    """Counts the FLOPs of batches of one model, by numbers alone: no tensor is multiplied."""

    def __init__(
        self,
        config: SpadeT5Config,
        *,
        backend: str,
        device_type: str = "cpu",
        dtype: torch.dtype = torch.float32,
        recomputation: Recomputation = "none",
        has_decoder: bool = True,
        architecture: str = "sm_90",
    ) -> None:
        """Takes what decides the numbers besides the batch.

        Args:
            config: of the model.
            backend: that the ops run on, "torch", "triton" or "naive": `spade_t5.ops.backend_in_use`.
            device_type: "cpu" or "cuda".
            dtype: of the matrix products, bfloat16 under autocast too.
            recomputation: activation checkpointing, what the backward pass computes again.
            has_decoder: the model is an encoder-decoder and labels are target tokens; else it classifies documents.
            architecture: of the GPU, such as "sm_90"; it decides the tiles of the Triton kernels.
        """
        self.config, self.has_decoder = config, has_decoder
        self._machine = Machine(
            backend=backend,
            device_type=device_type,
            dtype=dtype,
            recomputation=recomputation,
            architecture=architecture,
        )

    def batch(self, batch: Batch) -> Flops:
        """FLOPs of one micro-batch, which lies on the CPU: a GPU would be waited for."""
        return self.layout(BatchLayout.of(batch, has_decoder=self.has_decoder))

    def layout(self, layout: BatchLayout) -> Flops:
        """FLOPs of a micro-batch that is described by its lengths."""
        return Flops(
            model_flops(self.config, layout, has_decoder=self.has_decoder),
            executed_flops(self.config, layout, self._machine, has_decoder=self.has_decoder),
        )
