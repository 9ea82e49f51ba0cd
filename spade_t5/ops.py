"""The one door through which the model reaches the kernels.

Which backend runs is decided here: the argument, else the run's config (`configure_backend`), else the environment
variable SPADE_T5_BACKEND, else "auto": Triton on a CUDA device, torch elsewhere. A backend that cannot serve is an error
that says why, never a silent change. The functions are those of `spade_t5.kernels`, where
each is documented.
"""

import logging
import os
from functools import cache

import torch
from torch import Tensor
from torch.compiler import is_compiling

from spade_t5.errors import ConfigError
from spade_t5.kernels import cross_attention as _cross_attention
from spade_t5.kernels import gated_gelu as _gated_gelu
from spade_t5.kernels import linear as _linear
from spade_t5.kernels import linear_cross_entropy as _linear_cross_entropy
from spade_t5.kernels import local_attention as _local_attention
from spade_t5.kernels import rms_norm as _rms_norm
from spade_t5.kernels import ssm_conv as _ssm_conv
from spade_t5.kernels.backend import choose_backend, traced, traced_as
from spade_t5.kernels.cross_attention import (
    DocumentPairs,
    can_pair_documents,
    cross_attention_probabilities,
    pair_documents,
    visible_keys,
)
from spade_t5.kernels.local_attention import local_attention_probabilities
from spade_t5.kernels.segments import check_segment_order
from spade_t5.kernels.ssm_conv import ChunkedSystem, chunked_system, kernel_spectrum
from spade_t5.kernels.ssm_conv import chunk_tokens as ssm_chunk_tokens

__all__ = [
    "ChunkedSystem",
    "DocumentPairs",
    "add_rms_norm",
    "add_rms_norm_with_transpose",
    "backend_in_use",
    "can_pair_documents",
    "check_segment_order",
    "chunked_system",
    "configure_backend",
    "cross_attention",
    "cross_attention_probabilities",
    "gated_gelu",
    "kernel_spectrum",
    "linear",
    "linear_cross_entropy",
    "linear_cross_entropy_with_token_losses",
    "local_attention",
    "local_attention_probabilities",
    "pair_documents",
    "rms_norm",
    "rms_norm_with_transpose",
    "ssm_chunk_tokens",
    "ssm_conv",
    "ssm_conv_chunked",
    "traced_as",
    "visible_keys",
]

_logger = logging.getLogger(__name__)
_configured = "auto"


def configure_backend(name: str, device: torch.device) -> None:
    """Set the backend of all ops of this process, as a run's config does, and see that it can serve.

    Args:
        name: "auto" leaves the choice to SPADE_T5_BACKEND.
        device: where the tensors will be.

    Raises:
        ConfigError: the backend, or the one that SPADE_T5_BACKEND names, does not exist or cannot serve.
    """
    global _configured
    _check(*_source_and_name(name), device.type)
    _configured = name


def backend_in_use(backend: str = "auto", device: torch.device | None = None) -> str:
    """The backend that an op called with this argument runs on.

    Args:
        backend: "auto" leaves the choice to `configure_backend`, without it to SPADE_T5_BACKEND, and without that to
            the device.
        device: where the tensors are; None: the CPU.

    Returns:
        "triton", "torch" or "naive".

    Raises:
        ConfigError: the configured backend, or SPADE_T5_BACKEND, is unknown or cannot serve.
        ValueError: the same of the argument.
    """
    device = device if device is not None else torch.device("cpu")
    if traced() is not None:
        return choose_backend("auto", device)
    return choose_backend(backend, device) if backend != "auto" else _default_backend(device.type)


# torch.compile takes the answer as a constant: it must not trace the environment or the log.
@torch.compiler.assume_constant_result
def _default_backend(device_type: str) -> str:
    return _announced(*_source_and_name(_configured), device_type)


def _source_and_name(configured: str) -> tuple[str, str]:
    if configured != "auto":
        return "kernel_backend", configured
    return "environment variable SPADE_T5_BACKEND", os.environ.get("SPADE_T5_BACKEND", "auto")


def _check(source: str, name: str, device_type: str) -> str:
    try:
        return choose_backend(name, torch.device(device_type))
    except ValueError as error:
        raise ConfigError(f"{source}: {error}") from error


@cache
def _announced(source: str, name: str, device_type: str) -> str:
    chosen = _check(source, name, device_type)
    _logger.info("SPADE-T5 ops run on backend %r (device %s, %s=%s)", chosen, device_type, source, name)
    return chosen


# In a compiled layer these end one graph and begin another.
_local_attention_outside = torch.compiler.disable(_local_attention.local_attention)
_cross_attention_outside = torch.compiler.disable(_cross_attention.cross_attention)


def _fusible(backend: str, device: torch.device) -> str:
    """The backend of an op on elements and rows: where torch would work in steps through the cache, its compiler fuses the plain formula."""
    chosen = backend_in_use(backend, device)
    return "naive" if chosen == "torch" and is_compiling() else chosen


