// Parts of a page that the server sends anew, and the chat.
"use strict";

for (const part of document.querySelectorAll("[data-live]")) {
  const source = new EventSource(part.dataset.live);
  source.addEventListener("html", (event) => {
    const open = [...part.querySelectorAll("details")].map((each) => each.open);
    part.innerHTML = JSON.parse(event.data);  // rendered and escaped by the server
    part.querySelectorAll("details").forEach((each, at) => { each.open = open[at] ?? each.open; });
  });
}
for (const part of document.querySelectorAll("[data-text]")) {
  new EventSource(part.dataset.text).addEventListener("text", (event) => { part.textContent = JSON.parse(event.data); });
}

const form = document.getElementById("ask");
if (form) {
  const answers = document.getElementById("answers"), talks = new Map();
  let stopping = new AbortController();

  const panel = (model) => {
    if (!talks.has(model)) {
      const section = document.createElement("section"), title = document.createElement("h2");
      title.textContent = model;
      section.append(title);
      answers.append(section);
      talks.set(model, { section, messages: [] });
    }
    return talks.get(model);
  };
  const line = (section, text, kind) => {
    const paragraph = document.createElement("p");
    paragraph.className = kind;
    paragraph.textContent = text;
    section.append(paragraph);
    return paragraph;
  };

  const ask = async (model, question, settings) => {
    const talk = panel(model), signal = stopping.signal;
    const messages = [...talk.messages, { role: "user", content: question }];
    line(talk.section, question, "asked");
    const shown = line(talk.section, "", "answer");
    shown.setAttribute("aria-live", "polite");
    try {
      const response = await fetch("/v1/chat/completions", {
        method: "POST", headers: { "Content-Type": "application/json" }, signal,
        body: JSON.stringify({ model, messages, stream: true, ...settings }),
      });
      if (!response.ok) throw new Error((await response.json()).error.message);
      const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
      for (let left = ""; ;) {
        const { value, done } = await reader.read();
        if (done) break;
        const lines = (left + value).split("\n");
        left = lines.pop();
        for (const each of lines) {
          if (!each.startsWith("data: {")) continue;
          const found = JSON.parse(each.slice(6));
          if (found.error) throw new Error(found.error.message);
          shown.textContent += found.choices[0]?.delta.content ?? "";
        }
      }
    } catch (error) {
      line(talk.section, error.name === "AbortError" ? "stopped" : error.message, "quiet");
      if (!shown.textContent) return;  // an answer that was cut off still belongs to the conversation
    }
    talk.messages = [...messages, { role: "assistant", content: shown.textContent }];
  };

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const fields = new FormData(form), question = fields.get("question");
    const settings = { temperature: Number(fields.get("temperature")), max_tokens: Number(fields.get("tokens")) };
    stopping = new AbortController();
    for (const model of fields.getAll("model")) ask(model, question, settings);
    form.elements.question.value = "";
    form.elements.question.focus();
  });
  form.elements.question.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); form.requestSubmit(); }
  });
  document.getElementById("stop").addEventListener("click", () => stopping.abort());
  document.getElementById("new").addEventListener("click", () => { stopping.abort(); talks.clear(); answers.replaceChildren(); });
}
