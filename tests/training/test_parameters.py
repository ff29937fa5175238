"""What is trained: the adapter's tensors and nothing else, as many as the paper says."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from benchmarks.models import SD15, SDXL
from diffusers import UNet2DConditionModel

from imprompt.config import METHODS, Train
from imprompt.methods import create
from imprompt.training.loop import accelerate, objective_of, optimisers_of
from imprompt.training.objective import losses
from imprompt.training.setup import build

VIT_H = SimpleNamespace(width=lambda grid: 1280 if grid else 1024)


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
        made = create(method, SimpleNamespace(unet=UNet2DConditionModel(**unet)), VIT_H)
    assert sum(p.numel() for p in made.module.parameters()) / 1e6 == pytest.approx(millions, abs=0.06 if millions < 100 else 1)


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_only_the_adapter_has_gradients_and_optimiser_state(tmp_path, method, optimizer):
    choice = Train(method=method, optimizer=optimizer, batch=3, validation=0, precision="float32", out=str(tmp_path)).settled()
    setting = build(replace(choice), torch.device("cpu"))
    accelerate(choice)
    optimisers = optimisers_of(choice, setting.method.module.float())
    encoded = next(iter(setting.batches()))
    losses(setting.method, setting.unet, setting.schedule, encoded, setting.nulls, objective_of(choice)).mean().backward()
    for optimiser in optimisers:
        optimiser.step()
    mine = list(setting.method.module.parameters())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mine)
    assert {id(p) for o in optimisers for p in o.state} == {id(p) for p in mine}
    for part in (setting.unet, setting.pipe.vae, setting.pipe.text_encoder, setting.encoder.model):
        assert all(p.grad is None and not p.requires_grad for p in part.parameters())
    setting.method.release()
