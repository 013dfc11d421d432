"""Every example workflow fits the nodes it is made of."""

import json

import example
import pytest
import workflow

pytestmark = pytest.mark.comfy

FILES = sorted(example.WORKFLOWS.glob("*.json"))


@pytest.fixture(params=FILES, ids=lambda file: file.stem)
def saved(request):
    return json.loads(request.param.read_text(encoding="utf-8"))


def test_there_are_examples_for_both_families():
    assert {family.file for family in example.FAMILIES.values()} <= {file.name for file in FILES}


def test_nodes_and_links_have_ids_of_their_own(saved):
    ids = [node["id"] for node in saved["nodes"]]
    links = [link[0] for link in saved["links"]]
    assert len(set(ids)) == len(ids) and len(set(links)) == len(links)
    assert saved["last_node_id"] >= max(ids) and saved["last_link_id"] >= max(links)


def test_every_widget_has_its_value_among_those_offered(saved, object_info):
    for node in workflow.to_api(saved, object_info).values():
        for name, (kind, options) in workflow.inputs(object_info[node["class_type"]]):
            value = node["inputs"].get(name)
            offered = kind if isinstance(kind, list) else options.get("options")
            if offered and value is not None and not is_file(name):
                assert value in offered, f"{node['class_type']}.{name}"


def is_file(name: str) -> bool:
    """Whether an input offers files, which are others on every machine."""
    return name.endswith("_name") or "_name1" in name or "_name2" in name


def test_links_join_sockets_that_exist_and_have_the_same_type(saved, object_info):
    nodes = {node["id"]: node for node in saved["nodes"]}
    for number, source, slot, target, place, kind in saved["links"]:
        output = nodes[source]["outputs"][slot]
        schema = object_info[nodes[source]["type"]]
        assert (output["name"], output["type"]) == (schema["output_name"][slot], schema["output"][slot])
        assert number in output["links"] and kind == output["type"]
        socket = nodes[target]["inputs"][place]
        accepted = dict(workflow.inputs(object_info[nodes[target]["type"]]))[socket["name"]][0]
        assert socket["link"] == number
        assert accepted in (kind, "*"), f"{nodes[target]['type']}.{socket['name']} takes {accepted}, not {kind}"


def test_every_required_socket_is_wired(saved, object_info):
    for node, part in workflow.to_api(saved, object_info).items():
        missing = set(object_info[part["class_type"]]["input"].get("required", {})) - set(part["inputs"])
        assert not missing, f"{part['class_type']} ({node})"


def test_flux_differs_from_sdxl_by_its_loader_and_guidance_only(object_info):
    sdxl, flux = (
        workflow.with_loader(json.loads((example.WORKFLOWS / family.file).read_text()), "ToyWorldSDXL")
        for family in (example.FAMILIES["sdxl"], example.FAMILIES["flux"])
    )
    alike = []
    for saved in (sdxl, flux):
        saved = workflow.with_values(saved, object_info, "KSampler", cfg=0, scheduler="simple")
        titles = {str(n["id"]): (n["type"], n.get("title"), tuple(n["pos"])) for n in saved["nodes"]}
        titles = {number: title if title[0] != "ToyWorldSDXL" else "loader" for number, title in titles.items()}
        alike.append(
            {titles[number]: named(part, titles) for number, part in workflow.to_api(saved, object_info).items()}
        )
    assert alike[0] == alike[1]


def named(part: dict, titles: dict) -> dict:
    """A node's inputs with the nodes they come from by title, since ids differ between files."""
    inputs = part["inputs"].items()
    return {name: (titles[value[0]], value[1]) if isinstance(value, list) else value for name, value in inputs}


@pytest.mark.parametrize("node", ["LoraWorkbenchTrainer", "LoraWorkbenchCheckpointPicker"])
def test_queueing_again_does_not_change_a_seed(object_info, node):
    """The frontend randomizes an input called seed after each run unless the schema says no: it would train anew."""
    assert "" not in list(workflow.widgets(object_info[node]))


@pytest.mark.parametrize(
    "node",
    [
        f"LoraWorkbench{name}"
        for name in (
            "DatasetLoader",
            "AutoCaptioner",
            "Trainer",
            "TrainingSettings",
            "CheckpointPicker",
            "StackApply",
        )
    ],
)
def test_every_input_and_output_has_a_tooltip_and_at_most_ten_widgets_are_visible(object_info, node):
    schema = object_info[node]
    assert [name for name, (_, options) in workflow.inputs(schema) if not options.get("tooltip")] == []
    assert all(schema["output_tooltips"]) and len(schema["output_tooltips"]) == len(schema["output"])
    options = dict(workflow.inputs(schema))
    assert len([name for name in workflow.widgets(schema) if name and not options[name][1].get("advanced")]) <= 10
    assert schema["category"] == "LoRA Workbench"
