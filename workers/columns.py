"""What a training leaves in its row's columns, and where it ran."""

from __future__ import annotations

import math
import socket
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from storage.identity import canonical_json
from workers.execution import library_versions
from workers.measures import Epoch


def curves(epochs: Sequence[Epoch], planned: int) -> dict[str, Any]:
    """The epoch_* columns: `planned` long, null from where training diverged."""
    rest = [None] * (planned - len(epochs))
    finite = lambda x: x if math.isfinite(x) else None  # noqa: E731
    has_validation = any(e.validation for e in epochs)
    return {
        "epoch_train_loss": (*(finite(e.train_loss) for e in epochs), *rest),
        "epoch_test_loss": (*(finite(e.test.loss) for e in epochs), *rest),
        "epoch_test_accuracy": (
            *(e.test.accuracy if math.isfinite(e.test.loss) else None for e in epochs),
            *rest,
        ),
        "epoch_val_accuracy": (
            *(e.validation.accuracy if e.validation and math.isfinite(e.test.loss) else None for e in epochs),
            *rest,
        )
        if has_validation
        else None,
    }


def outcome(epochs: Sequence[Epoch], planned: int) -> dict[str, Any]:
    """best_*, val_best_*, last_* and last5_* of a training; best over the finite epochs."""
    finite = [e for e in epochs if math.isfinite(e.test.loss)]
    diverged = len(finite) < planned or not math.isfinite(epochs[-1].train_loss)
    columns: dict[str, Any] = {"diverged": diverged}
    if finite:
        best = max(finite, key=lambda e: (e.test.accuracy, -e.number))
        columns |= {
            "best_epoch": best.number,
            "best_test_accuracy": best.test.accuracy,
            "best_test_loss": best.test.loss,
        }
    validated = [(e.validation, e) for e in finite if e.validation]
    if validated:
        on_validation, chosen = max(validated, key=lambda pair: (pair[0].accuracy, -pair[1].number))
        columns |= {
            "val_best_epoch": chosen.number,
            "val_best_val_accuracy": on_validation.accuracy,
            "val_best_test_accuracy": chosen.test.accuracy,
            "val_best_test_loss": chosen.test.loss,
        }
    if not diverged:
        tail = epochs[-5:]
        losses, accuracies = [e.test.loss for e in tail], [e.test.accuracy for e in tail]
        columns |= {
            "last_test_loss": losses[-1],
            "last_test_accuracy": accuracies[-1],
            "last5_test_loss_mean": float(np.mean(losses)),
            "last5_test_loss_std": float(np.std(losses)),
            "last5_test_accuracy_mean": float(np.mean(accuracies)),
            "last5_test_accuracy_std": float(np.std(accuracies)),
        }
    return columns


def provenance(attempt: int) -> dict[str, Any]:
    """Where and by what a row was made, as far as it is known whatever happens."""
    return {
        "attempt": attempt,
        "host": socket.gethostname(),
        "versions": canonical_json(dict(library_versions())),
    }


def peak_memory(device: torch.device) -> int:
    """Peak bytes: allocated on a GPU, resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
