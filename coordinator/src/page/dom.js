// Elements, numbers, times. Whatever comes from outside becomes text, never markup.
const SVG = "http://www.w3.org/2000/svg";

function fill(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key === "style") Object.assign(node.style, value);
    else node.setAttribute(key, value === true ? "" : String(value));
  }
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    node.append(child instanceof Node ? child : document.createTextNode(String(child)));
  }
  return node;
}
const el = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);
const byId = (id) => document.getElementById(id);

const two = (number) => String(number).padStart(2, "0");
function duration(millis) {
  if (millis === null || millis === undefined || !isFinite(millis)) return "–";
  const seconds = Math.max(0, Math.round(millis / 1000));
  const [h, m, s] = [Math.floor(seconds / 3600), Math.floor(seconds / 60) % 60, seconds % 60];
  if (h >= 48) return `${Math.floor(h / 24)} d ${h % 24} h`;
  return h > 0 ? `${h}:${two(m)}:${two(s)}` : `${m}:${two(s)}`;
}
function seconds(value) {
  if (value >= 5400) return `${fixed(value / 3600, 1)} h`;
  if (value >= 600) return `${fixed(value / 60, 1)} min`;
  return `${fixed(value, value < 10 ? 2 : 1)} s`;
}
function clock(at) {
  const date = new Date(at);
  return `${two(date.getHours())}:${two(date.getMinutes())}:${two(date.getSeconds())}`;
}
const stamp = (at) => {
  const date = new Date(at);
  return `${date.getFullYear()}-${two(date.getMonth() + 1)}-${two(date.getDate())} ${clock(at)}`;
};
const fixed = (value, digits) => value.toLocaleString("en-GB", { minimumFractionDigits: digits, maximumFractionDigits: digits });
function short(value) {
  if (value === null || value === undefined || !isFinite(value)) return "–";
  const sizes = [[1e12, " T"], [1e9, " G"], [1e6, " M"], [1e3, " k"]];
  for (const [size, unit] of sizes) if (Math.abs(value) >= size) return fixed(value / size, value / size < 10 ? 2 : 1) + unit;
  return fixed(value, value !== 0 && Math.abs(value) < 10 ? 2 : 0);
}
const bytes = (value) => (value < 1000 ? `${value} B` : `${short(value)}B`);
function error(value) {
  if (value === 0) return "0";
  return value >= 1e-4 ? fixed(value, value >= 1 ? 3 : 5) : value.toExponential(2);
}
const percent = (share, digits = 2) => `${fixed(100 * share, digits)} %`;

// Theme: as the system says, until somebody chooses.
const theme = {
  names: ["auto", "light", "dark"],
  stored() {
    try { return localStorage.getItem("espalier-theme") || "auto"; } catch { return "auto"; }
  },
  apply(name) {
    if (name === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = name;
    byId("theme").textContent = `Theme: ${name}`;
    try { localStorage.setItem("espalier-theme", name); } catch { /* A page without storage forgets. */ }
  },
  next() {
    const at = this.names.indexOf(this.stored());
    this.chosen = this.names[((at < 0 ? 0 : at) + 1) % this.names.length];
    this.apply(this.chosen);
  },
};

// Colours of the scale, mixed between five stops of the theme; lightness alone tells them apart.
function ramp() {
  const style = getComputedStyle(document.documentElement);
  const stops = [0, 1, 2, 3, 4].map((index) => {
    const text = style.getPropertyValue(`--h${index}`).trim();
    return [1, 3, 5].map((at) => parseInt(text.slice(at, at + 2), 16));
  });
  return (share) => {
    const place = Math.min(1, Math.max(0, share)) * 4;
    const low = Math.min(3, Math.floor(place));
    const mix = stops[low].map((from, channel) => Math.round(from + (stops[low + 1][channel] - from) * (place - low)));
    return `rgb(${mix.join(",")})`;
  };
}
