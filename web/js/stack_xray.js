// What the last run found out about the stack: a table of its LoRAs, how alike they are, and what to mind.
import { element, fill } from "./dom.js";
import { familyName, fileName, share, strengthText } from "./stack_words.js";

const COLUMNS = ["LoRA", "strength", "family", "rank", "keys", "change"];
const PAIR_COLUMNS = ["LoRAs together", "fight over", "overlap"];
const MOST_PAIRS = 6;
const OVERLAP_TITLE = "Cosine of the two changes: 1 where both do the same, 0 where they have nothing in common, −1 where they undo one another";

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
    const lines = rows.map((row) => lineOf(row, most));
    const table = element("table", {}, headsOf(COLUMNS), element("tbody", {}, ...lines));
    const strongest = [...overlaps].sort((one, other) => Math.abs(other.cosine) - Math.abs(one.cosine)).slice(0, MOST_PAIRS);
    const pairs = element("table", { className: "lw-pairs" }, headsOf(PAIR_COLUMNS), element("tbody", {}, ...strongest.map(pairOf)));
    pairs.hidden = !strongest.length;
    const advice = element("p", { className: "lw-guidance" }, guidance);
    advice.hidden = !guidance;
    fill(this.body, [table, pairs, advice]);
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

/** How alike two LoRAs are, from opposed over having nothing in common to equal, and where they work against one another. */
function pairOf({ a, b, cosine, fights = 0, layers = [] }) {
  const bar = element("i", {});
  bar.style.width = `${50 * Math.min(1, Math.abs(cosine))}%`;
  bar.style[cosine < 0 ? "right" : "left"] = "50%";
  const number = `${cosine <= -0.005 ? "−" : ""}${Math.abs(cosine).toFixed(2)}`;
  const overlap = element("td", { className: "lw-overlap", title: OVERLAP_TITLE }, element("span", {}, bar), number);
  const fight = element("td", { title: layers.join("\n") }, fights ? `${fights} layer${fights === 1 ? "" : "s"}` : "–");
  const names = `${fileName(a)} · ${fileName(b)}`;
  return element("tr", {}, element("td", { className: "lw-xray-name", title: `${a}\n${b}` }, names), fight, overlap);
}

const headsOf = (names) => element("thead", {}, element("tr", {}, ...names.map((name) => element("th", { scope: "col" }, name))));
