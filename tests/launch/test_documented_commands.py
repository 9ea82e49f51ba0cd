"""Every `spade-t5` command of the documentation is one that the program knows, and the recipes that it names are there and take its settings."""

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path

import pytest

from spade_t5.errors import ConfigError
from spade_t5.launch.cli import COMMANDS, OneLineErrorParser
from spade_t5.launch.config_files import load_recipe, load_run, load_settings
from spade_t5.launch.options import COMMANDS as LAUNCHED
from spade_t5.pretrain.prepare import PrepareConfig
from spade_t5.pretrain.run import PretrainConfig
from spade_t5.pretrain.tokenizer import TokenizerConfig
from spade_t5.testing.guide import DOCS, commands, program_commands

PAGES = [path for path in (*DOCS.rglob("*.md"), *DOCS.parent.glob("*.md")) if program_commands(path)]

SETTINGS: dict[str, type] = {"tokenizer": TokenizerConfig, "prepare": PrepareConfig}


def parsed(words: Sequence[str]) -> argparse.Namespace:
    """What the parser of a command makes of its words, which are also those of the command that a launch starts."""
    name, *rest = words
    assert name in COMMANDS
    module = importlib.import_module(f"spade_t5.launch.commands.{name}")
    parser = OneLineErrorParser(prog=f"spade-t5 {name}")
    module.add_arguments(parser)
    is_launch = getattr(module, "HANDS_ON_WORDS", False)
    return parser.parse_args(rest) if is_launch else parser.parse_intermixed_args(rest)


def check(words: Sequence[str]) -> None:
    """Reads a command as the program would, without the files that it names.

    Raises:
        SystemExit: an option is unknown, or lacks its value.
        ConfigError: there is no such recipe or cluster, or a setting is unknown or wrong.
    """
    arguments = parsed(words)
    if words[0] == "launch":
        assert arguments.words[0] in LAUNCHED
        check(arguments.words)
    elif words[0] in SETTINGS and "$" not in "".join(words):  # whose values only a shell knows
        load_settings(SETTINGS[words[0]], arguments.settings)
    elif words[0] in ("pretrain", "finetune", "doctor", "plan") and arguments.config is not None:
        arguments.deepspeed_config = arguments.accelerate_config = None
        if words[0] == "plan":
            load_recipe(
                PretrainConfig, arguments.config, arguments.overrides, kind="pretrain", cluster=arguments.cluster
            )
        elif words[0] == "doctor":
            load_run(arguments.config, arguments.overrides, cluster=arguments.cluster)
        else:
            importlib.import_module(f"spade_t5.launch.commands.{words[0]}").read_config(arguments)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_is_one_that_the_program_knows(page: Path) -> None:
    for words in program_commands(page):
        try:
            check(words)
        except (ConfigError, SystemExit) as error:
            pytest.fail(f"{page.name}: spade-t5 {' '.join(words)}: {error}")


def test_no_page_with_commands_is_left_out() -> None:
    assert {"README.md", "doctor.md", "guide.md", "launching.md", "multinode.md", "plan.md"} <= {p.name for p in PAGES}
    for page in DOCS.glob("*.md"):
        own = [line for line in commands(page.name) if line.startswith("spade-t5 ")]
        assert len(own) <= len(program_commands(page)), page.name


@pytest.mark.parametrize(
    "words", [["doctor", "base"], ["plan", "demo", "training.stepz=3"], ["launch", "local", "--", "doctor", "base"]]
)
def test_a_wrong_command_would_be_found(words: list[str]) -> None:
    with pytest.raises(ConfigError):
        check(words)
