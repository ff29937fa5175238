"""All of mini from nothing: the parts of the recipe, and then the adapters, by the same training that users run."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from imprompt.config import Train, read_toml
from imprompt.config import build as configured
from imprompt.errors import UserError
from imprompt.models import checkpoints
from imprompt.models.hub import EMBEDDED, MINI
from imprompt.recipes.controlnets import make_structure
from imprompt.recipes.mini_models import ADAPTERS, PLANS, STRUCTURE, Build
from imprompt.training import recorded, train
from imprompt.utils.files import atomic_path

CONFIGS = Path(__file__).parent / "configs"


def make(build: Build, only: Sequence[str] = ()) -> None:
    """Make every part that is missing, in order; or only those named. What was interrupted goes on.

    Companions (STRUCTURE) alone are made for the embedded model where the folder has none of its own.
    """
    if unknown := set(only) - {*PLANS, *ADAPTERS, *STRUCTURE}:
        raise UserError(f"mini has no part called {unknown.pop()!r}; expected {', '.join((*PLANS, *ADAPTERS, *STRUCTURE))}")
    build.make([name for name in PLANS if not only or name in only])
    wanted = [name for name in (*ADAPTERS, *STRUCTURE) if (not only or name in only) and not (build.parts / name).exists()]
    own = (build.parts / "unet").exists()
    if wanted and (own or not set(wanted) <= set(STRUCTURE)):
        build.assemble(build.folder / "model")
    for name in wanted:
        if name in STRUCTURE:
            made = make_structure(name, build.folder / "model" if own else MINI, build.folder, build.report, build.budget)
            build.parts.mkdir(exist_ok=True)
            made.replace(build.parts / name)
            continue
        choice = chosen(build, name)
        for step in recorded(choice, train(choice)):
            build.report(name, step.index, step.steps, step.loss)
        keep_adapter(build, name, Path(choice.out) / "adapter.safetensors")


def install(build: Build) -> None:
    """Make what was made the embedded model, or companions alone a part of it."""
    if (build.parts / "unet").exists():
        build.assemble(MINI)
    else:
        build.add_companions(MINI)


def chosen(build: Build, name: str) -> Train:
    """The committed settings, on the parts just made instead of those that ship."""
    choice = configured(Train, read_toml(CONFIGS / f"{name}.toml"))
    model = build.folder / "model"
    begin = choice.adapter and build.parts / Path(EMBEDDED[choice.adapter]).stem / "adapter.safetensors"
    if begin and not begin.is_file():
        raise UserError(f"{name} goes on from {begin.parent.name}, which is not there; make it first, or leave --only out")
    return replace(
        choice,
        base=str(model),
        adapter=str(begin) if begin else None,
        encoder=str(model / "image_encoder"),
        judge=str(model / "judge_clip"),
        steps=max(2, round(choice.steps * build.budget)),
        out=str(build.folder / name),
    )


def keep_adapter(build: Build, name: str, file: Path) -> None:
    """Make a trained adapter a part, in half precision."""
    adapter, _ = checkpoints.load_adapter(file)
    recipe = f"imprompt train --config src/imprompt/mini/configs/{name}.toml"
    about = {"base": "mini", "encoder": "mini CLIP", "aggregator": adapter.aggregator.name, "recipe": recipe}
    with atomic_path(build.parts / name / "adapter.safetensors") as partial:
        checkpoints.save(adapter, partial, about, torch.float16)
