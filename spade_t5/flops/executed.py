"""Executed FLOPs: what a backend multiplies for a batch, padding, hidden scores and repeated work included.

Products with weights run over all positions. What attention and the SSM take depends on the backend. With I heads x d_kv, for every score
that is computed:

    local    torch    4 I forward, 10 I backward, where the score is computed again; blocks of queries, and all keys that any of them may see
             naive    4 I and 8 I; every pair of a row
             triton   4 I and 14 I, as gradients to queries and to keys are two kernels; tiles within the window and the documents
    cross    4 I and 10 I by torch's fused attention, 8 I by its plain one; document by document, or B T L where that is faster

The SSM runs by Fourier transforms of documents of similar length, padded to the longest of them, or by chunks (triton). Activation
checkpointing runs the forward pass of every layer again if it is full; selective, what it cannot keep: attention in blocks and transforms.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from spade_t5.configuration import SpadeT5Config
from spade_t5.flops.layout import BatchLayout, Ints
from spade_t5.flops.model import Products
from spade_t5.kernels.cross_attention.per_document import calls_save_work
from spade_t5.kernels.local_attention.torch_blocked import num_blocked_scores
from spade_t5.kernels.ssm_conv.torch_fft import fft_length
from spade_t5.layers.segments import chunk_segments
from spade_t5.training.recomputation import Recomputation

_SIDES = 2  # of an encoder's convolution


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What decides how a batch is multiplied, besides the model."""

    backend: str
    """Of the ops: "torch", "triton" or "naive"."""
    device_type: str
    """"cpu" or "cuda"."""
    dtype: torch.dtype
    """Of the products: float32, or bfloat16 under autocast too."""
    recomputation: Recomputation
    """Activation checkpointing."""
    architecture: str
    """Of the GPU, such as "sm_90"; it decides Triton's tiles."""


@dataclass(frozen=True, slots=True)
class _Passes:
    """FLOPs of the two passes."""

    forward: float = 0.0
    backward: float = 0.0

    def __add__(self, other: "_Passes") -> "_Passes":
        return _Passes(self.forward + other.forward, self.backward + other.backward)

    def times(self, count: int) -> "_Passes":
        return _Passes(count * self.forward, count * self.backward)


def _products(forward: float) -> _Passes:
    """Matrix products of which both factors need a gradient."""
    return _Passes(forward, 2 * forward)


def executed_flops(config: SpadeT5Config, layout: BatchLayout, machine: Machine, *, has_decoder: bool) -> float:
    """Forward and backward pass of one batch."""
    products = Products.of(config)
    inputs, targets = layout.rows * layout.inputs_length, layout.rows * layout.targets_length
    with_weights, last_products = _products(products.encoder * inputs), products.encoder_last * inputs
    local = _encoder_attention(config, layout, machine)
    local += _convolution(config, layout, machine).times(len(config.global_layers))
    cross = _Passes()
    if has_decoder:
        with_weights += _products(products.decoder * targets + products.cross * inputs)
        last_products += products.decoder_last * targets
        local += _causal_attention(config, layout, machine)
        cross = _cross_attention(config, layout, machine)
        head = _products(products.head * targets)
    else:
        documents = layout.rows * layout.label_columns
        pooling = 2 * documents * layout.inputs_length * config.d_model
        head = _products(products.classifier * documents) + _Passes(pooling, pooling)
    layers = with_weights + local + cross
    repeated = 0.0
    if machine.recomputation == "full":
        repeated = layers.forward - (last_products if _skips_last_product(config, machine) else 0)
    elif machine.recomputation == "selective" and machine.backend != "triton":
        repeated = local.forward  # Triton's operators are kept as one result each
    total = layers + head
    return float(total.forward + total.backward + repeated)


def _skips_last_product(config: SpadeT5Config, machine: Machine) -> bool:
    """Whether recomputing a layer stops before its last product, whose result nothing keeps: PyTorch sees to it.

    Not where dropout keeps its mask or a norm follows, nor where the product is a function of ours, which runs as a whole.
    """
    is_own_function = machine.backend == "torch" and machine.device_type == "cpu" and machine.dtype == torch.float32
    return config.norm_placement == "pre" and config.dropout_rate == 0.0 and not is_own_function


def _encoder_attention(config: SpadeT5Config, layout: BatchLayout, machine: Machine) -> _Passes:
    radius = None if config.local_attention == "full" else config.local_radius
    ids = layout.segment_ids
    if config.local_attention == "chunk" and machine.backend == "triton":
        documents = np.ones((layout.rows, layout.inputs_length), dtype=np.int64) if ids is None else ids
        ids = chunk_segments(torch.from_numpy(documents), config.local_radius + 1).numpy()
    return _local_attention(config, machine, layout.rows, layout.inputs_length, ids, radius, radius).times(
        config.num_layers
    )


def _causal_attention(config: SpadeT5Config, layout: BatchLayout, machine: Machine) -> _Passes:
    """Of all decoder layers."""
    causal = _local_attention(config, machine, layout.rows, layout.targets_length, layout.decoder_segment_ids, None, 0)
    return causal.times(config.num_decoder_layers or config.num_layers)


