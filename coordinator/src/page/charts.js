// Two drawings with a cursor each: the pointer or the arrow keys move it, and a line below says what is there.

// The cursor and the line are shared by both drawings.
function withCursor(chart, label) {
  const readout = el("p", { class: "readout", "aria-live": "polite" });
  const drawing = svg("svg", { role: "application", tabindex: 0, "aria-label": label, "aria-roledescription": "chart" });
  const box = el("div", { class: "chart" }, drawing, readout);
  let at = null;
  const show = (place) => {
    at = place;
    drawing.querySelectorAll(".here").forEach((mark) => mark.remove());
    readout.replaceChildren();
    if (place === null) { readout.append(chart.hint()); return; }
    const mark = chart.mark(place);
    if (mark) drawing.append(svg("rect", { class: "here", rx: 1.5, ...mark }));
    readout.append(...chart.tell(place));
  };
  drawing.addEventListener("pointermove", (event) => {
    const bounds = drawing.getBoundingClientRect();
    const place = chart.find(event.clientX - bounds.left, event.clientY - bounds.top);
    if (JSON.stringify(place) !== JSON.stringify(at)) show(place);
  });
  drawing.addEventListener("pointerleave", () => { if (document.activeElement !== drawing) show(null); });
  drawing.addEventListener("focus", () => { if (at === null && drawing.matches(":focus-visible")) show(chart.first()); });
  drawing.addEventListener("blur", () => show(null));
  drawing.addEventListener("keydown", (event) => {
    const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    if (event.key === "Escape") { show(null); return; }
    if (event.key === "Home") { event.preventDefault(); show(chart.first()); return; }
    if (!(event.key in steps)) return;
    event.preventDefault();
    show(at === null ? chart.first() : chart.step(at, ...steps[event.key]));
  });
  return { box, drawing, again: () => show(at !== null && chart.has(at) ? at : null) };
}

// Layer by sublayer: what each was left with.
function heatMap() {
  const GAP = 1, HIGH = 19, FOOT = 20;
  let kinds = [], cells = new Map(), layers = 0, of = null, plot = null;
  const key = (layer, row) => `${layer}/${row}`;
  const chart = {
    hint: () => "Point at a cell, or focus the map and use the arrow keys.",
    first: () => (layers > 0 && kinds.length > 0 ? { layer: 0, row: 0 } : null),
    has: (place) => place.layer < layers && place.row < kinds.length,
    step: (place, x, y) => ({
      layer: Math.min(layers - 1, Math.max(0, place.layer + x)),
      row: Math.min(kinds.length - 1, Math.max(0, place.row + y)),
    }),
    find(x, y) {
      if (!plot) return null;
      const place = { layer: Math.floor((x - plot.left) / plot.wide), row: Math.floor(y / HIGH) };
      return place.layer >= 0 && place.layer < layers && place.row >= 0 && place.row < kinds.length ? place : null;
    },
    mark: ({ layer, row }) => ({ x: plot.left + layer * plot.wide - 1, y: row * HIGH - 1, width: plot.wide + 1, height: HIGH + 1 }),
    tell({ layer, row }) {
      const cell = cells.get(key(layer, row));
      const name = el("b", {}, `layer ${layer} · ${kinds[row]}`);
      if (!cell) return [name, " · not pruned yet"];
      const held = cell.held_out === undefined || cell.held_out === null ? "" : ` (held out ${error(cell.held_out)})`;
      return [name, ` · error ${error(cell.error)}${held} · ${percent(cell.sparsity)} zeros · solved in ${seconds(cell.seconds)}`];
    },
  };
  const view = withCursor(chart, "Heat map of layers and sublayers. Arrow keys move from cell to cell.");
  view.draw = (model, measure, color) => {
    kinds = model.head.kinds;
    of = measure;
    cells = new Map();
    const deepest = model.layers.reduce((most, layer) => Math.max(most, layer.layer + 1), 0);
    layers = Math.max(model.head.layers || 0, deepest);
    for (const layer of model.layers) {
      for (const cell of layer.cells) cells.set(key(layer.layer, kinds.indexOf(cell.kind)), cell);
    }
    const width = view.drawing.clientWidth || 600;
    const left = Math.min(104, 12 + 6.6 * Math.max(4, ...kinds.map((kind) => kind.length)));
    const wide = layers > 0 ? (width - left) / layers : 0;
    plot = { left, wide };
    const high = kinds.length * HIGH + FOOT;
    view.drawing.setAttribute("viewBox", `0 0 ${width} ${high}`);
    view.drawing.setAttribute("height", high);
    const scale = measure.scale([...cells.values()]);
    const parts = kinds.map((kind, row) => svg("text", { x: left - 8, y: row * HIGH + 13, "text-anchor": "end" }, kind));
    const gap = wide > 5 ? GAP : 0;
    for (let layer = 0; layer < layers; layer += 1) {
      for (let row = 0; row < kinds.length; row += 1) {
        const cell = cells.get(key(layer, row));
        const paint = cell && of.value(cell) !== null ? color(scale.share(of.value(cell))) : "var(--void)";
        const rect = svg("rect", { x: left + layer * wide, y: row * HIGH, width: Math.max(0.5, wide - gap), height: HIGH - GAP });
        rect.style.fill = paint;
        parts.push(rect);
      }
    }
    const every = [1, 2, 4, 5, 8, 10, 16, 20, 32, 50].find((step) => step * wide >= 26) || 100;
    for (let layer = 0; layer < layers; layer += every) {
      parts.push(svg("text", { x: left + (layer + 0.5) * wide, y: kinds.length * HIGH + 14, "text-anchor": "middle" }, layer));
    }
    view.drawing.replaceChildren(...parts);
    view.again();
    return scale;
  };
  return view;
}

