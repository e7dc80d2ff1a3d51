"""A tiny sweep's numbers, pinned. A refactor means identical losses."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.documents import Document
from orchestrator.run import Options, run_spec
from storage.store import Store
from tests.conftest import TINY

# task id -> (pruned train loss, test accuracy of the best epoch, test loss of the last epoch).
GOLDEN: dict[str, tuple[float, float, float]] = {}
GOLDEN_EXECUTION = ""
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
