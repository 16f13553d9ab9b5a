"""Servers on loopback for tests of remote stores: one that speaks the protocol of S3, one of plain files."""

import functools
import http.server
import logging
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BUCKET = "lab"


@dataclass
class S3:
    """A bucket that tests look into, and change behind the back of the code."""

    endpoint: str

    def url(self, name: str) -> str:
        return f"s3://{BUCKET}/{name}"

    @functools.cached_property
    def client(self) -> Any:
        """What others use to look into buckets."""
        import boto3

        return boto3.client("s3", endpoint_url=self.endpoint)

    def get(self, key: str) -> bytes:
        return self.client.get_object(Bucket=BUCKET, Key=key)["Body"].read()

    def put(self, key: str, body: bytes) -> None:
        self.client.put_object(Bucket=BUCKET, Key=key, Body=body)

    def delete(self, key: str) -> None:
        self.client.delete_object(Bucket=BUCKET, Key=key)

    def upload(self, folder: Path, name: str) -> None:
        """What any other tool does that copies a folder to a bucket."""
        for path in folder.rglob("*"):
            if path.is_file():
                self.put(f"{name}/{path.relative_to(folder).as_posix()}", path.read_bytes())

    def objects(self, prefix: str) -> dict[str, bytes]:
        """Key below the prefix -> content."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"{prefix}/")
        keys = [entry["Key"] for page in pages for entry in page.get("Contents", ())]
        return {key.removeprefix(f"{prefix}/"): self.get(key) for key in keys}


@contextmanager
def s3_server() -> Iterator[str]:
    """Run the server in a thread; yields its endpoint, with an empty bucket behind it."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    urllib.request.urlopen(urllib.request.Request(f"{endpoint}/{BUCKET}", method="PUT")).close()
    try:
        yield endpoint
    finally:
        server.stop()


S3_ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "nobody",
    "AWS_SECRET_ACCESS_KEY": "nothing",
    "AWS_REGION": "us-east-1",
}


@dataclass
class Web:
    """A plain web server over a folder."""

    endpoint: str
    folder: Path
    asked: list[str] = field(default_factory=list)  # paths, in order

    def url(self, name: str) -> str:
        return f"{self.endpoint}/{name}"


@contextmanager
def web_server(folder: Path) -> Iterator[Web]:
    """Run the server in a thread."""
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, text: str, *arguments: object) -> None:
            asked.append(self.path)

    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield Web(f"http://127.0.0.1:{server.server_address[1]}", folder, asked)
        finally:
            server.shutdown()
            thread.join()
