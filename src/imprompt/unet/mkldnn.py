"""Weights in oneDNN's blocked layout, converted once instead of in every call.

In half precision on CPU, oneDNN reorders the weight of every convolution and linear layer in each call; for a model as small as mini
this takes a tenth of a generation. The operators are those that torch's own compiler uses.
"""

from types import MethodType
from typing import cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from imprompt.utils.compat import (
    ConvGeometry,
    cpu_supports_bfloat16,
    has_prepacking_ops,
    mkldnn_conv2d,
    mkldnn_linear,
    reorder_conv_weight,
    reorder_linear_weight,
    tensor_version,
)

WeightId = tuple[int, int]  # address and version of a weight: another one after any change
_packed_weights: "WeakKeyDictionary[nn.Module, tuple[WeightId, Tensor]]" = WeakKeyDictionary()


def prepack_weights(model: nn.Module) -> None:
    """Let the convolutions and linear layers of a frozen model keep their weights in oneDNN's layout.

    With gradients, in another dtype or on another device they compute as before; a weight that has changed is converted again.
    """
    if not has_prepacking_ops():
        return
    for module in model.modules():
        if type(module) is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str):
            module.forward = MethodType(_conv2d_forward, module)  # type: ignore[method-assign]
        elif type(module) is nn.Linear:
            module.forward = MethodType(_linear_forward, module)  # type: ignore[method-assign]


def to_channels_last_if_faster(model: nn.Module) -> None:
    """Convert to channels last on processors without bfloat16: float32 convolutions are a sixth faster there, and slower on others."""
    if not cpu_supports_bfloat16():
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _conv2d_forward(self: nn.Conv2d, x: Tensor) -> Tensor:
    if not _can_use_packed(self.weight, x):
        return nn.Conv2d.forward(self, x)
    padding, stride, dilation = (list(cast(tuple[int, ...], n)) for n in (self.padding, self.stride, self.dilation))
    geometry: ConvGeometry = (padding, stride, dilation, self.groups)
    weight = _cached_weight(self)
    if weight is None:
        weight = _store_weight(self, reorder_conv_weight(self.weight.data, geometry, x.shape))
    # The output is channels last, in which group_norm is ten times slower.
    return mkldnn_conv2d(x, weight, self.bias, geometry).contiguous()


def _linear_forward(self: nn.Linear, x: Tensor) -> Tensor:
    if not _can_use_packed(self.weight, x):
        return nn.Linear.forward(self, x)
    weight = _cached_weight(self)
    if weight is None:
        weight = _store_weight(self, reorder_linear_weight(self.weight.data, x.numel() // x.shape[-1]))
    return mkldnn_linear(x, weight, self.bias)


def _can_use_packed(weight: Tensor, x: Tensor) -> bool:
    if torch.is_grad_enabled() or weight.is_inference():
        return False
    return x.dtype == weight.dtype == torch.bfloat16 and x.device.type == weight.device.type == "cpu" and x.numel() > 0


def _cached_weight(layer: nn.Conv2d | nn.Linear) -> Tensor | None:
    weight_id, weight = _packed_weights.get(layer, (None, None))
    return weight if weight_id == _weight_id(layer.weight) else None


def _store_weight(layer: nn.Conv2d | nn.Linear, packed: Tensor) -> Tensor:
    _packed_weights[layer] = _weight_id(layer.weight), packed
    return packed


def _weight_id(weight: Tensor) -> WeightId:
    return weight.data_ptr(), tensor_version(weight)
