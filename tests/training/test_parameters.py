"""What is trained: the tensors of the adapter and nothing else, as many as in the paper."""

from types import SimpleNamespace

import pytest
import torch
from benchmarks.random_models import SD15, SDXL
from diffusers import UNet2DConditionModel

from imprompt.config import REFERENCE_METHODS, TrainConfig
from imprompt.methods import build_method
from imprompt.training.loop import make_accelerator, make_optimizers
from imprompt.training.objective import compute_loss
from imprompt.training.setup import setup_training

VIT_H = SimpleNamespace(embed_dim=lambda *, patches: 1280 if patches else 1024)


@pytest.mark.parametrize(
    ("unet", "method", "millions"),
    [
        (SD15, "ip-adapter", 22.3),
        (SD15, "ip-adapter-plus", 49.1),
        (SD15, "ip-adapter-full-face", 21.8),
        (SDXL, "ip-adapter", 349.0),
        (SD15, "simple", 3.1),
    ],
)
def test_full_size_adapters_have_the_papers_number_of_parameters(unet, method, millions):
    with torch.device("meta"):
        module = build_method(method, SimpleNamespace(unet=UNet2DConditionModel(**unet)), VIT_H).module
    assert sum(p.numel() for p in module.parameters()) / 1e6 == pytest.approx(millions, abs=0.06 if millions < 100 else 1)


@pytest.mark.parametrize("method", list(REFERENCE_METHODS))
def test_only_the_adapter_has_gradients_and_optimizer_state(tmp_path, method):
    config = TrainConfig.from_options(
        method=method, train_batch_size=2, num_validation_images=0, mixed_precision="float32", output_dir=str(tmp_path)
    ).with_defaults()
    context = setup_training(config, torch.device("cpu"))
    context.method.module.float()
    make_accelerator(config.pipeline.device, config.runtime, config.optimization, config.output_dir)
    batch = next(iter(context.batches()))
    compute_loss(context.method, context.unet, context.noise_schedule, batch, context.uncond, config.loss).mean().backward()
    trained = list(context.method.module.parameters())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    for name in ("adamw", "muon"):
        optimizers = make_optimizers(config.with_options(optimizer=name).optimization, context.method.module)
        for optimizer in optimizers:
            optimizer.step()
        assert {id(p) for optimizer in optimizers for p in optimizer.state} == {id(p) for p in trained}
    for frozen in (context.unet, context.pipe.vae, context.pipe.text_encoder, context.image_encoder.model):
        assert all(p.grad is None and not p.requires_grad for p in frozen.parameters())
    context.method.remove_from_unet()
