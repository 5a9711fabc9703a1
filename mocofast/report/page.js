// The maps: the pointer, a finger or the arrow keys choose an image.
for (const map of document.querySelectorAll(".map")) {
  const dots = [...map.querySelectorAll("circle")];
  const popup = map.querySelector(".popup"), said = document.getElementById(map.dataset.said);
  const names = JSON.parse(document.getElementById(map.dataset.names).textContent);
  const columns = +map.dataset.columns, rows = Math.ceil(dots.length / columns);
  const places = dots.map(dot => [+dot.getAttribute("cx"), +dot.getAttribute("cy")]);
  let chosen = -1;
  function choose(i) {
    if (i < 0 || i === chosen) return;
    dots[chosen]?.classList.remove("on");
    chosen = i;
    dots[i].classList.add("on");
    dots[i].parentNode.append(dots[i]);  // drawn above its neighbours
    said.textContent = names[i];
    const size = 96, box = map.getBoundingClientRect();
    const x = places[i][0] / 100 * box.width, y = places[i][1] / 70 * box.height;
    popup.style.display = "block";
    popup.style.left = Math.min(Math.max(0, x + 12), Math.max(0, box.width - size)) + "px";
    popup.style.top = (y + 12 + size > box.height ? Math.max(0, y - size - 12) : y + 12) + "px";
    popup.style.backgroundSize = columns * size + "px " + rows * size + "px";
    popup.style.backgroundPosition = -(i % columns) * size + "px " + -Math.floor(i / columns) * size + "px";
  }
  function visible(i) { return !map.classList.contains("filtered") || dots[i].classList.contains("lit"); }
  function nearest(x, y, allowed) {
    let best = -1, least = Infinity;
    places.forEach(([a, b], i) => {
      const far = (a - x) ** 2 + (b - y) ** 2;
      if (far < least && visible(i) && allowed(i, a, b)) { best = i; least = far; }
    });
    return best;
  }
  function point(event) {
    const box = map.getBoundingClientRect();
    choose(nearest((event.clientX - box.left) / box.width * 100,
                   (event.clientY - box.top) / box.height * 70, () => true));
  }
  map.addEventListener("pointermove", point);
  map.addEventListener("pointerdown", point);
  map.addEventListener("keydown", event => {
    const way = {ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1]}[event.key];
    if (!way) return;
    event.preventDefault();
    if (chosen < 0) return choose(nearest(50, 35, () => true));
    const [x, y] = places[chosen];
    // The nearest image inside the quarter of the plane in that direction.
    choose(nearest(x, y, (i, a, b) => {
      const along = (a - x) * way[0] + (b - y) * way[1];
      const across = Math.abs((a - x) * way[1]) + Math.abs((b - y) * way[0]);
      return i !== chosen && along > 0 && across <= along;
    }));
  });
  const legend = document.getElementById(map.dataset.legend);
  legend?.addEventListener("click", event => {
    const button = event.target.closest("button");
    if (!button) return;
    const on = button.getAttribute("aria-pressed") !== "true";
    for (const other of legend.querySelectorAll("button")) other.setAttribute("aria-pressed", "false");
    button.setAttribute("aria-pressed", String(on));
    map.classList.toggle("filtered", on);
    for (const dot of dots) dot.classList.toggle("lit", on && dot.dataset.c === button.dataset.c);
  });
}
