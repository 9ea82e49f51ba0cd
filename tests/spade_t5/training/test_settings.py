"""What a resumed run may change: one case for every setting that there is."""

import copy
import dataclasses
import logging
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from spade_t5.config import from_mapping, to_mapping
from spade_t5.errors import ConfigError
from spade_t5.finetune.config import FinetuneConfig
from spade_t5.pretrain.run import PretrainConfig
from spade_t5.testing import documented
from spade_t5.training.config import TrainingConfig
from spade_t5.training.schedules import WSDSchedule
from spade_t5.training.settings import (
    FIXED,
    FREE,
    LENGTHS,
    ON_REQUEST,
    Kind,
    check_changes,
    check_decay,
    kind_of,
    leaves,
    with_defaults,
)

TRAINING = {
    "steps": 10,
    "global_batch_rows": 4,
    "micro_batch_rows": 2,
    "optimizer": {"name": "adamw", "learning_rate": 1e-3},
    "schedule": {"name": "cosine", "warmup_steps": 3},
    "deepspeed": {"zero_stage": 1},
    "spikes": {},
}
PRETRAIN = to_mapping(
    from_mapping(
        PretrainConfig,
        {"run_dir": "a", "model": {"preset": "tiny", "d_ff": 64}, "data": {"store": "store"}, "training": TRAINING},
    )
) | {"tokenizer_hash": "abc", "data_fingerprint": {"stores": ["123", "456"], "packing": "concatenate", "shares": [7]}}
FINETUNE = to_mapping(
    from_mapping(
        FinetuneConfig,
        {
            "run_dir": "a",
            "task": {"name": "sst2", "source": {"name": "folder", "path": "glue"}},
            "model": {"init_from": "b"},
            "epochs": 2.0,
            "training": TRAINING,
        },
    )
) | {"tokenizer_hash": "abc", "data_fingerprint": {"train": "123", "held_out": "456"}}


def settings_of(hint: Any, prefix: str) -> Iterator[str]:
    """Every leaf that a config of this type can have, of all variants."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        for option in typing.get_args(hint):
            yield from settings_of(option, prefix)
    elif dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        names = {field.name for field in dataclasses.fields(hint)}
        for name in names | ({"name"} if hasattr(hint, "name") else set()):
            yield from settings_of(hints.get(name), f"{prefix}.{name}" if prefix else name)
    else:
        yield prefix


ALL_SETTINGS = sorted({*settings_of(PretrainConfig, ""), *settings_of(FinetuneConfig, "")})


def entries_above(key: str) -> list[str]:
    return [name for name in (*FREE, *ON_REQUEST, *FIXED) if key == name or key.startswith(f"{name}.")]


def test_every_setting_is_in_a_list_and_every_entry_is_a_setting() -> None:
    assert len(ALL_SETTINGS) > 100
    unlisted = [key for key in ALL_SETTINGS if not entries_above(key)]
    assert not unlisted, "say in settings.py what a resumed run may do about them"
    entries = [*FREE, *ON_REQUEST, *FIXED]
    assert len(set(entries)) == len(entries)
    written = {
        "tokenizer_hash",
        "data_fingerprint",
        "data_fingerprint.held_out",
        "model.init_from",
        "model.dropout_rate",
    }
    assert not [
        name
        for name in entries
        if name not in written and not any(key == name or key.startswith(f"{name}.") for key in ALL_SETTINGS)
    ]


def test_what_is_in_no_list_is_fixed() -> None:
    assert kind_of("training.something_new") is Kind.FIXED
    assert kind_of("model_note") is Kind.FIXED  # not below model


def other(value: Any) -> Any:
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    return "another" if value is None else f"{value}-other"


def changed(config: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy of a config with one leaf changed."""
    result = copy.deepcopy(config)
    *path, last = [int(word) if word.isdigit() else word for word in re.findall(r"[^.\[\]]+", key)]
    place: Any = result
    for name in path:
        place = place[name]
    place[last] = value
    return result


CASES = [
    (command, key) for command, config in (("pretrain", PRETRAIN), ("finetune", FINETUNE)) for key in leaves(config)
]


