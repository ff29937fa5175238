"""Adapters that hear who somebody is, measured: what is drawn, photographs without a face, and judges that may not judge."""

import sys
from dataclasses import replace

import pytest
import torch

from imprompt.config import EvaluateConfig, TrainConfig
from imprompt.core.adapter import Adapter
from imprompt.core.image_projection import FaceIDPlusProjection, FaceIDProjection
from imprompt.errors import UserError
from imprompt.evaluation import identity, metrics, report
from imprompt.evaluation import runner as suite
from imprompt.evaluation.samples import SamplingParams, load_eval_set
from imprompt.evaluation.scoring import RowFeatures
from imprompt.evaluation.systems import load_system
from imprompt.models import checkpoints
from imprompt.models import face_encoders as faces
from imprompt.models.base_pipelines import load_pipeline, sample_images, use_scheduler
from imprompt.models.hub import MINI_PATH
from imprompt.models.image_prompt import load
from imprompt.training import train_adapter
from imprompt.unet.attn_processors import infer_adapter_shape
from imprompt.unet.injection import attach

FACE = 12
SMALL = EvaluateConfig.from_options(
    data="mini", num_prompts=4, num_images_per_prompt=1, num_inference_steps=2, batch_size=2, bootstrap_samples=20
)


class Finder:
    """Stands for InsightFace: the picture's colors, column by column, are the face; pictures in `nobody` have none."""

    nobody: tuple[bytes, ...] = ()

    def detect_faces(self, images, *, align=False):
        return [None if image.tobytes() in self.nobody else self.face(image, align=align) for image in images]

    def face(self, image, *, align):
        small = torch.tensor(list(image.resize((FACE, 1)).convert("L").tobytes())).float()
        return faces.Face(small - 100, image.resize((32, 32)).rotate(90) if align else None)

    def embed(self, images):
        found = [face.embedding if face else torch.zeros(FACE) for face in self.detect_faces(images)]
        return torch.nn.functional.normalize(torch.stack(found), dim=1), torch.tensor([bool(f.any()) for f in found])


@pytest.fixture
def finder(monkeypatch):
    found = Finder()
    monkeypatch.setattr(faces, "shared_insightface", lambda device="cpu": found)
    return found


def saved(path, plus=False):
    """An adapter of the family for mini's UNet, at random, with low-rank parts in its first cross-attention."""
    torch.manual_seed(3)
    layers, cross = infer_adapter_shape(load_pipeline("mini", "cpu", torch.float32).unet)
    projector = FaceIDPlusProjection(FACE, 128, cross, 4, 24, num_heads=1, depth=1) if plus else FaceIDProjection(FACE, cross, 4, 24)
    adapter = Adapter(projector, layers, cross)
    n, hidden = next(iter(layers.items()))
    adapter.add_lora(n, {part: (cross if part in "kv" else hidden, hidden, 3) for part in ("q", "k", "v", "out")})
    checkpoints.save(adapter, path)
    return str(path)


def settings(path, **more):
    return replace(SMALL, adapter=(path,), encoder=str(MINI_PATH / "image_encoder"), **more)


@pytest.mark.parametrize("plus", [False, True])
def test_what_is_measured_is_what_is_generated(plus, tmp_path, finder):
    path = saved(tmp_path / f"faceid{'-plus' * plus}.bin", plus)
    choice = settings(path).with_defaults()
    cases = [load_eval_set(choice)[i] for i in range(2)]
    contender = load_system(path, choice)
    drawn = contender.generate(cases, ["", ""], [5, 6], SamplingParams(2, 3.0, (64, 64)))
    pipe = load_pipeline("mini", "cpu", torch.float32)
    ip = load(path, image_encoder=choice.image_encoder)
    for case, seed, picture in zip(cases, (5, 6), drawn, strict=True):
        with attach(pipe, ip(case.references[0])), use_scheduler(pipe, choice.scheduler, 2):
            (expected,) = sample_images(pipe, [""], 2, [seed], (64, 64), 3.0)
        apart = torch.tensor(list(expected.tobytes())).float() - torch.tensor(list(picture.tobytes())).float()
        assert apart.abs().max() <= 2
    (plain,) = load_system("text", choice).generate(cases[:1], [""], [5], SamplingParams(2, 3.0, (64, 64)))
    assert plain.tobytes() != drawn[0].tobytes()


def test_plus_hears_the_upright_face_and_not_the_whole_picture(tmp_path, finder):
    path, picture = saved(tmp_path / "faceid-plus.bin", plus=True), load_eval_set(SMALL.with_defaults())[0].target
    ip = load(path, image_encoder=MINI_PATH / "image_encoder")
    heard = ip(picture).image_features[0]
    upright = finder.face(picture, align=True).aligned
    torch.testing.assert_close(heard[:, 1:], ip.encoder.image_encoder.encode_images([upright], patches=True))
    given = ip(upright, face_embeds=heard[:, 0, :FACE]).image_features[0]  # beside embeddings the picture is the face's already
    torch.testing.assert_close(heard, given)


