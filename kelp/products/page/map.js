"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const element = (tag, text, attributes = {}) => {
    const made = document.createElement(tag);
    if (text !== null && text !== undefined) made.textContent = text;
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    return made;
  };
  const NAMES = { scene: "Scene", errors: "Errors", mask: "Mask", p: "Probability" };
  const kinds = Object.keys(NAMES).filter((kind) => data.maps.some((m) => m[kind]));
  const state = { at: 0, kind: kinds.includes("errors") ? "errors" : "mask", region: data.regions[0] };

  const [, [north, east]] = data.bounds;
  $("map").style.aspectRatio = `${east} / ${north}`;
  const map = L.map("map", { crs: L.CRS.Simple, minZoom: -12, maxZoom: 3, zoomSnap: 0.25, zoomDelta: 0.5 });
  map.attributionControl.setPrefix("Leaflet");
  L.control.scale({ imperial: false }).addTo(map);
  // The wheel scrolls the page until the map is chosen.
  map.scrollWheelZoom.disable();
  map.on("focus", () => map.scrollWheelZoom.enable()).on("blur", () => map.scrollWheelZoom.disable());
  map.fitBounds(data.bounds);
  map.createPane("pictures").style.zIndex = 300; // below the outlines of beds
  let picture = null, beds = null;

  const number = (value, digits = 3) => (value === null || value === undefined ? "–" : value.toFixed(digits));
  const km2 = (value) => (value === null || value === undefined ? "–" : (value / 1e6).toFixed(3));

  function popup(facts) {
    const table = element("table");
    const rows = [
      ["Bed", facts.bed_id], ["Pixels", facts.pixels],
      ["Presence area (upper bound)", km2(facts.presence_area_m2) + " km²"],
      ["Expected area", facts.expected_area_m2 === null ? "–" : km2(facts.expected_area_m2) + " km²"],
      ["Mean probability", number(facts.mean_p, 2)],
      ["Observed around it", number(facts.observed_share, 2)],
    ];
    if (facts.touches_edge) rows.push(["Touches the map's edge", "may go on"]);
    if (facts.touches_unobserved) rows.push(["Touches unseen pixels", "may go on"]);
    for (const [name, value] of rows) {
      const row = element("tr");
      row.append(element("th", name, { scope: "row" }), element("td", value));
      table.append(row);
    }
    return table;
  }

  function legend() {
    const swatch = (style, text, name = "") => {
      const mark = element("i", null, { class: name, "aria-hidden": "true" });
      if (style) mark.style.background = style;
      const entry = element("span");
      entry.append(mark, text);
      return [entry];
    };
    const unseen = swatch("", "not observed", "unseen");
    const of = {
      mask: [...swatch(data.colors.kelp, "kelp"), ...swatch(data.colors.water, "no kelp"), ...unseen],
      errors: [
        ...swatch(data.colors.kelp, "found"), ...swatch(data.colors.missed, "missed"), ...swatch(data.colors.false, "false alarm"),
        ...swatch(data.colors.water, "no kelp"), ...unseen,
      ],
      p: [...swatch(`linear-gradient(90deg, ${data.colors.ramp.join(", ")})`, "probability 0 to 1", "ramp"), ...unseen],
      scene: [element("span", "true colour, stretched"), ...unseen],
    };
    $("legend").replaceChildren(...of[state.kind]);
  }

  const outline = {
    scene: { color: "#ff3d9a", weight: 1.5, fillOpacity: 0 }, p: { color: "#ff3d9a", weight: 1.5, fillOpacity: 0 },
    mask: { color: "#ffffff", weight: 1.5, fillOpacity: 0 }, errors: { color: "#ffffff", weight: 1, opacity: 0.5, fillOpacity: 0 }, // misses lie under it
  };
  function draw() {
    const shown = data.maps[state.at];
    const url = shown[state.kind] || shown.mask;
    const label = `${NAMES[state.kind]} of ${shown.date || shown.name}`;
    const next = L.imageOverlay(url, shown.bounds, { alt: label, pane: "pictures" }).addTo(map);
    if (picture) picture.remove();
    picture = next;
    if (beds) beds.remove();
    beds = null;
    if (shown.beds && $("beds").checked) {
      beds = L.geoJSON(shown.beds, {
        coordsToLatLng: ([x, y]) => L.latLng(y, x),
        style: outline[state.kind],
        onEachFeature: (feature, layer) => layer.bindPopup(() => popup(feature.properties), { minWidth: 240 }),
      }).addTo(map);
    }
    listed(shown);
    const words = `${shown.date || shown.name}${shown.sensor ? ", " + shown.sensor : ""}`;
    $("when").textContent = `${words} (${state.at + 1} of ${data.maps.length})`;
    $("slider").value = state.at;
    $("slider").setAttribute("aria-valuetext", words);
    for (const button of $("layers").children) button.setAttribute("aria-pressed", button.dataset.kind === state.kind);
    legend();
    mark();
  }

  // What a click on the map says, for who reads, prints or has no mouse.
  function listed(shown) {
    const found = shown.beds ? [...shown.beds.features].sort((a, b) => b.properties.pixels - a.properties.pixels) : [];
    $("largest").hidden = !found.length;
    $("largest-beds").replaceChildren(...found.slice(0, 10).map(({ properties: p }) => {
      const row = element("tr");
      row.append(element("td", p.bed_id));
      for (const text of [p.pixels, km2(p.presence_area_m2), km2(p.expected_area_m2), number(p.mean_p, 2), number(p.observed_share, 2)])
        row.append(element("td", text, { class: "n" }));
      row.append(element("td", p.touches_unobserved ? "touches unseen pixels" : p.touches_edge ? "touches the map's edge" : ""));
      return row;
    }));
  }

  const SVG = "http://www.w3.org/2000/svg";
  function shape(parent, tag, attributes, text) {
    const made = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    if (text !== undefined) made.textContent = text;
    parent.append(made);
    return made;
  }

  // points: {x: decimal year, value, low, high, label, at}; a null value is a gap, never 0.
  function chart(place, points, words) {
    const w = Math.max(320, Math.min(900, place.clientWidth || 900)); // so that letters keep their size
    const [h, left, right, top, bottom] = [280, 56, 14, 18, 34];
    const svg = document.createElementNS(SVG, "svg");
    svg.setAttribute("viewBox", `0 0 ${w} ${h}`);
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-label", words);
    const dated = points.filter((p) => p.x !== null);
    const xs = dated.map((p) => p.x);
    let [x0, x1] = [Math.min(...xs), Math.max(...xs)];
    if (!dated.length) [x0, x1] = [0, 1];
    const pad = Math.max((x1 - x0) * 0.03, 0.02);
    [x0, x1] = [x0 - pad, x1 + pad];
    const highest = Math.max(...dated.map((p) => Math.max(p.value ?? 0, p.high ?? 0)), 1);
    const nice = 10 ** Math.floor(Math.log10(highest));
    const step = [1, 2, 5, 10].map((k) => (k * nice) / 2).find((s) => highest / s <= 5) || nice;
    const y1 = Math.ceil(highest / step) * step;
    const sx = (x) => left + ((x - x0) / (x1 - x0)) * (w - left - right);
    const sy = (y) => h - bottom - (y / y1) * (h - top - bottom);
    for (let y = 0; y <= y1 + step / 2; y += step) {
      shape(svg, "line", { x1: left, x2: w - right, y1: sy(y), y2: sy(y), class: "grid" });
      shape(svg, "text", { x: left - 8, y: sy(y) + 4, "text-anchor": "end" }, +(y / 1e6).toPrecision(3));
    }
    shape(svg, "text", { x: left, y: top - 3 }, "km²");
    const years = Math.max(1, Math.ceil((x1 - x0) / (w / 70)));
    for (let year = Math.ceil(x0); year <= x1; year += years) {
      shape(svg, "line", { x1: sx(year), x2: sx(year), y1: top, y2: h - bottom, class: "grid" });
      shape(svg, "text", { x: sx(year), y: h - 12, "text-anchor": "middle" }, year);
    }
    if (Math.ceil(x0) > x1) shape(svg, "text", { x: w / 2, y: h - 12, "text-anchor": "middle" }, Math.floor(x0));
    let run = [];
    const flush = () => {
      if (run.length > 1) shape(svg, "polyline", { points: run.join(" "), class: "line" });
      run = [];
    };
    for (const p of dated) {
      if (p.value === null) {
        flush();
        const [x, y] = [sx(p.x), sy(0)];
        const cross = shape(svg, "path", { d: `M${x - 4} ${y - 4}l8 8m0 -8l-8 8`, class: "gap" });
        shape(cross, "title", {}, p.label);
        continue;
      }
      run.push(`${sx(p.x)},${sy(p.value)}`);
      if (p.low !== null) shape(svg, "line", { x1: sx(p.x), x2: sx(p.x), y1: sy(p.low), y2: sy(p.high), class: "whisker" });
    }
    flush();
    for (const p of dated.filter((q) => q.value !== null)) {
      const dot = shape(svg, "circle", { cx: sx(p.x), cy: sy(p.value), r: 4.5, class: "dot" });
      shape(dot, "title", {}, p.label);
      if (p.at !== undefined) dot.addEventListener("click", () => go(p.at));
    }
    if (points.some((p) => p.at !== undefined)) shape(svg, "line", { y1: top, y2: h - bottom, class: "now", visibility: "hidden" });
    svg.position = (at) => {
      const line = svg.querySelector(".now"), found = points.find((p) => p.at === at);
      if (!line) return;
      const known = found && found.x !== null;
      line.setAttribute("visibility", known ? "visible" : "hidden");
      if (known) for (const name of ["x1", "x2"]) line.setAttribute(name, sx(found.x));
    };
    place.replaceChildren(svg);
    return svg;
  }

  let timeline = null;
  function areas() {
    const rows = data.rows[state.region];
    const which = rows.some((r) => r.expected !== null) ? "expected" : "presence";
    const interval = rows.some((r) => r.low !== null);
    const points = rows.map((r) => ({
      x: data.maps[r.at].year, value: r[which], low: r.low, high: r.high, at: r.at,
      label: `${data.maps[r.at].date}: ${r[which] === null ? r.note : km2(r[which]) + " km²"}`,
    }));
    const unseen = points.filter((p) => p.value === null).length;
    const notes = new Set(rows.filter((r) => r[which] !== null).map((r) => r.note));
    const common = notes.size === 1 ? [...notes][0] : null; // said once
    const bars = interval ? ` Bars: intervals of ${Math.round(100 * data.coverage)} %.` : common ? ` ${common[0].toUpperCase()}${common.slice(1)}.` : " No intervals: the note says why.";
    const gaps = unseen ? ` Crosses: ${unseen} date${unseen > 1 ? "s" : ""} without an area, which ${unseen > 1 ? "are gaps, not zeros" : "is a gap, not a zero"}.` : "";
    $("dates").hidden = !points.some((p) => p.x !== null);
    const what = which === "expected" ? "Expected area by date." : "Presence area by date, an upper bound.";
    timeline = chart($("chart"), points, `${what} ${points.length - unseen} values, ${unseen} gaps.`);
    $("caption").textContent = what + bars + gaps;
    const quarters = (data.quarters || {})[state.region];
    $("quarters").hidden = !quarters;
    if (quarters) {
      const empty = quarters.filter((q) => q.value === null).length;
      chart($("chart-quarters"), quarters, `Quarterly means. ${quarters.length - empty} values, ${empty} gaps.`);
      $("caption-quarters").textContent = `Mean of the looks of each quarter. ${empty ? `Crosses: ${empty} quarter${empty > 1 ? "s" : ""} not observed well enough.` : ""}`;
    }
    $("rows").replaceChildren(...rows.map((r) => {
      const shown = data.maps[r.at], row = element("tr", null, { "data-at": r.at });
      const share = r.observed === null ? "–" : Math.round(100 * r.observed) + " %";
      const range = r.low === null ? "–" : `${km2(r.low)} to ${km2(r.high)}`;
      row.append(element("td", shown.date || shown.name), element("td", shown.sensor || "–"));
      for (const text of [share, km2(r.expected), range, km2(r.presence)]) row.append(element("td", text, { class: "n" }));
      row.append(element("td", r.note === common ? "" : r.note || ""));
      return row;
    }));
    mark();
  }

  function mark() {
    if (timeline) timeline.position(state.at);
    for (const row of $("rows").children) {
      if (+row.dataset.at === state.at) row.setAttribute("aria-current", "true");
      else row.removeAttribute("aria-current");
    }
  }

  function go(at) {
    state.at = Math.max(0, Math.min(data.maps.length - 1, at));
    draw();
  }

  for (const kind of kinds) {
    const button = element("button", NAMES[kind], { type: "button", "data-kind": kind });
    button.addEventListener("click", () => { state.kind = kind; draw(); });
    $("layers").append(button);
  }
  $("beds-label").hidden = !data.maps.some((m) => m.beds);
  $("beds").addEventListener("change", draw);
  $("slider").max = data.maps.length - 1;
  $("slider").addEventListener("input", () => go(+$("slider").value));
  $("before").addEventListener("click", () => go(state.at - 1));
  $("after").addEventListener("click", () => go(state.at + 1));
  $("region-label").hidden = data.regions.length < 2;
  for (const region of data.regions) $("region").append(element("option", region));
  $("region").addEventListener("change", () => { state.region = $("region").value; areas(); });
  // Leaflet lays out in pixels of the screen: on paper the map has a width that fits every sheet.
  function resized(width) {
    $("map").style.width = width;
    map.invalidateSize({ animate: false });
    map.fitBounds(data.bounds, { animate: false });
  }
  addEventListener("beforeprint", () => { $("largest").open = true; resized("560px"); });
  addEventListener("afterprint", () => resized(""));
  let waiting = 0;
  addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(areas, 200); });
  areas();
  go(data.maps.length - 1);
})();
