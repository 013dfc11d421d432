"""What every test may rely on: the pack as `lora_workbench`, and a ComfyUI, a GPU and a browser where there are some.

Tests marked `comfy`, `gpu` or `browser` are not run where that is missing, and the last line of the run says how many.
"""

import ast
import functools
import importlib.util
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]  # else `nodes` would be the pack's
sys.path.append(str(ROOT / "tools"))

import comfyui as comfyui_folder  # noqa: E402
import pack  # noqa: E402

pack.load()

COMFYUI = comfyui_folder.find()
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@functools.cache
def missing(marker: str) -> str | None:
    """Why tests with this marker cannot run here; None when they can."""
    if marker == "comfy" and COMFYUI is None:
        return "no ComfyUI found: set COMFYUI_PATH to a checkout"
    if marker == "browser" and (CHROMIUM is None or importlib.util.find_spec("playwright") is None):
        return "no Chromium with playwright found"
    if marker == "gpu" and not has_cuda():
        return "no CUDA device"
    return None


def has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def pytest_configure(config):
    config.stash[NOT_RUN] = {}
    if COMFYUI is not None and not leads_others(config):
        sys.path.insert(0, str(COMFYUI))
        config.stash[HOST_FOLDER] = enter_host()


def leads_others(config) -> bool:
    """Whether this process only hands the tests to others (pytest-xdist)."""
    return bool(getattr(config.option, "numprocesses", None)) and not hasattr(config, "workerinput")


def pytest_unconfigure(config):
    if HOST_FOLDER in config.stash:
        shutil.rmtree(config.stash[HOST_FOLDER], ignore_errors=True)


def enter_host() -> Path:
    """A new folder that ComfyUI, once imported in this process, takes for its models, input, output, temp and user."""
    import utils  # noqa: F401 - older nodes.py put comfy/ in front of the path, where `utils` is another module
    from comfy.cli_args import args

    folder = Path(tempfile.mkdtemp(prefix="lora_workbench_tests_"))
    for name in ("models/loras", "input", "output", "temp", "user", "custom_nodes"):
        (folder / name).mkdir(parents=True)
    args.cpu = not has_cuda()
    args.base_directory = str(folder)
    args.disable_api_nodes = True
    args.database_url = "sqlite:///:memory:"
    return folder


@pytest.fixture(scope="session")
def comfyui(request) -> Path:
    """The ComfyUI folder; `comfy`, `nodes` and `folder_paths` import from it, and write to a temporary folder only."""
    import folder_paths

    assert Path(folder_paths.get_output_directory()).is_relative_to(request.config.stash[HOST_FOLDER])
    return COMFYUI


@pytest.fixture(scope="session")
def host_folder(request, comfyui) -> Path:
    """The temporary folder with the models, input and output of the ComfyUI in this process."""
    return request.config.stash[HOST_FOLDER]


@pytest.fixture(scope="session")
def server(comfyui, tmp_path_factory):
    """A running ComfyUI (`comfy_server.Server`) with the pack and the toy world; one for all tests that use it.

    It fails here, with ComfyUI's log, when a node pack cannot be imported.
    """
    import comfy_server
    import example

    with comfy_server.running(comfyui, tmp_path_factory.mktemp("comfyui"), example.PACKS) as server:
        yield server


@pytest.fixture(autouse=True)
def idle(request):
    """What a failed test leaves running on the server is ended, or it would hold up every test after it."""
    yield
    if "server" in request.fixturenames:
        request.getfixturevalue("server").become_idle()


@pytest.fixture(scope="session")
def object_info(server) -> dict:
    """The schema of every node, as the frontend sees it."""
    return server.object_info()


@pytest.fixture(scope="session")
def chromium() -> str:
    """The Chromium to give playwright as `executable_path`."""
    return CHROMIUM


# Tests that cannot run here

NOT_RUN = pytest.StashKey[dict[str, int]]()
HOST_FOLDER = pytest.StashKey[Path]()
MARKERS = ("comfy", "gpu", "browser")


def pytest_pycollect_makemodule(module_path, parent):
    """Where there is no ComfyUI, a module marked `comfy` is listed but not imported."""
    if missing("comfy") and marks_comfy(module_path):
        return UnimportedModule.from_parent(parent, path=module_path)
    return None


def marks_comfy(path: Path) -> bool:
    """Whether a test module has a ``pytestmark`` that names ``comfy``."""
    return any(
        isinstance(node, ast.Assign)
        and "pytestmark" in [ast.unparse(target) for target in node.targets]
        and "mark.comfy" in ast.unparse(node.value)
        for node in ast.parse(path.read_text(encoding="utf-8")).body
    )


class UnimportedModule(pytest.File):
    """A test module that is listed but not imported."""

    def collect(self):
        for node in ast.walk(ast.parse(self.path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                test = UnimportedTest.from_parent(self, name=node.name)
                test.add_marker("comfy")
                yield test


class UnimportedTest(pytest.Item):
    """A test of an unimported module: always skipped."""

    def runtest(self):
        pytest.skip(missing("comfy"))

    def reportinfo(self):
        return self.path, 0, self.name


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    for item in items:
        reason = next(filter(None, (missing(marker) for marker in MARKERS if item.get_closest_marker(marker))), None)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))
            counts = config.stash[NOT_RUN]
            counts[reason] = counts.get(reason, 0) + 1


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["not_run"] = session.config.stash[NOT_RUN]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    node.config.stash[NOT_RUN].update(getattr(node, "workeroutput", {}).get("not_run", {}))


def pytest_terminal_summary(terminalreporter, config):
    for reason, count in config.stash[NOT_RUN].items():
        terminalreporter.write_sep("!", f"{count} tests were NOT RUN: {reason}", red=True, bold=True)
