"""The monitor: what it keeps, which alerts it raises, and that a healthy run raises none."""

import copy
import math
import pickle
import sys
import threading
import warnings
from array import array

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import make_mesh
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import gradclip_jax
from examples.language_model.model import LanguageModel
from gradclip_jax import Monitor, metrics, suggest_max_norm
from gradclip_jax._monitor.conditions import theil_sen
from gradclip_jax._monitor.fetch import Fetch
from gradclip_jax._monitor.rows import COLUMNS
from gradclip_jax.monitor import Alert, ClipWarning


def clipped_run(norms, limit):
    """What `metrics` says of each step of a run with these norms."""
    norms, limit = np.asarray(norms, float), np.broadcast_to(limit, np.shape(norms))
    finite = np.isfinite(norms)
    clipped = finite & (norms > limit)
    factor = np.where(clipped, limit / np.where(clipped, norms, 1), finite)
    return {
        "grad_norm": norms,
        "clip_limit": limit,
        "clip_factor": factor,
        "clipped": clipped.astype(float),
        "clip_count": np.cumsum(clipped),
        "nonfinite_count": np.cumsum(~finite),
        "step_count": 1 + np.arange(len(norms)),
    }


def alerts_of(numbers, losses=None, every=1, window=1, **options):
    """The alerts for a run, recorded at every step, at some of them, or in windows."""
    alerts = []
    watch = Monitor(on_alert=alerts.append, **options)
    steps = len(next(iter(numbers.values())))
    for i in range(0, steps, max(every, window)):
        part = slice(i, i + window)
        loss = None if losses is None else losses[part]
        seen = {key: value[part] for key, value in numbers.items()}
        watch.record(min(i + window, steps) - 1, seen, loss=loss)
    watch.flush()
    return alerts


def kinds(alerts):
    return [alert.kind for alert in alerts]


def noisy(seed, count, deviation=0.3):
    return np.exp(deviation * np.random.default_rng(seed).standard_normal(count))


# --- what is kept ---


def test_history_has_a_row_for_each_record_and_norms_every_norm():
    monitor = Monitor()
    monitor.record(0, {"grad_norm": 3.0, "clip_limit": 2.0}, loss=1.5)
    numbers = clipped_run([1.0, 9.0, 2.0, 4.0], 2.0)
    monitor.record(4, numbers, loss=np.array([7.0, 1.0, 3.0, 2.0]))
    history = monitor.history
    assert {name: column.tolist() for name, column in history.items()} == {
        "step": [0, 4],
        "grad_norm_min": [3, 1], "grad_norm": [3, 3], "grad_norm_max": [3, 9],
        "clip_limit": [2, 2], "clip_factor": [pytest.approx(math.nan, nan_ok=True), 2 / 9],
        "clipped": [1, 0.5], "clip_rate": [1, 0.5], "nonfinite": [0, 0],
        "loss_min": [1.5, 1], "loss": [1.5, 2.5], "loss_max": [1.5, 7], "nonfinite_loss": [0, 0],
    }  # fmt: skip
    assert history["step"].dtype == np.int64
    assert monitor.norms["step"].tolist() == [0, 1, 2, 3, 4]
    assert monitor.norms["grad_norm"].tolist() == [3, 1, 9, 2, 4]


def test_what_is_not_given_is_nan_and_what_is_not_finite_is_counted_and_left_out():
    monitor = Monitor(on_alert=lambda alert: None)
    monitor.record(2, {}, loss=np.array([1.0, np.nan, 3.0]))
    monitor.record(5, clipped_run([np.inf, 2.0, np.nan], 9.0))
    monitor.record(6, {"grad_norm": np.nan})
    history = monitor.history
    np.testing.assert_array_equal(history["loss"], [2, np.nan, np.nan])
    np.testing.assert_array_equal(history["nonfinite_loss"], [1, np.nan, np.nan])
    np.testing.assert_array_equal(history["grad_norm"], [np.nan, 2, np.nan])
    np.testing.assert_array_equal(history["nonfinite"], [np.nan, 2, 1])
    np.testing.assert_array_equal(monitor.norms["grad_norm"], [np.inf, 2, np.nan, np.nan])


def test_updates_between_two_records_that_were_not_finite_are_known_from_the_counter():
    alerts = []
    monitor = Monitor(on_alert=alerts.append)
    for step, count in ((10, 5), (20, 5), (30, 7)):  # the first five are from before a restart
        monitor.record(step, {"grad_norm": 1.0 + step, "nonfinite_count": count})
    assert monitor.history["nonfinite"].tolist() == [0, 0, 2]
    assert [(alert.kind, alert.since) for alert in alerts] == [("nonfinite", 21)]
    assert "between step 21 and step 30" in alerts[0].message


