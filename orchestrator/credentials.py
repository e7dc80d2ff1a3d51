"""Secrets in environment variables: which variables are secrets, and how workers get those of the store.

Variables of a Ray runtime environment are in the command lines of workers, in logs that everybody on the machine can
read, and in what the job server answers. No secret may be one.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager

STORE_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN")
"""Variables that Tune would copy from the driver to its workers."""

_WORDS = frozenset({"TOKEN", "KEY", "KEYS", "PASS", "PWD", "AUTH", "PAT", "SAS", "DSN", "JWT", "COOKIE", "NETRC"})
_PARTS = ("SECRET", "PASSWORD", "PASSWD", "PASSPHRASE", "CREDENTIAL", "APIKEY", "ACCESSKEY", "PRIVATEKEY", "AUTHTOKEN")
_PLACES = ("_FILE", "_PATH", "_DIR", "_MODE")
_NAMES_A_FILE = frozenset({"GOOGLE_APPLICATION_CREDENTIALS", "PWD", "OLDPWD"})
_VALUE = re.compile(
    r"://[^/\s:@]*:[^/\s@]+@|-----BEGIN [A-Z ]*PRIVATE KEY|\b(AKIA|ASIA)[A-Z0-9]{16}\b"
    r"|\b(hf|ghp|gho|glpat|xox[abp])[_-]\w{16,}|AccountKey=|SharedAccessSignature=|[?&]sig="
)
_NAMESPACE = b"prunesweep-credentials"


def is_secret(name: str, value: str = "") -> bool:
    """Return whether a variable holds a secret, by its name or its value. One that names a file does not."""
    upper = name.upper()
    if _VALUE.search(value):
        return True
    if upper in _NAMES_A_FILE or upper.endswith(_PLACES):
        return False
    return bool(_WORDS & set(re.split(r"[_\W]+", upper))) or any(part in upper for part in _PARTS)


@contextmanager
def kept_from_tune() -> Iterator[None]:
    """Have Tune copy no secret into the runtime environments of its workers."""
    from ray.tune.execution import class_cache

    before = class_cache.ENV_VARS_TO_PROPAGATE
    class_cache.ENV_VARS_TO_PROPAGATE = {name for name in before if name not in STORE_KEYS and not is_secret(name)}
    try:
        yield
    finally:
        class_cache.ENV_VARS_TO_PROPAGATE = before


@contextmanager
def handed_out(environ: Mapping[str, str] = os.environ) -> Iterator[None]:
    """Give the processes of this Ray job the store's keys of this process, through the cluster's control store."""
    from ray.experimental import internal_kv as kv

    given = {name: environ[name] for name in STORE_KEYS if name in environ}
    if given:
        kv._internal_kv_put(_of_job(), json.dumps(given).encode(), namespace=_NAMESPACE)
    try:
        yield
    finally:
        if given:
            kv._internal_kv_del(_of_job(), namespace=_NAMESPACE)


def take_credentials(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set in a worker what its driver has handed out; what `ps` and /proc show of a process does not change."""
    from ray.experimental import internal_kv as kv

    found = kv._internal_kv_get(_of_job(), namespace=_NAMESPACE)
    if found:
        environ.update(json.loads(found))


def _of_job() -> bytes:
    import ray

    return f"job:{ray.get_runtime_context().get_job_id()}".encode()
