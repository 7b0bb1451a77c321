"""Padding is not counted, each network keeps its own limit, and the music can be played."""

import argparse
import itertools
import signal
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.io
from flax import nnx

import gradclip_jax
from examples.papers import polyphonic_music as music

SMALL = music.SIGMOID._replace(units=4, length=6, batch=4)


def pieces(*lengths: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [(rng.random((length, music.KEYS)) < 0.05).astype(np.uint8) for length in lengths]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A small Nottingham.mat, as the published one is laid out."""
    content = {}
    for seed, split in enumerate(music.SPLITS):
        cells = np.empty((1, 3), object)
        cells[0, :] = pieces(9, 5, 12, seed=seed)
        content[f"{split}data"] = cells
    (tmp_path / "data").mkdir()
    scipy.io.savemat(tmp_path / "data" / "Nottingham.mat", content)
    return tmp_path / "data"


def network(recipe: music.Recipe = SMALL) -> music.Network:
    return music.Network(recipe, nnx.Rngs(0))


# Data and likelihood


def test_every_frame_but_the_first_is_predicted_once():
    whole = np.arange(14).reshape(-1, 1)
    parts = music.cut([whole, whole[:7], whole[:2]], 6)
    assert [part.ravel().tolist() for part in parts] == [
        [0, 1, 2, 3, 4, 5, 6], [6, 7, 8, 9, 10, 11, 12], [12, 13], [0, 1, 2, 3, 4, 5, 6], [0, 1],
    ]  # fmt: skip


def test_the_likelihood_is_that_of_the_equations_and_padding_is_not_counted():
    model, of_pieces = network(), pieces(7, 4, 2)
    rows, steps = music.pad(of_pieces, 9)
    got = nnx.jit(music.nats)(model, jnp.asarray(rows), jnp.asarray(steps))
    params = (model.layer.input, model.layer.recurrent, model.layer.bias, model.output, model.bias)
    w_in, w_rec, b, w_out, c = (np.asarray(param[...], np.float64) for param in params)
    for piece, nats in zip(of_pieces, got, strict=True):
        x, expected = np.zeros(4), 0.0
        for now, then in itertools.pairwise(piece):
            x = 1 / (1 + np.exp(-(w_rec.T @ x + w_in.T @ now + b)))
            chance = 1 / (1 + np.exp(-(w_out.T @ x + c)))
            expected -= np.sum(np.log(np.where(then, chance, 1 - chance)))
        np.testing.assert_allclose(nats, expected, rtol=1e-5)


def test_whole_pieces_are_scored_in_their_own_order_whatever_their_lengths():
    graph, params = nnx.split(network())
    both = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), params)
    of_pieces = pieces(*np.random.default_rng(0).integers(2, 30, 40))
    sums = music.scorer(graph)(both, of_pieces)
    assert sums.shape == (2, 40)
    doubled = nnx.merge(graph, jax.tree.map(lambda x: 2 * x, params))
    for number in (0, 39):
        row, steps = music.pad(of_pieces[number : number + 1], 29)
        alone = nnx.jit(music.nats)(doubled, jnp.asarray(row), jnp.asarray(steps))
        np.testing.assert_allclose(sums[1, number], alone[0], rtol=1e-5)


def test_the_two_averages_weigh_steps_or_pieces():
    per_step, per_piece = music.averages(np.array([[6.0, 8.0]]), pieces(2, 5))
    assert per_step == [14 / 5]  # 1 and 4 steps
    assert per_piece == [(6 / 1 + 8 / 4) / 2]


def test_counting_keys_knows_what_follows_what():
    # One key alternates: after 0 comes 1 four times of four, after 1 comes 0 four times of four.
    piece = np.zeros((9, music.KEYS), np.uint8)
    piece[1::2, 40] = 1
    collection = {key: [piece] for key in music.SPLITS}
    silent = np.log(9 / 8.5)  # a key that was off 8 times of 8, plus a half
    markov, _ = music.count_keys(collection, markov=True)
    assert markov == pytest.approx(np.log(5 / 4.5) + 87 * silent)
    alone, _ = music.count_keys(collection, markov=False)
    assert alone == pytest.approx(np.log(2) + 87 * silent)


def test_the_pieces_made_up_are_chords_and_the_seed_decides_them():
    made = music.chord_progressions(0)
    assert [len(made[split]) for split in music.SPLITS] == [128, 32, 32]
    assert all(set(piece.sum(axis=1)) <= {5} for piece in made["train"])
    np.testing.assert_array_equal(made["test"][0], music.chord_progressions(0)["test"][0])
    assert len(made["test"][0]) != len(music.chord_progressions(1)["test"][0])


# Training


def state(recipe: music.Recipe, limits: jax.Array, rates: jax.Array):
    graph, first = nnx.split(network(recipe))
    params = jax.tree.map(lambda x: jnp.stack([x] * len(limits)), first)
    init = jax.jit(jax.vmap(lambda params, *method: music.optimizer(recipe, *method).init(params)))
    worst = jnp.full(len(limits), jnp.inf)
    opt_state = init(params, limits, rates)
    return graph, music.Training(params, opt_state, rates, 0 * rates, worst, params, worst)


def test_each_network_moves_by_its_own_learning_rate_and_limit():
    limits, rates = jnp.array([0.5, 0.5, jnp.inf]), jnp.array([0.1, 0.2, 0.2])
    graph, before = state(SMALL, limits, rates)
    rows, steps = music.pad(pieces(7, 4, 5, 6), 6)
    after, seen = music.train_step(graph, SMALL)(before, limits, rows, steps, jax.random.key(0))
    moved = jax.tree.map(lambda x, y: x - y, after.params, before.params)
    lengths = jax.jit(jax.vmap(gradclip_jax.global_norm))(moved)
    norm = float(seen["grad_norm"][2])
    assert norm > 1
    np.testing.assert_allclose(lengths, [0.05, 0.1, 0.2 * norm], rtol=1e-4)
    np.testing.assert_array_equal(seen["clipped"], [1, 1, 0])


def test_a_rate_is_halved_when_the_error_rises_and_the_best_network_is_kept():
    limits, rates = jnp.array([1.0, 1.0, 1.0]), jnp.array([1.0, 1.0, 1.0])
    _, now = state(SMALL, limits, rates)
    before = jax.tree.leaves(now.best)[0]
    now = now._replace(
        params=jax.tree.map(lambda x: x + 1, now.params),
        epoch_loss=jnp.array([3.0, 5.0, jnp.nan]),
        last_loss=jnp.array([4.0, 4.0, 4.0]),
        valid=jnp.array([4.0, 4.0, 4.0]),
    )
    now = music.end_epoch(now, jnp.array([3.5, 4.5, jnp.nan]))
    assert now.rate.tolist() == [1.0, 0.5, 1.0]
    assert now.valid.tolist() == [3.5, 4.0, 4.0]
    after = jax.tree.leaves(now.best)[0]
    np.testing.assert_array_equal(after, before + jnp.array([1.0, 0, 0]).reshape(-1, 1))


def test_a_run_that_was_interrupted_ends_in_the_same_networks(
    tmp_path, monkeypatch, standard_promotion
):
    recipe = music.LSTM._replace(units=4, length=6, learning_rates=(0.01,))
    of_splits = {split: pieces(9, 5, 12) for split in music.SPLITS}

    def fit(name: str) -> music.Result:
        args = argparse.Namespace(steps=3, seed=0, out=tmp_path / name)
        return music.fit("chords", recipe, of_splits, args)

    whole = fit("whole")
    with monkeypatch.context() as patch:
        averages = music.averages

        def interrupted(*args):
            signal.raise_signal(signal.SIGINT)
            return averages(*args)

        patch.setattr(music, "averages", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fit("parts")
    parts = fit("parts")
    assert parts.history == whole.history
    assert len(whole.history["loss"]) == 3
    for one, other in zip(jax.tree.leaves(parts.best), jax.tree.leaves(whole.best), strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(parts.test, whole.test)


# MIDI


def notes(content: bytes) -> list[tuple[int, int, int]]:
    """Pitch, first tick and last tick of each note in a file of one track, read by the standard."""
    kind, size, form, tracks, division = struct.unpack(">4sIHHH", content[:14])
    assert (kind, size, form, tracks, division) == (b"MThd", 6, 0, 1, 480)
    assert content[14:18] == b"MTrk"
    assert struct.unpack(">I", content[18:22])[0] == len(content) - 22
    at, tick, sounding, found = 22, 0, {}, []
    while True:
        delta = 0
        while content[at] & 0x80:
            delta, at = delta << 7 | content[at] & 0x7F, at + 1
        tick, at = tick + (delta << 7 | content[at]), at + 1
        if content[at] == 0xFF:
            assert content[at:] == b"\xff\x2f\x00"
            assert not sounding
            return sorted(found)
        status, pitch, _ = content[at : at + 3]
        at += 3
        if status == 0x90:
            assert pitch not in sounding
            sounding[pitch] = tick
        else:
            assert status == 0x80
            found.append((pitch, sounding.pop(pitch), tick))


def test_a_midi_file_holds_each_note_as_long_as_its_key_is_on():
    roll = np.zeros((40, music.KEYS), bool)
    roll[0:2, 0] = True  # the lowest key, from the start
    roll[2:3, 39] = True  # middle C, struck twice
    roll[5:6, 39] = True
    roll[30:40, 87] = True  # the highest key, to the end
    assert notes(music.midi(roll, 4)) == [
        (21, 0, 240), (60, 240, 360), (60, 600, 720), (108, 3600, 4800),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("number", "content"),
    [(0, "00"), (0x7F, "7f"), (0x80, "8100"), (0x2000, "c000"), (0xFFFFFFF, "ffffff7f")],
)
def test_numbers_have_the_lengths_of_the_standard(number, content):
    assert music.variable_length(number).hex() == content


# The command


def test_three_steps_leave_a_table_a_plot_and_music(tmp_path, capsys, standard_promotion):
    options = ["--steps", "3", "--units", "8", "--compose", "16", "--out", str(tmp_path)]
    assert music.main(options) == 0
    table = (tmp_path / "results.txt").read_text()
    for row in ("sigmoid, clip 8", "lstm, no clip", "last frame"):
        assert row in table
    assert "\x1b" not in table
    assert (tmp_path / "polyphonic_music.png").stat().st_size > 10_000
    content = (tmp_path / "chords.mid").read_bytes()
    assert all(21 <= pitch <= 108 and end <= 16 * 120 for pitch, _, end in notes(content))
    assert "Stopped" not in capsys.readouterr().out


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert music.main(list(arguments)) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    return line


def test_bad_options_are_refused(tmp_path, capsys):
    assert "`--steps` must be at least 1, got 0." in refusal(capsys, "--steps", "0")
    assert "`--collection` needs `--data`" in refusal(capsys, "--collection", "Nottingham")


def test_a_file_that_is_missing_damaged_or_something_else_is_named(directory, tmp_path, capsys):
    options = ["--data", str(directory), "--out", str(tmp_path / "run"), "--steps", "1"]
    assert "must be a directory with JSB_Chorales.mat" in refusal(capsys, *options)
    file = directory / "JSB_Chorales.mat"
    whole = (directory / "Nottingham.mat").read_bytes()
    for content in (b"", b"no matrix", whole[: len(whole) // 2]):
        file.write_bytes(content)
        assert f"can be read, got {file}: " in refusal(capsys, *options)
    scipy.io.savemat(file, {"traindata": np.zeros((1, 0), object)})
    assert f"can be read, got {file}: KeyError: 'validdata'" in refusal(capsys, *options)
    for piece in (np.zeros((5, 12)), np.zeros((1, 88)), np.full((5, 88), 0.5), np.zeros(88)):
        cells = np.empty((1, 1), object)
        cells[0, 0] = piece
        scipy.io.savemat(file, {f"{split}data": cells for split in music.SPLITS})
        assert f"another as piece 0 of traindata in {file}, of shape (" in refusal(capsys, *options)
    assert not (tmp_path / "run").exists()
