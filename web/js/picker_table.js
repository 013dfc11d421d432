// What the grid of a picker shows: files by prompts, or the letters of a blind vote.
import { columnName, fileLine, fileNote } from "./picker_words.js";

const VOTE = "♥";
const NO_PROMPT = "without a prompt";

export const keyOf = ({ lora, strength, prompt }) => `${lora ?? ""}|${strength}|${prompt}`;

/** Files in columns, the untrained model first, and prompts in rows; a heart where a vote was given. */
export function plainTable({ cells, prompts, files, picked }, selected, vote) {
  const columns = columnsOf(cells, files);
  const found = new Map(cells.map((cell) => [keyOf(cell), cell]));
  const voted = new Set(vote?.given.map(keyOf));
  const chosen = (file) => Boolean(file) && file.lora === selected;
  const frame = ({ file, strength }, prompt) => {
    const key = keyOf({ lora: file?.lora, strength, prompt });
    const url = found.get(key)?.url;
    const badge = voted.has(key) ? VOTE : "";
    return url ? { key, url, title: columnName(file, strength), badge, base: !file, chosen: chosen(file) } : null;
  };
  return {
    columns: columns.map(({ file, strength }) => ({
      key: `${file?.lora ?? ""}|${strength}`,
      label: columnName(file, strength),
      said: file ? fileLine(file, picked) : "without any LoRA",
      note: file ? fileNote(file, picked) : "",
      base: !file,
      chosen: chosen(file),
    })),
    rows: prompts.map((title, prompt) => ({
      key: prompt,
      title: title || NO_PROMPT,
      frames: columns.map((column) => frame(column, prompt)),
    })),
  };
}

/** The pictures of every prompt in the order of the vote, under letters alone. */
export function blindTable({ prompts }, vote) {
  const frame = (cell) => {
    const letter = vote.letter(cell);
    const chosen = vote.has(cell);
    return { key: keyOf(cell), url: cell.url, title: letter, badge: chosen ? `${letter} ${VOTE}` : letter, base: false, chosen };
  };
  const rows = vote.rows.map((cells) => {
    const { prompt } = cells[0];
    return { key: prompt, title: prompts[prompt] || NO_PROMPT, frames: cells.map(frame) };
  });
  return { columns: [], rows };
}

/** The cells that can be voted for: of every file that works one a prompt, at the strength nearest to 1. */
export function votable({ cells, files }) {
  return files
    .filter(({ broken }) => !broken)
    .flatMap(({ lora }) => {
      const own = cells.filter((cell) => cell.lora === lora);
      const strength = Math.min(...own.map((cell) => Math.abs(cell.strength - 1)));
      return own.filter((cell) => Math.abs(cell.strength - 1) === strength);
    });
}

/** The cells as the viewer wants them, all that the table shows. */
export function picturesOf(table) {
  return table.rows.flatMap(({ title: caption, frames }, row) =>
    frames.flatMap((frame, at) => (frame ? [{ ...frame, row, at, caption }] : [])),
  );
}

function columnsOf(cells, files) {
  const order = new Map(files.map(({ lora }, at) => [lora, at]));
  const found = new Map();
  for (const { lora, strength } of cells) found.set(`${lora ?? ""}|${strength}`, { lora, strength });
  const place = ({ lora }) => (lora == null ? -1 : order.get(lora) ?? files.length);
  return [...found.values()]
    .sort((one, other) => place(one) - place(other) || one.strength - other.strength)
    .map(({ lora, strength }) => ({ file: lora == null ? undefined : (files[order.get(lora)] ?? unlisted(lora)), strength }));
}

/** A file of which there is a picture before anything else is known. */
function unlisted(lora) {
  return { lora, label: lora.split(/[\\/]/).at(-1).replace(/\.\w+$/, ""), percent: null };
}
