"""Before a long run: does one batch train at all, and what will it cost?

One batch is overfitted with a learning rate that is high for it. What goes wrong in a run of days goes wrong here in
seconds, and is named.
"""

import copy
import time
from typing import Any, NamedTuple

import torch

from imprompt.config import COPIES, Train
from imprompt.core.optim import without_gradient
from imprompt.errors import UserError
from imprompt.training.frozen_encoders import Encoded
from imprompt.training.objective import Chance, Objective, errors
from imprompt.training.setup import Setting
from imprompt.utils.memory import peak_bytes

STEPS, HIGH = 12, 1e-2  # steps, and the highest learning rate


class Report(NamedTuple):
    """What the preflight found."""

    before: float  # loss on the one batch
    after: float
    seconds_per_step: float  # of a batch, encoded and trained on
    trainable: int  # parameters
    peak_bytes: int  # memory used at the peak: of the GPU, or of the process; 0 where the system does not tell
    notes: list[str]  # what is odd, but no obstacle


def preflight(choice: Train, setting: Setting) -> Report:
    """Overfit the first batch on a copy of the weights. Raises UserError for what no training can mend."""
    method, device = setting.method, setting.device
    weights = copy.deepcopy(method.module.state_dict())
    place = setting.loader.state()
    items = next(iter(setting.loader))
    setting.loader.load_state(place)
    began = time.monotonic()
    encoded = setting.encode(items)
    encoding = time.monotonic() - began
    notes = _data_notes(items, encoded)
    module = method.module.float().train()
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=min(10 * choice.lr, HIGH / 10 if choice.method in COPIES else HIGH))
    image = encoded.image.clone()
    if len(items) > 1:
        image[0] = setting.nulls.image.to(image)[0]  # one without its picture, as there are in training
    chance, total = Chance.draw(encoded), len(setting.schedule.time)
    t = ((torch.arange(len(items), device=device) + 0.5) / len(items) * total).long()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    curve, began = [], time.monotonic()
    for step in range(STEPS):
        with torch.autocast(device.type, setting.precision, enabled=setting.precision != torch.float32):
            each = errors(method, setting.unet, setting.schedule, encoded, encoded.text, image, t, chance, Objective())
        loss = each.mean()
        if not torch.isfinite(loss):
            raise UserError(
                f"the loss is not a number at step {step + 1} of the preflight; train in another --precision (bfloat16 or float32)"
            )
        optimiser.zero_grad()
        loss.backward()
        if step == 3:  # outlets that start at zero, one behind the other, let nothing through at first
            _check_gradients(module)
        optimiser.step()
        curve.append(loss.item())
    optimiser.zero_grad(set_to_none=True)  # or the run's first step would have these gradients too
    seconds = (time.monotonic() - began) / STEPS
    module.load_state_dict(weights)
    if curve[-1] >= curve[0]:
        notes.append(f"one batch does not overfit ({curve[0]:.4f} → {curve[-1]:.4f}): check lr and the encoder")
    return Report(curve[0], curve[-1], encoding + seconds, sum(p.numel() for p in parameters), peak_bytes(device), notes)


def _check_gradients(module: torch.nn.Module) -> None:
    dead = without_gradient(module)
    if dead:
        raise UserError(f"{len(dead)} tensors of the adapter receive no gradient ({dead[0]} among them): the base does not use them")


def _data_notes(items: list[Any], encoded: Encoded) -> list[str]:
    notes = []
    features = encoded.image.float().flatten(1)
    if len(items) > 1 and (features - features[:1]).abs().max() < 1e-4 * features.abs().max():
        notes.append("all references of the first batch look the same to the encoder: wrong files, or a wrong encoder?")
    if not any(item.text for item in items):
        notes.append("no captions in the first batch: the adapter will not learn to share the work with text")
    if len(items) > 1 and len({item.key for item in items}) == 1:
        notes.append("the first batch shows one record only: there is very little data")
    return notes
