// Shows a reply. Answers and questions go into the page as text nodes only.
function figuresOf(figures) {
  return make("dl", {}, ...figures.flatMap(([name, value, share]) => [
    make("dt", {}, name),
    make("dd", {}, value, share ? make("span", { class: "share" }, ` ${share}`) : null),
  ]));
}

function drawReply() {
  const target = element.querySelector(".result");
  const reply = props.value;
  if (!target) return;
  if (!reply) return target.replaceChildren(make("p", { class: "soft" }, "Ask, and the answers stand here."));
  if (reply.error) return target.replaceChildren(make("p", { class: "problem", role: "alert" }, reply.error));
  const cards = make("div", { class: "cards" }, ...reply.answers.map((answer) =>
    make("article", {}, make("h3", {}, answer.title), make("p", { class: "answer" }, answer.text || "(nothing)"), figuresOf(answer.figures))));
  const panels = make("div", { class: "panels" }, ...reply.panels.map((panel) => make("figure", {},
    make("div", { class: "picture" },
      make("img", { src: reply.picture, alt: panel.title }),
      panel.veil ? make("img", { class: "veil", src: panel.veil, alt: "" }) : null),
    make("figcaption", {}, panel.title))));
  const code = make("div", { class: "code", hidden: true },
    ...[["Python", reply.python], ["Command line", reply.shell]].flatMap(([name, text]) => [
      make("div", { class: "code-head" }, make("h4", {}, name),
        make("button", { type: "button", onclick: (event) => {
          navigator.clipboard?.writeText(text);
          event.currentTarget.textContent = "copied";
        } }, "copy")),
      make("pre", { tabindex: "0" }, text)]));
  const toggle = make("button", {
    type: "button", class: "toggle", "aria-expanded": "false",
    onclick: (event) => {
      code.hidden = !code.hidden;
      event.currentTarget.setAttribute("aria-expanded", String(!code.hidden));
      event.currentTarget.textContent = code.hidden ? "Show the code" : "Hide the code";
    },
  }, "Show the code");
  target.replaceChildren(
    make("p", { class: "asked" }, reply.question), cards,
    make("h3", {}, "What is left of the picture, layer by layer"),
    reply.panels.length ? panels : make("p", { class: "soft" }, reply.note),
    toggle, code);
}
watch("value", drawReply);
drawReply();
