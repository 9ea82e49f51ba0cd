"""The public `ssm_conv_chunked`: checks its arguments and hands them to a backend."""

import torch
from torch import Tensor

from spade_t5.kernels.backend import choose_backend, refuse_double
from spade_t5.kernels.segments import check_segment_ids
from spade_t5.kernels.ssm_conv.naive_chunked import ssm_conv_chunked_naive
from spade_t5.kernels.ssm_conv.system import ChunkedSystem
from spade_t5.kernels.ssm_conv.torch_chunked import ssm_conv_chunked_torch

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_HALF_DTYPES = (torch.bfloat16, torch.float16)
_MIN_TRITON_CHUNK = 16
_MAX_TRITON_DENSE_STATES = 128


def ssm_conv_chunked(
    u: Tensor, system: ChunkedSystem, *, segment_ids: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """Convolve every channel with the response of its system, within each document, in chunks of T tokens.

    S_c = W u_c;   s_{c+1} = A_T s_c + S_c over the chunks c, and mirrored for the second side;   y_c = M u_c + P s_c

    The same output as `ssm_conv` with the system's impulse response, in time and memory linear in the length, where
    documents may begin anywhere. Chunks are aligned to the row; a document that ends inside one is masked out of W u
    and P s, the recurrence is cut there, and M u is taken for each document of the chunk by itself, so many tiny
    documents cost more time, and never another result. Packed and separate documents give equal outputs to rounding.

    Backward: the adjoint has the same form. With A_T', P' in the place of W, W' in that of P, M' in that of M, and the
    sides running the other way, it maps dy to du, and its states are the gradients dS_c of what the chunks add. Then
    dM = sum dy_c u_c',  dP = sum dy_c s_c',  dW = sum dS_c u_c',  dA_T = sum dS_c s_c'  under the same masks.

    In half precision the Triton kernels multiply in float16 and add in float32; each chunk's tokens and states are
    scaled by a power of two, so small gradients survive; the matrices are not, their entries must be below 65504.

    Args:
        u: input (B, L, D); float32, float64 (not Triton), bfloat16 or float16. Where memory is (B, D, L) already, that
            is `u.stride(1) == 1`, Triton makes no copy.
        system: matrices of every channel; for Triton T is a power of two of at least 16, see `chunk_tokens`.
        segment_ids: (B, L) int64, 0 = padding (input taken as 0, output 0), 1, 2, ... = document within the row,
            non-decreasing over the non-zero entries, which is not checked here. None: every row is one document.
        backend: "auto", "triton", "torch" or "naive".

    Returns:
        (B, L, D) in the dtype of `u`; from Triton in memory (B, D, L).

    Raises:
        ValueError: a shape, dtype or device is wrong, or the backend is not available.
    """
    if u.dim() != 3 or 0 in u.shape:
        raise ValueError(f"u has shape {tuple(u.shape)}; expected a non-empty (batch, length, d_model)")
    if u.dtype not in _DTYPES:
        raise ValueError(f"u has dtype {u.dtype}; cast it to one of {', '.join(str(dtype) for dtype in _DTYPES)}")
    _check_system(system, u)
    if segment_ids is not None:
        check_segment_ids(segment_ids, u)

    chosen = choose_backend(backend, u.device)
    if chosen == "triton":
        from spade_t5.kernels.ssm_conv.triton_op import ssm_conv_chunked_triton

        refuse_double(u=u, **{f"system.{name}": x for name, x in system._asdict().items()})
        tokens = system.chunk_tokens
        if tokens < _MIN_TRITON_CHUNK or tokens & (tokens - 1):
            raise ValueError(
                f"system.local has chunks of {tokens} tokens; Triton takes a power of two of at least"
                f" {_MIN_TRITON_CHUNK}: build the system for chunk_tokens(length, device)"
            )
        if system.is_dense and system.num_states > _MAX_TRITON_DENSE_STATES:
            raise ValueError(
                f"system.transition has {system.num_states} states a side; Triton holds a dense transition in registers"
                f" and takes at most {_MAX_TRITON_DENSE_STATES}: choose fewer, a diagonal system, or backend 'torch'"
            )
        return ssm_conv_chunked_triton(u, system, segment_ids)
    return (ssm_conv_chunked_naive if chosen == "naive" else ssm_conv_chunked_torch)(u, system, segment_ids)


def chunk_tokens(length: int, device: torch.device) -> int:
    """T that suits the Triton kernels at this length: longer chunks move fewer states and multiply more.

    Args:
        length: of the rows, in tokens.
        device: where they are.
    """
    return _tokens_of_class(length_class(length), device)


def length_class(length: int) -> str:
    """Name of a class of row lengths in the table of launch configurations."""
    return "long" if length >= 2048 else "medium" if length >= 512 else "short"


# torch.compile takes the answer as a constant: it must not trace the table.
@torch.compiler.assume_constant_result
def _tokens_of_class(length_class: str, device: torch.device) -> int:
    from spade_t5.kernels.launch import launch_config

    return launch_config("ssm_conv", f"chunk/{length_class}", device)["TOKENS"]


def _check_system(system: ChunkedSystem, u: Tensor) -> None:
    d_model = u.shape[2]
    local, w, p, transition = system
    if local.dim() != 3 or local.shape[0] != d_model or local.shape[1] != local.shape[2]:
        raise ValueError(f"system.local has shape {tuple(local.shape)}; expected ({d_model}, T, T)")
    if transition.dim() not in (2, 3) or transition.shape[0] != d_model or transition.shape[1] != transition.shape[-1]:
        raise ValueError(
            f"system.transition has shape {tuple(transition.shape)}; expected ({d_model}, N, N), or ({d_model}, N) for"
            " a diagonal system"
        )
    tokens, num_states = local.shape[1], transition.shape[1]
    if not system.is_dense and num_states % 2:
        raise ValueError(f"system.transition has {num_states} real states a side; a diagonal system has [Re; Im] pairs")
    if w.dim() != 3 or w.shape[1] not in (num_states, 2 * num_states) or w.shape != (d_model, w.shape[1], tokens):
        raise ValueError(
            f"system.w has shape {tuple(w.shape)}; expected ({d_model}, {num_states} or {2 * num_states}, {tokens})"
        )
    if p.shape != (d_model, tokens, w.shape[1]):
        raise ValueError(f"system.p has shape {tuple(p.shape)}; expected {(d_model, tokens, w.shape[1])}")
    is_frozen = not any(x.requires_grad for x in system)
    for name, x in system._asdict().items():
        if x.device != u.device:
            raise ValueError(f"system.{name} is on {x.device}; move it to {u.device}, where u is")
        is_half = x.dtype == torch.float16 and name != "transition" and is_frozen and u.dtype in _HALF_DTYPES
        if x.dtype not in (torch.float32, torch.float64) and not is_half:
            raise ValueError(
                f"system.{name} has dtype {x.dtype}; keep it in float32 (the matrices besides the transition may be"
                " float16 where the system is frozen and u is in half precision)"
            )
