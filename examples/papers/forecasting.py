"""Forecast three real series with quantiles from an LSTM, beside ETS and the seasonal naive.

    python examples/papers/forecasting.py

trains one network for each of three series that ship with statsmodels (yearly sunspots, monthly
carbon dioxide at Mauna Loa, monthly sea temperature of El Niño), with the clip and without, and
compares them from rolling origins: at each of them every method has seen all values so far, and
forecasts the season to come. It ends in a table and a plot.

The network reads the last values and gives all quantiles of all steps ahead at once, trained on
the pinball loss, as in Wen, Torkkola, Narayanaswamy, Madeka 2017, "A multi-horizon quantile
recurrent forecaster", https://arxiv.org/abs/1711.11053, equation 1, with a linear decoder. What it
forecasts is the difference to the value one season earlier.
"""

import argparse
import functools
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
from flax import nnx
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table
from scipy.special import ndtri
from statsmodels.datasets import co2, elnino, sunspots
from statsmodels.tsa.exponential_smoothing.ets import ETSModel

import gradclip_jax
from examples.language_model.command_line import check_number, command_line, console, run
from examples.language_model.loop import train
from examples.language_model.recurrent import CELLS, Recurrent, uniform
from examples.language_model.results import save_results, stopwatch
from examples.language_model.scalars import advice

QUANTILES = np.array([0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95])
MEDIAN = 3
INTERVALS = {"80 %": (1, 5), "90 %": (0, 6)}  # which quantiles bound them
BATCH = 32
VALID_EVERY = 10  # steps
ETS_FORMS = [
    {"trend": trend, "damped_trend": damped, "seasonal": seasonal}
    for trend, damped in ((None, False), ("add", False), ("add", True))
    for seasonal in (None, "add")
]


class Series(NamedTuple):
    """Values in equal steps; the last fifth is the test, the eighth before it the validation."""

    name: str
    season: int  # steps; also how far ahead the forecasts go
    years: np.ndarray
    values: np.ndarray

    @property
    def test(self) -> int:
        """Where the test begins."""
        return len(self.values) - len(self.values) // 5

    @property
    def valid(self) -> int:
        return self.test - len(self.values) // 8

    @property
    def scale(self) -> float:
        """Mean error of the seasonal naive before the test, the unit of MASE (Hyndman 2006)."""
        return float(np.abs(self.seasonal_differences).mean())

    @property
    def seasonal_differences(self) -> np.ndarray:
        known = self.values[: self.test]
        return known[self.season :] - known[: -self.season]

    def origins(self, start: int, end: int, every: int = 1) -> np.ndarray:
        """Numbers of the first values to forecast, so that the last one comes before `end`."""
        return np.arange(start, end - self.season + 1, every)


class Forecast(NamedTuple):
    """What one method forecasts, and of an LSTM the scalars of its runs."""

    name: str
    quantiles: list[np.ndarray]  # of each seed [origins, steps ahead, quantiles]
    histories: list[dict[str, list]]


class Comparison(NamedTuple):
    """All forecasts of one series, from the same origins."""

    series: Series
    origins: np.ndarray
    forecasts: list[Forecast]


def load_series() -> list[Series]:
    def table(dataset: Any) -> Any:
        return dataset.load_pandas().data

    sources = {
        "sunspots": (11, 1, 1700, table(sunspots)["SUNACTIVITY"]),
        "co2": (12, 12, 1958 + 2 / 12, table(co2)["co2"].resample("MS").mean()),
        "elnino": (12, 12, 1950, pd.Series(np.ravel(table(elnino).iloc[:, 1:]))),
    }
    return [
        Series(
            name,
            season,
            start + np.arange(len(values)) / per_year,
            np.array(values.interpolate(), float),  # no co2 in five months
        )
        for name, (season, per_year, start, values) in sources.items()
    ]


def windows(series: Series, origins: np.ndarray, context: int) -> tuple[np.ndarray, np.ndarray]:
    """What the network reads before each origin, [origins, context, 2], and what it forecasts.

    It reads values around their mean and seasonal differences, and forecasts the latter: both
    stay in range while carbon dioxide rises. Nothing at or after the origin is read.
    """
    y, at = series.values, origins[:, None] + np.arange(-context, 0)
    level = y[at] - y[at].mean(1, keepdims=True)
    inputs = np.stack([level, y[at] - y[at - series.season]], axis=-1) / series.scale
    ahead = origins[:, None] + np.arange(series.season)
    targets = (y[ahead] - y[ahead - series.season]) / series.scale
    return inputs.astype(np.float32), targets.astype(np.float32)


