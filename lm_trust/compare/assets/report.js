// The page's behaviour. All that a reader may choose is one state, kept in the address after "#", so that a link shows
// what its sender saw.
"use strict";
(() => {
  const { dark, figures } = JSON.parse(document.getElementById("data").textContent);
  const all = (selector) => [...document.querySelectorAll(selector)];
  const byId = (id) => document.getElementById(id);
  const darkScreen = matchMedia("(prefers-color-scheme: dark)");
  const finger = matchMedia("(pointer: coarse)").matches;
  const PAGE = 20; // completions at a time
  const PAPER = 650; // pixels: the width of a figure in print

  const knobs = all("select[data-knob]");
  const usual = {
    hide: "", axis: "steps", search: "", sort: "prompts",
    first: byId("first")?.value ?? "", second: byId("second")?.value ?? "",
    ...Object.fromEntries(knobs.map((select) => [`knob.${select.dataset.knob}`, select.value])),
  };
  let state = { ...usual };
  let room = PAGE;
  let printing = false;

  // The state and the address, which may be of an earlier page with other knob values.
  const isOffered = (key, value) => {
    if (key === "axis") return all("button[data-axis]").some((button) => button.dataset.axis === value);
    const select = knobs.find(({ dataset }) => key === `knob.${dataset.knob}`) ?? byId(key);
    return !select?.options || [...select.options].some((option) => option.value === value);
  };
  const readAddress = () => {
    const given = location.hash.includes("=") ? new URLSearchParams(location.hash.slice(1)) : new URLSearchParams();
    const told = Object.keys(usual).filter((key) => given.has(key) && isOffered(key, given.get(key)));
    state = { ...usual, ...Object.fromEntries(told.map((key) => [key, given.get(key)])) };
    return told;
  };
  const writeAddress = () => {
    const changed = Object.entries(state).filter(([key, value]) => value !== usual[key]);
    history.replaceState(null, "", changed.length ? `#${new URLSearchParams(changed)}` : location.pathname + location.search);
  };
  const choose = (change) => {
    Object.assign(state, change);
    writeAddress();
    show();
  };

  // Figures.
  const hidden = () => new Set(state.hide.split(",").filter(Boolean));
  const isShown = ({ meta }, out) => {
    if (!meta) return true;
    if (out.has(meta.rule)) return false;
    if (meta.axis && meta.axis !== state.axis) return false;
    return meta.value === undefined || meta.value === (state[`knob.${meta.rule}`] ?? meta.value);
  };
  const coloured = (figure) => {
    if (!darkScreen.matches || printing) return figure;
    return JSON.parse(JSON.stringify(figure).replace(/"(#[0-9a-f]{6}|rgba\([^"]*\))"/g, (all, colour) => `"${dark[colour] ?? colour}"`));
  };
  // The room that the shown lines need, without their areas.
  const span = (data, floor) => {
    const lines = data.filter((trace) => trace.visible && !trace.fill);
    const values = lines.flatMap((trace) => trace.y).filter((value) => value !== null);
    if (!values.length) return undefined;
    const [low, high] = values.reduce(([a, b], value) => [Math.min(a, value), Math.max(b, value)], [Infinity, -Infinity]);
    const margin = 0.25 * (high - low) || 0.1 * Math.abs(high) || 1;
    return [floor === 0 ? Math.min(0, low) - 0.02 * high : low - margin, high + margin];
  };
  const draw = (figure) => {
    const out = hidden();
    const data = figure.data.map((trace) => ({ ...trace, visible: isShown(trace, out) }));
    const place = byId(figure.id);
    const { layout, ...rest } = coloured({ data, layout: structuredClone(figure.layout) });
    if (figure.axes) {
      layout.xaxis.title.text = figure.axes[state.axis];
      layout.yaxis.range = span(data, figure.floor);
    }
    if (printing) Object.assign(layout, { width: PAPER, autosize: false });
    else layout.autosize = true;
    if (place.clientWidth < 480) layout.font.size = 11.5;
    layout.dragmode = finger ? false : "zoom"; // a finger scrolls the page
    layout.uirevision = figure.axes ? state.axis : "same"; // a zoom outlives other changes
    layout.modebar = { bgcolor: "rgba(0,0,0,0)", color: layout.yaxis.linecolor, activecolor: layout.font.color };
    const bar = finger ? false : "hover";
    const unneeded = ["select2d", "lasso2d", "autoScale2d"];
    Plotly.react(place, rest.data, layout, {
      responsive: true, displaylogo: false, displayModeBar: bar, modeBarButtonsToRemove: unneeded,
    });
  };
  const drawAll = () => figures.forEach(draw);

  // Completions.
  const cards = all(".card").map((element) => ({
    element,
    index: Number(element.dataset.index),
    rewards: JSON.parse(element.dataset.rewards),
    words: [...element.querySelectorAll(".text")].map((text) => text.textContent).join("\n").toLowerCase(),
  }));
  const showCards = () => {
    if (!cards.length) return [];
    const words = state.search.trim().toLowerCase();
    const direction = { most: -1, least: 1 }[state.sort] ?? 0;
    const difference = ({ rewards }) => rewards[state.first] - rewards[state.second]; // NaN where one is missing
    const order = (one, two) => {
      const [a, b] = [difference(one), difference(two)];
      if (!direction || (isNaN(a) && isNaN(b))) return one.index - two.index;
      return isNaN(a) ? 1 : isNaN(b) ? -1 : direction * (a - b) || one.index - two.index;
    };
    const found = cards.filter((card) => card.words.includes(words)).sort(order);
    const shown = new Set(found.slice(0, room));
    for (const card of cards) card.element.hidden = !shown.has(card);
    for (const card of found) {
      const gap = difference(card);
      const sign = gap < 0 ? "−" : gap > 0 ? "+" : "";
      const same = state.first === state.second;
      card.element.querySelector(".difference").textContent =
        same || isNaN(gap) ? "" : `${state.first} less ${state.second}: ${sign}${Number(Math.abs(gap).toPrecision(3))}`;
    }
    byId("cards").append(...found.map((card) => card.element));
    const which = words ? `${found.length} of ${cards.length} prompts hold “${state.search.trim()}”` : `${cards.length} prompts`;
    byId("count").textContent = shown.size < found.length ? `${which}; the first ${shown.size} are shown` : which;
    byId("more").hidden = shown.size === found.length;
    return found;
  };

  // The controls say what the state is.
  const press = (button, pressed) => button.setAttribute("aria-pressed", String(pressed));
  const showControls = () => {
    const out = hidden();
    for (const button of all("button[data-rule]")) press(button, !out.has(button.dataset.rule));
    for (const button of all("button[data-axis]")) press(button, button.dataset.axis === state.axis);
    for (const select of knobs) select.value = state[`knob.${select.dataset.knob}`];
    for (const key of ["search", "first", "second", "sort"]) {
      const control = byId(key);
      if (control && control.value !== state[key]) control.value = state[key];
    }
    const values = knobs.map((select) => `${select.dataset.knob} at ${select.value}`);
    byId("shown-values").textContent = values.length ? `Shown: ${values.join(", ")}.` : "";
  };
  const show = () => {
    showControls();
    showCards();
    drawAll();
  };

  for (const button of all("button[data-rule]")) {
    button.addEventListener("click", () => {
      const out = hidden();
      if (!out.delete(button.dataset.rule)) out.add(button.dataset.rule);
      choose({ hide: [...out].join(",") });
    });
  }
  for (const button of all("button[data-axis]")) {
    button.addEventListener("click", () => choose({ axis: button.dataset.axis }));
  }
  for (const select of knobs) {
    select.addEventListener("change", () => choose({ [`knob.${select.dataset.knob}`]: select.value }));
  }
  const controls = byId("completion-controls");
  const readControls = () => {
    for (const key of ["search", "first", "second", "sort"]) state[key] = byId(key).value;
    room = PAGE;
    writeAddress();
    showCards();
  };
  controls?.addEventListener("input", readControls);
  controls?.addEventListener("submit", (event) => event.preventDefault());
  byId("more")?.addEventListener("click", () => {
    room += PAGE;
    // Focus goes to where the new ones begin, and does not vanish with the button.
    const next = showCards()[room - PAGE].element;
    next.tabIndex = -1;
    next.focus();
  });

  // Surroundings: colours of the screen, paper, and an address that is typed or followed.
  darkScreen.addEventListener("change", drawAll);
  const print = (now) => {
    if (printing === now) return;
    printing = now;
    drawAll();
  };
  addEventListener("beforeprint", () => print(true));
  addEventListener("afterprint", () => print(false));
  addEventListener("hashchange", () => {
    if (!location.hash.includes("=")) return;
    readAddress();
    show();
  });

  const told = readAddress();
  show();
  if (told.some((key) => ["search", "sort", "first", "second"].includes(key))) byId("completions")?.scrollIntoView();
})();
