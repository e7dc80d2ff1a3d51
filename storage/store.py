"""The store: a folder or an object-store prefix with sweeps, dense weights and rows in it.

No server and no lock: files are written whole under names nobody else uses, and never changed.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs as pafs

from storage.commit import commit
from storage.errors import QueryError, StoreError
from storage.identity import SWEEP_NAME
from storage.manifest import PLAN_SCHEMA, Manifest, PlannedTask, plan_batches
from storage.records import Row, utc_now
from storage.schema import SCHEMA, conform, rows_to_table

if TYPE_CHECKING:
    import duckdb

ROW_FILES_SCHEMA = SCHEMA.append(pa.field("file", pa.string()))
_READ_ERRORS = (pa.ArrowException, ValueError, OSError, KeyError)


@dataclass(frozen=True)
class Problem:
    """A file that is not what its place promises, and why."""

    file: str
    reason: str


@dataclass(frozen=True)
class DenseFile:
    """Trained dense weights in the store: name relative to it, SHA-256 of the file, its bytes."""

    name: str
    sha256: str
    content: bytes


class Store:
    """A store at a local path or a `pyarrow.fs` URI (`s3://bucket/prefix`).

    `Store("results").sql("select ...").df()` is the way in from a notebook.
    """

    def __init__(self, location: str | os.PathLike[str]) -> None:
        self.location = os.fspath(location)
        if not self.location or self.location.endswith("://"):
            raise StoreError(f"{self.location!r} is no store location: give a folder, or a URI as s3://bucket/prefix")
        try:
            if "://" in self.location:
                self.fs, root = pafs.FileSystem.from_uri(self.location)
            else:
                self.fs, root = pafs.LocalFileSystem(), str(Path(self.location).expanduser().absolute())
        except (pa.ArrowException, ValueError, OSError) as error:
            raise StoreError(f"{self.location} is no store location: {error}") from error
        self.root = root.rstrip("/")

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
        return bool(self._files("sweeps", recursive=True) or self._files("rows"))

    def check_writable(self) -> None:
        """Raise StoreError unless a file can be written. Leaves no trace, not even a new folder."""
        if not self.is_local:
            path = f"{self.root}/scratch/probe-{uuid.uuid4().hex}"
            commit(self.fs, path, b"")
            self.fs.delete_file(path)
            return
        folder = Path(self.root)
        try:
            while not folder.exists():
                folder = folder.parent
            if not folder.is_dir():
                raise StoreError(f"{folder} is a file: a store is a folder")
            probe = folder / f".prunesweep-{uuid.uuid4().hex}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            message = f"the store {self.location} is not writable: {error.strerror} ({folder})"
            raise StoreError(message) from error

    def _files(self, folder: str, *, recursive: bool = False) -> list[pafs.FileInfo]:
        selector = pafs.FileSelector(f"{self.root}/{folder}", recursive=recursive, allow_not_found=True)
        try:
            infos = self.fs.get_file_info(selector)
        except OSError as error:
            raise StoreError(f"cannot list {self.location}/{folder}: {error}") from error
        return [i for i in infos if i.type == pafs.FileType.File and not i.base_name.startswith(".")]

    def _read(self, path: str) -> bytes:
        with self.fs.open_input_file(path) as file:
            return file.read()

    def _read_table(self, path: str) -> pa.Table:
        return pq.ParquetFile(io.BytesIO(self._read(path)), page_checksum_verification=True).read()

    # -- rows -------------------------------------------------------------------------------------

    def commit_rows(self, shard_id: str, rows: Iterable[Row]) -> str:
        """Make `rows` durable as one immutable file and return its name."""
        buffer = io.BytesIO()
        pq.write_table(rows_to_table(rows), buffer, compression="zstd", write_page_checksum=True)
        name = f"rows/{shard_id}-{uuid.uuid4().hex}.parquet"
        commit(self.fs, f"{self.root}/{name}", buffer.getvalue())
        return name

    def row_files(self) -> tuple[pa.Table, list[Problem]]:
        """Every valid row with its file, in the pinned schema, and the files that have none."""
        paths = sorted(i.path for i in self._files("rows") if i.path.endswith(".parquet"))
        with ThreadPoolExecutor(8) as pool:
            read = list(pool.map(self._row_file, paths))
        tables = [table for table in read if not isinstance(table, Problem)]
        problems = [problem for problem in read if isinstance(problem, Problem)]
        return pa.concat_tables([ROW_FILES_SCHEMA.empty_table(), *tables]), problems

    def _row_file(self, path: str) -> pa.Table | Problem:
        name = path.removeprefix(f"{self.root}/")
        try:
            table = conform(self._read_table(path))
        except _READ_ERRORS as error:
            return Problem(name, str(error).splitlines()[0] if str(error) else type(error).__name__)
        return table.append_column("file", pa.array([name] * len(table), pa.string()))

    def statuses(self) -> dict[str, str]:
        """task id -> done or failed, for every task that has a row."""
        statuses: dict[str, str] = {}
        table, _ = self.row_files()
        for task_id, status in zip(*(table[c].to_pylist() for c in ("task_id", "status")), strict=True):
            if statuses.get(task_id) != "done":
                statuses[task_id] = status
        return statuses

    def shard_attempts(self, shard_id: str) -> dict[str, list[str]]:
        """task id -> the statuses of its rows in the shard's own files: what a worker looks at."""
        attempts: dict[str, list[str]] = {}
        for info in self._files("rows"):
            if info.base_name.startswith(f"{shard_id}-") and info.path.endswith(".parquet"):
                table = self._row_file(info.path)
                if not isinstance(table, Problem):
                    pairs = zip(table["task_id"].to_pylist(), table["status"].to_pylist(), strict=True)
                    for task_id, status in pairs:
                        attempts.setdefault(task_id, []).append(status)
        return attempts

    # -- sweeps -----------------------------------------------------------------------------------

    def write_manifest(self, name: str, spec: str, tasks: Iterable[PlannedTask]) -> Manifest:
        """Record an expansion: the spec as given and its tasks. The same one again is kept as it is."""
        buffer = io.BytesIO()
        with pq.ParquetWriter(buffer, PLAN_SCHEMA, compression="zstd") as writer:
            for batch in plan_batches(tasks):
                writer.write_batch(batch)
        content = buffer.getvalue()
        found = hashlib.sha256(spec.encode() + content).hexdigest()[:8]
        newest = self.manifest(name)
        if newest and newest.stem.endswith(f"-{found}"):
            return newest
        stem = f"{utc_now():%Y%m%dT%H%M%S%f}Z-{found}"
        folder = f"{self.root}/sweeps/{name}"
        commit(self.fs, f"{folder}/{stem}.yaml", spec.encode())
        commit(self.fs, f"{folder}/{stem}.parquet", content)  # last: its being there is the promise
        return Manifest(name, stem)

    def manifest(self, name: str) -> Manifest | None:
        """The newest expansion of a sweep: the sweep."""
        if not SWEEP_NAME.fullmatch(name):
            return None
        stems = [
            info.base_name.removesuffix(".parquet")
            for info in self._files(f"sweeps/{name}")
            if info.base_name.endswith(".parquet")
        ]
        return Manifest(name, max(stems)) if stems else None

    def newest(self, name: str) -> Manifest:
        """The same, for a sweep that must be there. Raises QueryError, naming those there are."""
        manifest = self.manifest(name)
        if manifest is None:
            raise QueryError(f"no sweep {name} in {self.location}; there are: {', '.join(self.sweeps()) or 'none'}")
        return manifest

    def sweeps(self) -> list[str]:
        """Names of the sweeps, sorted."""
        paths = [i.path for i in self._files("sweeps", recursive=True) if i.path.endswith(".parquet")]
        return sorted({path.rsplit("/", 2)[-2] for path in paths})

    def spec_text(self, manifest: Manifest) -> str:
        """The spec of an expansion, as given (with its --set overrides applied)."""
        return self._read(f"{self.root}/sweeps/{manifest.sweep}/{manifest.stem}.yaml").decode()

    def plan_table(self, manifest: Manifest) -> pa.Table:
        """The tasks of an expansion, one line each, in order, of PLAN_SCHEMA."""
        path = f"{self.root}/sweeps/{manifest.sweep}/{manifest.stem}.parquet"
        try:
            return self._read_table(path).select(PLAN_SCHEMA.names)
        except _READ_ERRORS as error:
            raise StoreError(f"cannot read {path}: {error}") from error

    def manifests(self) -> Iterator[Manifest]:
        """The newest expansion of every sweep."""
        for name in self.sweeps():
            manifest = self.manifest(name)
            if manifest:
                yield manifest

    # -- dense weights and kept networks ----------------------------------------------------------

    def dense(self, dense_id: str) -> DenseFile | None:
        """The dense weights under this id, or None. Of several, the one committed first.

        Raises StoreError when a file is not what its name says.
        """
        infos = [i for i in self._files("dense") if i.base_name.startswith(f"{dense_id}-")]
        if not infos:
            return None
        first = min(infos, key=lambda i: (i.mtime_ns or 0, i.base_name))
        content = self._read(first.path)
        sha256 = hashlib.sha256(content).hexdigest()
        if not first.base_name.startswith(f"{dense_id}-{sha256[:8]}."):
            reason = "its content does not match the hash in its name"
            raise StoreError(f"dense weights {first.path} are damaged: {reason}; delete the file")
        return DenseFile(f"dense/{first.base_name}", sha256, content)

    def commit_dense(self, dense_id: str, content: bytes) -> str:
        """Make dense weights durable and return their name: `<dense_id>-<sha256, 8 digits>`."""
        sha256 = hashlib.sha256(content).hexdigest()
        name = f"dense/{dense_id}-{sha256[:8]}.safetensors"
        commit(self.fs, f"{self.root}/{name}", content)
        return name

    def dense_ids(self) -> set[str]:
        """Ids of the dense models whose weights are here."""
        return {i.base_name.split("-")[0] for i in self._files("dense")}

    def commit_network(self, task_id: str, content: bytes) -> str:
        """Make a retrained network durable and return its name."""
        sha256 = hashlib.sha256(content).hexdigest()
        name = f"networks/{task_id}-{sha256[:8]}.safetensors"
        commit(self.fs, f"{self.root}/{name}", content)
        return name

    # -- scratch: may vanish at any time ----------------------------------------------------------

    def scratch(self, name: str) -> dict[str, Any] | None:
        """What was noted under `name`, or None."""
        try:
            return json.loads(self._read(f"{self.root}/scratch/{name}.json"))
        except (FileNotFoundError, ValueError):
            return None

    def note(self, name: str, value: Mapping[str, Any]) -> dict[str, Any]:
        """Note `value` under `name` unless something is there, and return what is there."""
        commit(self.fs, f"{self.root}/scratch/{name}.json", json.dumps(dict(value)).encode())
        return self.scratch(name) or dict(value)

    def forget(self, name: str) -> None:
        """Remove a note; it may be gone already."""
        try:
            self.fs.delete_file(f"{self.root}/scratch/{name}.json")
        except FileNotFoundError:
            return

    def notes(self, folder: str) -> dict[str, dict[str, Any]]:
        """All notes under a folder of scratch, by name."""
        names = [f"{folder}/{i.base_name.removesuffix('.json')}" for i in self._files(f"scratch/{folder}")]
        return {name: value for name in names if (value := self.scratch(name)) is not None}

    # -- SQL --------------------------------------------------------------------------------------

    def sql(self, query: str) -> duckdb.DuckDBPyRelation:
        """One SELECT over the store's views, as a DuckDB relation (`.df()`, `.fetchall()`, ...).

        Raises QueryError for anything but one SELECT (or EXPLAIN), and for an error in it.
        """
        import duckdb

        from storage.sql import run_query

        return duckdb.connect().from_arrow(run_query(self, query))
