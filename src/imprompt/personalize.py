"""The workflow of `imprompt personalize`: several images of one subject in, new images of it out."""

import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from imprompt.config import GenerateConfig, ImagePromptConfig, PersonalizeConfig, TrainConfig
from imprompt.data.folders import describe_skipped
from imprompt.data.loader import READ_ERRORS
from imprompt.data.readers import open_data
from imprompt.data.records import MapRecords
from imprompt.errors import UserError, summarize_error
from imprompt.generation.generate import (
    GeneratedImage,
    LoadedModels,
    ProgressCallback,
    Sampler,
    encode_image_prompt,
    find_subject_method,
)
from imprompt.generation.tasks import prepare_task
from imprompt.methods.prompt_templates import insert_subject_token
from imprompt.models import checkpoints, hub
from imprompt.utils.files import atomic_path, ensure_writable_folder, write_file
from imprompt.utils.images import open_image

# The embedded adapter of each method on mini; the others aggregate the tokens of its base adapter.
ADAPTER_OF_METHOD = {
    "attention": "mini-subject", "average-tokens": "mini-plus", "max-tokens": "mini-plus", "joint": "mini-plus",
}  # fmt: skip
TRAINED_AGGREGATIONS = {"attention": ("attention-tokens", "attention"), "self-attention": ("self-attention",)}  # in the adapter's file


def load_images(data: str, output_dir: str, log: Callable[[str], None]) -> list[Image.Image]:
    """The images of one subject that can be opened; what is skipped is logged. Raises UserError where none can.

    Images that an earlier run generated into a folder inside the data are not taken for images of the subject. Where the
    data names several subjects, that is logged.
    """
    records = open_data(data)
    if not isinstance(records, MapRecords):
        raise UserError(f"data: expected a folder of images of one subject, or a list of them; received {data}")
    output, folder = Path(output_dir).resolve(), Path(data).resolve()
    if output in (folder, *folder.parents):
        raise UserError(f"output_dir: expected another folder than that of the images, received {output_dir}")
    images, subjects = list[Image.Image](), set[str]()
    for i in range(len(records)):
        try:
            record = records[i]
            if isinstance(record.target, (str, Path)) and _is_generated(Path(record.target).resolve(), output, folder):
                continue
            images.append(open_image(record.target))
            subjects.add(record.subject or "")
        except READ_ERRORS as error:
            log(f"skipped: {summarize_error(error)}")
    if not images:
        raise UserError(f"none of the {len(records)} images in {data} can be opened")
    if skipped := describe_skipped(getattr(records, "skipped", None) or Counter()):
        log(f"not used: {skipped}")
    if len(subjects) > 1:
        names = ", ".join(sorted(subjects)[:3]) + (" …" if len(subjects) > 3 else "")
        log(f"images of {len(subjects)} subjects are taken for one ({names}); name one folder if they are not")
    return images


def _is_generated(path: Path, output: Path, folder: Path) -> bool:
    """Whether an image lies in this run's output, or in that of an earlier run inside the folder."""
    inside = [parent for parent in path.parents if folder in parent.parents]
    return output in path.parents or any((parent / mark).is_file() for parent in inside for mark in ("sheet.png", "finetuning.json"))


def finetune(config: PersonalizeConfig, images: Sequence[Image.Image]) -> Iterator[Any]:
    """Fine-tune a per-subject method on these images, step by step; nothing for other methods, or where the same run is complete.

    finetuning.json in the run's folder holds what is being fine-tuned, finetuned.json what was: only the same run is
    continued.
    """
    from imprompt.training import train_adapter

    if not config.finetunes:
        return
    training = finetune_config(config)
    for prompt in config.format_prompts():  # a prompt that cannot be used is reported before anything is trained
        insert_subject_token(prompt, config.class_noun, training.finetuning.instance_token, replace_noun=config.method == "inversion")
    prepare_task(generate_config(config).task, LoadedModels.empty().pipeline(config.pipeline, config.sampling.dtype),
                 config.sampling.parse_resolution(), model=config.pipeline.model)  # fmt: skip
    folder = ensure_writable_folder(training.output_dir)
    manifest = json.loads(json.dumps(training.to_options() | {"images": [_checksum(image) for image in images]}))
    begun, complete = folder / "finetuning.json", folder / "finetuned.json"
    if _read_json(complete) == manifest and (folder / "adapter.safetensors").is_file():
        return
    complete.unlink(missing_ok=True)
    resume = "latest" if _read_json(begun) == manifest else "never"  # a run in the folder may be another subject's
    write_file(begun, json.dumps(manifest, indent=1))
    data = _write_images(images, ensure_writable_folder(str(folder / "images")))
    yield from train_adapter(training.with_options(resume_from_checkpoint=resume, data=str(data)))
    write_file(complete, json.dumps(manifest, indent=1))


