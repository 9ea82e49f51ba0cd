"""Generate text: one line in, one line out."""

import argparse
import re
import sys
from pathlib import Path

from spade_t5.errors import DataError
from spade_t5.hf.generation import generate_text
from spade_t5.hf.loading import load_model, load_tokenizer_of
from spade_t5.launch.config_files import positive_int
from spade_t5.modeling import SpadeT5ForConditionalGeneration
from spade_t5.training import distributed

# An output is one line, and a model may have learned to write what steers a terminal.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("model", help="exported folder, run folder, checkpoint, or name on the hub")
    parser.add_argument("--input", type=Path, help="file with one input a line (default: standard input)")
    parser.add_argument(
        "--max-new-tokens", type=positive_int, default=128, help="longest output, in tokens (default: %(default)s)"
    )
    parser.add_argument("--num-beams", type=positive_int, default=1, help="beams; 1 is greedy (default: %(default)s)")
    parser.add_argument("--sample", action="store_true", help="sample instead of taking the likeliest token")
    parser.add_argument("--temperature", type=float, default=1.0, help="of sampling (default: %(default)s)")
    parser.add_argument("--batch-size", type=positive_int, default=8, help="inputs at once (default: %(default)s)")


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    if arguments.input is None:
        text = sys.stdin.read()
    else:
        try:
            text = arguments.input.read_text(encoding="utf-8")
        except OSError as error:
            raise DataError(f"--input: {arguments.input}: {error.strerror}; give an existing text file") from None
        except UnicodeDecodeError:
            raise DataError(f"--input: {arguments.input} is not UTF-8 text; convert it first") from None
    lines = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")] if text else []
    model = load_model(arguments.model, SpadeT5ForConditionalGeneration, device=distributed.device())
    options = {"num_beams": arguments.num_beams, "do_sample": arguments.sample}
    if arguments.sample:
        options["temperature"] = arguments.temperature
    tokenizer = load_tokenizer_of(arguments.model)
    for output in generate_text(
        model, tokenizer, lines, max_new_tokens=arguments.max_new_tokens, batch_size=arguments.batch_size, **options
    ):
        print(_CONTROL.sub(" ", output))
