"""Takes URLs and paths of checkpoints apart, keeps credentials out of what people see, and checks relative paths.

A URL is ``protocol://user:password@authority/path?query``. The authority, a host or a bucket, ends at the first slash;
user and password end at the last "@" before that slash. A user or password with a slash must be percent-encoded.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import quote, quote_plus, unquote

from dist_asgd.checkpoint.storage.backend import Backend

LOCAL = "file"  # the protocol of local paths
SECRET_OPTIONS = ("key", "secret", "token", "pass", "pwd", "credential", "auth", "cookie")  # parts of names
SHORTEST_SECRET = 4  # characters; shorter texts occur in any error by chance
SHORTEST_OF_ENVIRONMENT = 8  # characters; many variables with such names hold switches
NO_FRAGMENTS = ("http", "https")  # protocols whose drivers cut off what follows a "#"
MASK = "***"


@dataclass(frozen=True)
class Target:
    """The parts of a URL or local path below which files are read and written.

    Attributes:
        protocol: fsspec's protocol; "file" for local paths.
        base: the URL for fsspec up to the end of the authority, with credentials where the driver takes them from
            there; "" for local paths.
        path: the path for fsspec, which begins with "/" or is empty; an absolute path for local paths.
        url: the URL for messages, without user, password and query.
        options: storage options for fsspec; what the URL says beside base and path is among them.
        secrets: texts of the URL and the options that no message may contain.
    """

    protocol: str
    base: str = field(repr=False)
    path: str
    url: str
    options: Mapping[str, Any] = field(repr=False)
    secrets: tuple[str, ...] = field(repr=False)


@dataclass(frozen=True, slots=True)
class UrlParts:
    """The parts of a URL as they stand in it. ``repr`` shows none that may be secret."""

    protocol: str
    user: str = field(repr=False)  # "user:password"; "" where there is none
    authority: str
    path: str  # begins with "/", or is empty
    query: str = field(repr=False)  # without "?"; "" where there is none

    @property
    def url(self) -> str:
        """The URL without user, password and query."""
        return f"{self.protocol}://{f'{self.authority}{self.path}'.rstrip('/')}"


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
        ValueError: the URL cannot hold checkpoints as it stands, or a local path is given storage options. The message
            has no part of the URL that may be secret.
    """
    text = os.fspath(url)
    if not isinstance(text, str) or not text:
        raise ValueError(f"expected a URL or a path as a str, got {'an empty one' if text == '' else type(text)}")
    if "\0" in text:
        raise ValueError("expected a URL or a path, got one with a NUL character")
    options = dict(options or {})
    if protocol_of(text) == LOCAL:
        return _local(text.partition("://")[2] if "://" in text else text, options)
    parts = split_url(text)
    backend = backend_for(parts.protocol)
    if backend.has_container_before_at and parts.user and ":" not in parts.user:
        parts = replace(parts, user="", authority=f"{parts.user}@{parts.authority}")
    _check(parts, backend)
    secrets = set(secrets_of(options, backend))
    if not backend.user_options or ":" in parts.user:  # else: a name, which is no secret where it is known to be one
        secrets |= _secrets_of_parts(parts)
    if backend.user_options is None:
        base = f"{parts.protocol}://{parts.user}{'@' if parts.user else ''}{parts.authority}"
    else:
        base = f"{parts.protocol}://{parts.authority}"
        values = parts.user.split(":", 1) if parts.user else []
        for name, value in zip(backend.user_options, values, strict=False):
            options.setdefault(name, unquote(value))
    if parts.query and backend.query_option is not None:
        options.setdefault(backend.query_option, parts.query)
    return Target(parts.protocol, base, parts.path.rstrip("/"), parts.url, options, tuple(secrets))


def split_url(url: str) -> UrlParts:
    """Returns the parts of a URL with ``://``.

    Raises:
        ValueError: the URL is malformed, so that credentials cannot be told from the rest. The message has no part of
            the URL.
    """
    protocol, _, rest = url.partition("://")
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", protocol) or "::" in url:
        raise ValueError(
            "expected protocol://authority/path: chained URLs (a::b://...) cannot hold checkpoints, nor can paths with "
            "'::'. Give the URL of the store itself"
        )
    if re.search(r"[\x00-\x20\x7f]", rest.partition("/")[0]):
        raise ValueError(f"a {protocol}:// URL cannot have white space before its path: percent-encode it (%20)")
    authority, slash, path = rest.partition("/")
    user, at, authority = authority.rpartition("@")
    address, _, query = f"{authority}{slash}{path}".partition("?")
    authority, slash, path = address.partition("/")
    first = authority or path.lstrip("/").partition("/")[0]
    has_port = re.fullmatch(r"[^:]+:\d*", authority) is not None
    if not at and ":" in first and "@" in rest and not has_port:
        raise ValueError(
            f"a {protocol}:// URL has a user or password that is not percent-encoded: write '/' as %2F and '@' as %40, "
            "or give them as storage options"
        )
    return UrlParts(protocol, user, authority, slash + path, query)


def folder_and_name(url: str) -> tuple[str, str]:
    """Returns the URL or path of a file's folder, and the file's name. Raises ValueError where the name is missing."""
    if protocol_of(url) == LOCAL:
        before, path, after = "", url.partition("://")[2] if "://" in url else url, ""
    else:
        parts = split_url(url)
        before = f"{parts.protocol}://{parts.user}{'@' if parts.user else ''}"
        path, after = parts.authority + parts.path, f"?{parts.query}" if parts.query else ""
    folder, slash, name = path.rpartition("/")
    if not name or (before and not folder):
        raise ValueError("the path or URL names no file in a folder or bucket")
    return before + (folder or slash or os.curdir) + after, name


