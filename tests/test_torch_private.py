"""Every private name of torch that the package uses exists, does what it is used for, and is used in one file only."""

import ast
import functools
import importlib
import io
import pickle
import subprocess
import sys
from collections import OrderedDict
from datetime import timedelta
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join, Joinable, JoinHook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import dist_asgd
from tests.support.ranks import run_ranks

PACKAGE = Path(dist_asgd.__file__).parent
HOME = PACKAGE / "_torch_private.py"

# Names of modules and of classes, which are there from the import on.
STATIC = [
    "torch._C._current_graph_task_id",
    "torch._C._current_autograd_node",
    "torch._C._disabled_torch_function_impl",
    "torch.autograd.Variable._execution_engine",
    "torch.autograd.profiler._is_profiler_enabled",
    "torch.Tensor._make_wrapper_subclass",
    "torch._C._set_throw_on_mutable_data_ptr",
    "torch._C._storage_Use_Count",
    "torch.distributed.tensor.DTensor._local_tensor",
    "torch.distributed._functional_collectives.AsyncCollectiveTensor",
    "torch.distributed._shard.sharded_tensor.ShardedTensor",
    "torch.ops.aten._foreach_zero_",
    "torch.ops.aten._to_copy",
    "torch._foreach_mul_",
    "torch._foreach_norm",
    "torch._chunk_cat",
    "torch._disable_dynamo",
    "torch._amp_foreach_non_finite_check_and_unscale_",
    "torch.distributed._composable_state._module_state_mapping",
    "torch.distributed.fsdp._runtime_utils._reshard",
    "torch.distributed.fsdp.FSDPModule._get_fsdp_state",
    "torch.distributed.ProcessGroup._get_backend",
    "torch.distributed.ProcessGroup._device_types",
    "torch.distributed.distributed_c10d._get_default_store",
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
    "torch.utils._pytree.tree_map",
    "torch.utils._pytree.tree_leaves",
]
# Attributes that only objects have, and marks: the tests of what they are used for fail where one is gone.
DYNAMIC = {
    "_cdata",
    "_fsdp_flattened",
    "_fsdp_param_group",
    "_fsdp_param_groups",
    "_handle",
    "_is_root",
    "_join_config",
    "_modules",
    "_non_persistent_buffers_set",
    "_optimizer_load_state_dict_post_hooks",
    "_param_fqn",
    "_params",
    "_schema",
    "_shapes",
    "_shard_param_infos",
    "_strides",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_step_supports_amp_scaling",
    "_timeout",
    "_unsharded_param",
}
WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
PRIVATE = {part for name in STATIC for part in name.split(".") if part.startswith("_")} | DYNAMIC | WRAPPERS
# Private names of fsspec, gcsfs, transformers, CPython and ctypes that the package uses.
OF_OTHERS = {
    "_tied_weights_keys",
    "_strip_protocol",
    "_request",
    "_location",
    "_open_new",
    "_register_atexit",
    "_Unpickler",
    "_fields_",
    "_custom_objects",
    "_should_save",
}


def find(name):
    """Imports the longest prefix of a dotted name that is a module and gets the rest as attributes."""
    parts = name.split(".")
    for number in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:number]))
        except ImportError:
            continue
        for part in parts[number:]:
            found = getattr(found, part)
        return found
    raise ImportError(name)


@pytest.mark.parametrize("name", STATIC)
def test_torch_has(name):
    try:
        find(name)
    except (AttributeError, ImportError) as error:
        pytest.fail(f"torch {torch.__version__} has no {name}: find a replacement in {HOME.name} ({error})")


# What each name is used for ------------------------------------------------------------------------------------------
# Imports of the file are inside, so that a name that is gone fails above, by its name.


def private():
    return importlib.import_module("dist_asgd._torch_private")


def in_backward(look):
    """Runs a backward pass and returns what ``look()`` returns in a hook of a node."""
    found = []
    leaf = torch.ones(2, requires_grad=True)
    leaf.register_post_accumulate_grad_hook(lambda _: found.append(look()))
    leaf.sum().backward()
    return found[0]


def test_current_graph_task_id():
    assert private().current_graph_task_id() == -1
    first, second = in_backward(private().current_graph_task_id), in_backward(private().current_graph_task_id)
    assert first >= 0 and second >= 0 and first != second


def test_is_profiling():
    assert not private().is_profiling()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert private().is_profiling()
    assert not private().is_profiling()


