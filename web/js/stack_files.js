// The LoRA files that ComfyUI lists, and what each says about itself.
import { api } from "../../../scripts/api.js";

const ADDRESS = "/lora_workbench/loras/about";
const ENDING = /\.(safetensors|sft|ckpt|pt|pth|bin)$/i;
const NONE = "none";

const asked = new Map();

/** The names in the list of the node's combo, which R refreshes. */
export function namesOf(node) {
  const widget = node.widgets.find(({ name }) => name === "lora_1");
  const values = widget?.options?.values ?? [];
  const names = typeof values === "function" ? values(widget, node) : values;
  return names.filter((name) => name !== NONE);
}

/** What the server tells about a file, asked once; {error} when it cannot. */
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
    const answer = await response.json();
    return { triggers: [], ...answer, error: answer.error ?? "" };
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

/** The listed name that a row means, "" when none is, and whether that file lies in another folder now. */
export function fileMeant(name, names) {
  if (names.includes(name)) return { name, moved: false };
  const wanted = plain(name);
  const same = names.find((listed) => plain(listed) === wanted);
  if (same) return { name: same, moved: false };
  const alike = names.filter((listed) => lastOf(plain(listed)) === lastOf(wanted));
  return alike.length === 1 ? { name: alike[0], moved: wanted.includes("/") || ENDING.test(name) } : { name: "", moved: false };
}

const plain = (name) => name.replaceAll("\\", "/").replace(ENDING, "").toLowerCase();
const lastOf = (name) => name.slice(name.lastIndexOf("/") + 1);
