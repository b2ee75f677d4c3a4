// The timeline: spans of every run unpacked, and what of them is in view drawn, exactly or summed up by the pixel.
"use strict";
window.kvplan.timeline = (() => {
  const { data, config, dressed, onKey, moved, line, save } = window.kvplan;
  const packed = data.timeline;
  const plot = document.getElementById("timeline");
  const MOST_SPANS = 2500; // drawn one by one; more are summed up
  const PIXELS = 3; // of a sum
  const HEIGHT = 0.76; // of a lane
  const LABELS = 40;
  let runs = [];
  let anchor = packed.first_step; // the step whose start is 0 ms, in every run
  let drawing = false;

  async function unpack(lane) {
    const bytes = Uint8Array.from(atob(lane.packed), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    const buffer = await new Response(stream).arrayBuffer();
    const n = lane.spans;
    let at = 0;
    const take = (Kind) => {
      const column = new Kind(buffer, at, n);
      at += n * Kind.BYTES_PER_ELEMENT;
      return column;
    };
    const [size, gap, took, step, layer, name] = [Float64Array, Float64Array, Float64Array, Int32Array, Int16Array, Uint16Array].map(take);
    const start = new Float64Array(n);
    const end = new Float64Array(n);
    let now = 0; // whole nanoseconds: exact
    for (let i = 0; i < n; i += 1) {
      start[i] = (now + gap[i]) * lane.unit_s * 1e3;
      now += gap[i] + took[i];
      end[i] = now * lane.unit_s * 1e3;
    }
    return { ...lane, packed: null, size, start, end, step, layer, nameAt: name };
  }

  const stepStart = (run, step) => (step > 0 ? run.step_end_s[Math.min(step, run.step_end_s.length) - 1] : 0) * 1e3;
  const stepEnd = (run, step) => run.step_end_s[Math.min(step, run.step_end_s.length - 1)] * 1e3;
  const offset = (run) => stepStart(run, anchor);

  // Rows from the top: the simulated run's lanes, then each measured one's.
  const rows = () => runs.flatMap((run) => run.lanes.map((lane) => ({ run, lane })));

  function firstAtLeast(column, value) {
    let low = 0;
    let high = column.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (column[middle] < value) low = middle + 1;
      else high = middle;
    }
    return low;
  }

  // Numbers of the first span in view and of the one behind the last.
  function inView({ run, lane }, [low, high]) {
    return [firstAtLeast(lane.end, low + offset(run)), firstAtLeast(lane.start, high + offset(run))];
  }

  function rectangle(shape, x0, x1, y0, y1) {
    shape.x.push(x0, x1, x1, x0, x0, null);
    shape.y.push(y0, y0, y1, y1, y0, null);
  }

  function exact(row, floor, range, shapes) {
    const { run, lane } = row;
    const [from, to] = inView(row, range);
    for (let i = from; i < to; i += 1) {
      const shape = shapes[run.names[lane.nameAt[i]].kind];
      rectangle(shape, lane.start[i] - offset(run), lane.end[i] - offset(run), floor, floor + HEIGHT);
    }
  }

  // Seconds of each kind in each of ``bins`` equal parts of the range.
  function sums(row, range, bins) {
    const { run, lane } = row;
    const width = (range[1] - range[0]) / bins;
    const busy = packed.kinds.map(() => null);
    const [from, to] = inView(row, range);
    for (let i = from; i < to; i += 1) {
      const kind = run.names[lane.nameAt[i]].kind;
      const column = (busy[kind] ??= new Float64Array(bins));
      const start = Math.max(0, (lane.start[i] - offset(run) - range[0]) / width);
      const end = Math.min(bins, (lane.end[i] - offset(run) - range[0]) / width);
      for (let bin = Math.floor(start); bin < end; bin += 1) {
        column[bin] += Math.min(end, bin + 1) - Math.max(start, bin);
      }
    }
    return busy;
  }

  // A lane's height is the share of the time that it is busy; what is left empty is idle.
  function summed(row, floor, range, shapes, bins) {
    const width = (range[1] - range[0]) / bins;
    const level = new Float64Array(bins).fill(floor);
    sums(row, range, bins).forEach((column, kind) => {
      column?.forEach((share, bin) => {
        if (share <= 0) return;
        const x = range[0] + bin * width;
        rectangle(shapes[kind], x, x + width, level[bin], level[bin] + share * HEIGHT);
        level[bin] += share * HEIGHT;
      });
    });
  }

  function drawn(range) {
    const all = rows();
    const shapes = packed.kinds.map(() => ({ x: [], y: [] }));
    const count = all.reduce((sum, row) => sum + inView(row, range).reduce((from, to) => to - from), 0);
    const bins = Math.max(60, Math.floor((plot.clientWidth - 110) / PIXELS));
    const isExact = count <= MOST_SPANS;
    all.forEach((row, place) => {
      const floor = all.length - 1 - place + (1 - HEIGHT) / 2;
      if (isExact) exact(row, floor, range, shapes);
      else summed(row, floor, range, shapes, bins);
    });
    return { shapes, isExact, count };
  }

  function traces(shapes) {
    return packed.kinds.map(({ name, colour }, kind) => ({
      type: "scatter", mode: "none", fill: "toself", fillcolor: colour, hoverinfo: "skip", name, ...shapes[kind],
    })).filter((trace) => trace.x.length);
  }

  // Where steps begin, as lines, numbered while there is room.
  function stepLines(range) {
    const run = runs[0];
    const starts = [];
    for (let step = packed.first_step; step <= packed.last_step; step += 1) {
      const at = stepStart(run, step) - offset(run);
      if (at >= range[0] && at <= range[1]) starts.push([step, at]);
    }
    const few = starts.length <= 60 ? starts : [];
    const gap = (range[1] - range[0]) / (plot.clientWidth / 70);
    let last = -Infinity;
    const named = few.filter(([, at]) => at - last >= gap && at < range[1] - gap && ((last = at), true));
    return {
      shapes: few.map(([, at]) => ({ type: "line", x0: at, x1: at, y0: 0, y1: 1, yref: "paper", line: { color: "#8a8f98", width: 1, dash: "dot" } })),
      annotations: named.map(([step, at]) => ({ x: at, y: 1, yref: "paper", yanchor: "bottom", xanchor: "left", text: step ? `step ${step}` : "prefill", showarrow: false, font: { size: 11 } })),
    };
  }

  // Names inside the spans that are wide enough for them.
  function spanNames(range) {
    const wide = ((range[1] - range[0]) / plot.clientWidth) * 52;
    const all = rows();
    const names = [];
    all.forEach((row, place) => {
      const { run, lane } = row;
      const [from, to] = inView(row, range);
      for (let i = from; i < to && names.length < LABELS; i += 1) {
        const start = Math.max(range[0], lane.start[i] - offset(run));
        const end = Math.min(range[1], lane.end[i] - offset(run));
        if (end - start < wide) continue;
        const colour = packed.kinds[run.names[lane.nameAt[i]].kind].colour;
        names.push({ x: (start + end) / 2, y: all.length - 0.5 - place, text: plain(run.names[lane.nameAt[i]].name), showarrow: false, font: { size: 11, color: inkOn(colour) } });
      }
    });
    return names;
  }

  const plain = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");

  function inkOn(colour) {
    const [red, green, blue] = [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
    return 0.299 * red + 0.587 * green + 0.114 * blue > 140 ? "#101418" : "#ffffff";
  }

  function laneNames() {
    return rows().map(({ run, lane }) => (runs.length > 1 ? `${lane.name}<br><i>${plain(run.name)}</i>` : lane.name));
  }

  function layout(range, view) {
    const lanes = rows().length;
    const { shapes, annotations } = stepLines(range);
    return dressed({
      height: 90 + lanes * 62,
      margin: { l: 8, r: 12, t: 26, b: 8 },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { size: 13, family: "system-ui, sans-serif" },
      showlegend: false,
      hovermode: false,
      dragmode: "zoom",
      xaxis: { title: { text: `ms since the start of ${anchor ? `step ${anchor}` : "the prefill"}`, standoff: 8 }, range, automargin: true, zeroline: false, separatethousands: true },
      yaxis: { range: [0, lanes], tickvals: rows().map((_, place) => lanes - 0.5 - place), ticktext: laneNames(), fixedrange: true, automargin: true, showgrid: false, zeroline: false },
      shapes,
      annotations: view.isExact ? [...annotations, ...spanNames(range)] : annotations,
    });
  }

  async function show(range) {
    drawing = true;
    const view = drawn(range);
    const frame = layout(range, view);
    plot.style.height = `${frame.height}px`;
    await Plotly.react(plot, traces(view.shapes), frame, config);
    drawing = false;
    plot.dataset.exact = String(view.isExact);
    plot.dataset.spans = String(view.count);
    say(range, view);
  }

  function say(range, { isExact, count }) {
    const words = runs.map((run) => {
      const busy = run.lanes.map((lane) => {
        const share = sums({ run, lane }, range, 1).reduce((sum, column) => sum + (column ? column[0] : 0), 0);
        return `${lane.name} ${(100 * share).toFixed(share > 0.9995 || share < 0.0005 ? 0 : 1)} %`;
      });
      return `Busy in view, ${run.name}: ${busy.join(", ")}`;
    });
    const how = isExact ? `${count.toLocaleString("en")} spans in view, each drawn` : `${count.toLocaleString("en")} spans in view, summed up: a lane is as high as it is busy; zoom in to see each`;
    document.getElementById("timeline-view").textContent = `${words.join(". ")}. ${how}.`;
  }

  const currentRange = () => plot._fullLayout.xaxis.range.map(Number);

  function showSteps(first, last) {
    const low = Math.min(Math.max(first, packed.first_step), packed.last_step);
    const high = Math.min(Math.max(last, low), packed.last_step);
    anchor = low;
    document.getElementById("timeline-first").value = low;
    document.getElementById("timeline-last").value = high;
    const width = Math.max(...runs.map((run) => stepEnd(run, high) - stepStart(run, low)));
    return show([-0.01 * width, 1.01 * width]);
  }

  // The span under a point of the plot, by lane and time.
  function spanAt(x, y) {
    const all = rows();
    const row = all[all.length - 1 - Math.floor(y)];
    if (!row) return null;
    const at = x + offset(row.run);
    const i = firstAtLeast(row.lane.end, at);
    return i < row.lane.spans && row.lane.start[i] <= at ? described(row, i) : null;
  }

  function described({ run, lane }, i) {
    return {
      run: run.name, stream: lane.stream, name: run.names[lane.nameAt[i]].name, step: lane.step[i],
      layer: lane.layer[i] < 0 ? null : lane.layer[i], start_ms: lane.start[i], end_ms: lane.end[i], bytes: lane.size[i],
    };
  }

  function words(span) {
    const ms = span.end_ms - span.start_ms;
    const moved = span.bytes ? `\n${(span.bytes / 2 ** 20).toPrecision(3)} MiB at ${(span.bytes / ms / 1e6).toPrecision(3)} GB/s` : "";
    const where = span.step ? `step ${span.step}` : "prefill";
    return `${span.name}, ${where}${span.layer === null ? "" : `, layer ${span.layer}`}\n${ms.toPrecision(4)} ms (${span.run})${moved}`;
  }

  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  document.body.append(tip);

  function onPointer(event) {
    const { xaxis, yaxis } = plot._fullLayout ?? {};
    if (!xaxis || !runs.length) return;
    const box = plot.getBoundingClientRect();
    const x = event.clientX - box.left - xaxis._offset;
    const y = event.clientY - box.top - yaxis._offset;
    const inside = x >= 0 && x <= xaxis._length && y >= 0 && y <= yaxis._length;
    const span = inside ? spanAt(xaxis.p2d(x), yaxis.p2d(y)) : null;
    tip.hidden = !span;
    if (!span) return;
    tip.textContent = words(span);
    tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, window.innerWidth - tip.offsetWidth - 8))}px`;
    tip.style.top = `${event.clientY + 18}px`;
  }

  function onZoom(changes) {
    if (drawing || !Object.keys(changes).some((key) => key.startsWith("xaxis"))) return;
    if (changes["xaxis.autorange"]) reset();
    else show(currentRange());
  }

  function reset() {
    return showSteps(packed.first_step, packed.last_step);
  }

  function fromInputs() {
    const [first, last] = ["timeline-first", "timeline-last"].map((id) => Number(document.getElementById(id).value));
    showSteps(first, Math.max(first, last));
  }

  function allAsCsv() {
    const headings = ["run", "stream", "operation", "step", "layer", "start, s", "end, s", "bytes"];
    const text = [line(headings)];
    for (const row of rows()) {
      for (let i = 0; i < row.lane.spans; i += 1) {
        const span = described(row, i);
        text.push(line([span.run, span.stream, span.name, span.step, span.layer, span.start_ms / 1e3, span.end_ms / 1e3, span.bytes]));
      }
    }
    return text.join("\r\n") + "\r\n";
  }

  async function start() {
    runs = await Promise.all(packed.runs.map(async (run) => ({ ...run, lanes: await Promise.all(run.lanes.map(unpack)) })));
    const phases = packed.phases.map((phase) => phase.step).filter((step) => step <= packed.last_step);
    const chosen = Math.min(packed.last_step, Math.max(1, packed.first_step, (phases.at(-1) ?? 0) + 1));
    await showSteps(chosen, chosen);
    plot.reset = reset;
    plot.on("plotly_relayout", onZoom);
    plot.addEventListener("keydown", onKey);
    plot.addEventListener("pointermove", onPointer);
    plot.addEventListener("pointerleave", () => { tip.hidden = true; });
    document.getElementById("timeline-show").addEventListener("submit", (event) => { event.preventDefault(); fromInputs(); });
    for (const button of document.querySelectorAll("[data-steps]")) {
      button.addEventListener("click", () => showSteps(...JSON.parse(button.dataset.steps)));
    }
    for (const button of document.querySelectorAll("[data-key]")) {
      button.addEventListener("click", () => show(moved(currentRange(), button.dataset.key)));
    }
    document.getElementById("timeline-csv").addEventListener("click", () => save("timeline", allAsCsv()));
    return true;
  }

  return { ready: start(), show, showSteps, spanAt, allAsCsv, drawn, currentRange, runs: () => runs };
})();
