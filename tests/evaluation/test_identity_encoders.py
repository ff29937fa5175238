"""Identity metrics against values computed by hand, and the identity encoders: mini's own, and those of faces with fake packages."""

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
from imprompt.evaluation.identity import load_identity_encoder
from imprompt.evaluation.metrics import identity_centroid, identity_similarity, rank1_identification, verification_threshold
from imprompt.mini import world

# Metrics


def test_the_centroid_is_the_mean_direction_of_detected_embeddings():
    gallery = torch.tensor([[3.0, 0.0], [0.0, 0.5], [-9.0, 0.0]])
    detected = torch.tensor([True, True, False])
    assert identity_centroid(gallery, detected).tolist() == pytest.approx([math.sqrt(0.5)] * 2)
    assert identity_centroid(gallery, ~detected).tolist() == [-1, 0]
    assert identity_centroid(gallery, torch.zeros(3, dtype=torch.bool)).tolist() == [0, 0]


def test_identity_similarity_is_the_cosine_to_the_centroid_and_nan_without_detection():
    gallery = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
    gallery_detected = torch.tensor([True, True, False])
    generated = torch.tensor([[2.0, 2.0], [1.0, 0.0], [1.0, -1.0], [-3.0, -3.0], [0.0, 0.0]])
    similarity = identity_similarity(generated, torch.tensor([True, True, True, True, False]), gallery, gallery_detected)
    assert similarity[:4].tolist() == pytest.approx([1, math.sqrt(0.5), 0, -1], abs=1e-12) and similarity[4].isnan()
    assert identity_similarity(generated, torch.ones(5, dtype=torch.bool), gallery, torch.zeros(3, dtype=torch.bool)).isnan().all()


def test_rank1_identification_is_more_similar_to_its_own_subject_than_to_every_other():
    centroids = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    generated = torch.tensor([[9.0, 1.0], [9.0, 1.0], [1.0, 2.0], [1.0, 3.0], [0.0, 0.0], [-1.0, -1.0]])
    subjects = torch.tensor([0, 2, 2, 1, 0, 3])
    assert rank1_identification(generated, subjects, centroids).tolist() == [True, False, True, True, False, False]
    assert not rank1_identification(generated[:1], subjects[:1], centroids[[0, 0]]).any(), "an equal subject"
    with pytest.raises(ValueError, match="at least 2 rows, received 1"):
        rank1_identification(generated, subjects, centroids[:1])


def test_the_threshold_accepts_the_allowed_share_of_different_pairs():
    different = torch.arange(300) / 1000  # 0 … 0.299
    threshold = verification_threshold(torch.tensor([0.296, 0.297, 0.5, 0.1]), different, 0.01)
    assert threshold.value == pytest.approx(0.296) and (different > threshold.value).sum() == 3
    assert threshold.true_accept_rate == 0.5, "a pair on the threshold is not accepted"
    assert verification_threshold(different, different, 0.5).true_accept_rate == 0.5
    with pytest.raises(ValueError, match=r"at least 1 / rate different pairs, received 0\.01 and 99 pairs"):
        verification_threshold(different, different[:99])


def test_shapes_that_do_not_fit_are_rejected():
    with pytest.raises(ValueError, match=r"expected detected of shape \(2,\), received \(1,\)"):
        identity_centroid(torch.ones(2, 3), torch.tensor([True]))
    with pytest.raises(ValueError, match=r"expected features of shape \(n, width\), received \(3,\)"):
        identity_similarity(torch.ones(3), torch.tensor([True]), torch.ones(1, 3), torch.tensor([True]))


# Mini's own


@pytest.fixture(scope="module")
def subjects():
    return list(itertools.islice(world.iterate_subjects(held_out=True), 50))


@pytest.fixture(scope="module")
def embeddings(subjects):
    """(subjects, images, width): held-out subjects, each in six scenes of its own."""
    images = [world.render(s, world.make_scene(40_000_000 + 6 * i + j)) for i, s in enumerate(subjects) for j in range(6)]
    embeddings, detected = load_identity_encoder("mini").embed(images)
    assert detected.all() and torch.allclose(embeddings.norm(dim=1), torch.ones(300), atol=1e-5)
    return embeddings.unflatten(0, (50, 6))


def test_mini_identifies_held_out_subjects_in_other_scenes(embeddings):
    """One image against five others of each subject. Measured: 1.00."""
    galleries = torch.stack([identity_centroid(images[1:], torch.ones(5, dtype=torch.bool)) for images in embeddings])
    assert rank1_identification(embeddings[:, 0], torch.arange(50), galleries).double().mean() >= 0.96


