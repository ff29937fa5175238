"""A file imports from its own room or a lower one: doors → workflows → outside world → core."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "src" / "imprompt"
FILES = sorted(ROOT.rglob("*.py"))

# Rooms from the lowest to the highest. A file may import its own layer and everything below.
LAYERS: list[tuple[str, ...]] = [
    ("errors", "files", "core", "pages", "memory"),
    ("config", "images", "encoders", "checkpoints", "faces", "hosts", "mini.world", "mini.tokenizer"),
    ("hub", "prompter", "pipelines", "controls", "data", "mini.fit", "mini.identity", "mini.recipe", "mini.style"),
    ("similarity", "methods"),
    ("scene",),
    ("generating", "mini.judging", "training", "evaluate", "personalising"),
    ("api", "mini"),
    ("cli", "__main__", "__init__"),
]

# Which outside package may be imported where.
OUTSIDE = {
    "diffusers": ("hosts", "pipelines", "controls", "mini", "training", "methods", "evaluate.outside"),
    "transformers": ("encoders", "pipelines", "mini", "similarity", "methods", "evaluate"),
    "safetensors": ("checkpoints", "data", "evaluate.shelf", "evaluate.gallery"),
    "huggingface_hub": ("hub",),
    "rich": ("cli",),
    "webdataset": ("data",),
    "pyarrow": ("data",),
    "accelerate": ("training",),
    "matplotlib": ("training", "evaluate.report"),
    "torchmetrics": ("evaluate",),
}


def room(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def inside(name: str, rooms: tuple[str, ...]) -> bool:
    return any(name == r or name.startswith(r + ".") for r in rooms)


def layer(name: str) -> int:
    fitting = [(len(r), i) for i, rooms in enumerate(LAYERS) for r in rooms if name == r or name.startswith(r + ".")]
    assert fitting, f"{name} stands in no layer: add it to LAYERS"
    return max(fitting)[1]


def imports(path: Path) -> list[str]:
    """Every module that the file imports, at the top or inside a function; type-only imports are free."""
    tree = ast.parse(path.read_text("utf-8"))
    free = {n for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) for n in ast.walk(node)}
    found = []
    for node in ast.walk(tree):
        if node in free:
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                submodule = ROOT.parent / (f"{node.module}.{alias.name}".replace(".", "/"))
                found.append(f"{node.module}.{alias.name}" if submodule.is_dir() or submodule.with_suffix(".py").is_file() else node.module)
    return found


@pytest.mark.parametrize("path", FILES, ids=room)
def test_imports_point_downwards(path):
    mine = room(path) or "__init__"
    for name in imports(path):
        if not name.startswith("imprompt."):  # another package, or the public names of ours
            continue
        target = name.removeprefix("imprompt.")
        assert layer(target) <= layer(mine), f"{mine} imports {target} from a higher layer"


@pytest.mark.parametrize("path", FILES, ids=room)
def test_outside_packages_stay_in_their_rooms(path):
    mine = room(path)
    for name in imports(path):
        package = name.split(".")[0]
        if package in OUTSIDE:
            assert inside(mine, OUTSIDE[package]), f"{mine} imports {package}"


def test_core_needs_torch_only():
    import sys

    for path in (ROOT / "core").rglob("*.py"):
        for name in imports(path):
            top = name.split(".")[0]
            assert top in ("torch", "imprompt") or top in sys.stdlib_module_names, f"{path.name} imports {name}"
