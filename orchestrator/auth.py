"""Ray's token authentication: which token this process would show, and what to say where it is not taken.

Ray's rules (https://docs.ray.io/en/latest/ray-security/token-auth.html): with RAY_AUTH_MODE=token, and only then, the
token is RAY_AUTH_TOKEN, else the content of the file RAY_AUTH_TOKEN_PATH, else that of ~/.ray/auth_token. Without a
mode Ray >= 2.59 makes one for a cluster that it starts itself.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from storage.userfiles import read_regular

MAX_TOKEN_BYTES = 2**16

HOW = (
    "set RAY_AUTH_MODE=token, and the cluster's token in RAY_AUTH_TOKEN, in a file that RAY_AUTH_TOKEN_PATH names, or "
    "in ~/.ray/auth_token"
)


@dataclass(frozen=True)
class Token:
    """A token, where it is from, or why there is none."""

    value: str | None
    source: str


def token(environ: Mapping[str, str] = os.environ) -> Token:
    """The token that Ray would show from here."""
    mode = environ.get("RAY_AUTH_MODE", "")
    if mode.lower() != "token":
        return Token(None, f"RAY_AUTH_MODE is {mode or 'not set'} here")
    if value := environ.get("RAY_AUTH_TOKEN", "").strip():
        return Token(value, "RAY_AUTH_TOKEN")
    named = environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else _of_home(environ)
    source = f"RAY_AUTH_TOKEN_PATH={named}" if named else str(path)
    try:
        value = read_regular(path, MAX_TOKEN_BYTES).decode().strip()
    except (OSError, UnicodeDecodeError):
        value = ""
    if value:
        return Token(value, source)
    return Token(None, f"{source} cannot be read or is empty" if named else f"there is no {source}")


def _of_home(environ: Mapping[str, str]) -> Path:
    return Path(environ.get("HOME", "~")).expanduser() / ".ray" / "auth_token"


def keep_private() -> None:
    """Let nobody else read the token that Ray has just made: it would let them run code as us."""
    path = _of_home(os.environ)
    with suppress(OSError):
        if path.stat().st_mode & 0o077:
            path.chmod(0o600)


def refusal(who: str, shown: Token | None = None) -> str:
    """What to say where `who` did not let us in."""
    shown = shown or token()
    if shown.value is None:
        return f"{who} wants a token, and none was shown ({shown.source}): {HOW}"
    return f"{who} does not take the token of {shown.source}: {HOW}"
