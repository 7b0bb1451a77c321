"""What `Monitor` tells, where its rows go: alerts, the advice on a limit, writers."""

from ._monitor import (
    Alert as Alert,
    ClipWarning as ClipWarning,
    Suggestion as Suggestion,
    to_csv as to_csv,
    to_json_lines as to_json_lines,
    to_tensorboard as to_tensorboard,
)
