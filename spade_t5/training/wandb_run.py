"""Weights & Biases, beside metrics.jsonl: one run there for one run folder, through all its starts.

Sent are the numbers of metrics.jsonl and the resolved settings, in which credentials are masked; no code, no command line, no name of the
machine. The key is the user's affair (`wandb login`, or WANDB_API_KEY) and is read by wandb alone. Whatever fails there, the run goes on.
"""

import contextlib
import json
import logging
import secrets
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from spade_t5.messages import reason_of

logger = logging.getLogger("spade_t5")

RUN_ID_FILE = "wandb.json"
INIT_SECONDS = 60.0
"""How long the start waits for the server."""
FINISH_SECONDS = 60.0
"""How long the end waits for what is not sent yet."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WandbConfig:
    """Where Weights & Biases shows the run."""

    project: str
    """Project."""
    entity: str | None = None
    """User or team; null: the key's own."""
    name: str | None = None
    """Name that is shown; null: the name of the run folder."""
    mode: Literal["online", "offline"] = "online"
    """offline only writes to `wandb/` in the run folder, which `wandb sync` sends later."""

    def __post_init__(self) -> None:
        """Checks the fields."""
        if not self.project:
            raise ValueError("project: empty; give the name of a project")


class WandbRun:
    """A run at Weights & Biases; where wandb is not installed, or anything fails, the run goes on without."""

    def __init__(self, config: WandbConfig, run_dir: Path, settings: Mapping[str, Any]) -> None:
        """Begins a run there, or goes on with the one that earlier starts of this run folder had.

        Args:
            config: where.
            run_dir: folder of the run; `wandb.json` in it keeps the run's id.
            settings: the resolved config.
        """
        self._run: Any = None
        self._folder = run_dir / "wandb"
        self._attempt(lambda: self._begin(config, run_dir, settings))

    def add(self, numbers: Mapping[str, float], step: int) -> None:
        """Adds a point to every curve."""
        # The step is a number like the others: wandb's own only grows, and a run may go back to a checkpoint.
        self._attempt(lambda: self._run and self._run.log({"step": step, **numbers}))

    def close(self) -> None:
        """Sends what is left, but does not wait for ever."""
        if self._run is None:
            return
        finish = self._run.finish
        ending = threading.Thread(target=lambda: self._attempt(finish), name="wandb-finish", daemon=True)
        ending.start()
        ending.join(FINISH_SECONDS)
        if ending.is_alive():
            logger.warning("wandb: the server does not take the last metrics; send them by wandb sync %s", self._folder)
        self._run = None

    def _begin(self, config: WandbConfig, run_dir: Path, settings: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise RuntimeError("not installed; pip install wandb") from None
        if config.mode == "online" and wandb.api.api_key is None:
            # wandb would ask a terminal for it, and the other ranks would wait.
            raise RuntimeError("there is no key; use wandb login, set WANDB_API_KEY, or training.wandb.mode=offline")
        self._run = wandb.init(
            project=config.project,
            entity=config.entity,
            name=config.name or run_dir.resolve().name,
            id=_run_id(run_dir),
            mode=config.mode,
            resume="allow" if config.mode == "online" else None,
            dir=str(run_dir),
            config=dict(settings),
            settings=wandb.Settings(
                host="",
                console="off",
                silent=True,
                init_timeout=INIT_SECONDS,
                disable_code=True,
                disable_git=True,
                disable_job_creation=True,
                x_disable_meta=True,
                x_disable_machine_info=True,
                x_disable_stats=True,
                x_save_requirements=False,
            ),
        )
        self._run.define_metric("*", step_metric="step")

    def _attempt(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # of somebody else's program and server, which have many kinds of errors
            self._run = None
            logger.warning("wandb: %s: metrics go to metrics.jsonl only", reason_of(error))


def _run_id(run_dir: Path) -> str:
    """The id of the run, made at its first start."""
    path = run_dir / RUN_ID_FILE
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return str(json.loads(path.read_text(encoding="utf-8"))["id"])
    run_id = secrets.token_hex(6)
    path.write_text(json.dumps({"id": run_id}) + "\n", encoding="utf-8")
    return run_id
