// What the windows that LoRA Stack Apply opens over the page have in common.
import { addStyle } from "./dom.js";

/** A dialog that a click beside it closes, and of which the page hears nothing. */
export function inWindow(root) {
  addStyle("stack_window.css");
  let pressed = false; // beside it, where marking text in a field may end as well, and a double click that opened it
  root.addEventListener("pointerdown", (event) => (pressed = isBeside(root, event)));
  root.addEventListener("click", (event) => pressed && event.detail < 2 && isBeside(root, event) && root.close());
  root.addEventListener("close", () => root.remove());
  for (const kind of ["keydown", "keyup", "keypress", "wheel"]) root.addEventListener(kind, (event) => event.stopPropagation());
}

/** Whether the pointer is beside a dialog, whose edge is a part of it. */
function isBeside(root, { target, clientX, clientY }) {
  const { left, right, top, bottom } = root.getBoundingClientRect();
  return target === root && (clientX < left || clientX > right || clientY < top || clientY > bottom);
}
