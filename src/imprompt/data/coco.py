"""COCO captions (Chen et al., 2015, arXiv:1504.00325): images with about five captions each, of which the first is used."""

import os
from collections import Counter
from pathlib import Path
from typing import Any

from imprompt.data.captions import Caption, find_caption, parse_json
from imprompt.data.records import Record
from imprompt.errors import UserError, summarize_error


def is_coco(path: Path) -> bool:
    """Whether a path is a folder with COCO's annotations/captions_*.json."""
    return os.path.isdir(path) and bool(_list_caption_files(path))


def is_coco_content(content: object) -> bool:
    """Whether the content of a JSON file is COCO's."""
    return isinstance(content, dict) and isinstance(content.get("images"), list) and not isinstance(content.get("target"), str)


class CocoCaptions:
    """The images of one split, sorted by file name, each with its first caption (the lowest id with a text), or "" where it has none.

    `path` is captions_val2017.json, or the folder with annotations/ and val2017/. The images are expected in a folder with the name
    of the split next to annotations/, in images/ there, or next to the JSON file.
    `content` is that of the file, where it is read already.
    Raises UserError where captions or images are missing, several splits are possible, or the file holds no COCO captions.
    """

    def __init__(self, path: str | Path, content: object = None):
        path = Path(path)
        self.path = _resolve_caption_file(path) if path.is_dir() else path
        if not os.path.isfile(self.path):
            raise UserError(f"no data at {path}; expected COCO's captions, such as annotations/captions_val2017.json")
        content = _read_json(self.path) if content is None else content
        self._captions, self.skipped = _read_first_captions(content, self.path.name)
        self.names = sorted(self._captions)
        self.folder = _find_image_folder(self.path)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> Record:
        name = self.names[i]
        return Record(name, self.folder / name, self._captions[name], caption_source=self.get_caption(i).source)

    def get_caption(self, i: int) -> Caption:
        """The caption of an image, which is not opened."""
        text = self._captions[self.names[i]]
        return Caption(text, self.path.name) if text else Caption()


def _list_caption_files(root: Path) -> list[Path]:
    return sorted((root / "annotations").glob("captions_*.json"))


def _resolve_caption_file(root: Path) -> Path:
    """The only caption file whose images exist."""
    files = _list_caption_files(root)
    if not files:
        raise UserError(f"no COCO captions in {root}; expected annotations/captions_*.json there")
    with_images = [file for file in files if _image_folders(file)]
    if len(with_images) > 1:
        raise UserError(f"{root} holds several splits; name one: {', '.join(map(str, with_images))}")
    if not with_images:
        expected = " or ".join(str(root / _split_name(file)) for file in files)
        raise UserError(f"{root} holds captions but no images; expected them in {expected}")
    return with_images[0]


def _split_name(captions: Path) -> str:
    return captions.stem.removeprefix("captions_")


def _image_folders(captions: Path) -> list[Path]:
    root, split = captions.absolute().parent.parent, _split_name(captions)
    return [folder for folder in (root / split, root / "images" / split, captions.parent / split) if folder.is_dir()]


def _find_image_folder(captions: Path) -> Path:
    folders, split = _image_folders(captions), _split_name(captions)
    if not folders:
        expected = captions.absolute().parent.parent / split
        raise UserError(f"no images for {captions.name}; expected them in {expected}: unpack {split}.zip there")
    return folders[0]


def _read_json(path: Path) -> object:
    try:
        return parse_json(path.read_bytes(), path.name)
    except (OSError, UserError) as error:
        raise UserError(f"{path.name} cannot be read as JSON ({summarize_error(error)}); download it again") from error


def _read_first_captions(content: Any, name: str) -> tuple[dict[str, str], Counter[str]]:
    """File names and their first captions; and how many images have a name that occurs before."""
    try:
        names = {image["id"]: str(image["file_name"]) for image in content["images"]}
        captions = sorted(((a["id"], a["image_id"], find_caption(a["caption"])) for a in content["annotations"]), reverse=True)
        first = {image: caption for _, image, caption in captions if caption}  # by descending id: the lowest one is assigned last
        count = len(content["images"])
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{name} holds no COCO captions; expected images (id, file_name) and annotations (id, image_id, caption): "
            "give captions_….json, not instances_….json"
        ) from error
    if not names:
        raise UserError(f"{name} holds no images; expected COCO's captions, such as annotations/captions_val2017.json")
    by_name = {file: first.get(image, "") for image, file in names.items()}
    return by_name, Counter({"images of a name or an id that occurs before": count - len(by_name)})
