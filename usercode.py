"""A person's own code in a spec, as `package.module:attribute`: found, hashed and loaded here and nowhere else.

It is found where Python finds it from the folder that prunesweep was started in: there, or installed.
"""

from __future__ import annotations

import hashlib
import importlib
import re
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from storage.userfiles import open_regular

_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_START = "start prunesweep in the folder that holds it (a job: give --working-dir to submit and resume)"
_FOLDERS = ("imagefolder", "llava")


def is_code(name: str) -> bool:
    """Whether `name` is `package.module:attribute`, and not a folder of data (`imagefolder:PATH`)."""
    return bool(_NAME.fullmatch(name)) and name.partition(":")[0] not in _FOLDERS


def load(name: str) -> Any:
    """What `name` names, imported. Raises ValueError saying what is not there and what to do."""
    module, _, attribute = name.partition(":")
    _find(name)
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(f"{name}: {error}; install it, or {_START}") from error
    except Exception as error:  # whatever the user's module does as it is imported
        raise ValueError(f"{name}: importing {module} failed: {type(error).__name__}: {error}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            there = ", ".join(n for n, value in vars(found).items() if callable(value) and not n.startswith("_"))
            raise ValueError(f"{name}: {module} has no {attribute}; it has {there or 'nothing that can be called'}")
        found = getattr(found, part)
    return found


def fingerprint(name: str) -> str:
    """16 hex digits over every .py file of the top-level package of `name`, or over its one module.

    Nothing is imported. Raises ValueError where there is no such package, or a file of it is not a regular one.
    """
    said = hashlib.sha256()
    for inside, path in _files(_find(name)):
        content = _content(name, path)
        said.update(f"{inside}\0{len(content)}\0".encode() + content)
    return said.hexdigest()[:16]


def _content(name: str, path: Path) -> bytes:
    try:
        with open_regular(path) as file:
            return file.read()
    except OSError as error:
        raise ValueError(f"{name}: its code cannot be read: {error}; replace or remove the file") from error


def _find(name: str) -> ModuleSpec:
    top = name.partition(":")[0].partition(".")[0]
    found = PathFinder.find_spec(top, [*sys.path, str(Path.cwd())])
    if found is None:
        where = f"{Path.cwd()}/{top}.py, {Path.cwd()}/{top}/"
        raise ValueError(
            f"{name}: there is no Python module {top} (looked for {where}, and among what is installed); install "
            f"it, or {_START}"
        )
    return found


def _files(found: ModuleSpec) -> Iterator[tuple[str, Path]]:
    """(path inside the package, file), in a fixed order."""
    if found.submodule_search_locations is None:
        assert found.origin is not None
        yield Path(found.origin).name, Path(found.origin)
        return
    # A package without __init__.py is found once for every time that its parent is on the path.
    for folder in dict.fromkeys(Path(place).resolve() for place in found.submodule_search_locations):
        for path in sorted(folder.rglob("*.py")):
            yield path.relative_to(folder).as_posix(), path
