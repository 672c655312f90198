"""The storage layer of checkpoints: one contract for every store, and faults that really happen."""

import threading
import uuid

import pytest

from dist_asgd.checkpoint.storage import Storage, StorageError
from stores import *  # noqa: F403

STORES = ["file", "memory", "s3", "azure", "sftp"]
UNSAFE = ["", "/etc/passwd", "../x", "a/../../x", "a//b", "a/", "./a", "a\\b", "a\0b", "a*", "a?b", "a[0-9]", "a\nb"]


@pytest.fixture(params=STORES)
def place(request, tmp_path):
    """(URL, storage options): on each store a place where nothing is."""
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
        """Our own, which must come out as it is."""

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
