import errno
import functools
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast, T5Tokenizer

from spade_t5.data.files import BadRows, read_rows
from spade_t5.data.pydocs import read_pydocs
from spade_t5.errors import ConfigError
from spade_t5.hf.tokenizer import (
    check_vocabulary,
    from_sentencepiece,
    load_tokenizer,
    model_vocab_size,
    save_tokenizer,
    sentinel_ids,
    tokenizer_hash,
)
from spade_t5.testing import dev_data

sentencepiece = pytest.importorskip("sentencepiece")

HARD_TEXTS = [
    "",
    "   ",
    "  a  b   c ",
    "Hello World!, how are you?",
    "emoji 😀👩‍👩‍👧 done 🏳️‍🌈",
    "日本語のテキスト 中文。",
    "한국어 텍스트 नमस्ते दुनिया กำลัง",
    "a\nb\n\nc\td\r\ne",
    "\n",
    "é e\u0301 ﬁ ½ ™ \u200b x\u00a0y \ufeff z ⅷ ㍿ ﷺ \uff21\uff42\uff43",
    "\u0007 \u0001 bell",
    "don't {brackets} <tag> </tag> <<>>",
    "def f(x):\n    return x\n\n\n        y",
    "#" * 300,
    "word " * 300,
]


@functools.cache
def docstrings() -> list[str]:
    return [doc.text for doc in read_pydocs(("json", "email", "logging", "argparse"), num_processes=1)]


@functools.cache
def trained(normalization: str, **options: Any) -> bytes:
    model = io.BytesIO()

    def lines() -> Iterator[str]:
        for text in docstrings():
            yield from (line for line in text.split("\n") if line.strip())

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines(),
        model_writer=model,
        **{"vocab_size": 600, "byte_fallback": True, **options},
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        normalization_rule_name=normalization,
        minloglevel=2,
    )
    return model.getvalue()


MODELS = {
    "t5": ("nmt_nfkc", {}),
    "identity": ("identity", {"remove_extra_whitespaces": False}),
    "identity, blanks joined": ("identity", {}),
    "pieces over words": ("nmt_nfkc", {"split_by_whitespace": False}),
    "no bytes": ("nmt_nfkc", {"byte_fallback": False}),
    "no blank in front": ("nmt_nfkc", {"add_dummy_prefix": False}),
}


@pytest.fixture(scope="module", params=MODELS, ids=list(MODELS))
def model(request: pytest.FixtureRequest) -> bytes:
    normalization, options = MODELS[request.param]
    return trained(normalization, **options)


@pytest.fixture(scope="module")
def small() -> PreTrainedTokenizerFast:
    return from_sentencepiece(trained("nmt_nfkc"), num_sentinels=120)


def plain_ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids


def test_ids_and_text_are_sentencepiece_s(model: bytes) -> None:
    original = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokenizer = from_sentencepiece(model, num_sentinels=100)
    texts = HARD_TEXTS + docstrings()
    tied = 0
    for text in texts:
        ids, expected = plain_ids(tokenizer, text), original.encode(text)
        if ids != expected:
            # ">>>" is ">>" + ">" or ">" + ">>": equal scores, between which SentencePiece's rounding decides.
            assert sum(map(original.get_score, ids)) == pytest.approx(
                sum(map(original.get_score, expected)), abs=1e-9
            ), text
            tied += 1
        if original.unk_id() not in ids and text.strip():
            assert tokenizer.decode(expected) == original.decode(expected), text
    assert tied <= len(texts) / 400


def test_literal_blank_symbol() -> None:
    """U+2581 stands for a blank within SentencePiece; T5's normalisation makes it one."""
    model = trained("nmt_nfkc")
    text = "x▁y ▁ z ▁▁"
    expected = sentencepiece.SentencePieceProcessor(model_proto=model).encode(text)
    assert plain_ids(from_sentencepiece(model, num_sentinels=1), text) == expected