def test_a_spike_within_a_window_of_scan_is_seen():
    clip = gradclip_jax.clip_by_global_norm(2.0)

    @jax.jit
    def run(scales):
        def body(state, scale):
            _, state = clip.update({"w": scale * jnp.array([0.6, 0.8])}, state)
            return state, metrics(state)

        return jax.lax.scan(body, clip.init({"w": jnp.zeros(2)}), scales)[1]

    monitor = Monitor()
    monitor.record(9, run(jnp.ones(10).at[4].set(50.0)))
    (row,) = zip(*monitor.history.values(), strict=True)
    seen = dict(zip(monitor.history, row, strict=True))
    assert (seen["grad_norm_min"], seen["grad_norm"], seen["grad_norm_max"]) == (1, 1, 50)
    assert seen["clip_factor"] == pytest.approx(0.04)
    assert seen["clipped"] == pytest.approx(0.1)
    assert monitor.sweep([10.0])[0].steps.tolist() == [4]


def test_leaves_are_kept_by_path():
    monitor = Monitor(on_alert=lambda alert: None)
    monitor.record(0, {"grad_norm/a/w": 1.0})
    monitor.record(2, {"grad_norm/a/w": np.array([3.0, 2.0]), "grad_norm/b": np.array([1, np.nan])})
    leaves = monitor.leaf_norms
    assert list(leaves) == ["a/w", "b"]
    np.testing.assert_array_equal(leaves["a/w"], [1, 3])
    np.testing.assert_array_equal(leaves["b"], [np.nan, np.inf])


def test_steps_may_be_given_one_by_one():
    monitor = Monitor()
    monitor.record(jnp.array([10, 20, 30]), {"grad_norm": jnp.array([1.0, 2.0, 3.0])})
    assert monitor.norms["step"].tolist() == [10, 20, 30]
    assert monitor.history["step"].tolist() == [30]


def test_the_loss_may_be_among_the_metrics():
    monitor = Monitor()
    monitor.record(0, {"loss": 2.0, "grad_norm": 1.0})
    assert monitor.history["loss"].tolist() == [2]


def test_writers_get_each_row_in_order_and_what_else_was_recorded():
    rows = []
    with Monitor(writers=[lambda step, row: rows.append((step, row))]) as monitor:
        for step in range(3):
            numbers = {"grad_norm": jnp.float32(step), "grad_norm/w": jnp.float32(1), "skips": 7}
            monitor.record(step, numbers)
    assert [step for step, _ in rows] == [0, 1, 2]
    assert {"skips", "grad_norm/w", *monitor.history} - {"step"} == set(rows[0][1])
    assert rows[2][1]["grad_norm_max"] == 2
    assert all(type(value) is float for _, row in rows for value in row.values())


def test_the_time_to_a_loss_is_not_that_of_one_lucky_batch():
    monitor = Monitor()
    losses = np.linspace(3.0, 1.0, 201)
    losses[20] = 0.5
    for step, loss in enumerate(losses):
        monitor.record(10 * step, {}, loss=loss)
    assert monitor.steps_to(2.0) == 1020  # the median of 5 is the loss of the third, at 1000
    assert monitor.steps_to(2.0, records=1) == 200
    assert monitor.steps_to(0.4) is None
    assert Monitor().steps_to(1.0) is None


def test_the_summary_tells_the_run():
    norms = noisy(0, 300)
    norms[200] = np.nan
    losses = 1 + 0.01 * np.random.default_rng(0).standard_normal(300)
    losses[100:102] = losses[250] = 50.0
    alerts = []
    monitor = Monitor(on_alert=alerts.append)
    numbers = clipped_run(norms, 1.5)
    for step in range(300):
        monitor.record(step, {k: v[step] for k, v in numbers.items()}, loss=losses[step])
    summary = monitor.summary()
    assert summary["loss_spikes"] == 2
    assert summary["alerts"] == {"loss_spike": 1, "nonfinite": 1}
    assert summary["nonfinite"] == 1
    assert summary["step"] == 299
    assert summary["clip_rate"] == pytest.approx(np.sum(norms > 1.5) / 300)
    assert summary["grad_norm_max"] == np.nanmax(norms)
    assert summary["best_loss"] == losses.min()
    assert Monitor().summary()["grad_norm"] is None


# --- threads and interruptions ---


