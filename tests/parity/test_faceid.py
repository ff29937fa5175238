"""FaceID adapters in diffusers' own loader (their LoRA through peft) and in ours give the same latents."""

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import CROSS, VISION, image_processor, sd15_pipeline, vision_encoder
from imprompt.core.adapter import Adapter
from imprompt.core.image_projection import FaceIDPlusProjection, FaceIDProjection
from imprompt.errors import UserError
from imprompt.models import checkpoints
from imprompt.models.face_encoders import FaceEncoder
from imprompt.models.image_encoders import ImageEncoder
from imprompt.models.image_prompt import ImagePromptEncoder
from imprompt.unet.attn_processors import infer_adapter_shape
from imprompt.unet.injection import attach

STEPS, FACE, RANK = 4, 12, 3


def random_face_adapter(unet, *, plus=False, tokens=4, shortcut=False, lora=True):
    """Random weights in the layout of the public files, with LoRA in every layer, of self-attention too."""
    torch.manual_seed(5)
    hidden_dims, cross_attention_dim = infer_adapter_shape(unet)
    if plus:
        projector = FaceIDPlusProjection(FACE, VISION, cross_attention_dim, tokens, 24, num_heads=1, depth=4, shortcut=shortcut)
    else:
        projector = FaceIDProjection(FACE, cross_attention_dim, tokens, 24)
    adapter = Adapter(projector, hidden_dims, cross_attention_dim)
    if lora:
        for n, name in enumerate(unet.attn_processors):
            hidden = unet.get_submodule(name.removesuffix(".processor")).to_q.in_features
            kv_dim = cross_attention_dim if n % 2 else hidden
            adapter.add_lora(n, {name: (kv_dim if name in "kv" else hidden, hidden, RANK) for name in ("q", "k", "v", "out")})
    return adapter.eval().requires_grad_(False)


def random_id_embeds(count):
    return torch.nn.functional.normalize(torch.randn(count, FACE, generator=torch.Generator().manual_seed(1)), dim=1)


def random_image(seed):
    return Image.effect_noise((32, 32), 60 + 20 * seed).convert("RGB").rotate(30 * seed)


def load_prompt_encoder(path):
    adapter, spec = checkpoints.load_adapter(path)
    image_encoder = ImageEncoder(vision_encoder(), image_processor()) if spec.uses_patch_features else None
    return ImagePromptEncoder(adapter, spec, FaceEncoder(FACE, image_encoder, normalized=spec.metadata.get("normalized", True)))


def sample_latents(pipe, **options):
    return pipe("a red fish", num_inference_steps=STEPS, generator=torch.Generator().manual_seed(0), output_type="latent", **options).images


def relative_error(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", ["ip-adapter-faceid.bin", "ip-adapter-faceid-portrait.bin", "ip-adapter-faceid-plus.bin", "ip-adapter-faceid-plusv2.bin"]
)
def test_same_latents_as_diffusers(name, tmp_path):
    plus, portrait = "plus" in name, "portrait" in name
    pipe = sd15_pipeline()
    before = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
    path = tmp_path / name
    adapter = random_face_adapter(pipe.unet, plus=plus, tokens=16 if portrait else 4, shortcut="v2" in name, lora=not portrait)
    checkpoints.save(adapter, path)
    id_embeds = random_id_embeds(2 if portrait else 1)
    images = [random_image(i) for i in range(len(id_embeds))]

    diffusers_pipe = sd15_pipeline()
    diffusers_pipe.load_ip_adapter(str(tmp_path), subfolder="", weight_name=name, image_encoder_folder=None)
    diffusers_pipe.set_ip_adapter_scale(0.8)
    if plus:
        encoder = ImageEncoder(vision_encoder(), image_processor())
        layer = diffusers_pipe.unet.encoder_hid_proj.image_projection_layers[0]
        layer.clip_embeds = torch.cat([encoder.uncond_features(patches=True), encoder.encode_images(images, patches=True)])[:, None]
        layer.shortcut = "v2" in name
    stacked = id_embeds[None, :, None]
    expected = sample_latents(diffusers_pipe, ip_adapter_image_embeds=[torch.cat([torch.zeros_like(stacked), stacked])])

    ip = load_prompt_encoder(path)
    with attach(pipe, ip(images if plus else (), scale=0.8, face_embeds=id_embeds)):
        received = sample_latents(pipe)
        assert pipe.unet.state_dict().keys() == before.keys()
    assert relative_error(received, expected) <= 1e-4
    base = sample_latents(sd15_pipeline())
    assert relative_error(base, expected) > 1e-2
    assert torch.equal(sample_latents(pipe), base)  # detaching restores the UNet
    with attach(pipe, ip(images if plus else (), scale=0.0, face_embeds=id_embeds)):
        assert torch.equal(sample_latents(pipe), base)


def test_embeddings_come_from_files(tmp_path):
    path = tmp_path / "ip-adapter-faceid.bin"
    pipe = sd15_pipeline()
    checkpoints.save(random_face_adapter(pipe.unet), path)
    ip, id_embeds = load_prompt_encoder(path), random_id_embeds(2)
    np.save(tmp_path / "who.npy", 3 * id_embeds.numpy())  # normalized on reading, as the adapter was trained
    checkpoints.write_tensors({"who": id_embeds}, tmp_path / "who.safetensors")
    for file in ("who.npy", "who.safetensors"):
        torch.testing.assert_close(ip(face_embeds=tmp_path / file).image_features, ip(face_embeds=id_embeds).image_features)
    (tmp_path / "bad.npy").write_bytes(b"no")
    np.save(tmp_path / "wide.npy", np.zeros((1, 7)))
    np.save(tmp_path / "pickled.npy", np.array([{}], dtype=object), allow_pickle=True)
    for file, message in (
        ("bad.npy", "no identity embedding"),
        ("wide.npy", "of 12 finite numbers, received shape \\(1, 7\\)"),
        ("pickled.npy", "no identity embedding"),
    ):
        with pytest.raises(UserError, match=message):
            ip(face_embeds=tmp_path / file)
    with pytest.raises(UserError, match="needs a face"):
        ip()


def test_what_the_keys_do_not_determine_is_in_the_name_or_the_header(tmp_path):
    pipe = sd15_pipeline()
    plus = random_face_adapter(pipe.unet, plus=True)
    for name, metadata, shortcut in (
        ("faceid-plus.bin", {}, False),
        ("faceid-plusv2.bin", {}, True),
        ("x.safetensors", {"version": 2}, True),
    ):
        checkpoints.save(plus, tmp_path / name, metadata)
        assert checkpoints.load_adapter(tmp_path / name)[0].image_proj.shortcut is shortcut
    for name, length in (("faceid-portrait.bin", 1.0), ("faceid-portrait_unnorm.bin", 3.0)):
        checkpoints.save(random_face_adapter(pipe.unet, tokens=16, lora=False), tmp_path / name)
        assert load_prompt_encoder(tmp_path / name)(face_embeds=3 * random_id_embeds(1)).image_features.norm().item() == pytest.approx(
            length
        )
    assert plus.cross_attention_dim == CROSS
    for name in ("faceid-plusv2.bin", "faceid-portrait_unnorm.bin"):  # converting stores it in the header
        checkpoints.convert_adapter(tmp_path / name, tmp_path / "converted.safetensors")
        original, converted = (checkpoints.read_adapter_file(tmp_path / file)[1] for file in (name, "converted.safetensors"))
        assert converted["version"] == original["version"] and converted["normalized"] == original["normalized"]
