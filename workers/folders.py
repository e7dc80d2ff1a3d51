"""Folders of images, one subfolder per class: what is in them, by content, and which files are damaged.

Each file is read once: its hash, its size in pixels and whether it can be decoded are kept in the user's cache
folder with its size and time of change. After that a look is a walk over the files' names and times.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import stat
import unicodedata
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from storage.phases import Report, silent
from storage.printable import printable
from storage.userfiles import open_regular
from workers.datasets import DataMissing, Dataset, Samples, Shape

SMALL = 64
"""Images of one size, of at most so many pixels a side, live in memory."""

STREAMED: Shape = (3, 224, 224)
"""Of a sample that is decoded when it is needed."""

IMAGENET_CLASSES = 1000

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Those that torchvision's ImageFolder takes."""

FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
"""Those that PIL may find in a file, whatever its suffix: PIL starts another program, Ghostscript, for EPS."""

SKIPPED_SHARE = 0.01
"""So much of train or test may be damaged, and is left out; more is an error."""

PIECE = 256
"""So many files are read one after the other by a thread."""

MOST_BYTES = 2**30
"""Maximum size of an image file."""

MOST_PIXELS = 2**30 // 4 // 3
"""Maximum size of an image: the size above which PIL warns of a decompression bomb."""

LOW_LEVEL = 2**12
"""If all 16-bit images of a folder stay below this level, their levels have another scale than 0..65535."""

Stat = tuple[str, int, int]
"""A file's path below the folder, its size in bytes (-1 if it is no regular file), and when it was changed, in ns."""

_KNOWN = pa.schema(
    {
        "path": pa.binary(),
        "bytes": pa.int64(),
        "changed": pa.int64(),
        "sha256": pa.string(),
        "width": pa.int32(),
        "height": pa.int32(),
        "damage": pa.string(),
        "unsupported": pa.string(),
        "scaled": pa.bool_(),
        "highest": pa.int32(),
    }
)
"""What is cached of each file. Caches with another schema are not used: change it when a verdict on a file changes."""

JUDGED = 2
"""Part of the name of a cache. Count it up when a verdict on a file changes under one schema."""

_STAT = ("path", "bytes", "changed")

DIGEST = 8
"""Bytes of the SHA-256 of an image that are kept to compare what is read with what was inspected."""


class BadFolder(ValueError):
    """Why a folder cannot be used as a data set."""


class Unsupported(ValueError):
    """An image whose levels have no known scale to 8 bits."""


@dataclass(frozen=True)
class Verdict:
    """The inspection of one file: its hash, empty if it was not read; its size in pixels, or the reason why it is
    damaged, or why its levels are unsupported; whether its levels are scaled to 8 bits; the highest level of a 16-bit
    image."""

    sha256: str
    width: int | None = None
    height: int | None = None
    damage: str | None = None
    unsupported: str | None = None
    scaled: bool = False
    highest: int | None = None


@dataclass(frozen=True)
class Part:
    """The images of train or test that can be decoded, in the order of their paths below the folder, each one's
    class as its number, and those that cannot be. `digests` has DIGEST bytes of the SHA-256 of each image."""

    paths: Sequence[str]
    labels: Sequence[int]
    damaged: Sequence[str]
    digests: bytes

    def digest(self, number: int) -> bytes:
        """Return the digest of the image with this number."""
        return self.digests[DIGEST * number : DIGEST * (number + 1)]


@dataclass(frozen=True)
class Folder:
    """A folder of images that can be used. `size` is (width, height) where all images have the same."""

    root: Path
    classes: tuple[str, ...]
    train: Part
    test: Part
    size: tuple[int, int] | None
    content: str


