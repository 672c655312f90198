"""Stores files on Google Cloud Storage: creates by conditional puts, large files by resumable uploads."""

from __future__ import annotations

import functools
import inspect
import io
import secrets
from collections.abc import Iterable
from typing import Any

from dist_asgd.checkpoint.storage.backend import Backend, classes_in, without_listings_cache
from dist_asgd.checkpoint.storage.multipart import LONGEST_PUT, PART, length, split_into_parts
from dist_asgd.checkpoint.storage.remote import OWNER, Info, RemoteStore, remove_each
from dist_asgd.checkpoint.storage.retry import TIMEOUT, StorageError
from dist_asgd.checkpoint.storage.store import BytesLike
from dist_asgd.checkpoint.storage.waiting import tidying_up

LISTED = 1000  # objects in one answer: a limit of Google


def prepare_gcs(fs: Any) -> None:
    """Sets timeouts and turns off gcsfs's own retries, which take half a minute where no server listens."""
    import aiohttp

    if fs.requests_timeout is None:
        fs.requests_timeout = aiohttp.ClientTimeout(total=None, sock_connect=TIMEOUT, sock_read=TIMEOUT)
    fs._request = functools.partial(inspect.unwrap(type(fs)._request), fs)


class GcsStore(RemoteStore):
    """Changes objects of a bucket of Google Cloud Storage."""

    backend = Backend(
        protocols=("gs", "gcs"),
        extra="gcs",
        user_options=(),
        exclusive_since=("gcsfs", (2024, 12)),
        options=without_listings_cache,
        prepare=prepare_gcs,
        transient_errors=classes_in("google.auth.exceptions", "TransportError"),
    )

    def infos(self, path: str, deep: bool) -> list[Info]:
        """Lists by Google's own request. Raises FileNotFoundError for a missing bucket."""
        bucket, key = self._connection.bucket_and_key(path)
        prefix, found = f"{key}/" if key else "", []
        arguments = {"prefix": prefix, "maxResults": LISTED} | ({} if deep else {"delimiter": "/"})
        while True:
            page = self._connection.call("call", "GET", "b/{}/o", bucket, json_out=True, **arguments)
            for entry in page.get("items", ()):
                info = {"name": f"{bucket}/{entry['name']}", "type": "file", "size": int(entry["size"])}
                found.append({**info, "updated": entry.get("updated")})
            for name in page.get("prefixes", ()):
                found.append({"name": f"{bucket}/{name}", "type": "directory", "size": 0})
            if "nextPageToken" not in page:
                return [info for info in found if info["name"] != f"{bucket}/{prefix}"]
            arguments["pageToken"] = page["nextPageToken"]

    def create(self, path: str, data: bytes) -> None:
        owner = secrets.token_hex(16)

        def request() -> None:
            whole = self._connection.full_path(path)
            try:
                self._connection.call("pipe_file", whole, data, metadata={OWNER: owner}, mode="create")
            except FileExistsError:  # perhaps this call's own: the answer to an earlier try may be lost
                if self._connection.call("info", whole).get("metadata", {}).get(OWNER) != owner:
                    raise

        self.retry("create", path, request)

    def write(self, path: str, chunks: Iterable[BytesLike]) -> int:
        """Sends the parts of a resumable upload one after another, which is the only order that Google takes."""
        pieces = split_into_parts(chunks, PART)
        piece, following = next(pieces, io.BytesIO()), next(pieces, None)
        if following is None and length(piece) <= LONGEST_PUT:
            self.retry("write", path, lambda: self._put(path, piece))
            return length(piece)
        session = self.retry("write", path, lambda: self._begin(path))
        sent = 0
        try:
            while following is not None:
                sent += self._send(path, session, piece, sent, "*")
                piece, following = following, next(pieces, None)
            return sent + self._send(path, session, piece, sent, str(sent + length(piece)))
        except BaseException:
            with tidying_up():  # Google drops an unfinished upload within a week
                self._connection.call("call", "DELETE", session)
            raise

    def _put(self, path: str, piece: io.BytesIO) -> None:
        self._connection.call("pipe_file", self._connection.full_path(path), piece.getvalue())

    def _begin(self, path: str) -> str:
        """Starts a resumable upload and returns its URL."""
        fs = self._connection.fs()
        bucket, key = self._connection.bucket_and_key(path)
        where = f"{fs._location}/upload/storage/v1/b/{bucket}/o"
        arguments = {"name": key, "uploadType": "resumable", "json": {"name": key}}
        headers, _ = self._connection.call("call", "POST", where, **arguments)
        return str(headers["Location"])

    def _send(self, path: str, session: str, piece: io.BytesIO, start: int, total: str) -> int:
        """Sends one part of a resumable upload and returns its bytes.

        A second try sends the whole part again: the server skips bytes that it already has.

        Args:
            session: URL of the upload.
            start: offset of the part in the file, in bytes.
            total: bytes of the file, or "*" for a part that is not the last.
        """
        headers = {"Content-Range": f"bytes {start}-{start + length(piece) - 1}/{total}"}

        def request() -> None:
            data = io.BytesIO(piece.getvalue())  # a new object for each try, because aiohttp closes it; not a copy
            answer, _ = self._connection.call("call", "POST", session, headers=headers, data=data)
            expected = f"bytes=0-{start + length(piece) - 1}"
            if total == "*" and answer.get("Range") != expected:
                raise StorageError(f"could not write {path}: expected the answer {expected}, got {answer.get('Range')}")

        self.retry("write", path, request)
        return length(piece)

    def remove_files(self, paths: list[str]) -> None:
        remove_each(paths, lambda path: self._remove_by("rm_file", path))

    def remove_folders(self, paths: list[str]) -> None:
        """Does nothing: the store has no folders."""
