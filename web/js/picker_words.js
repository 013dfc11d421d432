// The picking of a checkpoint in words.
import { bytes, count, duration } from "./words.js";

export const UNTRAINED = "untrained";
const MARKS = [
  ["picked", "picked", "✓"],
  ["suggested", "suggested", "★"],
  ["kept", "kept", "kept"],
];

/** How much better than the untrained model, with its sign: "+12.1 %". */
export function percent(number) {
  const shown = Math.abs(number).toFixed(Math.abs(number) < 10 ? 1 : 0);
  return `${number < 0 ? "−" : "+"}${shown} %`;
}

/** A column of the grid: "untrained", "step 600", "step 600 at 0.8". */
export function columnName(file, strength) {
  if (!file) return UNTRAINED;
  return strength === 1 ? file.label : `${file.label} at ${strength}`;
}

/** A file as a line of a list: "step 600 · +12 % · suggested". */
export function fileLine(file, picked) {
  return [file.label, ...betterOf(file), ...marksOf(file, picked).map(([, word]) => word)].join(" · ");
}

/** The same below its name, as short as can be: "+12 % ★". */
export function fileNote(file, picked) {
  return [...betterOf(file), ...marksOf(file, picked).map(([, , sign]) => sign)].join(" ");
}

function betterOf(file) {
  return file.percent == null ? [] : [percent(file.percent)];
}

function marksOf(file, picked) {
  const has = { ...file, picked: file.lora === picked };
  return MARKS.filter(([key]) => has[key]);
}

/** What happens, and how far it is: "Drawing · 5 of 24". */
export function headline({ status, phase, done, of, picked, files = [] }) {
  const so = of ? `${count(done ?? 0)} of ${count(of)}` : "";
  const chosen = files.find(({ lora }) => lora === picked)?.label;
  const parts = {
    idle: ["Nothing picked yet"],
    measuring: chosen ? [`Picked ${chosen}`, phase, so] : [phase || "Measuring", so],
    drawing: [phase || "Drawing", so],
    asking: ["Which one?"],
    picked: [chosen ? `Picked ${chosen}` : "Picked"],
    failed: ["Stopped"],
    cancelled: ["Cancelled"],
  };
  return (parts[status] ?? [status]).filter(Boolean).join(" · ");
}

/** How long the question still stands, and what happens then. */
export function timeLeft(seconds, files) {
  if (seconds == null) return "";
  const then = files.find(({ suggested }) => suggested)?.label;
  return `${duration(Math.max(0, seconds))} left${then ? `, then ${then}` : ""}`;
}

export function size(files) {
  return bytes(files.reduce((sum, file) => sum + file.bytes, 0));
}

export function counted(number, noun) {
  return `${count(number)} ${noun}${number === 1 ? "" : "s"}`;
}

/** Files that cannot be used, with the reason: "Left out: step 300 (not a number)". */
export function brokenWords(files) {
  const broken = files.filter((file) => file.broken);
  return broken.length ? `Left out: ${broken.map((file) => `${file.label} (${file.broken})`).join(", ")}.` : "";
}
