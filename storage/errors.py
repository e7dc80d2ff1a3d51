"""What storage tells a person. The command line shows the message and exits with the code."""


class StoreError(Exception):
    """The store cannot be read or written (exit code 5)."""


class QueryError(Exception):
    """The SQL, a column name or a sweep's name is wrong (exit code 2)."""
