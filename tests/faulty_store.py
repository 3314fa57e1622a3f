"""A real S3-compatible server (moto's), and a proxy in front of it that does to replies what networks do."""

from __future__ import annotations

import hashlib
import http.client
import logging
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow.fs
from moto.server import ThreadedMotoServer

ERRORS = {500: "InternalError", 503: "SlowDown", 403: "AccessDenied"}


class Store:
    """A bucket `clips` on moto's server at `address`, filled past the proxy."""

    def __init__(self) -> None:
        logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
        self._moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._moto.start()
        self.address = "{}:{}".format(*self._moto.get_host_and_port())
        self.files = pyarrow.fs.S3FileSystem(
            access_key="k", secret_key="s", endpoint_override=self.address, scheme="http", allow_bucket_creation=True
        )
        self.files.create_dir("clips")

    def upload(self, folder: Path, under: str) -> None:
        pyarrow.fs.copy_files(str(folder), f"clips/{under}", destination_filesystem=self.files, use_threads=False)

    def write(self, key: str, content: bytes) -> None:
        with self.files.open_output_stream(f"clips/{key}") as f:
            f.write(content)

    def read(self, key: str) -> bytes:
        with self.files.open_input_stream(f"clips/{key}") as f:
            return f.read()

    def stop(self) -> None:
        self._moto.stop()


class Proxy(ThreadingHTTPServer):
    """Forwards to `store`. `shares`: fault -> share of the requests that suffer it.

    An int is an HTTP status. "late": no answer. "cut": the connection closes in the middle of the body. "short",
    "empty": a body of half its length or of none, announced as whole. "garbled": one bit of the body is flipped.
    "drip": a byte now and then. "lost": what was asked for is done, and no answer comes.

    `outage`, while it is not "", befalls every request: "silent", no answer while it lasts; "hang up", none ever.
    `bytes_s`: how fast bodies of uploads are taken; 0: at once.

    Every answer comes `delay_s` late. Whether a request suffers is drawn from `seed`, its method and path, and how many
    such came before: the order in which threads come does not matter. `requests` holds (method, path, range) of all,
    `faults` counts.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, store: Store, seed: int = 0, delay_s: float = 0.0, **shares: float):
        super().__init__(("127.0.0.1", 0), Handler)
        self.store, self.seed, self.delay_s = store, seed, delay_s
        self.shares: dict[str, float] = shares
        self.requests: list[tuple[str, str, str | None]] = []
        self.faults: Counter[str] = Counter()
        self.sent = 0  # bytes of bodies
        self.gone = threading.Event()
        self.outage = ""
        self.bytes_s = 0.0
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_port}"

    def uri(self, path: str) -> str:
        return f"s3://k:secret@clips/{path}?endpoint_override={self.address}&scheme=http"

    def fault_for(self, request: tuple[str, str, str | None]) -> str | None:
        with self.lock:
            before = sum(earlier[:2] == request[:2] for earlier in self.requests)
            self.requests.append(request)
            draw = hashlib.sha256(f"{self.seed} {request[:2]} {before}".encode()).digest()
            place = int.from_bytes(draw[:6], "big") / 2**48
            for fault, share in self.shares.items():
                if fault in ("short", "empty", "garbled", "cut", "drip") and (request[0] != "GET" or not request[2]):
                    continue  # these befall bodies of ranges
                if place < share:
                    self.faults[fault] += 1
                    return fault
                place -= share
            return None

    def go_away(self) -> None:
        """Take no more connections, and hang up on those that there are."""
        self.gone.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are what this server is for."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body leave together
    server: Proxy

    def log_message(self, *args: object) -> None:
        pass

    def forward(self) -> None:
        fault = self.server.fault_for((self.command, self.path, self.headers.get("Range")))
        with self.server.lock:
            self.server.at_once += 1
            self.server.most_at_once = max(self.server.at_once, self.server.most_at_once)
        try:
            time.sleep(self.server.delay_s)
            self.answer(fault)
        finally:
            with self.server.lock:
                self.server.at_once -= 1

    def answer(self, fault: str | None) -> None:
        if self.server.outage:
            while self.server.outage == "silent" and not self.server.gone.wait(0.1):
                pass
            self.close_connection = True
            return
        sent = self.body()
        if self.server.bytes_s:
            self.server.gone.wait(len(sent) / self.server.bytes_s)
        if fault == "late" or self.server.gone.is_set():
            self.server.gone.wait()
            self.close_connection = True
            return
        if fault and fault.lstrip("s").isdigit():
            self.refuse(int(fault.lstrip("s")))
            return
        upstream = http.client.HTTPConnection(self.server.store.address, timeout=20)
        kept = {key: value for key, value in self.headers.items() if key.lower() not in ("transfer-encoding", "expect")}
        upstream.request(self.command, self.path, body=sent, headers=kept | {"Content-Length": str(len(sent))})
        reply = upstream.getresponse()
        body = reply.read()
        upstream.close()
        if fault == "lost":
            self.close_connection = True
            return
        length = int(reply.headers.get("Content-Length", len(body)))
        if fault in ("short", "empty"):
            body = body[: len(body) // 2 if fault == "short" else 0]
            length = len(body)
        if fault == "garbled":
            body = body[:-9] + bytes([body[-9] ^ 4]) + body[-8:]
        self.send_response(reply.status)
        for key, value in reply.getheaders():
            if key.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                self.send_header(key, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "cut":
            body = body[: len(body) // 2]
            self.close_connection = True
        if fault == "drip":
            for byte in body:
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                if self.server.gone.wait(0.2):
                    self.close_connection = True
                    return
        self.wfile.write(body)
        self.wfile.flush()
        with self.server.lock:
            self.server.sent += len(body)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def handle_expect_100(self) -> bool:
        """The client waits for this before it sends a body."""
        go_on = super().handle_expect_100()
        self.wfile.flush()
        return go_on

    def refuse(self, status: int) -> None:
        body = f"<?xml version='1.0'?><Error><Code>{ERRORS[status]}</Code><Message>no</Message></Error>".encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = forward
