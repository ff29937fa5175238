"""How the identity encoder is trained: subjects of its own, similar subjects in every batch. Its quality: evaluation/test_identity.py."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from imprompt.mini import world
from imprompt.mini.held_out import OTHER_SCENE_OFFSET
from imprompt.recipes.identity import (
    FIRST_IDENTITY_SEED,
    GROUP_SIZE,
    IdentityTraining,
    build_identity_encoder,
    degrade,
    iterate_hard_negatives,
    supervised_contrastive_loss,
)
from imprompt.recipes.mini_models import (
    IMAGES_PER_SUBJECT,
    NUM_CLASSIFIER_IMAGES,
    NUM_IDENTITY_IMAGES,
    NUM_TRAIN_IMAGES,
    PLANS,
    ImagePool,
    MiniBuild,
)
from imprompt.recipes.trainer import TrainPlan, train_module

TEST_SCENES = 40_000_000  # first scene of its tests


# Its pool


def test_groups_are_similar_and_no_two_subjects_are_equal():
    subjects = list(itertools.islice(iterate_hard_negatives(), 60 * GROUP_SIZE))
    for group in zip(*[iter(subjects)] * GROUP_SIZE, strict=True):
        assert len({(s.category, s.color, s.pattern) for s in group}) == 1
        assert len({replace(s, seed=0) for s in group}) == GROUP_SIZE
    assert len({(s.category, s.color, s.pattern) for s in subjects}) > 50, "many combinations"
    assert subjects == list(itertools.islice(iterate_hard_negatives(), 60 * GROUP_SIZE))


def test_its_subjects_and_scenes_are_used_by_nothing_else(tmp_path):
    """Not by training, prompts, other images of the prompts' subjects, or the attribute classifier."""
    last = max(s.seed for s in itertools.islice(iterate_hard_negatives(), NUM_IDENTITY_IMAGES // IMAGES_PER_SUBJECT))
    own_seeds = range(FIRST_IDENTITY_SEED, max(last, FIRST_IDENTITY_SEED + NUM_IDENTITY_IMAGES) + 1)
    classifier = ImagePool(tmp_path, 4, "judge").subject_of(0).seed
    most = max(NUM_TRAIN_IMAGES, NUM_CLASSIFIER_IMAGES)  # scenes; fewer subjects, of which not all are taken
    prompts = next(world.iterate_subjects(held_out=True)).seed
    for first in (
        0,
        prompts,
        classifier,
        classifier + OTHER_SCENE_OFFSET,
        world.HELD_OUT_SCENES,
        world.HELD_OUT_SCENES + OTHER_SCENE_OFFSET,
        TEST_SCENES,
    ):
        assert own_seeds.stop <= first or first + most < own_seeds.start
    assert ImagePool(tmp_path, 32, "identity").subject_of(0).seed >= FIRST_IDENTITY_SEED
    assert ImagePool(tmp_path, 32, "identity").scene_of(0).seed == FIRST_IDENTITY_SEED


def test_only_the_training_images_of_a_part_are_rendered(tmp_path, monkeypatch):
    rendered = []
    monkeypatch.setattr(ImagePool, "render_all", lambda pool, _: rendered.append(pool.path.name))
    for trainer in ("_train_clip", "_train_attribute_classifier", "_train_identity_encoder", "_train_vae", "_train_unet"):
        monkeypatch.setattr(MiniBuild, trainer, lambda *_: None)
    build = MiniBuild(tmp_path, lambda *_: None, budget=0.0002)
    for part in PLANS:
        build.train_parts([part])
    pools = {"clip": "train", "judge-clip": "judge", "judge": "judge", "identity": "identity", "vae": "train", "unet": "train"}
    assert rendered == [f"{pools[part]}-64.npy" for part in PLANS]
    (tmp_path / "parts" / "judge").mkdir(parents=True)
    rendered.clear()
    build.train_parts(["judge"])
    assert rendered == [], "none for a part that exists"


# Its training


class IndexImages:
    """Images whose pixels are all their own index."""

    count = 20 * GROUP_SIZE * IMAGES_PER_SUBJECT

    def load_images(self, rows):
        return rows[:, None, None, None].float().expand(-1, 3, 64, 64)


def test_a_batch_holds_similar_subjects_with_all_their_images():
    training = IdentityTraining(build_identity_encoder(), IndexImages(), IMAGES_PER_SUBJECT, 128)
    sampled = []
    for step in range(40):
        subjects = training.sample_subjects(step)
        groups = (subjects // GROUP_SIZE).unflatten(0, (8, 4))
        assert (groups == groups[:, :1]).all() and torch.equal(subjects, training.sample_subjects(step))
        assert all(len(set(picked.tolist())) == 4 for picked in subjects.unflatten(0, (8, 4)))
        sampled += subjects.tolist()
    assert set(sampled) == set(range(20 * GROUP_SIZE)), "every subject is sampled"


def test_the_images_of_a_batch_are_those_of_its_subjects(monkeypatch):
    training = IdentityTraining(build_identity_encoder(), IndexImages(), IMAGES_PER_SUBJECT, 128)
    calls = []
    monkeypatch.setattr("imprompt.recipes.identity.degrade", lambda x, g: calls.append(x[:, 0, 0, 0].long()) or x)
    monkeypatch.setattr("imprompt.recipes.identity.supervised_contrastive_loss", lambda embeddings, subjects: calls.append(subjects))
    training.compute_loss(3)
    rows, subjects = calls
    assert torch.equal(rows // IMAGES_PER_SUBJECT, subjects) and len(rows.unique()) == 128


def test_the_contrastive_loss_is_the_papers_sum():
    g = torch.Generator().manual_seed(0)
    z = F.normalize(torch.randn(6, 5, generator=g), dim=1)
    subjects = [0, 1, 0, 1, 0, 1]
    total = 0.0
    for i in range(6):
        rest = sum(torch.exp(z[i] @ z[a] / 0.2) for a in range(6) if a != i)
        positives = [p for p in range(6) if p != i and subjects[p] == subjects[i]]
        total -= sum(torch.log(torch.exp(z[i] @ z[p] / 0.2) / rest) for p in positives) / len(positives)
    assert supervised_contrastive_loss(z, torch.tensor(subjects), 0.2).item() == pytest.approx(float(total) / 6, rel=1e-5)


def test_degradation_is_slight_and_different_for_every_image():
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)).expand(8, -1, -1, -1) * 2 - 1
    off = (degrade(x, torch.Generator().manual_seed(1)) - x).flatten(1)
    assert off.mean(1).abs().max() < 0.02, "no color changes"
    assert len(off.std(1).unique()) == 8
    flat = torch.zeros(8, 3, 64, 64)
    assert 0 < degrade(flat, torch.Generator().manual_seed(1)).std() < 0.1


def test_it_learns_to_separate_similar_subjects(tmp_path):
    pool = ImagePool(tmp_path, 256, "identity")
    pool.render_all(lambda *_: None)
    torch.manual_seed(0)
    training = IdentityTraining(build_identity_encoder(), pool, IMAGES_PER_SUBJECT, 32)
    losses = []

    def compute_loss(step):
        losses.append(training.compute_loss(step))
        return losses[-1]

    train_module(TrainPlan("identity", 15, 32, 2e-3, warmup_steps=3), training, compute_loss, tmp_path, lambda *_: None)
    before, after = (torch.stack(part).mean().item() for part in (losses[:3], losses[-3:]))
    training.eval()
    with torch.no_grad():
        z = F.normalize(training.model(pixel_values=pool.load_images(torch.arange(256))).logits, dim=1).unflatten(0, (8, GROUP_SIZE, 4))
    within = torch.einsum("gspd,gsqd->gspq", z, z)[..., ~torch.eye(4, dtype=torch.bool)].mean().item()
    between = torch.einsum("gspd,gtqd->gstpq", z, z)[:, ~torch.eye(GROUP_SIZE, dtype=torch.bool)].mean().item()
    assert after < before - 0.5
    assert within > between + 0.1, "nearer to itself than to similar subjects"
