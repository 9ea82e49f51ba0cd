"""The built-in tasks by name: what a config may write under `task`, and what the command line lists."""

import typing

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
