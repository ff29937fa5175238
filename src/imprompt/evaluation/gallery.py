"""Every subject as its photographs show it to an encoder of identity."""

from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from imprompt.errors import ImageError, UserError
from imprompt.evaluation.identity import Identity
from imprompt.evaluation.metrics import centroid
from imprompt.evaluation.samples import SubjectCases
from imprompt.utils.files import atomic_path

MOST = 16  # photographs of a subject


class Gallery(NamedTuple):
    """Subjects to be recognised."""

    centroids: Tensor  # (subjects, width): the mean of the embeddings of a subject's photographs, of length 1
    found: Tensor  # (subjects,), bool: whether anybody was found in any of them


@torch.no_grad()
def looked_at(identity: Identity, cases: SubjectCases) -> Gallery:
    """The subjects' photographs that are not to be drawn, at most MOST of each."""
    known: dict[int, Tensor] = {}
    for number in range(len(cases.subjects)):
        with suppress(ImageError):  # none can be opened
            embedded, there = identity.embed(cases.gallery(number, MOST))
            if there.any():
                known[number] = centroid(embedded, there)
    if not known:
        raise UserError("nobody was found in any photograph; expected other data, or another --identity")
    nobody = torch.zeros_like(next(iter(known.values())))
    centroids = torch.stack([known.get(number, nobody) for number in range(len(cases.subjects))])
    return Gallery(centroids.float(), centroids.any(1))


def kept_gallery(path: Path, identity: Identity, cases: SubjectCases) -> Gallery:
    """The same, from the file where it was kept; looked at anew where the photographs or the encoder are others."""
    of = {"of": f"{identity.name} {cases.fingerprint} {len(cases.subjects)}"}
    if not path.is_file() or _kept_of(path) != of:
        with atomic_path(path) as partial:
            safetensors.torch.save_file(looked_at(identity, cases)._asdict(), partial, of)
    kept = safetensors.torch.load_file(path)
    return Gallery(kept["centroids"], kept["found"])


def _kept_of(path: Path) -> dict[str, str]:
    with safetensors.safe_open(path, "pt") as file:
        return dict(file.metadata() or {})
