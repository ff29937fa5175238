"""Figures of identity against what one works out by hand, and the encoders that give them: mini's own, and faces by stand-ins."""

import itertools
import math
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from imprompt.errors import UserError
from imprompt.evaluation import identity
from imprompt.evaluation.identity import load_identity
from imprompt.evaluation.metrics import centroid, likeness, recognised, threshold
from imprompt.mini import world

# Figures


def test_a_centroid_is_the_direction_between_those_found():
    gallery = torch.tensor([[3.0, 0.0], [0.0, 0.5], [-9.0, 0.0]])
    found = torch.tensor([True, True, False])
    assert centroid(gallery, found).tolist() == pytest.approx([math.sqrt(0.5)] * 2)
    assert centroid(gallery, ~found).tolist() == [-1, 0]
    assert centroid(gallery, torch.zeros(3, dtype=torch.bool)).tolist() == [0, 0]


def test_likeness_is_the_cosine_with_the_centroid_and_nan_for_nobody():
    gallery = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
    seen = torch.tensor([True, True, False])
    drawn = torch.tensor([[2.0, 2.0], [1.0, 0.0], [1.0, -1.0], [-3.0, -3.0], [0.0, 0.0]])
    alike = likeness(drawn, torch.tensor([True, True, True, True, False]), gallery, seen)
    assert alike[:4].tolist() == pytest.approx([1, math.sqrt(0.5), 0, -1], abs=1e-12) and alike[4].isnan()
    assert likeness(drawn, torch.ones(5, dtype=torch.bool), gallery, torch.zeros(3, dtype=torch.bool)).isnan().all()


def test_recognised_is_nearer_to_its_own_than_to_every_other():
    centroids = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    drawn = torch.tensor([[9.0, 1.0], [9.0, 1.0], [1.0, 2.0], [1.0, 3.0], [0.0, 0.0], [-1.0, -1.0]])
    which = torch.tensor([0, 2, 2, 1, 0, 3])
    assert recognised(drawn, which, centroids).tolist() == [True, False, True, True, False, False]
    assert not recognised(drawn[:1], which[:1], centroids[[0, 0]]).any(), "an equal subject"
    with pytest.raises(ValueError, match="at least 2 rows, received 1"):
        recognised(drawn, which, centroids[:1])


def test_the_threshold_lets_the_allowed_share_of_strangers_pass():
    different = torch.arange(300) / 1000  # 0 … 0.299
    found = threshold(torch.tensor([0.296, 0.297, 0.5, 0.1]), different, 0.01)
    assert found.value == pytest.approx(0.296) and (different > found.value).sum() == 3
    assert found.accepted == 0.5, "what lies on the threshold does not pass"
    assert threshold(different, different, 0.5).accepted == 0.5
    with pytest.raises(ValueError, match=r"at least 1 / rate different pairs, received 0\.01 and 99 pairs"):
        threshold(different, different[:99])


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"expected found of shape \(2,\), received \(1,\)"):
        centroid(torch.ones(2, 3), torch.tensor([True]))
    with pytest.raises(ValueError, match=r"expected features of shape \(n, width\), received \(3,\)"):
        likeness(torch.ones(3), torch.tensor([True]), torch.ones(1, 3), torch.tensor([True]))


# Mini's own


@pytest.fixture(scope="module")
def whom():
    return list(itertools.islice(world.subjects(held_out=True), 50))


@pytest.fixture(scope="module")
def seen(whom):
    """(subjects, photographs, width): held-out subjects, each in six scenes of its own."""
    images = [world.draw(s, world.scene(40_000_000 + 6 * i + j)) for i, s in enumerate(whom) for j in range(6)]
    embedded, found = load_identity("mini").embed(images)
    assert found.all() and torch.allclose(embedded.norm(dim=1), torch.ones(300), atol=1e-5)
    return embedded.unflatten(0, (50, 6))


def test_mini_recognises_held_out_subjects_elsewhere(seen):
    """One photograph against five others of each. Measured: 1.00."""
    galleries = torch.stack([centroid(photos[1:], torch.ones(5, dtype=torch.bool)) for photos in seen])
    assert recognised(seen[:, 0], torch.arange(50), galleries).double().mean() >= 0.96


