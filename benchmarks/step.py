"""Training step of SPADE-T5 against Hugging Face's T5 and LongT5 of the same size: forward and backward, one row, float32.

    spade-t5 bench step [--out docs/results] [--rounds 7] [--compare hf-t5,hf-longt5] [--quick]

The models take turns within a round, so that what disturbs the machine disturbs them alike; medians over rounds are
compared. Processor time is recorded too: on a machine that others use, one thread's (OMP_NUM_THREADS=1) is the steadier
measure. Dropout is 0, as in T5 1.1's pretraining. Tokens are random: no part of a step depends on their values.
"""

import argparse
import gc
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LongT5Config, LongT5ForConditionalGeneration, T5Config, T5ForConditionalGeneration

from spade_t5 import SpadeT5Config, SpadeT5ForConditionalGeneration
from spade_t5.benchmarks import report, script
from spade_t5.errors import ConfigError

# Inputs and the targets that go with them in span corruption at density 0.15 and mean span length 3.
SHAPES = {512: 114, 4096: 910}
PEERS = ("hf-t5", "hf-longt5")
GOALS = {("hf-t5", 4096): 2.5, ("hf-longt5", 4096): 1.3, ("hf-t5", 512): 0.9}


def build_models(preset: str) -> dict[str, torch.nn.Module]:
    """SPADE-T5 of a preset, and its two peers with the same widths, depths and vocabulary."""
    config = SpadeT5Config.from_preset(preset, dropout_rate=0.0)
    names = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_decoder_layers", "num_heads")
    sizes = {name: getattr(config, name) for name in names} | {
        "feed_forward_proj": "gated-gelu",
        "dropout_rate": 0.0,
        "tie_word_embeddings": False,
        "decoder_start_token_id": 0,
    }
    t5 = T5Config(**sizes)
    t5._attn_implementation = "sdpa"
    longt5 = LongT5Config(**sizes, encoder_attention_type="local", local_radius=config.local_radius)
    models = {
        "spade-t5": SpadeT5ForConditionalGeneration(config),
        "hf-t5": T5ForConditionalGeneration(t5),
        "hf-longt5": LongT5ForConditionalGeneration(longt5),
    }
    return {name: model.train() for name, model in models.items()}


def timed_step(model: torch.nn.Module, input_ids: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """Seconds of one forward and backward pass: by the clock, and of the processor (all threads together)."""
    model.zero_grad(set_to_none=True)
    gc.collect()
    start, cpu_start = time.perf_counter(), time.process_time()
    model(input_ids=input_ids, labels=labels, use_cache=False).loss.backward()
    return time.perf_counter() - start, time.process_time() - cpu_start


def compare(models: dict[str, torch.nn.Module], input_tokens: int, target_tokens: int, rounds: int) -> dict[str, Any]:
    """Interleaved rounds at one shape: times of each model and how many times faster SPADE-T5 is."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(3, 32000, (1, input_tokens), generator=generator)
    labels = torch.randint(3, 32000, (1, target_tokens), generator=generator)
    steps: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for round_number in range(rounds + 1):
        for name, model in models.items():
            elapsed = timed_step(model, input_ids, labels)
            if round_number > 0:
                steps[name].append(elapsed)
    times: dict[str, dict[str, Any]] = {}
    for name, pairs in steps.items():
        times[name] = report.summary([seconds for seconds, _ in pairs])
        times[name]["median_cpu_seconds"] = statistics.median(cpu_seconds for _, cpu_seconds in pairs)
        times[name]["input_tokens_per_second"] = input_tokens / times[name]["median_seconds"]
    results: dict[str, Any] = {"input_tokens": input_tokens, "target_tokens": target_tokens, "models": times}
    for measure, key in (("speedup_over", "median_seconds"), ("cpu_speedup_over", "median_cpu_seconds")):
        own = times["spade-t5"][key]
        results[measure] = {name: times[name][key] / own for name in models if name != "spade-t5"}
    return results


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the benchmark."""
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="folder of step.json")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each model at each shape")
    parser.add_argument("--preset", default="small", help="SPADE-T5 preset; the peers take its sizes")
    parser.add_argument(
        "--compare",
        type=lambda words: words.split(","),
        default=list(PEERS),
        help=f"peers, with commas between them (default: {','.join(PEERS)})",
    )
    parser.add_argument("--quick", action="store_true", help="512 tokens only, 2 rounds: to see that it runs")


def run(options: argparse.Namespace) -> None:
    """Run the benchmark, print a table, write step.json."""
    unknown = set(options.compare) - set(PEERS)
    if unknown:
        raise ConfigError(f"--compare: {', '.join(sorted(unknown))} is unknown; use some of {','.join(PEERS)}")
    models = {
        name: model
        for name, model in build_models(options.preset).items()
        if name not in set(PEERS) - set(options.compare)
    }
    shapes = {512: SHAPES[512]} if options.quick else SHAPES
    rounds = 2 if options.quick else options.rounds
    comparisons = [compare(models, *shape, rounds) for shape in shapes.items()]
    for comparison in comparisons:
        for name, times in comparison["models"].items():
            speedup = comparison["speedup_over"].get(name)
            goal = GOALS.get((name, comparison["input_tokens"]))
            verdict = "" if speedup is None else f"   SPADE-T5 is {speedup:.2f}x as fast"
            verdict += "" if goal is None else f" (goal {goal}x)"
            print(
                f"{comparison['input_tokens']:6} tokens  {name:10} {times['median_seconds']:8.3f} s"
                f" ({times['median_cpu_seconds']:.3f} s of processor time){verdict}"
            )
    results = {
        "preset": options.preset,
        "dtype": "float32",
        "batch_rows": 1,
        "attention": {name: getattr(model.config, "_attn_implementation", None) for name, model in models.items()},
        "parameters": {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()},
        "comparisons": comparisons,
    }
    print(report.write("step", results, options.out))


if __name__ == "__main__":
    script.run(__doc__, add_arguments, run)
