"""Held-out samples of mini's world: the test prompts and reference images that no part of mini was trained on."""

from dataclasses import dataclass

from PIL import Image

from imprompt.mini import world

OTHER_SCENE_OFFSET = 5_000_000  # added to the seed of a scene for another image of the same subject


@dataclass(frozen=True)
class WorldSample:
    """A held-out subject, whose combination of category, color and pattern is never trained on, in a new scene."""

    subject: world.Subject
    scene: world.Scene
    other_category: str  # the category that the prompt names where image prompt and text are combined

    @property
    def caption(self) -> str:
        """The prompt that describes the image."""
        return world.format_full_caption(self.subject, self.scene)

    @property
    def image(self) -> Image.Image:
        """The reference image."""
        return world.render(self.subject, self.scene)

    @property
    def other_image(self) -> Image.Image:
        """The same subject in another scene."""
        return world.render(self.subject, world.make_scene(self.scene.seed + OTHER_SCENE_OFFSET))

    @property
    def attributes(self) -> dict[str, str]:
        """The four attributes of the image that are measured."""
        subject = self.subject
        return {"category": subject.category, "color": subject.color, "background": self.scene.background, "pattern": subject.pattern}


def make_held_out_samples(count: int) -> list[WorldSample]:
    """The first `count` held-out samples, always the same."""
    names, samples = world.CATEGORIES, []
    for i, subject in zip(range(count), world.iterate_subjects(held_out=True), strict=False):
        other_category = names[(names.index(subject.category) + 1 + i % (len(names) - 1)) % len(names)]
        samples.append(WorldSample(subject, world.make_scene(world.HELD_OUT_SCENES + i), other_category))
    return samples
