// One run on the screen. The drawings live as long as the run is shown; the rest is put anew when it changes.

// A few sublayers that lose next to nothing would leave one colour to all others: the lowest part in forty shares the first.
function logarithmic(values, note) {
  const found = values.filter((value) => value > 0).sort((one, other) => one - other);
  if (found.length === 0) return { share: () => 0 };
  const low = found[Math.floor(found.length / 40)], high = found[found.length - 1];
  const share = (value) => (value <= low ? 0 : high > low ? Math.log(value / low) / Math.log(high / low) : 0.5);
  return { share, low: low > found[0] ? `≤ ${error(low)}` : error(low), high: error(high), note };
}

const MEASURES = [
  {
    name: "error",
    value: (cell) => cell.error,
    scale: (cells) => logarithmic(cells.map((cell) => cell.error), "relative error, logarithmic"),
  },
  {
    name: "sparsity",
    value: (cell) => cell.sparsity,
    scale(cells) {
      const found = cells.map((cell) => cell.sparsity);
      const low = Math.min(...found), high = Math.max(...found);
      const share = (value) => (high - low > 5e-4 ? (value - low) / (high - low) : 0.5);
      return found.length === 0 ? { share: () => 0 } : { share, low: percent(low), high: percent(high), note: "share of zeros" };
    },
  },
  {
    name: "held out",
    value: (cell) => cell.held_out ?? null,
    scale: (cells) => logarithmic(cells.map((cell) => cell.held_out ?? 0), "error on held-out sequences, logarithmic"),
  },
  {
    name: "time",
    value: (cell) => cell.seconds,
    scale(cells) {
      const high = Math.max(0, ...cells.map((cell) => cell.seconds));
      return { share: (value) => (high > 0 ? value / high : 0), low: "0 s", high: seconds(high), note: "seconds of solving" };
    },
  },
];

const STATES = { queued: "queued", running: "running", done: "done", failed: "ended badly" };
const state = (name) => el("span", { class: `state ${name}` }, STATES[name] ?? name);
const card = (size, heading, extra, ...children) =>
  el("section", { class: `card ${size}`, "aria-label": heading }, el("div", { class: "top" }, el("h2", {}, heading), extra), ...children);
const figure = (name, value) => el("div", {}, el("dt", {}, name), el("dd", {}, value));
const meter = (share, kind, label) =>
  el("div", { class: `meter ${kind}`, role: "progressbar", "aria-label": label, "aria-valuemin": 0, "aria-valuemax": 100, "aria-valuenow": Math.round(100 * share) },
    el("i", { style: { width: `${100 * share}%` } }));

// Layers in a minute, by the commits of this life.
function pace(model) {
  const stamps = model.layers.map((layer) => layer.at).filter((at) => at).sort((one, other) => one - other);
  const pruning = model.head.phases.findLast((phase) => phase.title === "pruning");
  if (!pruning || stamps.length === 0) return null;
  const took = stamps[stamps.length - 1] - pruning.from;
  return took > 0 ? (60000 * stamps.length) / took : null;
}
const sum = (values) => Object.values(values).reduce((all, value) => all + value, 0);
const meanError = (model) => {
  const found = model.layers.flatMap((layer) => layer.cells.map((cell) => cell.error));
  return found.length === 0 ? null : found.reduce((all, value) => all + value, 0) / found.length;
};

