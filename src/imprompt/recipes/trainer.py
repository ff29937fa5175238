"""One resumable training loop for every part of mini.

The loss draws its own batch from the step number alone, so a step is the only position there is to remember:
a run that was killed continues as if it had not been.
"""

import math
import time
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from imprompt.core.optim import Muon, precision, without_gradient
from imprompt.utils.files import atomic_path


@dataclass(frozen=True)
class Plan:
    """How one part is trained."""

    name: str
    steps: int
    batch: int
    lr: float
    warmup: int = 200
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float | None = None  # decay; None keeps the last weights
    muon: float | None = None  # learning rate of Muon, which then trains all large matrices and kernels

    def rate(self, step: int) -> float:
        """Share of the learning rate: linear warm-up, then half a cosine to zero."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        return 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / max(1, self.steps - self.warmup)))

    def scaled(self, budget: float) -> "Plan":
        """A share of the steps, and a warm-up that fits into them."""
        steps = max(2, round(self.steps * budget))
        return replace(self, steps=steps, warmup=min(self.warmup, max(1, steps // 4)))


def fit(
    plan: Plan,
    module: nn.Module,
    loss: Callable[[int], Tensor],
    folder: Path,
    report: Callable[[int, int, float], None],
    save_seconds: float = 150,
    heard_from: int = 1,
) -> None:
    """Train the parameters of `module` that require a gradient; the best weights (EMA where asked) end up in it.

    `loss(step)` draws its batch from the step. State goes to `folder/NAME.pt` every `save_seconds`, atomically, and
    is picked up from there. `report(step, steps, loss)` is called about twice a second. After step `heard_from` every tensor must
    have received a gradient: a ControlNet's reach its inside only once its zero convolutions have moved.
    """
    path = folder / f"{plan.name}.pt"
    parameters = [p for p in module.parameters() if p.requires_grad]
    device = parameters[0].device
    optimisers = _Optimisers(plan, parameters)
    average = EMAModel(parameters, decay=plan.ema, foreach=True) if plan.ema else None
    step, smooth = 0, math.nan
    if path.exists():
        state = torch.load(path, map_location=device, weights_only=True)
        step, smooth = state["step"], state["smooth"]
        module.load_state_dict(state["module"])
        optimisers.load_state_dict(state["optimiser"])
        if average:
            average.load_state_dict(state["average"])

    def save() -> None:
        state = {"step": step, "smooth": smooth, "module": module.state_dict(), "optimiser": optimisers.state_dict()}
        with atomic_path(path) as partial:
            torch.save(state | ({"average": average.state_dict()} if average else {}), partial)

    taken = 0
    saved = shown = time.monotonic()
    quick = precision(device) is torch.bfloat16  # emulated, it is far slower than single precision
    low = torch.autocast(device.type, torch.bfloat16) if quick else nullcontext()
    while step < plan.steps:
        with low:
            value = loss(step)
        value.backward()
        taken += 1
        if taken == heard_from:
            _check_gradients(module)
        norm = nn.utils.clip_grad_norm_(parameters, plan.clip)
        if torch.isfinite(norm):
            optimisers.step(plan.rate(step))
            if average:
                average.step(parameters)
        module.zero_grad(set_to_none=True)
        step += 1
        now = time.monotonic()
        if now - shown > 0.5 or step == plan.steps:
            smooth = value.item() if math.isnan(smooth) else 0.98 * smooth + 0.02 * value.item()
            report(step, plan.steps, smooth)
            shown = now
        if now - saved > save_seconds:
            save()
            saved = now
    save()
    if average:
        average.copy_to(parameters)


def _check_gradients(module: nn.Module) -> None:
    """Raise where a part of the model is cut off from the loss: it would stay as it began, and nothing would tell.

    (torch.compile did that to everything below an upsampler, on CPU, under autocast: docs/log.md.)
    """
    dead = without_gradient(module)
    if dead:
        raise RuntimeError(f"{len(dead)} tensors receive no gradient, {dead[0]} among them: they would not be trained")


class _Optimisers:
    """AdamW for everything; or, where the plan asks, Muon for matrices and kernels and AdamW for the rest.

    Muon (Jordan et al., 2024) takes a matrix, so kernels are seen through flat views of their memory. What reads or writes a
    few channels stays with AdamW.
    """

    def __init__(self, plan: Plan, parameters: list[nn.Parameter]):
        large = [p for p in parameters if plan.muon and p.ndim >= 2 and min(p.shape[:2]) > 8]
        chosen = set(map(id, large))
        small = [p for p in parameters if id(p) not in chosen]
        self._views = [(p, nn.Parameter(p.data.flatten(1))) for p in large]
        self._all: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(small, lr=plan.lr, weight_decay=plan.weight_decay, betas=(0.9, 0.99), fused=True)
        ]
        if plan.muon:
            flat = [view for _, view in self._views]
            self._all.append(Muon(flat, lr=plan.muon, weight_decay=0.1))
        self._rates = [plan.lr, plan.muon or 0.0]

    def step(self, share: float) -> None:
        """One step at this share of the learning rates."""
        for parameter, view in self._views:
            view.grad = None if parameter.grad is None else parameter.grad.flatten(1)
        for optimiser, rate in zip(self._all, self._rates, strict=False):
            for group in optimiser.param_groups:
                group["lr"] = rate * share
            optimiser.step()

    def state_dict(self) -> list[dict[str, Any]]:
        return [optimiser.state_dict() for optimiser in self._all]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        for optimiser, state in zip(self._all, states, strict=True):
            optimiser.load_state_dict(state)


def generator(name: str, step: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The random numbers of one step of one part."""
    return torch.Generator(device).manual_seed(zlib.crc32(name.encode()) * 10_000_000 + step)
