// The panel on LoRA Trainer.
import { app } from "../../../scripts/app.js";
import { addPanel } from "./panel.js";
import { TrainerPanel } from "./trainer_panel.js";

app.registerExtension({
  name: "LoraWorkbench.Trainer",
  async nodeCreated(node) {
    if (node.comfyClass === "LoraWorkbenchTrainer") addPanel(node, new TrainerPanel(node));
  },
});
