"""Streams of text: one order for any ranks, workers and resumes, against a plain concatenation of each lane's files."""

import gzip
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from spade_t5.config import to_mapping
from spade_t5.data.bad_rows import BadRowLimits, BadRows
from spade_t5.errors import ConfigError, DataError
from spade_t5.hf.tokenizer import load_tokenizer
from spade_t5.launch.cli import main
from spade_t5.pretrain.corpora import Corpus, Document, FilesCorpus, PydocsCorpus, SourceFile
from spade_t5.pretrain.encoding import TextEncoder, is_held_out
from spade_t5.pretrain.hashing import sub_seed
from spade_t5.pretrain.lanes import Lane, LaneState
from spade_t5.pretrain.objectives import Mixture, MixtureEntry, PrefixLM, SpanCorruption, Vocabulary
from spade_t5.pretrain.order import Order
from spade_t5.pretrain.permutation import permute
from spade_t5.pretrain.streaming import StreamingData, StreamingRows
from spade_t5.testing import dev_data, run_command, torchrun
from spade_t5.training.batch_warmup import BatchWarmupConfig, StepRows
from spade_t5.training.data import Batch, BatchShape, Cursor, evaluation_batches
from spade_t5.training.reporting import read_metrics

SEED = 5
HELD_OUT = 0.1
NUM_FILES = 9
LANES = 4
ROWS = 10  # of a step: three ranks do not divide it
SHORT = SpanCorruption(inputs_length=48)
OBJECTIVE = Mixture(
    entries=(
        MixtureEntry(denoiser=SHORT, weight=2),
        MixtureEntry(denoiser=PrefixLM(inputs_length=40), weight=1),
    )
)

