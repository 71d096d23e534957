// Under the pointer: a line across the chart, and every line's nearest value.
for (const svg of document.querySelectorAll("svg[data-lines]")) {
  const lines = JSON.parse(svg.dataset.lines).filter((line) => line.points.length);
  const figure = svg.closest("figure");
  const reading = document.createElement("div");
  reading.className = "reading";
  reading.hidden = true;
  figure.append(reading);
  const cursor = document.createElementNS("http://www.w3.org/2000/svg", "line");
  cursor.setAttribute("class", "cursor");
  cursor.setAttribute("y1", 34);
  cursor.setAttribute("y2", svg.viewBox.baseVal.height - 40);
  cursor.style.display = "none";
  svg.append(cursor);

  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    const nearest = lines.map((line) => {
      const point = line.points.reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a));
      return { line, point };
    });
    if (!nearest.length) return;
    const closest = nearest.reduce((a, b) => (Math.abs(b.point[0] - x) < Math.abs(a.point[0] - x) ? b : a));
    cursor.setAttribute("x1", closest.point[0]);
    cursor.setAttribute("x2", closest.point[0]);
    cursor.style.display = "";
    reading.replaceChildren(document.createTextNode(closest.point[2]));
    for (const { line, point } of nearest) {
      const row = document.createElement("div");
      row.className = line.class;
      const value = document.createElement("b");
      value.textContent = point[3];
      row.append(value, " " + line.name);
      reading.append(row);
    }
    reading.hidden = false;
    const frame = figure.getBoundingClientRect();
    const left = event.clientX - frame.left + 14;
    reading.style.left = Math.min(left, frame.width - reading.offsetWidth - 4) + "px";
    reading.style.top = event.clientY - frame.top + 14 + "px";
  });
  svg.addEventListener("pointerleave", () => {
    reading.hidden = true;
    cursor.style.display = "none";
  });
}
