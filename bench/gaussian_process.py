"""Regression by a Gaussian process: fills a grid from scattered measurements, smooth where they are, plain where not.

Rasmussen and Williams, Gaussian Processes for Machine Learning, 2006: posterior mean (2.25), and what each point would
have been predicted as without its own group (5.12, for groups).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
# Grid points predicted at once: bounds the memory.
CHUNK = 2000


@dataclass(frozen=True, slots=True)
class Kernel:
    """Correlation exp(-distance): rough (Ornstein-Uhlenbeck), because kernels change by steps. `lengths`: one per
    coordinate. `noise`: variance of one measurement, the process having 1."""

    lengths: tuple[float, ...]
    noise: float

    def correlation(self, left: Floats, right: Floats) -> Floats:
        a, b = left / self.lengths, right / self.lengths
        squares = (a * a).sum(1)[:, None] + (b * b).sum(1)[None] - 2 * a @ b.T
        return np.asarray(np.exp(-np.sqrt(np.maximum(squares, 0.0))))


class Process:
    """Fitted to `values` at `points`; away from them it returns to their median."""

    def __init__(self, kernel: Kernel, points: Floats, values: Floats) -> None:
        self._kernel, self._points = kernel, points
        self._median = float(np.median(values))
        self._covariance = kernel.correlation(points, points)
        self._covariance[np.diag_indices(len(points))] += kernel.noise
        self._weights = np.linalg.solve(self._covariance, values - self._median)
        self._values = values

    def at(self, points: Floats) -> Floats:
        """The posterior mean at each point."""
        chunks = [points[start : start + CHUNK] for start in range(0, len(points), CHUNK)]
        means = [self._kernel.correlation(chunk, self._points) @ self._weights for chunk in chunks]
        return self._median + np.concatenate(means)

    def without_group(self, groups: npt.NDArray[np.intp]) -> Floats:
        """What each fitted point would be predicted as if its whole group were unknown. `groups`: a number each."""
        inverse = np.linalg.inv(self._covariance)
        result = np.empty(len(self._values))
        for group in np.unique(groups):
            members = np.flatnonzero(groups == group)
            residual = np.linalg.solve(inverse[np.ix_(members, members)], self._weights[members])
            result[members] = self._values[members] - residual
        return result
