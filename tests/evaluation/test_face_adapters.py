"""FaceID adapters in an evaluation: its images are those of `generate`, references without a face, and identity encoders."""

import sys

import numpy as np
import pytest
import torch

from imprompt.config import EvaluateConfig, GenerateConfig, TrainConfig
from imprompt.core.adapter import Adapter
from imprompt.core.image_projection import FaceIDPlusProjection, FaceIDProjection
from imprompt.errors import UserError
from imprompt.evaluation import identity, metrics, report
from imprompt.evaluation.runner import Evaluation, run_evaluation
from imprompt.evaluation.samples import SamplingParams, load_eval_set
from imprompt.evaluation.systems import SystemLoader
from imprompt.generation.generate import generate_images
from imprompt.models import checkpoints, face_encoders
from imprompt.models.base_pipelines import load_pipeline
from imprompt.models.hub import MINI_PATH
from imprompt.models.image_prompt import load
from imprompt.training import train_adapter
from imprompt.unet.attn_processors import infer_adapter_shape

ID_EMBED_DIM = 12
SMALL = EvaluateConfig.from_options(
    data="mini", num_prompts=4, num_images_per_prompt=1, num_inference_steps=2, batch_size=2, bootstrap_samples=20
)
BY_SUBJECT = {"min_images_per_subject": 4, "prompt_mode": "caption"}
TARGET, TEXT = "target (upper bound)", "text only"


@pytest.fixture(autouse=True, scope="module")
def distributions_of_few_images():
    """Distances of distributions from two images on, which would be withheld."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("imprompt.evaluation.scoring.MIN_IMAGES_FOR_DISTRIBUTIONS", 2)
        yield


class FakeInsightFace:
    """Stands for InsightFace: the identity is the colors of an image, column by column; images in `without_face` have none."""

    without_face: tuple[bytes, ...] = ()

    def detect_faces(self, images, *, align=False):
        return [None if image.tobytes() in self.without_face else self.make_face(image, align=align) for image in images]

    def make_face(self, image, *, align):
        columns = torch.tensor(list(image.resize((ID_EMBED_DIM, 1)).convert("L").tobytes())).float()
        return face_encoders.Face(columns - 100, image.resize((32, 32)).rotate(90) if align else None)

    def embed(self, images):
        embeddings = [face.embedding if face else torch.zeros(ID_EMBED_DIM) for face in self.detect_faces(images)]
        return torch.nn.functional.normalize(torch.stack(embeddings), dim=1), torch.tensor([bool(e.any()) for e in embeddings])


@pytest.fixture
def insightface(monkeypatch):
    fake = FakeInsightFace()
    monkeypatch.setattr(face_encoders, "shared_insightface", lambda device="cpu": fake)
    return fake


def save_faceid_adapter(path, *, plus=False):
    """A FaceID adapter for mini's UNet with random weights and a LoRA in its first cross-attention."""
    torch.manual_seed(3)
    layers, cross_attention_dim = infer_adapter_shape(load_pipeline("mini", "cpu", torch.float32).unet)
    if plus:
        projection = FaceIDPlusProjection(ID_EMBED_DIM, 128, cross_attention_dim, 4, 24, num_heads=1, depth=1)
    else:
        projection = FaceIDProjection(ID_EMBED_DIM, cross_attention_dim, 4, 24)
    adapter = Adapter(projection, layers, cross_attention_dim)
    n, hidden = next(iter(layers.items()))
    adapter.add_lora(n, {name: (cross_attention_dim if name in "kv" else hidden, hidden, 3) for name in ("q", "k", "v", "out")})
    checkpoints.save(adapter, path)
    return str(path)


def configure(adapter, **options):
    return SMALL.with_options(adapter=(adapter,), image_encoder=str(MINI_PATH / "image_encoder"), **options)


def load_features(config, row_name):
    evaluation = Evaluation(config.with_defaults())
    return evaluation.load_features(next(row for row in evaluation.rows if row.name == row_name))


def differences(images, others):
    return np.abs(np.stack(images).astype(int) - np.stack(others))


@pytest.mark.bf16
@pytest.mark.parametrize("plus", [False, True])
def test_what_is_measured_is_what_is_generated(plus, cpu_bf16, tmp_path, insightface):
    """They differ by at most 2 of 255 in float32; in bfloat16 by less than bfloat16 differs from float32."""
    path = save_faceid_adapter(tmp_path / f"faceid{'-plus' * plus}.bin", plus=plus)
    config = configure(path).with_defaults()
    eval_set, loader = load_eval_set(config.dataset), SystemLoader.from_config(config)
    samples, params = [eval_set[i] for i in range(2)], SamplingParams(2, 3.0, (64, 64))
    measured = loader.load_system(path).generate(samples, ["", ""], [5, 6], params)

    def generate(dtype):
        options = {"adapter": path, "image_encoder": config.image_encoder, "scheduler": config.sampling.scheduler, "dtype": dtype}
        images = []
        for sample, seed in zip(samples, (5, 6), strict=True):
            sample.references[0].save(tmp_path / f"{seed}.png")
            more = {"image": str(tmp_path / f"{seed}.png"), "seed": seed, "num_inference_steps": 2, "num_images": 1}
            images.append(generate_images(GenerateConfig.from_options(**options, **more))[0].image)
        return images

    generated = generate("auto")
    if cpu_bf16:
        assert differences(measured, generated).mean() < differences(generated, generate("float32")).mean()
    else:
        assert differences(measured, generated).max() <= 2
    (without_image,) = loader.load_system("text").generate(samples[:1], [""], [5], params)
    assert without_image.tobytes() != measured[0].tobytes()