def finetune_config(config: PersonalizeConfig) -> TrainConfig:
    """The training run of a method that fine-tunes on the subject."""
    return TrainConfig.from_options(
        **config.pipeline.to_options(), data=config.data, method=config.method, class_noun=config.class_noun,
        max_train_steps=config.finetune_steps, num_class_images=config.num_class_images, seed=config.sampling.seed,
        output_dir=config.finetune_dir,
    ).with_defaults()  # fmt: skip


def generate_config(config: PersonalizeConfig) -> GenerateConfig:
    """What sampling and its task have in common with `imprompt generate`."""
    return GenerateConfig(sampling=config.sampling, pipeline=config.pipeline, output=config.output)


def generate_per_prompt(
    config: PersonalizeConfig, images: Sequence[Image.Image], on_progress: ProgressCallback = lambda done, total: None
) -> list[list[GeneratedImage]]:
    """The images of each prompt. The references are encoded once for all prompts."""
    models, reference = LoadedModels.empty(), image_prompt_config(config, images)
    base = models.pipeline(config.pipeline, config.sampling.dtype)
    task = prepare_task(generate_config(config).task, base, config.sampling.parse_resolution(), model=config.pipeline.model)
    sampler = Sampler(base, task, config.sampling, config.pipeline.model)
    subject = find_subject_method(reference)
    image_prompts = [] if subject else [encode_image_prompt(reference, models, base)]
    prompts = config.format_prompts()
    return [
        sampler.sample(prompt, config.negative_prompt, image_prompts, subject, _within_total(on_progress, number, len(prompts)))
        for number, prompt in enumerate(prompts)
    ]


def _within_total(on_progress: ProgressCallback, number: int, count: int) -> ProgressCallback:
    return lambda done, total: on_progress(number * total + done, count * total)


def image_prompt_config(config: PersonalizeConfig, images: Sequence[Image.Image]) -> ImagePromptConfig:
    """The subject as an image prompt, or as the checkpoint that was fine-tuned on it. Raises UserError without a suitable adapter."""
    if config.finetunes:
        return ImagePromptConfig(adapter=f"{config.finetune_dir}/adapter.safetensors", scale=config.scale)
    default = ADAPTER_OF_METHOD.get(config.method, "mini") if config.pipeline.is_mini else None
    adapter = config.adapter or default
    trained = config.method in TRAINED_AGGREGATIONS
    if trained:
        _check_aggregation(config.method, adapter, given=config.adapter is not None)
    return ImagePromptConfig.from_options(
        image=tuple(images), scale=config.scale, adapter=adapter, image_encoder=config.image_encoder, resize_mode=config.resize_mode,
        aggregation="auto" if trained else config.method,
    )  # fmt: skip


def _check_aggregation(method: str, adapter: str | None, *, given: bool) -> None:
    """Raise UserError for an adapter without the trained aggregation that the method needs."""
    accepted = TRAINED_AGGREGATIONS[method]
    if adapter is None or (method not in ADAPTER_OF_METHOD and not given):
        raise UserError(
            f"{method} has trained weights: name an adapter that has them with --adapter "
            f"(imprompt train --min-images-per-subject 10 --aggregation {accepted[0]}), or take average"
        )
    aggregator = checkpoints.detect_spec(*checkpoints.read_adapter_file(hub.resolve_adapter(adapter)[0])).aggregator
    if aggregator not in accepted:
        raise UserError(f"adapter: {adapter} aggregates by {aggregator}; expected one trained with {method}, or --method {aggregator}")


def _write_images(images: Sequence[Image.Image], folder: Path) -> Path:
    for path in folder.glob("*.png"):
        path.unlink()
    for number, image in enumerate(images):
        with atomic_path(folder / f"{number:03}.png") as partial:
            image.save(partial, "PNG")
    return folder


def _checksum(image: Image.Image) -> str:
    return f"{image.width}x{image.height} {zlib.crc32(image.tobytes()):08x}"


def _read_json(path: Path) -> Any:
    """The content of a JSON file; None where there is none, or it is damaged."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
