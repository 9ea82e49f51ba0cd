"""What a node says of itself."""

import argparse
import os
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml

from spade_t5 import SpadeT5Config
from spade_t5.checkpoint import list_checkpoints
from spade_t5.errors import ConfigError
from spade_t5.finetune.config import FinetuneConfig
from spade_t5.launch.cli import main
from spade_t5.launch.commands import doctor, pretrain
from spade_t5.launch.config_files import load_run
from spade_t5.launch.doctor import data, machine, software, storage
from spade_t5.launch.doctor.report import gather
from spade_t5.launch.environment import FORWARDED
from spade_t5.pretrain.run import PretrainConfig
from spade_t5.testing import documented
from spade_t5.testing.disks import small_disk

RECIPES = sorted(entry.name.removesuffix(".yaml") for entry in (files("spade_t5") / "configs" / "pretrain").iterdir())


def fails() -> dict[str, Any]:
    raise OSError("the disk\nis away")


def hangs() -> dict[str, Any]:
    time.sleep(60)
    return {}


def test_no_fact_keeps_another_from_being_known() -> None:
    gatherers = {"a": fails, "b": hangs, "c": lambda: {"x": 1, "y": 2}}
    facts, problems = gather(gatherers, patience_seconds=0.05)
    assert facts == {"x": 1, "y": 2}
    assert problems == {"a": "the disk is away", "b": "no answer within 0.05 s"}


def test_variables_that_matter_without_secrets() -> None:
    found = software.variables(
        {
            "NCCL_DEBUG": "INFO",
            "NCCL_SOCKET_IFNAME": "eth0",
            "UCX_TOKEN": "unspeakable-0123",
            "NCCL_CONF_FILE": "http://ann:unspeakable@host/x",
            "OMP_NUM_THREADS": "4",
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "0,1",
            "TORCHELASTIC_RUN_ID": "none",
            "TRITON_CACHE_DIR": "/tmp/cache",
            "SPADE_T5_NODE": "n0",
            "SPADE_T5_BACKEND": "torch",
            "HOME": "/root",
        }
    )
    assert found.keys() == {
        *("NCCL_DEBUG", "UCX_TOKEN", "NCCL_CONF_FILE", "OMP_NUM_THREADS", "HF_HUB_OFFLINE"),
        *("CUDA_VISIBLE_DEVICES", "SPADE_T5_BACKEND"),
    }
    assert "unspeakable" not in str(found)
    assert software.variables(dict.fromkeys((name + "X" for name in FORWARDED), "1")).keys() == {
        name + "X" for name in FORWARDED
    }


def test_the_source_code_has_a_hash_that_follows_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package, elsewhere = tmp_path / "package", tmp_path / "elsewhere"
    package.mkdir()
    elsewhere.mkdir()
    (package / "__init__.py").write_text("")
    (elsewhere / "part.py").write_text("a = 1\n")
    (package / "link").symlink_to(elsewhere)
    monkeypatch.setattr(software.spade_t5, "__file__", str(package / "__init__.py"))
    before = software.source()["source"]
    assert software.source()["source"] == before
    (elsewhere / "part.py").write_text("a = 2\n")
    assert software.source()["source"] != before


def test_limits_and_memory() -> None:
    facts = machine.limits()
    assert 0 < facts["open_files"][0] <= (facts["open_files"][1] or 1 << 60)
    assert facts["threads_in_use"] >= len(os.listdir("/proc/self/task"))
    assert machine.processors()["memory_bytes"] > 1 << 28


def test_a_run_folder(tmp_path: Path) -> None:
    facts = storage.run_folder(tmp_path)
    assert facts["run_semantics"] == []
    assert facts["run_sync_seconds"] > 0
    assert facts["run_bytes_per_second"] > 0
    assert facts["run_file_system"] == storage.file_system(Path("/tmp"))
    assert not list(tmp_path.iterdir())


def test_the_file_system_of_a_mount(tmp_path: Path) -> None:
    with small_disk(tmp_path / "a disk", "1m") as disk:
        assert storage.file_system(disk / "below") == "tmpfs"
        assert storage.run_folder(disk)["run_free_bytes"] <= 1 << 20


