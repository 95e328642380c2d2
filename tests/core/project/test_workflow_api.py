"""From the page's graph to the server's prompt: what is a widget, what is a link, what is gone."""

from __future__ import annotations

from typing import Any

import pytest

from tools.workflow_api import UnknownNode, UnsupportedGraph, WorkflowError, to_api

INFO: dict[str, Any] = {
    "Load": {
        "input": {"required": {"image": [["a.png", "b.png"], {"image_upload": True}]}},
        "display_name": "Load Image",
    },
    "Sampler": {
        # Deliberately not in widget order: input_order decides.
        "input": {
            "required": {
                "cfg": ["FLOAT", {"default": 8.0}],
                "seed": ["INT", {"default": 0}],
                "model": ["MODEL"],
                "steps": ["INT", {"default": 20}],
            },
            "optional": {"note": ["STRING", {"default": "none"}], "mask": ["MASK"]},
        },
        "input_order": {
            "required": ["model", "seed", "steps", "cfg"],
            "optional": ["mask", "note"],
        },
    },
    "Model": {
        "input": {
            "required": {
                "kind": ["COMBO", {"options": ["x", "y"], "control_after_generate": True}],
                "depth": ["INT", {"default": 1}],
            }
        }
    },
    "Patch": {
        "input": {
            "required": {
                "model": ["MODEL"],
                "amount": ["FLOAT", {"default": 1.0}],
                "text": ["STRING", {"forceInput": True}],
                "on": ["BOOLEAN", {"default": True}],
            }
        }
    },
    "Lists": {"input": {"required": {"points": ["STRING", {}]}}},
}


def node(number: int, kind: str, values: Any = None, **more: Any) -> dict[str, Any]:
    return {"id": number, "type": kind, "widgets_values": values, "inputs": [], **more}


def socket(name: str, kind: str, link: int | None) -> dict[str, Any]:
    return {"name": name, "type": kind, "link": link}


def graph(*nodes: dict[str, Any], links: list[Any] | None = None) -> dict[str, Any]:
    return {"nodes": list(nodes), "links": links or []}


def inputs(prompt: dict[str, Any], number: int) -> dict[str, Any]:
    found: dict[str, Any] = prompt[str(number)]["inputs"]
    return found


def chain(middle: dict[str, Any]) -> dict[str, Any]:
    """Model (1) -> middle (2) -> Sampler (3)."""
    return graph(
        node(1, "Model", ["x", "fixed", "", 3], outputs=[{"type": "MODEL"}]),
        middle,
        node(3, "Sampler", [5, "fixed", 10, 4.0], inputs=[socket("model", "MODEL", 11)]),
        links=[[10, 1, 0, 2, 0, "MODEL"], [11, 2, 0, 3, 0, "MODEL"]],
    )


def test_seed_control_is_skipped_and_the_servers_order_holds() -> None:
    prompt = to_api(graph(node(7, "Sampler", [1234, "randomize", 30, 5.5, "hello"])), INFO)
    assert prompt == {
        "7": {
            "class_type": "Sampler",
            "inputs": {"seed": 1234, "steps": 30, "cfg": 5.5, "note": "hello"},
            "_meta": {"title": "Sampler"},
        }
    }


def test_combo_control_takes_two_places() -> None:
    prompt = to_api(graph(node(1, "Model", ["y", "increment", "filter", 9])), INFO)
    assert inputs(prompt, 1) == {"kind": "y", "depth": 9}


@pytest.mark.parametrize("values", [["b.png", "image"], ["b.png"]])
def test_upload_button_may_be_stored_or_not(values: list[str]) -> None:
    prompt = to_api(graph(node(1, "Load", values, title="My photo")), INFO)
    assert inputs(prompt, 1) == {"image": "b.png"}
    assert prompt["1"]["_meta"] == {"title": "My photo"}


def test_missing_values_take_the_defaults() -> None:
    prompt = to_api(graph(node(1, "Sampler", [77, "fixed"])), INFO)
    assert inputs(prompt, 1) == {"seed": 77, "steps": 20, "cfg": 8.0, "note": "none"}


def test_values_by_name() -> None:
    prompt = to_api(graph(node(1, "Sampler", {"cfg": 2.0, "seed": 3})), INFO)
    assert inputs(prompt, 1) == {"seed": 3, "steps": 20, "cfg": 2.0, "note": "none"}