def test_plus_is_conditioned_on_the_aligned_face_and_not_on_the_whole_image(tmp_path, insightface):
    path, image = save_faceid_adapter(tmp_path / "faceid-plus.bin", plus=True), load_eval_set(SMALL.dataset)[0].target
    encoder = load(path, image_encoder=MINI_PATH / "image_encoder")
    features = encoder(image).image_features[0]
    aligned = insightface.make_face(image, align=True).aligned
    torch.testing.assert_close(features[:, 1:], encoder.encoder.image_encoder.encode_images([aligned], patches=True))
    # with face embeddings, the image is expected to be that of the face
    from_embeddings = encoder(aligned, face_embeds=features[:, 0, :ID_EMBED_DIM]).image_features[0]
    torch.testing.assert_close(features, from_embeddings)


@pytest.mark.parametrize(("name", "norm"), [("faceid-portrait.bin", 1.0), ("faceid-portrait_unnorm.bin", None)])
def test_identity_embeddings_are_normalized_as_the_adapter_was_trained(name, norm, tmp_path, insightface):
    image = load_eval_set(SMALL.dataset)[0].target
    features = load(save_faceid_adapter(tmp_path / name))(image).image_features
    assert features.norm().item() == pytest.approx(norm or insightface.make_face(image, align=False).embedding.norm().item())


def test_a_row_that_skipped_prompts_is_compared_with_the_targets_of_the_others(tmp_path, insightface):
    config = configure(save_faceid_adapter(tmp_path / "faceid.bin"), output_dir=str(tmp_path / "out"), num_prompts=6)
    insightface.without_face = (load_eval_set(config.dataset)[2].references[0].tobytes(),)
    list(run_evaluation(config))
    evaluation = Evaluation(config.with_defaults())
    score = report.score_row(evaluation, next(row for row in evaluation.rows if row.name == "faceid"))
    features, targets = load_features(config, "faceid"), load_features(config, TARGET)
    expected = metrics.frechet_distance(targets["features"][[0, 1, 3, 4, 5]], features["features"])
    assert score.metrics["FD (mini)"].value == pytest.approx(expected, rel=1e-6)
    assert score.num_skipped == 1 and "5 (1 prompts skipped)" in report.scores_to_markdown([score])


def test_a_reference_without_a_face_is_skipped_in_that_row_only(tmp_path, insightface):
    config = configure(save_faceid_adapter(tmp_path / "faceid.bin"), output_dir=str(tmp_path / "out"))
    insightface.without_face = (load_eval_set(config.dataset)[2].references[0].tobytes(),)
    list(run_evaluation(config))
    assert not load_features(config, TARGET).skipped and not load_features(config, TEXT).skipped
    features = load_features(config, "faceid")
    assert features.skipped.keys() == {"2"} and "no face was detected in the 1 reference(s)" in features.skipped["2"]
    assert features["prompt_index"].tolist() == [0, 1, 3]


def test_of_several_references_those_with_a_face_are_used(tmp_path, insightface):
    path = save_faceid_adapter(tmp_path / "faceid.bin")
    config = configure(path, num_references=3, num_prompts=2, **BY_SUBJECT).with_defaults()
    sample = load_eval_set(config.dataset)[0]
    first, second, third = sample.references
    insightface.without_face = (first.tobytes(),)
    usable = SystemLoader.from_config(config).load_system(path).keep_usable_references(sample)
    assert [image.tobytes() for image in usable.references] == [image.tobytes() for image in (second, third, second)]


def test_the_encoder_that_conditions_cannot_measure_identity(tmp_path, insightface, monkeypatch):
    path = save_faceid_adapter(tmp_path / "faceid.bin")
    config = configure(path, output_dir=str(tmp_path / "out"), identity_encoder="insightface", **BY_SUBJECT)
    monkeypatch.setattr(identity, "InsightFace", lambda device: insightface)
    insightface.name = "insightface"
    with pytest.raises(UserError, match="InsightFace cannot measure its identity; expected another encoder: --identity-encoder facenet"):
        list(run_evaluation(config))
    list(run_evaluation(config.with_options(adapter=("mini",), image_encoder=None)))


def test_without_identity_metrics_every_adapter_can_be_measured(tmp_path, insightface):
    path = save_faceid_adapter(tmp_path / "faceid.bin")
    list(run_evaluation(configure(path, identity_encoder="insightface", output_dir=str(tmp_path / "out"))))
    with pytest.raises(UserError, match="the row 'reference' exists only with --min-images-per-subject"):
        list(run_evaluation(SMALL.with_options(baseline=("reference",), output_dir=str(tmp_path / "other"))))


def test_a_missing_insightface_is_reported_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "insightface", None)
    monkeypatch.setitem(sys.modules, "insightface.app", None)
    face_encoders.shared_insightface.cache_clear()
    config = configure(save_faceid_adapter(tmp_path / "faceid.bin"), output_dir=str(tmp_path / "out"))
    with pytest.raises(UserError, match="insightface is not installed"):
        list(run_evaluation(config))
    assert not (tmp_path / "out" / "rows").exists()


def test_training_does_not_start_from_a_faceid_adapter(tmp_path):
    options = {"data": "mini:8", "max_train_steps": 1, "train_batch_size": 2, "output_dir": str(tmp_path / "run")}
    config = TrainConfig.from_options(adapter=save_faceid_adapter(tmp_path / "faceid.bin"), **options)
    with pytest.raises(UserError, match="is of the FaceID family, which generates but cannot be trained here"):
        next(train_adapter(config))
