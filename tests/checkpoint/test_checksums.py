"""Checksums of payloads, block by block: zlib's, of the whole payload's beginnings."""

import random
import zlib

import pytest

from dist_asgd.checkpoint.format.tensor_bytes import Checksums


@pytest.mark.parametrize("size", [0, 1, 127, 128, 129, 4096, 10_007])
@pytest.mark.parametrize("block", [64, 1000, 2**14])
def test_every_block_has_the_checksum_of_what_is_before_its_end(size: int, block: int) -> None:
    """The payload comes in pieces of many sizes, which begin at odd addresses."""
    data, pieces = bytearray(random.Random(size).randbytes(size)), random.Random(block)
    checksums, rest = Checksums(block), memoryview(data)
    while rest:
        count = pieces.choice((1, 63, 64, 200, 5000))
        checksums.add(rest[:count])
        rest = rest[count:]
    ends = [*range(block, len(data), block), len(data)] if data else []
    assert checksums.text() == "".join(f"{zlib.crc32(data[:end]):08x}" for end in ends)
    assert checksums.last == zlib.crc32(data)
