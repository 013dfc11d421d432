"""Caption models where ComfyUI users keep them, loaded by ComfyUI's memory manager and gone when they are closed."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from pathlib import Path

import comfy.model_management as mm
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from PIL import Image

from ...captioning.captioner import Answer, Captioner
from ...captioning.download import DOWNLOADS, fetch
from ...captioning.opening import find_models, open_local
from ...captioning.server import ServerCaptioner
from .progress import throw_if_cancelled

REGISTERED = ("LLM", "LLavacheckpoints", "wd14_tagger")
"""Names under which other packs, or an extra_model_paths.yaml, may have registered folders of caption models."""
WD14_PACK = "comfyui-wd14-tagger"
PATIENCE = 0.2


def models_folder() -> Path:
    """Where a new caption model belongs."""
    return Path(folder_paths.models_dir) / "LLM"


def names() -> list[str]:
    """The local caption models, by their path in the folder they were found in."""
    return list(_found())


def offered() -> list[str]:
    """The caption models that can be fetched, each with its licence and size; they stay offered once they are there."""
    return [download.label for download in DOWNLOADS]


def opened(name: str, *, fetch_missing: bool = False) -> Captioner:
    """The captioner of that name, or of what was offered, on ComfyUI's device whenever it is asked.

    ``fetch_missing`` must be the user's own wish. Raises ValueError when there is no such model.
    """
    found = _found()
    download = next((download for download in DOWNLOADS if download.label == name), None)
    path = found.get(download.name if download else name)
    if path is None and download and fetch_missing:
        path = fetch(download, models_folder(), throw_if_cancelled)
    if path is None:
        how = f"Allow the download of {name} from huggingface.co, put its files" if download else "Put it"
        raise ValueError(
            f"The caption model '{download.name if download else name}' is not there. {how} into {models_folder()}, or "
            "choose another."
        )
    return ManagedCaptioner(open_local(path, _dtype(mm.get_torch_device())))


def server(address: str, model: str, key_variable: str) -> ServerCaptioner:
    """A captioner on a server, whose waits between tries end when the user presses cancel."""
    return ServerCaptioner(address, model, key_variable, wait=wait)


def wait(seconds: float) -> None:
    """Sleep so long, but raise ComfyUI's interrupt as soon as the user presses cancel."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        throw_if_cancelled()
        time.sleep(min(left, PATIENCE))


class ManagedCaptioner:
    """A local captioner that ComfyUI makes room for before each batch and forgets when it is closed.

    A batch that does not fit into memory is halved, and so are those after it. Cancel works between two tokens.
    """

    def __init__(self, captioner: Captioner):
        self._captioner = captioner
        self.batch_size, self.writes_tags = captioner.batch_size, captioner.writes_tags
        self.follows_instructions = captioner.follows_instructions
        self._patcher = None
        if captioner.network is not None:
            captioner.network.register_forward_pre_hook(lambda *_: throw_if_cancelled())
            self._patcher = ModelPatcher(
                _Holder(captioner.network), mm.get_torch_device(), mm.text_encoder_offload_device()
            )

    def caption(self, images: Sequence[Image.Image], instruction: str) -> list[Answer]:
        if self._patcher is not None:
            mm.load_models_gpu([self._patcher], force_full_load=True)
        try:
            return self._captioner.caption(images, instruction)
        except torch.cuda.OutOfMemoryError:
            if len(images) == 1:
                raise
        # Out here, because the error held on to what it was computing.
        mm.soft_empty_cache()
        half = self.batch_size = (len(images) + 1) // 2
        return [*self.caption(images[:half], instruction), *self.caption(images[half:], instruction)]

    def close(self) -> None:
        # ComfyUI's manager only has weak references: without ours the weights are freed where they are.
        self._patcher = None
        self._captioner.close()
        gc.collect()
        mm.soft_empty_cache()


class _Holder(torch.nn.Module):
    """What the memory manager moves: it sets a ``device`` on a model, which those of transformers do not allow."""

    def __init__(self, network: torch.nn.Module):
        super().__init__()
        self.network = network


def _found() -> dict[str, Path]:
    """name -> path of every local caption model; where two have a name the first folder has it."""
    found: dict[str, Path] = {}
    for folder in _folders():
        found = {**find_models(folder), **found}
    return dict(sorted(found.items(), key=lambda item: item[0].casefold()))


def _folders() -> list[Path]:
    known = folder_paths.folder_names_and_paths
    registered = [path for name in REGISTERED if name in known for path in folder_paths.get_folder_paths(name)]
    usual = [Path(folder_paths.models_dir) / name for name in REGISTERED]
    return list(dict.fromkeys([*map(Path, registered), *usual, *_wd14_folders()]))


def _wd14_folders() -> list[Path]:
    """Where the WD14 Tagger pack keeps its models, whatever the case of its folder."""
    packs = (Path(path) for path in folder_paths.get_folder_paths("custom_nodes"))
    return [
        pack / "models"
        for packs_folder in packs
        if packs_folder.is_dir()
        for pack in sorted(packs_folder.iterdir())
        if pack.name.casefold() == WD14_PACK
    ]


def _dtype(device: torch.device) -> torch.dtype:
    """What the weights of a large model are kept in."""
    if mm.should_use_bf16(device):
        return torch.bfloat16
    return torch.float16 if mm.should_use_fp16(device) else torch.float32
