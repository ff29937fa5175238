"""The loop: a generator of steps over Accelerate. Whoever wants a log takes it from there."""

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs
from diffusers.training_utils import EMAModel
from torch import nn

from imprompt.config import Train
from imprompt.core.optim import Muon
from imprompt.errors import UserError
from imprompt.models.base_pipelines import claim_device, pick_precision
from imprompt.training.checkpointing import Keeper, Memory
from imprompt.training.objective import Objective, losses
from imprompt.training.setup import Setting
from imprompt.training.validation import Examiner, Findings

PATIENCE = timedelta(hours=12)  # how long a process waits for another that still fills the cache


@dataclass(frozen=True)
class Step:
    """What one optimiser step was like."""

    index: int  # steps done
    steps: int
    loss: float  # mean over all processes
    lr: float
    norm: float  # of the gradient, before clipping
    images_per_second: float  # since the run was begun or continued
    skipped: int  # steps left out so far because a number was not finite
    unreadable: int  # records left out so far
    findings: Findings | None  # of an examination at this step
    saved: Path | None  # the adapter's file, where one was written


def loop(choice: Train, accelerator: Accelerator, setting: Setting) -> Iterator[Step]:
    """From batch to step."""
    method, memory = setting.method, Memory()
    bare = method.module.float().train()
    method.module, *optimisers = accelerator.prepare(bare, *optimisers_of(choice, bare))
    average = EMAModel(bare.parameters(), decay=choice.ema, foreach=True) if choice.ema else None
    accelerator.register_for_checkpointing(memory, *([average] if average else []))
    keeper = Keeper(choice, accelerator, setting)
    if choice.resume == "auto":
        keeper.resume()
    else:
        keeper.clear()
    if average:
        average.to(accelerator.device)  # a state that was read is on the CPU
    examiner = Examiner(choice, setting) if setting.examined.texts and accelerator.is_main_process else None
    objective = objective_of(choice)
    batches = iter(setting.batches())
    began, before = time.monotonic(), memory.step
    try:
        while memory.step < choice.steps:
            rate = choice.lr * share(memory.step, choice)
            for optimiser in optimisers:
                for group in optimiser.param_groups:
                    group["lr"] = rate
            total, norm = torch.zeros((), device=accelerator.device), 0.0
            for _ in range(choice.accumulate):
                encoded = next(batches)
                with accelerator.accumulate(method.module):
                    with accelerator.autocast():
                        loss = losses(method, setting.unet, setting.schedule, encoded, setting.nulls, objective).mean()
                    accelerator.backward(loss)
                    total += loss.detach() / choice.accumulate
                    if accelerator.sync_gradients:
                        norm = clipped(accelerator, method.module, choice.clip)
                    for optimiser in optimisers:
                        if math.isfinite(norm) or accelerator.scaler is not None:  # a scaler leaves such a step out by itself
                            optimiser.step()
                        optimiser.zero_grad(set_to_none=True)
            memory.step += 1
            memory.skipped += not math.isfinite(norm)
            if average:
                average.step(bare.parameters())
            last = memory.step == choice.steps
            findings = saved = None
            with averaged(average, bare, last or memory.step % choice.validate_every == 0 or memory.step % choice.save_every == 0):
                if examiner and (last or memory.step % choice.validate_every == 0):
                    findings = examiner.examine()
                if last or memory.step % choice.save_every == 0:
                    saved = keeper.adapter(bare, memory.step)
                if findings and not choice.subjects:  # examined on the subjects that are tested on: nothing is chosen by them
                    keeper.best(bare, memory, findings)
            if last or memory.step % choice.save_every == 0:
                keeper.state(memory)
            images = (memory.step - before) * choice.batch * choice.accumulate * accelerator.num_processes
            done = Step(
                memory.step, choice.steps, float(accelerator.reduce(total, "mean")), rate, norm, images / (time.monotonic() - began),
                memory.skipped, setting.skipped.count, findings, saved,
            )  # fmt: skip
            track(accelerator, done)
            yield done
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()


