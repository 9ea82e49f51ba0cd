"""Softmax cross-entropy of one row of logits on a GPU, one program a row, with the gradient in place of the logits.

The first pass finds the logarithm of the softmax's denominator in one reading (online), the second, from cache, writes
the gradient. Letters: V vocabulary.
"""

import triton
import triton.language as tl


@triton.jit
def cross_entropy_kernel(
    p_logits,
    p_labels,
    p_losses,
    stride_logits,
    V,
    ignore_index,
    z_loss,
    label_smoothing,
    HAS_SMOOTHING: tl.constexpr,
    HAS_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Loss = lse - (1-s) z_y - s mean(z) + c lse^2;   dz = p (1 + 2 c lse) - (1-s) [v = y] - s / V, over the logits."""
    i_row = tl.program_id(0).to(tl.int64)
    p_row = p_logits + i_row * stride_logits
    o_block = tl.arange(0, BLOCK)
    label = tl.load(p_labels + i_row)
    is_counted = label != ignore_index
    if is_counted:
        # Read before the reductions, at which warps wait for each other: later, a warp that is ahead may have written the
        # gradient here. A label outside of the vocabulary makes the loss NaN; it must not read what lies there.
        is_valid = (label >= 0) & (label < V)
        target = tl.load(p_row + label, mask=is_valid, other=float("nan")).to(tl.float32)
        maximum = tl.full((), float("-inf"), tl.float32)
        total = tl.zeros((), tl.float32)
        logit_sum = tl.zeros((), tl.float32)
        for first in range(0, V, BLOCK):
            o_v = first + o_block
            b_z = tl.load(p_row + o_v, mask=o_v < V, other=float("-inf")).to(tl.float32)
            new_maximum = tl.maximum(maximum, tl.max(b_z, axis=0))
            total = total * tl.exp(maximum - new_maximum) + tl.sum(tl.exp(b_z - new_maximum), axis=0)
            maximum = new_maximum
            if HAS_SMOOTHING:
                logit_sum += tl.sum(tl.where(o_v < V, b_z, 0.0), axis=0)
        lse = maximum + tl.log(total)
        loss = lse - target + z_loss * lse * lse
        if HAS_SMOOTHING:
            loss += label_smoothing * (target - logit_sum / V)
        tl.store(p_losses + i_row, loss)
        if HAS_GRADIENT:
            slope = z_loss * lse * 2.0 + 1.0
            for first in range(0, V, BLOCK):
                o_v = first + o_block
                b_z = tl.load(p_row + o_v, mask=o_v < V, other=float("-inf")).to(tl.float32)
                b_dz = tl.exp(b_z - lse) * slope - tl.where(o_v == label, 1.0 - label_smoothing, 0.0)
                if HAS_SMOOTHING:
                    b_dz -= label_smoothing / V
                tl.store(p_row + o_v, b_dz.to(p_logits.dtype.element_ty), mask=o_v < V)
    else:
        tl.store(p_losses + i_row, 0.0)
        if HAS_GRADIENT:
            for first in range(0, V, BLOCK):
                o_v = first + o_block
                tl.store(p_row + o_v, tl.zeros([BLOCK], p_logits.dtype.element_ty), mask=o_v < V)
