"""Records, the Parquet store, SQL over it, statistics and figures. Imports no other room.

In a notebook: `from storage import Store; Store("results").sql("select ...").df()`.
"""

from typing import TYPE_CHECKING, Any

from storage.errors import QueryError, StoreError

if TYPE_CHECKING:
    from storage.store import Store

__all__ = ["QueryError", "Store", "StoreError"]


def __getattr__(name: str) -> Any:
    """`Store`, imported when it is asked for: pyarrow takes a while, and `--help` needs none."""
    if name == "Store":
        from storage.store import Store

        return Store
    raise AttributeError(f"module 'storage' has no attribute {name!r}")
