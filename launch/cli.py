"""The `spade-t5` command. Exit codes: 0 done; 1 a fault; 2 bad usage, config or data; 75 stopped on request, resume to go on."""

import argparse
import importlib
import logging
import os
import sys
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch

from spade_t5.errors import RunAbortedError, StopRequestedError, UserError
from spade_t5.launch.rank import BEGAN_VARIABLE, FOLDER_VARIABLE
from spade_t5.launch.requirements import check_requirements
from spade_t5.messages import OneLineFormatter, hide_secrets_of, one_line, show_fault
from spade_t5.training import distributed
from spade_t5.training.outcome import is_outcome, record_outcome, record_outcomes_in
from spade_t5.training.stopping import EXIT_STOPPED, BrokenOffError, InterruptingStops, count_wall_seconds_from

COMMANDS = {
    "tokenizer": "train a SentencePiece tokenizer with sentinels, or take over an existing one",
    "prepare": "turn a corpus into a token store",
    "plan": "say what a pretraining run would do: lengths, shares, sentinels, rows",
    "pretrain": "pretrain a model on a token store",
    "finetune": "fine-tune a model on a task",
    "launch": "start a run on several processes, and again when one of them dies",
    "doctor": "check this machine, or all nodes of a coming run: versions, network, folders, limits, clocks, data",
    "evaluate": "score a model on a task",
    "export": "write a run's model as a Hugging Face folder",
    "convert": "T5 1.1 or LongT5 to SPADE-T5, and back",
    "generate": "generate text from lines of text",
    "verify": "check a checkpoint, store or export against its manifest",
    "bench": "measure kernels, training, data and GLUE beside their peers, and what saves and kills cost",
    "demo": "the whole story on the documentation of this Python installation",
}
"""Name to summary; each is a module of `spade_t5.launch.commands` with `add_arguments` and `run`."""

RUNS = ("pretrain", "finetune", "launch")
"""Commands that can be stopped anywhere and gone on with."""

EXIT_FAULT = 1
EXIT_USER_ERROR = 2


class OneLineErrorParser(argparse.ArgumentParser):
    """Says what is wrong with the arguments in one line, like every other mistake of a user."""

    def error(self, message: str) -> NoReturn:
        """Ends with exit code 2."""
        self.exit(EXIT_USER_ERROR, f"{self.prog}: {one_line(message)}; {self.prog} --help shows what is known\n")


class Ending(NamedTuple):
    """How a command ended."""

    code: int
    message: str = ""
    """One line; empty if there is nothing to say."""
    is_shared: bool = True
    """Whether all ranks end like this by themselves."""


def run_process() -> NoReturn:
    """Runs the command of this process's arguments, and ends the process."""
    is_rank = distributed.launched_world_size() > 1 or is_launched()
    if not is_rank and (len(sys.argv) < 2 or sys.argv[1] not in RUNS):
        sys.exit(main())
    try:
        ending = run_command()
    except Exception:
        show_fault(*sys.exc_info())
        ending = Ending(EXIT_FAULT)
    # torchrun takes any other code for a failure and ends the other ranks, which may still be at their last files.
    is_well = is_launched() and ending.code == EXIT_STOPPED and ending.is_shared
    distributed.end_process(0 if is_well else ending.code)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; a fault of the program leaves as an exception (exit code 1)."""
    return run_command(argv).code


def run_command(argv: Sequence[str] | None = None) -> Ending:
    """Runs one command and says how it ended; a fault of the program leaves as an exception."""
    hide_secrets_of(os.environ)
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
    threading.excepthook = _show_fault_of_thread
    # An operator of a cluster may set RANK for what it believes to be a rank.
    is_main = words.command == "launch" or os.environ.get("RANK", "0") == "0"
    _show_messages(is_main=is_main)
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would guess, and warn of its guess
    if is_launched():
        record_outcomes_in(Path(os.environ[FOLDER_VARIABLE]))
        count_wall_seconds_from(float(os.environ[BEGAN_VARIABLE]))
    try:
        ending = _run(words.command, words.arguments)
    except Exception as error:
        is_consequence = distributed.is_peer_failure(error)
        record_outcome(EXIT_FAULT, f"{type(error).__name__}: {error}", is_consequence=is_consequence)
        raise
    record_outcome(ending.code, ending.message)
    if ending.is_shared:  # else others may be dead or elsewhere, and leaving the group together would wait for them
        distributed.shutdown()
    if ending.message and is_main and not is_launched():
        print(f"spade-t5 {words.command}: {one_line(ending.message)}", file=sys.stderr)
    return ending


def _show_messages(*, is_main: bool) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(OneLineFormatter("%(message)s"))
    handler.setLevel(logging.INFO if is_main else logging.WARNING)  # the log file of a rank has the rest
    if is_launched():
        handler.addFilter(lambda record: not is_outcome(record))  # the launcher shows it
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("spade_t5").setLevel(logging.INFO)


def _show_fault_of_thread(arguments: threading.ExceptHookArgs) -> None:
    if arguments.exc_type is not SystemExit:
        show_fault(arguments.exc_type, arguments.exc_value, arguments.exc_traceback)


def _run(command: str, words: Sequence[str]) -> Ending:
    """Runs a command and says how it ended, as far as it was to be expected."""
    try:
        with ExitStack() as stack:
            if command in RUNS:
                stack.enter_context(InterruptingStops())
            if command != "doctor":  # which reports it of every node
                check_requirements()
            module = importlib.import_module(f"spade_t5.launch.commands.{command}")
            parser = OneLineErrorParser(prog=f"spade-t5 {command}", description=module.__doc__)
            module.add_arguments(parser)
            parse = parser.parse_args if getattr(module, "HANDS_ON_WORDS", False) else parser.parse_intermixed_args
            code = module.run(parse(words))
    except UserError as error:
        return Ending(EXIT_USER_ERROR, str(error))
    except RunAbortedError as error:
        record_outcome(EXIT_FAULT, str(error), is_consequence=distributed.is_peer_failure(error))
        return Ending(EXIT_FAULT, str(error), is_shared=False)
    except StopRequestedError as stop:
        return Ending(EXIT_STOPPED, str(stop), is_shared=not isinstance(stop, BrokenOffError))
    except KeyboardInterrupt:
        return Ending(EXIT_STOPPED, "interrupted; start the same command again to go on", is_shared=False)
    return Ending(code or 0)


def is_launched() -> bool:
    """Whether this process is a rank of `spade-t5 launch`, which shows how its ranks ended."""
    return FOLDER_VARIABLE in os.environ
