from importlib.resources import files
from pathlib import Path

import pytest

from spade_t5.config import apply_overrides, from_mapping, read_yaml, to_mapping
from spade_t5.errors import ConfigError
from spade_t5.finetune.config import FinetuneConfig

RECIPES = sorted(Path(str(files("spade_t5") / "configs" / "finetune")).glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_a_valid_run(recipe: Path) -> None:
    config = from_mapping(FinetuneConfig, read_yaml(recipe))
    task = config.task.build()
    assert config.mode == "text-to-text" or task.num_outputs
    assert from_mapping(FinetuneConfig, to_mapping(config)) == config
    limits = (config.rows.max_source_tokens, config.rows.max_target_tokens, config.rows.row_tokens)
    assert all(limit is None or limit >= 2 for limit in limits)


def test_the_overrides_that_the_recipes_name_work() -> None:
    scratch, pretrained = (RECIPES[0].with_name(f"{name}.yaml") for name in ("sst2-text", "pydocs-topic"))
    words = [
        "task.source.name=folder",
        "task.source.path=GLUE",
        "model.preset=null",
        "model.init_from=runs/a",
        "tokenizer=null",
    ]
    config = from_mapping(FinetuneConfig, apply_overrides(read_yaml(scratch), words))
    assert config.task.source.path == Path("GLUE")
    assert config.model["init_from"] == "runs/a"
    words = ["model.init_from=null", "model.preset=tiny", "tokenizer=runs/tokenizer"]
    assert from_mapping(FinetuneConfig, apply_overrides(read_yaml(pretrained), words)).model["preset"] == "tiny"


def test_token_losses_belong_to_text_to_text() -> None:
    encoder = read_yaml(RECIPES[0].with_name("sst2-encoder.yaml"))
    with pytest.raises(ConfigError, match=r"loss: z_loss and label_smoothing belong to mode text-to-text"):
        from_mapping(FinetuneConfig, apply_overrides(encoder, ["loss.z_loss=1e-4"]))
