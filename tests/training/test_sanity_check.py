"""The sanity check names what would go wrong, and leaves the run as it was."""

import pytest
import torch
from PIL import Image

from imprompt.config import TrainConfig
from imprompt.errors import UserError
from imprompt.training.sanity_check import run_sanity_check
from imprompt.training.setup import setup_training

CONFIG = TrainConfig.from_options(train_batch_size=6, num_validation_images=0, mixed_precision="float32").with_defaults()


def set_up(**options):
    return setup_training(CONFIG.with_options(**options), torch.device("cpu"))


def check(context, learning_rate=CONFIG.optimization.learning_rate):
    return run_sanity_check(context, learning_rate, trains_unet=False)


@pytest.fixture
def context(tmp_path):
    context = set_up(output_dir=str(tmp_path))
    yield context
    context.method.remove_from_unet()


def test_one_batch_overfits_and_everything_is_restored(context):
    weights = {k: v.clone() for k, v in context.method.module.state_dict().items()}
    loader_state = context.loader.state_dict()
    report = check(context)
    assert report.loss_after < report.loss_before and report.warnings == [] and report.seconds_per_step > 0
    assert report.num_parameters == sum(v.numel() for v in weights.values())
    assert all(torch.equal(v, weights[k]) for k, v in context.method.module.state_dict().items())
    assert context.loader.state_dict() == loader_state
    assert all(p.grad is None for p in context.method.module.parameters())


def test_a_loss_that_is_not_finite_is_named(context):
    with torch.no_grad():
        context.method.module.image_proj.proj.weight.fill_(float("nan"))
    with pytest.raises(UserError, match=r"not finite at step 1 .* --mixed-precision"):
        check(context)


def test_a_parameter_without_gradient_is_named(context):
    context.method.module.image_proj.register_forward_hook(lambda module, args, out: out.detach())
    with pytest.raises(UserError, match=r"receive no gradient, image_proj\S+ among them"):
        check(context)


def test_indistinguishable_references_without_captions_are_reported(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(9):
        Image.new("RGB", (64, 64), (90, 10, 10)).save(folder / f"{i}.png")
    context = set_up(output_dir=str(tmp_path / "run"), data=str(folder))
    warnings = " ".join(check(context).warnings)
    context.method.remove_from_unet()
    assert "does not distinguish the references" in warnings and "no captions" in warnings


def test_a_vanishing_learning_rate_is_reported(context):
    warnings = check(context, learning_rate=1e-30).warnings
    assert len(warnings) == 1 and "does not overfit" in warnings[0]
