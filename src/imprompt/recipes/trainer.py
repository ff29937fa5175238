"""One resumable training loop for every part of mini.

The loss samples its batch from the step number alone, so the step is the only position in a checkpoint: a run that was
killed continues as if it had not been.
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

from imprompt.core.optim import Muon, check_gradients, lr_multiplier, select_compute_dtype
from imprompt.utils.files import atomic_path


@dataclass(frozen=True)
class TrainPlan:
    """Steps, batch size and optimizer settings of one part."""

    name: str
    steps: int
    batch_size: int
    lr: float
    warmup_steps: int = 200
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    ema_decay: float | None = None  # decay; None keeps the last weights
    muon_lr: float | None = None  # learning rate of Muon, which then trains all large matrices and kernels

    def compute_lr_multiplier(self, step: int) -> float:
        """Multiplier of the learning rate: linear warm-up, then half a cosine to zero."""
        return lr_multiplier(step, self.steps, self.warmup_steps, "cosine")

    def scale_steps(self, budget: float) -> "TrainPlan":
        """A copy with a fraction of the steps, and a warm-up that fits into them."""
        steps = max(2, round(self.steps * budget))
        return replace(self, steps=steps, warmup_steps=min(self.warmup_steps, max(1, steps // 4)))


def train_module(
    plan: TrainPlan,
    module: nn.Module,
    compute_loss: Callable[[int], Tensor],
    folder: Path,
    on_progress: Callable[[int, int, float], None],
    save_seconds: float = 150,
    check_gradients_after: int = 1,
) -> None:
    """Train the parameters of `module` that require a gradient; it ends with the last weights, or their moving average.

    `compute_loss(step)` samples its batch from the step. A checkpoint is written to `folder/NAME.pt` every `save_seconds`
    seconds, atomically, and resumed from there. `on_progress(step, steps, loss)` is called about twice a second. After
    `check_gradients_after` steps every tensor must have received a gradient: those inside a ControlNet receive one only
    once its zero convolutions have moved.
    """
    run = _Run(plan, module)
    path = folder / f"{plan.name}.pt"
    if path.exists():
        run.load(path)
    first_step, saved, reported = run.step, time.monotonic(), time.monotonic()
    while run.step < plan.steps:
        loss = run.backward(compute_loss)
        if run.step - first_step + 1 == check_gradients_after:
            check_gradients(module)
        run.update()
        now = time.monotonic()
        if now - reported > 0.5 or run.step == plan.steps:
            run.smooth_loss = loss.item() if math.isnan(run.smooth_loss) else 0.98 * run.smooth_loss + 0.02 * loss.item()
            on_progress(run.step, plan.steps, run.smooth_loss)
            reported = now
        if now - saved > save_seconds:
            run.save(path)
            saved = now
    run.save(path)
    if run.average:
        run.average.copy_to(run.parameters)


class _Run:
    """The state of a training run, and one step of it."""

    def __init__(self, plan: TrainPlan, module: nn.Module):
        self.plan, self.module, self.step, self.smooth_loss = plan, module, 0, math.nan
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.device = self.parameters[0].device
        self.optimizers = _Optimizers(plan, self.parameters)
        self.average = EMAModel(self.parameters, decay=plan.ema_decay, foreach=True) if plan.ema_decay else None
        use_bfloat16 = select_compute_dtype(self.device) is torch.bfloat16  # where it is emulated, it is far slower than float32
        self._autocast = torch.autocast(self.device.type, torch.bfloat16) if use_bfloat16 else nullcontext()

    def backward(self, compute_loss: Callable[[int], Tensor]) -> Tensor:
        """The loss of this step, whose gradients are computed."""
        with self._autocast:
            loss = compute_loss(self.step)
        loss.backward()
        return loss

    def update(self) -> None:
        """Change the weights, unless a gradient is not finite."""
        norm = nn.utils.clip_grad_norm_(self.parameters, self.plan.max_grad_norm)
        if torch.isfinite(norm):
            self.optimizers.step(self.plan.compute_lr_multiplier(self.step))
            if self.average:
                self.average.step(self.parameters)
        self.module.zero_grad(set_to_none=True)
        self.step += 1

    def save(self, path: Path) -> None:
        state = {"step": self.step, "smooth_loss": self.smooth_loss, "module": self.module.state_dict()}
        state |= {"optimizer": self.optimizers.state_dict()} | ({"average": self.average.state_dict()} if self.average else {})
        with atomic_path(path) as partial:
            torch.save(state, partial)

    def load(self, path: Path) -> None:
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.step, self.smooth_loss = state["step"], state["smooth_loss"]
        self.module.load_state_dict(state["module"])
        self.optimizers.load_state_dict(state["optimizer"])
        if self.average:
            self.average.load_state_dict(state["average"])


class _Optimizers:
    """AdamW for everything; or, where the plan has a learning rate for it, Muon for matrices and kernels and AdamW for the rest.

    Muon (Jordan et al., 2024) takes a matrix, so kernels are flattened to views of their memory. Layers with few input or
    output channels stay with AdamW.
    """

    def __init__(self, plan: TrainPlan, parameters: list[nn.Parameter]):
        large = [p for p in parameters if plan.muon_lr and p.ndim >= 2 and min(p.shape[:2]) > 8]
        chosen = set(map(id, large))
        small = [p for p in parameters if id(p) not in chosen]
        self._views = [(p, nn.Parameter(p.data.flatten(1))) for p in large]
        self._all: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(small, lr=plan.lr, weight_decay=plan.weight_decay, betas=(0.9, 0.99), fused=True)
        ]
        if plan.muon_lr:
            flat = [view for _, view in self._views]
            self._all.append(Muon(flat, lr=plan.muon_lr, weight_decay=0.1))
        self._rates = [plan.lr, plan.muon_lr or 0.0]

    def step(self, lr_multiplier: float) -> None:
        """One step at the learning rates times this multiplier."""
        for parameter, view in self._views:
            view.grad = None if parameter.grad is None else parameter.grad.flatten(1)
        for optimizer, rate in zip(self._all, self._rates, strict=False):
            for group in optimizer.param_groups:
                group["lr"] = rate * lr_multiplier
            optimizer.step()

    def state_dict(self) -> list[dict[str, Any]]:
        return [optimizer.state_dict() for optimizer in self._all]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        for optimizer, state in zip(self._all, states, strict=True):
            optimizer.load_state_dict(state)


def make_step_generator(name: str, step: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The random generator of one step of one part."""
    return torch.Generator(device).manual_seed(zlib.crc32(name.encode()) * 10_000_000 + step)