def pinball(y: jax.Array, quantiles: jax.Array) -> jax.Array:
    """τ (y - q) above the quantile q and (1 - τ) (q - y) below; the mean of all."""
    tau = jnp.asarray(QUANTILES, jnp.float32)
    above = y[..., None] - quantiles
    return jnp.maximum(tau * above, (tau - 1) * above).mean()


class Forecaster(nnx.Module):
    """An LSTM and a linear regression that together give all quantiles of all steps ahead.

    The regression on the last season moves all quantiles of a step alike. It is the autoregressive
    part of Lai, Chang, Yang, Liu 2018, "Modeling long- and short-term temporal patterns with deep
    neural networks", https://arxiv.org/abs/1703.07015, section 3.6: an LSTM alone learns slowly to
    copy what it reads.
    """

    def __init__(self, steps: int, units: int, rngs: nnx.Rngs):
        scale, self.shape = units**-0.5, (steps, len(QUANTILES))
        self.layer = Recurrent(CELLS["lstm"], 2, units, scale=scale, rngs=rngs)
        self.output = nnx.Param(uniform(scale)(rngs.params(), (units, math.prod(self.shape))))
        self.linear = nnx.Param(jnp.zeros((2 * steps, steps)))
        # Before it has learned anything it forecasts as if seasonal differences were normal.
        start = jnp.tile(jnp.asarray(1.25 * ndtri(QUANTILES), jnp.float32), steps)
        self.bias = nnx.Param(start)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        x = jnp.swapaxes(inputs, 0, 1)
        outputs, _ = self.layer(x, self.layer.start(x.shape[1]))
        season = inputs[:, -self.shape[0] :].reshape(len(inputs), -1)
        spread = (outputs[-1] @ self.output[...] + self.bias[...]).reshape(-1, *self.shape)
        return spread + (season @ self.linear[...])[..., None]


class State(NamedTuple):
    """What a step depends on, and the parameters with the lowest validation loss so far."""

    params: Any
    opt_state: Any
    best: Any
    best_loss: jax.Array


def make_optimizer(limits: tuple[jax.Array, ...]) -> optax.GradientTransformation:
    """The clip in front of SGD with momentum; a limit of infinity measures and lets all pass.

    The limit, the learning rate and the number of steps may be traced: all runs on a series share
    a compiled step.
    """
    max_norm, learning_rate, steps = limits
    clip = gradclip_jax.clip_by_global_norm(max_norm, on_nonfinite="propagate")

    def falling(at: jax.typing.ArrayLike) -> jax.Array:
        return learning_rate * (1 - jnp.asarray(at, jnp.float32) / steps)

    return optax.chain(clip, optax.sgd(falling, momentum=0.9))


@functools.partial(jax.jit, static_argnames="graph")
def update(graph, limits, state: State, number, key, fit, valid):
    """One step on windows drawn for its number; every so often a look at the validation."""

    def objective(params, data):
        inputs, targets = data
        return pinball(targets, nnx.merge(graph, params)(inputs))

    rows = jax.random.randint(jax.random.fold_in(key, number), (BATCH,), 0, len(fit[0]))
    batch = jax.tree.map(lambda array: array[rows], fit)
    loss, grads = jax.value_and_grad(objective)(state.params, batch)
    optimizer = make_optimizer(limits)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    valid_loss = jax.lax.cond(
        (number + 1) % VALID_EVERY == 0, lambda: objective(params, valid), lambda: jnp.inf
    )
    better = valid_loss < state.best_loss
    best = jax.tree.map(lambda new, old: jnp.where(better, new, old), params, state.best)
    best_loss = jnp.where(better, valid_loss, state.best_loss)  # a loss that is NaN is not better
    scalars = {"loss": loss, "best_valid": best_loss, **gradclip_jax.metrics(opt_state)}
    return State(params, opt_state, best, best_loss), scalars


@functools.partial(jax.jit, static_argnames="graph")
def predict(graph, params, inputs):
    # Quantiles that cross are put in order (Chernozhukov, Fernández-Val, Galichon 2010).
    return jnp.sort(nnx.merge(graph, params)(inputs), axis=-1)


