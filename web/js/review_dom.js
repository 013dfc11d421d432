// The few things the review needs of the page: buttons, badges and differences.
import { element, button as plainButton } from "./dom.js";
import { STATES, difference } from "./review_text.js";

export { enable } from "./dom.js";

export const button = (text, title, does, className = "") => plainButton(text, title, does, `lw-button ${className}`);

/** What a caption's state is called, with its colour; one that is "unsaved" could not be saved. */
export function badge(state) {
  return element("span", { className: `lw-badge lw-${state}` }, STATES[state] ?? "Not saved");
}

/** Two texts side by side, what was taken out marked in the old one and what came in marked in the new one. */
export function sideBySide(before, after) {
  const parts = difference(before, after);
  const column = (title, marked, tag) => {
    const shown = parts.filter(([kind]) => kind === "same" || kind === marked);
    const text = shown.map(([kind, words]) => (kind === marked ? element(tag, {}, words) : words));
    return element("div", {}, element("h4", {}, title), element("p", {}, ...text));
  };
  return element(
    "div",
    { className: "lw-compare" },
    column("Before", "removed", "del"),
    column("After", "added", "ins"),
  );
}
