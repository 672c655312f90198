"""Tests storage/ on real servers: one contract for every store, and faults that really happen."""

import errno
import functools
import gc
import http.server
import itertools
import logging
import os
import random
import re
import resource
import signal
import subprocess
import sys
import threading
import time
import traceback
import uuid
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from dist_asgd.checkpoint.storage import multipart, registry, retry
from dist_asgd.checkpoint.storage import storage as storage_module
from dist_asgd.checkpoint.storage.backend import Backend, classes_in
from dist_asgd.checkpoint.storage.registry import target_of
from dist_asgd.checkpoint.storage.rename import RenamedStore
from dist_asgd.checkpoint.storage.storage import Storage, StorageError
from tests.support.ranks import RankError, message_of, run_alone
from tests.support.stores import (  # noqa: F401
    AZURE_ACCOUNT,
    AZURE_KEY,
    answering,
    azure_options,
    azure_server,
    gcs_server,
    proxied,
    running,
    s3_options,
    s3_server,
    seaweedfs,
    sessions,
    sftp_server,
)

STORES = ["file", "memory", "s3", "azure", "gcs", "sftp"]
RETRY_LIMITS = [None, "5", -1, float("nan"), float("inf"), True]
UNSAFE = ["", "/etc/passwd", "../x", "a/../../x", "a//b", "a/", "./a", "a\\b", "a\0b", "a*", "a?b", "a[0-9]", "a\nb"]


@pytest.fixture(params=STORES)
def place(request, tmp_path):
    """Returns (URL, storage options) of a place on each store where nothing is."""
    if request.param == "file":
        return str(tmp_path / "not yet" / "there"), None
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}/run", None
    server = request.getfixturevalue(f"{request.param}_server")
    return server.new_url(), server.options


@pytest.fixture
def storage(place):
    return Storage.open(*place)


def test_create_is_exclusive(storage):
    storage.create("step/manifest.json", b"first")
    with pytest.raises(FileExistsError) as raised:
        storage.create("step/manifest.json", b"first")
    assert storage.url in str(raised.value)
    assert storage.read("step/manifest.json") == b"first"
    assert storage.sizes() == {"step/manifest.json": 5}


def test_one_of_eight_creates_wins(storage):
    won, lost, start = [], [], threading.Barrier(8)

    def create(number):
        start.wait()
        try:
            storage.create("latest", b"%d" % number)
            won.append(b"%d" % number)
        except FileExistsError:
            lost.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(lost)) == (1, 7)
    assert storage.read("latest") == won[0]


def test_eight_writers_make_the_same_folders(storage):
    """A driver that looks for a folder before it makes it fails where another has made it in between."""
    start = threading.Barrier(8)

    def write(number):
        start.wait()
        try:
            storage.create(f"a/b/c/d/e/f/{number}", b"%d" % number)
        except Exception as error:
            failures.append(error)

    failures = []
    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert storage.sizes() == {f"a/b/c/d/e/f/{number}": 1 for number in range(8)}


def test_write_and_read_back(storage):
    chunks = [b"abc", bytearray(b"defg"), memoryview(b"hi"), memoryview(bytearray(16)).cast("d"), b""]
    data = b"abcdefghi" + bytes(16)
    assert storage.write("a/b/c", iter(chunks)) == len(data)
    assert storage.read("a/b/c") == data
    assert storage.write("empty", []) == 0
    assert storage.read("empty") == b""
    assert storage.write("empty", [b"no more"]) == 7
    assert storage.read("empty") == b"no more"


def test_a_chunk_may_be_overwritten_afterwards(storage):
    def chunks():
        buffer = bytearray(1000)
        for number in range(5):
            buffer[:] = bytes([number]) * 1000
            yield memoryview(buffer)

    storage.write("shard", chunks())
    assert storage.read("shard") == b"".join(bytes([number]) * 1000 for number in range(5))


