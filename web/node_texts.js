// Shows on the pack's nodes the text they give with their result, such as Score's table.
// ComfyUI's page does that for pictures only.
import { app } from "../../scripts/app.js";

const NODES = ["InfiniteIDLoader", "InfiniteIDSaveIdentity", "InfiniteIDScore"];
const WIDGET = "infinite_id_text";
const LINE = 16; // pixels
const MARGIN = 10; // pixels that the page leaves around such a widget, on each side
const MOST_LINES = 16;

const STYLE = {
  background: "var(--comfy-input-bg)",
  borderRadius: "4px",
  boxSizing: "border-box",
  color: "var(--input-text)",
  fontFamily: "monospace",
  fontSize: "11px",
  lineHeight: `${LINE}px`,
  margin: "0",
  overflow: "auto",
  padding: "4px 6px",
  textAlign: "left",
  userSelect: "text",
  whiteSpace: "pre", // tables are laid out with spaces
};

const isOurs = (node) => NODES.includes(node?.constructor.nodeData?.name);

/** Neither part of the workflow file nor of the prompt. */
function kept(widget) {
  widget.serialize = false;
  widget.options.serialize = false;
  return widget;
}

function addWidget(node) {
  const element = document.createElement("pre");
  Object.assign(element.style, STYLE);
  const lines = () => Math.min(element.textContent.split("\n").length, MOST_LINES);
  return kept(
    node.addDOMWidget(WIDGET, WIDGET, element, {
      getMinHeight: () => lines() * LINE + 8 + 2 * MARGIN,
      getValue: () => element.textContent,
      hideOnZoom: false,
      setValue: (text) => {
        element.textContent = text;
      },
    }),
  );
}

/**
 * Before 1.29 "Nodes 2.0" was a trial: of widgets it showed the page's own, those that were there
 * from the beginning, and what they held when they were drawn first.
 */
function isTrial() {
  const [major, minor] = (window.__COMFYUI_FRONTEND_VERSION__ ?? "").split(".").map(Number);
  return LiteGraph.vueNodesMode && major === 1 && minor < 29;
}

function showInTrial(node, text) {
  const drawn = `[data-node-id="${node.id}"] textarea[placeholder="${WIDGET}"]`;
  for (const element of document.querySelectorAll(drawn)) element.value = text;
}

/** Put the text of a node's result under it. Only then is there a place for it. */
function show(node, output) {
  const text = [output?.text ?? []].flat().join("\n");
  if (!text) return;
  const widget = node.widgets?.find(({ name }) => name === WIDGET) ?? addWidget(node);
  widget.value = text;
  if (isTrial()) showInTrial(node, text);
  const [width, height] = node.computeSize();
  node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], height)]);
  node.setDirtyCanvas(true, true);
}

/** A node by the name its result is kept under: "7", or "<subgraph>:7". */
function nodeNamed(name) {
  const root = app.rootGraph ?? app.graph;
  const [id, subgraph] = name.split(":").reverse();
  return (subgraph ? root.subgraphs?.get(subgraph) : root)?.getNodeById(id);
}

app.registerExtension({
  name: "InfiniteID.NodeTexts",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!NODES.includes(nodeData.name)) return;
    const { onExecuted } = nodeType.prototype;
    nodeType.prototype.onExecuted = function (output) {
      onExecuted?.apply(this, arguments);
      show(this, output);
    };
  },
  nodeCreated(node) {
    if (!isOurs(node) || !isTrial()) return;
    kept(app.widgets.STRING(node, WIDGET, ["STRING", { multiline: true }], app).widget);
  },
  // A workflow's results come back with its tab, or out of the history.
  onNodeOutputsUpdated(outputs) {
    for (const [name, output] of Object.entries(outputs ?? {})) {
      const node = nodeNamed(name);
      if (isOurs(node)) show(node, output);
    }
  },
});
