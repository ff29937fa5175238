"""Validation with the same images, noise and timesteps every time, so that its values can be compared.

The training loss hardly moves, because the base model denoises well already. The gap between the loss with the right and with
another reference does.
"""

from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from imprompt.config.training import ValidationConfig
from imprompt.models.base_pipelines import default_guidance_scale, sample_images
from imprompt.models.clip_score import CLIPScorer, EncoderSimilarity
from imprompt.training.frozen_encoders import TrainingBatch
from imprompt.training.objective import BatchRandomness, denoising_error
from imprompt.training.setup import TrainingContext
from imprompt.utils.images import make_contact_sheet

TIMESTEPS_PER_IMAGE = 4
NUM_SAMPLE_IMAGES = 8


class ValidationResult(NamedTuple):
    """The result of one validation."""

    metrics: dict[str, float]  # val/loss, val/uncond_gap, val/shuffled_reference_gap, and CLIP similarities
    sample_grid: Image.Image  # top: references; bottom: images generated from them


class Validator:
    """Measures a method on the validation images of a run, and generates samples from them."""

    def __init__(self, context: TrainingContext, config: ValidationConfig):
        self.context = context
        clip_model = config.clip_model or ("mini" if context.model == "mini" else None)
        assert clip_model or context.image_encoder
        self.scorer = CLIPScorer.load(clip_model) if clip_model else EncoderSimilarity(context.image_encoder)  # type: ignore[arg-type]
        self.num_inference_steps = config.validation_num_inference_steps
        self.guidance_scale = default_guidance_scale(context.model)

    @torch.no_grad()
    def validate(self) -> ValidationResult:
        """The losses with the right reference, without one and with another image's, and samples with their CLIP similarities."""
        context, images = self.context, self.context.validation_set.images
        context.method.module.eval()
        try:
            metrics = self._compute_losses()
            with context.frozen_encoders.on_device():
                samples = self._generate_samples()
                references, prompts = images[: len(samples)], context.validation_set.prompts[: len(samples)]
                metrics |= self.scorer.compute_scores(samples, references, prompts)
        finally:
            context.method.module.train()
        return ValidationResult(metrics, make_contact_sheet([], [*references, *samples], columns=len(samples), cell_size=160))

    def _compute_losses(self) -> dict[str, float]:
        """Means over all images; a shuffled reference is that of the image before."""
        totals, batches = torch.zeros(3), self.context.validation_set.batches
        shuffled = torch.cat([b.image_features for b in batches]).roll(1, 0).split([len(b.seeds) for b in batches])
        for batch, other_features in zip(batches, shuffled, strict=True):
            features = batch.image_features
            uncond_features = self.context.uncond.image_features.to(features).expand_as(features)
            conditions = [batch._replace(image_features=f) for f in (features, uncond_features, other_features)]
            for n in range(TIMESTEPS_PER_IMAGE):
                totals += torch.stack([self._sum_loss(condition, n) for condition in conditions])
        loss, uncond, other = (totals / (TIMESTEPS_PER_IMAGE * len(self.context.validation_set.prompts))).tolist()
        return {"val/loss": loss, "val/uncond_gap": uncond - loss, "val/shuffled_reference_gap": other - loss}

    def _sum_loss(self, batch: TrainingBatch, n: int) -> Tensor:
        """The loss summed over the images of a batch, with evenly spaced timesteps, the n-th of each image."""
        context, size = self.context, len(batch.seeds)
        randomness = BatchRandomness.sample(batch._replace(seeds=[TIMESTEPS_PER_IMAGE * i + n for i in range(size)]))
        u = torch.arange(size, device=context.device) / size + n / TIMESTEPS_PER_IMAGE + 0.5 / (TIMESTEPS_PER_IMAGE * size)
        timesteps = (u % 1 * len(context.noise_schedule.timesteps)).long()
        return denoising_error(context.method, context.unet, context.noise_schedule, batch, timesteps, randomness).sum().cpu()

    def _generate_samples(self) -> list[Image.Image]:
        """Images generated from the references alone: empty prompts, λ = 1."""
        context, validation_set = self.context, self.context.validation_set
        features = torch.cat([b.image_features for b in validation_set.batches])[:NUM_SAMPLE_IMAGES]
        width, height = validation_set.images[0].size
        prompts, seeds = [""] * len(features), range(len(features))
        with context.method.apply_to(context.pipe, features, context.uncond.image_features):
            return sample_images(context.pipe, prompts, self.num_inference_steps, seeds, (height, width), self.guidance_scale)