def test_nothing_appears_when_the_chunks_fail(storage):
    class Failed(OSError):
        """An error of the caller, which must pass unchanged."""

    def chunks():
        yield b"x" * 1000
        raise Failed("disk of the caller")

    with pytest.raises(Failed, match="disk of the caller"):
        storage.write("step/shard", chunks())
    assert storage.sizes() == {}
    with pytest.raises(FileNotFoundError):
        storage.read("step/shard")


def test_ranges(storage):
    data = bytes(range(256)) * 20
    storage.write("a", [data])
    storage.write("b/c", [data[::-1]])
    ranges = [("a", 0, 5120), ("b/c", 1, 2), ("a", 17, 17), ("a", 5000, 5120)]
    ranges += [("a" if start % 2 else "b/c", start, start + 33) for start in range(0, 5000, 100)]
    found = dict(storage.read_ranges(ranges))
    whole = {"a": data, "b/c": data[::-1]}
    assert found == {index: whole[path][start:stop] for index, (path, start, stop) in enumerate(ranges)}
    assert list(storage.read_ranges([])) == []


def test_ranges_beyond_the_end_and_missing_files(storage):
    storage.write("a", [b"0123456789"])
    for wrong in [("a", 5, 11), ("a", 10, 12), ("a", 50, 60)]:
        with pytest.raises(StorageError, match=r"a.*shorter"):
            list(storage.read_ranges([("a", 0, 10), wrong]))
    with pytest.raises(FileNotFoundError, match="missing"):
        list(storage.read_ranges([("a", 0, 10), ("missing", 0, 10)]))
    for wrong in [(-1, 5), (5, 4)]:
        with pytest.raises(ValueError, match="start <= stop"):
            storage.read_ranges([("a", *wrong)])


def test_listing(storage, place):
    assert storage.list() == {} == storage.list("nowhere") == storage.sizes("nowhere")
    for path in ["top", "step-1/manifest.json", "step-1/0/shard", "step-1/0/shard2", "step-10/x"]:
        storage.write(path, [path.encode()])
    assert storage.list() == {"top": 3, "step-1": None, "step-10": None}
    assert storage.list("step-1") == {"manifest.json": 20, "0": None}
    assert storage.sizes("step-1") == {"manifest.json": 20, "0/shard": 14, "0/shard2": 15}
    assert len(storage.sizes()) == 5
    Storage.open(*place).write("step-2/x", [b"seen at once by others"])
    assert "step-2" in storage.list()


def test_removal(storage):
    for path in ["a/1", "a/b/2", "a/b/c/3", "ab/4", "5"]:
        storage.create(path, b"x")
    storage.remove("5")
    storage.remove("5")
    storage.remove("nowhere/6")
    storage.remove_tree("a")
    storage.remove_tree("a")
    assert storage.list() == {"ab": None}
    assert storage.sizes() == {"ab/4": 1}
    storage.remove_tree("ab/4")
    assert storage.sizes() == {}


@pytest.mark.parametrize("path", UNSAFE)
def test_unsafe_paths_are_refused(tmp_path, path):
    storage = Storage.open(tmp_path / "run")
    calls = [
        lambda: storage.create(path, b""),
        lambda: storage.write(path, [b"x"]),
        lambda: storage.read(path),
        lambda: storage.read_ranges([(path, 0, 1)]),
        lambda: storage.remove(path),
        lambda: storage.remove_tree(path),
    ]
    if path:
        calls += [lambda: storage.list(path), lambda: storage.sizes(path), lambda: storage.abort_uploads(path, 0)]
        calls += [lambda: storage.modified(path)]
    for call in calls:
        with pytest.raises(ValueError, match="unsafe path"):
            call()
    assert list(tmp_path.iterdir()) == []


def test_modified(storage):
    now = time.time()
    storage.write("step/0/shard", [b"x"])
    storage.create("step/manifest", b"x")
    for path in ["step/0/shard", "step/manifest", "step"]:
        assert abs(storage.modified(path) - now) < 60
    assert storage.modified("nowhere") is None


# Large files

PART = 5 * 2**20  # the least that S3 takes


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(multipart, "PART", PART)


def opened(request, tmp_path, store):
    if store == "file":
        return str(tmp_path), None
    server = request.getfixturevalue(f"{store}_server")
    return server.new_url(), server.options


