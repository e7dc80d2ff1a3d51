"""The report: its numbers are those of `corr`, what others wrote is text, and it opens without a network."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from html.parser import HTMLParser
from itertools import pairwise
from math import nan
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator import cli
from orchestrator.cli_report import commands
from orchestrator.documents import Document
from orchestrator.options import read_spec
from orchestrator.study import open_study, study_names
from storage.records import Cell, Row
from storage.report import Commands, draw, gather, page
from storage.report.numbers import TIMES, fixed, listed, p_is, p_value, seconds
from storage.report.records import Bench, Facts, Failure, Figures, Part
from storage.store import Store
from tests.rows import ORACLE, SHA_A, SHA_B, done, failed, plan, tasks

EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp;{{ 7 * 7 }}"
OTHER = replace(ORACLE, layers=(("conv2", 0.2),))
NAMED = replace(ORACLE, layers=((EVIL, 0.2),))
MINUS = "\N{MINUS SIGN}"
X, Y = "pruned_train_loss", "best_test_accuracy"
SEEDS = 3


def measured(cell: Cell, candidates: int, seeds: int = SEEDS, **more: Any) -> list[Row]:
    """Rows of a cell whose accuracy falls with the loss, as far as noise lets it."""
    draw_ = np.random.Generator(np.random.Philox(len(str(cell)))).normal
    loss, noise = draw_(1.0, 0.3, candidates), draw_(0.0, 0.1, (candidates, seeds, 3))
    rows = []
    for task in tasks(cell, candidates, seeds):
        curve = 0.9 - 0.1 * loss[task.candidate] + 0.1 * noise[task.candidate, task.seed]
        rows.append(
            done(
                task,
                pruned_train_loss=float(loss[task.candidate]),
                pruned_test_accuracy=0.5,
                best_test_accuracy=float(curve.max()),
                last5_test_accuracy_mean=float(curve.mean()),
                epoch_test_accuracy=tuple(map(float, curve)),
                score_l1=float(loss[task.candidate] + noise[task.candidate, 0, 0]),
                score_l2=float(noise[task.candidate, 0, 1]),
                seconds_prune=0.5,
                seconds_retrain=1.5,
                device="cpu",
                host="here",
                execution=json.dumps({"backend": "serial", "device_model": f"A processor {EVIL}", "fleet": 1}),
                versions=json.dumps({"torch": "2.0", "python": "3.11"}),
                **more,
            )
        )
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working directory with a store. `mini`: three cells, one of them with failures and one with an awkward name.
    `one`: a single cell with one seed. `none`: nothing done. `mixed`: one cell of two dense networks, one of one."""
    found = tmp_path_factory.mktemp("report")
    store = Store(found / "results")
    plan(store, "mini", [*tasks(ORACLE, 12, SEEDS), *tasks(OTHER, 10, SEEDS), *tasks(NAMED, 6, SEEDS)])
    store.write_manifest("one", f"name: one\n# {EVIL}\n", _planned(tasks(replace(ORACLE, pruner_seed=1), 8)))
    plan(store, "none", tasks(replace(ORACLE, pruner_seed=2), 3))
    apart, alike = replace(ORACLE, pruner_seed=3), replace(OTHER, pruner_seed=3)
    plan(store, "mixed", [*tasks(apart, 6), *tasks(alike, 6)])
    rows = [*measured(ORACLE, 12), *measured(OTHER, 8), *measured(NAMED, 6)]
    rows += [failed(task, error=f"Traceback\n{EVIL}", error_class=f"Bad{EVIL}") for task in tasks(OTHER, 10, 3)[24:28]]
    rows += [failed(tasks(ORACLE, 1)[0])]  # done at another attempt
    rows += measured(replace(ORACLE, pruner_seed=1), 8, 1)
    rows += measured(apart, 3, 1, dense_sha256=SHA_A) + measured(apart, 6, 1, dense_sha256=SHA_B)[3:]
    rows += measured(alike, 6, 1)
    store.commit_rows("s0", rows)
    before, cache = Path.cwd(), os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(found / "cache")
    os.chdir(found)
    yield found
    os.chdir(before)
    os.environ.pop("XDG_CACHE_HOME")
    if cache is not None:
        os.environ["XDG_CACHE_HOME"] = cache


def _planned(found: list[Any]) -> list[Any]:
    from storage.manifest import PlannedTask

    return [PlannedTask("s0", task) for task in found]


