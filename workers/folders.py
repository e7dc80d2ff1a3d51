"""Folders of images, one subfolder per class: what is in them, by content, and which files are damaged.

Each file is read once: its hash, its size in pixels and whether it can be decoded are kept in the user's cache
folder with its size and time of change. After that a look is a walk over the files' names and times.
"""

from __future__ import annotations

import hashlib
import io
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from workers.datasets import DataMissing, Dataset, Samples, Shape

SMALL = 64
"""Images of one size, of at most so many pixels a side, live in memory."""

STREAMED: Shape = (3, 224, 224)
"""Of a sample that is decoded when it is needed."""

IMAGENET_CLASSES = 1000

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Those that torchvision's ImageFolder takes."""

SKIPPED_SHARE = 0.01
"""So much of train or test may be damaged, and is left out; more is an error."""

PIECE = 256
"""So many files are read one after the other by a thread."""

Stat = tuple[str, int, int]
"""A file's path below the folder, its bytes, and when it was changed, in ns."""

_KNOWN = pa.schema(
    {
        "path": pa.string(),
        "bytes": pa.int64(),
        "changed": pa.int64(),
        "sha256": pa.string(),
        "width": pa.int32(),
        "height": pa.int32(),
        "damage": pa.string(),
    }
)
_STAT = ("path", "bytes", "changed")


class BadFolder(ValueError):
    """Why a folder cannot be used as a data set."""


@dataclass(frozen=True)
class Part:
    """The images of train or test that can be decoded, in the order of their paths below the folder, each one's
    class as its number, and those that cannot be."""

    paths: Sequence[str]
    labels: Sequence[int]
    damaged: Sequence[str]


@dataclass(frozen=True)
class Folder:
    """A folder of images that can be used. `size` is (width, height) where all images have the same."""

    root: Path
    classes: tuple[str, ...]
    train: Part
    test: Part
    size: tuple[int, int] | None
    content: str


def find_folder(name: str, root: Path) -> Dataset:
    """The data set of a folder of images. Raises DataMissing where it is not there, BadFolder where it cannot be
    used."""
    folder = _looked(name, root)
    if name == "imagenet" and len(folder.classes) != IMAGENET_CLASSES:
        raise BadFolder(
            f"{root} has {len(folder.classes)} classes; imagenet has {IMAGENET_CLASSES} (imagefolder:PATH "
            "takes any number)"
        )
    return Dataset(
        name,
        lambda _: _load(folder),
        len(folder.train.paths),
        len(folder.test.paths),
        _shape(folder),
        len(folder.classes),
        damaged=tuple(str(root / path) for part in (folder.train, folder.test) for path in part.damaged),
    )


def folder_content(name: str, root: Path) -> str:
    """16 hex digits over the paths of a folder's images below it and what they hold. Raises as `find_folder`."""
    return _looked(name, root).content


def _shape(folder: Folder) -> Shape:
    """Of a sample. Images of one size of at most SMALL live in memory as they are: their sizes alone decide, so
    that it is the same on every machine."""
    if folder.size is None or max(folder.size) > SMALL:
        return STREAMED
    return 3, folder.size[1], folder.size[0]


def _looked(name: str, root: Path) -> Folder:
    if not root.is_dir():
        raise DataMissing(
            f"the data set {name} is not there: no folder {root} (a path that is not absolute is taken from the data "
            "root: --data-root, PRUNESWEEP_DATA_ROOT)"
        )
    try:
        return look(root)
    except OSError as error:
        raise BadFolder(f"{root} cannot be read: {error}") from None


def _load(folder: Folder) -> tuple[Samples, Samples]:
    import torch

    from workers.images import ImageFiles, in_memory

    if _shape(folder) != STREAMED:
        return in_memory(folder)
    cpu = torch.device("cpu")
    train, test = (
        ImageFiles(folder.root, part, torch.arange(len(part.paths)), cpu) for part in (folder.train, folder.test)
    )
    return train, test


@cache
def look(root: Path) -> Folder:
    """What lies at `root`, looked at once per process: train/ and test/ or val/, in each a subfolder per class.

    Raises BadFolder, naming what is wrong, where those are not in it, classes differ, one is empty, or too many
    images are damaged; OSError where something cannot be read.
    """
    train, test = _parts(root)
    files = {
        part: {name: sorted(_files(root / part / name, f"{part}/{name}")) for name in _classes(root / part)}
        for part in (train, test)
    }
    _check_classes(root, files)
    known = _inspected(root, [stat for classes in files.values() for stats in classes.values() for stat in stats])
    damaged = {path for path, damage in _rows(known, "path", "damage") if damage is not None}
    sizes = {(width, height) for width, height in set(_rows(known, "width", "height")) if width}
    return Folder(
        root,
        tuple(files[train]),
        _part(root / train, files[train], damaged),
        _part(root / test, files[test], damaged),
        sizes.pop() if len(sizes) == 1 else None,
        _content(known),
    )


def _parts(root: Path) -> tuple[str, str]:
    """The names of the folders to train and to test on: test/ before val/, where it has classes (ImageNet's own
    test images have none)."""
    found = [part for part in ("test", "val") if _classes(root / part)]
    if not _classes(root / "train") or not found:
        there = ", ".join(sorted(path.name for path in root.iterdir())[:10]) or "nothing"
        raise BadFolder(
            f"{root} is no folder of images: it needs train/ and test/ or val/, in each a folder per class; "
            f"it has {there}"
        )
    return "train", found[0]