@pytest.mark.parametrize("look_alikes, least", [(False, 0.97), (True, 0.8)])
def test_mini_verifies_held_out_subjects(seen, whom, look_alikes, least):
    """At one false accept in a hundred; measured: 1.00 of true pairs pass, .91 where strangers have kind, colour and pattern in common."""
    alike = torch.einsum("spd,tqd->stpq", seen, seen)
    same = alike.diagonal()[torch.triu(torch.ones(6, 6, dtype=torch.bool), 1)].flatten()
    sorts = [(s.kind, s.colour, s.pattern) for s in whom]
    others = [(i, j) for i, j in itertools.combinations(range(50), 2) if not look_alikes or sorts[i] == sorts[j]]
    assert len(others) == (36 if look_alikes else 1225)
    found = threshold(same, torch.stack([alike[pair] for pair in others]).flatten())
    assert found.accepted >= least


def test_mini_takes_pictures_of_any_size_and_gives_the_same_in_any_company():
    encoder = load_identity("mini")
    image = world.draw(world.subject(0), world.scene(0))
    large = image.resize((256, 256), Image.Resampling.BICUBIC)
    alone, company = encoder.embed([image])[0], encoder.embed([large, image, Image.new("RGB", (64, 64))])[0]
    assert torch.allclose(alone[0], company[1], atol=1e-5)
    assert alone[0] @ company[0] > 0.95 and alone[0] @ company[2] < 0.95


def test_mini_without_its_part_says_how_to_make_it(tmp_path, monkeypatch):
    monkeypatch.setattr(identity, "MINI", tmp_path)
    with pytest.raises(UserError, match=r"not there; .* imprompt mini make --install"):
        load_identity("mini")
    (tmp_path / "identity").mkdir()
    (tmp_path / "identity" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"does not load .* imprompt mini make --install"):
        load_identity("mini")


def test_an_unknown_source_names_those_there_are():
    with pytest.raises(UserError, match="one of mini, insightface, facenet, received 'arcface'"):
        load_identity("arcface")


# Faces, with stand-ins for what the extras bring


def face(box, embedding):
    return SimpleNamespace(bbox=np.array(box, dtype=np.float32), embedding=3 * np.array(embedding, dtype=np.float32), kps=box)


def unit(at):
    return np.eye(512, dtype=np.float32)[at]


class Analysis:
    """Stands for insightface's FaceAnalysis: finds what `plan` says, call by call, and remembers what it was shown."""

    plan, shown, settings = (), [], {}

    def __init__(self, name, **settings):
        print("find model: …")
        Analysis.settings = {"name": name} | settings
        Analysis.shown = []

    def prepare(self, **settings):
        Analysis.settings |= settings

    def get(self, array):
        Analysis.shown.append(array)
        return Analysis.plan[len(Analysis.shown) - 1]


def stand_in(monkeypatch, analysis=Analysis):
    module, app = ModuleType("insightface"), ModuleType("insightface.app")
    app.FaceAnalysis = analysis
    monkeypatch.setitem(sys.modules, "insightface", module)
    monkeypatch.setitem(sys.modules, "insightface.app", app)


def test_insightface_takes_the_largest_face_in_blue_green_red(monkeypatch, capsys):
    stand_in(monkeypatch)
    Analysis.plan = [[face((0, 0, 9, 9), unit(3)), face((10, 0, 20, 30), unit(5)), face((0, 0, 12, 12), unit(7))]]
    encoder = load_identity("insightface")
    embedded, found = encoder.embed([Image.new("RGB", (40, 20), (1, 2, 3))])
    assert embedded.shape == (1, 512) and embedded[0].argmax() == 5 and found.tolist() == [True]
    (shown,) = Analysis.shown
    assert shown.shape == (20, 40, 3) and shown[0, 0].tolist() == [3, 2, 1] and shown.flags.c_contiguous
    assert Analysis.settings["name"] == "buffalo_l" and Analysis.settings["ctx_id"] == -1
    assert set(Analysis.settings["allowed_modules"]) == {"detection", "recognition"}
    assert capsys.readouterr().out == "", "what it prints would stand in our JSON"


def test_insightface_looks_again_with_a_margin_and_then_finds_nobody(monkeypatch):
    stand_in(monkeypatch)
    Analysis.plan = [[], [face((10, 5, 20, 15), 2 * unit(1))], [], []]
    embedded, found = load_identity("insightface").embed([Image.new("RGB", (40, 20), "red"), Image.new("RGB", (40, 20), "blue")])
    assert [array.shape for array in Analysis.shown] == [(20, 40, 3), (40, 80, 3)] * 2
    assert (Analysis.shown[1][10:30, 20:60] == Analysis.shown[0]).all()
    assert found.tolist() == [True, False] and embedded.norm(dim=1).tolist() == [1, 0] and embedded[0].argmax() == 1


