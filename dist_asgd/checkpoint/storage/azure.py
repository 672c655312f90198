"""Stores files on Azure Blob Storage: creates by conditional puts, large files by blocks and a commit."""

from __future__ import annotations

import contextlib
import functools
import io
import secrets
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from dist_asgd.checkpoint.storage.backend import Backend, classes_in, without_listings_cache
from dist_asgd.checkpoint.storage.multipart import LONGEST_PUT, length, rewound, upload
from dist_asgd.checkpoint.storage.remote import OWNER, Info, RemoteStore, remove_each
from dist_asgd.checkpoint.storage.retry import TIMEOUT
from dist_asgd.checkpoint.storage.store import BytesLike

METADATA = {"is_directory": "false"}  # adlfs gives every file this metadata
FOLDERS = ("is_directory", "hdi_isfolder")  # metadata of empty blobs that stand for folders, of adlfs and of Azure


def prepare_azure(fs: Any) -> None:
    """Sets timeouts and turns off the client's own retries, which take a minute where no server listens."""
    from azure.storage.blob.aio import BlobServiceClient

    made = fs.service_client
    timeouts: dict[str, Any] = {"connection_timeout": TIMEOUT, "read_timeout": TIMEOUT}
    fs.service_client = BlobServiceClient(made.url, credential=made.credential, retry_total=0, **timeouts)


class AzureStore(RemoteStore):
    """Changes blobs of a container by adlfs's client, because adlfs sends the blocks of a blob from one thread only."""

    backend = Backend(
        protocols=("abfs", "abfss", "az"),
        extra="azure",
        user_options=(),
        options=without_listings_cache,
        prepare=prepare_azure,
        query_option="sas_token",
        has_container_before_at=True,
        secret_options=("sas", "connection_string"),
        secret_fields=("AccountKey", "SharedAccessSignature", "sig"),
        transient_errors=classes_in(
            "azure.core.exceptions", "IncompleteReadError", "ServiceRequestError", "ServiceResponseError"
        ),
        missing_container_codes=frozenset({"ContainerNotFound"}),
    )

    def infos(self, path: str, deep: bool) -> list[Info]:
        """Lists by the client's own request: adlfs takes a missing container for an empty folder."""
        container, key = self._connection.bucket_and_key(path)
        prefix, fs = f"{key}/" if key else "", self._connection.fs()

        async def request() -> list[Info]:
            async with fs.service_client.get_container_client(container) as client:
                arguments = {"name_starts_with": prefix, "include": ["metadata"]}
                blobs = client.list_blobs(**arguments) if deep else client.walk_blobs(**arguments, delimiter="/")
                return [info_of(container, blob) async for blob in blobs]

        found: list[Info] = self._connection.wait_for(request())
        return [info for info in found if info["name"] != f"{container}/{prefix}"]

    def create(self, path: str, data: bytes) -> None:
        owner = secrets.token_hex(16)
        metadata = {**METADATA, OWNER: owner}

        def request() -> None:
            try:
                self.call(path, lambda blob: blob.upload_blob(data, overwrite=False, metadata=metadata))
            except FileExistsError:  # perhaps this call's own: the answer to an earlier try may be lost
                properties = self.call(path, lambda blob: blob.get_blob_properties())
                if properties.metadata.get(OWNER) != owner:
                    raise

        self.retry("create", path, request)

    def write(self, path: str, chunks: Iterable[BytesLike]) -> int:
        def put(data: io.BytesIO) -> None:
            if length(data) > LONGEST_PUT:  # the client copies the data of a put, but not that of a block
                blocks = AzureBlocks(self, path)
                blocks.send(1, data)
                blocks.finish(1, length(data))
                return

            def send(blob: Any) -> Any:
                return blob.upload_blob(data.getvalue(), overwrite=True, metadata=METADATA)

            self.retry("write", path, lambda: self.call(path, send))

        return upload(chunks, put, lambda: AzureBlocks(self, path))

    def remove_files(self, paths: list[str]) -> None:
        remove_each(paths, lambda path: self.retry("remove", path, lambda: self._remove(path)))

    def _remove(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.call(path, lambda blob: blob.delete_blob())

    def remove_folders(self, paths: list[str]) -> None:
        """Removes the empty blobs that stand for folders in accounts with a hierarchical namespace."""
        for path in paths:
            self.retry("remove", path, functools.partial(self._remove, path))

    def call(self, path: str, ask: Callable[[Any], Coroutine[Any, Any, Any]]) -> Any:
        """Returns what ``ask`` returns for the client of the blob at ``path``, tried once.

        Raises FileExistsError and FileNotFoundError for the client's errors that mean these.
        """
        from azure.core.exceptions import ResourceExistsError, ResourceNotFoundError

        fs = self._connection.fs()
        container, key = self._connection.bucket_and_key(path)

        async def request() -> Any:
            async with fs.service_client.get_blob_client(container=container, blob=key) as blob:
                return await ask(blob)

        try:
            return self._connection.wait_for(request())
        except ResourceExistsError as error:
            raise FileExistsError from error
        except ResourceNotFoundError as error:
            raise FileNotFoundError(str(error)) from error


def info_of(container: str, blob: Any) -> Info:
    """Returns fsspec's info of what the client lists: a blob, or a prefix that ends in a slash and has no metadata."""
    metadata = {name.lower(): value for name, value in (blob.get("metadata") or {}).items()}
    if blob.name.endswith("/") or any(metadata.get(name) == "true" for name in FOLDERS):
        return {"name": f"{container}/{blob.name}", "type": "directory", "size": 0}
    name = f"{container}/{blob.name}"
    return {"name": name, "type": "file", "size": blob.size, "last_modified": blob.last_modified}


class AzureBlocks:
    """The blocks of one blob, which nobody sees before they are committed."""

    def __init__(self, store: AzureStore, path: str) -> None:
        self._store, self._path = store, path
        self._upload = secrets.token_hex(8)  # tells this writer's blocks from those of another writer of the same blob

    def _name(self, number: int) -> str:
        """Returns the name of a block; Azure wants the names of all blocks of a blob to have one length."""
        return f"{self._upload}-{number:08}"

    def send(self, number: int, data: io.BytesIO) -> None:
        def stage(blob: Any) -> Any:
            return blob.stage_block(self._name(number), rewound(data), length=length(data))

        self._store.retry("write", self._path, lambda: self._store.call(self._path, stage))

    def finish(self, parts: int, size: int) -> None:
        from azure.storage.blob import BlobBlock

        names = [BlobBlock(self._name(number)) for number in range(1, parts + 1)]

        def commit(blob: Any) -> Any:
            return blob.commit_block_list(names, metadata=METADATA)

        self._store.retry("write", self._path, lambda: self._store.call(self._path, commit))

    def abort(self) -> None:
        """Does nothing: Azure drops blocks that are not committed within a week."""
