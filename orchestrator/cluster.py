"""Reaching a Ray cluster: connect, or say in one message why not. Ray is imported only to connect."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.auth import Token, keep_private, refusal, token
from orchestrator.credentials import handed_out
from orchestrator.embedded import start_embedded
from orchestrator.environment import environment
from orchestrator.errors import ClusterError, UserError, first_line
from orchestrator.guardian import end_processes, guarded, sessions_of
from orchestrator.watch import ClusterLost, Watch, needed_processes, node_lives, reconnect_seconds, watched

if TYPE_CHECKING:
    from orchestrator.drivers import Driver
    from orchestrator.run import Options

CONNECT_SECONDS = 10.0

EMBEDDED_SECONDS = 40.0
"""Maximum silence of the control store of an embedded Ray, in seconds."""

_ASKED_FIRST = "/ray.rpc.NodeInfoGcsService/GetClusterId"

SHIPPED = "prunesweep_shipped"
"""The package as which `submit` sends prunesweep to a cluster."""

START = f"{SHIPPED}.rooms.prunesweep" if Path(__file__).resolve().parents[2].name == SHIPPED else "prunesweep"

SETUP_HOOK: str | Callable[[], None] = f"{START}.claim_rooms"
"""Run first in every worker process, so that a `models` in the working directory is not taken for ours."""


@contextlib.contextmanager
def connected(options: Options, driver: Driver | None = None, *, claiming: bool = True) -> Iterator[None]:
    """Connect to a Ray cluster as long as this lasts: the one at `options.address`, or one embedded for this run.

    Workers begin by claiming our rooms, which they need to have, unless told otherwise. Raises ClusterError with
    what to do, ClusterLost where the cluster dies meanwhile; then `driver` is asked to stop.
    """
    arguments: dict[str, Any] = {
        "address": options.address or "local",
        "log_to_driver": options.debug,
        "logging_level": logging.INFO if options.debug else logging.CRITICAL,
        "runtime_env": {"worker_process_setup_hook": SETUP_HOOK} if claiming else {},
    }
    # RAY_ADDRESS would win over the argument. Our setting of it was read before.
    usage = {"RAY_USAGE_STATS_ENABLED": os.environ.get("RAY_USAGE_STATS_ENABLED", "0")}  # nothing is sent unasked
    with contextlib.nullcontext() if options.address else guarded():
        lost = False
        try:
            with environment({"RAY_ADDRESS": None, **usage}):
                watch = _attach(arguments, options, driver)
            # Processes of an embedded Ray inherit them.
            with watched(watch), handed_out() if options.address else contextlib.nullcontext():
                yield
        except SystemExit as end:  # Ray's own handler of SIGTERM, which ray.init sets
            raise KeyboardInterrupt from end
        except ClusterLost:
            lost = True  # to part from it in order would take its answers
            raise
        finally:
            _part(lost, options)


def _attach(arguments: dict[str, Any], options: Options, driver: Driver | None) -> Watch:
    """Start or reach Ray; return the watch over it. Raises ClusterError."""
    import ray

    if not options.address:
        start_embedded({**arguments, "include_dashboard": False})
        keep_private()
        processes, patience = needed_processes(), EMBEDDED_SECONDS
    else:
        try:
            ray.init(**arguments)
        except Exception as error:
            raise ClusterError(f"cannot start on the Ray cluster at {options.address}: {first_line(error)}") from error
        processes, patience = {}, reconnect_seconds()
    where = f"the Ray cluster at {options.address}" if options.address else "the embedded Ray"
    return Watch(where, options.again, processes, node_lives(), driver, _end_embedded, patience)


def _part(lost: bool, options: Options) -> None:
    import ray

    if not lost:
        ray.shutdown()
    elif not options.address:
        _end_embedded()


def _end_embedded() -> None:
    """End the processes of an embedded Ray. Those of a cluster are not of this session."""
    end_processes(sessions_of(os.getpid()), {os.getpid()})


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
                    f"no Ray head answers at {address}: give the port that `ray start --head` names (6379 by "
                    f"default); a job server is given as http://{address}"
                ) from error
