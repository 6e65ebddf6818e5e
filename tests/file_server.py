"""An HTTP server on loopback that serves a folder, knows byte ranges, counts requests and fails as it is told."""

import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit


class Answer(NamedTuple):
    """How one request is answered: cut after `cut` bytes, then held open if `stall`; `flip` makes the bytes wrong."""

    status: int = 200
    cut: int | None = None
    stall: bool = False
    flip: bool = False
    ranges: bool = True
    seconds: float = 0.0


class Request(NamedTuple):
    name: str
    offset: int | None  # of its Range header
    status: int


class FileServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.requests: list[Request] = []
        self.next_answers: dict[str, list[Answer]] = {}
        self.answer = Answer()
        self.released = threading.Event()
        self.lock = threading.Lock()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that was killed is no news."""

    def count(self) -> Counter[str]:
        return Counter(request.name for request in self.requests)

    def of(self, name: str) -> list[Request]:
        return [request for request in self.requests if request.name == name]


class Handler(BaseHTTPRequestHandler):
    server: FileServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        name = unquote(urlsplit(self.path).path).lstrip("/")
        with self.server.lock:
            waiting = self.server.next_answers.get(name)
            answer = waiting.pop(0) if waiting else self.server.answer
        path = self.server.folder / name
        data = path.read_bytes() if path.is_file() else b""
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        offset = int(wanted[1]) if wanted else None
        start = offset if offset is not None and answer.ranges else 0
        status = answer.status
        if status == 200 and not path.is_file():
            status = 404
        elif status == 200 and start:
            status = 206 if start < len(data) else 416
        with self.server.lock:
            self.server.requests.append(Request(name, offset, status))
        body = data[start:] if status in (200, 206) else b""
        self.server.released.wait(answer.seconds)
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if answer.flip:
            body = bytes(byte ^ 1 for byte in body)
        self.wfile.write(body[: answer.cut])
        self.wfile.flush()
        if answer.stall:
            self.server.released.wait(60)
        if answer.cut is not None:
            self.close_connection = True


@contextmanager
def serve(folder: Path) -> Iterator[FileServer]:
    with FileServer(folder) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            server.released.set()
            server.shutdown()
            thread.join()
