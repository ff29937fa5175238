"""The identity encoder: embeds subjects so that images of one subject are near each other in any scene. It only evaluates.

It is trained on subjects and scenes of its own, without the VAE and the image encoder that conditions: an identity metric must
not come from an encoder that took part in generation.
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
from imprompt.recipes.trainer import make_step_generator

FIRST_IDENTITY_SEED = (
    8_000_000  # its subjects and scenes begin here: after those of the attribute classifier, long before those of the prompts
)
GROUP_SIZE = 8  # similar subjects
TEMPERATURE = 0.1


def build_identity_encoder(embed_dim: int = 64) -> ResNetForImageClassification:
    """An untrained ResNet whose outputs are the embedding before normalization; 1.2 M parameters."""
    return ResNetForImageClassification(
        ResNetConfig(embedding_size=48, hidden_sizes=[48, 96, 160], depths=[2, 2, 2], layer_type="basic", num_labels=embed_dim)
    )


def iterate_hard_negatives() -> Iterator[world.Subject]:
    """Endless subjects in groups of GROUP_SIZE that have category, color and pattern in common.

    Within a group they differ only in exact shade, second color, period and direction of the pattern, outline, face,
    accessory and stretch.
    """
    waiting: dict[tuple[str, str, str], list[world.Subject]] = defaultdict(list)
    for seed in itertools.count(FIRST_IDENTITY_SEED):
        subject = world.make_subject(seed)
        group = waiting[subject.category, subject.color, subject.pattern]
        group.append(subject)
        if len(group) == GROUP_SIZE:
            yield from group
            group.clear()


def supervised_contrastive_loss(embeddings: Tensor, subjects: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Supervised contrastive loss L_out: (n, embed_dim) of length 1, (n,) subject indices → a scalar.

    Khosla et al. 2020 (arXiv:2004.11362), equation 2, with the mean over anchors instead of the sum. Each subject must
    occur at least twice.
    """
    logits = embeddings @ embeddings.T / temperature
    self_pairs = torch.eye(len(subjects), dtype=torch.bool, device=logits.device)
    same = (subjects[:, None] == subjects[None]) & ~self_pairs
    log_probs = logits.masked_fill(self_pairs, float("-inf")).log_softmax(1)
    return -(log_probs.masked_fill(~same, 0).sum(1) / same.sum(1)).mean()


def degrade(x: Tensor, g: torch.Generator) -> Tensor:
    """Slightly blur each image and add noise, as a VAE's decoder does. x: (n, 3, height, width) in −1 … 1."""
    blur, noise = torch.rand(2, len(x), 1, 1, 1, generator=g).to(x.device)
    soft = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
    return x.lerp(soft, blur) + 0.1 * noise * torch.randn(x.shape, generator=g).to(x.device)


class ImageSource(Protocol):
    """A pool of `look_alikes`, so many of each in succession."""

    count: int

    def load_images(self, rows: Tensor) -> Tensor: ...


class IdentityTraining(nn.Module):
    """Objective of the encoder: each batch holds half of the subjects of several groups, with all their images."""

    def __init__(self, model: ResNetForImageClassification, pool: ImageSource, images_per_subject: int, batch: int):
        super().__init__()
        self.model, self.pool, self.images_per_subject = model, pool, images_per_subject
        self.subjects_per_group = GROUP_SIZE // 2
        self.num_groups = batch // (self.subjects_per_group * images_per_subject)

    def sample_subjects(self, step: int) -> Tensor:
        """Subjects of a step: (num_groups × subjects_per_group,) indices among the pool's subjects."""
        g = make_step_generator("identity", step)
        groups = torch.randint(self.pool.count // (GROUP_SIZE * self.images_per_subject), (self.num_groups,), generator=g)
        picks = torch.rand(self.num_groups, GROUP_SIZE, generator=g).argsort(1)[:, : self.subjects_per_group]
        return (groups[:, None] * GROUP_SIZE + picks).flatten()

    def compute_loss(self, step: int) -> Tensor:
        device = self.model.device
        subjects = self.sample_subjects(step).repeat_interleave(self.images_per_subject)
        rows = subjects * self.images_per_subject + torch.arange(self.images_per_subject).repeat(len(subjects) // self.images_per_subject)
        x = degrade(self.pool.load_images(rows), make_step_generator("identity wear", step)).to(device)
        with torch.autocast(device.type, enabled=False):  # cosines of similar subjects are close together, and not every CPU has bfloat16
            embeddings = F.normalize(self.model(pixel_values=x).logits, dim=1)
            return supervised_contrastive_loss(embeddings, subjects.to(device))
