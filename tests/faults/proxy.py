"""A proxy on loopback before an S3 server, which fails as it is told."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

ALWAYS = math.inf
_CODES = {403: "AccessDenied", 500: "InternalError", 503: "SlowDown"}
_OF_THE_CONNECTION = {"connection", "content-length", "date", "expect", "server", "transfer-encoding"}


@dataclass
class Fault:
    """What happens to the next `times` requests of a verb: HEAD, GET, LIST, PUT, COPY, DELETE, ANY, or, of an
    upload in parts, POST and COMPLETE.

    They get `status`, or the connection is dropped where it is None; `served` ones have reached the server
    before.
    """

    verb: str
    times: float
    status: int | None
    served: bool = False


@dataclass
class Proxy:
    """Where it listens, what it will do wrong, and how many requests of each verb it had."""

    address: str
    faults: list[Fault] = field(default_factory=list)
    seen: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def fail(self, verb: str, times: float, status: int | None, *, served: bool = False) -> Fault:
        """From now on, `times` requests of a verb go wrong."""
        self.faults.append(fault := Fault(verb, times, status, served))
        return fault

    def heal(self) -> None:
        """From now on nothing goes wrong."""
        self.faults.clear()

    def next_fault(self, verb: str) -> Fault | None:
        """What to do wrong with a request that has just come."""
        with self.lock:
            self.seen[verb] += 1
            for fault in self.faults:
                if fault.verb in (verb, "ANY") and fault.times:
                    fault.times -= 1
                    return fault
        return None


@contextmanager
def proxy_before(server: str) -> Iterator[Proxy]:
    """A proxy before the server at this address, as long as this lasts."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            body = self.received()
            fault = proxy.next_fault(self.verb())
            status, headers, content = self.served(body) if fault is None or fault.served else (0, [], b"")
            if fault and fault.status is None:
                self.close_connection = True
                return
            if fault and fault.status:
                code = _CODES.get(fault.status)
                content = f"<Error><Code>{code}</Code><Message>as told</Message></Error>".encode() if code else b""
                status, headers = fault.status, [("Content-Type", "application/xml")]
            self.send_response_only(status)
            for name, value in headers:
                self.send_header(name, value)
            if self.command != "HEAD":
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def verb(self) -> str:
            if self.command == "GET" and "list-type=" in self.path:
                return "LIST"
            if self.command == "POST" and "uploadId=" in self.path:
                return "COMPLETE"
            return "COPY" if "x-amz-copy-source" in self.headers else self.command

        def received(self) -> bytes:
            if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            body = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass
            return body

        def served(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
            there = urlsplit(server)
            connection = HTTPConnection(there.hostname or "", there.port, timeout=30)
            try:
                sent = {k: v for k, v in self.headers.items() if k.lower() not in _OF_THE_CONNECTION}
                connection.request(self.command, self.path, body or None, sent)
                answer = connection.getresponse()
                of_no_use = _OF_THE_CONNECTION - ({"content-length"} if self.command == "HEAD" else set())
                headers = [(k, v) for k, v in answer.getheaders() if k.lower() not in of_no_use]
                return answer.status, headers, answer.read()
            finally:
                connection.close()

        def log_request(self, code: object = "-", size: object = "-") -> None:
            pass

    for verb in ("HEAD", "GET", "PUT", "POST", "DELETE"):
        setattr(Handler, f"do_{verb}", Handler.handle_any)

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    proxy = Proxy(f"http://127.0.0.1:{listening.server_address[1]}")
    thread = threading.Thread(target=listening.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        listening.shutdown()
        thread.join()
        listening.server_close()