def run(*arguments: str) -> int:
    """The exit code of `prunesweep ARGUMENTS`, run in this process."""
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    assert isinstance(ended.value.code, int)
    return ended.value.code


# -- reading a page ---------------------------------------------------------------------------------------


@dataclass
class Read(HTMLParser):
    """A page taken apart: its tags, its text, its tables as `corr` would have them."""

    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    heads: list[str] = field(default_factory=list)
    at: int = -1
    silent: str = ""

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append((tag, found))
        self.silent = tag if tag in ("script", "style") else self.silent
        if tag == "table":
            self.lines = self.tables.setdefault(str(found["id"]).removeprefix("table-"), [])
            self.heads = []
        elif tag == "th" and "data-name" in found:
            self.heads.append(str(found["data-name"]))
        elif tag == "tr":
            self.at = -1
            self.lines.append({})
        elif tag in ("td", "th"):
            self.at += 1
            self._keep("", found.get("data-v"))
        elif self.at >= 0 and tag == "span":
            self._keep("_low", found.get("data-low"))
            self._keep("_high", found.get("data-high"))
        elif self.at >= 0 and tag == "a" and self.at == 0:
            self.lines[-1]["cell_id"] = str(found["href"]).removeprefix("#cell-")

    def _keep(self, suffix: str, value: str | None) -> None:
        if value is not None and self.at < len(self.heads):
            self.lines[-1][self.heads[self.at] + suffix] = value

    def handle_endtag(self, tag: str) -> None:
        self.silent = "" if tag == self.silent else self.silent
        self.at = -1 if tag == "tr" else self.at

    def handle_data(self, data: str) -> None:
        if not self.silent:
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join("".join(self.text).split())

    def attributes(self, name: str) -> list[str]:
        return [str(found[name]) for _, found in self.tags if name in found]


@cache
def read(text: str) -> Read:
    """A page taken apart, to be looked at only."""
    found = Read()
    found.feed(text)
    return found


@pytest.fixture(scope="module")
def mini(folder: Path) -> str:
    """The report of `mini`, by the command."""
    assert run("report", "mini", "-o", "mini.html") == 0
    return (folder / "mini.html").read_text(encoding="utf-8")


def reported(sweep: str) -> str:
    """The words of a sweep's report."""
    assert run("report", sweep) == 0
    return read(Path(f"{sweep}.html").read_text(encoding="utf-8")).words


@pytest.fixture(scope="module")
def made(folder: Path) -> tuple[Facts, Figures]:
    """The facts and figures of `one`."""
    facts = gather(Store(folder / "results"), "one", X, Y, "0")
    return facts, draw(facts)


def words_of(facts: Facts, figures: Figures) -> str:
    """The words of a report of these."""
    return read(page(facts, figures, Commands("again", "resume", "report"))).words


# -- its numbers ------------------------------------------------------------------------------------------


KEYS = ("cell_id", "name", "better", "worse", "epoch")
SHOWN = {
    "cells": ("tau", "tau_low", "tau_high", "p", "p_holm", "n", "seeds", "tau_last5"),
    "noise": ("reliability", "reliability_low", "ceiling", "ceiling_high", "corrected", "corrected_low", "noise_std"),
    "picks": ("picked", "anomaly_ratio", "anomaly_ratio_low", "regret", "regret_high", "percentile", "counterexamples"),
    "power": ("detectable", "more_candidates"),
    "criteria": ("rank", "tau", "tau_low", "strength", "p", "ceiling"),
    "pairs": ("difference", "difference_low", "difference_high", "p", "p_holm"),
    "early": ("tau", "tau_low", "tau_high", "tau_x", "n"),
}


