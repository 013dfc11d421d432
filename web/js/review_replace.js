// Find and replace in all captions of the folder, shown before it is done.
import { element } from "./dom.js";
import { button, enable, sideBySide } from "./review_dom.js";

const PREVIEW_AFTER = 250; // ms without a key
const MOST_SHOWN = 100;

export class ReplacePanel {
  /** `review` is the dialog: api, changed(pictures, message) and say(text). */
  constructor(review) {
    this.review = review;
    const oninput = () => this.preview();
    const field = (label) => element("input", { type: "text", placeholder: label, "aria-label": label, oninput });
    const tick = (checked) => element("input", { type: "checkbox", checked, oninput });
    const close = button("Close", "Back to the caption (Escape)", () => review.edit());
    this.find = field("Find");
    this.replacement = field("Replace with (nothing = remove)");
    this.wholeWords = tick(true);
    this.matchCase = tick(false);
    this.count = element("p", { className: "lw-count", role: "status" });
    this.list = element("div", { className: "lw-changes" });
    this.apply = button("Replace", "Change these captions", () => this.replace(), "lw-primary");
    this.root = element(
      "section",
      { className: "lw-replace", hidden: true, "aria-label": "Find and replace" },
      element("h3", {}, "Find and replace"),
      this.find,
      this.replacement,
      element("label", {}, this.wholeWords, "Whole words only"),
      element("label", {}, this.matchCase, "Match upper and lower case"),
      element("div", { className: "lw-row" }, this.apply, close),
      this.count,
      this.list,
    );
  }

  open() {
    this.find.focus();
    this.find.select();
    this.preview();
  }

  get asked() {
    return {
      find: this.find.value,
      replacement: this.replacement.value,
      whole_words: this.wholeWords.checked,
      match_case: this.matchCase.checked,
    };
  }

  preview() {
    clearTimeout(this.waiting);
    enable(this.apply, false);
    if (!this.find.value) return this.show([], []);
    this.waiting = setTimeout(async () => {
      const asked = this.asked;
      try {
        const { changes, emptied } = await this.review.api.ask("replace", { ...asked, preview: true });
        if (asked.find === this.find.value && asked.replacement === this.replacement.value) this.show(changes, emptied);
      } catch (error) {
        this.review.say(error.message, true);
      }
    }, PREVIEW_AFTER);
  }

  show(changes, emptied) {
    const captions = (number) => `${number} caption${number === 1 ? "" : "s"}`;
    enable(this.apply, changes.length > 0);
    this.apply.textContent = changes.length ? `Replace in ${captions(changes.length)}` : "Replace";
    const kept = emptied.length ? ` ${captions(emptied.length)} would be left empty and stay as they are.` : "";
    this.count.textContent = this.find.value ? `Changes ${captions(changes.length)}.${kept}` : "";
    const shown = changes.slice(0, MOST_SHOWN);
    this.list.replaceChildren(
      ...shown.map(({ name, before, after }) => element("div", {}, element("h4", {}, name), sideBySide(before, after))),
      ...(changes.length > shown.length ? [element("p", {}, `… and ${changes.length - shown.length} more.`)] : []),
    );
  }

  async replace() {
    const asked = this.asked;
    enable(this.apply, false);
    try {
      const { changes, pictures } = await this.review.api.ask("replace", { ...asked, preview: false });
      this.review.changed(pictures, `Changed ${changes.length} caption${changes.length === 1 ? "" : "s"}.`);
      this.preview();
    } catch (error) {
      this.review.say(error.message, true);
    }
  }
}