def cut(data, *sizes):
    start = 0
    for size in itertools.cycle(sizes):
        if start >= len(data):
            return
        yield memoryview(data)[start : start + size]
        start += size


@pytest.mark.parametrize("size", [PART - 1, PART, PART + 1, 2 * PART, 6 * PART + 7])
@pytest.mark.parametrize("store", ["s3", "azure", "gcs"])
def test_parts_make_the_file(request, tmp_path, small_parts, store, size):
    storage = Storage.open(*opened(request, tmp_path, store))
    data = random.Random(size).randbytes(size)
    assert storage.write("shard", cut(data, 1, 30_000, 2 * PART)) == size
    assert storage.read("shard") == data
    assert dict(storage.read_ranges([("shard", PART - 9, PART - 1), ("shard", size - 7, size)])) == {
        0: data[PART - 9 : PART - 1],
        1: data[-7:],
    }
    assert storage.abort_uploads("", -5) == 0


@pytest.mark.parametrize("store", ["s3", "azure", "gcs", "sftp", "file"])
def test_an_upload_that_ends_half_way_leaves_nothing(request, tmp_path, small_parts, store):
    storage = Storage.open(*opened(request, tmp_path, store))
    for kind in (ZeroDivisionError, KeyboardInterrupt):

        def chunks(kind=kind):
            yield bytes(2 * PART + 1)
            raise kind("mine")

        with pytest.raises(kind, match="mine"):
            storage.write("step/shard", chunks())
        gc.collect()  # fsspec's own files publish a part when they are collected
    assert storage.sizes() == {}
    assert storage.abort_uploads("", -5) == 0


def killed_while_writing(place):
    def chunks():
        yield bytes(2 * PART + 1)
        os.kill(os.getpid(), signal.SIGKILL)

    Storage.open(*place).write("step-1/shard", chunks())


@pytest.mark.parametrize("store", ["s3", "sftp", "file"])
def test_what_killed_writers_leave_is_cleared_away(request, tmp_path, small_parts, store):
    """Unfinished files go only where they lie below the prefix and are old."""
    place = opened(request, tmp_path, store)
    with pytest.raises(RankError, match="killed"):
        run_alone(killed_while_writing, place)
    storage = Storage.open(*place)
    assert storage.sizes() == {}
    assert storage.abort_uploads("step-1", 3600) == 0
    assert storage.abort_uploads("step-10", -5) == storage.abort_uploads("step", -5) == 0
    assert storage.abort_uploads("step-1", -5) == 1
    assert storage.abort_uploads("step-1", -5) == 0


def test_the_store_dies_in_the_middle_of_an_upload(small_parts):
    """SeaweedFS gets SIGKILL; when it runs again, it shows no file, and the unfinished upload can be cleared away."""
    with running(seaweedfs()) as server:
        storage = Storage.open(server.new_url(), server.options, retry_timeout=1)
        storage.create("before", b"x")

        def chunks():
            yield bytes(2 * PART + 1)
            server.kill()
            yield bytes(2 * PART)

        with pytest.raises(StorageError, match=r"could not write s3://.*step/shard: .*\d tries in \d+ s"):
            storage.write("step/shard", chunks())
        server.start()
        assert storage.sizes() == {"before": 1}
        assert storage.abort_uploads("step", -5) == 1
        assert storage.write("step/shard", [b"now"]) == 3
        assert storage.sizes() == {"before": 1, "step/shard": 3}


# A bad network


