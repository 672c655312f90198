"""The digest of a tensor tells its bits and their positions, whatever its dtype, strides, alignment and size."""

import pytest
import torch

from dist_asgd.comm.digest import digest

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.complex128]
DTYPES += [torch.int64, torch.int32, torch.uint8, torch.bool, torch.float8_e4m3fn]


def weights(count, offset=0):
    """Odd numbers by position, in Python's integers: the oracle of the digest's formula."""
    numbers = []
    for n in range(1 + offset, count + 1 + offset):
        n = wrapped(n * 0x9E3779B97F4A7C15)
        n = wrapped((n ^ (n >> 31)) * 0xBF58476D1CE4E5B9)
        numbers.append(n ^ (n >> 27) | 1)
    return numbers


def wrapped(n):
    """`n` modulo 2**64, as int64 has it."""
    return (n + 2**63) % 2**64 - 2**63


@pytest.mark.parametrize("size", [7, 2**16, 2**16 + 5], ids=str)
def test_it_is_a_sum_of_words_weighted_by_position(size):
    words = torch.randint(-(2**63), 2**63 - 1, (size,))
    of_blocks = [
        sum(word * w for word, w in zip(block.tolist(), weights(2**16), strict=False)) for block in words.split(2**16)
    ]
    expected = sum(total * w for total, w in zip(of_blocks, weights(len(of_blocks), 1), strict=True))
    found = digest(words)
    assert (found.shape, found.dtype, int(found)) == (torch.Size([]), torch.int64, wrapped(expected))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_and_positions_count_and_nothing_else(dtype):
    generator = torch.Generator().manual_seed(1)
    for shape in [(), (1,), (3,), (17, 5), (300, 411)]:
        size = max(int(torch.tensor(shape).prod()), 1) * dtype.itemsize
        raw = torch.randint(0, 2 if dtype is torch.bool else 100, (size,), dtype=torch.uint8, generator=generator)
        tensor = raw.view(dtype).view(shape)
        apart = torch.cat([torch.ones(3 * dtype.itemsize, dtype=torch.uint8), raw]).view(dtype)[3:].view(shape)
        assert digest(tensor) == digest(apart) == digest(tensor.clone())
        if tensor.ndim == 2:
            assert digest(tensor.t().contiguous().t()) == digest(tensor)
            assert digest(tensor.flip(0).view(torch.uint8) if dtype.itemsize == 1 else tensor.flip(0)) != digest(tensor)
        for position in {0, size // 2, size - 1}:
            other = raw.clone()
            other[position] ^= 1
            assert digest(other.view(dtype).view(shape)) != digest(tensor)


def test_values_of_one_sum_and_views_of_conjugates():
    assert digest(torch.zeros(5)) != digest(-torch.zeros(5))
    a, b = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([3.0, 4.0, 1.0, 2.0])
    assert digest(a) != digest(b)
    z = torch.randn(9, dtype=torch.complex64)
    assert digest(z.conj()) == digest(z.conj().resolve_conj()) != digest(z)
    assert digest(z.conj().imag) == digest(-z.imag.contiguous())
    assert digest(torch.empty(0)) == 0
