"""A folder as an S3 bucket: as much of the protocol as reading a table takes, for tests. Keys are not checked."""

from __future__ import annotations

import contextlib
import hashlib
import threading
import urllib.parse
from collections.abc import Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from xml.sax.saxutils import escape

BUCKET = "shop"


class _Handler(BaseHTTPRequestHandler):
    root: Path
    requests: list[str]
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: object) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self._object(with_body=False)

    def do_GET(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        if url.path.rstrip("/") == f"/{BUCKET}":
            self._listing(query)
        else:
            self._object(with_body=True)

    def _answer(self, status: int, body: bytes, headers: dict[str, str], *, with_body: bool = True) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def _listing(self, query: dict[str, str]) -> None:
        prefix, delimiter, after = (query.get(name, "") for name in ("prefix", "delimiter", "start-after"))
        keys = sorted(path.relative_to(self.root).as_posix() for path in self.root.rglob("*") if path.is_file())
        contents, folders = [], set()
        for key in (k for k in keys if k.startswith(prefix) and k > after):
            head, found, _ = key[len(prefix) :].partition(delimiter) if delimiter else (key, "", "")
            if found:
                folders.add(prefix + head + delimiter)
            else:
                size = (self.root / key).stat().st_size
                contents.append(
                    f"<Contents><Key>{escape(key)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
                    f'<ETag>"0"</ETag><Size>{size}</Size></Contents>'
                )
        common = [f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>" for name in sorted(folders)]
        text = (
            '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<Name>{BUCKET}</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{len(contents) + len(common)}</KeyCount>"
            f"<MaxKeys>1000</MaxKeys><IsTruncated>false</IsTruncated>{''.join(contents + common)}</ListBucketResult>"
        )
        self._answer(200, text.encode(), {"Content-Type": "application/xml"})

    def _object(self, *, with_body: bool) -> None:
        key = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path).removeprefix(f"/{BUCKET}").lstrip("/")
        self.requests.append(key)
        path = self.root / key
        if key and not path.is_file():
            text = b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>NoSuchKey</Code></Error>'
            self._answer(404, text, {"Content-Type": "application/xml"}, with_body=with_body)
            return
        content = path.read_bytes() if key else b""
        etag = hashlib.sha256(content).hexdigest()
        headers = {"ETag": f'"{etag}"', "Last-Modified": formatdate(0, usegmt=True), "Accept-Ranges": "bytes"}
        wanted = self.headers.get("Range", "")
        if not wanted:
            self._answer(200, content, headers, with_body=with_body)
            return
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start = int(first) if first else max(len(content) - int(last), 0)
        end = min(int(last) if first and last else len(content) - 1, len(content) - 1)
        headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        self._answer(206, content[start : end + 1], headers, with_body=with_body)


@contextlib.contextmanager
def s3_bucket(root: Path) -> Iterator[tuple[dict[str, str], list[str]]]:
    """Serve the folder as bucket 'shop' on the loopback.

    Yields:
        The environment with which clients find it, and the keys that were asked for, as they come.
    """
    requests: list[str] = []
    handler = type("Handler", (_Handler,), {"root": root, "requests": requests})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield (
                {
                    "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_address[1]}",
                    "AWS_ALLOW_HTTP": "true",
                    "AWS_REGION": "us-east-1",
                    "AWS_ACCESS_KEY_ID": "test-key",
                    "AWS_SECRET_ACCESS_KEY": "test-secret",
                    "AWS_EC2_METADATA_DISABLED": "true",
                },
                requests,
            )
        finally:
            server.shutdown()
            thread.join()
