"""A dispatch mode that measures the storages that operations return and counts the products that read a tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Storages(TorchDispatchMode):
    """Records what operations do within the `with` block.

    `elements` is the size of the largest storage that an operation returned, other than the one of `watched`;
    `products` is the number of matrix products that had `watched` as an argument.
    """

    def __init__(self, watched: Tensor) -> None:
        super().__init__()
        self.elements, self.products, self.pointer = 0, 0, watched.data_ptr()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.data_ptr() != self.pointer:
                self.elements = max(self.elements, leaf.untyped_storage().nbytes() // leaf.element_size())
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm):
            self.products += any(isinstance(a, Tensor) and a.data_ptr() == self.pointer for a in args)
        return out
