"""Claims: what is put together of the statistics, kept by content; the bench of criteria; early epochs."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from orchestrator.cli_corr import OF_CLAIMS
from storage import claims as module
from storage.claims import claims, expected_sign, settled, verdict
from storage.correlate import CellData, X, Y
from storage.criteria import ALL_CELLS, bench, predictors
from storage.early import early
from storage.statistics import kendall, kendall_ci
from storage.statistics.p_values import holm
from storage.statistics.records import Claim, Interval
from storage.store import Store
from storage.tables import SHOWN, corr_table, criteria_table, differences_table, early_table
from tests.rows import ORACLE, SAMPLED, done, plan, tasks


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def _cell(n: int = 40, k: int = 3, r: float = -0.7, seed: int = 0, name: str = "c0", **more: np.ndarray) -> CellData:
    """A cell whose loss predicts accuracy at about r."""
    generator = np.random.default_rng(seed)
    x = generator.normal(size=n)
    true = r * x + math.sqrt(1 - r * r) * generator.normal(size=n)
    by_seed = (0.9 + 0.01 * (true[:, None] + 0.3 * generator.normal(size=(n, k)))).round(4)
    y = by_seed.mean(1).round(12)
    columns = {X: (1 + 0.1 * x).tolist(), Y: y.tolist(), **{key: value.tolist() for key, value in more.items()}}
    return CellData(name, name, list(range(n)), columns, n, k, {Y: by_seed}, grows=True)


def test_a_claim_is_its_parts() -> None:
    """tau and its interval are those of the lists; the rest is there, and in its bounds."""
    cell = _cell()
    (found,) = claims([cell], X, Y, every_interval=True)
    x, y = cell.columns[X], cell.columns[Y]
    assert found.tau == pytest.approx(kendall(x, y)[0])
    assert found.tau_interval.low < found.tau < found.tau_interval.high
    assert (found.tau_interval.low, found.tau_interval.high) == pytest.approx(kendall_ci(x, y), abs=0.05)
    assert found.spearman_interval.low < found.spearman < found.spearman_interval.high
    assert found.pearson_interval.low < found.pearson < found.pearson_interval.high
    assert abs(found.tau) < abs(found.noise.corrected) < 1
    assert found.noise.corrected_interval.low < found.noise.corrected < found.noise.corrected_interval.high
    assert (found.n, found.dropped, found.planned, found.seeds) == (40, 0, 40, 3)
    assert (found.verdict, found.settled, found.power.more_seeds) == ("valid", True, 0)
    assert found.picks.candidate == int(np.asarray(x, dtype=np.float64).argmin())


def test_p_is_adjusted_over_the_cells_shown() -> None:
    """Three cells are one family, one of them alone another; a cell without tau is in none."""
    cells = [_cell(r=r, seed=at, name=f"c{at}") for at, r in enumerate((-0.4, -0.2, 0.1))]
    empty = CellData("c9", "c9", [], {X: [], Y: []}, 5, 1)
    found = claims([*cells, empty], X, Y, resamples=100)
    assert [one.p_holm for one in found[:3]] == pytest.approx(holm([one.p for one in found[:3]]))
    assert math.isnan(found[3].p_holm) and found[3].verdict == "" and not found[3].settled
    (alone,) = claims(cells[:1], X, Y, resamples=100)
    assert alone.p_holm == alone.p == found[0].p


def test_what_a_candidate_lacks_drops_it_alone() -> None:
    """A null in x or a NaN in y is counted, and the rest is as if it had not been there."""
    cell, holes = _cell(), (3, 17)
    columns = {name: [None if at in holes[:1] else v for at, v in enumerate(cell.columns[name])] for name in (X,)}
    columns[Y] = [math.nan if at in holes[1:] else v for at, v in enumerate(cell.columns[Y])]
    (found,) = claims([replace(cell, columns=columns)], X, Y, resamples=200)
    keep = [at for at in range(40) if at not in holes]
    fewer = {name: [cell.columns[name][at] for at in keep] for name in (X, Y)}
    less = replace(cell, candidate=keep, columns=fewer, by_seed={Y: cell.by_seed[Y][keep]})
    (want,) = claims([less], X, Y, resamples=200)
    assert repr(found) == repr(replace(want, dropped=2))


def test_a_constant_side_is_nan_everywhere() -> None:
    """No tau, no p, no interval, no verdict; nothing is 0."""
    cell = _cell()
    for name in (X, Y):
        flat = replace(cell, columns=cell.columns | {name: [0.5] * 40}, by_seed={Y: np.full((40, 3), 0.5)})
        (found,) = claims([flat], X, Y, every_interval=True)
        numbers = (found.tau, found.p, found.spearman, found.spearman_p, found.pearson_p, found.noise.corrected)
        assert all(map(math.isnan, numbers)) and math.isnan(found.tau_interval.low)
        assert found.verdict == "" and not found.settled
        assert math.isnan(found.picks.anomaly_ratio) and math.isnan(found.picks.regret)


def test_a_second_look_is_read_and_new_values_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was computed is kept by the values it is of; what is kept and damaged is computed again."""
    cell = _cell()
    first = claims([cell], X, Y)
    made = module._claim
    monkeypatch.setattr(module, "_claim", None)
    assert repr(claims([cell], X, Y)) == repr(first)
    with pytest.raises(TypeError):
        claims([cell], X, Y, every_interval=True)
    changed = replace(cell, columns=cell.columns | {X: [*cell.columns[X][:-1], 9.0]})
    with pytest.raises(TypeError):
        claims([changed], X, Y)
    monkeypatch.setattr(module, "_claim", made)
    (file,) = module._folder().iterdir()
    whole = file.read_text()
    digest, kept = whole.split("\n")
    for damage in (
        "",
        "{}",
        digest,
        f"{digest}\n{json.dumps(json.loads(kept) | {'tau': 1})}",
        whole.replace("9", "8", 1),
    ):
        file.write_text(damage)
        assert repr(claims([cell], X, Y)) == repr(first)
    assert claims([changed], X, Y)[0].pearson != first[0].pearson
    assert len(list(module._folder().iterdir())) == 1


