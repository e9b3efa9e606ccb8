"""When requests arrive: renewal processes with a given mean rate, drawn from a seed.

fixed      every gap the same                                 CV 0
poisson    exponential gaps: many independent clients         CV 1
gamma      gamma gaps with any CV: above 1 bursty, below 1 paced (as in ServeGen, arXiv 2505.09999)
"""

from __future__ import annotations

import itertools
import math
import random
from typing import Literal, get_args

from engine.errors import InvalidArgument

ArrivalKind = Literal["poisson", "gamma", "fixed"]


def arrivals(rate: float, count: int, kind: ArrivalKind, cv: float, rng: random.Random) -> list[float]:
    """`count` times in seconds from 0, in order; the first comes one gap after 0. `rate`: requests per second.

    `cv`, the gaps' standard deviation over their mean, is read for `gamma` only. Raises InvalidArgument naming the
    argument that cannot be.
    """
    if not (math.isfinite(rate) and rate > 0):
        raise InvalidArgument("rate", rate, "a positive number of requests per second")
    if count < 0:
        raise InvalidArgument("count", count, "a number of requests, 0 or more")
    if kind == "fixed":
        return [(index + 1) / rate for index in range(count)]
    if kind == "poisson":
        gaps = [rng.expovariate(rate) for _ in range(count)]
    elif kind == "gamma":
        if not (math.isfinite(cv) and cv > 0):
            raise InvalidArgument("cv", cv, "a positive number")
        # A gamma distribution of shape k has CV 1/√k and mean k·scale.
        shape = 1.0 / cv**2
        gaps = [rng.gammavariate(shape, 1.0 / (rate * shape)) for _ in range(count)]
    else:
        raise InvalidArgument("kind", kind, " or ".join(get_args(ArrivalKind)))
    return list(itertools.accumulate(gaps))
