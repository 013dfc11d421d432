// The right-hand side of the review: one picture, large, and its caption to write.
import { element } from "./dom.js";
import { badge, button, enable, sideBySide } from "./review_dom.js";

const COUNT_AFTER = 200; // ms without a key

export class Editor {
  /** `review` is the dialog: accept(), save(), counted(name, caption) and limit. */
  constructor(review) {
    this.review = review;
    this.image = element("img", { alt: "" });
    this.title = element("h3", {});
    this.state = element("span", {});
    this.text = element("textarea", { rows: 7, spellcheck: true, oninput: () => this.typed() });
    this.text.setAttribute("aria-label", "Caption");
    this.tokens = element("div", { className: "lw-tokens" });
    this.compare = element("div", { className: "lw-changes" });
    this.undoTyping = button("Restore", "Back to the caption as it is saved", () => this.restore());
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
        this.undoTyping,
      ),
      this.compare,
    );
    this.root.setAttribute("aria-label", "Caption of the chosen picture");
  }

  /** Shows a picture and its caption, or what was typed for it and is not saved yet; null shows nothing. */
  show(picture) {
    this.picture = picture;
    this.root.classList.toggle("lw-empty", !picture);
    if (!picture) return;
    this.title.textContent = this.title.title = picture.name;
    const address = this.review.api.pictureAddress(picture, "large");
    if (this.image.getAttribute("src") !== address) this.image.src = address;
    this.write(picture.draft ?? picture.caption);
    this.refresh();
  }

  /** Shows what the picture has become; words typed meanwhile stay. */
  refresh() {
    const { caption, name, state, tokens } = this.picture;
    if (this.caption === this.written) this.write(this.picture.draft ?? caption);
    this.image.alt = caption || name;
    this.state.replaceChildren(badge(state));
    this.previous = "";
    if (this.caption === caption) this.showTokens(tokens);
    else this.count();
    this.showChanges();
  }

  write(caption) {
    if (this.text.value !== caption) this.text.value = caption;
    this.written = caption;
  }

  /** What is typed now. */
  get caption() {
    return this.text.value.trim();
  }

  /** Whether that is neither saved nor about to be. */
  get changed() {
    return Boolean(this.picture) && this.caption !== (this.picture.draft ?? this.picture.caption);
  }

  focus() {
    this.text.focus();
  }

  /** Back to the caption as it is saved. */
  restore() {
    delete this.picture.draft;
    this.write(this.picture.caption);
    this.refresh();
  }

  typed() {
    this.showChanges();
    clearTimeout(this.counting);
    this.counting = setTimeout(() => this.count(), COUNT_AFTER);
  }

  async count() {
    const { picture, caption } = this;
    const tokens = await this.review.counted(picture.name, caption);
    if (picture === this.picture && caption === this.caption) this.showTokens(tokens);
  }

  showTokens(tokens) {
    const limit = this.review.limit;
    const over = tokens > limit;
    this.tokens.classList.toggle("lw-over", over);
    this.tokens.style.setProperty("--lw-share", `${Math.min(100, (100 * tokens) / limit)}%`);
    this.tokens.textContent = `${tokens} of ${limit} tokens`;
    this.tokens.title = `CLIP reads ${limit} tokens in one piece; T5 of FLUX reads 512.`;
  }

  /** The caption before its last change, to see what that did. */
  compareWith(previous) {
    this.previous = previous;
    this.showChanges();
  }

  /** Old and new side by side: what is typed against what is saved, else what is saved against what was before. */
  showChanges() {
    const { caption } = this.picture;
    const isTyped = this.caption !== caption;
    const [before, after] = isTyped ? [caption, this.caption] : [this.previous, caption];
    enable(this.undoTyping, isTyped);
    this.compare.replaceChildren(...(before && before !== after ? [sideBySide(before, after)] : []));
  }
}
