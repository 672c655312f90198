"""Stores files on S3: creates by conditional puts, large files by multipart uploads, removals in batches."""

from __future__ import annotations

import contextlib
import functools
import io
import secrets
import time
from collections.abc import Iterable, Mapping
from typing import Any

from dist_asgd.checkpoint.storage.backend import Backend, classes_in, without_listings_cache
from dist_asgd.checkpoint.storage.multipart import PART, rewound, upload
from dist_asgd.checkpoint.storage.remote import OWNER, Info, RemoteStore
from dist_asgd.checkpoint.storage.retry import TIMEOUT, StorageError, http_statuses
from dist_asgd.checkpoint.storage.store import BytesLike

MAX_PARTS = 10_000  # of one object: a limit of S3
MAX_DELETES = 1000  # objects in one request: a limit of S3
CONNECTIONS = 32  # botocore's default of 10 is less than the number of concurrent reads (storage/storage.py)


def s3_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options for s3fs. botocore makes one try, because storage/retry.py would multiply its tries."""
    config = {"max_pool_connections": CONNECTIONS, "retries": {"total_max_attempts": 1}}
    config |= {"connect_timeout": TIMEOUT, "read_timeout": TIMEOUT}
    return {**without_listings_cache(options), "config_kwargs": {**config, **options.get("config_kwargs", {})}}


def prepare_s3(fs: Any) -> None:
    """Connects at once, because several threads would otherwise connect one each, and turns off s3fs's own tries."""
    fs.retries = 1
    fs.connect()


class S3Store(RemoteStore):
    """Changes objects of an S3 bucket.

    Exclusive creates need a server that honours If-None-Match on a put, as AWS, MinIO, Ceph and SeaweedFS do.
    """

    backend = Backend(
        protocols=("s3", "s3a"),
        extra="s3",
        user_options=(),
        exclusive_since=("botocore", (1, 35, 20)),
        options=s3_options,
        prepare=prepare_s3,
        transient_codes=frozenset({"ConditionalRequestConflict", "OperationAborted", "RequestTimeout", "SlowDown"}),
        transient_errors=classes_in("botocore.parsers", "ResponseParserError")
        | classes_in(
            "botocore.exceptions", "ConnectionError", "HTTPClientError", "ReadTimeoutError", "ResponseStreamingError"
        ),
        permanent_errors=classes_in("botocore.exceptions", "SSLError"),
        missing_container_codes=frozenset({"NoSuchBucket"}),
    )

    def infos(self, path: str, deep: bool) -> list[Info]:
        """Lists by S3's own request: s3fs takes a missing bucket for an empty folder."""
        bucket, key = self._connection.bucket_and_key(path)
        prefix, found = f"{key}/" if key else "", []
        arguments = {"Bucket": bucket, "Prefix": prefix, "Delimiter": "" if deep else "/"}
        while True:
            page = self._connection.call("call_s3", "list_objects_v2", **arguments)
            for entry in page.get("Contents", ()):
                info = {"name": f"{bucket}/{entry['Key']}", "type": "file", "size": entry["Size"]}
                found.append({**info, "LastModified": entry["LastModified"]})
            for entry in page.get("CommonPrefixes", ()):
                found.append({"name": f"{bucket}/{entry['Prefix']}", "type": "directory", "size": 0})
            if not page.get("IsTruncated"):
                return [info for info in found if info["name"] != f"{bucket}/{prefix}"]
            arguments["ContinuationToken"] = page["NextContinuationToken"]

    def create(self, path: str, data: bytes) -> None:
        owner = secrets.token_hex(16)

        def request() -> None:
            try:
                self.call("put_object", path, Body=io.BytesIO(data), IfNoneMatch="*", Metadata={OWNER: owner})
            except OSError as error:
                if not isinstance(error, FileExistsError) and 412 not in http_statuses(error):
                    raise
                # The object may be this call's own: the network may have lost the answer to an earlier try.
                if self.call("head_object", path).get("Metadata", {}).get(OWNER) != owner:
                    raise FileExistsError from error

        self.retry("create", path, request)

    def write(self, path: str, chunks: Iterable[BytesLike]) -> int:
        def put(data: io.BytesIO) -> None:
            self.retry("write", path, lambda: self.call("put_object", path, Body=rewound(data)))

        return upload(chunks, put, lambda: S3Multipart(self, path))

    def remove_files(self, paths: list[str]) -> None:
        for start in range(0, len(paths), MAX_DELETES):
            batch = paths[start : start + MAX_DELETES]
            self.retry("remove", batch[0], functools.partial(self._delete, batch))

    def _delete(self, paths: list[str]) -> None:
        if len(paths) == 1:
            self.call("delete_object", paths[0])
            return
        bucket, _ = self._connection.bucket_and_key("")
        keys = [{"Key": self._connection.bucket_and_key(path)[1]} for path in paths]
        objects = {"Objects": keys, "Quiet": True}
        answer = self._connection.call("call_s3", "delete_objects", Bucket=bucket, Delete=objects)
        for failure in answer.get("Errors", []):  # the status of the answer is 200 even so
            raise StorageError(f"{failure.get('Code')}: {failure.get('Message')} ({failure.get('Key')})")

    def remove_folders(self, paths: list[str]) -> None:
        """Deletes placeholders of empty folders, which SeaweedFS keeps; AWS has no folders."""
        above, _, name = paths[-1].rpartition("/")
        if name in self.entries(above):
            self.remove_files([f"{path}/" for path in paths])

    def abort_uploads(self, prefix: str, older_than: float) -> int:
        bucket, key = self._connection.bucket_and_key(prefix)
        latest = time.time() - older_than
        below = f"{key}/" if key else ""
        found = self.retry("list uploads below", prefix, lambda: self._uploads(bucket, below))
        old = [(upload["Key"], upload["UploadId"]) for upload in found if upload["Initiated"].timestamp() <= latest]
        for name, upload_id in old:
            self.retry("abort an upload below", prefix, functools.partial(self._abort, bucket, name, upload_id))
        return len(old)

    def _uploads(self, bucket: str, prefix: str) -> list[dict[str, Any]]:
        """Returns all unfinished multipart uploads of keys below ``prefix``; s3fs lists the first page only."""
        found: list[dict[str, Any]] = []
        marker: dict[str, str] = {}
        while True:
            page = self._connection.call("call_s3", "list_multipart_uploads", Bucket=bucket, Prefix=prefix, **marker)
            # Some servers ignore the prefix of the request.
            found += [entry for entry in page.get("Uploads", []) if entry["Key"].startswith(prefix)]
            if not page.get("IsTruncated"):
                return found
            marker = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def _abort(self, bucket: str, key: str, upload_id: str) -> None:
        with contextlib.suppress(FileNotFoundError):  # finished or aborted since it was listed
            self._connection.call("call_s3", "abort_multipart_upload", Bucket=bucket, Key=key, UploadId=upload_id)

    def call(self, method: str, path: str, **arguments: Any) -> dict[str, Any]:
        """Returns botocore's answer to one request about the object at ``path``, tried once."""
        bucket, key = self._connection.bucket_and_key(path)
        answer: dict[str, Any] = self._connection.call("call_s3", method, Bucket=bucket, Key=key, **arguments)
        return answer


