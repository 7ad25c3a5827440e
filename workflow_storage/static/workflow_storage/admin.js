/* What the pages of runs do beyond links and forms: copy, move by keys, refresh while a run goes on.
   Every page works without it. */
(() => {
  "use strict";

  // What a reader sees is written by the template, in the reader's language.
  const words = document.currentScript.dataset;
  const copyWhat = (what) => words.wordCopyWhat.replace("{what}", () => what);

  for (const element of document.querySelectorAll("[data-copy]")) {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "workflow-storage-copy";
    button.textContent = words.wordCopy;
    button.title = element.dataset.copy;
    button.setAttribute("aria-label", copyWhat(element.dataset.copy));
    button.addEventListener("click", () => copy(element.dataset.copy, button));
    element.after(button);
  }

  // The key of a row of a tree copies where it is; what folds goes on folding by its sign and text.
  document.addEventListener("click", (event) => {
    const key = event.target.closest?.(".workflow-storage-tree-key");
    const path = key?.closest("[data-path]")?.dataset.path;
    if (!path) return;
    event.preventDefault();
    copy(path, key);
  });
  for (const key of document.querySelectorAll(".workflow-storage-tree-key")) {
    const path = key.closest("[data-path]")?.dataset.path;
    if (path) key.title = copyWhat(path);
  }

  async function copy(text, where) {
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      return;
    }
    where.classList.add("workflow-storage-copied");
    setTimeout(() => where.classList.remove("workflow-storage-copied"), 1200);
  }

  document.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
    if (event.target.closest?.("input, select, textarea, [contenteditable], summary, pre")) return;
    document.querySelector(`a[data-key="${event.key}"]`)?.click();
  });

  for (const form of document.querySelectorAll(".workflow-storage-slider")) {
    const slider = form.querySelector("input[type=range]");
    const output = form.querySelector("output");
    slider.addEventListener("input", () => { output.textContent = slider.value; });
    slider.addEventListener("change", () => form.requestSubmit());
  }

  for (const details of document.querySelectorAll("details[data-load]")) {
    const name = details.dataset.remember && `workflow-storage.${details.dataset.remember}`;
    let asked = false;
    details.addEventListener("toggle", async () => {
      if (name) localStorage.setItem(name, details.open ? "open" : "");
      if (!details.open || asked) return;
      asked = true;
      const url = new URL(details.dataset.load, location.href);
      url.searchParams.set("fragment", "1");
      try {
        const response = await fetch(url);
        if (!response.ok || response.redirected) return;
        const place = document.createElement("div");
        place.innerHTML = await response.text();
        details.append(place);
      } catch {
        asked = false;
      }
    });
    if (name && localStorage.getItem(name)) details.open = true;
  }

  const page = document.querySelector("[data-live]");
  if (page) follow(page);

  function follow(page) {
    let wait = 2000;
    const again = () => setTimeout(refresh, wait);
    async function refresh() {
      if (document.hidden) {
        document.addEventListener("visibilitychange", refresh, { once: true });
        return;
      }
      let data;
      try {
        const response = await fetch(page.dataset.live, { headers: { Accept: "application/json" } });
        if (response.status === 403 || response.status === 404 || response.redirected) return;
        data = await response.json();
      } catch {
        wait = Math.min(wait * 2, 60000);
        again();
        return;
      }
      wait = 2000;
      for (const [name, html] of Object.entries(data.regions)) show(name, html);
      if (!data.ended) again();
    }
    again();
  }

  function show(name, html) {
    const region = document.querySelector(`[data-region="${name}"]`);
    if (!region || region.dataset.shown === html) return;
    // What somebody reads or has selected is not taken away.
    const open = [...region.querySelectorAll("details")].map((details) => details.open);
    region.dataset.shown = html;
    region.innerHTML = html;
    [...region.querySelectorAll("details")].forEach((details, place) => {
      if (open[place]) details.open = true;
    });
  }
})();
