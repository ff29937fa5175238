"""The preflight names what would go wrong, and leaves the run as it was."""

from dataclasses import replace

import pytest
import torch

from imprompt.config import Train
from imprompt.errors import UserError
from imprompt.training.sanity_check import preflight
from imprompt.training.setup import build

CHOICE = Train(batch=6, validation=0, precision="float32").settled()


@pytest.fixture
def setting(tmp_path):
    found = build(replace(CHOICE, out=str(tmp_path)), torch.device("cpu"))
    yield found
    found.method.release()


def test_a_sound_setting_overfits_and_is_left_as_it_was(setting):
    before = {k: v.clone() for k, v in setting.method.module.state_dict().items()}
    place = setting.loader.state()
    report = preflight(CHOICE, setting)
    assert report.after < report.before and report.notes == [] and report.seconds_per_step > 0
    assert report.trainable == sum(v.numel() for v in before.values())
    assert all(torch.equal(v, before[k]) for k, v in setting.method.module.state_dict().items())
    assert setting.loader.state() == place
    assert all(p.grad is None for p in setting.method.module.parameters())


def test_numbers_that_are_none_are_named(setting):
    with torch.no_grad():
        setting.method.module.image_proj.proj.weight.fill_(float("nan"))
    with pytest.raises(UserError, match=r"not a number at step 1 .* --precision"):
        preflight(CHOICE, setting)


def test_a_part_without_gradient_is_named(setting):
    setting.method.module.image_proj.register_forward_hook(lambda module, args, out: out.detach())
    with pytest.raises(UserError, match=r"receive no gradient \(image_proj"):
        preflight(CHOICE, setting)


def test_data_all_alike_and_without_captions_is_noted(setting, tmp_path):
    from PIL import Image

    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(9):
        Image.new("RGB", (64, 64), (90, 10, 10)).save(folder / f"{i}.png")
    alike = build(replace(CHOICE, out=str(tmp_path / "run"), data=str(folder)), torch.device("cpu"))
    notes = " ".join(preflight(CHOICE, alike).notes)
    alike.method.release()
    assert "look the same to the encoder" in notes and "no captions" in notes


def test_a_learning_rate_of_nothing_is_noted(setting):
    notes = preflight(replace(CHOICE, lr=1e-30), setting).notes
    assert len(notes) == 1 and "does not overfit" in notes[0]
