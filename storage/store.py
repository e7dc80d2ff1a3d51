"""The store: a folder or an object-store prefix with sweeps, dense weights and rows in it.

No server and no lock: files are written whole under names nobody else uses, and never changed.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from storage.commit import again, commit, patiently, replace
from storage.digests import expansion_digest, row_file_name
from storage.encoding import parquet
from storage.errors import DamagedError, QueryError, StoreError
from storage.identity import SWEEP_NAME
from storage.manifest import PLAN_SCHEMA, REPEATING, STEM, Manifest, PlannedTask, next_time, plan_content
from storage.printable import is_utf8, printable
from storage.records import Row, Shard, utc_now
from storage.remote import KINDS, Budget, kind_of, one_line, open_filesystem, settings
from storage.rowfiles import Compaction, Problem, compact, set_aside, valid_rows, warn_skipped
from storage.schema import rows_to_table
from storage.scratch import Scratch

if TYPE_CHECKING:
    import duckdb

T = TypeVar("T")

SMALL_BYTES = 4 * 2**20
"""Below pyarrow's size of a part of an upload to S3, 5 MiB and more."""

_HEAL = "; run its spec again, or remove the sweep with `prunesweep rm {sweep}`: the rows stay"
"""What to do about the damaged expansion of a sweep."""

_READ_ERRORS = (pa.ArrowException, ValueError, OSError, KeyError)


@dataclass(frozen=True)
class DenseFile:
    """Trained dense weights in the store: name relative to it, SHA-256 of the file, its bytes."""

    name: str
    sha256: str
    content: bytes


def check_location(location: str) -> None:
    """Raise StoreError where the text cannot be a store's location."""
    if not location or location.endswith("://") or "\0" in location:
        raise StoreError(f"{location!r} is no store location: give a folder, or a URI as s3://bucket/prefix")
    scheme, _, rest = location.partition("://")
    authority = rest.partition("/")[0]
    user, at, _ = authority.rpartition("@")
    cut = KINDS.get(scheme) in ("s3", "gs") and ":" in authority  # KEY:SECRET@bucket, where the secret has a slash
    if cut or (at and not _names_no_secret(scheme, unquote(user))):  # it would be shown
        raise StoreError("a store's URI holds no credentials: they belong in the environment (AWS_ACCESS_KEY_ID, ...)")
    kind_of(location)


def _names_no_secret(scheme: str, user: str) -> bool:
    """Whether what stands before the @ of a URI is a container of Azure, a user of HDFS, or Google's `anonymous`."""
    kind = KINDS.get(scheme)
    return (kind in ("abfs", "hdfs") and ":" not in user) or (kind == "gs" and user == "anonymous")


