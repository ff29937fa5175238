"""`imprompt mini make`, `show` and `judge`."""

import argparse
import json
import random
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.table import Table

from imprompt.cli.console import Shown, progress_bar, quiet_libraries
from imprompt.errors import UserError
from imprompt.utils.files import atomic_path, writable_folder, write_file


def make(arguments: argparse.Namespace) -> None:
    """Train every missing part; continue the one that was interrupted."""
    quiet_libraries()
    from imprompt.models.hub import MINI
    from imprompt.recipes.build import install
    from imprompt.recipes.build import make as make_parts
    from imprompt.recipes.mini_models import Build

    _check_budget(arguments.budget)
    with progress_bar("mini") as bar:
        build = Build(writable_folder(arguments.out), partial(_report, bar), arguments.budget)
        make_parts(build, arguments.only)
    print(build.parts)
    if arguments.install:
        install(build)
        print(MINI)


def style(arguments: argparse.Namespace) -> None:
    """Make a custom model to try an adapter on."""
    quiet_libraries()
    from imprompt.recipes.style import STYLES, make_style

    if arguments.style not in STYLES:
        raise UserError(f"style: expected one of {', '.join(STYLES)}, received {arguments.style!r}")
    _check_budget(arguments.budget)
    with progress_bar("style") as bar:
        folder = writable_folder(arguments.out or f"runs/mini-{arguments.style}")
        print(make_style(arguments.style, folder, partial(_report, bar), arguments.budget))


def _check_budget(budget: float) -> None:
    if not 0 < budget <= 10:
        raise UserError(f"budget: expected a share of the full training between 0 and 10, received {budget}")


def _report(bar: Shown, part: str, done: int, total: int, loss: float) -> None:
    bar.rename(part)
    bar.advance(done, total, f"loss {loss:.4f}" if loss else "")


def show(arguments: argparse.Namespace) -> None:
    """Draw a sheet: two rows of the world, then pictures from text, and pictures after references."""
    quiet_libraries()
    from PIL import Image

    from imprompt import generate
    from imprompt.mini import world
    from imprompt.mini.judge import cases
    from imprompt.models.hub import MINI
    from imprompt.utils.images import sheet

    rng = random.Random(arguments.seed)
    shown = cases(8 + arguments.seed)[arguments.seed :]
    photos = [case.photo for case in shown]
    same = [world.draw(case.subject, world.scene(rng.randrange(10**6))) for case in shown]
    pictures: list[Image.Image] = [*photos, *same]
    if (MINI / "model_index.json").is_file():
        with progress_bar("drawing") as bar:
            for i, case in enumerate(shown):
                pictures += generate(prompt=case.text, count=1, seed=arguments.seed)
                bar.advance(i + 1, 16)
            for i, photo in enumerate(photos):
                pictures += generate(photo, count=1, seed=arguments.seed)
                bar.advance(9 + i, 16)
    with atomic_path(arguments.out) as partial:
        sheet([], pictures, columns=8, cell=128).save(partial)
    print("rows: photographs of the world, the same subjects elsewhere, drawn from their captions, drawn after the photographs")
    for case in shown:
        print(f"  {case.text}")
    print(arguments.out)


def judge(arguments: argparse.Namespace) -> None:
    """Measure mini against the bars, on held-out prompts."""
    quiet_libraries()
    from imprompt.config import Generate
    from imprompt.mini.judge import BARS, SCALES, Bench, cases
    from imprompt.models.base_pipelines import MINI_GUIDANCE, load_base, pick_dtype, scheduled
    from imprompt.recipes.benchmark import Doors, shares

    tasks = arguments.task or ["real", "text", "image", "image-plus", "image-text", "rows"]
    results: dict[str, dict[str, float]] = {}
    guidance = MINI_GUIDANCE if arguments.guidance is None else arguments.guidance
    out = writable_folder(arguments.out) if arguments.out else None
    with ExitStack() as stack:
        bar = stack.enter_context(progress_bar("judging", show=not arguments.json))

        def say(task: str, done: int, total: int) -> None:
            bar.rename(task)
            bar.advance(done, total)

        pipe = load_base("mini", "cpu", pick_dtype("auto", "cpu", True))
        stack.enter_context(scheduled(pipe, arguments.scheduler, arguments.steps))
        prompts = cases(arguments.prompts)
        bench = Bench(pipe, prompts, arguments.steps, guidance, say)
        settings = Generate(steps=arguments.steps, guidance=guidance, scheduler=arguments.scheduler, device="cpu")
        doors = Doors(prompts, out or Path(stack.enter_context(TemporaryDirectory())), settings, say, bench.judge)
        simple: dict[str, Callable[[], dict[str, float]]] = {
            "real": bench.real, "text": bench.text, "image": bench.image, "image-plus": bench.image_plus, "rows": bench.clip_rows,
            "edges": doors.edges, "silhouette": doors.silhouette, "inpaint": doors.inpaint, "img2img": doors.img2img,
            "regions": doors.regions,
        }  # fmt: skip
        for task in tasks:
            if task in simple:
                results[task] = simple[task]()
            elif task == "image-text":
                curve = {scale: bench.image_text(scale) for scale in arguments.scale or SCALES}
                results |= {f"image-text λ {scale}": figures for scale, figures in curve.items()}
                results[task] = max(curve.values(), key=lambda figures: figures["all three"])
                results["multimodal"] = max(curve.values(), key=lambda figures: min(figures["kind (text)"], figures["look (image)"]))
                if out:
                    write_file(out / "image-text.png", shares(curve, arguments.prompts))
            else:
                raise UserError(f"unknown task {task!r}; expected one of {', '.join([*simple, 'image-text'])}")
    if arguments.json:
        protocol = {"prompts": arguments.prompts, "scheduler": arguments.scheduler, "steps": arguments.steps, "guidance": guidance}
        print(json.dumps({"protocol": protocol, "results": results}))
        return
    table = Table(
        "task",
        "score",
        "figure",
        "bar",
        "",
        title=f"{arguments.prompts} prompts, {arguments.scheduler} {arguments.steps}, guidance {guidance}",
    )
    for task, figures in results.items():
        for score, figure in figures.items():
            bar_ = BARS.get(task, {}).get(score)
            holds = "" if bar_ is None else "holds" if figure >= bar_ else "[red]missed"
            table.add_row(task, score, f"{figure:.3f}", "" if bar_ is None else f"{bar_:.2f}", holds)
    Console().print(table)
