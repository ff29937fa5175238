"""`imprompt mini build`, `style`, `preview` and `evaluate`."""

import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from imprompt.cli.console import ProgressDisplay, print_json, print_table, progress_bar, silence_third_party_logs
from imprompt.config import GenerateConfig, MiniBuildConfig, MiniEvaluateConfig, MiniPreviewConfig, MiniStyleConfig
from imprompt.errors import UserError
from imprompt.utils.files import atomic_path, ensure_writable_folder, write_file

if TYPE_CHECKING:
    from imprompt.recipes.benchmark import MiniBenchmark, TaskBenchmark

DEFAULT_TASKS = ("real", "text", "image", "image-plus", "image-text", "rows")
Scores = dict[str, dict[str, float]]


def run_build(config: MiniBuildConfig, *, json: bool) -> None:
    """Train every missing part; continue the one that was interrupted."""
    silence_third_party_logs()
    from imprompt.models.hub import MINI_PATH
    from imprompt.recipes.build import build_mini, install_mini
    from imprompt.recipes.mini_models import MiniBuild

    with progress_bar("mini") as bar:
        parts = MiniBuild(ensure_writable_folder(config.output_dir), partial(_show_training, bar), config.budget)
        build_mini(parts, config.only)
    if config.install:
        install_mini(parts)
    folder = MINI_PATH if config.install else parts.parts
    print_json(folder=str(folder)) if json else print(folder)


def run_style(config: MiniStyleConfig, *, json: bool) -> None:
    """Fine-tune a custom model to try an adapter on."""
    silence_third_party_logs()
    from imprompt.recipes.style import train_style

    with progress_bar("style") as bar:
        folder = ensure_writable_folder(config.output_dir or f"runs/mini-{config.style}")
        model = train_style(config.style, folder, partial(_show_training, bar), config.budget)
    print_json(model=str(model)) if json else print(model)


def _show_training(bar: ProgressDisplay, part: str, done: int, total: int, loss: float) -> None:
    bar.rename(part)
    bar.advance(done, total, f"loss {loss:.4f}" if loss else "")


def run_preview(config: MiniPreviewConfig, *, json: bool) -> None:
    """Make a contact sheet: two rows of the synthetic world, then images from text, and images from references."""
    silence_third_party_logs()
    from imprompt.generation.generate import LoadedModels, generate_images
    from imprompt.mini import world
    from imprompt.mini.held_out import make_held_out_samples
    from imprompt.utils.images import make_contact_sheet

    rng = random.Random(config.seed)
    samples = make_held_out_samples(8 + config.seed)[config.seed :]
    references = [sample.image for sample in samples]
    other_scenes = [world.render(sample.subject, world.make_scene(rng.randrange(10**6))) for sample in samples]
    options = [{"prompt": sample.caption} for sample in samples] + [{"image": (reference,)} for reference in references]
    models, generated = LoadedModels.empty(), []
    with progress_bar("generating") as bar:
        for number, one in enumerate(options, 1):
            of_sample = GenerateConfig.from_options(**one, num_images=1, seed=config.seed)
            generated += [image.image for image in generate_images(of_sample, models)]
            bar.advance(number, len(options))
    path = ensure_writable_folder(config.output_dir) / "mini.png"
    with atomic_path(path) as partial_path:
        make_contact_sheet([], [*references, *other_scenes, *generated], columns=8, cell_size=128).save(partial_path)
    print(
        "rows: images of the synthetic world, the same subjects in other scenes, generated from their captions, generated from the images"
    )
    for sample in samples:
        print(f"  {sample.caption}")
    print(path)