def in_a_thread(work):
    """What `work` raises in a thread that runs it again and again until it is asked for."""
    raised, done = [], threading.Event()

    def again():
        while not done.is_set():
            try:
                work()
            except Exception as error:
                raised.append(error)

    thread = threading.Thread(target=again)
    thread.start()

    def end():
        done.set()
        thread.join()
        return raised

    return end


def test_one_thread_records_while_another_reads():
    monitor = Monitor(on_alert=lambda alert: None)

    def read():
        history = monitor.history
        assert len({len(column) for column in history.values()}) == 1
        np.testing.assert_array_equal(history["grad_norm"], 1 + history["step"] % 7)
        leaves, summary = monitor.leaf_norms, monitor.summary()
        assert all(len(column) >= len(history["step"]) for column in leaves.values())
        assert summary["records"] == (0 if summary["step"] is None else summary["step"] + 1)
        assert len(monitor.norms["step"]) >= summary["records"]

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads take turns as often as they can
    try:
        raised = in_a_thread(read)
        for step in range(3000):
            monitor.record(step, {"grad_norm": 1.0 + step % 7, "grad_norm/w": 1.0})
        assert raised() == []
    finally:
        sys.setswitchinterval(interval)
    assert monitor.history["step"].tolist() == list(range(3000))


def test_a_reader_that_waits_for_the_device_keeps_nobody_from_recording(monkeypatch):
    waits, arrived = threading.Event(), threading.Event()
    read = Fetch.read

    def slow(fetch):
        waits.set()
        assert arrived.wait(60)
        return read(fetch)

    monkeypatch.setattr(Fetch, "read", slow)
    monkeypatch.setattr(Fetch, "is_ready", lambda fetch: False)
    monitor = Monitor()
    monitor.record(0, {"grad_norm": 1.0})
    reader = threading.Thread(target=monitor.flush)
    reader.start()
    assert waits.wait(60)
    for step in range(1, 9):
        monitor.record(step, {"grad_norm": 1.0})  # would hang if it waited for the reader
    arrived.set()
    reader.join()
    assert monitor.history["step"].tolist() == list(range(9))


def test_ctrl_c_within_a_record_leaves_columns_of_one_length():
    class Interrupted(array):
        def append(self, value):
            raise KeyboardInterrupt

    monitor = Monitor()
    monitor.record(0, {"grad_norm": 3.0, "grad_norm/w": 3.0})
    monitor._history._columns["clipped"] = Interrupted("d", monitor._history._columns["clipped"])
    with pytest.raises(KeyboardInterrupt):
        monitor.record(1, {"grad_norm": 4.0, "grad_norm/w": 4.0, "grad_norm/b": 4.0})
    monitor._history._columns["clipped"] = array("d", monitor._history._columns["clipped"])
    assert {len(column) for column in monitor.history.values()} == {1}
    monitor.record(2, {"grad_norm": 5.0, "grad_norm/w": 5.0})
    assert {len(column) for column in monitor.history.values()} == {2}
    assert monitor.history["grad_norm"].tolist() == monitor.norms["grad_norm"].tolist() == [3, 5]
    assert monitor.leaf_norms["w"].tolist() == [3, 5]
    assert len(monitor.leaf_norms["b"]) == 2


@pytest.mark.parametrize(
    "step", [2**63, -(2**63) - 2**12, 10**400, math.nan, math.inf], ids=lambda x: str(x)[:6]
)
def test_a_step_that_no_column_holds_is_refused_and_leaves_no_trace(step):
    monitor = Monitor()
    monitor.record(1, {"grad_norm": 1.0, "grad_norm/w": 1.0})
    with pytest.raises(ValueError, match="`step` must "):
        monitor.record(step, {"grad_norm": 2.0, "grad_norm/w": 2.0, "grad_norm/b": 2.0})
    monitor.record(2, {"grad_norm": 3.0, "grad_norm/w": 3.0})
    assert {len(column) for column in monitor.history.values()} == {2}
    assert {path: norms.tolist() for path, norms in monitor.leaf_norms.items()} == {"w": [1, 3]}


def test_a_monitor_can_be_copied_and_pickled():
    monitor = Monitor()
    monitor.record(0, {"grad_norm": 3.0})
    for copied in (copy.deepcopy(monitor), pickle.loads(pickle.dumps(monitor))):
        copied.record(1, {"grad_norm": 4.0})
        assert copied.norms["grad_norm"].tolist() == [3, 4]
    assert monitor.norms["grad_norm"].tolist() == [3]


# --- from the device ---


