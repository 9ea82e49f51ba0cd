"""How large a checkpoint will be, from shapes alone."""

from collections.abc import Iterable

from torch import nn

_NUMBER_BYTES = 4
"""Checkpoints hold numbers of 32 bits, whatever the model computes with."""


def checkpoint_bytes(parameters: Iterable[nn.Parameter], *, num_moments: int, keeps_average: bool) -> int:
    """Bytes of a checkpoint's tensors: of what trains weight, moments and average, of what does not the weight.

    Headers, `state.json` and buffers are left out, and Adafactor's factored moments are counted as if they were whole.

    Args:
        parameters: of the model, tied ones once; on any device, and whole or ZeRO 3's pieces.
        num_moments: tensors that the optimizer keeps for each parameter.
        keeps_average: whether there is a moving average of the weights.
    """
    numels = {True: 0, False: 0}
    for parameter in parameters:
        numels[parameter.requires_grad] += getattr(parameter, "ds_numel", parameter.numel())
    return _NUMBER_BYTES * ((1 + num_moments + keeps_average) * numels[True] + numels[False])