def accelerate(choice: Train) -> Accelerator:
    """Devices, processes and precision."""
    deepspeed = None
    device = claim_device(choice.device)
    if choice.deepspeed:
        if find_spec("deepspeed") is None:
            raise UserError("DeepSpeed is not installed; install it with: pip install 'imprompt[deepspeed]'")
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"  # Accelerate looks here, and nowhere else, before it sets up the processes
        if device == "cpu":
            os.environ |= {"DS_ACCELERATOR": "cpu", "ACCELERATE_TORCH_DEVICE": "cpu"}
            PartialState(cpu=True, timeout=PATIENCE)  # Accelerate joins processes on CPU, and takes DeepSpeed, but not both in one call
        deepspeed = DeepSpeedPlugin(zero_stage=2, gradient_accumulation_steps=choice.accumulate, gradient_clipping=choice.clip or None)
        deepspeed.deepspeed_config["train_micro_batch_size_per_gpu"] = choice.batch
    mixed = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}
    precision = str(pick_precision(choice.precision, torch.device(device).type)).removeprefix("torch.")
    if choice.tracker and find_spec(choice.tracker) is None:
        raise UserError(f"{choice.tracker} is not installed; install it with: pip install {choice.tracker}")
    AcceleratorState._reset_state()  # of an earlier training in this process, perhaps in another precision
    GradientState._reset_state()
    accelerator = Accelerator(
        cpu=device == "cpu" and deepspeed is None,
        mixed_precision=mixed[precision],
        gradient_accumulation_steps=choice.accumulate,
        deepspeed_plugin=deepspeed,
        step_scheduler_with_optimizer=False,
        log_with=choice.tracker or None,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
        project_dir=choice.out,
    )
    if choice.tracker:
        shown = {name: value for name, value in asdict(choice).items() if isinstance(value, (int, float, str))}
        accelerator.init_trackers("tracker", config=shown, init_kwargs={"wandb": {"dir": choice.out, "name": Path(choice.out).name}})
    return accelerator


def track(accelerator: Accelerator, step: Step) -> None:
    """Tell the trackers, if there are any."""
    if not accelerator.trackers:
        return
    figures = {"loss": step.loss, "lr": step.lr, "norm": step.norm, "images_per_second": step.images_per_second}
    accelerator.log(figures | (step.findings.figures if step.findings else {}), step=step.index)
    if step.findings is None:
        return
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({"samples": np.asarray(step.findings.sheet)[None]}, step=step.index, dataformats="NHWC")
        else:
            tracker.log_images({"samples": [step.findings.sheet]}, step=step.index)


def optimisers_of(choice: Train, module: nn.Module) -> list[torch.optim.Optimizer]:
    """AdamW with P1's settings (arXiv:2308.06721, section 4.1.2), in eight bits where asked; or Muon (Jordan et al., 2024).

    Muon takes the matrices, with steps as large as AdamW's would be, and AdamW the rest.
    """
    settings: dict[str, Any] = {"lr": choice.lr, "weight_decay": choice.weight_decay}
    parameters = list(module.parameters())
    if choice.optimizer == "adamw8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise UserError("adamw8bit needs bitsandbytes; install it with: pip install 'imprompt[8bit]'") from error
        return [AdamW8bit(parameters, **settings)]
    if choice.optimizer == "muon":
        if choice.precision == "float16" or choice.deepspeed:
            raise UserError("muon trains in bfloat16 or float32, and not under DeepSpeed; choose another --precision or --optimizer adamw")
        matrices = [p for p in parameters if p.ndim == 2]
        others = [p for p in parameters if p.ndim != 2]
        found: list[torch.optim.Optimizer] = [Muon(matrices, **settings)] if matrices else []
        return found + ([torch.optim.AdamW(others, fused=True, betas=(0.9, 0.99), **settings)] if others else [])
    return [torch.optim.AdamW(parameters, fused=True, **settings)]


def objective_of(choice: Train) -> Objective:
    return Objective(
        choice.drop_text, choice.drop_image, choice.drop_both, choice.timesteps or "uniform", choice.min_snr, choice.noise_offset
    )


def share(step: int, choice: Train) -> float:
    """Share of the learning rate at a step: linear warm-up, then as the schedule says."""
    if step < choice.warmup:
        return (step + 1) / choice.warmup
    left = 1 - (step - choice.warmup) / max(1, choice.steps - choice.warmup)
    match choice.schedule:
        case "cosine":
            return 0.5 * (1 - math.cos(math.pi * left))
        case "linear":
            return left
    return 1.0


def clipped(accelerator: Accelerator, module: nn.Module, most: float) -> float:
    """Clip the gradient; its norm before."""
    norm = accelerator.clip_grad_norm_(module.parameters(), most or math.inf)
    return 0.0 if norm is None else float(norm)  # DeepSpeed clips by itself


@contextmanager
def averaged(average: EMAModel | None, module: nn.Module, now: bool) -> Iterator[None]:
    """Within the context the module has its averaged weights."""
    if average is None or not now:
        yield
        return
    average.store(module.parameters())
    average.copy_to(module.parameters())
    try:
        yield
    finally:
        average.restore(module.parameters())
