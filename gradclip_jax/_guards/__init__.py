"""Guards: wrappers and filters that keep an optimizer from what would harm it."""

from .clip21 import Clip21State as Clip21State, clip21 as clip21
from .error_feedback import (
    ErrorFeedbackState as ErrorFeedbackState,
    error_feedback as error_feedback,
)
from .skip import (
    SkipState as SkipState,
    skip_nonfinite as skip_nonfinite,
    skip_spikes as skip_spikes,
)
from .update_rms import UpdateRmsState as UpdateRmsState, clip_update_rms as clip_update_rms
from .zero_nonfinite import zero_nonfinite as zero_nonfinite
