"""Kills a real ComfyUI at random moments while it trains, and checks that nothing is ever lost: python tools/chaos.py

Every round trains the same LoRA from nothing with a toy model. The server is killed (SIGKILL) again and again, started
again and the graph queued again, until the training ends. After each kill every file must be whole or not there; at
the end of each round all LoRA files, the state and the previews must be, bit for bit, those of a run that nobody
disturbed.
"""

import argparse
import collections
import hashlib
import json
import random
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

if sys.version_info < (3, 10):
    sys.exit("Python 3.10 or newer is needed for this.")

import comfyui
import environment
import example

NAME, FOLDER, PICTURES = "chaos", "chaos_pictures", 5
STEPS, SAVE_EVERY, MOST_KILLS_A_ROUND = 12, 3, 6
TRAINER = "LoraWorkbenchTrainer"
FLAT = 0.03
"""Growth of the server's memory from the fifth cycle to the last that counts as none."""


def main() -> int:
    options = parse()
    try:
        folder = comfyui.find(options.comfyui) or environment.install_comfyui()
        if not options.here:
            environment.enter(__file__, sys.argv[1:], folder)
        with (
            tempfile.TemporaryDirectory(prefix="lora_workbench_chaos_", ignore_cleanup_errors=True) as base,
            World(folder, Path(base), example.FAMILIES[options.family]) as world,
        ):
            if options.cycles:
                return report_memory(memory_of_cycles(world, options.cycles))
            return report_kills(chaos(world, options.kills, random.Random(options.seed), say=say))
    except (FileNotFoundError, RuntimeError) as problem:
        print(problem, file=sys.stderr)
        return 1


def say(line: str) -> None:
    print(line, flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    environment.add_comfyui_option(parser)
    parser.add_argument("--here", action="store_true", help="use this Python instead of an environment of its own")
    parser.add_argument("--kills", type=int, default=50, help="how often the server is killed")
    parser.add_argument(
        "--cycles", type=int, default=0, help="instead: queue and cancel so often, and watch the memory"
    )
    parser.add_argument("--family", choices=list(example.FAMILIES), default="sdxl", help="which toy model to train")
    parser.add_argument("--seed", type=int, default=0, help="decides the moments of the kills")
    return parser.parse_args()


class Broken(RuntimeError):
    """Something was lost or half written; the message says what and where."""


@dataclass
class World:
    """A ComfyUI with a folder of its own, and the graph that is queued in it again and again."""

    comfyui: Path
    base: Path
    family: example.Family
    steps: int = STEPS
    save_every: int = SAVE_EVERY
    prompt: dict = field(default_factory=dict)
    _server: object = None
    _running: ExitStack = field(default_factory=ExitStack)

    def server(self):
        """The server, started if it is not running."""
        import comfy_server

        if self._server is None:
            self._server = self._running.enter_context(comfy_server.running(self.comfyui, self.base, example.PACKS))
            if not self.prompt:
                draw_pictures(self.base / "input" / FOLDER)
                self.prompt = training_graph(self)
        return self._server

    def stop(self) -> None:
        """End the server; harmless when there is none."""
        self._running.close()
        self._server = None

    def __enter__(self) -> "World":
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    @property
    def loras(self) -> Path:
        return self.base / "models" / "loras" / NAME

    @property
    def work(self) -> Path:
        return self.base / "output" / "lora_workbench"

    def forget(self) -> None:
        """Nothing was ever trained or encoded, and a running server remembers no output of a node."""
        if self._server is not None:
            self._server.post("/free", {"unload_models": True, "free_memory": True})
            # It happens before the queue's thread takes the next graph but one.
            picture = {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 0}}
            shown = {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}
            self._server.submit({"1": picture, "2": shown})
        shutil.rmtree(self.loras, ignore_errors=True)
        shutil.rmtree(self.work, ignore_errors=True)

    def results(self) -> dict[str, str]:
        """All that a training leaves behind and that must not depend on how often it was killed."""
        run = self.work / "runs" / NAME
        files = [*self.loras.iterdir(), run / "state.safetensors", *(run / "previews").iterdir()]
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@dataclass
class Tally:
    """What the kills met."""

    kills: int = 0
    rounds: int = 0
    seconds: float = 0.0
    files: int = 0
    leftovers: int = 0
    phases: collections.Counter = field(default_factory=collections.Counter)


