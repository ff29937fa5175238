"""What a run keeps: its whole state, to go on exactly there, and the adapter as a public file."""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from imprompt.config import Train
from imprompt.errors import UserError, brief
from imprompt.models import checkpoints
from imprompt.training.setup import Setting, states
from imprompt.training.validation import Findings
from imprompt.utils.files import write_failed


@dataclass
class Memory:
    """What a run knows of itself."""

    step: int = 0
    skipped: int = 0
    best: float = float("inf")  # validation loss of the best adapter so far

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)


class Keeper:
    """Writes states to `state/step-N` and adapters to `adapter-N.safetensors`; whole, or not at all."""

    def __init__(self, choice: Train, accelerator: Accelerator, setting: Setting):
        self.folder, self.keep = Path(choice.out), choice.keep
        self.accelerator, self.loader = accelerator, setting.loader
        self.about = {
            "base": choice.base,
            "method": choice.method,
            "encoder": choice.encoder or str(choice.base),
            "data": Path(setting.data).name,
        } | setting.method.about

    # The state

    def state(self, memory: Memory) -> None:
        """Keep all that the run needs to go on. A folder with its final name is complete."""
        accelerator = self.accelerator
        target = self.folder / "state" / f"step-{memory.step}"
        partial = target.with_name(f".{target.name}")
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        accelerator.wait_for_everyone()
        try:
            accelerator.save_state(str(partial))
            torch.save(self.loader.state(), partial / f"data-{accelerator.process_index}.pt")
        except Exception as error:
            if not write_failed(error):
                raise
            raise UserError(
                f"cannot keep the state in {target} ({brief(error)}); make room, then continue with the same command"
            ) from error
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            shutil.rmtree(target, ignore_errors=True)
            partial.replace(target)
            for old in states(self.folder)[: -self.keep]:
                shutil.rmtree(old, ignore_errors=True)
        accelerator.wait_for_everyone()

    def resume(self) -> bool:
        """Go on from the newest state, if there is one."""
        found = states(self.folder)
        if not found:
            return False
        try:
            self.accelerator.load_state(str(found[-1]))
            self.loader.load_state(torch.load(found[-1] / f"data-{self.accelerator.process_index}.pt", weights_only=True))
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            raise UserError(
                f"the run in {self.folder} cannot be continued from {found[-1].name} ({brief(error)}); "
                "use the settings it was begun with, or another --out"
            ) from error
        return True

    def clear(self) -> None:
        """Forget an earlier run in this folder: its states and adapters would pass for the newest."""
        if self.accelerator.is_main_process:
            shutil.rmtree(self.folder / "state", ignore_errors=True)
            for old in (*self.folder.glob("adapter*.safetensors"), self.folder / "best.safetensors"):
                old.unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()

    # Adapters

    def adapter(self, module: nn.Module, step: int) -> Path:
        """Write the adapter of this step and as the last one; of earlier steps the newest stay."""
        path = self.folder / f"adapter-{step}.safetensors"
        if self.accelerator.is_main_process:
            for target in (path, self.folder / "adapter.safetensors"):
                checkpoints.write(module.state_dict(), target, self.about | {"step": step})
            numbered = sorted(self.folder.glob("adapter-*.safetensors"), key=lambda p: int(p.stem.removeprefix("adapter-")))
            for old in numbered[: -self.keep]:
                old.unlink(missing_ok=True)
        return path

    def best(self, module: nn.Module, memory: Memory, findings: Findings) -> None:
        """Write the adapter once more if none was as good."""
        if findings.figures["validation"] < memory.best:
            memory.best = findings.figures["validation"]
            checkpoints.write(module.state_dict(), self.folder / "best.safetensors", self.about | {"step": memory.step})
