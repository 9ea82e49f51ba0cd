"""The counter of a training run, from its settings and the machine it is on."""

import torch

from spade_t5.configuration import SpadeT5Config
from spade_t5.devices import match_accelerator
from spade_t5.flops.counter import FlopsCounter
from spade_t5.ops import backend_in_use
from spade_t5.training import distributed
from spade_t5.training.config import TrainingConfig


def counter_of_run(config: SpadeT5Config, training: TrainingConfig, *, has_decoder: bool) -> FlopsCounter:
    """What counts the FLOPs of the batches of a run, on this rank.

    Args:
        config: of the model.
        training: of the run, whose ranks have started.
        has_decoder: the model is an encoder-decoder; else it classifies documents.
    """
    device = distributed.device()
    found = match_accelerator(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    known = {} if found is None else {"architecture": found.architecture}
    return FlopsCounter(
        config,
        backend=backend_in_use(device=device),
        device_type=device.type,
        dtype=torch.float32 if training.precision == "fp32" else torch.bfloat16,
        recomputation=training.recomputation,
        has_decoder=has_decoder,
        **known,
    )