def local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offset_bias: Tensor | None,
    *,
    left: int | None,
    right: int | None,
    segment_ids: Tensor | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Banded attention with a bias by relative offset: `spade_t5.kernels.local_attention.local_attention`."""
    chosen = backend_in_use(backend, q.device)
    # Unrolled, its blocks would take minutes to compile.
    attend = _local_attention_outside if chosen == "torch" and is_compiling() else _local_attention.local_attention
    return attend(
        q,
        k,
        v,
        offset_bias,
        left=left,
        right=right,
        segment_ids=segment_ids,
        dropout_p=dropout_p,
        backend=chosen,
    )


def cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    query_documents: Tensor | None = None,
    key_documents: Tensor | None = None,
    pairs: DocumentPairs | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Attention of target tokens to the source: `spade_t5.kernels.cross_attention.cross_attention`."""
    # The number and the sizes of documents are other ones in every batch.
    attend = _cross_attention_outside if pairs is not None and is_compiling() else _cross_attention.cross_attention
    return attend(
        q,
        k,
        v,
        query_documents=query_documents,
        key_documents=key_documents,
        pairs=pairs,
        dropout_p=dropout_p,
        backend=backend_in_use(backend, q.device),
    )


def ssm_conv(
    u: Tensor,
    ssm_kernel: Tensor,
    skip: Tensor,
    *,
    segment_ids: Tensor | None = None,
    ssm_kernel_f: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Long convolution of an SSM, restarted at every document: `spade_t5.kernels.ssm_conv.ssm_conv`.

    Where the ops run on Triton this one runs on torch: from an impulse response the Fourier transform is the way.
    """
    chosen = backend_in_use(backend, u.device)
    return _ssm_conv.ssm_conv(
        u,
        ssm_kernel,
        skip,
        segment_ids=segment_ids,
        ssm_kernel_f=ssm_kernel_f,
        backend="torch" if backend == "auto" and chosen == "triton" else chosen,
    )


def ssm_conv_chunked(
    u: Tensor, system: ChunkedSystem, *, segment_ids: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """The same from the system in chunks: `spade_t5.kernels.ssm_conv.ssm_conv_chunked`."""
    return _ssm_conv.ssm_conv_chunked(u, system, segment_ids=segment_ids, backend=backend_in_use(backend, u.device))


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, backend: str = "auto") -> Tensor:
    """T5's layer norm: `spade_t5.kernels.rms_norm.rms_norm`."""
    return _rms_norm.rms_norm(x, weight, eps, backend=_fusible(backend, x.device))


def rms_norm_with_transpose(x: Tensor, weight: Tensor, eps: float, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """T5's layer norm, laid out for the SSM too: `spade_t5.kernels.rms_norm.rms_norm_with_transpose`."""
    return _rms_norm.rms_norm_with_transpose(x, weight, eps, backend=_fusible(backend, x.device))


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, dropout_p: float = 0.0, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Residual sum with dropout, and its norm: `spade_t5.kernels.rms_norm.add_rms_norm`."""
    return _rms_norm.add_rms_norm(x, residual, weight, eps, dropout_p=dropout_p, backend=_fusible(backend, x.device))


def add_rms_norm_with_transpose(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, dropout_p: float = 0.0, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """The same, laid out for the SSM too: `spade_t5.kernels.rms_norm.add_rms_norm_with_transpose`."""
    return _rms_norm.add_rms_norm_with_transpose(
        x, residual, weight, eps, dropout_p=dropout_p, backend=_fusible(backend, x.device)
    )


def gated_gelu(a: Tensor, b: Tensor, *, backend: str = "auto") -> Tensor:
    """GELU of one half gates the other: `spade_t5.kernels.gated_gelu.gated_gelu`."""
    return _gated_gelu.gated_gelu(a, b, backend=_fusible(backend, a.device))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """Linear map, float32 on a CPU by oneDNN: `spade_t5.kernels.linear.linear`."""
    return _linear.linear(x, weight, bias, backend=backend_in_use(backend, x.device))


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    backend: str = "auto",
) -> Tensor:
    """Summed cross-entropy from hidden states: `spade_t5.kernels.linear_cross_entropy.linear_cross_entropy`."""
    return _linear_cross_entropy.linear_cross_entropy(
        x,
        weight,
        labels,
        z_loss=z_loss,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        backend=backend_in_use(backend, x.device),
    )


def linear_cross_entropy_with_token_losses(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The same, and each label's loss: `spade_t5.kernels.linear_cross_entropy.linear_cross_entropy_with_token_losses`."""
    return _linear_cross_entropy.linear_cross_entropy_with_token_losses(
        x,
        weight,
        labels,
        z_loss=z_loss,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        backend=backend_in_use(backend, x.device),
    )