def test_current_autograd_node():
    assert private().current_autograd_node() is None
    assert in_backward(private().current_autograd_node) is not None


def test_queue_callback():
    order = []
    with_two = [torch.ones(2, requires_grad=True) for _ in range(2)]

    def hook(_):
        private().queue_callback(lambda: order.append("end"))
        order.append("gradient")

    for leaf in with_two:
        leaf.register_post_accumulate_grad_hook(hook)
    (with_two[0] * with_two[1]).sum().backward()
    assert order == ["gradient", "gradient", "end", "end"]


def test_has_other_users():
    tensor = torch.zeros(6)
    lent = torch.from_dlpack(tensor)
    assert not private().has_other_users(lent)
    for use in (lambda: lent[2:], lent.detach, lambda: lent[:4].view(2, 2)[1], lambda: torch.from_dlpack(lent[:])):
        used = use()
        assert private().has_other_users(lent) and not private().has_other_users(torch.zeros(6))
        del used
        assert not private().has_other_users(lent)


def test_make_wrapper_subclass():
    class Wrapper(Tensor):
        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            return torch.full((1,), 7)

    made = private().make_wrapper_subclass(Wrapper, (2, 3), strides=(1, 2), dtype=torch.bfloat16, device="cpu")
    assert type(made) is Wrapper and made.shape == (2, 3) and made.stride() == (1, 2) and made.dtype == torch.bfloat16
    assert torch.neg(made).item() == 7


def test_refuse_data_pointers():
    class Wrapper(Tensor):
        __torch_dispatch__ = None

    made = private().make_wrapper_subclass(Wrapper, (2, 3), dtype=torch.float32, device="cpu")
    private().refuse_data_pointers(made)
    with pytest.raises(RuntimeError, match="data pointer"):
        torch.utils.dlpack.to_dlpack(made)


def test_disabled_torch_function():
    class Marked(Tensor):
        __torch_function__ = private().disabled_torch_function

    assert type(torch.ones(2).as_subclass(Marked) + 1) is Tensor


def mesh_of_all():
    return init_device_mesh("cpu", (dist.get_world_size(),))


def use_local_tensor(rank):
    whole = torch.arange(4.0)
    tensor = distribute_tensor(whole, mesh_of_all(), [Shard(0)])
    assert torch.equal(private().local_tensor(tensor), whole[2 * rank : 2 * rank + 2])
    private().set_local_tensor(tensor, torch.zeros(2))
    assert torch.equal(tensor.to_local(), torch.zeros(2))


def test_local_tensor():
    with pytest.raises(AttributeError):
        private().local_tensor(torch.ones(1))
    run_ranks(2, use_local_tensor)


test_set_local_tensor = test_local_tensor


def wait_for_a_collective(rank):
    tensor = DTensor.from_local(torch.ones(2), mesh_of_all(), [Partial()]).redistribute(
        placements=[Replicate()], async_op=True
    )
    local = private().local_tensor(tensor)
    assert isinstance(local, private().AsyncCollectiveTensor)
    waited = local.wait()
    assert type(waited) is Tensor and torch.equal(waited, torch.full((2,), 2.0))


def test_AsyncCollectiveTensor():
    run_ranks(2, wait_for_a_collective)


def make_sharded_tensor(rank):
    from torch.distributed._shard.sharded_tensor import init_from_local_shards
    from torch.distributed._shard.sharded_tensor.shard import Shard as LocalShard

    shard = LocalShard.from_tensor_and_offsets(torch.full((2,), float(rank)), [2 * rank], rank)
    tensor = init_from_local_shards([shard], 4)
    assert isinstance(tensor, private().ShardedTensor)
    assert [list(own.metadata.shard_offsets) for own in tensor.local_shards()] == [[2 * rank]]


def test_ShardedTensor():
    run_ranks(2, make_sharded_tensor)


