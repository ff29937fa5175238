"""Every pipeline of diffusers that owns a UNet: the image prompt works and equals the reference computation, or is refused in a sentence.

docs/pipelines.md is the table of the results; `PYTHONPATH=src:tests python tests/pipelines/test_every_pipeline.py` writes it.
"""

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import numpy as np
import pytest
import torch
from PIL.Image import Image
from small_pipelines import Call, build_calls, build_shell, find_pipelines, has_ip_adapter, has_supported_unet, prompt_embeds
from torch import Tensor

from conftest import POOLED
from imprompt.core.adapter import Adapter
from imprompt.core.image_projection import ImageProjection
from imprompt.dit.attach import attach
from imprompt.models.image_prompt import ImagePrompt
from imprompt.unet.attn_processors import DecoupledAttnProcessor, infer_adapter_shape


class Refusal(NamedTuple):
    """The error and a part of its sentence, and why in the table's words."""

    error: type[Exception]
    match: str
    reason: str


_TYPE = Refusal(TypeError, "expected a diffusers pipeline with a UNet2DConditionModel or UNetMotionModel", "has another kind of UNet")
_ADDED_KV = Refusal(ValueError, "the model has 0", "attends to text and image at once: it has no cross-attention layers")
_WIDTHS = Refusal(ValueError, "the adapter does not fit", "is conditioned on sound, not on text embeddings")
_NO_GUIDANCE = Refusal(
    ValueError, "does not report which rows of its batch are conditional", "does not guide: it predicts from an image or a spectrogram"
)
_OWN_PROCESSORS = Refusal(RuntimeError, "attach last", "sets attention processors of its own while it samples")

_REFUSED = {
    **dict.fromkeys(
        (name for name in find_pipelines() if name.startswith(("KandinskyP", "KandinskyI", "KandinskyC", "KandinskyV", "IF"))), _ADDED_KV
    ),
    **dict.fromkeys(("StableDiffusionControlNetXSPipeline", "StableDiffusionXLControlNetXSPipeline"), _TYPE),
    **dict.fromkeys(("AudioLDMPipeline", "MusicLDMPipeline"), _WIDTHS),
    **dict.fromkeys((name for name in find_pipelines() if name.startswith(("Marigold", "AudioDiffusion"))), _NO_GUIDANCE),
    **dict.fromkeys((name for name in find_pipelines() if name.startswith(("TextToVideoZero", "StableDiffusionAttend"))), _OWN_PROCESSORS),
    "StableDiffusionPix2PixZeroPipeline": _OWN_PROCESSORS,
}
REFUSED = {name: _TYPE for name, cls in find_pipelines().items() if not has_supported_unet(cls)} | _REFUSED
WORKING = sorted(find_pipelines().keys() - REFUSED.keys())


def zero_uncond_prompt(unet: Any, scale: float) -> ImagePrompt:
    """An image prompt of random weights whose unconditional keys and values are zero: unconditional rows do not change."""
    torch.manual_seed(5)
    hidden_dims, cross = infer_adapter_shape(unet)
    adapter = Adapter(ImageProjection(POOLED, cross, 4), hidden_dims, cross).eval().requires_grad_(False)
    adapter.image_proj.proj.bias.zero_()
    adapter.image_proj.norm.bias.zero_()
    return ImagePrompt(adapter, torch.randn(1, 1, 1, POOLED), torch.zeros(1, 1, 1, POOLED), scale)


def sample(call: Call, **more: Any) -> Tensor:
    """The result of the call, as a tensor."""
    torch.manual_seed(0)
    for method, arguments in call.before:
        getattr(call.pipe, method)(**arguments)
    out = getattr(type(call.pipe), call.method)(call.pipe, **call.arguments, **more)
    first = next(iter(out.values())) if isinstance(out, dict) else out
    while isinstance(first, (list, tuple)):
        first = first[-1]
    return torch.as_tensor(np.asarray(first) if isinstance(first, Image) else first)


