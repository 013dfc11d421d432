// The Trainer's "Finish now" button: stop after the current step and let the graph go on with what there is.
import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";

async function finish(node) {
  const running = app.runningNodeId ?? String(node.id);
  const nodeId = String(running).split(":").at(-1) === String(node.id) ? String(running) : String(node.id);
  const answer = await api.fetchApi("/lora_workbench/finish", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ node_id: nodeId }),
  });
  const detail = answer.ok ? "The training stops after this step and the graph goes on." : "The server did not answer.";
  app.extensionManager?.toast?.add({ severity: answer.ok ? "info" : "error", summary: "Finish now", detail, life: 4000 });
}

app.registerExtension({
  name: "LoraWorkbench.Trainer",
  async nodeCreated(node) {
    if (node.comfyClass !== "LoraWorkbenchTrainer") return;
    const button = node.addWidget("button", "Finish now", null, () => finish(node), { serialize: false });
    button.serialize = false; // keeps it out of the saved widget values as well
    button.tooltip = "Stop after this step, keep the work, and go on with the graph.";
  },
});