def forecast_lstm(
    series: Series, origins: np.ndarray, max_norm: float, learning_rate: float, seed: int,
    args: argparse.Namespace, out: Path,
) -> tuple[np.ndarray, dict[str, list]]:  # fmt: skip
    """Train on what comes before the validation, and forecast; with the scalars of the run."""
    graph, params = nnx.split(Forecaster(series.season, args.units, nnx.Rngs(seed)))
    limits = tuple(map(jnp.float32, (max_norm, learning_rate, args.steps)))
    ends = ((args.context + series.season, series.valid), (series.valid, series.test))
    data = [windows(series, series.origins(*end), args.context) for end in ends]
    data = jax.tree.map(jnp.asarray, (jax.random.key(seed), *data))
    config = {"steps": args.steps, "context": args.context, "units": args.units, "seed": seed}
    config |= {"series": series.name, "max_norm": max_norm, "learning_rate": learning_rate}
    state, history = train(
        lambda state, number: update(graph, limits, state, number, *data),
        State(params, make_optimizer(limits).init(params), params, jnp.array(jnp.inf)),
        args.steps,
        out,
        title=out.name,
        config=config,
        per_step=BATCH,
        unit="windows",
    )
    differences = predict(graph, state.best, windows(series, origins, args.context)[0])
    return naive(series, origins)[..., None] + series.scale * np.asarray(differences), history


def naive(series: Series, origins: np.ndarray) -> np.ndarray:
    """The values one season earlier, [origins, steps ahead]."""
    return series.values[origins[:, None] + np.arange(series.season) - series.season]


def forecast_naive(series: Series, origins: np.ndarray) -> np.ndarray:
    """The seasonal naive, with the spread of its errors before the test."""
    spread = np.sqrt(np.mean(series.seasonal_differences**2))
    return naive(series, origins)[..., None] + spread * ndtri(QUANTILES)


def forecast_ets(series: Series, origins: np.ndarray) -> tuple[np.ndarray, str]:
    """Exponential smoothing with additive errors: the form with the lowest AICc before the test.

    Like the network it is fitted once, and its states follow the values up to each origin.
    """

    def model(form: dict[str, Any], end: int) -> Any:
        periods = series.season if form["seasonal"] else None
        values = pd.Series(series.values[:end])
        return ETSModel(values, error="add", seasonal_periods=periods, **form)

    fits = [(form, model(form, series.test).fit(disp=False)) for form in ETS_FORMS]
    form, fitted = min(fits, key=lambda pair: pair[1].aicc)
    forecasts = []
    for origin in origins:
        smoothed = model(form, origin).smooth(fitted.params)
        ahead = smoothed.get_prediction(origin, origin + series.season - 1)
        mean, variance = np.asarray(ahead.predicted_mean), np.asarray(ahead.forecast_variance)
        forecasts.append(mean[:, None] + np.sqrt(variance)[:, None] * ndtri(QUANTILES))
    return np.stack(forecasts), ", ".join(k for k in form if form[k])


def score(series: Series, origins: np.ndarray, quantiles: np.ndarray) -> dict[str, float]:
    """Errors of the median, the pinball loss, and how often the intervals hold the value."""
    y, median = actual(series, origins), quantiles[..., MEDIAN]
    error = np.abs(y - median)
    return {
        "MASE": float(error.mean() / series.scale),
        "sMAPE": float((200 * error / (np.abs(y) + np.abs(median))).mean()),
        "pinball": float(pinball(jnp.asarray(y), jnp.asarray(quantiles)) / series.scale),
        **{
            name: 100 * float(((quantiles[..., i] <= y) & (y <= quantiles[..., j])).mean())
            for name, (i, j) in INTERVALS.items()
        },
    }


def actual(series: Series, origins: np.ndarray) -> np.ndarray:
    return series.values[origins[:, None] + np.arange(series.season)]


def compare(args: argparse.Namespace) -> None:
    for name, low, high in (
        ("steps", 1, math.inf), ("seeds", 1, 1000), ("max_norm", 0, 1e9), ("units", 1, 10_000),
        ("context", 12, 100), ("every", 1, math.inf),
    ):  # fmt: skip
        check_number(name, getattr(args, name), low, high)
    for rate in args.learning_rates:
        check_number("learning_rates", rate, 1e-9, 1e9)
    seconds, forms, comparisons = stopwatch(args.out), {}, []
    for series in load_series():
        origins = series.origins(series.test, len(series.values), args.every)
        ets, form = forecast_ets(series, origins)
        forecasts = [Forecast("seasonal naive", [forecast_naive(series, origins)], [])]
        forecasts.append(Forecast("ETS", [ets], []))
        forms[series.name] = form
        for rate in args.learning_rates:
            for max_norm, clip in ((args.max_norm, "clip"), (math.inf, "none")):
                runs = [
                    forecast_lstm(
                        series, origins, max_norm, rate, seed, args,
                        args.out / f"{series.name}-{rate:g}-{clip}-{seed}",
                    )
                    for seed in range(args.seed, args.seed + args.seeds)
                ]  # fmt: skip
                quantiles, histories = map(list, zip(*runs, strict=True))
                forecasts.append(Forecast(f"LSTM, {rate:g}, {clip}", quantiles, histories))
        comparisons.append(Comparison(series, origins, forecasts))
    picture = args.out / "forecasting.png"
    draw(comparisons, args.every, picture)
    options = ("learning_rates", "max_norm", "steps", "seeds", "seed", "units", "context", "every")
    settings = {name: getattr(args, name) for name in options}
    settings["ETS"] = forms
    settings |= seconds()
    packages = ("jax", "flax", "optax", "statsmodels", "pandas", "numpy")
    save_results(args.out, map(make_table, comparisons), settings, packages)
    console.print(f"Plot: {picture}{advice(args.out)}")


