import json
from pathlib import Path

import pytest

from spade_t5.errors import ConfigError, DataError
from spade_t5.hf.tokenizer import load_tokenizer, sentinel_ids
from spade_t5.pretrain.corpora import FilesCorpus
from spade_t5.pretrain.tokenizer import TokenizerConfig, train_tokenizer


def config(corpus: Path, out: Path, **fields: object) -> TokenizerConfig:
    values = {"vocab_size": 600, "num_sentinels": 4, **fields}
    return TokenizerConfig(corpus=FilesCorpus(paths=(str(corpus),)), out=out, **values)  # type: ignore[arg-type]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_trained_tokenizer_writes_any_text(tokenizer_folder: Path, documents: list[str]) -> None:
    tokenizer = load_tokenizer(tokenizer_folder)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert len(tokenizer) == 720
    assert sentinel_ids(tokenizer)[0] == 699
    for text in ["emoji 😀 and 日本語", *documents[:50]]:
        ids = tokenizer(text).input_ids
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == " ".join(text.split())


def test_training_is_deterministic(tmp_path: Path, corpus_file: Path) -> None:
    first = train_tokenizer(config(corpus_file, tmp_path / "a"))
    assert files(first) == files(train_tokenizer(config(corpus_file, tmp_path / "b")))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_identity_keeps_layout(tmp_path: Path, corpus_file: Path) -> None:
    folder = train_tokenizer(config(corpus_file, tmp_path / "t", normalization="identity"))
    text = "def f():\n    return 1\n\n\tﬁn  "
    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_long_lines_are_learned_from(tmp_path: Path) -> None:
    """SentencePiece leaves out lines above its limit; ours come in pieces."""
    corpus = tmp_path / "long.jsonl"
    words = " ".join(f"abracadabra{i % 7} zyzzyva" for i in range(20_000))
    corpus.write_text(json.dumps({"text": words}))
    tokenizer = load_tokenizer(train_tokenizer(config(corpus, tmp_path / "t", vocab_size=277)))
    assert len(tokenizer("zyzzyva").input_ids) == 2


def test_only_the_sample_is_read(tmp_path: Path) -> None:
    corpus = tmp_path / "two.jsonl"
    words = " ".join(f"{a}{b}" for a in "abcdefgh" for b in ("alpha", "beta", "gamma", "delta", "epsilon"))
    corpus.write_text(json.dumps({"text": words * 5}) + "\nthis line is not JSON\n")
    settings = {"vocab_size": 280, "sample_bytes": 100, "strict": True}
    train_tokenizer(config(corpus, tmp_path / "t", **settings))
    with pytest.raises(DataError, match="line 2: not JSON"):
        train_tokenizer(config(corpus, tmp_path / "u", **{**settings, "sample_bytes": 10_000}))
    assert not (tmp_path / "u").exists()


def test_bad_input_leaves_nothing_behind(tmp_path: Path, corpus_file: Path) -> None:
    (tmp_path / "empty.jsonl").write_text('{"text": " "}\n')
    (tmp_path / "there").mkdir()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(DataError, match="holds no text"):
        train_tokenizer(config(tmp_path / "empty.jsonl", tmp_path / "t"))
    with pytest.raises(DataError, match="no such file"):
        train_tokenizer(config(tmp_path / "missing.jsonl", tmp_path / "t"))
    with pytest.raises(ConfigError, match="vocab_size: SentencePiece cannot learn 50000 pieces"):
        train_tokenizer(config(corpus_file, tmp_path / "t", vocab_size=50_000))
    with pytest.raises(ConfigError, match="exists already"):
        train_tokenizer(config(corpus_file, tmp_path / "there"))
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "fields", [{"vocab_size": 200}, {"num_sentinels": 0}, {"character_coverage": 0.5}, {"sample_bytes": 0}]
)
def test_impossible_settings_are_refused(tmp_path: Path, fields: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        config(tmp_path, tmp_path, **fields)
