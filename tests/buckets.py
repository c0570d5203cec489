"""An S3 store on this machine, and what is asked of it."""

import logging
from contextlib import contextmanager
from pathlib import PurePosixPath

import fsspec
import pytest
from moto.server import ThreadedMotoServer
from s3fs import S3FileSystem


class Store:
    """A bucket with the folder `scenes`."""

    def __init__(self, server):
        host, port = server.get_host_and_port()
        self.variables = {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": "none",
            "AWS_SHARED_CREDENTIALS_FILE": "none",
        }

    @property
    def files(self):
        return fsspec.filesystem("s3", use_listings_cache=False)

    def fill(self, folder, paths):
        """A new folder of the store with these files; its URL."""
        for path in paths:
            self.files.put_file(str(path), f"bucket/{folder}/{path.name}")
        return f"s3://bucket/{folder}"

    def names(self, url):
        return {PurePosixPath(name).name for name in self.files.find(url)}

    def copy(self, url, folder):
        """Everything of a folder of the store, in a local one."""
        folder.mkdir()
        for name in self.files.find(url):
            self.files.get_file(name, str(folder / PurePosixPath(name).name))
        return folder


@contextmanager
def serving():
    """A running store; programs of this process find it by their environment."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    S3FileSystem.clear_instance_cache()
    try:
        with pytest.MonkeyPatch.context() as patch:
            store = Store(server)
            for name, value in store.variables.items():
                patch.setenv(name, value)
            store.files.mkdir("bucket")
            yield store
    finally:
        S3FileSystem.clear_instance_cache()
        server.stop()


def asked(monkeypatch):
    """What this process asks of the store: the requests and their arguments, as they come."""
    requests = []
    call = S3FileSystem._call_s3

    async def noting(self, method, *rest, **arguments):
        requests.append((method, arguments))
        return await call(self, method, *rest, **arguments)

    monkeypatch.setattr(S3FileSystem, "_call_s3", noting)
    return requests
