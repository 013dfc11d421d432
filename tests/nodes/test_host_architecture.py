"""Which MODELs are trained as what, and the sentence for each that is not: over the classes that ComfyUI has."""

import inspect

import comfy.model_base
import comfy.supported_models
import familytoys
import hosttoys
import pytest
from torch import nn

from lora_workbench.nodes.host.architecture import REFUSED, SINGLE_FRAMES, family_of, text_widths
from lora_workbench.nodes.host.prediction import prediction_of
from lora_workbench.training import families

pytestmark = pytest.mark.comfy

REASONS = {
    "a video model": ["WAN21", "HunyuanVideo", "LTXV", "GenmoMochi", "CosmosVideo", "CosmosPredict2", "Kandinsky5"]
    + ["HunyuanVideo15", "WAN21_Vace", "WAN22", "CogVideoX"],
    "does not make pictures": ["ACEStep", "ACEStep15", "StableAudio1", "Hunyuan3Dv2", "Trellis2", "TripoSplat"]
    + ["SAM3", "RT_DETR_v4", "DepthAnything3"],
    "made from another picture": ["Lotus", "SD21UNCLIP", "SD_X4Upscaler", "Stable_Zero123", "SD15_instructpix2pix"]
    + ["SDXL_instructpix2pix", "HunyuanImage21Refiner", "SeedVR2", "PiD"],
    "only finishes pictures": ["SDXLRefiner"],
    "works on pixels": ["ChromaRadiance", "ZImagePixelSpace", "HiDreamO1", "PixelDiTT2I"],
    "videos out of pictures": ["SVD_img2vid", "SV3D_u", "SV3D_p"],
    "pair of networks": ["StableCascade_C", "StableCascade_B"],
}


def refusals():
    return [(reason, name) for reason, names in REASONS.items() for name in names if hasattr(comfy.model_base, name)]


def latent_format_of(name):
    """The latents of the checkpoints that ComfyUI makes this class for."""
    for settings in comfy.supported_models.models:
        if f"model_base.{name}(" in inspect.getsource(settings.get_model):
            return settings.latent_format()
    raise AssertionError(f"no checkpoint makes a {name}")


def of_class(name, **parts):
    """A MODEL of a class of ComfyUI without its network, which would be gigabytes."""

    class Patcher:
        model = object.__new__(getattr(comfy.model_base, name))

    nn.Module.__init__(Patcher.model)
    Patcher.model.concat_keys = ()
    for part, value in parts.items():
        setattr(Patcher.model, part, value)
    return Patcher


@pytest.mark.parametrize(("reason", "name"), refusals(), ids=[name for _, name in refusals()])
def test_what_cannot_learn_from_pictures_and_captions_is_refused_with_its_reason(reason, name):
    latents = None if name in REFUSED else latent_format_of(name)
    with pytest.raises(ValueError, match=reason) as error:
        family_of(of_class(name, latent_format=latents))
    message = str(error.value)
    assert name in message and message.endswith(".") and "\n" not in message


def test_every_class_that_a_checkpoint_becomes_has_an_answer():
    """Those that neither are refused by name nor have latents of another shape are image models."""
    images = set()
    for name, kind in inspect.getmembers(comfy.model_base, inspect.isclass):
        if not issubclass(kind, comfy.model_base.BaseModel) or any(a.__name__ in REFUSED for a in kind.__mro__):
            continue
        try:
            latents = latent_format_of(name)
        except AssertionError:
            continue
        flat = latents.latent_dimensions == 2 and latents.spacial_downscale_ratio >= 8
        if flat or any(ancestor.__name__ in SINGLE_FRAMES for ancestor in kind.__mro__):
            images.add(name)
    expected = {"BaseModel", "SDXL", "SD3", "Flux", "AuraFlow", "PixArt", "HunyuanDiT", "Chroma", "HiDream", "Lumina2"}
    expected |= {"QwenImage", "Omnigen2", "HunyuanImage21", "Kandinsky5Image", "Anima", "Flux2"}
    later = {"Boogu", "Ideogram4", "Krea2", "MageFlow", "JoyImage", "Lens", "LongCatImage", "ErnieImage"}
    assert expected <= images <= expected | later


@pytest.mark.parametrize(
    ("kind", "family", "prediction"),
    [
        ("sd15", families.SD15, "eps"),
        ("sd3", families.SD3, "flow"),
        ("sd35", families.SD35_MEDIUM, "flow"),
        ("chroma", families.CHROMA, "flow"),
        ("pixart", "pixart", "eps"),
        ("qwen_image", "qwen_image", "flow"),
        ("lumina2", "lumina2", "flow"),
    ],
)
def test_family_and_prediction_of_other_models_are_read_from_them_too(kind, family, prediction):
    patcher = familytoys.model(kind)
    found = family_of(patcher)
    assert (found if isinstance(family, families.Family) else found.name, prediction_of(patcher)) == (
        family,
        prediction,
    )


def test_z_image_is_told_from_lumina_by_its_width_and_schnell_from_dev_by_its_guidance():
    patcher = familytoys.model("lumina2")
    patcher.model.model_config.unet_config["dim"] = 3840
    assert family_of(patcher).base_model_version == "z_image"
    flux = hosttoys.model("flux")
    assert family_of(flux) is families.FLUX
    flux.model.model_config.unet_config["guidance_embed"] = False
    assert family_of(flux) is families.SCHNELL


def test_sd2_is_told_from_sd15_by_the_width_of_its_text():
    patcher = familytoys.model("sd15")
    patcher.model.model_config.unet_config["context_dim"] = 1024
    assert family_of(patcher) is families.SD2


@pytest.mark.parametrize("kind", ["sd15", "chroma", "qwen_image"])
def test_an_inpainting_variant_of_any_family_is_refused_in_one_sentence(kind):
    patcher = familytoys.model(kind)
    patcher.model.concat_keys = ("mask", "masked_image")
    with pytest.raises(ValueError, match="takes a second picture: load the plain model") as error:
        family_of(patcher)
    assert "\n" not in str(error.value)


def test_more_inputs_than_answers_are_a_second_picture():
    patcher = familytoys.model("sd15")
    patcher.model.model_config.unet_config["in_channels"] = 9
    with pytest.raises(ValueError, match="second picture"):
        family_of(patcher)


def test_a_network_without_repeated_blocks_is_refused_in_one_sentence():
    patcher = familytoys.model("qwen_image")
    patcher.model.diffusion_model.transformer_blocks = nn.ModuleList()
    with pytest.raises(ValueError, match="QwenImage, in which no repeated blocks .*\\.$"):
        family_of(patcher)


def test_a_model_whose_kernels_have_no_gradient_is_refused_by_the_versions_that_have_those_kernels():
    import comfy.ldm.cosmos.predict2

    if "rms_rope_split_half(" not in inspect.getsource(comfy.ldm.cosmos.predict2):
        pytest.skip("this ComfyUI computes Anima without that kernel")
    with pytest.raises(ValueError, match="Anima, .* a kernel that has no gradient: load another model"):
        family_of(familytoys.model("anima"))


def test_flow_that_multiplies_its_noise_is_refused():
    patcher = familytoys.model("qwen_image")
    patcher.model.model_sampling.noise_scale = 2.0
    with pytest.raises(ValueError, match="noise_scale 2, and only 1"):
        prediction_of(patcher)


@pytest.mark.parametrize(("kind", "widths"), [("sd15", (768, None)), ("sd3", (40, 24)), ("lumina2", (40, None))])
def test_how_wide_the_text_is_that_a_network_takes_is_read_from_its_configuration(kind, widths):
    assert text_widths(familytoys.model(kind).model) == widths
