"""Per-example clipping: DP-SGD, ghost clipping and user-level clipping, in bounded memory."""

from ._per_example.call import PerExample as PerExample, value_and_grad as value_and_grad
from ._per_example.clip import clip as clip
from ._per_example.noise import (
    gaussian_noise as gaussian_noise,
    quantile_step as quantile_step,
    split_noise as split_noise,
)
from ._per_example.rule import equal_shares as equal_shares, size_shares as size_shares
