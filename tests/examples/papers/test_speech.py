"""The speech example: its files, its features, the loss against all paths, and a whole run."""

import itertools
import wave

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from examples.language_model.command_line import InputError
from examples.papers import speech
from examples.papers.shared.audio import (
    BANDS,
    Batch,
    encode,
    frames_needed,
    load,
    log_mel,
    mel_filters,
    read_wav,
    synthesise,
)


def write_wav(file, samples, rate=8000, width=2, channels=1):
    """Writes samples between -1 and 1."""
    if width == 1:
        content = np.round(np.asarray(samples) * 128 + 128).astype(np.uint8)
    else:
        content = np.round(np.asarray(samples) * 32768).astype("<i2")
    with wave.open(str(file), "wb") as audio:
        audio.setparams((channels, width, rate, 0, "NONE", ""))
        audio.writeframes(content.tobytes())


@pytest.fixture
def digits(tmp_path):
    """Speakers a and b, who say "one", and c, who says "two"."""
    for name in ("1_a_0", "1_b_0", "2_c_0"):
        write_wav(tmp_path / f"{name}.wav", 0.5 * np.sin(np.arange(3000)))
    return tmp_path


@pytest.mark.parametrize("width", [1, 2])
def test_samples_of_8_and_of_16_bits_are_the_same_numbers(width, tmp_path):
    samples = np.array([0, 0.5, -1, 0.25])
    write_wav(tmp_path / "1_a_0.wav", samples, width=width)
    read, rate = read_wav(tmp_path / "1_a_0.wav")
    assert rate == 8000
    np.testing.assert_array_equal(read, samples)


def test_a_damaged_file_is_named(digits):
    file = digits / "2_c_0.wav"
    whole = file.read_bytes()
    for content, reason in (
        (whole[:1000], "478 of 3000 samples"),
        (whole[:30], "it ends early"),
        (b"no sound", "RIFF"),
        (whole[:16] + b"\xff\xff\xff\x7f" + whole[20:], "it ends early"),
        (b"", "it ends early"),
    ):
        file.write_bytes(content)
        with pytest.raises(InputError, match=f"2_c_0.wav.*{reason}"):
            load(digits, (4, 4), 2, 0)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("2_c_1", {"channels": 2}, "2_c_1.wav with 2 channels of 16 bits"),
        ("2_c_1", {"rate": 16000}, "8000 Hz in .*1_a_0.wav, 16000 Hz in .*2_c_1.wav"),
        ("2_c_1", {"rate": 100}, "at least 4000 Hz, got .*2_c_1.wav with 100 Hz"),
        ("two", {}, "digit.*two.wav"),
    ],
)
def test_files_that_do_not_fit_are_named(name, options, reason, digits):
    write_wav(digits / f"{name}.wav", np.zeros(1000), **options)
    with pytest.raises(InputError, match=reason):
        load(digits, (4, 4), 2, 0)


def test_a_recording_too_short_for_its_word_is_named(digits):
    write_wav(digits / "2_c_0.wav", np.ones(250) / 2)
    with pytest.raises(InputError, match=r"2_c_0.wav with 2 of 3 frames"):
        load(digits, (4, 4), 1, 0)


def test_directories_without_what_is_needed_are_refused(digits, tmp_path_factory):
    for data, reason in (
        (digits / "none", "a directory that exists"),
        (tmp_path_factory.mktemp("empty"), "a directory with WAV files"),
    ):
        with pytest.raises(InputError, match=reason):
            load(data, (4, 4), 2, 0)
    for file in (*digits.glob("*_b_*"), *digits.glob("*_c_*")):
        file.unlink()
    with pytest.raises(InputError, match="at least 2 speakers, got 1"):
        load(digits, (4, 4), 2, 0)


def test_the_speakers_that_are_tested_are_not_heard_in_training(digits):
    train_set, test_set = load(digits, (6, 5), 2, 0)
    assert {*" ".join(speech.texts(train_set)).split()} == {"one"}
    assert {*" ".join(speech.texts(test_set)).split()} == {"two"}
    assert train_set.features.shape == (6, train_set.frames.max(), BANDS)
    assert test_set.labels.shape == (5, test_set.characters.max())
    assert np.isfinite(train_set.features).all()


def test_the_synthesiser_is_decided_by_its_seed():
    first, again, other = (synthesise(2, 1, seed) for seed in (0, 0, 1))
    assert [recording.digit for recording in first] == [*range(10)] * 2
    for a, b, c in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(a.samples, b.samples)
        assert a.samples.shape != c.samples.shape or (a.samples != c.samples).any()
        assert 0.1 < len(a.samples) / 8000 < 1.5


