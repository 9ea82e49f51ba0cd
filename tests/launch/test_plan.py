"""The plan of a run: its table, what follows from it, and exit code 2 with a remedy where the run could not start."""

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path

import pytest
import torch

from spade_t5 import SpadeT5Config, SpadeT5ForConditionalGeneration
from spade_t5.config import from_mapping
from spade_t5.devices import find_accelerator
from spade_t5.hf.tokenizer import load_tokenizer
from spade_t5.launch import resources
from spade_t5.launch.cli import main
from spade_t5.memory.activations import Activations, Workload
from spade_t5.memory.parameters import Parameters
from spade_t5.memory.states import largest_rank
from spade_t5.pretrain.objectives import SpanCorruption
from spade_t5.pretrain.segments import DocumentSegments
from spade_t5.pretrain.store import TokenStore
from spade_t5.training import TrainingConfig
from spade_t5.training.scaling import Link

RECIPES = sorted(entry.name.removesuffix(".yaml") for entry in (files("spade_t5") / "configs" / "pretrain").iterdir())

Plan = Callable[..., tuple[int, str, str]]


@pytest.fixture
def plan(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Plan:
    """Plans a run of the demo recipe with settings over it; returns exit code, output and message."""

    def run(*words: str, store: Path = tmp_path / "none") -> tuple[int, str, str]:
        capsys.readouterr()
        words = tuple(word.replace("$TMP", str(tmp_path)) for word in words)
        code = main(["plan", "demo", f"run_dir={tmp_path / 'run'}", f"data.store={store}", *words])
        assert list(tmp_path.iterdir()) == []
        return code, *capsys.readouterr()

    return run


def table(output: str) -> dict[str, Sequence[str]]:
    """Cells of the lines of denoisers, by label."""
    lines = output.splitlines()
    header = next(k for k, line in enumerate(lines) if line.startswith("denoiser "))
    end = next(k for k, line in enumerate(lines) if k > header and not line)
    cells = [re.split(r"\s{2,}", line) for line in lines[header + 1 : end]]
    return {label: values for label, *values in cells}


def test_ul2_at_512_tokens(plan: Plan) -> None:
    code, output, _ = plan("objective={name: ul2, inputs_length: 512}", "--num-sentinels", "128")
    assert code == 0
    assert "128 sentinels assumed: there is no store" in output
    assert table(output) == {
        "span d0.15 m3": ["14.3%", "568", "512", "114", "28"],
        "span d0.15 m8": ["14.3%", "588", "512", "100", "11"],
        "prefix 0.25": ["14.3%", "681", "512", "171", "0"],
        "span d0.5 m3": ["14.3%", "766", "512", "512", "128"],
        "span d0.5 m8": ["14.3%", "908", "512", "512", "57"],
        "span d0.15 m64": ["14.3%", "600", "512", "92", "1"],
        "span d0.5 m64": ["14.3%", "1006", "512", "512", "8"],
    }
    mean_raw, mean_targets = (
        sum(sides) / 7 for sides in ((568, 588, 681, 766, 908, 600, 1006), (114, 100, 171, 512, 512, 92, 512))
    )
    assert f"100.0% of the inputs and {mean_targets / 512:.1%} of the targets" in output
    assert f"16 rows takes {16 * mean_raw:,.0f} raw tokens and scores {16 * mean_targets:,.0f} targets" in output
    assert f"700 steps take {700 * 16 * mean_raw:,.0f} raw tokens" in output


def test_both_remedies_where_sentinels_do_not_suffice(plan: Plan) -> None:
    words = ("objective.inputs_length=4096",)
    code, output, message = plan(*words)
    assert code == 2
    assert table(output) == {"span d0.15 m3": ["100.0%", "4550", "4096", "910", "227"]}
    remedies = "needs 227 sentinels, there are 100: give the tokenizer num_sentinels=227, or set max_spans=100 for spans of 7.0 tokens on average"
    assert f"span d0.15 m3: {remedies}" in output
    assert "needs 227 sentinels for 4550 raw tokens" in message
    assert message.count("\n") == 1
    # and each of them works
    assert plan(*words, "--num-sentinels", "227")[0] == 0
    code, output, _ = plan(*words, "objective.max_spans=100")
    assert code == 0
    assert table(output)["span d0.15 m3 s100"][-2:] == ["806", "100"]


def test_a_schedule_has_a_column_for_each_phase(plan: Plan) -> None:
    steps = "[{first_block: 0, weight: 0}, {first_block: 1, weight: 1}]"
    code, output, _ = plan(
        f"objective={{name: mixture, entries: [{{denoiser: {{}}, weight: 3}}, {{denoiser: {{name: prefix_lm}}, weight: {steps}}}]}}"
    )
    assert code == 0
    assert "from draw 10,000" in output
    assert table(output) == {
        "span d0.15 m3": ["100.0%", "75.0%", "568", "512", "114", "28"],
        "prefix 0.25": ["0.0%", "25.0%", "681", "512", "171", "0"],
    }
    # 11,200 draws: 10,000 segments of 568 tokens, then 1,200 of 596.25 on average
    assert f"700 steps take {10_000 * 568 + 1200 * 596.25:,.0f} raw tokens" in output


def test_a_growing_batch_takes_fewer_rows(plan: Plan) -> None:
    code, output, _ = plan("training.batch_warmup={initial_rows: 8, steps: 100}", "objective.inputs_length=512")
    assert code == 0
    rows = 100 * 8 + 600 * 16
    assert f"700 steps take {rows * 568:,} raw tokens" in output
    assert f"the batch warms up: {rows:,} rows instead of 11,200" in output


def test_a_store_gives_its_sentinels_and_how_often_it_is_seen(plan: Plan, store: Path) -> None:
    code, output, _ = plan("objective.inputs_length=64", store=store)
    assert code == 0
    assert f"{store / 'tokenizer'}: 40 sentinels" in output
    num_tokens = TokenStore.open(store).split("train").num_tokens
    raw = int(table(output)["span d0.15 m3"][1])
    assert f"{num_tokens:,} tokens, seen {700 * 16 / (num_tokens // raw):.3g} times" in output


def test_a_store_is_read_where_it_is(plan: Plan, store: Path) -> None:
    """The fixture sees to it that nothing is made in the folder that copies would go to."""
    code, output, _ = plan("objective.inputs_length=64", "data.staging_dir=$TMP/local", store=store)
    assert code == 0
    assert "tokens, seen" in output


def test_packed_documents_are_measured(plan: Plan, store: Path) -> None:
    words = (
        "data.packing=best_fit",
        "objective={name: gap_sentences, inputs_length: 128, targets_length: 64, max_spans: 20}",
    )
    code, output, _ = plan(*words, store=store)
    assert code == 0
    assert table(output)["gap 0.3"][1:] == ["127", "<=128", "<=64", "<=20"]
    (line,) = (line for line in output.splitlines() if line.startswith("packing "))
    inputs, targets, segments_per_row = (float(number) for number in re.findall(r"([\d.]+)(?:%| segments)", line))
    assert 80 < inputs <= 100
    assert 0 < targets <= 100
    # 700 steps of 16 rows
    split = TokenStore.open(store).split("train")
    seen = 700 * 16 * segments_per_row / DocumentSegments(split, 127, 2).count
    (line,) = (line for line in output.splitlines() if line.startswith("corpus "))
    assert f"{split.num_tokens:,} tokens" in line
    assert float(re.findall(r"seen (.*) times", line)[0]) == pytest.approx(seen, rel=0.03)
    # without a store there is nothing to measure
    code, output, _ = plan(*words)
    assert code == 0
    assert "depends on the text" in output


def test_what_a_run_would_refuse_is_refused(plan: Plan, store: Path) -> None:
    gap_sentences = "objective={name: gap_sentences, inputs_length: 128, targets_length: 64, max_spans: 20}"
    for code, _, message in (plan(gap_sentences, store=store), plan(gap_sentences)):
        assert code == 2
        assert "lengths of gap 0.3 vary; use data.packing=best_fit" in message
    code, _, message = plan("objective={inputs_length: 64, style: hf}", store=store)
    assert (code, message.count("\n")) == (2, 1)
    assert "append_eos=true" in message
    rare = "objective={name: mixture, entries: [{denoiser: {}}, {denoiser: {name: prefix_lm}, weight: 1.0e-6}]}"
    code, _, message = plan(rare)
    assert code == 2
    assert "prefix 0.25: 1.0e-06 of the draws is less than one in a block" in message


def test_prefixes_without_a_store(plan: Plan, store: Path, tokenizer: Path) -> None:
    objective = "objective={name: ul2, inputs_length: 64, extreme_prefix: '[X]'}"
    code, output, _ = plan(objective)
    assert code == 0
    assert "prefixes are counted as 0 tokens; --tokenizer counts them" in output
    assert table(output)["[X] span d0.5 m8"] == ["14.3%", "112", "64", "64", "7"]
    code, output, _ = plan(objective, "--tokenizer", str(tokenizer))
    assert code == 0
    assert "counted as 0" not in output
    assert f"{tokenizer}: 40 sentinels" in output
    counted = table(output)
    num_prefix_tokens = len(load_tokenizer(tokenizer).encode("[X]", add_special_tokens=False))
    shorter = SpanCorruption(
        noise_density=0.5, mean_noise_span_length=8, inputs_length=64 - num_prefix_tokens, targets_length=64
    ).lengths()
    assert counted["[X] span d0.5 m8"][1] == str(shorter.raw)
    # as with the store that is then prepared
    assert table(plan(objective, store=store)[1]) == counted
    assert f"{tokenizer}: 77 sentinels" in plan("--tokenizer", str(tokenizer), "--num-sentinels", "77")[1]


def test_the_recipe_for_ul2_says_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "c4-ul2", "data.store=no-store"]) == 2
    output, message = capsys.readouterr()
    assert {label.split()[0] for label in table(output)} == {"[R]", "[S]", "[X]"}
    assert "'[X] span d0.5 m3' needs 128 sentinels" in message
    assert main(["plan", "c4-ul2", "data.store=no-store", "--num-sentinels", "200"]) == 0


