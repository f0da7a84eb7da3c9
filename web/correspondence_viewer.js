// Correspondence Viewer: point at the crop and see where the model looks in the reference.
// The node sends pictures, saved as its previews are, and says of each pair:
//   rows     a grey picture: row = cell of the crop, column = token of the reference, each row's peak white
//   peaks    of each row, the share of attention that its peak stands for
//   square   [x, y, width, height]: what of the reference the tokens cover, in its pixels
//   affine   [a, b, c, d, e, f]: (x, y) in -1..1 over the crop -> pixels of the reference; null without a placement
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const NODE = "RBA_CorrespondenceViewer";
const SIDE = 1024; // of a drawn picture, pixels
const MARGIN = 0.08; // around what the tokens cover, in its sides
const ACCENT = "#35c4ff";

const WORDS = {
  en: { empty: "Run the workflow, then point at the crop.", hint: "Point at the crop. A click holds the point.", peak: "of the attention on its strongest token", ring: "ring: where the placement says", pair: "pair" },
  zh: { empty: "先运行工作流，再把鼠标移到裁剪图上。", hint: "把鼠标移到裁剪图上；单击可固定该点。", peak: "的注意力落在最强的标记上", ring: "圆环：placement 给出的位置", pair: "第" },
  ja: { empty: "ワークフローを実行してから、クロップにポインターを合わせてください。", hint: "クロップにポインターを合わせます。クリックで点を固定します。", peak: "のアテンションが最も強いトークンに集中", ring: "輪：placement が示す位置", pair: "組" },
};

const words = () => WORDS[(app.extensionManager?.setting?.get("Comfy.Locale") ?? "en").split("-")[0]] ?? WORDS.en;

async function load({ filename, subfolder, type }) {
  const image = new Image();
  image.src = api.apiURL(`/view?${new URLSearchParams({ filename, subfolder, type })}`);
  await image.decode();
  return image;
}

function pixels(image) {
  const canvas = Object.assign(document.createElement("canvas"), { width: image.naturalWidth, height: image.naturalHeight });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0);
  return context.getImageData(0, 0, canvas.width, canvas.height).data;
}

function made(tag, style, parent) {
  const element = document.createElement(tag);
  Object.assign(element.style, style);
  parent?.append(element);
  return element;
}

class Viewer {
  constructor() {
    this.pairs = [];
    this.shown = 0;
    this.point = null; // [u, v] in 0..1 over the crop
    this.held = false;
    this.element = made("div", { display: "flex", flexDirection: "column", gap: "4px", minHeight: "160px", width: "100%", height: "100%", overflow: "hidden", boxSizing: "border-box" });
    const row = made("div", { display: "flex", gap: "6px", flex: "1 1 0", minHeight: "0" }, this.element);
    const canvas = { flex: "1 1 0", minWidth: "0", minHeight: "0", height: "100%", objectFit: "contain" };
    this.crop = made("canvas", { ...canvas, cursor: "crosshair", touchAction: "none" }, row);
    this.reference = made("canvas", canvas, row);
    const foot = made("div", { display: "flex", gap: "6px", alignItems: "center", flex: "none", font: "11px sans-serif", color: "var(--input-text, #ddd)" }, this.element);
    this.back = this.button("‹", -1, foot);
    this.forth = this.button("›", 1, foot);
    this.caption = made("span", { overflow: "hidden", textOverflow: "ellipsis", whiteSpace: "nowrap" }, foot);
    // the canvas zooms with the wheel; under Nodes 2.0 the event reaches it by itself
    this.element.addEventListener("wheel", (event) => this.element.closest(".dom-widget") && app.canvas.processMouseWheel(event));
    this.crop.addEventListener("pointermove", (event) => this.held || this.at(this.over(event)));
    this.crop.addEventListener("pointerleave", () => this.held || this.at(null));
    this.crop.addEventListener("click", (event) => {
      this.held = !this.held;
      this.at(this.over(event));
    });
    this.draw();
  }

  button(text, step, parent) {
    const button = made("button", { display: "none", padding: "0 7px", cursor: "pointer" }, parent);
    button.type = "button";
    button.textContent = text;
    button.addEventListener("click", () => {
      this.shown = (this.shown + step + this.pairs.length) % this.pairs.length;
      this.draw();
    });
    return button;
  }

  /** Where a pointer is over the crop, 0..1 on both axes; null beside it. */
  over(event) {
    const { left, top, width, height } = this.crop.getBoundingClientRect();
    const side = Math.min(width / this.crop.width, height / this.crop.height);
    const u = ((event.clientX - left - width / 2) / side + this.crop.width / 2) / this.crop.width;
    const v = ((event.clientY - top - height / 2) / side + this.crop.height / 2) / this.crop.height;
    return u >= 0 && u < 1 && v >= 0 && v < 1 ? [u, v] : null;
  }

  at(point) {
    this.point = point;
    if (!point) this.held = false;
    this.draw();
  }

  async show(pairs) {
    const asked = (this.asked = pairs);
    const loaded = await Promise.all(
      pairs.map(async (pair) => {
        const [crop, reference, rows] = await Promise.all([pair.crop, pair.reference, pair.rows].map(load));
        return { ...pair, crop, reference, rows: pixels(rows), cells: Math.round(Math.sqrt(rows.naturalHeight)), tokens: Math.round(Math.sqrt(rows.naturalWidth)) };
      }),
    ).catch(() => []); // a new ComfyUI has emptied its temporary folder: nothing to show until the next run
    if (asked !== this.asked) return; // a later run was faster
    this.pairs = loaded;
    this.shown = Math.min(this.shown, Math.max(0, loaded.length - 1));
    this.draw();
  }