def test_a_cache_that_cannot_be_written_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A claim does not fail for it."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert claims([_cell()], X, Y, resamples=100)[0].n == 40


@pytest.mark.parametrize(
    ("x", "y", "sign"),
    [
        (X, Y, -1),
        (X, "best_test_loss", 1),
        ("score_l1", Y, -1),
        ("pruned_test_accuracy", Y, 1),
        ("pruned_test_accuracy", "best_test_loss", -1),
    ],
)
def test_the_expected_sign(x: str, y: str, sign: int) -> None:
    """A loss falls where an accuracy rises."""
    assert expected_sign(x, y) == sign


def test_the_paper_s_verdict() -> None:
    """tau of 0.2 at least with p of 0.05 at most; settled is what the interval says of that 0.2."""
    assert verdict(-0.2, 0.05, -1) == "valid" == verdict(0.2, 0.05, 1)
    assert verdict(-0.19, 0.001, -1) == verdict(-0.5, 0.06, -1) == verdict(0.5, 0.001, -1) == "not valid"
    assert verdict(math.nan, math.nan, -1) == ""
    assert settled(Interval(-0.5, -0.2), "valid", -1) is settled(Interval(0.2, 0.5), "valid", 1) is True
    assert settled(Interval(-0.19, 0.4), "not valid", -1) is settled(Interval(0.3, 0.4), "not valid", -1) is True
    assert settled(Interval(-0.3, -0.1), "valid", -1) is settled(Interval(-0.3, -0.1), "not valid", -1) is False
    assert settled(Interval(-0.9, -0.3), "not valid", -1) is False  # its p is too high, its interval is not
    assert settled(Interval(), "valid", -1) is settled(Interval(-0.5, -0.3), "", -1) is None


