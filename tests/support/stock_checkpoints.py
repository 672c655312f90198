"""Checkpoints that stock dcp.save wrote, and pickles that would do harm."""

import importlib
import importlib.util
import io
import os
import pickle
import struct
import zipfile

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata

from dist_asgd.boxes import Box
from dist_asgd.checkpoint.format.dcp_metadata import StoredChunk, StoredObject, stock_metadata

# torch 2.15 gave the module a public name and warns of the private one.
_FSSPEC = "fsspec_filesystem" if importlib.util.find_spec(f"{dcp.__name__}.fsspec_filesystem") else "_fsspec_filesystem"
_fsspec = importlib.import_module(f"{dcp.__name__}.{_FSSPEC}")
FsspecReader, FsspecWriter = _fsspec.FsspecReader, _fsspec.FsspecWriter


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


ONE = {"a": (torch.float32, (4, 6), [StoredChunk(Box((0, 0), (4, 6)), "x", 0, 800)])}


METADATA = stock_metadata(ONE, {"b": StoredObject("y", 1, 2)}, {"a": ("a",), "b": ("b",)})


class Call:
    """Pickled as a call."""

    def __init__(self, function, *arguments):
        self.parts = function, arguments

    def __reduce__(self):
        return self.parts


def text(value):
    return pickle.BINUNICODE + struct.pack("<I", len(value)) + value.encode()


def harmful(canary):
    """Pickles that make the file `canary` when they are loaded by pickle."""
    command = f"touch {canary}"
    for protocol in range(6):
        yield f"reduce, protocol {protocol}", pickle.dumps(Call(os.system, command), protocol)
        whole = Metadata({}, planner_data={"a": [(Call(eval, f"__import__('os').system({command!r})"),)]})
        yield f"nested, protocol {protocol}", pickle.dumps(whole, protocol)
    place = pickle.loads(METADATA)
    place.storage_data[Call(os.system, command)] = _StorageInfo("x", 0, 1)
    yield "a key", pickle.dumps(place)
    yield "inst", b"(S'" + command.encode() + b"'\nios\nsystem\n."
    yield "obj", b"(cos\nsystem\n" + text(command) + b"o."
    yield "stack global", b"\x80\x04" + text("os") + text("system") + b"\x93" + text(command) + b"\x85R."
    dotted = b"\x80\x04" + text("torch.serialization") + text("os.system") + b"\x93"
    yield "dotted", dotted + text(command) + b"\x85R."
    yield "through the memo", b"\x80\x02cos\nsystem\nq\x050h\x05" + text(command) + b"\x85R."
    partial = b"\x80\x04cfunctools\npartial\n"
    yield "newobj", partial + b"cos\nsystem\n" + text(command) + b"\x86\x81)R."
    yield "newobj_ex", partial + b"cos\nsystem\n\x85}\x92" + text(command) + b"\x85R."
    yield "extension", b"\x80\x02\x82\xf0" + text(command) + b"\x85R."
    getattr_of = b"cbuiltins\ngetattr\nctorch.serialization\nos\n" + text("system") + b"\x86R"
    yield "getattr", b"\x80\x04" + getattr_of + text(command) + b"\x85R."
    build = b"ctorch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING\nN}" + text("harmed")
    yield "build", b"\x80\x02" + build + b"cos\nsystem\ns\x86b0cos\nsystem\n" + text(command) + b"\x85R."


def with_description(data, compression=zipfile.ZIP_STORED):
    """A correct item but for its data.pkl."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, record in (("data.pkl", data), ("byteorder", b"little"), ("version", b"3\n"), ("data/0", bytes(4))):
            archive.writestr(f"archive/{name}", record)
    return buffer.getvalue()
