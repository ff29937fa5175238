"""Is it learning? The same pictures, noise and timesteps at every examination, so that figures can be compared.

The training loss hardly moves, because the base denoises well already; these do.
"""

from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from imprompt.config import Train
from imprompt.models.base_pipelines import drawing, guidance_of
from imprompt.models.clip_score import OwnEyes, Similarity
from imprompt.training.frozen_encoders import Encoded
from imprompt.training.objective import Chance, Objective, errors
from imprompt.training.setup import Setting
from imprompt.utils.images import sheet

NOISES = 4  # timesteps for each picture
PICTURES = 8  # drawn


class Findings(NamedTuple):
    """What an examination found."""

    figures: dict[str, float]
    sheet: Image.Image  # references above, what is drawn after them below


class Examiner:
    """Examines a method on pictures that it is not trained on."""

    def __init__(self, choice: Train, setting: Setting):
        self.setting = setting
        judge = choice.judge or ("mini" if choice.base == "mini" else None)
        assert judge or setting.encoder
        self.similarity = Similarity.load(judge) if judge else OwnEyes(setting.encoder)  # type: ignore[arg-type]
        self.steps, self.guidance = choice.validation_steps, guidance_of(choice.base)

    @torch.no_grad()
    def examine(self) -> Findings:
        """Losses with the right, with no and with a wrong reference; likeness of what is drawn; a sheet."""
        self.setting.method.module.eval()
        try:
            figures = self._losses()
            with self.setting.frozen.present():
                drawn = self._draw()
                references, texts = self.setting.examined.targets[: len(drawn)], self.setting.examined.texts[: len(drawn)]
                figures |= self.similarity.figures(drawn, references, texts)
        finally:
            self.setting.method.module.train()
        return Findings(figures, sheet([], [*references, *drawn], columns=len(drawn), cell=160))

    def _losses(self) -> dict[str, float]:
        sums, batches = torch.zeros(3), self.setting.examined.batches
        others = torch.cat([b.image for b in batches]).roll(1, 0).split([len(b.seeds) for b in batches])
        for encoded, wrong in zip(batches, others, strict=True):
            null = self.setting.nulls.image.to(encoded.image).expand_as(encoded.image)
            for number in range(NOISES):
                sums += torch.stack([self._loss(encoded, image, number) for image in (encoded.image, null, wrong)])
        own, none, other = (sums / (NOISES * len(self.setting.examined.texts))).tolist()
        return {"validation": own, "gap to no reference": none - own, "gap to a wrong reference": other - own}

    def _loss(self, encoded: Encoded, image: Tensor, number: int) -> Tensor:
        """Summed over the pictures; timesteps spread evenly."""
        s, count = self.setting, len(encoded.seeds)
        chance = Chance.draw(encoded._replace(seeds=[NOISES * i + number for i in range(count)]))
        total = len(s.schedule.time)
        t = ((torch.arange(count, device=s.device) / count + number / NOISES + 0.5 / (NOISES * count)) % 1 * total).long()
        return errors(s.method, s.unet, s.schedule, encoded, encoded.text, image, t, chance, Objective()).sum().cpu()

    def _draw(self) -> list[Image.Image]:
        """After the references alone: empty text, λ = 1."""
        s = self.setting
        image = torch.cat([b.image for b in s.examined.batches])[:PICTURES]
        width, height = s.examined.targets[0].size
        with s.method.attached(s.pipe, image, s.nulls.image):
            return drawing(s.pipe, [""] * len(image), self.steps, range(len(image)), (height, width), self.guidance)
