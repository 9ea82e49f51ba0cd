"""Which settings a resumed run may change.

Every leaf of a resolved config is of one kind. FREE ones change how a run is carried out, or what is looked at and kept; a change is announced.
ON_REQUEST ones change what is learned from here on; a change needs `--allow-change KEY`. FIXED ones say what the weights, the optimizer's
states or the place in the data mean; they stay. What is in no list counts as fixed.
"""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

from spade_t5.config import ConfigDict, from_mapping, to_mapping
from spade_t5.errors import ConfigError
from spade_t5.messages import shown
from spade_t5.training.schedules import WSDSchedule

logger = logging.getLogger("spade_t5")


class Kind(Enum):
    """What a resumed run may do about a setting."""

    FREE = "free"
    ON_REQUEST = "on request"
    FIXED = "fixed"


FREE = (
    "run_dir",
    # What data it is decides the fingerprint, wherever the data lies now.
    "data",
    "task.source",
    "tokenizer",
    "evaluation",
    "training.micro_batch_rows",
    "training.kernel_backend",
    "training.gradient_checkpointing",
    "training.compile",
    "training.deepspeed",
    "training.loader_workers",
    "training.log_every_steps",
    "training.peak_tflops",
    "training.norms_every_steps",
    "training.profile",
    "training.wandb",
    "training.eval_every_steps",
    "training.save_every_steps",
    "training.keep_checkpoints",
    "training.keep_every_steps",
    "training.keep_best",
    "training.on_save_error",
    "training.max_wall_seconds",
    "training.max_skipped_in_a_row",
    "training.spikes",
    "training.replica_check_every_steps",
    "training.timeouts",
)
ON_REQUEST = (
    "data_fingerprint.held_out",
    "model.init_from",
    "model.dropout_rate",
    "dropout_rate",
    "loss",
    "epochs",
    "training.steps",
    "training.global_batch_rows",
    "training.batch_warmup",
    "training.optimizer",
    "training.schedule",
    "training.ssm_learning_rate",
    "training.clip_norm",
    "training.ema_decay",
)
FIXED = (
    "model",
    "tokenizer_hash",
    "data_fingerprint",
    "objective",
    "task",
    "mode",
    "rows",
    "max_train_examples",
    "training.seed",
    "training.precision",
    "training.optimizer.name",
)
LENGTHS = ("training.steps", "epochs")
"""Free where the learning rate of a step does not depend on how many there will be."""
SCHEDULES_WITHOUT_END = ("constant", "inverse_sqrt", "wsd")
"""Of these, those that have a decay do end."""


def kind_of(key: str) -> Kind:
    """The kind of a leaf, by the longest entry that is the key or stands above it.

    >>> kind_of("training.optimizer.beta1"), kind_of("training.optimizer.name")
    (<Kind.ON_REQUEST: 'on request'>, <Kind.FIXED: 'fixed'>)
    """
    entries = {name: kind for kind, names in _LISTS for name in names}
    above = [name for name in entries if _is_below(key, name)]
    return entries[max(above, key=len)] if above else Kind.FIXED


_LISTS = ((Kind.FREE, FREE), (Kind.ON_REQUEST, ON_REQUEST), (Kind.FIXED, FIXED))


def with_defaults(old: ConfigDict, config_class: type) -> ConfigDict:
    """The resolved config of a checkpoint, with the defaults of today for settings that the version which made it did not know.

    Args:
        old: the checkpoint's; what stands for tokenizer and data included.
        config_class: dataclass of the run's settings. A config that it cannot read any more is left as it is.
    """
    names = {field.name for field in dataclasses.fields(config_class)}
    try:
        known: Any = from_mapping(config_class, {name: value for name, value in old.items() if name in names})
    except ConfigError:
        return old
    return {**old, **to_mapping(known)}


