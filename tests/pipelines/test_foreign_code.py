"""A base model whose folder brings code is refused before diffusers looks at it."""

import json

import pytest

from conftest import sd15_pipeline
from imprompt.errors import UserError
from imprompt.models.base_pipelines import check_model_index, load_pipeline


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    sd15_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def change_index(model):
    """A function that changes entries of model_index.json; afterwards it is as before."""
    path = model / "model_index.json"
    before = path.read_text()
    yield lambda **entries: path.write_text(json.dumps(json.loads(before) | entries))
    path.write_text(before)


ENTRIES = [
    {"unet": ["my_unet", "MyUNet"]},
    {"_class_name": ["my_pipe", "MyPipe"]},
    {"text_encoder": ["os", "system"]},
    {"vae": ["subprocess", "Popen"]},
    {"unet": ["unet.my_unet", "MyUNet"]},
    {"unet": ["../my_unet", "MyUNet"]},
    {"extra": ["my_unet", "MyUNet", 3]},
    {"_class_name": None},
]


@pytest.mark.parametrize("entries", ENTRIES, ids=str)
def test_a_model_that_brings_code_is_refused_before_loading(entries, model, change_index, tmp_path):
    marker = tmp_path / "marker"
    for file in (model / "unet" / "my_unet.py", model / "my_unet.py", model / "my_pipe.py"):
        file.write_text(
            f"open({str(marker)!r}, 'w')\nfrom diffusers import UNet2DConditionModel as MyUNet, StableDiffusionPipeline as MyPipe\n"
        )
    change_index(**entries)
    with pytest.raises(UserError, match="is not loaded, because that would run its code"):
        load_pipeline(str(model))
    assert not marker.exists()


def test_components_of_diffusers_pipelines_are_not_foreign(model, change_index):
    change_index(safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"], image_encoder=[None, None])
    check_model_index(str(model))
    change_index()
    assert load_pipeline(str(model)).unet


def test_weights_of_a_base_model_that_are_not_finite_are_refused_with_their_name(model, tmp_path):
    pipe = sd15_pipeline()
    pipe.unet.conv_in.weight.data[0, 0] = float("nan")
    pipe.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"unet: conv_in\.weight contains NaN"):
        load_pipeline(str(tmp_path))
