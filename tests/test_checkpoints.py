"""Every public adapter file is read, recognised and written back unchanged; a bad one is refused in one sentence."""

import json
import pickle
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
import safetensors
import safetensors.torch
import torch

from conftest import random_adapter, sd15_pipeline, sd15_unet, sdxl_unet
from imprompt.errors import UserError
from imprompt.models import checkpoints
from imprompt.models.checkpoints import CheckpointError, load_adapter, read, recognise, save, write
from imprompt.models.hub import default_encoder

# ---------------------------------------------------------------------------------------- the public files, as shapes

Shapes = dict[str, tuple[int, ...]]

SD15 = {n: 320 if n in (1, 3, 25, 27, 29) else 640 if n in (5, 7, 19, 21, 23) else 1280 for n in range(1, 32, 2)}
SDXL = {n: 640 if n < 9 or 109 <= n < 121 else 1280 for n in range(1, 140, 2)}
WIDTHS = {"SD 1.5": (SD15, 768), "SDXL": (SDXL, 2048)}


def linear(name: str, inner: int, outer: int) -> Shapes:
    return {f"{name}.weight": (outer, inner), f"{name}.bias": (outer,)}


def norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def key_values(layers: dict[int, int], cross: int) -> Shapes:
    return {f"ip_adapter.{n}.to_{kv}_ip.weight": (hidden, cross) for n, hidden in layers.items() for kv in "kv"}


def global_(features: int, cross: int, tokens: int = 4) -> Shapes:
    return linear("image_proj.proj", features, tokens * cross) | norm("image_proj.norm", cross)


def perceiver(prefix: str, features: int, width: int, inner: int, out: int, depth: int = 4) -> Shapes:
    shapes = linear(f"{prefix}.proj_in", features, width) | linear(f"{prefix}.proj_out", width, out) | norm(f"{prefix}.norm_out", out)
    for i in range(depth):
        attention, mlp = f"{prefix}.layers.{i}.0", f"{prefix}.layers.{i}.1"
        shapes |= norm(f"{attention}.norm1", width) | norm(f"{attention}.norm2", width) | norm(f"{mlp}.0", width)
        shapes |= {f"{attention}.to_q.weight": (inner, width), f"{attention}.to_kv.weight": (2 * inner, width)}
        shapes |= {f"{attention}.to_out.weight": (width, inner)}
        shapes |= {f"{mlp}.1.weight": (4 * width, width), f"{mlp}.3.weight": (width, 4 * width)}
    return shapes


def resampler(features: int, width: int, inner: int, cross: int, tokens: int = 16) -> Shapes:
    return {"image_proj.latents": (1, tokens, width)} | perceiver("image_proj", features, width, inner, cross)


def full_face(features: int, cross: int) -> Shapes:
    shapes = linear("image_proj.proj.0", features, features) | linear("image_proj.proj.2", features, cross)
    return shapes | norm("image_proj.proj.3", cross)


def faceid(cross: int, tokens: int = 4, face: int = 512, middle: int = 1024) -> Shapes:
    shapes = linear("image_proj.proj.0", face, middle) | linear("image_proj.proj.2", middle, tokens * cross)
    return shapes | norm("image_proj.norm", cross)


def faceid_plus(features: int, cross: int, inner: int) -> Shapes:
    return faceid(cross) | perceiver("image_proj.perceiver_resampler", features, cross, inner, cross)


def lora(layers: dict[int, int], cross: int, rank: int = 128) -> Shapes:
    shapes = {}
    for n, hidden in {m: h for k, h in layers.items() for m in (k - 1, k)}.items():
        for part in ("q", "k", "v", "out"):
            inner = cross if n % 2 and part in "kv" else hidden
            shapes |= {f"ip_adapter.{n}.to_{part}_lora.down.weight": (rank, inner)}
            shapes |= {f"ip_adapter.{n}.to_{part}_lora.up.weight": (hidden, rank)}
    return shapes


class Row(NamedTuple):
    """One row of the table of public files."""

    base: str
    image_proj: Shapes
    kind: str
    tokens: int
    encoder: str
    millions: float | None  # as published
    lora: bool = False

    @property
    def shapes(self) -> Shapes:
        layers, cross = WIDTHS[self.base]
        return self.image_proj | key_values(layers, cross) | (lora(layers, cross) if self.lora else {})


