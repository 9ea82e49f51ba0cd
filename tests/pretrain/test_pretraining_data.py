"""Data of whole pretraining runs on real C4 documents."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from spade_t5 import SpadeT5Config, SpadeT5ForConditionalGeneration
from spade_t5.config import from_mapping, read_yaml
from spade_t5.errors import ConfigError
from spade_t5.hf.loading import build_model
from spade_t5.pretrain.corpora import FilesCorpus
from spade_t5.pretrain.data import MixedStore, StoreData
from spade_t5.pretrain.evaluation import evaluate_held_out
from spade_t5.pretrain.objectives import SpanCorruption
from spade_t5.pretrain.prepare import PrepareConfig, prepare
from spade_t5.pretrain.rows import PackedRows
from spade_t5.pretrain.run import PretrainConfig, pretrain
from spade_t5.testing import dev_data, run_command, torchrun
from spade_t5.training import Seq2SeqObjective, distributed
from spade_t5.training.reporting import read_metrics

pytestmark = pytest.mark.dev_data

WORKER = str(Path(__file__).with_name("order_worker.py"))


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Stores of C4 and Wikinews."""
    folder = tmp_path_factory.mktemp("stores")
    return {
        name: prepare(
            PrepareConfig(
                corpus=FilesCorpus(paths=(str(dev_data() / "text" / f"{file}.jsonl.gz"),)),
                tokenizer=str(dev_data() / "tokenizer" / "t5_tokenizer_base.model"),
                out=folder / name,
                held_out_fraction=0.05,
                num_processes=1,
            )
        )
        for name, file in (("c4", "c4_en"), ("wikinews", "wikinews"))
    }


