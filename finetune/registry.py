"""The built-in tasks by name: what a config may write under `task`, and what the command line lists."""

import typing

from spade_t5.config import ConfigDict, from_mapping
from spade_t5.errors import ConfigError
from spade_t5.finetune.tasks.glue import Mrpc, Rte, Sst2, StsB
from spade_t5.finetune.tasks.pydocs import PydocsMatch, PydocsSummary, PydocsTopic
from spade_t5.finetune.tasks.summarization import CnnDailymail, SciSumm, Summarization
from spade_t5.finetune.tasks.user import TextClassification

TaskConfig = (
    Sst2 | Mrpc | StsB | Rte
    | CnnDailymail | SciSumm | Summarization
    | TextClassification
    | PydocsTopic | PydocsSummary | PydocsMatch
)  # fmt: skip

TASKS: dict[str, type] = {config.name: config for config in typing.get_args(TaskConfig)}


def task_config(name: str, settings: ConfigDict) -> TaskConfig:
    """The config of a task from its name and the settings that belong under `task`.

    Raises:
        ConfigError: there is no such task, or a setting is wrong.
    """
    if name not in TASKS:
        raise ConfigError(f"task: {name!r} is not one of {', '.join(sorted(TASKS))}")
    return from_mapping(TASKS[name], settings, "task")
