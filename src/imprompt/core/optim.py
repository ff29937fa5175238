"""The Muon optimizer, and a check that every trainable tensor receives a gradient."""

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Muon(torch.optim.Muon):
    """The same steps as `torch.optim.Muon(…, adjust_lr_fn="match_rms_adamw")`, up to rounding, and the same state."""

    def __init__(self, params: Any, lr: float, weight_decay: float):
        super().__init__(params, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            alike: dict[Any, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    alike[p.shape, p.device, p.grad.dtype].append(p)
            for parameters in alike.values():
                self._step(parameters, group)
        return loss

    def _step(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        momentum = group["momentum"]
        updates = []
        for p in parameters:
            assert p.grad is not None
            state = self.state[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p.grad)
            state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
            updates.append(p.grad.lerp(state["momentum_buffer"], momentum))
        found = orthogonal(torch.stack(updates), group["ns_coefficients"], group["ns_steps"], group["eps"])
        far = 0.2 * math.sqrt(max(parameters[0].shape))
        for p, update in zip(parameters, found, strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * far)


def orthogonal(x: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Newton–Schulz: of each matrix USVᵀ about UVᵀ. (matrices, rows, columns); a row of iterations for all of them together."""
    a, b, c = coefficients
    turned = x.shape[1] > x.shape[2]
    x = x.mT if turned else x
    x = x.to(precision(x.device)).contiguous()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if turned else x


def precision(device: torch.device) -> torch.dtype:
    """bfloat16 where it is quick."""
    quick = device.type == "cuda" or (device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return torch.bfloat16 if quick else torch.float32


def without_gradient(module: nn.Module) -> list[str]:
    """After a backward pass: the names of the trainable tensors that received nothing. They would stay as they began."""
    return [name for name, p in module.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
