// A live page asks for itself again and shows what changed; a form that ends something asks first.
"use strict";

const keepers = (root) => [...root.querySelectorAll("[data-keep]")];

function swap(main, fresh) {
  const kept = new Map(keepers(main).map((e) => [e.dataset.keep, [e.scrollLeft, e.open]]));
  main.replaceChildren(...fresh.childNodes);
  for (const element of keepers(main)) {
    const [left, open] = kept.get(element.dataset.keep) ?? [0, false];
    element.scrollLeft = left;
    if (open) element.open = true;
  }
}

async function refresh() {
  const main = document.querySelector("main[data-live]");
  if (!main) return;
  let seconds = Number(main.dataset.live);
  const busy = document.hidden || main.contains(document.activeElement);
  if (!busy) {
    const stale = document.getElementById("stale");
    try {
      const answer = await fetch(location.href, { headers: { Accept: "text/html" } });
      if (answer.redirected) { location.reload(); return; }
      if (!answer.ok) throw new Error(answer.statusText);
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      const fresh = page.querySelector("main");
      const time = page.querySelector("footer");
      if ("live" in fresh.dataset) main.dataset.live = fresh.dataset.live;
      else delete main.dataset.live;
      swap(main, fresh);
      document.querySelector("footer").replaceChildren(...time.childNodes);
    } catch {
      stale.hidden = false;
      seconds *= 3;
    }
  }
  setTimeout(refresh, 1000 * seconds);
}

document.addEventListener("submit", (event) => {
  const question = event.target.dataset.ask;
  if (question && !window.confirm(question)) event.preventDefault();
});

const live = document.querySelector("main[data-live]");
if (live) setTimeout(refresh, 1000 * Number(live.dataset.live));