def test_recording_waits_for_nothing_until_it_is_eight_records_behind(monkeypatch):
    monkeypatch.setattr(Fetch, "is_ready", lambda fetch: False)
    monitor, rows = Monitor(writers=[lambda step, row: rows.append(step)]), []
    for step in range(10):
        monitor.record(step, {"grad_norm": jnp.float32(step)})
    assert rows == [0, 1]
    monitor.flush()
    assert rows == list(range(10))
    assert monitor.history["grad_norm"].tolist() == list(range(10))


def test_a_state_that_is_donated_next_was_copied(monkeypatch):
    monkeypatch.setattr(Fetch, "is_ready", lambda fetch: False)
    clip = gradclip_jax.clip_by_global_norm(1.0)
    step = jax.jit(lambda grads, state: clip.update(grads, state)[1], donate_argnums=1)
    state, monitor = clip.init(jnp.zeros(2)), Monitor()
    for number in range(4):
        state = step(jnp.array([3.0, 4.0]) * (number + 1), state)
        monitor.record(number, metrics(state))
    assert monitor.history["grad_norm"].tolist() == [5, 10, 15, 20]


def test_values_may_be_replicated_or_lie_on_several_devices(mesh):
    replicated = jax.device_put(jnp.float32(3), NamedSharding(mesh, PartitionSpec()))
    monitor = Monitor()
    elsewhere = jax.device_put(jnp.bfloat16(2), jax.devices()[3])
    numbers = {"grad_norm": replicated, "clip_limit": np.float32(1)}
    for step, kind in enumerate((AxisType.Auto, AxisType.Explicit)):
        with jax.set_mesh(make_mesh(kind, data=8)):
            monitor.record(jnp.int32(step), numbers, loss=elsewhere)
    assert monitor.history["grad_norm"].tolist() == [3, 3]
    assert monitor.history["loss"].tolist() == [2, 2]


def test_a_window_may_be_split_over_devices(mesh):
    split = jax.device_put(jnp.arange(8.0), NamedSharding(mesh, PartitionSpec("data")))
    monitor = Monitor()
    monitor.record(7, {"grad_norm": split})
    assert monitor.norms["grad_norm"].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


def test_a_counter_beyond_2_to_the_24_is_exact(x64):
    monitor = Monitor(writers=[lambda step, row: rows.append(row)])
    rows = []
    monitor.record(0, {"step_count": jnp.int32(2**24 + 1), "grad_norm": jnp.float64(1 / 3)})
    monitor.flush()
    assert rows[0]["step_count"] == 2**24 + 1
    assert rows[0]["grad_norm"] == 1 / 3


def test_traced_values_are_refused():
    monitor = Monitor()
    with pytest.raises(ValueError, match="`grad_norm` must be the result of a finished step"):
        jax.jit(lambda x: monitor.record(0, {"grad_norm": x}))(1.0)


def test_windows_must_agree_and_steps_must_rise():
    monitor = Monitor()
    with pytest.raises(ValueError, match=r"`loss` must be a scalar or have 3 values, .* got 2"):
        monitor.record(2, {"grad_norm": np.ones(3)}, loss=np.ones(2))
    with pytest.raises(ValueError, match=r"`grad_norm` must be a scalar, or a vector .*\(2, 2\)"):
        monitor.record(2, {"grad_norm": np.ones((2, 2))})
    monitor.record(5, {"grad_norm": 1.0})
    with pytest.raises(ValueError, match=r"`step` must rise .*, got 5 after 5: a new run needs"):
        monitor.record(5, {"grad_norm": 1.0})
    with pytest.raises(ValueError, match="got 6 after 7"):
        monitor.record(np.array([7, 6]), {"grad_norm": np.ones(2)})
    monitor.record(6, {"grad_norm": 1.0})
    assert monitor.history["step"].tolist() == [5, 6]


STATE = gradclip_jax.clip_by_global_norm(1.0).init(jnp.ones(2))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (({"grad_norm": 1.0}, 1), r"^`step` must be .* come first, `record\(step, metrics\)`"),
        ((None, {"grad_norm": 1.0}), "^`step` must be the number of the step"),
        (("a", {"grad_norm": 1.0}), "^`step` must be a number or numbers, got 'a'"),
        ((1, STATE), r"^`metrics` must be .* got ClipState: call `record\(step, gradclip_jax\.me"),
        ((1, 2.0), "^`metrics` must be a dict of numbers"),
        (
            (1, {"norm": 1.0}),
            r"^`metrics` must have .* knows \(grad_norm, .* got only norm: rename",
        ),
        (
            (1, {"grad_norm": {"w": 1.0}}),
            "^`grad_norm` must be a number or numbers, got {'w': 1.0}",
        ),
        ((1, {"loss": "loss"}), "^`loss` must be a number or numbers, got 'loss'"),
    ],
)
def test_what_cannot_be_recorded_raises_and_leaves_nothing_behind(arguments, error):
    monitor = Monitor()
    with pytest.raises(ValueError, match=error):
        monitor.record(*arguments)
    monitor.record(1, {"grad_norm": 1.0})
    assert monitor.history["step"].tolist() == [1]


