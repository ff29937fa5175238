"""The training loop: a generator of optimizer steps on top of Accelerate. Logs are written by whoever consumes the steps."""

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType, InitProcessGroupKwargs
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from imprompt.config.training import LossConfig, OptimizationConfig, RuntimeConfig, ValidationConfig
from imprompt.core.optim import Muon, lr_multiplier
from imprompt.data.loader import Loader
from imprompt.errors import UserError
from imprompt.models.base_pipelines import resolve_mixed_precision, set_device
from imprompt.training.checkpointing import CheckpointManager
from imprompt.training.objective import compute_loss
from imprompt.training.setup import TrainingContext
from imprompt.training.validation import ValidationResult, Validator
from imprompt.training.zero import get_zero_state, never_compile_deepspeed_ops, set_zero_state
from imprompt.utils.compat import reset_accelerate_state

PROCESS_GROUP_TIMEOUT = timedelta(hours=12)  # a process may wait this long for another one that still fills the feature cache
_DIVERGED_REMEDY = "nothing was saved since the last state; start anew with a smaller --learning-rate, or look for bad values in the data"
MAX_NONFINITE_STEPS = 25  # in a row; the scaler of float16 needs about 16 to find its scale


@dataclass
class TrainState:
    """The counters of a run, saved with its state."""

    step: int = 0  # optimizer steps taken
    nonfinite_steps: int = 0
    best_validation_loss: float = math.inf


@dataclass(frozen=True)
class TrainStep:
    """The result of one optimizer step."""

    index: int  # optimizer steps taken so far, this one included
    max_train_steps: int
    loss: float  # mean over all batches and processes
    lr: float
    grad_norm: float  # before clipping
    images_per_second: float  # since the run was started or resumed
    nonfinite_steps: int  # steps so far that did not change the weights, because a gradient was not finite
    unreadable: int  # records skipped so far, because they could not be read
    validation: ValidationResult | None  # where this step was validated
    adapter_path: Path | None  # where this step was saved


