"""Clips by the arguments of other frameworks, and from configs."""

from .config import from_config as from_config
from .frameworks import (
    from_keras as from_keras,
    from_lightning as from_lightning,
    from_torch as from_torch,
    from_transformers as from_transformers,
)
