"""The normaliser-free network: its weights and variances, what is clipped, and CIFAR-10's files."""

import os
import pickle
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from examples.papers import resnet_agc
from examples.papers.resnet_agc import Block, Conv, ResNet, draw_batch, load_images, main


@pytest.fixture(autouse=True)
def promotion(standard_promotion):
    """The learning rates are schedules of numbers of two types."""


SIZES = ["--batch", "32", "--width", "2", "--stages", "1", "--blocks", "1"]


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line with which a command is refused."""
    assert main(list(arguments)) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    return line


# The network


def test_the_weights_of_every_channel_have_mean_0_and_square_sum_1():
    conv = Conv(3, 4, 5, rngs=nnx.Rngs(0))
    conv.kernel[...] = conv.kernel[...] * 100 + 7
    weights = np.asarray(conv.weights()).reshape(-1, 5)
    np.testing.assert_allclose(weights.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose((weights**2).sum(0), 1, rtol=1e-5)


def test_a_relu_with_its_gain_and_a_convolution_keep_the_variance():
    x = jax.random.normal(jax.random.key(0), (64, 8, 8, 32))
    out = Conv(1, 32, 64, rngs=nnx.Rngs(1))(resnet_agc.activation(x))
    assert np.asarray(out).var() == pytest.approx(1, rel=0.1)


def test_the_variance_grows_by_the_branch_and_starts_anew_in_a_larger_block():
    model = nnx.eval_shape(lambda: ResNet(1, 4, 2, 2, nnx.Rngs(0)))
    assert [block.beta**2 for block in model.blocks] == pytest.approx([1, 1.04, 1.08, 1.04])
    assert [block.shortcut is None for block in model.blocks] == [True, True, False, True]


def test_a_block_starts_as_the_identity():
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 4))
    np.testing.assert_array_equal(Block(4, 4, 1.0, stride=1, rngs=nnx.Rngs(0))(x), x)


# The clip


def test_every_unit_is_held_to_a_fraction_of_its_weights_but_the_last_layer_is_not():
    params = nnx.split(ResNet(1, 4, 2, 1, nnx.Rngs(0)))[1]
    grads = jax.tree.map(lambda x: jnp.full_like(x, 1e3), params)
    clip = resnet_agc.make_clip(0.01)
    updates, _ = jax.jit(clip.update)(grads, clip.init(params), params)
    np.testing.assert_array_equal(updates["head"]["kernel"][...], 1e3)
    np.testing.assert_array_equal(updates["head"]["bias"][...], 1e3)
    kernel, update = (np.asarray(tree["stem"]["kernel"][...]) for tree in (params, updates))
    norms, limits = (np.sqrt((x**2).sum((0, 1, 2))) for x in (update, kernel))
    np.testing.assert_allclose(norms, 0.01 * limits, rtol=1e-5)
    # Weights that start at zero count as 0.001.
    assert updates["blocks"][0]["skip"][...] == pytest.approx(1e-5)


# The images


def test_every_epoch_sees_every_image_once_in_an_order_of_its_own():
    key = jax.random.key(0)
    batches = [np.asarray(draw_batch(key, jnp.int32(i), 12, 4)) for i in range(6)]
    first, second = np.concatenate(batches[:3]), np.concatenate(batches[3:])
    assert sorted(first) == sorted(second) == list(range(12))
    assert first.tolist() != second.tolist()


def test_the_digits_are_split_into_three_and_standardised_by_the_first():
    splits = load_images(None)
    assert {name: len(split.labels) for name, split in splits.items()} == {
        "train": 1197, "valid": 300, "test": 300,
    }  # fmt: skip
    assert splits["test"].images.shape == (300, 8, 8, 1)
    assert splits["train"].images.mean() == pytest.approx(0, abs=1e-4)
    assert splits["train"].images.std() == pytest.approx(1, rel=1e-4)


@pytest.fixture
def cifar(tmp_path: Path) -> Path:
    """CIFAR-10 in small: 20 images in each file, whose red channel is the number of the file."""
    folder = tmp_path / "cifar"
    folder.mkdir()
    for number, name in enumerate(resnet_agc.CIFAR_FILES):
        data = np.random.default_rng(number).integers(0, 256, (20, 3072), dtype=np.uint8)
        data[:, :1024] = number
        content = {b"data": data, b"labels": [i % 10 for i in range(20)], b"batch_label": b"x"}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    return folder


def test_cifar_is_read_with_the_channels_last(cifar):
    images, labels = resnet_agc.read_cifar(cifar / "data_batch_3")
    assert images.shape == (20, 32, 32, 3)
    assert (images[..., 0] == 2).all()
    assert labels.tolist() == [i % 10 for i in range(20)]
    splits = load_images(cifar)
    assert [len(split.labels) for split in splits.values()] == [90, 10, 20]


def test_a_damaged_or_missing_file_is_named(cifar, capsys):
    file = cifar / "data_batch_4"
    file.write_bytes(file.read_bytes()[:1000])
    assert str(file) in refusal(capsys, "--data", str(cifar), "--out", str(cifar / "run"))
    file.unlink()
    assert str(file) in refusal(capsys, "--data", str(cifar), "--out", str(cifar / "run"))
    file.write_bytes(pickle.dumps({b"data": np.zeros((20, 3072), np.uint8), b"labels": [11] * 20}))
    line = refusal(capsys, "--data", str(cifar), "--out", str(cifar / "run"))
    assert "its labels reach from 11 to 11" in line
    assert not (cifar / "run").exists()


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm",)


def test_a_pickle_that_would_run_code_is_refused(cifar, capsys, monkeypatch):
    monkeypatch.chdir(cifar)
    (cifar / "test_batch").write_bytes(pickle.dumps(Harmful()))
    line = refusal(capsys, "--data", str(cifar), "--out", str(cifar / "run"))
    assert "mkdir" in line
    assert not (cifar / "harm").exists()


# The command


def test_three_steps_leave_a_table_and_a_plot(tmp_path):
    more = ["--learning-rates", "0.2", "--seeds", "1", "--out", str(tmp_path)]
    assert main(["--steps", "3", *SIZES, *more]) == 0
    assert (tmp_path / "resnet_agc.png").stat().st_size > 10_000
    lines = (tmp_path / "results.txt").read_text().splitlines()
    assert any(line.split()[:1] == ["0.2"] and line.count("%") == 6 for line in lines)
    runs = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert runs == {"AGC_0.2_seed_0", "no_clip_0.2_seed_0"}


def test_bad_input_is_refused_in_one_line(tmp_path, capsys):
    out = ["--out", str(tmp_path / "run")]
    assert "`--batch` must be at least 1 and at most 1197" in refusal(
        capsys, "--batch", "2000", *out
    )
    assert "`--learning-rates` must be at least 0" in refusal(
        capsys, "--learning-rates", "-1", *out
    )
    assert f"got {tmp_path / 'none'}" in refusal(capsys, "--data", str(tmp_path / "none"), *out)
    assert not (tmp_path / "run").exists()
