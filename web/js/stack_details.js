// What lies behind a row: the cover, the trigger words, the facts and the blocks.
import { api } from "../../../scripts/api.js";
import { button, element, fill, write } from "./dom.js";
import { factsOf, strengthText } from "./stack_words.js";

const COPIED = 1200; // ms for which a word says that it was copied
const BLOCKS = "Blocks, such as IN04=0.5, MID=0, TE=0.3";
const BLOCKS_TITLE =
  "How much of the strength single blocks get, such as IN04=0.5, MID=0, OUT00-OUT05=1.2 for SDXL, D00-D09=0.5, S*=0 for FLUX, and TE=0.3 for the text encoders. The others get all of it.";

export class Details {
  /** `changed` is called with the values of the row that change. */
  constructor(changed) {
    this.changed = changed;
    this.cover = element("img", { alt: "", className: "lw-cover", loading: "lazy" });
    this.words = element("div", { className: "lw-triggers", role: "group", "aria-label": "Trigger words" });
    this.facts = element("span", { className: "lw-facts" });
    this.take = button("", "Take the strength that the file recommends.", () => changed({ model: null, clip: null }), "lw-take");
    this.blocks = element("input", { type: "text", className: "lw-blocks", placeholder: BLOCKS, title: BLOCKS_TITLE, "aria-label": "Blocks", spellcheck: false });
    this.blocks.addEventListener("change", () => changed({ blocks: this.blocks.value.trim() }));
    this.blocks.addEventListener("keydown", (event) => event.key === "Enter" && this.blocks.blur());
    const facts = element("div", { className: "lw-facts-line" }, this.facts, this.take);
    const texts = element("div", { className: "lw-texts" }, facts, this.words, this.blocks);
    this.root = element("div", { className: "lw-details" }, this.cover, texts);
  }

  /** `about` is what the server tells of the file, null when it cannot. */
  show(row, about) {
    if (document.activeElement !== this.blocks) this.blocks.value = row.blocks;
    write(this.facts, about ? factsOf(about) : "");
    const recommended = about?.strength;
    this.take.hidden = recommended == null || (row.model == null && row.clip == null);
    write(this.take, recommended == null ? "" : `Take the recommended ${strengthText(recommended)}`);
    this.cover.hidden = !about?.preview;
    const address = about?.preview ? api.apiURL(about.preview) : "";
    if (address && this.cover.getAttribute("src") !== address) this.cover.src = address;
    this.showWords(about?.triggers ?? []);
  }

  showWords(words) {
    this.words.hidden = !words.length;
    const text = JSON.stringify(words);
    if (text !== this.shown) fill(this.words, words.map((word) => this.word(word)));
    this.shown = text;
  }

  word(word) {
    const made = button(word, "Copy this trigger word.", async () => {
      await copy(word);
      write(made, "copied");
      setTimeout(() => write(made, word), COPIED);
    }, "lw-word");
    return made;
  }
}

/** Puts a text on the clipboard, also on pages to which browsers do not give it. */
async function copy(text) {
  if (navigator.clipboard && window.isSecureContext) return navigator.clipboard.writeText(text).catch(() => copyByHand(text));
  copyByHand(text);
}

function copyByHand(text) {
  const field = element("textarea", { value: text });
  document.body.append(field);
  field.select();
  document.execCommand("copy");
  field.remove();
}
