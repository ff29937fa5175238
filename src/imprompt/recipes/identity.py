"""The identity encoder: tells one subject from another in whatever scene they are photographed. It only evaluates.

Subjects and scenes are its own, its widths are not the judge's, and it knows nothing of the VAE or of what conditions: a figure
of identity must not come from an encoder that took part in drawing.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification

from imprompt.mini import world
from imprompt.recipes.trainer import generator

SEEDS = 8_000_000  # its subjects and scenes begin here: after the judge's, long before those of the prompts
GROUP = 8  # look-alikes
TEMPERATURE = 0.1


def encoder(width: int = 64) -> ResNetForImageClassification:
    """A ResNet whose outputs are the embedding, yet to be brought to length 1. Not trained, 1.2 M parameters."""
    return ResNetForImageClassification(
        ResNetConfig(embedding_size=48, hidden_sizes=[48, 96, 160], depths=[2, 2, 2], layer_type="basic", num_labels=width)
    )


def look_alikes() -> Iterator[world.Subject]:
    """The encoder's subjects, without end, in groups of GROUP that have kind, colour and pattern in common.

    Within a group only what is personal tells them apart: exact shade, second colour, period, direction of stripes, outline,
    face, accessory, stretch.
    """
    waiting: dict[tuple[str, str, str], list[world.Subject]] = defaultdict(list)
    for seed in itertools.count(SEEDS):
        found = world.subject(seed)
        group = waiting[found.kind, found.colour, found.pattern]
        group.append(found)
        if len(group) == GROUP:
            yield from group
            group.clear()


def supervised_contrast(embeddings: Tensor, subjects: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """L_out: of all the others, each picture is to find those of its subject. (n, width) of length 1, (n,) → a scalar.

    arXiv:2004.11362, equation 2, the mean over anchors instead of the sum. Each subject must come at least twice.
    """
    logits = embeddings @ embeddings.T / temperature
    own = torch.eye(len(subjects), dtype=torch.bool, device=logits.device)
    same = (subjects[:, None] == subjects[None]) & ~own
    found = logits.masked_fill(own, float("-inf")).log_softmax(1)
    return -(found.masked_fill(~same, 0).sum(1) / same.sum(1)).mean()


def worn(x: Tensor, g: torch.Generator) -> Tensor:
    """Pictures (n, 3, height, width) in −1 … 1, each a little blurred and noisy, as what a VAE decodes."""
    blur, noise = torch.rand(2, len(x), 1, 1, 1, generator=g).to(x.device)
    soft = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
    return x.lerp(soft, blur) + 0.1 * noise * torch.randn(x.shape, generator=g).to(x.device)


class Photographs(Protocol):
    """A pool of `look_alikes`, so many photographs of each in succession."""

    count: int

    def images(self, rows: Tensor) -> Tensor: ...


class Telling(nn.Module):
    """What the encoder minimises: each batch holds half of the look-alikes of several groups, with all their photographs."""

    def __init__(self, model: ResNetForImageClassification, pool: Photographs, photographs: int, batch: int):
        super().__init__()
        self.model, self.pool, self.photographs = model, pool, photographs
        self.picks = GROUP // 2
        self.groups = batch // (self.picks * photographs)

    def subjects(self, step: int) -> Tensor:
        """Whom a step sees: (groups × look-alikes,) places among the pool's subjects."""
        g = generator("identity", step)
        groups = torch.randint(self.pool.count // (GROUP * self.photographs), (self.groups,), generator=g)
        picks = torch.rand(self.groups, GROUP, generator=g).argsort(1)[:, : self.picks]
        return (groups[:, None] * GROUP + picks).flatten()

    def loss(self, step: int) -> Tensor:
        device = self.model.device
        subjects = self.subjects(step).repeat_interleave(self.photographs)
        rows = subjects * self.photographs + torch.arange(self.photographs).repeat(len(subjects) // self.photographs)
        x = worn(self.pool.images(rows), generator("identity wear", step)).to(device)
        with torch.autocast(device.type, enabled=False):  # cosines of look-alikes lie close; and not every CPU knows bfloat16
            embeddings = F.normalize(self.model(pixel_values=x).logits, dim=1)
            return supervised_contrast(embeddings, subjects.to(device))
