"""imprompt: image prompts for text-to-image diffusion models.

import imprompt

images = imprompt.generate("cat.png", prompt="on a beach")           # embedded model: offline, CPU, seconds

ip = imprompt.load("h94/IP-Adapter", "models/ip-adapter_sd15.safetensors")
with imprompt.attach(pipe, ip("cat.png", scale=0.6)):                # a diffusers pipeline
    image = pipe("on a beach").images[0]
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from imprompt.core.conditioning import LAYOUT as LAYOUT
    from imprompt.core.conditioning import STYLE as STYLE
    from imprompt.dit.attach import attach as attach
    from imprompt.errors import UserError as UserError
    from imprompt.generation.api import generate as generate
    from imprompt.models.checkpoints import save as save
    from imprompt.models.hub import MINI_PATH as MINI_PATH
    from imprompt.models.image_prompt import ImagePrompt as ImagePrompt
    from imprompt.models.image_prompt import load as load
    from imprompt.training.api import train as train

_PUBLIC = {
    "LAYOUT": "core.conditioning",
    "MINI_PATH": "models.hub",
    "STYLE": "core.conditioning",
    "ImagePrompt": "models.image_prompt",
    "UserError": "errors",
    "attach": "dit.attach",
    "generate": "generation.api",
    "load": "models.image_prompt",
    "save": "models.checkpoints",
    "train": "training.api",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562): `import imprompt` costs nothing."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'imprompt' has no attribute {name!r}")
    return getattr(import_module(f"imprompt.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
