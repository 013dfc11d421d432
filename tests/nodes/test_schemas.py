"""What every node declares: the public contract, help for everything, and no more widgets than can be seen."""

import inspect
from dataclasses import asdict, fields
from pathlib import Path

import pytest
from comfy_api.latest import io

from lora_workbench.nodes.checkpoint_picker import LoraWorkbenchCheckpointPicker
from lora_workbench.nodes.extension import NODES
from lora_workbench.nodes.sockets import CATEGORY
from lora_workbench.nodes.trainer import LoraWorkbenchTrainer
from lora_workbench.nodes.training_settings import LoraWorkbenchTrainingSettings
from lora_workbench.training.config import LoraConfig, TrainConfig
from lora_workbench.training.presets import ExpertSettings

pytestmark = pytest.mark.comfy
every_node = pytest.mark.parametrize("node", NODES, ids=lambda node: node.__name__)

CONTRACT = {
    "LoraWorkbenchDatasetLoader": (
        "LoRA Dataset Loader",
        "folder trigger_word resolution",
        "dataset LORA_DATASET, contact_sheet IMAGE, report STRING",
    ),
    "LoraWorkbenchAutoCaptioner": (
        "LoRA Auto-Captioner",
        "dataset captioner style mode clip",
        "dataset LORA_DATASET, report STRING",
    ),
    "LoraWorkbenchTrainer": (
        "LoRA Trainer",
        "model clip vae dataset name preset steps learning_rate rank save_every preview_prompts seed resume settings",
        "model MODEL, clip CLIP, checkpoints LORA_CHECKPOINTS, lora_stack LORA_STACK, lora_name STRING, "
        "previews IMAGE, loss_chart IMAGE, report STRING",
    ),
    "LoraWorkbenchTrainingSettings": ("LoRA Training Settings", "", "settings LORA_TRAINING_SETTINGS"),
    "LoraWorkbenchCheckpointPicker": (
        "LoRA Checkpoint Picker",
        "checkpoints model clip vae pick preference prompts",
        "model MODEL, clip CLIP, lora_stack LORA_STACK, lora_name STRING, step INT, grid IMAGE, "
        "report STRING, scores IMAGE",
    ),
    "LoraWorkbenchStackApply": (
        "LoRA Stack Apply",
        "model clip lora_stack rows missing prompt xray",
        "model MODEL, clip CLIP, lora_stack LORA_STACK, trigger_words STRING, report STRING, prompt STRING",
    ),
    "LoraWorkbenchRegularizationImages": (
        "LoRA Regularization Images",
        "model clip vae prompt count width height seed weight steps cfg sampler scheduler negative_prompt",
        "dataset LORA_DATASET, images IMAGE, report STRING",
    ),
    "LoraWorkbenchConvertLora": (
        "Convert LoRA",
        "lora lora_name name form alpha precision",
        "lora_stack LORA_STACK, lora_name STRING, report STRING",
    ),
    "LoraWorkbenchInspectLora": (
        "Inspect LoRA",
        "lora lora_name write_workflow",
        "report STRING, chart IMAGE, workflow STRING",
    ),
    "LoraWorkbenchMergeLoras": (
        "Merge LoRAs",
        "lora_stack lora_1 weight_1 lora_2 weight_2 name method rank density seed precision",
        "lora_stack LORA_STACK, lora_name STRING, report STRING",
    ),
    "LoraWorkbenchExtractLora": (
        "Extract LoRA",
        "model model_base clip clip_base file file_base name rank energy precision",
        "lora_stack LORA_STACK, lora_name STRING, report STRING",
    ),
    "LoraWorkbenchResizeLora": (
        "Resize LoRA",
        "lora lora_name name by rank energy ratio precision",
        "lora_stack LORA_STACK, lora_name STRING, report STRING",
    ),
}
MOST_WIDGETS = 10
TRAINING_NODES = (LoraWorkbenchTrainer, LoraWorkbenchTrainingSettings, LoraWorkbenchCheckpointPicker)


def inputs(node) -> dict:
    return {entry.id: entry for entry in node.GET_SCHEMA().inputs}


