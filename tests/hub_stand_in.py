"""A stand-in for the Hugging Face hub: as much of its HTTP interface as push and pull take."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub:
    """Repositories in memory: name → file → bytes.

    Attributes:
        files: what was pushed.
        private: whether a repository was made a private one.
        commits: their messages.
        denied: refuse everything, as without a right to write.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.commits: list[str] = []
        self.denied = False
        self.address = ""


@contextmanager
def hub() -> Iterator[Hub]:
    """Run a stand-in on a free port."""
    state = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(state))
    state.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


COMMIT = "c" * 40


def _handler(state: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def _reply(self, status: int, body: Any = None, **headers: str) -> None:
            data = body if isinstance(body, bytes) else json.dumps(body or {}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") == "chunked":
                data = b""
                while size := int(self.rfile.readline(), 16):
                    data += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return data
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def do_POST(self) -> None:
            body = self._body()
            if state.denied:
                return self._reply(403, {"error": "no"})
            if self.path == "/api/validate-yaml":
                return self._reply(200, {"errors": [], "warnings": []})
            if self.path == "/api/repos/create":
                asked = json.loads(body)
                owner = f"{asked['organization']}/" if asked.get("organization") else ""
                name = f"{owner}{asked['name']}"
                if name in state.files:
                    return self._reply(409, {"url": f"{state.address}/{name}"})
                state.files[name] = {}
                state.private[name] = asked.get("private") or asked.get("visibility") == "private"
                return self._reply(200, {"url": f"{state.address}/{name}"})
            match = re.fullmatch(r"/api/models/(.+?)/(preupload|commit)/main.*", self.path)
            if match is None or match[1] not in state.files:
                return self._missing("RepoNotFound")
            if match[2] == "preupload":
                files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                         for f in json.loads(body)["files"]]  # fmt: skip
                return self._reply(200, {"files": files})
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "header":
                    state.commits.append(entry["value"]["summary"])
                elif entry["key"] == "file":
                    content = base64.b64decode(entry["value"]["content"])
                    state.files[match[1]][entry["value"]["path"]] = content
            address = f"{state.address}/{match[1]}/commit/{COMMIT}"
            return self._reply(200, {"commitUrl": address, "commitOid": COMMIT})

        def _missing(self, code: str) -> None:
            self._reply(404, {"error": "not found"}, X_Error_Code=code)

        def do_GET(self) -> None:
            match = re.fullmatch(r"/(.+)/resolve/([^/]+)/([^?]+).*", self.path)
            if match is None:
                known = re.fullmatch(r"/api/models/(.+?)(/revision/.*)?", self.path)
                if known is None or known[1] not in state.files:
                    return self._missing("RepoNotFound")
                siblings = [{"rfilename": name} for name in state.files[known[1]]]
                return self._reply(200, {"id": known[1], "sha": COMMIT, "siblings": siblings})
            if match[1] not in state.files:
                return self._missing("RepoNotFound")
            if match[2] not in ("main", COMMIT):
                return self._missing("RevisionNotFound")
            if match[3] not in state.files[match[1]]:
                return self._missing("EntryNotFound")
            data = state.files[match[1]][match[3]]
            tag = sha1(data, usedforsecurity=False).hexdigest()
            return self._reply(200, data, ETag=f'"{tag}"', X_Repo_Commit=COMMIT)

        do_HEAD = do_GET

    return Handler
