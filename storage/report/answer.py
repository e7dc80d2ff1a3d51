"""What the numbers of a report say, in sentences. Pure, and never more than the numbers say."""

from __future__ import annotations

from dataclasses import dataclass

from storage.report.numbers import amount, fixed, interval, listed, missing, p_is, p_value, share, some, whole
from storage.report.records import Facts, Plan
from storage.report.words import bound, last_epochs, least, named, rule, span
from storage.statistics.records import Claim, Predictor


@dataclass(frozen=True)
class Sentence:
    """A statement; `caution` is one that limits what may be concluded."""

    text: str
    caution: bool = False


# -- how far it is ----------------------------------------------------------------------------------------


def missing_part(plan: Plan) -> str:
    """What a sweep lacks; nothing where all is done."""
    if plan.done == plan.tasks:
        return ""
    parts = [f"{some(plan.failed, 'task')} failed"] if plan.failed else []
    has = "has" if plan.pending == 1 else "have"
    parts += [f"{some(plan.pending, 'task')} {has} no result yet"] if plan.pending else []
    short = sum(one.done < one.tasks for one in plan.cells)
    said = f"None of its {some(plan.tasks, 'task')} is done"
    if plan.done:
        said = f"{plan.done:,} of {some(plan.tasks, 'task')} ({share(plan.done / plan.tasks, 0)}) are done"
    return f"This sweep is not finished. {said}: {listed(parts)}, in {short} of {some(len(plan.cells), 'cell')}."


# -- the whole sweep --------------------------------------------------------------------------------------


def headline(facts: Facts) -> list[Sentence]:
    """What the sweep says as a whole."""
    claims = [claim for claim in facts.claims.value or [] if claim.verdict]
    if not claims:
        return [Sentence("No cell has two finished candidates that differ: there is nothing to correlate yet.")]
    return [
        _verdicts(claims, facts),
        _settled(claims),
        *_family(claims),
        *_anomalies(claims),
        *_ceilings(claims),
        *_beside(claims, facts),
        *_leader(facts),
        *_without(len(facts.plan.cells) - len(claims)),
    ]


def _verdicts(claims: list[Claim], facts: Facts) -> Sentence:
    x, y = named(facts.x), named(facts.y)
    start = "By" if facts.plan.done == facts.plan.tasks else "So far, by"
    start = f"{start} the paper's rule ({rule(facts.x, facts.y)}) {x}"
    valid = sum(claim.verdict == "valid" for claim in claims)
    if len(claims) == 1:
        does = "predicts" if valid else "does not predict"
        return Sentence(f"{start} {does} {y} here: τ = {fixed(claims[0].tau)}, {p_is(claims[0].p)}.")
    return Sentence(f"{start} predicts {y} in {valid} of {some(len(claims), 'cell')}.")


def _settled(claims: list[Claim]) -> Sentence:
    known = [claim for claim in claims if claim.settled is not None]
    settled = [claim for claim in known if claim.settled]
    limit = bound(claims[0].x, claims[0].y)
    if not known:
        return Sentence("No interval for τ can be had here: how certain it is cannot be said.", caution=True)
    if len(claims) == 1:
        lies = "lies wholly" if settled else "does not lie wholly"
        so = "it is settled as far as candidates go" if settled else "other candidates could turn it"
        around = interval(known[0].tau_interval, 2)
        text = f"The 95 % interval of τ, {around}, {lies} on the verdict's side of {limit}: {so}."
        return Sentence(text, caution=not settled)
    text = f"The 95 % interval of τ lies wholly on the verdict's side of {limit} in {len(settled)} of {len(claims)}"
    turned, without = len(known) - len(settled), len(claims) - len(known)
    if not turned and not without:
        return Sentence(f"{text}: as far as candidates go, every verdict is settled.")
    rest = [f"in {turned} a different draw of candidates could turn the verdict"] if turned else []
    rest += [f"in {without} no interval can be had"] if without else []
    return Sentence(f"{text}; {'; '.join(rest)}.", caution=True)


def _family(claims: list[Claim]) -> list[Sentence]:
    if len(claims) < 2:
        return []
    kept, plain = sum(claim.p_holm <= 0.05 for claim in claims), sum(claim.p <= 0.05 for claim in claims)
    adjusted = f"and in {kept} after Holm's adjustment for having looked at {len(claims)}"
    return [Sentence(f"p is at most 0.05 in {plain} of {len(claims)} cells, {adjusted}.")]