H, G = "CLIP ViT-H/14", "CLIP ViT-bigG/14"
FACE = "face recognition"
ROWS = {
    "sd15": Row("SD 1.5", global_(1024, 768), "global", 4, f"{H}, pooled embedding (1024)", 22.32),
    "sd15_vit-G": Row("SD 1.5", global_(1280, 768), "global", 4, f"{G}, pooled embedding (1280)", 23.1),
    "sdxl": Row("SDXL", global_(1280, 2048), "global", 4, f"{G}, pooled embedding (1280)", 351.3),
    "sdxl_vit-h": Row("SDXL", global_(1024, 2048), "global", 4, f"{H}, pooled embedding (1024)", 349.2),
    "plus_sd15": Row("SD 1.5", resampler(1280, 768, 768, 768), "resampler", 16, f"{H}, penultimate grid (1280)", 49.1),
    "plus_sdxl_vit-h": Row("SDXL", resampler(1280, 1280, 1280, 2048), "resampler", 16, f"{H}, penultimate grid (1280)", 423.7),
    "full-face_sd15": Row("SD 1.5", full_face(1280, 768), "full-face", 0, f"{H}, penultimate grid (1280)", 21.8),
    "faceid_sd15": Row("SD 1.5", faceid(768), "faceid", 4, FACE, 48.4, lora=True),
    "faceid_sdxl": Row("SDXL", faceid(2048), "faceid", 4, FACE, 535.5, lora=True),
    "faceid-plus_sd15": Row("SD 1.5", faceid_plus(1280, 768, 768), "faceid-plus", 4, H, 78.3, lora=True),
    "faceid-plus_sdxl": Row("SDXL", faceid_plus(1280, 2048, 2048), "faceid-plus", 4, H, 743.7, lora=True),
    "faceid-portrait_sd15": Row("SD 1.5", faceid(768, tokens=16), "faceid", 16, FACE, None),
    "faceid-portrait_sdxl": Row("SDXL", faceid(2048, tokens=16), "faceid", 16, FACE, None),
    "faceid-portrait_sdxl_unnorm": Row("SDXL", resampler(512, 2048, 768, 2048), "faceid-resampler", 16, FACE, None),
}
OPEN = {name: row for name, row in ROWS.items() if not row.kind.startswith("faceid")}
FULL_SIZE = [name for name, row in OPEN.items() if row.base == "SD 1.5"]

