"""Every public adapter file is read, its type detected, and written back unchanged; a bad one is refused in one sentence."""

import json
import pickle
import tempfile
import zipfile
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from conftest import random_adapter, random_face_adapter, sd15_pipeline, sd15_unet, sdxl_unet
from imprompt.errors import Notice, UserError
from imprompt.models import checkpoints
from imprompt.models.checkpoints import CheckpointError, detect_spec, load_adapter, read_adapter_file, save, write_tensors
from imprompt.models.hub import default_image_encoder
from imprompt.models.tensor_files import ADAPTER_SUFFIXES
from released_adapters import (
    FULL_SIZE_ADAPTERS,
    LAYERS_AND_CROSS_DIM,
    NON_FACEID_ADAPTERS,
    REDUCED_SDXL_LAYERS,
    REDUCED_SDXL_SHAPES,
    RELEASED_ADAPTERS,
    SD15_LAYERS,
    VIT_G,
    Shapes,
    faceid_plus_projection,
    faceid_projection,
    key_value_shapes,
    linear_shapes,
    lora_shapes,
    norm_shapes,
    plus_projection,
)


def random_tensors(shapes: Shapes, dtype: torch.dtype = torch.float16) -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    return {key: torch.empty(shape, dtype=dtype).uniform_(-0.05, 0.05) for key, shape in shapes.items()}


def equal_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return set(a) == set(b) and all(a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a)


