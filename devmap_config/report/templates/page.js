
"use strict";
(() => {
  // A block's details beside it, for whoever points at it or goes to it with the keyboard; without this, they are below.
  const card = document.createElement("div");
  card.className = "card";
  card.hidden = true;
  card.id = "card";
  card.setAttribute("role", "tooltip");
  document.body.append(card);
  let shown = null;
  const hide = () => {
    if (shown) {
      shown.classList.remove("shown");
      shown.removeAttribute("aria-describedby");
    }
    card.hidden = true;
    shown = null;
  };
  const show = (link) => {
    const row = document.getElementById(link.hash.slice(1));
    if (!row || shown === link) return;
    hide();
    card.replaceChildren(...Array.from(row.children, (child) => child.cloneNode(true)));
    card.hidden = false;
    shown = link;
    link.classList.add("shown");
    link.setAttribute("aria-describedby", "card");
    const box = link.getBoundingClientRect();
    const left = Math.max(12, Math.min(box.left, document.documentElement.clientWidth - card.offsetWidth - 16));
    card.style.left = `${left + window.scrollX}px`;
    card.style.top = `${box.bottom + 8 + window.scrollY}px`;
  };
  for (const bar of document.querySelectorAll(".bar")) {
    const links = Array.from(bar.querySelectorAll("a"));
    links.forEach((link, place) => {
      link.tabIndex = place === 0 ? 0 : -1;
      link.addEventListener("mouseenter", () => show(link));
      link.addEventListener("mouseleave", hide);
      link.addEventListener("focus", () => show(link));
      link.addEventListener("blur", hide);
    });
  }
  // One stop for each bar; arrows go along it and to the bars above and below.
  const lines = Array.from(document.querySelectorAll(".bar"), (bar) => Array.from(bar.querySelectorAll("a"))).filter((line) => line.length);
  const go = (from, to) => {
    from.tabIndex = -1;
    to.tabIndex = 0;
    to.focus();
  };
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") return hide();
    const line = lines.findIndex((links) => links.includes(document.activeElement));
    if (line < 0 || event.altKey || event.ctrlKey || event.metaKey) return;
    const links = lines[line];
    const place = links.indexOf(document.activeElement);
    const ends = { Home: 0, End: links.length - 1, ArrowLeft: place - 1, ArrowRight: place + 1 };
    let target;
    if (event.key in ends) target = links[ends[event.key]];
    else if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      const other = lines[line + (event.key === "ArrowDown" ? 1 : -1)];
      target = other && other[Math.min(place, other.length - 1)];
      if (target) {
        event.preventDefault();
        target.tabIndex = 0;
        for (const each of other) if (each !== target) each.tabIndex = -1;
        target.focus();
      }
      return;
    } else return;
    event.preventDefault();
    if (target) go(links[place], target);
  });
})();
