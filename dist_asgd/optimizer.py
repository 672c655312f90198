"""``ShardedASGD``: torch.optim.ASGD with its state and its update sharded over the ranks of a process group."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.join import Joinable

from dist_asgd._torch_private import (
    load_state_dict_post_hooks,
    load_state_dict_pre_hooks,
    outside_graphs,
    set_takes_scaled_gradients,
    state_dict_post_hooks,
    state_dict_pre_hooks,
    zero_grad,
)
from dist_asgd.asgd.schedule import own_options
from dist_asgd.averages.kinds import Average
from dist_asgd.averages.options import group_options, named_averages, suffix_of, suffixes_of
from dist_asgd.buckets.base import Bucket, BucketOptions
from dist_asgd.buckets.build import build_buckets
from dist_asgd.buckets.reducer import Reducer
from dist_asgd.buckets.replicas import Replicas
from dist_asgd.comm.consensus import Agreement
from dist_asgd.comm.process_groups import default_group
from dist_asgd.metrics import DISTANCE, distances, optimizer_metrics
from dist_asgd.sharding.precision import Precision
from dist_asgd.state_dict import (
    full_state_dict,
    passed_through,
    plan_load,
    sharded_state_dict,
    state_for_all,
)
from dist_asgd.state_view import StateView
from dist_asgd.step.clip import clip_
from dist_asgd.step.consistency import argument_facts
from dist_asgd.step.cuda_graphs import scaling_of
from dist_asgd.step.forward_wait import ForwardWaits
from dist_asgd.step.join import StepJoin
from dist_asgd.step.param_groups import add_agreed, add_checked
from dist_asgd.step.rebuild import BuiltFor, check_rebuild, steps_loaded, value_facts
from dist_asgd.step.sync import STEP, StepAgreement, update_and_gather
from dist_asgd.step.validation import (
    check_aliases,
    check_arguments,
    check_state_dict,
    initialized_since,
    parameter_names,
)
from dist_asgd.swap import NOT_BOTH, SwapGuard, refused_during_swap, restart_averaging, start_averaging, swapped
from dist_asgd.wrappers import ParallelModules


class ShardedASGD(torch.optim.Optimizer, Joinable):
    """``torch.optim.ASGD`` with its state and its update sharded over the ranks of a process group.

    Runs on one rank or on thousands, and on three kinds of parameters, which it tells apart by itself:

    - Plain parameters, which every rank holds whole. Each rank updates 1/N of the elements and all-gathers the result
      (ZeRO-1, or ZeRO-2 with ``gradients="local"``).
    - DTensors (FSDP2, HSDP, tensor parallelism). Each rank updates its local block in place. Ranks with equal blocks
      share the block's state and update.
    - Slices of FSDP1 (``use_orig_params=True``). Each rank updates its slice in place.

    Given equal reduced gradients, parameters, ``ax``, ``eta``, ``mu`` and ``step`` equal the ones of
    ``torch.optim.ASGD(foreach=False)`` bit for bit in fp32, fp64 and complex dtypes.

    Collective calls, which every rank must make in the same order and with the same arguments: the constructor,
    ``step``, ``add_param_group``, ``clip_grad_norm_``, ``restart_averaging``, ``load_state_dict``, ``full_state_dict``,
    ``consolidate_state_dict``, ``averaged_parameters`` and ``metrics(distance=True)``, and ``unscale_`` of a
    ``torch.amp.GradScaler``.
    ``start_averaging`` and writes to ``state`` send nothing, but every rank must make them.

    Source: B. T. Polyak and A. B. Juditsky, "Acceleration of stochastic approximation by averaging", SIAM J. Control
    Optim. 30(4), 1992, as implemented in ``torch.optim.ASGD``; S. Rajbhandari et al., "ZeRO: Memory optimizations
    toward training trillion parameter models", SC 2020.

    Args:
        params (iterable): tensors, (name, tensor) pairs, or dicts (param groups) of either, as ``torch.optim`` takes
            them. Floating-point (not fp8) or complex leaf tensors with dense memory. ``model.named_parameters()`` gives
            messages and checkpoints the names of parameters. Plain parameters move into flat buckets, so that other
            users of their memory (NumPy arrays, detached tensors) keep the old values; shared memory is refused. Until
            the first step the model may still be moved, cast, wrapped or sharded. New parameters that this makes are
            found by ``module``, or in the param groups if they were put there.
        lr (float or 1-element Tensor, >= 0, default 1e-2): learning rate. After s steps the step size is
            ``eta = lr / (1 + eta_decay * lr * s) ** alpha``. This option and the ones up to ``eta_decay`` are defaults
            of the param groups, each of which may have its own.
        lambd (float >= 0, default 1e-4): decay term. Each step multiplies the parameters by ``1 - lambd * eta``.
        alpha (float >= 0, default 0.75): exponent of the fall of ``eta``.
        t0 (float >= 0 or None, default None): number of steps before averaging starts; step ``t0 + 2`` is the first one
            that the average holds. None is 1e6, as in torch, and 0 if ``average`` is given. ``math.inf`` never
            averages; ``start_averaging()`` sets ``t0`` to now.
        weight_decay (float >= 0, default 0): L2 penalty, added to the gradient as ``weight_decay * param``.
        maximize (bool, default False): ascend instead of descend.
        lr_on_time (bool, default False): whether a changed ``lr`` acts in the next step. As in torch, by default it
            acts one step later, because ``eta`` is computed at the end of a step. Set it when a scheduler's values must
            act on the steps that they are for. Not with ``capturable=True``.
        eta_decay (float >= 0 or None, default None): rate at which ``eta`` falls; None is ``lambd``, as in torch. Set
            it to choose the fall of the step size apart from the decay of the parameters.
        gradients ("local", "reduced" or "sharded", default "local"): who averages the gradients of plain parameters.

            - ``"local"``: this optimizer, by reduce-scatters that run during backward and free each bucket's whole
              gradients. Parameters start with the values of rank 0. For a model that nothing else wraps.
            - ``"reduced"``: DistributedDataParallel or other code, so that gradients are equal on every rank. The first
              steps compare samples of them, since each rank reads only the gradients of its shard.
            - ``"sharded"``: nobody; plain parameters and their gradients are this rank's own slices.
        process_group (ProcessGroup or None, default None): ranks to shard over. None is the default group, or this
            process alone if ``torch.distributed`` is not initialized. Set it to train on some of the ranks.
        find_unused_parameters (bool, default False): whether, with ``gradients="local"``, a parameter may lack a
            gradient on some ranks (which count as zeros) or on all ranks (then it is skipped, as in torch). Costs one
            small all-reduce a step. False raises an error for a missing gradient.
        bucket_bytes (int > 0 or None, default None): size of the buckets in which plain parameters and their gradients
            travel. None is 25 MiB on CPUs and with gloo, and 64 MiB on other devices, where a bucket costs the host
            more time than the device. Smaller ones overlap better and take less memory: two of them, as sent and as
            received, are under way at once. Larger ones need fewer collectives. On NCCL with more than two ranks, the
            bits of sums of fp32 gradients may depend on it.
        master_weights (bool, default True): whether bf16 and fp16 parameters have fp32 masters, 4 bytes an element over
            all ranks. False rounds each fp32 update to the parameter's dtype, which loses small updates.
        average_dtype (floating-point dtype or None, default None): dtype of ``ax``. None is fp32, or the parameter's
            dtype if that is wider. Set it to spend less, or more, memory on the average.
        average (Average, mapping of names to them, or None; default None): kind of average: ``Uniform``, ``EMA``,
            ``PolynomialDecay`` or ``Tail``. None is torch's, ``Uniform()``. A mapping keeps several averages; the first
            one is ``ax`` in the state, the others are ``ax_<name>``.
        wire_dtype (bf16, fp16, fp32, fp64 or None; default None): dtype in which gradients of plain parameters are
            sent, and also parameters where it is narrower than theirs. None is the parameter's dtype. bf16 halves the
            bytes of fp32. Sums are fp32 or wider. 2-byte dtypes need ``master_weights=True``.
        stochastic_rounding (bool, default False): whether bf16 parameters without masters are rounded up or down by
            chance, so that small updates add up on average. Needs ``master_weights=False``.
        shard_replicas (bool, default True): whether ranks that hold equal blocks of a DTensor share its state, at the
            cost of an all-gather a step. False keeps all of a block's state on each of these ranks.
        capturable (bool, default False): whether ``step``, ``eta`` and ``mu`` are kept on the GPU, so that a CUDA graph
            can hold ``step()`` and GradScaler never makes the host wait. For one rank, or for DTensors, which then do
            not share state; with torch's average only. A replay reads an ``lr`` that is a tensor on the GPU; any other
            change of options or state (``start_averaging()``, loading) takes a new capture.
        verify_every (int > 0 or None, default None): every how many steps ranks compare what they hold copies of: plain
            parameters, replicas, and with ``shard_replicas=False`` their state. A copy that differs, as by a bit that
            flipped, is an error that names rank, host and parameter. Each comparison reads all copies once, before the
            update. Where ranks share state, a step replaces all copies by the owner's, so that only ``verify_every=1``
            is sure to find a flipped bit. What one rank alone holds is not compared. Not with ``capturable=True``.
        foreach (None or False), differentiable (False): options of ``torch.optim.ASGD`` that choose its implementation.
            They change nothing here. True is an error.
        module (nn.Module or None, default None): the model. With it, ``step()`` returns while plain parameters are
            still being gathered, modules wait for them before their forward, and ``synchronize()`` must be called
            before parameters are read elsewhere. ``averaged_parameters()`` and ``no_sync()`` need it under FSDP, and
            so does a ``fully_shard`` or ``parallelize_module`` after the optimizer was built.

    Raises:
        TypeError, ValueError: for arguments that are out of range, that do not fit together or that differ between
            ranks; the same error on every rank.
    """

    _consolidated: dict[str, Any] | None = None  # what the next state_dict() returns; None: one with pieces
    _join: StepJoin | None = None  # set by join_hook()
    _norm: Tensor | None = None  # 0-dim, what clip_grad_norm_() returned last; read by metrics() only

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-2,
        lambd: float = 1e-4,
        alpha: float = 0.75,
        t0: float | None = None,
        weight_decay: float = 0,
        *,
        maximize: bool = False,
        lr_on_time: bool = False,
        eta_decay: float | None = None,
        gradients: Literal["local", "reduced", "sharded"] = "local",
        process_group: dist.ProcessGroup | None = None,
        find_unused_parameters: bool = False,
        bucket_bytes: int | None = None,
        master_weights: bool = True,
        average_dtype: torch.dtype | None = None,
        average: Average | Mapping[str, Average] | None = None,
        wire_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False,
        shard_replicas: bool = True,
        capturable: bool = False,
        verify_every: int | None = None,
        foreach: bool | None = None,
        differentiable: bool = False,
        module: nn.Module | None = None,
        **unknown: NoReturn,  # refused in the body, where every rank hears of it
    ) -> None:
        # Arguments that are no options of param groups. Every rank must pass equal ones.
        precision = Precision(master_weights, average_dtype, wire_dtype, stochastic_rounding, capturable)
        arguments: dict[str, Any] = {"gradients": gradients, "find_unused_parameters": find_unused_parameters}
        arguments |= {"bucket_bytes": bucket_bytes, "shard_replicas": shard_replicas, **asdict(precision)}
        arguments |= {"verify_every": verify_every}
        # Defaults of the param groups.
        t0 = t0 if t0 is not None else 1e6 if average is None else 0
        options: dict[str, Any] = {"lr": lr, "lambd": lambd, "alpha": alpha, "t0": t0, "weight_decay": weight_decay}
        options |= {"maximize": maximize, "foreach": foreach, "differentiable": differentiable}
        options |= {"capturable": capturable}
        # Connect the ranks first, then check on all of them, compare, and build the buckets.
        self._set_up(arguments, module)
        group = default_group(process_group)
        self._connect(group, Agreement(group, "ShardedASGD"), module)
        with self._agreement.together("ShardedASGD()"):
            check_arguments(**arguments, module=module, unknown=unknown)
            self._setting = self._make_setting(precision, named_averages(average))
            further = own_options(lr_on_time, eta_decay) | group_options(self._setting.averages)
            super().__init__(params, options | further)
            check_aliases(self.param_groups, gradients, module)
            facts = argument_facts(arguments, self.param_groups, 0)
        self._agreement.require_equal("the arguments of the optimizer", facts)
        self._build_buckets(first=0)
        alive = weakref.proxy(self)
        self._state = StateView(self.param_groups, self._buckets, lambda written: alive._note_writes(written))

    @property  # type: ignore[override]
    def state(self) -> StateView:
        """The state of each parameter, by torch's names; on several ranks, ``ax`` and ``master`` are pieces.

        Tensors in it are live. What is written to it takes effect, or raises ``ValueError``; every rank must write the
        same. The next collective call compares that, but for the values of tensors. Setting it replaces the state of
        all parameters: an empty dict starts all of them anew.
        """
        return self._state

    @state.setter
    def state(self, states: Mapping[Tensor, Mapping[str, Any]]) -> None:
        if self._buckets:  # else it is the constructor of torch.optim.Optimizer, which sets an empty one
            self._state.replace(states)

    def _note_writes(self, written: Sequence[object]) -> None:
        self._consolidated = None
        self._step_agreement.note_writes(written)

    @refused_during_swap()
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a param group, as ``torch.optim.Optimizer`` does; also after training has begun. Collective.

        Args:
            param_group: dict with ``"params"`` and any options that differ from the defaults.

        Raises:
            ValueError, TypeError: the same on every rank, where parameters or options are bad or differ between ranks;
                nothing is added then.
        """
        if not self._buckets:  # called by the constructor of torch.optim.Optimizer, inside a block of together()
            add_checked(self, param_group, self._setting, self._agreement)
            return
        self._consolidated = None
        self._take_up_changes("add_param_group()")
        first = len(self.param_groups)
        self.synchronize()
        self._step_agreement.agree_on("add_param_group()", self.param_groups, self._all_buckets())
        add_agreed(self, param_group, self._setting, self._agreement, self._arguments, self._forward_waits.module)
        self._build_buckets(first)

    @outside_graphs  # here and below: collectives and checks of the ranks are no part of a compiled graph
    @refused_during_swap()
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step. Collective.

        The ranks exchange some integers on the CPU and the updated parameters; with ``gradients="local"``, also the
        gradients that backward has not reduced. Without plain parameters and replicas of DTensors that share state,
        they exchange nothing from the second step on.

        Args:
            closure: computes the loss and the gradients again, and returns the loss.

        Returns:
            What ``closure`` returns; None without it.

        Raises:
            RuntimeError, ValueError: the same on every rank, where on any rank a gradient is missing, sparse or of
                another shape, a parameter is not what the optimizer was built for, options are bad or differ, or ranks
                have other values of a parameter. Parameters and state are unchanged then. Where steps exchange nothing,
                an error stays on its rank, and steps that differ are an error of the next other collective call and of
                ``Checkpointer.save``.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        self._take_step()
        return loss

    def _take_step(self) -> None:
        self._consolidated = None
        if self._join is not None:
            self._join.prepare_step()
        self._take_up_changes(STEP)

        # Check, agree with the other ranks on what the step does, and finish reducing the gradients.
        plan = self._step_agreement.agree_and_reduce(STEP, self.param_groups, self._all_buckets())
        self._built_for.final = True
        self._reducer.settle()
        self._step_agreement.warn_of_unused(plan)
        if self._join is not None:
            self._join.scale_gradients()

        # Update this rank's shard of each bucket, and start its all-gather.
        update_and_gather(plan, self._buckets, scaling_of(self))

        # Wait for the all-gathers that no module will wait for in its forward.
        for bucket in self._all_buckets():
            if not self._forward_waits.covers(bucket):
                bucket.wait()

    @outside_graphs
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops all gradients, as in torch; the memory of reduced gradients is freed. Not collective.

        Args:
            set_to_none: False sets the gradients to zero instead.
        """
        self._reducer.close_pass()
        zero_grad(self, set_to_none)
        if set_to_none:
            for bucket in self._reducer.buckets:
                bucket.drop_gradient()

    @outside_graphs
    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Scales all gradients in place so that their common norm is at most ``max_norm``. Collective.

        Does what ``torch.nn.utils.clip_grad_norm_`` does to whole gradients, over the whole model, with each element
        counted once.

        Args:
            max_norm: at least 0. ``math.inf`` changes no gradient and only returns the norm.
            norm_type: greater than 0, ``math.inf`` and ``"inf"`` included.

        Returns:
            0-dim tensor: the norm before clipping, in fp32 or wider.

        Raises:
            ValueError: on every rank, for arguments out of range.
            RuntimeError: the same on every rank, where arguments differ between ranks, and for whatever ``step`` would
                raise.
        """
        self._take_up_changes("clip_grad_norm_()")
        buckets = self._all_buckets()
        self._norm = clip_(self._step_agreement, self.param_groups, buckets, self._setting.group, max_norm, norm_type)
        return self._norm

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Inside the block, backward accumulates gradients on this rank and sends nothing.

        The first backward after the block reduces all that was accumulated, and so does ``step()``. The ``no_sync`` of
        FSDP and DistributedDataParallel is entered as well if the optimizer was given ``module``; their gradients are
        reduced by a backward only.
        """
        with self._modules.no_sync(), self._reducer.suspended():
            yield

    @contextlib.contextmanager
    def averaged_parameters(self, name: str | None = None) -> Iterator[None]:
        """Inside the block, parameters hold their averages; afterwards, exactly what they held before. Collective.

        Parameters without an average keep their values. Writes to parameters inside the block are dropped. Backward
        inside the block accumulates as in ``no_sync()``. Each rank needs extra memory for 1/N of the parameters.

        If the block raises on one rank only, that rank leaves after waiting some seconds for the other ranks. Its
        parameters are complete when the other ranks have left their blocks; ``synchronize()`` waits for that.

        Before the block, as before a step, wait for code that copies parameters in the background (``async_save`` of
        ``torch.distributed.checkpoint`` with such a stager).

        Args:
            name: which of several averages, the same on every rank; None for the first.

        Raises:
            ValueError: on every rank, where there is no average ``name``; nothing has changed then.
            RuntimeError: the same on every rank, where FSDP modules outside of ``module`` hold copies of parameters,
                where ranks differ, or where parameters are not what the optimizer was built for. On this rank alone,
                inside another such block, or while another thread is in ``step()`` or reads or loads the state. Inside
                the block, calls that step, load, or read the state to save it raise ``RuntimeError``.
        """
        self._take_up_changes("averaged_parameters()")
        buckets = self._all_buckets()
        with self._swap_guard.swapping():
            self._complete_parameters()
            with self._step_agreement.together("averaged_parameters()"):
                self._step_agreement.check_groups(self.param_groups)
                self._step_agreement.check_parameters(buckets)
                self._modules.require_known_copies([param for bucket in buckets for param in bucket.params])
                suffix = suffix_of(self._setting.averages, name)
            if len(self._setting.averages) > 1:
                self._agreement.require_equal("the average to swap in", [("state", f"ax{suffix}")])
            # Suspended: reductions of a backward on one rank must not come between the all-gathers of all ranks.
            with swapped(buckets, suffix, self._modules), self._reducer.suspended():
                yield

    def start_averaging(self) -> None:
        """Starts averaging now: sets ``t0`` of every param group to the steps taken so far. Every rank must call it.

        As in torch with that ``t0``, the second step from now is the first one that the average holds. An average that
        has begun keeps its value until that step, and begins anew with it. A ``Tail`` that would begin later still
        does. Sends nothing, except that ranks with slices of FSDP1 exchange their numbers of steps.
        """
        self._consolidated = None
        start_averaging(self.param_groups, self._buckets, self._agreement)

    @refused_during_swap()
    def restart_averaging(self) -> None:
        """Forgets all averages and begins them anew now, as after a change of data or learning rate. Collective.

        Unlike ``start_averaging()`` it acts at once and on every average: on a ``Tail`` that would begin later, and on
        parameters that are frozen. The second step from now is the first one that each average holds. Until then the
        averages are the parameters themselves and take no memory.

        Raises:
            RuntimeError: the same on every rank, where parameters are not what the optimizer was built for, or ranks
                differ; inside ``averaged_parameters()``, on this rank alone.
        """
        self._consolidated = None
        self._take_up_changes("restart_averaging()")
        self._step_agreement.agree_on("restart_averaging()", self.param_groups, self._all_buckets())
        restart_averaging(self.param_groups, self._buckets, self._agreement)

    def synchronize(self) -> None:
        """Waits until all parameters are complete.

        Needed only with ``module``, before parameters are read other than by the forward of a module.
        """
        for bucket in self._all_buckets():
            bucket.wait()

    def metrics(self, *, distance: bool = False) -> dict[str, float]:
        """Returns numbers for a logger, by name. With ``distance=True`` it is collective; otherwise it sends nothing.

        Of the parameter that has taken the most steps:

        - ``step``: steps taken (int).
        - ``lr``: the learning rate, and ``eta``: the step size of the next step.
        - ``mu``: the fraction by which the next step moves the average; 1 before its average begins.

        Of the whole model:

        - ``averaging``: 1 if an average of any parameter is kept, 0 before averages begin (int).
        - ``grad_norm``: what ``clip_grad_norm_`` has returned last; missing before it was called.
        - ``distance``: the 2-norm, over all parameters, of the difference between the parameters and the average. Only
          with ``distance=True``. Of parameters with masters, it is the masters that are compared with the average.

        With several averages, each has its own ``mu/<name>`` and ``distance/<name>``. Further param groups have
        ``step/1``, ``lr/1``, ``eta/1``, ``mu/1`` or ``mu/<name>/1``, and so on.

        Steps keep nothing for this, and never wait for a GPU because of it: ``grad_norm``, an ``lr`` that is a tensor,
        and scalars of ``capturable=True`` are read here.

        Args:
            distance: whether to compute distances, which takes a pass over parameters and averages, and on a GPU waits
                for it. Every rank must then call this, and gets equal numbers.

        Raises:
            RuntimeError: with ``distance=True``, the same on every rank, where parameters are not what the optimizer
                was built for, or ranks differ; inside ``averaged_parameters()``, on this rank alone.
        """
        suffixes = suffixes_of(self._setting.averages)
        found = optimizer_metrics(self.param_groups, self._buckets, suffixes)
        if self._norm is not None:
            found["grad_norm"] = self._norm.item()
        if not distance:
            return found
        with self._swap_guard.no_swap(DISTANCE):
            self._take_up_changes(DISTANCE)
            self._complete_parameters()
            self._step_agreement.agree_on(DISTANCE, self.param_groups, self._all_buckets())
            return found | distances(self._all_buckets(), suffixes, self._setting.group)

    # Uneven inputs (torch.distributed.algorithms.join) ---------------------------------------------------------------

    def join_hook(self, *, divide_by_initial_world_size: bool = True, **_: Any) -> StepJoin:
        """Returns the hook by which ``torch.distributed.algorithms.join.Join`` lets ranks have unequally many inputs.

        Every rank must take one step in each iteration: a rank that has no more inputs takes the steps of the others
        with them. Use ``Join([optimizer])`` with ``gradients="local"`` and ``Join([ddp_model, optimizer])`` with
        ``gradients="reduced"``. Gradients that the optimizer has averaged must not be changed then.

        Args:
            divide_by_initial_world_size: True: a rank without inputs counts as gradients of zeros. False: the mean is
                over the other ranks.

        Raises:
            RuntimeError: a parameter is a DTensor or a slice.
        """
        alive = weakref.proxy(self)  # the hook, which the optimizer holds, must not keep it alive
        self._join = StepJoin(
            alive,
            self.param_groups,
            self._all_buckets(),
            self._agreement,
            self._reducer,
            find_unused=self._arguments["find_unused_parameters"],
            divide_by_initial_world_size=divide_by_initial_world_size,
            shadow=lambda: alive._take_step(),
        )
        return self._join

    @property
    def join_device(self) -> torch.device:
        """Device of the first parameter."""
        return self._all_buckets()[0].device

    @property
    def join_process_group(self) -> dist.ProcessGroup | None:
        """The ranks of the optimizer."""
        return self.process_group

    # State dicts -----------------------------------------------------------------------------------------------------

    @refused_during_swap(NOT_BOTH)
    def state_dict(self) -> dict[str, Any]:
        """Returns torch's state dict, in which ``ax`` and ``master`` are this rank's pieces. Sends nothing.

        ``step``, ``eta`` and ``mu`` are 0-dim tensors on the CPU. With one rank, ``ax`` and ``master`` are whole.
        Later steps do not change what it returned. Pieces can be copied, and not pickled: ``full_state_dict()`` and
        ``consolidate_state_dict()`` return what can, and so does ``dist_asgd.pieces.rank_local`` for this rank alone.
        ``torch.distributed.checkpoint`` saves the dict and loads it on any number of ranks. With torch's
        ``get_optimizer_state_dict``, the dict is keyed by parameter names, and stays sharded even where a full state
        dict is asked for; ``full_state_dict()`` returns one.

        As in torch, a parameter that has never taken a step has no state. Before the first step, all parameters that
        are to be trained have one, into which a checkpoint can be loaded.

        Raises:
            RuntimeError: on this rank alone, where parameters are not what the optimizer was built for, and inside
                ``averaged_parameters()``.
        """
        for pre_hook in state_dict_pre_hooks(self).values():
            pre_hook(self)
        self._complete_parameters()
        if self._built_for.final:
            self._step_agreement.check_groups(self.param_groups)
            for bucket in self._all_buckets():
                bucket.check_parameters()
        state_dict, self._consolidated = self._consolidated, None
        # What has changed before the first step is taken up by collective calls; until then it is the former state.
        groups = self.param_groups if self._built_for.final else self._built_for.former_groups()
        state_dict = state_dict or sharded_state_dict(groups, self._buckets)
        if not (self._built_for.final or self._built_for.fits() or steps_loaded(self._all_buckets())):
            state_dict["state"] = {}  # pieces of the former buckets, which hold no training
        return passed_through(state_dict_post_hooks(self), self, state_dict)

    def steps_taken(self) -> tuple[tuple[int, ...], int]:
        """Returns the global ranks of the optimizer, and a fingerprint of the steps that this rank has taken.

        The fingerprints are equal on these ranks if they have taken the same steps, with the same options and
        gradients of the same parameters. Steps that the ranks agree on beforehand are left out. Sends nothing:
        ``Checkpointer.save`` compares the fingerprints.
        """
        return tuple(self._agreement.ranks), self._step_agreement.history

    @refused_during_swap(NOT_BOTH)
    def full_state_dict(self) -> dict[str, Any]:
        """Returns a plain ``torch.optim.ASGD`` state dict of whole CPU tensors on rank 0. Collective.

        Parameters with fp32 masters have them as ``master``, which torch keeps and does not use. As in torch, a
        parameter that has not taken a step has no state.

        Returns:
            The state dict on rank 0, ``{}`` on other ranks.

        Raises:
            RuntimeError: the same on every rank, where parameters are not what the optimizer was built for, and for
                FSDP1's slices without ``module``; inside ``averaged_parameters()``, on this rank alone.
        """
        return self._gathered_state("full_state_dict()", 0)

    @refused_during_swap(NOT_BOTH)
    def consolidate_state_dict(self, to: int = 0) -> None:
        """Makes the next ``state_dict()`` on rank ``to`` the one that ``full_state_dict()`` returns. Collective.

        Code that knows ``ZeroRedundancyOptimizer`` (Lightning, for one) calls it on every rank before rank ``to`` saves
        ``state_dict()``. Later calls of ``state_dict()`` return pieces again, and so does the next one if a step, a
        load, a write to ``state`` or a new param group comes first.

        Args:
            to: the rank among the ranks of the optimizer that gets the state, the same on every rank.

        Raises:
            ValueError: on every rank, where there is no rank ``to``, and for FSDP1's slices, which rank 0 alone gets.
            RuntimeError: the same on every rank, for whatever ``full_state_dict`` would raise, and where ``to``
                differs.
        """
        self._consolidated = self._gathered_state(f"consolidate_state_dict(to={to})", to) or None

    @refused_during_swap()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads a state dict of this class or of ``torch.optim.ASGD``. Collective.

        Parameters are matched by name, group by group, where both sides have names (``param_names`` in the groups,
        of ``model.named_parameters()``), and otherwise by position. Names are taken where the optimizer has none.

        Args:
            state_dict: the result of ``state_dict()``, of ``full_state_dict()`` on rank 0, which every rank must pass,
                or of ``torch.optim.ASGD.state_dict()``.

        Steps that ranks took differently before are forgotten.

        Raises:
            ValueError, TypeError: the same on every rank, where the state dict does not fit or differs between ranks;
                nothing has changed then.
            RuntimeError: the same on every rank, where parameters are not what the optimizer was built for; inside
                ``averaged_parameters()``, on this rank alone.
        """
        self._consolidated = None
        self._complete_parameters()
        self._take_up_changes("load_state_dict()", replaces_state=True)
        with self._step_agreement.together("load_state_dict()", replaces_state=True):
            self._step_agreement.check_groups(self.param_groups)
            self._step_agreement.check_parameters(self._all_buckets())
            check_state_dict(state_dict)
            state_dict = passed_through(load_state_dict_pre_hooks(self), self, dict(state_dict))
            loaded = plan_load(self.param_groups, self._buckets, state_dict, self._modules.slices())
        self._agreement.require_equal("the state dict", loaded.facts())
        loaded.apply()
        self._step_agreement.forget_steps()
        for post_hook in load_state_dict_post_hooks(self).values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "a ShardedASGD cannot be copied or pickled: its parameters lie in its buckets and its hooks reduce "
            "their gradients. Build another one and pass it state_dict()"
        )

    # Internals -------------------------------------------------------------------------------------------------------

    def _set_up(self, arguments: dict[str, Any], module: nn.Module | None) -> None:
        """Makes all that needs neither ranks nor parameters."""
        Joinable.__init__(self)
        self._arguments, self._modules, self._swap_guard = arguments, ParallelModules(module), SwapGuard()
        self._buckets: list[list[Bucket]] = []  # one list for each param group

    def _connect(self, group: dist.ProcessGroup | None, agreement: Agreement, module: nn.Module | None) -> None:
        """Connects the ranks of ``group``, and makes all that needs no parameters. Collective."""
        self._agreement, arguments = agreement, self._arguments
        self.process_group = group  # checkpoints keep the state for each group of ranks
        self._reducer, self._forward_waits = Reducer(), ForwardWaits(module)
        self._built_for = BuiltFor(arguments["gradients"], self._forward_waits)
        self._reducer.still_fits = self._built_for.fits
        self._step_agreement = StepAgreement(
            agreement,
            self._reducer,
            self._forward_waits,
            find_unused=arguments["find_unused_parameters"],
            alone=group is None,
            verify_every=arguments["verify_every"],
        )
        capturable = arguments["capturable"]  # a step in a CUDA graph can have no all-gather among replicas
        groups = self._groups = agreement.separate_groups()
        self._group = None if groups is None else groups.of(agreement.ranks)
        self._replicas = Replicas(agreement, groups, arguments["shard_replicas"] and not capturable)
        set_takes_scaled_gradients(self, capturable)

    def _make_setting(self, precision: Precision, averages: Mapping[str, Average]) -> BucketOptions:
        rank, world_size = self._agreement.rank, self._agreement.world_size
        bucket_bytes = self._arguments["bucket_bytes"]
        reducing = weakref.proxy(self._step_agreement)  # buckets must not keep the optimizer's parts alive
        return BucketOptions(
            rank=rank,
            world_size=world_size,
            groups=self._groups,
            group=self._group,
            precision=precision,
            averages=averages,
            bucket_bytes=bucket_bytes,
            gradient_sync=reducing,
        )

    def _all_buckets(self) -> list[Bucket]:
        return [bucket for buckets in self._buckets for bucket in buckets]

    def _gathered_state(self, operation: str, to: int) -> dict[str, Any]:
        """Returns the whole state dict on rank ``to``, and ``{}`` on others, for the user's call ``operation``."""
        self._consolidated = None
        self._complete_parameters()
        self._take_up_changes(operation)
        buckets, rank = self._all_buckets(), self._agreement.rank
        presharded = any(bucket.presharded for bucket in buckets)
        with self._step_agreement.together(operation):
            self._step_agreement.check_groups(self.param_groups)
            self._step_agreement.check_parameters(buckets)
            ranks = 1 if presharded else self._agreement.world_size
            if to not in range(ranks):
                raise ValueError(f"to={to!r}: it must be a rank in [0, {ranks})" + " under FSDP1" * presharded)
        if presharded:
            return self._modules.full_state_dict(self, rank)
        return full_state_dict(self.param_groups, self._buckets, self._agreement, to)

    def _complete_parameters(self) -> None:
        """Waits for all-gathers and drops FSDP's whole copies, before parameters are read or changed but by a step."""
        self.synchronize()
        self._modules.drop_copies()

    def _take_up_changes(self, operation: str, *, replaces_state: bool = False) -> None:
        """Builds the buckets again where the model or the ranks are not what they were built for. Collective.

        Does so until the first step only. Parameters that were moved, cast, wrapped, sharded or replaced in
        ``param_groups`` are taken up, and so is a process group that was initialized later.

        Args:
            operation: the user's call.
            replaces_state: whether it loads a state, so that it may follow writes that differed.

        Raises:
            ValueError, TypeError, RuntimeError: the same on every rank, where what there is now is bad or differs
                between ranks; nothing has changed then.
        """
        if self._built_for.final or self._swap_guard.active:
            return
        self.synchronize()
        late = initialized_since(self.process_group is None)
        with self._step_agreement.together(operation, replaces_state=replaces_state) as values:
            if not self._built_for.fits():
                self._modules.reshard()
            values.append(late or not self._built_for.fits())
        if values[0]:
            self._rebuild(operation, default_group(None) if late else None)

    def _rebuild(self, operation: str, group: dist.ProcessGroup | None) -> None:
        """Builds the buckets again, for ``group`` if that is not None. Collective; changes nothing where it raises."""
        module = self._forward_waits.module
        for bucket in self._reducer.buckets:
            bucket.detach_placeholders()
        former, groups = self._built_for.former_groups(), self._built_for.current_groups()
        buckets, params = self._all_buckets(), [param for group in groups for param in group["params"]]
        # Check on all ranks, and compare.
        agreement = self._agreement if group is None else Agreement(group, "ShardedASGD")
        with agreement.together(operation):
            facts = check_rebuild(groups, former, buckets, agreement.ranks, self._arguments, module)
        agreement.require_equal("the model, which was changed after the optimizer was built", facts)
        (any_gradient,) = agreement.maximum(operation, [any(param.grad is not None for param in params)])
        if any_gradient and self._arguments["gradients"] == "local":  # then building would copy rank 0's parameters
            agreement.require_equal("the parameters that their gradients are of", value_facts(groups))
        # Keep the state that was loaded, and put other buckets in the place of the former ones.
        state = None
        if steps_loaded(buckets):
            dtypes = [self._setting.precision.average(param.dtype) for param in params]
            state = state_for_all(former, self._buckets, self._agreement, agreement, dtypes)
        for group_now, found in zip(self.param_groups, groups, strict=True):
            group_now["params"][:] = found["params"]
        self._buckets.clear()
        for part in (self._reducer, self._forward_waits, self._step_agreement, self._built_for):
            part.clear()
        if group is not None:
            self._connect(group, agreement, module)
            self._setting = self._make_setting(self._setting.precision, self._setting.averages)
        self._build_buckets(first=0)
        if state is not None:
            plan_load(self.param_groups, self._buckets, state, self._modules.slices()).apply()

    def _build_buckets(self, first: int) -> None:
        """Builds the buckets of the param groups from index ``first`` on. Collective."""
        for number, group in enumerate(self.param_groups[first:], start=first):
            named = dict(zip(group["params"], parameter_names(group, number), strict=True))
            buckets = build_buckets(named, self._arguments["gradients"], self._setting, self._replicas)
            self._buckets.append(buckets)
            self._step_agreement.add_group(group["params"], buckets)
            self._built_for.add(group)
            self._forward_waits.attach(buckets)
            self._reducer.add(buckets)
