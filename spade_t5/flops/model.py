"""Model FLOPs: what the mathematics needs for the tokens of a batch; the equations are those of the package's docstring."""

from dataclasses import dataclass

import numpy as np

from spade_t5.configuration import SpadeT5Config
from spade_t5.flops.layout import BatchLayout, Ints


@dataclass(frozen=True, kw_only=True, slots=True)
class Products:
    """FLOPs a token of the forward pass's matrix products with weights, 2 for each weight."""

    encoder: int
    """Of a source token, in all encoder layers."""
    decoder: int
    """Of a target token, in all decoder layers."""
    cross: int
    """Of a source token, for keys and values of cross-attention in all decoder layers."""
    head: int
    """Of a target token that is scored."""
    classifier: int
    """Of a document that is classified."""
    encoder_last: int
    """Of a source token, for the last product of every encoder layer; part of `encoder`."""
    decoder_last: int
    """Of a target token, for the last product of every decoder layer; part of `decoder`."""

    @classmethod
    def of(cls, config: SpadeT5Config) -> "Products":
        """Those of a model."""
        inner = config.num_heads * config.d_kv
        width, feed_forward = config.d_model, config.d_model * config.d_ff
        num_decoder_layers = config.num_decoder_layers or config.num_layers
        block = (3 if config.feed_forward_proj == "gated-gelu" else 2) * feed_forward
        fusion = 2 * width * width if config.fusion in ("concat", "gated") else 0
        return cls(
            encoder=2 * (config.num_layers * (4 * width * inner + block) + len(config.global_layers) * fusion),
            decoder=2 * num_decoder_layers * (6 * width * inner + block),
            cross=2 * num_decoder_layers * 2 * width * inner,
            head=2 * width * config.vocab_size,
            classifier=2 * width * (width + (config.num_labels or 2)),
            encoder_last=2 * config.num_layers * feed_forward,
            decoder_last=2 * num_decoder_layers * feed_forward,
        )


def model_flops(config: SpadeT5Config, layout: BatchLayout, *, has_decoder: bool) -> float:
    """Forward and backward pass of one batch."""
    products = Products.of(config)
    inner = config.num_heads * config.d_kv
    inputs = layout.input_tokens
    forward = products.encoder * int(inputs.sum()) + 4 * inner * config.num_layers * encoder_pairs(config, inputs)
    if has_decoder:
        targets = layout.target_tokens
        pairs = window_pairs(targets, None, 0) + int((inputs * targets).sum())
        num_decoder_layers = config.num_decoder_layers or config.num_layers
        forward += products.decoder * int(targets.sum()) + products.cross * int(inputs.sum())
        forward += 4 * inner * num_decoder_layers * pairs + products.head * layout.labelled
    else:
        forward += products.classifier * layout.labelled
    return 3 * forward + len(config.global_layers) * convolution_flops(config, inputs)


def encoder_pairs(config: SpadeT5Config, lengths: Ints) -> int:
    """Pairs (query, key) that an encoder layer's mask admits in documents of these lengths."""
    if config.local_attention == "full":
        return window_pairs(lengths, None, None)
    if config.local_attention == "window":
        return window_pairs(lengths, config.local_radius, config.local_radius)
    chunk = config.local_radius + 1
    whole, rest = np.divmod(lengths, chunk)
    return int((whole * chunk * chunk + rest * rest).sum())


def window_pairs(lengths: Ints, left: int | None, right: int | None) -> int:
    """Pairs with -left <= key - query <= right in documents of these lengths; None: no limit on that side."""
    return int(lengths.sum()) + sum(_pairs_beside(lengths, reach) for reach in (left, right))


def _pairs_beside(lengths: Ints, reach: int | None) -> int:
    """Keys on one side of all queries: sum over i < n of min(i, reach)."""
    last = np.maximum(lengths - 1, 0)
    near = last if reach is None else np.minimum(last, reach)
    return int((near * (near + 1) // 2 + (last - near) * near).sum())


def convolution_flops(config: SpadeT5Config, lengths: Ints) -> float:
    """Forward and backward pass of one global layer's convolution in documents of these lengths."""
    one_pass = config.d_model * float(_cheapest_convolution(lengths).sum())
    if config.ssm_training == "frozen":
        return 2 * one_pass
    sides = 2
    kernel = 2 * config.d_state * sides * config.d_model * int(lengths.max(initial=0))
    return 3 * one_pass + (2 if config.ssm_training == "output" else 3) * kernel


def _cheapest_convolution(lengths: Ints) -> np.ndarray:
    """Of one channel: the direct sum or the Fourier transform; 0 for a document without tokens."""
    n = lengths.astype(np.float64)
    points = 2 * np.maximum(n, 1)
    return np.minimum(2 * n * n, 2 * 2.5 * points * np.log2(points) + 6 * (points / 2 + 1))
