"""Reference images by file, folder or pattern."""

import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from imprompt.config.common import MAX_REFERENCES, expand_home, shorten
from imprompt.errors import ImageError, notify
from imprompt.utils.images import IMAGE_SUFFIXES


def expand_images(images: Iterable[Any]) -> list[Any]:
    """The images with each folder and pattern (`cats/*.png`) replaced by the files that it names, in the order of their names.

    Anything that is no path is returned as it is. What a folder or pattern stands for is reported. Raises ImageError where one has no
    image, or for a file that does not exist.
    """
    expanded = [one for image in images for one in _expand_image(image)]
    if len(expanded) > MAX_REFERENCES:
        raise ImageError(f"image: expected at most {MAX_REFERENCES} references, received {len(expanded)}")
    return expanded


def _expand_image(image: Any) -> Iterator[Any]:
    if not isinstance(image, (str, os.PathLike)):
        yield image
        return
    path = Path(expand_home(image))
    if os.path.isfile(path):
        yield str(path)
        return
    paths = _files_of(path)
    notify(f"{path}: {len(paths)} image{'s' * (len(paths) > 1)}, taken for references of one subject")
    yield from paths


def _files_of(path: Path) -> list[str]:
    """The images in a folder, or of a pattern."""
    is_folder = os.path.isdir(path)
    if not is_folder and not glob.has_magic(str(path)):
        raise ImageError(f"no image at {path}")
    try:
        found = map(str, path.iterdir()) if is_folder else glob.iglob(str(path))
        paths = sorted(p for p in found if p.lower().endswith(IMAGE_SUFFIXES) and os.path.isfile(p))
    except (OSError, ValueError) as error:
        raise ImageError(f"cannot read {path} ({getattr(error, 'strerror', None) or error}); make it readable") from error
    if not paths:
        raise ImageError(f"no image {'in the folder' if is_folder else 'matches'} {shorten(str(path), 200)}")
    return paths
