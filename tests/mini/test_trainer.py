"""A training that is interrupted continues as if it had not been."""

import pytest
import torch
from torch import nn

from imprompt.recipes.trainer import TrainPlan, _Optimizers, make_step_generator, train_module

PLAN = TrainPlan("line", steps=30, batch_size=8, lr=0.1, warmup_steps=5, ema_decay=0.9)
WITH_MUON = TrainPlan("net", steps=60, batch_size=8, lr=0.02, warmup_steps=5, ema_decay=0.9, muon_lr=0.05)


class Line(nn.Module):
    def __init__(self, layer=None):
        super().__init__()
        torch.manual_seed(0)
        self.layer = layer or nn.Linear(3, 1)
        self.stop_at = None

    def compute_loss(self, step):
        if step == self.stop_at:
            raise KeyboardInterrupt
        x = torch.randn(PLAN.batch_size, 3, generator=make_step_generator("line", step))
        return (self.layer(x) - x.sum(1, keepdim=True)).square().mean()


def train(folder, stop_at=None, plan=PLAN):
    torch.manual_seed(1)
    module = Line(nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 1)) if plan.muon_lr else None)
    module.stop_at = stop_at
    train_module(plan, module, module.compute_loss, folder, lambda *_: None, save_seconds=0)
    return nn.utils.parameters_to_vector(module.layer.parameters()).detach()


@pytest.mark.parametrize("plan", [PLAN, WITH_MUON], ids=["adamw", "muon"])
def test_resumed_equals_uninterrupted_to_the_bit(tmp_path, plan):
    whole = train(tmp_path / "whole", plan=plan)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "broken", stop_at=11, plan=plan)
    assert torch.equal(train(tmp_path / "broken", plan=plan), whole)


def test_it_learns(tmp_path):
    weights = train(tmp_path)[:3]  # of the sum of three numbers
    assert torch.allclose(weights, torch.ones(3), atol=0.2)


def test_muon_trains_large_matrices_only():
    """Kernels through flat views of their own memory; biases, and kernels with few channels, by AdamW."""
    module = nn.Sequential(nn.Conv2d(4, 16, 3), nn.Conv2d(16, 16, 3))
    before = [p.detach().clone() for p in module.parameters()]
    optimisers = _Optimizers(WITH_MUON, list(module.parameters()))
    kernel = module[1].weight
    kernel.grad = torch.randn_like(kernel)
    optimisers.step(1.0)
    moved = [not torch.equal(p, b) for p, b in zip(module.parameters(), before, strict=True)]
    assert moved == [False, False, True, False]
    update = (kernel.detach() - before[2]).flatten(1)
    spread = torch.linalg.svdvals(update)
    assert spread.max() / spread.min() < 3  # Muon's mark: all directions move alike


def test_rate_warms_up_and_falls_to_zero():
    rates = [PLAN.compute_lr_multiplier(step) for step in range(PLAN.steps + 1)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert max(rates) == 1 and rates[-1] == pytest.approx(0)


def test_a_part_that_the_loss_does_not_reach_is_named(tmp_path):
    module = Line(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1)))
    module.layer[1].register_forward_pre_hook(lambda layer, args: args[0].detach())
    with pytest.raises(RuntimeError, match=r"layer\.0\.weight among them"):
        train_module(PLAN, module, module.compute_loss, tmp_path, lambda *_: None)