@pytest.mark.parametrize(("look_alikes", "min_true_accept_rate"), [(False, 0.97), (True, 0.8)])
def test_mini_verifies_held_out_subjects(embeddings, subjects, look_alikes, min_true_accept_rate):
    """At a false accept rate of 1 %. Measured true accept rate: 1.00; .91 for look-alikes of the same category, color and pattern."""
    cosines = torch.einsum("spd,tqd->stpq", embeddings, embeddings)
    same = cosines.diagonal()[torch.triu(torch.ones(6, 6, dtype=torch.bool), 1)].flatten()
    attributes = [(s.category, s.color, s.pattern) for s in subjects]
    different_pairs = [(i, j) for i, j in itertools.combinations(range(50), 2) if not look_alikes or attributes[i] == attributes[j]]
    assert len(different_pairs) == (36 if look_alikes else 1225)
    threshold = verification_threshold(same, torch.stack([cosines[pair] for pair in different_pairs]).flatten())
    assert threshold.true_accept_rate >= min_true_accept_rate


def test_minis_embeddings_depend_neither_on_image_size_nor_on_the_batch():
    encoder = load_identity_encoder("mini")
    image = world.render(world.make_subject(0), world.make_scene(0))
    large = image.resize((256, 256), Image.Resampling.BICUBIC)
    single, batch = encoder.embed([image])[0], encoder.embed([large, image, Image.new("RGB", (64, 64))])[0]
    assert torch.allclose(single[0], batch[1], atol=1e-5)
    assert single[0] @ batch[0] > 0.95 and single[0] @ batch[2] < 0.95


def test_without_its_weights_mini_names_the_command_that_builds_them(tmp_path, monkeypatch):
    monkeypatch.setattr(identity, "MINI_PATH", tmp_path)
    with pytest.raises(UserError, match=r"not there; .* imprompt mini build --install"):
        load_identity_encoder("mini")
    (tmp_path / "identity").mkdir()
    (tmp_path / "identity" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"does not load .* imprompt mini build --install"):
        load_identity_encoder("mini")


def test_an_unknown_encoder_is_rejected_with_the_known_ones():
    with pytest.raises(UserError, match="one of mini, insightface, facenet, received 'arcface'"):
        load_identity_encoder("arcface")


# Face encoders, with fake packages


def make_face(box, embedding):
    return SimpleNamespace(bbox=np.array(box, dtype=np.float32), embedding=3 * np.array(embedding, dtype=np.float32), kps=box)


def unit_vector(index):
    return np.eye(512, dtype=np.float32)[index]


class FakeFaceAnalysis:
    """Stands for insightface's FaceAnalysis: detects the faces of `results`, call by call, and records its inputs."""

    results, inputs, settings = (), [], {}

    def __init__(self, name, **settings):
        print("find model: …")
        FakeFaceAnalysis.settings = {"name": name} | settings
        FakeFaceAnalysis.inputs = []

    def prepare(self, **settings):
        FakeFaceAnalysis.settings |= settings

    def get(self, array):
        FakeFaceAnalysis.inputs.append(array)
        return FakeFaceAnalysis.results[len(FakeFaceAnalysis.inputs) - 1]


def install_fake_insightface(monkeypatch, analysis=FakeFaceAnalysis):
    module, app = ModuleType("insightface"), ModuleType("insightface.app")
    app.FaceAnalysis = analysis
    monkeypatch.setitem(sys.modules, "insightface", module)
    monkeypatch.setitem(sys.modules, "insightface.app", app)


def test_insightface_embeds_the_largest_face_and_gets_bgr(monkeypatch, capsys):
    install_fake_insightface(monkeypatch)
    FakeFaceAnalysis.results = [
        [make_face((0, 0, 9, 9), unit_vector(3)), make_face((10, 0, 20, 30), unit_vector(5)), make_face((0, 0, 12, 12), unit_vector(7))]
    ]
    encoder = load_identity_encoder("insightface")
    embeddings, detected = encoder.embed([Image.new("RGB", (40, 20), (1, 2, 3))])
    assert embeddings.shape == (1, 512) and embeddings[0].argmax() == 5 and detected.tolist() == [True]
    (image,) = FakeFaceAnalysis.inputs
    assert image.shape == (20, 40, 3) and image[0, 0].tolist() == [3, 2, 1] and image.flags.c_contiguous
    assert FakeFaceAnalysis.settings["name"] == "buffalo_l" and FakeFaceAnalysis.settings["ctx_id"] == -1
    assert set(FakeFaceAnalysis.settings["allowed_modules"]) == {"detection", "recognition"}
    assert capsys.readouterr().out == "", "its prints would corrupt JSON output"


def test_insightface_detects_again_with_a_margin_before_it_gives_up(monkeypatch):
    install_fake_insightface(monkeypatch)
    FakeFaceAnalysis.results = [[], [make_face((10, 5, 20, 15), 2 * unit_vector(1))], [], []]
    embeddings, detected = load_identity_encoder("insightface").embed(
        [Image.new("RGB", (40, 20), "red"), Image.new("RGB", (40, 20), "blue")]
    )
    assert [array.shape for array in FakeFaceAnalysis.inputs] == [(20, 40, 3), (40, 80, 3)] * 2
    assert (FakeFaceAnalysis.inputs[1][10:30, 20:60] == FakeFaceAnalysis.inputs[0]).all()
    assert detected.tolist() == [True, False] and embeddings.norm(dim=1).tolist() == [1, 0] and embeddings[0].argmax() == 1


