"use strict";
// Text from rows and answers is always inserted as text, never as HTML.
const $ = (id) => document.getElementById(id);
const make = (tag, kind, text) => {
  const node = document.createElement(tag);
  if (kind) node.className = kind;
  if (text !== undefined) node.textContent = text;
  return node;
};

$("theme").onclick = () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
};

if ($("rows")) {
  const rows = JSON.parse($("rows").textContent);
  const words = rows.map((row) => [row.id, row.error && row.error.message,
    ...row.turns.flatMap((turn) => turn.parts.flatMap((part) => [part.name, part.text]))].join("\n").toLowerCase());
  let shown = rows.map((_, at) => at);
  let place = 0;

  const secs = (s) => s < 1 ? `${(s * 1000).toPrecision(3)} ms` : `${s.toPrecision(3)} s`;

  // A folded text that other rows have, too.
  const folded = (title, text, kind) => {
    const box = make("details", "shared");
    box.append(make("summary", "", title), make("div", kind, text));
    return box;
  };

  const part = (part) => {
    if (part.shared) {
      const [before, after] = part.shared;
      const kind = part.kind === "code" ? "pre" : "text";
      const box = make("div", "");
      const end = part.text.length - after;
      if (before) box.append(folded("the beginning that other rows have, too", part.text.slice(0, before), kind));
      box.append(make(part.kind === "code" ? "pre" : "div", part.kind === "code" ? "" : "text", part.text.slice(before, end)));
      if (after) box.append(folded("the ending that other rows have, too", part.text.slice(end), kind));
      return box;
    }
    if (part.kind === "text") return make("div", "text", part.text);
    if (part.kind === "note") return make("div", "text dim", part.text);
    if (part.kind === "code") return make("pre", "", part.text);
    if (part.kind === "reasoning") {
      const box = make("details", "reasoning");
      box.open = true;
      box.append(make("summary", "", "reasoning"), make("div", "text", part.text));
      return box;
    }
    if (part.kind === "call") {
      const box = make("div", "call");
      let text = part.text;
      try { text = JSON.stringify(JSON.parse(text), null, 2); } catch { /* truncated or invalid JSON is shown unchanged */ }
      box.append(make("div", "who", "tool call"), make("b", "", part.name), make("pre", "", text));
      return box;
    }
    return make("div", "thing", `${part.kind === "image" ? "image" : "content of another kind"}: ${part.text}`);
  };

  const turn = (turn) => {
    const box = make("div", `turn ${["user", "assistant", "note"].includes(turn.role) ? turn.role : "other"}`);
    if (turn.answer) box.classList.add("answer");
    if (turn.role !== "note") {
      box.append(make("div", "who", [turn.role, turn.answer && "answer", turn.note].filter(Boolean).join(" · ")));
    }
    if (turn.rows) {
      const text = turn.parts.map((one) => one.text).join("\n");
      box.append(folded(`the same in ${turn.rows} rows of this page`, text, "text"));
    } else for (const one of turn.parts) box.append(part(one));
    for (const node of box.children) node.dir = "auto";
    return box;
  };

  const draw = () => {
    const chat = $("chat");
    chat.replaceChildren();
    $("place").textContent = shown.length ? `${place + 1} of ${shown.length}` : "none";
    $("before").disabled = place === 0;
    $("after").disabled = place >= shown.length - 1;
    [...$("list").children].forEach((item, at) => item.firstChild.setAttribute("aria-current", String(at === place)));
    if (!shown.length) return chat.append(make("p", "dim", "No conversation matches."));
    const row = rows[shown[place]];
    const head = make("div", "head");
    head.append(make("h3", "", ""), make("span", "dim", `row ${(row.index + 1).toLocaleString("en")}`));
    head.firstChild.append(make("bdi", "", row.id));
    chat.append(head, ...row.turns.map(turn));
    if (row.error) {
      const failed = make("div", "turn failure");
      failed.append(make("div", "who", row.error.type + (row.error.status ? ` (status ${row.error.status})` : "")),
        make("div", "text", row.error.message));
      failed.lastChild.dir = "auto";
      chat.append(failed);
    }
    const facts = [row.finish && `finish reason: ${row.finish}`, row.latency && secs(row.latency),
      row.queued > 0.0005 && `after ${secs(row.queued)} of queueing`,
      row.usage && `${row.usage[0].toLocaleString("en")} tokens in, ${row.usage[2].toLocaleString("en")} out`,
      row.attempts > 1 && `${row.attempts} attempts`, row.model];
    chat.append(make("p", "dim small", facts.filter(Boolean).join(" · ")));
  };

  const go = (to) => {
    place = Math.max(0, Math.min(shown.length - 1, to));
    draw();
    const item = $("list").children[place];
    if (item && item.offsetParent) $("list").scrollTop = item.offsetTop - $("list").clientHeight / 2;
  };

  const list = () => {
    const needle = $("find").value.toLowerCase().trim();
    const bad = $("bad") && $("bad").checked;
    shown = rows.map((_, at) => at).filter((at) => (!bad || rows[at].error) && words[at].includes(needle));
    $("list").replaceChildren(...shown.map((at, here) => {
      const row = rows[at];
      const button = make("button", row.error ? "failed" : "");
      button.type = "button";
      button.append(make("bdi", "", row.id), make("span", "dim", row.brief || ""));
      button.onclick = () => go(here);
      const item = make("li");
      item.append(button);
      return item;
    }));
    go(0);
  };

  const follow = () => {
    const at = rows.findIndex((row) => location.hash === `#row-${row.index}`);
    if (at < 0) return;
    $("find").value = "";
    if ($("bad")) $("bad").checked = false;
    list();
    go(at);
    $("conversations").scrollIntoView();
  };

  $("find").oninput = list;
  if ($("bad")) $("bad").onchange = list;
  $("before").onclick = () => go(place - 1);
  $("after").onclick = () => go(place + 1);
  addEventListener("hashchange", follow);
  addEventListener("keydown", (event) => {
    if (event.target.tagName === "INPUT" || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "ArrowLeft") go(place - 1);
    if (event.key === "ArrowRight") go(place + 1);
  });
  document.querySelectorAll("#conversations [hidden]").forEach((node) => { node.hidden = false; });
  list();
  follow();
}