def test_neighbouring_mel_bands_share_each_frequency():
    filters = mel_filters(8000, 256)
    peaks = filters.argmax(0)
    assert (np.diff(peaks) > 0).all()
    np.testing.assert_allclose(filters[peaks[0] + 1 : peaks[-1] - 1].sum(1), 1)


def test_a_tone_has_most_energy_in_the_band_around_it():
    # 26 bands to 4000 Hz = 2146 mel lie 79.5 mel apart; 1000 Hz = 1000 mel is nearest to the 13th.
    t = np.arange(8000) / 8000
    sound = np.where(t < 0.5, np.sin(2 * np.pi * 1000 * t), np.sin(2 * np.pi * 3000 * t))
    features = log_mel(sound, 8000)
    assert features.shape == (63, BANDS)  # 1 s in steps of 16 ms, and the first
    assert (features[5:25, 12] > features[36:56, 12] + 1).all()
    np.testing.assert_allclose(features.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(features.std(0), 1, atol=1e-5)


def test_a_path_is_read_without_repetitions_and_blanks():
    o, n = encode("on").tolist()
    assert speech.decode([0, o, o, 0, o, n, n, 0]) == "oon"
    assert frames_needed(encode("three")) == 6


def test_character_errors_are_the_fewest_edits():
    assert speech.edits("kitten", "sitting") == 3
    assert speech.edits("", "one") == speech.edits("one", "") == 3
    assert speech.edits("seven", "seven") == 0


def test_the_loss_sums_over_all_paths_that_read_as_the_labels():
    rng = np.random.default_rng(0)
    texts, lengths = ("oo", "no", "o"), (5, 4, 1)
    logits = rng.normal(size=(3, 5, 1 + len(speech.ALPHABET))).astype(np.float32)
    wanted = []
    for row, text, length in zip(logits, texts, lengths, strict=True):
        p = np.exp(row[:length]) / np.exp(row[:length]).sum(-1, keepdims=True)
        used = [0, *encode("on").tolist()]
        paths = [q for q in itertools.product(used, repeat=length) if speech.decode(q) == text]
        wanted.append(-np.log(sum(np.prod(p[np.arange(length), q]) for q in map(list, paths))))
    labels = np.zeros((3, 2), np.int32)
    for row, text in zip(labels, texts, strict=True):
        row[: len(text)] = encode(text)
    batch = Batch(logits, np.array(lengths), labels, np.array([2, 2, 1]))
    loss = jax.jit(speech.ctc)
    np.testing.assert_allclose(loss(logits, batch), np.mean(wanted), rtol=1e-5)
    # "oo" in two frames has no path: not infinite, but far from any loss that can be learned.
    assert loss(logits, batch._replace(frames=np.array([2, 4, 1]))) > 9e4 / 3


def test_padding_changes_nothing_in_either_direction():
    model = speech.SpeechModel(4, nnx.Rngs(0))
    read = nnx.jit(model)
    x = np.random.default_rng(0).normal(size=(2, 6, BANDS)).astype(np.float32)
    frames = np.array([6, 4], np.int32)
    logits = read(x, frames)
    x[1, 4:] = 100
    np.testing.assert_array_equal(read(x, frames)[1, :4], logits[1, :4])
    both = speech.reverse(jnp.arange(12).reshape(6, 2, 1), frames)
    np.testing.assert_array_equal(both[..., 0].T, [[10, 8, 6, 4, 2, 0], [7, 5, 3, 1, 9, 11]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--digits", "0"], "`--digits` must be at least 1, got 0"),
        (["--learning-rates", "0.1", "-1"], "`--learning-rates` must be positive, got -1"),
        (["--max-norm", "nan"], "`--max-norm` must be at least 0, got nan"),
        (["--data", "nowhere"], "`--data` must be a directory that exists, got nowhere"),
    ],
)
def test_bad_options_are_refused_by_name(options, message, tmp_path, capsys):
    assert speech.main([*options, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_a_short_run_leaves_table_and_plot_and_is_not_run_twice(tmp_path, capsys):
    options = ["--steps", "3", "--batch", "4", "--units", "8", "--compare", "--out", str(tmp_path)]
    assert speech.main(options) == 0
    text = (tmp_path / "results.txt").read_text()
    assert "clip_by_global_norm" in text
    assert "none" in text
    assert (tmp_path / "speech.png").stat().st_size > 10_000
    assert "step 3 of 3" in capsys.readouterr().out
    assert speech.main(options) == 0
    assert "step 3 of 3" not in capsys.readouterr().out
    assert (tmp_path / "results.txt").read_text() == text
