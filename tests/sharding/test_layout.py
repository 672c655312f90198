"""Layouts and boxes: pure integers, proved by counting every element."""

import itertools
import math
import random

import pytest

from dist_asgd.boxes import boxes
from dist_asgd.sharding.layout import PARAMETER_ALIGNMENT, UNIT, plan_buckets


def elements(box, shape):
    """The row-major indices of the box's elements, in the order of the box's own elements."""
    ranges = [range(offset, offset + size) for offset, size in zip(box.offsets, box.sizes, strict=True)]
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    return [sum(i * s for i, s in zip(index, strides, strict=True)) for index in itertools.product(*ranges)]


def check_boxes(shape, start, stop):
    found = boxes(shape, start, stop)
    assert [e for box in found for e in elements(box, shape)] == list(range(start, stop)), (shape, start, stop)
    assert len(found) <= max(1, 2 * len(shape) - 1)
    assert all(box.numel > 0 for box in found)


SMALL_SHAPES = [shape for ndim in range(4) for shape in itertools.product(range(1, 4), repeat=ndim)]


@pytest.mark.parametrize("ndim", range(4))
def test_boxes_of_every_range_of_every_small_shape(ndim):
    for shape in (shape for shape in SMALL_SHAPES if len(shape) == ndim):
        numel = math.prod(shape)
        for start, stop in itertools.combinations_with_replacement(range(numel + 1), 2):
            check_boxes(shape, start, stop)


def test_boxes_of_random_shapes():
    chance = random.Random(0)
    for _ in range(5000):
        shape = tuple(chance.randint(1, 7) for _ in range(chance.randint(1, 5)))
        start, stop = sorted(chance.randint(0, math.prod(shape)) for _ in range(2))
        check_boxes(shape, start, stop)


def check_plan(numels, world_size, max_numel):
    buckets = plan_buckets(numels, world_size=world_size, max_numel=max_numel)
    indices = [span.index for bucket in buckets for span in bucket.spans]
    assert indices == list(reversed(range(len(numels))))
    owned = [0] * len(numels)
    for bucket in buckets:
        assert bucket.numel % (world_size * UNIT) == 0
        assert bucket.numel <= max(max_numel, *(span.stop for span in bucket.spans)) + world_size * UNIT
        end = 0
        for span in bucket.spans:
            assert span.start >= end and span.start % PARAMETER_ALIGNMENT == 0
            assert span.start - end < PARAMETER_ALIGNMENT and span.numel == numels[span.index]
            end = span.stop
        for rank in range(world_size):
            shard_start, shard_stop = bucket.shard(rank)
            assert shard_stop - shard_start == bucket.shard_numel and shard_start % UNIT == 0
            for piece in bucket.pieces(rank):
                span = bucket.spans[piece.position]
                assert span.start + piece.start == shard_start + piece.shard_start  # the same element
                assert 0 <= piece.shard_start < piece.shard_stop <= bucket.shard_numel
                assert piece.start == owned[span.index], "pieces of a parameter follow one another by rank"
                owned[span.index] = piece.stop
    assert owned == list(numels)


def test_every_element_has_one_owner():
    chance = random.Random(1)
    for _ in range(2000):
        numels = [chance.choice([0, 1, 7, 8, 31, 64, 257, 1000]) for _ in range(chance.randint(0, 25))]
        check_plan(numels, chance.randint(1, 9), chance.choice([1, 100, 1000, 10**9]))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 1000])
@pytest.mark.parametrize("numels", [[], [0], [0, 0, 3], [1], [10**12], [5] * 300])
def test_extreme_plans(numels, world_size):
    check_plan(numels, world_size, 6_553_600)


def test_shards_of_very_unequal_parameters_are_balanced():
    (bucket,) = plan_buckets([1000 * 1000, 1000, 1000, 10], world_size=3, max_numel=2**23)
    owned = [sum(piece.stop - piece.start for piece in bucket.pieces(rank)) for rank in range(3)]
    assert sum(owned) == 1_002_010
    assert max(owned) - min(owned) <= UNIT


def test_a_large_parameter_has_a_bucket_of_its_own():
    buckets = plan_buckets([10, 1000, 10, 10], world_size=2, max_numel=100)
    assert [[span.index for span in bucket.spans] for bucket in buckets] == [[3, 2], [1], [0]]