def chaos(world: World, kills: int, moments: random.Random, say=lambda line: None) -> Tally:
    """Kill so often; raises Broken at the first thing that is lost, half written or different."""
    started, tally = time.monotonic(), Tally()
    server = world.server()
    run = server.submit(world.prompt)
    if run.status != "success":
        raise Broken(f"The undisturbed training ended with {run.status}: {run.error}")
    seconds = run.seconds
    wanted = world.results()
    check_settled(world)
    say(f"Undisturbed: {seconds:.1f} s, {len(wanted)} files. Killing {kills} times.")
    while tally.kills < kills:
        world.forget()
        killed_here = 0
        while True:
            last = killed_here == MOST_KILLS_A_ROUND or tally.kills == kills
            phase = one_queue(world, None if last else moments.uniform(0, 1.1 * seconds))
            if phase is None:
                break
            killed_here += 1
            tally.kills += 1
            tally.phases[phase] += 1
            files, leftovers = check_whole(world)
            tally.files += files
            tally.leftovers += leftovers
            say(f"kill {tally.kills}: {phase}; {files} files whole, {leftovers} unfinished ones")
        check_settled(world)
        found = world.results()
        if found != wanted:
            apart = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
            raise Broken(f"After {killed_here} kills these files differ from the undisturbed run: {', '.join(apart)}")
        tally.rounds += 1
    tally.seconds = time.monotonic() - started
    return tally


def one_queue(world: World, kill_after: float | None) -> str | None:
    """Queue the graph in a new server; the phase in which it was killed, or None when it came to its end."""
    texts = ["Queued"]

    def watch(name: str, data: dict) -> None:
        if name == "progress_text":
            texts.append(data["text"])

    server, killed = world.server(), threading.Event()

    def kill() -> None:
        killed.set()
        server.process.kill()

    timer = threading.Timer(kill_after, kill) if kill_after is not None else None
    if timer:
        timer.start()
    try:
        run = server.submit(world.prompt, watch)
    except (OSError, RuntimeError) as problem:
        if timer is None:
            raise Broken(f"The server stopped answering: {problem}") from problem
        server.process.wait()
        world.stop()
        return phase_of(texts[-1])
    finally:
        if timer:
            timer.cancel()
            timer.join()
    if run.status != "success":
        raise Broken(f"A resumed training ended with {run.status}: {run.error}")
    if killed.is_set():  # between its last word and now
        server.process.wait()
        world.stop()
    return None


def phase_of(text: str) -> str:
    """The progress text without its numbers, so that equal phases count together."""
    return " ".join("".join(letter for letter in text.split(",")[0] if not letter.isdigit()).split())[:40]


def check_whole(world: World) -> tuple[int, int]:
    """How many files there are and how many unfinished ones; Broken when one under its own name is not whole."""
    files = [path for top in (world.loras, world.work) if top.exists() for path in top.rglob("*") if path.is_file()]
    leftovers = [path for path in files if path.name.startswith(".writing-")]
    whole = [path for path in files if path not in leftovers]
    for path in whole:
        try:
            read_fully(path)
        except Exception as error:
            raise Broken(f"{path} is not whole: {type(error).__name__}: {error}") from error
    return len(whole), len(leftovers)


def read_fully(path: Path) -> None:
    """Reads a file as whoever needs it would; any exception means that it is not whole."""
    if path.suffix == ".safetensors":
        import safetensors.torch

        tensors = safetensors.torch.load_file(path)
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise ValueError("it holds values that are not finite")
    elif path.suffix in (".png", ".jpg"):
        from PIL import Image

        with Image.open(path) as picture:
            picture.load()
    elif path.suffix == ".json":
        json.loads(path.read_text(encoding="utf-8"))


