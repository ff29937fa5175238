"""The models that evaluate images of mini's world agree with its known attributes and silhouettes."""

import numpy as np
import pytest

from imprompt.mini import world
from imprompt.mini.attribute_classifier import AttributeClassifier
from imprompt.mini.held_out import make_held_out_samples


@pytest.fixture(scope="module")
def classifier():
    return AttributeClassifier()


@pytest.fixture(scope="module")
def samples():
    return make_held_out_samples(40)


def test_held_out_samples_name_another_category(samples):
    assert all(sample.other_category != sample.subject.category and sample.subject.category in sample.caption for sample in samples)
    assert samples[0].image.tobytes() != samples[0].other_image.tobytes()


def test_the_classifier_recognizes_the_attributes_of_held_out_images(classifier, samples):
    predictions = classifier.classify([sample.image for sample in samples])
    for attribute in ("category", "color", "background", "pattern"):
        correct = sum(p[attribute] == sample.attributes[attribute] for p, sample in zip(predictions, samples, strict=True))
        assert correct >= 38, attribute
    assert len(classifier.logit_indices("color")) == len(world.COLORS)


def test_the_segmentation_model_finds_silhouettes(classifier, samples):
    masks = classifier.segment([sample.image for sample in samples[:20]])
    truth = np.stack([np.asarray(world.render_silhouette(sample.subject, sample.scene)) > 127 for sample in samples[:20]])
    assert ((masks & truth).sum((1, 2)) > 0.85 * (masks | truth).sum((1, 2))).all()