  draw() {
    const pair = this.pairs[this.shown];
    const told = words();
    for (const button of [this.back, this.forth]) button.style.display = this.pairs.length > 1 ? "" : "none";
    if (!pair) {
      for (const canvas of [this.crop, this.reference]) canvas.width = canvas.height = 1;
      this.caption.textContent = told.empty;
      return;
    }
    const crop = picture(this.crop, pair.crop, [0, 0, pair.crop.naturalWidth, pair.crop.naturalHeight]);
    const [x, y, width, height] = pair.square;
    const [left, top, wide, high] = [x - MARGIN * width, y - MARGIN * height, (1 + 2 * MARGIN) * width, (1 + 2 * MARGIN) * height];
    const reference = picture(this.reference, pair.reference, [left, top, wide, high]);
    const which = this.pairs.length > 1 ? [`${told.pair} ${this.shown + 1} / ${this.pairs.length}`] : [];
    if (!this.point) {
      this.caption.textContent = [...which, told.hint].join(" · ");
      return;
    }
    const [column, line] = this.point.map((share) => Math.floor(share * pair.cells));
    const cell = line * pair.cells + column;
    const side = this.crop.width / pair.cells;
    stroke(crop, (context) => context.strokeRect(column * side, line * side, side, side));
    heat(reference, pair, cell, this.reference.width * (MARGIN / (1 + 2 * MARGIN)));
    const about = [...which, `${(100 * pair.peaks[cell]).toFixed(1)} % ${told.peak}`];
    if (pair.affine) {
      const [a, b, c, d, e, f] = pair.affine;
      const [u, v] = this.point.map((share) => 2 * share - 1);
      const scale = this.reference.width / wide;
      stroke(reference, (context) => {
        context.beginPath();
        context.arc((a * u + b * v + c - left) * scale, (d * u + e * v + f - top) * scale, SIDE / 50, 0, 2 * Math.PI);
        context.stroke();
      });
      about.push(told.ring);
    }
    this.caption.textContent = about.join(" · ");
  }
}

/** Draw a box [x, y, width, height] of a picture on its canvas, SIDE wide. */
function picture(canvas, image, [x, y, width, height]) {
  const scale = SIDE / width;
  canvas.width = SIDE;
  canvas.height = Math.round(height * scale);
  const context = canvas.getContext("2d");
  context.drawImage(image, -x * scale, -y * scale, image.naturalWidth * scale, image.naturalHeight * scale);
  return context;
}

/** Black under a colour: seen on any picture. */
function stroke(context, path) {
  for (const [width, colour] of [[9, "#000b"], [4, ACCENT]]) {
    Object.assign(context, { lineWidth: width, strokeStyle: colour });
    path(context);
  }
}

/** One row of the attention over the reference, which is darkened where it is low. */
function heat(context, { tokens, rows }, cell, margin) {
  const spot = Object.assign(document.createElement("canvas"), { width: tokens, height: tokens });
  const values = new ImageData(tokens, tokens);
  for (let token = 0; token < tokens * tokens; token++) {
    const value = rows[4 * (cell * tokens * tokens + token)] / 255;
    values.data.set([255, 255 * value ** 0.7, 150 * value ** 4, 220 * value], 4 * token);
  }
  spot.getContext("2d").putImageData(values, 0, 0);
  const { width, height } = context.canvas;
  context.fillStyle = "#0007";
  context.fillRect(0, 0, width, height);
  context.imageSmoothingQuality = "high";
  context.drawImage(spot, margin, margin, width - 2 * margin, height - 2 * margin);
}

const viewers = new Map();

app.registerExtension({
  name: "RefineByAlign.CorrespondenceViewer",

  nodeCreated(node) {
    if (node.constructor.comfyClass !== NODE) return;
    const viewer = new Viewer();
    const widget = node.addDOMWidget("viewer", "rba_viewer", viewer.element, { serialize: false, hideOnZoom: false, getMinHeight: () => 180 });
    widget.serialize = false;
    viewers.set(node, viewer);
    // in place of the plain pictures: the first of Nodes 2.0, the second of the canvas
    node.hideOutputImages = true;
    node.onDrawBackground = () => {};
    node.setSize([Math.max(node.size[0], 520), Math.max(node.size[1], 460)]);

    const { onExecuted, onRemoved } = node;
    node.onExecuted = function (output) {
      onExecuted?.call(this, output);
      viewer.show(output.rba_correspondence ?? []);
    };
    node.onRemoved = function () {
      onRemoved?.call(this);
      viewers.delete(node);
    };
  },

  // a tab of workflows that is opened again, a run taken from the queue's history
  onNodeOutputsUpdated(outputs) {
    for (const [node, viewer] of viewers) {
      const place = !node.graph || node.graph.isRootGraph ? node.id : `${node.graph.id}:${node.id}`;
      const pairs = outputs[place]?.rba_correspondence;
      if (pairs && pairs !== viewer.asked) viewer.show(pairs);
    }
  },
});
