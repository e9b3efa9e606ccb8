// ── Reading the gateway, once a second ───────────────────────────────────────────────────────────────────────────────
// loading ─▶ live ◀─▶ lost (tried again)    401 ─▶ locked, until a key is given    403 ─▶ a tenant's requests only

const POLL_MS = 1000;
const MAX_WAIT_MS = 8000;
const ANSWER_MS = 8000;
// Somebody still writes.
const TYPING_MS = 150;
// In this tab only, and gone with it.
const KEY = "tandem-key";

let past = new Past();
let round = 0;
let began = null;
let overview = null;
let lostSince = null;
let failures = 0;
let timer = 0;
let isPaused = false;
let mayBeOperator = true;
let moment = { ago_s: 0, hovered: null };
let inspected = null;

class Refused extends Error {
  constructor(status, message, retry_ms) {
    super(message);
    Object.assign(this, { status, retry_ms });
  }
}

async function ask(path) {
  const key = sessionStorage.getItem(KEY);
  const headers = key ? { authorization: `Bearer ${key}` } : {};
  const response = await fetch(path, {
    headers,
    cache: "no-store",
    credentials: "omit",
    signal: AbortSignal.timeout(ANSWER_MS),
  });
  const content = await response.json().catch(() => ({}));
  if (response.ok) return content;
  throw new Refused(
    response.status,
    content.error?.message ?? `HTTP ${response.status}`,
    Number(response.headers.get("retry-after-ms")),
  );
}

async function readCluster() {
  if (!mayBeOperator) return;
  const since = past.last === null ? "" : `?since=${past.last}`;
  try {
    overview = await ask(`tandem/v1/overview${since}`);
  } catch (error) {
    if (error.status !== 403) throw error;
    // Once is enough: it will not change for this key.
    mayBeOperator = false;
    overview = null;
    return;
  }
  if (began !== null && began !== overview.began_unix_s) {
    // Another gateway process: its seconds are not those of the last.
    past = new Past();
    began = null;
    return;
  }
  began = overview.began_unix_s;
  past.add(overview.history);
}

async function readRequests() {
  const query = new URLSearchParams({ id: byId("filter").value, verdict: byId("verdict").value });
  return ask(`tandem/v1/requests?${query}`);
}

/** What goes wrong is told where the answer would be: it is nothing that the rest of the page needs. */
async function readInspected() {
  const asked = inspected;
  if (!asked || asked.found?.length) return;
  try {
    asked.found = (await ask(`tandem/v1/request?${new URLSearchParams({ id: asked.id })}`)).requests;
  } catch (error) {
    if (asked === inspected) setText(byId("inspector-body"), reasonOf(error));
    return;
  }
  if (asked === inspected) showInspector(asked.id, asked.found, asked.number);
}

async function poll() {
  clearTimeout(timer);
  const own = (round += 1);
  let wait_ms = POLL_MS;
  try {
    const [, ended] = await Promise.all([readCluster(), readRequests(), readInspected()]);
    // Another one has begun since, and knows better what is asked for.
    if (own !== round) return;
    lostSince = null;
    failures = 0;
    show(ended);
  } catch (error) {
    if (own !== round) return;
    if (error.status === 401) return lock(error.message);
    failures += 1;
    lostSince ??= Date.now() / 1e3;
    wait_ms = Math.max(error.retry_ms || 0, Math.min(MAX_WAIT_MS, POLL_MS * 2 ** (failures - 1)));
    showLost(error);
  }
  plan(wait_ms);
}

/** Whoever does not look costs nothing. */
function plan(wait_ms) {
  clearTimeout(timer);
  if (!isPaused && !document.hidden && document.body.dataset.view !== "locked") timer = setTimeout(poll, wait_ms);
}

// ── What is shown ────────────────────────────────────────────────────────────────────────────────────────────────────

const CLUSTER_STATES = {
  ready: ["●", "ready"],
  "no workers": ["▲", "no workers"],
  draining: ["◐", "draining: about to end"],
};

function setState(kind, sign, words) {
  const state = byId("state");
  state.dataset.kind = kind;
  setText(state, `${sign} ${words}`);
}

function setNotice(text) {
  setHidden(byId("notice"), !text);
  setText(byId("notice"), text);
}

function show(ended) {
  document.body.dataset.view = overview ? "live" : "tenant";
  setHidden(byId("key-form"), true);
  setHidden(byId("forget"), sessionStorage.getItem(KEY) === null);
  setNotice(
    overview ? "" : "The cluster is shown to operators (gateway.auth.operators). These are your tenant's requests.",
  );
  showRequests(ended);
  if (inspected) openInspector();
  if (isPaused) setState("paused", "❚❚", `paused at ${clock(Date.now() / 1e3)}`);
  else setState(...(overview ? [overview.state, ...CLUSTER_STATES[overview.state]] : ["ready", "●", "connected"]));
  if (!overview) return;
  setText(byId("model"), overview.model.name);
  setText(document.querySelector("title"), `${overview.model.name} · Tandem`);
  byId("model").title = `${overview.model.architecture} · context of ${count(overview.model.max_context)} tokens`;
  setText(byId("router"), overview.router);
  setText(byId("uptime"), longTime(overview.now_unix_s - overview.began_unix_s));
  showTiles(overview, past);
  showPools(overview.workers);
  showFlows(overview.workers, overview.kv_flows);
  showCharts();
}

