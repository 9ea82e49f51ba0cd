"""What every benchmark records beside its numbers, and the form in which it is kept: one JSON file a run."""

import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
from pathlib import Path
from typing import Any

import torch
import transformers


def circumstances() -> dict[str, Any]:
    """Machine, its load (of this run and of others), versions, threads and date."""
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": _processor_name(),
        "threads": torch.get_num_threads(),
        "load_average_at_end": os.getloadavg(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "triton": importlib.metadata.version("triton") if importlib.util.find_spec("triton") else None,
    }
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return found


def summary(seconds: list[float]) -> dict[str, Any]:
    """Median and spread of repeated times, and the times themselves in their order."""
    return {
        "median_seconds": statistics.median(seconds),
        "min_seconds": min(seconds),
        "max_seconds": max(seconds),
        "seconds": seconds,
    }


def write(name: str, results: dict[str, Any], out_dir: Path) -> Path:
    """Write `results` with the circumstances as OUT_DIR/name.json.

    Returns:
        the path of the file.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    path = out_dir / f"{name}.json"
    partial = out_dir / f".{name}.json.tmp"
    partial.write_text(json.dumps({"benchmark": name, "circumstances": circumstances(), **results}, indent=1) + "\n")
    partial.replace(path)  # a run that is ended here leaves the file it wrote before
    return path


def _processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
