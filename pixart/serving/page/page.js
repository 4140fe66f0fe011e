// The page of the server: it uses the images API alone, and keeps its images until it is closed.
const MAX_FRAMES = 100; // previews of an image; the server's limit of steps
const element = (id) => document.getElementById(id);
const image = (base64) => `data:image/png;base64,${base64}`;
let model = null;
let running = null; // the AbortController of the request that runs
const session = []; // requests that were answered, oldest first

function node(name, properties = {}, ...children) {
  const created = Object.assign(document.createElement(name), properties);
  created.append(...children);
  return created;
}

function token() {
  const match = location.hash.match(/^#token=(.+)$/);
  if (match) {
    sessionStorage.setItem("token", decodeURIComponent(match[1]));
    history.replaceState(null, "", location.pathname); // the token stays out of bookmarks
  }
  return sessionStorage.getItem("token");
}

async function call(path, body, signal) {
  const headers = body ? { "Content-Type": "application/json" } : {};
  if (token()) headers.Authorization = `Bearer ${token()}`;
  const response = await fetch(path, {
    method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal,
  });
  if (response.ok) return response;
  const answer = await response.json().catch(() => ({}));
  const error = new Error(answer.error?.message ?? `The server answered with status ${response.status}.`);
  error.status = response.status;
  error.retryAfter = response.headers.get("Retry-After");
  throw error;
}

function showError(error) {
  const text = error instanceof TypeError ? "The server does not answer." : error.message;
  element("error").textContent = error.status === 429 ? `${text}.` : text;
  element("error").hidden = false;
}

function setStatus(text) {
  element("status").textContent = text;
}

async function connect() {
  element("error").hidden = true;
  try {
    model = (await (await call("v1/models")).json()).data[0];
  } catch (error) {
    if (error.status === 401) {
      element("login").hidden = false;
      element("model").textContent = "This server asks for a token.";
      if (token()) showError(error);
      sessionStorage.removeItem("token");
      element("token").focus();
    } else showError(error);
    return;
  }
  element("login").hidden = true;
  element("request").hidden = false;
  element("model").textContent = `${model.id} · stage ${model.stage} · ${model.size.replace("x", " × ")} pixels`;
  element("steps").value = model.steps;
  element("guidance").value = model.guidance;
  element("weights").replaceChildren(...model.weights.map((name) => new Option(name, name)));
  element("rewriting").hidden = !model.recaption;
  const isText = model.stage === 2;
  element("text-fields").hidden = !isText;
  element("class-fields").hidden = isText;
  element("prompt").required = isText;
  if (!isText) {
    const count = model.num_classes - 1;
    const names = Array.from({ length: count }, (_, index) => model.classes[index] ?? String(index));
    element("class").replaceChildren(...[...names, "none"].map((name) => new Option(name, name)));
  }
}

async function rewrite() {
  const prompt = element("prompt").value;
  if (!element("prompt").reportValidity()) return;
  element("rewrite").disabled = true;
  element("error").hidden = true;
  setStatus("Rewriting …");
  try {
    const answer = await (await call("v1/prompts/rewrite", { prompt })).json();
    element("rewritten").value = answer.revised_prompt;
    element("rewritten-fields").hidden = false;
    element("rewritten").focus();
    setStatus(answer.problem ? `The prompt is unchanged: ${answer.problem}.` : "Rewritten.");
  } catch (error) {
    setStatus("");
    showError(error);
  } finally {
    element("rewrite").disabled = false;
  }
}

function requestBody() {
  const steps = element("steps").valueAsNumber;
  const body = {
    prompt: model.stage === 2 ? element("prompt").value : element("class").value,
    n: element("n").valueAsNumber,
    steps,
    guidance: element("guidance").valueAsNumber,
    weights: element("weights").value,
    stream: true,
    partial_images: Math.min(MAX_FRAMES, steps - 1),
  };
  const rewritten = element("rewritten").value.trim();
  if (model.stage === 2 && rewritten) body.revised_prompt = rewritten;
  if (element("seed").value !== "") body.seed = element("seed").valueAsNumber;
  return body;
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (text + value).split("\n\n");
    text = parts.pop();
    for (const part of parts) yield JSON.parse(part.split("\n").find((line) => line.startsWith("data: ")).slice(6));
  }
}