@pytest.mark.parametrize(("name", "length"), [("faceid-portrait.bin", 1.0), ("faceid-portrait_unnorm.bin", None)])
def test_identities_are_of_the_length_that_the_adapter_was_trained_with(name, length, tmp_path, finder):
    picture = load_eval_set(SMALL.with_defaults())[0].target
    heard = load(saved(tmp_path / name))(picture).image_features
    assert heard.norm().item() == pytest.approx(length or finder.face(picture, align=False).embedding.norm().item())


def test_a_row_that_left_prompts_out_is_compared_without_them(tmp_path, finder):
    """FID of the copy without the prompt, to itself: nought."""
    path = saved(tmp_path / "faceid.bin")
    choice = settings(path, out=str(tmp_path / "out"), limit=6)
    finder.nobody = (load_eval_set(choice)[2].references[0].tobytes(),)
    list(suite.run_evaluation(choice))
    studio = suite.EvaluationWorker(choice.with_defaults())
    row = next(row for row in suite.build_rows(studio.config, studio.eval_set) if row.name == "faceid")
    score = report.score_row(studio, row, tmp_path / "out")
    chunks = studio.num_chunks(row)
    mine, copy = (RowFeatures(tmp_path / "out", name, chunks) for name in ("faceid", "copy"))
    wanted = copy.column("features")[[0, 1, 3, 4, 5]]
    assert score.metrics["FID"].value == pytest.approx(metrics.frechet_distance(wanted, mine.column("features")), rel=1e-6)
    assert score.num_skipped == 1 and "5 (1 prompts left out)" in report.scores_to_markdown([score])


def test_a_reference_without_a_face_is_left_out_of_that_row_alone(tmp_path, finder):
    path = saved(tmp_path / "faceid.bin")
    choice = settings(path, out=str(tmp_path / "out"))
    finder.nobody = (load_eval_set(choice)[2].references[0].tobytes(),)
    list(suite.run_evaluation(choice))
    lost = {row: RowFeatures(tmp_path / "out", row, 2).skipped for row in ("copy", "text", "faceid")}
    assert not lost["copy"] and not lost["text"]
    assert lost["faceid"].keys() == {"2"} and "no face was found in the 1 reference(s)" in lost["faceid"]["2"]
    assert RowFeatures(tmp_path / "out", "faceid", 2).column("prompt").tolist() == [0, 1, 3]


def test_of_several_references_those_with_a_face_are_heard(tmp_path, finder):
    path = saved(tmp_path / "faceid.bin")
    choice = settings(path, subjects=4, references=3, limit=2, text="caption").with_defaults()
    case = load_eval_set(choice)[0]
    first, second, third = case.references
    finder.nobody = (first.tobytes(),)
    heard = load_system(path, choice).heard(case)
    assert [picture.tobytes() for picture in heard.references] == [p.tobytes() for p in (second, third, second)]


def test_the_encoder_that_conditions_does_not_judge(tmp_path, finder, monkeypatch):
    path = saved(tmp_path / "faceid.bin")
    choice = settings(path, subjects=4, text="caption", out=str(tmp_path / "out"))
    monkeypatch.setattr(identity, "InsightFace", lambda device: finder)
    finder.name = "insightface"
    with pytest.raises(UserError, match="it would score itself; expected another judge: --identity-encoder facenet"):
        list(suite.run_evaluation(replace(choice, identity="insightface")))
    list(suite.run_evaluation(replace(choice, adapter=("mini",), encoder=None, identity="insightface")))


def test_where_no_identity_is_measured_any_adapter_may_be(tmp_path, finder):
    list(suite.run_evaluation(settings(saved(tmp_path / "faceid.bin"), identity="insightface", out=str(tmp_path / "out"))))
    with pytest.raises(UserError, match="reference: after single pictures the row copy gives it back"):
        list(suite.run_evaluation(replace(SMALL, against=("reference",), out=str(tmp_path / "other"))))


def test_without_insightface_it_is_said_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "insightface", None)
    monkeypatch.setitem(sys.modules, "insightface.app", None)
    faces.shared_insightface.cache_clear()
    choice = settings(saved(tmp_path / "faceid.bin"), out=str(tmp_path / "out"))
    with pytest.raises(UserError, match="insightface is not installed"):
        list(suite.run_evaluation(choice))
    assert not (tmp_path / "out" / "rows").exists()


def test_training_does_not_go_on_from_one(tmp_path):
    path = saved(tmp_path / "faceid.bin")
    with pytest.raises(UserError, match="is of the FaceID family, which draws but is not trained here"):
        next(
            train_adapter(
                TrainConfig.from_options(
                    adapter=path, data="mini:8", max_train_steps=1, train_batch_size=2, output_dir=str(tmp_path / "run")
                )
            )
        )
