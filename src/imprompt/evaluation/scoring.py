"""From what was seen to figures, row by row, with intervals."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from imprompt.evaluation import metrics
from imprompt.evaluation.gallery import Gallery
from imprompt.evaluation.metrics import Interval
from imprompt.evaluation.store import Shelf

# Column → how its figures are read. Arrows: which way is better. {target}: what a picture is compared with.
COLUMNS = {
    "CLIP-I": "↑ cosine with the {target}",
    "CLIP-T": "↑ cosine with the caption (of the curve: with the text given)",
    "likeness": "↑ cosine with the {target}, in the features that FID looks at",
    "structure": "↓ distance of self-similarities to those of the {target} (Splice)",
    "LPIPS": "↓ to the {target}",
    "FID": "↓ to the whole set of that; the fewer pictures, the higher, below some 10 000",
    "KID × 1000": "↓ to the same set; ± holds the chance of its subsets too",
    "CMMD": "↓ to the same set",
    "IS": "↑ Inception Score, one split",
    "diversity": "↑ mean 1 − cosine among the samples of a prompt",
    "identity": "↑ cosine with the subject's photographs that are not to be drawn (row reference shows one), by an encoder of identity",
    "recognised": "↑ share nearest to its own subject of all",
    "no face": "↓ share in which the encoder of identity found nobody",
}


@dataclass(frozen=True)
class Score:
    """One row of the table."""

    name: str
    pictures: int
    prompts: int
    lost: int  # prompts whose picture could not be read
    trainable: int | None = None
    seconds: float = 0.0  # for a picture, on one process
    scale: float = 1.0
    curve: str = ""
    figures: dict[str, Interval] = field(default_factory=dict)


class Seen:
    """What was seen in a row's pictures, chunk by chunk; pictures themselves are not opened again."""

    def __init__(self, out: Path, name: str, chunks: int):
        self.shelf, self.chunks = Shelf(out, name), chunks

    def column(self, name: str) -> Tensor | None:
        """One tensor over all chunks, or None where it was not looked for."""
        parts = [seen[name] for seen, _ in self._all() if name in seen]
        return torch.cat(parts) if parts else None

    @property
    def lost(self) -> dict[str, str]:
        return {key: why for _, lost in self._all() for key, why in lost.items()}

    @property
    def seconds(self) -> float:
        return sum(float(seen["seconds"]) for seen, _ in self._all() if "seconds" in seen)

    def _all(self) -> Iterator[tuple[dict[str, Tensor], dict[str, str]]]:
        return (self.shelf.read(number) for number in range(self.chunks))


def scored(
    seen: Seen, real: Seen, resamples: int, samples: int, sets: bool = True, gallery: Gallery | None = None, by_subject: bool = False
) -> dict[str, Interval]:  # fmt: skip
    """The figures of a row. `sets` adds those that compare whole sets of pictures, which need many: none below FEW prompts.

    With a gallery of subjects it is told how often who was drawn is recognised. by_subject: intervals are over subjects, not prompts.
    """
    groups = seen.column("group" if by_subject else "prompt")
    assert groups is not None
    found: dict[str, Interval] = {}
    if len(groups.unique()) < 2:
        return found
    for name in ("CLIP-I", "CLIP-T", "likeness", "structure", "LPIPS"):
        values = seen.column(f"score.{name}")
        if values is not None:
            found[name] = metrics.mean_interval(values, groups, resamples)
    clip = seen.column("clip")
    if samples > 1 and clip is not None:
        spread = metrics.diversity(clip.unflatten(0, (-1, samples)))
        found["diversity"] = metrics.mean_interval(spread, groups[::samples], resamples)
    if gallery is not None:
        found |= identified(seen, gallery, groups, resamples)
    if not sets or len(groups.unique()) < FEW:
        return found
    pairs = [(seen.column(name), real.column(name)) for name in ("features", "clip")]
    (mine, theirs), (drawn, wanted) = pairs
    numbers = real.column("prompt")
    assert mine is not None and theirs is not None and drawn is not None and wanted is not None and numbers is not None
    if seen.lost:  # what the row left out is not held against it
        kept = torch.tensor([str(number) not in seen.lost for number in numbers.tolist()])
        theirs, wanted = theirs[kept], wanted[kept]
    found["FID"] = metrics.jackknife(lambda rows: metrics.fid(theirs, mine[rows]), groups)
    size = min(len(theirs), KERNEL)
    found["KID × 1000"] = metrics.jackknife(lambda rows: 1000 * metrics.kid(theirs, mine[rows], subsets=20, subset_size=size), groups)
    found["CMMD"] = metrics.jackknife(lambda rows: metrics.cmmd(wanted, drawn[rows]), groups, folds=10)
    classes = seen.column("classes")
    if classes is not None:
        logits = classes.clamp(min=1e-12).log()
        found["IS"] = metrics.jackknife(lambda rows: metrics.inception_score(logits[rows], splits=1), groups)
    return found


def identified(seen: Seen, gallery: Gallery, groups: Tensor, resamples: int) -> dict[str, Interval]:
    """Whether each picture shows its subject. Pictures in which nobody was found count as not recognised, and have no likeness."""
    embedded, there = seen.column("identity"), seen.column("found")
    assert embedded is not None and there is not None
    right = metrics.recognised(embedded, groups, gallery.centroids)
    found = {"recognised": metrics.mean_interval(right.double(), groups, resamples)}
    if not there.all():
        found["no face"] = metrics.mean_interval((~there).double(), groups, resamples)
    known = there & gallery.found[groups]
    if len(groups[known].unique()) > 1:
        alike = metrics.cosines(embedded[known], gallery.centroids[groups[known]])
        found["identity"] = metrics.mean_interval(alike, groups[known], resamples)
    return found


KERNEL = 1_000  # rows in a subset for KID
FEW = 4  # prompts
