"""Takes URLs and paths of checkpoints apart, keeps credentials out of what people see, and checks relative paths."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from dist_asgd.checkpoint.storage.backend import Backend

LOCAL = "file"  # the protocol of local paths
SECRET_OPTIONS = ("key", "secret", "token", "pass", "credential", "authorization")  # parts of names, in any store
SHORTEST_SECRET = 4  # characters; shorter texts occur in any error by chance


@dataclass(frozen=True)
class Target:
    """The parts of a URL or local path below which files are read and written.

    Attributes:
        protocol: fsspec's protocol; "file" for local paths.
        full: the URL for fsspec, with user and password but without the query; an absolute path for local paths.
        url: the URL for messages, without user, password and query.
        options: storage options for fsspec, the query of the URL among them.
        secrets: texts of the URL and the options that no message may contain, the longest first.
    """

    protocol: str
    full: str = field(repr=False)
    url: str
    options: Mapping[str, Any] = field(repr=False)
    secrets: tuple[str, ...] = field(repr=False)


def protocol_of(url: str) -> str:
    """Returns the protocol of a URL or path; ``LOCAL`` for paths, file:// and local://."""
    protocol, separator, _ = url.partition("://")
    return LOCAL if not separator or protocol == "local" else protocol


def parse_url(
    url: str | os.PathLike[str], options: Mapping[str, Any] | None, backend_for: Callable[[str], Backend]
) -> Target:
    """Returns the parts of a URL.

    Args:
        options: storage options for fsspec.
        backend_for: returns the backend of a protocol.

    Raises:
        ValueError: the URL cannot hold checkpoints as it stands, or a local path is given storage options.
    """
    text = os.fspath(url)
    if not isinstance(text, str) or not text or "\0" in text:
        raise ValueError(f"expected a URL or a path, got {text!r}")
    options = dict(options or {})
    protocol, (_, separator, rest) = protocol_of(text), text.partition("://")
    if separator and "::" in text:
        raise ValueError("chained URLs (a::b://...) cannot hold checkpoints: give the URL of the store itself")
    if protocol == LOCAL:
        return _local(rest if separator else text, options)
    backend = backend_for(protocol)
    secrets = set(_secrets_of(options, backend))
    rest, query = _without_query(protocol, rest, options, backend.query_option)
    secrets |= {query, *re.findall(r"=([^&]*)", query)}
    shown, user = _without_user(rest, backend.has_container_before_at)
    secrets |= {user, *user.split(":")[1:]}
    kept = sorted((secret for secret in secrets if len(secret) >= SHORTEST_SECRET), key=len, reverse=True)
    rest, shown = rest.rstrip("/"), shown.rstrip("/")
    return Target(protocol, f"{protocol}://{rest}", f"{protocol}://{shown}", options, tuple(kept))


def folder_and_name(url: str) -> tuple[str, str]:
    """Returns the URL or path of a file's folder, and the file's name. Raises ValueError where the name is missing."""
    address, question, query = url.partition("?") if "://" in url else (url, "", "")
    folder, slash, name = address.rpartition("/")
    if not name or folder.endswith(":/"):
        raise ValueError("the path or URL names no file in a folder or bucket")
    above = folder or (slash if slash else os.curdir)
    return above + question + query, name


def _local(path: str, options: Mapping[str, Any]) -> Target:
    if re.match(r"[a-z0-9+]{2,}:/", path):
        raise ValueError(
            f"{path!r} is no local path and no URL: pathlib makes one slash of two, so give a URL as a str ('s3://...')"
        )
    if options:
        raise ValueError(f"a local path takes no storage options, got {sorted(options)}")
    full = os.path.abspath(os.path.expanduser(path))
    return Target("file", full, full, {}, ())


def _without_query(protocol: str, rest: str, options: dict[str, Any], option: str | None) -> tuple[str, str]:
    """Returns the rest of a URL without its query, and the query, which moves into the storage option ``option``.

    No query can stay in the URL, because names of files are put behind it.
    """
    rest, _, query = rest.partition("?")
    if query:
        if option is None:
            raise ValueError(f"a {protocol}:// URL cannot have a query (?...) here: give it as a storage option")
        options.setdefault(option, query)
    return rest, query


def _without_user(rest: str, has_container: bool) -> tuple[str, str]:
    """Returns the rest of a URL without "user:password@", and "user:password"; "" where there is none."""
    user, at, after = rest.rpartition("@")
    if not at:
        return rest, ""
    if ":" in user:  # after the last @ of all, because a password may contain a slash
        return after, user
    host, slash, path = rest.partition("/")
    user, at, after = host.rpartition("@")
    if not at or has_container:  # abfs://container@account
        return rest, ""
    return after + slash + path, user


def _secrets_of(options: Any, backend: Backend, is_secret: bool = False) -> Iterator[str]:
    """Yields the texts in storage options that are secret by their name, or by the name of an option around them."""
    if isinstance(options, Mapping):
        for name, value in options.items():
            named = any(part in str(name).lower() for part in (*SECRET_OPTIONS, *backend.secret_options))
            yield from _secrets_of(value, backend, is_secret or named)
    elif isinstance(options, list | tuple):
        for value in options:
            yield from _secrets_of(value, backend, is_secret)
    elif isinstance(options, str):
        yield from re.findall(r"//[^/@]*:([^/@]*)@", options)  # the password in the URL of a proxy or an endpoint
        if is_secret:
            yield options
            for name in backend.secret_fields:
                yield from re.findall(rf"{name}=([^;&]*)", options)


def checked_path(path: str, may_be_empty: bool = False) -> str:
    """Returns ``path`` if it is relative, stays below the URL and means one file on every store.

    Paths are checked because they may come from a manifest that somebody else wrote. Wildcards are refused because
    fsspec expands them.

    Args:
        may_be_empty: whether "" is allowed, which stands for the URL itself.

    Raises:
        ValueError: the path is unsafe.
    """
    if path == "" and may_be_empty:
        return path
    if not isinstance(path, str) or any(part in ("", ".", "..") for part in path.split("/")):
        raise ValueError(f"unsafe path {path!r}: expected a relative one without empty parts, '.' and '..'")
    if re.search(r"[\\*?\[\]\x00-\x1f\x7f]", path):
        raise ValueError(f"unsafe path {path!r}: no backslashes, wildcards (* ? [ ]) or control characters")
    return path
