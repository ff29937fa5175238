"""The first paper's comparison (arXiv:2308.06721, table 1): every method at one budget, the curve of λ, a custom model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from imprompt.config import COPIES, GENERAL, METHODS, READS, Evaluate, Reproduce, Train
from imprompt.data.feature_cache import complete
from imprompt.evaluation.runner import Row, Studio, curve_of
from imprompt.evaluation.scoring import Seen
from imprompt.recipes.style import make_style
from imprompt.studies.base import SAMPLER, Job, Progress, Study, prepared, rounded, rows
from imprompt.utils.files import writable_folder

STYLE = "ink"
CUSTOM = "on a custom model"


@dataclass(frozen=True)
class Budget:
    """What every trained row gets, and what all are measured on."""

    steps: int  # of the optimiser
    batch: int
    pictures: int  # different ones, of mini's training set
    prompts: int
    samples: int
    drawing: int  # steps of SAMPLER
    curve: int  # prompts of the curve of λ
    style: float  # share of the custom model's usual training


BUDGETS = {
    "full": Budget(500, 48, 24_000, 1_000, 4, 5, 200, 0.6),
    "smoke": Budget(2, 4, 64, 4, 2, 2, 2, 0.004),
}


class FirstPaper(Study):
    """Rows: what is not trained, the methods, the curve of λ, and the adapter on a custom model."""

    @property
    def budget(self) -> Budget:
        return BUDGETS[self.choice.budget]

    def names(self) -> list[str]:
        asked = self.choice.method
        methods = [name for name in GENERAL if not asked or name in asked]
        more = [] if asked and "ip-adapter" not in asked else [*curve_names(), *CUSTOM_NAMES]
        return ["copy", "real", "text", *sorted(methods, key=lambda name: name not in COPIES), *more]

    def stages(self, missing: Sequence[str]) -> list[list[Job]]:
        plain = [n for n in missing if n in ("copy", "real", "text")]
        methods = [n for n in missing if n in GENERAL]
        after = [n for n in missing if n not in plain and n not in methods]  # need the adapter, or the custom model
        taught = {n if n in METHODS else "ip-adapter" for n in missing if self.training(n)}
        untrained = sorted(n for n in taught if not (self.weights(n).parent / "trained.json").is_file())
        caches = {READS[name]: name for name in untrained}
        data = f"mini:{self.budget.pictures}"
        first: list[Job] = [("fill", (data, method)) for features, method in caches.items() if not complete(self.cache(features))]
        if any(CUSTOM in name for name in missing) and not (self.out / STYLE / "model" / "model_index.json").is_file():
            first.append(("style", ()))
        needed = prepared(n for n in untrained if n not in methods)  # its row is there, its weights are not
        return [[*first, *rows(plain[:1])], [*needed, *rows([*methods, *plain[1:]])], rows(after)]

    def style(self) -> str:
        """Make the custom model."""
        folder = writable_folder(self.out / STYLE)
        make_style(STYLE, folder, lambda part, done, total, _: self.tell(Progress(STYLE, part, done, total)), self.budget.style)
        return STYLE

    def row(self, name: str) -> tuple[Row, str]:
        b = self.budget
        if name in ("copy", "real"):
            return Row(name, name, "none", 1, b.prompts), "mini"
        base = str(self.out / STYLE / "model") if CUSTOM in name else "mini"
        if name.startswith("text"):
            return Row("text", "text", "caption", b.samples, b.prompts), base
        if " λ " in name:
            prompts = min(b.curve, b.prompts)
            if name.endswith("base"):
                return Row(name, "text", "other", 1, prompts, 1.0, "base"), base
            return next(r for r in curve_of(f"ip-adapter={self.weights('ip-adapter')}", prompts) if r.name == name), base
        method = name.removesuffix(f" {CUSTOM}")
        source = method if method not in METHODS else f"{method}={self.weights(method)}"
        return Row(method, source, "none", b.samples, b.prompts), base

    def training(self, name: str) -> Train | None:
        method = "ip-adapter" if name.startswith("ip-adapter ") and not name.endswith("base") else name
        return training(self.choice, method, self.out) if method in METHODS else None

    def evaluation(self, base: str, folder: Path) -> Evaluate:
        b = self.budget
        return Evaluate(
            base=base, data="mini", limit=b.prompts, samples=b.samples, steps=b.drawing, scheduler=SAMPLER, guidance=3.0, judge="mini",
            features="mini", encoder=None, out=str(folder), device=self.choice.device, batch=64, dtype=self.dtype(),
        ).settled()  # fmt: skip

    def each(self, seen: Seen, row: Row, studio: Studio) -> dict[str, list[float]]:
        found = super().each(seen, row, studio)
        clip = seen.column("clip")
        if row.curve and (row.curve == "base" or row.scale == 0) and clip is not None:
            found["seen"] = rounded(clip.flatten(), 5)  # of λ = 0 and of the base, to be compared
        return found


def curve_names() -> list[str]:
    return [row.name for row in curve_of("ip-adapter", 1)] + ["ip-adapter λ base"]


CUSTOM_NAMES = [f"text {CUSTOM}", f"ip-adapter {CUSTOM}"]


def training(choice: Reproduce, method: str, out: Path) -> Train:
    """The training of one row: the same budget and data for each, on the settings that `imprompt train` has for mini."""
    b = BUDGETS[choice.budget]
    return Train(
        method=method, data=f"mini:{b.pictures}", cache=str(out / f"cache-{READS[method]}"), steps=b.steps, batch=b.batch,
        out=str(out / "train" / method), validation=min(8, b.prompts), validate_every=b.steps, save_every=max(1, b.steps // 6), keep=1,
        validation_steps=min(20, b.drawing), preflight=choice.budget == "full", device=choice.device, warmup=min(100, b.steps // 2),
    )  # fmt: skip
