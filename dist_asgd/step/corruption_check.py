"""Comparison of everything that several ranks hold copies of: silent corruption is found and its rank is named.

[Note: silent corruption] A bit that flips in the memory of one rank raises nothing: training goes on from a wrong
value. Steps keep copies equal bit for bit, so a copy that differs tells. Ranks compare digests, which are a few bytes
long. Of more than two copies the odd one is named; of two, nothing tells which is wrong.

Copies are compared before the update. Where ranks share the state of a parameter (ZeRO, replicas that share), a step
replaces all copies by the one of the rank that owns the element. So a flipped bit of another rank lasts until the next
step, and one of the owner is equal everywhere after it: a check finds both if it is the next step's. Where each rank
updates a copy of its own, a difference stays until a check finds it. What one rank alone holds (masters and averages
that are sharded, blocks without replicas) cannot be compared. No digest of it is kept to find changes: users may write
to parameters in ways that torch does not count, and a digest cannot tell such a write from a flipped bit.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dist_asgd.buckets.base import ParameterBucket
from dist_asgd.comm.consensus import Agreement, fingerprint
from dist_asgd.comm.digests import digests
from dist_asgd.comm.roll_call import ranges
from dist_asgd.sharding.shard_views import local_of
from dist_asgd.step.value_check import Digests, differences

MOST_RANKS = 8  # ranks that a message lists with their hosts


def require_equal_copies(agreement: Agreement, buckets: Sequence[ParameterBucket], operation: str) -> None:
    """Raises ``RuntimeError`` on every rank, naming ranks and parameters, where copies differ. Collective.

    Compares parameters, and the state of parameters of which each rank keeps the whole state. Reads all of it once, and
    waits for its devices. Ranks exchange some bytes for each set of ranks that hold copies.

    Args:
        agreement: exchanges among the ranks of the buckets.
        buckets: all buckets, or equally many on every rank.
        operation: the user's call and its number, in words.
    """
    sets: dict[Sequence[int], list[ParameterBucket]] = {}
    for bucket in buckets:
        if bucket.copy_ranks:
            bucket.wait()
            sets.setdefault(bucket.copy_ranks, []).append(bucket)
    codes = {of_set[0].names[0]: (ranks[0], _code(of_set)) for ranks, of_set in sets.items()}
    if not differences(agreement.gather(codes)):
        return
    named = [_digests(bucket) for of_set in sets.values() for bucket in of_set]
    different = differences(agreement.gather({what: found for of_bucket in named for what, found in of_bucket.items()}))
    if not different:  # the padding between parameters differs, which nothing reads
        return
    what_of: dict[str, list[str]] = {}  # copies that differ, by the ranks that hold each value, in words
    for what, values in different:
        what_of.setdefault(_sides(values, agreement.places), []).append(what)
    found = "; ".join(f"{_some(whats)} differs: {sides}" for sides, whats in what_of.items())
    raise RuntimeError(
        f"{operation} has found copies that differ between ranks, and has changed nothing. {found}. Either a bit "
        "flipped, in a memory or on a link, or something wrote to parameters or state on some ranks only. Go on from "
        "the newest checkpoint; test the memory of a host that is named again, or leave it out"
    )


def _code(buckets: Sequence[ParameterBucket]) -> int:
    """Returns a fingerprint of this rank's copies in all of ``buckets``."""
    numbers = digests([tensor for bucket in buckets for tensor in bucket.value_tensors()])
    for bucket in buckets:
        numbers += digests(list(_whole_state(bucket).values()))  # of one bucket at a time: some of it is copied
    return fingerprint(numbers)


def _digests(bucket: ParameterBucket) -> Digests:
    """Returns the digest of this rank's copy of each parameter, and of its state if this rank keeps the whole."""
    copies = {f"parameter {name!r}": local_of(param) for name, param in zip(bucket.names, bucket.params, strict=True)}
    for name, tensor in _whole_state(bucket).items():
        for position, piece in bucket.shard.pieces.items():
            copies[f"{name} of parameter {bucket.names[position]!r}"] = tensor[piece.shard_start : piece.shard_stop]
    numbers = digests(list(copies.values()))
    return {what: (bucket.copy_ranks[0], number) for what, number in zip(copies, numbers, strict=True)}


def _whole_state(bucket: ParameterBucket) -> dict[str, Tensor]:
    """Returns masters and averages that have begun (1-D), by name, if this rank keeps the whole state of ``bucket``."""
    shard = bucket.shard
    if bucket.collectives is not None:
        return {}
    return {
        name: tensor
        for name, tensor in shard.tensors().items()
        if name == "master" or shard.has_average(name.removeprefix("ax"))
    }


def _sides(values: Sequence[Sequence[int]], places: Sequence[str]) -> str:
    """Returns in words which ranks hold each value; those of a majority come last and without their hosts."""
    *others, most = sorted(values, key=len)
    total = sum(map(len, values))
    if 2 * len(most) > total:
        return f"{_with_places(others, places)} is not like {ranges(most)}"
    return f"{_with_places([*others, most], places)} have different values, and no value has a majority"


def _with_places(values: Sequence[Sequence[int]], places: Sequence[str]) -> str:
    ranks = sorted(rank for value in values for rank in value)
    shown = ", ".join(f"rank {rank} ({places[rank]})" for rank in ranks[:MOST_RANKS])
    return shown + (f" and {len(ranks) - MOST_RANKS} more" if len(ranks) > MOST_RANKS else "")


def _some(whats: Sequence[str]) -> str:
    return ", ".join(whats[:3]) + (f" and {len(whats) - 3} more" if len(whats) > 3 else "")
