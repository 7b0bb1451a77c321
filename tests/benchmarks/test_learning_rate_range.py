"""The benchmark of learning rates: scores, corrupted batches, and how it goes on."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import learning_rate_range as benchmark
import numpy as np
import optax
import pytest
from flax import nnx
from matplotlib.figure import Figure

import gradclip_jax


class Bigram(nnx.Module):
    """The least that learns: a table of logits by the character before."""

    def __init__(self, vocabulary, key):
        self.table = nnx.Param(0.1 * jax.random.normal(key, (vocabulary, vocabulary)))


def bigram_loss(model, tokens):
    logits = model.table[...][tokens[:, :-1]]
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


BIGRAM = benchmark.Task(
    Bigram, bigram_loss, optax.sgd, (0.5, 8.0), benchmark.FOR_SGD, "A table, by SGD"
)


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("a norm is held to its limit, and to no other. " * 40)
    return file


@pytest.fixture
def out(tmp_path):
    """Where the results go."""
    return tmp_path / "out"


@pytest.fixture
def run(out, text, monkeypatch):
    """The command line with the bigram; returns the status."""
    monkeypatch.setattr(benchmark, "MODELS", {"bigram": BIGRAM})

    def run(*argv):
        given = ["--out", str(out), "--data", str(text), "--steps", "3", "--clips", "none,constant"]
        return benchmark.main([*given, *argv])

    return run


def made_up(final):
    """Runs with these losses in both conditions, [learning rate, seed], that began at 4."""
    final = np.stack([np.array(final, float)] * 2)
    return benchmark.Runs(np.full_like(final, 4), final, np.full_like(final, 0.25))


RATES = (1.0, 2.0, 4.0, 8.0)
WIDE = made_up([[2.1, 2.1], [2.0, 2.0], [2.0, 2.2], [math.nan, 9.0]])
NARROW = made_up([[2.1, 2.3], [2.05, 2.05], [2.1, 5.0], [math.nan, 2.0]])


def test_the_range_that_trains_well_is_found_in_losses():
    best = benchmark.best_loss([WIDE, NARROW])
    assert best == 2.0
    # 10 % above 2.0 is 2.2; a seed that is worse, or NaN, spoils its learning rate.
    assert benchmark.trains_well(WIDE.final[0], best).tolist() == [True, True, True, False]
    assert benchmark.trains_well(NARROW.final[0], best).tolist() == [False, True, False, False]
    assert benchmark.width(RATES, np.array([True, True, True, False])) == 4
    assert benchmark.width(RATES, np.zeros(4, bool)) == 0


def test_a_loss_counts_for_the_sensitivity_as_that_before_training_at_most():
    # The losses less 2: 0.1, 0.1, 0, 0, 0, 0.2, 2, 2.
    assert benchmark.sensitivity(WIDE.final[0], WIDE.first[0], 2.0) == pytest.approx(4.4 / 8)


def test_the_summary_says_what_was_found():
    wide, narrow = benchmark.summary(RATES, {"wide": WIDE, "narrow": NARROW}, 0, 2.0)
    assert wide == ["wide", "3", "1 to 4", "4×", "3", "2.000 at 2", "0.55", "25 %"]
    assert narrow[:6] == ["narrow", "1", "2 to 2", "1×", "2", "2.050 at 2"]


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        ([2.0, 2.5], "2.25"),
        ([2.0, 7.0], "2.00 (1 diverged)"),
        ([2.0, math.nan], "2.00 (1 diverged)"),
        ([math.nan, 4.0], "diverged"),
    ],
)
def test_a_run_that_ends_where_it_began_diverged(losses, words):
    assert benchmark.cell(np.array(losses), np.full(2, 4.0)) == words


def test_one_step_in_200_is_corrupted():
    tokens, noise = jnp.zeros((2, 3), jnp.int32), jnp.ones((2, 3), jnp.int32)
    gains = []
    steps = (0, 129, 130, 131, 200, 330)
    for step in steps:
        seen, gain = benchmark.corrupt(BIGRAM, tokens, noise, step, True)
        assert bool(seen.all()) == (gain > 1) == bool(seen.any())
        gains.append(float(gain))
    assert gains == [1, 1, 100, 1, 1, 100]
    seen, gain = benchmark.corrupt(BIGRAM, tokens, noise, 130, False)
    assert not seen.any()
    assert gain == 1


def test_a_corrupted_batch_is_all_that_differs(text):
    corpus = benchmark.read_corpus(text)

    def final(**changes):
        task = BIGRAM._replace(**changes)
        make = functools.partial(benchmark.CLIPS["none"], 1.0)
        train = benchmark.trainer(task, make, corpus, 140)
        return train(np.full(1, 0.5, np.float32), np.zeros(1, int))["final"][0].tolist()

    clean, corrupted = final()
    assert clean < corrupted
    # Where the two runs part changes nothing before a corrupted batch.
    assert final(first=10)[0] == pytest.approx(clean, rel=1e-6)
    assert final(period=1000, first=999) == pytest.approx([clean, clean], rel=1e-6)


def test_a_skipped_step_counts_as_a_clipped_one():
    params, grads = jnp.zeros(2), jnp.array([3.0, 4.0])
    for clip, expected in (("none", 0), ("constant", 1)):
        optimizer = benchmark.CLIPS[clip](1.0, optax.sgd(0.1))
        _, state = optimizer.update(grads, optimizer.init(params), params)
        assert benchmark.events(state) == expected
    guard = gradclip_jax.skip_spikes(optax.sgd(0.1), grad_norm=1.0)
    _, state = guard.update(grads, guard.init(params), params)
    assert benchmark.events(state) == 1


@pytest.mark.parametrize("clip", benchmark.CLIPS)
def test_every_clip_is_part_of_a_program(clip, text, standard_promotion):
    task = BIGRAM._replace(optimizer=optax.adamw)
    make = functools.partial(benchmark.CLIPS[clip], 1.0)
    train = benchmark.trainer(task, make, benchmark.read_corpus(text), 6)
    found = jax.eval_shape(train, np.ones(3, np.float32), np.arange(3))
    assert {name: x.shape for name, x in found.items()} == dict.fromkeys(
        benchmark.Runs._fields, (3, 2)
    )


@pytest.mark.parametrize("name", benchmark.MODELS)
def test_every_model_has_a_loss_and_learning_rates_at_one_ratio(name, standard_promotion):
    task = benchmark.MODELS[name]
    tokens = jnp.zeros((2, benchmark.LENGTH + 1), jnp.int32)
    loss = jax.eval_shape(lambda key: task.loss(task.make(10, key), tokens), jax.random.key(0))
    assert loss.shape == ()
    assert loss.dtype == jnp.float32
    ratios = np.diff(np.log2(task.learning_rates))
    np.testing.assert_allclose(ratios, ratios[0])
    assert set(task.clips) <= set(benchmark.CLIPS)


def test_the_transformer_for_muon_has_ten_million_parameters():
    make = functools.partial(benchmark.MODELS["muon"].make, 97)
    params = nnx.state(jax.eval_shape(make, jax.random.key(0)), nnx.Param)
    assert sum(x.size for x in jax.tree.leaves(params)) == pytest.approx(10e6, rel=0.02)


def test_every_run_ends_in_tables_and_a_figure(run, out, capsys):
    assert run() == 0
    report = (out / "learning_rate_range.md").read_text()
    assert capsys.readouterr().out == report
    assert report.count("\n| constant |") == report.count("\n| none |") == 4
    assert "A table, by SGD: 3 steps, 3 seeds." in report
    assert (out / "learning_rate_range.png").read_bytes().startswith(b"\x89PNG")
    runs = json.loads((out / "bigram_constant.json").read_bytes())
    assert np.shape(runs["final"]) == (2, 2, 3)
    # Three steps are before the first corrupted one.
    assert runs["final"][0] == runs["final"][1]


def test_what_is_finished_is_not_trained_again(run, out, monkeypatch):
    trained = []

    def results_of(name, clip, *_):
        trained.append((name, clip))
        return WIDE_OF_TWO

    monkeypatch.setattr(benchmark, "results_of", results_of)
    monkeypatch.setattr(benchmark, "figure", lambda _: Figure((1, 1)))
    for clips, expected in (
        ("none", ["none"]),
        ("none,constant", ["constant"]),
        ("constant,none", []),
    ):
        trained.clear()
        assert run("--clips", clips) == 0
        assert trained == [("bigram", clip) for clip in expected]
        report = (out / "learning_rate_range.md").read_text()
        assert report.count("2.00 (2 diverged)") == 2 * len(clips.split(","))


WIDE_OF_TWO = made_up([[2.1, 2.1, 2.1], [math.nan, 2.0, 9.0]])
GOOD = {
    "settings": {"learning_rates": [1.0], "seeds": 3},
    **dict.fromkeys(benchmark.Runs._fields, [[[1.0] * 3]] * 2),
}


def test_not_a_number_survives_saving(tmp_path):
    file = tmp_path / "runs.json"
    settings = {"learning_rates": [0.5, 8.0], "seeds": 3}
    benchmark.save(file, settings, WIDE_OF_TWO)
    assert "NaN" not in file.read_text()
    found = benchmark.load(file, settings)
    for left, right in zip(found, WIDE_OF_TWO, strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "JSONDecodeError"),
        ("[1]", "TypeError"),
        (json.dumps({**GOOD, "final": [1.0]}), "arrays that are not (2, 1, 3)"),
        (json.dumps({**GOOD, "final": "x"}), "could not convert"),
        (json.dumps({key: GOOD[key] for key in ("settings", "final")}), "KeyError: 'first'"),
    ],
)
def test_a_broken_result_is_named(tmp_path, content, words):
    file = tmp_path / "bigram_none.json"
    file.write_text(content)
    with pytest.raises(benchmark.InputError) as error:
        benchmark.load(file, {"learning_rates": [1.0]})
    assert str(error.value).startswith("`--out` must hold results as this script writes them, got")
    assert str(file) in str(error.value)
    assert words in str(error.value)


BAD_INPUT = {
    ("--models", "gru"): "`--models` must be some of bigram, each once, got 'gru'.",
    ("--clips", "none,none"): "`--clips` must be some of none,constant,percentile,zclip,adagc,",
    ("--clips", ""): "each once, got ''.",
    ("--clips", "update-rms"): "`--clips` must have one that bigram takes, none,constant,",
    ("--steps", "2"): "`--steps` must be at least 3, got 2.",
    ("--max-norm", "-1"): "`--max-norm` must be non-negative, got -1.0.",
    ("--max-norm", "nan"): "`--max-norm` must be non-negative, got nan.",
    ("--data", "/nowhere/text"): "`--data` must be readable, got /nowhere/text: No such file",
    ("--out", "/dev/null/here"): "`--out` must be a directory that can be written, got /dev/null",
}


@pytest.mark.parametrize("argv", BAD_INPUT, ids=" ".join)
def test_bad_input_ends_in_one_line_and_status_2(run, capsys, argv):
    assert run(*argv) == 2
    out, err = capsys.readouterr()
    assert not out
    assert BAD_INPUT[argv] in err
    assert err.count("\n") == 1


def test_a_text_too_short_is_bad_input(run, capsys, text):
    text.write_text("too short")
    assert run() == 2
    assert "`--data` must have more than 640 characters, got" in capsys.readouterr().err


def test_results_of_other_settings_are_not_mixed(run, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "results_of", lambda *_: WIDE_OF_TWO)
    monkeypatch.setattr(benchmark, "figure", lambda _: Figure((1, 1)))
    assert run("--clips", "none") == 0
    capsys.readouterr()
    assert run("--clips", "none", "--steps", "4") == 2
    err = capsys.readouterr().err
    assert "`--out` must not hold results of other settings, got" in err
    assert err.endswith("bigram_none.json with another steps.\n")
