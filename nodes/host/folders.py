"""Where ComfyUI keeps things, and what a name or a path from a workflow may reach."""

import os
import re
import unicodedata
from itertools import islice
from pathlib import Path, PureWindowsPath

import folder_paths

MOST_WATCHED = 20_000  # files; asking for the times of more would hold up the queue


def loras_folder() -> Path:
    """The folder in which every LoRA loader looks first; checkpoints are written below it."""
    return Path(folder_paths.get_folder_paths("loras")[0])


def embeddings_folder() -> Path:
    """The folder in which ComfyUI looks first for `embedding:<name>` of a prompt."""
    return Path(folder_paths.get_folder_paths("embeddings")[0])


def output_folder() -> Path:
    """ComfyUI's output folder."""
    return Path(folder_paths.get_output_directory())


def input_folder() -> Path:
    """ComfyUI's input folder."""
    return Path(folder_paths.get_input_directory())


def lora_names() -> list[str]:
    """The LoRA files there are, relative to the loras folders."""
    return folder_paths.get_filename_list("loras")


def lora_path(name: str) -> Path:
    """The LoRA file of that name, written with either separator; ValueError when there is none in the loras folders."""
    path = folder_paths.get_full_path("loras", os.path.join(*_parts(name)))
    if path is None:
        raise ValueError(f"The LoRA '{name}' is not in the loras folder. Put the file back, or choose another one.")
    return Path(path)


def _parts(name: str) -> tuple[str, ...]:
    """The folders and the file of a name; ValueError for one that leaves the loras folder or is no model file."""
    path = PureWindowsPath(name)  # takes both separators apart, and knows drives
    outside = path.anchor or ".." in path.parts or "\0" in name
    if outside or path.suffix.lower() not in folder_paths.supported_pt_extensions:
        raise ValueError(f"'{name}' is not the name of a LoRA file. Choose one from the list of the loras folder.")
    return path.parts


def new_lora_path(name: str) -> Path:
    """Where a new LoRA of that name belongs: in the first loras folder, its sub-folders named with either separator.

    ".safetensors" is added. ValueError for a name that leaves the folder or that some system has no file of.
    """
    typed = name.strip()
    if typed and not typed.lower().endswith(".safetensors"):
        typed += ".safetensors"
    path = PureWindowsPath(typed)
    if path.anchor or not path.parts or not all(map(_is_file_name, (*path.parts[:-1], path.stem))):
        raise ValueError(
            f"name '{name}' cannot be the name of a LoRA file: use letters and digits, for example 'people/my_lora'."
        )
    return loras_folder().joinpath(*path.parts)


def _is_file_name(part: str) -> bool:
    """Whether a file can be called so on every system. What begins with a dot would not be listed."""
    device = re.fullmatch(r"(?i)(con|prn|aux|nul|com\d|lpt\d)", part.split(".")[0].strip())
    fits = 0 < len(part.encode(errors="ignore")) <= 200
    return fits and part.isprintable() and not device and not re.search(r'[<>:"/\\|?*]|^[. ]|[. ]$', part)


def dataset_folder(text: str) -> Path:
    """The folder a user typed or pasted: quotes dropped, ``~`` expanded, a relative path inside ComfyUI's input folder.

    Backslashes and accents are also tried as this system writes them. It need not exist.
    """
    typed = text.strip().strip("\"'\u201c\u201d\u2018\u2019").strip()
    written = [typed, *(unicodedata.normalize(form, typed) for form in ("NFC", "NFD"))]
    written += [way.replace("\\", "/") for way in written]
    folders = [input_folder() / os.path.expanduser(way) for way in written]
    return next(filter(os.path.isdir, folders), folders[0])


def handed_folder() -> Path:
    """Where pictures from other nodes are kept as datasets."""
    return output_folder() / "lora_workbench" / "datasets"


def cache_folder() -> Path:
    """Where pictures and texts are kept encoded."""
    return output_folder() / "lora_workbench" / "cache"


def runs_folder() -> Path:
    """Where every training keeps its record, state, metrics and previews, in a folder of its name."""
    return output_folder() / "lora_workbench" / "runs"


def regularization_folder() -> Path:
    """Where the pictures of classes are kept, in a folder for each model, prompt and settings."""
    return output_folder() / "lora_workbench" / "regularization"


def workflows_folder() -> Path:
    """Where the workflows that made LoRAs are written."""
    return output_folder() / "lora_workbench" / "workflows"


def folder_state(folder: Path, most: int = MOST_WATCHED) -> list[tuple[str, int, int]]:
    """Name, size and time of change of the files in the folder and two levels below, so that edits are noticed.

    Hidden files are passed over. At most `most` are asked for their time; of a folder with more than that only
    additions and removals are sure to be noticed, by the time of the folder itself.
    """
    state, places = [], [(str(folder), 2)]
    for place, below in places:
        try:
            with os.scandir(place) as found:
                entries = sorted(islice(found, most - len(state)), key=lambda entry: entry.name)
        except OSError:
            continue
        for entry in entries:
            if entry.name.startswith("."):
                continue
            try:
                if entry.is_dir():
                    places += [(entry.path, below - 1)] if below else []
                elif entry.is_file():
                    state.append((entry.path, entry.stat().st_size, entry.stat().st_mtime_ns))
            except OSError:  # a link that goes in circles, or a file that has just been removed
                continue
        if len(state) >= most or len(entries) >= most:
            return [*state, (place, 0, os.stat(place).st_mtime_ns)]
    return state
