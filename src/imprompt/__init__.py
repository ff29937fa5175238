"""imprompt: image prompts for text-to-image diffusion models.

import imprompt

images = imprompt.generate("cat.png", prompt="on a beach")           # embedded model: offline, CPU, seconds

ip = imprompt.load("h94/IP-Adapter", "models/ip-adapter_sd15.safetensors")
with imprompt.attach(pipe, ip("cat.png", scale=0.6)):                # any diffusers pipeline with a UNet
    image = pipe("on a beach").images[0]
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from imprompt.api import generate as generate
    from imprompt.checkpoints import save as save
    from imprompt.core.scales import LAYOUT as LAYOUT
    from imprompt.core.scales import STYLE as STYLE
    from imprompt.errors import UserError as UserError
    from imprompt.hosts.unet import attach as attach
    from imprompt.hub import MINI as MINI
    from imprompt.prompter import ImagePrompt as ImagePrompt
    from imprompt.prompter import load as load
    from imprompt.training import train as train

_PUBLIC = {
    "LAYOUT": "core.scales",
    "MINI": "hub",
    "STYLE": "core.scales",
    "ImagePrompt": "prompter",
    "UserError": "errors",
    "attach": "hosts.unet",
    "generate": "api",
    "load": "prompter",
    "save": "checkpoints",
    "train": "training",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562): `import imprompt` costs nothing."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'imprompt' has no attribute {name!r}")
    return getattr(import_module(f"imprompt.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
