"""Names of torch that begin with an underscore: the package uses the ones listed here and no others.

torch may change such a name in any release, and tests/test_torch_private.py then fails under that name. Unless an entry
says otherwise, a torch that lacks the name fails on importing this module, and so on importing the package.

Functions and classes of torch are bound directly, and attributes are read by ``operator.attrgetter``, so that a loop
over parameters pays for no call in Python.
"""

from __future__ import annotations

import functools
import inspect
import operator
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import _composable_state, _functional_collectives
from torch.distributed._shard import sharded_tensor
from torch.distributed.algorithms.join import Joinable
from torch.distributed.checkpoint import filesystem
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, _runtime_utils
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils import _pytree

if TYPE_CHECKING:
    _Function = TypeVar("_Function", bound=Callable[..., Any])

# The autograd engine -------------------------------------------------------------------------------------------------

current_graph_task_id: Callable[[], int] = torch._C._current_graph_task_id
"""Returns the number of the backward pass that is running on this thread; -1 outside a backward pass.

It tells the accumulation of a gradient from other arithmetic on the gradient, and one backward pass from the next.
torch's public hooks do not say which backward pass called them.
"""

current_autograd_node: Callable[[], Any] = torch._C._current_autograd_node
"""Returns the autograd node that is being evaluated on this thread; None between nodes and outside a backward pass.

It tells the end of a backward pass inside a node (reentrant activation checkpointing) from the end of the outermost
one. torch has no public way to ask.
"""

queue_callback: Callable[[Callable[[], None]], None] = torch.autograd.Variable._execution_engine.queue_callback
"""Has the autograd engine call a function at the end of the backward pass that is running.

torch's public hooks run at single tensors or nodes, which may lack a gradient. DistributedDataParallel and FSDP2 end
their backward passes by this function.
"""


def is_profiling() -> bool:
    """Returns whether a profiler of torch runs in this process.

    ``torch.autograd.profiler`` keeps this for its own decorators; torch has no public way to ask.
    """
    return torch.autograd.profiler._is_profiler_enabled


# Subclasses of Tensor ------------------------------------------------------------------------------------------------

make_wrapper_subclass: Callable[..., Any] = Tensor._make_wrapper_subclass  # type: ignore[attr-defined]
"""Makes an instance of a Tensor subclass that has a shape and a dtype and no memory of its own.

torch documents it for extensions, under this name only.
"""

refuse_data_pointers: Callable[[Tensor], None] = torch._C._set_throw_on_mutable_data_ptr
"""Lets torch raise where it would hand out the data pointer of a tensor that has no memory.

torch.utils.dlpack.to_dlpack asks no subclass first, and whoever reads from the null pointer ends the process.
"""

disabled_torch_function: Any = torch._C._disabled_torch_function_impl
"""The ``__torch_function__`` of a Tensor subclass whose operators return plain tensors.

torch documents the value for this use, under this name only.
"""


def has_other_users(tensor: Tensor) -> bool:
    """Returns whether the storage of ``tensor`` is also that of another tensor, such as a view.

    No public name tells it. CUDA graph trees of torch.compile ask the same of storages.
    """
    storage = tensor.untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata) > 2  # the tensor and ``storage`` itself


# DTensors and their relatives ----------------------------------------------------------------------------------------

local_tensor: Callable[[DTensor], Tensor] = operator.attrgetter("_local_tensor")
"""Returns the tensor that holds this rank's block of a DTensor. Raises ``AttributeError`` for a plain tensor.

The public ``to_local()`` makes a view of it where gradients are recorded, and costs several times as long. A torch that
lacks the attribute fails where the first DTensor is used.
"""


def set_local_tensor(tensor: DTensor, local: Tensor) -> None:
    """Replaces the local tensor of a DTensor by ``local``, the plain tensor that an asynchronous one has become.

    A new DTensor (``DTensor.from_local``) would not be the ``grad`` that others may hold already.
    """
    tensor._local_tensor = local