def test_step_and_metrics_alone_are_positional():
    with pytest.raises(TypeError, match="3 positional arguments"):
        Monitor().record(0, {"grad_norm": 1.0}, 0.5)


def test_numbers_that_the_monitor_does_not_know_go_to_the_writers():
    rows = []
    with Monitor(writers=[lambda step, row: rows.append(row["accuracy"])]) as monitor:
        monitor.record(1, {"accuracy": 0.5})
    assert rows == [0.5]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"max_rate": 0.0}, "`max_rate` must be above 0 and at most 1, got 0.0"),
        ({"max_rate": 1.5}, "`max_rate` must be above 0 and at most 1, got 1.5"),
        ({"window": 19}, "`window` must be a whole number of at least 20, got 19"),
        ({"on_alert": 1}, "`on_alert` must be a function of an `Alert`, got 1"),
        ({"writers": ["file"]}, "`writers` must be functions of step and row, got 'file'"),
    ],
)
def test_arguments_are_checked(options, error):
    with pytest.raises(ValueError, match=error):
        Monitor(**options)


# --- alerts ---


def test_without_a_callback_an_alert_is_a_warning_where_record_was_called():
    monitor = Monitor()
    with pytest.warns(
        ClipWarning, match=r"NaN or infinite at step 3: the loss\. .*skip_non"
    ) as seen:
        monitor.record(3, {}, loss=math.nan)
    assert seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monitor.record(4, {}, loss=math.nan)


def test_a_callback_that_raises_leaves_a_monitor_that_goes_on():
    def stop(alert):
        raise RuntimeError(alert.kind)

    monitor = Monitor(on_alert=stop)
    with pytest.raises(RuntimeError, match="nonfinite"):
        monitor.record(0, {}, loss=math.inf)
    monitor.record(1, {}, loss=1.0)
    assert kinds(monitor.alerts) == ["nonfinite"]
    assert monitor.history["step"].tolist() == [0, 1]


def test_an_episode_is_told_once_and_ends_after_a_window_without_it():
    losses = np.random.default_rng(0).random(1000)
    losses[[10, 60, 240, 700]] = np.nan  # the second pause is 460 steps long
    alerts = alerts_of({"grad_norm": noisy(0, 1000)}, losses)
    assert [(alert.kind, alert.step, alert.since) for alert in alerts] == [
        ("nonfinite", 10, 10),
        ("nonfinite", 700, 700),
    ]


def test_records_far_apart_are_five_before_an_episode_ends():
    losses = [1.0, math.nan, 1.0, math.nan, *6 * [1.0], math.nan]
    alerts = []
    monitor = Monitor(on_alert=alerts.append)
    for i, loss in enumerate(losses):
        monitor.record(1000 * i, {}, loss=loss)
    assert [alert.step for alert in alerts] == [1000, 10_000]


def test_the_leaf_that_is_not_finite_is_named():
    numbers = {"grad_norm": [math.nan], "grad_norm/a": [1.0], "grad_norm/b": [math.inf]}
    (alert,) = alerts_of(numbers, [math.nan])
    assert "the loss and the norm of the gradient (in b)" in alert.message


@pytest.mark.parametrize("how", [{}, {"every": 10}, {"window": 25}, {"window": 300}], ids=str)
def test_a_limit_that_is_far_too_low(how):
    (alert,) = alerts_of(clipped_run(5 * noisy(0, 600), 0.1), **how)
    assert alert.kind == "limit_too_low"
    assert alert.step <= 299
    assert "The clip acted on 100% of the updates from step 0" in alert.message
    assert "the limit is 0.1, the median norm " in alert.message
    assert "Under Adam and its like it matters little" in alert.advice
    assert alerts_of(clipped_run(5 * noisy(0, 600), 0.1), max_rate=1.0, **how) == []


def test_norms_that_fall_to_the_limit_are_no_alarm():
    norms = (10 * np.exp(-np.arange(600) / 70) + 0.5) * noisy(0, 600)
    assert np.mean(norms[:200] > 1) > 0.9
    assert alerts_of(clipped_run(norms, 1.0)) == []