@pytest.mark.parametrize(("command", "key"), CASES)
def test_a_changed_setting(command: str, key: str, caplog: pytest.LogCaptureFixture) -> None:
    old = {"pretrain": PRETRAIN, "finetune": FINETUNE}[command]
    before = leaves(old)[key]
    after = other(before)
    new = changed(old, key, after)
    text = f"{key}: was {before!r} in the checkpoint, is {after!r} now"
    above = key.rpartition(".")[0] or key
    kind = {"training.schedule.name": Kind.ON_REQUEST}.get(key) or kind_of(key)
    with caplog.at_level(logging.INFO, "spade_t5"):
        if kind is Kind.FREE:
            check_changes(old, new)
        elif kind is Kind.ON_REQUEST:
            with pytest.raises(ConfigError) as caught:
                check_changes(old, new)
            assert (
                str(caught.value)
                == f"{text}; set it back, or add --allow-change {key} to change what is learned from here on"
            )
            documented(str(caught.value))
            assert not caplog.messages
            check_changes(old, new, [key])
            caplog.clear()
            check_changes(old, new, [above])
        else:
            with pytest.raises(ConfigError) as caught:
                check_changes(old, new)
            assert str(caught.value).startswith(f"{text}; a resumed run cannot change it: set it back, or start anew")
            documented(str(caught.value))
            with pytest.raises(ConfigError, match="is never changed in a run; start anew in another run_dir") as caught:
                check_changes(old, new, [key])
            documented(str(caught.value))
            return
    assert caplog.messages == [text]
    documented(text)


EXPECTED = {
    Kind.FREE: """run_dir data.store data.staging_dir evaluation.max_examples task.source.path training.micro_batch_rows training.deepspeed.zero_stage
        training.log_every_steps training.save_every_steps training.keep_best training.loader_workers training.timeouts.step_seconds""",
    Kind.ON_REQUEST: """training.optimizer.learning_rate training.optimizer.beta2 training.optimizer.weight_decay training.schedule.warmup_steps
        training.schedule.name training.global_batch_rows training.clip_norm training.ema_decay training.steps loss.z_loss
        data_fingerprint.held_out""",
    Kind.FIXED: """model.vocab_size model.d_model model.num_layers tokenizer_hash objective.mean_noise_span_length objective.inputs_length
        data_fingerprint.stores data_fingerprint.train training.seed training.precision training.optimizer.name task.name mode rows.packing max_train_examples""",
}


@pytest.mark.parametrize(("key", "kind"), [(key, kind) for kind, keys in EXPECTED.items() for key in keys.split()])
def test_the_kinds_that_users_rely_on(key: str, kind: Kind) -> None:
    assert kind_of(key) is kind


@pytest.mark.parametrize(
    ("schedule", "is_free"), [("constant", True), ("inverse_sqrt", True), ("linear", False), ("cosine", False)]
)
@pytest.mark.parametrize("key", LENGTHS)
def test_the_length_is_free_where_the_schedule_has_no_end(key: str, schedule: str, is_free: bool) -> None:
    old = changed(FINETUNE, "training.schedule", {"name": schedule, "warmup_steps": 3})
    new = changed(old, key, 20)
    if is_free:
        check_changes(old, new)
    else:
        with pytest.raises(ConfigError, match=f"add --allow-change {key} "):
            check_changes(old, new)
    # a run that turns to a schedule with an end says so, length and all
    turned = changed(new, "training.schedule.name", "cosine" if is_free else "constant")
    with pytest.raises(ConfigError) as caught:
        check_changes(old, turned)
    assert f"{key}: was " in str(caught.value)
    assert f"training.schedule.name: was '{schedule}'" in str(caught.value)


def test_a_trunk_may_be_lengthened_freely_and_a_decay_is_asked_for() -> None:
    trunk = changed(PRETRAIN, "training.schedule", to_mapping(WSDSchedule(warmup_steps=3)))
    check_changes(trunk, changed(trunk, "training.steps", 20))
    branch = changed(changed(trunk, "training.steps", 20), "training.schedule.decay_steps", 5)
    with pytest.raises(ConfigError, match=r"training\.schedule\.decay_steps: was None .* training\.steps: was 10 "):
        check_changes(trunk, branch)
    check_changes(trunk, branch, ["training.steps", "training.schedule"])


def test_a_branch_begins_before_its_decay() -> None:
    trunk = changed(PRETRAIN, "training.schedule", to_mapping(WSDSchedule(warmup_steps=1)))
    branch = changed(trunk, "training.schedule.decay_steps", 6)
    for step in (1, 4):
        check_decay(trunk, branch, step=step, num_steps=10)
    for step, remedies in (
        (6, "raise training.steps to at least 12, shorten the decay to the steps that are left (4), or resume from"),
        (9, "raise training.steps to at least 15, shorten the decay to the steps that are left (1), or resume from"),
    ):
        with pytest.raises(ConfigError) as caught:
            check_decay(trunk, branch, step=step, num_steps=10)
        assert str(caught.value).startswith(
            f"training.schedule.decay_steps: 6 of training.steps=10 would have begun behind step 4, and the checkpoint is of step {step}, "
        )
        assert remedies in str(caught.value)
        documented(str(caught.value))
    share = changed(trunk, "training.schedule.decay_share", 0.6)
    with pytest.raises(ConfigError, match=r"decay_share: 0.6 of training.steps=10 would have begun behind step 4"):
        check_decay(trunk, share, step=6, num_steps=10)


