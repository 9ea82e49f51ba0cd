"""What several tests of fine-tuning share: a tokenizer of whole words, and a task that a tiny model learns in seconds."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "</s>", "<unk>"]


@pytest.fixture
def word_tokenizer() -> Callable[[Sequence[str]], PreTrainedTokenizerFast]:
    """Makes a tokenizer with one id for each word: pad 0, end mark 1, unknown 2, then the words in order."""

    def make(words: Sequence[str]) -> PreTrainedTokenizerFast:
        backend = Tokenizer(WordLevel({word: i for i, word in enumerate([*SPECIAL, *words])}, unk_token="<unk>"))
        backend.pre_tokenizer = WhitespaceSplit()
        backend.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
        return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")

    return make


@pytest.fixture
def opinions(tmp_path: Path, word_tokenizer: Callable[[Sequence[str]], PreTrainedTokenizerFast]) -> dict[str, Path]:
    """A folder in GLUE's layout whose SST-2 is decided by one word, and a tokenizer for it."""
    draw = random.Random(0)
    noise = ["film", "plot", "cast", "scene", "music", "very", "quite", "the", "a", "and"]
    verdicts = [["bad", "dull", "weak"], ["good", "fresh", "warm"]]

    def lines(count: int) -> list[str]:
        rows = []
        for i in range(count):
            words = draw.choices(noise, k=draw.randint(0, 6))
            words.insert(draw.randint(0, len(words)), draw.choice(verdicts[i % 2]))
            rows.append(f"{' '.join(words)} \t{i % 2}\n")
        return rows

    folder = tmp_path / "glue" / "SST-2"
    folder.mkdir(parents=True)
    for name, count in (("train", 400), ("dev", 61)):
        (folder / f"{name}.tsv").write_text("sentence\tlabel\n" + "".join(lines(count)), encoding="utf-8")
    words = ["sst2", "sentence:", "negative", "positive", *noise, *verdicts[0], *verdicts[1]]
    word_tokenizer(words).save_pretrained(tmp_path / "tokenizer")
    return {"glue": tmp_path / "glue", "tokenizer": tmp_path / "tokenizer"}
