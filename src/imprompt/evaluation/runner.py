"""The evaluation: every row draws after the same prompts with the same seeds, and is scored by the same eyes.

Work is cut into chunks of prompts that are the same whatever the number of processes, and whatever was done before an
interruption; so are the pictures and the table.
"""

import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from imprompt.config import PERSONAL, Evaluate
from imprompt.data.dreambooth import named as spoken
from imprompt.data.loader import UNREADABLE
from imprompt.data.readers import is_mini
from imprompt.errors import ImageError, UserError, brief
from imprompt.evaluation import metrics
from imprompt.evaluation.features import Eyes
from imprompt.evaluation.gallery import Gallery, kept_gallery
from imprompt.evaluation.identity import Identity, load_identity
from imprompt.evaluation.samples import Cases, SubjectCases, open_cases
from imprompt.evaluation.store import Shelf, agree, folder_of
from imprompt.evaluation.system import Case, Contender, How
from imprompt.evaluation.systems import REAL, SHOWN, Learner, WithMethod, check_source, load_contender, named, taken_apart
from imprompt.evaluation.workers import pool
from imprompt.models import hub
from imprompt.models.base_pipelines import check_size, claim_device, load_base, own_size, pick_dtype, scheduled
from imprompt.utils.files import writable_folder

SCALES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


@dataclass(frozen=True)
class Row:
    """One row of the table."""

    name: str
    source: str
    text: str  # none, caption, or other: another prompt's caption
    samples: int
    prompts: int
    scale: float = 1.0
    curve: str = ""  # the row whose curve of λ this is a point of
    references: int = 0  # how many of a subject's are heard; 0 for all that there are


class Progress(NamedTuple):
    """How far an evaluation is."""

    row: str
    done: int  # chunks
    total: int
    pictures_per_second: float


class Task(NamedTuple):
    """A chunk of a row."""

    row: Row
    number: int


def rows_of(choice: Evaluate, cases: Cases) -> list[Row]:
    """What stands in the table, from top to bottom, and the points of the curves."""
    count = len(cases)
    rows = [Row("copy", "copy", "none", 1, count)]
    if cases.has_others:
        rows.append(Row("real", "real", "none", 1, count))
    if choice.subjects:  # else the copy is the reference itself
        rows.append(Row("reference", "reference", "none", 1, count))
    rows.append(Row("text", "text", "caption", choice.samples, count))
    drawn = list(dict.fromkeys([*choice.adapter, *choice.against]))
    for source in drawn:
        if source not in SHOWN:
            rows.append(Row(named(source)[0], source, choice.text, choice.samples, count, choice.scale))
    names = [folder_of(row.name) for row in rows]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"two rows are called {twice[0]!r}; name them: --adapter NAME=FILE")
    for source in dict.fromkeys(choice.adapter) if choice.curve else ():
        rows += curve_of(source, min(choice.curve, count))
    return rows


def curve_of(source: str, prompts: int) -> list[Row]:
    """The points of an adapter's curve of λ, with another prompt's caption as text."""
    name = named(source)[0]
    return [Row(f"{name} λ {scale}", source, "other", 1, prompts, scale, name) for scale in SCALES]