def make_table(comparison: Comparison) -> Table:
    """Every method on one series; of several seeds the mean, and the deviation of the MASE."""
    series, origins, forecasts = comparison
    table = Table(title=series.name, box=SIMPLE_HEAD, show_edge=False, collapse_padding=True)
    table.add_column("", no_wrap=True)
    for name in ("MASE", "±", "sMAPE", "pinball", *INTERVALS, "max norm", "clip rate"):
        table.add_column(name, justify="right", min_width=5)
    for name, quantiles, histories in forecasts:
        scores = [score(series, origins, q) for q in quantiles]
        mean = {key: np.mean([each[key] for each in scores]) for key in scores[0]}
        spread = f"{np.std([each['MASE'] for each in scores]):.3f}" if len(scores) > 1 else ""
        cells = [f"{mean['MASE']:.3f}", spread, f"{mean['sMAPE']:.3g}", f"{mean['pinball']:.3f}"]
        cells += [f"{mean[key]:.0f}" for key in INTERVALS]
        if histories:
            norms = np.concatenate([history["grad_norm"] for history in histories])
            rate = np.mean([history["clipped"] for history in histories])
            # A run that diverges ends in NaN; what came before is of interest.
            cells += [f"{norms[~np.isnan(norms)].max(initial=0):.2g}", f"{rate:.0%}"]
        table.add_row(name, *cells)
    return table


def draw(comparisons: list[Comparison], every: int, picture: Path) -> None:
    """One season after the other with an 80 % interval, and the error over the steps ahead."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    for row, (series, origins, forecasts) in enumerate(comparisons):
        wide, narrow = (figure.add_subplot(len(comparisons), 4, place) for place in
                        ((4 * row + 1, 4 * row + 3), 4 * row + 4))  # fmt: skip
        first = max(series.test, len(series.values) - 7 * series.season)
        wide.plot(series.years[first:], series.values[first:], "k", lw=1)
        ets, lstm = forecasts[1], forecasts[2]
        low, high = INTERVALS["80 %"]
        # Backwards from the last origin, so that no two seasons overlap.
        for number in range(len(origins) - 1, -1, -max(1, series.season // every)):
            if origins[number] < first:
                break
            years = series.years[origins[number] + np.arange(series.season)]
            quantiles = lstm.quantiles[0][number]
            wide.fill_between(years, quantiles[:, low], quantiles[:, high], color="C2", alpha=0.25)
            wide.plot(years, quantiles[:, MEDIAN], "C2", lw=1.2)
            wide.plot(years, ets.quantiles[0][number, :, MEDIAN], "C1--", lw=1)
        wide.set(title=f"{series.name}, one season after the other, and 80 % intervals")
        y = actual(series, origins)
        for number, forecast in enumerate(forecasts):
            error = np.abs(y - np.mean(forecast.quantiles, axis=0)[..., MEDIAN]).mean(0)
            style = "--" if forecast.name.endswith("none") else "-"
            ahead = 1 + np.arange(series.season)
            narrow.plot(ahead, error / series.scale, f"C{number}{style}", label=forecast.name)
        narrow.set(title="scaled error by steps ahead", yscale="log")
        if not row:
            figure.legend(*narrow.get_legend_handles_labels(), loc="outside lower center", ncols=6)
    figure.savefig(picture, dpi=60)


def main(argv: list[str] | None = None) -> int:
    parser = command_line(__doc__, "forecasting")
    add = parser.add_argument
    # The better one, and ten times that, to see whether the clip makes up for it.
    add("--learning-rates", type=float, nargs="+", default=[0.5, 5.0])
    add("--max-norm", type=float, default=0.1, help="limit of the global norm")
    add("--steps", type=int, default=300)
    add("--seeds", type=int, default=3, help="networks for each row of the table")
    add("--units", type=int, default=16)
    add("--context", type=int, default=36, help="values that the network reads before an origin")
    add("--every", type=int, default=1, help="distance of the origins in the test")
    return run(parser, compare, argv)


if __name__ == "__main__":
    sys.exit(main())
