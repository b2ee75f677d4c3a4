// Draws every figure in the reader's colours, follows them when they change, and gives each figure's numbers as CSV.
"use strict";
window.kvplan = (() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const coarse = window.matchMedia("(pointer: coarse)");
  // Nothing leaves the page: no button that sends a figure to a server.
  const config = {
    responsive: true, displaylogo: false, displayModeBar: "hover", plotlyServerURL: "",
    modeBarButtonsToRemove: ["sendChartToCloud", "sendDataToCloud", "editInChartStudio", "select2d", "lasso2d", "autoScale2d"],
  };
  let printing = false;

  function colours() {
    const night = dark.matches && !printing;
    return night
      ? { ink: "#d5dbe1", grid: "#333b44", line: "#77818c", ground: "#14181d" }
      : { ink: "#2a3038", grid: "#e3e7eb", line: "#9aa3ad", ground: "#ffffff" };
  }

  // Changes to a layout that put it into the colours of the moment.
  function scheme(layout) {
    const { ink, grid, line, ground } = colours();
    const changes = { "font.color": ink, "hoverlabel.bgcolor": ground, "hoverlabel.font.color": ink, "hoverlabel.bordercolor": line };
    for (const name of Object.keys(layout).filter((key) => /^[xy]axis\d*$/.test(key))) {
      Object.assign(changes, { [`${name}.gridcolor`]: grid, [`${name}.linecolor`]: line, [`${name}.color`]: ink });
    }
    changes["modebar.bgcolor"] = "rgba(0,0,0,0)";
    changes["modebar.color"] = line;
    changes["modebar.activecolor"] = ink;
    return changes;
  }

  function set(layout, path, value) {
    const names = path.split(".");
    const last = names.pop();
    names.reduce((at, name) => (at[name] ??= {}), layout)[last] = value;
  }

  function dressed(layout) {
    for (const [path, value] of Object.entries(scheme(layout))) set(layout, path, value);
    if (coarse.matches) layout.dragmode = false; // a finger scrolls the page
    return layout;
  }

  function draw(plot) {
    const figure = data.figures[plot.dataset.figure];
    const range = roomy(figure.layout, plot.clientWidth);
    if (range) figure.layout.xaxis.range = range;
    return Plotly.newPlot(plot, figure.data, dressed(figure.layout), config);
  }

  // Bars leave room for the labels at their ends, however narrow the page is.
  function roomy(layout, width) {
    const { reach, room, both_ways: bothWays } = layout.meta ?? {};
    if (!reach) return null;
    const inner = Math.max(150, width - 150) / (bothWays ? 2 : 1);
    const end = (reach * inner) / Math.max(30, inner - room);
    return bothWays ? [-end, end] : [0, end];
  }

  function refit() {
    for (const plot of plots()) {
      const range = roomy(plot.layout, plot.clientWidth);
      if (range) Plotly.relayout(plot, { "xaxis.range": range });
    }
  }

  const plots = () => [...document.querySelectorAll(".plot")].filter((plot) => plot.layout);

  function recolour() {
    return Promise.all(plots().map((plot) => Plotly.relayout(plot, scheme(plot.layout))));
  }

  // Keys: arrows move by a fifth, plus and minus zoom by two, 0 shows all.
  function onKey(event) {
    const plot = event.currentTarget;
    const axis = plot._fullLayout?.xaxis;
    if (!axis || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "0") {
      event.preventDefault();
      return void (plot.reset ? plot.reset() : Plotly.relayout(plot, home(plot)));
    }
    const range = moved(axis.range.map(Number), event.key);
    if (!range) return;
    event.preventDefault();
    Plotly.relayout(plot, { "xaxis.range": range });
  }

  function home(plot) {
    const range = plot.dataset.home ? JSON.parse(plot.dataset.home) : null;
    return range ? { "xaxis.range": range } : { "xaxis.autorange": true };
  }

  function moved([low, high], key) {
    const width = high - low;
    const middle = (low + high) / 2;
    switch (key) {
      case "ArrowLeft": return [low - width / 5, high - width / 5];
      case "ArrowRight": return [low + width / 5, high + width / 5];
      case "+": case "=": return [middle - width / 4, middle + width / 4];
      case "-": return [middle - width, middle + width];
      default: return null;
    }
  }

  // A spreadsheet takes text that begins with one of =+-@ for a formula.
  function cell(value) {
    if (value === null || value === undefined) return "";
    if (typeof value !== "string") return String(value);
    const safe = /^[=+\-@\t\r]/.test(value) ? `'${value}` : value;
    return /[",\r\n]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
  }

  const line = (cells) => cells.map(cell).join(",");

  function csv(name) {
    const { headings, columns } = data.tables[name];
    return [line(headings), ...columns[0].map((_, row) => line(columns.map((column) => column[row])))].join("\r\n") + "\r\n";
  }

  function save(name, text) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
    link.download = `${name}.csv`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }

  function forPaper(paper) {
    printing = paper;
    for (const plot of plots()) {
      const width = paper ? { width: 680, autosize: false } : { width: null, autosize: true };
      const range = roomy(plot.layout, paper ? 680 : plot.clientWidth);
      Plotly.relayout(plot, { ...scheme(plot.layout), ...width, ...(range && { "xaxis.range": range }) });
    }
  }

  const drawn = Promise.all(
    [...document.querySelectorAll(".plot[data-figure]")].map(async (plot) => {
      await draw(plot);
      if (plot.layout.xaxis?.autorange === false || data.figures[plot.dataset.figure].layout.xaxis?.range) {
        plot.dataset.home = JSON.stringify(plot.layout.xaxis.range);
      }
      plot.addEventListener("keydown", onKey);
    }),
  );
  for (const button of document.querySelectorAll(".csv[data-table]")) {
    button.addEventListener("click", () => save(button.dataset.table, csv(button.dataset.table)));
  }
  dark.addEventListener("change", recolour);
  window.addEventListener("resize", refit);
  window.addEventListener("beforeprint", () => forPaper(true));
  window.addEventListener("afterprint", () => forPaper(false));
  return { data, config, colours, dressed, onKey, moved, csv, line, save, ready: drawn };
})();
