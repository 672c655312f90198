"""S3: conditional puts, multipart uploads of our own, deletes in batches."""

from __future__ import annotations

import contextlib
import functools
import io
import secrets
import time
from collections.abc import Iterable, Mapping
from typing import Any

from dist_asgd.checkpoint.storage.multipart import PART, Multipart, from_start, upload
from dist_asgd.checkpoint.storage.retry import StorageError, statuses
from dist_asgd.checkpoint.storage.store import BytesLike
from dist_asgd.checkpoint.storage.uploads import Uploads

MAX_PARTS = 10_000
MAX_DELETES = 1000  # in one request
CONNECTIONS = 32  # botocore's 10 would be fewer than the reads at once
OWNER = "dist-asgd-owner"  # name of the metadata that tells one's own object from another's
CONDITIONAL_PUT = (1, 35, 20)  # version of botocore; older ones leave the condition out without a word


def s3_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Every try is ours (storage/retry.py): drivers that retry inside would multiply them."""
    ours = {"max_pool_connections": CONNECTIONS, "retries": {"total_max_attempts": 1}}
    return {
        "use_listings_cache": False,
        **options,
        "config_kwargs": {**ours, **options.get("config_kwargs", {})},
    }


def prepare_s3(fs: Any) -> None:
    import botocore

    if tuple(int(number) for number in botocore.__version__.split(".")[:3]) < CONDITIONAL_PUT:
        raise StorageError(
            f"botocore {botocore.__version__} cannot create a file exclusively: pip install -U 'dist-asgd[s3]'"
        )
    fs.retries = 1
    fs.connect()  # or several threads would, each for itself


class S3Uploads(Uploads):
    """Exclusive creates need a store that honours If-None-Match, as AWS, MinIO, Ceph and SeaweedFS do."""

    def create(self, path: str, data: bytes) -> None:
        owner = secrets.token_hex(16)

        def request() -> None:
            try:
                self.call("put_object", path, Body=io.BytesIO(data), IfNoneMatch="*", Metadata={OWNER: owner})
            except OSError as error:
                if not isinstance(error, FileExistsError) and 412 not in statuses(error):
                    raise
                # The answer may have been lost, by the network or by a driver that repeats by itself.
                if self.call("head_object", path).get("Metadata", {}).get(OWNER) != owner:
                    raise FileExistsError from error

        self._again("create", path, request)

    def write(self, path: str, chunks: Iterable[BytesLike]) -> int:
        def put(data: io.BytesIO) -> None:
            self._again("write", path, lambda: self.call("put_object", path, Body=from_start(data)))

        return upload(chunks, put, lambda: S3Multipart(self, path))

    def remove(self, paths: list[str]) -> None:
        for start in range(0, len(paths), MAX_DELETES):
            batch = paths[start : start + MAX_DELETES]
            self._again("remove", batch[0], functools.partial(self._delete, batch))

    def _delete(self, paths: list[str]) -> None:
        if len(paths) == 1:
            self.call("delete_object", paths[0])
            return
        bucket, _ = self._key("")
        keys = [{"Key": self._key(path)[1]} for path in paths]
        answer = self._connection.fs().call_s3("delete_objects", Bucket=bucket, Delete={"Objects": keys, "Quiet": True})
        for failure in answer.get("Errors", []):  # s3fs would leave them out
            raise StorageError(f"{failure.get('Code')}: {failure.get('Message')} ({failure.get('Key')})")

    def remove_folders(self, paths: list[str]) -> None:
        """There are none on AWS, but SeaweedFS keeps empty ones until their placeholders are deleted."""
        if self._again("list", paths[-1], lambda: self._is_listed(paths[-1])):
            self.remove([f"{path}/" for path in paths])

    def _is_listed(self, path: str) -> bool:
        whole = self._connection.at(path)
        with contextlib.suppress(FileNotFoundError):
            return whole in self._connection.fs().ls(whole.rpartition("/")[0])
        return False

    def abort(self, prefix: str, older_than: float) -> int:
        bucket, key = self._key(prefix)
        latest = time.time() - older_than
        below = f"{key}/" if key else ""
        found = self._again("list uploads below", prefix, lambda: self._uploads(bucket, below))
        old = [(upload["Key"], upload["UploadId"]) for upload in found if upload["Initiated"].timestamp() <= latest]
        for name, upload_id in old:
            self._again("abort an upload below", prefix, functools.partial(self._abort, bucket, name, upload_id))
        return len(old)

    def _uploads(self, bucket: str, prefix: str) -> list[dict[str, Any]]:
        """All that are under way; s3fs lists the first page only, and can abort those of a whole bucket only."""
        found: list[dict[str, Any]] = []
        marker: dict[str, str] = {}
        while True:
            page = self._connection.fs().call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix, **marker)
            # Not every store honours the prefix.
            found += [entry for entry in page.get("Uploads", []) if entry["Key"].startswith(prefix)]
            if not page.get("IsTruncated"):
                return found
            marker = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def _abort(self, bucket: str, key: str, upload_id: str) -> None:
        try:
            self._connection.fs().call_s3("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=upload_id)
        except FileNotFoundError:  # finished or aborted meanwhile
            return

    def _key(self, path: str) -> tuple[str, str]:
        bucket, key, _ = self._connection.fs().split_path(self._connection.at(path))
        return bucket, key

    def call(self, method: str, path: str, **arguments: Any) -> dict[str, Any]:
        bucket, key = self._key(path)
        answer: dict[str, Any] = self._connection.fs().call_s3(method, Bucket=bucket, Key=key, **arguments)
        return answer


class S3Multipart(Multipart):
    """Invisible until it is finished, but stored and paid for until it is aborted."""

    def __init__(self, uploads: S3Uploads, path: str) -> None:
        self._path = path
        self._again = uploads.requests.again
        self._request = uploads.call
        self._etags: dict[int, str] = {}
        self._id = self._again("write", path, lambda: self._request("create_multipart_upload", path))["UploadId"]

    def send(self, number: int, data: io.BytesIO) -> None:
        if number > MAX_PARTS:
            raise StorageError(f"a file on S3 has at most {MAX_PARTS} parts of {PART} bytes: write several files")
        part = {"UploadId": self._id, "PartNumber": number}

        def request() -> dict[str, Any]:
            return self._request("upload_part", self._path, Body=from_start(data), **part)

        self._etags[number] = self._again("write", self._path, request)["ETag"]

    def finish(self, parts: int, size: int) -> None:
        entries = [{"PartNumber": number, "ETag": self._etags[number]} for number in range(1, parts + 1)]
        upload = {"UploadId": self._id, "MultipartUpload": {"Parts": entries}}

        def request() -> None:
            try:
                self._request("complete_multipart_upload", self._path, **upload)
            except FileNotFoundError:  # no such upload: it was completed before, and the answer was lost
                if self._request("head_object", self._path)["ContentLength"] != size:
                    raise

        self._again("write", self._path, request)

    def abort(self) -> None:
        self._again("abort", self._path, lambda: self._request("abort_multipart_upload", self._path, UploadId=self._id))
