"""Hooks that tell an object about the gradients of parameters without keeping the object alive."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from dist_asgd._torch_private import outside_graphs


def register_hook(param: Tensor, method: Callable[..., None], *arguments: Any) -> RemovableHandle:
    """Calls ``method(*arguments)`` whenever a backward pass has accumulated the gradient of ``param``.

    The hook holds the object of the bound ``method`` weakly. A frozen parameter gets the hook as well, because it may
    be unfrozen later; torch itself refuses hooks on tensors that need no gradient.
    """
    weak = weakref.WeakMethod(method)

    def hook(param: Tensor) -> None:
        _call(weak, arguments)

    frozen = not param.requires_grad
    param.requires_grad_(True)
    handle = param.register_post_accumulate_grad_hook(hook)
    param.requires_grad_(not frozen)
    return handle


@outside_graphs  # compiled autograd would trace the hook, whose collectives and counts are no part of a graph
def _call(weak: weakref.WeakMethod[Callable[..., None]], arguments: Sequence[Any]) -> None:
    method = weak()
    if method is not None:
        method(*arguments)


def remove_hooks(hooks: Sequence[RemovableHandle]) -> None:
    for hook in hooks:
        hook.remove()
