"""Gated GELU with PyTorch's own gelu.

There is no gradient of our own: on a CPU the three passes of autograd's are already bounded by the tanh, which
recomputing would double.
"""

import torch.nn.functional as F
from torch import Tensor


def gated_gelu_eager(a: Tensor, b: Tensor) -> Tensor:
    """H = gelu_tanh(a) * b; arguments and result as of `gated_gelu`, unchecked."""
    return F.gelu(a, approximate="tanh") * b
