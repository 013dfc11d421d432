"""Sets up what is needed, then runs all tests: python tools/test.py [--comfyui PATH] [-- arguments for pytest]"""

import argparse
import os
import subprocess
import sys

if sys.version_info < (3, 10):
    sys.exit("Python 3.10 or newer is needed to run the tests.")

import comfyui
import environment

PAGES = "tests/browser"
MOST_WORKERS = 4
"""Processes that share all tests; each has up to 3 GB, and a ComfyUI of its own."""


def main() -> int:
    options, for_pytest = parse(sys.argv[1:])
    try:
        folder = comfyui.find(options.comfyui)
        python = environment.prepare(folder)
    except (FileNotFoundError, environment.SetupError) as problem:
        print(problem, file=sys.stderr)
        return 1
    variables = {**os.environ, "PYTHONPYCACHEPREFIX": str(python.parents[1] / "pycache")}
    # The toy models are so small that threads only wait for each other, and a page beside them gets no turn.
    variables.setdefault("OMP_NUM_THREADS", "1")
    if folder:
        variables["COMFYUI_PATH"] = str(folder)
        print(f"ComfyUI {comfyui.version(folder)} in {folder}", flush=True)
    outcomes = [
        subprocess.call([str(python), "-m", "pytest", *arguments], cwd=environment.ROOT, env=variables)
        for arguments in ([for_pytest] if for_pytest else all_tests(min(MOST_WORKERS, os.cpu_count() or 1)))
    ]
    return next(filter(None, outcomes), 0)


def all_tests(processes: int) -> list[list[str]]:
    """The arguments of two runs: a page in a browser alone, since it needs its turns; all others by some processes.

    These share them file by file in their order, in which the slowest come first.
    """
    shared = ["-n", str(processes), "--dist", "loadfile", "--no-loadscope-reorder"]
    return [[PAGES], [*shared, f"--ignore={PAGES}"]]


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our own options, and what follows ``--``."""
    split = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(description=__doc__)
    environment.add_comfyui_option(parser)
    return parser.parse_args(arguments[:split]), arguments[split + 1 :]


if __name__ == "__main__":
    sys.exit(main())