def test_an_accuracy_as_x_picks_its_highest() -> None:
    """Picking goes by what is better of x."""
    cell = _cell()
    before = "pruned_test_accuracy"
    turned = replace(cell, columns=cell.columns | {before: [-v for v in cell.columns[X] if v is not None]})
    (found,), (want,) = claims([turned], before, Y, resamples=200), claims([turned], X, Y, resamples=200)
    assert found.picks == want.picks and found.tau == pytest.approx(-want.tau) and found.verdict == want.verdict


@pytest.mark.parametrize("show", [*SHOWN, "all"])
def test_every_table_has_a_line_per_cell(show: str) -> None:
    """With numbers where a claim has them, and ends of an interval right after what they are of."""
    found = claims([_cell(name="a"), _cell(name="b", k=1)], X, Y, resamples=200, every_interval=True)
    table = corr_table(found, show)
    assert table["cell_id"].to_pylist() == ["a", "b"]
    for at, name in enumerate(table.column_names):
        if name.endswith("_low"):
            assert table.column_names[at - 1 : at + 2] == [name[:-4], name, f"{name[:-4]}_high"]
    first = table.to_pylist()[0]
    assert all(not math.isnan(value) for value in first.values() if isinstance(value, float))
    if show == "noise":
        assert "one seed" in table.to_pylist()[1]["not_estimable"] and math.isnan(table.to_pylist()[1]["ceiling"])


# -- the bench of criteria -----------------------------------------------------------------------------


def _bench_cell(name: str, seed: int) -> CellData:
    """The loss predicts y, score_l1 a little, score_l2 is a copy of it, score_fpgm is noise."""
    generator = np.random.default_rng(100 + seed)
    cell = _cell(60, r=-0.9, seed=seed, name=name)
    x = np.array(cell.columns[X], dtype=np.float64)
    weak = x + 0.3 * generator.normal(size=60)
    scores = {"score_l1": weak, "score_l2": 2 * weak, "score_fpgm": generator.normal(size=60)}
    return replace(cell, columns=cell.columns | {key: value.tolist() for key, value in scores.items()})


def test_the_bench_ranks_and_says_which_leads_are_real() -> None:
    """The strongest is first, in each cell and over all; equals do not beat each other; the noise is beaten."""
    lines, pairs = bench([_bench_cell("a", 0), _bench_cell("b", 1)], Y)
    assert {line.cell for line in lines} == {"a", "b", ALL_CELLS}
    for cell in ("a", "b", ALL_CELLS):
        ranked = [line for line in lines if line.cell == cell]
        assert [line.rank for line in ranked] == [1, 2, 2, 4]  # score_l1 and score_l2 order alike
        assert ranked[0].name == X and "score_fpgm" in ranked[0].beats
        assert [line.strength for line in ranked] == sorted((line.strength for line in ranked), reverse=True)
        assert all(line.strength == pytest.approx(-line.tau) for line in ranked)
        same = next(p for p in pairs if p.cell == cell and {p.better, p.worse} == {"score_l1", "score_l2"})
        assert (same.difference, same.p) == (0, 1)
        assert not any({"score_l1", "score_l2"} == {line.name, other} for line in ranked for other in line.beats)
    whole = {line.name: line for line in lines if line.cell == ALL_CELLS}
    each = [line.tau for line in lines if line.cell != ALL_CELLS and line.name == X]
    assert whole[X].tau == pytest.approx(np.mean(each)) and whole[X].n == 120


def test_the_bench_is_paired_over_candidates() -> None:
    """The interval of a difference of two that move together is narrower than theirs."""
    _, pairs = bench([_bench_cell("a", 0)], Y)
    lines, _ = bench([_bench_cell("a", 0)], Y)
    own = {line.name: line.tau_interval for line in lines}
    one = next(p for p in pairs if {p.better, p.worse} == {X, "score_l1"})
    apart = math.hypot(*(own[name].high - own[name].low for name in (X, "score_l1")))
    assert one.interval.high - one.interval.low < apart
    assert one.interval.low < one.difference < one.interval.high
    assert [p.p_holm for p in pairs] == pytest.approx(holm([p.p for p in pairs]))


