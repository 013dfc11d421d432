"""Finding ComfyUI, and the environment that is made once."""

import subprocess
import sys
import textwrap
from pathlib import Path

import comfyui
import environment
import pytest


@pytest.fixture
def alone(monkeypatch, tmp_path):
    """A machine without any ComfyUI."""
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setattr(comfyui, "DEFAULT", tmp_path / "home" / "comfy" / "ComfyUI")
    monkeypatch.setattr(comfyui, "ROOT", tmp_path / "pack")


def make_comfyui(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in ("main.py", "nodes.py", "folder_paths.py"):
        (folder / name).touch()
    (folder / "comfyui_version.py").write_text('__version__ = "1.2.3"\n')
    return folder


def test_comfyui_is_sought_in_the_promised_order(alone, monkeypatch, tmp_path):
    assert comfyui.find() is None
    home = make_comfyui(comfyui.DEFAULT)
    assert comfyui.find() == home
    around = make_comfyui(tmp_path / "around")
    monkeypatch.setattr(comfyui, "ROOT", around / "custom_nodes" / "pack")
    assert comfyui.find() == around
    named = make_comfyui(tmp_path / "named")
    monkeypatch.setenv("COMFYUI_PATH", str(named))
    assert comfyui.find() == named
    asked = make_comfyui(tmp_path / "asked")
    assert comfyui.find(asked) == asked
    assert comfyui.version(asked) == "1.2.3"


def test_a_named_folder_without_comfyui_is_an_error_not_a_fallback(alone, monkeypatch, tmp_path):
    make_comfyui(comfyui.DEFAULT)
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path / "nothing"))
    with pytest.raises(FileNotFoundError, match="COMFYUI_PATH names .*nothing, which holds no ComfyUI"):
        comfyui.find()


def test_the_environment_is_named_after_what_it_holds(tmp_path):
    (tmp_path / "requirements.txt").write_text("torch\nav>=16.0.0 # video\n\n#comment\n")
    wanted = environment.requirements(tmp_path)
    assert {"torch", "av>=16.0.0"} <= set(wanted["packages"])
    assert any(package.startswith("peft") for package in wanted["packages"])
    assert environment.key(wanted) == environment.key(environment.requirements(tmp_path))
    (tmp_path / "requirements.txt").write_text("torch\nav>=17.0.0\n")
    assert environment.key(wanted) != environment.key(environment.requirements(tmp_path))


def test_a_finished_environment_is_used_without_setting_anything_up(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(environment, "build", lambda *arguments: pytest.fail("built again"))
    folder = tmp_path / "environments" / environment.key(environment.requirements(None))
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    python.parent.mkdir(parents=True)
    python.touch()
    (folder / "complete").touch()
    assert environment.prepare(None) == python


def test_an_unfinished_environment_is_built_and_a_failure_leaves_it_unfinished(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(environment, "pip", lambda *arguments: False)
    monkeypatch.setattr(environment, "make_venv", lambda folder, log: log.write_text("no network\n"))
    with pytest.raises(environment.SetupError, match="(?s)pip could not install torch.*no network"):
        environment.prepare(None)
    assert not list(tmp_path.rglob("complete"))


def test_two_processes_do_not_set_up_at_once(tmp_path):
    script = textwrap.dedent(f"""
        import sys, time; sys.path.append({str(Path(environment.__file__).parent)!r})
        import environment
        from pathlib import Path
        with environment.locked(Path({str(tmp_path / "lock")!r})):
            print("in", flush=True); time.sleep(0.3); print("out", flush=True)
    """)
    out = tmp_path / "out.txt"
    with out.open("w") as file:
        for process in [subprocess.Popen([sys.executable, "-c", script], stdout=file) for _ in range(3)]:
            assert process.wait() == 0
    assert out.read_text().split() == ["in", "out"] * 3


def test_without_comfyui_its_tests_are_counted_loudly_and_the_rest_runs(tmp_path):
    """Runs a copy of conftest on two small tests with no ComfyUI anywhere."""
    tests = tmp_path / "tests"
    tests.mkdir()
    root = Path(environment.__file__).parents[1]
    (tests / "conftest.py").write_text((root / "tests" / "conftest.py").read_text())
    (tmp_path / "tools").mkdir()
    for name in ("pack.py", "comfyui.py"):
        (tmp_path / "tools" / name).write_text((root / "tools" / name).read_text())
    (tmp_path / "__init__.py").touch()
    (tests / "test_host.py").write_text(
        "import pytest\nimport comfy.sd\npytestmark = pytest.mark.comfy\ndef test_a(): pass\ndef test_b(): pass\n"
    )
    (tests / "test_core.py").write_text("import pytest\n@pytest.mark.comfy\ndef test_c(): 1 / 0\ndef test_d(): pass\n")
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib", str(tests)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"HOME": str(tmp_path), "USERPROFILE": str(tmp_path), "PATH": ""},
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "3 tests were NOT RUN: no ComfyUI found" in ran.stdout
    assert "1 passed, 3 skipped" in ran.stdout
