"""What storage tells a person. The command line shows the message and exits with the code."""


class StoreError(Exception):
    """The store cannot be read or written (exit code 5)."""


class DamagedError(StoreError):
    """A file of the store is damaged, missing or edited. `file` is its name in the store, `reason` what is wrong."""

    def __init__(self, file: str, reason: str, advice: str = "") -> None:
        super().__init__(f"{file}: {reason}{advice}")
        self.file, self.reason = file, reason


class SkippedFile(UserWarning):
    """A file of the store was left out of an answer, because it is damaged or not one of prunesweep's."""


class QueryError(Exception):
    """The SQL, a column name or a sweep's name is wrong (exit code 2)."""