def find_folder(name: str, root: Path, report: Report = silent) -> Dataset:
    """The data set of a folder of images. Raises DataMissing where it is not there, BadFolder where it cannot be
    used."""
    folder = _looked(name, root, report)
    if name == "imagenet" and len(folder.classes) != IMAGENET_CLASSES:
        raise BadFolder(
            f"{printable(root)} has {len(folder.classes)} classes; imagenet has {IMAGENET_CLASSES} (imagefolder:PATH "
            "takes any number)"
        )
    return Dataset(
        name,
        lambda _: _load(folder),
        len(folder.train.paths),
        len(folder.test.paths),
        _shape(folder),
        len(folder.classes),
        damaged=tuple(printable(root / path) for part in (folder.train, folder.test) for path in part.damaged),
    )


def folder_content(name: str, root: Path, report: Report = silent) -> str:
    """16 hex digits over the paths of a folder's images below it and what they hold. Raises as `find_folder`."""
    return _looked(name, root, report).content


def _shape(folder: Folder) -> Shape:
    """Of a sample. Images of one size of at most SMALL live in memory as they are: their sizes alone decide, so
    that it is the same on every machine."""
    if folder.size is None or max(folder.size) > SMALL:
        return STREAMED
    return 3, folder.size[1], folder.size[0]


def _looked(name: str, root: Path, report: Report) -> Folder:
    try:
        if root.is_dir():
            return look(root, Receiver(report))
    except OSError as error:
        raise BadFolder(f"{printable(root)} cannot be read: {error}") from None
    raise DataMissing(
        f"the data set {name} is not there: no folder {printable(root)} (a path that is not absolute is taken "
        "from the data root: --data-root, PRUNESWEEP_DATA_ROOT)"
    )


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


@dataclass(frozen=True)
class Receiver:
    """A receiver of phases that equals any other: a cache that has one in its key does not tell them apart."""

    report: Report = field(compare=False)


@cache
def look(root: Path, receiver: Receiver) -> Folder:
    """What lies at `root`, looked at once per process: train/ and test/ or val/, in each a subfolder per class.

    Raises BadFolder, naming what is wrong, where those are not in it, classes differ, one is empty, or too many
    images are damaged; OSError where something cannot be read.
    """
    receiver.report(f"listing the images in {printable(root)}")
    train, test = _parts(root)
    files = {part: _class_files(root, part) for part in (train, test)}
    _check_classes(root, files)
    files[test] = {name: files[test][name] for name in files[train]}  # one order, whatever Unicode form the names have
    every = [stat for classes in files.values() for stats in classes.values() for stat in stats]
    known = _inspected(root, every, receiver.report)
    _check_levels(root, known)
    damaged = {os.fsdecode(path): damage for path, damage in _rows(known, "path", "damage") if damage is not None}
    digests = {os.fsdecode(path): bytes.fromhex(sha256)[:DIGEST] for path, sha256 in _rows(known, "path", "sha256")}
    sizes = {(width, height) for width, height in set(_rows(known, "width", "height")) if width}
    return Folder(
        root,
        tuple(files[train]),
        _part(root / train, files[train], damaged, digests),
        _part(root / test, files[test], damaged, digests),
        sizes.pop() if len(sizes) == 1 else None,
        _content(known),
    )


def _parts(root: Path) -> tuple[str, str]:
    """The names of the folders to train and to test on: test/ before val/, where it has classes (ImageNet's own
    test images have none)."""
    found = [part for part in ("test", "val") if _classes(root / part)]
    if not _classes(root / "train") or not found:
        there = ", ".join(printable(name) for name in sorted(path.name for path in root.iterdir())[:10]) or "nothing"
        raise BadFolder(
            f"{printable(root)} is no folder of images: it needs train/ and test/ or val/, in each a folder per class; "
            f"it has {there}"
        )
    return "train", found[0]


def _classes(part: Path) -> dict[str, str]:
    """The subfolders of train/ or test/ in order, the classes 0, 1, 2, ...: name in Unicode's form NFC -> its own
    name. Raises BadFolder where two names differ only in their form."""
    if not part.is_dir():
        return {}
    with os.scandir(part) as entries:
        own = sorted(entry.name for entry in entries if _is_class(entry))
    classes: dict[str, str] = {}
    for name in own:
        other = classes.setdefault(unicodedata.normalize("NFC", name), name)
        if other != name:
            raise BadFolder(
                f"{printable(part)} has two folders for one class: {other!a} and {name!a} differ only in their "
                "Unicode form. A class has one folder. Move the images into one of them"
            )
    return classes