def test_the_checkpoints_are_as_large_as_foretold(run: Path, pretrain_words: Callable[..., list[str]]) -> None:
    _, name, *words = pretrain_words(run)
    config = load_run(name, words)
    assert isinstance(config, PretrainConfig)
    facts = data.checkpoints(config)
    newest = list_checkpoints(run / "checkpoints")[-1]
    written = sum(file.stat().st_size for file in newest.glob("*.safetensors"))
    assert facts["checkpoint_bytes"] <= written <= 1.2 * facts["checkpoint_bytes"]  # with headers
    assert facts["checkpoints_held"] == 2


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_checkpoints_of_every_recipe_are_foretold(recipe: str, store: Path, tmp_path: Path) -> None:
    words = [f"data.store={store}", f"run_dir={tmp_path}"]
    if recipe == "c4-long-16k":
        SpadeT5Config.from_preset("tiny", vocab_size=640).save_pretrained(tmp_path / "model")
        words.append(f"model.init_from={tmp_path / 'model'}")
    assert data.checkpoints(load_run(recipe, words))["checkpoint_bytes"] > 10**7


def test_what_a_run_reads(store: Path, pretrain_words: Callable[..., list[str]], tmp_path: Path) -> None:
    _, name, *words = pretrain_words(tmp_path / "run", f"data.staging_dir={tmp_path}")
    config = load_run(name, words)
    facts = data.tokenizer(config) | data.text(config)
    assert facts["tokenizer"] == facts["tokenizer_of_store"]
    assert list(facts["text"]) == [str(store)]
    files = [file for file in store.rglob("*") if file.is_file() and file.name != "manifest.json"]
    assert facts["staging_needed_bytes"] == sum(file.stat().st_size for file in files)
    (store.parent / "none").mkdir(exist_ok=True)
    gone = data.text(load_run(name, [*words, f"data.store={store.parent / 'none'}"]))
    assert str(store.parent / "none") in gone["text"][str(store.parent / "none")]["problem"]


def test_a_run_of_either_kind(tmp_path: Path, exported: Path) -> None:
    words = [f"run_dir={tmp_path / 'run'}", f"model.init_from={exported}"]
    config = load_run("pydocs-topic", words)
    assert isinstance(config, FinetuneConfig)
    assert data.tokenizer(config).keys() == {"tokenizer"}
    assert data.text(config) == {}
    assert data.checkpoints(config)["checkpoint_bytes"] > 0
    file = tmp_path / "task.yaml"
    file.write_text(yaml.safe_dump({"task": {"name": "pydocs-topic"}, "training": {"steps": 1}}))
    with pytest.raises(ConfigError, match="training"):
        load_run(str(file), words)
    with pytest.raises(ConfigError, match="no shipped recipe"):
        load_run("absent", [])


def test_one_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    table = capsys.readouterr().out
    assert os.uname().nodename in table.splitlines()[0]
    assert table.endswith("nothing was found\n")
    assert main(["doctor", "--min-open-files", str(1 << 40)]) == doctor.EXIT_FOUND
    assert ": open files: a process may have " in capsys.readouterr().out
    assert main(["doctor", "absent"]) == 2
    with pytest.raises(SystemExit, match="2"):
        main(["doctor", "--min-open-files", "0"])


@pytest.mark.parametrize(
    "words",
    [
        ["c4-t5-base", "--cluster", "8-gpus", "training.loader_workers=3"],
        ["c4-base", "--deepspeed-config", "ds.json"],
        ["c4-base", "--accelerate-config", "accelerate.yaml", "--deepspeed-config", "ds.json", "--cluster", "8-nodes"],
    ],
)
def test_a_run_is_described_as_it_is_to_pretrain(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("ds.json").write_text('{"gradient_clipping": 0.625}')
    Path("accelerate.yaml").write_text("{distributed_type: MULTI_GPU, num_processes: 2}")
    found = []
    for command in (doctor, pretrain):
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        found.append(command.read_config(parser.parse_intermixed_args(words)))
    assert found[0] == found[1]
    assert found[0] != load_run(words[0], [])


def test_a_cluster_says_nothing_of_fine_tuning() -> None:
    with pytest.raises(ConfigError) as caught:
        load_run("pydocs-topic", [], cluster="8-gpus")
    documented(str(caught.value))