def test_insightface_turns_the_face_that_it_found_upright(monkeypatch):
    """Where it had to look with a margin, the points are those of the picture with the margin."""
    stand_in(monkeypatch)
    told = []

    def norm_crop(picture, landmark, image_size):
        told.append((picture.shape, landmark, image_size))
        return np.full((image_size, image_size, 3), (7, 8, 9), np.uint8)

    utils, align = ModuleType("insightface.utils"), ModuleType("insightface.utils.face_align")
    align.norm_crop, utils.face_align = norm_crop, align
    monkeypatch.setitem(sys.modules, "insightface.utils", utils)
    monkeypatch.setitem(sys.modules, "insightface.utils.face_align", align)
    Analysis.plan = [[face((0, 0, 9, 9), unit(3))], [], [face((10, 5, 20, 15), unit(1))], [], []]
    images = [Image.new("RGB", (40, 20), "red"), Image.new("RGB", (40, 20), "blue"), Image.new("RGB", (40, 20))]
    first, second, nobody = load_identity("insightface").faces(images, upright=True)
    assert nobody is None and told == [((20, 40, 3), (0, 0, 9, 9), 224), ((40, 80, 3), (10, 5, 20, 15), 224)]
    assert first.picture.size == (224, 224) and first.picture.getpixel((0, 0)) == (9, 8, 7)
    assert first.embedding.norm() == 3 and second.embedding.argmax() == 1, "as the encoder gives it"


def test_insightface_runs_where_it_is_told(monkeypatch):
    stand_in(monkeypatch)
    load_identity("insightface", "cuda:2")
    assert Analysis.settings["ctx_id"] == 2 and Analysis.settings["providers"] == ["CUDAExecutionProvider", "CPUExecutionProvider"]


class Detector:
    """Stands for facenet-pytorch's MTCNN: nobody in black pictures, else a crop of their first pixel's red."""

    def __init__(self, **settings):
        Detector.settings = settings

    def __call__(self, image):
        red = image.getpixel((0, 0))[0]
        return torch.full((3, 160, 160), float(red)) if red else None


class Inception(torch.nn.Module):
    """Stands for InceptionResnetV1: the direction that its crop's value names."""

    def __init__(self, pretrained):
        super().__init__()
        assert pretrained == "vggface2"

    def forward(self, crops):
        assert crops.shape[1:] == (3, 160, 160) and not self.training and not torch.is_grad_enabled()
        return 2 * torch.eye(512)[crops[:, 0, 0, 0].long()]


def facenet(monkeypatch, detector=Detector, model=Inception):
    module = ModuleType("facenet_pytorch")
    module.MTCNN, module.InceptionResnetV1 = detector, model
    monkeypatch.setitem(sys.modules, "facenet_pytorch", module)


def test_facenet_sees_the_crop_of_the_largest_face(monkeypatch):
    facenet(monkeypatch)
    images = [Image.new("RGB", (30, 20), (7, 0, 0)), Image.new("RGB", (64, 64)), Image.new("L", (9, 9), 9)]
    embedded, found = load_identity("facenet").embed(images)
    assert found.tolist() == [True, False, True] and embedded.norm(dim=1).tolist() == [1, 0, 1]
    assert embedded.argmax(1)[[0, 2]].tolist() == [7, 9]
    assert Detector.settings == {"image_size": 160, "margin": 0, "select_largest": True, "device": "cpu"}


@pytest.mark.parametrize("source, missing, line", [
    ("insightface", ("insightface", "insightface.app"), r"pip install 'imprompt\[faces\]'"),
    ("facenet", ("facenet_pytorch",), "pip install --no-deps facenet-pytorch"),
])  # fmt: skip
def test_missing_packages_are_told_with_the_line_that_installs_them(monkeypatch, source, missing, line):
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=line):
        load_identity(source)


def broken(*_, **__):
    raise RuntimeError("Failed downloading url\nand a second line")


@pytest.mark.parametrize("source, place", [
    ("insightface", lambda patch: stand_in(patch, broken)),
    ("facenet", lambda patch: facenet(patch, model=broken)),
])  # fmt: skip
def test_models_that_do_not_load_are_told_in_one_sentence(monkeypatch, source, place):
    place(monkeypatch)
    with pytest.raises(UserError, match=r"do not load \(Failed downloading url\)") as told:
        load_identity(source)
    assert "\n" not in str(told.value)
