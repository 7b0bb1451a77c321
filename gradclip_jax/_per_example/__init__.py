"""Clip the gradient of each example, before they are added up.

`rule.py` says what is done with an example; `value_and_grad.py` goes through a batch in
micro-batches, where `ghost.py` keeps gradients as factors; `clip.py` serves gradients that are at
hand, and `noise.py` private training.
"""

from .clip import per_example_clip as per_example_clip
from .noise import (
    gaussian_noise as gaussian_noise,
    quantile_step as quantile_step,
    split_noise as split_noise,
)
from .rule import (
    automatic as automatic,
    equal_shares as equal_shares,
    size_shares as size_shares,
)
from .value_and_grad import (
    PerExample as PerExample,
    clipped_value_and_grad as clipped_value_and_grad,
)
