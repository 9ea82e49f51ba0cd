"""Measure speed and memory beside other implementations; `spade-t5 bench NAME --help` shows what a benchmark takes.

Example: spade-t5 bench step --compare hf-t5 --out docs/results
"""

import argparse
import importlib
from types import ModuleType

from spade_t5.errors import ConfigError

HANDS_ON_WORDS = True

BENCHMARKS = {
    "kernels": ("kernels.command", "every op of the model, forward and backward, beside its peers"),
    "encoder": ("encoder", "the encoder's time per token and memory as rows get longer"),
    "step": ("step", "a training step beside Hugging Face's T5 and LongT5"),
    "data": ("data", "preparing, loading and corrupting text, beside the tokenizer, the model and the usual collator"),
    "checkpoints": ("checkpoints", "what saving costs training, and save and load beside the bare disk"),
    "faults": ("faults", "pretraining killed again and again, compared with undisturbed runs"),
    "scaling": ("scaling", "efficiency on 1 to 64 nodes as predicted, and the prediction against steps on slow links"),
    "glue": ("glue", "`mini` fine-tuned from scratch on GLUE"),
}
"""Name to module of `spade_t5.benchmarks`, with `add_arguments` and `run`, and summary."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    summaries = "; ".join(f"{name}: {summary}" for name, (_, summary) in BENCHMARKS.items())
    parser.add_argument("benchmark", choices=BENCHMARKS, metavar="NAME", help=summaries)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the benchmark")
    parser.set_defaults(parser_class=type(parser))


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    module = _load(arguments.benchmark)
    parser = arguments.parser_class(
        prog=f"spade-t5 bench {arguments.benchmark}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    module.run(parser.parse_args(arguments.arguments))


def _load(name: str) -> ModuleType:
    try:
        return importlib.import_module(f"spade_t5.benchmarks.{BENCHMARKS[name][0]}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("spade_t5"):
            raise
        raise ConfigError(f"{name}: {error}; run `pip install 'spade-t5[train]'`") from None