class Store:
    """A store at a local path or a `pyarrow.fs` URI (`s3://bucket/prefix`).

    `Store("results").sql("select ...").df()` is the way in from a notebook.
    """

    def __init__(self, location: str | os.PathLike[str]) -> None:
        self.location = os.fspath(location)
        check_location(self.location)
        try:
            if "://" in self.location:
                self.fs, root = open_filesystem(self.location)
                self._for_small = self.fs if self.is_local else open_filesystem(_one_put(self.location))[0]
            else:
                self.fs, root = pafs.LocalFileSystem(), str(Path(self.location).expanduser().absolute())
                self._for_small = self.fs
        except (pa.ArrowException, ValueError, OSError, RuntimeError) as error:
            why = f"{one_line(error)}{settings(self.location)}"
            raise StoreError(f"cannot open the store {printable(self.location)}: {why}") from error
        self.root = root.rstrip("/")
        if not is_utf8(self.root):
            raise StoreError(f"{printable(self.root)} is not a name in UTF-8. Use a store whose path is in UTF-8")

    def __repr__(self) -> str:
        return f"Store({self.location!r})"

    # -- paths ------------------------------------------------------------------------------------

    @property
    def is_local(self) -> bool:
        return isinstance(self.fs, pafs.LocalFileSystem)

    @property
    def absolute(self) -> str:
        """Its location as any process on any machine that sees it would say it."""
        return self.root if self.is_local else self.location

    def exists(self) -> bool:
        """Whether anything was ever stored here."""
        return bool(self._files("sweeps", recursive=True) or self._files("rows") or self._files("dense"))

    def check_exists(self) -> None:
        """Raise StoreError where nothing was ever stored here. A store that was emptied still has its folders."""
        folders = [f"{self.root}/{name}" for name in ("rows", "sweeps", "aside")] if self.is_local else []
        emptied = any(map(os.path.isdir, folders))  # False too for a name that is too long
        if not (emptied or self.exists()):
            raise StoreError(f"no store at {self.location}: nothing was run there yet (--store or PRUNESWEEP_STORE)")

    def check_writable(self) -> None:
        """Raise StoreError unless a file can be written. Leaves no trace, not even a new folder."""
        if not self.is_local:
            probe = f"scratch/probe-{uuid.uuid4().hex}"
            self.commit(probe, b"")
            self.delete(probe)
            return
        folder = Path(self.root)
        try:
            while not folder.exists():
                folder = folder.parent
            if not folder.is_dir():
                raise StoreError(f"{folder} is a file: a store is a folder")
            file = folder / f".prunesweep-{uuid.uuid4().hex}"
            file.touch()
            file.unlink()
        except OSError as error:
            message = f"the store {self.location} is not writable: {error.strerror} ({folder})"
            raise StoreError(message) from error

    # -- files: names are relative to the store -----------------------------------------------------

    def _files(self, folder: str, *, recursive: bool = False) -> list[pafs.FileInfo]:
        selector = pafs.FileSelector(f"{self.root}/{folder}", recursive=recursive, allow_not_found=True)
        try:
            # pyarrow says "not found" of a folder that is made or removed while it looks.
            infos = again(lambda: self._asked(lambda: self.fs.get_file_info(selector)), FileNotFoundError)
        except OSError as error:
            raise self._error("list", folder, error) from error
        return [i for i in infos if i.type == pafs.FileType.File and not i.base_name.startswith(".")]

    def _asked(self, work: Callable[[], T], budget: Budget | None = None) -> T:
        """`work` on the file system; an object store is asked again, within the time limit of storage.remote."""
        return work() if self.is_local else patiently(work, budget)

    def _error(self, what: str, name: str, error: OSError) -> StoreError:
        """The StoreError of a file or folder that cannot be read, listed, ..."""
        reason = f"{one_line(error)}{settings(self.location)}"
        return StoreError(f"cannot {what} {printable(self.location)}/{printable(name)}: {reason}")

    def read(self, name: str) -> bytes:
        """A file's content. Raises FileNotFoundError, or StoreError where it cannot be read."""
        budget = Budget()

        def content() -> bytes:
            with self.fs.open_input_file(f"{self.root}/{name}") as file:
                budget.allow(file.size())
                return file.read()

        try:
            return self._asked(content, budget)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise self._error("read", name, error) from error

    def names(self, folder: str) -> list[str]:
        """The files in a folder, by their names in it."""
        return [i.base_name for i in self._files(folder)]

    def sizes(self, folder: str) -> dict[str, int]:
        """The files in a folder, by their names in it, with their sizes in bytes."""
        return {i.base_name: i.size or 0 for i in self._files(folder)}

    def by_age(self, folder: str) -> list[str]:
        """Return the files in a folder by their names in it, the one committed first before the others."""
        infos = sorted(self._files(folder), key=lambda info: (info.mtime_ns or 0, info.base_name))
        return [info.base_name for info in infos]

    def commit(self, name: str, content: bytes) -> None:
        """Make `content` durable; a file that is there already stays as it is. Raises StoreError."""
        with self._advice():
            commit(self._fs_for(content), f"{self.root}/{name}", content)

    def replace(self, name: str, content: bytes, *, durable: bool = True) -> None:
        """Write `content` in place of what is there: old or new, never a mixture. Raises StoreError."""
        with self._advice():
            replace(self._fs_for(content), f"{self.root}/{name}", content, durable=durable)

    @contextmanager
    def _advice(self) -> Iterator[None]:
        """Within this, a StoreError of a remote store also names the store and the settings to check."""
        try:
            yield
        except StoreError as error:
            if self.is_local:
                raise
            raise StoreError(f"the store {printable(self.location)}: {error}{settings(self.location)}") from error

    def _fs_for(self, content: bytes) -> pafs.FileSystem:
        """Small files are written in one request, large ones as uploads of parts from the start.

        A file system that begins as one and goes on as the other can leave a part under the name.
        """
        return self._for_small if len(content) < SMALL_BYTES else self.fs

    def delete(self, name: str) -> None:
        """Remove a file; it may be gone already. Raises StoreError."""
        try:
            self._asked(lambda: self.fs.delete_file(f"{self.root}/{name}"))
        except FileNotFoundError:
            return
        except OSError as error:
            raise self._error("remove", name, error) from error

    def move(self, name: str, target: str) -> None:
        """Move a file; another process may have done so already. Raises StoreError."""

        def move() -> None:
            if self.is_local:  # elsewhere there are no folders
                self.fs.create_dir(f"{self.root}/{target.rpartition('/')[0]}", recursive=True)
            self.fs.move(f"{self.root}/{name}", f"{self.root}/{target}")

        try:
            self._asked(move)
        except OSError as error:
            if not self._is_there(name):
                return
            raise self._error("move", name, error) from error

    def _is_there(self, name: str) -> bool:
        try:
            found = self._asked(lambda: self.fs.get_file_info(f"{self.root}/{name}"))
        except OSError:
            return True  # not known to be gone
        return found.type != pafs.FileType.NotFound

    # -- rows -------------------------------------------------------------------------------------

    def commit_rows(self, shard_id: str, rows: Iterable[Row]) -> str:
        """Make `rows` durable as one immutable file and return its name."""
        content = parquet(rows_to_table(rows))
        name = row_file_name(shard_id, content)
        self.commit(name, content)
        return name

    def row_file_names(self) -> list[str]:
        """The Parquet files in rows/, sorted by name."""
        return sorted(f"rows/{name}" for name in self.names("rows") if name.endswith(".parquet"))

    def row_files(self, columns: Sequence[str] | None = None) -> tuple[pa.Table, list[Problem]]:
        """Every valid row once, all columns or some, with the file it was committed in; and the files that have none.

        Raises StoreError where a file cannot be read: it may have rows; and where there is no store.
        """
        rows, problems = valid_rows(self, columns)
        if not (len(rows) or problems):
            self.check_exists()
        return rows, problems

    def statuses(self) -> dict[str, str]:
        """task id -> done or failed, for every task that has a row."""
        statuses: dict[str, str] = {}
        table, problems = self.row_files(("task_id", "status"))
        for problem in problems:
            warn_skipped(problem)
        for task_id, status in zip(*(table[c].to_pylist() for c in ("task_id", "status")), strict=True):
            if statuses.get(task_id) != "done":
                statuses[task_id] = status
        return statuses

    def compact(self) -> Compaction:
        """Merge the row files into few, and set aside what is none. Raises StoreError."""
        return compact(self)

    # -- sweeps -----------------------------------------------------------------------------------

    def write_manifest(self, name: str, spec: str, tasks: Iterable[Shard | PlannedTask]) -> Manifest:
        """Record an expansion: the spec as given and its tasks. The newest one is kept where it is the same.

        Raises QueryError for an expansion without a task, StoreError.
        """
        return self.commit_manifest(name, spec, plan_content(tasks))

    def commit_manifest(self, name: str, spec: str, content: bytes) -> Manifest:
        """Record an expansion whose tasks are the bytes of a Parquet file, `plan_content`."""
        digest = expansion_digest(spec.encode(), content)
        newest = self.manifest(name)
        if newest and newest.stem.endswith(f"-{digest}") and self._is_whole(newest):
            return newest
        try:
            manifest = Manifest(name, f"{next_time(newest, utc_now())}-{digest}")
        except OverflowError as error:
            raise StoreError(f"{self.location}/{newest.files[1] if newest else name}: no later time exists") from error
        if pq.read_metadata(pa.BufferReader(content)).num_rows == 0:
            raise QueryError(f"the sweep {name} has no task: nothing was recorded")
        spec_file, plan_file = manifest.files
        self.commit(spec_file, spec.encode())
        self.commit(plan_file, content)  # last: its being there is the promise
        return manifest

    def manifest(self, name: str) -> Manifest | None:
        """The newest expansion of a sweep: the sweep."""
        stems = self._stems(name, ".parquet")
        return Manifest(name, max(stems)) if stems else None

    def _stems(self, name: str, suffix: str) -> list[str]:
        """The expansions of a sweep that have the file with this suffix. Files with other names are not expansions."""
        if not SWEEP_NAME.fullmatch(name):
            return []
        stems = [file.removesuffix(suffix) for file in self.names(f"sweeps/{name}") if file.endswith(suffix)]
        return [stem for stem in stems if STEM.fullmatch(stem)]

    def expansions(self, name: str) -> list[Manifest]:
        """Return all expansions of a sweep, the oldest first."""
        return [Manifest(name, stem) for stem in sorted(self._stems(name, ".parquet"))]

    def newest(self, name: str) -> Manifest:
        """Return the newest expansion of a sweep, read once to verify it.

        Raises QueryError for a sweep that does not exist, DamagedError for one that is damaged.
        """
        manifest = self.current(name)
        if manifest is None:
            self.check_exists()
            raise QueryError(f"no sweep {name} in {self.location}; there are: {', '.join(self.sweeps()) or 'none'}")
        self.expansion(manifest)
        return manifest

    def current(self, name: str) -> Manifest | None:
        """The newest complete expansion of a sweep, with a warning where a newer one was begun; None without a sweep.

        Raises DamagedError where an expansion was begun and none is complete.
        """
        manifest = self.manifest(name)
        begun = max(self._stems(name, ".yaml"), default="")
        if begun <= (manifest.stem if manifest else ""):
            return manifest
        _, missing = Manifest(name, begun).files
        reason = "the file is missing: it was removed, or a run was killed before it was written"
        if manifest is None:
            raise DamagedError(missing, reason, _HEAL.format(sweep=name))
        warn_skipped(Problem(missing, f"{reason}; the expansion {manifest.stem} is used instead"))
        return manifest

    def sweeps(self) -> list[str]:
        """Names of the sweeps, sorted."""
        names = [i.path.rsplit("/", 2)[-2:] for i in self._files("sweeps", recursive=True)]
        stems = [(sweep, file.removesuffix(".parquet").removesuffix(".yaml")) for sweep, file in names]
        return sorted({sweep for sweep, stem in stems if SWEEP_NAME.fullmatch(sweep) and STEM.fullmatch(stem)})

    def remove_sweep(self, name: str) -> None:
        """Remove every expansion of a sweep, damaged ones too; rows stay."""
        # The oldest first, its tasks before its spec: cut off, the newest is the sweep still.
        for file in sorted(self.names(f"sweeps/{name}")):
            self.delete(f"sweeps/{name}/{file}")
        if self.is_local:
            with suppress(OSError):
                Path(self.root, "sweeps", name).rmdir()

    def spec_text(self, manifest: Manifest) -> str:
        """The spec of an expansion, as given (with its --set overrides applied)."""
        spec, _ = self.expansion(manifest)
        return spec.decode()

    def expansion(self, manifest: Manifest) -> tuple[bytes, bytes]:
        """Return the spec of an expansion and its tasks, as they were written. Raises DamagedError, StoreError."""
        found: list[bytes] = []
        for file in manifest.files:
            try:
                found.append(self.read(file))
            except FileNotFoundError:
                raise DamagedError(file, "the file is missing", _HEAL.format(sweep=manifest.sweep)) from None
        spec, plan = found
        if not manifest.stem.endswith(f"-{expansion_digest(spec, plan)}"):
            files = " and ".join(manifest.files)
            reason = "one of the two is damaged or was edited: they do not match the digest in their name"
            raise DamagedError(files, reason, _HEAL.format(sweep=manifest.sweep))
        return spec, plan

    def _is_whole(self, manifest: Manifest) -> bool:
        try:
            self.expansion(manifest)
        except DamagedError:
            return False
        return True

    def plan_table(self, manifest: Manifest, columns: Sequence[str] | None = None) -> pa.Table:
        """The tasks of an expansion, one line each, in order, of PLAN_SCHEMA; or some of its columns, and then
        those whose strings repeat as dictionaries."""
        _, plan = self.expansion(manifest)
        wanted, repeating = list(columns or PLAN_SCHEMA.names), list(REPEATING) if columns else []
        try:
            file = pq.ParquetFile(pa.BufferReader(plan), read_dictionary=repeating)
            table = file.read(wanted).select(wanted)
        except _READ_ERRORS as error:
            _, name = manifest.files
            raise DamagedError(
                name, f"it is not a table of tasks: {error}", _HEAL.format(sweep=manifest.sweep)
            ) from error
        if not len(table):
            raise DamagedError(manifest.files[1], "it has no task", _HEAL.format(sweep=manifest.sweep))
        return table

    def manifests(self) -> Iterator[Manifest]:
        """The newest expansion of every sweep. Raises DamagedError where a sweep has none that is complete."""
        for name in self.sweeps():
            manifest = self.current(name)
            if manifest:
                yield manifest

    # -- dense weights and kept networks ----------------------------------------------------------

    def dense(self, dense_id: str) -> DenseFile | None:
        """The dense weights under this id, or None. Of several, the one committed first.

        A file that is not what its name says does not count; `set_damaged_dense_aside` removes it.
        """
        for name, sha256, content in self._dense_contents(dense_id):
            if name == _dense_name(dense_id, sha256):
                return DenseFile(f"dense/{name}", sha256, content)
        return None

    def _dense_contents(self, dense_id: str) -> Iterator[tuple[str, str, bytes]]:
        """(file, SHA-256, content), the one committed first before the others."""
        infos = [i for i in self._files("dense") if i.base_name.startswith(f"{dense_id}-")]
        for info in sorted(infos, key=lambda i: (i.mtime_ns or 0, i.base_name)):
            try:
                content = self.read(f"dense/{info.base_name}")
            except FileNotFoundError:  # another process has set it aside
                continue
            yield info.base_name, hashlib.sha256(content).hexdigest(), content

    def set_damaged_dense_aside(self, dense_id: str) -> list[Problem]:
        """Move the weights under this id that are not what their name says into aside/."""
        why = "its content does not match the hash in its name"
        found = [name for name, sha, _ in self._dense_contents(dense_id) if name != _dense_name(dense_id, sha)]
        return [set_aside(self, Problem(f"dense/{name}", why)) for name in found]

    def commit_dense(self, dense_id: str, content: bytes) -> str:
        """Make dense weights durable and return their name: `<dense_id>-<sha256, 8 digits>`."""
        sha256 = hashlib.sha256(content).hexdigest()
        name = f"dense/{_dense_name(dense_id, sha256)}"
        self.commit(name, content)
        return name

    def dense_ids(self) -> set[str]:
        """Ids of the dense models whose weights are here."""
        return {i.base_name.split("-")[0] for i in self._files("dense")}

    def commit_network(self, task_id: str, content: bytes) -> str:
        """Make a retrained network durable and return its name."""
        sha256 = hashlib.sha256(content).hexdigest()
        name = f"networks/{task_id}-{sha256[:8]}.safetensors"
        self.commit(name, content)
        return name

    @cached_property
    def scratch(self) -> Scratch:
        """Notes, signs of life, checkpoints: what may vanish."""
        return Scratch(self)

    # -- SQL --------------------------------------------------------------------------------------

    def sql(self, query: str) -> duckdb.DuckDBPyRelation:
        """One SELECT over the store's views, as a DuckDB relation (`.df()`, `.filter(...)`, `.fetchall()`, ...).

        Its connection has the answer alone: no file, no network and no setting can be reached by SQL on it. To write
        the answer to a file, use `.df()` or `.arrow()`. Raises QueryError for anything but one SELECT (or EXPLAIN), and
        for an error in it; StoreError where there is no store.
        """
        from storage.sql import locked_relation, run_query

        self.check_exists()
        return locked_relation(run_query(self, query))


def _dense_name(dense_id: str, sha256: str) -> str:
    return f"{dense_id}-{sha256[:8]}.safetensors"


def _one_put(uri: str) -> str:
    """An s3:// URI whose small files are written in one request, not as uploads of parts."""
    if not uri.startswith("s3://"):
        return uri
    return f"{uri}{'&' if '?' in uri else '?'}allow_delayed_open=true"
