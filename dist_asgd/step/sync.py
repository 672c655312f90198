"""Agreement of the ranks before a step: one exchange that spreads errors, compares options and completes gradients.

``StepAgreement`` talks over ``Agreement`` (``comm/consensus.py``), on the CPU; ``update_and_gather`` takes the step.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from dist_asgd.asgd.schedule import Hyperparameters, Scaling
from dist_asgd.buckets.base import Bucket
from dist_asgd.buckets.reducer import Reducer
from dist_asgd.comm.consensus import Agreement, fingerprint
from dist_asgd.comm.profiling import profiled
from dist_asgd.comm.roll_call import SLOW_SECONDS, DifferentOperations, RankMissing
from dist_asgd.step.consistency import TRAINED_WITH_GRADIENT, step_code, step_facts
from dist_asgd.step.corruption_check import require_equal_copies
from dist_asgd.step.cuda_graphs import refuse_capture
from dist_asgd.step.forward_wait import ForwardWaits
from dist_asgd.step.gradient_check import gradient_sample, require_same_gradients
from dist_asgd.step.validation import (
    Groups,
    require_built_groups,
    require_gradients,
    require_not_sharded_since,
    some_of,
)
from dist_asgd.step.value_check import require_same_values

# Consecutive steps without a gradient after which a warning is due: for all parameters together, for a parameter that
# has never had one, unless find_unused_parameters allows for it, and for any other parameter, which a model may use in
# turns.
NONE_USED, NEVER_USED, ONE_UNUSED = 3, 10, 100

# Steps in which gradients are compared between ranks at most, while some of them are zero and so prove nothing.
MAX_COMPARISONS = 100

STEP = "step()"  # name of the operation that takes a step

NOTHING, WRITTEN, FAILED = range(3)  # news of a rank: somebody wrote to its parameters, or its checks raised

Flags = dict[Bucket, list[bool]]  # one flag for each parameter of each bucket


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Options of a step and the parameters that take it; equal on every rank once the ranks have agreed."""

    options: list[Hyperparameters]  # one for each param group
    active: Flags  # which parameters have a gradient, and so take the step


def update_and_gather(plan: StepPlan, buckets: Sequence[Sequence[Bucket]], scaling: Scaling | None) -> None:
    """Updates this rank's shard of every bucket and starts the all-gather of the result. Collective.

    Args:
        buckets: the buckets of each param group.
        scaling: loss scale of ``torch.amp.GradScaler`` and whether it has found an inf; None without a scaler.
    """
    with_options = [(h, bucket) for h, of_group in zip(plan.options, buckets, strict=True) for bucket in of_group]
    # The last bucket goes first: it has the parameters that the next forward reads first.
    for h, bucket in reversed(with_options):
        active = plan.active[bucket]
        some = True in active
        if some:
            with profiled("update"):
                bucket.update(h, active if False in active else None, scaling)
        if some or bucket.always_gathers:
            with profiled("gather"):
                bucket.start_gather()


