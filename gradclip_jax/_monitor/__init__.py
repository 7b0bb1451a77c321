"""Watch a run from the host: what the clip did, what to worry about, and which limit to choose."""

from .alerts import Alert as Alert, ClipWarning as ClipWarning
from .monitor import Monitor as Monitor
from .suggest import Suggestion as Suggestion, suggest_max_norm as suggest_max_norm
from .writers import (
    to_csv as to_csv,
    to_json_lines as to_json_lines,
    to_tensorboard as to_tensorboard,
)
