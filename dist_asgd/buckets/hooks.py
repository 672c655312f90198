"""Hooks on parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.utils.hooks import RemovableHandle


def register_hook(param: Tensor, hook: Callable[[Tensor], None]) -> RemovableHandle:
    """Also on a frozen parameter, which may be unfrozen later; torch refuses hooks where no gradient is needed."""
    frozen = not param.requires_grad
    param.requires_grad_(True)
    handle = param.register_post_accumulate_grad_hook(hook)
    param.requires_grad_(not frozen)
    return handle


def remove_hooks(hooks: Sequence[RemovableHandle]) -> None:
    for hook in hooks:
        hook.remove()
