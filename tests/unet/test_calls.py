"""What attached image prompts apply to: the call that is being made, whoever makes it, in any thread and with any scheduler."""

import copy
import pickle
import threading
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    MotionAdapter,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNetMotionModel,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import CROSS, POOLED, random_adapter, sd15_unet
from imprompt.core.conditioning import check_scale, denoising_progress, window_gate
from imprompt.core.guidance import expand_to_cfg_batch
from imprompt.dit.attach import attach
from imprompt.errors import UserError
from imprompt.models.image_prompt import ImagePrompt, load_masks
from imprompt.unet.attn_processors import find_attention_layers, find_cross_attention_layers
from imprompt.unet.progress import read_denoising_progress


def random_prompt(unet, prompts=1, seed=5, **options):
    torch.manual_seed(seed)
    return ImagePrompt(random_adapter(unet, "base"), torch.randn(prompts, 1, 1, POOLED), torch.zeros(1, 1, 1, POOLED), **options)


def sample_latents(pipe, **options):
    options = dict(num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="latent") | options
    return pipe("a red fish", **options).images


# ---- the call


def test_pipelines_may_share_a_unet(sd15):
    """Attached to one pipeline, called through another, with other guidance: each call has its own layout."""
    other = StableDiffusionPipeline(**sd15.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    prompt = random_prompt(sd15.unet)
    with attach(other, prompt):
        guided, plain = sample_latents(other, guidance_scale=5.0), sample_latents(other, guidance_scale=1.0)
    with attach(sd15, prompt):
        assert torch.equal(sample_latents(other, guidance_scale=5.0), guided)
        sample_latents(sd15, guidance_scale=5.0)
        assert torch.equal(sample_latents(other, guidance_scale=1.0), plain)


def test_guidance_may_end_during_the_generation(sd15):
    """As diffusers documents it: a callback sets the guidance scale to 0 and drops the unconditional text."""
    layouts = []

    def stop_guidance(pipe, step, timestep, kwargs):
        pipe._guidance_scale = 0.0
        return {"prompt_embeds": kwargs["prompt_embeds"][-1:]}

    with attach(sd15, random_prompt(sd15.unet)) as attached:
        original = attached._build_branches
        attached._build_branches = lambda sample, batch, *rest: layouts.append(batch.cfg_layout) or original(sample, batch, *rest)
        sample_latents(sd15, callback_on_step_end=stop_guidance, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    assert layouts == [("uncond", "cond"), ("cond",)]


def test_a_unet_that_no_pipeline_calls_is_not_guessed(sd15):
    rows = torch.randn(2, 4, 16, 16), 10, torch.randn(2, 5, CROSS)
    with torch.no_grad(), attach(sd15, random_prompt(sd15.unet)), pytest.raises(UserError, match="not by a pipeline that has it"):
        sd15.unet(*rows)
    with torch.no_grad(), attach(sd15, random_prompt(sd15.unet), cfg_layout=("uncond", "cond")):
        sd15.unet(*rows)


def test_an_unknown_layout_is_refused(sd15):
    with pytest.raises(UserError, match="cfg_layout: expected groups"):
        attach(sd15, random_prompt(sd15.unet), cfg_layout=("conditional",))


class _HomeMade:
    """A pipeline of one's own, without the property of diffusers' pipelines."""

    def __init__(self, pipe):
        self.unet = pipe.unet

    def __call__(self, guided=None):
        if guided is not None:
            do_classifier_free_guidance = guided  # noqa: F841
        return self.unet(torch.randn(2, 4, 16, 16), 10, torch.randn(2, 5, CROSS)).sample


@torch.no_grad()
def test_a_custom_pipeline_reports_its_guidance_or_is_refused(sd15):
    pipe = _HomeMade(sd15)
    with attach(pipe, random_prompt(sd15.unet)):
        pipe(guided=True)
        with pytest.raises(UserError, match="_HomeMade does not report which rows"):
            pipe()


def test_a_unet_that_is_compiled_in_place(sd15):
    """The hook stays outside of the graph, whatever it looks at."""
    sd15.unet = sd15_unet(layers_per_block=1, block_out_channels=(16, 32), down_block_types=("CrossAttnDownBlock2D",) * 2,
                          up_block_types=("CrossAttnUpBlock2D",) * 2)  # fmt: skip
    prompt = random_prompt(sd15.unet)
    with attach(sd15, prompt):
        expected = sample_latents(sd15, num_inference_steps=1)
    torch._dynamo.reset()
    sd15.unet.compile(backend="eager", fullgraph=True)
    with attach(sd15, prompt):
        torch.testing.assert_close(sample_latents(sd15, num_inference_steps=1), expected, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


# ---- threads


def run_threads(*functions):
    """What each function returns or raises."""
    results = [None] * len(functions)

    def run(n, function):
        try:
            results[n] = function()
        except Exception as error:
            results[n] = error

    threads = [threading.Thread(target=run, args=item) for item in enumerate(functions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    return results


def test_two_threads_on_one_pipeline_get_a_clear_error(sd15):
    """The scheduler of a pipeline keeps the state of one generation: both results would be wrong."""
    alone = sample_latents(sd15)
    begun, tried = threading.Event(), threading.Event()

    def wait_for_the_other(pipe, step, timestep, kwargs):
        begun.set()
        tried.wait(30)
        return kwargs

    def early():
        return sample_latents(sd15, callback_on_step_end=wait_for_the_other)

    def late():
        begun.wait(30)
        return sample_latents(sd15, callback_on_step_end=wait_for_the_other, callback_on_step_end_tensor_inputs=["latents"])

    with attach(sd15, random_prompt(sd15.unet)):
        threading.Timer(1, tried.set).start()
        results = run_threads(early, late)
    assert any(isinstance(result, UserError) for result in results)
    assert all("two threads are generating with one pipeline" in str(result) for result in results if isinstance(result, Exception))
    assert torch.equal(sample_latents(sd15), alone)


def test_threads_with_schedulers_of_their_own_share_an_attached_unet(sd15):
    pipes = []
    for _ in range(2):
        components = sd15.components | {"scheduler": DDIMScheduler.from_config(sd15.scheduler.config)}
        pipes.append(StableDiffusionPipeline(**components, requires_safety_checker=False))
        pipes[-1].set_progress_bar_config(disable=True)
    with attach(sd15, random_prompt(sd15.unet)):
        calls = [
            lambda: sample_latents(pipes[0], guidance_scale=5.0, num_inference_steps=4),
            lambda: sample_latents(pipes[1], guidance_scale=1.0, num_inference_steps=5, height=48),
        ]
        expected = [call() for call in calls]
        received = run_threads(*calls)
    for a, b in zip(received, expected, strict=True):
        torch.testing.assert_close(a, b)


# ---- windows

_V = {"prediction_type": "v_prediction"}
SCHEDULERS = [
    *((name, {}) for name in (
        "DDIMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler",
        "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "KDPM2DiscreteScheduler", "DDPMScheduler",
        "KDPM2AncestralDiscreteScheduler", "DEISMultistepScheduler", "UniPCMultistepScheduler", "LCMScheduler", "TCDScheduler",
        "SASolverScheduler", "IPNDMScheduler", "CMStochasticIterativeScheduler", "FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler",
        "FlowMatchHeunDiscreteScheduler", "EDMDPMSolverMultistepScheduler",
    )),
    ("PNDMScheduler", {"skip_prk_steps": True}),
    ("EulerDiscreteScheduler", {"timestep_type": "continuous"} | _V),
    ("EulerDiscreteScheduler", {"use_exponential_sigmas": True, "timestep_type": "continuous"} | _V),
    ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
    ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "options"), SCHEDULERS)
@pytest.mark.parametrize("steps", [2, 8])
def test_windows_partition_the_steps_of_every_scheduler(name, options, steps):
    """From noise to image: the first half before the second, each step in exactly one, and both are there."""
    scheduler = getattr(diffusers, name)(**options)
    scheduler.set_timesteps(steps)
    windows = ((0.0, 0.5), (0.5, 1.0))
    first, second = ([float(window_gate(read_denoising_progress(scheduler, t), *w)) for t in scheduler.timesteps] for w in windows)
    assert [a + b for a, b in zip(first, second, strict=True)] == [1.0] * len(first)
    assert first == sorted(first, reverse=True) and 0 < sum(first) < len(first)


def test_windows_work_with_edm(sd15):
    sd15.scheduler = EDMEulerScheduler()
    plain = sample_latents(sd15, num_inference_steps=4)
    for window in ({"end_at": 0.5}, {"start_at": 0.5}):
        with attach(sd15, random_prompt(sd15.unet, **window)):
            assert not torch.allclose(sample_latents(sd15, num_inference_steps=4), plain, atol=1e-4)


def test_rows_may_be_at_different_timesteps():
    """As in a training batch: each row is inside or outside of the window by its own timestep."""
    unet = sd15_unet()
    x, text = torch.randn(2, 4, 16, 16), torch.randn(2, 5, CROSS)
    with torch.no_grad():
        plain = unet(x, torch.tensor([900, 100]), text).sample
        with attach(unet, random_prompt(unet, start_at=0.5), cfg_layout=("cond",)):
            early = unet(x, torch.tensor([900, 100]), text).sample
            with pytest.raises(UserError, match="outside a pipeline expected timesteps"):
                unet(x, 0.25, text)
    assert torch.equal(early[0], plain[0]) and not torch.allclose(early[1], plain[1], atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_a_timestep_that_the_scheduler_does_not_have_is_refused():
    scheduler = EulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    assert read_denoising_progress(scheduler, scheduler.timesteps).tolist() == [0.0, 0.25, 0.5, 0.75]
    with pytest.raises(UserError, match="none of its scheduler's"):
        read_denoising_progress(scheduler, torch.tensor(0.66))


# ---- arguments


@pytest.mark.parametrize("scale", ["0.5", float("nan"), float("inf"), 1e308, None, True, [0.5], {"mid_block": "1"}, {1: 1.0}])
def test_a_scale_that_is_no_number_is_refused(scale, sd15):
    with pytest.raises(UserError, match="scale: expected a"):
        random_prompt(sd15.unet, scale=scale)


@given(st.floats(-1e4, 1e4) | st.integers(-10_000, 10_000) | st.floats(-1e4, 1e4, width=32).map(np.float32))
@settings(max_examples=30)
def test_every_finite_scale_is_taken(scale):
    check_scale(scale)


@pytest.mark.parametrize("window", [("0", 1.0), (float("nan"), 1.0), (0.0, float("nan")), (-0.1, 1.0), (0.0, 1.1), (0.6, 0.5), (None, 1.0)])
def test_a_window_that_is_none_is_refused(window, sd15):
    with pytest.raises(UserError, match="expected 0 ≤ start_at ≤ end_at ≤ 1"):
        random_prompt(sd15.unet, start_at=window[0], end_at=window[1])


def test_unknown_attributes_and_other_objects_are_refused(sd15):
    prompt = random_prompt(sd15.unet)
    with attach(sd15, prompt) as attached:
        for name in ("scale", "prompt", "mask", "start_at"):
            with pytest.raises(AttributeError, match=rf"no {name} to set; expected for example: attached.prompts ="):
                setattr(attached, name, 0.5)
        attached.prompts = prompt.with_scale(0.5)
        assert attached.prompts[0].scale == 0.5
    with pytest.raises(UserError, match=r"expected image prompts, as .* returns them; received str"):
        attach(sd15, "cat.png")


# ---- copies


@pytest.mark.parametrize("copy_pipeline", [copy.deepcopy, pickle.dumps], ids=["deepcopy", "pickle"])
def test_copying_an_attached_pipeline_names_detaching(copy_pipeline, sd15):
    attached = attach(sd15, random_prompt(sd15.unet))
    for target in (sd15, sd15.unet, attached):
        with pytest.raises(UserError, match=r"cannot be copied or pickled; detach\(\) them first"):
            copy_pipeline(target)
    expected = sample_latents(sd15)
    attached.detach()
    copied = pickle.loads(pickle.dumps(sd15.unet))
    sd15.unet = copied
    with attach(sd15, random_prompt(copied)):
        assert torch.equal(sample_latents(sd15), expected)


# ---- gradients


def test_a_training_loop_reaches_the_adapter():
    """Gradients are those of finite differences, every step sees the adapter of the step before, and so does the next generation."""
    unet = sd15_unet().requires_grad_(False)
    prompt = random_prompt(unet, scale=0.7)
    prompt.adapter.requires_grad_(True)
    x, text = torch.randn(1, 4, 16, 16), torch.randn(1, 5, CROSS)
    weight = prompt.adapter.key_value_projection(31).to_v_ip.weight
    with attach(unet, prompt, cfg_layout=("cond",)):

        def loss():
            return unet(x, 10, text).sample.square().mean()

        with torch.no_grad():
            before = loss()
        loss().backward()
        gradient = weight.grad.clone()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in prompt.adapter.image_proj.parameters())
        loss().backward()  # a graph of its own for each step
        with torch.no_grad():
            step = 1e-2 * gradient / gradient.norm()
            weight += step
            after = loss()
            assert after != before
            assert float(after - before) == pytest.approx(float((gradient * step).sum()), rel=0.05)


def test_a_frozen_adapter_costs_no_gradients():
    unet = sd15_unet().requires_grad_(False)
    with attach(unet, random_prompt(unet), cfg_layout=("cond",)):
        assert not unet(torch.randn(1, 4, 16, 16), 10, torch.randn(1, 5, CROSS)).sample.requires_grad


def test_features_can_be_optimized():
    unet = sd15_unet().requires_grad_(False)
    features = torch.randn(1, 1, 1, POOLED, requires_grad=True)
    prompt = replace(random_prompt(unet), image_features=features)
    with attach(unet, prompt, cfg_layout=("cond",)):
        unet(torch.randn(1, 4, 16, 16), 10, torch.randn(1, 5, CROSS)).sample.sum().backward()
    assert features.grad.abs().sum() > 0


# ---- videos


def motion_unet():
    unet = UNetMotionModel.from_unet2d(sd15_unet(), MotionAdapter(
        block_out_channels=(16, 32, 32, 32), motion_layers_per_block=2, motion_num_attention_heads=2, motion_norm_num_groups=8,
        use_motion_mid_block=False,
    ))  # fmt: skip
    for name, parameter in unet.named_parameters():
        if "motion_modules" in name and "proj_out" in name:
            parameter.data.zero_()  # frames do not see each other
    return unet.eval()


def test_motion_modules_have_no_numbers():
    """An adapter fits the UNet with and without them."""
    plain, moving = find_cross_attention_layers(sd15_unet()), find_cross_attention_layers(motion_unet())
    assert [(layer.index, layer.name) for layer in plain] == [(layer.index, layer.name) for layer in moving]
    assert find_attention_layers(sd15_unet()) == find_attention_layers(motion_unet())


@torch.no_grad()
def test_a_video_has_references_masks_and_weights_for_each_frame():
    """Each frame is what an image with its reference, mask and weight is."""
    torch.manual_seed(0)
    moving, still, frames = motion_unet(), sd15_unet(), 3
    prompt = random_prompt(still, prompts=frames)
    masks, weights = torch.rand(frames, 16, 16), torch.tensor([0.0, 0.5, 2.0])
    video, text = torch.randn(2, 4, frames, 16, 16), torch.randn(2, 5, CROSS)
    with attach(moving, replace(prompt, mask=masks, frame_weights=weights), cfg_layout=("uncond", "cond")):
        received = moving(video, 10, text.repeat_interleave(frames, 0)).sample
    for n in range(frames):
        single = replace(prompt, image_features=prompt.image_features[n : n + 1], mask=masks[n], scale=float(weights[n]))
        with attach(still, single, cfg_layout=("uncond", "cond")):
            torch.testing.assert_close(received[:, :, n], still(video[:, :, n], 10, text).sample, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_frames_that_do_not_fit_are_refused(sd15):
    moving = motion_unet()
    video = torch.randn(1, 4, 3, 16, 16), 10, torch.randn(3, 5, CROSS)
    for options in ({"mask": torch.ones(2, 8, 8)}, {"frame_weights": torch.ones(4)}):
        expected = pytest.raises(UserError, match="frames, and the pipeline generates a video of 3 frames")
        with attach(moving, random_prompt(moving, **options), cfg_layout=("cond",)), expected:
            moving(*video)
        with attach(sd15, random_prompt(sd15.unet, **options)), pytest.raises(UserError, match="and the pipeline generates an image"):
            sample_latents(sd15)
    expected = pytest.raises(UserError, match="or for each of 3 frames")
    with attach(moving, random_prompt(moving, prompts=2), cfg_layout=("cond",)), expected:
        moving(*video)


def test_prompts_of_videos_are_laid_out_by_video_or_by_frame():
    uncond, cond = torch.tensor([[0.0]]), torch.tensor([[1.0], [2.0]])
    assert expand_to_cfg_batch(uncond, cond, ("cond",), 12, 3).flatten().tolist() == [1.0] * 6 + [2.0] * 6  # four videos of two texts
    assert expand_to_cfg_batch(uncond, cond, ("cond",), 6, 2).flatten().tolist() == [1, 2, 1, 2, 1, 2]  # three videos of two frames
    with pytest.raises(UserError, match="one for each video, or one for each frame"):
        expand_to_cfg_batch(uncond, cond, ("cond",), 4, 2)


def test_masks_of_frames_have_one_size():
    assert load_masks([torch.ones(4, 4)] * 3).shape == (3, 4, 4) and load_masks(torch.ones(2, 4, 4)).shape == (2, 4, 4)
    with pytest.raises(UserError, match="masks of one size"):
        load_masks([torch.ones(4, 4), torch.ones(4, 5)])


def test_a_batch_that_is_split_on_the_way_is_refused(sd15):
    """As FreeNoise's split inference does: keys and values are laid out for the whole batch."""
    layer = find_cross_attention_layers(sd15.unet)[0].attention
    original = layer.forward

    def forward_by_row(hidden, encoder_hidden_states, **kwargs):
        return torch.cat([original(h, t, **kwargs) for h, t in zip(hidden.split(1), encoder_hidden_states.split(1), strict=True)])

    layer.forward = forward_by_row
    with attach(sd15, random_prompt(sd15.unet)), pytest.raises(UserError, match="need whole batches"):
        sample_latents(sd15)


def test_image_to_image_starts_inside_the_window(sd15):
    """Progress counts from pure noise: at strength 0.5 the first half is over."""
    pipe = StableDiffusionImg2ImgPipeline(**sd15.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    options = {"image": image, "strength": 0.5, "num_inference_steps": 4}
    plain = sample_latents(pipe, **options)
    with attach(pipe, random_prompt(sd15.unet, end_at=0.5)):
        assert torch.equal(sample_latents(pipe, **options), plain)
    with attach(pipe, random_prompt(sd15.unet, start_at=0.5)):
        assert not torch.allclose(sample_latents(pipe, **options), plain, atol=1e-4)


def test_progress_is_that_of_each_row():
    assert denoising_progress(torch.tensor([999, 499]), 1000).tolist() == [0.0, 0.5]
