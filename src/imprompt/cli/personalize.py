"""`imprompt personalize`."""

import time
from pathlib import Path

from imprompt.cli.console import print_json, progress_bar, silence_third_party_logs
from imprompt.cli.generate import save_contact_sheet, save_with_metadata
from imprompt.config import PersonalizeConfig
from imprompt.utils.files import ensure_writable_folder
from imprompt.utils.text import escape


def run_personalize(config: PersonalizeConfig, *, json: bool) -> None:
    """Fine-tune where the method does, generate from each prompt, and print where the contact sheet is."""
    folder = ensure_writable_folder(config.output.output_dir)
    silence_third_party_logs(loading=config.pipeline.is_mini or Path(config.pipeline.model).is_dir())
    start = time.monotonic()
    with progress_bar("opening images") as progress:
        from imprompt.personalize import finetune, generate_per_prompt, load_images

        references = load_images(config.data, config.output.output_dir, progress.log)
        progress.rename(f"loading {config.pipeline.model}")
        begin = time.monotonic()
        for step in finetune(config, references):
            progress.rename("fine-tuning")
            progress.advance(step.index, step.max_train_steps, f"loss {step.loss:.4f}")
        finetune_seconds = time.monotonic() - begin

        def on_progress(done: int, total: int) -> None:
            progress.rename("generating")
            progress.advance(done, total)

        generated = generate_per_prompt(config, references, on_progress)
    paths = [
        save_with_metadata(folder / f"{number:02d}-{image.seed:06d}.png", image, config, prompt=prompt)
        for number, (prompt, images) in enumerate(zip(config.format_prompts(), generated, strict=True))
        for image in images
    ]
    images = [image.image for of_prompt in generated for image in of_prompt]
    contact_sheet = save_contact_sheet(folder, references, images, columns=config.sampling.num_images)
    checkpoint = f"{config.finetune_dir}/adapter.safetensors" if config.finetunes else None
    if json:
        print_json(
            sheet=str(contact_sheet),
            images=[str(path) for path in paths],
            checkpoint=checkpoint,
            finetune_seconds=round(finetune_seconds, 2),
            seconds=round(time.monotonic() - start, 2),
        )
        return
    print(f"{len(references)} references, {config.method}: {len(paths)} images in {time.monotonic() - start:.1f} s, loading included")
    if checkpoint:
        print(escape(f"fine-tuned in {finetune_seconds:.0f} s: {checkpoint}"))
    print(contact_sheet)