class StepAgreement:
    """Agreement of the ranks before each step and before each other collective call of the optimizer.

    Args:
        agreement: the exchanges that this class is made of.
        reducer: holds the buckets whose gradients the optimizer averages.
        forward_waits: holds the model, if the optimizer was given one.
        find_unused: whether a parameter whose gradient the optimizer averages may lack one on some ranks, or on all.
        alone: whether the optimizer was built without a process group.
        verify_every: the number of steps after which all copies are compared again; None for never.
    """

    def __init__(
        self,
        agreement: Agreement,
        reducer: Reducer,
        forward_waits: ForwardWaits,
        *,
        find_unused: bool,
        alone: bool,
        verify_every: int | None,
    ) -> None:
        self.agreement = agreement
        self._reducer, self._forward_waits = reducer, forward_waits
        self._find_unused, self._alone, self._verify_every = find_unused, alone, verify_every
        self._built: list[list[Tensor]] = []  # the parameters of each param group when it was added
        self._comparisons = 0  # steps in which gradients were compared
        self._buckets: list[Bucket] = []
        self._started = False  # whether the ranks have agreed on a step since the last group was added
        self._agrees_always = False  # whether a rank needs an exchange before every step; known when started
        self.history = 0  # fingerprint of writes to the state, and of the steps that were taken without an exchange
        self._unverified = 0  # steps since all copies were compared, or since a state was loaded; equal on every rank
        self._steps = 0  # steps taken; a parameter without a gradient in all of them has never had one
        self._without: Counter[str] = Counter()  # consecutive steps without a gradient, by name of the parameter
        self._warned_reduced_twice = self._warned_unused = False

    def add_group(self, params: Sequence[Tensor], buckets: Sequence[Bucket]) -> None:
        """Records the parameters of a new param group; the next step counts as the first one again."""
        self._built.append(list(params))
        self._buckets += buckets
        self._started, self._comparisons = False, 0

    def clear(self) -> None:
        """Forgets all param groups, before their buckets are built again."""
        self._built.clear()

    # What gradients ask for (``buckets/gradient_tensors.py``) --------------------------------------------------------

    @property
    def passes(self) -> int:
        """Number of reduction passes that this rank has begun (``buckets/reducer.py``)."""
        return self._reducer.passes

    @property
    def enabled(self) -> bool:
        """Whether backward reduces gradients; False inside ``no_sync()``."""
        return self._reducer.enabled

    def warn_reduced_twice(self) -> None:
        """Warns, once, that DistributedDataParallel and the optimizer both average the gradients."""
        if not self._warned_reduced_twice:
            self._warned_reduced_twice = True
            warnings.warn(
                "gradients are reduced twice: by DistributedDataParallel and by ShardedASGD(gradients='local'). The "
                "results are right, the work is double: pass gradients='reduced', or do not wrap the model",
                stacklevel=2,
            )

    # Exchanges -------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def together(self, operation: str, *, replaces_state: bool = False) -> Iterator[list[int]]:
        """Runs a block of checks on every rank; if it raises on one rank, every rank raises. Collective.

        One exchange at the end of the block does all of the following:

        - It compares ``operation``, the user's call in words.
        - It brings every rank to the same number of reduction passes, so that no error leaves a reduction unmatched.
        - It spreads an error of the block, also ``KeyboardInterrupt``.
        - It compares the steps that were taken without an exchange, and parameters that somebody else has written to.
        - It replaces the integers that the block has put into the yielded list, at most 3, by their maximum over the
          ranks.

        Args:
            replaces_state: whether the operation loads a state, so that it may follow steps or writes that differed.

        Raises:
            RuntimeError, ValueError, TypeError: the same on every rank, where the block raised on a rank, or where
                ranks are in different operations, have taken different steps, or have other values of a parameter.
        """
        # ``Agreement.together`` would make an exchange of its own before the one with the integers, and a step has only
        # one. So the error travels as a flag in that one, and ``Agreement.together`` spreads its text once it is set.
        self._reducer.close_pass()
        values: list[int] = []
        error: BaseException | None = None
        try:
            yield values
        except RankMissing:
            raise
        except BaseException as caught:
            error = caught
        written = not replaces_state and any(bucket.was_written for bucket in self._buckets)
        news = FAILED if error is not None else WRITTEN if written else NOTHING
        history = 0 if replaces_state else self.history
        try:
            maxima = self.agreement.maximum(operation, [self._reducer.passes, news, history, -history, *values])
        except RuntimeError as failure:
            if isinstance(failure, DifferentOperations):
                self._finish_reductions(failure)
            if error is None:
                raise
            raise failure from error
        passes, news, high, minus_low = maxima[:4]
        values[:] = maxima[4:]
        self._reducer.catch_up(passes)
        if news == FAILED:
            with self.agreement.together(operation):
                if error is not None:
                    raise error
        if high != -minus_low:
            raise RuntimeError(
                f"before {operation}, ranks took different steps, as their options (lr, ...), or which parameters were "
                "frozen or had gradients, or writes to optimizer.state, were not the same on every rank: what they "
                "have computed does not belong together. Load an earlier state"
            )
        if news == WRITTEN:
            require_same_values(self.agreement, self._buckets, written_only=True)

    def _finish_reductions(self, failure: DifferentOperations) -> None:
        """Finishes what the ranks reduce, so far as those in another call take part in it."""
        if any(failure.values):
            self._reducer.catch_up(failure.values[0])  # the number of passes, on every rank
        else:  # a rank that calls another object may run no backward
            self._reducer.finish_within(SLOW_SECONDS)

    def agree_on(self, operation: str, groups: Groups | None = None, buckets: Sequence[Bucket] = ()) -> None:
        """Makes the exchange of ``together`` for an operation that checks only what the optimizer was built for.

        Collective. Raises on every rank where the ``groups``, the parameters of ``buckets`` or the module have changed
        on any rank since the optimizer was built.
        """
        with self.together(operation):
            if groups is not None:
                self.check_groups(groups)
            self.check_parameters(buckets)

    def agree_and_reduce(self, operation: str, groups: Groups, buckets: Sequence[Bucket]) -> StepPlan:
        """Checks what a step needs, agrees on it with the other ranks and completes the gradients. Collective.

        Afterwards every gradient is reduced and has the placement of its parameter. A step in which no rank waits for
        another makes an exchange only if it is the first one since a param group was added.

        Args:
            operation: the user's call in words. Buckets keep the gradients that they have found for ``step()`` only.
            groups: ``optimizer.param_groups``.
            buckets: all buckets of the optimizer.

        Raises:
            RuntimeError, ValueError: the same on every rank, where a check failed on a rank or where ranks differ;
                without an exchange, on this rank alone. The gradients are then as they were, and no collective is left
                unmatched.
        """
        takes_step = False
        try:
            for bucket in buckets:
                bucket.wait()
            if operation == STEP and self._started and not (self._agrees_always or self._must_verify):
                plan = self._agree_later(groups, buckets)
            else:
                plan = self._agree_now(operation, groups, buckets)
            if operation == STEP and self._must_verify:
                require_equal_copies(self.agreement, buckets, f"step() number {self._steps + 1} of this optimizer")
                self._unverified = 0
            takes_step = operation == STEP
        finally:
            if not takes_step:  # nothing else would free the gradients that the buckets hold
                for bucket in buckets:
                    bucket.release_gradients()
        return plan

    @property
    def _must_verify(self) -> bool:
        """Whether this step compares all copies. Every rank gets the same answer if all have taken the same steps.

        Where ranks have not, the exchange before the comparison says so.
        """
        return self._verify_every is not None and self._unverified % self._verify_every == 0

    def _agree_later(self, groups: Groups, buckets: Sequence[Bucket]) -> StepPlan:
        """Checks a step on this rank alone; the next exchange finds out whether the ranks took the same one."""
        self.agreement.note(STEP)
        plan, facts = self._check_step(groups, buckets)
        self.history = fingerprint((self.history, self._code(plan, facts)))
        for bucket in buckets:
            bucket.place_gradients()
        return plan

    def _agree_now(self, operation: str, groups: Groups, buckets: Sequence[Bucket]) -> StepPlan:
        reducing = self._reducer.buckets
        with self.together(operation) as values:
            plan, facts = self._check_step(groups, buckets)
            code = self._code(plan, facts)
            values += [code, -code, any(bucket.has_unreduced() for bucket in reducing)]
        high, minus_low, any_unreduced = values
        if high != -minus_low:
            changes = [change for bucket in reducing for change in bucket.changes]
            self.agreement.require_equal("this step", step_facts(plan.options, facts, changes))
            raise RuntimeError(
                "the gradients of different ranks were begun in different backwards, so they do not belong together: "
                "ranks dropped them (zero_grad(), p.grad = ...) between different backwards, or only some did. Drop "
                "them on every rank (zero_grad()), and after that run as many backwards on each"
            )
        if any_unreduced:
            self._reducer.reduce_now()
        self._reducer.skip_frozen_buckets()
        for bucket in buckets:
            bucket.place_gradients()
        if not self._started:
            require_same_values(self.agreement, buckets, written_only=False)
            self._compare_gradients(buckets, plan)
        return replace(plan, active=self._union(plan.active)) if reducing and self._find_unused else plan

    def _compare_gradients(self, buckets: Sequence[Bucket], plan: StepPlan) -> None:
        """Compares gradients that ranks must have alike, until a comparison proves that they do. Collective."""
        some = any(map(any, plan.active.values()))
        agrees = any(bucket.agrees_before_step for bucket in buckets)  # a rank without rows of replicas does not
        samples, found, agree = zip(*self.agreement.gather((gradient_sample(buckets), some, agrees)), strict=True)
        self._agrees_always = any(agree)
        self._comparisons += 1
        proven = require_same_gradients(samples) or self._comparisons >= MAX_COMPARISONS
        self._started = proven and any(found)

    def _union(self, flags: Flags) -> Flags:
        """Returns the flags of reducing buckets that are set on any rank, and this rank's flags of other buckets."""
        reducing = {bucket: own for bucket, own in flags.items() if bucket.reduces}
        union = iter(self.agreement.union([flag for own in reducing.values() for flag in own]))
        return flags | {bucket: [next(union) for _ in own] for bucket, own in reducing.items()}

    def note_writes(self, written: Sequence[object]) -> None:
        """Takes what was written to the optimizer's state on this rank for a part of the step that follows."""
        if written:
            self.history = fingerprint((self.history, written))

    def forget_steps(self) -> None:
        """Forgets the steps that were taken: a state that all ranks have loaded has replaced what they computed."""
        self.history = self._unverified = 0

    # Checks on this rank ---------------------------------------------------------------------------------------------

    def check_groups(self, groups: Groups) -> None:
        """Raises ``RuntimeError`` where ``groups`` or the world are not the ones that the optimizer was built for."""
        require_built_groups(self._alone, groups, self._built)

    def check_parameters(self, buckets: Sequence[Bucket]) -> None:
        """Raises ``RuntimeError`` where the module or a parameter is not what the optimizer was built for any more."""
        self._forward_waits.check()
        for bucket in buckets:
            bucket.check_parameters()

    def _check_step(self, groups: Groups, buckets: Sequence[Bucket]) -> tuple[StepPlan, dict[Bucket, list[int]]]:
        """Returns the step as this rank's gradients have it, and the facts about parameters that ranks must share."""
        self.check_groups(groups)
        options = [Hyperparameters.of(group) for group in groups]
        refuse_capture(options, self._started, buckets)
        present = self._check_gradients(buckets)
        if not self._started:
            require_not_sharded_since(buckets)
        alone = self.agreement.world_size == 1
        facts = {} if alone else {bucket: self._facts(bucket, present[bucket]) for bucket in buckets}
        return StepPlan(options, present), facts

    def _check_gradients(self, buckets: Sequence[Bucket]) -> Flags:
        """Checks parameters and gradients; returns which parameters have a gradient on this rank."""
        found = {bucket for bucket in buckets if bucket.find_gradients()}
        self.check_parameters([bucket for bucket in buckets if bucket not in found])
        present = {}
        for bucket in buckets:
            present[bucket] = [True] * len(bucket.params) if bucket in found else bucket.check_gradients()
            if bucket.reduces and not self._find_unused and not all(present[bucket]):
                require_gradients(bucket, present[bucket], self._warned_reduced_twice)
        return present

    def _facts(self, bucket: Bucket, present: Sequence[bool]) -> list[int]:
        """Returns an index of ``PARAMETER_FACTS`` (``step/consistency.py``) for each parameter of ``bucket``."""
        trained, misplaced = bucket.requires_grad(), bucket.has_misplaced()
        if bucket.presharded or (bucket.reduces and self._find_unused):
            return [int(train) for train in trained]
        if all(trained) and all(present) and not any(misplaced):
            return [TRAINED_WITH_GRADIENT] * len(trained)
        facts = zip(trained, present, misplaced, strict=True)
        return [train + 2 * has + 4 * misplaced for train, has, misplaced in facts]

    def _code(self, plan: StepPlan, facts: dict[Bucket, list[int]]) -> int:
        """Returns a fingerprint of the step, equal on ranks that are to take the same step; 0 on a single rank."""
        if self.agreement.world_size == 1:
            return 0
        begun = [(bucket.first_passes(self.passes), bucket.changes) for bucket in self._reducer.buckets]
        return step_code(plan.options, facts, begun)

    def warn_of_unused(self, plan: StepPlan) -> None:
        """Warns, once, of parameters that have had no gradient for many steps; their module may have replaced them.

        torch's optimizers skip such parameters silently. Plain parameters of a given module are left out, because
        ``ForwardWaits.check`` notices when they are replaced.
        """
        self._steps += 1
        self._unverified += 1
        if self._warned_unused or all(map(all, plan.active.values())):
            self._without.clear()
            return
        checked = self._forward_waits.module is not None
        without = [
            name
            for bucket, flags in plan.active.items()
            if not (checked and bucket.always_registered)
            for name, param, has in zip(bucket.names, bucket.params, flags, strict=True)
            if param.requires_grad and not has
        ]
        self._without = Counter({name: self._without[name] + 1 for name in without})
        none_used = not any(map(any, plan.active.values()))
        limit = NONE_USED if none_used else ONE_UNUSED
        never_limit = limit if self._find_unused else min(limit, NEVER_USED)
        unused = [name for name, n in self._without.items() if n >= (never_limit if n == self._steps else limit)]
        if unused and not (none_used and len(unused) < len(without)):
            self._warned_unused = True
            warnings.warn(
                f"{self._without[unused[0]]} steps in a row found no gradient for parameter {some_of(unused)}. If the "
                "model's parameters were replaced after the optimizer was built (fully_shard, parallelize_module, "
                "load_state_dict(assign=True)), build it again, or pass module=, which notices with plain parameters. "
                "Run the last backward of a step outside of no_sync(). Freeze those that are never used "
                "(requires_grad=False)",
                stacklevel=4,
            )
