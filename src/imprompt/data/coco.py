"""COCO: pictures with five captions each, of which the first is taken."""

import json
from pathlib import Path

from imprompt.data.records import Record
from imprompt.errors import UserError, brief


def is_coco(path: Path) -> bool:
    """Whether this looks like COCO: a JSON file, or a folder that holds annotations/captions_*.json."""
    if path.suffix.lower() == ".json" and path.is_file():
        return True
    return path.is_dir() and bool(_splits(path))


class Coco:
    """The pictures of one split, by file name, each with its first caption (the one of the lowest id); without one, "".

    `path`: captions_val2017.json, or the folder that holds annotations/ and val2017/. The pictures are looked for in a folder of
    the split's name beside annotations/, in images/ there, or beside the JSON file; each only when it is opened.
    Raises UserError where either is missing, several splits are possible, or the file is no COCO captions.
    """

    def __init__(self, path: str | Path):
        path = Path(path)
        self.path = _only_split(path) if path.is_dir() else path
        if not self.path.is_file():
            raise UserError(f"no data at {path}; expected COCO's captions, such as annotations/captions_val2017.json")
        self._texts = _first_captions(self.path)
        self.names = sorted(self._texts)
        self.folder = _pictures(self.path)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> Record:
        name = self.names[i]
        return Record(name, self.folder / name, self._texts[name])


def _splits(root: Path) -> list[Path]:
    return sorted((root / "annotations").glob("captions_*.json"))


def _only_split(root: Path) -> Path:
    """The captions whose pictures are there."""
    splits = _splits(root)
    if not splits:
        raise UserError(f"no COCO captions in {root}; expected annotations/captions_*.json there")
    there = [s for s in splits if _places(s)]
    if len(there) > 1:
        raise UserError(f"{root} holds several splits; name one: {', '.join(map(str, there))}")
    if not there:
        raise UserError(f"{root} holds captions but no pictures; expected them in {' or '.join(str(root / _name(s)) for s in splits)}")
    return there[0]


def _name(captions: Path) -> str:
    return captions.stem.removeprefix("captions_")


def _places(captions: Path) -> list[Path]:
    root, name = captions.absolute().parent.parent, _name(captions)
    return [p for p in (root / name, root / "images" / name, captions.parent / name) if p.is_dir()]


def _pictures(captions: Path) -> Path:
    places = _places(captions)
    if not places:
        wanted = captions.absolute().parent.parent / _name(captions)
        raise UserError(f"no pictures for {captions.name}; expected them in {wanted}: unpack {_name(captions)}.zip there")
    return places[0]


def _first_captions(path: Path) -> dict[str, str]:
    """File name → caption."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path.name} cannot be read as JSON ({brief(error)}); download it again") from error
    try:
        names = {image["id"]: str(image["file_name"]) for image in content["images"]}
        captions = sorted(((a["id"], a["image_id"], str(a["caption"]).strip()) for a in content["annotations"]), reverse=True)
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{path.name} holds no COCO captions; expected images (id, file_name) and annotations (id, image_id, caption): "
            "give captions_….json, not instances_….json"
        ) from error
    if not names:
        raise UserError(f"{path.name} holds no images; expected COCO's captions, such as annotations/captions_val2017.json")
    texts = {image: text for _, image, text in captions}  # the lowest id last, so that it stays
    return {name: texts.get(image, "") for image, name in names.items()}
