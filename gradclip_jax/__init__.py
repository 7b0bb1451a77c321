"""Gradient clipping for JAX and Optax: a limit on a norm, right on every device."""

import importlib.metadata as _metadata

from . import (
    balls as balls,
    limits as limits,
    monitor as monitor,
    per_example as per_example,
    responses as responses,
)
from ._backward import clip_cotangent as clip_cotangent
from ._clip import clip_norms as clip_norms, clip_to_limit as clip_to_limit
from ._given import given_norm as given_norm
from ._guards import (
    clip21 as clip21,
    clip_update_rms as clip_update_rms,
    error_feedback as error_feedback,
    skip_nonfinite as skip_nonfinite,
    skip_spikes as skip_spikes,
    zero_nonfinite as zero_nonfinite,
)
from ._interop import (
    from_config as from_config,
    from_keras as from_keras,
    from_lightning as from_lightning,
    from_torch as from_torch,
    from_transformers as from_transformers,
)
from ._limits import Limit as Limit, Limits as Limits, each as each
from ._metrics import metrics as metrics
from ._monitor import Monitor as Monitor, suggest_max_norm as suggest_max_norm
from ._norms import (
    global_norm as global_norm,
    group_norms as group_norms,
    leaf_norms as leaf_norms,
    unit_norms as unit_norms,
)
from ._state import ClipState as ClipState
from ._strategies.acclip import acclip as acclip
from ._strategies.adagc import adagc as adagc
from ._strategies.adaptive_grad_clip import adaptive_grad_clip as adaptive_grad_clip
from ._strategies.autoclip import autoclip as autoclip
from ._strategies.clip_by_block_rms import clip_by_block_rms as clip_by_block_rms
from ._strategies.clip_by_dual_norm import clip_by_dual_norm as clip_by_dual_norm
from ._strategies.clip_by_global_norm import clip_by_global_norm as clip_by_global_norm
from ._strategies.clip_by_group_norm import clip_by_group_norm as clip_by_group_norm
from ._strategies.clip_by_norm import clip_by_norm as clip_by_norm
from ._strategies.clip_by_param_norm import clip_by_param_norm as clip_by_param_norm
from ._strategies.clip_by_unit_norm import clip_by_unit_norm as clip_by_unit_norm
from ._strategies.clip_by_value import (
    clip_by_range as clip_by_range,
    clip_by_value as clip_by_value,
)
from ._strategies.clip_or_drop import clip_or_drop as clip_or_drop
from ._strategies.clippy import clippy as clippy
from ._strategies.heads import Heads as Heads
from ._strategies.limit_norm_growth import limit_norm_growth as limit_norm_growth
from ._strategies.normalize_by_norm import normalize_by_norm as normalize_by_norm
from ._strategies.qk_clip import qk_clip as qk_clip
from ._strategies.spam_clip import spam_clip as spam_clip
from ._strategies.spectral_clip import (
    soft_spectral_clip as soft_spectral_clip,
    spectral_clip as spectral_clip,
)
from ._strategies.stable_spam import (
    stable_spam_clip as stable_spam_clip,
    stable_spam_norm as stable_spam_norm,
)
from ._strategies.zclip import zclip as zclip
from ._upgrade import upgrade_state as upgrade_state

try:
    __version__ = _metadata.version("gradclip-jax")
except _metadata.PackageNotFoundError:  # a checkout on PYTHONPATH
    __version__ = "0+unknown"
