"""Limits: recurrences on a number, from the norms seen so far to the norm that is allowed.

`limit.py` says what a limit is, and joins them; each other file is one recurrence.
"""

from .limit import (
    Limit as Limit,
    Threshold as Threshold,
    as_limit as as_limit,
    check_threshold as check_threshold,
    constant as constant,
    maximum as maximum,
    minimum as minimum,
    negated as negated,
    observe as observe,
)
