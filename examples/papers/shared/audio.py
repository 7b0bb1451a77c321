"""Utterances of spoken digits, from WAV files or a small synthesiser, as log-mel spectrograms."""

import re
import wave
from pathlib import Path
from typing import NamedTuple

import numpy as np

from examples.language_model.command_line import InputError

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
RATE = 8000  # samples per second of the synthesiser, and of the Free Spoken Digit Dataset
WINDOW, HOP = 0.032, 0.016  # seconds
BANDS = 26
ALPHABET = sorted({*" ".join(WORDS)})  # label 0 is the blank, label i + 1 is ALPHABET[i]
VOICES, TAKES = 20, 4  # of the synthesiser
GAP = (0.05, 0.2)  # seconds of silence between two digits


class Recording(NamedTuple):
    """One spoken digit; samples lie between -1 and 1."""

    digit: int
    speaker: str
    samples: np.ndarray
    source: str


class Batch(NamedTuple):
    """Utterances padded to one length, and how long each really is."""

    features: np.ndarray  # [utterances, frames, BANDS]
    frames: np.ndarray
    labels: np.ndarray  # [utterances, characters]
    characters: np.ndarray

    def rows(self, index: np.ndarray) -> "Batch":
        return Batch(*(array[index] for array in self))


def load(data: Path | None, sizes: tuple[int, int], digits: int, seed: int) -> tuple[Batch, Batch]:
    """Utterances to train on and to test on; every third speaker, at least one, is held out."""
    if data is None:
        recordings, rate = synthesise(VOICES, TAKES, seed), RATE
    elif data.is_dir():
        recordings, rate = read_recordings(data)
    else:
        raise InputError(f"`--data` must be a directory that exists, got {data}.")
    speakers = sorted({recording.speaker for recording in recordings})
    if len(speakers) < 2:
        raise InputError(f"`--data` must hold at least 2 speakers, got {len(speakers)}.")
    held_out = speakers[2::3] or speakers[-1:]
    parts = ([], [])
    for recording in recordings:
        parts[recording.speaker in held_out].append(recording)
    train_set, test_set = (
        utterances(part, size, rate, digits, np.random.default_rng((seed, number)))
        for number, (part, size) in enumerate(zip(parts, sizes, strict=True))
    )
    return train_set, test_set


def utterances(
    recordings: list[Recording], size: int, rate: int, digits: int, rng: np.random.Generator
) -> Batch:
    """Recordings of one speaker after another, one to `digits` of them, with silence between."""
    by_speaker: dict[str, list[Recording]] = {}
    for recording in recordings:
        by_speaker.setdefault(recording.speaker, []).append(recording)
    speakers = list(by_speaker.values())
    features, labels = [], []
    for _ in range(size):
        spoken = speakers[rng.integers(len(speakers))]
        chosen = [spoken[i] for i in rng.integers(len(spoken), size=rng.integers(1, digits + 1))]
        parts = [chosen[0].samples]
        for recording in chosen[1:]:
            parts += [np.zeros(int(rng.uniform(*GAP) * rate)), recording.samples]
        # Silence of a microphone is not 0.
        sound = np.concatenate(parts) + 1e-3 * rng.normal(size=sum(map(len, parts)))
        features.append(log_mel(sound, rate))
        labels.append(encode(" ".join(WORDS[recording.digit] for recording in chosen)))
        if len(features[-1]) < frames_needed(labels[-1]):
            raise InputError(
                f"`--data` must hold recordings with a frame of {1000 * HOP:.0f} ms for each "
                f"character, got {' + '.join(recording.source for recording in chosen)} with "
                f"{len(features[-1])} of {frames_needed(labels[-1])} frames."
            )
    (x, frames), (y, characters) = pad(features), pad(labels)
    return Batch(x, frames, y, characters)


