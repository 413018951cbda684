// Picks a picture: a file's bytes become the component's value and go nowhere else.
const part = (name) => element.querySelector(name);
const demos = () => props.demos ?? [];

function say(text) {
  const problem = part(".problem");
  problem.hidden = !text;
  problem.textContent = text;
}

function choose(value) {
  props.value = value;
  drawPicker();
  trigger("select");
}

function take(file) {
  if (!file) return;
  if (file.size > props.most) {
    say(`${file.name} is too large: ${Math.round(props.most / 2 ** 20)} MiB are accepted at most.`);
    return;
  }
  const reader = new FileReader();
  reader.onload = () => {
    say("");
    choose({ picked: reader.result, file: file.name, question: "" });
  };
  reader.onerror = () => say(`${file.name} cannot be read.`);
  reader.readAsDataURL(file);
}

function drawPicker() {
  const { picked } = props.value ?? {};
  const demo = demos().find((one) => one.name === picked);
  part(".preview").src = demo ? demo.uri : picked ?? "data:,";
  part(".demos").replaceChildren(...demos().map((one, place) => make("button", {
    type: "button", "aria-pressed": String(one.name === picked), "aria-label": `Demo picture ${place + 1}`,
    onclick: () => choose({ picked: one.name, file: "", question: one.questions[0] }),
  }, make("img", { src: one.uri, alt: "" }))));
  part(".asks").replaceChildren(...(demo ? demo.questions : []).map((question) => make("button", {
    type: "button", onclick: () => choose({ picked, file: "", question }),
  }, question)));
}

function listen() {
  const drop = part(".drop");
  part("input").addEventListener("change", (event) => take(event.target.files[0]));
  drop.addEventListener("dragover", (event) => event.preventDefault());
  drop.addEventListener("drop", (event) => {
    event.preventDefault();
    take(event.dataTransfer.files[0]);
  });
  drawPicker();
}
listen();
