"""Chooses the store that serves a URL, by the URL's protocol. CONTRIBUTING.md tells how to add a store.

A store's module imports its driver inside functions only: importing one takes a second, and most users have one of
several.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, TypeAlias

from dist_asgd.checkpoint.storage.azure import AzureStore
from dist_asgd.checkpoint.storage.connection import Connection, FileSystems
from dist_asgd.checkpoint.storage.gcs import GcsStore
from dist_asgd.checkpoint.storage.memory import MemoryStore
from dist_asgd.checkpoint.storage.posix import LocalStore
from dist_asgd.checkpoint.storage.remote import RemoteStore
from dist_asgd.checkpoint.storage.rename import RenamedStore
from dist_asgd.checkpoint.storage.retry import Requests
from dist_asgd.checkpoint.storage.s3 import S3Store
from dist_asgd.checkpoint.storage.sftp import SftpStore
from dist_asgd.checkpoint.storage.url import LOCAL, Target, parse_url
from dist_asgd.checkpoint.storage.web import WebStore

# A store serves the requests of ``Storage``, whose methods of the same names document them. It gets checked paths only.
Store: TypeAlias = LocalStore | RemoteStore

STORES: tuple[type[RemoteStore], ...] = (S3Store, GcsStore, AzureStore, SftpStore, WebStore, MemoryStore)


def target_of(url: str | os.PathLike[str], options: Mapping[str, Any] | None) -> Target:
    """Returns the parts of a URL or path. Raises ValueError for a URL that cannot hold checkpoints as it stands."""
    return parse_url(url, options, lambda protocol: _remote_store(protocol).backend)


def store_of(target: Target, retry_timeout: float, known: list[FileSystems] | None = None) -> Store:
    """Returns the store that serves ``target``; makes no request. Raises StorageError where the driver is missing.

    Args:
        retry_timeout: seconds after its first failure during which a request is tried again.
        known: file systems that may be used, as in ``Connection``.
    """
    if target.protocol == LOCAL:
        return LocalStore(target.path, Requests(target.url, retry_timeout))
    kind = _remote_store(target.protocol)
    return kind(Connection(target, kind.backend, retry_timeout, known))


def _remote_store(protocol: str) -> type[RemoteStore]:
    """Returns the class of ``STORES`` for a protocol, or the one that needs nothing but fsspec's common methods."""
    return next((kind for kind in STORES if protocol in kind.backend.protocols), RenamedStore)
