"""The studies that ship with prunesweep: files in studies/, and variants made from them.

`<study>-short` retrains for a tenth of the epochs (the LeNet, ResNet56 and ResNet18 studies of arXiv 2412.00143);
`<study>-l1` has the one candidate that the criterion l1 chooses.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from importlib.resources import files
from pathlib import Path

from orchestrator.documents import MAX_BYTES, Document, decoded, nearest
from orchestrator.errors import UserError
from storage.errors import StoreError
from storage.userfiles import read_standard_input, read_stream

SHORT = ("lenet5-mini-*", "resnet56-*", "resnet18-*")
NOT_OF_THE_PAPER = ("digits",)


def open_document(spec: str) -> Document:
    """Return the document of a spec: a file's path or URI, a study's name, or `-` for standard input. Raises
    UserError."""
    path = Path(spec)
    try:
        if spec == "-":
            return Document("standard input", decoded("standard input", read_standard_input(MAX_BYTES)))
        if "://" in spec:
            return Document(spec, decoded(spec, _from_uri(spec)))
        if path.is_file() or path.is_fifo():
            return Document(spec, decoded(spec, read_stream(path, MAX_BYTES)))
    except (OSError, StoreError) as error:
        raise UserError(f"cannot read {spec}: {error}") from error
    if spec in study_names():
        return open_study(spec)
    hint = nearest(spec, study_names())
    raise UserError(f"{spec} is neither a file nor a study{hint}; `prunesweep studies` lists the studies")


def _from_uri(uri: str) -> bytes:
    """The content of a file at a `pyarrow.fs` URI, as an object store has it. Raises OSError."""
    from storage.store import Store

    folder, _, name = uri.rpartition("/")
    return Store(folder).read(name)


def study_names() -> list[str]:
    """Every study, its variants beside it."""
    plain = sorted(_files())
    with_short = [name for one in plain for name in (one, f"{one}-short") if name == one or _has_short(one)]
    return [name for one in with_short for name in (one, f"{one}-l1") if name == one or one not in NOT_OF_THE_PAPER]


def open_study(name: str) -> Document:
    """The spec of a study, or of a variant of one. `name` is among `study_names`."""
    base = name.removesuffix("-l1")
    document = Document(f"study {name}", _files()[base.removesuffix("-short")])
    if base.endswith("-short"):
        _shorten(document)
    if name != base:
        document.override("grid.pruner=l1")
    document.override(f"name={name}")
    return document


def _shorten(document: Document) -> None:
    """A tenth of the epochs of retraining, the steps of its learning rate moved along."""
    retrain = document.plain()["retrain"]
    document.override(f"retrain.epochs={retrain['epochs'] // 10}")
    table = ", ".join(f"{int(start) // 10}: {value}" for start, value in retrain["lr"].items())
    document.override(f"retrain.lr={{{table}}}")


def _has_short(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in SHORT)


def _files() -> dict[str, str]:
    """Name -> text of each file."""
    found = files("orchestrator").joinpath("studies").iterdir()
    return {f.name.removesuffix(".yaml"): f.read_text() for f in found if f.name.endswith(".yaml")}
