// A stack of LoRAs in words.
import { partsOf } from "./stack_files.js";
import { bytes, value } from "./words.js";

const TITLES = { sdxl: "SDXL", flux: "FLUX", sd1: "SD 1.5", sd2: "SD 2", sd3: "SD 3", flux2: "FLUX.2", z_image: "Z-Image" };

/** A family as people write it. */
export const familyName = (family) => TITLES[family] ?? (family || "unknown").replace(/^unknown:/, "");

/** A strength with at most three digits behind the point: 0.8, 1, -0.35. */
export const strengthText = (strength) => String(Number(strength.toFixed(3)));

/** "3 of 4 LoRAs on". */
export function headline(rows) {
  if (!rows.length) return "No LoRA yet";
  const on = rows.filter((row) => row.on).length;
  const all = `${rows.length} LoRA${rows.length === 1 ? "" : "s"}`;
  return on === rows.length ? `${all} on` : `${on} of ${all} on`;
}

/** "SDXL · rank 16 · 42 MB". */
export function factsOf({ family, rank, size }) {
  return [family && familyName(family), rank && `rank ${rank}`, size && bytes(size)].filter(Boolean).join(" · ");
}

/** A share in per cent, with two digits: "1.2 %". */
export const share = (part) => (part == null ? "–" : `${value(Number((100 * part).toPrecision(2)))} %`);

export const foundWords = (name) => `Found as '${name}'.`;

/** A file's name alone: "people/anna.safetensors" is "anna". */
export const fileName = (name) => partsOf(name).file;
