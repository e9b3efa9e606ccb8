// ── KV from prefill to decode workers ────────────────────────────────────────────────────────────────────────────────
// Prefill workers on the left, decode workers on the right, an arrow for every pair: as wide as its bytes per second,
// and with that number where it arrives. Every arrow has a place of its own at either end, so that no numbers meet.

const MAX_ARROWS = 40;
const MAX_NODES = 24;
const NODE_WIDTH = 96;
const PORT_HEIGHT = 28;
// Above the uppermost arrow.
const LABEL_HEIGHT = 14;
const MAX_ARROW_WIDTH = 12;

function showFlows(workers, flows) {
  // The last of many is the sum of all others, which has no names.
  const arrows = flows.filter((flow) => flow.from).slice(0, MAX_ARROWS);
  const sources = nodesOf(workers, "prefill", arrows, "from", "to");
  const targets = nodesOf(workers, "decode", arrows, "to", "from");
  const figure = byId("flows");
  const rest =
    flows.reduce((sum, flow) => sum + flow.bytes_per_s, 0) - arrows.reduce((sum, flow) => sum + flow.bytes_per_s, 0);
  const more =
    flows.length > arrows.length ? `Drawn are the ${MAX_ARROWS} largest; the others are ${bytesPerS(rest)}. ` : "";
  const none = "No KV has moved: prompts were computed where they are decoded, or none came.";
  setText(byId("flows-note"), flows.length ? more : none);
  setHidden(byId("flows-details"), !flows.length);
  keyed(
    byId("flows-rows"),
    flows,
    (flow) => `${flow.from}\n${flow.to}`,
    (flow) =>
      element(
        "tr",
        {},
        element("td", {}, flow.from || "all others"),
        element("td", {}, flow.to),
        element("td", { class: "number" }),
      ),
    (row, flow) => setText(row.lastChild, bytesPerS(flow.bytes_per_s)),
  );
  figure.replaceChildren(
    ...(sources.length || targets.length ? [flowDrawing(figure.clientWidth, sources, targets, arrows)] : []),
  );
}

/** The workers of one side, each with the arrows at it, in order of their names. Of too many, those with arrows. */
function nodesOf(workers, role, arrows, end, otherEnd) {
  const ids = workers.filter((worker) => worker.role === role).map((worker) => worker.worker_id);
  const withArrows = new Set(arrows.map((arrow) => arrow[end]));
  const all = [...withArrows, ...ids.filter((id) => !withArrows.has(id))].slice(
    0,
    Math.max(MAX_NODES, withArrows.size),
  );
  return all.sort(inOrder).map((id) => {
    const own = arrows
      .filter((arrow) => arrow[end] === id)
      .sort((one, other) => inOrder(one[otherEnd], other[otherEnd]));
    return {
      id,
      arrows: own,
      height: Math.max(1.5, own.length) * PORT_HEIGHT,
      total: own.reduce((sum, arrow) => sum + arrow.bytes_per_s, 0),
    };
  });
}

function flowDrawing(width, sources, targets, arrows) {
  const gap = 10;
  const heightOf = (nodes) => nodes.reduce((sum, node) => sum + node.height + gap, -gap);
  const height = Math.max(heightOf(sources), heightOf(targets), 2 * PORT_HEIGHT);
  const largest = Math.max(...arrows.map((arrow) => arrow.bytes_per_s), 0);
  const text = arrows.length
    ? arrows.map((arrow) => `${arrow.from} to ${arrow.to} ${bytesPerS(arrow.bytes_per_s)}`).join("; ")
    : "No KV moves now";
  const svg = drawn("svg", {
    width,
    height: height + LABEL_HEIGHT + 2,
    viewBox: `0 ${-LABEL_HEIGHT} ${width} ${height + LABEL_HEIGHT + 2}`,
    role: "img",
    "aria-label": text,
  });
  const [starts, ends] = [new Map(), new Map()];
  const lines = drawn("g", {});
  svg.append(lines);
  for (const [nodes, x, ports] of [
    [sources, 0, starts],
    [targets, width - NODE_WIDTH, ends],
  ]) {
    let y = (height - heightOf(nodes)) / 2;
    for (const node of nodes) {
      svg.append(nodeDrawing(node, x, y));
      node.arrows.forEach((arrow, index) => ports.set(arrow, y + (node.height * (index + 0.5)) / node.arrows.length));
      y += node.height + gap;
    }
  }
  for (const arrow of arrows) {
    const size = Math.max(1, (MAX_ARROW_WIDTH * arrow.bytes_per_s) / largest);
    lines.append(...arrowDrawing(NODE_WIDTH, starts.get(arrow), width - NODE_WIDTH, ends.get(arrow), size));
    const label = { x: width - NODE_WIDTH - 12, y: ends.get(arrow) - size / 2 - 4, class: "flow-text" };
    svg.append(drawn("text", label, bytesPerS(arrow.bytes_per_s)));
  }
  return svg;
}

function nodeDrawing(node, x, y) {
  return drawn(
    "g",
    { class: node.arrows.length ? "node" : "node idle" },
    drawn("title", {}, node.id),
    drawn("rect", { x: x + 0.5, y, width: NODE_WIDTH - 1, height: node.height, rx: 4 }),
    drawn("text", { x: x + NODE_WIDTH / 2, y: y + node.height / 2 - 3, class: "node-name" }, shortName(node.id, 12)),
    drawn(
      "text",
      { x: x + NODE_WIDTH / 2, y: y + node.height / 2 + 12, class: "node-rate" },
      node.total ? bytesPerS(node.total) : "idle",
    ),
  );
}

function arrowDrawing(x, y, endX, endY, size) {
  const head = 6 + size / 3;
  const tip = endX - 1;
  const bend = (endX - x) * 0.45;
  const path = `M${x} ${y}C${x + bend} ${y} ${tip - head - bend} ${endY} ${tip - head} ${endY}`;
  const half = size / 2 + 3;
  return [
    drawn("path", { d: path, class: "flow", "stroke-width": size }),
    drawn("path", { d: `M${tip} ${endY}l${-head} ${-half}v${2 * half}z`, class: "flow-head" }),
  ];
}
