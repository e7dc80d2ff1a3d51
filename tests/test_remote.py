"""Remote stores: each ends within its time limit as a StoreError that names it and the settings to check."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.errors import StoreError
from storage.remote import KINDS, SETTINGS, TIMEOUT, Budget, Unanswered, kind_of, one_line, within
from storage.store import Store, check_location


@pytest.fixture
def mute() -> Iterator[str]:
    """The address of a server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def _location(scheme: str, mute: str) -> str:
    return {
        "s3": f"s3://b/p?region=us-east-1&scheme=http&endpoint_override={mute}",
        "gs": f"gs://anonymous@b/p?scheme=http&endpoint_override={mute}",
        "hf": "hf://datasets/a/b/c",
    }[scheme]


@pytest.mark.parametrize("scheme", ["s3", "gs", "hf"])
def test_a_store_that_does_not_answer_ends_the_command(scheme: str, mute: str) -> None:
    """Exit code 5 in time, though a thread of the library still waits; the message has the store and its settings."""
    clean = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    environment = {
        **clean,
        TIMEOUT: "2",
        "HF_ENDPOINT": f"http://{mute}",
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
    }
    location, began = _location(scheme, mute), time.monotonic()
    command = [sys.executable, "-m", "prunesweep", "ls", "--store", location]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert time.monotonic() - began < 40
    assert found.returncode == 5, found.stderr
    assert location in found.stderr and SETTINGS[scheme] in found.stderr and "Traceback" not in found.stderr


@pytest.mark.parametrize("scheme", ["http", "https", "ftp", "mock", "memory", "nosuch", "S3", "az"])
def test_an_unknown_scheme_is_refused_with_those_that_are_known(scheme: str) -> None:
    """Before anything is opened."""
    with pytest.raises(StoreError) as caught:
        Store(f"{scheme}://bucket/prefix")
    assert all(f"{known}://" in str(caught.value) for known in ("file", *KINDS))


@pytest.mark.parametrize(
    "location",
    [
        "s3://key:secret@b/p",
        "s3://key:se/secret@b/p",
        "s3://key@b/p",
        "nosuch://u:secret@h/p",
        "abfs://c%3Asecret@a/p",
        "gs://me@b/p",
    ],
)
def test_credentials_in_a_uri_are_refused_and_not_shown(location: str) -> None:
    """They would be shown wherever the store is named."""
    with pytest.raises(StoreError, match="no credentials") as caught:
        Store(location)
    assert "secret" not in str(caught.value)


def test_an_at_that_names_no_secret_is_allowed() -> None:
    """Azure needs its container, Google's public buckets a name for nobody."""
    for location in ("abfs://container@account.dfs.core.windows.net/p", "gs://anonymous@b/p", "hdfs://me@h:9000/p"):
        check_location(location)
        assert kind_of(location)


def test_work_within_its_time() -> None:
    """The answer comes back, errors of any library are OSErrors, and what is over its time is given up."""
    assert within(Budget(), lambda: 7) == 7
    with pytest.raises(FileNotFoundError):
        within(Budget(), Path("/nonexistent").stat)
    with pytest.raises(OSError, match=r"ZeroDivisionError: .*zero"):
        within(Budget(), lambda: 1 // 0)
    began = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(TIMEOUT, "0.2")
        with pytest.raises(Unanswered, match=rf"within 0\.2 s \({TIMEOUT}\)"):
            within(Budget(), lambda: time.sleep(5))
    assert time.monotonic() - began < 3


def test_data_has_more_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large file may take longer than a look."""
    monkeypatch.setenv(TIMEOUT, "1")
    budget = Budget(2**20)
    assert 8 < budget.left() <= 9
    budget.allow(2**20)
    assert budget.left() > 16


@pytest.mark.parametrize("given", ["soon", "0", "-1", "nan", "inf", "1e300"])
def test_a_time_limit_that_is_none_is_refused(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a StoreError that names the variable."""
    monkeypatch.setenv(TIMEOUT, given)
    with pytest.raises(StoreError, match=TIMEOUT):
        Store("s3://b/p")


def test_a_message_of_a_library_is_one_line() -> None:
    """Whatever it has in it."""
    assert one_line(OSError("a\n\x1b[31mb " + "x" * 400)) == r"a \x1b[31mb " + "x" * 291 + " ..."
