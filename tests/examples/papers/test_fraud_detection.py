"""The detector's cards are what they claim, its scores are right, and a bad config is refused."""

import json
from pathlib import Path

import numpy as np
import pytest

from examples.language_model.command_line import InputError
from examples.papers import fraud_detection
from examples.papers.fraud_detection import (
    PATTERNS,
    Cards,
    aggregates,
    generate,
    reliability,
    sequences,
)

SMALL = {
    "data": {"train_cards": 300, "valid_cards": 200, "test_cards": 200, "length": 16,
             "fraud_rate": 0.1},
    "model": {"units": 4},
    "training": {"batch": 8, "seeds": 1},
}  # fmt: skip


@pytest.fixture(scope="module")
def cards() -> Cards:
    return generate(np.random.default_rng(0), 5000, 32, 0.05, 1.2)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A config that takes a second, which leaves out what it does not change."""
    file = tmp_path / "small.json"
    file.write_text(json.dumps(SMALL))
    return file


def command(config: Path, *more: str) -> list[str]:
    return ["--config", str(config), "--steps", "3", "--out", str(config.parent / "run"), *more]


def test_cards_are_rare_frauds_with_heavy_tails_and_a_seed_draws_them_again(cards):
    assert 0.03 < cards.fraud.mean() < 0.07
    assert cards.amount.shape == cards.gap.shape == (5000, 32)
    assert cards.gap.min() > 0
    assert ((cards.hour >= 0) & (cards.hour < 24)).all()
    # Of a Pareto tail with index 1.2 the largest of n grows as n^(1/1.2).
    assert cards.amount.max() > 500 * np.median(cards.amount)
    again = generate(np.random.default_rng(0), 5000, 32, 0.05, 1.2)
    np.testing.assert_array_equal(cards.amount, again.amount)


def test_each_pattern_of_fraud_shows_in_the_last_transactions(cards):
    test, burst, abroad, _ = (cards.fraud & (cards.pattern == i) for i in range(len(PATTERNS)))
    assert cards.amount[test, -1].min() > 10
    assert (cards.amount[test, -5:].min(1) < 3).all()
    assert np.median(cards.gap[burst, -2:]) < 0.25 < np.median(cards.gap[~cards.fraud, -2:])
    assert (cards.country[abroad, -1] > 0).all()
    assert (cards.country[~cards.fraud, -1] > 0).mean() > 0.01  # holders on holiday


def test_honest_holders_do_not_buy_asleep(cards):
    # They wake between 6 and 9 and stay awake for 16 hours.
    honest = cards.hour[~cards.fraud]
    assert ((honest >= 6) | (honest < 1)).all()


def test_raw_sequences_keep_the_tail_and_logarithms_do_not(cards):
    raw, log = sequences(cards, raw=True), sequences(cards, raw=False)
    assert raw.shape == log.shape == (5000, 32, 15)
    assert raw.dtype == np.float32
    np.testing.assert_allclose(raw[..., 0], cards.amount, rtol=1e-6)
    np.testing.assert_allclose(log[..., 0], np.log(cards.amount) / 2 - 1.5, rtol=1e-5, atol=1e-6)
    assert np.abs(log).max() < 10 < raw.max() / 1000
    np.testing.assert_array_equal(raw[..., 2:], log[..., 2:])
    np.testing.assert_array_equal(raw[..., 7:].sum(-1), 1)  # one merchant each


def test_aggregates_count_what_happened_within_the_last_hour():
    gap = np.array([[9.0, 3.0, 0.5, 0.25]])
    amount, zeros = np.array([[20.0, 30.0, 1.0, 50.0]]), np.zeros((1, 4), int)
    one = Cards(amount, gap, gap, zeros, zeros, zeros == 1, np.array([True]), np.array([0]))
    features = aggregates(one)[0]
    # Six of the last transaction, eight of the setting, then six for each of 1, 6 and 24 hours.
    count, _, _, total, least, most = features[14:20]
    assert count == 3  # 0.75, 0.25 and 0 hours before the last
    np.testing.assert_allclose([total, least, most], np.log([81, 1, 50]))


def test_reliability_compares_predictions_with_shares():
    p = np.array([0.0005, 0.2, 0.2, 0.2, 0.2, 1.0])
    fraud = np.array([False, True, False, False, False, True])
    predicted, observed, share = reliability(fraud, p)
    np.testing.assert_allclose(predicted, [0.0005, 0.2, 1.0])
    np.testing.assert_allclose(observed, [0, 0.25, 1])
    np.testing.assert_allclose(share, [1 / 6, 4 / 6, 1 / 6])


def test_the_threshold_has_the_largest_f1():
    fraud, p = np.array([0, 1, 0, 1, 1]), np.array([0.1, 0.3, 0.4, 0.8, 0.9])
    # From 0.8: precision 1, recall 2/3, F1 0.8; from 0.3: 3/4, 1, 6/7.
    assert fraud_detection.best_threshold(fraud, p) == 0.3


def test_three_steps_leave_a_table_and_a_plot_and_are_not_run_again(
    config, capsys, monkeypatch, standard_promotion
):
    monkeypatch.setitem(fraud_detection.BOOSTING, "max_iter", 3)
    assert fraud_detection.main(command(config)) == 0
    out = config.parent / "run"
    assert (out / "fraud_detection.png").read_bytes().startswith(b"\x89PNG")
    text = (out / "results.txt").read_text()
    assert "gradient boosting" in text
    assert '"method": "clip_by_norm", "threshold": 1.0' in text
    assert "log-clip-0: step 3 of 3 · loss" in capsys.readouterr().out
    assert "seconds: " in text
    assert fraud_detection.main(command(config)) == 0
    assert "step 3 of 3" not in capsys.readouterr().out
    again = (out / "results.txt").read_text()
    assert again.splitlines() == [line for line in text.splitlines() if "seconds: " not in line]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gradient_clipping": {}}, "at its top, got 'gradient_clipping'; nearest: gradient_clip"),
        ({"model": {"unit": 3}}, "at model, got 'unit'; nearest: units"),
        ({"model": 3}, "an object {…} at model, got 3"),
        ({"gradient_clip": {"method": "clip_norm", "threshold": 1.0}}, "clip_by_norm"),
        ({"gradient_clip": {"method": "clip_by_norm"}}, "must have a `max_norm`"),
        ({"gradient_clip": {"method": "zclip", "z": 2}}, "z_max"),
        ({"gradient_clip": 3}, "an object {…} at gradient_clip, got 3"),
        ({"gradient_clip": {"method": "zero_nonfinite"}}, "gradient_clip"),
        ({"optimizer": {"method": ["adam"]}}, "a known name at optimizer.method, got ['adam']"),
        ({"gradient_clip": {"threshold": -1}}, "must be non-negative, got -1"),
        ({"gradient_clip": {"threshold": float("nan")}}, "got nan"),
        ({"training": {"batch": 2.5}}, "a whole number from 1 to 1e+06 at training.batch, got 2.5"),
        ({"training": {"seeds": True}}, "got True"),
        ([], "an object {…} at its top, got []"),
    ],
)
def test_a_config_that_cannot_be_used_is_refused_with_the_nearest_name(change, message, tmp_path):
    file = tmp_path / "bad.json"
    file.write_text(json.dumps(change))
    with pytest.raises(InputError) as refusal:
        fraud_detection.read_config(file)
    assert message in str(refusal.value)


def test_the_clip_may_be_any_strategy_and_keeps_its_method_where_only_the_threshold_is_given(
    tmp_path,
):
    def clip_of(section):
        (tmp_path / "config.json").write_text(json.dumps({"gradient_clip": section}))
        return fraud_detection.read_config(tmp_path / "config.json")["gradient_clip"]

    assert clip_of({"threshold": 2.0}) == {"method": "clip_by_norm", "threshold": 2.0}
    assert clip_of({"method": "zclip", "z_max": 3}) == {"method": "zclip", "z_max": 3}
    value = {"method": "clip_by_value", "threshold": 1.0}  # what it measures is no norm
    assert clip_of(value) == value


def test_a_config_that_is_missing_or_damaged_is_named(tmp_path, capsys):
    assert fraud_detection.main(["--config", str(tmp_path / "no.json")]) == 2
    assert f"got {tmp_path / 'no.json'}: No such file or directory." in capsys.readouterr().err
    (tmp_path / "cut.json").write_text('{"data": {')
    assert fraud_detection.main(["--config", str(tmp_path / "cut.json")]) == 2
    assert "cut.json: Expecting property name" in capsys.readouterr().err
    (tmp_path / "deep.json").write_text("[" * 100_000 + "]" * 100_000)
    assert fraud_detection.main(["--config", str(tmp_path / "deep.json")]) == 2
    assert f"must be a JSON file, got {tmp_path / 'deep.json'}: " in capsys.readouterr().err
    assert fraud_detection.main(["--steps", "0"]) == 2
    assert "`--steps` must be at least 1, got 0." in capsys.readouterr().err
