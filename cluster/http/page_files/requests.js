// ── Requests that ended ──────────────────────────────────────────────────────────────────────────────────────────────

const linkTo = (row) => `#request=${encodeURIComponent(row.id)}&number=${row.number}`;

/** `began_unix_s` names the gateway's process: another one numbers its requests from 1 again. */
function showRequests({ began_unix_s, requests: rows }) {
  const isFiltered = byId("filter").value !== "" || byId("verdict").value !== "";
  setHidden(byId("no-requests"), rows.length > 0);
  setText(byId("no-requests"), isFiltered ? "None of those that are kept is like this." : "Nothing has ended yet.");
  setText(byId("recent-note"), rows.length ? `the last ${count(rows.length)}${isFiltered ? " like this" : ""}` : "");
  keyed(
    byId("recent-rows"),
    rows,
    (row) => `${began_unix_s}/${row.number}`,
    makeRequest,
    () => {},
  );
}

/** What has ended does not change: a row is made once. */
function makeRequest(row) {
  const cell = (kind, ...content) => element("td", { role: "cell", class: kind }, ...content);
  const name = row.id
    ? element("a", { href: linkTo(row), class: "id" }, row.id)
    : element("span", { class: "id" }, "without an id");
  const tenant = row.tenant ? element("span", { class: "tenant" }, row.tenant) : null;
  const problem = problemOf(row) ? element("span", { class: "problem", title: row.problem }, row.problem) : null;
  const cached = row.cached_tokens ? ` (${count(row.cached_tokens)} cached)` : "";
  return element(
    "tr",
    { role: "row" },
    cell("when", clock(row.ended_unix_s)),
    cell("what", name, tenant),
    cell("result", verdictMark(row.verdict), problem),
    cell("number ttft", seconds(row.ttft_s)),
    cell("number tpot", seconds(row.tpot_s)),
    cell("number took", seconds(row.took_s)),
    cell("number tokens", `${count(row.prompt_tokens)}${cached} → ${count(row.completion_tokens)}`),
  );
}

/** What a client left by says nothing that its result does not. */
const problemOf = (request) => (request.verdict === "cancelled" ? "" : request.problem);