const reasonOf = (error) => (error instanceof Refused ? error.message : "the gateway cannot be reached");

function showLost(error) {
  const since = clock(lostSince);
  if (document.body.dataset.view === "loading") document.body.dataset.view = "lost";
  setState("lost", "✕", `no connection since ${since}`);
  setNotice(`Since ${since}: ${reasonOf(error)}. What is shown is as it was then; it is tried again by itself.`);
}

function lock(problem) {
  const had = sessionStorage.getItem(KEY) !== null;
  sessionStorage.removeItem(KEY);
  document.body.dataset.view = "locked";
  setState("lost", "✕", "a key is needed");
  setNotice("");
  setText(byId("key-problem"), had ? problem : "");
  setHidden(byId("forget"), true);
  setHidden(byId("key-form"), false);
  // What is modal would keep everybody from the form. It opens again with the right key.
  byId("inspector").close();
  byId("key").focus();
}

// ── Charts ───────────────────────────────────────────────────────────────────────────────────────────────────────────

const range_s = () => Number(document.querySelector("input[name=range]:checked").value);

const charts = CHARTS.map(
  (kind) =>
    new Chart(kind, (share) => {
      moment.hovered = share === null ? null : Math.round((1 - Math.min(1, Math.max(0, share))) * (range_s() - 1));
      showCharts();
    }),
);
byId("charts").append(...charts.map((chart) => chart.figure));

function showCharts() {
  const most_s = range_s() - 1;
  const ago_s = Math.min(moment.hovered ?? moment.ago_s, most_s);
  for (const chart of charts) chart.show(past, range_s(), ago_s);
  const slider = byId("moment");
  slider.min = -most_s;
  if (moment.hovered === null) slider.value = -ago_s;
  const text = ago_s ? `${longTime(ago_s)} ago` : "now";
  setText(byId("moment-text"), text);
  slider.setAttribute(
    "aria-valuetext",
    [
      text,
      ...charts.flatMap((chart) =>
        chart.kind.series.map(([name], index) => `${chart.kind.title} ${name} ${chart.values[index].textContent}`),
      ),
    ].join(", "),
  );
}

// ── What the reader does ─────────────────────────────────────────────────────────────────────────────────────────────

function openFromHash() {
  const wanted = new URLSearchParams(location.hash.slice(1));
  const dialog = byId("inspector");
  if (!wanted.has("request")) {
    inspected = null;
    return dialog.close();
  }
  inspected = { id: wanted.get("request"), number: Number(wanted.get("number")), found: null };
  showInspector(inspected.id, null, inspected.number);
  openInspector();
  // While the page is paused too: who asks is told.
  return readInspected();
}

function openInspector() {
  if (!byId("inspector").open) byId("inspector").showModal();
}

byId("inspector").addEventListener("close", () => {
  if (document.body.dataset.view !== "locked" && location.hash.startsWith("#request=")) clearHash();
});

/** Without a jump, and without an entry to go back to. */
function clearHash() {
  inspected = null;
  history.replaceState(null, "", location.pathname + location.search);
}

byId("inspector-close").addEventListener("click", () => byId("inspector").close());
// What is beside it is its backdrop.
byId("inspector").addEventListener("click", ({ clientX, clientY, detail }) => {
  const box = byId("inspector").getBoundingClientRect();
  const isInside = clientX >= box.left && clientX <= box.right && clientY >= box.top && clientY <= box.bottom;
  // A key that presses a button is a click too, at no place.
  if (detail && !isInside) byId("inspector").close();
});
window.addEventListener("hashchange", openFromHash);

byId("moment").addEventListener("input", (event) => {
  moment = { ago_s: -Number(event.target.value), hovered: null };
  showCharts();
});
for (const radio of document.querySelectorAll("input[name=range]")) radio.addEventListener("change", showCharts);

// Also while it is paused: these ask for something.
byId("filter").addEventListener("input", () => {
  clearTimeout(timer);
  timer = setTimeout(poll, TYPING_MS);
});
byId("verdict").addEventListener("change", poll);

byId("pause").addEventListener("click", () => {
  isPaused = !isPaused;
  byId("pause").setAttribute("aria-pressed", isPaused);
  setText(byId("pause"), isPaused ? "Go on" : "Pause");
  if (!isPaused) return poll();
  clearTimeout(timer);
  return setState("paused", "❚❚", `paused at ${clock(Date.now() / 1e3)}`);
});

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, byId("key").value.trim());
  byId("key").value = "";
  mayBeOperator = true;
  document.body.dataset.view = "loading";
  poll();
});
byId("forget").addEventListener("click", () => {
  sessionStorage.removeItem(KEY);
  location.reload();
});

document.addEventListener("visibilitychange", () => plan(0));
new ResizeObserver(() => {
  if (!overview) return;
  showCharts();
  showFlows(overview.workers, overview.kv_flows);
}).observe(byId("charts"));

if (location.hash) openFromHash();
poll();