def _is_class(entry: os.DirEntry[str]) -> bool:
    found = None if entry.name.startswith(".") else _stat(entry)
    return found is not None and stat.S_ISDIR(found.st_mode)


def _class_files(root: Path, part: str) -> dict[str, list[Stat]]:
    """The images of each class of train/ or test/, in the order of the classes and of their paths."""
    inside = _entered(root / part, _entered(root, ()))
    return {
        name: sorted(_files(root / part / own, f"{part}/{own}", inside)) for name, own in _classes(root / part).items()
    }


def _entered(folder: Path, inside: tuple[Path, ...]) -> tuple[Path, ...]:
    """`inside`, the folders walked down to `folder` without links, and `folder`. Raises BadFolder where `folder`
    holds one of them, so that the walk would not end."""
    real = folder.resolve()
    if any(outer.is_relative_to(real) for outer in inside):
        raise BadFolder(
            f"{printable(folder)} is a link to a folder that holds it, {printable(real)}. "
            "Links to other folders are allowed. Remove the link"
        )
    return (*inside, real)


def _files(folder: Path, below: str, inside: tuple[Path, ...]) -> Iterator[Stat]:
    """The images in a class's folder, however deep; `below` is its path below the whole, `inside` the folders around
    it. Hidden files and folders are left out."""
    inside = _entered(folder, inside)
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            found, path = _stat(entry), f"{below}/{entry.name}"
            if entry.name.lower().endswith(SUFFIXES):
                regular = found is not None and stat.S_ISREG(found.st_mode)
                yield (path, found.st_size, found.st_mtime_ns) if found and regular else (path, -1, 0)
            elif found and stat.S_ISDIR(found.st_mode):
                yield from _files(Path(entry.path), path, inside)


def _stat(entry: os.DirEntry[str]) -> os.stat_result | None:
    """Of the file that an entry leads to; None for a link that leads to no file."""
    try:
        return entry.stat()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return None
        raise


def _check_classes(root: Path, files: Mapping[str, Mapping[str, Sequence[Stat]]]) -> None:
    (train, trained), (test, tested) = files.items()
    for one, other, classes in ((train, test, set(trained) - set(tested)), (test, train, set(tested) - set(trained))):
        if classes:
            raise BadFolder(f"{printable(root)}: {one}/ has classes that {other}/ has not: {_some(sorted(classes))}")
    if empty := [f"{part}/{name}" for part, classes in files.items() for name, stats in classes.items() if not stats]:
        raise BadFolder(f"{printable(root)}: no image in {_some(empty)}; allowed: {', '.join(SUFFIXES)}")


def _check_levels(root: Path, known: pa.Table) -> None:
    """Raise BadFolder where the levels of images have no known scale: all of a folder's must have the same white."""
    unsupported = [(os.fsdecode(path), why) for path, why in _rows(known, "path", "unsupported") if why is not None]
    if unsupported:
        path, why = unsupported[0]
        more = f" and {len(unsupported) - 1} more images" if len(unsupported) > 1 else ""
        raise BadFolder(
            f"{printable(root / path)}: {why}. Allowed: levels of 8 or 16 bits, and floats from 0 (black) to 1 "
            f"(white). Convert it{more}, all by the same scale"
        )
    deep = [(highest, os.fsdecode(path)) for path, highest in _rows(known, "path", "highest") if highest is not None]
    if deep and max(deep)[0] < LOW_LEVEL:
        highest, path = max(deep)
        raise BadFolder(
            f"{printable(root / path)}: {highest} is the highest level of all {len(deep)} images with 16 bits, so "
            "that all would be nearly black. White is 65535. Scale the levels to 0..65535, or save the images "
            "with 8 bits"
        )


