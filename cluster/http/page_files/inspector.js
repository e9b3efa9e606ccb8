// ── One request ──────────────────────────────────────────────────────────────────────────────────────────────────────
// Its phases follow one another from its arrival: a row each, all on one scale, with marks through all of them.

const PHASES = [
  ["gateway_queue_s", "Gateway queue", "wait", "from arrival until a decode worker got it"],
  ["retry_s", "Failed attempts", "retry", "from the first worker that got it to the last"],
  ["prefill_queue_s", "Prefill queue", "wait", "until its first chunk started"],
  ["prefill_s", "Prefill", "prefill", "until the first token was sampled"],
  ["kv_exposed_s", "KV exposed", "kv", "from the first token until all KV was there"],
  ["decode_queue_s", "Decode queue", "wait", "until the first step that included it"],
  ["decode_s", "Decode", "decode", "until the last token"],
];
const ON_THE_WAY = { title: "On the way", what: "messages between processes, and to the client" };
const NOT_TOLD = { title: "Not told", what: "it ended before its worker told where its time went" };
// Shorter than what clocks of several processes and their messages make of it.
const LEAST_REST_S = 0.0005;

/** `found`: what the gateway knows of the id, newest first; null while that is asked. `number` picks one of them. */
function showInspector(id, found, number) {
  setText(byId("inspector-title"), id);
  const body = byId("inspector-body");
  if (found === null) return body.replaceChildren(element("p", { class: "empty" }, "loading …"));
  if (!found.length) {
    return body.replaceChildren(
      element(
        "p",
        { class: "empty" },
        "Not among the last 1,000 requests that ended. Where it is still under way, it is shown here once it has.",
      ),
    );
  }
  const request = found.find((each) => each.number === number) ?? found[0];
  return body.replaceChildren(
    ...[
      facts(request),
      problemOf(request) ? element("p", { class: "problem" }, request.problem) : null,
      request.receipt
        ? timeline(request)
        : element("p", { class: "empty" }, "No worker has had it: there is no receipt."),
      request.receipt ? perToken(request) : null,
      others(id, found, request),
    ].filter((node) => node !== null),
  );
}

function facts(request) {
  const { receipt } = request;
  const cached = request.cached_tokens ? ` (${count(request.cached_tokens)} cached)` : "";
  const way = !receipt
    ? NONE
    : receipt.prefill_worker
      ? `${receipt.prefill_worker} → ${receipt.decode_worker}`
      : `${receipt.decode_worker} alone`;
  const early = receipt?.kv_bytes
    ? `, ${percent(receipt.kv_bytes_before_first_token / receipt.kv_bytes)} before the first token`
    : "";
  const rows = [
    ["Result", verdictMark(request.verdict)],
    ["Ended", `${clock(request.ended_unix_s)}, after ${seconds(request.took_s)}`],
    ["Tenant", request.tenant || null],
    ["Tokens", `${count(request.prompt_tokens)}${cached} → ${count(request.completion_tokens)}`],
    ["Finished by", request.finish_reasons.join(", ") || null],
    ["Workers", way],
    ["KV sent", receipt?.kv_bytes ? `${bytes(receipt.kv_bytes)}${early}` : null],
    ["Retries", receipt?.retries ? count(receipt.retries) : null],
    ["Preempted", receipt?.preemptions ? `${count(receipt.preemptions)} times` : null],
  ].filter(([, value]) => value !== null);
  return element(
    "dl",
    { class: "facts" },
    ...rows.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value))),
  );
}

const isWhole = (request) => ["met", "missed"].includes(request.verdict);

function timeline(request) {
  const phases = phasesOf(request);
  const marks = marksOf(request.ttft_s, request.receipt.predicted_ttft_s, request.ttft_objective_s, "first token");
  const end_s = phases.reduce((sum, phase) => sum + phase.time_s, 0);
  // A mark far beyond the end would leave no room for what happened: it is told in words then.
  const near = marks.map((mark) => mark.time_s).filter((time_s) => time_s <= 1.5 * end_s);
  const scale_s = Math.max(end_s, ...near) || 1;
  let start_s = 0;
  const rows = phases.map((phase) => {
    const row = phaseRow(phase, start_s, scale_s, marks);
    start_s += phase.time_s;
    return row;
  });
  return element(
    "div",
    {},
    element("h3", {}, "Where the time went"),
    phaseTable("Phases, one after the other", [...rows, scaleRow(scale_s)]),
    element(
      "div",
      { class: "marks" },
      element("h4", {}, "Time to first token"),
      element("ul", {}, ...marks.map((mark) => markItem(mark, verdictOf(request, request.met_ttft), scale_s))),
    ),
  );
}

