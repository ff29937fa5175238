"""What a run was started with, in its folder's `run.json`: other data or another method is refused, another learning rate reported."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from imprompt.config import TrainConfig
from imprompt.config.training import is_mini_data
from imprompt.errors import UserError
from imprompt.utils.files import read_json_object, write_file

FILE_NAME = "run.json"
# Every option that is in neither of these sets changes what is trained, and may not change when a run is continued.
WITHOUT_EFFECT_ON_TRAINING = {
    "max_unreadable_fraction", "dataloader_num_workers", "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint",
    "validation_steps", "validation_num_inference_steps", "clip_model", "device", "gradient_checkpointing", "report_to", "sanity_check",
    "output_dir", "class_data_dir",
}  # fmt: skip
ADJUSTABLE = {
    "max_train_steps", "learning_rate", "lr_scheduler", "lr_warmup_steps", "weight_decay", "max_grad_norm", "mixed_precision",
}  # fmt: skip
PATH_OPTIONS = {"data", "feature_cache", "adapter", "image_encoder", "model", "model_config"}


def describe_run(config: TrainConfig, num_processes: int, dataset: str) -> dict[str, Any]:
    """What identifies a run. dataset: a fingerprint of the data."""
    options = {name: _absolute(value) if name in PATH_OPTIONS else value for name, value in config.to_options().items()}
    options |= {"num_processes": num_processes}
    if config.per_subject or is_mini_data(config.dataset.data):
        options.pop("num_validation_images")  # elsewhere they are taken from the training data
    return json.loads(json.dumps({"dataset": dataset, "options": options}))  # type: ignore[no-any-return]


def _absolute(value: Any) -> Any:
    """A path to something that exists, from the root; any other value, such as the id of a model, as it is."""
    try:
        return str(Path(value).absolute()) if isinstance(value, str) and Path(value).exists() else value
    except (OSError, ValueError):
        return value


def compare_runs(folder: Path, stored: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Notices about adjusted options. Raises UserError where anything else differs."""
    before, now = stored["options"], current["options"]
    notices = []
    for name in dict.fromkeys([*now, *before]):
        if name in WITHOUT_EFFECT_ON_TRAINING or before.get(name) == now.get(name):
            continue
        if name not in ADJUSTABLE:
            _refuse(folder, f"{name} = {before.get(name)!r}", f"it is {now.get(name)!r}")
        notices.append(f"{name.replace('_', ' ')} changed from {before.get(name)} to {now.get(name)}")
    counts = [str(run.get("dataset")).partition(" ")[0] for run in (stored, current)]
    if stored.get("dataset") != current["dataset"]:
        _refuse(folder, f"{counts[0]} records", "they are others" if len(set(counts)) == 1 else f"there are {counts[1]}")
    return notices


def _refuse(folder: Path, before: str, now: str) -> NoReturn:
    raise UserError(
        f"the run in {folder} was started with {before}, and now {now}; continue with what it was started with, "
        "choose another --output-dir, or start anew with --resume-from-checkpoint never"
    )


def check_run_options(folder: Path, current: Mapping[str, Any], *, is_resumed: bool) -> list[str]:
    """Notices about how a run that is resumed differs from what is stored in its folder.

    Raises UserError where it would be trained on something else, and where a folder without a state holds an adapter that a new
    run would replace.
    """
    if is_resumed:
        remedy = "delete it to continue, with the options that the run was started with"
        try:
            stored = read_json_object(folder / FILE_NAME, remedy)
        except FileNotFoundError:
            return [f"{FILE_NAME} is missing: the run is continued without comparing its options with those it was started with"]
        if not isinstance(stored.get("options"), dict):
            raise UserError(f"{folder / FILE_NAME} is damaged (no options); {remedy}")
        return compare_runs(folder, stored, current)
    if (folder / "adapter.safetensors").exists():
        raise UserError(
            f"{folder} holds an adapter and no state to continue from; choose another --output-dir, "
            "or replace the adapter with --resume-from-checkpoint never"
        )
    return []


def write_run_options(folder: Path, current: Mapping[str, Any]) -> None:
    """Store what a run is trained with."""
    write_file(folder / FILE_NAME, json.dumps(current, indent=1, ensure_ascii=False) + "\n")