@pytest.mark.parametrize("fault", ["cut_requests", "cut_answers"])
@pytest.mark.parametrize("store", ["s3", "azure", "gcs", "sftp"])
def test_connections_that_break_are_made_again(request, tmp_path, monkeypatch, small_parts, store, fault):
    """A create whose request was carried out while its answer was lost finds its own file and succeeds."""
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.02)
    server = request.getfixturevalue(f"{store}_server")
    data = bytes(range(256)) * (PART // 100)
    with proxied(server) as (proxy, options):
        storage = Storage.open(server.new_url(), options)
        setattr(proxy, fault, 3)
        storage.create("manifest", b"mine")
        assert getattr(proxy, fault) == 0
        with pytest.raises(FileExistsError):
            storage.create("manifest", b"mine")
        setattr(proxy, fault, 3)
        assert storage.write("shard", cut(data, 1_300_000)) == len(data)
        setattr(proxy, fault, 3)
        assert dict(storage.read_ranges([("shard", i * 1000, i * 1000 + 1000) for i in range(20)])) == {
            i: data[i * 1000 : i * 1000 + 1000] for i in range(20)
        }
        setattr(proxy, fault, 2)
        assert storage.sizes() == {"manifest": 4, "shard": len(data)}
        setattr(proxy, fault, 2)
        storage.remove_tree("shard")
        assert getattr(proxy, fault) == 0
    assert Storage.open(storage.url, server.options).sizes() == {"manifest": 4}


@pytest.mark.parametrize("store", ["s3", "azure", "gcs", "sftp"])
def test_a_network_that_stays_away_is_told_without_credentials(request, monkeypatch, caplog, capfd, store):
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.01)
    server = request.getfixturevalue(f"{store}_server")
    with proxied(server) as (_, options):
        pass  # nobody listens there any more
    if store == "sftp":
        options["password"] = "secret-of-tests"
    caplog.set_level(logging.DEBUG, "dist_asgd")
    storage = Storage.open(server.new_url(), options, retry_timeout=0.05)
    for call in [
        lambda: storage.create("x", b""),
        lambda: storage.read("x"),
        lambda: storage.write("x", [b"x"]),
        lambda: storage.sizes(),
        lambda: storage.list("folder"),
        lambda: storage.modified("folder"),
        lambda: list(storage.read_ranges([("x", 0, 1)])),
    ]:
        with pytest.raises(StorageError, match=rf"could not .* {re.escape(storage.url)}.*\d tries in") as raised:
            call()
        told = "".join(traceback.format_exception(raised.value)) + repr(raised.value) + repr(storage)
        assert not any(secret in told for secret in SECRETS)
    shown = caplog.text + "".join(capfd.readouterr())
    assert not any(secret in shown for secret in SECRETS)


SECRETS = ["secret-of-tests", AZURE_KEY]


def test_secrets_in_drivers_errors_are_taken_out():
    """botocore's errors contain the whole URL of the endpoint."""
    options = {"key": "some-access-key", "secret": "shh-secret", "endpoint_url": "http://127.0.0.1:9/shh-secret"}
    storage = Storage.open("s3://bucket/run", options, retry_timeout=0)
    with pytest.raises(StorageError, match=r"EndpointConnection.*\*\*\*") as raised:
        storage.read("x")
    error = raised.value
    while error is not None:
        text = f"{error} {error!r} {error.args}"
        assert not any(secret in text for secret in ("some-access-key", "shh-secret"))
        error = error.__cause__ or error.__context__


@pytest.mark.parametrize("store", ["s3", "azure"])
def test_wrong_credentials_and_buckets_are_not_tried_again(request, monkeypatch, store):
    monkeypatch.setattr(retry, "pause", lambda seconds: pytest.fail("tried again"))
    server = request.getfixturevalue(f"{store}_server")
    if store == "s3":
        wrong = {**server.options, "secret": "not-the-secret"}
    else:
        text = server.options["connection_string"].replace(AZURE_KEY, "bm90LXRoZS1rZXk=")
        wrong = {"connection_string": text}
    storage = Storage.open(server.new_url(), wrong)
    for operation, call in [("create", lambda: storage.create("x", b"")), ("list", storage.sizes)]:
        with pytest.raises(StorageError, match=f"could not {operation} {storage.url}"):
            call()
    elsewhere = Storage.open(server.root.replace("-of-tests", "-of-nobody"), server.options)
    for call in [lambda: elsewhere.write("x", [b""]), lambda: elsewhere.read("x")]:
        with pytest.raises(StorageError, match=r"-of-nobody/x: the bucket or container does not exist"):
            call()


