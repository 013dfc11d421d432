// A blind vote: the pictures of every prompt in an order of their own, under letters, until the votes are in.
import { counted } from "./picker_words.js";

const LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ";

export class Vote {
  /** `cells` are those of files that can be chosen, one of a file and prompt. */
  constructor(cells) {
    const prompts = [...new Set(cells.map(({ prompt }) => prompt))].sort((one, other) => one - other);
    this.rows = prompts.map((prompt) => shuffled(cells.filter((cell) => cell.prompt === prompt)));
    this.votes = new Map();
    this.revealed = false;
  }

  letter(cell) {
    const at = this.rows.find((row) => row.includes(cell)).indexOf(cell);
    return LETTERS[at] ?? String(at + 1);
  }

  has(cell) {
    return this.votes.get(cell.prompt) === cell;
  }

  /** A vote for a picture, in place of another one of the same prompt. */
  give(cell) {
    this.votes.set(cell.prompt, cell);
  }

  get given() {
    return [...this.votes.values()];
  }

  get complete() {
    return this.votes.size === this.rows.length;
  }

  /** The first cell of a prompt that has no vote yet. */
  get open() {
    return this.rows.find(([{ prompt }]) => !this.votes.has(prompt))?.[0];
  }

  /** The files with their votes, most votes first and then as in `files`. */
  result(files) {
    return files
      .map((file) => [file, this.given.filter(({ lora }) => lora === file.lora).length])
      .filter(([, number]) => number)
      .sort(([, one], [, other]) => other - one);
  }
}

/** Who won: "step 600 got 2 of 3 votes, step 900 1." */
export function resultWords(result, all) {
  if (!result.length) return "";
  const [[file, number], ...others] = result;
  const rest = others.map(([{ label }, votes]) => `${label} ${votes}`);
  return `${[`${file.label} got ${number} of ${counted(all, "vote")}`, ...rest].join(", ")}.`;
}

function shuffled(cells) {
  const order = [...cells];
  for (let last = order.length - 1; last > 0; last--) {
    const other = Math.floor(Math.random() * (last + 1));
    [order[last], order[other]] = [order[other], order[last]];
  }
  return order;
}
