"""A training that is interrupted continues as if it had not been."""

import pytest
import torch
from torch import nn

from imprompt.mini.fit import Plan, fit, generator

PLAN = Plan("line", steps=30, batch=8, lr=0.1, warmup=5, ema=0.9)


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 1)
        self.stop_at = None

    def loss(self, step):
        if step == self.stop_at:
            raise KeyboardInterrupt
        x = torch.randn(PLAN.batch, 3, generator=generator("line", step))
        return (self.layer(x) - x.sum(1, keepdim=True)).square().mean()


def train(folder, stop_at=None):
    module = Line()
    module.stop_at = stop_at
    fit(PLAN, module, module.loss, folder, lambda *_: None, save_seconds=0)
    return module.layer.weight.detach()


def test_resumed_equals_uninterrupted_to_the_bit(tmp_path):
    whole = train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "broken", stop_at=11)
    assert torch.equal(train(tmp_path / "broken"), whole)


def test_it_learns(tmp_path):
    assert torch.allclose(train(tmp_path), torch.ones(1, 3), atol=0.2)


def test_rate_warms_up_and_falls_to_zero():
    rates = [PLAN.rate(step) for step in range(PLAN.steps + 1)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert max(rates) == 1 and rates[-1] == pytest.approx(0)