def run_evaluate_mini(config: MiniEvaluateConfig, *, json: bool) -> None:
    """Measure mini against its thresholds, on held-out prompts."""
    silence_third_party_logs()
    from imprompt.generation.generate import LoadedModels
    from imprompt.mini.held_out import make_held_out_samples
    from imprompt.models.base_pipelines import MINI_GUIDANCE_SCALE, use_scheduler
    from imprompt.recipes.benchmark import MiniBenchmark, TaskBenchmark

    guidance_scale = MINI_GUIDANCE_SCALE if config.guidance_scale is None else config.guidance_scale
    steps = config.num_inference_steps
    settings = GenerateConfig.from_options(
        num_inference_steps=steps, guidance_scale=guidance_scale, scheduler=config.scheduler, device="cpu"
    )
    folder = ensure_writable_folder(config.output_dir) if config.output_dir else None
    with ExitStack() as stack:
        bar = stack.enter_context(progress_bar("evaluating"))
        pipe = LoadedModels.empty().pipeline(settings.pipeline, settings.sampling.dtype)
        stack.enter_context(use_scheduler(pipe, config.scheduler, steps))
        samples = make_held_out_samples(config.num_prompts)
        on_progress = partial(_show_task, bar)
        bench = MiniBenchmark(pipe, samples, steps, guidance_scale, on_progress)
        work = folder or Path(stack.enter_context(TemporaryDirectory()))
        task_bench = TaskBenchmark(samples, work, settings, on_progress, bench.classifier, bench.clip)
        scores = _score_tasks(bench, task_bench, config.task or DEFAULT_TASKS, config.scale, folder)
    protocol = {
        "prompts": config.num_prompts,
        "scheduler": config.scheduler,
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
    }
    if json:
        print_json(protocol=protocol, results=scores)
    else:
        _print_scores(scores, protocol)


def _show_task(bar: ProgressDisplay, task: str, done: int, total: int) -> None:
    bar.rename(task)
    bar.advance(done, total)


def _score_tasks(
    bench: "MiniBenchmark", task_bench: "TaskBenchmark", tasks: Sequence[str], scales: Sequence[float], folder: Path | None
) -> Scores:
    from imprompt.recipes.benchmark import SWEEP_SCALES, plot_accuracy_vs_scale

    scorers: dict[str, Callable[[], dict[str, float]]] = {
        "real": bench.score_real_images, "text": bench.score_text_to_image, "image": bench.score_image_prompts,
        "image-plus": bench.score_plus_image_prompts, "rows": bench.score_reference_rows, "edges": task_bench.score_edges,
        "silhouette": task_bench.score_silhouette, "inpaint": task_bench.score_inpainting, "img2img": task_bench.score_img2img,
        "regions": task_bench.score_regions,
    }  # fmt: skip
    scores: Scores = {}
    for task in tasks:
        if task in scorers:
            scores[task] = scorers[task]()
        elif task == "image-text":
            sweep = {scale: bench.score_image_and_text(scale) for scale in scales or SWEEP_SCALES}
            scores |= {f"image-text λ {scale}": of_scale for scale, of_scale in sweep.items()}
            scores[task] = max(sweep.values(), key=lambda of_scale: of_scale["all three"])
            scores["multimodal"] = max(
                sweep.values(), key=lambda of_scale: min(of_scale["category (text)"], of_scale["appearance (image)"])
            )
            if folder:
                write_file(folder / "image-text.png", plot_accuracy_vs_scale(sweep, len(bench.samples)))
        else:
            raise UserError(f"task: expected one of {', '.join([*scorers, 'image-text'])}; received {task!r}")
    return scores


MIN_PROMPTS_FOR_VERDICTS = 100  # of the 1000 that the thresholds are for


def _print_scores(scores: Scores, protocol: Mapping[str, int | float | str]) -> None:
    """The table of all metrics; with their verdicts where there are enough prompts for any."""
    from imprompt.recipes.benchmark import THRESHOLDS

    is_conclusive = int(protocol["prompts"]) >= MIN_PROMPTS_FOR_VERDICTS
    rows = []
    for task, of_task in scores.items():
        for metric, value in of_task.items():
            threshold = THRESHOLDS.get(task, {}).get(metric)
            verdict = "" if threshold is None or not is_conclusive else "reached" if value >= threshold else "missed"
            rows.append((task, metric, f"{value:.3f}", "" if threshold is None else f"{threshold:.2f}", verdict))
    title = "{prompts} prompts, {scheduler}, {num_inference_steps} steps, guidance {guidance_scale}".format(**protocol)
    print_table(rows, ("task", "metric", "value", "threshold", ""), title)
    if not is_conclusive:
        print(f"no verdicts: expected at least {MIN_PROMPTS_FOR_VERDICTS} prompts, received {protocol['prompts']}")