def test_the_bench_of_nothing_and_of_constants() -> None:
    """No cell, one candidate, a constant score: lines without numbers, no crash."""
    assert bench([], Y) == ([], [])
    whole, other, few = _bench_cell("a", 0), _bench_cell("c", 1), range(4)
    four = {name: [values[at] for at in few] for name, values in whole.columns.items()}
    small = replace(whole, cell_id="b", title="b", candidate=list(few), columns=four, by_seed={})
    lines, _ = bench([whole, small, replace(other, columns=other.columns | {"score_l2": [1.0] * 60})], Y)
    pooled = {line.name: line for line in lines if line.cell == "2 of 3 cells"}
    assert pooled[X].n == 120 and pooled[X].rank == 1 and math.isnan(pooled["score_l2"].tau)
    cell = _cell(1, k=1)
    lines, _ = bench([cell], Y)
    assert lines == [] or all(math.isnan(line.tau) for line in lines)
    flat = replace(_cell(), columns=_cell().columns | {"score_l1": [1.0] * 40})
    lines, pairs = bench([flat], Y, resamples=200)
    assert [line.name for line in lines] == [X, "score_l1"] and math.isnan(lines[1].tau)
    rare = replace(_cell(), columns=_cell().columns | {"score_l1": [1.0, 2.0, *[None] * 38]})
    assert [(line.name, line.n) for line in bench([rare], Y, resamples=200)[0]] == [(X, 40)]
    assert all(math.isnan(p.p_holm) for p in pairs)
    assert len(criteria_table(lines)) == 2 and len(differences_table(pairs)) == 1


# -- from a store --------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Twelve candidates with two seeds; the accuracy after the second epoch is the best one; one diverges after it."""
    found = Store(tmp_path / "store")
    planned = tasks(SAMPLED, 12, 2)
    plan(found, "mini", [*planned, *tasks(ORACLE, 2)])
    generator = np.random.default_rng(0)
    rows = []
    for task in planned:
        last = 0.5 + 0.02 * ((task.candidate * 5) % 12) + 0.001 * task.seed
        curve = (generator.uniform(), last, None if task.candidate == 11 else last)
        measured = {Y: last, X: 1 - last, "score_l1": float(task.candidate), "pruned_test_accuracy": 0.1 * last}
        rows.append(done(task, epoch_test_accuracy=curve, **measured))
    found.commit_rows("s0", rows)
    return found


def test_early_epochs_of_a_store(store: Store) -> None:
    """Epoch 0 is before retraining; a candidate without a value at an epoch is left out there and nowhere else."""
    lines = [line for line in early(store, "mini", X, Y) if line.cell_id == SAMPLED.cell_id]
    assert [(line.epoch, line.n) for line in lines] == [(0, 12), (1, 12), (2, 12), (3, 11)]
    assert [lines[at].tau for at in (0, 2, 3)] == pytest.approx([1, 1, 1]) and abs(lines[1].tau) < 0.9
    assert lines[2].tau_x == pytest.approx(-1)
    assert lines[1].tau_interval.low < lines[1].tau < lines[1].tau_interval.high
    assert early_table(lines).column_names[:4] == ["cell", "epoch", "n", "tau"]
    assert [line for line in early(store, "mini", X, Y) if line.cell_id == ORACLE.cell_id] == []


def test_predictors_are_the_numbers_that_rows_have(store: Store) -> None:
    """The pruned train loss first; criteria that were not measured are none."""
    assert predictors(store, "mini") == [X, "score_l1"]


def test_claims_are_frozen_and_plain() -> None:
    """A claim survives its own JSON."""
    (found,) = claims([_cell()], X, Y, resamples=100)
    (kept,) = claims([_cell()], X, Y, resamples=100)
    assert isinstance(kept, Claim) and repr(kept) == repr(found)


def test_corr_offers_the_tables_there_are() -> None:
    """The command names them without importing what makes them."""
    assert (*SHOWN, "all") == OF_CLAIMS
