// What the last run found out about the stack: a table of its LoRAs, how alike they are, and what to mind.
import { element, fill } from "./dom.js";
import { familyName, fileName, share, strengthText } from "./stack_words.js";

const COLUMNS = ["LoRA", "strength", "family", "rank", "keys", "change"];
const MOST_PAIRS = 6;

export class XRay {
  /** `toggled` is called when the part is opened or closed. */
  constructor(toggled) {
    this.body = element("div", { className: "lw-xray-body" });
    this.root = element("details", { className: "lw-xray", open: true, ontoggle: toggled }, element("summary", {}, "X-ray of the last run"), this.body);
    this.root.hidden = true;
  }

  /** {rows, total, guidance, overlaps} of the node's result. */
  show({ rows = [], guidance = "", overlaps = [] }) {
    this.root.hidden = !rows.length;
    const most = Math.max(...rows.map(({ relative_norm: norm }) => norm ?? 0));
    const heads = COLUMNS.map((name) => element("th", { scope: "col" }, name));
    const lines = rows.map((row) => lineOf(row, most));
    const table = element("table", {}, element("thead", {}, element("tr", {}, ...heads)), element("tbody", {}, ...lines));
    const strongest = [...overlaps].sort((one, other) => Math.abs(other.cosine) - Math.abs(one.cosine)).slice(0, MOST_PAIRS);
    const pairs = element("ul", { className: "lw-pairs" }, ...strongest.map(pairOf));
    pairs.hidden = !strongest.length;
    fill(this.body, [table, pairs, element("p", { className: "lw-guidance" }, guidance)]);
  }
}

function lineOf(row, most) {
  const reached = row.keys === row.keys_in_file ? `${row.keys}` : `${row.keys} of ${row.keys_in_file}`;
  const keys = element("td", { className: row.keys === row.keys_in_file ? "" : "lw-some" }, reached);
  const bar = element("i", {});
  bar.style.width = `${most ? (100 * (row.relative_norm ?? 0)) / most : 0}%`;
  const change = element("td", { className: "lw-change", title: "Norm of the change, of the norm of the weights it changes" }, element("span", {}, bar), share(row.relative_norm));
  const name = element("td", { className: "lw-xray-name", title: [row.name, row.note].filter(Boolean).join("\n") }, fileName(row.name));
  const cells = [row.strength == null ? "–" : strengthText(row.strength), familyName(row.family), row.rank || "–"];
  return element("tr", {}, name, ...cells.map((text) => element("td", {}, String(text))), keys, change);
}

function pairOf({ a, b, cosine, layers = [] }) {
  const fight = layers.length ? `, fighting over ${layers.join(", ")}` : "";
  const number = element("b", {}, `${cosine < 0 ? "−" : ""}${Math.abs(cosine).toFixed(2)}`);
  return element("li", { title: `${a} and ${b}: overlap ${cosine}${fight}` }, `${fileName(a)} and ${fileName(b)} overlap by `, number, fight);
}
