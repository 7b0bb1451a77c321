"""Clip the gradient of each example, before they are added up.

`rule.py` says what is done with an example. `call.py` is the public call: it splits modules
(`modules.py`), goes through the batch (`microbatches.py`, `users.py`), where `ghost.py` keeps
gradients as factors, and asks `sharding.py` for mesh axes. `clip.py` serves gradients that exist
already, and `noise.py` private training.
"""

from .call import PerExample as PerExample, clipped_value_and_grad as clipped_value_and_grad
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
