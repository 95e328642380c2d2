"""What ComfyUI's page shows on our nodes: previews that stay, also when the node fails."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from comfy_api.latest import io

_FIELD = "has_intermediate_output"

# A cached node's preview is sent again only where its schema asks for it. 0.3.64 has no such field
# and needs none: there all cached previews belong to a run's result.
KEEPS_PREVIEW: dict[str, Any] = (
    {_FIELD: True} if _FIELD in {field.name for field in fields(io.Schema)} else {}
)


def found_by(*words: str) -> dict[str, Any]:
    """Other words by which people look for a node, where the host has a place for them."""
    known = "search_aliases" in {field.name for field in fields(io.Schema)}
    return {"search_aliases": list(words)} if known else {}


logger = logging.getLogger(__name__)


def show_before_failing(make: Callable[[], Any]) -> None:
    """Show the ``ui`` that ``make`` gives on a node that is about to raise.

    The host sends a node's ``ui`` with its result, so never with an error. Whatever goes wrong
    here must not hide the node's own error.
    """
    try:
        _send(make().as_dict())
    except Exception:
        logger.warning("Infinite-ID: the preview could not be shown.", exc_info=True)


def _send(output: dict[str, Any]) -> None:
    """As the host's executor does when a node is done. Quiet where nobody listens."""
    from comfy_execution.progress import get_progress_state
    from comfy_execution.utils import get_executing_context
    from server import PromptServer

    server, context = getattr(PromptServer, "instance", None), get_executing_context()
    if server is None or server.client_id is None or context is None:
        return
    prompt = get_progress_state().dynprompt
    message = {
        "node": context.node_id,
        "display_node": prompt.get_display_node_id(context.node_id),
        "output": output,
        "prompt_id": context.prompt_id,
    }
    server.send_sync("executed", message, server.client_id)