AsyncCollectiveTensor = _functional_collectives.AsyncCollectiveTensor
"""Class of a tensor that an asynchronous collective is still filling; ``wait()`` returns the filled tensor.

``redistribute(async_op=True)``, as tensor parallelism calls it, leaves such tensors in DTensors. Reading their memory
directly needs ``wait()`` first, and torch has no public name for the class.
"""

ShardedTensor = sharded_tensor.ShardedTensor
"""Class of tensors in the sharded state dicts of FSDP1, which torch has replaced by DTensor.

Checkpoints read its local shards. torch exports the class from a private module only.
"""

# Operators -----------------------------------------------------------------------------------------------------------

aten = torch.ops.aten
"""Namespace of the operators that ``__torch_dispatch__`` gets to see."""

DEVICE_OF: Any = torch.ops.prim.device.default
"""The operator by which ``Tensor.device`` asks a subclass that was made with ``dispatch_device=True``."""

FOREACH_ZERO_ = aten._foreach_zero_.default
"""The operator by which ``optimizer.zero_grad(set_to_none=False)`` zeroes all gradients at once."""

TO_COPY = aten._to_copy.default
"""The operator that ``Tensor.to()`` becomes below autograd where it makes a copy."""

is_mutable: Callable[[Any], bool] = operator.attrgetter("_schema.is_mutable")
"""Returns whether an operator writes to one of its arguments."""

tree_map: Callable[..., Any] = _pytree.tree_map
"""Returns nested lists, tuples and dicts, such as an operator's arguments, with a function applied to each leaf."""

tree_leaves: Callable[..., list[Any]] = _pytree.tree_leaves
"""Returns the leaves of nested lists, tuples and dicts."""

foreach_mul_: Callable[..., None] = torch._foreach_mul_
"""Multiplies each tensor of a list by one 0-dim tensor, in place and in one kernel.

torch's own gradient clipping uses it. The public operators take one tensor each.
"""

foreach_norm: Callable[..., tuple[Tensor, ...]] = torch._foreach_norm
"""Returns the norm of each tensor of a list, in one kernel. The public ``torch.linalg.vector_norm`` takes one."""

chunk_cat: Callable[..., Any] = torch._chunk_cat
"""Joins tensors of any number of dims, flattened, in one kernel.

FSDP2 fills its buffers by it. The public ``torch.cat`` wants each tensor flattened by a call of its own.
"""

amp_unscale_: Callable[..., None] = torch._amp_foreach_non_finite_check_and_unscale_
"""The operator that ``GradScaler.unscale_()`` calls with all gradients.

The gradients of this package recognize it in ``__torch_function__``, and apply it to the local tensors.
"""

# torch.compile --------------------------------------------------------------------------------------------------------


def outside_graphs(function: _Function) -> _Function:
    """Decorates a function that torch.compile leaves out of its graphs, with everything that the function calls.

    The decorator of torch's own optimizers is used, ``_disable_dynamo``, but only in a process that has imported
    ``torch._dynamo``: without that module nothing is compiled, and importing it takes as long as half of
    ``import torch``. The public ``torch.compiler.disable`` imports it where it decorates, and ``_disable_dynamo`` at
    the first call.
    """
    outside = torch._disable_dynamo(function)

    @functools.wraps(function)
    def chosen(*args: Any, **kwargs: Any) -> Any:
        return (outside if "torch._dynamo" in sys.modules else function)(*args, **kwargs)

    return cast("_Function", chosen)


add_param_group: Callable[[Optimizer, dict[str, Any]], None] = inspect.unwrap(Optimizer.add_param_group)
"""Is ``Optimizer.add_param_group`` without torch's decorator ``_disable_dynamo``, for callers that have a decorator."""

zero_grad: Callable[[Optimizer, bool], None] = inspect.unwrap(Optimizer.zero_grad)
"""Is ``Optimizer.zero_grad`` without torch's decorator ``_disable_dynamo``, for callers that have a decorator."""

# Modules and FSDP ----------------------------------------------------------------------------------------------------

