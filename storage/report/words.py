"""What a report calls things, its grid in words, and its paragraphs on methods. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod

from storage.claims import VALID_P, VALID_TAU, expected_sign, lower_is_better
from storage.figures import words as axes
from storage.records import Cell, Recipe
from storage.report.numbers import TIMES, fixed, is_accuracy, listed, missing, some
from storage.report.records import Facts, Plan
from storage.statistics.p_values import PERMUTATIONS
from storage.statistics.resampling import MOST, RESAMPLES

NAMES = {
    "pruned_train_loss": "pruned train loss",
    "pruned_test_loss": "pruned test loss",
    "best_test_accuracy": "test accuracy after retraining",
    "best_test_loss": "test loss after retraining",
    "last_test_accuracy": "test accuracy after the last epoch",
    "last5_test_accuracy_mean": "mean test accuracy of the last five epochs",
    "val_best_test_accuracy": "test accuracy at the best validation epoch",
}
_AXES = {
    "layers": "choice of layers|choices of layers",
    "ratio": "pruning ratio",
    "pruner_seed": "pruner seed",
    "dataset": "data set",
    "granularity": "granularity|granularities",
    "loss_subset": "loss subset",
    "retrain": "retraining recipe",
    "dense": "dense network",
    "candidates": "way to take candidates|ways to take candidates",
    "propagation": "propagation",
    "precision": "precision",
    "calibration": "calibration size",
}


def named(column: str) -> str:
    """What a column is called in a sentence."""
    return NAMES.get(column) or column.removeprefix("score_").replace("_", " ")


# -- what ran ---------------------------------------------------------------------------------------------


def rule(x: str, y: str) -> str:
    """The paper's rule for an x and a y."""
    return f"τ {'≤' if expected_sign(x, y) < 0 else '≥'} {bound(x, y)} with p ≤ {VALID_P}"


def bound(x: str, y: str) -> str:
    """The tau of the paper's rule."""
    return fixed(expected_sign(x, y) * VALID_TAU, 1)


def least(x: str) -> str:
    """Which candidate is picked by x: the lowest loss, or the highest accuracy."""
    return "lowest" if lower_is_better(x) else "highest"


def last_epochs(cells: Iterable[Cell]) -> str:
    """What last5 is the mean of: retraining may have fewer epochs."""
    few = min((cell.retrain.epochs for cell in cells), default=5) < 5
    return "the last five epochs, or of all where there are fewer," if few else "the last five epochs"


def labels(cells: Sequence[Cell]) -> tuple[dict[str, str], str]:
    """cell id -> what tells it apart among these cells, in few words; and what all of them have in common."""
    values = axes.axis_values({cell.cell_id: cell for cell in cells})
    telling = axes.telling(values)
    found = {cell_id: axes.words(line, telling) for cell_id, line in values.items()}
    if not telling or len(set(found.values())) < len(found):
        return {cell.cell_id: _full(cell, cells) for cell in cells}, ""
    return found, axes.common(values)


def _full(cell: Cell, cells: Sequence[Cell]) -> str:
    """A cell's words, and its id where they do not tell it apart."""
    alike = sum(str(one) == str(cell) for one in cells)
    return f"{cell} [{cell.cell_id[:6]}]" if alike > 1 else str(cell)


def grid_in_words(plan: Plan) -> str:
    """`6 cells: 3 choices of layers (conv1, conv2 and conv3) x 2 propagations (exact and released); 60 ...`."""
    cells = {one.cell.cell_id: one.cell for one in plan.cells}
    values = axes.axis_values(cells)
    telling = axes.telling(values)
    found = {axis: list(dict.fromkeys(line[axis] for line in values.values())) for axis in telling}
    each = [_axis_in_words(axis, [str(value) for value in found[axis]]) for axis in telling]
    whole_grid = prod(len(one) for one in found.values()) == len(cells)
    joined = (f" {TIMES} " if whole_grid else " and ").join(each)
    counts = span([one.candidates for one in plan.cells])
    seeds = span([one.seeds for one in plan.cells])
    start = some(len(cells), "cell") + (f": {joined}" if joined else "")
    part = "" if whole_grid or not joined else " (not every combination)"
    candidates = f"{counts} candidate{'s' * (counts != '1')}{' in each' * (len(cells) > 1)}"
    return (
        f"{start}{part}; {candidates}, retrained with {seeds} seed{'s' * (seeds != '1')}: {some(plan.tasks, 'task')}."
    )


