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
    prompt = {
        "1": {"class_type": "UNETLoader", "inputs": {}},
        "2": {"class_type": "DualCLIPLoader", "inputs": {}},
        "3": {"class_type": "VAELoader", "inputs": {}},
        "4": {"class_type": "Any", "inputs": {"model": ["1", 0], "clip": ["2", 0], "vae": ["3", 0], "seed": 1}},
    }
    result = workflow.with_loader(prompt, "Toy")
    assert set(result) == {"4", "loader"}
    assert result["4"]["inputs"] == {"model": ["loader", 0], "clip": ["loader", 1], "vae": ["loader", 2], "seed": 1}
    assert prompt["4"]["inputs"]["model"] == ["1", 0]


def test_setting_an_input_that_is_not_there_is_an_error():
    prompt = workflow.to_api(saved(), SCHEMAS)
    assert workflow.with_inputs(prompt, "KSampler", steps=3)["2"]["inputs"]["steps"] == 3
    with pytest.raises(KeyError, match="no input stepz"):
        workflow.with_inputs(prompt, "KSampler", stepz=3)
