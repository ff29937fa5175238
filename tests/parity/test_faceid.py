"""FaceID adapters in diffusers' own loader (their LoRA through peft) and in ours give the same latents."""

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from conftest import CROSS, FACE, image_processor, random_face_adapter, sd15_pipeline, vision_encoder
from imprompt.dit.attach import attach
from imprompt.errors import Notice, UserError
from imprompt.models import checkpoints
from imprompt.models.face_encoders import FaceEncoder
from imprompt.models.image_encoders import ImageEncoder
from imprompt.models.image_prompt import ImagePromptEncoder

STEPS = 4


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
        ("y.safetensors", {"version": "2"}, True),
        ("faceid-plus.safetensors", {"version": 2}, True),  # what was written into the file counts more than its name
        ("IP-Adapter-FaceID-PlusV2_sd15.safetensors", {}, True),
        ("ip-adapter-faceid-plus-v2_sd15.bin", {}, True),
        ("faceid_plus_v2.bin", {}, True),
        ("FaceID Plus V2.bin", {}, True),
        ("IP-Adapter-FaceID-Plus_sd15.bin", {}, False),
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
        assert converted == original and original in ({"version": 2}, {"normalized": False})


def test_identity_embeddings_stacked_with_their_unconditional_half_are_recognized(tmp_path):
    path = tmp_path / "ip-adapter-faceid.bin"
    checkpoints.save(random_face_adapter(sd15_pipeline().unet), path)
    ip, id_embeds = load_prompt_encoder(path), random_id_embeds(2)
    stacked = torch.cat([torch.zeros_like(id_embeds), id_embeds])[:, None, None]  # as in diffusers' guide
    np.save(tmp_path / "who.npy", stacked.numpy())
    torch.save(stacked, tmp_path / "who.ipadpt")
    torch.save([stacked], tmp_path / "who.bin")
    for source in (stacked, stacked.numpy(), *(tmp_path / f"who{suffix}" for suffix in (".npy", ".ipadpt", ".bin"))):
        with pytest.warns(Notice, match="2 of 4 are zeros"):
            assert torch.equal(ip(face_embeds=source).image_features, ip(face_embeds=id_embeds).image_features)
    with pytest.raises(UserError, match="nothing but zeros"):
        ip(face_embeds=torch.zeros(2, FACE))


def test_instantid_takes_no_images():
    encoder = FaceEncoder(512, normalized=False, detects=False)
    assert encoder.combine_features(torch.ones(1, 512), ()).shape == (1, 1, 512)
    with pytest.raises(UserError, match="antelopev2"):
        encoder.preprocess([random_image(0)])


def test_an_image_encoder_that_is_too_narrow_for_faceid_plus_is_refused():
    with pytest.raises(UserError, match="expected at least 512, received 40"):
        FaceEncoder(512, ImageEncoder(vision_encoder(), image_processor()))


def test_a_version_that_is_not_in_the_file_is_reported_and_can_be_set(tmp_path):
    plus = random_face_adapter(sd15_pipeline().unet, plus=True)
    source, target = tmp_path / "my-face.safetensors", tmp_path / "mine.safetensors"
    checkpoints.save(plus, source)
    with pytest.warns(Notice, match="my-face.safetensors is taken for version 1 of FaceID-Plus.*--faceid-version 2"):
        assert not checkpoints.load_adapter(source)[0].image_proj.shortcut
    assert checkpoints.convert_adapter(source, target, faceid_version=2).faceid_version == 2
    assert checkpoints.load_adapter(target)[0].image_proj.shortcut
    checkpoints.save(random_face_adapter(sd15_pipeline().unet), source)
    with pytest.raises(UserError, match="only FaceID-Plus has two versions"):
        checkpoints.convert_adapter(source, target, faceid_version=2)


def test_the_version_is_found_in_what_other_programs_write_into_a_file(tmp_path):
    tensors = random_face_adapter(sd15_pipeline().unet, plus=True).state_dict()
    safetensors.torch.save_file(tensors, tmp_path / "renamed.safetensors", {"modelspec.title": "IP-Adapter FaceID Plus v2"})
    assert checkpoints.load_adapter(tmp_path / "renamed.safetensors")[1].faceid_version == 2
