"""What a forward and a backward pass take besides parameters and their gradients: the real model is run on tensors without values.

Every tensor that comes into being is counted until it is gone, so saved activations, what checkpointing computes again, bf16 copies of weights
under autocast and intermediate results are all in the peak. The ops are those of the backend that is asked for. Triton's operators are one
call each here; the large tensors that two of them make inside are added (`_SCRATCH`). Gradients of parameters are dropped as soon as they are
there, as ZeRO's buckets take them.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from spade_t5.classification import SpadeT5ForSequenceClassification
from spade_t5.configuration import SpadeT5Config
from spade_t5.kernels.linear_cross_entropy.chunks import rows_per_chunk
from spade_t5.layers.head import TokenLossConfig
from spade_t5.layers.ssm import SSMMixer
from spade_t5.modeling import SpadeT5ForConditionalGeneration, SpadeT5PreTrainedModel
from spade_t5.ops import traced_as
from spade_t5.training.recomputation import Recomputation, recompute


@dataclass(frozen=True, slots=True)
class Activations:
    """Bytes of one micro-batch."""

    saved: int
    """Alive between the forward and the backward pass."""
    peak: int
    """At most alive at any moment."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """What is run."""

    rows: int
    """B, of a micro-batch."""
    inputs_length: int
    """L."""
    targets_length: int
    """T; 0 for a classifier."""
    precision: str
    """Of `TrainingConfig`."""
    recomputation: Recomputation
    """Activation checkpointing."""
    backend: str
    """Of the ops: "triton" or "torch"."""
    architecture: str = "sm_90"
    """Of the GPU; it decides the chunks of Triton's state-space kernels."""


def trace_activations(config: SpadeT5Config, workload: Workload) -> Activations:
    """Runs one micro-batch of rows that are one document each, on tensors that hold no values, and counts bytes."""
    with FakeTensorMode(allow_non_fake_inputs=True), traced_as(workload.backend, workload.architecture):
        model = _model(config, workload)
        batch = {"input_ids": torch.zeros(workload.rows, workload.inputs_length, dtype=torch.int64)}
        batch["labels"] = torch.zeros(workload.rows, max(workload.targets_length, 1), dtype=torch.int64)
        return measure_activations(model, batch, workload.precision)


def measure_activations(model: SpadeT5PreTrainedModel, batch: dict[str, Tensor], precision: str) -> Activations:
    """The same of a model and a batch that are there, with or without values.

    Args:
        model: in training mode; its parameters get no gradients.
        batch: as the model takes it.
        precision: of `TrainingConfig`.
    """
    with contextlib.ExitStack() as stack:
        for parameter in model.parameters():
            if parameter.requires_grad:
                stack.callback(parameter.register_post_accumulate_grad_hook(_drop_gradient).remove)
        _fill_caches(model, batch["input_ids"].shape[1])
        live = stack.enter_context(_LiveBytes([*model.parameters(), *batch.values()]))
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16_autocast"):
            loss = _loss(model, batch)
        saved = live.now
        loss.backward()
    return Activations(saved, live.peak)


def _model(config: SpadeT5Config, workload: Workload) -> SpadeT5PreTrainedModel:
    cls = SpadeT5ForConditionalGeneration if workload.targets_length else SpadeT5ForSequenceClassification
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if workload.precision == "bf16" else torch.float32)
    try:
        model = cls(config).train()
    finally:
        torch.set_default_dtype(before)
    recompute(model, workload.recomputation)
    return model


def _loss(model: SpadeT5PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    if isinstance(model, SpadeT5ForConditionalGeneration):
        loss: Tensor = model(**batch, token_loss=TokenLossConfig(), use_cache=False).loss
        return loss
    # The head, which looks at the numbers of documents, takes next to nothing.
    states: Tensor = model.encoder(batch["input_ids"]).last_hidden_state
    return states.float().mean()


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


@torch.no_grad()
def _fill_caches(model: nn.Module, length: int) -> None:
    """Makes the kernels of frozen state-space models, which is done once in a run."""
    for mixer in model.modules():
        if isinstance(mixer, SSMMixer):
            mixer(torch.zeros(1, length, mixer.d_model, dtype=mixer.D.dtype))
            if torch.is_autocast_enabled("cpu"):
                mixer(torch.zeros(1, length, mixer.d_model, dtype=torch.bfloat16))


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operators make, as long as each is alive."""

    def __init__(self, excluded: Iterable[Tensor]) -> None:
        """Counts from here on, but not what `excluded` tensors hold: operators return views of them too."""
        super().__init__()
        self.now = self.peak = 0
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in excluded}

    def __torch_dispatch__(self, operator: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = operator(*arguments, **(options or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        scratch = _SCRATCH.get(operator.name().partition(".")[0])
        self.peak = max(self.peak, self.now + (scratch(*arguments) if scratch else 0))
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)


def _cross_entropy_scratch(x: Tensor, weight: Tensor, labels: Tensor, *others: Any) -> int:
    """Logits of a chunk, the weight in the dtype of the products, and the sum of its gradient in float32 before it is rounded."""
    dtype: torch.dtype = others[3]
    rows = min(labels.numel(), rows_per_chunk(weight.shape[0], torch.device("cuda")))
    cast = 0 if weight.dtype == dtype else weight.numel() * dtype.itemsize
    sum_bytes = 0 if weight.dtype == torch.float32 else weight.numel() * 4
    return rows * weight.shape[0] * dtype.itemsize + cast + sum_bytes


def _convolution_scratch(x_BDL: Tensor, local: Tensor, w: Tensor, *_: Any) -> int:
    """States of all chunks: what each adds, in float32, and what reaches it."""
    batch, d_model, length = x_BDL.shape
    columns = batch * -(-length // local.shape[1])
    return d_model * columns * w.shape[1] * (4 + min(x_BDL.element_size(), 4))


_SCRATCH: dict[str, Callable[..., int]] = {
    "spade_t5::linear_cross_entropy": _cross_entropy_scratch,
    "spade_t5::ssm_conv_chunked": _convolution_scratch,
    "spade_t5::ssm_conv_chunked_backward_input": _convolution_scratch,
}
