// A training in words.
import { bytes, count, duration } from "./words.js";

/** A pace: 0.42 s/step, or 23 steps/s where that reads better. */
export function pace(seconds) {
  return seconds >= 0.1 ? `${seconds.toFixed(seconds < 10 ? 2 : 0)} s/step` : `${Math.round(1 / seconds)} steps/s`;
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
