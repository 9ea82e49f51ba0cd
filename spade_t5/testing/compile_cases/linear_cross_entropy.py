"""Linear cross-entropy: the row kernel by dtype of the logits, with each term, with and without gradient."""

from collections.abc import Callable

import torch

from spade_t5.kernels.linear_cross_entropy.terms import LossTerms
from spade_t5.kernels.linear_cross_entropy.triton_op import linear_cross_entropy_triton


def _call(
    dtype: torch.dtype, vocab_size: int = 32128, label_smoothing: float = 0.0, requires_grad: bool = True
) -> None:
    x = torch.zeros(4, 16, dtype=dtype, requires_grad=requires_grad)
    weight = torch.zeros(vocab_size, 16, dtype=dtype)
    terms = LossTerms(z_loss=1e-4, label_smoothing=label_smoothing, ignore_index=-100)
    linear_cross_entropy_triton(x, weight, torch.zeros(4, dtype=torch.int64), terms)


CASES: dict[str, Callable[[], None]] = {
    "bfloat16": lambda: _call(torch.bfloat16),
    "float16": lambda: _call(torch.float16),
    "float32": lambda: _call(torch.float32),
    "smoothed": lambda: _call(torch.bfloat16, label_smoothing=0.1),
    "smoothed/float32": lambda: _call(torch.float32, label_smoothing=0.1),
    "without_gradient": lambda: _call(torch.bfloat16, requires_grad=False),
    "odd_vocabulary": lambda: _call(torch.bfloat16, vocab_size=32101),
}
