"""Cost of SPADE-T5's encoder as rows get longer: time per token and peak memory, forward and backward, one row, float32.

    spade-t5 bench encoder [--out docs/results] [--rounds 7] [--quick]

Both should be flat per token: nothing in the encoder is quadratic in the length. Lengths take turns within a round.
Peak memory is the growth of the resident set over its size before the step, each length in a process of its own. Set
OMP_NUM_THREADS to choose the threads.
"""

import argparse
import gc
import multiprocessing
import time
from pathlib import Path
from typing import Any

import torch

from spade_t5 import SpadeT5Config, SpadeT5EncoderModel
from spade_t5.benchmarks import report, script
from spade_t5.benchmarks.resident_memory import resident_bytes
from spade_t5.training.host_memory import keep_freed_memory

LENGTHS = (2048, 4096, 8192, 16384)
GOAL_RATIO = 1.3


def build_encoder(preset: str) -> SpadeT5EncoderModel:
    """Encoder of a preset, dropout off."""
    return SpadeT5EncoderModel(SpadeT5Config.from_preset(preset, dropout_rate=0.0)).train()


def timed_step(encoder: SpadeT5EncoderModel, length: int) -> float:
    """Seconds of one forward and backward pass over `length` random tokens."""
    input_ids = torch.randint(3, 32000, (1, length), generator=torch.Generator().manual_seed(0))
    encoder.zero_grad(set_to_none=True)
    gc.collect()
    start = time.perf_counter()
    encoder(input_ids).last_hidden_state.square().mean().backward()
    return time.perf_counter() - start


def time_lengths(preset: str, lengths: tuple[int, ...], rounds: int) -> list[dict[str, Any]]:
    """Interleaved rounds over the lengths, after one to warm up."""
    encoder = build_encoder(preset)
    seconds: dict[int, list[float]] = {length: [] for length in lengths}
    for round_number in range(rounds + 1):
        for length in lengths:
            elapsed = timed_step(encoder, length)
            if round_number > 0:
                seconds[length].append(elapsed)
    rows: list[dict[str, Any]] = [{"length": length, **report.summary(seconds[length])} for length in lengths]
    for row in rows:
        row["microseconds_per_token"] = 1e6 * row["median_seconds"] / row["length"]
    return rows


def peak_bytes(preset: str, length: int) -> int:
    """Growth of the resident set during one step, measured in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_bytes_here, (preset, length, torch.get_num_threads()))


def _peak_bytes_here(preset: str, length: int, threads: int) -> int:
    torch.set_num_threads(threads)
    encoder = build_encoder(preset)
    timed_step(encoder, 64)
    before_bytes = resident_bytes()
    timed_step(encoder, length)
    return resident_bytes(peak=True) - before_bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the benchmark."""
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="folder of encoder.json")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps at each length")
    parser.add_argument("--preset", default="small", help="SPADE-T5 preset")
    parser.add_argument("--quick", action="store_true", help="two short lengths, 2 rounds: to see that it runs")


def run(options: argparse.Namespace) -> None:
    """Run the benchmark, print a table, write encoder.json."""
    keep_freed_memory()  # as the training engine does on a CPU
    lengths = (512, 1024) if options.quick else LENGTHS
    rows = time_lengths(options.preset, lengths, 2 if options.quick else options.rounds)
    for row in rows:
        row["peak_bytes"] = peak_bytes(options.preset, row["length"])
        row["peak_bytes_per_token"] = row["peak_bytes"] / row["length"]
        print(
            f"{row['length']:6} tokens  {row['median_seconds']:8.3f} s  {row['microseconds_per_token']:7.1f} us/token"
            f"  peak {row['peak_bytes'] / 2**20:7.0f} MiB  {row['peak_bytes_per_token'] / 2**10:6.1f} KiB/token"
        )
    first, last = rows[0], rows[-1]
    ratio = last["microseconds_per_token"] / first["microseconds_per_token"]
    print(f"time per token, {last['length']} against {first['length']}: {ratio:.2f}x (goal at most {GOAL_RATIO}x)")
    results = {
        "preset": options.preset,
        "dtype": "float32",
        "batch_rows": 1,
        "lengths": rows,
        "time_per_token_ratio": ratio,
        "peak_bytes_per_token_ratio": last["peak_bytes_per_token"] / first["peak_bytes_per_token"],
    }
    print(report.write("encoder", results, options.out))


if __name__ == "__main__":
    script.run(__doc__, add_arguments, run)