def test_a_stream_names_its_own_tokenizer(plan: Plan, tokenizer: Path) -> None:
    corpus = "{name: pydocs, packages: [json, argparse]}"
    data = f"data={{name: streaming, corpus: {corpus}, tokenizer: {tokenizer}, num_sentinels: 50, lanes: 1, held_out_fraction: 0.5"
    code, _, message = plan(data + ", store: null}")
    assert (code, "data.store" in message) == (2, True)
    code, output, _ = plan(data + "}", "objective.inputs_length=64")
    assert code == 0
    assert f"{tokenizer}: 50 sentinels" in output


def test_text_of_a_stream_is_looked_at(plan: Plan, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("text")
    for number in range(4):
        texts = (
            f"Document {line} of file {number} says a few words, and then a few more of them." for line in range(200)
        )
        (folder / f"{number}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    corpus = f"{{name: files, paths: [{folder}]}}"
    data = f"data={{name: streaming, corpus: {corpus}, tokenizer: {tokenizer}, held_out_fraction: 0.1"
    code, output, message = plan(data + "}", "objective.inputs_length=64")
    assert (code, message.count("\n")) == (2, 1)
    assert "data.lanes: 64 lanes and 4 files" in message
    assert "span d0.15 m3" in output
    code, output, _ = plan(data + ", lanes: 4}", "objective.inputs_length=64")
    assert code == 0
    assert "corpus     files: number of files 4, lanes 4" in output
    code, _, message = plan(data + ", lanes: 4}", "objective={inputs_length: 16384, max_spans: 40}")
    assert code == 2
    assert "data.held_out_fraction: the held-out documents have" in message


def test_the_hub_is_not_asked(plan: Plan, tokenizer: Path) -> None:
    corpus = "{name: hub, dataset: nobody/has-this-data-set}"
    code, output, _ = plan(f"data={{name: streaming, corpus: {corpus}, tokenizer: {tokenizer}, lanes: 7}}")
    assert code == 0
    assert "the hub is not asked for nobody/has-this-data-set; data.lanes=7 needs" in output


@pytest.fixture
def no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """A micro-batch takes a GiB and one for each row, whatever the model, so that large ones need not be traced."""

    def trace(_: SpadeT5Config, workload: Workload) -> Activations:
        return Activations(0, (1 + workload.rows) << 30)

    monkeypatch.setattr(resources, "trace_activations", trace)


GPUS = ("--gpus", "2", "--gpu", "l4")


def test_what_a_run_takes_of_gpus(plan: Plan) -> None:
    code, output, _ = plan(*GPUS, "--nodes", "2", "--mfu", "0.5", "--price", "3")
    assert code == 0
    assert "machines   2 GPUs L4 on 2 nodes, 22.49 GiB each" in output
    assert "parameters 4,974,976: 4,933,760 train, 41,216 are frozen" in output
    assert "700 of 16 rows: 1 micro-batch of 8 rows on each rank" in output
    assert "(assumed: MFU 50% of 30 TFLOP/s)" in output
    assert "(assumed: 3 for a GPU and hour)" in output
    assert "(predicted; assumed: 20 GB/s and 1 us within a node, 360 GB/s and 5 us between nodes)" in output
    assert re.search(r"efficiency on such nodes: 1: 100%, 2: \d\d%, 4: \d\d%, .*, 64: \d\d%", output)
    own = [line.split() for line in output.splitlines() if line.endswith("*")]
    assert [line[:2] for line in own] == [["fp32", "2"]]
    modes = [line.split()[:2] for line in output.splitlines() if re.match(r"\s*(fp32|bf16)", line)]
    assert modes == [
        [precision, str(stage)]
        for precision in ("fp32", "bf16_autocast", "bf16")
        for stage in range(4)
        if (precision, stage) != ("bf16", 0)
    ]
    assert re.search(r"the largest micro-batch that fits is about [\d,]+ rows; a rank has 8 in a step", output)


@pytest.mark.usefixtures("no_trace")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--gpu", "h300"), "--gpu: 'h300' is not known; give one of a100-40"),
        (("--gpus", "3", "--nodes", "2"), "--gpus: 3 GPUs cannot be shared out evenly over 2 nodes"),
        (("training.deepspeed=null",), "training.deepspeed: null trains in one process, but --gpus is 2"),
        (
            ("training.deepspeed={zero_stage: 3, hpz_partition_size: 3}",),
            "training.deepspeed.hpz_partition_size: 3 does not divide the 2 ranks",
        ),
        (
            ("training.precision=bf16", "model.ssm_training=full"),
            "training.precision: bf16 would round the state-space parameters that train",
        ),
        (
            ("training.micro_batch_rows=20000", "training.global_batch_rows=40000"),
            r"training.micro_batch_rows: 20000 rows at once need .* GiB on each L4, .*; set training.micro_batch_rows=\d",
        ),
        (
            ("model.preset=xl", "training.deepspeed.zero_stage=0"),
            "use more GPUs, a higher training.deepspeed.zero_stage, training.gradient_checkpointing=full",
        ),
        (
            ("model.preset=xl", "training.precision=bf16", "--gpus", "4", "training.micro_batch_rows=4"),
            "training.deepspeed: the update of the weights needs .* GiB on each L4, .*; use more GPUs, a higher",
        ),
        (("--mfu", "1.5"), "--mfu: 1.5 is a share of the peak; give at most 1"),
        (("--between", "400"), "link: '400' is not GB/s:microseconds; give for example 360:5"),
    ],
    ids=["gpu", "nodes", "deepspeed", "hpz", "precision", "rows", "model", "update", "mfu", "link"],
)
def test_a_run_that_could_not_start_on_the_gpus(plan: Plan, words: tuple[str, ...], message: str) -> None:
    code, _, errors = plan(*GPUS, *words)
    assert code == 2
    assert re.search(message, errors), errors