class Recorded(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_FOREACH_ZERO_():
    params = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    for param in params:
        param.grad = torch.ones(2)
    with Recorded() as record:
        torch.optim.SGD(params, lr=0.1, foreach=True).zero_grad(set_to_none=False)
    assert private().FOREACH_ZERO_ in record.seen


def test_DEVICE_OF():
    asked = []

    class OnMeta(Tensor):
        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            asked.append(func)
            return torch.device("cpu")

    tensor = private().make_wrapper_subclass(OnMeta, (2,), device="meta", dispatch_device=True)
    assert tensor.device == torch.device("cpu") and not tensor.is_meta
    assert set(asked) == {private().DEVICE_OF}


def test_TO_COPY():
    with Recorded() as record:
        torch.ones(2).to(torch.float64)
    assert private().TO_COPY in record.seen


def test_is_mutable():
    is_mutable, aten = private().is_mutable, private().aten
    assert is_mutable(aten.mul_.Tensor) and not is_mutable(aten.mul.Tensor)


def test_tree_map():
    assert private().tree_map(lambda leaf: leaf + 1, ([1, {"a": 2}], 3)) == ([2, {"a": 3}], 4)


def test_tree_leaves():
    assert private().tree_leaves(([1, {"a": 2}], 3)) == [1, 2, 3]


def test_foreach_mul_():
    tensors = [torch.ones(2), torch.ones(3, 1)]
    private().foreach_mul_(tensors, torch.tensor(3.0))
    assert torch.equal(tensors[0], torch.full((2,), 3.0)) and torch.equal(tensors[1], torch.full((3, 1), 3.0))


def test_foreach_norm():
    norms = private().foreach_norm([torch.tensor([3.0, 4.0]), torch.ones(4)], 2.0, dtype=torch.float64)
    assert [norm.item() for norm in norms] == [5.0, 2.0] and norms[0].dtype == torch.float64


def test_chunk_cat():
    out = torch.empty(1, 6)
    private().chunk_cat([torch.arange(2.0), torch.arange(4.0).view(2, 2)], 0, 1, out=out)
    assert out.tolist() == [[0, 1, 0, 1, 2, 3]]


def test_amp_unscale_():
    class Watching(Tensor):
        seen: ClassVar[list[object]] = []

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            cls.seen.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    param = nn.Parameter(torch.ones(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(param.sum()).backward()
    param.grad = param.grad.as_subclass(Watching)
    Watching.seen.clear()
    scaler.unscale_(torch.optim.SGD([param], lr=0.1))
    assert any(func is private().amp_unscale_ for func in Watching.seen)
    assert torch.equal(param.grad.as_subclass(Tensor), torch.ones(2))


def test_outside_graphs():
    """The package is imported without torch's compiler, and what it decorates stays out of graphs with its callees."""
    seen = []

    def is_compiling():
        return torch.compiler.is_compiling()

    @private().outside_graphs
    def look():
        seen.append(is_compiling())

    def work(x):
        look()
        seen.append(torch.compiler.is_compiling())
        return x + 1

    torch.compile(work, backend="eager")(torch.ones(1))
    assert seen == [False, True]


def test_training_leaves_out_the_compiler_of_torch():
    code = """
import sys, torch, dist_asgd.cli.main
model = torch.nn.Linear(2, 2)
optimizer = dist_asgd.ShardedASGD(model.named_parameters(), lr=1)
model(torch.ones(2)).sum().backward()
optimizer.clip_grad_norm_(1)
optimizer.step()
optimizer.zero_grad()
dist_asgd.ShardedAverages(model.named_parameters(), average=dist_asgd.EMA(0.9)).update()
optimizer.load_state_dict(optimizer.state_dict())
print('torch._dynamo' in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_submodules():
    module, child = nn.Module(), nn.Linear(1, 1)
    module.first, module.second = child, child
    module.register_module("third", None)
    assert dict(private().submodules(module)) == {"first": child, "second": child, "third": None}


def test_non_persistent_buffers():
    module = nn.BatchNorm1d(2)
    module.register_buffer("scratch", torch.zeros(2), persistent=False)
    assert set(private().non_persistent_buffers(module)) == {"scratch"}
    assert set(private().non_persistent_buffers(nn.Sequential(module))) == set()
    assert "scratch" not in module.state_dict() and "running_mean" in module.state_dict()


def names_of_wrappers(rank):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    found = set()
    for wrap in (torch.compile, checkpoint_wrapper, lambda module: FullyShardedDataParallel(module, device_id="cpu")):
        found |= private().submodules(wrap(nn.Linear(2, 2))).keys()
    return found


def test_WRAPPER_NAMES():
    assert run_ranks(1, names_of_wrappers)[0] == private().WRAPPER_NAMES == WRAPPERS


def test_without_wrappers():
    name = "module._orig_mod.blocks.0._fsdp_wrapped_module.up._checkpoint_wrapped_module.weight"
    assert private().without_wrappers(name) == "module.blocks.0.up.weight"


def use_fsdp1(rank):
    torch.manual_seed(0)
    module = FullyShardedDataParallel(nn.Linear(4, 4), device_id="cpu", use_orig_params=True)
    assert all(map(private().is_fsdp1_slice, module.parameters()))
    module(torch.ones(1, 4))
    copy = module._handle.flat_param._full_param_padded.untyped_storage()
    assert copy.size() > 0  # the outermost module keeps what it has gathered
    private().free_fsdp1_copy(module)
    assert copy.size() == 0
    private().free_fsdp1_copy(FullyShardedDataParallel(nn.Tanh(), device_id="cpu"))


def slices_of_fsdp1(rank):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 2, 3).to(memory_format=torch.channels_last)
    values = [param.detach().clone() for param in conv.parameters()]
    flat = [values[0].permute(0, 2, 3, 1).flatten(), values[1]]  # in memory order
    module = FullyShardedDataParallel(conv, device_id="cpu", use_orig_params=True)
    private().free_fsdp1_copy(module)  # nothing, before the first forward
    found = list(private().fsdp1_slices(module))
    assert [id(param) for param, _, _ in found] == list(map(id, module.parameters()))
    for (param, whole, where), value, in_order in zip(found, values, flat, strict=True):
        assert whole.is_meta and (whole.shape, whole.stride()) == (value.shape, value.stride())
        assert torch.equal(param, in_order[where])
    assert not list(private().fsdp1_slices(FullyShardedDataParallel(nn.Tanh(), device_id="cpu")))


def test_fsdp1_slices():
    run_ranks(3, slices_of_fsdp1)


def test_is_fsdp1_slice():
    assert not private().is_fsdp1_slice(nn.Parameter(torch.ones(1)))
    run_ranks(2, use_fsdp1)


test_free_fsdp1_copy = test_is_fsdp1_slice


def use_fsdp2(rank):
    module = nn.Linear(4, 4)
    assert module not in private().modules_with_state
    fully_shard(module, mesh=mesh_of_all(), reshard_after_forward=False)
    assert module in private().modules_with_state
    assert {id(each.sharded_param) for each in private().fsdp2_parameters(module)} == set(map(id, module.parameters()))
    assert private().fsdp2_copies(module) == []
    assert private().fsdp2_named_parameters(module) == []
    sharded = {name: id(param) for name, param in module.named_parameters()}
    module(torch.ones(1, 4))
    assert {name: id(param) for name, param in private().fsdp2_named_parameters(module)} == sharded
    assert sorted(copy.shape for copy in private().fsdp2_copies(module)) == [(4,), (4, 4)]


def test_fsdp2_copies():
    run_ranks(2, use_fsdp2)


test_fsdp2_parameters = test_fsdp2_named_parameters = test_modules_with_state = test_fsdp2_copies


def ask_for_timeout(rank):
    group = dist.new_group([0], timeout=timedelta(seconds=77))
    return private().timeout_of(group)


def test_timeout_of():
    assert run_ranks(1, ask_for_timeout) == [timedelta(seconds=77)]


def use_default_store(rank):
    if rank == 0:
        private().default_store().set("from 0", "hello")
    return private().default_store().get("from 0")


def test_default_store():
    assert run_ranks(2, use_default_store) == [b"hello", b"hello"]


@pytest.mark.parametrize(
    "name", ["state_dict_pre_hooks", "state_dict_post_hooks", "load_state_dict_pre_hooks", "load_state_dict_post_hooks"]
)
def test_hooks(name):
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    hooks = getattr(private(), name)
    assert not hooks(optimizer)

    def hook(*_):
        return None

    getattr(optimizer, f"register_{name.removesuffix('s')}")(hook)
    assert list(hooks(optimizer).values()) == [hook]


test_state_dict_pre_hooks = test_state_dict_post_hooks = test_hooks
test_load_state_dict_pre_hooks = test_load_state_dict_post_hooks = test_hooks


@pytest.mark.parametrize("takes", [True, False])
def test_set_takes_scaled_gradients(takes):
    seen = []

    class Step(torch.optim.SGD):
        def step(self):
            seen.append(self.param_groups[0]["params"][0].grad.item())

    param = nn.Parameter(torch.ones(1))
    optimizer, scaler = Step([param], lr=0.1), torch.amp.GradScaler("cpu", init_scale=4.0)
    private().set_takes_scaled_gradients(optimizer, takes)
    scaler.scale(param.sum()).backward()
    scaler.step(optimizer)
    assert seen == [4.0 if takes else 1.0]


def test_is_first_joinable():
    class Joined(Joinable):
        join_device, join_process_group = torch.device("cpu"), None

        def __init__(self):
            super().__init__()

        def join_hook(self, **kwargs):
            return JoinHook()

    def ranks(rank):
        first, second = Joined(), Joined()
        assert not private().is_first_joinable(first)
        Join([first, second])
        assert private().is_first_joinable(first) and not private().is_first_joinable(second)

    run_ranks(1, ranks)


def test_StorageInfo():
    info = private().StorageInfo("file", 1, 2)
    assert (info.relative_path, info.offset, info.length) == ("file", 1, 2)
    assert pickle.loads(pickle.dumps(info)) == info


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint16])
def test_rebuild_tensor(dtype):
    saved = io.BytesIO()
    torch.save(torch.ones(3).to(dtype), saved)
    function = "rebuild_tensor_v2" if dtype == torch.float32 else "rebuild_tensor_v3"
    assert f"_{function}".encode() in saved.getvalue()
    storage = torch.ones(4).to(dtype).untyped_storage()
    typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)
    more = () if dtype == torch.float32 else (dtype,)
    made = getattr(private(), function)(typed, 1, (2,), (1,), False, OrderedDict(), *more)
    assert made.dtype == dtype and made.tolist() == [1, 1]


test_rebuild_tensor_v2 = test_rebuild_tensor_v3 = test_rebuild_tensor


# One file ------------------------------------------------------------------------------------------------------------


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def trees():
    """Of every file of the package."""
    return {path: tree_of(path) for path in sorted(PACKAGE.rglob("*.py"))}


@functools.cache
def defined_anywhere():
    return {name for tree in trees().values() for name in defined(tree)}


def defined(tree):
    """Names that the file defines itself: functions, classes, variables, fields, attributes that it sets."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.attr if isinstance(node, ast.Attribute) else node.id


def on_self(tree):
    """Names of attributes that the file sets on ``self``, but for a mark that torch reads."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield from {node.attr} - {"_step_supports_amp_scaling"}


def used(tree):
    """(line, private name) of every attribute, import and constant string that names an attribute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "torch":
            for alias in node.names:
                yield from ((node.lineno, part) for part in [*node.module.split("."), alias.name])
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, part) for alias in node.names for part in alias.name.split("."))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("attr", "attrgetter")):
            names = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
            yield from ((node.lineno, part) for name in names for part in name.split("."))


