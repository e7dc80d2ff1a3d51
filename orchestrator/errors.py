"""Errors that a person is told of in one message, each with its exit code."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in the command, the spec or the data (exit code 2)."""


class ClusterError(Exception):
    """Ray cannot be reached, or does not let us in (exit code 4)."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
