"""Loads forged manifests and payloads: no code runs, nothing outside the state is written, little memory is taken."""

import hashlib
import json
import pickle
import random
import resource
import shutil
import zlib
from pathlib import Path

import pytest
import torch
from torch import nn

import dist_asgd
from dist_asgd import Checkpointer, ShardedASGD
from dist_asgd.checkpoint import CheckpointError
from tests.support.format_reader import read_checkpoint
from tests.support.ranks import message_of, run_alone

MUTATIONS = 400
MOST = 64 * 2**20  # bytes by which memory may grow
ROWS = 50


def make_state(value):
    torch.manual_seed(value)
    model = nn.Linear(5, 3)
    optimizer = ShardedASGD(model.named_parameters(), lr=0.1, t0=0)
    for _ in range(value):
        model(torch.ones(2, 5)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    data = {"rows": torch.arange(ROWS * 8.0).reshape(ROWS, 8), "pair": (1, "two"), 7: torch.ones(2), "epoch": 3}
    return {"model": model, "optimizer": optimizer, "data": data}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile") / "pristine"
    dist_asgd.save(folder, make_state(2))
    return folder


@pytest.fixture
def forged(pristine, tmp_path):
    shutil.copytree(pristine, tmp_path / "run" / "forged")
    return tmp_path / "run" / "forged"


def forge(folder, text):
    """Writes a manifest with the sha256 that matches its contents."""
    data = text.encode() if isinstance(text, str) else text
    (folder / "manifest.json").write_bytes(data.replace(b"0" * 64, hashlib.sha256(data).hexdigest().encode()))


def record_of(folder):
    record = json.loads((folder / "manifest.json").read_text())
    return {**record, "sha256": "0" * 64}


def dumped(record):
    return json.dumps(record, separators=(",", ":"))


def refusal(folder):
    return message_of(lambda: dist_asgd.load(folder, make_state(1)), CheckpointError)


def test_an_honest_forgery_is_loaded(forged):
    record = record_of(forged)
    forge(forged, dumped({"unknown": [1], **record, "step": 77}))
    state = make_state(1)
    dist_asgd.load(forged, state)
    assert torch.equal(state["model"].weight, make_state(2)["model"].weight)


def largest(record):
    return max(range(len(record["items"])), key=lambda index: record["items"][index][3])


def two_entries(record):
    record["values"]["data.rows"] = {"value": 1, "path": ["data", "rows"]}


def inside(record):
    record["values"]["data.rows.x"] = {"value": 1, "path": ["data", "rows", "x"]}


def deep(record):
    path = ["data", *["x"] * 100_000]
    record["values"][".".join(path)] = {"value": 1, "path": path}


def huge_shape(record):
    record["tensors"]["data.rows"]["shape"] = [2**40, 8]
    record["tensors"]["data.rows"]["chunks"][0][1] = [2**40, 8]


def huge_shape_and_item(record):
    huge_shape(record)
    record["items"][record["tensors"]["data.rows"]["chunks"][0][2]][3] = 2**40 * 32


def huge_file(record, rows=2**27):
    """Claims a file of 4 GiB, with checksums for all of its bytes, in a checkpoint of a few kilobytes."""
    tensor = record["tensors"]["data.rows"]
    tensor["shape"] = tensor["chunks"][0][1] = [rows, 8]
    item = record["items"][tensor["chunks"][0][2]]
    item[:2] = "__1_0.distcp", 0
    item[3], item[5] = rows * 32, 2**18
    item[6] = item[6][:8] * (item[3] // item[5])
    record["files"]["__1_0.distcp"] = {"size": item[2] + item[3] + item[4]}


def huge_block(record):
    record["items"][largest(record)][5] = 2**40


def huge_head(record):
    record["items"][0][2] = 2**40


def one_item_for_two(record):
    record["tensors"]["data.more"] = {**record["tensors"]["data.rows"], "path": ["data", "more"]}


def one_place_for_two_items(record):
    index = record["tensors"]["data.rows"]["chunks"][0][2]
    record["items"].append(list(record["items"][index]))
    more = {**record["tensors"]["data.rows"], "path": ["data", "more"]}
    more["chunks"] = [[*more["chunks"][0][:2], len(record["items"]) - 1]]
    record["tensors"]["data.more"] = more


def chunks_overlap(record):
    chunks = record["tensors"]["data.rows"]["chunks"]
    chunks.append(chunks[0])


def chunk_outside(record):
    record["tensors"]["data.rows"]["chunks"][0][0] = [1, 0]


def renamed(name):
    def change(record):
        record["files"][name] = record["files"].pop("__0_0.distcp")
        for item in record["items"]:
            item[0] = name

    return change


CHANGES = [
    (two_entries, "same path"),
    (inside, "in another one"),
    (deep, "100001 names"),
    (huge_shape, "is in an item of"),
    (huge_shape_and_item, "ends at byte"),
    (huge_file, "is missing"),
    (huge_block, "has blocks of"),
    (huge_head, "beside its payload"),
    (one_item_for_two, "in common"),
    (one_place_for_two_items, "overlap"),
    (chunks_overlap, "do not make up"),
    (chunk_outside, "do not make up"),
    (lambda record: record["files"].pop(".metadata"), ".metadata"),
    (lambda record: record["files"][".metadata"].pop("sha256"), ".metadata"),
    (lambda record: record.update(reader=2), "upgrade"),
    (lambda record: record["tensors"]["data.rows"].update(dtype="load"), "dtype"),
    *((renamed(name), "no name of a file") for name in ("../x", "/etc/passwd", "a\0b", "__0_0.distcp/../x", "")),
    (renamed("__\u0663_0.distcp"), "no name of a file"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES, ids=lambda value: getattr(value, "__name__", value))
def test_what_contradicts_itself_is_refused(forged, change, message):
    record = record_of(forged)
    change(record)
    forge(forged, dumped(record))
    assert message in refusal(forged)


TEXTS = {
    "nothing": b"",
    "no object": b'[{"sha256":"%s"}' % (b"0" * 64),
    "deep lists": b'{"a":' + b"[" * 300_000 + b"]" * 300_000 + b',"sha256":"%s"}' % (b"0" * 64),
    "many digits": b'{"step":' + b"9" * 100_000 + b',"sha256":"%s"}' % (b"0" * 64),
    "no UTF-8": b'{"a":"\xff\xfe","sha256":"%s"}' % (b"0" * 64),
    "half a character": b'{"format":"\\ud800","sha256":"%s"}' % (b"0" * 64),
    "other constants": b'{"format":NaN,"step":-Infinity,"sha256":"%s"}' % (b"0" * 64),
}


@pytest.mark.parametrize("name", TEXTS)
def test_what_is_no_manifest_is_refused(forged, name):
    forge(forged, TEXTS[name])
    assert "manifest.json" in refusal(forged)


def test_of_two_members_with_one_name_one_counts(forged):
    text = dumped(record_of(forged))
    forge(forged, text.replace('"tensors":', '"tensors":{"model.weight":17},"tensors":', 1))
    state = make_state(1)
    dist_asgd.load(forged, state)
    assert torch.equal(state["model"].weight, make_state(2)["model"].weight)


# Values that mutated() puts in any place of a manifest.

ANYTHING = [None, True, -1, 0, 1, 3, 2**31, 2**62, 2**63, 10**30, 1.5, float("nan"), float("inf")]
ANYTHING += ["", "0" * 16, "../../x", "/etc/passwd", "a\0b", "\ud800", "bool", "x" * 100_000]
ANYTHING += [
    [],
    {},
    [[]],
    [0],
    [2**40],
    [-1],
    [0, 0],
    {"#tuple": [[1], {}]},
    {"#tuple": 3},
    {"#numpy": ["<f8", [2**40], ""]},
]
ANYTHING += [{"#numpy": ["<U9999", [0], ""]}, {"#float": "00"}, {"#int": "z"}, {"#set": [[1]]}, {"#nothing": 1}]


def places(node, path=()):
    """Yields the paths to everything in a JSON value."""
    yield path
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for name, value in inner:
        yield from places(value, (*path, name))


def mutated(record, choices, spots):
    """Returns a copy with one or two changes: something replaced, removed, doubled, renamed or moved from elsewhere."""
    record = json.loads(json.dumps(record))
    for _ in range(choices.choice([1, 1, 2])):
        *above, name = choices.choice(spots)
        node = record
        try:
            for part in above:
                node = node[part]
            old = node[name]
        except (KeyError, IndexError, TypeError):  # gone by the first change
            continue
        if isinstance(node, str):
            continue
        how = choices.randrange(8)
        if how == 0:
            del node[name]
        elif how == 1 and isinstance(node, list):
            node.append(old)
        elif how == 1:
            node[str(choices.choice(ANYTHING[:21]))] = old
        elif how == 2 and isinstance(old, int):
            node[name] = old + choices.choice([-1, 1, 64, 2**32])
        elif how == 3:
            node[name] = choices.choice(list(node.values()) if isinstance(node, dict) else node)
        else:
            node[name] = choices.choice(ANYTHING)
    return record


def tensors_of(state):
    values = [*state["model"].parameters(), *state["data"].values()]
    return [value.detach().clone() for value in values if isinstance(value, torch.Tensor)]


def load_mutations(folder):
    """Loads mutated manifests, checks each outcome, and returns the numbers refused and loaded, and memory grown."""
    record, choices = record_of(folder), random.Random(0)
    spots = [path for path in places(record) if path and path != ("sha256",)]
    state, everything = make_state(1), {}
    before, refused, loaded = tensors_of(state), 0, 0
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(MUTATIONS):
        text = dumped(mutated(record, choices, spots))
        forge(folder, text)
        target = everything if number % 2 else state
        try:
            dist_asgd.load(folder, target, strict=number % 3 > 0)
        except CheckpointError as error:
            refused += 1
            if "in part" in str(error):  # whole and consistent, but no options that an optimizer takes
                state = make_state(1)
            assert everything == {}, text[:5000]
            assert all(map(torch.equal, tensors_of(state), before)), text[:5000]
            continue
        loaded += 1
        said = read_checkpoint(folder)
        if number % 2:
            assert all(
                torch.equal(found, said[key]) for key, found in flat(everything) if isinstance(found, torch.Tensor)
            )
            everything.clear()
        else:
            weight = said.get("model.weight", before[0])
            assert torch.equal(state["model"].weight, weight), text[:5000]
            state = make_state(1)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) * 1024
    return refused, loaded, grown


def flat(node, path=()):
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else None
    if inner is None:
        yield ".".join(map(str, path)), node
    for name, value in inner or ():
        yield from flat(value, (*path, name))


def everything_in(folder):
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def test_mutated_manifests_are_refused_or_loaded_as_they_say(forged, tmp_path):
    neighbours = [tmp_path / "x", tmp_path / "run" / "x"]
    for path in neighbours:
        path.write_bytes(b"not of the checkpoint")
    before = everything_in(tmp_path)
    refused, loaded, grown = run_alone(load_mutations, forged, timeout=120)
    assert refused > MUTATIONS / 4
    assert loaded > MUTATIONS / 50
    assert grown < MOST
    manifest = str(forged / "manifest.json")
    assert {**everything_in(tmp_path), manifest: None} == {**before, manifest: None}


def load_huge(folder):
    """Loads a checkpoint with a sparse file of 4 GiB, and returns the error and the bytes by which memory has grown."""
    record = record_of(folder)
    huge_file(record)
    forge(folder, dumped(record))
    with open(folder / "__1_0.distcp", "wb") as file:
        file.truncate(record["files"]["__1_0.distcp"]["size"])
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    message = message_of(lambda: dist_asgd.load(folder, {}), CheckpointError)
    return message, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) * 1024


def test_a_huge_tensor_takes_no_memory_before_its_first_bytes_are_verified(forged):
    message, grown = run_alone(load_huge, forged)
    assert "'data.rows', do not have the checksum" in message
    assert grown < 2 * MOST


# Pickles that would run code when they are loaded.


class Canary:
    """An object whose unpickling makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def test_no_pickle_runs(forged, tmp_path):
    """Pickles that run code stand in .metadata, in values, and before and behind each tensor, with right checksums."""
    canary = pickle.dumps(Canary(tmp_path / "ran"))
    pickle.loads(canary)
    assert (tmp_path / "ran").exists()
    (tmp_path / "ran").unlink()
    record = record_of(forged)
    old, new = (forged / "__0_0.distcp").read_bytes(), b""
    used = {chunk[2] for tensor in record["tensors"].values() for chunk in tensor["chunks"]}
    for index, item in enumerate(record["items"]):
        _, offset, head, size, _, block, _, _ = item
        payload = old[offset + head : offset + head + size] if index in used else canary
        sums = "".join(f"{zlib.crc32(payload[:end]):08x}" for end in range(block, len(payload) + block, block))
        frame = f"{zlib.crc32(canary):08x}" * 2
        item[1:] = [len(new), len(canary), len(payload), len(canary), block, sums, frame]
        new += canary + payload + canary
    (forged / "__0_0.distcp").write_bytes(new)
    (forged / ".metadata").write_bytes(canary)
    record["files"]["__0_0.distcp"]["size"] = len(new)
    record["files"][".metadata"] = {"size": len(canary), "sha256": hashlib.sha256(canary).hexdigest()}
    forge(forged, dumped(record))
    state = make_state(1)
    dist_asgd.load(forged, state)
    assert torch.equal(state["model"].weight, make_state(2)["model"].weight)
    assert not (tmp_path / "ran").exists()


def test_names_that_are_no_checkpoints_are_left_alone(tmp_path):
    """Directories in a run whose names are not those of checkpoints are neither loaded nor deleted."""
    names = ["step-00000009", "step-00000009-0001-zzzzzzzz", "step-99999999999999999999-0001-00000000", "..."]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text("{}")
    with Checkpointer(tmp_path, keep_last=1) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, {"x": torch.ones(2)})
        assert checkpointer.steps() == [2]
    assert all((tmp_path / name / "manifest.json").exists() for name in names)
