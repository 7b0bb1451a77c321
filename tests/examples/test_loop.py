"""What all examples share: a loop that continues bit for bit, and refusals in one line."""

import errno
import importlib.util
import json
import math
import os
import resource
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from matplotlib.figure import Figure
from tensorboardX.record_writer import RecordWriter

import gradclip_jax
from examples.language_model.command_line import InputError, command_line, run
from examples.language_model.directory import write_json
from examples.language_model.loop import train
from examples.language_model.plots import label_lines
from examples.language_model.progress import numbers, plain
from examples.language_model.scalars import advice

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


def test_a_run_that_was_interrupted_continues_bit_for_bit(tmp_path, capsys):
    (whole, *_), losses = loop(tmp_path / "whole", 30)
    with pytest.raises(KeyboardInterrupt):
        loop(tmp_path / "parts", 30, stop_at=17)
    (parts, *_), again = loop(tmp_path / "parts", 30)
    assert (
        f"line: continues from step 18 of 30 in {tmp_path / 'parts'}\n" in capsys.readouterr().out
    )
    assert losses == again
    assert len(losses["loss"]) == 30
    np.testing.assert_array_equal(whole, parts)


def test_a_finished_run_is_not_run_again_and_says_how_to_train_anew(tmp_path, capsys):
    _, before = loop(tmp_path, 12)
    _, after = loop(tmp_path, 12, stop_at=0)
    assert before == after
    assert f"line: finished. To train anew, delete {tmp_path} or" in capsys.readouterr().out


def test_the_directory_of_another_run_is_refused(tmp_path):
    loop(tmp_path, 2, learning_rate=0.1)
    with pytest.raises(InputError, match=r"learning_rate 0.1 \(now 0.2\)"):
        loop(tmp_path, 2, learning_rate=0.2)


def test_a_checkpoint_of_another_step_is_refused(tmp_path):
    """The step is the name of its directory: a renamed one would go on with the wrong data."""
    loop(tmp_path, 20)
    checkpoints = tmp_path / "checkpoints"
    (checkpoints / "20").rename(checkpoints / "25")
    with pytest.raises(InputError, match=r"checkpoints/25: the checksum differs\..*from step 10"):
        loop(tmp_path, 30)


def test_the_names_of_lines_do_not_overlap_and_stay_at_the_axes():
    axes = Figure(figsize=(4, 3), dpi=72).subplots()
    axes.set(ylim=(0, 10))
    heights = [0.0, 0.1, 5.0, 9.9, 10.0, math.inf]
    label_lines(axes, [(y, f"line {y}", "k") for y in heights], gap=13)
    names = sorted(axes.texts, key=lambda text: heights.index(float(text.get_text()[5:])))
    points = np.array([text.xy[1] for text in names]) * axes.bbox.height
    assert np.diff(points).min() > 12.99
    assert points[2] == pytest.approx(axes.bbox.height / 2)
    assert points[0] >= 0
    assert points[-1] <= axes.bbox.height


def test_tensorboard_is_advised_where_it_is_installed(monkeypatch):
    for found, told in ((None, ""), (object(), "\nScalars: tensorboard --logdir runs")):
        monkeypatch.setattr(importlib.util, "find_spec", lambda _, found=found: found)
        assert advice(Path("runs")) == told


def test_numbers_in_the_progress_have_no_exponent():
    history = {"loss": [math.log(2)], "grad_norm": [4100.4], "clipped": [1.0]}
    shown = numbers(history, ("bits per character", math.log(2)))
    assert shown == "loss 1.000 bits per character · norm 4,100 · clipped 100%"
    assert [plain(x) for x in (0.0123, 1.234, 12.34)] == ["0.012", "1.23", "12.3"]


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
OF_TENSORSTORE = ValueError(
    "RESOURCE_EXHAUSTED: Error writing local file: Failed to write 27451 bytes to file 17: "
    "No space left on device [os_error_code='28']"
)


@pytest.mark.parametrize("error", [FULL, OF_TENSORSTORE])
def test_a_full_disk_is_told_in_one_line_and_the_last_checkpoint_stays(
    error, tmp_path, monkeypatch, capsys
):
    whole, losses = loop(tmp_path / "whole", 30)
    with monkeypatch.context() as patch:
        save = ocp.CheckpointManager.save

        def full(manager, step, **options):
            if step > 10:
                raise error
            return save(manager, step, **options)

        patch.setattr(ocp.CheckpointManager, "save", full)
        parser, out = command_line("What it does.", "name"), tmp_path / "run"
        assert run(parser, lambda args: loop(args.out, 30), ["--out", str(out)]) == 2
    told = capsys.readouterr().err
    assert told.endswith(
        f"`--out` must be a directory that can be written, got {out / 'checkpoints'}: No space "
        "left on device. The checkpoint of step 20 is not saved; with room for it, the same "
        "command goes on from step 10.\n"
    )
    assert told.count("\n") == 1
    again, all_losses = loop(out, 30)
    assert all_losses == losses
    np.testing.assert_array_equal(again[0], whole[0])


def test_an_error_that_is_not_of_the_disk_is_not_called_one(tmp_path, monkeypatch):
    def wrong(*_, **__):
        raise ValueError("a mistake in the program")

    monkeypatch.setattr(ocp.CheckpointManager, "save", wrong)
    with pytest.raises(ValueError, match="a mistake in the program"):
        loop(tmp_path, 10)


def test_scalars_that_find_no_room_end_the_run_in_one_line(tmp_path, monkeypatch):
    """A thread of tensorboardX died of it, and the run waited for that thread forever."""

    def full(*_):
        raise FULL

    monkeypatch.setattr(RecordWriter, "flush", full)
    monkeypatch.setattr(RecordWriter, "close", full)
    with pytest.raises(InputError, match=f"got {tmp_path}: No space left on device"):
        loop(tmp_path, 10)


def test_a_file_that_found_no_room_leaves_nothing(tmp_path):
    write_json(tmp_path / "config.json", {"a": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(InputError, match=f"got {tmp_path}: File too large"):
            write_json(tmp_path / "config.json", {"a": "2" * 10_000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]
    assert json.loads((tmp_path / "config.json").read_text()) == {"a": 1}


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
