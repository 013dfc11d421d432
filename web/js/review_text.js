// Captions as data: their tags, and the difference between two of them.

export const STATES = { missing: "Missing", automatic: "Automatic", yours: "Yours", reviewed: "Reviewed" };

const SMALL_WORDS = new Set(
  ("a an and are as at be by for from has her his in is it its of off on or over that the their there this to " +
    "under up with").split(" "),
);
const MOST_CELLS = 4_000_000;

/** Whether most captions are lists of tags, not sentences. */
export function areTags(captions) {
  const pieces = captions.flatMap((caption) => caption.split(",")).filter((piece) => piece.trim());
  const words = pieces.reduce((sum, piece) => sum + piece.trim().split(/\s+/).length, 0);
  return pieces.length > captions.length && words <= 3 * pieces.length;
}

/** The distinct tags of a caption, or its distinct words where captions are sentences; in lower case. */
export function tagsOf(caption, tags) {
  const lower = caption.toLowerCase();
  if (tags) return new Set(lower.split(/[,\n]/).map((piece) => piece.trim()).filter(Boolean));
  const words = lower.match(/[\p{L}\p{N}][\p{L}\p{N}'’_-]*/gu) ?? [];
  return new Set(words.filter((word) => word.length > 1 && !SMALL_WORDS.has(word)));
}

/** [tag, how many captions have it], commonest first. */
export function countTags(sets) {
  const counts = new Map();
  for (const set of sets) for (const tag of set) counts.set(tag, (counts.get(tag) ?? 0) + 1);
  return [...counts].sort(([one, n], [other, m]) => m - n || one.localeCompare(other));
}

/** What became of `before`: [["same" | "removed" | "added", text], …], word by word. */
export function difference(before, after) {
  const old = pieces(before);
  const now = pieces(after);
  let start = 0;
  while (start < old.length && start < now.length && old[start] === now[start]) start++;
  let end = 0;
  while (end < old.length - start && end < now.length - start && old.at(-1 - end) === now.at(-1 - end)) end++;
  return joined([
    ...old.slice(0, start).map((word) => ["same", word]),
    ...middle(old.slice(start, old.length - end), now.slice(start, now.length - end)),
    ...old.slice(old.length - end).map((word) => ["same", word]),
  ]);
}

function pieces(text) {
  return text.match(/\s+|[\p{L}\p{N}_]+|[^\s\p{L}\p{N}_]/gu) ?? [];
}

/** The difference by the longest common subsequence; of very long texts all at once. */
function middle(old, now) {
  if (old.length * now.length > MOST_CELLS)
    return [...old.map((word) => ["removed", word]), ...now.map((word) => ["added", word])];
  const longest = Array.from({ length: old.length + 1 }, () => new Uint16Array(now.length + 1));
  for (let i = old.length - 1; i >= 0; i--)
    for (let j = now.length - 1; j >= 0; j--)
      longest[i][j] = old[i] === now[j] ? longest[i + 1][j + 1] + 1 : Math.max(longest[i + 1][j], longest[i][j + 1]);
  const parts = [];
  let [i, j] = [0, 0];
  while (i < old.length || j < now.length) {
    if (i < old.length && j < now.length && old[i] === now[j]) {
      parts.push(["same", old[i++]]);
      j++;
    } else if (j === now.length || (i < old.length && longest[i + 1][j] >= longest[i][j + 1])) {
      parts.push(["removed", old[i++]]);
    } else {
      parts.push(["added", now[j++]]);
    }
  }
  return parts;
}

function joined(parts) {
  const runs = [];
  for (const [kind, text] of parts) {
    if (runs.at(-1)?.[0] === kind) runs.at(-1)[1] += text;
    else runs.push([kind, text]);
  }
  return runs;
}
