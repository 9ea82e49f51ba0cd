"""Say what a pretraining run would do before anything is trained: lengths, shares and sentinels of its denoisers, and how they fill rows.

With --gpus, or --cluster, also what it would take: parameters, memory of every rank, FLOPs, time, cost and checkpoints, without a GPU.

Example: spade-t5 plan c4-base objective.name=ul2 objective.max_spans=100
Example: spade-t5 plan c4-t5-xl --cluster 8-nodes
Example: spade-t5 plan c4-base --gpus 64 --nodes 8 --gpu h100 training.micro_batch_rows=32
"""

import argparse
import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from spade_t5.devices import find_accelerator
from spade_t5.errors import ConfigError
from spade_t5.hf.tokenizer import T5_SENTINELS, VOCABULARY_MULTIPLE, load_tokenizer
from spade_t5.launch.config_files import add_recipe_arguments, foreign_settings, load_recipe, positive_int
from spade_t5.pretrain.corpora import HubCorpus
from spade_t5.pretrain.data import StoreData, scaled_weights
from spade_t5.pretrain.objectives import BoundDenoiser, PrefixedDenoiser, Vocabulary
from spade_t5.pretrain.order import BLOCK_DRAWS, Order
from spade_t5.pretrain.rows import WINDOW_SEGMENTS, ConcatenatedRows, PackedRows
from spade_t5.pretrain.run import PretrainConfig, model_config_of
from spade_t5.pretrain.store import is_token_store
from spade_t5.pretrain.streaming import StreamingData, StreamingRows

_T5_PIECES = 32000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    add_recipe_arguments(parser, kind="pretrain", example="objective.inputs_length=4096")
    parser.add_argument(
        "--tokenizer",
        help="tokenizer that a store will be prepared with, while there is none; needed to count the tokens of prefixes",
    )
    parser.add_argument(
        "--num-sentinels",
        type=positive_int,
        help=f"sentinels that a store will be prepared with, while there is none (default: the tokenizer's, or T5's {T5_SENTINELS})",
    )

    parser.add_argument(
        "--gpus",
        type=positive_int,
        help="GPUs on all nodes together: plan what the run takes of them (default: those of --cluster)",
    )
    parser.add_argument("--nodes", type=positive_int, help="nodes that they are on (default: those of --cluster, or 1)")
    parser.add_argument("--gpu", default="h100", help="kind of GPU: a100-80, h100, h200, b200, ... (default: h100)")
    parser.add_argument(
        "--mfu",
        type=_positive_number,
        default=0.4,
        help="share of the peak that model FLOPs are assumed to reach (default: 0.4)",
    )
    parser.add_argument(
        "--price", type=_positive_number, default=2.5, help="assumed price of a GPU for an hour (default: 2.5)"
    )
    parser.add_argument(
        "--disk-gbps",
        type=_positive_number,
        default=1.0,
        help="gigabytes a second that all nodes together are assumed to write to the run folder (default: 1)",
    )
    parser.add_argument(
        "--within",
        metavar="GB/S:US",
        help="link assumed from a GPU to the next of its node, GB/s:microseconds (default: 0.8 of what its maker publishes, 1 us)",
    )
    parser.add_argument(
        "--between",
        metavar="GB/S:US",
        default="360:5",
        help="link assumed from a node to the next, what all its network cards send (default: 360:5, eight of 400 Gbit/s)",
    )


def _positive_number(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} must be a number above 0")
    return value


