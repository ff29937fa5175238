"""The sanity check before a long run: does one batch train at all, and what will a step cost?

One batch is overfitted with a learning rate that is high for it. What would go wrong in a run of days is found in seconds.
"""

import copy
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from imprompt.core.optim import check_gradients
from imprompt.errors import UserError
from imprompt.training.frozen_encoders import TrainingBatch
from imprompt.training.objective import BatchRandomness, denoising_error
from imprompt.training.setup import TrainingContext
from imprompt.utils.memory import peak_memory_bytes

NUM_STEPS = 12
MAX_LEARNING_RATE = 1e-2  # a tenth of it for methods that train the UNet
CHECK_GRADIENTS_AT = 3  # step; output layers that start at zero, one after the other, pass no gradient in the first steps


class SanityReport(NamedTuple):
    """What the sanity check measured."""

    loss_before: float  # on the batch
    loss_after: float
    seconds_per_step: float  # to encode a batch and to train on it
    num_parameters: int  # trainable ones
    peak_bytes: int  # peak memory of the GPU, or of the process; 0 where the system does not report it
    warnings: list[str]  # what is unusual, but does not prevent training


def run_sanity_check(context: TrainingContext, learning_rate: float, *, trains_unet: bool) -> SanityReport:
    """Overfit the first batch with ten times the learning rate, and restore weights and data afterwards.

    Raises UserError for what training cannot recover from.
    """
    module = context.method.module
    weights = copy.deepcopy(module.state_dict())
    loader_state = context.loader.state_dict()
    items = next(iter(context.loader))
    context.loader.load_state_dict(loader_state)
    start_time = time.monotonic()
    batch = context.make_batch(items)
    encoding_seconds = time.monotonic() - start_time
    warnings = _find_unusual_data(items, batch)
    if context.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(context.device)
    start_time = time.monotonic()
    losses = _overfit(context, batch, min(10 * learning_rate, MAX_LEARNING_RATE / 10 if trains_unet else MAX_LEARNING_RATE))
    step_seconds = (time.monotonic() - start_time) / NUM_STEPS
    module.load_state_dict(weights)
    if losses[-1] >= losses[0]:
        message = f"one batch does not overfit ({losses[0]:.4f} → {losses[-1]:.4f}): check --learning-rate and the image encoder"
        warnings.append(message)
    num_parameters = sum(p.numel() for p in module.parameters() if p.requires_grad)
    peak_bytes = peak_memory_bytes(context.device)
    return SanityReport(losses[0], losses[-1], encoding_seconds + step_seconds, num_parameters, peak_bytes, warnings)


def _overfit(context: TrainingContext, batch: TrainingBatch, learning_rate: float) -> list[float]:
    """Train on one batch with fixed noise and timesteps; the loss of each step."""
    module, losses = context.method.module.float().train(), []
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=learning_rate)
    batch = batch._replace(image_features=_drop_first_image(batch, context.uncond.image_features))
    randomness, size = BatchRandomness.sample(batch), len(batch.seeds)
    timesteps = ((torch.arange(size, device=context.device) + 0.5) / size * len(context.noise_schedule.timesteps)).long()
    for step in range(NUM_STEPS):
        with torch.autocast(context.device.type, context.dtype, enabled=context.dtype != torch.float32):
            error = denoising_error(context.method, context.unet, context.noise_schedule, batch, timesteps, randomness)
        loss = error.mean()
        if not torch.isfinite(loss):
            raise UserError(
                f"the loss is not finite at step {step + 1} of the sanity check; train with another --mixed-precision (bfloat16 or float32)"
            )
        optimizer.zero_grad()
        loss.backward()
        if step == CHECK_GRADIENTS_AT:
            check_gradients(module, UserError)
        optimizer.step()
        losses.append(loss.item())
    optimizer.zero_grad(set_to_none=True)  # otherwise the first step of the run would include these gradients
    return losses


def _drop_first_image(batch: TrainingBatch, uncond_features: Tensor) -> Tensor:
    """The image features, unconditional for the first of several images: training drops some, too."""
    features = batch.image_features.clone()
    if len(features) > 1:
        features[0] = uncond_features.to(features)[0]
    return features


def _find_unusual_data(items: Sequence[Any], batch: TrainingBatch) -> list[str]:
    warnings = []
    features = batch.image_features.float().flatten(1)
    if len(items) > 1 and (features - features[:1]).abs().max() < 1e-4 * features.abs().max():
        warnings.append("the image encoder does not distinguish the references of the first batch: wrong files or a wrong encoder?")
    if not any(item.caption for item in items):
        warnings.append("no captions in the first batch: the adapter will not learn to combine image and text")
    if len(items) > 1 and len({item.key for item in items}) == 1:
        warnings.append("the first batch contains a single record: there is very little data")
    return warnings
