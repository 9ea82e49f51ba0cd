"""How many FLOPs (2 a multiply-add) a batch costs, forward and backward, counted two ways.

*Model FLOPs* are what the mathematics needs for the tokens that are there, whatever computes it: they measure progress, and MFU is made of
them. *Executed FLOPs* are what a backend multiplies for the same batch: padding, blocks of a window that the mask then hides, scores that
the backward pass computes again, layers that activation checkpointing computes again. They measure the machine, and HFU is made of them.

Counted are matrix products, attention and the SSM's convolution; norms, softmax, activations and the optimizer are not, as is usual. With
S, T real source and target tokens, Y terms of the loss, P_e, P_d, P_x the pairs (query, key) that the masks of encoder, decoder and
cross-attention admit, D d_model, I heads x d_kv, W = 3 D d_ff (gated) or 2 D d_ff weights of a feed-forward block, V vocabulary, the forward
pass takes

    an encoder layer     2 S (4 D I + W) + 4 I P_e        a global layer adds 4 S D^2 for concat and gated fusion, and its convolution
    a decoder layer      2 T (6 D I + W) + 4 S D I + 4 I (P_d + P_x)
    the output head      2 Y D V
    a classifier         2 Y D (D + labels), in place of decoder and head

and the backward pass twice that: one product for the gradient of each factor. Looking up embeddings takes none.

The convolution of a document of n tokens is counted, in each channel, by the cheaper of two ways: the direct sum, 2 n^2, or the Fourier
transform, 5 m log2 m + 6 (m / 2 + 1) on m = 2 n points; recurrences and chunks need more FLOPs, though a GPU does them faster. Its backward
pass costs as much once for the input and, where the SSM trains, once more for the kernel. A kernel that trains is made anew, at the length n
of the batch's longest document: 2 N n on each side of each channel, and in the backward pass as much for the outputs C, and once more for the
states. The powers of the transition, which do not depend on the batch, are left out.
"""

from spade_t5.flops.counter import Flops, FlopsCounter
from spade_t5.flops.layout import BatchLayout
from spade_t5.flops.of_run import counter_of_run

__all__ = ["BatchLayout", "Flops", "FlopsCounter", "counter_of_run"]
