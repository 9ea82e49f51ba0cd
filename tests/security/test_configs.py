"""Ten thousand broken configs: each is a config or one line that says why it is none."""

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from spade_t5.config import apply_overrides, from_mapping, read_yaml
from spade_t5.configuration import SpadeT5Config
from spade_t5.errors import ConfigError
from spade_t5.finetune.config import FinetuneConfig
from spade_t5.messages import MAX_MESSAGE_BYTES
from spade_t5.pretrain.prepare import PrepareConfig
from spade_t5.pretrain.run import PretrainConfig
from spade_t5.pretrain.tokenizer import TokenizerConfig
from spade_t5.testing import documented

TREES: list[tuple[type, dict[str, Any]]] = [
    (
        PretrainConfig,
        {
            "run_dir": "runs/a",
            "model": {"preset": "tiny", "d_model": 64, "global_layers": [0]},
            "data": {"store": "store"},
            "objective": {"noise_density": 0.15, "inputs_length": 512},
            "training": {
                "steps": 10,
                "global_batch_rows": 4,
                "micro_batch_rows": 2,
                "optimizer": {"name": "adamw", "learning_rate": "1e-3"},
                "deepspeed": {"zero_stage": 2},
            },
        },
    ),
    (
        FinetuneConfig,
        {
            "run_dir": "runs/b",
            "task": {
                "name": "text-classification",
                "labels": ["yes", "no"],
                "source": {"name": "files", "train": "rows.jsonl"},
            },
            "model": {"init_from": "model"},
            "training": {"steps": 1, "global_batch_rows": 1, "micro_batch_rows": 1},
            "epochs": 1.5,
        },
    ),
    (
        PrepareConfig,
        {
            "corpus": {"name": "files", "paths": ["a.jsonl"], "max_line_bytes": 100},
            "tokenizer": "t",
            "out": "o",
            "bad_rows": {"share": 0.1},
            "held_out_fraction": 0.01,
        },
    ),
    (TokenizerConfig, {"corpus": {"name": "pydocs", "packages": ["json"]}, "out": "o", "vocab_size": 300}),
]
VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    2**63,
    10**400,
    -(10**5000),
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x" * 5000,
    "a\nb\x1b[2J",
    "\0",
    "\ud800",
    b"bytes",
    [],
    [[[]]],
    {},
    {"name": []},
    {"name": {}},
    {1: 2},
    {None: None},
    {(1, 2): 3},
    {"a": {"b": [float("nan")]}},
    {"x" * 300: 1},
    {1, 2},
    (1, 2),
    object,
]
PIECES = [
    "*a",
    "&a ",
    "!!python/object:a.B {}",
    "!!binary '='",
    "!!bool maybe",
    "!!int ''",
    "!!timestamp x",
    "2020-13-45",
    "!!set {a}",
    "!!float 1:2:x",
    "<<: *a",
    "? [1]: 2",
    "{",
    "[",
    "- ",
    "\t",
    "\x00",
    "\ufeff",
    "'",
    '"\\ud800"',
    "0x" + "f" * 4000,
    "9" * 5000,
    "%YAML 9.9\n---\n",
    "\n---\n",
    ".nan",
    "-.inf",
    "defaults: [x]",
    "defaults: 3\n",
    "~: 1\n",
    "name: [1]\n",
]


def ends_well(act: Any) -> bool:
    """Whether an act succeeds; if not, its refusal must be fit to be shown."""
    try:
        act()
    except ConfigError as error:
        text = str(error)
        assert len(text) < 2 * MAX_MESSAGE_BYTES
        text.encode()
        return False
    return True


def changed_tree(tree: dict[str, Any], random_: random.Random) -> dict[str, Any]:
    """A tree with one or two values, keys or places that it should not have."""
    tree = copy.deepcopy(tree)
    for _ in range(random_.randint(1, 2)):
        node: Any = tree
        while True:
            key = random_.choice(list(node) if isinstance(node, dict) else range(len(node)))
            inner = node[key]
            if not isinstance(inner, (dict, list)) or not inner or random_.random() < 0.3:
                break
            node = inner
        kind = random_.randrange(4)
        if kind == 0 and isinstance(node, dict):
            del node[key]
        elif kind == 1 and isinstance(node, dict):
            other = random_.choice([value for value in VALUES if getattr(value, "__hash__", None)])
            node[f"{key}s" if random_.random() < 0.5 else other] = node[key]
        else:
            node[key] = copy.deepcopy(random_.choice(VALUES))
        if not tree:
            break
    return tree


def test_six_thousand_trees() -> None:
    random_ = random.Random(0)
    good = 0
    for i in range(6000):
        cls, tree = TREES[i % len(TREES)]
        changed = changed_tree(tree, random_)
        good += ends_well(lambda cls=cls, changed=changed: from_mapping(cls, changed))
    assert 100 < good < 5000


