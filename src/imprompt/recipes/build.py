"""All of mini from scratch: the parts of the recipe, and then the adapters, by the same training that users run."""

from collections.abc import Sequence
from pathlib import Path

import torch

from imprompt.config import TrainConfig, read_options
from imprompt.errors import UserError
from imprompt.models import checkpoints
from imprompt.models.hub import BUNDLED_ADAPTERS, MINI_PATH
from imprompt.recipes.controlnets import train_control_model
from imprompt.recipes.mini_models import ADAPTER_PARTS, CONTROL_PARTS, PLANS, MiniBuild
from imprompt.training import log_steps, train_adapter
from imprompt.utils.files import atomic_path

CONFIGS = Path(__file__).parent / "configs"


def build_mini(build: MiniBuild, only: Sequence[str] = ()) -> None:
    """Train every missing part in order, or only those named; an interrupted part is resumed.

    Control models (CONTROL_PARTS) alone are trained for the embedded model where the folder has no base of its own.
    """
    if unknown := set(only) - {*PLANS, *ADAPTER_PARTS, *CONTROL_PARTS}:
        raise UserError(f"mini has no part called {unknown.pop()!r}; expected {', '.join((*PLANS, *ADAPTER_PARTS, *CONTROL_PARTS))}")
    build.train_parts([name for name in PLANS if not only or name in only])
    wanted = [name for name in (*ADAPTER_PARTS, *CONTROL_PARTS) if (not only or name in only) and not (build.parts / name).exists()]
    has_base = (build.parts / "unet").exists()
    if wanted and (has_base or not set(wanted) <= set(CONTROL_PARTS)):
        build.assemble_model(build.folder / "model")
    for name in wanted:
        if name in CONTROL_PARTS:
            folder = train_control_model(
                name, build.folder / "model" if has_base else MINI_PATH, build.folder, build.on_progress, build.budget
            )
            build.parts.mkdir(exist_ok=True)
            folder.replace(build.parts / name)
            continue
        config = adapter_config(build, name)
        for step in log_steps(config, train_adapter(config)):
            build.on_progress(name, step.index, step.max_train_steps, step.loss)
        save_adapter_part(build, name, Path(config.output_dir) / "adapter.safetensors")


def install_mini(build: MiniBuild) -> None:
    """Make the result the embedded model; without a base of its own, add its control models to it."""
    if (build.parts / "unet").exists():
        build.assemble_model(MINI_PATH)
    else:
        build.add_control_models(MINI_PATH)


def adapter_config(build: MiniBuild, name: str) -> TrainConfig:
    """The committed options of an adapter, on the parts just trained instead of those that ship."""
    config = TrainConfig.from_options(**read_options(CONFIGS / f"{name}.toml")).with_defaults()
    model = build.folder / "model"
    start = config.adapter and build.parts / Path(BUNDLED_ADAPTERS[config.adapter]).stem / "adapter.safetensors"
    if start and not start.is_file():
        raise UserError(f"{name} is fine-tuned from {start.parent.name}, which is missing; build it first, or remove --only")
    return config.with_options(
        model=str(model),
        adapter=str(start) if start else None,
        image_encoder=str(model / "image_encoder"),
        clip_model=str(model / "judge_clip"),
        max_train_steps=max(2, round(config.optimization.max_train_steps * build.budget)),
        output_dir=str(build.folder / name),
    )


def save_adapter_part(build: MiniBuild, name: str, file: Path) -> None:
    """Save a trained adapter as a part, in half precision."""
    adapter, _ = checkpoints.load_adapter(file)
    recipe = f"imprompt train --config src/imprompt/recipes/configs/{name}.toml"
    metadata = {"base": "mini", "encoder": "mini CLIP", "aggregator": adapter.aggregator.name, "recipe": recipe}
    with atomic_path(build.parts / name / "adapter.safetensors") as partial:
        checkpoints.save(adapter, partial, metadata, torch.float16)
