"""A bucket on this machine: moto's S3 server, and a gate before it whose requests fail, break off or do something."""

from __future__ import annotations

import http.client
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import boto3
import pytest
from moto.server import ThreadedMotoServer

from mtdp_runtime.cohort import servers

SECRET = "S3CR3T"


@contextmanager
def a_bucket(name: str, gated: bool = False) -> Iterator[Gate]:
    """Serve a bucket, and set the environment for it; through the gate, or, for the tests' own requests, past it."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    gate = Gate(port)
    said = {"AWS_ACCESS_KEY_ID": "someone", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1"}
    with pytest.MonkeyPatch.context() as patch:
        for key, value in said.items():
            patch.setenv(key, value)
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{gate.port if gated else port}")
        gate.client = boto3.client("s3", endpoint_url=f"http://{host}:{port}")
        gate.client.create_bucket(Bucket=name)
        servers._system.cache_clear()  # of a bucket that another test had
        yield gate
    servers._system.cache_clear()
    gate.close()
    server.stop()


class Gate:
    """Passes requests on. `faults`: (method, part of the path, what to do) of the next such request.

    A number: answer that, with S3's code after it; cut: break off before the server has it; lost: after it; or a
    function to call before.
    """

    def __init__(self, moto: int) -> None:
        self.faults: list[tuple[str, str, str | Callable[[], object]]] = []
        self.seen: list[str] = []
        gate = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one(self) -> None:
                said = f"{self.command} {self.path}"
                gate.seen.append(said)
                what = gate.due(self.command, self.path)
                body = self.body()
                if what == "cut":
                    self.close_connection = True
                    return
                if isinstance(what, str) and what[:3].isdecimal():
                    status, _, code = what.partition(" ")
                    self.answer(int(status), {}, f"<Error><Code>{code}</Code></Error>".encode() if code else b"")
                    return
                if callable(what):
                    what()
                passed = http.client.HTTPConnection("127.0.0.1", moto)
                headers = {k: v for k, v in self.headers.items() if k.lower() not in ("expect", "transfer-encoding")}
                passed.request(self.command, self.path, body, headers)
                came = passed.getresponse()
                content = came.read()
                if what == "lost":
                    self.close_connection = True
                    return
                self.answer(came.status, dict(came.getheaders()), content)
                passed.close()

            def body(self) -> bytes:
                if self.headers.get("Expect") == "100-continue":
                    self.send_response_only(100)
                    self.end_headers()
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))

            def answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
                self.send_response_only(status)
                kept = {k: v for k, v in headers.items() if k.lower() not in ("transfer-encoding", "connection")}
                for key, value in ({"Content-Length": str(len(content))} | kept).items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_one

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None  # type: ignore[method-assign]  # who asked was killed
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def due(self, method: str, path: str) -> str | Callable[[], object]:
        for fault in self.faults:
            if fault[0] == method and re.search(fault[1], path):
                self.faults.remove(fault)
                return fault[2]
        return ""

    def objects(self, bucket: str, prefix: str = "") -> dict[str, bytes]:
        """Return what the bucket holds, by name."""
        listed = self.client.list_objects_v2(Bucket=bucket, Prefix=prefix).get("Contents", [])
        return {one["Key"]: self.client.get_object(Bucket=bucket, Key=one["Key"])["Body"].read() for one in listed}

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