def changed_text(text: str, random_: random.Random) -> str:
    """A text with a few characters or pieces changed, added, doubled or gone."""
    for _ in range(random_.randint(1, 3)):
        start = random_.randrange(len(text) + 1)
        stop = min(len(text), start + random_.choice((0, 1, 3, 20)))
        middle = random_.choice(
            ("", text[start:stop] * 2, random_.choice(PIECES), chr(random_.choice((10, 32, 58, 91, 123, 0x85, 0x2028))))
        )
        text = text[:start] + middle + text[stop:]
    return text


def test_four_thousand_files(tmp_path: Path) -> None:
    random_ = random.Random(1)
    texts = [(cls, yaml.safe_dump(tree)) for cls, tree in TREES[2:]]
    texts += [(cls, json.dumps(tree)) for cls, tree in TREES[2:]]
    path = tmp_path / "config.yaml"
    good = 0
    for i in range(4000):
        cls, text = texts[i % len(texts)]
        path.write_bytes(changed_text(text, random_).encode("utf-8", "surrogatepass"))
        good += ends_well(lambda cls=cls: from_mapping(cls, read_yaml(path)))
    assert 50 < good < 3500


def test_models_of_configs_and_of_others() -> None:
    random_ = random.Random(2)
    saved = SpadeT5Config.from_preset("tiny").to_dict()
    good = 0
    for _ in range(1500):
        values = dict(saved)
        for _ in range(random_.randint(1, 2)):
            values[random_.choice([*saved, "num_labels", "auto_map", "x"])] = copy.deepcopy(random_.choice(VALUES))
        good += ends_well(lambda values=values: SpadeT5Config.from_saved(values))
    assert good > 20


def bombs() -> Iterator[tuple[str, str]]:
    yield "deep", "[" * 20_000
    yield "deep mapping", "{a: " * 5000
    yield "deep block", "".join(" " * i + "a:\n" for i in range(2000))
    yield "levels", "a: " + "[" * 40 + "]" * 40
    yield "laughs", "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}' if i else 'x'] * 10)}]\n" for i in range(12))
    yield "merges", "".join(f"a{i}: &a{i} {{b: [{', '.join([f'*a{i - 1}' if i else 'x'] * 10)}]}}\n" for i in range(12))
    yield "circle", "a: &a [*a]"
    yield "circle of mappings", "a: &a {b: *a}"
    yield "size", "a: " + "x" * 2**18
    yield "integer", "a: " + "9" * 5000


@pytest.mark.parametrize(("name", "text"), [pytest.param(*bomb, id=bomb[0]) for bomb in bombs()])
def test_bombs(name: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_yaml(path)
    assert str(path) in str(caught.value)
    documented(str(caught.value))
    if len(text) < 100_000:
        with pytest.raises(ConfigError):
            apply_overrides({}, [f"a={text}"])


def test_files_that_name_themselves(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("defaults: [b.yaml]")
    (tmp_path / "b.yaml").write_text("defaults: [x/a.yaml]")
    (tmp_path / "x").symlink_to(tmp_path)
    with pytest.raises(ConfigError, match="names itself") as caught:
        read_yaml(tmp_path / "a.yaml")
    documented(str(caught.value))
    for value in ("3", "[3]", "{a: b}", "text"):
        (tmp_path / "a.yaml").write_text(f"defaults: {value}")
        with pytest.raises(ConfigError, match="is not a list of file names") as caught:
            read_yaml(tmp_path / "a.yaml")
        documented(str(caught.value))


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("trainin.steps=1", "trainin: unknown config key; did you mean 'training'?"),
        ("training.stepz=1", "training.stepz: unknown config key; did you mean 'training.steps'?"),
        ("training.steps=.nan", "training.steps: nan is not a finite number"),
        ("training.optimizer.learning_rate=.inf", "training.optimizer.learning_rate: inf is not a finite number"),
        ("training.steps=0x" + "f" * 5000, "training.steps: an integer of 20000 bits is too large"),
        ("model={1: 2}", "model: its key 1 is a int, expected a name"),
        ('run_dir="a\\0b"', "run_dir: 'a\\x00b' holds a character that no file can hold"),
        (".".join("a" * 100) + "=1", "has 100 keys within each other"),
        ("training.steps=!!python/object:os.system {}", "is not a YAML value"),
    ],
)
def test_what_is_said_of_a_setting(word: str, expected: str) -> None:
    cls, tree = TREES[0]
    with pytest.raises(ConfigError) as caught:
        from_mapping(cls, apply_overrides(tree, [word]))
    assert expected in str(caught.value)
    documented(str(caught.value))