submodules: Callable[[nn.Module], Mapping[str, nn.Module | None]] = operator.attrgetter("_modules")
"""Returns the direct children of a module by name.

The public ``named_children()`` leaves out the second name of a child that has two, and ``getattr`` is redirected by
wrappers. A torch that lacks the attribute fails where a module is saved.
"""

non_persistent_buffers: Callable[[nn.Module], Collection[str]] = operator.attrgetter("_non_persistent_buffers_set")
"""Returns the names of the direct buffers of a module that its ``state_dict()`` leaves out.

``state_dict()`` would tell as well, but is collective under FSDP1.
"""

WRAPPER_NAMES = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Names under which torch.compile, FSDP1 and activation checkpointing hold the module that they wrap.

State dicts of the unwrapped module lack these names. With another name, torch would make other keys for checkpoints.
"""


def without_wrappers(name: str) -> str:
    """Returns the name of a parameter without the parts of ``WRAPPER_NAMES``.

    The "module" of DistributedDataParallel stays.
    """
    return ".".join(part for part in name.split(".") if part not in WRAPPER_NAMES)


modules_with_state: Iterable[nn.Module] | None = getattr(_composable_state, "_module_state_mapping", None)
"""Modules of this process that ``fully_shard`` or ``replicate`` has been applied to; None on a torch that lacks it.

The mapping is torch's own and holds the modules weakly. FSDP2 has no public way to find the module of a parameter.
"""


def is_fsdp1_slice(param: Tensor) -> bool:
    """Whether FSDP1 (``use_orig_params=True``) has made ``param`` this rank's slice of a parameter, which it marks.

    The slice is a plain tensor without any public sign. On a torch that lacks the mark, slices count as plain
    parameters.
    """
    return bool(getattr(param, "_fsdp_flattened", False))


def free_fsdp1_copy(module: FullyShardedDataParallel) -> None:
    """Frees the whole parameters that a forward under FSDP1 has left in ``module``; the next forward gathers them.

    FSDP1 keeps the ones of the outermost module after a forward, and has no public way to free them. Before the first
    forward, ``_is_root`` is None, and what ``_reshard`` uses does not exist.
    """
    handle = module._handle
    if handle is not None and handle.uses_sharded_strategy and module._is_root is not None:
        _runtime_utils._reshard(module, handle, free_unsharded_flat_param=True)


def fsdp1_slices(module: FullyShardedDataParallel) -> Iterator[tuple[Tensor, Tensor, slice]]:
    """Yields the slices that FSDP1 has made of the parameters of ``module``, except of parts wrapped by themselves.

    Each comes with a meta tensor of the shape and the strides of its whole parameter, and with its place in that
    parameter, flattened in memory order. FSDP1 has no public way to ask for these.
    """
    flat_param = None if module._handle is None else module._handle.flat_param
    if flat_param is None or flat_param._params is None:
        return
    layouts = zip(flat_param._shapes, flat_param._strides, strict=True)
    for param, layout, info in zip(flat_param._params, layouts, flat_param._shard_param_infos, strict=True):
        start, last = info.intra_param_start_idx, info.intra_param_end_idx  # None where this rank has no element
        where = slice(0, 0) if start is None or last is None else slice(start, last + 1)
        yield param, torch.empty_strided(*layout, device="meta"), where


def fsdp2_parameters(module: FSDPModule) -> list[Any]:
    """Returns FSDP2's records of the parameters of ``module``; ``sharded_param`` is the DTensor of each.

    FSDP2 has no public way to them. ``_fsdp_param_groups`` is the name of newer versions, ``_fsdp_param_group`` the
    name of older ones.
    """
    state: Any = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    return [param for group in groups or [state._fsdp_param_group] if group for param in group.fsdp_params]


def fsdp2_named_parameters(module: FSDPModule) -> list[tuple[str, nn.Parameter]]:
    """Returns the parameters of ``module`` with their names from FSDP2's root module; none before the first forward.

    FSDP2 sets the names at the first forward. ``named_parameters()`` gives the names from ``module`` only, and FSDP2
    has no public way to its root.
    """
    return [(param._param_fqn, param.sharded_param) for param in fsdp2_parameters(module) if param._param_fqn]


def fsdp2_copies(module: FSDPModule) -> list[Tensor]:
    """Returns the whole parameters that a forward under FSDP2 computes with; none before the first forward."""
    return [param._unsharded_param for param in fsdp2_parameters(module) if hasattr(param, "_unsharded_param")]


# Process groups ------------------------------------------------------------------------------------------------------


def timeout_of(group: dist.ProcessGroup) -> timedelta | None:
    """Returns the timeout of the collectives of ``group``; None where the backend or the version of torch hides it.

    torch has no public way to ask. ``torch.distributed.split_group`` reads it by these names, too.
    """
    try:
        return group._get_backend(group._device_types[0]).options._timeout  # type: ignore[no-any-return]
    except (AttributeError, RuntimeError):
        return None


default_store: Callable[[], dist.Store] = dist.distributed_c10d._get_default_store
"""Returns the key-value store by which ``init_process_group`` has connected all ranks.

