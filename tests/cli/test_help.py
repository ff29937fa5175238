"""Help imports nothing heavy, and files are inspected and converted without a model."""

import json
import subprocess
import sys

import pytest
import safetensors.torch
import torch

from conftest import random_adapter, random_face_adapter, sd15_unet, sdxl_unet
from imprompt.cli import main
from imprompt.models import checkpoints

HEAVY = ("torch", "diffusers", "transformers", "numpy", "PIL", "safetensors", "huggingface_hub", "matplotlib")


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["generate", "--help"], ["mini", "build", "--help"], ["mini"], []])
def test_help_imports_nothing_heavy(words):
    script = (
        "import sys, imprompt, imprompt.cli\n"
        f"try: imprompt.cli.main({words!r})\n"
        "except SystemExit as stop: assert stop.code in (0, None), stop.code\n"
        f"print('loaded:', *[name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == ""
    text, loaded = done.stdout.rsplit("loaded:", 1)
    assert loaded.split() == []
    assert text.startswith("0." if "--version" in words else "Usage: imprompt")


def test_an_invalid_option_is_refused_before_torch_is_imported(tmp_path):
    script = (
        f"import sys, imprompt.cli\ncode = imprompt.cli.main(['generate', '--steps', '0', '--output-dir', {str(tmp_path / 'out')!r}])\n"
        "assert 'torch' not in sys.modules\nsys.exit(code)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (2, "imprompt: num_inference_steps: expected at least 1, received 0\n")


@pytest.fixture
def adapter(tmp_path):
    path = tmp_path / "adapter.safetensors"
    metadata = {"base": "a small one", "encoder": "CLIP of a test", "training": {"steps": 3}}
    checkpoints.save(random_adapter(sd15_unet(), "plus"), path, metadata, torch.float16)
    return path


def test_inspect_describes_a_file(adapter, capsys):
    assert main(["inspect", str(adapter), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts == {
        "adapter_type": "plus",
        "tokens": 6,
        "layers": 16,
        "base": "a small one",
        "encoder": "CLIP of a test, penultimate patch features (40)",
        "cross_attention_dim": 32,
        "parameters": random_adapter(sd15_unet(), "plus").num_parameters(),
        "dtype": "float16",
        "training": {"steps": 3},
    }
    assert main(["inspect", str(adapter)]) == 0
    table = capsys.readouterr().out
    for word in ("adapter type", "plus", "cross attention dim", "a small one", "float16", f"{facts['parameters']:,}"):
        assert word in table


@pytest.mark.parametrize(("adapter_type", "tokens"), [("base", 4), ("full-face", "one per patch")])
def test_inspect_describes_the_other_kinds(adapter_type, tokens, tmp_path, capsys):
    checkpoints.save(random_adapter(sdxl_unet(), adapter_type), tmp_path / "adapter.bin")
    assert main(["inspect", str(tmp_path / "adapter.bin"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["adapter_type"], facts["tokens"], facts["layers"], facts["base"]) == (adapter_type, tokens, 70, "unknown")


def test_what_the_metadata_claim_does_not_overrule_what_the_tensors_are(adapter, capsys):
    tensors, _ = checkpoints.read_adapter_file(adapter)
    claims = {"adapter_type": "base", "parameters": "many", "layers": 3, "note": "[/red] not markup [bold]", "base": 7}
    safetensors.torch.save_file(tensors, adapter, {"imprompt": json.dumps(claims)})
    assert main(["inspect", str(adapter), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["adapter_type"], facts["layers"], facts["parameters"]) == ("plus", 16, sum(t.numel() for t in tensors.values()))
    assert main(["inspect", str(adapter)]) == 0
    assert "[/red] not markup [bold]" in capsys.readouterr().out


def test_inspect_prints_metadata_of_a_pickle_that_are_no_json(adapter, tmp_path, capsys):
    tensors, _ = checkpoints.read_adapter_file(adapter)
    torch.save(tensors | {"imprompt": {"note": torch.ones(2)}}, tmp_path / "odd.bin")
    assert main(["inspect", str(tmp_path / "odd.bin"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["adapter_type"] == "plus"


def test_convert_there_and_back(adapter, tmp_path, capsys):
    pickle, back = tmp_path / "new" / "adapter.bin", tmp_path / "back.safetensors"
    assert main(["convert", str(adapter), str(pickle)]) == 0
    assert capsys.readouterr().out.startswith(f"{pickle}: plus adapter for a small one, ")
    assert main(["convert", str(pickle), str(back)]) == 0
    (tensors, about), (first, first_about) = (
        checkpoints.read_adapter_file(back),
        checkpoints.read_adapter_file(adapter),
    )  # safetensors orders its header at random
    assert about == first_about and list(tensors) == list(first)
    assert all(torch.equal(tensors[key], first[key]) and tensors[key].dtype == first[key].dtype for key in first)
    content = torch.load(pickle, weights_only=True)
    assert {"image_proj", "ip_adapter"} <= set(content) and "1.to_k_ip.weight" in content["ip_adapter"]


def test_metadata_of_a_file_is_neither_markup_nor_obeyed_by_the_terminal(adapter, capsys):
    tensors, _ = checkpoints.read_adapter_file(adapter)
    metadata = {"[/x]": 1, "[link=http://evil]click": 2, "base": "\x1b]0;owned\x07\x9b2J\u202e", "a\nb": "c\nimprompt: done"}
    safetensors.torch.save_file(tensors, adapter, {"imprompt": json.dumps(metadata)})
    for command in (["inspect", str(adapter)], ["inspect", str(adapter), "--json"], ["convert", str(adapter), str(adapter)]):
        assert main(command) == 0
        printed = capsys.readouterr().out
        assert all(c.isprintable() or c == "\n" for c in printed) and "\nimprompt: done" not in printed
    assert main(["inspect", str(adapter)]) == 0
    table = capsys.readouterr().out
    assert "[/x]" in table and "[link=http://evil]click" in table and r"\x1b]0;owned" in table


def test_a_name_with_a_line_break_stays_in_one_sentence(capsys):
    assert main(["inspect", "no\nsuch\x1b[2Jfile.safetensors"]) == 2
    assert capsys.readouterr().err.removesuffix("\n").isprintable()


def test_inspect_knows_the_bundled_adapters(capsys):
    for name in ("mini", "mini-plus", "mini-subject"):
        assert main(["inspect", name, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["base"] == "mini"


def test_inspect_shows_the_version_of_faceid_plus_and_that_it_is_assumed(tmp_path, capsys):
    checkpoints.save(random_face_adapter(sd15_unet(), plus=True), tmp_path / "my-face.safetensors")
    assert main(["inspect", str(tmp_path / "my-face.safetensors")]) == 0
    printed = capsys.readouterr()
    assert "faceid version" in printed.out and "is taken for version 1" in printed.err
    converted = str(tmp_path / "converted.safetensors")
    assert main(["convert", str(tmp_path / "my-face.safetensors"), converted, "--faceid-version", "2"]) == 0
    assert main(["inspect", converted, "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out.splitlines()[-1])["faceid_version"] == 2 and not printed.err
