"""A tiny sweep's numbers, pinned. A refactor means identical losses."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.documents import Document
from orchestrator.run import Options, run_spec
from storage.store import Store
from tests.conftest import TINY

# task id -> (pruned train loss, test accuracy of the best epoch, test loss of the last epoch).
GOLDEN: dict[str, tuple[float, float, float]] = {
    "ca348699e161f630": (2.3014027278404683, 0.09765625, 2.2976881926879287),
    "69a58bbab7108c18": (2.3014027278404683, 0.09765625, 2.2976766312494874),
    "c3106f5abebfe7f1": (2.2996997369918972, 0.09765625, 2.2910670042037964),
    "0f1b02b6ec5401a7": (2.2996997369918972, 0.09765625, 2.291205206885934),
    "eeaf712d1433c885": (2.303701988887042, 0.09765625, 2.2994287884794176),
    "0fd385793321df38": (2.303701988887042, 0.09765625, 2.299565412569791),
    "d471670f83e57a8e": (2.2989820414222777, 0.09765625, 2.2938459566794336),
    "2349fd84b523a259": (2.2989820414222777, 0.1015625, 2.293829380068928),
}
GOLDEN_EXECUTION = (
    '{"backend":"serial","device_model":"AMD EPYC (AVX512)","fleet":1,"memory_form'
    'at":"channels_last","threads":1,"versions":{"numpy":"2.4.6","torch":"2.15.0"}}'
)
COLUMNS = "task_id, pruned_train_loss, best_test_accuracy, last_test_loss"


def test_a_tiny_sweep_gives_the_pinned_numbers(tmp_path: Path) -> None:
    """The same execution: the last digit. Another processor or torch: the same before retraining, to rounding."""
    store = Store(str(tmp_path))
    assert run_spec(store, Document("tiny.yaml", TINY), Options(inline=True)).complete
    found = {line[0]: line[1:] for line in store.sql(f"select {COLUMNS} from rows").fetchall()}
    assert found.keys() == GOLDEN.keys()
    (execution,) = store.sql("select distinct execution from rows").fetchall()[0]
    if execution == GOLDEN_EXECUTION:
        assert found == GOLDEN
    else:
        for task_id, (pruned, accuracy, _) in GOLDEN.items():
            # The dense model was trained here, by another execution: near, no more.
            assert found[task_id][0] == pytest.approx(pruned, rel=0.02)
            assert found[task_id][1] == pytest.approx(accuracy, abs=0.05)
