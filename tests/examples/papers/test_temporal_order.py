"""Temporal order: the sequences, Ω and its gradient, and all runs in one vmapped program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.papers import temporal_order


@pytest.fixture(autouse=True)
def _small_test(monkeypatch):
    monkeypatch.setattr(temporal_order, "TEST", 200)


def test_a_sequence_hides_two_symbols_that_name_its_class():
    draw = jax.jit(temporal_order.sequences, static_argnums=(1, 2))
    symbols, classes = map(np.asarray, draw(jax.random.key(0), 30, 400))
    assert symbols.shape == (30, 400)
    hidden = symbols < 2
    times = np.argwhere(hidden.T)[:, 1].reshape(400, 2)
    np.testing.assert_array_equal(np.unique(times[:, 0]), [3, 4, 5])
    np.testing.assert_array_equal(np.unique(times[:, 1]), [15, 16, 17])
    first, second = symbols.T[hidden.T].reshape(400, 2).T
    np.testing.assert_array_equal(classes, 2 * first + second)
    assert set(np.unique(symbols)) == set(range(6))
    assert set(np.unique(classes)) == set(range(4))


def network(units: int, length: int, count: int):
    """A tiny network in float64, its batch, and by hand its states and errors dE/dx_t."""
    rng = np.random.default_rng(0)
    sizes = {"input": (6, units), "recurrent": (units, units), "bias": (units,),
             "output": (units, 4), "output_bias": (4,)}  # fmt: skip
    params = {name: rng.normal(0, 0.6, size) for name, size in sizes.items()}
    draw = jax.jit(temporal_order.sequences, static_argnums=(1, 2))
    symbols, classes = map(np.asarray, draw(jax.random.key(1), length, count))
    states, state = [], np.zeros((count, units))
    for row in symbols:
        state = np.tanh(state @ params["recurrent"] + params["input"][row] + params["bias"])
        states.append(state)
    logits = state @ params["output"] + params["output_bias"]
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    error = (probabilities - np.eye(4)[classes]) / count @ params["output"].T
    errors = []
    for state in states[::-1]:
        errors.append(error * (1 - state**2))
        error = errors[-1] @ params["recurrent"].T
    return params, (symbols, classes), np.stack(states), np.stack(errors[::-1])


def omega_by_hand(recurrent, states, errors) -> float:
    """The equation with loops, one Jacobian at a time."""
    terms = []
    for k in range(len(states) - 1):
        for state, error in zip(states[k], errors[k + 1], strict=True):
            jacobian = recurrent.T @ np.diag(1 - state**2)  # x_{k+1} by x_k
            terms.append((np.linalg.norm(error @ jacobian) / np.linalg.norm(error) - 1) ** 2)
    return float(np.sum(terms)) / states.shape[1]


def test_the_gradient_of_omega_is_its_immediate_derivative(x64):
    params, batch, states, errors = network(units=4, length=10, count=3)
    gradient = jax.jit(temporal_order.gradient)
    _, plain = gradient(params, batch, None)
    _, full = gradient(params, batch, jnp.float64(4.0))
    for name in params:
        if name != "recurrent":
            np.testing.assert_allclose(plain[name], full[name], rtol=1e-12)
    np.testing.assert_allclose(plain["bias"], errors.sum(axis=(0, 1)), rtol=1e-9)

    recurrent = params["recurrent"]
    value = jax.jit(temporal_order.omega)(recurrent, states, errors)
    np.testing.assert_allclose(value, omega_by_hand(recurrent, states, errors), rtol=1e-9)
    slopes = np.zeros_like(recurrent)
    for i, j in np.ndindex(*recurrent.shape):
        step = np.zeros_like(recurrent)
        step[i, j] = 1e-5
        above, below = (omega_by_hand(recurrent + s, states, errors) for s in (step, -step))
        slopes[i, j] = (above - below) / 2e-5
    np.testing.assert_allclose(full["recurrent"] - plain["recurrent"], 4 * slopes, rtol=1e-6)


def test_omega_leaves_out_errors_that_have_vanished_and_has_no_nan():
    states = jnp.zeros((4, 1, 3))
    errors = jnp.ones((4, 1, 3)).at[1].set(0)
    omega = jax.jit(jax.value_and_grad(temporal_order.omega))
    value, slope = omega(2 * jnp.eye(3), states, errors)
    assert value == 2 * (2 - 1) ** 2
    # Two terms (‖2 e‖ / ‖e‖ − 1)² with e = (1, 1, 1): each has the slope 2 · 1 / 3.
    np.testing.assert_allclose(slope, np.full((3, 3), 4 / 3), rtol=1e-6)
    for nothing in ((states, 0 * errors), (jnp.ones((4, 1, 3)), errors)):
        np.testing.assert_array_equal(omega(jnp.eye(3), *nothing)[1], np.zeros((3, 3)))


def block(runs: temporal_order.Run, rows: list[int]) -> temporal_order.Run:
    return temporal_order.train_block(
        runs, jnp.array(rows), jnp.int32(0), base=0, length=10, updates=3, regularised=True
    )


def test_all_runs_together_equal_each_beside_copies_of_itself():
    """So each is held to its limit by its own norm, not by that of all."""
    runs = temporal_order.start(0, 2)
    # A limit of 1 is seldom reached so early.
    runs = runs._replace(limit=jnp.where(runs.limit == 1, 0.05, runs.limit))
    together = block(runs, [*range(6)])
    factors = np.asarray(together.opt_state[0].clip_factor)
    assert (factors[:2] == 1).all()
    assert (factors[2:] < 1).all()
    assert len(set(factors[2:])) == 4

    alone = runs
    for row in range(6):
        alone = block(alone, [row] * 6)
    for one, of_all in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
        np.testing.assert_allclose(one, of_all, rtol=2e-4, atol=1e-5)


def test_methods_share_weights_and_sequences_and_seeds_do_not():
    runs = temporal_order.start(0, 2)
    recurrent = np.asarray(runs.params["recurrent"])
    np.testing.assert_array_equal(recurrent[:2], recurrent[2:4])
    assert (recurrent[0] != recurrent[1]).all()
    # A gradient of 0 leaves the weights, so that the losses tell the sequences.
    losses = np.asarray(block(runs._replace(limit=jnp.zeros(6)), [*range(6)]).loss)
    np.testing.assert_allclose(losses[[0, 1]], losses[[2, 3]], rtol=1e-6)
    assert losses[0] != losses[1]


def test_three_updates_end_in_table_and_plot_and_go_on_to_six(tmp_path, monkeypatch, capsys):
    def command(updates: int, out: str) -> int:
        sizes = ["--check-every", "3", "--seeds", "2", "--lengths", "10"]
        return temporal_order.main(["--steps", str(updates), *sizes, "--out", str(tmp_path / out)])

    def text(out: str) -> str:
        return (tmp_path / out / "results.txt").read_text()

    assert command(3, "parts") == 0
    for words in ("clip + Ω", "0/2", "lengths: [10]", "max_updates: 3", "jax "):
        assert words in text("parts")
    assert (tmp_path / "parts" / "temporal_order.png").stat().st_size > 10_000
    assert command(6, "parts") == 0
    assert command(6, "whole") == 0
    assert text("parts") == text("whole")

    def no_more(*_, **__):
        raise AssertionError("a run that is finished trains no more")

    monkeypatch.setattr(temporal_order, "train_block", no_more)
    assert command(6, "parts") == 0
    assert command(3, "parts") == 2
    assert "`--max-updates` must be at least 6" in capsys.readouterr().err


def test_a_run_that_is_solved_trains_no_more(tmp_path, monkeypatch):
    """The first to be solved are those with a limit, then seed 0."""
    trained = []

    def solve(runs, rows, number, **options):
        trained.append((rows.tolist(), options["regularised"]))
        solved = runs.solved | (runs.limit == 1 if number == 0 else runs.seed == 0)
        return runs._replace(solved=solved, norms=runs.norms + 1)

    monkeypatch.setattr(temporal_order, "train_block", solve)
    sizes = ["--steps", "3", "--check-every", "1", "--seeds", "2", "--lengths", "10"]
    assert temporal_order.main([*sizes, "--out", str(tmp_path)]) == 0
    assert trained == [([0, 1, 2, 3, 4, 5], True), ([0, 1], False), ([1, 1], False)]
    text = (tmp_path / "results.txt").read_text()
    assert text.count("2/2") == 2
    assert text.count("1/2") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lengths", "20", "9"], "`--lengths` must be at least 10, got 9."),
        (["--max-updates", "0"], "`--max-updates` must be at least 1, got 0."),
        (["--max-updates", "1500"], "`--max-updates` must be a multiple of `--check-every`, 1000"),
        (["--seeds", "0"], "`--seeds` must be at least 1, got 0."),
    ],
)
def test_bad_input_is_refused_in_one_line(options, message, tmp_path, capsys):
    assert temporal_order.main([*options, "--out", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
