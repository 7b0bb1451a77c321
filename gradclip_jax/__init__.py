"""Gradient clipping for JAX and Optax: a limit on a norm, right on every device."""

from ._backward import clip_cotangent as clip_cotangent
from ._clip import ClipState as ClipState, clip_to_limit as clip_to_limit
from ._guards import zero_nonfinite as zero_nonfinite
from ._limits import Limit as Limit, constant as constant, maximum as maximum, minimum as minimum
from ._metrics import metrics as metrics
from ._norms import (
    global_norm as global_norm,
    group_norms as group_norms,
    leaf_norms as leaf_norms,
    unit_norms as unit_norms,
)
from ._rescale import (
    drop as drop,
    normalize as normalize,
    shrink as shrink,
    smooth as smooth,
    smooth_sqrt as smooth_sqrt,
    smooth_tanh as smooth_tanh,
)
from ._strategies.adaptive_grad_clip import adaptive_grad_clip as adaptive_grad_clip
from ._strategies.clip_by_block_rms import clip_by_block_rms as clip_by_block_rms
from ._strategies.clip_by_global_norm import clip_by_global_norm as clip_by_global_norm
from ._strategies.clip_by_group_norm import clip_by_group_norm as clip_by_group_norm
from ._strategies.clip_by_norm import clip_by_norm as clip_by_norm
from ._strategies.clip_by_unit_norm import clip_by_unit_norm as clip_by_unit_norm
from ._strategies.clip_by_value import clip_by_value as clip_by_value
from ._strategies.normalize_by_norm import normalize_by_norm as normalize_by_norm

__version__ = "0.1.0"