def test_insightface_aligns_the_detected_face(monkeypatch):
    """Where the face was detected with a margin, the landmarks are those of the image with the margin."""
    install_fake_insightface(monkeypatch)
    calls = []

    def norm_crop(image, landmark, image_size):
        calls.append((image.shape, landmark, image_size))
        return np.full((image_size, image_size, 3), (7, 8, 9), np.uint8)

    utils, align = ModuleType("insightface.utils"), ModuleType("insightface.utils.face_align")
    align.norm_crop, utils.face_align = norm_crop, align
    monkeypatch.setitem(sys.modules, "insightface.utils", utils)
    monkeypatch.setitem(sys.modules, "insightface.utils.face_align", align)
    FakeFaceAnalysis.results = [[make_face((0, 0, 9, 9), unit_vector(3))], [], [make_face((10, 5, 20, 15), unit_vector(1))], [], []]
    images = [Image.new("RGB", (40, 20), "red"), Image.new("RGB", (40, 20), "blue"), Image.new("RGB", (40, 20))]
    first, second, missing = load_identity_encoder("insightface").detect_faces(images, align=True)
    assert missing is None and calls == [((20, 40, 3), (0, 0, 9, 9), 224), ((40, 80, 3), (10, 5, 20, 15), 224)]
    assert first.aligned.size == (224, 224) and first.aligned.getpixel((0, 0)) == (9, 8, 7)
    assert first.embedding.norm() == 3 and second.embedding.argmax() == 1, "as the encoder gives it"


def test_insightface_runs_on_the_given_device(monkeypatch):
    install_fake_insightface(monkeypatch)
    load_identity_encoder("insightface", "cuda:2")
    assert FakeFaceAnalysis.settings["ctx_id"] == 2 and FakeFaceAnalysis.settings["providers"] == [
        "CUDAExecutionProvider",
        "CPUExecutionProvider",
    ]


class FakeMTCNN:
    """Stands for facenet-pytorch's MTCNN: no face in black images, else a crop filled with the red value of the first pixel."""

    def __init__(self, **settings):
        FakeMTCNN.settings = settings

    def __call__(self, image):
        red = image.getpixel((0, 0))[0]
        return torch.full((3, 160, 160), float(red)) if red else None


class FakeInceptionResnet(torch.nn.Module):
    """Stands for InceptionResnetV1: the unit vector at the index that the crop's value names."""

    def __init__(self, pretrained):
        super().__init__()
        assert pretrained == "vggface2"

    def forward(self, crops):
        assert crops.shape[1:] == (3, 160, 160) and not self.training and not torch.is_grad_enabled()
        return 2 * torch.eye(512)[crops[:, 0, 0, 0].long()]


def install_fake_facenet(monkeypatch, detector=FakeMTCNN, model=FakeInceptionResnet):
    module = ModuleType("facenet_pytorch")
    module.MTCNN, module.InceptionResnetV1 = detector, model
    monkeypatch.setitem(sys.modules, "facenet_pytorch", module)


def test_facenet_embeds_the_crop_of_the_largest_face(monkeypatch):
    install_fake_facenet(monkeypatch)
    images = [Image.new("RGB", (30, 20), (7, 0, 0)), Image.new("RGB", (64, 64)), Image.new("L", (9, 9), 9)]
    embeddings, detected = load_identity_encoder("facenet").embed(images)
    assert detected.tolist() == [True, False, True] and embeddings.norm(dim=1).tolist() == [1, 0, 1]
    assert embeddings.argmax(1)[[0, 2]].tolist() == [7, 9]
    assert FakeMTCNN.settings == {"image_size": 160, "margin": 0, "select_largest": True, "device": "cpu"}


@pytest.mark.parametrize(("source", "missing", "command"), [
    ("insightface", ("insightface", "insightface.app"), r"pip install 'imprompt\[faces\]'"),
    ("facenet", ("facenet_pytorch",), "pip install --no-deps facenet-pytorch"),
])  # fmt: skip
def test_missing_packages_are_reported_with_the_command_that_installs_them(monkeypatch, source, missing, command):
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=command):
        load_identity_encoder(source)


def raise_download_error(*_, **__):
    raise RuntimeError("Failed downloading url\nand a second line")


@pytest.mark.parametrize(("source", "install"), [
    ("insightface", lambda patch: install_fake_insightface(patch, raise_download_error)),
    ("facenet", lambda patch: install_fake_facenet(patch, model=raise_download_error)),
])  # fmt: skip
def test_models_that_do_not_load_are_reported_in_one_sentence(monkeypatch, source, install):
    install(monkeypatch)
    with pytest.raises(UserError, match=r"do not load \(Failed downloading url\)") as error:
        load_identity_encoder(source)
    assert "\n" not in str(error.value)
