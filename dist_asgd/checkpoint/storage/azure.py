"""Azure: conditional puts, and blocks that nobody sees until they are committed."""

from __future__ import annotations

import functools
import io
import secrets
from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import Any

from fsspec.asyn import sync

from dist_asgd.checkpoint.storage.multipart import Multipart, from_start, length, upload
from dist_asgd.checkpoint.storage.store import BytesLike
from dist_asgd.checkpoint.storage.uploads import Uploads, remove_each

OWNER = "dist_asgd_owner"  # name of the metadata that tells one's own blob from another's
METADATA = {"is_directory": "false"}  # as adlfs does
COPIED = 2**20  # bytes: for a put the client makes copies, for a block it does not
TIMEOUTS: dict[str, Any] = {"connection_timeout": 5, "read_timeout": 30}  # seconds


def azure_options(options: Mapping[str, Any]) -> dict[str, Any]:
    return {"use_listings_cache": False, **options}


def prepare_azure(fs: Any) -> None:
    """Every try is ours (storage/retry.py): the driver's own would take a minute where nobody listens."""
    from azure.storage.blob.aio import BlobServiceClient

    made = fs.service_client
    fs.service_client = BlobServiceClient(made.url, credential=made.credential, retry_total=0, **TIMEOUTS)


class AzureUploads(Uploads):
    """Blobs of a container. adlfs could not send blocks of one blob from several threads, so its client is used."""

    def create(self, path: str, data: bytes) -> None:
        owner = secrets.token_hex(16)
        metadata = {**METADATA, OWNER: owner}

        def request() -> None:
            try:
                self.call(path, lambda blob: blob.upload_blob(data, overwrite=False, metadata=metadata))
            except FileExistsError:  # perhaps our own, and the answer was lost
                properties = self.call(path, lambda blob: blob.get_blob_properties())
                if properties.metadata.get(OWNER) != owner:
                    raise

        self._again("create", path, request)

    def write(self, path: str, chunks: Iterable[BytesLike]) -> int:
        def put(data: io.BytesIO) -> None:
            if length(data) > COPIED:
                blocks = AzureBlocks(self, path)
                blocks.send(1, data)
                blocks.finish(1, length(data))
                return

            def send(blob: Any) -> Any:
                return blob.upload_blob(data.getvalue(), overwrite=True, metadata=METADATA)

            self._again("write", path, lambda: self.call(path, send))

        return upload(chunks, put, lambda: AzureBlocks(self, path))

    def remove(self, paths: list[str]) -> None:
        remove_each(paths, lambda path: self._again("remove", path, lambda: self._remove(path)))

    def _remove(self, path: str) -> None:
        try:
            self.call(path, lambda blob: blob.delete_blob())
        except FileNotFoundError:
            return

    def remove_folders(self, paths: list[str]) -> None:
        """There are none, but where an account has a hierarchical namespace they are blobs, if empty ones."""
        for path in paths:
            self._again("remove", path, functools.partial(self._remove, path))

    def abort(self, prefix: str, older_than: float) -> int:
        """Azure forgets blocks that are not committed within a week."""
        return 0

    def call(self, path: str, ask: Callable[[Any], Coroutine[Any, Any, Any]]) -> Any:
        """``ask`` of the blob's client; the errors of azure that mean so as FileExistsError and FileNotFoundError."""
        from azure.core.exceptions import ResourceExistsError, ResourceNotFoundError

        fs = self._connection.fs()
        container, key, _ = fs.split_path(self._connection.at(path))

        async def request() -> Any:
            async with fs.service_client.get_blob_client(container=container, blob=key) as blob:
                return await ask(blob)

        try:
            return sync(fs.loop, request)
        except ResourceExistsError as error:
            raise FileExistsError from error
        except ResourceNotFoundError as error:
            raise FileNotFoundError(str(error)) from error


class AzureBlocks(Multipart):
    """Parts of one blob."""

    def __init__(self, uploads: AzureUploads, path: str) -> None:
        self._path = path
        self._again = uploads.requests.again
        self._call = uploads.call
        self._upload = secrets.token_hex(8)  # or another writer's blocks would count as ours

    def _name(self, number: int) -> str:
        """All of a blob have the same length."""
        return f"{self._upload}-{number:08}"

    def send(self, number: int, data: io.BytesIO) -> None:
        def stage(blob: Any) -> Any:
            return blob.stage_block(self._name(number), from_start(data), length=length(data))

        self._again("write", self._path, lambda: self._call(self._path, stage))

    def finish(self, parts: int, size: int) -> None:
        from azure.storage.blob import BlobBlock

        names = [BlobBlock(self._name(number)) for number in range(1, parts + 1)]

        def commit(blob: Any) -> Any:
            return blob.commit_block_list(names, metadata=METADATA)

        self._again("write", self._path, lambda: self._call(self._path, commit))

    def abort(self) -> None:
        """Nothing to do: see AzureUploads.abort."""