def _classes(part: Path) -> list[str]:
    """The subfolders of train/ or test/, in order: the classes 0, 1, 2, ..."""
    if not part.is_dir():
        return []
    with os.scandir(part) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _files(folder: Path, below: str) -> Iterator[Stat]:
    """The images in a class's folder, however deep; `below` is its path below the whole."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _files(Path(entry.path), f"{below}/{entry.name}")
            elif entry.name.lower().endswith(SUFFIXES):
                found = entry.stat()
                yield f"{below}/{entry.name}", found.st_size, found.st_mtime_ns


def _check_classes(root: Path, files: Mapping[str, Mapping[str, Sequence[Stat]]]) -> None:
    (train, trained), (test, tested) = files.items()
    for one, other, classes in ((train, test, set(trained) - set(tested)), (test, train, set(tested) - set(trained))):
        if classes:
            raise BadFolder(f"{root}: {one}/ has classes that {other}/ has not: {_some(sorted(classes))}")
    if empty := [f"{part}/{name}" for part, classes in files.items() for name, stats in classes.items() if not stats]:
        raise BadFolder(f"{root}: no image in {_some(empty)}; allowed: {', '.join(SUFFIXES)}")


def _part(part: Path, classes: Mapping[str, Sequence[Stat]], damaged: set[str]) -> Part:
    every = [(stat[0], label) for label, stats in enumerate(classes.values()) for stat in stats]
    good = [(path, label) for path, label in every if path not in damaged]
    bad = [path for path, _ in every if path in damaged]
    if len(bad) > SKIPPED_SHARE * len(every):
        raise BadFolder(
            f"{len(bad)} of the {len(every)} images in {part} are damaged, more than the {SKIPPED_SHARE:.0%} that are "
            f"left out: {_some(bad)}; replace or remove them"
        )
    paths, labels = zip(*good, strict=True)
    return Part(paths, labels, bad)


def _some(names: Sequence[str]) -> str:
    """The first few, and how many there are."""
    return ", ".join(names[:5]) + (f", and {len(names) - 5} more" if len(names) > 5 else "")


def _content(known: pa.Table) -> str:
    """16 hex digits over the files' paths below the folder and their content, in the order of the paths."""
    said = hashlib.sha256()
    for path, sha256 in sorted(_rows(known, "path", "sha256")):
        said.update(f"{path}\0{sha256}\n".encode())
    return said.hexdigest()[:16]


def _rows(table: pa.Table, *columns: str) -> Iterator[tuple[Any, ...]]:
    return zip(*(table[name].to_pylist() for name in columns), strict=True)


# -- reading each file once ----------------------------------------------------------------------------


def _inspected(root: Path, stats: Sequence[Stat]) -> pa.Table:
    """_KNOWN of the files: what is not known from before is read now, and kept."""
    kept = _cache_file(root)
    before = _read(kept)
    now = pa.Table.from_arrays([pa.array(column) for column in zip(*stats, strict=True)], schema=_only(*_STAT))
    if before is not None and before.select(_STAT).equals(now):
        return before
    there = {} if before is None else {row[:3]: row[3:] for row in _rows(before, *_KNOWN.names)}
    unknown = [stat for stat in stats if stat not in there]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:  # hashing and decoding let other threads run
        pieces = [unknown[start : start + PIECE] for start in range(0, len(unknown), PIECE)]
        found = pool.map(lambda piece: [_inspect(root / path) for path, *_ in piece], pieces)
        there |= dict(zip(unknown, chain.from_iterable(found), strict=True))
    rows = [(*stat, *there[stat]) for stat in stats]
    known = pa.Table.from_arrays(
        [pa.array(column, field.type) for column, field in zip(zip(*rows, strict=True), _KNOWN, strict=True)],
        schema=_KNOWN,
    )
    _write(kept, known)
    return known


def _only(*names: str) -> pa.Schema:
    return pa.schema([_KNOWN.field(name) for name in names])


def _inspect(path: Path) -> tuple[str, int | None, int | None, str | None]:
    """(SHA-256, width, height, None) of an image, or (SHA-256, None, None, why it cannot be decoded)."""
    from PIL import Image

    content = path.read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    try:
        with Image.open(io.BytesIO(content)) as image:
            width, height = image.size
            # Of a JPEG all bytes are read, few pixels made.
            image.draft("RGB", (max(1, width // 8), max(1, height // 8)))
            image.load()
    except MemoryError:
        raise
    except Exception as error:  # its decoders raise many kinds
        return sha256, None, None, f"{type(error).__name__}: {error}"
    return sha256, width, height, None


def _cache_file(root: Path) -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "prunesweep" / "folders" / f"{hashlib.sha256(str(root).encode()).hexdigest()[:16]}.parquet"


def _read(path: Path) -> pa.Table | None:
    """What is kept there; None where there is nothing, or nothing of use."""
    try:
        found = pq.read_table(path)
    except (OSError, pa.ArrowException):
        return None
    return found if found.schema.equals(_KNOWN) else None


def _write(path: Path, known: pa.Table) -> None:
    """Keep it, whole or not at all; where that cannot be, the next process reads the files again."""
    made = path.with_name(f"{path.stem}-{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(known, made)
        made.replace(path)
    except OSError:
        made.unlink(missing_ok=True)
