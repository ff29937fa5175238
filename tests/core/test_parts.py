"""Guidance rows, scales, masks, windows: small functions, each with its story."""

import pytest
import torch

from imprompt.core.conditioning import LAYOUT, STYLE, mask_weights, progress, scale_of, unmatched, window
from imprompt.core.guidance import guidance_groups, spread


class Pipe:
    def __init__(self, guided=True, perturbed=False):
        self.do_classifier_free_guidance = guided
        self.do_perturbed_attention_guidance = perturbed


class StableDiffusionInstructPix2PixPipeline(Pipe):
    pass


@pytest.mark.parametrize(
    "pipe, groups",
    [
        (Pipe(), (0, 1)),
        (Pipe(guided=False), (1,)),
        (Pipe(perturbed=True), (0, 1, 1)),
        (Pipe(guided=False, perturbed=True), (1, 1)),
        (StableDiffusionInstructPix2PixPipeline(), (1, 0, 0)),
    ],
)
def test_groups_are_read_from_the_pipeline(pipe, groups):
    assert guidance_groups(pipe) == groups


def test_a_pipeline_that_does_not_say_is_not_guessed():
    with pytest.raises(ValueError, match="does not say whether it uses guidance"):
        guidance_groups(object())


def test_prompts_are_spread_as_diffusers_repeats_them():
    null, image = torch.tensor([[0.0]]), torch.tensor([[1.0], [2.0]])
    assert spread(null, image, (0, 1), 8).flatten().tolist() == [0, 0, 0, 0, 1, 1, 2, 2]
    assert spread(null, image, (0, 1, 1), 6).flatten().tolist() == [0, 0, 1, 2, 1, 2]
    assert spread(null, image[:1], (1,), 3).flatten().tolist() == [1, 1, 1]


def test_what_does_not_divide_is_refused():
    null, image = torch.zeros(1, 1), torch.ones(2, 1)
    with pytest.raises(ValueError, match="3 rows does not split into the 2 guidance groups"):
        spread(null, image, (0, 1), 3)
    with pytest.raises(ValueError, match="for 2 text prompts, the batch has 3 rows"):
        spread(null, image, (0, 1), 6)


def test_the_longest_matching_prefix_gives_the_scale():
    scale = {"": 0.1, "up_blocks": 0.5, "up_blocks.1": 0.9}
    assert scale_of(scale, "up_blocks.1.attentions.0") == 0.9
    assert scale_of(scale, "up_blocks.10.attentions.0") == 0.5
    assert scale_of(scale, "mid_block.attentions.0") == 0.1
    assert scale_of({"up_blocks": 1.0}, "down_blocks.0") == 0.0
    assert scale_of(0.7, "anything") == 0.7


def test_presets_name_one_block_each():
    assert scale_of(STYLE, "up_blocks.0.attentions.1.transformer_blocks.3.attn2") == 1.0
    assert scale_of(LAYOUT, "up_blocks.0.attentions.1.transformer_blocks.3.attn2") == 0.0
    assert unmatched({"up_blocks.0": 1, "upblocks": 1, "": 0}, ["up_blocks.0.attn2"]) == ["upblocks"]


def test_masks_are_exact_at_odd_sizes():
    """A position's weight is the share of white among the pixels that it stands for: eight each way, doubled at every level."""
    mask = (torch.rand(520, 776, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    mask[:, :388] = 1
    for level, (height, width) in enumerate([(65, 97), (33, 49), (17, 25), (9, 13)]):
        weights = mask_weights(mask, 65, 97, level).reshape(height, width)
        side = 8 * 2**level
        exact = torch.tensor(
            [[mask[y * side : (y + 1) * side, x * side : (x + 1) * side].mean() for x in range(width)] for y in range(height)]
        )
        torch.testing.assert_close(weights, exact)
        torch.testing.assert_close(mask_weights(1 - mask, 65, 97, level).reshape(height, width), 1 - exact)


def test_progress_runs_from_noise_to_picture():
    assert progress(999, 1000).item() == 0.0
    assert progress(torch.tensor([0]), 1000).item() == pytest.approx(0.999)


@pytest.mark.parametrize("t, heard", [(999, 0), (700, 0), (599, 1), (300, 1), (199, 0), (0, 0)])
def test_window_is_open_from_start_until_before_end(t, heard):
    assert window(t, 1000, 0.4, 0.8).item() == heard
    assert window(torch.tensor(t), 1000, 0.0, 1.0).item() == 1
