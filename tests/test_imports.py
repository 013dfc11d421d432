"""Who may import whom, and that importing the pack changes nothing outside it."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HOST = {
    "comfy",
    "comfy_api",
    "comfy_execution",
    "comfy_extras",
    "execution",
    "folder_paths",
    "latent_preview",
    "nodes",
    "server",
}
ALLOWED = {"torch", "numpy", "PIL", "safetensors", "peft"} | set(sys.stdlib_module_names)
WHERE_USED = {
    "captioning": {"transformers", "timm", "onnxruntime", "huggingface_hub"},
    "training": {"transformers", "bitsandbytes", "prodigyopt", "scipy"},
}
"""What each folder may import too, but only inside the functions that need it."""


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """Each import of a file as (what it starts with, all of it); relative ones start with the pack's own folder."""
    inside = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0], node.module
        elif isinstance(node, ast.ImportFrom):
            base = inside[: len(inside) - node.level + 1]
            for name in [node.module] if node.module else [alias.name for alias in node.names]:
                parts = (*base, *name.split("."))
                yield "." + parts[0], "." + ".".join(parts)


def broken(folder: str, forbidden) -> list[str]:
    """``file: import`` for every import in ``folder`` that ``forbidden(start, whole)`` rejects."""
    return [
        f"{path.relative_to(ROOT).as_posix()}: {whole}"
        for path in sources(folder)
        for start, whole in imports(path)
        if forbidden(start, whole)
    ]


CORE = {"training": set(), "captioning": set(), "lora_files": {".training"}}
"""The folders that know nothing of ComfyUI, and which of the others each may import."""


@pytest.mark.parametrize("folder", CORE)
def test_the_core_imports_only_what_it_declares(folder):
    allowed = ALLOWED | {"." + folder} | CORE[folder] | WHERE_USED.get(folder, set())
    assert broken(folder, lambda start, whole: start not in allowed) == []


@pytest.mark.parametrize("folder", WHERE_USED)
def test_the_core_imports_its_extras_only_where_they_are_used(folder):
    at_the_top = [
        f"{path.name}: {ast.unparse(node)}"
        for path in sources(folder)
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, (ast.Import, ast.ImportFrom))
        and WHERE_USED[folder] & set(re.findall(r"\w+", ast.unparse(node)))
    ]
    assert at_the_top == []


def test_only_the_seam_imports_comfyui():
    def forbidden(start, whole):
        return start in HOST and whole != "comfy_api.latest" and not whole.startswith("comfy_api.latest.")

    found = broken("nodes", forbidden)
    assert [line for line in found if not line.startswith("nodes/host/")] == []


def test_nothing_in_the_pack_uses_its_tests_or_tools():
    for folder in (*CORE, "nodes"):
        assert broken(folder, lambda start, whole: start in {".tests", ".tools", "toyworld", "tests"}) == []


def test_the_entry_imports_nothing_when_it_is_loaded():
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    assert [ast.unparse(node) for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))] == []


GLOBALS = """
import os, random, sys, warnings
import numpy, torch

def facts():
    return dict(
        environment=dict(os.environ),
        path=list(sys.path),
        hooks=(sys.excepthook, sys.displayhook, tuple(map(str, sys.meta_path))),
        filters=list(warnings.filters),
        threads=(torch.get_num_threads(), torch.get_num_interop_threads()),
        grad=(torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()),
        deterministic=(torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark),
        precision=(torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32),
        randomness=(random.getstate(), torch.get_rng_state().sum().item(), numpy.random.get_state()[1].sum()),
        functions=[
            id(value)
            for place in (torch, torch.Tensor, torch.nn.Linear, torch.nn.Module, torch.nn.functional)
            for name, value in sorted(vars(place).items())
            if not name.startswith("__")
        ],
    )
"""


def test_promise_12_importing_the_pack_changes_no_global():
    """Loads every module of the core in a fresh Python; peft's own imports are made before."""
    script = f"""{GLOBALS}
import importlib
sys.path.append({str(ROOT / "tools")!r})
import pack, PIL.Image, safetensors.torch
import peft, torch.utils.checkpoint
before = facts()
loaded = pack.load()
for path in {[path.relative_to(ROOT).with_suffix("").parts for f in CORE for path in sources(f)]}:
    importlib.import_module(".".join((pack.NAME, *(part for part in path if part != "__init__"))))
after = facts()
print([name for name in before if before[name] != after[name]])
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT.parent)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "[]"