SMALL_SDXL = {n: hidden // 20 for n, hidden in SDXL.items()}
REDUCED = {
    "sdxl": global_(80, 128) | key_values(SMALL_SDXL, 128),
    "sdxl_vit-h": global_(64, 128) | key_values(SMALL_SDXL, 128),
    "plus_sdxl_vit-h": resampler(80, 80, 64, 128) | key_values(SMALL_SDXL, 128),
}


def random(shapes: Shapes, dtype: torch.dtype = torch.float16) -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    return {key: torch.empty(shape, dtype=dtype).uniform_(-0.05, 0.05) for key, shape in shapes.items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return set(a) == set(b) and all(a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a)


def nested(tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """As the `.bin` releases are laid out."""
    groups: dict[str, dict[str, torch.Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for key, value in tensors.items():
        group, name = key.split(".", 1)
        groups[group][name] = value
    return groups


@pytest.fixture
def scratch():
    """A folder for large files, gone after the test (pytest would keep those of three runs)."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture
def small():
    """A small intact adapter in the public layout."""
    return {key: value.clone() for key, value in random_adapter(sd15_unet(), "global").state_dict().items()}


# -------------------------------------------------------------------------------------------------------- recognising


@pytest.mark.parametrize("name", ROWS)
def test_every_public_file_is_recognised_from_its_keys_and_shapes(name):
    row = ROWS[name]
    spec = recognise({key: torch.empty(shape, dtype=torch.float16, device="meta") for key, shape in row.shapes.items()})
    assert (spec.kind, spec.tokens, spec.base) == (row.kind, row.tokens, row.base)
    assert spec.encoder.startswith(row.encoder)
    assert (dict(spec.layers), spec.cross) == WIDTHS[row.base]
    assert len(spec.layers) == {"SD 1.5": 16, "SDXL": 70}[row.base]
    assert spec.dtype == "float16"
    if row.millions is not None:
        assert spec.parameters / 1e6 == pytest.approx(row.millions, abs=0.051)


@pytest.mark.parametrize("name", OPEN)
def test_the_encoder_is_found_from_the_shapes(name):
    row = ROWS[name]
    spec = recognise({key: torch.empty(shape, device="meta") for key, shape in row.shapes.items()})
    folder = "sdxl_models/image_encoder" if row.encoder.startswith(G) else "models/image_encoder"
    assert default_encoder(spec) == ("h94/IP-Adapter", folder)


# --------------------------------------------------------------------------------------------------- reading, writing


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("name", FULL_SIZE)
def test_files_of_full_size_come_back_unchanged(name, suffix, scratch):
    original = random(ROWS[name].shapes)
    source, copy = scratch / f"source{suffix}", scratch / f"copy{suffix}"
    if suffix == ".bin":
        torch.save(nested(original), source)
    else:
        safetensors.torch.save_file(original, source)
    first, metadata = read(source)
    assert same(first, original) and metadata == {}
    write(first, copy)
    assert same(read(copy)[0], original)
    assert copy.stat().st_size == pytest.approx(source.stat().st_size, rel=0.01)


@pytest.mark.parametrize("name", REDUCED)
def test_sdxl_files_come_back_unchanged(name, tmp_path):
    assert set(REDUCED[name]) == set(ROWS[name].shapes)
    original = random(REDUCED[name])
    for path in (tmp_path / "one.safetensors", tmp_path / "two.bin", tmp_path / "three.safetensors"):
        write(original, path)
        received, _ = read(path)
        assert same(received, original)
        adapter, spec = load_adapter(path)
        assert spec.kind == ROWS[name].kind and adapter.layers == SMALL_SDXL
        original = received


@pytest.mark.parametrize("name", FULL_SIZE)
def test_adapters_of_full_size_load(name, scratch):
    path = scratch / "adapter.safetensors"
    original = random(ROWS[name].shapes)
    safetensors.torch.save_file(original, path)
    adapter, spec = load_adapter(path)
    assert adapter.layers == SD15 and adapter.cross == 768
    assert spec.kind == ROWS[name].kind and adapter.trainable() == spec.parameters
    state = adapter.state_dict()
    assert all(value.dtype == torch.float32 and torch.equal(value, original[key].float()) for key, value in state.items())
    patches, tokens = (1, 4) if spec.kind == "global" else (257, spec.tokens or 257)
    with torch.no_grad():
        keys, values = adapter(torch.randn(1, 1, patches, spec.features))[1]
    assert keys.shape == values.shape == (1, tokens, 320)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_types_stay_as_they_are(dtype, suffix, small, tmp_path):
    original = {key: value.to(dtype) for key, value in small.items()}
    write(original, tmp_path / f"a{suffix}")
    checkpoints.convert(tmp_path / f"a{suffix}", tmp_path / "b.safetensors")
    checkpoints.convert(tmp_path / "b.safetensors", tmp_path / "c.bin")
    assert same(read(tmp_path / "c.bin")[0], original)
    assert recognise(original).dtype == str(dtype).removeprefix("torch.")


def test_layers_come_in_numeric_order(tmp_path):
    tensors = random(REDUCED["sdxl"])
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    received, _ = read(tmp_path / "a.safetensors")
    order = [int(key.split(".")[1]) for key in received if key.endswith("to_k_ip.weight")]
    assert order == list(range(1, 140, 2))
    adapter, _ = load_adapter(tmp_path / "a.safetensors")
    assert list(adapter.layers) == order


@pytest.mark.parametrize("name", FULL_SIZE)
def test_community_prefixes_read_the_same(name, tmp_path):
    original = {key: torch.tensor([float(i)]) for i, key in enumerate(ROWS[name].shapes)}
    renamed = {
        key.replace("image_proj.", "image_proj_model.", 1).replace("ip_adapter.", "adapter_modules.", 1): value
        for key, value in original.items()
    }
    assert not set(renamed) & set(original)
    safetensors.torch.save_file(renamed, tmp_path / "flat.safetensors")
    torch.save(renamed, tmp_path / "flat.bin")
    groups = {{"image_proj": "image_proj_model", "ip_adapter": "adapter_modules"}[k]: v for k, v in nested(original).items()}
    torch.save(groups, tmp_path / "nested.pt")
    torch.save({f"module.{key}": value for key, value in renamed.items()}, tmp_path / "parallel.bin")
    for path in tmp_path.iterdir():
        assert same(read(path)[0], original), path.name


def test_slices_and_twins_are_written_as_tensors_of_their_own(small, tmp_path):
    """A pickle may hold views of one large tensor: safetensors would refuse them, and a pickle would repeat all of it."""
    whole = torch.randn(1000, 32)
    twins = small | {"ip_adapter.1.to_k_ip.weight": whole[:16], "ip_adapter.1.to_v_ip.weight": whole[:16]}
    twins["ip_adapter.3.to_v_ip.weight"] = twins["ip_adapter.3.to_k_ip.weight"]
    torch.save(nested(twins), tmp_path / "views.bin")
    assert (tmp_path / "views.bin").stat().st_size > whole.nbytes
    for name in ("own.safetensors", "own.bin"):
        checkpoints.convert(tmp_path / "views.bin", tmp_path / name)
        assert same(read(tmp_path / name)[0], twins)
    assert (tmp_path / "own.bin").stat().st_size < sum(value.nbytes for value in small.values()) + 20_000


# ---------------------------------------------------------------------------------- training states of the original scripts


def trained(unet):
    """An adapter's tensors with public names, and the path of each layer's processor inside the UNet."""
    tensors = {key: value.clone() for key, value in random_adapter(unet, "resampler").state_dict().items()}
    paths = {n: path for n, path in enumerate(unet.attn_processors) if path.endswith("attn2.processor")}
    assert {int(key.split(".")[1]) for key in tensors if key.startswith("ip_adapter.")} == set(paths)
    return tensors, paths


@pytest.mark.parametrize("make", [sd15_unet, sdxl_unet])
def test_a_training_state_as_pickle_converts(make, tmp_path):
    unet = make()
    public, paths = trained(unet)
    state = {f"unet.{key}": value for key, value in unet.state_dict().items()}
    for key, value in public.items():
        if key.startswith("ip_adapter."):
            n, rest = key.removeprefix("ip_adapter.").split(".", 1)
            state[f"unet.{paths[int(n)]}.{rest}"] = state[f"adapter_modules.{n}.{rest}"] = value
        else:
            state[key.replace("image_proj.", "image_proj_model.", 1)] = value
    torch.save(state, tmp_path / "pytorch_model.bin")
    spec = checkpoints.convert(tmp_path / "pytorch_model.bin", tmp_path / "public.safetensors")
    assert spec.kind == "resampler" and len(spec.layers) == len(paths)
    assert same(read(tmp_path / "public.safetensors")[0], public)


@pytest.mark.parametrize("make", [sd15_unet, sdxl_unet])
def test_a_deduplicated_training_state_lands_on_the_public_indices(make, tmp_path):
    """Only `unet.<path>.processor.…` is left; each path must find the n of `unet.attn_processors`: down, up, mid."""
    unet = make()
    public, paths = trained(unet)
    assert "mid_block" in paths[max(paths)] and "up_blocks" in paths[max(paths) // 2]
    state = {f"unet.{key}": value.contiguous() for key, value in unet.state_dict().items()}
    for key, value in public.items():
        if key.startswith("ip_adapter."):
            n, rest = key.removeprefix("ip_adapter.").split(".", 1)
            state[f"unet.{paths[int(n)]}.{rest}"] = value
        else:
            state[key.replace("image_proj.", "image_proj_model.", 1)] = value
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    checkpoints.convert(tmp_path / "model.safetensors", tmp_path / "public.bin")
    received, _ = read(tmp_path / "public.bin")
    assert same(received, public)
    for n, path in paths.items():
        assert torch.equal(received[f"ip_adapter.{n}.to_k_ip.weight"], state[f"unet.{path}.to_k_ip.weight"])


def test_a_training_state_with_layers_in_unknown_places_is_refused(small, tmp_path):
    state = {key: value for key, value in small.items() if key.startswith("image_proj.")}
    state["unet.transformer_blocks.0.attn2.processor.to_k_ip.weight"] = torch.ones(4, 4)
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    assert "transformer_blocks.0" in refusal(tmp_path / "model.safetensors")


# ------------------------------------------------------------------------------------------------------------ metadata


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_metadata_comes_back_and_disturbs_nobody(suffix, tmp_path):
    pipe = sd15_pipeline()
    adapter = random_adapter(pipe.unet, "global")
    written = {"kind": "global", "base": "mini", "encoder": "CLIP of mini", "training": {"steps": 3, "digest": "ab" * 16}}
    path = tmp_path / f"adapter{suffix}"
    save(adapter, path, written)
    received, spec = load_adapter(path)
    assert spec.metadata == written
    assert spec.base == "mini" and spec.encoder == "CLIP of mini, pooled embedding (24)"
    assert same(received.state_dict(), adapter.state_dict())
    plain = tmp_path / f"plain{suffix}"
    save(adapter, plain)
    assert same(read(path)[0], read(plain)[0]) and read(plain)[1] == {}
    pipe.load_ip_adapter(str(tmp_path), subfolder="", weight_name=path.name, image_encoder_folder=None)  # diffusers' own reader


def test_metadata_survives_conversion_in_both_directions(tmp_path):
    written = {"base": "mini", "steps": 3}
    save(random_adapter(sd15_unet(), "global"), tmp_path / "a.safetensors", written)
    checkpoints.convert(tmp_path / "a.safetensors", tmp_path / "b.bin")
    checkpoints.convert(tmp_path / "b.bin", tmp_path / "c.safetensors")
    assert read(tmp_path / "c.safetensors")[1] == written


@pytest.mark.parametrize("header", ["no JSON", "[1, 2]", "null", ""])
def test_a_strange_header_is_no_obstacle(header, small, tmp_path):
    safetensors.torch.save_file(small, tmp_path / "a.safetensors", {"imprompt": header, "modelspec.author": "somebody"})
    tensors, metadata = read(tmp_path / "a.safetensors")
    assert same(tensors, small) and metadata == {}


def test_save_writes_the_type_that_is_asked_for(tmp_path):
    save(random_adapter(sd15_unet(), "full-face"), tmp_path / "a.safetensors", dtype=torch.float16)
    assert {value.dtype for value in read(tmp_path / "a.safetensors")[0].values()} == {torch.float16}
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


# -------------------------------------------------------------------------------------------------------------- FaceID


@pytest.mark.parametrize("shapes", [faceid(768), faceid(768, tokens=16), faceid_plus(40, 768, 64)], ids=["faceid", "portrait", "plus"])
def test_faceid_is_read_with_its_low_rank_parts(shapes, scratch):
    layers = {n: 2 for n in SD15}
    path = scratch / "ip-adapter-faceid.bin"
    original = random(shapes | key_values(layers, 768) | lora(layers, 768, rank=2))
    torch.save(nested(original), path)
    assert same(read(path)[0], original)
    adapter, spec = load_adapter(path)
    assert spec.kind.startswith("faceid") and set(adapter.layers) == set(SD15)
    assert set(adapter.low_rank) == {m for n in SD15 for m in (n - 1, n)} and set(adapter.low_rank[1]) == {"q", "k", "v", "out"}
    assert set(adapter.state_dict()) == set(original)
    checkpoints.convert(path, scratch / "converted.safetensors")
    assert same(read(scratch / "converted.safetensors")[0], original)


# ----------------------------------------------------------------------------------------------------------- bad files


def refusal(path: Path) -> str:
    """What is said about a file that is no usable adapter: one sentence that names the file or the tensor."""
    with pytest.raises(CheckpointError) as caught:
        load_adapter(path)
    text = str(caught.value)
    assert (path.name in text or "image_proj." in text or "ip_adapter." in text) and "\n" not in text
    return text


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("part", [0.0, 0.001, 0.3, 0.999])
def test_truncated_files_are_called_damaged(suffix, part, small, tmp_path):
    path = tmp_path / f"adapter{suffix}"
    write(small, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    assert "damaged" in refusal(path)


def test_truncated_old_pickles_are_called_damaged(small, tmp_path):
    path = tmp_path / "adapter.bin"
    torch.save(nested(small), path, _use_new_zipfile_serialization=False)
    assert same(read(path)[0], small)
    path.write_bytes(path.read_bytes()[:-100])
    assert "damaged" in refusal(path)


@pytest.mark.parametrize("suffix", checkpoints.FORMATS)
@pytest.mark.parametrize(
    "text", ["a text file, renamed", '{"json": 1}', "<!DOCTYPE html><html>404</html>", "version https://git-lfs.github.com"]
)
def test_renamed_texts_are_called_damaged(suffix, text, tmp_path):
    path = tmp_path / f"adapter{suffix}"
    path.write_text(text)
    assert "damaged or not a" in refusal(path)


class Bomb:
    """Opening this pickle would make a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("how", ["zip", "old", "plain", "protocol 2"])
def test_hostile_pickles_run_nothing(how, small, tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "adapter.bin"
    pickle.loads(pickle.dumps(Bomb(marker)))
    assert marker.exists()  # the bomb is live
    marker.unlink()
    content = nested(small) | {"extra": Bomb(marker)}
    if how in ("zip", "old"):
        torch.save(content, path, _use_new_zipfile_serialization=how == "zip")
    else:
        path.write_bytes(pickle.dumps({"image_proj": Bomb(marker)}, 4 if how == "plain" else 2))
    assert "could run code" in refusal(path)
    assert not marker.exists()


def test_a_pickle_that_contains_itself_is_refused(tmp_path):
    loop: dict[str, object] = {}
    loop["image_proj"] = loop
    torch.save(loop, tmp_path / "loop.bin")
    assert "damaged" in refusal(tmp_path / "loop.bin")


@pytest.mark.parametrize("content", [3, [torch.ones(2)], {"image_proj": 1}, {}, {3: torch.ones(2)}])
def test_pickles_of_something_else_are_no_adapter(content, tmp_path):
    torch.save(content, tmp_path / "other.bin")
    assert "not an IP-Adapter" in refusal(tmp_path / "other.bin")


def test_a_whole_model_is_sent_to_base(tmp_path):
    unet = {key: value.contiguous() for key, value in sd15_unet().state_dict().items()}
    safetensors.torch.save_file(unet, tmp_path / "unet.safetensors")
    torch.save(unet, tmp_path / "unet.bin")
    for path in tmp_path.iterdir():
        text = refusal(path)
        assert "not an IP-Adapter" in text and "--base" in text


def test_missing_files_folders_and_unknown_suffixes(small, tmp_path):
    with pytest.raises(CheckpointError, match="no adapter file at"):
        read(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="no adapter file at"):
        read(tmp_path)
    (tmp_path / "adapter.gguf").write_bytes(b"GGUF")
    assert "received .gguf" in refusal(tmp_path / "adapter.gguf")
    (tmp_path / "adapter").write_bytes(b"")
    assert "no suffix" in refusal(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"cannot write adapter\.onnx"):
        write(small, tmp_path / "adapter.onnx")
    assert not (tmp_path / "adapter.onnx").exists()


ALTERED = {
    "transposed": ("image_proj.proj.weight", lambda x: x.T.contiguous()),
    "cut": ("ip_adapter.3.to_v_ip.weight", lambda x: x[:-1].clone()),
    "other text width": ("ip_adapter.3.to_k_ip.weight", lambda x: x[:, 1:].clone()),
    "flat projection": ("image_proj.proj.weight", lambda x: x.flatten()),
    "flat keys": ("ip_adapter.1.to_k_ip.weight", lambda x: x.flatten()),
    "scalar": ("ip_adapter.31.to_k_ip.weight", lambda x: x.sum()),
    "empty": ("ip_adapter.1.to_k_ip.weight", lambda x: x[:, :0].clone()),
    "too few rows": ("image_proj.proj.weight", lambda x: x[:5].clone()),
}


@pytest.mark.parametrize("how", ALTERED)
def test_a_wrong_shape_is_named(how, small, tmp_path):
    key, change = ALTERED[how]
    path = tmp_path / "adapter.safetensors"
    safetensors.torch.save_file(small | {key: change(small[key])}, path)
    text = refusal(path)
    assert "should" in text and "received" in text


def test_altered_resamplers_are_refused(tmp_path):
    whole = {key: value.clone() for key, value in random_adapter(sd15_unet(), "resampler").state_dict().items()}
    path = tmp_path / "plus.bin"
    for key, value in {
        "image_proj.latents": whole["image_proj.latents"][0],
        "image_proj.layers.0.0.to_q.weight": whole["image_proj.layers.0.0.to_q.weight"][:10],
        "image_proj.proj_in.weight": torch.tensor(1.0),
        "image_proj.layers.0.0.to_kv.weight": torch.ones(3),
    }.items():
        torch.save(nested(whole | {key: value}), path)
        assert key in refusal(path)


@pytest.mark.parametrize("kind", ["global", "resampler", "full-face"])
def test_a_missing_or_foreign_tensor_is_named(kind, tmp_path):
    whole = {key: value.clone() for key, value in random_adapter(sd15_unet(), kind).state_dict().items()}
    path = tmp_path / "adapter.safetensors"
    for key in (next(key for key in whole if key.endswith(".bias")), "ip_adapter.5.to_v_ip.weight"):
        safetensors.torch.save_file({k: v for k, v in whole.items() if k != key}, path)
        assert key in (text := refusal(path)) and "received nothing" in text
    safetensors.torch.save_file(whole | {"ip_adapter.5.to_q_ip.weight": torch.ones(2)}, path)
    assert "ip_adapter.5.to_q_ip.weight should be nothing" in refusal(path)
    safetensors.torch.save_file({k: v for k, v in whole.items() if not k.startswith("image_proj.")}, path)
    assert "not an IP-Adapter" in refusal(path)
    safetensors.torch.save_file({k: v for k, v in whole.items() if k.startswith("image_proj.")}, path)
    assert "not an IP-Adapter" in refusal(path)


def test_an_unknown_projector_is_named(small, tmp_path):
    layers = {key: value for key, value in small.items() if key.startswith("ip_adapter.")}
    safetensors.torch.save_file(layers | {"image_proj.novel.weight": torch.ones(2, 2)}, tmp_path / "adapter.safetensors")
    with pytest.raises(CheckpointError, match=r"unknown kind of adapter: image_proj holds image_proj\.novel\.weight"):
        load_adapter(tmp_path / "adapter.safetensors")


def test_a_wrong_length_in_the_header_is_called_damaged(tmp_path):
    """A header that promises more bytes than the file has, or is itself absurdly long."""
    path = tmp_path / "adapter.safetensors"
    header = json.dumps({"image_proj.proj.weight": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    for length in (len(header), 1 << 60):
        path.write_bytes(length.to_bytes(8, "little") + header)
        assert "damaged" in refusal(path)


# ------------------------------------------------------------------------------------------------- interrupted writing


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), RuntimeError("writer")], ids=repr)
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_interrupted_writing_leaves_the_old_file_alone(suffix, error, small, tmp_path, monkeypatch):
    path = tmp_path / f"adapter{suffix}"
    write(small, path)
    before = path.read_bytes()

    def half(*arguments):
        target = next(a for a in arguments if isinstance(a, Path))
        target.write_bytes(before[: len(before) // 2])
        raise error

    monkeypatch.setattr(torch, "save", half)
    monkeypatch.setattr(safetensors.torch, "save_file", half)
    with pytest.raises(UserError if isinstance(error, OSError) else type(error)):
        write({key: value + 1 for key, value in small.items()}, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written_is_named(small, tmp_path):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder.safetensors").mkdir()
    for target in (tmp_path / "file" / "adapter.safetensors", tmp_path / "folder.safetensors"):
        with pytest.raises(UserError, match="cannot write"):
            write(small, target)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.safetensors"]


def test_converting_onto_itself_is_safe(small, tmp_path):
    path = tmp_path / "adapter.safetensors"
    write(small, path, {"base": "mini"})
    checkpoints.convert(path, path)
    assert same(read(path)[0], small) and read(path)[1] == {"base": "mini"}
