"""Where ComfyUI is on this machine."""

import os
import re
from pathlib import Path

ROOT = Path(__file__).absolute().parents[1]
DEFAULT = Path.home() / "comfy" / "ComfyUI"


def find(explicit: str | Path | None = None) -> Path | None:
    """The ComfyUI folder to use: the one asked for, $COMFYUI_PATH, the one this pack is installed in, ~/comfy/ComfyUI.

    None when none is found. Raises FileNotFoundError when a named folder (argument or variable) holds no ComfyUI.
    """
    for named, source in ((explicit, "--comfyui"), (os.environ.get("COMFYUI_PATH"), "COMFYUI_PATH")):
        if named:
            folder = Path(named).expanduser().absolute()
            if not is_comfyui(folder):
                raise FileNotFoundError(
                    f"{source} names {folder}, which holds no ComfyUI: give the folder with ComfyUI's main.py in it."
                )
            return folder
    return next((folder for folder in (*containing(ROOT), DEFAULT) if is_comfyui(folder)), None)


def containing(pack: Path) -> tuple[Path, ...]:
    """The ComfyUI folder a pack is installed in, when it lies in some ``custom_nodes`` folder."""
    return (pack.parents[1],) if pack.parent.name == "custom_nodes" else ()


def is_comfyui(folder: Path) -> bool:
    """Whether ``folder`` holds ComfyUI itself."""
    return all((folder / name).is_file() for name in ("main.py", "nodes.py", "folder_paths.py"))


def version(folder: Path) -> str:
    """The version ComfyUI states for itself, or "unknown"."""
    stated = folder / "comfyui_version.py"
    found = re.search(r'__version__ = "(.+?)"', stated.read_text(encoding="utf-8")) if stated.is_file() else None
    return found[1] if found else "unknown"
