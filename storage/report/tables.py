"""The tables of a report: from records to what stands in each field, beside the number itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from storage.report import words
from storage.report.numbers import NONE, fixed, interval, is_accuracy, missing, moment, p_value, seconds, share, whole
from storage.report.records import Cost, Facts, Plan, Ran
from storage.statistics import higher_is_better
from storage.statistics.records import NO_INTERVAL, Claim, Difference, EarlyEpoch, Interval, Predictor


@dataclass(frozen=True)
class Field:
    """One field: what is shown, an interval beside it, and the number it stands for (by which its column is sorted)."""

    text: str
    value: float | str | None = None
    beside: str = ""
    low: float | None = None
    high: float | None = None
    kind: str = ""
    link: str = ""


@dataclass(frozen=True)
class Head:
    """The head of a column: its name in the records and tables of prunesweep, what is shown, what it means."""

    name: str
    title: str
    help: str = ""
    number: bool = True


@dataclass(frozen=True)
class Table:
    """A table; the first field of each line is its head. `total` is a line that is not sorted."""

    name: str
    caption: str
    heads: tuple[Head, ...]
    lines: tuple[tuple[Field, ...], ...]
    total: tuple[Field, ...] = ()


Column = tuple[Head, Callable[[Any], Field]]


def _table(name: str, caption: str, columns: Sequence[Column], records: Iterable[Any]) -> Table:
    """Columns in which no record has anything are left out."""
    lines = [tuple(field(record) for _, field in columns) for record in records]
    kept = [
        i for i in range(len(columns)) if i == 0 or not lines or any(line[i].text not in ("", NONE) for line in lines)
    ]
    heads = tuple(columns[i][0] for i in kept)
    return Table(name, caption, heads, tuple(tuple(line[i] for i in kept) for line in lines))


def _number(value: float | None, text: str) -> Field:
    return Field(text, None if missing(value) else value)


def _around(value: float | None, text: str, found: Interval, digits: int = 3) -> Field:
    low, high = (None if missing(v) else v for v in (found.low, found.high))
    return Field(text, None if missing(value) else value, interval(found, digits), low, high)


def _shares(value: float, found: Interval = NO_INTERVAL) -> Field:
    known = not missing(found.low) and not missing(found.high)
    beside = f"[{fixed(100 * found.low, 1)}, {fixed(100 * found.high, 1)}]" if known else ""
    return Field(
        share(value), None if missing(value) else value, beside, *((found.low, found.high) if known else (None, None))
    )


def _amount(value: float, column: str, found: Interval = NO_INTERVAL) -> Field:
    """A difference in the units of a column, without their name: the head says it."""
    scale, digits = (100, 2) if is_accuracy(column) else (1, 4)
    field = _around(value, fixed(scale * value, digits), found)
    return replace(field, beside=interval(Interval(scale * found.low, scale * found.high), digits))


def _cell(labels: Mapping[str, str]) -> Callable[[Any], Field]:
    """The cell a record is of, linked to its section."""

    def field(record: Any) -> Field:
        label = labels.get(record.cell_id) or record.cell
        return Field(label, label, link=f"#cell-{record.cell_id}" if record.cell_id in labels else "")

    return field


CELL = Head("cell", "cell", "one point of the grid: what one correlation is computed over", number=False)


def labels_of(facts: Facts) -> dict[str, str]:
    """cell id -> what tells it apart."""
    return {one.cell.cell_id: one.label for one in facts.plan.cells}


def cells(facts: Facts, claims: list[Claim]) -> Table:
    """The verdicts: tau with its interval and p, the other coefficients."""
    columns: list[Column] = [
        (CELL, _cell(labels_of(facts))),
        (
            Head("n", "n", "candidates with every planned seed done, of those planned"),
            lambda c: Field(whole(c.n), c.n, f"of {whole(c.planned)}" if c.n < c.planned else ""),
        ),
        (
            Head("dropped", "dropped", "of them without a value (diverged), and left out"),
            lambda c: _number(c.dropped, whole(c.dropped) if c.dropped else NONE),
        ),
        (Head("seeds", "seeds", "retrainings of each candidate"), lambda c: _number(c.seeds, whole(c.seeds))),
        (
            Head("tau", "τ [95 %]", "Kendall's tau-b with its bootstrap interval over candidates"),
            lambda c: _around(c.tau, fixed(c.tau), c.tau_interval, 2),
        ),
        (Head("p", "p", "two-sided"), lambda c: _number(c.p, p_value(c.p))),
        *(_ADJUSTED if len(claims) > 1 else ()),
        (Head("verdict", "verdict", f"valid: {words.rule(facts.x, facts.y)}", number=False), _verdict),
        (
            Head(
                "settled",
                "settled",
                "whether the interval lies wholly on the verdict's side of the bound",
                number=False,
            ),
            lambda c: Field(NONE if c.settled is None else "yes" if c.settled else "no"),
        ),
        *_beside(facts),
        (
            Head("spearman", "Spearman", "rank correlation"),
            lambda c: _around(c.spearman, fixed(c.spearman), c.spearman_interval, 2),
        ),
        (
            Head("pearson", "Pearson", "linear correlation"),
            lambda c: _around(c.pearson, fixed(c.pearson), c.pearson_interval, 2),
        ),
    ]
    caption = f"{_capital(words.named(facts.x))} against {words.named(facts.y)}, cell by cell"
    return _table("cells", caption, columns, claims)


_ADJUSTED: tuple[Column, ...] = (
    (
        Head("p_holm", "p, Holm", "adjusted over the cells shown, family-wise"),
        lambda c: _number(c.p_holm, p_value(c.p_holm)),
    ),
    (
        Head("p_bh", "p, BH", "adjusted over the cells shown, false discovery rate"),
        lambda c: _number(c.p_bh, p_value(c.p_bh)),
    ),
)


def _beside(facts: Facts) -> list[Column]:
    if not facts.beside:
        return []
    head = Head("tau_last5", "τ, last 5", "tau with the mean of the last five epochs in place of the best epoch")
    return [(head, lambda c: _number(facts.beside.get(c.cell_id), fixed(facts.beside.get(c.cell_id))))]


def _verdict(claim: Claim) -> Field:
    if not claim.verdict:
        return Field("no τ", "", kind="open")
    return Field(claim.verdict, claim.verdict, kind="valid" if claim.verdict == "valid" else "not")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def noise(facts: Facts, claims: list[Claim]) -> Table:
    """What retraining noise leaves."""
    columns: list[Column] = [
        (CELL, _cell(labels_of(facts))),
        (Head("seeds", "seeds"), lambda c: _number(c.noise.seeds, whole(c.noise.seeds))),
        (
            Head("reliability", "ICC(C,k)", "reliability of the mean over seeds: 1 is no noise, 0 is noise only"),
            lambda c: _around(c.noise.reliability, fixed(c.noise.reliability), c.noise.reliability_interval, 2),
        ),
        (
            Head("reliability_one", "ICC(C,1)", "reliability of a single seed"),
            lambda c: _number(c.noise.reliability_one, fixed(c.noise.reliability_one)),
        ),
        (
            Head("noise_std", words.in_unit("noise", facts.y), "standard deviation of a candidate's mean over seeds"),
            lambda c: _amount(c.noise.noise_std, facts.y),
        ),
        (
            Head("split_half", "split-half τ", "tau between the means of disjoint halves of the seeds"),
            lambda c: _number(c.noise.split_half, fixed(c.noise.split_half)),
        ),
        (
            Head("ceiling", "ceiling of |τ| [95 %]", "what a perfect predictor would be expected to reach"),
            lambda c: _around(c.noise.ceiling, fixed(c.noise.ceiling), c.noise.ceiling_interval, 2),
        ),
        (
            Head("corrected", "τ corrected [95 %]", "tau freed from attenuation by the noise"),
            lambda c: _around(c.noise.corrected, fixed(c.noise.corrected), c.noise.corrected_interval, 2),
        ),
        (
            Head("not_estimable", "not estimable because", number=False),
            lambda c: Field(c.noise.why_not, c.noise.why_not),
        ),
    ]
    return _table("noise", f"What the noise of retraining leaves of {words.named(facts.y)}", columns, claims)


def picks(facts: Facts, claims: list[Claim]) -> Table:
    """What picking a candidate by x costs."""
    x = words.named(facts.x)
    best_less = "the best candidate less the picked one"
    picked_less = "the picked candidate less the best one"
    columns: list[Column] = [
        (CELL, _cell(labels_of(facts))),
        (
            Head("picked", "picked", f"number of the candidate of {words.least(facts.x)} {x}"),
            lambda c: Field(NONE if c.picks.candidate is None else str(c.picks.candidate), c.picks.candidate),
        ),
        (
            Head(
                "anomaly_ratio",
                "anomaly ratio [95 %]",
                "share of candidates that end strictly better than the picked one",
            ),
            lambda c: _shares(c.picks.anomaly_ratio, c.picks.anomaly_interval),
        ),
        (
            Head(
                "regret",
                f"{words.in_unit('regret', facts.y)} [95 %]",
                best_less if higher_is_better(facts.y) else picked_less,
            ),
            lambda c: _amount(c.picks.regret, facts.y, c.picks.regret_interval),
        ),
        (
            Head(
                "regret_held_out",
                "regret, held out",
                "the best chosen on the other seeds, so that noise does not add to it",
            ),
            lambda c: _amount(c.picks.regret_held_out, facts.y),
        ),
        (
            Head("percentile", "percentile", "share of the other candidates that the picked one is no worse than"),
            lambda c: _shares(c.picks.percentile),
        ),
        (
            Head("top_overlap", "top overlap", f"share of the best by {x} that are among the best in the end"),
            lambda c: Field(share(c.picks.top_overlap), _or_none(c.picks.top_overlap), _chance(c)),
        ),
        (
            Head(
                "counterexamples", "counterexamples", "share of pairs ordered wrongly by more than the retraining noise"
            ),
            lambda c: _shares(c.picks.counterexamples),
        ),
    ]
    return _table("picks", f"What choosing the candidate of {words.least(facts.x)} {x} costs", columns, claims)


def _or_none(value: float) -> float | None:
    return None if missing(value) else value


def _chance(claim: Claim) -> str:
    top = claim.picks.top
    return (
        f"of {top}; chance {share(top / claim.n)}" if top and claim.n and not missing(claim.picks.top_overlap) else ""
    )


_ENOUGH = "0: p is at most 0.05 already; a dash: no number would"


def power(facts: Facts, claims: list[Claim]) -> Table:
    """What the cells could have found."""
    columns: list[Column] = [
        (CELL, _cell(labels_of(facts))),
        (Head("n", "n"), lambda c: _number(c.n, whole(c.n))),
        (
            Head("tau", "τ [95 %]"),
            lambda c: _around(c.tau, fixed(c.tau), c.tau_interval, 2),
        ),
        (
            Head("detectable", "detectable |τ|", "the smallest that is found with a power of 80 %, at 5 %, two-sided"),
            lambda c: _number(c.power.detectable, fixed(c.power.detectable)),
        ),
        (
            Head(
                "more_candidates",
                "more candidates",
                f"that would settle the sign, were this tau the true one; {_ENOUGH}, or the cell has all candidates. "
                "How many combinations a cell has is not looked at",
            ),
            lambda c: _number(c.power.more_candidates, whole(c.power.more_candidates)),
        ),
        (
            Head(
                "more_seeds",
                "more seeds",
                f"that would; {_ENOUGH}, or, with one seed, the noise is not known",
            ),
            lambda c: _number(c.power.more_seeds, whole(c.power.more_seeds)),
        ),
    ]
    return _table("power", "What each cell could have found, and what would settle its sign", columns, claims)


def criteria(facts: Facts, found: list[Predictor], name: str, caption: str) -> Table:
    """Lines of the criterion bench."""
    columns: list[Column] = [
        (CELL, _cell(labels_of(facts))),
        (Head("rank", "rank", "by strength, 1 the best"), lambda p: _number(p.rank, whole(p.rank))),
        (Head("name", "predictor", number=False), lambda p: Field(words.named(p.name), p.name)),
        (Head("n", "n"), lambda p: _number(p.n, whole(p.n))),
        (Head("tau", "τ [95 %]", "as measured"), lambda p: _around(p.tau, fixed(p.tau), p.tau_interval, 2)),
        (
            Head("strength", "strength", "tau turned so that more is a better prediction"),
            lambda p: _number(p.strength, fixed(p.strength)),
        ),
        (Head("p", "p"), lambda p: _number(p.p, p_value(p.p))),
        (
            Head("ceiling", "ceiling", "the |tau| that a perfect predictor would be expected to reach"),
            lambda p: _number(p.ceiling, fixed(p.ceiling)),
        ),
        (
            Head(
                "beats",
                "beats",
                "predictors that it is stronger than by more than chance (Holm, p ≤ 0.05)",
                number=False,
            ),
            lambda p: Field(", ".join(words.named(name) for name in p.beats)),
        ),
    ]
    return _table(name, caption, columns, found)


def differences(facts: Facts, found: list[Difference]) -> Table:
    """Which leads are real."""
    columns: list[Column] = [
        (CELL, _cell(labels_of(facts))),
        (Head("better", "better", number=False), lambda d: Field(words.named(d.better), d.better)),
        (Head("worse", "worse", number=False), lambda d: Field(words.named(d.worse), d.worse)),
        (
            Head("difference", "difference [95 %]", "in strength"),
            lambda d: _around(d.difference, fixed(d.difference), d.interval, 2),
        ),
        (Head("p", "p", "bootstrap, paired over candidates"), lambda d: _number(d.p, p_value(d.p))),
        (Head("p_holm", "p, Holm", "adjusted within the cell"), lambda d: _number(d.p_holm, p_value(d.p_holm))),
        (
            Head("real", "real", "Holm-adjusted p at most 0.05", number=False),
            lambda d: Field(
                NONE if missing(d.p_holm) else "yes" if d.p_holm <= 0.05 else "no",
                kind="valid" if d.p_holm <= 0.05 else "",
            ),
        ),
    ]
    records: list[Difference] = sorted(found, key=lambda d: bool(d.cell_id))
    return _table("pairs", "Predictors compared in pairs", columns, records)


def early(facts: Facts, found: list[EarlyEpoch]) -> Table:
    """How soon retraining tells."""
    columns: list[Column] = [
        (CELL, _cell(labels_of(facts))),
        (Head("epoch", "epoch", "of retraining; 0 is before it"), lambda e: _number(e.epoch, whole(e.epoch))),
        (Head("n", "n"), lambda e: _number(e.n, whole(e.n))),
        (
            Head("tau", "τ with the outcome [95 %]", f"accuracy after this epoch against {words.named(facts.y)}"),
            lambda e: _around(e.tau, fixed(e.tau), e.tau_interval, 2),
        ),
        (
            Head("tau_x", f"τ of {words.named(facts.x)}", "with the accuracy after this epoch"),
            lambda e: _number(e.tau_x, fixed(e.tau_x)),
        ),
    ]
    return _table("early", "How soon the accuracy during retraining tells the outcome", columns, found)


def planned(plan: Plan) -> Table:
    """The cells of the grid and how they stand."""
    columns: list[Column] = [
        (CELL, lambda c: Field(c.label, c.label, link=f"#cell-{c.cell.cell_id}")),
        (Head("candidates", "candidates"), lambda c: _number(c.candidates, whole(c.candidates))),
        (Head("seeds", "seeds"), lambda c: _number(c.seeds, whole(c.seeds))),
        (Head("tasks", "tasks"), lambda c: _number(c.tasks, whole(c.tasks))),
        (Head("done", "done"), lambda c: _number(c.done, whole(c.done))),
        (Head("failed", "failed"), lambda c: _number(c.failed, whole(c.failed))),
        (Head("pending", "pending"), lambda c: _number(c.pending, whole(c.pending))),
        (
            Head("cell_id", "cell id", "names the cell in every table of the store", number=False),
            lambda c: Field(c.cell.cell_id, c.cell.cell_id, kind="code"),
        ),
    ]
    found = _table("planned", "The cells of the grid, and how they stand", columns, plan.cells)
    counts = {"tasks": plan.tasks, "done": plan.done, "failed": plan.failed, "pending": plan.pending}
    total = (
        Field("in all"),
        *(_number(counts.get(h.name), whole(counts[h.name]) if h.name in counts else "") for h in found.heads[1:]),
    )
    return Table(found.name, found.caption, found.heads, found.lines, total if len(plan.cells) > 1 else ())


def executions(found: list[Ran]) -> Table:
    """The ways in which rows were made."""
    columns: list[Column] = [
        (
            Head("device_model", "device", number=False),
            lambda r: Field(str(r.execution.get("device_model", "unknown"))),
        ),
        (
            Head("device", "as", number=False),
            lambda r: Field(", ".join(sorted({d.partition(":")[0] for d in r.devices}))),
        ),
        (Head("hosts", "machines"), lambda r: _number(r.hosts, whole(r.hosts))),
        (Head("backend", "back-end", number=False), lambda r: Field(str(r.execution.get("backend", NONE)))),
        (
            Head("fleet", "fleet", "networks retrained at once"),
            lambda r: _number(r.execution.get("fleet"), whole(r.execution.get("fleet"))),
        ),
        (Head("threads", "threads"), lambda r: _number(r.execution.get("threads"), whole(r.execution.get("threads")))),
        (
            Head("processes", "processes", "that train one network together"),
            lambda r: _number(r.execution.get("processes"), whole(r.execution.get("processes"))),
        ),
        (
            Head("deterministic", "sums", "whether an operation adds up in no fixed order", number=False),
            lambda r: Field("" if r.execution.get("deterministic", True) else "in no fixed order"),
        ),
        (Head("tasks", "tasks"), lambda r: _number(r.tasks, whole(r.tasks))),
        (
            Head("first", "first began", number=False),
            lambda r: Field(moment(r.first), str(r.first or ""), kind="whole"),
        ),
        (Head("last", "last ended", number=False), lambda r: Field(moment(r.last), str(r.last or ""), kind="whole")),
    ]
    return _table("executions", "How the rows were made", columns, found)


def costs(facts: Facts, found: list[Cost]) -> Table:
    """What attempts took, cell by cell."""
    columns: list[Column] = [
        (CELL, _cell(labels_of(facts))),
        *(_count(name, title, note) for name, title, note in _COUNTS),
        *(_seconds(name, title) for name, title in _SECONDS),
    ]
    shown = [(head, field) for head, field in columns if not head.name.endswith("seconds") or _spent(found, head.name)]
    table = _table("cost", "What attempts at the tasks took, in seconds of one CPU worker or one GPU", shown, found)
    sums = {head.name: sum(getattr(one, head.name) for one in found) for head in table.heads[1:]}
    total = (
        Field("in all"),
        *(_number(value, seconds(value) if "seconds" in name else whole(value)) for name, value in sums.items()),
    )
    return Table(table.name, table.caption, table.heads, table.lines, total if len(found) > 1 else ())


_COUNTS = (
    ("attempts", "attempts", "rows left behind, by whichever run of the store"),
    ("failed_attempts", "failed", ""),
    ("wasted_attempts", "wasted", "failed, or for a task that another row stands for"),
)
_SECONDS = (
    ("cpu_seconds", "CPU-seconds"),
    ("wasted_cpu_seconds", "of them wasted"),
    ("gpu_seconds", "GPU-seconds"),
    ("wasted_gpu_seconds", "of them wasted"),
)


def _count(name: str, title: str, help_: str) -> Column:
    return Head(name, title, help_), lambda c: _number(getattr(c, name), whole(getattr(c, name)))


def _seconds(name: str, title: str) -> Column:
    return Head(name, title), lambda c: _number(getattr(c, name), seconds(getattr(c, name)))


def _spent(found: list[Cost], name: str) -> bool:
    """Whether that kind of device was used at all."""
    kind = name.removeprefix("wasted_")
    return any(getattr(one, kind) for one in found)
