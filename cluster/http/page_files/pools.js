// ── Workers and the figures of now ───────────────────────────────────────────────────────────────────────────────────

const POOLS = [
  ["prefill", "Prefill"],
  ["colocated", "Colocated"],
  ["decode", "Decode"],
];
const STATES = { live: ["●", "live"], draining: ["◐", "draining"], stale: ["✕", "stale"] };

function showPools(workers) {
  const table = byId("workers");
  const pools = POOLS.map(([role, title]) => ({
    role,
    title,
    workers: workers
      .filter((worker) => worker.role === role)
      .sort((one, other) => inOrder(one.worker_id, other.worker_id)),
  })).filter((pool) => pool.workers.length);
  setHidden(byId("no-workers"), workers.length > 0);
  for (const node of [table, byId("kv-key")]) setHidden(node, !workers.length);
  keyed(table, pools, (pool) => pool.role, makePool, updatePool, 2);
}

function makePool() {
  const title = element("th", { scope: "rowgroup", role: "rowheader", colspan: 5 });
  const head = element("tr", { role: "row", class: "pool" }, title);
  return element("tbody", { role: "rowgroup" }, head);
}

function updatePool(body, pool) {
  setText(body.firstChild.firstChild, `${pool.title} · ${pool.workers.length}`);
  keyed(body, pool.workers, (worker) => worker.worker_id, makeWorker, updateWorker, 1);
}

function makeWorker(worker) {
  const cell = (kind) => element("td", { role: "cell", class: kind });
  const name = element(
    "th",
    { scope: "row", role: "rowheader", class: "name", title: worker.address },
    worker.worker_id,
  );
  const bar = element(
    "span",
    { class: "bar", "aria-hidden": "true" },
    ...["used", "cached"].map((kind) => element("i", { class: kind })),
  );
  const blocks = element("td", { role: "cell", class: "kv" }, bar, element("span", { class: "kv-text" }));
  return element(
    "tr",
    { role: "row" },
    name,
    cell("state-cell"),
    cell("number running"),
    cell("number waiting"),
    blocks,
  );
}

function updateWorker(row, worker) {
  const [, state, running, waiting, blocks] = row.children;
  const [sign, word] = STATES[worker.state];
  row.className = worker.state;
  const heard = worker.state === "stale" ? `, heard ${longTime(worker.heartbeat_age_s)} ago` : "";
  setText(state, `${sign} ${word}${heard}`);
  setText(running, count(worker.running));
  setText(waiting, count(worker.waiting));
  waiting.title = `${count(worker.queued_tokens)} tokens of prompts wait`;
  const used = Math.max(0, worker.blocks_total - worker.blocks_free);
  const cached = Math.min(worker.blocks_cached, worker.blocks_free);
  const [usedBar, cachedBar] = blocks.firstChild.children;
  usedBar.style.width = `${(100 * used) / worker.blocks_total}%`;
  cachedBar.style.width = `${(100 * cached) / worker.blocks_total}%`;
  const faults = worker.kv_faults ? ` · ${count(worker.kv_faults)} damaged frames` : "";
  setText(
    blocks.lastChild,
    `${count(used)} used · ${count(cached)} cached · ${count(worker.blocks_free - cached)} free${faults}`,
  );
}

/** `past` gives what is not in `overview`: rates of the last seconds. */
function showTiles(overview, past) {
  const { attainment, requests } = overview;
  const [met, ended] = [past.mean("met", FLOW_S), past.meanOf(COUNTED, FLOW_S)];
  const refused = past.mean("rejected", FLOW_S);
  const [local, finished] = [past.mean("local", FLOW_S), past.mean("finished", FLOW_S)];
  const kv = overview.kv_flows.reduce((sum, flow) => sum + flow.bytes_per_s, 0);
  const quota = requests.over_quota ? `, ${count(requests.over_quota)} over quota` : "";
  const share = (value) => Math.round(100 * value);
  const tiles = [
    {
      name: "Attainment",
      value: attainment.requests ? percent(attainment.both) : NONE,
      note: attainment.requests
        ? `TTFT ${share(attainment.ttft)} · TPOT ${share(attainment.tpot)} % of ${attainment.requests}`
        : "no request ended lately",
    },
    { name: "In time", value: perS(met), note: `of ${perS(ended)} that ended` },
    { name: "Running", value: count(requests.running), note: `${count(requests.waiting)} wait at the gateway` },
    {
      name: "Tokens out",
      value: perS(past.mean("answer_tokens", RATE_S)),
      note: `${perS(past.mean("prompt_tokens", RATE_S))} of prompts in`,
    },
    {
      name: "KV moved",
      value: bytesPerS(kv),
      note: finished ? `${wholePercent(local / finished)} computed where decoded` : "nothing to move",
    },
    { name: "Refused", value: perS(refused), note: `${count(requests.rejected)} since the start${quota}` },
  ];
  keyed(
    byId("tiles"),
    tiles,
    (tile) => tile.name,
    (tile) => element("div", {}, element("dt", {}, tile.name), element("dd"), element("dd", { class: "note" })),
    (node, tile) => {
      setText(node.children[1], tile.value);
      setText(node.children[2], tile.note);
    },
  );
}