def run_training_loop(
    context: TrainingContext,
    trainer: "Trainer",
    checkpoints: CheckpointManager,
    config: ValidationConfig,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[TrainStep]:
    """Train a run to its last step and yield every optimizer step; validate and save in between.

    Where `should_stop()` is true in any of the processes, the state is saved after the step, and the iterator ends. Raises
    UserError where the loss or the weights are not finite.
    """
    accelerator, state = trainer.accelerator, trainer.state
    validator = Validator(context, config) if context.validation_set.prompts and accelerator.is_main_process else None
    start_time, first_step = time.monotonic(), state.step
    try:
        while not trainer.is_finished and not trainer.is_stopped:
            loss, lr, grad_norm = trainer.take_step(should_stop)
            validation, adapter_path = _validate_and_save(trainer, checkpoints, validator, config.validation_steps)
            images_per_second = (state.step - first_step) * trainer.images_per_step / (time.monotonic() - start_time)
            step = TrainStep(
                state.step, trainer.max_steps, loss, lr, grad_norm, images_per_second, state.nonfinite_steps,
                context.loader.error_budget.failed, validation, adapter_path,
            )  # fmt: skip
            log_to_trackers(accelerator, step)
            yield step
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()


class Trainer:
    """What changes during a run: the weights in float32, their moving average, the optimizers and the counters."""

    def __init__(self, accelerator: Accelerator, context: TrainingContext, optimization: OptimizationConfig, loss: LossConfig):
        self.accelerator, self.context, self.optimization, self.loss_config = accelerator, context, optimization, loss
        self.state = TrainState()
        self.module = context.method.module.float().train()  # `method.module` may be wrapped from here on
        _check_optimizer(optimization.optimizer, accelerator)
        optimizers = make_optimizers(optimization, self.module)
        context.method.module, *self.optimizers = accelerator.prepare(self.module, *optimizers)
        decay = optimization.ema_decay
        self.ema = EMAModel(self.module.parameters(), decay=decay, foreach=True) if decay else None
        self.is_stopped = False
        self._loss, self._nonfinite_in_a_row = 0.0, 0  # of the last step; steps
        self.max_steps = optimization.max_train_steps
        images_per_batch = optimization.train_batch_size * accelerator.num_processes
        self.images_per_step = images_per_batch * optimization.gradient_accumulation_steps
        self._batches = context.batches()

    @property
    def is_finished(self) -> bool:
        """Whether the last step has been taken."""
        return self.state.step >= self.max_steps

    @property
    def loader(self) -> Loader[Any]:
        """The batches of this process."""
        return self.context.loader

    @property
    def is_sharded(self) -> bool:
        """Whether each process has its own part of the optimizer: DeepSpeed ZeRO-2."""
        return self.accelerator.distributed_type == DistributedType.DEEPSPEED

    def state_dict(self) -> dict[str, Any]:
        """What all processes share: counters, weights, moving average, and optimizers without their options, which may change."""
        scaler = self.accelerator.scaler
        return {
            "counters": asdict(self.state),
            "module": self.module.state_dict(),
            "optimizers": [] if self.is_sharded else [optimizer.state_dict()["state"] for optimizer in self.optimizers],
            "ema": self.ema.state_dict() if self.ema else None,
            "scaler": scaler.state_dict() if scaler else None,
        }

    def sharded_state_dict(self) -> dict[str, Any] | None:
        """What only this process has of the optimizer; None unless it is sharded."""
        return get_zero_state(self.optimizers[0].optimizer) if self.is_sharded else None

    def load_state_dict(self, state: Mapping[str, Any], sharded: Mapping[str, Any] | None) -> None:
        """Continue from `state_dict()` and `sharded_state_dict()`."""
        self.module.load_state_dict(state["module"])
        if sharded is not None:
            set_zero_state(self.optimizers[0].optimizer, sharded)
        else:
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict({"state": saved, "param_groups": optimizer.state_dict()["param_groups"]})
        if self.ema:
            self.ema.load_state_dict(state["ema"])
            self.ema.to(self.accelerator.device)
        if self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        for name, value in state["counters"].items():
            setattr(self.state, name, value)

    def take_step(self, should_stop: Callable[[], bool] = lambda: False) -> tuple[float, float, float]:
        """One optimizer step: the mean loss over all batches and processes, the learning rate, and the norm of the gradient."""
        config, state = self.optimization, self.state
        lr = config.learning_rate * lr_multiplier(state.step, config.max_train_steps, config.lr_warmup_steps, config.lr_scheduler)
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = lr
        loss, grad_norm = torch.zeros((), device=self.accelerator.device), 0.0
        for _ in range(config.gradient_accumulation_steps):
            batch_loss, grad_norm = self._train_on_batch()
            loss += batch_loss / config.gradient_accumulation_steps
        state.step += 1
        state.nonfinite_steps += not math.isfinite(grad_norm)
        if self.ema:
            self.ema.step(self.module.parameters())
        stop = torch.full_like(loss, should_stop())  # all processes stop after the same step
        self._loss, stopping = self.accelerator.reduce(torch.stack([loss, stop]), "mean").tolist()
        self.is_stopped = stopping > 0
        self._count_nonfinite(grad_norm, lr)
        return self._loss, lr, grad_norm

    def _count_nonfinite(self, grad_norm: float, lr: float) -> None:
        """Raise UserError after too many steps in a row without a finite loss and gradient."""
        is_finite = math.isfinite(self._loss) and math.isfinite(grad_norm)
        self._nonfinite_in_a_row = 0 if is_finite else self._nonfinite_in_a_row + 1
        if self._nonfinite_in_a_row >= MAX_NONFINITE_STEPS:
            raise UserError(
                f"training has diverged: loss {self._loss:g}, gradient norm {grad_norm:g} at step {self.state.step}, "
                f"not finite for {MAX_NONFINITE_STEPS} steps; {_DIVERGED_REMEDY}"
            )

    def check_finite(self, validation_loss: float | None = None) -> None:
        """Raise UserError before anything is saved where the last loss, the validation loss or a weight is not finite."""
        losses = {"loss": self._loss} | ({} if validation_loss is None else {"validation loss": validation_loss})
        for name, value in losses.items():
            if not math.isfinite(value):
                raise UserError(f"training has diverged: the {name} is {value:g} at step {self.state.step}; {_DIVERGED_REMEDY}")
        if not all(parameter.isfinite().all() for parameter in self.module.parameters()):
            raise UserError(f"training has diverged: weights are not finite at step {self.state.step}; {_DIVERGED_REMEDY}")

    def _train_on_batch(self) -> tuple[Tensor, float]:
        """The loss of a batch, and the norm of the gradient where the batch completes an optimizer step."""
        accelerator, context, method = self.accelerator, self.context, self.context.method
        batch, grad_norm = next(self._batches), 0.0
        with accelerator.accumulate(method.module):
            with accelerator.autocast():
                loss = compute_loss(method, context.unet, context.noise_schedule, batch, context.uncond, self.loss_config).mean()
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                grad_norm = clip_gradients(accelerator, method.module, self.optimization.max_grad_norm)
            for optimizer in self.optimizers:
                if math.isfinite(grad_norm) or accelerator.scaler is not None:  # a gradient scaler skips such a step itself
                    optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        return loss.detach(), grad_norm

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Within the context the module has its averaged weights."""
        if self.ema is None:
            yield
            return
        parameters = list(self.module.parameters())
        self.ema.store(parameters)
        self.ema.copy_to(parameters)
        try:
            yield
        finally:
            self.ema.restore(parameters)


def _validate_and_save(
    trainer: Trainer, checkpoints: CheckpointManager, validator: Validator | None, validation_steps: int
) -> tuple[ValidationResult | None, Path | None]:
    """After the steps at which it is due: the result of the validation, and the path of the adapter."""
    step, result, adapter_path = trainer.state.step, None, None
    validates, saves = (trainer.is_finished or step % every == 0 for every in (validation_steps, checkpoints.steps))
    saves = saves or trainer.is_stopped
    if not validates and not saves:
        return None, None
    trainer.check_finite()
    with trainer.ema_weights():
        if validator and validates:
            result = validator.validate()
            trainer.check_finite(result.metrics["val/loss"])
        if saves:
            adapter_path = checkpoints.save_adapter(trainer.module, step)
        if result and not trainer.context.validation_set.is_test_split:  # nothing may be selected on test subjects
            checkpoints.save_if_best(trainer.module, result.metrics["val/loss"])
    if saves:
        checkpoints.save_state()
    return result, adapter_path


def make_accelerator(device: str, runtime: RuntimeConfig, optimization: OptimizationConfig, output_dir: str) -> Accelerator:
    """Set up the device, the processes, the precision and the tracker. Raises UserError for a library that is not installed."""
    device = set_device(device)
    deepspeed = _deepspeed_plugin(device, optimization) if runtime.deepspeed else None
    dtype = resolve_mixed_precision(runtime.mixed_precision, torch.device(device).type)
    if runtime.report_to and find_spec(runtime.report_to) is None:
        raise UserError(f"{runtime.report_to} is not installed; install it with: pip install {runtime.report_to}")
    reset_accelerate_state()
    return Accelerator(
        cpu=device == "cpu" and deepspeed is None,
        mixed_precision={torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype],
        gradient_accumulation_steps=optimization.gradient_accumulation_steps,
        deepspeed_plugin=deepspeed,
        step_scheduler_with_optimizer=False,
        log_with=runtime.report_to or None,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PROCESS_GROUP_TIMEOUT)],
        project_dir=output_dir,
    )


def _deepspeed_plugin(device: str, optimization: OptimizationConfig) -> DeepSpeedPlugin:
    """ZeRO-2: optimizer states and gradients are sharded among the processes."""
    if find_spec("deepspeed") is None:
        raise UserError("DeepSpeed is not installed; install it with: pip install 'imprompt[deepspeed]'")
    never_compile_deepspeed_ops()
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"  # the only place where Accelerate looks before it sets up the processes
    if device == "cpu":
        os.environ |= {"DS_ACCELERATOR": "cpu", "ACCELERATE_TORCH_DEVICE": "cpu"}
        PartialState(cpu=True, timeout=PROCESS_GROUP_TIMEOUT)  # Accelerate joins CPU processes and takes a plugin, but not in one call
    accumulation, max_norm = optimization.gradient_accumulation_steps, optimization.max_grad_norm or None
    plugin = DeepSpeedPlugin(zero_stage=2, gradient_accumulation_steps=accumulation, gradient_clipping=max_norm)
    plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = optimization.train_batch_size
    return plugin


def start_trackers(accelerator: Accelerator, output_dir: str, options: Mapping[str, Any]) -> None:
    """Tell TensorBoard or W&B, where one was asked for, about a new run and its options."""
    if accelerator.log_with:
        config = {name: value for name, value in options.items() if isinstance(value, (int, float, str))}
        accelerator.init_trackers("tracker", config=config, init_kwargs={"wandb": {"dir": output_dir, "name": Path(output_dir).name}})


def log_to_trackers(accelerator: Accelerator, step: TrainStep) -> None:
    """Send a step to TensorBoard or W&B, if one is in use."""
    if not accelerator.trackers:
        return
    values = {"loss": step.loss, "lr": step.lr, "grad_norm": step.grad_norm, "images_per_second": step.images_per_second}
    accelerator.log(values | (step.validation.metrics if step.validation else {}), step=step.index)
    if step.validation is None:
        return
    grid = step.validation.sample_grid
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({"samples": np.asarray(grid)[None]}, step=step.index, dataformats="NHWC")
        else:
            tracker.log_images({"samples": [grid]}, step=step.index)


def make_optimizers(config: OptimizationConfig, module: nn.Module) -> list[torch.optim.Optimizer]:
    """AdamW as in IP-Adapter (Ye et al., 2023, arXiv:2308.06721, section 4.1.2), in 8 bits on request; or Muon (Jordan et al., 2024).

    Muon updates the matrices, with steps as large as AdamW's would be, and AdamW everything else.
    """
    settings: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    parameters = list(module.parameters())
    if config.optimizer == "adamw8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise UserError("adamw8bit needs bitsandbytes; install it with: pip install 'imprompt[8bit]'") from error
        return [AdamW8bit(parameters, **settings)]
    if config.optimizer == "muon":
        matrices = [p for p in parameters if p.ndim == 2]
        others = [p for p in parameters if p.ndim != 2]
        optimizers: list[torch.optim.Optimizer] = [Muon(matrices, **settings)] if matrices else []
        return optimizers + ([torch.optim.AdamW(others, fused=True, betas=(0.9, 0.99), **settings)] if others else [])
    return [torch.optim.AdamW(parameters, fused=True, **settings)]


def _check_optimizer(optimizer: str, accelerator: Accelerator) -> None:
    is_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    if optimizer == "muon" and (accelerator.mixed_precision == "fp16" or is_deepspeed):
        raise UserError(
            "muon trains in bfloat16 or float32, and not under DeepSpeed; choose another --mixed-precision, or --optimizer adamw"
        )


def clip_gradients(accelerator: Accelerator, module: nn.Module, max_norm: float) -> float:
    """Clip the gradient to `max_norm`, 0 for no clipping. The norm before clipping; 0 under DeepSpeed, which clips by itself."""
    norm = accelerator.clip_grad_norm_(module.parameters(), max_norm or math.inf)
    return 0.0 if norm is None else float(norm)
