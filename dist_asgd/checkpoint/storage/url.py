"""Where a checkpoint lies: URLs with and without credentials, and relative paths that stay below them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

LOCAL = {"file", "local"}
AZURE = {"abfs", "abfss", "az", "adl"}
SECRET_NAMES = re.compile(r"key|secret|token|pass|credential|sas|connection_string|authorization", re.IGNORECASE)
SHORTEST_SECRET = 4  # shorter ones would be found in any text


@dataclass(frozen=True)
class Target:
    """A URL taken apart.

    Attributes:
        protocol: of fsspec; "file" for paths.
        full: what fsspec is given, credentials included; for "file" an absolute path.
        url: for people: the same without user, password and query.
        options: storage options of fsspec.
        secrets: texts of the URL and the options that nobody may see.
    """

    protocol: str
    full: str = field(repr=False)
    url: str
    options: Mapping[str, Any] = field(repr=False)
    secrets: tuple[str, ...] = field(repr=False)


def target_of(url: str | os.PathLike[str], options: Mapping[str, Any] | None) -> Target:
    """Raises ValueError for a URL that cannot be meant as it stands."""
    text = os.fspath(url)
    if not isinstance(text, str) or not text or "\0" in text:
        raise ValueError(f"expected a URL or a path, got {text!r}")
    options = dict(options or {})
    protocol, separator, rest = text.partition("://")
    if not separator:
        return _local(text, options)
    if "::" in protocol or "::" in rest:
        raise ValueError("chained URLs (a::b://...) cannot hold checkpoints: give the URL of the store itself")
    if protocol in LOCAL:
        return _local(rest, options)
    secrets = set(_secrets_of(options))
    rest, query = _without_query(protocol, rest, options)
    secrets |= {query, *re.findall(r"=([^&]*)", query)}
    shown, user = _without_user(protocol, rest)
    secrets |= {user, *user.split(":")[1:]}
    kept = sorted((secret for secret in secrets if len(secret) >= SHORTEST_SECRET), key=len, reverse=True)
    rest, shown = rest.rstrip("/"), shown.rstrip("/")
    return Target(protocol, f"{protocol}://{rest}", f"{protocol}://{shown}", options, tuple(kept))


def folder_and_name(url: str) -> tuple[str, str]:
    """The URL or path of the folder of a file, and the file's name. Raises ValueError where it is no file's."""
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


def _without_query(protocol: str, rest: str, options: dict[str, Any]) -> tuple[str, str]:
    """No query can stay, since names of files are put after the URL; Azure's signatures move into the options."""
    rest, _, query = rest.partition("?")
    if query:
        if protocol not in AZURE:
            raise ValueError(f"a {protocol}:// URL cannot have a query (?...) here: give it as a storage option")
        options.setdefault("sas_token", query)
    return rest, query


def _without_user(protocol: str, rest: str) -> tuple[str, str]:
    """(the rest of a URL without "user:password@", what was taken away)."""
    user, at, after = rest.rpartition("@")
    if not at:
        return rest, ""
    if ":" in user:  # a secret may contain a slash, so this goes by the last @ of all
        return after, user
    host, slash, path = rest.partition("/")
    user, at, after = host.rpartition("@")
    if not at or protocol in AZURE:  # abfs://container@account
        return rest, ""
    return after + slash + path, user


def _secrets_of(options: Any, named: bool = False) -> Iterator[str]:
    """Texts among storage options whose name, or an outer one's, says that they are secret."""
    if isinstance(options, Mapping):
        for name, value in options.items():
            yield from _secrets_of(value, named or bool(SECRET_NAMES.search(str(name))))
    elif isinstance(options, list | tuple):
        for value in options:
            yield from _secrets_of(value, named)
    elif isinstance(options, str):
        yield from re.findall(r"//[^/@]*:([^/@]*)@", options)  # a proxy, an endpoint
        if named:
            yield options
            yield from re.findall(r"(?:AccountKey|SharedAccessSignature|sig)=([^;&]*)", options)


def checked_path(path: str, may_be_empty: bool = False) -> str:
    """``path`` if it names something below the URL and means the same on every store; ValueError otherwise.

    Names may come from a manifest that somebody else wrote. Wildcards are refused because fsspec expands them.
    """
    if path == "" and may_be_empty:
        return path
    if not isinstance(path, str) or any(part in ("", ".", "..") for part in path.split("/")):
        raise ValueError(f"unsafe path {path!r}: expected a relative one without empty parts, '.' and '..'")
    if re.search(r"[\\*?\[\]\x00-\x1f\x7f]", path):
        raise ValueError(f"unsafe path {path!r}: no backslashes, wildcards (* ? [ ]) or control characters")
    return path