class Recorder:
    """For every UNet call which rows of the batch the image prompt changes, and which of them have the text of the prompt."""

    def __init__(self, call: Call):
        self.changed: list[list[bool]] = []
        self.conditional: list[list[bool]] = []
        self._positives = [prompt_embeds(call.pipe)[0]] if "prompt_embeds" in call.arguments else list(call.positives)
        self._words = call.pipe.tokenizer if hasattr(call.pipe, "tokenizer") else None
        encoder = getattr(call.pipe, "text_encoder", None) or getattr(call.pipe, "bert", None)
        hooks = [
            call.pipe.unet.register_forward_pre_hook(self._run_plain, with_kwargs=True, prepend=True),
            call.pipe.unet.register_forward_hook(self._record),
        ]
        if isinstance(encoder, torch.nn.Module):
            hooks.append(encoder.register_forward_hook(self._record_text, with_kwargs=True))
        self._hooks = hooks

    def _record_text(self, module: Any, args: Any, kwargs: Any, out: Any) -> None:
        ids = args[0] if args else kwargs["input_ids"]
        for row, words in enumerate(self._words.batch_decode(ids)):
            if "red" in words:
                self._positives += [states[row] for states in (out[0], *(out.hidden_states or ())) if states.ndim == 3]

    @torch.no_grad()
    def _run_plain(self, unet: Any, args: Any, kwargs: Any) -> None:
        """The output without the image prompt. Lists are copied, the UNet empties them."""
        inputs = {key: list(value) if isinstance(value, list) else value for key, value in kwargs.items()}
        self._plain = unet.forward(*args, **inputs | {"return_dict": False})[0]
        text = inputs["encoder_hidden_states"]
        text = text[:: len(text) // len(self._plain)]
        self.conditional.append([any(_is_text(row, positive) for positive in self._positives) for row in text])

    def _record(self, unet: Any, args: Any, out: Any) -> None:
        self.changed.append((out[0] != self._plain).flatten(1).any(1).tolist())

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


def _is_text(row: Tensor, positive: Tensor) -> bool:
    width = min(row.shape[-1], positive.shape[-1])
    return row.shape[0] == positive.shape[0] and torch.allclose(row[:, :width], positive[:, :width], atol=1e-5)


def check_works(call: Call) -> float | None:
    """λ = 0 changes nothing, λ = 1 the conditional rows only; the latents of `load_ip_adapter` where it takes embeddings: its error."""
    plain = sample(call)
    with attach(call.pipe, zero_uncond_prompt(call.pipe.unet, 0.0)):
        assert torch.equal(sample(call), plain), "λ = 0 changes the result"
    prompt = zero_uncond_prompt(call.pipe.unet, 1.0)
    with attach(call.pipe, prompt):
        recorder = Recorder(call)
        conditioned = sample(call)
        recorder.remove()
    assert not any(isinstance(processor, DecoupledAttnProcessor) for processor in call.pipe.unet.attn_processors.values())
    assert recorder.changed == recorder.conditional, (recorder.changed, recorder.conditional)
    assert any(map(any, recorder.changed)) != (call.method == "invert"), "the image prompt is for what is generated, not for the source"
    return compare_with_diffusers(call, prompt, conditioned)


def compare_with_diffusers(call: Call, prompt: ImagePrompt, conditioned: Tensor) -> float | None:
    """The relative error of the result against diffusers' own IP-Adapter; None where it has none."""
    if not call.has_ip_adapter:
        return None
    names = {"image_proj": "image_proj.", "ip_adapter": "ip_adapter."}
    tensors = prompt.adapter.state_dict()
    state = {part: {k.removeprefix(p): v for k, v in tensors.items() if k.startswith(p)} for part, p in names.items()}
    call.pipe.load_ip_adapter(state, subfolder="", weight_name="", image_encoder_folder=None)
    call.pipe.set_ip_adapter_scale(1.0)
    guided = "LatentConsistency" not in type(call.pipe).__name__ and call.arguments["guidance_scale"] > 1
    embeds = torch.cat([*([prompt.uncond_features[0]] if guided else []), prompt.image_features[0]])
    try:
        expected = sample(call, ip_adapter_image_embeds=[embeds])
    finally:
        call.pipe.unload_ip_adapter()
    return float((conditioned - expected).norm() / expected.norm())


def attach_and_call(name: str) -> None:
    """Attach an image prompt to the pipeline, and call it where its models can be built."""
    cls = find_pipelines()[name]
    prompt = zero_uncond_prompt(_reference_unet(), 1.0)
    if REFUSED[name] in (_TYPE, _ADDED_KV, _WIDTHS):
        attach(build_shell(cls), prompt)
        return
    call = build_calls(cls)[0]
    with attach(call.pipe, zero_uncond_prompt(call.pipe.unet, 1.0)):
        sample(call)


@cache
def _reference_unet() -> Any:
    return build_calls(diffusers.StableDiffusionPipeline)[0].pipe.unet


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WORKING)
def test_an_image_prompt_works_as_the_reference_computation(name):
    for call in build_calls(find_pipelines()[name]):
        error = check_works(call)
        assert error is None or error <= 1e-6


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(REFUSED))
def test_other_pipelines_are_refused_in_a_sentence(name):
    with pytest.raises(REFUSED[name].error, match=REFUSED[name].match) as raised:
        attach_and_call(name)
    assert "\n" not in str(raised.value)


