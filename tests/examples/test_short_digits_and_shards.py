"""The short examples of AGC, DP-SGD and FSDP: each runs, and its claim about the clip is true."""

from pathlib import Path

import agc_resnet
import optax
import pytest


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
