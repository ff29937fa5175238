"""`imprompt personalize`."""

import time
from pathlib import Path

from imprompt.cli.console import print_json, progress_bar, silence_third_party_logs
from imprompt.cli.generate import save_contact_sheet, save_with_metadata
from imprompt.config import PersonalizeConfig
from imprompt.utils.files import ensure_writable_folder


def run_personalize(config: PersonalizeConfig, *, json: bool) -> None:
    """Fine-tune where the method does, generate from each prompt, and print where the contact sheet is."""
    folder = ensure_writable_folder(config.output.output_dir)
    silence_third_party_logs(loading=config.pipeline.is_mini or Path(config.pipeline.model).is_dir())
    with progress_bar("opening", show=not json) as progress:
        from imprompt.personalize import finetune, generate_per_prompt, load_images

        references = load_images(config.data, config.output.output_dir, progress.log)
        progress.rename("fine-tuning")
        start = time.monotonic()
        for step in finetune(config, references):
            progress.advance(step.index, step.max_train_steps, f"loss {step.loss:.4f}")
        seconds = time.monotonic() - start
        progress.rename("generating")
        generated = generate_per_prompt(config, references, progress.advance)
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
            sheet=str(contact_sheet), images=[str(path) for path in paths], checkpoint=checkpoint, finetune_seconds=round(seconds, 2)
        )
        return
    print(f"{len(references)} references, {config.method}: {len(paths)} images")
    if checkpoint:
        print(f"fine-tuned in {seconds:.0f} s: {checkpoint}")
    print(contact_sheet)