def test_the_share_of_groups_counts_and_not_that_some_group_is_clipped():
    numbers = clipped_run(noisy(0, 600), 0.01) | {"clipped": np.full(600, 0.02)}
    assert alerts_of(numbers) == []


@pytest.mark.parametrize("how", [{}, {"every": 10}, {"window": 25}], ids=str)
def test_a_limit_that_is_far_too_high(how):
    (alert,) = alerts_of(clipped_run(noisy(0, 600), 100.0), **how)
    assert alert.kind == "limit_inert"
    assert alert.step <= 224
    assert "The clip has not acted once in 2" in alert.message
    assert alerts_of(clipped_run(noisy(0, 600), math.inf), **how) == []


def test_a_limit_that_is_somewhat_too_high_is_told_after_1000_updates():
    norms = noisy(0, 1200)
    (alert,) = alerts_of(clipped_run(norms, 2 * norms.max()), every=10)
    assert (alert.kind, alert.step) == ("limit_inert", 1000)
    norms[3] = 10 * norms.max()
    assert alerts_of(clipped_run(norms, 2 * norms[4:].max()), every=10) == []


@pytest.mark.parametrize(
    ("rate", "how"),
    [(0.5, {}), (0.1, {}), (0.1, {"window": 20}), (0.03, {"window": 20}), (0.01, {"window": 20})],
)
def test_exponential_growth_is_told_before_it_is_hundredfold(rate, how):
    steps = np.arange(int(300 + 6 / rate))
    growth = np.exp(rate * np.maximum(steps - 300, 0))
    alert = alerts_of(clipped_run(growth * noisy(1, len(steps)), math.inf), **how)[0]
    assert alert.kind == "norm_growing"
    assert growth[alert.step - how.get("window", 1)] < 300
    assert 300 - 2.5 / rate < alert.since < 300 + 2.5 / rate
    doubling = float(alert.message.split("doubling every ")[1].split()[0])
    assert 0.5 < doubling * rate / math.log(2) < 2


def test_the_slope_is_robust():
    x = np.arange(20.0)
    y = 0.5 * x
    y[[3, 9, 15, 19]] = 1e6
    assert theil_sen(x, y) == pytest.approx(0.5)


@pytest.mark.parametrize("how", [{}, {"every": 10}, {"window": 20}], ids=str)
def test_a_loss_spike(how):
    losses = 2.5 + 0.1 * np.random.default_rng(0).standard_normal(600)
    losses[400] = 5.0
    (alert,) = alerts_of({"grad_norm": noisy(0, 600)}, losses, **how)
    assert (alert.kind, alert.since) == ("loss_spike", 400)
    assert "The loss was 5 at step 400; before, its median was 2.4" in alert.message


def test_a_run_that_goes_astray_in_its_first_steps():
    losses = np.array([4.6, 3.7, 6.5, 11.7, 158, *(100 * noisy(0, 60))])
    (alert,) = alerts_of({"grad_norm": noisy(1, 65)}, losses)
    assert (alert.kind, alert.since) == ("diverged", 4)
    assert "it began at 6.5" in alert.message


def test_a_leaf_that_dominates_the_norm():
    noise = np.random.default_rng(0).random((3, 100))
    numbers = {f"grad_norm/{name}": 1 + row for name, row in zip("abc", noise, strict=True)}
    assert alerts_of(numbers) == []
    (alert,) = alerts_of(numbers | {"grad_norm/b": 20 + noise[1]})
    # As a stack with one layer of that norm: the whole has as much of it, but is no other leaf.
    whole = {"grad_norm/b": 20 + noise[1], "grad_norm/b/0": 1 + noise[0]}
    (of_layer,) = alerts_of(numbers | whole | {"grad_norm/b/1": 20 + noise[1]})
    assert of_layer.message.startswith("`b/1` has had 9")
    assert (alert.kind, alert.step) == ("dominating_leaf", 19)
    assert "`b` has had 98.9% of the squared norm of 3 leaves since step 0" in alert.message


def test_a_norm_that_does_not_change_is_frozen():
    (alert,) = alerts_of({"grad_norm": np.full(200, 1.0)})
    assert (alert.kind, alert.step, alert.since) == ("frozen", 100, 0)
    assert "The norm of the gradient has been 1 ever since step 0" in alert.message
    accumulated = np.repeat(noisy(0, 10), 64)  # `MultiSteps` over 64
    assert alerts_of({"grad_norm": accumulated, "step_count": np.repeat(np.arange(10), 64)}) == []


