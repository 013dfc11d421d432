// Numbers of a training in words.

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

/** A pace: 0.42 s/step, or 23 steps/s where that reads better. */
export function pace(seconds) {
  return seconds >= 0.1 ? `${seconds.toFixed(seconds < 10 ? 2 : 0)} s/step` : `${Math.round(1 / seconds)} steps/s`;
}

export function bytes(number) {
  const power = Math.min(Math.floor(Math.log2(Math.max(number, 1)) / 10), UNITS.length - 1);
  const size = number / 1024 ** power;
  return `${size >= 10 || power < 3 ? Math.round(size) : size.toFixed(1)} ${UNITS[power]}`;
}

/** What happens, and how far it is: "Training · step 120 of 1,000". */
export function headline(state) {
  const { status, phase, step = 0, total } = state;
  const steps = total ? `step ${count(step)} of ${count(total)}` : `step ${count(step)}`;
  const parts = {
    idle: ["Not trained yet"],
    past: ["Trained before", steps],
    preparing: [phase || "Preparing", state.of ? `${count(state.done)} of ${count(state.of)}` : ""],
    training: [phase || "Training", steps],
    paused: ["Paused", steps],
    finished: [total && step < total ? "Finished early" : "Trained", steps],
    cancelled: ["Cancelled", steps],
    failed: ["Stopped", step ? steps : ""],
  };
  return (parts[status] ?? [status, steps]).filter(Boolean).join(" · ");
}

/** Speed, time left and memory: "0.42 s/step · 6 min left · 7.1 GB". */
export function figures({ status, seconds_per_step, seconds_left, memory }) {
  const runs = status === "training";
  const parts = [
    runs && seconds_per_step ? pace(seconds_per_step) : "",
    runs && seconds_left != null ? `${duration(seconds_left)} left` : "",
    memory ? bytes(memory.used) : "",
  ];
  return parts.filter(Boolean).join(" · ");
}