@pytest.mark.parametrize("store", ["s3", "azure", "gcs"])
def test_a_missing_bucket_is_not_empty(request, store):
    server = request.getfixturevalue(f"{store}_server")
    elsewhere = Storage.open(server.root.replace("-of-tests", "-of-nobody"), server.options)
    for call in [elsewhere.list, elsewhere.sizes, lambda: elsewhere.list("folder"), lambda: elsewhere.modified("x")]:
        with pytest.raises(
            StorageError, match=r"could not list .*-of-nobody.*: the bucket or container does not exist"
        ):
            call()


FAKES = {
    "s3": ("s3://bucket/run", lambda port: s3_options(f"http://127.0.0.1:{port}")),
    "azure": ("az://container/run", lambda port: azure_options(f"http://127.0.0.1:{port}/{AZURE_ACCOUNT}")),
    "gcs": ("gs://bucket/run", lambda port: {"endpoint_url": f"http://127.0.0.1:{port}", "token": "anon"}),
    "http": ("http://127.0.0.1:{port}/run", lambda port: None),
}
EXPIRED = b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"


@pytest.mark.parametrize("store", FAKES)
@pytest.mark.parametrize(("status", "body"), [(403, b""), (404, b""), (500, b""), (400, EXPIRED)])
def test_an_answer_that_is_no_listing_is_an_error(store, status, body):
    url, options = FAKES[store]
    with answering(status, body) as port:
        storage = Storage.open(url.format(port=port), options(port), retry_timeout=0)
        for call in [storage.list, storage.sizes]:
            with pytest.raises(StorageError, match=f"could not list {storage.url}: ."):
                call()


def test_a_web_server_is_read_by_its_pages(tmp_path):
    """It shows links, so a page without any is an error, and one of a missing folder below the URL is empty."""
    Storage.open(tmp_path / "run").create("step/manifest", b"data")
    (tmp_path / "empty").mkdir()
    handler = functools.partial(QuietHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        storage = Storage.open(f"{url}/run", retry_timeout=0)
        assert storage.list() == {"step": None}
        assert storage.sizes() == {"step/manifest": 4}
        assert storage.list("nowhere") == {}
        assert storage.read("step/manifest") == b"data"
        for name, message in {"nowhere": "no such page", "empty": "no page with links"}.items():
            with pytest.raises(StorageError, match=f"could not list {url}/{name}: .*{message}"):
                Storage.open(f"{url}/{name}", retry_timeout=0).sizes()
        server.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def test_a_folder_that_cannot_be_listed_is_not_empty(monkeypatch):
    """fsspec's find() and walk() leave it out."""
    fsspec.register_implementation("toy", ToyFileSystem, clobber=True)
    storage = Storage.open(f"toy://{uuid.uuid4().hex}/run", retry_timeout=0)
    for path in ["a/1", "b/2"]:
        storage.create(path, b"x")
    assert storage.sizes() == {"a/1": 1, "b/2": 1}

    def ls(self, path, detail=True, **kwargs):
        if path.endswith("/b"):
            raise PermissionError("not yours")
        return MemoryFileSystem.ls(self, path, detail, **kwargs)

    monkeypatch.setattr(ToyFileSystem, "ls", ls)
    assert storage.list() == {"a": None, "b": None}
    for call in [storage.sizes, lambda: storage.abort_uploads("", 0)]:
        with pytest.raises(StorageError, match=f"could not list {storage.url}: PermissionError: not yours"):
            call()


# Outages


@pytest.mark.parametrize("store", ["s3", "azure", "gcs", "sftp"])
def test_an_outage_does_not_end_a_write(request, monkeypatch, caplog, small_parts, store):
    """The log tells what is retried, and until when."""
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.05)
    server = request.getfixturevalue(f"{store}_server")
    data = random.Random(1).randbytes(2 * PART + 1)
    with proxied(server) as (proxy, options):
        storage = Storage.open(server.new_url(), options, retry_timeout=60)

        def chunks():
            yield data[: PART + 1]
            proxy.go_down(refuse=4)
            yield data[PART + 1 :]

        assert storage.write("shard", chunks()) == len(data)
        assert storage.read("shard") == data
        assert storage.sizes() == {"shard": len(data)}
        assert storage.abort_uploads("", -5) == 0
    assert f"could not write {storage.url}/shard: " in caplog.text
    assert re.search(r"failed 1 times in \d+ s; retrying until \d\d:\d\d:\d\d, for 60 s", caplog.text)
    assert sum(record.name.startswith("dist_asgd") for record in caplog.records) == 1  # of all failures in 10 s


