"""How good a pretrained model is on held-out text, beside two controls that any useful model must beat.

- the unigram cross-entropy: the same held-out targets under the token frequencies of training targets, what a model without any context
  could reach;
- the loss with the inputs of other rows: what the decoder reaches from the targets alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from spade_t5.checkpoint import read_state
from spade_t5.config import ConfigDict, apply_overrides, from_mapping
from spade_t5.errors import ConfigError
from spade_t5.hf.loading import find_checkpoint, load_model
from spade_t5.hf.tokenizer import tokenizer_hash
from spade_t5.messages import shown
from spade_t5.modeling import SpadeT5ForConditionalGeneration
from spade_t5.pretrain.run import PretrainConfig
from spade_t5.training import Batch, Seq2SeqObjective, distributed
from spade_t5.training.data import BatchShape, TrainingRows
from spade_t5.training.objectives import IGNORED_LABEL, loss_by_axis
from spade_t5.training.settings import leaves

_COUNTED_ROWS = 64


@dataclass(frozen=True, slots=True)
class HeldOutLoss:
    """Losses on the same held-out targets, in nats per target token."""

    loss: float
    """Of the model."""
    shuffled_loss: float
    """Of the model, each row's inputs replaced by those of another row, far away in the split, of the same corpus and denoiser."""
    unigram_loss: float
    """Of the token frequencies of training targets."""
    num_targets: int
    """Target tokens scored."""
    loss_by: dict[str, dict[str, float]]
    """Loss of the model by corpus, denoiser and length of the inputs, where there are several."""


def evaluate_held_out(
    run: Path,
    *,
    step: int | None = None,
    data_words: Sequence[str] = (),
    max_rows: int | None = None,
    batch_rows: int = 16,
    unigram_rows: int = 2000,
) -> HeldOutLoss:
    """Scores a checkpoint of a pretraining run on the held-out part of its data.

    Args:
        run: run folder or checkpoint.
        step: which checkpoint of a run folder; the newest by default.
        data_words: settings put over those of the run's data, as `data.key=value`, where it lies elsewhere now.
        max_rows: held-out segments scored, evenly spread over the split; None: all, or from a stream as many as in training.
        batch_rows: rows at once.
        unigram_rows: training rows that the token frequencies are counted in.

    Raises:
        ConfigError: `run` is no pretraining run, its data has another tokenizer now, or credentials of its URLs, which are not kept, are wanted.
        DataError: checkpoint or data are damaged.
    """
    checkpoint = find_checkpoint(run, step)
    if checkpoint is None:
        raise ConfigError(f"{run}: not a run folder (it has no checkpoints/)")
    saved = read_state(checkpoint)["config"]
    if "objective" not in saved:
        raise ConfigError(f"{run}: not a pretraining run; score it with --task")
    saved_hash = saved.pop("tokenizer_hash")
    del saved["data_fingerprint"]
    saved = apply_overrides(saved, data_words)
    _check_unmasked(saved["data"])
    config = from_mapping(PretrainConfig, saved)
    data = config.data.with_eval_rows(max_rows).open(config.objective, seed=config.training.seed)
    if tokenizer_hash(data.tokenizer) != saved_hash:
        raise ConfigError(f"{run}: its data has another tokenizer now; give the data back that it was trained on")
    held_out = data.eval_rows
    assert held_out.num_rows is not None, "evaluation rows are finite"
    model = load_model(checkpoint, SpadeT5ForConditionalGeneration, device=distributed.device())
    target_counts = _target_counts(data.train_rows, unigram_rows, model.config.vocab_size)
    log_frequency_V = torch.log(target_counts / target_counts.sum())
    scorer = Seq2SeqObjective(groups=data.groups)
    sums_by_group = torch.zeros(len(data.groups), 2, dtype=torch.float64)
    loss = shuffled = unigram = 0.0
    num_targets = 0
    with torch.no_grad():
        for first in range(0, held_out.num_rows, batch_rows):
            rows = range(first, min(first + batch_rows, held_out.num_rows))
            batch = held_out.collate(rows)
            others = held_out.collate(held_out.counterparts(rows))
            labels = batch["labels"][batch["labels"] != IGNORED_LABEL]
            unigram -= float(log_frequency_V[labels].sum())
            num_targets += labels.numel()
            batch = {name: tensor.to(device=distributed.device()) for name, tensor in batch.items()}
            sums = scorer.loss_sums(model, batch)
            loss += float(sums.whole)
            sums_by_group += sums.by_group.cpu()
            shuffled += float(scorer.loss_sums(model, _with_inputs_of(batch, others)).whole)
    return HeldOutLoss(
        loss / num_targets,
        shuffled / num_targets,
        unigram / num_targets,
        num_targets,
        loss_by_axis(data.groups, sums_by_group.tolist()),
    )


def _check_unmasked(data: ConfigDict) -> None:
    """Refuses settings that were masked when they were saved, and so lead nowhere."""
    for key, value in leaves(data, "data").items():
        if isinstance(value, str) and "***" in value:
            raise ConfigError(
                f"{key}: was saved as {shown(value)}, without its credentials; give it again as {key.partition('[')[0]}=..."
            )


def _with_inputs_of(batch: Batch, others: Batch) -> Batch:
    """A batch of one document a row, with the inputs of another one's rows."""
    device = batch["labels"].device
    mixed = {**batch, "input_ids": others["input_ids"].to(device)}
    for name in ("segment_ids", "decoder_segment_ids"):
        if name in batch or name in others:
            own = others if name == "segment_ids" else batch
            full = batch["input_ids" if name == "segment_ids" else "labels"]
            mixed[name] = own.get(name, torch.ones_like(full)).to(device)
    return mixed


def _target_counts(rows: TrainingRows, num_rows: int, vocab_size: int) -> torch.Tensor:
    """How often each token is a target in the first training rows, plus one."""
    counts = torch.ones(vocab_size, dtype=torch.float64)
    shape = BatchShape(global_rows=_COUNTED_ROWS, micro_rows=_COUNTED_ROWS, rank=0, world_size=1)
    for step in rows.steps(None, -(-num_rows // _COUNTED_ROWS), shape):
        for batch in step.micro_batches:
            counts += torch.bincount(batch["labels"][batch["labels"] != IGNORED_LABEL], minlength=vocab_size)
    return counts
