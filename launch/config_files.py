"""From the words of a command line to a config: YAML files, shipped recipes, and `key=value` settings over them."""

import argparse
import dataclasses
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from spade_t5.config import ConfigDict, apply_overrides, from_mapping, merge, read_yaml
from spade_t5.errors import ConfigError
from spade_t5.launch.accelerate_config import read_accelerate_config
from spade_t5.launch.deepspeed_config import read_deepspeed_config
from spade_t5.training.run_folder import Resume

T = TypeVar("T")


def add_recipe_arguments(
    parser: argparse.ArgumentParser, *, kind: str, example: str, is_optional: bool = False
) -> None:
    """The arguments that describe a run: a recipe, and what is put over it.

    Args:
        parser: gets them.
        kind: "pretrain", "finetune", or "*" for either; runs of pretraining may name a cluster.
        example: a setting.
        is_optional: whether the command may be given no run.
    """
    recipe = f"YAML file, or the name of a shipped recipe (configs/{kind})"
    if is_optional:
        parser.add_argument("config", nargs="?", help=f"{recipe}; default none")
    else:
        parser.add_argument("config", help=recipe)
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help=f"settings put over the file, such as {example}"
    )
    if kind != "finetune":
        parser.add_argument(
            "--cluster",
            metavar="NAME",
            help=f"put over the recipe what suits these machines and the size of the model: {', '.join(known_clusters())}, or a YAML file",
        )
    parser.add_argument(
        "--deepspeed-config",
        type=Path,
        metavar="FILE",
        help="DeepSpeed's own JSON file, whose settings are put over the recipe and below key=value",
    )
    parser.add_argument(
        "--accelerate-config", type=Path, metavar="FILE", help="likewise the file that `accelerate config` writes"
    )


def foreign_settings(arguments: argparse.Namespace) -> ConfigDict:
    """What files of other programs say, by the arguments of `add_recipe_arguments`.

    Raises:
        ConfigError: a file cannot be taken over.
    """
    settings: ConfigDict = {}
    if arguments.accelerate_config is not None:
        settings = read_accelerate_config(arguments.accelerate_config).settings
    if arguments.deepspeed_config is not None:
        settings = merge(settings, read_deepspeed_config(arguments.deepspeed_config))
    return settings


def add_run_arguments(parser: argparse.ArgumentParser, *, kind: str, example: str) -> None:
    """The arguments that start or resume a run: those that describe it, and where to go on."""
    add_recipe_arguments(parser, kind=kind, example=example)
    parser.add_argument(
        "--resume",
        default="auto",
        help="auto (default): go on from the newest good checkpoint in run_dir; none: start anew; or the path of a checkpoint or run folder",
    )
    parser.add_argument(
        "--allow-change",
        action="append",
        default=[],
        metavar="KEY",
        help="a setting that may differ from the checkpoint's and changes what is learned from there on, such as training.clip_norm; repeatable",
    )
    parser.add_argument(
        "--strict-env",
        action="store_true",
        help="refuse to go on with other versions of libraries or of this package than the checkpoint was made with",
    )


def resume_of(arguments: argparse.Namespace) -> Resume:
    """What the arguments of `add_run_arguments` say about going on."""
    return Resume(point=arguments.resume, allow_changes=tuple(arguments.allow_change), strict_env=arguments.strict_env)


def load_recipe(
    cls: type[T],
    name: str,
    words: list[str],
    *,
    kind: str,
    foreign: ConfigDict | None = None,
    cluster: str | None = None,
) -> T:
    """The config in file `name`, with `key=value` words put over it.

    Args:
        cls: dataclass of the whole config.
        name: path of a YAML file, or name of a shipped recipe of this kind such as `sst2-text`.
        words: overrides of the command line.
        kind: folder of the shipped recipes, "pretrain" or "finetune".
        foreign: settings put over the file and below the words.
        cluster: machines whose settings lie between the file and those.

    Raises:
        ConfigError: the file is missing, or its content is wrong.
    """
    recipe = _read(name, kind)
    config = from_mapping(cls, apply_overrides(merge(recipe, foreign or {}), words))
    if cluster is None:
        return config
    # What other commands need not import.
    from spade_t5.launch.clusters import settings_on
    from spade_t5.pretrain.run import PretrainConfig

    assert isinstance(config, PretrainConfig), "clusters know pretraining"
    below = merge(merge(recipe, settings_on(cluster, config)), foreign or {})
    return from_mapping(cls, apply_overrides(below, words))


def known_clusters() -> list[str]:
    """Names of the shipped files that `--cluster` takes."""
    return sorted(entry.name.removesuffix(".yaml") for entry in (files("spade_t5") / "configs" / "cluster").iterdir())


def load_run(name: str, words: list[str], *, foreign: ConfigDict | None = None, cluster: str | None = None) -> Any:
    """The config of a run of either kind: a FinetuneConfig where the file has a task, or the shipped recipe is one of fine-tuning, else a PretrainConfig.

    Raises:
        ConfigError: as `load_recipe`, or a run of fine-tuning is given a cluster.
    """
    is_shipped = not Path(name).is_file()
    is_task = (
        _shipped("finetune", name).is_file() if is_shipped else "task" in apply_overrides(read_yaml(Path(name)), words)
    )
    kind = "finetune" if is_task else "pretrain"
    # Either imports all that such a run does.
    if kind == "finetune":
        if cluster is not None:
            raise ConfigError("--cluster: clusters know pretraining, and this is a run of fine-tuning; leave it out")
        from spade_t5.finetune.config import FinetuneConfig

        return load_recipe(FinetuneConfig, name, words, kind=kind, foreign=foreign)
    from spade_t5.pretrain.run import PretrainConfig

    return load_recipe(PretrainConfig, name, words, kind=kind, foreign=foreign, cluster=cluster)


def add_settings(parser: argparse.ArgumentParser, cls: type) -> None:
    """The argument of a command whose whole input is one config: an optional YAML file, then `key=value` words."""
    names = ", ".join(field.name for field in dataclasses.fields(cls))
    parser.add_argument(
        "settings", nargs="*", metavar="CONFIG.yaml | key=value", help=f"a YAML file, and settings put over it: {names}"
    )


def load_settings(cls: type[T], words: list[str], **flags: bool) -> T:
    """The config that the words of `add_settings` describe; flags that were given on the command line are put over it.

    Raises:
        ConfigError: a file is missing, or a value is wrong.
    """
    mapping: ConfigDict = {}
    for word in words:
        mapping = apply_overrides(mapping, [word]) if "=" in word else merge(mapping, read_yaml(Path(word)))
    return from_mapping(cls, {**mapping, **{name: True for name, is_given in flags.items() if is_given}})


def positive_int(text: str) -> int:
    """A whole number of at least 1, as a type of command-line options."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value


def _read(name: str, kind: str) -> ConfigDict:
    path = Path(name)
    if not path.is_file() and "/" not in name:
        recipe = _shipped(kind, name)
        if not recipe.is_file():
            known = ", ".join(sorted(entry.stem for entry in recipe.parent.iterdir()))
            raise ConfigError(f"config file {name}: not found, and no shipped recipe has this name; recipes: {known}")
        path = recipe
    return read_yaml(path)


def _shipped(kind: str, name: str) -> Path:
    """Where a shipped recipe of this name would be."""
    return Path(str(files("spade_t5") / "configs" / kind)) / f"{Path(name).name.removesuffix('.yaml')}.yaml"
