"""A real S3 server on loopback, within this process, for the tests of storage."""

from __future__ import annotations

import logging
import os
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

BUCKET = "tests"


@contextmanager
def s3_server() -> Iterator[str]:
    """The address of a server with the empty BUCKET, to which `s3://` leads as long as this lasts."""
    import boto3
    from moto.server import ThreadedMotoServer

    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)  # neither the person's account nor their endpoint
        for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
            patch.setenv(name, os.devnull)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        for name in ("NO_PROXY", "no_proxy"):
            patch.setenv(name, "127.0.0.1")
        patch.setattr(logging.getLogger("werkzeug"), "disabled", True)
        server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        server.start()
        try:
            address = "http://{}:{}".format(*server.get_host_and_port())
            patch.setenv("AWS_ENDPOINT_URL", address)
            boto3.client("s3").create_bucket(Bucket=BUCKET)
            yield address
            # Its objects are of this process: without this they stay.
            urllib.request.urlopen(urllib.request.Request(f"{address}/moto-api/reset", method="POST")).close()
        finally:
            server.stop()
