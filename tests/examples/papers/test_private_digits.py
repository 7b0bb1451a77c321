"""What the accountant is told is what is done: sampling, noise and clip; and MNIST's files."""

import argparse
import functools
import gzip
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dp_accounting import dp_event, rdp
from flax import nnx
from scipy.stats import binom

import gradclip_jax
from examples.papers import private_digits
from examples.papers.private_digits import (
    Convolutional,
    Method,
    draw_batch,
    epsilons,
    fixed_size,
    load_images,
    main,
)

FILES = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line with which a command is refused."""
    assert main(list(arguments)) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    return line


# The accountant


@pytest.mark.parametrize(
    ("noise", "batch", "epochs", "published"),
    [(1.3, 256, 15, "1.19"), (1.1, 256, 60, "3.01"), (0.7, 256, 45, "7.10"),
     (1.3, 240, 15, "1.16"), (1.1, 240, 60, "2.91"), (0.7, 240, 45, "6.86")],
)  # fmt: skip
def test_published_epsilons_come_out_to_the_printed_digit(noise, batch, epochs, published):
    # The MNIST tutorials of TensorFlow Privacy and of Opacus: 60,000 images, δ 1e-5.
    tight, classic = epsilons(noise, batch / 60_000, epochs * 60_000 // batch, 1e-5)
    assert f"{classic:.2f}" == published
    assert 0.7 * classic < tight < classic


def test_the_defaults_for_mnist_are_the_first_recipe_of_the_tutorial():
    recipe = private_digits.DEFAULTS["MNIST"]
    (noise,) = recipe["noise_multipliers"]
    classic = epsilons(noise, recipe["batch"] / 60_000, recipe["steps"], 1e-5)[1]
    assert f"{classic:.2f}" == "1.19"


def test_without_noise_there_is_no_privacy():
    assert epsilons(0.0, 0.1, 1, 1e-5) == (np.inf, np.inf)


def test_gradients_and_count_together_cost_what_the_accountant_is_told():
    noise, deviation = 2.0, private_digits.count_noise(64)
    gradient = gradclip_jax.per_example.split_noise(noise, noise_std=deviation)
    assert gradient > noise
    both = [gradient, deviation / 0.5]  # a count of ± 1/2 changes by 1/2 with an example
    event = dp_event.ComposedDpEvent([dp_event.GaussianDpEvent(x) for x in both])
    accountant = rdp.RdpAccountant(private_digits.ORDERS)
    accountant.compose(dp_event.PoissonSampledDpEvent(0.05, event), 100)
    tight = epsilons(noise, 0.05, 100, 1e-5)[0]
    assert accountant.get_epsilon(1e-5) == pytest.approx(tight, rel=1e-6)


# The sampling


def test_each_example_is_drawn_with_the_same_probability_and_no_other_counts():
    keys = jax.random.split(jax.random.key(0), 4000)
    chosen, counts = jax.jit(jax.vmap(lambda key: draw_batch(key, 20, 0.3, 20)))(keys)
    drawn = np.zeros((4000, 20), bool)
    for row, here, which in zip(drawn, np.asarray(counts), np.asarray(chosen), strict=True):
        row[which[here]] = True
        assert row.sum() == here.sum()  # none twice
    assert np.abs(drawn.mean(0) - 0.3).max() < 5 * (0.3 * 0.7 / 4000) ** 0.5
    # Independent: no two go together, and the number of all is binomial.
    assert np.abs(np.corrcoef(drawn.T) - np.eye(20)).max() < 5 / 4000**0.5
    assert drawn.sum(1).var() == pytest.approx(20 * 0.3 * 0.7, rel=0.15)


def test_no_batch_exceeds_its_size_with_more_than_a_billionth_of_delta():
    for examples, batch, steps, delta in [(1497, 512, 100, 1e-4), (60_000, 256, 3515, 1e-5)]:
        size = fixed_size(examples, batch / examples, steps, delta)
        assert steps * binom.sf(size, examples, batch / examples) <= 1e-9 * delta
        assert size < 1.7 * batch
    assert fixed_size(100, 1.0, 10, 1e-3) == 100


BATCH = 100  # of 100: every image is drawn
ARGS = argparse.Namespace(
    batch=BATCH, max_norm=0.5, quantile=0.5, optimizer="sgd", learning_rate=1.0, seed=0, seeds=1
)


@pytest.fixture(scope="module")
def one_step():
    """What a step changed of all weights, the next limit, and what is logged."""
    data, _ = load_images(None)
    split = jax.tree.map(lambda x: jnp.asarray(x[:BATCH]), tuple(data))
    graph, keys, state = private_digits.start(ARGS, 8, Method("", 0.5))
    step = private_digits.make_step(graph, ARGS, BATCH)

    def flat(params) -> np.ndarray:
        return np.concatenate([np.ravel(x) for x in jax.tree.leaves(params)])

    def run(noise: float, max_norm: float, adapts: bool = False):
        setup = private_digits.Setup(jnp.float32(noise), jnp.array(adapts), split)
        params, opt_state, _ = jax.tree.map(jnp.copy, state)
        before = (params, opt_state, jnp.full(1, max_norm))
        (after, _, limit), scalars = step(setup, keys, before, jnp.int32(0))
        return flat(after) - flat(state[0]), float(limit[0]), scalars

    return run


def test_the_noise_has_the_deviation_that_the_accountant_is_told(one_step):
    quiet, _, _ = one_step(0.0, 0.5)
    loud, _, _ = one_step(3.0, 0.5)
    # Each image adds at most 0.5 to a sum that is divided by their expected number.
    assert np.linalg.norm(quiet) <= 0.5
    assert (loud - quiet).std() == pytest.approx(3.0 * 0.5 / BATCH, rel=0.05)


def test_without_a_limit_nothing_is_clipped_and_no_noise_added(one_step):
    change, limit, scalars = one_step(0.0, np.inf)
    assert np.isfinite(change).all()
    assert np.linalg.norm(change) > 0.5
    assert limit == np.inf
    assert scalars["clipped"] == 0


def test_the_limit_follows_the_quantile_up_to_the_noise_of_the_count(one_step):
    _, limit, scalars = one_step(0.0, 0.5, adapts=True)
    assert scalars["clipped"] == 1
    # None is below: 0.5 exp(0.2 (0.5 - noise)), and the noise has a deviation of a twentieth.
    assert np.log(limit / 0.5) / 0.2 == pytest.approx(0.5, abs=5 / 20)


# The images


def test_the_digits_are_scaled_by_what_does_not_depend_on_them():
    data, test = load_images(None)
    assert data.images.shape == (1497, 8, 8, 1)
    assert test.images.shape == (300, 8, 8, 1)
    assert data.images.min() == 0
    assert data.images.max() == 1


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    """MNIST in small: 60 and 20 images, all pixels of which are their number."""
    folder = tmp_path / "mnist"
    folder.mkdir()
    for name in FILES:
        count = 60 if name.startswith("train") else 20
        numbers = np.arange(count, dtype=np.uint8)
        shape = (count, 28, 28) if "images" in name else (count,)
        content = numbers.repeat(784) if "images" in name else numbers % 10
        header = bytes([0, 0, 8, len(shape)]) + np.array(shape, ">u4").tobytes()
        (folder / f"{name}-ubyte").write_bytes(header + content.tobytes())
    return folder


def test_mnist_is_read_plain_or_gzipped(mnist):
    plain = load_images(mnist)
    for name in FILES:
        file = mnist / f"{name}-ubyte"
        (mnist / f"{name}-ubyte.gz").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
    for one, other in zip(plain, load_images(mnist), strict=True):
        np.testing.assert_array_equal(one.images, other.images)
        np.testing.assert_array_equal(one.labels, other.labels)
    assert plain[0].images.shape == (60, 28, 28, 1)
    np.testing.assert_allclose(plain[0].images[7], 7 / 255, rtol=1e-6)
    assert plain[1].labels.tolist() == [i % 10 for i in range(20)]


def test_a_damaged_or_missing_file_is_named(mnist, capsys):
    command = ["--data", str(mnist), "--batch", "20", "--out", str(mnist / "run")]
    file = mnist / "t10k-images-idx3-ubyte"
    whole = file.read_bytes()
    packed = file.with_name(f"{file.name}.gz")
    damages = [
        (file, whole[:-1], "it has 15679 bytes for 20 x 28 x 28"),
        (file, whole[:10], "smaller"),
        (file, b"", "it starts with nothing"),
        (file, b"\0\0\x08\x01" + whole[4:], "it starts with 00000801"),
        (packed, gzip.compress(whole)[:-20], "ended"),
        (packed, whole, "Not a gzipped file"),
        (file, whole[:4] + np.array([20, 14, 56], ">u4").tobytes() + whole[16:], "(14, 56)"),
    ]
    for where, content, reason in damages:
        for other in (file, packed):
            other.unlink(missing_ok=True)
        where.write_bytes(content)
        line = refusal(capsys, *command)
        assert str(where) in line
        assert reason in line
    file.unlink()
    assert "No such file" in refusal(capsys, *command)
    file.write_bytes(whole)
    labels = mnist / "t10k-labels-idx1-ubyte"
    shutil.copy(mnist / "train-labels-idx1-ubyte", labels)
    assert f"{labels}: 60 labels up to 9" in refusal(capsys, *command)
    assert not (mnist / "run").exists()


def test_the_network_for_mnist_is_that_of_the_tutorial():
    network = nnx.eval_shape(lambda: Convolutional(nnx.Rngs(0)))
    assert sum(x.size for x in jax.tree.leaves(nnx.state(network, nnx.Param))) == 26_010
    logits = nnx.eval_shape(lambda network: network(jnp.zeros((2, 28, 28, 1))), network)
    assert logits.shape == (2, 10)


def test_a_product_with_patches_is_a_convolution():
    conv = private_digits.Conv(3, 5, 4, "SAME", nnx.Rngs(0))
    x = np.random.default_rng(1).normal(size=(2, 9, 9, 3)).astype(np.float32)
    kernel = conv.linear.kernel[...].reshape(3, 4, 4, 5)  # patches have the channels first
    layout = ("NHWC", "IHWO", "NHWC")
    expected = jax.lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=layout)
    np.testing.assert_allclose(conv(x), expected, atol=1e-5)


def test_the_pool_takes_the_largest_of_four():
    x = jnp.arange(12.0).reshape(1, 3, 4, 1)
    assert private_digits.max_pool(x)[0, ..., 0].tolist() == [[5, 6, 7], [9, 10, 11]]


# The command


def rows(out: Path) -> list[list[str]]:
    """The cells of the table."""
    lines = (out / "results.txt").read_text().splitlines()
    return [line.split() for line in lines if line.count("%") == 3]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, list]:
    """The directory of a run of three steps, and each training at once and in two parts."""
    out, trained, whole = tmp_path_factory.mktemp("private"), [], private_digits.train

    def train(step, state, steps, folder, **options):
        at_once, stopped = (jax.tree.map(jnp.copy, state) for _ in range(2))
        trained.append(whole(step, at_once, steps, folder / "at_once", **options))
        whole(step, stopped, 2, folder, **options)
        trained.append(whole(step, state, steps, folder, **options))
        return trained[-1]

    command = ["--noise-multipliers", "4", "--clips", "quantile", "--seeds", "2", "--batch", "64",
               "--optimizer", "adam"]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):
        patch.setattr(private_digits, "train", train)
        assert main(["--steps", "3", *command, "--out", str(out)]) == 0
    return out, trained


def test_three_steps_leave_a_table_and_a_plot(finished):
    out, _ = finished
    assert (out / "private_digits.png").stat().st_size > 10_000
    table = rows(out)
    assert [row[:2] for row in table] == [["quantile", "0.5"], ["no", "noise"], ["no", "noise,"]]
    assert table[0][3:5] == [f"{x:.2f}" for x in epsilons(4, 64 / 1497, 3, 1e-4)]
    assert table[1][3:5] == ["∞", "∞"]


def test_a_run_that_was_stopped_continues_bit_for_bit(finished):
    _, trained = finished
    assert len(trained) == 6
    for (state, history), (other, other_history) in zip(trained[::2], trained[1::2], strict=True):
        assert history == other_history
        assert len(history["loss"]) == 3
        for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True):
            assert jnp.array_equal(x, y)


def test_three_steps_on_mnist(mnist, tmp_path, monkeypatch):
    # The network for MNIST takes seconds to compile.
    small = functools.partial(private_digits.Perceptron, 28)
    monkeypatch.setattr(private_digits, "Convolutional", small)
    command = ["--data", str(mnist), "--steps", "3", "--batch", "16", "--clips", "fixed"]
    assert main([*command, "--out", str(tmp_path / "run")]) == 0
    assert [row[:3] for row in rows(tmp_path / "run")] == [
        ["fixed", "limit", "1.3"], ["no", "noise", "0"], ["no", "noise,", "no"],
    ]  # fmt: skip
    assert "delta: 0.01" in (tmp_path / "run" / "results.txt").read_text()


def test_bad_input_is_refused_in_one_line(tmp_path, capsys):
    out = ["--out", str(tmp_path / "run")]
    for option, value, rule in [
        ("--batch", "1498", "at least 1 and at most 1497"),
        ("--delta", "0.001", "above 0 and below 1/1497, got 0.001"),
        ("--delta", "nan", "above 0 and below 1/1497, got nan"),
        ("--noise-multipliers", "0", "at least 0.1"),
        ("--noise-multipliers", "60", "below a tenth of `--batch`"),
        ("--quantile", "1", "at most 0.99"),
        ("--max-norm", "nan", "at least 1e-06"),
        ("--steps", "0", "at least 1"),
        ("--data", str(tmp_path / "none"), f"be a directory, got {tmp_path / 'none'}"),
    ]:
        line = refusal(capsys, option, value, *out)
        assert f"`{option}` must" in line
        assert rule in line
    assert not (tmp_path / "run").exists()