# --- a healthy run raises nothing ---


def autoregressive(seed, count):
    noise = np.random.default_rng(seed).standard_normal(count)
    for i in range(1, count):
        noise[i] = 0.9 * noise[i - 1] + 0.44 * noise[i]
    return np.exp(0.3 * noise)


def healthy(seed, count=500):
    """Norms and a limit."""
    t, draw = np.arange(count), np.random.default_rng(seed)
    return {
        "lognormal": (noisy(seed, count, 0.7), 3.0),
        "Student's t with 1.5 degrees": (0.1 + np.abs(draw.standard_t(1.5, count)), 6.0),
        "Pareto of index 1": (1 + draw.pareto(1.0, count), 10.0),
        "autoregressive": (autoregressive(seed, count), 1.6),
        "decaying": ((10 * np.exp(-t / 60) + 0.5) * noisy(seed, count), 1.0),
        "decaying by a power": ((1 + t) ** -0.5 * noisy(seed, count), 0.3),
        "warm-up": (np.minimum(1, (1 + t) / 100) * noisy(seed, count), 1.5),
        "rising": (np.sqrt(1 + t) * noisy(seed, count), 30.0),
        "falls and rises": ((3 * np.exp(-t / 20) + 0.2 + t / 300) * noisy(seed, count), 3.0),
        "scheduled limit": (noisy(seed, count), np.where(t < 100, 10.0, 1.5)),
    }


@pytest.mark.parametrize("seed", range(4))
def test_healthy_norms_raise_nothing(seed):
    t, draw = np.arange(500), np.random.default_rng(seed)
    losses = 2 + 2.6 * np.exp(-t / 80) + 0.1 * draw.standard_t(4, 500)
    for name, (norms, limit) in healthy(seed).items():
        how = ({}, {"every": 5}, {"window": 20}, {"every": 2})[seed % 4]
        alerts = alerts_of(clipped_run(norms, limit), losses, **how)
        assert not alerts, (name, str(alerts[0]))


# --- a language model ---

STEPS, TIME, BATCH, UNITS = 500, 8, 8, 8


@pytest.fixture(scope="module")
def language_model():
    """A tiny LSTM on words of a made-up language; `run(limits, scales)` gives its metrics.

    `scales` multiply the loss of each step. All runs are one program.
    """
    draw = np.random.default_rng(0)
    words = ["".join(draw.choice(list("abcdefgh"), draw.integers(2, 5))) for _ in range(20)]
    text = " ".join(draw.choice(words, 1 + STEPS * TIME * BATCH))
    tokens = np.array([" abcdefgh".index(letter) for letter in text])[: STEPS * TIME * BATCH + 1]
    pieces = tokens[:-1].reshape(BATCH, STEPS, TIME), tokens[1:].reshape(BATCH, STEPS, TIME)
    inputs, targets = (jnp.asarray(piece.transpose(1, 2, 0)) for piece in pieces)
    model = LanguageModel(9, "lstm", 1, UNITS, 0.0, rngs=nnx.Rngs(0))
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, carry, inputs, targets):
        logits, carry = nnx.merge(graph, params, rest)(inputs, carry, deterministic=True)
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return nats.mean(), carry

    def run(limit, scales):
        clip = gradclip_jax.clip_by_global_norm(limit)
        optimizer = optax.chain(clip, optax.sgd(0.5, momentum=0.9))

        def step(carry, data):
            params, state, hidden = carry
            *data, scale = data
            grad = jax.value_and_grad(
                lambda p: _scaled(loss(p, hidden, *data), scale), has_aux=True
            )
            (value, hidden), grads = grad(params)
            updates, state = optimizer.update(grads, state, params)
            seen = {"loss": value, **metrics(state)}
            return (optax.apply_updates(params, updates), state, hidden), seen

        start = params, optimizer.init(params), model.start(BATCH)
        return jax.lax.scan(step, start, (inputs, targets, scales))[1]

    runs = jax.jit(jax.vmap(run))
    return lambda limits, scales: jax.device_get(runs(jnp.asarray(limits), jnp.asarray(scales)))


def _scaled(loss_and_carry, scale):
    loss, carry = loss_and_carry
    return scale * loss, carry


