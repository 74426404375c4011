"""Whether a difference exceeds what another seed would change.

Welch's interval for the difference of two means (Welch 1947,
https://doi.org/10.1093/biomet/34.1-2.28), with the level shared out over all
pairs that are looked at (Bonferroni). It assumes that the results of seeds are
normal, which three seeds cannot show, and it is wide with three: a difference
below about four spreads stays undecided.
"""

import math
import statistics
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95


@dataclass
class Spread:
    """Mean and standard deviation (n - 1) of the results of n seeds."""

    values: list[float]

    @property
    def n(self) -> int:
        return len(self.values)

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def sd(self) -> float | None:
        return statistics.stdev(self.values) if self.n > 1 else None


@dataclass
class Difference:
    """b - a, and how far it may be off; None where that is not known."""

    value: float
    margin: float | None

    @property
    def exceeds(self) -> bool | None:
        """Whether it is larger than seeds explain; None: cannot be told."""
        return None if self.margin is None else abs(self.value) > self.margin


def pooled(spreads: list[Spread]) -> tuple[float, int] | None:
    """(standard deviation, degrees of freedom) within all configurations."""
    many = [s for s in spreads if s.n > 1]
    dof = sum(s.n - 1 for s in many)
    if not dof:
        return None
    return math.sqrt(sum((s.n - 1) * s.sd**2 for s in many) / dof), dof


def difference(a: Spread, b: Spread, *, pairs=1, pool=None) -> Difference:
    """Between two configurations, one of `pairs` that are looked at.

    Where one of them has a single run, `pool`, the (standard deviation,
    degrees of freedom) of other configurations, stands for both.
    """
    level = 1 - (1 - CONFIDENCE) / pairs
    if a.n > 1 and b.n > 1:
        va, vb = a.sd**2 / a.n, b.sd**2 / b.n
        error = math.sqrt(va + vb)
        # Welch and Satterthwaite's; with no spread at all any will do
        dof = (va + vb)**2 / (va**2 / (a.n - 1) + vb**2 / (b.n - 1)) if (
            error) else a.n + b.n - 2
    elif pool is not None:
        sd, dof = pool
        error = sd * math.sqrt(1 / a.n + 1 / b.n)
    else:
        return Difference(b.mean - a.mean, None)
    return Difference(b.mean - a.mean, error * t_quantile(
        (1 + level) / 2, dof))


def t_quantile(p: float, dof: float) -> float:
    """Student's t below which a share p in (0.5, 1) lies; dof from 1 on.

    With t = sqrt(dof) tan(x) the density is proportional to cos(x)^(dof - 1),
    which the trapezoidal rule integrates to about 1e-9.
    """
    x = np.linspace(0, math.pi / 2, 200_001)
    density = np.cos(x) ** (dof - 1)
    share = np.concatenate([[0], np.cumsum(density[1:] + density[:-1])])
    at = np.interp(2 * p - 1, share / share[-1], x)
    return math.sqrt(dof) * math.tan(at)
