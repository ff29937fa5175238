"""What a run saves: its whole state, from which it resumes to the bit, and the adapter as a public file."""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from imprompt.config.training import CheckpointConfig
from imprompt.data.loader import Loader
from imprompt.errors import UserError, summarize_error
from imprompt.models import checkpoints
from imprompt.utils.files import is_disk_error

STATE_VERSION = 2  # of the run states; 1 was without a number


@dataclass
class TrainState:
    """The counters of a run, saved with its state."""

    step: int = 0  # optimizer steps taken
    nonfinite_steps: int = 0
    best_validation_loss: float = float("inf")

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)


class CheckpointManager:
    """Writes run states to `state/step-N` and adapters to `adapter-N.safetensors`, each of them completely or not at all."""

    def __init__(self, folder: Path, config: CheckpointConfig, accelerator: Accelerator, loader: Loader[Any], metadata: dict[str, Any]):
        self.folder, self.config, self.accelerator, self.loader, self.metadata = folder, config, accelerator, loader, metadata

    @property
    def steps(self) -> int:
        """Optimizer steps between two checkpoints."""
        return self.config.checkpointing_steps

    # Run states

    def save_state(self, state: TrainState) -> None:
        """Save everything that the run needs to resume. A folder with its final name is complete."""
        accelerator = self.accelerator
        target = self.folder / "state" / f"step-{state.step}"
        partial = target.with_name(f".{target.name}")
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        accelerator.wait_for_everyone()
        try:
            accelerator.save_state(str(partial))
            torch.save({"version": STATE_VERSION, "loader": self.loader.state_dict()}, partial / f"data-{accelerator.process_index}.pt")
        except Exception as error:
            if not is_disk_error(error):
                raise
            raise UserError(
                f"cannot save the state to {target} ({summarize_error(error)}); free some space, then continue with the same command"
            ) from error
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            shutil.rmtree(target, ignore_errors=True)
            partial.replace(target)
            for old in list_checkpoints(self.folder)[: -self.config.checkpoints_total_limit]:
                shutil.rmtree(old, ignore_errors=True)
        accelerator.wait_for_everyone()

    def resume_or_clear(self) -> None:
        """Resume from the newest state, if there is one; or start anew, where that was asked for."""
        if self.config.resume_from_checkpoint == "never":
            self._clear()
        elif states := list_checkpoints(self.folder):
            self._resume(states[-1])

    def _resume(self, path: Path) -> None:
        try:
            self.accelerator.load_state(str(path))
            saved = torch.load(path / f"data-{self.accelerator.process_index}.pt", weights_only=True)
            self.loader.load_state_dict(saved["loader"])
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            raise UserError(
                f"the run in {self.folder} cannot be continued from {path.name} ({summarize_error(error)}); "
                "use the options that it was started with, or another --output-dir"
            ) from error

    def _clear(self) -> None:
        """Delete the states and adapters of an earlier run in this folder, which would pass for the newest."""
        if self.accelerator.is_main_process:
            shutil.rmtree(self.folder / "state", ignore_errors=True)
            for old in (*self.folder.glob("adapter*.safetensors"), self.folder / "best.safetensors"):
                old.unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()

    # Adapters

    def save_adapter(self, module: nn.Module, step: int) -> Path:
        """Write the adapter as that of this step and as the last one; of the numbered files the newest are kept."""
        path = self.folder / f"adapter-{step}.safetensors"
        if self.accelerator.is_main_process:
            for target in (path, self.folder / "adapter.safetensors"):
                checkpoints.write_tensors(module.state_dict(), target, self.metadata | {"step": step})
            numbered = sorted(self.folder.glob("adapter-*.safetensors"), key=lambda p: int(p.stem.removeprefix("adapter-")))
            for old in numbered[: -self.config.checkpoints_total_limit]:
                old.unlink(missing_ok=True)
        return path

    def save_if_best(self, module: nn.Module, state: TrainState, validation_loss: float) -> None:
        """Write the adapter to `best.safetensors` if no earlier one had a smaller validation loss."""
        if validation_loss < state.best_validation_loss:
            state.best_validation_loss = validation_loss
            checkpoints.write_tensors(module.state_dict(), self.folder / "best.safetensors", self.metadata | {"step": state.step})


def list_checkpoints(folder: Path) -> list[Path]:
    """The states of the run in a folder, the newest last."""
    return sorted((folder / "state").glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))


def check_state_version(folder: Path) -> None:
    """Raise UserError where the newest state in a run's folder has another format than this version of imprompt writes."""
    for path in list_checkpoints(folder)[-1:]:
        try:
            version = torch.load(path / "data-0.pt", weights_only=True).get("version", 1)
        except (OSError, RuntimeError, ValueError):
            continue  # what is damaged is reported where it is read whole
        if version != STATE_VERSION:
            raise UserError(
                f"the run in {folder} was written by another version of imprompt (state {version}, expected {STATE_VERSION}); "
                "use another --output-dir, or --resume-from-checkpoint never to replace it"
            )