class Studio:
    """What one process works with: the prompts, the eyes, and the contender of the row it is at."""

    def __init__(self, choice: Evaluate):
        self.choice, self.out = choice, Path(choice.out)
        self.cases = open_cases(choice)
        self._at: tuple[str, Contender] | None = None

    @cached_property
    def eyes(self) -> Eyes:
        assert self.choice.judge is not None
        return Eyes(self.choice.judge, self.choice.features, claim_device(self.choice.device), self.choice.lpips)

    @cached_property
    def identity(self) -> Identity | None:
        """What tells subjects apart, where there are some."""
        if self.choice.identity == "none" or not self.cases.subjects:
            return None
        return load_identity(self.choice.identity, claim_device(self.choice.device))

    @cached_property
    def gallery(self) -> Gallery | None:
        """Every subject as its photographs show it: looked at once, and kept."""
        if self.identity is None:
            return None
        assert isinstance(self.cases, SubjectCases)
        return kept_gallery(self.out / "gallery.safetensors", self.identity, self.cases)

    @property
    def dtype(self) -> torch.dtype:
        """What the base computes in."""
        return pick_dtype(self.choice.dtype, torch.device(claim_device(self.choice.device)).type, self.choice.base == "mini")

    @property
    def pipe(self) -> Any:
        return load_base(self.choice.base, claim_device(self.choice.device), self.dtype)

    @cached_property
    def size(self) -> int:
        side = self.choice.size or own_size(self.pipe)
        check_size(self.pipe, side, side)
        return side

    def contender(self, source: str) -> Contender:
        """The row's contender. The last one is kept in memory."""
        if self._at is None or self._at[0] != source:
            self._at = None
            self._at = source, load_contender(source, self.choice)
        return self._at[1]

    def rehearse(self, rows: Sequence[Row]) -> None:
        """Load and look once, so that whatever does not fit is said before any work. Raises UserError."""
        blank = Image.new("RGB", (self.size, self.size))
        self.eyes.see([blank])
        _ = self.gallery
        for source in dict.fromkeys(row.source for row in rows if row.source not in REAL):
            contender = self.contender(source)
            if isinstance(contender, WithMethod):
                contender.rehearse(self.choice.identity if self.cases.subjects else "none")
        if any(row.source not in REAL for row in rows):
            with scheduled(self.pipe, self.choice.scheduler, self.choice.steps):  # as many steps as the scheduler can take
                pass

    def how(self, row: Row) -> How:
        return How(self.choice.steps, self.choice.guidance or 0.0, (self.size, self.size), row.scale)

    def chunks(self, row: Row) -> int:
        return -(-row.prompts // self.step(row))

    def step(self, row: Row) -> int:
        """Prompts in a chunk; all of a subject are in the same one, as far as every subject has as many."""
        together = self.choice.targets
        return max(1, self.choice.batch // row.samples // together) * together

    def work(self, task: Task) -> int:
        """Draw a chunk, look at it and keep both. How many pictures there were."""
        row, step = task.row, self.step(task.row)
        shelf, found, lost = Shelf(self.out, row.name), list[tuple[int, Case, Image.Image | None]](), dict[str, str]()
        if row.source not in REAL:
            self.contender(row.source)  # loading it is not drawing
        for i in range(task.number * step, min(row.prompts, (task.number + 1) * step)):
            try:
                case = self.cases[i]
                shown = self._shown(row, i, case)
            except UNREADABLE as error:
                lost[str(i)] = brief(error)
                continue
            try:
                found.append((i, self._heard(row, case), shown))
            except ImageError as error:
                lost[str(i)] = brief(error)
        if not found:
            shelf.write(task.number, {}, lost)
            return 0
        places = [(i, s, self.choice.seed + i * self.choice.samples + s) for i, *_ in found for s in range(row.samples)]
        repeated = [case for _, case, _ in found for _ in range(row.samples)]
        learning, began = self._learning(row), time.perf_counter()
        drawn = [self._resized(picture) for *_, picture in found if picture] or self._drawn(row, repeated, places)
        learning = self._learning(row) - learning
        seconds = time.perf_counter() - began - learning
        seen = self._scored(row, drawn, repeated, places)
        shelf.keep(drawn, places)
        shelf.write(task.number, seen | {"seconds": torch.tensor([seconds]), "learning": torch.tensor([learning])}, lost)
        return len(drawn)

    def _shown(self, row: Row, i: int, case: Case) -> Image.Image | None:
        """The photograph that stands in a row that is not drawn; None where one is to be drawn."""
        match row.source:
            case "copy":
                return case.target
            case "real":
                return self.cases.other(i)
            case "reference":  # for each of a subject's targets another one
                return case.references[i % self.choice.targets % len(case.references)]
        return None

    def _heard(self, row: Row, case: Case) -> Case:
        """The case with those of its references that the row is to hear. Raises ImageError where it can hear none."""
        case = case._replace(references=case.references[: row.references or None])
        contender = None if row.source in REAL else self.contender(row.source)
        return contender.heard(case) if isinstance(contender, WithMethod) else case

    def _learning(self, row: Row) -> float:
        """Seconds that the row's contender has spent so far on learning its subjects."""
        at = self._at[1] if row.source not in REAL and self._at else None
        return at.learning if isinstance(at, Learner) else 0.0

    def _resized(self, picture: Image.Image) -> Image.Image:
        return picture.resize((self.size, self.size), Image.Resampling.LANCZOS)

    def _drawn(self, row: Row, cases: list[Case], places: list[tuple[int, int, int]]) -> list[Image.Image]:
        texts, seeds = [self._text(row, i) for i, _, _ in places], [seed for _, _, seed in places]
        return self.contender(row.source).draw(cases, texts, seeds, self.how(row))

    def _text(self, row: Row, i: int) -> str:
        """What the row is told, or, for the curve, what another prompt's caption says."""
        match row.text:
            case "none":
                return ""
            case "caption":
                return self.cases.texts[i]
        texts = self.cases.texts
        return next((texts[(i + n) % len(texts)] for n in range(1, len(texts)) if texts[(i + n) % len(texts)] != texts[i]), texts[i])

    def _scored(self, row: Row, drawn: list[Image.Image], cases: list[Case], places: list[tuple[int, int, int]]) -> dict[str, Any]:
        seen = self.eyes.see(drawn)
        wanted = self.eyes.see([case.target for case in cases[:: row.samples]])
        wanted = {name: value.repeat_interleave(row.samples, 0) for name, value in wanted.items()}
        said = self.eyes.read([self._text(row, i) if row.text == "other" else self.cases.texts[i] for i, _, _ in places])
        scores = {"CLIP-I": metrics.cosines(seen["clip"], wanted["clip"]), "CLIP-T": metrics.cosines(seen["clip"], said)}
        scores["likeness"] = metrics.cosines(seen["features"], wanted["features"])
        if "patches" in seen:
            scores["structure"] = metrics.structure_distance(seen.pop("patches"), wanted.pop("patches"))
        if self.eyes.lpips:
            scores["LPIPS"] = self.eyes.lpips(drawn, [case.target for case in cases])
        index = {"prompt": torch.tensor([i for i, _, _ in places]), "seed": torch.tensor([seed for _, _, seed in places])}
        index["group"] = torch.tensor([self.cases.group(i) for i, _, _ in places])
        if self.identity is not None:
            seen["identity"], seen["found"] = self.identity.embed(drawn)
        return {f"score.{name}": value for name, value in scores.items()} | seen | index


_studio: Studio | None = None


def _begin(choice: Evaluate) -> None:
    global _studio
    _studio = Studio(choice)


def _work(task: Task) -> tuple[str, int]:
    assert _studio is not None
    return task.row.name, _studio.work(task)


def draw(choice: Evaluate) -> Iterator[Progress]:
    """Draw and look at everything that is not there yet. Raises UserError for what the user can mend, before any work."""
    choice = choice.settled()
    out = writable_folder(choice.out)
    for source in (*choice.adapter, *choice.against):
        check_source(source)
        if source == "reference" and not choice.subjects:
            raise UserError("reference: after single pictures the row copy gives it back; this row is for --subjects")
        if named(source)[1] in PERSONAL and not choice.subjects:
            raise UserError(f"{source} learns a subject from several photographs: say how many each has at least, --subjects 10")
    studio = Studio(choice)
    if len(studio.cases) < 2:
        raise UserError(f"expected at least 2 prompts, of which an interval can be told; received {len(studio.cases)}")
    if choice.subjects and len(studio.cases.subjects) < 2:
        raise UserError("expected at least 2 subjects, of which an interval can be told and one recognised; received 1")
    _check_texts(choice, studio.cases)
    rows = rows_of(choice, studio.cases)
    studio.rehearse(rows)
    agree(out / "protocol.json", protocol(choice, studio), f"the evaluation in {out}")
    for row in rows:
        agree(Shelf(out, row.name).folder / "row.json", facts(row), f"row {row.name} in {out}")
    tasks = [Task(row, n) for row in rows for n in range(studio.chunks(row))]
    missing = [task for task in tasks if not Shelf(out, task.row.name).has(task.number)]
    done, pictures, began = len(tasks) - len(missing), 0, time.monotonic()
    for name, count in _results(choice, studio, missing):
        done, pictures = done + 1, pictures + count
        yield Progress(name, done, len(tasks), pictures / (time.monotonic() - began))


def _check_texts(choice: Evaluate, cases: Cases) -> None:
    """Raise UserError, before anything is learned, where a method that learns a subject could not be told of it."""
    learners = [source for source in (*choice.adapter, *choice.against) if named(source)[1] in PERSONAL]
    if not learners or not isinstance(cases, SubjectCases):
        return
    if choice.text == "none":
        raise UserError(f"{learners[0]} is told by the text that its subject is meant: --text caption")
    if not choice.noun and not is_mini(choice.data):
        raise UserError(f"noun: {learners[0]} has to know what the subjects are, such as person; received nothing")
    for i, text in enumerate(cases.texts):
        spoken(text, cases.noun(i), "sks")


def _results(choice: Evaluate, studio: Studio, tasks: list[Task]) -> Iterator[tuple[str, int]]:
    if choice.processes == 1 or len(tasks) < 2:
        for task in tasks:
            yield task.row.name, studio.work(task)
        return
    with pool(min(choice.processes, len(tasks)), _begin, choice) as processes:
        waiting = {processes.submit(_work, task) for task in tasks}
        while waiting:
            ready, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in ready:
                yield future.result()


def protocol(choice: Evaluate, studio: Studio) -> dict[str, Any]:
    """Everything that decides a figure and is not a row: printed with every table."""
    data = choice.data if is_mini(choice.data) else str(Path(choice.data).absolute())
    return {
        "base": choice.base, "base's files": fingerprint(choice.base), "data": data,
        "prompts": len(studio.cases), "captions and pictures": studio.cases.fingerprint, "samples": choice.samples,
        "references": "square, cut from the middle", "first seed": choice.seed, "seed": "first seed + prompt × samples + sample",
        "size": studio.size, "scheduler": choice.scheduler, "steps": choice.steps, "guidance": choice.guidance, "text given": choice.text,
        "scale": choice.scale, "batch": choice.batch, "dtype": str(studio.dtype).removeprefix("torch."),
        "device": torch.device(claim_device(choice.device)).type, "image encoder": choice.encoder or "each adapter's own",
        "CLIP-I, CLIP-T, CMMD by": choice.judge, "FID, KID, likeness by": choice.features, "LPIPS": choice.lpips,
        "CLIP-T": "cosine, not clamped, × 1", **by_subject(choice, studio),
        **{name: version(name) for name in ("imprompt", "torch", "diffusers", "transformers", "torchmetrics")},
    }  # fmt: skip


def by_subject(choice: Evaluate, studio: Studio) -> dict[str, Any]:
    """What is said of subjects where there are some."""
    if not choice.subjects:
        return {}
    return {
        "subjects": len(studio.cases.subjects), "photographs to draw after": choice.references, "to be drawn of each": choice.targets,
        "split": choice.split or "none", "noun": choice.noun or "none",
        "identity by": choice.identity, "learning": choice.learning or "each method's own steps",
        "pictures to keep": choice.prior if choice.prior >= 0 else "each method's own number",
    }  # fmt: skip


def fingerprint(base: str) -> str:
    """Of a local folder's files, by their names and sizes."""
    files = sorted(p for p in Path(base).rglob("*") if p.is_file()) if Path(base).is_dir() else []
    return f"{zlib.crc32(' '.join(f'{p.name} {p.stat().st_size}' for p in files).encode()):08x}" if files else "by name"


def facts(row: Row) -> dict[str, Any]:
    """What a row is; the file's checksum stands for its content."""
    source, how = taken_apart(named(row.source)[1])
    path = hub.find_adapter(source)[0] if source in hub.EMBEDDED else Path(source)
    known = {"source": path.name, "checksum": zlib.crc32(path.read_bytes())} if path.is_file() else {"source": source}
    known |= {"combine": how} if how else {}
    heard = {"references": row.references} if row.references else {}
    return known | {"text": row.text, "samples": row.samples, "prompts": row.prompts, "scale": row.scale} | heard
