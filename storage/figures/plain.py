"""Figures for papers. The scatter is the one of arXiv 2412.00143."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from storage import statistics

if TYPE_CHECKING:
    from storage.correlate import CellData

FILES = (".png", ".pdf", ".svg")
_NAMES = {
    "pruned_train_loss": "Pruned train loss",
    "best_test_accuracy": "Test accuracy after retraining\n(best epoch, picked on the test set)",
    "best_test_loss": "Test loss after retraining\n(best epoch, picked on the test set)",
    "last5_test_accuracy_mean": "Test accuracy after retraining\n(mean of the last five epochs)",
    "last_test_accuracy": "Test accuracy after retraining\n(last epoch)",
    "last_test_loss": "Test loss after retraining (last epoch)",
}
_COLUMNS = 3
_BETTER, _OTHERS, _PICKED = "#d62728", "#2ca02c", "#1f4fd8"


def scatter(cells: Sequence[CellData], x: str, y: str, path: Path) -> None:
    """One panel per cell: x against y, one point per candidate, averaged over seeds.

    The candidate with the lowest x is a blue star with dashed cross-lines; candidates better than it
    in y are red, the others green. tau, p and the anomaly ratio are written in.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    style: Any = {
        "font.size": 9,
        "pdf.fonttype": 42,
        "svg.fonttype": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with plt.rc_context(style):
        across = min(len(cells), _COLUMNS)
        down = ceil(len(cells) / across)
        figure, axes = plt.subplots(
            down, across, figsize=(4.6 * across, 3.5 * down), squeeze=False, layout="constrained"
        )
        panels = list(axes.flat)
        for panel, cell in zip(panels, cells, strict=False):
            _panel(panel, cell, x, y)
        for panel in panels[len(cells) :]:
            panel.set_axis_off()
        figure.savefig(path, dpi=160)
        plt.close(figure)


def _panel(panel: Any, cell: CellData, x: str, y: str) -> None:
    a, b, _ = statistics.paired(cell.columns[x], cell.columns[y])
    higher = statistics.higher_is_better(y)
    better = statistics.better_than_picked(a, b, higher=higher)
    picked = statistics.lowest(a)
    for chosen, colour, label in ((better, _BETTER, "better than the pick"), (~better, _OTHERS, "not better")):
        panel.scatter(a[chosen], b[chosen], s=16, color=colour, alpha=0.75, linewidths=0, label=label)
    panel.axvline(a[picked], color=_PICKED, linestyle="--", linewidth=0.8)
    panel.axhline(b[picked], color=_PICKED, linestyle="--", linewidth=0.8)
    panel.scatter(
        a[picked], b[picked], s=130, marker="*", color=_PICKED, zorder=3, label="lowest loss: the oracle's pick"
    )
    found = statistics.correlation(a.tolist(), b.tolist())
    anomaly = statistics.anomaly_ratio(a.tolist(), b.tolist(), higher=higher)
    panel.set_title(
        f"{cell.title}\nKendall tau {found.kendall:.3f} (p = {found.kendall_p:.2g}, n = {found.n}), "
        f"anomaly ratio {anomaly:.1%}",
        fontsize=8.5,
    )
    panel.set_xlabel(_NAMES.get(x, x))
    panel.set_ylabel(_NAMES.get(y, y))
    if y.endswith(("accuracy", "accuracy_mean")):
        from matplotlib.ticker import PercentFormatter

        panel.yaxis.set_major_formatter(PercentFormatter(1.0))
    panel.legend(fontsize=7, frameon=True, framealpha=0.8, edgecolor="none")