def config(folder: Path, name: str, stores: dict[str, Path], packing: str, **training: Any) -> Path:
    mixture = [{"store": str(stores["c4"]), "rate": 0.7}, {"store": str(stores["wikinews"]), "rate": 0.3}]
    tree = {
        "run_dir": str(folder / name),
        "model": {"preset": "tiny", "num_layers": 1, "num_decoder_layers": 1, "d_model": 32, "d_ff": 32, "d_kv": 16},
        "data": {"mixture": mixture, "packing": packing, "max_eval_rows": 12},
        "objective": {"inputs_length": 128},
        "loss": {"z_loss": 0.1},
        "training": {"steps": 6, "global_batch_rows": 5, "micro_batch_rows": 2, "save_every_steps": 2, **training},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def trained_on(out: Path, num_ranks: int) -> list[Any]:
    """What all ranks were trained on, by sample number."""
    lines = [json.loads(line) for rank in range(num_ranks) for line in Path(f"{out}.{rank}").read_text().splitlines()]
    return sorted(lines)


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_two_ranks_train_on_the_documents_and_masks_of_one(
    packing: str, stores: dict[str, Path], tmp_path: Path
) -> None:
    alone = run_command(
        [sys.executable, WORKER, str(config(tmp_path, "alone", stores, packing)), str(tmp_path / "one")]
    )
    assert alone.returncode == 0, alone.stderr[-3000:]
    settings = {"deepspeed": {"zero_stage": 1}, "loader_workers": 1}
    path = config(tmp_path, "two", stores, packing, **settings)
    two = torchrun([WORKER, str(path), str(tmp_path / "two")], num_ranks=2)
    assert two.returncode == 0, two.stderr[-3000:]
    assert trained_on(tmp_path / "two", 2) == trained_on(tmp_path / "one", 1)
    runs = [read_metrics(tmp_path / name) for name in ("alone", "two")]
    assert [m["split"] for m in runs[0]] == ["train"] * 6 + ["validation"]
    for one, other in zip(*runs, strict=True):
        assert (one.get("tokens"), one["targets"]) == (other.get("tokens"), other["targets"])
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        for axis, losses in one["loss_by"].items():
            assert losses == pytest.approx(other["loss_by"][axis], rel=1e-4)
    assert runs[0][0]["loss_by"].keys() == ({"corpus"} if packing == "concatenate" else {"corpus", "length"})


def test_a_resumed_run_goes_on_in_the_data_and_other_data_are_refused(stores: dict[str, Path], tmp_path: Path) -> None:
    whole = run_command(
        [sys.executable, WORKER, str(config(tmp_path, "whole", stores, "best_fit")), str(tmp_path / "a")]
    )
    assert whole.returncode == 0, whole.stderr[-3000:]
    for steps in (2, 4, 6):
        path = config(tmp_path, "parts", stores, "best_fit", steps=steps)
        part = run_command([sys.executable, WORKER, str(path), str(tmp_path / "b")])
        assert part.returncode == 0, part.stderr[-3000:]
    assert trained_on(tmp_path / "b", 1) == trained_on(tmp_path / "a", 1)
    held_out = evaluate_held_out(tmp_path / "whole", max_rows=10, unigram_rows=100)
    assert held_out.num_targets > 100
    assert held_out.loss_by["corpus"].keys() == {"c4", "wikinews"}

    mapping = yaml.safe_load(path.read_text())
    mapping["data"]["packing"] = "concatenate"
    mapping["training"]["steps"] = 8
    path.write_text(yaml.safe_dump(mapping))
    command = [sys.executable, "-m", "spade_t5.launch", "pretrain", str(path)]
    refused = run_command(command)
    assert refused.returncode == 2
    assert "data_fingerprint.packing: was 'best_fit' in the checkpoint, is 'concatenate' now" in refused.stderr


def test_rows_of_real_documents_are_full_and_equal_the_documents_alone(stores: dict[str, Path]) -> None:
    objective = SpanCorruption(inputs_length=1024)
    data = StoreData(store=stores["c4"], packing="best_fit").open(objective, seed=0)
    rows = data.train_rows
    assert isinstance(rows, PackedRows)
    assert all(rows.efficiency(window)[0] >= 0.97 for window in range(3))

    config = SpadeT5Config.from_preset("tiny", vocab_size=32128, d_model=32, d_ff=48, d_kv=16, dropout_rate=0.0)
    model = build_model(SpadeT5ForConditionalGeneration, config, seed=0).double().eval()
    lengths = [len(rows.row_segments(row)) for row in range(60)]
    row = lengths.index(max(lengths))
    batch = rows.collate([row])
    objective_of_run = Seq2SeqObjective(groups=data.groups)
    with torch.no_grad():
        packed = model(**{name: batch[name] for name in ("input_ids", "labels", "segment_ids", "decoder_segment_ids")})
        sums = objective_of_run.loss_sums(model, batch)
        alone = []
        for document in range(1, int(batch["segment_ids"].max()) + 1):
            inputs = batch["input_ids"][batch["segment_ids"] == document][None]
            labels = batch["labels"][batch["decoder_segment_ids"] == document][None]
            alone.append(model(input_ids=inputs, labels=labels).logits[0])
            logits = packed.logits[batch["decoder_segment_ids"] == document]
            torch.testing.assert_close(logits, alone[-1], rtol=1e-9, atol=1e-9)
    targets = batch["labels"][batch["labels"] != -100]
    loss = torch.nn.functional.cross_entropy(torch.cat(alone), targets, reduction="sum")
    assert float(sums.whole) == pytest.approx(float(loss), rel=1e-6)
    assert sums.by_group.sum(dim=0).tolist() == pytest.approx([float(loss), len(targets)], rel=1e-6)
    assert max(lengths) > 5


def test_sizes_rates_and_temperature_decide_the_shares(stores: dict[str, Path]) -> None:
    def shares(**fields: Any) -> list[float]:
        both = tuple(MixedStore(store=stores[name], **fields.pop(name, {})) for name in ("c4", "wikinews"))
        data = StoreData(mixture=both, **fields).open(SpanCorruption(inputs_length=128), seed=0)
        shares: list[float] = data.fingerprint["shares"]
        assert [pair.weights for pair in data.train_rows.draws.pairs] == [[(0, share)] for share in shares]  # type: ignore[attr-defined]
        return shares

    sizes = [StoreData(store=path).open(SpanCorruption(inputs_length=128), seed=0) for path in stores.values()]
    counts = [data.train_rows.draws.pairs[0].segments.count for data in sizes]  # type: ignore[attr-defined]
    assert shares() == pytest.approx([count / sum(counts) for count in counts])
    assert shares(temperature=2.0) == pytest.approx([c**0.5 / sum(n**0.5 for n in counts) for c in counts])
    assert shares(c4={"rate": 1.0}, wikinews={"rate": 3.0}) == pytest.approx([0.25, 0.75])
    limited = shares(c4={"max_tokens": 10_000}, wikinews={"max_tokens": 10_000})
    assert limited == pytest.approx([0.5, 0.5], rel=0.02)


def test_ranks_that_read_other_data_are_refused(
    stores: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of the same name on two nodes may hold two stores; here rank 1 has the other one."""
    path = config(tmp_path, "run", stores, "concatenate")
    other = StoreData(store=stores["wikinews"]).open(SpanCorruption(inputs_length=128), seed=0).fingerprint
    gather = distributed.gather_objects
    monkeypatch.setattr(
        distributed, "gather_objects", lambda item: [item, other] if item and "stores" in item else gather(item)
    )
    with pytest.raises(ConfigError, match="data: rank 1 reads other data than rank 0"):
        pretrain(from_mapping(PretrainConfig, read_yaml(path)))
    assert not (tmp_path / "run").exists()