Rows = dict[int, tuple[list[int], list[int]]]
"""Inputs and targets without padding, by slot."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, documents: list[str]) -> Path:
    """Nine files of different sizes, every third packed."""
    path = tmp_path_factory.mktemp("files")
    bounds = np.cumsum([0, 30, 3, 17, 40, 8, 22, 5, 12, 28])
    for number, (first, end) in enumerate(pairwise(bounds)):
        content = "".join(json.dumps({"text": text}) + "\n" for text in documents[first:end]).encode()
        if number % 3 == 0:
            (path / f"{number}.jsonl.gz").write_bytes(gzip.compress(content, mtime=0))
        else:
            (path / f"{number}.jsonl").write_bytes(content)
    return path


@pytest.fixture(scope="module")
def make_data(folder: Path, tokenizer_folder: Path) -> Callable[..., StreamingData]:
    """Settings of a stream of the nine files; arguments replace fields."""

    def make(**fields: Any) -> StreamingData:
        values = {
            "corpus": FilesCorpus(paths=(str(folder),)),
            "tokenizer": str(tokenizer_folder),
            "lanes": LANES,
            "held_out_fraction": HELD_OUT,
            "max_eval_rows": 6,
            **fields,
        }
        return StreamingData(**values)

    return make


@pytest.fixture(scope="module")
def rows(make_data: Callable[..., StreamingData]) -> StreamingRows:
    return opened(make_data())


def opened(data: StreamingData, objective: Any = OBJECTIVE) -> StreamingRows:
    train_rows = data.open(objective, seed=SEED).train_rows
    assert isinstance(train_rows, StreamingRows)
    return train_rows


def unpadded(batch: Batch) -> Rows:
    found: Rows = {}
    for place, slot in enumerate(batch["sample_numbers"][:, 0].tolist()):
        inputs, labels = batch["input_ids"][place], batch["labels"][place]
        if "segment_ids" in batch:
            inputs, labels = inputs[batch["segment_ids"][place] == 1], labels[batch["decoder_segment_ids"][place] == 1]
        if slot == -1:
            assert not len(inputs)
            assert (batch["labels"][place] == -100).all()
        else:
            assert slot not in found
            found[slot] = (inputs.tolist(), labels.tolist())
    return found


def train(
    rows: StreamingRows,
    steps: int,
    *,
    world: int = 1,
    workers: int = 0,
    cursor: Cursor | None = None,
    warmup: BatchWarmupConfig | None = None,
    first_step: int = 1,
) -> tuple[list[Rows], Cursor]:
    """The rows of each step over all ranks, one rank after another, and the cursor that they would save."""
    found: list[Rows] = [{} for _ in range(steps)]
    cursors = []
    for rank in range(world):
        shape = BatchShape(global_rows=ROWS, micro_rows=2, rank=rank, world_size=world, workers=workers, warmup=warmup)
        last = None
        for step, (micro_batches, behind) in enumerate(rows.steps(cursor, steps, shape, first_step=first_step)):
            assert len(micro_batches) == shape.num_micro_batches_of(first_step + step)
            slots = []
            for batch in micro_batches:
                assert len(batch["input_ids"]) == 2
                new = unpadded(batch)
                assert not new.keys() & found[step].keys()
                found[step] |= new
                slots += list(new)
            assert slots == sorted(slots)
            last = behind
        cursors.append(json.loads(json.dumps(last)))
    return found, rows.merge_cursors(cursors)


@pytest.fixture(scope="module")
def expected(rows: StreamingRows) -> list[Rows]:
    """Twelve steps of one rank without workers."""
    return train(rows, 12)[0]


def lane_tokens(rows: StreamingRows, lane: int, epochs: int) -> np.ndarray:
    """All that a lane gives in some epochs, by reading whole files."""
    files, parts = rows.stream.lane_files(lane), []
    for epoch in range(epochs):
        for file in files[permute(np.arange(len(files)), len(files), seed=sub_seed(SEED, lane, epoch))].tolist():
            texts = [document.text for document in rows.stream.corpus.read(file, 0, BadRows())]
            parts += rows.stream.encoder([text for text in texts if not is_held_out(text, HELD_OUT)])
    return np.concatenate(parts)


def test_slots_are_the_segments_of_lanes_in_turn(
    rows: StreamingRows, expected: list[Rows], tokenizer_folder: Path
) -> None:
    vocabulary = Vocabulary.from_tokenizer(load_tokenizer(str(tokenizer_folder)))
    denoisers = OBJECTIVE.bind(vocabulary)
    order = Order(SEED, [denoiser.weights for denoiser in denoisers], labels=["a", "b"])
    text = [lane_tokens(rows, lane, 20) for lane in range(LANES)]
    used = [0] * LANES
    for step, found in enumerate(expected):
        assert sorted(found) == list(range(ROWS * step, ROWS * (step + 1)))
        for slot in sorted(found):
            denoiser = denoisers[order.draws([slot]).pair[0]]
            lane, length = slot % LANES, denoiser.lengths.raw
            segment = text[lane][used[lane] : used[lane] + length]
            used[lane] += length
            examples = denoiser.corrupt_documents(segment, [length], [slot], seed=SEED)
            assert found[slot] == (examples.inputs.tolist(), examples.targets.tolist())


def test_a_growing_batch_takes_the_same_slots_and_a_cursor_continues_it(
    rows: StreamingRows, expected: list[Rows]
) -> None:
    slots = {slot: row for found in expected for slot, row in found.items()}
    warmup = BatchWarmupConfig(initial_rows=1, steps=4)
    sizes = [StepRows(ROWS, warmup).of(step) for step in range(1, 7)]
    assert sizes[0] < sizes[3] < sizes[4] == ROWS
    begun, cursor = train(rows, 2, world=2, warmup=warmup)
    continued, behind = train(rows, 4, world=3, workers=1, cursor=cursor, warmup=warmup, first_step=3)
    first = 0
    for found, size in zip([*begun, *continued], sizes, strict=True):
        assert found == {slot: slots[slot] for slot in range(first, first + size)}
        first += size
    assert behind["slot"] == first


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
@pytest.mark.parametrize(("world", "workers"), [(2, 0), (3, 0), (4, 0), (8, 0), (1, 1), (1, 4), (2, 1), (2, 4), (3, 2)])
def test_any_number_of_ranks_and_workers_gives_the_same_rows(
    world: int, workers: int, rows: StreamingRows, expected: list[Rows]
) -> None:
    steps = 12 if workers == 0 else 3
    found, cursor = train(rows, steps, world=world, workers=workers)
    assert found == expected[:steps]
    assert cursor == train(rows, steps)[1]


def test_five_resumes_in_a_row_on_other_worlds(rows: StreamingRows, expected: list[Rows]) -> None:
    cursor, done = None, 0
    for steps, world, workers in ((1, 2, 0), (2, 3, 0), (3, 1, 2), (1, 4, 0), (3, 1, 0), (2, 8, 0)):
        found, cursor = train(rows, steps, world=world, workers=workers, cursor=cursor)
        assert found == expected[done : done + steps]
        done += steps
    assert done == len(expected)
    assert cursor == train(rows, done)[1]


@dataclass(frozen=True)
class WatchedCorpus:
    """A corpus that notes what is read of it."""

    corpus: Corpus
    opened: list[tuple[int, int]] = field(default_factory=list)
    """File, and line behind which it was read, of every reading."""
    texts: list[str] = field(default_factory=list)
    """Every document that was given."""

    @property
    def fingerprint(self) -> dict[str, Any]:
        return self.corpus.fingerprint

    @property
    def files(self) -> Sequence[SourceFile]:
        return self.corpus.files

    def read(self, file: int, start_line: int, bad_rows: BadRows) -> Iterator[Document]:
        self.opened.append((file, start_line))
        for document in self.corpus.read(file, start_line, bad_rows):
            self.texts.append(document.text)
            yield document


@pytest.mark.parametrize("steps", [1, 6, 20])
def test_a_resume_opens_one_file_a_lane_and_no_document_that_is_used_up(steps: int, rows: StreamingRows) -> None:
    _, cursor = train(rows, steps)
    for number, values in enumerate(cursor["lanes"]):
        corpus, state = WatchedCorpus(rows.stream.corpus), LaneState(*values)
        Lane(replace(rows.stream, corpus=corpus), number, state).take(1)
        files = rows.stream.lane_files(number)
        place = permute([state.place], len(files), seed=sub_seed(SEED, number, state.epoch))[0]
        assert corpus.opened[0] == (files[place], state.line)
        assert sum(not is_held_out(text, HELD_OUT) for text in corpus.texts) == 1
        has_more = any(
            not is_held_out(document.text, HELD_OUT)
            for document in rows.stream.corpus.read(*corpus.opened[0], BadRows())
        )
        assert len(corpus.opened) == 1 or not has_more


def test_readers_that_do_not_divide_the_lanes_are_told(rows: StreamingRows, caplog: pytest.LogCaptureFixture) -> None:
    for world, warned in ((2, False), (4, False), (3, True), (8, True)):
        caplog.clear()
        shape = BatchShape(global_rows=ROWS, micro_rows=2, rank=0, world_size=world)
        next(rows.steps(None, 1, shape))
        assert ("lanes" in caplog.text) == warned
    assert "data.lanes: 4 lanes are no multiple of the 8 readers" in caplog.text


@pytest.mark.parametrize("used", [0, 1, 7])
def test_a_lane_goes_on_from_any_of_its_states(used: int, rows: StreamingRows) -> None:
    whole = Lane(rows.stream, 1, LaneState())
    whole.take(50 + used)
    resumed = Lane(rows.stream, 1, LaneState())
    for length in (50 + used, 1, 400, 3000, 2, 9000):
        if length != 50 + used:
            expected = whole.take(length)
            assert np.array_equal(resumed.take(length), expected)
        else:
            resumed.take(length)
        resumed = Lane(rows.stream, 1, LaneState(*json.loads(json.dumps(resumed.state))))
        assert resumed.state == whole.state
    assert whole.state.epoch > 0


def test_each_epoch_gives_every_document_of_a_lane_once_in_another_order_of_files(
    rows: StreamingRows, documents: list[str], folder: Path
) -> None:
    lanes = [rows.stream.lane_files(lane).tolist() for lane in range(LANES)]
    assert sorted(file for files in lanes for file in files) == list(range(NUM_FILES))
    epochs: list[list[tuple[int, ...]]] = [[], [], []]
    for document in rows.stream.documents(0, LaneState()):
        if document.epoch == 3:
            break
        epochs[document.epoch].append(tuple(document.tokens.tolist()))
    kept = [
        document.text
        for file in lanes[0]
        for document in rows.stream.corpus.read(file, 0, BadRows())
        if not is_held_out(document.text, HELD_OUT)
    ]
    encoded = sorted(tuple(tokens.tolist()) for tokens in rows.stream.encoder(kept) if len(tokens))
    assert [sorted(epoch) for epoch in epochs] == [encoded] * 3
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_held_out_documents_are_evaluated_and_never_trained_on(
    make_data: Callable[..., StreamingData], documents: list[str], tokenizer_folder: Path
) -> None:
    data = make_data(max_eval_rows=3).open(SHORT, seed=SEED)
    assert data.eval_rows.num_rows == 3
    (denoiser,) = SHORT.bind(Vocabulary.from_tokenizer(data.tokenizer))
    encoder = TextEncoder(data.tokenizer, append_eos=False)
    in_order = [
        document.text
        for file in range(NUM_FILES)
        for document in data.train_rows.stream.corpus.read(file, 0, BadRows())
        if is_held_out(document.text, HELD_OUT)
    ]
    tokens = np.concatenate(encoder(in_order))
    length = denoiser.lengths.raw
    examples = denoiser.corrupt_documents(tokens[: 3 * length], [length] * 3, [0, 1, 2], seed=SEED)
    batch = data.eval_rows.collate([0, 1, 2])
    assert batch["input_ids"].flatten().tolist() == examples.inputs.tolist()
    assert batch["labels"].flatten().tolist() == examples.targets.tolist()
    evaluated = list(evaluation_batches(data.eval_rows, micro_batch_rows=2, rank=0, world_size=1))
    assert torch.equal(evaluated[0]["input_ids"], batch["input_ids"][:2])
    trained = {
        tuple(document.tokens.tolist())
        for lane in range(LANES)
        for document in until_epoch(data.train_rows.stream.documents(lane, LaneState()), 1)
    }
    held_out = {tuple(tokens.tolist()) for tokens in encoder(in_order)}
    assert held_out
    assert not held_out & trained


def until_epoch(documents: Iterator[Any], epoch: int) -> Iterator[Any]:
    for document in documents:
        if document.epoch == epoch:
            return
        yield document


def test_a_corpus_with_splits_of_its_own_keeps_them(tokenizer_folder: Path) -> None:
    corpus = PydocsCorpus(packages=("json", "argparse"))
    data = StreamingData(corpus=corpus, tokenizer=str(tokenizer_folder), lanes=1, max_eval_rows=4)
    stream = data.open(SHORT, seed=SEED).train_rows.stream
    by_split = {
        split: [doc.text for doc in corpus.open().read(0, 0, BadRows()) if doc.split == split]
        for split in ("train", "validation")
    }
    assert len(by_split["train"]) > 10
    trained = [document.tokens.tolist() for document in until_epoch(stream.documents(0, LaneState()), 1)]
    assert trained == [tokens.tolist() for tokens in stream.encoder(by_split["train"])]
    assert stream.held_out_tokens(50).tolist() == np.concatenate(stream.encoder(by_split["validation"]))[:50].tolist()


def test_documents_can_end_with_eos(make_data: Callable[..., StreamingData]) -> None:
    objective = SpanCorruption(inputs_length=48, style="hf")
    rows = opened(make_data(append_eos=True), objective)
    document = next(rows.stream.documents(0, LaneState()))
    assert document.tokens[-1] == 1
    with pytest.raises(ConfigError, match=r"data.append_eos: false does not go with span .*; set data.append_eos=true"):
        make_data().open(objective, seed=SEED)


def test_parquet_and_paragraphs_resume_as_lines_do(
    make_data: Callable[..., StreamingData], documents: list[str], tmp_path: Path
) -> None:
    import pyarrow
    import pyarrow.parquet

    texts = [" ".join(text.split()) for text in documents[:60]]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts[:30]}), tmp_path / "a.parquet", row_group_size=7)
    (tmp_path / "b.txt").write_text("\n\n".join(texts[30:]))
    corpus = FilesCorpus(paths=(str(tmp_path),), text_documents="blank_line")
    rows = opened(make_data(corpus=corpus, lanes=2, max_eval_rows=1), SHORT)
    whole, _ = train(rows, 6)
    cursor = None
    for step in range(6):
        found, cursor = train(rows, 1, world=1 + step % 2, cursor=cursor)
        assert found == [whole[step]]


def test_settings_that_cannot_work_are_refused(make_data: Callable[..., StreamingData], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.lanes: 10 lanes and 9 files, .* set data.lanes=9 or fewer"):
        make_data(lanes=10).open(SHORT, seed=SEED)
    with pytest.raises(ConfigError, match=r"data.name: streaming .* lengths of prefix random vary; prepare a store"):
        make_data().open(PrefixLM(inputs_length=40, suffix_share=None), seed=SEED)
    with pytest.raises(ConfigError, match=r"data.held_out_fraction: the held-out documents have 0 tokens, a row takes"):
        make_data(held_out_fraction=1e-9).open(SHORT, seed=SEED)
    with pytest.raises(ValueError, match=r"lanes: 0 must be at least 1"):
        make_data(lanes=0)
    with pytest.raises(ValueError, match=r"held_out_fraction: 0 must lie between 0 and 1"):
        make_data(held_out_fraction=0)


def test_a_lane_without_text_ends_the_run(
    make_data: Callable[..., StreamingData], documents: list[str], tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents[:60]))
    for name in "bc":
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": " "}) + "\n")
    rows = opened(make_data(corpus=FilesCorpus(paths=(str(tmp_path),)), lanes=3), SHORT)
    with pytest.raises(DataError, match=r"no document to train on in 1 files dealt to lane \d, such as .*[bc].jsonl"):
        train(rows, 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_rows_end_the_run_in_one_line(
    workers: int, make_data: Callable[..., StreamingData], documents: list[str], tmp_path: Path
) -> None:
    for number in range(2):
        lines = [json.dumps({"text": text}) for text in documents[20 * number : 20 * number + 20]]
        lines[5:5] = ["{broken"] * (3 * number)
        (tmp_path / f"{number}.jsonl").write_text("\n".join(lines) + "\n")
    corpus = FilesCorpus(paths=(str(tmp_path),))
    limits = BadRowLimits(file_share=0.05, after_file_rows=1)
    held = {"held_out_fraction": 0.5, "max_eval_rows": 1}
    rows = opened(
        make_data(corpus=corpus, lanes=2, bad_rows=BadRowLimits(after_file_rows=1, file_share=1), **held), SHORT
    )
    assert len(train(rows, 4)[0]) == 4
    rows.stream = replace(rows.stream, bad_rows=limits)
    with pytest.raises(DataError, match=r"bad_rows.file_share: .* rows of .*1.jsonl are bad") as caught:
        train(rows, 4, workers=workers)
    assert "\n" not in str(caught.value)


def test_a_file_that_changed_under_a_cursor_is_refused(
    make_data: Callable[..., StreamingData], documents: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents[:60]))
    rows = opened(make_data(corpus=FilesCorpus(paths=(str(path),)), lanes=1), SHORT)
    lane = Lane(rows.stream, 0, LaneState())
    while lane.state.used < 20 or lane.state.line == 0:
        lane.take(7)
    state = lane.state
    first = Lane(rows.stream, 0, state).take(20)
    lines = path.read_text().splitlines(keepends=True)
    for rest in ([], [json.dumps({"text": "Brief."})]):
        path.write_text("".join([*lines[: state.line], *rest]))
        with pytest.raises(DataError, match=rf"what followed line {state.line} in file 0 of lane 0 has changed since"):
            Lane(rows.stream, 0, state)
    path.write_text("".join(lines))
    assert np.array_equal(Lane(rows.stream, 0, state).take(20), first)


def run_config(folder: Path, name: str, data: StreamingData, **training: Any) -> Path:
    tree = {
        "run_dir": str(folder / name),
        "model": {"preset": "tiny", "num_layers": 1, "num_decoder_layers": 1, "d_model": 32, "d_ff": 32, "d_kv": 16},
        "data": to_mapping(data),
        "objective": to_mapping(OBJECTIVE),
        "training": {"steps": 4, "global_batch_rows": 5, "micro_batch_rows": 2, **training},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def trained_on(out: Path, num_ranks: int) -> list[Any]:
    """Sample number and hash of the rows of all ranks, by number."""
    return sorted(
        json.loads(line) for rank in range(num_ranks) for line in Path(f"{out}.{rank}").read_text().splitlines()
    )


def test_runs_of_two_ranks_and_of_one_take_turns(make_data: Callable[..., StreamingData], tmp_path: Path) -> None:
    worker, data = str(Path(__file__).with_name("order_worker.py")), make_data()
    alone = run_command([sys.executable, worker, str(run_config(tmp_path, "alone", data)), str(tmp_path / "a")])
    assert alone.returncode == 0, alone.stderr[-3000:]
    ranks = {"deepspeed": {"zero_stage": 1}, "loader_workers": 1}
    two = torchrun(
        [worker, str(run_config(tmp_path, "turns", data, steps=3, **ranks)), str(tmp_path / "b")], num_ranks=2
    )
    assert two.returncode == 0, two.stderr[-3000:]
    one = run_command([sys.executable, worker, str(run_config(tmp_path, "turns", data)), str(tmp_path / "b")])
    assert one.returncode == 0, one.stderr[-3000:]
    assert trained_on(tmp_path / "b", 2) == trained_on(tmp_path / "a", 1)
    assert [number for number, _ in trained_on(tmp_path / "a", 1)] == list(range(20))
    for metrics, other in zip(
        read_metrics(tmp_path / "turns")[-2:], read_metrics(tmp_path / "alone")[-2:], strict=True
    ):
        assert metrics["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert metrics["loss_by"]["denoiser"] == pytest.approx(other["loss_by"]["denoiser"], rel=1e-4)


def test_bad_rows_end_a_run_with_exit_code_2(
    make_data: Callable[..., StreamingData], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "3.jsonl.gz").write_bytes(gzip.compress(b"{broken\n" * 50))
    data = make_data(corpus=FilesCorpus(paths=(str(tmp_path),)), bad_rows=BadRowLimits(after_file_rows=20))
    path = run_config(tmp_path, "run", data, loader_workers=1)
    assert main(["pretrain", str(path)]) == 2
    assert re.search(r"bad_rows.file_share: 20 of the first 20 rows of .*3.jsonl.gz are bad", capsys.readouterr().err)


@pytest.mark.dev_data
def test_real_text_streams_the_same_on_two_ranks(tmp_path: Path, tokenizer_folder: Path) -> None:
    lines = gzip.decompress((dev_data() / "text" / "c4_en.jsonl.gz").read_bytes()).splitlines(keepends=True)
    for number in range(8):
        (tmp_path / f"c4.{number}.json.gz").write_bytes(gzip.compress(b"".join(lines[number::8])))
    data = StreamingData(
        corpus=FilesCorpus(paths=(str(tmp_path),)),
        tokenizer=str(dev_data() / "tokenizer" / "t5_tokenizer_base.model"),
        num_sentinels=100,
        lanes=8,
        held_out_fraction=0.02,
        max_eval_rows=4,
    )
    rows = opened(data, SpanCorruption())
    alone, cursor = train(rows, 6)
    first, middle = train(rows, 3, world=2)
    second, end = train(rows, 3, world=4, cursor=middle)
    assert first + second == alone
    assert end == cursor
    assert all((len(inputs), len(targets)) == (512, 114) for step in alone for inputs, targets in step.values())
