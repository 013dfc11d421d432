// The panel on LoRA Stack Apply.
import { app } from "../../../scripts/app.js";
import { addPanel } from "./panel.js";
import { forgetFiles } from "./stack_files.js";
import { StackPanel } from "./stack_panel.js";

const WIDTH = 400; // of a new node, so that a row has room for its name

const panels = new Set();

app.registerExtension({
  name: "LoraWorkbench.Stack",
  async nodeCreated(node) {
    if (node.comfyClass !== "LoraWorkbenchStackApply") return;
    const panel = new StackPanel(node, () => panels.delete(panel));
    panels.add(panel);
    addPanel(node, panel);
    node.setSize([Math.max(WIDTH, node.size[0]), node.computeSize()[1]]);
  },
  /** ComfyUI has read the lists of files anew: what is on the disk may be another file of the same name. */
  async refreshComboInNodes() {
    forgetFiles();
    for (const panel of panels) panel.render();
  },
});