function runScreen(name, isFrozen) {
  let measure = MEASURES[0], model = null, drawn = "", now = () => Date.now();
  const top = el("div", {}), figures = el("dl", { class: "figures" });
  const map = heatMap(), lanes = timeline();
  const scale = el("span", { class: "scale" });
  const choice = el("span", { class: "choice", role: "group", "aria-label": "What the map shows" },
    MEASURES.map((one) => el("button", { type: "button", onclick() { measure = one; drawn = ""; draw(); } }, one.name)));
  const keys = el("span", { class: "keys" });
  const mapCard = card("", "Layers", [choice, el("span", { class: "fill" }), scale], map.box);
  const lanesCard = card("", "Workers over time", [el("span", { class: "fill" }), keys], lanes.box);
  const lower = el("div", { class: "cards" });
  const people = el("div", { class: "scroll" }), phases = el("div", { class: "scroll" });
  const peopleCard = card("wide", "Workers", null, people), phasesCard = card("slim", "Time by phase", null, phases);
  const perplexity = el("div", {}), perplexityCard = card("slim", "Perplexity", null, perplexity);
  const onlyWarnings = el("button", { type: "button", class: "plain", "aria-pressed": "false", onclick() {
    onlyWarnings.setAttribute("aria-pressed", onlyWarnings.getAttribute("aria-pressed") === "true" ? "false" : "true");
    shownLines = -1;
    drawLog();
  } }, "only warnings");
  const log = el("ol", { class: "log", tabindex: 0, "aria-label": "Events" });
  let shownLines = -1;
  const logCard = card("wide", "Events", [el("span", { class: "fill" }), onlyWarnings], log);
  const facts = el("dl", { class: "facts" }), factsCard = card("slim", "Job", null, facts);
  const stack = (size, ...cards) => el("div", { class: `stack ${size}` }, cards);
  lower.append(mapCard, lanesCard, stack("wide", peopleCard, logCard), stack("slim", perplexityCard, phasesCard, factsCard));
  const shown = el("div", { hidden: true }, top, figures, lower);
  const waiting = el("p", { class: "empty" }, "Waiting for the run to be told of.");
  const root = el("article", {}, waiting, shown);

  function drawTop() {
    const { head } = model;
    const about = head.about;
    const text = about ? `${about.method} to ${about.pattern} · inputs of the ${about.propagation} model · ${about.samples} × ${about.sequence_length} tokens` : "";
    const layers = head.layers || 0;
    const phase = head.phases[head.phases.length - 1];
    const at = head.state === "running" && phase ? phase.title : STATES[head.state];
    const isCounted = layers > 0;
    const share = isCounted ? head.committed / layers : head.state === "done" ? 1 : 0;
    const left = head.eta && head.state === "running" ? `${duration(head.eta - now())} left` : "";
    const elapsed = head.started ? duration((head.ended ?? now()) - head.started) : "";
    const pieces = [
      el("div", { class: "title" }, el("h1", {}, about ? about.model : name), state(head.state)),
      el("p", { class: "sub" }, text),
    ];
    if (head.state === "failed") pieces.push(el("p", { class: "alarm", role: "alert" }, el("b", {}, `exit code ${head.exit_code}  `), head.reason));
    pieces.push(el("div", { class: "progress" },
      el("div", { class: "line" },
        el("span", {}, at, isCounted ? el("span", { class: "quiet" }, ` · ${head.committed} of ${layers} layers`) : null),
        el("span", { class: "quiet" }, [elapsed && `${elapsed} elapsed`, left].filter(Boolean).join(" · "))),
      meter(share, head.state, "layers committed")));
    top.replaceChildren(...pieces);
  }

  function drawFigures() {
    const { head } = model;
    const mean = meanError(model), speed = pace(model);
    const work = sum(head.seconds_by_phase), operations = sum(head.flops_by_phase);
    const items = [
      figure("mean error", mean === null ? "–" : error(mean)),
      figure("zeros", head.elements > 0 ? percent(head.zeros / head.elements) : "–"),
      figure("layers per minute", speed === null ? "–" : fixed(speed, speed < 10 ? 2 : 1)),
      figure("weights per second", speed === null || head.committed === 0 ? "–" : short((speed / 60) * (head.elements / head.committed))),
      figure("GFLOP/s per worker", work > 0 ? short(operations / work / 1e9) : "–"),
      figure("moved", head.bytes_moved === null ? "–" : bytes(head.bytes_moved)),
      figure("leases tried again", head.retries),
      figure("workers lost", head.workers_lost),
      head.assistants_lost > 0 ? figure("helpers lost", head.assistants_lost) : null,
    ];
    figures.replaceChildren(...items.filter(Boolean));
  }

  function drawMap() {
    const hasHeldOut = model.layers.some((layer) => layer.cells.some((cell) => typeof cell.held_out === "number"));
    [...choice.children].forEach((button, index) => {
      button.setAttribute("aria-pressed", String(MEASURES[index] === measure));
      button.hidden = MEASURES[index].name === "held out" && !hasHeldOut;
    });
    const mark = JSON.stringify([model.layers.length, model.epoch, model.head.layers, measure.name, map.drawing.clientWidth, getComputedStyle(document.documentElement).colorScheme]);
    if (mark === drawn) return;
    drawn = mark;
    const color = ramp();
    mapCard.hidden = model.head.kinds.length === 0;
    const found = map.draw(model, measure, color);
    const steps = Array.from({ length: 16 }, (_, index) => el("span", { style: { background: color(index / 15) } }));
    scale.replaceChildren(...(found.low === undefined ? [] : [found.note, el("span", {}, found.low), el("i", {}, steps), el("span", {}, found.high)]));
  }

  function drawLanes() {
    const spans = [...model.spans, ...model.open];
    lanesCard.hidden = spans.length === 0;
    if (spans.length === 0) return;
    lanes.draw(model, now());
    const kinds = ["prune", "assist", "forward", "survey", "try", "evaluate"].filter((kind) => spans.some((span) => span.kind === kind));
    keys.replaceChildren(...kinds.map((kind) => el("span", {}, el("i", { style: { background: `var(--${kind})` } }), kind === "assist" ? "help" : kind)));
  }

  function drawPeople() {
    const of = new Map(model.fleet.map((worker) => [worker.worker, worker]));
    peopleCard.hidden = model.workers.length === 0;
    const rows = model.workers.map((lane) => {
      const span = model.open.find((open) => open.worker === lane.worker);
      const offer = of.get(lane.worker);
      const idle = model.head.state === "running" ? "idle" : "";
      const doing = !lane.here ? "lost" : span ? `${span.kind === "assist" ? "helps with layer" : span.kind} ${span.index}${lane.doing ? ` · ${lane.doing}` : ""}` : idle;
      const bar = span && lane.total > 0 ? el("span", { class: "track", "aria-hidden": "true" }, el("i", { style: { width: `${(100 * lane.done) / lane.total}%` } })) : null;
      const done = model.spans.filter((found) => found.worker === lane.worker && found.kind === "prune" && found.end === "done").length;
      const cells = isFrozen ? [] : [
        el("td", {}, offer ? fixed(offer.offer.gflops, 0) : "–"), el("td", {}, offer ? bytes(offer.peak_rss_bytes) : "–"),
        el("td", {}, offer ? bytes(offer.bytes_received) : "–"),
      ];
      return el("tr", { class: lane.here ? null : "gone" }, el("td", {}, lane.name), el("td", { class: "left" }, doing, bar), el("td", {}, done), cells);
    });
    const more = isFrozen ? [] : ["GFLOP/s", "peak memory", "received"];
    const headings = ["worker", isFrozen ? "" : "now", "layers", ...more].map((text, index) => el("th", { scope: "col", class: index === 1 ? "left" : null }, text));
    people.replaceChildren(el("table", {}, el("thead", {}, el("tr", {}, headings)), el("tbody", {}, rows)));
  }

  function drawPhases() {
    const { head } = model;
    const found = Object.entries(head.seconds_by_phase).sort((one, other) => other[1] - one[1]);
    phasesCard.hidden = found.length === 0;
    const most = found.length > 0 ? found[0][1] : 1;
    const rows = found.map(([phase, value]) => {
      const rate = value > 0 && head.flops_by_phase[phase] > 0 ? short(head.flops_by_phase[phase] / value / 1e9) : "";
      return el("tr", {}, el("td", {}, phase), el("td", { class: "b" }, el("i", { style: { width: `${(100 * value) / most}%` } })), el("td", {}, seconds(value)), el("td", { class: "quiet" }, rate));
    });
    const headings = ["phase", "", "worker time", "GFLOP/s"].map((text) => el("th", { scope: "col" }, text));
    phases.replaceChildren(el("table", { class: "bars" }, el("thead", {}, el("tr", {}, headings)), el("tbody", {}, rows)));
  }

  function drawPerplexity() {
    const found = model.head.perplexity;
    perplexityCard.hidden = !found;
    if (!found) return;
    perplexity.replaceChildren(
      el("p", { class: "versus" }, el("span", {}, fixed(found.dense, 3)), el("span", { class: "arrow", "aria-hidden": "true" }, "→"), el("span", {}, fixed(found.pruned, 3))),
      el("p", { class: "quiet" }, `dense → pruned, ${fixed(found.pruned / found.dense, 3)} times; ${found.windows} windows of ${found.sequence_length} tokens`));
  }

  function drawLog() {
    const wanted = onlyWarnings.getAttribute("aria-pressed") === "true";
    if (model.log.length === shownLines) return;
    shownLines = model.log.length;
    const isAtEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
    const lines = model.log.filter((line) => !wanted || line.level !== "info");
    logCard.hidden = model.log.length === 0;
    log.replaceChildren(...lines.map((line) => el("li", { class: line.level }, el("time", { datetime: new Date(line.at).toISOString() }, clock(line.at)), el("span", {}, line.text))));
    if (lines.length === 0) log.append(el("li", {}, el("span", {}, ""), el("span", { class: "quiet" }, "no warnings")));
    if (isAtEnd) log.scrollTop = log.scrollHeight;
  }

  function drawFacts() {
    const { head } = model;
    const known = [["run", head.run], ["kept in", head.url], ["output", head.about && head.about.output],
      ["begun", head.started && stamp(head.started)], ["ended", head.ended && stamp(head.ended)],
      ["took", head.seconds === null ? null : seconds(head.seconds)]];
    const items = known.filter(([, value]) => value).map(([term, value]) => [el("dt", {}, term), el("dd", {}, value)]);
    if (!isFrozen && head.state === "done") {
      const of = encodeURIComponent(name);
      items.push([el("dt", {}, "report"), el("dd", {}, el("a", { href: `/report?run=${of}` }, "page"), " · ", el("a", { href: `/api/report?run=${of}` }, "JSON"))]);
    }
    factsCard.hidden = items.length === 0;
    facts.replaceChildren(...items.flat());
  }

  function draw() {
    if (!model) return;
    waiting.hidden = true;
    shown.hidden = false;
    drawTop();
    drawFigures();
    drawMap();
    drawLanes();
    drawPeople();
    drawPhases();
    drawPerplexity();
    drawLog();
    drawFacts();
  }
  new ResizeObserver(() => { drawn = ""; if (model) { drawMap(); drawLanes(); } }).observe(lower);
  return {
    root,
    show(next, clockNow) { model = next; now = clockNow; draw(); },
    // Time moves on while nothing is told.
    tick() { if (model && model.head.state === "running") { drawTop(); drawLanes(); } },
    repaint() { drawn = ""; draw(); },
  };
}