@pytest.mark.filterwarnings("ignore")
def test_a_modular_pipeline_calls_the_unet_for_each_guidance_group():
    """Its result is that of the plain pipeline, and with its own guider disabled that of the plain one without guidance."""
    plain = build_calls(diffusers.StableDiffusionXLPipeline)[0].pipe
    modular = diffusers.StableDiffusionXLAutoBlocks().init_pipeline()
    names = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
    modular.update_components(**{name: plain.components[name] for name in names})
    modular.set_progress_bar_config(disable=True)
    texts = {"prompt": "a red fish", "negative_prompt": "a blue cat"}
    arguments = {**texts, "num_inference_steps": 2, "height": 32, "width": 32}

    def sample_modular() -> Tensor:
        return modular(**arguments, generator=torch.Generator().manual_seed(0), output="latents")

    without = sample_modular()
    with attach(modular, zero_uncond_prompt(modular.unet, 0.0)):
        assert torch.equal(sample_modular(), without)
    with attach(modular, zero_uncond_prompt(modular.unet, 1.0)):
        recorder = Recorder(Call(modular, {}))
        guided = sample_modular()
        recorder.remove()
        expected = plain(**arguments, guidance_scale=7.5, generator=torch.Generator().manual_seed(0), output_type="latent").images
    assert recorder.changed == recorder.conditional == [[True], [False]] * 2
    torch.testing.assert_close(guided, expected, rtol=1e-4, atol=1e-4)


_NO_REFERENCE = {
    "AltDiffusionPipeline": "its own takes no embeddings",
    "AltDiffusionImg2ImgPipeline": "its own takes no embeddings",
    "StableDiffusionInstructPix2PixPipeline": "its own fails with embeddings",
    "StableDiffusionLDM3DPipeline": "its own fails with embeddings",
    "StableDiffusionSAGPipeline": "equal without guidance; with it, its own conditions the unconditional rows too",
}


def _reference_note(name: str) -> str:
    default = "equal, ≤ 1e-6" if has_ip_adapter(find_pipelines()[name]) else "has none"
    return _NO_REFERENCE.get(name, default)


def table() -> str:
    """docs/pipelines.md."""
    working = [f"| {name} | {_reference_note(name)} |" for name in WORKING]
    refused = [f"| {name} | {REFUSED[name].reason} |" for name in sorted(REFUSED)]
    return _PAGE.format(version=diffusers.__version__, working="\n".join(working), refused="\n".join(refused))


_PAGE = """# Pipelines

Every pipeline of diffusers {version} that owns a UNet. `tests/pipelines/test_every_pipeline.py` runs each of them with a small random
model; `PYTHONPATH=src:tests python tests/pipelines/test_every_pipeline.py` writes this page.

## Image prompts work

Tested: λ = 0 leaves the result unchanged to the bit; λ = 1 changes exactly the rows of the batch that have the text of the prompt, in every
call of the UNet; detaching restores the pipeline. Where diffusers' own IP-Adapter can be used, the result is compared with it. Modular
pipelines of SDXL work too, with every guider that labels its batches.

Which rows are conditional is read from the call that is being made, so that several pipelines may share a UNet. Rows of a source prompt
(inversion, CycleDiffusion, DiffEdit) and of a concept that is only compared (safe and semantic guidance) count as unconditional: the image
prompt describes what is generated. Pipelines that are not listed, and report `do_classifier_free_guidance`, are assumed to pass the
unconditional rows first, as diffusers does; otherwise pass the layout: `attach(pipe, prompt, cfg_layout=(…))`.

| pipeline | diffusers' own IP-Adapter |
|---|---|
{working}

## Refused, in one sentence

| pipeline | because it |
|---|---|
{refused}
"""


def test_the_page_lists_every_pipeline():
    page = PAGE_PATH.read_text("utf-8")
    if f"diffusers {diffusers.__version__} " not in page:
        pytest.skip("written for another version of diffusers")
    assert page == table()


PAGE_PATH = Path(__file__).parents[2] / "docs" / "pipelines.md"

if __name__ == "__main__":
    PAGE_PATH.write_text(table(), "utf-8")
