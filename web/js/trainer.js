// The panel on LoRA Trainer.
import { app } from "../../../scripts/app.js";
import { Panel } from "./trainer_panel.js";

const WIDGET = "lora_workbench_panel";
// What ComfyUI shows by itself on a node that trains: the panel has the same line of text, and the same pictures.
const SHOWN_TWICE = ["$$node-text-preview", "$$canvas-image-preview"];

app.registerExtension({
  name: "LoraWorkbench.Trainer",
  async nodeCreated(node) {
    if (node.comfyClass !== "LoraWorkbenchTrainer") return;
    const panel = new Panel(node);
    // After the widgets of the schema, as saved values are read by position.
    const options = { serialize: false, hideOnZoom: false, getMinHeight: () => panel.height };
    const widget = node.addDOMWidget(WIDGET, "panel", panel.root, options);
    widget.serialize = false; // keeps it out of the saved widget values as well
    node.hideOutputImages = true;
    hideWidgets(node, SHOWN_TWICE);
    after(node, "onRemoved", () => panel.stop());
    // The node's id and name are known once the saved graph is read. What ComfyUI has cached sends no events of ours.
    after(node, "onConfigure", () => setTimeout(() => panel.live.refreshSoon()));
    after(node, "onExecuted", () => panel.live.refreshSoon());
  },
});

/** Keeps widgets of these names, which are added later, out of sight. */
function hideWidgets(node, names) {
  const add = node.addCustomWidget;
  node.addCustomWidget = function (widget) {
    if (names.includes(widget.name)) widget.hidden = (widget.options ??= {}).hidden = true;
    return add.call(this, widget);
  };
}

/** Does something more when the node's `name` is called. */
function after(node, name, act) {
  const before = node[name];
  node[name] = function (...values) {
    const answer = before?.apply(this, values);
    act();
    return answer;
  };
}
