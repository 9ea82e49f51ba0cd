"""The `spade-t5` command. Exit codes: 0 done; 1 a fault; 2 bad usage, config or data; 75 stopped on request, resume to go on."""

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch

from spade_t5.errors import RunAbortedError, StopRequestedError, UserError
from spade_t5.launch.rank import FOLDER_VARIABLE
from spade_t5.launch.requirements import check_requirements
from spade_t5.messages import OneLineFormatter, one_line, show_fault
from spade_t5.training import distributed
from spade_t5.training.outcome import record_outcome, record_outcomes_in

COMMANDS = {
    "tokenizer": "train a SentencePiece tokenizer with sentinels, or take over an existing one",
    "prepare": "turn a corpus into a token store",
    "plan": "say what a pretraining run would do: lengths, shares, sentinels, rows",
    "pretrain": "pretrain a model on a token store",
    "finetune": "fine-tune a model on a task",
    "launch": "start a run on several processes, and again when one of them dies",
    "evaluate": "score a model on a task",
    "export": "write a run's model as a Hugging Face folder",
    "convert": "T5 1.1 or LongT5 to SPADE-T5, and back",
    "generate": "generate text from lines of text",
    "verify": "check a checkpoint, store or export against its manifest",
    "bench": "measure kernels, the training step, the encoder, the data or GLUE beside their peers",
    "demo": "the whole story on the documentation of this Python installation",
}
"""Name to summary; each is a module of `spade_t5.launch.commands` with `add_arguments` and `run`."""

EXIT_FAULT = 1
EXIT_USER_ERROR = 2
EXIT_STOPPED = 75


class OneLineErrorParser(argparse.ArgumentParser):
    """Says what is wrong with the arguments in one line, like every other mistake of a user."""

    def error(self, message: str) -> NoReturn:
        """Ends with exit code 2."""
        self.exit(EXIT_USER_ERROR, f"{self.prog}: {one_line(message)}; {self.prog} --help shows what is known\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; a fault of the program leaves as an exception (exit code 1)."""
    parser = OneLineErrorParser(prog="spade-t5", description="Pretrain, fine-tune, evaluate and export SPADE-T5.")
    parser.add_argument(
        "command", choices=COMMANDS, metavar="COMMAND", help="; ".join(f"{k}: {v}" for k, v in COMMANDS.items())
    )
    parser.add_argument(
        "arguments", nargs=argparse.REMAINDER, help="arguments of the command; COMMAND --help shows them"
    )
    words = parser.parse_args(argv)
    os.umask(os.umask(0o077) | 0o002)  # nobody but user and group may change what is written, whatever was set
    sys.excepthook = show_fault
    is_main = os.environ.get("RANK", "0") == "0"
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(OneLineFormatter("%(message)s"))
    handler.setLevel(logging.INFO if is_main else logging.WARNING)  # the log file of a rank has the rest
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("spade_t5").setLevel(logging.INFO)
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would guess, and warn of its guess
    if is_launched():
        record_outcomes_in(Path(os.environ[FOLDER_VARIABLE]))
    try:
        code, message = _run(words.command, words.arguments)
        record_outcome(code, message)
    except Exception as error:
        is_consequence = distributed.is_peer_failure(error)
        record_outcome(EXIT_FAULT, f"{type(error).__name__}: {error}", is_consequence=is_consequence)
        raise
    finally:
        distributed.shutdown()
    if message and is_main and not is_launched():
        print(f"spade-t5 {words.command}: {one_line(message)}", file=sys.stderr)
    return code


def _run(command: str, words: Sequence[str]) -> tuple[int, str]:
    """Runs a command; returns its exit code, and what there is to say about it."""
    try:
        check_requirements()
        module = importlib.import_module(f"spade_t5.launch.commands.{command}")
        parser = OneLineErrorParser(prog=f"spade-t5 {command}", description=module.__doc__)
        module.add_arguments(parser)
        parse = parser.parse_args if getattr(module, "HANDS_ON_WORDS", False) else parser.parse_intermixed_args
        code = module.run(parse(words))
    except UserError as error:
        return EXIT_USER_ERROR, str(error)
    except RunAbortedError as error:
        record_outcome(EXIT_FAULT, str(error), is_consequence=distributed.is_peer_failure(error))
        return EXIT_FAULT, str(error)
    except StopRequestedError as stop:
        return EXIT_STOPPED, str(stop)
    except KeyboardInterrupt:
        return EXIT_STOPPED, "interrupted; start the same command again to go on"
    return code or 0, ""


def is_launched() -> bool:
    """Whether this process is a rank of `spade-t5 launch`, which shows how its ranks ended."""
    return FOLDER_VARIABLE in os.environ
