"""Google Cloud Storage: creates that need a missing object, and resumable uploads, which nobody sees until they end."""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import secrets
from collections.abc import Iterable, Mapping
from typing import Any

from dist_asgd.checkpoint.storage.multipart import PART, equal_pieces, length
from dist_asgd.checkpoint.storage.retry import StorageError
from dist_asgd.checkpoint.storage.store import BytesLike
from dist_asgd.checkpoint.storage.uploads import Uploads, remove_each

OWNER = "dist_asgd_owner"  # name of the metadata that tells one's own object from another's
CONDITIONAL_PUT = (2024, 12)  # version of gcsfs; older ones overwrite without a word
CONNECT, ANSWER = 5, 30  # seconds
LONGEST_PUT = 2**20  # bytes: of a put the client makes copies


def gcs_options(options: Mapping[str, Any]) -> dict[str, Any]:
    return {"use_listings_cache": False, **options}


def prepare_gcs(fs: Any) -> None:
    """Every try is ours (storage/retry.py): the driver's own would take half a minute where nobody listens."""
    import aiohttp
    import gcsfs

    if tuple(int(number) for number in gcsfs.__version__.split(".")[:2]) < CONDITIONAL_PUT:
        raise StorageError(
            f"gcsfs {gcsfs.__version__} cannot create a file exclusively: pip install -U 'dist-asgd[gcs]'"
        )
    if fs.requests_timeout is None:
        fs.requests_timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT, sock_read=ANSWER)
    fs._request = functools.partial(inspect.unwrap(type(fs)._request), fs)


class GcsUploads(Uploads):
    """Objects of a bucket."""

    def create(self, path: str, data: bytes) -> None:
        owner = secrets.token_hex(16)

        def request() -> None:
            fs, whole = self._connection.fs(), self._connection.at(path)
            try:
                fs.pipe_file(whole, data, metadata={OWNER: owner}, mode="create")
            except FileExistsError:  # perhaps our own, and the answer was lost
                if fs.info(whole).get("metadata", {}).get(OWNER) != owner:
                    raise

        self._again("create", path, request)

    def write(self, path: str, chunks: Iterable[BytesLike]) -> int:
        """One part after the other, as a resumable upload takes them."""
        pieces = equal_pieces(chunks, PART)
        piece, following = next(pieces, io.BytesIO()), next(pieces, None)
        if following is None and length(piece) <= LONGEST_PUT:
            self._again("write", path, lambda: self._put(path, piece))
            return length(piece)
        session = self._again("write", path, lambda: self._begin(path))
        sent = 0
        try:
            while following is not None:
                sent += self._send(path, session, piece, sent, "*")
                piece, following = following, next(pieces, None)
            return sent + self._send(path, session, piece, sent, str(sent + length(piece)))
        except BaseException:
            with contextlib.suppress(Exception):  # Google forgets it within a week
                self._connection.fs().call("DELETE", session)
            raise

    def _put(self, path: str, piece: io.BytesIO) -> None:
        self._connection.fs().pipe_file(self._connection.at(path), piece.getvalue())

    def _begin(self, path: str) -> str:
        """URL of a resumable upload."""
        fs = self._connection.fs()
        bucket, key, _ = fs.split_path(self._connection.at(path))
        where = f"{fs._location}/upload/storage/v1/b/{bucket}/o"
        headers, _ = fs.call("POST", where, name=key, uploadType="resumable", json={"name": key})
        return str(headers["Location"])

    def _send(self, path: str, session: str, piece: io.BytesIO, start: int, total: str) -> int:
        """Bytes that the server has got before, with an answer that was lost, it leaves out of a second try."""
        headers = {"Content-Range": f"bytes {start}-{start + length(piece) - 1}/{total}"}

        def request() -> None:
            data = io.BytesIO(piece.getvalue())  # of its own, since aiohttp closes it; not copied
            answer, _ = self._connection.fs().call("POST", session, headers=headers, data=data)
            expected = f"bytes=0-{start + length(piece) - 1}"
            if total == "*" and answer.get("Range") != expected:
                raise StorageError(f"could not write {path}: expected the answer {expected}, got {answer.get('Range')}")

        self._again("write", path, request)
        return length(piece)

    def remove(self, paths: list[str]) -> None:
        remove_each(paths, lambda path: self._again("remove", path, lambda: self._remove(path)))

    def _remove(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._connection.fs().rm_file(self._connection.at(path))

    def remove_folders(self, paths: list[str]) -> None:
        """There are none."""

    def abort(self, prefix: str, older_than: float) -> int:
        """Nothing to do: Google forgets uploads that have not ended within a week."""
        return 0
