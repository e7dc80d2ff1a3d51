"""Where prunesweep starts, in a terminal and in a Ray worker.

The rooms have generic names, and Python looks in the working directory first: started beside a
folder called `models`, it would import that one. So the rooms are imported here, from beside this
file, before anything else can be.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

ROOMS = ("usercode", "storage", "pruners", "models", "workers", "orchestrator")


def claim_rooms() -> None:
    """Import our rooms (and usercode, which they share), whatever else is on the path.

    Raises ImportError when another package has taken one of their names already.
    """
    folder = Path(__file__).resolve().parent
    here = str(folder)
    sys.path.insert(0, here)
    try:
        for room in ROOMS:
            found = importlib.import_module(room).__file__
            if found is None or not Path(found).resolve().is_relative_to(folder):
                raise ImportError(f"prunesweep needs its own package {room}; {found} was imported before it")
    finally:
        sys.path.remove(here)


def main() -> None:
    """The command `prunesweep`."""
    try:
        claim_rooms()
        from orchestrator.cli import entry
    except ModuleNotFoundError as error:
        sys.stderr.write(f"prunesweep: {lacking(error)}\n")
        sys.exit(4)
    entry()


def lacking(error: ModuleNotFoundError) -> str:
    """What to do where this Python lacks what prunesweep is built on, as the one that a Ray job finds may."""
    return (
        f"{sys.executable} has no {error.name}, which prunesweep is built on. A job runs the `python` that its node "
        "finds first: start Ray there with the environment active, or use an image that has prunesweep"
    )


if __name__ == "__main__":
    main()
