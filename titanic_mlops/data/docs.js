// What the scripts of Data Docs ask of jQuery, Bootstrap and bootstrap-table; loads nothing.
function $(what) {
  const found = typeof what === "string" ? [...document.querySelectorAll(what)] : [what].flat();
  const show = yes => { for (const one of found) { one.hidden = !yes; one.style.display = yes ? "" : "none"; } };
  return {
    each: look => found.forEach((one, at) => look(at, one)),
    parent: () => $([...new Set(found.map(one => one.parentElement))]),
    fadeIn: () => show(true),
    fadeOut: () => show(false),
    ready: act => document.addEventListener("DOMContentLoaded", act),
    bootstrapTable: said => found.forEach(table => typeof said === "string" ? table.clear() : fill(table, said)),
    on: () => {},  // rows are links already
    popover: () => {},
    tooltip: () => {},
  };
}

function fill(table, {columns, data, sortName, sortOrder, toolbar}) {
  const heads = table.createTHead().insertRow(), body = table.createTBody(), search = document.createElement("input");
  const key = (row, column) => row[column.sortName ?? column.field];
  Object.assign(search, {type: "search", placeholder: "Search", oninput: () => show()});
  search.setAttribute("aria-label", "Search");
  document.querySelector(toolbar).prepend(search);
  table.clear = () => { search.value = ""; show(); };
  let by = columns.find(one => one.field === sortName) ?? columns[0], turn = sortOrder === "desc" ? -1 : 1;
  for (const column of columns) {
    const head = document.createElement("th"), button = document.createElement("button");
    button.textContent = column.title;
    button.onclick = () => { turn = by === column ? -turn : 1; by = column; show(); };
    head.append(button);
    heads.append(head);
  }
  function show() {
    body.replaceChildren();
    const order = (a, b) => turn * (key(a, by) < key(b, by) ? -1 : key(a, by) > key(b, by) ? 1 : 0);
    for (const row of [...data].sort(order)) {
      const line = document.createElement("tr");
      let open = row._table_row_link_path;
      for (const {field} of columns) {
        const cell = line.insertCell();
        cell.innerHTML = row[field] ?? "";
        if (open && cell.textContent.trim() && !cell.children.length) {  // the first that is bare text
          const link = Object.assign(document.createElement("a"), {href: open, textContent: cell.textContent});
          cell.replaceChildren(link);
          open = "";
        }
      }
      if (line.textContent.toLowerCase().includes(search.value.trim().toLowerCase())) body.append(line);
    }
  }
  show();
}

document.addEventListener("click", event => {
  const link = event.target.closest("[data-toggle=collapse], [data-toggle=tab]");
  if (!link) return;
  event.preventDefault();
  const id = link.getAttribute("href").slice(1);
  if (link.dataset.toggle === "collapse") {  // an id may be there more than once
    const place = link.closest("li") ?? document, now = link.getAttribute("aria-expanded") !== "true";
    place.querySelectorAll(`[id="${id}"]`).forEach(one => one.classList.toggle("show", now));
    link.setAttribute("aria-expanded", now);
    return;
  }
  for (const tab of link.closest("ul").querySelectorAll("[data-toggle=tab]")) {
    const mine = tab === link;
    tab.classList.toggle("active", mine);
    tab.setAttribute("aria-selected", mine);
    document.getElementById(tab.getAttribute("href").slice(1)).classList.toggle("show", mine);
  }
});