def _anomalies(claims: list[Claim]) -> list[Sentence]:
    ratios = [c.picks.anomaly_ratio for c in claims if not missing(c.picks.anomaly_ratio)]
    if not ratios:
        return []
    picked = f"The candidate of {least(claims[0].x)} {named(claims[0].x)} is beaten by"
    if len(ratios) == 1:
        over = ", which the paper calls a failure" if ratios[0] >= 0.5 else ""
        return [Sentence(f"{picked} {share(ratios[0])} of the candidates (the anomaly ratio){over}.")]
    bad = sum(ratio >= 0.5 for ratio in ratios)
    many = (
        f"in {some(bad, 'cell')} it is half or more, which the paper calls a failure" if bad else "nowhere half or more"
    )
    low, high = share(min(ratios)), share(max(ratios))
    return [Sentence(f"{picked} {low} to {high} of the candidates of its cell (the anomaly ratio); {many}.")]


ONE_SEED = Sentence(
    "Every candidate was retrained with one seed only. How much of the differences after retraining is noise can "
    "therefore not be said, nor how high |τ| could be at all, nor whether a weak τ means a poor predictor or noisy "
    "retraining.",
    caution=True,
)


def _ceilings(claims: list[Claim]) -> list[Sentence]:
    if all(claim.seeds < 2 for claim in claims):
        return [ONE_SEED]
    known = [claim.noise.ceiling for claim in claims if not missing(claim.noise.ceiling)]
    if not known:
        why = listed(sorted({claim.noise.why_not for claim in claims if claim.noise.why_not}))
        text = f"The ceiling that retraining noise sets cannot be estimated here{f': {why}' if why else ''}."
        return [Sentence(text, caution=True)]
    low, high = fixed(min(known), 2), fixed(max(known), 2)
    between = low if low == high else f"{low} to {high}"
    part = "" if len(known) == len(claims) else f" (in the {len(known)} of {len(claims)} cells where it can be had)"
    text = f"With {span([claim.seeds for claim in claims])} seeds the ceiling of |τ| is {between}{part}"
    found = [Sentence(f"{text}: that is what a perfect predictor would be expected to reach, given retraining noise.")]
    closed = sum(ceiling < 0.2 for ceiling in known)
    where = "here" if len(claims) == 1 else f"in {some(closed, 'cell')}"
    low_one = f"The ceiling is below 0.2 {where}: there not even a perfect predictor would be expected to be valid."
    return [*found, Sentence(low_one, caution=True)] if closed else found


def _beside(claims: list[Claim], facts: Facts) -> list[Sentence]:
    """How much tau depends on the choice of the best epoch."""
    moved = [abs(facts.beside[c.cell_id] - c.tau) for c in claims if not missing(facts.beside.get(c.cell_id))]
    if not moved:
        return []
    far = f"by {'at most ' if len(moved) > 1 else ''}{fixed(max(moved), 2)}"
    last = last_epochs(one.cell for one in facts.plan.cells)
    start = "The best epoch is picked on the test set, as the paper does, which is optimistic"
    return [Sentence(f"{start}; with the mean of {last} in its place τ moves {far}.")]


def _leader(facts: Facts) -> list[Sentence]:
    """Which predictor leads, and whether its lead is real."""
    bench = facts.criteria.value
    lines = overall(bench.predictors) if bench else []
    ranked = sorted((line for line in lines if not missing(line.strength)), key=lambda line: line.rank)
    if not bench or len(ranked) < 2:
        return []
    first, second, *_ = ranked
    pair = {first.name, second.name}
    here = [d for d in bench.differences if d.cell_id == first.cell_id and {d.better, d.worse} == pair]
    where = "here" if first.cell_id else f"over {first.cell}"
    text = f"Of {len(ranked)} predictors {named(first.name)} orders the candidates best {where}"
    lead = f"its lead over {named(second.name)} is {fixed(first.strength - second.strength, 2)}"
    if not here:
        return [Sentence(f"{text}; {lead}.")]
    if missing(here[0].p_holm):
        return [Sentence(f"{text}; {lead}, of which no test can be had.", caution=True)]
    real = here[0].p_holm <= 0.05
    proof = f"more than chance ({p_is(here[0].p_holm)} by Holm)"
    return [Sentence(f"{text}; {lead}, {proof if real else f'not shown to be {proof}'}.", caution=not real)]


def overall(predictors: list[Predictor]) -> list[Predictor]:
    """The lines over all cells; of a single cell its own."""
    return [line for line in predictors if not line.cell_id] or (
        predictors if len({line.cell_id for line in predictors}) == 1 else []
    )


def _without(cells: int) -> list[Sentence]:
    have = "has" if cells == 1 else "have"
    return [Sentence(f"{some(cells, 'cell')} {have} no τ: too few finished candidates that differ.")] if cells else []


