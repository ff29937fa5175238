"""Every package stands on a floor of its own and imports lower floors only; third-party packages stay where they belong."""

import ast
import shutil
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "src" / "imprompt"

# From the lowest to the highest. A package imports itself and the packages before it.
FLOORS = (
    "errors", "config", "utils", "core", "unet", "dit", "models", "mini", "methods", "data", "training", "generation", "evaluation",
    "recipes", "studies", "personalize", "cli", "__init__", "__main__",
)  # fmt: skip

# Which packages or modules may import a third-party package; one that is not listed may be imported nowhere.
THIRD_PARTY = {
    "PIL": (
        "utils",
        "models",
        "mini",
        "methods",
        "data",
        "training",
        "generation",
        "evaluation",
        "recipes",
        "studies",
        "personalize",
        "cli",
    ),
    "accelerate": ("training", "utils.compat"),
    "cyclopts": ("cli",),
    "bitsandbytes": ("training.loop",),
    "facenet_pytorch": ("models.face_encoders",),
    "peft": ("methods.dreambooth",),
    "deepspeed": ("training.zero",),
    "diffusers": (
        "unet",
        "dit",
        "models",
        "mini",
        "methods",
        "generation",
        "training",
        "evaluation.external",
        "recipes",
        "utils.protocols",
    ),
    "huggingface_hub": ("models.hub",),
    "insightface": ("models.face_encoders",),
    "jaxtyping": ("core",),
    "jinja2": ("utils.html",),
    "markupsafe": ("utils.html", "data.report", "evaluation.report", "studies", "training.run_log"),
    "matplotlib": ("utils.plots",),
    "numpy": ("utils", "models", "mini", "data", "training", "generation", "evaluation", "recipes", "studies"),
    "pillow_heif": ("utils.images",),
    "pyarrow": ("data",),
    "rich": ("cli",),
    "safetensors": ("models", "data", "training", "evaluation"),
    "scipy": ("utils.statistics",),
    "tokenizers": ("mini",),
    "torch": tuple(floor for floor in FLOORS if floor not in ("errors", "config", "__init__", "__main__")),
    "torchmetrics": ("evaluation",),
    "transformers": ("utils.protocols", "models", "mini", "methods", "evaluation", "recipes"),
    "webdataset": ("data",),
}
STANDARD_LIBRARY_ONLY = ("errors", "config")
CORE_MAY_IMPORT = ("core", "errors", "utils.compat")  # core is the papers, on torch


def module_name(root: Path, path: Path) -> str:
    """Dotted name below imprompt; the package itself is `__init__`."""
    name = ".".join(path.relative_to(root).with_suffix("").parts)
    return name.removesuffix(".__init__") if "." in name else name


def imported_names(root: Path, path: Path) -> Iterator[str]:
    """Absolute dotted name of everything that a file imports, at the top, inside a function or for type checking."""
    package = ["imprompt", *path.relative_to(root).parts[:-1]]
    for node in parse_imports(path.read_text("utf-8")):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        else:
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


@cache
def parse_imports(source: str) -> list[ast.Import | ast.ImportFrom]:
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]


def internal_module(root: Path, name: str) -> str:
    """The module that an imported name of ours lies in; `__init__` for a public name of the package itself."""
    parts = name.split(".")[1:]
    while parts:
        path = root.joinpath(*parts)
        if path.is_dir() or path.with_suffix(".py").is_file():
            return ".".join(parts)
        parts.pop()
    return "__init__"


def is_within(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def floor_of(module: str) -> int:
    return FLOORS.index(module.split(".")[0])


def find_violations(root: Path) -> list[str]:
    """Every import that breaks a rule, in a sentence."""
    violations = []
    for path in sorted(root.rglob("*.py")):
        module = module_name(root, path)
        if module.split(".")[0] not in FLOORS:
            violations.append(f"{module} stands on no floor")
            continue
        for name in imported_names(root, path):
            if reason := broken_rule(root, module, name):
                violations.append(f"{module} imports {name}: {reason}")
    return violations


def broken_rule(root: Path, module: str, name: str) -> str:
    top = name.split(".")[0]
    if top == "imprompt":
        return broken_floor(root, module, name)
    if top in sys.stdlib_module_names:
        return ""
    if is_within(module, STANDARD_LIBRARY_ONLY):
        return "standard library only"
    return "" if is_within(module, THIRD_PARTY.get(top, ())) else "not a place for this package"


def broken_floor(root: Path, module: str, name: str) -> str:
    target = internal_module(root, name)
    if target == "__init__" and module not in ("__init__", "__main__"):
        allowed = is_within(module, ("cli",)) and name == "imprompt.__version__"
        return "" if allowed else "public names of the package are for users"
    if is_within(module, ("core",)) and not is_within(target, CORE_MAY_IMPORT):
        return "core imports torch and itself"
    same_package = target.split(".")[0] == module.split(".")[0]
    return "" if same_package or floor_of(target) < floor_of(module) else "a higher floor"


def package_graph(root: Path) -> dict[str, set[str]]:
    graph: dict[str, set[str]] = {}
    for path in root.rglob("*.py"):
        package = module_name(root, path).split(".")[0]
        internal = (internal_module(root, name).split(".")[0] for name in imported_names(root, path) if name.split(".")[0] == "imprompt")
        graph.setdefault(package, set()).update(target for target in internal if target not in (package, "__init__"))
    return graph


def test_imports_keep_the_layering():
    assert find_violations(ROOT) == []


def test_package_graph_is_acyclic():
    graph = package_graph(ROOT)
    while leaves := {package for package, targets in graph.items() if not targets & graph.keys()}:
        graph = {package: targets for package, targets in graph.items() if package not in leaves}
    assert not graph, f"packages in a circle: {sorted(graph)}"


def test_compat_needs_torch_and_accelerate_only():
    """core may import it, so it must stay small."""
    tops = {name.split(".")[0] for name in imported_names(ROOT, ROOT / "utils" / "compat.py")}
    assert tops - set(sys.stdlib_module_names) <= {"torch", "accelerate", "imprompt"}


MUTATIONS = [
    ("core/attention.py", "from imprompt import train"),
    ("core/attention.py", "import imprompt"),
    ("core/attention.py", "from imprompt.utils.html import write_page"),
    ("core/attention.py", "import peft"),
    ("core/attention.py", "from ..training import loop"),
    ("core/attention.py", "from imprompt.training import loop"),
    ("config/common.py", "import torch"),
    ("errors.py", "from imprompt.core.optim import Muon"),
    ("utils/images.py", "from imprompt.unet.injection import AttachedImagePrompts"),
    ("generation/generate.py", "from imprompt.evaluation import metrics"),
    ("training/loop.py", "from imprompt.evaluation import metrics"),
    ("training/loop.py", "def lazy():\n    from imprompt.generation.generate import generate_images"),
    ("data/readers.py", "from imprompt.recipes import style"),
    ("unet/injection.py", "import peft"),
]


@pytest.mark.parametrize(("file", "line"), MUTATIONS, ids=lambda value: value)
def test_a_forbidden_import_is_found(file, line, tmp_path):
    root = tmp_path / "imprompt"
    shutil.copytree(ROOT, root, ignore=lambda folder, names: [n for n in names if not (n.endswith(".py") or Path(folder, n).is_dir())])
    path = root / file
    path.write_text(path.read_text("utf-8") + f"\n{line}\n", "utf-8")
    assert len(find_violations(root)) == len(find_violations(ROOT)) + 1
