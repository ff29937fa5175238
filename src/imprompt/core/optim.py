"""The Muon optimizer, the schedule of the learning rate, and a check that every trainable parameter receives a gradient."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from imprompt.utils.compat import cpu_supports_bfloat16


class Muon(torch.optim.Muon):
    """Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon), for matrices of equal shape in one batch.

    Takes the steps of `torch.optim.Muon(…, adjust_lr_fn="match_rms_adamw")` up to rounding, and has the same state.
    """

    def __init__(self, params: Iterable[nn.Parameter] | Iterable[dict[str, Any]], lr: float, weight_decay: float):
        super().__init__(params, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One optimizer step. Parameters without a gradient stay as they are. Returns the loss of the closure, if any."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            by_shape: dict[tuple[torch.Size, torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape, p.device, p.grad.dtype].append(p)
            for parameters in by_shape.values():
                self._update_parameters(parameters, group)
        return loss

    def _update_parameters(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Nesterov momentum, orthogonalization and the scaling to AdamW's RMS (Liu et al., 2025, arXiv:2502.16982, equation 4)."""
        momentum = group["momentum"]
        updates = []
        for p in parameters:
            assert p.grad is not None
            state = self.state[p]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p.grad)
            state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
            updates.append(p.grad.lerp(state["momentum_buffer"], momentum))
        orthogonal = newton_schulz(torch.stack(updates), group["ns_coefficients"], group["ns_steps"], group["eps"])
        rms_scale = 0.2 * math.sqrt(max(parameters[0].shape))
        for p, update in zip(parameters, orthogonal, strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * rms_scale)


def newton_schulz(
    x: Float[Tensor, "matrices rows columns"], coefficients: tuple[float, float, float], steps: int, eps: float
) -> Float[Tensor, "matrices rows columns"]:
    """Newton–Schulz iteration X ← aX + (bXXᵀ + c(XXᵀ)²)X: of each matrix USVᵀ approximately UVᵀ (Jordan et al., 2024)."""
    a, b, c = coefficients
    is_tall = x.shape[1] > x.shape[2]
    x = x.mT if is_tall else x
    x = x.to(select_compute_dtype(x.device)).contiguous()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def select_compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device computes faster in it, otherwise float32."""
    is_fast = device.type == "cuda" or (device.type == "cpu" and cpu_supports_bfloat16())
    return torch.bfloat16 if is_fast else torch.float32


def parameters_without_grad(module: nn.Module) -> list[str]:
    """The names of the trainable parameters that received no gradient, or only zeros, in the last backward pass."""
    return [name for name, p in module.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]


def check_gradients(module: nn.Module, error: type[Exception] = RuntimeError) -> None:
    """After a backward pass: raise `error` where a trainable parameter received no gradient, because it would silently stay untrained.

    (torch.compile cut off everything below an upsampler, on CPU, under autocast: docs/log.md.)
    """
    if names := parameters_without_grad(module):
        raise error(f"{len(names)} tensors receive no gradient, {names[0]} among them: the loss does not depend on them")


def lr_multiplier(step: int, num_steps: int, warmup_steps: int, schedule: str) -> float:
    """Fraction of the learning rate at a step: linear warm-up, then constant, linear or cosine (half a period) down to 0.

    As diffusers' `get_scheduler`, but the first step of the warm-up has 1 / warmup_steps instead of 0.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    match schedule:
        case "constant":
            return 1.0
        case "linear":
            return 1 - progress
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
    raise ValueError(f"unknown schedule {schedule!r}; expected constant, linear or cosine")