// Worker by time: what each did.
function timeline() {
  const HIGH = 20, HEAD = 4, FOOT = 22;
  let lanes = [], spans = [], plot = null;
  const end = (span) => (span.to === null ? plot.to : span.to);
  const x = (at) => plot.left + ((at - plot.from) / Math.max(1, plot.to - plot.from)) * (plot.width - plot.left);
  const chart = {
    hint: () => "Point at a bar, or focus the timeline and use the arrow keys.",
    first: () => (spans.length > 0 ? { index: 0 } : null),
    has: (place) => place.index < spans.length,
    step(place, right, down) {
      if (down === 0) return { index: Math.min(spans.length - 1, Math.max(0, place.index + right)) };
      const here = spans[place.index];
      const lane = Math.min(lanes.length - 1, Math.max(0, lanes.findIndex((l) => l.worker === here.worker) + down));
      const there = spans.findIndex((span) => span.worker === lanes[lane].worker && end(span) >= here.from);
      return there < 0 ? place : { index: there };
    },
    find(px, py) {
      if (!plot) return null;
      const lane = lanes[Math.floor((py - HEAD) / HIGH)];
      if (!lane) return null;
      const index = spans.findLastIndex((span) => span.worker === lane.worker && x(span.from) - 1 <= px && x(end(span)) + 1 >= px);
      return index < 0 ? null : { index };
    },
    mark({ index }) {
      const span = spans[index];
      const row = lanes.findIndex((lane) => lane.worker === span.worker);
      return { x: x(span.from) - 1, y: HEAD + row * HIGH, width: Math.max(3, x(end(span)) - x(span.from) + 2), height: HIGH - 2 };
    },
    tell({ index }) {
      const span = spans[index];
      const lane = lanes.find((found) => found.worker === span.worker);
      const what = span.kind === "assist" ? `helps with layer ${span.index}` : `${span.kind} ${span.index}`;
      const how = span.to === null ? `for ${duration(plot.to - span.from)} so far` : `${seconds((span.to - span.from) / 1000)}, ${span.end}`;
      return [el("b", {}, `${lane.name} · ${what}`), ` · ${how} · from ${clock(span.from)}`];
    },
  };
  const view = withCursor(chart, "Timeline of workers. Left and right move in time, up and down between workers.");
  view.draw = (model, now) => {
    const { head } = model;
    spans = [...model.spans, ...model.open].sort((one, other) => one.from - other.from);
    const named = new Map(model.workers.map((lane) => [lane.worker, lane]));
    for (const span of spans) if (!named.has(span.worker)) named.set(span.worker, { worker: span.worker, name: `worker ${span.worker}` });
    lanes = [...named.values()].sort((one, other) => one.worker - other.worker);
    const width = view.drawing.clientWidth || 600;
    const from = head.started ?? (spans[0] ? spans[0].from : now);
    const to = Math.max(head.ended ?? now, from + 1000);
    const left = Math.min(width * 0.28, 14 + 6.4 * Math.max(4, ...lanes.map((lane) => lane.name.length)));
    plot = { left, width, from, to };
    const foot = HEAD + lanes.length * HIGH;
    view.drawing.setAttribute("viewBox", `0 0 ${width} ${foot + FOOT}`);
    view.drawing.setAttribute("height", foot + FOOT);
    const parts = [];
    const step = [1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 28800, 86400, 172800]
      .map((value) => value * 1000).find((value) => (value / (to - from)) * (width - left) >= 64) || 604800000;
    for (let at = from; at <= to; at += step) {
      const place = x(at);
      parts.push(svg("line", { class: "grid", x1: place, x2: place, y1: 0, y2: foot + 2 }));
      const anchor = place > width - 24 ? "end" : place < left + 12 ? "start" : "middle";
      parts.push(svg("text", { x: place, y: foot + 16, "text-anchor": anchor }, duration(at - from)));
    }
    lanes.forEach((lane, row) => {
      const most = Math.floor((left - 12) / 6.2);
      const name = lane.name.length > most ? `${lane.name.slice(0, most - 1)}…` : lane.name;
      parts.push(svg("text", { x: left - 8, y: HEAD + row * HIGH + 13, "text-anchor": "end" }, name));
    });
    for (const span of spans) {
      const row = lanes.findIndex((lane) => lane.worker === span.worker);
      const thin = span.kind === "assist";
      const bar = svg("rect", {
        x: x(span.from), y: HEAD + row * HIGH + (thin ? 5 : 2), width: Math.max(1, x(end(span)) - x(span.from) - 0.5),
        height: HIGH - (thin ? 12 : 6), rx: 1.5, class: span.end === "failed" || span.end === "lost" ? "bad" : null,
      });
      bar.style.fill = `var(--${span.kind})`;
      if (span.end === "failed" || span.end === "lost") bar.style.fillOpacity = "0.25";
      parts.push(bar);
    }
    view.drawing.replaceChildren(...parts);
    view.again();
  };
  return view;
}
