/* What the pages of runs do beyond links and forms: copy, move by keys, refresh while a run goes on.
   Every page works without it. */
(() => {
  "use strict";

  // What a reader sees is written by the template, in the reader's language.
  const words = document.currentScript.dataset;
  const copyWhat = (what) => words.wordCopyWhat.replace("{what}", () => what);

  // Said to those who do not see that something was copied.
  const said = document.createElement("div");
  said.className = "workflow-storage-said";
  said.setAttribute("role", "status");
  document.body.append(said);

  letCopy(document);

  function letCopy(root) {
    for (const element of root.querySelectorAll("[data-copy]")) {
      const button = document.createElement("button");
      button.type = "button";
      button.className = "workflow-storage-copy";
      button.title = copyWhat(element.dataset.copy);
      button.setAttribute("aria-label", button.title);
      button.addEventListener("click", () => copy(element.dataset.copy, button));
      element.after(button);
    }
    for (const tree of root.querySelectorAll(".workflow-storage-tree")) {
      for (const details of tree.querySelectorAll("details[open]")) letCopyPaths(details);
      stayReachable(tree);
    }
  }

  // Each row of a tree that is seen has a button that copies where in the value it is. Of a tree one is
  // reached by Tab, the others from there by the arrows up and down.
  function letCopyPaths(details) {
    for (const row of details.querySelectorAll(":scope > ul > [data-path]")) {
      if (row.firstElementChild?.matches(".workflow-storage-copy-path")) continue;
      const button = document.createElement("button");
      button.type = "button";
      button.tabIndex = -1;
      button.className = "workflow-storage-copy workflow-storage-copy-path";
      button.title = copyWhat(row.dataset.path);
      button.setAttribute("aria-label", button.title);
      row.prepend(button);
    }
  }

  function seenButtons(tree) {
    const all = tree.querySelectorAll(".workflow-storage-copy-path");
    return [...all].filter((button) => !button.closest("details:not([open])"));
  }

  function stayReachable(tree, chosen) {
    const seen = seenButtons(tree);
    const reached = chosen ?? seen.find((button) => button.tabIndex === 0) ?? seen[0];
    for (const button of tree.querySelectorAll(".workflow-storage-copy-path[tabindex='0']")) {
      button.tabIndex = -1;
    }
    if (reached) reached.tabIndex = 0;
  }

  document.addEventListener("toggle", (event) => {
    const tree = event.target.closest?.(".workflow-storage-tree");
    if (!tree) return;
    if (event.target.open) letCopyPaths(event.target);
    stayReachable(tree);
  }, true);

  document.addEventListener("click", (event) => {
    const button = event.target.closest?.(".workflow-storage-copy-path");
    if (button) copy(button.closest("[data-path]").dataset.path, button);
  });

  document.addEventListener("focusin", (event) => {
    const button = event.target.closest?.(".workflow-storage-copy-path");
    if (button) stayReachable(button.closest(".workflow-storage-tree"), button);
  });

  document.addEventListener("keydown", (event) => {
    const button = event.target.closest?.(".workflow-storage-copy-path");
    const distance = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!button || !distance) return;
    const seen = seenButtons(button.closest(".workflow-storage-tree"));
    seen[seen.indexOf(button) + distance]?.focus();
    event.preventDefault();
  });

  async function copy(text, where) {
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      return;
    }
    where.classList.add("workflow-storage-copied");
    said.textContent = `${words.wordCopied}: ${text}`;
    setTimeout(() => {
      where.classList.remove("workflow-storage-copied");
      said.textContent = "";
    }, 1200);
  }

  // On a narrow page a row of the list has its numbers without the heads of their columns.
  const heads = [...document.querySelectorAll("#result_list thead th")];
  for (const row of document.querySelectorAll("#result_list tbody tr")) {
    [...row.children].forEach((cell, place) => {
      const label = heads[place]?.textContent.trim();
      if (label && /field-(steps|tokens|cost)/.test(cell.className)) cell.dataset.label = label;
    });
  }

  document.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
    // Where an arrow key already does something, such as scrolling a tree, it does that.
    const own = "input, select, textarea, [contenteditable], summary, pre, [tabindex='0']";
    if (event.target.closest?.(own)) return;
    document.querySelector(`a[data-key="${event.key}"]`)?.click();
  });

  // What opens over the page stays in it, and closes when somebody turns to something else.
  const overlays = ".workflow-storage-choice, .workflow-storage-compare-with";
  for (const details of document.querySelectorAll(overlays)) {
    details.addEventListener("toggle", () => {
      const shown = details.querySelector("summary + *");
      shown.classList.remove("workflow-storage-to-the-left");
      const isWide = shown.getBoundingClientRect().right > document.documentElement.clientWidth;
      shown.classList.toggle("workflow-storage-to-the-left", details.open && isWide);
    });
  }
  document.addEventListener("click", (event) => {
    for (const details of document.querySelectorAll(overlays)) {
      if (!details.contains(event.target)) details.open = false;
    }
  });
  document.addEventListener("keydown", (event) => {
    const details = event.key === "Escape" && event.target.closest?.(overlays);
    if (!details?.open) return;
    details.open = false;
    details.querySelector("summary").focus();
  });

  // The names that begin as what is written; without an answer, those that were there stay.
  for (const input of document.querySelectorAll("input[data-suggest]")) {
    let timer;
    input.addEventListener("input", () => {
      clearTimeout(timer);
      timer = setTimeout(async () => {
        const beginning = input.value;
        const url = new URL(input.dataset.suggest, location.href);
        url.searchParams.set("beginning", beginning);
        try {
          const response = await fetch(url, { headers: { Accept: "application/json" } });
          if (!response.ok || response.redirected) return;
          const { names } = await response.json();
          if (input.value !== beginning) return;
          input.list.replaceChildren(...names.map((name) => new Option(name, name)));
        } catch {
          // Suggestions are a help only.
        }
      }, 150);
    });
  }

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
    const url = new URL(page.dataset.live, location.href);
    const regions = {};
    const ended = page.querySelector(".workflow-storage-ended");
    const link = ended.querySelector("a");
    const stop = (why) => {
      ended.replaceChildren(why);
      ended.hidden = false;
    };
    let wait = 2000;
    let version;
    // Of the newest state that was sent, which can be large and is not sent again.
    let step = page.dataset.step;
    const again = () => setTimeout(refresh, wait);
    async function refresh() {
      if (document.hidden) {
        document.addEventListener("visibilitychange", refresh, { once: true });
        return;
      }
      let data;
      try {
        url.searchParams.set("step", step);
        const response = await fetch(url, { headers: { Accept: "application/json" } });
        if (response.status === 404) return stop(ended.dataset.wordGone);
        if (response.status === 403 || response.redirected) {
          link.textContent = ended.dataset.wordLogIn;
          return stop(link);
        }
        data = await response.json();
      } catch {
        wait = Math.min(wait * 2, 60000);
        again();
        return;
      }
      // What has stood still for long, such as a run that waits, is asked for less often.
      Object.assign(regions, data.regions);
      const shown = Object.entries(regions).map(([name, html]) => show(name, html));
      const isNew = version !== data.version || shown.includes(false);
      wait = isNew ? 2000 : Math.min(wait * 1.5, 30000);
      version = data.version;
      step = data.step ?? "";
      if (!data.ended) again();
      else ended.hidden = false;
    }
    again();
  }

  // By region, what the server said last.
  const shown = new Map();

  // Returns whether it is there now.
  function show(name, html) {
    const region = document.querySelector(`[data-region="${name}"]`);
    if (!region || shown.get(name) === html) return true;
    // What somebody has selected, or stands on, is not taken away; the next answer is soon enough.
    const selection = getSelection();
    const isRead = !selection.isCollapsed && selection.containsNode(region, true);
    if (isRead || region.contains(document.activeElement)) return false;
    const open = new Map([...region.querySelectorAll("details")].map((it) => [named(it), it.open]));
    shown.set(name, html);
    region.innerHTML = html;
    for (const details of region.querySelectorAll("details")) {
      details.open = open.get(named(details)) ?? details.open;
    }
    letCopy(region);
    return true;
  }

  // Where a fold is in its section, whatever has come before it.
  function named(details) {
    const path = details.closest("[data-path]")?.dataset.path;
    return path ?? details.querySelector("summary").textContent;
  }
})();
