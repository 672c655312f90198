"""``ShardedASGD``: torch.optim.ASGD with its state and its update sharded over the ranks of a process group."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any, Literal, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_asgd._torch_private import (
    load_state_dict_post_hooks,
    load_state_dict_pre_hooks,
    set_takes_scaled_gradients,
    state_dict_post_hooks,
    state_dict_pre_hooks,
)
from dist_asgd.asgd.schedule import own_options
from dist_asgd.averages.kinds import Average
from dist_asgd.averages.options import group_options, named_averages
from dist_asgd.buckets.base import Bucket, Setting
from dist_asgd.buckets.build import build_buckets
from dist_asgd.buckets.reducer import Reducer
from dist_asgd.buckets.replicas import Replicas
from dist_asgd.comm.consensus import Agreement
from dist_asgd.comm.process_groups import default_group, group_of_its_own
from dist_asgd.sharding.precision import Precision
from dist_asgd.state_dict import (
    TORCH_OPTIONS,
    StateView,
    full_state_dict,
    passed_through,
    plan_load,
    sharded_state_dict,
)
from dist_asgd.step.clip import clip_
from dist_asgd.step.consistency import argument_facts
from dist_asgd.step.cuda_graphs import scaling_of
from dist_asgd.step.forward_wait import ForwardWaits
from dist_asgd.step.param_groups import add_agreed, add_checked
from dist_asgd.step.sync import Settlement, take
from dist_asgd.step.validation import built_for_another, check_arguments, check_state_dict, parameter_names
from dist_asgd.swap import NOT_BOTH, Chosen, Swap, averages_in, refused_inside, restart_averaging, start_averaging
from dist_asgd.wrappers import ParallelModules


class ShardedASGD(torch.optim.Optimizer):
    """Averaged SGD with the state sharded over ranks: what ``torch.optim.ASGD`` is, on 1 rank or 1,000.

    Of plain parameters every rank holds all, updates its 1/N, and all-gathers the result. DTensors (FSDP2, HSDP,
    tensor parallelism) and FSDP1's slices are recognised by themselves and stay where they are; ranks that have the
    same of one share its state and update. In fp32 and fp64, parameters, ``ax``, ``eta``, ``mu`` and ``step`` are equal
    to those of ``torch.optim.ASGD(foreach=False)`` bit for bit, given the same reduced gradients. The constructor,
    ``step``, ``add_param_group``, ``clip_grad_norm_``, ``load_state_dict``, ``full_state_dict`` and
    ``averaged_parameters`` are collective: every rank must call them.

    Args:
        params: tensors, (name, tensor) pairs, or groups (dicts) of either. Plain ones become views of flat buckets, so
            build the optimizer after ``model.to(...)``, ``fully_shard(...)`` and the like. ``model.named_parameters()``
            gives errors and checkpoints names.
        lr, lambd, alpha, t0, weight_decay, maximize: as in ``torch.optim.ASGD``; groups may have their own.
            Averaging starts ``t0`` steps into training: by default 1e6, or 0 where ``average`` is given. Numbers >= 0;
            ``t0=math.inf`` never averages.
        lr_on_time: whether an ``lr`` that is set acts in the next step; in torch it does in the one after that.
        eta_decay: what ``lambd`` is to the step size, ``lr / (1 + eta_decay * lr * steps) ** alpha``; None: ``lambd``.
        gradients: of plain parameters. ``"local"``: each rank has gradients of its own; they are averaged by a
            reduce-scatter that runs during backward, and a bucket's whole gradients are freed as it goes (ZeRO-2).
            Parameters start as rank 0's. ``"reduced"``: DistributedDataParallel has averaged them; only state and
            update are sharded (ZeRO-1). They must be the same on every rank, as the first step checks: a rank reads
            those of its own shard only. ``"sharded"``: parameters and gradients are this rank's own slices.
        process_group: the ranks to shard over; None for the default group, or one process without torch.distributed.
        find_unused_parameters: with ``"local"``, a parameter may lack a gradient on some ranks (it counts as zeros) or
            on all (it is skipped, as in torch). Costs one small all-reduce a step. Without it that is an error.
        bucket_bytes: size of the buckets in which gradients and parameters travel.
        master_weights: keep fp32 masters of bf16 and fp16 parameters. Without, updates in fp32 are rounded once.
        average_dtype: dtype of ``ax``; None for fp32 or the parameter's dtype, whichever is wider.
        average: its kind, ``Uniform``, ``EMA``, ``PolynomialDecay`` or ``Tail``; None for torch's, the uniform one. A
            mapping of names to kinds keeps several: the first is ``ax``, others have their names, as ``ax_ema``.
        wire_dtype: in which gradients of plain parameters are sent, and parameters if it is narrower than theirs:
            ``torch.bfloat16`` halves the bytes. Sums are fp32; parameters become roundings of fp32 masters.
        stochastic_rounding: round bf16 parameters without masters by chance, so that the smallest steps still add up.
        shard_replicas: share the state of a DTensor among the ranks that have the same of it; False: each keeps all.
        capturable: CUDA graphs can hold ``step()``, and GradScaler does not make the host wait: ``step``, ``eta`` and
            ``mu`` are on the device. Replays read an ``lr`` that is a tensor there; any other change of options or
            state (``start_averaging()``, loading) takes a new capture. One rank, or DTensors as if unshared.
        module: the model. Given, ``step()`` returns while the all-gather of plain parameters is under way, and modules
            wait before their forward, the members of ``ModuleList``s and ``Sequential``s for their own parameters. Call
            ``synchronize()`` before they are read in any other way. ``averaged_parameters()`` needs it under FSDP.

    Raises:
        ValueError, TypeError: bad arguments, or arguments that differ between ranks; the same error on every rank.
    """

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
        bucket_bytes: int = 25 * 2**20,
        master_weights: bool = True,
        average_dtype: torch.dtype | None = None,
        average: Average | Mapping[str, Average] | None = None,
        wire_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False,
        shard_replicas: bool = True,
        capturable: bool = False,
        module: nn.Module | None = None,
        **unknown: NoReturn,  # refused in the body, where every rank hears of it
    ) -> None:
        arguments: dict[str, Any] = {"gradients": gradients, "find_unused_parameters": find_unused_parameters}
        precision = Precision(master_weights, average_dtype, wire_dtype, stochastic_rounding, capturable)
        arguments |= {"bucket_bytes": bucket_bytes, "shard_replicas": shard_replicas, **asdict(precision)}
        ranks = self._prepare(default_group(process_group), arguments, module)
        t0 = t0 if t0 is not None else 1e6 if average is None else 0
        options: dict[str, Any] = {"lr": lr, "lambd": lambd, "alpha": alpha, "t0": t0, "weight_decay": weight_decay}
        options |= {"maximize": maximize, **TORCH_OPTIONS, "capturable": capturable}
        with self._agreement.together("ShardedASGD()"):
            check_arguments(**arguments, module=module, unknown=unknown)
            averages = named_averages(average)
            self._setting = Setting(*ranks, precision, averages, bucket_bytes, weakref.proxy(self._settlement))
            super().__init__(params, options | own_options(lr_on_time, eta_decay) | group_options(averages))
            facts = argument_facts(arguments, self.param_groups, 0)
        self._agreement.require_equal("the arguments of the optimizer", facts)
        self._build(0)
        self.state = StateView(self.param_groups, self._buckets)  # type: ignore[assignment]

    @refused_inside()
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as ``torch.optim.Optimizer`` does; also after training began. Collective."""
        if not self._params:  # in the constructor
            add_checked(self, param_group, self._setting, self._agreement)
            return
        first = len(self.param_groups)
        self.synchronize()
        self._settlement.align("add_param_group()", self._all_buckets(), self._misuse())
        add_agreed(self, param_group, self._setting, self._agreement, self._arguments)
        self._build(first)

    @refused_inside()
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step: waits for each bucket's gradients, updates this rank's shard, starts its all-gather. Collective.

        Without plain parameters, ranks exchange nothing but what is updated, from the second step on.

        Args:
            closure: re-evaluates the model and returns the loss, which is returned.

        Raises:
            RuntimeError, ValueError: on every rank the same, where any rank has a gradient missing, sparse or of
                another shape, a parameter that became one of another kind, or options of its own. Nothing has changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        settled = self._settlement.settle("step()", self.param_groups, self._all_buckets(), self._misuse())
        self._settlement.warn_if_orphaned(settled)
        take(settled, self._buckets, scaling_of(self))
        for bucket in self._all_buckets():
            if not self._waits.covers(bucket):
                bucket.wait()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch. With None, the memory of reduced gradients is freed."""
        self._reducer.close_pass()
        super().zero_grad(set_to_none)
        if set_to_none:
            for bucket in self._reducer.buckets:
                bucket.drop_gradient()

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Scales all gradients so that the norm of all of them together is at most ``max_norm``. Collective.

        The meaning of ``torch.nn.utils.clip_grad_norm_``, over the whole model, each element counted once.

        Args:
            max_norm: >= 0; ``math.inf`` only measures.
            norm_type: > 0, may be ``math.inf`` or ``"inf"``.

        Returns:
            0-dim tensor: the total norm before clipping.

        Raises:
            RuntimeError, ValueError: on every rank the same; as ``step``, and for arguments out of range.
        """
        buckets, group, error = self._all_buckets(), self._setting.group, self._misuse()
        return clip_(self._settlement, self.param_groups, buckets, (max_norm, norm_type), group, error)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Inside, backward accumulates on this rank and sends nothing; FSDP and DDP only if ``module`` was given.

        The first backward after it, or ``step()``, reduces all that was accumulated; for FSDP and DDP only a backward.
        """
        with self._modules.no_sync(), self._reducer.suspended():
            yield

    @contextlib.contextmanager
    def averaged_parameters(self, name: str | None = None) -> Iterator[None]:
        """Inside, parameters hold their averages; after it, exactly what they held before. Collective.

        If the block raises on one rank only, that rank waits some seconds for the others to leave theirs, then lets it
        out; its parameters are complete when they have (``synchronize()`` waits for that). Parameters without an
        average keep their values. What is written to any inside is dropped. Backward accumulates as in ``no_sync()``.
        Steps, loading and whatever reads the state to save it raise ``RuntimeError`` inside; so does this in another
        thread while they run. Before it, as before a step, wait for what still copies parameters in the background
        (``async_save`` with a stager that does). Extra memory: 1/N of the parameters.

        Args:
            name: of one of several averages, the same on every rank; None for the first.

        Raises:
            ValueError, RuntimeError: on every rank the same, with nothing changed.
        """
        chosen, buckets, error = Chosen(self._setting.averages, name), self._all_buckets(), self._misuse()
        with self._swap.entered(), averages_in(buckets, chosen, self._settlement, self._modules, error):
            yield

    def start_averaging(self) -> None:
        """Starts the average now: sets ``t0`` of every group to the steps taken so far. Every rank must do so.

        As in torch with that ``t0``, the second step from now is the first that the average holds. An average that was
        under way starts afresh with that step, and is what it was until then. A ``Tail`` that would begin later does.
        """
        start_averaging(self.param_groups, self._buckets)

    @refused_inside()
    def restart_averaging(self) -> None:
        """Forgets all averages, and starts them afresh now, as after a change of data or learning rate. Collective.

        Unlike ``start_averaging()``, at once: until the second step from now, which is the first that each average
        holds, averages are the parameters themselves and take no memory. And all of them: a ``Tail`` begins now, too,
        and those of parameters that are frozen by now are forgotten with the others.
        """
        self._settlement.align("restart_averaging()", self._all_buckets(), self._misuse())
        restart_averaging(self.param_groups, self._buckets)

    def synchronize(self) -> None:
        """Waits until all parameters are complete. Needed only with ``module``, before they are read elsewhere."""
        for bucket in self._all_buckets():
            bucket.wait()

    # State dicts -----------------------------------------------------------------------------------------------------

    @refused_inside(NOT_BOTH)
    def state_dict(self) -> dict[str, Any]:
        """torch's state dict, with ``ax`` (and ``master``) as this rank's pieces. No communication.

        ``torch.distributed.checkpoint`` saves and loads it with any number of ranks; ``get_optimizer_state_dict`` gives
        it by names, also where it is asked for a full state dict: that is ``full_state_dict()``. ``step``, ``eta`` and
        ``mu`` are 0-dim tensors on the CPU. With one rank the tensors are whole.
        """
        for pre_hook in state_dict_pre_hooks(self).values():
            pre_hook(self)
        self._complete()
        if error := self._misuse():
            raise error
        for bucket in self._all_buckets():
            bucket.check_parameters()
        state_dict = sharded_state_dict(self.param_groups, self._buckets)
        return passed_through(state_dict_post_hooks(self), self, state_dict)

    @refused_inside(NOT_BOTH)
    def full_state_dict(self) -> dict[str, Any]:
        """A plain ``torch.optim.ASGD`` state dict of whole CPU tensors on rank 0, ``{}`` on the others. Collective."""
        self._complete()
        self._settlement.align("full_state_dict()", self._all_buckets(), self._misuse())
        if any(bucket.uneven for bucket in self._all_buckets()):
            return self._modules.full_state_dict(self, self._agreement.rank)
        return full_state_dict(self.param_groups, self._buckets, self._agreement)

    @refused_inside()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads ``state_dict()``, ``full_state_dict()`` (every rank passes it) or ``torch.optim.ASGD``'s. Collective.

        Raises:
            ValueError: on every rank the same, where it does not fit; nothing has changed then.
        """
        self._complete()
        self._settlement.align("load_state_dict()", self._all_buckets(), self._misuse())
        with self._agreement.together("load_state_dict()"):
            check_state_dict(state_dict)
            state_dict = passed_through(load_state_dict_pre_hooks(self), self, dict(state_dict))
            loaded = plan_load(self.param_groups, self._buckets, state_dict)
        self._agreement.require_equal("the state dict", loaded.facts())
        loaded.apply()
        for post_hook in load_state_dict_post_hooks(self).values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "a ShardedASGD cannot be copied or pickled: its parameters are views of its buckets and its hooks reduce "
            "their gradients. Build another one and pass it state_dict()"
        )

    # Internals -------------------------------------------------------------------------------------------------------

    def _prepare(
        self, group: dist.ProcessGroup | None, arguments: dict[str, Any], module: nn.Module | None
    ) -> tuple[int, int, dist.ProcessGroup | None]:
        """Makes what needs no parameters: first of all, that by which ranks agree. Collective.

        Returns the rank among the ranks of the optimizer, their number, and a group of them.
        """
        agreement = self._agreement = Agreement(group)
        self._buckets: list[list[Bucket]] = []  # by group
        self._params: list[list[Tensor]] = []  # by group, as they were added
        self._reducer, self._waits, self._modules = Reducer(), ForwardWaits(module), ParallelModules(module)
        self._alone, self._arguments, self._swap = group is None, arguments, Swap()
        self._settlement = Settlement(agreement, self._reducer, self._waits, arguments["find_unused_parameters"])
        capturable = arguments["capturable"]
        self._replicas = Replicas(agreement, group, arguments["shard_replicas"] and not capturable)  # none in a graph
        set_takes_scaled_gradients(self, capturable)
        return agreement.rank, agreement.world_size, group_of_its_own(group)

    def _all_buckets(self) -> list[Bucket]:
        return [bucket for buckets in self._buckets for bucket in buckets]

    def _misuse(self) -> RuntimeError | None:
        return built_for_another(self._alone, self.param_groups, self._params)

    def _complete(self) -> None:
        """Before parameters are looked at or changed other than by a step."""
        self.synchronize()
        self._modules.drop_copies()

    def _build(self, first: int) -> None:
        """Makes the buckets of the groups from ``first`` on."""
        for number, group in enumerate(self.param_groups[first:], start=first):
            named = dict(zip(group["params"], parameter_names(group, number), strict=True))
            buckets = build_buckets(named, self._arguments["gradients"], self._setting, self._replicas)
            self._buckets.append(buckets)
            self._params.append(list(group["params"]))
            self._waits.attach(buckets)
            self._reducer.add(buckets)
        self._settlement.start_again()
