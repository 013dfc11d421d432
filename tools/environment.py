"""A Python environment of its own in the user's cache folder, made once for everything that needs the same packages.

No environment of the user, ComfyUI's included, is ever changed. Runs with nothing but Python installed.
"""

import argparse
import contextlib
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import comfyui

ROOT = Path(__file__).resolve().parents[1]
TORCH = ("torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0")
ALWAYS = ("numpy", "Pillow", "safetensors", "aiohttp")
TESTS = ("pytest>=8", "pytest-xdist>=3", "diffusers>=0.35", "scikit-image", "playwright", "timm", "onnx", "onnxruntime")
COMFYUI_VERSION = "0.33.0"  # installed when there is no ComfyUI; the one the tests are run against


class SetupError(RuntimeError):
    """Setting up did not work; the message says why and what to do."""


def enter(script: str, arguments: Sequence[str], comfyui_folder: Path | None) -> None:
    """Ends this process with the outcome of ``script`` run in the environment; returns at once when inside it."""
    python = prepare(comfyui_folder)
    if Path(sys.prefix).resolve() == python.parents[1].resolve():
        return
    variables = {**os.environ, "PYTHONPYCACHEPREFIX": str(python.parents[1] / "pycache")}
    if comfyui_folder:
        variables["COMFYUI_PATH"] = str(comfyui_folder)
    try:
        sys.exit(subprocess.call([str(python), script, *arguments], env=variables))
    except KeyboardInterrupt:
        sys.exit(130)


def prepare(comfyui_folder: Path | None) -> Path:
    """The Python of an environment that can run ComfyUI, the pack and its tests; set up on the first call.

    Raises SetupError when a package cannot be had.
    """
    wanted = requirements(comfyui_folder)
    folder = cache_folder() / "environments" / key(wanted)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if (folder / "complete").is_file() and python.exists():
        return python
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_suffix(".lock")):
        if not (folder / "complete").is_file():
            build(folder, python, wanted)
    return python


def requirements(comfyui_folder: Path | None) -> dict[str, list[str]]:
    """All that the environment must hold, in the order it is installed."""
    packages = lines(comfyui_folder / "requirements.txt") if comfyui_folder else []
    return {"torch": list(TORCH), "packages": [*ALWAYS, *packages, *lines(ROOT / "requirements.txt"), *TESTS]}


def lines(file: Path) -> list[str]:
    """The requirements in a requirements file."""
    stated = (line.split("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines())
    return [line for line in stated if line]


def key(wanted: dict[str, list[str]]) -> str:
    """A name that changes with the contents, the Python and the kind of machine."""
    identity = [wanted, sys.version_info[:2], platform.system(), platform.machine(), has_nvidia()]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]


def cache_folder() -> Path:
    """The folder for this project in the user's cache, where the system keeps such things."""
    if os.name == "nt":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "lora-workbench"


def has_nvidia() -> bool:
    return shutil.which("nvidia-smi") is not None


def build(folder: Path, python: Path, wanted: dict[str, list[str]]) -> None:
    """Makes the environment in ``folder``; the file ``complete`` in it is written last."""
    started = time.monotonic()
    say(f"Setting up an environment in {folder} (once; several minutes and GB).")
    log = folder.with_suffix(".log")
    log.unlink(missing_ok=True)
    make_venv(folder, log)
    say("1/2  PyTorch")
    if has_nvidia() or not pip(python, [f"{pin}+cpu" for pin in wanted["torch"]], log):
        must_pip(python, wanted["torch"], log)
    say("2/2  ComfyUI's requirements, ours and the tests'")
    must_pip(python, [*wanted["torch"], *wanted["packages"]], log)
    (folder / "complete").write_text(json.dumps(wanted, indent=1), encoding="utf-8")
    say(f"Ready after {time.monotonic() - started:.0f} s.")


def make_venv(folder: Path, log: Path) -> None:
    """A new, empty virtual environment in ``folder``."""
    if not run([sys.executable, "-m", "venv", "--clear", str(folder)], log):
        raise SetupError(
            f"Python could not make a virtual environment in {folder}: install the venv module "
            f"(on Debian and Ubuntu the package python3-venv) and try again.\n{tail(log)}"
        )


def must_pip(python: Path, packages: Sequence[str], log: Path) -> None:
    if not pip(python, packages, log):
        raise SetupError(
            f"pip could not install {', '.join(packages[:4])} …: check the network and pip's configuration, then run "
            f"the same command again. The end of {log}:\n{tail(log)}"
        )


def pip(python: Path, packages: Sequence[str], log: Path) -> bool:
    """Whether pip could install ``packages``; what it says goes to ``log``."""
    return run([str(python), "-m", "pip", "install", "--disable-pip-version-check", *packages], log)


def run(command: Sequence[str], log: Path, **variables: str) -> bool:
    """Whether ``command`` succeeded; its output goes to ``log``, its downloads to the terminal's status line."""
    with log.open("a", encoding="utf-8") as file:
        file.write(f"\n$ {' '.join(command)}\n")
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            encoding="utf-8",
            errors="replace",
            env={**os.environ, "PYTHONUTF8": "1", **variables},
        )
        for line in process.stdout:
            file.write(line)
            if line.strip().startswith(("Downloading ", "Installing ", "Building ")):
                status(line.strip())
        status("")
        return process.wait() == 0


def install_comfyui() -> Path:
    """A new ComfyUI in comfy-cli's usual place, by comfy-cli; raises SetupError saying what to do when it cannot."""
    place = comfyui.DEFAULT
    say(f"No ComfyUI found: installing {COMFYUI_VERSION} in {place} with comfy-cli.")
    folder = cache_folder() / "comfy-cli"
    log = folder.with_suffix(".log")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_suffix(".lock")):
        python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        if not python.exists():
            make_venv(folder, log)
        # Told to skip every package, comfy-cli fetches the source only; packages belong in our own environment.
        options = [
            "--version",
            COMFYUI_VERSION,
            "--cpu",
            "--skip-manager",
            "--skip-torch-or-directml",
            "--skip-requirement",
        ]
        comfy = [str(python), "-m", "comfy_cli", "--workspace", str(place), "--skip-prompt", "install", *options]
        done = pip(python, ["comfy-cli"], log) and run(
            comfy, log, DO_NOT_TRACK="1", _TYPER_STANDARD_TRACEBACK="1", VIRTUAL_ENV=str(folder)
        )
    if not done or not comfyui.is_comfyui(place):
        raise SetupError(
            f"ComfyUI could not be installed: download ComfyUI {COMFYUI_VERSION} yourself, unpack it in {place} "
            f"(main.py directly in it) or set COMFYUI_PATH to where it is, and run the same command again. "
            f"The end of {log}:\n{tail(log)}"
        )
    return place


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """Waits until no other process holds ``file``; the system lets go of it when a process ends, however it ends."""
    with file.open("a+b") as handle:
        if os.name == "nt":
            import msvcrt

            while True:
                with contextlib.suppress(OSError):
                    msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)
                    break
                time.sleep(1)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def say(text: str) -> None:
    print(text, flush=True)


def status(text: str) -> None:
    """Shows ``text`` on the terminal's current line in place of the one before; nothing where there is no terminal."""
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns - 1
        print(f"\r{text[:width]:<{width}}", end="\r" if not text else "", flush=True)


def tail(log: Path, count: int = 15) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-count:])


def add_comfyui_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--comfyui",
        metavar="PATH",
        help="the ComfyUI to use (else $COMFYUI_PATH, the one this folder is installed in, ~/comfy/ComfyUI)",
    )
