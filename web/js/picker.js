// The panel on LoRA Checkpoint Picker.
import { app } from "../../../scripts/app.js";
import { addPanel } from "./panel.js";
import { PickerPanel } from "./picker_panel.js";

app.registerExtension({
  name: "LoraWorkbench.Picker",
  async nodeCreated(node) {
    if (node.comfyClass === "LoraWorkbenchCheckpointPicker") addPanel(node, new PickerPanel(node));
  },
});
