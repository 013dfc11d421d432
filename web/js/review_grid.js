// The middle of the review: every picture with its caption, one of them chosen; arrow keys move the choice.
import { element } from "./dom.js";
import { badge } from "./review_dom.js";

export class Grid {
  /** `review` is the dialog: api, limit, choose(name), edit(). */
  constructor(review) {
    this.review = review;
    this.cards = new Map();
    this.root = element("div", { className: "lw-grid", role: "listbox", onkeydown: (event) => this.key(event) });
    this.root.setAttribute("aria-label", "Pictures");
    this.nothing = element("p", { className: "lw-nothing", hidden: true }, "No picture passes the filter.");
  }

  /** Shows exactly these pictures, in this order. */
  fill(pictures) {
    this.cards = new Map(pictures.map((picture) => [picture.name, this.card(picture)]));
    this.root.replaceChildren(...this.cards.values(), this.nothing);
  }

  card(picture) {
    const image = element("img", { loading: "lazy", alt: "", src: this.review.api.pictureAddress(picture, "small") });
    const parts = [element("div", { className: "lw-thumbnail" }, image), element("div", { className: "lw-words" })];
    const card = element("div", { className: "lw-card", role: "option", tabIndex: -1 }, ...parts);
    card.onclick = () => this.review.choose(picture.name, true);
    this.describe(card, picture);
    return card;
  }

  /** Shows the caption of a picture as it is now. */
  update(picture) {
    const card = this.cards.get(picture.name);
    if (card) this.describe(card, picture);
  }

  describe(card, picture) {
    const over = picture.tokens > this.review.limit;
    card.setAttribute("aria-label", `${picture.name}, ${picture.state}: ${picture.caption || "no caption"}`);
    card.lastChild.replaceChildren(
      element("p", { className: picture.caption ? "" : "lw-none" }, picture.caption || "No caption yet"),
      element(
        "div",
        { className: "lw-row lw-spread" },
        badge(picture.draft === undefined ? picture.state : "unsaved"),
        element("span", { className: `lw-number ${over ? "lw-over" : ""}`, title: "Tokens" }, String(picture.tokens)),
      ),
    );
  }

  /** Hides all pictures but those of the given names, and marks the chosen one. */
  show(names, chosen) {
    for (const [name, card] of this.cards) {
      card.hidden = !names.has(name);
      card.setAttribute("aria-selected", String(name === chosen));
      card.tabIndex = name === chosen ? 0 : -1;
    }
    this.nothing.hidden = names.size > 0;
    this.cards.get(chosen)?.scrollIntoView({ block: "nearest" });
  }

  focus(name) {
    this.cards.get(name)?.focus();
  }

  key(event) {
    const names = [...this.cards].filter(([, card]) => !card.hidden).map(([name]) => name);
    const place = names.findIndex((name) => this.cards.get(name) === document.activeElement);
    const columns = getComputedStyle(this.root).gridTemplateColumns.split(" ").length;
    const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns };
    const ends = { Home: 0, End: names.length - 1 };
    if (event.altKey || event.ctrlKey || event.metaKey || place < 0) return;
    if (event.key === "Enter" || event.key === "F2") this.review.edit();
    else if (event.key in steps || event.key in ends) {
      const to = names[ends[event.key] ?? place + steps[event.key]];
      if (to) this.review.choose(to);
      if (to) this.focus(to);
    } else return;
    event.preventDefault();
  }
}
