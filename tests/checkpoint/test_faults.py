"""Damage in every kind of file is refused before anything live changes. More of it: python -m benchmarks.faults."""

from tests.support.faults import CHECKS, WHOLE_KINDS, find


def test_every_fault_is_refused_by_all_ranks_and_changes_nothing():
    found = find(100, seed=1)
    wrong = [row for row in found if not all(row[check] for check in CHECKS)]
    assert not wrong, "\n".join(map(str, wrong))
    assert len({row["fault"] for row in found}) == 100
    kinds = {"head of a tensor", "payload of a tensor", "tail of a tensor", "values for stock readers", *WHOLE_KINDS}
    assert {row["place"] for row in found} == kinds
    assert {row["ranks"] for row in found} == {1, 2}