@pytest.mark.parametrize("store", ["s3", "azure", "gcs", "sftp"])
def test_a_silent_store_is_given_up(request, monkeypatch, store):
    """Connecting and the requests of an open connection have a time limit each."""
    for module in {"sftp": ["sftp", "ssh_transport"]}.get(store, [store]):
        monkeypatch.setattr(f"dist_asgd.checkpoint.storage.{module}.TIMEOUT", 0.5)
    server = request.getfixturevalue(f"{store}_server")
    with proxied(server) as (proxy, options):
        storage = Storage.open(server.new_url(), options, retry_timeout=0.1)
        storage.create("a", b"x")
        proxy.is_silent = True
        for fresh in [storage, Storage.open(storage.url, options, retry_timeout=0.1)]:
            with pytest.raises(StorageError, match=f"could not list {storage.url}: ."):
                fresh.sizes()
        proxy.is_silent = False
        assert storage.sizes() == {"a": 1}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=str)
def test_an_sftp_session_that_dies_or_stops_is_made_again(request, monkeypatch, number):
    server = request.getfixturevalue("sftp_server")
    for module in ["sftp", "ssh_transport"]:
        monkeypatch.setattr(f"dist_asgd.checkpoint.storage.{module}.TIMEOUT", 2)
    storage = Storage.open(server.new_url(), server.options)
    stopped = set()

    def end_sessions():
        for pid in set(sessions(server)) - stopped:
            os.kill(pid, number)
            stopped.add(pid)

    data = random.Random(1).randbytes(9_000_000)

    def chunks():
        yield data[:5_000_000]
        end_sessions()
        yield data[5_000_000:]

    storage.create("a", b"x")
    end_sessions()
    assert storage.write("b", chunks()) == len(data)
    end_sessions()
    assert storage.sizes() == {"a": 1, "b": len(data)}
    assert storage.read("b") == data
    for pid in stopped if number == signal.SIGSTOP else ():
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("store", ["s3", "sftp"])
@pytest.mark.parametrize("fault", ["silent", "down"])
def test_an_interrupt_ends_the_waiting(request, small_parts, store, fault):
    server = request.getfixturevalue(f"{store}_server")
    begun = time.monotonic()

    def interrupted():
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        with proxied(server) as (proxy, options):
            storage = Storage.open(server.new_url(), options)

            def chunks():
                yield bytes(PART + 1)
                proxy.is_silent = fault == "silent"
                if fault == "down":
                    proxy.go_down(refuse=10**6)
                signal.setitimer(signal.ITIMER_REAL, 0.5)
                yield bytes(3 * PART)

            return message_of(lambda: storage.write("shard", chunks()), KeyboardInterrupt)

    run_alone(interrupted, timeout=50)
    assert time.monotonic() - begun < retry.TIMEOUT


def test_many_reads_are_under_way_at_once(request):
    """At 40 ms a request, 600 files one after another would take 24 s."""
    server = request.getfixturevalue("s3_server")
    storage = Storage.open(server.new_url(), server.options)
    storage.write("a", [bytes(100)])
    with proxied(server) as (proxy, options):
        proxy.delay = 0.04
        far = Storage.open(storage.url, options)
        assert len(list(far.read_ranges([("a", 0, 100)] * 80))) == 80
        assert 16 <= proxy.most <= 30