def _part(
    part: Path, classes: Mapping[str, Sequence[Stat]], damaged: Mapping[str, str], digests: Mapping[str, bytes]
) -> Part:
    every = [(stat[0], label) for label, stats in enumerate(classes.values()) for stat in stats]
    good = [(path, label) for path, label in every if path not in damaged]
    bad = [path for path, _ in every if path in damaged]
    if len(bad) > SKIPPED_SHARE * len(every):
        raise BadFolder(
            f"{len(bad)} of the {len(every)} images in {printable(part)} are damaged, more than the "
            f"{SKIPPED_SHARE:.0%} that are left out: {_some(bad)} (the first: {damaged[bad[0]]}); "
            "replace or remove them"
        )
    paths, labels = zip(*good, strict=True)
    return Part(paths, labels, bad, b"".join(digests[path] for path in paths))


def _some(names: Sequence[str]) -> str:
    """The first few, and how many there are."""
    return ", ".join(map(printable, names[:5])) + (f", and {len(names) - 5} more" if len(names) > 5 else "")


def _content(known: pa.Table) -> str:
    """16 hex digits over the files' paths below the folder and their content, in the order of the paths.

    Scaled images are marked: versions that clipped their levels measured other images under the hash without marks.
    """
    said = hashlib.sha256()
    for path, sha256, scaled in sorted(_rows(known, "path", "sha256", "scaled")):
        said.update(path + f"\0{sha256}{' scaled' if scaled else ''}\n".encode())
    return said.hexdigest()[:16]


def _rows(table: pa.Table, *columns: str) -> Iterator[tuple[Any, ...]]:
    return zip(*(table[name].to_pylist() for name in columns), strict=True)


# -- reading each file once ----------------------------------------------------------------------------


def _inspected(root: Path, stats: Sequence[Stat], report: Report) -> pa.Table:
    """_KNOWN of the files: what is not known from before is read now, and kept."""
    kept = _cache_file(root)
    before = _read(kept)
    keys = [(os.fsencode(path), *times) for path, *times in stats]
    now = pa.Table.from_arrays([pa.array(column) for column in zip(*keys, strict=True)], schema=_only(*_STAT))
    if before is not None and before.select(_STAT).equals(now):
        return before
    there = {} if before is None else {row[:3]: row[3:] for row in _rows(before, *_KNOWN.names)}
    unknown = [key for key in keys if key not in there]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:  # hashing and decoding let other threads run
        read = 0
        pieces = [unknown[start : start + PIECE] for start in range(0, len(unknown), PIECE)]
        found = pool.map(lambda piece: [astuple(_judged(root, *key)) for key in piece], pieces)
        for piece, verdicts in zip(pieces, found, strict=True):
            there |= dict(zip(piece, verdicts, strict=True))
            read += len(piece)
            report(f"reading the images in {printable(root)}", read, len(unknown), "image")
    rows = [(*key, *there[key]) for key in keys]
    known = pa.Table.from_arrays(
        [pa.array(column, field.type) for column, field in zip(zip(*rows, strict=True), _KNOWN, strict=True)],
        schema=_KNOWN,
    )
    _write(kept, known)
    return known


def _only(*names: str) -> pa.Schema:
    return pa.schema([_KNOWN.field(name) for name in names])


def _judged(root: Path, path: bytes, size: int, _: int) -> Verdict:
    if size < 0:
        return Verdict("", damage="it is a folder, FIFO, socket, device or broken link, not a regular file")
    if size > MOST_BYTES:
        return Verdict("", damage=f"it has {size} bytes; the maximum is {MOST_BYTES}")
    return _inspect(root / os.fsdecode(path))


