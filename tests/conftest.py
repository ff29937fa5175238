"""Small models of the real classes, random but fixed, for tests that need no training."""

import copy
import multiprocessing
import os
import signal
from functools import cache
from multiprocessing import forkserver
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from imprompt.core.adapter import Adapter
from imprompt.core.image_projection import FaceIDPlusProjection, FaceIDProjection, FullImageProjection, ImageProjection, Resampler
from imprompt.mini.tokenizer import build_tokenizer
from imprompt.unet.attn_processors import infer_adapter_shape

torch.set_num_threads(1)


def pytest_generate_tests(metafunc):
    if metafunc.definition.get_closest_marker("bf16"):
        if "cpu_bf16" not in metafunc.fixturenames:
            metafunc.fixturenames.insert(0, "cpu_bf16")
        metafunc.parametrize("cpu_bf16", ["on", "off"], indirect=True)


@pytest.fixture
def cpu_bf16(request, monkeypatch):
    """Whether a test marked `bf16` takes the CPU for one that computes in bfloat16. Where it does not, that is emulated."""
    monkeypatch.setenv("IMPROMPT_CPU_BF16", request.param)
    return request.param == "on"


for number, action in {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}.items():
    if signal.getsignal(number) is signal.SIG_IGN:  # as in background jobs and under nohup; commands that tests start would ignore it, too
        signal.signal(number, action)

# Files that each take more than about seven seconds of one core.
SLOW_FILES = {
    "cli/test_bad_input", "cli/test_console", "cli/test_evaluate", "cli/test_first_tries", "cli/test_personalize", "cli/test_signals",
    "cli/test_tasks", "cli/test_unused_inputs", "dit/test_transformer_compile", "evaluation/test_evaluation_runner",
    "evaluation/test_external_pipelines", "evaluation/test_face_adapters", "evaluation/test_process_pool",
    "evaluation/test_subject_evaluation", "fuzz/test_adapters", "fuzz/test_fuzz_images", "fuzz/test_fuzz_options",
    "fuzz/test_fuzz_readers", "fuzz/test_states", "methods/test_methods", "methods/test_per_subject", "mini/test_benchmark",
    "mini/test_recipe", "models/test_references", "parity/test_diffusers", "parity/test_faceid", "pipelines/test_circumstances",
    "pipelines/test_every_pipeline", "pipelines/test_matrix", "studies/test_ip_adapter", "studies/test_personalization", "test_readme",
    "training/test_cache", "training/test_leave_one_out", "training/test_loop", "training/test_parameters", "training/test_processes",
    "training/test_run_folder", "training/test_sanity_check", "unet/test_calls",
}  # fmt: skip


def pytest_collection_modifyitems(items):
    """Mark the tests of SLOW_FILES as slow: make test-fast leaves them out."""
    for item in items:
        if item.nodeid.split("::")[0].removeprefix("tests/").removesuffix(".py") in SLOW_FILES:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def fork_server():
    """A multiprocessing context whose processes are forked from one that has imported everything, instead of importing for seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["imprompt.training", "imprompt.studies.runner", "imprompt.cli", "pytest"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        forkserver.ensure_running()
    return context


@pytest.fixture(scope="module")
def forked_workers(fork_server):
    """Processes of evaluations and studies are forked, too."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("imprompt.evaluation.workers", "imprompt.studies.runner"):
            patch.setattr(f"{module}.get_context", lambda method: fork_server)
        yield


CROSS = 32
VISION = 40  # dimension of the image encoder's patch features
POOLED = 24  # dimension of its pooled embedding
FACE = 12  # dimension of the identity embeddings
RANK = 3  # of the LoRA in FaceID adapters


def sd15_unet(cross: int = CROSS, **more: Any) -> UNet2DConditionModel:
    """SD 1.5's layout of blocks and layers: 16 cross-attention layers."""
    torch.manual_seed(0)
    settings = {"sample_size": 16, "block_out_channels": (16, 32, 32, 32), "layers_per_block": 2, "cross_attention_dim": cross}
    return UNet2DConditionModel(**settings | {"attention_head_dim": 4, "norm_num_groups": 8} | more).eval()


def sd21_unet() -> UNet2DConditionModel:
    """SD 2.1's: SD 1.5's blocks with linear projections and heads of one width."""
    return sd15_unet(attention_head_dim=(2, 4, 4, 4), use_linear_projection=True)