def test_what_is_read_ahead_is_bounded(tmp_path, monkeypatch):
    """While the caller takes nothing, no more than the limit is read; a single larger range is read all the same."""
    monkeypatch.setattr(storage_module, "READ_BYTES", 1000)
    storage = Storage.open(tmp_path)
    storage.write("a", [bytes(5000)])
    asked = []
    read = storage._store.read_range
    monkeypatch.setattr(storage._store, "read_range", lambda *args: asked.append(args) or read(*args))
    results = storage.read_ranges([("a", i, i + 400) for i in range(6)] + [("a", 0, 5000)])
    first, _ = next(results)
    time.sleep(0.05)
    assert len(asked) == 2
    assert sorted(index for index, _ in results) == [index for index in range(7) if index != first]


# Local files


def test_no_space_left(tmp_path):
    """On a full file system the file does not appear, and its space is free again."""
    if os.getuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path]).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        storage = Storage.open(tmp_path / "run")
        with pytest.raises(StorageError, match=r"could not write .*shard: .*No space left") as raised:
            storage.write("shard", [bytes(2**20)] * 3)
        assert raised.value.errno == errno.ENOSPC
        with pytest.raises(StorageError, match=r"could not create .*No space left"):
            storage.create("manifest", bytes(2**21))
        assert storage.sizes() == {} == storage.list()
        assert storage.write("shard", [bytes(2**19)]) == 2**19
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


def test_a_file_size_limit(tmp_path):
    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        storage = Storage.open(tmp_path)
        return message_of(lambda: storage.write("shard", [bytes(90_000)] * 2), StorageError)

    assert "File too large" in run_alone(limited)
    assert list(tmp_path.iterdir()) == []


def test_permissions_of_new_files_follow_the_umask(tmp_path):
    storage = Storage.open(tmp_path)
    old = os.umask(0o027)
    try:
        storage.create("a", b"")
        storage.write("b", [b""])
    finally:
        os.umask(old)
    assert {(tmp_path / name).stat().st_mode & 0o777 for name in "ab"} == {0o640}


def test_file_systems_without_hard_links(tmp_path, monkeypatch):
    def link(*_):
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", link)
    storage = Storage.open(tmp_path)
    storage.create("a", b"first")
    with pytest.raises(FileExistsError):
        storage.create("a", b"second")
    assert storage.read("a") == b"first"
    assert os.listdir(tmp_path) == ["a"]


# URLs


def test_local_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    places = {
        "rel/run": "rel/run",
        "~/run": "home/run",
        f"file://{tmp_path}/u": "u",
        f"local://{tmp_path}/l": "l",
        str(tmp_path / "sp ace"): "sp ace",
    }
    for url, where in places.items():
        storage = Storage.open(url)
        storage.create("f", b"x")
        assert (tmp_path / where / "f").read_bytes() == b"x"
        assert storage.url == str(tmp_path / where)
    monkeypatch.chdir("/")  # a relative path meant where it was opened
    assert Storage.open(Path(tmp_path) / "rel/run").list() == {"f": 1}


def test_a_path_of_any_characters_is_one_place(place):
    url, options = place
    folder = "a#1/12:30/user@host/%41 b#"
    storage = Storage.open(f"{url}/{folder}", options)
    assert storage.url.endswith(f"/{folder}")
    storage.create("f", b"x")
    assert storage.write("g", [b"xy"]) == 2
    assert storage.read("f") == b"x" and storage.list() == {"f": 1, "g": 2}
    assert Storage.open(url, options).sizes() == {f"{folder}/f": 1, f"{folder}/g": 2}
    storage.remove("f")
    assert storage.sizes() == {"g": 2}


def test_urls_that_cannot_be_meant():
    for url, message in {
        Path("s3://bucket/run"): "give a URL as a str",
        "s3:/bucket/run": "give a URL as a str",
        "simplecache::s3://bucket/run": "chained",
        "s3://bucket/run?versionId=7": "storage option",
        "": "expected a URL",
    }.items():
        with pytest.raises(ValueError, match=message):
            Storage.open(url)
    with pytest.raises(ValueError, match=r"no storage options, got \['key'\]"):
        Storage.open("/run", {"key": "x"})
    for limit in RETRY_LIMITS:
        with pytest.raises(ValueError, match="retry_timeout must be a finite number"):
            Storage.open("/run", retry_timeout=limit)
    with pytest.raises(StorageError, match="nonsense:// is not a protocol"):
        Storage.open("nonsense://x")


