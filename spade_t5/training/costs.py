"""What steps cost: where the time went, how fast that was, memory, and which rank is slow."""

import logging
from collections import Counter
from typing import Any

import torch

from spade_t5.devices import peak_flops
from spade_t5.training import distributed
from spade_t5.training.config import TrainingConfig
from spade_t5.training.stragglers import RankTimes
from spade_t5.training.throughput import MemoryMeter, Work, rates
from spade_t5.training.timing import OUTSIDE_STEPS, Part

logger = logging.getLogger("spade_t5")


class StepCosts:
    """Adds up what the steps of this process took; every rank has one, and asks it after every step."""

    def __init__(self, config: TrainingConfig) -> None:
        """Looks up what this rank's device can do."""
        device = distributed.device()
        self._peak_flops = _peak_flops(config, device)
        self._memory = MemoryMeter(device)
        self._rank_times = RankTimes(config.log_every_steps)
        self._seconds_by: Counter[Part] = Counter()

    def metrics(self, step: int, work: Work, seconds_by: dict[Part, float]) -> dict[str, Any]:
        """What a step's line of metrics.jsonl says of its cost (a collective call every so many steps).

        Args:
            step: its number.
            work: of all ranks.
            seconds_by: time of this rank since the step before, by what it went to.
        """
        self._seconds_by.update(seconds_by)
        seconds = sum(value for part, value in seconds_by.items() if part not in OUTSIDE_STEPS)
        memory = self._memory.read()
        rank_times = self._rank_times.add(
            step, seconds, seconds - seconds_by["communication"], next(iter(memory.values()), 0)
        )
        return {
            **rates(work, seconds, distributed.world_size(), self._peak_flops),
            "seconds": seconds,
            "seconds_by": seconds_by,
            "memory": memory,
            **({} if rank_times is None else {"ranks": rank_times}),
        }

    def total(self, seconds_by: dict[Part, float]) -> dict[str, Any]:
        """Where all time went, with what came behind the last step; also logs it."""
        self._seconds_by.update(seconds_by)
        total = sum(self._seconds_by.values())
        shares = ", ".join(f"{part} {value / total:.1%}" for part, value in self._seconds_by.most_common())
        logger.info("time: %.1f s, of which %s", total, shares)
        return {"seconds": total, "seconds_by": dict(self._seconds_by)}


def _peak_flops(config: TrainingConfig, device: torch.device) -> float | None:
    """What one device can do in a second; None: unknown."""
    if config.peak_tflops is not None:
        return config.peak_tflops * 1e12
    if device.type != "cuda":
        return None
    return peak_flops(torch.cuda.get_device_name(device), config.precision)
