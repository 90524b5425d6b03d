// Where the data comes from: a run that is frozen into this file, or a coordinator that tells what changes.

theme.apply(theme.stored());
const main = byId("main"), list = byId("runs"), connection = byId("connection");
let screen = null, chosen = null, source = null, fleet = { version: "", runs: [], workers: [] }, ahead = 0;
const here = () => Date.now() + ahead;

function say(text) { byId("said").textContent = text; }
byId("theme").addEventListener("click", () => { theme.next(); if (screen) screen.repaint(); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { if (screen) screen.repaint(); });

// Takes the rest of a list: what comes before it is kept.
const joined = (old, part) => [...old.slice(0, part.from), ...part.items];
let model = null;
// The log loses its beginning on a long run: its places are counted from there.
function take(update) {
  const old = model && update.layers.from <= model.layers.length ? model : { layers: [], spans: [], log: [], epoch: 0, gone: 0, spent: 0 };
  const replaced = update.layers.from === 0 ? 1 : 0;
  const rest = (name, offset) => {
    const part = update[name];
    if (part.from - offset > old[name].length || part.from < offset) return { items: part.items, offset: part.from };
    return { items: joined(old[name], { from: part.from - offset, items: part.items }), offset };
  };
  const spans = rest("spans", old.spent), log = rest("log", old.gone);
  const before = model ? model.head.state : null;
  model = {
    head: update.head, layers: joined(old.layers, update.layers), spans: spans.items, spent: spans.offset, open: update.open,
    log: log.items, gone: log.offset, workers: update.workers, epoch: old.epoch + replaced, fleet: fleet.workers,
  };
  if (before !== null && before !== update.head.state) say(`${chosen} is ${STATES[update.head.state]}`);
  if (screen) screen.show(model, here);
}

function choose(name) {
  if (source) source.close();
  [chosen, model] = [name, null];
  screen = name === null ? null : runScreen(name, false);
  main.replaceChildren(screen ? screen.root : el("p", { class: "empty" }, el("b", {}, "No runs yet"), "A job that is submitted to this coordinator appears here."));
  document.title = name === null ? "Espalier" : `${name} · Espalier`;
  source = new EventSource(name === null ? "/api/events" : `/api/events?run=${encodeURIComponent(name)}`);
  source.addEventListener("open", () => { connection.textContent = ""; connection.classList.remove("lost"); });
  source.addEventListener("error", () => {
    connection.textContent = "no connection, trying again";
    connection.classList.add("lost");
    // A browser gives up on an answer that is no stream: a coordinator that starts, or one that has no such run any more.
    if (source.readyState === EventSource.CLOSED) setTimeout(() => { if (chosen === name) choose(name); }, 3000);
  });
  source.addEventListener("fleet", (event) => {
    const told = JSON.parse(event.data);
    [fleet, ahead] = [told.fleet, told.now - Date.now()];
    byId("version").textContent = fleet.version;
    if (model) { model.fleet = fleet.workers; if (screen) screen.show(model, here); }
    drawList();
  });
  source.addEventListener("run", (event) => {
    const told = JSON.parse(event.data);
    ahead = told.now - Date.now();
    take(told.run);
  });
}

function drawList() {
  const names = fleet.runs.map((run) => run.run);
  const wanted = decodeURIComponent(location.hash.slice(1));
  const next = names.includes(wanted) ? wanted : names.includes(chosen) ? chosen : names.length > 0 ? names[names.length - 1] : null;
  if (next !== chosen) choose(next);
  document.querySelector(".frame").classList.toggle("single", names.length < 2);
  const focused = document.activeElement && document.activeElement.dataset ? document.activeElement.dataset.run : null;
  const items = [...fleet.runs].reverse().map((run) => {
    const known = ["queued", "running", "done"].includes(run.state) ? run.state : "failed";
    const share = run.layers ? run.committed / run.layers : known === "done" ? 1 : 0;
    return el("li", {}, el("button", { type: "button", "data-run": run.run, "aria-current": run.run === chosen ? "true" : null, onclick() { location.hash = run.run; } },
      el("span", { class: "name" }, run.run, state(known)), el("span", { class: "model", title: run.model }, run.model.split("/").slice(-2).join("/")),
      known === "running" ? el("span", { class: "track", "aria-hidden": "true" }, el("i", { style: { width: `${100 * share}%` } })) : null));
  });
  list.replaceChildren(el("h2", {}, "Runs"), el("ul", {}, items));
  if (focused) { const again = list.querySelector(`[data-run="${CSS.escape(focused)}"]`); if (again) again.focus(); }
}

// Up and down walk through the list of runs.
list.addEventListener("keydown", (event) => {
  if (event.key !== "ArrowDown" && event.key !== "ArrowUp") return;
  event.preventDefault();
  const buttons = [...list.querySelectorAll("button")];
  const at = buttons.indexOf(document.activeElement) + (event.key === "ArrowDown" ? 1 : -1);
  if (buttons[at]) buttons[at].focus();
});

const frozen = byId("data");
if (frozen) {
  const told = JSON.parse(frozen.textContent);
  byId("version").textContent = told.version;
  document.querySelector(".frame").classList.add("single");
  screen = runScreen(told.run.head.run || "run", true);
  main.replaceChildren(screen.root);
  fleet = { version: told.version, runs: [], workers: [] };
  ahead = told.now - Date.now();
  document.title = `${told.run.head.run || "report"} · Espalier`;
  chosen = told.run.head.run;
  take(told.run);
} else {
  addEventListener("hashchange", drawList);
  setInterval(() => { if (screen) screen.tick(); }, 1000);
  choose(null);
}
