"""How the identity encoder is made: subjects of its own, look-alikes in every batch. What it can do: evaluate/test_recognition.py."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from imprompt.mini import world
from imprompt.mini.judge import ELSEWHERE
from imprompt.recipes.identity import GROUP, SEEDS, Telling, encoder, look_alikes, supervised_contrast, worn
from imprompt.recipes.mini_models import IDENTITY_POOL, JUDGE_POOL, PHOTOS_PER_SUBJECT, PLANS, POOL, Build, Pool
from imprompt.recipes.trainer import Plan, fit

FRESH = 40_000_000  # scenes in which it is tested


# Its pool


def test_groups_are_look_alikes_and_no_two_the_same():
    found = list(itertools.islice(look_alikes(), 60 * GROUP))
    for group in zip(*[iter(found)] * GROUP, strict=True):
        assert len({(s.kind, s.colour, s.pattern) for s in group}) == 1
        assert len({replace(s, seed=0) for s in group}) == GROUP
    assert len({(s.kind, s.colour, s.pattern) for s in found}) > 50, "of many sorts"
    assert found == list(itertools.islice(look_alikes(), 60 * GROUP))


def test_its_subjects_and_scenes_are_nobody_elses(tmp_path):
    """Not those of training, prompts, other photographs of the prompts' subjects, or the judge."""
    last = max(s.seed for s in itertools.islice(look_alikes(), IDENTITY_POOL // PHOTOS_PER_SUBJECT))
    mine = range(SEEDS, max(last, SEEDS + IDENTITY_POOL) + 1)
    judge = Pool(tmp_path, 4, "judge").subject(0).seed
    most = max(POOL, JUDGE_POOL)  # scenes; fewer subjects, of which not all are taken
    prompts = next(world.subjects(held_out=True)).seed
    for first in (0, prompts, judge, judge + ELSEWHERE, world.HELD_OUT_SCENES, world.HELD_OUT_SCENES + ELSEWHERE, FRESH):
        assert mine.stop <= first or first + most < mine.start
    assert Pool(tmp_path, 32, "identity").subject(0).seed >= SEEDS
    assert Pool(tmp_path, 32, "identity").scene(0).seed == SEEDS


def test_only_the_pool_that_a_part_learns_from_is_drawn(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Pool, "draw", lambda pool, _: drawn.append(pool.path.name))
    for maker in ("_clip", "_judge", "_identity", "_vae", "_unet"):
        monkeypatch.setattr(Build, maker, lambda *_: None)
    build = Build(tmp_path, lambda *_: None, budget=0.0002)
    for part in PLANS:
        build.make([part])
    pools = {"clip": "train", "judge-clip": "judge", "judge": "judge", "identity": "identity", "vae": "train", "unet": "train"}
    assert drawn == [f"{pools[part]}-256.npy" for part in PLANS]
    (tmp_path / "parts" / "judge").mkdir(parents=True)
    drawn.clear()
    build.make(["judge"])
    assert drawn == [], "nothing for a part that is there"


# Its training


class Flat:
    """A pool whose pictures are their own numbers."""

    count = 20 * GROUP * PHOTOS_PER_SUBJECT

    def images(self, rows):
        return rows[:, None, None, None].float().expand(-1, 3, 64, 64)


def test_a_batch_holds_look_alikes_with_all_their_photographs():
    telling = Telling(encoder(), Flat(), PHOTOS_PER_SUBJECT, 128)
    seen = []
    for step in range(40):
        subjects = telling.subjects(step)
        groups = (subjects // GROUP).unflatten(0, (8, 4))
        assert (groups == groups[:, :1]).all() and torch.equal(subjects, telling.subjects(step))
        assert all(len(set(picked.tolist())) == 4 for picked in subjects.unflatten(0, (8, 4)))
        seen += subjects.tolist()
    assert set(seen) == set(range(20 * GROUP)), "everyone has a turn"


def test_the_pictures_of_a_batch_are_those_of_its_subjects(monkeypatch):
    telling = Telling(encoder(), Flat(), PHOTOS_PER_SUBJECT, 128)
    looked = []
    monkeypatch.setattr("imprompt.recipes.identity.worn", lambda x, g: looked.append(x[:, 0, 0, 0].long()) or x)
    monkeypatch.setattr("imprompt.recipes.identity.supervised_contrast", lambda embeddings, whose: looked.append(whose))
    telling.loss(3)
    rows, whose = looked
    assert torch.equal(rows // PHOTOS_PER_SUBJECT, whose) and len(rows.unique()) == 128


def test_contrast_is_the_papers_sum():
    g = torch.Generator().manual_seed(0)
    z = F.normalize(torch.randn(6, 5, generator=g), dim=1)
    whose = [0, 1, 0, 1, 0, 1]
    total = 0.0
    for i in range(6):
        rest = sum(torch.exp(z[i] @ z[a] / 0.2) for a in range(6) if a != i)
        own = [p for p in range(6) if p != i and whose[p] == whose[i]]
        total -= sum(torch.log(torch.exp(z[i] @ z[p] / 0.2) / rest) for p in own) / len(own)
    assert supervised_contrast(z, torch.tensor(whose), 0.2).item() == pytest.approx(float(total) / 6, rel=1e-5)


def test_wear_is_slight_and_different_for_every_picture():
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)).expand(8, -1, -1, -1) * 2 - 1
    off = (worn(x, torch.Generator().manual_seed(1)) - x).flatten(1)
    assert off.mean(1).abs().max() < 0.02, "no colour changes"
    assert len(off.std(1).unique()) == 8
    flat = torch.zeros(8, 3, 64, 64)
    assert 0 < worn(flat, torch.Generator().manual_seed(1)).std() < 0.1


def test_it_learns_to_tell_look_alikes_apart(tmp_path):
    pool = Pool(tmp_path, 256, "identity")
    pool.draw(lambda *_: None)
    torch.manual_seed(0)
    telling = Telling(encoder(), pool, PHOTOS_PER_SUBJECT, 32)
    losses = []

    def loss(step):
        losses.append(telling.loss(step))
        return losses[-1]

    fit(Plan("identity", 15, 32, 2e-3, warmup=3), telling, loss, tmp_path, lambda *_: None)
    before, after = (torch.stack(part).mean().item() for part in (losses[:3], losses[-3:]))
    telling.eval()
    with torch.no_grad():
        z = F.normalize(telling.model(pixel_values=pool.images(torch.arange(256))).logits, dim=1).unflatten(0, (8, GROUP, 4))
    within = torch.einsum("gspd,gsqd->gspq", z, z)[..., ~torch.eye(4, dtype=torch.bool)].mean().item()
    between = torch.einsum("gspd,gtqd->gstpq", z, z)[:, ~torch.eye(GROUP, dtype=torch.bool)].mean().item()
    assert after < before - 0.5
    assert within > between + 0.1, "closer to itself than to those who look alike"
