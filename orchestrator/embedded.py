"""Start of an embedded Ray: on loopback, ended with its driver, with a timeout that can be raised."""

from __future__ import annotations

import inspect
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from orchestrator.environment import environment
from orchestrator.errors import ClusterError, UserError, first_line
from orchestrator.guardian import end_processes, sessions_of
from orchestrator.progress import say

SETTING = "PRUNESWEEP_RAY_START_SECONDS"

START_SECONDS = 30.0
"""Ray's own timeout for the start of a node."""

LONGER = 4
"""The second attempt has so many times the timeout of the first."""

SOCKET_BYTES = 107
"""Linux takes no longer path of a socket."""

_SOCKET = "ray/session_2026-01-01_00-00-00_000000_{}/sockets/plasma_store"
_LATE = ("timed out", "timeout", "time out", "overloaded")
_PORTS = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port")


def start_embedded(arguments: Mapping[str, Any]) -> None:
    """Call ray.init for a cluster of one node on loopback. Where the node is late, try once more and wait longer.

    Raises ClusterError, UserError for a setting that is not a number.
    """
    check_folder(os.environ)
    seconds = start_seconds(os.environ)
    try:
        _start(arguments, seconds)
        return
    except Exception as error:  # where a node does not start in time, Ray raises nothing more special
        if not is_late(error):
            raise ClusterError(f"cannot start an embedded Ray: {first_line(error)}") from error
    longer = seconds * LONGER
    say(f"the embedded Ray did not start within {seconds:g} s; trying again with a timeout of {longer:g} s")
    end_processes(sessions_of(os.getpid()), {os.getpid()})
    try:
        _start(arguments, longer)
    except Exception as error:
        raise ClusterError(
            f"cannot start an embedded Ray within {longer:g} s: {first_line(error)} Is this machine overloaded? "
            f"Set {SETTING} above {longer:g} to wait longer, or use --inline, which runs without Ray"
        ) from error


def start_seconds(environ: Mapping[str, str]) -> float:
    """Return the timeout of the first attempt. Raises UserError."""
    given = environ.get(SETTING, "")
    try:
        seconds = float(given or START_SECONDS)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise UserError(f"{SETTING}={given} is not a number of seconds above 0")
    return seconds


def is_late(error: Exception) -> bool:
    """Return whether an error of ray.init says that a process did not start in time."""
    return isinstance(error, TimeoutError) or any(word in str(error).lower() for word in _LATE)


def check_folder(environ: Mapping[str, str]) -> None:
    """Raise ClusterError where Ray cannot keep its sockets in the folder that the environment names."""
    name = next((name for name in ("RAY_TMPDIR", "TMPDIR") if name in environ), None)
    folder = environ[name] if name else "/tmp"
    where = f"{name}={folder}" if name else folder
    longest = SOCKET_BYTES - len(f"/{_SOCKET.format(os.getpid())}")
    size = len(os.fsencode(folder.rstrip("/")))
    if size > longest:
        raise ClusterError(
            f"cannot start an embedded Ray: {where} has {size} bytes, and with it the paths of Ray's sockets would be "
            f"longer than the {SOCKET_BYTES} bytes that Linux allows. Set RAY_TMPDIR to a folder of at most {longest} "
            "bytes, such as /tmp"
        )
    there = next(one for one in (Path(folder, "ray"), Path(folder), *Path(folder).absolute().parents) if one.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise ClusterError(
            f"cannot start an embedded Ray: {where} is where Ray keeps its sockets and logs, and {there} cannot be "
            "written to. Set RAY_TMPDIR to a folder of yours"
        )


def _start(arguments: Mapping[str, Any], seconds: float) -> None:
    import ray

    # An agent whose control store is gone waits this long for it, by default a minute.
    settings = {"RAY_gcs_rpc_server_reconnect_timeout_s": "15"}
    if seconds != START_SECONDS:
        settings |= {"RAY_gcs_server_port_wait_time_s": str(int(seconds) + 1)}
        settings |= {"RAY_worker_register_timeout_seconds": str(int(max(60.0, seconds)))}
    settings = {name: value for name, value in settings.items() if name not in os.environ}
    with environment(settings), _on_loopback(), _waiting(seconds):
        ray.init(**arguments)


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Have the node take 127.0.0.1 as its address: then all servers of it listen there and nowhere else.

    Ray does so by itself on macOS, and replaces 127.0.0.1 as an argument.
    """
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def _waiting(seconds: float) -> Iterator[None]:
    """Have ray.init wait `seconds` for its node, where that is not what it does by itself.

    A raylet waits 15 s for the ports of its agents, which no setting changes: it is given the ports instead.
    """
    if seconds == START_SECONDS:
        yield
        return
    from ray._private import services

    start_raylet, get_node = services.start_raylet, services.get_node
    parameters = inspect.signature(start_raylet)
    give_up = time.monotonic() + seconds

    def start_with_ports(*args: Any, **kwargs: Any) -> Any:
        given = parameters.bind(*args, **kwargs)
        given.arguments |= dict(zip(_PORTS, _free_ports(len(_PORTS)), strict=True))
        _tell_ports(given.arguments)
        return start_raylet(*given.args, **given.kwargs)

    def get_node_in_time(*args: Any, **kwargs: Any) -> Any:
        while True:
            try:
                return get_node(*args, **kwargs)
            except RuntimeError:
                if time.monotonic() > give_up:
                    raise TimeoutError(f"the node has not registered within {seconds:g} s.") from None

    services.start_raylet, services.get_node = start_with_ports, get_node_in_time
    try:
        yield
    finally:
        services.start_raylet, services.get_node = start_raylet, get_node


def _tell_ports(of_raylet: Mapping[str, Any]) -> None:
    """Write the file for which a raylet waits although it was given the port."""
    from ray import _raylet as compiled

    _raylet: Any = compiled
    name = "dashboard_agent_listen_port"
    _raylet.persist_port(
        of_raylet["session_dir"], of_raylet["node_id"], _raylet.DASHBOARD_AGENT_LISTEN_PORT_NAME, of_raylet[name]
    )


def _free_ports(count: int) -> list[int]:
    found = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in found]
    for one in found:
        one.close()
    return ports
