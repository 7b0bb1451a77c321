"""The short examples of AGC, DP-SGD and FSDP: each runs, and its claim about the clip is true."""

import re
from pathlib import Path

import agc_resnet
import dp_sgd
import fsdp_transformer
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import make_mesh
from flax import nnx


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch, standard_promotion):
    """Pictures go to the current directory; optax and flax promote dtypes."""
    monkeypatch.chdir(tmp_path)


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out.splitlines()[-1]


# AGC


def test_agc_runs(capsys):
    agc_resnet.main(steps=3)
    assert last_line(capsys).startswith("At learning rate 1.6 the test accuracy is ")
    assert Path("agc_resnet.png").stat().st_size > 10_000


def test_agc_keeps_the_loss_of_the_resnet_finite_where_it_explodes_without(monkeypatch):
    """Four times the rate of the example, so that a few steps are enough."""
    monkeypatch.setattr(agc_resnet, "LEARNING_RATE", 6.4)
    agc = optax.masked(agc_resnet.gc.adaptive_grad_clip(0.01), agc_resnet.all_but_head)
    clipped, _ = agc_resnet.train(agc, 12)
    unclipped, _ = agc_resnet.train(optax.identity(), 12)
    assert len(clipped) == 12
    assert max(clipped) < 100
    assert len(unclipped) < 12 or max(unclipped) > 1e4


# DP-SGD


def test_dp_sgd_runs(capsys):
    dp_sgd.main(steps=3)
    assert re.fullmatch(
        r"The test accuracy is \d+% with ε = 0.05, \d+% with ε = 0.24, \d+% without privacy, at .*",
        last_line(capsys),
    )
    assert Path("dp_sgd.png").stat().st_size > 10_000


def test_epsilon_is_that_of_the_long_study():
    """examples/results/private_digits.txt: other orders, the same mechanism."""
    found = [round(dp_sgd.epsilon(noise, 1497, 100), 2) for noise in (32.0, 8.0)]
    assert found == [0.34, 1.61]


@pytest.fixture(scope="module")
def digits() -> tuple[jax.Array, jax.Array]:
    return dp_sgd.load_images()


@pytest.mark.parametrize("max_norm", [dp_sgd.MAX_NORM, np.inf])
def test_one_image_moves_the_weights_of_a_private_step_by_at_most_the_limit(digits, max_norm):
    """Only with the clip: one image that is a thousand times too bright, and one that is not."""
    images, labels = digits
    key = jax.random.key(1)
    batch, mask = dp_sgd.draw_batch(key, len(images))
    assert mask[0]

    def weights_after(images: jax.Array) -> jax.Array:
        model = dp_sgd.Perceptron(nnx.Rngs(0))
        noise = dp_sgd.gc.per_example.gaussian_noise(1.0, max_norm=1.0, key=0, mean_of=dp_sgd.BATCH)
        tx = optax.chain(noise, optax.sgd(dp_sgd.LEARNING_RATE))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        dp_sgd.train_step(model, optimizer, (images, labels), key, max_norm)
        return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(nnx.state(model))])

    bright = images.at[batch[0]].multiply(-1000.0)
    distance = jnp.linalg.norm(weights_after(bright) - weights_after(images))
    # The old gradient leaves and the new one enters: each has at most the limit.
    most = 2 * dp_sgd.LEARNING_RATE * dp_sgd.MAX_NORM / dp_sgd.BATCH
    assert distance > 0
    assert (distance <= most * 1.001) == (max_norm == dp_sgd.MAX_NORM)


# FSDP


def test_the_norms_of_the_sharded_transformer_are_those_of_one_device(capsys):
    assert fsdp_transformer.main(steps=3) < 1e-5
    assert "on 8 devices; the norms differ" in last_line(capsys)
    assert Path("fsdp_transformer.png").stat().st_size > 10_000


def test_every_device_has_an_eighth_of_a_sharded_matrix_and_of_its_moments():
    model = fsdp_transformer.Transformer(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)
    for module in (model, optimizer):
        fsdp_transformer.shard(module, make_mesh(data=8))
        whole = [leaf for leaf in jax.tree.leaves(nnx.state(module)) if leaf.ndim > 1]
        assert len(whole) >= 14
        for leaf in whole:
            shard = leaf.addressable_shards[0].data
            assert shard.size == leaf.size / (8 if any(n % 8 == 0 for n in leaf.shape) else 1)
