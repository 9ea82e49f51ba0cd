"""What fails on one rank is said by all, so that none waits for another that has left."""

import os
from pathlib import Path

import torch.distributed as dist

from spade_t5.errors import ConfigError
from spade_t5.testing import call_on_ranks
from spade_t5.training.agreement import write_on_every_rank, write_on_main


def write_on_rank(folder: str) -> list[str]:
    """A rank that writes where a folder lies in the way of rank 0, and of rank 1: what it is told."""
    dist.init_process_group("gloo")
    place = Path(folder)
    said = []
    try:
        write_on_main("out", place, lambda: (place / "rank-2").touch())
        for write, name in ((write_on_main, "rank-0"), (write_on_every_rank, f"rank-{os.environ['RANK']}")):
            try:
                write("out", place, lambda name=name: (place / name).write_text("x"))
            except ConfigError as error:
                said.append(str(error))
    finally:
        dist.destroy_process_group()
    return said


def test_a_folder_that_one_rank_cannot_write_is_refused_by_all(tmp_path: Path) -> None:
    place = tmp_path / "out"
    (place / "rank-0").mkdir(parents=True)
    line = f"out: {place} cannot be written (Is a directory); choose another folder"
    said = call_on_ranks(write_on_rank, {"folder": str(place)}, num_ranks=2, log_dir=tmp_path / "logs")
    assert said == [[line, line]] * 2
    assert (place / "rank-2").exists()
