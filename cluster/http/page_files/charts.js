// ── Over time ────────────────────────────────────────────────────────────────────────────────────────────────────────

// Shares and bytes are of so many seconds, rates of so many: fewer requests than that say little.
const FLOW_S = 30;
const RATE_S = 10;
const KEPT_S = 900;
const COUNTED = ["finished", "rejected", "failed", "expired"];

/** The gateway's history as far as it has been read: one array a column, one entry a second, the newest last. */
class Past {
  constructor() {
    this.last = null;
    this.columns = {};
  }

  /** Takes what came after `last`. */
  add({ first_second, columns }) {
    if (first_second === null) return;
    // After a pause longer than the gateway's memory: what is missing cannot be had any more.
    const goesOn = this.last !== null && first_second <= this.last + 1;
    // Two questions at once may have brought the same.
    const known = goesOn ? this.last + 1 - first_second : 0;
    for (const [name, values] of Object.entries(columns)) {
      this.columns[name] = (goesOn ? this.columns[name] : []).concat(values.slice(known)).slice(-KEPT_S);
    }
    this.last = Math.max(goesOn ? this.last : 0, first_second + columns.met.length - 1);
  }

  get length() {
    return this.columns.met?.length ?? 0;
  }

  /** For every second, the sum of columns over the `window_s` up to it; null where nothing is known. */
  sums(names, window_s) {
    const values = new Array(this.length).fill(null);
    let [sum, known] = [0, 0];
    const add = (second, sign) => {
      for (const name of names) {
        const value = this.columns[name][second];
        if (value === null) continue;
        sum += sign * value;
        known += sign;
      }
    };
    for (let second = 0; second < this.length; second += 1) {
      add(second, 1);
      if (second >= window_s) add(second - window_s, -1);
      if (known) values[second] = sum;
    }
    return values;
  }

  /** The same per second: of the seconds that there are, at the start. */
  means(names, window_s) {
    return this.sums(names, window_s).map((sum, second) =>
      sum === null ? null : sum / Math.min(window_s, second + 1),
    );
  }

  /** Now. */
  meanOf(names, window_s) {
    return this.length ? (this.means(names, window_s).at(-1) ?? 0) : 0;
  }

  mean(name, window_s) {
    return this.meanOf([name], window_s);
  }

  /** Of the requests that ended within `window_s`, for every second: null where there were none. */
  shares(name, window_s) {
    const counted = this.sums(COUNTED, window_s);
    return this.sums([name], window_s).map((sum, second) => (counted[second] ? sum / counted[second] : null));
  }
}

// A colour, a dash and a mark each: any two of them are enough.
const STYLES = [
  ["", "circle"],
  ["7 3", "square"],
  ["2 3", "triangle"],
  ["9 3 2 3", "diamond"],
];
const MARKS = {
  circle: "M-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0-7 0z",
  square: "M-3.2-3.2h6.4v6.4h-6.4z",
  triangle: "M0-4.2l4.2 7.4h-8.4z",
  diamond: "M0-4.6l4.6 4.6l-4.6 4.6l-4.6-4.6z",
};

const CHARTS = [
  {
    title: "Attainment",
    note: "share in time, of the last 30 s",
    format: percent,
    top: 1,
    axis: wholePercent,
    empty: "no request ended",
    line: { at: 0.9, text: "90 %" },
    series: [
      ["both objectives", (past) => past.shares("met", FLOW_S)],
      ["TTFT", (past) => past.shares("met_ttft", FLOW_S)],
      ["TPOT", (past) => past.shares("met_tpot", FLOW_S)],
    ],
  },
  {
    title: "Goodput",
    note: "requests per second, mean of 10 s",
    format: digits,
    least: 0.2,
    series: [
      ["in time", (past) => past.means(["met"], RATE_S)],
      ["all that ended", (past) => past.means(COUNTED, RATE_S)],
      ["rejected", (past) => past.means(["rejected"], RATE_S)],
      ["failed, expired", (past) => past.means(["failed", "expired"], RATE_S)],
    ],
  },
  {
    title: "Queues",
    note: "requests that run, and that wait",
    format: count,
    least: 4,
    series: [
      ["running", (past) => past.columns.running],
      ["at the gateway", (past) => past.columns.waiting],
      ["for prefill", (past) => past.columns.waiting_prefill],
      ["for decode", (past) => past.columns.waiting_decode],
    ],
  },
  {
    title: "Tokens",
    note: "per second, mean of 10 s",
    format: (value) => (value < 1e5 ? digits(value) : plain(value)),
    least: 2,
    series: [
      ["of answers", (past) => past.means(["answer_tokens"], RATE_S)],
      ["of prompts", (past) => past.means(["prompt_tokens"], RATE_S)],
    ],
  },
];
const MARGIN = { left: 40, right: 8, top: 8, bottom: 20 };
const CHART_HEIGHT = 150;
// Has room for every other label only.
const NARROW = 420;

class Chart {
  constructor(kind, pick) {
    this.kind = kind;
    this.svg = drawn("svg", { height: CHART_HEIGHT, role: "img" });
    this.values = kind.series.map(() => element("b"));
    const legend = element(
      "ul",
      { class: "legend" },
      ...kind.series.map(([name], index) => element("li", {}, swatch(index), name, " ", this.values[index])),
    );
    this.figure = element(
      "figure",
      {},
      element("figcaption", {}, element("h3", {}, kind.title), " ", element("small", {}, kind.note)),
      legend,
      this.svg,
    );
    this.svg.addEventListener("pointermove", (event) => {
      const box = this.svg.getBoundingClientRect();
      pick((event.clientX - box.left - MARGIN.left) / (box.width - MARGIN.left - MARGIN.right));
    });
    this.svg.addEventListener("pointerleave", () => pick(null));
  }

