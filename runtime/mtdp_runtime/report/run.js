"use strict";
// Sorting and filtering of the table of slides. Without it the page is complete, in its own order: failures first.
(() => {
  const table = document.getElementById("slides"), body = table.tBodies[0], rows = [...body.rows];
  const tools = document.getElementById("tools"), count = document.getElementById("count");
  const [text, status, look] = ["text", "status", "look"].map((id) => document.getElementById(id));
  const words = rows.map((row) => row.textContent.toLowerCase());

  const value = (row, column) => {
    const cell = row.cells[column], shown = cell.dataset.v ?? cell.textContent.trim();
    if (shown === "" || shown === "–") return null;
    const number = Number(shown.replaceAll(",", ""));
    return Number.isNaN(number) ? shown.toLowerCase() : number;
  };
  const compare = (a, b) => {
    if (typeof a === "number" && typeof b === "number") return a - b;
    return String(a).localeCompare(String(b), "en", { numeric: true });
  };
  const sort = (head, column) => {
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const keyed = rows.map((row, place) => [value(row, column), place, row]);
    keyed.sort(([a, i], [b, j]) => {
      if (a === null || b === null) return (a === null) - (b === null) || i - j; // what is unknown stands last
      return (down ? compare(b, a) : compare(a, b)) || i - j;
    });
    body.append(...keyed.map(([, , row]) => row));
  };
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    if (!head.dataset.sort) return;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => sort(head, column));
  });

  const filter = () => {
    const wanted = text.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    rows.forEach((row, i) => {
      const fits = wanted.every((word) => words[i].includes(word)) && (!status.value || row.dataset.s === status.value)
        && (!look.checked || row.dataset.look !== undefined);
      row.hidden = !fits;
      shown += fits;
    });
    count.textContent = shown === rows.length ? `all ${rows.length} shown` : `${shown} of ${rows.length} shown`;
  };
  for (const one of [text, status, look]) one.addEventListener("input", filter);
  tools.hidden = false;
  filter();
})();
