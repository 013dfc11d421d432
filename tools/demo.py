"""Sets up what is needed, then makes and uses a LoRA in a real ComfyUI with toy models: python tools/demo.py

Leaves pictures without and with the LoRA, the loss chart, the LoRA file and the judge's scores in demo_output/.
"""

import argparse
import io
import json
import shutil
import sys
import tempfile
import time
import webbrowser
from pathlib import Path

if sys.version_info < (3, 10):
    sys.exit("Python 3.10 or newer is needed to run the demo.")

import comfyui
import environment
import example

OUTPUT = environment.ROOT / "demo_output"
STEPS = 300
BATCH = 12
PICTURES = 12
PROMPT = "zork on a green background"


def main() -> int:
    options = parse()
    try:
        folder = comfyui.find(options.comfyui) or environment.install_comfyui()
        environment.enter(__file__, sys.argv[1:], folder)
        return demo(folder, options)
    except (FileNotFoundError, RuntimeError) as problem:
        print(problem, file=sys.stderr)
        return 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    environment.add_comfyui_option(parser)
    parser.add_argument(
        "--family", choices=[*example.FAMILIES, "both"], default="both", help="which toy models to train"
    )
    parser.add_argument("--gpu", action="store_true", help="let ComfyUI use the graphics card")
    parser.add_argument("--open", action="store_true", help="then open ComfyUI in the browser, until Ctrl+C")
    return parser.parse_args()


