"""docs/findings.md: its rows make a store, and the store gives its numbers."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from orchestrator.plan import check, planned
from orchestrator.study import open_document
from storage.claims import claims
from storage.correlate import X, Y, cell_data
from storage.criteria import ALL_CELLS, bench, predictors
from storage.diff import Side, paired, verdicts
from storage.schema import SCHEMA, conform, table_to_rows
from storage.sql import run_query
from storage.store import Store

FOLDER = Path(__file__).parent.parent / "docs"
PAGE = (FOLDER / "findings.md").read_text()
SWEEP = "mnist-half"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The spec expanded, and the rows that are kept beside the page."""
    found = Store(tmp_path_factory.mktemp("findings"))
    document = open_document(str(FOLDER / "findings" / f"{SWEEP}.yaml"))
    spec = check(document, "data")
    found.write_manifest(spec.name, document.text(), planned(spec, document, "data"))
    kept = pq.read_table(FOLDER / "findings" / f"{SWEEP}.parquet")
    found.commit_rows("kept", table_to_rows(conform(kept, SCHEMA.names)))
    return found


def _tables() -> list[list[dict[str, str]]]:
    """The tables of the page, one dict a line."""
    found: list[list[dict[str, str]]] = []
    for block in re.findall(r"(?:^\|.*\n)+", PAGE, re.MULTILINE):
        head, _, *lines = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in block.splitlines()]
        found.append([dict(zip(head, line, strict=True)) for line in lines])
    return found


def _interval(text: str) -> tuple[float, float]:
    low, high = text.strip("[]").split(",")
    return float(low), float(high)


def test_the_sweep_is_whole(store: Store) -> None:
    """1,080 tasks, all done, three seeds of sixty candidates in six cells."""
    (line,) = run_query(store, f"select * from sweeps where sweep = '{SWEEP}'").to_pylist()
    assert (line["cells"], line["tasks"], line["done"]) == (6, 1080, 1080)


def test_correlations(store: Store) -> None:
    """The first table, number by number."""
    found = {claim.title: claim for claim in claims(cell_data(store, SWEEP, (X, Y)), X, Y)}
    lines = _tables()[0]
    assert len(lines) == len(found) == 6
    for line in lines:
        claim = found[line["cell"]]
        assert (claim.n, claim.verdict, str(claim.settled)) == (int(line["n"]), line["verdict"], line["settled"])
        assert float(line["tau"]) == pytest.approx(claim.tau, abs=6e-5)
        ends = (claim.tau_interval.low, claim.tau_interval.high)
        assert _interval(line["tau 95 % interval"]) == pytest.approx(ends, abs=6e-3)
        assert float(line["ceiling"]) == pytest.approx(claim.noise.ceiling, abs=6e-5)
        assert float(line["anomaly_ratio"]) == pytest.approx(claim.picks.anomaly_ratio, abs=6e-5)
        assert claim.p_holm < 0.001 and claim.noise.reliability > 0.975


def test_propagation(store: Store) -> None:
    """The second: no verdict changes, and only conv1's tau by more than chance."""
    side = Side(store, SWEEP)
    found = {line["cell"]: line for line in verdicts(paired(side, side, ["propagation"]), X, Y).to_pylist()}
    lines = _tables()[1]
    assert len(lines) == len(found) == 3
    for line in lines:
        have = found[line["cell"]]
        assert float(line["tau_difference"]) == pytest.approx(have["tau_difference"], abs=6e-5)
        ends = _interval(line["tau_difference 95 % interval"])
        assert ends == pytest.approx((have["tau_difference_low"], have["tau_difference_high"]), abs=6e-3)
        assert (ends[1] < 0) == ("conv1" in line["cell"]) and str(have["changed"]) == line["changed"] == "False"


def test_ranges(store: Store) -> None:
    """The third is what its query answers."""
    query = re.search(r"prunesweep query \"(.*?)\"\n```", PAGE, re.DOTALL)
    assert query
    have = run_query(store, query[1]).to_pylist()
    for line, want in zip(have, _tables()[2], strict=True):
        assert ("+".join(line["layers"]), line["propagation"]) == (want["layers"], want["propagation"])
        for name in ("lowest", "middle", "highest", "worst", "best", "equivalence_error"):
            assert float(want[name]) == pytest.approx(line[name], rel=6e-4, abs=1e-20)


@pytest.mark.parametrize(("at", "propagation"), [(3, "exact"), (4, "released")])
def test_criteria(at: int, propagation: str, store: Store) -> None:
    """The last two: who leads over the three cells, and whom by more than chance."""
    names = predictors(store, SWEEP)
    cells = cell_data(store, SWEEP, (*names, Y), f"propagation = '{propagation}'")
    lines, pairs = bench(cells, Y, names)
    have = [line for line in lines if not line.cell_id]
    want = _tables()[at]
    assert [line.name for line in have] == [line["name"] for line in want]
    for line, written in zip(have, want, strict=True):
        assert float(written["tau"]) == pytest.approx(line.tau, abs=6e-5)
        assert "+".join(line.beats) == written["beats"]
    if propagation == "exact":
        (lead,) = [p for p in pairs if p.cell == ALL_CELLS and (p.better, p.worse) == ("score_l1", X)]
        assert (round(lead.difference, 2), round(lead.p_holm, 2)) == (0.17, 0.03)
        assert (round(lead.interval.low, 2), round(lead.interval.high, 2)) == (0.06, 0.27)


@pytest.mark.parametrize("study", ["lenet5-mini-panels"])
def test_published_rows_are_resumed(study: str, tmp_path: Path) -> None:
    """The rows of a study that still runs are tasks of its spec; the script adds each of them to a store once."""
    script = [sys.executable, str(FOLDER / "findings" / "resume.py"), study, "--store", str(tmp_path)]
    for added in ("[1-9][0-9]*", "0"):
        said = subprocess.run(script, check=True, capture_output=True, text=True, cwd=FOLDER.parent).stdout
        assert re.fullmatch(rf"{study}: {added} of [0-9]+ rows added to {tmp_path}\n", said)
    document = open_document(str(FOLDER / "findings" / f"{study}.yaml"))
    tasks = {task.task_id for shard in planned(check(document, "data"), document, "data") for task in shard.tasks}
    statuses = Store(tmp_path).statuses()
    assert set(statuses.values()) == {"done"} and statuses.keys() <= tasks
