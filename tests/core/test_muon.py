"""Our Muon takes the steps of PyTorch's up to rounding in bfloat16, with the same state; Newton–Schulz is tested against an SVD."""

import pytest
import torch

from imprompt.core.optim import Muon, newton_schulz

SHAPES = ((24, 24), (24, 24), (48, 16), (16, 48), (8, 8))


def random_matrices():
    g = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=g)) for shape in SHAPES]


def set_random_gradients(parameters, seed):
    g = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=g)


@pytest.mark.bf16
def test_it_steps_as_pytorchs_does():
    parameters, torch_parameters = random_matrices(), random_matrices()
    our_muon = Muon(parameters, lr=0.02, weight_decay=0.1)
    torch_muon = torch.optim.Muon(torch_parameters, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    before = [p.detach().clone() for p in parameters]
    for seed in range(5):
        set_random_gradients(parameters, seed)
        set_random_gradients(torch_parameters, seed)
        our_muon.step()
        torch_muon.step()
    for a, b, start in zip(parameters, torch_parameters, before, strict=True):
        assert (a - b).norm() < 0.03 * (b - start).norm()
        torch.testing.assert_close(our_muon.state[a]["momentum_buffer"], torch_muon.state[b]["momentum_buffer"])


def test_a_state_goes_on_in_either():
    parameters, torch_parameters = random_matrices(), random_matrices()
    first = torch.optim.Muon(torch_parameters, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    set_random_gradients(torch_parameters, 0)
    first.step()
    second = Muon(parameters, lr=0.5, weight_decay=0.0)
    second.load_state_dict(first.state_dict())
    assert second.param_groups[0]["lr"] == 0.02
    torch.testing.assert_close(second.state[parameters[2]]["momentum_buffer"], first.state[torch_parameters[2]]["momentum_buffer"])


def test_parameters_without_a_gradient_stay():
    parameters = random_matrices()
    set_random_gradients(parameters[1:], 0)
    before = parameters[0].detach().clone()
    Muon(parameters, lr=0.02, weight_decay=0.1).step()
    assert torch.equal(parameters[0], before)


@pytest.mark.bf16
@pytest.mark.parametrize("shape", [(3, 12, 12), (2, 20, 6), (2, 6, 20)])
def test_singular_values_come_near_one_and_vectors_stay(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    orthogonal = newton_schulz(x, (3.4445, -4.7750, 2.0315), 5, 1e-7).float()
    values = torch.linalg.svdvals(orthogonal)
    assert orthogonal.shape == x.shape and float(values.min()) > 0.5 and float(values.max()) < 1.4
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    rotated = u.mT @ orthogonal @ vh.mT  # diagonal where the singular vectors stayed
    assert (rotated - torch.diag_embed(rotated.diagonal(dim1=1, dim2=2))).abs().max() < 0.05
