"""Runs that branch off a trunk, as docs/recipes.md tells it: each repeats the trunk bit for bit up to its decay, and trunk and branches go on."""

from collections.abc import Callable
from pathlib import Path

import pytest

from spade_t5.launch.cli import main
from spade_t5.testing.runs import StepFacts, lineage

Words = Callable[..., list[str]]
WSD = "{name: wsd, warmup_steps: 2}"


def without_rate(steps: dict[int, StepFacts]) -> dict[int, StepFacts]:
    return {step: facts._replace(lr="") for step, facts in steps.items()}


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory, pretrain_words: Words) -> Path:
    """Eight steps at the peak rate, with a checkpoint every second one."""
    run_dir = tmp_path_factory.mktemp("trunk") / "run"
    saving = ["training.save_every_steps=2", "training.keep_checkpoints=9", "training.ema_decay=0.9"]
    assert main(pretrain_words(run_dir, f"training.schedule={WSD}", "training.steps=8", *saving)) == 0
    return run_dir


def branch(pretrain_words: Words, trunk: Path, run_dir: Path, step: int, steps: int, decay_steps: int) -> list[str]:
    settings = [f"training.schedule={WSD}", f"training.schedule.decay_steps={decay_steps}", f"training.steps={steps}"]
    words = pretrain_words(run_dir, "training.ema_decay=0.9", "training.save_every_steps=2", *settings)
    changes = ["--allow-change", "training.steps", "--allow-change", "training.schedule"]
    return [*words, "--resume", str(trunk / "checkpoints" / f"step-{step:08d}"), *changes]


def test_branches_equal_the_trunk_until_they_decay(trunk: Path, tmp_path: Path, pretrain_words: Words) -> None:
    expected = lineage(trunk)
    # from step 2 with two steady steps before the decay, and from step 6 with the decay at once
    early, late = tmp_path / "early", tmp_path / "late"
    for run_dir, step, steps, decay_steps in ((early, 2, 7, 3), (late, 6, 9, 3)):
        words = branch(pretrain_words, trunk, run_dir, step, steps, decay_steps)
        assert main(words) == 0
        assert main(words) == 0  # the same command goes on in the branch, which is finished
        found = lineage(run_dir)
        assert list(found) == list(range(step + 1, steps + 1))
        steady = {number: facts for number, facts in found.items() if number <= steps - decay_steps}
        assert steady == {number: expected[number] for number in steady}
        rates = [float.fromhex(facts.lr) for facts in found.values()][-decay_steps - 1 :]
        assert rates == sorted(rates, reverse=True)
        assert rates[-1] == 0
        # the first step of the decay has the loss of the trunk's: only then do the weights differ
        first = steps - decay_steps + 1
        assert without_rate({first: found[first]}) == without_rate({first: expected[first]})


def test_a_branch_is_asked_for(
    trunk: Path, tmp_path: Path, pretrain_words: Words, capsys: pytest.CaptureFixture[str]
) -> None:
    words = branch(pretrain_words, trunk, tmp_path / "run", 2, 7, 3)
    assert main(words[: words.index("--allow-change")]) == 2
    message = capsys.readouterr().err
    assert "add --allow-change training.schedule.decay_steps --allow-change training.steps" in message
    assert not (tmp_path / "run").exists()


def test_a_branch_whose_decay_would_be_in_the_past_is_refused(
    trunk: Path, tmp_path: Path, pretrain_words: Words, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(branch(pretrain_words, trunk, tmp_path / "run", 6, 8, 6)) == 2
    assert "would have begun behind step 2, and the checkpoint is of step 6" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_trunk_grows_without_a_word(trunk: Path, pretrain_words: Words) -> None:
    words = pretrain_words(trunk, f"training.schedule={WSD}", "training.ema_decay=0.9", "training.save_every_steps=2")
    assert main([*words, "training.steps=10"]) == 0
    assert list(lineage(trunk)) == list(range(1, 11))
