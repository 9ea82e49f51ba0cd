import pytest

from spade_t5.errors import ConfigError, DataError
from spade_t5.finetune.task import (
    UNKNOWN_CLASS,
    Example,
    Row,
    Task,
    class_index,
    field,
    joined_prompt,
    text_field,
    word_to_class,
)


def make_task(**values: object) -> Task:
    defaults = {
        "name": "toy",
        "kind": "classification",
        "splits": {"train": list},
        "to_example": lambda row: Example(source="", target="", reference=0),
        "metrics": ("accuracy",),
        "label_words": ("no", "yes"),
        "max_source_tokens": 8,
        "max_target_tokens": 8,
    }
    return Task(**{**defaults, **values})


def test_a_generation_task_has_no_encoder_head() -> None:
    assert make_task().num_outputs == 2
    assert make_task(kind="regression").num_outputs == 1
    with pytest.raises(ConfigError, match="toy generates text"):
        _ = make_task(kind="generation").num_outputs


def test_unknown_split_names_the_known_ones() -> None:
    task = make_task(splits={"train": lambda: [Row({}, "line 1")]})
    assert len(task.examples("train")) == 1
    with pytest.raises(ConfigError, match="no split 'dev'; it has: train"):
        task.examples("dev")


def test_examples_stop_at_the_limit() -> None:
    task = make_task(splits={"train": lambda: (Row({}, f"line {i}") for i in range(5))})
    assert len(task.examples("train", limit=3)) == 3
    assert len(task.examples("train", limit=9)) == 5


def test_an_empty_split_is_an_error() -> None:
    with pytest.raises(DataError, match="toy: split 'train' holds no rows"):
        make_task().examples("train")


@pytest.mark.parametrize("value", ["2", "", "true", 1, True, None])
def test_label_outside_the_task_names_row_value_and_allowed_labels(value: object) -> None:
    with pytest.raises(DataError, match=r"^file line 3: label .* is outside the task toy; allowed: '0', '1'$") as error:
        class_index(value, ("0", "1"), Row({}, "file line 3"), "toy")
    assert repr(value) in str(error.value)


def test_label_types_are_not_mixed_up() -> None:
    row = Row({}, "file line 3")
    assert class_index("1", ("0", "1"), row, "toy") == 1
    assert class_index(1, range(2), row, "toy") == 1
    for foreign in (True, 1.0, -1):
        with pytest.raises(DataError, match="outside the task"):
            class_index(foreign, range(2), row, "toy")


def test_missing_and_ill_typed_fields_are_named() -> None:
    row = Row({"text": 3, "label": "x"}, "file line 3")
    assert field(row, "label") == "x"
    with pytest.raises(DataError, match="file line 3: no field 'body'; the row has: text, label"):
        field(row, "body")
    with pytest.raises(DataError, match="file line 3: field 'text' is int, expected text"):
        text_field(row, "text")


def test_prompts_and_label_words() -> None:
    assert joined_prompt("sst2", {"sentence": "fine ."}) == "sst2 sentence: fine ."
    assert word_to_class(("no", "yes"), " yes ") == 1
    assert word_to_class(("no", "yes"), "yes!") == UNKNOWN_CLASS
