"""Limits: recurrences on a number, from the norms seen so far to the norm that is allowed.

`limit.py` says what a limit is, and joins them; each other file is one recurrence.
"""

from .limit import (
    Limit as Limit,
    Limits as Limits,
    as_limit as as_limit,
    constant as constant,
    each as each,
    maximum as maximum,
    minimum as minimum,
    update_each as update_each,
    update_finite as update_finite,
)