def check_changes(old: ConfigDict, new: ConfigDict, allowed: Sequence[str] = ()) -> None:
    """Compares the resolved config of a checkpoint with that of the run that goes on from it; permitted changes are announced in the log.

    Args:
        old: the checkpoint's.
        new: the run's.
        allowed: keys that may change on request; each stands for those below it too.

    Raises:
        ConfigError: a change is not permitted, or `allowed` names what cannot be allowed; with old and new values and the remedy.
    """
    before, after = leaves(old), leaves(new)
    for name in allowed:
        check_can_be_allowed(name, before.keys() | after.keys())
    permitted, on_request, fixed = [], [], []
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) == after.get(key):
            continue
        change = f"{key}: was {shown(before.get(key))} in the checkpoint, is {shown(after.get(key))} now"
        kind = kind_of(key)
        if kind is Kind.FIXED:
            fixed.append(change)
        elif kind is Kind.FREE or _is_free_length(key, old, new) or any(_is_below(key, name) for name in allowed):
            permitted.append(change)
        else:
            on_request.append((key, change))
    if fixed:
        raise ConfigError(
            f"{'; '.join(fixed)}; a resumed run cannot change it: set it back, or start anew in another run_dir, with model.init_from to keep the weights"
        )
    if on_request:
        words = " ".join(f"--allow-change {key}" for key, _ in on_request)
        raise ConfigError(
            f"{'; '.join(change for _, change in on_request)}; set it back, or add {words} to change what is learned from here on"
        )
    for change in permitted:
        logger.info("%s", change)


def check_decay(old: ConfigDict, new: ConfigDict, *, step: int, num_steps: int) -> None:
    """Refuses a decay that a change of schedule or length puts into the past: the rate would drop at once to where it never came from.

    A run that goes on in the middle of its own decay changes neither.

    Args:
        old: resolved config of the checkpoint.
        new: that of the run.
        step: of the checkpoint.
        num_steps: length of the run.

    Raises:
        ConfigError: with the steps and the remedy.
    """
    before, after = leaves(old), leaves(new)
    names = ("training.schedule", *LENGTHS)
    keys = [key for key in before.keys() | after.keys() if any(_is_below(key, name) for name in names)]
    if all(before.get(key) == after.get(key) for key in keys):
        return
    values = dict(new["training"]["schedule"])
    if values.pop("name") != WSDSchedule.name:
        return
    schedule = WSDSchedule(**values)
    length = schedule.decay_length(num_steps)
    begin = num_steps - length
    if length == 0 or begin >= step:
        return
    field = "decay_share" if schedule.decay_steps is None else "decay_steps"
    longer = "" if schedule.decay_steps is None else f" to at least {step + length}"
    raise ConfigError(
        f"training.schedule.{field}: {getattr(schedule, field)} of training.steps={num_steps} would have begun behind step {begin}, and the "
        f"checkpoint is of step {step}, so the rate would drop at once; raise training.steps{longer}, shorten the decay to the steps that are "
        f"left ({max(0, num_steps - step)}), or resume from a checkpoint of step {begin} or before"
    )


def check_can_be_allowed(name: str, keys: Sequence[str] | set[str]) -> None:
    """Refuses a word of `--allow-change` that can have no effect.

    Raises:
        ConfigError: `name` is none of the keys nor stands above one, or changes of it are never taken, or need no word.
    """
    kinds = {kind_of(key) for key in keys if _is_below(key, name)}
    if not kinds:
        raise ConfigError(
            f"--allow-change: {shown(name)} is no setting of this run; give a key such as training.clip_norm"
        )
    if kinds == {Kind.FIXED}:
        raise ConfigError(
            f"--allow-change: {name} is never changed in a run; start anew in another run_dir, with model.init_from to keep the weights"
        )


def leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key to value of nested mappings and lists.

    >>> leaves({"training": {"steps": 3, "deepspeed": None}, "stores": ["a", "b"]})
    {'training.steps': 3, 'training.deepspeed': None, 'stores[0]': 'a', 'stores[1]': 'b'}
    """
    found: dict[str, Any] = {}
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            found |= leaves(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(tree, (list, tuple)):
        for number, value in enumerate(tree):
            found |= leaves(value, f"{prefix}[{number}]")
    else:
        found[prefix] = tree
    return found


def _is_below(key: str, name: str) -> bool:
    return key == name or key.startswith((f"{name}.", f"{name}["))


def _is_free_length(key: str, old: ConfigDict, new: ConfigDict) -> bool:
    return key in LENGTHS and all(_has_no_end(config["training"]["schedule"]) for config in (old, new))


def _has_no_end(schedule: Mapping[str, Any]) -> bool:
    """Whether the learning rate of a step does not depend on how many there will be."""
    has_decay = any(schedule.get(name) is not None for name in ("decay_steps", "decay_share"))
    return schedule["name"] in SCHEDULES_WITHOUT_END and not has_decay