def test_the_nodes_are_those_of_the_contract():
    assert [node.GET_SCHEMA().node_id for node in NODES] == list(CONTRACT)


@every_node
def test_names_inputs_and_outputs_are_those_of_the_contract(node):
    schema = node.GET_SCHEMA()
    title, taken, given = CONTRACT[schema.node_id]
    assert (schema.node_id, schema.display_name, schema.category) == (node.__name__, title, CATEGORY)
    assert set(taken.split()) <= inputs(node).keys()
    assert ", ".join(f"{output.id} {output.get_io_type()}" for output in schema.outputs) == given


@every_node
def test_everything_is_explained(node):
    schema = node.GET_SCHEMA()
    assert schema.description and schema.description.strip().endswith(".")
    for entry in (*schema.inputs, *schema.outputs):
        assert entry.tooltip and len(entry.tooltip) > 10 and entry.tooltip.rstrip().endswith((".", ")")), entry.id


@every_node
def test_no_more_widgets_are_seen_than_fit(node):
    seen = [entry.id for entry in node.GET_SCHEMA().inputs if isinstance(entry, io.WidgetInput) and not entry.advanced]
    assert len(seen) <= MOST_WIDGETS, seen


@every_node
def test_execute_takes_the_inputs_that_are_declared(node):
    parameters = inspect.signature(node.execute).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    assert takes_any or set(inputs(node)) <= set(parameters)
    for name, entry in inputs(node).items():
        if entry.optional and name in parameters:
            assert parameters[name].default is not parameters[name].empty, name


@every_node
def test_a_seed_stays_until_it_is_changed(node):
    """A new seed after every queue would train, and draw, everything again."""
    for name, entry in inputs(node).items():
        if name == "seed":
            assert entry.control_after_generate in (False, "fixed")


@every_node
def test_defaults_lie_within_their_own_limits(node):
    for entry in node.GET_SCHEMA().inputs:
        low, high, default = (getattr(entry, name, None) for name in ("min", "max", "default"))
        if default is not None and low is not None:
            assert low <= default <= high, entry.id


def default(entry):
    """A combo without a default of its own starts at its first choice."""
    return entry.options[0] if entry.default is None and isinstance(entry, io.Combo.Input) else entry.default


def test_the_expert_settings_are_all_there_and_start_at_what_is_used_without_them():
    given = {name: default(entry) for name, entry in inputs(LoraWorkbenchTrainingSettings).items()}
    assert given == asdict(ExpertSettings())
    assert LoraWorkbenchTrainingSettings.execute(**given).args == (ExpertSettings(),)


def test_the_limits_of_the_widgets_are_those_of_the_configurations():
    for node in (LoraWorkbenchTrainingSettings, LoraWorkbenchTrainer):
        for name, entry in inputs(node).items():
            for config in (TrainConfig, LoraConfig):
                low, high = getattr(entry, "min", None), getattr(entry, "max", None)
                if name not in {field.name for field in fields(config)} or low is None or name == "seed":
                    continue
                config(**{name: high})
                if name == "weight_decay":
                    assert low == ExpertSettings().weight_decay == -1  # as suits the kind
                else:
                    assert config(**{name: low}) if node is LoraWorkbenchTrainingSettings else low == 0
                with pytest.raises(ValueError, match=f"^{name} is "):
                    config(**{name: high * 2 + 1})


def test_the_trainer_leaves_everything_to_the_preset_unless_it_is_told_otherwise():
    given = inputs(LoraWorkbenchTrainer)
    assert {name: given[name].default for name in ("steps", "learning_rate", "rank", "save_every")} == {
        "steps": 0,
        "learning_rate": 0.0,
        "rank": 0,
        "save_every": 0,
    }


@pytest.mark.parametrize("node", TRAINING_NODES, ids=lambda node: node.__name__)
def test_the_help_page_is_there_and_says_what_the_node_is(node):
    page = Path(__file__).resolve().parents[2] / "web" / "docs" / f"{node.GET_SCHEMA().node_id}.md"
    assert page.is_file() and len(page.read_text(encoding="utf-8")) > 300
