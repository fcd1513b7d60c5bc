for (const button of document.querySelectorAll("button[data-copy]")) {
  button.hidden = !navigator.clipboard;
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(document.getElementById(button.dataset.copy).textContent);
    button.textContent = "copied";
    setTimeout(() => { button.textContent = "copy"; }, 1600);
  });
}
addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
});
for (const table of document.querySelectorAll("table.sortable")) {
  const size = { B: 1, kB: 1e3, MB: 1e6, GB: 1e9, s: 1, min: 60, h: 3600, "%": 1 };
  const figure = (cell) => {
    const found = /^[<>]?\s*([+\u2212-]?[\d\s]*\.?\d+(?:e[-+]?\d+)?)\s*(%|kB|MB|GB|B|min|s|h)?/.exec(cell.textContent.trim());
    return found ? Number(found[1].replace(/\s/g, "").replace("\u2212", "-")) * (size[found[2]] ?? 1) : NaN;
  };
  table.querySelectorAll("button.sort").forEach((button, column) => {
    let downwards = column === 0;
    button.addEventListener("click", () => {
      downwards = !downwards;
      const rows = [...table.tBodies[0].rows], sign = downwards ? -1 : 1;
      rows.sort((a, b) => {
        const [x, y] = [a, b].map((row) => figure(row.cells[column]));
        if (column === 0) return sign * a.cells[0].textContent.localeCompare(b.cells[0].textContent);
        if (isNaN(x) || isNaN(y)) return isNaN(x) - isNaN(y);
        return sign * (x - y);
      });
      table.tBodies[0].append(...rows);
      for (const head of table.tHead.rows[0].cells) head.removeAttribute("aria-sort");
      button.parentElement.setAttribute("aria-sort", downwards ? "descending" : "ascending");
    });
  });
}
for (const slide of document.querySelectorAll("[data-slide]")) {
  const [large, ...stops] = slide.querySelectorAll("img"), range = slide.querySelector("input");
  const told = slide.querySelector("figcaption");
  const show = () => {
    const at = stops[range.value];
    large.src = at.src;
    told.textContent = at.nextElementSibling.textContent;
    for (const stop of stops) stop.classList.toggle("at", stop === at);
  };
  range.hidden = false;
  range.addEventListener("input", show);
  stops.forEach((stop, i) => stop.addEventListener("click", () => { range.value = i; show(); }));
  show();
}
for (const laid of document.querySelectorAll("[data-laid]")) {
  const range = laid.querySelector("input"), over = laid.querySelectorAll("img")[1];
  range.hidden = false;
  range.addEventListener("input", () => { over.style.opacity = range.value; });
}
