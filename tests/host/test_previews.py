"""What the page shows on a node: kept when it is cached, and there when the node fails."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import folder_paths
import numpy as np
import pytest
from comfy_api.latest import io
from PIL import Image
from skimage import data

from nodes import NODE_CLASS_MAPPINGS

from .executor import Executor, Prompt, executed, failures, load_kept, shown

EMBEDDED = "microworld (embedded)"


@pytest.fixture
def executor(pack: Any, monkeypatch: pytest.MonkeyPatch) -> Executor:
    """Its messages go where a node's own would: to the server."""
    import server

    load_kept()
    made = Executor()
    monkeypatch.setattr(server.PromptServer, "instance", made.recorder, raising=False)
    return made


def graph(**changes: Any) -> Prompt:
    """Micro Portrait or ``photo`` -> Align Face -> an output."""
    photo = changes.pop("photo", None)
    values = {"choose": "largest", "index": 0, "order": "left to right", "padding": 0.25,
              "if_no_face": "error"} | changes  # fmt: skip
    picture = ["photo", 0] if photo else ["portrait", 0]
    models = {"pack": EMBEDDED, "provider": "CPU", "detector_size": 640}
    prompt = {
        "portrait": ("InfiniteIDMicroPortrait", {"person": 3, "size": 256}),
        "models": ("InfiniteIDFaceModelLoader", models),
        "align": ("InfiniteIDAlignFace",
                  {"face_analysis": ["models", 0], "image": picture, **values}),
        "out": ("Kept", {"source": ["align", 0]}),
    }  # fmt: skip
    if photo:
        prompt["photo"] = ("LoadImage", {"image": photo})
    return {key: {"class_type": kind, "inputs": inputs} for key, (kind, inputs) in prompt.items()}


def pictures(output: dict[str, Any]) -> list[np.ndarray]:
    """The previews of a node's output, as the page would fetch them."""
    folder = Path(folder_paths.get_temp_directory())
    return [np.asarray(Image.open(folder / image["filename"])) for image in output["images"]]


# --- cached ----------------------------------------------------------------------------------


def test_previews_stay_on_a_cached_rerun(executor: Executor) -> None:
    executor.run(graph(), ["out"])
    first = executor.host.history_result["outputs"]
    events = executor.run(graph(), ["out"])
    assert executed(events) == set()
    again = executor.host.history_result["outputs"]
    for node in ("align", "portrait"):
        assert again[node]["images"] and again[node] == first[node]
    if "has_intermediate_output" in {field.name for field in fields(io.Schema)}:
        assert len(shown(events, "align")) == len(shown(events, "portrait")) == 1


def test_every_node_with_a_preview_keeps_it(pack: Any) -> None:
    """Output nodes do; others ask for it, where the host's schema lets them."""
    known = "has_intermediate_output" in {field.name for field in fields(io.Schema)}
    for name in ("InfiniteIDAlignFace", "InfiniteIDMicroPortrait"):
        schema = NODE_CLASS_MAPPINGS[name].GET_SCHEMA()
        assert getattr(schema, "has_intermediate_output", None) == (True if known else None)


# --- failing ---------------------------------------------------------------------------------


def save(name: str, *pictures: np.ndarray) -> str:
    picture = np.concatenate(pictures, axis=1)
    Image.fromarray(picture).save(Path(folder_paths.get_input_directory()) / name)
    return name


def test_the_numbers_are_shown_where_the_number_was_wrong(executor: Executor) -> None:
    photo = save("pair.png", data.astronaut(), data.astronaut()[:, ::-1])
    events = executor.run(graph(photo=photo, choose="index", index=2), ["out"])
    (failed,) = failures(events)
    assert failed["exception_type"].endswith(".FaceIndexError")
    (output,) = shown(events, "align")
    (preview,) = pictures(output)
    assert preview.shape == (512, 1024, 3)
    plain = np.concatenate([data.astronaut(), data.astronaut()[:, ::-1]], axis=1)
    drawn = np.abs(preview.astype(int) - plain).max(axis=2) > 30
    assert drawn[:, :512].any() and drawn[:, 512:].any()  # a number on each of the two
    kinds = [event for event, _ in events]
    assert kinds.index("executed") < kinds.index("execution_error")
    sent = next(values for event, values in events if event == "executed")
    assert sent["display_node"] == "align" and sent["prompt_id"] == "test-prompt"


def test_the_picture_without_a_face_is_shown(executor: Executor) -> None:
    events = executor.run(graph(photo=save("nobody.png", data.astronaut() * 0)), ["out"])
    (failed,) = failures(events)
    assert failed["exception_type"].endswith(".NoFaceError")
    assert len(pictures(shown(events, "align")[0])) == 1


def test_a_failed_preview_does_not_hide_the_error(
    executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executor.recorder, "send_sync", None)
    executor.recorder.client_id = "test"
    with pytest.raises(Exception, match="was asked for") as caught:
        _execute_align(executor)
    assert type(caught.value).__name__ == "FaceIndexError"


def test_where_nobody_listens_the_error_is_the_same(
    executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor.recorder.client_id = None
    with pytest.raises(Exception, match="was asked for"):
        _execute_align(executor)
    assert executor.recorder.sent == []


def _execute_align(executor: Executor) -> None:
    """Align Face within the host's own context of a running node."""
    from comfy_execution.graph import DynamicPrompt
    from comfy_execution.progress import reset_progress_state
    from comfy_execution.utils import CurrentNodeContext

    prompt = graph(choose="index", index=9)
    reset_progress_state("test-prompt", DynamicPrompt(prompt))
    nodes = NODE_CLASS_MAPPINGS
    (image,) = nodes["InfiniteIDMicroPortrait"].execute(3, 256).args
    (models,) = nodes["InfiniteIDFaceModelLoader"].execute(EMBEDDED, "CPU", 640).args
    inputs = {**prompt["align"]["inputs"], "face_analysis": models, "image": image}
    with CurrentNodeContext("test-prompt", "align", 0):
        nodes["InfiniteIDAlignFace"].execute(**inputs)
