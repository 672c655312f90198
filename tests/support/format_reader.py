"""Reads a checkpoint by docs/checkpoint-format.md alone: nothing of dist_asgd is imported."""

import base64
import hashlib
import json
import re
import struct
import zlib
from pathlib import Path

import numpy
import torch


def read_checkpoint(folder: Path, rank: int = 0) -> dict:
    """By key, the tensors and values that a rank finds in the checkpoint; all bytes are verified on the way."""
    manifest = read_manifest((folder / "manifest.json").read_bytes())
    for name, file in manifest["files"].items():
        data = (folder / name).read_bytes()
        assert len(data) == file["size"]
        assert file.get("sha256") in (None, hashlib.sha256(data).hexdigest())
    payloads = [read_item(folder, item) for item in manifest["items"]]
    state = {}
    for key, tensor in manifest["tensors"].items():
        dtype = getattr(torch, tensor["dtype"])
        whole = torch.empty(tensor["shape"], dtype=dtype)
        for offsets, sizes, item in tensor["chunks"]:
            flat = (
                torch.frombuffer(bytearray(payloads[item]), dtype=dtype)
                if payloads[item]
                else torch.empty(0, dtype=dtype)
            )
            place = tuple(slice(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True))
            whole[place] = flat.reshape(sizes)
        put(state, key, tensor, whole, rank)
    for key, value in manifest["values"].items():
        put(state, key, value, decode(value["value"]), rank)
    return state


def put(state: dict, key: str, entry: dict, value: object, rank: int) -> None:
    if entry.get("rank", rank) == rank:
        state[key.removesuffix(f"@rank{rank}") if "rank" in entry else key] = value


def read_manifest(data: bytes) -> dict:
    digest = re.search(rb'"sha256":"([0-9a-f]{64})"}\s*\Z', data)
    zeroed = data[: digest.start(1)] + b"0" * 64 + data[digest.end(1) :]
    assert hashlib.sha256(zeroed).hexdigest().encode() == digest[1]
    manifest = json.loads(data)
    assert manifest["format"] == "dist_asgd checkpoint" and manifest["reader"] <= 1
    return manifest


def read_item(folder: Path, item: list) -> bytes:
    """The payload."""
    name, offset, head, size, tail, block, crc32, frame = item
    data = (folder / name).read_bytes()[offset : offset + head + size + tail]
    payload = data[head : head + size]
    assert f"{zlib.crc32(data[:head]):08x}{zlib.crc32(data[head + size :]):08x}" == frame
    ends = [min(end, size) for end in range(block, size + block, block)]
    assert crc32 == "".join(f"{zlib.crc32(payload[:end]):08x}" for end in ends)
    return payload


def decode(value: object) -> object:
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict) or not any(key.startswith("#") for key in value):
        return {key: decode(item) for key, item in value.items()} if isinstance(value, dict) else value
    ((kind, content),) = value.items()
    if kind in ("#tuple", "#set", "#dict"):
        return {"#tuple": tuple, "#set": set, "#dict": dict}[kind](map(decode, content))
    if kind == "#numpy":
        dtype, shape, data = content
        return numpy.frombuffer(base64.b64decode(data), dtype).reshape(shape or ())
    if kind == "#float":
        return struct.unpack(">d", bytes.fromhex(content))[0]
    return {"#int": lambda text: int(text, 16), "#bytes": base64.b64decode}[kind](content)
