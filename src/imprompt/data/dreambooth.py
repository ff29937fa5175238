"""The dataset of per-subject methods: instance images of one subject, and class images for prior preservation."""

import zlib
from collections.abc import Sequence
from pathlib import Path

from imprompt.data.records import Record
from imprompt.errors import UserError
from imprompt.utils.images import ImageInput, open_image


class DreamBoothDataset:
    """Instance images with the instance prompt; with class images, every second record is a class image with the class prompt.

    A batch then holds as many class as instance images on average, and the loss is that of DreamBooth (Ruiz et al., 2022,
    arXiv:2208.12242, equation 2) up to a factor of two; `prior_loss_weight` is its λ. All instance images occur equally often, and
    so do all class images. Raises UserError where there is no instance image.
    """

    def __init__(
        self,
        instance_images: Sequence[ImageInput],
        instance_prompt: str,
        class_images: Sequence[ImageInput] = (),
        class_prompt: str = "",
        prior_loss_weight: float = 1.0,
    ) -> None:
        if not instance_images:
            raise UserError("expected at least one image of the subject, received none")
        self.instance_images, self.instance_prompt = instance_images, instance_prompt
        self.class_images, self.class_prompt, self.prior_loss_weight = class_images, class_prompt, prior_loss_weight

    def image_checksums(self) -> list[str]:
        """A checksum of each instance image, from which a changed image is recognized."""
        return [f"{zlib.crc32(_read_bytes(image)):08x}" for image in self.instance_images]

    def __len__(self) -> int:
        return 2 * len(self.instance_images) * len(self.class_images) if self.class_images else len(self.instance_images)

    def __getitem__(self, i: int) -> Record:
        if not 0 <= i < len(self):
            raise IndexError(i)
        pair, is_class_image = divmod(i, 2) if self.class_images else (i, 0)
        images = self.class_images if is_class_image else self.instance_images
        n = pair % len(images)
        if is_class_image:
            return Record(f"class:{n}", images[n], self.class_prompt, loss_weight=self.prior_loss_weight)
        return Record(f"subject:{n}", images[n], self.instance_prompt)


def _read_bytes(image: ImageInput) -> bytes:
    if isinstance(image, (str, Path)):
        return Path(image).read_bytes() if Path(image).is_file() else b""
    return image if isinstance(image, bytes) else open_image(image).tobytes()