def _axis_in_words(axis: str, values: list[str]) -> str:
    one, _, many = _AXES.get(axis, axis.replace("_", " ")).partition("|")
    return f"{some(len(values), one, many)} ({listed(values, 8)})"


def span(counts: list[int]) -> str:
    low, high = min(counts, default=0), max(counts, default=0)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def recipe_in_words(recipe: Recipe) -> str:
    """`30 epochs, batch size 256, sgd, momentum 0.9, weight decay 0.0001, learning rate 0.01, from epoch 20 0.001`."""
    parts = [some(recipe.epochs, "epoch"), f"batch size {recipe.batch_size}", recipe.optimizer.upper()]
    parts += [f"momentum {recipe.momentum:g}" + (" (Nesterov)" if recipe.nesterov else "")] if recipe.momentum else []
    parts += [f"weight decay {recipe.weight_decay:g}"] if recipe.weight_decay else []
    first, *later = recipe.lr
    steps = "".join(f", {rate:g} after {some(done, 'epoch')}" for done, rate in later)
    schedule = "" if recipe.lr_schedule == "table" else f" ({recipe.lr_schedule} to {recipe.final_lr:g})"
    parts += [f"learning rate {first[1]:g}{steps}{schedule}"]
    more = {
        "warm-up epochs": recipe.warmup_epochs,
        "label smoothing": recipe.label_smoothing,
        "gradient norm at most": recipe.clip_norm,
        "weight average decay": recipe.ema,
        "mixup": recipe.mixup,
        "CutMix": recipe.cutmix,
        "LoRA rank": recipe.lora_rank,
        "steps at most": recipe.max_steps,
    }
    parts += [f"{name} {value:g}" for name, value in more.items() if value]
    parts += [f"gradients of {recipe.accumulate} batches added up"] if recipe.accumulate > 1 else []
    parts += [] if recipe.augment else ["no augmentation"]
    parts += [f"seed {recipe.seed}"] if recipe.seed is not None else []
    return ", ".join(parts) + (f", starting from the weights {recipe.weights}" if recipe.weights else "")


# -- methods ----------------------------------------------------------------------------------------------


def methods(facts: Facts) -> list[str]:
    """Paragraphs for a paper: what was done, and with which definitions. Only what this report uses."""
    return [_setting(facts), _association(facts), *_uncertainty(facts), *_bench(facts), _software(facts)]


def _setting(facts: Facts) -> str:
    plan = facts.plan
    cells = [one.cell for one in plan.cells]
    networks = listed(list(dict.fromkeys(f"{cell.dense.model} on {cell.dense.dataset}" for cell in cells)), 6)
    parts = [
        f"We pruned {networks}: {grid_in_words(plan)}",
        f"A candidate is one concrete set of removed {_units(cells)}; {_drawn(cells)}",
        *_each("Dense training", [cell.dense.recipe for cell in cells]),
        *_each("Retraining", [cell.retrain for cell in cells]),
    ]
    if any(cell.propagation == "released" for cell in cells):
        parts.append(
            "With propagation “exact” a removal takes the coupled slices of following tensors with it; with “released” "
            "those tensors keep the set that the L1 criterion keeps, the same for every candidate, as in the reference "
            "implementation of arXiv 2412.00143 as released."
        )
    return " ".join(parts)


def _units(cells: Iterable[Cell]) -> str:
    kinds = {cell.granularity for cell in cells}
    return "weights" if kinds == {"weight"} else "filters" if kinds == {"filter"} else "filters or weights"


def _drawn(cells: Sequence[Cell]) -> str:
    oracle = [cell for cell in cells if cell.pruner == "oracle"]
    modes = {cell.candidate_mode for cell in oracle}
    if not oracle:
        return "they were chosen by a criterion."
    if len(oracle) < len(cells) or len(modes) > 1:
        return "some were enumerated or drawn, some chosen by a criterion."
    if modes == {"all"}:
        return "all of them were evaluated."
    seeds = listed(sorted({str(cell.sampling_seed) for cell in oracle}))
    return f"they were drawn at random without replacement (sampling seed {seeds})."


def _each(name: str, recipes: list[Recipe]) -> list[str]:
    distinct = list(dict.fromkeys(recipes))
    if len(distinct) > 3:
        return [f"{name} used {len(distinct)} recipes (see the spec)."]
    return [f"{name}: {'; or '.join(recipe_in_words(one) for one in distinct)}."]


