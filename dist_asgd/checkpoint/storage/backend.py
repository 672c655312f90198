"""Declares the facts about one kind of store and its fsspec driver on which the rest of storage/ depends.

The module of each store (storage/s3.py and its neighbours) fills in one ``Backend``; storage/registry.py collects them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Backend:
    """Facts about one kind of store. The defaults suit a store of which nothing but its fsspec protocol is known.

    Exception classes are given by qualified name, so that no driver has to be imported before it is used.

    Attributes:
        protocols: fsspec protocols (the part of a URL before ``://``) that the store answers to.
        extra: name of the extra of dist-asgd's distribution that installs the driver.
        exclusive_since: name of a package and the first version of it that can create a file exclusively. Older
            versions are refused, because they overwrite without an error.
        options: returns the storage options for fsspec, given the user's.
        prepare: called with each new fsspec file system before it is used.
        close: called with a file system whose connection may be broken, and that nobody uses any more. Does not block.
        is_thread_safe: whether one file system object serves all threads although it is not asynchronous.
        query_option: storage option that takes over the query of a URL; None refuses URLs with a query.
        user_options: storage options that take over user and password of a URL; () refuses them, where the driver takes
            them for a part of a bucket's name; None leaves them in the URL for the driver.
        has_container_before_at: whether "name@" before the host is the name of a container, not of a user.
        secret_options: parts of names of storage options that are secret in this store, beyond the usual ones.
        secret_fields: names of ``name=value`` fields inside secret options whose value alone is secret, too.
        transient_codes: error codes of the store after which the request may succeed a moment later.
        transient_errors: exception classes after which the request may succeed a moment later.
        permanent_errors: exception classes after which it will not, although a base class is transient.
        transient_texts: parts of messages after which it may succeed, whatever the class of the exception.
        permanent_texts: parts of messages after which it will not, although the class is transient.
        missing_container_codes: error codes of the store for a bucket or container that does not exist.
    """

    protocols: tuple[str, ...] = ()
    extra: str | None = None
    exclusive_since: tuple[str, tuple[int, ...]] | None = None
    options: Callable[[Mapping[str, Any]], dict[str, Any]] = dict
    prepare: Callable[[Any], None] = lambda fs: None
    close: Callable[[Any], None] = lambda fs: None
    is_thread_safe: bool = False
    query_option: str | None = None
    user_options: tuple[str, ...] | None = None
    has_container_before_at: bool = False
    secret_options: tuple[str, ...] = ()
    secret_fields: tuple[str, ...] = ()
    transient_codes: frozenset[str] = frozenset()
    transient_errors: frozenset[str] = frozenset()
    permanent_errors: frozenset[str] = frozenset()
    transient_texts: frozenset[str] = frozenset()
    permanent_texts: frozenset[str] = frozenset()
    missing_container_codes: frozenset[str] = frozenset()


def classes_in(module: str, *names: str) -> frozenset[str]:
    """Returns the qualified names of a module's classes."""
    return frozenset(f"{module}.{name}" for name in names)


def without_listings_cache(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns storage options with which a driver does not answer listings from memory: other hosts write, too."""
    return {"use_listings_cache": False, **options}
