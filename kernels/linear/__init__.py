"""Linear map whose float32 products on a CPU go to the faster of the two libraries inside PyTorch."""

from spade_t5.kernels.linear.naive import linear_naive
from spade_t5.kernels.linear.op import linear
from spade_t5.kernels.linear.torch_onednn import linear_onednn

__all__ = ["linear", "linear_naive", "linear_onednn"]