def pad(arrays: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Arrays of different lengths as one, with zeros at their ends, and the lengths."""
    lengths = np.array([len(array) for array in arrays], np.int32)
    padded = np.zeros((len(arrays), lengths.max(), *arrays[0].shape[1:]), arrays[0].dtype)
    for row, array in zip(padded, arrays, strict=True):
        row[: len(array)] = array
    return padded, lengths


def encode(text: str) -> np.ndarray:
    """The labels of a text, from 1."""
    return np.array([ALPHABET.index(character) + 1 for character in text], np.int32)


def frames_needed(labels: np.ndarray) -> int:
    """The shortest path that decodes to the labels: two that are equal need a blank between.

    Of fewer frames there is no path, the loss is infinite, and `optax.ctc_loss` gives about 1e5
    for each label that does not fit: a spike that no clip can make useful.
    """
    return len(labels) + int((labels[1:] == labels[:-1]).sum())


def read_recordings(directory: Path) -> tuple[list[Recording], int]:
    """The recordings `{digit}_{speaker}_{n}.wav` of a directory, and their sampling rate."""
    files = sorted(directory.glob("*.wav"))
    if not files:
        raise InputError(f"`--data` must be a directory with WAV files, got {directory}.")
    recordings, rates = [], {}
    for file in files:
        name = re.fullmatch(r"(\d)_(.+)_\d+", file.stem)
        if name is None:
            raise InputError(
                f"`--data` must hold files {{digit}}_{{speaker}}_{{n}}.wav, got {file}."
            )
        samples, rate = read_wav(file)
        rates.setdefault(rate, file)
        recordings.append(Recording(int(name[1]), name[2], samples, str(file)))
    if len(rates) > 1:
        found = ", ".join(f"{rate} Hz in {file}" for rate, file in rates.items())
        raise InputError(f"`--data` must hold files of one sampling rate, got {found}.")
    return recordings, next(iter(rates))


def read_wav(file: Path) -> tuple[np.ndarray, int]:
    """Samples and sampling rate of a file of mono PCM with 8 or 16 bits."""
    rule = "`--data` must hold mono PCM files of 8 or 16 bits"
    try:
        with wave.open(str(file)) as audio:
            channels, width, rate, frames = audio.getparams()[:4]
            content = audio.readframes(frames)
    except (wave.Error, EOFError, OSError, RuntimeError) as error:  # RuntimeError: a wrong length
        raise InputError(f"{rule}, got {file}: {str(error) or 'it ends early'}.") from None
    if channels != 1 or width not in (1, 2):
        raise InputError(f"{rule}, got {file} with {channels} channels of {8 * width} bits.")
    if rate < 4000:
        raise InputError(f"{rule} and at least 4000 Hz, got {file} with {rate} Hz.")
    if len(content) < max(frames, 1) * width:
        raise InputError(f"{rule}, got {file} with {len(content) // width} of {frames} samples.")
    # 8 bits are unsigned around 128, 16 bits are signed.
    if width == 1:
        return (np.frombuffer(content, np.uint8).astype(np.float32) - 128) / 128, rate
    return np.frombuffer(content, "<i2").astype(np.float32) / 32768, rate


def log_mel(samples: np.ndarray, rate: int) -> np.ndarray:
    """Log energies in mel bands, [frames, BANDS], each band with mean 0 and variance 1.

    A window of 32 ms every 16 ms. Normalising each utterance takes out loudness and microphone.
    """
    window, hop = round(WINDOW * rate), round(HOP * rate)
    padded = np.pad(samples, (window // 2, window))
    frames = np.lib.stride_tricks.sliding_window_view(padded, window)[: len(samples) + 1 : hop]
    energy = np.abs(np.fft.rfft(frames * np.hanning(window))) ** 2 @ mel_filters(rate, window)
    # Digital silence has no energy: the floor is 80 dB below the loudest.
    log = np.log(np.maximum(energy, 1e-8 * max(energy.max(), 1e-8)))
    spread = log.std(0)
    return ((log - log.mean(0)) / np.where(spread > 0, spread, 1)).astype(np.float32)


def mel_filters(rate: int, window: int) -> np.ndarray:
    """Triangles of equal width on the mel scale, 2595 log10(1 + f / 700), from 0 to rate / 2."""
    edges = np.linspace(0, 2595 * np.log10(1 + rate / 2 / 700), BANDS + 2)
    low, centre, high = (700 * (10 ** (edges[i : BANDS + i] / 2595) - 1) for i in range(3))
    f = np.fft.rfftfreq(window, 1 / rate)[:, None]
    return np.maximum(0, np.minimum((f - low) / (centre - low), (high - f) / (high - centre)))


# Three formants in Hz, loudness of voice and of noise, centre of the noise in Hz, duration in ms.
# Vowels: means of the men in Peterson and Barney 1952, "Control methods used in a study of the
# vowels", https://doi.org/10.1121/1.1906875, table II. The others are plausible, not measured.
PHONEMES = {
    "IY": (270, 2290, 3010, 1.0, 0.0, 2500, 150),
    "IH": (390, 1990, 2550, 1.0, 0.0, 2500, 90),
    "EH": (530, 1840, 2480, 1.0, 0.0, 2500, 100),
    "AA": (730, 1090, 2440, 1.0, 0.0, 2500, 110),
    "AO": (570, 840, 2410, 1.0, 0.0, 2500, 110),
    "AH": (640, 1190, 2390, 1.0, 0.0, 2500, 90),
    "UH": (440, 1020, 2240, 0.9, 0.0, 2500, 80),
    "UW": (300, 870, 2240, 0.9, 0.0, 2500, 150),
    "R": (310, 1060, 1380, 0.7, 0.0, 2500, 70),
    "W": (300, 610, 2200, 0.7, 0.0, 2500, 70),
    "N": (250, 1700, 2500, 0.4, 0.0, 2500, 80),
    "V": (250, 1100, 2300, 0.3, 0.1, 2600, 60),
    "Z": (250, 1600, 2500, 0.3, 0.4, 3500, 90),
    "F": (250, 1100, 2300, 0.0, 0.2, 2600, 100),
    "S": (250, 1600, 2500, 0.0, 0.6, 3500, 110),
    "TH": (250, 1400, 2500, 0.0, 0.2, 3000, 90),
    "T": (250, 1700, 2600, 0.0, 0.8, 3200, 40),
    "K": (250, 1900, 2500, 0.0, 0.8, 1900, 40),
    ".": (250, 1700, 2500, 0.0, 0.0, 2500, 60),  # the closure before T and K
}
PRONUNCIATION = (
    "Z IH R AO UH", "W AH N", ". T UW", "TH R IY", "F AO R",
    "F AA IH V", "S IH . K S", "S EH V AH N", "EH IH . T", "N AA IH N",
)  # fmt: skip
FORMANTS = ((1.0, 60.0), (0.6, 90.0), (0.3, 140.0))  # loudness, and bandwidth in Hz


class Voice(NamedTuple):
    """What distinguishes a speaker; `tract` scales the formants, a short tract raises them."""

    pitch: float
    tract: float
    tempo: float
    background: float


def synthesise(speakers: int, takes: int, seed: int) -> list[Recording]:
    """Each digit `takes` times by each of `speakers` synthetic voices, decided by the seed."""
    recordings = []
    for speaker in range(speakers):
        rng = np.random.default_rng((seed, speaker))
        pitch = 130 * 2 ** rng.uniform(-0.6, 0.9)
        voice = Voice(
            pitch, (pitch / 130) ** 0.2 * rng.uniform(0.93, 1.07), rng.uniform(0.8, 1.25),
            10 ** rng.uniform(-2, -0.7),
        )  # fmt: skip
        for digit in list(range(10)) * takes:
            recordings.append(
                Recording(digit, f"voice{speaker:02}", speak(digit, voice, rng), "synthesised")
            )
    return recordings


def speak(digit: int, voice: Voice, rng: np.random.Generator) -> np.ndarray:
    """A digit as damped formant tones, started anew in each period of the pitch, and noise.

    With τ the time since the last pulse of the voice the tone of a formant of frequency F and
    bandwidth B is exp(-π B τ) sin(2 π F τ): what a resonance does when it is struck. All
    parameters glide from the middle of one phoneme to the middle of the next.
    """
    table = np.array([PHONEMES[name] for name in PRONUNCIATION[digit].split()], float)
    lengths = table[:, -1] / 1000 / (voice.tempo * rng.uniform(0.85, 1.2))
    ends = np.cumsum(lengths * rng.lognormal(0, 0.15, len(table)))
    middles = ends - np.diff(ends, prepend=0) / 2
    t = np.arange(round(ends[-1] * RATE)) / RATE
    *formants, voiced, noisy, centre = (np.interp(t, middles, row) for row in table.T[:-1])
    fall = rng.uniform(-0.1, 0.4)
    pitch = voice.pitch * rng.uniform(0.9, 1.1) * (1 + fall * (0.5 - t / t[-1]))
    since = np.cumsum(pitch) / RATE % 1 / pitch
    tones = sum(
        loudness * np.exp(-np.pi * width * since)
        * np.sin(2 * np.pi * voice.tract * rng.normal(1, 0.03) * formant * since)
        for formant, (loudness, width) in zip(formants, FORMANTS, strict=True)
    )  # fmt: skip
    # Slow noise times a carrier is noise around the frequency of the carrier.
    slow = np.convolve(rng.normal(size=len(t)), np.hanning(8) / 2, "same")
    hiss = slow * np.cos(2 * np.pi * np.cumsum(centre) / RATE)
    fade = np.clip(np.minimum(t, t[-1] - t) / 0.01, 0, 1)
    sound = fade * (voiced * tones + noisy * hiss)
    sound = sound / np.abs(sound).max() + voice.background * rng.normal(size=len(t))
    return (rng.uniform(0.3, 0.9) * sound).astype(np.float32)