def _cross_attention(config: SpadeT5Config, layout: BatchLayout, machine: Machine) -> _Passes:
    """Of all decoder layers."""
    inner = config.num_heads * config.d_kv
    scores = _cross_scores(config, layout, machine)
    is_fused = machine.backend != "naive" and (machine.device_type == "cuda" or config.dropout_rate == 0.0)
    cross = _Passes(4 * inner * scores, (10 if is_fused else 8) * inner * scores)
    return cross.times(config.num_decoder_layers or config.num_layers)


def _local_attention(
    config: SpadeT5Config,
    machine: Machine,
    rows: int,
    length: int,
    segment_ids: Ints | None,
    left: int | None,
    right: int | None,
) -> _Passes:
    """Banded attention of one layer."""
    inner = config.num_heads * config.d_kv
    if machine.backend == "naive":
        scores = rows * length * length
        return _Passes(4 * inner * scores, 8 * inner * scores)
    if machine.backend == "torch":
        scores = rows * num_blocked_scores(length, left, right)
        return _Passes(4 * inner * scores, 10 * inner * scores)
    from spade_t5.kernels.local_attention.tile_counts import count_tiles

    tiles = count_tiles(
        segment_ids,
        rows,
        length,
        left,
        right,
        d_kv=config.d_kv,
        dtype=machine.dtype,
        dropout_p=config.dropout_rate,
        architecture=machine.architecture,
    )
    return _Passes(4 * inner * tiles.forward, inner * (6 * tiles.queries + 8 * tiles.keys))


def _cross_scores(config: SpadeT5Config, layout: BatchLayout, machine: Machine) -> int:
    """Scores of one head in one layer."""
    dense = layout.rows * layout.targets_length * layout.inputs_length
    if layout.segment_ids is None or machine.backend == "naive":
        return dense
    if (
        layout.decoder_segment_ids is None
    ):  # padded, but not packed: every target token, asked for or not, sees its source
        scores = layout.targets_length * int(layout.input_tokens.sum())
    else:
        scores = int((layout.input_tokens * layout.target_tokens).sum())
    if machine.device_type == "cuda":
        is_paired = machine.dtype != torch.float32 and config.d_kv % 8 == 0 and config.d_kv <= 256
        return scores if is_paired and config.dropout_rate == 0.0 else dense
    return scores if calls_save_work(scores, len(layout.input_tokens), dense) else dense


def _convolution(config: SpadeT5Config, layout: BatchLayout, machine: Machine) -> _Passes:
    """The SSM of one layer."""
    trains = config.ssm_training != "frozen"
    if machine.backend == "naive":
        dense = 2 * config.d_model * layout.rows * layout.inputs_length**2
        return _Passes(dense, (2 if trains else 1) * dense)
    if machine.backend == "triton" and config.global_mixer in ("s4", "s4d"):
        return _chunked_convolution(config, layout, machine, trains)
    total = _Passes()
    for count, longest in _convolved_together(layout):
        points = fft_length(longest)
        transform = 2.5 * points * math.log2(points) * config.d_model
        product = 6 * (points // 2 + 1) * config.d_model
        # The transform of a frozen kernel is kept while rows are whole documents of one length.
        of_kernel = 0.0 if layout.segment_ids is None and not trains else transform
        one_pass = count * (2 * transform + product) + of_kernel
        of_parameters = count * (2 * transform + product) + transform if trains else 0.0
        total += _Passes(one_pass, one_pass + of_parameters)
    return total


def _convolved_together(layout: BatchLayout) -> list[tuple[int, int]]:
    """Number of documents and length of the longest, for every group that the torch path transforms together."""
    if layout.segment_ids is None:
        return [(layout.rows, layout.inputs_length)]
    lengths = layout.input_tokens[layout.input_tokens > 0]
    classes = np.frexp(lengths.astype(np.float64))[1]
    return [(int((classes == k).sum()), int(lengths[classes == k].max())) for k in np.unique(classes)]


def _chunked_convolution(config: SpadeT5Config, layout: BatchLayout, machine: Machine, trains: bool) -> _Passes:
    """By Triton's kernels, in whole tiles of chunks."""
    from spade_t5.kernels.ssm_conv.tile_counts import count_chunks

    chunks = count_chunks(
        layout.segment_ids, layout.rows, layout.inputs_length, dtype=machine.dtype, architecture=machine.architecture
    )
    states, tokens = config.d_state, chunks.tokens
    transition = 2 * states * states if config.global_mixer == "s4" else 4 * states
    to_states = 2 * tokens * _SIDES * states * chunks.columns + transition * _SIDES * chunks.columns
    from_states = 2 * tokens * _SIDES * states * chunks.columns
    local = 2 * tokens * tokens * chunks.pieces
    one_pass = config.d_model * (to_states + from_states + local)
    of_parameters = config.d_model * (2 * to_states + from_states + local) if trains else 0
    return _Passes(one_pass, one_pass + of_parameters)
