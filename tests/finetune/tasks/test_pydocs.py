from collections import Counter

import pytest

from spade_t5.data.pydocs import PyDoc, split_of
from spade_t5.errors import DataError
from spade_t5.finetune.tasks.pydocs import PydocsMatch, PydocsSummary, PydocsTopic, match_pairs, text_split


def docs(count: int) -> list[PyDoc]:
    return [
        PyDoc("p", "p.m", f"f{i}", f"Summary {i}.", f"Body {i}.", f"Summary {i}.\n\nBody {i}.") for i in range(count)
    ]


def test_half_of_the_pairs_match_and_no_text_tells_which() -> None:
    pairs = match_pairs(docs(43))
    assert len(pairs) == 40
    assert Counter(label for _, _, label in pairs) == {0: 20, 1: 20}
    assert len({summary.summary for summary, _, _ in pairs}) == len({body.body for _, body, _ in pairs}) == 40
    assert all((summary == body) == (label == 1) for summary, body, label in pairs)
    assert match_pairs(docs(43)) == pairs


def test_a_repeated_summary_cannot_be_a_false_negative() -> None:
    same = [doc._replace(summary="Return the value.") for doc in docs(8)]
    assert match_pairs(same) == []
    assert len(match_pairs([*docs(7), *same])) == 8


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    return {"cache_dir": tmp_path_factory.getbasetemp() / "pydocs"}


# `json`, `queue` and `inspect` are held out by the hash of their names; `asyncio` and `email` are not
PACKAGES = ("asyncio", "email", "inspect", "json", "queue")


def test_summaries_are_held_out_by_package(cached: dict[str, object]) -> None:
    assert {split_of(name) for name in PACKAGES} == {"train", "validation"}
    task = PydocsSummary(packages=PACKAGES, **cached).build()
    for split in ("train", "validation"):
        examples = task.examples(split)
        assert len(examples) > 30
        assert all(example.source.startswith("summarize: ") for example in examples)
        assert all("\n" not in example.source and example.target for example in examples)
        rows = list(task.splits[split]())
        assert {split_of(row.fields["package"]) for row in rows} == {split}
    assert task.examples("train") == task.examples("train")


def test_packages_without_a_held_out_one_are_refused(cached: dict[str, object]) -> None:
    task = PydocsSummary(packages=("asyncio",), **cached).build()
    assert task.examples("train", limit=1)
    with pytest.raises(DataError, match=r"task.packages: none of asyncio is in the validation split"):
        task.examples("validation")


def test_topics_are_held_out_inside_each_package(cached: dict[str, object]) -> None:
    task = PydocsTopic(packages=("asyncio", "email", "inspect"), max_docs_per_package=150, **cached).build()
    splits = {split: task.examples(split) for split in ("train", "validation")}
    assert not {e.source for e in splits["train"]} & {e.source for e in splits["validation"]}
    total = Counter(e.reference for examples in splits.values() for e in examples)
    assert set(total) == {0, 1, 2}
    assert all(count <= 150 for count in total.values())
    assert {e.reference for e in splits["validation"]} == {0, 1, 2}
    assert 0.04 < len(splits["validation"]) / sum(total.values()) < 0.2
    first = splits["train"][0]
    assert first.source.startswith("topic text: ")
    assert first.target == ("asyncio", "email", "inspect")[int(first.reference)]
    # the first rows are a sample of all classes, as a limit on the number of rows needs
    assert {e.reference for e in task.examples("train", limit=40)} == {0, 1, 2}


def test_the_split_of_a_text_is_its_own() -> None:
    some = docs(2000)
    share = sum(text_split(doc) == "validation" for doc in some) / 2000
    assert 0.08 < share < 0.125
    assert [text_split(doc) for doc in some[:50]] == [
        text_split(doc._replace(package="q", name="g")) for doc in some[:50]
    ]


def test_match_rows_are_balanced(cached: dict[str, object]) -> None:
    task = PydocsMatch(packages=PACKAGES, **cached).build()
    examples = task.examples("validation")
    assert Counter(e.reference for e in examples) == {0: len(examples) // 2, 1: len(examples) // 2}
    assert all(e.source.startswith("match summary: ") and " body: " in e.source for e in examples)
    assert {(e.reference, e.target) for e in examples} == {(0, "no_match"), (1, "match")}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"packages": ("numpy",)}, "at least two"),
        ({"packages": ("numpy", "numpy")}, "at least two, all different"),
        ({"packages": ("numpy", "stdlib")}, "stands for many packages"),
        ({"max_docs_per_package": 0}, "at least 1"),
    ],
)
def test_inconsistent_topics_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PydocsTopic(**values)  # type: ignore[arg-type]
