"""Export: from a run's checkpoint to a folder that Hugging Face users load as any other model.

The folder holds safetensors (in shards where large), config, generation config, tokenizer and a model card, and a manifest with the hash of
every file. It appears only when it is complete.
"""

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from spade_t5.checkpoint import load_weights_into, publish, read_state, write_manifest
from spade_t5.checkpoint.manifest import FILE_MODE, FOLDER_MODE, file_entry, read_small, remove_leftovers, unique_name
from spade_t5.classification import SpadeT5ForSequenceClassification
from spade_t5.errors import ConfigError, DataError
from spade_t5.hf.loading import build_model, find_checkpoint, load_config, load_tokenizer_of
from spade_t5.hf.tokenizer import save_tokenizer
from spade_t5.messages import shown
from spade_t5.modeling import SpadeT5ForConditionalGeneration, SpadeT5PreTrainedModel
from spade_t5.training.reporting import METRICS_FILE, read_metrics

logger = logging.getLogger("spade_t5")

MODEL_CLASSES: dict[str, type[SpadeT5PreTrainedModel]] = {
    cls.__name__: cls for cls in (SpadeT5ForConditionalGeneration, SpadeT5ForSequenceClassification)
}
SCORES_FILE = "scores.json"


def export_run(
    run: Path, out: Path, *, step: int | None = None, is_averaged: bool = False, max_shard_size: str = "5GB"
) -> Path:
    """Writes the model of a run, or of one of its checkpoints, to a new folder; the run may be going on.

    Args:
        run: run folder, or a checkpoint in one.
        out: folder to make; it must not exist.
        step: which checkpoint of a run folder; the newest by default.
        is_averaged: take the moving averages of the weights.
        max_shard_size: largest weights file, as Hugging Face writes sizes.

    Returns:
        `out`.

    Raises:
        ConfigError: `out` exists or cannot be written, `run` is no run, or the size is none.
        DataError: the checkpoint or the scores of the run are damaged, or it holds no averages.
    """
    if not re.fullmatch(r"[1-9]\d*[KMGT]B", max_shard_size):
        raise ConfigError(f"--max-shard-size: {max_shard_size!r} is not a size; write it as 500MB or 5GB")
    if out.exists():
        raise ConfigError(f"--out: {out} already exists; choose another folder or remove it")
    checkpoint, state, model = _load(run, step, is_averaged)
    temporary = out.parent / unique_name(out.name)
    card = model_card(state, checkpoint.parent.parent, model.num_parameters())
    tokenizer = load_tokenizer_of(checkpoint)
    try:
        temporary.mkdir(FOLDER_MODE, parents=True)
        remove_leftovers(out.parent, out.name)
        model.save_pretrained(temporary, max_shard_size=max_shard_size)
        save_tokenizer(tokenizer, temporary)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        for path in temporary.iterdir():
            path.chmod(path.stat().st_mode & FILE_MODE)
        write_manifest(temporary, {path.name: file_entry(path) for path in temporary.iterdir()}, kind="export")
        publish(temporary, out)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"--out: {out} cannot be written ({reason}); free space or choose another folder") from None
    return out


def _load(run: Path, step: int | None, is_averaged: bool) -> tuple[Path, dict[str, Any], SpadeT5PreTrainedModel]:
    """A checkpoint with its state and model; if the run deletes it meanwhile, the next newer one."""
    while True:
        checkpoint = find_checkpoint(run, step)
        if checkpoint is None:
            raise ConfigError(f"{run}: not a run folder (it has no checkpoints/)")
        try:
            state = read_state(checkpoint)
            model = build_model(_model_class(checkpoint, state), load_config(checkpoint), seed=0)
            load_weights_into(model, checkpoint, is_averaged=is_averaged)
        except DataError:
            if checkpoint.exists():
                raise
            if step is not None or checkpoint == run:
                raise DataError(
                    f"{checkpoint}: was deleted by the run while it was read; export the newest one, or keep more checkpoints"
                ) from None
            logger.warning("%s: was deleted by the run while it was read, taking the newest one", checkpoint)
        else:
            return checkpoint, state, model.eval()


def _model_class(checkpoint: Path, state: dict[str, Any]) -> type[SpadeT5PreTrainedModel]:
    name = state["model_class"]
    if name not in MODEL_CLASSES:
        raise DataError(
            f"{checkpoint}: model_class: {shown(name)} is none of {', '.join(MODEL_CLASSES)}; use the version that wrote it"
        )
    return MODEL_CLASSES[name]


def model_card(state: dict[str, Any], run_dir: Path, num_parameters: int) -> str:
    """The README of an exported folder: what it was trained on, for how long, and how well it did.

    Args:
        state: content of the checkpoint's `state.json`.
        run_dir: folder of the run, for its metrics and scores.
        num_parameters: size of the model.

    Raises:
        DataError: the scores are damaged.
    """
    config = state["config"]
    training = config.get("training") or {}
    data = config.get("data") or {"task": config.get("task")}
    lines = [
        "---",
        "library_name: transformers",
        "tags: [spade-t5, text2text-generation]",
        "---",
        "",
        f"# SPADE-T5, {num_parameters / 1e6:.1f} M parameters",
        "",
        "A T5-style encoder-decoder whose bottom encoder layer joins a state-space model (S4) to local attention.",
        "",
        "```python",
        "import spade_t5  # registers the model with the auto classes",
        f"from transformers import {_auto_class(state['model_class'])}, AutoTokenizer",
        "",
        f"model = {_auto_class(state['model_class'])}.from_pretrained(FOLDER)",
        "tokenizer = AutoTokenizer.from_pretrained(FOLDER)",
        "```",
        "",
        "## Training",
        "",
        f"- steps: {state['step']:,}; input tokens seen: {state['tokens']:,}",
        f"- data: `{json.dumps(data)}`",
        f"- objective: `{json.dumps(config.get('objective') or config.get('mode'))}`",
        f"- optimizer: `{json.dumps(training.get('optimizer'))}`, precision {training.get('precision')}",
        f"- software: `{json.dumps(state['provenance'])}`",
    ]
    if state.get("initialised_from"):
        lines.append(f"- initialised from: {state['initialised_from']}")
    if (run_dir / METRICS_FILE).is_file():
        held_out = [m for m in read_metrics(run_dir) if m["split"] == "validation" and m["step"] <= state["step"]]
        if held_out:
            loss, step = held_out[-1]["loss"], held_out[-1]["step"]
            said = "not finite" if loss is None else f"{loss:.4f} nats per target"
            lines.append(f"- held-out loss: {said} at step {step:,}")
    if (run_dir / SCORES_FILE).is_file():
        lines += ["", "## Scores", "", "```json", json.dumps(_read_scores(run_dir / SCORES_FILE), indent=1), "```"]
    return "\n".join(lines) + "\n"


def _read_scores(path: Path) -> dict[str, Any]:
    try:
        scores = json.loads(read_small(path))
    except (OSError, ValueError, RecursionError):
        scores = None
    if not isinstance(scores, dict):
        raise DataError(f"{path}: is no JSON object; remove it, or score the run again")
    return scores


def _auto_class(model_class: str) -> str:
    return (
        "AutoModelForSeq2SeqLM"
        if model_class == "SpadeT5ForConditionalGeneration"
        else "AutoModelForSequenceClassification"
    )
