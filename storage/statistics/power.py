"""What a cell could have found, and what it would take to settle the sign of tau.

By the variance of artanh tau, 0.437 / (n - 4) (Fieller, Hartley and Pearson, Biometrika 1957), two-sided at 5 % with a
power of 80 %.
"""

from __future__ import annotations

from math import atanh, ceil, isfinite, pi, sin, sqrt, tanh

from storage.statistics.association import NAN
from storage.statistics.records import Noise, Power

_DISTANCE = 1.959964 + 0.841621
"""Standard errors from zero to where 80 % of the results are beyond 1.96."""
_VARIANCE = 0.437
_SETTLED = 0.05


def detectable(n: int) -> float:
    """The smallest |tau| that n candidates find; NaN with fewer than six, which cannot."""
    return tanh(_DISTANCE * sqrt(_VARIANCE / (n - 4))) if n > 5 else NAN


def power_of(n: int, tau: float, p: float, noise: Noise, *, grows: bool) -> Power:
    """The power of a cell of n candidates with this tau and p. `grows` tells whether it can have more candidates."""
    least = detectable(n)
    if not isfinite(tau) or not isfinite(least):
        return Power(least)
    if p <= _SETTLED:
        return Power(least, 0, 0)
    candidates = _candidates(tau) - n if grows and tau else NAN
    return Power(least, max(candidates, 1) if isfinite(candidates) else NAN, _seeds(least, noise))


def _candidates(tau: float) -> float:
    """Candidates with which this tau is found."""
    if abs(tau) >= 1:
        return 6.0
    return float(ceil(4 + _VARIANCE * (_DISTANCE / atanh(abs(tau))) ** 2))


def _seeds(least: float, noise: Noise) -> float:
    """Seeds more with which the tau of so much less noisy means is found (Spearman-Brown); NaN where none suffice."""
    one = noise.reliability_one
    if not isfinite(one) or one <= 0 or not isfinite(noise.corrected):
        return NAN
    true = sin(pi / 2 * abs(noise.corrected))
    needed = (sin(pi / 2 * least) / true) ** 2 if true else NAN
    if not needed < 1:
        return NAN
    return float(max(ceil(needed * (1 - one) / (one * (1 - needed))) - noise.seeds, 1)) if one < 1 else NAN
