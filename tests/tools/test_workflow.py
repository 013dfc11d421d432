"""Saved workflows become the prompt the frontend would send."""

import pytest
import workflow

SCHEMAS = {
    "CheckpointLoaderSimple": {"input": {"required": {"ckpt_name": [["a.safetensors"]]}}},
    "KSampler": {
        "display_name": "K Sampler",
        "input": {
            "required": {
                "model": ["MODEL", {}],
                "seed": ["INT", {"control_after_generate": True}],
                "steps": ["INT", {}],
                "scheduler": ["COMBO", {"options": ["normal"]}],
            },
            "optional": {"vae": ["VAE"], "note": ["STRING", {}], "wired": ["INT", {"forceInput": True}]},
        },
    },
}


def saved(**changes):
    sampler = {
        "id": 2,
        "type": "KSampler",
        "inputs": [{"name": "model", "link": 7}, {"name": "vae", "link": None}],
        "widgets_values": [5, "fixed", 20, "normal", "hi"],
    }
    return {
        "nodes": [
            {"id": 1, "type": "CheckpointLoaderSimple", "inputs": [], "widgets_values": ["a.safetensors"]},
            {**sampler, **changes},
            {"id": 3, "type": "MarkdownNote", "widgets_values": ["read me"]},
        ],
        "links": [[7, 1, 0, 2, 0, "MODEL"]],
    }


def test_widgets_are_read_by_position_and_links_by_socket():
    prompt = workflow.to_api(saved(), SCHEMAS)
    assert set(prompt) == {"1", "2"}
    assert prompt["2"]["inputs"] == {"model": ["1", 0], "seed": 5, "steps": 20, "scheduler": "normal", "note": "hi"}
    assert prompt["2"]["_meta"]["title"] == "K Sampler"


def test_a_wrong_number_of_widget_values_is_refused_with_the_node_named():
    with pytest.raises(ValueError, match=r"KSampler \(2\) has 4 widget values but its schema has 5"):
        workflow.to_api(saved(widgets_values=[5, 20, "normal", "hi"]), SCHEMAS)


def test_an_unknown_node_is_refused():
    with pytest.raises(ValueError, match=r"Missing \(2\) is not a node"):
        workflow.to_api(saved(type="Missing"), SCHEMAS)


def test_muted_nodes_are_left_out_and_bypassed_ones_refused():
    assert set(workflow.to_api(saved(mode=2), SCHEMAS)) == {"1"}
    with pytest.raises(ValueError, match="bypassed"):
        workflow.to_api(saved(mode=4), SCHEMAS)


def test_one_loader_can_take_the_place_of_three():
    loaders = [
        {"id": number, "type": kind, "outputs": [{"name": "X", "links": [number]}], "widgets_values": ["file"]}
        for number, kind in ((1, "UNETLoader"), (2, "DualCLIPLoader"), (3, "VAELoader"))
    ]
    user = {"id": 4, "type": "Any", "inputs": [{"name": f"i{n}", "link": n} for n in (1, 2, 3)], "title": "User"}
    links = [[n, n, 0, 4, n - 1, "X"] for n in (1, 2, 3)]
    saved_ = {"nodes": [*loaders, user], "links": links}
    result = workflow.with_loader(saved_, "Toy")
    schemas = {"Toy": {"input": {"required": {}}}, "Any": {"input": {"required": {}}}}
    assert workflow.to_api(result, schemas)["4"]["inputs"] == {"i1": ["1", 0], "i2": ["1", 1], "i3": ["1", 2]}
    assert [node["type"] for node in result["nodes"]] == ["Toy", "Any"]
    assert saved_["links"][1] == [2, 2, 0, 4, 1, "X"]
    assert workflow.titled(result, "User") == "4"


def test_values_are_set_by_name_and_an_unknown_name_is_an_error():
    changed = workflow.with_values(saved(), SCHEMAS, "KSampler", steps=3)
    assert workflow.to_api(changed, SCHEMAS)["2"]["inputs"]["steps"] == 3
    with pytest.raises(KeyError, match="no widget stepz"):
        workflow.with_values(saved(), SCHEMAS, "KSampler", stepz=3)