def check_settled(world: World) -> None:
    """Broken when a training that ended left unfinished files behind; those of the shared cache are cleaned later."""
    left = [path for top in (world.loras, world.work / "runs") for path in top.rglob("*")]
    left = [path.name for path in left if path.name.startswith(".writing-")]
    if left:
        raise Broken(f"A finished training left unfinished files behind: {', '.join(left)}")


def memory_of_cycles(world: World, cycles: int) -> list[float]:
    """MB the server holds after each time a training was queued and cancelled in its fourth step or later."""
    sizes, server = [], world.server()
    for cycle in range(cycles):
        cancelled = []

        def cancel(name: str, data: dict, cancelled: list = cancelled) -> None:
            if name == "progress_text" and data["text"].startswith("Training: step 4") and not cancelled:
                cancelled.append(True)
                server.interrupt()

        run = server.submit(with_trainer(world.prompt, name=f"cycle_{cycle}", steps=400, save_every=400), cancel)
        if run.status != "interrupted":
            raise Broken(f"Cycle {cycle} ended with {run.status}: {run.error}")
        time.sleep(1)
        sizes.append(resident_megabytes(server.process.pid))
        print(f"cycle {cycle + 1}: {sizes[-1]:.0f} MB", flush=True)
    return sizes


def resident_megabytes(process: int) -> float:
    """Memory of a process that is really in use, as Linux counts it."""
    with open(f"/proc/{process}/status", encoding="ascii") as file:
        (line,) = [line for line in file if line.startswith("VmRSS:")]
    return int(line.split()[1]) / 1024


def training_graph(world: World) -> dict:
    """The example workflow up to its Trainer, with all that can be written: validation, previews and averages."""
    import workflow

    info = world.server().object_info()
    saved = example.toy_workflow(
        world.family,
        info,
        folder=FOLDER,
        trigger_word="zork",
        prompt="zork on a green background",
        trainer={"name": NAME, "steps": world.steps, "save_every": world.save_every, "rank": 4},
    )
    saved = workflow.with_values(saved, info, "LoraWorkbenchDatasetLoader", hold_out=1)
    prompt = workflow.to_api(saved, info)
    prompt = example.with_settings(prompt, info, ema=0.9, average_last=3)
    (trainer,) = [node for node, value in prompt.items() if value["class_type"] == TRAINER]
    return upstream(prompt, trainer)


def upstream(prompt: Mapping, node: str) -> dict:
    """The part of a graph that a node depends on."""
    found, ahead = {}, [node]
    while ahead:
        name = ahead.pop()
        if name not in found:
            found[name] = prompt[name]
            ahead += [value[0] for value in prompt[name]["inputs"].values() if isinstance(value, list)]
    return found


def with_trainer(prompt: Mapping, **values) -> dict:
    """The same graph with other values on its Trainer."""
    return {
        name: {**node, "inputs": {**node["inputs"], **values}} if node["class_type"] == TRAINER else node
        for name, node in prompt.items()
    }


def draw_pictures(folder: Path) -> None:
    """A few captioned pictures of a concept that the toy model has never seen."""
    sys.path.append(str(environment.ROOT / "tests"))
    from toyworld import drawing

    drawing.write_training_folder(folder, PICTURES)


def report_kills(tally: Tally) -> int:
    print(
        f"{tally.kills} kills in {tally.rounds} rounds, {tally.seconds / 60:.0f} minutes: every round ended with the "
        f"undisturbed files, bit for bit. {tally.files} files were read after kills and all were whole; "
        f"{tally.leftovers} unfinished ones were cleaned up."
    )
    for phase, count in tally.phases.most_common():
        print(f"  {count:3} {phase}")
    return 0


def report_memory(sizes: list[float]) -> int:
    first, last = sizes[min(4, len(sizes) - 1)], sizes[-1]
    growth = last / first - 1
    print(f"{len(sizes)} times queued and cancelled: {first:.0f} MB after the fifth, {last:.0f} MB after the last.")
    print("Flat." if growth <= FLAT else f"It grew by {growth:.1%}.")
    return 0 if growth <= FLAT else 1


if __name__ == "__main__":
    sys.exit(main())
