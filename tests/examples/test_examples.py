"""What all examples share: a loop that continues bit for bit, and refusals in one line."""

import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from shared.command_line import InputError, command_line, run
from shared.loop import train

import gradclip_jax

OPTIMIZER = optax.chain(gradclip_jax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9))


def loop(out: Path, steps: int, stop_at: int | None = None, **config):
    """Fit a line to noise that depends on a key in the state; Ctrl-C comes in step `stop_at`."""

    @jax.jit
    def update(state, number):
        params, opt_state, key = state
        key, use = jax.random.split(key)
        x = jax.random.normal(use, (8,)) + number.astype(jnp.float32)
        loss, grads = jax.value_and_grad(lambda w: jnp.mean((w * x - 2 * x) ** 2))(params)
        updates, opt_state = OPTIMIZER.update(grads, opt_state, params)
        scalars = {"loss": loss, **gradclip_jax.metrics(opt_state)}
        return (optax.apply_updates(params, updates), opt_state, key), scalars

    def step(state, number):
        if stop_at is not None and int(number) == stop_at:
            signal.raise_signal(signal.SIGINT)
        return update(state, number)

    state = (jnp.zeros(()), OPTIMIZER.init(jnp.zeros(())), jax.random.key(0))
    return train(
        step, state, steps, out, title="line", config=config, per_step=8, checkpoint_every=10
    )


def test_a_run_that_was_interrupted_continues_bit_for_bit(tmp_path):
    (whole, *_), losses = loop(tmp_path / "whole", 30)
    with pytest.raises(KeyboardInterrupt):
        loop(tmp_path / "parts", 30, stop_at=17)
    (parts, *_), again = loop(tmp_path / "parts", 30)
    assert losses == again
    assert len(losses["loss"]) == 30
    np.testing.assert_array_equal(whole, parts)


def test_a_finished_run_is_not_run_again(tmp_path):
    _, before = loop(tmp_path, 12)
    _, after = loop(tmp_path, 12, stop_at=0)
    assert before == after


def test_the_directory_of_another_run_is_refused(tmp_path):
    loop(tmp_path, 2, learning_rate=0.1)
    with pytest.raises(InputError, match=r"learning_rate 0.1 \(now 0.2\)"):
        loop(tmp_path, 2, learning_rate=0.2)


@pytest.mark.parametrize(
    ("error", "status"), [(None, 0), (InputError("`--x` must be 1."), 2), (KeyboardInterrupt, 130)]
)
def test_bad_input_and_ctrl_c_end_without_a_traceback(error, status, tmp_path, capsys):
    def main(args):
        if error:
            raise error

    parser = command_line("What it does.", "name")
    assert run(parser, main, ["--out", str(tmp_path)]) == status
    if status == 2:
        assert capsys.readouterr().err.endswith("error: `--x` must be 1.\n")
    assert run(parser, main, ["--seed", "-1"]) == 2
    assert "`--seed` must be at least 0, got -1" in capsys.readouterr().err