def test_identity_keeps_line_breaks_and_blanks() -> None:
    tokenizer = from_sentencepiece(trained("identity", remove_extra_whitespaces=False), num_sentinels=1)
    text = "def f(x):\n    return 'é 😀'\n\n\ny"
    assert tokenizer.decode(plain_ids(tokenizer, text)) == text
    assert tokenizer.convert_tokens_to_ids("<0x0A>") in plain_ids(tokenizer, text)


def test_names_of_special_pieces_in_a_text_are_text(small: PreTrainedTokenizerFast) -> None:
    for name in ("</s>", "<pad>", "<unk>", "<0x41>", "<extra_id_0>"):
        ids = plain_ids(small, f"a {name} b")
        assert not {0, 1, 2, small.convert_tokens_to_ids("<0x41>"), *sentinel_ids(small)} & set(ids), name
        assert small.decode(ids) == f"a {name} b"


def test_special_tokens(small: PreTrainedTokenizerFast) -> None:
    assert (small.pad_token_id, small.eos_token_id, small.unk_token_id) == (0, 1, 2)
    assert small("a").input_ids[-1] == 1
    assert small("a", "b").input_ids == [*plain_ids(small, "a"), 1, *plain_ids(small, "b"), 1]
    batch = small(["a", "a b c"], padding=True)
    assert batch.attention_mask[0][-1] == 0
    assert batch.input_ids[0][-1] == 0


def test_sentinels_keep_t5_s_order_and_grow_upwards(small: PreTrainedTokenizerFast) -> None:
    assert sentinel_ids(small) == (*range(699, 599, -1), *range(700, 720))
    assert small.init_kwargs["sentinel_ids"] == list(sentinel_ids(small))
    assert (len(small), model_vocab_size(small)) == (720, 768)
    few = from_sentencepiece(trained("nmt_nfkc"), num_sentinels=3)
    assert sentinel_ids(few) == (602, 601, 600)


def test_sentinels_in_text(small: PreTrainedTokenizerFast) -> None:
    ids = small("the <extra_id_0> of <extra_id_100>").input_ids
    assert [token for token in ids if token >= 600] == [699, 700]
    assert small.decode(ids, skip_special_tokens=True) == "the of"
    assert small.decode(ids) == "the<extra_id_0> of<extra_id_100></s>"


