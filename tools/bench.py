"""Benchmarks: one command, one JSON line a case.

    python tools/bench.py                         mid-size models: ours, ComfyUI's TrainLoraNode, and the floor
    python tools/bench.py --size full --device cuda     full-size SDXL and FLUX with random weights
    python tools/bench.py memory                  what each way to save memory costs in time
    python tools/bench.py peaks --dtype bf16      peak memory of full-size networks, counted on a CPU (half an hour)
    python tools/bench.py quality                 train the toy concept for several seeds and judge the pictures
    python tools/bench.py quality --trial lora dora pivotal     in other ways; bench_trials.py has the list
    python tools/bench.py picking --seeds 0 1     train too short, well and too long, and judge what the Picker takes
    python tools/bench.py stack                   four LoRAs by LoRA Stack Apply and by four chained Load LoRA nodes

Times mean something only as ratios within one line: the three are measured in turn, in one process. On a CPU they are
CPU seconds with one thread, since wall time on a shared machine says little. The floor is forward and backward with
respect to the input of the bare frozen model.
"""

import argparse
import json
import logging
import shutil
import sys
import tempfile
from itertools import product
from pathlib import Path

import comfyui
import environment

ROOT = Path(__file__).resolve().parents[1]
FEED_FORWARD = "attention + feed-forward"
JOBS = ("speed", "memory", "peaks", "quality", "picking", "stack")


def main() -> None:
    """Parse, enter the environment, and print a line a case."""
    options = parser().parse_args()
    folder = comfyui.find(options.comfyui)
    if folder is None:
        sys.exit("No ComfyUI was found: give --comfyui PATH.")
    if not options.here:
        environment.enter(__file__, sys.argv[1:], folder)
    base = enter_comfyui(folder, options.device)
    try:
        {job.__name__: job for job in (speed, memory, peaks, quality, picking, stack)}[options.what](options, base)
    finally:
        shutil.rmtree(base, ignore_errors=True)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    line = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    line.add_argument("what", nargs="?", choices=JOBS, default="speed")
    line.add_argument("--comfyui", metavar="PATH", help="the ComfyUI folder")
    line.add_argument(
        "--here", action="store_true", help="use this Python as it is instead of an environment of its own"
    )
    line.add_argument("--family", nargs="+", choices=("sdxl", "flux"), default=["sdxl", "flux"])
    line.add_argument("--size", nargs="+", choices=("toy", "mid", "full"), default=["mid"])
    line.add_argument("--batch", nargs="+", type=int, default=[1, 4])
    line.add_argument("--checkpointing", nargs="+", choices=("off", "on"), default=["off", "on"])
    line.add_argument("--layers", nargs="+", choices=("attention", FEED_FORWARD), default=[FEED_FORWARD])
    line.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    line.add_argument("--dtype", choices=("fp32", "bf16", "fp16", "fp8"), default="fp32")
    line.add_argument("--rounds", type=int, default=6, help="how often the three are measured in turn")
    line.add_argument("--without-trainlora", action="store_true", help="leave ComfyUI's own trainer out")
    line.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="for quality and picking")
    line.add_argument("--steps", type=int, default=0, help="for quality; 0 is what the recipe says")
    line.add_argument("--cfg", type=float, default=0, help="for quality: what pictures are drawn with; 0 is usual")
    line.add_argument("--trial", nargs="+", default=["lora"], help="for quality: ways to train")
    return line


def enter_comfyui(folder: Path, device: str) -> Path:
    """Make ComfyUI and the pack importable, in a folder of their own for models, input and output."""
    import torch

    base = Path(tempfile.mkdtemp(prefix="lora_workbench_bench_"))
    for name in ("models/loras", "input", "output", "temp", "user", "custom_nodes"):
        (base / name).mkdir(parents=True)
    sys.path[:0] = [str(folder), str(ROOT / "tests")]
    from comfy.cli_args import args

    args.cpu = device == "cpu"
    args.base_directory = str(base)
    logging.disable(logging.WARNING)
    if device == "cpu":
        torch.set_num_threads(1)
    import pack

    pack.load()
    return base


def speed(options: argparse.Namespace, base: Path) -> None:
    """A line for every combination asked for."""
    from bench_cases import Case, run_case

    every = product(options.size, options.family, options.batch, options.checkpointing, options.layers)
    for size, family, batch, checkpointing, layers in every:
        case = Case(size, family, batch, checkpointing == "on", layers, options.device, options.dtype)
        print(json.dumps(run_case(case, options.rounds, not options.without_trainlora)), flush=True)


def memory(options: argparse.Namespace, base: Path) -> None:
    """A line for every way to save memory, over each model and batch asked for."""
    from bench_cases import Case
    from bench_memory import memory_lines

    for size, family, batch, layers in product(options.size, options.family, options.batch, options.layers):
        case = Case(size, family, batch, False, layers, options.device, options.dtype)
        for line in memory_lines(case, options.rounds):
            print(json.dumps(line), flush=True)


def peaks(options: argparse.Namespace, base: Path) -> None:
    """A line for every full-size network and way to recompute."""
    from bench_cases import Case
    from bench_peaks import peak_line

    from lora_workbench.training.memory import RECOMPUTE

    for family, layers, recompute in product(options.family, options.layers, reversed(RECOMPUTE)):
        case = Case("full", family, 1, False, layers, options.device, options.dtype)
        print(json.dumps(peak_line(case, recompute)), flush=True)


def quality(options: argparse.Namespace, base: Path) -> None:
    """A line for every family and seed: shares of pictures, 0 to 1, as the toy world's judge sees them."""
    import torch
    from bench_quality import judged_training

    torch.set_num_threads(2)
    for trial, family, seed in product(options.trial, options.family, options.seeds):
        print(json.dumps(judged_training(family, seed, options.steps, base, trial, options.cfg)), flush=True)


def picking(options: argparse.Namespace, base: Path) -> None:
    """A line for every family, way to train and seed, and at the end all of them as a table."""
    from bench_picking import REGIMES, picked_training, table

    lines = []
    for family, regime, seed in product(options.family, REGIMES, options.seeds):
        lines.append(picked_training(family, regime, seed, base))
        print(json.dumps(lines[-1]), flush=True)
    print(table(lines))


def stack(options: argparse.Namespace, base: Path) -> None:
    """A line for every model."""
    from bench_stack import stack_line

    for size, family in product(options.size, options.family):
        print(json.dumps(stack_line(size, family, options.rounds, base)), flush=True)


if __name__ == "__main__":
    main()
