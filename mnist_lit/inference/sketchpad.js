// A canvas to draw on with mouse, finger or pen, or to put a photograph on; its value is a data URL.
const LONGER_SIDE = 800;
const canvas = element.querySelector("canvas");
const file = element.querySelector("input");
const message = element.querySelector("output");
const context = canvas.getContext("2d");
let isDrawing = false;

function reset(width, height) {
  const scale = LONGER_SIDE / Math.max(width, height);
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  context.fillStyle = "white";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.lineWidth = LONGER_SIDE / 12;
  context.lineCap = context.lineJoin = "round";
  context.imageSmoothingQuality = "high";
}

function publish() {
  message.textContent = "";
  props.value = canvas.toDataURL();
  trigger("input");
}

function clear() {
  reset(1, 1);
  publish();
}

async function show(photograph) {
  if (!photograph) return;
  try {
    const image = await createImageBitmap(photograph);
    reset(image.width, image.height);
    context.drawImage(image, 0, 0, canvas.width, canvas.height);
    publish();
  } catch {
    message.textContent = `${photograph.name} is not an image that this browser can read`;
  }
}

function draw(event) {
  const scale = canvas.width / canvas.clientWidth;
  context.lineTo(event.offsetX * scale, event.offsetY * scale);
  context.stroke();
}

canvas.addEventListener("pointerdown", (event) => {
  if (!event.isPrimary || event.button !== 0) return;
  isDrawing = true;
  canvas.setPointerCapture(event.pointerId);
  context.beginPath();
  draw(event);
});
canvas.addEventListener("pointermove", (event) => {
  if (isDrawing && event.isPrimary) draw(event);
});
canvas.addEventListener("lostpointercapture", () => {
  isDrawing = false;
  publish();
});

element.querySelector(".photograph").addEventListener("click", () => file.click());
element.querySelector(".clear").addEventListener("click", clear);
file.addEventListener("change", () => {
  show(file.files[0]);
  file.value = ""; // the same file may be chosen again
});
document.addEventListener("paste", (event) => show(event.clipboardData.files[0]));
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault();
  show(event.dataTransfer.files[0]);
});

reset(1, 1);
