"""Limits on a norm: `clip_to_limit(limits.percentile(95))`."""

from ._limits import constant as constant, maximum as maximum, minimum as minimum
from ._limits.deviation import deviation as deviation
from ._limits.ema import ema as ema
from ._limits.growth import growth as growth
from ._limits.median import median as median
from ._limits.percentile import percentile as percentile
from ._limits.running_quantile import running_quantile as running_quantile
from ._limits.zscore import zscore as zscore
