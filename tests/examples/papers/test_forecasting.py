"""No forecast sees the future, scores are right, and a run continues with its best network."""

import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.papers import forecasting
from examples.papers.forecasting import (
    QUANTILES,
    Series,
    forecast_ets,
    forecast_naive,
    score,
    windows,
)


def waves(noise: float = 0.0) -> Series:
    """120 values with a season of 12, rising by 0.1 a step."""
    at = np.arange(120)
    values = np.sin(at * (2 * np.pi / 12)) + 0.1 * at
    return Series("waves", 12, at / 12, values + noise * np.random.default_rng(0).normal(size=120))


def test_the_series_are_whole_and_in_order():
    shapes = {series.name: (len(series.values), series.season, series.years[-1])
              for series in forecasting.load_series()}  # fmt: skip
    assert shapes["sunspots"] == (309, 11, 2008)
    assert shapes["co2"][:2] == (526, 12)  # March 1958 … December 2001
    assert shapes["co2"][2] == pytest.approx(2001 + 11 / 12)
    assert shapes["elnino"][:2] == (732, 12)
    for series in forecasting.load_series():
        assert np.isfinite(series.values).all()
        assert 0 < series.valid < series.test < len(series.values)


def test_nothing_at_or_after_the_origin_reaches_the_network():
    series, origin = waves(0.1), np.array([60])
    inputs, targets = windows(series, origin, 24)
    changed = series._replace(values=np.where(np.arange(120) < 60, series.values, 1e6))
    # The scale is that of the values before the test.
    scale = changed.scale / series.scale
    np.testing.assert_allclose(windows(changed, origin, 24)[0] * scale, inputs, rtol=1e-3)
    differences = series.values[12:] - series.values[:-12]  # that of value n is number n - 12
    np.testing.assert_allclose(inputs[0, :, 1] * series.scale, differences[24:48], rtol=1e-4)
    np.testing.assert_allclose(targets[0] * series.scale, differences[48:60], rtol=1e-4)


def test_training_ends_before_the_validation_and_that_before_the_test():
    series = waves()
    assert series.origins(36, series.valid).max() + series.season == series.valid
    assert series.origins(series.valid, series.test).max() + series.season <= series.test
    assert series.origins(series.test, 120, 5).tolist() == [96, 101, 106]


def test_the_pinball_loss_is_that_of_numpy():
    rng = np.random.default_rng(0)
    y, q = rng.normal(size=(5, 3)), rng.normal(size=(5, 3, 7))
    error = y[..., None] - q
    by_hand = np.where(error >= 0, QUANTILES * error, (QUANTILES - 1) * error)
    loss = forecasting.pinball(jnp.asarray(y), jnp.asarray(q))
    np.testing.assert_allclose(loss, by_hand.mean(), rtol=1e-6)


def test_scores_of_the_seasonal_naive_are_known_by_hand():
    series, origins = waves(), np.array([96, 108])
    naive = forecast_naive(series, origins)
    # It misses 12 steps of 0.1 each time, before the test and in it; its errors are 1.2 all.
    assert series.scale == pytest.approx(1.2)
    scores = score(series, origins, naive)
    assert scores["MASE"] == pytest.approx(1.0)
    y = series.values[96:]
    assert scores["sMAPE"] == pytest.approx(np.mean(200 * 1.2 / (2 * y - 1.2)))
    # An error of one standard deviation is within 80 %, which reach to 1.28.
    assert scores["80 %"] == scores["90 %"] == 100
    np.testing.assert_allclose(naive[..., forecasting.MEDIAN], y.reshape(2, 12) - 1.2)


def test_ets_finds_trend_and_season_and_does_not_see_the_future(monkeypatch):
    forms = [{"trend": "add", "seasonal": seasonal} for seasonal in (None, "add")]
    monkeypatch.setattr(forecasting, "ETS_FORMS", forms)
    series = waves(0.05)
    forecasts, form = forecast_ets(series, np.array([96]))
    assert form == "trend, seasonal"
    later = series._replace(values=np.where(np.arange(120) < 96, series.values, 1e6))
    np.testing.assert_array_equal(forecasts, forecast_ets(later, np.array([96]))[0])
    assert score(series, np.array([96]), forecasts)["MASE"] < 0.2
    assert (np.diff(forecasts, axis=-1) > 0).all()


