"""Linear map and cross-entropy with all logits at once, differentiated by autograd: the reference for every backend."""

import torch
import torch.nn.functional as F
from torch import Tensor

from spade_t5.kernels.linear_cross_entropy.terms import LossTerms


def linear_cross_entropy_naive(x: Tensor, weight: Tensor, labels: Tensor, terms: LossTerms) -> Tensor:
    """Sum of the losses of the labels that count; arguments and result as of `linear_cross_entropy`, unchecked."""
    logits = F.linear(x, weight).flatten(0, -2)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    labels = labels.flatten()
    loss = F.cross_entropy(
        logits, labels, reduction="sum", label_smoothing=terms.label_smoothing, ignore_index=terms.ignore_index
    )
    z_loss = terms.z_loss * torch.logsumexp(logits, dim=-1).square()
    return loss + z_loss.masked_fill(labels == terms.ignore_index, 0.0).sum()