def test_a_run_goes_on_within_its_own_decay_as_it_is() -> None:
    run = changed(PRETRAIN, "training.schedule", to_mapping(WSDSchedule(decay_steps=6)))
    check_decay(run, changed(run, "training.clip_norm", 3.0), step=8, num_steps=10)
    # a shorter run would put more of the decay into the past, and a longer one first brings the peak back, as it says
    with pytest.raises(ConfigError, match="begun behind step 3, and the checkpoint is of step 8"):
        check_decay(run, changed(run, "training.steps", 9), step=8, num_steps=9)
    check_decay(run, changed(run, "training.steps", 20), step=8, num_steps=20)
    for other in ("constant", "linear"):
        check_decay(run, changed(PRETRAIN, "training.schedule", {"name": other}), step=8, num_steps=10)


def test_checkpoints_of_runs_that_said_true_or_false_go_on() -> None:
    for word, policy in ((True, "full"), (False, "none")):
        old = with_defaults(changed(PRETRAIN, "training.gradient_checkpointing", word), PretrainConfig)
        assert from_mapping(TrainingConfig, old["training"]).recomputation == policy
        check_changes(old, PRETRAIN)


def test_all_changes_are_named_at_once_and_a_variant_s_own_settings_too() -> None:
    new = changed(PRETRAIN, "training.optimizer", {"name": "sgd", "learning_rate": 1.0})
    new = changed(new, "model.d_ff", 96)
    with pytest.raises(ConfigError) as caught:
        check_changes(PRETRAIN, new, ["training.optimizer"])
    assert "model.d_ff: was 64 in the checkpoint, is 96 now; training.optimizer.name: was 'adamw' in" in str(
        caught.value
    )
    off = changed(PRETRAIN, "training.deepspeed", None)
    check_changes(PRETRAIN, off)
    check_changes(off, PRETRAIN)


@pytest.mark.parametrize("name", ["training.clip_nrom", "training.optimizer.beta", "", "training.optimizer.", "x\ny"])
def test_a_word_that_allows_nothing_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="is no setting of this run; give a key such as") as caught:
        check_changes(PRETRAIN, PRETRAIN, [name])
    assert "\n" not in str(caught.value)
    documented(str(caught.value))


def test_stores_of_a_mixture_are_told_apart_by_their_place() -> None:
    stores = ["123", "456"]
    for now, message in (
        (stores[::-1], "data_fingerprint.stores[0]: was '123' in the checkpoint, is '456' now"),
        (["123", "789"], "data_fingerprint.stores[1]: was '456' in the checkpoint, is '789' now"),
        (["123"], "data_fingerprint.stores[1]: was '456' in the checkpoint, is None now"),
        ([*stores, "789"], "data_fingerprint.stores[2]: was None in the checkpoint, is '789' now"),
    ):
        with pytest.raises(ConfigError) as caught:
            check_changes(PRETRAIN, changed(PRETRAIN, "data_fingerprint.stores", now))
        assert message in str(caught.value)
        documented(str(caught.value))


@pytest.mark.parametrize(
    ("config", "config_class", "section", "key"),
    [
        (PRETRAIN, PretrainConfig, "training", "seed"),
        (PRETRAIN, PretrainConfig, "objective", "mean_noise_span_length"),
        (PRETRAIN, PretrainConfig, None, "loss"),
        (FINETUNE, FinetuneConfig, None, "rows"),
    ],
)
def test_a_setting_that_came_with_a_later_version_has_its_default_in_older_checkpoints(
    config: dict[str, Any], config_class: type, section: str | None, key: str
) -> None:
    old = copy.deepcopy(config)
    del (old if section is None else old[section])[key]
    check_changes(with_defaults(old, config_class), config)
    with pytest.raises(ConfigError, match=r"training\.global_batch_rows: was 4 in the checkpoint, is 8 now"):
        check_changes(with_defaults(old, config_class), changed(config, "training.global_batch_rows", 8))
    unreadable = {**old, "training": {}}
    assert with_defaults(unreadable, config_class) == unreadable


def test_moved_folders_are_the_same_run() -> None:
    new = changed(changed(PRETRAIN, "run_dir", str(Path("/elsewhere"))), "data.store", "/elsewhere/store")
    check_changes(PRETRAIN, new)