@pytest.mark.parametrize("show", SHOWN)
def test_every_number_is_that_of_corr(show: str, mini: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What a table of the report says, to the last digit, is what `corr --show` says of the same cells."""
    capsys.readouterr()
    assert run("corr", "mini", "--show", show, "-f", "json") == 0
    lines = json.loads(capsys.readouterr().out)
    tables = read(mini).tables
    ours = [line for line in (*tables[show], *(tables["criteria-cells"] if show == "criteria" else ())) if line]
    by_key = {_key(line): line for line in ours}
    assert len(by_key) == len(lines) == len(ours)
    compared = 0
    for line in lines:
        shown = by_key[_key(line)]
        for name in SHOWN[show]:
            if line[name] is None:
                assert name not in shown
            else:
                assert float(shown[name]) == line[name], (show, name)
                compared += 1
    assert compared > len(lines) * (len(SHOWN[show]) - 3)


def _key(line: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(line.get(name, "") or "") if name != "epoch" else str(line.get(name, "")) for name in KEYS)


def test_the_cost_is_that_of_the_view(mini: str, folder: Path) -> None:
    """Seconds and wasted attempts are those of `cost`, cell by cell and in all."""
    lines = [line for line in read(mini).tables["cost"] if line]
    query = "select cell_id, attempts, wasted_attempts, cpu_seconds from cost where sweep = 'mini' order by position"
    found = Store(folder / "results").sql(query).fetchall()
    assert [
        (x["cell_id"], int(x["attempts"]), int(x["wasted_attempts"]), float(x["cpu_seconds"])) for x in lines[:-1]
    ] == found
    assert int(lines[-1]["attempts"]) == sum(one[1] for one in found) == 26 * SEEDS + 5
    words = "83 attempts, 5 of them wasted: 156 s (2.6 min) of CPU time; the wasted ones left no time."
    assert words in read(mini).words


def test_the_answer_counts_cells(mini: str) -> None:
    """The headline's counts are those of the table's verdicts, and it says what is missing first."""
    words, lines = read(mini).words, [line for line in read(mini).tables["cells"] if line]
    valid = sum(line["verdict"] == "valid" for line in lines)
    rule = f"So far, by the paper's rule (τ ≤ {MINUS}0.2 with p ≤ 0.05)"
    assert f"{rule} pruned train loss predicts test accuracy after retraining in {valid} of 3 cells." in words
    assert "This sweep is not finished. 78 of 84 tasks (93 %) are done: 4 tasks failed and 2 tasks have" in words
    assert words.index("This sweep is not finished") < words.index("The answer")
    assert "prunesweep resume mini" in words


# -- what it says where there is little -------------------------------------------------------------------


def test_one_seed_is_said_to_settle_nothing_of_noise(made: tuple[Facts, Figures]) -> None:
    """With one seed the report says what cannot be said, and gives no ceiling."""
    words = words_of(*made)
    assert "Every candidate was retrained with one seed only" in words
    assert "ceiling of |τ| is" not in words and "A perfect predictor would reach" not in words
    assert "the noise of retraining was not estimated" in words and "ICC" not in words.split("Methods, to paste")[1]
    assert "This sweep is not finished" not in words


def test_a_lead_that_no_test_can_be_had_of_is_said_to_have_none(made: tuple[Facts, Figures]) -> None:
    """No number is made up where p is not defined."""
    facts, figures = made
    bench = facts.criteria.value
    assert bench and bench.differences
    bare = Bench(bench.predictors, [replace(one, p=nan, p_holm=nan) for one in bench.differences])
    words = words_of(replace(facts, criteria=Part(bare)), figures)
    assert "of which no test can be had." in words and "by Holm)" not in words.split("What these numbers")[0]


def test_words_go_by_x_and_y(made: tuple[Facts, Figures]) -> None:
    """An accuracy is picked by its highest value, a loss by its lowest; regret has the sign of what is better."""
    facts, figures = made
    as_it_is, turned = words_of(facts, figures), replace(facts, x="pruned_test_accuracy", y="best_test_loss")
    claims = [replace(one, x=turned.x, y=turned.y) for one in facts.claims.value or []]
    words = words_of(replace(turned, claims=Part(claims)), figures)
    assert "best by pruned train loss" in as_it_is and "the best candidate less the picked one" in as_it_is
    assert "best by pruned test accuracy" in words and "the picked candidate less the best one" in words
    assert "of lowest" not in words and "regret, nats" in words and "regret, points" in as_it_is


def test_settled_goes_by_the_verdicts_side(made: tuple[Facts, Figures]) -> None:
    """Yes, no, and nothing where it cannot be said."""
    facts, figures = made
    (claim,) = facts.claims.value or []
    told = {
        settled: words_of(replace(facts, claims=Part([replace(claim, settled=settled)])), figures)
        for settled in (True, False, None)
    }
    assert "it is settled as far as candidates go" in told[True] and "other candidates could turn it" in told[False]
    assert "No interval for τ can be had here" in told[None] and "settled as far" not in told[None]


def test_a_sweep_with_nothing_done(folder: Path) -> None:
    """It is reported: what is planned, that nothing is there yet, and no number."""
    words = reported("none")
    assert "None of its 3 tasks is done" in words and "there is nothing to correlate yet" in words
    assert "Nothing was spent on it yet." in words
    assert "nan" not in words.lower().split()


def test_failures_are_shown_by_class_with_an_example(mini: str) -> None:
    """The class, how many, one task and its traceback."""
    words = read(mini).words
    task = min(task.task_id for task in tasks(OTHER, 10, 3)[24:28])
    assert f"Bad{' '.join(EVIL.split())}: 4 tasks in 1 shard" in words and task in words
    assert "4 tasks of 84 stand as failed" in words and "prunesweep resume mini --failed" in words


def test_a_cell_of_two_dense_networks_is_left_out_and_the_others_are_not(folder: Path) -> None:
    """The reason stands in place of its numbers."""
    words = reported("mixed")
    assert (
        f"were pruned from different dense networks and are not comparable: conv1 ({SHA_A[:8]}, {SHA_B[:8]})" in words
    )
    lines = [line for line in read(Path("mixed.html").read_text()).tables["cells"] if line]
    assert [line["n"] for line in lines] == ["6"]


def test_a_section_that_fails_says_why_and_the_report_still_comes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One part's error is its own."""

    def broken(*_: Any, **__: Any) -> None:
        raise ArithmeticError(EVIL)

    monkeypatch.setattr("storage.criteria.bench", broken)
    words = reported("one")
    assert (
        f"Not here: {' '.join(EVIL.split())}" in words and "predicts test accuracy" in words
    ) or "does not predict" in words
    assert "warning: criteria left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("report nosuch", 2, "no sweep nosuch"),
        ("report one -o one.pdf", 2, "a report is HTML"),
        ("report one -o nowhere/one.html", 2, "there is no folder nowhere"),
        ("report one --store elsewhere", 5, "no store at elsewhere"),
    ],
)
def test_a_mistake_is_one_message(
    arguments: str, code: int, message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is written, and the message says what to do."""
    before = set(folder.iterdir())
    assert run(*arguments.split()) == code
    assert message in capsys.readouterr().err
    assert set(folder.iterdir()) == before


# -- what others wrote is text ----------------------------------------------------------------------------


def test_nothing_is_loaded_from_anywhere(mini: str) -> None:
    """No address but places in the page itself; the one script is the one that the page allows."""
    found = read(mini)
    for name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
        assert all(value.startswith(("#", "data:")) for value in found.attributes(name)), name
    assert not re.search(r"@import|url\((?!#|['\"]?data:)", mini)
    (policy,) = [tag["content"] for name, tag in found.tags if name == "meta" and "http-equiv" in tag]
    (script,) = re.findall(r"<script>(.*?)</script>", mini, re.DOTALL)
    assert f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in str(policy)
    assert str(policy).startswith("default-src 'none'")


@settings(max_examples=8)
@given(text=st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1) | st.just(EVIL))
def test_any_text_is_shown_as_it_is(text: str, made: tuple[Facts, Figures]) -> None:
    """Names, errors, specs, paths and reasons change no tag of the page, and are read as they were written."""

    def taken_apart(one: str) -> Read:
        facts, figures = made
        cells = tuple(replace(cell, label=one) for cell in facts.plan.cells)
        altered = replace(
            facts,
            store=one,
            plan=replace(facts.plan, spec=one, common=one, cells=cells),
            failures=Part([Failure(one, 1, 1, one, f"x{one}")]),
            early=Part(None, one),
        )
        return read(page(altered, figures, Commands(one, one, one)))

    plain, found = taken_apart("plain"), taken_apart(text)  # the plain one is read once
    assert [name for name, _ in found.tags] == [name for name, _ in plain.tags]
    whole = "".join(found.text)
    assert whole.count(text) >= "".join(plain.text).count("plain") - 1  # a word of it may be so by itself
    assert " ".join(text.split()) in found.words


def test_the_page_is_well_made(mini: str) -> None:
    """Headings go down one level at a time, tables have captions and heads, ids are unique, links lead somewhere."""
    found = read(mini)
    levels = [int(name[1]) for name, _ in found.tags if re.fullmatch(r"h\d", name)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    names = [name for name, _ in found.tags]
    assert names.count("table") == names.count("caption") > 6
    assert all(tag.get("scope") in ("col", "row") for name, tag in found.tags if name == "th")
    ids = found.attributes("id")
    assert len(ids) == len(set(ids))
    assert {value[1:] for value in found.attributes("href") if value.startswith("#")} <= set(ids)
    assert {value for values in found.attributes("aria-labelledby") for value in values.split()} <= set(ids)
    assert all(tag.get("aria-label") for name, tag in found.tags if name == "svg")


# -- the commands -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["digits", "lenet5-mini-conv123", "resnet18-imagenet-short", "lenet5-mini-width-l1"])
@pytest.mark.parametrize(
    "overrides", [(), ("retrain.epochs=3", "grid.ratio=[0.2, 0.4]"), ("candidates={mode: sample, count: 7}",)]
)
def test_a_study_is_named_with_its_overrides(
    name: str, overrides: tuple[str, ...], made: tuple[Facts, Figures], tmp_path: Path
) -> None:
    """The command that a report gives makes the very spec again: by the study's name where it can."""
    import shlex

    assert name in study_names()
    document = open_study(name)
    for one in overrides:
        document.override(one)
    facts = replace(made[0], plan=replace(made[0].plan, sweep=name, spec=document.text()))
    (line,) = [line for line in commands(facts, "my results", "x.html").again.splitlines() if " run " in line]
    words = shlex.split(line)
    assert words[:3] == ["prunesweep", "run", name] and words[-2:] == ["--store", "my results"]
    given_ = tuple(after for word, after in pairwise(words) if word == "--set")
    assert read_spec(name, given_).plain() == Document("x", document.text()).plain()


def test_any_other_spec_is_written_out(made: tuple[Facts, Figures]) -> None:
    """As a here-document that ends nowhere within it."""
    spec = "name: mine\nnote: |\n  text\nEOF\nEOF_\n"
    facts = replace(made[0], plan=replace(made[0].plan, sweep="mine", spec=spec))
    again = commands(facts, "results", "x.html").again
    assert f"cat > mine.yaml <<'EOF__'\n{spec.rstrip()}\nEOF__\nprunesweep run mine.yaml\n" in again
    assert again.endswith("prunesweep corr mine\nprunesweep report mine -o x.html")
    assert "pip install torch==2.0" in again


# -- numbers as they are written --------------------------------------------------------------------------


@given(st.floats(1e-290, 1))
def test_a_p_value_is_shown_to_two_digits_at_least(p: float) -> None:
    """What is written is the number, to the digits that are written; of 10,000 orders the least is a bound."""
    text = p_value(p)
    assert (text == "≤ 10⁻⁴") == (p == 1 / 10_000)
    text = text.replace("≤ ", f"1{TIMES}")
    plain = re.sub(
        TIMES + r"10(\S+)", lambda m: "e" + m[1].translate(str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")), text
    )
    assert float(plain) == pytest.approx(p, rel=0.051)


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (fixed(-0.2749), f"{MINUS}0.275"),
        (fixed(-0.0001), "0.000"),
        (fixed(float("nan")), "\N{EN DASH}"),
        (p_value(1.0), "1.0"),
        (p_is(1 / 10_000), "p ≤ 10⁻⁴"),
        (p_is(0.031), "p = 0.031"),
        (seconds(12.34), "12.3 s"),
        (seconds(90_000), "90,000 s (25 h)"),
        (listed(["a", "b", "c"]), "a, b and c"),
        (listed(["a"]), "a"),
        (listed([]), ""),
    ],
)
def test_numbers_as_people_read_them(shown: str, text: str) -> None:
    """True minus signs, no minus zero, a dash for what is not there."""
    assert shown == text


