"""The short examples: each runs, fits on a few screens, needs no other file, and is right."""

import ast
from pathlib import Path

import char_rnn
import jax
import linen_rnn
import matplotlib.pyplot as plt
import monitoring
import numpy as np
import orbax.checkpoint as ocp
import pytest
import quickstart
import rollback
from flax import nnx

EXAMPLES = Path(__file__).parents[2] / "examples"
HERE = [quickstart, char_rnn, linen_rnn, monitoring, rollback]
NAMES = [*(example.__name__ for example in HERE), "agc_resnet", "dp_sgd", "fsdp_transformer"]
every_example = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch, standard_promotion):
    monkeypatch.chdir(tmp_path)
    yield
    plt.close("all")


@pytest.mark.parametrize("example", HERE, ids=lambda example: example.__name__)
def test_it_runs_and_ends_with_a_sentence(example, tmp_path, capsys):
    example.main(3)
    assert capsys.readouterr().out.rstrip().endswith(".")
    assert (tmp_path / f"{example.__name__}.png").exists() == (example is not quickstart)


@every_example
def test_it_is_short_and_says_how_to_run_it(name):
    text = (EXAMPLES / f"{name}.py").read_text()
    assert len(text.splitlines()) <= (60 if name == "quickstart" else 150)
    first, *rest = (ast.get_docstring(ast.parse(text)) or "").splitlines()
    assert first.endswith(".")
    assert next(line.strip() for line in rest if line) == f"python examples/{name}.py"
    assert '("--steps", type=int' in text


@every_example
def test_it_imports_nothing_from_the_repository_but_the_package(name):
    ours = {path.stem for path in EXAMPLES.iterdir()}
    imported = set()
    for node in ast.walk(ast.parse((EXAMPLES / f"{name}.py").read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add((node.module or "").split(".")[0])
    assert "gradclip_jax" in imported
    assert not imported & ours


@every_example
def test_the_page_of_examples_has_a_row_with_its_length(name):
    page = (EXAMPLES.parent / "docs" / "examples.md").read_text()
    lines = len((EXAMPLES / f"{name}.py").read_text().splitlines())
    assert f"\n| `examples/{name}.py` | {lines} | " in page


def test_the_quickstart_fits_its_line_and_clips_only_at_the_start(capsys):
    assert quickstart.main() < 0.01
    first, *_, last, _ = capsys.readouterr().out.splitlines()
    assert first.endswith("clipped 1 times")
    assert 1 < int(last.split()[-2]) < quickstart.STEPS / 2


@pytest.mark.parametrize("example", [char_rnn, linen_rnn], ids=["nnx", "linen"])
def test_the_lstm_trains_with_the_clip_and_is_worse_than_chance_without(example):
    clipped, unclipped = example.main(25)
    assert clipped < np.log2(len(example.VOCABULARY)) < unclipped / 2


def test_the_monitor_finds_both_faults_and_its_limit_trains_better(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(monitoring, "NAN_BATCH", 220)
    too_low, suggested = monitoring.main(250)
    assert suggested < too_low / 2
    faulty, cured = capsys.readouterr().out.split("max_norm=")
    assert faulty.count("[limit_too_low]") == faulty.count("[nonfinite]") == 1
    assert "[limit_too_low]" not in cured
    assert "NaN or infinite at step 220" in (tmp_path / "monitoring.html").read_text()


def test_the_run_that_is_rolled_back_recovers_and_the_other_does_not(monkeypatch, capsys):
    monkeypatch.setattr(rollback, "BROKEN", range(105, 145))
    monkeypatch.setattr(rollback, "SKIP", 100)
    alone, rolled_back = rollback.main(300)
    assert rolled_back < 0.2 < 1.0 < alone  # a constant, the mean of the targets, has 1.3
    told = capsys.readouterr().out
    assert told.count("restored") == 1
    assert "restored batch 100, skip to 200, learning rate 0.05" in told


def test_a_rollback_restores_parameters_momentum_clip_and_position(tmp_path):
    model, optimizer = rollback.new_model()
    saved = {}
    with ocp.CheckpointManager(tmp_path) as manager:
        for position in range(6):
            if position in (2, 4):
                state = nnx.state((model, optimizer))
                saved[position] = jax.tree.map(np.array, state)
                manager.save(position, args=ocp.args.StandardSave(state))
            rollback.train_step(model, optimizer, *rollback.batch_at(position))
        going_on = rollback.roll_back(manager, 3, model, optimizer)
        assert list(manager.all_steps()) == [2]  # that of batch 4 came after the spike
    assert going_on == 2 + rollback.SKIP
    rate = optimizer.opt_state[1].hyperparams["learning_rate"]
    assert rate[...] == np.float32(rollback.LEARNING_RATE * rollback.LOWER)
    rate[...] = np.float32(rollback.LEARNING_RATE)
    restored = jax.tree.leaves(nnx.state((model, optimizer)))
    before, after = (jax.tree.leaves(saved[position]) for position in (2, 4))
    for leaf, expected in zip(restored, before, strict=True):
        np.testing.assert_array_equal(leaf, expected)
    assert sum(np.any(a != b) for a, b in zip(before, after, strict=True)) > 6
