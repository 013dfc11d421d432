"""The pack as a Python package, loaded by path under one name whatever its folder is called."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

NAME = "lora_workbench"
ROOT = Path(__file__).resolve().parents[1]


def load(root: Path = ROOT) -> ModuleType:
    """The pack in ``root`` as the module ``lora_workbench``, loaded the way ComfyUI loads it; once per process."""
    if NAME in sys.modules:
        return sys.modules[NAME]
    spec = importlib.util.spec_from_file_location(NAME, root / "__init__.py", submodule_search_locations=[str(root)])
    module = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[NAME]
        raise
    return module