def sdxl_unet(cross: int = CROSS) -> UNet2DConditionModel:
    """SDXL's layout: transformers of depth 2 and 10, added conditions, 70 cross-attention layers."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32, 32),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        cross_attention_dim=cross,
        attention_head_dim=(2, 4, 4),
        norm_num_groups=8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + CROSS,
    ).eval()


def vision_encoder() -> CLIPVisionModelWithProjection:
    torch.manual_seed(1)
    config = CLIPVisionConfig(
        hidden_size=VISION,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        projection_dim=POOLED,
    )
    return CLIPVisionModelWithProjection(config).eval()


_built_tokenizer = cache(build_tokenizer)  # takes longer than all models


def _tokenizer() -> CLIPTokenizer:
    return copy.deepcopy(_built_tokenizer())  # some tests add tokens to it


def _text_config() -> CLIPTextConfig:
    tokenizer = _built_tokenizer()
    return CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=CROSS, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=24, projection_dim=CROSS, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def _vae() -> AutoencoderKL:
    torch.manual_seed(2)
    return AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4, norm_num_groups=4, sample_size=32,
    ).eval()  # fmt: skip


def image_processor() -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def sd15_pipeline(unet: UNet2DConditionModel | None = None) -> StableDiffusionPipeline:
    """A complete pipeline around a small random SD-1.5-shaped UNet."""
    torch.manual_seed(3)
    pipe = StableDiffusionPipeline(
        unet=unet or sd15_unet(), vae=_vae(), text_encoder=CLIPTextModel(_text_config()).eval(), tokenizer=_tokenizer(),
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1),
        image_encoder=vision_encoder(), feature_extractor=image_processor(), safety_checker=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sd21_pipeline() -> StableDiffusionPipeline:
    """The same around an SD-2.1-shaped one, which predicts v."""
    pipe = sd15_pipeline(sd21_unet())
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
    return pipe


def sdxl_pipeline() -> StableDiffusionXLPipeline:
    torch.manual_seed(3)
    text, text_2 = CLIPTextModel(_text_config()).eval(), CLIPTextModelWithProjection(_text_config()).eval()
    pipe = StableDiffusionXLPipeline(
        unet=sdxl_unet(2 * CROSS), vae=_vae(), text_encoder=text, text_encoder_2=text_2,
        tokenizer=_tokenizer(), tokenizer_2=_tokenizer(),
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1),
        image_encoder=vision_encoder(), feature_extractor=image_processor(), add_watermarker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def random_adapter(unet: UNet2DConditionModel, adapter_type: str, seed: int = 5) -> Adapter:
    """An adapter of this type for this UNet, with random weights that are large enough to have an effect."""
    torch.manual_seed(seed)
    hidden_dims, cross_attention_dim = infer_adapter_shape(unet)
    projector = {
        "base": lambda: ImageProjection(POOLED, cross_attention_dim, 4),
        "plus": lambda: Resampler(VISION, cross_attention_dim, num_tokens=6, hidden_dim=64, num_heads=1, depth=4),
        "full-face": lambda: FullImageProjection(VISION, cross_attention_dim),
    }[adapter_type]()
    return Adapter(projector, hidden_dims, cross_attention_dim).eval().requires_grad_(False)


def random_face_adapter(unet, *, plus=False, tokens=4, shortcut=False, lora=True):
    """Random weights in the layout of the public files, with LoRA in every layer, of self-attention too."""
    torch.manual_seed(5)
    hidden_dims, cross_attention_dim = infer_adapter_shape(unet)
    if plus:
        projector = FaceIDPlusProjection(FACE, VISION, cross_attention_dim, tokens, 24, num_heads=1, depth=4, shortcut=shortcut)
    else:
        projector = FaceIDProjection(FACE, cross_attention_dim, tokens, 24)
    adapter = Adapter(projector, hidden_dims, cross_attention_dim)
    if lora:
        for n, name in enumerate(unet.attn_processors):
            hidden = unet.get_submodule(name.removesuffix(".processor")).to_q.in_features
            kv_dim = cross_attention_dim if n % 2 else hidden
            adapter.add_lora(n, {name: (kv_dim if name in "kv" else hidden, hidden, RANK) for name in ("q", "k", "v", "out")})
    return adapter.eval().requires_grad_(False)


@pytest.fixture(autouse=True, scope="module")
def check_shapes_of_core(request):
    """Tests of core check the shapes in its signatures."""
    if request.path.parent.name != "core":
        yield
        return
    from shape_checks import checked_shapes

    with checked_shapes():
        yield


@pytest.fixture
def sd15():
    return sd15_pipeline()


@pytest.fixture
def sdxl():
    return sdxl_pipeline()
