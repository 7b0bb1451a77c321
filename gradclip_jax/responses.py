"""Responses, from norm and limit to a factor: `clip_to_limit(1.0, response=responses.smooth)`."""

from ._per_example.rule import automatic as automatic
from ._rescale import (
    drop as drop,
    normalize as normalize,
    shrink as shrink,
    smooth as smooth,
    smooth_sqrt as smooth_sqrt,
    smooth_tanh as smooth_tanh,
)
