"""What the statistics say of a cell: frozen records, in the terms of docs/statistics.md."""

from __future__ import annotations

from dataclasses import dataclass, field

NAN = float("nan")


@dataclass(frozen=True)
class Interval:
    """A 95 % interval; NaN where it cannot be had."""

    low: float = NAN
    high: float = NAN


NO_INTERVAL = Interval()


@dataclass(frozen=True)
class Noise:
    """What retraining noise leaves of y, over `seeds` crossed with candidates. NaN where not estimable.

    `reliability` is ICC(C,k) of the means over seeds, `reliability_one` ICC(C,1) of one seed; `noise_std` the
    standard deviation of a candidate's mean over seeds, in the units of y. `split_half` is tau-b between the means of
    disjoint halves of the seeds, `split_seeds` seeds each. `ceiling` is the |tau| that a perfect predictor would
    reach; `corrected` is tau freed from attenuation. `why_not` says why something is not estimable.
    """

    seeds: int
    reliability: float = NAN
    reliability_interval: Interval = NO_INTERVAL
    reliability_one: float = NAN
    noise_std: float = NAN
    split_half: float = NAN
    split_seeds: int = 0
    ceiling: float = NAN
    ceiling_interval: Interval = NO_INTERVAL
    corrected: float = NAN
    corrected_interval: Interval = NO_INTERVAL
    why_not: str = ""


@dataclass(frozen=True)
class Picks:
    """What picking the candidate of lowest x costs, in the units of y.

    `regret` is the best y less the picked one's, `percentile` the share of the other candidates that the picked one
    is no worse than; `regret_held_out` chooses the best on the other seeds, so that noise does not add to it.
    `top_overlap` is the share of the `top` best by x that are among the `top` best by y; chance gives `top` / n.
    `counterexamples` is the share of pairs of candidates ordered wrongly by more than the retraining noise.
    """

    candidate: int | None = None
    anomaly_ratio: float = NAN
    anomaly_interval: Interval = NO_INTERVAL
    regret: float = NAN
    regret_interval: Interval = NO_INTERVAL
    regret_held_out: float = NAN
    percentile: float = NAN
    top: int = 0
    top_overlap: float = NAN
    counterexamples: float = NAN


@dataclass(frozen=True)
class Power:
    """What a cell could have found: at 5 %, two-sided, with a power of 80 %.

    `detectable` is the smallest |tau| so found. `more_candidates` and `more_seeds` would settle the sign, were the tau
    found the true one: 0 where it is settled, NaN where no number would, or none can be had.
    """

    detectable: float = NAN
    more_candidates: float = NAN
    more_seeds: float = NAN


@dataclass(frozen=True)
class Claim:
    """What one cell says of x and y, over `n` candidates averaged over `seeds`; `dropped` had no value.

    p values are two-sided, by `p_method` (tau's: exact, permutation or asymptotic); `p_holm` and `p_bh` are adjusted
    over the family of the cells shown. `verdict` is the paper's: `valid` where tau is at most -0.2 (for a y of
    which more is better; else at least 0.2) with p at most 0.05, else `not valid`, and empty where there is no tau.
    `settled` tells whether the whole interval lies on the verdict's side of that 0.2; None without an interval.
    """

    cell_id: str
    title: str
    x: str
    y: str
    n: int
    dropped: int
    planned: int
    seeds: int
    tau: float
    tau_interval: Interval
    p: float
    p_method: str
    p_holm: float
    p_bh: float
    spearman: float
    spearman_interval: Interval
    spearman_p: float
    pearson: float
    pearson_interval: Interval
    pearson_p: float
    verdict: str
    settled: bool | None
    picks: Picks = field(default_factory=Picks)
    noise: Noise = field(default_factory=lambda: Noise(0))
    power: Power = field(default_factory=Power)


@dataclass(frozen=True)
class Predictor:
    """One line of the criterion bench: how well `name` predicts y in a cell, or over all cells (`cell_id` empty).

    `tau` is signed as measured; `strength` is tau turned so that more is a better prediction (removing what matters
    less, or losing less, should leave more accuracy). `rank` is by strength, 1 the best. `beats` names the
    predictors whose strength is lower by more than chance (Holm-adjusted p at most 0.05).
    """

    cell_id: str
    cell: str
    rank: int
    name: str
    n: int
    tau: float
    tau_interval: Interval
    strength: float
    p: float
    ceiling: float
    beats: tuple[str, ...]


@dataclass(frozen=True)
class Difference:
    """`better` less `worse` in strength, paired over candidates; p by bootstrap, Holm-adjusted within the cell."""

    cell_id: str
    cell: str
    better: str
    worse: str
    difference: float
    interval: Interval
    p: float
    p_holm: float


@dataclass(frozen=True)
class EarlyEpoch:
    """After `epoch` epochs of retraining: `tau` of the accuracy there with y, and `tau_x` of x with the accuracy there.

    Epoch 0 is the pruned network before retraining.
    """

    cell_id: str
    cell: str
    epoch: int
    n: int
    tau: float
    tau_interval: Interval
    tau_x: float
