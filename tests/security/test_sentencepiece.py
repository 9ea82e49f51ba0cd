"""Five hundred broken SentencePiece models: each is a tokenizer or one line that says why it is none, and the process lives."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from spade_t5.errors import ConfigError
from spade_t5.hf.tokenizer import from_sentencepiece, load_tokenizer
from spade_t5.testing import documented

NUM_MODELS = 500


def mutated(model: bytes, random_: random.Random) -> bytes:
    """A model with flipped bits, changed, lost or doubled stretches, or an end that is missing."""
    content = bytearray(model)
    for _ in range(random_.choice((1, 1, 2, 8, 64))):
        # what stands in front and behind are the pieces' and the trainer's messages; the middle is more of the same
        place = random_.choice((random_.randrange(len(content)), random_.randrange(400), -random_.randrange(1, 400)))
        place %= len(content)
        kind = random_.randrange(5)
        if kind == 0:
            content[place] ^= 1 << random_.randrange(8)
        elif kind == 1:
            content[place : place + random_.randrange(1, 9)] = random_.randbytes(random_.randrange(9))
        elif kind == 2:
            content[place:place] = content[place : place + random_.randrange(1, 200)]
        elif kind == 3:
            content[place] = random_.choice((0, 0x7F, 0x80, 0xFF))
        elif random_.random() < 0.1:
            del content[max(place, 100) :]
    return bytes(content)


def load_all(folder: Path) -> None:
    """In a process that may crash: reads every model and uses it, and prints what came of it."""
    for number in range(NUM_MODELS):
        path = folder / f"{number}.model"
        print(number, flush=True)
        try:
            tokenizer = load_tokenizer(path)
            tokenizer.decode(tokenizer("A text with <0x0A> 日本 \n and </s> é.")["input_ids"])
            print(json.dumps({"good": number}), flush=True)
        except ConfigError as error:
            print(json.dumps({"refused": str(error)}), flush=True)


def test_five_hundred_models(tmp_path: Path) -> None:
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([f"some words of text number {i}, and more of them" for i in range(300)]),
        model_writer=model,
        model_type="unigram",
        vocab_size=300,
        byte_fallback=True,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    random_ = random.Random(0)
    for number in range(NUM_MODELS):
        (tmp_path / f"{number}.model").write_bytes(mutated(model.getvalue(), random_))
    program = "import sys, runpy, pathlib; runpy.run_path(sys.argv[1])['load_all'](pathlib.Path(sys.argv[2]))"
    done = subprocess.run(
        [sys.executable, "-c", program, __file__, str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-300:] + done.stderr[-3000:]
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    refusals = [result["refused"] for result in results if "refused" in result]
    assert len(results) == NUM_MODELS
    assert 50 < len(refusals) < NUM_MODELS
    for refusal in set(refusals):
        documented(refusal)
        assert "\n" not in refusal


@pytest.mark.parametrize("content", [b"", b"\n", b"\0" * 100, b"\x0a\x00", b"text", b"\xff" * 100])
def test_what_is_no_model(content: bytes) -> None:
    with pytest.raises(ConfigError, match=r"not a SentencePiece model|no pad piece") as caught:
        from_sentencepiece(content, num_sentinels=100)
    documented(str(caught.value))


def test_a_model_of_any_size_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "large.model"
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ConfigError, match="larger than") as caught:
        load_tokenizer(path)
    documented(str(caught.value))