class S3Multipart:
    """A multipart upload of S3: its parts are invisible, but stored and paid for, until it is finished or aborted."""

    def __init__(self, store: S3Store, path: str) -> None:
        self._path, self._retry, self._request = path, store.retry, store.call
        self._etags: dict[int, str] = {}
        self._id = self._retry("write", path, lambda: self._request("create_multipart_upload", path))["UploadId"]

    def send(self, number: int, data: io.BytesIO) -> None:
        if number > MAX_PARTS:
            raise StorageError(f"a file on S3 has at most {MAX_PARTS} parts of {PART} bytes: write several files")
        part = {"UploadId": self._id, "PartNumber": number}

        def request() -> dict[str, Any]:
            return self._request("upload_part", self._path, Body=rewound(data), **part)

        self._etags[number] = self._retry("write", self._path, request)["ETag"]

    def finish(self, parts: int, size: int) -> None:
        entries = [{"PartNumber": number, "ETag": self._etags[number]} for number in range(1, parts + 1)]
        upload = {"UploadId": self._id, "MultipartUpload": {"Parts": entries}}

        def request() -> None:
            try:
                self._request("complete_multipart_upload", self._path, **upload)
            except FileNotFoundError:  # no such upload: an earlier try has finished it, and its answer was lost
                if self._request("head_object", self._path)["ContentLength"] != size:
                    raise

        self._retry("write", self._path, request)

    def abort(self) -> None:
        self._retry("abort", self._path, lambda: self._request("abort_multipart_upload", self._path, UploadId=self._id))