def test_sentinels_stay_when_tokens_are_added(small: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Counting down from len(tokenizer) shifts with every added token."""
    small.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.add_tokens(["newword"])
    assert sentinel_ids(tokenizer) == sentinel_ids(small)


def test_saved_folder_is_read_by_plain_transformers(small: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    small.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["sentinel_ids"][0] == 699
    for tokenizer in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)):
        assert tokenizer_hash(tokenizer) == tokenizer_hash(small)
        assert sentinel_ids(tokenizer) == sentinel_ids(small)
        for text in [*HARD_TEXTS, "the <extra_id_7> end"]:
            assert tokenizer(text).input_ids == small(text).input_ids
        assert tokenizer.decode([699, 5, 1], skip_special_tokens=True) == small.decode([5])


def test_a_folder_that_cannot_be_written(small: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").mkdir()  # which the library's code in Rust comes upon
    with pytest.raises(OSError, match="Is a directory") as caught:
        save_tokenizer(small, tmp_path)
    assert caught.value.errno == errno.EISDIR


def test_more_sentinels_can_be_added(small: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    small.save_pretrained(tmp_path / "small")
    grown = load_tokenizer(tmp_path / "small", num_sentinels=1000)
    assert sentinel_ids(grown) == (*sentinel_ids(small), *range(720, 1600))
    assert tokenizer_hash(grown) == tokenizer_hash(from_sentencepiece(trained("nmt_nfkc"), num_sentinels=1000))
    grown.save_pretrained(tmp_path / "grown")
    again = AutoTokenizer.from_pretrained(tmp_path / "grown")
    assert sentinel_ids(again) == sentinel_ids(grown)
    assert again.decode([1599, 5, 1], skip_special_tokens=True) == small.decode([5])


def test_hash_is_of_what_decides_ids(small: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    before = tokenizer_hash(small)
    small(["a", "b c"], padding=True, truncation=True, max_length=2)
    assert tokenizer_hash(small) == before
    others = [
        from_sentencepiece(trained("nmt_nfkc"), num_sentinels=119),
        from_sentencepiece(trained("identity"), num_sentinels=120),
    ]
    assert before not in map(tokenizer_hash, others)


def test_hugging_face_t5_folders_are_read(tmp_path: Path) -> None:
    model = trained("nmt_nfkc", byte_fallback=False)
    original = sentencepiece.SentencePieceProcessor(model_proto=model)
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow" / "spiece.model").write_bytes(model)
    pieces = [(original.id_to_piece(i), original.get_score(i)) for i in range(len(original))]
    sentinels = [(f"<extra_id_{k}>", 0.0) for k in range(99, -1, -1)]
    T5Tokenizer(vocab=pieces + sentinels).save_pretrained(tmp_path / "fast")
    for folder in ("slow", "fast"):
        tokenizer = load_tokenizer(tmp_path / folder)
        assert sentinel_ids(tokenizer) == tuple(range(699, 599, -1))
        assert tokenizer("the end").input_ids == [*original.encode("the end"), 1]


def test_vocabulary_must_fit_the_model(small: PreTrainedTokenizerFast) -> None:
    check_vocabulary(small, 720)
    with pytest.raises(ConfigError, match=r"model\.vocab_size: 719 .* largest id is 719; use 768"):
        check_vocabulary(small, 719)


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rubbish.model").write_bytes(b"rubbish")
    (tmp_path / "empty").mkdir()
    bpe = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(docstrings()), model_writer=bpe, vocab_size=300, model_type="bpe", minloglevel=2
    )
    (tmp_path / "bpe.model").write_bytes(bpe.getvalue())
    for name in ("rubbish.model", "missing.model", "empty", "bpe.model", "missing/folder"):
        with pytest.raises(ConfigError, match="tokenizer: "):
            load_tokenizer(tmp_path / name)


@pytest.mark.dev_data
def test_t5_model() -> None:
    path = dev_data() / "tokenizer" / "t5_tokenizer_base.model"
    tokenizer = load_tokenizer(path)
    assert tokenizer("Hello World!, how are you?").input_ids == [8774, 1150, 55, 6, 149, 33, 25, 58, 1]
    assert sentinel_ids(tokenizer) == tuple(range(32099, 31999, -1))
    assert (len(tokenizer), model_vocab_size(tokenizer)) == (32100, 32128)
    assert sentinel_ids(load_tokenizer(path, num_sentinels=128)) == (*range(32099, 31999, -1), *range(32100, 32128))


@pytest.mark.dev_data
def test_seqio_model() -> None:
    tokenizer = load_tokenizer(dev_data() / "tokenizer" / "seqio_test_sentencepiece.model")
    expected = [3, 2, 20, 4, 3, 2, 8, 13, 2, 3, 2, 23, 7, 19, 22, 3, 2, 7, 2, 1]
    assert tokenizer("The quick brown fox.").input_ids == expected


@pytest.mark.dev_data
@pytest.mark.parametrize("corpus", ["c4_en", "wikinews", "wikitext"])
def test_real_text_has_sentencepiece_s_ids(corpus: str) -> None:
    """SentencePiece adds up 32-bit scores over the whole text, so in a long one nearly equal ways to split a word may
    round to the same; there its ids for the word alone are the measure."""
    path = dev_data() / "tokenizer" / "t5_tokenizer_base.model"
    original = sentencepiece.SentencePieceProcessor(str(path))
    tokenizer = load_tokenizer(path)
    rounded = 0
    rows = [row.fields["text"] for row in read_rows(dev_data() / "text" / f"{corpus}.jsonl.gz", bad_rows=BadRows())]
    for text in rows:
        ids, expected = plain_ids(tokenizer, text), original.encode(text)
        if ids != expected:
            rounded += 1
            assert len(expected) > 500
            assert ids == [token for word in original.normalize(text).split("▁")[1:] for token in original.encode(word)]
    assert rounded <= len(rows) / 500
