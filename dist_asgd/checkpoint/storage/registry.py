"""Chooses the store that serves a URL, by the URL's protocol.

To add a store:

1. Write storage/<store>.py with a subclass of ``RemoteStore`` (object stores) or ``RenamedStore`` (folders, a rename).
2. Give the class an attribute ``backend``, a ``Backend`` that says all that is special about the store.
3. Import the driver inside functions only: importing it takes a second, and most users have one driver of several.
4. Add the class to ``STORES`` below.
5. Name the packages of the driver as an extra in pyproject.toml, and let tests/checkpoint/test_storage.py run on it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, TypeAlias

from dist_asgd.checkpoint.storage.azure import AzureStore
from dist_asgd.checkpoint.storage.connection import Connection
from dist_asgd.checkpoint.storage.gcs import GcsStore
from dist_asgd.checkpoint.storage.memory import MemoryStore
from dist_asgd.checkpoint.storage.posix import LocalStore
from dist_asgd.checkpoint.storage.remote import RemoteStore
from dist_asgd.checkpoint.storage.rename import RenamedStore
from dist_asgd.checkpoint.storage.retry import Requests
from dist_asgd.checkpoint.storage.s3 import S3Store
from dist_asgd.checkpoint.storage.sftp import SftpStore
from dist_asgd.checkpoint.storage.url import LOCAL, Target, parse_url

# A store serves the requests of ``Storage``, whose methods of the same names document them. It gets checked paths only.
Store: TypeAlias = LocalStore | RemoteStore

STORES: tuple[type[RemoteStore], ...] = (S3Store, GcsStore, AzureStore, SftpStore, MemoryStore)


def target_of(url: str | os.PathLike[str], options: Mapping[str, Any] | None) -> Target:
    """Returns the parts of a URL or path. Raises ValueError for a URL that cannot hold checkpoints as it stands."""
    return parse_url(url, options, lambda protocol: _remote_store(protocol).backend)


def store_of(target: Target) -> Store:
    """Returns the store that serves ``target``; makes no request. Raises StorageError where the driver is missing."""
    if target.protocol == LOCAL:
        return LocalStore(target.full, Requests(target.url))
    kind = _remote_store(target.protocol)
    return kind(Connection(target, kind.backend))


def _remote_store(protocol: str) -> type[RemoteStore]:
    """Returns the class of ``STORES`` for a protocol, or the one that needs nothing but fsspec's common methods."""
    return next((kind for kind in STORES if protocol in kind.backend.protocols), RenamedStore)