  /** `range_s` seconds up to now; the values beside the names are those of `ago_s`. */
  show(past, range_s, ago_s) {
    const { kind } = this;
    const lines = kind.series.map(([, of]) => {
      const values = (past.length ? of(past) : []).slice(-range_s);
      return new Array(range_s - values.length).fill(null).concat(values);
    });
    const known = lines.flat().filter((value) => value !== null);
    const top = kind.top ?? roundTop(Math.max(...known, 0), kind.least);
    const width = Math.max(200, this.figure.clientWidth);
    const x = (second) => MARGIN.left + ((width - MARGIN.left - MARGIN.right) * second) / (range_s - 1);
    const y = (value) => MARGIN.top + (CHART_HEIGHT - MARGIN.top - MARGIN.bottom) * (1 - value / top);
    const at = range_s - 1 - ago_s;
    this.svg.setAttribute("width", width);
    this.svg.setAttribute("viewBox", `0 0 ${width} ${CHART_HEIGHT}`);
    this.svg.setAttribute("aria-label", this.#summary(lines, range_s));
    this.svg.replaceChildren(...axes(kind, top, range_s, x, y, width));
    lines.forEach((line, index) => {
      this.svg.append(
        drawn("path", {
          d: lineOf(line, x, y),
          class: `series s${index}`,
          "stroke-dasharray": STYLES[index][0] || null,
        }),
      );
    });
    this.svg.append(drawn("path", { d: `M${x(at)} ${MARGIN.top}V${CHART_HEIGHT - MARGIN.bottom}`, class: "cursor" }));
    lines.forEach((line, index) => {
      setText(this.values[index], line[at] === null ? NONE : kind.format(line[at]));
      if (line[at] !== null) this.svg.append(mark(index, x(at), y(line[at])));
    });
    if (!known.length) {
      this.svg.append(
        drawn("text", { x: width / 2, y: CHART_HEIGHT / 2, class: "nothing" }, kind.empty ?? "nothing is known yet"),
      );
    }
  }

  #summary(lines, range_s) {
    const parts = this.kind.series.map(([name], index) => {
      const known = lines[index].filter((value) => value !== null);
      if (!known.length) return `${name}: nothing known`;
      const [least, most] = [Math.min(...known), Math.max(...known)].map(this.kind.format);
      return `${name}: ${this.kind.format(known.at(-1))} now, between ${least} and ${most}`;
    });
    return `${this.kind.title}, ${this.kind.note}, over ${range_s / 60} minutes. ${parts.join("; ")}.`;
  }
}

function swatch(index) {
  return drawn(
    "svg",
    { width: 26, height: 10, class: "swatch", "aria-hidden": "true" },
    drawn("path", { d: "M0 5H26", class: `series s${index}`, "stroke-dasharray": STYLES[index][0] || null }),
    mark(index, 13, 5),
  );
}

const mark = (index, x, y) =>
  drawn("path", { d: MARKS[STYLES[index][1]], class: `mark s${index}`, transform: `translate(${x} ${y})` });

function axes(kind, top, range_s, x, y, width) {
  const nodes = [];
  for (const share of [0, 0.5, 1]) {
    const value = share * top;
    nodes.push(drawn("path", { d: `M${MARGIN.left} ${y(value)}H${width - MARGIN.right}`, class: "grid" }));
    nodes.push(drawn("text", { x: MARGIN.left - 6, y: y(value) + 4, class: "axis y" }, (kind.axis ?? plain)(value)));
  }
  if (kind.line) {
    const height = y(kind.line.at);
    nodes.push(drawn("path", { d: `M${MARGIN.left} ${height}H${width - MARGIN.right}`, class: "reference" }));
    nodes.push(drawn("text", { x: MARGIN.left + 4, y: height + 12, class: "axis start" }, kind.line.text));
  }
  const step_s = range_s * (width < NARROW ? 0.4 : 0.2);
  for (let ago_s = 0; ago_s <= range_s; ago_s += step_s) {
    const place = ago_s === 0 ? "axis end" : ago_s === range_s ? "axis start" : "axis";
    const text = ago_s ? `−${ago_s / 60} min` : "now";
    nodes.push(drawn("text", { x: x(Math.max(0, range_s - 1 - ago_s)), y: CHART_HEIGHT - 4, class: place }, text));
  }
  return nodes;
}

function lineOf(values, x, y) {
  let [path, isDown] = ["", false];
  values.forEach((value, second) => {
    if (value !== null) path += `${isDown ? "L" : "M"}${x(second).toFixed(1)} ${y(value).toFixed(1)}`;
    isDown = value !== null;
  });
  return path;
}

/** The next of 2, 4, 10 and their tens above a value: halves of them are round too. */
function roundTop(value, least) {
  if (value <= least) return least;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 4, 10].map((step) => step * power).find((step) => step >= value);
}

/** Values beside an axis are round: no more digits than they have. */
const plain = (value) =>
  value < 1e4 ? String(Number(value.toPrecision(3))) : `${Number((value / 1e3).toPrecision(3))} k`;