# -- one cell ---------------------------------------------------------------------------------------------


def of_cell(claim: Claim) -> list[Sentence]:
    """What one cell says."""
    if not claim.verdict:
        return [Sentence(f"{some(claim.n, 'candidate')} of {claim.planned:,} to correlate, and no τ among them.")]
    found = [_tau(claim), *_pick(claim), *_noise(claim), *_needed(claim)]
    left = claim.planned - claim.n - claim.dropped
    are = "is" if left == 1 else "are"
    return [*found, Sentence(f"{left:,} of {claim.planned:,} candidates {are} missing.", True)] if left else found


def _tau(claim: Claim) -> Sentence:
    around = interval(claim.tau_interval)
    holm = f" ({p_value(claim.p_holm)} by Holm)" if not missing(claim.p_holm) and claim.p_holm != claim.p else ""
    numbers = f"τ = {fixed(claim.tau)} {around}".rstrip()
    over = f"over {some(claim.n, 'candidate')} and {some(claim.seeds, 'seed')}"
    sure = "" if claim.settled is None else ", and settled" if claim.settled else ", not settled"
    return Sentence(f"{numbers}, {p_is(claim.p)}{holm}, {over}: {claim.verdict} by the paper's rule{sure}.")


def _pick(claim: Claim) -> list[Sentence]:
    picks = claim.picks
    if missing(picks.regret):
        return []
    start = f"The candidate of {least(claim.x)} {named(claim.x)}"
    if picks.regret == 0:
        return [Sentence(f"{start} is the best after retraining, too.")]
    held = f" ({amount(picks.regret_held_out, claim.y)} on held-out seeds)"
    held = "" if missing(picks.regret_held_out) else held
    text = f"{start} ends {amount(picks.regret, claim.y)} short of the best{held}"
    return [Sentence(f"{text}; {share(picks.anomaly_ratio)} of the candidates end better than it.")]


def _noise(claim: Claim) -> list[Sentence]:
    noise = claim.noise
    if missing(noise.ceiling):
        why = "one seed" if claim.seeds < 2 else noise.why_not
        return [Sentence(f"Its noise ceiling is not estimable{f': {why}' if why else ''}.", caution=True)]
    text = f"A perfect predictor would reach |τ| of {fixed(noise.ceiling)} {interval(noise.ceiling_interval)}".rstrip()
    corrected = f"; freed from that noise τ is {fixed(noise.corrected)} {interval(noise.corrected_interval)}".rstrip()
    return [Sentence(f"{text}{'' if missing(noise.corrected) else corrected}.")]


def _needed(claim: Claim) -> list[Sentence]:
    power = claim.power
    if missing(power.detectable):
        return []
    text = f"The smallest |τ| that so many candidates find four times out of five is {fixed(power.detectable, 2)}"
    if missing(power.more_candidates) or power.more_candidates == 0:
        return [Sentence(f"{text}.")]
    more = f"{whole(power.more_candidates)} more, if the cell has so many, would settle its sign"
    return [Sentence(f"{text}; were this τ the true one, {more}.")]


# -- what is not said -------------------------------------------------------------------------------------


def limits(facts: Facts) -> list[str]:
    """What the numbers cannot say, as far as it can be told from what ran."""
    claims = facts.claims.value or []
    checks = (
        (
            any(claim.n + claim.dropped < claim.planned for claim in claims),
            "Only finished candidates count. Those that are missing may be unlike them; every number may still move.",
        ),
        (
            _one_dense(facts.plan),
            "All candidates of a cell are pruned from one dense network. The intervals are over candidates of that "
            "network; they do not say how another dense training would come out.",
        ),
        (
            any(claim.seeds == 1 for claim in claims),
            "With one seed for each candidate nothing is known of the noise of retraining.",
        ),
        (
            any(claim.seeds == 2 for claim in claims),
            "Two seeds are the fewest from which noise can be estimated at all: read ceilings with their intervals.",
        ),
        (
            facts.y.startswith("best_"),
            "The best epoch is chosen on the test set: the values are optimistic.",
        ),
        (
            bool(facts.diverged.value),
            f"{some(facts.diverged.value or 0, 'retraining')} diverged. A candidate is left out where a seed has no "
            "value, and counted as dropped.",
        ),
    )
    return [text for holds, text in checks if holds]


def _one_dense(plan: Plan) -> bool:
    """Whether every network and data set has one dense model."""
    dense = {one.cell.dense.dense_id: (one.cell.dense.model, one.cell.dense.dataset) for one in plan.cells}
    return len(set(dense.values())) == len(dense)
