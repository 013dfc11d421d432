// The panel on LoRA Trainer.
import { app } from "../../../scripts/app.js";
import { Panel } from "./trainer_panel.js";

const WIDGET = "lora_workbench_panel";

app.registerExtension({
  name: "LoraWorkbench.Trainer",
  async nodeCreated(node) {
    if (node.comfyClass !== "LoraWorkbenchTrainer") return;
    const panel = new Panel(node);
    // After the widgets of the schema, as saved values are read by position.
    const options = { serialize: false, hideOnZoom: false, getMinHeight: () => panel.height };
    const widget = node.addDOMWidget(WIDGET, "panel", panel.root, options);
    widget.serialize = false; // keeps it out of the saved widget values as well
    widget.label = "";
    after(node, "onRemoved", () => panel.stop());
    // The node's id and name are known once the saved graph is read.
    after(node, "onConfigure", () => setTimeout(() => panel.live.refreshSoon()));
  },
});

/** Does something more when the node's `name` is called. */
function after(node, name, act) {
  const before = node[name];
  node[name] = function (...values) {
    const answer = before?.apply(this, values);
    act();
    return answer;
  };
}
