"""Balls for `clip_by_dual_norm`: where a step of length 1 leads."""

from ._balls import (
    Ball as Ball,
    euclidean as euclidean,
    exact_spectral as exact_spectral,
    newton_schulz as newton_schulz,
    sign as sign,
    spectral as spectral,
)