def _inspect(path: Path) -> Verdict:
    """Read and decode a regular file. Raises OSError where it cannot be read."""
    import numpy as np

    content = _content_of(path)
    sha256 = hashlib.sha256(content).hexdigest()
    try:
        with _opened(content) as image:
            width, height = image.size
            # Of a JPEG all bytes are read, few pixels made.
            image.draft("RGB", (max(1, width // 8), max(1, height // 8)))
            in_colours(image)
            scaled = _is_wide(image)
            highest = int(np.asarray(image).max()) if _bits(image) == 16 else None
    except MemoryError:
        raise
    except Unsupported as error:
        return Verdict(sha256, unsupported=str(error))
    except Exception as error:  # its decoders raise many kinds
        return Verdict(sha256, damage=str(error) or type(error).__name__)
    return Verdict(sha256, width, height, scaled=scaled, highest=highest)


def picture(path: Path, digest: bytes | None = None) -> Any:
    """Return an image file as an RGB image of PIL with 8-bit levels. Raises OSError, Unsupported, or what PIL's
    decoders raise; ValueError where the file does not have the `digest`."""
    content = _content_of(path)
    if digest is not None and not hashlib.sha256(content).digest().startswith(digest):
        raise ValueError("its content has changed since the folder was inspected; run the spec again")
    with _opened(content) as image:
        return in_colours(image)


def _content_of(path: Path) -> bytes:
    """Return the bytes of a regular file, MOST_BYTES at most. Raises OSError."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MOST_BYTES:
            raise OSError(errno.EFBIG, f"it has {size} bytes; the maximum is {MOST_BYTES}", str(path))
        return file.read(size)


def _opened(content: bytes) -> Any:
    """Return an image of PIL that is not decoded yet. Raises ValueError where it is too large or no image."""
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError:  # it names an object in memory
        raise ValueError(f"its content is not an image in one of the formats {', '.join(FORMATS)}") from None
    if image.width * image.height > MOST_PIXELS:
        raise ValueError(f"it has {image.width}x{image.height} pixels; the maximum is {MOST_PIXELS}")
    return image


def in_colours(image: Any) -> Any:
    """Return an image of PIL as RGB with 8-bit levels; an alpha channel is left out.

    Of 16 bits the upper 8 count, as PIL has it for 16-bit colours. Raises Unsupported where white has no known level.
    """
    import numpy as np
    from PIL import Image

    image.load()
    if _tag(image, _FORMAT) == _SIGNED:
        raise Unsupported("its levels are signed integers")
    if not _is_wide(image):
        image.info.pop("transparency", None)
        try:
            return image.convert("RGB")
        except ValueError:
            raise Unsupported(f"its colours, of PIL's mode {image.mode}, cannot be converted to RGB") from None
    levels = np.asarray(image)
    if image.mode == "F":
        if not ((levels >= 0) & (levels <= 1)).all():  # NaN is neither
            raise Unsupported(f"its levels are floats from {levels.min():g} to {levels.max():g}")
        levels = np.rint(levels * 255)
    elif bits := _bits(image):
        levels = levels >> (bits - 8)
    else:
        raise Unsupported(f"its levels are integers of PIL's mode {image.mode}, from {levels.min()} to {levels.max()}")
    levels = levels.astype(np.uint8)
    return Image.fromarray(255 - levels if _tag(image, _WHITE) == 0 else levels).convert("RGB")


def _is_wide(image: Any) -> bool:
    """Whether PIL has levels of more than 8 bits, which it would clip."""
    return image.mode == "F" or image.mode.startswith("I")


_DEPTH, _WHITE, _FORMAT = 258, 262, 339
"""Tags of TIFF: bits per sample, the meaning of the levels (0 if level 0 is white), and the kind of numbers."""

_SIGNED = 2
"""The value of _FORMAT for signed integers."""


def _bits(image: Any) -> int | None:
    """The bits of a grey level that PIL has not scaled to 8, where they are known: 12 or 16."""
    if image.mode.startswith("I;16") and image.format == "TIFF":
        return _tag(image, _DEPTH)
    deep = image.mode.startswith("I") and image.format in ("PNG", "PPM")  # PIL has scaled the second to 65535
    return 16 if deep else None


def _tag(image: Any, number: int) -> int | None:
    """The first value of a tag of TIFF."""
    value = image.tag_v2.get(number) if image.format == "TIFF" else None
    return value[0] if isinstance(value, tuple) else value


def _cache_file(root: Path) -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "prunesweep" / "folders" / f"{hashlib.sha256(os.fsencode(root)).hexdigest()[:16]}-{JUDGED}.parquet"


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
