from collections.abc import Callable, Sequence

import pytest
from transformers import PreTrainedTokenizerFast

from spade_t5.errors import ConfigError
from spade_t5.finetune.predict import label_word_ids, length_batches
from spade_t5.finetune.tasks.glue import Mrpc, Sst2


def test_label_words_end_in_the_end_mark(word_tokenizer: Callable[[Sequence[str]], PreTrainedTokenizerFast]) -> None:
    assert label_word_ids(Sst2().build(), word_tokenizer(["negative", "positive"])) == [[3, 1], [4, 1]]


def test_label_words_with_the_same_tokens_are_refused(
    word_tokenizer: Callable[[Sequence[str]], PreTrainedTokenizerFast],
) -> None:
    message = "tokenizer: label words 'not_equivalent' and 'equivalent' of task mrpc have the same tokens"
    with pytest.raises(ConfigError, match=message):
        label_word_ids(Mrpc().build(), word_tokenizer(["negative", "positive"]))


def test_long_sources_come_first_and_batches_keep_to_their_room() -> None:
    sources = [[1] * n for n in (3, 9, 4, 4, 1, 20)]
    assert list(length_batches(sources, range(6), 12)) == [[5], [1], [2, 3, 0], [4]]
    assert list(length_batches(sources, [0, 2, 4], 1)) == [[2], [0], [4]]
    assert list(length_batches(sources, [], 12)) == []
