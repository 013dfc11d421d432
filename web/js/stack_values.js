// The rows of LoRA Stack Apply as values: in its widget `rows`, and in the row widgets that it had before.
import { setHidden } from "./panel.js";

const OLD_ROWS = [1, 2, 3, 4];
const OLD_WIDGETS = { lora: "none", strength_model: 1, strength_clip: 1, on: true };

/** A row as it is when a file was chosen and nothing else: at the recommended strength. */
export const newRow = (lora) => ({ lora, model: null, clip: null, on: true, blocks: "" });

/** The rows of a text in JSON, each {lora, model, clip, on, blocks}; null when it holds none that can be read. */
export function rowsOf(text) {
  let entries;
  try {
    entries = JSON.parse(text || "[]");
  } catch {
    return null;
  }
  const readable = Array.isArray(entries) && entries.every(isRow);
  return readable ? entries.map(rowOf).filter(({ lora }) => lora) : null;
}

/** Whether the server would read it as a row as well. */
function isRow(entry) {
  const { lora, model, clip, blocks } = entry ?? {};
  const texts = [lora, blocks].every((value) => value == null || typeof value === "string");
  return typeof entry === "object" && entry !== null && texts && [model, clip].every((value) => value == null || Number.isFinite(value));
}

function rowOf({ lora, model, clip, on, blocks }) {
  return { lora: lora ?? "", model: model ?? null, clip: clip ?? null, on: on == null || Boolean(on), blocks: blocks ?? "" };
}

export function textOf(rows) {
  return JSON.stringify(rows.map(({ lora, model, clip, on, blocks }) => ({ lora, model, clip, on, ...(blocks && { blocks }) })));
}

/** Hides the row widgets of before and takes their values out; up to the last one that is wired they stay as they are. */
export function takeOldRows(node) {
  const last = Math.max(0, ...OLD_ROWS.filter((number) => Object.keys(OLD_WIDGETS).some((key) => isWired(node, `${key}_${number}`))));
  return OLD_ROWS.flatMap((number) => {
    const widgets = Object.keys(OLD_WIDGETS).map((key) => node.widgets.find(({ name }) => name === `${key}_${number}`));
    if (!widgets.every(Boolean)) return [];
    for (const widget of widgets) if (widget.hidden !== number > last) setHidden(widget, number > last);
    const [lora, model, clip, on] = widgets.map(({ value }) => value);
    if (number <= last || !lora || lora === OLD_WIDGETS.lora) return [];
    Object.values(OLD_WIDGETS).forEach((value, at) => (widgets[at].value = value));
    return [rowOf({ lora, model, clip, on })];
  });
}

function isWired(node, name) {
  return (node.inputs ?? []).some(({ widget, link }) => widget?.name === name && link != null);
}