function phasesOf(request) {
  const { receipt } = request;
  const phases = PHASES.map(([name, title, kind, what]) => ({ title, kind, what, time_s: receipt[name] })).filter(
    (phase) => phase.time_s > 0 || (phase.kind !== "retry" && request.worker_told),
  );
  const rest_s = request.took_s - phases.reduce((sum, phase) => sum + phase.time_s, 0);
  if (rest_s > LEAST_REST_S)
    phases.push({ ...(request.worker_told ? ON_THE_WAY : NOT_TOLD), kind: "rest", time_s: rest_s });
  return phases;
}

/** What a time is compared with: those that are not known are left out. */
function marksOf(actual_s, predicted_s, objective_s, name) {
  return [
    { kind: "first", time_s: actual_s, name },
    { kind: "predicted", time_s: predicted_s || null, name: "predicted" },
    { kind: "objective", time_s: objective_s, name: "objective" },
  ].filter((mark) => mark.time_s !== null);
}

/** Of an objective, in a word: one that was broken off has none. */
const verdictOf = (request, isMet) => (isWhole(request) ? (isMet ? ", met" : ", missed") : "");

function phaseTable(name, rows) {
  return element(
    "table",
    { class: "phases", role: "table", "aria-label": name },
    element("tbody", { role: "rowgroup" }, ...rows),
  );
}

function phaseRow(phase, start_s, scale_s, marks) {
  const bar = placed(element("span", { class: `phase ${phase.kind}` }), start_s / scale_s, phase.time_s / scale_s);
  const lines = marks
    .filter((mark) => mark.time_s <= scale_s)
    .map((mark) => placed(element("span", { class: `at ${mark.kind}` }), mark.time_s / scale_s));
  return trackRow(
    phase.title,
    phase.what,
    [phase.time_s ? bar : null, ...lines],
    phase.time_s ? seconds(phase.time_s) : "0",
  );
}

function trackRow(title, what, drawing, text) {
  return element(
    "tr",
    { role: "row" },
    element("th", { scope: "row", role: "rowheader", title: what }, title),
    element("td", { role: "cell", class: "track", "aria-hidden": "true" }, ...drawing),
    element("td", { role: "cell", class: "number" }, text),
  );
}

/** By the style's object: the page's policy allows no style in attributes. */
function placed(node, left, width = null) {
  node.style.left = `${100 * left}%`;
  if (width !== null) node.style.width = `${100 * width}%`;
  return node;
}

function scaleRow(scale_s) {
  const step_s = roundStep(scale_s / 7);
  const ticks = [];
  for (let tick = 0; tick * step_s <= scale_s; tick += 1) {
    const time_s = tick * step_s;
    const text = scale_s < 1 ? `${plain(time_s * 1e3)} ms` : `${plain(time_s)} s`;
    const isLast = time_s > 0.97 * scale_s;
    ticks.push(placed(element("span", { class: isLast ? "tick last" : "tick" }, tick ? text : "0"), time_s / scale_s));
  }
  const track = element("td", { class: "track" }, ...ticks);
  return element("tr", { class: "scale", "aria-hidden": "true" }, element("td"), track, element("td"));
}

/** The next of 1, 2, 5 and their tens. */
function roundStep(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * power).find((step) => step >= value);
}

/** A mark in words, with its sign. */
function markItem(mark, verdict, scale_s) {
  const sign = element("span", { class: `sign-of ${mark.kind}`, "aria-hidden": "true" });
  const words = (mark.kind === "objective" ? verdict : "") + (mark.time_s > scale_s ? " (beyond this scale)" : "");
  return element("li", {}, sign, `${mark.name} `, element("b", {}, seconds(mark.time_s)), words);
}

/** The time per output token on a scale of its own: bars, one below the other. */
function perToken(request) {
  const { receipt } = request;
  const tpot_s = request.tpot_s ?? (receipt.tpot_s || null);
  const marks = marksOf(tpot_s, receipt.predicted_tpot_s, request.tpot_objective_s, "this request");
  if (!marks.length) return null;
  const scale_s = Math.max(...marks.map((mark) => mark.time_s));
  const rows = marks.map((mark) => {
    const bar = placed(element("span", { class: `phase token ${mark.kind}` }), 0, mark.time_s / scale_s);
    const words = mark.kind === "objective" ? verdictOf(request, request.met_tpot) : "";
    return trackRow(mark.name, null, [bar], seconds(mark.time_s) + words);
  });
  return element("div", {}, element("h3", {}, "Time per output token"), phaseTable("Time per output token", rows));
}

function others(id, found, shown) {
  if (found.length < 2) return null;
  return element(
    "p",
    { class: "note" },
    "The same id was had by: ",
    ...found
      .filter((each) => each !== shown)
      .flatMap((each) => [
        element(
          "a",
          { href: linkTo({ id, number: each.number }) },
          `${clock(each.ended_unix_s)} (${VERDICTS[each.verdict][1]})`,
        ),
        " ",
      ]),
  );
}