def test_list_values_are_not_taken_for_links() -> None:
    prompt = to_api(graph(node(1, "Lists", [["1", 0]])), INFO)
    assert inputs(prompt, 1) == {"points": {"__value__": ["1", 0]}}


def test_link_replaces_a_widget_that_became_an_input() -> None:
    prompt = to_api(
        graph(
            node(1, "Model", ["x", "fixed", "", 3]),
            node(
                2,
                "Sampler",
                [1, "fixed", 30, 5.5],
                inputs=[{**socket("steps", "INT", 4), "widget": {"name": "steps"}}],
            ),
            links=[{"id": 4, "origin_id": 1, "origin_slot": 1, "target_id": 2, "type": "INT"}],
        ),
        INFO,
    )
    assert inputs(prompt, 2)["steps"] == ["1", 1]
    assert inputs(prompt, 2)["cfg"] == 5.5


def test_force_input_takes_no_widget_place() -> None:
    prompt = to_api(graph(node(1, "Patch", [0.5, False])), INFO)
    assert inputs(prompt, 1) == {"amount": 0.5, "on": False}


def test_bypassed_node_passes_the_input_of_its_type() -> None:
    patch = node(
        2,
        "Patch",
        [0.5, True],
        mode=4,
        # The opposite input is of another type, so the type decides.
        inputs=[socket("text", "STRING", None), socket("model", "MODEL", 10)],
        outputs=[{"type": "MODEL"}],
    )
    prompt = to_api(chain(patch), INFO)
    assert list(prompt) == ["1", "3"]
    assert inputs(prompt, 3)["model"] == ["1", 0]


def test_muted_node_leaves_the_input_open() -> None:
    patch = node(2, "Patch", mode=2, inputs=[socket("model", "MODEL", 10)])
    prompt = to_api(chain(patch), INFO)
    assert list(prompt) == ["1", "3"]
    assert "model" not in inputs(prompt, 3)


def test_reroute_is_followed() -> None:
    reroute = node(2, "Reroute", inputs=[socket("", "*", 10)], outputs=[{"type": "MODEL"}])
    prompt = to_api(chain(reroute), INFO)
    assert list(prompt) == ["1", "3"]
    assert inputs(prompt, 3)["model"] == ["1", 0]


def test_primitive_gives_its_value() -> None:
    prompt = to_api(
        graph(
            node(1, "PrimitiveNode", [42, "fixed"]),
            node(2, "Sampler", [0, "fixed", 1, 1.0], inputs=[socket("steps", "INT", 5)]),
            node(3, "MarkdownNote", ["# read me"]),
            node(4, "Note", ["me too"]),
            links=[[5, 1, 0, 2, 0, "INT"]],
        ),
        INFO,
    )
    assert list(prompt) == ["2"]
    assert inputs(prompt, 2)["steps"] == 42


def test_unknown_type_is_named() -> None:
    with pytest.raises(UnknownNode, match="Node 9 has the type 'Nope'"):
        to_api(graph(node(9, "Nope")), INFO)


def test_muted_unknown_type_does_no_harm() -> None:
    assert to_api(graph(node(9, "Nope", mode=2)), INFO) == {}


def test_subgraph_is_refused() -> None:
    made = graph(node(1, "0c7e", title="Detail pass"))
    made["definitions"] = {"subgraphs": [{"id": "0c7e"}]}
    with pytest.raises(UnsupportedGraph, match="Node 1 is a subgraph \\('Detail pass'\\)"):
        to_api(made, INFO)


def test_api_prompt_is_no_graph() -> None:
    prompt = to_api(graph(node(1, "Lists", ["x"])), INFO)
    with pytest.raises(UnsupportedGraph, match="'nodes' and 'links'"):
        to_api(prompt, INFO)


def test_circle_of_reroutes_ends() -> None:
    reroute = node(2, "Reroute", inputs=[socket("", "*", 12)], outputs=[{"type": "MODEL"}])
    made = chain(reroute)
    made["links"].append([12, 2, 0, 2, 0, "MODEL"])
    with pytest.raises(WorkflowError, match="circle"):
        to_api(made, INFO)


def test_dangling_link_is_named() -> None:
    made = graph(node(2, "Sampler", [], inputs=[socket("model", "MODEL", 99)]))
    with pytest.raises(WorkflowError, match="Link 99"):
        to_api(made, INFO)
