// ── Figures ──────────────────────────────────────────────────────────────────────────────────────────────────────────
// Numbers as people read them. Three digits are as many as any of them is worth.

const WHOLE = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const NONE = "–";

const count = (number) => WHOLE.format(number);

function digits(number) {
  const size = Math.abs(number);
  return number.toFixed(size >= 99.95 || size === 0 ? 0 : size >= 9.995 ? 1 : 2);
}

function seconds(time_s) {
  if (time_s === null || time_s === undefined) return NONE;
  if (time_s < 0.9995) return `${digits(time_s * 1e3)} ms`;
  if (time_s < 99.95) return `${digits(time_s)} s`;
  return longTime(time_s);
}

function longTime(time_s) {
  const whole = Math.round(time_s);
  const [hours, minutes] = [Math.floor(whole / 3600), Math.floor((whole % 3600) / 60)];
  if (hours >= 48) return `${Math.floor(hours / 24)} d ${hours % 24} h`;
  if (hours) return `${hours} h ${minutes} min`;
  return minutes ? `${minutes} min ${whole % 60} s` : `${whole} s`;
}

function bytes(size) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let step = 0;
  while (size >= 999.5 && step < units.length - 1) {
    size /= 1e3;
    step += 1;
  }
  return `${step ? digits(size) : count(size)} ${units[step]}`;
}

const bytesPerS = (rate) => `${bytes(rate)}/s`;
const perS = (rate) => `${digits(rate)}/s`;
const percent = (share) => `${(100 * share).toFixed(share > 0.9995 || share === 0 ? 0 : 1)} %`;
const wholePercent = (share) => `${Math.round(100 * share)} %`;
const clock = (unix_s) => new Date(unix_s * 1e3).toLocaleTimeString("en-GB");

/** How a request ended: a sign, so that it can be told without its colour, and words. */
const VERDICTS = {
  met: ["✓", "in time"],
  missed: ["◔", "missed an objective"],
  rejected: ["⊘", "rejected"],
  failed: ["✕", "failed"],
  expired: ["⧖", "expired"],
  cancelled: ["–", "cancelled"],
  invalid: ["?", "invalid"],
};

function verdictMark(verdict) {
  const [sign, words] = VERDICTS[verdict];
  return element(
    "span",
    { class: `verdict ${verdict}` },
    element("span", { class: "mark", "aria-hidden": "true" }, sign),
    words,
  );
}

/** Names in the order in which people count: 2 before 10. */
const inOrder = new Intl.Collator("en", { numeric: true }).compare;

/** A name that may be long, for little room: mostly the ends of names differ. */
const shortName = (name, most) => (name.length > most ? `…${name.slice(1 - most)}` : name);
