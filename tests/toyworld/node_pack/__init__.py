"""Loaders of the toy world for ComfyUI graphs: tests, the demo and benchmarks use them, nobody else needs them."""

from .models import load


class _Loader:
    RETURN_TYPES = ("MODEL", "CLIP", "VAE")
    FUNCTION = "load"
    CATEGORY = "LoRA Workbench/toy world"
    KIND = ""

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def load(self):
        return load(self.KIND)


class ToyWorldSDXL(_Loader):
    KIND = "sdxl"


class ToyWorldSDXLVPred(_Loader):
    KIND = "sdxl_vpred"


class ToyWorldFlux(_Loader):
    KIND = "flux"


NODE_CLASS_MAPPINGS = {node.__name__: node for node in (ToyWorldSDXL, ToyWorldSDXLVPred, ToyWorldFlux)}
NODE_DISPLAY_NAME_MAPPINGS = {
    "ToyWorldSDXL": "Toy World SDXL",
    "ToyWorldSDXLVPred": "Toy World SDXL (v-prediction)",
    "ToyWorldFlux": "Toy World FLUX",
}