def lines_of(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    """What a plan of GPUs prints."""
    capsys.readouterr()
    assert main(["plan", *words, "data.store=no-store"]) == 0, capsys.readouterr().err
    return capsys.readouterr().out.partition("machines")[2].splitlines()


@pytest.mark.usefixtures("no_trace")
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_can_be_planned(recipe: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["--gpus", "8", "--gpu", "h200", "--num-sentinels", "128"]
    if recipe == "c4-long-16k":
        missing = tmp_path / "missing"
        assert main(["plan", recipe, f"model.init_from={missing}", *words]) == 2
        assert f"model.init_from: {missing}: no such folder; give a run folder" in capsys.readouterr().err
        SpadeT5Config.from_preset("tiny", vocab_size=32_128).save_pretrained(tmp_path / "model")
        words.append(f"model.init_from={tmp_path / 'model'}")
    assert any(line.endswith("*") for line in lines_of(capsys, recipe, *words))


@pytest.mark.usefixtures("no_trace")
def test_a_cluster_says_how_many_gpus_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    by_itself = lines_of(capsys, "c4-base", "--cluster", "8-nodes")
    assert by_itself == lines_of(capsys, "c4-base", "--cluster", "8-nodes", "--gpus", "64", "--nodes", "8")
    assert "64 GPUs H100 SXM on 8 nodes" in by_itself[0]
    for words, message in (
        (("--gpus", "8"), "--gpus: 8 contradicts --cluster 8-nodes, which has 64; leave --gpus out, or --cluster"),
        (("--nodes", "4"), "--nodes: 4 contradicts --cluster 8-nodes, which has 8; leave --nodes out, or --cluster"),
    ):
        assert main(["plan", "c4-base", "--cluster", "8-nodes", *words]) == 2
        assert message in capsys.readouterr().err
    assert main(["plan", "c4-base", "--nodes", "2"]) == 2
    assert "--nodes: 2, but of how many GPUs is not said; give --gpus, or --cluster" in capsys.readouterr().err


def number(lines: list[str], pattern: str) -> float:
    """The number that the pattern finds in the only line with it."""
    (found,) = (match for line in lines if (match := re.search(pattern, line)))
    return float(found[1].replace(",", ""))


@pytest.mark.usefixtures("no_trace")
def test_time_and_cost_are_those_of_all_rows_and_of_communication(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("c4-base", "training.micro_batch_rows=1")
    few = lines_of(capsys, *words, "--gpus", "128", "--nodes", "16")
    many = lines_of(capsys, *words, "--gpus", "512", "--nodes", "64")
    assert not any("empty, to make" in line for line in few)
    assert any("384 rows of each step are empty" in line for line in many)
    arithmetic = [number(lines, r"^ +([\d.e-]+) s of a step are arithmetic") for lines in (few, many)]
    assert arithmetic[0] == arithmetic[1]  # idle GPUs make no step shorter
    for lines, compute in zip((few, many), arithmetic, strict=True):
        step = number(lines, r"^time +([\d.e-]+) s a step")
        assert step == pytest.approx(compute + number(lines, r", ([\d.e-]+) s communication that"), rel=0.02)
        assert number(lines, r"efficiency, .* (\d+)%$") == pytest.approx(100 * compute / step, abs=1)
        assert number(lines, r"^time .* ([\d.]+) h the run") == pytest.approx(65_536 * step / 3600, rel=0.02)
        assert number(lines, r"; ([\d,]+) input tokens") == pytest.approx(128 * 512 / step, rel=0.02)
    costs = [number(lines, r"^cost +([\d,.]+)") for lines in (few, many)]
    assert costs[1] > 4 * costs[0]


@pytest.mark.usefixtures("no_trace")
def test_a_growing_batch_takes_the_time_of_its_steps(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("c4-base", "training.deepspeed=null", "training.micro_batch_rows=16", "--gpus", "1")
    hours = [
        number(lines_of(capsys, *words, *more), r"^time .* ([\d.]+) h the run")
        for more in ((), ("training.steps=32768", "training.batch_warmup={initial_rows: 64, steps: 32768}"))
    ]
    assert hours[1] == pytest.approx(64 / 128 * 32768 / 65536 * hours[0], rel=0.01)


@pytest.mark.usefixtures("no_trace")
def test_the_row_of_a_run_without_deepspeed(capsys: pytest.CaptureFixture[str]) -> None:
    lines = lines_of(capsys, "c4-base", "--cluster", "1-gpu", "training.micro_batch_rows=16")
    rows = [line.split() for line in lines if re.match(r"\s*(fp32|bf16)", line)]
    assert [row[:2] for row in rows if row[-1] == "*"] == [["bf16_autocast", "none"]]
    assert [row[1] for row in rows if row[0] == "bf16"] == ["1", "2", "3"]
    cells = {(row[0], row[1]): row for row in rows}
    # no buffers of a reduction: 4 bytes of weight, gradient and two moments, and of what is frozen, and 17 GiB of activations
    assert cells["bf16_autocast", "none"][8:10] == ["0.00", "GiB"]
    assert float(cells["bf16_autocast", "none"][12]) == pytest.approx(17 + 248_759_808 * 16 / 2**30, abs=0.01)
    assert float(cells["bf16_autocast", "0"][12]) > float(cells["bf16_autocast", "none"][12])


MACHINES = resources.Machines(
    accelerator=find_accelerator("h100"),
    gpus=8,
    nodes=1,
    mfu=0.4,
    price=1.0,
    disk_gbps=1.0,
    within=None,
    between=Link(latency_seconds=0, bytes_per_second=1e9),
)


@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("rank_rows", [8, 4096])
def test_the_largest_micro_batch_is_the_last_that_fits(stage: int, rank_rows: int) -> None:
    """Even where without activations the update would take more than the backward pass."""
    config = from_mapping(
        TrainingConfig,
        {
            "steps": 9,
            "global_batch_rows": 8 * rank_rows,
            "micro_batch_rows": 2,
            "optimizer": {"name": "adamw", "learning_rate": 1e-3},
            "deepspeed": {"zero_stage": stage, "bucket_numel": 1000},
        },
    )
    with torch.device("meta"):
        model = SpadeT5ForConditionalGeneration(SpadeT5Config.from_preset("large"))
    parameters = Parameters.of(model)

    states = largest_rank(config, parameters, world_size=8)
    assert (states.update_peak > states.backward_peak) == (stage == 2)

    def activations(rows: int) -> Activations:
        return Activations(0, (1 + 3 * rows) << 28)

    def fits(rows: int) -> bool:
        run = dataclasses.replace(config, micro_batch_rows=rows)
        states = largest_rank(run, parameters, world_size=8)
        return states.largest(activations(rows).peak) <= MACHINES.usable_bytes

    most = resources.largest_micro_batch(config, parameters, MACHINES, activations(2), activations(4))
    assert most > 8
    assert fits(most)
    assert not fits(most + 1)


def test_the_example_of_the_guide(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    guide = (Path(__file__).resolve().parents[2] / "docs" / "plan.md").read_text(encoding="utf-8")
    command, _, rest = guide.partition("$ spade-t5 ")[2].partition("\n")
    expected = rest.partition("...\n")[2].partition("\n```")[0]
    assert main([*command.split(), f"data.store={tmp_path / 'none'}", f"run_dir={tmp_path / 'run'}"]) == 0
    assert capsys.readouterr().out.partition("machines")[2].rstrip() == expected.partition("machines")[2].rstrip()
