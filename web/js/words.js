// Numbers in words, for every panel.

const UNITS = ["B", "KB", "MB", "GB", "TB"];

export const count = (number) => number.toLocaleString("en-US");

/** A value of loss or learning rate, short: 0.0812, 1.5e-5. */
export function value(number) {
  if (number == null) return "–";
  const size = Math.abs(number);
  if (size !== 0 && (size < 1e-3 || size >= 1e5)) return number.toExponential(1).replace("e-0", "e-").replace(".0e", "e");
  return String(Number(number.toPrecision(3)));
}

/** A time to wait: 40 s, 6 min, 2 h 5 min. */
export function duration(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 90) return `${minutes} min`;
  return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

export function bytes(number) {
  const power = Math.min(Math.floor(Math.log2(Math.max(number, 1)) / 10), UNITS.length - 1);
  const size = number / 1024 ** power;
  return `${size >= 10 || power < 3 ? Math.round(size) : size.toFixed(1)} ${UNITS[power]}`;
}
