// The LoRA files that ComfyUI lists, and what each says about itself.
import { api } from "../../../scripts/api.js";

const ADDRESS = "/lora_workbench/loras/about";
const ENDING = /\.(safetensors|sft|ckpt|pt|pth|bin)$/i;
const NONE = "none";
const NOT_FOUND = 404;

const asked = new Map();

/** The names in the list of the node's combo, which R refreshes. */
export function namesOf(node) {
  const widget = node.widgets.find(({ name }) => name === "lora_1");
  const values = widget?.options?.values ?? [];
  const names = typeof values === "function" ? values(widget, node) : values;
  return names.filter((name) => name !== NONE);
}

/** What the server tells about a file, asked once; where there is none of that name, `gone`, and in `error` what to do. */
export function aboutFile(name) {
  if (!asked.has(name)) asked.set(name, ask(name));
  return asked.get(name);
}

export function forgetFiles() {
  asked.clear();
}

async function ask(name) {
  try {
    const response = await api.fetchApi(`${ADDRESS}?${new URLSearchParams({ name })}`);
    const answer = await response.json().catch(() => ({}));
    const error = response.ok ? "" : `ComfyUI answers with status ${response.status}.`;
    return { triggers: [], gone: response.status === NOT_FOUND, ...answer, error: answer.error || error };
  } catch {
    asked.delete(name); // the next time may go better
    return { triggers: [], error: "ComfyUI does not answer." };
  }
}

/** The name without its folder and ending, and its folder with a slash behind it. */
export function partsOf(name) {
  const parts = name.split(/[\\/]/);
  const file = parts.pop().replace(ENDING, "");
  return { file, folder: parts.map((part) => `${part}/`).join("") };
}
