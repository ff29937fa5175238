"""What a run saves: its whole state, from which it resumes to the bit, and the adapter as a public file."""

import random
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from imprompt.config.training import CheckpointConfig
from imprompt.errors import UserError, summarize_error
from imprompt.models import checkpoints
from imprompt.training.state_files import list_checkpoints, read_state_file, seal_state, write_state_file
from imprompt.utils.files import is_disk_error, remove_path, sync_folder

if TYPE_CHECKING:
    from imprompt.training.loop import Trainer


class CheckpointManager:
    """Writes run states to `state/step-N` and adapters to `adapter-N.safetensors`, each of them completely or not at all."""

    def __init__(self, folder: Path, config: CheckpointConfig, trainer: "Trainer", metadata: dict[str, Any]):
        self.folder, self.config, self.trainer, self.metadata = folder, config, trainer, metadata
        self.accelerator = trainer.accelerator

    @property
    def steps(self) -> int:
        """Optimizer steps between two checkpoints."""
        return self.config.checkpointing_steps

    # Run states

    def save_state(self) -> None:
        """Save everything that the run needs to resume. A folder with its final name is complete."""
        target = self.folder / "state" / f"step-{self.trainer.state.step}"
        partial, is_main = target.with_name(f".{target.name}"), self.accelerator.is_main_process
        with _explain_failed_save(target, partial):
            if is_main:
                remove_path(partial)
                partial.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            if is_main:
                write_state_file(partial / "run.safetensors", self.trainer.state_dict())
            write_state_file(partial / self._rank_file, self._rank_state())
            self.accelerator.wait_for_everyone()
            if is_main:
                seal_state(partial, self.trainer.state.step)
                self._finish_state(partial, target)
        self.accelerator.wait_for_everyone()

    def _finish_state(self, partial: Path, target: Path) -> None:
        """Give a complete state its name, and remove the oldest ones, and what killed processes have left."""
        remove_path(target)
        partial.replace(target)
        sync_folder(target.parent)
        for old in list_checkpoints(self.folder)[: -self.config.checkpoints_total_limit]:
            shutil.rmtree(old, ignore_errors=True)
        for left in target.parent.glob(".step-*"):
            remove_path(left)

    @property
    def _rank_file(self) -> str:
        return f"rank-{self.accelerator.process_index}.safetensors"

    def _rank_state(self) -> dict[str, Any]:
        """What each process has of its own."""
        return {"loader": self.trainer.loader.state_dict(), "random": get_random_state(), "sharded": self.trainer.sharded_state_dict()}

    def resume_or_clear(self, state: Path | None) -> None:
        """Resume from an intact state; or start anew, where that was asked for."""
        if self.config.resume_from_checkpoint == "never":
            self._clear()
        elif state:
            self._resume(state)

    def _resume(self, path: Path) -> None:
        try:
            own = read_state_file(path / self._rank_file)
            self.trainer.load_state_dict(read_state_file(path / "run.safetensors"), own["sharded"])
            self.trainer.loader.load_state_dict(own["loader"])
            set_random_state(own["random"])
        except Exception as error:  # a file that was made up can raise nearly any exception
            raise UserError(
                f"the run in {self.folder} cannot be continued from {path.name} ({summarize_error(error)}); "
                "use the options that it was started with, or another --output-dir"
            ) from error

    def _clear(self) -> None:
        """Delete the states and adapters of an earlier run in this folder, which would pass for the newest."""
        if self.accelerator.is_main_process:
            remove_path(self.folder / "state")
            for old in (*self._numbered_adapters(), self.folder / "adapter.safetensors", self.folder / "best.safetensors"):
                old.unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()

    # Adapters

    def save_adapter(self, module: nn.Module, step: int) -> Path:
        """Write the adapter as that of this step and as the last one; of the numbered files the newest are kept."""
        path = self.folder / f"adapter-{step}.safetensors"
        if self.accelerator.is_main_process:
            for target in (path, self.folder / "adapter.safetensors"):
                checkpoints.write_tensors(module.state_dict(), target, self.metadata | {"step": step})
            for old in self._numbered_adapters()[: -self.config.checkpoints_total_limit]:
                old.unlink(missing_ok=True)
        return path

    def _numbered_adapters(self) -> list[Path]:
        """The adapters that were saved with their step, the newest last."""
        steps = {path: re.fullmatch(r"adapter-(\d{1,18})", path.stem) for path in self.folder.glob("adapter-*.safetensors")}
        return sorted((path for path, match in steps.items() if match), key=lambda path: int(path.stem.removeprefix("adapter-")))

    def save_if_best(self, module: nn.Module, validation_loss: float) -> None:
        """Write the adapter to `best.safetensors` if no earlier one had a smaller validation loss."""
        state = self.trainer.state
        if validation_loss < state.best_validation_loss:
            state.best_validation_loss = validation_loss
            checkpoints.write_tensors(module.state_dict(), self.folder / "best.safetensors", self.metadata | {"step": state.step})


@contextmanager
def _explain_failed_save(target: Path, partial: Path) -> Iterator[None]:
    """Within the context an error of the disk removes the partial state, and is one sentence."""
    try:
        yield
    except Exception as error:
        if not is_disk_error(error) and not isinstance(error, UserError):
            raise
        remove_path(partial)
        raise UserError(
            f"cannot save the state to {target} ({summarize_error(error)}); free some space, then continue with the same command"
        ) from error


def get_random_state() -> dict[str, Any]:
    """The states of the global random generators of this process."""
    name, keys, *rest = np.random.get_state()
    state = {"python": random.getstate(), "numpy": (name, np.asarray(keys).tolist(), *rest), "torch": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def set_random_state(state: dict[str, Any]) -> None:
    """Continue from a state of `get_random_state`."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
