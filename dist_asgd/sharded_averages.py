"""``ShardedAverages``: averages of a model's weights beside any optimizer, sharded over the ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from dist_asgd._torch_private import outside_graphs
from dist_asgd.asgd.schedule import Scalars
from dist_asgd.averages.kinds import Average, TwoTailed
from dist_asgd.averages.options import PROGRESS, beside_optimizer, suffix_of, suffixes_of
from dist_asgd.averages.triggers import agreed_losses
from dist_asgd.buckets.averaged import AveragedBucket
from dist_asgd.buckets.base import ShardingOptions
from dist_asgd.buckets.build import build_averaged
from dist_asgd.buckets.replicas import Replicas
from dist_asgd.comm.consensus import Agreement, fingerprint
from dist_asgd.comm.process_groups import default_group
from dist_asgd.comm.profiling import profiled
from dist_asgd.metrics import DISTANCE, averages_metrics, distances
from dist_asgd.model_averages.buffers import AveragedBuffers, Treatment, persistent_buffers
from dist_asgd.model_averages.copies import copy_averages
from dist_asgd.model_averages.optimizers import FollowedOptimizers
from dist_asgd.model_averages.parameters import aliases, named_parameters
from dist_asgd.model_averages.state import (
    Member,
    iterates_of,
    members_of,
    plan_load,
    sharded_averages,
    whole_averages,
)
from dist_asgd.model_averages.timing import Timing
from dist_asgd.model_averages.validation import check_arguments, check_module, optimizers_in
from dist_asgd.sharding.precision import Precision
from dist_asgd.step.consistency import parameter_facts
from dist_asgd.step.corruption_check import require_equal_copies
from dist_asgd.step.validation import check_parameters
from dist_asgd.step.value_check import OF_AVERAGES, require_same_values
from dist_asgd.swap import NOT_BOTH, SwapGuard, refused_during_swap, swapped
from dist_asgd.wrappers import ParallelModules

# Bytes of parameters that one call averages, and that a swap gathers at once. Half as many cost an update 5 % of time.
BUCKET_BYTES = 64 * 2**20


class ShardedAverages:
    """Averages of a model's weights beside any optimizer, in fp32 or wider, 1/N on each of N ranks.

    An average takes an iterate, the parameters as they are, after each step of the optimizer. It sends nothing: each
    rank averages a share of the elements that it holds. Parameters stay where they are, so other optimizers, hooks and
    wrappers go on as without averages. All layouts work: plain parameters in one process, under torchrun with
    ``ShardedASGD`` and under DistributedDataParallel (1/N of the average each), FSDP2, HSDP, tensor parallelism, and
    FSDP1 with ``use_orig_params=True``::

        averages = ShardedAverages(model.named_parameters(), EMA(0.999), optimizer=optimizer, module=model)
        ...  # train as before
        with averages.averaged_parameters():
            evaluate(model)

    Every average is the recursion ``ax = ax + (p - ax) * mu`` over the iterates ``p``, each operation rounded once, in
    ``average_dtype``. The first iterate becomes the average.

    Collective calls, which every rank must make in one order and with equal arguments: the constructor,
    ``add_param_group``, ``averaged_parameters``, ``full_state_dict``, ``load_state_dict``, ``copy_to``,
    ``compare_tails`` and ``metrics(distance=True)``. ``update``, ``start_averaging``, ``restart_averaging`` and
    ``state_dict`` send nothing, but every rank must call them alike; the next collective call compares that. With
    ``verify_every`` every so many updates are collective.

    Args:
        params (iterable): parameters as ``torch.optim`` takes them, best ``model.named_parameters()``: averages are
            saved by these names, without wrappers' parts. Real or complex leaf tensors of at least 2 bytes a number.
        average (Average, or mapping of names to them): what to keep: ``EMA``, ``Uniform``, ``PolynomialDecay``,
            ``Tail`` or ``TwoTailed``. Several averages are kept in one pass over the parameters.
        optimizer (Optimizer, sequence of them, or None; default None): whose steps to follow. Each parameter follows
            the optimizer that has it. A call of ``step()`` that GradScaler skips, or that finds no gradient, gives no
            iterate. None: call ``update()`` after each step.
        start (number >= 0, default 0): updates before the first iterate counts. Until then averages are the parameters
            and take no memory. ``math.inf`` waits for ``start_averaging()``.
        average_dtype (floating-point dtype or None, default None): dtype of the averages. None is fp32, or the
            parameter's dtype if that is wider.
        trainable_only (bool, default True): whether frozen parameters are left out. One that is unfrozen later joins.
        buffers ("average", "copy", mapping or None; default None): which buffers of the model belong to the averages.
            ``"average"`` averages floating-point buffers and takes others, such as counters, as they are;
            ``"copy"`` takes all as they are; a mapping has one of the two for names, in which ``*`` stands for
            anything. Inside ``averaged_parameters`` every rank then has rank 0's, and afterwards its own again.
        offload (bool, default False): whether averages are kept in the memory of the host. Blocks of parameters are
            copied there, at most two at once, and averaged by the CPU.
        shard_replicas (bool, default True): whether ranks that hold equal parameters share their averages. They must
            then be equal when this is built, and whenever averages are used. False: each keeps all that it holds.
        verify_every (int > 0 or None, default None): every how many updates ranks compare their copies of parameters.
            A copy that differs, as by a bit that flipped, is an error that names rank, host and parameter; an iterate
            that would mix copies is not taken. Such an update is collective, and reads all copies once more. Needs
            ``shard_replicas=True``.
        process_group (ProcessGroup or None, default None): the ranks that hold the model. None is the default group, or
            this process alone if ``torch.distributed`` is not initialized.
        module (nn.Module or None, default None): the model. Needed for ``buffers``, for FSDP in
            ``averaged_parameters``, and for tied weights to be saved under all their names.

    Raises:
        TypeError, ValueError: for arguments that are out of range or do not fit together, that differ between ranks,
            and where there is no parameter to average; one error on every rank.
        RuntimeError: on every rank, naming parameters, where ranks that share averages hold different values.
    """

    def __init__(
        self,
        params: Iterable[Any],
        average: Average | Mapping[str, Average],
        *,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        start: float = 0,
        average_dtype: torch.dtype | None = None,
        trainable_only: bool = True,
        buffers: Treatment = None,
        offload: bool = False,
        shard_replicas: bool = True,
        verify_every: int | None = None,
        process_group: dist.ProcessGroup | None = None,
        module: nn.Module | None = None,
    ) -> None:
        group = default_group(process_group)
        self.process_group, self._agreement = group, Agreement(group, "ShardedAverages")
        self._module, self._modules, self._swap_guard = module, ParallelModules(module, "ShardedAverages"), SwapGuard()
        self._buckets: list[tuple[int, AveragedBucket]] = []  # with the number of the optimizer that each follows
        with self._agreement.together("ShardedAverages()"):
            arguments: dict[str, Any] = {"start": start, "average_dtype": average_dtype}
            arguments |= {"trainable_only": trainable_only, "offload": offload, "shard_replicas": shard_replicas}
            arguments |= {"verify_every": verify_every}
            check_arguments(**arguments, module=module)
            self._kinds = beside_optimizer(average)
            self._is_two_tailed, self._has_compared = isinstance(average, TwoTailed), False
            self._trainable_only, self._verify_every = trainable_only, verify_every
            optimizers = optimizers_in(optimizer)
            named = self._checked(params)
            self._buffers = AveragedBuffers(module, buffers, list(self._kinds))
            facts = [(name, repr(value)) for name, value in arguments.items()] + [("average", repr(self._kinds))]
            facts += [("buffers", repr(self._buffers.names)), ("optimizers", str(len(optimizers)))]
        self._agreement.require_equal("the arguments of ShardedAverages", facts)
        self._timings = [Timing(self._kinds, float(start)) for _ in optimizers or (None,)]
        self._connect(Precision(False, average_dtype, None, False, False), offload, shard_replicas)
        self._names: dict[str, list[str]] = {}
        self._optimizers = FollowedOptimizers(optimizers, self, named)
        self._add(named)

    # Iterates --------------------------------------------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the averages. One that was given no name is ``"average"``."""
        return tuple(self._kinds)

    @property
    def updates(self) -> int:
        """The number of updates so far; the first optimizer's where several are followed."""
        return self._timings[0].updates

    @outside_graphs
    def update(self) -> None:
        """Takes one iterate: the parameters as they are now. Sends nothing, but every rank must call it.

        Raises:
            RuntimeError: inside ``averaged_parameters()``; where this follows an optimizer; or where a parameter is not
                what the averages were built for. On this rank alone; no average has changed then.
        """
        if self._optimizers.count:
            raise RuntimeError(
                "update(): these averages follow the steps of an optimizer by themselves, and would count this iterate "
                "twice. Leave out the call, or build ShardedAverages without optimizer="
            )
        self.after_step(0)

    def before_step(self, number: int) -> None:
        """Hook of an optimizer: raises ``RuntimeError`` where it would step the averages instead of the weights."""
        with self._swap_guard.no_swap("step() of the optimizer"):
            pass

    @torch.no_grad()
    def after_step(self, number: int) -> None:
        """Hook of optimizer ``number``: takes one iterate of its parameters."""
        with self._swap_guard.no_swap("update()"):
            self._optimizers.synchronize()
            self._optimizers.check(number)
            buckets = [bucket for other, bucket in self._buckets if other == number]
            for bucket in buckets:
                bucket.check_parameters()
            timing = self._timings[number]
            if self._verify_every is not None and timing.updates % self._verify_every == 0:
                self._verify(buckets, timing)
            if not timing.is_waiting:
                for bucket in buckets:
                    self._take_iterate(bucket, timing)
                if not number:
                    self._buffers.take_iterate(timing)
            timing.updates += 1

    def _verify(self, buckets: Sequence[AveragedBucket], timing: Timing) -> None:
        """Raises on every rank where copies of parameters differ. Collective."""
        with self._agreement.together("update() that compares copies"):
            pass  # ranks in another call are told so here
        require_equal_copies(self._agreement, buckets, f"update number {timing.updates + 1} of these averages")

    def _take_iterate(self, bucket: AveragedBucket, timing: Timing) -> None:
        active = bucket.requires_grad() if self._trainable_only else None
        if active is not None and all(active):
            active = None
        if active is None or any(active):
            updates = timing.updates + 1
            with profiled("update"):
                bucket.take_iterate(lambda iterates: timing.scalars(iterates, updates), active)

    def start_averaging(self) -> None:
        """Begins all averages anew with the next update. Sends nothing, but every rank must call it.

        A ``Tail`` that would begin later still does.
        """
        self._restart(even_later_ones=False)

    def restart_averaging(self) -> None:
        """Forgets all averages and begins them anew with the next update, even a ``Tail`` that would begin later.

        Sends nothing, but every rank must call it.
        """
        self._restart(even_later_ones=True)

    @refused_during_swap()
    def _restart(self, *, even_later_ones: bool) -> None:
        for timing in self._timings:
            timing.restart(even_later_ones=even_later_ones)
        for _, bucket in self._buckets:
            bucket.shard.load_state({})
        self._buffers.forget()

    # Two-tailed averaging --------------------------------------------------------------------------------------------

    @refused_during_swap()
    def compare_tails(self, *, short: float, long: float) -> str:
        """Compares the losses of the two averages of ``TwoTailed``; returns the name of the better one. Collective.

        Where the short tail is at least as good, the long one becomes it, and the short one begins anew with the next
        update.

        Args:
            short, long: the losses of an evaluation on each average: numbers or tensors of 1 element; lower is better.
                Ranks may give different losses, each of its part of the data: every rank then uses their means.

        Raises:
            ValueError, TypeError: on every rank, where a loss of any rank is NaN, -inf or no number, or the averages
                are not ``TwoTailed()``; nothing has changed then.
        """
        with self._agreement.together("compare_tails()"):
            self._require_two_tails("compare_tails()")
        losses = agreed_losses(self._agreement, "compare_tails()", (short, long))
        self._has_compared = True
        if losses[0] > losses[1]:
            return "long"
        for timing in self._timings:
            timing.promote("short", "long")
        suffixes = self._suffixes()
        for number, bucket in self._buckets:
            timing = self._timings[number]
            following = self._following(timing)
            bucket.shard.promote_average(suffixes["short"], suffixes["long"], following)
        self._buffers.promote("short", "long")
        return "short"

    @property
    def best(self) -> str:
        """The name of the better average of ``TwoTailed`` by the last comparison: the long one, which became it.

        Raises ``RuntimeError`` before the first ``compare_tails()``, and for other averages.
        """
        self._require_two_tails("best")
        if not self._has_compared:
            raise RuntimeError(
                "best: no losses are known yet. Evaluate both averages ('short' and 'long') and call "
                "compare_tails(short=..., long=...)"
            )
        return "long"

    def _require_two_tails(self, operation: str) -> None:
        if not self._is_two_tailed:
            raise ValueError(f"{operation} is for the averages of TwoTailed(); these are {', '.join(self._kinds)}")

    # Use -------------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def averaged_parameters(self, name: str | None = None) -> Iterator[None]:
        """Inside the block, parameters hold an average; afterwards, exactly what they held before. Collective.

        Parameters without an average keep their values. Buffers that belong to the averages are swapped as well. Writes
        to parameters inside the block are dropped. Each rank needs extra memory for 1/N of the parameters.

        Args:
            name: which average, equal on every rank; None for the first.

        Raises:
            ValueError: on every rank, where there is no average ``name``; nothing has changed then.
            RuntimeError: on every rank, where ranks hold different parameters or have taken different
                updates, where FSDP modules outside of ``module`` hold copies of parameters, or where parameters are not
                what the averages were built for. On this rank alone, inside another such block. Inside the block, steps
                of the optimizer and ``update()`` raise it.
        """
        buckets = [bucket for _, bucket in self._buckets]
        with self._swap_guard.swapping():
            suffix = self._agree("averaged_parameters()", name)
            average = self._name_of(name)
            with self._buffers.swapped(average, self._agreement), swapped(buckets, suffix, self._modules):
                yield

    @refused_during_swap()
    @torch.no_grad()
    def copy_to(self, module: nn.Module, name: str | None = None) -> None:
        """Writes an average into the parameters and buffers of another module with equal names. Collective.

        Gathers one bucket of parameters after the other where ranks share averages. The module may be plain or placed
        as the averaged model is: a teacher for distillation, or a model for another process to evaluate. Its parameters
        are rounded once to their dtype. A parameter without an average gets its present value in the averaged model.

        Args:
            module: has a parameter of equal name (without wrappers' parts) and shape for each averaged one.
            name: which average, equal on every rank; None for the first.

        Raises:
            ValueError, TypeError: on every rank, where the module lacks a parameter or has one of another shape, or
                there is no average ``name``; nothing has changed then.
            RuntimeError: on every rank, as for ``averaged_parameters``.
        """
        suffix = self._agree("copy_to()", name)
        buffers = self._buffers.first_values(self._name_of(name), self._agreement)
        copy_averages(self._members(), suffix, buffers, module, self._agreement)

    @refused_during_swap(NOT_BOTH)
    def full_state_dict(self, name: str | None = None) -> dict[str, Tensor]:
        """Returns an average as whole CPU tensors by the names of parameters, on rank 0; ``{}`` on others. Collective.

        ``load_state_dict`` of a plain model takes it: frozen parameters are in it with their values, and so are buffers
        that belong to the averages, and all other persistent buffers if ``module`` is known. Averages are in their own
        dtype.

        Args:
            name: which average, equal on every rank; None for the first.

        Raises:
            ValueError: on every rank, where there is no average ``name``.
            RuntimeError: on every rank, as for ``averaged_parameters``.
        """
        suffix = self._agree("full_state_dict()", name)
        whole = whole_averages(self._members(), suffix, self._agreement, self._modules.slices())
        buffers = self._buffers.first_values(self._name_of(name), self._agreement)
        if self._agreement.rank:
            return {}
        others = persistent_buffers(self._module)
        return whole | {key: value.detach().cpu().clone() for key, value in (others | buffers).items()}

    def metrics(self, *, distance: bool = False) -> dict[str, float]:
        """Returns numbers for a logger, by name. With ``distance=True`` it is collective; otherwise it sends nothing.

        - ``updates``: updates so far (int). ``updates/1`` and so on are of further optimizers that are followed.
        - ``averaging``: 1 if an average of any parameter is kept, 0 before averages begin (int).
        - ``mu``: the fraction by which the next update moves the average, of the parameter with the most iterates; 1
          before its average begins. Named as ``updates`` for further optimizers.
        - ``distance``: the 2-norm, over all parameters, of the difference between the parameters and the average. Only
          with ``distance=True``.

        With several averages, each has its own ``mu/<name>`` and ``distance/<name>``.

        Args:
            distance: whether to compute distances, which takes a pass over parameters and averages, and on a GPU waits
                for it. Every rank must then call this, and gets equal numbers.

        Raises:
            RuntimeError: with ``distance=True``, on every rank, as for ``averaged_parameters``; inside
                ``averaged_parameters()``, on this rank alone.
        """
        followed = [[b for number, b in self._buckets if number == n] for n in range(len(self._timings))]
        found = averages_metrics([timing.updates for timing in self._timings], followed, self._suffixes())
        if not distance:
            return found
        with self._swap_guard.no_swap(DISTANCE):
            self._agree(DISTANCE, None)
            buckets = [bucket for _, bucket in self._buckets]
            return found | distances(buckets, self._suffixes(), self._options.group)

    # State dicts -----------------------------------------------------------------------------------------------------

    @refused_during_swap(NOT_BOTH)
    def state_dict(self) -> dict[str, Any]:
        """Returns each average as a dict by the names of parameters, and counts under ``"progress"``. Sends nothing.

        Where ranks share averages (plain parameters, replicas), tensors are this rank's pieces, which ``Checkpointer``
        and ``torch.distributed.checkpoint`` save, and load on any number of ranks and in any layout. In a checkpoint
        an average is a model's state dict: ``averages.ema.<parameter>``. Frozen parameters are left out. Later
        updates do not change what it returned.
        """
        self._optimizers.synchronize()
        self._modules.drop_copies()
        for _, bucket in self._buckets:
            bucket.check_parameters()
        members = [member for member in self._members() if self._is_saved(member)]
        state: dict[str, Any] = sharded_averages(members, self._suffixes(), self._modules.slices())
        for average, of_average in state.items():
            of_average |= {key: value.clone() for key, value in self._buffers.values(average).items()}
        kinds = {name: repr(kind) for name, kind in self._kinds.items()}
        timings = [timing.state() for timing in self._timings]
        counts = {"kinds": kinds, "timings": timings, "compared": self._has_compared, **iterates_of(members)}
        of_buffers = {"buffers": self._buffers.iterates, "treatment": self._buffers.treatment}
        return {**state, PROGRESS: counts | of_buffers}

    @refused_during_swap()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads what ``state_dict()`` has returned, by the names of parameters. Collective.

        Args:
            state_dict: a state dict of averages with equal names and kinds.

        Raises:
            ValueError, TypeError: on every rank, where it has other averages, parameters or shapes, or counts
                differ between ranks; nothing has changed then.
        """
        self._optimizers.synchronize()
        self._modules.drop_copies()
        with self._agreement.together("load_state_dict()"):
            for _, bucket in self._buckets:
                bucket.check_parameters()
            kinds = {name: repr(kind) for name, kind in self._kinds.items()}
            slices, buffers = self._modules.slices(), self._buffers.names
            numbers = {id(bucket): number for number, bucket in self._buckets}

            def scalars_of(member: Member, progress: Mapping[str, Any], iterates: int) -> Scalars:
                timing = Timing.of(self._kinds, progress["timings"][numbers[id(member.bucket)]])
                return timing.scalars(iterates, timing.updates)

            loaded = plan_load(
                self._members(),
                self._suffixes(),
                kinds,
                len(self._timings),
                buffers,
                state_dict,
                slices,
                scalars_of,
            )
            timings = [Timing.of(self._kinds, saved) for saved in loaded.progress["timings"]]
        self._agreement.require_equal("the state dict", [*loaded.facts, ("timings", repr(loaded.progress["timings"]))])
        loaded.apply()
        self._timings, self._has_compared = timings, bool(loaded.progress["compared"])
        self._buffers.load(loaded.buffers, int(loaded.progress["buffers"]))

    def is_buffer(self, path: Sequence[str | int]) -> bool:
        """Returns whether the entry at ``path`` of ``state_dict()`` is a buffer; ``Checkpointer`` saves rank 0's."""
        return len(path) == 2 and path[0] in self._kinds and path[1] in self._buffers.names

    def steps_taken(self) -> tuple[tuple[int, ...], int]:
        """Returns the global ranks of the averages, and a fingerprint of the updates that this rank has taken.

        ``Checkpointer.save`` compares the fingerprints.
        """
        return tuple(self._agreement.ranks), fingerprint([timing.state() for timing in self._timings])

    @refused_during_swap()
    def add_param_group(self, param_group: Mapping[str, Any]) -> None:
        """Adds parameters, whose averages begin with the next update. Collective.

        Args:
            param_group: dict with ``"params"``, as ``torch.optim`` takes it.

        Raises:
            ValueError, TypeError: on every rank, where parameters are bad, already averaged, or differ between
                ranks; nothing is added then.
        """
        with self._agreement.together("add_param_group()"):
            named = self._checked([param_group])
        self._optimizers.add(named)
        self._add(named)

    # Internals -------------------------------------------------------------------------------------------------------

    def _connect(self, precision: Precision, offload: bool, shard_replicas: bool) -> None:
        """Makes what buckets share. Collective."""
        agreement = self._agreement
        groups = agreement.separate_groups()
        self._replicas = Replicas(agreement, groups, shard_replicas)
        self._options = ShardingOptions(
            rank=agreement.rank,
            world_size=agreement.world_size,
            groups=groups,
            group=None if groups is None else groups.of(agreement.ranks),
            precision=precision,
            averages=self._kinds,
            bucket_bytes=BUCKET_BYTES,
            offload=offload,
        )
        self._shares = shard_replicas

    def _checked(self, params: Iterable[Any]) -> dict[Tensor, str]:
        """Returns the parameters with their names. Raises where one cannot be averaged. Not collective."""
        named = named_parameters(params, self._module)
        check_parameters([(name, param) for param, name in named.items()], self._agreement.ranks)
        check_module(named, self._module)
        present = {id(param) for _, bucket in self._buckets for param in bucket.params}
        taken = {name for _, bucket in self._buckets for name in bucket.names}
        for param, name in named.items():
            if id(param) in present or name in taken:
                raise ValueError(f"parameter {name!r} has averages already")
        if self._trainable_only and not any(param.requires_grad for param in named):
            raise ValueError(
                "there is no parameter to average: all of params are frozen. Pass trainable_only=False to average them"
            )
        return named

    def _add(self, named: Mapping[Tensor, str]) -> None:
        """Builds buckets for parameters that ``_checked`` has passed. Collective; adds nothing where it raises."""
        facts = parameter_facts([(name, param) for param, name in named.items()], "reduced")
        self._agreement.require_equal("the parameters of ShardedAverages", facts)
        numbers = dict(zip(named, self._optimizers.number_of(list(named)), strict=True))
        added: list[tuple[int, AveragedBucket]] = []
        for number in range(len(self._timings)):
            own = {param: name for param, name in named.items() if numbers[param] == number}
            added += [(number, bucket) for bucket in build_averaged(own, self._options, self._replicas)]
        self._require_same([bucket for _, bucket in added])
        self._buckets += added
        self._names |= aliases(named, self._module)

    def _require_same(self, buckets: Sequence[AveragedBucket]) -> None:
        if self._shares:
            require_same_values(self._agreement, buckets, written_only=False, advice=OF_AVERAGES)

    def _agree(self, operation: str, name: str | None) -> str:
        """Checks, on all ranks, what a use of an average needs; returns its suffix. Collective."""
        self._optimizers.synchronize()
        self._modules.drop_copies()
        buckets = [bucket for _, bucket in self._buckets]
        with self._agreement.together(operation):
            for bucket in buckets:
                bucket.check_parameters()
            self._modules.require_known_copies([param for bucket in buckets for param in bucket.params])
            suffix = suffix_of(self._kinds, name)
        facts = [("the average", repr(self._name_of(name)))]
        facts += [(f"updates of optimizer {n}", repr(timing.state())) for n, timing in enumerate(self._timings)]
        self._agreement.require_equal(f"the averages in {operation}", facts)
        self._require_same(buckets)
        return suffix

    def _name_of(self, name: str | None) -> str:
        return next(iter(self._kinds)) if name is None else name

    def _suffixes(self) -> dict[str, str]:
        return suffixes_of(self._kinds)

    def _members(self) -> list[Member]:
        return members_of([bucket for _, bucket in self._buckets], self._names)

    def _is_saved(self, member: Member) -> bool:
        return not self._trainable_only or member.is_averaged

    def _following(self, timing: Timing) -> Callable[[int], Scalars]:
        return lambda iterates: timing.scalars(iterates, timing.updates)
