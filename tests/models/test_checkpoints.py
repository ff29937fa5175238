"""Every public adapter file is read, its type detected, and written back unchanged; a bad one is refused in one sentence."""

import json
import pickle
import tempfile
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from conftest import random_adapter, sd15_pipeline, sd15_unet, sdxl_unet
from imprompt.errors import UserError
from imprompt.models import checkpoints
from imprompt.models.checkpoints import CheckpointError, detect_spec, load_adapter, read_adapter_file, save, write_tensors
from imprompt.models.hub import default_image_encoder
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
    lora_shapes,
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
    path = temporary_folder / "ip-adapter-faceid.bin"
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


@pytest.mark.parametrize("suffix", checkpoints.ADAPTER_SUFFIXES)
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
    assert "received .gguf" in load_error(tmp_path / "adapter.gguf")
    (tmp_path / "adapter").write_bytes(b"")
    assert "no suffix" in load_error(tmp_path / "adapter")
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
