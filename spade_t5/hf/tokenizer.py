"""Tokenizers: SentencePiece unigram models as one `tokenizer.json`, with sentinels on top.

Hugging Face's own T5 tokenizer class rebuilds its backend with byte fallback off, so a SentencePiece model that has byte pieces would
silently lose every character outside its vocabulary. Here the backend is built once, with byte fallback where the model has it, and saved as
a plain fast tokenizer that any `transformers` loads by `AutoTokenizer`.

Sentinels `<extra_id_k>`: the first 100 lie on top of the pieces in descending order, as in T5 (`<extra_id_0>` is 32099 over 32,000
pieces), and any others above them in ascending order (`<extra_id_100>` is 32100), so that a T5 vocabulary can grow.
"""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from spade_t5.errors import ConfigError
from spade_t5.hf.folders import TOKENIZER_FILES, local_folder, plain_file, read_by_library, read_settings

T5_SENTINELS = 100
VOCABULARY_MULTIPLE = 128

_MAX_MODEL_BYTES = 2**26
_META = "\N{LOWER ONE EIGHTH BLOCK}"


def load_tokenizer(path_or_name: str | Path, *, num_sentinels: int | None = None) -> PreTrainedTokenizerFast:
    """A fast tokenizer from one of our folders, a SentencePiece `.model` file, or a Hugging Face T5 folder or name.

    Args:
        path_or_name: folder, `.model` file, or name on the hub.
        num_sentinels: at least this many sentinels; missing ones are appended. By default a `.model` file gets T5's 100, and a folder keeps
            what it has.

    Raises:
        ConfigError: there is no tokenizer there, or not one that T5 objectives can use.
    """
    path = Path(path_or_name)
    if not path.exists() and path.suffix != ".model" and not str(path_or_name).startswith((".", "/", "~")):
        path = local_folder(path_or_name, files=TOKENIZER_FILES)
    if path.suffix == ".model" and not path.is_file():
        raise ConfigError(f"tokenizer: {path} does not exist; give a SentencePiece .model file or a tokenizer folder")
    model = path if path.suffix == ".model" else path / "spiece.model"
    if model == path or (not (path / "tokenizer.json").is_file() and model.is_file()):
        return _from_model_file(
            model if model == path else plain_file(path, model.name),
            num_sentinels=T5_SENTINELS if num_sentinels is None else num_sentinels,
        )
    if not (path.is_dir() and (path / "tokenizer.json").is_file()):
        raise ConfigError(
            f"tokenizer: {path} holds no tokenizer.json; give a tokenizer folder or a SentencePiece .model file"
        )
    plain_file(path, "tokenizer.json")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (path / name).exists():
            read_settings(path, name)
    # Not through AutoTokenizer: a folder that names T5Tokenizer would be rebuilt without byte fallback.
    with read_by_library(path, "tokenizer"):
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    for name in ("pad", "eos", "unk"):
        if getattr(tokenizer, f"{name}_token_id") is None:
            raise ConfigError(f"tokenizer: {path_or_name} has no {name} token; use a T5-style tokenizer")
    have = len(sentinel_ids(tokenizer))
    if num_sentinels is not None and have < num_sentinels:
        _add_sentinels(tokenizer.backend_tokenizer, have, num_sentinels)
        tokenizer = _wrap(tokenizer.backend_tokenizer, _special_tokens(tokenizer))
    return tokenizer


def _from_model_file(path: Path, *, num_sentinels: int) -> PreTrainedTokenizerFast:
    if path.stat().st_size > _MAX_MODEL_BYTES:
        raise ConfigError(f"tokenizer: {path} is larger than {_MAX_MODEL_BYTES} bytes, which no SentencePiece model is")
    with read_by_library(path, "tokenizer"):
        return from_sentencepiece(path.read_bytes(), num_sentinels=num_sentinels)