def to_nested(tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """The layout of the `.bin` releases."""
    groups: dict[str, dict[str, torch.Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for key, value in tensors.items():
        group, name = key.split(".", 1)
        groups[group][name] = value
    return groups


@pytest.fixture
def temporary_folder():
    """A folder for large files, deleted after the test (pytest would keep those of three runs)."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture
def small_adapter():
    """A small intact adapter in the public layout."""
    return {key: value.clone() for key, value in random_adapter(sd15_unet(), "base").state_dict().items()}


# ---------------------------------------------------------------------------------------------------- detecting the type


@pytest.mark.parametrize("name", RELEASED_ADAPTERS)
def test_the_type_of_every_public_file_is_detected_from_its_names_and_shapes(name):
    released = RELEASED_ADAPTERS[name]
    spec = detect_spec({key: torch.empty(shape, dtype=torch.float16, device="meta") for key, shape in released.shapes.items()})
    assert (spec.adapter_type, spec.num_tokens, spec.base_model) == (released.adapter_type, released.num_tokens, released.base_model)
    assert spec.image_encoder.startswith(released.image_encoder)
    assert (dict(spec.layers), spec.cross_attention_dim) == LAYERS_AND_CROSS_DIM[released.base_model]
    assert len(spec.layers) == {"SD 1.5": 16, "SDXL": 70}[released.base_model]
    assert spec.dtype == "float16"
    if released.millions is not None:
        assert spec.num_parameters / 1e6 == pytest.approx(released.millions, abs=0.051)


@pytest.mark.parametrize("name", NON_FACEID_ADAPTERS)
def test_the_image_encoder_is_determined_from_the_shapes(name):
    released = RELEASED_ADAPTERS[name]
    spec = detect_spec({key: torch.empty(shape, device="meta") for key, shape in released.shapes.items()})
    folder = "sdxl_models/image_encoder" if released.image_encoder.startswith(VIT_G) else "models/image_encoder"
    assert default_image_encoder(spec) == ("h94/IP-Adapter", folder)


# --------------------------------------------------------------------------------------------------- reading, writing


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("name", FULL_SIZE_ADAPTERS)
def test_files_of_full_size_come_back_unchanged(name, suffix, temporary_folder):
    original = random_tensors(RELEASED_ADAPTERS[name].shapes)
    source, copy = temporary_folder / f"source{suffix}", temporary_folder / f"copy{suffix}"
    if suffix == ".bin":
        torch.save(to_nested(original), source)
    else:
        safetensors.torch.save_file(original, source)
    first, metadata = read_adapter_file(source)
    assert equal_tensors(first, original) and metadata == {}
    write_tensors(first, copy)
    assert equal_tensors(read_adapter_file(copy)[0], original)
    assert copy.stat().st_size == pytest.approx(source.stat().st_size, rel=0.01)


@pytest.mark.parametrize("name", REDUCED_SDXL_SHAPES)
def test_sdxl_files_come_back_unchanged(name, tmp_path):
    assert set(REDUCED_SDXL_SHAPES[name]) == set(RELEASED_ADAPTERS[name].shapes)
    original = random_tensors(REDUCED_SDXL_SHAPES[name])
    for path in (tmp_path / "one.safetensors", tmp_path / "two.bin", tmp_path / "three.safetensors"):
        write_tensors(original, path)
        received, _ = read_adapter_file(path)
        assert equal_tensors(received, original)
        adapter, spec = load_adapter(path)
        assert spec.adapter_type == RELEASED_ADAPTERS[name].adapter_type and adapter.hidden_dims == REDUCED_SDXL_LAYERS
        original = received


@pytest.mark.parametrize("name", FULL_SIZE_ADAPTERS)
def test_adapters_of_full_size_load(name, temporary_folder):
    path = temporary_folder / "adapter.safetensors"
    original = random_tensors(RELEASED_ADAPTERS[name].shapes)
    safetensors.torch.save_file(original, path)
    adapter, spec = load_adapter(path)
    assert adapter.hidden_dims == SD15_LAYERS and adapter.cross_attention_dim == 768
    assert spec.adapter_type == RELEASED_ADAPTERS[name].adapter_type and adapter.num_parameters() == spec.num_parameters
    state = adapter.state_dict()
    assert all(value.dtype == torch.float32 and torch.equal(value, original[key].float()) for key, value in state.items())
    patches, tokens = (1, 4) if spec.adapter_type == "base" else (257, spec.num_tokens or 257)
    with torch.no_grad():
        keys, values = adapter(torch.randn(1, 1, patches, spec.image_embed_dim))[1]
    assert keys.shape == values.shape == (1, tokens, 320)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_data_types_are_kept(dtype, suffix, small_adapter, tmp_path):
    original = {key: value.to(dtype) for key, value in small_adapter.items()}
    write_tensors(original, tmp_path / f"a{suffix}")
    checkpoints.convert_adapter(tmp_path / f"a{suffix}", tmp_path / "b.safetensors")
    checkpoints.convert_adapter(tmp_path / "b.safetensors", tmp_path / "c.bin")
    assert equal_tensors(read_adapter_file(tmp_path / "c.bin")[0], original)
    assert detect_spec(original).dtype == str(dtype).removeprefix("torch.")


def test_layers_come_in_numeric_order(tmp_path):
    tensors = random_tensors(REDUCED_SDXL_SHAPES["sdxl"])
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    received, _ = read_adapter_file(tmp_path / "a.safetensors")
    order = [int(key.split(".")[1]) for key in received if key.endswith("to_k_ip.weight")]
    assert order == list(range(1, 140, 2))
    adapter, _ = load_adapter(tmp_path / "a.safetensors")
    assert list(adapter.hidden_dims) == order


@pytest.mark.parametrize("name", FULL_SIZE_ADAPTERS)
def test_community_prefixes_read_the_same(name, tmp_path):
    original = {key: torch.tensor([float(i)]) for i, key in enumerate(RELEASED_ADAPTERS[name].shapes)}
    renamed = {
        key.replace("image_proj.", "image_proj_model.", 1).replace("ip_adapter.", "adapter_modules.", 1): value
        for key, value in original.items()
    }
    assert not set(renamed) & set(original)
    safetensors.torch.save_file(renamed, tmp_path / "flat.safetensors")
    torch.save(renamed, tmp_path / "flat.bin")
    groups = {{"image_proj": "image_proj_model", "ip_adapter": "adapter_modules"}[k]: v for k, v in to_nested(original).items()}
    torch.save(groups, tmp_path / "nested.pt")
    torch.save({f"module.{key}": value for key, value in renamed.items()}, tmp_path / "parallel.bin")
    for path in tmp_path.iterdir():
        assert equal_tensors(read_adapter_file(path)[0], original), path.name


def test_tensors_that_share_memory_are_written_as_copies(small_adapter, tmp_path):
    """A pickle may contain views of one large tensor: safetensors would refuse them, and a pickle would store all of it again."""
    whole = torch.randn(1000, 32)
    shared = small_adapter | {"ip_adapter.1.to_k_ip.weight": whole[:16], "ip_adapter.1.to_v_ip.weight": whole[:16]}
    shared["ip_adapter.3.to_v_ip.weight"] = shared["ip_adapter.3.to_k_ip.weight"]
    torch.save(to_nested(shared), tmp_path / "views.bin")
    assert (tmp_path / "views.bin").stat().st_size > whole.nbytes
    for name in ("copies.safetensors", "copies.bin"):
        checkpoints.convert_adapter(tmp_path / "views.bin", tmp_path / name)
        assert equal_tensors(read_adapter_file(tmp_path / name)[0], shared)
    assert (tmp_path / "copies.bin").stat().st_size < sum(value.nbytes for value in small_adapter.values()) + 20_000


# ---------------------------------------------------------------------------------- training states of the original scripts


def adapter_and_processor_paths(unet):
    """An adapter's tensors with public names, and the path of each layer's attention processor in the UNet."""
    tensors = {key: value.clone() for key, value in random_adapter(unet, "plus").state_dict().items()}
    paths = {n: path for n, path in enumerate(unet.attn_processors) if path.endswith("attn2.processor")}
    assert {int(key.split(".")[1]) for key in tensors if key.startswith("ip_adapter.")} == set(paths)
    return tensors, paths


@pytest.mark.parametrize("make", [sd15_unet, sdxl_unet])
def test_a_training_state_as_pickle_converts(make, tmp_path):
    unet = make()
    public, paths = adapter_and_processor_paths(unet)
    state = {f"unet.{key}": value for key, value in unet.state_dict().items()}
    for key, value in public.items():
        if key.startswith("ip_adapter."):
            n, rest = key.removeprefix("ip_adapter.").split(".", 1)
            state[f"unet.{paths[int(n)]}.{rest}"] = state[f"adapter_modules.{n}.{rest}"] = value
        else:
            state[key.replace("image_proj.", "image_proj_model.", 1)] = value
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.warns(Notice, match=r"left out, .* unet \(\d+ tensors\)"):
        spec = checkpoints.convert_adapter(tmp_path / "pytorch_model.bin", tmp_path / "public.safetensors")
    assert spec.adapter_type == "plus" and len(spec.layers) == len(paths)
    assert equal_tensors(read_adapter_file(tmp_path / "public.safetensors")[0], public)


@pytest.mark.parametrize("make", [sd15_unet, sdxl_unet])
def test_a_deduplicated_training_state_gets_the_public_layer_indices(make, tmp_path):
    """Only `unet.<path>.processor.…` is left; each path must get its index n in `unet.attn_processors`: down, up, mid."""
    unet = make()
    public, paths = adapter_and_processor_paths(unet)
    assert "mid_block" in paths[max(paths)] and "up_blocks" in paths[max(paths) // 2]
    state = {f"unet.{key}": value.contiguous() for key, value in unet.state_dict().items()}
    for key, value in public.items():
        if key.startswith("ip_adapter."):
            n, rest = key.removeprefix("ip_adapter.").split(".", 1)
            state[f"unet.{paths[int(n)]}.{rest}"] = value
        else:
            state[key.replace("image_proj.", "image_proj_model.", 1)] = value
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    with pytest.warns(Notice, match=r"left out, .* unet \(\d+ tensors\)"):
        checkpoints.convert_adapter(tmp_path / "model.safetensors", tmp_path / "public.bin")
    received, _ = read_adapter_file(tmp_path / "public.bin")
    assert equal_tensors(received, public)
    for n, path in paths.items():
        assert torch.equal(received[f"ip_adapter.{n}.to_k_ip.weight"], state[f"unet.{path}.to_k_ip.weight"])


def test_a_training_state_with_unknown_layer_paths_is_refused(small_adapter, tmp_path):
    state = {key: value for key, value in small_adapter.items() if key.startswith("image_proj.")}
    state["unet.transformer_blocks.0.attn2.processor.to_k_ip.weight"] = torch.ones(4, 4)
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    assert "transformer_blocks.0" in load_error(tmp_path / "model.safetensors")


# ------------------------------------------------------------------------------------------------------------ metadata


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_metadata_is_read_back_and_other_readers_ignore_it(suffix, tmp_path):
    pipe = sd15_pipeline()
    adapter = random_adapter(pipe.unet, "base")
    written = {"kind": "base", "base": "mini", "encoder": "CLIP of mini", "training": {"steps": 3, "digest": "ab" * 16}}
    path = tmp_path / f"adapter{suffix}"
    save(adapter, path, written)
    received, spec = load_adapter(path)
    assert spec.metadata == written
    assert spec.base_model == "mini" and spec.image_encoder == "CLIP of mini, pooled embedding (24)"
    assert equal_tensors(received.state_dict(), adapter.state_dict())
    plain = tmp_path / f"plain{suffix}"
    save(adapter, plain)
    assert equal_tensors(read_adapter_file(path)[0], read_adapter_file(plain)[0]) and read_adapter_file(plain)[1] == {}
    pipe.load_ip_adapter(str(tmp_path), subfolder="", weight_name=path.name, image_encoder_folder=None)  # diffusers' reader


def test_metadata_survives_conversion_in_both_directions(tmp_path):
    written = {"base": "mini", "steps": 3}
    save(random_adapter(sd15_unet(), "base"), tmp_path / "a.safetensors", written)
    checkpoints.convert_adapter(tmp_path / "a.safetensors", tmp_path / "b.bin")
    checkpoints.convert_adapter(tmp_path / "b.bin", tmp_path / "c.safetensors")
    assert read_adapter_file(tmp_path / "c.safetensors")[1] == written


@pytest.mark.parametrize("header", ["no JSON", "[1, 2]", "null", ""])
def test_a_header_of_another_program_is_ignored(header, small_adapter, tmp_path):
    safetensors.torch.save_file(small_adapter, tmp_path / "a.safetensors", {"imprompt": header, "modelspec.author": "somebody"})
    tensors, metadata = read_adapter_file(tmp_path / "a.safetensors")
    assert equal_tensors(tensors, small_adapter) and metadata == {}


def test_save_converts_to_the_given_dtype(tmp_path):
    save(random_adapter(sd15_unet(), "full-face"), tmp_path / "a.safetensors", dtype=torch.float16)
    assert {value.dtype for value in read_adapter_file(tmp_path / "a.safetensors")[0].values()} == {torch.float16}
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


# -------------------------------------------------------------------------------------------------------------- FaceID


@pytest.mark.parametrize(
    "shapes",
    [faceid_projection(768), faceid_projection(768, num_tokens=16), faceid_plus_projection(40, 768, 64)],
    ids=["faceid", "portrait", "plus"],
)
def test_faceid_is_read_with_its_lora_weights(shapes, temporary_folder):
    layers = {n: 2 for n in SD15_LAYERS}
    path = temporary_folder / "ip-adapter-faceid-plus.bin"
    original = random_tensors(shapes | key_value_shapes(layers, 768) | lora_shapes(layers, 768, rank=2))
    torch.save(to_nested(original), path)
    assert equal_tensors(read_adapter_file(path)[0], original)
    adapter, spec = load_adapter(path)
    assert spec.adapter_type.startswith("faceid") and set(adapter.hidden_dims) == set(SD15_LAYERS)
    assert set(adapter.lora_layers) == {m for n in SD15_LAYERS for m in (n - 1, n)} and set(adapter.lora_layers[1]) == {
        "q",
        "k",
        "v",
        "out",
    }
    assert set(adapter.state_dict()) == set(original)
    checkpoints.convert_adapter(path, temporary_folder / "converted.safetensors")
    assert equal_tensors(read_adapter_file(temporary_folder / "converted.safetensors")[0], original)


# ----------------------------------------------------------------------------------------------------------- bad files


def load_error(path: Path) -> str:
    """The error for a file that is no usable adapter: one sentence that names the file or the tensor."""
    with pytest.raises(CheckpointError) as error:
        load_adapter(path)
    text = str(error.value)
    assert (path.name in text or "image_proj." in text or "ip_adapter." in text) and "\n" not in text
    return text


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.3, 0.999])
def test_truncated_files_are_reported_as_damaged(suffix, fraction, small_adapter, tmp_path):
    path = tmp_path / f"adapter{suffix}"
    write_tensors(small_adapter, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * fraction)])
    assert "damaged" in load_error(path)


def test_truncated_old_pickles_are_reported_as_damaged(small_adapter, tmp_path):
    path = tmp_path / "adapter.bin"
    torch.save(to_nested(small_adapter), path, _use_new_zipfile_serialization=False)
    assert equal_tensors(read_adapter_file(path)[0], small_adapter)
    path.write_bytes(path.read_bytes()[:-100])
    assert "damaged" in load_error(path)


@pytest.mark.parametrize("suffix", ADAPTER_SUFFIXES)
@pytest.mark.parametrize(
    "text", ["a text file, renamed", '{"json": 1}', "<!DOCTYPE html><html>404</html>", "version https://git-lfs.github.com"]
)
def test_renamed_texts_are_reported_as_damaged(suffix, text, tmp_path):
    path = tmp_path / f"adapter{suffix}"
    path.write_text(text)
    assert "damaged or not a" in load_error(path)


class FileCreatingPickle:
    """Unpickling an instance creates a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("pickle_format", ["zip", "old", "plain", "protocol 2"])
def test_hostile_pickles_run_no_code(pickle_format, small_adapter, tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "adapter.bin"
    pickle.loads(pickle.dumps(FileCreatingPickle(marker)))
    assert marker.exists()  # unpickling runs code
    marker.unlink()
    content = to_nested(small_adapter) | {"extra": FileCreatingPickle(marker)}
    if pickle_format in ("zip", "old"):
        torch.save(content, path, _use_new_zipfile_serialization=pickle_format == "zip")
    else:
        path.write_bytes(pickle.dumps({"image_proj": FileCreatingPickle(marker)}, 4 if pickle_format == "plain" else 2))
    assert "could run code" in load_error(path)
    assert not marker.exists()


def test_a_pickle_that_contains_itself_is_refused(tmp_path):
    loop: dict[str, object] = {}
    loop["image_proj"] = loop
    torch.save(loop, tmp_path / "loop.bin")
    assert "damaged" in load_error(tmp_path / "loop.bin")


@pytest.mark.parametrize("content", [3, [torch.ones(2)], {"image_proj": 1}, {}, {3: torch.ones(2)}])
def test_other_pickles_are_refused(content, tmp_path):
    torch.save(content, tmp_path / "other.bin")
    assert "not an IP-Adapter" in load_error(tmp_path / "other.bin")


def test_a_whole_model_is_refused_with_a_hint_at_the_model_option(tmp_path):
    unet = {key: value.contiguous() for key, value in sd15_unet().state_dict().items()}
    safetensors.torch.save_file(unet, tmp_path / "unet.safetensors")
    torch.save(unet, tmp_path / "unet.bin")
    for path in tmp_path.iterdir():
        text = load_error(path)
        assert "not an IP-Adapter" in text and "--model" in text


def test_missing_files_folders_and_unknown_suffixes(small_adapter, tmp_path):
    with pytest.raises(CheckpointError, match="no adapter file at"):
        read_adapter_file(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="no adapter file at"):
        read_adapter_file(tmp_path)
    (tmp_path / "adapter.gguf").write_bytes(b"GGUF")
    assert "a GGUF file" in load_error(tmp_path / "adapter.gguf")
    (tmp_path / "adapter").write_bytes(b"")
    assert "damaged" in load_error(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"cannot write adapter\.onnx"):
        write_tensors(small_adapter, tmp_path / "adapter.onnx")
    assert not (tmp_path / "adapter.onnx").exists()


ALTERED = {
    "transposed": ("image_proj.proj.weight", lambda x: x.T.contiguous()),
    "cut": ("ip_adapter.3.to_v_ip.weight", lambda x: x[:-1].clone()),
    "other cross-attention dimension": ("ip_adapter.3.to_k_ip.weight", lambda x: x[:, 1:].clone()),
    "flat projection": ("image_proj.proj.weight", lambda x: x.flatten()),
    "flat keys": ("ip_adapter.1.to_k_ip.weight", lambda x: x.flatten()),
    "scalar": ("ip_adapter.31.to_k_ip.weight", lambda x: x.sum()),
    "empty": ("ip_adapter.1.to_k_ip.weight", lambda x: x[:, :0].clone()),
    "too few rows": ("image_proj.proj.weight", lambda x: x[:5].clone()),
}


@pytest.mark.parametrize("change", ALTERED)
def test_a_wrong_shape_is_named(change, small_adapter, tmp_path):
    key, alter = ALTERED[change]
    path = tmp_path / "adapter.safetensors"
    safetensors.torch.save_file(small_adapter | {key: alter(small_adapter[key])}, path)
    text = load_error(path)
    assert "should" in text and "received" in text


def test_altered_resamplers_are_refused(tmp_path):
    whole = {key: value.clone() for key, value in random_adapter(sd15_unet(), "plus").state_dict().items()}
    path = tmp_path / "plus.bin"
    for key, value in {
        "image_proj.latents": whole["image_proj.latents"][0],
        "image_proj.layers.0.0.to_q.weight": whole["image_proj.layers.0.0.to_q.weight"][:10],
        "image_proj.proj_in.weight": torch.tensor(1.0),
        "image_proj.layers.0.0.to_kv.weight": torch.ones(3),
    }.items():
        torch.save(to_nested(whole | {key: value}), path)
        assert key in load_error(path)


@pytest.mark.parametrize("adapter_type", ["base", "plus", "full-face"])
def test_a_missing_or_unexpected_tensor_is_named(adapter_type, tmp_path):
    whole = {key: value.clone() for key, value in random_adapter(sd15_unet(), adapter_type).state_dict().items()}
    path = tmp_path / "adapter.safetensors"
    for key in (next(key for key in whole if key.endswith(".bias")), "ip_adapter.5.to_v_ip.weight"):
        safetensors.torch.save_file({k: v for k, v in whole.items() if k != key}, path)
        assert key in (text := load_error(path)) and "received nothing" in text
    safetensors.torch.save_file(whole | {"ip_adapter.5.to_q_ip.weight": torch.ones(2)}, path)
    assert "ip_adapter.5.to_q_ip.weight should be nothing" in load_error(path)
    safetensors.torch.save_file({k: v for k, v in whole.items() if not k.startswith("image_proj.")}, path)
    assert "not an IP-Adapter" in load_error(path)
    safetensors.torch.save_file({k: v for k, v in whole.items() if k.startswith("image_proj.")}, path)
    assert "not an IP-Adapter" in load_error(path)


def test_an_unknown_projector_is_named(small_adapter, tmp_path):
    layers = {key: value for key, value in small_adapter.items() if key.startswith("ip_adapter.")}
    safetensors.torch.save_file(layers | {"image_proj.novel.weight": torch.ones(2, 2)}, tmp_path / "adapter.safetensors")
    with pytest.raises(CheckpointError, match=r"unknown type of adapter: image_proj contains image_proj\.novel\.weight"):
        load_adapter(tmp_path / "adapter.safetensors")


def test_a_wrong_length_in_the_header_is_reported_as_damaged(tmp_path):
    """A header that declares more bytes than the file has, or is absurdly long itself."""
    path = tmp_path / "adapter.safetensors"
    header = json.dumps({"image_proj.proj.weight": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    for length in (len(header), 1 << 60):
        path.write_bytes(length.to_bytes(8, "little") + header)
        assert "damaged" in load_error(path)


# ------------------------------------------------------------------------------------------------- interrupted writing


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), RuntimeError("writer")], ids=repr)
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_interrupted_writing_leaves_the_old_file_alone(suffix, error, small_adapter, tmp_path, monkeypatch):
    path = tmp_path / f"adapter{suffix}"
    write_tensors(small_adapter, path)
    before = path.read_bytes()

    def write_half(*arguments):
        target = next(a for a in arguments if isinstance(a, Path))
        target.write_bytes(before[: len(before) // 2])
        raise error

    monkeypatch.setattr(torch, "save", write_half)
    monkeypatch.setattr(safetensors.torch, "save_file", write_half)
    with pytest.raises(UserError if isinstance(error, OSError) else type(error)):
        write_tensors({key: value + 1 for key, value in small_adapter.items()}, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_path_that_cannot_be_written_is_named(small_adapter, tmp_path):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder.safetensors").mkdir()
    for target in (tmp_path / "file" / "adapter.safetensors", tmp_path / "folder.safetensors"):
        with pytest.raises(UserError, match="cannot write"):
            write_tensors(small_adapter, target)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.safetensors"]


def test_converting_onto_itself_is_safe(small_adapter, tmp_path):
    path = tmp_path / "adapter.safetensors"
    write_tensors(small_adapter, path, {"base": "mini"})
    checkpoints.convert_adapter(path, path)
    assert equal_tensors(read_adapter_file(path)[0], small_adapter) and read_adapter_file(path)[1] == {"base": "mini"}


# ------------------------------------------------------------------------------------------ files of other programs


def faceid_training_state(unet):
    """A FaceID adapter, and the tensors that safetensors keeps of its training state: those that lie in the UNet, each once."""
    adapter = random_face_adapter(unet)
    public = {key: value.clone() for key, value in adapter.state_dict().items()}
    paths = list(unet.attn_processors)
    state = {f"unet.{key}": value.contiguous() for key, value in unet.state_dict().items()}
    for key, value in public.items():
        group, rest = key.split(".", 1)
        n, name = rest.split(".", 1)
        state[f"unet.{paths[int(n)]}.{name}" if group == "ip_adapter" else f"image_proj_model.{rest}"] = value
    return public, state


@pytest.mark.parametrize("make", [sd15_unet, sdxl_unet])
def test_a_faceid_training_state_keeps_its_lora(make, tmp_path):
    public, state = faceid_training_state(make())
    assert sum("_lora." in key for key in public) > 4 * len(public) / 6
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    with pytest.warns(Notice, match="unet"):
        checkpoints.convert_adapter(tmp_path / "model.safetensors", tmp_path / "public.safetensors")
    assert equal_tensors(read_adapter_file(tmp_path / "public.safetensors")[0], public)


def test_a_training_state_of_which_only_some_copies_were_dropped_is_whole(tmp_path):
    public, state = faceid_training_state(sd15_unet())
    moved = [key for key in public if key.startswith("ip_adapter.1.")]
    for key in moved:
        state[key.replace("ip_adapter", "adapter_modules")] = public[key].clone()
    safetensors.torch.save_file({f"module.{key}": value for key, value in state.items()}, tmp_path / "model.safetensors")
    with pytest.warns(Notice, match="unet|module"):
        assert equal_tensors(read_adapter_file(tmp_path / "model.safetensors")[0], public)


WRAPPINGS = {
    "model.": lambda t: {f"model.{key}": value for key, value in t.items()},
    "_orig_mod.": lambda t: {f"_orig_mod.{key}": value for key, value in t.items()},
    "module._orig_mod.": lambda t: {f"module._orig_mod.{key}": value for key, value in t.items()},
    "compiled parts": lambda t: {key.replace(".", "._orig_mod.", 1): value for key, value in t.items()},
    "parallel parts": lambda t: {
        key.replace("image_proj.", "image_proj_model.module.").replace("ip_adapter.", "adapter_modules.module."): value
        for key, value in t.items()
    },
    "ip_adapter.image_proj_model": lambda t: {
        f"ip_adapter.{key.replace('image_proj.', 'image_proj_model.').replace('ip_adapter.', 'adapter_modules.')}": value
        for key, value in t.items()
    },
    "state_dict": lambda t: {"state_dict": t, "epoch": 3},
    "model_state_dict": lambda t: {"model_state_dict": to_nested(t)},
    "module of DeepSpeed": lambda t: {"module": t, "global_steps": 7},
    "only an ema": lambda t: {"ema": t},
    "a container of another name": lambda t: {"net": {"generator": t}},
    "nested twice": lambda t: {"state_dict": {"model": to_nested(t)}},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_prefixes_and_containers_around_the_tensors_are_understood(wrapping, small_adapter, tmp_path):
    torch.save(WRAPPINGS[wrapping](small_adapter), tmp_path / "wrapped.bin")
    assert equal_tensors(read_adapter_file(tmp_path / "wrapped.bin")[0], small_adapter)


def test_of_weights_and_their_average_the_weights_are_read_and_the_rest_is_reported(small_adapter, tmp_path):
    average = {key: value + 1 for key, value in small_adapter.items()}
    for name, content in (
        ("a.bin", {"ema": average, "state_dict": small_adapter}),
        ("b.bin", {"model": small_adapter, "ema": average}),
        ("c.bin", {"optimizer": {"momentum": average}, "ema": average, "model": small_adapter}),
    ):
        torch.save(content, tmp_path / name)
        with pytest.warns(Notice, match=rf"left out, .* ema \({len(average)} tensors\)"):
            assert equal_tensors(read_adapter_file(tmp_path / name)[0], small_adapter)


def test_tensors_of_other_models_in_the_file_are_reported(small_adapter, tmp_path):
    extra = {"image_encoder.layer.weight": torch.ones(2), "image_encoder.layer.bias": torch.ones(2), "preprocessor.mean": torch.ones(1)}
    safetensors.torch.save_file(small_adapter | extra, tmp_path / "x.safetensors")
    with pytest.warns(Notice, match=r"x.safetensors: left out, .*image_encoder \(2 tensors\), preprocessor \(1 tensor\)") as notices:
        assert equal_tensors(read_adapter_file(tmp_path / "x.safetensors")[0], small_adapter)
    assert len(notices) == 1


def test_the_content_of_a_file_counts_and_not_its_suffix(small_adapter, tmp_path):
    write_tensors(small_adapter, tmp_path / "a.safetensors")
    torch.save(to_nested(small_adapter), tmp_path / "b.bin")
    torch.save(to_nested(small_adapter), tmp_path / "c.bin", _use_new_zipfile_serialization=False)
    for source, target, name in (
        ("a.safetensors", "a.bin", "safetensors file"),
        ("b.bin", "b.safetensors", "PyTorch pickle"),
        ("c.bin", "c.safetensors", "PyTorch pickle"),
    ):
        (tmp_path / source).rename(tmp_path / target)
        with pytest.warns(Notice, match=f"{target} is read as a {name}"):
            assert equal_tensors(read_adapter_file(tmp_path / target)[0], small_adapter)
    (tmp_path / "a.bin").rename(tmp_path / "blob")  # as in the cache of the hub
    assert equal_tensors(read_adapter_file(tmp_path / "blob")[0], small_adapter)


def test_a_zip_archive_and_pointers_are_called_what_they_are(small_adapter, tmp_path):
    write_tensors(small_adapter, tmp_path / "adapter.safetensors")
    for suffix in (".zip", ".safetensors"):
        with zipfile.ZipFile(tmp_path / f"packed{suffix}", "w") as archive:
            archive.write(tmp_path / "adapter.safetensors", "adapter.safetensors")
        assert "zip archive" in load_error(tmp_path / f"packed{suffix}")
    (tmp_path / "x.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    assert "pointer of Git LFS" in load_error(tmp_path / "x.safetensors")
    (tmp_path / "y.bin").write_text("\n<!DOCTYPE html>")
    assert "a web page" in load_error(tmp_path / "y.bin")


def test_headers_of_any_length_are_no_pickles(small_adapter, tmp_path):
    """The length of the header, which a safetensors file begins with, may look like the beginning of a pickle or of a zip archive."""
    for length in (0x80 + 256 * 40, 0x4B50):
        bare = int.from_bytes(safetensors.torch.save(small_adapter, {"x": ""})[:8], "little")
        data = safetensors.torch.save(small_adapter, {"x": "x" * (length - bare)})
        (tmp_path / "a.safetensors").write_bytes(data)
        assert data.startswith((b"PK", b"\x80"))
        assert equal_tensors(read_adapter_file(tmp_path / "a.safetensors")[0], small_adapter)


def test_a_file_that_may_not_be_read_is_not_called_damaged(small_adapter, tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    write_tensors(small_adapter, tmp_path / "a.safetensors")
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CheckpointError, match=r"a\.safetensors cannot be opened \(Permission denied\)"):
        load_adapter(tmp_path / "a.safetensors")


# ------------------------------------------------------------------------------------------- weights that are no numbers


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_that_are_not_finite_are_refused_with_the_name_of_the_tensor(value, dtype, small_adapter, tmp_path):
    key = "ip_adapter.7.to_k_ip.weight"
    tensors = {name: tensor.to(dtype) for name, tensor in small_adapter.items()}
    tensors[key][3, 2] = value
    write_tensors(tensors, tmp_path / "a.safetensors")
    assert f"{key} contains NaN or infinity" in load_error(tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        checkpoints.convert_adapter(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert not (tmp_path / "b.safetensors").exists()


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.bool, torch.complex64])
def test_weights_of_types_that_are_no_weights_are_refused(dtype, small_adapter, tmp_path):
    torch.save({key: (value * 127).to(dtype) for key, value in small_adapter.items()}, tmp_path / "a.bin")
    assert f"is {str(dtype).removeprefix('torch.')}" in load_error(tmp_path / "a.bin")


def test_float8_is_read_as_it_is_unless_its_scale_is_missing(small_adapter, tmp_path):
    rounded = {key: value.to(torch.float8_e4m3fn) for key, value in small_adapter.items()}
    write_tensors(rounded, tmp_path / "a.safetensors")
    adapter, spec = load_adapter(tmp_path / "a.safetensors")
    assert spec.dtype == "float8_e4m3fn" and torch.equal(adapter.image_proj.proj.weight, rounded["image_proj.proj.weight"].float())
    scaled = {key: (value / value.abs().max().clamp(min=1e-9) * 448).to(torch.float8_e4m3fn) for key, value in small_adapter.items()}
    write_tensors(scaled, tmp_path / "b.safetensors")
    assert "its scale is unknown" in load_error(tmp_path / "b.safetensors")


@pytest.mark.parametrize("make", [lambda x: x.to_sparse(), lambda x: torch.ones(1).expand(x.shape), lambda x: x.to("meta")])
def test_tensors_that_are_not_dense_are_refused(make, small_adapter, tmp_path):
    torch.save(small_adapter | {"ip_adapter.1.to_k_ip.weight": make(small_adapter["ip_adapter.1.to_k_ip.weight"])}, tmp_path / "a.bin")
    text = load_error(tmp_path / "a.bin")
    assert "dense" in text or "could run code" in text


# ------------------------------------------------------------------------------------------------------- hostile files


def write_header(path: Path, tensors: dict[str, tuple[str, list[int], int]]) -> None:
    """A safetensors file with these names, types, shapes and sizes in bytes, all of them zeros."""
    header, offset = {}, 0
    for key, (dtype, shape, size) in tensors.items():
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset := offset + size]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(offset))


@pytest.mark.parametrize(
    "tensors",
    [
        {"image_proj.proj.weight": ("F16", [1, 1], 2), f"ip_adapter.{'1' * 4301}.to_k_ip.weight": ("F16", [1, 1], 2)},
        {"image_proj.proj.weight": ("F16", [0, 2**63], 0), "ip_adapter.1.to_k_ip.weight": ("F16", [1, 1], 2)},
        {"image_proj.proj.weight": ("F16", [0, 2**62], 0), "ip_adapter.1.to_k_ip.weight": ("F16", [1, 1], 2)},
        {"image_proj.perceiver_resampler.proj_in.weight": ("F16", [4, 4], 32), "ip_adapter.1.to_k_ip.weight": ("F16", [4, 8], 64)},
        {"image_proj.perceiver_resampler.proj_in.weight": ("F16", [4, 4], 32), "image_proj.proj.2.weight": ("F16", [4, 4], 32),
         "ip_adapter.1.to_k_ip.weight": ("F16", [4, 8], 64)},
        {"image_proj.latents": ("F16", [1, 1, 1], 2), "image_proj.proj_in.weight": ("F16", [1, 1], 2),
         "image_proj.layers.٣.0.to_q.weight": ("F16", [1, 1], 2), "ip_adapter.٣.to_k_ip.weight": ("F16", [1, 1], 2)},
        {"image_proj.\x1b[2J\n": ("F16", [1, 1], 2), "ip_adapter.1.to_k_ip.weight": ("F16", [1, 1], 2)},
    ],
)  # fmt: skip
def test_hostile_headers_are_refused_in_one_sentence(tensors, tmp_path):
    write_header(tmp_path / "x.safetensors", tensors)
    with pytest.raises(CheckpointError):
        load_adapter(tmp_path / "x.safetensors")


# ------------------------------------------------------------------------------------- adapters that are not IP-Adapters


def test_instantid_is_not_taken_for_faceid_portrait():
    layers = key_value_shapes({n: 2 for n in SD15_LAYERS}, 2048)
    for width, adapter_type in ((1280, "instantid"), (2048, "faceid-resampler")):
        shapes = plus_projection(512, width, 1280, 2048) | layers
        spec = detect_spec({key: torch.empty(shape, device="meta") for key, shape in shapes.items()})
        assert spec.adapter_type == adapter_type and spec.is_faceid and not spec.normalized_id_embeds


@pytest.mark.parametrize("embed_dim", [768, 1024, 1280])
def test_the_face_layout_of_ai_toolkit_is_not_taken_for_faceid(embed_dim):
    """Its LayerNorm comes before the projection, which shows in its width; for CLIP ViT-L both widths are 768."""
    shapes = linear_shapes("image_proj.proj.0", embed_dim, 2 * embed_dim) | linear_shapes("image_proj.proj.2", 2 * embed_dim, 4 * 768)
    shapes |= norm_shapes("image_proj.norm", embed_dim) | key_value_shapes(SD15_LAYERS, 768)
    with pytest.raises(CheckpointError, match="ai-toolkit"):
        detect_spec({key: torch.empty(shape, device="meta") for key, shape in shapes.items()})
