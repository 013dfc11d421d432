// The right-hand side of the review: one picture, large, and its caption to write.
import { badge, button, element, sideBySide } from "./review_dom.js";

const COUNT_AFTER = 200; // ms without a key

export class Editor {
  /** `review` is the dialog: accept(), save(), counted(text) and limit. */
  constructor(review) {
    this.review = review;
    this.image = element("img", { alt: "" });
    this.title = element("h3", {});
    this.state = element("span", {});
    this.text = element("textarea", { rows: 7, spellcheck: true, oninput: () => this.typed() });
    this.text.setAttribute("aria-label", "Caption");
    this.tokens = element("div", { className: "lw-tokens" });
    this.compare = element("div", { className: "lw-changes" });
    this.restore = button("Restore", "Back to the caption as it is saved", () => this.reset());
    this.root = element(
      "section",
      { className: "lw-editor" },
      element("div", { className: "lw-large" }, this.image),
      element("div", { className: "lw-row lw-spread" }, this.title, this.state),
      this.text,
      this.tokens,
      element(
        "div",
        { className: "lw-row" },
        button("Accept and next", "Save as reviewed, go to the next (Ctrl+Enter)", () => review.accept(), "lw-primary"),
        button("Save", "Save and stay here (Ctrl+S)", () => review.save()),
        this.restore,
      ),
      this.compare,
    );
    this.root.setAttribute("aria-label", "Caption of the chosen picture");
  }

  /** Shows a picture and its saved caption; null shows nothing. */
  show(picture) {
    this.picture = picture;
    this.root.classList.toggle("lw-empty", !picture);
    if (!picture) return;
    this.title.textContent = this.title.title = picture.name;
    const address = this.review.api.pictureAddress(picture, "large");
    if (this.image.src !== address) this.image.src = address;
    this.image.alt = picture.caption || picture.name;
    this.state.replaceChildren(badge(picture.state));
    this.previous = "";
    this.reset();
  }

  get changed() {
    return Boolean(this.picture) && this.text.value.trim() !== this.picture.caption;
  }

  focus() {
    this.text.focus();
  }

  reset() {
    this.text.value = this.picture.caption;
    this.showTokens(this.picture.tokens);
    this.showChanges();
  }

  typed() {
    this.showChanges();
    clearTimeout(this.counting);
    this.counting = setTimeout(async () => {
      const [picture, text] = [this.picture, this.text.value];
      const tokens = await this.review.counted(text);
      if (picture === this.picture && text === this.text.value) this.showTokens(tokens);
    }, COUNT_AFTER);
  }

  showTokens(tokens) {
    const limit = this.review.limit;
    const over = tokens > limit;
    this.tokens.classList.toggle("lw-over", over);
    this.tokens.style.setProperty("--lw-share", `${Math.min(100, (100 * tokens) / limit)}%`);
    this.tokens.textContent = `${tokens} of ${limit} tokens`;
    this.tokens.title = over ? "Longer than the text encoder reads in one piece" : "As the text encoder counts them";
  }

  /** The caption before its last change, to see what that did. */
  compareWith(previous) {
    this.previous = previous;
    this.showChanges();
  }

  /** Old and new side by side: what is typed against what is saved, else what is saved against what was before. */
  showChanges() {
    this.restore.disabled = !this.changed;
    const { caption } = this.picture;
    const [before, after] = this.changed ? [caption, this.text.value.trim()] : [this.previous, caption];
    this.compare.replaceChildren(...(before && before !== after ? [sideBySide(before, after)] : []));
  }
}
