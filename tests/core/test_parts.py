"""Guidance layouts, layer scales, masks and conditioning windows."""

import pytest
import torch

from imprompt.core.conditioning import LAYOUT, STYLE, denoising_progress, downsample_mask, layer_scale, unknown_blocks, window_gate
from imprompt.core.guidance import expand_to_cfg_batch


def test_prompts_are_repeated_as_in_diffusers():
    uncond, cond = torch.tensor([[0.0]]), torch.tensor([[1.0], [2.0]])
    assert expand_to_cfg_batch(uncond, cond, ("uncond", "cond"), 8).flatten().tolist() == [0, 0, 0, 0, 1, 1, 2, 2]
    assert expand_to_cfg_batch(uncond, cond, ("uncond", "cond", "cond"), 6).flatten().tolist() == [0, 0, 1, 2, 1, 2]
    assert expand_to_cfg_batch(uncond, cond[:1], ("cond",), 3).flatten().tolist() == [1, 1, 1]


def test_what_does_not_divide_is_refused():
    uncond, cond = torch.zeros(1, 1), torch.ones(2, 1)
    with pytest.raises(ValueError, match="3 rows does not split into the 2 guidance groups"):
        expand_to_cfg_batch(uncond, cond, ("uncond", "cond"), 3)
    with pytest.raises(ValueError, match="for 2 text prompts, the batch has 3 rows"):
        expand_to_cfg_batch(uncond, cond, ("uncond", "cond"), 6)


def test_the_longest_matching_prefix_gives_the_scale():
    scale = {"": 0.1, "up_blocks": 0.5, "up_blocks.1": 0.9}
    assert layer_scale(scale, "up_blocks.1.attentions.0") == 0.9
    assert layer_scale(scale, "up_blocks.10.attentions.0") == 0.5
    assert layer_scale(scale, "mid_block.attentions.0") == 0.1
    assert layer_scale({"up_blocks": 1.0}, "down_blocks.0") == 0.0
    assert layer_scale(0.7, "anything") == 0.7


def test_presets_name_one_block_each():
    assert layer_scale(STYLE, "up_blocks.0.attentions.1.transformer_blocks.3.attn2") == 1.0
    assert layer_scale(LAYOUT, "up_blocks.0.attentions.1.transformer_blocks.3.attn2") == 0.0
    assert unknown_blocks({"up_blocks.0": 1, "upblocks": 1, "": 0}, ["up_blocks.0.attn2"]) == ["upblocks"]


def test_masks_are_exact_at_odd_sizes():
    """A position's weight is the share of white among the pixels that it stands for: eight each way, doubled at every level."""
    mask = (torch.rand(520, 776, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    mask[:, :388] = 1
    for level, (height, width) in enumerate([(65, 97), (33, 49), (17, 25), (9, 13)]):
        weights = downsample_mask(mask, 65, 97, level).reshape(height, width)
        side = 8 * 2**level
        exact = torch.tensor(
            [[mask[y * side : (y + 1) * side, x * side : (x + 1) * side].mean() for x in range(width)] for y in range(height)]
        )
        torch.testing.assert_close(weights, exact)
        torch.testing.assert_close(downsample_mask(1 - mask, 65, 97, level).reshape(height, width), 1 - exact)


def test_progress_runs_from_noise_to_image():
    assert denoising_progress(999, 1000).item() == 0.0
    assert denoising_progress(torch.tensor([0]), 1000).item() == pytest.approx(0.999)


@pytest.mark.parametrize("t, gate", [(999, 0), (700, 0), (599, 1), (300, 1), (199, 0), (0, 0)])
def test_window_is_open_from_start_until_before_end(t, gate):
    assert window_gate(denoising_progress(t, 1000), 0.4, 0.8).item() == gate
    assert window_gate(denoising_progress(torch.tensor(t), 1000), 0.0, 1.0).item() == 1
