"""A small model hub on this machine: it serves repositories by commit and records the requests."""

from __future__ import annotations

import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

RESOLVE = re.compile(r"/(?P<repository>.+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")


@dataclass
class Hub:
    """Files by commit and commits by branch; `sent` lists the file and number of bytes of each response, in order.

    Each response to a range request is followed by `surplus_megabytes` more; `flooded_megabytes` counts those that were
    sent.
    """

    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    sent: list[tuple[str, int, int]] = field(default_factory=list)
    ranges: bool = True
    surplus_megabytes: int = 0
    flooded_megabytes: int = 0
    endpoint: str = ""

    def sent_of(self, file):
        """Return the ranges of a file that were sent, as `(start, end)`."""
        return [(start, end) for name, start, end in self.sent if name == file]


@contextmanager
def serving(hub):
    """Serve a hub while the context lasts."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self, *, with_body):
            found = RESOLVE.fullmatch(self.path)
            commit = hub.branches.get(found["revision"], found["revision"]) if found else None
            content = hub.files.get(commit, {}).get(found["file"]) if found else None
            if content is None:
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound" if commit in hub.files else "RevisionNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            start, end, surplus = 0, len(content), 0
            wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if wanted and hub.ranges:
                start, end = int(wanted[1]), min(int(wanted[2]) + 1, len(content))
                surplus = hub.surplus_megabytes
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
            else:
                self.send_response(200)
            self.send_header("ETag", f'"{commit}-{found["file"]}"')
            self.send_header("X-Repo-Commit", commit)
            self.send_header("Content-Length", str(end - start + surplus * 2**20))
            self.end_headers()
            if with_body:
                hub.sent.append((found["file"], start, end))
                try:
                    self.wfile.write(content[start:end])
                    for _ in range(surplus):
                        hub.flooded_megabytes += 1
                        self.wfile.write(bytes(2**20))
                except ConnectionError:
                    return  # who asked has seen enough

        def do_GET(self):
            self.answer(with_body=True)

        def do_HEAD(self):
            self.answer(with_body=False)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