def run(arguments: argparse.Namespace) -> None:
    """Prints the plan; a run that could not start ends with what to change."""
    config = load_recipe(
        PretrainConfig,
        arguments.config,
        arguments.overrides,
        kind="pretrain",
        foreign=foreign_settings(arguments),
        cluster=arguments.cluster,
    )
    machines = _gpus_and_nodes(arguments)
    vocabulary, source = _vocabulary(config, arguments.tokenizer, arguments.num_sentinels)
    denoisers = config.objective.denoisers(vocabulary)
    phases = _phases(denoisers)
    lines = [f"objective  {config.objective.name}", f"tokenizer  {source}"]
    if isinstance(vocabulary, _AssumedVocabulary) and any(isinstance(one, PrefixedDenoiser) for one in denoisers):
        lines.append("           prefixes are counted as 0 tokens; --tokenizer counts them")
    lines.append("")
    lines += [*_table(denoisers, phases, len(vocabulary.sentinel_ids)), "", *_rows(config, denoisers, phases)]
    print("\n".join(lines))
    config.objective.bind(vocabulary)
    config.data.check_denoisers(denoisers)
    Order(config.training.seed, [one.weights for one in denoisers], labels=[one.label for one in denoisers])
    if isinstance(config.data, StreamingData):
        print("\n".join(_from_stream(config, config.data)))
    elif _has_stores(config):
        print("\n".join(_from_stores(config, config.data)))
    if machines is not None:
        _print_resources(arguments, machines, config, vocabulary, denoisers, phases)


@dataclass(frozen=True, kw_only=True, slots=True)
class _AssumedVocabulary(Vocabulary):
    """What is known of a tokenizer that is not there yet."""

    def prefix_ids(self, text: str) -> tuple[int, ...]:
        """No ids: how many the text has is not known."""
        return ()


@dataclass(frozen=True, slots=True)
class _Phase:
    """Blocks of draws with the same shares."""

    first_block: int
    """Its first block of draws."""
    shares: tuple[float, ...]
    """Share of each denoiser in the draws."""

    def mean(self, values: Sequence[float]) -> float:
        """Mean over the draws of a value of each denoiser."""
        return sum(share * value for share, value in zip(self.shares, values, strict=True))


def _gpus_and_nodes(arguments: argparse.Namespace) -> tuple[int, int] | None:
    """Numbers of GPUs and nodes, by the options or the cluster; None: nothing is planned of them.

    Raises:
        ConfigError: they contradict each other, or there are nodes without GPUs.
    """
    gpus, nodes = arguments.gpus, arguments.nodes
    if arguments.cluster is not None:
        from spade_t5.launch.clusters import load_cluster

        cluster = load_cluster(arguments.cluster)
        for option, given, known in (("--gpus", gpus, cluster.num_gpus), ("--nodes", nodes, cluster.nodes)):
            if given not in (None, known):
                raise ConfigError(
                    f"{option}: {given} contradicts --cluster {arguments.cluster}, which has {known}; leave {option} out, or --cluster"
                )
        return cluster.num_gpus, cluster.nodes
    if gpus is None:
        if nodes is not None:
            raise ConfigError(f"--nodes: {nodes}, but of how many GPUs is not said; give --gpus, or --cluster")
        return None
    return gpus, nodes or 1


