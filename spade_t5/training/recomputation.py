"""Activation checkpointing: which activations a layer keeps for the backward pass, and which are computed a second time there.

    none        everything is kept
    selective   results of matrix products, attention and the state-space convolution are kept; norms, gates, dropout and sums are cheap
                and are computed again
    full        only the input of each layer is kept; its whole forward pass is computed again

Losses and gradients are the same, bit for bit: dropout draws the same masks again. What each costs is in docs/recipes.md.
"""

import functools
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Recomputation = Literal["none", "selective", "full"]

KEPT_OPERATORS = frozenset(
    {
        "aten::mm",
        "aten::addmm",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "torch_attn::_varlen_attn",
        "mkldnn::_linear_pointwise",
        "spade_t5::local_attention",
        "spade_t5::ssm_conv_chunked",
    }
)
"""Operators whose results `selective` keeps. Attention in blocks on a CPU is made of batched products, which are of the size of the scores
and so are computed again."""


def recompute(model: nn.Module, policy: Recomputation) -> None:
    """Sets the policy of every stack of layers that supports gradient checkpointing.

    The attributes are those of Hugging Face's protocol. They are set here, since its method has another name in every other version of
    transformers, and makes the embeddings' outputs require gradients, which only the reentrant kind of checkpointing needs.

    Args:
        model: a SPADE-T5 model.
        policy: what is kept.
    """
    if policy == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if policy == "selective":
        options["context_fn"] = _selective_contexts
    for stack in model.modules():
        if hasattr(stack, "gradient_checkpointing"):
            # nn.Module takes every attribute; mypy knows tensors and modules only.
            stack._gradient_checkpointing_func = functools.partial(checkpoint, **options)  # type: ignore[assignment]
            stack.gradient_checkpointing = True  # type: ignore[assignment]


def _selective_contexts() -> Any:
    return create_selective_checkpoint_contexts(_keep_products)


def _keep_products(_: Any, operator: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    first = arguments[0] if arguments else None
    # Kept results are found again by their order, and a frozen state-space kernel is computed in the first pass only, in double precision.
    is_kernel = isinstance(first, torch.Tensor) and first.dtype in (torch.float64, torch.complex128)
    if operator.name().partition(".")[0] in KEPT_OPERATORS and not is_kernel:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
