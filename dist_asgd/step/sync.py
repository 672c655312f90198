"""Before a step: every gradient reduced, and every rank of one mind about what the step does."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from dist_asgd.asgd.schedule import Hyperparameters, Scaling
from dist_asgd.buckets.base import Bucket
from dist_asgd.buckets.reducer import Reducer
from dist_asgd.comm.consensus import Agreement, DifferentOperations, fingerprint
from dist_asgd.step.consistency import step_code, step_facts
from dist_asgd.step.cuda_graphs import refuse_capture
from dist_asgd.step.forward_wait import ForwardWaits
from dist_asgd.step.gradient_check import gradient_sample, require_same_gradients
from dist_asgd.step.validation import Groups, require_gradients, require_registered, some_of

# Steps in a row without a gradient, after which it is said: of all parameters; of one (models may use them in turns).
NONE_USED, ONE_UNUSED = 3, 100

# Steps in which gradients are compared, as long as some of them say nothing, being zero.
MAX_COMPARISONS = 100

STEP = "step()"  # the operation

Flags = dict[Bucket, list[bool]]  # a fact about each parameter of each bucket


@dataclass(frozen=True, slots=True)
class Settled:
    """What a step does, the same on every rank."""

    options: list[Hyperparameters]  # by group
    active: Flags  # which parameters take the step


def take(settled: Settled, buckets: Sequence[Sequence[Bucket]], scaling: Scaling | None) -> None:
    """Takes the step: updates the ``buckets``, by group, and starts their all-gathers. Collective.

    From the last bucket: its parameters are those that the next forward asks for first.
    """
    options = [(h, bucket) for h, of_group in zip(settled.options, buckets, strict=True) for bucket in of_group]
    for h, bucket in reversed(options):
        flags = settled.active[bucket]
        if any(flags):
            bucket.update(h, None if all(flags) else flags, scaling)
        if any(flags) or bucket.always_gathers:
            bucket.start_gather()


class Settlement:
    """The one point of a step at which ranks talk about anything but gradients and parameters.

    Args:
        reducer: of the buckets that reduce.
        waits: of the module, if one was given.
        find_unused: whether a parameter whose gradients are reduced here may lack one on some ranks, or all.
    """

    def __init__(self, agreement: Agreement, reducer: Reducer, waits: ForwardWaits, find_unused: bool) -> None:
        self.agreement = agreement
        self._reducer, self._waits = reducer, waits
        self._find_unused = find_unused
        self._comparisons = 0
        self._started = False  # whether ranks have agreed on a step since parameters were added
        self._unmet = 0  # fingerprint of the steps on which ranks have not talked
        self._without: Counter[str] = Counter()  # steps in a row that found no gradient, by name of the parameter
        self._warned = self._warned_orphans = False

    @property
    def passes(self) -> int:
        return self._reducer.passes

    @property
    def enabled(self) -> bool:
        """False inside ``no_sync()``."""
        return self._reducer.enabled

    def suspended(self) -> AbstractContextManager[None]:
        """Inside, gradients stay on this rank."""
        return self._reducer.suspended()

    def align(self, operation: str, buckets: Sequence[Bucket] = (), error: Exception | None = None) -> None:
        """Comes before the collectives of any ``operation`` but a step. Collective.

        Brings every rank to the same number of passes. Then raises on every rank where any rank brings an ``error``,
        has parameters that are not those of ``buckets`` any more, or is in another operation.
        """
        self._reducer.close_pass()
        try:
            self._check_parameters(buckets)
        except RuntimeError as caught:
            error = error or caught
        self._meet(operation, [], error)

    def start_again(self) -> None:
        """Parameters were added: the next step is the first with them."""
        self._started, self._comparisons = False, 0

    def warn_reduced_twice(self) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                "gradients are reduced twice: by DistributedDataParallel and by ShardedASGD(gradients='local'). The "
                "results are right, the work is double: pass gradients='reduced', or do not wrap the model",
                stacklevel=2,
            )

    def settle(
        self, operation: str, groups: Groups, buckets: Sequence[Bucket], error: Exception | None = None
    ) -> Settled:
        """Reduces what is not yet reduced. Collective. An ``error`` of this rank becomes that of all.

        Raises the same error on every rank where any rank found one or where ranks differ, also in ``operation``;
        gradients are then as they were, and no collective is left unmatched.
        """
        steps = False
        try:
            settled = self._settle(operation, groups, buckets, error)
            steps = operation == STEP
        finally:
            if not steps:  # what is held longer, nobody could free
                for bucket in buckets:
                    bucket.let_go()
        return settled

    def _settle(self, operation: str, groups: Groups, buckets: Sequence[Bucket], error: Exception | None) -> Settled:
        reducing = self._reducer.buckets
        options: list[Hyperparameters] = []
        present: Flags = {}
        shared: dict[Bucket, list[int]] = {}
        code = 0
        for bucket in buckets:
            bucket.wait()
        self._reducer.close_pass()
        try:
            if error is not None:
                raise error
            options = [Hyperparameters.of(group) for group in groups]
            refuse_capture(options, self._started, buckets)
            present = self._check(buckets)
            if self.agreement.world_size > 1:
                shared = {bucket: self._shared(bucket, present[bucket]) for bucket in buckets}
                code = step_code(options, shared, [bucket.begun(self._reducer.passes) for bucket in reducing])
        except Exception as caught:
            error = caught
        if self._started and operation == STEP and not any(bucket.meets for bucket in buckets):
            if error is not None:
                raise error
            self._unmet = fingerprint((self._unmet, code))
            for bucket in buckets:
                bucket.place_gradients()
            return Settled(options, present)
        unreduced = any(bucket.has_unreduced() for bucket in reducing)
        high, minus_low, any_unreduced = self._meet(operation, [code, -code, unreduced], error)
        if high != -minus_low:
            self.agreement.require_equal("this step", step_facts(options, shared))
            raise RuntimeError(
                "the gradients of different ranks were begun in different backwards, so they do not belong together: "
                "ranks dropped them (zero_grad(), p.grad = ...) between different backwards, or only some did. Drop "
                "them on every rank (zero_grad()), and after that run as many backwards on each"
            )
        if any_unreduced:
            self._reducer.reduce_now()
        self._reducer.rest()
        for bucket in buckets:
            bucket.place_gradients()
        self._begin(buckets, present)
        return Settled(options, self._union(present) if reducing and self._find_unused else present)

    def _begin(self, buckets: Sequence[Bucket], present: Flags) -> None:
        """Until there was a step with gradients: compares those that nothing but the user makes equal. Collective."""
        if self._started:
            return
        some = any(map(any, present.values()))
        samples, found = zip(*self.agreement.gather((gradient_sample(buckets), some)), strict=True)
        self._comparisons += 1
        told_apart = require_same_gradients(samples) or self._comparisons >= MAX_COMPARISONS
        self._started = told_apart and any(found)

    def _check_parameters(self, buckets: Iterable[Bucket]) -> None:
        """Raises ``RuntimeError`` where the model or a parameter is not what the optimizer was built for any more."""
        self._waits.check()
        for bucket in buckets:
            bucket.check_parameters()

    def _meet(self, operation: str, values: Sequence[int], error: Exception | None) -> list[int]:
        """Exchanges ``values`` for their maximum, with every rank at the same pass; then raises any rank's ``error``.

        In this order: an error leaves no collective unmatched.
        """
        mine = [self._reducer.passes, error is not None, self._unmet, -self._unmet, *values]
        try:
            passes, failed, high, minus_low, *result = self.agreement.maximum(operation, mine)
        except DifferentOperations as different:  # each of them begins here
            self._reducer.catch_up(different.values[0])
            raise
        self._reducer.catch_up(passes)
        if failed:
            self.agreement.maximum(operation, error=error)
        self._unmet = 0
        if high != -minus_low:
            raise RuntimeError(
                f"before {operation}, ranks took different steps, as their options (lr, ...), or which parameters were "
                "frozen or had gradients, were not the same on every rank: what they have computed does not belong "
                "together. Load an earlier state"
            )
        return result

    def _check(self, buckets: Sequence[Bucket]) -> Flags:
        """Checks what a user can have broken since the last step; tells which parameters have a gradient here."""
        found = {bucket for bucket in buckets if bucket.find_gradients()}
        self._check_parameters(bucket for bucket in buckets if bucket not in found)
        if not self._started:
            require_registered(buckets)
        present = {}
        for bucket in buckets:
            present[bucket] = [True] * len(bucket.params) if bucket in found else bucket.check_gradients()
            if bucket.reduces and not self._find_unused and not all(present[bucket]):
                require_gradients(bucket, present[bucket])
        return present

    def _shared(self, bucket: Bucket, present: Sequence[bool]) -> list[int]:
        """What must be the same on every rank about each parameter: an index of ``checks.PARAMETER_FACTS``."""
        trained = bucket.requires_grad()
        if bucket.uneven or (bucket.reduces and self._find_unused):
            return [int(train) for train in trained]
        facts = zip(trained, present, bucket.has_misplaced(), strict=True)
        return [train + 2 * has + 4 * misplaced for train, has, misplaced in facts]

    def _union(self, flags: Flags) -> Flags:
        reducing = {bucket: own for bucket, own in flags.items() if bucket.reduces}
        union = iter(self.agreement.union([flag for own in reducing.values() for flag in own]))
        return flags | {bucket: [next(union) for _ in own] for bucket, own in reducing.items()}

    def warn_if_orphaned(self, settled: Settled) -> None:
        """What the model uses no more gets no gradient; torch's optimizers say nothing. A given module is checked."""
        if self._warned_orphans or all(map(all, settled.active.values())):
            self._without.clear()
            return
        checked = self._waits.module is not None
        without = [
            name
            for bucket, flags in settled.active.items()
            if not (checked and bucket.always_registered)
            for name, param, has in zip(bucket.names, bucket.params, flags, strict=True)
            if param.requires_grad and not has
        ]
        self._without = Counter({name: self._without[name] + 1 for name in without})
        none_used = not any(map(any, settled.active.values()))
        limit = NONE_USED if none_used else ONE_UNUSED
        orphans = [name for name, steps in self._without.items() if steps >= limit]
        if orphans and not (none_used and len(orphans) < len(without)):
            self._warned_orphans = True
            warnings.warn(
                f"{limit} steps in a row found no gradient for parameter {some_of(orphans)}. If the model's "
                "parameters were replaced after the optimizer was built (load_state_dict(assign=True)), build it "
                "again, or pass module=, which notices with plain parameters. Run the last backward of a step outside "
                "of no_sync(). Freeze those that are never used (requires_grad=False)",
                stacklevel=4,
            )