def test_the_scan_finds_what_it_looks_for():
    source = "import torch._a\nfrom torch._b import _c\nx._d\ngetattr(x, '_e')\nattrgetter('_f')\n__all__ = x.__g__"
    assert {name for _, name in used(ast.parse(source)) if is_private(name)} == {"_a", "_b", "_c", "_d", "_e", "_f"}


def test_private_names_of_torch_are_in_one_file():
    anywhere = defined_anywhere() - PRIVATE | OF_OTHERS
    for path in trees().keys() - {HOME}:
        own = anywhere | set(on_self(trees()[path]))
        names = [(line, name) for line, name in used(trees()[path]) if is_private(name) and name not in own]
        assert not names, (
            f"{path.relative_to(PACKAGE.parent)}:{names[0][0]} uses {names[0][1]}: if it is torch's, give it an entry "
            f"in {HOME.name} and a test here, and import the entry; if another library's, add it to OF_OTHERS"
        )


def test_every_private_name_has_a_test():
    names = {name for _, name in used(trees()[HOME]) if is_private(name)} - {"_C"}
    assert names - PRIVATE == set(), "add the name to STATIC or DYNAMIC"


def test_every_entry_is_described_and_tested():
    body = trees()[HOME].body
    for node, following in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.FunctionDef):
            name, described = node.name, ast.get_docstring(node) is not None
        elif isinstance(node, ast.Assign):
            name = node.targets[0].id
            described = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            name = node.target.id
            described = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
        else:
            continue
        assert described, f"{name} has no docstring"
        assert name == "aten" or f"test_{name}" in globals(), f"{name} has no test"


def test_add_param_group():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    added = torch.zeros(2)
    private().add_param_group(optimizer, {"params": [added]})
    assert optimizer.param_groups[1]["params"][0] is added
    assert optimizer.param_groups[1]["lr"] == 0.1


def test_zero_grad():
    param = torch.nn.Parameter(torch.ones(2))
    param.sum().backward()
    optimizer = torch.optim.SGD([param], lr=0.1)
    private().zero_grad(optimizer, False)
    assert torch.equal(param.grad, torch.zeros(2))
    private().zero_grad(optimizer, True)
    assert param.grad is None