# -- in a browser -----------------------------------------------------------------------------------------


@contextmanager
def browser() -> Iterator[Any]:
    """Debian's chromium, with nothing of its own going on; ended whatever happens."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no chromium and chromedriver here: apt-get install chromium chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in (
        "--headless=new",
        "--no-sandbox",  # it runs as root in CI
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--no-first-run",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    # With a driver given, selenium looks for none in the network.
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))
    try:
        yield found
    finally:
        found.quit()


CONTRAST = """
const light = (c) => { const f = (v) => { v /= 255; return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; };
  return 0.2126 * f(c[0]) + 0.7152 * f(c[1]) + 0.0722 * f(c[2]); };
const rgb = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
const behind = (at) => { for (; at; at = at.parentElement) { const c = rgb(getComputedStyle(at).backgroundColor);
  if (c.length === 3 || c[3] > 0.99) return c; } return null; };
const poor = [];
for (const at of document.body.querySelectorAll("*")) {
  const words = [...at.childNodes].filter((n) => n.nodeType === 3).map((n) => n.data).join("").trim();
  if (!words || !at.checkVisibility() || ["SCRIPT", "STYLE"].includes(at.tagName)) continue;
  const look = getComputedStyle(at), svg = at.closest("svg");
  if (svg && look.fill !== getComputedStyle(svg).color) continue;  // written on a coloured field
  const [a, b] = [light(rgb(svg ? look.fill : look.color)), light(behind(at))].sort((x, y) => y - x);
  if ((a + 0.05) / (b + 0.05) < 4.5) poor.push([words.slice(0, 40), look.color, (a + 0.05) / (b + 0.05)]);
}
return poor;
"""
SIZES = """return [...document.querySelectorAll("svg")].filter((at) => at.checkVisibility())
  .map((at) => at.getBoundingClientRect()).map((b) => [b.width, b.height])"""
CUT = """return [...document.querySelectorAll("#tables .scroll")].filter((at) => at.scrollWidth > at.clientWidth)
  .map((at) => [at.querySelector("table").id, at.scrollWidth, at.clientWidth])"""
WIDER = """const boxes = ".scroll, .drawing, pre";
return [...document.body.querySelectorAll("*")].filter((at) => !at.closest(boxes) || at.matches(boxes))
  .filter((at) => at.checkVisibility() && at.getBoundingClientRect().right > innerWidth + 0.5)
  .map((at) => at.outerHTML.slice(0, 80))"""


def test_in_a_browser(mini: str, folder: Path) -> None:
    """Light, dark, narrow and printed: every figure has a size, every text contrast, nothing leaves the page, nothing
    is asked of the network, nothing is in the console; tables sort, cells open and close."""
    with browser() as found:

        def looks(mode: str, width: int, media: str = "screen") -> None:
            features = [{"name": "prefers-color-scheme", "value": mode}]
            found.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})
            size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
            found.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            found.get((folder / "mini.html").as_uri())
            sizes = found.execute_script(SIZES)
            assert len(sizes) >= 6 and all(w > 150 and h > 60 for w, h in sizes), sizes
            assert found.execute_script(CONTRAST) == []
            assert found.execute_script(WIDER) == []
            assert found.execute_script("return document.documentElement.scrollWidth") <= width

        looks("light", 1200)
        assert found.execute_script(CUT) == []
        looks("light", 1280)
        assert found.execute_script(CUT) == []
        light = found.execute_script("return getComputedStyle(document.body).backgroundColor")
        _sorts(found.execute_script)
        _opens(found.execute_script)
        looks("dark", 1280)
        assert found.execute_script("return getComputedStyle(document.body).backgroundColor") != light
        looks("light", 390)
        assert found.execute_script("return document.querySelector('nav details').open") is False
        looks("dark", 390)
        looks("light", 700, "print")
        sent = [json.loads(one["message"])["message"] for one in found.get_log("performance")]
        asked = [one["params"]["request"]["url"] for one in sent if one["method"] == "Network.requestWillBeSent"]
        assert (folder / "mini.html").as_uri() in asked
        assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
        assert found.get_log("browser") == []


def _sorts(script: Callable[[str], Any]) -> None:
    """A click on a head sorts by the number, another one the other way."""
    column = "[...document.querySelector('#table-cells').tBodies[0].rows].map((r) => Number(r.cells[%d].dataset.v))"
    head = "document.querySelector('#table-cells th[data-name=tau]')"
    at = script(f"return {head}.cellIndex")
    for direction, turn in (("ascending", 1), ("descending", -1)):
        script(f"{head}.querySelector('button').click()")
        values = script(f"return {column % at}")
        assert values == sorted(values, reverse=turn < 0) and len(set(values)) == 3
        assert script(f"return {head}.ariaSort") == direction


def _opens(script: Callable[[str], Any]) -> None:
    """The buttons close and open every cell, and a link into a closed one opens it."""
    counts = "return document.querySelectorAll('details.cell[open]').length"
    script("document.querySelector('[data-open=none]').click()")
    assert script(counts) == 0
    script("document.querySelector('#table-cells a').click()")
    assert (
        script(
            "return new Promise((r) => setTimeout(() => r(document.querySelectorAll('details.cell[open]').length), 50))"
        )
        == 1
    )
    script("document.querySelector('[data-open=all]').click()")
    assert script(counts) == 3
