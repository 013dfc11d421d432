// Small signs on buttons, as lines in the colour of the text.
import { drawn } from "./dom.js";

const SHAPES = {
  handle: "M5.5 3h.01M10.5 3h.01M5.5 8h.01M10.5 8h.01M5.5 13h.01M10.5 13h.01",
  linked: "M6.5 9.5l3-3M7.5 4.5l1.2-1.2a2.8 2.8 0 0 1 4 4L11.5 8.5M8.5 11.5l-1.2 1.2a2.8 2.8 0 0 1-4-4L4.5 7.5",
  separate: "M7.5 4.5l1.2-1.2a2.8 2.8 0 0 1 4 4L11.5 8.5M8.5 11.5l-1.2 1.2a2.8 2.8 0 0 1-4-4L4.5 7.5M3 3l10 10",
  more: "M4 6l4 4 4-4",
  remove: "M4 4l8 8M12 4l-8 8",
  search: "M7 3a4 4 0 1 0 0 8 4 4 0 0 0 0-8M10 10l3.5 3.5",
};

export function icon(name) {
  const path = drawn("path", { d: SHAPES[name] });
  return drawn("svg", { class: `lw-icon lw-icon-${name}`, viewBox: "0 0 16 16", "aria-hidden": "true" }, path);
}
