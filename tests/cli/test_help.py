"""Help is instant, and files are inspected and converted without a model."""

import json
import subprocess
import sys

import pytest
import safetensors.torch
import torch

from conftest import random_adapter, sd15_unet, sdxl_unet
from imprompt.cli import main
from imprompt.models import checkpoints

HEAVY = ("torch", "diffusers", "transformers", "numpy", "PIL", "safetensors", "huggingface_hub", "rich")


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["generate", "--help"], ["mini", "make", "--help"], ["mini"], []])
def test_help_imports_nothing_heavy(words):
    script = (
        "import sys, imprompt, imprompt.cli\n"
        f"try: imprompt.cli.main({words!r})\n"
        "except SystemExit as stop: assert stop.code in (0, None), stop.code\n"
        f"print('loaded:', *[name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == ""
    said, loaded = done.stdout.rsplit("loaded:", 1)
    assert loaded.split() == []
    assert said.startswith("imprompt" if "--version" in words else "usage: imprompt")


def test_a_wrong_choice_is_refused_before_torch_is_imported(tmp_path):
    script = (
        f"import sys, imprompt.cli\ncode = imprompt.cli.main(['generate', '--steps', '0', '--out', {str(tmp_path / 'out')!r}])\n"
        "assert 'torch' not in sys.modules\nsys.exit(code)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (2, "imprompt: steps: expected at least 1, received 0\n")


@pytest.fixture
def adapter(tmp_path):
    path = tmp_path / "adapter.safetensors"
    metadata = {"base": "a small one", "encoder": "CLIP of a test", "training": {"steps": 3}}
    checkpoints.save(random_adapter(sd15_unet(), "resampler"), path, metadata, torch.float16)
    return path


def test_inspect_tells_what_a_file_is(adapter, capsys):
    assert main(["inspect", str(adapter), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts == {
        "kind": "resampler",
        "tokens": 6,
        "layers": 16,
        "base": "a small one",
        "encoder": "CLIP of a test, penultimate grid (40)",
        "cross_width": 32,
        "parameters": random_adapter(sd15_unet(), "resampler").trainable(),
        "dtype": "float16",
        "training": {"steps": 3},
    }
    assert main(["inspect", str(adapter)]) == 0
    table = capsys.readouterr().out
    for word in ("kind", "resampler", "cross width", "a small one", "float16", f"{facts['parameters']:,}"):
        assert word in table


@pytest.mark.parametrize(("kind", "tokens"), [("global", 4), ("full-face", "one per patch")])
def test_inspect_tells_the_other_kinds(kind, tokens, tmp_path, capsys):
    checkpoints.save(random_adapter(sdxl_unet(), kind), tmp_path / "adapter.bin")
    assert main(["inspect", str(tmp_path / "adapter.bin"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["kind"], facts["tokens"], facts["layers"], facts["base"]) == (kind, tokens, 70, "unknown")


def test_what_the_metadata_claim_does_not_overrule_what_the_tensors_are(adapter, capsys):
    tensors, _ = checkpoints.read(adapter)
    claims = {"kind": "global", "parameters": "many", "layers": 3, "note": "[/red] not markup [bold]", "base": 7}
    safetensors.torch.save_file(tensors, adapter, {"imprompt": json.dumps(claims)})
    assert main(["inspect", str(adapter), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["kind"], facts["layers"], facts["parameters"]) == ("resampler", 16, sum(t.numel() for t in tensors.values()))
    assert main(["inspect", str(adapter)]) == 0
    assert "[/red] not markup [bold]" in capsys.readouterr().out


def test_inspect_prints_metadata_of_a_pickle_that_are_no_json(adapter, tmp_path, capsys):
    tensors, _ = checkpoints.read(adapter)
    torch.save(tensors | {"imprompt": {"note": torch.ones(2)}}, tmp_path / "odd.bin")
    assert main(["inspect", str(tmp_path / "odd.bin"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "resampler"


def test_convert_there_and_back(adapter, tmp_path, capsys):
    pickle, back = tmp_path / "new" / "adapter.bin", tmp_path / "back.safetensors"
    assert main(["convert", str(adapter), str(pickle)]) == 0
    assert capsys.readouterr().out.startswith(f"{pickle}: resampler adapter for a small one, ")
    assert main(["convert", str(pickle), str(back)]) == 0
    (tensors, about), (first, first_about) = checkpoints.read(back), checkpoints.read(adapter)  # safetensors orders its header at random
    assert about == first_about and list(tensors) == list(first)
    assert all(torch.equal(tensors[key], first[key]) and tensors[key].dtype == first[key].dtype for key in first)
    content = torch.load(pickle, weights_only=True)
    assert {"image_proj", "ip_adapter"} <= set(content) and "1.to_k_ip.weight" in content["ip_adapter"]