def _association(facts: Facts) -> str:
    cells = [one.cell for one in facts.plan.cells]
    subsets = sorted({cell.loss_subset for cell in cells if cell.loss_subset})
    some_samples = f"a fixed subset of {listed([f'{n:,}' for n in subsets])} train samples"
    averaged = "Values are averaged over seeds; candidates with a seed missing are left out."
    parts = {
        "Pruned train loss is the mean cross-entropy of the pruned network before retraining, in evaluation mode, "
        f"without augmentation or label smoothing, on {some_samples if subsets else 'the whole train set'}.": (
            facts.x == "pruned_train_loss"
        ),
        f"{_capital(named(facts.y))} is that of the best epoch by test accuracy, as in arXiv 2412.00143 (optimistic, "
        "since it selects on the test set)"
        + (f"; the mean of {last_epochs(cells)} stands beside it." if facts.beside else "."): (
            facts.y.startswith("best_")
        ),
        averaged: any(one.seeds > 1 for one in facts.plan.cells),
        "The association in a cell is Kendall's τ-b over its candidates.": True,
        f"A cell is called valid when {rule(facts.x, facts.y)} (arXiv 2412.00143).": True,
        "The anomaly ratio is the share of candidates strictly better after retraining than the one with the "
        f"{least(facts.x)} {named(facts.x)}.": True,
    }
    return " ".join(text for text, used in parts.items() if used)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _uncertainty(facts: Facts) -> list[str]:
    claims = [claim for claim in facts.claims.value or [] if claim.verdict]
    with_interval = [claim for claim in claims if not missing(claim.tau_interval.low)]
    ways = listed([_WAYS.get(way, way) for way in sorted({claim.p_method for claim in claims if claim.p_method})])
    parts = {
        f"Intervals are 95 % BCa bootstrap intervals over candidates ({RESAMPLES:,} resamples).": any(
            claim.n <= MOST for claim in with_interval
        ),
        f"With more than {MOST:,} candidates the interval of τ is the normal one from the jackknife.": any(
            claim.n > MOST for claim in with_interval
        ),
        f"p values are two-sided, {ways}.": bool(ways),
        f"They are adjusted over the {len(claims)} cells by Holm (family-wise error) and by Benjamini and "
        "Hochberg (false discovery rate).": len(claims) > 1,
        "Seeds are crossed with candidates (the same minibatches for every candidate of a seed), so the reliability of "
        "the mean over seeds is the two-way intraclass correlation ICC(C,k), with its exact interval under normality. "
        "The ceiling, the |τ| that a perfect predictor would be expected to reach, follows by Greiner's relation, "
        "2/π arcsin √ICC.": any(not missing(claim.noise.ceiling) for claim in claims),
        "τ is corrected for attenuation by the same relation.": any(not missing(c.noise.corrected) for c in claims),
        "With one seed for each candidate the noise of retraining was not estimated.": bool(claims)
        and all(claim.seeds < 2 for claim in claims),
    }
    used = [text for text, holds in parts.items() if holds]
    return [" ".join(used)] if used else []


_WAYS = {
    "exact": "exact",
    "permutation": f"by {PERMUTATIONS:,} permutations where candidates tie",
    "asymptotic": "asymptotic where there are many candidates",
}


def _bench(facts: Facts) -> list[str]:
    bench = facts.criteria.value
    parts = {
        "Criteria are compared by τ between the summed importance of the removed units on the dense network and "
        f"{named(facts.y)}, over the candidates that have every predictor.": bool(bench and bench.predictors),
        "Differences are tested in pairs by a bootstrap over candidates, Holm-adjusted within a cell.": bool(
            bench and bench.differences
        ),
        "Early-epoch proxies correlate the test accuracy after each epoch of retraining with the outcome.": bool(
            facts.early.value
        ),
    }
    used = [text for text, holds in parts.items() if holds]
    return [" ".join(used)] if used else []


def _software(facts: Facts) -> str:
    ran = facts.ran.value or []
    devices = listed(list(dict.fromkeys(str(one.execution.get("device_model", "unknown device")) for one in ran)), 4)
    torch = listed(sorted({one.versions["torch"] for one in ran if "torch" in one.versions}))
    parts = [f"The sweep was run and analysed with prunesweep {facts.made_with}"]
    parts += [f"PyTorch {torch}"] if torch else []
    parts += [f"on {devices}"] if devices else []
    return f"{', '.join(parts)}."


def in_unit(name: str, y: str) -> str:
    """A number's name with the unit of differences in y: percentage points, or nats."""
    return f"{name}, {'points' if is_accuracy(y) else 'nats'}" if is_accuracy(y) or "loss" in y else name
