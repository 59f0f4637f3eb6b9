"use strict";
// Everything that comes from a model reaches the page as a text node, never as markup.
(() => {
  const $ = (id) => document.getElementById(id);
  const SHOWN_TASKS = 50;
  const SHOWN_ROLLOUTS = 200;
  const FOLD_CHARS = 2500;

  const make = (tag, options = {}, ...children) => {
    const { cls, text, on, ...rest } = options;
    const element = document.createElement(tag);
    if (cls) element.className = cls;
    if (text !== undefined) element.textContent = text;
    for (const [name, value] of Object.entries(rest)) {
      if (value === true) element.setAttribute(name, "");
      else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
    }
    for (const [event, action] of Object.entries(on || {})) element.addEventListener(event, action);
    element.append(...children.filter((child) => child !== null && child !== undefined));
    return element;
  };
  const count = (number) => number.toLocaleString("en-US");
  const seconds = (value) => (value < 0.0995 ? `${+(1000 * value).toPrecision(3)} ms` : `${+value.toPrecision(3)} s`);

  const tail = (text) => { const end = text.trim().replace(/\s+/g, " "); return end.length > 34 ? `…${end.slice(-34)}` : end; };

  async function unpacked(id) {
    const element = $(id);
    const binary = atob(element.textContent.trim());
    element.remove();
    const bytes = Uint8Array.from(binary, (character) => character.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).text();
  }

  // Plots ------------------------------------------------------------------------------------------------------------

  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  function look() {
    const axis = { gridcolor: css("--line"), linecolor: css("--line"), zerolinecolor: css("--line"), automargin: true };
    return {
      layout: {
        paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", dragmode: false,
        font: { color: css("--muted"), size: 12, family: getComputedStyle(document.body).fontFamily },
        hoverlabel: { bgcolor: css("--card"), bordercolor: css("--line"), font: { color: css("--text") } },
        legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
        xaxis: axis, yaxis: axis,
      },
    };
  }

  const plots = [];

  function drawPlots(figures) {
    const template = look();
    const config = { displayModeBar: false, responsive: true, showTips: false };
    return Promise.all([...document.querySelectorAll(".plot")].map(async (element) => {
      const { data, layout } = figures[element.dataset.figure];
      await Plotly.newPlot(element, data, { ...layout, template }, config);
      plots.push(element);
      if (element.dataset.figure.startsWith("heat-")) {
        element.on("plotly_click", ({ points }) => {
          if (points[0].customdata >= 0) rollouts.ofTask(points[0].customdata, Number(element.dataset.figure.slice(5)));
        });
      }
    }));
  }

  // Theme ------------------------------------------------------------------------------------------------------------

  function setUpTheme() {
    const button = $("theme");
    const themes = ["auto", "light", "dark"];
    let at = 0;
    const paint = () => plots.forEach((element) => Plotly.relayout(element, { template: look() }));
    button.hidden = false;
    button.addEventListener("click", () => {
      at = (at + 1) % themes.length;
      if (at) document.documentElement.dataset.theme = themes[at];
      else delete document.documentElement.dataset.theme;
      button.textContent = `Theme: ${themes[at]}`;
      paint();
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
  }

  function setUpNavigation() {
    const links = new Map([...document.querySelectorAll("nav a")].map((a) => [a.getAttribute("href").slice(1), a]));
    const seen = new IntersectionObserver((changes) => {
      for (const change of changes) {
        if (!change.isIntersecting) continue;
        links.forEach((link, id) => link.classList.toggle("here", id === change.target.id));
      }
    }, { rootMargin: "-20% 0px -75% 0px" });
    links.forEach((_, id) => seen.observe($(id)));
  }

  // Tasks ------------------------------------------------------------------------------------------------------------

  const outcomeOf = (reward) => (reward === null ? "failed" : reward >= 1 ? "pass" : reward <= 0 ? "fail" : "partial");

  function setUpTasks(data) {
    const tasks = data.families.flatMap((family) => family.tasks.map((task) => ({ ...task, members: family.members })));
    const total = (kind) => data.families.reduce((sum, family) => sum + (family.totals[kind] || 0), 0);
    const is = {
      sometimes: ["Sometimes pass", (task) => task.kind === "sometimes"],
      differ: ["Jobs differ", (task) => task.spread > 0],
      never: ["Never pass", (task) => task.kind === "never"],
      always: ["Always pass", (task) => task.kind === "always"],
      unscored: ["Without a reward", (task) => task.kind === "unscored"],
      all: ["All", () => true],
    };
    const many = data.jobs.length > 1;
    if (!many) delete is.differ;
    else is.sometimes[0] = "Mixed outcomes";
    let chosen = Object.keys(is).find(total) || "all";
    let shown = SHOWN_TASKS;

    const head = make("tr", {}, make("th", { text: "task" }),
      ...data.jobs.map((job) => make("th", {}, many ? chip(job) : "rollouts")), make("th", { text: "about" }));
    $("task-table").tHead.replaceChildren(head);

    const cell = (task, job) => {
      const member = task.members.indexOf(job);
      if (member < 0) return make("td", { text: "" });
      const dots = task.rewards[member].map(([rollout, reward]) => dot(job, task.task, rollout, reward));
      const mean = task.means[member];
      const text = mean === null ? "–" : `${+(100 * mean).toFixed(1)} %`;
      return make("td", {}, make("span", { cls: "dots" }, ...dots), dots.length > 1 ? make("small", { text }) : null);
    };
    const row = (task) => make("tr", {},
      make("td", {}, make("button", {
        cls: "link", type: "button", text: String(task.task), title: "show its rollouts",
        on: { click: () => rollouts.ofTask(task.task, task.members[0]) },
      })),
      ...data.jobs.map((_, job) => cell(task, job)),
      make("td", { cls: "about", text: task.about }));

    const draw = () => {
      const found = tasks.filter(is[chosen][1]);
      $("task-table").tBodies[0].replaceChildren(...found.slice(0, shown).map(row));
      const more = found.length > shown
        ? make("button", { cls: "link", type: "button", text: "show more", on: { click: () => { shown += 200; draw(); } } })
        : null;
      const left = total(chosen) - found.length;
      const note = left ? `; this page leaves out ${count(left)} more` : "";
      $("task-count").replaceChildren(
        `${count(Math.min(shown, found.length))} of ${count(found.length)} shown${note}. `, ...(more ? [more] : []));
      $("task-filters").replaceChildren(...Object.entries(is)
        .map(([key, [name]]) => [key, name, total(key)])
        .filter(([key, , number]) => number || key === "all")
        .map(([key, name, number]) => make("button", {
          cls: key === chosen ? "pill on" : "pill", type: "button", "aria-pressed": String(key === chosen),
          on: { click: () => { chosen = key; shown = SHOWN_TASKS; draw(); } },
        }, name, make("b", { text: count(number) }))));
    };
    draw();
  }

  const chip = (job) => {
    const colour = make("i");
    colour.style.background = job.colour;
    return make("span", { cls: "chip" }, colour, job.label);
  };

  function dot(job, task, rollout, reward) {
    const at = rollouts.find(job, task, rollout);
    const outcome = outcomeOf(reward);
    const said = reward === null ? "no reward" : `reward ${+reward.toFixed(4)}`;
    return make("button", {
      cls: `dot ${outcome}`, type: "button", disabled: at === undefined,
      title: `rollout ${rollout}: ${said}${at === undefined ? "; not in this report" : ""}`,
      on: { click: () => rollouts.open(at, true) },
    });
  }

  // Rollouts ---------------------------------------------------------------------------------------------------------

  const rollouts = {
    all: [], data: null, visible: [], current: null, task: null,

    key: (job, task, rollout) => `${job}/${task}/${rollout}`,
    find(job, task, rollout) { return this.places.get(this.key(job, task, rollout)); },

    setUp(data) {
      this.data = data;
      this.all = data.transcripts;
      this.places = new Map(this.all.map((one, at) => [this.key(one.job, one.task, one.rollout), at]));
      this.haystacks = new Array(this.all.length);
      this.fillChoices();
      for (const id of ["by-job", "by-outcome", "by-reason", "order"]) $(id).addEventListener("change", () => this.draw());
      let waiting;
      $("query").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(() => this.draw(), 120); });
      $("one-task").addEventListener("click", () => { this.task = null; this.draw(); });
      $("list").addEventListener("keydown", (event) => this.step(event));
      document.querySelectorAll("[data-open]").forEach((row) => {
        row.addEventListener("click", () => this.open(Number(row.dataset.open), true));
      });
      document.querySelectorAll("[data-show]").forEach((button) => {
        button.hidden = !this.all.some((one) => this.isOutcome(one, button.dataset.show));
        button.addEventListener("click", () => {
          this.clear();
          $("by-job").value = button.dataset.job;
          $("by-outcome").value = button.dataset.show;
          this.draw();
          this.show();
        });
      });
      $("browser").hidden = !this.all.length;
      this.draw();
      addEventListener("hashchange", () => this.follow());
      this.follow();
    },

    fillChoices() {
      const choose = (id, options) => {
        $(id).replaceChildren(...options.map(([value, text]) => make("option", { value, text })));
        $(id).hidden = options.length < 3;
      };
      const outcomes = new Set(this.all.map((one) => one.outcome));
      const classes = [...new Set(this.all.filter((one) => one.failure).map((one) => one.failure.class))].sort();
      const reasons = new Set(this.all.flatMap((one) => one.why));
      choose("by-job", [["", "all jobs"], ...this.data.jobs.map((job, at) => [String(at), job.label])]);
      choose("by-outcome", [["", "all outcomes"],
        ...["pass", "partial", "fail", "failed"].filter((name) => outcomes.has(name)).map((name) => [name, name]),
        ...classes.map((name) => [`failed:${name}`, `failed: ${name}`])]);
      choose("by-reason", [["", "all reasons"], ...Object.entries(this.data.reasons).filter(([name]) => reasons.has(name))]);
    },

    isOutcome: (one, wanted) => !wanted || one.outcome === wanted || (one.failure && wanted === `failed:${one.failure.class}`),

    haystack(at) {
      if (this.haystacks[at] === undefined) {
        const one = this.all[at];
        const texts = [...one.input, ...one.output].flatMap((item) => [item.name || "", item.text]);
        const fields = [...one.verdict, ...one.row].flat();
        const failure = one.failure ? [one.failure.class, one.failure.detail] : [];
        this.haystacks[at] = [`task ${one.task}`, ...texts, ...fields, ...failure].join("\n").toLowerCase();
      }
      return this.haystacks[at];
    },

    clear() {
      this.task = null;
      for (const id of ["query", "by-job", "by-outcome", "by-reason"]) $(id).value = "";
    },

    draw() {
      const words = $("query").value.trim().toLowerCase();
      const [job, outcome, reason] = ["by-job", "by-outcome", "by-reason"].map((id) => $(id).value);
      this.query = words;
      this.visible = this.all.map((_, at) => at).filter((at) => {
        const one = this.all[at];
        return (job === "" || one.job === Number(job)) && this.isOutcome(one, outcome)
          && (reason === "" || one.why.includes(reason)) && (this.task === null || this.task.fits(one))
          && (words === "" || this.haystack(at).includes(words));
      });
      const order = {
        task: (a, b) => a.task - b.task || a.rollout - b.rollout || a.job - b.job,
        work: (a, b) => (b.work || 0) - (a.work || 0),
        tokens: (a, b) => (b.tokens || 0) - (a.tokens || 0),
        reward: (a, b) => (a.reward === null ? Infinity : a.reward) - (b.reward === null ? Infinity : b.reward),
      }[$("order").value];
      this.visible.sort((a, b) => order(this.all[a], this.all[b]) || a - b);
      $("one-task").hidden = this.task === null;
      if (this.task) $("one-task").textContent = `task ${this.task.index} ✕`;
      $("count").textContent = this.visible.length === this.all.length
        ? `${count(this.all.length)} rollouts` : `${count(this.visible.length)} of ${count(this.all.length)} rollouts`;
      if (!this.visible.includes(this.current)) this.current = this.visible.length ? this.visible[0] : null;
      this.drawList(Math.max(SHOWN_ROLLOUTS, this.visible.indexOf(this.current) + 1));
      this.drawDetail();
    },

    drawList(most) {
      const left = this.visible.length - most;
      const more = make("li", {}, make("button", {
        cls: "link", type: "button", text: `${count(left)} more`, on: { click: () => this.drawList(most + SHOWN_ROLLOUTS) },
      }));
      $("list").replaceChildren(...this.visible.slice(0, most).map((at) => this.line(at)), ...(left > 0 ? [more] : []));
      this.markCurrent();
    },

    line(at) {
      const one = this.all[at];
      const tag = make("i", { cls: "tag" });
      tag.style.background = this.data.jobs[one.job].colour;
      const last = [...one.output].reverse().find((item) => item.kind === "assistant" && item.text.trim());
      const said = one.failure ? `${one.failure.class}: ${one.failure.detail}` : last ? last.text : "";
      return make("li", {}, make("button", {
        type: "button", "data-at": at, on: { click: () => this.open(at, false) },
      },
      make("span", { cls: "head" },
        make("span", {}, this.data.jobs.length > 1 ? tag : null, `task ${one.task} · ${one.rollout}`), this.badge(one)),
      make("span", { cls: "line", text: tail(said) })));
    },

    badge: (one) => make("span", {
      cls: `outcome ${one.outcome}`,
      text: one.outcome === "partial" ? `${+one.reward.toFixed(3)}` : one.outcome,
    }),

    step(event) {
      const by = { ArrowDown: 1, ArrowUp: -1, j: 1, k: -1 }[event.key];
      if (!by) return;
      event.preventDefault();
      const next = this.visible[this.visible.indexOf(this.current) + by];
      if (next === undefined || !$("list").querySelector(`[data-at="${next}"]`)) return;
      this.open(next, false);
      $("list").querySelector(`[data-at="${next}"]`).focus({ preventScroll: true });
    },

    show() { $("rollouts").scrollIntoView(); },

    open(at, jump) {
      if (at === undefined) return;
      if (!this.visible.includes(at)) { this.clear(); this.current = at; this.draw(); }
      this.current = at;
      if (!$("list").querySelector(`[data-at="${at}"]`)) this.drawList(this.visible.indexOf(at) + 1);
      this.drawDetail();
      const one = this.all[at];
      history.replaceState(null, "", `#rollout=${this.key(one.job, one.task, one.rollout)}`);
      if (jump) this.show();
      else if (matchMedia("(max-width: 820px)").matches) $("detail").scrollIntoView();
    },

    ofTask(index, job) {
      const family = this.data.families.find((one) => one.members.includes(job));
      this.clear();
      this.task = { index, fits: (one) => one.task === index && family.members.includes(one.job) };
      this.draw();
      this.show();
    },

    follow() {
      const match = /^#rollout=(\d+\/\d+\/\d+)$/.exec(location.hash);
      if (match) this.open(this.places.get(match[1]), true);
    },

    markCurrent() {
      const list = $("list");
      for (const button of list.querySelectorAll("[data-at]")) {
        const here = Number(button.dataset.at) === this.current;
        button.setAttribute("aria-current", String(here));
        const top = button.offsetTop - list.offsetTop;
        if (here && (top < list.scrollTop || top > list.scrollTop + list.clientHeight - 60)) list.scrollTop = top - 60;
      }
    },

    drawDetail() {
      this.markCurrent();
      if (this.current === null) {
        const text = this.task && !this.all.some(this.task.fits)
          ? `No rollout of task ${this.task.index} is in this page; they are in the files.` : "No rollout fits.";
        $("detail").replaceChildren(make("p", { cls: "empty", text }));
        return;
      }
      $("detail").replaceChildren(...this.detail(this.all[this.current]));
    },

    detail(one) {
      const job = this.data.jobs[one.job];
      const facts = [
        one.reward === null ? "no reward" : `reward ${+one.reward.toFixed(4)}`,
        one.tokens === null ? null : `${count(one.tokens)} tokens`,
        one.work ? seconds(one.work) : null,
        one.attempt > 1 ? `attempt ${one.attempt}` : null,
        one.cut ? `cut off: ${one.cut}` : null,
        ...Object.entries(one.stages).map(([name, value]) => `${name.replaceAll("_", " ")} ${seconds(value)}`),
      ].filter(Boolean);
      const parts = [
        make("h3", {}, this.data.jobs.length > 1 ? chip(job) : null, `Task ${one.task}, rollout ${one.rollout}`, this.badge(one)),
        make("p", { cls: "facts" }, ...facts.map((text) => make("span", { text }))),
        ...this.siblings(one),
      ];
      if (one.failure) parts.push(...this.failure(one.failure));
      if (one.verdict.length) parts.push(make("h4", { text: one.failure ? "Fields" : "Verdict" }), this.fields(one.verdict));
      parts.push(make("h4", { text: "Conversation" }), ...this.conversation(one));
      if (one.row.length) {
        parts.push(make("details", { cls: "card" }, make("summary", { text: "The task’s row" }), this.fields(one.row)));
      }
      return parts;
    },

    siblings(one) {
      const family = this.data.families.find((own) => own.members.includes(one.job));
      const same = this.all.map((_, at) => at).filter((at) => this.all[at].task === one.task && family.members.includes(this.all[at].job));
      if (same.length < 2) return [];
      same.sort((a, b) => this.all[a].job - this.all[b].job || this.all[a].rollout - this.all[b].rollout);
      return [make("p", { cls: "siblings" }, make("span", { cls: "muted", text: "same task:" }), ...same.slice(0, 40).map((at) => {
        const other = this.all[at];
        const name = this.data.jobs.length > 1 ? `${this.data.jobs[other.job].label} · ${other.rollout}` : String(other.rollout);
        return make("button", {
          cls: other === one ? "pill on" : "pill", type: "button", on: { click: () => this.open(at, false) },
        }, make("i", { cls: `dot ${other.outcome}` }), name);
      }))];
    },

    failure: (failure) => [
      make("h4", { text: "Failure" }),
      make("dl", {}, ...[["class", failure.class], ["stage", failure.stage], ["detail", failure.detail],
        ["what to do", failure.advice], ["earlier attempts", failure.earlier.join("\n")]]
        .filter(([, text]) => text).map(([name, text]) => rollouts.field(name, text))),
    ],

    fields(pairs) { return make("dl", {}, ...pairs.map(([name, text]) => this.field(name, text))); },

    field(name, text) {
      return make("div", { cls: "field" }, make("dt", { text: name }), make("dd", {}, ...this.marked(text)));
    },

    conversation(one) {
      const told = one.tools ? [{ kind: "tools", text: one.tools.join(", ") }] : [];
      const items = [...told, ...one.input, ...one.output];
      return items.length ? items.map((item) => this.item(item)) : [make("p", { cls: "empty", text: "The files hold no messages." })];
    },

    item(item) {
      const names = { call: "call", result: "result of the call", note: item.name || "note" };
      const body = this.body(item.text, item.kind === "call" || item.kind === "result");
      const who = names[item.kind] || item.kind;
      const name = item.kind === "call" ? make("code", {}, ...this.marked(item.name)) : null;
      if (item.kind === "reasoning" || item.kind === "system" || item.kind === "developer") {
        const found = this.query && item.text.toLowerCase().includes(this.query);
        const open = found || item.text.length < 600;
        return make("details", { cls: `item ${item.kind}`, open }, make("summary", { cls: "who", text: `${who} · ${count(item.text.length)} characters` }), body);
      }
      return make("div", { cls: `item ${item.kind}` }, make("p", { cls: "who" }, who, name), body);
    },

    body(text, plain) {
      const body = make("div", { cls: "text" }, ...(plain ? this.marked(text) : this.withCode(text)));
      if (text.length <= FOLD_CHARS || (this.query && text.toLowerCase().includes(this.query))) return body;
      const box = make("div", {}, body);
      body.classList.add("folded");
      box.append(make("button", {
        cls: "link", type: "button", text: `show all ${count(text.length)} characters`,
        on: { click: (event) => { body.classList.remove("folded"); event.target.remove(); } },
      }));
      return box;
    },

    // Fenced blocks as code, all else as it stands.
    withCode(text) {
      const parts = [];
      const fence = /^[ \t]*```([^\n`]*)\n([\s\S]*?)(?:\n?^[ \t]*```[ \t]*$|(?![\s\S]))/gm;
      let done = 0;
      for (const match of text.matchAll(fence)) {
        parts.push(...this.marked(text.slice(done, match.index).replace(/\n$/, "")));
        const language = match[1].trim();
        parts.push(make("pre", {}, language ? make("span", { cls: "lang", text: language }) : null,
          make("code", {}, ...this.marked(match[2]))));
        done = match.index + match[0].length;
      }
      parts.push(...this.marked(text.slice(done).replace(/^\n/, "")));
      return parts;
    },

    // Text nodes, what is searched for in <mark>.
    marked(text) {
      if (!this.query) return [text];
      const low = text.toLowerCase();
      if (low.length !== text.length) return [text];
      const parts = [];
      let done = 0;
      for (let at = low.indexOf(this.query); at >= 0; at = low.indexOf(this.query, done)) {
        parts.push(text.slice(done, at), make("mark", { text: text.slice(at, at + this.query.length) }));
        done = at + this.query.length;
      }
      return [...parts, text.slice(done)];
    },
  };

  // Start ------------------------------------------------------------------------------------------------------------

  async function start() {
    setUpTheme();
    setUpNavigation();
    const data = JSON.parse(await unpacked("data"));
    rollouts.setUp(data);
    setUpTasks(data);
    document.head.append(make("script", { text: await unpacked("library") }));
    await drawPlots(data.figures);
    document.documentElement.dataset.ready = "yes";
  }

  start().catch((error) => {
    const trouble = $("trouble");
    trouble.hidden = false;
    trouble.textContent = typeof DecompressionStream === "undefined"
      ? "This browser is too old for the plots and the transcripts; the tables are complete."
      : `The plots or the transcripts could not be shown: ${error}`;
    throw error;
  });
})();