def _print_resources(
    arguments: argparse.Namespace,
    gpus_and_nodes: tuple[int, int],
    config: PretrainConfig,
    vocabulary: Vocabulary,
    denoisers: Sequence[BoundDenoiser],
    phases: Sequence[_Phase],
) -> None:
    """What the run takes of the GPUs, line by line: the trace of a large model takes some seconds."""
    from spade_t5.launch.resources import Machines, Rows, resource_lines
    from spade_t5.training.scaling import parse_link

    if arguments.mfu > 1:
        raise ConfigError(f"--mfu: {arguments.mfu:g} is a share of the peak; give at most 1")
    machines = Machines(
        accelerator=find_accelerator(arguments.gpu),
        gpus=gpus_and_nodes[0],
        nodes=gpus_and_nodes[1],
        mfu=arguments.mfu,
        price=arguments.price,
        disk_gbps=arguments.disk_gbps,
        within=None if arguments.within is None else parse_link(arguments.within),
        between=parse_link(arguments.between),
    )
    lengths = [denoiser.lengths for denoiser in denoisers]
    rows = Rows(
        inputs_length=max(one.inputs for one in lengths),
        targets_length=max(one.targets for one in lengths),
        # Of the last phase, which is most of a run.
        kinds=[(share, one.inputs, one.targets) for share, one in zip(phases[-1].shares, lengths, strict=True)],
    )
    vocab_size = -(-vocabulary.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    print()
    for line in resource_lines(config.training, model_config_of(config, vocab_size), rows, machines):
        print(line, flush=True)


def _has_stores(config: PretrainConfig) -> bool:
    return isinstance(config.data, StoreData) and all(is_token_store(entry.store) for entry in config.data.stores)


def _vocabulary(config: PretrainConfig, future: str | None, num_sentinels: int | None) -> tuple[Vocabulary, str]:
    """The vocabulary that the run would have, and where it is from."""
    if not isinstance(config.data, StoreData):
        tokenizer = load_tokenizer(config.data.tokenizer, num_sentinels=config.data.num_sentinels)
        source = config.data.tokenizer
    elif _has_stores(config):
        source = str(config.data.stores[0].store / "tokenizer")
        tokenizer = load_tokenizer(source)
    elif future is not None:
        source = future
        tokenizer = load_tokenizer(future, num_sentinels=num_sentinels)
    else:
        num_sentinels = T5_SENTINELS if num_sentinels is None else num_sentinels
        missing = next(entry.store for entry in config.data.stores if not is_token_store(entry.store))
        assumed = _AssumedVocabulary(
            vocab_size=_T5_PIECES + num_sentinels,
            pad_token_id=0,
            eos_token_id=1,
            sentinel_ids=tuple(range(_T5_PIECES, _T5_PIECES + num_sentinels)),
            stop_ids=(1,),
        )
        return assumed, f"{num_sentinels} sentinels assumed: there is no store at {missing} yet"
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    return vocabulary, f"{source}: {len(vocabulary.sentinel_ids)} sentinels"


def _phases(denoisers: Sequence[BoundDenoiser]) -> list[_Phase]:
    weights = scaled_weights(denoisers, 1.0)
    return [
        _Phase(first_block, tuple(steps[k][1] for steps in weights)) for k, (first_block, _) in enumerate(weights[0])
    ]


def _table(denoisers: Sequence[BoundDenoiser], phases: Sequence[_Phase], num_available: int) -> list[str]:
    """One line for each denoiser, and one more for each that needs more sentinels than there are."""
    header = ["denoiser", *(_share_title(phase) for phase in phases), "raw", "inputs", "targets", "sentinels"]
    lines = []
    for k, denoiser in enumerate(denoisers):
        at_most = "" if denoiser.has_fixed_lengths else "<="
        raw, inputs, targets = denoiser.lengths
        shares = [f"{phase.shares[k]:.1%}" for phase in phases]
        lengths = [str(raw), f"{at_most}{inputs}", f"{at_most}{targets}", f"{at_most}{denoiser.num_sentinels}"]
        lines.append([denoiser.label, *shares, *lengths])
    short = [
        f"{denoiser.label}: needs {denoiser.num_sentinels} sentinels, there are {num_available}: {denoiser.sentinel_remedy(num_available)}"
        for denoiser in denoisers
        if denoiser.num_sentinels > num_available
    ]
    return [*_aligned([header, *lines]), *([""] if short else []), *short]


def _share_title(phase: _Phase) -> str:
    return "share" if phase.first_block == 0 else f"from draw {phase.first_block * BLOCK_DRAWS:,}"


def _aligned(lines: Sequence[Sequence[str]]) -> Iterator[str]:
    """Columns of one width, the first to the left and numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for name, *cells in lines:
        yield "  ".join([name.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(cells, widths[1:], strict=True))])


def _rows(config: PretrainConfig, denoisers: Sequence[BoundDenoiser], phases: Sequence[_Phase]) -> Iterator[str]:
    """What follows from the lengths alone."""
    widest_inputs = max(denoiser.lengths.inputs for denoiser in denoisers)
    widest_targets = max(denoiser.lengths.targets for denoiser in denoisers)
    rows, steps = config.training.global_batch_rows, config.training.steps
    all_rows = config.training.step_rows.before(steps + 1)
    if isinstance(config.data, StoreData) and config.data.packing == "best_fit":
        yield f"rows       {widest_inputs} inputs; documents are packed, longer ones divided, so how full they are depends on the text"
        return
    yield f"rows       {widest_inputs} inputs, {widest_targets} targets; each is one segment"
    for phase in phases:
        raw, inputs, targets = (phase.mean([denoiser.lengths[side] for denoiser in denoisers]) for side in range(3))
        begin = "" if len(phases) == 1 else f"from draw {phase.first_block * BLOCK_DRAWS:,} on: "
        yield f"           {begin}{inputs / widest_inputs:.1%} of the inputs and {targets / widest_targets:.1%} of the targets hold tokens"
        yield f"           {begin}a step of {rows} rows takes {rows * raw:,.0f} raw tokens and scores {rows * targets:,.0f} targets"
    # The draws of a phase end where the next begins, or with the run.
    begins = [min(phase.first_block * BLOCK_DRAWS, all_rows) for phase in phases]
    counts = [end - begin for begin, end in zip(begins, [*begins[1:], all_rows], strict=True)]
    raw_lengths = [denoiser.lengths.raw for denoiser in denoisers]
    total = sum(count * phase.mean(raw_lengths) for count, phase in zip(counts, phases, strict=True))
    yield f"run        {steps:,} steps take {total:,.0f} raw tokens"
    if config.training.batch_warmup is not None:
        yield f"           the batch warms up: {all_rows:,} rows instead of {steps * rows:,}"


def _from_stores(config: PretrainConfig, data: StoreData) -> Iterator[str]:
    """What the stores add; opening them checks what a run would check."""
    # A plan reads little of a store, so no copy of it is made.
    rows = dataclasses.replace(data, staging_dir=None).open(config.objective, seed=config.training.seed).train_rows
    assert isinstance(rows, ConcatenatedRows | PackedRows), "rows of stores are of these kinds"
    segments_per_row = 1.0
    if isinstance(rows, PackedRows):
        segments_per_row = WINDOW_SEGMENTS / len(rows.window_rows(0))
        inputs, targets = rows.efficiency(0)
        widths = f"{rows.renderer.inputs_length} inputs, {rows.renderer.targets_length} targets"
        yield f"packing    {widths}: the first window of documents fills {inputs:.1%} and {targets:.1%}, {segments_per_row:.1f} segments a row"
    num_draws = config.training.step_rows.before(config.training.steps + 1) * segments_per_row
    block, rest = divmod(num_draws, BLOCK_DRAWS)
    order, pairs = rows.draws.order, rows.draws.pairs
    draws = order.counts_before(int(block)) + order.quotas(int(block)) * rest / BLOCK_DRAWS
    for corpus in dict.fromkeys(pair.corpus for pair in pairs):
        own = [(count, pair.segments) for count, pair in zip(draws, pairs, strict=True) if pair.corpus == corpus]
        seen = sum(count / segments.count for count, segments in own)
        yield f"corpus     {corpus}: {own[0][1].split.num_tokens:,} tokens, seen {seen:.3g} times"


def _from_stream(config: PretrainConfig, data: StreamingData) -> Iterator[str]:
    """What the text of a stream adds, if it is on this machine; opening it checks what a run would check."""
    if isinstance(data.corpus, HubCorpus) and not Path(data.corpus.dataset).is_dir():
        yield f"corpus     the hub is not asked for {data.corpus.dataset}; data.lanes={data.lanes} needs at least so many files there"
        return
    # One held-out row tells whether there are any, and is found much sooner than all.
    rows = data.with_eval_rows(1).open(config.objective, seed=config.training.seed).train_rows
    assert isinstance(rows, StreamingRows), "rows of streams are of this kind"
    yield f"corpus     {data.corpus.name}: number of files {len(rows.stream.corpus.files):,}, lanes {data.lanes}"
