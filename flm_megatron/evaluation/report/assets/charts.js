// Draws the data of every <figure class="chart"> with uPlot: zoom, crosshair, logarithmic axes, lines to switch off.
"use strict";
const Charts = (() => {
  const state = { axis: 0, logX: false, kept: new Map() };
  const drawn = [];

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const short = (value) => {
    if (value == null) return "–";
    const size = Math.abs(value);
    for (const [limit, unit] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "K"]])
      if (size >= 1e4 && size < 1e15 && size >= limit) return +(value / limit).toPrecision(4) + unit;
    return size === 0 || (size >= 1e-3 && size < 1e4) ? String(+value.toPrecision(4)) : value.toExponential(1);
  };

  // What is kept of a chart when it is drawn anew: the zoom, the kind of its y axis, lines that are switched off.
  const memory = (title) => {
    if (!state.kept.has(title)) state.kept.set(title, { hidden: new Set(), logY: null, zoom: null });
    return state.kept.get(title);
  };

  // The nearest value of a line to the pointer: lines have values at places of their own.
  const nearest = (u, line, at, x) => {
    const [xs, ys] = [u.data[0], u.data[line]];
    if (ys[at] != null) return at;
    let low = at, high = at;
    while (low >= 0 && ys[low] == null) low--;
    while (high < xs.length && ys[high] == null) high++;
    if (low < 0) return high < xs.length ? high : at;
    if (high >= xs.length) return low;
    return x - xs[low] <= xs[high] - x ? low : high;
  };

  const columns = (line, axis, logX, logY) => {
    const count = line.columns.length;
    if (!count) return [[], []];
    const ys = line.columns[count - 1];
    const pairs = line.columns[count > 2 ? axis : 0].map((x, i) => [x, ys[i]]);
    const kept = pairs.filter(([x, y]) => (!logX || x > 0) && (!logY || y > 0)).sort((a, b) => a[0] - b[0]);
    return [kept.map((pair) => pair[0]), kept.map((pair) => pair[1])];
  };

  const places = (chart, axis) => chart.marks.map((mark) => [mark[chart.x.length > 1 ? axis : 0], mark.at(-1)]);

  // Dashed lines where stages begin, their names one below the other where they would meet.
  const drawMarks = (chart, axis) => (u) => {
    const { ctx, bbox } = u, ratio = devicePixelRatio, ends = [];
    ctx.save();
    ctx.strokeStyle = colour("--mark");
    ctx.fillStyle = colour("--text");
    ctx.font = `${12 * ratio}px system-ui, sans-serif`;
    ctx.textAlign = "left";
    for (const [x, name] of places(chart, axis).sort((a, b) => a[0] - b[0])) {
      if (x < u.scales.x.min || x > u.scales.x.max) continue;
      const at = u.valToPos(x, "x", true), width = ctx.measureText(name).width;
      const left = Math.max(bbox.left, Math.min(at + 4 * ratio, bbox.left + bbox.width - width));
      let row = ends.findIndex((end) => end < left);
      if (row < 0) row = ends.length;
      ends[row] = left + width + 6 * ratio;
      ctx.setLineDash([3 * ratio, 4 * ratio]);
      ctx.beginPath();
      ctx.moveTo(at, bbox.top);
      ctx.lineTo(at, bbox.top + bbox.height);
      ctx.stroke();
      const height = bbox.top + (12 + 14 * row) * ratio;
      ctx.save();
      ctx.setLineDash([]);
      ctx.strokeStyle = colour("--card"); // read over what lies below it
      ctx.lineWidth = 4 * ratio;
      ctx.strokeText(name, left, height);
      ctx.restore();
      ctx.fillText(name, left, height);
    }
    ctx.restore();
  };

  // A named distance along x: an upright at each end that lies inside of the chart.
  const drawBrackets = (chart) => (u) => {
    const { ctx, bbox } = u, ratio = devicePixelRatio, right = bbox.left + bbox.width;
    ctx.save();
    ctx.strokeStyle = ctx.fillStyle = colour("--text");
    ctx.lineWidth = 1.6 * ratio;
    ctx.font = `${12 * ratio}px system-ui, sans-serif`;
    ctx.textAlign = "center";
    for (const [start, end, y, name] of chart.brackets) {
      const height = u.valToPos(y, "y", true);
      const ends = [start, end].map((x) => u.valToPos(x, "x", true));
      const inside = ends.map((x) => Math.min(Math.max(x, bbox.left), right));
      ctx.beginPath();
      ctx.moveTo(inside[0], height);
      ctx.lineTo(inside[1], height);
      for (const x of ends.filter((x, i) => x === inside[i])) {
        ctx.moveTo(x, height - 5 * ratio);
        ctx.lineTo(x, height + 5 * ratio);
      }
      ctx.stroke();
      const half = ctx.measureText(name).width / 2;
      const middle = Math.max(bbox.left + half, Math.min((inside[0] + inside[1]) / 2, right - half));
      ctx.fillText(name, middle, height + 18 * ratio);
    }
    ctx.restore();
  };

  const heatRange = (chart) => {
    let [least, most] = [Infinity, 0]; // values may be more than a call takes arguments
    for (const row of chart.heat)
      for (const value of row.columns.at(-1) ?? [])
        if (value > 0) [least, most] = [Math.min(least, value), Math.max(most, value)];
    return most ? [least, most] : [1, 1];
  };

  // Layers as rows: each value fills the stretch up to the next one; opacity is the place on a logarithmic scale.
  const drawHeat = (chart, axis) => (u) => {
    const { ctx, bbox } = u, [least, most] = heatRange(chart);
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
    ctx.clip();
    ctx.fillStyle = colour("--c0");
    for (const row of chart.heat) {
      const [xs, ys] = columns(row, axis, false, false);
      const top = u.valToPos(row.layer + 0.5, "y", true), bottom = u.valToPos(row.layer - 0.5, "y", true);
      xs.forEach((x, i) => {
        const left = u.valToPos(i ? xs[i - 1] : x - ((xs[1] ?? x) - x), "x", true), right = u.valToPos(x, "x", true);
        const share = ys[i] > 0 ? Math.log(ys[i] / least) / (Math.log(most / least) || 1) : 0;
        ctx.globalAlpha = 0.06 + 0.94 * share;
        ctx.fillRect(left, top, Math.max(right - left, 1), bottom - top);
      });
    }
    ctx.restore();
  };

  const axes = (chart, axis) => {
    const common = { stroke: colour("--quiet"), labelSize: 20, labelFont: "12px system-ui, sans-serif", grid: { stroke: colour("--rule"), width: 1 } };
    common.ticks = common.grid;
    const format = (u, values) => values.map((value) => (value == null ? "" : short(value)));
    const whole = chart.heat.length || chart.x[0] === "layer";
    const steps = whole ? { incrs: [1, 2, 5, 10, 20, 50, 100] } : {};
    return [
      { ...common, size: 32, label: chart.x[chart.x.length > 1 ? axis : 0], values: format, ...(chart.heat.length ? {} : steps) },
      { ...common, label: chart.y, values: format, size: 62, ...(chart.heat.length ? steps : {}) },
    ];
  };

  const lines = (chart, kept) =>
    chart.series.map((line) => ({
      label: line.name,
      show: !kept.hidden.has(line.name),
      stroke: colour(`--c${line.colour % 6}`),
      dash: line.colour >= 6 ? [6, 4] : undefined,
      width: 1.6,
      spanGaps: true,
      points: { show: line.dots || line.columns[0]?.length === 1, size: 6, fill: colour(`--c${line.colour % 6}`) },
      value: (u, value) => (value == null ? "–" : String(+value.toPrecision(5))),
    }));

  const heatLines = (chart) =>
    chart.heat.map((row) => ({
      label: `layer ${row.layer}`,
      stroke: colour("--c0"),
      paths: () => null,
      points: { show: false },
      value: (u, value) => (value == null ? "–" : String(+value.toPrecision(4))),
    }));

  const options = (figure, chart, kept, many) => {
    const axis = state.axis, logY = kept.logY ?? chart.logY, logX = chart.logX || (many && state.logX);
    const heat = chart.heat.length > 0;
    const edge = (rows) => [Math.min(...rows.map((r) => r.layer)) - 0.5, Math.max(...rows.map((r) => r.layer)) + 0.5];
    return {
      width: Math.max(240, figure.clientWidth - 28),
      height: figure.classList.contains("wide-chart") ? 380 : 280,
      scales: {
        x: { time: false, distr: logX ? 3 : 1 },
        y: heat ? { range: edge(chart.heat) } : { distr: logY ? 3 : 1 },
      },
      axes: axes(chart, axis),
      series: [{ label: "at", value: (u, value) => short(value) }, ...(heat ? heatLines(chart) : lines(chart, kept))],
      cursor: {
        dataIdx: nearest,
        drag: { x: true, y: false },
        sync: many ? { key: "run", setSeries: false } : undefined,
        points: { show: !heat },
      },
      legend: { live: true },
      hooks: {
        drawClear: heat ? [drawHeat(chart, axis)] : [],
        draw: [drawMarks(chart, axis), drawBrackets(chart)],
        setSelect: [(u) => remember(u, kept)],
        setSeries: [(u, i) => i && !heat && kept.hidden[u.series[i].show ? "delete" : "add"](u.series[i].label)],
      },
    };
  };

  const remember = (u, kept) => {
    if (u.select.width > 0)
      kept.zoom = [u.posToVal(u.select.left, "x"), u.posToVal(u.select.left + u.select.width, "x"), state.axis];
  };

  const draw = (figure) => {
    const chart = JSON.parse(figure.querySelector("script").textContent);
    const kept = memory(figure.getAttribute("aria-label")), many = chart.x.length > 1;
    figure.querySelector(".plot")?.remove();
    const plot = document.createElement("div");
    plot.className = chart.heat.length ? "plot heat" : "plot";
    figure.append(plot);
    const settings = options(figure, chart, kept, many);
    const logX = settings.scales.x.distr === 3, logY = settings.scales.y.distr === 3;
    const tables = (chart.heat.length ? chart.heat : chart.series).map((l) => columns(l, state.axis, logX, logY));
    const data = tables.some(([xs]) => xs.length) ? uPlot.join(tables) : [[], ...tables.map(() => [])];
    const u = new uPlot(settings, data, plot);
    if (kept.zoom && kept.zoom[2] === state.axis) u.setScale("x", { min: kept.zoom[0], max: kept.zoom[1] });
    plot.querySelector(".u-over").addEventListener("dblclick", () => (kept.zoom = null));
    for (const name of plot.querySelectorAll(".u-series:not(:first-child) th")) asButton(name);
    figure.onkeydown = (event) => key(event, u, kept);
    addLogButton(figure, chart, kept, logY);
    drawn.push(u);
  };

  const asButton = (name) => {
    name.tabIndex = 0;
    name.setAttribute("role", "button");
    name.onkeydown = (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      event.stopPropagation();
      name.click();
    };
  };

  const addLogButton = (figure, chart, kept, logY) => {
    if (chart.heat.length) return;
    const caption = figure.querySelector("figcaption");
    caption.querySelector("button")?.remove();
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = "log y";
    button.setAttribute("aria-pressed", String(logY));
    button.onclick = () => {
      kept.logY = !logY;
      draw(figure);
      figure.querySelector("button").focus();
    };
    caption.append(button);
  };

  // Left and right move the crosshair, + and - zoom around it, 0 shows all.
  const key = (event, u, kept) => {
    const { min, max } = u.scales.x, left = u.cursor.left < 0 ? u.over.clientWidth / 2 : u.cursor.left;
    const turn = { ArrowLeft: -8, ArrowRight: 8 }[event.key];
    if (turn) u.setCursor({ left: Math.max(0, Math.min(left + turn, u.over.clientWidth)), top: 10 });
    else if (event.key === "0") {
      kept.zoom = null;
      u.setData(u.data);
    } else if (event.key === "+" || event.key === "-") {
      const width = u.over.clientWidth, half = width * (event.key === "+" ? 0.25 : 1);
      const [low, high] = [u.posToVal(left - half, "x"), u.posToVal(left + half, "x")];
      const ends = [u.data[0][0], u.data[0].at(-1)];
      kept.zoom = [Math.max(low, Math.min(ends[0], min)), Math.min(high, Math.max(ends[1], max)), state.axis];
      u.setScale("x", { min: kept.zoom[0], max: kept.zoom[1] });
    } else return;
    event.preventDefault();
  };

  const drawAll = () => {
    for (const u of drawn.splice(0)) u.destroy();
    document.querySelectorAll("figure.chart").forEach(draw);
  };

  const paper = (on) => () => {
    document.documentElement.classList.toggle("paper", on);
    drawAll();
  };

  const start = () => {
    document.querySelector(".axes").addEventListener("change", (event) => {
      if (event.target.name === "axis") state.axis = Number(event.target.value);
      else state.logX = event.target.checked;
      drawAll();
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
    addEventListener("beforeprint", paper(true));
    addEventListener("afterprint", paper(false));
    let width = innerWidth, wait;
    addEventListener("resize", () => {
      if (innerWidth === width) return;
      width = innerWidth;
      clearTimeout(wait);
      wait = setTimeout(drawAll, 150);
    });
    drawAll();
  };
  return { start, drawAll };
})();
Charts.start();