async function generate(event) {
  event.preventDefault();
  const body = requestBody();
  const entry = { body, images: Array.from({ length: body.n }, () => ({ frames: [], final: null })) };
  running = new AbortController();
  element("generate").disabled = true;
  element("cancel").disabled = false;
  element("error").hidden = true;
  setStatus("Waiting for a place …");
  try {
    const response = await call("v1/images/generations", body, running.signal);
    show(entry);
    let finished = 0;
    for await (const item of events(response)) {
      if (item.error) throw new Error(item.error.message);
      const target = entry.images[item.image_index];
      if (item.type.endsWith("partial_image")) {
        target.frames.push({ step: item.step, source: image(item.b64_json) });
        setStatus(`Step ${item.step + 1} of ${body.steps}`);
      } else {
        target.final = item;
        target.frames.push({ step: body.steps - 1, source: image(item.b64_json) });
        finished += 1;
      }
      target.update?.();
    }
    if (finished < body.n) throw new Error("The connection ended before the images were complete.");
    session.push(entry);
    setStatus(finished === 1 ? "1 image is ready." : `${finished} images are ready.`);
  } catch (error) {
    const left = error.name === "AbortError";
    setStatus(left ? "Cancelled." : "");
    if (!left) showError(error);
    if (session.length) show(session.at(-1));
    else element("results").hidden = true;
  } finally {
    running = null;
    element("generate").disabled = false;
    element("cancel").disabled = true;
    showGallery();
  }
}

function sampledPrompt(entry) {
  return entry.body.revised_prompt ?? entry.body.prompt;
}

function show(entry) {
  element("results").hidden = false;
  element("shown-prompt").textContent = sampledPrompt(entry);
  element("shown-request").textContent = `Request: ${entry.body.prompt}`;
  element("shown-request").hidden = !entry.body.revised_prompt;
  element("images").replaceChildren(...entry.images.map((item, index) => figure(entry, item, index)));
  showGallery(entry);
}

function figure(entry, item, index) {
  const picture = node("img", { alt: "" });
  const slider = node("input", { type: "range", min: 0, id: `frame-${index}` });
  const label = node("label", { htmlFor: slider.id });
  const caption = node("figcaption");
  const select = () => {
    const frame = item.frames[slider.valueAsNumber];
    if (!frame) return;
    picture.src = frame.source;
    picture.alt = `${sampledPrompt(entry)}, step ${frame.step + 1} of ${entry.body.steps}`;
    label.textContent = `Image ${index + 1}, step ${frame.step + 1} of ${entry.body.steps}`;
    slider.setAttribute("aria-valuetext", `step ${frame.step + 1}`);
  };
  item.update = () => {
    slider.max = Math.max(0, item.frames.length - 1);
    slider.value = slider.max;
    slider.disabled = item.frames.length < 2;
    select();
    if (!item.final) return;
    const name = `seed-${item.final.seed}.png`;
    caption.replaceChildren(
      node("span", { textContent: `seed ${item.final.seed}` }),
      node("a", { href: item.frames.at(-1).source, download: name, textContent: "Download" }),
      node("button", { type: "button", className: "link", textContent: "Lineage", onclick: showLineage }),
    );
  };
  slider.addEventListener("input", select);
  const created = node("figure", {}, picture, label, slider, caption);
  label.textContent = `Image ${index + 1}`;
  slider.disabled = true;
  item.update();
  return created;
}

async function showLineage() {
  try {
    const page = await (await call("lineage")).blob();
    open(URL.createObjectURL(page), "_blank", "noopener");
  } catch (error) {
    showError(error);
  }
}

function showGallery(current = session.at(-1)) {
  element("session").hidden = !session.length;
  element("gallery").replaceChildren(
    ...session.map((entry, index) => {
      const picture = node("img", { src: entry.images[0].frames.at(-1).source, alt: `Request ${index + 1}: ${sampledPrompt(entry)}` });
      const button = node("button", { type: "button", onclick: () => show(entry) }, picture);
      button.setAttribute("aria-current", String(entry === current));
      return node("li", {}, button);
    }),
  );
}

element("login").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("token", element("token").value);
  connect();
});
element("rewrite").addEventListener("click", rewrite);
element("request").addEventListener("submit", generate);
element("cancel").addEventListener("click", () => running?.abort());
connect();
