"""Weights laid out for the processor's kernels once, instead of at every call.

In half precision on a CPU, oneDNN reorders the weight of every convolution and linear layer each time; for a model as
small as mini that is a tenth of a generation. The operators are those that torch's own compiler uses.
"""

from types import MethodType
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

_laid_out: "WeakKeyDictionary[nn.Module, tuple[Any, Tensor]]" = WeakKeyDictionary()


def pack(model: nn.Module) -> None:
    """Let the convolutions and linear layers of a frozen model keep their weights laid out.

    With gradients, in another dtype or on another device they do what they always did; a weight that changed is laid out anew.
    """
    if not all(hasattr(torch.ops.mkldnn, name) for name in ("_convolution_pointwise", "_linear_pointwise", "_reorder_linear_weight")):
        return
    for module in model.modules():
        if type(module) is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str):
            module.forward = MethodType(_convolve, module)  # type: ignore[method-assign]
        elif type(module) is nn.Linear:
            module.forward = MethodType(_project, module)  # type: ignore[method-assign]


def order(model: nn.Module) -> None:
    """In single precision on processors without bfloat16, convolutions are a sixth faster with channels last; newer ones are slower so."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _convolve(self: nn.Conv2d, x: Tensor) -> Tensor:
    if not _fits(self.weight, x):
        return nn.Conv2d.forward(self, x)
    shape = [list(cast(tuple[int, ...], n)) for n in (self.padding, self.stride, self.dilation)]
    key = _key(self.weight)
    kept = _laid_out.get(self)
    if kept is None or kept[0] != key:
        kept = key, torch.ops.mkldnn._reorder_convolution_weight(self.weight.data, *shape, self.groups, list(x.shape))
        _laid_out[self] = kept
    out = torch.ops.mkldnn._convolution_pointwise(x, kept[1], self.bias, *shape, self.groups, "none", [], "")
    return cast(Tensor, out.contiguous())  # it comes with channels last, in which group_norm is ten times slower


def _project(self: nn.Linear, x: Tensor) -> Tensor:
    if not _fits(self.weight, x):
        return nn.Linear.forward(self, x)
    key = _key(self.weight)
    kept = _laid_out.get(self)
    if kept is None or kept[0] != key:
        kept = key, torch.ops.mkldnn._reorder_linear_weight(self.weight.data, x.numel() // x.shape[-1])
        _laid_out[self] = kept
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, kept[1], self.bias, "none", [], ""))


def _fits(weight: Tensor, x: Tensor) -> bool:
    if torch.is_grad_enabled() or weight.is_inference():
        return False
    return x.dtype == weight.dtype == torch.bfloat16 and x.device.type == weight.device.type == "cpu" and x.numel() > 0


def _key(weight: Tensor) -> tuple[int, int]:
    return weight.data_ptr(), weight._version
