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
    claim_rooms()
    from orchestrator.cli import entry

    entry()


if __name__ == "__main__":
    main()
