"""URLs are taken apart by one parser: what is no secret comes back whole, and what is one is never shown."""

import contextlib
import re
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_asgd.checkpoint.storage.registry import target_of
from dist_asgd.checkpoint.storage.storage import Storage
from dist_asgd.checkpoint.storage.url import (
    error_without_credentials,
    folder_and_name,
    masked,
    redacted,
    without_credentials,
)

SECRET = "sesame"
TEXT = st.text(st.characters(min_codepoint=33, max_codepoint=0x2FF, exclude_characters="\x7f"), max_size=8)
HOSTS = st.sampled_from(["host", "host.example.org", "host:22", "127.0.0.1:8080"])
PART = st.sampled_from(["run", "12:30", "user@host", "a:b@c", "a#b", "#", "a%20b", "%3F", "ü", "a b", "x&y=z"])
PATHS = st.lists(PART, min_size=1, max_size=4).map("/".join)


@given(st.sampled_from(["sftp", "ssh", "ftp", "nonsense"]), TEXT, TEXT, HOSTS, PATHS)
@settings(max_examples=200, deadline=None)
def test_encoded_credentials_are_taken_out_and_all_else_comes_back(
    protocol: str, user: str, more: str, host: str, path: str
) -> None:
    password = SECRET + more
    url = f"{protocol}://{quote(user, safe='')}:{quote(password, safe='')}@{host}/{path}"
    target = target_of(url, None)
    shown = f"{protocol}://{host}/{path}"
    assert target.url == shown and SECRET not in repr(target)
    assert target_of(shown, None).url == shown == without_credentials(shown)
    assert without_credentials(url) == shown
    assert target.path == f"/{path}"
    if protocol in ("sftp", "ssh"):
        assert target.options == {"username": user, "password": password} and target.base == f"{protocol}://{host}"
    for text in (f"no {url}", f"no {password!r} there", f"({quote(password)})"):
        assert SECRET not in redacted(text, target.secrets)
        assert SECRET not in error_without_credentials(url, ValueError(text))


@given(
    st.sampled_from(["s3", "gs", "az", "abfs", "sftp", "https", "memory", "nonsense", "S3"]),
    st.sampled_from(["://", ":/", ":///"]),
    TEXT.filter(lambda user: "/" not in user),  # "s3://bucket/a:b@c" is a bucket and a path, whatever was meant
    TEXT,
    HOSTS,
    PATHS,
)
@settings(max_examples=400, deadline=None)
def test_however_credentials_are_typed_they_are_not_shown(
    protocol: str, separator: str, user: str, more: str, host: str, path: str
) -> None:
    url = f"{protocol}{separator}{user}:{SECRET}{more}@{host}/{path}"
    texts = [without_credentials(url), masked(f"unrecognized arguments: --out {url}"), masked(f"invalid: {url!r}")]
    try:
        target = target_of(url, None)
        texts += [target.url, repr(target)]
    except ValueError as error:
        texts.append(f"{error} {error!r} {error.__cause__!r} {error.__context__!r}")
    with contextlib.suppress(ValueError):
        folder_and_name(url)
    assert not [text for text in texts if SECRET in text]


@pytest.mark.parametrize(
    ("url", "message"),
    {
        "s3://sesame-key:sesame@bucket/run": "give credentials as storage options",
        "s3://key:123/sesame@bucket/run": "give credentials as storage options",
        "gs://token-sesame@bucket/run": "give credentials as storage options",
        "sftp://user:sesame/1@host/run": "write '/' as %2F",
        "s3:/key:sesame@bucket/run": "two slashes",
        "key:sesame@bucket/run": "two slashes",
        "s3//key:sesame@bucket/run": "two slashes",
        "file://user:sesame@host/run": "two slashes",
        "s3:///key:sesame@bucket/run": "not percent-encoded",
        "az:/c/run?sig=sesame": "two slashes",
        "s3://bucket/run?X-Amz-Signature=sesame": "storage option",
        "https://host/run?X-Amz-Signature=sesame": "storage option",
        "https://host/run#1": "%23",
        "https://a:b?sesame@host/run": "percent-encode",
        "key:sesame@s3://bucket": "expected protocol://",
        "a::s3://key:sesame@bucket": "chained",
        "s3://key\0sesame@bucket": "NUL",
        b"s3://key:sesame@bucket": "as a str",
        "sftp://us er:sesame@host/x": "white space",
    }.items(),
    ids=str,
)
def test_refusals_say_what_to_do_and_quote_nothing(url: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        Storage.open(url)
    assert SECRET not in str(raised.value)


@pytest.mark.parametrize(
    ("url", "folder", "name"),
    [
        ("s3://bucket/run/x.pt", "s3://bucket/run", "x.pt"),
        ("sftp://user:a?b@host/run/x.pt", "sftp://user:a?b@host/run", "x.pt"),
        ("az://container/x.pt?sig=a/b", "az://container?sig=a/b", "x.pt"),
        ("file:///x.pt", "/", "x.pt"),
        ("x.pt", ".", "x.pt"),
    ],
)
def test_the_folder_of_a_file(url: str, folder: str, name: str) -> None:
    assert folder_and_name(url) == (folder, name)
