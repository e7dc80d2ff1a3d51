"""Reaching a Ray cluster: connect, or say in one message why not. Ray is imported only to connect."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.auth import Token, keep_private, refusal, token
from orchestrator.errors import ClusterError, UserError

if TYPE_CHECKING:
    from orchestrator.run import Options

CONNECT_SECONDS = 10.0

_ASKED_FIRST = "/ray.rpc.NodeInfoGcsService/GetClusterId"

SHIPPED = "prunesweep_shipped"
"""The package as which `submit` sends prunesweep to a cluster."""

START = f"{SHIPPED}.rooms.prunesweep" if Path(__file__).resolve().parents[2].name == SHIPPED else "prunesweep"

SETUP_HOOK: str | Callable[[], None] = f"{START}.claim_rooms"
"""Run first in every worker process, so that a `models` in the working directory is not taken for ours."""


@contextlib.contextmanager
def connected(options: Options, *, claiming: bool = True) -> Iterator[None]:
    """Connected to a Ray cluster: the one at `options.address`, or one embedded for this run.

    Workers begin by claiming our rooms, which they need to have, unless told otherwise. Raises ClusterError with
    what to do.
    """
    arguments: dict[str, Any] = {
        "address": options.address or "local",
        "log_to_driver": options.debug,
        "logging_level": logging.INFO if options.debug else logging.CRITICAL,
        "runtime_env": {"worker_process_setup_hook": SETUP_HOOK} if claiming else {},
    }
    if not options.address:
        arguments |= {"include_dashboard": False}
    import ray

    # RAY_ADDRESS would win over the argument. Our setting of it was read before.
    usage = {"RAY_USAGE_STATS_ENABLED": os.environ.get("RAY_USAGE_STATS_ENABLED", "0")}  # nothing is sent unasked
    try:
        with environment({"RAY_ADDRESS": None, **usage}):
            try:
                ray.init(**arguments)
                if not options.address:
                    keep_private()
            except Exception as error:  # where a node does not start in time, Ray raises nothing more special
                where = f"the Ray cluster at {options.address}" if options.address else "an embedded Ray"
                raise ClusterError(f"cannot start on {where}: {first_line(error)}") from error
        yield
    except SystemExit as end:  # Ray's own handler of SIGTERM, which ray.init sets
        raise KeyboardInterrupt from end
    finally:
        ray.shutdown()


def is_job_server(address: str) -> bool:
    """Whether an address is a job server's, by its form; the others are where a driver connects."""
    return address.startswith(("http://", "https://"))


def check_job_server(address: str) -> None:
    """Raise UserError where an address is of another form."""
    if not is_job_server(address):
        raise UserError(f"{address} is no job server: give --address http://HOST:8265")


def check_reachable(address: str | None) -> None:
    """Raise UserError for an address of another form; ClusterError where no Ray head is there, or it does not take our
    token. Ray itself would try for long, and not say why."""
    if not address:
        return
    if is_job_server(address):
        raise UserError(
            f"{address} is a job server: `prunesweep submit` and `resume` send a sweep there; `run` takes "
            "HOST:PORT of a running cluster, or auto"
        )
    if address == "auto":
        if found := _of_this_machine():
            _check_head(found, token({"RAY_AUTH_MODE": "token", **os.environ}))  # Ray shows one where it finds one
        return
    host, _, port = address.rpartition(":")
    if not (host and port.isdigit()) or "://" in host:
        raise UserError(
            f"--address {address}: give HOST:PORT of a Ray head, or auto for the one of this machine (a job server, "
            "http://HOST:8265, is for submit, resume, status, logs and stop)"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ClusterError(f"no Ray cluster answers at {address}: {getattr(error, 'strerror', error)}") from error
    _check_head(address, token())


def _of_this_machine() -> str | None:
    """HOST:PORT that Ray takes `auto` for; None where there is none, or Ray finds it in another way."""
    try:
        from ray._private.services import canonicalize_bootstrap_address

        with environment({"RAY_ADDRESS": None}):
            return canonicalize_bootstrap_address("auto")
    except Exception:  # it is private, and raises many kinds
        return None


def _check_head(address: str, shown: Token) -> None:
    """Raise ClusterError where no Ray head answers, or it does not take a token. It is asked for its id, as Ray does
    first."""
    if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
        return  # the channel would need Ray's certificates
    import grpc

    metadata = (("authorization", f"Bearer {shown.value}"),) if shown.value else ()
    with grpc.insecure_channel(address, [("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary(_ASKED_FIRST)(b"", timeout=CONNECT_SECONDS, metadata=metadata)
        except grpc.RpcError as error:
            code = error.code() if isinstance(error, grpc.Call) else None
            if code is grpc.StatusCode.UNAUTHENTICATED:
                raise ClusterError(refusal(f"the Ray cluster at {address}", shown)) from error
            if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                raise ClusterError(
                    f"no Ray head answers at {address}: give the port that `ray start --head` names (6379, unless it "
                    f"was told another); a job server is given as http://{address}"
                ) from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextlib.contextmanager
def environment(values: Mapping[str, str | None]) -> Iterator[None]:
    """Environment variables set, or with None unset, and put back."""
    before = {name: os.environ.get(name) for name in values}
    _set(values)
    try:
        yield
    finally:
        _set(before)


def _set(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
