// A click on a column's name sorts by it, a second click the other way. Rows of equal value keep their order.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const figures = head.classList.contains("figure");
    const up = head.ariaSort === "none" ? !figures : head.ariaSort === "descending";
    const value = (row) => {
      const cell = row.cells[column], text = cell.dataset.value ?? cell.textContent;
      return figures ? (text === "-inf" ? -Infinity : text === "inf" ? Infinity : parseFloat(text)) : text;
    };
    const order = figures ? (a, b) => (a < b ? -1 : a > b ? 1 : 0)
                          : (a, b) => a.localeCompare(b, undefined, { numeric: true });
    const rows = [...body.rows].sort((a, b) => (up ? 1 : -1) * order(value(a), value(b)));
    heads.forEach((other) => { other.ariaSort = "none"; });
    head.ariaSort = up ? "ascending" : "descending";
    body.append(...rows);
  }));
}