def without_credentials(url: str) -> str:
    """Returns a URL or path for messages: without user, password and query. Raises nothing."""
    if protocol_of(url) == LOCAL and not _LIKE_A_URL.match(url):
        return url
    try:
        return split_url(url).url
    except ValueError:
        return masked(url)


def masked(text: str) -> str:
    """Returns a text that may quote what users typed, with credentials and queries of URLs in it masked.

    Masks too much rather than too little: a URL's credentials may contain anything.
    """
    text = re.sub(r"[^\s'\"]+:[^\s].*@", f"{MASK}@", text, flags=re.DOTALL)
    text = re.sub(r"(:/[^\s?]*\?).*", rf"\1{MASK}", text, flags=re.DOTALL)
    return re.sub(rf"(\w*(?:{'|'.join(SECRET_OPTIONS)})\w*=)\S+", rf"\1{MASK}", text, flags=re.IGNORECASE)


def error_without_credentials(url: str, error: BaseException) -> str:
    """Returns the text of an error about ``url``, which may quote it, without what is secret in the URL.

    Of an error about a malformed URL the type is left: it may quote any part.
    """
    if protocol_of(url) == LOCAL and not _LIKE_A_URL.match(url):
        return redacted(str(error), ())
    try:
        return redacted(str(error), _secrets_of_parts(split_url(url)))
    except ValueError:
        return f"{type(error).__name__}, whose text is left out because it may quote credentials"


def redacted(text: str, secrets: Iterable[str]) -> str:
    """Returns ``text`` with ``***`` in place of each secret, however it is quoted, and of secrets in the environment.

    Drivers take credentials from environment variables, too, and quote them in errors.
    """
    known = {secret for secret in secrets if len(secret) >= SHORTEST_SECRET}
    known |= {value for value in secrets_of(dict(os.environ), Backend()) if len(value) >= SHORTEST_OF_ENVIRONMENT}
    forms = {form for secret in known for form in _forms(secret)}
    for form in sorted(forms, key=len, reverse=True):
        text = text.replace(form, MASK)
    return text


def _forms(secret: str) -> Iterator[str]:
    """Yields the forms in which a message may have a secret: as it is, in a URL, in a repr, and in an HTTP header."""
    yield from (secret, quote(secret, safe=""), quote(secret), quote_plus(secret), repr(secret)[1:-1])
    yield base64.b64encode(secret.encode(errors="surrogateescape")).decode().rstrip("=")


# Matches "s3:/bucket", "user:password@host" and, without the colon, "s3//bucket".
_LIKE_A_URL = re.compile(r"[A-Za-z0-9+.-]{2,}:/|[^/]+:[^/]*@|(?:s3a?|gc?s|az|abfss?|sftp|ssh|ftp|https?)//")


def _local(path: str, options: Mapping[str, Any]) -> Target:
    if _LIKE_A_URL.match(path):
        raise ValueError(
            "it is no local path and no URL: a URL has a colon and two slashes, of which pathlib makes one, so "
            "give a URL as a str ('s3://...'). A local path like that is written with ./ in front"
        )
    if options:
        raise ValueError(f"a local path takes no storage options, got {sorted(options)}")
    full = os.path.abspath(os.path.expanduser(path))
    return Target(LOCAL, "", full, full, {}, ())


def _check(parts: UrlParts, backend: Backend) -> None:
    """Raises ValueError for parts that the driver would lose, or take for something else."""
    start = f"a {parts.protocol}:// URL cannot have "
    if parts.query and backend.query_option is None:
        raise ValueError(f"{start}a query (?...) here: give it as a storage option")
    if "#" in parts.authority + parts.path and parts.protocol in NO_FRAGMENTS:
        raise ValueError(f"{start}a fragment (#...): write %23 where the path has a '#'")
    is_password_cut = "@" in parts.path and re.fullmatch(r"[^:]+:\d+", parts.authority)
    if backend.user_options == () and (parts.user or is_password_cut):
        raise ValueError(f"{start}a user or password: give credentials as storage options")
    if not backend.user_options and re.search(r"[?#]", parts.user):
        raise ValueError(f"{start}'?' or '#' in a user or password: percent-encode them (%3F, %23)")


def _secrets_of_parts(parts: UrlParts) -> set[str]:
    """Returns what is secret in a URL: user and password, and the query with each of its values."""
    user, colon, password = parts.user.partition(":")
    found = {parts.user, password} if colon else {user}
    found |= {parts.query, *re.findall(r"=([^&]*)", parts.query)}
    return {text for secret in found for text in (secret, unquote(secret))}


def secrets_of(options: Any, backend: Backend, is_secret: bool = False) -> Iterator[str]:
    """Yields the texts in storage options that are secret by their name, or by the name of an option around them."""
    if isinstance(options, Mapping):
        for name, value in options.items():
            named = any(part in str(name).lower() for part in (*SECRET_OPTIONS, *backend.secret_options))
            yield from secrets_of(value, backend, is_secret or named)
    elif isinstance(options, list | tuple | set | frozenset):
        for value in options:
            yield from secrets_of(value, backend, is_secret)
    elif isinstance(options, bytes):
        yield from secrets_of(options.decode(errors="replace"), backend, is_secret)
    elif isinstance(options, int) and is_secret:
        yield str(options)
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
