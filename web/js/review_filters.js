// What of the folder is shown: a state, words to look for, and tags chosen from the cloud.
import { element } from "./dom.js";
import { STATES, countTags } from "./review_text.js";

const MOST_TAGS = 150;
const TOO_LONG = "too long";

export class Filters {
  /** `review` is the dialog: limit and render(). */
  constructor(review) {
    this.review = review;
    this.state = "";
    this.tags = new Set();
    this.search = element("input", {
      type: "search",
      className: "lw-search",
      placeholder: "Filter by words or file name",
      "aria-label": "Filter by words or file name",
      oninput: () => review.render(),
    });
    this.states = element("div", { className: "lw-states", role: "group", "aria-label": "Filter by state" });
    this.cloud = element("nav", { className: "lw-cloud", "aria-label": "Tags, filter by clicking" });
  }

  isOf(picture, state) {
    return state === TOO_LONG ? picture.tokens > this.review.limit : !state || picture.state === state;
  }

  /** Whether the filter lets a picture through. */
  passes(picture) {
    if (!this.isOf(picture, this.state) || ![...this.tags].every((tag) => picture.tags.has(tag))) return false;
    return `${picture.name}\n${picture.caption}`.toLowerCase().includes(this.search.value.trim().toLowerCase());
  }

  /** Shows how many pictures there are of each state, and the tags of those shown. */
  render(pictures, shown) {
    const count = (state) => pictures.filter((picture) => this.isOf(picture, state)).length;
    const choices = { "": "All", ...STATES, [TOO_LONG]: `Over ${this.review.limit} tokens` };
    const chips = Object.entries(choices).map(([state, name]) => this.chip(state, name, count(state)));
    replaceKeepingFocus(this.states, chips);
    const counts = countTags(shown.map((picture) => picture.tags));
    const absent = [...this.tags].filter((tag) => !counts.some(([other]) => other === tag)).map((tag) => [tag, 0]);
    const chosenFirst = [...counts, ...absent].sort(([one], [other]) => this.tags.has(other) - this.tags.has(one));
    const buttons = chosenFirst.slice(0, MOST_TAGS).map(([tag, number]) => this.tag(tag, number));
    replaceKeepingFocus(this.cloud, [element("h3", {}, "Tags"), ...buttons]);
  }

  chip(state, name, count) {
    const chip = toggle(`lw-chip lw-${state.replace(" ", "-") || "all"}`, name, count, this.state === state, () => {
      this.state = this.state === state ? "" : state;
      this.review.render();
    });
    chip.dataset.key = state;
    return chip;
  }

  tag(tag, count) {
    const shown = toggle("lw-tag", tag, count, this.tags.has(tag), () => {
      if (!this.tags.delete(tag)) this.tags.add(tag);
      this.review.render();
    });
    shown.dataset.key = tag;
    return shown;
  }
}

function toggle(className, name, count, pressed, onclick) {
  const number = element("span", { className: "lw-number" }, String(count));
  return element("button", { type: "button", className, "aria-pressed": String(pressed), onclick }, `${name} `, number);
}

/** New children in place of the old ones; the one that had the focus keeps it by its key. */
function replaceKeepingFocus(parent, children) {
  const key = parent.contains(document.activeElement) ? document.activeElement.dataset.key : undefined;
  parent.replaceChildren(...children);
  if (key !== undefined) children.find((child) => child.dataset.key === key)?.focus();
}
