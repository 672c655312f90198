"""``optimizer.state``: torch's mapping of parameters to their state, read from the shards and written to them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from dist_asgd._torch_private import DEVICE_OF, make_wrapper_subclass, refuse_data_pointers
from dist_asgd.asgd.schedule import Hyperparameters
from dist_asgd.buckets.base import Bucket
from dist_asgd.state_dict import GroupBuckets, has_state, has_stepped, parameters_with_state, scalar_tensors
from dist_asgd.step.validation import Groups


class StateView(MutableMapping[Tensor, MutableMapping[str, Any]]):
    """``optimizer.state``. Nothing in it is collective, so every rank must write the same, as the next call compares.

    As in torch, a parameter without state has no entry, and ``state[param]`` is empty. Deleting an entry, or setting an
    empty one, starts the state of the parameter anew.

    Args:
        groups: ``optimizer.param_groups``.
        buckets: the buckets of each group.
        note: called with what was written, in terms that are equal on every rank; ranks compare it in their next call.
    """

    def __init__(self, groups: Groups, buckets: GroupBuckets, note: Callable[[Sequence[object]], None]) -> None:
        self._groups, self._buckets, self._note = groups, buckets, note

    def __getitem__(self, param: Tensor) -> ParameterState:
        for group, buckets in zip(self._groups, self._buckets, strict=True):
            for bucket in buckets:
                position = bucket.positions.get(id(param))
                if position is not None:
                    return ParameterState(bucket, position, group, self._buckets, self._note)
        raise KeyError(param)

    def __setitem__(self, param: Tensor, state: Mapping[str, Any]) -> None:
        self._require_parameters([param])
        self[param].replace(state)

    def __delitem__(self, param: Tensor) -> None:
        self[param].clear()

    def __contains__(self, param: object) -> bool:
        return any(param is other for other in self)

    def __iter__(self) -> Iterator[Tensor]:
        with_state = parameters_with_state(self._groups, self._buckets)
        return (param for group in self._groups for param in group["params"] if id(param) in with_state)

    def __len__(self) -> int:
        return len(parameters_with_state(self._groups, self._buckets))

    def __bool__(self) -> bool:
        """True also where no parameter has state.

        torch's ``get_optimizer_state_dict`` runs a fake step for a false state, which would change the training
        (pytorch#164929).
        """
        return True

    def __reduce__(self) -> Any:
        return dict, ({param: dict(self[param]) for param in self},)

    def _require_parameters(self, params: Iterable[Tensor]) -> None:
        known = {id(param) for group in self._groups for param in group["params"]}
        if any(id(param) not in known for param in params):
            raise ValueError("optimizer.state has entries of the optimizer's parameters only: keep others beside it")

    def pop(self, param: Tensor, *default: Any) -> Any:
        """Starts the state of ``param`` anew, and returns a copy of what it was."""
        if param not in self:
            return super().pop(param, *default)
        state = self[param].copy()
        del self[param]
        return state

    def popitem(self) -> NoReturn:
        raise TypeError("optimizer.state has an entry of every parameter, always: clear() starts all of them anew")

    def clear(self) -> None:
        self.replace({})

    @torch.no_grad()
    def replace(self, states: Mapping[Tensor, Mapping[str, Any]]) -> None:
        """Makes ``states`` the whole state. A parameter without an entry, or with an empty one, starts anew.

        Raises:
            ValueError: where an entry is not that of a parameter, or does not fit; nothing has changed then.
        """
        if states is self:
            return
        self._require_parameters(states)
        plans: list[tuple[Bucket, dict[int, Mapping[str, Any]]]] = []
        for bucket in (bucket for of_group in self._buckets for bucket in of_group):
            found = {position: states.get(param) for position, param in enumerate(bucket.params)}
            plans.append((bucket, {position: state for position, state in found.items() if state}))
            for position, state in plans[-1][1].items():
                _check(bucket, position, state)
        for bucket, plan in plans:
            bucket.shard.load_state(plan)
        states_by_place = [(bucket, p, plan.get(p, {})) for bucket, plan in plans for p in range(len(bucket.params))]
        self._note([written for place in states_by_place for written in _written(*place)])


class ParameterState(MutableMapping[str, Any]):
    """``optimizer.state[p]``: ``step``, ``eta``, ``mu``, ``ax`` and ``master`` of one parameter, as they are now.

    Tensors that it returns are the live state, as in torch: they change with steps, and writing to them changes the
    state. Two of them are so until the next step only: an ``ax`` before averaging starts, which then is the parameter
    again, as in torch; and any tensor from before the state was loaded or replaced.
    """

    def __init__(
        self,
        bucket: Bucket,
        position: int,
        group: Mapping[str, Any],
        buckets: GroupBuckets,
        note: Callable[[Sequence[object]], None],
    ) -> None:
        self._bucket, self._position, self._group, self._buckets = bucket, position, group, buckets
        self._note = note

    def _exists(self) -> bool:
        steps = self._bucket.shard.step_of(self._position)
        return has_state(self._bucket, self._position, steps, has_stepped(self._buckets))

    def scalars(self) -> dict[str, Tensor]:
        """Returns the scalars of now as plain 0-dim tensors."""
        scalars = self._bucket.shard.scalars_of(self._position, Hyperparameters.of(self._group))
        return scalar_tensors(scalars, self._bucket)

    @torch.no_grad()
    def __getitem__(self, key: str) -> Tensor:
        if not self._exists():
            raise KeyError(key)
        if key in self._bucket.shard.state_names:
            return self._bucket.shard.live(key, self._position)
        if key in self.scalars():
            return LiveScalar(self, key)
        raise KeyError(key)

    @torch.no_grad()
    def __setitem__(self, key: str, value: Any) -> None:
        bucket, position, scalars = self._bucket, self._position, self.scalars()
        names = [*scalars, *bucket.shard.state_names]
        if not self._exists():
            raise ValueError(
                f"parameter {self._name!r} has no state before its first step: set all of it at once "
                f"(optimizer.state[p] = a dict with {', '.join(names)}), or load a state dict"
            )
        if key not in names:
            raise ValueError(
                f"the state of parameter {self._name!r} has {', '.join(names)}, and no place for {key!r}: keep values "
                "of your own beside the optimizer, in a dict by parameter or by name"
            )
        _check(bucket, position, {**self, **scalars, key: value})
        if key not in scalars:
            bucket.shard.set_tensor(key, position, value)
            self._note(_written(bucket, position, {key: value}))
            return
        number = float(torch.as_tensor(value, device="cpu").to(torch.float64 if key == "step" else scalars[key].dtype))
        if number != float(scalars[key]):
            bucket.shard.set_scalars(position, {**scalars, key: number})
            if number != float(self.scalars()[key]):
                bucket.shard.set_scalars(position, scalars)
                raise ValueError(
                    f"{key} = {number:g} of parameter {self._name!r} would not last: step is a whole number, and eta "
                    "comes from the group's lr before the first step, and always with lr_on_time=True"
                )
            self._note(_written(bucket, position, {key: number}))

    def __delitem__(self, key: str) -> NoReturn:
        raise ValueError(f"{key!r} cannot be deleted from the state of a parameter; clear() starts all of it anew")

    def __iter__(self) -> Iterator[str]:
        if self._exists():
            yield from self.scalars()
            yield from self._bucket.shard.state_names

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __repr__(self) -> str:
        return repr(dict(self))

    def __reduce__(self) -> Any:
        return dict, (dict(self),)

    def copy(self) -> dict[str, Tensor]:
        """Returns a dict of copies, which do not change with the optimizer."""
        return {key: value.clone() for key, value in self.items()}

    def clear(self) -> None:
        """Starts the state of the parameter anew, as before its first step."""
        self.replace({})

    @torch.no_grad()
    def replace(self, state: Mapping[str, Any]) -> None:
        """Makes ``state`` the whole state of the parameter; an empty one starts it anew.

        Raises:
            ValueError: where it does not fit; nothing has changed then.
        """
        if state:
            _check(self._bucket, self._position, state)
        self._bucket.shard.load_parameter(self._position, state)
        self._note(_written(self._bucket, self._position, state))

    @property
    def _name(self) -> str:
        return self._bucket.names[self._position]


class LiveScalar(Tensor):
    """A CPU tensor of one element that is ``step``, ``eta`` or ``mu`` of one parameter at any time.

    It is 0-dim, and its views have other shapes.

    The optimizer keeps these numbers once for each run of parameters, so there is no memory that such a tensor could
    share. Operators read the number of now, and make plain tensors; operators that write to it set the number.
    """

    entry: ParameterState
    key: str

    @staticmethod
    def __new__(cls, entry: ParameterState, key: str, shape: Sequence[int] = ()) -> LiveScalar:
        # On the meta device for the reason that StatePiece is (sharding/sharded_state.py).
        scalar = make_wrapper_subclass(
            cls, shape, dtype=entry.scalars()[key].dtype, device="meta", dispatch_device=True
        )
        refuse_data_pointers(scalar)
        scalar.entry, scalar.key = entry, key
        return scalar

    def plain(self) -> Tensor:
        """Returns a plain tensor with the number of now."""
        return self.entry.scalars()[self.key].view(self.shape)

    def __repr__(self) -> str:  # type: ignore[override]
        return repr(self.plain())

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.plain().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return memo.setdefault(id(self), self.plain())

    @property
    def data(self) -> LiveScalar:  # type: ignore[override]
        return self.detach()  # type: ignore[return-value]

    @data.setter
    def data(self, value: Tensor) -> None:
        self.entry[self.key] = value.reshape(())

    def __dlpack__(self, **options: Any) -> Any:
        raise BufferError(f"{self.key} has no memory to share: take item(), or clone() it")

    def share_memory_(self) -> LiveScalar:
        raise BufferError(f"{self.key} has no memory to share: take item(), or clone() it")

    def tolist(self) -> Any:
        return self.plain().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """Returns a copy that refuses to be written to, since nobody would hear of it."""
        array = self.plain().numpy(force=force)
        array.flags.writeable = False
        return array

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is DEVICE_OF:
            return torch.device("cpu")
        known: dict[int, tuple[LiveScalar, Tensor]] = {}

        def plain(value: Any) -> Any:
            if isinstance(value, LiveScalar):
                return known.setdefault(id(value), (value, value.plain()))[1]
            return type(value)(map(plain, value)) if type(value) in (list, tuple) else value

        args, kwargs = plain(args), {key: plain(value) for key, value in (kwargs or {}).items()}
        before = {number: value.clone() for number, (_, value) in known.items()}
        result = func(*args, **kwargs)
        for scalar, value in known.values():
            if value != before[id(scalar)]:  # the operator has written to it
                scalar.entry[scalar.key] = value.reshape(())
            if func.is_view and isinstance(result, Tensor) and result.numel() == 1 and result.dtype == scalar.dtype:
                return cls(scalar.entry, scalar.key, result.shape)
            result = scalar if result is value else result
        return result


def _check(bucket: Bucket, position: int, state: Mapping[str, Any]) -> None:
    try:
        bucket.shard.check_state(position, state)
    except ValueError as error:
        raise ValueError(f"the state of parameter {bucket.names[position]!r} {error}") from None


def _written(bucket: Bucket, position: int, state: Mapping[str, Any]) -> list[object]:
    """Returns what was written to the state of a parameter, without values of tensors, of which ranks take pieces.

    Nothing for slices of FSDP1, as ranks whose slice is empty have no state to write to.
    """
    scalars = [key for key in state if key in ("step", "eta") or key.startswith("mu")]
    values = dict.fromkeys(state, 0.0) | {key: float(state[key]) for key in scalars}
    return [] if bucket.presharded else [(bucket.names[position], sorted(values.items()))]
