"""Comparison of parameters between the ranks that hold copies of them: a step from copies that differ would mix them.

Ranks start with equal copies, and steps keep them equal. Weights that somebody writes on one rank only (a checkpoint
loaded under ``if rank == 0:``) do not stay there: each rank updates its shard, so every rank would get a part of them.
"""

from __future__ import annotations

from collections.abc import Sequence

from dist_asgd.buckets.base import ParameterBucket
from dist_asgd.comm.consensus import Agreement, fingerprint
from dist_asgd.comm.digests import digests
from dist_asgd.sharding.shard_views import local_of
from dist_asgd.step.validation import some_of

# The first of the ranks that must have equal values, and the digest of the values on this rank; by name of the values.
Digests = dict[str, tuple[int, int]]

OF_STEPS = (
    "and a step would mix them. Either it was written on some ranks only since the optimizer was built, as by "
    "load_state_dict() under `if rank == 0:`, or ranks began with different values, which only gradients='local' and "
    "DistributedDataParallel make equal. Write the same values on every rank"
)
OF_AVERAGES = (
    "and their average, of which each rank has a share, would mix them. Build ShardedAverages when values are equal "
    "(DistributedDataParallel makes them so) and keep them so; where each rank has parameters of its own, pass "
    "shard_replicas=False"
)


def require_same_values(
    agreement: Agreement, buckets: Sequence[ParameterBucket], *, written_only: bool, advice: str = OF_STEPS
) -> None:
    """Raises ``RuntimeError`` on every rank, naming parameters, where copies differ between ranks. Collective.

    Waits for the devices of the parameters, and reads every parameter that it compares once.

    Args:
        agreement: exchanges among the ranks of the optimizer.
        buckets: all buckets of the optimizer.
        written_only: whether to compare only buckets to which some rank has written.
        advice: the end of the message, on what would mix copies that differ, and what to do.
    """
    shared = {bucket.names[0]: bucket for bucket in buckets if bucket.copy_ranks}
    if written_only:
        if _all_wrote_alike(agreement, [bucket for bucket in shared.values() if bucket.was_written]):
            return
        written = agreement.gather([name for name, bucket in shared.items() if bucket.was_written])
        wanted = set().union(*written)
        shared = {name: bucket for name, bucket in shared.items() if name in wanted}
    for bucket in shared.values():
        bucket.wait()
    found = {name: (bucket.copy_ranks[0], bucket.digest()) for name, bucket in shared.items()}
    different = {name for name, _ in differences(agreement.gather(found))}
    if different:
        _require_same([bucket for name, bucket in shared.items() if name in different], agreement, advice)
    for bucket in shared.values():
        bucket.note_equal_values()


def _all_wrote_alike(agreement: Agreement, written: Sequence[ParameterBucket]) -> bool:
    """Whether every rank has written to the same buckets and they are equal now, found by one exchange. Collective."""
    for bucket in written:
        bucket.wait()
    code = fingerprint([(bucket.names[0], bucket.digest()) for bucket in written])
    high, minus_low = agreement.maximum("the comparison of parameters", [code, -code])
    if high == -minus_low:
        for bucket in written:
            bucket.note_equal_values()
    return high == -minus_low


def _require_same(buckets: Sequence[ParameterBucket], agreement: Agreement, advice: str) -> None:
    """Raises the error, unless it is only padding between the parameters of ``buckets`` that differs. Collective."""
    own: Digests = {}
    for bucket in buckets:
        numbers = digests([local_of(param) for param in bucket.params])
        own |= {name: (bucket.copy_ranks[0], number) for name, number in zip(bucket.names, numbers, strict=True)}
    if different := differences(agreement.gather(own)):
        (first, *_), (other, *_), *_ = different[0][1]
        names = some_of(list(dict.fromkeys(name for name, _ in different)))
        raise RuntimeError(f"ranks {first} and {other} have different values of parameter {names}, {advice}")


def differences(everyone: Sequence[Digests]) -> list[tuple[str, list[list[int]]]]:
    """Returns, for each set of copies that differ, their name and the ranks that hold each value, the first rank first.

    Args:
        everyone: the digests of each rank.
    """
    ranks_of: dict[tuple[str, int], dict[int, list[int]]] = {}
    for rank, found in enumerate(everyone):
        for name, (first, number) in found.items():
            ranks_of.setdefault((name, first), {}).setdefault(number, []).append(rank)
    return [(name, list(values.values())) for (name, _), values in ranks_of.items() if len(values) > 1]
