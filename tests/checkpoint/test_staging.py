"""Copies on the host of what a save in the background writes."""

import pytest
import torch

from dist_asgd.boxes import whole
from dist_asgd.checkpoint.format.tensor_bytes import memory_of
from dist_asgd.checkpoint.saving import staging
from dist_asgd.checkpoint.saving.staging import StagingMemory
from dist_asgd.checkpoint.saving.writer import BlockToWrite


def block_of(tensor):
    return BlockToWrite("x", whole(tuple(tensor.shape)), [tensor], True)


def bytes_of(pieces):
    return b"".join(bytes(piece) for piece in pieces)


TENSORS = [
    torch.randn(3, 1000),
    torch.randn(40, 30).t(),
    torch.randn(64, 64)[::3, 5:50],
    torch.tensor(2.5, dtype=torch.float64),
    torch.empty(0, 4),
    torch.randn(500, dtype=torch.complex64).conj(),
    torch.randint(0, 255, (70, 9), dtype=torch.uint8).t(),
    torch.randn(2, 500, 3).to(torch.bfloat16).transpose(0, 2),
    torch.randn(100).to(torch.float8_e4m3fn),
]


def test_bytes_are_those_of_the_tensors_across_chunks_and_when_the_memory_is_used_again(monkeypatch):
    monkeypatch.setattr(staging, "CHUNK_BYTES", 4096)
    monkeypatch.setattr(staging, "PIECE_BYTES", 1024)
    memory = StagingMemory()
    expected = [bytes_of(memory_of(tensor)) for tensor in TENSORS]
    for _ in range(2):
        staged = memory.stage([block_of(tensor) for tensor in TENSORS])
        assert [bytes_of(block.pieces()) for block in staged] == expected
        chunks = len(memory._chunks)
        assert 4096 * chunks < 1.5 * sum(map(len, expected))
    assert chunks == len(memory._chunks) > 1


def test_a_copy_does_not_change_with_its_tensor():
    tensor = torch.arange(10.0)
    (staged,) = StagingMemory().stage([block_of(tensor)])
    tensor.zero_()
    assert bytes_of(staged.pieces()) == bytes_of(memory_of(torch.arange(10.0)))


def on_device(index):
    """Returns a class of tensors in the memory of the host that say they are on a GPU."""
    return type(f"OnDevice{index}", (torch.Tensor,), {"device": torch.device("cuda", index)})


def test_each_device_is_waited_for_once_after_its_copies(monkeypatch):
    """The wait is for all devices that have a block, not only for the current one of the process."""
    waited = []
    monkeypatch.setattr(staging, "wait_for", lambda device: waited.append((device, len(copied))))
    copied, copy = [], torch.Tensor.copy_

    def recorded(self, source, non_blocking):
        copied.append(non_blocking)
        return copy(self, source.as_subclass(torch.Tensor))

    monkeypatch.setattr(torch.Tensor, "copy_", recorded)
    memory = StagingMemory()
    memory.stage([block_of(torch.zeros(5))])  # allocates memory that needs no GPU
    assert copied == [False] and not waited
    memory.stage(
        [block_of(torch.ones(5).as_subclass(on_device(index))) for index in (0, 1, 1)] + [block_of(torch.ones(2))]
    )
    assert copied == [False, True, True, True, False]
    assert sorted(waited, key=str) == [(torch.device("cuda", index), len(copied)) for index in (0, 1)]


@pytest.mark.parametrize("size", [2**22 + 4, 2**26 + 12])
def test_a_block_larger_than_a_piece_or_a_chunk(size):
    tensor = torch.arange(size // 4, dtype=torch.int32)
    (staged,) = StagingMemory().stage([block_of(tensor)])
    assert len(staged.parts) > 1
    assert torch.equal(torch.cat(staged.parts), tensor)