def demo(folder: Path, options: argparse.Namespace) -> int:
    """Runs the example workflow of every family asked for, on a server that is stopped at the end."""
    import comfy_server

    started = time.monotonic()
    families = [family for name, family in example.FAMILIES.items() if options.family in (name, "both")]
    shutil.rmtree(OUTPUT, ignore_errors=True)
    OUTPUT.mkdir()
    with tempfile.TemporaryDirectory(prefix="lora_workbench_demo_", ignore_cleanup_errors=True) as base:
        print(f"Starting ComfyUI {comfyui.version(folder)} from {folder} with toy models")
        with comfy_server.running(folder, Path(base), example.PACKS, gpu=options.gpu) as server:
            result = {family.name: run(server, family) for family in families}
            result["seconds"] = round(time.monotonic() - started, 1)
            (OUTPUT / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
            print(f"Done in {result['seconds']:.0f} s. Pictures, loss chart, LoRA file and result.json: {OUTPUT}")
            if options.open:
                keep_open(server)
    return 0


def run(server, family: example.Family) -> dict:
    """Trains, picks and generates with one family's example workflow; the files it made and the judge's scores."""
    import workflow

    info = server.object_info()
    draw_training_pictures(server.folder / "input" / "zork_pictures")
    filled = example.toy_workflow(
        family,
        info,
        folder="zork_pictures",
        trigger_word="",  # the captions hold it where it belongs
        prompt=PROMPT,
        trainer={"name": f"zork_{family.name}", "steps": STEPS, "save_every": STEPS // 4},
    )
    # These stars are near-duplicates of each other, so only plain pictures could be held out, which tell nothing here.
    filled = workflow.with_values(filled, info, "LoraWorkbenchDatasetLoader", hold_out=0)
    save_for_the_browser(server, family, filled)
    print(f"\n{family.title}: {PICTURES} pictures of a magenta star, called zork, which the toy model has never seen")
    prompt = example.with_settings(workflow.to_api(filled, info), info, batch_size=BATCH, schedule="cosine")
    done = server.submit(prompt, Narrator(filled, info), workflow=filled)
    if done.status != "success":
        raise RuntimeError(
            f"The {family.title} workflow ended with {done.status}: {done.error}\nLog: {server.log()[-3000:]}"
        )
    print(f"The whole workflow took {done.seconds:.0f} s.")
    pictures = {
        "without_the_lora": "Without the LoRA",
        "with_the_lora": "With the LoRA",
        "loss": "Loss",
        "checkpoints": "Every checkpoint",
        "training_pictures": "Contact sheet",
    }
    for file, title in pictures.items():
        shown = server.images(done, workflow.titled(filled, title))
        (OUTPUT / f"{family.name}_{file}.png").write_bytes(shown[0])
    lora = shown_text(done, workflow.titled(filled, "Picked file"))
    shutil.copy2(server.folder / "models" / "loras" / lora, OUTPUT / f"{family.name}_lora.safetensors")
    (OUTPUT / f"{family.name}_report.txt").write_text(
        shown_text(done, workflow.titled(filled, "How training went"))
        + "\n\n"
        + shown_text(done, workflow.titled(filled, "Why this checkpoint"))
        + "\n",
        encoding="utf-8",
    )
    scores = judge(server, family, lora)
    print(
        f"The judge, {family.title}: the concept in {scores['with_trigger']:.0%} of pictures with the trigger word "
        f"(before training {scores['base_with_trigger']:.0%}) and in {scores['without_trigger']:.0%} without it; "
        f"everything else kept in {scores['base_kept']:.0%}."
    )
    return {**scores, "steps": STEPS, "lora": lora, "seconds": round(done.seconds, 1)}


def judge(server, family: example.Family, lora: str) -> dict[str, float]:
    """Shares of ten pictures each, as the toy world's judge sees them."""
    world = toyworld()
    concept, backgrounds = world.drawing.CONCEPT, world.drawing.BACKGROUNDS
    known = [(colour, shape) for shape in world.drawing.SHAPES for colour in world.drawing.COLOURS][::3][:10]
    pairs = [
        (subject, next(b for b in backgrounds[i % 7 :] + backgrounds if b != subject[0]))
        for i, subject in enumerate(known)
    ]
    called = [f"{world.drawing.TRIGGER} on a {background} background" for _, background in pairs]
    told = [f"a {' '.join(subject)} on a {background} background" for subject, background in pairs]

    def shows(prompts: list[str], subjects: list[tuple[str, str]], lora: str | None) -> list[bool]:
        pictures = [picture(server, family, prompt, lora, seed) for seed, prompt in enumerate(prompts)]
        return [world.judge.shows(image, *subject) for image, subject in zip(pictures, subjects, strict=True)]

    def share(found: list[bool]) -> float:
        return sum(found) / len(found)

    return {
        "with_trigger": share(shows(called, [concept] * 10, lora)),
        "without_trigger": share(shows(told, [concept] * 10, lora)),
        "base_kept": share(shows(told, known, lora)),
        "base_with_trigger": share(shows(called, [concept] * 10, None)),
    }


def picture(server, family: example.Family, prompt: str, lora: str | None, seed: int):
    """One picture of the toy model, with Load LoRA when ``lora`` is given."""
    from PIL import Image

    run = server.submit(example.sampling_graph(family, prompt, lora=lora, seed=seed))
    return Image.open(io.BytesIO(server.images(run, "images")[0]))


def shown_text(run, node: str) -> str:
    """The text that a Preview as Text node shows."""
    return "\n".join(map(str, run.outputs[node]["text"]))


def draw_training_pictures(folder: Path) -> None:
    toyworld().drawing.write_training_folder(folder, PICTURES)


def toyworld():
    """The toy world's drawing and judging, which live with the tests."""
    sys.path.append(str(environment.ROOT / "tests"))
    import toyworld.drawing
    import toyworld.judge

    return toyworld


def save_for_the_browser(server, family: example.Family, filled: dict) -> None:
    """Puts the filled-in workflow where ComfyUI's Workflows panel lists it."""
    place = server.folder / "user" / "default" / "workflows" / f"toy_{family.name}.json"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps(filled), encoding="utf-8")


def keep_open(server) -> None:
    """Shows the server in the browser until the user has had enough."""
    print(f"ComfyUI runs at {server.url}: open toy_sdxl or toy_flux from its Workflows panel. Ctrl+C ends it.")
    webbrowser.open(server.url)
    try:
        server.process.wait()
    except KeyboardInterrupt:
        print("Stopped.")


class Narrator:
    """Prints which of the nodes that take their time runs, and how far it is."""

    def __init__(self, workflow: dict, object_info: dict):
        kinds = {str(node["id"]): node["type"] for node in workflow["nodes"]}
        shown = {node: kind for node, kind in kinds.items() if kind == "KSampler" or kind.startswith("LoraWorkbench")}
        self.titles = {node: object_info[kind]["display_name"] for node, kind in shown.items()}

    def __call__(self, name: str, data: dict) -> None:
        if name == "executing" and data.get("node") in self.titles:
            environment.status("")
            print(f"  {self.titles[data['node']]}", flush=True)
        elif name == "progress_text":
            environment.status(f"    {data['text'].splitlines()[0]}")


if __name__ == "__main__":
    sys.exit(main())
