// The "Review captions" button of Dataset Loader and Auto-Captioner.
import { app } from "../../../scripts/app.js";
import { openReview } from "./review_dialog.js";

const LOADER = "LoraWorkbenchDatasetLoader";
const NODES = [LOADER, "LoraWorkbenchAutoCaptioner"];
const READ = ["folder", "trigger_word", "sub_folders"];
const SOCKETS = ["LORA_DATASET", "*"];

/** What the Dataset Loaders read that a node is, or is fed by, nearest first. */
function foldersOf(node, seen = new Set()) {
  if (!node || seen.has(node)) return [];
  seen.add(node);
  const own = node.comfyClass === LOADER ? READ.map((name) => [name, valueOf(node, name)]) : [];
  const folders = (node.inputs ?? []).flatMap((input, slot) =>
    SOCKETS.includes(input.type) ? foldersOf(node.getInputNode(slot), seen) : [],
  );
  const asked = Object.fromEntries(own.filter(([, value]) => value !== undefined));
  return asked.folder?.trim() ? [asked, ...folders] : folders;
}

/** The value of a widget, or of the node that is wired into it. */
function valueOf(node, name) {
  const slot = (node.inputs ?? []).findIndex((input) => input.widget?.name === name && input.link != null);
  const widgets = slot < 0 ? node.widgets.filter((widget) => widget.name === name) : node.getInputNode(slot)?.widgets;
  return widgets?.[0]?.value;
}

async function review(node) {
  const folders = foldersOf(node);
  try {
    if (!folders.length) throw new Error("There is no folder yet: type one into LoRA Dataset Loader, and connect it.");
    await openReview(folders);
  } catch (error) {
    const said = { severity: "error", summary: "Review captions", detail: error.message, life: 8000 };
    app.extensionManager.toast.add(said);
  }
}

app.registerExtension({
  name: "LoraWorkbench.Review",
  async nodeCreated(node) {
    if (!NODES.includes(node.comfyClass)) return;
    const button = node.addWidget("button", "Review captions", null, () => review(node), { serialize: false });
    button.serialize = false; // keeps it out of the saved widget values as well
    button.tooltip = "See every picture with its caption, and edit, accept, find and replace, undo.";
  },
});
