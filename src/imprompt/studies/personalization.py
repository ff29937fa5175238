"""The second paper's comparison: the same subject again, after several photographs, by every method that can.

Every row draws the same held-out subjects, told kind and place; what they look like is for their photographs to tell. The
trained rows go on from the embedded adapters, leave one out, at one budget, with three seeds each. Methods that learn a
subject learn each one with a seed of its own.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from PIL import Image

from imprompt.config import MINI_SUBJECT, PERSONAL, READS, Evaluate, Train
from imprompt.data.feature_cache import complete
from imprompt.evaluation.metrics import cosines, recognised
from imprompt.evaluation.report import strip
from imprompt.evaluation.runner import Row, Studio
from imprompt.evaluation.scoring import Seen
from imprompt.evaluation.system import Contender
from imprompt.evaluation.systems import REAL, SHOWN, WithMethod
from imprompt.studies.base import SAMPLER, Job, Progress, Study, prepared, rounded, rows
from imprompt.utils.files import write_file

NINE = 9
COARSE, FINE = "mini", "mini-plus"  # the embedded adapters: of a pooled embedding, of a grid
PLAIN = {  # rows without training: what they draw with, after how many references
    "one": (COARSE, 1),
    "one-plus": (FINE, 1),
    "concat": (f"{COARSE}@concat", NINE),
    "average": (f"{COARSE}@average", NINE),
    "max": (f"{COARSE}@max", NINE),
    "average-tokens": (f"{FINE}@average-tokens", NINE),
    "max-tokens": (f"{FINE}@max-tokens", NINE),
    "average-plus": (f"{FINE}@average", NINE),
    "max-plus": (f"{FINE}@max", NINE),
}
SEVERAL = ("concat", "average", "max", "average-tokens")  # those whose curve is drawn
TRAINED = {"self-attention": COARSE, "attention-tokens": FINE}  # each way, and the adapter that it goes on from
SECONDS = Path("finished") / "seconds.json"  # way → seconds for a new subject
ALONE = "given one"  # a trained way's row after one reference: what the others add is told by the difference


@dataclass(frozen=True)
class Budget:
    """What every trained row gets, and what all are measured on."""

    steps: int  # of the optimiser
    batch: int
    pictures: int  # of mini's training set, PHOTOS of each subject
    seeds: int
    subjects: int  # to test on
    targets: int  # photographs of each that are to be drawn
    samples: int
    drawing: int  # steps of SAMPLER
    counts: tuple[int, ...]  # of references, for the curve
    curve: int  # subjects of the curve
    learning: int  # steps of the methods that learn a subject; 0 for their own
    prior: int  # pictures of the class that they are to keep; −1 for their own number


PHOTOS = 10  # the second paper's: one to be drawn, nine references
GALLERY = 16  # photographs of a test subject that can be references
BUDGETS = {
    "full": Budget(300, 32, 12_000, 3, 100, 2, 2, 8, (1, 2, 3, 5, 9, 16), 50, 0, -1),
    "smoke": Budget(2, 4, 40, 2, 3, 2, 2, 2, (1, 9), 2, 2, 2),
}


class SecondPaper(Study):
    """Rows: what is not drawn, one reference, several by each method, and the curves over their number."""

    @property
    def budget(self) -> Budget:
        return BUDGETS[self.choice.budget]

    def names(self) -> list[str]:
        def asked(kind: str) -> bool:
            return not self.choice.method or kind in self.choice.method

        trained = [name for kind in TRAINED if asked(kind) for seed in self.seeds(kind) for name in (seed, f"{seed} {ALONE}")]
        learned = [name for name in PERSONAL if asked(name)]
        plain = [name for name in PLAIN if asked(name)]
        curves = [name for names in self.curves().values() for name in names] if asked("references") else []
        return [*SHOWN, *plain, *trained, *learned, *curves]

    def seeds(self, kind: str) -> list[str]:
        """The rows of a way that is trained: one for each seed."""
        return [f"{kind} seed {seed}" for seed in range(self.budget.seeds)]

    def curves(self) -> dict[str, list[str]]:
        """For each way the rows of its curve over the number of references; of the trained ways with the first seed."""
        ways = [*SEVERAL, *(f"{kind} seed 0" for kind in TRAINED)]
        return {way: [f"{way} after {count}" for count in self.budget.counts] for way in ways}

    def stages(self, missing: Sequence[str]) -> list[list[Job]]:
        trains = [name for name in missing if self.training(name) and not (self.weights(_way(name)).parent / "trained.json").is_file()]
        first: list[Job] = []
        for method in sorted({_method(name) for name in trains}):
            if not complete(self.cache(READS[method])):
                first.append(("fill", (f"mini:{self.budget.pictures}x{PHOTOS}", method)))
        curves = [name for name in missing if " after " in name or name.endswith(ALONE)]  # drawn with another row's weights
        slow = [name for name in missing if name in PERSONAL]
        trained = [name for name in missing if _kind(name) in TRAINED and name not in curves]
        plain = [name for name in missing if name not in (*curves, *slow, *trained, "copy")]
        copied = rows([name for name in missing if name == "copy"])
        needed = prepared(_way(name) for name in curves if name in trains and _way(name) not in missing)
        timing: list[Job] = [("clock", ())] if self.to_time(missing) else []
        return [[*first, *copied], [*rows(slow), *needed, *rows([*trained, *plain])], rows(curves), timing]  # the longest first

    def row(self, name: str) -> tuple[Row, str]:
        b = self.budget
        prompts = b.subjects * b.targets
        if name in REAL:
            return Row(name, name, "none", 1, prompts), "mini"
        if name == "text":
            return Row(name, "text", "caption", b.samples, prompts), "mini"
        if name in PLAIN:
            source, references = PLAIN[name]
            return Row(name, f"{name}={source}", "caption", b.samples, prompts, references=references), "mini"
        if name in PERSONAL:
            return Row(name, name, "caption", b.samples, prompts, references=NINE), "mini"
        way, _, count = name.partition(" after ")
        source = f"{name}={self.weights(way) if _kind(way) in TRAINED else PLAIN[way][0]}"
        if name.endswith(ALONE):
            return Row(name, f"{name}={self.weights(_way(name))}", "caption", b.samples, prompts, references=1), "mini"
        if count:
            return Row(name, source, "caption", 1, b.curve * b.targets, references=int(count)), "mini"
        return Row(name, source, "caption", b.samples, prompts, references=NINE), "mini"

    def training(self, name: str) -> Train | None:
        """Leave one out, from an embedded adapter on."""
        way, b = _way(name), self.budget
        if _kind(way) not in TRAINED:
            return None
        kind, _, seed = way.partition(" seed ")
        return Train(
            adapter=TRAINED[kind], combine=kind, cache=str(self.cache(READS[_method(way)])),
            subjects=PHOTOS, references=NINE, seed=int(seed), steps=b.steps, batch=b.batch, out=str(self.out / "train" / way),
            validation=min(8, b.subjects), validate_every=b.steps, save_every=max(1, b.steps // 6), keep=1,
            validation_steps=min(20, b.drawing), preflight=False, device=self.choice.device, warmup=min(50, b.steps // 2),
            **MINI_SUBJECT,
        )  # fmt: skip

    def evaluation(self, base: str, folder: Path) -> Evaluate:
        b = self.budget
        return Evaluate(
            base=base, data="mini", subjects=GALLERY + b.targets, references=GALLERY, targets=b.targets, limit=b.subjects * b.targets,
            samples=b.samples, text="caption", steps=b.drawing, scheduler=SAMPLER, guidance=3.0, judge="mini", features="mini",
            identity="mini", out=str(folder), device=self.choice.device, batch=64, dtype=self.dtype(), learning=b.learning, prior=b.prior,
        ).settled()  # fmt: skip

    def each(self, seen: Seen, row: Row, studio: Studio) -> dict[str, list[float]]:
        found = super().each(seen, row, studio)
        drawn, group, gallery = seen.column("identity"), seen.column("group"), studio.gallery
        assert drawn is not None and group is not None and gallery is not None
        alike = cosines(drawn, gallery.centroids[group])
        right = recognised(drawn, group, gallery.centroids).double()
        found["identity"], found["recognised"] = (rounded(v.unflatten(0, (-1, row.samples)).mean(1)) for v in (alike, right))
        found["subject"] = group[:: row.samples].tolist()
        return found

    def clock(self) -> str:
        """Seconds before a new subject can be drawn, by every way that learns nothing of it, one after the other."""
        studio, seconds, ways = self.studio("mini"), timed(self.out), self.to_time([])
        for number, way in enumerate(ways, 1):
            row, _ = self.row(row_of(way))
            seconds[way] = heard_in(studio.contender(row.source), studio.cases[0].references[: row.references])
            self.tell(Progress(way, "timing", number, len(ways)))
        write_file(self.out / SECONDS, json.dumps(seconds, indent=1))
        return "seconds for a new subject"

    def to_time(self, missing: Sequence[str]) -> list[str]:
        """The ways that are not timed yet and can be: what they draw with is there, or will be since their row is missing."""
        known, names = timed(self.out), set(self.names())
        ways = [way for way in (*PLAIN, *TRAINED) if way not in known and row_of(way) in names]
        return [way for way in ways if way in PLAIN or row_of(way) in missing or self.weights(row_of(way)).is_file()]

    def strip(self, studio: Studio, row: Row) -> Image.Image:
        """One picture of each of the first subjects."""
        return strip(studio.out, row.name, range(0, row.prompts, self.budget.targets))


@torch.no_grad()
def heard_in(contender: Contender, references: Sequence[Image.Image]) -> float:
    """Seconds from the pictures of a new subject to keys and values in the UNet: the median of some, the first left out."""
    assert isinstance(contender, WithMethod)
    method, times = contender.method, []
    device = contender.pipe.unet.device
    null = method.null()[None].to(device)
    for _ in range(8):
        began = time.perf_counter()
        features = method.encoder.encode(references, method.grid)[None].to(device)
        with method.attached(contender.pipe, features, null):
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
    return median(times[1:])


def timed(out: Path) -> dict[str, float]:
    """Way → seconds, of those that were timed."""
    return dict(json.loads((out / SECONDS).read_text("utf-8"))) if (out / SECONDS).is_file() else {}


def row_of(way: str) -> str:
    """The row that is drawn in a way; of a trained one that of the first seed."""
    return f"{way} seed 0" if way in TRAINED else way


def _way(name: str) -> str:
    """A row without the number of references."""
    return name.partition(" after ")[0].removesuffix(f" {ALONE}")


def _method(name: str) -> str:
    """The method whose features a trained row's cache holds."""
    return "ip-adapter" if TRAINED[_kind(name)] == COARSE else "ip-adapter-plus"


def _kind(name: str) -> str:
    """A row's way of bringing references together, without its seed."""
    return _way(name).partition(" seed ")[0]


def by_subject(values: Sequence[float], subjects: Sequence[float]) -> torch.Tensor:
    """The mean for each subject."""
    groups = torch.tensor(subjects, dtype=torch.long)
    sums = torch.zeros(int(groups.max()) + 1, dtype=torch.float64).index_add_(0, groups, torch.tensor(values, dtype=torch.float64))
    return sums / groups.bincount()
