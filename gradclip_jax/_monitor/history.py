"""The history of a run: columns that grow by one row with each record, whole or not at all."""

import math
from array import array
from collections.abc import Mapping

import numpy as np

from .rows import COLUMNS, Row


class History:
    """The rows of a run, every norm, and the norms of leaves."""

    def __init__(self):
        self.last: Row | None = None
        self._sizes = 0, 0
        """Numbers of complete rows and norms: after Ctrl-C, a column may be longer."""
        self._steps = array("q")
        self._columns = {name: array("d") for name in COLUMNS}
        self._norm_steps, self._norms = array("q"), array("d")
        self._leaves: dict[str, array[float]] = {}

    def append(self, row: Row, numbers: Mapping[str, float]) -> None:
        """Add a row with its numbers."""
        rows, norms = self._sizes
        for column in (self._steps, *self._columns.values(), *self._leaves.values()):
            del column[rows:]
        del self._norm_steps[norms:], self._norms[norms:]
        for path in row.leaves:
            if path not in self._leaves:
                self._leaves[path] = array("d", [math.nan]) * rows
        for path, column in self._leaves.items():
            column.append(row.leaves.get(path, math.nan))
        for name, column in self._columns.items():
            column.append(numbers[name])
        self._steps.append(row.step)
        self._norm_steps.extend(row.steps[-len(row.norms) :] if row.norms else ())
        self._norms.extend(row.norms)
        self._sizes = len(self._steps), len(self._norms)
        self.last = row

    def columns(self) -> dict[str, np.ndarray]:
        """A copy of each column, by name."""
        columns = {"step": self._steps, **self._columns}
        return {name: np.array(column)[: self._sizes[0]] for name, column in columns.items()}

    def norms(self) -> dict[str, np.ndarray]:
        """A copy of every norm with its step."""
        columns = {"step": self._norm_steps, "grad_norm": self._norms}
        return {name: np.array(column)[: self._sizes[1]] for name, column in columns.items()}

    def leaf_norms(self) -> dict[str, np.ndarray]:
        """A copy of the column of each leaf, by its path."""
        return {path: np.array(column)[: self._sizes[0]] for path, column in self._leaves.items()}
