"""Declares what all stores have in common: bytes, names of temporary files, and times in fsspec's infos."""

from __future__ import annotations

import re
import secrets
from datetime import datetime, timezone
from typing import Any, TypeAlias

BytesLike: TypeAlias = bytes | bytearray | memoryview

TIMES = ("LastModified", "last_modified", "updated", "mtime", "created")  # keys of s3fs, adlfs, gcsfs, sftp, memory


def temporary_path(path: str) -> str:
    """Returns a new name in the folder of ``path``, for a file that is being written; listings leave it out."""
    folder, slash, name = path.rpartition("/")
    return f"{folder}{slash}.{name}.{secrets.token_hex(8)}.part"


def is_temporary(path: str) -> bool:
    """Returns whether a path or name is one that ``temporary_path`` makes."""
    return re.search(r"(^|/)\.[^/]+\.[0-9a-f]{16}\.part$", path) is not None


def time_of(info: dict[str, Any]) -> float | None:
    """Returns the time in fsspec's info of a file, in seconds since the epoch, or None where it has none.

    Times without a zone are UTC.
    """
    moment = next((info[name] for name in TIMES if info.get(name) is not None), None)
    if isinstance(moment, str):
        moment = datetime.fromisoformat(moment.replace("Z", "+00:00"))
    if isinstance(moment, datetime):
        moment = moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)
        return moment.timestamp()
    return float(moment) if isinstance(moment, int | float) else None