def test_a_language_model_raises_the_right_alert_and_no_other(language_model, standard_promotion):
    scales = np.ones((5, STEPS), np.float32)
    scales[4, 300] = 1e6  # an explosion
    limits = np.array([np.inf, 0.3, 1e-3, 1e4, 0.3], np.float32)
    seen = language_model(limits, scales)
    numbers = [{key: value[i] for key, value in seen.items()} for i in range(5)]
    for window in (1, 20):
        found = [kinds(alerts_of(run, window=window)) for run in numbers]
        assert found == [[], [], ["limit_too_low"], ["limit_inert"], ["loss_spike"]]
    losses = seen["loss"]
    assert losses[1, -20:].mean() < 0.7 * losses[1, 0]
    suggestion = suggest_max_norm(numbers[0]["grad_norm"])
    assert 0.1 < suggestion.max_norm < 1
    assert suggestion.rate == pytest.approx(0.05, abs=0.02)


# --- choosing a limit ---


def test_the_limit_suggested_clips_the_wanted_share():
    norms = noisy(0, 1000, 0.5)
    for rate in (0.01, 0.05, 0.2):
        suggestion = suggest_max_norm(norms, rate=rate)
        assert suggestion.rate == pytest.approx(rate, abs=0.3 * rate)
        assert suggestion.rate == np.mean(norms > suggestion.max_norm)


def test_a_part_of_the_run_that_exploded_does_not_move_the_limit():
    norms = noisy(0, 1000, 0.3)
    norms[800:] = 1e6
    suggestion = suggest_max_norm(norms)
    assert 1 < suggestion.max_norm < 5
    assert suggestion.rate == pytest.approx(0.2, abs=0.01)


def test_norms_that_are_not_finite_are_left_out_and_counted():
    suggestion = suggest_max_norm(np.array([[1.0, 2.0], [np.inf, np.nan]]), candidates=[1.5])
    assert (suggestion.count, suggestion.nonfinite) == (2, 2)
    assert suggestion.candidates == ((1.5, 0.5),)
    assert (suggestion.smallest, suggestion.largest) == (1, 2)
    assert suggest_max_norm(np.zeros(5)).max_norm == 0


def test_a_suggestion_prints_candidates_and_rules_of_thumb():
    text = str(suggest_max_norm([*noisy(0, 999), np.nan]))
    assert "would have clipped" in text
    assert "1 not finite, left out" in text
    assert "AWD-LSTM (Merity et al. 2017, arXiv 1708.02182)" in text
    assert "half to ten times the mean norm" in text
    assert max(len(line) for line in text.splitlines()) <= 100
    rates = [rate for _, rate in suggest_max_norm(noisy(0, 1000)).candidates]
    np.testing.assert_allclose(rates, [0.5, 0.25, 0.1, 0.05, 0.01, 0.001], rtol=0.5)


@pytest.mark.parametrize(
    ("norms", "options", "error"),
    [
        ([], {}, "`norms` must hold a finite norm, got 0 of which none is"),
        ([math.nan], {}, "`norms` must hold a finite norm, got 1 of which none is"),
        ([1.0, -2.0], {}, "`norms` must be non-negative, got -2"),
        ([1.0], {"rate": 1.0}, r"`rate` must lie between 0 and 1 \(exclusive\), got 1.0"),
        ([1.0], {"candidates": [-1.0]}, "`candidates` must be non-negative, got -1.0"),
    ],
)
def test_what_cannot_be_suggested_raises(norms, options, error):
    with pytest.raises(ValueError, match=error):
        suggest_max_norm(norms, **options)


def test_a_sweep_says_when_other_limits_would_have_acted():
    monitor = Monitor(on_alert=lambda alert: None)
    monitor.record(3, {"grad_norm": np.array([1.0, 3.0, np.nan, 7.0])})
    low, high, none = monitor.sweep([2.0, 5.0, 9.0])
    assert (low.count, low.rate, low.first_step, low.steps.tolist()) == (2, 2 / 3, 1, [1, 3])
    assert (high.max_norm, high.first_step, high.steps.tolist()) == (5.0, 3, [3])
    assert (none.count, none.rate, none.first_step) == (0, 0.0, None)
    assert monitor.suggest(candidates=[2.0]).candidates == ((2.0, 2 / 3),)


def test_docstrings_name_every_kind_of_alert_and_every_column():
    for kind in Monitor()._episodes.conditions:
        assert f"| `{kind}` |" in (Alert.__doc__ or "")
    for column in COLUMNS:
        assert f"`{column}`" in (Monitor.history.__doc__ or "")


def test_steps_between_two_records_are_judged_by_the_counter():
    """Every second step is clipped, and only those are recorded."""
    norms = noisy(0, 600, 0.1) * np.where(np.arange(600) % 2, 0.5, 2.0)
    assert alerts_of(clipped_run(norms, 1.0), every=2) == []
