"""Make a store of the rows that are published in this folder, so that `prunesweep run` computes only what is missing.

python docs/findings/resume.py lenet5-mini-panels --store results
prunesweep run docs/findings/lenet5-mini-panels.yaml --store results --data-root DATA
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pyarrow.parquet as pq

from storage.schema import conform, table_to_rows
from storage.store import Store

FOLDER = Path(__file__).parent


def main() -> None:
    """Commit the rows of a study to a store, without those that the store has."""
    asked = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    asked.add_argument("study", choices=sorted(file.stem for file in FOLDER.glob("*.parquet")))
    asked.add_argument("--store", default="results")
    given = asked.parse_args()
    store = Store(given.store)
    known = store.statuses() if store.exists() else {}
    published = table_to_rows(conform(pq.read_table(FOLDER / f"{given.study}.parquet")))
    rows = [row for row in published if known.get(row.task_id) != "done"]
    if rows:
        store.commit_rows("published", rows)
    print(f"{given.study}: {len(rows)} of {len(published)} rows added to {store.location}")


if __name__ == "__main__":
    main()
