"""Mini's control models: a ControlNet for edges and a T2I-Adapter for silhouettes, trained like the published ones.

See arXiv:2302.05543 (ControlNet) and arXiv:2302.08453 (T2I-Adapter). The base model is frozen; control images are rendered. A
segmentation model for silhouettes, trained on other subjects, is used for evaluation only.
"""

import random
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ControlNetModel, StableDiffusionPipeline, T2IAdapter, UNet2DModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from imprompt.mini import world
from imprompt.mini.tokenizer import tokenize_prompts
from imprompt.recipes.mini_models import (
    ImagePool,
    LatentPool,
    TrainingProgressCallback,
    build_scheduler,
    render_once,
    sample_noised_batch,
    sample_pool_caption,
    scale_count,
)
from imprompt.recipes.trainer import TrainPlan, make_step_generator, train_module
from imprompt.unet.mkldnn import to_channels_last_if_faster

SEGMENTER = "judge-silhouette"
PLANS = {
    "edges": TrainPlan("edges", 900, 32, 5e-4, warmup_steps=50, ema_decay=0.99, muon_lr=1e-3),
    "silhouette": TrainPlan("silhouette", 900, 32, 1e-3, warmup_steps=50, ema_decay=0.99, muon_lr=2e-3),
    SEGMENTER: TrainPlan(SEGMENTER, 700, 32, 3e-3, warmup_steps=50),
}
NUM_CONTROL_IMAGES = 24_000


class ControlImages:
    """The control image of each image of a pool, rendered once: (count, size, size, 1), uint8."""

    def __init__(self, folder: Path, pool: ImagePool, kind: str):
        self.path, self.pool = folder / f"{kind}-of-{pool.path.name}", pool
        self._render = {"edges": world.render_edges, "silhouette": world.render_silhouette}[kind]

    def render_all(self, report: TrainingProgressCallback) -> None:
        """Render all; a finished file is left alone."""
        render_once(self.path, self.pool.count, lambda i: self._render(self.pool.subject_of(i), self.pool.scene_of(i)), 1, report)

    @cached_property
    def _values(self) -> Tensor:
        return torch.from_numpy(np.load(self.path, mmap_mode="r+"))

    def load_rows(self, rows: Tensor, channels: int) -> Tensor:
        """(rows, channels, size, size) in 0 … 1."""
        return self._values[rows].permute(0, 3, 1, 2).float().div(255).expand(-1, channels, -1, -1)


class ControlTraining(nn.Module):
    """L = E‖v − v_θ(x_t, c, control, t)‖²; only the control model is trained. The text is dropped with probability 0.3, so that
    it can be combined with image prompts.
    """

    def __init__(self, model: Any, pipe: StableDiffusionPipeline, latents: LatentPool, drawings: ControlImages, plan: TrainPlan):
        super().__init__()
        self.model = model
        pipe.unet.set_attn_processor(AttnProcessor())
        self._frozen = [
            pipe.unet.eval().requires_grad_(False),
            pipe.text_encoder.eval().requires_grad_(False),
        ]  # in a list: neither trained nor saved
        self.latents, self.drawings, self.tokenizer, self.plan = latents, drawings, pipe.tokenizer, plan
        self.schedule = build_scheduler()

    def compute_loss(self, step: int) -> Tensor:
        unet, text = self._frozen
        rows, x, t, target = sample_noised_batch(
            self.latents, self.schedule, self.plan.batch_size, make_step_generator(self.plan.name, step), self.model.device
        )
        rng = random.Random(f"{self.plan.name} {step}")
        texts = ["" if rng.random() < 0.3 else sample_pool_caption(self.latents.pool, int(i), rng, scene_caption_prob=0.15) for i in rows]
        with torch.no_grad():
            states = text(tokenize_prompts(self.tokenizer, texts).to(self.model.device)).last_hidden_state
        return F.mse_loss(unet(x, t, states, **self.compute_residuals(x, t, states, rows)).sample.float(), target)

    def compute_residuals(self, x: Tensor, t: Tensor, states: Tensor, rows: Tensor) -> dict[str, Any]:
        """The residuals of the control model, as arguments of the UNet."""
        if isinstance(self.model, ControlNetModel):
            control_images = self.drawings.load_rows(rows, 3).to(x)
            down, mid = self.model(x, t, encoder_hidden_states=states, controlnet_cond=control_images, return_dict=False)
            return {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        return {"down_intrablock_additional_residuals": list(self.model(self.drawings.load_rows(rows, 1).to(x)))}


class SegmentationTraining(nn.Module):
    """Objective of the segmentation model: cross-entropy for every pixel."""

    def __init__(self, model: UNet2DModel, drawings: ControlImages, plan: TrainPlan):
        super().__init__()
        self.model, self.drawings, self.plan = model, drawings, plan

    def compute_loss(self, step: int) -> Tensor:
        pool = self.drawings.pool
        rows = torch.randint(pool.count, (self.plan.batch_size,), generator=make_step_generator(self.plan.name, step))
        logits = self.model(pool.load_images(rows).to(self.model.device), 0).sample
        return F.binary_cross_entropy_with_logits(logits, self.drawings.load_rows(rows, 1).to(logits))


def build_segmenter() -> UNet2DModel:
    """Image → one logit for each pixel."""
    return UNet2DModel(
        sample_size=world.SIZE, in_channels=3, out_channels=1, block_out_channels=(16, 32, 48), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D",) * 3, up_block_types=("UpBlock2D",) * 3, add_attention=False,
    )  # fmt: skip


def build_control_model(kind: str, pipe: StableDiffusionPipeline) -> Any:
    """An untrained control model for this base; a ControlNet is initialized from the UNet's encoder."""
    if kind == "edges":
        return ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(16, 32, 96))  # 64 pixels are 16 latent positions
    *channels, last = pipe.unet.config.block_out_channels
    # Like SDXL's: the first block has no attention and halves the side, and the middle block receives features too.
    return T2IAdapter(1, [*channels, last, last], num_res_blocks=1, downscale_factor=8, adapter_type="full_adapter_xl")


def train_control_model(kind: str, model: Path, folder: Path, on_progress: Callable[[str, int, int, float], None], budget: float) -> Path:
    """Train a control model for the mini in `model`, or the segmentation model, in `folder` (resumable); save it as `folder/KIND`
    in diffusers format.
    """
    pool = ImagePool(folder, scale_count(NUM_CONTROL_IMAGES, budget), "judge" if kind == SEGMENTER else "train")
    pool.render_all(lambda done, total, _: on_progress("rendering", done, total, 0.0))
    drawings = ControlImages(folder, pool, "edges" if kind == "edges" else "silhouette")
    drawings.render_all(lambda done, total, _: on_progress(kind, done, total, 0.0))
    plan = PLANS[kind].scale_steps(budget)
    torch.manual_seed(0)
    if kind == SEGMENTER:
        module: SegmentationTraining | ControlTraining = SegmentationTraining(build_segmenter(), drawings, plan)
    else:
        pipe = StableDiffusionPipeline.from_pretrained(model, safety_checker=None, requires_safety_checker=False)
        latents = LatentPool(folder, pool)
        latents.encode_all(pipe.vae, lambda done, total, _: on_progress("latents", done, total, 0.0))
        to_channels_last_if_faster(pipe.unet)
        module = ControlTraining(build_control_model(kind, pipe), pipe, latents, drawings, plan)
    train_module(
        plan, module, module.compute_loss, folder, lambda done, total, loss: on_progress(kind, done, total, loss), check_gradients_after=4
    )
    module.model.to(dtype=torch.float16).save_pretrained(folder / kind)
    return folder / kind