def from_sentencepiece(model: bytes, *, num_sentinels: int) -> PreTrainedTokenizerFast:
    """The fast tokenizer that gives the ids of a SentencePiece unigram model, with sentinels on top.

    One difference is left: where a text spells out the name of a special piece, such as `</s>` in a web page, its `<` stands alone.

    Args:
        model: content of the `.model` file.
        num_sentinels: how many sentinels it gets.

    Raises:
        ConfigError: not a unigram model, or one with features that have no counterpart here.
    """
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from sentencepiece import sentencepiece_model_pb2

    # Not by SentencePiece's own reader: what its C++ makes of a crafted file is not always an exception.
    schema: Any = sentencepiece_model_pb2
    proto = schema.ModelProto()
    try:
        proto.ParseFromString(model)
    except DecodeError:
        raise ConfigError("tokenizer: the .model file is not a SentencePiece model") from None
    if not proto.pieces:
        raise ConfigError("tokenizer: the .model file is not a SentencePiece model: it has no pieces")
    unigram = schema.TrainerSpec.UNIGRAM
    if proto.trainer_spec.model_type != unigram or proto.trainer_spec.treat_whitespace_as_suffix:
        raise ConfigError("tokenizer: only SentencePiece unigram models with whitespace as a prefix can be used")
    kinds = schema.ModelProto.SentencePiece
    special = {
        kind: [p.piece for p in proto.pieces if p.type == kind] for kind in (kinds.CONTROL, kinds.BYTE, kinds.UNKNOWN)
    }
    names = {
        "pad_token": _piece(proto, proto.trainer_spec.pad_id, "pad"),
        "eos_token": _piece(proto, proto.trainer_spec.eos_id, "eos"),
        "unk_token": _piece(proto, proto.trainer_spec.unk_id, "unk"),
    }

    vocabulary = [(p.piece, p.score) for p in proto.pieces]
    backend = Tokenizer(
        Unigram(vocabulary, unk_id=proto.trainer_spec.unk_id, byte_fallback=len(special[kinds.BYTE]) == 256)
    )
    normalizer = _normalizer(proto.normalizer_spec)
    if normalizer is not None:
        backend.normalizer = normalizer
    # Viterbi paths through single words are those through the whole text, unless some piece spans words.
    spans_words = any(_META in p.piece[1:] for p in proto.pieces)
    reserved = sorted({p[1:] for pieces in special.values() for p in pieces if p.startswith("<")})
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # The blank in front comes from the normaliser: here it would be left out before a text that starts with one.
            pre_tokenizers.Metaspace(replacement=_META, prepend_scheme="never", split=not spans_words),
            # The unigram search here would find special pieces in the text, which SentencePiece's does not.
            pre_tokenizers.Split(Regex(f"<(?={'|'.join(map(re.escape, reserved))})"), behavior="merged_with_previous"),
        ]
    )
    prepend = "always" if proto.normalizer_spec.add_dummy_prefix else "never"
    backend.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(replacement=_META, prepend_scheme=prepend, split=not spans_words)]
    )
    eos, eos_id = names["eos_token"], proto.trainer_spec.eos_id
    backend.post_processor = processors.TemplateProcessing(
        single=f"$A {eos}", pair=f"$A {eos} $B {eos}", special_tokens=[(eos, eos_id)]
    )
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names.values()])
    _add_sentinels(backend, 0, num_sentinels)
    return _wrap(backend, names)


def sentinel_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids of the sentinels in order of use: `<extra_id_0>` first."""
    vocabulary = tokenizer.get_vocab()
    ids: list[int] = []
    while (token := f"<extra_id_{len(ids)}>") in vocabulary:
        ids.append(vocabulary[token])
    return tuple(ids)


def model_vocab_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows that a model's embedding needs: the number of ids, rounded up to a multiple of 128 (32,128 for T5)."""
    largest = max(tokenizer.get_vocab().values())
    return -(-(largest + 1) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 of what decides the ids; two tokenizers with the same hash give the same ids for the same text."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    for setting in ("truncation", "padding"):  # left over from the last call, not part of the tokenizer
        content.pop(setting, None)
    canonical = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes a tokenizer folder.

    Raises:
        OSError: it cannot be written.
    """
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # the library's own code in Rust raises nothing narrower
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(folder)) from None


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Fails if the tokenizer gives ids that a model has no embedding for.

    Raises:
        ConfigError: naming the largest id and the size of the model's vocabulary.
    """
    largest = max(tokenizer.get_vocab().values())
    if largest >= vocab_size:
        raise ConfigError(
            f"model.vocab_size: {vocab_size} is too small for the tokenizer, whose largest id is {largest}; "
            f"use {model_vocab_size(tokenizer)} or another tokenizer"
        )


def _piece(proto: Any, number: int, name: str) -> str:
    if not 0 <= number < len(proto.pieces):
        raise ConfigError(f"tokenizer: the SentencePiece model has no {name} piece; train it with pad, eos and unk")
    return str(proto.pieces[number].piece)


def _normalizer(spec: Any) -> normalizers.Normalizer | None:
    """SentencePiece's normalisation: its character map, then blanks."""
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        # Spaces alone, as SentencePiece: what else is white space is the character map's business.
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    return normalizers.Sequence(steps) if steps else None


def _add_sentinels(backend: Tokenizer, have: int, wanted: int) -> None:
    """Adds `<extra_id_have>` to `<extra_id_wanted - 1>`; new ids count up, so T5's hundred are added last one first."""
    first = range(min(wanted, T5_SENTINELS) - 1, -1, -1) if have == 0 else range(0)
    tokens = [f"<extra_id_{k}>" for k in (*first, *range(max(have, len(first)), wanted))]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    return {f"{name}_token": str(getattr(tokenizer, f"{name}_token")) for name in ("pad", "eos", "unk")}


def _wrap(backend: Tokenizer, special_tokens: dict[str, str]) -> PreTrainedTokenizerFast:
    vocabulary = backend.get_vocab()
    sentinels = [f"<extra_id_{k}>" for k in range(sum(token.startswith("<extra_id_") for token in vocabulary))]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **special_tokens,
        extra_special_tokens=sentinels,
        sentinel_ids=[vocabulary[token] for token in sentinels],
        clean_up_tokenization_spaces=False,
    )