def test_a_run_that_was_interrupted_continues_with_its_best_network(tmp_path, monkeypatch):
    series, origins = waves(0.1), np.array([96, 108])
    args = forecasting.argparse.Namespace(steps=25, context=12, units=4)
    original, stop_at = forecasting.update, None

    def update(graph, limits, state, number, *data):
        if int(number) == stop_at:
            signal.raise_signal(signal.SIGINT)
        return original(graph, limits, state, number, *data)

    def forecast(out: Path):
        return forecasting.forecast_lstm(series, origins, 0.1, 0.5, 0, args, out)

    monkeypatch.setattr(forecasting, "update", update)
    whole, history = forecast(tmp_path / "whole")
    stop_at = 17
    with pytest.raises(KeyboardInterrupt):
        forecast(tmp_path / "parts")
    parts, again = forecast(tmp_path / "parts")
    np.testing.assert_array_equal(whole, parts)
    assert history == again
    assert whole.shape == (2, 12, len(QUANTILES))
    assert (np.diff(whole, axis=-1) >= 0).all()
    best = history["best_valid"]
    assert best[8] == np.inf > best[9] >= best[19]


def test_a_network_that_is_lost_keeps_the_parameters_it_was_best_with():
    series, ends = waves(), ((24, 81), (81, 96))
    data = [windows(series, series.origins(*end), 12) for end in ends]
    graph, params = forecasting.nnx.split(forecasting.Forecaster(12, 4, forecasting.nnx.Rngs(0)))
    limits = tuple(map(jnp.float32, (np.inf, np.nan, 10)))
    opt_state = forecasting.make_optimizer(limits).init(params)
    state = forecasting.State(params, opt_state, params, jnp.array(0.5))
    data = jax.tree.map(jnp.asarray, (jax.random.key(0), *data))
    state, scalars = forecasting.update(graph, limits, state, jnp.int32(9), *data)
    assert all(bool(jnp.isnan(leaf).all()) for leaf in jax.tree.leaves(state.params))
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(state.best))
    assert scalars["best_valid"] == state.best_loss == 0.5


def test_three_steps_leave_a_table_and_a_plot(tmp_path, monkeypatch):
    series = forecasting.load_series()
    monkeypatch.setattr(forecasting, "load_series", lambda: series[:1])
    monkeypatch.setattr(forecasting, "ETS_FORMS", forecasting.ETS_FORMS[:2])
    small = [
        "--steps",
        "3",
        "--seeds",
        "2",
        "--units",
        "4",
        "--every",
        "20",
        "--out",
        str(tmp_path),
    ]
    assert forecasting.main([*small, "--learning-rates", "0.5"]) == 0
    assert (tmp_path / "forecasting.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "results.txt").read_text()
    for row in ("seasonal naive", "ETS", "LSTM, 0.5, clip", "LSTM, 0.5, none", "jax "):
        assert row in text


@pytest.mark.parametrize(
    ("option", "value", "rule"),
    [
        ("--context", "5", "at least 12 and at most 100, got 5"),
        ("--max-norm", "-1", "at least 0 and at most 1e+09, got -1"),
        ("--max-norm", "nan", "got nan"),
        ("--learning-rates", "0", "at least 1e-09"),
        ("--every", "0", "at least 1, got 0"),
    ],
)
def test_bad_options_are_refused_by_their_rule(option, value, rule, tmp_path, capsys):
    assert forecasting.main([option, value, "--out", str(tmp_path / "run")]) == 2
    assert f"`{option}` must be" in (line := capsys.readouterr().err)
    assert rule in line
    assert not (tmp_path / "run").exists()