@pytest.mark.parametrize(
    ("url", "shown"),
    {
        "s3://bucket/run/": "s3://bucket/run",
        "sftp://user:pass@host:22/run": "sftp://host:22/run",
        "sftp://user@host/run": "sftp://host/run",
        "abfs://container@account.dfs.core.windows.net/run": "abfs://container@account.dfs.core.windows.net/run",
        "az://container/run?sv=2024&sig=abcdef": "az://container/run",
    }.items(),
)
def test_what_people_see_of_a_url(url, shown):
    target = target_of(url, None)
    assert target.url == shown
    assert not any(secret in repr(target) for secret in ("pass@", "abcdef"))
    expected = {"sas_token": "sv=2024&sig=abcdef"} if "sig" in url else {}
    if "user" in url:
        expected = {"username": "user"} | ({"password": "pass"} if "pass" in url else {})
    assert target.options == expected


def test_a_missing_driver_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(StorageError, match=r"pip install 'dist-asgd\[s3\]'"):
        Storage.open("s3://bucket/run")


def test_the_extras_of_stores_are_those_of_the_distribution():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    for extra in {kind.backend.extra for kind in registry.STORES} - {None}:
        assert re.search(rf"^{extra} = \[", text, re.MULTILINE), extra


def test_a_driver_that_cannot_create_exclusively_is_refused(monkeypatch):
    import botocore

    monkeypatch.setattr(botocore, "__version__", "1.35.19")
    with pytest.raises(StorageError, match=r"botocore 1\.35\.19 cannot create a file exclusively"):
        Storage.open("s3://bucket/run").read("x")


class Busy(Exception):
    """An error after which the toy store wants to be asked again."""


class ToyFileSystem(MemoryFileSystem):
    """A driver that fails once, and tells its secret."""

    protocol = "toy"
    failures = 1

    def __init__(self, pin=None, ticket=None, **options):
        super().__init__(**options)
        self.text = f"{pin} {ticket}"

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("toy://", "memory://toy-"))

    def cat_file(self, *args, **kwargs):
        if type(self).failures:
            type(self).failures -= 1
            raise Busy(self.text)
        return super().cat_file(*args, **kwargs)


class ToyStore(RenamedStore):
    backend = Backend(
        protocols=("toy",),
        query_option="ticket",
        secret_options=("pin",),
        transient_errors=classes_in(__name__, "Busy"),
    )


def test_a_new_store_is_one_class_and_one_entry_of_the_registry(monkeypatch):
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(registry, "STORES", (*registry.STORES, ToyStore))
    fsspec.register_implementation("toy", ToyFileSystem, clobber=True)
    url = f"toy://{uuid.uuid4().hex}/run"
    storage = Storage.open(f"{url}?admit-one", {"pin": "12345"}, retry_timeout=0.05)
    assert storage.url == url
    storage.create("a", b"data")
    assert storage.read("a") == b"data"  # by the second try
    monkeypatch.setattr(ToyFileSystem, "failures", 1000)
    with pytest.raises(StorageError, match=r"Busy: \*\*\* \*\*\* \(\d+ tries in 0 s\)"):
        storage.read("a")


def test_no_driver_is_imported_with_the_package():
    drivers = {"s3fs", "adlfs", "gcsfs", "aiohttp", "botocore", "paramiko"}
    code = f"import sys, dist_asgd.checkpoint.storage.storage; print(sorted({drivers} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


def test_a_storage_opened_before_a_fork_serves_both(place):
    """fsspec's event loop runs in a thread that a forked child does not have."""
    storage = Storage.open(*place)
    storage.create("parent", b"x")

    def child():
        storage.create("child", b"y")
        return storage.sizes()

    assert run_alone(child, timeout=20)["child"] == 1
    storage.create("parent-2", b"z")
    assert storage.read("parent") == b"x"