``init_process_group(store=...)`` is the public way to set a store; torch has none to ask for it.
"""

# Optimizers ----------------------------------------------------------------------------------------------------------

state_dict_pre_hooks: Callable[[Optimizer], Mapping[int, Callable[..., Any]]]
state_dict_pre_hooks = operator.attrgetter("_optimizer_state_dict_pre_hooks")
"""Returns the hooks that ``register_state_dict_pre_hook`` has added.

An optimizer with its own ``state_dict()`` has to call them, and torch has no public way to them. A torch that lacks the
attribute fails in ``state_dict()``. The next three entries are alike.
"""

state_dict_post_hooks: Callable[[Optimizer], Mapping[int, Callable[..., Any]]]
state_dict_post_hooks = operator.attrgetter("_optimizer_state_dict_post_hooks")
"""Returns the hooks that ``register_state_dict_post_hook`` has added."""

load_state_dict_pre_hooks: Callable[[Optimizer], Mapping[int, Callable[..., Any]]]
load_state_dict_pre_hooks = operator.attrgetter("_optimizer_load_state_dict_pre_hooks")
"""Returns the hooks that ``register_load_state_dict_pre_hook`` has added."""

load_state_dict_post_hooks: Callable[[Optimizer], Mapping[int, Callable[..., Any]]]
load_state_dict_post_hooks = operator.attrgetter("_optimizer_load_state_dict_post_hooks")
"""Returns the hooks that ``register_load_state_dict_post_hook`` has added."""


def set_takes_scaled_gradients(optimizer: Optimizer, takes: bool) -> None:
    """Tells ``torch.amp.GradScaler`` whether ``optimizer.step()`` unscales gradients and skips steps by itself.

    torch's fused optimizers carry the mark; it has no public name. A torch that does not read it unscales before the
    step, which is right as well, and waits for the device.
    """
    optimizer._step_supports_amp_scaling = takes  # type: ignore[attr-defined]


def is_first_joinable(joinable: Joinable) -> bool:
    """Whether ``torch.distributed.algorithms.join.Join`` has been given ``joinable`` first, or alone.

    The first one makes the collectives of ``Join``; which one it is, ``Join`` tells by this name only.
    """
    return bool(joinable._join_config.is_first_joinable)


# Files ---------------------------------------------------------------------------------------------------------------

StorageInfo = filesystem._StorageInfo
"""Class of the places of items (file, offset, length) in the ``.metadata`` of ``torch.distributed.checkpoint``.

torch reads checkpoints by it, so checkpoints for torch have to contain it; it has no public name.
"""

rebuild_tensor_v2: Callable[..., Tensor] = torch._utils._rebuild_tensor_v2
"""The function by which files of ``torch.save`` name a tensor with a typed storage.

Files are written here without ``torch.save``, to save a copy, and have to name the function. It has no public name.
"""

rebuild_tensor_v3: Callable[..., Tensor] = torch._utils._rebuild_tensor_v3
"""The function by which files of ``torch.save`` name a tensor of a dtype that has no typed storage, such as uint16."""
